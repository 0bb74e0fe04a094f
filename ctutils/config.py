"""Where things are and how big they are: profile, seed, device, weights, folders."""

import dataclasses
import hashlib
import os
from pathlib import Path

from ctutils.base import CTError


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
    own_data: bool = False  # True when CT_DATA or the command line names a folder

    def __str__(self) -> str:
        data = self.data_dir.name + (" (your own)" if self.own_data else " (synthetic)")
        return f"profile {self.profile.name} | device {self.device} | weights {self.weights} | data {data}"


def project_root() -> Path:
    """Return the project folder (the one with pyproject.toml beside this package), else the current folder."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() else Path.cwd()


def cache_dir() -> Path:
    """Return the folder for decoded slices and features, `data/cache`; it may be deleted at any time."""
    return project_root() / "data" / "cache"


def get_device(name: str = "") -> str:
    """Return `cuda`, `mps` or `cpu`: the one asked for, else CUDA where there is one, else the CPU.

    Raises:
        CTError: the device asked for is not known or not there.
    """
    import torch

    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if not name:
        return "cuda" if count["cuda"] else "cpu"
    kind, _, number = name.partition(":")
    if kind not in count or not (number or "0").isdecimal():
        raise CTError(f"device '{name}'", f"one of {', '.join(count)}", "set CT_DEVICE to one of these")
    if int(number or 0) >= count[kind]:
        raise CTError(f"device '{name}', which this machine does not have", "cpu", "unset CT_DEVICE")
    return name


def _folder(text: str) -> Path:
    """Read a folder's name: relative to the current folder, else to the project's (a notebook runs in notebooks/)."""
    path = Path(text).expanduser()
    inside = project_root() / path
    return inside if not path.exists() and inside.exists() else path


def get_settings(data: str | Path | None = None, device: str | None = None) -> Settings:
    """Read CT_PROFILE, CT_DEVICE, CT_WEIGHTS and CT_DATA, and fill in what they leave open.

    Without any of them: profile `full` when a CUDA GPU is there, else `standard`; weights `auto`; the
    synthetic data set of that profile under `data/`.

    Args:
        data: a data set folder, instead of CT_DATA.
        device: of another machine, which is not looked for here.
    Raises:
        CTError: a variable holds something unknown.
    """
    device = device or get_device(os.environ.get("CT_DEVICE", ""))
    name = os.environ.get("CT_PROFILE") or ("full" if device.startswith("cuda") else "standard")
    if name not in PROFILES:
        raise CTError(f"profile '{name}'", f"one of {', '.join(PROFILES)}", "set CT_PROFILE to one of these")
    weights = os.environ.get("CT_WEIGHTS") or "auto"
    if weights not in ("auto", "imagenet", "random"):
        weights = str(_folder(weights))
    inside, own = project_root() / "data", str(data or os.environ.get("CT_DATA", ""))
    data_dir, runs = inside / ("synthetic" if name == "standard" else f"synthetic_{name}"), name
    if own and _folder(own).resolve() == data_dir.resolve():
        own = ""  # the default folder, spelled out
    if own:
        data_dir = _folder(own)
        # Two folders of one name are two data sets: their records must not mix.
        place = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:6]
        runs = f"{name}-{data_dir.resolve().name}-{place}"
    folders = (data_dir, cache_dir(), inside / "runs" / runs)
    return Settings(PROFILES[name], device, weights, *folders, own_data=bool(own))
