"""The one gate: which files are read as slices, how, and what is said of the others."""

import io
import subprocess
import zlib

import numpy as np
import pytest
from helpers import user_error, write_set
from PIL import Image, ImageFile

from ctutils import config, pictures
from ctutils.data import build_store, load_folder
from ctutils.pictures import BadFile, own_depth, quiet, read_grey, window_to_grey

HU = np.add.outer(np.linspace(-1024, 0, 40), np.linspace(0, 300, 40)).round()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "project_root", lambda: tmp_path / "project")


def encoded(values, format: str = "PNG", mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(np.asarray(values))
    (image.convert(mode) if mode else image).save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has `side` x `side` pixels."""
    header = side.to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


GREY = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
# Names as those of pictures, contents of another kind: what is not asked for is not even tried.
BAD = {
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n", "not a picture"),
    "gif": (encoded(GREY, "GIF"), "not a picture"),
    "dds": (encoded(GREY, "DDS", "RGB"), "not a picture"),
    "empty": (b"", "not a picture"),
    "cut": (encoded(GREY)[:900], "truncated"),
    "flipped": (encoded(GREY)[:200] + b"\0\0\0\0" + encoded(GREY)[204:], "broken"),
    "small": (encoded(GREY[:15]), "40 x 15 pixels"),
    "bomb": (bomb(5000), "5000 x 5000 pixels"),
    "great bomb": (bomb(60000), "exceeds limit"),
    "one bit": (encoded(GREY, mode="1"), "mode 1"),
    "cmyk": (encoded(GREY, "JPEG", "CMYK"), "mode CMYK"),
    "signed 8 bits": (encoded(GREY, "TIFF", tiffinfo={339: 2}), "mode L, signed"),
    "white is 0": (encoded(GREY.astype(np.uint16) << 8, "TIFF", tiffinfo={262: 0}), "low values are white"),
    "no numbers": (encoded(np.where(GREY > 5, GREY, np.nan).astype(np.float32), "TIFF"), "no numbers"),
    "z scores": (
        encoded(((GREY - 128.0) / 60).astype(np.float32), "TIFF"),
        "from -2.1.* to 2.1.*, neither grey",
    ),
    "offset": (encoded((HU + 32768).astype(np.uint16)), "from 31744 to 33068, which 16 bits .* without contrast"),
    "32 bits": (encoded((HU + 1e6).astype(np.int32), "TIFF"), "without contrast"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_slice_is_refused_and_starts_no_other_program(monkeypatch, name):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"{args} was started"))
    content, why = BAD[name]
    with quiet(), pytest.raises(BadFile, match=why):
        read_grey(io.BytesIO(content))


@pytest.mark.parametrize("error", [NotImplementedError("FourCC"), RuntimeError("decoder"), MemoryError(), KeyError(3)])
def test_whatever_a_decoder_raises_is_that_files_fault(monkeypatch, tmp_path, error):
    """Every bad file is named at once, by fault: those whose header is bad, and those that only decoding finds."""
    root, real = write_set(tmp_path / "set"), ImageFile.ImageFile.load

    def load(image):
        if image.size == (50, 50):
            raise error
        return real(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for i in range(15):
        Image.new("L", (50, 50)).save(root / "val" / "ILD" / f"odd {i}.png")
        (root / "train" / "ILD" / f"text {i}.png").write_bytes(b"text")
    with user_error("30 unreadable file(s)", "text 0.png'", "odd 1.png'", "(not a picture)", str(error)) as caught:
        load_folder(root)
    files = caught.value.files
    assert len(files) == 30 and files["train/ILD/text 0.png"] == "not a picture"


def test_warnings_are_gathered_by_file_and_nothing_is_printed(tmp_path, capfd, recwarn):
    root = write_set(tmp_path / "set")
    png = encoded(GREY)
    (root / "val/ILD/odd.png").write_bytes(png[:33] + chunk(b"acTL", bytes(8)) + png[33:])
    lzw = encoded(GREY, "TIFF", compression="tiff_lzw")
    (root / "val/ILD/cut.tif").write_bytes(lzw[:300] + b"\xff" * 200 + lzw[500:])
    slices = load_folder(root, strict=False).slices.set_index("path")
    assert slices["warned"][slices["warned"] != ""].to_dict() == {
        "val/ILD/odd.png": "Invalid APNG, will use default PNG image if possible"
    }
    with user_error("cut.tif"):
        build_store(load_folder(root), 32)
    assert not recwarn.list and "LZW" not in "".join(capfd.readouterr())


# --- More than 8 bits ---


@pytest.mark.parametrize(
    ("values", "depth"),
    [
        ((HU + 1024).astype(np.uint16), "12"),
        ((HU + 1024).astype(np.uint16) * 40, "16"),
        (GREY.astype(np.uint16), "8"),
        ((GREY / 255).astype(np.float32), "0-1"),
        (HU.astype(np.float32), "HU"),
        (HU.astype(np.int16), "HU"),
    ],
)
def test_depth_is_that_of_the_data_set(tmp_path, values, depth):
    """One bright voxel makes no slice darker than its neighbours, and one slice of another kind is named."""
    root, spot = write_set(tmp_path / "set"), values.copy()
    for name in ("a", "b"):
        Image.fromarray(values).save(root / "train" / "ILD" / f"{name}.tif")
    if depth == "12":
        spot[0, 0] = 4096
    Image.fromarray(spot).save(root / "train" / "ILD" / "spot.tif")
    folder = load_folder(root)
    assert folder.depth == depth and any(pictures.say_depth(depth) in note for note in folder.notes)
    rows = [row for row, path in enumerate(folder.slices["path"]) if path.endswith(".tif")]
    first, *others = (np.asarray(folder.read_grey(row)).astype(int) for row in rows)
    assert all((abs(first - other) > 0).sum() <= 1 for other in others)
    assert first.std() > 15, "the contrast is lost"
    if depth == "HU":
        assert np.array_equal(first, window_to_grey(HU)) and folder.window["width"] == 1500
    Image.fromarray((HU + 1024).astype(np.uint16) * (1 if depth == "16" else 40)).save(root / "val" / "ILD" / "odd.png")
    with user_error("odd.png", f"where most are {pictures.say_depth(depth)}", "dataset.json"):
        load_folder(root)
    (root / "dataset.json").write_text('{"depth": 16}')
    if depth != "HU":  # the user's word counts
        again = load_folder(root)
        assert again.depth == "16" and again.fingerprint != folder.fingerprint


def test_own_depth_needs_one_voxel_in_a_thousand():
    values = np.zeros((100, 100), np.uint16)
    values[50:] = 4000
    values[0, :9] = 60000
    assert own_depth(values) == "12"
    values[0, :20] = 60000
    assert own_depth(values) == "16"


def test_quiet_leaves_warnings_of_others_as_they_were(recwarn):
    import warnings

    pictures.heard()
    with quiet():
        warnings.warn("of a decoder", stacklevel=1)
    assert pictures.heard() == "of a decoder" and pictures.heard() == ""
    warnings.warn("of another", stacklevel=1)
    assert [str(one.message) for one in recwarn.list] == ["of another"]
