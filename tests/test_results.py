"""results: tables and comparisons, all from the scores that records store."""

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
    runs = [with_patients(run), make_run("v", "vgg16", splits=("val",)), make_run("all"), make_run("x", "alexnet")]
    for one, trained, weights in (
        (runs[0], "last", "imagenet"),
        (runs[2], "all", "imagenet"),
        (runs[3], "all", "random"),
    ):
        one.record["trained"], one.record["weights"]["kind"] = trained, weights
    table = results.comparison_table(runs)
    assert table["name"].tolist() == [
        *("ResNet50, all layers", "ResNet50, last block", "AlexNet, all layers, from scratch", "VGG16, head only")
    ]
    row = table.iloc[1]
    y_true, y_score, patients = run.y_true("test"), run.y_score("test"), runs[0].patients("test")
    assert tuple(row[["test_f1", "low", "high"]]) == metrics.score_interval(y_true, y_score, patients=patients)
    assert tuple(results.interval(run, "test")) == metrics.score_interval(y_true, y_score) != tuple(row[["test_f1"]])
    guessing = ["permuted", "permuted_low", "permuted_high"]
    assert tuple(row[guessing]) == metrics.permuted_score(y_true, y_score, 3) and row["above_chance"]
    assert row["val_f1"] == metrics.macro_f1(run.y_true("val"), run.y_score("val").argmax(axis=1), 3)
    assert row[["run", "weights", "data", "kind", "profile", "seconds", "seed", "best_epoch"]].tolist() == [
        *("r50", "imagenet", "tiny", "synthetic", "quick", 3.5, 0, 4)
    ]
    row = table.iloc[3]
    assert np.isnan(row["test_f1"]) and not row["above_chance"] and row["test_slices"] == 0 and row["val_f1"] > 0.5
    empty = results.comparison_table([])
    assert empty.empty and list(empty.columns) == list(table.columns)


def test_readme_tables_show_what_learned_and_fold_the_random_ones(monkeypatch, tmp_path):
    head, scratch, tuned, poor = (make_run(name, skill=2 * (name != "d")) for name in "abcd")
    records = {tmp_path: [head, scratch, poor], tmp_path / "12_epochs_and_unfreezing": []}
    for run, setting, size in (
        (tuned, "all layers", 224),
        (copy.deepcopy(tuned), "all layers", 96),
        (poor, "other", 224),
    ):
        run.record["sweep"] = {"setting": setting}
        run.plan.seed, run.plan.size = 0, size
        records[tmp_path / "12_epochs_and_unfreezing"].append(run)
    scratch.record["trained"] = tuned.record["trained"] = "all"
    head.record["weights"]["kind"] = tuned.record["weights"]["kind"] = "imagenet"
    monkeypatch.setattr(results, "list_runs", lambda folder: (records[folder], []))
    probe = results.comparison_table([head]).assign(trained="logistic regression", backbone="histogram", weights="none")
    probe.to_csv(tmp_path / results.YARDSTICKS, index=False)
    text = results.results_markdown(tmp_path)
    shown, folded = text.split("<details>")
    assert [line.split(" | ")[:2] for line in shown.splitlines()[2:6]] == [
        *(["| all layers", "ResNet50"], ["| head only", "ResNet50"], ["| logistic regression", "histogram"]),
        ["| all layers", "ResNet50, random weights"],
    ]
    assert "synthetic data, 90 test slices; profile quick, cpu" in shown and "not above chance" not in shown
    assert folded.count("| head only | ResNet50, random weights | 0.") == folded.count(": not above chance | ") == 1


@pytest.mark.parametrize(("skill", "above"), [(2.0, True), (0.0, False)])
def test_above_chance_where_the_intervals_lie_apart(skill, above):
    run = make_run(skill=skill)
    assert results.above_chance(run, "test") == above
    y_true, y_pred = run.y_true("test"), run.y_score("test").argmax(axis=1)
    assert results.permuted(run, "test") == metrics.permuted_score(y_true, y_pred, 3)


def test_say_runs_compares_with_the_first():
    runs = {"head": make_run("h", skill=0.0), "last block": make_run("l", skill=2.0, shuffle=False)}
    runs = {name: FakeRun(name, run.predictions.sort_values("path"), run.plan) for name, run in runs.items()}
    one, two, three = results.say_runs(runs)
    assert (
        one.startswith("head: macro F1 0.") and one.endswith(", not above chance") and two.endswith("), above chance")
    )
    found = metrics.paired_difference(*(runs["last block"].y_true("val"), *(r.y_score("val") for r in runs.values())))
    assert three.startswith(f"last block minus head: {-found.difference:+.3f} (95 % interval +0.")
    assert three.endswith(": last block is higher")


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
    strict = results.compare_settings(sweep, runs, level=0.99).set_index("setting").loc["better"]
    assert (
        strict["low"] < row["low"] and strict["high"] > row["high"] and (row["level"], strict["level"]) == (0.95, 0.99)
    )
    only = results.compare_settings(sweep, {("plain", "resnet50"): plain})
    assert only["setting"].tolist() == ["plain"] and results.say_differences(only) == []


@pytest.mark.parametrize(("low", "words"), [(0.01, "higher than plain"), (-0.01, "not distinguishable from plain")])
def test_sentences_follow_the_interval(low, words):
    row = {"setting": "flip", "backbone": "alexnet", "against": "plain", "difference": 0.02, "low": low, "high": 0.05}
    flipped = row | {"difference": -0.02, "low": -0.05, "high": -low}
    up, down = results.say_differences(pd.DataFrame([row, flipped]).assign(seeds_agree="2 of 3", level=0.99375))
    assert words in up and f"(99.4 % interval {low:+.3f} to +0.050" in up
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
