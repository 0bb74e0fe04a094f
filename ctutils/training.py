"""The shared training loop: one epoch, one evaluation, and `train_model` over both."""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ctutils.base import HISTORY_COLUMNS, CTError, atomic_path, progress
from ctutils.metrics import accuracy, macro_f1


@dataclasses.dataclass
class TrainResult:
    """What `train_model` returns.

    Attributes:
        model: the module, holding the weights of the best epoch.
        history: one dict an epoch, keys as in HISTORY_COLUMNS.
        best_epoch: 1-based epoch of the highest validation macro F1; 0 when no epoch was finished.
        best_score: that macro F1; NaN when no epoch was finished.
        interrupted: True when Ctrl-C ended the training early.
    """

    model: nn.Module
    history: list[dict[str, float]]
    best_epoch: int
    best_score: float
    interrupted: bool = False

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
    check_labels: bool = True,
    bar=None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Train on every example once.

    Args:
        model: maps inputs to logits (B, C).
        criterion: mean loss of a batch of logits (B, C) and labels (B,).
        loader: yields inputs float32 (B, ...) and labels int64 (B,) in [0, C).
        batchnorm: `frozen` or `drift`, see `set_train_mode`.
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
    return _one_pass(model, criterion, loader, optimizer, check_labels, bar)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    criterion: nn.Module | None = None,
    *,
    check_labels: bool = True,
    bar=None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Score every example once and return class probabilities.

    Args:
        model: maps inputs to logits (B, C); put in eval mode here.
        loader: yields inputs float32 (B, ...) and labels int64 (B,) in [0, C).
        criterion: loss to average over examples (default cross-entropy).
        check_labels, bar: as in `train_one_epoch`.
    Returns:
        mean loss, y_true int64 (N,), y_score float32 (N, C); rows of y_score sum to 1.
    Raises:
        CTError: the loader is empty, labels are out of range, or the loss is not a number.
    Source: notebook 02, section 3.
    """
    model.eval()
    return _one_pass(model, criterion or nn.CrossEntropyLoss(), loader, None, check_labels, bar)


def _one_pass(model, criterion, loader, optimizer, check_labels, bar):
    """One pass over a loader, with steps when there is an optimizer; the device is asked once, at the end."""
    device = next(model.parameters()).device
    losses, all_labels, all_logits = [], [], []
    for inputs, labels in loader:
        inputs = inputs.to(device, non_blocking=True)
        # Mixed precision on a GPU: bfloat16 has float32's range, so no gradient scaler is needed.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs)
        logits = logits.float()
        if check_labels and not (0 <= int(labels.min()) and int(labels.max()) < logits.shape[1]):
            raise CTError(
                f"labels from {int(labels.min())} to {int(labels.max())} and {logits.shape[1]} outputs",
                f"labels from 0 to {logits.shape[1] - 1}",
                "give the head one output a class",
            )
        labels = labels.to(device, non_blocking=True)
        loss = criterion(logits, labels)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Over examples: the last batch is smaller, so its mean must weigh less.
        losses.append(loss.detach() * len(labels))
        all_labels.append(labels)
        all_logits.append(logits.detach())
        if bar is not None:
            bar.update()
    if not losses:
        raise CTError("an empty loader", "one batch or more", "check that the split has slices")
    y_true = torch.cat(all_labels).cpu()
    mean_loss = float(torch.stack(losses).sum()) / len(y_true)
    if not np.isfinite(mean_loss):
        raise CTError(
            f"a loss of {mean_loss}",
            "a finite number",
            "lower the learning rate, or look for NaN in the inputs",
        )
    return mean_loss, y_true.numpy(), torch.softmax(torch.cat(all_logits), 1).cpu().numpy()


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
) -> TrainResult:
    """Train for some epochs and keep the weights of the epoch with the best validation macro F1.

    The deck's function, its arguments in its order. It trains a whole network on images or a bare head on
    cached features: both are a module and two loaders. The module stays on the device it is on.

    Args:
        model: maps inputs to logits (B, C), with at least one trainable parameter.
        criterion: mean loss of logits (B, C) and labels (B,).
        optimizer: over the trainable parameters.
        scheduler: stepped once an epoch, or None.
        loaders: {"train": ..., "val": ...}, each yields inputs float32 (B, ...) and labels int64 (B,).
        num_epochs: epochs in all, those before a resume included.
        seed: epoch e starts from torch seed (seed, e), so shuffling and dropout repeat, also after a resume.
        batchnorm: `frozen` keeps frozen layers in eval mode; `drift` is the deck's `model.train()`.
        checkpoint: file to save after every epoch, so that an interrupted run can go on.
        resume: go on from `checkpoint` if it is there.
    Returns:
        TrainResult; `result.model` is `model` with the best weights, also after Ctrl-C.
    Raises:
        CTError: no trainable parameter, none of them in the optimizer, an empty loader, labels out of range,
            a loss that is not a number, a checkpoint of another run.
    Source: notebook 02, section 5.
    """
    _check(model, optimizer, loaders, num_epochs)
    history: list[dict[str, float]] = []
    best_epoch, best_score, best_state = 0, float("nan"), _changing_state(model)
    checkpoint = Path(checkpoint) if checkpoint else None
    if resume and checkpoint and checkpoint.exists():
        history, best_epoch, best_score, best_state = _load(checkpoint, model, optimizer, scheduler, seed)
    steps = sum(len(loaders[phase]) for phase in ("train", "val"))
    bar = progress(total=num_epochs * steps, initial=len(history) * steps, desc="Training", unit="batch", leave=False)
    interrupted = False
    try:
        for epoch in range(len(history) + 1, num_epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(seed * 100_003 + epoch)
            row: dict[str, float] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            for phase in ("train", "val"):
                options = {"check_labels": epoch == 1, "bar": bar}
                if phase == "train":
                    scored = train_one_epoch(
                        model, criterion, optimizer, loaders[phase], batchnorm=batchnorm, **options
                    )
                else:
                    scored = evaluate(model, loaders[phase], criterion, **options)
                row[f"{phase}_loss"], y_true, y_score = scored
                y_pred = y_score.argmax(1)
                row[f"{phase}_accuracy"] = accuracy(y_true, y_pred)
                row[f"{phase}_macro_f1"] = macro_f1(y_true, y_pred, y_score.shape[1])
            if scheduler is not None:
                scheduler.step()
            row["seconds"] = time.perf_counter() - start
            history.append({column: row[column] for column in HISTORY_COLUMNS})
            if not best_epoch or row["val_macro_f1"] > best_score:  # the first of equals stays
                best_epoch, best_score, best_state = epoch, row["val_macro_f1"], _changing_state(model)
            bar.set_postfix_str(f"epoch {epoch}/{num_epochs} val macro F1 {row['val_macro_f1']:.3f}")
            if checkpoint:
                _save(checkpoint, model, optimizer, scheduler, seed, history, best_epoch, best_score, best_state)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
        model.load_state_dict(best_state, strict=False)
        model.eval()
    return TrainResult(model, history, best_epoch, best_score, interrupted)


def _check(model, optimizer, loaders, num_epochs) -> None:
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
    device = next(model.parameters()).device
    mend = "delete the checkpoint to start again"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        saved, best = dict(state["run"]), state["best"]
    except Exception as error:  # a damaged file may raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CTError(f"a checkpoint '{path.name}' that cannot be read ({reason})", "one of this run", mend) from error
    wanted = _identity(model, optimizer, scheduler, seed)
    other = [key for key in wanted if saved.get(key) != wanted[key]]
    if other:
        raise CTError(
            f"a checkpoint '{path.name}' of another run (not the same {', '.join(other)})", "one of this run", mend
        )
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if scheduler:
        scheduler.load_state_dict(state["scheduler"])
    return state["history"], best["epoch"], best["score"], best["state"]
