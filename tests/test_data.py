"""data: finding and checking slices, patients, the decoded store, batches."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CLASSES, REAL_CT, files_below, needs_real_ct, picture, user_error, write_set
from PIL import Image

from ctutils import config, data, facts
from ctutils.data import (
    build_store,
    build_transform,
    default_folder,
    feature_loaders,
    load_folder,
    make_loaders,
    normalise,
    read_grey,
    read_patients,
    shortcut_folder,
    with_test_of,
    with_test_split,
)
from ctutils.pictures import resize


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing is written to the project's data folder."""
    monkeypatch.setattr(config, "project_root", lambda: tmp_path / "project")


@pytest.fixture
def root(tmp_path) -> Path:
    return write_set(tmp_path / "set")


def count_calls(monkeypatch, owner, name: str) -> list:
    """Replace a function by one that notes its first argument."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(args[0]) or real(*args, **kwargs))
    return calls


def stored(tmp_path) -> list[str]:
    return files_below(tmp_path / "project" / "data" / "cache" / "store")


# --- Finding ---


@pytest.mark.parametrize("names", ["train val test", "Train valid Test", "Training Validation testing", "TRAIN VALID"])
def test_splits_are_found_by_their_usual_names(tmp_path, names):
    names = names.split()
    folder = load_folder(write_set(tmp_path / "set", splits=names))
    assert list(folder.counts().columns) == ["train", "val", "test"][: len(names)]
    assert (folder.counts() == 2).all(axis=None) and len(folder.slices) == 6 * len(names)
    for split, name in zip(("train", "val", "test"), names, strict=False):
        assert folder.slices["path"][folder.rows(split)].str.startswith(f"{name}/").all()


def test_table_of_slices(root):
    folder = load_folder(root)
    assert (
        " ".join(folder.slices)
        == "path split class label width height mode frames depth warned bytes sha256 problem patient"
    )
    assert (folder.classes, folder.labels.dtype) == (CLASSES, np.int64)
    assert folder.labels.flags.writeable, "torch warns of others"
    row = folder.slices[folder.slices["path"] == "val/폐렴/slice 1.png"].iloc[0]
    content = (root / "val" / "폐렴" / "slice 1.png").read_bytes()
    expected = ["val", "폐렴", 2, 40, 40, "L", 1, "", "", len(content), hashlib.sha256(content).hexdigest(), "", ""]
    assert row.tolist()[1:] == expected
    assert [CLASSES[label] for label in folder.labels] == list(folder.slices["class"])
    assert folder.rows("train").tolist() == list(range(6)), "rows are sorted by split, class and path"


WINDOW = {"level": -600, "width": 1500.0, "unit": "HU"}
ODD_META = [
    *(
        "[1, 2]",
        "{",
        '{"arguments": null, "window": null}',
        '{"arguments": 5, "shortcut": [], "kind": null, "name": {}}',
    ),
    *(
        '{"kind": 3, "name": "a\\rb", "shortcut": "\\ud800", "window": [1, 2]}',
        '{"window": {"level": "a", "width": 1}}',
    ),
    *(
        json.dumps({"window": WINDOW | odd})
        for odd in ({"width": 0}, {"level": float("nan")}, {"unit": 3}, {"width": []})
    ),
    '{"a":' * 100_000,
]


@pytest.mark.parametrize("meta", [None, *ODD_META])
def test_odd_dataset_json_breaks_nothing(root, meta):
    if meta is not None:
        (root / "dataset.json").write_text(meta)
    folder = load_folder(root)
    assert (folder.name, folder.kind, folder.shortcut, folder.window) == ("set", "unknown", None, None)
    assert isinstance(folder.meta, dict)


@pytest.mark.parametrize(
    "told", [{"shortcut": "sharpness"}, {"shortcut": None, "arguments": {"shortcut": "sharpness"}}]
)
def test_dataset_json_tells_name_kind_shortcut_and_window(root, told):
    content = {"name": "작은 세트", "kind": "synthetic", "more": 1, "window": WINDOW | {"by": "me"}, **told}
    (root / "dataset.json").write_text(json.dumps(content))
    folder = load_folder(root)
    assert (folder.name, folder.kind, folder.meta["more"]) == ("작은 세트", "synthetic", 1)
    assert (folder.shortcut, folder.window) == ("sharpness", WINDOW)


def save_every_kind(folder: Path, ramp: np.ndarray) -> dict[str, str]:
    """Save the same grey picture in every kind that a hospital's folder may hold; return {file: mode}."""
    grey = Image.fromarray(ramp)
    rgba = Image.merge("RGBA", [grey, grey, grey, Image.fromarray(np.roll(ramp, 7))])
    palette = grey.convert("P")
    palette.putpalette([v for value in range(256) for v in (value, value, value)])
    clear = palette.copy()
    files = {
        "grey.png": (grey, "L"),
        "upper.PNG": (grey, "L"),
        "colour.png": (Image.merge("RGB", [grey] * 3), "RGB"),
        "RGBA 한글.png": (rgba, "RGBA"),
        "palette.png": (palette, "P"),
        "clear.png": (clear, "P"),
        "with alpha.png": (Image.merge("LA", [grey, grey]), "LA"),
        "16 bit.png": (Image.fromarray(ramp.astype(np.uint16) * 257), "I;16"),
        "float.tiff": (Image.fromarray(ramp.astype(np.float32) * 256), "F"),
        "deep/er/photo.JPG": (grey, "L"),
        "colour.jpeg": (Image.merge("RGB", [grey] * 3), "RGB"),
    }
    (folder / "deep" / "er").mkdir(parents=True)
    for name, (image, _) in files.items():
        options = {"transparency": 3} if name == "clear.png" else {}
        image.save(folder / name, **({"quality": 100} if "j" in name else options))
    return {name: mode for name, (_, mode) in files.items()}


def test_every_kind_of_picture_becomes_the_same_grey(tmp_path):
    root = write_set(tmp_path / "폴더 with spaces")
    ramp = np.add.outer(np.arange(50) * 2, np.arange(60) * 2).astype(np.uint8)
    modes = save_every_kind(root / "train" / "ILD", ramp)
    (root / "train" / "ILD" / "notes.txt").write_text("not a picture, and none expected")
    (root / "train" / "ILD" / ".hidden.png").write_text("made by another program")
    (root / "train" / ".ipynb_checkpoints").mkdir()

    folder = load_folder(root)
    found = {
        path.removeprefix("train/ILD/"): mode
        for path, mode in zip(folder.slices["path"], folder.slices["mode"], strict=True)
        if path.startswith("train/ILD/") and "slice" not in path
    }
    assert found == modes
    for name in modes:
        image = read_grey(root / "train" / "ILD" / name)
        assert (image.mode, image.size) == ("L", (60, 50)), name
        difference = np.abs(np.asarray(image).astype(int) - ramp).max()
        assert difference <= (3 if "j" in name.lower() else 0), f"{name}: {difference}"
    store = build_store(folder, 32)
    rows = [i for i, path in enumerate(folder.slices["path"]) if path.removeprefix("train/ILD/") in modes]
    assert np.ptp(store[rows].astype(int), axis=0).max() <= 3


def test_fingerprint_tells_contents_not_places_or_times(root, tmp_path):
    first = load_folder(root)
    file = root / "train" / "ILD" / "slice 0.png"
    os.utime(file, (1, 1))
    assert load_folder(root).fingerprint == first.fingerprint
    shutil.copytree(root, tmp_path / "elsewhere")
    assert load_folder(tmp_path / "elsewhere").fingerprint == first.fingerprint
    file.rename(file.with_name("slice 9.png"))
    assert load_folder(root).fingerprint != first.fingerprint


def test_changed_picture_of_the_same_size_and_time_makes_a_new_store(tmp_path):
    root = write_set(tmp_path / "set", suffix=".bmp")  # not compressed: each picture has the same size
    first = load_folder(root)
    before = build_store(first, 40)[0].copy()
    file = root / "train" / "ILD" / "slice 0.bmp"
    old = file.stat()
    changed = 255 - picture(0, 0)
    Image.fromarray(changed).save(file)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)

    second = load_folder(root)
    assert second.fingerprint != first.fingerprint
    after = build_store(second, 40)
    assert np.array_equal(after[0], changed) and not np.array_equal(before, changed)


def test_files_are_read_once(root, monkeypatch):
    reads = count_calls(monkeypatch, facts, "read_fact")
    first = load_folder(root)
    assert len(reads) == 18
    again = load_folder(root)
    assert len(reads) == 18, "an unchanged file was read again"
    assert again.fingerprint == first.fingerprint and again.slices.equals(first.slices)
    file = root / "test" / "Normal" / "slice 1.png"
    Image.fromarray(picture(1, 77)).save(file)
    load_folder(root)
    assert [Path(path) for path in reads[18:]] == [file]
    file.unlink()
    assert len(load_folder(root).slices) == 17 and len(reads) == 19


@pytest.mark.parametrize("content", ["", "[]", '{"train/ILD/slice 0.png": {"stamp": 1}}', None])
def test_damaged_index_only_costs_time(root, tmp_path, content):
    first = load_folder(root)
    index = next((tmp_path / "project").rglob("index/*.npz"))
    index.unlink()
    if content is None:
        index.mkdir()  # cannot be written either
    else:
        index.write_text(content)
    assert load_folder(root).slices.equals(first.slices)


def test_korean_names_of_a_mac_are_those_of_others(root):
    """macOS stores the parts of a syllable: one reads the same name."""
    parts = unicodedata.normalize("NFD", "폐렴")
    (root / "val" / "폐렴").rename(root / "val" / parts)
    (root / "train" / parts).mkdir()
    (root / "train" / "폐렴" / "slice 0.png").rename(root / "train" / parts / "가.png".replace("가", "가"))
    (root / "patients.csv").write_text("path,patient\nval/폐렴/slice 0.png,p1\ntrain/폐렴/가.png,p2\n", "utf-8")
    folder = load_folder(root)
    assert folder.classes == CLASSES and folder.counts().loc["폐렴"].tolist() == [2, 2, 2]
    assert (folder.slices["patient"] != "").sum() == 2 and build_store(folder, 32).shape == (18, 32, 32)


@pytest.mark.parametrize(("by", "test"), [("patient", False), ("twins", False), ("equal files", True)])
def test_missing_val_is_drawn_from_train_and_said(tmp_path, monkeypatch, by, test):
    root = write_set(tmp_path / "set", splits=("Training", "test") if test else ("Training",), per_class=7)
    for path in sorted((root / "Training").rglob("*.png")):
        for i in range(2):
            twin = path.with_name(f"{path.stem} twin {i}.png")
            shutil.copy(path, twin)
            if by == "twins":  # other bytes, the same content
                Image.open(path).point(lambda v: v + 5).save(twin)
    case = {path: path.split(" twin")[0].removesuffix(".png") for path in load_folder(root).slices["path"]}
    if by == "patient":
        (root / "patients.csv").write_text("path,patient\n" + "".join(f"{p},{c}\n" for p, c in case.items()))
    if by != "twins":  # the core works without the optional room
        monkeypatch.setitem(sys.modules, "ctutils.audit", None)
    folder = load_folder(root)
    drawn = folder.slices.assign(case=folder.slices["path"].map(case))[folder.slices["path"].str.startswith("Tr")]
    assert (drawn.groupby("case")["split"].nunique() == 1).all(), "twins stand in two splits"
    counts = pd.crosstab(drawn["class"], drawn["split"])
    assert (counts == [18, 3] if test else counts == [3, 15, 3]).all(axis=None), counts
    assert "no val split" in folder.notes[-1] and ("by patient" in folder.notes[-1]) == (by == "patient")
    again = load_folder(root, strict=False)
    assert again.slices.equals(folder.slices) and again.fingerprint == folder.fingerprint
    monkeypatch.setattr(data, "SPLIT_SEED", 1)
    assert with_test_split(folder) is folder or test
    (root / "vla").mkdir()  # a misspelled folder is not passed over
    with user_error("no 'val' folder", "'vla'"):
        load_folder(root)


def test_shares_are_kept_whatever_the_sizes_of_the_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), rng.integers(1, 30, 300))
    labels = ["ab"[group % 2] for group in groups]
    splits = np.array(data.share_out(labels, groups.tolist(), {"train": 0.7, "val": 0.15, "test": 0.15}))
    for label in "ab":
        of_class = splits[np.array(labels) == label]
        assert np.abs(np.array([(of_class == s).mean() for s in data.SPLITS]) - (0.7, 0.15, 0.15)).max() < 0.01
    assert data.share_out(["a"] * 9, [0, *[1] * 7, 2], {"train": 0.8, "val": 0.1, "test": 0.1})[1] == "train"
    with user_error("2 independent group(s)", "'a'", "train, val, test"):
        data.share_out(["a"] * 3, [0, 1, 1], {"train": 0.8, "val": 0.1, "test": 0.1})
    # Patients with healthy and diseased slices: each stays whole, and each split has both classes.
    shares, few = {"train": 0.6, "val": 0.2, "test": 0.2}, (["a"] * 20 + ["b"] * 4, [*range(20), *range(3), 9])
    for labels, patients in ((["a", "b"] * 12, [i // 4 for i in range(24)]), few):
        splits = data.share_out(labels, patients, shares)
        assert set(zip(labels, splits, strict=True)) == {(label, split) for label in "ab" for split in shares}
        assert len(set(zip(patients, splits, strict=True))) == len(set(patients))


# --- Bad input: one message each ---


def move(source: str, target: str):
    return lambda root: (root / source).rename(root / target)


def empty_class(root):
    for file in (root / "val" / "Normal").iterdir():
        file.rename(file.with_suffix(".dcm"))


def unicode_less(root):
    os.rename(root / "val/ILD/slice 1.png", os.fsencode(root / "val/ILD") + b"/\xc6\xf3.png")  # Korean, by Windows


def patients_as_classes(root):
    for split in data.SPLITS:
        for i, name in enumerate(CLASSES):
            (root / split / name).rename(root / split / f"case{i:02d}")


def everywhere(name: str):
    return lambda root: [(root / split / "ILD").rename(root / split / name) for split in data.SPLITS]


def one_class(root):
    for split in data.SPLITS:
        shutil.rmtree(root / split / "ILD"), shutil.rmtree(root / split / "폐렴")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (shutil.rmtree, ["no folder", "set'", "CT_DATA"]),
        (move("train", "trian"), ["no 'train' folder", "import"]),
        (move("val", "vla"), ["no 'val' folder"]),
        (lambda root: (root / "valid").mkdir(), ["'val' and 'valid'", "rename"]),
        (empty_class, ["no images in", "val/Normal", ".png", "import"]),
        (patients_as_classes, ["look like patients (case00, case01", "labels.csv"]),
        (one_class, ["classes ['Normal']", "two classes", "add a class"]),
        (move("val/폐렴", "폐렴"), ["'폐렴'", "val", "spelled alike"]),
        (move("val/ILD", "val/ild"), ["'ILD'", "'ild'", "spelled alike"]),
        (lambda root: (root / "val" / "gone").symlink_to(root / "nowhere"), ["'gone'", "spelled alike"]),
        (unicode_less, ["\\udcc6\\udcf3.png", "UTF-8", "unzip"]),
        (everywhere("I\rLD"), ["train/I\\rLD/slice 0.png", "control characters"]),
        (everywhere("\x1b[2J"), ["\\x1b[2J", "control characters"]),
        (move("val/ILD/slice 0.png", "val/ILD/a\nb.png"), ["a\\nb.png", "control characters"]),
    ],
)
def test_folder_that_is_no_data_set(root, spoil, words):
    spoil(root)
    with user_error(*words):
        load_folder(root, strict=False)


def test_odd_name_of_the_folder_itself(root):
    with user_error("set\\udcff", "UTF-8"):
        load_folder(root.rename(root.parent / "set\udcff"))


def test_links_that_lead_nowhere_or_in_a_circle(root):
    for folder in ("val", "test"):
        (root / folder / "ILD" / "up").symlink_to(root)  # entered, it would give every slice many times
    (root / "val" / "ILD" / f"{'폐' * 83}a.png").write_bytes((root / "val" / "ILD" / "slice 0.png").read_bytes())
    assert len(load_folder(root).slices) == 19
    (root / "val" / "ILD" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "val" / "ILD" / "loop.png").symlink_to("loop.png")
    with user_error("2 unreadable file(s)", "gone.png' (No such file", "loop.png' ("):
        load_folder(root)
    (root / "nowhere.png").write_bytes((root / "val" / "ILD" / "slice 0.png").read_bytes())
    (root / "val" / "ILD" / "loop.png").unlink()
    assert len(load_folder(root).slices) == 20
    shutil.rmtree(root / "test")
    (root / "test").symlink_to(root / "nowhere")
    with pytest.raises(FileNotFoundError, match="test"):  # not: a set without a test split
        load_folder(root)


BAD_FILES = {"zero.png": "not a picture", "text.png": "not a picture", "one pixel.png": "1 x 1 pixels"}


def add_bad(root: Path) -> None:
    (root / "train" / "Normal" / "zero.png").write_bytes(b"")
    (root / "train" / "Normal" / "text.png").write_bytes(b"this is no picture at all\n")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(root / "train" / "Normal" / "one pixel.png")


def test_all_bad_files_are_named_at_once(root):
    add_bad(root)
    for _ in range(2):  # also when the index knows them already
        with user_error("3 unreadable file(s)", *BAD_FILES, *BAD_FILES.values(), "check"):
            load_folder(root)
    slices = load_folder(root, strict=False).slices
    bad = slices[slices["problem"] != ""]
    assert dict(zip(bad["path"].str[len("train/Normal/") :], bad["problem"], strict=True)) == BAD_FILES
    for i in range(4):
        (root / "train" / "ILD" / f"bad {i}.png").write_bytes(b"?")
    with user_error("7 unreadable file(s)", "bad 0.png', 'train/ILD/bad 1.png'"):
        load_folder(root)


def test_truncated_picture(root, tmp_path):
    file = root / "val" / "ILD" / "slice 1.png"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    folder = load_folder(root)  # the header is whole
    with user_error("1 unreadable file(s)", "val/ILD/slice 1.png", "check"):
        build_store(folder, 32)
    assert not stored(tmp_path)


# --- Patients ---


TABLE = "{}\r\ntrain\\ILD\\slice 0.png, p 1 \n./val/ILD/slice 0.png,p2\nonly.png,p3\nslice 1.png,p4\nshort.png\n"


def test_patients_in_two_splits_are_said(root):
    for of_val, said in (
        ("p2", []),
        ("p1", ["1 patient(s) have slices in two splits or more: scores will be too good"]),
    ):
        (root / "patients.csv").write_text(f"path,patient\nval/ILD/slice 0.png,{of_val}\ntrain/ILD/slice 0.png,p1\n")
        assert list(load_folder(root).notes) == said


@pytest.mark.parametrize("name, header", [("patients.csv", "Path,Patient"), ("c.csv", "\ufefffile , Subject,x")])
def test_patients_come_from_a_table_at_the_root(root, name, header):
    (root / "val" / "ILD" / "slice 1.png").rename(root / "val" / "ILD" / "only.png")
    (root / "a.csv").write_text("colour,weight\nred,5\n")
    (root / "b.csv").write_bytes(b"\xff\xfe\x00")
    (root / name).write_text(TABLE.format(header), encoding="utf-8")
    folder = load_folder(root)
    known = folder.slices[folder.slices["patient"] != ""].set_index("path")["patient"].to_dict()
    expected = {"train/ILD/slice 0.png": "p 1", "val/ILD/slice 0.png": "p2", "val/ILD/only.png": "p3"}
    assert known == expected, "a path, or a file name that occurs once"
    patients, strays = read_patients(root, folder.slices["path"])
    assert patients.tolist() == folder.slices["patient"].tolist() and patients.dtype.kind == "U"
    assert strays == ["short.png", "slice 1.png"]
    (root / "findings.csv").write_text("path,patient\nonly.png,other\n")
    first = "p3" if name == "patients.csv" else "other"
    assert (load_folder(root).slices["patient"] == first).sum() == 1, "patients.csv, then findings.csv, then others"


@pytest.mark.parametrize("comma", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_patients_as_a_spreadsheet_saves_them(root, comma, encoding):
    rows = [("path", "patient"), ("train/ILD/slice 0.png", "12"), ("val/폐렴/slice 0.png", "12.0"), ("x.png", "1.05")]
    text = "\r\n".join(comma.join(row) for row in rows)
    (root / "patients.csv").write_bytes(text.encode(encoding))
    assert (load_folder(root).slices["patient"] == "12").sum() == 2


@pytest.mark.parametrize("content", [b"", b"path,doctor\na.png,b\n", b'path,patient\n"a', b"\xff\xfe\x00", None])
def test_patients_csv_that_cannot_be_read(root, content):
    (root / "patients.csv").mkdir() if content is None else (root / "patients.csv").write_bytes(content)
    with user_error("patients.csv", "columns path and patient"):
        load_folder(root)
    assert (load_folder(root, strict=False).slices["patient"] == "").all()


# --- The test split ---


def test_val_is_halved_where_there_is_no_test(tmp_path):
    folder = load_folder(write_set(tmp_path / "set", splits=("train", "val"), per_class=8))
    halved = with_test_split(folder)
    for seed in range(5):
        assert (with_test_split(folder, seed).counts()[["val", "test"]] == 4).all(axis=None), "not stratified"
    assert sorted([*halved.rows("val"), *halved.rows("test")]) == folder.rows("val").tolist()
    assert halved.rows("train").tolist() == folder.rows("train").tolist()
    assert halved.meta["test_from_val"] is True and "test_from_val" not in folder.meta
    assert halved.fingerprint == folder.fingerprint, "the pictures are the same, so is their store"
    assert with_test_split(folder).slices.equals(halved.slices), "the same seed must give the same halves"
    assert any(not with_test_split(folder, seed).slices.equals(halved.slices) for seed in (1, 2))
    assert set(folder.slices["split"]) == {"train", "val"}, "the folder itself was changed"


def test_own_test_split_stays_and_a_single_slice_cannot_be_halved(root):
    folder = load_folder(root)
    assert with_test_split(folder) is folder
    shutil.rmtree(root / "test")
    (root / "val" / "ILD" / "slice 1.png").unlink()
    with user_error("one validation slice", "no test split", "add"):
        with_test_split(load_folder(root))


def test_test_split_of_another_set(root, tmp_path):
    other = load_folder(write_set(tmp_path / "far" / "other", size=(50, 50), per_class=3))
    joined = with_test_of(load_folder(root), other)
    assert joined.counts().to_numpy().tolist() == [[2, 2, 3]] * 3
    assert joined.name == "set, tested on other" and joined.fingerprint != load_folder(root).fingerprint
    for row in joined.slices.itertuples():
        assert row.width == (50 if row.split == "test" else 40) and (joined.root / row.path).is_file()
        assert row.shown.startswith("other/test/" if row.split == "test" else "set/"), "no folder above is named"
    without = write_set(tmp_path / "a", splits=("train", "val"))
    for wrong in (without, write_set(tmp_path / "b", classes=("ILD", "Normal"))):
        with user_error("test slices", wrong.name, "test split"):
            with_test_of(load_folder(root), load_folder(wrong))


# --- The store ---


@pytest.mark.parametrize("shape", [(40, 40), (97, 61), (20, 33)])
def test_store_holds_what_the_transform_makes(tmp_path, shape):
    root = write_set(tmp_path / "set", size=shape, splits=("train", "val"))
    file = root / "train" / "ILD" / "slice 0.png"
    Image.merge("RGB", [Image.fromarray(picture(k, k, shape)) for k in range(3)]).save(file)
    folder = load_folder(root)
    store = build_store(folder, 32)
    assert (store.dtype, store.shape) == (np.uint8, (12, 32, 32))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    unit, network = build_transform(32, (0, 0, 0), (1, 1, 1)), build_transform(32, mean, std)
    for row, path in enumerate(folder.slices["path"]):
        with Image.open(root / path) as image:
            grey, images = unit(image), network(image)
        assert grey.shape == (3, 32, 32) and grey.dtype == torch.float32
        assert np.array_equal((grey * 255).round().byte().numpy(), np.stack([store[row]] * 3)), path
        batch = normalise(torch.from_numpy(store[row].copy())[None, None], mean, std)
        torch.testing.assert_close(batch[0], images, atol=1e-6, rtol=1e-6)


def test_store_is_decoded_once_for_each_size(root, monkeypatch):
    folder = load_folder(root)
    calls = count_calls(monkeypatch, data, "read_grey")
    first = build_store(folder, 32)
    assert len(calls) == 18 and len(set(calls)) == 18
    assert np.array_equal(build_store(folder, 32), first)
    assert np.array_equal(build_store(with_test_split(load_folder(root)), 32), first)
    assert len(calls) == 18, "a slice was decoded twice"
    assert build_store(folder, 24).shape == (18, 24, 24)
    assert len(calls) == 36


def test_rows_stay_in_order_with_many_workers(root, monkeypatch):
    real = data.read_grey
    monkeypatch.setattr(data, "read_grey", lambda *args: time.sleep(0.01 * np.random.rand()) or real(*args))
    folder = load_folder(root)
    store = build_store(folder, 40, workers=8)
    assert isinstance(store, np.memmap), "100,000 slices would not fit into memory"
    assert not store.flags.writeable, "a notebook could change the store for all others"
    for row, path in enumerate(folder.slices["path"]):
        assert np.array_equal(store[row], resize(real(root / path), 40)), path


def test_failed_build_leaves_nothing(root, tmp_path, monkeypatch):
    folder = load_folder(root)
    real, calls = data.read_grey, []

    def fail_late(path, *how):
        calls.append(path)
        if len(calls) > 10:
            assert all(name.startswith(".tmp-") for name in stored(tmp_path)), "half a store under its real name"
            raise RuntimeError("boom")
        return real(path, *how)

    monkeypatch.setattr(data, "read_grey", fail_late)
    with pytest.raises(RuntimeError, match="boom"):
        build_store(folder, 32)
    assert not stored(tmp_path)
    monkeypatch.setattr(data, "read_grey", real)
    assert len(build_store(folder, 32)) == 18


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_store_is_made_again(root, tmp_path, damage):
    folder = load_folder(root)
    expected = build_store(folder, 32).copy()
    file = next((tmp_path / "project").rglob("store/*.u8"))
    content = file.read_bytes()
    if damage == "other":
        file.write_bytes(b"more" + content)
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert np.array_equal(build_store(folder, 32), expected)


def test_two_notebooks_build_at_once(root):
    folder = load_folder(root)
    stores = []
    threads = [threading.Thread(target=lambda: stores.append(build_store(folder, 32))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 3 and all(np.array_equal(store, stores[0]) for store in stores)


# --- Batches ---


def test_image_batches(root):
    folder = load_folder(root)
    store = build_store(folder, 32)
    loaders = make_loaders(folder, store, batch_size=4)
    assert list(loaders) == ["train", "val", "test"] and len(loaders["val"]) == 2
    batches = list(loaders["val"])
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    rows = folder.rows("val")
    assert labels.tolist() == folder.labels[rows].tolist(), "validation slices stay in the table's order"
    grey = torch.from_numpy(store[rows])[:, None].float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    torch.testing.assert_close(images, (grey - mean) / std)


def test_shuffling_depends_on_torchs_seed_alone(tmp_path):
    folder = load_folder(write_set(tmp_path / "set", per_class=8))
    store = build_store(folder, 32)
    # Feature i of slice i is i: it tells which slice came when.
    features = torch.arange(float(len(store)))[:, None]

    def order(loader, seed):
        np.random.seed(seed + 1)
        torch.manual_seed(seed)
        return [torch.cat(parts) for parts in zip(*loader, strict=True)]

    on_images = make_loaders(folder, store, batch_size=5)
    on_features = feature_loaders(folder, features, batch_size=5)
    inputs, labels = order(on_features["train"], 3)
    rows = inputs[:, 0].long().tolist()
    assert sorted(rows) == folder.rows("train").tolist() and rows != sorted(rows), "not shuffled, or not all once"
    assert labels.tolist() == folder.labels[rows].tolist()
    assert order(on_features["train"], 3)[0].equal(inputs)
    assert not order(on_features["train"], 4)[0].equal(inputs)
    images, image_labels = order(on_images["train"], 3)
    assert image_labels.equal(labels), "images and features must come in the same order"
    assert images.equal(normalise(torch.from_numpy(store[rows])[:, None], data.IMAGENET_MEAN, data.IMAGENET_STD))
    assert order(on_features["val"], 3)[0].equal(order(on_features["val"], 4)[0])


def test_one_view_of_a_training_slice_is_drawn(root):
    folder = load_folder(root)
    features = torch.arange(18.0)[:, None]
    views = torch.stack([100 * k + features[:6] for k in range(4)])
    loaders = feature_loaders(folder, features, batch_size=4, views=views)
    seen = torch.cat([inputs for _ in range(20) for inputs, _ in loaders["train"]])[:, 0].long()
    assert set((seen // 100).tolist()) == {0, 1, 2, 3} and set((seen % 100).tolist()) == set(range(6))
    assert torch.cat([inputs for inputs, _ in loaders["val"]]).equal(features[folder.rows("val")])


def test_store_of_another_set(root):
    folder = load_folder(root)
    with user_error("5 decoded slices", "18"):
        make_loaders(folder, np.zeros((5, 32, 32), np.uint8))


def test_only_training_slices_are_augmented(root):
    folder = load_folder(root)
    store = build_store(folder, 32)
    plain = make_loaders(folder, store, batch_size=6)
    black = make_loaders(folder, store, batch_size=6, augment=torch.zeros_like)
    assert next(iter(black["train"]))[0].amax() < 0 < next(iter(plain["train"]))[0].amax()
    for split in ("val", "test"):
        assert next(iter(black[split]))[0].equal(next(iter(plain[split]))[0])


# --- The default set, and a real one ---


def test_synthetic_sets_are_made_on_first_use(monkeypatch, tmp_path):
    phantom = pytest.importorskip("ctutils.phantom")
    asked = []
    monkeypatch.setattr(phantom, "write_dataset", lambda out, **given: asked.append(given) or write_set(Path(out)))
    settings = config.get_settings()
    size = settings.profile
    counts = {"train": size.train, "val": size.val, "test": size.test, "seed": settings.seed}
    assert default_folder(settings).root == settings.data_dir and asked == [counts]
    assert files_below(settings.cache_dir), "the index belongs into the settings' cache"
    shortcut = shortcut_folder(settings)
    assert shortcut.root == settings.cache_dir.parent / "synthetic_shortcut_quick", "each profile has its own"
    assert asked[1:] == [{**counts, "shortcut": "sharpness"}]
    monkeypatch.setenv("CT_DATA", str(write_set(tmp_path / "mine")))
    assert default_folder(config.get_settings()).name == "mine" and len(asked) == 2
    monkeypatch.setenv("CT_DATA", str(tmp_path / "none"))
    with user_error("no folder", "CT_DATA"):
        default_folder(config.get_settings())


@needs_real_ct
def test_real_slices_are_counted_as_their_readme_says():
    counts = load_folder(REAL_CT).counts()
    assert counts.to_dict("list") == {
        "train": [195, 115, 148, 155],
        "val": [23, 21, 13, 15],
        "test": [120, 51, 54, 90],
    }
    assert list(counts.index) == ["adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma"]


def test_importing_data_leaves_torch_alone():
    code = "import sys, ctutils.data; assert not {'torch', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(data.__file__).parents[1])
