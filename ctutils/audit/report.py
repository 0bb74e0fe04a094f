"""The audit: everything looked at, and what was found, worst first."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctutils.audit.duplicates import exact_duplicates, group_slices, near_duplicates
from ctutils.audit.look import decode_pass
from ctutils.audit.probes import shortcut_probes
from ctutils.base import CTError, read_json, write_json
from ctutils.config import cache_dir
from ctutils.data import SPLIT_NAMES, SPLITS, SliceFolder, load_folder

AUDIT_VERSION = 1  # of stored verdicts: raise it when the audit judges otherwise
PATH_COLUMNS = ("path", "file", "filename", "image")
PATIENT_COLUMNS = ("patient", "patient_id", "patientid", "subject")


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

        def rows(table: pd.DataFrame) -> list[dict]:
            return json.loads(table.to_json(orient="records", force_ascii=False))

        tables = {name: table for name, table in self.tables.items() if name != "slices"}
        if "counts" in tables:
            tables["counts"] = tables["counts"].reset_index()
        return {
            "root": str(self.root),
            "ok": self.ok,
            "findings": rows(self.findings),
            "tables": {name: rows(table.head(limit)) for name, table in tables.items()},
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
        end = "Nothing must be mended." if self.ok else "Errors must be mended; --fix OUT writes a cleaned copy."
        return "\n".join([*lines, "", end])

    def verdicts(self) -> list[str]:
        """Return one sentence a finding and a probe, for the model card."""
        lines = [f"{row.severity}: {row.check}: {row.message}" for row in self.findings.itertuples()]
        probes = self.tables.get("probes", pd.DataFrame())
        return lines + [
            f"probe, {row.probe}: macro F1 {row.macro_f1:.2f} ({row.low:.2f} to {row.high:.2f}), chance "
            f"{row.chance:.2f}, {'FLAGGED' if row.flagged else 'not flagged'}"
            for row in probes.itertuples()
        ]


def audit(
    root: str | Path, *, probes: bool = True, cache: Path | None = None, workers: int | None = None
) -> AuditReport:
    """Look a folder over: unreadable and odd files, duplicates and patients across splits, shortcuts.

    A whole audit leaves its verdicts in the cache, for the model cards of runs on this folder.

    Args:
        root: `<root>/{train,val[,test]}/<class>/*.png`; a broken layout is a finding, not an exception.
        probes: also train the shortcut probes, the longest part.
        cache: the cache folder (default: `config.cache_dir()`).
        workers: threads.
    Source: notebook 01.
    """
    root, cache = Path(root), cache or cache_dir()
    found = _Findings()
    try:
        folder = load_folder(root, strict=False, cache=cache)
    except CTError as error:
        found.add("error", "layout", str(error), count=1)
        return AuditReport(root, found.table(), {})
    patients = np.full(len(folder.slices), "")
    try:
        patients, strays = read_patients(folder)
        found.add("warning", "patients", "{} of the patient table: no such file (moved, or renamed?)", strays, "row")
    except CTError as error:
        found.add("warning", "patients", str(error), count=1)
    decoded = decode_pass(folder, workers=workers)
    exact, near = exact_duplicates(decoded), near_duplicates(decoded, patients)
    groups = group_slices(decoded, near, patients)
    slices = decoded.table.assign(patient=patients, group=groups)
    leaks = _leaks(slices, exact, near)
    tables = {"counts": folder.counts(), "leaks": leaks, "exact": exact, "near": near, "slices": slices}
    _odd_files(found, folder, slices)
    _exact_findings(found, exact, leaks)
    _near_findings(found, near, leaks)
    _patient_findings(found, slices)
    if probes:
        tables["probes"] = shortcut_probes(decoded, groups)
        _probe_findings(found, tables["probes"])
    report = AuditReport(root, found.table(), tables)
    if probes:
        with contextlib.suppress(CTError, OSError):  # a cache that cannot be written costs the next card an audit
            write_json(_verdicts_path(folder.fingerprint, cache), {"verdicts": report.verdicts()})
    return report


def stored_verdicts(fingerprint: str, cache: Path | None = None) -> list[str] | None:
    """Return what the last whole audit of the slices with this fingerprint said; None if there was none."""
    try:
        return read_json(_verdicts_path(fingerprint, cache or cache_dir()))["verdicts"]
    except (CTError, KeyError):
        return None


def _verdicts_path(fingerprint: str, cache: Path) -> Path:
    return Path(cache) / "audit" / f"{fingerprint}-{AUDIT_VERSION}.json"


def read_patients(folder: SliceFolder) -> tuple[np.ndarray, list[str]]:
    """Return the patient of every slice, str (N,), "" where unknown, and the table's paths that name no slice.

    Read from the first CSV file at the data set's root, patients.csv and findings.csv before others, with a
    column of `PATH_COLUMNS` (as in `folder.slices`, or a file name that occurs once) and one of
    `PATIENT_COLUMNS`, in any case.

    Raises:
        CTError: patients.csv cannot be read or lacks a column.
    """
    paths = folder.slices["path"]
    own = [folder.root / "patients.csv", folder.root / "findings.csv"]
    for file in [*own, *sorted(set(folder.root.glob("*.csv")) - set(own))]:
        if not file.is_file():
            continue
        try:
            table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
            if file not in own:
                continue
            raise CTError(
                f"'{file.name}', which cannot be read ({error})", "a table in CSV", "mend or remove it"
            ) from error
        lower = {name.strip().lower(): name for name in reversed(table.columns)}
        columns = [next((lower[n] for n in names if n in lower), None) for names in (PATH_COLUMNS, PATIENT_COLUMNS)]
        if None in columns:
            if file == own[0]:
                found = f"columns {', '.join(table)} in 'patients.csv'"
                raise CTError(found, "columns path and patient", "rename the columns")
            continue
        place, patient = as_posix(table[columns[0]]), table[columns[1]].str.strip()
        names = paths.str.rsplit("/", n=1).str[-1]
        once = ~names.duplicated(keep=False)
        by_name = dict(zip(names[once], paths[once], strict=True))
        place = place.where(place.isin(paths), place.map(lambda name, full=by_name: full.get(name, name)))
        known = pd.Series(patient.to_numpy(), index=place)
        known = known[~known.index.duplicated()]
        return paths.map(known).fillna("").to_numpy(str), sorted(set(known.index) - set(paths))
    return np.full(len(paths), ""), []


def as_posix(paths: pd.Series) -> pd.Series:
    """Return relative paths as `folder.slices` writes them."""
    return paths.str.strip().str.replace("\\", "/").str.removeprefix("./")


# ---------------------------------------------------------------- findings


class _Findings:
    """Collects findings; nothing is added for nothing."""

    def __init__(self):
        self.rows: list[tuple] = []

    def add(
        self, severity: str, check: str, message: str, examples: Iterable[str] = (), noun: str = "", count: int = 0
    ) -> None:
        """Add a finding; "{}" in the message becomes the number of examples and the noun. No example, no finding."""
        examples = list(examples)
        if noun:
            count = count or len(examples)
            if not count:
                return
            message = message.replace("{}", _several(count, noun), 1)
        self.rows.append((severity, check, message, count or len(examples), examples[:5]))

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame(self.rows, columns=["severity", "check", "message", "count", "examples"])
        rank = table["severity"].map({"error": 0, "warning": 1, "info": 2})
        return table.iloc[np.argsort(rank, kind="stable")].reset_index(drop=True)


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _odd_files(found: _Findings, folder: SliceFolder, slices: pd.DataFrame) -> None:
    bad = slices[slices["problem"] != ""]
    found.add("error", "unreadable files", "{} cannot be decoded", bad["path"] + " (" + bad["problem"] + ")", "file")
    counts = slices["class"].value_counts()
    message = (
        f"{len(slices)} slices, {len(counts)} classes; the largest class ({counts.index[0]}) is "
        f"{counts.iloc[0] / counts.iloc[-1]:.1f} times the smallest ({counts.index[-1]})"
    )
    found.add("info", "counts", message, count=len(slices))
    if not (slices["split"] == "test").any():
        found.add("info", "counts", "no test split: half of val will report, the other half choose")
    for column, words in (("colour", "with colour, which no CT slice has"), ("blank", "of one grey level")):
        found.add("warning", f"{column} pictures", "{} " + words, slices["path"][slices[column]], "slice")
    readable = folder.slices[(slices["problem"] == "").to_numpy()]
    sizes = readable["width"].astype(str) + " x " + readable["height"].astype(str)
    for name, values in (("picture size", sizes), ("picture mode", readable["mode"])):
        kinds = values.value_counts()
        if len(kinds) > 1:
            message = f"{len(kinds)} kinds; {{}} other than {kinds.index[0]}"
            found.add("info", name, message, readable["path"][values != kinds.index[0]], "slice")
    found.add("info", "other files", "{} in the split folders not used", _other_files(folder), "file")


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
            pixels = slices.loc[slices["path"].isin(listed), "pixels"]
            twins = set(slices["path"][(slices["split"] == split) & slices["pixels"].isin(pixels)])
            size, either = int((slices["split"] == split).sum()), len(copies | twins)
            rows.append((split, other, size, len(copies), len(twins), either, sorted(copies), sorted(twins)))
    columns = ["split", "other", "slices", "exact", "near", "either", "exact_paths", "near_paths"]
    return pd.DataFrame(rows, columns=columns)


def _exact_findings(found: _Findings, exact: pd.DataFrame, leaks: pd.DataFrame) -> None:
    for row in leaks[leaks["exact"] > 0].itertuples(index=False):
        message = f"{row.exact} of {row.slices} {row.split} slices have an exact copy in {row.other}"
        found.add("error", "exact copies across splits", message, row.exact_paths)
    mixed = exact[exact.groupby("group")["class"].transform("nunique") > 1]
    if len(mixed):
        message = f"{_several(mixed['group'].nunique(), 'picture')} under two classes or more ({len(mixed)} files)"
        found.add("error", "exact copies across classes", message, mixed["path"])
    extra = exact["path"][exact.duplicated(["group", "split"])]
    found.add("warning", "exact copies within a split", "{} beside an exact copy in the same split", extra, "slice")


def _near_findings(found: _Findings, near: pd.DataFrame, leaks: pd.DataFrame) -> None:
    show = near["path_a"] + " | " + near["path_b"]
    for row in leaks[leaks["near"] > 0].itertuples(index=False):
        splits = {row.split, row.other}
        pairs = show[[{a, b} == splits for a, b in zip(near["split_a"], near["split_b"], strict=True)]]
        message = f"{row.near} of {row.slices} {row.split} slices have a near twin in {row.other}"
        message += f" (with exact copies {row.either})"
        found.add("error", "near twins across splits", message, pairs, count=row.near)
    mixed, same = near["class_a"] != near["class_b"], near["same_patient"].astype(bool)
    within = (near["split_a"] == near["split_b"]) & ~mixed
    classes, split = "near twins across classes", "near twins within a split"
    for severity, check, rows, words in (
        ("error", classes, mixed & ~same, " of different classes"),
        ("warning", classes, mixed & same, " of one patient, of different classes"),
        ("warning", split, within & ~same, ": copies, or neighbouring slices of a patient"),
        ("info", split, within & same, " of one patient: neighbouring slices"),
    ):
        found.add(severity, check, "{}" + words, show[rows], "pair")


def _patient_findings(found: _Findings, slices: pd.DataFrame) -> None:
    known = slices[slices["patient"] != ""]
    if known.empty:
        message = "no table with a path and a patient column (patients.csv): not checked"
        found.add("info", "patients", message)
        return
    by_patient, sound = known.groupby("patient"), True
    for severity, column, words in (("error", "split", "splits"), ("warning", "class", "classes")):
        mixed = known[by_patient[column].transform("nunique") > 1]
        if len(mixed):
            sound, names = False, mixed["patient"].nunique()
            message = f"{_several(names, 'patient')} in two {words} or more ({len(mixed)} slices)"
            examples = mixed.drop_duplicates(["patient", column])["path"]
            found.add(severity, f"patients in two {words}", message, examples, count=names)
    if sound:
        message = f"{_several(known['patient'].nunique(), 'patient')}, each in one split and class"
        found.add("info", "patients", message)
    unknown = slices["path"][slices["patient"] == ""]
    found.add("info", "patients", "{} without a patient in the table", unknown, "slice")


def _probe_findings(found: _Findings, probes: pd.DataFrame) -> None:
    if probes.empty:
        found.add("info", "shortcut probes", "too few slices in a class to train probes")
        return
    for row in probes[probes["flagged"]].itertuples(index=False):
        message = (
            f"{row.probe} alone gives macro F1 {row.macro_f1:.2f} ({row.low:.2f} to {row.high:.2f}), "
            f"chance {row.chance:.2f}, best at {row.best_class}: a model may read the class without the lungs"
        )
        found.add("warning", "shortcut", message, count=1)
    if not probes["flagged"].any():
        top = probes.loc[probes["macro_f1"].idxmax()]
        message = f"none is flagged; the best is {top['probe']} with macro F1 {top['macro_f1']:.2f}"
        found.add("info", "shortcut probes", message)
