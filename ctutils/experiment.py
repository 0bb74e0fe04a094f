"""One run in five steps: load, build, featurise, fit, record. Notebook 05 and the command line walk the same five."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctutils import backbones, data, metrics, training
from ctutils.augment import balanced_loader, build_augment, class_weights, make_imbalanced
from ctutils.backbones import BatchNorm, Joined
from ctutils.base import CTError
from ctutils.config import Settings
from ctutils.data import SliceFolder
from ctutils.features import adapt_cached, cached_features, choose_precision, reuse_large_blocks
from ctutils.plan import Plan
from ctutils.registry import BackboneSpec, get_spec
from ctutils.runs import Run, check_replaceable, claim, load_run, predictions_table, save_run
from ctutils.training import TrainResult
from ctutils.weights import WeightsInfo

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


@dataclasses.dataclass
class Network:
    """A network that is ready to learn: a part that stays frozen, and the rest.

    Attributes:
        whole: both parts, images (B, 3, H, W) -> logits (B, C); its children are `backbone` and `head`.
        bn: what is done with BatchNorm: frozen, adapt, train or drift.
        cached: True when only the head is trained, on the backbone's output; False when images go through both.
        precision: of the network on images, float32 or bfloat16.
        parameters: {"trained", "frozen"}: numbers of single weights.
        last_block: ids of the last block's parameters, for discriminative rates.
        lr_range: points of the LR range test, if one was made; lr: the rate that was used.
        seconds: that `featurise` took when its features were made.
    """

    spec: BackboneSpec
    weights: WeightsInfo
    whole: Joined
    bn: str
    cached: bool
    precision: str
    parameters: dict[str, int]
    last_block: set[int]
    standardised: bool = False
    lr: float = 0.0
    lr_range: list[dict] | None = None
    seconds: float = 0.0

    @property
    def learner(self) -> nn.Module:
        """What `train_model` trains."""
        return self.whole.head if self.cached else self.whole


def load(plan: Plan, settings: Settings) -> SliceFolder:
    """Step 1: return the slices of a plan, with a test split, and imbalanced if asked for.

    `plan.data` is a folder, None for the settings' own, or `shortcut` for the course's trap (notebook 01).

    Raises:
        CTError: a folder that is missing or broken.
    """

    def named(name: str | Path | None) -> SliceFolder:
        if name == "shortcut":
            return data.shortcut_folder(settings)
        own = name in (None, "default")
        return data.default_folder(settings) if own else data.load_folder(name, cache=settings.cache_dir)

    folder, other = named(plan.data), plan.test_data
    folder = data.with_test_split(folder) if other is None else data.with_test_of(folder, named(other))
    return make_imbalanced(folder, plan.imbalance)


def build(plan: Plan, settings: Settings, folder: SliceFolder) -> Network:
    """Step 2: build the network with a new head for the folder's classes, and freeze what the plan freezes.

    Raises:
        CTError: weights that are not there, damaged or of another network.
    """
    spec, plan = get_spec(plan.backbone), plan.resolved(settings)
    model, weights = backbones.build_model(spec.name, plan.weights, seed=plan.seed)
    torch.manual_seed(plan.seed)
    backbones.replace_head(model, spec.name, len(folder.classes))
    _, last = backbones.split_model(model, spec.name, spec.last_block)
    backbone, head = backbones.split_model(model, spec.name, spec.last_block if plan.unfreeze == "last" else None)
    parts = {"none": model.get_submodule(spec.head), "last": last, "all": model}
    backbones.freeze(model, train=parts[plan.unfreeze])
    bn = plan.bn
    if bn == "auto":
        bn = "train" if plan.unfreeze != "none" else "adapt" if weights.kind == "random" else "frozen"
    norms = [part for part in model.modules() if isinstance(part, BatchNorm)]
    if bn in ("adapt", "train") and not norms:
        bn = "frozen"  # VGG16 and AlexNet have none
    for part in norms:
        if bn in ("frozen", "adapt"):  # in eval mode while training, as all that is frozen: see set_train_mode
            part.requires_grad_(False)
        elif bn == "train":  # MobileNetV3's 0.01 follows the weights only after hundreds of steps
            part.momentum = max(part.momentum, 0.1)
    precision = choose_precision(plan.precision, settings.device)
    if plan.precision == "auto" and not plan.cached and settings.device == "cpu" and spec.depthwise:
        precision = "float32"
    block = {id(parameter) for parameter in last.parameters()}
    counts = backbones.count_parameters(model)
    return Network(spec, weights, backbones.join(backbone, head), bn, plan.cached, precision, counts, block)


def featurise(plan: Plan, settings: Settings, folder: SliceFolder, network: Network) -> dict:
    """Step 3: run the frozen part once, and return what trains: one loader a split.

    A frozen backbone sees every slice once and the head learns from its features; where features change while
    training (all layers learn, `augment` without `views`, `bn="drift"`), the loaders yield images.

    Returns:
        {split: loader of float32 (B, ...) and labels int64 (B,)}; the network's BatchNorm is adapted and its head
        standardised as planned.
    Raises:
        CTError: slices that cannot be decoded; a full disk.
    """
    plan, spec, whole = plan.resolved(settings), network.spec, network.whole
    stored = functools.cache(lambda: data.build_store(folder, plan.size, cache=settings.cache_dir))
    shape = (len(folder.slices), plan.size, plan.size)
    store = data.Rows(shape, lambda rows: stored()[rows])  # not made where its features are cached
    # Statistics of random weights say nothing until they are estimated; training moves them on from there.
    if network.bn == "adapt" or (network.bn == "train" and network.weights.kind == "random"):
        options = {"precision": plan.precision, "seed": plan.seed}
        adapt_cached(whole, network.weights.sha256, store, spec, folder, settings, **options)
    network.standardised = plan.standardise and plan.unfreeze == "none" and network.bn != "drift"
    options = {"batch_size": plan.batch_size}
    if network.cached or network.standardised:
        given = (whole.backbone, store, spec, folder, settings)
        (features,), network.seconds = cached_features(*given, precision=plan.precision)
        if network.cached and plan.augment:
            changed = {"rows": folder.rows("train"), "augmentations": plan.augment, "views": plan.views}
            views, seconds = cached_features(*given, precision=plan.precision, seed=plan.seed, **changed)
            options["views"] = views.to(settings.device) if views.ndim == 3 else views
            network.seconds += seconds
        if network.standardised:
            whole.head = backbones.standardise_head(whole.head, features, folder.rows("train"))
    if network.cached:
        whole.head.to(settings.device)
        if features.ndim == 2 and features.nbytes < 1 << 34:  # whole activations, and millions, stay in their file
            features = features.to(settings.device)
        loaders = data.feature_loaders(folder, features, **options)
    else:
        reuse_large_blocks()
        whole.to(settings.device, memory_format=torch.channels_last)
        whole.bfloat16, whole.at_once = network.precision == "bfloat16", plan.at_once
        options |= {"augment": build_augment(plan.augment), "device": settings.device}
        loaders = data.make_loaders(folder, stored(), mean=spec.mean, std=spec.std, **options)
    if plan.balance == "sampler":
        labels = folder.labels[folder.rows("train")]
        loaders["train"] = balanced_loader(loaders["train"].dataset, labels, plan.batch_size)
    if plan.start_size:
        loaders["train"] = Growing(loaders["train"], plan.start_size, plan.epochs // 2)
    return loaders


class Growing:
    """A loader whose pictures are smaller in the first epochs: progressive resizing (notebook 12)."""

    def __init__(self, loader, size: int, epochs: int):
        self.loader, self.size, self.epochs = loader, size, epochs

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        early = torch.initial_seed() % training.SEED_STEP <= self.epochs  # `train_model` seeds every epoch
        for images, labels in self.loader:
            if early:
                images = nn.functional.interpolate(images, size=(self.size,) * 2, mode="bilinear", antialias=True)
            yield images, labels


class Averaged(nn.Module):
    """A network that learns as itself, and is scored as the running average of its weights (EMA; notebook 12)."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs) if self.training else self.average(inputs)


def fit(
    plan: Plan,
    settings: Settings,
    folder: SliceFolder,
    network: Network,
    loaders: dict,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    team=None,
) -> TrainResult:
    """Step 4: make criterion, optimizer and scheduler as planned, and call `train_model`.

    When the memory is full, images go through in halves from there on, beginning with the last checkpoint; the
    batch size and its gradient stay the same.

    Args:
        team: of the optional room `distributed`, when several processes train together.
    Raises:
        CTError: a loss that is not a number; memory too small for one slice.
    """
    plan, learner = plan.resolved(settings), network.learner
    if team:
        learner, loaders = team.join(learner, loaders)
    tried = learner
    if plan.ema:
        learner = Averaged(learner, plan.ema)
    criterion = nn.CrossEntropyLoss(label_smoothing=plan.label_smoothing)
    if plan.balance == "loss":
        weight = class_weights(folder.labels[folder.rows("train")], len(folder.classes))
        criterion.weight = torch.from_numpy(weight).to(settings.device)
    start = {} if network.cached else training.changing_state(learner)  # to begin again with when the memory was full
    deterministic = contextlib.nullcontext()
    if not network.cached and settings.device.startswith("cuda"):  # the same seed, the same numbers
        deterministic = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with deterministic:
        while True:
            try:
                network.lr = plan.lr
                if plan.lr == "range":
                    trial = build_optimizer(plan, network, 1e-6)
                    network.lr_range = training.lr_range_test(tried, criterion, trial, loaders, seed=plan.seed)
                    network.lr = training.pick_rate(network.lr_range)
                optimizer = build_optimizer(plan, network, network.lr)
                if plan.ema:
                    optimizer.register_step_post_hook(lambda *_: learner.average.update_parameters(learner.model))
                scheduler = SCHEDULERS[plan.scheduler](optimizer, plan.epochs, len(loaders["train"]))
                result = training.train_model(
                    *(learner, criterion, optimizer, scheduler, loaders, plan.epochs),
                    seed=plan.seed,
                    batchnorm="drift" if network.bn == "drift" else "frozen",
                    checkpoint=checkpoint,
                    resume=resume,
                    patience=plan.patience,
                )
                if plan.ema:
                    network.learner.load_state_dict(learner.average.module.state_dict())
                return result
            except training.OtherCheckpoint as error:  # damaged, or of another torch
                say(f"{error} Training starts again.")
                checkpoint.unlink(missing_ok=True)
            except (RuntimeError, MemoryError) as error:
                if not training.is_out_of_memory(error) or network.cached or team:
                    raise
                at_once = min(network.whole.at_once or plan.batch_size, plan.batch_size)
                if at_once == 1:
                    mend = "choose a smaller size or backbone"
                    raise CTError("memory too small for one slice", "room for one", mend) from error
                network.whole.at_once = at_once // 2
                say(f"Out of memory with {at_once} slices at once: {at_once // 2} from here on, the same batch size.")
            learner.load_state_dict(start, strict=False)  # outside the handlers: an error holds on to the memory
            resume = checkpoint is not None
            if settings.device.startswith("cuda"):
                torch.cuda.empty_cache()


def build_optimizer(plan: Plan, network: Network, lr: float) -> torch.optim.Optimizer:
    """Return the plan's optimizer; with discriminative rates it has groups: head, last block, the rest."""
    groups, share = {1.0: []}, plan.discriminative
    new = {id(p) for name, p in network.whole.named_parameters() if f".{network.spec.head}." in name}
    for parameter in (p for p in network.learner.parameters() if p.requires_grad):
        in_head = id(parameter) in new or share == 1
        power = 0 if in_head else 1 if id(parameter) in network.last_block else 2
        groups.setdefault(share**power, []).append(parameter)
    options = {}
    on = next(network.learner.parameters()).device.type
    if plan.unfreeze != "none" and plan.optimizer != "rmsprop" and on != "mps":
        options["fused"] = True  # the step in one call, which matters for a network's millions of weights
    groups = [{"params": some, "lr": lr * factor} for factor, some in groups.items() if some]
    return OPTIMIZERS[plan.optimizer](groups, lr=lr, **options)


def record(
    plan: Plan,
    settings: Settings,
    folder: SliceFolder,
    network: Network,
    loaders: dict,
    result: TrainResult,
    out: Path,
    *,
    seconds: float | None = None,
    keep_weights: bool = True,
    note: dict | None = None,
) -> Run:
    """Step 5: score validation and test, and write the run record.

    Args:
        out: folder of the record.
        seconds: of the whole run, if they are known.
        keep_weights: store the weights, so that the record can predict.
        note: more keys for run.json.
    Raises:
        CTError: no epoch was finished; other files in `out`; a full disk.
    """
    if not result.history:
        raise CTError("a run stopped before its first epoch ended", "one epoch at least", "run it again")
    scores = {split: training.evaluate(network.learner, loaders[split])[2] for split in ("val", "test")}
    plan, predictions = plan.resolved(settings), predictions_table(folder, scores)
    trained = "head" if plan.unfreeze == "none" else plan.unfreeze
    train_seconds = sum(row["seconds"] for row in result.history)
    seconds = network.seconds + train_seconds if seconds is None else seconds
    patients = folder.slices.loc[folder.slices["patient"] != "", "patient"].nunique()
    content = {
        "plan": plan.to_json(),
        "data": {
            **{key: getattr(folder, key) for key in ("name", "kind", "fingerprint", "shortcut", "window")},
            "counts": {split: {name: int(n) for name, n in row.items()} for split, row in folder.counts().items()},
            "test_from_val": bool(folder.meta.get("test_from_val", False)),
            "patients": int(patients) or None,
            "depth": folder.depth,
            "notes": list(folder.notes),
        },
        **{"classes": list(folder.classes), "profile": settings.profile.name, "device": settings.device},
        "weights": dataclasses.asdict(network.weights),
        **{key: getattr(network, key) for key in ("bn", "standardised", "precision", "parameters", "lr", "lr_range")},
        **{"trained": trained, "at_once": network.whole.at_once},
        **{"best_epoch": result.best_epoch, "interrupted": result.interrupted, "diverged": result.diverged},
        "seconds": {"features": network.seconds, "train": train_seconds, "total": seconds},
        "scores": {split: _scores(rows, folder.classes) for split, rows in predictions.groupby("split", sort=False)},
        **(note or {}),
    }
    options = {"bn": network.bn, "trained": trained}
    tensors = backbones.run_tensors(network.whole, network.spec.name, **options) if keep_weights else None
    return load_run(save_run(out, content, result.history_table(), predictions, tensors))


def _scores(rows: pd.DataFrame, classes: tuple[str, ...]) -> dict:
    """Return the scores of one split's predictions; the interval draws patients where they are known."""
    y_true, y_score = rows["label"].to_numpy(), rows[[f"p_{name}" for name in classes]].to_numpy()
    patients = rows["patient"].to_numpy() if "patient" in rows and (rows["patient"] != "").any() else None
    value, low, high = metrics.score_interval(y_true, y_score, patients=patients)
    matrix = metrics.confusion(y_true, y_score.argmax(1), len(classes))  # per_class would rank the scores, too
    f1 = 2 * matrix.diagonal() / (matrix.sum(0) + matrix.sum(1)).clip(1)
    of_class = dict(zip(classes, f1.tolist(), strict=True))
    scores = {"macro_f1": value, "low": low, "high": high, "resampled": "slices" if patients is None else "patients"}
    return scores | {"accuracy": metrics.accuracy(y_true, y_score.argmax(1)), "per_class": of_class}


def run_plan(
    plan: Plan,
    settings: Settings,
    out: Path,
    *,
    resume: bool | str | None = False,
    say: Callable[[str], None] = print,
    keep_weights: bool = True,
    replace: bool = True,
    note: dict | None = None,
    team=None,
) -> Run:
    """Take the five steps, and write the run record; an older one there is replaced at the very end.

    Args:
        plan: what to do; settings: for all that the plan leaves open; out: folder of the record.
        resume: go on from the checkpoint of an interrupted run of the same plan, slices and weights; the checkpoint of
            another one is an error, or with "if_same" a reason to start again; None writes no checkpoint, which for a
            large network takes as long as an epoch.
        say: where the few lines for the user go.
        keep_weights, note: as for `record`; team: as for `fit`.
        replace: also a record of other slices.
    Returns:
        the record, as read back.
    Raises:
        CTError: as the five steps; a run of this name in progress; `out` inside the data set, or not to replace.
        KeyboardInterrupt: Ctrl-C before an epoch was finished.
    Source: notebook 03.
    """
    start, out = time.perf_counter(), Path(out).resolve()
    names = [out.name, *map(str, plan.to_json().values())]
    if odd := [name for name in names if data.ODD.search(name)]:  # a record could not hold it
        raise CTError(f"the name {ascii(odd[0])}", "names in UTF-8 without control characters", "rename it")
    check_replaceable(out)
    for name in (plan.data, plan.test_data or plan.data):
        own = {None: settings.data_dir, "default": settings.data_dir, "shortcut": data.shortcut_root(settings)}
        if out.is_relative_to(Path(own.get(name, name)).resolve()):
            raise CTError(f"the record '{out.name}' inside the data set", "a folder outside it", "choose another --out")
    with claim(out):
        folder = load(plan, settings)
        check_replaceable(out, None if replace else folder.fingerprint)
        for line in folder.notes:
            say(line)
        network = build(plan, settings, folder)
        if network.weights.note and plan.resolved(settings).weights == "random":  # else the log has said it
            say(network.weights.note)
        loaders = featurise(plan, settings, folder, network)
        about = [plan.resolved(settings).to_json(), folder.fingerprint, network.weights.sha256, network.precision]
        if about[0]["scheduler"] in ("step", "none"):  # such a run may go on for longer than it was planned
            about[0]["epochs"] = None
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        checkpoint = out.with_name(f".{out.name}.{digest}.checkpoint.pt")
        pattern = f".{glob.escape(out.name)}.{'?' * 8}.checkpoint.pt"
        others = [path for path in out.parent.glob(pattern) if path != checkpoint]
        if resume is True and others and not checkpoint.exists():
            raise CTError(
                f"a checkpoint of '{out.name}' from another plan, other slices or other weights",
                "the options of the interrupted run",
                "give the same options, or leave out --resume",
            )
        for path in others if resume else [checkpoint, *others]:
            path.unlink(missing_ok=True)
        saved = {"checkpoint": None if resume is None else checkpoint, "resume": bool(resume)}
        if team:
            team.tell(saved)
        result = fit(*(plan, settings, folder, network, loaders), **saved, team=team, say=say)
        if not result.history:
            raise KeyboardInterrupt  # in the first epoch: there is nothing to record
        options = {"seconds": time.perf_counter() - start, "keep_weights": keep_weights, "note": note}
        run = record(plan, settings, folder, network, loaders, result, out, **options)
        if result.diverged:
            say(f"{result.diverged} The weights of the best epoch before it are kept.")
        if result.interrupted:
            say("Stopped early: the best epoch so far is saved" + ("." if resume is None else "; --resume goes on."))
        else:
            checkpoint.unlink(missing_ok=True)
    return run
