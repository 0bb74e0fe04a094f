"""Tiny pictures, folders, networks and loaders that several test files share."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ctutils.base import CTError
from ctutils.data import batch_loader

CLASSES = ("ILD", "Normal", "폐렴")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "real-ct"
REAL_CT = SHARED / "chest_ct_scan_images"
needs_real_ct = pytest.mark.skipif(not REAL_CT.is_dir(), reason="needs ../shared/real-ct/chest_ct_scan_images")


def picture(label: int, seed: int, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    """Return noise with a bright bar whose place tells the class, uint8 (height, width)."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(40, 90, (height, width), np.uint8)
    start = (1 + 2 * label) * height // 8
    pixels[start : start + height // 5] += 120
    return pixels


def jpeg(picture: Image.Image) -> Image.Image:
    """Return a grey picture as a strongly compressed file gives it back."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file).convert("L")


def noisy(picture: Image.Image) -> Image.Image:
    """Return a grey picture with noise of 10 grey levels."""
    grey = np.asarray(picture) + np.random.default_rng(0).normal(0, 10, picture.size[::-1])
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))


def write_set(
    root: Path,
    *,
    splits: tuple[str, ...] = ("train", "val", "test"),
    classes: tuple[str, ...] = CLASSES,
    per_class: int = 2,
    size: tuple[int, int] = (40, 40),
    suffix: str = ".png",
) -> Path:
    """Write a data set, every picture different from the others, and return its folder."""
    for s, split in enumerate(splits):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = picture(label, seed=1000 * s + 100 * label + i, size=size)
                Image.fromarray(pixels).save(folder / f"slice {i}{suffix}")
    return root


def tiny_cnn(classes: int = 3, seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Return a small network with BatchNorm: images (B, 3, H, W) -> logits (B, classes)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6), nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            nn.Dropout(dropout),
            nn.Linear(6 * 4 * 4, classes),
        )


def head(inputs: int = 5, classes: int = 3, seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Return a small head: features (B, inputs) -> logits (B, classes)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, classes))


class Examples:
    """Random inputs float32 (N, ...) with labels int64 (N,) that can be learned from them."""

    def __init__(self, count: int, shape: tuple[int, ...] = (5,), classes: int = 3, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % classes
        self.inputs = torch.randn(count, *shape, generator=generator)
        self.inputs += 1.5 * (self.labels.view(-1, *[1] * len(shape)) - 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices):
        return self.inputs[indices], self.labels[indices]


def loaders(train: int = 22, val: int = 11, batch_size: int = 4, **options) -> dict:
    """Return loaders whose last batches are smaller than the others."""
    return {
        "train": batch_loader(Examples(train, seed=1, **options), batch_size, shuffle=True),
        "val": batch_loader(Examples(val, seed=2, **options), batch_size, shuffle=False),
    }


@contextlib.contextmanager
def user_error(*words: str):
    """Expect one CTError whose message says found, expected, how to mend, and holds `words` (in any case)."""
    with pytest.raises(CTError) as caught:
        yield caught
    check_message(str(caught.value), *words)


def check_message(text: str, *words: str) -> None:
    """Assert that a text is one message of a CTError and holds `words`."""
    assert re.fullmatch(r"(?:Error: )?Found [^\n]+\. Expected [^\n]+\. To mend: [^\n]+\.\n?", text), text
    missing = [word for word in words if word.casefold() not in text.casefold()]
    assert not missing, f"{missing} not in: {text}"


def files_below(folder: Path) -> list[str]:
    """Return the names of all files below a folder, hidden ones included, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
