"""runs: a record is complete, checked, written as a whole, and by one run at a time."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_below, user_error

from ctutils import runs
from ctutils.plan import Plan
from ctutils.runs import claim, list_runs, load_run, predictions_table, save_run

CLASSES = ["ILD", "file:x", "폐렴"]
RECORD = {
    "plan": Plan("resnet50", data="/data/hospital/lungs", epochs=2, batch_size=4, size=64, weights="random").to_json(),
    "data": {
        **{
            "name": "lungs from /data/hospital",
            "kind": "synthetic",
            "fingerprint": "f0",
            "counts": {"val": {"ILD": 2}},
        },
        **{"test_from_val": False, "shortcut": None, "patients": None},
        "window": {"level": -600, "width": 1500.0, "unit": "HU"},
    },
    **{"classes": CLASSES, "profile": "quick", "device": "cpu", "bn": "adapt", "standardised": True, "trained": "head"},
    "weights": {"kind": "random", "source": "random, seed 0", "sha256": "ab", "note": "", "seed": 0},
    **{"precision": "float32", "lr": 1e-3, "lr_range": None, "at_once": None, "best_epoch": 1, "interrupted": False},
    "parameters": {"trained": 3, "frozen": 5},
    "seconds": {"features": 1, "train": 2.0, "total": 3.0},
    "scores": {"val": {"macro_f1": 0.5}},
}


def make_history(epochs=2):
    table = {name: np.linspace(0.1, 0.9, epochs) for name in runs.HISTORY_COLUMNS}
    return pd.DataFrame({**table, "epoch": range(1, epochs + 1)})


def make_predictions(patients=False):
    scores = np.random.default_rng(0).dirichlet(np.ones(3), 12)
    table = pd.DataFrame(
        {
            "path": [f"{'val' if i < 6 else 'test'}/한글 폴더/slice {i}.png" for i in range(12)],
            "split": ["val"] * 6 + ["test"] * 6,
            "label": np.arange(12) % 3,
        }
    )
    if patients:
        table["patient"] = [f"{i:03}" if i % 5 else "" for i in range(12)]
    return table.join(pd.DataFrame(scores, columns=[f"p_{name}" for name in CLASSES]))


def save(folder, tensors=None, history=None, predictions=None, **changes):
    history = make_history() if history is None else history
    return save_run(
        folder, RECORD | changes, history, make_predictions() if predictions is None else predictions, tensors
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "실행 기록" / "resnet50 시드0"


def content(folder):
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


@pytest.mark.parametrize("patients", [False, True])
def test_round_trip_is_exact(folder, patients):
    predictions = make_predictions(patients)
    tensors = {"weight": torch.arange(6.0).reshape(2, 3)}
    assert save(folder, tensors, predictions=predictions, versions={"x": "1"}) == folder
    assert files_below(folder.parent) == [
        f"{folder.name}/{name}" for name in ("head.safetensors", "history.csv", "predictions.csv", "run.json")
    ], "nothing temporary is left"
    run = load_run(folder)
    assert (run.name, run.classes, run.splits) == (folder.name, tuple(CLASSES), ("val", "test"))
    assert run.plan == Plan("resnet50", data="lungs", epochs=2, batch_size=4, size=64, weights="random")
    assert {key: run.record[key] for key in RECORD} == RECORD
    assert run.record["created"].endswith("+00:00") and run.record["rows"] == {"history": 2, "predictions": 12}
    np.testing.assert_array_equal(run.y_true("test"), predictions["label"][6:])
    assert run.y_true("test").dtype == np.int64
    stored = predictions[[f"p_{name}" for name in CLASSES]].to_numpy()[6:]
    np.testing.assert_allclose(run.y_score("test"), stored, rtol=1e-7)
    assert (
        (run.patients("val").tolist() == ["", "001", "002", "003", "004", ""]) if patients else not run.patients("val")
    )
    np.testing.assert_array_equal(run.load_tensors()["weight"], tensors["weight"].numpy())
    assert run.record["versions"] == {"x": "1"} and len(run.record["git_commit"] or "0" * 40) == 40
    with user_error("no 'train' predictions", "val, test"):
        run.y_true("train")


def test_numpy_values_and_nan_become_plain(folder):
    scores = {"val": {"macro_f1": np.float64(0.5), "low": float("nan"), "per_class": np.array([0.5, np.inf])}}
    record = load_run(save(folder, best_epoch=np.int64(1), classes=tuple(CLASSES), scores=scores)).record
    assert record["best_epoch"] == 1 and record["classes"] == CLASSES
    assert record["scores"]["val"] == {"macro_f1": 0.5, "low": None, "per_class": [0.5, None]}


def test_a_record_that_could_not_be_read_is_not_written(folder):
    for changes, word in (
        ({"plan": {}}, "plan"),
        ({"data": RECORD["data"] | {"window": {"level": 3}}}, "data.window"),
        ({"classes": ["Normal"]}, "classes"),
        ({"weights": "random"}, "weights"),
        ({"lr": "range"}, "lr"),
    ):
        with user_error("the new record", word):
            save(folder, **changes)
    assert not folder.exists()


def test_a_new_record_replaces_the_older_one(folder):
    save(folder, {"a": torch.ones(2)}, trained="all")
    assert load_run(folder).tensors_path.name == "model.safetensors"
    save(folder, best_epoch=2)
    run = load_run(folder)
    assert run.record["best_epoch"] == 2 and run.tensors_path is None
    with user_error("no weights in the record"):
        run.load_tensors()


@pytest.mark.parametrize("part", ["run.json", "predictions.csv", "head.safetensors"])
def test_a_full_disk_loses_nothing(folder, monkeypatch, part):
    save(folder, {"a": torch.zeros(3)})
    before = content(folder)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if part == "predictions.csv":
        monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    elif part == "run.json":
        monkeypatch.setattr(runs, "write_json", full)
    else:
        monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, {"a": torch.ones(3)}, best_epoch=2)
    assert content(folder) == before


def test_a_record_open_in_excel_is_said_before_anything_is_lost(folder, monkeypatch):
    save(folder, {"a": torch.zeros(3)})
    before, rename = content(folder), os.rename

    def windows(old, new):
        if Path(old).name == "history.csv":
            raise PermissionError(13, "used by another process")
        rename(old, new)

    monkeypatch.setattr(os, "rename", windows)
    for call in (runs.check_replaceable, save):  # before training, and before writing
        with user_error("history.csv", "another program", "Excel"):
            call(folder)
    assert content(folder) == before


@pytest.mark.parametrize("number", range(6))
def test_a_save_killed_between_two_files_shows_as_damaged(folder, monkeypatch, number):
    """After any number of renames: the older record, the new one, or one that says: train this run again."""
    save(folder, {"a": torch.zeros(3)})
    done, real = [], os.replace

    def killed(*args):
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(real(*args))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.os, "replace", killed)
        save(folder, {"a": torch.ones(3)}, best_epoch=2)
        raise KeyboardInterrupt
    found, problems = list_runs(folder.parent)
    assert [run.record["best_epoch"] for run in found] == ([1] if number == 0 else [2] if number == 5 else [])
    assert len(found) + len(problems) == 1
    save(folder, best_epoch=2)
    assert load_run(folder).record["best_epoch"] == 2, "what a killed save left behind is replaced"


def test_files_of_the_user_stop_a_record_and_stay(folder):
    save(folder)
    for name in ("notes.md", "figures/a.png", ".secret"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        before = content(folder)
        with user_error("something else than a run record", name.split("/")[0], "left as it was"):
            save(folder)
        assert content(folder) == before
        (folder / name).unlink()
        if "/" in name:
            (folder / name).parent.rmdir()
    (folder / ".DS_Store").write_text("came by itself")
    save(folder)
    thesis = folder.with_name("thesis.txt")
    thesis.write_text("three years of work")
    with user_error("something else than a run record"):
        save(thesis)
    assert thesis.read_text() == "three years of work"


# ---------------------------------------------------------------- one at a time


def test_a_second_process_is_refused_and_a_dead_one_is_no_hindrance(folder):
    code = "import sys, ctutils.runs as r\nwith r.claim(sys.argv[1]): print('ok', flush=True); input()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], env=env, **pipes) as other:
        assert other.stdout.readline() == "ok\n"
        for _ in range(2):  # asking again takes nothing away
            with user_error("held by another run", "choose another name"), claim(folder):
                pass
        other.kill()  # its lock file stays behind
        other.wait()
    with claim(folder):
        save(folder)
    assert [run.name for run in list_runs(folder.parent)[0]] == [folder.name], "lock files are no records"


def test_a_claim_holds_against_threads_and_ends_with_its_block(folder):
    def second():
        with ThreadPoolExecutor(1) as pool, pool.submit(claim, folder).result():
            pass

    with pytest.raises(KeyboardInterrupt), (held := claim(folder)):
        with user_error("held by another run"):
            second()
        raise KeyboardInterrupt
    with claim(folder):
        assert held, "a failed run frees its name"


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("part", runs.RECORD_FILES[0:1] + runs.RECORD_FILES[2:])
@pytest.mark.parametrize("how", ["missing", "zero", "cut", "binary", "deep"])
def test_a_corrupt_part_is_named_and_the_others_are_listed(tmp_path, part, how):
    save(tmp_path / "good")
    bad = save(tmp_path / "bad", {"a": torch.ones(100)}) / part
    whole = bad.read_bytes()
    damage = {"zero": b"", "cut": whole[: len(whole) // 2], "binary": bytes(range(256)) * 4, "deep": b"[" * 10**5}
    bad.unlink()
    if how != "missing":
        bad.write_bytes(damage[how])
    found, problems = list_runs(tmp_path)
    if part == "head.safetensors":  # weights are optional, and read when they are needed
        assert len(found) == 2 and not problems
        with user_error("no weights" if how == "missing" else part):
            found[0].load_tensors()
        return
    assert [run.name for run in found] == ["good"]
    assert len(problems) == 1 and problems[0].startswith("bad: Found") and part in problems[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop(columns="p_ILD"), "p_ILD"),
        (lambda t: t.assign(label=9), "label that is not 0 to 2"),
        (lambda t: t.assign(label="x"), "'x'"),
        (lambda t: t.assign(p_ILD=np.nan), "float"),
        (lambda t: t.assign(p_ILD=5.0), "sum to 1"),
        (lambda t: t.assign(p_ILD=-1.0, **{"p_file:x": 2.0, "p_폐렴": 0.0}), "below 0"),
        (lambda t: t.assign(path="same"), "twice"),
        (lambda t: t.iloc[:-2], "10 rows of 12"),
    ],
)
def test_wrong_predictions_are_said_when_read(folder, change, words):
    path = save(folder) / "predictions.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    with user_error("predictions.csv", words, "train this run again"):
        load_run(folder)


def test_wrong_history_is_said_when_read(folder):
    for history in (make_history().drop(columns="lr"), make_history(0), make_history().assign(lr="x")):
        save(folder, history=history)
        with user_error("history.csv", "damaged"):
            load_run(folder)


def test_missing_folder(tmp_path):
    with user_error("no run record"):
        load_run(tmp_path / "none")
    assert list_runs(tmp_path / "none") == ([], [])


def test_predictions_table_keeps_the_order_of_the_slices():
    expected = make_predictions(patients=True)
    scores = expected[[f"p_{name}" for name in CLASSES]].to_numpy()
    slices = expected[["path", "split", "label", "patient"]]
    folder = SimpleNamespace(classes=tuple(CLASSES), slices=slices, rows=lambda s: np.flatnonzero(slices["split"] == s))
    table = predictions_table(folder, {"val": scores[:6], "test": scores[6:]})
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    folder.slices = slices.assign(patient="", shown=["set/" + path for path in slices["path"]])
    table = predictions_table(folder, {"test": scores[6:]})
    assert "patient" not in table and table["path"].str.startswith("set/test/").all(), "paths for records"
