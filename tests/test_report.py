"""Prediction of new files: pictures and DICOM, each as the run's training data was read."""

import sys
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from ctutils import registry
from ctutils.data import normalise
from ctutils.pictures import window_to_grey
from ctutils.report import predict_files

MEDIASTINUM = {"level": 40, "width": 400, "unit": "HU"}
PLAN = SimpleNamespace(backbone="alexnet", size=32)
SPEC = registry.get_spec(PLAN.backbone)
HU = np.linspace(-1000, 400, 3 * 32 * 32).reshape(3, 32, 32).round()  # three frames


@pytest.fixture
def given(monkeypatch):
    batches = []  # what the network is given: float32 (B, 3, 32, 32)

    def model(images):
        batches.append(images)
        return images.mean((2, 3))[:, :2] * torch.tensor([1, -1])

    monkeypatch.setitem(sys.modules, "ctutils.backbones", SimpleNamespace(restore_model=lambda run, weights: model))
    return batches


def run_with(window, depth=""):
    return SimpleNamespace(record={"data": {"window": window, "depth": depth}}, plan=PLAN, classes=["a", "b"])


def write_dicom(path, hu):
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = "CT", "MONOCHROME2", 1
    ds.NumberOfFrames, ds.Rows, ds.Columns = hu.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = (hu + 1024).astype("<u2").tobytes()
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("window", [MEDIASTINUM, None])
def test_dicom_is_read_with_the_window_of_the_training_data(given, tmp_path, window):
    write_dicom(path := tmp_path / "세 장", HU)
    rows, failed = predict_files(run_with(window), [path])
    level_width = (40, 400) if window else (-600, 1500)
    grey = torch.from_numpy(window_to_grey(HU, level_width))[:, None]
    torch.testing.assert_close(torch.cat(given), normalise(grey, SPEC.mean, SPEC.std))
    assert [row["image"] for row in rows] == [f"{path} frame {k}" for k in (1, 2, 3)]
    assert {tuple(row["window"]) for row in rows} == {level_width}
    assert all(("lung window" in row.get("note", "")) == (window is None) for row in rows)


def test_pictures_of_any_kind_and_more_than_a_batch(given, tmp_path):
    grey = Image.fromarray(window_to_grey(HU[1]))
    grey.save(tmp_path / "1.png")
    Image.merge("RGBA", [grey] * 4).save(tmp_path / "2.PNG")
    rows, failed = predict_files(run_with(MEDIASTINUM), [tmp_path / "1.png"] * 17 + [tmp_path / "2.PNG"])
    assert [len(batch) for batch in given] == [16, 2] and all(row["window"] is None for row in rows)
    assert set(rows[0]) == {"image", "class", "probabilities", "window"} and rows[0]["class"] in "ab"
    assert all(row["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-4) for row in rows)


def test_hu_are_read_alike_from_dicom_and_from_pictures(given, tmp_path):
    hu = np.linspace(-1000, 400, 32 * 32).reshape(32, 32).round()
    write_dicom(tmp_path / "a.dcm", hu[None])
    for name, values in (("b.tif", hu.astype(np.float32)), ("c.tif", hu.astype(np.int16))):
        Image.fromarray(values).save(tmp_path / name)
    Image.fromarray(window_to_grey(hu, (40, 400))).save(tmp_path / "d.png")
    Image.fromarray((hu + 1024).astype(np.uint16)).save(tmp_path / "e.png")
    rows, failed = predict_files(run_with(MEDIASTINUM, "HU"), sorted(tmp_path.iterdir()))
    assert [row["window"] for row in rows] == [[40, 400]] * 3 + [None]
    assert all(batch.equal(given[0][:1].expand_as(batch)) for batch in given)
    assert list(failed.values()) == ["values from 24 to 1424, where HU, in a window are read"]
    assert "8 bits, where the run has learned from HU" in rows[3]["note"]
    rows, failed = predict_files(run_with(None, "12"), [tmp_path / "b.tif", tmp_path / "e.png"])
    assert len(failed) == 1 and "note" not in rows[0]
    rows, failed = predict_files(run_with(None), [tmp_path / "b.tif", tmp_path / "e.png"])
    assert "no window" in rows[0]["note"] and "read as 12 bits" in rows[1]["note"] and not failed


def test_bad_files_are_named_and_the_others_predicted(given, tmp_path):
    grey = Image.fromarray(window_to_grey(HU[1]))
    grey.save(tmp_path / "good.png")
    grey.save(tmp_path / "film.tif", save_all=True, append_images=[grey])
    grey.resize((15, 15)).save(tmp_path / "small.png")
    for name, content in {"empty": b"", "text": b"hello", "cut": b"\x89PNG\r\n\x1a\n" + b"x" * 50}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    (tmp_path / "text.dcm").write_bytes(b"hello")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "gone.png"]
    rows, failed = predict_files(run_with(None), paths)
    assert [row["image"] for row in rows] == [str(tmp_path / "film.tif"), str(tmp_path / "good.png")]
    assert rows[0]["note"] == "the first of 2 frames" and "note" not in rows[1]
    why = {path.rsplit("/", 1)[1]: reason for path, reason in failed.items()}
    assert set(why) == {"cut.png", "empty.png", "gone.png", "small.png", "text.dcm", "text.png"}
    assert why["small.png"] == "15 x 15 pixels" and why["gone.png"] == "No such file or directory"
    assert all("hotometric" not in reason for reason in why.values())
    assert predict_files(run_with(None), paths[-1:])[0] == []
