"""Shortcut probes: how well do features that hold no anatomy predict the class?"""

import warnings

import numpy as np
import pandas as pd

from ctutils.audit.look import Decoded
from ctutils.metrics import bootstrap_interval, macro_f1

# Macro F1 above chance at which a probe is flagged: the mean over the classes, and one class against the rest
# (whose chance is 0.5). Features that see the lungs also see some of the disease: on 9000 synthetic slices,
# acquired alike in every class, the lower ends were at most 0.26 and 0.27 above chance for the histogram, 0.07 and
# 0.15 for sharpness (reticulation is fine structure), 0.07 and 0.09 for the thumbnail, 0.01 and 0.02 for others.
FLAG_MARGIN = {
    "file size and metadata": (0.15, 0.2),
    "picture size": (0.15, 0.2),
    "grey statistics": (0.30, 0.25),
    "histogram, 32 bins": (0.30, 0.35),
    "thumbnail, 32 x 32": (0.30, 0.25),
    "sharpness and noise": (0.30, 0.25),
    "border and corners": (0.15, 0.2),
}


def shortcut_probes(
    decoded: Decoded,
    groups: np.ndarray | None = None,
    *,
    per_class: int = 600,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Ask how well features that hold no anatomy predict the class, cross-validated.

    Every probe is a logistic regression and a random forest (for what is not monotone) on standardised
    features, with balanced class weights; the better of the two counts. Chance is what the same predictions
    score against shuffled labels. A probe is flagged when the lower end of its 95 % interval is above
    chance + `FLAG_MARGIN`, or when that holds for one class alone against the rest: a mark that only one class
    of five bears lifts the mean over classes by little.

    Args:
        decoded: N slices; unreadable ones are left out.
        groups: int (N,), slices of one patient or with the same content share a number; a group is never in
            two folds (default: every slice alone).
        per_class: slices of a class at most, drawn at random.
        folds: of the cross-validation; fewer when a class is small.
        seed: of the draws.
    Returns:
        a row a probe: probe, macro_f1, low, high, chance, threshold, best_class, class_low (lower end
        for that class against the rest), flagged, slices. Empty when a class has fewer than 10 readable
        slices or two groups.
    Source: notebook 01.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    columns = ["probe", "macro_f1", "low", "high", "chance", "threshold"]
    columns += ["best_class", "class_low", "flagged", "slices"]
    rng = np.random.default_rng(seed)
    table = decoded.table
    groups = np.arange(len(table)) if groups is None else np.asarray(groups)
    readable = np.flatnonzero(table["problem"] == "")
    labels = table["label"].to_numpy()
    classes = len(decoded.folder.classes)
    members = [rng.permutation(readable[labels[readable] == c])[:per_class] for c in range(classes)]
    rows = np.sort(np.concatenate(members))
    smallest = min(len(np.unique(groups[m])) for m in members)
    if smallest < 2 or min(map(len, members)) < 10:
        return pd.DataFrame(columns=columns)
    parts = grouped_folds(labels[rows], groups[rows], min(folds, smallest), seed)
    models = (
        make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=100, tol=1e-2)),
        RandomForestClassifier(50, min_samples_leaf=2, class_weight="balanced", random_state=seed),
    )
    result = []
    for name, values in decoded.features.items():
        x, y = values[rows].astype(np.float64), labels[rows]
        # A column without two values says nothing; without any column left the probe guesses.
        x = x[:, np.ptp(x, axis=0) > 0]
        best = (0.0, np.zeros_like(y))
        for model in models if x.shape[1] else ():
            guess = _cross_predict(model, x, y, parts)
            best = max(best, (macro_f1(y, guess, classes), guess), key=lambda pair: pair[0])
        score = bootstrap_interval(y, best[1], num_classes=classes, seed=seed)
        alone = [
            bootstrap_interval(*(np.equal(v, c).astype(int) for v in (y, best[1])), num_classes=2, n=500, seed=seed).low
            for c in range(classes)
        ]
        top = int(np.argmax(alone))
        chance = float(np.mean([macro_f1(rng.permutation(y), best[1], classes) for _ in range(50)]))
        threshold, class_threshold = chance + FLAG_MARGIN[name][0], 0.5 + FLAG_MARGIN[name][1]
        flagged = bool(score.low > threshold or alone[top] > class_threshold)
        verdict = (threshold, decoded.folder.classes[top], alone[top], flagged)
        result.append((name, *score, chance, *verdict, len(y)))
    return pd.DataFrame(result, columns=columns)


def _cross_predict(model, x: np.ndarray, y: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return a prediction for every slice, by the model fitted on the folds that it is not in."""
    guess = np.full_like(y, np.bincount(y).argmax())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # slow convergence: good enough for a probe
        # One fold after the other: threads here would fight with those of the linear algebra, 5 times slower.
        for part in np.unique(parts):
            inside = parts != part
            if len(np.unique(y[inside])) > 1:
                guess[~inside] = model.fit(x[inside], y[inside]).predict(x[~inside])
    return guess


def grouped_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of every slice, int (N,): classes alike in all folds, no group in two."""
    from sklearn.model_selection import StratifiedGroupKFold

    parts = np.zeros(len(labels), int)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer slices than folds
        for number, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
            parts[rows] = number
    return parts
