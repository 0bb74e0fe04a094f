"""Every fault that the audit knows is planted in a small folder and must be found, and nothing else."""

import dataclasses
import errno
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import REAL_CT, files_below, needs_real_ct, user_error
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

from ctutils.audit import (
    audit,
    clean_copy,
    decode_pass,
    exact_duplicates,
    group_slices,
    near_duplicates,
    read_patients,
    shortcut_probes,
)
from ctutils.audit import clean as clean_module
from ctutils.audit import look as look_module
from ctutils.audit import probes as probes_module
from ctutils.audit import report as report_module
from ctutils.base import CTError, write_json
from ctutils.data import load_folder

CLASSES = ("ILD", "폐렴 1")


def chest(seed: int, vessels: int | None = None, side: int = 128) -> Image.Image:
    """Draw a body with two lungs and vessels; `seed` chooses the body, `vessels` (default: seed) the rest."""
    rng = np.random.default_rng([seed, 1])
    y, x = np.mgrid[:side, :side] / side - 0.5
    wide, high = rng.uniform(0.36, 0.44), rng.uniform(0.26, 0.33)
    grey = np.where((x / wide) ** 2 + (y / high) ** 2 < 1, 215.0, 55.0)
    for sign in (-1, 1):
        place, size = rng.uniform(0.16, 0.2), rng.uniform(0.1, 0.14)
        lung = ((x - sign * place) / size) ** 2 + ((y - rng.uniform(-0.03, 0.03)) / rng.uniform(0.17, 0.22)) ** 2 < 1
        grey[lung] = 80
    detail = np.random.default_rng([seed if vessels is None else vessels, 2])
    spots = ndimage.gaussian_filter(detail.normal(size=grey.shape), 2)
    grey += np.where(grey == 80, 70, 15) * spots / spots.std()
    return Image.fromarray(np.clip(grey + detail.normal(0, 3, grey.shape), 0, 255).astype(np.uint8))


def write(root: Path, pictures: dict[str, Image.Image]) -> Path:
    """Save pictures under their paths, and two chests of their own in each class of train and val."""
    seed = 1000
    for split in ("train", "val"):
        for name in CLASSES:
            for i in range(2):
                seed += 1
                pictures = {f"{split}/{name}/own {i}.png": chest(seed), **pictures}
    for path, picture in pictures.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / path)
    return root


def look(root: Path):
    return decode_pass(load_folder(root, strict=False, cache=root.parent / "cache"), workers=2)


def check(root: Path, **options):
    return audit(root, cache=root.parent / "cache", workers=2, **{"probes": False, **options})


def messages(report, severity: str) -> dict[str, str]:
    rows = report.findings[report.findings["severity"] == severity]
    return {row.check: f"{row.message} {' '.join(row.examples)}" for row in rows.itertuples()}


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files_below(folder)}


# ---------------------------------------------------------------- duplicates


def test_exact_copies_are_found_by_their_pixels_not_their_bytes(tmp_path):
    picture = chest(0)
    palette = picture.convert("P")
    assert (np.asarray(palette.convert("L")) == np.asarray(picture)).all()
    root = write(
        tmp_path / "set",
        {
            "train/ILD/a.png": picture,
            "train/ILD/b.bmp": picture.convert("RGB"),
            "val/ILD/c.png": picture.convert("RGBA"),
            "val/폐렴 1/d.PNG": palette,
            "val/ILD/almost.png": picture.point(lambda v: v + (v == 80)),
        },
    )
    found = exact_duplicates(look(root))
    assert list(found["path"]) == ["train/ILD/a.png", "train/ILD/b.bmp", "val/ILD/c.png", "val/폐렴 1/d.PNG"]
    assert found["group"].nunique() == 1

    report = check(root)
    errors, warnings = messages(report, "error"), messages(report, "warning")
    assert not report.ok
    assert "2 of 7 val slices have an exact copy in train" in errors["exact copies across splits"]
    assert "val/ILD/c.png" in errors["exact copies across splits"]
    assert "1 picture under two classes" in errors["exact copies across classes"]
    assert "2 slices beside an exact copy" in warnings["exact copies within a split"]
    leaks = report.tables["leaks"].iloc[0]
    assert (leaks["split"], leaks["other"], leaks["exact"], leaks["either"]) == ("val", "train", 2, 3)


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file).convert("L")


def noisy(picture: Image.Image) -> Image.Image:
    grey = np.asarray(picture) + np.random.default_rng(0).normal(0, 10, picture.size[::-1])
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))


TWINS = {
    "re-encoded": jpeg,
    "brighter": lambda p: p.point(lambda v: min(255, int(v * 0.8 + 40))),
    "smaller": lambda p: p.resize((100, 100)),
    "shifted": lambda p: p.transform(p.size, Image.Transform.AFFINE, (1, 0, 6, 0, 1, -5)),
    "cropped": lambda p: p.crop((5, 22, 120, 108)),
    "padded": lambda p: ImageOps.expand(p, 20),
    "turned": lambda p: p.rotate(3, Image.Resampling.BILINEAR, fillcolor=55),
    "mirrored": ImageOps.mirror,
    "upside down": lambda p: p.rotate(180),
    "a quarter turned": lambda p: p.transpose(Image.Transpose.ROTATE_90),
    "mirrored and turned": lambda p: ImageOps.mirror(p).transpose(Image.Transpose.ROTATE_90),
    "noisy": noisy,
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A chest of train for each kind of twin, its twin in val: what was looked at."""
    pictures = {}
    for seed, (name, change) in enumerate(TWINS.items()):
        pictures[f"train/ILD/{name}.png"] = chest(seed)
        pictures[f"val/ILD/{name}.png"] = change(chest(seed))
    return look(write(tmp_path_factory.mktemp("twins") / "set", pictures))


def test_near_twins_are_found_and_no_other_pair(twins):
    found = near_duplicates(twins)
    pairs = {frozenset(pair) for pair in zip(found["path_a"], found["path_b"], strict=True)}
    assert pairs == {frozenset([f"train/ILD/{name}.png", f"val/ILD/{name}.png"]) for name in TWINS}
    assert (found["correlation"] > 0.94).all() and (found["detail"] > 0.8).all()
    assert not len(exact_duplicates(twins))


def test_a_near_twin_of_an_exact_copy_is_listed_for_every_split(tmp_path):
    root = write(
        tmp_path / "set",
        {"train/ILD/a.png": chest(0), "val/ILD/a.png": chest(0), "train/ILD/b.png": jpeg(chest(0))},
    )
    found = near_duplicates(look(root))
    pairs = {frozenset(pair) for pair in zip(found["path_a"], found["path_b"], strict=True)}
    assert pairs == {frozenset([f"{split}/ILD/a.png", "train/ILD/b.png"]) for split in ("train", "val")}


def test_neighbouring_slices_are_judged_by_patient(tmp_path):
    # The same body with vessels that have moved on a little: alike, yet not the same picture.
    a, b = (np.asarray(chest(2, vessels=v), np.float32) for v in (1, 2))
    neighbour = Image.fromarray((0.6 * a + 0.4 * b).astype(np.uint8))
    root = write(
        tmp_path / "set", {"train/ILD/a.png": Image.fromarray(a.astype(np.uint8)), "train/ILD/b.png": neighbour}
    )
    decoded = look(root)
    assert len(near_duplicates(decoded)) == 1
    path = decoded.table["path"]
    same = np.where(path.isin(["train/ILD/a.png", "train/ILD/b.png"]), "p1", "")
    assert near_duplicates(decoded, same)["same_patient"].tolist() == [True]
    other = np.where(path == "train/ILD/b.png", "p2", same)
    assert not len(near_duplicates(decoded, other)), "two known patients need the very same picture"

    assert "near twins within a split" in messages(check(root), "warning")
    pd.DataFrame({"path": ["train/ILD/a.png", "train/ILD/b.png"], "patient": "p1"}).to_csv(root / "patients.csv")
    report = check(root)
    assert report.ok and "near twins within a split" in messages(report, "info")
    assert "near twins within a split" not in messages(report, "warning")


def test_a_relabelled_twin_is_an_error(tmp_path):
    paths = ["train/ILD/a.png", "train/폐렴 1/b.jpg"]
    root = write(tmp_path / "set", dict.fromkeys(paths, chest(0)))
    errors = messages(check(root), "error")
    assert list(errors) == ["near twins across classes"] and paths[1] in errors["near twins across classes"]
    # One patient may have slices with and without the disease, which look alike.
    pd.DataFrame({"path": paths, "patient": "p1"}).to_csv(root / "patients.csv")
    report = check(root)
    assert report.ok and "near twins across classes" in messages(report, "warning")


def test_blank_pictures_are_a_warning_and_no_twins(tmp_path):
    blank = {f"train/ILD/{i}.png": Image.new("L", (64 + i, 64), 3) for i in range(4)}
    for picture in blank.values():
        picture.putpixel((30, 30), 20)
    report = check(write(tmp_path / "set", blank))
    assert "4 slices of one grey level" in messages(report, "warning")["blank pictures"]
    assert not len(report.tables["near"]) and report.ok


def test_memory_stays_small(twins):
    held = twins.body.nbytes + twins.lungs.nbytes + sum(values.nbytes for values in twins.features.values())
    assert held / len(twins.table) < 20_000, "bytes a slice"


# ---------------------------------------------------------------- files and layout


def test_unreadable_files_are_named_and_the_rest_is_looked_at(tmp_path):
    root = write(tmp_path / "set", {"train/ILD/a.png": chest(0), "val/ILD/a.png": chest(0)})
    (root / "train/ILD/empty.png").write_bytes(b"")
    (root / "train/ILD/text.png").write_text("no picture")
    whole = (root / "train/ILD/a.png").read_bytes()
    (root / "val/ILD/half.png").write_bytes(whole[: len(whole) // 2])  # the header is whole
    report = check(root)
    errors = messages(report, "error")
    assert set(errors) == {"unreadable files", "exact copies across splits"}
    assert "3 files" in errors["unreadable files"]
    assert all(name in errors["unreadable files"] for name in ("empty.png", "text.png", "half.png"))
    assert errors["exact copies across splits"].startswith("1 of 6 val")


def test_odd_files_are_told(tmp_path):
    colour = Image.merge("RGB", [chest(0), chest(1), chest(2)])
    root = write(tmp_path / "set", {"train/ILD/a.png": colour, "train/ILD/b.png": chest(3, side=96).convert("RGB")})
    (root / "train/ILD/notes.txt").write_text("hello")
    report = check(root)
    assert "train/ILD/a.png" in messages(report, "warning")["colour pictures"]
    assert "b.png" not in messages(report, "warning")["colour pictures"]
    info = messages(report, "info")
    assert "train/ILD/notes.txt" in info["other files"]
    assert "train/ILD/b.png" in info["picture size"] and "train/ILD/b.png" in info["picture mode"]
    assert report.ok


def test_a_broken_layout_is_one_error(tmp_path):
    report = check(tmp_path / "nowhere")
    assert not report.ok and len(report.findings) == 1
    assert "nowhere" in report.findings["message"][0]
    assert json.loads(json.dumps(report.to_json()))["ok"] is False and "layout" in report.to_text()
    with user_error("cannot be read", "nowhere"):
        clean_copy(tmp_path / "nowhere", tmp_path / "out", report)


def test_report_as_text_and_json(tmp_path):
    root = write(tmp_path / "set", {"train/ILD/a.png": chest(0), "val/ILD/a.png": chest(0)})
    report = check(root)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["ok"] is False and content["rows"]["exact"] == 2
    assert content["tables"]["counts"][0] == {"class": "ILD", "train": 3, "val": 3}
    assert content["findings"][0]["severity"] == "error"
    assert content["findings"][0]["examples"] == ["val/ILD/a.png"]
    text = report.to_text()
    assert "ERROR" in text and "1 of 5 val slices" in text and "--fix" in text


# ---------------------------------------------------------------- patients


def test_patients_in_two_splits_and_classes(tmp_path):
    root = write(tmp_path / "set", {})
    rows = {
        "train\\ILD\\own 0.png": "김",
        "val/ILD/own 0.png": "김",
        "train/ILD/own 1.png": "p2",
        "train/폐렴 1/own 1.png": "p2",
        "val/ILD/own 1.png": "p3",
    }
    pd.DataFrame(rows.items(), columns=["path", "patient"]).to_csv(root / "findings.csv", index=False)
    report = check(root)
    assert not report.ok
    assert messages(report, "error")["patients in two splits"].startswith("1 patient in two splits or more (2 slices)")
    assert messages(report, "warning")["patients in two classes"].startswith("1 patient in two classes")
    assert "3 slices without a patient" in messages(report, "info")["patients"]

    pd.DataFrame({"path": list(rows), "patient": list("abcde")}).to_csv(root / "patients.csv", index=False)
    assert check(root).ok, "patients.csv comes before findings.csv"


@pytest.mark.parametrize("content", ["slice,patient\na,b\n", ""])
def test_a_bad_patient_table_is_a_warning(tmp_path, content):
    root = write(tmp_path / "set", {})
    (root / "patients.csv").write_text(content)
    with user_error("patients.csv"):
        read_patients(load_folder(root, cache=tmp_path / "cache"))
    report = check(root)
    assert report.ok and "patients.csv" in messages(report, "warning")["patients"]


@pytest.mark.parametrize(
    "file, columns, paths",
    [
        ("labels.csv", "Image,Patient_ID", ["train/ILD/own 0.png", "val/ILD/own 0.png"]),
        ("findings.csv", "path,subject", ["./train/ILD/own 0.png", "val\\ILD\\own 0.png"]),
        ("patients.csv", "file,patient", ["only here.png", "val/ILD/own 0.png"]),
    ],
)
def test_patient_tables_of_many_names(tmp_path, file, columns, paths):
    root = write(tmp_path / "set", {"train/ILD/only here.png": chest(0)})
    (root / file).write_text("\n".join([columns, *(f"{path},p" for path in paths), "gone.png,q"]), encoding="utf-8")
    report = check(root)
    assert "1 patient in two splits" in messages(report, "error")["patients in two splits"]
    assert "1 row of the patient table" in messages(report, "warning")["patients"]
    out = clean_copy(root, tmp_path / "out", report)
    assert audit(out, probes=False, cache=tmp_path / "cache").ok
    assert len(pd.read_csv(out / "patients.csv")) == 2


def test_groups_join_patients_copies_and_twins(tmp_path):
    root = write(
        tmp_path / "set",
        {
            "train/ILD/a.png": chest(0),
            "val/ILD/a.png": chest(0),
            "val/ILD/b.png": jpeg(chest(0)),
            "val/ILD/c.png": chest(1),
        },
    )
    decoded = look(root)
    path = decoded.table["path"]
    patients = np.where(path.isin(["val/ILD/b.png", "val/ILD/c.png"]), "p", "")
    groups = pd.Series(group_slices(decoded, near_duplicates(decoded), patients), index=path)
    together = ["train/ILD/a.png", "val/ILD/a.png", "val/ILD/b.png", "val/ILD/c.png"]
    assert groups[together].nunique() == 1 and groups.nunique() == len(path) - 3


# ---------------------------------------------------------------- shortcut probes


def noise_set(root: Path, change=None, classes=("a", "b", "c"), each: int = 24):
    """Pictures of noise without any class; `change(pixels, class number)` may plant one."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        for split, count in (("train", each - 4), ("val", 4)):
            (root / split / name).mkdir(parents=True)
            for i in range(count * (1 + 2 * (label == 1))):  # the second class is three times as large
                pixels = ndimage.gaussian_filter(rng.normal(size=(48, 48)), rng.uniform(0.6, 1.0))
                pixels = 128 + 40 * pixels / pixels.std()
                pixels = change(pixels, label) if change else pixels
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return look(root)


def sharpness(pixels, label):
    pixels = ndimage.gaussian_filter(pixels - 128, 0.7 * label)
    return 128 + 40 * pixels / pixels.std()


def corner_mark(pixels, label):
    if label == 2:
        pixels[1:4, 40:46] = 255
    return pixels


def test_no_probe_is_flagged_without_a_shortcut(tmp_path):
    probes = shortcut_probes(noise_set(tmp_path / "set"))
    assert len(probes) == 7 and not probes["flagged"].any(), probes
    assert ((probes["low"] <= probes["macro_f1"]) & (probes["macro_f1"] <= probes["high"])).all()
    assert (probes["threshold"] > probes["chance"]).all() and (probes["slices"] == 120).all()


def test_a_sharpness_shortcut_is_flagged(tmp_path, monkeypatch):
    only = {name: (mean, 2) for name, (mean, _) in probes_module.FLAG_MARGIN.items()}
    monkeypatch.setattr(probes_module, "FLAG_MARGIN", only)  # by the mean over the classes
    root = tmp_path / "set"
    noise_set(root, sharpness)
    report = check(root, probes=True)
    probes = report.tables["probes"].set_index("probe")
    assert probes.loc["sharpness and noise", "flagged"]
    assert not probes.loc[["picture size", "border and corners"], "flagged"].any()
    assert "sharpness and noise alone" in " ".join(messages(report, "warning").values())
    assert report.ok, "a shortcut warns; what to do about it is the reader's choice"
    assert "Macro F1" in report.to_text()


def test_a_mark_of_one_class_is_flagged(tmp_path, monkeypatch):
    only = {name: (2, one) for name, (_, one) in probes_module.FLAG_MARGIN.items()}
    monkeypatch.setattr(probes_module, "FLAG_MARGIN", only)
    decoded = noise_set(tmp_path / "set", corner_mark)
    some = {name: decoded.features[name] for name in ("picture size", "border and corners")}
    probes = shortcut_probes(dataclasses.replace(decoded, features=some)).set_index("probe")
    assert probes.loc["border and corners", "flagged"]
    assert probes.loc["border and corners", "best_class"] == "c"
    assert not probes.loc["picture size", "flagged"]


def framed(image):
    return ImageOps.expand(image.crop((1, 1, 63, 63)), 1, fill=20)


def with_text(image):
    ImageDraw.Draw(image).text((1, 1), "R", fill=190)
    return image


MARKS = {  # what one class of three bears: (the change, how it is saved, the probe that must see it)
    "text in a corner": (with_text, {}, "border and corners"),
    "a frame": (framed, {}, "border and corners"),
    "brighter": (lambda image: image.point(lambda grey: grey + 12), {}, "grey statistics"),
    "noisier": (noisy, {}, "sharpness and noise"),
    "larger": (lambda image: image.resize((66, 66)), {}, "picture size"),
    "wider": (lambda image: image.resize((68, 64)), {}, "picture size"),
    "less compressed": (lambda image: image, {"compress_level": 1}, "file size and metadata"),
    "with a resolution": (lambda image: image, {"dpi": (96, 96)}, "file size and metadata"),
    "in colour mode": (lambda image: image.convert("RGB"), {}, "file size and metadata"),
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_planted_shortcut_is_flagged(tmp_path, mark):
    change, how, probe = MARKS[mark]
    root = tmp_path / "set"
    for i, name in enumerate("abc" * 24):
        path = root / ("val" if i < 12 else "train") / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        chest(i, side=64).save(path)
    clean = look(root)
    for path in root.glob("*/c/*.png"):
        with Image.open(path) as image:
            marked = change(image.copy())
        marked.save(path, **how)
    for decoded, flagged in ((clean, False), (look(root), True)):
        some = dataclasses.replace(decoded, features={probe: decoded.features[probe]})
        assert shortcut_probes(some)["flagged"].tolist() == [flagged]


def test_picture_size_and_file_format_are_probed(tmp_path):
    decoded = noise_set(tmp_path / "set", classes=("a", "b"))
    label = decoded.folder.slices["label"]
    facts = decoded.folder.slices.assign(width=48 + label, suffix="", path=decoded.folder.slices["path"])
    values = look_module._with_file_facts(facts.assign(mode=np.where(label, "L", "RGB")), dict(decoded.features))
    size = np.log(np.stack([facts["width"], facts["height"]], axis=1)).astype(np.float32)
    name = "grey statistics"
    features = {"picture size": size, name: decoded.features[name], list(values)[0]: list(values.values())[0]}
    probes = shortcut_probes(dataclasses.replace(decoded, features=features))
    flagged = set(probes["probe"][probes["flagged"]])
    assert flagged == {"picture size", "file size and metadata"}


def test_probes_keep_groups_together(tmp_path):
    decoded = noise_set(tmp_path / "set", classes=("a", "b"))
    # Eight copies of each picture: a label can be learned by heart, if a copy stands in another fold.
    source = np.arange(len(decoded.table)) // 8 * 8
    features = {"thumbnail, 32 x 32": decoded.features["thumbnail, 32 x 32"][source]}
    labels = np.random.default_rng(1).integers(0, 2, len(source))[source]
    copies = dataclasses.replace(decoded, features=features, table=decoded.table.assign(label=labels))
    assert shortcut_probes(copies)["flagged"].all()
    assert not shortcut_probes(copies, source)["flagged"].any()


def test_probes_need_slices(tmp_path):
    root = write(tmp_path / "set", {})
    assert shortcut_probes(look(root)).empty
    assert "too few" in messages(check(root, probes=True), "info")["shortcut probes"]


# ---------------------------------------------------------------- the cleaned copy


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """40 chests with planted faults: the folder and its report."""
    pictures = {}
    for i in range(40):
        split = "train" if i < 28 else "val" if i < 34 else "test"
        pictures[f"{split}/{CLASSES[i % 2]}/{i % 10}.png" if i < 10 else f"{split}/{CLASSES[i % 2]}/s{i}.png"] = chest(
            i, side=96
        )
    pictures["test/ILD/0.png"] = jpeg(chest(0, side=96))  # a near twin with its source's name in another split
    pictures["val/ILD/copy.png"] = chest(2, side=96)
    pictures["val/폐렴 1/wrong copy.png"] = chest(4, side=96)
    pictures["test/폐렴 1/wrong twin.png"] = jpeg(chest(6, side=96))
    root = write(tmp_path_factory.mktemp("dirty") / "원본 set", pictures)
    (root / "test/ILD/bad.png").write_bytes(b"")
    names = [*pictures, "train/ILD/own 0.png", "val/ILD/own 0.png"]
    patient = ["same" if "own" in name else f"p{i}" if i < 40 else "" for i, name in enumerate(names)]
    split = [name.split("/")[0] for name in names]
    table = pd.DataFrame({"path": names, "patient": patient, "split": split, "x0": range(len(names))})
    table.to_csv(root / "findings.csv", index=False)
    write_json(root / "dataset.json", {"name": "dirty", "kind": "synthetic", "arguments": {"train": 1}})
    return root, check(root)


def test_clean_copy_mends_all_and_leaves_the_source(dirty, tmp_path):
    root, report = dirty
    before = hashes(root)
    out = clean_copy(root, tmp_path / "new folder" / "깨끗", report)
    assert out == tmp_path / "new folder" / "깨끗"
    assert hashes(root) == before
    assert [path.name for path in out.parent.iterdir()] == ["깨끗"], "no temporary folder is left"

    after = audit(out, probes=False, cache=tmp_path / "cache")
    assert after.ok, after.to_text()
    assert not len(after.tables["exact"])
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert meta["name"] == "dirty, cleaned" and meta["kind"] == "synthetic" and "arguments" not in meta
    why = {row["path"]: row["why"] for row in meta["cleaned"]["removed"]}
    assert set(why) == {
        "train/ILD/2.png",
        "train/ILD/4.png",
        "val/폐렴 1/wrong copy.png",
        "train/ILD/6.png",
        "test/폐렴 1/wrong twin.png",
        "test/ILD/bad.png",
    } or set(why) == {
        "val/ILD/copy.png",
        "train/ILD/4.png",
        "val/폐렴 1/wrong copy.png",
        "train/ILD/6.png",
        "test/폐렴 1/wrong twin.png",
        "test/ILD/bad.png",
    }
    assert "unreadable" in why["test/ILD/bad.png"] and "another class" in why["train/ILD/4.png"]
    assert "drawn anew" in meta["cleaned"]["splits"]

    # Every kept file is there once with the same bytes and class, and the groups hold together.
    came_from = meta["cleaned"]["came_from"]
    new, old = hashes(out), {name: digest for name, digest in before.items() if name.endswith(".png")}
    assert {name for name in new if name.endswith(".png")} == set(came_from)
    assert set(came_from.values()) | set(why) == set(old)
    assert all(new[name] == old[source] for name, source in came_from.items())
    assert all(name.split("/")[1] == source.split("/")[1] for name, source in came_from.items())
    place = {source: name.split("/")[0] for name, source in came_from.items()}
    assert place["train/ILD/0.png"] == place["test/ILD/0.png"], "twins stay together"
    assert place["train/ILD/own 0.png"] == place["val/ILD/own 0.png"], "a patient stays together"
    shares = pd.Series(place.values()).value_counts(normalize=True)
    was = report.tables["slices"]["split"].value_counts(normalize=True)
    assert (shares - was).abs().max() < 0.12

    table = pd.read_csv(out / "findings.csv", dtype=str, keep_default_na=False)
    assert set(table["path"]) <= set(came_from)
    assert (table["split"] == table["path"].str.split("/").str[0]).all()
    x0 = pd.read_csv(root / "findings.csv", dtype=str).set_index("path")["x0"]
    assert all(row.x0 == x0[came_from[row.path]] for row in table.itertuples())


def test_clean_copy_keeps_splits_that_are_sound(tmp_path):
    root = write(tmp_path / "set", {"train/ILD/a.png": chest(0), "train/ILD/b.png": chest(0)})
    out = clean_copy(root, tmp_path / "out", check(root))
    assert set(files_below(root)) - set(files_below(out)) == {"train/ILD/b.png"}
    assert json.loads((out / "dataset.json").read_text(encoding="utf-8"))["cleaned"]["splits"] == "kept"


def test_clean_copy_makes_its_own_report_and_fills_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        report_module, "load_folder", lambda *a, **k: load_folder(a[0], strict=False, cache=tmp_path / "c")
    )
    root = write(tmp_path / "set", {"train/ILD/a.png": chest(0), "train/ILD/b.png": chest(0)})
    (tmp_path / "out").mkdir()
    assert "train/ILD/a.png" in files_below(clean_copy(root, tmp_path / "out"))


def test_clean_copy_refuses(dirty, tmp_path):
    root, report = dirty
    before = hashes(root)
    for inside in (root, root / "clean", root / "train" / ".." / "x"):
        with user_error("inside the data set"):
            clean_copy(root, inside, report)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("full", "file"):
        with user_error("not empty", taken):
            clean_copy(root, tmp_path / taken, report)
    assert files_below(tmp_path) == ["file", "full/file"] and hashes(root) == before


def test_clean_copy_is_all_or_nothing(dirty, tmp_path, monkeypatch):
    root, report = dirty
    real, calls = shutil.copyfile, []

    def fills_up(source, target):
        calls.append(target)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(clean_module.shutil, "copyfile", fills_up)
    with user_error("No space left"):
        clean_copy(root, tmp_path / "out", report)
    assert not list(tmp_path.iterdir())


def test_clean_copy_needs_groups_for_every_split(tmp_path):
    root = write(tmp_path / "set", {})
    names = [path for path in files_below(root) if "ILD" in path]
    pd.DataFrame({"path": names, "patient": "one"}).to_csv(root / "patients.csv", index=False)
    with user_error("1 independent group", "ILD"):
        clean_copy(root, tmp_path / "out", check(root))
    assert not (tmp_path / "out").exists()


def test_clean_copy_says_when_a_class_is_gone(tmp_path):
    root = write(tmp_path / "set", {})
    for i in range(2):  # both slices of the class are unreadable
        (root / f"val/ILD/own {i}.png").write_bytes(b"")
    with pytest.raises(CTError, match="ILD in val"):
        clean_copy(root, tmp_path / "out", check(root))


# ---------------------------------------------------------------- real slices


@needs_real_ct
def test_leaks_of_a_real_set(tmp_path):
    folder = load_folder(REAL_CT, strict=False, cache=tmp_path)
    some = folder.slices["class"].isin(["normal", "squamous.cell.carcinoma"]) & (folder.slices["split"] != "val")
    decoded = decode_pass(dataclasses.replace(folder, slices=folder.slices[some].reset_index(drop=True)))
    exact = exact_duplicates(decoded)
    spread = exact.groupby("group")["split"].transform("nunique")
    assert ((exact["split"] == "test") & (spread == 2)).sum() == 46
    near = near_duplicates(decoded)
    across = near[near["split_a"] != near["split_b"]]
    test = across["path_a"].where(across["split_a"] == "test", across["path_b"])
    assert test.nunique() >= 50
