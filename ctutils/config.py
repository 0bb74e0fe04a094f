"""Where things are and how big they are: profile, seed, device, weights, folders."""

import dataclasses
import os
from pathlib import Path

from ctutils.base import CTError

ENVIRONMENT = ("CT_DATA", "CT_PROFILE", "CT_WEIGHTS", "CT_DEVICE")


@dataclasses.dataclass(frozen=True)
class Profile:
    """The size of everything: slices of the default (synthetic) data set, epochs, picture size.

    `train`, `val` and `test` are numbers of synthetic slices; data of your own is used whole.
    """

    name: str
    train: int
    val: int
    test: int
    epochs: int = 10
    image_size: int = 224  # pixels a side at the network's input
    batch_size: int = 16


PROFILES = {
    "quick": Profile("quick", train=64, val=24, test=24),  # for tests
    "standard": Profile("standard", train=800, val=200, test=400),  # a student's laptop, minutes
    "full": Profile("full", train=8001, val=1000, test=1000),  # the deck's size, for a GPU
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a notebook needs to know about where it runs; see `get_settings`."""

    profile: Profile
    device: str
    weights: str
    data_dir: Path
    cache_dir: Path
    runs_dir: Path
    seed: int = 0
    own_data: bool = False  # True when CT_DATA names a folder

    def __str__(self) -> str:
        data = self.data_dir.name + (" (CT_DATA)" if self.own_data else " (synthetic)")
        return f"profile {self.profile.name} | device {self.device} | weights {self.weights} | data {data}"


def project_root() -> Path:
    """Return the project folder (the one with pyproject.toml beside this package), else the current folder."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() else Path.cwd()


def cache_dir() -> Path:
    """Return the folder for decoded slices and features, `data/cache`; it may be deleted at any time."""
    return project_root() / "data" / "cache"


def get_profile(name: str) -> Profile:
    """Return a profile by name.

    Raises:
        CTError: no such profile.
    """
    if name not in PROFILES:
        raise CTError(f"profile '{name}'", f"one of {', '.join(PROFILES)}", "set CT_PROFILE to one of these")
    return PROFILES[name]


def get_device(name: str = "") -> str:
    """Return `cuda`, `mps` or `cpu`: the one asked for, else CUDA where there is one, else the CPU.

    Raises:
        CTError: the device asked for is not known or not there.
    """
    import torch

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not name:
        return "cuda" if available["cuda"] else "cpu"
    kind, _, number = name.partition(":")
    if kind not in available or (number and not number.isdigit()):
        raise CTError(f"device '{name}'", f"one of {', '.join(available)}", "set CT_DEVICE to one of these")
    if not available[kind] or (kind == "cuda" and number and int(number) >= torch.cuda.device_count()):
        raise CTError(f"device '{name}', which this machine does not have", "cpu", "unset CT_DEVICE")
    return name


def _folder(text: str) -> Path:
    """Read a folder's name: relative to the current folder, else to the project's (a notebook runs in notebooks/)."""
    path = Path(text).expanduser()
    inside = project_root() / path
    return inside if not path.exists() and inside.exists() else path


def get_settings() -> Settings:
    """Read CT_PROFILE, CT_DEVICE, CT_WEIGHTS and CT_DATA, and fill in what they leave open.

    Without any of them: profile `full` when a CUDA GPU is there, else `standard`; weights `auto`; the
    synthetic data set of that profile under `data/`.

    Raises:
        CTError: a variable holds something unknown.
    """
    device = get_device(os.environ.get("CT_DEVICE", ""))
    profile = get_profile(os.environ.get("CT_PROFILE") or ("full" if device.startswith("cuda") else "standard"))
    data = project_root() / "data"
    own = os.environ.get("CT_DATA", "")
    data_dir = (
        _folder(own) if own else data / ("synthetic" if profile.name == "standard" else f"synthetic_{profile.name}")
    )
    weights = os.environ.get("CT_WEIGHTS") or "auto"
    if weights not in ("auto", "imagenet", "random"):
        weights = str(_folder(weights))
    return Settings(
        profile=profile,
        device=device,
        weights=weights,
        data_dir=data_dir,
        cache_dir=cache_dir(),
        # Records of other profiles and data stay apart, so that a quick test run never replaces a real one.
        runs_dir=data / "runs" / (f"{profile.name}-{data_dir.resolve().name}" if own else profile.name),
        own_data=bool(own),
    )
