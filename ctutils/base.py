"""What every module shares: one kind of user error, atomic writes, a progress bar."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

# torchvision's normalisation of (R, G, B) in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# One row an epoch: what `train_model` returns and history.csv holds.
HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "train_macro_f1",
    "val_loss",
    "val_accuracy",
    "val_macro_f1",
    "lr",
    "seconds",
)


class CTError(ValueError):
    """A mistake that a user can mend: one message that says found, expected and how to mend.

    Args:
        found: what was found, with the path or value.
        expected: what was expected instead.
        mend: what to do now.

    Example: `CTError("no folder 'dat'", "a data set folder", "set CT_DATA")` prints
    `Found no folder 'dat'. Expected a data set folder. To mend: set CT_DATA.`
    """

    def __init__(self, found: str, expected: str, mend: str):
        self.found, self.expected, self.mend = found, expected, mend
        super().__init__(f"Found {found}. Expected {expected}. To mend: {mend}.")

    def __reduce__(self):  # so that it travels back from a worker process
        return type(self), (self.found, self.expected, self.mend)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file as a whole or not at all: yields a temporary path, renamed to `path` on success.

    The temporary file stands in the same folder, so that the rename never copies. On any exception it is
    removed and an older file at `path` stays as it was.

    Raises:
        CTError: the disk is full, or the folder may not be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
        os.close(fd)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes 0600, which a class sharing a folder could not read
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own while it handles the OSError of a full disk.
        number = getattr(error if isinstance(error, OSError) else error.__context__, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise CTError(
                f"a full disk while writing '{path.name}'",
                f"room in '{path.parent}'",
                "free some space and run the same command again; nothing was overwritten",
            ) from error
        if temporary is None and number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CTError(
                f"the folder '{path.parent}' that may not be written",
                "a folder of your own",
                "choose another folder, or ask for the right to write there",
            ) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Read a JSON object.

    Raises:
        CTError: the file is missing, or does not hold one JSON object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CTError(f"no file '{path}'", "a JSON file", "check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CTError(
            f"'{path}', which is not JSON ({error})", "one JSON object", "delete it and make it again"
        ) from error
    if not isinstance(content, dict):
        raise CTError(f"'{path}' with a {type(content).__name__}", "one JSON object", "delete it and make it again")
    return content


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(iterable=None, **options):
    """Return a tqdm bar (a widget in JupyterLab, text elsewhere); silent when CT_PROGRESS=0."""
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=os.environ.get("CT_PROGRESS") == "0", **options)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory, of the GPU or of the machine, is full."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
    return full or "can't allocate memory" in str(error).lower()


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace, in a UTF-8 file, what stands between two lines that mark it.

    Raises:
        CTError: one of the marks is missing.
    """
    before, first, rest = path.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise CTError(f"no '{end if first else begin}' in '{path.name}'", "both marks", "put them back")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


@functools.cache
def reuse_large_blocks() -> None:
    """Ask glibc to keep large freed blocks instead of giving each back to the system.

    Otherwise every activation of every batch is mapped afresh, and its page faults cost up to half the time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    if not mallopt(mmap_threshold, 1 << 30):  # an older glibc refuses more than 32 MB
        mallopt(mmap_max, 0)
    mallopt(trim_threshold, 1 << 30)
