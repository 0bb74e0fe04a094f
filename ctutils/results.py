"""From run records to tables, comparisons and ensembles. Everything is computed again from predictions.csv."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctutils import metrics
from ctutils.base import CTError
from ctutils.registry import BACKBONES
from ctutils.runs import Run

COLUMNS = (
    "run backbone deck_f1 val_f1 test_f1 low high test_slices weights data kind profile bn trained device seconds "
    "seed best_epoch"
).split()


def comparison_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Put runs beside each other and beside the deck, in the deck's order, others after it.

    Returns:
        One row a run: run, backbone, deck_f1 (NaN where the deck has none), val_f1 (the split that chose the
        epoch: optimistic, as the deck's own figures are), test_f1 with its 95 % interval low and high (patients
        are drawn where they are known), test_slices, weights, data, kind, profile, bn, trained, device, seconds
        (total), seed, best_epoch. A score is NaN where the record has no such split.
    """
    order, rows = list(BACKBONES), []
    for run in sorted(runs, key=lambda run: (order.index(run.plan.backbone), run.name)):
        record, data, spec = run.record, run.record["data"], BACKBONES[run.plan.backbone]
        val_f1 = _macro_f1(run, "val") if "val" in run.splits else np.nan
        test = interval(run, "test") if "test" in run.splits else [np.nan] * 3
        slices = int((run.predictions["split"] == "test").sum())
        row = [run.name, spec.title, np.nan if spec.deck_f1 is None else spec.deck_f1, val_f1, *test, slices]
        row += [record["weights"]["kind"], data["name"], data["kind"]]
        row += [record[key] for key in ("profile", "bn", "trained", "device")]
        rows.append([*row, record["seconds"]["total"], run.plan.seed, record["best_epoch"]])
    return pd.DataFrame(rows, columns=COLUMNS)


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


def missing_runs(runs: Sequence[Run]) -> dict[str, str]:
    """Return {backbone's title: notebook that makes its record} for the deck's backbones without a run."""
    there = {run.plan.backbone for run in runs}
    return {spec.title: spec.notebook for spec in BACKBONES.values() if spec.notebook and spec.name not in there}


def results_markdown(runs: Sequence[Run]) -> str:
    """Return the README's table: the comparison, one line a run, with weights, data and device on every row."""
    rows = []
    for row in comparison_table(runs).itertuples():
        deck = "-" if np.isnan(row.deck_f1) else f"{row.deck_f1:.3f}"
        test = f"{row.test_f1:.3f} ({row.low:.3f} to {row.high:.3f})"
        data = f"{row.kind}, {row.test_slices} test slices"
        cells = [row.backbone, deck, f"{row.val_f1:.3f}", test, row.weights, data, row.profile, row.device]
        rows.append([*cells, f"{row.seconds:.0f}"])
    head = ["backbone", "deck's macro F1", "validation (best epoch)", "test (95 % interval)", "weights", "data"]
    return "\n".join(markdown_table([*head, "profile", "device", "seconds"], rows))


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


# ---------------------------------------------------------------- settings of a sweep


def compare_settings(sweep, runs: dict[tuple[str, str], list[Run]], split: str = "val") -> pd.DataFrame:
    """Return one row a setting and backbone: its points over seeds, and its difference to the one it is against.

    Columns: setting, backbone, points (macro F1, one a seed), mean, against, difference (of the means over
    seeds), low, high (95 % interval of the difference over slices, or over patients where all runs know them),
    seed_differences (one a seed), seeds_agree (seeds whose own difference has the same sign, e.g. "3 of 3"),
    verdict. From `difference` on they are empty where there is nothing to compare with; where the plan gives the
    two other slices to be scored on, the verdict says so.

    Args:
        sweep, runs: from `ctutils.sweep`: `read_sweep` and `load_sweep`.
        split: whose predictions; settings are chosen on val, and test is opened once, for the one chosen.
    Raises:
        CTError: records that do not belong together: other slices, or some with random weights and some without.
    """
    columns = "setting backbone points mean against difference low high seed_differences seeds_agree verdict".split()
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
            options = {"names": (setting, against), "patients": patients}
            row |= metrics.seeds_difference(ours[0].y_true(split), *scores, **options)._asdict()
            apart = [a - _macro_f1(run, split) for a, run in zip(points, theirs, strict=False)]
            row["seed_differences"] = tuple(round(value, 4) for value in apart)
            row["seeds_agree"] = f"{sum(value * row['difference'] > 0 for value in apart)} of {len(apart)}"
        rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def _scored_on(plan, split: str) -> str:
    """Return the data set, as the plan names it, that gives the slices of a split."""
    return str((plan.test_data if split == "test" else None) or plan.data or "default")


def say_differences(table: pd.DataFrame) -> list[str]:
    """Return a sentence for each row of `compare_settings` that has a difference; honest where it holds zero."""
    said = []
    for row in table.dropna(subset=["difference"]).itertuples():
        claim = "higher than" if row.low > 0 else "lower than" if row.high < 0 else "not distinguishable from"
        numbers = f"{row.difference:+.3f} macro F1 (95 % interval {row.low:+.3f} to {row.high:+.3f}"
        seeds = f"same sign in {row.seeds_agree} seeds)"
        said.append(f"{row.backbone}, {row.setting}: {claim} {row.against}: {numbers}, {seeds}")
    return said


# ---------------------------------------------------------------- ensembles


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several runs that vote; asked for labels, scores and patients as a `Run` is, by the same code."""

    method: str
    members: tuple[str, ...]  # names of the runs
    weights: tuple[float, ...] | None  # one a member; None where the vote is no weighted mean
    classes: tuple[str, ...]
    predictions: pd.DataFrame  # path, split, label, perhaps patient, p_<class> ...
    name: str = "ensemble"

    splits, of_split, y_true, y_score, patients = Run.splits, Run.of_split, Run.y_true, Run.y_score, Run.patients


def ensemble(runs: Sequence[Run], method: str = "soft", fit_split: str = "val") -> Ensemble:
    """Let several runs of the same data vote, from their stored scores alone.

    "soft" is the mean of the probabilities. "weighted" is a weighted mean, the weights (0 or more, sum 1)
    being those with the highest likelihood on `fit_split`. "stack" is a logistic regression on the members'
    log-probabilities, fitted on `fit_split` with all classes counting alike, as in macro F1. The ensemble's own
    figures on `fit_split` are therefore optimistic; it is never "test", which is only for the final figure.

    Raises:
        CTError: fewer than two runs, an unknown method, fitting on test, or other data, classes or slices.
    """
    if method not in ("soft", "weighted", "stack"):
        raise CTError(f"the method '{method}'", "soft, weighted or stack", "choose one of them")
    slices, scores, labels, fit = _aligned(runs, fit_split, fitting=True)
    weights = None if method == "stack" else np.full(len(runs), 1 / len(runs))
    if method == "weighted":
        weights = _mixture_weights(scores[:, fit, labels[fit]])
    combined = _stack(scores, labels, fit) if weights is None else np.tensordot(weights, scores, axes=1)
    combined = combined / combined.sum(axis=1, keepdims=True)  # rounding in the stored scores
    table = slices.join(pd.DataFrame(combined, columns=[f"p_{name}" for name in runs[0].classes]))
    weights = None if weights is None else tuple(weights.tolist())
    return Ensemble(method, tuple(run.name for run in runs), weights, runs[0].classes, table)


def choose_members(runs: Sequence[Run], fit_split: str = "val") -> list[Run]:
    """Choose which runs should vote: the best one first, then whichever helps most, while any helps.

    "Helps" is a lower log loss of the soft vote on `fit_split`, which moves with every slice; macro F1 jumps.
    Source: R. Caruana et al., Ensemble Selection from Libraries of Models, 2004, 10.1145/1015330.1015432
    """
    _, scores, labels, fit = _aligned(runs, fit_split, fitting=True)
    of_true = scores[:, fit, labels[fit]]  # probability of the true class (M, n)

    def loss(members: list[int]) -> float:
        return -float(np.log(of_true[members].mean(axis=0).clip(1e-12)).mean())

    chosen, rest = [], list(range(len(runs)))
    while rest:
        best = min(rest, key=lambda member: loss([*chosen, member]))
        if chosen and loss([*chosen, best]) >= loss(chosen):
            break
        chosen.append(best)
        rest.remove(best)
    return [runs[member] for member in chosen]


def error_correlation(runs: Sequence[Run], split: str = "test") -> pd.DataFrame:
    """Return how much two runs err on the same slices: correlation of their errors (0 or 1), run by run.

    Near 1: the same slices are wrong, a vote cannot mend them. Near 0: errors are independent, a vote helps.
    NaN where a run has no error at all, or nothing but errors.
    """
    _, scores, labels, rows = _aligned(runs, split)
    wrong = scores[:, rows].argmax(axis=2) != labels[rows]
    return pd.DataFrame(wrong.T.astype(float), columns=[run.name for run in runs]).corr()


def _aligned(runs: Sequence[Run], split: str, fitting: bool = False) -> tuple:
    """Return the common slices, scores (M, N, C) and labels (N,) in their order, and which rows are of the split."""
    if fitting and split == "test":
        raise CTError("the test split to fit on", "val: test is for the final figure alone", "use fit_split='val'")
    if len({run.name for run in runs}) < max(len(runs), 2):
        raise CTError(f"{len(runs)} run(s), or one twice", "two different runs or more", "train one more seed")
    first, tables = runs[0], [run.predictions.sort_values("path").reset_index(drop=True) for run in runs]
    slices = tables[0].drop(columns=[f"p_{name}" for name in first.classes])
    for run, table in zip(runs, tables, strict=True):
        found, expected = (f"'{one.record['data']['name']}', classes {', '.join(one.classes)}" for one in (run, first))
        same = run.record["data"]["fingerprint"] == first.record["data"]["fingerprint"] and run.classes == first.classes
        if not same or not table[["path", "split", "label"]].equals(slices[["path", "split", "label"]]):
            found, expected = f"{len(table)} slices of {found} in '{run.name}'", f"the {len(slices)} of {expected}"
            raise CTError(found, f"{expected} in '{first.name}'", "put runs of one data set and profile together")
    rows = (slices["split"] == split).to_numpy()
    if not rows.any():
        raise CTError(f"no '{split}' predictions in the runs", "a split of the runs", "choose val or test")
    scores = np.stack([table[[f"p_{name}" for name in first.classes]].to_numpy(np.float64) for table in tables])
    return slices, scores, slices["label"].to_numpy(np.int64), rows


def _mixture_weights(of_true: np.ndarray, steps: int = 500) -> np.ndarray:
    """Find the weights (M,), sum 1, with which the mean of the true class's probabilities (M, n) is most likely.

    Expectation-maximisation: each step can only raise the likelihood.
    """
    of_true = of_true.clip(1e-12)
    weights = np.full(len(of_true), 1 / len(of_true))
    for _ in range(steps):
        share = weights[:, None] * of_true
        weights = (share / share.sum(axis=0)).mean(axis=1)
    return weights


def _stack(scores: np.ndarray, labels: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """Fit a logistic regression on log-probabilities; returns probabilities (N, C)."""
    from sklearn.linear_model import LogisticRegression

    members, slices, classes = scores.shape
    table = np.log(scores.clip(1e-4)).transpose(1, 0, 2).reshape(slices, members * classes)
    if len(np.unique(labels[fit])) < 2:
        raise CTError("one class only in the split to fit on", "two classes or more", "use method='soft'")
    table -= table[fit].mean(axis=0)
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000).fit(table[fit], labels[fit])
    combined = np.zeros((slices, classes))  # a class without a slice in the split keeps 0
    combined[:, model.classes_] = model.predict_proba(table)
    return combined


def _macro_f1(run: Run, split: str) -> float:
    return metrics.macro_f1(run.y_true(split), run.y_score(split).argmax(axis=1), len(run.classes))
