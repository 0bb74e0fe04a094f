"""distributed: torchrun with two processes gives what one gives; a dead process and Ctrl-C end both."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import check_message, files_below, write_set
from test_experiment import BN

from ctutils.runs import load_run

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)

PYTHONPATH = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])

# `ctutils` with the tiny networks, without dropout: each process would draw other numbers.
SCRIPT = """\
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_experiment import tiny, backbones, training, config
from torch import nn
from ctutils import cli

def still(spec):
    model = tiny(spec)
    for part in model.modules():
        part.p = 0.0 if isinstance(part, nn.Dropout) else None
    return model

real, rank, (who, epoch, how) = training.save_checkpoint, os.environ.get("RANK"), os.environ["EVENT"].split()

def save(path, result, *rest):
    real(path, result, *rest)
    if rank == who and len(result.history) == int(epoch):
        os.kill(os.getpid() if how == "KILL" else os.getppid(), getattr(signal, "SIG" + how))

backbones._make, training.save_checkpoint, config.project_root = still, save, lambda: Path({place!r})
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def call(tmp_path):
    """A function: trains in one or two processes; `event`: rank, epoch and signal."""
    data = write_set(tmp_path / "set 한글", per_class=7)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), place=str(tmp_path / "project")), "utf-8")

    def run(out: str, *words: str, processes: int = 2, event: str = "- 0 -"):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(script), "train", str(data)]
        command += ["--backbone", BN, "--unfreeze", "--size", "64", "--epochs", "3", "--batch-size", "4"]
        command += ["--balance", "loss", "--optimizer", "sgd", "--lr", "0.01", "--out", str(tmp_path / out), *words]
        env = {**os.environ, "EVENT": event, "CT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, start_new_session=True)
        return done.returncode, done.stdout, done.stderr

    return run


def table(run) -> np.ndarray:
    return run.history.drop(columns="seconds").to_numpy()


def test_two_processes_give_the_record_of_one_and_go_on_after_what_ended_them(call, tmp_path):
    code, out, error = call("one", processes=1)
    assert code == 0, error
    code, out, error = call("two")
    assert code == 0, error
    assert out.count("macro F1: validation") == 1, "one process speaks"
    one, two = (load_run(tmp_path / name) for name in ("one", "two"))
    assert two.record["processes"] == 2 and two.plan == one.plan
    np.testing.assert_allclose(table(two), table(one), rtol=0, atol=1e-5)  # 21 slices: the last batch has one
    for split in ("val", "test"):
        np.testing.assert_allclose(two.y_score(split), one.y_score(split), rtol=0, atol=1e-4)
    weights = [run.load_tensors() for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()

    code, out, error = call("ended", event="0 1 INT")  # to torchrun, after the first epoch
    assert code != 0 and error.count("Stopped, all 2 processes") == 1 and "--resume" in error
    code, out, error = call("ended", "--resume", event="1 2 KILL")
    (message,) = [line for line in error.splitlines() if line.startswith("Error:")]
    assert code != 0
    check_message(message, "a process of this training that died", "--resume")
    left = [name for name in files_below(tmp_path) if name.startswith((".ended", "ended"))]
    assert len(left) == 2 and any("checkpoint" in name for name in left), left  # and the lock
    code, out, error = call("ended", "--resume")
    assert code == 0, error
    ended = load_run(tmp_path / "ended")
    assert (table(ended) == table(two)).all() and (ended.predictions == two.predictions).all(axis=None)
    assert not [name for name in files_below(tmp_path) if "checkpoint" in name]


def test_what_two_processes_cannot_do_is_one_message(call):
    code, out, error = call("run", "--batch-size", "1")
    (message,) = [line for line in error.splitlines() if line.startswith("Error:")]
    assert code != 0 and not out
    check_message(message, "1 slices for 2 processes", "--batch-size")


EXACT = """\
import sys
import torch
sys.path.insert(0, {tests!r})
from helpers import loaders, tiny_cnn
from ctutils.distributed import Team
from ctutils.training import train_model

def train(team):
    model, some = tiny_cnn().double(), loaders(train=21, val=11, batch_size=4, shape=(3, 20, 20))
    for loader in some.values():
        loader.dataset.inputs = loader.dataset.inputs.double()
    whole, some = team.join(model, some) if team else (model, some)
    criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    result = train_model(whole, criterion, torch.optim.SGD(model.parameters(), lr=0.1), None, some, 3)
    numbers = [row[key] for row in result.history for key in row if key != "seconds"]
    return torch.cat([torch.tensor(numbers).double(), *(value.flatten() for value in model.state_dict().values())])

alone, team = train(None), Team("cpu")
difference = float((alone - train(team)).abs().max())
if team.rank == 0:
    print("difference", difference)
"""


def test_three_processes_are_exact_but_for_rounding(tmp_path):
    """Batches of 4 and 1 among 3, weighted loss, BatchNorm that learns: in float64 even the weights are the same."""
    (tmp_path / "script.py").write_text(EXACT.format(tests=str(Path(__file__).parent)), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "script.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert float(done.stdout.split()[-1]) < 1e-6, done.stderr  # epoch_scores rounds losses to float32
