"""The synthetic data set: slices by number, and a whole folder of them."""

import contextlib
import csv
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from ctutils.base import CTError, atomic_path, file_sha256, progress, read_json, write_json
from ctutils.phantom.acquisition import LUNG_WINDOW, Scanner, acquire
from ctutils.phantom.anatomy import Patient, draw_anatomy
from ctutils.phantom.findings import add_confounders, add_finding
from ctutils.phantom.shapes import Grid

CLASSES = ("ILD", "Lung_Cancer", "Normal", "pneumonia", "pneumothorax")
SPLITS = ("train", "val", "test")
GENERATOR_VERSION = "1.0"
PNG_LEVEL = 6
SHORTCUTS = ("sharpness",)
PER_PATIENT = (3, 1, 4, 2)  # slices of the first, second ... patient of a class, then again from the start
# The original set's Normal slices are much sharper than its ILD slices; the trap does the same.
SHARPNESS = {"ILD": 0.0, "Lung_Cancer": 0.45, "Normal": 1.0, "pneumonia": 0.25, "pneumothorax": 0.7}
FIELDS = ("path", "split", "class", "patient", "level", "finding", "severity", "side", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class SliceRecord:
    """A row of findings.csv. The box is x0 <= x < x1, y0 <= y < y1 in pixels, None without a finding."""

    path: str
    split: str
    label: str
    patient: str
    level: float
    finding: str
    severity: float
    side: str
    box: tuple[int, int, int, int] | None

    def row(self) -> dict:
        """Return the record as a row of findings.csv; an absent box is four empty cells."""
        x0, y0, x1, y1 = self.box or ("", "", "", "")
        values = (
            self.path,
            self.split,
            self.label,
            self.patient,
            self.level,
            self.finding,
            self.severity,
            self.side,
        )
        return dict(zip(FIELDS, (*values, x0, y0, x1, y1), strict=True))


def class_counts(total: int, balanced: bool = False) -> dict[str, int]:
    """Share `total` slices over the classes as the original data set does, or evenly.

    Example: `class_counts(1000)` is `{'ILD': 125, 'Lung_Cancer': 125, 'Normal': 500, ...}`.
    """
    weights = np.array([1, 1, 1, 1, 1] if balanced else [1, 1, 4, 1, 1])
    counts = total * weights // weights.sum()
    rest = int(total - counts.sum())
    order = [2, 0, 1, 3, 4]  # what is left goes to Normal first: 8001 -> 1000, 1000, 4001, 1000, 1000
    for k in range(rest):
        counts[order[k % 5]] += 1
    return {name: int(n) for name, n in zip(CLASSES, counts, strict=True)}


def patient_of(index: int) -> int:
    """Return the number of the patient that slice `index` of a class belongs to."""
    block, rest = divmod(index, sum(PER_PATIENT))
    return block * len(PER_PATIENT) + int(np.searchsorted(np.cumsum(PER_PATIENT), rest, side="right"))


def make_slice(
    seed: int,
    split: str,
    label: str,
    index: int,
    *,
    finding: str | None = None,
    size: int = 512,
    shortcut: str | None = None,
    window: tuple[float, float] = LUNG_WINDOW,
) -> tuple[np.ndarray, SliceRecord]:
    """Make one slice; a function of its arguments alone.

    Args:
        seed: of the data set.
        split: train, val or test.
        label: the class whose slice this is.
        index: number of the slice in its class and split, from 0.
        finding: draw this class's finding instead, or none with "none": same body, same scanner.
        size: pixels a side; smaller is quicker and shows the same patient coarsely.
        shortcut: "sharpness" makes the scanner's kernel depend on the label.
        window: level and width in HU; the data set is written in the lung window.
    Returns:
        uint8 (size, size) and the record of what was drawn.
    Raises:
        CTError: an unknown split, class, finding, shortcut or size.
    """
    finding = label if finding is None else finding
    _known("class", label, CLASSES)
    _known("finding", finding, (*CLASSES, "none"))
    _known("split", split, SPLITS)
    _known("shortcut", shortcut, (None, *SHORTCUTS))
    if not 32 <= size <= 2048:
        raise CTError(f"a size of {size}", "32 to 2048 pixels", "choose another size")
    patient_number = patient_of(index)
    key = [seed, SPLITS.index(split), CLASSES.index(label)]
    patient_rng = np.random.default_rng([*key, patient_number, 1])
    parts = np.random.SeedSequence([*key, index, 2]).spawn(5)
    place, body, other, sick, scan = (np.random.default_rng(s) for s in parts)

    patient = Patient.draw(patient_rng)
    level = float(np.clip(place.beta(1.7, 1.5), 0.03, 0.97))
    field_of_view = 2 * patient.half_width * place.uniform(0.95, 1.14)
    grid = Grid(
        size=size,
        pixel=field_of_view / size,
        angle=place.normal(0, 0.045),
        shift=(place.normal(0, 0.022) * field_of_view, place.normal(0, 0.03) * field_of_view),
        thickness=place.uniform(1.2, 5.0),
    )
    severity = float(place.beta(1.6, 1.35))
    scanner = Scanner.draw(scan, SHARPNESS[label] if shortcut == "sharpness" else None)

    scene = draw_anatomy(grid, patient, level, body)
    add_confounders(scene, other)
    drawn = add_finding(scene, finding, severity, sick)
    image = acquire(scene.hu, grid, scene.body, scanner, scan, window)
    nothing = finding in ("Normal", "none")
    record = SliceRecord(
        path=_path(split, label, index),
        split=split,
        label=label,
        patient=f"{split}-{label}-{patient_number:05d}",
        level=round(level, 3),
        finding=drawn["finding"],
        severity=0.0 if nothing else round(severity, 3),
        side=drawn["side"],
        box=_box(drawn["mask"]),
    )
    return image, record


def write_dataset(
    out: str | Path,
    *,
    train: int,
    val: int,
    test: int = 0,
    seed: int = 0,
    workers: int | None = None,
    size: int = 512,
    shortcut: str | None = None,
    balanced: bool = False,
    show_progress: bool = True,
) -> Path:
    """Write a synthetic data set, or finish one that was interrupted; a complete one is left as it is.

    The bytes depend on the arguments and the library versions, never on the number of workers.

    Args:
        out: folder; gets train/, val/, test/ (each with the class folders), findings.csv and dataset.json.
        train, val, test: slices a split, shared over the classes by `class_counts`.
        seed: another seed, other patients.
        workers: processes; all cores by default.
        size: pixels a side.
        shortcut: "sharpness" plants the trap of notebook 01.
        balanced: as many slices of every class.
        show_progress: a progress bar.
    Returns:
        the folder.
    Raises:
        CTError: negative counts, nothing to write, a bad size or shortcut, or a folder with another data set.
    """
    out = Path(out)
    totals = {"train": train, "val": val, "test": test}
    if min(totals.values()) < 0 or sum(totals.values()) == 0:
        raise CTError(f"counts {totals}", "0 or more slices a split, and some", "give --train and --val")
    if not 32 <= size <= 2048:
        raise CTError(f"a size of {size}", "32 to 2048 pixels", "choose another size")
    _known("shortcut", shortcut, (None, *SHORTCUTS))
    if workers is not None and workers < 1:
        raise CTError(f"{workers} workers", "1 or more", "leave the number out to use all cores")
    arguments = {**totals, "seed": seed, "size": size, "shortcut": shortcut, "balanced": balanced}
    mark = {"generator_version": GENERATOR_VERSION, "arguments": arguments}
    started, done = out / "unfinished.jsonl", out / "dataset.json"
    for file in (done, started):
        if file.exists():
            found = read_json(file) if file == done else _journal(file)[0]
            if {k: found.get(k) for k in mark} != mark:
                raise CTError(
                    f"another data set in '{out}' ({json.dumps(found.get('arguments', found.get('name')))})",
                    f"an empty folder, or the same arguments {json.dumps(arguments)}",
                    "choose another folder, or delete this one",
                )
    counts = {split: class_counts(n, balanced) for split, n in totals.items() if n}
    jobs = [(s, c, i) for s, per_class in counts.items() for c, n in per_class.items() for i in range(n)]
    if done.exists() and all((out / _path(*job)).exists() for job in jobs):
        return out
    if not started.exists() and out.exists() and any(out.iterdir()) and not done.exists():
        raise CTError(f"files in '{out}' that are no synthetic data set", "an empty folder", "choose another folder")
    done.unlink(missing_ok=True)
    for split, per_class in counts.items():
        for name in per_class:
            (out / split / name).mkdir(parents=True, exist_ok=True)
    rows = _run(out, started, mark, jobs, workers, show_progress)

    rows = [rows[job] for job in jobs]
    with atomic_path(out / "findings.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row, _ in rows)
    listing = "".join(f"{sha}  {row['path']}\n" for row, sha in rows)
    write_json(
        done,
        {
            "name": f"synthetic-{seed}" + (f"-{shortcut}" if shortcut else ""),
            "kind": "synthetic",
            "classes": list(CLASSES),
            **mark,
            "seed": seed,
            "shortcut": shortcut,
            "counts": counts,
            "list_sha256": hashlib.sha256(listing.encode()).hexdigest(),
            "note": "Procedural pictures, no patients. Not for clinical use.",
        },
    )
    started.unlink(missing_ok=True)
    return out


def _run(out, journal, mark, jobs, workers, show_progress) -> dict:
    """Make every slice that is not there yet and return {(split, class, index): (row, sha256)}.

    The journal holds the arguments and then a line for each finished slice, so that a second call goes on.
    """
    rows = {}
    for path in out.glob("*/*/.tmp-*"):  # left by a process that was killed
        path.unlink(missing_ok=True)
    if journal.exists():
        for split, label, index, row, sha in _journal(journal)[1]:
            path = out / _path(split, label, index)
            if path.exists() and file_sha256(path) == sha:
                rows[split, label, index] = row, sha
    lines = [mark, *([*job, *kept] for job, kept in rows.items())]
    with atomic_path(journal) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    left = [job for job in jobs if job not in rows]
    bar = progress(total=len(jobs), initial=len(rows), desc="synthetic slices", unit="slice") if show_progress else None
    arguments = mark["arguments"]
    task = (str(out), arguments["seed"], arguments["size"], arguments["shortcut"])
    workers = min(workers or os.cpu_count() or 1, max(1, len(left) // 4))
    parcel = max(1, min(16, len(left) // (4 * workers)))
    parcels = [left[k : k + parcel] for k in range(0, len(left), parcel)]
    with open(journal, "a", encoding="utf-8") as file:

        def take(result):
            rows.update(result)
            file.writelines(json.dumps([*job, *kept]) + "\n" for job, kept in result.items())
            file.flush()
            if bar is not None:
                bar.update(len(result))

        if workers == 1:
            for some in parcels:
                take(_make_parcel(task, some))
        else:
            with _one_thread_each(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                try:
                    for future in as_completed([pool.submit(_make_parcel, task, some) for some in parcels]):
                        take(future.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    if bar is not None:
        bar.close()
    return rows


@contextlib.contextmanager
def _one_thread_each():
    """Let worker processes start with one BLAS thread each: two cores, not four quarrelling threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))  # read by the workers when they load numpy
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _make_parcel(task: tuple, jobs: list) -> dict:
    """Make some slices in a worker process."""
    out, seed, size, shortcut = task
    result = {}
    for split, label, index in jobs:
        image, record = make_slice(seed, split, label, index, size=size, shortcut=shortcut)
        with atomic_path(Path(out) / record.path) as temporary:
            Image.fromarray(np.repeat(image[:, :, None], 3, axis=2)).save(temporary, compress_level=PNG_LEVEL)
            sha = file_sha256(temporary)
        result[split, label, index] = record.row(), sha
    return result


def _journal(path: Path) -> tuple[dict, list]:
    """Read the journal of an interrupted run; a line cut off in the middle ends it."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not lines:
        return {}, []
    return lines[0], lines[1:]


def _path(split: str, label: str, index: int) -> str:
    return f"{split}/{label}/ChestCT_{label}_{index + 1:08d}.png"


def _box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return the smallest x0, y0, x1, y1 around a mask, None when it is empty."""
    if not mask.any():
        return None
    rows, cols = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def _known(what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        names = ", ".join(str(a) for a in allowed)
        raise CTError(f"{what} '{value}'", f"one of {names}", f"choose one of these (spelling counts) for {what}")
