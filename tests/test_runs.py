"""runs: a record is complete, checked, written as a whole, and by one run at a time."""

import builtins
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ctutils import metrics, runs
from ctutils.base import CTError
from ctutils.runs import claim, list_runs, load_run, new_record, save_run

CLASSES = ["ILD", "Normal", "폐렴"]


def make_record(**changes):
    fields = {
        "data": {
            "name": "tiny",
            "kind": "synthetic",
            "fingerprint": "f0",
            "counts": {},
            "test_from_val": False,
        },
        "classes": CLASSES,
        "profile": "quick",
        "backbone": "resnet50",
        "weights": {"kind": "random", "source": "none", "sha256": None, "note": ""},
        "bn": "frozen",
        "standardised": True,
        "trained": "head",
        "augment": None,
        "seed": 0,
        "optimizer": {"name": "adam", "lr": 1e-3},
        "scheduler": {"name": "step"},
        "epochs": 2,
        "batch_size": 4,
        "image_size": 32,
        "precision": "float32",
        "device": "cpu",
        "seconds": {"features": 1.0, "train": 2.0, "total": 3.0},
        "parameters": {"trained": 3, "frozen": 5},
        "best_epoch": 1,
        "scores": {"val": {"macro_f1": 0.5}},
    }
    return new_record(**{**fields, **changes})


def make_history(epochs=2):
    table = {name: np.linspace(0.1, 0.9, epochs) for name in runs.HISTORY_COLUMNS}
    return pd.DataFrame({**table, "epoch": range(1, epochs + 1)})


def make_predictions(seed=0, per_split=6):
    rng = np.random.default_rng(seed)
    rows = 2 * per_split
    scores = rng.dirichlet(np.ones(3), rows).astype(np.float32)
    table = pd.DataFrame(
        {
            "path": [f"{'val' if i < per_split else 'test'}/한글 폴더/slice {i}.png" for i in range(rows)],
            "split": ["val"] * per_split + ["test"] * per_split,
            "label": np.arange(rows) % 3,
        }
    )
    return table.join(pd.DataFrame(scores, columns=[f"p_{name}" for name in CLASSES]))


def save(folder, **changes):
    given = {"record": make_record(), "history": make_history(), "predictions": make_predictions()}
    return save_run(folder, **{**given, **changes})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "실행 기록" / "resnet50 시드0"


def leftovers(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_round_trip_is_exact(folder):
    tensors = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.int64(7)}
    predictions = make_predictions()
    assert save(folder, predictions=predictions, tensors=tensors) == folder
    run = load_run(folder)
    assert run.name == folder.name == run.record["name"]
    assert run.classes == tuple(CLASSES) and run.splits == ("val", "test")
    np.testing.assert_array_equal(run.y_true("test"), predictions["label"][6:])
    assert run.y_true("test").dtype == np.int64
    stored = predictions[[f"p_{name}" for name in CLASSES]].to_numpy()[6:]
    np.testing.assert_array_equal(run.y_score("test").astype(np.float32), stored)
    assert run.tensors_path == folder / "head.safetensors"
    back = run.load_tensors()
    np.testing.assert_array_equal(back["weight"], tensors["weight"])
    assert back["count"].shape == () and back["count"] == 7
    assert leftovers(folder) == []  # no lock, no temporary folder


def test_torch_tensors_are_stored(folder):
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    save(folder, tensors=tensors, tensors_name="model.safetensors")
    run = load_run(folder)
    assert run.tensors_path.name == "model.safetensors"
    np.testing.assert_array_equal(run.load_tensors()["a"], tensors["a"].numpy())
    np.testing.assert_array_equal(run.load_tensors()["b"], np.ones(2))


def test_runs_does_not_import_torch():
    code = "import sys, ctutils.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_class_may_be_called_na_and_keep_its_rows(tmp_path):
    predictions = make_predictions().rename(columns={"p_ILD": "p_NA"})
    predictions["path"] = [f"NA/{i}" for i in range(len(predictions) - 1)] + ["NA"]
    save(tmp_path / "r", record=make_record(classes=["NA", *CLASSES[1:]]), predictions=predictions)
    assert load_run(tmp_path / "r").predictions["path"].iloc[-1] == "NA"


def test_new_record_fills_in_and_makes_plain():
    record = make_record(seed=np.int64(3), best_epoch=np.float64("nan"), classes=tuple(CLASSES))
    assert record["seed"] == 3 and type(record["seed"]) is int and record["best_epoch"] is None
    assert record["classes"] == CLASSES
    assert record["created"].endswith("+00:00")
    assert set(record["versions"]) == {"python", "torch", "torchvision", "numpy"}
    assert record["versions"]["numpy"] == np.__version__
    json.dumps(record, allow_nan=False)


def test_git_commit_is_none_outside_git(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(runs.subprocess, "run", no_git)
    assert make_record()["git_commit"] is None


def test_new_record_names_what_is_missing():
    with pytest.raises(CTError, match=r"data\.kind"):
        make_record(data={"name": "x", "fingerprint": "f", "counts": {}, "test_from_val": False})
    with pytest.raises(CTError, match="profile"):
        new_record(seed=0)
    with pytest.raises(CTError, match="weights as an object"):
        make_record(weights="random")
    with pytest.raises(CTError, match="two or more"):
        make_record(classes=["Normal"])


@pytest.mark.parametrize("text", ["/home/kim/x.pth", "read from /data/w.pth", "C:\\x\\y.pth", "file:///a", "\\\\pc\\x"])
def test_absolute_paths_are_refused(text):
    weights = {"kind": "folder", "source": text, "sha256": None, "note": ""}
    with pytest.raises(CTError, match="absolute path"):
        make_record(weights=weights)


@pytest.mark.parametrize("text", ["https://download.pytorch.org/x.pth", "train/val 50 / 50", "weights/x.pth", "n/a"])
def test_other_texts_pass(text):
    make_record(weights={"kind": "folder", "source": text, "sha256": None, "note": ""})


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: t.drop(columns="p_ILD"), "p_ILD"),
        (lambda t: t.assign(label=9), "label"),
        (lambda t: t.assign(p_ILD=np.nan), "probabilities"),
        (lambda t: t.assign(p_ILD=5.0), "probabilities"),
        (lambda t: t.assign(path="/abs/" + t["path"]), "absolute"),
        (lambda t: t.assign(path="same"), "twice"),
        (lambda t: t.iloc[:0], "without a row"),
    ],
)
def test_bad_predictions_are_refused_before_anything_is_written(folder, change, text):
    with pytest.raises(CTError, match=text):
        save(folder, predictions=change(make_predictions()))
    assert not folder.exists()


def test_bad_history_and_tensors_name(folder):
    with pytest.raises(CTError, match="lr"):
        save(folder, history=make_history().drop(columns="lr"))
    with pytest.raises(CTError, match="without a row"):
        save(folder, history=make_history(0))
    with pytest.raises(CTError, match="weights.bin"):
        save(folder, tensors={}, tensors_name="weights.bin")


def test_a_new_record_replaces_the_older_one(folder):
    save(folder, tensors={"a": np.ones(2)}, tensors_name="model.safetensors")
    save(folder, record=make_record(seed=5))
    run = load_run(folder)
    assert run.record["seed"] == 5 and run.tensors_path is None
    assert leftovers(folder) == []
    with pytest.raises(CTError, match="no weights"):
        run.load_tensors()


@pytest.mark.parametrize("part", ["predictions.csv", "head.safetensors"])
def test_a_full_disk_loses_nothing(folder, monkeypatch, part):
    save(folder, tensors={"a": np.zeros(3)})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if part == "predictions.csv":
        monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    else:
        monkeypatch.setattr(runs.Path, "write_bytes", full)
    with pytest.raises(CTError, match="full disk"):
        save(folder, record=make_record(seed=5), tensors={"a": np.ones(3)})
    monkeypatch.undo()
    assert load_run(folder).record["seed"] == 0
    np.testing.assert_array_equal(load_run(folder).load_tensors()["a"], np.zeros(3))
    assert leftovers(folder) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device /dev/full")
def test_a_really_full_device(folder, monkeypatch):
    real_open = builtins.open
    to_csv = pd.DataFrame.to_csv

    def to_full(self, path, **options):
        with real_open("/dev/full", "w", encoding="utf-8") as file:
            to_csv(self, file, index=False)

    monkeypatch.setattr(pd.DataFrame, "to_csv", to_full)
    with pytest.raises(CTError, match="full disk"):
        save(folder)
    assert leftovers(folder) == []


def test_a_folder_that_may_not_be_written(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(runs.os, "open", refuse)
    with pytest.raises(CTError, match="may not be written"):
        save(folder)


def test_a_failing_last_rename_brings_the_older_record_back(folder, monkeypatch):
    save(folder)
    rename = os.rename

    def break_second(source, target):
        if str(source).endswith(f".tmp-{folder.name}"):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(runs.os, "rename", break_second)
    with pytest.raises(OSError, match="broken"):
        save(folder, record=make_record(seed=5))
    monkeypatch.undo()
    assert leftovers(folder) == []
    assert load_run(folder).record["seed"] == 0


def test_a_save_killed_between_the_renames_is_mended(folder):
    save(folder)
    os.rename(folder, folder.with_name(f".old-{folder.name}"))
    found, problems = list_runs(folder.parent)
    assert [run.name for run in found] == [folder.name] and not problems
    assert leftovers(folder) == []


def test_a_second_run_is_refused_while_the_first_holds_the_record(folder):
    code = "import sys, ctutils.runs as r\nwith r.claim(sys.argv[1]): print('ok', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:
        assert other.stdout.readline() == "ok\n"
        with pytest.raises(CTError, match=f"process {other.pid}"):
            save(folder)
        assert not folder.exists()
        other.kill()  # its lock stays behind, and is taken over
        other.wait()
        assert folder.with_name(folder.name + ".lock").exists()
        save(folder)
    assert leftovers(folder) == []


def test_another_thread_is_refused_and_the_same_thread_is_not(folder):
    caught = []

    def second():
        try:
            save(folder)
        except CTError as error:
            caught.append(error)

    with claim(folder):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(caught) == 1 and "held by" in str(caught[0])
        save(folder)  # the holder itself
        assert folder.with_name(folder.name + ".lock").exists()  # still held after the inner save
    assert leftovers(folder) == []


@pytest.mark.parametrize(
    "content, seconds_old, taken",
    [
        ({"pid": 2**22 + 1, "host": socket.gethostname()}, 0, True),  # no such process
        ({"pid": os.getppid(), "host": socket.gethostname()}, 0, False),  # lives
        ({"pid": os.getpid(), "host": socket.gethostname()}, 0, True),  # our pid, but not our claim
        ({"pid": 2**22 + 1, "host": "another-machine"}, 9999, False),  # cannot be known
        (None, 0, False),  # just being written
        (None, 60, True),  # its owner died while writing
    ],
)
def test_stale_locks(folder, content, seconds_old, taken):
    folder.parent.mkdir(parents=True)
    lock = folder.with_name(folder.name + ".lock")
    lock.write_text("" if content is None else json.dumps(content), encoding="utf-8")
    then = lock.stat().st_mtime - seconds_old
    os.utime(lock, (then, then))
    if taken:
        with claim(folder):
            assert json.loads(lock.read_text(encoding="utf-8"))["pid"] == os.getpid()
        assert not lock.exists()
    else:
        with pytest.raises(CTError, match="held by"), claim(folder):
            pass
        assert lock.exists()


def test_a_failed_run_releases_its_claim(folder):
    with pytest.raises(KeyboardInterrupt), claim(folder):
        raise KeyboardInterrupt
    with claim(folder):
        pass


@pytest.mark.parametrize("part", ["run.json", "history.csv", "predictions.csv", "head.safetensors"])
@pytest.mark.parametrize("how", ["missing", "zero", "cut", "binary"])
def test_a_corrupt_part_is_named_and_the_others_are_listed(tmp_path, part, how):
    save(tmp_path / "good")
    bad = save(tmp_path / "bad", tensors={"a": np.ones(100)}) / part
    if how == "missing":
        bad.unlink()
    elif how == "zero":
        bad.write_bytes(b"")
    elif how == "cut":
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    else:
        bad.write_bytes(bytes(range(256)) * 4)
    found, problems = list_runs(tmp_path)
    if how == "missing" and part == "head.safetensors":  # weights are optional
        assert len(found) == 2 and not problems
        return
    assert [run.name for run in found] == ["good"]
    assert len(problems) == 1 and problems[0].startswith("bad:") and part in problems[0]
    with pytest.raises(CTError, match=part):
        load_run(tmp_path / "bad")


def test_predictions_cut_at_a_line_end(tmp_path):
    path = save(tmp_path / "r") / "predictions.csv"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:-2]), encoding="utf-8")
    with pytest.raises(CTError, match="10 rows of 12"):
        load_run(tmp_path / "r")


def make_folder(predictions):
    slices = predictions[["path", "split", "label"]]
    counts = pd.DataFrame({"val": [2, 2, 2], "test": [2, 2, 2]}, index=CLASSES)
    return SimpleNamespace(
        name="tiny", kind="synthetic", fingerprint="f0", meta={"test_from_val": True}, classes=tuple(CLASSES),
        slices=slices, counts=lambda: counts,
    )  # fmt: skip


def test_predictions_table_keeps_order_and_checks_length():
    expected = make_predictions()
    scores = expected[[f"p_{name}" for name in CLASSES]].to_numpy()
    table = runs.predictions_table(make_folder(expected), {"val": scores[:6], "test": scores[6:]})
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    with pytest.raises(CTError, match="5 scores for 'val'"):
        runs.predictions_table(make_folder(expected), {"val": scores[:5]})


def test_describe_run_computes_its_scores(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Weights:
        kind: str = "random"
        source: str = "seed 0"
        sha256: str | None = None
        note: str = ""

    class Adam:
        defaults = {"lr": 0.001}

    class StepLR:
        step_size, gamma = 7, 0.1

    predictions = make_predictions()
    given = {key: value for key, value in make_record().items() if key in runs.REQUIRED}
    for key in ("data", "classes", "profile", "device", "weights", "optimizer", "scheduler", "best_epoch", "scores"):
        del given[key]
    record = runs.describe_run(
        make_folder(predictions),
        SimpleNamespace(profile=SimpleNamespace(name="quick"), device="cpu"),
        weights=Weights(),
        result=SimpleNamespace(best_epoch=2, interrupted=False),
        optimizer=Adam(),
        scheduler=StepLR(),
        predictions=predictions,
        **given,
    )
    run = load_run(save(tmp_path / "r", record=record, predictions=predictions))
    y_true, y_score = run.y_true("test"), run.y_score("test")
    value, low, high = metrics.bootstrap_interval(y_true, y_score)
    scores = run.record["scores"]
    assert (scores["test"]["macro_f1"], scores["test"]["low"], scores["test"]["high"]) == (value, low, high)
    assert "low" not in scores["val"]  # the interval belongs to the final figure
    assert scores["test"]["per_class"] == pytest.approx(metrics.per_class(y_true, y_score, CLASSES)["f1"].to_dict())
    assert run.record["scheduler"] == {"name": "StepLR", "step_size": 7, "gamma": 0.1}
    assert run.record["data"]["test_from_val"] and run.record["data"]["counts"]["val"]["폐렴"] == 2


def test_missing_folder_and_split(tmp_path):
    with pytest.raises(CTError, match="no run record"):
        load_run(tmp_path / "none")
    assert list_runs(tmp_path / "none") == ([], [])
    with pytest.raises(CTError, match="no 'train' predictions"):
        load_run(save(tmp_path / "r")).y_true("train")


def test_damaged_weights_found_when_read(tmp_path):
    run = load_run(save(tmp_path / "r", tensors={"a": np.ones(4)}))
    run.tensors_path.write_bytes(b"x")
    with pytest.raises(CTError, match="damaged"):
        run.load_tensors()
