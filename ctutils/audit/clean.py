"""A cleaned copy of a data set: no copies, no leaks, sound splits."""

import contextlib
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pandas as pd

from ctutils.audit.duplicates import group_slices, near_duplicates
from ctutils.audit.look import Decoded
from ctutils.audit.report import AuditReport, audit
from ctutils.base import CTError, progress, write_json
from ctutils.data import SPLITS, share_out


def clean_copy(root: str | Path, out: str | Path, report: AuditReport | None = None, *, seed: int = 0) -> Path:
    """Write a cleaned copy of a data set; the source is only read, and `out` is complete or absent.

    Left out: unreadable files; of exact copies all but the first; all slices whose exact copy, or whose near
    twin of no known common patient, has another class, since nobody can tell which is right. When a patient
    or a group of twins lies in two splits, all splits are drawn anew, group by group, with the old shares and
    the classes alike; otherwise they stay. findings.csv and patients.csv follow with the new paths.
    dataset.json says what was left out and which file came from where.

    Args:
        root: the data set.
        out: folder that does not exist or is empty, outside `root`.
        report: of `audit(root)`, made here if absent.
        seed: of the new splits.
    Returns:
        `out`.
    Raises:
        CTError: `out` is inside `root` or not empty, the layout is broken, or too few groups of a class are
            left for the splits.
    Source: notebook 01.
    """
    root, out = Path(root), Path(out)
    if out.resolve().is_relative_to(root.resolve()):
        raise CTError(f"the output '{out}' inside the data set '{root}'", "another folder", "choose a folder outside")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CTError(f"'{out}', which is not empty", "a new or empty folder", "choose another name")
    report = report or audit(root, probes=False)
    if "slices" not in report.tables:
        message = report.findings["message"].iloc[0]
        raise CTError(f"a data set that cannot be read: {message}", "split and class folders", "mend the layout first")
    slices = report.tables["slices"]
    why, kept = _settle(slices, report.tables["near"], report.decoded)
    splits = [split for split in SPLITS if (slices["split"] == split).any()]
    name = kept["path"].str.split("/").str[2:].str.join("/")
    groups = [table.groupby("group")["split"] for table in (slices[slices["problem"] == ""], kept)]
    rebuilt = any((splits_of.nunique() > 1).any() for splits_of in groups)
    if rebuilt:
        name = kept["split"] + "_" + name  # two files of one name may meet
        shares = slices["split"].value_counts(normalize=True)[splits].to_dict()
        kept = kept.assign(split=share_out(kept["class"].tolist(), kept["group"].tolist(), shares, seed))
    missing = set(itertools.product(splits, slices["class"])) - set(zip(kept["split"], kept["class"], strict=True))
    if missing:
        found = "nothing left of " + ", ".join(f"{name} in {split}" for split, name in sorted(missing))
        raise CTError(found, "slices of each class in each split", "add slices, or mend the labels by hand")
    kept = kept.assign(new=kept["split"] + "/" + kept["class"] + "/" + name)

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as temporary:
            made = Path(temporary, "made")
            for row in progress(list(kept.itertuples()), desc="Copying slices", unit="slice", leave=False):
                (made / row.new).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / row.path, made / row.new)
            _copy_tables(root, made, kept)
            cleaned = {
                "splits": f"drawn anew by patient or group of twins, seed {seed}" if rebuilt else "kept",
                "removed": slices.assign(why=why).loc[why != "", ["path", "why"]].to_dict("records"),
                "came_from": dict(zip(kept["new"], kept["path"], strict=True)),
            }
            facts = {"name": f"{report.name}, cleaned", "kind": report.meta.get("kind", "unknown")}
            write_json(made / "dataset.json", {**facts, "cleaned": cleaned, "source": report.meta})
            if out.exists():
                out.rmdir()  # empty; a rename onto it fails on Windows
            os.replace(made, out)
    except OSError as error:
        found = f"an error while writing '{out}' ({error})"
        raise CTError(found, "room and rights there", "mend that and run again; nothing was kept") from error
    return out


def _settle(slices: pd.DataFrame, near: pd.DataFrame, decoded: Decoded) -> tuple[pd.Series, pd.DataFrame]:
    """Return why each slice is left out, and those that stay, with a group from which nothing is split off.

    A slice's nearest twins are searched among all others: when some are left out, new ones may come up. So the
    search is repeated on what stays until nothing new is found, and the copy is clean at once.
    """
    why, searched = _reasons_to_drop(slices, near), set(slices["pixels"]) - {""}
    while True:
        stay = why == ""
        part = decoded.rows(stay.to_numpy())
        near = near[near["path_a"].isin(part.table["path"]) & near["path_b"].isin(part.table["path"])]
        if searched == set(part.table["pixels"]):
            return why, slices[stay].assign(group=group_slices(part, near))
        searched = set(part.table["pixels"])
        near = pd.concat([near, near_duplicates(part)], ignore_index=True)
        why[stay] = _reasons_to_drop(slices[stay], near)


def _reasons_to_drop(slices: pd.DataFrame, near: pd.DataFrame) -> pd.Series:
    """Return why each slice is left out, "" for those that stay."""
    why = pd.Series("", index=slices.index)
    pixels = slices["pixels"].where(slices["problem"] == "")
    first = slices["path"].groupby(pixels).transform("first")
    why[(slices["path"] != first) & pixels.notna()] = "exact copy of " + first
    wrong = near[(near["class_a"] != near["class_b"]) & ~near["same_patient"]]
    twins = pixels[slices["path"].isin([*wrong["path_a"], *wrong["path_b"]])]
    why[pixels.isin(twins)] = "a near twin has another class"
    why[slices["class"].groupby(pixels).transform("nunique") > 1] = "an exact copy has another class"
    why[slices["problem"] != ""] = "unreadable: " + slices["problem"]
    return why


def _copy_tables(root: Path, out: Path, kept: pd.DataFrame) -> None:
    """Write findings.csv with the new paths, and patients.csv with the patients that the audit knows."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # absent, or the audit has said that it cannot be read
        table = pd.read_csv(root / "findings.csv", dtype=str, keep_default_na=False, encoding="utf-8-sig")
        path = table["path"].str.strip().str.replace("\\", "/").str.removeprefix("./")
        table["path"] = path.map(kept.set_index("path")["new"])
        table = table[table["path"].notna()]
        if "split" in table:
            table = table.assign(split=table["path"].str.split("/").str[0])
        table.to_csv(out / "findings.csv", index=False, lineterminator="\n")
    known = kept[kept["patient"] != ""]
    if len(known):
        table = pd.DataFrame({"path": known["new"], "patient": known["patient"]})
        table.to_csv(out / "patients.csv", index=False, lineterminator="\n")
