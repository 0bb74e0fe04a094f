"""The synthetic data set: slices by number, and a whole folder of them."""

import contextlib
import csv
import functools
import hashlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from ctutils.base import CTError, atomic_path, file_sha256, progress, read_json, write_json
from ctutils.phantom.acquisition import LUNG_WINDOW, Scanner, acquire
from ctutils.phantom.anatomy import Patient, draw_anatomy
from ctutils.phantom.findings import add_confounders, add_finding
from ctutils.phantom.shapes import Grid, window_of

CLASSES = ("ILD", "Lung_Cancer", "Normal", "pneumonia", "pneumothorax")
SPLITS = ("train", "val", "test")
GENERATOR_VERSION = "1.1"
PNG_LEVEL = 3  # smaller files here than 6, in less than half the time
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
        *values, box = astuple(self)
        return dict(zip(FIELDS, (*values, *(box or ("", "", "", ""))), strict=True))


def class_counts(total: int, balanced: bool = False) -> dict[str, int]:
    """Share `total` slices over the classes as the original data set does, or evenly.

    Example: `class_counts(1000)` is `{'ILD': 125, 'Lung_Cancer': 125, 'Normal': 500, ...}`.
    """
    weights = np.array([1, 1, 1, 1, 1] if balanced else [1, 1, 4, 1, 1])
    counts = total * weights // weights.sum()
    order = [2, 0, 1, 3, 4]  # what is left goes to Normal first: 8001 -> 1000, 1000, 4001, 1000, 1000
    counts[order[: total - counts.sum()]] += 1
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
    _check(size, shortcut, split, label, finding)
    number = patient_of(index)
    key = [seed, SPLITS.index(split), CLASSES.index(label)]
    place, body, other, sick, scan = np.random.default_rng([*key, index, 2]).spawn(5)

    patient = Patient.draw(np.random.default_rng([*key, number, 1]))
    level = float(np.clip(place.beta(1.7, 1.5), 0.03, 0.97))
    field_of_view = 2 * patient.half_width * place.uniform(0.95, 1.14)
    angle, shift = place.normal(0, 0.045), place.normal(0, (0.022, 0.03)) * field_of_view
    grid = Grid(size, field_of_view / size, angle, tuple(shift.tolist()), place.uniform(1.2, 5.0))
    severity = float(place.beta(1.6, 1.35))
    scanner = Scanner.draw(scan, SHARPNESS[label] if shortcut == "sharpness" else None)

    scene = draw_anatomy(grid, patient, level, body)
    add_confounders(scene, other)
    drawn = add_finding(scene, finding, severity, sick)
    image = acquire(scene.hu, grid, scene.body, scanner, scan, window)
    found, name = window_of(drawn["mask"]), f"{split}-{label}-{number:05d}"
    box = found and (found[1].start, found[0].start, found[1].stop, found[0].stop)
    sign = drawn["finding"], 0.0 if finding in ("Normal", "none") else round(severity, 3), drawn["side"]
    return image, SliceRecord(_path(split, label, index), split, label, name, round(level, 3), *sign, box)


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
    if workers is not None and workers < 1:
        raise CTError(f"{workers} workers", "1 or more", "leave the number out to use all cores")
    _check(size, shortcut)
    arguments = {**totals, "seed": seed, "size": size, "shortcut": shortcut, "balanced": balanced}
    mark = {"generator_version": GENERATOR_VERSION, "arguments": arguments}
    started, done, table = out / "unfinished.json", out / "dataset.json", out / "findings.csv"
    for found in [read_json(file) for file in (done, started) if file.exists()]:
        if found | mark != found:
            raise CTError(
                f"another data set in '{out}' ({json.dumps({k: found.get(k) for k in ('name', *mark)})})",
                f"an empty folder, or the same {json.dumps(mark)}",
                "choose another folder, or delete this one",
            )
    counts = {split: class_counts(n, balanced) for split, n in totals.items() if n}
    jobs = [(s, c, i) for s, per_class in counts.items() for c, n in per_class.items() for i in range(n)]
    if done.exists() and all((out / _path(*job)).exists() for job in jobs):
        return out
    if out.exists() and any(out.iterdir()) and not (started.exists() or done.exists()):
        raise CTError(f"files in '{out}' that are no synthetic data set", "an empty folder", "choose another folder")
    write_json(started, mark)
    done.unlink(missing_ok=True)
    for path in out.glob("*/*/.tmp-*"):  # left by a process that was killed
        path.unlink(missing_ok=True)
    for folder in [out / split / name for split in counts for name in CLASSES]:
        folder.mkdir(parents=True, exist_ok=True)

    # The table of findings is the log of a run: a row is added when its picture is there, put in order at the end.
    rows = {row["path"]: row for row in _read_table(table) if _decodes(out / row["path"])}
    _write_table(table, rows.values())
    left = [job for job in jobs if _path(*job) not in rows]
    make = functools.partial(_write_slice, out, seed, size, shortcut)
    with open(table, "a", newline="", encoding="utf-8") as file, _mapped(make, left, workers) as made:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        shown = {"total": len(jobs), "initial": len(rows), "desc": "synthetic slices", "unit": "slice"}
        for row in progress(made, **shown) if show_progress else made:
            rows[row["path"]] = row
            writer.writerow(row)
            file.flush()
    rows = [rows[_path(*job)] for job in jobs]
    _write_table(table, rows)
    listing = "".join(f"{file_sha256(out / row['path'])}  {row['path']}\n" for row in rows)
    meta = {
        "name": f"synthetic-{seed}" + (f"-{shortcut}" if shortcut else ""),
        "kind": "synthetic",
        "classes": list(CLASSES),
        **mark,
        "seed": seed,
        "shortcut": shortcut,
        "counts": counts,
        "window": {"level": LUNG_WINDOW[0], "width": LUNG_WINDOW[1], "unit": "HU"},
        "list_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "note": "Procedural pictures, no patients. Not for clinical use.",
    }
    write_json(done, meta)
    started.unlink(missing_ok=True)
    return out


@contextlib.contextmanager
def _mapped(make, jobs: list, workers: int | None):
    """Yield the iterator of make(job) in the order of the jobs, by several processes where that pays."""
    most = 61 if sys.platform == "win32" else len(jobs)  # Windows waits for no more processes at once
    workers = min(workers or os.cpu_count() or 1, max(1, len(jobs) // 4), most)
    if workers == 1:
        yield map(make, jobs)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield pool.map(make, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only what is begun is finished


def _write_slice(out: Path, seed: int, size: int, shortcut: str | None, job: tuple) -> dict:
    """Make one slice, write its picture and return its row of findings.csv; works in a process of its own."""
    image, record = make_slice(seed, *job, size=size, shortcut=shortcut)
    with atomic_path(out / record.path) as temporary:
        Image.fromarray(image).convert("RGB").save(temporary, compress_level=PNG_LEVEL)
    return record.row()


def _read_table(path: Path) -> list[dict]:
    """Read the rows of findings.csv, none where there is no file; a line cut off in the middle is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _write_table(path: Path, rows) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _decodes(path: Path) -> bool:
    """Tell whether a picture is there and whole."""
    with contextlib.suppress(OSError, SyntaxError), Image.open(path) as image:
        image.load()
        return True
    return False


def _path(split: str, label: str, index: int) -> str:
    return f"{split}/{label}/ChestCT_{label}_{index + 1:08d}.png"


def _check(size: int, shortcut: str | None, split: str = "train", label: str = "Normal", finding: str = "none"):
    if not 32 <= size <= 2048:
        raise CTError(f"a size of {size}", "32 to 2048 pixels", "choose another size")
    rules = {"shortcut": (shortcut, (None, "sharpness")), "split": (split, SPLITS), "class": (label, CLASSES)}
    for what, (value, allowed) in {**rules, "finding": (finding, (*CLASSES, "none"))}.items():
        if value not in allowed:
            names = ", ".join(str(a) for a in allowed)
            raise CTError(f"{what} '{value}'", f"one of {names}", f"choose one of these (spelling counts) for {what}")
