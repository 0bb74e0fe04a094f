"""Bring other deliveries into the folder layout: AI Hub archives, DICOM slices, other image folders.

Everything is planned first (a list of `Picture`), so that nearly every mistake is found before anything is
written. Sources are only read, archives in place: gigabytes are never unpacked to a temporary folder. What is left
out is named with its reason.
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

from ctutils import base, data
from ctutils.base import CTError
from ctutils.dicom import DICOM_SUFFIXES, PATIENT_KEYS, is_dicom, read_dicom
from ctutils.kaggle import PREFIX, fetch, same_names
from ctutils.pictures import (
    IMAGE_SUFFIXES,
    LUNG_WINDOW,
    MOST_BYTES,
    BadFile,
    look,
    open_picture,
    quiet,
    to_grey,
)

AIHUB_CLASSES = ("ILD", "Lung_Cancer", "Normal", "pneumonia", "pneumothorax")  # the deck's spelling
IMAGE_FOLDERS = ("image", "images", "원천데이터")  # between split and class in some deliveries
UNLABELLED = "unlabelled"
HIDDEN = re.compile(r"(^|/)\.")
# What systems put beside files by themselves: nothing of the user's.
JUNK = re.compile(r"(^|/)(\._[^/]*|\.DS_Store|__MACOSX/.*|Thumbs\.db|desktop\.ini|\.tmp-[^/]*)$", re.IGNORECASE)
PACKED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".alz", ".egg")
TABLES = ("labels.csv", "patients.csv", "dataset.json")  # at the top: read, not copied
LONGEST = 200  # bytes of a file's name without its suffix; systems take 255 with all
ODD = re.compile(r'[<>:"/\\|?*\x00-\x1f\ufffd]|^\.|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\..*)?$', re.IGNORECASE)
ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, LookupError)
LABELS_CSV = "labels.csv with the columns path,class[,split][,patient]; a path is a file or a folder below it"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a delivery, on disk or inside archives; `path` names folders and archives on the way, in NFC."""

    path: PurePosixPath
    size: int
    open: Callable[[], io.IOBase]

    def read(self, most: int = MOST_BYTES) -> bytes:
        """Return its content; raises `BadFile` where it is larger than a slice may be."""
        with _archive_errors(self.path), self.open() as file:
            content = file.read(most + 1) if self.size <= most else b""
        if max(self.size, len(content)) > most:
            raise BadFile(f"{self.size} bytes, more than {most}")
        return content


@dataclasses.dataclass(frozen=True)
class Picture:
    """One file to write: `<out>/<split>/<label>/<name>`.

    Attributes:
        entry: its content; for DICOM made when it is read.
        patient: what tells its patient from others, "" when unknown; only its hash is ever written.
        checked: it has been decoded; else that is done before it is written.
    """

    split: str
    label: str
    name: str
    entry: Entry
    patient: str = ""
    checked: bool = False

    @property
    def path(self) -> str:
        return f"{self.split}/{self.label}/{self.name}"


@dataclasses.dataclass
class Row:
    """One file of a listing: its place, what tells its patient, and what decoding it has shown."""

    entry: Entry
    split: str | None
    label: str | None
    patient: str = ""
    words: dict[str, str] = dataclasses.field(default_factory=dict)  # of DICOM
    frames: int = 1
    sketch: tuple | None = None  # of a picture: what tells twins


@dataclasses.dataclass
class Listing:
    """What an import will write, what it leaves out (origin -> reason), and what to tell the user."""

    pictures: list[Picture] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    facts: dict[str, dict] = dataclasses.field(default_factory=dict)  # of `pictures.look`, for each decoded picture
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
        src: a folder, or one .tar or .zip; never changed. Or `kaggle:OWNER/NAME`, which is downloaded first.
        out: a new folder, or the one of an earlier, stopped import of the same source.
        format: "aihub", "dicom" or "folder"; None looks.
        window: level and width in HU, for DICOM.
        salt: mixed into patient hashes; None draws a new one. It is never written.
        progress: show a bar.
    Returns:
        {"format", "name", "out", "counts": {split: {class: n}}, "images", "written", "already_there",
        "skipped": [{"path", "reason"}], "notes": [...]}; ready for JSON.
    Raises:
        CTError: nothing to import, contradicting labels, patients instead of classes, a damaged or unsafe archive, a
            missing zip part, `out` inside `src`, or `out` with other files.
    """
    asked = str(src) if str(src).startswith(PREFIX) else ""
    src, out = fetch(asked) if asked else Path(src), Path(out)
    if not src.exists():
        raise CTError(f"no file or folder '{src}'", "a delivery to import", "check the path")
    if out.resolve().is_relative_to(src.resolve()):
        raise CTError(f"'{out}' inside the source '{src}'", "a separate output folder", "give another OUT")
    if not (np.isfinite(window).all() and window[1] > 0):
        raise CTError(f"window {window}", "level and width in HU, width above 0", "give for example -600 1500")
    bar = functools.partial(base.progress, unit="file") if progress else lambda items, desc: items
    with quiet(), contextlib.ExitStack() as stack:  # archives stay open until the last picture is copied
        listing = Listing()
        entries = _entries(src, stack, listing.skipped)
        format = format or _find_format(entries)
        if format == "aihub":
            _list_aihub(listing, src, entries, bar)
        elif format in ("dicom", "folder"):
            _list_slices(listing, src, entries, window if format == "dicom" else None, bar)
        else:
            raise CTError(f"format '{format}'", "one of aihub, dicom, folder", "give one of these, or none")
        listing.meta |= {"name": asked} if asked else {}
        if listing.pictures:
            return _write(out, format, listing, salt or secrets.token_hex(16), bar)
        raise _nothing(src, format, listing.skipped)


def _nothing(src: Path | str, format: str, skipped: dict[str, str]) -> CTError:
    reasons = "; ".join(f"{origin}: {reason}" for origin, reason in list(skipped.items())[:3])
    found = f"no images to import in '{src}' as format '{format}' ({reasons or 'no files of this kind'})"
    mend = "check the path, or give another --format"
    return CTError(found, "AI Hub's files, DICOM or an image folder", mend, files=skipped)


def _write(out: Path, format: str, listing: Listing, salt: str, bar: Callable) -> dict:
    """Write every picture of the listing that is not there yet, and describe the result."""
    meta = {"name": out.resolve().name, "kind": "real", "format": format, **listing.meta}
    _check_names(listing.pictures)
    _check_out(out, listing.pictures, meta)
    missing = [picture for picture in listing.pictures if not (out / picture.path).exists()]
    if missing:
        base.write_json(out / "dataset.json", {**meta, "complete": False})
    bad, planned = set(), sorted({(p.split, p.label) for p in listing.pictures})
    for picture in bar(missing, desc="import"):
        try:
            content = picture.entry.read()
            if not picture.checked:
                _decode(listing, picture.entry.path, content)
        except BadFile as error:
            listing.skipped[str(picture.entry.path)] = str(error)
            bad.add(picture.path)
            continue
        with base.atomic_path(out / picture.path) as temporary:
            temporary.write_bytes(content)
    pictures = [picture for picture in listing.pictures if picture.path not in bad]
    if not pictures:
        (out / "dataset.json").unlink(missing_ok=True)
        raise _nothing(out, format, listing.skipped)
    if any(picture.patient for picture in pictures):
        hashes = [hashlib.sha256((salt + p.patient).encode()).hexdigest()[:16] if p.patient else "" for p in pictures]
        table = pd.DataFrame({"path": [p.path for p in pictures], "patient": hashes})
        with base.atomic_path(out / "patients.csv") as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n")
    found = {split: Counter(p.label for p in pictures if p.split == split) for split in data.SPLITS}
    counts = {split: dict(sorted(of_split.items())) for split, of_split in found.items() if of_split}
    facts = pd.DataFrame([{"problem": "", **one} for one in listing.facts.values()])
    notes = listing.notes + data.describe(facts)
    odd = [f"'{path}': {why}" for path, why in zip(listing.facts, facts.get("problem", ()), strict=False) if why]
    notes += [f"copied, but train will refuse {'; '.join(odd)}"] * bool(odd)
    notes += [f"{n} file(s) left out: {reason}" for reason, n in sorted(Counter(listing.skipped.values()).items())]
    notes += [f"no slice of class '{label}' is left in {split}" for split, label in planned if not found[split][label]]
    base.write_json(
        out / "dataset.json",
        {**meta, "counts": counts, "skipped": len(listing.skipped), "notes": notes, "complete": True},
    )
    return {
        "format": format,
        "name": meta["name"],
        "out": str(out),
        "counts": counts,
        "images": len(pictures),
        "written": len(missing) - len(bad),
        "already_there": len(listing.pictures) - len(missing),
        "skipped": [{"path": origin, "reason": reason} for origin, reason in listing.skipped.items()],
        "notes": notes,
    }


def _decode(listing: Listing, path: PurePosixPath, content: bytes) -> Image.Image | None:
    """Return a picture in grey, None where only its data set can tell the depth; raises `BadFile`."""
    with open_picture(io.BytesIO(content)) as image:
        listing.facts[str(path)] = look(io.BytesIO(content))
        with contextlib.suppress(BadFile):
            return to_grey(image)
    return None


def _check_out(out: Path, pictures: list[Picture], meta: dict) -> None:
    """Refuse an output folder that holds anything but an earlier run of the same import."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    old = base.read_json(out / "dataset.json") if (out / "dataset.json").exists() else {}
    same = all(old.get(key) == meta.get(key) for key in ("name", "format", "window"))
    for left_over in out.rglob(".tmp-*") if same else ():  # from an import that was killed
        left_over.unlink()
    there = (path for split in data.SPLITS for path in (out / split).rglob("*") if path.is_file())
    others = {path.relative_to(out).as_posix() for path in there} - {picture.path for picture in pictures}
    if others or not same:
        found = f"'{out}' with other files" + (f", such as '{min(others)}'" if others else "")
        raise CTError(found, "a new folder, or one left by the same import", "give another OUT")


def _check_names(pictures: list[Picture]) -> None:
    """Refuse targets that would overwrite each other, also on disks that ignore case."""
    labels = sorted({picture.label for picture in pictures})
    if len({label.casefold() for label in labels}) < len(labels):
        raise CTError(f"classes {labels}, some differ only by case", "one spelling for each", "rename the folders")
    twice = [path for path, count in Counter(p.path.casefold() for p in pictures).items() if count > 1]
    if twice:
        raise CTError(f"two pictures for '{twice[0]}'", "one name for one picture in a class", "rename one of them")


def _find_format(entries: list[Entry]) -> str:
    """Tell the format from AI Hub labels, else by what is more: DICOM files or pictures."""
    labels = [entry for entry in entries if entry.path.suffix.lower() == ".json"][:5]
    if any(_parse_label(entry) for entry in labels):
        return "aihub"
    pictures = sum(entry.path.suffix.lower() in IMAGE_SUFFIXES for entry in entries)
    return "dicom" if sum(map(_is_dicom, entries)) > pictures else "folder"


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
        if _plain(part) in data.SPLIT_NAMES:
            return data.SPLIT_NAMES[_plain(part)]
        if short := re.match(r"([TV])[SL]([_.].*)?\.(zip|tar)$", part):
            return {"T": "train", "V": "val"}[short[1]]
    return None


def _class_name(name: str, origin: object) -> str:
    """Return a class's name when it can be a folder on every system."""
    name = unicodedata.normalize("NFC", name)
    if not name or ODD.search(name) or len(name.encode("utf-8", "replace")) > LONGEST:
        raise CTError(f"the name '{name}' in '{origin}'", "a plain folder name", "rename it at the source")
    return name


def _file_stem(stem: str) -> str:
    """Return a file's name without its suffix as every system takes it: odd characters replaced, cut where too long."""
    plain = re.sub(r'[<>:"/\\|?*\x00-\x1f\ufffd]', "_", stem).strip(". ")
    plain = f"_{plain}" if ODD.search(plain) or not plain else plain
    raw = plain.encode("utf-8", "replace")
    if len(raw) > LONGEST:
        mark = hashlib.sha256(raw).hexdigest()[:8]
        plain = f"{raw[: LONGEST - 9].decode('utf-8', 'ignore')}_{mark}"
    return plain


def _place(entries: list[Entry], skipped: dict[str, str]) -> list["Row"]:
    """Find split and class of each file from its folders: `[.../][split/][image/]<class>/.../file`.

    Where some file has a split (or a class), those without one are left out.
    """
    folders = [entry.path.parts[:-1] for entry in entries]
    start = len(os.path.commonprefix(folders))  # depth of the class folders where there is no split
    if start and len(set(folders)) == 1:
        start -= 1  # a single class folder
    names: dict[str, set[str]] = {}
    rows = []
    for entry, parts in zip(entries, folders, strict=True):
        at = next((i for i, part in enumerate(parts) if _split_of(part)), None)
        split = None if at is None else _split_of(parts[at])
        below = parts[start:] if at is None else parts[at + 1 :]
        if split:
            names.setdefault(split, set()).add("/".join(parts[: at + 1]))
            below = below[1:] if below and _plain(below[0]) in IMAGE_FOLDERS else below
        rows.append(Row(entry, split, _class_name(below[0], entry.path) if below else None))
    for split, found in names.items():
        if len(found) > 1:
            several = f"{len(found)} folders for the split '{split}': {sorted(found)}"
            raise CTError(several, "one folder a split", "remove or rename one of them")
    for which, reason in (("split", "outside the split folders"), ("label", "not in a class folder")):
        if any(getattr(row, which) for row in rows):
            skipped.update({str(row.entry.path): reason for row in rows if not getattr(row, which)})
            rows = [row for row in rows if getattr(row, which)]
    return rows


# ---------------------------------------------------------------- archives and AI Hub


@contextlib.contextmanager
def _archive_errors(origin: object, mend: str = "download it again") -> Iterator[None]:
    """Turn what a damaged archive raises into one message."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        mend = "unpack it with its password, and import the folder" if "encrypted" in str(error) else mend
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


def _open_zip(
    path: str, parts: list[tuple[int, Entry]], stack: contextlib.ExitStack, skipped: dict[str, str]
) -> Iterator[Entry]:
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
            inner = _inside(path, name)
            if info.external_attr >> 16 & 0o170000 == 0o120000:
                skipped[str(inner)] = "a link"
            elif not info.is_dir():
                yield Entry(inner, info.file_size, functools.partial(archive.open, info))


def _inside(archive: str, name: str) -> PurePosixPath:
    """Return the path of an archive's entry; one that points outside the archive is an attack."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        found = f"an entry '{name}' in '{archive}' that points outside it"
        raise CTError(found, "relative paths", "do not use this archive")
    return PurePosixPath(archive, name)


def _entries(src: Path, stack: contextlib.ExitStack, skipped: dict[str, str]) -> list[Entry]:
    """Return every file of a delivery in a fixed order, looking into tars, zips and zips in tars.

    What cannot be one goes to `skipped`: links to nowhere or to folders, hidden files, archives inside archives.
    """

    def fail(error: OSError):
        raise error

    if src.is_file():
        files = [src]
    else:
        walk = [(Path(here), folders + names) for here, folders, names in os.walk(src, onerror=fail)]
        files = sorted(here / name for here, names in walk for name in names)
    found: list[Entry] = []
    for path in files:
        name = _decode_name(os.fsencode(path.relative_to(src if path != src else src.parent).as_posix()))
        if not path.is_file():
            if path.is_symlink() or not path.is_dir():
                skipped[name] = "a link to a folder or to nothing" if path.is_symlink() else "no file"
            continue
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
                if member.isfile() or member.islnk():  # a hard link is its file under a second name
                    file = tar._find_link_target(member) if member.islnk() else member
                    found.append(Entry(inner, file.size, functools.partial(tar.extractfile, file)))
                elif not member.isdir():
                    skipped[str(inner)] = "a link" if member.issym() else "no file"
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
        entries += _open_zip(path.removesuffix(".part"), parts, stack, skipped)
    entries = [entry for entry in entries if not JUNK.search(str(entry.path))]
    for entry in entries:
        if HIDDEN.search(str(entry.path)):
            skipped[str(entry.path)] = "hidden: its name, or a folder's, begins with a dot"
        elif entry.path.name.lower().endswith(PACKED):
            skipped[str(entry.path)] = "an archive inside an archive, or of a kind that is not opened: unpack it"
    return [entry for entry in entries if str(entry.path) not in skipped]


def _parse_label(entry: Entry) -> dict | None:
    """Read a label file, UTF-8 with or without BOM or cp949; None when it names no 'filename' and 'label'."""
    with contextlib.suppress(BadFile):
        content = entry.read(most=1 << 20)
        for encoding in ("utf-8-sig", "cp949"):
            with contextlib.suppress(ValueError, RecursionError):  # another encoding, or no JSON
                label = json.loads(content.decode(encoding))
                return label if isinstance(label, dict) and {"filename", "label"} <= set(label) else None
    return None


def _list_aihub(listing: Listing, src: Path, entries: list[Entry], bar: Callable) -> None:
    """List AI Hub data set 71597: join images and JSON labels by split and file name.

    Source: https://aihub.or.kr, data set 71597; layout in the README.
    """
    listing.meta = {"name": "AI Hub 71597"}
    spelling = {label.casefold(): label for label in AIHUB_CLASSES}
    images: dict[tuple[str, str], Entry] = {}
    labels: dict[tuple[str, str], tuple[str, str]] = {}  # (split, filename) -> class, origin
    for entry in bar(entries, desc="read labels"):
        name, suffix = entry.path.name, entry.path.suffix.lower()
        if suffix not in (".json", *IMAGE_SUFFIXES):
            listing.skipped[str(entry.path)] = "neither a picture nor a label"
        if suffix not in (".json", *IMAGE_SUFFIXES) or name == "dataset.json":
            continue
        split = _split_of(*entry.path.parts, src.resolve().name)
        if split is None:
            raise CTError(f"'{entry.path}' outside Training and Validation", "the two folders", "keep their names")
        if suffix != ".json":
            key = (split, name)
            if images.setdefault(key, entry).size != entry.size:
                found = f"two different pictures '{name}': '{images[key].path}' and '{entry.path}'"
                raise CTError(found, "one picture a file name in each split", "remove one of them")
            continue
        content = _parse_label(entry)
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
            name = _file_stem(entry.path.stem) + entry.path.suffix
            listing.pictures.append(Picture(key[0], labels[key][0], name, entry))
        else:
            listing.skipped[str(entry.path)] = "image without a label"
    listing.skipped.update({labels[key][1]: "label without an image" for key in labels if key not in images})


# ---------------------------------------------------------------- folders of pictures, and DICOM


def _is_dicom(entry: Entry) -> bool:
    if entry.path.suffix.lower() in (*IMAGE_SUFFIXES, ".json", ".csv", ".txt"):
        return False
    with _archive_errors(entry.path), entry.open() as file:
        return is_dicom(file.read(132), entry.path.name)


def _read_labels(table: Entry, entries: list[Entry], skipped: dict[str, str]) -> list[Row]:
    """Read `labels.csv`; a row's path is a file or a folder, whose files all get its class."""
    mend = f"write {LABELS_CSV}"
    home, rows = table.path.parent, {}  # path below the table's folder -> split, class, patient
    below = {str(e.path.relative_to(home)): e for e in entries if e.path.is_relative_to(home)}
    known = {str(path) for name in below for path in (PurePosixPath(name), *PurePosixPath(name).parents)}
    try:
        content = data.read_table(table.read())
    except ValueError as error:
        raise CTError(f"labels.csv that cannot be read ({error})", "a CSV file", mend) from error
    lower = {name.strip().lower(): name for name in reversed(content.columns)}
    names = {"path": data.PATH_COLUMNS, "class": ("class", "label"), "split": ("split",)}
    names |= {"patient": data.PATIENT_COLUMNS}
    columns = {key: next((lower[name] for name in some if name in lower), None) for key, some in names.items()}
    if not (columns["path"] and columns["class"]):
        raise CTError(f"labels.csv with the columns {', '.join(content)}", "path and class", mend)
    for row in content.to_dict("records"):
        path, label, split, patient = (row[columns[key]].strip() if columns[key] else "" for key in names)
        path = unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./").rstrip("/")
        if path not in known:
            raise CTError(f"path '{path}' in labels.csv", "a slice, or a folder of some, below the same folder", mend)
        if split and not _split_of(split):
            raise CTError(f"split '{split}' in labels.csv", "train, val or test", mend)
        new = (_split_of(split), _class_name(label, "labels.csv"), patient)
        if rows.setdefault(path, new) != new:
            raise CTError(f"two labels for '{path}' in labels.csv", "one row a file", mend)
    if len({row[0] is None for row in rows.values()}) > 1:
        raise CTError("rows with and without a split in labels.csv", "a split in all rows or in none", mend)
    placed = []
    for name, entry in below.items():
        told = [rows[str(p)] for p in (PurePosixPath(name), *PurePosixPath(name).parents) if str(p) in rows]
        placed += [Row(entry, *told[0])] if told else []
    listed = {row.entry for row in placed}
    skipped.update({str(entry.path): "not in labels.csv" for entry in entries if entry not in listed})
    return placed


def _find_rows(listing: Listing, src: Path, entries: list[Entry], dicom: bool) -> list[Row]:
    """Return the files of this kind with split, class and patient as folders and tables tell them."""
    mine = [e for e in entries if (_is_dicom(e) if dicom else e.path.suffix.lower() in IMAGE_SUFFIXES)]
    for entry in (entry for entry in entries if entry not in set(mine)):
        other = "a DICOM file" if not dicom and _is_dicom(entry) else "neither DICOM nor a picture by its name"
        other = "a picture" if dicom and entry.path.suffix.lower() in IMAGE_SUFFIXES else other
        if str(entry.path) not in TABLES:
            listing.skipped[str(entry.path)] = (
                other if "neither" in other else f"{other} (--format takes the other kind)"
            )
    tables = [entry for entry in entries if entry.path.name == "labels.csv"]
    rows = _read_labels(tables[0], mine, listing.skipped) if tables else _place(mine, listing.skipped)
    labels = sorted({row.label for row in rows if row.label})
    if not tables and data.are_patients(labels):
        found = f"{len(labels)} folders that look like patients ({', '.join(labels[:3])}, ...), not classes, in '{src}'"
        raise CTError(found, "one folder a class", f"write {LABELS_CSV}, and put it into the folder")
    if rows and not dicom and rows[0].label is None:
        found = f"pictures without class folders in '{src}'"
        raise CTError(found, "<class>/*.png", f"sort them into class folders, or write {LABELS_CSV}")
    if src.is_dir():
        known = data.read_patients(src, pd.Series([str(row.entry.path) for row in rows], dtype=str))[0]
        for row, patient in zip(rows, known, strict=True):
            row.patient = row.patient or patient
    return rows


def _list_slices(
    listing: Listing, src: Path, entries: list[Entry], window: tuple[float, float] | None, bar: Callable
) -> None:
    """List an image folder, or with a window the conversion of DICOM slices to 8-bit grey PNG.

    What is to be split is decoded here: what cannot be read must be known before. So is all DICOM.
    """
    listing.meta = {"name": src.resolve().name}
    if window:
        listing.meta = {"window": {"level": window[0], "width": window[1], "unit": "HU"}}
    elif (src / "dataset.json").is_file():  # a synthetic set stays synthetic when it is copied
        listing.meta |= {k: v for k, v in base.read_json(src / "dataset.json").items() if k in ("name", "kind")}

    @functools.lru_cache(maxsize=1)  # all frames of a file are read once
    def read(entry: Entry) -> tuple[np.ndarray, dict[str, str]]:
        return read_dicom(entry.read(), window)

    def convert(entry: Entry, frame: int) -> io.BytesIO:
        Image.fromarray(read(entry)[0][frame]).save(file := io.BytesIO(), format="PNG")
        return io.BytesIO(file.getvalue())

    found, rows = _find_rows(listing, src, entries, bool(window)), []
    named = any(entry.path.name == "labels.csv" for entry in entries)
    names = {} if named else same_names({(row.split, row.label) for row in found if row.label})
    for row in found:
        row.label = names.get(row.label, row.label)
    listing.notes += [f"class folder '{a}' counts as '{b}', its name in another split" for a, b in names.items()]
    draw = bool(found) and found[0].split is None and found[0].label is not None
    for row in bar(found, desc="read slices") if window or draw else ():
        try:
            if window:
                frames, row.words = read(row.entry)
                grey, row.frames = Image.fromarray(frames[0]), len(frames)
            else:
                grey = _decode(listing, row.entry.path, row.entry.read())
            row.sketch = _sketch(grey) if draw and grey and not row.patient else None
            rows.append(row)
        except (BadFile, CTError) as error:
            listing.skipped[str(row.entry.path)] = str(error)
    rows = rows if window or draw else found
    key = _tell_patients(rows)
    splits = [row.split or "train" for row in rows]
    if window and found and found[0].label is None:
        listing.notes.append(f"no class folders and no labels.csv: every slice is of class '{UNLABELLED}'")
    elif rows and draw:
        splits = _draw(listing, rows, key)
    if key not in ("", "PatientID", "table"):
        listing.notes.append(f"no ID tells the patients apart: what has one {key} counts as one patient")
    unknown = sum(not row.patient for row in rows)
    if unknown and (window or draw):
        said = "slices of one patient can stand in several splits, and scores will be too good"
        listing.notes.append(f"no ID, study, series or folder tells the patients of {unknown} file(s) apart: {said}")
    in_splits = Counter(
        patient for patient, _ in {(r.patient, s) for r, s in zip(rows, splits, strict=True)} if patient
    )
    if shared := sum(number > 1 for number in in_splits.values()):
        listing.notes.append(f"{shared} patient(s) have slices in several splits: scores will be too good")

    taken: set[str] = set()
    for number, (row, split) in enumerate(zip(rows, splits, strict=True)):
        entry, label = row.entry, row.label or UNLABELLED
        if _names_patient(label, row.words):
            raise CTError(f"class folder '{label}' named after a patient", "class names", f"write {LABELS_CSV}")
        known = entry.path.suffix.lower() in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES)
        stem, suffix = entry.path.stem if known else entry.path.name, ".png" if window else entry.path.suffix
        stem = f"slice_{number:05d}" if _names_patient(stem, row.words) else _file_stem(stem)
        if f"{split}/{label}/{stem}{suffix}".casefold() in taken:  # series often number their slices alike
            stem = f"{stem}_{number:05d}"
        taken.add(f"{split}/{label}/{stem}{suffix}".casefold())
        for frame in range(row.frames):
            name = f"{stem}_f{frame + 1:03d}{suffix}" if row.frames > 1 else f"{stem}{suffix}"
            one = Entry(entry.path, 0, functools.partial(convert, entry, frame)) if window else entry
            listing.pictures.append(Picture(split, label, name, one, row.patient, checked=bool(window) or draw))


def _sketch(grey: Image.Image) -> tuple:
    from ctutils.audit import sketch

    return sketch(grey)


def _draw(listing: Listing, rows: list[Row], key: str) -> list[str]:
    """Draw the splits of rows that have a class: patients stay together, and near twins of unknown patients."""
    groups, unknown = [row.patient for row in rows], [at for at, row in enumerate(rows) if not row.patient]
    if unknown:
        from ctutils.audit import group_sketches

        for at, number in zip(unknown, group_sketches([rows[at].sketch for at in unknown]), strict=True):
            groups[at] = f"twins {number}"
    labels = [row.label for row in rows]
    each = pd.DataFrame({"label": labels, "group": groups}).groupby("label")["group"].nunique()
    if key and len(each) > 2 and each.max() == 1:
        found = f"{len(each)} class folders of one patient each ({', '.join(each.index[:3])}, ...)"
        raise CTError(found, "classes, each of several patients", f"write {LABELS_CSV}, and put it into the folder")
    splits = data.share_out(labels, groups, {"train": 1 - 2 * data.SHARE, "val": data.SHARE, "test": data.SHARE})
    by = "patients" if key else "slices"
    twins = ", near twins kept together" if unknown else ""
    listing.notes.append(f"no split folders: {by} split 70/15/15 by class, seed {data.SPLIT_SEED}{twins}")
    return splits


def _tell_patients(rows: list[Row]) -> str:
    """Set `patient` of each row: from a table, else by the first of PATIENT_KEYS that tells patients apart, else the
    folder; "" where nothing does.

    Returns:
        what was used: "table", a key, "folder" or "".
    """
    if any(row.patient for row in rows):
        return "table"
    told = {key: {row.words.get(key, "") for row in rows} - {""} for key in PATIENT_KEYS}
    for place, key in enumerate(PATIENT_KEYS):
        later = any(1 < len(told[other]) < len(rows) for other in PATIENT_KEYS[place + 1 :])
        if len(told[key]) > 1 and not (len(told[key]) == len(rows) and later):  # one ID a file is none
            for row in rows:
                row.patient = next((row.words[k] for k in PATIENT_KEYS[place:] if row.words.get(k)), "")
            return key
    folders = [row.entry.path.parts[:-1] for row in rows]
    kinds = {(row.split, row.label) for row in rows}  # a folder that only names split and class tells no patient
    for depth in range(1, 1 + max(map(len, folders), default=0)):
        names = ["/".join(parts[:depth]) if len(parts) >= depth else "" for parts in folders]
        found = {(row.split, row.label, name) for row, name in zip(rows, names, strict=True) if name}
        if len(found) > len(kinds):
            if min(Counter((split, label) for split, label, _ in found).values()) < 3 and rows[0].split is None:
                return ""  # too few to be patients
            for row, name in zip(rows, names, strict=True):
                row.patient = name
            return "folder"
    return ""


def _names_patient(text: str, words: dict[str, str]) -> bool:
    """Tell whether a file or class name gives away the patient's ID or name."""
    names = [words.get("PatientID", ""), *re.split(r"[\^= ]+", words.get("PatientName", ""))]
    plain = [re.sub(r"[\W_]+", "", name).casefold() for name in (text, *names)]
    return any(len(name) > 2 and name in plain[0] for name in plain[1:])
