"""base: one kind of user error, files written as a whole or not at all."""

import errno
import os
import pickle
import stat
import tempfile
from types import SimpleNamespace

import pytest
import torch
from helpers import files_below, user_error

from ctutils.base import CTError, atomic_path, file_sha256, progress, read_json, write_json


def test_error_says_found_expected_and_mend_and_travels_between_processes():
    error = CTError("no folder 'dat'", "a data set folder", "set CT_DATA")
    assert str(error) == "Found no folder 'dat'. Expected a data set folder. To mend: set CT_DATA."
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    odd = str(CTError("'폐렴\r\n\udcc6.png'", "a name", "rename it"))
    assert odd.isprintable() and "폐렴\\r\\n\\udcc6" in odd, "no terminal shows this as one line"


def test_atomic_path_makes_the_folder_and_a_whole_file_that_others_can_read(tmp_path):
    path = tmp_path / "새 폴더" / "file.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent, "a rename from elsewhere would copy"
        assert temporary.suffix == ".txt", "np.save adds a suffix where it misses one"
        temporary.write_text("abc")
        assert not path.exists(), "the file is there before it is complete"
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
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
    assert path.read_text() == "old" and files_below(tmp_path) == ["file.txt"]


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def torch_save(path):
    """torch.save turns the OSError of a full disk into a RuntimeError."""
    with open(path, "wb") as file:
        full = SimpleNamespace(write=lambda data: len(data) > 1000 and full_disk(), flush=file.flush)
        torch.save({"a": torch.zeros(100_000)}, full)


@pytest.mark.parametrize("write", [full_disk, torch_save])
def test_full_disk_is_one_message_and_loses_nothing(tmp_path, monkeypatch, write):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with user_error("full disk", "file.txt", tmp_path.name), atomic_path(path) as temporary:
        write(temporary)
    assert path.read_text() == "old" and files_below(tmp_path) == ["file.txt"]
    monkeypatch.setattr(tempfile, "mkstemp", full_disk)
    with user_error("full disk"), atomic_path(path):
        pass


def test_a_file_open_in_another_program_is_said_and_kept(tmp_path, monkeypatch):
    """Windows: what Excel has open can be neither replaced nor removed."""
    path = tmp_path / "file.csv"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with user_error("file.csv", "another program", "Excel"), atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old" and files_below(tmp_path) == ["file.csv"]


def test_json_goes_and_comes_back_in_plain_utf8(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"이름": ["폐렴", 1, None]})
    assert "폐렴" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"이름": ["폐렴", 1, None]}, "a failed write must leave the older file"
    assert files_below(tmp_path) == ["a.json"]


NO_OBJECTS = [b"", b'{"a": 1', b"\xff\xfe\x00", b"[1]", b"null", b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", NO_OBJECTS)
def test_json_that_is_no_object_or_cannot_be_read_is_one_message(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with user_error("a.json", "one JSON object"):
        read_json(path)
    for unreadable in (tmp_path / "missing.json", tmp_path, tmp_path / ("long" * 100)):
        with user_error("no file", unreadable.name[:20]):
            read_json(unreadable)


def test_progress_is_silent_when_asked(monkeypatch, capsys):
    monkeypatch.setenv("CT_PROGRESS", "0")
    assert list(progress(range(3))) == [0, 1, 2] and not capsys.readouterr().err
    monkeypatch.setenv("CT_PROGRESS", "1")
    assert not progress(range(3), file=open(os.devnull, "w")).disable
