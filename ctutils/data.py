"""A folder of slices: find splits and classes, check every file, decode once, hand out batches."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ctutils.base import CTError, atomic_path, progress, read_json, write_json
from ctutils.config import Settings, cache_dir
from ctutils.registry import IMAGENET_MEAN, IMAGENET_STD

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {split: split for split in SPLITS}
SPLIT_NAMES |= {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SMALLEST = 16  # pixels; a picture smaller than this on a side is no CT slice
PATH_COLUMNS = ("path", "file", "filename", "image")
PATIENT_COLUMNS = ("patient", "patient_id", "patientid", "subject")
# What tables and records cannot hold: control characters, line separators, bytes that are not UTF-8.
ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Image.MAX_IMAGE_PIXELS = 100_000_000  # PIL warns above this and raises above twice this


@dataclasses.dataclass(frozen=True)
class SliceFolder:
    """A checked folder of slices.

    Attributes:
        root: the folder.
        name: its name in tables and records.
        classes: sorted class names; a label is an index into them.
        slices: one row a file: path (relative, with /), split, class, label, width, height, mode, bytes,
            sha256, problem (empty when the file's header is readable), patient (empty where unknown).
        meta: content of `dataset.json`, or {}.
        fingerprint: SHA-256 over every path and content; it changes when any file does.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    slices: pd.DataFrame
    meta: dict[str, Any]
    fingerprint: str

    @property
    def kind(self) -> str:
        """`synthetic`, `real`, or `unknown` when no dataset.json says."""
        return _text(self.meta.get("kind")) or "unknown"

    @property
    def shortcut(self) -> str | None:
        """The shortcut that was planted into a synthetic set, or None."""
        match self.meta:
            case {"shortcut": str(name)} | {"arguments": {"shortcut": str(name)}}:
                return _text(name) or None
        return None

    @property
    def window(self) -> dict[str, Any] | None:
        """Window of the pictures' greys, {"level", "width", "unit"}; None when it is not known."""
        match self.meta.get("window"):
            case {"level": int(level) | float(level), "width": int(width) | float(width), "unit": str(unit)}:
                if abs(level) < 1e6 and 0 < width < 1e6 and _text(unit):
                    return {"level": level, "width": width, "unit": unit}
        return None

    @property
    def labels(self) -> np.ndarray:
        """Labels int64 (N,), one a row of `slices`."""
        return self.slices["label"].to_numpy(np.int64, copy=True)  # pandas gives a read-only view

    def rows(self, split: str) -> np.ndarray:
        """Return the row numbers int64 (n,) of one split."""
        return np.flatnonzero((self.slices["split"] == split).to_numpy())

    def counts(self) -> pd.DataFrame:
        """Return the number of slices: one row a class, one column a split."""
        table = pd.crosstab(self.slices["class"], self.slices["split"])
        return table.reindex(index=list(self.classes), columns=[s for s in SPLITS if s in table], fill_value=0)


def _text(value: object) -> str:
    """Return a text of dataset.json that a record can hold, or ""."""
    return value if isinstance(value, str) and not ODD.search(value) else ""


def load_folder(root: str | Path, *, strict: bool = True, cache: Path | None = None) -> SliceFolder:
    """Find splits, classes and slices, and read every file's header and content hash.

    Args:
        root: `<root>/{train,val[,test]}/<class>/*.png`; split folders also as Training, valid, Validation, ...
        strict: raise when files or patients.csv cannot be read; else `problem` says why and `patient` is empty.
        cache: folder for the index of known files (default `data/cache`).
    Raises:
        CTError: no folder, no split, no images, classes that disagree, odd names, with `strict` unreadable files.
        OSError: a folder cannot be listed.
    Source: notebook 01.
    """
    root = Path(root)
    classes, slices = _find_slices(root)
    own_name = root.resolve().name
    odd = [name for name in (own_name, *slices["path"]) if ODD.search(name)]
    if odd:
        mend = "rename it, or unpack the archive again (a Korean one with `unzip -O cp949`)"
        raise CTError(f"the name '{odd[0]}' in '{root}'", "names in UTF-8 without control characters", mend)
    slices = slices.join(pd.DataFrame(_file_facts(root, slices["path"].tolist(), cache or cache_dir())))
    slices["patient"] = ""
    try:
        slices["patient"] = read_patients(root, slices["path"])[0]
    except CTError:
        if strict:
            raise
    if strict:
        _refuse_unreadable(root, dict(zip(slices["path"], slices["problem"], strict=True)))
    digest = hashlib.sha256()
    for row in slices[["path", "split", "class", "sha256"]].itertuples(index=False):
        digest.update("\0".join(row).encode() + b"\n")
    try:
        meta = read_json(root / "dataset.json")
    except CTError:
        meta = {}
    return SliceFolder(root, _text(meta.get("name")) or own_name, classes, slices, meta, digest.hexdigest())


def _find_slices(root: Path) -> tuple[tuple[str, ...], pd.DataFrame]:
    """Return the sorted class names, the same in every split, and the table of path, split, class and label."""
    if not root.is_dir():
        mend = "check the path in CT_DATA or on the command line; `python -m ctutils synth OUT` makes a synthetic set"
        raise CTError(f"no folder '{root}'", "a data set folder <root>/{train,val,test}/<class>/*.png", mend)
    folders, classes = {}, {}
    for split in SPLITS:
        found = [path for path in _subfolders(root) if SPLIT_NAMES.get(path.name.lower()) == split]
        if len(found) > 1 or (not found and split != "test"):
            names = " and ".join(f"'{path.name}'" for path in found) or f"no '{split}' folder"
            mend = "rename the folders; `python -m ctutils import SRC OUT` brings other layouts into this one"
            raise CTError(f"{names} in '{root}'", "one folder train (or Training) and one val (or valid, ...)", mend)
        if found:
            folders[split], classes[split] = found[0], {path.name for path in _subfolders(found[0])}
    names, rows = sorted(set().union(*classes.values())), []
    for split, folder in folders.items():
        missing = [name for name in names if name not in classes[split]]
        if missing or len(names) < 2:
            expected = "two classes or more, spelled alike in every split"
            mend = f"add or rename {missing}, or remove it everywhere" if missing else "add a class"
            raise CTError(f"classes {sorted(classes[split])} in '{folder}', in all {names}", expected, mend)
        for label, name in enumerate(names):
            pictures = _find_pictures(root, folder / name)
            if not pictures:
                mend = "add slices (DICOM goes through `python -m ctutils import`), or remove the class everywhere"
                raise CTError(f"no images in '{folder / name}'", f"files ending in {', '.join(IMAGE_SUFFIXES)}", mend)
            rows += [(path, split, name, label) for path in pictures]
    return tuple(names), pd.DataFrame(rows, columns=["path", "split", "class", "label"])


def _subfolders(folder: Path) -> list[Path]:
    # A link that leads nowhere is no file: it stays, and fails when it is listed.
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_file())


def _find_pictures(root: Path, folder: Path) -> list[str]:
    """Return the pictures below a class folder, relative to `root`, sorted folder by folder.

    A link that leads nowhere counts as one, for the check to name. A link to a folder is not entered: one that
    leads back up would give every slice many times.
    """

    def fail(error: OSError):
        raise error

    found: list[str] = []
    for here, _, names in os.walk(folder, onerror=fail):
        pictures = (name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
        places = [os.path.join(here, name) for name in pictures]
        below = Path(here).relative_to(root).as_posix()
        found += [f"{below}/{os.path.basename(p)}" for p in places if os.path.isfile(p) or not os.path.exists(p)]
    return sorted(found, key=lambda path: path.split("/"))


def _refuse_unreadable(root: Path, problems: dict[str, str]) -> None:
    bad = [f"'{path}' ({problem})" for path, problem in problems.items() if problem]
    if bad:
        shown = "; ".join(bad[:5] + ([f"and {len(bad) - 5} more"] if len(bad) > 5 else []))
        mend = f'replace or remove them; `python -m ctutils check "{root}"` lists all'
        expected = f"pictures of at least {SMALLEST} x {SMALLEST} pixels"
        raise CTError(f"{len(bad)} unreadable file(s) in '{root}': {shown}", expected, mend)


def _file_facts(root: Path, paths: list[str], cache: Path) -> list[dict[str, Any]]:
    """Return `_read_fact` of every file; an index in the cache knows files whose size and times have not changed."""
    index = cache / "index" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    try:
        known = read_json(index)
    except CTError:
        known = {}
    keys, new = [], {}
    for path in paths:
        file, stamp = os.path.join(root, path), ""
        with contextlib.suppress(OSError):  # a link that leads nowhere
            stat = os.stat(file)
            # The change time moves with every write, also when a tool sets the modification time back.
            stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        keys.append(f"{path} {stamp}")
        if keys[-1] not in known:
            new[keys[-1]] = file
    if new or len(known) > len(keys):
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            facts = progress(pool.map(_read_fact, new.values()), total=len(new), desc="Reading files", leave=False)
            known |= zip(new, facts, strict=True)
        with contextlib.suppress(OSError, CTError):  # only an optimisation
            write_json(index, {key: known[key] for key in keys})
    return [known[key] for key in keys]


def _read_fact(path: str) -> dict[str, Any]:
    fact: dict[str, Any] = {"width": 0, "height": 0, "mode": "", "bytes": 0, "sha256": "", "problem": ""}
    try:
        content = Path(path).read_bytes()
        fact |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        with Image.open(io.BytesIO(content)) as image:
            fact |= {"width": image.width, "height": image.height, "mode": image.mode}
        if min(image.size) < SMALLEST:
            fact["problem"] = f"{image.width} x {image.height} pixels"
    except UNDECODABLE as error:
        fact["problem"] = _why(error)
    return fact


def _why(error: Exception) -> str:
    unknown = isinstance(error, Image.UnidentifiedImageError)
    return "not a picture" if unknown else getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_patients(root: Path, paths: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Return the patient of every path, str (N,), "" where unknown, and the table's paths that name no slice.

    Read from the first CSV file at the root, patients.csv and findings.csv before others, with a column of
    `PATH_COLUMNS` (as in `paths`, or a file name that occurs once) and one of `PATIENT_COLUMNS`, in any case;
    in UTF-8 or UTF-16, with commas, semicolons or tabs; patient 12.0 is patient 12.

    Raises:
        CTError: patients.csv cannot be read or lacks a column.
    """
    own = [root / "patients.csv", root / "findings.csv"]
    for file in [*own, *sorted(set(root.glob("*.csv")) - set(own))]:
        try:
            content = file.read_bytes()
            text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
            comma = max(",;\t", key=text.partition("\n")[0].count)  # what separates the names of the columns
            table = pd.read_csv(io.StringIO(text), sep=comma, dtype=str, keep_default_na=False)
            lower = {name.strip().lower(): name for name in reversed(table.columns)}
            places = table[next(lower[name] for name in PATH_COLUMNS if name in lower)]
            patients = table[next(lower[name] for name in PATIENT_COLUMNS if name in lower)]
        except (ValueError, OSError, StopIteration) as error:  # pandas' parser errors are ValueErrors
            if file != own[0] or not os.path.lexists(file):
                continue
            why = str(error) or f"its columns are {', '.join(table)}"
            raise CTError(
                f"'{file}' ({why})", "a CSV with the columns path and patient", "mend or remove it"
            ) from error
        named = collections.Counter(path.rsplit("/", 1)[-1] for path in paths)
        full = {name: path for path in paths if named[name := path.rsplit("/", 1)[-1]] == 1} | {p: p for p in paths}
        known: dict[str, str] = {}
        for place, patient in zip(places, patients, strict=True):
            place = place.strip().replace("\\", "/").removeprefix("./")
            # A spreadsheet writes patient 12 as 12.0 where a cell of the column is empty.
            known.setdefault(full.get(place, place), re.sub(r"^(\d+)\.0+$", r"\1", " ".join(patient.split())))
        return np.array([known.get(path, "") for path in paths]), sorted(known.keys() - full.keys())
    return np.full(len(paths), ""), []


def with_test_split(folder: SliceFolder, seed: int = 0) -> SliceFolder:
    """Return the folder with a test split: its own, or else half of its validation split.

    The halves are stratified by class with a fixed seed: one half chooses the epoch, the other reports.
    `meta["test_from_val"]` is True when that was done.

    Raises:
        CTError: a class has fewer than two validation slices to share out.
    Source: notebook 09, "the evaluation rule".
    """
    if len(folder.rows("test")):
        return folder
    from sklearn.model_selection import train_test_split

    rows = folder.rows("val")
    labels = folder.labels[rows]
    if np.bincount(labels, minlength=len(folder.classes)).min() < 2:
        raise CTError("a class with one validation slice and no test split", "two or more", "add slices to val")
    half, _ = train_test_split(rows, test_size=0.5, stratify=labels, random_state=seed)
    slices = folder.slices.copy()
    slices.loc[np.setdiff1d(rows, half), "split"] = "test"
    return dataclasses.replace(folder, slices=slices, meta={**folder.meta, "test_from_val": True})


def with_test_of(folder: SliceFolder, other: SliceFolder) -> SliceFolder:
    """Return the folder with the test split of another one, for the question: does it hold elsewhere?

    A column `shown` gives the paths below the two folders' names, for records.

    Raises:
        CTError: other classes, or no test split there.
    Source: notebook 10, section 8.
    """
    if other.classes != folder.classes or not len(other.rows("test")):
        found = f"classes {other.classes} and {len(other.rows('test'))} test slices in '{other.name}'"
        raise CTError(found, f"{folder.classes} and a test split", "use sets of one kind, the second made with --test")
    try:
        root = Path(os.path.commonpath([folder.root.resolve(), other.root.resolve()]))
    except ValueError as error:  # Windows
        raise CTError(f"'{folder.root}' and '{other.root}' on two drives", "one drive", "copy one of them") from error
    parts = []
    for part, keep in ((folder, ("train", "val")), (other, ("test",))):
        own, slices = part.root.resolve(), part.slices[part.slices["split"].isin(keep)]
        below = [(own / path).relative_to(root).as_posix() for path in slices["path"]]
        parts.append(slices.assign(path=below, shown=[f"{own.name}/{path}" for path in slices["path"]]))
    return dataclasses.replace(
        folder,
        root=root,
        name=f"{folder.name}, tested on {other.name}",
        slices=pd.concat(parts, ignore_index=True),
        fingerprint=hashlib.sha256(f"{folder.fingerprint} {other.fingerprint}".encode()).hexdigest(),
    )


def default_folder(settings: Settings) -> SliceFolder:
    """Return the data set that the settings name; the synthetic one is made on first use.

    Raises:
        CTError: CT_DATA names a folder that is missing or broken.
    Source: notebook 01.
    """
    if not settings.own_data:
        _synthesise(settings.data_dir, settings)
    return load_folder(settings.data_dir, cache=settings.cache_dir)


def shortcut_root(settings: Settings) -> Path:
    """Return where `shortcut_folder` puts its slices: beside the cache."""
    name = settings.profile.name
    return settings.cache_dir.parent / ("synthetic_shortcut" + ("" if name == "standard" else f"_{name}"))


def shortcut_folder(settings: Settings) -> SliceFolder:
    """Return the synthetic set in which the sharpness tells the class; made on first use.

    Patients, findings and counts are those of the profile's own set: only the scanner's kernel differs.

    Source: notebook 01, "a trap".
    """
    _synthesise(shortcut_root(settings), settings, shortcut="sharpness")
    return load_folder(shortcut_root(settings), cache=settings.cache_dir)


def _synthesise(out: Path, settings: Settings, **options) -> None:
    from ctutils.phantom import write_dataset

    size = settings.profile
    write_dataset(out, train=size.train, val=size.val, test=size.test, seed=settings.seed, **options)


def read_grey(path: str | Path) -> Image.Image:
    """Decode one picture of any mode to 8-bit grey, mode 'L'.

    Colour becomes luminance (a CT slice has none), transparency is ignored, 16 bits are cut to the 8 that
    matter: values above 4095 are taken as 16-bit, above 255 as 12-bit.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: the file cannot be decoded.
    """
    with Image.open(path) as image:
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image).astype(np.float64)
            top = values.max(initial=0)
            scale = 256 if top > 4095 else 16 if top > 255 else 1
            return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8))
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return image.convert("L")


def read_small(path: str | Path, size: int) -> np.ndarray:
    """Decode one picture and resize it with antialias to uint8 (size, size); other shapes are squeezed."""
    return np.asarray(read_grey(path).resize((size, size), Image.Resampling.BILINEAR))


def build_transform(size: int, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD):
    """Return the transform from a picture to a network's input, float32 (3, size, size).

    Resize with antialias, three equal channels, then (value / 255 - mean) / std with the statistics that the
    backbone was trained with. The decoded store holds the pictures after the resize; the rest is done in batch.

    Source: notebook 01.
    """
    import torch
    from torchvision.transforms import v2

    resize = [v2.Grayscale(1), v2.Resize((size, size), antialias=True), v2.ToImage(), v2.Grayscale(3)]
    return v2.Compose([*resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def build_store(folder: SliceFolder, size: int, *, cache: Path | None = None, workers: int | None = None) -> np.ndarray:
    """Decode and resize every slice once and return them as a memory-mapped uint8 array (N, size, size).

    The file stands in `data/cache/store`, named by the folder's fingerprint and the size, so that every
    notebook and backbone shares it and a changed picture makes a new one. It is complete or absent: written
    in order to a temporary file, then renamed. Memory stays flat: a few slices a worker.

    Args:
        size: pixels a side.
        cache: folder of the store (default `data/cache`).
        workers: decoding threads (default: one a core).
    Raises:
        CTError: slices that cannot be decoded, all named at once; a full disk.
    Source: notebook 02.
    """
    path = (cache or cache_dir()) / "store" / f"{folder.fingerprint[:20]}-{size}.u8"
    shape, workers = (len(folder.slices), size, size), workers or os.cpu_count() or 1

    def decode(file: Path) -> np.ndarray | str:
        try:
            return read_small(file, size)
        except UNDECODABLE as error:
            return _why(error)

    if not path.is_file() or path.stat().st_size != math.prod(shape):
        files, problems = [folder.root / name for name in folder.slices["path"]], {}
        with (
            atomic_path(path) as temporary,
            open(temporary, "wb") as out,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            progress(total=len(files), desc=f"Decoding slices to {size} x {size}", unit="slice", leave=False) as bar,
        ):
            for start in range(0, len(files), 16 * workers):  # bounds what waits in memory
                chunk = files[start : start + 16 * workers]
                for file, decoded in zip(chunk, pool.map(decode, chunk), strict=True):
                    if isinstance(decoded, str):
                        problems[file.relative_to(folder.root).as_posix()] = decoded
                    else:
                        out.write(decoded.tobytes())
                    bar.update()
            _refuse_unreadable(folder.root, problems)
    return np.memmap(path, np.uint8, mode="r", shape=shape)


class SliceBatches:
    """Whole batches from the decoded store, for a DataLoader whose sampler yields lists of indices.

    `batches[indices]` returns images float32 (B, 3, H, W), normalised, and labels int64 (B,), where the store is:
    a memory-mapped array (on the CPU), or a tensor uint8 (N, H, W) that stands on the GPU.
    """

    def __init__(self, store, labels: np.ndarray, rows: np.ndarray, mean, std, augment=None):
        import torch

        self.device = "cpu" if isinstance(store, np.ndarray) else store.device
        self.store, self.augment = store, augment
        self.rows, self.labels = (torch.from_numpy(values).to(self.device) for values in (rows, labels[rows]))
        self.mean, self.std = (torch.tensor(three, device=self.device) for three in (mean, std))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]):
        import torch

        here = torch.as_tensor(indices).to(self.device, non_blocking=True)  # to a GPU only the indices travel
        rows = self.rows[here]
        images = self.store[rows] if self.device != "cpu" else torch.from_numpy(self.store[rows.numpy()])
        images = images[:, None] if self.augment is None else self.augment(images[:, None])
        return normalise(images, self.mean, self.std), self.labels[here]


def normalise(images, mean, std):
    """Turn grey uint8 (B, 1, H, W) into network input float32 (B, 3, H, W): (value / 255 - mean) / std."""
    import torch

    mean, std = (torch.as_tensor(three, device=images.device).view(1, 3, 1, 1) for three in (mean, std))
    return (images.float() / 255 - mean) / std


def make_loaders(
    folder: SliceFolder, store, *, mean=IMAGENET_MEAN, std=IMAGENET_STD, batch_size=32, augment=None, device="cpu"
) -> dict:
    """Return one DataLoader a split; the training slices are shuffled (by torch's global seed), others in order.

    Args:
        store: uint8 (N, size, size), rows as in `folder.slices`.
        mean, std: the backbone's normalisation, three numbers each.
        augment: uint8 (B, 1, H, W) -> the same, for the training slices only.
        device: a CUDA device gets the whole store once, if a quarter of its free memory holds it, so that the
            batches are made there; else they are made on the CPU.
    Returns:
        {split: loader of images float32 (B, 3, size, size) and labels int64 (B,)}
    Raises:
        CTError: store and folder have different numbers of slices.
    Source: notebook 02.
    """
    import torch

    if len(store) != len(folder.slices):
        raise CTError(f"{len(store)} decoded slices", f"{len(folder.slices)}", "build the store again")
    if device.startswith("cuda") and store.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        store = torch.from_numpy(np.array(store)).to(device)

    def batches(split: str):
        changed = augment if split == "train" else None
        return SliceBatches(store, folder.labels, folder.rows(split), mean, std, changed)

    return _loaders(folder, batches, batch_size)


def feature_loaders(folder: SliceFolder, features, *, batch_size: int = 32, views=None) -> dict:
    """Return one DataLoader a split over cached features: float32 (B, ...) and labels int64 (B,).

    The order of the training examples is that of `make_loaders` under the same seed.

    Args:
        features: tensor (N, D) or (N, K, h, w), float32 or bfloat16, rows as in `folder.slices`; a mapped file is
            read batch by batch.
        views: tensor (V, M, ...) of V random views of the M training slices: each time a training slice is asked
            for, one of its views is drawn.
    Source: notebook 02; the views: notebook 10.
    """

    def batches(split: str):
        rows = folder.rows(split)
        if split == "train" and views is not None:
            return _FeatureBatches(views, np.arange(len(rows)), folder.labels[rows])
        return _FeatureBatches(features[None], rows, folder.labels[rows])

    return _loaders(folder, batches, batch_size)


class _FeatureBatches:
    def __init__(self, views, rows: np.ndarray, labels: np.ndarray):
        import torch

        self.views = views  # (V, N, ...)
        self.rows, self.labels = (torch.from_numpy(some).to(views.device) for some in (rows, labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]):
        import torch

        device, view = self.views.device, 0
        if len(self.views) > 1:
            view = torch.randint(len(self.views), (len(indices),)).to(device, non_blocking=True)
        indices = torch.as_tensor(indices).to(device, non_blocking=True)
        return self.views[view, self.rows[indices]].float(), self.labels[indices]


def _loaders(folder: SliceFolder, batches, batch_size: int) -> dict:
    splits = [split for split in SPLITS if len(folder.rows(split))]
    return {split: batch_loader(batches(split), batch_size, shuffle=split == "train") for split in splits}


def batch_loader(dataset, batch_size: int, *, shuffle: bool):
    """Return a DataLoader that asks `dataset` for whole batches, `dataset[[i, j, ...]]`."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    order = (RandomSampler if shuffle else SequentialSampler)(range(len(dataset)))
    # batch_size=None: the sampler already yields batches, and one gather beats collating pictures one by one.
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
