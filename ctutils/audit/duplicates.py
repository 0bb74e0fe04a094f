"""Slices that show the same: equal pixels, or the same content in other clothes."""

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctutils.audit.look import SIDE, Decoded, shrink

FINE, COARSE = 64, 16  # pixels a side of the crops that confirm and that search
LIKELY, SURE = 0.6, 0.85  # similarity of coarse crops that is worth a closer look, in any case
MIN_DETAIL = 0.75  # correlation of fine crops: the same or a neighbouring slice
SURE_DETAIL = 0.9  # the same picture, whatever was done to it
FRAMES = {(0,): MIN_DETAIL, (1, 2): MIN_DETAIL, (3,): SURE_DETAIL}  # the body; each lung; the whole picture
VIEWS, OUTSIDE = ((1, 1), (-1, -1), (1, -1), (-1, 1)), -128  # as it is, turned over, mirrored, both; off the picture


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

    Every slice is cut out in the frames of its body, of each lung and of the picture (see `look.find_frames`), so
    that it does not matter how a copy was shifted, turned, cropped, resized or inverted, as long as one frame is whole.
    Of a cut, only what differs from its surroundings counts, in units of the local contrast (a window or an equalised
    histogram change little), less what all slices of the folder have in common: the anatomy alone makes no twins.
    Coarse cuts search, also mirrored and upside down; fine ones must correlate above `MIN_DETAIL`, or, where both
    patients are known and differ, above `SURE_DETAIL`.

    Args:
        decoded: N slices; unreadable and blank ones are left out.
    Returns:
        one row a pair: path_a, path_b, split_a, split_b, class_a, class_b, correlation (coarse), detail (fine),
        same_patient, best first. Of exact copies in one split and class only the first is listed; a slice with very
        many twins is listed with its best 50.
    Source: notebook 01.
    """
    usable = decoded.table[(decoded.table["problem"] == "") & ~decoded.table["blank"]]
    # In the order of their content: the same slices under other names give the same pairs.
    unique = usable[~usable["pixels"].duplicated()].sort_values("pixels")
    found = _confirmed(decoded.small[unique.index], decoded.frames[unique.index])
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
    found = found.sort_values(["detail", "path_a", "path_b"], ascending=[False, True, True], kind="stable")
    keep = ["path_a", "path_b", "split_a", "split_b", "class_a", "class_b", "correlation", "detail", "same_patient"]
    return found[keep].reset_index(drop=True)


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
    nothing = ("", np.zeros((SIDE, SIDE), np.uint8), np.full((4, 2, 3), np.nan, np.float32))
    pixels, small, frames = zip(*(one or nothing for one in sketches), strict=True)
    table = pd.DataFrame({"path": [str(row) for row in range(len(pixels))], "pixels": pixels, "patient": ""})
    table = table.assign(problem=["?" * (name == "") for name in pixels], blank=[one.std() < 2 for one in small])
    decoded = Decoded(table.assign(split="", **{"class": ""}), np.stack(small), np.stack(frames), {})
    return group_slices(decoded, near_duplicates(decoded)).tolist()


def _confirmed(small: np.ndarray, frames: np.ndarray) -> pd.DataFrame:
    """Return the pairs that hold: a, b (rows, a before b), correlation, detail; each once, with its best detail."""
    found = [np.zeros((0, 4))]
    for numbers, least in FRAMES.items():
        owner, which = np.nonzero(~np.isnan(frames[:, numbers, 0, 0]))
        fine, coarse = _signatures(small, frames[:, numbers], owner, which)
        few = min(6, max(1, 10_000 // max(1, len(small))))  # more for small folders; a large one would take minutes
        for view in VIEWS if len(owner) > 1 else ():
            seen = coarse[:, :: view[0], :: view[1]]
            partners = _partners(_normalise(seen), _normalise(coarse), few if view == (1, 1) else 1, owner)
            for start in range(0, len(partners), 512):
                a, b = partners[start : start + 512, :2].astype(int).T
                detail = _correlate(fine[a][:, :: view[0], :: view[1]], fine[b])
                rows = np.stack([*np.sort([owner[a], owner[b]], axis=0), partners[start : start + 512, 2], detail], 1)
                found.append(rows[detail > least])
    table = pd.DataFrame(np.concatenate(found), columns=["a", "b", "correlation", "detail"])
    table = table.astype({"a": int, "b": int}).sort_values("detail", ascending=False, kind="stable")
    return table.drop_duplicates(["a", "b"])


def _signatures(small: np.ndarray, frames: np.ndarray, owner: np.ndarray, which: np.ndarray) -> tuple:
    """Return fine int8 (M, 64, 64), in 32nds of the local contrast, and coarse float32 (M, 16, 16), less the means."""
    fine, coarse = np.zeros((len(owner), FINE, FINE), np.int8), np.zeros((len(owner), COARSE, COARSE), np.float32)
    for start in range(0, len(owner), 256):  # a block bounds the memory
        part = slice(start, start + 256)
        cuts, inside = _cut(small[owner[part]], frames[owner[part], which[part]])
        fine[part] = np.where(inside, np.clip(32 * _contrast(cuts, 5), -127, 127), OUTSIDE)
        coarse[part] = shrink(_contrast(shrink(cuts, FINE // 2), 13), COARSE)
    # What all have in common; shrunk where there are few slices, which may be twins of each other.
    share, some = len(owner) / (len(owner) + 20), fine[:: 1 + len(fine) // 1000]
    common = share * np.where(some == OUTSIDE, 0, some).mean(axis=0) if len(some) else 0
    for start in range(0, len(owner), 256):
        part = fine[start : start + 256]
        part[:] = np.where(part == OUTSIDE, OUTSIDE, np.clip(part - common, -127, 127))
    return fine, coarse - share * coarse.mean(axis=0) if len(coarse) else coarse


def _cut(small: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what stands in frames (N, 2, 3), float32 (N, 64, 64), and what of it is in the picture, bool."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    places = affine_grid(torch.from_numpy(frames), (len(frames), 1, FINE, FINE), align_corners=False)
    stack = torch.from_numpy(small.astype(np.float32))[:, None]
    cuts = grid_sample(stack, places, padding_mode="border", align_corners=False)
    return cuts[:, 0].numpy(), (places.abs() <= 1).all(dim=-1).numpy()


def _contrast(images: np.ndarray, box: int) -> np.ndarray:
    """Return images (N, S, S) less their local mean, in units of their local deviation; noise stays small."""
    images = images - ndimage.uniform_filter(images, (0, box, box))
    deviation = np.sqrt(np.maximum(ndimage.uniform_filter(images * images, (0, box, box)), 0))
    return images / (deviation + 6)


def _partners(left: np.ndarray, right: np.ndarray, few: int, owner: np.ndarray) -> np.ndarray:
    """Return (P, 3): rows of `left`, each with its best partners in `right` of another slice, and their correlation.

    The `few` best above `LIKELY`, and up to 50 above `SURE`; of a pair that finds each other once.
    """
    found = [np.zeros((0, 3))]
    for start in range(0, len(left), 256):  # a block of rows bounds the memory
        products = left[start : start + 256] @ right.T
        rows = np.arange(len(products))
        products[owner[start : start + 256, None] == owner[None]] = -1
        for turn in range(50):
            b = products.argmax(axis=1)
            best = products[rows, b]
            keep = best > (LIKELY if turn < few else SURE)
            if not keep.any():
                break
            found.append(np.stack([rows + start, b, best], axis=1)[keep])
            products[rows, b] = -1
    pairs = np.concatenate(found)
    _, first = np.unique(np.sort(pairs[:, :2], axis=1), axis=0, return_index=True)  # views undo themselves
    return pairs[first]


def _normalise(images: np.ndarray) -> np.ndarray:
    """Return images as rows of mean 0 and length 1, float32 (N, D): a product of two is their correlation."""
    rows = images.reshape(len(images), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the correlation of pairs of fine crops, int8 (N, S, S), where both are inside; 0 for less than 60 %."""
    inside = (a != OUTSIDE) & (b != OUTSIDE)
    total = inside.sum(axis=(1, 2), keepdims=True).clip(1)
    a, b = (x * inside.astype(np.float32) for x in (a, b))
    a, b = (inside * (x - x.sum(axis=(1, 2), keepdims=True) / total) for x in (a, b))
    norm = np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
    return (a * b).sum(axis=(1, 2)) / np.maximum(norm, 1e-6) * (inside.mean(axis=(1, 2)) > 0.6)
