"""Classify new pictures and DICOM files with the model of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ctutils import registry
from ctutils.base import CTError
from ctutils.data import normalise, read_small
from ctutils.importers import LUNG_WINDOW, dicom_to_uint8

if TYPE_CHECKING:
    from ctutils.runs import Run

BATCH = 16


@torch.no_grad()
def predict_files(run: "Run", paths: Sequence[str | Path], weights: str = "auto") -> list[dict]:
    """Classify pictures or DICOM files with the model of a run.

    A DICOM file is read with the window of the run's training data, so that it looks as those slices did.

    Args:
        run: a record with its weights.
        paths: PNG, JPEG, ... or DICOM files; a DICOM file of several frames gives a row a frame.
        weights: where the backbone's weights are, as for `build_model`.
    Returns:
        one dict a picture: image, class, probabilities {class: number}, window ([level, width] in HU for DICOM,
        else None); and a note where the record names no window and the lung window was used.
    Raises:
        CTError: a file that is missing or cannot be read; weights that are not there.
    Source: notebook 00.
    """
    from ctutils.backbones import restore_model

    recorded = run.record["data"].get("window")
    window = (recorded["level"], recorded["width"]) if recorded else LUNG_WINDOW
    rows, pictures = [], []
    for path in paths:
        for row, grey in _read_any(Path(path), run.plan.size, window):
            if row["window"] and not recorded:
                row["note"] = "the run's record names no window: read with the lung window"
            rows.append(row)
            pictures.append(grey)
    spec, model = registry.get_spec(run.plan.backbone), restore_model(run, weights)
    for start in range(0, len(pictures), BATCH):
        grey = torch.from_numpy(np.stack(pictures[start : start + BATCH]))[:, None]  # (B, 1, H, W)
        probs = torch.softmax(model(normalise(grey, spec.mean, spec.std)), 1).numpy()
        for row, values in zip(rows[start : start + BATCH], probs, strict=True):
            row["class"] = run.classes[int(values.argmax())]
            row["probabilities"] = {c: round(float(p), 6) for c, p in zip(run.classes, values, strict=True)}
    return rows


def _read_any(path: Path, size: int, window: tuple[float, float]) -> list[tuple[dict, np.ndarray]]:
    """Read a picture, or each frame of a DICOM file, as uint8 (size, size), with the begin of its row."""
    if not path.is_file():
        raise CTError(f"no file '{path}'", "a picture or a DICOM file", "check the path")
    try:
        return [(_row(str(path), None), read_small(path, size))]
    except UnidentifiedImageError:  # no picture: DICOM, or nothing that can be read
        frames = dicom_to_uint8(path, window)
    except Exception as error:  # whatever a decoder raises is this file's fault
        reason = str(error) or type(error).__name__
        raise CTError(f"'{path}', which cannot be read ({reason})", "a whole picture", "replace the file") from error
    small = [np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BILINEAR)) for f in frames]
    names = [str(path)] if len(small) == 1 else [f"{path} frame {k}" for k in range(1, len(small) + 1)]
    return [(_row(name, list(window)), grey) for name, grey in zip(names, small, strict=True)]


def _row(image: str, window: list[float] | None) -> dict:
    return {"image": image, "class": "", "probabilities": {}, "window": window}
