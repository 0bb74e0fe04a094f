"""Every fault that the audit knows is planted in a small folder and must be found, and nothing else."""

import dataclasses
import errno
import hashlib
import itertools
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from helpers import REAL_CT, files_below, jpeg, needs_real_ct, noisy, user_error
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from ctutils.audit import (
    audit,
    clean,
    clean_copy,
    decode_pass,
    doubted_labels,
    exact_duplicates,
    group_slices,
    near_duplicates,
    shortcut_probes,
)
from ctutils.audit import probes as probes_module
from ctutils.audit import report as report_module
from ctutils.base import write_json
from ctutils.data import load_folder, read_grey

CLASSES = ("ILD", "폐렴 1")


def chest(seed: int, vessels: int | None = None, side: int = 128) -> Image.Image:
    """Draw a body with two lungs and vessels; `seed` chooses the body, `vessels` (default: seed) the rest."""
    rng, detail = np.random.default_rng([seed, 1]), np.random.default_rng([seed if vessels is None else vessels, 2])
    y, x = np.mgrid[:side, :side] / side - 0.5
    grey = np.where((x / rng.uniform(0.36, 0.44)) ** 2 + (y / rng.uniform(0.26, 0.33)) ** 2 < 1, 215.0, 55.0)
    for sign in (-1, 1):
        wide = (x - sign * rng.uniform(0.16, 0.2)) / rng.uniform(0.1, 0.14)
        grey[wide**2 + ((y - rng.uniform(-0.03, 0.03)) / rng.uniform(0.17, 0.22)) ** 2 < 1] = 80
    spots = ndimage.gaussian_filter(detail.normal(size=grey.shape), 2)
    grey += np.where(grey == 80, 70, 15) * spots / spots.std()
    return Image.fromarray(np.clip(grey + detail.normal(0, 3, grey.shape), 0, 255).astype(np.uint8))


def write(root: Path, pictures: dict[str, Image.Image]) -> Path:
    """Save pictures under their paths, and two chests of their own in each class of train and val."""
    places = itertools.product(("train", "val"), CLASSES, range(2))
    own = {f"{split}/{name}/own {i}.png": chest(1001 + n) for n, (split, name, i) in enumerate(places)}
    for path, picture in (own | pictures).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / path)
    return root


def look(root: Path):
    return decode_pass(load_folder(root, strict=False, cache=root.parent / "cache"))


def patients(root: Path, table: dict[str, str]) -> None:
    pd.DataFrame(table.items(), columns=["path", "patient"]).to_csv(root / "patients.csv", index=False)


def only(decoded, *probes: str):
    """What was looked at, for some probes: all ten take seconds."""
    return dataclasses.replace(decoded, features={probe: decoded.features[probe] for probe in probes})


def check(root: Path, **options):
    return audit(root, cache=root.parent / "cache", **{"probes": False, **options})


def messages(report, severity: str) -> dict[str, str]:
    rows = report.findings[report.findings["severity"] == severity]
    said = rows["message"] + " " + rows["examples"].str.join(" ")
    return said.groupby(rows["check"]).agg(" ".join).to_dict()


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files_below(folder)}


def test_exact_copies_are_found_by_their_pixels_not_their_bytes(tmp_path):
    picture = chest(0)
    palette = picture.convert("P")
    assert (np.asarray(palette.convert("L")) == np.asarray(picture)).all()
    copies = {
        "train/ILD/a.png": picture,
        "train/ILD/b.bmp": picture.convert("RGB"),
        "val/ILD/c.png": picture.convert("RGBA"),
        "val/폐렴 1/d.PNG": palette,
    }
    almost = picture.point(lambda v: v + (v == 80))
    report = check(write(tmp_path / "set", {**copies, "val/ILD/almost.png": almost}))
    assert list(report.tables["exact"]["path"]) == list(copies) and report.tables["exact"]["group"].nunique() == 1
    errors, warnings = messages(report, "error"), messages(report, "warning")
    assert "2 of 7 val slices have an exact copy in train" in errors["exact copies across splits"]
    assert "val/ILD/c.png" in errors["exact copies across splits"]
    assert "1 picture(s) under two classes" in errors["exact copies across classes"]
    assert "2 slice(s) beside an exact copy" in warnings["exact copies within a split"]
    leaks = report.tables["leaks"].iloc[0]
    assert (leaks["split"], leaks["other"], leaks["exact"], leaks["either"]) == ("val", "train", 2, 3)

    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["ok"] is False and content["rows"]["exact"] == 4
    assert content["tables"]["counts"][0] == {"class": "ILD", "train": 4, "val": 4}
    assert (content["findings"][0]["severity"], content["findings"][0]["count"]) == ("error", 2)
    assert all(words in report.to_text() for words in ("ERROR", "2 of 7 val slices", "--fix"))


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
    "inverted": ImageOps.invert,
    "equalised": ImageOps.equalize,
    "turned by 20 degrees": lambda p: p.rotate(20, Image.Resampling.BILINEAR, fillcolor=55),
    "cropped to 80 %": lambda p: p.crop((13, 13, 115, 115)),
    "noisy": noisy,
    "half": lambda p: p.crop((0, 0, 64, 128)),
}


def test_near_twins_are_found_and_no_other_pair_in_little_memory(tmp_path):
    pictures = {}
    for seed, (name, change) in enumerate(TWINS.items()):
        pictures[f"train/ILD/{name}.png"] = chest(seed)
        pictures[f"val/ILD/{name}.png"] = change(chest(seed))
    decoded = look(write(tmp_path / "set", pictures))
    found = near_duplicates(decoded)
    pairs = {frozenset(pair) for pair in zip(found["path_a"], found["path_b"], strict=True)}
    assert pairs == {frozenset([f"train/ILD/{name}.png", f"val/ILD/{name}.png"]) for name in TWINS}
    assert (found["detail"] > 0.8).all()
    assert not len(exact_duplicates(decoded))
    # Other names, another order: the copy of `clean_copy` must give the same pairs as its source.
    order = np.arange(len(decoded.table))[::-1]
    renamed = decoded.rows(order)
    renamed.table["path"] = decoded.table["path"]
    again = near_duplicates(renamed)[["correlation", "detail"]].to_numpy()
    assert np.allclose(np.sort(again, axis=0), np.sort(found[["correlation", "detail"]].to_numpy(), axis=0), atol=1e-6)
    held = decoded.small.nbytes + decoded.frames.nbytes + sum(values.nbytes for values in decoded.features.values())
    assert held / len(decoded.table) < 20_000, "bytes a slice"


@pytest.mark.parametrize(
    "other, check_name, severities",
    [
        ("train/ILD/b.png", "near twins within a split", ("warning", "info")),
        # One patient may have slices with and without the disease, which look alike.
        ("train/폐렴 1/b.png", "near twins across classes", ("error", "warning")),
    ],
)
def test_neighbouring_slices_are_judged_by_patient_and_class(tmp_path, other, check_name, severities):
    # The same body with vessels that have moved on a little: alike, yet not the same picture.
    a, neighbour = chest(2, vessels=1), Image.blend(chest(2, vessels=1), chest(2, vessels=2), 0.4)
    root = write(tmp_path / "set", {"train/ILD/a.png": a, other: neighbour})
    assert other in messages(check(root), severities[0])[check_name]
    patients(root, {"train/ILD/a.png": "p1", other: "p1"})
    report = check(root)
    assert report.ok and check_name in messages(report, severities[1]) and report.tables["near"]["same_patient"].all()
    patients(root, {"train/ILD/a.png": "p1", other: "p2"})
    assert not len(near_duplicates(look(root))), "two known patients need the very same picture"


def test_unreadable_and_odd_files_are_told(tmp_path):
    colour = Image.merge("RGB", [chest(0), chest(1), chest(2)])
    pictures = {"a.png": chest(4), "c.png": colour, "d.png": chest(3, side=96).convert("RGB")}
    for i in range(2):
        pictures[f"blank {i}.png"] = Image.new("L", (64 + i, 64), 3)
        pictures[f"blank {i}.png"].putpixel((30, 30), 20)
    root = write(tmp_path / "set", {f"train/ILD/{name}": picture for name, picture in pictures.items()})
    (root / "train/ILD/notes.txt").write_text("hello")
    (root / "train/ILD/empty.png").write_bytes(b"")
    (root / "train/ILD/text.png").write_text("no picture")
    whole = (root / "train/ILD/a.png").read_bytes()
    (root / "val/ILD/half.png").write_bytes(whole[: len(whole) // 2])  # the header is whole
    (root / "patients.csv").write_text("slice,patient\na,b\n")
    report = check(root, probes=True)
    errors, warnings, info = (messages(report, severity) for severity in ("error", "warning", "info"))
    assert set(errors) == {"unreadable files"}
    assert all(name in errors["unreadable files"] for name in ("empty.png", "text.png", "half.png"))
    assert "train/ILD/c.png" in warnings["colour pictures"] and "d.png" not in warnings["colour pictures"]
    assert "2 slice(s) of one grey level" in warnings["blank pictures"] and not len(report.tables["near"])
    assert "patients.csv" in warnings["patients"] and "train/ILD/notes.txt" in info["other files"]
    assert report.tables["probes"].empty and "too few" in info["shortcut probes"]
    assert "train/ILD/d.png" in info["picture size"] and "train/ILD/d.png" in info["picture mode"]


def test_every_unreadable_file_is_named_under_its_fault(tmp_path):
    root = write(tmp_path / "set", {})
    bad = {f"train/ILD/text {i}.png": b"no picture" for i in range(12)}
    bad |= {f"val/ILD/half {i}.png": (root / "val/ILD/own 0.png").read_bytes()[: 900 + 7 * i] for i in range(8)}
    for path, content in bad.items():
        (root / path).write_bytes(content)
    report = check(root)
    assert report.findings.loc[report.findings["severity"] == "error", "count"].tolist() == [12, 8], "one a fault"
    assert all(path in report.to_text() for path in bad)
    named = [name for row in report.to_json(limit=5)["findings"][:2] for name in row["examples"]]
    assert sorted(name.split(" (")[0] for name in named) == sorted(bad)


def test_a_broken_layout_is_one_error(tmp_path):
    report = check(tmp_path / "nowhere")
    assert not report.ok and len(report.findings) == 1 and "nowhere" in report.findings["message"][0]
    assert json.loads(json.dumps(report.to_json()))["ok"] is False and "layout" in report.to_text()
    with user_error("cannot be read", "nowhere"):
        clean_copy(tmp_path / "nowhere", tmp_path / "out", report)


def test_patients_in_two_splits_and_classes(tmp_path):
    root = write(tmp_path / "set", {})
    train, val = "train/ILD/own {}.png", "val/ILD/own {}.png"
    rows = {train.format(0): "김", val.format(0): "김", train.format(1): "p2", "train/폐렴 1/own 1.png": "p2"}
    patients(root, {**rows, val.format(1): "p3", "gone.png": "p4"})
    report = check(root)
    errors, warnings = messages(report, "error"), messages(report, "warning")
    assert errors["patients in two splits"].startswith("1 patient(s) in two splits or more (2 slices)")
    assert warnings["patients in two classes"].startswith("1 patient(s) in two classes")
    assert "1 row(s) of the patient table" in warnings["patients"] and "gone.png" in warnings["patients"]
    assert "3 slice(s) without a patient" in messages(report, "info")["patients"]
    out = clean_copy(root, tmp_path / "out", report)
    assert audit(out, probes=False, cache=tmp_path / "cache").ok
    assert len(pd.read_csv(out / "patients.csv")) == 5


def test_groups_join_patients_copies_and_twins_and_every_copy_is_a_leak(tmp_path):
    together = ["train/ILD/a.png", "val/ILD/a.png", "val/ILD/b.png", "val/ILD/c.png"]
    root = write(tmp_path / "set", dict(zip(together, [chest(0), chest(0), jpeg(chest(0)), chest(1)], strict=True)))
    patients(root, dict.fromkeys(together[2:], "p"))
    decoded = look(root)
    near = near_duplicates(decoded)
    pairs = {frozenset(pair) for pair in zip(near["path_a"], near["path_b"], strict=True)}
    assert pairs == {frozenset([path, together[2]]) for path in together[:2]}
    groups = pd.Series(group_slices(decoded, near), index=decoded.table["path"])
    assert groups[together].nunique() == 1 and groups.nunique() == len(groups) - 3


def with_text(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).text((1, 1), "R", fill=190)
    return image


def with_dot(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).rectangle((31, 30, 33, 32), fill=20)
    return image


def text_chunk() -> PngInfo:
    info = PngInfo()
    info.add_text("Station 3", "x")
    return info


MARKS = {  # what one class of three bears: (the change, how it is saved, the probe that must see it)
    "text in a corner": (with_text, {}, "border and corners"),
    "a frame": (lambda image: ImageOps.expand(image.crop((1, 1, 63, 63)), 1, fill=20), {}, "border and corners"),
    "brighter": (lambda image: image.point(lambda grey: grey + 12), {}, "grey statistics"),
    "noisier": (noisy, {}, "sharpness and noise"),
    "blurred": (lambda image: image.filter(ImageFilter.GaussianBlur(0.7)), {}, "sharpness and noise"),
    "larger": (lambda image: image.resize((66, 66)), {}, "picture size"),
    "less compressed": (lambda image: image, {"compress_level": 1}, "file size and metadata"),
    "with a resolution": (lambda image: image, {"dpi": (96, 96)}, "file size and metadata"),
    "with a text chunk": (lambda image: image, {"pnginfo": text_chunk()}, "file size and metadata"),
    "with a dot inside": (with_dot, {}, "marks inside"),
    "shifted": (
        lambda image: ImageOps.expand(image.crop((9, 6, 64, 64)), (0, 0, 9, 6), 55),
        {},
        "place in the picture",
    ),
    "in colour mode": (lambda image: image.convert("RGB"), {}, "file size and metadata"),
}


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory):
    """72 chests of three classes without any mark, and what was looked at."""
    root = tmp_path_factory.mktemp("unmarked") / "set"
    for i, name in enumerate("abc" * 24):
        path = root / ("val" if i < 12 else "train") / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        chest(i, side=64).save(path)
    return root, look(root)


def test_no_probe_is_flagged_without_a_shortcut(unmarked, monkeypatch):
    monkeypatch.setattr(probes_module, "FOLDS", 3)
    probes = shortcut_probes(unmarked[1])
    assert len(probes) == 10 and not probes["flagged"].any(), probes
    assert ((probes["low"] <= probes["macro_f1"]) & (probes["macro_f1"] <= probes["high"])).all()
    assert (probes["threshold"] > probes["chance"]).all() and (probes["slices"] == 72).all()


def marked(root: Path, out: Path, mark: str) -> Path:
    change, how, _ = MARKS[mark]
    shutil.copytree(root, out)
    for path in out.glob("*/c/*.png"):
        change(read_grey(path)).save(path, **how)
    return out


@pytest.mark.parametrize("mark", MARKS)
def test_a_planted_shortcut_is_flagged(unmarked, tmp_path, mark):
    decoded, probe = look(marked(unmarked[0], tmp_path / "set", mark)), MARKS[mark][2]
    assert shortcut_probes(only(decoded, probe))["flagged"].all()


def test_a_pattern_of_file_names_is_flagged_and_the_class_in_them_is_not(unmarked, tmp_path):
    def probe(out: Path) -> bool:
        return shortcut_probes(only(look(out), "file name"))["flagged"].all()

    out = shutil.copytree(unmarked[0], tmp_path / "set")
    for path in out.glob("*/c/*.png"):
        path.rename(path.with_name(f"CT_C_{path.name}"))
    for path in [*out.glob("*/[ab]/*.png")]:
        path.rename(path.with_name(f"CT_{path.parent.name}_{path.name}"))
    assert not probe(out)
    for path in out.glob("*/c/*.png"):
        path.rename(path.with_name(path.name.replace("CT_C_", "scan ")))
    assert probe(out)


def test_swapped_labels_are_doubted_most_doubtful_first(unmarked, tmp_path):
    out = shutil.copytree(unmarked[0], tmp_path / "set")
    for path in out.glob("*/c/*.png"):
        read_grey(path).point(lambda grey: grey * 0.6).save(path)
    wrong = sorted(out.glob("train/c/*.png"))[0]
    wrong.rename(out / "train/a" / wrong.name)
    doubts = doubted_labels(look(out))
    assert doubts["path"][0] == f"train/a/{wrong.name}" and doubts["looks_like"][0] == "c" and len(doubts) <= 3
    assert doubts["doubt"].is_monotonic_decreasing and not len(doubted_labels(unmarked[1]))


def test_patients_in_file_names_are_told(tmp_path):
    names = {
        "train/ILD/pat_0012_a.png": chest(0),
        "val/ILD/pat_0012_b.png": chest(1),
        "train/ILD/x-99417.png": chest(2),
    }
    root = write(tmp_path / "set", names)
    said = messages(check(root), "warning")["patients in file names"]
    assert "2 slice(s) of IDs" in said and "pat_0012_a.png" in said and "99417" not in said
    patients(root, {"train/ILD/x-99417.png": "99417"})
    assert (
        "1 file name(s) hold the patient's ID train/ILD/x-99417.png"
        in messages(check(root), "warning")["patients in file names"]
    )


@pytest.mark.parametrize("margins", [(0.15, 2), (2, 0.2)], ids=["mean over the classes", "one class"])
def test_each_rule_flags_alone_and_is_told(unmarked, tmp_path, monkeypatch, margins):
    two = ("picture size", "grey statistics")
    monkeypatch.setattr(
        report_module, "shortcut_probes", lambda seen, groups: shortcut_probes(only(seen, *two), groups)
    )
    monkeypatch.setattr(probes_module, "FLAG_MARGIN", dict.fromkeys(probes_module.FLAG_MARGIN, margins))
    doubts = pd.DataFrame([("val/a/0.png", "a", "b", 0.5)], columns=["path", "class", "looks_like", "doubt"])
    monkeypatch.setattr(report_module, "doubted_labels", lambda seen, groups: doubts)
    report = check(marked(unmarked[0], tmp_path / "set", "larger"), probes=True)
    assert "labels in doubt" in messages(report, "info") and "val/a/0.png (b? 0.50)" in report.to_text()
    assert report.ok, "a shortcut warns; what to do about it is the reader's choice"
    probes = report.tables["probes"].set_index("probe")
    assert probes.loc["picture size", "best_class"] == "c" and not probes.loc["grey statistics", "flagged"]
    (verdict,) = (line for line in report.verdicts() if line.startswith("warning: probe, picture size: macro F1"))
    assert "without the lungs" in verdict


def test_probes_keep_groups_together(unmarked):
    decoded = unmarked[1]
    # Eight copies of each picture: a label can be learned by heart, if a copy stands in another fold.
    source = np.arange(len(decoded.table)) // 8 * 8
    features = {"thumbnail, 32 x 32": decoded.features["thumbnail, 32 x 32"][source]}
    labels = np.random.default_rng(1).integers(0, 2, len(source))[source]
    table = decoded.table.assign(label=labels, **{"class": np.where(labels, "b", "a")})
    copies = dataclasses.replace(decoded, features=features, table=table)
    assert shortcut_probes(copies)["flagged"].all()
    assert not shortcut_probes(copies, source)["flagged"].any()


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """40 chests with planted faults: the folder and its report."""
    pictures = {}
    for i in range(40):
        split = "train" if i < 28 else "val" if i < 34 else "test"
        pictures[f"{split}/{CLASSES[i % 2]}/{i}.png"] = chest(i, side=96)
    pictures["test/ILD/0.png"] = jpeg(chest(0, side=96))  # a near twin with its source's name in another split
    pictures["val/ILD/copy.png"] = chest(2, side=96)
    pictures["val/폐렴 1/wrong copy.png"] = chest(4, side=96)
    pictures["test/폐렴 1/wrong twin.png"] = jpeg(chest(6, side=96))
    root = write(tmp_path_factory.mktemp("dirty") / "원본 set", pictures)
    (root / "test/ILD/bad.png").write_bytes(b"")
    names = ["train/ILD/own 0.png", "val/ILD/own 0.png", *pictures]
    table = pd.DataFrame({"path": names, "split": [name.split("/")[0] for name in names], "x0": range(len(names))})
    table.assign(patient=["same" if "own" in name else "" for name in names]).to_csv(root / "findings.csv", index=False)
    write_json(root / "dataset.json", {"name": "dirty", "kind": "synthetic", "arguments": {"train": 1}})
    return root, check(root)


def test_clean_copy_mends_all_and_leaves_the_source(dirty, tmp_path):
    root, report = dirty
    before = hashes(root)
    out = clean_copy(root, tmp_path / "new folder" / "깨끗", report)
    assert out == tmp_path / "new folder" / "깨끗" and hashes(root) == before
    assert [path.name for path in out.parent.iterdir()] == ["깨끗"], "no temporary folder is left"

    after = audit(out, probes=False, cache=tmp_path / "cache")
    assert after.ok and not len(after.tables["exact"]), after.to_text()
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert meta["name"] == "dirty, cleaned" and meta["kind"] == "synthetic" and "arguments" not in meta
    why = {row["path"]: row["why"] for row in meta["cleaned"]["removed"]}
    contradicting = {"train/ILD/4.png", "val/폐렴 1/wrong copy.png", "train/ILD/6.png", "test/폐렴 1/wrong twin.png"}
    assert set(why) == contradicting | {"test/ILD/bad.png", "val/ILD/copy.png"}
    assert "unreadable" in why["test/ILD/bad.png"] and "another class" in why["train/ILD/4.png"]
    assert "drawn anew" in meta["cleaned"]["splits"]

    # Every kept file is there once with the same bytes and class, and the groups hold together.
    came_from = meta["cleaned"]["came_from"]
    new, old = hashes(out), {name: digest for name, digest in before.items() if name.endswith(".png")}
    assert {name for name in new if name.endswith(".png")} == set(came_from)
    assert set(came_from.values()) | set(why) == set(old)
    for name, source in came_from.items():
        assert new[name] == old[source] and name.split("/")[1] == source.split("/")[1]
    place = {source: name.split("/")[0] for name, source in came_from.items()}
    assert place["train/ILD/0.png"] == place["test/ILD/0.png"], "twins stay together"
    assert place["train/ILD/own 0.png"] == place["val/ILD/own 0.png"], "a patient stays together"
    shares = pd.Series(place.values()).value_counts(normalize=True)
    assert (shares - report.tables["slices"]["split"].value_counts(normalize=True)).abs().max() < 0.12

    table = pd.read_csv(out / "findings.csv", dtype=str, keep_default_na=False)
    x0 = pd.read_csv(root / "findings.csv", dtype=str).set_index("path")["x0"]
    assert set(table["path"]) <= set(came_from) and (table["split"] == table["path"].str.split("/").str[0]).all()
    assert all(row.x0 == x0[came_from[row.path]] for row in table.itertuples())


def test_clean_copy_keeps_sound_splits_makes_its_own_report_and_fills_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "cache_dir", lambda: tmp_path / "cache")
    root = write(tmp_path / "set", {"train/ILD/a.png": chest(0), "train/ILD/b.png": chest(0)})
    (tmp_path / "out").mkdir()
    out = clean_copy(root, tmp_path / "out")
    assert set(files_below(root)) - set(files_below(out)) == {"train/ILD/b.png"}
    assert json.loads((out / "dataset.json").read_text(encoding="utf-8"))["cleaned"]["splits"] == "kept"


def test_what_comes_up_when_slices_are_left_out_is_mended_too(dirty, tmp_path, monkeypatch):
    root, report = dirty
    late = pd.DataFrame([("train/ILD/8.png", "val/ILD/28.png", "ILD", "ILD", False)])
    late.columns = ["path_a", "path_b", "class_a", "class_b", "same_patient"]
    monkeypatch.setattr(clean, "near_duplicates", lambda part: late)
    meta = json.loads((clean_copy(root, tmp_path / "out", report) / "dataset.json").read_text(encoding="utf-8"))
    place = {source: name.split("/")[0] for name, source in meta["cleaned"]["came_from"].items()}
    assert place["train/ILD/8.png"] == place["val/ILD/28.png"]
    late["class_b"] = CLASSES[1]
    meta = json.loads((clean_copy(root, tmp_path / "out 2", report) / "dataset.json").read_text(encoding="utf-8"))
    assert {"train/ILD/8.png", "val/ILD/28.png"} <= {row["path"] for row in meta["cleaned"]["removed"]}


def test_clean_copy_refuses_and_is_all_or_nothing(dirty, tmp_path, monkeypatch):
    root, report = dirty
    before = hashes(root)
    (tmp_path / "full").mkdir()
    for taken in ("full/file", "file"):
        (tmp_path / taken).write_text("mine")
    for out in (root, root / "clean", root / "train" / ".." / "x"):
        with user_error("inside the data set"):
            clean_copy(root, out, report)
    for out in ("full", "file"):
        with user_error("not empty", out):
            clean_copy(root, tmp_path / out, report)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(clean, "write_json", Mock(side_effect=full))  # the last of all files
    with user_error("No space left"):
        clean_copy(root, tmp_path / "out", report)
    assert files_below(tmp_path) == ["file", "full/file"] and hashes(root) == before


def test_clean_copy_needs_groups_and_slices_for_every_split(tmp_path):
    root = write(tmp_path / "set", {})
    patients(root, dict.fromkeys((path for path in files_below(root) if "ILD" in path), "one"))
    with user_error("1 independent group", "ILD"):
        clean_copy(root, tmp_path / "out", check(root))
    (root / "patients.csv").unlink()
    for i in range(2):  # both slices of the class are unreadable
        (root / f"val/ILD/own {i}.png").write_bytes(b"")
    with user_error("ILD in val"):
        clean_copy(root, tmp_path / "out", check(root))
    assert not (tmp_path / "out").exists()


@needs_real_ct
def test_leaks_of_a_real_set(tmp_path):
    leaks = audit(REAL_CT, probes=False, cache=tmp_path).tables["leaks"].set_index(["split", "other"])
    assert leaks.loc[("test", "train"), "exact"] == 46 and leaks.loc[("test", "train"), "near"] >= 100
