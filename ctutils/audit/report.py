"""The audit: everything looked at, and what was found, worst first."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from ctutils.audit.duplicates import exact_duplicates, group_slices, near_duplicates
from ctutils.audit.look import Decoded, decode_pass
from ctutils.audit.probes import doubted_labels, shortcut_probes
from ctutils.base import CTError, read_json, write_json
from ctutils.config import cache_dir
from ctutils.data import SPLIT_NAMES, SPLITS, SliceFolder, load_folder, read_patients

UNREADABLE, DOUBTED = "unreadable files", "labels in doubt"  # name all files; a few, though only for information
VERDICTS = "audit/{}-4.json"  # of a fingerprint; raise the number when the audit judges otherwise
SCOPE = (
    "Looked for: copies re-encoded, noisy, resized, shifted, padded, turned, mirrored, inverted, cropped to 90 %",
    "(often missed: equalised, other windows, closer crops, left and right halves; not looked for: upper and lower",
    "halves); shortcuts in files, names, greys, sharpness, place, border, marks; labels. See data/README.md.",
)


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    Attributes:
        root: the folder.
        name, meta: the data set's, as in `SliceFolder`.
        findings: a row a finding, worst first: severity (error, warning, info), check, message, count,
            examples (all paths).
        tables: counts, leaks, exact, near, probes, doubts; slices (with group and patient). Empty when the layout
            is broken.
        decoded: what was kept of every slice, for `clean_copy`; None when the layout is broken.
    """

    root: Path
    findings: pd.DataFrame
    tables: dict[str, pd.DataFrame]
    name: str = ""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    decoded: Decoded | None = dataclasses.field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """False when something must be mended before a score on this folder means anything."""
        return not (self.findings["severity"] == "error").any()

    def to_json(self, limit: int = 1000) -> dict[str, Any]:
        """Return a dict for JSON; of long tables the first `limit` rows, of all their number; all unreadable files."""

        def rows(table: pd.DataFrame) -> list[dict]:
            return json.loads(table.to_json(orient="records", force_ascii=False))

        found = self.findings.copy()
        examples = zip(found["examples"], found["check"], strict=True)
        found["examples"] = [paths if check == UNREADABLE else paths[:limit] for paths, check in examples]
        tables = {name: table for name, table in self.tables.items() if name != "slices"}
        return {
            "root": str(self.root),
            "ok": self.ok,
            "findings": rows(found),
            "tables": {name: rows(table.head(limit)) for name, table in tables.items()},
            "rows": {name: len(table) for name, table in tables.items()},
        }

    def to_text(self) -> str:
        """Return the findings as lines, with all unreadable files, and of others the first five."""
        lines = []
        for row in self.findings.itertuples():
            lines.append(f"{row.severity.upper():8}{row.check}: {row.message}")
            most = (
                len(row.examples) if row.check == UNREADABLE else 5 * (row.severity != "info" or row.check == DOUBTED)
            )
            lines += [f"{'':10}{example}" for example in row.examples[:most]]
            if 0 < most < len(row.examples):
                lines.append(f"{'':10}and {len(row.examples) - most} more (--json)")
        end = "Nothing must be mended." if self.ok else "Errors must be mended; --fix OUT writes a cleaned copy."
        return "\n".join([*lines, "", *SCOPE, end])

    def verdicts(self) -> list[str]:
        """Return one sentence a finding, for the model card."""
        return [f"{row.severity}: {row.check}: {row.message}" for row in self.findings.itertuples()]


def audit(root: str | Path, *, probes: bool = True, cache: Path | None = None) -> AuditReport:
    """Look a folder over: unreadable and odd files, duplicates and patients across splits, shortcuts.

    A whole audit leaves its verdicts in the cache, for the model cards of runs on this folder.

    Args:
        root: `<root>/{train,val[,test]}/<class>/*.png`; a broken layout is a finding, not an exception.
        probes: also train the shortcut probes, the longest part.
        cache: the cache folder (default: `config.cache_dir()`).
    Source: notebook 01.
    """
    root, cache = Path(root), cache or cache_dir()
    try:
        folder = load_folder(root, strict=False, cache=cache)
    except CTError as error:
        return AuditReport(root, _table([("error", "layout", str(error), None)]), {})
    decoded = decode_pass(folder)
    exact, near = exact_duplicates(decoded), near_duplicates(decoded)
    slices = decoded.table.assign(group=group_slices(decoded, near))
    leaks = _leaks(slices, near)
    tables = {"counts": folder.counts().reset_index(), "leaks": leaks, "exact": exact, "near": near, "slices": slices}
    found = [
        *_of_files(folder, slices),
        *_of_copies(exact, near, leaks),
        *_of_patients(root, slices),
        *_of_names(slices),
    ]
    if probes:
        tables["probes"] = shortcut_probes(decoded, slices["group"].to_numpy())
        tables["doubts"] = doubts = doubted_labels(decoded, slices["group"].to_numpy())
        shown = doubts["path"] + " (" + doubts["looks_like"] + "? " + doubts["doubt"].map("{:.2f}".format) + ")"
        doubt = "{} slice(s) look like another class to crude features, most doubtful first: right or wrong, look"
        found += [*_of_probes(tables["probes"]), ("info", DOUBTED, doubt, shown)]
    report = AuditReport(root, _table(found), tables, folder.name, folder.meta, decoded)
    if probes:
        with contextlib.suppress(CTError, OSError):  # a cache that cannot be written costs the next card an audit
            write_json(Path(cache) / VERDICTS.format(folder.fingerprint), {"verdicts": report.verdicts()})
    return report


def stored_verdicts(fingerprint: str, cache: Path | None = None) -> list[str] | None:
    """Return what the last whole audit of the slices with this fingerprint said; None if there was none."""
    with contextlib.suppress(CTError, KeyError):
        return read_json(Path(cache or cache_dir()) / VERDICTS.format(fingerprint))["verdicts"]


# Severity, check, message ("{}" becomes the number of examples) and examples: without any there is nothing to say.
# Instead of examples, None: said in any case.
Finding = tuple[str, str, str, Iterable[str] | None]


def _table(found: Iterable[Finding]) -> pd.DataFrame:
    """Return the findings, worst first, as `AuditReport` wants them."""
    rows = []
    for severity, check, message, examples in found:
        paths = [] if examples is None else list(examples)
        if paths or examples is None:
            message = message.replace("{}", str(len(paths))) if paths else message
            rows.append((severity, check, message, max(1, len(paths)), paths))
    rows.sort(key=lambda row: ("error", "warning", "info").index(row[0]))
    return pd.DataFrame(rows, columns=["severity", "check", "message", "count", "examples"])


def _of_files(folder: SliceFolder, slices: pd.DataFrame) -> Iterator[Finding]:
    bad = slices[slices["problem"] != ""]
    for fault, some in bad.groupby(bad["problem"].str.replace(r"'.*'|\d+", "...", regex=True), sort=False):
        yield "error", UNREADABLE, f"{{}} file(s): {fault}", some["path"] + " (" + some["problem"] + ")"
    for note in folder.notes:
        yield "info", "reading", note, None
    warned = folder.slices[folder.slices["warned"] != ""]
    yield "info", "decoder warnings", "{} file(s)", warned["path"] + " (" + warned["warned"] + ")"
    counts = slices["class"].value_counts()
    message = f"{len(slices)} slices, {len(counts)} classes; the largest class ({counts.index[0]}) is "
    message += f"{counts.iloc[0] / counts.iloc[-1]:.1f} times the smallest ({counts.index[-1]})"
    yield "info", "counts", message, None
    if not (slices["split"] == "test").any():
        yield "info", "counts", "no test split: half of val will report, the other half choose", None
    coloured = slices["path"][slices["colour"]]
    yield "warning", "colour pictures", "{} slice(s) with colour, which no CT slice has", coloured
    yield "warning", "blank pictures", "{} slice(s) of one grey level", slices["path"][slices["blank"]]
    facts = folder.slices.drop(index=bad.index)
    sizes = facts["width"].astype(str) + " x " + facts["height"].astype(str)
    for check, values in (("picture size", sizes), ("picture mode", facts["mode"])):
        usual = values.mode()[:1].to_list()
        odd = facts["path"][~values.isin(usual)]
        yield "info", check, f"{values.nunique()} kinds; {{}} slice(s) other than {''.join(usual)}", odd
    splits = [path for path in folder.root.iterdir() if path.is_dir() and path.name.lower() in SPLIT_NAMES]
    files = [path for split in splits for path in split.rglob("*") if path.is_file() and path.name[0] != "."]
    others = {path.relative_to(folder.root).as_posix() for path in files} - set(slices["path"])
    yield "info", "other files", "{} file(s) in the split folders not used", sorted(others)


def _leaks(slices: pd.DataFrame, near: pd.DataFrame) -> pd.DataFrame:
    """Count, for each two splits, the slices of one that have a twin in the other."""
    pixels = slices.set_index("path")["pixels"]
    swapped = near.rename(columns={"path_a": "path_b", "path_b": "path_a", "split_a": "split_b", "split_b": "split_a"})
    pairs = pd.concat([near, swapped])
    rows = []
    for other, split in itertools.combinations([one for one in SPLITS if (slices["split"] == one).any()], 2):
        mine, theirs = (slices[slices["split"] == one] for one in (split, other))
        exact = set(mine["path"][mine["pixels"].isin(theirs["pixels"]) & (mine["pixels"] != "")])
        # A listed pair stands for all copies of its slices in the same split and class.
        listed = pairs["path_a"][(pairs["split_a"] == split) & (pairs["split_b"] == other)]
        twins = set(mine["path"][mine["pixels"].isin(pixels[listed])])
        counts = {"slices": len(mine), "exact": len(exact), "near": len(twins), "either": len(exact | twins)}
        paths = {"exact_paths": sorted(exact), "near_paths": sorted(twins)}
        rows.append({"split": split, "other": other, **counts, **paths})
    return pd.DataFrame(rows)


def _of_copies(exact: pd.DataFrame, near: pd.DataFrame, leaks: pd.DataFrame) -> Iterator[Finding]:
    show = near["path_a"] + " | " + near["path_b"]
    for row in leaks.itertuples(index=False):
        message = f"{{}} of {row.slices} {row.split} slices have an exact copy in {row.other}"
        yield "error", "exact copies across splits", message, row.exact_paths
        message = f"{row.near} of {row.slices} {row.split} slices have a near twin in {row.other}"
        pairs = show[(near["split_a"] + near["split_b"]).isin([row.split + row.other, row.other + row.split])]
        yield "error", "near twins across splits", f"{message} (with exact copies {row.either})", pairs
    mixed = exact[exact.groupby("group")["class"].transform("nunique") > 1]
    message = f"{mixed['group'].nunique()} picture(s) under two classes or more ({{}} files)"
    yield "error", "exact copies across classes", message, mixed["path"]
    extra = exact["path"][exact.duplicated(["group", "split"])]
    yield "warning", "exact copies within a split", "{} slice(s) beside an exact copy in the same split", extra
    mixed, same = near["class_a"] != near["class_b"], near["same_patient"]
    within = (near["split_a"] == near["split_b"]) & ~mixed
    classes, split = "near twins across classes", "near twins within a split"
    yield "error", classes, "{} pair(s) of different classes", show[mixed & ~same]
    yield "warning", classes, "{} pair(s) of one patient, of different classes", show[mixed & same]
    yield "warning", split, "{} pair(s): copies, or neighbouring slices of a patient", show[within & ~same]
    yield "info", split, "{} pair(s) of one patient: neighbouring slices", show[within & same]


def _of_patients(root: Path, slices: pd.DataFrame) -> Iterator[Finding]:
    try:
        _, strays = read_patients(root, slices["path"])
        yield "warning", "patients", "{} row(s) of the patient table: no such file (moved, or renamed?)", strays
    except CTError as error:
        yield "warning", "patients", str(error), None
    known, unknown = slices[slices["patient"] != ""], slices["path"][slices["patient"] == ""]
    if known.empty:
        yield "info", "patients", "no table with a path and a patient column (patients.csv): not checked", None
        return
    yield "info", "patients", f"{known['patient'].nunique()} patient(s)", None
    for severity, column, words in (("error", "split", "splits"), ("warning", "class", "classes")):
        mixed = known[known.groupby("patient")[column].transform("nunique") > 1]
        message = f"{mixed['patient'].nunique()} patient(s) in two {words} or more ({len(mixed)} slices)"
        yield severity, f"patients in two {words}", message, mixed.drop_duplicates(["patient", column])["path"]
    yield "info", "patients", "{} slice(s) without a patient in the table", unknown


def _of_names(slices: pd.DataFrame) -> Iterator[Finding]:
    """Tell what file names give away: patients' IDs and names, and IDs in two splits."""
    stems = slices["path"].str.rsplit("/", n=1).str[-1].str.rsplit(".", n=1).str[0]
    short = slices["patient"].str.len() < 3
    in_name = [bool(one) and one in stem for one, stem in zip(slices["patient"].mask(short, ""), stems, strict=True)]
    yield "warning", "patients in file names", "{} file name(s) hold the patient's ID", slices["path"][in_name]
    named = stems.str.extract(r"(?i)(?:^|[^a-z])(?:patient|pat|pt|pid|subject|subj|case|mrn|id)[-_ .]*(\w?\d+)")[0]
    named = named.where(named.groupby(named).transform("size") < len(slices))
    split = "{} slice(s) of IDs in file names that stand in two splits, such as one patient's: give patients.csv"
    mixed = slices["path"][(slices["patient"] == "") & (slices["split"].groupby(named).transform("nunique") > 1)]
    yield "warning", "patients in file names", split, mixed


def _of_probes(probes: pd.DataFrame) -> Iterator[Finding]:
    if probes.empty:
        yield "info", "shortcut probes", "too few slices in a class to train probes", None
    for row in probes.itertuples(index=False):
        message = f"macro F1 {row.macro_f1:.2f} ({row.low:.2f} to {row.high:.2f}), chance {row.chance:.2f}"
        message += f", best at {row.best_class}: a model may read the class without the lungs" * row.flagged
        yield "warning" if row.flagged else "info", f"probe, {row.probe}", message, None
