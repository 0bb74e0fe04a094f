"""What every module shares: one kind of user error, atomic writes, a progress bar."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class CTError(ValueError):
    """A mistake that a user can mend: one printable message that says found, expected and how to mend.

    Args:
        found: what was found, with the path or value.
        expected: what was expected instead.
        mend: what to do now.
        files: {path: why} of every file that is at fault, where there may be many.

    Example: `CTError("no folder 'dat'", "a data set folder", "set CT_DATA")` prints
    `Found no folder 'dat'. Expected a data set folder. To mend: set CT_DATA.`
    """

    def __init__(self, found: str, expected: str, mend: str, files: dict[str, str] | None = None):
        self.found, self.expected, self.mend, self.files = found, expected, mend, files
        text = f"Found {found}. Expected {expected}. To mend: {mend}."
        # A file's name may hold a line break, or bytes that are not UTF-8, which no terminal can show.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))

    def __reduce__(self):  # so that it travels back from a worker process
        return type(self), (self.found, self.expected, self.mend, self.files)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file as a whole or not at all: yields a temporary path, renamed to `path` on success.

    The temporary file stands in the same folder, so that the rename never copies. On any exception it is
    removed and an older file at `path` stays as it was.

    Raises:
        CTError: the disk is full, or the older file cannot be replaced. What else the system refuses comes as its
            own OSError.
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
        try:
            os.replace(temporary, path)
        except PermissionError as error:
            raise in_use(path, error) from error
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own while it handles the OSError of a full disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        found, expected = f"a full disk while writing '{path.name}'", f"room in '{path.parent}'"
        raise CTError(found, expected, "free some space and run it again; nothing was overwritten") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def in_use(path: Path, error: OSError) -> CTError:
    """Return the error for a file that cannot be replaced: Windows allows it to nobody while a program has it open."""
    found = f"'{path}', which cannot be replaced ({error.strerror}): another program may have it open"
    mend = "close it there (a CSV in Excel, for example) and run the same command again"
    return CTError(found, "a file that no program holds open", mend)


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Read a JSON object.

    Raises:
        CTError: the file cannot be read, or does not hold one JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair can stand in no table
    except OSError as error:
        raise CTError(f"no file '{path}' to read ({error.strerror})", "a JSON file", "check the path") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5,000 digits, nested too deep
        raise CTError(f"'{path}', which is not JSON ({error})", "one JSON object", "make it again") from error
    if not isinstance(content, dict):
        raise CTError(f"'{path}' with a {type(content).__name__}", "one JSON object", "make it again")
    return content


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(iterable=None, **options):
    """Return a tqdm bar (a widget in JupyterLab, text elsewhere); silent when CT_PROGRESS=0."""
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=os.environ.get("CT_PROGRESS") == "0", **options)


def answers(server: str, seconds: float) -> bool:
    """Say within so many seconds whether a server answers. Looking up its name may hang, hence the thread."""
    import threading
    import urllib.error
    import urllib.request

    answer = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # it has no such page, and says so
        except Exception:
            return  # whatever it was: no
        answer.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answer)
