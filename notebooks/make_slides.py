"""Slides of the notebooks that are taught: `make slides` writes data/slides/NN_name.html, one file each.

The slide types in the notebooks' metadata tell the story; what does not fit a screen goes on on the next slide. Code
that only plots is left out, and what answers a prediction waits for a key. A file holds all that it needs: reveal.js
comes from the pip package sphinx-revealjs, and nothing is fetched when it is shown.
"""

import argparse
import importlib.util
import re
import struct
import sys
from base64 import b64decode
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import SlidesExporter
from traitlets.config import Config

from ctutils.base import CTError, atomic_path

FOLDER = Path(__file__).resolve().parent
OUT = FOLDER.parent / "data" / "slides"
WIDTH, HEIGHT = 1280, 720  # of a slide, in pixels; larger screens are scaled
INSIDE = 1200, 640
HEADINGS = {"#": 85, "##": 62, "###": 52}  # their heights
WIDGET = "application/vnd.jupyter.widget-view+json"
NO_CODE = "hide-input"  # the tag of a cell whose code is plumbing
TEXT, CODE, SAID = (37, 78), (24, 104), (23, 108)  # a line: its height in pixels, characters that fit

TEMPLATE = """\
{%- extends 'reveal/base.html.j2' -%}
{%- block header -%}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ resources.metadata.name }}</title>
<style>{{ resources.reveal_css }}</style>
{%- for css in resources.inlining.css %}<style>{{ css }}</style>{% endfor %}
<style>{{ resources.slides_css }}</style>
</head><body><div class="reveal"><div class="slides">
{%- endblock -%}
{%- block in_prompt %}{% endblock -%}
{%- block empty_in_prompt %}{% endblock -%}
{%- block output_area_prompt %}{% endblock -%}
{%- block data_png %}
<img src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}" \
alt="{{ (output | get_metadata('alt', 'image/png') or 'a figure') | escape_html }}" \
width="{{ output | get_metadata('width', 'image/png') }}" height="{{ output | get_metadata('height', 'image/png') }}">
{%- endblock -%}
{%- block footer %}
</div></div>
<script>{{ resources.reveal_js }}</script>
<script>Reveal.initialize({width: WIDE, height: HIGH, margin: 0, center: false, hash: true, slideNumber: "c/t",
transition: "none"});</script>
</body></html>
{%- endblock -%}
""".replace("WIDE", str(WIDTH)).replace("HIGH", str(HEIGHT))

CSS = """
.reveal, .reveal h1, .reveal h2, .reveal h3 {font-family: "DejaVu Sans", "Noto Sans CJK KR", sans-serif; color: #222}
.reveal {font-size: 27px; line-height: 1.35}
.reveal .slides {text-align: left}
.reveal .slides section section {padding: 36px 40px; box-sizing: border-box; height: 720px; width: 1280px}
.reveal h1 {font-size: 44px; margin: 0 0 24px} .reveal h2 {font-size: 34px; margin: 0 0 16px}
.reveal h3 {font-size: 28px; margin: 0 0 12px} .reveal p, .reveal ul, .reveal ol {margin: 0 0 14px}
.reveal .went-on {color: #888; font-size: 20px; margin: 0 0 12px}
.reveal pre {font-family: "DejaVu Sans Mono", monospace; font-size: 18px; line-height: 24px; margin: 0 0 12px;
white-space: pre-wrap; overflow-wrap: anywhere}
.reveal .highlight pre {background: #f4f4f4; padding: 8px 12px}
.reveal .jp-OutputArea pre {font-size: 17px; line-height: 23px}
.reveal code {font-family: "DejaVu Sans Mono", monospace; font-size: 0.88em}
.reveal pre code {font-size: 1em}
.reveal table {font-size: 18px; line-height: 22px; border-collapse: collapse; margin: 0 0 12px}
.reveal td, .reveal th {padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: left}
.reveal a.anchor-link {display: none} .reveal a {color: #0072B2}
.reveal img {display: block; margin: 0 auto 8px}
"""


def library() -> Path:
    """Return the folder of reveal.js, in the package that brings it.

    Raises:
        CTError: the package is not installed.
    """
    found = importlib.util.find_spec("sphinx_revealjs")  # not imported: Sphinx is not needed
    folder = Path(found.origin).parent / "_static" / "revealjs" / "dist" if found else Path()
    if not (folder / "reveal.js").is_file():
        mend = "pip install --no-deps sphinx-revealjs, or make slides in a new .venv"
        raise CTError("no reveal.js", "the package sphinx-revealjs, which brings it", mend)
    return folder


def lines_of(text: str, width: int) -> int:
    return sum(1 + max(len(line) - 1, 0) // width for line in text.split("\n"))


def cut(text: str, most: int) -> list[str]:
    """Return a text in parts of at most `most` lines, cut where a line is empty or least indented."""
    lines, parts = text.rstrip().split("\n"), []
    while len(lines) > most:
        depth = [len(line) - len(line.lstrip()) if line.strip() else -1 for line in lines[: most + 1]]
        at = min(range(most // 2, most + 1), key=lambda k: (depth[k], -k))
        parts.append("\n".join(lines[:at]))
        lines = lines[at:]
    return [*parts, "\n".join(lines)]


def split_markdown(text: str) -> list[str]:
    """Return the headings, paragraphs, lists and tables of a Markdown text, without the line of links to neighbours."""
    text = "\n".join(line for line in text.split("\n") if not line.startswith(("[<", "</details", "<summary")))
    text = text.replace("<details>", "<details>\n")
    return [block for block in re.split(r"\n\s*\n|(?<=\n)(?=#)|(?<=[^\n])\n(?=[-*] |\d+\. )", text) if block.strip()]


def show_picture(output, most: int) -> int:
    """Set the size at which a picture is shown, at most twice its own and `most` pixels high; return its height."""
    wide, high = struct.unpack(">II", b64decode(output.data["image/png"][:64])[16:24])
    scale = min(INSIDE[0] / wide, most / high, 2)
    output.metadata.setdefault("image/png", {}).update(width=round(wide * scale), height=round(high * scale))
    return round(high * scale) + 12


def pieces(cell) -> list[tuple[int, nbformat.NotebookNode]]:
    """Return what of a cell is shown: heights in pixels, and a cell for each paragraph, code and output."""
    if cell.cell_type == "markdown":
        found, folded = [], False
        for block in split_markdown(cell.source):
            if block.strip() == "<details>":
                folded = True  # on slides it waits for a key instead
                continue
            high = 14 + TEXT[0] * lines_of(block, TEXT[1])
            if block.startswith("|"):
                high = 12 + 30 * sum(lines_of(row, 130) for row in block.split("\n"))
            shown = nbformat.v4.new_markdown_cell(block)
            if folded:
                shown.metadata.slideshow = {"slide_type": "fragment"}
            found.append((HEADINGS.get(block.partition(" ")[0], high), shown))
        return found
    plumbing = ("# plotting only", "drawings.", "widgets.")
    hidden = cell.source.startswith(plumbing) or NO_CODE in cell.metadata.get("tags", [])
    parts = [] if hidden else cut(cell.source, 22)
    found = [(30 + CODE[0] * lines_of(part, CODE[1]), nbformat.v4.new_code_cell(part)) for part in parts]
    for output in cell.outputs:
        said, kinds = output.get("name") == "stdout", output.get("data", {})
        if not (said or kinds) or WIDGET in kinds or "sr-only" in kinds.get("text/html", ""):
            continue  # an error, a warning, a control, or a picture's words, which the picture has as well
        shown = nbformat.v4.new_code_cell("", outputs=[output], metadata={"tags": [NO_CODE]})
        if "my_guess" in cell.source:
            shown.metadata.slideshow = {"slide_type": "fragment"}
        if "image/png" in output.get("data", {}):
            high = show_picture(output, INSIDE[1] - 60)
        elif "text/html" in output.get("data", {}):
            high = 12 + 29 * output.data["text/html"].count("<tr")
        else:
            text = "".join(output.get("text") or output.data["text/plain"])
            high = 12 + SAID[0] * lines_of(text.strip(), SAID[1])
        found.append((high, shown))
    return found


def arrange(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Turn the cells of a notebook, in place, into cells that fit the screen, slide by slide, and return it.

    A cell without a slide type stands below the one before it; `skip` leaves it out. A heading begins a slide, and so
    does what would not fit any more: then the heading is said again. A figure becomes smaller before it moves.
    """
    cells, used, heading, above = [], 0, "", ""
    for cell in notebook.cells:
        kind = cell.metadata.get("slideshow", {}).get("slide_type", "-")
        if kind in ("skip", "notes") or "test" in cell.metadata.get("tags", []):
            continue
        for high, piece in pieces(cell):
            title = piece.source.partition(" ")[2] if piece.source.partition(" ")[0] in HEADINGS else ""
            left = INSIDE[1] - used
            if high > left > 420 and any("image/png" in output.get("data", {}) for output in piece.get("outputs", ())):
                high = show_picture(piece.outputs[0], left - 12)
            if kind == "-" and (high > left or (title and not above)):
                kind = "subslide"
            if kind != "-":
                used = 0
                if heading and not title:
                    cells.append(nbformat.v4.new_markdown_cell(f'<div class="went-on">{heading}</div>'))
                    cells[-1].metadata.slideshow, used, kind = {"slide_type": kind}, 40, "-"
                else:
                    piece.metadata.slideshow = {"slide_type": kind}
            cells.append(piece)
            used, heading, above, kind = used + high, title or heading, title, "-"
    notebook.cells = cells
    return notebook


def make_slides(path: Path, out: Path) -> Path:
    """Write the slides of one executed notebook; return the file.

    Raises:
        CTError: reveal.js is missing, or the notebook says nothing about slides.
    """
    dist, notebook = library(), nbformat.read(path, as_version=4)
    if not any("slideshow" in cell.metadata for cell in notebook.cells):
        raise CTError(f"no slide types in '{path.name}'", "slideshow metadata", "name a notebook that has them")
    config = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {NO_CODE}})
    loaders = [DictLoader({"slides.html.j2": TEMPLATE})]
    exporter = SlidesExporter(extra_loaders=loaders, template_file="slides.html.j2", embed_images=True, config=config)
    given = {"metadata": {"name": path.stem, "path": str(path.parent)}, "slides_css": CSS}
    given |= {f"reveal_{kind}": (dist / f"reveal.{kind}").read_text(encoding="utf-8") for kind in ("js", "css")}
    html, _ = exporter.from_notebook_node(arrange(notebook), resources=given)
    target = out / f"{path.stem}.html"
    with atomic_path(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write slides of the notebooks.")
    parser.add_argument("--only", nargs="+", metavar="NN", help="numbers of notebooks, e.g. 05 09")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    try:
        for path in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")):
            asked = options.only and path.name[:2] in options.only
            if asked or (not options.only and '"slideshow"' in path.read_text(encoding="utf-8")):
                print(make_slides(path, options.out))
    except CTError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
