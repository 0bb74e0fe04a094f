"""Slices that show the same: equal pixels, or the same content in other clothes."""

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctutils.audit.look import COARSE, FINE, Decoded

MIN_CORRELATION = 0.965  # of two body crops at 48 x 48: same or neighbouring slice
MIN_DETAIL = 0.82  # of their fine structure (what is left without a blur): vessels, bronchi, edges of bone
SURE_DETAIL = 0.94  # the same picture, whatever was done to it


def exact_duplicates(decoded: Decoded) -> pd.DataFrame:
    """Return the slices whose decoded grey pixels are equal to another's, whatever the file format and mode.

    Returns:
        one row a slice: group (int), path, split, class; groups in the order of their first slice.
    Source: notebook 01.
    """
    table = decoded.table[decoded.table["problem"] == ""]
    table = table[table.duplicated("pixels", keep=False)]
    table = table.assign(group=pd.factorize(table["pixels"])[0]).sort_values(["group", "path"], kind="stable")
    return table[["group", "path", "split", "class"]].reset_index(drop=True)


def near_duplicates(decoded: Decoded) -> pd.DataFrame:
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
    Returns:
        one row a pair: path_a, path_b, split_a, split_b, class_a, class_b, correlation, detail, same_patient,
        aligned, best first. Of exact copies in one split and class only the first is listed; a slice with very
        many twins is listed with its best 50.
    Source: notebook 01.
    """
    usable = decoded.table[(decoded.table["problem"] == "") & ~decoded.table["blank"]]
    # In the order of their content: the same slices under other names give the same pairs.
    unique = usable[~usable["pixels"].duplicated()].sort_values("pixels")
    found = _confirmed(decoded.body[unique.index], decoded.lungs[unique.index])
    # Bring the copies back in, one a split and class: a leak is a leak through each of them.
    copies = usable.drop_duplicates(["pixels", "split", "class"])[["pixels", "path", "split", "class", "patient"]]
    for side in "ab":
        found[f"pixels_{side}"] = unique["pixels"].to_numpy()[found[side]]
        found = found.merge(copies.add_suffix(f"_{side}"), on=f"pixels_{side}")
    known = (found["patient_a"] != "") & (found["patient_b"] != "")
    found["same_patient"] = known & (found["patient_a"] == found["patient_b"])
    found = found[~known | found["same_patient"] | (found["detail"] >= SURE_DETAIL)]
    turn = found["path_a"] > found["path_b"]
    for one, other in (("path_a", "path_b"), ("split_a", "split_b"), ("class_a", "class_b")):
        found.loc[turn, [one, other]] = found.loc[turn, [other, one]].to_numpy()
    found = found.sort_values(["correlation", "path_a", "path_b"], ascending=[False, True, True], kind="stable")
    keep = ["path_a", "path_b", "split_a", "split_b", "class_a", "class_b"]
    return found[[*keep, "correlation", "detail", "same_patient", "aligned"]].reset_index(drop=True)


def group_slices(decoded: Decoded, near: pd.DataFrame) -> np.ndarray:
    """Return int (N,): slices of one patient, with equal pixels, or paired in `near` share a number."""
    table = decoded.table
    row = pd.Series(table.index, index=table["path"])
    ends = [(row[near["path_a"]].to_numpy(), row[near["path_b"]].to_numpy())]
    for name in ("pixels", "patient"):
        known = table.index[table[name] != ""].to_series()
        ends.append((known, known.groupby(table[name]).transform("first")))
    a, b = (np.concatenate(side) for side in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(table), len(table)))
    return connected_components(graph, directed=False)[1]


def group_sketches(sketches: list[tuple[str, np.ndarray, np.ndarray] | None]) -> list[int]:
    """Return a number for each picture, the same for equal ones and near twins; each None stands alone.

    Args:
        sketches: of `look.sketch`, in any order.
    """
    blank = ("", np.zeros((FINE, FINE), np.uint8), np.zeros((COARSE, COARSE), np.uint8))
    pixels, body, lungs = zip(*(one or blank for one in sketches), strict=True)
    table = pd.DataFrame({"path": [str(row) for row in range(len(pixels))], "pixels": pixels, "patient": ""})
    table = table.assign(problem=["?" * (name == "") for name in pixels], blank=[one.std() < 2 for one in body])
    decoded = Decoded(table.assign(split="", **{"class": ""}), np.stack(body), np.stack(lungs), {})
    return group_slices(decoded, near_duplicates(decoded)).tolist()


def _confirmed(body: np.ndarray, lungs: np.ndarray) -> pd.DataFrame:
    """Return the pairs that hold: a, b (rows, a before b), correlation, detail, aligned."""
    small = _shrink(body, COARSE)
    upright, chests = _normalise(small), _normalise(lungs)
    few = min(6, max(2, 20_000 // max(1, len(body))))  # more for small folders; a large one would take minutes
    searches = [  # view of a, whether to align, pairs
        (0, False, _partners(upright, upright, 50, MIN_CORRELATION)),
        (0, True, np.concatenate([_partners(upright, upright, few, 0.6), _partners(chests, chests, 1, 0.8)])),
        *((view, True, _partners(_normalise(_view(small, view)), upright, 1, 0.9)) for view in range(1, 8)),
    ]
    blocks = []
    for view, align, pairs in searches:
        pairs = np.unique(pairs if view in (1, 3) else np.sort(pairs, axis=1), axis=0)  # others undo themselves
        blocks += [(view, align, *pairs[start : start + 256].T) for start in range(0, len(pairs), 256)]
    rows = [np.zeros((0, 5)), *(_confirm(body, *block) for block in blocks)]
    found = pd.DataFrame(np.concatenate(rows), columns=["a", "b", "correlation", "detail", "aligned"])
    return found.astype({"a": int, "b": int, "aligned": bool}).drop_duplicates(["a", "b"])  # keeps the unaligned one


def _partners(left: np.ndarray, right: np.ndarray, most: int, least: float) -> np.ndarray:
    """Return int (P, 2): rows of `left`, each with its `most` best partners in `right` that correlate above `least`."""
    most = min(most, len(right) - 1)
    found = [np.zeros((0, 2), int)]
    for start in range(0, len(left), 256):  # a block of rows bounds the memory
        products = left[start : start + 256] @ right.T
        rows = np.arange(len(products))
        products[rows, start + rows] = -1
        b = np.argpartition(-products, most - 1, axis=1)[:, :most].ravel()
        a = np.repeat(rows, most)
        found.append(np.stack([a + start, b], axis=1)[products[a, b] > least])
    return np.concatenate(found)


def _confirm(body: np.ndarray, view: int, align: bool, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return those pairs of rows `a` and `b` that show the same, (K, 5): see `_confirmed`."""
    fixed, moving = _view(body[a], view).astype(np.float32), body[b].astype(np.float32)
    inside = np.ones(fixed.shape, bool)
    if align:
        moving, inside = _warp(moving, _align(_shrink(fixed, FINE // 2), _shrink(moving, FINE // 2)))
    correlation = _correlate(_shrink(fixed, FINE // 2), _shrink(moving, FINE // 2), inside[:, ::2, ::2])
    detail = _correlate(*(images - ndimage.uniform_filter(images, (0, 13, 13)) for images in (fixed, moving)), inside)
    sure = (detail > SURE_DETAIL) & (inside.mean(axis=(1, 2)) > 0.6)
    keep = sure if align else (correlation > MIN_CORRELATION) & (detail > MIN_DETAIL)
    return np.stack([*np.sort([a, b], axis=0), correlation, detail, np.full(len(a), align)], axis=1)[keep]


def _view(images: np.ndarray, number: int) -> np.ndarray:
    """Return images (N, S, S) turned by `number` quarters, from 4 on mirrored first."""
    return np.rot90(images[:, :, ::-1] if number >= 4 else images, number % 4, axes=(1, 2))


def _shrink(images: np.ndarray, size: int) -> np.ndarray:
    step = images.shape[1] // size
    return images.reshape(len(images), size, step, size, step).mean(axis=(2, 4), dtype=np.float32)


def _normalise(images: np.ndarray) -> np.ndarray:
    """Return images as rows of mean 0 and length 1, float32 (N, D): a product of two is their correlation."""
    rows = images.reshape(len(images), images.shape[1] * images.shape[2]).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _correlate(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the correlation of every pair of images (N, S, S), over the pixels with a weight."""
    total = weight.sum(axis=(1, 2), keepdims=True).clip(1)
    a, b = (weight * (x - (x * weight).sum(axis=(1, 2), keepdims=True) / total) for x in (a, b))
    norm = np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
    return (a * b).sum(axis=(1, 2)) / np.maximum(norm, 1e-6)


def _align(fixed: np.ndarray, moving: np.ndarray, steps: int = 6) -> np.ndarray:
    """Find the affine maps that lay `moving` on `fixed`, both float32 (N, S, S), as float32 (N, 6) for `_warp`.

    Gauss-Newton steps on blurred images, with the slopes of `fixed`, so that most is computed once;
    brightness and contrast are free.

    Source: B. Lucas and T. Kanade, An iterative image registration technique, 1981.
    """
    side = fixed.shape[1]
    target, source = (
        _normalise(ndimage.gaussian_filter(images, (0, 1.5, 1.5))).reshape(images.shape) * side
        for images in (fixed, moving)
    )
    down, right = (slope.reshape(len(fixed), -1) * side / 2 for slope in np.gradient(target, axis=(1, 2)))
    line = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = np.tile(line, side), np.repeat(line, side)
    target = target.reshape(len(fixed), -1)
    steepest = [right * x, right * y, right, down * x, down * y, down, target, np.ones_like(target)]
    jacobian = np.stack(steepest, axis=1)  # (N, 8, S * S)
    inverse = np.linalg.inv(jacobian @ jacobian.transpose(0, 2, 1) + 10 * np.eye(8, dtype=np.float32))
    maps = np.zeros((len(fixed), 6), np.float32)
    for _ in range(steps):
        moved, inside = _warp(source, maps)
        residual = (target - moved.reshape(target.shape)) * inside.reshape(target.shape)
        change = inverse @ (jacobian @ residual[:, :, None])
        maps += np.clip(change[:, :6, 0], -8 / side, 8 / side)  # four pixels
    return maps


def _warp(images: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return warped images (N, S, S), and whether a pixel comes from inside the picture, bool (N, S, S).

    `maps` (N, 6) are what is added to the unit map of places from -1 to 1: rows of x, y, 1.
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    stack = torch.from_numpy(images)[:, None]
    places = affine_grid(torch.from_numpy(maps).view(-1, 2, 3) + torch.eye(2, 3), stack.shape, align_corners=True)
    moved = grid_sample(stack, places, padding_mode="border", align_corners=True)
    return moved[:, 0].numpy(), (places.abs() <= 1).all(dim=-1).numpy()
