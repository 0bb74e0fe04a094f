"""Can a score on this folder be trusted? Unreadable files, leaks between splits, shortcuts, a cleaned copy.

The bulk is one parallel pass over the files (`decode_pass`) that keeps about 15 kB a slice; everything else
works on what it kept.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import fft, ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctutils.base import CTError, progress, write_json
from ctutils.data import SPLIT_NAMES, SPLITS, SliceFolder, load_folder, read_grey
from ctutils.metrics import bootstrap_interval, macro_f1

FINE, COARSE = 96, 32  # pixels a side of the thumbnails that confirm and that search
MIN_CORRELATION = 0.97  # of two body crops at 48 x 48: same or neighbouring slice
MIN_DETAIL = 0.82  # of their fine structure (what is left without a blur) at 96 x 96
SURE_DETAIL = 0.94  # the same picture, whatever was done to it
# Macro F1 above chance at which a probe is flagged. Features that see the lungs also see some of the disease:
# on 3600 synthetic slices, acquired alike in every class, the histogram reached 0.25 above chance, sharpness
# (reticulation is fine structure) 0.14, thumbnail 0.09, all others 0.02. A planted shortcut added 0.55.
FLAG_MARGIN = {
    "file size and metadata": 0.15,
    "picture size": 0.15,
    "grey statistics": 0.30,
    "histogram, 32 bins": 0.30,
    "thumbnail, 32 x 32": 0.30,
    "sharpness and noise": 0.30,
    "border and corners": 0.15,
}
FLAG_CLASS = 0.85  # macro F1 of one class against the rest; there the highest was 0.73 (0.5 is chance)

# ---------------------------------------------------------------- one pass over all files


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


def shortcut_probes(
    decoded: Decoded,
    groups: np.ndarray | None = None,
    *,
    per_class: int = 600,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Ask how well features that hold no anatomy predict the class, cross-validated.

    Every probe is a logistic regression and a random forest (for what is not monotone) on standardised
    features, with balanced class weights; the better of the two counts. Chance is what the same predictions
    score against shuffled labels. A probe is flagged when the lower end of its 95 % interval is above
    chance + `FLAG_MARGIN`, or when one class alone, against the rest, is above `FLAG_CLASS`: a mark that only
    one class of five bears lifts the mean over classes by little.

    Args:
        decoded: N slices; unreadable ones are left out.
        groups: int (N,), slices of one patient or with the same content share a number; a group is never in
            two folds (default: every slice alone).
        per_class: slices of a class at most, drawn at random.
        folds: of the cross-validation; fewer when a class is small.
        seed: of the draws.
    Returns:
        a row a probe: probe, macro_f1, low, high, chance, threshold, best_class, class_low (lower end
        for that class against the rest), flagged, slices. Empty when a class has fewer than 10 readable
        slices or two groups.
    Source: notebook 01.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = ["probe", "macro_f1", "low", "high", "chance", "threshold"]
    columns += ["best_class", "class_low", "flagged", "slices"]
    rng = np.random.default_rng(seed)
    table = decoded.table
    groups = np.arange(len(table)) if groups is None else np.asarray(groups)
    readable = np.flatnonzero(table["problem"] == "")
    labels = table["label"].to_numpy()
    classes = len(decoded.folder.classes)
    members = [rng.permutation(readable[labels[readable] == c])[:per_class] for c in range(classes)]
    rows = np.sort(np.concatenate(members))
    smallest = min(len(np.unique(groups[m])) for m in members)
    if smallest < 2 or min(map(len, members)) < 10:
        return pd.DataFrame(columns=columns)
    parts = _grouped_folds(labels[rows], groups[rows], min(folds, smallest), seed)
    models = (
        make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=100, tol=1e-2)),
        RandomForestClassifier(50, min_samples_leaf=2, class_weight="balanced", random_state=seed),
    )
    result = []
    for name, values in decoded.features.items():
        x, y = values[rows].astype(np.float64), labels[rows]
        # A column without two values says nothing; without any column left the probe guesses.
        x = x[:, np.ptp(x, axis=0) > 0]
        best = (0.0, np.zeros_like(y))
        for model in models if x.shape[1] else ():
            guess = _cross_predict(model, x, y, parts)
            best = max(best, (macro_f1(y, guess, classes), guess), key=lambda pair: pair[0])
        score = bootstrap_interval(y, best[1], num_classes=classes, seed=seed)
        alone = [
            bootstrap_interval(*(np.equal(v, c).astype(int) for v in (y, best[1])), num_classes=2, n=500, seed=seed).low
            for c in range(classes)
        ]
        top = int(np.argmax(alone))
        chance = float(np.mean([macro_f1(rng.permutation(y), best[1], classes) for _ in range(50)]))
        threshold = chance + FLAG_MARGIN[name]
        flagged = bool(score.low > threshold or alone[top] > FLAG_CLASS)
        verdict = (threshold, decoded.folder.classes[top], alone[top], flagged)
        result.append((name, *score, chance, *verdict, len(y)))
    return pd.DataFrame(result, columns=columns)


def _cross_predict(model, x: np.ndarray, y: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return a prediction for every slice, by the model fitted on the folds that it is not in."""
    import warnings

    guess = np.full_like(y, np.bincount(y).argmax())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # slow convergence: good enough for a probe
        # One fold after the other: threads here would fight with those of the linear algebra, 5 times slower.
        for part in np.unique(parts):
            inside = parts != part
            if len(np.unique(y[inside])) > 1:
                guess[~inside] = model.fit(x[inside], y[inside]).predict(x[~inside])
    return guess


def _grouped_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of every slice, int (N,): classes alike in all folds, no group in two."""
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold

    parts = np.zeros(len(labels), int)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer slices than folds
        for number, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
            parts[rows] = number
    return parts


# ---------------------------------------------------------------- duplicates


def exact_duplicates(decoded: Decoded) -> pd.DataFrame:
    """Return the slices whose decoded grey pixels are equal to another's, whatever the file format and mode.

    Returns:
        one row a slice: group (int), path, split, class; groups in the order of their first slice.
    Source: notebook 01.
    """
    table = decoded.table[decoded.table["problem"] == ""]
    table = table[table.duplicated("pixels", keep=False)]
    table = table.assign(group=pd.factorize(table["pixels"])[0])
    return table.sort_values(["group", "path"], kind="stable")[["group", "path", "split", "class"]].reset_index(
        drop=True
    )


def near_duplicates(decoded: Decoded, patients: np.ndarray | None = None) -> pd.DataFrame:
    """Return pairs of slices that show the same or neighbouring content, but not the same pixels.

    Search: correlation of all pairs of 32 x 32 thumbnails, cropped to the body and to the lungs, also
    mirrored and upside down. Confirmation, at 48 and 96 pixels: either the body crops correlate, as they are,
    above `MIN_CORRELATION` and their fine structure above `MIN_DETAIL` (re-encoded, brighter, resized,
    padded, or a neighbouring slice of the same patient), or after an affine alignment their fine structure
    correlates above `SURE_DETAIL` (shifted, cropped, turned a little). Fine structure (vessels) tells
    patients apart who are only built alike. Where both patients are known and differ, it must reach
    `SURE_DETAIL` as well.

    Args:
        decoded: N slices; unreadable and blank ones are left out.
        patients: names (N,), "" where unknown.
    Returns:
        one row a pair: path_a, path_b, split_a, split_b, class_a, class_b, correlation, detail, same_patient,
        aligned, best first. Of exact copies in one split and class only the first is listed; a slice with very
        many twins is listed with its best 50.
    Source: notebook 01.
    """
    table = decoded.table
    usable = np.flatnonzero((table["problem"] == "") & ~table["blank"])
    unique = usable[~table["pixels"].iloc[usable].duplicated().to_numpy()]
    patients = np.full(len(table), "") if patients is None else np.asarray(patients, dtype=str)
    body = decoded.body[unique]
    found = _confirm(body, *_candidates(body, decoded.lungs[unique]))

    known = patients[unique]
    a, b = found["a"].to_numpy(), found["b"].to_numpy()
    strangers = (known[a] != known[b]) & (known[a] != "") & (known[b] != "")
    found = found.assign(a=unique[a], b=unique[b])[~strangers | (found["detail"] >= SURE_DETAIL)]
    # Bring the copies back in, one a split and class: a leak is a leak through each of them.
    copies = table.iloc[usable].drop_duplicates(["pixels", "split", "class"])
    copies = copies.assign(row=copies.index, patient=patients[copies.index])
    copies = copies[["pixels", "row", "path", "split", "class", "patient"]]
    found = found.assign(
        pixels_a=table["pixels"].iloc[found["a"]].to_numpy(), pixels_b=table["pixels"].iloc[found["b"]].to_numpy()
    )
    for side in "ab":
        found = found.merge(copies.add_suffix(f"_{side}"), on=f"pixels_{side}")
    found["same_patient"] = (found["patient_a"] == found["patient_b"]) & (found["patient_a"] != "")
    found = found.sort_values(["correlation", "path_a", "path_b"], ascending=[False, True, True], kind="stable")
    keep = ["path_a", "path_b", "split_a", "split_b", "class_a", "class_b"]
    return found[[*keep, "correlation", "detail", "same_patient", "aligned"]].reset_index(drop=True)


def _normalise(images: np.ndarray) -> np.ndarray:
    """Return images as rows of mean 0 and length 1, float32 (N, D): a product of two is their correlation."""
    rows = images.reshape(len(images), int(np.prod(images.shape[1:]))).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _shrink(images: np.ndarray, size: int) -> np.ndarray:
    step = images.shape[1] // size
    out = np.zeros((len(images), size, size), np.float32)
    for y in range(step):
        for x in range(step):
            out += images[:, y::step, x::step]
    return out / step**2


def _detail(images: np.ndarray, blur: float = 4) -> np.ndarray:
    """Return the fine structure, float32 (N, H, W): vessels, bronchi, edges of bone."""
    images = images.astype(np.float32)
    return images - ndimage.gaussian_filter(images, (0, blur, blur))


_FLIPS = (np.s_[:], np.s_[:, :, ::-1], np.s_[:, ::-1], np.s_[:, ::-1, ::-1])  # of stacks (N, H, W)


def _candidates(body: np.ndarray, lungs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs that are alike as they are, (P, 2), and pairs with a flip that deserve an alignment, (Q, 3)."""
    small = _shrink(body, COARSE)
    upright, chests = _normalise(small), _normalise(lungs)
    # left, right, flip of the left one, partners a slice, least correlation of a partner
    searches = [(upright, upright, 0, 2, 0.8), (chests, chests, 0, 1, 0.8)]
    searches += [(_normalise(small[_FLIPS[flip]]), upright, flip, 1, 0.9) for flip in (1, 2, 3)]
    alike, similar = [np.zeros((0, 2), int)], [np.zeros((0, 3), int)]
    for left, right, flip, partners, least in searches:
        partners = min(partners, len(left) - 1)
        for start in range(0, len(left) if partners > 0 else 0, 1024):  # a block of rows bounds the memory
            products = left[start : start + 1024] @ right.T
            rows = np.arange(len(products))
            products[rows, start + rows] = -1
            if left is upright:
                # The best 50 of a slice at most, or a folder of nearly equal pictures would fill the memory.
                last = max(0, products.shape[1] - 50)
                floor = np.partition(products, last, axis=1)[:, last, None]
                a, b = np.nonzero((products > MIN_CORRELATION) & (products >= floor))
                alike.append(np.sort(np.stack([a + start, b], axis=1), axis=1))
            b = np.argpartition(-products, partners - 1, axis=1)[:, :partners].ravel()
            a = np.repeat(rows, partners)
            good = products[a, b] > least
            similar.append(np.stack([a + start, b, np.full(len(a), flip)], axis=1)[good])
    return np.unique(np.concatenate(alike), axis=0), np.concatenate(similar)


def _confirm(body: np.ndarray, alike: np.ndarray, similar: np.ndarray) -> pd.DataFrame:
    """Return the pairs that hold at a finer size: a, b, correlation, detail, aligned."""
    rows: list[pd.DataFrame] = []
    columns = ["a", "b", "correlation", "detail", "aligned"]
    for a, b in _blocks(alike):
        correlation = _correlate(_shrink(body[a], 48), _shrink(body[b], 48))
        detail = _correlate(_detail(body[a]), _detail(body[b]))
        keep = (correlation > MIN_CORRELATION) & (detail > MIN_DETAIL)
        rows.append(
            pd.DataFrame({"a": a, "b": b, "correlation": correlation, "detail": detail, "aligned": False})[keep]
        )
    for flip, view in enumerate(_FLIPS):
        # A flip of one is the same flip of the other, so the order of a pair does not matter.
        pairs = np.unique(np.sort(similar[similar[:, 2] == flip, :2], axis=1), axis=0)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            rows += pool.map(lambda pair, view=view: _confirm_aligned(body, *pair, view), _blocks(pairs))
    found = pd.concat(rows) if rows else pd.DataFrame(columns=columns)
    return found.astype({"a": int, "b": int}).drop_duplicates(["a", "b"])  # keeps the unaligned one


def _confirm_aligned(body: np.ndarray, a: np.ndarray, b: np.ndarray, view: tuple) -> pd.DataFrame:
    fixed, moving = body[a][view], body[b]
    half = [_shrink(images, FINE // 2) for images in (fixed, moving)]
    shift = _align(*half)
    moved, inside = _warp(half[1], shift)
    likely = _correlate(_detail(half[0], 2), _detail(moved, 2), inside) > SURE_DETAIL - 0.1
    a, b, fixed = a[likely], b[likely], fixed[likely].astype(np.float32)
    moved, inside = _warp(moving[likely].astype(np.float32), 2 * shift[likely])
    correlation = _correlate(fixed, moved, inside)
    detail = _correlate(_detail(fixed), _detail(moved), inside)
    keep = (detail > SURE_DETAIL) & (inside.mean(axis=(1, 2)) > 0.6)
    found = {"a": a, "b": b, "correlation": correlation, "detail": detail, "aligned": True}
    return pd.DataFrame(found)[keep]


def _blocks(pairs: np.ndarray, size: int = 256) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size, 0], pairs[start : start + size, 1]


def _correlate(a: np.ndarray, b: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
    """Return the correlation of every pair of images (N, H, W), over the pixels `inside`."""
    weight = np.ones(a.shape, np.float32) if inside is None else inside.astype(np.float32)
    total = weight.sum(axis=(1, 2), keepdims=True).clip(1)
    a = (a - (a * weight).sum(axis=(1, 2), keepdims=True) / total) * weight
    b = (b - (b * weight).sum(axis=(1, 2), keepdims=True) / total) * weight
    norm = np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
    return (a * b).sum(axis=(1, 2)) / np.maximum(norm, 1e-6)


def _align(fixed: np.ndarray, moving: np.ndarray, steps: int = 6) -> np.ndarray:
    """Find the affine map that lays `moving` on `fixed`, both float32 (N, S, S), as pixels (N, 6) for `_places`.

    Gauss-Newton steps on blurred images, with the slopes of `fixed`, so that most is computed once;
    brightness and contrast are free.

    Source: B. Lucas and T. Kanade, An iterative image registration technique, 1981.
    """
    side = fixed.shape[1]
    target, source = (
        _normalise(ndimage.gaussian_filter(images, (0, 1.5, 1.5))).reshape(images.shape) * side
        for images in (fixed, moving)
    )
    slope_y, slope_x = (slope.reshape(len(fixed), -1) for slope in np.gradient(target, axis=(1, 2)))
    target = target.reshape(len(fixed), -1)
    u, v = _grid(side)
    steepest = [slope_x, slope_x * u, slope_x * v, slope_y, slope_y * u, slope_y * v, target, np.ones_like(target)]
    jacobian = np.stack(steepest, axis=1)  # (N, 8, S * S)
    inverse = np.linalg.inv(jacobian @ jacobian.transpose(0, 2, 1) + 0.1 * np.eye(8, dtype=np.float32))
    shift = np.zeros((len(fixed), 6), np.float32)
    for _ in range(steps):
        x, y, inside = _places(shift, side)
        residual = (target - _sample(source, x, y)) * inside
        change = inverse @ (jacobian @ residual[:, :, None])
        shift += np.clip(change[:, :6, 0], -4, 4)
    return shift


def _warp(images: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return warped images (N, S, S), and where they come from inside the picture, bool (N, S, S)."""
    x, y, inside = _places(shift, images.shape[1])
    return _sample(images, x, y).reshape(images.shape), inside.reshape(images.shape)


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    line = np.linspace(-1, 1, side, dtype=np.float32)
    return np.tile(line, side), np.repeat(line, side)


def _places(shift: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where each pixel comes from, x and y (N, side * side), and whether that is inside."""
    u, v = _grid(side)
    half = (side - 1) / 2
    s = shift[:, :, None]
    x = half * (u + 1) + s[:, 0] + s[:, 1] * u + s[:, 2] * v
    y = half * (v + 1) + s[:, 3] + s[:, 4] * u + s[:, 5] * v
    inside = (x >= 0) & (x <= side - 1) & (y >= 0) & (y <= side - 1)
    return x, y, inside


def _sample(images: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return images (N, S, S) at places (N, P), between pixels linearly."""
    side = images.shape[1]
    x, y = np.clip(x, 0, side - 1.001), np.clip(y, 0, side - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    x, y = x - left, y - top
    flat = images.reshape(len(images), side * side)
    first = top * side + left
    corner = [np.take_along_axis(flat, first + step, axis=1) for step in (0, 1, side, side + 1)]
    upper, lower = corner[0] + x * (corner[1] - corner[0]), corner[2] + x * (corner[3] - corner[2])
    return upper + y * (lower - upper)


# ---------------------------------------------------------------- patients and groups


def read_patients(folder: SliceFolder) -> np.ndarray:
    """Return the patient of every slice, str (N,), "" where unknown.

    Read from `patients.csv`, else `findings.csv`, at the data set's root: columns path (as in
    `folder.slices`) and patient.

    Raises:
        CTError: patients.csv cannot be read or lacks a column.
    """
    names = pd.Series("", index=folder.slices["path"])
    for file in ("patients.csv", "findings.csv"):
        path = folder.root / file
        if not path.is_file():
            continue
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
            raise CTError(f"'{file}', which cannot be read ({error})", "a table in CSV", "mend or remove it") from error
        if {"path", "patient"} <= set(table):
            known = table.set_index(table["path"].str.replace("\\", "/"))["patient"].str.strip()
            return names.index.map(known[~known.index.duplicated()]).fillna("").to_numpy(str)
        if file == "patients.csv":
            raise CTError(
                f"columns {', '.join(table)} in 'patients.csv'", "columns path and patient", "rename the columns"
            )
    return names.to_numpy(str)


def group_slices(decoded: Decoded, near: pd.DataFrame, patients: np.ndarray | None = None) -> np.ndarray:
    """Return int (N,): slices of one patient, with equal pixels, or paired in `near` share a number."""
    table = decoded.table
    count = len(table)
    row = pd.Series(range(count), index=table["path"])
    ends = [(row[near["path_a"]].to_numpy(), row[near["path_b"]].to_numpy())] if len(near) else []
    for names in (table["pixels"].to_numpy(str), patients):
        if names is not None:
            known = np.flatnonzero(names != "")
            _, first, number = np.unique(names[known], return_index=True, return_inverse=True)
            ends.append((known, known[first[number]]))
    a, b = (np.concatenate(side) for side in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


# ---------------------------------------------------------------- the report


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    Attributes:
        root: the folder.
        findings: a row a finding, worst first: severity (error, warning, info), check, message, count,
            examples (up to five paths).
        tables: counts, leaks, exact, near, probes; slices (with group and patient). Empty when the layout
            is broken.
    """

    root: Path
    findings: pd.DataFrame
    tables: dict[str, pd.DataFrame]

    @property
    def ok(self) -> bool:
        """False when something must be mended before a score on this folder means anything."""
        return not (self.findings["severity"] == "error").any()

    def to_json(self, limit: int = 1000) -> dict[str, Any]:
        """Return a dict for JSON; of long tables the first `limit` rows, of all their number."""
        import json

        tables = {name: table for name, table in self.tables.items() if name != "slices"}
        if "counts" in tables:
            tables["counts"] = tables["counts"].reset_index()
        rows = {name: table.head(limit).to_json(orient="records", force_ascii=False) for name, table in tables.items()}
        return {
            "root": str(self.root),
            "ok": self.ok,
            "findings": json.loads(self.findings.to_json(orient="records", force_ascii=False)),
            "tables": {name: json.loads(text) for name, text in rows.items()},
            "rows": {name: len(table) for name, table in tables.items()},
        }

    def to_text(self) -> str:
        """Return the findings, and the probes' scores, as lines."""
        lines = []
        for row in self.findings.itertuples(index=False):
            lines.append(f"{row.severity.upper():8}{row.check}: {row.message}")
            lines += [f"{'':10}{example}" for example in row.examples if row.severity != "info"]
        probes = self.tables.get("probes")
        if probes is not None and len(probes):
            shown = probes.drop(columns="slices").round(3).to_string(index=False)
            lines += ["", "Macro F1 from features without anatomy, cross-validated, 95 % interval:", shown]
        lines += [
            "",
            "Nothing must be mended." if self.ok else "Errors must be mended; --fix OUT writes a cleaned copy.",
        ]
        return "\n".join(lines)


def audit(
    root: str | Path, *, probes: bool = True, cache: Path | None = None, workers: int | None = None
) -> AuditReport:
    """Look a folder over: unreadable and odd files, duplicates and patients across splits, shortcuts.

    Args:
        root: `<root>/{train,val[,test]}/<class>/*.png`; a broken layout is a finding, not an exception.
        probes: also train the shortcut probes, the longest part.
        cache: folder of `load_folder`'s index.
        workers: threads.
    Source: notebook 01.
    """
    root = Path(root)
    found: list[tuple] = []
    try:
        folder = load_folder(root, strict=False, cache=cache)
    except CTError as error:
        return AuditReport(root, _findings([("error", "layout", str(error), 1, [])]), {})
    try:
        patients = read_patients(folder)
    except CTError as error:
        found.append(("warning", "patients", str(error), 1, []))
        patients = np.full(len(folder.slices), "")
    decoded = decode_pass(folder, workers=workers)
    exact, near = exact_duplicates(decoded), near_duplicates(decoded, patients)
    groups = group_slices(decoded, near, patients)
    slices = decoded.table.assign(patient=patients, group=groups)
    leaks = _leaks(slices, exact, near)
    tables = {"counts": folder.counts(), "leaks": leaks, "exact": exact, "near": near, "slices": slices}
    found += _odd_files(folder, slices)
    found += _exact_findings(slices, exact, leaks)
    found += _near_findings(near, leaks)
    found += _patient_findings(slices)
    if probes:
        tables["probes"] = shortcut_probes(decoded, groups)
        found += _probe_findings(tables["probes"])
    return AuditReport(root, _findings(found), tables)


def _findings(rows: list[tuple]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["severity", "check", "message", "count", "examples"])
    table["examples"] = [list(examples)[:5] for examples in table["examples"]]
    rank = table["severity"].map({"error": 0, "warning": 1, "info": 2})
    return table.iloc[np.argsort(rank, kind="stable")].reset_index(drop=True)


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _odd_files(folder: SliceFolder, slices: pd.DataFrame) -> list[tuple]:
    facts = folder.slices
    bad = slices[slices["problem"] != ""]
    found: list[tuple] = []
    if len(bad):
        examples = [f"{path} ({problem})" for path, problem in zip(bad["path"], bad["problem"], strict=True)]
        found.append(
            ("error", "unreadable files", f"{_several(len(bad), 'file')} cannot be decoded", len(bad), examples)
        )
    counts = slices["class"].value_counts()
    found.append(
        (
            "info",
            "counts",
            f"{len(slices)} slices, {len(counts)} classes; the largest class ({counts.index[0]}) is "
            f"{counts.iloc[0] / counts.iloc[-1]:.1f} times the smallest ({counts.index[-1]})",
            len(slices),
            [],
        )
    )
    if not (slices["split"] == "test").any():
        found.append(("info", "counts", "no test split: half of val will report, the other half choose", 0, []))
    for column, words in (("colour", "with colour, which no CT slice has"), ("blank", "of one grey level")):
        rows = slices[slices[column]]
        if len(rows):
            found.append(
                ("warning", f"{column} pictures", f"{_several(len(rows), 'slice')} {words}", len(rows), rows["path"])
            )
    readable = facts[(slices["problem"] == "").to_numpy()]
    sizes = readable["width"].astype(str) + " x " + readable["height"].astype(str)
    for name, values in (("picture size", sizes), ("picture mode", readable["mode"])):
        kinds = values.value_counts()
        if len(kinds) > 1:
            rows = readable["path"][values != kinds.index[0]]
            message = f"{len(kinds)} kinds; {_several(len(rows), 'slice')} other than {kinds.index[0]}"
            found.append(("info", name, message, len(rows), rows))
    other = _other_files(folder)
    if other:
        found.append(
            ("info", "other files", f"{_several(len(other), 'file')} in the split folders not used", len(other), other)
        )
    return found


def _other_files(folder: SliceFolder) -> list[str]:
    """Return what stands in the split folders and is no slice: paths relative to the root."""
    known = set(folder.slices["path"])
    splits = [p for p in sorted(folder.root.iterdir()) if p.is_dir() and p.name.lower() in SPLIT_NAMES]
    files = (path for split in splits for path in sorted(split.rglob("*")) if path.is_file())
    names = (path.relative_to(folder.root).as_posix() for path in files if not path.name.startswith("."))
    return [name for name in names if name not in known]


def _leaks(slices: pd.DataFrame, exact: pd.DataFrame, near: pd.DataFrame) -> pd.DataFrame:
    """Count, for each two splits, the slices of one that have a twin in the other."""
    both = ["path", "split"]
    there, back = [f"{c}_{s}" for s in "ab" for c in both], [f"{c}_{s}" for s in "ba" for c in both]
    pairs = np.concatenate([near[there].to_numpy(), near[back].to_numpy()])
    spread = exact.groupby("group")["split"].agg(set)
    present = [split for split in SPLITS if (slices["split"] == split).any()]
    rows = []
    for i, split in enumerate(present):
        for other in present[:i]:
            mine = exact[exact["split"] == split]
            copies = set(mine["path"][mine["group"].map(spread).map(lambda splits, o=other: o in splits)])
            # A listed pair stands for all copies of its slices in the same split and class.
            listed = set(pairs[(pairs[:, 1] == split) & (pairs[:, 3] == other), 0])
            pixels = slices.loc[slices["path"].isin(listed), ["split", "pixels"]]
            twins = set(slices["path"][(slices["split"] == split) & slices["pixels"].isin(pixels["pixels"])])
            size = int((slices["split"] == split).sum())
            rows.append(
                (split, other, size, len(copies), len(twins), len(copies | twins), sorted(copies), sorted(twins))
            )
    return pd.DataFrame(
        rows, columns=["split", "other", "slices", "exact", "near", "either", "exact_paths", "near_paths"]
    )


def _exact_findings(slices: pd.DataFrame, exact: pd.DataFrame, leaks: pd.DataFrame) -> list[tuple]:
    found = []
    for row in leaks[leaks["exact"] > 0].itertuples(index=False):
        message = f"{row.exact} of {row.slices} {row.split} slices have an exact copy in {row.other}"
        found.append(("error", "exact copies across splits", message, row.exact, row.exact_paths))
    by_group = exact.groupby("group")
    mixed = exact[by_group["class"].transform("nunique") > 1]
    if len(mixed):
        message = f"{_several(mixed['group'].nunique(), 'picture')} under two classes or more ({len(mixed)} files)"
        found.append(("error", "exact copies across classes", message, len(mixed), mixed["path"]))
    extra = exact[exact.duplicated(["group", "split"])]
    if len(extra):
        message = f"{_several(len(extra), 'slice')} beside an exact copy in the same split"
        found.append(("warning", "exact copies within a split", message, len(extra), extra["path"]))
    return found


def _near_findings(near: pd.DataFrame, leaks: pd.DataFrame) -> list[tuple]:
    found = []
    show = near["path_a"] + " | " + near["path_b"]
    for row in leaks[leaks["near"] > 0].itertuples(index=False):
        splits = {row.split, row.other}
        pairs = show[[{a, b} == splits for a, b in zip(near["split_a"], near["split_b"], strict=True)]]
        message = (
            f"{row.near} of {row.slices} {row.split} slices have a near twin in {row.other} "
            f"(with exact copies {row.either})"
        )
        found.append(("error", "near twins across splits", message, row.near, pairs))
    mixed = near["class_a"] != near["class_b"]
    within = (near["split_a"] == near["split_b"]) & ~mixed
    kinds = (
        ("error", "near twins across classes", mixed & ~near["same_patient"], " of different classes"),
        (
            "warning",
            "near twins across classes",
            mixed & near["same_patient"],
            " of one patient, of different classes",
        ),
        (
            "warning",
            "near twins within a split",
            within & ~near["same_patient"],
            ": copies, or neighbouring slices of a patient",
        ),
        (
            "info",
            "near twins within a split",
            within & near["same_patient"],
            " of one patient: neighbouring slices",
        ),
    )
    for severity, check, rows, words in kinds:
        if rows.any():
            found.append((severity, check, _several(int(rows.sum()), "pair") + words, int(rows.sum()), show[rows]))
    return found


def _patient_findings(slices: pd.DataFrame) -> list[tuple]:
    known = slices[slices["patient"] != ""]
    if known.empty:
        message = "no patient column (patients.csv or findings.csv with path and patient): not checked"
        return [("info", "patients", message, 0, [])]
    found = []
    by_patient = known.groupby("patient")
    for severity, column, words in (("error", "split", "splits"), ("warning", "class", "classes")):
        mixed = known[by_patient[column].transform("nunique") > 1]
        if len(mixed):
            names = mixed["patient"].nunique()
            message = f"{_several(names, 'patient')} in two {words} or more ({len(mixed)} slices)"
            found.append(
                (
                    severity,
                    f"patients in two {words}",
                    message,
                    names,
                    mixed.drop_duplicates(["patient", column])["path"],
                )
            )
    if not found:
        found.append(
            (
                "info",
                "patients",
                f"{_several(known['patient'].nunique(), 'patient')}, each in one split and class",
                0,
                [],
            )
        )
    if len(known) < len(slices):
        rows = slices[slices["patient"] == ""]
        found.append(
            (
                "info",
                "patients",
                f"{_several(len(rows), 'slice')} without a patient in the table",
                len(rows),
                rows["path"],
            )
        )
    return found


def _probe_findings(probes: pd.DataFrame) -> list[tuple]:
    if probes.empty:
        return [("info", "shortcut probes", "too few slices in a class to train probes", 0, [])]
    found = []
    for row in probes[probes["flagged"]].itertuples(index=False):
        message = (
            f"{row.probe} alone gives macro F1 {row.macro_f1:.2f} ({row.low:.2f} to {row.high:.2f}), "
            f"chance {row.chance:.2f}, best at {row.best_class}: a model may read the class without the lungs"
        )
        found.append(("warning", "shortcut", message, 1, []))
    if not found:
        top = probes.loc[probes["macro_f1"].idxmax()]
        message = f"none is flagged; the best is {top['probe']} with macro F1 {top['macro_f1']:.2f}"
        found.append(("info", "shortcut probes", message, 0, []))
    return found


# ---------------------------------------------------------------- a cleaned copy


def clean_copy(root: str | Path, out: str | Path, report: AuditReport | None = None, *, seed: int = 0) -> Path:
    """Write a cleaned copy of a data set; the source is only read, and `out` is complete or absent.

    Left out: unreadable files; of exact copies all but the first; all slices whose exact copy, or whose near
    twin of no known common patient, has another class, since nobody can tell which is right. When a patient
    or a group of twins lies in two splits, all splits are drawn anew, group by group, with the old shares and
    the classes alike; otherwise they stay. patients.csv and findings.csv follow with the new paths.
    dataset.json says what was left out and which file came from where.

    Args:
        root: the data set.
        out: folder that does not exist or is empty, outside `root`.
        report: of `audit(root)`, made here if absent.
        seed: of the new splits.
    Returns:
        `out`.
    Raises:
        CTError: `out` is inside `root` or not empty, the layout is broken, or too few groups of a class are
            left for the splits.
    Source: notebook 01.
    """
    root, out = Path(root), Path(out)
    if out.resolve().is_relative_to(root.resolve()):
        raise CTError(f"the output '{out}' inside the data set '{root}'", "another folder", "choose a folder outside")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CTError(f"'{out}', which is not empty", "a new or empty folder", "choose another name")
    report = report or audit(root, probes=False)
    if "slices" not in report.tables:
        message = report.findings["message"].iloc[0]
        raise CTError(f"a data set that cannot be read: {message}", "split and class folders", "mend the layout first")
    slices = report.tables["slices"]
    reasons = _reasons_to_drop(slices, report.tables["near"])
    kept = slices[reasons == ""]
    rebuilt = bool((slices[slices["problem"] == ""].groupby("group")["split"].nunique() > 1).any())
    shares = slices["split"].value_counts(normalize=True)
    kept = kept.assign(new_split=_new_splits(kept, shares, seed) if rebuilt else kept["split"])
    kept = kept.assign(new_path=_new_paths(kept))
    missing = [
        f"{c} in {s}"
        for s in shares.index
        for c in sorted(set(slices["class"]))
        if not ((kept["new_split"] == s) & (kept["class"] == c)).any()
    ]
    if missing:
        raise CTError(
            f"nothing left of {', '.join(missing)}",
            "slices of each class in each split",
            "add slices, or mend the labels by hand",
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=out.parent))
    try:
        for row in progress(list(kept.itertuples(index=False)), desc="Copying slices", unit="slice", leave=False):
            target = temporary / row.new_path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / row.path, target)
        _copy_tables(root, temporary, dict(zip(kept["path"], kept["new_path"], strict=True)))
        _write_meta(root, temporary, slices.assign(why=reasons), kept, rebuilt, seed)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()  # empty; a rename onto it fails on Windows
        os.replace(temporary, out)
    except OSError as error:
        raise CTError(
            f"an error while writing '{out}' ({error})",
            "room and rights there",
            "mend that and run again; nothing was kept",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _reasons_to_drop(slices: pd.DataFrame, near: pd.DataFrame) -> pd.Series:
    """Return why each slice is left out, "" for those that stay."""
    why = pd.Series("", index=slices.index)
    pixels = slices["pixels"].where(slices["problem"] == "")
    first = slices["path"].groupby(pixels).transform("first")
    why[(slices["path"] != first) & pixels.notna()] = "exact copy of " + first
    wrong = near[(near["class_a"] != near["class_b"]) & ~near["same_patient"]]
    twins = pixels[slices["path"].isin([*wrong["path_a"], *wrong["path_b"]])]
    why[pixels.isin(twins)] = "a near twin has another class"
    why[slices["class"].groupby(pixels).transform("nunique") > 1] = "an exact copy has another class"
    why[slices["problem"] != ""] = "unreadable: " + slices["problem"]
    return why


def _new_splits(kept: pd.DataFrame, shares: pd.Series, seed: int) -> np.ndarray:
    """Share groups out to the splits: 20 folds (fewer when a class is small), of which val and test get some."""
    splits = [split for split in SPLITS if split in shares.index]
    per_class = kept.groupby("class")["group"].nunique()
    folds = min(20, int(per_class.min())) if len(kept) else 0
    if folds < len(splits):
        raise CTError(
            f"{folds} independent groups of slices in class '{per_class.idxmin() if folds else ''}'",
            f"one a split, {len(splits)}, where a group is a patient or slices that are twins",
            "add slices of other patients",
        )
    parts = _grouped_folds(kept["label"].to_numpy(), kept["group"].to_numpy(), folds, seed)
    # A class may be missing in a fold; give val and test the folds with the most classes first.
    variety = kept.groupby(parts)["class"].nunique().reindex(range(folds), fill_value=0)
    order = iter(variety.sort_values(ascending=False, kind="stable").index)
    result = np.full(len(kept), "train", dtype=object)
    room = folds - len(splits) + 1
    for split in splits[1:]:
        wanted = min(max(1, round(float(shares[split]) * folds)), room)
        room -= wanted - 1
        result[np.isin(parts, [next(order) for _ in range(wanted)])] = split
    return result


def _new_paths(kept: pd.DataFrame) -> list[str]:
    """Return <split>/<class>/<name> of every slice; a name that is taken gets the old split in front."""
    taken: set[str] = set()
    paths = []
    for row in kept.itertuples(index=False):
        name = Path(*Path(row.path).parts[2:])
        path = Path(row.new_split, row[kept.columns.get_loc("class")], name)
        while path.as_posix().casefold() in taken:
            path = path.with_name(f"{row.split}_{path.name}")
        taken.add(path.as_posix().casefold())
        paths.append(path.as_posix())
    return paths


def _copy_tables(root: Path, out: Path, new_path: dict[str, str]) -> None:
    for file in ("patients.csv", "findings.csv"):
        if (root / file).is_file():
            try:
                table = pd.read_csv(root / file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            except ValueError:
                continue  # the audit has said that it cannot be read
            if "path" not in table:
                continue
            path = table["path"].str.replace("\\", "/").map(new_path)
            table = table.assign(path=path)[path.notna()]
            if "split" in table:
                table["split"] = table["path"].str.split("/").str[0]
            table.to_csv(out / file, index=False, lineterminator="\n")


def _write_meta(root: Path, out: Path, slices: pd.DataFrame, kept: pd.DataFrame, rebuilt: bool, seed: int) -> None:
    import json

    try:
        meta = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        meta = {}
    meta = meta if isinstance(meta, dict) else {}
    dropped = slices[slices["why"] != ""]
    write_json(
        out / "dataset.json",
        {
            "name": f"{meta.get('name') or root.resolve().name}, cleaned",
            "kind": meta.get("kind", "unknown"),
            "cleaned": {
                "splits": f"drawn anew by patient or group of twins, seed {seed}" if rebuilt else "kept",
                "removed": dropped[["path", "why"]].to_dict("records"),
                "came_from": dict(zip(kept["new_path"], kept["path"], strict=True)),
            },
            "source": meta,
        },
    )
