"""Kaggle: a stand-in for kagglehub's download, and class folders whose names differ between splits."""

import json
import sys
import threading
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ctutils import cli, kaggle
from ctutils.base import CTError, answers
from ctutils.data import load_folder
from ctutils.importers import import_dataset

LONG = {"adenocarcinoma": "adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib", "normal": "normal"}
NAME = "mohamedhanyyy/chest-ctscan-images"


@pytest.fixture
def delivery(tmp_path):
    """The set as Kaggle delivers it: long names in train and valid, short ones in test."""
    root = tmp_path / "cache" / "versions" / "1"
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        for short, long in LONG.items():
            folder = root / "Data" / split / (short if split == "test" else long)
            folder.mkdir(parents=True)
            for k in range(3):
                Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(folder / f"{k} 폐.PNG")
    return root


@pytest.fixture
def hub(monkeypatch, delivery):
    """A stand-in for kagglehub; what it was asked for."""
    asked = []
    module = SimpleNamespace(dataset_download=lambda handle: asked.append(handle) or str(delivery))
    monkeypatch.setitem(sys.modules, "kagglehub", module)
    monkeypatch.setattr(kaggle, "answers", lambda *_: True)
    return SimpleNamespace(asked=asked, module=module)


def test_a_set_is_downloaded_and_its_classes_get_one_name(hub, tmp_path, capsys):
    out = tmp_path / "real 실제"
    assert cli.main(["import", f"kaggle:{NAME}", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert hub.asked == [NAME] and told["name"] == f"kaggle:{NAME}" and told["images"] == 18
    assert told["counts"] == dict.fromkeys(("train", "val", "test"), {"adenocarcinoma": 3, "normal": 3})
    assert any(f"'{LONG['adenocarcinoma']}' counts as 'adenocarcinoma'" in note for note in told["notes"])
    assert load_folder(out).classes == ("adenocarcinoma", "normal")
    assert import_dataset(f"kaggle:{NAME}", out, progress=False)["already_there"] == 18


def test_a_version_needs_no_answer_since_it_may_be_in_the_cache(hub, monkeypatch, delivery):
    monkeypatch.setattr(kaggle, "answers", lambda *_: False)
    assert kaggle.fetch(f"kaggle:{NAME}/versions/1".replace("/", "\\")) == delivery  # as Windows writes it
    with pytest.raises(CTError, match="no answer from Kaggle within 6 s.*import the .zip"):
        kaggle.fetch(f"kaggle:{NAME}")


@pytest.mark.parametrize("name", ["kaggle:", "kaggle:chest", "kaggle:a/b/c", "kaggle:../b", "kaggle:a b/c"])
def test_a_wrong_address_is_said_before_anything_is_asked(name, hub):
    if name == "kaggle:../b":
        hub.module.dataset_download = lambda handle: 1 / 0
    with pytest.raises(CTError, match="kaggle:OWNER/NAME|no download"):
        kaggle.fetch(name)
    assert hub.asked == []


def test_what_goes_wrong_is_one_line(hub, monkeypatch, capsys, tmp_path):
    def refuse(handle):
        raise RuntimeError("403 Client Error.\n\nYou don't have permission")

    hub.module.dataset_download = refuse
    assert cli.main(["import", f"kaggle:{NAME}", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "403 Client Error. You don't have permission" in said and "kagglehub.login" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(CTError, match="no package kagglehub.*pip install kagglehub"):
        kaggle.fetch(f"kaggle:{NAME}")


def test_a_server_that_is_not_there_is_noticed(monkeypatch):
    assert not answers("http://127.0.0.1:9", 5)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: threading.Event().wait(5))
    assert not answers("http://127.0.0.1:9", 0.05)  # it hangs


@pytest.mark.parametrize(
    "splits, names",
    [
        ({"train": "cancer_T2 normal", "test": "cancer normal"}, {"cancer_T2": "cancer"}),
        ({"train": "cancer cancer_T2", "test": "cancer"}, {}),  # two classes of one split
        ({"train": "cancer_T1 cancer_T2", "test": "cancer"}, {}),  # which of the two is it?
        ({"train": "pneumothorax", "test": "pneumo"}, {}),  # no separator
        ({None: "cancer cancer_T2"}, {}),
    ],
)
def test_names_are_joined_only_where_nothing_is_lost(splits, names):
    assert kaggle.same_names((split, label) for split, found in splits.items() for label in found.split()) == names
