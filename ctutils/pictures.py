"""One gate: a picture is read here, by one rule, for check, import, train and predict (DICOM: in `dicom`).

Whatever a decoder raises is that file's fault: it becomes a `BadFile` that says why; the caller knows the name.
"""

import contextlib
import io
import logging
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # others are not tried, whatever a file's name says
MODES = ("L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # more than 8 bits: see `own_depth`
SMALLEST = 16  # pixels; a picture smaller than this on a side is no CT slice
MOST_PIXELS = 4096 * 4096  # of one picture; the largest CT slices have 2048 x 2048
MOST_BYTES = 1 << 29  # of a file
LUNG_WINDOW = (-600, 1500)  # level, width in HU
AIR_HU = -1024.0  # the lowest value of the CT scale, outside the body; grey 55 in the lung window
HU, UNIT = "HU", "0-1"  # depths that are no number of bits
DEPTHS = (HU, UNIT, *map(str, range(8, 17)))

Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # PIL raises above twice this before it decodes; `open_picture` above this


class BadFile(ValueError):
    """Why one file cannot be read as a slice, in a few words without its name."""


@contextlib.contextmanager
def blamed() -> Iterator[None]:
    """Turn whatever a decoder raises into a `BadFile`; of what the system refuses, say its own words."""
    try:
        yield
    except BadFile:
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        if not isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)) or not why:
            why = f"{type(error).__name__} {why}".strip()
        raise BadFile("not a picture" if isinstance(error, Image.UnidentifiedImageError) else why[:250]) from error


def read_file(path: str | Path) -> bytes:
    """Return a file's bytes; raises `BadFile` where it cannot be read or is too large for slices."""
    with blamed():
        if (size := os.path.getsize(path)) > MOST_BYTES:
            raise BadFile(f"{size} bytes, more than {MOST_BYTES}")
        return Path(path).read_bytes()


# ---------------------------------------------------------------- what decoders say

_heard = threading.local()
_stderr = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings of decoders from being printed, in all threads: `heard` gives them file by file."""
    logs = [logging.getLogger(name) for name in ("pydicom", "PIL.TiffImagePlugin", "PIL.PngImagePlugin")]
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: _listen(str(message))
        for log in logs:
            log.addFilter(ear := lambda record: _listen(record.getMessage()))
            stack.callback(log.removeFilter, ear)
        yield


def _listen(text: str) -> None:
    _heard.words = [*getattr(_heard, "words", [])[-20:], " ".join(text.split())]


def heard() -> str:
    """Return what decoders have warned of in this thread since the last call, each sentence once."""
    words, _heard.words = getattr(_heard, "words", []), []
    return "; ".join(dict.fromkeys(words))


@contextlib.contextmanager
def _libtiff_heard() -> Iterator[None]:
    """Hear what libtiff prints past Python."""
    with _stderr, tempfile.TemporaryFile() as file:
        own = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            if text := file.read(2000).decode("utf-8", "replace").strip():
                _listen(text)


# ---------------------------------------------------------------- pictures


@contextlib.contextmanager
def open_picture(source: str | Path | io.IOBase, *, decode: bool = True) -> Iterator[Image.Image]:
    """Open one picture of a known format, mode and size.

    Args:
        decode: read the pixels too; else the header alone.
    Raises:
        BadFile: it is none, or too small or large; with `decode` also when its pixels cannot be read.
    """
    with contextlib.ExitStack() as stack:
        with blamed():
            image = stack.enter_context(Image.open(source, formats=FORMATS))
            if min(image.size) < SMALLEST or math.prod(image.size) > MOST_PIXELS:
                raise BadFile(f"{image.width} x {image.height} pixels")
            tags = getattr(image, "tag_v2", {})
            if image.mode not in (*MODES, *DEEP) or (tags.get(339) in (2, (2,)) and image.mode == "L"):
                raise BadFile(f"mode {image.mode}{', signed' if image.mode == 'L' else ''}, not grey or RGB")
            if tags.get(262) == 0 and image.mode in DEEP:  # Pillow inverts 8 bits only
                raise BadFile("low values are white")
            if decode:
                with _libtiff_heard() if image.tile and image.tile[0][0] == "libtiff" else contextlib.nullcontext():
                    image.load()
                with contextlib.suppress(Exception):  # a damaged EXIF says nothing
                    ImageOps.exif_transpose(image, in_place=True)
        yield image


def look(source: str | Path | io.IOBase) -> dict:
    """Return what a table of slices keeps of a picture: width, height, mode, frames, depth, and what decoders warn of.

    The depth is "" for 8 bits; only deeper pictures are decoded. It begins with "?" where it cannot be told.

    Raises:
        BadFile: as `open_picture`.
    """
    heard()
    with open_picture(source, decode=False) as image, blamed():
        facts = {"width": image.width, "height": image.height, "mode": image.mode, "depth": ""}
        facts["frames"] = int(getattr(image, "n_frames", 1))
        if image.mode in DEEP:
            image.seek(0)
            try:
                facts["depth"] = own_depth(np.asarray(image))
            except BadFile as error:
                facts["depth"] = f"?{error}"
    return {**facts, "warned": heard()}


def own_depth(values: np.ndarray) -> str:
    """Tell the depth of one picture of more than 8 bits by the bulk of its values: "8", "12", "16" bits, HU or UNIT.

    One voxel in a thousand may be brighter than the depth holds: metal, or a stray value.

    Raises:
        BadFile: values that are neither grey levels nor HU.
    """
    low, bottom, top, high = (float(v) for v in np.percentile(values, (0, 0.1, 99.9, 100), method="nearest"))
    found = f"values from {low:g} to {high:g}"
    if not math.isfinite(low + high):
        raise BadFile(f"{found}, which are no numbers")
    if low < 0:
        if -32768 <= low <= -200 and high <= 32767:
            return HU
        raise BadFile(f"{found}, neither grey levels nor HU")
    if values.dtype.kind == "f" and 0 < high <= 1:
        return UNIT
    bits = next((bits for bits in (8, 12, 16) if top < 1 << bits), 0)
    if not bits or 8 * (top - bottom) < 1 << bits:
        raise BadFile(f"{found}, which {bits or 16} bits would leave without contrast")
    return str(bits)


def say_depth(depth: str) -> str:
    """Say a depth in words."""
    return {HU: "HU, in a window", UNIT: "numbers from 0 to 1"}.get(depth, f"{depth} bits")


def to_grey(image: Image.Image, depth: str = "", window: tuple[float, float] = LUNG_WINDOW) -> Image.Image:
    """Turn an opened picture into 8-bit grey, mode 'L'.

    Colour becomes luminance (a CT slice has none), transparency is ignored; of more than 8 bits the upper 8 of the
    depth stay, HU are windowed, as DICOM is.

    Args:
        depth: of its data set, for more than 8 bits; "" for the picture's own.
        window: level and width, for HU.
    Raises:
        BadFile: the picture does not fit the depth, or has none of its own.
    """
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.float32)
        depth = depth or own_depth(values)
        low, top = np.percentile(values, (0, 99.9), method="nearest")
        most = {HU: 32767, UNIT: 1}.get(depth) or 2 ** int(depth) - 1
        if (low < 0) != (depth == HU) or not top <= most:
            raise BadFile(f"values from {low:g} to {values.max():g}, where {say_depth(depth)} are read")
        if depth == HU:
            return Image.fromarray(window_to_grey(np.maximum(values, AIR_HU), window))
        scale = 1 / 255 if depth == UNIT else 2 ** (int(depth) - 8)
        return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert("L")


def read_grey(
    source: str | Path | io.IOBase, depth: str = "", window: tuple[float, float] = LUNG_WINDOW
) -> Image.Image:
    """Decode one picture to 8-bit grey, mode 'L': `open_picture`, then `to_grey`.

    Raises:
        BadFile: it cannot be read as a slice.
    """
    with open_picture(source) as image, blamed():
        return to_grey(image, depth, window)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Resize a grey picture with antialias to uint8 (size, size); other shapes are squeezed."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def window_to_grey(hu: np.ndarray, window: tuple[float, float] = LUNG_WINDOW) -> np.ndarray:
    """Map HU to grey uint8: level - width/2 becomes 0, level + width/2 becomes 255, clipped."""
    level, width = window
    return np.rint(np.clip((hu - (level - width / 2)) / width, 0, 1) * 255).astype(np.uint8)
