"""What a run's network makes of its training slices: how far a new slice is from them, and which are most like it.

Far: the Mahalanobis distance, with Ledoit-Wolf shrinkage, of the maps before the last block, averaged over the picture.
Held against 400 held-out slices and against photographs, drawn X-rays, blank pictures, noise, and slices turned or
inverted (synthetic slices, EfficientNet-Lite0, 160 pixels), it flags 0.5 % (frozen) and 1.0 % (fine-tuned) of the
former and all of the latter, each at 1.6 times the limit or more. On a fine-tuned network's last features, distances
miss up to half of the photographs: what does not help to tell the classes apart is forgotten there.

Alike: the nearest training slices on the last features, of length 1, by which the network tells the classes apart.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from ctutils.base import CTError, atomic_path, progress, read_json, write_json
from ctutils.config import Settings
from ctutils.data import SliceFolder, normalise
from ctutils.registry import BackboneSpec
from ctutils.runs import REFERENCE_FILE, Run

SHOWN = 3  # similar slices
PERCENTILE, MARGIN = 99.0, 1.1  # of a few hundred validation slices the percentile is not sure: a tenth more


@dataclasses.dataclass(eq=False)
class Reference:
    """The training slices as a run's network sees them.

    Attributes:
        features: float16 (N, D), of length 1, one row a training slice; paths, labels: of these slices.
        mean, whiten: float32 (K,) and (K, K): (middle - mean) @ whiten has length 1 or so for a training slice.
        val: the validation slices' distances, float32 (n,).
    """

    features: np.ndarray
    paths: list[str]
    labels: np.ndarray
    mean: np.ndarray
    whiten: np.ndarray
    val: np.ndarray

    def distance(self, middle: np.ndarray) -> np.ndarray:
        """Return how far slices are from the training slices, (B,): beyond 1 they are unlike anything trained on."""
        limit = MARGIN * np.percentile(self.val, PERCENTILE, method="higher")
        return np.linalg.norm((middle - self.mean) @ self.whiten, axis=1) / limit

    def similar(self, features: np.ndarray) -> np.ndarray:
        """Return the rows of the nearest training slices, the nearest first: (B, SHOWN)."""
        return np.argsort(-_unit(features) @ self.features.astype(np.float32).T, axis=1, kind="stable")[:, :SHOWN]


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True), 1e-12)


@torch.no_grad()
def look(model, grey: np.ndarray, spec: BackboneSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pass slices through a network once.

    Args:
        model: backbone and head, on any device.
        grey: uint8 (B, S, S).
    Returns:
        probabilities float64 (B, C), features (B, D), and the maps before the last block as their means (B, K).
    """
    from ctutils.backbones import split_model

    device = next(model.parameters()).device
    trunk, rest = split_model(model.backbone, spec.name, spec.last_block)
    maps = trunk(normalise(torch.from_numpy(np.ascontiguousarray(grey))[:, None].to(device), spec.mean, spec.std))
    middle = maps.mean(dim=(2, 3))
    features = rest(maps)
    probabilities = torch.softmax(model.head(features).double().cpu(), 1)
    return probabilities.numpy(), features.float().cpu().numpy(), middle.float().cpu().numpy()


def make_reference(run: Run, model, folder: SliceFolder, settings: Settings) -> Reference:
    """Pass the training and validation slices through a run's network.

    Args:
        model: of the run, as `restore_model` gives it.
        folder: the slices that the run has learned from.
    """
    from sklearn.covariance import LedoitWolf

    from ctutils.data import build_store
    from ctutils.registry import get_spec

    spec, store = get_spec(run.plan.backbone), build_store(folder, run.plan.size, cache=settings.cache_dir)
    train, val = folder.rows("train"), folder.rows("val")
    rows, parts = np.r_[train, val], []
    model.to(settings.device)
    for start in progress(range(0, len(rows), 16), desc="Training slices", unit="batch", leave=False):
        parts.append(look(model, store[rows[start : start + 16]], spec)[1:])
    model.to("cpu")
    features, middle = (np.concatenate(some) for some in zip(*parts, strict=True))
    known, new = middle[: len(train)], middle[len(train) :]
    mean, std = known.mean(axis=0), known.std(axis=0)
    std = np.maximum(std, max(0.01 * std.mean(), 1e-12))
    shape = np.linalg.cholesky(LedoitWolf(assume_centered=True).fit((known - mean) / std).precision_)
    whiten = (shape / std[:, None] / np.sqrt(len(mean))).astype(np.float32)
    distances = np.linalg.norm((new - mean) @ whiten, axis=1).astype(np.float32)
    paths = folder.slices["path"].iloc[train].tolist()
    kept = _unit(features[: len(train)]).astype(np.float16)
    return Reference(kept, paths, folder.labels[train], mean, whiten, distances)


def save_reference(run: Run, reference: Reference) -> None:
    """Keep a reference beside its run record: features and file names, no pictures."""
    from safetensors.numpy import save_file

    about = {"run": _key(run), "paths": json.dumps(reference.paths, ensure_ascii=False)}
    tensors = {name: np.ascontiguousarray(value) for name, value in vars(reference).items() if name != "paths"}
    with atomic_path(run.folder / REFERENCE_FILE) as temporary:
        save_file(tensors, temporary, metadata=about)


def load_reference(run: Run) -> Reference | None:
    """Read the reference of a run; None where there is none, or one of another training, or a damaged one."""
    from safetensors import SafetensorError, safe_open

    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError):
        with safe_open(run.folder / REFERENCE_FILE, "numpy") as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        reference = Reference(paths=json.loads(about["paths"]), **tensors)
        rows = {len(reference.features), len(reference.paths), len(reference.labels)}
        if about["run"] == _key(run) and len(rows) == 1 and len(reference.val):
            return reference
    return None


def _key(run: Run) -> str:
    return f"{run.record['created']} {run.record['data']['fingerprint']}"


def find_slices(run: Run, settings: Settings, data: str | Path | None = None) -> SliceFolder | None:
    """Return the slices that a run has learned from, where they are on this machine; None if they are not found.

    A record names no folders, so the cache remembers where the slices of a fingerprint were.

    Args:
        data: where to look; else where they were last, and the settings' own folders.
    Raises:
        CTError: `data` holds other slices.
    """
    from ctutils.data import shortcut_root
    from ctutils.experiment import load

    wanted = run.record["data"]["fingerprint"]
    places = [data] if data else [_known_place(wanted, settings), settings.data_dir, shortcut_root(settings)]
    for root in places:
        if not root or not (data or Path(root).is_dir()):
            continue
        try:
            folder = load(dataclasses.replace(run.plan, data=root, test_data=None), settings)
        except (CTError, OSError):
            if data:
                raise
            continue
        if folder.fingerprint == wanted:
            remember_place(folder, settings)
            return folder
    if data:
        mend = "give the folder that the run was trained on, as it was then"
        raise CTError(f"other slices in '{data}'", f"those of the run '{run.name}'", mend)
    return None


def _place_file(fingerprint: str, settings: Settings) -> Path:
    return settings.cache_dir / "places" / f"{fingerprint[:20]}.json"


def _known_place(fingerprint: str, settings: Settings) -> str | None:
    with contextlib.suppress(CTError):
        return str(read_json(_place_file(fingerprint, settings)).get("root"))
    return None


def remember_place(folder: SliceFolder, settings: Settings) -> None:
    """Note in the cache where the slices of a fingerprint are."""
    with contextlib.suppress(CTError, OSError):
        write_json(_place_file(folder.fingerprint, settings), {"root": str(folder.root.resolve())})


def get_reference(run: Run, model, settings: Settings, folder: SliceFolder | None) -> tuple[Reference | None, str]:
    """Return a run's reference, made and kept if need be, and one sentence on what is missing or was done.

    Args:
        folder: the training slices, if they are at hand.
    """
    if (known := load_reference(run)) is not None:
        return known, ""
    if folder is None:
        why = "the training slices are not at hand, and the record holds no features of them; name them with --data"
        return None, f"Not checked for slices unlike anything trained on: {why}."
    reference = make_reference(run, model, folder, settings)
    try:
        save_reference(run, reference)
    except (CTError, OSError) as error:  # a record that may not be written to
        return reference, f"The features of the training slices could not be kept in the record ({error})."
    return reference, ""


def remember_training(run: Run, plan, settings: Settings) -> None:
    """After training: note where the slices are, and keep in the record what `predict` needs of them.

    A head alone trains in less time than this pass takes: then the first `predict` makes it.
    """
    from ctutils.backbones import restore_model
    from ctutils.experiment import load

    folder = load(plan, settings)
    remember_place(folder, settings)
    if run.record["trained"] != "head":
        save_reference(run, make_reference(run, restore_model(run), folder, settings))
