"""Erase the finding and ask again (notebook 14): the question to one network, and the record of 200 slices per class.

python notebooks/erased.py    after notebook 14: asks anew and writes the record that the notebook shows
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ctutils import phantom
from ctutils.data import normalise
from ctutils.pictures import resize
from ctutils.registry import get_spec

RECORD = Path(__file__).resolve().parent.parent / "data" / "reference_runs" / "standard" / "14_erased.csv"
SLICES = 200  # per class in the record; those after the test set's are new ones of the same generator


def ask_again(
    name: str, run, model, numbers: Iterable[int], shortcut: str | None = None, run_all: Callable = map
) -> pd.DataFrame:
    """Show synthetic test slices to a network, with their finding and without it.

    Args:
        name: of the network; run: its record; model: the network, in eval mode.
        numbers: of the slices in each class.
        shortcut: of the scanner: None, or "sharpness" as in the trap.
        run_all: `map`, or that of a pool.
    Returns:
        a row per disease: network, class, slices, and how many are called by their class with the finding (`there`)
        and without (`erased`), and called Normal without (`normal`).
    """
    spec, numbers, size, rows = get_spec(run.plan.backbone), list(numbers), run.plan.size, []
    device, seed = next(model.parameters()).device, int(run.record["data"]["name"].split("-")[1])
    for k, label in enumerate(run.classes):
        called = {}
        for finding in (None, "none") if label != "Normal" else ():
            make = functools.partial(_small, seed, label, finding, shortcut, size)
            pictures = torch.from_numpy(np.stack(list(run_all(make, numbers))))[:, None]
            parts = [normalise(part, spec.mean, spec.std).to(device) for part in pictures.split(16)]
            with torch.no_grad():
                called[finding] = torch.cat([model(part).argmax(1).cpu() for part in parts])
        if called:
            normal = run.classes.index("Normal")
            yes = [int((called[which] == what).sum()) for which, what in ((None, k), ("none", k), ("none", normal))]
            rows.append((name, label, len(numbers), *yes))
    return pd.DataFrame(rows, columns=["network", "class", "slices", "there", "erased", "normal"])


def _small(seed: int, label: str, finding: str | None, shortcut: str | None, size: int, number: int) -> np.ndarray:
    picture, _ = phantom.make_slice(seed, "test", label, number, finding=finding, shortcut=shortcut)
    return np.asarray(resize(Image.fromarray(picture), size))


def main() -> None:
    from ctutils.backbones import restore_model
    from ctutils.base import atomic_path
    from ctutils.config import get_settings
    from ctutils.runs import load_run

    settings, tables = get_settings(), []
    trap = settings.runs_dir.with_name(f"{settings.runs_dir.name}-shortcut") / "14_finetuned"
    places = {"fine-tuned": (settings.runs_dir / "00_finetuned", None), "trap": (trap, "sharpness")}
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for name, (place, shortcut) in places.items():
            run = load_run(place)
            model = restore_model(run).eval().requires_grad_(False).to(settings.device)
            tables.append(ask_again(name, run, model, range(SLICES), shortcut, pool.map))
            print(tables[-1].to_string(index=False), flush=True)
    with atomic_path(RECORD) as temporary:
        pd.concat(tables).to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
