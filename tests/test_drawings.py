"""drawings: each has a title and fits the page; what they show is counted, not typed."""

import importlib
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ctutils import plots

sys.path.append(str(Path(__file__).resolve().parent.parent / "notebooks"))
drawings = importlib.import_module("drawings")
FIGURES = {
    name: getattr(drawings, name) for name in ("frozen_and_head", "batchnorm", "splits", "cut_and_cache", "grad_cam")
}
FIGURES["six_to_scale"] = lambda: drawings.six_to_scale(("alexnet", "resnet50", "efficientnet_lite0"))


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def words(figure) -> str:
    return " ".join(text.get_text() for ax in figure.axes for text in ax.texts)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("error")
def test_drawing(name):
    figure = FIGURES[name]()
    assert figure.get_figwidth() <= 9 and (figure.get_suptitle() or figure.axes[0].get_title(loc="left"))
    figure.draw_without_rendering()
    page = figure.get_window_extent()
    for text in (text for ax in figure.axes for text in ax.texts):
        assert text.get_window_extent().x0 >= page.x0 - 2 and text.get_window_extent().x1 <= page.x1 + 2, text


def test_drawings_count():
    said = words(FIGURES["six_to_scale"]())  # as torchvision's documentation has it
    for text in ("61.1 million\n8 layers", "25.6 million\n50 layers", "0.7", "4.1", "4.7 million"):
        assert text in said, text
    assert "3,371,008" in (said := words(FIGURES["frozen_and_head"]())) and "6,405" in said
    still, moved = (ax.lines[1].get_ydata() for ax in FIGURES["batchnorm"]().axes)
    assert not np.any(still) and moved[-1] > 1
