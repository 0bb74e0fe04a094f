"""Classify new pictures and DICOM files with the model of a run, and say which are unlike anything it learned from."""

import dataclasses
import glob
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ctutils import metrics, registry
from ctutils.base import CTError
from ctutils.data import normalise
from ctutils.dicom import DICOM_SUFFIXES, is_dicom, read_dicom
from ctutils.explain import grad_cam
from ctutils.people.reference import Reference, look
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
    from ctutils.config import Settings
    from ctutils.runs import Run

BATCH = 16


@dataclasses.dataclass(eq=False)
class Prediction:
    """What the model of a run says of one slice.

    Attributes:
        image: the file's name, with the frame where it has several.
        grey: what the network was given, uint8 (S, S).
        window: level and width in HU, where HU were windowed; note: what a user should know of the reading.
        probabilities: (C,), as the network gives them; calibrated: the same with the run's temperature.
        heat: Grad-CAM of the predicted class, float32 (S, S) in [0, 1], if it was asked for.
        distance: to the training slices, in units of the limit, see `Reference`; None where it is not known.
        similar: rows of the most similar training slices in the reference, the nearest first.
    """

    image: str
    grey: np.ndarray
    window: tuple[float, float] | None
    note: str
    probabilities: np.ndarray | None = None
    calibrated: np.ndarray | None = None
    heat: np.ndarray | None = None
    distance: float | None = None
    similar: Sequence[int] = ()

    @property
    def label(self) -> int:
        """The predicted class's number."""
        return int(self.probabilities.argmax())

    @property
    def unlike(self) -> bool | None:
        """Whether the slice is unlike anything trained on; None where it is not known."""
        return None if self.distance is None else self.distance > 1

    def to_json(self, classes: Sequence[str]) -> dict:
        """Return image, class, confidence (calibrated), probabilities {class: number}, window, unlike, distance."""
        row = {"image": self.image, "class": classes[self.label]}
        row["confidence"] = round(float(self.calibrated[self.label]), 6)
        row["probabilities"] = {c: round(float(p), 6) for c, p in zip(classes, self.probabilities, strict=True)}
        row |= {"window": list(self.window) if self.window else None, "unlike": self.unlike}
        row["distance"] = None if self.distance is None else round(self.distance, 4)
        return row | ({"note": self.note} if self.note else {})


class Predictor:
    """The model of a run, loaded once: pictures in, predictions out.

    Args:
        run: a record with its weights.
        weights: where the backbone's weights are, as for `build_model`.
        reference: what is known of the training slices; without it nothing is said of distances.
    Raises:
        CTError: weights that are not there.
    """

    def __init__(self, run: "Run", weights: str = "auto", reference: Reference | None = None):
        from ctutils.backbones import restore_model

        self.run, self.reference = run, reference
        self.spec, self.model = registry.get_spec(run.plan.backbone), restore_model(run, weights)
        self.temperature = temperature(run)

    def read(self, name: str, content: bytes) -> list[Prediction]:
        """Read a picture, or each frame of a DICOM file, as the slices of the run's training data were read.

        HU are shown in their window, deep pictures with their depth.

        Raises:
            BadFile: it cannot be read as a slice.
        """
        data = self.run.record["data"]
        recorded, depth = data.get("window"), data.get("depth") or ""
        window = (recorded["level"], recorded["width"]) if recorded else LUNG_WINDOW
        unnamed = [] if recorded else ["the run's record names no window: read with the lung window"]

        def made(image: str, grey: Image.Image, window, notes: list[str]) -> Prediction:
            return Prediction(image, resize(grey, self.run.plan.size), window, "; ".join(notes))

        if is_dicom(content[:132], name) and not name.lower().endswith(IMAGE_SUFFIXES):
            frames = read_dicom(content, window)[0]
            names = [name] if len(frames) == 1 else [f"{name} frame {k}" for k in range(1, len(frames) + 1)]
            return [made(one, Image.fromarray(f), window, unnamed) for one, f in zip(names, frames, strict=True)]
        with open_picture(io.BytesIO(content)) as image:
            own, notes = "", []
            if image.mode in DEEP:
                own = depth or own_depth(np.asarray(image))
                notes = [f"read as {say_depth(own)}"] * (own != depth) + unnamed * (own == HU)
            elif depth:
                notes = [f"8 bits, where the run has learned from {say_depth(depth)}"]
            if (frames := getattr(image, "n_frames", 1)) > 1:
                notes.append(f"the first of {frames} frames")
            return [made(name, to_grey(image, own, window), window if own == HU else None, notes)]

    def predict(self, slices: Sequence[Prediction], *, heat: bool = False) -> None:
        """Fill in what the model says of slices that were read; `heat` asks for Grad-CAM, too."""
        for start in range(0, len(slices), BATCH):
            some = slices[start : start + BATCH]
            grey = np.stack([one.grey for one in some])
            probs, features, middle = look(self.model, grey, self.spec)
            calibrated = metrics.apply_temperature(np.log(probs.clip(1e-300)), self.temperature)
            for one, raw, scaled in zip(some, probs, calibrated, strict=True):
                one.probabilities, one.calibrated = raw, scaled
            if self.reference is not None:
                measured = zip(self.reference.distance(middle), self.reference.similar(features), strict=True)
                for one, (distance, rows) in zip(some, measured, strict=True):
                    one.distance, one.similar = float(distance), rows
            if heat:
                images = normalise(torch.from_numpy(grey)[:, None], self.spec.mean, self.spec.std)
                for one, warm in zip(some, grad_cam(self.model, images, layer=self.spec.name), strict=True):
                    one.heat = warm

    def predict_files(self, paths: Sequence[str | Path], *, heat: bool = False) -> tuple[list[Prediction], dict]:
        """Read and classify files.

        Args:
            paths: PNG, JPEG, ... or DICOM files; a DICOM file of several frames gives a prediction a frame.
            heat: with Grad-CAM.
        Returns:
            the predictions, and {path: why} of the files that cannot be read as slices.
        """
        return self.predict_contents([(str(path), partial(read_file, path)) for path in paths], heat=heat)

    def predict_contents(
        self, files: Sequence[tuple[str, Callable[[], bytes]]], *, heat: bool = False
    ) -> tuple[list[Prediction], dict]:
        """Do what `predict_files` does, of names and functions that give the bytes."""
        slices, failed = [], {}
        with quiet():
            for name, read in files:
                try:
                    slices += self.read(name, read())
                except BadFile as error:
                    failed[name] = str(error)
        self.predict(slices, heat=heat)
        return slices, failed


def temperature(run: "Run") -> float:
    """Return the temperature that calibrates a run's probabilities, from its validation slices; 1 leaves them."""
    y_true, y_score = run.y_true("val"), run.y_score("val")
    if (y_score.argmax(1) == y_true).all():  # no error to learn from
        return 1.0
    return metrics.fit_temperature(y_true, np.log(y_score.clip(1e-12)))


def find_run(name: str | Path, settings: "Settings") -> Path:
    """Return the folder of a run record: a path as it is, or a name in the folders where records are written.

    Raises:
        CTError: no such record, or the name stands in several folders; the text lists them.
    """
    path = Path(name)
    if path.exists() or len(path.parts) != 1:
        return path
    if (own := settings.runs_dir / path).is_dir():
        return own
    records = sorted(file.parent for file in settings.runs_dir.parent.glob("**/run.json"))
    if len(found := [folder for folder in records if folder.name == path.name]) == 1:
        return found[0]
    what = f"{len(found)} run records" if found else "no run record"
    others = ", ".join(str(folder) for folder in (found or records)[:5]) or "none yet: train one first"
    raise CTError(f"{what} '{name}'", "the folder of a run record, or its name", f"give one of: {others}")


def find_files(given: Sequence[str | Path]) -> list[Path]:
    """Return the files that names stand for: a file itself, a folder's pictures and DICOM files, or a glob's matches.

    Raises:
        CTError: nothing to classify.
    """
    found: list[Path] = []
    for name in map(Path, given):
        if name.is_dir():
            found += sorted(path for path in name.rglob("*") if _is_slice(path.relative_to(name), path))
        elif re.search(r"[*?\[]", str(name)) and not name.exists():  # a shell that does not do it, as on Windows
            found += [path for path in map(Path, sorted(glob.glob(str(name), recursive=True))) if path.is_file()]
        else:
            found.append(name)
    if not found:
        names = ", ".join(f"'{name}'" for name in given)
        raise CTError(f"no pictures or DICOM files in {names}", "a file, a folder or a pattern", "check the name")
    return list(dict.fromkeys(found))


def _is_slice(inside: Path, path: Path) -> bool:
    """Say whether a file below a folder is taken: by its suffix, or without one by what it begins with."""
    if any(part.startswith(".") for part in inside.parts) or not path.is_file():
        return False
    if path.suffix.lower() in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES):
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with open(path, "rb") as file:
        return is_dicom(file.read(132), "")
