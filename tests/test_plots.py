"""plots: every figure has its title, labels and content, and fits a notebook."""

import base64
import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import user_error
from matplotlib.patches import Rectangle
from PIL import Image

from ctutils import plots

IMAGE = np.arange(256, dtype=np.uint8).reshape(16, 16)
HISTORY = pd.DataFrame(
    [(1, 1.0, 1.1, 0.4, 0.4), (2, 0.5, 0.6, 0.7, 0.72), (3, 0.2, 0.7, 0.9, 0.6)],
    columns=["epoch", "train_loss", "val_loss", "train_macro_f1", "val_macro_f1"],
)
SCORES = pd.DataFrame(
    {"name": ["VGG16, head", "ResNet50, all", "probe", "AlexNet"], "test_f1": [0.3, 0.8, 0.7, np.nan]}
)
SCORES = SCORES.assign(
    low=SCORES["test_f1"] - 0.05, high=SCORES["test_f1"] + 0.04, permuted_low=0.2, permuted_high=0.26
)
SCORES = SCORES.assign(weights=["random", "imagenet", "none", "random"], above_chance=[False, True, True, False])
DIFFERENCES = pd.DataFrame(
    [("flip", 0.03, 0.01, 0.05, (0.02, 0.04)), ("blur", 0, -0.1, 0.1, (0.01,)), ("zoom", -0.2, -0.3, -0.1, (-0.2,))],
    columns=["setting", "difference", "low", "high", "seed_differences"],
).assign(backbone="vgg16", against="none", name=["a", "b", "c"], level=0.99)
CALLS = {
    "difference_intervals": lambda: plots.difference_intervals(DIFFERENCES),
    "setting_differences": lambda: plots.setting_differences(DIFFERENCES, "x"),
    "slice_grid": lambda: plots.slice_grid([IMAGE] * 6, titles=list("abcdef"), columns=5),
    "learning_curves": lambda: plots.learning_curves(HISTORY),
    "curves of two runs": lambda: plots.learning_curves({"head": HISTORY, "last block": HISTORY}, chance=(0.1, 0.2)),
    "confusion_matrix": lambda: plots.confusion_matrix([0, 1, 1], [0, 1, 0], ["Normal", "폐렴"]),
    "score_intervals": lambda: plots.score_intervals(SCORES),
    "heat_overlay": lambda: plots.heat_overlay(IMAGE, np.eye(7), (2, 3, 6, 9), title="pneumonia"),
}


@pytest.fixture(autouse=True)
def closed_figures():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def words(texts) -> list[str]:
    return [text.get_text() for text in texts]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("error")
def test_every_figure_has_title_and_labels_and_fits_a_notebook(name):
    axes = np.ravel(CALLS[name]())
    figure = axes[0].figure
    title = figure.get_suptitle() or axes[0].get_title("left") or axes[0].get_title()
    assert figure.get_figwidth() <= 9 and title
    for ax in axes:
        assert not ax.axison or (ax.get_xlabel() and ax.get_ylabel())
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.tell() < 110_000


def test_figures_can_be_read_from_the_last_row(monkeypatch):
    assert plots.slice_grid([IMAGE] * 9, columns=9).size == 12, "at most 4 per row"
    figure = plt.gcf()
    figure.draw_without_rendering()
    assert figure.dpi == 110 and figure.axes[0].get_window_extent().width > 200
    small = {"font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"}
    assert {plt.rcParams[name] for name in small} == {11}
    monkeypatch.setenv("CT_FIGURE_SCALE", "1.5")
    plots.use_style()
    assert plt.rcParams["figure.dpi"] == 165
    for wrong in ("big", "9", "-1"):
        monkeypatch.setenv("CT_FIGURE_SCALE", wrong)
        with user_error(f"CT_FIGURE_SCALE '{wrong}'", "from 0.5 to 3"):
            plots.use_style()


@pytest.mark.parametrize("coloured", [False, True])
def test_show_gives_the_picture_a_text(coloured, monkeypatch):
    said = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: said.append((data, options)))
    plots.slice_grid([np.full((9, 9, 3), (250, 0, 0), np.uint8) if coloured else IMAGE])
    plots.show("ILD < Normal")
    (hidden, _), (picture, options) = said
    assert hidden == {"text/html": '<span class="sr-only">ILD &lt; Normal</span>'} and not plt.get_fignums()
    assert picture["text/plain"] == "ILD < Normal" and options["metadata"] == {"image/png": {"alt": "ILD < Normal"}}
    shown = Image.open(io.BytesIO(base64.b64decode(picture["image/png"])))
    assert shown.mode == ("RGB" if coloured else "P") and shown.width > 220


def test_plots_does_not_import_torch():
    code = "import sys, ctutils.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_slice_grid():
    pictures = [IMAGE, IMAGE + 0.5, np.stack([IMAGE] * 3, axis=-1)]
    axes = plots.slice_grid(pictures, list("abc"), [None, (2, 3, 6, 9), None], columns=2)
    assert [len(ax.images) for ax in axes] == [1, 1, 1, 0] and [ax.get_title() for ax in axes] == ["a", "b", "c", ""]
    assert axes[0].images[0].get_clim() == (0, 255)  # the same grey in every picture
    (box,) = [patch for patch in axes[1].patches if isinstance(patch, Rectangle)]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1.5, 2.5, 4, 6) and not axes[0].patches


def test_learning_curves_mark_the_best_epoch():
    axes = plots.learning_curves(HISTORY, title="VGG16")
    assert axes[1].get_title("left").endswith("best epoch 2, 0.720") and axes[0].figure.get_suptitle() == "VGG16"
    train, val, best = axes[1].lines
    assert [*train.get_ydata(), *val.get_ydata()] == [0.4, 0.7, 0.9, 0.4, 0.72, 0.6] and set(best.get_xdata()) == {2}
    axes = plots.learning_curves(
        {"head": HISTORY, "all": HISTORY.assign(val_macro_f1=[0.9, 0.1, 0.2])}, chance=(0, 0.3)
    )
    said = ["head, training", "head, validation", "all, training", "all, validation", "guessing, validation"]
    assert words(axes[0].figure.legends[0].get_texts()) == said
    assert [set(line.get_xdata()) for line in axes[1].lines[2::3]] == [{2}, {1}]


def test_confusion_matrix_counts():
    ax = plots.confusion_matrix([0, 0, 0, 1], [0, 0, 1, 1], ["a", "b", "c"])
    assert words(ax.texts) == ["2", "1", "0", "0", "1", "0", "0", "0", "0"] and "(4 slices)" in ax.get_title("left")
    np.testing.assert_allclose(ax.images[0].get_array(), [[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 0, 0]])
    assert ax.images[0].get_clim() == (0, 1) and words(ax.get_xticklabels()) == ["a", "b", "c"]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("true class", "predicted class")
    with user_error("labels outside", "0 to 1"):
        plots.confusion_matrix([0, 2], [0, 1], ["a", "b"])
    pale = plots.confusion_matrix([0, 0, 0], [0, 1, 2], ["a", "b", "c"])
    assert {text.get_color() for text in pale.texts} == {"black"}  # no cell is dark


def points(ax) -> dict[str, list[tuple[float, float]]]:
    """Return the points (x, y) that have an interval, by their name in the legend."""
    return {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in ax.containers}


def test_score_intervals_mark_guessing_and_who_is_not_above_it():
    ax = plt.subplot()
    assert plots.score_intervals(SCORES, ax=ax) is ax
    assert words(ax.get_yticklabels()) == ["VGG16, head", "ResNet50, all", "probe"]
    shown = {"random weights, not above chance": [[0.3, 0]], "imagenet weights": [[0.8, 1]], "none weights": [[0.7, 2]]}
    band, *bars = ax.containers
    assert {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in bars} == shown
    assert [bar.lines[0].get_markerfacecolor() == "white" for bar in bars] == [True, False, False]
    assert [(bar.get_x(), bar.get_width()) for bar in band] == [(0.2, pytest.approx(0.06))] * 3
    spans = [np.ptp(line[:, 0]) for bar in bars for line in bar.lines[2][0].get_segments()]
    np.testing.assert_allclose(spans, 0.09)
    assert words(ax.figure.legends[0].get_texts()) == ["labels shuffled, 95 %", *shown]


def test_differences_are_named_and_grey_where_the_interval_holds_zero():
    without = pd.DataFrame([{"setting": "none", "backbone": "vgg16"}])
    ax = plots.setting_differences(pd.concat([without, DIFFERENCES]), "2 of 3")
    assert points(ax) == {"higher": [[0.03, 0]], "lower": [[-0.2, 2]], "not distinguishable": [[0, 1]]}
    assert [bar.get_label() for bar in ax.containers if bar.lines[0].get_color() == plots.GREY] == [*points(ax)][2:]
    assert words(ax.get_yticklabels()) == ["flip", "blur", "zoom"] and "2 of 3" in ax.get_title("left")
    dots = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "."]
    assert dots == [[0.02, 0.04], [0.01], [-0.2]] and "that of: none (line: 99 %" in ax.get_xlabel()
    two = plots.setting_differences(pd.concat([DIFFERENCES, DIFFERENCES.assign(backbone="alexnet")]), "x")
    assert words(two.get_yticklabels())[::3] == ["flip, vgg16", "flip, alexnet"]
    with user_error("no row with a difference"):
        plots.setting_differences(without.assign(difference=np.nan), "x")


def test_heat_overlay_covers_the_image():
    ax = plots.heat_overlay(IMAGE, np.zeros((7, 7)))  # no heat at all must not divide by 0
    assert ax.images[1].get_extent() == [-0.5, 15.5, 15.5, -0.5]
    hot = plots.heat_overlay(IMAGE, np.array([[0.0, 4.0], [0.0, 0.0]]))
    assert hot.images[1].get_array().max() == 1 and hot.images[1].get_alpha()[1, 1] == 0
