"""data: finding and checking slices, the decoded store, batches."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, REAL_CT, files_below, needs_real_ct, picture, user_error, write_set
from PIL import Image

from ctutils import config, data
from ctutils.data import (
    build_store,
    build_transform,
    default_folder,
    feature_loaders,
    load_folder,
    make_loaders,
    normalise,
    read_grey,
    read_small,
    shortcut_folder,
    with_test_split,
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing is written to the project's data folder."""
    monkeypatch.setattr(config, "project_root", lambda: tmp_path / "project")


@pytest.fixture
def root(tmp_path) -> Path:
    return write_set(tmp_path / "set")


def count_calls(monkeypatch, owner, name: str) -> list:
    """Replace a function by one that notes its arguments first."""
    calls, real = [], getattr(owner, name)

    def noted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
    return calls


# --- Finding ---


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Train", "valid", "Test"),
        ("Training", "Validation", "testing"),
        ("TRAIN", "VALID"),
    ],
)
def test_splits_are_found_by_their_usual_names(tmp_path, names):
    folder = load_folder(write_set(tmp_path / "set", splits=names))
    assert list(folder.counts().columns) == ["train", "val", "test"][: len(names)]
    assert (folder.counts() == 2).all(axis=None) and len(folder.slices) == 6 * len(names)
    for split, name in zip(("train", "val", "test"), names, strict=False):
        assert folder.slices["path"][folder.rows(split)].str.startswith(f"{name}/").all()


def test_table_of_slices(root):
    (root / "dataset.json").write_text(json.dumps({"name": "작은 세트", "kind": "synthetic", "more": 1}))
    folder = load_folder(root)
    assert folder.labels.flags.writeable, "torch warns of others"
    assert list(folder.slices.columns) == [
        *("path", "split", "class", "label", "width", "height", "mode", "bytes", "sha256", "problem"),
    ]
    assert folder.classes == CLASSES
    assert (folder.name, folder.kind, folder.meta["more"]) == ("작은 세트", "synthetic", 1)
    row = folder.slices[folder.slices["path"] == "val/폐렴/slice 1.png"].iloc[0]
    content = (root / "val" / "폐렴" / "slice 1.png").read_bytes()
    assert (row["split"], row["class"], row["label"]) == ("val", "폐렴", 2)
    assert (row["width"], row["height"], row["mode"], row["bytes"]) == (40, 40, "L", len(content))
    assert row["sha256"] == data.hashlib.sha256(content).hexdigest()
    assert folder.labels.dtype == np.int64
    assert [CLASSES[label] for label in folder.labels] == list(folder.slices["class"])
    assert folder.rows("train").tolist() == list(range(6)), "rows are sorted by split, class and path"


def test_without_dataset_json_the_folder_gives_the_name(root):
    assert (load_folder(root).name, load_folder(root).kind) == ("set", "unknown")
    for broken in ("[1, 2]", "{"):
        (root / "dataset.json").write_text(broken)
        assert load_folder(root).meta == {}


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
        "12 bit.png": (Image.fromarray(ramp.astype(np.uint16) * 16), "I;16"),
        "8 of 16 bit.png": (Image.fromarray(ramp.astype(np.uint16)), "I;16"),
        "float.tiff": (Image.fromarray(ramp.astype(np.float32)), "F"),
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
    reads = count_calls(monkeypatch, Path, "read_bytes")
    first = load_folder(root)
    assert len(reads) == 18
    again = load_folder(root)
    assert len(reads) == 18, "an unchanged file was read again"
    assert again.fingerprint == first.fingerprint and again.slices.equals(first.slices)
    file = root / "test" / "Normal" / "slice 1.png"
    Image.fromarray(picture(1, 77)).save(file)
    load_folder(root)
    assert [args[0] for args in reads[18:]] == [file]
    file.unlink()
    assert len(load_folder(root).slices) == 17 and len(reads) == 19


@pytest.mark.parametrize("content", ["", "[]", "null", '{"train/ILD/slice 0.png": {"stamp": 1}}', "{"])
def test_damaged_index_only_costs_time(root, tmp_path, content):
    first = load_folder(root)
    index = next((tmp_path / "project").rglob("index/*.json"))
    index.write_text(content)
    assert load_folder(root).slices.equals(first.slices)


def test_index_that_cannot_be_written_only_costs_time(root, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(data, "atomic_path", refuse)
    assert len(load_folder(root).slices) == 18


# --- Bad input: one message each, nothing written ---


def test_missing_folder(tmp_path):
    with user_error("no folder", "no such", "CT_DATA"):
        load_folder(tmp_path / "no such")
    (tmp_path / "file").write_text("")
    with user_error("no folder", "file"):
        load_folder(tmp_path / "file")


def test_folder_without_splits(tmp_path):
    with user_error("no 'train' folder", "import"):
        load_folder(tmp_path)
    with user_error("no 'val' folder"):
        load_folder(write_set(tmp_path / "set", splits=("train", "test")))


def test_two_folders_for_one_split(tmp_path):
    with user_error("two folders for the split 'val'", "'val' and 'valid'"):
        load_folder(write_set(tmp_path / "set", splits=("train", "val", "valid")))


def test_no_images(tmp_path):
    root = write_set(tmp_path / "set")
    for file in (root / "val" / "Normal").iterdir():
        file.rename(file.with_suffix(".dcm"))
    with user_error("no images in 'val/Normal'", ".png", "import"):
        load_folder(root)
    for split in ("train", "val"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    with user_error("0 class folder(s)"):
        load_folder(tmp_path / "empty")


def test_one_class_is_too_few(tmp_path):
    with user_error("1 class folder(s)", "two classes"):
        load_folder(write_set(tmp_path / "set", classes=("ILD",)))


def test_class_missing_in_one_split(root):
    shutil.rmtree(root / "val" / "폐렴")
    with user_error("no class folder '폐렴' in split 'val'", "ILD, Normal, 폐렴"):
        load_folder(root)


def test_classes_that_differ_by_case(root):
    (root / "val" / "ILD").rename(root / "val" / "moved")
    (root / "val" / "moved").rename(root / "val" / "ild")
    with user_error("classes 'ILD' and 'ild'", "differ only by case", "rename"):
        load_folder(root)


BAD_FILES = {
    "zero.png": (b"", "zero bytes"),
    "text.png": (b"this is no picture at all\n", "not a picture"),
    "one pixel.png": (None, "1 x 1 pixels"),
}


def add_bad(root: Path, name: str) -> Path:
    file = root / "train" / "Normal" / name
    if BAD_FILES[name][0] is None:
        Image.fromarray(np.zeros((1, 1), np.uint8)).save(file)
    else:
        file.write_bytes(BAD_FILES[name][0])
    return file


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_that_is_no_slice(root, name):
    add_bad(root, name)
    with user_error("1 unreadable file(s)", f"train/Normal/{name}", BAD_FILES[name][1], "check"):
        load_folder(root)
    with user_error(name):  # also when the index knows it already
        load_folder(root)
    folder = load_folder(root, strict=False)
    bad = folder.slices[folder.slices["problem"] != ""]
    assert bad["path"].tolist() == [f"train/Normal/{name}"]
    assert bad["problem"].item() == BAD_FILES[name][1]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_truncated_picture(root, tmp_path):
    truncate(root / "val" / "ILD" / "slice 1.png")
    folder = load_folder(root)  # the header is whole
    with user_error("1 unreadable file(s)", "val/ILD/slice 1.png", "check"):
        build_store(folder, 32)
    assert not files_below(tmp_path / "project" / "data" / "cache" / "store")


def test_all_bad_files_are_named_at_once(root):
    for name in BAD_FILES:
        add_bad(root, name)
    with user_error("3 unreadable file(s)", *BAD_FILES):
        load_folder(root)
    for i in range(4):
        (root / "train" / "ILD" / f"bad {i}.png").write_bytes(b"?")
    with user_error("7 unreadable file(s)", "and 2 more"):
        load_folder(root)


def test_picture_of_too_many_pixels(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40)
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(root / "val" / "ILD" / "vast.png")
    with user_error("vast.png", "bomb"):
        load_folder(root)
    with user_error("vast.png", "bomb"):
        build_store(load_folder(root, strict=False), 32)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_file_name_that_is_not_unicode(root):
    source = os.fsencode(root / "val" / "ILD" / "slice 1.png")
    os.rename(source, os.fsencode(root / "val" / "ILD") + b"/\xc6\xf3\xb7\xc5.png")  # Korean as Windows wrote it
    with user_error("not Unicode", "val/ILD"):
        load_folder(root)


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


def test_own_test_split_stays(root):
    folder = load_folder(root)
    assert with_test_split(folder) is folder


def test_val_that_cannot_be_halved(tmp_path):
    root = write_set(tmp_path / "set", splits=("train", "val"))
    (root / "val" / "ILD" / "slice 1.png").unlink()
    with user_error("one validation slice", "no test split", "add"):
        with_test_split(load_folder(root))


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
    calls = count_calls(monkeypatch, data, "read_small")
    first = build_store(folder, 32)
    assert len(calls) == 18 and len({args[0] for args in calls}) == 18
    assert np.array_equal(build_store(folder, 32), first)
    assert np.array_equal(build_store(with_test_split(load_folder(root)), 32), first)
    assert len(calls) == 18, "a slice was decoded twice"
    assert build_store(folder, 24).shape == (18, 24, 24)
    assert len(calls) == 36


def test_store_is_mapped_and_cannot_be_changed(root):
    store = build_store(load_folder(root), 32)
    assert isinstance(store, np.memmap), "100,000 slices would not fit into memory"
    with pytest.raises(ValueError, match="read-only"):
        store[0] = 0


def test_rows_stay_in_order_with_many_workers(root, monkeypatch):
    real = data.read_small
    monkeypatch.setattr(data, "read_small", lambda *args: time.sleep(0.01 * np.random.rand()) or real(*args))
    folder = load_folder(root)
    store = build_store(folder, 40, workers=8)
    for row, path in enumerate(folder.slices["path"]):
        assert np.array_equal(store[row], read_small(root / path, 40)), path


def test_failed_build_leaves_nothing(root, tmp_path, monkeypatch):
    folder = load_folder(root)
    real, calls = data.read_small, []

    def fail_late(path, size):
        calls.append(path)
        if len(calls) > 10:
            raise RuntimeError("boom")
        return real(path, size)

    monkeypatch.setattr(data, "read_small", fail_late)
    with pytest.raises(RuntimeError, match="boom"):
        build_store(folder, 32)
    assert not files_below(tmp_path / "project" / "data" / "cache" / "store")
    monkeypatch.setattr(data, "read_small", real)
    assert len(build_store(folder, 32)) == 18


def test_full_disk_while_building_is_one_message(root, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args):
            self.file, self.written = open(*args), 0

        def write(self, content):
            self.written += len(content)
            if self.written > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    folder = load_folder(root)
    monkeypatch.setattr(data, "open", Full, raising=False)
    with user_error("full disk", "free some space"):
        build_store(folder, 32)
    assert not files_below(tmp_path / "project" / "data" / "cache" / "store")
    monkeypatch.delattr(data, "open")
    assert len(build_store(folder, 32)) == 18


KILLED = """
import sys, time
from pathlib import Path
from ctutils import data
real, cache = data.read_small, Path(sys.argv[2])
def slow(path, size):
    if "/val/" in path.as_posix():
        print("half", flush=True)
        time.sleep(60)
    return real(path, size)
data.read_small = slow
data.build_store(data.load_folder(sys.argv[1], cache=cache), 32, cache=cache, workers=1)
"""


def test_killed_build_is_as_if_it_had_not_begun(root, tmp_path):
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(root), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(data.__file__).parents[1]) as process:
        assert process.stdout.readline().strip() == b"half"
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    left = list((cache / "store").iterdir())
    assert [file.name[:5] for file in left] == [".tmp-"], "a half store stands under its real name"
    folder = load_folder(root, cache=cache)
    store = build_store(folder, 32, cache=cache)
    for row, path in enumerate(folder.slices["path"]):
        assert np.array_equal(store[row], read_small(root / path, 32))
    assert left[0].exists(), "it may belong to another notebook that is still at work"
    os.utime(left[0], (time.time() - 3600,) * 2)
    build_store(folder, 28, cache=cache)
    assert left[0].exists(), "a large set takes more than an hour"
    os.utime(left[0], (time.time() - 100_000,) * 2)
    build_store(folder, 24, cache=cache)
    assert not left[0].exists(), "a day later nobody is at work on it"


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_store_is_made_again(root, tmp_path, damage):
    folder = load_folder(root)
    expected = build_store(folder, 32).copy()
    file = next((tmp_path / "project").rglob("store/*.npy"))
    content = file.read_bytes()
    if damage == "other":
        np.save(file, np.zeros((3, 32, 32), np.uint8))
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


def test_set_without_test_has_two_loaders(tmp_path):
    folder = load_folder(write_set(tmp_path / "set", splits=("train", "val")))
    store = build_store(folder, 32)
    assert list(make_loaders(folder, store)) == ["train", "val"]
    assert list(feature_loaders(folder, torch.zeros(12, 2))) == ["train", "val"]


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


def test_default_set_is_made_on_first_use(monkeypatch, tmp_path):
    phantom = pytest.importorskip("ctutils.phantom")
    asked = []

    def write(out, **options):
        asked.append(options)
        return out if Path(out).exists() else write_set(Path(out))

    monkeypatch.setattr(phantom, "write_dataset", write)
    settings = config.get_settings()
    folder = default_folder(settings)
    assert folder.root == settings.data_dir and len(folder.slices) == 18
    size = settings.profile
    assert asked == [{"train": size.train, "val": size.val, "test": size.test, "seed": settings.seed}]
    assert files_below(settings.cache_dir), "the index belongs into the settings' cache"
    monkeypatch.setenv("CT_DATA", str(write_set(tmp_path / "mine")))
    assert default_folder(config.get_settings()).name == "mine" and len(asked) == 1
    monkeypatch.setenv("CT_DATA", str(tmp_path / "none"))
    with user_error("no folder", "CT_DATA"):
        default_folder(config.get_settings())


def test_shortcut_set_stands_beside_the_cache(monkeypatch):
    phantom = pytest.importorskip("ctutils.phantom")
    asked = []
    monkeypatch.setattr(phantom, "write_dataset", lambda out, **given: asked.append(given) or write_set(Path(out)))
    settings = config.get_settings()
    folder = shortcut_folder(settings)
    assert folder.root.parent == settings.cache_dir.parent and folder.root != settings.data_dir
    size = settings.profile
    counts = {"train": size.train, "val": size.val, "test": size.test}
    assert asked == [{**counts, "seed": settings.seed, "shortcut": "sharpness"}]


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
