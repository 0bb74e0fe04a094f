"""sweep: the plan file, what is skipped and what runs again, interruption, failures, packing."""

import dataclasses
import json
import math
import shutil

import pandas as pd
import pytest
from helpers import check_message, files_below, user_error, write_set
from test_experiment import BN, settings_in, stop_in_epoch, tiny_networks  # noqa: F401

from ctutils import backbones, cli, config, experiment, weights
from ctutils.base import CTError
from ctutils.plan import Plan
from ctutils.runs import load_run
from ctutils.sweep import FIELDS, load_sweep, pack_runs, planned_table, read_sweep, run_sweep, sweep_status

TEXT = f"""
title = "Does flipping help?"
seeds = [0, 1]
backbones = ["{BN}"]

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
    return settings_in(slices, runs_dir=tmp_path / "runs")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a plan, with pieces of its text replaced, and reads it."""

    def plan(text=TEXT, profile="standard", change=()):
        for old, new in dict(change).items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "flips.toml"
        path.write_text(text, encoding="utf-8")
        return read_sweep(path, profile)

    return plan


@pytest.fixture
def counted(monkeypatch):
    """Count the runs that are really trained."""
    calls, real = [], experiment.run_plan

    def noted(plan, *args, **kwargs):
        calls.append((plan.augment, plan.seed))
        return real(plan, *args, **kwargs)

    monkeypatch.setattr(experiment, "run_plan", noted)
    return calls


# --- The plan ---


def test_plan_is_backbones_times_settings_times_seeds(write):
    plan = write()
    names = [f"plain-{BN}-s0", f"plain-{BN}-s1", f"more-flips-{BN}-s0", f"more-flips-{BN}-s1"]
    assert (plan.name, plan.title) == ("flips", "Does flipping help?") and [job.name for job in plan.jobs] == names
    assert plan.jobs[3].plan == Plan(BN, epochs=2, precision="float32", augment=("flip",), views=2, seed=1)
    assert [job.against for job in plan.jobs] == [None, None, "plain", "plain"]
    two = write(change={f'["{BN}"]': f'["{BN}", "alexnet"]'})
    assert len(two.jobs) == 8 and list(two.groups())[1] == ("plain", "alexnet")
    own = write(change={"views = 2": 'views = 2\nbackbones = ["alexnet", "vgg16"]'})
    assert [job.plan.backbone for job in own.jobs[2:]] == ["alexnet", "alexnet", "vgg16", "vgg16"]
    assert {*FIELDS, "backbone", "seed"} == {field.name for field in dataclasses.fields(Plan)}


def test_profile_replaces_seeds_and_common(write):
    quick = write(profile="quick")
    assert [job.plan.seed for job in quick.jobs] == [3, 4, 3, 4] and quick.jobs[0].plan.epochs == 1
    assert quick.jobs[0].plan.precision == "float32", "what it does not name stays"
    only = write(profile="quick", change={"seeds = [3, 4]": 'settings = ["more flips"]'})
    assert {job.setting for job in only.jobs} == {"more flips"} and only.jobs[0].against is None


def test_table_shows_what_differs(write):
    table = planned_table(write())
    assert table.columns.tolist() == ["setting", "backbone", "augment", "views", "seeds", "against"]
    assert table.iloc[1].tolist() == ["more flips", BN, "flip", 2, "0, 1", "plain"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("views = 2", "view = 2", ("more flips", "view", "views")),
        ("epochs = 2", "epoch = 2", ("common", "epoch", "epochs")),
        ("[quick]", "[fast]", ("fast", "quick")),
        ("common = { epochs = 1 }", "size = 3", ("quick", "size", "common")),
        ('against = "plain"', 'against = "plan"', ("against", "plan", "plain")),
        ("seeds = [0, 1]", "seeds = []", ("seeds = []",)),
        ("seeds = [0, 1]", 'seeds = ["0"]', ("seed = '0'", "a whole number")),
        (f'backbones = ["{BN}"]', "backbones = [3]", ("backbone = 3",)),
        ('"more flips"', '"PLAIN"', ("two runs called",)),
        ("[settings.plain]", "[settings.plain", ("not TOML",)),
        ("epochs = 2", f"epochs = {'[' * 3000}", ("not TOML",)),
        ("epochs = 2", 'epochs = "3"', ("more flips" * 0, "epochs = '3'", "a whole number")),
        ("epochs = 2", 'standardise = "false"', ("standardise = 'false'", "true or false")),
        ("views = 2", "views = 2\ndiscriminative = 0.5", ("more flips", "discriminative", "do nothing")),
    ],
)
def test_faulty_plan_is_one_message(write, old, new, words):
    with user_error("flips.toml", *words):
        write(profile="quick" if "common = { epochs = 1 }" == old else "standard", change={old: new})


ODD = ("3", '"3"', "true", "nan", "-inf", "1e300", "9" * 400, "[]", "[[]]", "{}", '""', '"\\u0000"', "1979-05-27", "-1")


def test_any_value_of_any_key_is_a_plan_or_one_message(tmp_path):
    """What `--list` accepts, a run accepts: the plan of every job is made and checked when the file is read."""
    path, keys = tmp_path / "odd.toml", (*FIELDS, "against", "backbones", "seeds", "settings", "title", "quick")
    for key in keys:
        for value in ODD:
            inside = key in (*FIELDS, "against") or (key == "backbones" and "[" in value)
            head = f"{key} = {value}\n" if not inside else ""
            head += "" if key == "seeds" else "seeds = [0]\n"
            head += "" if key == "backbones" and not inside else f'backbones = ["{BN}"]\n'
            head += "" if key == "settings" else "[settings.plain]\n" + (f"{key} = {value}\n" if inside else "")
            path.write_text(head, encoding="utf-8")
            try:
                jobs = read_sweep(path, "quick").jobs
            except CTError as error:
                text = str(error)
                check_message(text, "odd.toml")
                assert key.removesuffix("s") in text or "not TOML" in text or "without a run" in text, text
                continue
            for job in jobs:
                values = dataclasses.asdict(job.plan).values()
                assert not any(isinstance(v, float) and not math.isfinite(v) for v in values), (key, value)


def test_plan_file_of_a_windows_editor_or_none(write, tmp_path):
    write()
    path = tmp_path / "flips.toml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_sweep(path, "standard").jobs) == 4
    with user_error("no plan", "gone.toml"):
        read_sweep(tmp_path / "gone.toml", "quick")


# --- Running ---


def test_done_runs_are_skipped_and_only_what_changed_runs_again(write, settings, counted, tmp_path):
    first = run_sweep(write(), settings)
    assert len(first.done) == 4 and not first.skipped and not first.failed and len(counted) == 4
    assert str(first) == "4 of 4 runs are done"
    names = {name.split("/")[-1] for name in files_below(settings.runs_dir / "flips") if "lock" not in name}
    assert names == {"history.csv", "predictions.csv", "run.json"}, "no weights are left"
    again = run_sweep(write(), settings, keep_weights=True)
    assert again.skipped == first.done and not again.done and str(again) == str(first)
    counted.clear()
    run_sweep(write(change={"views = 2": "views = 3"}), settings)
    assert counted == [(("flip",), 0), (("flip",), 1)]
    other_seeds = write(change={"seeds = [0, 1]": "seeds = [0, 2]", "views = 2": "views = 3"})
    counted.clear()
    run_sweep(other_seeds, settings)
    assert counted == [((), 2), (("flip",), 2)], "other seeds are other runs, and the first stays"
    counted.clear()
    bigger = dataclasses.replace(settings, profile=dataclasses.replace(settings.profile, image_size=72))
    status = sweep_status(other_seeds, bigger)["status"]
    assert status.tolist() == ["changed: size 64 -> 72"] * 4, "what the profile decides is part of a run"
    (settings.runs_dir / "flips" / other_seeds.jobs[1].name / "predictions.csv").write_text("path\n")
    assert run_sweep(other_seeds, settings).done == (other_seeds.jobs[1].name,), "a damaged record runs again"
    mine = write_set(tmp_path / "mine", per_class=3)
    mine = dataclasses.replace(settings, data_dir=mine, cache_dir=tmp_path / "c")
    assert run_sweep(other_seeds, mine, index=0).done == (other_seeds.jobs[0].name,), "other slices"
    for index in (-1, 4):
        with user_error(f"index {index}", "0 to 3"):
            run_sweep(other_seeds, settings, index=index)


def test_runs_made_without_the_network_are_made_again_once_there_is_one(write, settings, monkeypatch):
    """`auto` took random weights; now that it finds real ones, the records are of another kind."""
    plan, auto, real = write(), dataclasses.replace(settings, weights="auto"), backbones.find_weights
    monkeypatch.setattr(backbones, "find_weights", lambda name, weights, seed=0: real(name, "random", seed=seed))
    monkeypatch.setattr(weights, "_answers", lambda server: False)
    monkeypatch.setattr(weights.torch.hub, "get_dir", lambda: "nowhere")
    assert len(run_sweep(plan, auto, index=0).done) == 1 and run_sweep(plan, auto, index=0).skipped
    monkeypatch.setattr(weights, "_answers", lambda server: True)
    monkeypatch.setattr(weights.torch.hub, "download_url_to_file", lambda *_: pytest.fail("a list fetches nothing"))
    assert sweep_status(plan, auto)["status"][0].startswith("changed: weights random -> imagenet ")
    assert load_sweep(plan, auto) == {}
    # The other way round nothing is lost: a real record is not replaced by one with random weights.
    file = plan.folder(auto) / plan.jobs[0].name / "run.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["weights"]["kind"], record["sweep"]["identity"]["weights"] = "imagenet", "imagenet f00df00d"
    file.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(weights, "_answers", lambda server: False)
    (message,) = run_sweep(plan, auto, index=0).failed.values()
    check_message(message, "imagenet weights", "cannot be had now", "CT_WEIGHTS=random")
    assert json.loads(file.read_text(encoding="utf-8")) == record


def test_failed_run_does_not_stop_the_rest(write, settings, monkeypatch):
    real, plan = experiment.cached_features, write()

    def fail(*args, **kwargs):
        if "views" in kwargs:
            raise RuntimeError("boom")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "cached_features", fail)
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
    plan, other = write(change={"epochs = 2": "epochs = 3"}), dataclasses.replace(settings, runs_dir=tmp_path / "whole")
    run_sweep(plan, other)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, 6)  # after three of the first run and its two scored splits: in the second run
        run_sweep(plan, settings)
    assert load_run(plan.folder(settings) / plan.jobs[1].name).record["interrupted"] is True
    assert sweep_status(plan, settings)["status"].tolist() == ["done", "begun", "to do", "to do"]
    outcome = run_sweep(plan, settings)
    assert outcome.skipped == (plan.jobs[0].name,) and len(outcome.done) == 3
    for job in plan.jobs:
        a, b = (load_run(plan.folder(place) / job.name).predictions for place in (settings, other))
        pd.testing.assert_frame_equal(a, b)
    assert not [name for name in files_below(settings.runs_dir) if "checkpoint" in name]


@pytest.mark.parametrize("what", ["plan", "checkpoint", "first epoch"])
def test_what_an_interrupted_run_left_is_no_hindrance(write, settings, monkeypatch, what):
    plan = write()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, 1 if what == "first epoch" else 2)
        run_sweep(plan, settings, index=0)
    assert not list(settings.runs_dir.rglob("*.failed.json")), "Ctrl-C is no failure"
    if what == "plan":
        plan = write(change={'"float32"': '"float32"\nlr = 0.1'})
    elif what == "checkpoint":
        (checkpoint,) = settings.runs_dir.rglob(".*.checkpoint.pt")
        checkpoint.write_text("{half a file")
    assert run_sweep(plan, settings, index=0).done == (plan.jobs[0].name,)


def test_records_are_loaded_by_group_and_packed_without_weights(write, settings, tmp_path):
    plan = write()
    run_sweep(plan, settings, keep_weights=True)
    runs = {key: [run.plan.seed for run in some] for key, some in load_sweep(plan, settings).items()}
    assert runs == {("plain", BN): [0, 1], ("more flips", BN): [0, 1]}
    pack_runs(plan, settings, tmp_path / "packed")
    files = files_below(tmp_path / "packed")
    assert len(files) == 4 * 3 and not [name for name in files if name.endswith(".safetensors")]
    assert len(load_run(tmp_path / "packed" / plan.jobs[0].name).history) == 2
    changed = write(change={"views = 2": "views = 3"})
    assert list(load_sweep(changed, settings)) == [("plain", BN)], "records of an older plan are left out"


def test_one_run_is_made_here_and_compared_where_the_course_brings_the_others(write, settings, tmp_path):
    plan = write()
    assert "4 of 4 runs are done" in str(run_sweep(plan, settings, live="more flips")), "there are no records yet"
    pack_runs(plan, settings, plan.reference(settings))
    (first,) = {job.name for job in plan.jobs if job.setting == "more flips" and job.plan.seed == 0}
    for record in sorted(settings.runs_dir.rglob("run.json")):
        shutil.rmtree(record.parent)
    outcome = run_sweep(plan, settings, live="more flips")
    assert outcome.done == (first,) and "1 of 4 runs was made here" in str(outcome)
    count = len(load_run(plan.folder(settings) / first).of_split("val"))
    assert f"the same class for {count} of {count} slices" in str(outcome)
    assert {key: len(some) for key, some in load_sweep(plan, settings).items()} == dict.fromkeys(plan.groups(), 2)


# --- The command ---


def test_command_lists_runs_and_packs(slices, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "project_root", lambda: tmp_path / "project")
    for name, value in {"CT_PROFILE": "quick", "CT_DEVICE": "cpu", "CT_DATA": str(slices / "set")}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "flips.toml"
    path.write_text(TEXT.replace("epochs = 1", "epochs = 1, size = 64"), encoding="utf-8")

    def call(*words):
        capsys.readouterr()
        code = cli.main(["sweep", *map(str, words)])
        return code, *capsys.readouterr()

    code, out, _ = call(path, "--list", "--json")
    assert code == 0 and [row["status"] for row in json.loads(out)["runs"]] == ["to do"] * 4
    assert not (tmp_path / "project").exists(), "--list makes nothing"
    code, out, _ = call(path, "--index", 1, "--json")
    content = json.loads(out)
    assert code == 0 and [row["status"] for row in content["runs"]] == ["to do", "done", "to do", "to do"]
    assert content["runs"][1]["val_f1"] >= 0 and content["failed"] == {} and content["packed"] is None
    code, out, _ = call(path, "--pack", tmp_path / "packed")
    assert code == 0 and "Does flipping help?" in out and out.count(" done ") == 4 and "packed" in out
    for record in (tmp_path / "project").rglob("run.json"):  # whatever a record says of its sweep
        content = json.loads(record.read_text(encoding="utf-8"))
        record.write_text(json.dumps(content | {"sweep": 3}), encoding="utf-8")
    code, out, _ = call(path, "--list")
    assert code == 0 and out.count("changed") == 4
    path.write_text(TEXT.replace("views = 2", 'views = "2"'), encoding="utf-8")
    code, _, error = call(path, "--list")
    assert code == 2
    check_message(error, "views = '2'")
    path.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(experiment.data, "build_store", lambda *_args, **_kwargs: 1 / 0)
    code, out, _ = call(path, "--json")
    assert code == 1 and len(json.loads(out)["failed"]) == 4
