"""The whole way in one call, as notebook 05 walks it: data, backbone, features, `train_model`, run record."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ctutils import models
from ctutils.augment import build_augment
from ctutils.base import CTError, read_json, write_json
from ctutils.config import Settings
from ctutils.data import (
    build_store,
    default_folder,
    feature_loaders,
    load_folder,
    make_loaders,
    normalise,
    read_small,
    with_test_split,
)
from ctutils.features import cached_features, choose_precision
from ctutils.runs import TENSOR_FILES, Run, claim, describe_run, load_run, predictions_table, save_run
from ctutils.training import evaluate, train_model

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
}
SMALLEST_INPUT = 64  # pixels a side; below, AlexNet's last pooling layer has nothing to pool


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run: what to train, on what and how. None means: as the settings say."""

    backbone: str = "efficientnet_lite0"
    data: Path | None = None
    epochs: int | None = None
    weights: str | None = None
    optimizer: str = "adam"
    lr: float = 1e-3
    batch_size: int | None = None
    size: int | None = None
    bn: str = "auto"
    standardise: bool = True  # features of a frozen backbone to mean 0, sd 1 on the training slices
    unfreeze: bool = False
    augment: tuple[str, ...] = ()
    precision: str = "auto"
    seed: int = 0


def run_plan(
    plan: Plan, settings: Settings, out: Path, *, resume: bool = False, say: Callable[[str], None] = print
) -> Run:
    """Train as planned and write the run record.

    A frozen backbone sees every slice once and the head learns from its features; with `unfreeze`, `augment`
    or `bn="drift"` the features change while training, and the whole network sees every slice in every epoch.

    Args:
        plan: what to do.
        settings: for all that the plan leaves open.
        out: folder of the record; an older record there is replaced at the very end.
        resume: go on from the checkpoint of an interrupted run of this name.
        say: where the few lines for the user go.
    Returns:
        the record, as read back.
    Raises:
        CTError: unknown names, broken data, a run of this name in progress, a full disk.
    Source: notebooks 02 and 05.
    """
    start = time.perf_counter()
    out = Path(out).resolve()
    spec = models.get_spec(plan.backbone)
    epochs = settings.profile.epochs if plan.epochs is None else plan.epochs
    batch_size = settings.profile.batch_size if plan.batch_size is None else plan.batch_size
    size = settings.profile.image_size if plan.size is None else plan.size
    _check(plan, epochs, batch_size, size, out)
    precision = choose_precision(plan.precision, settings.device)
    augment = build_augment(plan.augment)
    with claim(out):
        folder = default_folder(settings) if plan.data is None else load_folder(plan.data, cache=settings.cache_dir)
        folder = with_test_split(folder)
        store = build_store(folder, size, cache=settings.cache_dir)

        model, weights = models.build_model(spec.name, plan.weights or settings.weights, seed=plan.seed)
        if weights.note:
            say(weights.note)
        torch.manual_seed(plan.seed)
        models.replace_head(model, spec.name, len(folder.classes))
        if plan.unfreeze:
            models.unfreeze(model)
        else:
            models.freeze(model, train=models.get_module(model, spec.head))
        backbone, head = models.split_model(model, spec.name)
        parameters = models.count_parameters(model)

        bn = plan.bn
        if bn == "auto":
            bn = "train" if plan.unfreeze else "adapt" if weights.kind == "random" else "frozen"
        images = {"mean": spec.mean, "std": spec.std}
        if bn == "adapt":
            slices = make_loaders(folder, store, **images, batch_size=16)["train"]
            if not models.adapt_batchnorm(backbone, itertools.islice(slices, 16), settings.device):  # 256 are enough
                bn = "frozen"  # VGG16 and AlexNet have nothing to adapt
        on_features = not (plan.unfreeze or plan.augment or bn == "drift")
        standardised = plan.standardise and not plan.unfreeze and bn != "drift"
        features_seconds = 0.0
        if not (on_features or standardised):
            precision = "float32"
        else:
            features, features_seconds = cached_features(
                backbone,
                store,
                name=spec.name,
                fingerprint=folder.fingerprint,
                **images,
                cache=settings.cache_dir,
                device=settings.device,
                precision=precision,
            )
        if standardised:
            head = models.standardise_head(head, features[folder.rows("train")])
        if on_features:
            trained = head.to(settings.device)
            loaders = feature_loaders(folder, features, batch_size=batch_size)
        else:
            trained = models.join(backbone, head).to(settings.device)
            loaders = make_loaders(folder, store, **images, batch_size=batch_size, augment=augment)

        learning = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[plan.optimizer](learning, lr=plan.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
        checkpoint = out.with_name(f".{out.name}.checkpoint.pt")
        about = {
            **dataclasses.asdict(dataclasses.replace(plan, data=None, epochs=None, weights=weights.sha256)),
            "data": folder.fingerprint,
            "batch_size": batch_size,
            "size": size,
            "precision": precision,
        }
        _begin_checkpoint(checkpoint, json.loads(json.dumps(about)), resume)
        train_start = time.perf_counter()
        result = train_model(
            trained,
            nn.CrossEntropyLoss(),
            optimizer,
            scheduler,
            loaders,
            epochs,
            seed=plan.seed,
            batchnorm="drift" if bn == "drift" else "frozen",
            checkpoint=checkpoint,
            resume=resume,
        )
        train_seconds = time.perf_counter() - train_start
        if not result.history:
            raise CTError("a run stopped before its first epoch ended", "one epoch at least", "run it again")
        predictions = predictions_table(
            folder, {split: evaluate(trained, loaders[split])[2] for split in ("val", "test")}
        )
        record = describe_run(
            folder,
            settings,
            weights=weights,
            result=result,
            optimizer=optimizer,
            scheduler=scheduler,
            predictions=predictions,
            backbone=spec.name,
            bn=bn,
            standardised=standardised,
            trained="all" if plan.unfreeze else "head",
            augment=list(plan.augment),
            seed=plan.seed,
            epochs=epochs,
            batch_size=batch_size,
            image_size=size,
            precision=precision,
            parameters=parameters,
            seconds={
                "features": features_seconds,
                "train": train_seconds,
                "total": time.perf_counter() - start,
            },
        )
        name = "model.safetensors" if plan.unfreeze else "head.safetensors"
        tensors = models.run_tensors(backbone, head, spec.name, bn=bn, trained=record["trained"])
        save_run(out, record, result.history_table(), predictions, tensors, name)
        if not result.interrupted:
            checkpoint.unlink(missing_ok=True)
            checkpoint.with_suffix(".json").unlink(missing_ok=True)
    if result.interrupted:
        say("Stopped early: the best epoch so far is saved; --resume goes on.")
    return load_run(out)


def _check(plan: Plan, epochs: int, batch_size: int, size: int, out: Path) -> None:
    """Raise for what would fail later, or lose something, before any work is done."""
    if plan.optimizer not in OPTIMIZERS:
        raise CTError(f"optimizer '{plan.optimizer}'", f"one of {', '.join(OPTIMIZERS)}", "choose one of these")
    if not 0 < plan.lr < float("inf"):
        raise CTError(f"a learning rate of {plan.lr}", "a positive number", "try 0.001")
    for name, value, least in (("epochs", epochs, 1), ("batch size", batch_size, 1), ("size", size, SMALLEST_INPUT)):
        if value < least:
            raise CTError(f"{name} {value}", f"{least} or more", "ask for more")
    own = {"run.json", "history.csv", "predictions.csv", *TENSOR_FILES}
    held = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if "run.json" not in held and held - own:  # the record will replace all that is there
        raise CTError(
            f"'{out}', which holds something else than a run record",
            "a new folder or an older record",
            "choose another folder for the record; this one was left as it was",
        )


def _begin_checkpoint(checkpoint: Path, about: dict, resume: bool) -> None:
    """Note beside the checkpoint which run it belongs to, and refuse to go on from another run's."""
    note = checkpoint.with_suffix(".json")
    if not resume:
        checkpoint.unlink(missing_ok=True)
    elif checkpoint.exists():
        before = read_json(note)
        other = [key for key in about if before.get(key) != about[key]]
        if other:
            raise CTError(
                f"a checkpoint '{checkpoint.name}' of another run (not the same {', '.join(other)})",
                "one of this run",
                "give the same options as before, or start again without --resume",
            )
    write_json(note, about)


@torch.no_grad()
def predict_files(run: Run, paths: Sequence[Path], *, weights: str = "auto") -> list[dict]:
    """Classify pictures or DICOM files with the model of a run.

    Args:
        run: a record with its weights.
        paths: PNG, JPEG, ... or DICOM files; a DICOM file of several frames gives a row a frame.
        weights: where the backbone's weights are, as for `build_model`.
    Returns:
        one dict a picture: image, class, probabilities {class: number}.
    Raises:
        CTError: a file that is missing or cannot be read; weights that are not there.
    Source: notebook 00.
    """
    spec = models.get_spec(run.record["backbone"])
    size = run.record["image_size"]
    pictures: list[tuple[str, np.ndarray]] = []
    for path in paths:
        pictures += _read_any(Path(path), size)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in run.load_tensors().items()}
    model = models.restore_model(run.record, tensors, weights)
    rows = []
    for start in range(0, len(pictures), 16):
        batch = pictures[start : start + 16]
        grey = torch.from_numpy(np.stack([picture for _, picture in batch]))[:, None]
        probs = torch.softmax(model(normalise(grey, spec.mean, spec.std)), 1).numpy()
        for (name, _), row in zip(batch, probs, strict=True):
            rows.append(
                {
                    "image": name,
                    "class": run.classes[int(row.argmax())],
                    "probabilities": {c: round(float(p), 6) for c, p in zip(run.classes, row, strict=True)},
                }
            )
    return rows


def _read_any(path: Path, size: int) -> list[tuple[str, np.ndarray]]:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise CTError(f"no file '{path}'", "a picture or a DICOM file", "check the path")
    try:
        return [(str(path), read_small(path, size))]
    except UnidentifiedImageError:
        from ctutils.importers import dicom_to_uint8

        frames = dicom_to_uint8(path)
        small = [np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BILINEAR)) for f in frames]
        names = [str(path)] if len(small) == 1 else [f"{path} frame {k}" for k in range(1, len(small) + 1)]
        return list(zip(names, small, strict=True))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CTError(f"'{path}', which cannot be read ({error})", "a whole picture", "replace the file") from error
