"""Shortcut probes: how well do features that hold no anatomy predict the class?"""

import numpy as np
import pandas as pd

from ctutils.audit.look import Decoded
from ctutils.metrics import macro_f1, score_interval

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
PER_CLASS, FOLDS, SEED = 600, 5, 0
COLUMNS = "probe macro_f1 low high chance threshold best_class class_low flagged slices".split()


def shortcut_probes(decoded: Decoded, groups: np.ndarray | None = None) -> pd.DataFrame:
    """Ask how well features that hold no anatomy predict the class, cross-validated.

    Every probe is a logistic regression on standardised features and a random forest (for what is not monotone),
    with balanced class weights; the better of the two counts. They see at most 600 slices of a class, in five folds
    (fewer when a class is small). Chance is what the same predictions score against shuffled labels. A probe is
    flagged when the lower end of its 95 % interval is above chance + `FLAG_MARGIN`, or when that holds for one
    class alone against the rest: a mark that only one class of five bears lifts the mean over classes by little.

    Args:
        decoded: N slices; unreadable ones are left out.
        groups: int (N,), slices of one patient or with the same content share a number; a group is never in
            two folds (default: every slice alone).
    Returns:
        a row a probe: probe, macro_f1, low, high, chance, threshold, best_class, class_low (lower end
        for that class against the rest), flagged, slices. Empty when a class has fewer than 10 readable
        slices or two groups.
    Source: notebook 01.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    table = decoded.table.assign(group=range(len(decoded.table)) if groups is None else groups)
    rng = np.random.default_rng(SEED)
    names = sorted(set(table["class"]))
    table = table[table["problem"] == ""]
    table = table.sample(frac=1, random_state=SEED).groupby("label").head(PER_CLASS).sort_index()
    of_class = table.groupby("class")["group"].agg(["size", "nunique"]).reindex(names, fill_value=0).min()
    if of_class["size"] < 10 or of_class["nunique"] < 2:
        return pd.DataFrame(columns=COLUMNS)
    y = table["label"].to_numpy()
    folds = StratifiedGroupKFold(min(FOLDS, of_class["nunique"]), shuffle=True, random_state=SEED)
    models = (
        make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000, tol=1e-2)),
        RandomForestClassifier(50, min_samples_leaf=2, class_weight="balanced", random_state=SEED),
    )
    result = []
    for name, values in decoded.features.items():
        x = values[table.index].astype(float)
        guesses = [cross_val_predict(model, x, y, groups=table["group"], cv=folds) for model in models]
        guess = max(guesses, key=lambda guess: macro_f1(y, guess, len(names)))
        score = score_interval(y, guess, num_classes=len(names), seed=SEED)
        ones = [((y == c).astype(int), (guess == c).astype(int)) for c in range(len(names))]
        alone = [score_interval(*one, num_classes=2, n=500, seed=SEED).low for one in ones]
        top = int(np.argmax(alone))
        chance = float(np.mean([macro_f1(rng.permutation(y), guess, len(names)) for _ in range(50)]))
        threshold = chance + FLAG_MARGIN[name][0]
        flagged = bool(score.low > threshold or alone[top] > 0.5 + FLAG_MARGIN[name][1])
        result.append((name, *score, chance, threshold, names[top], alone[top], flagged, len(y)))
    return pd.DataFrame(result, columns=COLUMNS)
