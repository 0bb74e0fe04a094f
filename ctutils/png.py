"""The plainest PNG by kornia-rs, where it is installed (extra `fast`): Pillow's pixels in half the time."""

import functools
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from ctutils.pictures import MOST_PIXELS, SMALLEST, read_file

BEGIN = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
MODES = {b"\x08\0\0\0\0": ("L", "mono"), b"\x08\2\0\0\0": ("RGB", "rgb")}  # 8 bits, grey or RGB, not interlaced


@functools.cache
def _decoder():
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:
        return None
    return decode_image_png_u8


def read_grey_png(path: Path) -> Image.Image | None:
    """Decode a PNG of 8 bits, grey or RGB, to mode 'L'; None for any other file, which Pillow shall judge.

    Only a file that is whole, and of nothing but pixels, goes this way: a palette, transparency, a rotation, a second
    frame or an odd end are Pillow's, and so is whatever the decoder refuses.
    """
    if (decode := _decoder()) is None or path.suffix.lower() != ".png":
        return None
    try:
        content = read_file(path)
        width, height = struct.unpack(">II", content[16:24])
        if content[:16] != BEGIN or min(width, height) < SMALLEST or width * height > MOST_PIXELS:
            return None
        mode, name = MODES[content[24:29]]
        place, chunk = 33, b""
        while chunk != b"IEND":
            length, chunk = struct.unpack_from(">I4s", content, place)
            if chunk not in (b"IDAT", b"IEND", b"pHYs"):
                return None
            place += 12 + length
        if place != len(content):
            return None
        pixels = np.asarray(decode(content, (height, width), name))
    except Exception:  # whatever it is: Pillow names it
        return None
    return Image.fromarray(pixels.reshape(height, width) if mode == "L" else pixels).convert("L")
