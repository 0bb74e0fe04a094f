"""Weight files: found, fetched from a server of our own, listed; and what is said when they cannot be had."""

import hashlib
import http.server
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers import check_message, files_below, user_error, write_set

from ctutils import cli, config, weights
from ctutils.backbones import build_model
from ctutils.base import file_sha256
from ctutils.registry import BACKBONES

pytestmark = pytest.mark.usefixtures("no_network")
SMALL, LITE = "mobilenet_v3_large", "efficientnet_lite0"  # the smallest of torchvision's six, and a pip package's
SIX = list(BACKBONES)[:6]
LITES = sorted(spec.weights_file for spec in BACKBONES.values() if spec.package)


def test_without_network_auto_is_random_and_says_so_once(caplog, monkeypatch, tmp_path):
    notes = [weights.find_weights(SMALL)[1].note for _ in range(2)]
    assert "connect to the network" in notes[1] and f"{SMALL}-8738ca79.pth" in notes[1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with user_error("no ImageNet weights of MobileNetV3", "CT_WEIGHTS"):
        build_model(SMALL, "imagenet")
    weights._silent.clear()
    calls, begin = [], time.monotonic()
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda *_a, **_k: calls.append(1) or time.sleep(5))
    monkeypatch.setattr(weights, "PROBE_SECONDS", 0.2)  # a network that hangs
    assert {weights.find_weights(name)[1].kind for name in SIX} == {"random"}
    assert time.monotonic() - begin < 3 and len(calls) == 1, "asked once a process, not once a backbone"
    assert files_below(tmp_path) == [], "nothing is written into torch's folder"


@pytest.fixture
def server(monkeypatch, tmp_path, small_state):
    """A web server in torchvision's place: six files with their true hashes in their names, one of them loads."""
    torch.save(small_state, tmp_path / "x.pth")
    content = {name: f"weights of {name}".encode() for name in SIX} | {SMALL: (tmp_path / "x.pth").read_bytes()}
    (tmp_path / "x.pth").unlink()
    names = {name: f"{name}-{hashlib.sha256(some).hexdigest()[:8]}.pth" for name, some in content.items()}
    files = {names[name]: some for name, some in content.items()}
    state = SimpleNamespace(names=names, files=dict(files), pause=0.0, status=200, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if (name := self.path[1:]) and state.status == 0:
                return  # hangs up without a word
            state.asked += [name] if name else []
            self.send_response(state.status if name else 404)
            self.send_header("Content-Length", str(len(files.get(name, ""))))
            self.end_headers()
            if name and state.status == 200:
                self.wfile.write(state.files[name])
                time.sleep(state.pause)

        def log_message(self, *_args):
            pass

        do_HEAD = do_GET

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{web.server_port}/"
    monkeypatch.setattr(weights, "_torchvision_url", lambda spec: url + names[spec.name])
    yield state
    web.shutdown()
    web.server_close()


def test_download_goes_to_torchs_cache_and_is_used_from_there(server, tmp_path, small_state):
    model, info = build_model(SMALL)
    name = server.names[SMALL]
    assert (info.kind, info.note, info.seed) == ("imagenet", "", None) and name in info.source
    assert torch.equal(model.classifier[3].weight, small_state["classifier.3.weight"])
    path = tmp_path / "hub" / "checkpoints" / name
    assert info.sha256 == file_sha256(path) and server.asked == [name]
    assert build_model(SMALL, "imagenet")[1] == info and len(server.asked) == 1
    path.write_bytes(b"half a file")
    with user_error(name, "begins with", "delete this file"):
        build_model(SMALL, "auto")
    path.unlink()
    path.mkdir()  # what the system refuses to read; its path is no part of the note
    assert "because Is a directory;" in build_model(SMALL, "auto")[1].note


FAULTS = {
    "another hash": "another hash",
    "cut short": "",
    "silent": "timed out",
    "refused": "Forbidden",
    "hangs up": "without response",
    "disk": "No space left",
}


def break_server(server, fault: str, monkeypatch, name: str) -> None:
    """Let the server fail in one way at a file, and everywhere where the fault is not the file's."""
    if fault in ("another hash", "cut short"):
        server.files[name] = b"x" * len(server.files[name]) if fault == "another hash" else server.files[name][:9]
    if fault == "silent":
        server.files = {key: some[:9] for key, some in server.files.items()}
        server.pause = 1.5
        monkeypatch.setattr(weights, "SILENCE_SECONDS", 0.3)
    server.status = {"refused": 403, "hangs up": 0}.get(fault, 200)
    if fault == "disk":
        full = OSError(28, "No space left on device", "/home/kim/x.pth")
        monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=full))


@pytest.mark.parametrize("fault, why", FAULTS.items())
def test_failed_download_leaves_nothing_and_says_why_once(server, fault, why, monkeypatch, tmp_path, caplog):
    break_server(server, fault, monkeypatch, server.names[SMALL])
    begin = time.monotonic()
    with user_error("the download of ImageNet weights failed", why):
        build_model(SMALL, "imagenet")
    note = build_model(SMALL, "auto")[1].note  # goes into the run record, which refuses paths of one machine
    assert "download" in note and why in note and "/home" not in note
    assert build_model(SMALL, "auto")[1].note == note and len(caplog.records) == 1, "said once"
    assert time.monotonic() - begin < 5 and weights.PROBE_SECONDS + weights.SILENCE_SECONDS < 20
    assert files_below(tmp_path / "hub") == []


def test_run_says_once_and_records_why_its_weights_are_random(server, monkeypatch, tmp_path, caplog, capsys):
    server.status = 403
    monkeypatch.setattr(config, "project_root", lambda: tmp_path)
    monkeypatch.setenv("CT_WEIGHTS", "auto")
    words = ["train", write_set(tmp_path / "set"), "--backbone", SMALL, "--epochs", 1, "--size", 64]
    assert cli.main([*map(str, words), "--out", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["weights"]
    assert stored["kind"] == "random" and "Forbidden" in stored["note"]
    assert [record.getMessage() for record in caplog.records] == [stored["note"]]
    assert stored["note"] not in capsys.readouterr().out, "said twice"


@pytest.fixture
def command(capsys, monkeypatch):
    """A function that runs `ctutils weights` and returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("CT_DEVICE", "cpu")

    def run(*words) -> tuple[int, str, str]:
        code = cli.main(["weights", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_folder_is_filled_once_and_used(server, command, tmp_path, monkeypatch, small_state):
    folder, names = tmp_path / "수업 weights", server.names
    code, out, _ = command("--to", folder)
    assert code == 0 and out.startswith("To fetch: ") and f"9 files, all whole; CT_WEIGHTS={folder}" in out
    assert files_below(folder) == sorted([*names.values(), *LITES]), "pip's as well, so that it stands alone"
    assert [file_sha256(folder / names[name])[:8] for name in SIX] == [names[name][-12:-4] for name in SIX]
    model, info = build_model(SMALL, folder)
    assert info.kind == "folder" and torch.equal(model.classifier[3].weight, small_state["classifier.3.weight"])
    assert sorted(server.asked) == sorted(names.values()) and not (tmp_path / "hub").exists()
    # Again: only what is not there or not whole; an own name is left alone; a killed download's rest goes.
    server.asked.clear()
    (folder / names["vgg16"]).write_bytes(b"half")
    (folder / names["alexnet"]).unlink()
    (folder / names["resnet50"]).rename(folder / "resnet50.pth")
    for age in (0, 999):
        (folder / f"{names['alexnet']}.{age}.partial").touch()
        os.utime(folder / f"{names['alexnet']}.{age}.partial", (time.time() - age,) * 2)
    monkeypatch.setenv("CT_WEIGHTS", str(folder))
    code, out, _ = command("--json", "--list")
    rows = {row["backbone"]: row for row in json.loads(out)["weights"]}
    assert code == 1 and list(rows) == list(BACKBONES) and server.asked == []
    assert [rows[name]["hash"] for name in ("vgg16", "alexnet", "resnet50", LITE)] == ["wrong", None, "unknown", "ok"]
    assert [rows[name]["where"] for name in ("vgg16", "alexnet", LITE)] == ["folder", "missing", "folder"]
    assert rows["vgg16"]["bytes"] == 4 and rows["alexnet"]["bytes"] == pytest.approx(244_408_911, rel=1e-4)
    code, out, _ = command("--json")
    assert code == 0 and {Path(row["path"]).parent for row in json.loads(out)["weights"]} == {folder}
    assert server.asked == [names["vgg16"], names["alexnet"]]
    assert [name for name in files_below(folder) if "partial" in name] == [f"{names['alexnet']}.0.partial"]
    assert command("--list")[0] == 0 and command()[0] == 0 and len(server.asked) == 2


def test_cache_is_filled_and_copied_from(server, command, tmp_path, monkeypatch):
    code, out, _ = command("--list", SMALL, LITE)
    assert (
        code == 1
        and "missing" in out
        and "pip package" in out
        and f"2 files, missing or wrong: {server.names[SMALL]}" in out
    )
    assert command(SMALL, LITE)[0] == 0 and build_model(SMALL)[1].kind == "imagenet"
    assert files_below(tmp_path / "hub" / "checkpoints") == [server.names[SMALL]], "pip's files stay where they are"
    assert command("--to", tmp_path / "f", SMALL)[0] == 0 and server.asked == [server.names[SMALL]]
    assert files_below(tmp_path / "f") == [server.names[SMALL]]
    (tmp_path / "hub" / "checkpoints" / server.names[SMALL]).write_bytes(b"half")
    assert command("--to", tmp_path / "g", SMALL)[0] == 0 and len(server.asked) == 2, "a damaged file is not copied"
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    code, _, error = command("--to", tmp_path / "f")
    assert code == 2
    check_message(error, "1 MB free", "room for")


@pytest.mark.parametrize("fault", ["absent", *FAULTS])
def test_all_that_cannot_be_had_is_named_in_one_line(request, command, fault, monkeypatch, tmp_path):
    names, left, asked = {name: weights._file_name(BACKBONES[name]) for name in SIX}, SIX, 0
    if fault != "absent":
        server = request.getfixturevalue("server")
        names, asked = server.names, {"silent": 1, "hangs up": 0, "disk": 0}.get(fault, 6)
        break_server(server, fault, monkeypatch, names["resnet50"])
        left = ["resnet50"] if fault in ("another hash", "cut short") else SIX
    begin = time.monotonic()
    code, _, error = command("--to", tmp_path / "f")
    assert code == 2 and time.monotonic() - begin < 5
    check_message(error, *[names[name] for name in left], FAULTS.get(fault, "within reach"), "what is there stays")
    assert fault == "absent" or len(server.asked) == asked, "a server that stands still is not asked again"
    there = sorted([*LITES, *(names[name] for name in SIX if name not in left)])
    assert files_below(tmp_path / "f") == there and not any(name in error for name in there)
    # The folder that lacks them: all are named at once, and what is there can be used.
    with user_error(
        f"no weights of {BACKBONES[left[0]].title}", *(names[name] for name in left), "ctutils weights --to"
    ):
        weights.find_weights(left[0], tmp_path / "f")
    assert weights.find_weights(LITE, tmp_path / "f")[1].kind == "folder"


def test_folder_need_not_hold_what_pip_has_brought(tmp_path):
    torch.save({}, tmp_path / f"{SMALL}.pth")
    assert weights.find_weights(LITE, tmp_path)[1] == weights.find_weights(LITE, "imagenet")[1]
    assert weights.which_weights(LITE, tmp_path) == "imagenet 57934424"
    with pytest.raises(ValueError) as caught:
        build_model("vgg16", tmp_path)
    assert [name for name in SIX if name not in str(caught.value)] == [SMALL] and "lite" not in str(caught.value)
    with user_error("existing folder"):
        weights.find_weights(LITE, tmp_path / "no such folder")
