"""Imports: miniature AI Hub deliveries, DICOM slices written here, image folders, and bad input."""

import contextlib
import csv
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from ctutils import importers
from ctutils.base import CTError, atomic_path
from ctutils.importers import AIHUB_CLASSES, dicom_to_uint8, import_dataset, window_to_grey

REAL = Path(__file__).resolve().parents[2] / "shared" / "real-ct"
PER_CLASS = {"Training": 3, "Validation": 2}


def png(value: int) -> bytes:
    """A noisy picture, different for each value."""
    file = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def delivery() -> dict[str, dict[str, tuple[bytes, str]]]:
    """A miniature of data set 71597: {"Training": {file name: (PNG, class)}, "Validation": ...}."""
    content, number = {}, 0
    for folder, count in PER_CLASS.items():
        content[folder] = {}
        for label in AIHUB_CLASSES:
            for i in range(count):
                number += 1
                content[folder][f"ChestCT_{label}_{i:08d}.png"] = (png(number), label)
    return content


def label_json(name: str, label: str) -> bytes:
    content = {"filepath": "흉부/CT", "filename": name, "label": label, "labels": list(AIHUB_CLASSES)}
    return json.dumps(content, ensure_ascii=False).encode()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def split_parts(name: str, content: bytes, size: int) -> dict[str, bytes]:
    """Cut a zip as AI Hub does: the part's number is its byte offset."""
    return {f"{name}.part{start}": content[start : start + size] for start in range(0, len(content), size)}


def aihub_archives(src: Path) -> None:
    """As delivered: tars, in them zips in parts, Korean folder names, a BOM and a cp949 label."""
    for folder, pictures in delivery().items():
        letter = folder[0]
        images = zip_bytes({f"{label}/{name}": data for name, (data, label) in pictures.items()})
        labels = {f"{Path(name).stem}.json": label_json(name, label) for name, (_, label) in pictures.items()}
        first, second = list(labels)[:2]
        labels[first] = b"\xef\xbb\xbf" + labels[first]
        labels[second] = labels[second].decode().encode("cp949")
        part_size = len(images) // 11 + 1  # eleven parts: in name order part10.. stands before part2..
        write_tar(src / folder / "01.원천데이터" / "원천.tar", split_parts(f"{letter}S.zip", images, part_size))
        write_tar(src / folder / "02.라벨링데이터" / "라벨.tar", {f"{letter}L.zip": zip_bytes(labels)})


def aihub_flat(src: Path, in_classes: bool) -> None:
    for folder, pictures in delivery().items():
        for name, (data, label) in pictures.items():
            image = src / folder / "image" / (label if in_classes else "") / name
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(data)
            note = src / folder / "label" / f"{Path(name).stem}.json"
            note.parent.mkdir(exist_ok=True)
            note.write_bytes(label_json(name, label))


def aihub_zips_on_disk(src: Path) -> None:
    """Parts and zips without tars; split known from the archive names only."""
    src.mkdir()
    for folder, pictures in delivery().items():
        images = zip_bytes({f"{label}/{name}": data for name, (data, label) in pictures.items()})
        for name, data in split_parts(f"{folder[0]}S_영상.zip", images, 900).items():
            (src / name).write_bytes(data)
        labels = {f"{name}.json": label_json(name, label) for name, (_, label) in pictures.items()}
        (src / f"{folder[0]}L_영상.zip").write_bytes(zip_bytes(labels))


def check_aihub(out: Path, summary: dict) -> None:
    for folder, pictures in delivery().items():
        split = {"Training": "train", "Validation": "val"}[folder]
        assert summary["counts"][split] == {label: PER_CLASS[folder] for label in AIHUB_CLASSES}
        for name, (data, label) in pictures.items():
            assert (out / split / label / name).read_bytes() == data
    assert sum(path.is_file() for path in out.rglob("*")) == summary["images"] + 1 == 26
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert meta["counts"] == summary["counts"] and meta["complete"] is True
    assert (meta["name"], meta["kind"], meta["format"]) == ("AI Hub 71597", "real", "aihub")


@pytest.mark.parametrize(
    "build",
    [aihub_archives, lambda s: aihub_flat(s, True), lambda s: aihub_flat(s, False), aihub_zips_on_disk],
    ids=["tars", "flat-classes", "flat", "zips"],
)
def test_aihub_layouts_give_the_folder_layout(tmp_path, build):
    src, out = tmp_path / "흉부 CT 71597", tmp_path / "out"
    build(src)
    summary = import_dataset(src, out)
    assert summary["format"] == "aihub" and summary["skipped"] == []
    check_aihub(out, summary)


def test_one_tar_as_source(tmp_path):
    files = {f"71597/1.Training/{name}": data for name, (data, _) in delivery()["Training"].items()}
    for name, (_, label) in delivery()["Training"].items():
        files[f"71597/1.Training/{name}.json"] = label_json(name, label)
    write_tar(tmp_path / "download.tar", files)
    assert import_dataset(tmp_path / "download.tar", tmp_path / "out")["images"] == 15


def test_korean_names_in_a_windows_zip(tmp_path):
    """Windows zips store names as cp949 without saying so."""
    name, raw = "정상_1.png", "정상_1.png".encode("cp949")
    content = zip_bytes({"Training/" + "x" * len(raw): png(1), "Training/a.json": label_json(name, "Normal")})
    src = tmp_path / "src"
    src.mkdir()
    (src / "a.zip").write_bytes(content.replace(b"x" * len(raw), raw))
    import_dataset(src, tmp_path / "out")
    assert (tmp_path / "out" / "train" / "Normal" / name).read_bytes() == png(1)


def test_labels_are_spelled_as_in_the_deck(tmp_path):
    aihub_flat(tmp_path / "src", False)
    for path in (tmp_path / "src").rglob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace('"label": "ILD"', '"label": "ild"'), "utf-8")
    assert list(import_dataset(tmp_path / "src", tmp_path / "out")["counts"]["train"]) == list(AIHUB_CLASSES)


def test_missing_labels_and_images_are_reported(tmp_path):
    src = tmp_path / "src"
    aihub_flat(src, False)
    (src / "Training" / "label" / "ChestCT_ILD_00000000.json").unlink()
    (src / "Training" / "image" / "ChestCT_Normal_00000001.png").unlink()
    (src / "Validation" / "label" / "ChestCT_ILD_00000001.json").write_text("{broken")
    summary = import_dataset(src, tmp_path / "out")
    assert summary["images"] == 22
    assert {Path(row["path"]).name: row["reason"] for row in summary["skipped"]} == {
        "ChestCT_ILD_00000000.png": "image without a label",
        "ChestCT_Normal_00000001.json": "label without an image",
        "ChestCT_ILD_00000001.json": "not a label: no JSON with 'filename' and 'label'",
        "ChestCT_ILD_00000001.png": "image without a label",
    }
    assert "2 file(s) left out: image without a label" in summary["notes"]


def test_a_stopped_import_goes_on(tmp_path, monkeypatch):
    src, out = tmp_path / "src", tmp_path / "out"
    aihub_archives(src)
    calls = []

    def stop_after_nine(path):
        calls.append(path)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return atomic_path(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importers.base, "atomic_path", stop_after_nine)
        import_dataset(src, out)
    first, second, third = sorted(path for path in out.rglob("*.png"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])  # a file cut short has the wrong size
    (out / "train" / "ILD" / ".tmp-left.png").write_bytes(b"x")  # what kill -9 leaves
    before = third.stat().st_mtime_ns
    summary = import_dataset(src, out)
    assert third.stat().st_mtime_ns == before
    assert summary["already_there"] + summary["written"] == 25 and summary["written"] < 25 - 5
    check_aihub(out, summary)
    assert import_dataset(src, out)["written"] == 0


def test_a_partial_import_says_so(tmp_path, monkeypatch):
    aihub_flat(tmp_path / "src", False)

    def damaged(self):
        raise CTError("damage", "none", "none")

    reads = iter([True] * 2)
    read = importers.Entry.read
    monkeypatch.setattr(
        importers.Entry,
        "read",
        lambda self: read(self) if self.path.endswith("json") or next(reads, False) else damaged(self),
    )
    with pytest.raises(CTError, match="damage"):
        import_dataset(tmp_path / "src", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["complete"] is False


def test_a_file_that_vanishes_is_noticed(tmp_path, monkeypatch):
    """The count on disk is held against the plan after the copy."""
    aihub_flat(tmp_path / "src", False)

    @contextlib.contextmanager
    def lose_one(path):
        with atomic_path(path) as temporary:
            yield temporary
        if path.name == "ChestCT_ILD_00000001.png":
            path.unlink()

    monkeypatch.setattr(importers.base, "atomic_path", lose_one)
    with pytest.raises(CTError, match="23 files in .*ILD_00000001.png' missing.*exactly the 25 files"):
        import_dataset(tmp_path / "src", tmp_path / "out")


def test_what_a_mac_adds_is_ignored(tmp_path):
    """macOS writes `._name` beside each file of a tar, and hidden files on disk."""
    src = tmp_path / "src"
    label = label_json("a.png", "ILD")
    write_tar(src / "Training" / "a.tar", {"a.png": png(1), "._a.png": b"mac", "a.json": label})
    (src / ".hidden").mkdir()
    (src / ".hidden" / "b.png").write_bytes(png(2))
    summary = import_dataset(src, tmp_path / "out")
    assert summary["images"] == 1 and summary["skipped"] == []


def test_a_file_cut_short_while_reading():
    with pytest.raises(CTError, match="'a.png' cut short.*5 bytes"):
        importers.Entry("a.png", 5, lambda: io.BytesIO(b"abc")).read()


# ---------------------------------------------------------------- bad input


def no_images(src, out):
    (src / "train" / "a").mkdir(parents=True)
    (src / "train" / "a" / "readme.txt").write_text("x")


def empty_delivery(src, out):
    (src / "Training" / "01.원천데이터").mkdir(parents=True)
    write_tar(src / "Training" / "01.원천데이터" / "a.tar", {})


def two_labels(src, out):
    aihub_flat(src, False)
    (src / "Training" / "label" / "again.json").write_bytes(label_json("ChestCT_ILD_00000001.png", "Normal"))


def unknown_label(src, out):
    aihub_flat(src, False)
    name = "ChestCT_ILD_00000001"
    (src / "Training" / "label" / f"{name}.json").write_bytes(label_json(f"{name}.png", "covid"))


def two_pictures(src, out):
    aihub_flat(src, False)
    extra = src / "Training" / "image" / "more" / "ChestCT_ILD_00000001.png"
    extra.parent.mkdir()
    extra.write_bytes(png(99) + b"more")


def outside_splits(src, out):
    aihub_flat(src, False)
    (src / "Training").rename(src / "Other")


def out_with_other_files(src, out):
    aihub_flat(src, False)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")


def stranger_in_out(src, out):
    aihub_flat(src, False)
    import_dataset(src, out)
    (out / "train" / "ILD" / "stranger.png").write_bytes(png(1))


def corrupt_tar(src, out):
    aihub_archives(src)
    path = next(src.rglob("원천.tar"))
    path.write_bytes(path.read_bytes()[:700])


def corrupt_tar_header(src, out):
    """tarfile takes a damaged second header for the end and would lose the rest without a word."""
    aihub_archives(src)
    path = next(src.rglob("원천.tar"))
    with tarfile.open(path) as tar:
        start = tar.getmembers()[1].offset
    content = bytearray(path.read_bytes())
    content[start + 5] ^= 1
    path.write_bytes(content)


def corrupt_zip(src, out):
    aihub_zips_on_disk(src)
    (src / "TL_영상.zip").write_bytes(b"PK no zip")


def corrupt_zip_entry(src, out):
    aihub_archives(src)
    path = next(src.rglob("라벨.tar"))
    content = bytearray(path.read_bytes())
    content[512 + 80] ^= 0xFF  # inside the first label's deflated bytes
    path.write_bytes(content)


def drop_part(which):
    def build(src, out):
        aihub_zips_on_disk(src)
        parts = sorted(src.glob("TS_*.part*"), key=lambda path: int(path.name.split("part")[1]))
        parts[which].unlink()

    return build


def counted_parts_with_a_gap(src, out):
    aihub_zips_on_disk(src)
    parts = sorted(src.glob("TS_*.part*"), key=lambda path: int(path.name.split("part")[1]))
    for number, path in enumerate(parts):
        path.rename(path.with_name(f"TS_영상.zip.part{number}"))
    (src / "TS_영상.zip.part2").unlink()


def evil_zip(name):
    def build(src, out):
        src.mkdir()
        (src / "TS.zip").write_bytes(zip_bytes({name: png(1)}))

    return build


def evil_tar(src, out):
    write_tar(src / "Training" / "a.tar", {"../../evil.png": png(1)})


def flat_pictures(src, out):
    src.mkdir()
    (src / "a.png").write_bytes(png(1))


def folder_with(*paths):
    def build(src, out):
        for number, path in enumerate(paths):
            (src / path).parent.mkdir(parents=True, exist_ok=True)
            (src / path).write_bytes(png(number))

    return build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda src, out: None, "no file or folder"),
        (no_images, "no images in"),
        (empty_delivery, "no images to import"),
        (two_labels, "two labels for 'ChestCT_ILD_00000001.png': 'ILD' in .*'Normal' in .*again.json"),
        (unknown_label, "label 'covid' in .*Expected one of ILD"),
        (two_pictures, "two different pictures 'ChestCT_ILD_00000001.png'"),
        (outside_splits, "outside Training and Validation"),
        (out_with_other_files, "with other files"),
        (stranger_in_out, "such as 'train/ILD/stranger.png'"),
        (corrupt_tar, "a damaged archive or file 'Training/01.원천데이터/원천.tar'"),
        (corrupt_tar_header, "a damaged archive or file 'Training/01.원천데이터/원천.tar' .damaged at byte"),
        (corrupt_zip, "a damaged archive or file 'TL_영상.zip'"),
        (corrupt_zip_entry, "a damaged archive or file 'Training/02.라벨링데이터/라벨.tar/TL.zip/ChestCT"),
        (drop_part(0), "no part 'TS_영상.zip.part0'"),
        (drop_part(1), "no part 'TS_영상.zip.part900'"),
        (
            drop_part(-1),
            r"a damaged archive or file 'TS_영상.zip' .*check that 'TS_영상.zip.part\d+' .*are there",
        ),
        (counted_parts_with_a_gap, "no part 'TS_영상.zip.part2'"),
        (evil_zip("../../evil.png"), "points outside"),
        (evil_zip("/tmp/evil.png"), "points outside"),
        (evil_zip("C:/evil.png"), "points outside"),
        (evil_zip("..\\evil.png"), "points outside"),
        (evil_tar, "points outside"),
        (flat_pictures, "pictures without class folders"),
        (folder_with("train/a/1.png", "val/b/1.png", "valid/b/2.png"), "2 folders for the split 'val'"),
        (
            folder_with("train/Normal/1.png", "val/normal/1.png"),
            "'Normal' and 'normal', which differ only by case",
        ),
        (folder_with("train/a/x/1.png", "train/a/y/1.png"), "two pictures for 'train/a/1.png'"),
        (folder_with("a/1.png", "a/2.png", "a/3.png", "b/1.png"), "1 different picture.* of class 'b'"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, build, message):
    src, out = tmp_path / "src", tmp_path / "deep" / "er" / "out"
    out.parent.mkdir(parents=True)
    build(src, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CTError, match=message):
        import_dataset(src, out)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in after if not path.is_relative_to(out)} == {p for p in before if not p.is_relative_to(out)}
    assert all(after[path] == content for path, content in before.items())  # nothing lost, nothing outside `out`


@pytest.mark.parametrize("out", [".", "sub/out"])
def test_out_inside_the_source_is_refused(tmp_path, out):
    aihub_flat(tmp_path, False)
    with pytest.raises(CTError, match="inside the source"):
        import_dataset(tmp_path, tmp_path / out)
    assert not (tmp_path / "sub").exists()


def test_unknown_format(tmp_path):
    with pytest.raises(CTError, match="format 'nifti'.*aihub, dicom, folder"):
        import_dataset(tmp_path, tmp_path.parent / "out", format="nifti")


# ---------------------------------------------------------------- image folders


def test_folder_with_other_split_names(tmp_path):
    src, out = tmp_path / "내 자료", tmp_path / "out"
    folder_with(
        "Data/Train/ILD/가 1.PNG", "Data/Train/Normal/1.jpg", "Data/valid/ILD/1.png",
        "Data/Test/Normal/p1/1.png", "Data/more/x.png",
    )(src, out)  # fmt: skip
    summary = import_dataset(src, out)
    assert summary["format"] == "folder" and summary["name"] == "내 자료"
    assert summary["counts"] == {"train": {"ILD": 1, "Normal": 1}, "val": {"ILD": 1}, "test": {"Normal": 1}}
    assert (out / "train" / "ILD" / "가 1.PNG").read_bytes() == png(0)
    assert [row["reason"] for row in summary["skipped"]] == ["outside the split folders"]


def test_unsplit_folder_is_split_stratified_and_copies_stay_together(tmp_path):
    src = tmp_path / "src"
    folder_with(*[f"a/{i}.png" for i in range(20)], *[f"b/{i}.png" for i in range(40)])(src, None)
    for i in range(5):  # exact copies of five pictures
        (src / "a" / f"copy {i}.png").write_bytes((src / "a" / f"{i}.png").read_bytes())
    summary = import_dataset(src, tmp_path / "out")
    assert summary["counts"]["val"]["b"] == summary["counts"]["test"]["b"] == 6
    assert summary["counts"]["train"]["b"] == 28
    assert sum(by_class["a"] for by_class in summary["counts"].values()) == 25
    splits: dict[str, set[str]] = {}
    for path in (tmp_path / "out").rglob("*.png"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        splits.setdefault(digest, set()).add(path.relative_to(tmp_path / "out").parts[0])
    assert {len(found) for found in splits.values()} == {1}
    assert "70/15/15" in summary["notes"][0] and "seed 0" in summary["notes"][0]
    again = import_dataset(src, tmp_path / "again")
    assert sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.png")) == sorted(
        p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.png")
    )
    assert again["counts"] == summary["counts"]


def test_flattened_aihub_without_labels_is_an_image_folder(tmp_path):
    folder_with("Training/image/ILD/1.png", "Validation/image/ILD/2.png")(tmp_path / "src", None)
    summary = import_dataset(tmp_path / "src", tmp_path / "out")
    assert summary["format"] == "folder" and summary["counts"] == {"train": {"ILD": 1}, "val": {"ILD": 1}}


def test_another_source_does_not_mix_in(tmp_path):
    folder_with("train/a/1.png", "val/a/1.png")(tmp_path / "one", None)
    folder_with("train/a/7.png", "val/a/7.png")(tmp_path / "two", None)
    import_dataset(tmp_path / "one", tmp_path / "out")
    with pytest.raises(CTError, match="other files, such as 'train/a/1.png'"):
        import_dataset(tmp_path / "two", tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "a" / "7.png").exists()


def test_file_names_in_the_korean_code_page(tmp_path):
    """Unpacking a Windows zip on Linux leaves names that are no UTF-8."""
    src = tmp_path / "src"
    folder_with("train/a/1.png")(src, None)
    try:
        os.rename(os.fsencode(src / "train" / "a"), os.fsencode(src / "train") + b"/" + "정상".encode("cp949"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    summary = import_dataset(src, tmp_path / "out")
    assert summary["counts"] == {"train": {"정상": 1}}
    assert (tmp_path / "out" / "train" / "정상" / "1.png").is_file()


def test_a_synthetic_set_stays_synthetic(tmp_path):
    folder_with("train/a/1.png", "val/a/1.png")(tmp_path / "src", None)
    (tmp_path / "src" / "dataset.json").write_text('{"name": "phantom", "kind": "synthetic", "counts": 1}')
    import_dataset(tmp_path / "src", tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (meta["name"], meta["kind"]) == ("phantom", "synthetic") and meta["counts"]["train"] == {"a": 1}


# ---------------------------------------------------------------- DICOM


def dicom(path: Path | None, hu, *, patient="P-77", slope=1, intercept=-1024, signed=False, **tags):
    """A CT slice with the given HU (H, W) or (frames, H, W), written to `path` if given."""
    stored = np.rint((np.asarray(hu, float) - intercept) / slope).astype(np.int16 if signed else np.uint16)
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.Modality, ds.PatientID, ds.PatientName = "CT", patient, "Hong^Gildong"
    ds.Rows, ds.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, int(signed)
    ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
    ds.PixelData = stored.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
    return ds


def body(seed: int = 0, size: int = 64) -> np.ndarray:
    """HU of an air square with a body in it."""
    hu = np.full((size, size), -1000.0)
    hu[size // 4 : -size // 4, size // 4 : -size // 4] = 40 + seed
    return hu


def test_window_formula():
    hu = np.array([-3000.0, -1350, -1024, -600, 150, 3000])
    np.testing.assert_array_equal(window_to_grey(hu), [0, 0, 55, 128, 255, 255])
    np.testing.assert_array_equal(window_to_grey(np.array([-160.0, 40, 240]), (40, 400)), [0, 128, 255])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2, -2000), (0.5, -1024)])
def test_rescale_to_hu(tmp_path, slope, intercept, signed):
    hu = np.array([[-1024.0, -600], [0, 150]])
    dicom(tmp_path / "a.dcm", hu, slope=slope, intercept=intercept, signed=signed)
    grey = dicom_to_uint8(tmp_path / "a.dcm")
    assert grey.dtype == np.uint8 and grey.shape == (1, 2, 2)
    np.testing.assert_array_equal(grey[0], window_to_grey(hu))


def test_dataset_and_other_window():
    np.testing.assert_array_equal(dicom_to_uint8(dicom(None, [[-160, 240]]), (40, 400))[0], [[0, 255]])


def test_below_the_ct_scale_is_air():
    assert dicom_to_uint8(dicom(None, [[-2048, -1024]], signed=True)).tolist() == [[[55, 55]]]


def test_monochrome1_is_inverted():
    grey = dicom_to_uint8(dicom(None, body(), PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(grey[0], 255 - window_to_grey(body()))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_air(photometric):
    hu = np.array([[976.0, 977, 500]])  # stored 2000, 2001, 1524
    ds = dicom(None, hu, PhotometricInterpretation=photometric, PixelPaddingValue=2000)
    assert dicom_to_uint8(ds)[0, 0, 0] == 55 and dicom_to_uint8(ds)[0, 0, 1] != 55
    ds.PixelPaddingRangeLimit = 2001
    assert dicom_to_uint8(ds)[0, 0, :2].tolist() == [55, 55] and dicom_to_uint8(ds)[0, 0, 2] != 55


def test_signed_padding_stored_as_unsigned():
    """63536 is how some scanners write -2000; with slope -1 it would be bright, not air."""
    ds = dicom(None, [[2000.0, 0]], slope=-1, intercept=0, signed=True, PixelPaddingValue=63536)
    assert dicom_to_uint8(ds)[0, 0].tolist() == [55, 230]


def test_enhanced_ct_keeps_the_rescale_in_functional_groups():
    ds = dicom(None, np.full((2, 4, 4), 0.0), intercept=0)
    del ds.RescaleSlope, ds.RescaleIntercept
    groups = []
    for intercept in (-1024, -600):
        transformation, group = pydicom.Dataset(), pydicom.Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = 1, intercept
        group.PixelValueTransformationSequence = [transformation]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    assert dicom_to_uint8(ds)[:, 0, 0].tolist() == [55, 128]


def test_undecodable_syntax_and_bad_window_are_clear_errors():
    ds = dicom(None, body())
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    with pytest.raises(CTError, match="JPEG-LS.*pylibjpeg"):
        dicom_to_uint8(ds)
    with pytest.raises(CTError, match="window"):
        dicom_to_uint8(dicom(None, body()), (-600, 0))
    with pytest.raises(CTError, match="RGB"):
        dicom_to_uint8(dicom(None, body(), PhotometricInterpretation="RGB"))


@pytest.mark.filterwarnings("ignore:Expected implicit VR")  # from the text file
def test_dicom_class_folders_with_splits(tmp_path):
    src, out = tmp_path / "src", tmp_path / "CT set"
    dicom(src / "Training" / "ILD" / "a.dcm", body(1), patient="P-77")
    dicom(src / "Training" / "ILD" / "series2" / "a.dcm", body(2), patient="P-77")  # the same name again
    dicom(src / "Training" / "Normal" / "IM000001", body(3), patient="P-78")  # no extension
    dicom(src / "valid" / "ILD" / "many.dcm", np.stack([body(4), body(5)]), patient="P-79")
    dicom(src / "valid" / "Normal" / "scan_P77_Gildong.dcm", body(6), patient="P-77")
    dicom(src / "valid" / "Normal" / "scout.dcm", body(7), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom(src / "valid" / "Normal" / "mr.dcm", body(9), Modality="MR")
    (src / "valid" / "Normal" / "text.dcm").write_text("no DICOM")
    bad = dicom(src / "valid" / "Normal" / "cut.dcm", body(8))
    bad.PixelData = bad.PixelData[:100]
    bad.save_as(src / "valid" / "Normal" / "cut.dcm", enforce_file_format=True)
    summary = import_dataset(src, out)
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert names[:5] == [
        "train/ILD/a.png", "train/ILD/a_00001.png", "train/Normal/IM000001.png", "val/ILD/many_f001.png",
        "val/ILD/many_f002.png",
    ]  # fmt: skip
    assert len(names) == 6 and names[5].startswith("val/Normal/slice_")  # its own name gave the patient away
    picture = Image.open(out / "val" / "ILD" / "many_f002.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), window_to_grey(body(5)))
    reasons = {Path(row["path"]).name: row["reason"] for row in summary["skipped"]}
    assert (
        sorted(reasons) == ["cut.dcm", "mr.dcm", "scout.dcm", "text.dcm"] and "cannot be decoded" in reasons["cut.dcm"]
    )
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert meta["window"] == {"level": -600, "width": 1500, "unit": "HU"}
    assert meta["name"] == "CT set" and meta["skipped"] == 4
    assert "1 patient(s) have slices in several splits" in summary["notes"][0]


def test_patients_are_only_hashes(tmp_path):
    src = tmp_path / "src"
    for i in range(4):
        dicom(src / f"{i}.dcm", body(i), patient=["KIM-1", "KIM-1", "LEE-2", ""][i])
    tables = []
    for out, salt in (("a", None), ("b", None), ("c", "pepper"), ("d", "pepper")):
        import_dataset(src, tmp_path / out, salt=salt)
        with (tmp_path / out / "patients.csv").open(encoding="utf-8", newline="") as file:
            tables.append([row["patient"] for row in csv.DictReader(file)])
        everything = b"".join(path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file())
        assert not any(secret in everything for secret in (b"KIM", b"LEE", b"Gildong", b"pepper"))
    for table in tables:
        assert table[0] == table[1] != table[2] and table[3] == ""
    assert tables[0] != tables[1] and tables[2] == tables[3]  # a salt of its own for each import


def test_flat_dicom_is_unlabelled_and_goes_on(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    for i in range(3):
        dicom(src / f"{i}.dcm", body(i))
    summary = import_dataset(src, out)
    assert summary["counts"] == {"train": {"unlabelled": 3}} and "'unlabelled'" in summary["notes"][0]
    (out / "train" / "unlabelled" / "1.png").unlink()
    assert import_dataset(src, out)["written"] == 1
    with pytest.raises(CTError, match="other files"):  # another window would mix two looks
        import_dataset(src, out, window=(40, 400))


def test_labels_csv(tmp_path):
    src = tmp_path / "src"
    for i in range(4):
        dicom(src / "scans" / f"{i}.dcm", body(i))
    rows = "path,class,split\nscans/0.dcm,ILD,Training\nscans/1.dcm,정상,Training\nscans/2.dcm,ILD,valid\n"
    (src / "labels.csv").write_text(rows, encoding="utf-8-sig")
    summary = import_dataset(src, tmp_path / "out")
    assert summary["counts"] == {"train": {"ILD": 1, "정상": 1}, "val": {"ILD": 1}}
    assert [row["reason"] for row in summary["skipped"]] == ["not in labels.csv"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("file,label\n0.dcm,ILD\n", "path 'None' in labels.csv"),
        ("path,class\nnone.dcm,ILD\n", "path 'none.dcm'"),
        ("path,class\n../secret.dcm,ILD\n", "path '../secret.dcm'"),
        ("path,class\n0.dcm,../x\n", "the name '../x'"),
        ("path,class\n0.dcm,\n", "the name ''"),
        ("path,class,split\n0.dcm,ILD,exam\n", "split 'exam'"),
        ("path,class\n0.dcm,ILD\n0.dcm,Normal\n", "two labels for '0.dcm'"),
        ("path,class,split\n0.dcm,ILD,train\n1.dcm,ILD,\n", "with and without a split"),
    ],
)
def test_bad_labels_csv(tmp_path, rows, message):
    src = tmp_path / "src"
    dicom(tmp_path / "secret.dcm", body())
    for i in range(2):
        dicom(src / f"{i}.dcm", body(i))
    (src / "labels.csv").write_text(rows, encoding="utf-8")
    with pytest.raises(CTError, match=message):
        import_dataset(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsplit_dicom_is_split_by_patient(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    for label in "AB":
        for patient in range(6):
            for i in range(3):
                dicom(src / label / f"{patient}-{i}.dcm", body(i, 16), patient=f"{label}{patient}")
    summary = import_dataset(src, out)
    assert summary["counts"] == {
        "train": {"A": 12, "B": 12},
        "val": {"A": 3, "B": 3},
        "test": {"A": 3, "B": 3},
    }
    with (out / "patients.csv").open(newline="") as file:
        found = {(row["patient"], row["path"].split("/")[0]) for row in csv.DictReader(file)}
    assert len(found) == 12  # each patient in one split
    assert "patients split" in summary["notes"][0]


def test_class_folders_named_after_patients_are_refused(tmp_path):
    for patient in ("KIM-1", "LEE-2", "PARK-3"):
        dicom(tmp_path / "src" / "train" / patient / "1.dcm", body(), patient=patient)
    with pytest.raises(CTError, match="named after a patient"):
        import_dataset(tmp_path / "src", tmp_path / "out")


def test_old_dicom_without_its_mark(tmp_path):
    """Files from before the DICM mark are known by their suffix, and are implicit little endian."""
    ds = dicom(None, body())
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    (tmp_path / "src").mkdir()
    ds.save_as(tmp_path / "src" / "1.IMA", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "src" / "1.IMA").read_bytes()[128:132] != b"DICM"
    summary = import_dataset(tmp_path / "src", tmp_path / "out")
    assert summary["format"] == "dicom" and (tmp_path / "out" / "train" / "unlabelled" / "1.png").is_file()


def test_a_bad_window_stops_before_anything_is_read(tmp_path):
    dicom(tmp_path / "src" / "1.dcm", body())
    with pytest.raises(CTError, match=r"^Found window \(40, 0\)"):
        import_dataset(tmp_path / "src", tmp_path / "out", window=(40, 0))
    assert not (tmp_path / "out").exists()


def test_no_readable_slice(tmp_path):
    ds = dicom(tmp_path / "src" / "1.dcm", body())
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    ds.PixelData = pydicom.encaps.encapsulate([b"no JPEG"])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "src" / "1.dcm", enforce_file_format=True)
    with pytest.raises(CTError, match="no readable slice.*JPEG-LS"):
        import_dataset(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_dicom(tmp_path):
    src = REAL / "tcga_chest_dicom"
    if not src.is_dir():
        pytest.skip(f"no real slices in '{src}'")
    summary = import_dataset(src, tmp_path / "out")
    assert summary["counts"] == {"train": {"unlabelled": 58}} and summary["skipped"] == []
    for path in sorted((tmp_path / "out").rglob("*.png"))[::10]:
        grey = np.asarray(Image.open(path))
        assert grey.shape == (512, 512) and 54 <= np.percentile(grey, 5) <= 75  # air around the body
        assert grey.max() == 255  # bone is clipped
    with (tmp_path / "out" / "patients.csv").open(newline="") as file:
        assert len({row["patient"] for row in csv.DictReader(file)}) == 37
