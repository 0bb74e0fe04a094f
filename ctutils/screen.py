"""What the commands print for people: tables that fit a terminal, what to doubt and what to type after training."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import ctutils
from ctutils.registry import BACKBONES

if TYPE_CHECKING:
    import pandas as pd

    from ctutils.runs import Run

FEW = 20  # test slices of a class; below, a handful of slices decides its F1


SWEEP_HELP = """\
Run a plan of many runs: backbones x settings x seeds, from a TOML file (examples: notebooks/plans/).

What is done is skipped, an interrupted run goes on, a failed one does not stop the rest (exit code 1 at the
end). The records stand in data/runs/<profile>/<plan>/. Not for clinical use.

--on slurm makes an array of jobs of it (pip install submitit): weights, slices and store are made
ready here, runs that share a cache are one job, a full fine-tuning is a job of its own. A job that lost its node or
ran into its time limit goes on in the queue from its last epoch. sbatch's own variables hold for what is not an
option here: SBATCH_ACCOUNT, SBATCH_MEM_PER_NODE, ...
"""


IMPORT_HELP = """\
Bring AI Hub's delivery, DICOM or another folder layout into the course's layout. Classes come from folders, or from a
file labels.csv in SRC with the columns path, class and, if wanted, split and patient; a path is a file or a folder
(a patient's, for example). What is left out is named. kaggle:OWNER/NAME is downloaded first (pip install kagglehub).
"""


def table(head: Sequence[str], rows: Iterable[Sequence], numbers: int = 0, width: int | None = None) -> str:
    """Return lines of aligned columns; the widest text is cut in its middle until a line fits.

    Args:
        head: the columns' names.
        rows: their cells; a Hangul syllable takes two places, as terminals show it.
        numbers: so many last columns are set to the right, and never cut.
        width: places of a line; None for the terminal's, at least 80.
    """
    width = width or max(80, shutil.get_terminal_size().columns)
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    sizes = [max(map(_places, column)) for column in zip(*cells, strict=True)]
    texts = len(sizes) - numbers
    while texts and sum(sizes) + 2 * (len(sizes) - 1) > width and max(sizes[:texts]) > 8:
        sizes[sizes.index(max(sizes[:texts]))] -= 1
    lines = []
    for row in cells:
        line = []
        for at, (cell, size) in enumerate(zip(row, sizes, strict=True)):
            part = _cut(cell, size)
            gap = " " * (size - _places(part))
            line.append(part + gap if at < texts else gap + part)
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def _places(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def _cut(text: str, size: int) -> str:
    """Return a text in so many places at most; what tells names apart stands at their ends."""
    if _places(text) <= size:
        return text
    left, right = text[: len(text) // 2], text[len(text) // 2 :]
    while _places(left + right) > size - 2:
        left, right = (left[:-1], right) if _places(left) > _places(right) else (left, right[1:])
    return f"{left}..{right}"


def results_table(found: "pd.DataFrame", width: int | None = None) -> str:
    """Return `results.comparison_table` in lines of 80: run, network, what learned, both scores, interval, marks."""
    rows = []
    for row in found.itertuples():
        name, _, size = row.backbone.removesuffix(" pixels").partition(", ")
        learned = row.trained + " *" * (row.weights == "random")
        mark = " " if row.above_chance else "?"
        scores = [f"{row.val_f1:.3f}", f"{row.test_f1:.3f}", f"{row.low:.3f}-{row.high:.3f}{mark}"]
        run = row.run
        for backbone in BACKBONES if len(run) > 20 else ():  # of a plan's run: the next column says it
            run = run.replace(f"-{backbone}-", "-")
        rows.append([run, f"{name} {size or 224}", learned, *scores])
    lines = [table(["run", "network, pixels", "learns", "val", "test", "95 % "], rows, numbers=3, width=width), ""]
    said = [", ".join(dict.fromkeys(found[key].astype(str))) for key in ("data", "test_slices", "profile", "device")]
    note = "Macro F1, 95 % interval; data: {}; test slices: {}; profile {}; on {}.".format(*said)
    note += " * random weights." if (found["weights"] == "random").any() else ""
    note += "" if found["above_chance"].all() else " ? not above chance."
    return "\n".join([*lines, textwrap.fill(f"{note} --json has all columns.", 80)])


def import_text(summary: dict) -> str:
    """Return what `import_dataset` did: a table of classes and splits, notes, and each file that was left out."""
    counts = summary["counts"]
    classes = sorted(set().union(*counts.values()))
    rows = [[name, *(of_split.get(name, 0) for of_split in counts.values())] for name in classes]
    rows.append(["all", *(sum(of_split.values()) for of_split in counts.values())])
    lines = [table(["class", *counts], rows, numbers=len(counts)), ""]
    lines.append(
        f"{summary['images']} pictures of '{summary['name']}' (format {summary['format']}) in '{summary['out']}': "
        f"{summary['written']} written, {summary['already_there']} already there"
    )
    lines += [f"note: {note}" for note in summary["notes"]]
    lines += [f"left out: {row['path']}: {row['reason']}" for row in summary["skipped"]]
    return "\n".join([*lines, f"Next: {command('check', summary['out'])}"])


def doubts(run: "Run", verdicts: list[str] | None) -> list[str]:
    """Return what makes the score of a run doubtful, a sentence each; `verdicts` are the audit's, None where none is.

    Patients on both sides are said when the slices are read: `load_folder`.
    """
    record, said = run.record, []
    errors = [verdict.removeprefix("error: ") for verdict in verdicts or () if verdict.startswith("error: ")]
    if errors:
        said.append(f"the check of these slices found {len(errors)} error(s), the first: {errors[0]}")
    few = {name: count for name, count in record["data"]["counts"].get("test", {}).items() if count < FEW}
    if few:
        test, named = record["scores"]["test"], ", ".join(f"{name} {count}" for name, count in few.items())
        said.append(
            f"fewer than {FEW} test slices of {named}: the 95 % interval of macro F1 is "
            f"{test['high'] - test['low']:.2f} wide, too wide to compare models by"
        )
    return said


def train_text(run: "Run", root: Path, verdicts: list[str] | None) -> str:
    """Return what `train` says at its end: scores, doubts, and the next commands to type."""
    record = run.record
    val, test = record["scores"]["val"], record["scores"]["test"]
    half = " (half of the validation slices)" if record["data"]["test_from_val"] else ""
    lines = [
        f"macro F1: validation {val['macro_f1']:.3f} (best epoch {record['best_epoch']} of {run.plan.epochs}), "
        f"test{half} {test['macro_f1']:.3f}, 95 % interval {test['low']:.3f} to {test['high']:.3f}",
        f"weights: {record['weights']['kind']}; {record['seconds']['total']:.0f} s; record in '{run.folder}'",
    ]
    slices = [root / path for path in run.of_split("test")["path"]]
    example = next((path for path in slices[:1] if path.is_file()), "slice.png")
    wrong = verdicts is None or any(verdict.startswith("error: ") for verdict in verdicts)
    look = ("predict", run.folder, example, "--html", "report.html")
    steps = [("check", root)] * wrong + [look, ("results", "--card", run.folder)]
    lines += [textwrap.fill(f"Careful: {text}", 80, subsequent_indent=" " * 9) for text in doubts(run, verdicts)]
    return "\n".join([*lines, "Next:", *(f"  {command(*step)}" for step in steps)])


def backbones_help() -> str:
    """Return one line a backbone, for `train --help`."""
    rows = []
    for spec in BACKBONES.values():
        weights = "real weights, by pip" if spec.package else "fetched on first use"
        deck = f"{spec.deck_f1:.3f}" if spec.deck_f1 else ""
        rows.append([f"  {spec.name}", spec.title, weights, deck])
    return "backbones:\n" + table(["  name", "network", "ImageNet weights", "deck's F1"], rows, width=80)


def versions() -> str:
    """Return the versions that a report of a fault should name, without loading what they are of."""
    found = {"ctutils": ctutils.__version__, "Python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("torch", "torchvision", "timm")}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def weights_line(row: dict) -> str:
    """Return one weight file's row of `weights.weights_table`."""
    size = f"{row['bytes'] / 1e6:.0f}" if row["bytes"] else "?"
    return f"{row['backbone']:<20}{row['file']:<36}{row['where']:<13}{size:>5} MB  hash {row['hash'] or '-'}"


def command(*words: object) -> str:
    """Return a command of this program as it can be typed here: with its folders as seen from here, and quotes."""
    own, here = ["ctutils"], Path.cwd()
    if Path(sys.argv[0]).stem != "ctutils":  # python -m ctutils
        own = [_below(sys.executable, here), "-m", "ctutils"]
    words = [*own, *(_below(word, here) if isinstance(word, Path) else str(word) for word in words)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _below(path: str | Path, here: Path) -> str:
    path = Path(path)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
