"""One parallel pass over the files of a folder, which keeps about 15 kB a slice; all else works on that."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import fft, ndimage

from ctutils.base import progress
from ctutils.data import SliceFolder, read_grey

FINE, COARSE = 96, 32  # pixels a side of the thumbnails that confirm and that search


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one pass over a folder's files keeps; all arrays have a row a slice, as in `folder.slices`.

    Attributes:
        folder: the folder.
        table: path, split, class, label, problem (empty when the slice can be decoded), pixels (hash of the
            decoded grey picture and its size), colour (channels differ), blank (one grey level, about).
        body: uint8 (N, 96, 96), the picture cropped to the body.
        lungs: uint8 (N, 32, 32), cropped to the lungs, which also stand when the body is cut off.
        features: for every shortcut probe float32 (N, D).
    """

    folder: SliceFolder
    table: pd.DataFrame
    body: np.ndarray
    lungs: np.ndarray
    features: dict[str, np.ndarray]


def decode_pass(folder: SliceFolder, *, workers: int | None = None) -> Decoded:
    """Decode every slice once at full resolution, in parallel, and keep only small things.

    Args:
        folder: N slices; load it with `strict=False`, so that unreadable files are reported, not raised.
        workers: threads (default: one a core; decoding and array work run outside Python's lock).
    Source: notebook 01.
    """
    slices = folder.slices
    count, workers = len(slices), workers or os.cpu_count() or 1
    table = slices[["path", "split", "class", "label", "problem"]].reset_index(drop=True)
    body, lungs = np.zeros((count, FINE, FINE), np.uint8), np.zeros((count, COARSE, COARSE), np.uint8)
    features: dict[str, np.ndarray] = {}
    columns: dict[str, list[Any]] = {
        "problem": list(table["problem"]),
        "pixels": [""] * count,
        "colour": [False] * count,
        "blank": [False] * count,
    }
    rows = np.flatnonzero(table["problem"] == "")
    paths = [folder.root / name for name in table["path"]]
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        progress(total=len(rows), desc="Looking at slices", unit="slice", leave=False) as bar,
    ):
        for start in range(0, len(rows), 16 * workers):  # bounds what waits in memory
            chunk = rows[start : start + 16 * workers]
            for row, seen in zip(chunk, pool.map(_look, [paths[i] for i in chunk]), strict=True):
                bar.update()
                if isinstance(seen, str):
                    columns["problem"][row] = seen
                    continue
                for name in ("pixels", "colour", "blank"):
                    columns[name][row] = seen[name]
                body[row], lungs[row] = seen["body"], seen["lungs"]
                for name, values in seen["features"].items():
                    features.setdefault(name, np.zeros((count, len(values)), np.float32))[row] = values
    return Decoded(folder, table.assign(**columns), body, lungs, _with_file_facts(slices, features))


def _look(path: Path) -> dict[str, Any] | str:
    """Return what is kept of one slice, or why it cannot be decoded."""
    try:
        with Image.open(path) as raw:
            if raw.mode in ("RGB", "RGBA"):
                image = raw.convert("L")  # as read_grey does, but decoded once for both
                colour = _is_colour(raw)
            else:
                image = read_grey(path)
                colour = raw.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV") and _is_colour(raw)
            extras = sum(key in raw.info for key in ("dpi", "exif", "icc_profile", "comment", "Software"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__
    pixels = np.asarray(image)
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(pixels)
    body, lungs = find_body(image)
    return {
        "pixels": digest.hexdigest(),
        "colour": colour,
        "blank": pixels.std() < 2,
        "body": _thumbnail(image, FINE, body),
        "lungs": _thumbnail(image, COARSE, lungs),
        "features": {**_statistics(image, pixels), "file size and metadata": [extras]},
    }


def _thumbnail(image: Image.Image, size: int, box: Sequence[float] | None = None) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))


def _is_colour(image: Image.Image) -> bool:
    channels = np.asarray(image.convert("RGB").reduce(max(1, min(image.size) // 64))).astype(np.int16)
    return bool(np.ptp(channels, axis=-1).max() > 16)  # JPEG bends equal channels by a few levels


def find_body(image: Image.Image) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the boxes (left, top, right, bottom), in pixels, of the body and of the lungs inside it.

    The body is the largest bright piece (Otsu's threshold) and the lungs are its large dark holes. Without
    a body the box is the whole picture; without lungs it is the body's.
    """
    side = 128  # enough for a box, and quick
    small = _thumbnail(image, side)
    bright = ndimage.binary_opening(small > _otsu(small), iterations=2)
    names, count = ndimage.label(bright)
    whole = (0.0, 0.0, *map(float, image.size))
    if not count:
        return whole, whole
    body = names == np.bincount(names.ravel())[1:].argmax() + 1
    holes = ndimage.binary_opening(ndimage.binary_fill_holes(body) & ~body, iterations=2)
    names, _ = ndimage.label(holes)
    large = np.flatnonzero(np.bincount(names.ravel()) >= 0.01 * body.sum())
    lungs = np.isin(names, large[large > 0])
    if lungs.sum() < 0.06 * body.sum():
        lungs = body
    return _box(body, image.size), _box(lungs, image.size)


def _box(mask: np.ndarray, size: tuple[int, int]) -> tuple[float, ...]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = size[0] / mask.shape[1], size[1] / mask.shape[0]
    return columns[0] * x, rows[0] * y, (columns[-1] + 1) * x, (rows[-1] + 1) * y


def _otsu(pixels: np.ndarray) -> int:
    """Return the grey level that parts two groups best (N. Otsu, 1979)."""
    counts = np.bincount(pixels.ravel(), minlength=256).astype(float)
    below, total = counts.cumsum(), (counts * np.arange(256)).cumsum()
    gap = (total[-1] * below / below[-1] - total) ** 2
    return int(np.argmax(gap / np.maximum(below * (below[-1] - below), 1)))


# ---------------------------------------------------------------- what the probes see


def _statistics(image: Image.Image, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return simple features of one slice; none of them says where in the body something is."""
    counts = np.bincount(pixels.ravel(), minlength=256) / pixels.size
    levels = np.arange(256)
    mean = counts @ levels
    deviation = np.sqrt(counts @ (levels - mean) ** 2)
    percentiles = np.searchsorted(counts.cumsum(), (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99))
    grey = [mean, deviation, counts[0], counts[255], (counts > 0).sum(), *percentiles]
    width, height = image.size
    return {
        "picture size": np.log([width, height, width / height]),
        "grey statistics": np.array(grey),
        "histogram, 32 bins": counts.reshape(32, 8).sum(axis=1),
        "thumbnail, 32 x 32": _thumbnail(image, COARSE).ravel(),
        "sharpness and noise": _sharpness(pixels),
        "border and corners": _border(image),
    }


def _sharpness(pixels: np.ndarray) -> np.ndarray:
    """Return log Laplacian and spectrum features: how fast neighbouring pixels change, at native resolution."""
    values = pixels.astype(np.float32)
    features = []
    for fine in (values, _halve(values)):
        rows = fine[1:-1:2]  # every second row is enough
        above, below = fine[0:-2:2, 1:-1], fine[2::2, 1:-1]
        laplacian = np.abs(4 * rows[:, 1:-1] - rows[:, :-2] - rows[:, 2:] - above - below)
        features += [laplacian.std(), laplacian.mean(), *np.percentile(laplacian[:, ::2], (50, 75, 90, 99))]
    side = 256
    tile = values[_middle(values.shape[0], side), _middle(values.shape[1], side)]
    tile = np.pad(tile, [(0, side - n) for n in tile.shape], mode="reflect" if min(tile.shape) > side // 2 else "edge")
    window, ring = _rings(side)
    power = np.abs(fft.rfft2((tile - tile.mean()) * window)) ** 2
    bands = np.bincount(ring.ravel(), power.ravel())[:16] / np.bincount(ring.ravel())[:16]
    shape = np.log(bands + 1) - np.log(bands + 1).mean()  # contrast cancels
    return np.concatenate([np.log1p(features), shape])


def _halve(values: np.ndarray) -> np.ndarray:
    even = values[: len(values) // 2 * 2, : values.shape[1] // 2 * 2]
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4


def _middle(length: int, side: int) -> slice:
    start = max(0, (length - side) // 2)
    return slice(start, start + side)


@functools.cache
def _rings(side: int) -> tuple[np.ndarray, np.ndarray]:
    window = np.hanning(side).astype(np.float32)
    y, x = fft.fftfreq(side)[:, None], fft.rfftfreq(side)[None]
    return np.outer(window, window), np.minimum(np.hypot(y, x) * 32, 16).astype(int)  # ring 16: the corners


def _border(image: Image.Image) -> np.ndarray:
    """Return mean, sd and brightest of 8 cells along each side: burned-in text and frames show there."""
    pixels = np.asarray(image.resize((160, 160), Image.Resampling.BOX), np.float32)
    strips = [pixels[:12], pixels[-12:], pixels[:, :12].T, pixels[:, -12:].T]
    cells = np.stack(strips).reshape(4, 12, 8, 20).transpose(0, 2, 1, 3).reshape(32, -1)
    return np.concatenate([cells.mean(axis=1), cells.std(axis=1), cells.max(axis=1)])


def _with_file_facts(slices: pd.DataFrame, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add what the file system and the header say to the probe of the file."""
    if not features:
        return {}
    pixels = np.maximum(slices["width"] * slices["height"], 1)
    kinds = pd.get_dummies(
        pd.DataFrame({"mode": slices["mode"], "suffix": slices["path"].str.extract(r"\.(\w+)$")[0].str.lower()})
    )
    size = np.log1p(np.stack([slices["bytes"], slices["bytes"] / pixels], axis=1))
    name = "file size and metadata"
    return {
        name: np.hstack([size, kinds, features[name]]).astype(np.float32),
        **{k: v for k, v in features.items() if k != name},
    }
