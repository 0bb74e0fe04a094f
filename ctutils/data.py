"""A folder of slices: find splits and classes, check every file, decode once, hand out batches."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from ctutils.base import IMAGENET_MEAN, IMAGENET_STD, CTError, atomic_path, progress
from ctutils.config import Settings, cache_dir

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SMALLEST = 16  # pixels; a picture smaller than this on a side is no CT slice

Image.MAX_IMAGE_PIXELS = 100_000_000  # PIL warns above this and raises above twice this


@dataclasses.dataclass(frozen=True)
class SliceFolder:
    """A checked folder of slices.

    Attributes:
        root: the folder.
        name: its name in tables and records.
        classes: sorted class names; a label is an index into them.
        slices: one row a file: path (relative, with /), split, class, label, width, height, mode, bytes,
            sha256, problem (empty when the file's header is readable).
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
        return str(self.meta.get("kind", "unknown"))

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
        splits = [split for split in SPLITS if split in table]
        table = table.reindex(index=list(self.classes), columns=splits, fill_value=0)
        return table.rename_axis(index="class", columns="split")


# ---------------------------------------------------------------- finding


def _find_splits(root: Path) -> dict[str, Path]:
    """Return {canonical split: folder}."""
    if not root.is_dir():
        raise CTError(
            f"no folder '{root}'",
            "a data set folder <root>/{train,val,test}/<class>/*.png",
            "check the path in CT_DATA or on the command line; `python -m ctutils synth OUT` makes a synthetic set",
        )
    splits: dict[str, Path] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split in splits:
            raise CTError(
                f"two folders for the split '{split}': '{splits[split].name}' and '{folder.name}'",
                "one folder a split",
                "rename or remove one of them",
            )
        if split:
            splits[split] = folder
    for needed in ("train", "val"):
        if needed not in splits:
            raise CTError(
                f"no '{needed}' folder in '{root}'",
                "split folders train and val (also Training, valid, Validation), and test if there is one",
                "`python -m ctutils import SRC OUT` brings other layouts into this one, and splits unsplit folders",
            )
    return {split: splits[split] for split in SPLITS if split in splits}


def _find_classes(splits: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the sorted class names, which must be the same in every split."""
    found = {
        split: sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for split, folder in splits.items()
    }
    names = sorted(set().union(*found.values()))
    by_case: dict[str, str] = {}
    for name in names:
        if by_case.setdefault(name.casefold(), name) != name:
            raise CTError(
                f"classes '{by_case[name.casefold()]}' and '{name}', which differ only by case",
                "one spelling for one class in every split",
                "rename the folders to one spelling",
            )
    for split, classes in found.items():
        missing = sorted(set(names) - set(classes))
        if missing:
            raise CTError(
                f"no class folder {', '.join(map(repr, missing))} in split '{split}' ('{splits[split].name}')",
                f"the same classes in every split: {', '.join(names)}",
                "add the missing folder with its slices, or remove the class from the other splits",
            )
    if len(names) < 2:
        raise CTError(f"{len(names)} class folder(s) in '{splits['train']}'", "two classes or more", "add a class")
    return tuple(names)


def load_folder(root: str | Path, *, strict: bool = True, cache: Path | None = None) -> SliceFolder:
    """Find splits, classes and slices, and read every file's header and content hash.

    Files are read once: what was learned of them is kept in `data/cache` and read again only when a file's
    size or one of its times changes.

    Args:
        root: `<root>/{train,val[,test]}/<class>/*.png`; split folders also as Training, valid, Validation, ...
        strict: raise when a file cannot be read; otherwise its `problem` column says why.
        cache: folder for the index of known files (default `data/cache`).
    Raises:
        CTError: no folder, no split, no images, classes that disagree, and with `strict` unreadable files.
    Source: notebook 01.
    """
    root = Path(root)
    splits = _find_splits(root)
    classes = _find_classes(splits)
    files: list[tuple[Path, str, str]] = []
    for split, split_folder in splits.items():
        for name in classes:
            found = sorted(
                path
                for path in (split_folder / name).rglob("*")
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
            )
            if not found:
                raise CTError(
                    f"no images in '{split_folder.name}/{name}' of '{root}'",
                    f"files ending in {', '.join(IMAGE_SUFFIXES)}",
                    "add slices (DICOM goes through `python -m ctutils import`), or remove the class everywhere",
                )
            files += [(path, split, name) for path in found]
    _refuse_other_encodings(root, [path for path, _, _ in files])
    facts = _file_facts(root, [path for path, _, _ in files], cache or cache_dir())
    label = {name: index for index, name in enumerate(classes)}
    slices = pd.DataFrame(
        [
            {
                "path": path.relative_to(root).as_posix(),
                "split": split,
                "class": name,
                "label": label[name],
                **fact,
            }
            for (path, split, name), fact in zip(files, facts, strict=True)
        ]
    )
    if strict:
        _raise_unreadable(root, slices.loc[slices["problem"] != "", ["path", "problem"]].itertuples(index=False))
    digest = hashlib.sha256()
    for row in slices[["path", "split", "class", "sha256"]].itertuples(index=False):
        digest.update("\0".join(row).encode() + b"\n")
    meta = _read_meta(root)
    name = str(meta.get("name") or root.resolve().name)
    return SliceFolder(root, name, classes, slices, meta, digest.hexdigest())


def _refuse_other_encodings(root: Path, paths: list[Path]) -> None:
    """Raise when Linux shows a name that is not UTF-8, e.g. unpacked from a Korean zip: no table can hold it."""
    for path in paths:
        name = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()
        if name != path.relative_to(root).as_posix():
            raise CTError(
                f"the name '{name}' in '{root}', which is not Unicode",
                "UTF-8 names",
                "rename it, or unpack the archive again with `unzip -O cp949`",
            )


def _raise_unreadable(root: Path, bad: Iterable[tuple[str, str]]) -> None:
    bad = list(bad)
    if bad:
        shown = "; ".join(f"'{path}' ({problem})" for path, problem in bad[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise CTError(
            f"{len(bad)} unreadable file(s) in '{root}': {shown}{more}",
            f"pictures of at least {SMALLEST} x {SMALLEST} pixels",
            f'replace or remove them; `python -m ctutils check "{root}"` lists all',
        )


def _read_meta(root: Path) -> dict[str, Any]:
    try:
        meta = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _stamp(path: Path) -> list[int]:
    # The change time moves with every write, also when a tool sets the modification time back.
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_facts(path: Path) -> dict[str, Any]:
    fact: dict[str, Any] = {"width": 0, "height": 0, "mode": "", "bytes": 0, "sha256": "", "problem": ""}
    try:
        content = path.read_bytes()
        fact["bytes"], fact["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        if not content:
            raise ValueError("zero bytes")
        with Image.open(path) as image:
            fact["width"], fact["height"], fact["mode"] = *image.size, image.mode
        if min(image.size) < SMALLEST:
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
    except Image.UnidentifiedImageError:
        fact["problem"] = "not a picture"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        fact["problem"] = str(error) or type(error).__name__
    return fact


def _file_facts(root: Path, paths: list[Path], cache: Path) -> list[dict[str, Any]]:
    """Read every file's facts, in parallel, unless the index knows the very same file."""
    index_file = cache / "index" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    keys = [path.relative_to(root).as_posix() for path in paths]
    stamps = [_stamp(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        entries = {
            key: known[key]
            for key, stamp in zip(keys, stamps, strict=True)
            if isinstance(known.get(key), dict) and known[key].get("stamp") == stamp
        }
        new = [(key, path, stamp) for key, path, stamp in zip(keys, paths, stamps, strict=True) if key not in entries]
        if new:
            bar = progress(total=len(new), desc="Reading files", unit="slice", leave=False)
            for (key, _, stamp), fact in zip(new, pool.map(_read_facts, [path for _, path, _ in new]), strict=True):
                entries[key] = {"stamp": stamp, "fact": fact}
                bar.update()
            bar.close()
    if new or len(known) != len(entries):
        with (
            contextlib.suppress(OSError, CTError),
            atomic_path(index_file) as temporary,
        ):  # only an optimisation
            temporary.write_text(json.dumps(entries), encoding="utf-8")
    return [entries[key]["fact"] for key in keys]


def with_test_split(folder: SliceFolder, seed: int = 0) -> SliceFolder:
    """Return the folder with a test split: its own, or else half of its validation split.

    The halves are stratified by class with a fixed seed: one half chooses the epoch, the other reports.
    `meta["test_from_val"]` is True when that was done.

    Raises:
        CTError: a class has fewer than two validation slices to share out.
    Source: notebook 09, "the evaluation rule".
    """
    if (folder.slices["split"] == "test").any():
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


def default_folder(settings: Settings) -> SliceFolder:
    """Return the data set that the settings name; the synthetic one is made on first use.

    Raises:
        CTError: CT_DATA names a folder that is missing or broken.
    Source: notebook 01.
    """
    if not settings.own_data:
        from ctutils.phantom import write_dataset

        size = settings.profile
        write_dataset(settings.data_dir, train=size.train, val=size.val, test=size.test, seed=settings.seed)
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
    from ctutils.phantom import write_dataset

    size, out = settings.profile, shortcut_root(settings)
    write_dataset(out, train=size.train, val=size.val, test=size.test, seed=settings.seed, shortcut="sharpness")
    return load_folder(out, cache=settings.cache_dir)


# ---------------------------------------------------------------- decoding


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

    return v2.Compose(
        [
            v2.Grayscale(1),
            v2.Resize((size, size), antialias=True),
            v2.ToImage(),
            v2.Grayscale(3),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(mean), std=list(std)),
        ]
    )


def build_store(folder: SliceFolder, size: int, *, cache: Path | None = None, workers: int | None = None) -> np.ndarray:
    """Decode and resize every slice once and return them as a memory-mapped uint8 array (N, size, size).

    The file stands in `data/cache/store`, named by the folder's fingerprint and the size, so that every
    notebook and backbone shares it and a changed picture makes a new one. It is complete or absent: written
    in order to a temporary file, then renamed. Memory stays flat: a few slices a worker.

    Args:
        folder: N slices.
        size: pixels a side.
        cache: folder of the store (default `data/cache`).
        workers: decoding threads (default: one a core).
    Raises:
        CTError: slices that cannot be decoded, all named at once; a full disk.
    Source: notebook 02.
    """
    path = (cache or cache_dir()) / "store" / f"{folder.fingerprint[:20]}-{size}.npy"
    count = len(folder.slices)
    store = _open_store(path, (count, size, size))
    if store is None:
        _remove_leftovers(path.parent)
        workers = workers or os.cpu_count() or 1
        files = [folder.root / name for name in folder.slices["path"]]
        bad: list[tuple[str, str]] = []
        with (
            atomic_path(path) as temporary,
            open(temporary, "wb") as out,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            progress(total=count, desc=f"Decoding slices to {size} x {size}", unit="slice", leave=False) as bar,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size)}
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, count, 16 * workers):  # bounds what waits in memory
                chunk = files[start : start + 16 * workers]
                for file, decoded in zip(chunk, pool.map(_decode, chunk, [size] * len(chunk)), strict=True):
                    if isinstance(decoded, str):
                        bad.append((file.relative_to(folder.root).as_posix(), decoded))
                    else:
                        out.write(decoded.tobytes())
                    bar.update()
            _raise_unreadable(folder.root, bad)
        store = np.load(path, mmap_mode="r")
    return store


def _open_store(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Map a finished store; None when it is absent or damaged."""
    try:
        store = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return store if (store.shape, store.dtype) == (shape, np.uint8) else None


def _decode(path: Path, size: int) -> np.ndarray | str:
    try:
        return read_small(path, size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed process left a day ago or earlier."""
    import time

    for file in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > 86_400:
                file.unlink()


# ---------------------------------------------------------------- batches


class SliceBatches:
    """Whole batches from the decoded store, for a DataLoader whose sampler yields lists of indices.

    `batches[indices]` returns images float32 (B, 3, H, W), normalised, and labels int64 (B,), where the store is:
    a memory-mapped array (on the CPU), or a tensor uint8 (N, H, W) that stands on the GPU.
    """

    def __init__(self, store, labels: np.ndarray, rows: np.ndarray, mean, std, augment=None):
        import torch

        self.device = "cpu" if isinstance(store, np.ndarray) else store.device
        self.store, self.rows, self.augment = store, rows, augment
        self.labels = torch.from_numpy(labels[rows]).to(self.device)
        self.mean, self.std = (torch.tensor(three, device=self.device) for three in (mean, std))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]):
        import torch

        # To a GPU only the indices travel, and nothing waits for them.
        rows, here = torch.from_numpy(self.rows[indices]), torch.as_tensor(indices)
        if self.device == "cpu":
            images = torch.from_numpy(self.store[rows.numpy()])
        else:
            rows, here = rows.to(self.device, non_blocking=True), here.to(self.device, non_blocking=True)
            images = self.store[rows]
        images = images[:, None] if self.augment is None else self.augment(images[:, None])
        return normalise(images, self.mean, self.std), self.labels[here]


def normalise(images, mean, std):
    """Turn grey uint8 (B, 1, H, W) into network input float32 (B, 3, H, W): (value / 255 - mean) / std."""
    import torch

    mean, std = (torch.as_tensor(three, device=images.device).view(1, 3, 1, 1) for three in (mean, std))
    return (images.float() / 255 - mean) / std


def make_loaders(
    folder: SliceFolder,
    store: np.ndarray,
    *,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    batch_size: int = 32,
    augment=None,
    device: str = "cpu",
) -> dict[str, "DataLoader"]:
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
    if len(store) != len(folder.slices):
        raise CTError(f"{len(store)} decoded slices", f"{len(folder.slices)}", "build the store again")
    if device.startswith("cuda"):
        import torch

        if store.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            store = torch.from_numpy(np.array(store)).to(device)
    loaders = {}
    for split in (split for split in SPLITS if len(folder.rows(split))):
        dataset = SliceBatches(
            store, folder.labels, folder.rows(split), mean, std, augment if split == "train" else None
        )
        loaders[split] = batch_loader(dataset, batch_size, shuffle=split == "train")
    return loaders


def feature_loaders(folder: SliceFolder, features, *, batch_size: int = 32, views=None) -> dict[str, "DataLoader"]:
    """Return one DataLoader a split over cached features: float32 (B, D) and labels int64 (B,).

    The order of the training examples is that of `make_loaders` under the same seed.

    Args:
        features: tensor float32 (N, D), rows as in `folder.slices`.
        views: tensor float32 (K, M, D) of K random views of the M training slices: each time a training slice is
            asked for, one of its views is drawn.
    Source: notebook 02; the views: notebook 10.
    """
    import torch

    labels = torch.from_numpy(folder.labels).to(features.device)
    loaders = {}
    for split in (split for split in SPLITS if len(folder.rows(split))):
        rows = torch.from_numpy(folder.rows(split)).to(features.device)
        of_split = views if split == "train" and views is not None else features[rows][None]
        loaders[split] = batch_loader(_Features(of_split, labels[rows]), batch_size, shuffle=split == "train")
    return loaders


class _Features:
    def __init__(self, views, labels):
        self.views, self.labels = views, labels  # (K, M, D) and (M,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]):
        import torch

        device, view = self.views.device, 0
        if len(self.views) > 1:
            view = torch.randint(len(self.views), (len(indices),)).to(device, non_blocking=True)
        indices = torch.as_tensor(indices).to(device, non_blocking=True)
        return self.views[view, indices], self.labels[indices]


def batch_loader(dataset, batch_size: int, *, shuffle: bool) -> "DataLoader":
    """Return a DataLoader that asks `dataset` for whole batches, `dataset[[i, j, ...]]`."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    order = (RandomSampler if shuffle else SequentialSampler)(range(len(dataset)))
    # batch_size=None: the sampler already yields batches, and one gather beats collating pictures one by one.
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
