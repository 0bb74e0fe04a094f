"""png: where kornia-rs is installed, plain PNG files are read by it, and every pixel is Pillow's."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import write_set
from PIL import Image

from ctutils import data, pictures, png

PLAIN, OTHERS = ("L", "RGB"), ("P", "RGBA", "LA", "I;16")


def saved(path: Path, mode: str, **options) -> Path:
    """Write noise in a mode."""
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    image = Image.fromarray(noise[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    image.save(path, "PNG", **options)
    return path


def test_without_the_decoder_pillow_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(png, "_decoder", lambda: None)
    assert png.read_grey_png(saved(tmp_path / "a.png", "L")) is None
    folder = data.load_folder(write_set(tmp_path / "set"), cache=tmp_path)
    path = folder.root / folder.slices["path"].iloc[0]
    assert folder.read_grey(0).tobytes() == pictures.read_grey(path).tobytes()


def test_pixels_are_those_of_pillow_or_nothing(tmp_path):
    pytest.importorskip("kornia_rs", reason="needs the extra `fast`")
    for mode in PLAIN:
        path = saved(tmp_path / f"{mode} 한글.PNG", mode, dpi=(72, 72))
        assert png.read_grey_png(path).tobytes() == pictures.read_grey(path).tobytes()
    left = [saved(tmp_path / f"{number}.png", mode) for number, mode in enumerate(OTHERS)]
    left += [saved(tmp_path / "trns.png", "RGB", transparency=(1, 2, 3)), saved(tmp_path / "other.bin", "L")]
    turned = Image.Exif()
    turned[274] = 6
    left += [saved(tmp_path / "turned.png", "RGB", exif=turned)]
    frames = [Image.new("L", (40, 40), grey) for grey in (1, 2)]
    frames[0].save(tmp_path / "two.png", save_all=True, append_images=frames[1:])
    whole = saved(tmp_path / "whole.png", "RGB").read_bytes()
    damaged = {"cut": whole[:-20], "tail": whole + b"\0", "bit": whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]}
    for name, content in {**damaged, "empty": b"", "text": b"no picture"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    left += [tmp_path / f"{name}.png" for name in ("two", *damaged, "empty", "text", "absent")]
    assert [path.name for path in left if png.read_grey_png(path) is not None] == []
    short = zlib.compress(bytes(100))
    header = whole[:33] + len(short).to_bytes(4, "big")
    idat = b"IDAT" + short
    (tmp_path / "few.png").write_bytes(header + idat + zlib.crc32(idat).to_bytes(4, "big") + whole[-12:])
    assert png.read_grey_png(tmp_path / "few.png") is None, "fewer pixels than the header says"
