"""From run records to tables and comparisons. Everything is computed again from predictions.csv."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ctutils import metrics
from ctutils.base import CTError
from ctutils.config import Profile
from ctutils.registry import BACKBONES
from ctutils.runs import Run, list_runs

COLUMNS = (
    "run name backbone val_f1 test_f1 low high permuted permuted_low permuted_high above_chance test_slices weights "
    "data kind profile bn trained device seconds seed best_epoch"
).split()
LEARNED = {"all": "all layers", "last": "last block", "head": "head only"}
# Of notebook 12's plan, the settings whose first seed stands beside the notebooks' own records.
SHOWN = ("all layers", "last block", "head", "0.003, from scratch, 30 epochs")
YARDSTICKS = "yardsticks.csv"  # beside the records; rows of `comparison_table` that notebook 09 makes
FOLDED = "Frozen networks with random weights: features that learned nothing, so that every notebook runs everywhere"


def comparison_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Put runs beside each other: all layers, last block, head only; those with random weights after the others.

    Returns:
        One row a run: run, name (backbone and what learned), backbone, val_f1 (the split that chose the epoch:
        optimistic), test_f1 with its 95 % interval low and high (patients are drawn where they are known), what
        guessing scores (`permuted`) with its range permuted_low and permuted_high, above_chance (as the function),
        test_slices, weights, data, kind, profile, bn, trained, device, seconds (total), seed, best_epoch. A score is
        NaN where the record has no such split.
    """
    order, rows = list(BACKBONES), []

    def place(run: Run) -> tuple:
        learned, random = run.record["trained"], run.record["weights"]["kind"] == "random"
        return random, [*LEARNED, learned].index(learned), order.index(run.plan.backbone), run.name

    for run in sorted(runs, key=place):
        record, data, title = run.record, run.record["data"], BACKBONES[run.plan.backbone].title
        title += f", {run.plan.size} pixels" * (run.plan.size != Profile.image_size)
        val_f1 = _macro_f1(run, "val") if "val" in run.splits else np.nan
        test, guessing = ([np.nan] * 3,) * 2
        if "test" in run.splits:
            test, guessing = interval(run, "test"), permuted(run, "test")
        slices = int((run.predictions["split"] == "test").sum())
        row = [
            run.name,
            f"{title}, {LEARNED.get(record['trained'], record['trained'])}"
            + ", from scratch" * (record["weights"]["kind"] == "random" and record["trained"] == "all"),
            title,
            val_f1,
            *test,
            *guessing,
        ]
        row += [test[1] > guessing[2], slices, record["weights"]["kind"], data["name"], data["kind"]]
        row += [record[key] for key in ("profile", "bn", "trained", "device")]
        rows.append([*row, record["seconds"]["total"], run.plan.seed, record["best_epoch"]])
    return pd.DataFrame(rows, columns=COLUMNS)


def shown_runs(folder: str | Path) -> list[Run]:
    """Return a folder's records and, of notebook 12's plan, those of `SHOWN`, seed 0."""
    runs, swept = list_runs(folder)[0], list_runs(Path(folder) / "12_epochs_and_unfreezing")[0]
    for run in swept:
        match run.record.get("sweep"):
            case {"setting": str(name)} if name in SHOWN and run.plan.seed == 0:
                runs.append(run)
    return runs


def interval(run: Run, split: str) -> metrics.Interval:
    """Return macro F1 with its 95 % interval; patients are drawn, not slices, where the run knows them."""
    return metrics.score_interval(run.y_true(split), run.y_score(split), patients=run.patients(split))


def permuted(run: Run, split: str) -> metrics.Interval:
    """Return what guessing scores on a split with the run's predictions; see `metrics.permuted_score`."""
    return metrics.permuted_score(run.y_true(split), run.y_score(split), len(run.classes))


def above_chance(run: Run, split: str) -> bool:
    """Say whether the whole interval of a run's macro F1 lies above the whole 95 % range of guessing.

    Strict on purpose: many models are looked at, on validation the best of ten epochs, and slices of one patient are
    shuffled singly. What fails is called "not above chance"; its single answers are not worth a look.
    """
    return interval(run, split).low > permuted(run, split).high


def say_runs(runs: dict[str, Run], split: str = "val") -> list[str]:
    """Return lines on runs of the same slices, by name: score and interval, chance, and the difference to the first."""
    (first, base), *_ = runs.items()
    lines = []
    for name, run in runs.items():
        value, low, high = interval(run, split)
        word = "above chance" if above_chance(run, split) else "not above chance"
        lines.append(f"{name}: macro F1 {value:.3f} ({low:.3f} to {high:.3f}), {word}")
        if run is not base:
            scores, options = (run.y_score(split), base.y_score(split)), {"names": (name, first)}
            found = metrics.paired_difference(run.y_true(split), *scores, patients=run.patients(split), **options)
            numbers = f"{found.difference:+.3f} (95 % interval {found.low:+.3f} to {found.high:+.3f})"
            lines.append(f"{name} minus {first}: {numbers}: {found.verdict}")
    return lines


def missing_runs(runs: Sequence[Run]) -> dict[str, str]:
    """Return {backbone's title: notebook that makes its record} for the deck's backbones without a run."""
    there = {run.plan.backbone for run in runs}
    return {spec.title: spec.notebook for spec in BACKBONES.values() if spec.notebook and spec.name not in there}


def results_markdown(folder: str | Path) -> str:
    """Return the README's tables of a folder of records: `shown_runs` and, if they are there, the yardsticks."""

    def lines(*tables: pd.DataFrame) -> list[str]:
        rows = []
        for row in (row for table in tables for row in table.itertuples()):
            test = f"{row.test_f1:.3f} ({row.low:.3f} to {row.high:.3f})"
            guessing = f"{row.permuted:.3f}" + ("" if row.above_chance else ": not above chance")
            scratch = ", random weights" if row.weights == "random" else ""
            cells = [LEARNED.get(row.trained, row.trained), row.backbone + scratch, f"{row.val_f1:.3f}", test]
            rows.append([*cells, guessing, f"{row.seconds:.0f}"])
        head = ["what learned", "backbone", "validation", "test (95 % interval)", "labels shuffled", "seconds"]
        return markdown_table(head, rows)

    table, yardsticks = comparison_table(shown_runs(folder)), Path(folder) / YARDSTICKS
    random, scratch = table["weights"] == "random", table["trained"] == "all"
    probes = [pd.read_csv(yardsticks)] if yardsticks.exists() else []
    text = lines(table[~random], *probes, table[random & scratch])
    said = [", ".join(dict.fromkeys(table[key].astype(str))) for key in ("kind", "test_slices", "profile", "device")]
    text += ["", "{} data, {} test slices; profile {}, {}".format(*said)]
    if (random & ~scratch).any():
        folded = lines(table[random & ~scratch])
        text += ["", "<details>", f"<summary>{FOLDED}</summary>", "", *folded, "", "</details>"]
    return "\n".join(text)


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


# ---------------------------------------------------------------- settings of a sweep


def compare_settings(sweep, runs: dict[tuple, list[Run]], split: str = "val", level: float = 0.95) -> pd.DataFrame:
    """Return one row a setting and backbone: its points over seeds, and its difference to the one it is against.

    Columns: setting, backbone, points (macro F1, one a seed), mean, against, difference (of the means over
    seeds), low, high (interval of the difference over slices, or over patients where all runs know them), level,
    seed_differences (one a seed), seeds_agree (seeds whose own difference has the same sign, e.g. "3 of 3"),
    verdict. From `difference` on empty where there is nothing to compare with, or other slices: the verdict says so.

    Args:
        sweep, runs: from `ctutils.sweep`: `read_sweep` and `load_sweep`.
        split: whose predictions; settings are chosen on val, and test is opened once, for the one chosen.
        level: of the intervals; 1 - 0.05 / m for a table of m comparisons, then 95 % hold for all together.
    Raises:
        CTError: records that do not belong together: other slices, or some with random weights and some without.
    """
    columns = "setting backbone points mean against difference low high level seed_differences seeds_agree verdict"
    rows, groups = [], sweep.groups()
    for (setting, backbone), ours in runs.items():
        plan, against = groups[setting, backbone][0].plan, groups[setting, backbone][0].against
        theirs, points = runs.get((against, backbone), []), [_macro_f1(run, split) for run in ours]
        row = {"setting": setting, "backbone": backbone, "points": tuple(round(value, 4) for value in points)}
        row |= {"mean": float(np.mean(points)), "against": against or ""}
        other = groups[against, backbone][0].plan if theirs else plan
        if _scored_on(plan, split) != _scored_on(other, split):
            theirs, row["verdict"] = [], f"not compared: other {split} slices"
        both = [*ours, *theirs]
        same = {"labels": [run.y_true(split).tobytes() for run in both]}
        alike = both if plan.weights == other.weights else ours  # from scratch differs on purpose
        same["weights"] = [run.record["weights"]["kind"] for run in alike]
        if (plan.data, plan.test_data) == (other.data, other.test_data):
            same["slices"] = [run.record["data"]["fingerprint"] for run in both]
        for what, found in same.items():
            if len(set(found)) > 1:
                mend = "delete these records and run the plan again"
                raise CTError(f"'{setting}' and '{against}': records with different {what}", "the same", mend)
        if theirs:
            patients = ours[0].patients(split) if all(run.patients(split) is not None for run in both) else None
            scores = [[run.y_score(split) for run in some] for some in (ours, theirs)]
            options = {"names": (setting, against), "patients": patients, "level": level}
            row |= {"level": level} | metrics.seeds_difference(ours[0].y_true(split), *scores, **options)._asdict()
            apart = [a - _macro_f1(run, split) for a, run in zip(points, theirs, strict=False)]
            row["seed_differences"] = tuple(round(value, 4) for value in apart)
            row["seeds_agree"] = f"{sum(value * row['difference'] > 0 for value in apart)} of {len(apart)}"
        rows.append(row)
    return pd.DataFrame(rows, columns=columns.split())


def _scored_on(plan, split: str) -> str:
    """Return the data set, as the plan names it, that gives the slices of a split."""
    return str((plan.test_data if split == "test" else None) or plan.data or "default")


def say_differences(table: pd.DataFrame) -> list[str]:
    """Return a sentence for each row of `compare_settings` that has a difference; honest where it holds zero."""
    said = []
    for row in table.dropna(subset=["difference"]).itertuples():
        claim = "higher than" if row.low > 0 else "lower than" if row.high < 0 else "not distinguishable from"
        numbers = f"{row.difference:+.3f} macro F1 ({100 * row.level:.3g} % interval {row.low:+.3f} to {row.high:+.3f}"
        seeds = f"same sign in {row.seeds_agree} seeds)"
        said.append(f"{row.backbone}, {row.setting}: {claim} {row.against}: {numbers}, {seeds}")
    return said


def _macro_f1(run: Run, split: str) -> float:
    return metrics.macro_f1(run.y_true(split), run.y_score(split).argmax(axis=1), len(run.classes))
