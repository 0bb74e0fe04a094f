"""What a model looks at, and where it is most wrong: Grad-CAM, heat in a box, the worst slices."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctutils.base import CTError
from ctutils.models import BACKBONES, get_module

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom are outside


def most_wrong(y_true: np.ndarray, y_score: np.ndarray, n: int = 10) -> np.ndarray:
    """Return the rows of the most confident errors, the worst first.

    Args:
        y_true: int (N,) in [0, C).
        y_score: float (N, C), one probability a class.
        n: at most so many rows.
    Returns:
        int64 (M,), M <= n: only wrongly classified rows, by falling probability of the wrong class.
    Raises:
        CTError: the shapes do not fit, or a label is out of range.
    """
    y_true, y_score = np.asarray(y_true), np.asarray(y_score)
    if y_score.ndim != 2 or y_true.shape != y_score.shape[:1]:
        raise CTError(
            f"labels {y_true.shape} and scores {y_score.shape}",
            "(N,) and (N, C)",
            "pass the two of one split",
        )
    if len(y_true) and not 0 <= y_true.min() <= y_true.max() < y_score.shape[1]:
        raise CTError(
            f"labels from {y_true.min()} to {y_true.max()}",
            f"labels in [0, {y_score.shape[1]})",
            "check that labels and scores come from the same data set",
        )
    rows = np.flatnonzero(y_score.argmax(axis=1) != y_true)
    worst_first = np.argsort(-y_score[rows].max(axis=1), kind="stable")
    return rows[worst_first][:n]


def grad_cam(
    model: nn.Module, images: Tensor, target: int | Tensor | None = None, *, layer: str | nn.Module
) -> np.ndarray:
    """Return a heat map for each image: which places speak for the class `target`.

    The maps of a late layer, each weighted by the mean gradient of the class's logit, are added up; what
    speaks against the class is cut off at zero. Only what follows the layer is differentiated, so a wholly
    frozen network works too. Modes, `requires_grad` and hooks of the model are as before afterwards.

    Args:
        model: maps images to logits (B, C): a whole network, or backbone and head joined by `models.join`.
        images: float32 (B, 3, H, W), normalised.
        target: a class, one class an image (B,), or None for the class that the model predicts.
        layer: a backbone's name (then its `cam_layer`), a dotted path, or the layer itself.
    Returns:
        float32 (B, H, W) in [0, 1], the greatest value of each map 1; all zero where nothing speaks for it.
    Raises:
        CTError: no such layer, a layer without height and width, one that the model does not pass through,
            or a class that the model does not have.
    Source: Selvaraju et al. 2017, Grad-CAM, https://arxiv.org/abs/1610.02391
    """
    module = _find_layer(model, layer)
    kept = []

    def start_here(_module, _inputs, output):
        # Gradients are wanted from here on only, and need no trainable parameter. The clone is for an in-place
        # ReLU that may follow: it must not overwrite what is kept.
        torch.set_grad_enabled(True)
        maps = output.detach().clone().requires_grad_(True)
        kept.append(maps)
        return maps.clone()

    modes = [(part, part.training) for part in model.modules()]
    hook = module.register_forward_hook(start_here)
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():  # until the hook
            device = next((p.device for p in model.parameters()), images.device)
            logits = model(images.detach().clone().to(device))
            if not kept or kept[-1].ndim != 4:
                raise CTError(
                    f"layer '{layer if isinstance(layer, str) else type(layer).__name__}', "
                    + ("which the model does not pass through" if not kept else f"with output {tuple(kept[-1].shape)}"),
                    "a layer with output (B, channels, height, width)",
                    "take the last convolution, or a backbone's name",
                )
            classes = _targets(logits, target)
            score = logits.gather(1, classes[:, None]).sum()  # images do not mix in eval mode
            (gradient,) = torch.autograd.grad(score, kept[-1])
    finally:
        hook.remove()
        for part, training in modes:
            part.training = training
    maps = kept[-1].detach().float()
    weights = gradient.float().mean(dim=(2, 3), keepdim=True)  # (B, K, 1, 1)
    heat = F.relu((weights * maps).sum(dim=1, keepdim=True))  # (B, 1, h, w)
    heat = F.interpolate(heat, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    peak = heat.amax(dim=(1, 2), keepdim=True)  # (B, 1, 1)
    return torch.where(peak > 0, heat / peak, heat).cpu().numpy()


def _find_layer(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    dotted = BACKBONES[layer].cam_layer if layer in BACKBONES else layer
    if hasattr(model, "backbone") and not dotted.startswith(("backbone.", "head.")):
        dotted = f"backbone.{dotted}"  # a model of models.join
    return get_module(model, dotted)


def _targets(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """Return one class an image, int64 (B,)."""
    if target is None:
        return logits.argmax(dim=1)
    classes = torch.as_tensor(target, dtype=torch.int64, device=logits.device)
    count = logits.shape[1]
    if classes.shape not in ((), logits.shape[:1]) or not bool(((classes >= 0) & (classes < count)).all()):
        raise CTError(
            f"target {classes.tolist()}",
            f"a class in [0, {count}), or {len(logits)} of them",
            "pass label numbers, as in the data set's table",
        )
    return classes.expand(len(logits))


def heat_in_box(heat: np.ndarray, box: Box) -> float:
    """Return the share of the heat that lies in a box, in [0, 1]; 0 when there is no heat.

    Args:
        heat: float (H, W), not negative.
        box: left, top, right, bottom in pixels of the heat map (scale it when the picture was resized).
    """
    heat = np.asarray(heat, np.float64)  # or a box around everything could hold 1.0000001
    total = float(heat.sum())
    return min(1.0, float(_inside(heat, box).sum()) / total) if total > 0 else 0.0


def pointing_hit(heat: np.ndarray, box: Box) -> bool:
    """Say whether the hottest place lies in the box (the pointing game); never when there is no heat.

    Args: as for `heat_in_box`.
    Source: Zhang et al. 2016, Top-down Neural Attention by Excitation Backprop,
        https://arxiv.org/abs/1608.00507 (without their margin of 15 pixels)
    """
    peak = heat.max()
    return bool(peak > 0 and _inside(heat, box).max(initial=0) == peak)


def _inside(heat: np.ndarray, box: Box) -> np.ndarray:
    """Return the part of `heat` (H, W) in the box, counting pixels that the box only touches."""
    left, top = (max(0, int(np.floor(value))) for value in box[:2])
    right, bottom = (max(0, int(np.ceil(value))) for value in box[2:])
    return heat[top:bottom, left:right]
