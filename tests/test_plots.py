"""plots: every figure has its title, labels and content, fits a notebook, and says what is wrong with its input."""

import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import user_error
from matplotlib.patches import Rectangle

from ctutils import plots
from ctutils.base import CTError

IMAGE = np.arange(256, dtype=np.uint8).reshape(16, 16)
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3],
        "train_loss": [1.0, 0.5, 0.2],
        "val_loss": [1.1, 0.6, 0.7],
        "train_macro_f1": [0.4, 0.7, 0.9],
        "val_macro_f1": [0.4, 0.72, 0.6],
    }
)
SCORES = pd.DataFrame(
    {
        "backbone": ["VGG16", "ResNet50", "ResNet50", "AlexNet"],
        "test_f1": [0.7, 0.8, 0.82, np.nan],
        "low": [0.65, 0.75, 0.78, np.nan],
        "high": [0.75, 0.85, 0.86, np.nan],
        "deck_f1": [0.769312, 0.905039, 0.905039, 0.788558],
        "weights": ["random", "random", "imagenet", "random"],
        "data": "tiny",
        "profile": "quick",
    }
)
RELIABILITY = pd.DataFrame(
    {
        "low": [0.0, 0.5],
        "high": [0.5, 1.0],
        "count": [0, 10],
        "confidence": [np.nan, 0.9],
        "accuracy": [np.nan, 0.7],
    }
)


@pytest.fixture(autouse=True)
def closed_figures():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def texts(figure):
    """Return all text that is in a figure."""
    found = [figure._suptitle.get_text()] if figure._suptitle else []
    for legend in figure.legends:
        found += [text.get_text() for text in legend.get_texts()]
    for ax in figure.axes:
        found += [ax.get_title("left"), ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        found += [text.get_text() for text in [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()]]
        found += [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    return found


DIFFERENCES = pd.DataFrame(
    {
        "name": ["vote", "stack", "swap"],
        "difference": [0.05, 0, -0.1],
        "low": [0.01, -0.1, -0.2],
        "high": [0.1, 0.1, -0.01],
    }
)
CALLS = {
    "difference_intervals": lambda: plots.difference_intervals(DIFFERENCES),
    "slice_grid": lambda: plots.slice_grid([IMAGE] * 6, titles=list("abcdef"), columns=5),
    "learning_curves": lambda: plots.learning_curves(HISTORY),
    "confusion_matrix": lambda: plots.confusion_matrix([0, 1, 1], [0, 1, 0], ["Normal", "폐렴"]),
    "class_counts": lambda: plots.class_counts(pd.DataFrame({"split": ["train", "val"], "class": ["a", "b"]})),
    "grey_histograms": lambda: plots.grey_histograms(np.stack([IMAGE, IMAGE]), [0, 1], ["a", "b"]),
    "score_intervals": lambda: plots.score_intervals(SCORES),
    "reliability_diagram": lambda: plots.reliability_diagram(RELIABILITY),
    "heat_overlay": lambda: plots.heat_overlay(IMAGE, np.eye(7), (2, 3, 6, 9), title="pneumonia"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("error")
def test_every_figure_has_title_and_labels_and_fits_a_notebook(name):
    axes = np.ravel(CALLS[name]())
    figure = axes[0].figure
    assert figure.get_figwidth() <= 9
    title = [*([figure._suptitle.get_text()] if figure._suptitle else []), axes[0].get_title("left")]
    assert any(title) or axes[0].get_title()
    for ax in axes:
        assert not ax.axison or (ax.get_xlabel() and ax.get_ylabel())
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.tell() < 60_000


def test_plots_does_not_import_torch():
    code = "import sys, ctutils.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_slice_grid():
    axes = plots.slice_grid(
        [IMAGE, IMAGE + 0.5, np.stack([IMAGE] * 3, axis=-1)], boxes=[None, (2, 3, 6, 9), None], columns=2
    )
    assert len(axes) == 4 and [len(ax.images) for ax in axes] == [1, 1, 1, 0]
    assert axes[0].images[0].get_clim() == (0, 255)  # the same grey in every picture
    (box,) = [patch for patch in axes[1].patches if isinstance(patch, Rectangle)]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1.5, 2.5, 4, 6)
    assert not axes[0].patches


def test_learning_curves_mark_the_best_epoch():
    axes = plots.learning_curves(HISTORY, title="VGG16")
    assert "best epoch 2, 0.720" in axes[1].get_title("left") and "VGG16" in texts(axes[0].figure)
    train, val, best = axes[1].lines
    assert train.get_ydata().tolist() == [0.4, 0.7, 0.9] and val.get_ydata().tolist() == [0.4, 0.72, 0.6]
    assert best.get_xdata()[0] == 2


def test_confusion_matrix_counts():
    ax = plots.confusion_matrix([0, 0, 0, 1], [0, 0, 1, 1], ["a", "b", "c"])
    assert [text.get_text() for text in ax.texts] == ["2", "1", "0", "0", "1", "0", "0", "0", "0"]
    np.testing.assert_allclose(np.ravel(ax.collections[0].get_array())[:2], [2 / 3, 1 / 3])
    assert ax.get_ylabel() == "true class" and ax.get_xlabel() == "predicted class"


def test_class_counts():
    table = pd.DataFrame({"split": ["train"] * 3 + ["test"], "class": ["b", "b", "a", "a"]})
    ax = plots.class_counts(table)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "test"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]
    assert [bar.get_height() for bar in ax.containers[0]] == [1, 2]


def test_grey_histograms_are_percent_and_skip_an_absent_class():
    images = np.zeros((2, 8, 8), np.uint8)
    images[1] += 200
    ax = plots.grey_histograms(images, [0, 2], ["dark", "absent", "bright"])
    assert [line.get_label() for line in ax.lines] == ["dark", "bright"]
    assert ax.lines[0].get_ydata()[0] == 100 and ax.lines[1].get_ydata()[50] == 100


def test_score_intervals_mark_the_deck():
    deck = pd.DataFrame({"backbone": ["VGG16", "DenseNet161"], "deck_f1": [0.77, 0.93]})
    deck = deck.assign(low=deck["deck_f1"] - 0.03, high=deck["deck_f1"] + 0.03)
    ax = plots.score_intervals(SCORES, deck)
    found = texts(ax.figure)
    assert sum("deck" in text for text in found) == 1 and "tiny, imagenet weights, quick" in found
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["VGG16", "DenseNet161", "ResNet50", "AlexNet"]
    assert len(ax.containers) == 5  # three runs with a score, two of the deck
    heights = [bar.lines[0].get_ydata()[0] for bar in ax.containers]
    assert len(set(heights)) == 5  # nothing covers anything else


def test_difference_intervals_say_what_can_be_said():
    ax = plots.difference_intervals(DIFFERENCES)
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"higher", "not distinguishable", "lower"}
    points = {bar.get_label(): bar.lines[0] for bar in ax.containers}
    assert [points[word].get_xdata()[0] for word in ("higher", "not distinguishable", "lower")] == [0.05, 0, -0.1]
    assert points["not distinguishable"].get_color() == plots.GREY


def test_use_axes_given():
    _, ax = plt.subplots()
    assert plots.score_intervals(SCORES, ax=ax) is ax and ax.get_legend()
    assert plots.reliability_diagram(RELIABILITY, ax=ax) is ax


def test_reliability_diagram_says_the_error():
    ax = plots.reliability_diagram(RELIABILITY)
    assert "0.200" in ax.get_title("left")
    assert ax.lines[1].get_xdata().tolist() == [0.9] and ax.lines[1].get_ydata().tolist() == [0.7]


def test_heat_overlay_covers_the_image():
    ax = plots.heat_overlay(IMAGE, np.zeros((7, 7)))  # no heat at all must not divide by 0
    assert ax.images[1].get_extent() == [-0.5, 15.5, 15.5, -0.5]
    hot = plots.heat_overlay(IMAGE, np.array([[0.0, 4.0], [0.0, 0.0]]))
    assert hot.images[1].get_array().max() == 1 and hot.images[1].get_alpha()[1, 1] == 0


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: plots.slice_grid([]), "no image"),
        (lambda: plots.slice_grid([IMAGE], titles=["a", "b"]), "2 titles"),
        (lambda: plots.slice_grid([IMAGE], boxes=[]), "0 boxes"),
        (lambda: plots.slice_grid([IMAGE[0]]), r"shape \(16,\)"),
        (lambda: plots.learning_curves(HISTORY.drop(columns="val_loss")), "without val_loss"),
        (lambda: plots.learning_curves(HISTORY.iloc[:0]), "without a row"),
        (lambda: plots.confusion_matrix([0, 1], [0], ["a", "b"]), "shapes"),
        (lambda: plots.confusion_matrix([0, 2], [0, 1], ["a", "b"]), "labels outside"),
        (lambda: plots.class_counts(pd.DataFrame({"split": ["train"]})), "without class"),
        (lambda: plots.grey_histograms(IMAGE[None] / 2, [0], ["a"]), "float64 images"),
        (lambda: plots.grey_histograms(IMAGE[None], [0, 1], ["a", "b"]), "2 labels"),
        (lambda: plots.score_intervals(SCORES.drop(columns="low")), "without low"),
        (lambda: plots.reliability_diagram(RELIABILITY.drop(columns="count")), "without count"),
        (lambda: plots.difference_intervals(DIFFERENCES.drop(columns="high")), "without high"),
        (lambda: plots.reliability_diagram(RELIABILITY.iloc[:1]), "without a slice"),
        (lambda: plots.heat_overlay(IMAGE, np.full((2, 2), np.nan)), "NaN"),
        (lambda: plots.heat_overlay(IMAGE[0], np.eye(2)), r"shape \(16,\)"),
    ],
)
def test_errors_say_what_was_found(call, text):
    with pytest.raises(CTError, match=text):
        call()


def test_setting_differences_shows_each_comparison_and_greys_what_holds_zero():
    row = {"setting": "flip", "backbone": "vgg16", "against": "none", "difference": 0.03, "low": 0.01, "high": 0.05}
    table = pd.DataFrame(
        [
            {"setting": "none", "backbone": "vgg16"},
            {**row, "seed_differences": (0.02, 0.04)},
            {**row, "setting": "blur", "low": -0.01, "seed_differences": (0.01,)},
        ]
    )
    ax = plots.setting_differences(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["flip", "blur"]
    dots = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "."]
    assert dots == [[0.02, 0.04], [0.01]] and "none" in ax.get_xlabel()
    points = {bar.get_label(): bar.lines[0].get_xdata()[0] for bar in ax.containers}
    assert points == {"higher": 0.03, "not distinguishable": 0.03} and "1 of 2" in ax.get_title("left")
    two = pd.concat([table, table.assign(backbone="alexnet")])
    assert plots.setting_differences(two).get_yticklabels()[0].get_text() == "flip, vgg16"
    with user_error("the comparison without a row"):
        plots.setting_differences(table.iloc[:1])
    with user_error("the table without", "seed_differences"):
        plots.setting_differences(table.drop(columns="seed_differences"))
