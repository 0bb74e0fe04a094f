"""widgets: each shows a picture at once, and another one when a control moves."""

import importlib
import io
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import picture
from PIL import Image
from torch import nn

from ctutils import phantom, plots

sys.path.append(str(Path(__file__).resolve().parent.parent / "notebooks"))
widgets = importlib.import_module("widgets")
CLASSES = ("ILD", "Lung_Cancer", "Normal", "pneumonia", "pneumothorax")
Y, SCORES = np.repeat(np.arange(5), 4), np.random.default_rng(0).dirichlet(np.ones(5), 20)


@pytest.fixture
def shown(monkeypatch):
    """What a widget has displayed: `titles` of every figure, `controls`, `words` and `picture` below them."""
    now = SimpleNamespace(titles=[], alts=[])

    def display(box):
        controls, now.words, now.picture = box.children
        now.controls = {c.description or "network": c for c in controls.children}

    save = plt.Figure.savefig

    def keep(figure, *args, **options):
        now.titles.append(" ".join([figure.get_suptitle(), *(ax.get_title("left") for ax in figure.axes)]))
        save(figure, *args, **options)

    monkeypatch.setattr(plt.Figure, "savefig", keep)
    monkeypatch.setattr(widgets, "display", display)
    monkeypatch.setattr(plots, "show", lambda alt: (now.alts.append(alt), keep(plt.gcf(), io.BytesIO()), plt.close()))
    with plt.rc_context():
        plots.use_style()
        yield now
    assert len(now.alts) == 1 and len(now.alts[0]) > 20 and not plt.get_fignums()


def moved(shown, **values) -> tuple[str, bool]:
    """Move controls; return the last figure's titles, and whether the picture below is another one now."""
    before = shown.picture.value
    for name, value in values.items():
        shown.controls[name.replace("_", " ")].value = value
    return shown.titles[-1], shown.picture.value != before and shown.picture.layout.display != "none"


@pytest.fixture
def network(monkeypatch):
    """A network whose answer is the picture's mean, and the row of a backbone whose last maps are its first layer."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
    row = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3)
    monkeypatch.setattr(widgets, "get_spec", lambda name: row)
    cam = importlib.import_module("ctutils.explain").grad_cam
    monkeypatch.setattr("ctutils.explain.grad_cam", lambda *args, **options: cam(*args, **options | {"layer": "0"}))
    return net


def test_slice_browser(shown, monkeypatch):
    asked = []
    make = phantom.make_slice
    monkeypatch.setattr(phantom, "make_slice", lambda *args, **options: asked.append(options) or make(*args, **options))
    widgets.slice_browser(SimpleNamespace(classes=CLASSES, meta={"seed": 0}), size=64)
    assert shown.picture.layout.display == "none", "the first picture is stored; the second comes with the first move"
    assert moved(shown, **{"level,_HU": 40, "width,_HU": 400})[1] and asked[-1]["window"] == (40, 400)


def test_batch_f1(shown):
    widgets.batch_f1(Y, Y, lambda true, called, size: size / 100 + (true[0] == true[1]), 0.4)
    assert shown.titles == [" The same answers, scored in two ways"] and moved(shown, batch_size=4)[1]
    assert moved(shown, shuffled=True)[1]


def test_threshold(shown):
    widgets.threshold(Y, SCORES, CLASSES)
    found, alarmed = (SCORES[Y != 2, 2] <= 0.5).mean(), (SCORES[Y == 2, 2] <= 0.5).mean()
    assert f"from 0.50: {found:.0%} of the sick found, {alarmed:.0%} of Normal alarmed" in shown.titles[0]
    assert "0% of the sick found, 0% of Normal" in moved(shown, threshold=1.0)[0]


def test_erase(shown, network):
    widgets.erase(SimpleNamespace(classes=CLASSES, meta={"seed": 0}), {"a": network, "b": network}, "x", size=48)
    assert "pneumothorax, finding there, common scanner" in shown.titles[0]
    title, changed = moved(shown, finding=False, scanner_of_its_class=True)
    assert "finding erased, own scanner" in title and changed


def test_own_slice(shown, monkeypatch, tmp_path):
    Image.fromarray(picture(0, 0)).save(tmp_path / "one.png")
    run = SimpleNamespace(record={"data": {}}, plan=SimpleNamespace(size=48, backbone="x"), classes=CLASSES)
    predictor = importlib.import_module("ctutils.people.predict").Predictor

    def predict(self, slices, heat):
        for one in slices:
            one.probabilities, one.heat = SCORES[0], np.zeros(one.grey.shape)

    monkeypatch.setattr(predictor, "__init__", lambda self, run: setattr(self, "run", run))
    monkeypatch.setattr(predictor, "predict", predict)
    widgets.own_slice(run, tmp_path / "one.png")
    assert shown.titles[0].startswith("one.png: called ")

    def upload(name: str, content: bytes):
        file = {"name": name, "type": "", "size": len(content), "content": content, "last_modified": datetime.now(UTC)}
        return moved(shown, **{"your_own_slice": ({**file},)})

    Image.fromarray(picture(2, 5)).save(tmp_path / "two 폐.PNG")
    title, changed = upload("two 폐.PNG", (tmp_path / "two 폐.PNG").read_bytes())
    assert changed and title.startswith("two 폐.PNG") and shown.words.value == ""
    upload("a<b.png", b"no picture")
    assert "&#x27;a&lt;b.png&#x27; cannot be read as a slice" in shown.words.value
    assert shown.picture.layout.display == "none"
