"""Slices that show the same: equal pixels, or the same content in other clothes."""

import concurrent.futures
import os
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctutils.audit.look import COARSE, FINE, Decoded

MIN_CORRELATION = 0.965  # of two body crops at 48 x 48: same or neighbouring slice
MIN_DETAIL = 0.82  # of their fine structure (what is left without a blur) at 96 x 96
SURE_DETAIL = 0.94  # the same picture, whatever was done to it


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
    mirrored and turned by quarters. Confirmation, at 48 and 96 pixels: either the body crops correlate, as they are,
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


# Views of stacks (N, H, W). The first six undo themselves; the last two, quarter turns, undo each other.
_VIEWS = tuple(
    lambda images, turned=turned, flip=flip: (images.swapaxes(1, 2) if turned else images)[flip]
    for turned, flips in ((False, (np.s_[:], np.s_[:, :, ::-1], np.s_[:, ::-1], np.s_[:, ::-1, ::-1])),
                          (True, (np.s_[:], np.s_[:, ::-1, ::-1], np.s_[:, :, ::-1], np.s_[:, ::-1])))
    for flip in flips
)  # fmt: skip


def _candidates(body: np.ndarray, lungs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs that are alike as they are, (P, 2), and pairs with a view that deserve an alignment, (Q, 3)."""
    small = _shrink(body, COARSE)
    upright, chests = _normalise(small), _normalise(lungs)
    near = min(6, max(2, 20_000 // max(1, len(body))))  # more for small folders; a large one would take minutes

    def searches():  # one after the other, for the memory's sake
        """Yield left, right, view of the left one, partners a slice, least correlation of a partner."""
        yield upright, upright, 0, near, 0.6
        yield chests, chests, 0, 1, 0.8
        for view in range(1, len(_VIEWS)):
            yield _normalise(_VIEWS[view](small)), upright, view, 1, 0.9

    alike, similar = [np.zeros((0, 2), int)], [np.zeros((0, 3), int)]
    for left, right, view, partners, least in searches():
        partners = min(partners, len(left) - 1)
        for start in range(0, len(left) if partners > 0 else 0, 256):  # a block of rows bounds the memory
            products = left[start : start + 256] @ right.T
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
            similar.append(np.stack([a + start, b, np.full(len(a), view)], axis=1)[good])
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
    for view in range(len(_VIEWS)):
        pairs = similar[similar[:, 2] == view, :2]
        pairs = np.unique(np.sort(pairs, axis=1) if view < 6 else pairs, axis=0)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            rows += pool.map(lambda pair, view=view: _confirm_aligned(body, *pair, view), _blocks(pairs))
    found = pd.concat(rows) if rows else pd.DataFrame(columns=columns)
    found[["a", "b"]] = np.sort(found[["a", "b"]].astype(int), axis=1)
    return found.astype({"a": int, "b": int}).drop_duplicates(["a", "b"])  # keeps the unaligned one


def _confirm_aligned(body: np.ndarray, a: np.ndarray, b: np.ndarray, view: int) -> pd.DataFrame:
    fixed, moving = _VIEWS[view](body[a]), body[b]
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
