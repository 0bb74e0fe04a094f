"""Prediction of new files: read as the run's training data was, compared with it, and shown on one page."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from helpers import check_message, write_set
from PIL import Image
from test_experiment import BN, tiny_networks  # noqa: F401

from ctutils import cli, config
from ctutils.people import export, page, predict, reference
from ctutils.pictures import resize, window_to_grey
from ctutils.runs import REFERENCE_FILE, load_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync".split()
MEDIASTINUM = {"level": 40, "width": 400, "unit": "HU"}
PLAN = SimpleNamespace(backbone="alexnet", size=32)
HU = np.linspace(-1000, 400, 3 * 32 * 32).reshape(3, 32, 32).round()  # three frames


@pytest.fixture
def given(monkeypatch):
    batches = []  # what the network is given: uint8 (B, 32, 32)

    def look(model, grey, spec):
        batches.append(torch.from_numpy(grey))
        share = grey.mean((1, 2))[:, None] / 255
        return np.hstack([share, 1 - share]), np.zeros((len(grey), 4)), np.zeros((len(grey), 2))

    monkeypatch.setattr(predict, "look", look)
    monkeypatch.setattr("ctutils.backbones.restore_model", lambda run, weights: None)
    return batches


def run_with(window, depth=""):
    record = {"data": {"window": window, "depth": depth}}
    split = {"y_true": lambda split: np.array([0, 1]), "y_score": lambda split: np.eye(2)}
    return SimpleNamespace(record=record, plan=PLAN, classes=["a", "b"], **split)


def predict_files(run, paths):
    slices, failed = predict.Predictor(run).predict_files(paths)
    return [one.to_json(run.classes) for one in slices], failed


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
    assert torch.cat(given).equal(torch.from_numpy(window_to_grey(HU, level_width)))
    assert [row["image"] for row in rows] == [f"{path} frame {k}" for k in (1, 2, 3)]
    assert {tuple(row["window"]) for row in rows} == {level_width}
    assert all(("lung window" in row.get("note", "")) == (window is None) for row in rows)


def test_pictures_of_any_kind_and_more_than_a_batch(given, tmp_path):
    grey = Image.fromarray(window_to_grey(HU[1]))
    grey.save(tmp_path / "1.png")
    Image.merge("RGBA", [grey] * 4).save(tmp_path / "2.PNG")
    rows, failed = predict_files(run_with(MEDIASTINUM), [tmp_path / "1.png"] * 17 + [tmp_path / "2.PNG"])
    assert [len(batch) for batch in given] == [16, 2] and all(row["window"] is None for row in rows)
    keys = {"image", "class", "confidence", "probabilities", "window", "unlike", "distance"}
    assert set(rows[0]) == keys and rows[0]["class"] in "ab" and rows[0]["unlike"] is None
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


# ---------------------------------------------------------------- a trained run


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_networks):  # noqa: F811
    """A project with a set of noisy bars, a network that learned from it, and the names of all that is there."""
    folder = tmp_path_factory.mktemp("사람 project")
    write_set(folder / "세트", per_class=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "project_root", lambda: folder)
        patch.setenv("CT_PROFILE", "quick")
        patch.setenv("CT_DEVICE", "cpu")
        words = ["train", str(folder / "세트"), "--backbone", BN, "--size", "64", "--epochs", "1", "--unfreeze"]
        assert cli.main([*words, "--weights", "random", "--precision", "float32"]) == 0
        (run,) = folder.glob("data/runs/*/*/run.json")
        yield SimpleNamespace(root=folder, set=folder / "세트", run=run.parent, settings=config.get_settings)


def odd_pictures(folder: Path) -> Path:
    """Write what is no slice: photographs that scikit-learn brings, a blank picture, noise."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    for number, pixels in enumerate(load_sample_images().images):
        Image.fromarray(pixels).save(folder / f"photograph {number}.JPG")
    Image.new("L", (300, 200), 90).save(folder / "blank.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(folder / "noise.PNG")
    return folder


def test_what_is_unlike_the_training_slices_is_flagged(project, tmp_path, capsys):
    run = load_run(project.run)
    known = reference.load_reference(run)
    assert known is not None, "train keeps it in the record"
    assert known.features.shape[0] == len(known.paths) == 36 and len(known.val) == 36
    odd = odd_pictures(tmp_path / "odd")
    words = ["predict", run.name, str(project.set / "test"), str(odd / "*"), "--json"]
    capsys.readouterr()
    assert cli.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    flagged = {row["image"] for row in rows if row["unlike"]}
    assert {str(path) for path in odd.iterdir()} <= flagged and len(rows) == 36 + 4
    assert len(flagged) <= 4 + 2 and all(row["unlike"] == (row["distance"] > 1) for row in rows)
    assert cli.main(words[:-1]) == 0
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 100 and sum("  UNLIKE TRAINING" in line for line in table) == len(flagged)
    assert table[-1] == "Not for clinical use."


def test_similar_slices_are_those_alike_and_the_slice_itself_comes_first(project):
    run, settings = load_run(project.run), project.settings()
    folder = reference.find_slices(run, settings)
    assert folder.fingerprint == run.record["data"]["fingerprint"]
    known = reference.load_reference(run)
    predictor = predict.Predictor(run, reference=known)
    slices, _ = predictor.predict_files([folder.root / path for path in known.paths[:5]])
    assert [one.similar[0] for one in slices] == [0, 1, 2, 3, 4]


def test_reference_is_made_again_where_the_slices_are_and_else_its_lack_is_said(project, tmp_path, capsys, user_says):
    run = shutil.copytree(project.run, tmp_path / "moved")
    whole = (run / REFERENCE_FILE).read_bytes()
    for broken in (b"", whole[:1000], whole.replace(b"2026", b"1999")):
        (run / REFERENCE_FILE).write_bytes(broken)
        assert broken == whole or reference.load_reference(load_run(run)) is None
    image = next((project.set / "test").rglob("*.png"))
    assert cli.main(["predict", str(run), str(image), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["notes"] == []
    assert reference.load_reference(load_run(run)) is not None, "kept"
    (run / REFERENCE_FILE).unlink()
    shutil.rmtree(project.root / "data" / "cache" / "places")
    assert cli.main(["predict", str(run), str(image)]) == 0
    assert "Not checked for slices unlike" in capsys.readouterr().out
    user_says(["predict", str(run), str(image), "--data", str(tmp_path)], "train")
    assert cli.main(["predict", str(run), str(image), "--data", str(project.set)]) == 0


@pytest.fixture
def user_says(capsys):
    def check(words, *says):
        capsys.readouterr()
        assert cli.main(words) == 2
        check_message(capsys.readouterr().err, *says)

    return check


def test_a_run_is_found_by_name_and_files_by_folder_or_pattern(project, tmp_path, monkeypatch, user_says):
    settings = project.settings()
    assert predict.find_run(project.run.name, settings) == project.run
    user_says(["predict", "nobody", str(project.set)], "nobody", str(project.run))
    (tmp_path / "a" / ".hidden").mkdir(parents=True)
    for name in ("b.PNG", "노트.txt", "c.dcm", ".hidden/d.png"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "a" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    found = ["IM0001", "b.PNG", "c.dcm"]
    assert [path.name for path in predict.find_files([tmp_path / "a"])] == found
    assert [path.name for path in predict.find_files([tmp_path / "a" / "*.PNG", tmp_path / "a" / "b.PNG"])] == ["b.PNG"]
    user_says(["predict", str(project.run), str(tmp_path / "*.png")], "*.png")


@pytest.fixture
def html(project, tmp_path, capsys):
    """The page of three slices, of a photograph and of a file that is no picture."""
    odd = odd_pictures(tmp_path / "odd <b>")
    (odd / "text.png").write_text("hello")
    files = [*sorted((project.set / "test" / "폐렴").iterdir())[:3], odd / "photograph 0.JPG", odd / "text.png"]
    out = [tmp_path / "보고서.html", tmp_path / "표.csv"]
    words = ["predict", project.run.name, *map(str, files), "--html", str(out[0]), "--csv", str(out[1])]
    assert cli.main(words) == 2, "a file that cannot be read"
    text = out[1].read_text(encoding="utf-8-sig")
    assert len(text.splitlines()) == 5 and "p_폐렴" in text and "photograph 0.JPG" in text
    assert "probabilities" not in text
    return out[0]


def test_page_is_whole_and_fetches_nothing(html):
    text = html.read_text(encoding="utf-8")
    assert "Not for clinical use" in text and "random weights" in text and "Limits of this model" in text
    assert text.count("<article") == 4 and 1 <= text.count("Unlike anything this model was trained on") <= 2
    assert "odd &lt;b&gt;" in text and "odd <b>" not in text, "names are escaped"
    assert "text.png: not a picture" in text
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 4 * (2 + 3) and not re.search(r"https?://|<script|<link|url\(", text)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))).load()


MEASURE = """<script>addEventListener("load", () => {
const images = [...document.images].map(one => one.naturalWidth), wide = document.documentElement.scrollWidth;
document.body.textContent = JSON.stringify([images, wide, innerWidth])})</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_page_in_a_real_browser(html, tmp_path):
    text = html.read_text(encoding="utf-8")
    html.write_text(re.sub("<meta http-equiv.*", "", text) + MEASURE, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,720", "--dump-dom"]
    done = subprocess.run([*command, html.as_uri()], capture_output=True, text=True, timeout=120)
    images, wide, window = json.loads(re.search(r"\[\[.*\]", done.stdout).group())
    assert len(images) == 20 and min(images) >= 64 and wide <= window == 1280


def test_overlay_shows_the_heat_where_it_is():
    heat = np.zeros((8, 8), np.float32)
    heat[2, 3] = 1
    shown = np.asarray(page.overlay(np.full((8, 8), 100, np.uint8), heat)).astype(int)
    assert (shown[heat == 0] == 100).all() and abs(shown[2, 3] - 100).max() > 50


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_export_gives_what_predict_gives(project, tmp_path, capsys, suffix):
    """On slices of other sizes, too: the resize is in the file."""
    if suffix == ".onnx":
        for name in ("onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason="the extra export is not installed")
    out, run = tmp_path / f"모델{suffix}", load_run(project.run)
    assert cli.main(["export", project.run.name, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["difference"] <= 1e-4
    rng = np.random.default_rng(0)
    for number, size in enumerate([(512, 512), (90, 333), (30, 64)]):
        pixels = rng.integers(0, 256, size, np.uint8)  # noise: a resize that rounds otherwise would show
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    slices, _ = predict.Predictor(run).predict_files(sorted(tmp_path.glob("*.png")))
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out)
        about = session.get_modelmeta().custom_metadata_map
        assert json.loads(about["classes"]) == list(run.classes) and "clinical" in about["use"]
    else:
        module = torch.export.load(out).module()
    for one in slices:
        grey = np.asarray(Image.open(one.image))[None, None]
        given = session.run(None, {"slices": grey})[0] if suffix == ".onnx" else module(torch.tensor(grey)).detach()
        np.testing.assert_allclose(np.asarray(given)[0], one.probabilities, atol=1e-5)


@pytest.mark.parametrize("shape", [(512, 512), (300, 417), (40, 90)])
def test_resize_of_an_export_is_pillows_to_the_bit(shape):
    body = torch.nn.Module()
    body.backbone, body.head = torch.nn.Identity(), torch.nn.Flatten()
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    scores = export.Exported(body, 112, (0, 0, 0), (1, 1, 1))(torch.tensor(pixels)[None, None])
    grey = torch.tensor(resize(Image.fromarray(pixels), 112)).float() / 255
    assert torch.equal(scores, torch.softmax(grey.expand(1, 3, 112, 112).flatten(1), 1))


def test_export_to_another_format_is_refused(project, tmp_path, user_says):
    user_says(["export", str(project.run), str(tmp_path / "model.h5")], "model.h5", ".onnx")
