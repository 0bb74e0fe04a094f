"""Measure `check`: which planted faults it finds, and how often it is wrong on clean synthetic sets.

    PYTHONPATH=tests python tests/bench/audit_rates.py OUT [--sets 10] [--dicom FOLDER] [--swaps DATA_SET ...]

Clean sets (5 x 40 slices of 256 pixels, seeds 100, 101, ...) are made in OUT where they are not there. Prints tables
in Markdown: kinds of twins found among 50 synthetic slices and those of a DICOM folder; what is said of each clean
set, which must be nothing; swapped labels found (one in twenty is planted) in the data sets given.
"""

import argparse
import dataclasses
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from helpers import jpeg, noisy
from PIL import Image, ImageOps

from ctutils.audit import audit, decode_pass, doubted_labels, duplicates, group_slices, near_duplicates, sketch
from ctutils.data import load_folder
from ctutils.dicom import read_dicom
from ctutils.phantom import write_dataset
from ctutils.pictures import read_grey

MEDIASTINUM = (40, 400)  # level and width in HU


def cut(left: float, top: float, right: float, bottom: float):
    """Return a function that keeps a part of a picture, given in shares of its sides."""
    return lambda p: p.crop((int(left * p.width), int(top * p.height), int(right * p.width), int(bottom * p.height)))


def turned(degrees: float):
    return lambda p: p.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=p.getpixel((0, 0)))


def shifted(p: Image.Image) -> Image.Image:
    move = (1, 0, p.width * 0.05, 0, 1, -p.height * 0.04)
    return p.transform(p.size, Image.Transform.AFFINE, move, fillcolor=p.getpixel((0, 0)))


TWINS = {
    "JPEG, quality 40": jpeg,
    "noise of 10 grey levels": noisy,
    "gamma 0.6": lambda p: p.point(lambda v: int(255 * (v / 255) ** 0.6)),
    "inverted": ImageOps.invert,
    "histogram equalised": ImageOps.equalize,
    "resized to 78 %": lambda p: p.resize((int(p.width * 0.78),) * 2),
    "shifted by 5 %": shifted,
    "padded by a sixth": lambda p: ImageOps.expand(p, p.width // 6, fill=p.getpixel((0, 0))),
    "mirrored": ImageOps.mirror,
    "turned by 3 degrees": turned(3),
    "turned by 10 degrees": turned(10),
    "turned by 20 degrees": turned(-20),
    "turned by 45 degrees": turned(45),
    "turned by 90 degrees": lambda p: p.transpose(Image.Transpose.ROTATE_90),
    "turned by 180 degrees": lambda p: p.rotate(180),
    "cropped to 90 % of each side": cut(0.05, 0.05, 0.95, 0.95),
    "cropped to 80 %": cut(0.1, 0.1, 0.9, 0.9),
    "cropped to 80 % at the left": cut(0.2, 0, 1, 1),
    "cropped to 70 %": cut(0.15, 0.15, 0.85, 0.85),
    "left half": cut(0, 0, 0.5, 1),
    "right half": cut(0.5, 0, 1, 1),
    "upper half": cut(0, 0, 1, 0.5),
    "lower half": cut(0, 0.5, 1, 1),
}


def confirmed(sketches: list[tuple]) -> pd.DataFrame:
    return duplicates._confirmed(np.stack([one[1] for one in sketches]), np.stack([one[2] for one in sketches]))


def kinds_of_twins(folder: Path, dicom: Path | None) -> None:
    """Copy every picture in one way, search the copies among all pictures, and print the shares found."""
    pictures = [read_grey(path) for path in sorted(folder.glob("train/*/*.png"))[::3]]
    files = sorted(dicom.rglob("*.dcm")) if dicom else []
    other = [Image.fromarray(read_dicom(path, MEDIASTINUM)[0][0]) for path in files]
    pictures += [Image.fromarray(read_dicom(path)[0][0]) for path in files]
    n, known, copies = len(pictures), [sketch(picture) for picture in pictures], {}
    for kind, change in TWINS.items():
        copies[kind] = (np.arange(n), [sketch(change(picture)) for picture in pictures])
    if files:
        copies["mediastinal window (DICOM)"] = (np.arange(n - len(files), n), [sketch(one) for one in other])
    print(f"| copy of {n} pictures, {len(files)} of them DICOM | found |\n|---|---|", flush=True)
    for kind, (source, some) in copies.items():
        pairs, own = confirmed(known + some), np.concatenate([np.arange(n), source])
        found = np.isin(source, own[pairs["a"]][own[pairs["a"]] == own[pairs["b"]]])
        print(f"| {kind} | {found.mean():.2f} |", flush=True)


def clean_sets(folders: list[Path], cache: Path) -> None:
    """Print what is said of sets in which nothing is wrong, patients known to the splits only."""
    rows, looked = [], []
    for folder in folders:
        report = audit(folder, cache=cache)
        decoded, patients = report.decoded, report.decoded.table.set_index("path")["patient"]
        looked.append(decoded)
        near = near_duplicates(dataclasses.replace(decoded, table=decoded.table.assign(patient="")))
        others = patients[near["path_a"]].to_numpy() != patients[near["path_b"]].to_numpy()
        said = report.findings[report.findings["severity"] != "info"]["check"]
        rows.append((folder.name, others.sum(), (~others).sum(), len(report.tables["doubts"]), ", ".join(said) or "-"))
        print("| set | twins of two patients | of one | labels in doubt | warnings and errors |\n|---|---|---|---|---|")
        print("| " + " | ".join(map(str, rows[-1])) + " |")
        print(
            report.tables["probes"][["probe", "low", "chance", "class_low", "flagged"]].round(2).to_string(), flush=True
        )
    patients = np.concatenate([decoded.table["patient"] + str(i) for i, decoded in enumerate(looked)])
    pictures, frames = (np.concatenate([getattr(one, name) for one in looked]) for name in ("small", "frames"))
    for frame, least in dict(duplicates.FRAMES).items():
        with patch.dict(duplicates.FRAMES, {frame: 0.5}, clear=True):
            pairs = duplicates._confirmed(pictures, frames)
            apart = pairs["detail"][patients[pairs["a"]] != patients[pairs["b"]]]
            print(
                f"frame {frame}, threshold {least}: two patients at most {apart.max():.3f} among {len(patients)} slices"
            )


def swapped_labels(root: Path, cache: Path, share: float = 0.05) -> None:
    """Give one slice in twenty another label, three times; print how many of the doubted ones are among them."""
    decoded = decode_pass(load_folder(root, strict=False, cache=cache))
    groups, names = group_slices(decoded, near_duplicates(decoded)), np.array(sorted(set(decoded.table["class"])))
    table, counts = decoded.table, []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        wrong = rng.random(len(table)) < share * (seed > 0)  # the first time none: as the set is
        label = (table["label"] + wrong * rng.integers(1, len(names), len(table))) % len(names)
        swapped = table.assign(label=label, **{"class": names[label]})
        doubts = doubted_labels(dataclasses.replace(decoded, table=swapped), groups)
        counts.append((wrong.sum(), len(doubts), table["path"][wrong].isin(doubts["path"]).sum()))
    (_, alone, _), planted = counts[0], np.sum(counts[1:], axis=0)
    words = f"{planted[2] / max(1, planted[1]):.2f} | {planted[2] / planted[0]:.2f}"
    print(f"| {root.name}, {len(table)} slices | {alone} | {words} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--dicom", type=Path, help="also copy the slices of this folder")
    parser.add_argument("--swaps", type=Path, nargs="*", default=[], help="swap labels in these data sets")
    options = parser.parse_args()
    folders = [options.out / "clean" / str(100 + i) for i in range(options.sets)]
    for folder in folders:
        made = {"train": 150, "val": 50, "size": 256, "balanced": True, "workers": 1, "show_progress": False}
        write_dataset(folder, seed=int(folder.name), **made)
    if options.swaps:
        print("| labels swapped in | doubted as it is | share of doubted that are swapped | of swapped doubted |")
        print("|---|---|---|---|")
    for root in options.swaps:
        swapped_labels(root, options.out / "cache")
    if folders:
        kinds_of_twins(folders[0], options.dicom)
        clean_sets(folders, options.out / "cache")


if __name__ == "__main__":
    main()
