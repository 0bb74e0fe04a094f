"""The command line: what it prints, its exit codes, one message for a mistake, and real slices."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers import CLASSES, REAL_CT, check_message, files_below, needs_real_ct, write_set
from test_experiment import BN, stop_in_epoch, tiny_networks  # noqa: F401

from ctutils import cli, config, experiment, weights
from ctutils.plan import Plan
from ctutils.registry import BACKBONES
from ctutils.runs import load_run

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("synth", "check", "import", "train", "features", "sweep", "predict", "serve", "export", "results")
REAL = "efficientnet_lite0"
QUICK = ["--size", "64", "--epochs", "2", "--precision", "float32"]
TINY = [*QUICK, "--backbone", BN, "--weights", "random"]


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


@pytest.fixture
def mistake(call):
    """Return a function that runs a command and expects exit code 2 and one message with these words."""

    def run(*words, says=()) -> None:
        code, out, error = call(*words)
        assert (code, out) == (2, ""), (words, code, out, error)
        check_message(error, *says)

    return run


@pytest.fixture(scope="module")
def run_folder(project, tiny_networks) -> Path:  # noqa: F811
    folder = project / "runs" / "first run"
    assert cli.main(["train", str(project / "set"), "--out", str(folder), *TINY]) == 0
    return folder


# --- Help and options ---


def test_no_words_print_the_help_without_loading_anything_heavy():
    code = (
        "import sys\nfrom ctutils.cli import main\ntry:\n    main([])\nfinally:\n"
        "    heavy = {'torch', 'torchvision', 'pandas', 'numpy', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "heavy: []\n", done.stderr
    assert all(re.search(rf"^ +{command} ", done.stdout, re.MULTILINE) for command in COMMANDS)
    assert "Not for clinical use" in done.stdout
    done = subprocess.run([sys.executable, "-m", "ctutils", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert re.fullmatch(r"ctutils [\d.]+, Python [\d.]+\S*, torch .+\n", done.stdout), done
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"ctutils": "ctutils.cli:console"}


def test_help_of_train_lists_the_backbones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(re.match(rf"  {name} +\S+ +(real|fetched)", line) for line in lines) for name in BACKBONES)


@pytest.mark.parametrize("words", [["fly"], ["train", "--epochs", "many"], ["train", "--lr", "fast"], ["predict"]])
def test_wrong_words_are_exit_code_2(call, capsys, words):
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_every_field_of_a_plan_is_an_option_of_train(call, monkeypatch, tmp_path):
    """One list: what is left out stays as the plan has it, what is given reaches it with its type."""
    plans = []
    monkeypatch.setattr(experiment, "run_plan", lambda plan, *_args, **_kwargs: plans.append(plan) or 1 / 0)
    given = {
        **{"backbone": "vgg16", "data": tmp_path, "test_data": tmp_path / "t", "epochs": 3, "weights": "random"},
        **{"optimizer": "sgd", "lr": 0.01, "scheduler": "cosine", "patience": 4, "batch_size": 5, "at_once": 2},
        **{
            "size": 96,
            "bn": "train",
            "discriminative": 0.3,
            "unfreeze": "all",
            "augment": ("rotate", "flip"),
            "start_size": 64,
            "ema": 0.9,
            "label_smoothing": 0.1,
        },
        **{"balance": "loss", "imbalance": 2.0, "precision": "float32", "seed": 7},
        **{"start_size": 64, "label_smoothing": 0.1, "ema": 0.9},
    }
    rest = {"standardise": False, "augment": ("flip",), "views": 2, "lr": "range"}
    assert given.keys() | rest.keys() == {field.name for field in dataclasses.fields(Plan)}
    for values in ({}, given, rest, {"unfreeze": "last"}):
        words = [values["data"]] if "data" in values else []
        for key, value in values.items():
            special = {"standardise": ["--no-standardise"], "augment": ["--augment", *values.get("augment", ())]}
            special["unfreeze"] = ["--unfreeze" if value == "all" else "--unfreeze-last"]
            words += special.get(key, ["--" + key.replace("_", "-"), value] if key != "data" else [])
        with pytest.raises(ZeroDivisionError):
            call("train", *words)
        assert plans.pop() == Plan(**values)


# --- train ---


def test_train_prints_one_json_object(call_json, project):
    """The default backbone, with the real weights that pip brings."""
    out = project / "runs" / "as json"
    content = call_json("train", project / "set", "--out", out, *QUICK)
    assert set(content) == {
        *("run", "backbone", "weights", "epochs", "best_epoch", "val_macro_f1", "test_macro_f1"),
        *("test_interval_95", "test_per_class_f1", "test_from_val", "seconds", "interrupted"),
        "warnings",
    }
    run = load_run(out)
    assert content["run"] == str(out) and run.plan.backbone == content["backbone"] == REAL
    assert (content["weights"], content["epochs"], content["interrupted"]) == ("imagenet", 2, False)
    assert content["best_epoch"] == run.record["best_epoch"] in (1, 2)
    assert content["val_macro_f1"] == run.history["val_macro_f1"].max() == run.record["scores"]["val"]["macro_f1"]
    low, high = content["test_interval_95"]
    assert 0 <= low <= content["test_macro_f1"] <= high <= 1
    assert np.mean([content["test_per_class_f1"][name] for name in CLASSES]) == pytest.approx(content["test_macro_f1"])


def test_train_in_words_uses_settings_for_what_is_left_out(call, call_json, project, monkeypatch):
    monkeypatch.setenv("CT_WEIGHTS", "random")
    code, out, error = call("train", "--backbone", BN, "--epochs", "1", "--size", "64")
    assert code == 0 and error == ""
    (folder,) = (project / "data" / "runs").glob("quick-set-*")
    run = load_run(folder / BN)
    assert (run.record["weights"]["kind"], run.record["data"]["name"], run.plan.batch_size) == ("random", "set", 16)
    assert "random weights, as asked for" in out, "the banner of random weights"
    assert re.search(r"macro F1: validation 0\.\d{3} \(best epoch 1 of 1\), test [01]\.\d{3}, 95 % interval", out)
    assert "weights: random" in out and str(folder / BN) in out
    assert "fewer than 20 test slices of ILD 4" in out
    assert re.search(r"^Next:\n  \S+ -m ctutils check ", out, re.MULTILINE)
    for words in (["train", "--device", "tpu"], ["results", "--profile", "huge"]):
        with monkeypatch.context() as patch:  # the options set the variables
            patch.setenv("CT_DEVICE", "cpu")
            patch.setenv("CT_PROFILE", "quick")
            assert f"{words[1][2:]} '{words[2]}'" in call(*words)[2]
    assert call_json("results")["runs"][0]["backbone"] == f"{BACKBONES[BN].title}, 64 pixels", (
        "results look where train writes"
    )


def test_train_replaces_no_record_of_other_slices(call, mistake, project, tmp_path):
    root = write_set(tmp_path / "set")
    words = ["train", root, "--out", tmp_path / "run", *TINY]
    assert call(*words)[0] == 0 and call(*words)[0] == 0, "the same slices: replaced"
    before = files_below(tmp_path / "run")
    words[1] = project / "set"  # of the same name
    mistake(*words, says=["the record 'run' of other slices", "--out"])
    assert files_below(tmp_path / "run") == before
    assert call(*words[:2], "--out", tmp_path / "two", *TINY)[0] == 0


def test_banner_of_random_weights_is_said_once(call, project, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(weights, "_imagenet_file", lambda spec: (_ for _ in ()).throw(OSError("no network")))
    weights._warn_once.cache_clear()
    words = ["train", project / "set", "--out", tmp_path / "run", *TINY[:-2], "--weights", "auto"]
    code, out, _ = call(*words)
    assert code == 0 and (out + caplog.text).count("random weights, because no network") == 1


def test_train_without_test_split_says_so(call, call_json, tmp_path):
    root = write_set(tmp_path / "set", splits=("Training", "Validation"))
    words = ["train", root, "--out", tmp_path / "run", *TINY]
    assert call_json(*words)["test_from_val"] is True
    assert "half of the validation slices" in call(*words)[1]
    root = write_set(tmp_path / "two", splits=("train",), per_class=8)
    code, out, _ = call("train", root, "--out", tmp_path / "run 2", *TINY)
    assert code == 0 and "no val split: 15% of train drawn for val and for test" in out
    record = load_run(tmp_path / "run 2").record["data"]
    assert "no val split" in record["notes"][0] and sum(record["counts"]["test"].values()) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--backbone", "resnet51"], "backbone = 'resnet51'"),
        (["--augment", "warp"], "warp"),
        (["--lr", "nan"], "lr = nan"),
        (["--views", "2"], "would do nothing"),
        (["--weights", "no/such/folder"], "weights 'no"),
    ],
)
def test_mistake_is_one_message_and_exit_code_2(call, mistake, project, tmp_path, words, says):
    words = ["train", project / "set", "--out", tmp_path / "run", *TINY, *words]
    mistake(*words, says=[says])
    code, printed, error = call(*words, "--json")
    assert code == 2 and f"Error: {json.loads(printed)['error']}\n" == error
    assert [name for name in files_below(tmp_path) if "lock" not in name] == []


@pytest.mark.parametrize(("variable", "value"), [("CT_PROFILE", "huge"), ("CT_DEVICE", "tpu"), ("CT_DATA", "no/such")])
def test_wrong_variable_is_one_message(mistake, monkeypatch, tmp_path, variable, value):
    monkeypatch.setenv(variable, value)
    mistake("train", "--out", tmp_path / "run", *QUICK, says=[variable, value])


@pytest.mark.parametrize(("name", "content"), [("slice 0.png", b"hello"), ("a\rb.png", b"")])
def test_bad_data_is_one_message(mistake, tmp_path, name, content):
    root = write_set(tmp_path / "set")
    (root / "val" / "Normal" / name).write_bytes(content)
    mistake("train", root, "--out", tmp_path / "run", *QUICK, says=["Normal", repr(name)[1:-1]])
    assert not (tmp_path / "run").exists()


def test_ctrl_c_and_resume(call, call_json, project, tmp_path, monkeypatch):
    words = ["train", project / "set", *TINY, "--epochs", "3", "--out", tmp_path / "run"]
    for epoch in (1, 2):
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, epoch)
            code, out, error = call(*words)
        assert code == 130, "exit code 0 is for success alone"
        assert error.startswith("Stopped.") if epoch == 1 else "--resume" in out
    assert load_run(tmp_path / "run").record["interrupted"] is True
    assert call_json(*words, "--resume")["interrupted"] is False
    assert len(load_run(tmp_path / "run").history) == 3


# --- predict and results ---


def test_predict_says_what_the_record_says(call, call_json, mistake, project, run_folder, tmp_path):
    run = load_run(run_folder)
    paths = [project / "set" / path for path in run.predictions["path"]]
    rows = call_json("predict", run_folder, *paths)["predictions"]
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    found = np.array([[row["probabilities"][name] for name in CLASSES] for row in rows])
    np.testing.assert_allclose(found, run.predictions[[f"p_{name}" for name in CLASSES]].to_numpy(), atol=2e-3)
    assert [row["class"] for row in rows] == [CLASSES[k] for k in found.argmax(1)]
    code, out, _ = call("predict", run_folder, paths[0])
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["slice", "class", "confidence"]
    assert lines[1].split() == ["slice", "0.png", rows[0]["class"], f"{rows[0]['confidence']:.2f}"]
    assert lines[2] == "Not for clinical use."
    (tmp_path / "text.png").write_text("hello")
    mistake("predict", run_folder, tmp_path / "text.png", says=["text.png"])
    code, out, error = call("predict", run_folder, paths[0], tmp_path / "text.png", "--json")
    assert code == 2 and [row["image"] for row in json.loads(out)["predictions"]] == [str(paths[0])]
    assert json.loads(out)["failed"] == {str(tmp_path / "text.png"): "not a picture"}
    check_message(error, "1 file(s)", "text.png' (not a picture)")
    mistake("predict", tmp_path / "no run", paths[0], says=["no run record"])


def test_results_name_a_damaged_record_and_show_the_rest(call, call_json, mistake, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "runs" / "good")
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "run.json").write_text('{"name": ')
    content = call_json("results", tmp_path / "runs")
    assert [row["backbone"] for row in content["runs"]] == [f"{BACKBONES[BN].title}, 64 pixels"]
    assert len(content["problems"]) == 1 and content["problems"][0].startswith("damaged: Found")
    assert (
        "| head only | MobileNetV3, 64 pixels, random weights | 0."
        in call("results", tmp_path / "runs", "--markdown")[1]
    )
    (tmp_path / "runs" / "good" / "predictions.csv").unlink()
    code, out, _ = call("results", tmp_path / "runs")
    assert code == 1 and "Left out: good" in out and "predictions.csv" in out
    (tmp_path / "empty").mkdir()
    mistake("results", tmp_path / "empty", says=["no run record", "empty"])
    mistake("results", tmp_path / "none", says=["no folder", "none"])


def test_no_odd_value_in_a_record_is_a_traceback(call, run_folder, project, tmp_path):
    """Every key of run.json with odd values: the record is named, or shown; the others are shown in any case."""

    def places(record: dict):
        for key, value in record.items():
            yield record, key
            if isinstance(value, dict):
                yield from places(value)

    record = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    shutil.copytree(run_folder, tmp_path / "good")
    count = len(list(places(record)))
    for number in range(count):
        for odd in (None, "x", -1, {"level": 1, "width": "a"}, "\ud800"):
            broken = copy.deepcopy(record)
            place, key = list(places(broken))[number]
            place[key] = odd
            folder = shutil.copytree(run_folder, tmp_path / f"{number} {key} {odd!r}".replace("\\", ""))
            (folder / "run.json").write_text(json.dumps(broken), encoding="utf-8")
    code, out, error = call("results", tmp_path, "--json")
    assert code == 0, error
    content = json.loads(out)
    assert code == 0 and len(content["runs"]) + len(content["problems"]) == 5 * count + 1
    assert len(content["problems"]) > 3 * count and all(": Found" in problem for problem in content["problems"])
    code, out, _ = call("results", tmp_path, "--markdown")
    assert code == 0 and out.count("| MobileNetV3") == len(content["runs"])
    image, shown = project / "set" / "val" / "ILD" / "slice 0.png", [row["run"] for row in content["runs"]]
    for words in [("--card", name) for name in shown[::4]] + [("predict", name) for name in shown[::4]]:
        command = (
            ["results", "--card", tmp_path / words[1]] if words[0] == "--card" else ["predict", tmp_path / words[1]]
        )
        code, _, error = call(*command, *([image] if words[0] == "predict" else []))
        assert code == 0 or (code == 2 and error.count("\n") == 1), (words, error)


def test_model_card_says_what_the_check_finds(call, call_json, mistake, run_folder, project):
    for file in (project / "data" / "cache" / "audit").glob("*"):
        file.unlink()
    anew = call("results", "--card", run_folder)[1]  # the slices are at hand
    assert call("check", project / "set", "--json")[0] in (0, 1)
    assert call("results", "--card", run_folder)[1] == anew
    card = call_json("results", "--card", run_folder)["card"]
    assert card.startswith("# Model card: first run") and "- info: counts: 36 slices" in card
    mistake("results", "--card", run_folder / "none")


# --- import, synth, check ---


def test_import_synth_and_check(call, call_json, mistake, project, tmp_path):
    code, out, _ = call("import", project / "set", tmp_path / "as text")
    assert code == 0 and re.search(r"^ILD +4 +4 +4$", out, re.MULTILINE) and "{" not in out and "ctutils check" in out
    content = call_json("import", project / "set", tmp_path / "imported")
    assert content["images"] == content["written"] == 36
    assert call_json("import", project / "set", tmp_path / "imported")["already_there"] == 36
    out = tmp_path / "세트"
    content = call_json("synth", out, "--train", "10", "--val", "10", "--test", "0", "--workers", "1")
    assert content["out"] == str(out) and sum(content["counts"]["train"].values()) == 10
    assert len(list((out / "val").rglob("*.png"))) == 10
    mistake("synth", out, "--train", "-1", says=["-1"])
    (tmp_path / "imported" / "train" / "ILD" / "slice 0.png").write_bytes(b"hello")
    code, out, _ = call("check", tmp_path / "imported")
    assert code == 1 and "slice 0.png" in out
    code, out, error = call("check", tmp_path / "none")  # a finding like others, not a mistake of the command line
    assert code == 1 and "no folder" in out and error == ""


# --- What the system refuses ---


@pytest.mark.parametrize("kind", ["long", "NUL", "dangling", "circle", "deep"])
def test_odd_path_is_one_line_in_every_command(call, project, run_folder, tmp_path, monkeypatch, kind):
    odd, here = str(tmp_path / {"long": "x" * 300, "NUL": "a\0b"}.get(kind, kind)), project / "set"
    if kind in ("dangling", "circle"):
        Path(odd).symlink_to(tmp_path / ("nowhere" if kind == "dangling" else "circle"))
    if kind == "deep":
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "run.json").write_text("[" * 10**5)
    image = here / "val" / "ILD" / "slice 0.png"
    commands = [
        *(["train", odd, *TINY], ["train", here, *TINY, "--weights", odd], ["train", here, *TINY, "--test-data", odd]),
        *(["sweep", odd, "--list"], ["import", odd, tmp_path / "out"], ["predict", odd, image]),
        *(["predict", run_folder, odd], ["predict", run_folder, image, "--weights", odd], ["results", "--card", odd]),
        *(["check", odd],) * (kind != "deep"),
        *(["results", odd],) * (kind != "deep"),
        *(["train", str(here), "--out", odd, *TINY],) * (kind in ("long", "NUL", "circle")),
        *(["import", here, odd], ["synth", odd, "--train", "10", "--val", "10", "--workers", "1"]) * (kind != "deep"),
    ]
    for command in commands:
        code, _, error = call(*command, *(["--out", tmp_path / "run"] if command[:2] == ["train", here] else []))
        if command[0] == "check" and code == 1:
            continue
        assert code == 2, command
        check_message(error)
    monkeypatch.setenv("CT_DEBUG", "1")
    with pytest.raises((OSError, ValueError, RuntimeError)):
        cli.main(["train", odd, *TINY])


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "없음é"), ("cp949", "없음\\xe9"), ("cp1252", "\\uc5c6\\uc74cé")]
)
def test_no_traceback_in_a_shell_whatever_its_encoding(tmp_path, encoding, shown):
    command = [sys.executable, "-m", "ctutils", "results", str(tmp_path / "없음é"), "--json"]
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, env=env)
    assert done.returncode == 2 and "없음é" in json.loads(done.stdout.decode("utf-8"))["error"]
    assert "없음é" in done.stderr.decode("utf-8"), "with --json all is UTF-8"
    done = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, timeout=120, env=env)
    assert done.returncode == 2 and done.stdout == b""
    check_message(done.stderr.decode(encoding).replace("\r\n", "\n"), shown)


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
