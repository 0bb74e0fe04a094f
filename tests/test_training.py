"""training: the loop's numbers, what is frozen, the best epoch, Ctrl-C, resume, and bad input."""

import errno
import math

import numpy as np
import pytest
import torch
from helpers import Examples, files_below, head, loaders, tiny_cnn, user_error
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from ctutils import training
from ctutils.data import batch_loader
from ctutils.training import (
    HISTORY_COLUMNS,
    Batching,
    evaluate,
    lr_range_test,
    pick_rate,
    set_train_mode,
    train_model,
    train_one_epoch,
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("CT_PROGRESS", "0")


def run(model=None, *, epochs=3, lr=0.01, schedule=None, data=None, optimizer=None, **options):
    """Train a small head with Adam and the deck's kind of schedule."""
    model = head(dropout=0.4) if model is None else model
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    scheduler = schedule(optimizer) if schedule else StepLR(optimizer, 2, 0.1)
    return train_model(
        model, nn.CrossEntropyLoss(), optimizer, scheduler, data or loaders(), num_epochs=epochs, **options
    )


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


def spoil(optimizer, after: int):
    """A schedule that goes uphill after some epochs, so that the network unlearns everything."""
    return LambdaLR(optimizer, lambda epoch: 1.0 if epoch < after else -5.0)


# --- The numbers ---


def test_history_has_its_columns():
    result = run(epochs=2)
    assert [tuple(row) for row in result.history] == [HISTORY_COLUMNS] * 2
    table = result.history_table()
    assert table.columns.tolist() == list(HISTORY_COLUMNS) and table["epoch"].tolist() == [1, 2]
    assert np.isfinite(table.to_numpy(float)).all() and (table["seconds"] > 0).all()


def test_scores_are_over_examples_and_not_means_of_batches():
    """With no learning, an epoch's figures must be those of one big batch, though the last batch is smaller."""
    model, data = head(), loaders(train=23, val=9, batch_size=4)
    result = run(model, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data=data)
    for phase, loader in data.items():
        examples = loader.dataset
        with torch.no_grad():
            logits = model(examples.inputs)
        expected = {
            "loss": float(functional.cross_entropy(logits, examples.labels)),
            "accuracy": accuracy_score(examples.labels, logits.argmax(1)),
            "macro_f1": f1_score(examples.labels, logits.argmax(1), average="macro"),
        }
        by_batch = [
            functional.cross_entropy(*pair) for pair in zip(logits.split(4), examples.labels.split(4), strict=True)
        ]
        assert abs(float(torch.stack(by_batch).mean()) - expected["loss"]) > 1e-4, "this test can tell them apart"
        for name, value in expected.items():
            assert result.history[0][f"{phase}_{name}"] == pytest.approx(value, abs=1e-6), (phase, name)


def test_training_loss_is_of_each_example_as_it_was_met():
    """An epoch written out by hand gives the same losses and the same weights."""
    expected = head()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    data = loaders()
    torch.manual_seed(0 * 100_003 + 1)
    total = 0.0
    for inputs, labels in data["train"]:
        loss = functional.cross_entropy(expected(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    model = head()
    result = run(model, epochs=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert result.history[0]["train_loss"] == pytest.approx(total / 22, rel=1e-6)
    assert same(weights(model), weights(expected))


def test_it_learns():
    result = run(head(), epochs=20, lr=0.05, schedule=lambda optimizer: StepLR(optimizer, 50))
    assert result.best_score > 0.8
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]


def test_evaluate_gives_labels_in_order_and_probabilities():
    model, data = tiny_cnn(), Examples(11, shape=(3, 40, 40))
    model.train()
    loss, y_true, y_score = evaluate(model, batch_loader(data, 4, shuffle=False))
    assert not model.training
    assert (y_true.dtype, y_score.dtype, y_score.shape) == (np.int64, np.float32, (11, 3))
    assert y_true.tolist() == data.labels.tolist()
    with torch.no_grad():
        logits = model(data.inputs)
    np.testing.assert_allclose(y_score, torch.softmax(logits, 1).numpy(), atol=1e-6)
    assert loss == pytest.approx(float(functional.cross_entropy(logits, data.labels)), rel=1e-5)
    assert not any(p.grad is not None for p in model.parameters())


def test_train_one_epoch_scores_every_example_once():
    model = head()
    optimizer = torch.optim.Adam(model.parameters())
    loss, y_true, y_score = train_one_epoch(model, nn.CrossEntropyLoss(), optimizer, loaders()["train"])
    assert sorted(y_true.tolist()) == sorted(Examples(22).labels.tolist()) and y_score.shape == (22, 3)
    np.testing.assert_allclose(y_score.sum(1), 1, atol=1e-6)
    assert math.isfinite(loss)


def test_scheduler_steps_once_an_epoch():
    result = run(epochs=5, lr=0.01, schedule=lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.1))
    assert [row["lr"] for row in result.history] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])
    model = head()
    result = train_model(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01), None, loaders(), 3)
    assert [row["lr"] for row in result.history] == [0.01] * 3


# --- The best epoch ---


def test_best_epoch_and_its_weights_come_back():
    model, data = nn.Sequential(head()[0], head()[3]), loaders()
    result = run(model, epochs=6, lr=0.05, schedule=lambda optimizer: spoil(optimizer, after=3), data=data)
    scores = [row["val_macro_f1"] for row in result.history]
    assert result.best_epoch == 1 + scores.index(max(scores)) <= 3, scores
    assert result.best_score == max(scores) > scores[-1]
    row = result.history[result.best_epoch - 1]
    loss, y_true, y_score = evaluate(result.model, data["val"])
    assert loss == pytest.approx(row["val_loss"], rel=1e-6)
    assert f1_score(y_true, y_score.argmax(1), average="macro") == pytest.approx(result.best_score)
    assert result.model is model and not model.training


def test_first_of_equal_epochs_is_the_best():
    model = head()
    assert run(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)).best_epoch == 1


# --- Frozen means frozen ---


def frozen_cnn() -> nn.Sequential:
    model = tiny_cnn(dropout=0.3)
    model[0].requires_grad_(False)
    return model


def images() -> dict:
    return loaders(train=10, val=6, shape=(3, 40, 40))


def test_frozen_batchnorm_stays_to_the_bit():
    model = frozen_cnn()
    before = weights(model)
    # As in the deck, the optimizer is given all parameters; weight decay must not move the frozen ones.
    run(model, data=images(), optimizer=torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1))
    after = weights(model)
    assert same({k: v for k, v in before.items() if k[0] == "0"}, {k: v for k, v in after.items() if k[0] == "0"})
    assert not torch.equal(before["3.weight"], after["3.weight"]), "the head must learn"


def test_drift_moves_the_statistics_of_frozen_batchnorm_and_no_weight():
    model = frozen_cnn()
    before = weights(model)
    run(model, data=images(), batchnorm="drift")
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked", "3.weight", "3.bias"}


def test_train_mode_part_by_part():
    plain = nn.BatchNorm1d(5, affine=False)  # it has statistics, but nothing to learn
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout()),
        plain,
        nn.Sequential(nn.Linear(5, 5), nn.Dropout(), nn.BatchNorm1d(5)),
        nn.Dropout(),
    )
    model[0].requires_grad_(False)
    model[2][0].requires_grad_(False)
    set_train_mode(model)
    assert not any(part.training for part in model[0].modules())
    assert not plain.training
    assert not model[2][0].training and model[2][1].training and model[2][2].training
    assert model[3].training, "dropout between the layers to train is not frozen"
    set_train_mode(model, "drift")
    assert all(part.training for part in model.modules())


def test_dropout_works_in_training_alone():
    class Noted(nn.Dropout):
        def forward(self, inputs):
            seen.append((self.training, len(inputs)))
            return super().forward(inputs)

    seen: list[tuple[bool, int]] = []
    model = nn.Sequential(nn.Linear(5, 8).requires_grad_(False), Noted(0.5), nn.Linear(8, 3))
    run(model, epochs=2)
    assert sum(n for training_, n in seen if training_) == 2 * 22
    assert sum(n for training_, n in seen if not training_) == 2 * 11


# --- Seeds ---


def test_seed_decides_shuffling_and_dropout():
    torch.manual_seed(5)
    first = run(epochs=2, seed=1)
    torch.manual_seed(6)
    assert same_result(run(epochs=2, seed=1), first), "the caller's random state must not matter"
    assert not same(weights(run(epochs=2, seed=2).model), weights(first.model))
    losses = [row["train_loss"] for row in run(epochs=2, lr=0.0, seed=1).history]
    assert losses[0] != losses[1], "every epoch must have its own dropout"


# --- Ctrl-C ---


class Stops:
    """A loader that raises, as Ctrl-C does, at batch `batch` of its n-th pass."""

    def __init__(self, loader, at_pass: int, batch: int = 2):
        self.loader, self.at_pass, self.batch, self.passes = loader, at_pass, batch, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.passes += 1
        for number, item in enumerate(self.loader):
            if (self.passes, number) == (self.at_pass, self.batch):
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("phase", ["train", "val"])
def test_ctrl_c_returns_the_best_so_far(phase):
    data = loaders()
    data[phase] = Stops(data[phase], at_pass=2)
    result = run(epochs=4, data=data)
    assert result.interrupted and len(result.history) == 1 and result.best_epoch == 1
    assert same(weights(result.model), weights(run(epochs=1).model)), "half an epoch's steps were left in"
    assert not result.model.training


def test_ctrl_c_in_the_first_epoch_gives_the_model_back_as_it_was():
    data, model = loaders(), head()
    before = weights(model)
    data["train"] = Stops(data["train"], at_pass=1)
    result = run(model, data=data)
    assert (result.interrupted, result.best_epoch, result.history) == (True, 0, [])
    assert math.isnan(result.best_score)
    assert same(weights(model), before)


# --- Memory: parts of a batch ---


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0]))])
@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_accumulated_gradients_are_those_of_the_big_batch(criterion, at_once):
    """Batches of 8 in parts, the last batch and part smaller; also with class weights, whose mean differs by part."""

    def go(batching):
        model, data = head(), loaders(train=21, val=10, batch_size=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        return train_model(model, criterion, optimizer, None, data, 2, batching=batching)

    whole, parts = go(None), go(Batching(at_once=at_once))
    assert (whole.at_once, parts.at_once) == (None, at_once)
    for a, b in zip(numbers(whole), numbers(parts), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for name, tensor in weights(whole.model).items():
        torch.testing.assert_close(weights(parts.model)[name], tensor, rtol=1e-4, atol=1e-6)


def test_loss_with_class_weights_is_that_of_one_big_batch():
    model, data = head(), loaders(batch_size=4)
    criterion = nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0]))
    loss, _, _ = evaluate(model, data["val"], criterion)
    examples = data["val"].dataset
    with torch.no_grad():
        assert loss == pytest.approx(float(criterion(model(examples.inputs), examples.labels)), rel=1e-5)


class Hungry(nn.Module):
    """A network that runs out of memory with more than `room` examples at once."""

    def __init__(self, inner: nn.Module, room: int, error: Exception):
        super().__init__()
        self.inner, self.room, self.error, self.seen = inner, room, error, []

    def forward(self, inputs):
        self.seen.append(len(inputs))
        logits = self.inner(inputs)
        if len(inputs) > self.room:
            raise self.error
        return logits


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_what_goes_through_and_keeps_the_batch(caplog, error):
    plain = run(head(), data=loaders(train=22, batch_size=8), epochs=2)
    model = Hungry(head(), room=3, error=error)
    result = run(model, data=loaders(train=22, batch_size=8), epochs=2)
    assert result.at_once == 2 and model.seen[:3] == [8, 4, 2] and max(model.seen[2:]) == 2
    assert len(caplog.messages) == 1, "one message, not one a batch"
    assert "8 slices at once: 2 from here on" in caplog.messages[0]
    for a, b in zip(numbers(plain), numbers(result), strict=True):
        assert b == pytest.approx(a, rel=1e-4), "the steps must be those of the whole batch"


def test_out_of_memory_in_the_backward_pass_leaves_no_gradient_behind():
    class Heavy(torch.autograd.Function):
        calls = []

        @staticmethod
        def forward(_ctx, inputs):
            return inputs.clone()

        @staticmethod
        def backward(_ctx, gradient):
            Heavy.calls.append(len(gradient))
            if len(Heavy.calls) == 2:  # the second part of the first batch, when the first has left its gradient
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient

    class Model(nn.Sequential):
        def forward(self, inputs):
            return Heavy.apply(super().forward(inputs))

    def go(model, batching):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return run(model, epochs=1, data=loaders(batch_size=8), optimizer=optimizer, batching=batching)

    result = go(Model(*head()), Batching(at_once=4))
    assert result.at_once == 2 and Heavy.calls[:4] == [4, 4, 2, 2]
    expected = weights(go(head(), None).model)
    for name, tensor in weights(result.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_memory_too_small_for_one_slice_and_other_errors():
    with user_error("memory too small", "smaller size"):
        run(Hungry(head(), room=0, error=OUT_OF_MEMORY[0]))
    with pytest.raises(RuntimeError, match="shapes"):
        run(Hungry(head(), room=0, error=RuntimeError("shapes do not fit")))


def test_given_batching_is_not_changed():
    given = Batching(at_once=8)
    run(Hungry(head(), room=2, error=OUT_OF_MEMORY[0]), data=loaders(batch_size=8), batching=given)
    assert given == Batching(at_once=8)


def test_bfloat16_is_used_when_asked_for():
    seen = []
    model = head()
    model[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    result = run(model, epochs=1, batching=Batching(bfloat16=True))
    assert set(seen) == {torch.bfloat16} and all(p.dtype == torch.float32 for p in model.parameters())
    seen.clear()
    exact = run(epochs=1, model=model)
    assert set(seen) == {torch.float32}
    assert result.history[0]["train_loss"] == pytest.approx(exact.history[0]["train_loss"], rel=0.5)


# --- Schedules and early stopping ---


def test_one_cycle_is_stepped_after_every_batch():
    seen = []

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = head()

        def forward(self, inputs):
            if self.training:
                seen.append(optimizer.param_groups[0]["lr"])
            return self.inner(inputs)

    model = Noted()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = lambda made: OneCycleLR(made, max_lr=0.01, total_steps=3 * 6)  # noqa: E731
    run(model, optimizer=optimizer, schedule=schedule, data=loaders(train=22, batch_size=4), epochs=3)
    assert len(set(seen)) == 18 and max(seen) == pytest.approx(0.01, rel=0.02) and seen[0] < max(seen) > seen[-1]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=5),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.02, total_steps=5 * 6),
    ],
    ids=["cosine", "onecycle"],
)
def test_resume_goes_on_in_the_schedule(tmp_path, schedule):
    options = {"schedule": schedule, "lr": 0.02, "epochs": 5}
    whole = run(**options)
    data = loaders()
    data["train"] = Stops(data["train"], at_pass=3)
    run(data=data, checkpoint=tmp_path / "a.pt", **options)
    assert same_result(run(checkpoint=tmp_path / "a.pt", resume=True, **options), whole)


def test_early_stopping_waits_and_then_stops(tmp_path):
    def go(**options):
        model = nn.Sequential(head()[0], head()[3])
        return run(model, lr=0.1, schedule=lambda optimizer: spoil(optimizer, after=3), **options)

    whole = go(epochs=10)
    stopped = go(epochs=10, patience=2, checkpoint=tmp_path / "a.pt")
    assert whole.best_epoch <= 3 and len(whole.history) == 10
    assert len(stopped.history) == whole.best_epoch + 2 and not stopped.interrupted
    assert (stopped.best_epoch, stopped.best_score) == (whole.best_epoch, whole.best_score)
    assert numbers(stopped) == numbers(whole)[: len(stopped.history)]
    assert same_result(go(epochs=10, patience=2, checkpoint=tmp_path / "a.pt", resume=True), stopped), "it is over"
    assert len(go(epochs=3, patience=9).history) == 3
    with user_error("patience of 0", "1 epoch or more"):
        go(epochs=3, patience=0)


# --- The LR range test ---


def test_lr_range_test_finds_a_rate_that_trains_and_changes_nothing():
    model = head(dropout=0.2)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "lr": 0.01}], momentum=0.9
    )
    before, state = weights(model), str(optimizer.state_dict())
    found = lr_range_test(model, nn.CrossEntropyLoss(), optimizer, loaders(), low=1e-5, high=1e3, points=30)
    assert same(weights(model), before) and str(optimizer.state_dict()) == state
    rates, losses = [point["lr"] for point in found], [point["val_loss"] for point in found]
    assert rates[0] == pytest.approx(1e-5) and rates == sorted(rates) and np.isfinite(losses).all()
    assert len(found) < 30 and losses[-1] > 10 * losses[0], "it goes on after the loss has blown up"
    rate = pick_rate(found)
    assert rate == pytest.approx(rates[int(np.argmin(losses))] / 3) and min(losses) < losses[0]
    again = lr_range_test(model, nn.CrossEntropyLoss(), optimizer, loaders(), low=1e-5, high=1e3, points=30)
    assert again == found

    def trained(lr):
        return run(head(), lr=lr, epochs=4, optimizer=None, schedule=lambda made: StepLR(made, 50)).history[-1]

    assert trained(rate)["train_loss"] < trained(rate / 1000)["train_loss"]


def test_lr_range_test_moves_all_groups_alike():
    model, seen = head(), []
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "lr": 0.01}]
    )
    model.register_forward_pre_hook(lambda *_: seen.append(tuple(g["lr"] for g in optimizer.param_groups)))
    lr_range_test(model, nn.CrossEntropyLoss(), optimizer, loaders(), high=1e-3, points=3, steps=1)
    assert len({a for a, _ in seen}) == 3 and all(b == pytest.approx(a / 10) for a, b in seen)


def test_lr_range_test_with_rates_that_fall():
    model = head()
    optimizer = torch.optim.Adam(model.parameters())
    for options in ({"low": 1.0, "high": 0.1}, {"low": 0.0}, {"points": 1}):
        with user_error("rates from", "two or more, rising"):
            lr_range_test(model, nn.CrossEntropyLoss(), optimizer, loaders(), **options)


# --- Resume ---


@pytest.mark.parametrize("stop", ["after epoch 2", "train", "val"])
def test_resumed_run_gives_the_numbers_of_one_that_was_not_interrupted(tmp_path, stop):
    options = {"seed": 3, "lr": 0.02, "checkpoint": tmp_path / "새 폴더" / "a.pt"}
    whole = run(epochs=5, **{**options, "checkpoint": None})
    if stop == "after epoch 2":
        run(epochs=2, **options)
    else:
        data = loaders()
        data[stop] = Stops(data[stop], at_pass=3)
        assert len(run(epochs=5, data=data, **options).history) == 2
    torch.manual_seed(99)
    resumed = run(epochs=5, resume=True, **options)
    assert same_result(resumed, whole) and not resumed.interrupted
    assert [row["lr"] for row in resumed.history] == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])
    assert files_below(tmp_path) == ["새 폴더/a.pt"]


def test_checkpoints_keep_their_distance(tmp_path, monkeypatch):
    saves, real = [], training._save
    monkeypatch.setattr(training, "_save", lambda *args: saves.append(len(args[5])) or real(*args))
    options = {"epochs": 4, "checkpoint": tmp_path / "a.pt"}
    whole = run(**options)
    assert saves == [1, 2, 3, 4]
    assert same_result(run(checkpoint_pause=1000.0, **options), whole) and len(saves) == 4
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    saves.clear()
    run(checkpoint_pause=40.0, **options)
    assert saves and len(saves) < 4, "some epochs pass between two saves"


def test_resume_with_batchnorm_and_momentum(tmp_path):
    def go(epochs, **options):
        model = tiny_cnn(dropout=0.2)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        return run(model, epochs=epochs, data=images(), optimizer=optimizer, **options)

    whole = go(4)
    go(2, checkpoint=tmp_path / "a.pt")
    assert same_result(go(4, checkpoint=tmp_path / "a.pt", resume=True), whole)


def test_resume_remembers_a_best_epoch_before_the_interrupt(tmp_path):
    def go(epochs, **options):
        model = nn.Sequential(head()[0], head()[3])
        return run(model, epochs=epochs, lr=0.1, schedule=lambda optimizer: spoil(optimizer, after=3), **options)

    whole = go(6)
    assert whole.best_epoch <= 3
    go(4, checkpoint=tmp_path / "a.pt")
    assert same_result(go(6, checkpoint=tmp_path / "a.pt", resume=True), whole)


def test_resume_of_a_finished_run_and_of_none(tmp_path):
    options = {"epochs": 2, "checkpoint": tmp_path / "a.pt"}
    first = run(resume=True, **options)  # nothing to go on from: from the start
    data = loaders()
    data["train"] = Stops(data["train"], at_pass=1)
    again = run(resume=True, data=data, **options)
    assert same_result(again, first) and data["train"].passes == 0
    assert same_result(run(**options), first), "without resume a checkpoint is not looked at"


def test_checkpoint_of_another_run(tmp_path):
    path = tmp_path / "a.pt"
    options = {"checkpoint": path, "resume": True}
    first = run(epochs=1, checkpoint=path)
    before = path.read_bytes()

    def sgd(lr):
        model = head(dropout=0.4)
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr)}

    for words, change in {
        "seed": {"seed": 4},
        "model": {"model": head(classes=4)},
        "scheduler": {"schedule": lambda optimizer: LambdaLR(optimizer, lambda epoch: 1.0)},
        "optimizer": {"lr": 0.5},
        "same optimizer": sgd(0.01),
        "the same model": {"model": nn.Sequential(nn.Linear(5, 3))},
    }.items():
        with user_error("a.pt", "another run", words, "delete the checkpoint"):
            run(**{"epochs": 3, **options, **change})
    assert path.read_bytes() == before, "a refused checkpoint was overwritten"
    assert same_result(run(epochs=1, **options), first)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "other tensors", "other folder"])
def test_damaged_checkpoint(tmp_path, damage):
    path = tmp_path / "a.pt"
    run(epochs=1, checkpoint=path)
    content = path.read_bytes()
    if damage == "other tensors":
        torch.save([torch.zeros(3)], path)
    elif damage == "other folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"hello\nyou"}[damage])
    with user_error("a.pt", "cannot be read", "delete the checkpoint"):
        run(epochs=2, checkpoint=path, resume=True)


def test_full_disk_while_saving_is_one_message(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args):
            self.file = open(*args)

        def write(self, _content):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    run(epochs=1, checkpoint=tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    monkeypatch.setattr(training, "open", Full, raising=False)
    with user_error("full disk", "a.pt"):
        run(epochs=2, checkpoint=tmp_path / "a.pt", resume=True)
    assert files_below(tmp_path) == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == before


# --- Bad input ---


def test_model_that_is_all_frozen():
    model = head().requires_grad_(False)
    with user_error("all frozen", "head"):
        run(model, optimizer=torch.optim.Adam(model.parameters()))


def test_optimizer_of_another_head():
    model, older = head(), head()
    with user_error("none of the model's trainable parameters", "after the head swap"):
        run(model, optimizer=torch.optim.Adam(older.parameters()))


def test_missing_or_empty_loader():
    data = loaders()
    with user_error("no loader 'val'"):
        run(data={"train": data["train"]})
    with user_error("empty loader 'train'"):
        run(data={**data, "train": []})
    with user_error("an empty loader"):
        evaluate(head(), iter(()))
    model = head()
    with user_error("an empty loader"):
        train_one_epoch(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()), iter(()))


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_out_of_range(labels):
    data = [(torch.zeros(2, 5), torch.tensor(labels))]
    low, high = min(labels), max(labels)
    for call in (
        lambda: run(data={"train": data, "val": data}),
        lambda: run(data={"train": loaders()["train"], "val": data}),
        lambda: evaluate(head(), data),
    ):
        with user_error(f"labels from {low} to {high} and 3 outputs", "0 to 2"):
            call()


def test_loss_that_is_not_a_number():
    data = loaders()
    data["train"].dataset.inputs[7, 2] = math.nan
    with user_error("loss of nan", "learning rate"):
        run(data=data)
    with user_error("loss of nan"):
        evaluate(head(), [(torch.full((2, 5), math.nan), torch.tensor([0, 1]))])
    model = head()
    with user_error("loss of"):
        train_one_epoch(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 1e30), loaders()["train"])


def test_no_epochs():
    for epochs in (0, -1):
        with user_error(f"num_epochs={epochs}", "1 or more"):
            run(epochs=epochs)
