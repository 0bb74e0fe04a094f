"""One parallel pass over the files of a folder, which keeps about 15 kB a slice; all else works on that."""

import concurrent.futures
import dataclasses
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from ctutils.base import progress
from ctutils.data import SliceFolder
from ctutils.pictures import BadFile, open_picture, quiet, to_grey

FINE, COARSE = 96, 32  # pixels a side of the thumbnails that confirm and that search
COLOUR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one pass over a folder's files keeps; all arrays have a row a slice, as in `folder.slices`.

    Attributes:
        table: path, split, class, label, patient, problem (empty when the slice can be decoded), pixels (hash of
            the decoded grey picture and its size), colour (channels differ), blank (one grey level, about).
        body: uint8 (N, 96, 96), the picture cropped to the body.
        lungs: uint8 (N, 32, 32), cropped to the lungs, which also stand when the body is cut off.
        features: for every shortcut probe (N, D).
    """

    table: pd.DataFrame
    body: np.ndarray
    lungs: np.ndarray
    features: dict[str, np.ndarray]

    def rows(self, keep: np.ndarray) -> "Decoded":
        """Return what is kept of some slices; `keep`: bool (N,), or row numbers."""
        features = {name: values[keep] for name, values in self.features.items()}
        return Decoded(self.table.loc[keep].reset_index(drop=True), self.body[keep], self.lungs[keep], features)


def decode_pass(folder: SliceFolder) -> Decoded:
    """Decode every slice once at full resolution, in parallel, and keep only small things.

    Args:
        folder: N slices; load it with `strict=False`, so that unreadable files are reported, not raised.
    Source: notebook 01.
    """
    table = folder.slices[["path", "split", "class", "label", "patient", "problem"]].reset_index(drop=True)
    # Threads: decoding and array work run outside Python's lock.
    with quiet(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        paths, window = [folder.root / path for path in table["path"]], folder.window or {"level": -600, "width": 1500}
        how = [(depth, (window["level"], window["width"])) for depth in folder.slices["depth"]]
        looks = pool.map(_look, paths, table["problem"], how)
        seen = list(progress(looks, total=len(table), desc="Looking at slices", unit="slice", leave=False))
    table = table.assign(**{key: [one[key] for one in seen] for key in ("problem", "pixels", "colour", "blank")})
    columns = {key: np.stack([one.pop(key) for one in seen]) for key in list(seen[0]) if key not in table}
    return Decoded(table, columns.pop("body"), columns.pop("lungs"), columns)


def _look(path: Path, problem: str, how: tuple[str, tuple[float, float]]) -> dict[str, Any]:
    """Return what is kept of one slice; of one that cannot be decoded, why, and what is kept of a black picture."""
    image, colour, facts = Image.new("L", (COARSE, COARSE)), False, [0.0] * 5
    try:
        if not problem:
            with open_picture(path) as raw:
                image = to_grey(raw, *how)
                extras = sum(key in raw.info for key in ("dpi", "exif", "icc_profile", "comment", "Software"))
                if raw.mode in COLOUR_MODES:  # JPEG bends equal channels by a few levels
                    small = raw.convert("RGB").reduce(max(1, min(raw.size) // 64))
                    colour = bool(np.ptp(np.asarray(small, np.int16), axis=-1).max() > 16)
                names = [zlib.crc32(name.encode()) for name in (raw.mode, path.suffix.lower())]
            size = path.stat().st_size
            facts = [np.log1p(size), np.log1p(size / (image.width * image.height)), extras, *names]
    except BadFile as error:
        problem = str(error)
    pixels, (name, body, lungs) = np.asarray(image), sketch(image)
    counts = np.bincount(pixels.ravel(), minlength=256) / pixels.size
    mean = counts @ np.arange(256)
    deviation = np.sqrt(counts @ (np.arange(256) - mean) ** 2)
    percentiles = np.searchsorted(counts.cumsum(), (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99))
    grey = [mean, deviation, counts[0], counts[255], (counts > 0).sum(), *percentiles]
    return {
        "problem": problem,
        "pixels": "" if problem else name,
        "colour": colour,
        "blank": not problem and bool(deviation < 2),
        "body": body,
        "lungs": lungs,
        # What the probes see; none of it says where in the body something is.
        "file size and metadata": np.array(facts, float),
        "picture size": np.log([image.width, image.height, image.width / image.height]),
        "grey statistics": np.array(grey),
        "histogram, 32 bins": counts.reshape(32, 8).sum(axis=1),
        "thumbnail, 32 x 32": _thumbnail(image, COARSE).ravel(),
        "sharpness and noise": _sharpness(image),
        "border and corners": _border(image),
    }


def sketch(image: Image.Image) -> tuple[str, np.ndarray, np.ndarray]:
    """Return what tells twins: a hash of a grey picture and its size, and its `body` and `lungs` as in `Decoded`."""
    pixels, (body, lungs) = np.asarray(image), find_body(image)
    name = hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    return name, _thumbnail(image, FINE, body), _thumbnail(image, COARSE, lungs)


def _thumbnail(image: Image.Image, size: int, box: tuple[float, ...] | None = None) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))


def find_body(image: Image.Image) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the boxes (left, top, right, bottom), in pixels, of the body and of the lungs inside it.

    The body is the largest bright piece (Otsu's threshold) and the lungs are its large dark holes. Without
    a body the box is the whole picture; without lungs it is the body's.
    """
    small = _thumbnail(image, 128)  # enough for a box, and quick
    counts = np.bincount(small.ravel(), minlength=256).astype(float)
    below, total = counts.cumsum(), (counts * np.arange(256)).cumsum()
    gap = (total[-1] * below / below[-1] - total) ** 2  # between two groups of grey levels (N. Otsu, 1979)
    level = np.argmax(gap / np.maximum(below * (below[-1] - below), 1))
    names, count = ndimage.label(ndimage.binary_opening(small > level, iterations=2))
    sizes = np.bincount(names.ravel())
    sizes[0] *= count == 0
    body = names == sizes.argmax()
    holes, _ = ndimage.label(ndimage.binary_opening(ndimage.binary_fill_holes(body) & ~body, iterations=2))
    large = np.bincount(holes.ravel()) >= 0.01 * body.sum()
    lungs = large[holes] & (holes > 0)
    return _box(body, image.size), _box(lungs if lungs.sum() >= 0.06 * body.sum() else body, image.size)


def _box(mask: np.ndarray, size: tuple[int, int]) -> tuple[float, ...]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = size[0] / mask.shape[1], size[1] / mask.shape[0]
    return columns[0] * x, rows[0] * y, (columns[-1] + 1) * x, (rows[-1] + 1) * y


def _sharpness(image: Image.Image) -> np.ndarray:
    """Return the Laplacian at three scales, as logs: how fast neighbouring pixels change, from native resolution on."""
    image, features = image.convert("F"), []
    for step in (1, 2, 4):
        fine = np.asarray(image.reduce(step))
        rows, both = fine[1:-1:2], fine[:-2:2, 1:-1] + fine[2::2, 1:-1]  # every second row is enough
        laplacian = np.abs(4 * rows[:, 1:-1] - rows[:, :-2] - rows[:, 2:] - both)[:, ::2]
        features += [laplacian.std(), laplacian.mean(), *np.percentile(laplacian, (50, 75, 90, 99))]
    return np.log1p(features)


def _border(image: Image.Image) -> np.ndarray:
    """Return mean, sd and brightest of 8 cells along each side: burned-in text and frames show there."""
    pixels = np.asarray(image.resize((160, 160), Image.Resampling.BOX), np.float32)
    strips = [pixels[:12], pixels[-12:], pixels[:, :12].T, pixels[:, -12:].T]
    cells = np.stack(strips).reshape(4, 12, 8, 20).transpose(0, 2, 1, 3).reshape(32, -1)
    return np.concatenate([cells.mean(axis=1), cells.std(axis=1), cells.max(axis=1)])
