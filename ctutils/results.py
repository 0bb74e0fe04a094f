"""From run records to tables, ensembles and a model card. Everything is computed again from predictions.csv."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ctutils import metrics
from ctutils.base import CTError
from ctutils.runs import Run

# The 2022 deck "딥러닝 모델을 활용한 흉부 CT 이미지 분류": best validation macro F1 of 10 epochs, on the same 1000
# validation slices that chose the epoch, so each is a little optimistic.
DECK_F1 = {
    "vgg16": 0.769312,
    "alexnet": 0.788558,
    "resnet50": 0.905039,
    "resnet152": 0.922059,
    "densenet161": 0.931303,
    "mobilenet_v3_large": 0.936962,
}
DECK_VAL_COUNTS = (125, 125, 500, 125, 125)  # ILD, Lung_Cancer, Normal, pneumonia, pneumothorax

TITLES = {
    "vgg16": "VGG16",
    "alexnet": "AlexNet",
    "resnet50": "ResNet50",
    "resnet152": "ResNet152",
    "densenet161": "DenseNet161",
    "mobilenet_v3_large": "MobileNetV3",
    "efficientnet_lite0": "EfficientNet-Lite0",
}
NOTEBOOKS = {
    "vgg16": "03_vgg16",
    "alexnet": "04_alexnet",
    "resnet50": "05_resnet50",
    "resnet152": "06_resnet152",
    "densenet161": "07_densenet161",
    "mobilenet_v3_large": "08_mobilenet_v3",
}


def comparison_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Put runs beside each other and beside the deck, in the deck's order, others after it.

    Returns:
        One row a run: run, backbone, deck_f1 (NaN where the deck has none), val_f1 (the split that chose the
        epoch: optimistic, as the deck's own figures are), test_f1 with its 95 % interval low and high,
        test_slices, weights, data, kind, profile, bn, trained, device, seconds (total), seed, best_epoch.
        A score is NaN where the record has no such split.
    """
    order = {name: place for place, name in enumerate(TITLES)}
    ordered = sorted(runs, key=lambda run: (order.get(run.record["backbone"], len(order)), run.name))
    rows = []
    for run in ordered:
        record = run.record
        test = _interval(run, "test")
        rows.append(
            {
                "run": run.name,
                "backbone": TITLES.get(record["backbone"], record["backbone"]),
                "deck_f1": DECK_F1.get(record["backbone"], np.nan),
                "val_f1": _macro_f1(run, "val"),
                "test_f1": test.value,
                "low": test.low,
                "high": test.high,
                "test_slices": int((run.predictions["split"] == "test").sum()),
                "weights": record["weights"]["kind"],
                "data": record["data"]["name"],
                "kind": record["data"]["kind"],
                "profile": record["profile"],
                "bn": record["bn"],
                "trained": record["trained"],
                "device": record["device"],
                "seconds": record["seconds"]["total"],
                "seed": record["seed"],
                "best_epoch": record["best_epoch"],
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = (
    "run backbone deck_f1 val_f1 test_f1 low high test_slices weights data kind profile bn trained device seconds "
    "seed best_epoch"
).split()


def missing_runs(runs: Sequence[Run]) -> dict[str, str]:
    """Return {backbone's title: notebook that makes its record} for the deck's backbones without a run."""
    there = {run.record["backbone"] for run in runs}
    return {TITLES[name]: notebook for name, notebook in NOTEBOOKS.items() if name not in there}


def results_markdown(runs: Sequence[Run]) -> str:
    """Return the README's table: the comparison, one line a run, with weights, data and device on every row."""
    rows = []
    for row in comparison_table(runs).itertuples():
        deck = "-" if np.isnan(row.deck_f1) else f"{row.deck_f1:.3f}"
        interval = f"{row.test_f1:.3f} ({row.low:.3f} to {row.high:.3f})"
        data = f"{row.kind}, {row.test_slices} test slices"
        best = f"{row.val_f1:.3f}"
        rows.append(
            [row.backbone, deck, best, interval, row.weights, data, row.profile, row.device, f"{row.seconds:.0f}"]
        )
    head = ["backbone", "deck's macro F1", "validation (best epoch)", "test (95 % interval)", "weights", "data"]
    return "\n".join(_markdown([*head, "profile", "device", "seconds"], rows))


def deck_table() -> pd.DataFrame:
    """Return the deck's six scores with the 95 % interval that its 1000 validation slices allow.

    The deck does not show its confusion matrices: errors are taken as equally frequent in all classes.

    Returns:
        One row a backbone: backbone (title), deck_f1, low, high.
    """
    y_true = np.repeat(np.arange(5), DECK_VAL_COUNTS)
    rank = np.concatenate([np.arange(count) / count for count in DECK_VAL_COUNTS])  # 0 to 1 in each class
    elsewhere = (y_true + 1 + np.arange(len(y_true)) % 4) % 5

    def predict(right: float) -> np.ndarray:
        return np.where(rank < right, y_true, elsewhere)

    rows = []
    for name, score in DECK_F1.items():
        shares = np.linspace(0.5, 1, 251)
        near = min(shares, key=lambda right: abs(metrics.macro_f1(y_true, predict(right), 5) - score))
        value, low, high = metrics.bootstrap_interval(y_true, predict(near))
        rows.append(
            {
                "backbone": TITLES[name],
                "deck_f1": score,
                "low": score - (value - low),
                "high": score + (high - value),
            }
        )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- ensembles


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several runs that vote; asked for labels and scores as a `Run` is."""

    method: str
    members: tuple[str, ...]  # names of the runs
    weights: tuple[float, ...] | None  # one a member; None where the vote is no weighted mean
    classes: tuple[str, ...]
    predictions: pd.DataFrame  # path, split, label, p_<class> ...

    def y_true(self, split: str) -> np.ndarray:
        """Return the labels of a split, int64 (N,)."""
        return self._of_split(split)["label"].to_numpy(np.int64)

    def y_score(self, split: str) -> np.ndarray:
        """Return the probabilities of a split, float64 (N, C)."""
        return self._of_split(split)[[f"p_{name}" for name in self.classes]].to_numpy(np.float64)

    def _of_split(self, split: str) -> pd.DataFrame:
        rows = self.predictions[self.predictions["split"] == split]
        if rows.empty:
            raise CTError(f"no '{split}' predictions", "a split of the runs", "ask for val or test")
        return rows


def ensemble(runs: Sequence[Run], method: str = "soft", fit_split: str = "val") -> Ensemble:
    """Let several runs vote, from their stored scores alone.

    "soft" is the mean of the probabilities. "weighted" is a weighted mean, the weights (0 or more, sum 1)
    being those with the highest likelihood on `fit_split`. "stack" is a logistic regression on the members'
    log-probabilities, fitted on `fit_split` with all classes counting alike, as in macro F1. The ensemble's own
    figures on `fit_split` are therefore optimistic.

    Args:
        runs: two or more, of the same data, in any order of slices.
        method: "soft", "weighted" or "stack".
        fit_split: never "test", which is only for the final figure.
    Raises:
        CTError: fewer than two runs, an unknown method, fitting on test, or runs of different data, classes
            or slices.
    """
    if method not in ("soft", "weighted", "stack"):
        raise CTError(f"the method '{method}'", "soft, weighted or stack", "choose one of them")
    _refuse_test(fit_split)
    slices, scores = _aligned(runs)  # scores (M, N, C)
    fit = (slices["split"] == fit_split).to_numpy()
    labels = slices["label"].to_numpy(np.int64)
    if not fit.any():
        raise CTError(f"no '{fit_split}' predictions in the runs", "a split to fit on", "choose fit_split='val'")
    weights = None
    if method == "stack":
        combined = _stack(scores, labels, fit)
    else:
        weights = np.full(len(runs), 1 / len(runs))
        if method == "weighted":
            weights = _mixture_weights(scores[:, fit, labels[fit]])
        combined = np.tensordot(weights, scores, axes=1)
    combined = combined / combined.sum(axis=1, keepdims=True)  # rounding in the stored scores
    classes = runs[0].classes
    table = slices.join(pd.DataFrame(combined, columns=[f"p_{name}" for name in classes]))
    names = tuple(run.name for run in runs)
    return Ensemble(method, names, None if weights is None else tuple(map(float, weights)), classes, table)


def choose_members(runs: Sequence[Run], fit_split: str = "val") -> list[Run]:
    """Choose which runs should vote: the best one first, then whichever helps most, while any helps.

    "Helps" is a lower log loss of the soft vote on `fit_split`, which moves with every slice, whereas macro F1
    jumps.

    Raises:
        CTError: as `ensemble`.
    Source: R. Caruana et al., Ensemble Selection from Libraries of Models, 2004,
        https://doi.org/10.1145/1015330.1015432
    """
    _refuse_test(fit_split)
    slices, scores = _aligned(runs)
    fit = (slices["split"] == fit_split).to_numpy()
    if not fit.any():
        raise CTError(f"no '{fit_split}' predictions in the runs", "a split to fit on", "choose fit_split='val'")
    of_true = scores[:, fit, slices["label"].to_numpy(np.int64)[fit]]  # probability of the true class (M, n)

    def loss(members: list[int]) -> float:
        return -float(np.log(of_true[members].mean(axis=0).clip(1e-12)).mean())

    chosen: list[int] = []
    rest = list(range(len(runs)))
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

    Raises:
        CTError: as `ensemble`, or no such split.
    """
    slices, scores = _aligned(runs)
    rows = (slices["split"] == split).to_numpy()
    if not rows.any():
        raise CTError(f"no '{split}' predictions in the runs", "a split of the runs", "choose val or test")
    labels = slices["label"].to_numpy(np.int64)[rows]
    names = [run.name for run in runs]
    wrong = pd.DataFrame((scores[:, rows].argmax(axis=2) != labels).T.astype(float), columns=names)
    return wrong.corr()


def _refuse_test(fit_split: str) -> None:
    if fit_split == "test":
        raise CTError("the test split to fit on", "val: test is for the final figure alone", "use fit_split='val'")


def _aligned(runs: Sequence[Run]) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the common slices (path, split, label) and the scores (M, N, C) in their order."""
    if len(runs) < 2:
        raise CTError(f"{len(runs)} run(s)", "two or more to put together", "train another backbone or seed")
    first, repeated = runs[0], len({run.name for run in runs}) < len(runs)
    if repeated:
        raise CTError("the same run twice", "different runs", "name each run once")
    slices = first.predictions[["path", "split", "label"]].sort_values("path").reset_index(drop=True)
    scores = []
    for run in runs:
        ours, theirs = first.record["data"], run.record["data"]
        if run.classes != first.classes:
            raise CTError(
                f"the classes {', '.join(run.classes)} in '{run.name}'",
                f"those of '{first.name}': {', '.join(first.classes)}",
                "put runs of one data set together",
            )
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise CTError(
                f"'{run.name}' on the data '{theirs['name']}' ({theirs['fingerprint']})",
                f"the data of '{first.name}': '{ours['name']}' ({ours['fingerprint']})",
                "put runs of one data set together, or train again on the present data",
            )
        table = run.predictions.sort_values("path").reset_index(drop=True)
        if not table[["path", "split", "label"]].equals(slices):
            common = set(table["path"]) & set(slices["path"])
            raise CTError(
                f"'{run.name}' with {len(table)} slices, {len(common)} of them in '{first.name}'",
                f"the same {len(slices)} slices, splits and labels",
                "train the two in the same profile",
            )
        scores.append(table[[f"p_{name}" for name in first.classes]].to_numpy(np.float64))
    return slices, np.stack(scores)


def _mixture_weights(of_true: np.ndarray, steps: int = 500) -> np.ndarray:
    """Find the weights of a mean of probabilities with the highest likelihood.

    Args:
        of_true: probability that each member gives to the true class (M, n).
    Returns:
        (M,), 0 or more, sum 1. Expectation-maximisation: each step can only raise the likelihood.
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
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000).fit(
        table[fit] - table[fit].mean(axis=0), labels[fit]
    )
    combined = np.zeros((slices, classes))  # a class without a slice in the split keeps 0
    combined[:, model.classes_] = model.predict_proba(table - table[fit].mean(axis=0))
    return combined


# ---------------------------------------------------------------- model card


def model_card(run: Run, audit: Iterable[str] | None = None) -> str:
    """Describe a run in Markdown: data, split, score with interval, per class, calibration, limits.

    Args:
        run: the record; without a test split the validation figures are shown and called optimistic.
        audit: findings of `python -m ctutils check`, one sentence each.
    Returns:
        Markdown text that ends with a line break.
    """
    record, data = run.record, run.record["data"]
    split = "test" if "test" in run.splits else "val"
    y_true, y_score = run.y_true(split), run.y_score(split)
    score = _interval(run, split)
    title = TITLES.get(record["backbone"], record["backbone"])
    trained, frozen = record["parameters"]["trained"], record["parameters"]["frozen"]
    note = f" {record['weights']['note']}" if record["weights"]["note"] else ""
    lines = [
        f"# Model card: {run.name}",
        "",
        "**Not for clinical use.** Made in a course, for learning.",
        "",
        "## Model",
        f"- {title}, weights: {record['weights']['kind']} ({record['weights']['source']}).{note}",
        f"- Trained: {record['trained']} ({trained:,} parameters; {frozen:,} frozen), BatchNorm: {record['bn']}.",
        f"- {record['optimizer']['name']}, learning rate {record['optimizer']['lr']:g}, epoch"
        f" {record['best_epoch']} of {record['epochs']} chosen on validation, seed {record['seed']},"
        f" {record['image_size']} pixels a side, profile {record['profile']}.",
        f"- Made {record['created']} on {record['device']} in {record['seconds']['total']:.0f} s,"
        f" commit {record['git_commit'] or 'unknown'}.",
        "",
        "## Data",
        f"- {data['name']} ({data['kind']}), fingerprint {data['fingerprint']}.",
        *_counts(data["counts"], run.classes),
    ]
    if data["test_from_val"]:
        lines += ["", "There was no test split: validation was cut in two, one half chose the epoch."]
    lines += [
        "",
        "## Score",
        f"- Macro F1 on {split}: **{score.value:.3f}** (95 % interval {score.low:.3f} to {score.high:.3f},"
        f" {len(y_true)} slices).",
        f"- Accuracy: {metrics.accuracy(y_true, y_score.argmax(axis=1)):.3f};"
        f" calling everything the largest class would give {np.bincount(y_true).max() / len(y_true):.3f}.",
    ]
    if split == "val":
        lines.append("- Optimistic: the same slices chose the epoch.")
    lines += ["", "## By class", *_class_table(metrics.per_class(y_true, y_score, run.classes))]
    lines += ["", "## Calibration", *_calibration(run, split)]
    lines += ["", "## Audit of the data"]
    lines += [f"- {line}" for line in audit or ("Not given. Run `python -m ctutils check` on the data set.",)]
    lines += [
        "",
        "## Limits",
        "- The interval covers the choice of slices only: not another seed, scanner, hospital or patient group.",
        "- Slices of one patient resemble each other; where patients are unknown the score may be too high.",
        "- A high score does not show that the finding was seen. Look at the audit and at notebook 14.",
    ]
    if data["kind"] == "synthetic":
        lines.append("- The pictures are drawn by a program. The score says nothing about real CT.")
    if record["weights"]["kind"] == "random":
        lines.append("- The backbone has random weights: this is not transfer learning.")
    return "\n".join(lines) + "\n"


def _counts(counts: dict, classes: Sequence[str]) -> list[str]:
    """Slices by split and class, as Markdown lines."""
    if not counts:
        return []
    rows = [[_cell(split), *(str(by_class.get(name, 0)) for name in classes)] for split, by_class in counts.items()]
    return ["", *_markdown(["split", *map(_cell, classes)], rows)]


def _class_table(table: pd.DataFrame) -> list[str]:
    rows = []
    for name, row in table.iterrows():
        values = [f"{row[column]:.3f}" for column in ("precision", "recall", "f1", "auc", "average_precision")]
        rows.append([_cell(name), f"{row['support']:.0f}", *values])
    return _markdown(["class", "slices", "precision", "recall", "F1", "ROC AUC", "average precision"], rows)


def _calibration(run: Run, split: str) -> list[str]:
    y_true, y_score = run.y_true(split), run.y_score(split)
    before = metrics.expected_calibration_error(y_true, y_score)
    lines = [f"- Expected calibration error on {split}: {before:.3f} (0 is perfect)."]
    if split == "test" and "val" in run.splits:
        temperature = metrics.fit_temperature(run.y_true("val"), _log(run.y_score("val")))
        scaled = metrics.apply_temperature(_log(y_score), temperature)
        after = metrics.expected_calibration_error(y_true, scaled)
        lines.append(f"- With the temperature {temperature:.2f}, fitted on validation: {after:.3f}.")
    return lines


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    table = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in table]


def _cell(name: object) -> str:
    return str(name).replace("|", "\\|")


def _log(y_score: np.ndarray) -> np.ndarray:
    return np.log(y_score.clip(1e-12))


def _macro_f1(run: Run, split: str) -> float:
    if split not in run.splits:
        return np.nan
    return metrics.macro_f1(run.y_true(split), run.y_score(split).argmax(axis=1), len(run.classes))


def _interval(run: Run, split: str) -> metrics.Interval:
    if split not in run.splits:
        return metrics.Interval(np.nan, np.nan, np.nan)
    return metrics.bootstrap_interval(run.y_true(split), run.y_score(split))
