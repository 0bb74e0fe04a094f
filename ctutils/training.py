"""The shared training loop `train_model`, its twin `evaluate`, and a test that finds a learning rate."""

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from ctutils.base import CTError, atomic_path, progress
from ctutils.metrics import accuracy, macro_f1


class Diverged(CTError):
    """The loss is not a number any more."""


class OtherCheckpoint(CTError):
    """A checkpoint that is damaged, or of another run."""


SEED_STEP = 100_003  # between the torch seeds of one run's epochs and the next seed's


@dataclasses.dataclass
class TrainResult:
    """What `train_model` returns."""

    model: nn.Module  # with the weights of the best epoch
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)  # an epoch a row: runs.HISTORY_COLUMNS
    best_epoch: int = 0  # the first of the highest validation macro F1, from 1; 0 when no epoch was finished
    best_score: float = float("nan")  # that macro F1
    interrupted: bool = False  # Ctrl-C ended the training early
    diverged: str = ""  # after a good epoch: the message that names the epoch whose loss is not a number

    def history_table(self):
        """Return the history as a pandas DataFrame, one row an epoch."""
        import pandas as pd

        return pd.DataFrame(self.history)


def set_train_mode(model: nn.Module, batchnorm: str = "frozen") -> None:
    """Put a module in train mode, but keep what is frozen in eval mode.

    A module that has parameters, all of them frozen, goes to eval mode with everything inside it, so that its
    BatchNorm layers neither use batch statistics nor update their running ones. With `batchnorm="drift"`
    everything goes to train mode, as `model.train()` does: the deck's way, kept for the lesson.

    Source: notebook 02, "frozen, but moving".
    """
    model.train()
    for module in model.modules() if batchnorm == "frozen" else ():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if not any(learns) and (learns or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            module.eval()


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
    patience: int | None = None,
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
        patience: stop when the validation macro F1 has not risen for so many epochs (early stopping).
    Returns:
        TrainResult; `result.model` is `model` with the best weights, also after Ctrl-C and after a loss that is not
        a number.
    Raises:
        CTError: no trainable parameter, none of them in the optimizer, an empty loader, a loss that is not a
            number in the first epoch (`Diverged`), a checkpoint of another run.
    Source: notebook 02, section 5.
    """
    check_trainable(model, optimizer, loaders)
    device = next(model.parameters()).device
    by_batch = isinstance(scheduler, (OneCycleLR, CyclicLR))
    result, best_weights = TrainResult(model), changing_state(model)
    if resume and checkpoint and Path(checkpoint).exists():
        best_weights = load_checkpoint(checkpoint, result, optimizer, scheduler, seed)
    steps = sum(len(loaders[phase]) for phase in ("train", "val"))
    done = len(result.history)
    bar = progress(total=num_epochs * steps, initial=done * steps, desc="Training", unit="batch", leave=False)
    try:
        for epoch in range(done + 1, num_epochs + 1):
            if patience and epoch - result.best_epoch > patience:
                break
            start = time.perf_counter()
            torch.manual_seed(seed * SEED_STEP + epoch)
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}

            for phase in ("train", "val"):
                if phase == "train":
                    set_train_mode(model, batchnorm)
                else:
                    model.eval()
                batches = []  # of this phase: loss, labels, predictions

                for inputs, labels in loaders[phase]:
                    inputs, labels = inputs.to(device), labels.to(device)
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(phase == "train"):
                        logits = model(inputs)
                        loss = criterion(logits, labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                            if by_batch:
                                scheduler.step()
                    batches.append((loss.detach(), labels, logits.detach().argmax(1)))
                    bar.update()

                row |= epoch_scores(phase, batches, logits.shape[1], criterion, epoch)

            if scheduler is not None and not by_batch:
                scheduler.step()
            result.history.append({**row, "seconds": time.perf_counter() - start})
            if not result.best_epoch or row["val_macro_f1"] > result.best_score:  # the first of equals stays
                result.best_epoch, result.best_score = epoch, row["val_macro_f1"]
                best_weights = changing_state(model, best_weights)
            bar.set_postfix_str(f"epoch {epoch}/{num_epochs} val macro F1 {row['val_macro_f1']:.3f}")
            if checkpoint:
                save_checkpoint(checkpoint, result, optimizer, scheduler, seed, best_weights)
    except KeyboardInterrupt:
        result.interrupted = True
    except Diverged as error:
        if not result.history:
            raise
        result.diverged = str(error)
    finally:
        bar.close()
        model.load_state_dict(best_weights, strict=False)
        model.eval()
    return result


def epoch_scores(
    phase: str, batches: list, num_classes: int, criterion: nn.Module | None = None, epoch: int = 0
) -> dict:
    """Return loss, accuracy and macro F1 of a whole phase, over examples and not over batches.

    Args:
        phase: `train` or `val`, the beginning of the keys.
        batches: for each batch its mean loss (), labels int64 (B,) and predicted classes int64 (B,), as tensors.
        criterion: its class weights, if it has some, are what a mean loss divides by.
    Raises:
        Diverged: the loss is not a number.
    """
    losses, labels, predicted = zip(*batches, strict=True)
    weight = getattr(criterion, "weight", None)
    mass = [len(some) if weight is None else float(weight[some].sum()) for some in labels]  # the last batch is smaller
    mean_loss = float((torch.stack(losses).cpu().float() * torch.tensor(mass)).sum() / sum(mass))
    if not np.isfinite(mean_loss):
        raise Diverged(
            f"a {phase} loss of {mean_loss}" + (f" in epoch {epoch}" if epoch else ""),
            "a finite number",
            "lower the learning rate, or look for NaN in the inputs",
        )
    y_true, y_pred = torch.cat(labels).cpu().numpy(), torch.cat(predicted).cpu().numpy()
    return {
        f"{phase}_loss": mean_loss,
        f"{phase}_accuracy": accuracy(y_true, y_pred),
        f"{phase}_macro_f1": macro_f1(y_true, y_pred, num_classes),
    }


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, criterion=None) -> tuple[float, np.ndarray, np.ndarray]:
    """Score every example once and return class probabilities.

    Args:
        model: maps inputs to logits (B, C); put in eval mode here.
        loader: yields inputs float32 (B, ...) and labels int64 (B,) in [0, C).
        criterion: loss to average over examples (default cross-entropy).
    Returns:
        mean loss, y_true int64 (N,), y_score float32 (N, C); rows of y_score sum to 1.
    Raises:
        CTError: the loss is not a number.
    Source: notebook 02, section 3.
    """
    model.eval()
    criterion = criterion or nn.CrossEntropyLoss()
    device = next(model.parameters()).device
    batches, scores = [], []
    for inputs, labels in loader:
        labels = labels.to(device)
        logits = model(inputs.to(device))
        batches.append((criterion(logits, labels), labels, logits.argmax(1)))
        scores.append(torch.softmax(logits, 1))
    y_score = torch.cat(scores).cpu().numpy()
    loss = epoch_scores("val", batches, y_score.shape[1], criterion)["val_loss"]
    return loss, torch.cat([labels for _, labels, _ in batches]).cpu().numpy(), y_score


def lr_range_test(
    model, criterion, optimizer, loaders, *, low=1e-6, high=1.0, points=25, steps=4, seed=0
) -> list[dict[str, float]]:
    """Train with a rate that rises from point to point, and watch the validation loss.

    At each of `points` rates, evenly spaced on a log scale, `steps` batches are trained; then the whole validation
    split is scored. The test ends early when the loss is ten times the first one or not a number. Model and
    optimizer come back as they were.

    Args:
        model, criterion, optimizer, loaders: as for `train_model`; all groups of the optimizer keep their ratio to
            the first one's rate.
        low, high: first and last rate of the first group.
        seed: of shuffling and dropout.
    Returns:
        one dict a point: lr, val_loss.
    Raises:
        CTError: as `train_model`; a loss that is not a number at the very first point.
    Source: notebook 11; L. Smith, 2017, https://arxiv.org/abs/1506.01186
    """
    check_trainable(model, optimizer, loaders)
    device = next(model.parameters()).device
    before = changing_state(model), copy.deepcopy(optimizer.state_dict())
    ratios = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    torch.manual_seed(seed)
    batches = itertools.chain.from_iterable(itertools.repeat(loaders["train"]))  # epoch after epoch
    found: list[dict[str, float]] = []
    try:
        for rate in np.geomspace(low, high, points).tolist():
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = rate * ratio
            set_train_mode(model)
            for inputs, labels in itertools.islice(batches, steps):
                optimizer.zero_grad()
                criterion(model(inputs.to(device)), labels.to(device)).backward()
                optimizer.step()
            found.append({"lr": rate, "val_loss": evaluate(model, loaders["val"], criterion)[0]})
            if found[-1]["val_loss"] > 10 * found[0]["val_loss"]:
                break
    except Diverged:  # any other error is no divergence
        if not found:
            raise
    finally:
        model.load_state_dict(before[0], strict=False)
        optimizer.load_state_dict(before[1])
        model.eval()
    return found


def pick_rate(found: list[dict[str, float]]) -> float:
    """Return a third of the rate where the validation loss was lowest: safely where it still falls (notebook 11)."""
    return min(found, key=lambda point: point["val_loss"])["lr"] / 3


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory, of the GPU or of the machine, is full."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error).lower()


def check_trainable(model: nn.Module, optimizer: torch.optim.Optimizer, loaders: Mapping[str, Iterable]) -> None:
    """Raise CTError when training would change nothing."""
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise CTError("a model whose parameters are all frozen", "a trainable head", "replace the head after freezing")
    if not trainable & {id(p) for group in optimizer.param_groups for p in group["params"]}:
        found = "an optimizer that holds none of the model's trainable parameters"
        raise CTError(found, "the parameters of the new head", "make the optimizer after the head swap")
    for phase in ("train", "val"):
        if not len(loaders[phase]):
            raise CTError(f"an empty loader '{phase}'", "one batch or more", "check that the split has slices")


def changing_state(model: nn.Module, into: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Copy what training can change: trainable parameters and all buffers; into an older copy, if one is given."""
    keep = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    if into is None:
        return {name: tensor.detach().clone() for name, tensor in keep.items()}
    return {name: into[name].copy_(tensor.detach()) for name, tensor in keep.items()}


def _identity(model, optimizer, scheduler, seed) -> dict[str, str]:
    """Return what a run and the checkpoint it goes on from must have in common."""
    return {
        "model": str([(name, tuple(tensor.shape)) for name, tensor in changing_state(model).items()]),
        "optimizer": f"{type(optimizer).__name__} {optimizer.defaults}",
        "scheduler": type(scheduler).__name__,
        "seed": str(seed),
    }


def save_checkpoint(path, result: TrainResult, optimizer, scheduler, seed: int, best_weights: dict) -> None:
    """Save all that the next epoch depends on, atomically; of several processes (`distributed`) the first does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    state = {
        "run": _identity(result.model, optimizer, scheduler, seed),
        "model": changing_state(result.model),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "result": (result.history, result.best_epoch, result.best_score, best_weights),
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # torch's own writer hides a full disk
        torch.save(state, file)


def load_checkpoint(path, result: TrainResult, optimizer, scheduler, seed: int) -> dict[str, torch.Tensor]:
    """Put a checkpoint back into model, optimizer, scheduler and `result`; return the best weights.

    Raises:
        OtherCheckpoint: it cannot be read, or belongs to another run.
    """
    found, mend = f"a checkpoint '{Path(path).name}'", "delete the checkpoint to start again"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # what loads it moves it
        saved = dict(state["run"])
    except Exception as error:  # a damaged file may raise almost anything
        found += f" that cannot be read ({type(error).__name__})"
        raise OtherCheckpoint(found, "one of this run", mend) from error
    wanted = _identity(result.model, optimizer, scheduler, seed)
    if other := [key for key in wanted if saved.get(key) != wanted[key]]:
        raise OtherCheckpoint(f"{found} of another run (not the same {', '.join(other)})", "one of this run", mend)
    result.model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if scheduler:
        scheduler.load_state_dict(state["scheduler"])
    result.history, result.best_epoch, result.best_score, best_weights = state["result"]
    return best_weights
