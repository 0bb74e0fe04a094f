"""One pass of a frozen backbone over the decoded slices, cached on disk: the fast way to train a head."""

import copy
import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ctutils.base import CTError, atomic_path, progress, reuse_large_blocks
from ctutils.data import normalise
from ctutils.models import BatchNorm, state_sha256

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_precision(precision: str, device: str) -> str:
    """Turn `auto` into `bfloat16` where the processor multiplies it natively, else `float32`.

    Raises:
        CTError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise CTError(f"precision '{precision}'", f"one of {', '.join(PRECISIONS)}", "choose one of these")
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device == "cpu" and has_bf16() else "float32"


def inference_copy(backbone: nn.Module, precision: str = "float32") -> nn.Module:
    """Return a copy of a frozen backbone that computes the same, faster.

    BatchNorm layers are folded into the convolutions before them, weights are laid out channels-last and
    turned into bfloat16 if asked for.

    Args:
        backbone: in eval mode; left as it is.
        precision: `float32` or `bfloat16`.
    Source: notebook 02, section 7.
    """
    fast = _fold_batchnorm(copy.deepcopy(backbone).eval().requires_grad_(False))
    if precision == "bfloat16":
        # What could not be folded (DenseNet normalises before it convolves) keeps exact statistics.
        norms = {name: copy.deepcopy(part) for name, part in fast.named_modules() if isinstance(part, BatchNorm)}
        fast.to(torch.bfloat16)
        for name, norm in norms.items():
            fast.set_submodule(name, norm)
    return fast.to(memory_format=torch.channels_last)


class _ConvTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, BatchNorm)) or super().is_leaf_module(module, name)


def _fold_batchnorm(network: nn.Module) -> nn.Module:
    """Fold, in place, each BatchNorm that alone follows a convolution into that convolution's weights.

    torch.fx's own `fuse` leaves timm's layers (subclasses of both) as they are.
    """
    try:
        graph = _ConvTracer().trace(network)
    except (fx.proxy.TraceError, TypeError, NotImplementedError):  # a network that cannot be traced stays whole
        return network
    modules = dict(network.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(modules[node.target]) for node in calls)  # a layer used twice has two inputs
    for node in calls:
        before, norm = node.all_input_nodes[0], modules[node.target]
        if not isinstance(norm, BatchNorm) or norm.running_mean is None or before.op != "call_module":
            continue
        conv = modules[before.target]
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1 and times[id(conv)] == times[id(norm)] == 1:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            conv.weight, conv.bias = weight, bias
            network.set_submodule(node.target, getattr(norm, "act", nn.Identity()))  # timm's has its ReLU inside
    return network


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    store: np.ndarray,
    *,
    mean: tuple,
    std: tuple,
    device: str = "cpu",
    precision: str = "auto",
    batch_size: int | None = None,
) -> torch.Tensor:
    """Run a frozen backbone once over every slice.

    Args:
        backbone: maps images (B, 3, S, S) to features (B, D).
        store: uint8 (N, S, S), see `build_store`.
        mean, std: the backbone's normalisation.
        precision: `float32`, `bfloat16` or `auto`.
        batch_size: slices at a time (default 16 on a CPU, 256 on a GPU).
    Returns:
        float32 (N, D) on the CPU.
    Source: notebook 02, section 6.
    """
    precision = choose_precision(precision, device)
    batch_size = batch_size or (256 if device.startswith("cuda") else 16)
    reuse_large_blocks()
    fast = inference_copy(backbone, precision).to(device)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    # Every grey value's normalised (R, G, B), looked up picture by picture: equal to the bit, and channels-last.
    greys = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1, 1, 1)
    table = normalise(greys, mean, std).view(256, 3).to(dtype)
    features = None
    for start in progress(range(0, len(store), batch_size), desc="One pass", unit="batch", leave=False):
        grey = torch.from_numpy(np.array(store[start : start + batch_size])).to(device, non_blocking=True)
        images = nn.functional.embedding(grey.int(), table).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
        batch = fast(images).float()
        if features is None:
            features = torch.empty(len(store), batch.shape[1], device=device)
        features[start : start + len(batch)] = batch
    if features is None:
        raise CTError("no slices", "one or more", "check the data set")
    if not torch.isfinite(features).all():
        raise CTError(f"features that are not finite ({precision})", "finite numbers", "use precision float32")
    return features.cpu()


def cached_features(
    backbone: nn.Module,
    store: np.ndarray,
    *,
    name: str,
    fingerprint: str,
    mean: tuple,
    std: tuple,
    cache: Path,
    device: str = "cpu",
    precision: str = "auto",
) -> tuple[torch.Tensor, float]:
    """Return `extract_features`, from `data/cache/features` if the very same pass was made before.

    The key holds all that the result depends on: the slices' fingerprint, their size, the backbone with the
    hash of its weights and BatchNorm statistics as they stand, the normalisation and the precision.

    Args:
        name: the backbone's name, for the file name.
        fingerprint: of the slices, `SliceFolder.fingerprint`.
        cache: the cache folder, `settings.cache_dir`.
    Returns:
        features float32 (N, D), and the seconds the pass took (when it was made).
    Source: notebook 02, section 6.
    """
    precision = choose_precision(precision, device)
    key = {
        "fingerprint": fingerprint,
        "shape": list(store.shape),
        "backbone": name,
        "weights": state_sha256(backbone),
        "mean": list(mean),
        "std": list(std),
        "precision": precision,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = Path(cache) / "features" / f"{name}-{digest[:20]}.safetensors"
    try:
        saved = load_file(path)
        if len(saved["features"]) == len(store):
            return saved["features"], float(saved["seconds"])
    except (OSError, SafetensorError, KeyError):
        pass  # absent or damaged: made again
    start = time.perf_counter()
    features = extract_features(backbone, store, mean=mean, std=std, device=device, precision=precision)
    seconds = time.perf_counter() - start
    content = {"features": features, "seconds": torch.tensor(seconds)}
    with atomic_path(path) as temporary:  # safetensors' own writer does not tell a full disk from other errors
        temporary.write_bytes(save(content, {"key": json.dumps(key)}))
    return features, seconds
