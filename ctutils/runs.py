"""The run record: one folder a training run, from which every table and figure can be computed again.

`<runs>/<name>/` holds `run.json` (what was done), `history.csv` (one row an epoch), `predictions.csv` (one
row a slice: path, split, label, one probability a class) and `head.safetensors` or `model.safetensors` (the
weights). A record is written as a whole or not at all.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from ctutils import metrics
from ctutils.base import HISTORY_COLUMNS, CTError, read_json, write_json

REQUIRED = {  # key of run.json -> the keys that it must hold itself
    "data": ("name", "kind", "fingerprint", "counts", "test_from_val"),
    "classes": (),
    "profile": (),
    "backbone": (),
    "weights": ("kind", "source", "sha256", "note"),
    "bn": (),
    "standardised": (),
    "trained": (),
    "augment": (),
    "seed": (),
    "optimizer": ("name", "lr"),
    "scheduler": ("name",),
    "epochs": (),
    "batch_size": (),
    "image_size": (),
    "precision": (),
    "device": (),
    "seconds": ("features", "train", "total"),
    "parameters": ("trained", "frozen"),
    "best_epoch": (),
    "scores": ("val",),
}
TENSOR_FILES = ("head.safetensors", "model.safetensors")
ABSOLUTE = re.compile(r"""(^|[\s'"(=])(/[^/\s]+(/|$)|[A-Za-z]:[\\/]|\\\\|file:)""")  # inside a text, too

_held: dict[Path, tuple[int, int]] = {}  # lock file -> (pid, thread) of this process's own claims
_guard = threading.Lock()  # _held and the lock file change together


@dataclass(frozen=True, eq=False)
class Run:
    """One record, read back and checked."""

    name: str
    record: dict  # run.json
    history: pd.DataFrame  # HISTORY_COLUMNS
    predictions: pd.DataFrame  # path, split, label, p_<class> ...
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
            raise CTError(
                f"no '{split}' predictions in the record '{self.name}'",
                f"one of {', '.join(self.splits)}",
                f"ask for another split, or train again with a '{split}' split",
            )
        return rows.reset_index(drop=True)

    def y_true(self, split: str) -> np.ndarray:
        """Return the labels of a split, int64 (N,)."""
        return self.of_split(split)["label"].to_numpy(np.int64)

    def y_score(self, split: str) -> np.ndarray:
        """Return the probabilities of a split, float64 (N, C); rows as `y_true`."""
        return self.of_split(split)[[f"p_{name}" for name in self.classes]].to_numpy(np.float64)

    def load_tensors(self) -> dict[str, np.ndarray]:
        """Read the stored weights as numpy arrays.

        Raises:
            CTError: the record has none, or the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        if self.tensors_path is None:
            raise CTError(f"no weights in the record '{self.name}'", " or ".join(TENSOR_FILES), "train it again")
        try:
            return load(self.tensors_path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise _damaged(self.tensors_path, str(error)) from error


def new_record(**fields) -> dict:
    """Return the content of a run.json: `fields`, plus created, versions and git_commit where not given.

    Numpy numbers become plain ones and NaN becomes null.

    Raises:
        CTError: a key of `REQUIRED` is missing, or a text holds an absolute path.
    """
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "git_commit": _git_commit(),
        **fields,
    }
    record = _plain(record)
    _check_record(record, "the new record")
    _refuse_absolute(record)
    return record


@contextlib.contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Hold a record's name while training, so that no second run writes the same record.

    A lock file `<name>.lock` beside the record holds pid and host. The same thread may claim again inside.
    The lock of a process of this machine that no longer lives is taken over.

    Raises:
        CTError: another run holds the name; or the disk is full.
    """
    folder = Path(folder).absolute()
    lock = folder.with_name(folder.name + ".lock")
    me = (os.getpid(), threading.get_ident())
    if _held.get(lock) == me:
        yield
        return
    with _friendly(folder):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with _guard:
            _take(lock, folder.name)
            _held[lock] = me
    try:
        yield
    finally:
        with _guard:
            _held.pop(lock, None)
            lock.unlink(missing_ok=True)


def save_run(
    folder: str | Path,
    record: dict,
    history: pd.DataFrame,
    predictions: pd.DataFrame,
    tensors: dict | None = None,
    tensors_name: str = "head.safetensors",
) -> Path:
    """Write a run record as a whole; an older one of that name is replaced at the very end.

    Args:
        folder: `<runs>/<name>`; made here.
        record: from `new_record`.
        history: one row an epoch, with `HISTORY_COLUMNS` (more are kept).
        predictions: path (relative, posix), split, label int in [0, C), p_<class> in [0, 1] for each class.
        tensors: name -> torch tensor or numpy array.
        tensors_name: one of `TENSOR_FILES`.
    Returns:
        The folder.
    Raises:
        CTError: wrong columns or values, an absolute path, another run holds the name, or the disk is full.
            An older record is then still there.
    """
    folder = Path(folder).absolute()
    if tensors_name not in TENSOR_FILES:
        raise CTError(f"the tensors' name '{tensors_name}'", " or ".join(TENSOR_FILES), "use one of the two")
    rows = {"history": len(history), "predictions": len(predictions)}  # a file cut short shows
    record = _plain({**record, "name": folder.name, "rows": rows})
    _check_record(record, "the record")
    _refuse_absolute(record)
    _check_history(history, "history")
    _check_predictions(predictions, record["classes"], "predictions")
    content = None if tensors is None else _tensor_bytes(tensors)

    with claim(folder), _friendly(folder):
        _restore_interrupted(folder)
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
        temporary.mkdir()
        try:
            write_json(temporary / "run.json", record)
            history.to_csv(temporary / "history.csv", index=False, encoding="utf-8")
            # Eight digits: float32 has no more to say, and records are committed.
            predictions.to_csv(temporary / "predictions.csv", index=False, encoding="utf-8", float_format="%.8g")
            if content is not None:
                (temporary / tensors_name).write_bytes(content)
            _replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_run(folder: str | Path) -> Run:
    """Read a run record and check it.

    Raises:
        CTError: the folder or one of its files is missing or damaged; the text names the file.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir() and _older(folder).is_dir():  # a save died between its two renames
        with claim(folder):
            _restore_interrupted(folder)
    if not folder.is_dir():
        raise CTError(f"no run record '{folder}'", "a folder with run.json", "check the name, or train that run")
    record = read_json(folder / "run.json")
    _check_record(record, f"'{folder / 'run.json'}'")
    history = _read_csv(folder / "history.csv")
    _check_history(history, f"'{folder / 'history.csv'}'")
    predictions = _read_csv(folder / "predictions.csv")
    _check_predictions(predictions, record["classes"], f"'{folder / 'predictions.csv'}'")
    for table, name in ((history, "history"), (predictions, "predictions")):
        rows = record.get("rows", {}).get(name, len(table))
        if rows != len(table):
            raise _damaged(folder / f"{name}.csv", f"{len(table)} rows of {rows}")
    tensors = [folder / name for name in TENSOR_FILES if (folder / name).is_file()]
    if tensors:
        _check_tensors(tensors[0])
    return Run(folder.name, record, history, predictions, folder, tensors[0] if tensors else None)


def list_runs(runs_dir: str | Path) -> tuple[list[Run], list[str]]:
    """Read every record of a folder, sorted by name.

    Returns:
        The good records, and one sentence for each bad one. A folder that does not exist holds none.
    """
    runs, problems = [], []
    runs_dir = Path(runs_dir)
    parts = ("run.json", "history.csv", "predictions.csv", *TENSOR_FILES)  # a folder with none of them is no record
    folders = {path.parent for name in parts for path in runs_dir.glob(f"*/{name}")}
    folders = {path for path in folders if not path.name.startswith(".")}
    folders |= {path.with_name(path.name.removeprefix(".old-")) for path in runs_dir.glob(".old-*")}
    for folder in sorted(folders):
        try:
            runs.append(load_run(folder))
        except (CTError, OSError) as error:
            problems.append(f"{folder.name}: {error}")
    return runs, problems


# ---------------------------------------------------------------- making one


def predictions_table(folder, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return the content of predictions.csv: one row a slice.

    Args:
        folder: `SliceFolder`.
        scores: {split: y_score float (n, C)}, rows in the order of the split's slices.
    Raises:
        CTError: a split with another number of rows.
    Source: notebook 05, "the run record".
    """
    parts, slices = [], folder.slices.assign(path=folder.slices.get("shown", folder.slices["path"]))
    for split, y_score in scores.items():
        part = slices.loc[slices["split"] == split, ["path", "split", "label"]].reset_index(drop=True)
        if len(part) != len(y_score):
            raise CTError(f"{len(y_score)} scores for '{split}'", f"{len(part)}", "score every slice, in order")
        part[[f"p_{name}" for name in folder.classes]] = np.asarray(y_score, dtype=np.float64)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def describe_run(
    folder, settings, *, weights, result, optimizer, scheduler, predictions: pd.DataFrame, **fields
) -> dict:
    """Return a run.json: what was trained on what, how, and with which scores.

    Args:
        folder: `SliceFolder`; settings: `Settings`; weights: `WeightsInfo`; result: `TrainResult`.
        optimizer, scheduler: as given to `train_model`; their names and numbers are read from them.
        predictions: from `predictions_table`; the scores are computed from it.
        fields: the other keys of `REQUIRED`: backbone, bn, standardised, trained, augment, seed, epochs, ...
    Raises:
        CTError: a key is missing.
    Source: notebook 05, "the run record".
    """
    from dataclasses import asdict

    counts = {split: {name: int(n) for name, n in row.items()} for split, row in folder.counts().items()}
    step_size = {key: getattr(scheduler, key) for key in ("step_size", "gamma", "T_max") if hasattr(scheduler, key)}
    return new_record(
        data={
            "name": folder.name,
            "kind": folder.kind,
            "fingerprint": folder.fingerprint,
            "counts": counts,
            "test_from_val": bool(folder.meta.get("test_from_val", False)),
            "shortcut": folder.meta.get("arguments", {}).get("shortcut"),
        },
        classes=list(folder.classes),
        profile=settings.profile.name,
        device=settings.device,
        weights=asdict(weights),
        optimizer={"name": type(optimizer).__name__, "lr": optimizer.defaults["lr"]},
        scheduler={"name": type(scheduler).__name__ if scheduler else "none", **step_size},
        best_epoch=result.best_epoch,
        interrupted=result.interrupted,
        scores={
            split: _scores(rows, folder.classes, interval=split == "test")
            for split, rows in predictions.groupby("split", sort=False)
        },
        **fields,
    )


def _scores(rows: pd.DataFrame, classes: tuple[str, ...], interval: bool) -> dict:
    y_true = rows["label"].to_numpy(np.int64)
    y_pred = rows[[f"p_{name}" for name in classes]].to_numpy().argmax(1)
    scores = {
        "macro_f1": metrics.macro_f1(y_true, y_pred, len(classes)),
        "accuracy": metrics.accuracy(y_true, y_pred),
    }
    if interval:
        found = metrics.bootstrap_interval(y_true, y_pred, num_classes=len(classes))
        scores["low"], scores["high"] = found.low, found.high
        matrix = metrics.confusion(y_true, y_pred, len(classes))
        f1 = 2 * matrix.diagonal() / np.maximum(matrix.sum(0) + matrix.sum(1), 1)
        scores["per_class"] = dict(zip(classes, f1.tolist(), strict=True))
    return scores


# ---------------------------------------------------------------- checks


def _check_record(record: dict, where: str) -> None:
    missing = [key for key in REQUIRED if key not in record]
    for key, inner in REQUIRED.items():
        if inner and isinstance(record.get(key), dict):
            missing += [f"{key}.{name}" for name in inner if name not in record[key]]
        elif inner and key in record:
            missing.append(f"{key} as an object")
    classes = record.get("classes")
    if "classes" not in missing and not (isinstance(classes, list) and len(set(map(str, classes))) == len(classes) > 1):
        missing.append("classes as a list of two or more names")
    if missing:
        raise CTError(f"{where} without {', '.join(missing)}", "every key of a run record", "train this run again")


def _check_history(history: pd.DataFrame, where: str) -> None:
    missing = [name for name in HISTORY_COLUMNS if name not in history.columns]
    if missing or history.empty:
        what = f"without {', '.join(missing)}" if missing else "without a row"
        raise CTError(f"{where} {what}", f"one row an epoch with {', '.join(HISTORY_COLUMNS)}", "train this run again")


def _check_predictions(predictions: pd.DataFrame, classes: list[str], where: str) -> None:
    scores = [f"p_{name}" for name in classes]
    missing = [name for name in ("path", "split", "label", *scores) if name not in predictions.columns]
    if missing:
        raise CTError(f"{where} without {', '.join(missing)}", "path, split, label, p_<class>", "train this run again")
    labels = pd.to_numeric(predictions["label"], errors="coerce").to_numpy(np.float64)
    values = predictions[scores].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    paths = predictions["path"].astype(str)
    if predictions.empty:
        problem = "without a row"
    elif not np.isin(labels, range(len(classes))).all():
        problem = f"with a label that is not 0 to {len(classes) - 1}"
    elif not np.isfinite(values).all() or np.abs(values.sum(axis=1) - 1).max() > 1e-3 or values.min() < 0:
        problem = "with probabilities that are not finite, below 0 or do not sum to 1"
    elif paths.map(lambda path: bool(ABSOLUTE.match(path))).any():
        problem = "with an absolute path"
    elif paths.duplicated().any():
        problem = f"with '{paths[paths.duplicated()].iloc[0]}' twice"
    else:
        return
    raise CTError(f"{where} {problem}", "one row a slice: path, split, label, p_<class>", "train this run again")


def _refuse_absolute(value: object, key: str = "") -> None:
    """Raise when a text anywhere in `value` holds an absolute path: a record must not name one machine."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_absolute(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _refuse_absolute(inner, key)
    elif isinstance(value, str) and ABSOLUTE.search(value):
        raise CTError(f"the absolute path '{value}' in {key}", "names or relative paths", "store the name only")


def _plain(value: object) -> object:
    """Turn numpy values, tuples, paths and NaN into what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _read_csv(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise CTError(f"no file '{path}'", "a complete run record", "train this run again")
    try:  # a class folder may be called "NA", which must not become a missing value
        return pd.read_csv(
            path,
            encoding="utf-8",
            dtype={"path": str, "split": str},
            keep_default_na=path.name != "predictions.csv",
        )
    except (
        ValueError,
        OSError,
    ) as error:  # a ParserError is a ValueError, too
        raise _damaged(path, str(error)) from error


def _check_tensors(path: Path) -> None:
    """Raise when the header and the size of a safetensors file do not agree; reads the header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> CTError:
    return CTError(f"the damaged file '{path}' ({why.strip()})", "a complete run record", "train this run again")


# ---------------------------------------------------------------- writing


def _tensor_bytes(tensors: dict) -> bytes:
    """Serialise as safetensors in memory, so that a full disk shows as a plain OSError while writing."""
    from safetensors.numpy import save

    arrays = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "detach"):  # torch, without importing it; numpy has no bfloat16
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
            tensor = tensor.numpy()
        array = np.asarray(tensor)
        arrays[name] = np.ascontiguousarray(array).reshape(array.shape)  # which alone would make 0-d into 1-d
    return save(arrays)


def _older(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`; on failure the older record stays."""
    older = _older(folder)
    if folder.exists():
        os.rename(folder, older)  # a folder with content cannot be replaced in one step
    try:
        os.rename(temporary, folder)
    except OSError:
        if older.exists():
            os.rename(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _restore_interrupted(folder: Path) -> None:
    """Bring back the older record if a save died between the two renames; call it with the claim held."""
    older = _older(folder)
    if older.is_dir() and not folder.exists():
        os.rename(older, folder)
    else:
        shutil.rmtree(older, ignore_errors=True)


@contextlib.contextmanager
def _friendly(folder: Path) -> Iterator[None]:
    """Turn a full disk and a folder that may not be written into a CTError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CTError(
                f"the folder '{folder.parent}' that may not be written ({error.strerror})",
                "a folder of your own for the records",
                "choose another folder, or ask for the right to write there",
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CTError(
            f"a full disk while writing the record '{folder.name}'",
            f"room in '{folder.parent}'",
            "free some space and save again; an older record of this name is still there",
        ) from error


# ---------------------------------------------------------------- lock


def _take(lock: Path, name: str) -> None:
    """Make the lock file, or raise who holds it."""
    for _ in range(2):  # the second time after a dead process's lock was cleared away
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _clear_if_dead(lock, name)
            continue
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
            return
        except OSError:
            lock.unlink(missing_ok=True)
            raise
    raise _busy(lock, name, "another run")


def _clear_if_dead(lock: Path, name: str) -> None:
    """Move the lock of a dead process away; raise when its owner lives or cannot be known."""
    try:
        before = lock.read_bytes()
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return  # released meanwhile
    try:
        owner = json.loads(before)
        pid, host = int(owner["pid"]), str(owner["host"])
    except (ValueError, KeyError, TypeError) as error:  # not yet written, or cut short when its owner died
        if age < 10:
            raise _busy(lock, name, "a run that is just starting") from error
    else:
        ours = pid == os.getpid() and lock not in _held  # an earlier process had our pid (containers)
        if host != socket.gethostname() or (_is_alive(pid) and not ours):
            raise _busy(lock, name, f"process {pid} on {host}")
    # Rename before deleting: if another process took over meanwhile, its new lock is put back untouched.
    aside = lock.with_name(f".{lock.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        os.rename(lock, aside)
    except FileNotFoundError:
        return
    if aside.read_bytes() != before and not lock.exists():
        os.rename(aside, lock)
        raise _busy(lock, name, "another run")
    aside.unlink(missing_ok=True)


def _busy(lock: Path, name: str, owner: str) -> CTError:
    return CTError(
        f"the record '{name}' held by {owner}",
        "one run at a time in a record",
        f"wait for it, choose another name, or delete '{lock}' if that run is dead",
    )


def _is_alive(pid: int) -> bool:
    """Tell whether a process of this machine lives."""
    if os.name == "nt":  # os.kill(pid, 0) would end it there
        import ctypes

        kernel = ctypes.windll.kernel32
        handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return kernel.GetLastError() == 5  # access denied: it lives, but is not ours
        code = ctypes.c_ulong()
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return code.value == 259  # STILL_ACTIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- where a run was made


def _versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that decide the numbers, without importing them."""
    import platform

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git_commit() -> str | None:
    """Return the commit of this package's source, or None outside a git checkout or without git."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 and result.stdout.strip() else None
