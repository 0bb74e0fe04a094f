"""Slides: what is said where, and that nothing leaves the screen, in a real browser where there is one."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from ctutils.base import CTError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync".split()
# Addresses that a page fetches by itself; a link to a paper is none.
FETCHED = re.compile(r"""(?:\bsrc|<link[^>]*href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?(?:https?:)?//""")
MEASURE = """<script>addEventListener("load", () => {
const found = Reveal.getSlides().map(slide => {
  const at = Reveal.getIndices(slide); Reveal.slide(at.h, at.v, 99);
  const zoom = Reveal.getScale(), page = slide.getBoundingClientRect();
  const parts = [...slide.querySelectorAll("*")].map(part => part.getBoundingClientRect());
  return [at.h, at.v, slide.textContent.trim().slice(0, 40), parts.length,
    Math.max(...parts.map(part => (part.bottom - page.top) / zoom)),
    Math.max(...parts.map(part => (part.right - page.left) / zoom)),
    Math.max(0, ...[...slide.querySelectorAll("pre, table")].map(part => part.scrollWidth - part.clientWidth))]});
const said = document.createElement("pre"); said.id = "measured"; said.textContent = JSON.stringify(found);
document.body.append(said)})</script>"""


@pytest.fixture
def slides(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return pytest.importorskip("make_slides", reason="nbconvert is not installed")


@pytest.fixture
def reveal(slides):
    """Skips where no package has brought reveal.js."""
    try:
        return slides.library()
    except CTError as error:
        pytest.skip(str(error))


def cell(source, kind=None, outputs=None, tags=()):
    made = new_markdown_cell(source) if outputs is None else new_code_cell(source, outputs=outputs)
    made.metadata = nbformat.from_dict(({"slideshow": {"slide_type": kind}} if kind else {}) | {"tags": list(tags)})
    return made


def picture(wide, high):
    Image.new("L", (wide, high)).save(file := io.BytesIO(), format="PNG")
    return new_output("display_data", data={"image/png": base64.b64encode(file.getvalue()).decode()})


def text(said):
    return new_output("stream", name="stdout", text=said)


def test_slides_fit_skip_and_wait(slides):
    cells = [
        cell("# 05 - Net\n\nWhy?\n\n[< 04](04.ipynb) | [next](06.ipynb)", "slide"),
        cell("import os", "skip", []),
        cell("assert True", None, [], ["test"]),
        cell("## 2. Run\n\n" + "word " * 200 + "\n\n" + "more " * 200, "slide"),
        cell("my_guess = None", None, [text("right")]),
        cell("# plotting only\nplot()", "subslide", [picture(800, 400)]),
        cell("secret()", None, [text("shown")], ["hide-input"]),
    ]
    cells[5].outputs.insert(0, new_output("display_data", data={"text/html": '<span class="sr-only">x</span>'}))
    found = slides.arrange(new_notebook(cells=cells)).cells
    said = [(some.metadata.get("slideshow", {}).get("slide_type"), some.source.strip()[:12]) for some in found]
    again, figure = '<div class="', found[-3].outputs[0].metadata["image/png"]
    assert said == [
        ("slide", "# 05 - Net"),
        (None, "Why?"),
        ("slide", "## 2. Run"),
        (None, "word word wo"),
        ("subslide", again),
        (None, "more more mo"),
        (None, "my_guess = N"),
        ("fragment", ""),
        ("subslide", again),
        (None, ""),
        ("subslide", again),
        (None, ""),
    ]
    assert (figure["width"], figure["height"]) == (1160, 580) and found[-1].metadata.tags == ["hide-input"]
    tall = slides.arrange(new_notebook(cells=[cell("## A\n\nB", "slide"), cell("x", None, [picture(400, 400)])])).cells
    assert tall[-1].outputs[0].metadata["image/png"]["height"] < 530, "below the code: it becomes smaller"
    assert [some.metadata.get("slideshow") for some in tall[1:]] == [None] * 3


def test_long_code_is_cut_and_folded_answers_wait(slides):
    code = "\n".join(["def f():", *["    x = 1"] * 20, "", "def g():", *["    y = 2"] * 20])
    answers = "## Bugs\n\nFind them.\n\n<details>\n<summary>Five</summary>\n\n1. one\n2. two\n\n</details>"
    found = slides.arrange(new_notebook(cells=[cell(answers, "slide"), cell(code, "slide", [])])).cells
    kinds = [(some.metadata.get("slideshow", {}).get("slide_type"), some.source.split("\n")[0]) for some in found]
    assert kinds[:4] == [("slide", "## Bugs"), (None, "Find them."), ("fragment", "1. one"), ("fragment", "2. two")]
    assert [line for _, line in kinds[4:] if "class" not in line] == ["def f():", ""] and "def g" in found[-1].source


def test_what_cannot_be_made_is_said(slides, tmp_path, monkeypatch, capsys):
    nbformat.write(new_notebook(cells=[cell("# 05")]), tmp_path / "05_x.ipynb")
    monkeypatch.setattr(slides, "FOLDER", tmp_path)
    monkeypatch.setattr(slides, "library", lambda: tmp_path)
    assert slides.main([]) == 0 and slides.main(["--only", "05"]) == 1
    assert "no slide types in '05_x.ipynb'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CTError, match="no reveal.js.*make slides"):
        slides.library()


def measured(page: Path, folder: Path) -> list:
    """Open a page in a real browser of 1280 x 720 pixels and return where each slide's content ends."""
    copy = folder / page.name
    copy.write_text(page.read_text("utf-8").replace("</body>", MEASURE + "</body>"), "utf-8")
    options = [*FLAGS, "--window-size=1280,720", f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=20000"]
    command = [CHROMIUM, *options, "--dump-dom", copy.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    found = re.search(r'<pre id="measured">(.*?)</pre>', shown.stdout)
    assert found, f"the page did not run: {shown.stderr[-2000:]}"
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


TAUGHT = [path for path in sorted(FOLDER.glob("*.ipynb")) if '"slideshow"' in path.read_text("utf-8")]


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_slides_of_a_notebook_fetch_nothing_and_stay_on_the_screen(path, slides, reveal, tmp_path):
    page = slides.make_slides(path, tmp_path / "out")
    html = page.read_text("utf-8")
    assert not FETCHED.search(re.sub(r"data:[a-z/+-]+;base64,[^\"]*", "", html)), "fetches something"
    assert "<img" in html and len(re.findall('<img[^>]* alt=.[^"]', html)) == html.count("<img"), "no alt text"
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    found = measured(page, tmp_path)
    wrong = [one for one in found if one[4] > 720 or one[5] > 1280 or one[6] > 0 or one[3] == 0]
    assert len(found) > 5 and not wrong, f"(h, v, text, parts, bottom, right, hidden): {wrong}"
