"""What is known of the files of a data set: one row a file, in one file of columns."""

import concurrent.futures
import contextlib
import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from ctutils.base import CTError, atomic_path, progress
from ctutils.pictures import BadFile, look, quiet, read_file

COLUMNS = ("width", "height", "mode", "frames", "depth", "warned", "bytes", "sha256", "problem")
NUMBERS = ("width", "height", "frames", "bytes")
TEXTS = tuple(name for name in COLUMNS if name not in NUMBERS)
AT_ONCE = 4096  # files whose facts wait in memory


def file_facts(root: Path, paths: list[str], cache: Path) -> pd.DataFrame:
    """Return what `look` says of every file, its size, SHA-256 and what is wrong with it: one row a path.

    An index in the cache knows files whose size and times have not changed.
    """
    index = cache / "index" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}-3.npz"
    files, stamps = [os.path.join(root, path) for path in paths], np.zeros((len(paths), 3), np.int64)
    for row, file in enumerate(files):
        with contextlib.suppress(OSError):  # a link that leads nowhere
            stat = os.stat(file)
            # The change time moves with every write, also when a tool sets the modification time back.
            stamps[row] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    known = _read_index(index)
    place = pd.Index(known["path"]).get_indexer(paths)  # -1 where unknown
    same = place >= 0
    same[same] = (known["stamp"][place[same]] == stamps[same]).all(1)
    facts, new = {}, np.flatnonzero(~same)
    for name in COLUMNS:
        facts[name] = np.zeros(len(paths), np.int64 if name in NUMBERS else object)
        facts[name][same] = known[name][place[same]]
    if len(new) or len(known["path"]) > len(paths):
        with (
            quiet(),
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
            progress(total=len(new), desc="Reading files", leave=False) as bar,
        ):
            for some in np.split(new, range(AT_ONCE, len(new), AT_ONCE)):
                for row, fact in zip(some, pool.map(read_fact, [files[row] for row in some]), strict=True):
                    for name, value in fact.items():
                        facts[name][row] = value
                    bar.update()
        with contextlib.suppress(OSError, CTError), atomic_path(index) as temporary:  # only an optimisation
            texts = {name: _pack(facts[name]) for name in TEXTS} | {"path": _pack(paths)}
            np.savez(temporary, stamp=stamps, **{name: facts[name] for name in NUMBERS}, **texts)
    return pd.DataFrame(facts)


def read_fact(path: str) -> dict:
    """Return the facts of one file; `problem` says why it cannot be read."""
    fact: dict = dict.fromkeys(NUMBERS, 0) | dict.fromkeys(TEXTS, "")
    try:
        content = read_file(path)
        fact |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        fact |= look(io.BytesIO(content))
    except BadFile as error:
        fact["problem"] = str(error)
    return fact


def _read_index(index: Path) -> dict[str, np.ndarray]:
    """Return the columns of the index; empty ones where it is absent or damaged."""
    try:
        with np.load(index) as stored:
            known = {name: stored[name] for name in ("stamp", *NUMBERS)}
            count = len(known["stamp"])
            known |= {name: _unpack(stored[name]) for name in ("path", *TEXTS)}
        if all(len(column) == count for column in known.values()) and known["stamp"].shape == (count, 3):
            return known
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    columns = {name: np.empty(0, object) for name in ("path", *TEXTS)}
    return columns | {name: np.empty(0, np.int64) for name in NUMBERS} | {"stamp": np.empty((0, 3), np.int64)}


def _pack(texts) -> np.ndarray:
    """Return texts as bytes, uint8 (...), each ended by a zero."""
    text = "".join(f"{text.replace(chr(0), ' ')}\0" for text in texts)
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def _unpack(values: np.ndarray) -> np.ndarray:
    """Return the texts again, object (N,)."""
    texts = values.tobytes().decode("utf-8", "surrogatepass").split("\0")[:-1]
    known: dict[str, str] = {}  # equal ones are kept once
    return np.array([known.setdefault(text, text) for text in texts], object)
