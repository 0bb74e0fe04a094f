"""Bring other deliveries into the folder layout: AI Hub archives, DICOM slices, other image folders.

Everything is planned first (a list of `Picture`), so that nearly every mistake is found before anything is
written. Sources are only read, archives in place: gigabytes are never unpacked to a temporary folder.
"""

import contextlib
import csv
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
from PIL import Image

from ctutils import base
from ctutils.base import CTError
from ctutils.data import IMAGE_SUFFIXES, SPLIT_NAMES, SPLITS

FORMATS = ("aihub", "dicom", "folder")
AIHUB_CLASSES = ("ILD", "Lung_Cancer", "Normal", "pneumonia", "pneumothorax")  # the deck's spelling
LUNG_WINDOW = (-600, 1500)  # level, width in HU
AIR_HU = -1024.0  # the lowest value of the CT scale, outside the body; grey 55 in the lung window
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}
SPLIT_SEED = 0
IMAGE_FOLDERS = ("image", "images", "원천데이터")  # between split and class in some deliveries
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
UNLABELLED = "unlabelled"
ARCHIVE_NAME = re.compile(r"\.(tar|zip|zip\.part\d+)$", re.IGNORECASE)
ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One file to write: `<out>/<split>/<label>/<name>`.

    Attributes:
        origin: where it comes from, for messages.
        size: bytes it will have, or None when only reading tells.
        read: returns the bytes to write.
        patient: patient ID, "" when unknown; only its hash is ever written.
    """

    split: str
    label: str
    name: str
    origin: str
    size: int | None
    read: Callable[[], bytes]
    patient: str = ""

    @property
    def path(self) -> str:
        return f"{self.split}/{self.label}/{self.name}"


@dataclasses.dataclass
class Plan:
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

    A stopped import goes on where it stopped when it is run again: files already there in full are kept.

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
            `out` inside `src`, or files on disk that are not the expected ones.
    """
    src, out = Path(src), Path(out)
    if not src.exists():
        raise CTError(f"no file or folder '{src}'", "a delivery to import", "check the path")
    if out.resolve().is_relative_to(src.resolve()):
        raise CTError(f"'{out}' inside the source '{src}'", "a separate output folder", "give another OUT")
    files = _files(src)
    format = format or _find_format(src, files)
    with contextlib.ExitStack() as stack:  # archives stay open until the last picture is copied
        if format == "aihub":
            plan = _plan_aihub(src, files, stack, progress)
        elif format == "dicom":
            plan = _plan_dicom(src, out, files, window, progress)
        elif format == "folder":
            plan = _plan_folder(src, files)
        else:
            raise CTError(f"format '{format}'", f"one of {', '.join(FORMATS)}", "give one of these, or none")
        if not plan.pictures:
            reasons = "; ".join(sorted(set(plan.skipped.values()))[:3])
            raise CTError(
                f"no images to import in '{src}'" + (f" ({reasons})" if reasons else ""),
                f"pictures in the layout of format '{format}'",
                "check that the delivery is complete, or give another --format",
            )
        return _write(src, out, format, plan, salt or secrets.token_hex(16), progress)


def _write(src: Path, out: Path, format: str, plan: Plan, salt: str, progress: bool) -> dict:
    """Write every picture of the plan, hold the disk against the plan, and describe the result."""
    meta = {"name": out.resolve().name, "kind": "real", "format": format, **plan.meta}
    _check_names(plan)
    _check_out(out, plan, meta)
    written, expected = 0, []
    for picture in _bar(plan.pictures, "import", progress):
        target = out / picture.path
        if not (target.exists() and picture.size in (None, target.stat().st_size)):
            try:
                content = picture.read()
            except CTError as error:
                if format != "dicom":  # a damaged archive puts all in doubt, one damaged slice does not
                    raise
                plan.skipped[picture.origin] = str(error)
                continue
            if not written:
                base.write_json(out / "dataset.json", {**meta, "complete": False})
            with base.atomic_path(target) as temporary:
                temporary.write_bytes(content)
            written += 1
        expected.append(picture)
    if not expected:
        raise CTError(
            f"no readable slice in '{src}'; the first: {next(iter(plan.skipped.values()))}",
            "at least one slice that can be read",
            "follow the first message",
        )
    wrong = _on_disk(out) ^ {picture.path for picture in expected}
    if wrong:
        raise CTError(
            f"{len(_on_disk(out))} files in '{out}', '{min(wrong)}' missing or too many",
            f"exactly the {len(expected)} files of this import",
            "delete that folder and import again",
        )
    if format == "dicom":
        _write_patients(out / "patients.csv", expected, salt)
        in_splits = Counter(patient for patient, _ in {(p.patient, p.split) for p in expected if p.patient})
        if shared := sum(splits > 1 for splits in in_splits.values()):
            plan.notes.append(f"{shared} patient(s) have slices in several splits: scores will be too good")
    counts: dict[str, dict[str, int]] = {}
    for (split, label), number in sorted(Counter((p.split, p.label) for p in expected).items()):
        counts.setdefault(split, {})[label] = number
    counts = {split: counts[split] for split in SPLITS if split in counts}
    end = {"counts": counts, "skipped": len(plan.skipped), "notes": plan.notes, "complete": True}
    base.write_json(out / "dataset.json", {**meta, **end})
    return {
        "format": format,
        "name": meta["name"],
        "out": str(out),
        "counts": counts,
        "images": len(expected),
        "written": written,
        "already_there": len(expected) - written,
        "skipped": [{"path": origin, "reason": reason} for origin, reason in plan.skipped.items()],
        "notes": plan.notes,
    }


def _bar(items: list, what: str, progress: bool):
    return base.progress(items, desc=what, unit="file") if progress else items


def _on_disk(out: Path) -> set[str]:
    files = (path for split in SPLITS for path in (out / split).rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix() for path in files}


def _check_out(out: Path, plan: Plan, meta: dict) -> None:
    """Refuse an output folder that holds anything but an earlier run of the same import."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    marker = out / "dataset.json"
    old = base.read_json(marker) if marker.exists() else {}
    same = all(old.get(key) == meta.get(key) for key in ("name", "format", "window"))
    if same:
        for left_over in out.rglob(".tmp-*"):  # from an import that was killed
            left_over.unlink()
    others = _on_disk(out) - {picture.path for picture in plan.pictures}
    if others or not same:
        raise CTError(
            f"'{out}' with other files" + (f", such as '{min(others)}'" if others else ""),
            "a new folder, or one left by the same import",
            "give another OUT",
        )


def _check_names(plan: Plan) -> None:
    """Refuse targets that would overwrite each other, also on disks that ignore case."""
    seen: dict[str, str] = {}
    for picture in plan.pictures:
        first = seen.setdefault(picture.path.casefold(), picture.origin)
        if first != picture.origin:
            raise CTError(
                f"two pictures for '{picture.path}': '{first}' and '{picture.origin}'",
                "one name for one picture in a class, whatever the case",
                "rename or remove one of them",
            )
    spelling: dict[str, str] = {}
    for label in sorted({picture.label for picture in plan.pictures}):
        if spelling.setdefault(label.casefold(), label) != label:
            raise CTError(
                f"classes '{spelling[label.casefold()]}' and '{label}', which differ only by case",
                "one spelling for one class",
                "rename the folders to one spelling",
            )


# ---------------------------------------------------------------- names and folders


def _files(src: Path) -> list[Path]:
    """Return every file below `src` in a fixed order, without hidden ones."""
    if src.is_file():
        return [src]
    found = (path for path in src.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(src).parts))


def _find_format(src: Path, files: list[Path]) -> str:
    """Tell the format from archives, AI Hub labels, DICOM files or pictures, in this order."""
    folders = {_plain(part) for path in files for part in path.relative_to(src).parts[:-1]}
    if folders & {"원천데이터", "라벨링데이터"} or any(ARCHIVE_NAME.search(path.name) for path in files):
        return "aihub"
    labels = [path for path in files if path.suffix.lower() == ".json"][:5]
    if any({"filename", "label"} <= set(_parse_label(path.read_bytes()) or {}) for path in labels):
        return "aihub"
    if any(_is_dicom(path) for path in files):
        return "dicom"
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return "folder"
    raise CTError(
        f"no images in '{src}'",
        "an AI Hub delivery (archives or JSON labels), DICOM slices or an image folder",
        "check the path",
    )


def _decode_name(raw: bytes) -> str:
    """Read a file name as UTF-8, else in the Korean Windows code page; NFC, since macOS stores NFD."""
    for encoding in ("utf-8", "cp949"):
        with contextlib.suppress(UnicodeDecodeError):
            return unicodedata.normalize("NFC", raw.decode(encoding))
    return raw.decode("ascii", "replace")


def _disk_name(path: Path) -> str:
    return _decode_name(os.fsencode(path.as_posix()))


def _plain(part: str) -> str:
    """Return a folder name in lower case without its number: "01.원천데이터" -> "원천데이터"."""
    return re.sub(r"^\d+[._ -]+", "", _decode_name(os.fsencode(part))).casefold()


def _split_of(path: str) -> str | None:
    """Find the split in a path: a folder like `1.Training`, or AI Hub's archive names TS, TL, VS, VL."""
    for part in PurePosixPath(path).parts:
        if _plain(part) in SPLIT_NAMES:
            return SPLIT_NAMES[_plain(part)]
        if short := re.match(r"([TV])[SL]([_.].*)?\.(zip|tar)$", part):
            return {"T": "train", "V": "val"}[short[1]]
    return None


def _safe_name(name: str, origin: str) -> str:
    """Return `name` when it can be a file or folder name on every system."""
    if not name or name.startswith(".") or re.search(r'[<>:"/\\|?*\x00-\x1f\ufffd]', name):
        raise CTError(f"the name '{name}' in '{origin}'", "a plain file or folder name", "rename it at the source")
    return name


def _place(src: Path, files: list[Path]) -> tuple[list[tuple[Path, str | None, str | None]], dict[str, str]]:
    """Find split and class of each file from its folders: `[.../][split/][image/]<class>/.../file`.

    Returns:
        (file, split or None, class or None) for each file, and the files left out with their reason. Where
        some file has a split (or a class), those without one are left out.
    """
    folders = [path.relative_to(src).parts[:-1] for path in files]
    split_at = [next((i for i, part in enumerate(parts) if _split_of(part)), None) for parts in folders]
    start = len(os.path.commonprefix(folders))  # depth of the class folders where there is no split
    if start and len(set(folders)) == 1:
        start -= 1  # a single class folder
    names: dict[str, set[tuple[str, ...]]] = {}
    placed, skipped = [], {}
    for path, parts, at in zip(files, folders, split_at, strict=True):
        split = None if at is None else _split_of(parts[at])
        below = parts[start:] if at is None else parts[at + 1 :]
        if split:
            names.setdefault(split, set()).add(parts[: at + 1])
            below = below[1:] if below and _plain(below[0]) in IMAGE_FOLDERS else below
        label = _safe_name(_decode_name(os.fsencode(below[0])), _disk_name(path)) if below else None
        placed.append((path, split, label))
    for split, found in names.items():
        if len(found) > 1:
            raise CTError(
                f"{len(found)} folders for the split '{split}': {sorted('/'.join(parts) for parts in found)}",
                "one folder a split",
                "remove or rename one of them",
            )
    for which, reason in ((1, "outside the split folders"), (2, "not in a class folder")):
        if any(row[which] for row in placed):
            skipped.update({_disk_name(row[0]): reason for row in placed if not row[which]})
            placed = [row for row in placed if row[which]]
    return placed, skipped


def _assign_splits(labels: list[str], groups: list[str], what: str) -> list[str]:
    """Split 70/15/15 with a fixed seed, stratified by class; rows of one group stay together.

    Args:
        labels: class of each row.
        groups: patient, or content hash, of each row.
        what: name of a group in messages.
    Returns:
        the split of each row.
    """
    by_group: dict[str, list[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        by_group.setdefault(group, []).append(label)
    by_label: dict[str, list[str]] = {}
    for group in sorted(by_group):  # a group with several classes counts for its most frequent one
        by_label.setdefault(Counter(sorted(by_group[group])).most_common(1)[0][0], []).append(group)
    rng = np.random.default_rng(SPLIT_SEED)
    split_of = {}
    for label in sorted(set(labels)):
        members = by_label.get(label, [])
        if len(members) < 3:
            raise CTError(
                f"{len(members)} {what} of class '{label}' and no split folders",
                "at least 3 of each class, one for each split",
                "sort the files into train, val and test yourself, or add slices",
            )
        n_val, n_test = (max(1, round(SHARES[split] * len(members))) for split in ("val", "test"))
        for place, index in enumerate(rng.permutation(len(members))):
            split = "val" if place < n_val else "test" if place < n_val + n_test else "train"
            split_of[members[index]] = split
    return [split_of[group] for group in groups]


def _plan_folder(src: Path, files: list[Path]) -> Plan:
    """Plan the copy of an image folder."""
    plan = Plan(meta={"name": src.resolve().name})
    if (src / "dataset.json").is_file():  # a synthetic set stays synthetic when it is copied
        plan.meta |= {k: v for k, v in base.read_json(src / "dataset.json").items() if k in ("name", "kind")}
    placed, plan.skipped = _place(src, [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES])
    if placed and placed[0][2] is None:
        raise CTError(f"pictures without class folders in '{src}'", "<class>/*.png", "sort them into class folders")
    splits = [split for _, split, _ in placed]
    if placed and splits[0] is None:
        copies = [base.file_sha256(path) for path, _, _ in placed]  # exact copies must not cross splits
        splits = _assign_splits([label for _, _, label in placed], copies, "different picture(s)")
        plan.notes.append(f"no split folders: split 70/15/15 by class, seed {SPLIT_SEED}; exact copies kept together")
    for (path, _, label), split in zip(placed, splits, strict=True):
        name = _safe_name(PurePosixPath(_disk_name(path)).name, _disk_name(path))
        plan.pictures.append(Picture(split, label, name, _disk_name(path), path.stat().st_size, path.read_bytes))
    return plan


# ---------------------------------------------------------------- AI Hub


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a delivery, on disk or inside archives; `path` names folders and archives on the way."""

    path: str
    size: int
    open: Callable[[], io.IOBase]

    def read(self) -> bytes:
        with _archive_errors(self.path), self.open() as file:
            content = file.read()
        if len(content) != self.size:
            raise CTError(f"'{self.path}' cut short", f"{self.size} bytes", "copy or download it again")
        return content


@contextlib.contextmanager
def _archive_errors(origin: str, mend: str = "download it again") -> Iterator[None]:
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

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.ends[-1]}[whence]
        if self.position < 0:  # zipfile seeks before the start of a cut file
            raise OSError("seek before the start")
        return self.position

    def tell(self) -> int:
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


def _missing_part(numbers: list[int], sizes: list[int]) -> int | None:
    """Return the number of the first missing part, or None; numbers are byte offsets, or 0 1 2, or 1 2 3."""
    offsets = [0, *np.cumsum(sizes).tolist()][:-1]
    counted = list(range(numbers[0], numbers[0] + len(numbers))) if numbers[0] in (0, 1) else [0]
    wanted = counted if numbers[-1] < 100 else offsets
    return next((want for want, number in zip(wanted, numbers, strict=False) if want != number), None)


def _open_zip(path: str, parts: list[tuple[int, Entry]], stack: contextlib.ExitStack) -> Iterator[Entry]:
    """Open a zip, joined from its parts if there are several, and give its entries."""
    parts = sorted(parts, key=lambda part: part[0])
    numbers, sizes = [number for number, _ in parts], [entry.size for _, entry in parts]
    mend = "download it again"
    if parts[0][1].path != path:  # it came as .zip.part*
        mend = f"check that '{path}.part{sum(sizes)}' and later parts, if any, are there; else download again"
        missing = _missing_part(numbers, sizes)
        if missing is not None:
            raise CTError(
                f"no part '{path}.part{missing}' (or the part before it is cut short)",
                "every .zip.part file in one folder",
                "download the missing part into the same folder",
            )
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


def _inside(archive: str, name: str) -> str:
    """Return the path of an archive's entry; one that points outside the archive is an attack."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise CTError(
            f"an entry '{name}' in '{archive}' that points outside it",
            "relative paths",
            "do not use this archive",
        )
    return f"{archive}/{name}"


def _entries(src: Path, files: list[Path], stack: contextlib.ExitStack) -> Iterator[Entry]:
    """Give every file of a delivery, looking into tars, zips and split zips inside tars."""
    found = []
    for path in files:
        name = _disk_name(path.relative_to(src)) if path != src else _disk_name(Path(path.name))
        if path.suffix.lower() != ".tar":
            found.append(Entry(name, path.stat().st_size, functools.partial(path.open, "rb")))
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
    for entry in found:
        if part := re.fullmatch(r"(.+\.zip)\.part(\d+)", entry.path, re.IGNORECASE):
            zips.setdefault(part[1] + ".part", []).append((int(part[2]), entry))
        elif entry.path.lower().endswith(".zip"):
            zips[entry.path] = [(0, entry)]
        else:
            yield entry
    for path, parts in zips.items():
        yield from _open_zip(path.removesuffix(".part"), parts, stack)


def _parse_label(content: bytes) -> dict | None:
    """Read a label file, UTF-8 with or without BOM or cp949; None when it is not a JSON object."""
    for encoding in ("utf-8-sig", "cp949"):
        with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError):
            label = json.loads(content.decode(encoding))
            return label if isinstance(label, dict) else None
    return None


def _plan_aihub(src: Path, files: list[Path], stack: contextlib.ExitStack, progress: bool) -> Plan:
    """Plan AI Hub data set 71597: join images and JSON labels by split and file name.

    Source: https://aihub.or.kr, data set 71597; layout in the README.
    """
    plan = Plan(meta={"name": "AI Hub 71597"})
    spelling = {label.casefold(): label for label in AIHUB_CLASSES}
    images: dict[tuple[str, str], Entry] = {}
    labels: dict[tuple[str, str], tuple[str, str]] = {}  # (split, filename) -> class, origin
    entries = list(_entries(src, files, stack))
    for entry in _bar(entries, "read labels", progress):
        path = PurePosixPath(entry.path)
        suffix = path.suffix.lower()
        if path.name.startswith("._") or suffix not in (".json", *IMAGE_SUFFIXES) or path.name == "dataset.json":
            continue
        split = _split_of(entry.path) or _split_of(src.resolve().name)
        if split is None:
            raise CTError(f"'{entry.path}' outside Training and Validation", "the two folders", "keep their names")
        if suffix != ".json":
            key = (split, _safe_name(path.name, entry.path))
            if images.setdefault(key, entry).size != entry.size:
                raise CTError(
                    f"two different pictures '{path.name}': '{images[key].path}' and '{entry.path}'",
                    "one picture a file name in each split",
                    "remove one of them",
                )
            continue
        content = _parse_label(entry.read())
        if not content or not {"filename", "label"} <= set(content):
            plan.skipped[entry.path] = "not a label: no JSON with 'filename' and 'label'"
            continue
        label = spelling.get(str(content["label"]).strip().casefold())
        if label is None:
            raise CTError(
                f"label '{content['label']}' in '{entry.path}'",
                f"one of {', '.join(AIHUB_CLASSES)}",
                "correct the label file, or remove it and its picture",
            )
        name = unicodedata.normalize("NFC", str(content["filename"]).replace("\\", "/")).rsplit("/", 1)[-1]
        first = labels.setdefault((split, name), (label, entry.path))
        if first[0] != label:
            raise CTError(
                f"two labels for '{name}': '{first[0]}' in '{first[1]}' and '{label}' in '{entry.path}'",
                "one label a picture",
                "remove the wrong label file",
            )
    for key, entry in images.items():
        if key in labels:
            plan.pictures.append(Picture(key[0], labels[key][0], key[1], entry.path, entry.size, entry.read))
        else:
            plan.skipped[entry.path] = "image without a label"
    plan.skipped.update({labels[key][1]: "label without an image" for key in labels if key not in images})
    lost = Counter(plan.skipped.values())
    plan.notes += [f"{count} file(s) left out: {reason}" for reason, count in sorted(lost.items())]
    return plan


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


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in DICOM_SUFFIXES


def _read_dicom(path: Path, **options):
    """Read a DICOM file; old ones without the "DICM" mark are read as implicit little endian."""
    import pydicom

    try:
        dataset = pydicom.dcmread(path, force=True, **options)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        return dataset
    except Exception as error:  # pydicom raises many kinds on a damaged file
        raise CTError(
            f"'{_disk_name(path)}', which cannot be read as DICOM ({error})", "a DICOM file", "copy it again"
        ) from error


def _rescale(dataset, frame: int) -> tuple[float, float]:
    """Return slope and intercept to HU; enhanced CT keeps them in functional groups, per frame or shared."""
    groups = [
        *dataset.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1],
        *dataset.get("SharedFunctionalGroupsSequence", []),
    ]
    holders = [holder for group in groups for holder in group.get("PixelValueTransformationSequence", [])]
    values = [(holders or [dataset])[0].get(key) for key in ("RescaleSlope", "RescaleIntercept")]
    return 1.0 if values[0] is None else float(values[0]), 0.0 if values[1] is None else float(values[1])


def dicom_to_uint8(source, window: tuple[float, float] = LUNG_WINDOW) -> np.ndarray:
    """Read a CT image as grey levels in a HU window.

    MONOCHROME1 (low values shown white) is inverted. Padding outside the scanned circle becomes air,
    and so does whatever is below -1024 HU.

    Args:
        source: path of a DICOM file, or a pydicom Dataset.
        window: level and width in HU.
    Returns:
        uint8 (frames, H, W).
    Raises:
        CTError: not a grey picture, or its pixels cannot be decoded.
    Source: DICOM PS3.3, C.7.6.3 (Image Pixel), C.7.5.1.1.2 (pixel padding), C.11.1 (Modality LUT).
    """
    dataset = _read_dicom(Path(source)) if isinstance(source, str | Path) else source
    name = str(source) if isinstance(source, str | Path) else str(dataset.get("SOPInstanceUID", "the dataset"))
    photometric = str(dataset.get("PhotometricInterpretation", "none"))
    if "PixelData" not in dataset or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise CTError(f"'{name}' with photometric interpretation '{photometric}'", "a grey CT picture", "leave it out")
    try:
        raw = dataset.pixel_array
    except Exception as error:  # as many kinds as there are codecs
        syntax, reason = dataset.file_meta.TransferSyntaxUID, " ".join(str(error).split())
        raise CTError(
            f"'{name}' with pixels that cannot be decoded (transfer syntax {syntax.name}: {reason})",
            "uncompressed, RLE or another decodable CT slice",
            "install pylibjpeg[all] or convert the file to uncompressed DICOM",
        ) from error
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


def _labels_csv(src: Path) -> list[tuple[Path, str | None, str | None]]:
    """Read `labels.csv` (path, class, and split if wanted) as rows of (file, split or None, class)."""
    mend = "write labels.csv as UTF-8 with the columns path,class or path,class,split"
    rows: dict[Path, tuple[Path, str | None, str | None]] = {}
    try:
        with (src / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CTError(f"labels.csv that cannot be read ({error})", "a CSV file", mend) from error
    for row in table:
        path = src / (row.get("path") or "")
        label, split = (row.get("class") or "").strip(), (row.get("split") or "").strip()
        if not path.is_file() or not path.resolve().is_relative_to(src.resolve()):
            raise CTError(f"path '{row.get('path')}' in labels.csv", f"a file inside '{src}'", mend)
        if split and not _split_of(split):
            raise CTError(f"split '{split}' in labels.csv", "train, val or test", mend)
        new = (path, _split_of(split), _safe_name(label, "labels.csv"))
        if rows.setdefault(path, new) != new:
            raise CTError(f"two labels for '{row['path']}' in labels.csv", "one row a file", mend)
    if len({row[1] is None for row in rows.values()}) > 1:
        raise CTError("rows with and without a split in labels.csv", "a split in all rows or in none", mend)
    return list(rows.values())


def _plan_dicom(src: Path, out: Path, files: list[Path], window: tuple[float, float], progress: bool) -> Plan:
    """Plan the conversion of DICOM slices to 8-bit grey PNG; only headers are read here."""
    window_to_grey(np.array(AIR_HU), window)  # a wrong window shows before anything is read
    level, width = window
    plan = Plan(meta={"name": out.resolve().name, "window": {"level": level, "width": width, "unit": "HU"}})
    found = [path for path in files if _is_dicom(path)]
    if (src / "labels.csv").is_file():
        placed = _labels_csv(src)
        listed = {path for path, _, _ in placed}
        plan.skipped = {_disk_name(path): "not in labels.csv" for path in found if path not in listed}
    else:
        placed, plan.skipped = _place(src, found)

    slices = []  # (path, split, class, header)
    for path, split, label in _bar(placed, "read headers", progress):
        try:
            slices.append((path, split, label, _read_header(path)))
        except CTError as error:
            plan.skipped[_disk_name(path)] = str(error)
    splits = [split or "train" for _, split, _, _ in slices]
    if slices and slices[0][2] is None:
        plan.notes.append(f"no class folders and no labels.csv: every slice is of class '{UNLABELLED}'")
    elif slices and slices[0][1] is None:
        groups = [_patient(header) or str(path) for path, _, _, header in slices]
        splits = _assign_splits([label for _, _, label, _ in slices], groups, "patient(s)")
        plan.notes.append(f"no split folders: patients split 70/15/15 by class, seed {SPLIT_SEED}")

    read = functools.lru_cache(maxsize=1)(functools.partial(dicom_to_uint8, window=window))  # all frames once
    taken: set[str] = set()
    for number, ((path, _, label, header), split) in enumerate(zip(slices, splits, strict=True)):
        label = label or UNLABELLED
        if _names_patient(label, header):
            raise CTError(f"class folder '{label}' named after a patient", "class names", "write a labels.csv")
        stem = PurePosixPath(_disk_name(path)).name
        stem = stem[: -len(path.suffix)] if path.suffix.lower() in DICOM_SUFFIXES else stem
        stem = f"slice_{number:05d}" if _names_patient(stem, header) else _safe_name(stem, _disk_name(path))
        if f"{split}/{label}/{stem}".casefold() in taken:  # series often number their slices alike
            stem = f"{stem}_{number:05d}"
        taken.add(f"{split}/{label}/{stem}".casefold())
        frames = int(header.get("NumberOfFrames") or 1)
        for frame in range(frames):
            name = f"{stem}_f{frame + 1:03d}.png" if frames > 1 else f"{stem}.png"
            convert = functools.partial(_png, read, path, frame)
            origin = _disk_name(path)
            plan.pictures.append(Picture(split, label, name, origin, None, convert, _patient(header)))
    return plan


def _read_header(path: Path):
    """Read a slice's header; what is no CT slice is an error."""
    header = _read_dicom(path, stop_before_pixels=True)
    modality = header.get("Modality") or "CT"
    if "Rows" not in header or modality != "CT" or "LOCALIZER" in (header.get("ImageType") or []):
        found = f"no CT slice in '{_disk_name(path)}' (modality {modality}; no picture or a scout view?)"
        raise CTError(found, "an axial CT slice", "leave it out")
    return header


def _patient(header) -> str:
    return str(header.get("PatientID") or "").strip()


def _names_patient(text: str, header) -> bool:
    """Tell whether a file or class name gives away the patient's ID or name."""
    words = [str(header.get("PatientID", "")), *re.split(r"[\^= ]+", str(header.get("PatientName", "")))]
    plain = [re.sub(r"[\W_]+", "", word).casefold() for word in (text, *words)]
    return any(len(word) > 2 and word in plain[0] for word in plain[1:])


def _png(read: Callable[[Path], np.ndarray], path: Path, frame: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(read(path)[frame]).save(file, format="PNG")
    return file.getvalue()


def _write_patients(path: Path, pictures: list[Picture], salt: str) -> None:
    """Write which slices share a patient: (path, patient), the patient as a salted hash, empty if unknown."""
    with base.atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "patient"])
        for picture in pictures:
            digest = hashlib.sha256((salt + picture.patient).encode()).hexdigest()[:16]
            table.writerow([picture.path, digest if picture.patient else ""])
