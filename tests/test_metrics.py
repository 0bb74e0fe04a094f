"""metrics: held against scikit-learn, against hand-made cases, and against a simulation with known truth."""

import numpy as np
import pytest
from sklearn import metrics as sk

from ctutils import metrics


def make_case(n=300, num_classes=5, sharpness=1.5, seed=0):
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, num_classes, n)
    logits = rng.standard_normal((n, num_classes))
    logits[np.arange(n), y_true] += sharpness
    return y_true, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), logits


@pytest.mark.parametrize("seed", range(5))
def test_same_as_sklearn(seed):
    rng = np.random.default_rng(seed)
    y_true, y_pred = rng.integers(0, 4, 60), rng.integers(1, 6, 60)  # class 6 is in neither
    expected = sk.f1_score(y_true, y_pred, average="macro", labels=range(7), zero_division=0)
    assert metrics.macro_f1(y_true, y_pred, 7) == pytest.approx(expected, abs=1e-12)
    assert metrics.accuracy(y_true, y_pred) == sk.accuracy_score(y_true, y_pred)
    np.testing.assert_array_equal(
        metrics.confusion(y_true, y_pred, 7), sk.confusion_matrix(y_true, y_pred, labels=range(7))
    )


def test_per_class_same_as_sklearn():
    y_true, y_score, _ = make_case()
    table = metrics.per_class(y_true, y_score, list("abcde"))
    precision, recall, f1, support = sk.precision_recall_fscore_support(y_true, y_score.argmax(axis=1))
    np.testing.assert_allclose(table[["precision", "recall", "f1", "support"]].T, [precision, recall, f1, support])
    for k, name in enumerate("abcde"):
        assert table.loc[name, "auc"] == pytest.approx(sk.roc_auc_score(y_true == k, y_score[:, k]))
        expected = sk.average_precision_score(y_true == k, y_score[:, k])
        assert table.loc[name, "average_precision"] == pytest.approx(expected)


def test_per_class_without_slices_of_a_class():
    table = metrics.per_class([0, 0, 1], [[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.9, 0]], ["a", "b", "c"])
    assert table.loc["c", "support"] == table.loc["c", "f1"] == 0 and table.loc["a", "auc"] == 1
    assert table.loc["c", ["auc", "average_precision"]].isna().all()


def test_interval_is_repeatable_and_holds_its_value():
    y_true, y_score, _ = make_case()
    first = metrics.score_interval(y_true, y_score)
    assert first == metrics.score_interval(y_true, y_score.argmax(axis=1), num_classes=5)
    assert first != metrics.score_interval(y_true, y_score, seed=1)
    assert first.value == metrics.macro_f1(y_true, y_score.argmax(axis=1), 5)
    assert 0 < first.low < first.value < first.high < 1
    wide = metrics.score_interval(y_true, y_score, level=0.99)
    assert wide.low < first.low and first.high < wide.high


def test_interval_is_the_dirichlet_posterior_of_the_rows():
    y_true, y_score, _ = make_case(60)
    rows, prior = metrics.confusion(y_true, y_score.argmax(axis=1), 5), 1 / 20
    rng, shrunk = np.random.default_rng(1), rows * (1 - 2 / rows.sum(axis=1, keepdims=True))
    drawn = np.stack([rng.dirichlet(row + prior, 20_000) for row in shrunk], axis=1) * rows.sum(axis=1, keepdims=True)
    right, total = np.diagonal(drawn, axis1=1, axis2=2), drawn.sum(axis=1) + drawn.sum(axis=2)
    expected = np.quantile((2 * right / total).mean(axis=1), [0.025, 0.975])
    found = metrics.score_interval(y_true, y_score, n=20_000)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.005)


def test_interval_of_a_perfect_score_is_not_a_point():
    y_true = np.repeat([0, 1], 50)
    value, low, high = metrics.score_interval(y_true, y_true)
    assert value == high == 1.0
    assert 0.95 < low < 0.98  # "rule of three": about 3 wrong of 100 could still be there
    value, low, high = metrics.score_interval(y_true, 1 - y_true)
    assert value == low == 0.0 < high < 0.05


def test_interval_with_absent_and_tiny_classes():
    value, low, high = metrics.score_interval([0, 0, 0, 2], [0, 0, 2, 2], num_classes=4)
    assert 0 <= low <= value <= high <= 0.5 + 1e-9  # two of four classes count as 0
    assert np.isfinite(metrics.score_interval([0], [0])).all()


def test_coverage_on_known_truth(counts=(25, 25, 100, 25, 25), right=0.99):
    """A short form of tests/bench/interval_coverage.py; the plain bootstrap covers only about 85 % here."""
    counts, classes = np.array(counts), len(counts)
    shares = np.full((classes, classes), (1 - right) / (classes - 1))
    np.fill_diagonal(shares, right)
    called = counts @ shares
    truth = np.mean(2 * right * counts / (counts + called))
    rng, covered = np.random.default_rng(0), []
    y_true = np.repeat(range(classes), counts)
    for repetition in range(250):
        y_pred = np.concatenate([rng.choice(classes, n, p=row) for n, row in zip(counts, shares, strict=True)])
        _, low, high = metrics.score_interval(y_true, y_pred, n=400, seed=repetition, num_classes=classes)
        covered.append(low <= truth <= high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_patients_are_drawn_where_they_are_known():
    y_true = np.repeat([0, 1], 200)
    patients = np.arange(400).astype(str)
    y_pred = np.where(np.arange(400) % 40 < 8, 1 - y_true, y_true)  # 20 % wrong
    slices = metrics.score_interval(y_true, y_pred, n=8000)

    def width(patients):
        found = metrics.score_interval(y_true, y_pred, n=8000, patients=patients)
        assert found.value == slices.value and found.low < found.value < found.high
        return (found.high - found.low) / (slices.high - slices.low)

    assert width(patients) == pytest.approx(1, abs=0.05), "a patient a slice"
    assert width(np.full(400, "")) == pytest.approx(1, abs=0.05), "an unknown patient is a patient of its own"
    blocks = (np.arange(400) // 8).astype(str)  # each block of eight is all right or all wrong
    assert width(blocks) == pytest.approx(np.sqrt(8), abs=0.35)
    half = np.where(y_true == 0, blocks, "")
    assert 1.6 < width(half) < 2.4
    pair = metrics.paired_difference(y_true, y_true, y_pred, n=8000)
    clustered = metrics.paired_difference(y_true, y_true, y_pred, n=8000, patients=blocks)
    assert clustered.high - clustered.low > 2 * (pair.high - pair.low) and clustered.verdict == "A is higher"


def test_permuted_score_is_that_of_shuffled_labels():
    y_true, y_score, _ = make_case(200)
    y_pred, rng = np.where(y_score.argmax(axis=1) == 3, 0, y_score.argmax(axis=1)), np.random.default_rng(9)
    scores = [metrics.macro_f1(rng.permutation(y_true), y_pred, 6) for _ in range(4000)]
    found = metrics.permuted_score(y_true, y_pred, 6)
    assert found == pytest.approx((np.mean(scores), *np.quantile(scores, [0.025, 0.975])), abs=0.006)
    assert found == metrics.permuted_score(y_true, y_pred, 6) != metrics.permuted_score(y_true, y_pred, 6, seed=1)
    assert metrics.permuted_score([0, 0, 1, 1], [1, 1, 1, 1], 2) == pytest.approx((1 / 3,) * 3)


def test_paired_difference():
    y_true, y_score, _ = make_case(400)
    better = 0.5 * y_score + 0.5 * np.eye(5)[y_true] * (np.arange(400) % 2)[:, None]
    result = metrics.paired_difference(y_true, better, y_score)
    assert 0 < result.low < result.difference < result.high and result.verdict == "A is higher"
    back = metrics.paired_difference(y_true, y_score, better, names=("old", "new"))
    assert back.difference == pytest.approx(-result.difference) and back.verdict == "new is higher"
    same = metrics.paired_difference(y_true, y_score, y_score)
    assert same.difference == 0 and -0.02 < same.low < 0 < same.high < 0.02  # never quite sure of a tie
    assert same.verdict == "not distinguishable on these slices"


def test_seeds_difference_is_between_means():
    rng = np.random.default_rng(3)
    y_true = rng.integers(0, 4, 400)
    good, bad = (
        [np.where(rng.random(400) < error, rng.integers(0, 4, 400), y_true) for _ in range(count)]
        for error, count in ((0.3, 3), (0.5, 2))
    )
    found = metrics.seeds_difference(y_true, good, bad)
    f1 = [np.mean([metrics.macro_f1(y_true, y_pred, 4) for y_pred in way]) for way in (good, bad)]
    assert found.difference == pytest.approx(f1[0] - f1[1])
    assert 0 < found.low < found.difference < found.high and found.verdict == "A is higher"
    one = metrics.paired_difference(y_true, good[0], bad[0])
    assert found.high - found.low < one.high - one.low, "several seeds tell more than one"


def test_paired_is_sharper_than_two_intervals():
    y_true, y_score, _ = make_case(400)
    y_pred = y_score.argmax(axis=1)
    other = y_pred.copy()
    mended = np.nonzero(y_pred != y_true)[0][:12]
    other[mended] = y_true[mended]
    one, two = metrics.score_interval(y_true, y_pred), metrics.score_interval(y_true, other)
    assert two.low < one.high  # the intervals overlap widely
    assert metrics.paired_difference(y_true, other, y_pred).verdict == "A is higher"


def test_false_alarms_are_rare():
    rng, alarms, repetitions = np.random.default_rng(1), 0, 300
    y_true = np.repeat(range(5), [25, 25, 100, 25, 25])
    for repetition in range(repetitions):
        a, b = (np.where(rng.random(200) < 0.15, (y_true + rng.integers(1, 5, 200)) % 5, y_true) for _ in range(2))
        result = metrics.paired_difference(y_true, a, b, n=400, seed=repetition)
        alarms += result.verdict != "not distinguishable on these slices"
    assert 0.01 <= alarms / repetitions <= 0.09


def test_reliability_by_hand():
    y_true, y_score = [0, 0, 1, 1], [[0.95, 0.05], [0.95, 0.05], [0.95, 0.05], [0.0, 1.0]]
    table = metrics.reliability(y_true, y_score, bins=10)
    assert table["count"].tolist() == [0] * 9 + [4]
    assert table["confidence"].iloc[9] == pytest.approx(0.9625) and table["accuracy"].iloc[9] == 0.75
    assert np.isnan(table["accuracy"].iloc[0])
    assert metrics.expected_calibration_error(y_true, y_score, bins=10) == pytest.approx(0.2125)


def test_temperature_mends_a_model_that_is_too_sure():
    rng = np.random.default_rng(0)
    _, _, logits = make_case(4000)
    honest = metrics.apply_temperature(logits, 1.0)
    y_true = (honest.cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)  # labels drawn from `honest`
    assert metrics.fit_temperature(y_true, logits) == pytest.approx(1, abs=0.08)
    temperature = metrics.fit_temperature(y_true, 3 * logits)
    assert temperature == pytest.approx(3, abs=0.25)
    sure = metrics.apply_temperature(3 * logits, 1.0)
    assert metrics.fit_temperature(y_true, np.log(sure)) == pytest.approx(temperature, abs=1e-3)  # log-prob too
    mended = metrics.apply_temperature(3 * logits, temperature)
    np.testing.assert_allclose(mended.sum(axis=1), 1)
    np.testing.assert_array_equal(mended.argmax(axis=1), sure.argmax(axis=1))
    before, after = (metrics.expected_calibration_error(y_true, score) for score in (sure, mended))
    assert after < 0.03 < before


def test_temperature_takes_log_of_zero():
    with np.errstate(divide="ignore"):
        log_prob = np.log([[1.0, 0.0], [0.6, 0.4], [0.0, 1.0]])
    assert 0.05 <= metrics.fit_temperature([0, 1, 1], log_prob) <= 20
    assert metrics.apply_temperature(log_prob, 20.0)[0, 1] == pytest.approx(1 / (1 + np.exp(3)))


GOOD = np.array([[0.7, 0.3], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: metrics.macro_f1([0, 1], [0], 2), "same shape"),
        (lambda: metrics.macro_f1([0, 5], [0, 1], 2), "labels 0 to 5"),
        (lambda: metrics.macro_f1([0, 1], [0, -1], 2), "labels -1 to 1"),
        (lambda: metrics.macro_f1([0, 0.5], [0, 1], 2), "Cannot cast"),
        (lambda: metrics.per_class([0, 1], GOOD, ["a", "b", "c"]), r"\[2, 3\] classes"),
        (lambda: metrics.per_class([0, 1], GOOD * np.nan, ["a", "b"]), "NaN or infinity in the scores"),
        (lambda: metrics.score_interval([0, 1], GOOD, metric="f2"), "the metric 'f2'"),
        (lambda: metrics.score_interval([0, 1], GOOD, patients=["p"]), "boolean index"),
        (lambda: metrics.paired_difference([0, 1], GOOD, np.ones((2, 3))), "classes"),
        (lambda: metrics.seeds_difference([0, 1], [GOOD], []), "no scores"),
        (lambda: metrics.reliability([0, 1], GOOD * 3), "no probabilities"),
        (lambda: metrics.fit_temperature([0, 1], [[np.nan, 0], [0, 1]]), "NaN"),
        (lambda: metrics.apply_temperature(GOOD, 0), "the temperature 0"),
    ],
)
def test_errors_say_what_was_found(call, text):
    with pytest.raises((ValueError, TypeError, IndexError), match=text):
        call()
