"""One parallel pass over the files of a folder, which keeps about 19 kB a slice; all else works on that."""

import concurrent.futures
import dataclasses
import hashlib
import os
import re
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

SIDE = 128  # pixels a side of the picture that is kept, in which body and lungs are found
COLOUR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one pass over a folder's files keeps; all arrays have a row a slice, as in `folder.slices`.

    Attributes:
        table: path, split, class, label, patient, problem (empty when the slice can be decoded), pixels (hash of
            the decoded grey picture and its size), colour (channels differ), blank (one grey level, about).
        small: uint8 (N, 128, 128), the whole picture, squeezed, and upright in grey where it was inverted.
        frames: float32 (N, 4, 2, 3), where body and lungs are: see `find_frames`.
        features: for every shortcut probe (N, D).
    """

    table: pd.DataFrame
    small: np.ndarray
    frames: np.ndarray
    features: dict[str, np.ndarray]

    def rows(self, keep: np.ndarray) -> "Decoded":
        """Return what is kept of some slices; `keep`: bool (N,), or row numbers."""
        features = {name: values[keep] for name, values in self.features.items()}
        return Decoded(self.table.loc[keep].reset_index(drop=True), self.small[keep], self.frames[keep], features)


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
    columns["place in the picture"] = np.nan_to_num(columns["place in the picture"])
    columns["file name"] = np.array([_name_pattern(*row) for row in zip(table["path"], table["class"], strict=True)])
    return Decoded(table, columns.pop("small"), columns.pop("frames"), columns)


def _name_pattern(path: str, own: str) -> list[float]:
    """Return how a file is named, apart from its class's name and the values of numbers."""
    stem = re.sub(
        rf"(?<![^\W_]){re.escape(own)}(?![^\W_])", "", path.rsplit("/", 1)[-1].rsplit(".", 1)[0], flags=re.IGNORECASE
    )
    return [len(stem), zlib.crc32(re.sub(r"\d+", "0", stem).encode()), zlib.crc32(re.sub(r"\d", "0", stem).encode())]


def _look(path: Path, problem: str, how: tuple[str, tuple[float, float]]) -> dict[str, Any]:
    """Return what is kept of one slice; of one that cannot be decoded, why, and what is kept of a black picture."""
    image, colour, facts = Image.new("L", (32, 32)), False, [0.0] * 7
    try:
        if not problem:
            with open_picture(path) as raw:
                image = to_grey(raw, *how)
                words = {key: str(value)[:200] for key, value in raw.info.items()}  # text chunks, resolution, EXIF, ...
                if raw.mode in COLOUR_MODES:  # JPEG bends equal channels by a few levels
                    small = raw.convert("RGB").reduce(max(1, min(raw.size) // 64))
                    colour = bool(np.ptp(np.asarray(small, np.int16), axis=-1).max() > 16)
                names = (raw.mode, path.suffix.lower(), str(sorted(words)), str(words))
                names = [zlib.crc32(name.encode("utf-8", "replace")) for name in names]
            size = path.stat().st_size
            facts = [np.log1p(size), np.log1p(size / (image.width * image.height)), len(words), *names]
    except BadFile as error:
        problem = str(error)
    pixels, (name, small, frames) = np.asarray(image), sketch(image)
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
        "small": small,
        "frames": frames,
        # What the probes see; none of it says where in the body something is.
        "file size and metadata": np.array(facts, float),
        "picture size": np.log([image.width, image.height, image.width / image.height]),
        "grey statistics": np.array(grey),
        "histogram, 32 bins": counts.reshape(32, 8).sum(axis=1),
        "thumbnail, 32 x 32": _thumbnail(image, 32).ravel(),
        "sharpness and noise": _sharpness(image),
        "border and corners": _border(image),
        "marks inside": _marks(small),
        "place in the picture": frames[0].ravel(),
    }


def sketch(image: Image.Image) -> tuple[str, np.ndarray, np.ndarray]:
    """Return what tells twins: a hash of a grey picture and its size, and its `small` and `frames` as in `Decoded`."""
    pixels, small = np.asarray(image), _thumbnail(image, SIDE)
    name = hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    frames, inverted = find_frames(small, image.width / image.height)
    return name, 255 - small if inverted else small, frames


def _thumbnail(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0))


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Return images (N, S, S) at `size` pixels a side, which divides S."""
    step = images.shape[1] // size
    return images.reshape(len(images), size, step, size, step).mean(axis=(2, 4), dtype=np.float32)


def find_frames(small: np.ndarray, aspect: float) -> tuple[np.ndarray, bool]:
    """Return where the body and each lung are, and whether the picture is inverted.

    The body is the largest bright piece, with the lungs: the two largest dark pieces that reach no corner. Of three
    grey levels (Otsu's, and his of what is below and above), upright and inverted, the one that shows most lung holds.

    Args:
        small: the picture, squeezed to uint8 (128, 128).
        aspect: its width, in heights.
    Returns:
        float32 (4, 2, 3), body, lungs and the whole picture: maps from places (x, y, 1) in a frame to places in the
        picture, both from -1 to 1; nan for a lung that is not there. A frame is as wide as the ellipse with the piece's
        second moments, along its axes, so that it moves, turns and stretches with the picture.
    """
    best, corners = (-1.0, False, None, []), ([2, 2, -3, -3], [2, -3, 2, -3])
    for inverted in (False, True):
        grey = 255 - small if inverted else small
        counts, levels = np.bincount(grey.ravel(), minlength=256), np.arange(256)
        middle = _otsu(counts)
        for level in (middle, _otsu(counts * (levels <= middle)), _otsu(counts * (levels > middle))):
            pieces, _ = ndimage.label(ndimage.binary_opening(grey > level, iterations=2))
            sizes = np.bincount(pieces.ravel(), minlength=2)
            bright = pieces == 1 + sizes[1:].argmax()
            pieces, _ = ndimage.label(ndimage.binary_opening(~bright, iterations=2))
            sizes = np.bincount(pieces.ravel(), minlength=2)
            sizes[[0, *pieces[corners]]] = 0
            lungs = [pieces == k for k in np.argsort(-sizes)[:2] if sizes[k] > 0.02 * grey.size]
            body = ndimage.binary_fill_holes(np.any([bright, *lungs], axis=0))
            share = sum(lung.sum() for lung in lungs) / max(1, body.sum())
            score = share * (share < 0.6) * (0.1 if body[corners].sum() > 2 else 1) * (0.8 if inverted else 1)
            if score > best[0] + 0.02:  # the first of equals
                best = (score, inverted, body, lungs)
            if score > 0.12:
                break  # sound: a share of lung that is usual
        if best[0] > 0.12:
            break
    pieces = [best[2], *best[3], *[np.zeros(0)] * (2 - len(best[3]))]
    return np.stack([*(_frame(piece, aspect) for piece in pieces), np.eye(2, 3, dtype=np.float32)]), best[1]


def _otsu(counts: np.ndarray) -> int:
    """Return the grey level that parts a histogram best in two (N. Otsu, 1979)."""
    below, total = counts.cumsum().astype(float), (counts * np.arange(256.0)).cumsum()
    gap = (total[-1] * below / max(below[-1], 1) - total) ** 2
    return int(np.argmax(gap / np.maximum(below * (below[-1] - below), 1)))


def _frame(piece: np.ndarray, aspect: float) -> np.ndarray:
    """Return a piece's frame, float32 (2, 3): see `find_frames`."""
    if not piece.any():
        return np.full((2, 3), np.nan, np.float32)
    y, x = np.nonzero(piece)
    places = np.stack([(2 * x + 1) / SIDE - 1, ((2 * y + 1) / SIDE - 1) / aspect])
    spread, axes = np.linalg.eigh(np.cov(places) + 1e-6 * np.eye(2))
    axes = axes[:, ::-1] * np.sqrt(spread[::-1]) * 2.1  # the longer axis first
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # right and down
    axes[:, 1] *= np.sign(np.linalg.det(axes))
    frame = np.concatenate([axes, places.mean(axis=1, keepdims=True)], axis=1)
    return (frame * [[1], [aspect]]).astype(np.float32)


def _sharpness(image: Image.Image) -> np.ndarray:
    """Return the Laplacian at three scales, as logs: how fast neighbouring pixels change, from native resolution on."""
    image, features = image.convert("F"), []
    for step in (1, 2, 4):
        fine = np.asarray(image.reduce(step))
        rows, both = fine[1:-1:2], fine[:-2:2, 1:-1] + fine[2::2, 1:-1]  # every second row is enough
        laplacian = np.abs(4 * rows[:, 1:-1] - rows[:, :-2] - rows[:, 2:] - both)[:, ::2]
        features += [laplacian.std(), laplacian.mean(), *np.percentile(laplacian, (50, 75, 90, 99))]
    return np.log1p(features)


def _marks(small: np.ndarray) -> np.ndarray:
    """Return how far the oddest pixel of 16 x 16 cells stands out, uint8 (256,): a mark shows at its place."""
    odd = np.abs(small - ndimage.uniform_filter(small.astype(np.float32), 9)).astype(np.uint8)
    return odd.reshape(16, 8, 16, 8).max(axis=(1, 3)).ravel()


def _border(image: Image.Image) -> np.ndarray:
    """Return mean, sd and brightest of 8 cells along each side: burned-in text and frames show there."""
    pixels = np.asarray(image.resize((160, 160), Image.Resampling.BOX), np.float32)
    strips = [pixels[:12], pixels[-12:], pixels[:, :12].T, pixels[:, -12:].T]
    cells = np.stack(strips).reshape(4, 12, 8, 20).transpose(0, 2, 1, 3).reshape(32, -1)
    return np.concatenate([cells.mean(axis=1), cells.std(axis=1), cells.max(axis=1)])
