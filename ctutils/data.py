"""A folder of slices: find splits and classes, check every file, decode once, hand out batches."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctutils.base import CTError, atomic_path, progress, read_json, write_json
from ctutils.config import Settings, cache_dir
from ctutils.facts import file_facts
from ctutils.pictures import (
    DEPTHS,
    HU,
    IMAGE_SUFFIXES,
    LUNG_WINDOW,
    BadFile,
    quiet,
    read_grey,
    resize,
    say_depth,
)
from ctutils.registry import IMAGENET_MEAN, IMAGENET_STD

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {split: split for split in SPLITS}
SPLIT_NAMES |= {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
PART = 10_000  # slices: what is made slice by slice is made in parts, and what is done stays
SHARE, SPLIT_SEED = 0.15, 0  # of val and of test, where they are drawn
PATH_COLUMNS = ("path", "file", "filename", "image")
PATIENT_COLUMNS = ("patient", "patient_id", "patientid", "subject")
# What tables and records cannot hold: control characters, line separators, bytes that are not UTF-8.
ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class SliceFolder:
    """A checked folder of slices.

    Attributes:
        root: the folder.
        name: its name in tables and records.
        classes: sorted class names; a label is an index into them.
        slices: one row a file: path (relative, with /), split, class, label, width, height, mode, frames, depth (of
            more than 8 bits, else ""), warned (what the decoder warned of), bytes, sha256, problem (empty when the
            file's header is readable), patient (empty where unknown).
        meta: content of `dataset.json`, or {}.
        fingerprint: SHA-256 over every path and content; it changes when any file does.
        notes: what a user should know of how the folder was read: one sentence each.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    slices: pd.DataFrame
    meta: dict[str, Any]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`synthetic`, `real`, or `unknown` when no dataset.json says."""
        return _text(self.meta.get("kind")) or "unknown"

    @property
    def shortcut(self) -> str | None:
        """The shortcut that was planted into a synthetic set, or None."""
        match self.meta:
            case {"shortcut": str(name)} | {"arguments": {"shortcut": str(name)}}:
                return _text(name) or None
        return None

    @functools.cached_property
    def depth(self) -> str:
        """How pictures of more than 8 bits are read (see `pictures.own_depth`); "" where there are none."""
        return max(self.slices["depth"])

    @property
    def window(self) -> dict[str, Any] | None:
        """Window of the pictures' greys, {"level", "width", "unit"}; None when it is not known."""
        match self.meta.get("window"):
            case {"level": int(level) | float(level), "width": int(width) | float(width), "unit": str(unit)}:
                if abs(level) < 1e6 and 0 < width < 1e6 and _text(unit):
                    return {"level": level, "width": width, "unit": unit}
        return dict(zip(("level", "width", "unit"), (*LUNG_WINDOW, HU), strict=True)) if self.depth == HU else None

    @property
    def labels(self) -> np.ndarray:
        """Labels int64 (N,), one a row of `slices`."""
        return self.slices["label"].to_numpy(np.int64, copy=True)  # pandas gives a read-only view

    def rows(self, split: str) -> np.ndarray:
        """Return the row numbers int64 (n,) of one split."""
        return np.flatnonzero((self.slices["split"] == split).to_numpy())

    def counts(self) -> pd.DataFrame:
        """Return the number of slices: one row a class, one column a split."""
        table = pd.crosstab(self.slices["class"], self.slices["split"])
        return table.reindex(index=list(self.classes), columns=[s for s in SPLITS if s in table], fill_value=0)

    def read_grey(self, row: int):
        """Decode the slice of a row to 8-bit grey, as its data set is read; raises `BadFile`."""
        path, depth = self.root / self.slices["path"].iloc[row], self.slices["depth"].iloc[row]
        if not depth:
            with contextlib.suppress(ImportError):
                from ctutils.png import read_grey_png

                if (grey := read_grey_png(path)) is not None:
                    return grey
        window = self.window
        return read_grey(path, depth, (window["level"], window["width"]) if window else LUNG_WINDOW)


def _text(value: object) -> str:
    """Return a text of dataset.json that a record can hold, or ""."""
    return value if isinstance(value, str) and not ODD.search(value) else ""


def load_folder(root: str | Path, *, strict: bool = True, cache: Path | None = None) -> SliceFolder:
    """Find splits, classes and slices, and read every file's header and content hash.

    Args:
        root: `<root>/{train[,val][,test]}/<class>/*.png`; split folders also as Training, valid, Validation, ...
            Without val, 15 % of train become val, and another 15 % test where there is none: see `notes`.
        strict: raise when files or patients.csv cannot be read; else `problem` says why and `patient` is empty.
        cache: folder for the index of known files (default `data/cache`).
    Raises:
        CTError: no folder, no split, no images, classes that disagree, odd names, with `strict` unreadable files.
        OSError: a folder cannot be listed.
    Source: notebook 01.
    """
    root = Path(root)
    classes, slices, unused = _find_slices(root)
    own_name = root.resolve().name
    odd = [name for name in (own_name, *slices["path"]) if ODD.search(name)]
    if odd:
        mend = "rename it, or unpack the archive again (a Korean one with `unzip -O cp949`)"
        raise CTError(f"the name '{odd[0]}' in '{root}'", "names in UTF-8 without control characters", mend)
    slices = slices.join(file_facts(root, slices["path"].tolist(), cache or cache_dir()))
    slices["patient"] = ""
    try:
        slices["patient"] = read_patients(root, slices["path"])[0]
    except CTError:
        if strict:
            raise
    try:
        meta = read_json(root / "dataset.json")
    except CTError:
        meta = {}
    notes = [f"{len(unused)} file(s) in class folders not used, such as '{unused[0]}'"] if unused else []
    notes += describe(slices, str(meta.get("depth", "")))
    if shared := (slices[slices["patient"] != ""].groupby("patient")["split"].nunique() > 1).sum():
        notes.append(f"{shared} patient(s) have slices in two splits or more: scores will be too good")
    digest = hashlib.sha256()
    for row in slices[["path", "split", "class", "sha256"]].itertuples(index=False):
        digest.update(unicodedata.normalize("NFC", "\0".join(row)).encode() + b"\n")
    folder = SliceFolder(root, _text(meta.get("name")) or own_name, classes, slices, meta, "", tuple(notes))
    if folder.depth:
        digest.update(f"{folder.depth} {folder.window}".encode())
    folder = dataclasses.replace(folder, fingerprint=digest.hexdigest())
    if strict and (slices["problem"] != "").any():
        _refuse_unreadable(folder)
    return folder if len(folder.rows("val")) else _with_val_split(folder, cache or cache_dir())


def _find_slices(root: Path) -> tuple[tuple[str, ...], pd.DataFrame, list[str]]:
    """Return the sorted class names, the same in every split, the table of path, split, class and label, and the rest.

    Class names are compared as one reads them: macOS stores the parts of a Korean syllable, others the syllable.
    """
    if not root.is_dir():
        mend = "check the path in CT_DATA or on the command line; `python -m ctutils synth OUT` makes a synthetic set"
        raise CTError(f"no folder '{root}'", "a data set folder <root>/{train,val,test}/<class>/*.png", mend)
    classes: dict[str, dict[str, list[Path]]] = {}
    folders = {}
    for split in SPLITS:
        found = [path for path in _subfolders(root) if SPLIT_NAMES.get(path.name.lower()) == split]
        others = [path.name for path in _subfolders(root) if path.name.lower() not in SPLIT_NAMES]
        if len(found) > 1 or (not found and (split == "train" or (split == "val" and others))):
            names = " and ".join(f"'{path.name}'" for path in found) or f"no '{split}' folder"
            names += f" (but '{others[0]}')" if others and not found else ""
            mend = "rename or move the folders; `python -m ctutils import SRC OUT` brings other layouts into this one"
            raise CTError(f"{names} in '{root}'", "one folder train (or Training) and one val (or valid, ...)", mend)
        if found:
            folders[split], classes[split] = found[0], {}
            for path in _subfolders(found[0]):
                classes[split].setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
    names, rows, unused = sorted(set().union(*classes.values())), [], []
    if are_patients(names):
        found = f"{len(names)} folders that look like patients ({', '.join(names[:3])}, ...), not classes, in '{root}'"
        raise CTError(found, "one folder a class", "write labels.csv (path,class), and give the folder to import")
    for split, folder in folders.items():
        missing = [name for name in names if name not in classes[split]]
        if missing or len(names) < 2:
            expected = "two classes or more, spelled alike in every split"
            mend = f"add or rename {missing}, or remove it everywhere" if missing else "add a class"
            raise CTError(f"classes {sorted(classes[split])} in '{folder}', in all {names}", expected, mend)
        for label, name in enumerate(names):
            found = [_find_pictures(root, path) for path in classes[split][name]]
            pictures, others = (sum(some, []) for some in zip(*found, strict=True))
            if not pictures:
                mend = "add slices (DICOM goes through `python -m ctutils import`), or remove the class everywhere"
                raise CTError(f"no images in '{folder / name}'", f"files ending in {', '.join(IMAGE_SUFFIXES)}", mend)
            rows += [(path, split, name, label) for path in pictures]
            unused += others
    return tuple(names), pd.DataFrame(rows, columns=["path", "split", "class", "label"]), unused


def are_patients(names: list[str]) -> bool:
    """Tell whether folders are named like patients, not like classes: case00, case01, ... or many with numbers."""
    word = r"(case|patient|pat|pt|subject|subj|sub|series|study|scan|환자|증례)[-_ .]*\w?\d+"
    numbered = sum(bool(re.search(r"\d", name)) for name in names)
    alike = len(names) > 1 and all(re.fullmatch(word, name, re.IGNORECASE) for name in names)
    return alike or (len(names) >= 10 and numbered >= 0.9 * len(names))


def _subfolders(folder: Path) -> list[Path]:
    # A link that leads nowhere is no file: it stays, and fails when it is listed.
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_file())


def _find_pictures(root: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the pictures below a class folder, and its other files, relative to `root`, sorted folder by folder.

    A link that leads nowhere counts as a picture, for the check to name. A link to a folder is not entered: one that
    leads back up would give every slice many times.
    """

    def fail(error: OSError):
        raise error

    found: tuple[list[str], list[str]] = ([], [])
    for here, _, names in os.walk(folder, onerror=fail):
        below = Path(here).relative_to(root).as_posix()
        for name in sorted(names):
            place = os.path.join(here, name)
            if not name.startswith(".") and (os.path.isfile(place) or not os.path.exists(place)):
                found[not name.lower().endswith(IMAGE_SUFFIXES)].append(f"{below}/{name}")
    return tuple(sorted(some, key=lambda path: path.split("/")) for some in found)


def describe(slices: pd.DataFrame, wanted: str = "") -> list[str]:
    """Decide how all pictures of more than 8 bits are read: as `wanted`, else as most of them ask for.

    Args:
        slices: `depth`, of each picture alone, becomes that of the set; `problem` says what does not fit it.
    Returns:
        what a user should know of the pictures: depth, files of several frames.
    """
    if slices.empty:
        return []
    several = int((slices["frames"] > 1).sum())
    notes = [f"{several} file(s) of several frames: only the first is read"] * bool(several)
    own = slices["depth"]
    deep, known = own != "", own.isin(DEPTHS)
    if not deep.any():
        return notes
    usual = wanted if wanted in DEPTHS else max(own[known], key=list(own[known]).count, default="16")
    for row in slices.index[deep & (own != usual)] if usual != wanted else ():
        depth = own[row]
        odd = f"{say_depth(depth)}, where most are {say_depth(usual)}" if depth in DEPTHS else depth.removeprefix("?")
        slices.loc[row, "problem"] = odd + ' (if it is right, say "depth" in dataset.json)'
    slices.loc[deep, "depth"] = usual
    return [*notes, f'{deep.sum()} picture(s) read as {say_depth(usual)}; "depth" in dataset.json changes that']


def _refuse_unreadable(folder: SliceFolder, problems: dict[str, str] | None = None) -> None:
    """Raise CTError that names what cannot be read, by fault; where headers failed, decode the others before."""
    if problems is None:
        problems = dict(zip(folder.slices["path"], folder.slices["problem"], strict=True))
        with quiet(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = [row for row, problem in enumerate(problems.values()) if not problem]
            for row, problem in zip(rows, pool.map(lambda row: _problem(folder, row), rows), strict=True):
                problems[folder.slices["path"].iloc[row]] = problem
    bad = {path: problem for path, problem in problems.items() if problem}
    faults: dict[str, list[str]] = {}
    for path, problem in bad.items():
        faults.setdefault(problem, []).append(f"'{path}'")
    shown = (
        f"{', '.join(paths[:20])}{f' and {len(paths) - 20} more' * (len(paths) > 20)} ({fault})"
        for fault, paths in faults.items()
    )
    mend = f'replace or remove them; `python -m ctutils check "{folder.root}"` lists all'
    found = f"{len(bad)} unreadable file(s) in '{folder.root}': {'; '.join(shown)}"
    raise CTError(found, "pictures of slices", mend, files=bad)


def _problem(folder: SliceFolder, row: int) -> str:
    try:
        folder.read_grey(row)
        return ""
    except BadFile as error:
        return str(error)


def read_table(content: bytes) -> pd.DataFrame:
    """Read a table as people save it: UTF-8, UTF-16 or cp949; comma, semicolon or tab; every cell a text.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp949")  # Excel's CSV in Korea
    header = text.strip().partition("\n")[0]
    return pd.read_csv(io.StringIO(text), sep=max(",;\t", key=header.count), dtype=str, keep_default_na=False)


def read_patients(root: Path, paths: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Return the patient of every path, str (N,), "" where unknown, and the table's paths that name no slice.

    Read from the first CSV file at the root, patients.csv and findings.csv before others, with a column of
    `PATH_COLUMNS` (as in `paths`, or a file name that occurs once) and one of `PATIENT_COLUMNS`, in any case.
    A spreadsheet's "12.0" is patient "12".

    Raises:
        CTError: patients.csv cannot be read or lacks a column.
    """
    own = [root / "patients.csv", root / "findings.csv"]
    paths = [unicodedata.normalize("NFC", path) for path in paths]
    for file in [*own, *sorted(set(root.glob("*.csv")) - set(own))]:
        try:
            table = read_table(file.read_bytes())
            lower = {name.strip().lower(): name for name in reversed(table.columns)}
            places = table[next(lower[name] for name in PATH_COLUMNS if name in lower)]
            patients = table[next(lower[name] for name in PATIENT_COLUMNS if name in lower)]
        except (ValueError, OSError, StopIteration) as error:  # pandas' parser errors are ValueErrors
            if file != own[0] or not os.path.lexists(file):
                continue
            why = str(error) or f"its columns are {', '.join(table)}"
            raise CTError(
                f"'{file}' ({why})", "a CSV with the columns path and patient", "mend or remove it"
            ) from error
        named = collections.Counter(path.rsplit("/", 1)[-1] for path in paths)
        full = {name: path for path in paths if named[name := path.rsplit("/", 1)[-1]] == 1} | {p: p for p in paths}
        known: dict[str, str] = {}
        for place, patient in zip(places, patients, strict=True):
            place = unicodedata.normalize("NFC", place.strip().replace("\\", "/").removeprefix("./"))
            patient = re.sub(r"^(\d+)\.0+$", r"\1", " ".join(patient.split()))
            known.setdefault(full.get(place, place), patient)
        return np.array([known.get(path, "") for path in paths]), sorted(known.keys() - full.keys())
    return np.full(len(paths), ""), []


def share_out(labels: list[str], groups: list, shares: dict[str, float], seed: int = SPLIT_SEED) -> list[str]:
    """Share rows out to splits, class by class, so that rows of one group stay together.

    The rarest class goes first, of a class the largest groups, each where most is lacking; no split stays without a
    class. A group may hold several classes: a patient with healthy and diseased slices.

    Args:
        labels: class of each row.
        groups: patient, content or file of each row.
        shares: share of each split; they sum to 1.
    Returns:
        the split of each row.
    Raises:
        CTError: a class has fewer groups than there are splits, or its groups are tied to others'.
    """
    counts = pd.crosstab(pd.Series(groups, name="group"), pd.Series(labels, name="label"))
    rng, split_of = np.random.default_rng(seed), {}
    drawn = {c: rng.permutation(np.array(sorted(counts.index[counts[c] > 0]), dtype=object)) for c in sorted(counts)}
    for label in sorted(drawn, key=lambda c: len(drawn[c])):
        sizes, members = counts[label], drawn[label]
        there = {split: [g for g in members if split_of.get(g) == split] for split in shares}
        left = sorted((group for group in members if group not in split_of), key=lambda group: -sizes[group])
        if len(members) < len(shares) or len(left) < sum(not some for some in there.values()):
            found = f"{len(members)} independent group(s) of slices of class '{label}' to share out"
            expected = f"{len(shares)}, one for each of {', '.join(shares)}; slices of one patient, and twins, are one"
            mend = "add slices of other patients, or say the splits: in split folders, or in labels.csv, column split"
            raise CTError(found, expected, mend)
        lacking = {split: share * sizes.sum() - sizes[there[split]].sum() for split, share in shares.items()}
        for at, group in enumerate(left):
            empty = [split for split in shares if not there[split]]
            split = max(empty if len(left) - at <= len(empty) else shares, key=lacking.get)
            split_of[group] = split
            there[split].append(group)
            lacking[split] -= sizes[group]
    return [split_of[group] for group in groups]


def _with_val_split(folder: SliceFolder, cache: Path) -> SliceFolder:
    """Return the folder with validation slices (and test slices, where there are none) drawn from its train split.

    Slices of one patient stay together where patients are known, else near twins do. The fingerprint covers the
    drawn splits, too.
    """
    slices, rows = folder.slices.copy(), folder.rows("train")
    part, shares = slices.iloc[rows], {"val": SHARE} | ({} if len(folder.rows("test")) else {"test": SHARE})
    if (part["patient"] != "").any():
        groups, by = part["patient"].where(part["patient"] != "", part["sha256"]).tolist(), "patient"
    else:
        groups, by = _twins(folder, rows, cache), "slice, near twins kept together; no patients are known"
    drawn = share_out(part["class"].tolist(), groups, {"train": 1 - sum(shares.values()), **shares})
    slices.iloc[rows, slices.columns.get_loc("split")] = drawn
    note = f"no val split: {SHARE:.0%} of train drawn for {' and for '.join(shares)}, seed {SPLIT_SEED}, by {by}"
    digest = hashlib.sha256("\0".join([folder.fingerprint, *drawn]).encode()).hexdigest()
    return dataclasses.replace(folder, slices=slices, fingerprint=digest, notes=(*folder.notes, note))


def _twins(folder: SliceFolder, rows: np.ndarray, cache: Path) -> list:
    """Return a group for each row, the same for near twins; equal files where the audit is not at hand."""
    try:
        from ctutils.audit import group_sketches, sketch
    except ImportError:
        return folder.slices["sha256"].iloc[rows].tolist()
    known = cache / "twins" / f"{folder.fingerprint}.json"
    with contextlib.suppress(CTError, KeyError):
        return read_json(known)["groups"]
    with quiet(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

        def look_at(row: int):
            try:
                return sketch(folder.read_grey(row))
            except BadFile:
                return None

        read = pool.map(look_at, rows)
        groups = group_sketches(list(progress(read, total=len(rows), desc="Looking for twins", leave=False)))
    with contextlib.suppress(OSError, CTError):
        write_json(known, {"groups": groups})
    return groups


def with_test_split(folder: SliceFolder, seed: int = 0) -> SliceFolder:
    """Return the folder with a test split: its own, or else half of its validation split.

    The halves are stratified by class with a fixed seed, and slices of one patient (else equal files) stay together:
    one half chooses the epoch, the other reports. `meta["test_from_val"]` is True when that was done.

    Raises:
        CTError: a class has fewer than two validation slices to share out.
    Source: notebook 09, "the evaluation rule".
    """
    if len(folder.rows("test")):
        return folder
    slices, rows = folder.slices.copy(), folder.rows("val")
    part = slices.iloc[rows]
    if part["class"].value_counts().min() < 2:
        raise CTError("a class with one validation slice and no test split", "two or more", "add slices to val")
    groups = part["patient"].where(part["patient"] != "", part["sha256"])
    halves = share_out(part["class"].tolist(), groups.tolist(), {"val": 0.5, "test": 0.5}, seed)
    slices.iloc[rows, slices.columns.get_loc("split")] = halves
    return dataclasses.replace(folder, slices=slices, meta={**folder.meta, "test_from_val": True})


def with_test_of(folder: SliceFolder, other: SliceFolder) -> SliceFolder:
    """Return the folder with the test split of another one, for the question: does it hold elsewhere?

    A column `shown` gives the paths below the two folders' names, for records.

    Raises:
        CTError: other classes, or no test split there.
    Source: notebook 10, section 8.
    """
    if other.classes != folder.classes or not len(other.rows("test")):
        found = f"classes {other.classes} and {len(other.rows('test'))} test slices in '{other.name}'"
        raise CTError(found, f"{folder.classes} and a test split", "use sets of one kind, the second made with --test")
    try:
        root = Path(os.path.commonpath([folder.root.resolve(), other.root.resolve()]))
    except ValueError as error:  # Windows
        raise CTError(f"'{folder.root}' and '{other.root}' on two drives", "one drive", "copy one of them") from error
    parts = []
    for part, keep in ((folder, ("train", "val")), (other, ("test",))):
        own, slices = part.root.resolve(), part.slices[part.slices["split"].isin(keep)]
        below = [(own / path).relative_to(root).as_posix() for path in slices["path"]]
        parts.append(slices.assign(path=below, shown=[f"{own.name}/{path}" for path in slices["path"]]))
    return dataclasses.replace(
        folder,
        root=root,
        name=f"{folder.name}, tested on {other.name}",
        slices=pd.concat(parts, ignore_index=True),
        fingerprint=hashlib.sha256(f"{folder.fingerprint} {other.fingerprint}".encode()).hexdigest(),
    )


def default_folder(settings: Settings) -> SliceFolder:
    """Return the data set that the settings name; the synthetic one is made on first use.

    Raises:
        CTError: CT_DATA names a folder that is missing or broken.
    Source: notebook 01.
    """
    if not settings.own_data:
        _synthesise(settings.data_dir, settings)
    return load_folder(settings.data_dir, cache=settings.cache_dir)


def shortcut_root(settings: Settings) -> Path:
    """Return where `shortcut_folder` puts its slices: beside the cache."""
    name = settings.profile.name
    return settings.cache_dir.parent / ("synthetic_shortcut" + ("" if name == "standard" else f"_{name}"))


def shortcut_folder(settings: Settings) -> SliceFolder:
    """Return the synthetic set in which the sharpness tells the class; made on first use.

    Patients, findings and counts are those of the profile's own set: only the scanner's kernel differs.

    Source: notebook 01, "a trap".
    """
    _synthesise(shortcut_root(settings), settings, shortcut="sharpness")
    return load_folder(shortcut_root(settings), cache=settings.cache_dir)


def _synthesise(out: Path, settings: Settings, **options) -> None:
    from ctutils.phantom import write_dataset

    size = settings.profile
    write_dataset(out, train=size.train, val=size.val, test=size.test, seed=settings.seed, **options)


def build_transform(size: int, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD):
    """Return the transform from a picture to a network's input, float32 (3, size, size).

    Resize with antialias, three equal channels, then (value / 255 - mean) / std with the statistics that the
    backbone was trained with. The decoded store holds the pictures after the resize; the rest is done in batch.

    Source: notebook 01.
    """
    import torch
    from torchvision.transforms import v2

    resize = [v2.Grayscale(1), v2.Resize((size, size), antialias=True), v2.ToImage(), v2.Grayscale(3)]
    return v2.Compose([*resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def parts_of(count: int) -> list[range | None]:
    """Return the parts of so many slices; [None] where one is enough."""
    return [range(k, min(k + PART, count)) for k in range(0, count, PART)] if count > PART else [None]


def build_store(
    folder: SliceFolder, size: int, *, cache: Path | None = None, workers: int | None = None, part: range | None = None
) -> np.ndarray:
    """Decode and resize every slice once and return them as a memory-mapped uint8 array (N, size, size).

    The file stands in `data/cache/store`, named by the folder's fingerprint and the size, so that every
    notebook and backbone shares it and a changed picture makes a new one. It is complete or absent: written
    in order to a temporary file, then renamed; a large one in parts, which are then joined. Memory stays flat.

    Args:
        size: pixels a side.
        cache: folder of the store (default `data/cache`).
        workers: decoding threads (default: one a core).
        part: only these rows, one of `parts_of`.
    Raises:
        CTError: slices that cannot be decoded, all of a part named at once; a full disk.
    Source: notebook 02.
    """
    rows, workers = part or range(len(folder.slices)), workers or os.cpu_count() or 1
    name = f"{folder.fingerprint[:20]}-{size}{'' if part is None else f'-{rows.start}'}.u8"
    path, shape = (cache or cache_dir()) / "store" / name, (len(rows), size, size)

    def decode(row: int) -> np.ndarray | str:
        try:
            return resize(folder.read_grey(row), size)
        except BadFile as error:
            return str(error)

    whole = path.is_file() and path.stat().st_size == math.prod(shape)
    if not whole and part is None and len(rows) > PART:
        parts = [build_store(folder, size, cache=cache, workers=workers, part=part) for part in parts_of(len(rows))]
        with atomic_path(path) as temporary, open(temporary, "wb") as out:
            for store in parts:
                out.write(store)
        for store in parts:
            Path(store.filename).unlink(missing_ok=True)
    elif not whole:
        problems = {}
        with (
            atomic_path(path) as temporary,
            open(temporary, "wb") as out,
            quiet(),
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            progress(total=shape[0], desc=f"Decoding slices to {size} x {size}", unit="slice", leave=False) as bar,
        ):
            for start in range(0, len(rows), 16 * workers):  # bounds what waits in memory
                chunk = rows[start : start + 16 * workers]
                for row, decoded in zip(chunk, pool.map(decode, chunk), strict=True):
                    if isinstance(decoded, str):
                        problems[folder.slices["path"].iloc[row]] = decoded
                    else:
                        out.write(decoded.tobytes())
                    bar.update()
            if problems:
                _refuse_unreadable(folder, problems)
    return np.memmap(path, np.uint8, mode="r", shape=shape)


class Rows:
    """Stands for a store of some shape, (N, size, size), whose rows are read when they are asked for."""

    def __init__(self, shape: tuple[int, ...], read):
        self.shape, self.read = shape, read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.read(rows)


class SliceBatches:
    """Whole batches from the decoded store, for a DataLoader whose sampler yields lists of indices.

    `batches[indices]` returns images float32 (B, 3, H, W), normalised, and labels int64 (B,), where the store is:
    a memory-mapped array (on the CPU), or a tensor uint8 (N, H, W) that stands on the GPU.
    """

    def __init__(self, store, labels: np.ndarray, rows: np.ndarray, mean, std, augment=None):
        import torch

        self.device = "cpu" if isinstance(store, np.ndarray) else store.device
        self.store, self.augment = store, augment
        self.rows, self.labels = (torch.from_numpy(values).to(self.device) for values in (rows, labels[rows]))
        self.mean, self.std = (torch.tensor(three, device=self.device) for three in (mean, std))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]):
        import torch

        here = torch.as_tensor(indices).to(self.device, non_blocking=True)  # to a GPU only the indices travel
        rows = self.rows[here]
        images = self.store[rows] if self.device != "cpu" else torch.from_numpy(self.store[rows.numpy()])
        images = images[:, None] if self.augment is None else self.augment(images[:, None])
        return normalise(images, self.mean, self.std), self.labels[here]


def normalise(images, mean, std):
    """Turn grey uint8 (B, 1, H, W) into network input float32 (B, 3, H, W): (value / 255 - mean) / std."""
    import torch

    mean, std = (torch.as_tensor(three, device=images.device).view(1, 3, 1, 1) for three in (mean, std))
    return (images.float() / 255 - mean) / std


def make_loaders(
    folder: SliceFolder, store, *, mean=IMAGENET_MEAN, std=IMAGENET_STD, batch_size=32, augment=None, device="cpu"
) -> dict:
    """Return one DataLoader a split; the training slices are shuffled (by torch's global seed), others in order.

    Args:
        store: uint8 (N, size, size), rows as in `folder.slices`.
        mean, std: the backbone's normalisation, three numbers each.
        augment: uint8 (B, 1, H, W) -> the same, for the training slices only.
        device: a CUDA device gets the whole store once, if a quarter of its free memory holds it, so that the
            batches are made there; else they are made on the CPU.
    Returns:
        {split: loader of images float32 (B, 3, size, size) and labels int64 (B,)}
    Raises:
        CTError: store and folder have different numbers of slices.
    Source: notebook 02.
    """
    import torch

    if len(store) != len(folder.slices):
        raise CTError(f"{len(store)} decoded slices", f"{len(folder.slices)}", "build the store again")
    if device.startswith("cuda") and store.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        store = torch.from_numpy(np.array(store)).to(device)

    def batches(split: str):
        changed = augment if split == "train" else None
        return SliceBatches(store, folder.labels, folder.rows(split), mean, std, changed)

    return _loaders(folder, batches, batch_size)


def feature_loaders(folder: SliceFolder, features, *, batch_size: int = 32, views=None) -> dict:
    """Return one DataLoader a split over cached features: float32 (B, ...) and labels int64 (B,).

    The order of the training examples is that of `make_loaders` under the same seed.

    Args:
        features: tensor (N, D) or (N, K, h, w), float32 or bfloat16, rows as in `folder.slices`; a mapped file is
            read batch by batch.
        views: tensor (V, M, ...) of V random views of the M training slices: each time a training slice is asked
            for, one of its views is drawn, or the slice as it is.
    Source: notebook 02; the views: notebook 10.
    """

    def batches(split: str):
        rows = folder.rows(split)
        return _FeatureBatches(features, rows, folder.labels[rows], views if split == "train" else None)

    return _loaders(folder, batches, batch_size)


class _FeatureBatches:
    def __init__(self, features, rows: np.ndarray, labels: np.ndarray, views=None):
        import torch

        self.features, self.views = features, views  # (N, ...), (V, M, ...)
        self.rows, self.labels = (torch.from_numpy(some).to(features.device) for some in (rows, labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]):
        import torch

        device = self.features.device
        indices = torch.as_tensor(indices).to(device, non_blocking=True)
        batch = self.features[self.rows[indices]].float()
        if self.views is not None:
            drawn = torch.randint(len(self.views) + 1, (len(indices),)).to(device, non_blocking=True)  # 0: as it is
            changed = drawn > 0
            batch[changed] = self.views[drawn[changed] - 1, indices[changed]].float()
        return batch, self.labels[indices]


def _loaders(folder: SliceFolder, batches, batch_size: int) -> dict:
    splits = [split for split in SPLITS if len(folder.rows(split))]
    return {split: batch_loader(batches(split), batch_size, shuffle=split == "train") for split in splits}


def batch_loader(dataset, batch_size: int, *, shuffle: bool):
    """Return a DataLoader that asks `dataset` for whole batches, `dataset[[i, j, ...]]`."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    order = (RandomSampler if shuffle else SequentialSampler)(range(len(dataset)))
    # batch_size=None: the sampler already yields batches, and one gather beats collating pictures one by one.
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
