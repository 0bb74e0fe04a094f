"""base: one kind of user error, files written as a whole or not at all."""

import errno
import json
import os
import pickle
import stat
import tempfile

import pytest
import torch
from helpers import check_message, files_below, user_error

from ctutils.base import CTError, atomic_path, file_sha256, progress, read_json, replace_between, write_json


def test_error_says_found_expected_and_mend_and_travels_between_processes():
    error = CTError("no folder 'dat'", "a data set folder", "set CT_DATA")
    assert str(error) == "Found no folder 'dat'. Expected a data set folder. To mend: set CT_DATA."
    check_message(str(error), "dat")
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.mend) == (str(error), "set CT_DATA")


def test_atomic_path_makes_the_folder_and_a_file_that_others_can_read(tmp_path):
    path = tmp_path / "새 폴더" / "file.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent, "a rename from elsewhere would copy"
        assert temporary.suffix == ".txt", "np.save adds a suffix where it misses one"
        temporary.write_text("whole")
        assert not path.exists(), "the file is there before it is complete"
    assert path.read_text() == "whole"
    assert files_below(tmp_path) == ["새 폴더/file.txt"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_atomic_path_leaves_the_older_file_when_writing_fails(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert files_below(tmp_path) == ["file.txt"]


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_is_one_message_and_loses_nothing(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with user_error("full disk", "file.txt", tmp_path.name), atomic_path(path) as temporary:
        temporary.write_text("half")
        full_disk()
    assert path.read_text() == "old"
    assert files_below(tmp_path) == ["file.txt"]


def test_full_disk_when_the_temporary_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "mkstemp", full_disk)
    with user_error("full disk"), atomic_path(tmp_path / "file.txt"):
        pass


def test_full_disk_under_torch_save(tmp_path):
    """torch.save turns the OSError of a full disk into a RuntimeError."""

    class Full:
        def __init__(self, file):
            self.file, self.written = file, 0

        def write(self, data):
            self.written += len(data)
            return full_disk() if self.written > 1000 else self.file.write(data)

        def flush(self):
            pass

    with user_error("full disk"), atomic_path(tmp_path / "a.pt") as temporary, open(temporary, "wb") as file:
        torch.save({"a": torch.zeros(100_000)}, Full(file))
    assert files_below(tmp_path) == []


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        (tmp_path / "missing").read_text()
    with pytest.raises(RuntimeError, match="boom"), atomic_path(tmp_path / "file.txt"):
        raise RuntimeError("boom")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_folder_that_may_not_be_written_is_one_message(tmp_path, monkeypatch, number):
    def refuse(*_args, **_kwargs):
        raise OSError(number, "no")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with user_error("may not be written", tmp_path.name), atomic_path(tmp_path / "file.txt"):
        pass


def test_json_goes_and_comes_back_in_plain_utf8(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"이름": ["폐렴", 1, None]})
    assert "폐렴" in path.read_text(encoding="utf-8")
    assert read_json(path) == {"이름": ["폐렴", 1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"이름": ["폐렴", 1, None]}, "a failed write must leave the older file"
    assert files_below(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", json.dumps([1]).encode(), b"null"])
def test_json_that_is_no_object_is_one_message(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with user_error("a.json", "one JSON object"):
        read_json(path)


def test_missing_json_is_one_message(tmp_path):
    with user_error("no file", "a.json"):
        read_json(tmp_path / "a.json")


def test_what_stands_between_marks_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("한글\n<!-- a -->\nold\n<!-- /a -->\nrest\n", encoding="utf-8")
    for _ in range(2):
        replace_between(path, "<!-- a -->", "<!-- /a -->", "new")
        assert path.read_text(encoding="utf-8") == "한글\n<!-- a -->\nnew\n<!-- /a -->\nrest\n"
    for marks, missing in (
        (("<!-- b -->", "<!-- /a -->"), "<!-- b -->"),
        (("<!-- a -->", "<!-- /b -->"), "<!-- /b -->"),
    ):
        with user_error(missing, "README.md"):
            replace_between(path, *marks, "lost")
    assert "lost" not in path.read_text(encoding="utf-8")


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_progress_is_silent_when_asked(monkeypatch, capsys):
    monkeypatch.setenv("CT_PROGRESS", "0")
    assert list(progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CT_PROGRESS", "1")
    assert not progress(range(3), file=open(os.devnull, "w")).disable
