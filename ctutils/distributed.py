"""One training in several processes, a GPU each: `torchrun --nproc-per-node N -m ctutils train DATA --unfreeze`.

`train_model` stays as it is, and every process runs it; what is shared stands around it. Each process sends its
part of a batch through the network and is given the logits of all parts, with the labels of the whole batch. So loss,
scores, best epoch and early stopping are those of one process with the same batch size, in every process alike.
"""

import contextlib
import logging
import os
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from ctutils import experiment
from ctutils.backbones import BatchNorm
from ctutils.base import CTError
from ctutils.config import Settings
from ctutils.plan import Plan
from ctutils.runs import Run
from ctutils.training import is_out_of_memory

GOES_ON = "the same command with --resume goes on after the last finished epoch"
LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "socket", "nccl", "gloo")  # in errors


class _Stopped(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, after which `train_model` would go on to what the others no longer do."""


class Team:
    """The processes of one training, from inside one of them.

    Attributes:
        rank: this one's number, from 0; size: how many there are.
        count: slices of the batch at hand, in all processes.
    """

    def __init__(self, device: str):
        self.store, self.rank, self.size = next(dist.rendezvous("env://"))
        self.count, self.gpus = 0, []
        if device.startswith("cuda"):
            number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if device == "cuda" and number >= there:
                found = f"{os.environ['LOCAL_WORLD_SIZE']} processes and {there} GPU(s)"
                raise CTError(found, "a GPU for each process", f"use torchrun --nproc-per-node {there}")
            torch.cuda.set_device(number if device == "cuda" else device)
            self.gpus = [torch.cuda.current_device()]
        options = {"store": self.store, "rank": self.rank, "world_size": self.size, "timeout": timedelta(days=30)}
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **options)  # a GPU named by number: gloo

    def tell(self, saved: dict | None = None) -> dict:
        """Return what the first process says of checkpoint and resume; the others wait here until it is that far."""
        told = [saved]
        dist.broadcast_object_list(told)
        return told[0]

    def first_to_say(self) -> bool:
        """Tell whether this is the first process to end with a message: one is enough."""
        try:
            return self.store.add(f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
        except RuntimeError:  # torchrun is gone, too
            return self.rank == 0

    def __deepcopy__(self, memo) -> "Team":  # with a running average of the weights
        return self

    def join(self, learner: nn.Module, loaders: dict) -> tuple[nn.Module, dict]:
        """Return what learns and its loaders, of all processes together."""
        return Together(learner, self), self.loaders(loaders)

    def share(self, count: int, rank: int | None = None) -> slice:
        """Return which of `count` slices a process has: parts that differ by one slice at most."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    @contextlib.contextmanager
    def own_numbers(self) -> Iterator[None]:
        """Draw other random numbers in each process inside, and the same ones in all of them afterwards."""
        seed = int(torch.randint(2**40, ()))
        with torch.random.fork_rng(devices=self.gpus):
            torch.manual_seed(seed + self.rank)
            yield

    def loaders(self, loaders: dict) -> dict:
        """Return loaders whose batches hold this process's part of the pictures, and the labels of all."""
        if isinstance(loaders["train"], experiment.Growing):
            growing = loaders["train"]
            inside = self.loaders({**loaders, "train": growing.loader})
            return {**inside, "train": experiment.Growing(inside["train"], growing.size, growing.epochs)}
        return {
            split: DataLoader(_Parts(loader.dataset, self), sampler=loader.sampler, batch_size=None)
            for split, loader in loaders.items()
        }


class _Parts:
    """Of each batch this process's part of the inputs, and the labels of all."""

    def __init__(self, batches, team: Team):
        self.batches, self.team = batches, team

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, indices: list[int]):
        self.team.count = len(indices)
        mine = indices[self.team.share(len(indices))]
        with self.team.own_numbers():
            inputs, _ = self.batches[mine or indices[:1]]
        labels = self.batches.labels  # a last batch may be too small for all: then there are no inputs here
        return inputs[: len(mine)], labels[torch.as_tensor(indices).to(labels.device)]


class Together(nn.Module):
    """A network of which every process has a copy: a part of the batch in, the logits of the whole batch out.

    Its parts have the names that they have in the network alone, so that a checkpoint fits both.
    """

    def __init__(self, model: nn.Module, team: Team):
        super().__init__()
        if team.gpus:
            model = convert_sync_batchnorm(model)
        for part in model.modules():
            if isinstance(part, BatchNorm) and not team.gpus:
                part.forward = types.MethodType(_batchnorm, part)
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        with warnings.catch_warnings():  # torch renames the option, which older ones have not
            warnings.simplefilter("ignore", FutureWarning)
            ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)  # they are the same everywhere
        # Not registered as a part, which would change all names.
        self.__dict__.update(alone=model, ddp=ddp, team=team)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        team, learns = self.team, self.training and torch.is_grad_enabled()
        with team.own_numbers() if learns else contextlib.nullcontext():  # dropout
            logits = (self.ddp if learns else self.alone)(inputs)
        if learns:  # DDP takes the mean of the processes' gradients, and the loss is the mean over the whole batch
            logits.register_hook(lambda gradient: gradient * team.size)
        counts = [len(range(team.count)[team.share(team.count, rank)]) for rank in range(team.size)]
        sent = logits.new_zeros(max(counts), logits.shape[1])
        sent[: len(logits)] = logits.detach()
        parts = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(parts, sent)
        parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
        parts[team.rank] = logits  # of the others only the numbers: each process has its own gradient
        return torch.cat(parts)


def _batchnorm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Be the forward of a BatchNorm layer whose statistics are those of all processes' parts of the batch.

    `torch.nn.SyncBatchNorm` does the same, on GPUs only.
    """
    if not self.training:
        return type(self).forward(self, x)
    over = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    kind, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    total, count = _sum(torch.cat([x.sum(over), x.new_tensor([x[:, 0].numel()])])).split([x.shape[1], 1])
    mean = total / count
    centred = x - mean.view(shape)
    var = _sum(centred.square().sum(over)) / count
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)
    y = centred * (var + self.eps).rsqrt().view(shape)
    y = (y * self.weight.view(shape) + self.bias.view(shape)).to(kind)
    return self.act(self.drop(y)) if hasattr(self, "act") else y  # timm's has its activation inside


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over all processes; its gradient is summed, too."""
    return _Sum.apply(x)


# ---------------------------------------------------------------- the run


def run_together(
    plan: Plan, settings: Settings, out: Path, *, resume: bool = False, say: Callable = print, **options
) -> Run | None:
    """`run_plan` in each of the processes that torchrun has started; the first one writes checkpoint and record.

    The batch size is that of all processes together, so that the plan, and the record, are those of one process. The
    first process makes what is missing of store, features and statistics, and the others read it.

    Args:
        plan, settings, out, resume, say, options: as for `run_plan`; a restart by torchrun resumes.
    Returns:
        The record in the first process, None in the others.
    Raises:
        CTError: as `run_plan`; fewer GPUs than processes; a process that died.
        SystemExit: in the processes that have nothing to say; after Ctrl-C with code 130.
    """
    resume = resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    team = Team(settings.device)
    signal.signal(signal.SIGTERM, _lost)  # of torchrun, when a process died
    signal.signal(signal.SIGINT, signal.SIG_DFL if team.rank else _stop)  # the others have nothing to save
    try:
        if plan.resolved(settings).batch_size < team.size:
            found = f"batches of {plan.resolved(settings).batch_size} slices for {team.size} processes"
            raise CTError(found, "a slice for each at least", "choose a larger --batch-size, which is that of all")
        if team.rank == 0:
            note = {**options.pop("note", {}), "processes": team.size}
            return experiment.run_plan(plan, settings, out, resume=resume, say=say, note=note, team=team, **options)
        os.environ["CT_PROGRESS"] = "0"
        logging.getLogger("ctutils").setLevel(logging.ERROR)
        saved = team.tell()
        folder = experiment.load(plan, settings)
        network = experiment.build(plan, settings, folder)
        loaders = experiment.featurise(plan, settings, folder, network)
        experiment.fit(plan, settings, folder, network, loaders, **saved, team=team, say=lambda text: None)
        return None
    except _Stopped:
        print(f"Stopped, all {team.size} processes; {GOES_ON}.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not team.first_to_say():
            raise SystemExit(2) from None
        if is_out_of_memory(error):
            found = f"a full memory in process {team.rank} of {team.size}"
            raise CTError(found, "room for its part of a batch", "give --at-once, or more processes") from error
        if not isinstance(error, CTError) and any(sign in str(error).lower() for sign in LOST):
            _lost()
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.destroy_process_group()


def _lost(*_) -> None:
    raise CTError("a process of this training that died; the others end, too", "all of them alive", GOES_ON)


def _stop(*_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes on what the terminal has sent already
    raise _Stopped
