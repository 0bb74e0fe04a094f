"""The synthetic slices: same arguments same bytes, labels that only the finding tells, errors that help."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctutils import phantom
from ctutils.base import CTError
from ctutils.phantom import CLASSES, class_counts, dataset, make_slice, patient_of, write_dataset

SIZE = 96


def write(out: Path, **changes) -> Path:
    """Write a tiny set."""
    arguments = {"train": 8, "val": 5, "seed": 3, "workers": 1, "size": 64, "show_progress": False, **changes}
    return write_dataset(out, **arguments)


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("한글 folder") / "tiny set")


def test_counts_are_the_original_ones():
    assert list(class_counts(8001).values()) == [1000, 1000, 4001, 1000, 1000]
    assert list(class_counts(1000).values()) == [125, 125, 500, 125, 125]
    assert list(class_counts(7, balanced=True).values()) == [2, 1, 2, 1, 1]
    for total in range(40):
        assert sum(class_counts(total).values()) == sum(class_counts(total, balanced=True).values()) == total


def test_layout_names_and_grey_levels(tiny):
    names = sorted(p.name for p in (tiny / "train" / "Normal").iterdir())
    assert names[0] == "ChestCT_Normal_00000001.png" and len(names) == class_counts(8)["Normal"]
    assert sorted(p.name for p in (tiny / "val").iterdir()) == sorted(CLASSES)
    image = Image.open(tiny / "train" / "Normal" / names[0])
    assert image.mode == "RGB" and image.size == (64, 64) and not image.info
    pixels = np.asarray(image)
    assert (pixels == pixels[:, :, :1]).all()
    assert pixels.min() >= 55 and (pixels == 55).any() and pixels.max() == 255


def test_dataset_json_says_what_is_there_and_how_it_was_made(tiny, tmp_path):
    meta = json.loads((tiny / "dataset.json").read_text(encoding="utf-8"))
    assert meta["kind"] == "synthetic" and meta["seed"] == 3 and meta["shortcut"] is None
    assert meta["window"] == {"level": -600, "width": 1500, "unit": "HU"}
    for split, counts in meta["counts"].items():
        for name, n in counts.items():
            assert len(list((tiny / split / name).glob("*.png"))) == n
    assert {p.name for p in tiny.iterdir()} == {"train", "val", "findings.csv", "dataset.json"}
    trap = json.loads((write(tmp_path / "trap", shortcut="sharpness", train=2, val=0) / "dataset.json").read_text())
    assert trap["shortcut"] == "sharpness" and "sharpness" in trap["name"]


def test_findings_rows_match_the_files_and_no_patient_is_in_two_splits(tiny):
    rows = list(csv.DictReader((tiny / "findings.csv").open(encoding="utf-8")))
    assert {r["path"] for r in rows} == {p.relative_to(tiny).as_posix() for p in tiny.rglob("*.png")}
    splits = {}
    for row in rows:
        splits.setdefault(row["patient"], set()).add(row["split"])
        if row["class"] == "Normal":
            assert row["finding"] == row["x0"] == row["side"] == "" and float(row["severity"]) == 0
    assert all(len(s) == 1 for s in splits.values())
    assert len(splits) < len(rows)
    assert [patient_of(k) for k in range(12)] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4]


def test_workers_do_not_change_a_byte(tiny, tmp_path):
    assert files(write(tmp_path / "two", workers=2)) == files(tiny)


def test_other_seed_and_split_give_other_patients():
    a = make_slice(0, "train", "Normal", 0, size=SIZE)[0]
    assert (a == make_slice(0, "train", "Normal", 0, size=SIZE)[0]).all()
    for other in (
        (1, "train", "Normal", 0),
        (0, "val", "Normal", 0),
        (0, "train", "Normal", 1),
        (0, "train", "ILD", 0),
    ):
        assert (a != make_slice(*other, size=SIZE)[0]).mean() > 0.2


@pytest.mark.parametrize("finding", ["ILD", "Lung_Cancer", "pneumonia", "pneumothorax"])
def test_counterfactual_differs_only_near_the_finding(finding):
    """The same slice with and without the finding: same body, same noise, a change inside the box."""
    for index in range(2):
        image, record = make_slice(5, "train", "Normal", index, finding=finding, size=128)
        erased, nothing = make_slice(5, "train", "Normal", index, finding="none", size=128)
        plain, _ = make_slice(5, "train", "Normal", index, size=128)
        assert (erased == plain).all() and nothing.box is None and nothing.severity == 0
        assert record.level == nothing.level and record.patient == nothing.patient
        x0, y0, x1, y1 = record.box
        assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128
        change = np.abs(image.astype(int) - erased) > 12
        assert change[y0:y1, x0:x1].sum() >= 3
        if finding in ("Lung_Cancer", "pneumonia"):  # ILD and pneumothorax change the lung around them too
            inside = change[max(0, y0 - 9) : y1 + 9, max(0, x0 - 9) : x1 + 9].sum()
            assert inside > 0.75 * change.sum()
        assert record.side in ("right", "left", "both")


def test_size_changes_only_the_grid():
    """A small slice is the same patient: it agrees with the large one shrunk."""
    large, a = make_slice(2, "val", "Lung_Cancer", 5, size=384)
    small, b = make_slice(2, "val", "Lung_Cancer", 5, size=96)
    shrunk = np.asarray(Image.fromarray(large).resize((96, 96), Image.Resampling.BOX))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.97
    assert a.finding == b.finding and a.side == b.side
    assert np.allclose(np.array(a.box) / 384, np.array(b.box) / 96, atol=0.06)


def test_the_three_stages_hold_hounsfield_units():
    grid = phantom.Grid(size=128, pixel=2.9, angle=0.0, shift=(0.0, 0.0), thickness=2.0)
    scene = phantom.draw_anatomy(grid, phantom.Patient.draw(np.random.default_rng(0)), 0.5, np.random.default_rng(1))
    assert scene.hu.dtype == np.float32 and scene.hu.min() >= -1100 and 300 < scene.hu.max() < 1500
    assert -930 < np.median(scene.hu[scene.lung > 0.99]) < -760
    before = scene.hu.copy()
    drawn = phantom.add_finding(scene, "Lung_Cancer", 0.8, np.random.default_rng(2))
    assert -60 < np.median(scene.hu[drawn["mask"]]) < 130  # a solid mass
    assert (scene.hu[~drawn["mask"]] == before[~drawn["mask"]]).mean() > 0.9
    image = phantom.acquire(
        scene.hu, grid, scene.body, phantom.Scanner.draw(np.random.default_rng(3)), np.random.default_rng(4)
    )
    assert image.dtype == np.uint8 and image[0, 0] == 55


def test_pneumothorax_is_air_without_vessels():
    for index in range(4):
        image, record = make_slice(1, "train", "pneumothorax", index, size=128)
        x0, y0, x1, y1 = record.box
        assert (image[y0:y1, x0:x1] < 75).sum() > 8


def test_sharpness_trap_changes_the_kernel_by_class_only_when_asked():
    def gain(label):
        """Edges with the trap against the same body without it, mean over slices."""
        pair = [[make_slice(8, "train", label, k, finding="none", size=256, shortcut=s)[0] for k in range(2)]
                for s in ("sharpness", None)]  # fmt: skip
        trap, plain = (np.abs(np.diff(np.array(p, dtype=float), axis=2)).mean() for p in pair)
        return trap / plain

    assert gain("Normal") > 1.05 and gain("ILD") < 0.98
    soft, sharp = (phantom.Scanner.draw(np.random.default_rng(1), k) for k in (0.0, 1.0))
    assert soft.blur > sharp.blur and soft.grain > sharp.grain and soft.motion == sharp.motion


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_set_is_finished_and_a_complete_one_left_alone(tiny, tmp_path, monkeypatch, workers):
    out, writes = tmp_path / "set", []
    monkeypatch.setattr(dataset, "make_slice", lambda *a, **k: writes.append(1) or make_slice(*a, **k))

    def interrupted(made, **options):
        for k, row in enumerate(made):
            if k == 4:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(dataset, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, workers=workers, show_progress=True)
    assert not (out / "dataset.json").exists()
    with (out / "findings.csv").open("a", encoding="utf-8") as file:
        file.write("train/ILD/Chest")  # killed in the middle of a line
    first, second, *_ = (row["path"] for row in csv.DictReader((out / "findings.csv").open(encoding="utf-8")))
    (out / first).write_bytes((out / first).read_bytes()[:900])  # a disk that lost half a picture
    (out / second).parent.joinpath(".tmp-left.png").touch()
    kept, before = (out / second).stat().st_mtime_ns, len(writes)
    with pytest.raises(CTError, match="another data set"):
        write(out, seed=4)
    write(out)
    assert files(out) == files(tiny) and (out / second).stat().st_mtime_ns == kept
    assert len(writes) - before == 13 - 3  # four were logged; one of them was broken
    (out / first).unlink()
    write(out)
    assert files(out) == files(tiny) and len(writes) - before == 13 - 3 + 1
    monkeypatch.setattr(dataset, "file_sha256", None)  # a complete set: nothing is read, nothing written
    write(out)
    assert len(writes) - before == 13 - 3 + 1


def test_other_data_in_the_folder_is_an_error(tiny, tmp_path):
    with pytest.raises(CTError, match="another data set"):
        write(tiny, seed=4)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "letter.txt").write_text("mine")
    with pytest.raises(CTError, match="no synthetic data set"):
        write(strange)
    assert [p.name for p in strange.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "bad", [{"train": -1}, {"train": 0, "val": 0}, {"size": 8}, {"shortcut": "colour"}, {"workers": 0}]
)
def test_bad_arguments_are_named(bad, tmp_path):
    with pytest.raises(CTError, match="To mend"):
        write(tmp_path / "set", **bad)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("changes", [{"split": "test "}, {"label": "normal"}, {"finding": "covid"}, {"size": 3}])
def test_bad_slices_are_named(changes):
    with pytest.raises(CTError, match="To mend"):
        make_slice(**{"seed": 0, "split": "train", "label": "ILD", "index": 0, **changes})


def test_simple_figures_do_not_tell_the_class():
    """The label's own streams carry nothing: without the finding all classes look alike."""
    level = {c: [make_slice(0, "train", c, k, finding="none", size=48)[0].mean() for k in range(12)] for c in CLASSES}
    means = [np.mean(v) for v in level.values()]
    assert np.ptp(means) < 1.2 * np.mean([np.std(v) for v in level.values()])


def test_import_is_cheap():
    heavy = ("torch", "pandas", "sklearn", "matplotlib")
    code = f"import sys, ctutils.phantom; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
