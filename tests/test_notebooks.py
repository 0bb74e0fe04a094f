"""Hygiene of the notebooks: what nbval does not ask for. The checks are tested on a faulty notebook below."""

import ast
import itertools
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

ABSOLUTE_PATH = re.compile(r"""(?<![\w.])/(?:home|Users|root|tmp|work|workspace|mnt|content)/|\b[A-Z]:\\+[A-Za-mo-z]""")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def plain(text: str) -> str:
    """Letters and digits only, in lower case: `MobileNetV3` and `mobilenet_v3` agree."""
    return re.sub(r"[\W_]", "", text).lower()


def parse(cell) -> ast.Module:
    lines = cell.source.splitlines()
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))


def output_texts(cell):
    """All of a cell's outputs but its pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))


def check_notebook(path: Path) -> list[str]:
    """Return what is wrong with a notebook, a line each; empty when nothing is."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    markdown = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    wrong = []

    if path.stat().st_size >= 2_000_000:
        wrong.append(f"{path.stat().st_size} bytes; expected less than 2 MB")
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        wrong.append(f"kernel {kernel}; expected python3")

    number, _, name = path.stem.partition("_")
    title = notebook.cells[0].source.split("\n")[0] if notebook.cells else ""
    title = re.sub(r" \([가-힣 ]+\)$", "", title)  # the Korean term
    if not title.startswith(f"# {number} - ") or plain(title.partition(" - ")[2]) != plain(name):
        wrong.append(f"title '{title}'; expected '# {number} - ' and the name as in '{path.name}'")
    said = sum(cell.source.lower().count("not for clinical use") for cell in markdown)
    if said != 1:
        wrong.append(f"'not for clinical use' {said} times; expected once")
    for cell in markdown:
        for target in LINK.findall(cell.source):
            if "://" not in target and not (path.parent / target).exists():
                wrong.append(f"a link to '{target}', which is not there")

    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        wrong.append(f"execution counts {counts}; expected 1 to {len(code)} in order: make notebooks")
    if not any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs):
        wrong.append("no picture")

    for position, cell in enumerate(code):
        where = f"code cell {position + 1}"
        tags = cell.metadata.get("tags", [])
        if any(output.output_type == "error" for output in cell.outputs) and "raises-exception" not in tags:
            wrong.append(f"{where}: an error as output")
        if any(ABSOLUTE_PATH.search(text) for text in [cell.source, *output_texts(cell)]):
            wrong.append(f"{where}: an absolute path")
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        if any(not output.metadata.get("image/png", {}).get("alt") for output in pictures):
            wrong.append(f"{where}: a picture without a text: plots.show instead of plt.show")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            wrong.append(f"{where}: stored stderr: make notebooks")
        if re.search(r"^\s*[%!].*\b(pip|conda|mamba|uv)\b.*\binstall\b", cell.source, re.MULTILINE):
            wrong.append(f"{where}: an install")
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                wrong.append(f"{where}: a star import")
        if "nbval-ignore-output" in tags:
            following = code[position + 1 :]
            if not any(isinstance(node, ast.Assert) for later in following for node in ast.walk(parse(later))):
                wrong.append(f"{where}: output ignored, and no assert in the code cells after it")
        if "test" in tags and not cell.metadata.get("jupyter", {}).get("source_hidden"):
            wrong.append(f"{where}: for the tests only, and not collapsed")
        if "nbval-skip" in tags:
            wrong.append(f"{where}: never run by the tests (nbval-skip)")
    return wrong


def test_notebooks_are_numbered_without_a_gap():
    numbers = [path.name.split("_")[0] for path in NOTEBOOKS]
    assert numbers == [f"{n:02d}" for n in range(max(len(numbers), 10))]  # 00 to 09 at least


def test_korean_guide_has_every_notebook_and_term():
    guide = (FOLDER / "README.ko.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"]({path.name})" not in guide] == []
    assert "합성데이터" in guide and "내국인" in guide and guide.count("\n| ") > 55


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    assert check_notebook(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exercise_has_its_solution(path):
    asked = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    asked = asked.partition("## Exercises\n")[2].partition("\n## ")[0]
    solutions = FOLDER / "solutions" / f"{path.stem[:2]}_solutions.ipynb"
    answered = [  # a heading counts if code follows
        number
        for cell, following in itertools.pairwise(nbformat.read(solutions, as_version=4).cells)
        for number in re.findall(r"^## (\d+)\. ", cell.source, re.MULTILINE)
        if cell.cell_type == "markdown" and following.cell_type == "code"
    ]
    assert answered and answered == re.findall(r"^(\d+)\. ", asked, re.MULTILINE)
    assert check_notebook(solutions) == []


# ---------------------------------------------------------------- the checks themselves


@pytest.fixture
def good(tmp_path):
    """A notebook without a fault, the path to write it to, and a function that checks it."""
    path = tmp_path / "05_mobilenet_v3.ipynb"
    picture = new_output("display_data", data={"image/png": "aGFsbG8/home/x", "text/plain": "a slice"})
    picture.metadata["image/png"] = {"alt": "a slice"}
    ignored = {"tags": ["nbval-ignore-output"]}
    cells = [
        new_markdown_cell("# 05 - MobileNetV3\n\nNot for clinical use. [Next](05_mobilenet_v3.ipynb#end)"),
        new_code_cell("%matplotlib inline\nimport torch\nprint('Class A:\\n')", metadata=ignored),
        new_code_cell("print('and/or', './tmp/x', 'https://x.org/home/')"),
        new_code_cell("for n in [1]:\n    assert n == 1, n", outputs=[picture]),
    ]
    for count, cell in enumerate(cells[1:], start=1):
        cell.execution_count = count
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    return notebook, lambda: nbformat.write(notebook, path) or check_notebook(path)


def test_checks_let_a_good_notebook_pass(good):
    assert good[1]() == []


def test_a_title_may_name_the_korean_term(good):
    notebook, check = good
    set_title("# 05 - MobileNetV3 (깊이별 합성곱)")(notebook)
    assert check() == []


def set_title(text):
    return lambda notebook: notebook.cells[0].update(source=text + "\nnot for clinical use")


def set_source(text):
    return lambda notebook: notebook.cells[2].update(source=text)


def add_output(output):
    return lambda notebook: notebook.cells[2].outputs.append(output)


@pytest.mark.parametrize(
    "change, message",
    [
        (set_title("# 06 - MobileNetV3"), "title"),
        (set_title("# 05 - ResNet50"), "title"),
        (set_title("05 - MobileNetV3"), "title"),
        (lambda n: n.cells.append(new_markdown_cell("Not for clinical use!")), "2 times; expected once"),
        (lambda n: n.cells[0].update(source="# 05 - MobileNetV3"), "0 times; expected once"),
        (lambda n: n.cells.append(new_markdown_cell("[x](06_gone.ipynb)")), "a link to '06_gone.ipynb'"),
        (lambda n: n.cells[2].update(execution_count=None), "execution counts [1, None, 3]"),
        (lambda n: n.cells[2].update(execution_count=3), "execution counts [1, 3, 3]"),
        (lambda n: n.cells[3].update(outputs=[]), "no picture"),
        (lambda n: n.metadata.kernelspec.update(name="course"), "kernel course"),
        (set_source("x = '" + "x" * 2_000_000 + "'"), "less than 2 MB"),
        (lambda n: n.cells[3].outputs[0].metadata.clear(), "code cell 3: a picture without a text"),
        (set_source("open('/home/me/x')"), "code cell 2: an absolute path"),
        (set_source("open('C:\\\\Users')"), "code cell 2: an absolute path"),
        (set_source("from numpy import *"), "code cell 2: a star import"),
        (set_source("%pip install x"), "code cell 2: an install"),
        (set_source("!python -m pip install x"), "code cell 2: an install"),
        (lambda n: n.cells[2].metadata.update(tags=["nbval-skip"]), "code cell 2: never run"),
        (lambda n: n.cells[3].update(source="'assert'"), "code cell 1: output ignored, and no assert"),
        (lambda n: n.cells[3].metadata.update(tags=["test"]), "code cell 3: for the tests only, and not collapsed"),
        (add_output(new_output("error", ename="E", evalue="", traceback=[])), "code cell 2: an error"),
        (add_output(new_output("stream", name="stderr", text="w")), "code cell 2: stored stderr"),
        (add_output(new_output("stream", name="stdout", text="in /Users/me/")), "code cell 2: an absolute path"),
        (add_output(new_output("display_data", data={"text/html": "/home/x"})), "code cell 2: an absolute path"),
    ],
)
def test_checks_find_each_fault(good, change, message):
    notebook, check = good
    change(notebook)
    assert any(message in line for line in check()), check()
