"""sweep: the plan file, what is skipped and what runs again, interruption, failures, comparison, packing."""

import copy
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from helpers import files_below, user_error, write_set

from ctutils import cli, config, pipeline, sweep, training, weights
from ctutils.base import CTError
from ctutils.config import Profile, Settings
from ctutils.pipeline import Plan
from ctutils.runs import load_run
from ctutils.sweep import (
    compare_settings,
    load_sweep,
    pack_runs,
    planned_table,
    read_sweep,
    run_sweep,
    say_differences,
    sweep_status,
)

SMALL = "mobilenet_v3_large"
TEXT = f"""
title = "Does flipping help?"
seeds = [0, 1]
backbones = ["{SMALL}"]

[common]
epochs = 2
precision = "float32"

[settings.plain]

[settings."more flips"]
against = "plain"
augment = ["flip"]
views = 2

[quick]
seeds = [3, 4]
common = {{ epochs = 1 }}
"""


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices 한글")
    write_set(folder / "set", per_class=4)
    return folder


@pytest.fixture
def settings(slices, tmp_path):
    profile = Profile("standard", train=0, val=0, test=0, epochs=2, image_size=64, batch_size=8)
    places = {"data_dir": slices / "set", "cache_dir": slices / "cache", "runs_dir": tmp_path / "runs"}
    return Settings(profile=profile, device="cpu", weights="random", **places, own_data=True)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a plan, with pieces of its text replaced, and reads it."""

    def plan(text=TEXT, profile="standard", **changes):
        for old, new in changes.get("change", {}).items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "flips.toml"
        path.write_text(text, encoding="utf-8")
        return read_sweep(path, profile)

    return plan


@pytest.fixture
def counted(monkeypatch):
    """Count the runs that are really trained."""
    calls, real = [], pipeline.run_plan

    def noted(plan, *args, **kwargs):
        calls.append((plan.augment, plan.seed))
        return real(plan, *args, **kwargs)

    monkeypatch.setattr(pipeline, "run_plan", noted)
    return calls


# --- The plan ---


def test_plan_is_backbones_times_settings_times_seeds(write):
    plan = write()
    names = [f"plain-{SMALL}-s0", f"plain-{SMALL}-s1", f"more-flips-{SMALL}-s0", f"more-flips-{SMALL}-s1"]
    assert (plan.name, plan.title) == ("flips", "Does flipping help?") and [job.name for job in plan.jobs] == names
    assert plan.jobs[3].values == {
        **{"epochs": 2, "precision": "float32", "augment": ["flip"], "views": 2, "backbone": SMALL, "seed": 1}
    }
    assert [job.against for job in plan.jobs] == [None, None, "plain", "plain"]
    two = write(change={f'["{SMALL}"]': f'["{SMALL}", "alexnet"]'})
    assert len(two.jobs) == 8 and list(two.groups())[1] == ("plain", "alexnet")
    own = write(change={"views = 2": 'views = 2\nbackbones = ["alexnet", "vgg16"]'})
    assert [job.backbone for job in own.jobs[2:]] == ["alexnet", "alexnet", "vgg16", "vgg16"]


def test_profile_replaces_seeds_and_common(write):
    quick = write(profile="quick")
    assert [job.seed for job in quick.jobs] == [3, 4, 3, 4] and quick.jobs[0].values["epochs"] == 1
    assert quick.jobs[0].values["precision"] == "float32", "what it does not name stays"
    only = write(profile="quick", change={"seeds = [3, 4]": 'settings = ["more flips"]'})
    assert {job.setting for job in only.jobs} == {"more flips"} and only.jobs[0].against is None


def test_table_shows_what_differs(write):
    table = planned_table(write())
    assert table.columns.tolist() == ["setting", "backbone", "augment", "views", "seeds", "against"]
    assert table.iloc[1].tolist() == ["more flips", SMALL, "flip", 2, "0, 1", "plain"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("views = 2", "view = 2", ("[settings.more flips] with view", "views")),
        ("epochs = 2", "epoch = 2", ("[common] with epoch", "epochs")),
        ("[quick]", "[fast]", ("with fast", "quick")),
        ("common = { epochs = 1 }", "size = 3", ("[standard] with size", "common")),
        ('against = "plain"', 'against = "plan"', ("against with plan", "plain")),
        ("seeds = [0, 1]", "seeds = []", ("without seeds",)),
        ("seeds = [0, 1]", "seeds = 3", ("seeds = 3", "a list")),
        (f'backbones = ["{SMALL}"]', "", ("without backbones",)),
        ('"more flips"', '"PLAIN"', ("two runs called", "rename")),
        ("[settings.plain]", "[settings.plain", ("not TOML",)),
        ("common = { epochs = 1 }", "common = 3", ("common = 3", "a table")),
        ('against = "plain"', 'against = ["plain"]', ("against with ['plain']",)),
        (f'["{SMALL}"]', "[3]", ("backbones = 3", "names")),
        ("views = 2", f'views = 2\nbackbones = "{SMALL}"', ("settings.more flips.backbones", "a list")),
        ("[quick]\n", '[quick]\nbackbones = ["vgg16"]\n', ("without a run in profile quick",)),
    ],
)
def test_faulty_plan_is_one_message(write, old, new, words):
    text = TEXT.replace("[quick]", "[standard]") if "[standard]" in words[0] else TEXT
    if "in profile quick" in words[0]:
        text = text.replace("[settings.plain]", f'[settings.plain]\nbackbones = ["{SMALL}"]')
        text = text.replace("views = 2", f'views = 2\nbackbones = ["{SMALL}"]')
    with user_error("flips.toml", *words):
        write(text, "quick" if "quick" in words[0] or "common = 3" in words else "standard", change={old: new})


def test_plan_written_by_notepad_is_read(write, tmp_path):
    write()
    path = tmp_path / "flips.toml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_sweep(path, "standard").jobs) == 4


def test_plan_that_is_not_there(tmp_path):
    with user_error("no plan", "gone.toml"):
        read_sweep(tmp_path / "gone.toml", "quick")
    with user_error("not TOML"):
        read_sweep(tmp_path, "quick")


def test_every_field_of_a_run_may_be_planned():
    assert sweep.FIELDS | {"backbone", "seed"} == {field.name for field in dataclasses.fields(Plan)}


# --- Running ---


def test_done_runs_are_skipped_and_leave_no_weights(write, settings, counted):
    first = run_sweep(write(), settings)
    assert len(first.done) == 4 and not first.skipped and not first.failed and len(counted) == 4
    assert str(first) == "4 of 4 runs are done"
    records = {"history.csv", "predictions.csv", "run.json"}
    assert {name.split("/")[-1] for name in files_below(settings.runs_dir / "flips")} == records
    again = run_sweep(write(), settings)
    assert again.skipped == first.done and not again.done and len(counted) == 4 and str(again) == str(first)
    assert run_sweep(write(), settings, keep_weights=True).skipped == first.done


def test_changed_plan_runs_again_only_what_changed(write, settings, counted, monkeypatch):
    run_sweep(write(), settings)
    counted.clear()
    run_sweep(write(change={"views = 2": "views = 3"}), settings)
    assert counted == [(("flip",), 0), (("flip",), 1)]
    counted.clear()
    run_sweep(write(change={"seeds = [0, 1]": "seeds = [0, 2]", "views = 2": "views = 3"}), settings)
    assert counted == [((), 2), (("flip",), 2)], "other seeds are other runs, and the first stays"
    counted.clear()
    bigger = dataclasses.replace(settings, profile=dataclasses.replace(settings.profile, image_size=72))
    outcome = run_sweep(write(), bigger)
    assert len(outcome.done) == 4, "what the profile decides is part of a run"
    monkeypatch.setattr(weights, "_answers", lambda *_args, **_kwargs: False)  # no test asks the network
    assert len(run_sweep(write(), dataclasses.replace(bigger, weights="auto")).done) == 4


def test_changed_slices_run_again(write, settings, tmp_path, counted):
    mine = dataclasses.replace(settings, data_dir=write_set(tmp_path / "mine", per_class=4), cache_dir=tmp_path / "c")
    run_sweep(write(), mine)
    (tmp_path / "mine" / "train" / "ILD" / "slice 0.png").unlink()
    assert len(run_sweep(write(), mine).done) == 4


def test_damaged_record_runs_again(write, settings):
    plan = write()
    run_sweep(plan, settings)
    (settings.runs_dir / "flips" / plan.jobs[1].name / "predictions.csv").write_text("path\n")
    assert run_sweep(plan, settings).done == (plan.jobs[1].name,)


def test_failed_run_does_not_stop_the_rest(write, settings, monkeypatch):
    real = pipeline.build_augment

    def fail(names):
        if names:
            raise RuntimeError("boom")
        return real(names)

    plan = write()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build_augment", fail)
        outcome = run_sweep(plan, settings)
    assert len(outcome.done) == 2 and outcome.failed == {job.name: "boom" for job in plan.jobs[2:]}
    assert str(outcome).startswith("2 of 4 runs are done\nfailed: more-flips")
    folder = settings.runs_dir / "flips"
    message = json.loads((folder / f"{plan.jobs[2].name}.failed.json").read_text(encoding="utf-8"))
    assert message == {"run": plan.jobs[2].name, "error": "boom", "type": "RuntimeError"}
    assert sweep_status(plan, settings)["status"].tolist() == ["done", "done", "failed", "failed"]
    mended = run_sweep(plan, settings)
    assert len(mended.done) == 2 and not list(folder.glob("*.failed.json"))


def test_interrupted_run_goes_on_to_the_same_numbers(write, settings, tmp_path, monkeypatch):
    plan = write(change={"epochs = 2": "epochs = 3"})
    other = dataclasses.replace(settings, runs_dir=tmp_path / "whole")
    run_sweep(plan, other)
    epochs, real = [], training.train_one_epoch

    def stopped(*args, **kwargs):
        epochs.append(1)
        result = real(*args, **kwargs)
        if len(epochs) == 5:  # in the second epoch of the second run
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_one_epoch", stopped)
        run_sweep(plan, settings)
    assert load_run(plan.folder(settings) / plan.jobs[1].name).record["interrupted"] is True
    assert sweep_status(plan, settings)["status"].tolist() == ["done", "begun", "to do", "to do"]
    epochs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_one_epoch", lambda *a, **kw: epochs.append(1) or real(*a, **kw))
        outcome = run_sweep(plan, settings)
    assert outcome.skipped == (plan.jobs[0].name,) and len(outcome.done) == 3
    assert len(epochs) == 2 + 3 + 3, "the first epoch of the interrupted run was trained again"
    for job in plan.jobs:
        a, b = (load_run(plan.folder(place) / job.name).predictions for place in (settings, other))
        pd.testing.assert_frame_equal(a, b)
    assert not [name for name in files_below(settings.runs_dir) if "checkpoint" in name]


def test_ctrl_c_in_the_first_epoch_stops_the_sweep_and_is_no_failure(write, settings, monkeypatch):
    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_one_epoch", stopped)
        run_sweep(write(), settings)
    assert not list(settings.runs_dir.rglob("*.failed.json"))
    assert len(run_sweep(write(), settings).done) == 4


def stop_in_second_epoch(monkeypatch):
    real, calls = training.train_one_epoch, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "train_one_epoch", stopped)


def test_checkpoint_of_an_older_plan_is_no_hindrance(write, settings, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_second_epoch(patch)
        run_sweep(write(), settings)
    outcome = run_sweep(write(change={'"float32"': '"float32"\nlr = 0.1'}), settings)
    assert len(outcome.done) == 4 and not outcome.failed


@pytest.mark.parametrize("damaged", [".pt", ".json"])
def test_damaged_checkpoint_is_no_hindrance(write, settings, monkeypatch, damaged):
    plan = write()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_second_epoch(patch)
        run_sweep(plan, settings, index=0)
    checkpoint = plan.folder(settings) / f".{plan.jobs[0].name}.checkpoint.pt"
    assert checkpoint.exists()
    checkpoint.with_suffix(damaged).write_text("{half a file")
    assert run_sweep(plan, settings, index=0).done == (plan.jobs[0].name,)


def test_index_runs_one_job(write, settings, counted):
    plan = write()
    assert run_sweep(plan, settings, index=2).done == (plan.jobs[2].name,) and counted == [(("flip",), 0)]
    assert sweep_status(plan, settings)["status"].tolist() == ["to do", "to do", "done", "to do"]
    for index in (-1, 4):
        with user_error(f"index {index}", "0 to 3"):
            run_sweep(plan, settings, index=index)


def test_other_data_and_another_test_split(write, settings, tmp_path):
    write_set(tmp_path / "a", per_class=3)
    write_set(tmp_path / "elsewhere" / "b", per_class=5)
    where = f'data = "{tmp_path / "a"}"\ntest_data = "{tmp_path / "elsewhere" / "b"}"'
    plan = write(change={"views = 2": where, 'augment = ["flip"]\n': ""})
    outcome = run_sweep(plan, settings)
    assert not outcome.failed, outcome
    run = load_run(plan.folder(settings) / plan.jobs[2].name)
    counts = {split: sum(classes.values()) for split, classes in run.record["data"]["counts"].items()}
    assert counts == {"train": 9, "val": 9, "test": 15}
    assert set(run.of_split("test")["path"].str.split("/").str[0]) == {"b"}
    assert run.record["data"]["name"] == "a, tested on b"


# --- Comparing ---


@pytest.fixture(scope="module")
def compared(slices, tmp_path_factory):
    """A finished sweep, its settings and its records."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "flips.toml").write_text(TEXT, encoding="utf-8")
    profile = Profile("standard", train=0, val=0, test=0, epochs=2, image_size=64, batch_size=8)
    places = {"data_dir": slices / "set", "cache_dir": slices / "cache", "runs_dir": folder / "runs"}
    settings = Settings(profile=profile, device="cpu", weights="random", **places, own_data=True)
    plan = read_sweep(folder / "flips.toml", "standard")
    run_sweep(plan, settings)
    return plan, settings, load_sweep(plan, settings)


def test_comparison_is_computed_from_the_records(compared):
    plan, _, runs = compared
    table = compare_settings(plan, runs).set_index("setting")
    for setting in table.index:
        points = [run.record["scores"]["test"]["macro_f1"] for run in runs[setting, SMALL]]
        assert table.loc[setting, "points"] == tuple(np.round(points, 4))
        assert table.loc[setting, "mean"] == pytest.approx(np.mean(points))
    row = table.loc["more flips"]
    assert row["difference"] == pytest.approx(row["mean"] - table.loc["plain", "mean"])
    assert row["low"] <= row["difference"] <= row["high"] and row["seeds_agree"].endswith(" of 2")
    assert np.isnan(table.loc["plain", "difference"])
    assert len(say_differences(table.reset_index())) == 1


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.05, "higher than plain"), (-0.05, -0.01, "lower than plain"), (-0.01, 0.05, "not distinguishable from")],
)
def test_sentences_follow_the_interval(low, high, words):
    row = {"setting": "flip", "backbone": SMALL, "against": "plain", "difference": (low + high) / 2, "low": low}
    table = pd.DataFrame([row | {"high": high, "seeds_agree": "2 of 3"}, {"setting": "plain", "backbone": SMALL}])
    (sentence,) = say_differences(table)
    assert words in sentence and f"{low:+.3f} to {high:+.3f}" in sentence and "2 of 3 seeds" in sentence


def test_group_with_a_missing_record_is_left_out(compared, tmp_path):
    plan, settings, runs = compared
    less = dataclasses.replace(plan, jobs=(*plan.jobs, dataclasses.replace(plan.jobs[2], name="gone", seed=9)))
    assert list(load_sweep(less, settings)) == [("plain", SMALL)]
    table = compare_settings(less, load_sweep(less, settings))
    assert table["setting"].tolist() == ["plain"] and say_differences(table) == []
    assert load_sweep(plan, dataclasses.replace(settings, runs_dir=tmp_path)) == {}
    changed = [dataclasses.replace(job, values={**job.values, "lr": 0.5}) for job in plan.jobs[2:]]
    older = dataclasses.replace(plan, jobs=(*plan.jobs[:2], *changed))
    assert list(load_sweep(older, settings)) == [("plain", SMALL)], "records of an older plan"


def test_runs_on_other_slices_are_not_compared(compared):
    plan, _, runs = compared
    cut = {
        key: [dataclasses.replace(run, predictions=run.predictions.iloc[:-1]) for run in some]
        if key[0] == "plain"
        else some
        for key, some in runs.items()
    }
    with user_error("different labels", "run the plan again"):
        compare_settings(plan, cut)


@pytest.mark.parametrize("what", ["test slices", "weights"])
def test_records_that_do_not_belong_together_are_not_compared(compared, what):
    plan, _, runs = compared
    plain, flips = runs.values()
    record = copy.deepcopy(flips[1].record)
    if what == "weights":  # the first was made without the network, say
        record["weights"]["kind"] = "imagenet"
    else:  # the synthetic set was made anew: the same labels, other pictures
        record["sweep"]["identity"]["slices"] = ["another fingerprint"]
    mixed = dict(zip(runs, (plain, [flips[0], dataclasses.replace(flips[1], record=record)]), strict=True))
    with user_error(f"different {what}", "run the plan again"):
        compare_settings(plan, mixed)


def test_pack_copies_records_without_weights(compared, tmp_path):
    plan, settings, _ = compared
    report = json.loads(pack_runs(plan, settings, tmp_path / "packed").read_text(encoding="utf-8"))
    files = files_below(tmp_path / "packed")
    assert len(files) == 4 * 3 + 1 and not [name for name in files if name.endswith(".safetensors")]
    assert len(load_run(tmp_path / "packed" / plan.jobs[0].name).history) == 2
    assert report["bfloat16_tflops"] > 0 and set(report["seconds"]) == {"plain", "more flips"}
    assert [row["run"] for row in report["runs"]] == [job.name for job in plan.jobs]
    assert "share_of_bfloat16_ceiling" not in report["runs"][0], "only of whole networks"


def test_speed_of_a_whole_network(write, settings, tmp_path):
    plan = write(change={"views = 2": 'unfreeze = "all"\nepochs = 1', 'augment = ["flip"]': "", "[0, 1]": "[0]"})
    assert not run_sweep(plan, settings).failed
    report = json.loads(pack_runs(plan, settings, tmp_path / "packed").read_text(encoding="utf-8"))
    row = report["runs"][1]
    assert row["slices_a_second"] == pytest.approx(24 / row["epoch_seconds"], rel=0.05)
    flops = sweep._forward_flops(SMALL, 224)
    assert 0.4e9 < flops < 0.5e9, "0.43 GFLOP, as its authors count"
    work = (3 * 12 + 12) * sweep._forward_flops(SMALL, 64)
    expected = work / row["epoch_seconds"] / (report["bfloat16_tflops"] * 1e12)
    assert row["share_of_bfloat16_ceiling"] == pytest.approx(expected, rel=0.05, abs=1e-3)


# --- The command ---


@pytest.fixture
def command(monkeypatch, slices, tmp_path, capsys):
    monkeypatch.setattr(config, "project_root", lambda: tmp_path / "project")
    for name, value in {"CT_PROFILE": "quick", "CT_DEVICE": "cpu", "CT_DATA": str(slices / "set")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CT_WEIGHTS", "random")
    path = tmp_path / "flips.toml"
    path.write_text(TEXT.replace("epochs = 1", "epochs = 1, size = 64"), encoding="utf-8")

    def call(*words):
        capsys.readouterr()
        code = cli.main(["sweep", *map(str, words)])
        return code, *capsys.readouterr()

    return call, path


def test_command_lists_runs_and_packs(command, tmp_path):
    call, path = command
    code, out, _ = call(path, "--list", "--json")
    assert code == 0 and [row["status"] for row in json.loads(out)["runs"]] == ["to do"] * 4
    code, out, _ = call(path, "--index", 1, "--json")
    content = json.loads(out)
    assert code == 0 and [row["status"] for row in content["runs"]] == ["to do", "done", "to do", "to do"]
    assert content["runs"][1]["test"] >= 0 and content["failed"] == {} and content["packed"] is None
    code, out, _ = call(path, "--pack", tmp_path / "packed")
    assert code == 0 and "Does flipping help?" in out and out.count(" done ") == 4 and "packed" in out
    assert (tmp_path / "packed" / "sweep.json").exists()


def test_command_says_failures_at_the_end(command, monkeypatch):
    call, path = command

    def fail(*_args, **_kwargs):
        raise CTError("boom", "none", "wait")

    monkeypatch.setattr(pipeline, "build_store", fail)
    code, out, _ = call(path, "--json")
    assert code == 1 and len(json.loads(out)["failed"]) == 4
    code, _, error = call(path.with_name("gone.toml"))
    assert code == 2 and "gone.toml" in error
