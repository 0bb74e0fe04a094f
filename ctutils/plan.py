"""What one run does: the fields of `Plan` are the one list of options.

The command line's options, the check of a plan file and the run record are all made from `dataclasses.fields(Plan)`.
"""

import dataclasses
import os
from pathlib import Path

from ctutils.base import CTError
from ctutils.config import Settings
from ctutils.registry import BACKBONES

OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop")
SCHEDULERS = ("step", "cosine", "onecycle", "none")
UNFREEZE = ("none", "last", "all")
BATCHNORM = ("auto", "frozen", "adapt", "drift", "train")
BALANCES = ("none", "loss", "sampler")
PRECISIONS = ("auto", "float32", "bfloat16")
GEOMETRIC = ("rotate", "zoom", "shift", "flip")
AUGMENTATIONS = (*GEOMETRIC, "blur", "noise", "jitter", "randaugment")


def _option(default, text: str, kind: type, **limits):
    """A field with its help text, its type and its limits: choices, words, least, above, most."""
    return dataclasses.field(default=default, metadata={"help": text, "kind": kind, **limits})


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run: what to train, on what and how. None means: as the settings say.

    Raises:
        CTError: a value of another type or outside its limits, named by its key; a field that would do nothing
            beside the others.
    """

    backbone: str = _option("efficientnet_lite0", "the network", str, choices=tuple(BACKBONES))
    data: str | Path | None = _option(None, "data set folder (default: CT_DATA, else synthetic)", Path)
    test_data: str | Path | None = _option(None, "folder that gives the test split instead of the data's own", Path)
    epochs: int | None = _option(None, "default: the profile's, 10", int, least=1)
    weights: str | None = _option(None, "auto, imagenet, random or a folder of weight files (default: CT_WEIGHTS)", str)
    optimizer: str = _option("adam", "the optimizer", str, choices=OPTIMIZERS)
    lr: float | str | None = _option(
        None,
        "learning rate, or range: by an LR range test (default: 0.001; with layers that learn the backbone's own)",
        float,
        above=0,
        words=("range",),
    )
    scheduler: str | None = _option(
        None, "default: step, the deck's; with layers that learn onecycle", str, choices=SCHEDULERS
    )
    patience: int | None = _option(None, "stop after so many epochs without a better validation score", int, least=1)
    batch_size: int | None = _option(None, "default: the profile's, 16", int, least=1)
    at_once: int | None = _option(
        None, "slices of a network that learns in memory at a time; the batch size stays the same", int, least=1
    )
    # Below 64 pixels a side AlexNet's last pooling layer has nothing to pool.
    size: int | None = _option(None, "pixels a side at the network's input (default 224)", int, least=64, most=4096)
    bn: str = _option(
        "auto",
        "BatchNorm: frozen; adapt (statistics estimated anew on the training slices, then frozen); drift (the deck's "
        "model.train() with a frozen backbone); train (learns with --unfreeze); auto: train with --unfreeze, else "
        "adapt for random weights and frozen for real ones",
        str,
        choices=BATCHNORM,
    )
    standardise: bool = _option(
        True, "leave frozen features as they are (the deck's way), not scaled to mean 0, sd 1", bool
    )
    unfreeze: str = _option(
        "none",
        "what learns beside the new head",
        str,
        choices=UNFREEZE,
        flags={
            "--unfreeze": ("all", "train every layer"),
            "--unfreeze-last": ("last", "train the last block and the head"),
        },
    )
    discriminative: float = _option(
        1.0,
        "rate of the last block as a share of the head's; earlier layers get its square",
        float,
        above=0,
        most=1,
    )
    start_size: int | None = _option(
        None, "progressive resizing: pixels a side in the first half of the epochs", int, least=64, most=4096
    )
    label_smoothing: float = _option(0.0, "share of the target spread over all classes", float, least=0, most=0.9)
    ema: float = _option(
        0.0,
        "score a running average of the weights, which keeps this share of itself at every step",
        float,
        least=0,
        most=0.9999,
    )
    augment: tuple[str, ...] = _option((), "random changes, each picture anew in every epoch", tuple, of=AUGMENTATIONS)
    views: int = _option(
        0, "cache the features of so many changed copies instead, and of the slice as it is", int, least=0, most=1000
    )
    balance: str = _option("none", "rare classes: weights in the loss, or a sampler", str, choices=BALANCES)
    imbalance: float | None = _option(
        None, "make classes rarer, the last so many times; 1 makes all equal", float, least=1
    )
    precision: str = _option(
        "auto", "of the network on images; a head on features is always float32", str, choices=PRECISIONS
    )
    seed: int = _option(0, "of the new head, the order of slices and random weights", int, least=0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "unfreeze" and isinstance(value, bool):
                value = "all" if value else "none"
            if isinstance(value, list):  # from TOML and JSON
                value = tuple(value)
            if value is not None or field.default is not None:
                value = _checked(field.name, value, field.metadata)
            object.__setattr__(self, field.name, value)
        self._refuse_idle_fields()

    @property
    def cached(self) -> bool:
        """Whether the frozen part runs once and what learns sees its output: nothing before the cut changes."""
        changes = self.augment and not self.views
        return not (self.unfreeze == "all" or changes or self.bn == "drift")

    def _refuse_idle_fields(self) -> None:
        """Raise for a field that would do nothing: it is refused, not ignored."""
        frozen = self.unfreeze == "none"
        for idle, found, mend in (
            (self.views and not self.augment, "views without augment", "name changes in augment"),
            (self.views and self.unfreeze == "all", "views with all layers learning", "leave views out"),
            (self.views and self.bn == "drift", "views with bn 'drift'", "leave views out"),
            (frozen and self.discriminative != 1, "discriminative with a frozen backbone", "unfreeze it"),
            (frozen and self.bn == "train", "bn 'train' with a frozen backbone", "unfreeze it"),
            (not frozen and not self.standardise, "no standardise with layers that learn", "leave it out"),
            (self.cached and self.at_once, "at_once with cached features", "leave at_once out"),
            (self.cached and self.start_size, "start_size with cached features", "leave start_size out"),
        ):
            if idle:
                raise CTError(f"{found}, which would do nothing", "fields that act together", mend)

    def resolved(self, settings: Settings) -> "Plan":
        """Return the plan with the settings' values where it says None."""
        profile = settings.profile
        usual = {"epochs": profile.epochs, "batch_size": profile.batch_size, "size": profile.image_size}
        frozen = self.unfreeze == "none"
        usual |= {"weights": settings.weights, "scheduler": "step" if frozen else "onecycle"}
        usual["lr"] = 0.001 if frozen else BACKBONES[self.backbone].unfrozen_lr
        return dataclasses.replace(self, **{k: v for k, v in usual.items() if getattr(self, k) is None})

    def to_json(self) -> dict:
        """Return the fields for a run record, folders by their names only: a record names no machine's paths."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for key in ("data", "test_data", "weights"):
            if values[key] is not None:
                values[key] = os.path.basename(os.path.abspath(values[key])) or "root"  # "." has a name, too
        return values | {"augment": list(self.augment)}


def _checked(name: str, value, limits) -> object:
    """Return a value of the right type within its limits, or raise CTError that names the key."""
    kind = limits["kind"]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", Path: "a folder's name"}
    expected = f"of {', '.join(limits['of'])}" if kind is tuple else words[kind]
    if "choices" in limits:
        expected = f"one of {', '.join(limits['choices'])}"
    for key, text in (("least", "{} or more"), ("above", "above {}"), ("most", "at most {}")):
        if key in limits:
            expected += ", " + text.format(limits[key])
    if "words" in limits:
        expected += f", or {', '.join(limits['words'])}"
    if kind is tuple:
        good = isinstance(value, tuple) and all(isinstance(v, str) and v in limits["of"] for v in value)
    elif kind in (int, float):
        types = int if kind is int else (int, float)
        good = isinstance(value, types) and not isinstance(value, bool) and abs(value) < 1e12
        good = good and value >= limits.get("least", value) and value <= limits.get("most", value)
        good = good and ("above" not in limits or value > limits["above"])
        good = good or (isinstance(value, str) and value in limits.get("words", ()))
    else:
        good = isinstance(value, (str, Path) if kind is Path else kind) and value != ""
        good = good and ("choices" not in limits or value in limits["choices"])
    if not good:
        raise CTError(f"{name} = {value!r}", expected, f"correct {name}")
    return float(value) if kind is float and not isinstance(value, str) else value
