"""Classify new pictures and DICOM files with the model of a run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ctutils import registry
from ctutils.data import normalise
from ctutils.dicom import is_dicom, read_dicom
from ctutils.pictures import (
    DEEP,
    HU,
    IMAGE_SUFFIXES,
    LUNG_WINDOW,
    BadFile,
    open_picture,
    own_depth,
    quiet,
    read_file,
    resize,
    say_depth,
    to_grey,
)

if TYPE_CHECKING:
    from ctutils.runs import Run

BATCH = 16


@torch.no_grad()
def predict_files(run: "Run", paths: Sequence[str | Path], weights: str = "auto") -> tuple[list[dict], dict[str, str]]:
    """Classify pictures or DICOM files with the model of a run.

    A file is read as the slices of the run's training data were: HU in its window, deep pictures with its depth.

    Args:
        run: a record with its weights.
        paths: PNG, JPEG, ... or DICOM files; a DICOM file of several frames gives a row a frame.
        weights: where the backbone's weights are, as for `build_model`.
    Returns:
        one dict a picture: image, class, probabilities {class: number}, window ([level, width] where HU were
        windowed, else None), and perhaps a note; and {path: why} of the files that cannot be read as slices.
    Raises:
        CTError: weights that are not there.
    Source: notebook 00.
    """
    from ctutils.backbones import restore_model

    rows, pictures, failed = [], [], {}
    with quiet():
        for path in paths:
            try:
                found = _read_any(Path(path), run.record["data"])
            except BadFile as error:
                failed[str(path)] = str(error)
                continue
            rows += [row for row, _ in found]
            pictures += [resize(grey, run.plan.size) for _, grey in found]
    if not rows:
        return [], failed
    spec, model = registry.get_spec(run.plan.backbone), restore_model(run, weights)
    for start in range(0, len(pictures), BATCH):
        grey = torch.from_numpy(np.stack(pictures[start : start + BATCH]))[:, None]  # (B, 1, H, W)
        probs = torch.softmax(model(normalise(grey, spec.mean, spec.std)), 1).numpy()
        for row, values in zip(rows[start : start + BATCH], probs, strict=True):
            row["class"] = run.classes[int(values.argmax())]
            row["probabilities"] = {c: round(float(p), 6) for c, p in zip(run.classes, values, strict=True)}
    return rows, failed


def _read_any(path: Path, data: dict) -> list[tuple[dict, Image.Image]]:
    """Read a picture, or each frame of a DICOM file, with the begin of its row; `data` is the record's."""
    recorded, depth = data.get("window"), data.get("depth") or ""
    window = (recorded["level"], recorded["width"]) if recorded else LUNG_WINDOW
    unnamed = [] if recorded else ["the run's record names no window: read with the lung window"]
    content = read_file(path)
    if is_dicom(content[:132], path.name) and not path.name.lower().endswith(IMAGE_SUFFIXES):
        frames = [Image.fromarray(frame) for frame in read_dicom(content, window)[0]]
        names = [str(path)] if len(frames) == 1 else [f"{path} frame {k}" for k in range(1, len(frames) + 1)]
        return [(_row(name, window, unnamed), grey) for name, grey in zip(names, frames, strict=True)]
    with open_picture(io.BytesIO(content)) as image:
        own, notes = "", []
        if image.mode in DEEP:
            own = depth or own_depth(np.asarray(image))
            notes = [f"read as {say_depth(own)}"] * (own != depth) + unnamed * (own == HU)
        elif depth:
            notes = [f"8 bits, where the run has learned from {say_depth(depth)}"]
        if (frames := getattr(image, "n_frames", 1)) > 1:
            notes.append(f"the first of {frames} frames")
        return [(_row(str(path), window if own == HU else None, notes), to_grey(image, own, window))]


def _row(image: str, window: tuple[float, float] | None, notes: list[str]) -> dict:
    row = {"image": image, "class": "", "probabilities": {}, "window": list(window) if window else None}
    return row | ({"note": "; ".join(notes)} if notes else {})
