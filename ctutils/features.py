"""One pass of a frozen backbone over the decoded slices, cached on disk: the fast way to train a head."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ctutils.augment import build_augment
from ctutils.base import CTError, atomic_path, is_out_of_memory, progress, reuse_large_blocks
from ctutils.data import normalise
from ctutils.inference import choose_precision, inference_copy
from ctutils.models import state_sha256

PASS_VERSION = 3  # part of the cache's key: raise it when the pass itself computes something else


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    store: np.ndarray,
    *,
    mean: tuple,
    std: tuple,
    rows: np.ndarray | None = None,
    device: str = "cpu",
    precision: str = "auto",
    batch_size: int | None = None,
    fold: bool = True,
    augment: Callable | None = None,
) -> torch.Tensor:
    """Run a frozen backbone once over every slice.

    Args:
        backbone: maps images (B, 3, S, S) to features (B, D).
        store: uint8 (N, S, S), see `build_store`.
        mean, std: the backbone's normalisation.
        rows: which M slices of the store (default: all N).
        precision: `float32`, `bfloat16` or `auto`.
        batch_size: slices at a time (default 16 on a CPU, 256 on a GPU); a batch that the memory does not hold goes
            through in halves.
        fold: False runs the layers one by one as they stand, for comparison.
        augment: a random change of a batch, see `build_augment`.
    Returns:
        float32 (M, D) on the CPU, M = N by default.
    Raises:
        CTError: no slices, or features that are not finite.
    Source: notebook 02, section 6.
    """
    rows = np.arange(len(store)) if rows is None else np.asarray(rows)
    if not len(rows):
        raise CTError("no slices", "one or more", "check the data set")
    precision = choose_precision(precision, device)
    on_gpu = device.startswith("cuda")
    batch_size = batch_size or (256 if on_gpu else 16)
    reuse_large_blocks()
    fast = inference_copy(backbone, precision, fold=fold, device=device)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    # Every grey value's normalised (R, G, B), looked up picture by picture: equal to the bit, and channels-last.
    greys = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1, 1, 1)
    table = normalise(greys, mean, std).view(256, 3).to(dtype)
    features, at_once = None, batch_size
    exact = contextlib.nullcontext()
    if on_gpu and precision == "float32":  # a GPU's convolutions would round to TF32
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, progress(total=len(rows), desc="One pass", unit="slice", leave=False) as bar:
        for start in range(0, len(rows), batch_size):
            grey = torch.from_numpy(store[rows[start : start + batch_size]])
            grey = (grey.pin_memory() if on_gpu else grey).to(device, non_blocking=True)
            if augment is not None:
                grey = augment(grey[:, None])[:, 0]
            images = nn.functional.embedding(grey.int(), table).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
            images = images if fold else images.contiguous()
            batch = None
            while batch is None:
                try:
                    batch = torch.cat([fast(part) for part in images.split(at_once)]).float()
                except (RuntimeError, MemoryError) as error:
                    if at_once == 1 or not is_out_of_memory(error):
                        raise
                    at_once = (min(at_once, len(images)) + 1) // 2
            if features is None:
                features = torch.empty(len(rows), batch.shape[1], device=device)
            features[start : start + len(batch)] = batch
            bar.update(len(batch))
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
    rows: np.ndarray | None = None,
    device: str = "cpu",
    precision: str = "auto",
    augmentations: tuple[str, ...] = (),
    views: int = 1,
    seed: int = 0,
) -> tuple[torch.Tensor, float]:
    """Return `extract_features`, from `data/cache/features` if the very same pass was made before.

    The key holds all that the result depends on: the slices' fingerprint, their size, the backbone with the
    hash of its weights and BatchNorm statistics as they stand, the normalisation, the precision and the kind of
    device (the random views are drawn in its batches).

    Args:
        name: the backbone's name, for the file name.
        fingerprint: of the slices, `SliceFolder.fingerprint`.
        cache: the cache folder, `settings.cache_dir`.
        rows: which M slices of the store (default: all N).
        augmentations: names for `build_augment`: each slice is then passed as `views` random views.
        seed: of the random views.
    Returns:
        features float32 (M, D), or (views, M, D) with augmentations; and the seconds the pass took (when it
        was made).
    Source: notebook 02, section 6; the views: notebook 10.
    """
    precision = choose_precision(precision, device)
    key = {
        "version": PASS_VERSION,
        "fingerprint": fingerprint,
        "shape": list(store.shape),
        "rows": None if rows is None else hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest(),
        "backbone": name,
        "weights": state_sha256(backbone),
        "mean": list(mean),
        "std": list(std),
        "precision": precision,
        "device": torch.device(device).type,
        "views": [*augmentations, views, seed] if augmentations else None,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = Path(cache) / "features" / f"{name}-{digest[:20]}.safetensors"
    shape = ([views] if augmentations else []) + [len(store) if rows is None else len(rows)]
    try:
        saved = load_file(path)
        if list(saved["features"].shape[:-1]) == shape:
            return saved["features"], float(saved["seconds"])
    except (OSError, SafetensorError, KeyError):
        pass  # absent or damaged: made again
    start = time.perf_counter()
    options = {"mean": mean, "std": std, "rows": rows, "device": device, "precision": precision}
    if augmentations:
        augment, passes = build_augment(tuple(augmentations)), []
        for view in range(views):
            devices = [torch.device(device)] if device.startswith("cuda") else []
            with torch.random.fork_rng(devices=devices):  # the caller's random numbers stay where they were
                torch.manual_seed(seed * 100_003 + view)
                passes.append(extract_features(backbone, store, augment=augment, **options))
        features = torch.stack(passes)
    else:
        features = extract_features(backbone, store, **options)
    seconds = time.perf_counter() - start
    content = {"features": features, "seconds": torch.tensor(seconds)}
    with atomic_path(path) as temporary:  # safetensors' own writer does not tell a full disk from other errors
        temporary.write_bytes(save(content, {"key": json.dumps(key)}))
    return features, seconds
