"""One pass of a frozen network over the decoded slices, cached on disk: the fast way to train what follows it."""

import contextlib
import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ctutils.augment import build_augment
from ctutils.backbones import BatchNorm, Joined, adapt_batchnorm, split_model, state_sha256
from ctutils.base import CTError, atomic_path, progress, write_json
from ctutils.config import Settings
from ctutils.data import PART, normalise
from ctutils.registry import BackboneSpec
from ctutils.training import is_out_of_memory

PASS_VERSION = 4  # part of the cache's key: raise it when the pass itself computes something else


def choose_precision(precision: str, device: str) -> str:
    """Turn `auto` into `bfloat16` where the processor multiplies it natively, else `float32`."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device == "cpu" and has_bf16() else "float32"


def reuse_large_blocks(keep: bool = True) -> None:
    """Ask for `fast.reuse_large_blocks`, where that optional room is there."""
    with contextlib.suppress(ImportError):
        from ctutils import fast

        fast.reuse_large_blocks(keep)


def _inference_copy(backbone: nn.Module, precision: str, device: str, fold: bool) -> nn.Module:
    """Return the fused copy of the optional room `fast`, or a plain one where that room is missing."""
    try:
        from ctutils import fast
    except ImportError:
        plain = copy.deepcopy(backbone).to(device).eval()
        return plain.to(torch.bfloat16) if precision == "bfloat16" else plain
    return fast.inference_copy(backbone, precision, fold=fold, device=device)


@torch.no_grad()
def forward_pass(
    backbone: nn.Module,
    store: np.ndarray,
    spec: BackboneSpec,
    *,
    rows: np.ndarray | None = None,
    device: str = "cpu",
    precision: str = "auto",
    batch_size: int | None = None,
    fold: bool = True,
    augment: Callable | None = None,
) -> Iterator[torch.Tensor]:
    """Run a frozen network once over every slice, and yield what it gives batch by batch.

    Args:
        backbone: maps images (B, 3, S, S) to features (B, D) or activations (B, K, h, w).
        store: uint8 (N, S, S), see `build_store`, or activations (N, K, h, w) of a pass that stopped earlier; rows:
            which M slices of it (default: all N).
        spec: says how the network's input is normalised.
        precision: `float32`, `bfloat16` or `auto`.
        batch_size: slices at a time (default 16 on a CPU, 256 on a GPU); a batch that the memory does not hold goes
            through in halves.
        fold: False runs the layers one by one as they stand, for comparison.
        augment: a random change of a batch, see `build_augment`.
    Yields:
        (B, ...) on the CPU, of the precision's type.
    Raises:
        CTError: features that are not finite.
    Source: notebook 02, section 7.
    """
    rows = np.arange(len(store)) if rows is None else np.asarray(rows)
    precision, on_gpu = choose_precision(precision, device), device.startswith("cuda")
    at_once = batch_size = batch_size or (256 if on_gpu else 16)
    fast = _inference_copy(backbone, precision, device, fold)
    # Every grey value's normalised (R, G, B), looked up picture by picture: equal to the bit, and channels-last.
    greys = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1, 1, 1)
    table = normalise(greys, spec.mean, spec.std).view(256, 3)
    table = table.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    exact = contextlib.nullcontext()
    if on_gpu and precision == "float32":  # a GPU's convolutions would round to TF32
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, progress(total=len(rows), desc="One pass", unit="slice", leave=False) as bar:
        for start in range(0, len(rows), batch_size):
            images = torch.as_tensor(store[rows[start : start + batch_size]])
            images = (images.pin_memory() if on_gpu else images).to(device, non_blocking=True)
            if images.ndim == 3:
                images = images if augment is None else augment(images[:, None])[:, 0]
                images = nn.functional.embedding(images.int(), table).permute(0, 3, 1, 2)  # (B, H, W, 3): channels-last
                images = images if fold else images.contiguous()
            batch = None
            while batch is None:
                try:
                    batch = torch.cat([fast(part) for part in images.split(at_once)])
                except (RuntimeError, MemoryError) as error:
                    if at_once == 1 or not is_out_of_memory(error):
                        raise
                    at_once = (min(at_once, len(images)) + 1) // 2
            if not torch.isfinite(batch).all():
                raise CTError(f"features that are not finite ({precision})", "finite numbers", "use precision float32")
            bar.update(len(batch))
            yield batch.cpu()
    fast.to("meta")  # a traced network is full of circles: its weights would stay until Python looks for those
    reuse_large_blocks(keep=False)


def extract_features(backbone: nn.Module, store: np.ndarray, spec: BackboneSpec, **options) -> torch.Tensor:
    """Return what `forward_pass` yields as one tensor float32 (M, ...), options as there."""
    return torch.cat([batch.float() for batch in forward_pass(backbone, store, spec, **options)])


def cached_features(
    backbone,
    store,
    spec,
    folder,
    settings,
    *,
    rows=None,
    precision="auto",
    augmentations=(),
    views=1,
    seed=0,
    make=True,
) -> tuple[torch.Tensor, float] | None:
    """Return what `forward_pass` gives, from `data/cache/features` if the very same pass was made before.

    The key holds all that the result depends on: the slices' fingerprint, their size, the backbone with the
    hash of its weights and BatchNorm statistics as they stand, the normalisation, the precision and the kind of
    device (the random views are drawn in its batches). Where a pass that stopped before the last block was made
    before, this one goes on from there. A long one is made in parts, each whole or not at all, which are then joined.

    Args:
        backbone, store, spec, rows, precision: as for `forward_pass`.
        folder: the `SliceFolder` of the store; settings: device and cache folder.
        augmentations: names for `build_augment`: each slice is then passed as `views` random views.
        seed: of the random views.
        make: False returns None where the file is not there.
    Returns:
        features (views, M, ...) of the precision's type, in a file that is mapped and not read; and the seconds that
        the pass took when it was made.
    Raises:
        CTError: the disk has no room for the file; nothing is written then.
    Source: notebook 02, section 7; the views: notebook 10.
    """
    precision, kind = choose_precision(precision, settings.device), torch.device(settings.device).type
    rows = np.arange(len(store)) if rows is None else np.asarray(rows, np.int64)
    drawn = [augmentations, views, seed] if augmentations else []

    def place(network: nn.Module, rows: np.ndarray = rows) -> tuple[Path, list]:
        about = [PASS_VERSION, folder.fingerprint, store.shape, hashlib.sha256(rows.tobytes()).hexdigest()]
        key = [*about, state_sha256(network), spec.mean, spec.std, precision, kind, *drawn]
        return _place(settings, "features", spec, key).with_suffix(".npy"), key

    path, key = place(backbone)
    if (found := _open(path, precision)) is not None or not make:
        return found
    before, count = 0.0, len(rows)
    if not augmentations and any(name == spec.last_block for name, _ in backbone.named_modules()):
        trunk, block = split_model(backbone, spec.name, spec.last_block)
        if (begun := _open(place(trunk)[0], precision)) is not None:
            backbone, store, rows, before = block, begun[0][0], None, begun[1]
    parts = [rows[k : k + PART] for k in range(0, count, PART)] if count > PART and not drawn and not before else []
    given = (backbone, store, spec, folder, settings)
    made = [cached_features(*given, rows=part, precision=precision) for part in parts]
    before += sum(seconds for _, seconds in made)
    options = {"rows": rows, "device": settings.device, "precision": precision}
    options["augment"], views = build_augment(augmentations), views if augmentations else 1
    start, out, devices = time.perf_counter(), None, [torch.device(settings.device)] if kind == "cuda" else []
    with atomic_path(path) as temporary, torch.random.fork_rng(devices=devices):  # the caller's numbers stay
        for view in range(views):
            torch.manual_seed(seed * 100_003 + view)
            done = 0
            for batch in (part for (part,), _ in made) if made else forward_pass(backbone, store, spec, **options):
                # numpy has no bfloat16: its bits are kept as whole numbers.
                values = batch.view(torch.int16).numpy() if precision == "bfloat16" else batch.numpy()
                if out is None:
                    shape = (views, count, *values.shape[1:])
                    _need_room(path, int(np.prod(shape)) * values.itemsize)
                    out = np.lib.format.open_memmap(temporary, "w+", values.dtype, shape)
                out[view, done : done + len(values)] = values
                done += len(values)
        out.flush()
        del out
    for part in parts:
        for suffix in (".npy", ".json"):
            place(backbone, part)[0].with_suffix(suffix).unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), {"key": key, "seconds": before + time.perf_counter() - start})
    return _open(path, precision)


def adapt_cached(whole: Joined, weights: str, store, spec, folder, settings, *, precision="auto", seed=0) -> None:
    """`adapt_batchnorm` on 256 random training slices, from `data/cache/batchnorm` if it was done before.

    Args:
        whole: a new network, cut anywhere; changed in place: running statistics alone.
        weights: SHA-256 of what it was built from.
        store, spec, folder, settings, precision: as for `cached_features`.
        seed: of the choice of slices.
    Source: notebook 03, section 4.
    """
    if not any(isinstance(part, BatchNorm) for part in whole.modules()):
        return
    rows = np.random.default_rng(seed).permutation(folder.rows("train"))[:256]
    precision, kind = choose_precision(precision, settings.device), torch.device(settings.device).type
    key = [PASS_VERSION, folder.fingerprint, store.shape, seed, weights, spec.mean, spec.std, precision]
    path = _place(settings, "batchnorm", spec, [*key, kind]).with_suffix(".safetensors")
    places = {name.partition(".")[2]: name for name in whole.state_dict()}  # without the part that it is in
    try:
        whole.load_state_dict({places[name]: value for name, value in load_file(path).items()}, strict=False)
        return
    except (OSError, SafetensorError, RuntimeError, KeyError):
        pass  # absent or damaged: made again

    def batches():
        for start in progress(range(0, len(rows), 16), desc="BatchNorm", unit="batch", leave=False):
            grey = torch.from_numpy(store[rows[start : start + 16]])[:, None].to(settings.device)
            yield normalise(grey, spec.mean, spec.std).contiguous(memory_format=torch.channels_last)

    whole.to(memory_format=torch.channels_last)
    with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
        adapt_batchnorm(nn.Sequential(*whole), batches(), settings.device)  # not `Joined`, which says its precision
    whole.to(memory_format=torch.contiguous_format)
    kept = (".running_mean", ".running_var", ".num_batches_tracked")
    state = {place: whole.state_dict()[name].cpu() for place, name in places.items() if name.endswith(kept)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(state))


def _place(settings: Settings, room: str, spec: BackboneSpec, key: list) -> Path:
    """Return the file, without its suffix, of what the key describes."""
    return Path(settings.cache_dir) / room / f"{spec.name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}"


def _open(path: Path, precision: str) -> tuple[torch.Tensor, float] | None:
    """Map a finished file; None when it is absent or damaged."""
    try:
        array = np.load(path, mmap_mode="c")  # torch wants what it could write to; nothing reaches the file
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if precision == "bfloat16" else tensor, float(about["seconds"])
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None


def _need_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:  # a mapped file that outgrows the disk would end the process without a word
        found = f"{free / 1e9:.1f} GB free for features of {size / 1e9:.1f} GB"
        mend = "free some space, use smaller pictures, or train the head only"
        raise CTError(found, f"room for them in '{path.parent}'", mend)
