"""cluster: what a job is, what the table says, weights before the jobs; and real jobs, where submitit and Slurm are."""

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess

import pytest
from helpers import check_message, user_error, write_set
from test_experiment import BN, settings_in

from ctutils import cli, cluster, config
from ctutils.base import write_json
from ctutils.cluster import counts, states, submit
from ctutils.runs import claim, load_run
from ctutils.sweep import Outcome, Sweep, read_sweep, run_sweep

TEXT = f"""
seeds = [0, 1]
backbones = ["{BN}"]
[common]
size = 64
epochs = 1
precision = "float32"
[settings.head]
[settings.sgd]
optimizer = "sgd"
[settings.flip]
augment = ["flip"]
views = 1
[settings.all]
unfreeze = "all"
"""

needs_submitit = pytest.mark.skipif(
    not importlib.util.find_spec("submitit"), reason="submitit is not there (pip install submitit)"
)


def slurm_answers() -> bool:
    if not shutil.which("sinfo"):
        return False
    done = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, timeout=60)
    return "idle" in done.stdout


needs_slurm = pytest.mark.skipif(not slurm_answers(), reason="there is no Slurm with an idle node")


@pytest.fixture
def settings(tmp_path):
    write_set(tmp_path / "set 한글", per_class=2)
    return settings_in(tmp_path, data_dir=tmp_path / "set 한글")


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    (tmp_path / "small.toml").write_text(TEXT, encoding="utf-8")
    return read_sweep(tmp_path / "small.toml", "quick")


def grouped(sweep, settings, kind):
    weights = {job.name: kind for job in sweep.jobs}
    groups = cluster._groups(list(sweep.jobs), settings, weights)
    return [[job.name.replace(f"-{BN}", "") for job in group] for group, _ in groups], [name for _, name in groups]


def test_a_job_is_what_shares_a_cache_and_a_fine_tuning_is_one_of_its_own(sweep, settings):
    real, names = grouped(sweep, settings, "imagenet 1234")
    assert real == [["head-s0", "head-s1", "sgd-s0", "sgd-s1"], ["flip-s0", "flip-s1"], ["all-s0"], ["all-s1"]]
    assert names[0] == names[1] != "" == names[2], "the plain pass is made once, for the views as well"
    random, _ = grouped(sweep, settings, "random")
    assert random[:2] == [["head-s0", "sgd-s0"], ["head-s1", "sgd-s1"]], "other random weights, other features"


def test_runs_that_would_be_random_without_being_asked_to_are_refused(sweep, settings, no_network):
    auto = dataclasses.replace(settings, weights="auto")
    with user_error("no weights of mobilenet_v3_large", "8 runs would be random", "--weights random"):
        cluster._weights(list(sweep.jobs), auto, strict=True)
    assert set(cluster._weights(list(sweep.jobs), settings, strict=True).values()) == {"random"}
    job = sweep.jobs[0]
    group = cluster.Group(dataclasses.replace(sweep, jobs=(job,)), auto, {job.name: "imagenet 1234"}, "now", 9)
    (message,) = group().values()  # the node sees another cache than the machine that submitted
    check_message(message, "weights 'random' on this node", "imagenet 1234", "CT_WEIGHTS")
    assert list(states(dataclasses.replace(sweep, jobs=(job,)), settings, {}))[0]["why"] == message


def test_the_table_says_what_each_run_does_from_files_and_the_queue_alone(sweep, settings):
    names, folder = [job.name for job in sweep.jobs], sweep.folder(settings)
    about = {
        "on": "slurm",
        "names": [names[:4], names[4:6], names[6:7], names[7:]],
        "prints": dict.fromkeys(names, "1"),
    }
    write_json(folder / ".cluster" / "20260101-1.json", about)
    write_json(folder / f"{names[0]}.failed.json", {"run": names[0], "error": "boom"})
    (folder / ".cluster" / "20260101-1").mkdir()
    log = folder / ".cluster" / "20260101-1" / "7_3_0_log.err"
    log.write_text("a line\nsrun: error: d1: task 0: Killed\nlast\n", encoding="utf-8")
    queue = {("20260101-1", 0): ("RUNNING", "d1", 5.0, "7_0"), ("20260101-1", 1): ("PENDING", "", 0.0, "7_1")}
    queue |= {("20260101-1", 3): ("FAILED", "d1", 3.0, "7_3")}
    rows = states(sweep, settings, queue)
    assert [row["status"] for row in rows] == ["failed", "running", *["queued"] * 4, "ended", "ended"]
    assert (rows[0]["why"], rows[1]["node"], rows[1]["seconds"], rows[1]["job"]) == ("boom", "d1", 5.0, "7_0")
    check_message(rows[6]["why"], "ended without a record", "no error in its log")
    check_message(rows[7]["why"], "(failed)", "task 0: Killed", "more memory")
    assert counts(rows) == "1 failed, 1 running, 4 queued, 2 ended"
    lost = states(sweep, settings, None)
    assert [row["status"] for row in lost] == ["failed", *["unknown"] * 7] and math.isnan(lost[1]["seconds"])
    write_json(folder / ".cluster" / "20260102-1.json", {**about, "names": [names[1:2]], "prints": {names[1]: "2"}})
    assert states(sweep, settings, queue)[1]["status"] == "ended", "the newer job counts"
    assert cluster._submitted_in(folder, names[1]) == "20260102-1"


def test_a_job_waits_for_who_holds_its_record_and_says_when_its_time_is_too_short(sweep, settings, monkeypatch):
    job, done = sweep.jobs[0], []
    one = dataclasses.replace(sweep, jobs=(job,))
    group = cluster.Group(one, settings, {job.name: "random"}, "now", 60)
    held = claim(sweep.folder(settings) / job.name)  # by a job on a node that Slurm has given up, say
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: held.lock.release())

    def run(some, *args, **options):
        assert not held.lock.is_locked
        done.append(some.jobs)
        group.start -= 3600  # Slurm's signal, and no epoch was finished
        assert group.checkpoint() is None
        return Outcome((), (), {job.name: "cut"}, 1.0)

    monkeypatch.setattr(cluster, "run_sweep", run)
    (message,) = group().values()
    assert done == [(job,)]
    check_message(message, "60 minutes in which no epoch was finished", "--minutes")
    assert states(one, settings, {})[0]["why"] == message


@needs_submitit
@pytest.mark.parametrize("on", ["local", pytest.param("slurm", marks=needs_slurm)])
def test_jobs_give_the_records_of_one_machine(on, sweep, settings, tmp_path):
    some = dataclasses.replace(sweep, jobs=sweep.jobs[::6])  # a head and a fine-tuning
    said = []
    rows = submit(some, settings, on, minutes=10, parallel=2, say=said.append)
    assert [row["status"] for row in rows] == ["done", "done"], rows
    assert "2 runs in 2 jobs" in said[0] and any("running on" in line for line in said)
    other = dataclasses.replace(settings, runs_dir=tmp_path / "one", cache_dir=tmp_path / "cache one")
    run_sweep(some, other)
    for job in some.jobs:
        here, there = (load_run(some.folder(place) / job.name) for place in (settings, other))
        assert here.predictions.equals(there.predictions)
        assert here.history.drop(columns="seconds").equals(there.history.drop(columns="seconds"))
    again = submit(some, settings, on, say=said.append)
    assert "0 runs in 0 jobs" in said[-1] and again == states(some, settings), "nothing runs twice"


@needs_submitit
@needs_slurm
def test_what_sbatch_refuses_is_one_message(sweep, settings):
    with user_error("sbatch", "partition", "sinfo"):
        submit(sweep, settings, "slurm", partition="nowhere", say=lambda text: None)
    assert {row["status"] for row in states(sweep, settings)} == {"to do"}


@needs_submitit
def test_without_slurm_and_with_idle_options_the_command_says_so(tmp_path, monkeypatch, capsys, settings):
    monkeypatch.setattr(config, "project_root", lambda: tmp_path / "project")
    monkeypatch.setenv("CT_DATA", str(settings.data_dir))
    path = tmp_path / "small.toml"
    path.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for words, expected in (
        (["--on", "slurm"], "no sbatch"),
        (["--minutes", "3"], "--minutes without --on"),
        (["--on", "local", "--detach"], "--detach with --on local"),
        (["--status", "--list"], "--list with --status"),
    ):
        assert cli.main(["sweep", str(path), *words]) == 2
        check_message(capsys.readouterr().err, expected)
    assert cli.main(["sweep", str(path), "--status", "--json"]) == 0
    assert {row["status"] for row in json.loads(capsys.readouterr().out)["runs"]} == {"to do"}
