"""The networks: building them, freezing, cutting in two, saving and restoring."""

import dataclasses
import functools
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctutils.base import CTError
from ctutils.registry import BackboneSpec, get_spec
from ctutils.weights import WeightsInfo, find_weights

AT_ONCE = 10_000  # rows of features in memory
BatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of BatchNorm1d, 2d, 3d and timm's


def build_model(name: str, weights: str | Path = "auto", *, seed: int = 0) -> tuple[nn.Module, WeightsInfo]:
    """Build a network with its original 1000-class head, in eval mode.

    Args: as `find_weights`; the caller's random state is left alone.
    Returns:
        the model: images float32 (B, 3, H, W), normalised with the spec's mean and std, -> logits (B, 1000),
        and where its weights came from.
    Raises:
        CTError: as `find_weights`; a file that belongs to another network or holds NaN.
    """
    spec = get_spec(name)
    path, info = find_weights(name, weights, seed=seed)
    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = _make(spec)
        return model, dataclasses.replace(info, sha256=state_sha256(model))
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = _make(spec)
    tensors = _rename(spec, _read_tensors(path), model.state_dict())
    _load(model, tensors, f"'{path.name}'", spec.title, "find the weights file of this network")
    return model, info


def _make(spec: BackboneSpec) -> nn.Module:
    if spec.timm:
        import timm  # torchvision has no Lite networks

        return timm.create_model(spec.timm, pretrained=False).eval()
    import torchvision.models

    return torchvision.models.get_model(spec.name, weights=None).eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors; never runs code from the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise almost anything, and torch advises to run its code
        found = (
            f"'{path.name}', which is damaged or holds more than tensors ({type(error).__name__}; it may carry code)"
        )
        mend = "delete this file and fetch it again from a source that you trust"
        raise CTError(found, "a file of tensors (.pth, .pt or .safetensors)", mend) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        found = f"'{path.name}', which holds something else than named tensors"
        raise CTError(found, "a state dict", "save it with torch.save(model.state_dict(), path)")
    return tensors


def _rename(spec: BackboneSpec, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give old names their present form, and fill in what older files lack."""
    if spec.name == "densenet161":  # torchvision's file says norm.1 where the network says norm1
        tensors = {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): value for key, value in tensors.items()}
    elif spec.timm and set(tensors) != set(expected) and len(tensors) == len(expected):
        # The package's file names its layers otherwise, but in the same order: pair them by place, and only
        # if every pair agrees in its last word (weight, bias, running_mean, ...) and shape.
        pairs = list(zip(expected.items(), tensors.items(), strict=True))
        if all(a.split(".")[-1] == b.split(".")[-1] and x.shape == y.shape for (a, x), (b, y) in pairs):
            tensors = {a: value for (a, _), (_, value) in pairs}
    counts = [key for key in expected if key.endswith("num_batches_tracked") and key not in tensors]
    tensors = tensors | {key: torch.zeros((), dtype=torch.int64) for key in counts}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _load(model: nn.Module, tensors: dict[str, Tensor], what: str, title: str, mend: str) -> None:
    """Put tensors into a model, all of them; the model may stand on the meta device."""
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        faults = "; ".join(line if len(line) < 200 else f"{line[:200]}..." for line in lines)
        raise CTError(f"{what} that does not fit {title} ({faults})", f"the tensors of {title}", mend) from error
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise CTError(f"{what} with NaN or infinity in its tensors", "finite weights", "fetch the file again")


def replace_head(model: nn.Module, name: str, num_classes: int) -> nn.Linear:
    """Replace the last layer by a new one for logits (B, num_classes), in place, and return it."""
    new = nn.Linear(get_spec(name).in_features, num_classes)
    model.set_submodule(get_spec(name).head, new)
    return new


def freeze(model: nn.Module, *, train: nn.Module) -> None:
    """Let only `train`, a part of `model`, learn: `requires_grad` is True in it and False everywhere else."""
    model.requires_grad_(False)
    train.requires_grad_(True)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return `{"trained": ..., "frozen": ...}`, numbers of single weights."""
    counts = {"trained": 0, "frozen": 0}
    for parameter in model.parameters():
        counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def state_sha256(module: nn.Module) -> str:
    """Return a SHA-256 of all parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def split_model(model: nn.Module, name: str, at: str | None = None) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a network into a part that stays frozen, whose output can be cached, and the rest.

    Args:
        model: a network of `build_model(name)`, its head replaced before, or a backbone cut from one. Layers are
            shared with it, not copied, and keep their names.
        name: a key of `BACKBONES`.
        at: first layer of the rest. By default the spec's `cut`, which stands before the first dropout, since what
            comes after it differs at every pass: features (B, D), D being 4096 for vgg16, 9216 for alexnet, and
            the pooled 2048, 2208 or 1280 for the others. The spec's `last_block` gives activations (B, K, h, w).
    Returns:
        backbone: images (B, 3, H, W) -> features, and head: features -> logits (B, C).
    """
    spec = get_spec(name)
    stage, _, child = (at or spec.cut).partition(".")
    calls = {"relu": nn.ReLU(inplace=True), "flatten": nn.Flatten(1), "avgpool": nn.AdaptiveAvgPool2d(1)}
    backbone, head = OrderedDict(), OrderedDict()
    for part in spec.body:
        layer = getattr(model, part, None) or calls.get(part)
        if layer is None:  # the model is itself a backbone, which ends before this part
            break
        if part == stage and child:  # inside: a slice of a Sequential keeps the names
            place = [key for key, _ in layer.named_children()].index(child)
            if place:
                backbone[part] = layer[:place]
            head[part] = layer[place:]
        elif head or part == stage:
            head[part] = layer
        else:
            backbone[part] = layer
    return nn.Sequential(backbone), nn.Sequential(head)


class Joined(nn.Sequential):
    """Backbone and head together again: images (B, 3, H, W) -> logits float32 (B, C).

    Attributes:
        bfloat16: multiply in bfloat16 (autocast). It has float32's range, so that no gradient scaler is needed.
        at_once: while learning, so many images go through at a time; their activations are computed again for the
            backward pass, so that memory holds one part only and the gradient is that of the whole batch.
            BatchNorm that learns sees the parts, each twice.
    """

    bfloat16 = False
    at_once: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            if self.at_once and len(images) > self.at_once:
                run = super().forward
                if torch.is_grad_enabled():
                    run = functools.partial(checkpoint, run, use_reentrant=False)
                return torch.cat([run(part) for part in images.split(self.at_once)]).float()
            return super().forward(images).float()


def join(backbone: nn.Module, head: nn.Module) -> Joined:
    """Put backbone and head together again; shares the layers."""
    return Joined(OrderedDict(backbone=backbone, head=head))


@torch.no_grad()
def adapt_batchnorm(module: nn.Module, batches: Iterable, device: str | torch.device = "cpu") -> int:
    """Estimate the running statistics of BatchNorm anew, in one pass over images; `bn="adapt"`.

    Only the BatchNorm layers are in train mode (no dropout), and no weight changes. The result is the mean
    over all images of the batches' means and variances, so it hardly depends on the batch size or the order.

    Args:
        module: changed in place; afterwards on `device` and in eval mode.
        batches: yields images (B, 3, H, W) or tuples that begin with them.
    Returns:
        the number of images seen; 0, without reading the batches, when there is no BatchNorm.
    Raises:
        CTError: no batches.
    Source: "cumulative moving average", https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    layers = [part for part in module.modules() if isinstance(part, BatchNorm) and part.running_mean is not None]
    module.to(device).eval()
    if not layers:
        return 0
    momenta, seen = [layer.momentum for layer in layers], 0
    for layer in layers:
        layer.train()
    try:
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            seen += len(images)
            for layer in layers:
                layer.momentum = len(images) / seen  # 1 at first, so what was there before is forgotten
            module(images.to(device))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        module.eval()
    if not seen:
        raise CTError("an empty loader", "at least one batch of images", "check the data set's train split")
    return seen


class Standardise(nn.Module):
    """Subtract a mean and divide by a standard deviation, column by column: features (N, D) -> (N, D)."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def standardise_head(head: nn.Sequential, features: Tensor, rows: np.ndarray | None = None) -> nn.Sequential:
    """Put a `Standardise` before a head, so that random features of any size can be learned from.

    Args:
        head: maps features (N, D) to logits; its layers are shared.
        features: (N, D), perhaps a mapped file, which is not loaded.
        rows: of the train split only, 2 or more (default: all).
    Returns:
        a head that takes the features as they are. A column that hardly varies is divided by a hundredth of
        the mean standard deviation, not by (nearly) nothing.
    """
    rows = torch.arange(len(features)) if rows is None else torch.from_numpy(rows)
    std, mean = torch.std_mean(features[rows[:AT_ONCE]].float(), dim=0)
    if len(rows) > AT_ONCE:
        some = [torch.var_mean(features[part].double(), 0, correction=0) for part in rows.split(AT_ONCE)]
        shares = [len(part) / len(rows) for part in rows.split(AT_ONCE)]
        mean = sum(share * m for share, (_, m) in zip(shares, some, strict=True))
        variance = sum(share * (v + (m - mean) ** 2) for share, (v, m) in zip(shares, some, strict=True))
        std, mean = (variance * len(rows) / (len(rows) - 1)).sqrt().float(), mean.float()
    floor = 0.01 * std.mean()
    std = std.clamp(min=floor if floor > 0 else 1.0)
    return nn.Sequential(OrderedDict(standardise=Standardise(mean, std), **dict(head.named_children())))


def run_tensors(network: Joined, name: str, *, bn: str = "frozen", trained: str = "head") -> dict[str, Tensor]:
    """Return what a run has changed, ready for safetensors; `restore_model` is the way back.

    Args:
        network: backbone and head, the head perhaps with `standardise_head`.
        name: a key of `BACKBONES`.
        bn: when not `frozen`, BatchNorm's running statistics come along.
        trained: `head` keeps the last layer and the `Standardise`; anything else keeps every tensor.
    Returns:
        contiguous copies on the CPU, under the names that they have in the original network.
    """
    state = {key.partition(".")[2]: value for key, value in network.state_dict().items()}
    if trained == "head":
        state = {key: value for key, value in state.items() if _changed(key, get_spec(name), bn)}
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def _changed(key: str, spec: BackboneSpec, bn: str) -> bool:
    """Say whether a tensor changes when only the head learns."""
    moved = bn != "frozen" and key.endswith((".running_mean", ".running_var"))
    return moved or key.startswith((f"{spec.head}.", "standardise."))


def restore_model(run, weights: str | Path = "auto") -> Joined:
    """Rebuild the network of a run: images (B, 3, H, W) -> logits (B, C), in eval mode.

    Args:
        run: a `Run` with its tensors.
        weights: `auto` finds the weights that the record names, by network or by seed; a folder is needed for
            a run whose weights came from a folder. Not used when the record holds every tensor.
    Raises:
        CTError: the weights at hand are not those of the run; tensors are missing or have other shapes.
    """
    spec = get_spec(run.plan.backbone)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in run.load_tensors().items()}
    scale = [tensors.pop(f"standardise.{key}", None) for key in ("mean", "std")]
    if run.record["trained"] == "head":
        model = _weights_of_run(run, weights)
        before = model.state_dict().items()
        tensors |= {key: value for key, value in before if not _changed(key, spec, run.record["bn"])}
    else:
        with torch.device("meta"):
            model = _make(spec)
    with torch.device("meta"):  # its numbers come from the record
        replace_head(model, spec.name, len(run.classes))
    _load(model, tensors, f"the tensors of '{run.name}'", f"a {spec.title} run", "train this run again")
    backbone, head = split_model(model, spec.name)
    if run.record["standardised"]:
        if None in scale:
            raise CTError(f"no standardise tensors in '{run.name}'", "mean and std", "train this run again")
        head = nn.Sequential(OrderedDict(standardise=Standardise(*scale), **dict(head.named_children())))
    return join(backbone, head).eval()


def _weights_of_run(run, weights: str | Path) -> nn.Module:
    """Build the network that the run began with, and make sure that it is the same one."""
    wanted = run.record["weights"]
    needed = f"the run's weights ({wanted['source']}, SHA-256 {wanted['sha256'][:8]}...)"
    usual = "random" if wanted["kind"] == "random" else "imagenet"
    seed = run.plan.seed if wanted.get("seed") is None else wanted["seed"]
    mend = "give the folder that holds this file as weights, or train this run again"
    try:
        model, info = build_model(run.plan.backbone, usual if weights == "auto" else weights, seed=seed)
    except CTError as error:
        raise CTError(error.found, needed, f"{mend} (or {error.mend})") from error
    if info.sha256 != wanted["sha256"]:
        if info.kind == "random":
            mend = "train this run again, since this machine draws other random numbers"
        raise CTError(f"{info.kind} weights with SHA-256 {info.sha256[:8]}...", needed, mend)
    return model
