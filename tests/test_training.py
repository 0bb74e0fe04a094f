"""training: the loop's numbers, what is frozen, the best epoch, Ctrl-C, resume, and what goes wrong."""

import ast
import contextlib
import errno
import inspect
import math
import re

import numpy as np
import pytest
import torch
from helpers import Examples, files_below, head, loaders, tiny_cnn, user_error
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from ctutils import training
from ctutils.base import CTError
from ctutils.data import batch_loader
from ctutils.runs import HISTORY_COLUMNS
from ctutils.training import Diverged, OtherCheckpoint, evaluate, lr_range_test, pick_rate, set_train_mode, train_model


def run(model=None, *, epochs=3, lr=0.01, schedule=None, data=None, optimizer=None, **options):
    """Train a small head with Adam and the deck's kind of schedule."""
    model = head(dropout=0.4) if model is None else model
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    scheduler = schedule(optimizer) if schedule else StepLR(optimizer, 2, 0.1)
    return train_model(model, nn.CrossEntropyLoss(), optimizer, scheduler, data or loaders(), epochs, **options)


def unlearns(epochs=6, **options):
    """Train well for some epochs, then uphill, so that the best epoch is an early one."""
    model, uphill = nn.Sequential(head()[0], head()[3]), lambda epoch: 1.0 if epoch < 3 else -5.0
    return run(model, epochs=epochs, lr=0.1, schedule=lambda made: LambdaLR(made, uphill), **options)


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=5 * 6)


def numbers(result) -> list[dict]:
    """Return the history without the seconds, which differ every time."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_result(a, b) -> bool:
    best = (a.best_epoch, a.best_score) == (b.best_epoch, b.best_score)
    return numbers(a) == numbers(b) and best and same(weights(a.model), weights(b.model))


# --- The numbers ---


def test_train_model_can_be_read_in_one_piece():
    """Issue 12: at most 70 lines below its signature and docstring, and the deck's steps in the function itself."""
    (function,) = ast.parse(inspect.getsource(train_model)).body
    assert isinstance(function.body[0].value.value, str), "a docstring"
    assert function.end_lineno - function.body[0].end_lineno <= 70
    text = ast.unparse(function.body[1:])
    for step in ("optimizer.zero_grad()", "model(inputs)", "criterion(", "loss.backward()", "optimizer.step()"):
        assert step in text


def test_scores_are_over_examples_and_not_means_of_batches():
    """With no learning, an epoch's figures must be those of one big batch, though the last batch is smaller."""
    model, data = head(), loaders(train=23, val=9, batch_size=4)
    result = run(model, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data=data)
    for phase, loader in data.items():
        logits, labels = model(loader.dataset.inputs).detach(), loader.dataset.labels
        expected = {
            "loss": float(functional.cross_entropy(logits, labels)),
            "accuracy": accuracy_score(labels, logits.argmax(1)),
            "macro_f1": f1_score(labels, logits.argmax(1), average="macro"),
        }
        by_batch = [
            float(functional.cross_entropy(*pair)) for pair in zip(logits.split(4), labels.split(4), strict=True)
        ]
        assert abs(np.mean(by_batch) - expected["loss"]) > 1e-4, "this test can tell them apart"
        for name, value in expected.items():
            assert result.history[0][f"{phase}_{name}"] == pytest.approx(value, abs=1e-6), (phase, name)


def test_a_weighted_loss_does_not_depend_on_the_batch_size():
    """A weighted mean divides by the sum of the weights, not by the number of examples."""
    model, criterion = head(), nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 5.0]))
    data = loaders(train=23, val=9)["train"].dataset
    expected = float(criterion(model(data.inputs), data.labels).detach())
    for size in (1, 4, 23):
        loss = evaluate(model, batch_loader(data, size, shuffle=False), criterion)[0]
        assert loss == pytest.approx(expected, abs=1e-6), size


def test_an_epoch_is_the_one_written_out_by_hand():
    expected, total = head(), 0.0
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    torch.manual_seed(0 * 100_003 + 1)
    for inputs, labels in loaders()["train"]:
        loss = functional.cross_entropy(expected(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    model = head()
    result = run(model, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert result.history[0]["train_loss"] == pytest.approx(total / 22, rel=1e-6), "each example as it was met"
    assert same(weights(model), weights(expected))


def test_it_learns_and_the_history_is_a_table():
    result = run(head(), epochs=20, lr=0.05, schedule=lambda optimizer: StepLR(optimizer, 50))
    table = result.history_table()
    assert result.best_score > 0.8 and table["train_loss"].iloc[-1] < 0.5 * table["train_loss"].iloc[0]
    assert table.columns.tolist() == list(HISTORY_COLUMNS) and table["epoch"].tolist() == list(range(1, 21))
    assert (table["seconds"] > 0).all()


def test_evaluate_gives_labels_in_order_and_probabilities():
    model, data = tiny_cnn(), Examples(11, shape=(3, 40, 40))
    model.train()
    loss, y_true, y_score = evaluate(model, batch_loader(data, 4, shuffle=False))
    assert not model.training and not any(p.grad is not None for p in model.parameters())
    assert (y_true.dtype, y_score.dtype, y_score.shape) == (np.int64, np.float32, (11, 3))
    assert y_true.tolist() == data.labels.tolist()
    logits = model(data.inputs).detach()
    np.testing.assert_allclose(y_score, torch.softmax(logits, 1).numpy(), atol=1e-6)
    assert loss == pytest.approx(float(functional.cross_entropy(logits, data.labels)), rel=1e-5)


def test_schedulers_step_once_an_epoch_or_after_every_batch():
    result = run(epochs=5, schedule=lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.1))
    assert [row["lr"] for row in result.history] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])
    model = head()
    result = train_model(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01), None, loaders(), 3)
    assert [row["lr"] for row in result.history] == [0.01] * 3

    rates, optimizer = [], torch.optim.Adam(model.parameters(), 0.01)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    run(model, epochs=5, optimizer=optimizer, schedule=one_cycle)
    assert len(set(rates)) == 30 and rates[0] < max(rates) > rates[-1] and max(rates) == pytest.approx(0.02, rel=0.02)


def test_best_epoch_and_its_weights_come_back():
    data = loaders()
    result = unlearns(data=data)
    scores = [row["val_macro_f1"] for row in result.history]
    assert result.best_epoch == 1 + scores.index(max(scores)) <= 3, scores
    assert result.best_score == max(scores) > scores[-1] and not result.model.training
    loss = evaluate(result.model, data["val"])[0]
    assert loss == pytest.approx(result.history[result.best_epoch - 1]["val_loss"], rel=1e-6)
    assert run(lr=0.0).best_epoch == 1, "the first of equals"


def test_patience_waits_and_then_stops(tmp_path):
    whole, options = unlearns(epochs=10), {"epochs": 10, "patience": 2, "checkpoint": tmp_path / "a.pt"}
    stopped = unlearns(**options)
    assert whole.best_epoch <= 3 and len(whole.history) == 10
    assert numbers(stopped) == numbers(whole)[: whole.best_epoch + 2] and not stopped.interrupted
    assert (stopped.best_epoch, stopped.best_score) == (whole.best_epoch, whole.best_score)
    assert same_result(unlearns(resume=True, **options), stopped), "it is over"
    assert len(unlearns(epochs=3, patience=9).history) == 3


# --- Frozen means frozen ---


@pytest.mark.parametrize("batchnorm", ["frozen", "drift"])
def test_what_is_frozen_stays_to_the_bit_but_drift_moves_batchnorm(batchnorm):
    model = tiny_cnn(dropout=0.3)
    model[0].requires_grad_(False)
    before = weights(model)
    # As in the deck, the optimizer is given all parameters; weight decay must not move the frozen ones.
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    run(model, data=loaders(10, 6, shape=(3, 40, 40)), optimizer=optimizer, batchnorm=batchnorm)
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    statistics = {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    assert moved == {"3.weight", "3.bias"} | (statistics if batchnorm == "drift" else set())


def test_train_mode_part_by_part():
    plain = nn.BatchNorm1d(5, affine=False)  # it has statistics, but nothing to learn
    frozen = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout()).requires_grad_(False)
    partly = nn.Sequential(nn.Linear(5, 5).requires_grad_(False), nn.Dropout(), nn.BatchNorm1d(5))
    model = nn.Sequential(frozen, plain, partly, nn.Dropout())
    set_train_mode(model)
    assert not any(part.training for part in [*frozen.modules(), plain, partly[0]])
    assert partly[1].training and partly[2].training
    assert model[3].training, "dropout between the layers to train is not frozen"
    set_train_mode(model, "drift")
    assert all(part.training for part in model.modules())


def test_seed_decides_shuffling_and_dropout_which_is_off_in_validation():
    seen, model = [], head(dropout=0.4)
    model[2].register_forward_pre_hook(lambda part, inputs: seen.extend([part.training] * len(inputs[0])))
    torch.manual_seed(5)
    first = run(model, epochs=2, seed=1)
    assert (seen.count(True), seen.count(False)) == (2 * 22, 2 * 11)
    torch.manual_seed(6)
    assert same_result(run(epochs=2, seed=1), first), "the caller's random state must not matter"
    assert not same(weights(run(epochs=2, seed=2).model), weights(first.model))
    losses = [row["train_loss"] for row in run(epochs=2, lr=0.0, seed=1).history]
    assert losses[0] != losses[1], "every epoch must have its own dropout"


# --- Ctrl-C, and other ends ---


class Stops:
    """A loader that raises, as Ctrl-C does, at the third batch of its n-th pass."""

    def __init__(self, loader, at_pass: int):
        self.loader, self.at_pass, self.passes = loader, at_pass, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.passes += 1
        for number, item in enumerate(self.loader):
            if (self.passes, number) == (self.at_pass, 2):
                raise KeyboardInterrupt
            yield item


def stopping(phase: str, at_pass: int) -> dict:
    return (data := loaders()) | {phase: Stops(data[phase], at_pass)}


@pytest.mark.parametrize("phase", ["train", "val"])
def test_ctrl_c_keeps_the_best_weights(phase):
    result = run(epochs=4, data=stopping(phase, at_pass=2))
    assert result.interrupted and len(result.history) == 1 and result.best_epoch == 1
    assert same(weights(result.model), weights(run(epochs=1).model)), "half an epoch's steps were left in"
    assert not result.model.training
    result = run(epochs=4, data=stopping(phase, at_pass=1))  # no epoch was finished: as it was
    assert (result.interrupted, result.best_epoch, result.history) == (True, 0, [])
    assert math.isnan(result.best_score) and same(weights(result.model), weights(head(dropout=0.4)))


def test_divergence_names_the_epoch_and_keeps_the_best_weights():
    model = head()
    result = run(model, schedule=lambda made: LambdaLR(made, lambda epoch: 1e30 if epoch else 1.0))
    assert re.search("a train loss of nan in epoch 2.*learning rate", result.diverged) and len(result.history) == 1
    assert same(weights(model), weights(run(head(), epochs=1).model)) and not model.training
    data = loaders()
    data["val"].dataset.inputs[7, 2] = math.nan
    with pytest.raises(Diverged, match="a val loss of nan in epoch 1"):
        run(data=data)


def test_training_that_would_change_nothing_is_refused():
    model = head().requires_grad_(False)
    with user_error("all frozen", "head"):
        run(model, optimizer=torch.optim.Adam(model.parameters()))
    with user_error("none of the model's trainable parameters", "after the head swap"):
        run(head(), optimizer=torch.optim.Adam(head().parameters()))
    for phase in ("train", "val"):
        with user_error(f"empty loader '{phase}'"):
            run(data={**loaders(), phase: []})


def test_lr_range_test_finds_a_rate_that_trains_and_changes_nothing():
    model, seen = head(dropout=0.2), []
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    model.register_forward_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    before, state = weights(model), str(optimizer.state_dict())
    found = lr_range_test(model, nn.CrossEntropyLoss(), optimizer, loaders(), low=1e-5, high=1e3, points=30)
    assert same(weights(model), before) and str(optimizer.state_dict()) == state and not model.training
    assert len({a for a, _ in seen}) == len(found) and all(b == pytest.approx(a / 10) for a, b in seen), "groups' ratio"
    rates, losses = [point["lr"] for point in found], [point["val_loss"] for point in found]
    assert rates[0] == pytest.approx(1e-5) and rates == sorted(rates) and np.isfinite(losses).all()
    assert len(found) < 30 and losses[-1] > 10 * losses[0], "it goes on after the loss has blown up"
    assert pick_rate(found) == pytest.approx(rates[int(np.argmin(losses))] / 3) and min(losses) < losses[0]


@pytest.mark.parametrize("error", [MemoryError(), CTError("memory too small", "more", "less"), Diverged("a", "b", "c")])
def test_only_divergence_ends_the_lr_range_test(error):
    """Bug E: memory that ran out gave a curve of two points, from which a rate was picked."""
    model, data, calls = head(), loaders(), []
    before, optimizer = weights(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state = str(optimizer.state_dict())

    def fails_later(*_args):
        calls.append(1)
        if len(calls) > 18:  # 4 steps and 3 batches of validation make a point
            raise error

    model.register_forward_pre_hook(fails_later)
    with contextlib.nullcontext() if isinstance(error, Diverged) else pytest.raises(type(error)):
        assert len(lr_range_test(model, nn.CrossEntropyLoss(), optimizer, data)) == 2
    assert same(weights(model), before) and str(optimizer.state_dict()) == state
    data["val"].dataset.inputs[:], calls[:] = math.nan, []
    with pytest.raises(Diverged):  # at the very first point: no curve at all
        lr_range_test(model, nn.CrossEntropyLoss(), optimizer, data)


def test_memory_errors_are_told_from_others():
    on_cpu = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    assert all(map(training.is_out_of_memory, (on_cpu, torch.OutOfMemoryError("CUDA out of memory"), MemoryError())))
    assert not training.is_out_of_memory(RuntimeError("shapes do not fit"))


# --- Checkpoints ---


@pytest.mark.parametrize("stop", ["after epoch 2", "train", "val"])
@pytest.mark.parametrize("schedule", [None, one_cycle, lambda optimizer: CosineAnnealingLR(optimizer, T_max=5)])
def test_resumed_run_gives_the_numbers_of_one_that_was_not_interrupted(tmp_path, stop, schedule):
    path, options = tmp_path / "새 폴더" / "a.pt", {"seed": 3, "lr": 0.02, "schedule": schedule}
    whole = run(epochs=5, **options)
    part = {"epochs": 2} if stop == "after epoch 2" else {"epochs": 5, "data": stopping(stop, at_pass=3)}
    assert len(run(checkpoint=path, **part, **options).history) == 2
    torch.manual_seed(99)
    resumed = run(epochs=5, resume=True, checkpoint=path, **options)
    assert same_result(resumed, whole) and not resumed.interrupted
    assert files_below(tmp_path) == ["새 폴더/a.pt"]


def test_resume_with_batchnorm_momentum_and_an_early_best_epoch(tmp_path):
    def moves(epochs, **options):
        model = tiny_cnn(dropout=0.2)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        return run(model, epochs=epochs, data=loaders(10, 6, shape=(3, 40, 40)), optimizer=optimizer, **options)

    for train in (moves, unlearns):
        path = tmp_path / train.__name__
        train(4, checkpoint=path)
        assert same_result(train(6, checkpoint=path, resume=True), train(6))


def test_resume_of_a_finished_run_and_of_none(tmp_path):
    options = {"epochs": 2, "checkpoint": tmp_path / "a.pt"}
    first = run(resume=True, **options)  # nothing to go on from: from the start
    data = stopping("train", at_pass=1)
    assert same_result(run(resume=True, data=data, **options), first) and data["train"].passes == 0
    assert same_result(run(**options), first), "without resume a checkpoint is not looked at"


@pytest.mark.parametrize("word", ["seed", "model", "scheduler", "optimizer", "same optimizer"])
def test_checkpoint_of_another_run(tmp_path, word):
    path, model = tmp_path / "a.pt", head(dropout=0.4)
    run(epochs=1, checkpoint=path)
    before = path.read_bytes()
    change = {
        "seed": {"seed": 4},
        "model": {"model": head(classes=4)},
        "scheduler": {"schedule": lambda optimizer: LambdaLR(optimizer, lambda epoch: 1.0)},
        "optimizer": {"lr": 0.5},
        "same optimizer": {"optimizer": torch.optim.SGD(model.parameters(), 0.01)},
    }[word]
    with user_error("a.pt", "another run", word, "delete the checkpoint"):
        run(**{"model": model, "epochs": 3, "checkpoint": path, "resume": True, **change})
    assert path.read_bytes() == before, "a refused checkpoint was overwritten"


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "tensors"])
def test_damaged_checkpoint(tmp_path, damage):
    path = tmp_path / "a.pt"
    run(epochs=1, checkpoint=path)
    torch.save([torch.zeros(3)], tmp_path / "other.pt")
    tensors = (tmp_path / "other.pt").read_bytes()
    path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-99], "text": b"hello\nyou", "tensors": tensors}[damage])
    with pytest.raises(OtherCheckpoint, match="a.pt.*cannot be read.*delete the checkpoint"):
        run(epochs=2, checkpoint=path, resume=True)


def test_full_disk_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    def full(_state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.pt"
    run(epochs=1, checkpoint=path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with user_error("full disk", "a.pt"):
        run(epochs=2, checkpoint=path, resume=True)
    assert files_below(tmp_path) == ["a.pt"] and path.read_bytes() == before
