"""A cleaned copy of a data set: no copies, no leaks, sound splits."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from ctutils.audit.probes import grouped_folds
from ctutils.audit.report import AuditReport, as_posix, audit
from ctutils.base import CTError, progress, write_json
from ctutils.data import SPLITS


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
    reasons = _reasons_to_drop(slices, report.tables["near"])
    kept = slices[reasons == ""]
    rebuilt = bool((slices[slices["problem"] == ""].groupby("group")["split"].nunique() > 1).any())
    shares = slices["split"].value_counts(normalize=True)
    kept = kept.assign(new_split=_new_splits(kept, shares, seed) if rebuilt else kept["split"])
    kept = kept.assign(new_path=_new_paths(kept))
    missing = [
        f"{c} in {s}"
        for s in shares.index
        for c in sorted(set(slices["class"]))
        if not ((kept["new_split"] == s) & (kept["class"] == c)).any()
    ]
    if missing:
        found = f"nothing left of {', '.join(missing)}"
        raise CTError(found, "slices of each class in each split", "add slices, or mend the labels by hand")

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=out.parent))
    try:
        for row in progress(list(kept.itertuples(index=False)), desc="Copying slices", unit="slice", leave=False):
            target = temporary / row.new_path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / row.path, target)
        _copy_tables(root, temporary, kept)
        _write_meta(root, temporary, slices.assign(why=reasons), kept, rebuilt, seed)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()  # empty; a rename onto it fails on Windows
        os.replace(temporary, out)
    except OSError as error:
        found = f"an error while writing '{out}' ({error})"
        raise CTError(found, "room and rights there", "mend that and run again; nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


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


def _new_splits(kept: pd.DataFrame, shares: pd.Series, seed: int) -> np.ndarray:
    """Share groups out to the splits: 20 folds (fewer when a class is small), of which val and test get some."""
    splits = [split for split in SPLITS if split in shares.index]
    per_class = kept.groupby("class")["group"].nunique()
    folds = min(20, int(per_class.min())) if len(kept) else 0
    if folds < len(splits):
        raise CTError(
            f"{folds} independent groups of slices in class '{per_class.idxmin() if folds else ''}'",
            f"one a split, {len(splits)}, where a group is a patient or slices that are twins",
            "add slices of other patients",
        )
    parts = grouped_folds(kept["label"].to_numpy(), kept["group"].to_numpy(), folds, seed)
    # A class may be missing in a fold; give val and test the folds with the most classes first.
    variety = kept.groupby(parts)["class"].nunique().reindex(range(folds), fill_value=0)
    order = iter(variety.sort_values(ascending=False, kind="stable").index)
    result = np.full(len(kept), "train", dtype=object)
    room = folds - len(splits) + 1
    for split in splits[1:]:
        wanted = min(max(1, round(float(shares[split]) * folds)), room)
        room -= wanted - 1
        result[np.isin(parts, [next(order) for _ in range(wanted)])] = split
    return result


def _new_paths(kept: pd.DataFrame) -> list[str]:
    """Return <split>/<class>/<name> of every slice; a name that is taken gets the old split in front."""
    taken: set[str] = set()
    paths = []
    for row in kept.itertuples(index=False):
        name = Path(*Path(row.path).parts[2:])
        path = Path(row.new_split, row[kept.columns.get_loc("class")], name)
        while path.as_posix().casefold() in taken:
            path = path.with_name(f"{row.split}_{path.name}")
        taken.add(path.as_posix().casefold())
        paths.append(path.as_posix())
    return paths


def _copy_tables(root: Path, out: Path, kept: pd.DataFrame) -> None:
    """Write findings.csv with the new paths, and patients.csv with the patients that the audit knows."""
    new_path = dict(zip(kept["path"], kept["new_path"], strict=True))
    try:
        table = pd.read_csv(root / "findings.csv", dtype=str, keep_default_na=False, encoding="utf-8-sig")
        path = as_posix(table["path"]).map(new_path)
    except (OSError, ValueError, KeyError):
        pass  # absent, or the audit has said that it cannot be read
    else:
        table = table.assign(path=path)[path.notna()]
        if "split" in table:
            table["split"] = table["path"].str.split("/").str[0]
        table.to_csv(out / "findings.csv", index=False, lineterminator="\n")
    known = kept.loc[kept["patient"] != "", ["new_path", "patient"]]
    if len(known):
        known.set_axis(["path", "patient"], axis=1).to_csv(out / "patients.csv", index=False, lineterminator="\n")


def _write_meta(root: Path, out: Path, slices: pd.DataFrame, kept: pd.DataFrame, rebuilt: bool, seed: int) -> None:
    try:
        meta = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        meta = {}
    meta = meta if isinstance(meta, dict) else {}
    dropped = slices[slices["why"] != ""]
    write_json(
        out / "dataset.json",
        {
            "name": f"{meta.get('name') or root.resolve().name}, cleaned",
            "kind": meta.get("kind", "unknown"),
            "cleaned": {
                "splits": f"drawn anew by patient or group of twins, seed {seed}" if rebuilt else "kept",
                "removed": dropped[["path", "why"]].to_dict("records"),
                "came_from": dict(zip(kept["new_path"], kept["path"], strict=True)),
            },
            "source": meta,
        },
    )
