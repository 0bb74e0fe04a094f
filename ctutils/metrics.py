"""Scores of a classifier: pure functions of `y_true (N,)`, `y_pred (N,)` and `y_score (N, C)`.

Nothing here trains, reads files or draws. Intervals take the slices as the sample: they say how far the score
would move on other slices of the same kind, not how far it would move with another seed or hospital.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from ctutils.base import CTError


def macro_f1(y_true: np.ndarray, y_pred: np.ndarray, num_classes: int) -> float:
    """Return the unweighted mean of the classes' F1.

    A class that is neither in `y_true` nor in `y_pred` counts as 0, as in
    `sklearn.metrics.f1_score(average="macro", labels=range(C), zero_division=0)`.

    Args:
        y_true: int (N,) in [0, C).
        y_pred: int (N,) in [0, C).
        num_classes: C.
    Raises:
        CTError: empty, other lengths, not whole numbers, or labels outside [0, C).
    """
    return float(_macro_f1(confusion(y_true, y_pred, num_classes)))


def accuracy(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    """Return the share of slices whose class is right.

    Args:
        y_true: int (N,).
        y_pred: int (N,).
    Raises:
        CTError: empty, other lengths, or not whole numbers.
    """
    y_true, y_pred = _check_labels(y_true, "y_true"), _check_labels(y_pred, "y_pred")
    _check_lengths(y_true, y_pred)
    return float(np.mean(y_true == y_pred))


def confusion(y_true: np.ndarray, y_pred: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the slices of true class i called class j.

    Args:
        y_true: int (N,) in [0, C).
        y_pred: int (N,) in [0, C).
        num_classes: C.
    Returns:
        int64 (C, C); rows are true classes, columns are predicted ones.
    Raises:
        CTError: empty, other lengths, not whole numbers, or labels outside [0, C).
    """
    y_true, y_pred = (
        _check_labels(y_true, "y_true", num_classes),
        _check_labels(y_pred, "y_pred", num_classes),
    )
    _check_lengths(y_true, y_pred)
    cells = np.bincount(y_true * num_classes + y_pred, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def per_class(y_true: np.ndarray, y_score: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Score each class against all others.

    Args:
        y_true: int (N,) in [0, C).
        y_score: float (N, C), one column a class; the highest decides.
        classes: C names.
    Returns:
        One row a class, in order: precision, recall, f1, support (slices), auc (one-vs-rest ROC),
        average_precision. NaN where there is nothing to rank: a class without slices, or without others.
    Raises:
        CTError: empty, other shapes, NaN, or labels outside [0, C).
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    y_true, y_score = _check_scores(y_true, y_score)
    if len(classes) != y_score.shape[1]:
        raise CTError(f"{len(classes)} class names", f"{y_score.shape[1]}, one a column", "pass the run's classes")
    matrix = confusion(y_true, y_score.argmax(axis=1), len(classes))
    right, support, called = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    rows = []
    for k in range(len(classes)):
        is_class = y_true == k
        both = 0 < support[k] < len(y_true)
        rows.append(
            {
                "precision": right[k] / called[k] if called[k] else 0.0,
                "recall": right[k] / support[k] if support[k] else 0.0,
                "f1": 2 * right[k] / (support[k] + called[k]) if support[k] + called[k] else 0.0,
                "support": int(support[k]),
                "auc": roc_auc_score(is_class, y_score[:, k]) if both else np.nan,
                "average_precision": average_precision_score(is_class, y_score[:, k]) if both else np.nan,
            }
        )
    return pd.DataFrame(rows, index=pd.Index(classes, name="class"))


# ---------------------------------------------------------------- how sure is a score


class Interval(NamedTuple):
    """A score with the limits between which the true one probably lies."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Score of A minus score of B on the same slices, with its interval and what that means in words."""

    difference: float
    low: float
    high: float
    verdict: str


def bootstrap_interval(
    y_true: np.ndarray,
    y_pred_or_score: np.ndarray,
    metric: str = "macro_f1",
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    num_classes: int | None = None,
) -> Interval:
    """Return a score with its interval, from a class-stratified bootstrap.

    A plain bootstrap draws slices again and again; it is too sure of itself when errors are rare (with no
    error at all it says 1.0 to 1.0). This one gives every slice a random weight instead, keeps the total
    weight of each class, and adds one imagined slice that is wrong in half of the draws ("mid-P"). Only the
    cells of the confusion matrix matter, so the weights are drawn a cell, not a slice.
    `tests/bench/interval_coverage.py` measures how often the interval holds the truth.

    Args:
        y_true: int (N,) in [0, C).
        y_pred_or_score: predicted classes int (N,), or scores float (N, C).
        metric: "macro_f1" or "accuracy".
        n: draws.
        seed: of the draws; same seed, same interval.
        level: share of repetitions in which the interval should hold the true score.
        num_classes: C; needed only for classes that are in neither of two label arrays.
    Returns:
        (value, low, high).
    Raises:
        CTError: unusable input, an unknown metric, `n` below 100, or `level` outside (0, 1).
    Source: D. Rubin, The Bayesian Bootstrap, 1981, https://doi.org/10.1214/aos/1176345338;
        M. Fay and S. Kim, mid-P intervals for rates, 2017, https://doi.org/10.1002/bimj.201600111
    """
    statistic = _statistic(metric, n, level)
    y_true, (y_pred,), num_classes = _predictions(y_true, [y_pred_or_score], num_classes)
    value = float(statistic(confusion(y_true, y_pred, num_classes)))
    (draws,) = _draw_confusions(y_true, [y_pred], num_classes, n, np.random.default_rng(seed))
    return Interval(value, *_limits(statistic(draws), value, level))


def paired_difference(
    y_true: np.ndarray,
    score_a: np.ndarray,
    score_b: np.ndarray,
    metric: str = "macro_f1",
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    names: tuple[str, str] = ("A", "B"),
    num_classes: int | None = None,
) -> PairedDifference:
    """Compare two models on the same slices: `bootstrap_interval` with the same weights for both.

    Slices that both get right, or both wrong, cancel out, so that this is much sharper than comparing two
    intervals. It compares these two trained models; another seed of either may differ. Of many pairs of equal
    models, about one in twenty seems to differ by chance alone.

    Args:
        y_true: int (N,) in [0, C).
        score_a: predicted classes int (N,), or scores float (N, C).
        score_b: as `score_a`, rows in the same order.
        metric: "macro_f1" or "accuracy".
        n: draws.
        seed: of the draws.
        level: of the interval.
        names: what the verdict calls the two.
        num_classes: C; needed only for classes that are in none of three label arrays.
    Returns:
        difference (A minus B), low, high, and the verdict: "A is higher", "B is higher" or "not
        distinguishable on these slices".
    Raises:
        CTError: as `bootstrap_interval`.
    """
    return seeds_difference(y_true, [score_a], [score_b], metric, n, seed, level, names, num_classes)


def seeds_difference(
    y_true: np.ndarray,
    scores_a: Sequence[np.ndarray],
    scores_b: Sequence[np.ndarray],
    metric: str = "macro_f1",
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    names: tuple[str, str] = ("A", "B"),
    num_classes: int | None = None,
) -> PairedDifference:
    """Compare two ways to train, each repeated over seeds: the mean metric of A's runs minus that of B's.

    As `paired_difference`, with the same weights of the slices for every run of both. The interval is over
    slices; how far the seeds lie apart must be shown beside it.

    Args:
        y_true: int (N,) in [0, C).
        scores_a: one a seed: predicted classes int (N,), or scores float (N, C), rows in the same order.
        scores_b: as `scores_a`, one or more.
        metric, n, seed, level, names, num_classes: as in `paired_difference`.
    Raises:
        CTError: no scores, or as `bootstrap_interval`.
    """
    if not len(scores_a) or not len(scores_b):
        raise CTError("no scores", "one run or more of both ways", "train them first")
    statistic = _statistic(metric, n, level)
    y_true, preds, num_classes = _predictions(y_true, [*scores_a, *scores_b], num_classes)
    share = np.r_[np.full(len(scores_a), 1 / len(scores_a)), np.full(len(scores_b), -1 / len(scores_b))]
    difference = float(share @ [float(statistic(confusion(y_true, y_pred, num_classes))) for y_pred in preds])
    draws = _draw_confusions(y_true, preds, num_classes, n, np.random.default_rng(seed))
    low, high = _limits(share @ np.stack([statistic(matrix) for matrix in draws]), difference, level)
    verdict = "not distinguishable on these slices"
    if low > 0 or high < 0:
        verdict = f"{names[0] if low > 0 else names[1]} is higher"
    return PairedDifference(difference, low, high, verdict)


def _draw_confusions(
    y_true: np.ndarray, preds: list[np.ndarray], num_classes: int, n: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Draw `n` confusion matrices (n, C, C) a model, as if the slices had been collected again.

    The weight of m equal slices is a gamma of shape m. Shapes shrink by 2 slices a class, which makes the
    spread of a share p exactly p (1 - p) / (n - 1), as for n drawn slices.
    """
    cells, counts = np.unique(np.stack([y_true, *preds], axis=1), axis=0, return_counts=True)
    support = np.bincount(y_true, minlength=num_classes)  # (C,)
    shrink = np.maximum(support - 2, support / 2) / np.maximum(support, 1)
    weights = rng.standard_gamma(counts * shrink[cells[:, 0]], size=(n, len(cells)))  # (n, cells)

    matrices = []
    for column in range(1, len(preds) + 1):
        to_matrix = np.zeros((len(cells), num_classes**2))
        to_matrix[np.arange(len(cells)), cells[:, 0] * num_classes + cells[:, column]] = 1
        matrices.append((weights @ to_matrix).reshape(n, num_classes, num_classes))

    draw, present = np.arange(n), np.unique(y_true)
    for model in range(len(preds)):  # one imagined slice a model: the others are right, it is wrong or right
        true = rng.choice(present, size=n)
        wrong = (true + rng.integers(1, num_classes, size=n)) % num_classes
        called = np.where(rng.random(n) < 0.5, wrong, true)
        weight = rng.standard_exponential(n)
        for other, matrix in enumerate(matrices):
            matrix[draw, true, called if other == model else true] += weight

    for matrix in matrices:
        total = matrix.sum(axis=2, keepdims=True)  # (n, C, 1); 0 for a class without slices
        matrix *= np.divide(support[:, None], total, out=np.zeros_like(total), where=total > 0)
    return matrices


def _limits(draws: np.ndarray, value: float, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), value), max(float(high), value)


def _statistic(metric: str, n: int, level: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function of confusion matrices that `metric` names."""
    known = {"macro_f1": _macro_f1, "accuracy": _accuracy}
    if metric not in known:
        raise CTError(f"the metric '{metric}'", " or ".join(known), "choose one of them")
    if n < 100:
        raise CTError(f"{n} draws", "at least 100", "leave out n for 2000")
    if not 0 < level < 1:
        raise CTError(f"the level {level}", "a share between 0 and 1", "leave out level for 0.95")
    return known[metric]


# ---------------------------------------------------------------- are the probabilities right


def reliability(y_true: np.ndarray, y_score: np.ndarray, bins: int = 15) -> pd.DataFrame:
    """Compare confidence (probability of the predicted class) with how often it is right.

    Args:
        y_true: int (N,) in [0, C).
        y_score: probabilities float (N, C); rows sum to 1.
        bins: equally wide bins of confidence from 0 to 1.
    Returns:
        One row a bin: low, high, count, confidence (mean), accuracy; the last two NaN in an empty bin.
    Raises:
        CTError: empty, other shapes, NaN, not probabilities, labels outside [0, C), or `bins` below 1.
    """
    y_true, y_score = _check_scores(y_true, y_score, probabilities=True)
    if bins < 1:
        raise CTError(f"{bins} bins", "at least 1", "leave out bins for 15")
    confidence, right = y_score.max(axis=1), y_score.argmax(axis=1) == y_true
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "low": np.arange(bins) / bins,
                "high": np.arange(1, bins + 1) / bins,
                "count": count,
                "confidence": np.bincount(place, confidence, bins) / count,
                "accuracy": np.bincount(place, right, bins) / count,
            }
        )


def expected_calibration_error(y_true: np.ndarray, y_score: np.ndarray, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy, bins weighted by their slices; 0 is perfect.

    Args and Raises: as `reliability`.
    Source: M. Naeini et al., Obtaining Well Calibrated Probabilities, 2015,
        https://doi.org/10.1609/aaai.v29i1.9602
    """
    table = reliability(y_true, y_score, bins)
    gap = (table["confidence"] - table["accuracy"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())


def fit_temperature(y_true: np.ndarray, logits_or_logprob: np.ndarray) -> float:
    """Find the one number T for which softmax(logits / T) gives the true classes the highest likelihood.

    Fit on validation only; fitted on test, it would flatter the test. T > 1 means the model was too sure. A
    split without any error pushes T down to its lower limit, 0.05: do not use it then.

    Args:
        y_true: int (N,) in [0, C).
        logits_or_logprob: float (N, C); log(probability) does as well as logits, and log(0) is allowed.
    Returns:
        T between 0.05 and 20.
    Raises:
        CTError: empty, other shapes, NaN, or labels outside [0, C).
    Source: C. Guo et al., On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
    """
    from scipy.optimize import minimize_scalar

    logits = _floor(logits_or_logprob)
    y_true, logits = _check_scores(y_true, logits)

    def loss(log_t: float) -> float:
        log_prob = _log_softmax(logits / np.exp(log_t))
        return -float(log_prob[np.arange(len(y_true)), y_true].mean())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


def apply_temperature(logits_or_logprob: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(logits / T): the same classes, other confidence.

    Args:
        logits_or_logprob: float (N, C); log(0) is allowed.
        temperature: T > 0, from `fit_temperature`.
    Returns:
        float64 (N, C); rows sum to 1.
    Raises:
        CTError: not a table, NaN, or T not above 0.
    """
    logits = _floor(logits_or_logprob)
    _check_scores(np.zeros(len(logits), int), logits)
    if not 0 < temperature < np.inf:
        raise CTError(f"the temperature {temperature}", "a number above 0", "take it from fit_temperature")
    return np.exp(_log_softmax(logits / temperature))


def _floor(logits: np.ndarray) -> np.ndarray:
    """Lift log(0) to a probability of about 1e-26 beside the row's best class."""
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim == 2 and logits.size:
        logits = np.maximum(logits, logits.max(axis=1, keepdims=True) - 60)
    return logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


# ---------------------------------------------------------------- on confusion matrices, and checks


def _macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Macro F1 of confusion matrices (..., C, C), which may be counts or shares."""
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    total = matrix.sum(axis=-1) + matrix.sum(axis=-2)  # true + predicted
    return np.divide(2 * right, total, out=np.zeros(right.shape), where=total > 0).mean(axis=-1)


def _accuracy(matrix: np.ndarray) -> np.ndarray:
    """Accuracy of confusion matrices (..., C, C)."""
    return np.trace(matrix, axis1=-2, axis2=-1) / matrix.sum(axis=(-2, -1))


def _check_labels(labels: np.ndarray, name: str, num_classes: int | None = None) -> np.ndarray:
    """Return `labels` as int64 (N,), or raise what is wrong with them."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise CTError(f"{name} of shape {labels.shape}", "one label a slice, shape (N,)", "pass a flat array")
    if not len(labels):
        raise CTError(f"an empty {name}", "at least one label", "check that the split holds slices")
    if labels.dtype.kind not in "iu":
        whole = labels.dtype.kind == "f" and bool(np.all(labels == np.round(labels)))  # NaN is not whole
        if not whole:
            raise CTError(f"{name} of type {labels.dtype} with no whole numbers", "int labels", "pass class numbers")
    labels = labels.astype(np.int64)
    if labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        raise CTError(
            f"labels {labels.min()} to {labels.max()} in {name}",
            f"labels from 0{top}",
            "check the order and number of the classes",
        )
    return labels


def _check_lengths(y_true: np.ndarray, other: np.ndarray) -> None:
    if len(y_true) != len(other):
        raise CTError(f"{len(y_true)} true labels and {len(other)} predictions", "one each a slice", "align the two")


def _check_scores(
    y_true: np.ndarray, y_score: np.ndarray, probabilities: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels int64 (N,) and scores float64 (N, C), or raise what is wrong with them."""
    y_score = np.asarray(y_score, dtype=np.float64)
    if y_score.ndim != 2 or y_score.shape[1] < 2:
        raise CTError(f"scores of shape {y_score.shape}", "(N, C) with C of 2 or more", "pass one column a class")
    y_true = _check_labels(y_true, "y_true", y_score.shape[1])
    _check_lengths(y_true, y_score)
    if not np.isfinite(y_score).all():
        row = int(np.nonzero(~np.isfinite(y_score).all(axis=1))[0][0])
        raise CTError(f"NaN or infinity in the scores, first in row {row}", "finite numbers", "look at the training")
    if probabilities and (y_score.min() < 0 or np.abs(y_score.sum(axis=1) - 1).max() > 1e-3):
        raise CTError("scores that are no probabilities", "rows from 0 to 1 that sum to 1", "pass softmax outputs")
    return y_true, y_score


def _predictions(
    y_true: np.ndarray, given: list[np.ndarray], num_classes: int | None
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """Turn scores (N, C) or labels (N,) into checked labels, and find the number of classes."""
    given = [np.asarray(array) for array in given]
    widths = {array.shape[1] for array in given if array.ndim == 2} | ({num_classes} if num_classes else set())
    if len(widths) > 1:
        raise CTError(f"scores of {sorted(widths)} classes", "the same classes", "compare runs of one data set")
    preds = []
    for array in given:
        if array.ndim == 2:
            _, array = _check_scores(y_true, array)
            array = array.argmax(axis=1)
        preds.append(_check_labels(array, "y_pred", *widths))
        _check_lengths(y_true, array)
    y_true = _check_labels(y_true, "y_true", *widths)
    num_classes = widths.pop() if widths else int(max(labels.max() for labels in [y_true, *preds])) + 1
    return y_true, preds, max(num_classes, 2)
