"""The shared training loop: one epoch, one evaluation, and `train_model` over both."""

import copy
import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from ctutils.base import HISTORY_COLUMNS, CTError, atomic_path, is_out_of_memory, progress
from ctutils.metrics import accuracy, macro_f1

log = logging.getLogger(__name__)


class OtherCheckpoint(CTError):
    """A checkpoint that is damaged, or of another run."""


@dataclasses.dataclass
class Batching:
    """How a batch goes through the network; the gradient of a step is always that of the whole batch.

    Attributes:
        at_once: examples that go through at a time, their gradients added up; None: the whole batch. It is
            halved when the memory is full, and stays so. BatchNorm that is being trained sees the parts only.
        bfloat16: multiply in bfloat16 (autocast). It has float32's range, so that no gradient scaler is needed.
    """

    at_once: int | None = None
    bfloat16: bool = False


@dataclasses.dataclass
class TrainResult:
    """What `train_model` returns.

    Attributes:
        model: the module, holding the weights of the best epoch.
        history: one dict an epoch, keys as in HISTORY_COLUMNS.
        best_epoch: 1-based epoch of the highest validation macro F1; 0 when no epoch was finished.
        best_score: that macro F1; NaN when no epoch was finished.
        interrupted: True when Ctrl-C ended the training early.
        at_once: examples that went through the network at a time; None when always the whole batch.
    """

    model: nn.Module
    history: list[dict[str, float]]
    best_epoch: int
    best_score: float
    interrupted: bool = False
    at_once: int | None = None

    def history_table(self):
        """Return the history as a pandas DataFrame, one row an epoch."""
        import pandas as pd

        return pd.DataFrame(self.history, columns=list(HISTORY_COLUMNS))


def set_train_mode(model: nn.Module, batchnorm: str = "frozen") -> None:
    """Put a module in train mode, but keep what is frozen in eval mode.

    A module that has parameters, all of them frozen, goes to eval mode with everything inside it, so that its
    BatchNorm layers neither use batch statistics nor update their running ones. With `batchnorm="drift"`
    everything goes to train mode, as `model.train()` does: the deck's way, kept for the lesson.

    Source: notebook 02, "frozen, but moving".
    """
    model.train()
    if batchnorm == "drift":
        return
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if frozen or (isinstance(module, nn.modules.batchnorm._BatchNorm) and not parameters):
            module.eval()


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable,
    *,
    batchnorm: str = "frozen",
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    batching: Batching | None = None,
    check_labels: bool = True,
    bar=None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Train on every example once.

    Args:
        model: maps inputs to logits (B, C).
        criterion: mean loss of a batch of logits (B, C) and labels (B,).
        loader: yields inputs float32 (B, ...) and labels int64 (B,) in [0, C).
        batchnorm: `frozen` or `drift`, see `set_train_mode`.
        scheduler: one that is stepped after every batch (one-cycle), or None.
        batching: how a batch goes through the network.
        check_labels: look at each batch's labels first (on a GPU this waits for the device).
        bar: a tqdm bar to move one step a batch.
    Returns:
        as `evaluate`: mean loss over examples, y_true int64 (N,), y_score float32 (N, C), each example scored
        as it was met, before its step.
    Raises:
        CTError: the loader is empty, labels are out of range, or the loss is not a number.
    Source: notebook 02, section 4.
    """
    set_train_mode(model, batchnorm)
    return _one_pass(model, criterion, loader, optimizer, scheduler, batching or Batching(), check_labels, bar)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    criterion: nn.Module | None = None,
    *,
    batching: Batching | None = None,
    check_labels: bool = True,
    bar=None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Score every example once and return class probabilities.

    Args:
        model: maps inputs to logits (B, C); put in eval mode here.
        loader: yields inputs float32 (B, ...) and labels int64 (B,) in [0, C).
        criterion: loss to average over examples (default cross-entropy).
        batching, check_labels, bar: as in `train_one_epoch`.
    Returns:
        mean loss, y_true int64 (N,), y_score float32 (N, C); rows of y_score sum to 1.
    Raises:
        CTError: the loader is empty, labels are out of range, or the loss is not a number.
    Source: notebook 02, section 3.
    """
    model.eval()
    criterion = criterion or nn.CrossEntropyLoss()
    return _one_pass(model, criterion, loader, None, None, batching or Batching(), check_labels, bar)


def _one_pass(model, criterion, loader, optimizer, scheduler, batching, check_labels, bar):
    """One pass over a loader, with steps when there is an optimizer; the device is asked once, at the end."""
    losses, masses, all_labels, all_logits = [], [], [], []
    for inputs, labels in loader:
        loss, mass, labels, logits = _one_batch(model, criterion, inputs, labels, optimizer, batching, check_labels)
        if optimizer is not None:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        # Over examples: the last batch is smaller, so its mean must weigh less.
        losses.append(loss * mass)
        masses.append(mass)
        all_labels.append(labels)
        all_logits.append(logits)
        if bar is not None:
            bar.update()
    if not losses:
        raise CTError("an empty loader", "one batch or more", "check that the split has slices")
    mean_loss = float(torch.stack(losses).sum() / sum(masses))
    if not np.isfinite(mean_loss):
        raise CTError(
            f"a loss of {mean_loss}",
            "a finite number",
            "lower the learning rate, or look for NaN in the inputs",
        )
    y_score = torch.softmax(torch.cat(all_logits), 1)
    return mean_loss, torch.cat(all_labels).cpu().numpy(), y_score.cpu().numpy()


def _one_batch(model, criterion, inputs, labels, optimizer, batching, check_labels):
    """Score one batch and leave its gradient in the parameters; in halves when the memory is full."""
    began_with = batching.at_once or len(labels)
    while True:
        try:
            scored = _in_parts(model, criterion, inputs, labels, optimizer, batching, check_labels)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        now = min(batching.at_once or len(labels), len(labels))
        if now == 1:
            raise CTError("memory too small for one slice", "room for one", "choose a smaller size or backbone")
        batching.at_once = now // 2  # again, outside the handler: the error holds on to the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if batching.at_once and batching.at_once < began_with:
        log.warning(
            f"Out of memory with {began_with} slices at once: {batching.at_once} from here on. The gradients of "
            "a batch are added up, so that the batch size stays the same."
        )
    return scored


def _in_parts(model, criterion, inputs, labels, optimizer, batching, check_labels):
    """Return loss (mean over the batch), mass (what it counts), labels (B,) and logits (B, C)."""
    device = next(model.parameters()).device
    size = batching.at_once or len(labels)
    low, high = (int(labels.min()), int(labels.max())) if check_labels else (0, 0)
    labels = labels.to(device, non_blocking=True)
    total = _mass(criterion, labels)
    if optimizer is not None:
        optimizer.zero_grad()
    losses, all_labels, all_logits = [], [], []
    for part, part_labels in zip(inputs.split(size), labels.split(size), strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=batching.bfloat16):
            logits = model(part.to(device, non_blocking=True))
        logits = logits.float()
        if low < 0 or high >= logits.shape[1]:
            raise CTError(
                f"labels from {low} to {high} and {logits.shape[1]} outputs",
                f"labels from 0 to {logits.shape[1] - 1}",
                "give the head one output a class",
            )
        loss = criterion(logits, part_labels) * (_mass(criterion, part_labels) / total)
        if optimizer is not None:
            loss.backward()  # adds to the gradient of the parts before
        losses.append(loss.detach())
        all_labels.append(part_labels)
        all_logits.append(logits.detach())
    return sum(losses), total, torch.cat(all_labels), torch.cat(all_logits)


def _mass(criterion, labels):
    """Return what a mean loss divides by: the examples, or the sum of their class weights."""
    weight = getattr(criterion, "weight", None)
    return len(labels) if weight is None else weight[labels].sum()


def train_model(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    loaders: Mapping[str, Iterable],
    num_epochs: int = 10,
    *,
    seed: int = 0,
    batchnorm: str = "frozen",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    checkpoint_pause: float = 0.0,
    patience: int | None = None,
    batching: Batching | None = None,
) -> TrainResult:
    """Train for some epochs and keep the weights of the epoch with the best validation macro F1.

    The deck's function, its arguments in its order. It trains a whole network on images or a bare head on
    cached features: both are a module and two loaders. The module stays on the device it is on.

    Args:
        model: maps inputs to logits (B, C), with at least one trainable parameter.
        criterion: mean loss of logits (B, C) and labels (B,).
        optimizer: over the trainable parameters.
        scheduler: stepped once an epoch (one-cycle: after every batch), or None.
        loaders: {"train": ..., "val": ...}, each yields inputs float32 (B, ...) and labels int64 (B,).
        num_epochs: epochs in all, those before a resume included.
        seed: epoch e starts from torch seed (seed, e), so shuffling and dropout repeat, also after a resume.
        batchnorm: `frozen` keeps frozen layers in eval mode; `drift` is the deck's `model.train()`.
        checkpoint: file to save after every epoch, so that an interrupted run can go on.
        resume: go on from `checkpoint` if it is there.
        checkpoint_pause: seconds between two saves at least; a whole network's checkpoint may be gigabytes.
        patience: stop when the validation macro F1 has not risen for so many epochs (early stopping).
        batching: how a batch goes through the network: accumulation, precision.
    Returns:
        TrainResult; `result.model` is `model` with the best weights, also after Ctrl-C.
    Raises:
        CTError: no trainable parameter, none of them in the optimizer, an empty loader, labels out of range,
            a loss that is not a number, a checkpoint of another run.
    Source: notebook 02, section 5.
    """
    _check(model, optimizer, loaders, num_epochs, patience)
    history: list[dict[str, float]] = []
    best_epoch, best_score, best_state = 0, float("nan"), _changing_state(model)
    checkpoint = Path(checkpoint) if checkpoint else None
    if resume and checkpoint and checkpoint.exists():
        history, best_epoch, best_score, best_state = _load(checkpoint, model, optimizer, scheduler, seed)
    batching = dataclasses.replace(batching or Batching())
    by_batch = isinstance(scheduler, (OneCycleLR, CyclicLR))
    steps = sum(len(loaders[phase]) for phase in ("train", "val"))
    bar = progress(total=num_epochs * steps, initial=len(history) * steps, desc="Training", unit="batch", leave=False)
    interrupted, last_save = False, time.perf_counter() if checkpoint_pause else -float("inf")
    try:
        for epoch in range(len(history) + 1, num_epochs + 1):
            if patience and epoch - 1 - best_epoch >= patience:
                break
            start = time.perf_counter()
            torch.manual_seed(seed * 100_003 + epoch)
            row: dict[str, float] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            for phase in ("train", "val"):
                options = {"batching": batching, "check_labels": epoch == 1, "bar": bar}
                if phase == "train":
                    options |= {"batchnorm": batchnorm, "scheduler": scheduler if by_batch else None}
                    scored = train_one_epoch(model, criterion, optimizer, loaders[phase], **options)
                else:
                    scored = evaluate(model, loaders[phase], criterion, **options)
                row[f"{phase}_loss"], y_true, y_score = scored
                y_pred = y_score.argmax(1)
                row[f"{phase}_accuracy"] = accuracy(y_true, y_pred)
                row[f"{phase}_macro_f1"] = macro_f1(y_true, y_pred, y_score.shape[1])
            if scheduler is not None and not by_batch:
                scheduler.step()
            row["seconds"] = time.perf_counter() - start
            history.append({column: row[column] for column in HISTORY_COLUMNS})
            if not best_epoch or row["val_macro_f1"] > best_score:  # the first of equals stays
                best_epoch, best_score, best_state = epoch, row["val_macro_f1"], _changing_state(model)
            bar.set_postfix_str(f"epoch {epoch}/{num_epochs} val macro F1 {row['val_macro_f1']:.3f}")
            if checkpoint and time.perf_counter() - last_save >= checkpoint_pause:
                _save(checkpoint, model, optimizer, scheduler, seed, history, best_epoch, best_score, best_state)
                last_save = time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
        model.load_state_dict(best_state, strict=False)
        model.eval()
    return TrainResult(model, history, best_epoch, best_score, interrupted, batching.at_once)


def lr_range_test(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    loaders: Mapping[str, Iterable],
    *,
    low: float = 1e-6,
    high: float = 1.0,
    points: int = 25,
    steps: int = 4,
    seed: int = 0,
    batching: Batching | None = None,
) -> list[dict[str, float]]:
    """Train with a rate that rises from point to point, and watch the validation loss.

    At each of `points` rates, evenly spaced on a log scale, `steps` batches are trained; then the whole validation
    split is scored. The test ends early when the loss is ten times the first one or not a number. Model and
    optimizer come back as they were.

    Args:
        model, criterion, optimizer, loaders, batching: as for `train_model`; all groups of the optimizer keep
            their ratio to the first one's rate.
        low, high: first and last rate of the first group.
        seed: of shuffling and dropout.
    Returns:
        one dict a point: lr, val_loss.
    Raises:
        CTError: as `train_model`; a first rate that is not below the last.
    Source: notebook 11; L. Smith, 2017, https://arxiv.org/abs/1506.01186
    """
    _check(model, optimizer, loaders, 1, None)
    if not 0 < low < high or points < 2:
        raise CTError(f"{points} rates from {low} to {high}", "two or more, rising", "leave them out")
    before, optimizer_before = _changing_state(model), copy.deepcopy(optimizer.state_dict())
    ratios = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    torch.manual_seed(seed)
    batches = _endless(loaders["train"])
    found: list[dict[str, float]] = []
    try:
        for rate in np.geomspace(low, high, points).tolist():
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = rate * ratio
            try:
                some = [next(batches) for _ in range(steps)]
                train_one_epoch(model, criterion, optimizer, some, batching=batching)
                found.append({"lr": rate, "val_loss": evaluate(model, loaders["val"], criterion, batching=batching)[0]})
            except CTError:  # the loss is not a number
                if not found:
                    raise
                break
            if found[-1]["val_loss"] > 10 * found[0]["val_loss"]:
                break
    finally:
        model.load_state_dict(before, strict=False)
        optimizer.load_state_dict(optimizer_before)
        model.eval()
    return found


def pick_rate(found: list[dict[str, float]]) -> float:
    """Return a rate from an LR range test: a third of the one where the validation loss was lowest.

    The lowest point stands where the loss is about to rise; a third of it is safely on the falling side.

    Source: notebook 11.
    """
    return min(found, key=lambda point: point["val_loss"])["lr"] / 3


def _endless(loader: Iterable):
    while True:
        yield from loader


def _check(model, optimizer, loaders, num_epochs, patience) -> None:
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise CTError(
            "a model whose parameters are all frozen",
            "a trainable head",
            "replace the head after freezing, or set requires_grad on its parameters",
        )
    if not trainable & {id(p) for group in optimizer.param_groups for p in group["params"]}:
        raise CTError(
            "an optimizer that holds none of the model's trainable parameters",
            "the parameters of the new head",
            "make the optimizer after the head swap",
        )
    for phase in ("train", "val"):
        if phase not in loaders:
            raise CTError(f"no loader '{phase}'", 'loaders = {"train": ..., "val": ...}', "add it")
        if not len(loaders[phase]):
            raise CTError(f"an empty loader '{phase}'", "one batch or more", "check that the split has slices")
    if num_epochs < 1:
        raise CTError(f"num_epochs={num_epochs}", "1 or more", "ask for one epoch at least")
    if patience is not None and patience < 1:
        raise CTError(f"a patience of {patience}", "1 epoch or more, or None", "5 is a usual choice")


def _changing_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy what training can change: trainable parameters and all buffers."""
    keep = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in keep.items()}


def _identity(model, optimizer, scheduler, seed) -> dict[str, str]:
    """Return what a run and the checkpoint it goes on from must have in common."""
    changing = [(name, p) for name, p in model.named_parameters() if p.requires_grad] + [*model.named_buffers()]
    return {
        "model": str([(name, tuple(tensor.shape)) for name, tensor in changing]),
        "optimizer": f"{type(optimizer).__name__} {optimizer.defaults}",
        "scheduler": type(scheduler).__name__,
        "seed": str(seed),
    }


def _save(path, model, optimizer, scheduler, seed, history, best_epoch, best_score, best_state) -> None:
    state = {
        "run": _identity(model, optimizer, scheduler, seed),
        "model": _changing_state(model),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "history": history,
        "best": {"epoch": best_epoch, "score": best_score, "state": best_state},
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # torch's own writer hides a full disk
        torch.save(state, file)


def _load(path, model, optimizer, scheduler, seed):
    mend = "delete the checkpoint to start again"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # what loads it moves it
        saved, best = dict(state["run"]), state["best"]
    except Exception as error:  # a damaged file may raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        found = f"a checkpoint '{path.name}' that cannot be read ({reason})"
        raise OtherCheckpoint(found, "one of this run", mend) from error
    wanted = _identity(model, optimizer, scheduler, seed)
    other = [key for key in wanted if saved.get(key) != wanted[key]]
    if other:
        found = f"a checkpoint '{path.name}' of another run (not the same {', '.join(other)})"
        raise OtherCheckpoint(found, "one of this run", mend)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if scheduler:
        scheduler.load_state_dict(state["scheduler"])
    return state["history"], best["epoch"], best["score"], best["state"]
