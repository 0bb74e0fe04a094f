"""The backbones: what they are, freezing, cutting, saving and restoring."""

import dataclasses
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ctutils.base import CTError, reuse_large_blocks
from ctutils.registry import BACKBONES as BACKBONES  # to be found here, too
from ctutils.registry import BackboneSpec, get_spec
from ctutils.weights import NoWeights, checked_sha256, file_in_folder, imagenet_file, read_tensors, say_once

BatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of BatchNorm1d, 2d, 3d and timm's


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """Where a network's weights came from; goes into the run record as it is (`dataclasses.asdict`)."""

    kind: str  # imagenet | random | folder
    source: str  # in words, without a path of this machine
    sha256: str  # of the weights file; of the network's tensors when random
    note: str = ""  # one sentence for a banner; empty when the weights are real
    seed: int | None = None  # of random weights


# --- Building a network and finding its weights ---


def build_model(name: str, weights: str | Path = "auto", *, seed: int = 0) -> tuple[nn.Module, WeightsInfo]:
    """Build a network with its original 1000-class head, in eval mode.

    Args:
        name: a key of `BACKBONES`.
        weights: `auto` (ImageNet weights from the cache or the network, else random ones within seconds),
            `imagenet` (an error instead of random ones), `random`, or a folder that holds a weights file
            named as torchvision names it, or `<name>.pth`, `.pt`, `.safetensors` or `<name>-*.pth`.
        seed: of random weights; the caller's random state is left alone.
    Returns:
        the model: images float32 (B, 3, H, W), normalised with the spec's mean and std, -> logits (B, 1000),
        and where its weights came from.
    Raises:
        CTError: unknown name; no weights under `imagenet`; no folder or no such file in it; a weights file
            that is damaged or belongs to another network.
    """
    spec = get_spec(name)
    if weights == "random":
        return _build_random(spec, seed, f"{spec.title} has random weights, as asked for (CT_WEIGHTS=random).")
    if weights not in ("auto", "imagenet"):
        path = file_in_folder(spec, Path(weights))
        info = WeightsInfo(
            "folder",
            f"folder '{path.parent.resolve().name}', file '{path.name}'",
            checked_sha256(spec, path),
        )
        return _build_from_file(spec, path), info
    try:
        path, source = imagenet_file(spec, patient=weights == "imagenet")
    except NoWeights as error:
        if weights == "imagenet":
            raise CTError(
                f"no real weights for {spec.title} ({error})",
                f"the file '{spec.weights_file}' in torch's cache, or within reach",
                f"{error.mend}, or let CT_WEIGHTS=auto fall back to random weights",
            ) from error
        note = f"{spec.title} has random weights, because {error}; for real ones {error.mend}."
        say_once(note)
        return _build_random(spec, seed, note)
    info = WeightsInfo("imagenet", source, checked_sha256(spec, path))  # before reading: it may be cut short
    return _build_from_file(spec, path), info


def _make(spec: BackboneSpec) -> nn.Module:
    if spec.name == "efficientnet_lite0":
        import timm  # torchvision has no Lite networks

        return timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    import torchvision.models

    return torchvision.models.get_model(spec.name, weights=None).eval()


def _build_random(spec: BackboneSpec, seed: int, note: str) -> tuple[nn.Module, WeightsInfo]:
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        torch.default_generator.manual_seed(seed)
        model = _make(spec)
    return model, WeightsInfo("random", f"random, seed {seed}", state_sha256(model), note, seed)


def _rename(spec: BackboneSpec, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give old names their present form."""
    if spec.name == "densenet161":  # torchvision's file says norm.1 where the network says norm1
        return {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): value for key, value in tensors.items()}
    if spec.name == "efficientnet_lite0" and set(tensors) != set(expected) and len(tensors) == len(expected):
        # The package's file names its layers otherwise, but in the same order: pair them by place, and only
        # if every pair agrees in its last word (weight, bias, running_mean, ...) and shape.
        pairs = list(zip(expected.items(), tensors.items(), strict=True))
        if all(a.split(".")[-1] == b.split(".")[-1] and x.shape == y.shape for (a, x), (b, y) in pairs):
            return {a: value for (a, _), (_, value) in pairs}
    return tensors


def _build_from_file(spec: BackboneSpec, path: Path) -> nn.Module:
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = _make(spec)
    expected = model.state_dict()
    tensors = _rename(spec, read_tensors(path), expected)
    for key in expected.keys() - tensors.keys():
        if key.endswith("num_batches_tracked"):  # absent from older files, and only counts
            tensors[key] = torch.zeros((), dtype=torch.int64)
    _check_same_tensors(expected, tensors, f"'{path.name}'", spec.title, "find the weights file of this network")
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def _check_same_tensors(
    expected: dict[str, Tensor], tensors: dict[str, Tensor], what: str, title: str, mend: str
) -> None:
    """Compare names and shapes.

    Raises:
        CTError: they differ; names up to three of the differences of each kind.
    """
    faults = []
    for word, keys in (
        ("without", expected.keys() - tensors.keys()),
        ("with", tensors.keys() - expected.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            faults.append(f"{word} {', '.join(sorted(keys)[:3])}{more}")
    shapes = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in tensors and tensors[key].shape != expected[key].shape
    ]
    faults += shapes[:3]
    if faults:
        raise CTError(f"{what} {'; '.join(faults)}", f"the {len(expected)} tensors of {title}", mend)


# --- Layers, freezing, counting ---


def get_module(model: nn.Module, dotted: str) -> nn.Module:
    """Return the layer at a dotted path, e.g. `classifier.6`.

    Raises:
        CTError: there is no such layer.
    """
    try:
        return model.get_submodule(dotted)
    except AttributeError as error:
        children = ", ".join(name for name, _ in model.named_children())
        raise CTError(
            f"no layer '{dotted}' in {type(model).__name__}",
            f"a path that begins with one of: {children}",
            "see print(model)",
        ) from error


def set_module(model: nn.Module, dotted: str, new: nn.Module) -> None:
    """Put `new` at a dotted path; `set_module(model, "classifier.6", x)` is `model.classifier[6] = x`.

    Raises:
        CTError: there is no such layer to replace.
    """
    get_module(model, dotted)
    parent, _, child = dotted.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def replace_head(model: nn.Module, name: str, num_classes: int) -> nn.Linear:
    """Replace the last layer by a new one, as the notebooks' visible line does, and return it.

    Args:
        model: a network of `build_model(name)`; changed in place.
        num_classes: C of the new logits (B, C).
    """
    spec = get_spec(name)
    new = nn.Linear(spec.in_features, num_classes)
    set_module(model, spec.head, new)
    return new


def freeze(model: nn.Module, *, train: nn.Module | Iterable[nn.Module]) -> None:
    """Let only the parameters of `train` learn.

    Args:
        model: changed in place: `requires_grad` is True in `train` and False everywhere else.
        train: one or several parts of `model`, usually the new head.
    Raises:
        CTError: a part of `train` is not in `model`, so training would change nothing.
    """
    parts = [train] if isinstance(train, nn.Module) else list(train)
    inside = {id(module) for module in model.modules()}
    for part in parts:
        if id(part) not in inside:
            raise CTError(
                f"a {type(part).__name__} to train that is not in the model",
                "a part of this very model",
                "take it from the model after the head was replaced, e.g. train=model.fc",
            )
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Let every parameter learn."""
    model.requires_grad_(True)


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


# --- Backbone and head ---


def split_model(model: nn.Module, name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a network into a frozen part, whose output can be cached, and the rest.

    The cut stands before the first dropout, since what comes after it differs at every pass:

        vgg16               after classifier[1]     (B, 4096)
        alexnet             before classifier[0]    (B, 9216)
        mobilenet_v3_large  before classifier[2]    (B, 1280)
        the others          at the pooled features  (B, 2048), (B, 2208) or (B, 1280)

    Layers are shared with `model`, not copied, and keep their names. Replace the head before the cut.

    Returns:
        backbone: images (B, 3, H, W) -> features (B, D), and head: features (B, D) -> logits (B, C).
    Raises:
        CTError: `model` is not a network of this name.
    """
    spec = get_spec(name)
    words = {"relu": nn.ReLU(inplace=True), "flatten": nn.Flatten(1), "avgpool": nn.AdaptiveAvgPool2d(1)}
    body = OrderedDict()
    for child in spec.body:  # the model's own layer where it has one
        body[child] = words[child] if child in words and not hasattr(model, child) else get_module(model, child)
    if spec.classifier_cut is None:
        head = nn.Sequential(OrderedDict([(spec.head, get_module(model, spec.head))]))
    else:
        classifier = get_module(model, "classifier")
        head = classifier[spec.classifier_cut :]  # a slice keeps the names: the last layer stays "6" or "3"
        if spec.classifier_cut:
            body["classifier"] = classifier[: spec.classifier_cut]
        if isinstance(head[0], nn.Dropout):
            head[0].inplace = False  # it would overwrite the cached features it is given
    return nn.Sequential(body), head


def join(backbone: nn.Module, head: nn.Module) -> nn.Sequential:
    """Put backbone and head together again: images (B, 3, H, W) -> logits (B, C). Shares the layers."""
    return nn.Sequential(OrderedDict(backbone=backbone, head=head))


def _batchnorms(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, BatchNorm) and part.running_mean is not None
    }


@torch.no_grad()
def adapt_batchnorm(module: nn.Module, loader: Iterable, device: str | torch.device = "cpu") -> int:
    """Estimate the running statistics of BatchNorm anew, in one pass over images; `bn="adapt"`.

    Only the BatchNorm layers are in train mode (no dropout), and no weight changes. The result is the mean
    over all images of the batches' means and variances, so it hardly depends on the batch size or the order.

    Args:
        module: changed in place; afterwards on `device` and in eval mode.
        loader: yields images (B, 3, H, W) or tuples that begin with them.
    Returns:
        the number of images seen; 0, without reading the loader, when there is no BatchNorm.
    Raises:
        CTError: the loader is empty.
    Source: "cumulative moving average", https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    layers = list(_batchnorms(module).values())
    module.to(device).eval()
    reuse_large_blocks()
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    seen = 0
    try:
        for layer in layers:
            layer.train()
        for batch in loader:
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


def standardise_head(head: nn.Module, features: Tensor) -> nn.Sequential:
    """Put a `Standardise` before a head, so that random features of any size can be learned from.

    Args:
        head: maps features (N, D) to logits; its layers are shared.
        features: (N, D) of the train split only, N >= 2.
    Returns:
        a head that takes the features as they are. A column that hardly varies is divided by a hundredth of
        the mean standard deviation, not by (nearly) nothing.
    """
    std, mean = torch.std_mean(features.float(), dim=0)
    floor = 0.01 * std.mean()
    std = std.clamp(min=floor if floor > 0 else 1.0)
    return _with_standardise(head, Standardise(mean, std))


def _with_standardise(head: nn.Module, standardise: Standardise) -> nn.Sequential:
    layers = head.named_children() if isinstance(head, nn.Sequential) else [("head", head)]
    return nn.Sequential(OrderedDict([("standardise", standardise), *layers]))


# --- Saving what was learned, and putting it back ---


def _learned(backbone: nn.Module, head: nn.Module, name: str, bn: str, trained: str) -> dict[str, Tensor]:
    """Return the model's own tensors (not copies) that a run record must hold."""
    if trained != "head":
        return dict(join(backbone, head).state_dict())
    last = get_spec(name).head.rpartition(".")[2]
    kept = tuple(f"{part}." for part in (last, "standardise"))
    tensors = {f"head.{key}": value for key, value in head.state_dict().items() if key.startswith(kept)}
    if bn != "frozen":
        for key, layer in _batchnorms(backbone).items():
            tensors[f"bn.{key}.running_mean"] = layer.running_mean
            tensors[f"bn.{key}.running_var"] = layer.running_var
    return tensors


def run_tensors(
    backbone: nn.Module, head: nn.Module, name: str, *, bn: str = "frozen", trained: str = "head"
) -> dict[str, Tensor]:
    """Return what a run has changed, ready for safetensors; `restore_model` is the way back.

    Args:
        backbone, head: as cut by `split_model`, the head perhaps with `standardise_head`.
        name: a key of `BACKBONES`.
        bn: when not `frozen`, BatchNorm's statistics come along: `bn.<layer>.running_mean` and `running_var`.
        trained: `head` keeps the last layer and the `Standardise` as `head.<...>`; anything else keeps every
            tensor as `backbone.<...>` and `head.<...>`.
    Returns:
        contiguous copies on the CPU.
    """
    tensors = _learned(backbone, head, name, bn, trained)
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def restore_model(record: dict, tensors: dict[str, Tensor], weights: str | Path = "auto") -> nn.Sequential:
    """Rebuild the model of a run: images (B, 3, H, W) -> logits (B, C), in eval mode.

    Args:
        record: the run record: `backbone`, `classes`, `weights`, `bn`, `standardised`, `trained`.
        tensors: what `run_tensors` gave.
        weights: `auto` finds the weights that the record names, by network or by seed; a folder is needed for
            a run whose weights came from a folder. Not used when the record holds every tensor.
    Raises:
        CTError: the weights at hand are not those of the run; tensors are missing or have other shapes.
    """
    name, bn, trained = record["backbone"], record.get("bn", "frozen"), record.get("trained", "head")
    spec = get_spec(name)
    if trained == "head":
        model = _weights_of_run(record, weights)
    else:
        with torch.device("meta"):
            model = _make(spec)
        model.to_empty(device="cpu")  # every tensor is filled below
    with torch.random.fork_rng(devices=[]):
        replace_head(model, name, len(record["classes"]))
    backbone, head = split_model(model, name)
    if record.get("standardised"):
        head = _with_standardise(head, Standardise(torch.zeros(spec.features), torch.ones(spec.features)))
    places = _learned(backbone, head, name, bn, trained)
    _check_same_tensors(places, tensors, "saved tensors", f"a {spec.title} run", "train this run again")
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])
    return join(backbone, head).eval()


def _weights_of_run(record: dict, weights: str | Path) -> nn.Module:
    """Build the network that the run began with, and make sure that it is the same one."""
    wanted = record["weights"]
    needed = f"the run's weights ({wanted['source']}, SHA-256 {wanted['sha256'][:8]}...)"
    choice = weights
    if weights == "auto":
        choice = "random" if wanted["kind"] == "random" else "imagenet"
    seed = wanted.get("seed")
    try:
        model, info = build_model(record["backbone"], choice, seed=record.get("seed", 0) if seed is None else seed)
    except CTError as error:
        raise CTError(
            error.found, needed, f"give the folder that holds this file as weights (or {error.mend})"
        ) from error
    if info.sha256 != wanted["sha256"]:
        raise CTError(
            f"{info.kind} weights with SHA-256 {info.sha256[:8]}...",
            needed,
            "train this run again, since this machine draws other random numbers"
            if wanted["kind"] == "random" and choice == "random"
            else "give the folder that holds this file as weights, or train this run again",
        )
    return model
