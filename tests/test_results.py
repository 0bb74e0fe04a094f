"""results: tables, ensembles and the card, all from the scores that records store."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctutils import metrics, results
from ctutils.base import CTError
from ctutils.runs import Run

CLASSES = ("ILD", "Normal", "폐렴|x")


def make_run(name="a", backbone="resnet50", skill=2.0, seed=0, splits=("val", "test"), per_split=90, **changes):
    rng = np.random.default_rng(seed)
    rows = per_split * len(splits)
    label = np.arange(rows) % 3
    logits = rng.standard_normal((rows, 3))
    logits[np.arange(rows), label] += skill
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = pd.DataFrame(
        {
            "path": [f"{split}/{i:03}.png" for split in splits for i in range(per_split)],
            "split": np.repeat(splits, per_split),
            "label": label,
        }
    )
    table[[f"p_{c}" for c in CLASSES]] = scores
    record = {
        "created": "2025-01-01T00:00:00+00:00",
        "git_commit": None,
        "data": {
            "name": "tiny",
            "kind": "synthetic",
            "fingerprint": "f0",
            "counts": {"train": {"ILD": 7, "Normal": 8, "폐렴|x": 9}},
            "test_from_val": False,
        },
        "classes": list(CLASSES),
        "profile": "quick",
        "backbone": backbone,
        "weights": {"kind": "random", "source": "seed 0", "sha256": None, "note": ""},
        "bn": "adapt",
        "trained": "head",
        "seed": seed,
        "optimizer": {"name": "Adam", "lr": 0.001},
        "epochs": 10,
        "image_size": 224,
        "device": "cpu",
        "seconds": {"features": 1.0, "train": 2.0, "total": 3.5},
        "parameters": {"trained": 10245, "frozen": 23508032},
        "best_epoch": 4,
        "scores": {"val": {"macro_f1": 0.123}, "test": {"macro_f1": 0.123}},  # wrong: must not be believed
        **changes,
    }
    return Run(name, record, pd.DataFrame(), table.sample(frac=1, random_state=seed), Path("runs") / name, None)


def test_results_does_not_import_torch():
    code = "import sys, ctutils.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_comparison_table_recomputes_and_orders():
    run = make_run("r50", "resnet50")
    table = results.comparison_table([make_run("x", "tiny_cnn"), run, make_run("v", "vgg16", splits=("val",))])
    assert table["backbone"].tolist() == ["VGG16", "ResNet50", "tiny_cnn"]
    row = table.iloc[1]
    expected = metrics.bootstrap_interval(run.y_true("test"), run.y_score("test"))
    assert (row["test_f1"], row["low"], row["high"]) == expected
    assert row["val_f1"] == metrics.macro_f1(run.y_true("val"), run.y_score("val").argmax(axis=1), 3)
    assert row["deck_f1"] == 0.905039 and np.isnan(table["deck_f1"][2])
    assert row[["run", "weights", "data", "kind", "profile", "seconds", "seed", "best_epoch"]].tolist() == [
        *("r50", "random", "tiny", "synthetic", "quick", 3.5, 0, 4)
    ]
    assert row["test_slices"] == 90
    assert np.isnan(table["test_f1"][0]) and table["test_slices"][0] == 0 and table["val_f1"][0] > 0.5
    empty = results.comparison_table([])
    assert empty.empty and list(empty.columns) == list(table.columns)


def test_missing_runs_name_their_notebook():
    missing = results.missing_runs([make_run(backbone="vgg16"), make_run(backbone="efficientnet_lite0")])
    assert "VGG16" not in missing and len(missing) == 5
    assert missing["MobileNetV3"] == "08_mobilenet_v3"
    assert results.missing_runs([make_run(backbone=name) for name in results.DECK_F1]) == {}


def test_deck_table_shows_a_tie_of_the_best_three():
    table = results.deck_table().set_index("backbone")
    assert table["deck_f1"].tolist() == list(results.DECK_F1.values())
    assert ((table["low"] < table["deck_f1"]) & (table["deck_f1"] < table["high"])).all()
    best, third = table.loc["MobileNetV3"], table.loc["ResNet152"]
    assert 0.02 < best["high"] - best["low"] < 0.05 and third["high"] > best["low"]
    assert table.loc["AlexNet", "high"] < third["low"]


def test_soft_vote_aligns_by_path():
    a, b = make_run("a", seed=1), make_run("b", seed=2)
    vote = results.ensemble([a, b])
    table = vote.predictions.set_index("path")
    for path in ("val/000.png", "test/089.png"):
        each = [run.predictions.set_index("path").loc[path, "p_ILD"] for run in (a, b)]
        assert table.loc[path, "p_ILD"] == pytest.approx(np.mean(each))
    assert vote.members == ("a", "b") and vote.weights == (0.5, 0.5)
    np.testing.assert_array_equal(np.bincount(vote.y_true("test")), [30, 30, 30])
    with pytest.raises(CTError, match="no 'train' predictions"):
        vote.y_score("train")


@pytest.mark.parametrize("method", ["soft", "weighted", "stack"])
def test_every_method_beats_its_members_and_never_reads_test(method):
    runs = [make_run(f"m{k}", skill=1.5, seed=k, per_split=300) for k in range(4)]
    vote = results.ensemble(runs, method)
    np.testing.assert_allclose(vote.y_score("test").sum(axis=1), 1)

    def score(run):
        return metrics.accuracy(run.y_true("test"), run.y_score("test").argmax(axis=1))

    assert score(vote) > max(map(score, runs)) + 0.03
    for run in runs:  # other test labels must change nothing
        run.predictions.loc[run.predictions["split"] == "test", "label"] = 0
    again = results.ensemble(runs, method)
    np.testing.assert_array_equal(again.y_score("test"), vote.y_score("test"))


def test_weights_prefer_the_good_member():
    good, bad = make_run("good", skill=3, seed=1), make_run("bad", skill=0.0, seed=2)
    weights = results.ensemble([bad, good], "weighted").weights
    assert weights[1] > 0.95 and sum(weights) == pytest.approx(1)
    of_true = np.random.default_rng(0).uniform(0.05, 1, (3, 200))
    found = results._mixture_weights(of_true)
    best = np.log(found @ of_true).mean()
    for other in np.random.default_rng(1).dirichlet(np.ones(3), 300):
        assert np.log(other @ of_true).mean() <= best + 1e-6


def test_stack_with_a_class_that_validation_lacks():
    runs = [make_run(f"m{k}", seed=k) for k in range(2)]
    for run in runs:
        at = (run.predictions["split"] == "val") & (run.predictions["label"] == 2)
        run.predictions.loc[at, "label"] = 0
    assert (results.ensemble(runs, "stack").y_score("test")[:, 2] == 0).all()


def test_choose_members_leaves_the_useless_out():
    runs = [make_run("useless", skill=0.0, seed=9), *(make_run(f"m{k}", skill=1.5, seed=k) for k in range(3))]
    chosen = [run.name for run in results.choose_members(runs)]
    assert sorted(chosen) == ["m0", "m1", "m2"]


def test_error_correlation():
    a, b = make_run("a", skill=1, seed=1, per_split=900), make_run("b", skill=1, seed=2, per_split=900)
    twin = Run("twin", a.record, a.history, a.predictions.sample(frac=1, random_state=5), a.folder, None)
    table = results.error_correlation([a, b, twin])
    assert table.loc["a", "twin"] == pytest.approx(1) and abs(table.loc["a", "b"]) < 0.1
    perfect = make_run("perfect", skill=50, per_split=900)
    assert np.isnan(results.error_correlation([a, perfect]).loc["a", "perfect"])


def change(run, **what):
    record, table = {**run.record, **what.get("record", {})}, what.get("table", run.predictions)
    return Run(run.name, record, run.history, table, run.folder, None)


A, B = make_run("a"), make_run("b", seed=1)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: results.ensemble([A, B], "boost"), "the method 'boost'"),
        (lambda: results.ensemble([A, B], "weighted", fit_split="test"), "the test split to fit on"),
        (lambda: results.choose_members([A, B], fit_split="test"), "the test split to fit on"),
        (lambda: results.ensemble([A, B], "stack", fit_split="train"), "no 'train' predictions"),
        (lambda: results.choose_members([A, B], fit_split="train"), "no 'train' predictions"),
        (lambda: results.error_correlation([A, B], "train"), "no 'train' predictions"),
        (lambda: results.ensemble([A]), r"1 run\(s\)"),
        (lambda: results.ensemble([]), r"0 run\(s\)"),
        (lambda: results.ensemble([A, A]), "same run twice"),
        (lambda: results.ensemble([A, change(B, record={"classes": ["x", "y", "z"]})]), "the classes x, y, z"),
        (
            lambda: results.ensemble([A, change(B, record={"data": {"name": "o", "fingerprint": "f1"}})]),
            r"'o' \(f1\)",
        ),
        (lambda: results.ensemble([A, change(B, table=B.predictions.iloc[3:])]), "177 slices, 177 of them in 'a'"),
        (lambda: results.error_correlation([A, change(B, table=B.predictions.assign(label=1))]), "labels"),
    ],
)
def test_errors_say_what_was_found(call, text):
    with pytest.raises(CTError, match=text):
        call()


def test_stack_needs_two_classes():
    runs = [change(run, table=run.predictions.assign(label=1)) for run in (A, B)]
    with pytest.raises(CTError, match="one class only"):
        results.ensemble(runs, "stack")


def test_model_card():
    run = make_run("r50", skill=1.5)
    card = results.model_card(run, audit=["17 exact duplicates across splits"])
    _, low, high = metrics.bootstrap_interval(run.y_true("test"), run.y_score("test"))
    for part in (
        "# Model card: r50",
        "Not for clinical use",
        f"95 % interval {low:.3f} to {high:.3f}, 90 slices",
        "| train | 7 | 8 | 9 |",
        "weights: random",
        "17 exact duplicates",
        "Expected calibration error on test",
        "fitted on validation",
        "not transfer learning",
        "nothing about real CT",
        "폐렴\\|x",
        "would give 0.333",
    ):
        assert part in card, part
    assert "Optimistic" not in card and "cut in two" not in card and card.endswith("\n")


def test_model_card_without_test_split_is_called_optimistic():
    card = results.model_card(make_run(splits=("val",)))
    assert "Macro F1 on val" in card and "Optimistic" in card and "python -m ctutils check" in card
    halves = make_run()
    halves.record["data"]["test_from_val"] = True
    assert "cut in two" in results.model_card(halves)
