"""Imports: miniature AI Hub deliveries, DICOM slices written here, image folders, and bad input."""

import contextlib
import csv
import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from ctutils import importers
from ctutils.base import CTError, atomic_path
from ctutils.data import load_folder
from ctutils.dicom import read_dicom
from ctutils.importers import AIHUB_CLASSES, import_dataset
from ctutils.pictures import BadFile, window_to_grey

SPLIT = {"Training": "train", "Validation": "val"}
FIRST = "ChestCT_ILD_00000001"
EVIL = ("../../evil.png", "/tmp/evil.png", "C:/evil.png", "..\\evil.png")


def png(value: int) -> bytes:
    """A noisy picture, different for each value."""
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (16, 16), np.uint8)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def label_json(name: str, label: str) -> bytes:
    content = {"filepath": "흉부/CT", "filename": name, "label": label, "labels": list(AIHUB_CLASSES)}
    return json.dumps(content, ensure_ascii=False).encode()


# A miniature of data set 71597: (folder, class, file name, PNG); three a class in Training, two in Validation.
DELIVERY = [
    (folder, label, f"ChestCT_{label}_{i:08d}.png", png(100 * k + 10 * len(folder) + i))
    for folder, count in (("Training", 3), ("Validation", 2))
    for k, label in enumerate(AIHUB_CLASSES)
    for i in range(count)
]


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def zip_bytes(files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def split_parts(name: str, content: bytes, size: int) -> dict[str, bytes]:
    """Cut a zip as AI Hub does: the part's number is its byte offset."""
    return {f"{name}.part{start}": content[start : start + size] for start in range(0, len(content), size)}


def aihub_flat(in_classes: bool = False) -> dict[str, bytes]:
    images = {f"{f}/image/{label + '/' if in_classes else ''}{name}": data for f, label, name, data in DELIVERY}
    return images | {f"{f}/label/{Path(name).stem}.json": label_json(name, label) for f, label, name, _ in DELIVERY}


FLAT = aihub_flat()
TARS = {}  # as delivered: tars, in them zips in parts, Korean folder names, a label with a BOM and one in cp949
ON_DISK = {}  # parts and zips without tars; split known from the archive names only
for folder in SPLIT:
    images = zip_bytes({f"{label}/{name}": data for f, label, name, data in DELIVERY if f == folder})
    notes = {f"{Path(name).stem}.json": label_json(name, label) for f, label, name, _ in DELIVERY if f == folder}
    first, second = list(notes)[:2]
    labels = zip_bytes(notes | {first: b"\xef\xbb\xbf" + notes[first], second: notes[second].decode().encode("cp949")})
    parts = split_parts(f"{folder[0]}S.zip", images, len(images) // 11 + 1)  # eleven: by name part10.. before part2..
    TARS[f"{folder}/01.원천데이터/원천.tar"] = tar_bytes(parts)
    TARS[f"{folder}/02.라벨링데이터/라벨.tar"] = tar_bytes({f"{folder[0]}L.zip": labels})
    ON_DISK |= {**split_parts(f"{folder[0]}S_영상.zip", images, 900), f"{folder[0]}L_영상.zip": labels}
# tarfile takes a damaged second header for the end and would lose the rest without a word.
TAR, LABEL_TAR = list(TARS)[:2]
SECOND = tarfile.open(fileobj=io.BytesIO(TARS[TAR])).getmembers()[1].offset


def check_aihub(out: Path, summary: dict) -> None:
    assert summary["counts"] == {"train": dict.fromkeys(AIHUB_CLASSES, 3), "val": dict.fromkeys(AIHUB_CLASSES, 2)}
    assert all((out / SPLIT[f] / label / name).read_bytes() == data for f, label, name, data in DELIVERY)
    assert sum(path.is_file() for path in out.rglob("*")) == summary["images"] + 1 == 26
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert meta["counts"] == summary["counts"] and meta["complete"] is True
    assert (meta["name"], meta["kind"], meta["format"]) == ("AI Hub 71597", "real", "aihub")


src = pytest.fixture(lambda tmp_path: tmp_path / "흉부 CT 71597", name="src")
out = pytest.fixture(lambda tmp_path: tmp_path / "deep" / "out", name="out")


@pytest.mark.parametrize("files", [TARS, aihub_flat(True), FLAT, ON_DISK])
def test_aihub_layouts_give_the_folder_layout(src, out, files):
    put(src, files)
    summary = import_dataset(src, out)
    assert summary["format"] == "aihub" and summary["skipped"] == []
    check_aihub(out, summary)


def test_one_tar_as_source_what_a_mac_adds_and_korean_names_of_windows(tmp_path, out):
    """Windows zips store names as cp949 without saying so."""
    name, raw = "정상_1.png", "정상_1.png".encode("cp949")
    files = {"71597/1.Training/a.png": png(1), "71597/1.Training/._a.png": b"mac", "71597/.hidden/b.png": png(2)}
    files["71597/1.Training/a.json"] = label_json("a.png", "ild")  # spelled as in the deck when it is written
    zipped = zip_bytes({"Training/" + "x" * len(raw): png(3), "Training/a.json": label_json(name, "Normal")})
    put(tmp_path, {"all.tar": tar_bytes(files | {"71597/b.zip": zipped.replace(b"x" * len(raw), raw)})})
    summary = import_dataset(tmp_path / "all.tar", out)
    assert summary["counts"] == {"train": {"ILD": 1, "Normal": 1}}
    assert [row["path"] for row in summary["skipped"]] == ["all.tar/71597/.hidden/b.png"]
    assert (out / "train" / "Normal" / name).read_bytes() == png(3)


def test_missing_labels_and_images_are_reported(src, out):
    files = FLAT | {f"Validation/label/{FIRST}.json": b"{broken"}
    del files["Training/label/ChestCT_ILD_00000000.json"], files["Training/image/ChestCT_Normal_00000001.png"]
    put(src, files)
    summary = import_dataset(src, out)
    assert summary["images"] == 22
    assert {Path(row["path"]).name: row["reason"] for row in summary["skipped"]} == {
        "ChestCT_ILD_00000000.png": "image without a label",
        "ChestCT_Normal_00000001.json": "label without an image",
        f"{FIRST}.json": "not a label: no JSON with 'filename' and 'label'",
        f"{FIRST}.png": "image without a label",
    }
    assert "2 file(s) left out: image without a label" in summary["notes"]


def test_a_stopped_import_goes_on(src, out, monkeypatch):
    put(src, TARS)
    calls = iter([atomic_path] * 9)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(importers.base, "atomic_path", lambda path: next(calls)(path))
        import_dataset(src, out)
    assert json.loads((out / "dataset.json").read_text())["complete"] is False
    first, second = sorted(out.rglob("*.png"))[:2]
    first.unlink()
    put(out, {"train/ILD/.tmp-left.png": b"x"})  # what kill -9 leaves
    before = second.stat().st_mtime_ns
    summary = import_dataset(src, out)
    assert second.stat().st_mtime_ns == before
    assert summary["already_there"] + summary["written"] == 25 and summary["written"] < 25 - 5
    check_aihub(out, summary)
    assert import_dataset(src, out)["written"] == 0


def flip(content: bytes, at: int, bits: int = 0xFF) -> bytes:
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


def encrypted(content: bytes) -> bytes:
    """Mark a zip's entries as encrypted, in their own headers and in the directory."""
    flags = re.compile(rb"(PK\x01\x02.{4}|PK\x03\x04..)(.)", re.DOTALL)
    return flags.sub(lambda found: found[1] + bytes([found[2][0] | 1]), content)


def without_part(which: int, rename: bool = False) -> dict[str, bytes]:
    """Zips in parts of which one is missing, numbered by byte offset, or renamed to 0 1 2."""
    files = dict(ON_DISK)
    parts = [path for path in files if path.startswith("TS_")]
    contents = [(f"TS_영상.zip.part{i}" if rename else path, files.pop(path)) for i, path in enumerate(parts)]
    del contents[which]
    return files | dict(contents)


def numbered(*paths: str) -> dict[str, bytes]:
    return {path: png(number) for number, path in enumerate(paths)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file or folder"),
        ({"train/a/readme.txt": b"x"}, "no images to import"),
        ({"Training/01.원천데이터/a.tar": tar_bytes({})}, "no images to import"),
        (FLAT | {"Training/z.json": label_json(f"{FIRST}.png", "Normal")}, "labels .*'ILD' in .*'Normal' in .*z.json"),
        (FLAT | {"Training/label/z.json": label_json(f"{FIRST}.png", "covid")}, "label 'covid' in .*one of ILD"),
        (FLAT | {f"Training/image/more/{FIRST}.png": png(9) + b"x"}, f"two different pictures '{FIRST}.png'"),
        (FLAT | {"Other/a.png": png(1)}, "outside Training and Validation"),
        (TARS | {TAR: TARS[TAR][:700]}, f"damaged archive or file '{TAR}'"),
        (TARS | {TAR: flip(TARS[TAR], SECOND + 5, 1)}, f"damaged archive or file '{TAR}' .damaged at byte"),
        (TARS | {LABEL_TAR: flip(TARS[LABEL_TAR], 600)}, f"damaged archive or file '{LABEL_TAR}/TL.zip/ChestCT"),
        (ON_DISK | {"TL_영상.zip": b"PK no zip"}, "a damaged archive or file 'TL_영상.zip'"),
        (without_part(0), "no part 'TS_영상.zip.part0'"),
        (without_part(1), "no part 'TS_영상.zip.part900'"),
        (without_part(-1), r"damaged archive or file 'TS_영상.zip' .*check that 'TS_영상.zip.part\d+' .*are there"),
        (without_part(2, rename=True), "no part 'TS_영상.zip.part2'"),
        *[({"TS.zip": zip_bytes({name: png(1)})}, "points outside") for name in EVIL],
        ({"Training/a.tar": tar_bytes({EVIL[0]: png(1)})}, "points outside"),
        ({"a.zip": encrypted(zip_bytes(numbered("a/1.png", "b/1.png")))}, "encrypted.*unpack it with its password"),
        (numbered("a.png"), "pictures without class folders"),
        (numbered("train/a/1.png", "val/b/1.png", "valid/b/2.png"), "2 folders for the split 'val'"),
        (numbered("train/Normal/1.png", "val/normal/1.png"), "'Normal', 'normal'.*differ only by case"),
        (numbered("a/1.png", "a/2.png", "a/3.png", "b/1.png"), "1 independent group.* of class 'b'"),
        ({"train/a/1.png": b"text", "train/b/1.png": b""}, "no images to import.*train/a/1.png: not a picture"),
        (numbered("train/a/1.png", "train/NUL/1.png"), "the name 'NUL'"),
        (numbered(*[f"case{i:02d}/1.png" for i in range(3)]), "3 folders that look like patients .*labels.csv"),
        (numbered(*[f"R-{i}-x{i}/1.png" for i in range(12)]), "12 folders that look like patients"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, src, out, files, message):
    put(src, files)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CTError, match=message):
        import_dataset(src, out)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if not path.is_relative_to(out)} == before


def test_out_and_format_that_cannot_be(tmp_path, src, out):
    put(src, numbered("train/a/1.png", "val/a/1.png"))
    put(tmp_path / "mine", {"thesis.txt": b"mine"})
    for target, format, message in (
        (src, None, "inside the source"),
        (src / "sub" / "out", None, "inside the source"),
        (out, "nifti", "format 'nifti'.*aihub, dicom, folder"),
        (tmp_path / "mine", None, "with other files"),
    ):
        with pytest.raises(CTError, match=message):
            import_dataset(src, target, format=format)
    import_dataset(src, out)
    put(tmp_path / "two" / src.name, numbered("train/a/7.png", "val/a/7.png"))
    with pytest.raises(CTError, match="other files, such as 'train/a/1.png'"):
        import_dataset(tmp_path / "two" / src.name, out)
    assert not (out / "train" / "a" / "7.png").exists() and not (src / "sub").exists()


def test_folder_with_other_split_names(src, out):
    train = ("Data/Train/ILD/가 1.PNG", "Data/Train/Normal/1.jpg")
    files = numbered(*train, "Data/valid/image/ILD/1.png", "Data/Test/Normal/p/1.png", "Data/more/x.png")
    put(src, files | {"dataset.json": b'{"kind": "synthetic", "counts": 1}'})
    summary = import_dataset(src, out)
    assert summary["format"] == "folder" and summary["name"] == src.name
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert meta["kind"] == "synthetic" and meta["counts"] == summary["counts"]  # a synthetic set stays so
    assert summary["counts"] == {"train": {"ILD": 1, "Normal": 1}, "val": {"ILD": 1}, "test": {"Normal": 1}}
    assert (out / "train" / "ILD" / "가 1.PNG").read_bytes() == png(0)
    assert [row["reason"] for row in summary["skipped"]] == ["outside the split folders"]


def test_unsplit_folder_is_split_stratified_and_twins_stay_together(src, out):
    files = numbered(*[f"a/{i}.png" for i in range(20)], *[f"b/{i}.png" for i in range(40)])
    files |= {f"a/copy {i}.png": files[f"a/{i}.png"] for i in range(5)}
    brighter = Image.open(io.BytesIO(files["a/9.png"])).point(lambda v: v + 3)  # a near twin, of other bytes
    brighter.save(twin := io.BytesIO(), "PNG")
    files["a/twin.png"] = twin.getvalue()
    put(src, files | {f"b/bad {i}.png": png(i)[:60] for i in range(3)})  # damaged ones have no part in the split
    summary = import_dataset(src, out)
    assert [summary["counts"][split]["b"] for split in ("train", "val", "test")] == [28, 6, 6]
    assert sum(by_class["a"] for by_class in summary["counts"].values()) == 26
    assert [row["path"] for row in summary["skipped"]] == [f"b/bad {i}.png" for i in range(3)]
    place = {path.name: path.relative_to(out).parts[0] for path in (out).glob("*/a/*.png")}
    assert all(place[f"copy {i}.png"] == place[f"{i}.png"] for i in range(5)) and place["twin.png"] == place["9.png"]
    assert "70/15/15" in summary["notes"][0] and "seed 0, near twins" in summary["notes"][0]


def test_pictures_of_patient_folders_with_a_labels_csv(tmp_path, src, out):
    """The way out for case00, case01, ...: one row a folder; a patient's slices stay together, alike names apart."""
    put(src, numbered(*[f"case{i:02d}/{k}.png" for i in range(12) for k in range(3)], "case00/extra.png", "readme.txt"))
    (src / "labels.csv").write_text(
        "path;class\n" + "".join(f"case{i:02d};{'AB'[i % 2]}\n" for i in range(11)), "utf-16"
    )
    summary = import_dataset(src, out)
    assert sum(by_class["A"] for by_class in summary["counts"].values()) == 19 and summary["images"] == 34
    assert {row["path"]: row["reason"][:17] for row in summary["skipped"]} == {
        **{f"case11/{k}.png": "not in labels.csv" for k in range(3)},
        "readme.txt": "neither DICOM nor",
    }
    assert len({(patient, path.split("/")[0]) for path, patient in patients(out).items()}) == 11, "patients split"
    assert "one folder counts as one patient" in " ".join(summary["notes"])
    assert load_folder(out, cache=tmp_path).counts().shape == (2, 3)


def test_patients_of_subfolders_and_of_a_table_stay_together(tmp_path, src, out):
    put(src, numbered(*[f"{'AB'[i % 2]}/p{i}/{k}.png" for i in range(12) for k in range(2)]))
    import_dataset(src, out)
    assert len({(patient, path.split("/")[0]) for path, patient in patients(out).items()}) == 12
    rows = "".join(f"{'AB'[i % 2]}/p{i}/{k}.png,{i // 4}{i % 2}\n" for i in range(12) for k in range(2))
    (src / "patients.csv").write_text("path,patient\n" + rows)
    import_dataset(src, tmp_path / "two")
    hashed = patients(tmp_path / "two")
    assert len(set(hashed.values())) == 6 == len({(patient, path.split("/")[0]) for path, patient in hashed.items()})


def test_a_mixed_folder_is_read_as_what_is_more(src, out):
    """One stray DICOM file among pictures once threw all pictures out."""
    put(src, numbered(*[f"{split}/{label}/{i}.png" for split in ("train", "val") for label in "AB" for i in range(2)]))
    dicom(src / "train" / "A" / "scan.dcm", body())
    summary = import_dataset(src, out)
    assert (summary["format"], summary["images"]) == ("folder", 8)
    assert [row["path"] for row in summary["skipped"]] == ["train/A/scan.dcm"]


def test_what_is_left_out_is_named(src, out, monkeypatch):
    """Links, hidden folders, nested archives, huge and odd files: none vanishes, none ends the import."""
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("inner.zip", zip_bytes({"1.png": png(1)}))
        archive.writestr("huge.png", bytes(3000))
    members = [tarfile.TarInfo(name) for name in ("1.png", "hard.png", "soft.png", "sparse.png")]
    members[0].size = members[3].size = len(png(7))
    members[1].type, members[1].linkname = tarfile.LNKTYPE, "1.png"
    members[2].type, members[2].linkname = tarfile.SYMTYPE, "1.png"
    with tarfile.open(fileobj=(tar := io.BytesIO()), mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(png(7)))
    put(
        src,
        {
            "train/a/z.zip": file.getvalue(),
            "train/a/t.tar": tar.getvalue(),
            "x.7z": b"7z",
            "train/a/film.gif": b"GIF89a",
        },
    )
    put(src, numbered("train/a/ok.png", "train/b/ok.png", "train/.../1.png", "test/b/x.png") | {"test/a/1.png": b"?"})
    put(src, {"train/a/slice.dcm": b"x", "train/a/Thumbs.db": b"x", "train/a/._ok.png": b"x"})
    (src / "text").write_text("not a picture")
    for name, target in (("text.png", "../../text"), ("gone.png", "gone"), ("loop.png", "loop.png"), ("up", "..")):
        (src / "train" / "a" / name).symlink_to(target)
    monkeypatch.setattr(importers, "MOST_BYTES", 2000)
    monkeypatch.setattr(importers.Entry.read, "__defaults__", (2000,))
    summary = import_dataset(src, out, format="folder")
    assert {row["path"]: row["reason"][:13] for row in summary["skipped"]} == {
        **{"train/a/z.zip/link.png": "a link", "train/a/t.tar/soft.png": "a link"},
        **{
            "train/a/z.zip/inner.zip": "an archive in",
            "x.7z": "an archive in",
            "train/a/z.zip/huge.png": "3000 bytes, m",
        },
        **{"train/.../1.png": "hidden: its n", "train/a/text.png": "not a picture", "test/a/1.png": "not a picture"},
        **{f"train/a/{name}": "a link to a f" for name in ("gone.png", "loop.png", "up")},
        **{"train/a/film.gif": "neither DICOM", "text": "neither DICOM", "train/a/slice.dcm": "a DICOM file "},
    }
    assert summary["counts"] == {"train": {"a": 4, "b": 1}, "test": {"b": 1}}
    assert (out / "train" / "a" / "hard.png").read_bytes() == png(7)
    assert "no slice of class 'a' is left in test" in summary["notes"]
    assert "2 file(s) left out: not a picture" in summary["notes"]


def test_names_that_other_systems_refuse(tmp_path, out):
    long = "가" * 90  # 270 bytes, of 255
    names = [f"{long}1.png", f"{long}2.png", "a:b?.png", "aux.png", "x .png", "sub/1.png", "1.png"]
    put(tmp_path, {"s.tar": tar_bytes({f"train/{c}/{name}": png(i) for i, name in enumerate(names) for c in "ab"})})
    summary = import_dataset(tmp_path / "s.tar", out)
    assert summary["counts"] == {"train": {"a": 7, "b": 7}} and import_dataset(tmp_path / "s.tar", out)["written"] == 0
    made = sorted(path.name for path in (out / "train" / "a").iterdir())
    assert all(len(name.encode()) < 255 for name in made) and len({name[-12:] for name in made if "가" in name}) == 2
    assert {"1.png", "_aux.png", "a_b_.png", "x.png"} < set(made)


def test_file_names_in_the_korean_code_page(src, out):
    """Unpacking a Windows zip on Linux leaves names that are no UTF-8."""
    put(src, numbered("train/a/1.png"))
    try:
        os.rename(os.fsencode(src / "train" / "a"), os.fsencode(src / "train") + b"/" + "정상".encode("cp949"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert import_dataset(src, out)["counts"] == {"train": {"정상": 1}} and (out / "train" / "정상" / "1.png").is_file()


def dicom(path: Path | None, hu, *, slope=1, intercept=-1024, signed=False, **tags):
    """A CT slice with the given HU (H, W) or (frames, H, W), written to `path` if given."""
    hu = np.asarray(hu, float) if np.ndim(hu) == 3 or len(hu) > 15 else np.tile(hu, (16, 16))
    stored = np.rint((hu - intercept) / slope).astype(np.int16 if signed else np.uint16)
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    ds.Modality, ds.PatientID, ds.PatientName = "CT", "P-77", "Hong^Gildong"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.NumberOfFrames = stored.size // (ds.Rows * ds.Columns)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, int(signed)
    ds.RescaleSlope, ds.RescaleIntercept, ds.PixelData = slope, intercept, stored.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
    return ds


def body(seed: int = 0) -> np.ndarray:
    """HU of an air square with a body in it, different for each seed."""
    inside = np.random.default_rng(seed).integers(-200, 100, (16, 16))
    return np.pad(inside.astype(float), 8, constant_values=-1000.0)


def patients(out: Path) -> dict[str, str]:
    return {row["path"]: row["patient"] for row in csv.DictReader((out / "patients.csv").open(encoding="utf-8"))}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2, -2000), (0.5, -1024)])
def test_rescale_to_hu(tmp_path, slope, intercept, signed):
    assert window_to_grey(np.array([-3000.0, -1350, 3000])).tolist() == [0, 0, 255]
    dicom(tmp_path / "a.dcm", [[-1024, -600, 0, 40, 150, 240]], slope=slope, intercept=intercept, signed=signed)
    grey, _ = read_dicom(tmp_path / "a.dcm")
    assert grey.dtype == np.uint8 and grey[0, 0, :6].tolist() == [55, 128, 230, 236, 255, 255]
    assert read_dicom(tmp_path / "a.dcm", (40, 400))[0][0, 0, :6].tolist() == [0, 0, 102, 128, 198, 255]


PADDED = [[976.0, 977, 500]]  # stored 2000, 2001, 1524


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("hu", "options", "grey"),
    [
        ([[-2048, -1024]], {"signed": True}, [55, 55]),  # below the CT scale is air
        (PADDED, {"PixelPaddingValue": 2000}, ["air", 255, 255]),
        (PADDED, {"PixelPaddingValue": 2000, "PixelPaddingRangeLimit": 2001}, ["air", "air", 255]),
        # 63536 is how some scanners write -2000; with slope -1 it would be bright, not air.
        ([[2000, 0]], {"slope": -1, "intercept": 0, "signed": True, "PixelPaddingValue": 63536}, ["air", 230]),
    ],
)
def test_padding_is_air_and_monochrome1_is_inverted(photometric, hu, options, grey):
    wanted = [55 if g == "air" else 255 - g if photometric == "MONOCHROME1" else g for g in grey]
    grey, _ = read_dicom(dicom(None, hu, PhotometricInterpretation=photometric, **options))
    assert grey[0, 0, : len(wanted)].tolist() == wanted


def test_enhanced_ct_keeps_the_rescale_in_functional_groups():
    ds = dicom(None, np.zeros((2, 16, 16)), intercept=0)
    del ds.RescaleSlope, ds.RescaleIntercept
    ds.PerFrameFunctionalGroupsSequence = [pydicom.Dataset(), pydicom.Dataset()]
    for group, intercept in zip(ds.PerFrameFunctionalGroupsSequence, (-1024, -600), strict=True):
        group.PixelValueTransformationSequence = [pydicom.Dataset()]
        group.PixelValueTransformationSequence[0].RescaleSlope = 1
        group.PixelValueTransformationSequence[0].RescaleIntercept = intercept
    assert read_dicom(ds)[0][:, 0, 0].tolist() == [55, 128]


@pytest.mark.filterwarnings("ignore")  # from the text file and the damaged ones
def test_class_folders_with_splits_and_files_that_cannot_be_read(tmp_path, src):
    out = tmp_path / "CT set"
    dicom(src / "Training" / "ILD" / "a.DCM", body(1))
    dicom(src / "Training" / "ILD" / "series2" / "a.dcm", body(2))  # the same name again
    dicom(src / "Training" / "Normal" / "IM000001", body(3), PatientID="P-78")  # no extension
    dicom(src / "valid" / "ILD" / "many.dcm", np.stack([body(4), body(5)]), PatientID="P-79")
    dicom(src / "valid" / "Normal" / "scan_P77_Gildong.dcm", body(6))
    bad = src / "valid" / "Normal"
    dicom(bad / "scout.dcm", body(), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom(bad / "mr.dcm", body(), Modality="MR")
    dicom(bad / "rgb.dcm", body(), PhotometricInterpretation="RGB")
    dicom(bad / "cut.dcm", body(), PixelData=b"x" * 100)
    dicom(bad / "frames.dcm", body(), NumberOfFrames=999999999)
    dicom(bad / "slope.dcm", body()[:, :30], RescaleSlope=[1, 2])
    put(bad, {"text.dcm": b"no DICOM", "vr.dcm": flip((bad / "mr.dcm").read_bytes(), 132 + 4)})
    summary = import_dataset(src, out)
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert names[:3] == ["train/ILD/a.png", "train/ILD/a_00001.png", "train/Normal/IM000001.png"]
    assert names[3:5] == ["val/ILD/many_f001.png", "val/ILD/many_f002.png"]
    assert len(names) == 6 and names[5].startswith("val/Normal/slice_")  # its own name gave the patient away
    np.testing.assert_array_equal(np.asarray(Image.open(out / names[4])), window_to_grey(body(5)))
    reasons = {Path(row["path"]).stem: row["reason"] for row in summary["skipped"]}
    assert list(reasons) == ["cut", "frames", "mr", "rgb", "scout", "slope", "text", "vr"]
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert meta["window"] == {"level": -600, "width": 1500, "unit": "HU"} and meta["name"] == "CT set"
    assert summary["notes"][0] == "1 patient(s) have slices in several splits: scores will be too good"
    assert sum("file(s) left out: " in note for note in summary["notes"]) == len(set(reasons.values()))


def test_flat_dicom_is_unlabelled_goes_on_and_patients_are_only_hashes(tmp_path, src):
    for i, patient in enumerate(("KIM-1", "KIM-1", "LEE-2", "")):
        dicom(src / f"{i}.dcm", body(i), PatientID=patient)
    old = dicom(None, body(), PatientID="LEE-2")  # before the DICM mark: known by suffix, and implicit little endian
    old.file_meta = pydicom.dataset.FileMetaDataset()
    old.save_as(src / "old.IMA", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert (src / "old.IMA").read_bytes()[128:132] != b"DICM"
    tables = []
    for name, salt in zip("abcd", (None, None, "pepper", "pepper"), strict=True):
        summary = import_dataset(src, out := tmp_path / name, salt=salt)
        everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
        assert not any(secret in everything for secret in (b"KIM", b"LEE", b"Gildong", b"pepper"))
        tables.append(table := list(patients(out).values()))
        assert table[0] == table[1] != table[2] == table[4] and table[3] == ""
    assert tables[0] != tables[1] and tables[2] == tables[3]  # a salt of its own for each import
    assert summary["counts"] == {"train": {"unlabelled": 5}} and "'unlabelled'" in summary["notes"][0]
    (out / "train" / "unlabelled" / "old.png").unlink()
    assert import_dataset(src, out)["written"] == 1
    with pytest.raises(CTError, match="other files"):  # another window would mix two looks
        import_dataset(src, out, window=(40, 400))
    dicom(src / "train" / "PARK-3" / "1.dcm", body(), PatientID="PARK-3")
    with pytest.raises(CTError, match="'PARK-3' named after a patient"):
        import_dataset(src, tmp_path / "e")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,class,split\n0.dcm,ILD,Training\n./1.dcm,정상,Training\n2.dcm,ILD,valid\n", None),
        ("name,label\n0.dcm,ILD\n", "labels.csv with the columns name, label. Expected path and class"),
        ("path,class\n../secret.dcm,ILD\n", "path '../secret.dcm'"),
        ("path,class\n0.dcm,../x\n", "the name '../x'"),
        ("path,class\n0.dcm,\n", "the name ''"),
        ("path,class,split\n0.dcm,ILD,exam\n", "split 'exam'"),
        ("path,class\n0.dcm,ILD\n0.dcm,Normal\n", "two labels for '0.dcm'"),
        ("path,class,split\n0.dcm,ILD,train\n1.dcm,ILD\n", "with and without a split"),
        ("", "labels.csv that cannot be read"),
    ],
)
def test_labels_csv(tmp_path, src, out, rows, message):
    for path in (tmp_path / "secret.dcm", *(src / f"{i}.dcm" for i in range(4))):
        dicom(path, body())
    (src / "labels.csv").write_text(rows, encoding="utf-8-sig")
    with pytest.raises(CTError, match=message) if message else contextlib.nullcontext():
        summary = import_dataset(src, out)
        assert summary["counts"] == {"train": {"ILD": 1, "정상": 1}, "val": {"ILD": 1}}
        assert [row["reason"] for row in summary["skipped"]] == ["not in labels.csv"]
    assert out.exists() == (message is None)


@pytest.mark.parametrize("key", ["PatientID", "StudyInstanceUID", "SeriesInstanceUID", "folder", ""])
@pytest.mark.parametrize("anonymous", ["", "ANONYMOUS", "one a file"])
def test_unsplit_dicom_is_split_by_what_tells_patients_apart(src, out, key, anonymous):
    for case in range(12):
        for i in range(3):
            own = f"{case}-{i}" if anonymous == "one a file" and key.endswith("UID") else anonymous
            tags = {"PatientID": own} | ({key: f"1.2.{case + 1}"} if key.endswith("D") else {})
            folder = src / "AB"[case % 2] / (f"case{case}/s{i}" if key == "folder" else "")
            dicom(folder / f"{case}-{i}.dcm", body(10 * case + i), **tags)
    put(src, {f"A/bad{i}.dcm": b"damaged" for i in range(9)})  # these have no part in the split
    summary = import_dataset(src, out)
    notes = " ".join(summary["notes"])
    assert len(summary["skipped"]) == 9 and ("patients split 70/15/15" in notes) == bool(key)
    if key:
        assert summary["counts"] == {s: {"A": n, "B": n} for s, n in (("train", 12), ("val", 3), ("test", 3))}
        assert len({(patient, path.split("/")[0]) for path, patient in patients(out).items()}) == 12
        assert (f"one {key} counts as one patient" in notes) == (key != "PatientID")
    else:
        assert "slices split 70/15/15" in notes and "patients of 36 file(s)" in notes and "too good" in notes
        assert not (out / "patients.csv").exists()


def test_nothing_is_written_where_no_slice_can_be_read_or_the_window_is_bad(src, out):
    ds = dicom(src / "1.dcm", body(), PixelData=b"x")
    with pytest.raises(CTError, match=r"^Found window \(40, 0\)"):
        import_dataset(src, out, window=(40, 0))
    with pytest.raises(CTError, match="no images to import.*1.dcm: The number of bytes"):
        import_dataset(src, out)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    with pytest.raises(BadFile, match="JPEG-LS.*pylibjpeg"):
        read_dicom(ds)
    assert not out.exists()


def orientation(*axes: float) -> dict:
    return {"ImageOrientationPatient": list(axes)}


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        *[({"Modality": kind}, f"modality {kind}") for kind in ("MR", "CR", "NM", "SEG", "RTDOSE")],
        ({"SOPClassUID": pydicom.uid.SecondaryCaptureImageStorage}, "Secondary Capture"),
        ({"SOPClassUID": None, "Modality": None}, "modality unknown"),
        ({"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}, "PROJECTION"),
        (orientation(1, 0, 0, 0, 0, -1), "not axial"),
        (orientation(0, 1, 0, 0, 0, -1), "not axial"),
        *[({"RescaleSlope": slope}, "no rescale to HU") for slope in (None, 0, "nan", [1, 2])],
        (orientation(1, 0, 0), "not axial"),
        ({"RescaleIntercept": None}, "no rescale to HU"),
        ({"RescaleType": "mgml"}, "unit mgml"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, "Modality LUT"),
        ({"Rows": 8, "Columns": 128}, "128 x 8 pixels"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels"),
        ({"NumberOfFrames": 999999999}, "999999999 frame"),
        (orientation(1, 0, 0, 0, 0.95, -0.3), None),  # a tilted gantry
        ({"SOPClassUID": None, "RescaleType": "US"}, None),
    ],
)
def test_what_is_no_axial_slice_in_hu_is_refused(tags, why):
    ds = dicom(None, body())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in tags.items():
            delattr(ds, name) if value is None else setattr(ds, name, value)
    with pytest.raises(BadFile, match=why) if why else contextlib.nullcontext():
        read_dicom(ds)
