"""Shortcut probes: how well do features that hold no anatomy predict the class?"""

import numpy as np
import pandas as pd

from ctutils.audit.look import Decoded
from ctutils.metrics import macro_f1, permuted_score, score_interval

# Macro F1 above chance at which a probe is flagged: the mean over the classes, and one class against the rest
# (whose chance is 0.5). Features that see the lungs also see some of the disease: on 9000 synthetic slices,
# acquired alike in every class, the lower ends were at most 0.26 and 0.27 above chance for the histogram, 0.07 and
# 0.15 for sharpness (reticulation is fine structure), 0.07 and 0.09 for the thumbnail, 0.01 and 0.02 for others.
NO_LUNGS = ("file size and metadata", "picture size", "border and corners", "place in the picture", "file name")
CRUDE = ("histogram, 32 bins", "thumbnail, 32 x 32", "sharpness and noise", "marks inside")  # what doubts a label
FLAG_MARGIN = dict.fromkeys(NO_LUNGS, (0.15, 0.2)) | dict.fromkeys((*CRUDE, "grey statistics"), (0.30, 0.25))
FLAG_MARGIN["histogram, 32 bins"] = (0.30, 0.35)
# By how much another class must be likelier than a slice's own. With one label in twenty swapped, 7 of 10 doubted
# ones were wrong in a real set that crude features can read; data/README.md has the figures.
DOUBT = 0.45
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
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = sorted(set(decoded.table["class"]))
    table, folds = _some(decoded, groups, PER_CLASS)
    if folds is None:
        return pd.DataFrame(columns=COLUMNS)
    y = table["label"].to_numpy()
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
        chance = permuted_score(y, guess, len(names), SEED, n=50).value
        threshold = chance + FLAG_MARGIN[name][0]
        flagged = bool(score.low > threshold or alone[top] > 0.5 + FLAG_MARGIN[name][1])
        result.append((name, *score, chance, threshold, names[top], alone[top], flagged, len(y)))
    return pd.DataFrame(result, columns=COLUMNS)


def doubted_labels(decoded: Decoded, groups: np.ndarray | None = None) -> pd.DataFrame:
    """Ask which labels look wrong: crude features of a slice fit another class much better than its own.

    Confident learning, cross-validated: a class is believed where its probability is above the mean that slices of
    that class get. A doubt is a question to a reader, not an error; nothing is removed for it.

    Args:
        decoded, groups: as for `shortcut_probes`.
    Returns:
        a row a doubted slice, most doubtful first: path, class, looks_like, doubt (difference of the probabilities).
    Source: C. Northcutt et al., Confident learning, 2021, https://arxiv.org/abs/1911.00068.
    """
    from sklearn.ensemble import RandomForestClassifier

    names, (table, folds) = np.array(sorted(set(decoded.table["class"]))), _some(decoded, groups, None)
    if folds is None:
        return pd.DataFrame(columns=["path", "class", "looks_like", "doubt"])
    x = np.concatenate([decoded.features[name][table.index].astype(np.float32) for name in CRUDE], axis=1)
    y = table["label"].to_numpy()
    forest = RandomForestClassifier(100, min_samples_leaf=2, class_weight="balanced", random_state=SEED)
    likely, rng = np.zeros((len(y), len(names))), np.random.default_rng(SEED)
    for learn, ask in folds.split(x, y, table["group"]):
        learn = pd.Series(rng.permutation(learn))
        learn = learn[learn.groupby(y[learn]).cumcount() < PER_CLASS]
        likely[ask] = forest.fit(x[learn], y[learn]).predict_proba(x[ask])
    believed = np.array([likely[y == label, label].mean() for label in range(len(names))])
    others = np.where((likely >= believed) & (np.arange(len(names)) != y[:, None]), likely, 0)
    doubt = others.max(axis=1) - likely[np.arange(len(y)), y]
    table = table.assign(looks_like=names[others.argmax(axis=1)], doubt=doubt)[doubt > DOUBT]
    table = table.sort_values(["doubt", "path"], ascending=[False, True])
    return table[["path", "class", "looks_like", "doubt"]].reset_index(drop=True)


def _some(decoded: Decoded, groups: np.ndarray | None, most: int | None) -> tuple:
    """Return readable slices, at most `most` of a class, with their groups, and folds: None where there are too few."""
    from sklearn.model_selection import StratifiedGroupKFold

    names = sorted(set(decoded.table["class"]))
    table = decoded.table.assign(group=range(len(decoded.table)) if groups is None else groups)
    table = table[table["problem"] == ""].sample(frac=1, random_state=SEED)
    table = table.groupby("label").head(most or len(table)).sort_index()
    of_class = table.groupby("class")["group"].agg(["size", "nunique"]).reindex(names, fill_value=0).min()
    if of_class["size"] < 10 or of_class["nunique"] < 2:
        return table, None
    return table, StratifiedGroupKFold(min(FOLDS, of_class["nunique"]), shuffle=True, random_state=SEED)
