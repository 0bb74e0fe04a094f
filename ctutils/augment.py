"""What a training epoch holds: random changes of the pictures, and what to do about rare classes."""

import dataclasses

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler

from ctutils.base import CTError
from ctutils.data import SliceFolder
from ctutils.plan import AUGMENTATIONS, GEOMETRIC


def build_augment(names: tuple[str, ...] = ()):
    """Return a random change of a whole batch, uint8 (B, 1, H, W) -> the same; None for no names.

    Every picture of the batch gets its own draw from torch's random numbers:

        rotate       up to 10 degrees either way
        zoom         0.9 to 1.1
        shift        up to 5 % of the side, each way
        flip         left-right, half of the pictures (which puts the heart on the wrong side)
        blur         Gaussian, standard deviation 0 to 1.5 pixels of the network's input
        noise        Gaussian, standard deviation 0 to 8 grey levels
        jitter       contrast 0.8 to 1.2 about the picture's mean, brightness up to 20 grey levels either way
        randaugment  two of torchvision's fourteen changes, magnitude 9 of 30

    New corners are filled with the grey of the air outside. It runs where the batch is.

    Raises:
        CTError: an unknown name.
    Source: notebook 10; RandAugment: E. Cubuk et al., 2019, https://arxiv.org/abs/1909.13719
    """
    unknown = sorted(set(names) - set(AUGMENTATIONS))
    if unknown:
        raise CTError(f"augmentation {unknown}", f"of {', '.join(AUGMENTATIONS)}", "choose of these")
    if not names:
        return None
    changes = [_move] if set(names) & set(GEOMETRIC) else []
    changes += [change for name, change in (("blur", _blur), ("noise", _noise), ("jitter", _jitter)) if name in names]

    def augment(images):
        if "randaugment" in names:
            images = _randaugment(images)
        pixels = images.float()
        for change in changes:
            pixels = change(pixels, names)
        return pixels.round().clamp(0, 255).to(images.dtype)

    return augment


def _draw(count: int, low: float, high: float) -> torch.Tensor:
    """Draw one number a picture, float (count,), on the CPU: the same draws on every device."""
    return torch.rand(count) * (high - low) + low


def _move(pixels, names):
    """Rotate, zoom, shift and flip in one resampling."""
    count = len(pixels)

    def draw(name: str, low: float, high: float):
        return _draw(count, low, high) if name in names else torch.full((count,), (low + high) / 2)

    angle = torch.deg2rad(draw("rotate", -10, 10))
    scale = draw("zoom", 0.9, 1.1)
    x, y = draw("shift", -0.1, 0.1), draw("shift", -0.1, 0.1)  # the grid runs from -1 to 1
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0) if "flip" in names else torch.ones(count)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    matrix = torch.stack([cos * mirror, -sin, x, sin * mirror, cos, y], 1).view(count, 2, 3)
    grid = functional.affine_grid(matrix.to(pixels.device, non_blocking=True), list(pixels.shape), align_corners=False)
    air = pixels[:, :, :1, :1]
    return functional.grid_sample(pixels - air, grid, padding_mode="zeros", align_corners=False) + air


def _blur(pixels, _names):
    """Blur each picture with a Gaussian of its own: rows, then columns, one group of the convolution a picture."""
    count, reach = len(pixels), 4
    sigma = _draw(count, 0, 1.5).clamp(min=1e-3)[:, None]
    steps = torch.arange(-reach, reach + 1)[None]
    kernel = torch.softmax(-0.5 * (steps / sigma) ** 2, 1).to(pixels.device, non_blocking=True)  # (B, 9), rows sum to 1
    padded = functional.pad(pixels, [reach] * 4, mode="replicate").transpose(0, 1)  # (1, B, H + 8, W + 8)
    rows = functional.conv2d(padded, kernel[:, None, None, :], groups=count)
    return functional.conv2d(rows, kernel[:, None, :, None], groups=count).transpose(0, 1)


def _noise(pixels, _names):
    sigma = _draw(len(pixels), 0, 8).view(-1, 1, 1, 1).to(pixels.device, non_blocking=True)
    return pixels + sigma * torch.randn(pixels.shape, device=pixels.device)


def _jitter(pixels, _names):
    contrast = _draw(len(pixels), 0.8, 1.2).view(-1, 1, 1, 1).to(pixels.device, non_blocking=True)
    brightness = _draw(len(pixels), -20, 20).view(-1, 1, 1, 1).to(pixels.device, non_blocking=True)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return (pixels - mean) * contrast + mean + brightness


def _randaugment(images):
    """Apply torchvision's RandAugment picture by picture, since it makes one draw for all that it is given."""
    from torchvision.transforms import v2

    air = images[:, 0, 0, 0].tolist()
    return torch.stack([v2.RandAugment(fill=grey)(image) for image, grey in zip(images, air, strict=True)])


# ---------------------------------------------------------------- rare classes


def make_imbalanced(folder: SliceFolder, ratio: float | None, seed: int = 0) -> SliceFolder:
    """Return the folder with fewer training slices of some classes, for the lesson on rare classes.

    Class k of C keeps `smallest * ratio ** (-k / (C - 1))` slices: the first as many as the smallest class has,
    the last `ratio` times fewer; 1 makes all classes equal, None changes nothing. The slices left out belong to
    no split; validation and test stay whole.

    Raises:
        CTError: a ratio below 1.
    Source: notebook 10; "long-tailed" sets: Y. Cui et al., 2019, https://arxiv.org/abs/1901.05555
    """
    if ratio is None:
        return folder
    if not ratio >= 1:
        raise CTError(f"an imbalance of {ratio}", "1 or more", "10 makes the rarest class ten times rarer")
    rng = np.random.default_rng(seed)
    slices, rows = folder.slices.copy(), folder.rows("train")
    labels = folder.labels[rows]
    smallest = np.bincount(labels).min()
    for k in range(len(folder.classes)):
        count = max(2, round(smallest * ratio ** (-k / (len(folder.classes) - 1))))
        slices.loc[rng.permutation(rows[labels == k])[count:], "split"] = "left out"
    return dataclasses.replace(folder, slices=slices)


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return a weight a class for the loss, float32 (C,): N / (C * slices of the class); 1 on average over slices.

    Args:
        labels: int (N,) in [0, C), the training slices'.
    Source: notebook 10.
    """
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32)


def balanced_loader(dataset, labels: np.ndarray, batch_size: int) -> DataLoader:
    """Return a loader that draws every class equally often, with replacement; an epoch has as many slices as before.

    Args:
        dataset: takes lists of indices, as those of `make_loaders` and `feature_loaders`.
        labels: int (N,), of its examples.
    Source: notebook 10.
    """
    weight = class_weights(labels, int(labels.max()) + 1)[labels]
    order = WeightedRandomSampler(torch.from_numpy(weight).double(), len(labels))
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
