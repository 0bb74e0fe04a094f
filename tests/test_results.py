"""results: tables, comparisons and ensembles, all from the scores that records store."""

import copy
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ctutils import metrics, results
from ctutils.base import CTError
from ctutils.registry import BACKBONES

CLASSES = ("ILD", "Normal", "폐렴|x")
RECORD = {
    "created": "2025-01-01T00:00:00+00:00",
    "git_commit": None,
    "data": {
        **{"name": "tiny", "kind": "synthetic", "fingerprint": "f0", "test_from_val": False, "window": None},
        **{"counts": {"train": {"ILD": 7, "Normal": 8, "폐렴|x": 9}}, "patients": None},
    },
    "classes": list(CLASSES),
    "profile": "quick",
    "weights": {"kind": "random", "source": "seed 0", "sha256": "", "note": ""},
    **{"bn": "adapt", "trained": "head", "device": "cpu", "lr": 0.001, "best_epoch": 4},
    "seconds": {"features": 1.0, "train": 2.0, "total": 3.5},
    "parameters": {"trained": 10245, "frozen": 23508032},
    "scores": {"val": {"macro_f1": 0.123}, "test": {"macro_f1": 0.123}},  # wrong: must not be believed
}


@dataclass
class FakeRun:
    """What results and card ask of a run."""

    name: str
    predictions: pd.DataFrame
    plan: SimpleNamespace
    record: dict = field(default_factory=lambda: copy.deepcopy(RECORD))
    classes: tuple = CLASSES

    splits = property(lambda self: tuple(self.predictions["split"].unique()))
    of_split = lambda self, split: self.predictions[self.predictions["split"] == split]  # noqa: E731
    y_true = lambda self, split: self.of_split(split)["label"].to_numpy()  # noqa: E731
    y_score = lambda self, split: self.of_split(split)[[f"p_{name}" for name in CLASSES]].to_numpy()  # noqa: E731

    def patients(self, split):
        return self.of_split(split)["patient"].to_numpy(str) if "patient" in self.predictions else None


def make_run(name="a", backbone="resnet50", skill=2.0, seed=0, splits=("val", "test"), per_split=90, shuffle=True):
    rng, rows = np.random.default_rng(seed), per_split * len(splits)
    label = np.arange(rows) % 3
    logits = rng.standard_normal((rows, 3))
    logits[np.arange(rows), label] += skill
    paths = [f"{split}/{i:03}.png" for split in splits for i in range(per_split)]
    table = pd.DataFrame({"path": paths, "split": np.repeat(splits, per_split), "label": label})
    table[[f"p_{c}" for c in CLASSES]] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    plan = {"backbone": backbone, "seed": seed, "epochs": 10, "size": 224, "optimizer": "adam"}
    table = table.sample(frac=1, random_state=seed) if shuffle else table
    return FakeRun(name, table, SimpleNamespace(**plan))


def with_patients(run, size=10):
    """Neighbours of one class share a patient, and are wrong together."""
    place = run.predictions.groupby(["split", "label"]).cumcount() // size
    key = run.predictions["label"].astype(str) + "-" + place.astype(str)
    return FakeRun(run.name, run.predictions.assign(patient=key), run.plan, run.record)


def test_results_does_not_import_torch():
    code = "import sys, ctutils.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_comparison_table_recomputes_and_orders():
    run = make_run("r50")
    runs = [make_run("x", "efficientnet_lite0"), with_patients(run), make_run("v", "vgg16", splits=("val",))]
    table = results.comparison_table(runs)
    assert table["backbone"].tolist() == ["VGG16", "ResNet50", "EfficientNet-Lite0"]
    row = table.iloc[1]
    y_true, y_score, patients = run.y_true("test"), run.y_score("test"), runs[1].patients("test")
    assert tuple(row[["test_f1", "low", "high"]]) == metrics.score_interval(y_true, y_score, patients=patients)
    assert tuple(results.interval(run, "test")) == metrics.score_interval(y_true, y_score) != tuple(row[["test_f1"]])
    assert row["val_f1"] == metrics.macro_f1(run.y_true("val"), run.y_score("val").argmax(axis=1), 3)
    assert row["deck_f1"] == 0.905039 and np.isnan(table["deck_f1"][2])
    assert row[["run", "weights", "data", "kind", "profile", "seconds", "seed", "best_epoch"]].tolist() == [
        *("r50", "random", "tiny", "synthetic", "quick", 3.5, 0, 4)
    ]
    assert row["test_slices"] == 90
    assert np.isnan(table["test_f1"][0]) and table["test_slices"][0] == 0 and table["val_f1"][0] > 0.5
    empty = results.comparison_table([])
    assert empty.empty and list(empty.columns) == list(table.columns)
    assert results.results_markdown(runs).count("\n") == 4 and "| 0.905 |" in results.results_markdown(runs)


@pytest.mark.parametrize(("skill", "above"), [(2.0, True), (0.0, False)])
def test_above_chance_where_the_intervals_lie_apart(skill, above):
    run = make_run(skill=skill)
    assert results.above_chance(run, "test") == above
    y_true, y_pred = run.y_true("test"), run.y_score("test").argmax(axis=1)
    assert results.permuted(run, "test") == metrics.permuted_score(y_true, y_pred, 3)


def test_missing_runs_name_their_notebook():
    missing = results.missing_runs([make_run(backbone="vgg16"), make_run(backbone="efficientnet_lite0")])
    assert "VGG16" not in missing and len(missing) == 5 and missing["MobileNetV3"] == "08_mobilenet_v3"
    assert results.missing_runs([make_run(backbone=name) for name in BACKBONES]) == {}


def make_sweep(**plans):
    """A sweep of settings plain, and better against plain, two seeds each, with its runs."""
    every = {"weights": None, "data": None, "test_data": None}
    plan = {name: SimpleNamespace(**{**every, **plans.get(name, {})}) for name in ("plain", "better")}
    against = {"plain": None, "better": "plain"}
    groups = {(name, "resnet50"): [SimpleNamespace(plan=plan[name], against=against[name])] * 2 for name in plan}
    runs = {
        key: [make_run(f"{key[0]}{seed}", skill=skill, seed=10 * skill + seed, shuffle=False) for seed in (0, 1)]
        for key, skill in zip(groups, (1, 3), strict=True)
    }
    return SimpleNamespace(groups=lambda: groups), runs


@pytest.mark.parametrize("known", [False, True])
def test_settings_are_compared_on_validation_from_their_predictions(known):
    sweep, runs = make_sweep()
    for key in runs if known else ():
        runs[key] = [with_patients(run) for run in runs[key]]
    table = results.compare_settings(sweep, runs).set_index("setting")
    plain, better = runs.values()
    f1 = [
        [metrics.macro_f1(run.y_true("val"), run.y_score("val").argmax(1), 3) for run in some]
        for some in (plain, better)
    ]
    scores = [[run.y_score("val") for run in some] for some in (better, plain)]
    expected = metrics.seeds_difference(plain[0].y_true("val"), *scores, patients=plain[0].patients("val"))
    row = table.loc["better"]
    assert row["points"] == tuple(np.round(f1[1], 4)) and row["mean"] == pytest.approx(np.mean(f1[1]))
    assert (row["difference"], row["low"], row["high"]) == expected[:3] and row["verdict"] == "better is higher"
    assert row["seed_differences"] == tuple(np.round(np.subtract(f1[1], f1[0]), 4)) and row["seeds_agree"] == "2 of 2"
    assert np.isnan(table.loc["plain", "difference"]) and table.loc["plain", "against"] == ""
    (sentence,) = results.say_differences(table.reset_index())
    assert sentence.startswith("resnet50, better: higher than plain: +0.") and "2 of 2 seeds" in sentence
    on_test = results.compare_settings(sweep, runs, split="test").set_index("setting")
    assert on_test.loc["better", "difference"] != row["difference"]
    only = results.compare_settings(sweep, {("plain", "resnet50"): plain})
    assert only["setting"].tolist() == ["plain"] and results.say_differences(only) == []


@pytest.mark.parametrize(("low", "words"), [(0.01, "higher than plain"), (-0.01, "not distinguishable from plain")])
def test_sentences_follow_the_interval(low, words):
    row = {"setting": "flip", "backbone": "alexnet", "against": "plain", "difference": 0.02, "low": low, "high": 0.05}
    flipped = row | {"difference": -0.02, "low": -0.05, "high": -low}
    up, down = results.say_differences(pd.DataFrame([row, flipped]).assign(seeds_agree="2 of 3"))
    assert words in up and f"{low:+.3f} to +0.050" in up
    assert words.replace("higher", "lower") in down


@pytest.mark.parametrize("what", ["weights", "slices", "labels"])
def test_records_that_do_not_belong_together_are_not_compared(what):
    sweep, runs = make_sweep()
    run = runs["better", "resnet50"][1]
    if what == "weights":  # the first was made without the network, say
        run.record["weights"]["kind"] = "imagenet"
    elif what == "slices":  # the synthetic set was made anew: the same labels, other pictures
        run.record["data"]["fingerprint"] = "another"
    else:
        run.predictions = run.predictions.assign(label=0)
    with pytest.raises(CTError, match=f"different {what}.*run the plan again"):
        results.compare_settings(sweep, runs)


def test_settings_that_differ_on_purpose():
    sweep, runs = make_sweep(plain={"weights": "random"}, better={"data": "shortcut", "test_data": "default"})
    for run in runs["better", "resnet50"]:
        run.record["weights"]["kind"], run.record["data"]["fingerprint"] = "imagenet", "another"
    row = results.compare_settings(sweep, runs).iloc[1]
    assert row["verdict"] == "not compared: other val slices" and np.isnan(row["difference"])
    assert results.compare_settings(sweep, runs, "test").iloc[1]["verdict"] == "better is higher"


def test_soft_vote_aligns_by_path():
    a, b = with_patients(make_run("a", seed=1, shuffle=False)), make_run("b", seed=2)
    vote = results.ensemble([a, b])
    table = vote.predictions.set_index("path")
    for path in ("val/000.png", "test/089.png"):
        each = [run.predictions.set_index("path").loc[path, "p_ILD"] for run in (a, b)]
        assert table.loc[path, "p_ILD"] == pytest.approx(np.mean(each))
    assert vote.members == ("a", "b") and vote.weights == (0.5, 0.5) and vote.splits == ("test", "val")
    np.testing.assert_array_equal(vote.patients("test"), a.patients("test"))
    np.testing.assert_array_equal(np.bincount(vote.y_true("test")), [30, 30, 30])
    with pytest.raises(CTError, match="no 'train' predictions"):
        vote.y_score("train")


@pytest.mark.parametrize("method", ["soft", "weighted", "stack"])
def test_every_method_beats_its_members_and_never_reads_test(method):
    runs = [make_run(f"m{k}", skill=1.5, seed=k, per_split=300) for k in range(4)]
    vote = results.ensemble(runs, method)
    np.testing.assert_allclose(vote.y_score("test").sum(axis=1), 1)
    score = lambda run: metrics.accuracy(run.y_true("test"), run.y_score("test").argmax(axis=1))  # noqa: E731
    assert score(vote) > max(map(score, runs)) + 0.03
    for run in runs:  # other test labels must change nothing
        run.predictions.loc[run.predictions["split"] == "test", "label"] = 0
    np.testing.assert_array_equal(results.ensemble(runs, method).y_score("test"), vote.y_score("test"))


def test_weights_prefer_the_good_member():
    good, bad = make_run("good", skill=3, seed=1), make_run("bad", skill=0.0, seed=2)
    weights = results.ensemble([bad, good], "weighted").weights
    assert weights[1] > 0.95 and sum(weights) == pytest.approx(1)
    of_true = np.random.default_rng(0).uniform(0.05, 1, (3, 200))
    best = np.log(results._mixture_weights(of_true) @ of_true).mean()
    for other in np.random.default_rng(1).dirichlet(np.ones(3), 300):
        assert np.log(other @ of_true).mean() <= best + 1e-6


def test_stack_with_a_class_that_validation_lacks():
    runs = [make_run(f"m{k}", seed=k) for k in range(2)]
    for run in runs:
        run.predictions["label"] = run.predictions["label"].mask(run.predictions["label"] == 2, 0)
    assert (results.ensemble(runs, "stack").y_score("test")[:, 2] == 0).all()
    for run in runs:
        run.predictions["label"] = 1
    with pytest.raises(CTError, match="one class only"):
        results.ensemble(runs, "stack")


def test_choose_members_leaves_the_useless_out():
    runs = [make_run("useless", skill=0.0, seed=9), *(make_run(f"m{k}", skill=1.5, seed=k) for k in range(3))]
    assert sorted(run.name for run in results.choose_members(runs)) == ["m0", "m1", "m2"]


def test_error_correlation():
    a, b = make_run("a", skill=1, seed=1, per_split=900), make_run("b", skill=1, seed=2, per_split=900)
    twin = FakeRun("twin", a.predictions.sample(frac=1, random_state=5), a.plan)
    table = results.error_correlation([a, b, twin])
    assert table.loc["a", "twin"] == pytest.approx(1) and abs(table.loc["a", "b"]) < 0.1
    perfect = make_run("perfect", skill=50, per_split=900)
    assert np.isnan(results.error_correlation([a, perfect]).loc["a", "perfect"])


A, B = make_run("a"), make_run("b", seed=1)
OTHER = {**RECORD, "data": {**RECORD["data"], "fingerprint": "f1", "name": "o"}}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: results.ensemble([A, B], "boost"), "the method 'boost'"),
        (lambda: results.ensemble([A, B], "weighted", fit_split="test"), "the test split to fit on"),
        (lambda: results.choose_members([A, B], fit_split="test"), "the test split to fit on"),
        (lambda: results.ensemble([A, B], "stack", fit_split="train"), "no 'train' predictions"),
        (lambda: results.error_correlation([A, B], "train"), "no 'train' predictions"),
        (lambda: results.ensemble([A]), r"1 run\(s\)"),
        (lambda: results.ensemble([]), r"0 run\(s\)"),
        (lambda: results.ensemble([A, A]), "or one twice"),
        (
            lambda: results.ensemble([A, FakeRun("c", B.predictions, B.plan, classes=("x", "y", "z"))]),
            "classes x, y, z",
        ),
        (lambda: results.ensemble([A, FakeRun("c", B.predictions, B.plan, OTHER)]), "'o'"),
        (lambda: results.ensemble([A, FakeRun("c", B.predictions.iloc[3:], B.plan)]), "177 slices of 'tiny'"),
        (lambda: results.error_correlation([A, FakeRun("c", B.predictions.assign(label=1), B.plan)]), "the 180 of"),
    ],
)
def test_errors_say_what_was_found(call, text):
    with pytest.raises(CTError, match=text):
        call()
