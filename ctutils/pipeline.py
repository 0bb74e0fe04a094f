"""The whole way in one call, as notebook 05 walks it: data, backbone, features, `train_model`, run record."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from ctutils import models
from ctutils.augment import BALANCES, balanced_loader, build_augment, class_weights, make_imbalanced
from ctutils.base import CTError, read_json, reuse_large_blocks, write_json
from ctutils.config import Settings
from ctutils.data import (
    SliceFolder,
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
from ctutils.training import Batching, OtherCheckpoint, evaluate, lr_range_test, pick_rate, train_model

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options),
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULERS = {
    "none": lambda optimizer, epochs, batches: None,
    "step": lambda optimizer, epochs, batches: StepLR(optimizer, step_size=7, gamma=0.1),  # the deck's
    "cosine": lambda optimizer, epochs, batches: CosineAnnealingLR(optimizer, T_max=epochs),
    "onecycle": lambda optimizer, epochs, batches: OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=epochs * batches
    ),
}
UNFREEZE = ("none", "last", "all")
BATCHNORM = ("auto", "frozen", "adapt", "drift", "train")
# The first layer of each backbone's last block: all that follows works at the coarsest resolution.
LAST_BLOCK = {
    "vgg16": "features.24",
    "alexnet": "features.10",
    "resnet50": "layer4",
    "resnet152": "layer4",
    "densenet161": "features.denseblock4",
    "mobilenet_v3_large": "features.13",
    "efficientnet_lite0": "blocks.5",
}
DEPTHWISE = ("mobilenet_v3_large", "efficientnet_lite0")  # on a CPU they train twice as fast in float32
SMALLEST_INPUT = 64  # pixels a side; below, AlexNet's last pooling layer has nothing to pool


class StoppedEarly(CTError):
    """Ctrl-C before the first epoch was over: there is nothing to record."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run: what to train, on what and how. None means: as the settings say.

    Attributes:
        data, test_data: folders; `test_data` gives the test split where it is not that of `data`.
        lr: the head's rate, or "range": picked by `lr_range_test` on the validation split.
        scheduler: step, cosine, onecycle or none.
        patience: early stopping after so many epochs without a better validation score.
        at_once: slices that go through the network at a time; their gradients add up to the batch's.
        bn: frozen, adapt (statistics estimated anew, then frozen), train (of the layers that learn), drift
            (the deck's), or auto: train with `unfreeze`, else adapt for random weights and frozen for real ones.
        standardise: features of a frozen backbone to mean 0, sd 1 on the training slices.
        unfreeze: none, last (the last block) or all.
        discriminative: the last block's rate as a share of the head's; earlier layers get its square.
        augment: names of `AUGMENTATIONS`; views: 0 changes every slice anew in every epoch, K > 0 caches the
            features of K changed copies of every slice and draws from them.
        balance: none, loss (class weights) or sampler; imbalance: makes classes rarer (1: all equal), see
            `make_imbalanced`.
        precision: of the network on images: float32, bfloat16 or auto; a head on features is always float32.
    """

    backbone: str = "efficientnet_lite0"
    data: Path | None = None
    test_data: Path | None = None
    epochs: int | None = None
    weights: str | None = None
    optimizer: str = "adam"
    lr: float | str = 1e-3
    scheduler: str = "step"
    patience: int | None = None
    batch_size: int | None = None
    at_once: int | None = None
    size: int | None = None
    bn: str = "auto"
    standardise: bool = True
    unfreeze: str | bool = "none"
    discriminative: float = 1.0
    augment: tuple[str, ...] = ()
    views: int = 0
    balance: str = "none"
    imbalance: float | None = None
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "unfreeze", {True: "all", False: "none"}.get(self.unfreeze, self.unfreeze))
        object.__setattr__(self, "augment", tuple(self.augment))


def run_plan(
    plan: Plan,
    settings: Settings,
    out: Path,
    *,
    resume: bool | str = False,
    say: Callable[[str], None] = print,
    keep_weights: bool = True,
    note: dict | None = None,
) -> Run:
    """Train as planned and write the run record.

    A frozen backbone sees every slice once and the head learns from its features; with `unfreeze`, `augment`
    (without `views`) or `bn="drift"` the features change while training, and the whole network sees every slice
    in every epoch.

    Args:
        plan: what to do.
        settings: for all that the plan leaves open.
        out: folder of the record; an older record there is replaced at the very end.
        resume: go on from the checkpoint of an interrupted run of this name; "if_same" starts again where the
            checkpoint is of another plan, True is an error then.
        say: where the few lines for the user go.
        keep_weights: store the weights in the record, so that it can predict.
        note: more keys for run.json.
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
        folder = load_plan_data(plan, settings)
        store = build_store(folder, size, cache=settings.cache_dir)
        labels = folder.labels[folder.rows("train")]

        model, weights = models.build_model(spec.name, plan.weights or settings.weights, seed=plan.seed)
        if weights.note:
            say(weights.note)
        torch.manual_seed(plan.seed)
        models.replace_head(model, spec.name, len(folder.classes))
        backbone, head = models.split_model(model, spec.name)
        last_block = _set_learning(model, backbone, head, plan)
        bn = plan.bn
        if bn == "auto":
            bn = "train" if plan.unfreeze != "none" else "adapt" if weights.kind == "random" else "frozen"
        images = {"mean": spec.mean, "std": spec.std}
        # Statistics of random weights say nothing until they are estimated; training moves them on from there.
        if bn == "adapt" or (bn == "train" and weights.kind == "random"):
            slices = make_loaders(folder, store, **images, batch_size=16)["train"]
            seen = models.adapt_batchnorm(backbone, itertools.islice(slices, 16), settings.device)  # 256 are enough
            if bn == "adapt" and not seen:
                bn = "frozen"  # VGG16 and AlexNet have nothing to adapt
        for part in (part for part in backbone.modules() if isinstance(part, models.BatchNorm)):
            if bn in ("frozen", "adapt"):  # in eval mode while training, as all that is frozen: see set_train_mode
                part.requires_grad_(False)
            elif bn == "train":  # MobileNetV3's 0.01 follows the weights only after hundreds of steps
                part.momentum = max(part.momentum, 0.1)
        parameters = models.count_parameters(model)

        drift = bn == "drift"
        on_features = not (plan.unfreeze != "none" or (plan.augment and not plan.views) or drift)
        standardised = plan.standardise and plan.unfreeze == "none" and not drift
        features_seconds, views = 0.0, None
        if on_features or standardised:
            described = {"name": spec.name, "fingerprint": folder.fingerprint, **images, "cache": settings.cache_dir}
            described |= {"device": settings.device, "precision": precision}
            features, features_seconds = cached_features(backbone, store, **described)
            if on_features and plan.augment:
                changed = {"rows": folder.rows("train"), "augmentations": plan.augment, "views": plan.views}
                views, seconds = cached_features(backbone, store, **described, **changed, seed=plan.seed)
                features_seconds += seconds
        if standardised:
            head = models.standardise_head(head, features[folder.rows("train")])
        if on_features:
            trained = head.to(settings.device)
            options = {} if views is None else {"views": views.to(settings.device)}
            loaders = feature_loaders(folder, features.to(settings.device), batch_size=batch_size, **options)
        else:
            if plan.precision == "auto" and settings.device == "cpu" and spec.name in DEPTHWISE:
                precision = "float32"
            reuse_large_blocks()
            torch.backends.cudnn.deterministic = True  # the same seed, the same numbers, as far as cuDNN goes
            trained = models.join(backbone, head).to(settings.device, memory_format=torch.channels_last)
            options = {"batch_size": batch_size, "augment": augment, "device": settings.device}
            loaders = make_loaders(folder, store, **images, **options)
        if plan.balance == "sampler":
            loaders["train"] = balanced_loader(loaders["train"].dataset, labels, batch_size)
        criterion = nn.CrossEntropyLoss()
        if plan.balance == "loss":
            criterion.weight = torch.from_numpy(class_weights(labels, len(folder.classes))).to(settings.device)
        batching = Batching(plan.at_once, bfloat16=not on_features and precision == "bfloat16")

        groups = _parameter_groups(trained, last_block, plan.discriminative)
        fused = not on_features and plan.optimizer != "rmsprop" and settings.device != "mps"
        lr, lr_range = plan.lr, None
        if lr == "range":
            trial = _build_optimizer(plan.optimizer, groups, 1e-6, fused)
            lr_range = lr_range_test(trained, criterion, trial, loaders, seed=plan.seed, batching=batching)
            lr = pick_rate(lr_range)
        optimizer = _build_optimizer(plan.optimizer, groups, lr, fused)
        scheduler = SCHEDULERS[plan.scheduler](optimizer, epochs, len(loaders["train"]))
        checkpoint = out.with_name(f".{out.name}.checkpoint.pt")
        planned = dataclasses.replace(plan, data=None, test_data=None, epochs=None, weights=weights.sha256)
        about = {
            **dataclasses.asdict(planned),
            "data": folder.fingerprint,
            "batch_size": batch_size,
            "size": size,
            "precision": precision,
            "schedule_epochs": epochs if plan.scheduler in ("cosine", "onecycle") else None,
        }
        go_on = _begin_checkpoint(checkpoint, json.loads(json.dumps(about)), resume)
        train_start = time.perf_counter()
        train = functools.partial(
            train_model,
            trained,
            criterion,
            optimizer,
            scheduler,
            loaders,
            epochs,
            seed=plan.seed,
            batchnorm="drift" if drift else "frozen",
            checkpoint=checkpoint,
            checkpoint_pause=0.0 if on_features else 30.0,
            patience=plan.patience,
            batching=batching,
        )
        try:
            result = train(resume=go_on)
        except OtherCheckpoint:  # damaged, or of another torch
            if resume != "if_same":
                raise
            checkpoint.unlink(missing_ok=True)
            result = train(resume=False)
        train_seconds = time.perf_counter() - train_start
        if not result.history:
            raise StoppedEarly("a run stopped before its first epoch ended", "one epoch at least", "run it again")
        batching.at_once = result.at_once
        predictions = predictions_table(
            folder, {split: evaluate(trained, loaders[split], batching=batching)[2] for split in ("val", "test")}
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
            trained="head" if plan.unfreeze == "none" else plan.unfreeze,
            discriminative=plan.discriminative,
            augment=list(plan.augment),
            views=plan.views,
            balance=plan.balance,
            imbalance=plan.imbalance,
            seed=plan.seed,
            epochs=epochs,
            patience=plan.patience,
            batch_size=batch_size,
            at_once=result.at_once,
            image_size=size,
            precision=precision,
            lr_range=lr_range,
            parameters=parameters,
            seconds={
                "features": features_seconds,
                "train": train_seconds,
                "total": time.perf_counter() - start,
            },
            **(note or {}),
        )
        name = "head.safetensors" if plan.unfreeze == "none" else "model.safetensors"
        tensors = None
        if keep_weights:
            tensors = models.run_tensors(backbone, head, spec.name, bn=bn, trained=record["trained"])
        save_run(out, record, result.history_table(), predictions, tensors, name)
        if not result.interrupted:
            checkpoint.unlink(missing_ok=True)
            checkpoint.with_suffix(".json").unlink(missing_ok=True)
    if result.interrupted:
        say("Stopped early: the best epoch so far is saved; --resume goes on.")
    return load_run(out)


def load_plan_data(plan: Plan, settings: Settings) -> SliceFolder:
    """Return the slices of a plan: its folder or the default one, its test split, made imbalanced if asked for."""
    folder = default_folder(settings) if plan.data is None else load_folder(plan.data, cache=settings.cache_dir)
    if plan.test_data is None:
        folder = with_test_split(folder)
    else:
        folder = with_test_of(folder, load_folder(plan.test_data, cache=settings.cache_dir))
    return make_imbalanced(folder, plan.imbalance)


def with_test_of(folder: SliceFolder, other: SliceFolder) -> SliceFolder:
    """Return the folder with the test split of another one, for the question: does it hold elsewhere?

    Raises:
        CTError: other classes, or no test split there.
    Source: notebook 10, "does it break the shortcut".
    """
    if other.classes != folder.classes:
        raise CTError(f"classes {other.classes} in '{other.name}'", f"{folder.classes}", "use sets of one kind")
    if not len(other.rows("test")):
        raise CTError(f"no test split in '{other.name}'", "one", "make it with --test")
    roots = folder.root.resolve(), other.root.resolve()
    try:
        root = Path(os.path.commonpath(roots))
    except ValueError as error:  # Windows
        raise CTError(f"'{roots[0]}' and '{roots[1]}' on two drives", "one drive", "copy one of them") from error
    parts = []
    for part, own, keep in zip((folder, other), roots, (("train", "val"), ("test",)), strict=True):
        rows = part.slices[part.slices["split"].isin(keep)].copy()
        rows["shown"] = [f"{own.name}/{path}" for path in rows["path"]]  # the record names no folder above
        rows["path"] = [(own / path).relative_to(root).as_posix() for path in rows["path"]]
        parts.append(rows)
    return dataclasses.replace(
        folder,
        root=root,
        name=f"{folder.name}, tested on {other.name}",
        slices=pd.concat(parts, ignore_index=True),
        fingerprint=hashlib.sha256(f"{folder.fingerprint} {other.fingerprint}".encode()).hexdigest(),
    )


def _set_learning(model: nn.Module, backbone: nn.Module, head: nn.Module, plan: Plan) -> set[int]:
    """Freeze what the plan freezes; return the ids of the last block's parameters."""
    names = [name for name, _ in backbone.named_parameters()]
    first = next(k for k, name in enumerate(names) if name.startswith(f"{LAST_BLOCK[plan.backbone]}."))
    last_block = {id(parameter) for parameter in list(backbone.parameters())[first:]}
    models.freeze(model, train=models.get_module(model, models.get_spec(plan.backbone).head))
    if plan.unfreeze != "none":
        head.requires_grad_(True)
        for parameter in backbone.parameters():
            parameter.requires_grad_(plan.unfreeze == "all" or id(parameter) in last_block)
    return last_block


def _parameter_groups(trained: nn.Module, last_block: set[int], share: float) -> list[tuple[list, float]]:
    """Return the parameters that learn, with their rate as a share of the head's: head, last block, the rest."""
    learning = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    if share == 1:
        return [(list(learning.values()), 1.0)]
    groups = [([], 1.0), ([], share), ([], share**2)]
    for name, parameter in learning.items():
        groups[0 if not name.startswith("backbone.") else 1 if id(parameter) in last_block else 2][0].append(parameter)
    return [group for group in groups if group[0]]


def _build_optimizer(name: str, groups: list[tuple[list, float]], lr: float, fused: bool) -> torch.optim.Optimizer:
    """Make the optimizer; `fused` does the step in one call, which matters for a network's millions of weights."""
    options = {"fused": True} if fused else {}
    return OPTIMIZERS[name](
        [{"params": parameters, "lr": lr * share} for parameters, share in groups], lr=lr, **options
    )


def _check(plan: Plan, epochs: int, batch_size: int, size: int, out: Path) -> None:
    """Raise for what would fail later, or lose something, before any work is done."""
    for what, value, known in (
        ("optimizer", plan.optimizer, OPTIMIZERS),
        ("scheduler", plan.scheduler, SCHEDULERS),
        ("unfreeze", plan.unfreeze, UNFREEZE),
        ("bn", plan.bn, BATCHNORM),
        ("balance", plan.balance, BALANCES),
    ):
        if value not in known:
            raise CTError(f"{what} '{value}'", f"one of {', '.join(known)}", "choose one of these")
    if plan.bn == "train" and plan.unfreeze == "none":
        raise CTError("bn 'train' with a frozen backbone", "frozen, adapt or drift", "or unfreeze it")
    if plan.lr != "range" and (isinstance(plan.lr, str) or not 0 < plan.lr < float("inf")):
        raise CTError(f"a learning rate of {plan.lr}", "a positive number, or range", "try 0.001")
    if not 0 < plan.discriminative <= 1:
        raise CTError(f"discriminative {plan.discriminative}", "a share above 0, at most 1", "try 0.3")
    for name, value, least in (
        ("epochs", epochs, 1),
        ("batch size", batch_size, 1),
        ("size", size, SMALLEST_INPUT),
        ("views", plan.views, 0),
        ("at_once", 1 if plan.at_once is None else plan.at_once, 1),
        ("patience", 1 if plan.patience is None else plan.patience, 1),
        ("imbalance", 1 if plan.imbalance is None else plan.imbalance, 1),
    ):
        if not value >= least:
            raise CTError(f"{name} {value}", f"{least} or more", "ask for more")
    own = {"run.json", "history.csv", "predictions.csv", *TENSOR_FILES}
    held = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if "run.json" not in held and held - own:  # the record will replace all that is there
        raise CTError(
            f"'{out}', which holds something else than a run record",
            "a new folder or an older record",
            "choose another folder for the record; this one was left as it was",
        )


def _begin_checkpoint(checkpoint: Path, about: dict, resume: bool | str) -> bool:
    """Note beside the checkpoint which run it belongs to, refuse another run's; return whether to go on from it."""
    note = checkpoint.with_suffix(".json")
    if resume and checkpoint.exists():
        before = {}
        with contextlib.suppress(CTError):  # absent or damaged: no run's
            before = read_json(note)
        other = [key for key in about if before.get(key) != about[key]]
        if other and resume != "if_same":
            raise CTError(
                f"a checkpoint '{checkpoint.name}' of another run (not the same {', '.join(other)})",
                "one of this run",
                "give the same options as before, or start again without --resume",
            )
        resume = not other
    if not resume:
        checkpoint.unlink(missing_ok=True)
    write_json(note, about)
    return bool(resume)


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
