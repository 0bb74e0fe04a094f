"""`ctutils serve`: files go in by a browser's form, the page comes out, and nothing stays."""

import base64
import contextlib
import itertools
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_experiment import tiny_networks  # noqa: F401
from test_people import CHROMIUM, FLAGS, HU, odd_pictures, project, user_says, write_dicom  # noqa: F401

from ctutils import cli
from ctutils.people.command import load_predictor

REASON = "the extra demo is not installed"
here = "http://127.0.0.1:8000"


@pytest.fixture
def made(project):  # noqa: F811
    """A function: limit in MB -> the server of a trained run as an application."""
    for name in ("starlette", "uvicorn", "python_multipart"):
        pytest.importorskip(name, reason=REASON)
    from ctutils.people.serve import make_app

    options = SimpleNamespace(run=project.run, weights="auto", data=None)
    return lambda limit=20: make_app(*load_predictor(options, slices=True), "127.0.0.1", limit)


@pytest.fixture
def client(made):
    from starlette.testclient import TestClient

    return TestClient(made(), base_url=here)


@pytest.fixture
def files(project, tmp_path):  # noqa: F811
    """Slices, a DICOM file of three frames, a photograph, and what is no slice, under names that are not easy."""
    folder = tmp_path / "여러 장"
    odd_pictures(folder)
    for number, path in enumerate(sorted((project.set / "test" / "폐렴").iterdir())[:2]):
        Image.open(path).save(folder / f"흉부 <i> {number}.PNG")
    write_dicom(folder / "세 장.DCM", HU)
    (folder / "text.png").write_text("hello")
    names = ["흉부 <i> 0.PNG", "흉부 <i> 1.PNG", "세 장.DCM", "photograph 0.JPG", "text.png"]
    return [folder / name for name in names]


def form(paths):
    """A body as browsers send it: names in UTF-8."""
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
        % (path.name.encode(), path.read_bytes())
        for path in paths
    ]
    headers = {"content-type": "multipart/form-data; boundary=edge"}
    return {"content": b"".join([*parts, b"--edge--\r\n"]), "headers": headers}


def test_several_files_are_shown_as_predict_shows_them_and_bad_ones_are_named(client, project, files, tmp_path):  # noqa: F811
    empty = client.get("/")
    assert empty.status_code == 200 and 'type="file"' in empty.text and "20 MB" in empty.text
    answer = client.post("/", **form(files))
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    out = tmp_path / "page.html"
    assert cli.main(["predict", str(project.run), *map(str, files), "--html", str(out)]) == 2
    said = out.read_text(encoding="utf-8").replace(str(files[0].parent) + "/", "")
    assert answer.text.count("<article") == 6 and "흉부 &lt;i&gt; 1.PNG" in answer.text
    assert answer.text[answer.text.index("<p>6 slices") :] == said[said.index("<p>6 slices") :]
    assert "text.png: not a picture" in answer.text and "세 장.DCM frame 3" in answer.text
    only_bad = client.post("/", **form(files[-1:]))
    assert (
        only_bad.status_code == 200 and "text.png: not a picture" in only_bad.text and "<article" not in only_bad.text
    )


def test_no_file_is_kept(client, project, tmp_path, monkeypatch):  # noqa: F811
    (spool := tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    before = {path: path.stat().st_mtime_ns for path in project.root.rglob("*")}
    assert (tmp_path / "large.png").stat().st_size > 3_000_000, "beyond what is held in memory"
    assert client.post("/", **form([tmp_path / "large.png"])).text.count("<article") == 1
    assert not list(spool.iterdir()) and before == {p: p.stat().st_mtime_ns for p in project.root.rglob("*")}


def test_what_the_form_does_not_send_gets_a_page_that_says_why(client, files):
    assert "No file was sent" in client.post("/", data={"files": ""}).text
    (files[0].parent / "x").write_bytes(b"")
    unnamed = form([files[0].parent / "x"]) | {"content": form([files[-1]])["content"].replace(b"text.png", b"")}
    assert client.post("/", **unnamed).status_code == 400
    many = client.post("/", **form([files[-1]] * 1001))
    assert many.status_code == 400 and "Not read: Too many files" in many.text
    assert client.post("/", content=iter([b"x"])).status_code == 413, "says no size"
    assert client.post("/", content=b"x" * 99, headers=form([])["headers"]).status_code == 400
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/../run.json").status_code == 404 and client.put("/").status_code == 405


@pytest.fixture
def live(made):
    """A function: limit in MB -> the port of a real server."""
    with contextlib.ExitStack() as stack:

        def start(limit=20):
            import uvicorn

            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = uvicorn.Server(uvicorn.Config(made(limit), log_level="warning", timeout_graceful_shutdown=2))
            thread = threading.Thread(target=server.run, args=([listening],))
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            thread.start()
            return listening.getsockname()[1]

        yield start


def test_a_large_upload_is_refused_before_it_is_read(live):
    with socket.create_connection(("127.0.0.1", live(1)), timeout=30) as line:
        line.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000000\r\n\r\n--")
        said = b""
        while b"</html>" not in said:
            assert (some := line.recv(65536)), said
            said += some
    assert said.startswith(b"HTTP/1.1 413") and b"9000.0 MB. At most 1 MB" in said


def test_ctrl_c_ends_it_and_a_port_in_use_is_said(made, project, capsys, user_says):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        user_says(["serve", str(project.run), "--port", str(port)], str(port), "--port")
    user_says(["serve", str(project.run), "--port", "70000"], "70000")
    user_says(["serve", str(project.run), "--port", "0", "--limit-mb", "0"], "--limit-mb")
    pages = []

    def visit():
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
                pages.append(page.read().decode())
                return signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)

    visitor = threading.Thread(target=visit)
    visitor.start()
    assert cli.main(["serve", project.run.name, "--port", str(port), "--json"]) == 0
    visitor.join()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["url"] == f"http://127.0.0.1:{port}/" and captured.err == ""
    assert "Classify" in pages[0]


def test_without_the_extra_one_sentence_says_so(project, monkeypatch, user_says):  # noqa: F811
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    user_says(["serve", str(project.run)], "python_multipart", "[demo]")


# ---------------------------------------------------------------- a real browser


@pytest.fixture
def tab(tmp_path):
    """A tab of headless Chromium, 1280 x 720: a function that sends it one command of the DevTools protocol."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    websocket = pytest.importorskip("websocket", reason="no websocket-client, which JupyterLab brings")
    profile, numbers = tmp_path / "profile", itertools.count()
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--window-size=1280,720", "--remote-debugging-port=0"]
    with subprocess.Popen([*words, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            for _ in range(600):
                if (found := profile / "DevToolsActivePort").exists() and len(found.read_text().split()) == 2:
                    break
                time.sleep(0.1)
            with urllib.request.urlopen(f"http://127.0.0.1:{found.read_text().split()[0]}/json") as targets:
                address = next(one for one in json.load(targets) if one["type"] == "page")["webSocketDebuggerUrl"]
            line = websocket.create_connection(address, suppress_origin=True, timeout=120)

            def send(method, **params):
                number = next(numbers)
                line.send(json.dumps({"id": number, "method": method, "params": params}))
                while (answer := json.loads(line.recv())).get("id") != number:
                    pass
                assert "error" not in answer, answer
                return answer["result"]

            send("Emulation.setDeviceMetricsOverride", width=1280, height=720, deviceScaleFactor=1, mobile=False)
            yield send
            line.close()
        finally:
            browser.terminate()


def test_upload_in_a_real_browser(live, tab, files, tmp_path):
    def value(script):
        return tab("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(script):
        for _ in range(1200):
            if value(f"document.readyState == 'complete' && ({script})"):
                return
            time.sleep(0.1)
        raise AssertionError(value("document.body.innerText"))

    def upload(paths):
        root = tab("DOM.getDocument")["root"]["nodeId"]
        box = tab("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        tab("DOM.setFileInputFiles", nodeId=box, files=list(map(str, paths)))
        value("document.querySelector('button').click()")

    def picture(name):
        data = tab("Page.captureScreenshot", format="png")["data"]
        (tmp_path / f"{name}.png").write_bytes(base64.b64decode(data))

    tab("Page.navigate", url=f"http://127.0.0.1:{live(1)}/")
    wait("document.querySelector('form')")
    picture("empty")
    upload(files)
    wait("document.querySelectorAll('article').length == 6")
    picture("answer")
    assert value("[...document.images].every(one => one.complete && one.naturalWidth >= 64)")
    assert value("document.images.length") == 6 * (2 + 3)
    assert value("document.documentElement.scrollWidth <= innerWidth && innerWidth == 1280")
    text = value("document.body.innerText")
    assert "흉부 <i> 0.PNG" in text and "세 장.DCM frame 2" in text and "text.png: not a picture" in text
    assert "Unlike anything this model was trained on" in text and "Not for clinical use" in text
    (tmp_path / "large.png").write_bytes(bytes(5_000_000))
    upload([tmp_path / "large.png"])
    wait("document.querySelector('.warn') && document.body.innerText.includes('At most 1 MB')")
    picture("refused")
    upload(files[:1])  # and goes on
    wait("document.querySelectorAll('article').length == 1")
