"""The run record: one folder a training run, from which every table and figure can be computed again.

`<runs>/<name>/` holds `run.json` (what was done), `history.csv` (one row an epoch), `predictions.csv` (one
row a slice: path, split, label, the patient where known, one probability a class) and `head.safetensors` or
`model.safetensors` (the weights).
"""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from ctutils.base import CTError, in_use, read_json, write_json
from ctutils.pictures import DEPTHS
from ctutils.plan import Plan

SCORES = ("loss", "accuracy", "macro_f1")
HISTORY_COLUMNS = ("epoch", "lr", *(f"{phase}_{name}" for phase in ("train", "val") for name in SCORES), "seconds")
TENSOR_FILES = ("head.safetensors", "model.safetensors")
RECORD_FILES = (*TENSOR_FILES, "history.csv", "predictions.csv", "run.json")  # in the order of their writing
REFERENCE_FILE = "reference.safetensors"  # kept beside a record by the optional room `people`; goes with its record
NUMBER, OPEN = (int, float), type(None)
SCHEMA = (  # types, and the keys of run.json that are of them; a dot goes inside
    (str, "created profile device bn trained precision data.name data.kind data.fingerprint"),
    (str, "weights.kind weights.source weights.sha256 weights.note"),
    ((str, OPEN), "git_commit data.shortcut"),
    (bool, "standardised interrupted data.test_from_val"),
    (int, "best_epoch parameters.trained parameters.frozen rows.history rows.predictions"),
    ((int, OPEN), "at_once weights.seed data.patients"),
    (NUMBER, "lr seconds.features seconds.train seconds.total scores.val.macro_f1"),
    (list, "classes"),
    ((list, OPEN), "lr_range"),
    (dict, "plan data.counts"),
    ((dict, OPEN), "data.window"),
)


@dataclass(frozen=True, eq=False)
class Run:
    """One record, read back and checked."""

    name: str
    record: dict  # run.json
    plan: Plan  # of run.json, with the values that the settings gave
    history: pd.DataFrame  # HISTORY_COLUMNS
    predictions: pd.DataFrame  # path, split, label, perhaps patient, p_<class> ...
    folder: Path
    tensors_path: Path | None

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; label k is classes[k]."""
        return tuple(self.record["classes"])

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have predictions, in the order of the file."""
        return tuple(self.predictions["split"].unique())

    def of_split(self, split: str) -> pd.DataFrame:
        """Return the rows of predictions.csv of one split.

        Raises:
            CTError: the record has no predictions for the split.
        """
        rows = self.predictions[self.predictions["split"] == split]
        if rows.empty:
            found = f"no '{split}' predictions in the record '{self.name}'"
            raise CTError(found, f"one of {', '.join(self.splits)}", "ask for another split")
        return rows.reset_index(drop=True)

    def y_true(self, split: str) -> np.ndarray:
        """Return the labels of a split, int64 (N,)."""
        return self.of_split(split)["label"].to_numpy(np.int64)

    def y_score(self, split: str) -> np.ndarray:
        """Return the probabilities of a split, float64 (N, C); rows as `y_true`."""
        return self.of_split(split)[[f"p_{name}" for name in self.classes]].to_numpy(np.float64)

    def patients(self, split: str) -> np.ndarray | None:
        """Return the patients of a split, str (N,), "" where unknown; None where none is known."""
        rows = self.of_split(split)
        known = "patient" in rows and (rows["patient"] != "").any()
        return rows["patient"].to_numpy(str) if known else None

    def load_tensors(self) -> dict[str, np.ndarray]:
        """Read the stored weights as numpy arrays.

        Raises:
            CTError: the record has none, or the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if self.tensors_path is None:
            raise CTError(f"no weights in the record '{self.name}'", " or ".join(TENSOR_FILES), "train it again")
        try:
            return load_file(self.tensors_path)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.tensors_path, str(error)) from error


def claim(folder: str | Path):
    """Hold a record's name while training, so that no second run writes the same record; use it in `with`.

    The lock file stays behind, empty; what holds is the process.

    Raises:
        CTError: another run holds the name.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0).acquire()
    except Timeout as error:
        mend = "wait for it, or choose another name with --out"
        raise CTError(f"the record '{folder.name}' held by another run", "one run at a time", mend) from error


def check_replaceable(folder: str | Path, fingerprint: str | None = None) -> None:
    """Raise CTError unless a record may be written here: a record replaces only what a record consists of.

    Args:
        fingerprint: of the new record's slices, if it may replace a record of the same slices only.
    """
    folder = Path(folder)
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name] * folder.exists()
    by_themselves = (".DS_Store", ".ipynb_checkpoints", "Thumbs.db")
    known = (*RECORD_FILES, REFERENCE_FILE, *by_themselves)
    if foreign := [name for name in held if name not in known and not name.startswith(".tmp-")]:
        raise CTError(
            f"'{folder}', which holds something else than a run record ({', '.join(foreign[:3])})",
            "a new folder or an older record",
            "choose another folder for the record; this one was left as it was",
        )
    for name in held:
        try:
            os.rename(folder / name, folder / name)  # does nothing, and fails where the record could not be replaced
        except PermissionError as error:
            raise in_use(folder / name, error) from error
    if fingerprint and "run.json" in held:
        try:
            data = load_run(folder).record["data"]
        except CTError:  # damaged: nothing to keep
            return
        if data["fingerprint"] != fingerprint:
            found = (
                f"the record '{folder.name}' of other slices (of '{data['name']}', or the same folder before a change)"
            )
            raise CTError(
                found, "a new name, or a record of the same slices", "give another --out, or remove the record"
            )


def save_run(
    folder: str | Path,
    record: dict,
    history: pd.DataFrame,
    predictions: pd.DataFrame,
    tensors: dict | None = None,
) -> Path:
    """Write a run record; the files of an older one are replaced when all new ones are whole.

    Args:
        folder: `<runs>/<name>`; made here.
        record: the content of run.json, see `SCHEMA`; created, versions, git_commit, name and rows are added.
        history: one row an epoch, with `HISTORY_COLUMNS`.
        predictions: from `predictions_table`.
        tensors: name -> torch tensor: of the head alone, or of the whole network if `record["trained"]` says so.
    Returns:
        The folder.
    Raises:
        CTError: a value that a record cannot hold, other files in the folder, or the disk is full.
    """
    from safetensors.torch import save_file

    folder = Path(folder).absolute()
    check_replaceable(folder)
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    about = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}
    about |= {"git_commit": _git_commit(), "rows": {"history": len(history), "predictions": len(predictions)}}
    text = json.dumps({**about, **record, "name": folder.name}, default=lambda value: value.tolist())  # of numpy's
    record = json.loads(text, parse_constant=lambda text: None)  # JSON has no NaN
    _check_record(record, "the new record")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        write_json(temporary / "run.json", record)
        history.to_csv(temporary / "history.csv", index=False, encoding="utf-8")
        # Eight digits: float32 has no more to say, and records are committed.
        predictions.to_csv(temporary / "predictions.csv", index=False, encoding="utf-8", float_format="%.8g")
        if tensors is not None:
            save_file(tensors, temporary / TENSOR_FILES[record["trained"] != "head"])
        (folder / "run.json").unlink(missing_ok=True)  # a record cut off from here on shows as damaged
        (folder / REFERENCE_FILE).unlink(missing_ok=True)
        for name in RECORD_FILES:
            (folder / name).unlink(missing_ok=True)
            if (temporary / name).exists():
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_run(folder: str | Path) -> Run:
    """Read a run record and check it.

    Raises:
        CTError: the folder or one of its files is missing or damaged; the text names the file.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise CTError(f"no run record '{folder}'", "a folder with run.json", "check the name, or train that run")
    record = read_json(folder / "run.json")
    plan = _check_record(record, f"'{folder / 'run.json'}'")
    scores, tables = [f"p_{name}" for name in record["classes"]], {}
    wanted = {"history": list(HISTORY_COLUMNS), "predictions": ["label", *scores]}
    for name, numbers in wanted.items():
        path, rows, texts = folder / f"{name}.csv", record["rows"][name], {"path": str, "split": str, "patient": str}
        try:  # a class folder may be called "NA", which must not become a missing value
            table = pd.read_csv(path, encoding="utf-8", dtype=texts, keep_default_na=name == "history")
            table[numbers].to_numpy(np.float64)
            if len(table) != max(rows, 1):
                raise ValueError(f"{len(table)} rows of {max(rows, 1)}")
            if name == "predictions":
                _check_predictions(table, table[scores].to_numpy(), len(scores))
        except (ValueError, KeyError, OSError) as error:  # of pandas, too
            raise _damaged(path, str(error)) from error
        tables[name] = table
    tensors = [folder / name for name in TENSOR_FILES if (folder / name).is_file()]
    return Run(folder.name, record, plan, **tables, folder=folder, tensors_path=tensors[0] if tensors else None)


def list_runs(runs_dir: str | Path) -> tuple[list[Run], list[str]]:
    """Read every record of a folder, sorted by name.

    Returns:
        The good records, and one sentence for each bad one. A folder that does not exist holds none.
    """
    runs, problems = [], []
    folders = {path.parent for name in RECORD_FILES for path in Path(runs_dir).glob(f"*/{name}")}
    for folder in sorted(path for path in folders if not path.name.startswith(".")):
        try:
            runs.append(load_run(folder))
        except CTError as error:
            problems.append(f"{folder.name}: {error}")
    return runs, problems


def predictions_table(folder, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return the content of predictions.csv: one row a slice.

    Args:
        folder: `SliceFolder`.
        scores: {split: y_score float (n, C)}, rows in the order of the split's slices.
    Source: notebook 03, section 6.
    """
    columns = ["path", "split", "label"] + (["patient"] if (folder.slices["patient"] != "").any() else [])
    slices, parts = folder.slices, []
    if "shown" in slices:  # of two data sets: below their names, not below where both of them stand
        slices = slices.assign(path=slices["shown"])
    for split, y_score in scores.items():
        part = slices.loc[folder.rows(split), columns].reset_index(drop=True)
        part[[f"p_{name}" for name in folder.classes]] = np.asarray(y_score, dtype=np.float64)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


# ---------------------------------------------------------------- checks


def _check_record(record: dict, where: str) -> Plan:
    """Return the record's plan, or raise CTError that names the keys that are wrong."""
    wrong = []
    for kinds, key in ((kinds, key) for kinds, keys in SCHEMA for key in keys.split()):
        value = record
        for part in key.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        good = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
        if not good or (isinstance(value, NUMBER) and not abs(value) < 1e15):
            wrong.append(key)
    if not wrong:
        names, counts, window = record["classes"], record["data"]["counts"], record["data"]["window"]
        if not all(isinstance(name, str) for name in names) or not len(set(names)) == len(names) > 1:
            wrong.append("classes")
        of_class = [
            value for split in counts.values() for value in (split.values() if isinstance(split, dict) else "?")
        ]
        if not all(isinstance(count, int) for count in of_class):
            wrong.append("data.counts")
        match window:
            case None | {"level": int() | float(), "width": int() | float(), "unit": str()}:
                pass
            case _:
                wrong.append("data.window")
        match {"depth": "", "notes": [], **record["data"]}:  # records of older versions have neither
            case {"depth": str(depth), "notes": list(notes)} if all(isinstance(note, str) for note in notes):
                wrong += ["data.depth"] * (depth not in ("", *DEPTHS))
            case _:
                wrong.append("data.depth, data.notes")
    if wrong:
        raise CTError(f"{where} without a right {', '.join(wrong)}", "the keys of a run record", "train it again")
    try:
        plan = Plan(**record["plan"])
        if None in (plan.epochs, plan.batch_size, plan.size):
            raise TypeError("epochs, batch_size or size is open")
    except (TypeError, CTError) as error:  # TypeError: an unknown field
        raise CTError(f"{where} with another plan ({error})", "the fields of a plan", "train it again") from error
    return plan


def _check_predictions(table: pd.DataFrame, scores: np.ndarray, classes: int) -> None:
    """Raise ValueError unless predictions.csv says of each slice once what it is and how probable each class is."""
    for wrong, why in (
        (not {"path", "split"} <= set(table), "no path or no split"),
        (not table["label"].isin(range(classes)).all(), f"a label that is not 0 to {classes - 1}"),
        (not (np.abs(scores.sum(1) - 1) < 1e-3).all(), "probabilities that do not sum to 1"),
        (scores.min() < 0, "a probability below 0"),
        (table["path"].duplicated().any(), "a slice twice"),
    ):
        if wrong:
            raise ValueError(why)


def _damaged(path: Path, why: str) -> CTError:
    return CTError(f"the damaged file '{path}' ({why.strip()})", "a complete run record", "train this run again")


def _git_commit() -> str | None:
    """Return the commit of this package's source, or None outside a git checkout or without git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
