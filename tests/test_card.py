"""card: one page that says what a run is, what it scored, and what that does not show."""

import pytest
from test_results import make_run, with_patients

from ctutils import metrics
from ctutils.card import model_card


def test_model_card():
    run = make_run("r50", skill=1.5)
    card = model_card(run, audit=["17 exact duplicates across splits"])
    _, low, high = metrics.score_interval(run.y_true("test"), run.y_score("test"))
    for part in (
        "# Model card: r50",
        "Not for clinical use",
        "- ResNet50, weights: random",
        "adam, learning rate 0.001, epoch 4 of 10",
        f"95 % interval {low:.3f} to {high:.3f}, 90 slices; slices drawn anew",
        "| train | 7 | 8 | 9 |",
        "17 exact duplicates",
        "Expected calibration error on test",
        "fitted on validation",
        "not transfer learning",
        "nothing about real CT",
        "patients are unknown",
        "폐렴\\|x",
        "would give 0.333",
    ):
        assert part in card, part
    for part in ("Optimistic", "cut in two", "DICOM", "patients are known"):
        assert part not in card
    assert card.endswith("\n")


def test_card_says_window_and_patients():
    run = with_patients(make_run(skill=1.5))
    run.record["data"] |= {"window": {"level": 40, "width": 400, "unit": "HU"}, "patients": 18}
    card = model_card(run)
    _, low, high = metrics.score_interval(run.y_true("test"), run.y_score("test"), patients=run.patients("test"))
    assert "DICOM with the window level 40, width 400 HU" in card and "18 patients are known" in card
    assert f"{low:.3f} to {high:.3f}, 90 slices; 9 patients drawn anew, not their slices" in card
    assert "patients are unknown" not in card


@pytest.mark.parametrize(("halves", "words"), [(True, "cut in two"), (False, "Optimistic")])
def test_card_says_how_the_slices_were_used(halves, words):
    run = make_run(splits=("val", "test") if halves else ("val",))
    run.record["data"]["test_from_val"] = halves
    card = model_card(run)
    assert words in card and "python -m ctutils check" in card
    assert ("Macro F1 on val" in card) is not halves
