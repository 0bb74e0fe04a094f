"""The synthetic slices: same arguments same bytes, labels that only the finding tells, errors that help."""

import csv
import itertools
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

SLICE = {"seed": 0, "split": "train", "label": "ILD", "index": 0}


def write(out: Path, **changes) -> Path:
    """Write a tiny set."""
    tiny = {"train": 8, "val": 5, "seed": 3, "workers": 1, "size": 64, "show_progress": False}
    return write_dataset(out, **tiny | changes)


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("한글 folder") / "tiny set")


def test_counts_are_the_original_ones():
    assert list(class_counts(8001).values()) == [1000, 1000, 4001, 1000, 1000]
    assert list(class_counts(7, balanced=True).values()) == [2, 1, 2, 1, 1]
    assert all(sum(class_counts(n, even).values()) == n for n in range(40) for even in (False, True))


def test_pictures_and_dataset_json_are_what_they_should_be(tiny, tmp_path):
    assert sorted(p.name for p in (tiny / "val").iterdir()) == sorted(CLASSES)
    image = Image.open(tiny / "train" / "Normal" / "ChestCT_Normal_00000001.png")
    assert image.mode == "RGB" and image.size == (64, 64) and not image.info
    pixels = np.asarray(image)
    assert (pixels == pixels[:, :, :1]).all() and pixels.min() == 55 and pixels.max() == 255
    meta = json.loads((tiny / "dataset.json").read_text(encoding="utf-8"))
    assert meta["kind"] == "synthetic" and meta["seed"] == 3 and meta["shortcut"] is None
    assert meta["window"] == {"level": -600, "width": 1500, "unit": "HU"}
    there = {s: {c: len(list((tiny / s / c).glob("*.png"))) for c in CLASSES} for s in ("train", "val")}
    assert meta["counts"] == there and meta["counts"]["train"]["Normal"] == class_counts(8)["Normal"]
    assert {p.name for p in tiny.iterdir()} == {"train", "val", "findings.csv", "dataset.json"}
    trap = (write(tmp_path / "trap", shortcut="sharpness", train=2, val=0) / "dataset.json").read_text()
    assert '"shortcut": "sharpness"' in trap and '"name": "synthetic-3-sharpness"' in trap


def test_findings_rows_match_the_files_and_no_patient_is_in_two_splits(tiny):
    rows = list(csv.DictReader((tiny / "findings.csv").open(encoding="utf-8")))
    assert {r["path"] for r in rows} == {p.relative_to(tiny).as_posix() for p in tiny.rglob("*.png")}
    normal = {(r["finding"], r["x0"], r["side"], r["severity"]) for r in rows if r["class"] == "Normal"}
    assert normal == {("", "", "", "0.0")}
    train, val = ({r["patient"] for r in rows if r["split"] == split} for split in ("train", "val"))
    assert not train & val and len(train | val) < len(rows)
    assert [patient_of(k) for k in range(12)] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4]


def test_the_arguments_alone_make_the_bytes(tiny, tmp_path):
    assert files(write(tmp_path / "two", workers=2)) == files(tiny)
    a = make_slice(**SLICE, size=96)[0]
    assert (a == make_slice(**SLICE, size=96)[0]).all()
    for change in ({"seed": 1}, {"split": "val"}, {"index": 1}, {"label": "Normal"}):
        assert (a != make_slice(**SLICE | change, size=96)[0]).mean() > 0.2


@pytest.mark.parametrize("finding", ["ILD", "Lung_Cancer", "pneumonia", "pneumothorax"])
def test_counterfactual_differs_only_near_the_finding(finding):
    """The same slice with and without the finding: same body, same noise, a change inside the box."""
    for index in range(2):
        three = [make_slice(5, "train", "Normal", index, finding=f, size=128) for f in (finding, "none", None)]
        (image, record), (erased, nothing), (plain, _) = three
        assert (erased == plain).all() and nothing.box is None and nothing.severity == 0
        assert record.level == nothing.level and record.patient == nothing.patient
        x0, y0, x1, y1 = record.box
        assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128 and record.side in ("right", "left", "both")
        change = np.abs(image.astype(int) - erased) > 12
        assert change[y0:y1, x0:x1].sum() >= 3
        if finding in ("Lung_Cancer", "pneumonia"):  # ILD and pneumothorax change the lung around them too
            assert change[max(0, y0 - 9) : y1 + 9, max(0, x0 - 9) : x1 + 9].sum() > 0.75 * change.sum()
    if finding == "pneumothorax":  # air without vessels
        for image, record in (make_slice(1, "train", finding, index, size=256) for index in range(4)):
            x0, y0, x1, y1 = record.box
            assert (image[y0:y1, x0:x1] < 75).sum() > 32


def test_size_changes_only_the_grid():
    """A small slice is the same patient: it agrees with the large one shrunk."""
    (large, a), (small, b) = (make_slice(2, "val", "Lung_Cancer", 5, size=size) for size in (384, 96))
    shrunk = np.asarray(Image.fromarray(large).resize((96, 96), Image.Resampling.BOX))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.97
    assert (a.finding, a.side) == (b.finding, b.side)
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


def test_sharpness_trap_changes_the_kernel_by_class_only_when_asked():
    def edges(label, shortcut):  # of the same bodies with the trap and without it
        some = [make_slice(8, "train", label, k, finding="none", size=256, shortcut=shortcut)[0] for k in range(2)]
        return np.abs(np.diff(np.array(some, dtype=float), axis=2)).mean()

    assert edges("Normal", "sharpness") > 1.05 * edges("Normal", None)
    assert edges("ILD", "sharpness") < 0.98 * edges("ILD", None)
    soft, sharp = (phantom.Scanner.draw(np.random.default_rng(1), k) for k in (0.0, 1.0))
    assert soft.blur > sharp.blur and soft.grain > sharp.grain and soft.motion == sharp.motion


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_set_is_finished_and_a_complete_one_left_alone(tiny, tmp_path, monkeypatch, workers):
    out, writes = tmp_path / "set", []
    monkeypatch.setattr(dataset, "make_slice", lambda *a, **k: writes.append(1) or make_slice(*a, **k))

    def interrupted(made, **options):
        yield from itertools.islice(made, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, workers=workers, show_progress=True)
    assert not (out / "dataset.json").exists()
    table = out / "findings.csv"
    first, second, *_ = (row["path"] for row in csv.DictReader(table.open(encoding="utf-8")))
    table.write_text(table.read_text(encoding="utf-8") + "train/ILD/Chest")  # killed in the middle of a line
    (out / first).write_bytes((out / first).read_bytes()[:900])  # a disk that lost half a picture
    (out / second).parent.joinpath(".tmp-left.png").touch()
    kept, before = (out / second).stat().st_mtime_ns, len(writes)
    with pytest.raises(CTError, match="another data set"):
        write(out, seed=4)
    write(out)
    assert files(out) == files(tiny) and (out / second).stat().st_mtime_ns == kept
    assert len(writes) - before == 13 - 3  # four were logged; one of them was broken
    (out / first).unlink()  # lost later: made again
    write(out)
    monkeypatch.setattr(dataset, "file_sha256", None)  # a complete set: nothing is read, nothing written
    assert files(write(out)) == files(tiny) and len(writes) - before == 13 - 3 + 1


def test_windows_gets_no_more_processes_than_it_can_wait_for(monkeypatch):
    asked = []
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", lambda workers, **_: asked.append(workers) or 1 / 0)
    for platform in ("win32", "linux"):
        monkeypatch.setattr(dataset.sys, "platform", platform)
        with pytest.raises(ZeroDivisionError), dataset._mapped(len, [0] * 1000, 100):
            pass
    assert asked == [61, 100]


def test_other_data_in_the_folder_is_an_error(tiny, tmp_path):
    with pytest.raises(CTError, match="another data set"):
        write(tiny, seed=4)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(CTError, match="no synthetic data set"):
        write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


BAD_SLICES = [{"split": "test "}, {"label": "normal"}, {"finding": "covid"}, {"size": 3}, {"shortcut": "colour"}]
BAD_SETS = [{"train": -1}, {"train": 0, "val": 0}, {"size": 8}, {"shortcut": "colour"}, {"workers": 0}]


@pytest.mark.parametrize("bad, make", [(b, make_slice) for b in BAD_SLICES] + [(b, write) for b in BAD_SETS])
def test_bad_arguments_are_named_and_nothing_is_written(bad, make, tmp_path):
    with pytest.raises(CTError, match="To mend"):
        make(**({"out": tmp_path / "set"} if make is write else SLICE) | bad)
    assert not (tmp_path / "set").exists()


def test_simple_figures_do_not_tell_the_class():
    """The label's own streams carry nothing: without the finding all classes look alike."""
    level = {c: [make_slice(0, "train", c, k, finding="none", size=48)[0].mean() for k in range(12)] for c in CLASSES}
    assert np.ptp([np.mean(v) for v in level.values()]) < 1.2 * np.mean([np.std(v) for v in level.values()])


def test_import_is_cheap():
    code = "import sys, ctutils.phantom; print({'torch', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
