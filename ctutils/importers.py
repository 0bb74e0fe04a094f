"""Bring other deliveries into the folder layout: AI Hub archives, DICOM slices, other image folders.

Everything is planned first (a list of `Picture`), so that nearly every mistake is found before anything is
written. Sources are only read, archives in place: gigabytes are never unpacked to a temporary folder.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import secrets
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image

from ctutils import base
from ctutils.base import CTError
from ctutils.data import IMAGE_SUFFIXES, SPLIT_NAMES, SPLITS

AIHUB_CLASSES = ("ILD", "Lung_Cancer", "Normal", "pneumonia", "pneumothorax")  # the deck's spelling
LUNG_WINDOW = (-600, 1500)  # level, width in HU
AIR_HU = -1024.0  # the lowest value of the CT scale, outside the body; grey 55 in the lung window
SHARE = 0.15  # of val and of test; the rest is train
SPLIT_SEED = 0
IMAGE_FOLDERS = ("image", "images", "원천데이터")  # between split and class in some deliveries
PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
PATIENT_KEYS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")  # the first that tells patients apart
UNLABELLED = "unlabelled"
HIDDEN = re.compile(r"(^|/)\.")  # also what macOS writes beside each file of a tar: `._name`
ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a delivery, on disk or inside archives; `path` names folders and archives on the way, in NFC."""

    path: PurePosixPath
    size: int
    open: Callable[[], io.IOBase]

    def read(self) -> bytes:
        with _archive_errors(self.path), self.open() as file:
            return file.read()


@dataclasses.dataclass(frozen=True)
class Picture:
    """One file to write: `<out>/<split>/<label>/<name>`.

    Attributes:
        entry: its content; for DICOM made when it is read.
        patient: what tells its patient from others, "" when unknown; only its hash is ever written.
    """

    split: str
    label: str
    name: str
    entry: Entry
    patient: str = ""

    @property
    def path(self) -> str:
        return f"{self.split}/{self.label}/{self.name}"


@dataclasses.dataclass
class Listing:
    """What an import will write, what it leaves out (origin -> reason), and what to tell the user."""

    pictures: list[Picture] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    meta: dict = dataclasses.field(default_factory=dict)


def import_dataset(
    src: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    window: tuple[float, float] = LUNG_WINDOW,
    salt: str | None = None,
    progress: bool = True,
) -> dict:
    """Copy a delivery into `<out>/{train,val,test}/<class>/` and describe it in `<out>/dataset.json`.

    A stopped import goes on where it stopped when it is run again: files already there are kept.

    Args:
        src: a folder, or one .tar or .zip; never changed.
        out: a new folder, or the one of an earlier, stopped import of the same source.
        format: "aihub", "dicom" or "folder"; None looks.
        window: level and width in HU, for DICOM.
        salt: mixed into patient hashes; None draws a new one. It is never written.
        progress: show a bar.
    Returns:
        {"format", "name", "out", "counts": {split: {class: n}}, "images", "written", "already_there",
        "skipped": [{"path", "reason"}], "notes": [...]}; ready for JSON.
    Raises:
        CTError: nothing to import, contradicting labels, a damaged or unsafe archive, a missing zip part,
            `out` inside `src`, or `out` with other files.
    """
    src, out = Path(src), Path(out)
    if not src.exists():
        raise CTError(f"no file or folder '{src}'", "a delivery to import", "check the path")
    if out.resolve().is_relative_to(src.resolve()):
        raise CTError(f"'{out}' inside the source '{src}'", "a separate output folder", "give another OUT")
    bar = functools.partial(base.progress, unit="file") if progress else lambda items, desc: items
    with contextlib.ExitStack() as stack:  # archives stay open until the last picture is copied
        entries = _entries(src, stack)
        format = format or _find_format(entries)
        if format == "aihub":
            listing = _list_aihub(src, entries, bar)
        elif format == "dicom":
            listing = _list_dicom(entries, window, bar)
        elif format == "folder":
            listing = _list_folder(src, entries, bar)
        else:
            raise CTError(f"format '{format}'", "one of aihub, dicom, folder", "give one of these, or none")
        if not listing.pictures:
            reasons = "; ".join(sorted(set(listing.skipped.values()))[:3]) or "no files of this kind"
            found = f"no images to import in '{src}' as format '{format}' ({reasons})"
            raise CTError(found, "AI Hub's files, DICOM or an image folder", "check the path, or give another --format")
        return _write(out, format, listing, salt or secrets.token_hex(16), bar)


def _write(out: Path, format: str, listing: Listing, salt: str, bar: Callable) -> dict:
    """Write every picture of the listing that is not there yet, and describe the result."""
    meta = {"name": out.resolve().name, "kind": "real", "format": format, **listing.meta}
    pictures = listing.pictures
    _check_names(pictures)
    _check_out(out, pictures, meta)
    missing = [picture for picture in pictures if not (out / picture.path).exists()]
    if missing:
        base.write_json(out / "dataset.json", {**meta, "complete": False})
    for picture in bar(missing, desc="import"):
        with base.atomic_path(out / picture.path) as temporary:
            temporary.write_bytes(picture.entry.read())
    if format == "dicom":
        hashes = [hashlib.sha256((salt + p.patient).encode()).hexdigest()[:16] if p.patient else "" for p in pictures]
        table = pd.DataFrame({"path": [p.path for p in pictures], "patient": hashes})
        with base.atomic_path(out / "patients.csv") as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n")
    found = {split: Counter(p.label for p in pictures if p.split == split) for split in SPLITS}
    counts = {split: dict(sorted(of_split.items())) for split, of_split in found.items() if of_split}
    end = {"counts": counts, "skipped": len(listing.skipped), "notes": listing.notes, "complete": True}
    base.write_json(out / "dataset.json", {**meta, **end})
    return {
        "format": format,
        "name": meta["name"],
        "out": str(out),
        "counts": counts,
        "images": len(pictures),
        "written": len(missing),
        "already_there": len(pictures) - len(missing),
        "skipped": [{"path": origin, "reason": reason} for origin, reason in listing.skipped.items()],
        "notes": listing.notes,
    }


def _check_out(out: Path, pictures: list[Picture], meta: dict) -> None:
    """Refuse an output folder that holds anything but an earlier run of the same import."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    old = base.read_json(out / "dataset.json") if (out / "dataset.json").exists() else {}
    same = all(old.get(key) == meta.get(key) for key in ("name", "format", "window"))
    for left_over in out.rglob(".tmp-*") if same else ():  # from an import that was killed
        left_over.unlink()
    there = (path for split in SPLITS for path in (out / split).rglob("*") if path.is_file())
    others = {path.relative_to(out).as_posix() for path in there} - {picture.path for picture in pictures}
    if others or not same:
        found = f"'{out}' with other files" + (f", such as '{min(others)}'" if others else "")
        raise CTError(found, "a new folder, or one left by the same import", "give another OUT")


def _check_names(pictures: list[Picture]) -> None:
    """Refuse targets that would overwrite each other, also on disks that ignore case."""
    labels = sorted({picture.label for picture in pictures})
    if len({label.casefold() for label in labels}) < len(labels):
        raise CTError(f"classes {labels}, some differ only by case", "one spelling for each", "rename the folders")
    seen: dict[str, Picture] = {}
    for picture in pictures:
        first = seen.setdefault(picture.path.casefold(), picture)
        if first is not picture:
            found = f"two pictures for '{picture.path}': '{first.entry.path}' and '{picture.entry.path}'"
            raise CTError(found, "one name for one picture in a class, whatever the case", "rename one of them")


def _find_format(entries: list[Entry]) -> str:
    """Tell the format from AI Hub labels, else DICOM files, else it is an image folder."""
    labels = [entry for entry in entries if entry.path.suffix.lower() == ".json"][:5]
    if any(_parse_label(entry.read()) for entry in labels):
        return "aihub"
    return "dicom" if any(_is_dicom(entry) for entry in entries) else "folder"


def _decode_name(raw: bytes) -> str:
    """Read a file name as UTF-8, else in the Korean Windows code page; NFC, since macOS stores NFD."""
    for encoding in ("utf-8", "cp949"):
        with contextlib.suppress(UnicodeDecodeError):
            return unicodedata.normalize("NFC", raw.decode(encoding))
    return raw.decode("ascii", "replace")


def _plain(part: str) -> str:
    """Return a folder name in lower case without its number: "01.원천데이터" -> "원천데이터"."""
    return re.sub(r"^\d+[._ -]+", "", part).casefold()


def _split_of(*parts: str) -> str | None:
    """Find the split in the parts of a path: a folder like `1.Training`, or AI Hub's archives TS, TL, VS, VL."""
    for part in parts:
        if _plain(part) in SPLIT_NAMES:
            return SPLIT_NAMES[_plain(part)]
        if short := re.match(r"([TV])[SL]([_.].*)?\.(zip|tar)$", part):
            return {"T": "train", "V": "val"}[short[1]]
    return None


def _safe_name(name: str, origin: object) -> str:
    """Return `name` when it can be a file or folder name on every system."""
    if not name or name.startswith(".") or re.search(r'[<>:"/\\|?*\x00-\x1f\ufffd]', name):
        raise CTError(f"the name '{name}' in '{origin}'", "a plain file or folder name", "rename it at the source")
    return name


def _place(entries: list[Entry]) -> tuple[list[tuple[Entry, str | None, str | None]], dict[str, str]]:
    """Find split and class of each file from its folders: `[.../][split/][image/]<class>/.../file`.

    Returns:
        (file, split or None, class or None) for each file, and the files left out with their reason. Where
        some file has a split (or a class), those without one are left out.
    """
    folders = [entry.path.parts[:-1] for entry in entries]
    start = len(os.path.commonprefix(folders))  # depth of the class folders where there is no split
    if start and len(set(folders)) == 1:
        start -= 1  # a single class folder
    names: dict[str, set[str]] = {}
    placed, skipped = [], {}
    for entry, parts in zip(entries, folders, strict=True):
        at = next((i for i, part in enumerate(parts) if _split_of(part)), None)
        split = None if at is None else _split_of(parts[at])
        below = parts[start:] if at is None else parts[at + 1 :]
        if split:
            names.setdefault(split, set()).add("/".join(parts[: at + 1]))
            below = below[1:] if below and _plain(below[0]) in IMAGE_FOLDERS else below
        placed.append((entry, split, _safe_name(below[0], entry.path) if below else None))
    for split, found in names.items():
        if len(found) > 1:
            several = f"{len(found)} folders for the split '{split}': {sorted(found)}"
            raise CTError(several, "one folder a split", "remove or rename one of them")
    for which, reason in ((1, "outside the split folders"), (2, "not in a class folder")):
        if any(row[which] for row in placed):
            skipped.update({str(row[0].path): reason for row in placed if not row[which]})
            placed = [row for row in placed if row[which]]
    return placed, skipped


def _assign_splits(labels: list[str], groups: list[str], what: str) -> list[str]:
    """Split 70/15/15 with a fixed seed, stratified by class; rows of one group stay together.

    Args:
        labels: class of each row.
        groups: patient, content hash or file of each row; one with several classes counts for the most frequent.
        what: name of a group in messages.
    Returns:
        the split of each row.
    """
    label_of = pd.Series(labels).groupby(groups).agg(lambda found: found.mode()[0])
    rng = np.random.default_rng(SPLIT_SEED)
    split_of = {}
    for label in sorted(set(labels)):
        members = label_of.index[label_of == label]
        if len(members) < 3:
            found = f"{len(members)} {what} of class '{label}' and no split folders"
            raise CTError(found, "3 of each class or more", "sort the files into train, val and test, or add slices")
        each = max(1, round(SHARE * len(members)))
        for place, index in enumerate(rng.permutation(len(members))):
            split_of[members[index]] = "val" if place < each else "test" if place < 2 * each else "train"
    return [split_of[group] for group in groups]


def _list_folder(src: Path, entries: list[Entry], bar: Callable) -> Listing:
    """List an image folder; where splits must be drawn, over the pictures that can be read."""
    listing = Listing(meta={"name": src.resolve().name})
    if (src / "dataset.json").is_file():  # a synthetic set stays synthetic when it is copied
        listing.meta |= {k: v for k, v in base.read_json(src / "dataset.json").items() if k in ("name", "kind")}
    placed, listing.skipped = _place([entry for entry in entries if entry.path.suffix.lower() in IMAGE_SUFFIXES])
    if placed and placed[0][2] is None:
        raise CTError(f"pictures without class folders in '{src}'", "<class>/*.png", "sort them into class folders")
    splits = [split for _, split, _ in placed]
    if placed and splits[0] is None:
        copies = {}  # exact copies must not cross splits
        for entry, _, _ in bar(placed, desc="read pictures"):
            content = entry.read()
            try:
                Image.open(io.BytesIO(content), formats=PICTURE_FORMATS).load()
                copies[entry] = hashlib.sha256(content).hexdigest()
            except Exception as error:  # decoders raise many kinds on a damaged file
                listing.skipped[str(entry.path)] = f"a picture that cannot be read ({error})"
        placed = [row for row in placed if row[0] in copies]
        splits = _assign_splits([label for _, _, label in placed], list(copies.values()), "different picture(s)")
        listing.notes.append(f"no split folders: 70/15/15 by class, seed {SPLIT_SEED}; exact copies kept together")
    for (entry, _, label), split in zip(placed, splits, strict=True):
        listing.pictures.append(Picture(split, label, _safe_name(entry.path.name, entry.path), entry))
    return listing


# ---------------------------------------------------------------- archives and AI Hub


@contextlib.contextmanager
def _archive_errors(origin: object, mend: str = "download it again") -> Iterator[None]:
    """Turn what a damaged archive raises into one message."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        raise CTError(f"a damaged archive or file '{origin}' ({error})", "a complete one", mend) from error


class _Joined(io.RawIOBase):
    """Several seekable files, one after another, as one: the parts of a split zip, without copying them."""

    def __init__(self, files: list[io.IOBase], sizes: list[int]):
        self.files, self.position = files, 0
        self.ends = np.cumsum(sizes).tolist()

    readable = seekable = lambda self: True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.ends[-1]}[whence]
        if self.position < 0:  # zipfile seeks before the start of a cut file
            raise OSError("seek before the start")
        return self.position

    def readinto(self, buffer) -> int:
        for file, end, start in zip(self.files, self.ends, [0, *self.ends], strict=False):
            if self.position < end:
                file.seek(self.position - start)
                content = file.read(min(len(buffer), end - self.position))
                buffer[: len(content)] = content
                self.position += len(content)
                return len(content)
        return 0


def _open_zip(path: str, parts: list[tuple[int, Entry]], stack: contextlib.ExitStack) -> Iterator[Entry]:
    """Open a zip, joined from its parts if there are several, and give its entries."""
    parts = sorted(parts, key=lambda part: part[0])
    numbers, sizes = [number for number, _ in parts], [entry.size for _, entry in parts]
    mend = "download it again"
    if str(parts[0][1].path) != path:  # it came as .zip.part*
        mend = f"check that '{path}.part{sum(sizes)}' and later parts, if any, are there; else download again"
        counted = range(numbers[0], numbers[0] + len(numbers)) if numbers[0] in (0, 1) else [0]
        wanted = counted if numbers[-1] < 100 else np.cumsum([0, *sizes])  # 0 1 2, 1 2 3, or byte offsets
        for missing in (want for want, number in zip(wanted, numbers, strict=False) if want != number):
            found = f"no part '{path}.part{missing}' (or the part before it is cut short)"
            raise CTError(found, "every .zip.part file in one folder", "download it into the same folder")
    with _archive_errors(path, mend):
        joined = _Joined([stack.enter_context(entry.open()) for _, entry in parts], sizes)
        archive = stack.enter_context(zipfile.ZipFile(io.BufferedReader(joined, 1 << 16)))
        for info in archive.infolist():
            name = info.filename
            if not info.flag_bits & 0x800:  # not marked as UTF-8: zipfile has read the bytes as cp437
                with contextlib.suppress(UnicodeEncodeError):
                    name = _decode_name(name.encode("cp437"))
            if not info.is_dir():
                yield Entry(_inside(path, name), info.file_size, functools.partial(archive.open, info))


def _inside(archive: str, name: str) -> PurePosixPath:
    """Return the path of an archive's entry; one that points outside the archive is an attack."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        found = f"an entry '{name}' in '{archive}' that points outside it"
        raise CTError(found, "relative paths", "do not use this archive")
    return PurePosixPath(archive, name)


def _entries(src: Path, stack: contextlib.ExitStack) -> list[Entry]:
    """Return every file of a delivery but hidden ones, in a fixed order, looking into tars, zips and zips in tars."""
    files = [src] if src.is_file() else sorted(path for path in src.rglob("*") if path.is_file())
    found: list[Entry] = []
    for path in files:
        name = _decode_name(os.fsencode(path.relative_to(src if path != src else src.parent).as_posix()))
        if path.suffix.lower() != ".tar" or HIDDEN.search(name):
            found.append(Entry(PurePosixPath(name), path.stat().st_size, functools.partial(path.open, "rb")))
            continue
        with _archive_errors(name):
            tar = stack.enter_context(tarfile.open(path, "r:"))
            tar.getmembers()
            with path.open("rb") as file:  # tarfile stops at a damaged header as if the archive ended there
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"damaged at byte {tar.offset}")
        for member in tar.getmembers():
            inner = _inside(name, _decode_name(member.name.encode("utf-8", "surrogateescape")))
            if member.isfile():  # links and devices are nothing to import
                found.append(Entry(inner, member.size, functools.partial(tar.extractfile, member)))
    zips: dict[str, list[tuple[int, Entry]]] = {}
    entries = []
    for entry in found:
        path = str(entry.path)
        if part := re.fullmatch(r"(.+\.zip)\.part(\d+)", path, re.IGNORECASE):
            zips.setdefault(part[1] + ".part", []).append((int(part[2]), entry))
        elif path.lower().endswith(".zip") and not HIDDEN.search(path):
            zips[path] = [(0, entry)]
        else:
            entries.append(entry)
    for path, parts in zips.items():
        entries += _open_zip(path.removesuffix(".part"), parts, stack)
    return [entry for entry in entries if not HIDDEN.search(str(entry.path))]


def _parse_label(content: bytes) -> dict | None:
    """Read a label file, UTF-8 with or without BOM or cp949; None when it names no 'filename' and 'label'."""
    for encoding in ("utf-8-sig", "cp949"):
        with contextlib.suppress(ValueError):  # another encoding, or no JSON
            label = json.loads(content.decode(encoding))
            return label if isinstance(label, dict) and {"filename", "label"} <= set(label) else None
    return None


def _list_aihub(src: Path, entries: list[Entry], bar: Callable) -> Listing:
    """List AI Hub data set 71597: join images and JSON labels by split and file name.

    Source: https://aihub.or.kr, data set 71597; layout in the README.
    """
    listing = Listing(meta={"name": "AI Hub 71597"})
    spelling = {label.casefold(): label for label in AIHUB_CLASSES}
    images: dict[tuple[str, str], Entry] = {}
    labels: dict[tuple[str, str], tuple[str, str]] = {}  # (split, filename) -> class, origin
    for entry in bar(entries, desc="read labels"):
        name, suffix = entry.path.name, entry.path.suffix.lower()
        if suffix not in (".json", *IMAGE_SUFFIXES) or name == "dataset.json":
            continue
        split = _split_of(*entry.path.parts, src.resolve().name)
        if split is None:
            raise CTError(f"'{entry.path}' outside Training and Validation", "the two folders", "keep their names")
        if suffix != ".json":
            key = (split, _safe_name(name, entry.path))
            if images.setdefault(key, entry).size != entry.size:
                found = f"two different pictures '{name}': '{images[key].path}' and '{entry.path}'"
                raise CTError(found, "one picture a file name in each split", "remove one of them")
            continue
        content = _parse_label(entry.read())
        if content is None:
            listing.skipped[str(entry.path)] = "not a label: no JSON with 'filename' and 'label'"
            continue
        label = spelling.get(str(content["label"]).strip().casefold())
        if label is None:
            found = f"label '{content['label']}' in '{entry.path}'"
            raise CTError(found, f"one of {', '.join(AIHUB_CLASSES)}", "correct the label file or remove both files")
        name = unicodedata.normalize("NFC", str(content["filename"]).replace("\\", "/")).rsplit("/", 1)[-1]
        first = labels.setdefault((split, name), (label, str(entry.path)))
        if first[0] != label:
            found = f"two labels for '{name}': '{first[0]}' in '{first[1]}' and '{label}' in '{entry.path}'"
            raise CTError(found, "one label a picture", "remove the wrong label file")
    for key, entry in images.items():
        if key in labels:
            listing.pictures.append(Picture(key[0], labels[key][0], key[1], entry))
        else:
            listing.skipped[str(entry.path)] = "image without a label"
    listing.skipped.update({labels[key][1]: "label without an image" for key in labels if key not in images})
    lost = Counter(listing.skipped.values())
    listing.notes += [f"{count} file(s) left out: {reason}" for reason, count in sorted(lost.items())]
    return listing


# ---------------------------------------------------------------- DICOM


def window_to_grey(hu: np.ndarray, window: tuple[float, float] = LUNG_WINDOW) -> np.ndarray:
    """Map HU to grey uint8: level - width/2 becomes 0, level + width/2 becomes 255, clipped.

    Raises:
        CTError: the window's width is not above 0.
    """
    level, width = window
    if not (np.isfinite(window).all() and width > 0):
        raise CTError(f"window {window}", "level and width in HU, width above 0", "give for example -600 1500")
    return np.rint(np.clip((hu - (level - width / 2)) / width, 0, 1) * 255).astype(np.uint8)


def _is_dicom(entry: Entry) -> bool:
    with _archive_errors(entry.path), entry.open() as file:
        return file.read(132)[128:] == b"DICM" or entry.path.suffix.lower() in DICOM_SUFFIXES


def _rescale(dataset, frame: int) -> tuple[float, float]:
    """Return slope and intercept to HU; enhanced CT keeps them in functional groups, per frame or shared."""
    groups = [*dataset.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1]]
    groups += dataset.get("SharedFunctionalGroupsSequence", [])
    holders = [holder for group in groups for holder in group.get("PixelValueTransformationSequence", [])]
    slope, intercept = ((holders or [dataset])[0].get(key) for key in ("RescaleSlope", "RescaleIntercept"))
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def dicom_to_uint8(source, window: tuple[float, float] = LUNG_WINDOW) -> np.ndarray:
    """Read a CT image as grey levels in a HU window.

    MONOCHROME1 (low values shown white) is inverted. Padding outside the scanned circle becomes air,
    and so does whatever is below -1024 HU. Old files without the "DICM" mark are implicit little endian.

    Args:
        source: path of a DICOM file, or a pydicom Dataset.
        window: level and width in HU.
    Returns:
        uint8 (frames, H, W).
    Raises:
        CTError: no CT slice, not a grey picture, or it cannot be read and decoded.
    Source: DICOM PS3.3, C.7.6.3 (Image Pixel), C.7.5.1.1.2 (pixel padding), C.11.1 (Modality LUT).
    """
    return _read_dicom(source, source if isinstance(source, str | Path) else "the dataset", window)[1]


def _read_dicom(source, name: object, window: tuple[float, float]) -> tuple[dict[str, str], np.ndarray]:
    """Read the header's words about the patient, and the grey levels (see `dicom_to_uint8`)."""
    import pydicom

    try:
        dataset = source if isinstance(source, pydicom.Dataset) else pydicom.dcmread(source, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        words = {key: str(dataset.get(key) or "").strip() for key in (*PATIENT_KEYS, "PatientName")}
        modality, photometric = dataset.get("Modality") or "CT", dataset.get("PhotometricInterpretation")
        if "PixelData" not in dataset or modality != "CT" or "LOCALIZER" in (dataset.get("ImageType") or []):
            found = f"no CT slice in '{name}' (modality {modality}; no picture or a scout view?)"
            raise CTError(found, "an axial CT slice", "leave it out")
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise CTError(f"'{name}' with '{photometric}' pixels", "a grey CT picture", "leave it out")
        return words, _to_grey(dataset, window, photometric)
    except CTError:
        raise
    except Exception as error:  # pydicom raises many kinds on a damaged file, and its codecs more
        found = f"'{name}', which cannot be decoded as DICOM ({' '.join(str(error).split())})"
        mend = "copy it again; install pylibjpeg[all], or convert the file to uncompressed DICOM"
        raise CTError(found, "a whole CT slice, uncompressed, RLE or otherwise decodable", mend) from error


def _to_grey(dataset, window: tuple[float, float], photometric: str) -> np.ndarray:
    raw = dataset.pixel_array
    raw = raw[None] if raw.ndim == 2 else raw
    padding = [dataset.get(key) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if padding[0] is not None:  # signed values are often stored as unsigned: 63536 means -2000
        limits = [int(value) for value in padding if value is not None]
        top = 1 << int(dataset.BitsAllocated)
        if dataset.PixelRepresentation:
            limits = [value - top if value >= top // 2 else value for value in limits]
    grey = np.empty(raw.shape, np.uint8)
    for index, frame in enumerate(raw):  # one at a time, so that only one is held as float
        slope, intercept = _rescale(dataset, index)
        hu = frame * np.float32(slope) + np.float32(intercept)
        # Some files fill the corners with -2048 and do not say so: black corners would betray the scanner.
        grey[index] = window_to_grey(np.maximum(hu, AIR_HU), window)
        if photometric == "MONOCHROME1":
            grey[index] = 255 - grey[index]
        if padding[0] is not None:
            outside = (frame >= min(limits)) & (frame <= max(limits))
            grey[index][outside] = window_to_grey(np.array(AIR_HU), window)
    return grey


def _read_labels(entries: dict[str, Entry]) -> list[tuple[Entry, str | None, str]]:
    """Read `labels.csv` (path, class, and split if wanted) as rows of (file, split or None, class)."""
    mend = "write labels.csv as UTF-8 with the columns path,class or path,class,split"
    rows: dict[str, tuple[Entry, str | None, str]] = {}
    try:
        content = io.BytesIO(entries["labels.csv"].read())
        table = pd.read_csv(content, dtype=str, encoding="utf-8-sig", na_filter=False).fillna("")
    except ValueError as error:
        raise CTError(f"labels.csv that cannot be read ({error})", "a CSV file", mend) from error
    for row in table.to_dict("records"):
        path = unicodedata.normalize("NFC", (row.get("path") or "").replace("\\", "/")).removeprefix("./")
        label, split = (row.get("class") or "").strip(), (row.get("split") or "").strip()
        if path not in entries:
            raise CTError(f"path '{row.get('path')}' in labels.csv", "a file below the same folder", mend)
        if split and not _split_of(split):
            raise CTError(f"split '{split}' in labels.csv", "train, val or test", mend)
        new = (entries[path], _split_of(split), _safe_name(label, "labels.csv"))
        if rows.setdefault(path, new) != new:
            raise CTError(f"two labels for '{path}' in labels.csv", "one row a file", mend)
    if len({row[1] is None for row in rows.values()}) > 1:
        raise CTError("rows with and without a split in labels.csv", "a split in all rows or in none", mend)
    return list(rows.values())


def _list_dicom(entries: list[Entry], window: tuple[float, float], bar: Callable) -> Listing:
    """List the conversion of DICOM slices to 8-bit grey PNG.

    Every slice is decoded here once: what cannot be read must be known before splits are drawn.
    """
    window_to_grey(np.array(AIR_HU), window)  # a wrong window shows before anything is read
    listing = Listing(meta={"window": {"level": window[0], "width": window[1], "unit": "HU"}})
    by_path = {str(entry.path): entry for entry in entries}
    dicoms = [entry for entry in entries if _is_dicom(entry)]
    if "labels.csv" in by_path:
        placed = _read_labels(by_path)
        listed = {entry for entry, _, _ in placed}
        listing.skipped = {str(entry.path): "not in labels.csv" for entry in dicoms if entry not in listed}
    else:
        placed, listing.skipped = _place(dicoms)

    @functools.lru_cache(maxsize=1)  # all frames of a file are read once
    def read(entry: Entry) -> tuple[dict[str, str], np.ndarray]:
        with entry.open() as file:
            return _read_dicom(file, entry.path, window)

    def convert(entry: Entry, frame: int) -> io.BytesIO:
        Image.fromarray(read(entry)[1][frame]).save(file := io.BytesIO(), format="PNG")
        return io.BytesIO(file.getvalue())

    rows = []  # (file, split, class, header's words, number of frames)
    for entry, split, label in bar(placed, desc="read slices"):
        try:
            words, frames = read(entry)
            rows.append((entry, split, label or UNLABELLED, words, len(frames)))
        except CTError as error:
            listing.skipped[str(entry.path)] = str(error)
    splits = [split or "train" for _, split, _, _, _ in rows]
    patients, key = _tell_patients(rows)
    if placed and placed[0][2] is None:
        listing.notes.append(f"no class folders and no labels.csv: every slice is of class '{UNLABELLED}'")
    elif rows and rows[0][1] is None:
        what = "patient" if key else "slice"
        groups = [patient or str(row[0].path) for patient, row in zip(patients, rows, strict=True)]
        splits = _assign_splits([row[2] for row in rows], groups, f"{what}(s)")
        listing.notes.append(f"no split folders: {what}s split 70/15/15 by class, seed {SPLIT_SEED}")
    if key not in ("", "PatientID"):
        listing.notes.append(f"PatientID is empty or one for all: what has one {key} counts as one patient")
    if unknown := patients.count(""):
        said = "slices of one patient can stand in several splits, and scores will be too good"
        listing.notes.append(f"no ID, study, series or folder tells the patients of {unknown} file(s) apart: {said}")
    in_splits = Counter(patient for patient, _ in set(zip(patients, splits, strict=True)) if patient)
    if shared := sum(number > 1 for number in in_splits.values()):
        listing.notes.append(f"{shared} patient(s) have slices in several splits: scores will be too good")

    taken: set[str] = set()
    for number, (row, split, patient) in enumerate(zip(rows, splits, patients, strict=True)):
        entry, _, label, words, frames = row
        if _names_patient(label, words):
            raise CTError(f"class folder '{label}' named after a patient", "class names", "write a labels.csv")
        stem = entry.path.stem if entry.path.suffix.lower() in DICOM_SUFFIXES else entry.path.name
        stem = f"slice_{number:05d}" if _names_patient(stem, words) else _safe_name(stem, entry.path)
        if f"{split}/{label}/{stem}".casefold() in taken:  # series often number their slices alike
            stem = f"{stem}_{number:05d}"
        taken.add(f"{split}/{label}/{stem}".casefold())
        for frame in range(frames):
            name = f"{stem}_f{frame + 1:03d}.png" if frames > 1 else f"{stem}.png"
            png = Entry(entry.path, 0, functools.partial(convert, entry, frame))
            listing.pictures.append(Picture(split, label, name, png, patient))
    return listing


def _tell_patients(rows: list[tuple]) -> tuple[list[str], str]:
    """Tell patients apart by the first of PATIENT_KEYS that is not one for all, else by the folder.

    Returns:
        what names each row's patient, "" where nothing does, and the key that was used, "" where none was.
    """
    for place, key in enumerate(PATIENT_KEYS):
        if len({row[3][key] for row in rows} - {""}) > 1:
            return [next((row[3][k] for k in PATIENT_KEYS[place:] if row[3][k]), "") for row in rows], key
    folders = [row[0].path.parts[:-1] for row in rows]
    kinds = {(row[1], row[2]) for row in rows}  # a folder that only names split and class tells no patient
    for depth in range(1, 1 + max(map(len, folders), default=0)):
        names = ["/".join(parts[:depth]) for parts in folders]
        if len({(row[1], row[2], name) for row, name in zip(rows, names, strict=True)}) > len(kinds):
            return names, "folder"
    return [""] * len(rows), ""


def _names_patient(text: str, words: dict[str, str]) -> bool:
    """Tell whether a file or class name gives away the patient's ID or name."""
    names = [words["PatientID"], *re.split(r"[\^= ]+", words["PatientName"])]
    plain = [re.sub(r"[\W_]+", "", name).casefold() for name in (text, *names)]
    return any(len(name) > 2 and name in plain[0] for name in plain[1:])
