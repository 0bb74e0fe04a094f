"""The command line: what it prints, its exit codes, one message for a mistake, and real slices."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, REAL_CT, check_message, files_below, needs_real_ct, write_set
from PIL import Image

from ctutils import cli, config, pipeline, training
from ctutils.models import BACKBONES, build_model
from ctutils.runs import claim, load_run

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("synth", "check", "import", "train", "sweep", "predict", "results")
REAL, SMALL = "efficientnet_lite0", "mobilenet_v3_large"
QUICK = ["--size", "64", "--epochs", "2", "--precision", "float32"]


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """A project folder of its own with a data set in it; nothing is written to the real one."""
    folder = tmp_path_factory.mktemp("project 한글")
    write_set(folder / "set", per_class=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "project_root", lambda: folder)
        patch.setenv("CT_PROFILE", "quick")
        patch.setenv("CT_DEVICE", "cpu")
        patch.delenv("CT_WEIGHTS", raising=False)  # the default backbone's real weights come by pip
        patch.setenv("CT_DATA", str(folder / "set"))
        yield folder


@pytest.fixture
def call(capsys):
    """Return a function that runs a command and gives exit code, what it printed and its errors."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def call_json(call):
    def run(*words) -> dict:
        code, out, error = call(*words, "--json")
        assert (code, error) == (0, ""), error
        assert out.count("\n") == 1, "more than one JSON object was printed"
        return json.loads(out)

    return run


@pytest.fixture(scope="module")
def run_folder(project) -> Path:
    """A record of two epochs on real weights."""
    folder = project / "runs" / "first run"
    assert cli.main(["train", str(project / "set"), "--out", str(folder), *QUICK]) == 0
    return folder


# --- Help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(call, capsys, command):
    with pytest.raises(SystemExit) as stop:
        call(command, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"python -m ctutils {command}" in text and "--json" in text


def test_help_lists_the_commands_without_loading_anything_heavy():
    code = (
        "import sys\nfrom ctutils.cli import main\ntry:\n    main(['--help'])\nfinally:\n"
        "    heavy = {'torch', 'torchvision', 'pandas', 'numpy', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "heavy: []\n", done.stderr
    assert all(re.search(rf"^ +{command} ", done.stdout, re.MULTILINE) for command in COMMANDS)
    assert "Not for clinical use" in done.stdout


@pytest.mark.parametrize("words", [[], ["fly"], ["train", "--epochs", "many"], ["train", "--bn", "melt"], ["predict"]])
def test_wrong_words_are_exit_code_2(call, capsys, words):
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


# --- train ---


def test_train_prints_one_json_object(call_json, project):
    out = project / "runs" / "as json"
    content = call_json("train", project / "set", "--backbone", REAL, "--out", out, *QUICK)
    assert set(content) == {
        *("run", "backbone", "weights", "epochs", "best_epoch", "val_macro_f1", "test_macro_f1"),
        *("test_interval_95", "test_per_class_f1", "test_from_val", "seconds", "interrupted"),
    }
    run = load_run(out)
    assert content["run"] == str(out) and run.record["backbone"] == content["backbone"] == REAL
    assert (content["weights"], content["epochs"], content["interrupted"]) == ("imagenet", 2, False)
    assert content["best_epoch"] == run.record["best_epoch"] in (1, 2)
    assert content["val_macro_f1"] == run.history["val_macro_f1"].max() == run.record["scores"]["val"]["macro_f1"]
    low, high = content["test_interval_95"]
    assert 0 <= low <= content["test_macro_f1"] <= high <= 1
    assert list(content["test_per_class_f1"]) == list(CLASSES)
    assert np.mean(list(content["test_per_class_f1"].values())) == pytest.approx(content["test_macro_f1"])
    assert content["seconds"]["total"] > 0
    assert files_below(out) == ["head.safetensors", "history.csv", "predictions.csv", "run.json"]


def test_train_in_words_uses_settings_for_what_is_left_out(call, call_json, project, monkeypatch):
    monkeypatch.setenv("CT_WEIGHTS", "random")
    code, out, error = call("train", "--backbone", SMALL, "--epochs", "1", "--size", "64")
    assert code == 0 and error == ""
    record = load_run(project / "data" / "runs" / "quick-set" / SMALL).record
    assert (record["weights"]["kind"], record["data"]["name"], record["batch_size"]) == (
        "random",
        "set",
        config.PROFILES["quick"].batch_size,
    )
    assert "random weights, as asked for" in out, "the banner of random weights"
    assert re.search(r"macro F1: validation 0\.\d{3} \(best epoch 1 of 1\), test [01]\.\d{3}, 95 % interval", out)
    assert "weights: random" in out and str(Path("runs") / "quick-set" / SMALL) in out
    assert call_json("results")["runs"][0]["backbone"] == BACKBONES[SMALL].title, "results look where train writes"


def test_options_of_train_reach_the_record(call_json, project, tmp_path):
    words = ["--optimizer", "sgd", "--lr", "0.01", "--batch-size", "5", "--seed", "3", "--bn", "drift"]
    words += ["--augment", "rotate", "flip", "--weights", "random", "--backbone", SMALL, "--no-standardise"]
    call_json("train", project / "set", "--out", tmp_path / "run", *QUICK, "--epochs", "1", *words)
    record = load_run(tmp_path / "run").record
    assert record["optimizer"] == {"name": "SGD", "lr": 0.01} and record["augment"] == ["rotate", "flip"]
    assert (record["batch_size"], record["seed"], record["bn"], record["epochs"]) == (5, 3, "drift", 1)
    assert (record["image_size"], record["backbone"], record["trained"]) == (64, SMALL, "head")
    assert record["standardised"] is False
    call_json("train", project / "set", "--out", tmp_path / "all", *QUICK, "--epochs", "1", "--unfreeze")
    assert load_run(tmp_path / "all").record["trained"] == "all"


def test_train_without_test_split_says_so(call, call_json, tmp_path):
    root = write_set(tmp_path / "set", splits=("Training", "Validation"))
    words = ["train", root, "--out", tmp_path / "run", *QUICK]
    assert call_json(*words)["test_from_val"] is True
    assert "half of the validation slices" in call(*words)[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--unfreeze"], {"trained": "all"}),
        (["--unfreeze-last", "--discriminative", "0.3"], {"trained": "last", "discriminative": 0.3}),
        (["--lr", "range", "--scheduler", "onecycle"], {"trained": "head", "balance": "none"}),
        (["--augment", "blur", "flip", "--views", "2"], {"augment": ["blur", "flip"], "views": 2, "trained": "head"}),
        (["--balance", "sampler", "--patience", "3", "--at-once", "4"], {"balance": "sampler", "patience": 3}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_hands_its_choices_on(call_json, project, tmp_path, words, expected):
    quick = [*QUICK, "--epochs", "1", "--backbone", SMALL, "--weights", "random"]
    call_json("train", project / "set", "--out", tmp_path / "run", *quick, *words)
    record = load_run(tmp_path / "run").record
    assert {key: record[key] for key in expected} == expected
    if "range" in words:
        assert record["lr_range"] and record["scheduler"]["name"] == "OneCycleLR"


USER_ERRORS = {
    "backbone": (["--backbone", "resnet51"], "backbone 'resnet51'"),
    "optimizer": (["--optimizer", "lion"], "optimizer 'lion'"),
    "precision": (["--precision", "half"], "precision 'half'"),
    "augmentation": (["--augment", "warp"], "warp"),
    "schedule": (["--scheduler", "linear"], "scheduler 'linear'"),
    "balance": (["--balance", "luck"], "balance 'luck'"),
    "rate": (["--lr", "-1"], "learning rate of -1"),
    "epochs": (["--epochs", "0"], "epochs 0"),
    "batch": (["--batch-size", "0"], "batch size 0"),
    "size": (["--size", "8"], "size 8"),
    "weights": (["--weights", "no/such/folder"], "weights 'no"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_mistake_is_one_message_and_exit_code_2(call, project, tmp_path, name):
    words, expected = USER_ERRORS[name]
    out = tmp_path / "run"
    code, printed, error = call("train", project / "set", "--out", out, *QUICK, *words)
    assert (code, printed) == (2, "")
    check_message(error, expected)
    code, printed, error = call("train", project / "set", "--out", out, *QUICK, *words, "--json")
    assert code == 2 and f"Error: {json.loads(printed)['error']}\n" == error
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("CT_PROFILE", "huge", "profile 'huge'"),
        ("CT_DEVICE", "tpu", "device 'tpu'"),
        ("CT_DATA", "no/such", "no folder"),
    ],
)
def test_wrong_variable_is_one_message(call, monkeypatch, tmp_path, variable, value, expected):
    monkeypatch.setenv(variable, value)
    code, _, error = call("train", "--out", tmp_path / "run", *QUICK)
    assert code == 2
    check_message(error, expected, variable)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("kind", ["missing", "no images", "case", "zero", "text", "pixel", "cut"])
def test_bad_data_is_one_message(call, project, tmp_path, kind):
    root = tmp_path / "set"
    if kind != "missing":
        write_set(root)
    file = root / "val" / "Normal" / "slice 0.png"
    if kind == "no images":
        for one in file.parent.iterdir():
            one.unlink()
    elif kind == "case":
        file.parent.rename(file.parent.with_name("temporary")).rename(file.parent.with_name("normal"))
    elif kind == "pixel":
        Image.fromarray(np.zeros((1, 1), np.uint8)).save(file)
    elif kind != "missing":
        content = file.read_bytes()
        file.write_bytes({"zero": b"", "text": b"hello", "cut": content[: len(content) // 2]}[kind])
    before = files_below(tmp_path)
    code, _, error = call("train", root, "--out", tmp_path / "run", *QUICK)
    assert code == 2
    check_message(error, file.name if kind in ("zero", "text", "pixel", "cut") else "Found")
    assert files_below(tmp_path) == before


def test_weights_of_another_network_are_one_message(call, project, tmp_path):
    (tmp_path / "weights").mkdir()
    other = build_model(SMALL, "random")[0]
    torch.save(other.features[:3].state_dict(), tmp_path / "weights" / f"{REAL}.pth")
    code, _, error = call(
        "train", project / "set", "--weights", tmp_path / "weights", "--out", tmp_path / "run", *QUICK
    )
    assert code == 2
    check_message(error, f"{REAL}.pth", "EfficientNet-Lite0")
    assert not (tmp_path / "run").exists()


def test_second_run_of_the_same_name_is_one_message(call, project, run_folder):
    held, done = threading.Event(), threading.Event()

    def first():
        with claim(run_folder):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    before = (run_folder / "run.json").read_bytes()
    try:
        assert held.wait(60)
        code, _, error = call("train", project / "set", "--out", run_folder, *QUICK)
    finally:
        done.set()
        thread.join()
    assert code == 2
    check_message(error, "the record 'first run' held by")
    assert (run_folder / "run.json").read_bytes() == before


def test_ctrl_c_and_resume(call, call_json, project, tmp_path, monkeypatch):
    words = ["train", project / "set", *QUICK, "--epochs", "3"]
    call_json(*words, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls, real = [], training.evaluate

        def stopped(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patch.setattr(training, "evaluate", stopped)
        code, out, _ = call(*words, "--out", tmp_path / "run")
    assert code == 130 and "--resume" in out, "exit code 0 is for success alone"
    assert load_run(tmp_path / "run").record["interrupted"] is True
    content = call_json(*words, "--out", tmp_path / "run", "--resume")
    assert content["interrupted"] is False
    whole, resumed = load_run(tmp_path / "whole"), load_run(tmp_path / "run")
    assert resumed.predictions.equals(whole.predictions)
    assert resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))


def test_ctrl_c_before_training(call, project, tmp_path, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "build_store", stop)
    code, _, error = call("train", project / "set", "--out", tmp_path / "run", *QUICK)
    assert code == 130 and error.startswith("Stopped.")
    assert files_below(tmp_path) == []


# --- predict ---


def test_predict_says_what_the_record_says(call, call_json, project, run_folder):
    run = load_run(run_folder)
    paths = [project / "set" / path for path in run.predictions["path"]]
    rows = call_json("predict", run_folder, *paths)["predictions"]
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    found = np.array([[row["probabilities"][name] for name in CLASSES] for row in rows])
    np.testing.assert_allclose(found, run.predictions[[f"p_{name}" for name in CLASSES]].to_numpy(), atol=2e-3)
    assert [row["class"] for row in rows] == [CLASSES[k] for k in found.argmax(1)]
    code, out, _ = call("predict", run_folder, paths[0])
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith(f"{paths[0]}: {rows[0]['class']}  ILD 0.")
    assert lines[1] == "Not for clinical use."


def test_mistakes_of_predict(call, run_folder, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    for words, expected in (
        ((run_folder, tmp_path / "none.png"), "none.png"),
        ((run_folder, tmp_path / "text.png"), "text.png"),
        ((tmp_path / "no run", tmp_path / "text.png"), "no run record"),
    ):
        code, out, error = call("predict", *words)
        assert (code, out) == (2, "")
        check_message(error, expected)


# --- results ---


def test_results_name_a_damaged_record_and_show_the_rest(call, call_json, run_folder, tmp_path):
    folder = tmp_path / "runs"
    (folder / "good").mkdir(parents=True)
    for name in files_below(run_folder):
        (folder / "good" / name).write_bytes((run_folder / name).read_bytes())
    (folder / "damaged").mkdir()
    (folder / "damaged" / "run.json").write_text('{"name": ')
    content = call_json("results", folder)
    assert [row["backbone"] for row in content["runs"]] == [BACKBONES[REAL].title]
    assert len(content["problems"]) == 1 and content["problems"][0].startswith("damaged: Found")
    code, out, _ = call("results", folder)
    assert code == 0 and "Left out: damaged" in out and BACKBONES[REAL].title in out
    (folder / "good" / "predictions.csv").unlink()
    code, out, _ = call("results", folder)
    assert code == 1 and "Left out: good" in out and "predictions.csv" in out


def test_results_of_nothing(call, tmp_path):
    for folder, expected in ((tmp_path, "no run record"), (tmp_path / "none", "no folder")):
        code, _, error = call("results", folder)
        assert code == 2
        check_message(error, expected, folder.name)


def test_model_card(call, call_json, run_folder, project):
    code, out, _ = call("results", "--card", run_folder)
    assert code == 0 and out.startswith("#") and "first run" in out
    # The run's slices are those of CT_DATA, so they were audited now, and the verdicts kept for the next card.
    assert "- info: counts: 36 slices" in out and "- probe, sharpness and noise: macro F1" in out
    (verdicts,) = (project / "data" / "cache" / "audit").iterdir()
    verdicts.write_text(json.dumps({"verdicts": ["error: as it was kept"]}))
    assert "- error: as it was kept" in call("results", "--card", run_folder)[1]
    verdicts.unlink()
    assert call_json("results", "--card", run_folder)["card"].strip() == out.strip()
    assert call("results", "--card", run_folder / "none")[0] == 2


# --- import, synth, check ---


def test_import_then_train(call, call_json, project, tmp_path):
    content = call_json("import", project / "set", tmp_path / "imported")
    assert content["images"] == content["written"] == 36
    assert call_json("import", project / "set", tmp_path / "imported")["already_there"] == 36
    content = call_json("train", tmp_path / "imported", "--out", tmp_path / "run", *QUICK)
    assert load_run(tmp_path / "run").record["data"]["counts"]["train"] == dict.fromkeys(CLASSES, 4)
    code, _, error = call("import", tmp_path / "none", tmp_path / "out")
    assert code == 2
    check_message(error, "none")


def test_synth(call, call_json, tmp_path):
    out = tmp_path / "세트"
    content = call_json("synth", out, "--train", "10", "--val", "10", "--test", "0", "--workers", "1")
    assert content["out"] == str(out) and sum(content["counts"]["train"].values()) == 10
    assert len(list((out / "val").rglob("*.png"))) == 10
    code, _, error = call("synth", out, "--train", "-1")
    assert code == 2
    check_message(error, "-1")


def test_card_without_an_audit_says_how_to_get_one(call, run_folder, project, tmp_path, monkeypatch):
    monkeypatch.setenv("CT_DATA", str(write_set(tmp_path / "other", per_class=3)))
    for file in (project / "data" / "cache" / "audit").glob("*"):
        file.unlink()
    assert "python -m ctutils check" in call("results", "--card", run_folder)[1]
    assert call("check", project / "set", "--json")[0] in (0, 1)
    assert "- info: counts: 36 slices" in call("results", "--card", run_folder)[1]


def test_check_finds_what_must_be_mended(call, tmp_path):
    root = write_set(tmp_path / "set")
    code, printed, _ = call("check", root, "--json")
    assert code in (0, 1) and isinstance(json.loads(printed), dict)
    (root / "train" / "ILD" / "slice 0.png").write_bytes(b"hello")
    code, out, _ = call("check", root)
    assert code == 1 and "slice 0.png" in out
    code, out, error = call("check", tmp_path / "none")  # a finding like others, not a mistake of the command line
    assert code == 1 and "no folder" in out and error == ""


# --- As a user types it ---


def test_no_traceback_in_a_shell(tmp_path):
    command = [sys.executable, "-m", "ctutils", "results", str(tmp_path / "없음")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stdout == b""
    check_message(done.stderr.decode("utf-8").replace("\r\n", "\n"), "없음")


@needs_real_ct
def test_train_on_real_slices(call_json, tmp_path):
    """The main job on real input: two epochs beat always saying the most frequent class, 0.14, by far."""
    words = ["train", REAL_CT, "--out", tmp_path / "run", "--epochs", "2", "--size", "96", "--lr", "0.005"]
    content = call_json(*words)
    assert (content["backbone"], content["weights"], content["test_from_val"]) == (REAL, "imagenet", False)
    assert content["test_macro_f1"] > 0.35
    run = load_run(tmp_path / "run")
    assert [len(run.of_split(split)) for split in ("val", "test")] == [72, 315]
    assert run.record["data"]["counts"]["train"]["adenocarcinoma"] == 195
