"""Measure what a slice costs in sets of 1,000 to 100,000: open the set, decode the store, train a head.

    python tests/bench/scale.py [--slices 1000 10000 100000] [--folder FOLDER]

The slices are grey noise of 64 x 64 pixels, the features random numbers: what is measured is the table of files, the
store and the head's loop, which do not look at the content. Each step is a process of its own, so that its peak memory
is its own. The folder is removed at the end.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench import _resident_mb, measure, print_table, run_job

CLASSES, SIDE, WIDE = ("a", "b"), 64, 1280


def write_noise(root: Path, count: int) -> None:
    """Write grey noise, uncompressed: 80 % train, 10 % val and test, two classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        split = {8: "val", 9: "test"}.get(number % 10, "train")
        folder = root / split / CLASSES[number // 10 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8))
        noise.save(folder / f"ChestCT_{number:08d}.png", compress_level=0)


def open_set(job: dict) -> dict:
    """Open a data set; the first time reads every file, later ones the table of facts."""
    from ctutils.data import load_folder  # its imports are not the set's cost

    before, start, cpu = _anonymous_mb(), time.perf_counter(), time.process_time()
    folder = load_folder(job["root"], cache=Path(job["cache"]))
    found = {"seconds": time.perf_counter() - start, "own_cpu": time.process_time() - cpu}
    index = sum(path.stat().st_size for path in Path(job["cache"]).glob("index/*"))
    found["table_mb"] = folder.slices.memory_usage(deep=True, index=True).sum() / 1e6
    return found | {"grown_mb": _anonymous_mb() - before, "index_mb": index / 1e6}


def decode(job: dict) -> dict:
    """Make the decoded store."""
    from ctutils.data import build_store, load_folder

    folder = load_folder(job["root"], cache=Path(job["cache"]))
    before, start, cpu = _anonymous_mb(), time.perf_counter(), time.process_time()
    build_store(folder, job["size"], cache=Path(job["cache"]))
    found = {"seconds": time.perf_counter() - start, "own_cpu": time.process_time() - cpu}
    return found | {"grown_mb": _anonymous_mb() - before}


def train_head(job: dict) -> dict:
    """One epoch of a standardised linear head on a mapped file of random features."""
    import numpy as np
    import torch

    from ctutils import backbones
    from ctutils.data import feature_loaders, load_folder
    from ctutils.training import train_model

    folder = load_folder(job["root"], cache=Path(job["cache"]))
    path, count = Path(job["cache"]) / "random.npy", len(folder.slices)
    values = np.lib.format.open_memmap(path, "w+", np.float32, (count, WIDE))
    rng = np.random.default_rng(0)
    for start in range(0, count, 1000):
        values[start : start + 1000] = rng.standard_normal((min(1000, count - start), WIDE), np.float32)
    del values
    torch.optim.Adam(torch.nn.Linear(1, 1).parameters()).step()  # imports torch's compiler
    before, start, cpu = _anonymous_mb(), time.perf_counter(), time.process_time()
    features = torch.from_numpy(np.load(path, mmap_mode="c"))
    head = torch.nn.Sequential()
    head.add_module("last", torch.nn.Linear(WIDE, 2))
    head = backbones.standardise_head(head, features, folder.rows("train"))
    optimizer = torch.optim.Adam(head.parameters())
    loaders = feature_loaders(folder, features, batch_size=job["batch_size"])
    train_model(head, torch.nn.CrossEntropyLoss(), optimizer, None, loaders, 1)
    found = {"seconds": time.perf_counter() - start, "own_cpu": time.process_time() - cpu}
    path.unlink()
    return found | {"grown_mb": _anonymous_mb() - before}


def _anonymous_mb() -> float:
    """Return the memory that is this process's own: without mapped files, which the system can drop at any time."""
    status = Path("/proc/self/status")
    if not status.exists():
        return _resident_mb()
    return int(status.read_text().partition("RssAnon:")[2].split()[0]) / (1 << 10)


JOBS = {"open": open_set, "decode": decode, "train": train_head}
STEPS = ("open, first time", "open", "store", "head, 1 epoch")


def measure_size(count: int, folder: Path, batch_size: int) -> list[list]:
    """Return the rows of one size: slices, step, CPU ms a slice, wall s, MB grown, MB at most."""
    root, cache = folder / "set", folder / "cache"
    write_noise(root, count)
    job, rows = {"root": str(root), "cache": str(cache), "size": SIDE, "batch_size": batch_size}, []
    for step, name in zip(STEPS, ("open", "open", "decode", "train"), strict=True):
        found = measure(name, job, script=__file__)
        rows.append(
            [count, step, 1e3 * found["own_cpu"] / count, found["seconds"], found["grown_mb"], found["peak_mb"]]
        )
        print(json.dumps({"slices": count, "step": step} | found), flush=True)
        if name == "decode":
            shutil.rmtree(cache / "store")
    shutil.rmtree(folder)
    return rows


def main() -> int:
    """Measure each size and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where a folder is made and removed (default: the system's)")
    options = parser.parse_args()
    os.environ["CT_PROGRESS"] = "0"
    rows = []
    for count in options.slices:
        with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
            rows += measure_size(count, Path(folder) / "scale", options.batch_size)
    columns = ["slices", "step", "CPU ms a slice", "wall s", "MB grown", "MB at most"]
    print_table(f"Slices of {SIDE} x {SIDE}, {WIDE} features", columns, rows)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        run_job(sys.argv[2:], JOBS)
    else:
        sys.exit(main())
