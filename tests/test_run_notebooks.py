"""The executor behind `make run` and `make notebooks`, on small notebooks."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ctutils.base import CTError

ROOT = Path(__file__).resolve().parent.parent

spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "notebooks" / "run_notebooks.py")
run_notebooks = importlib.util.module_from_spec(spec)
sys.modules["run_notebooks"] = run_notebooks  # dataclasses look their module up
spec.loader.exec_module(run_notebooks)

NOISY = """\
import os
import warnings

from tqdm.auto import tqdm

print("one")
warnings.warn(f"from process {os.getpid()}")
for _ in tqdm(range(3)):
    pass
print("two")"""


def write_notebook(path, *sources, tags=()):
    cells = [new_markdown_cell("# title", id="title")]
    cells += [new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(sources)]
    cells[-1].metadata = {"tags": list(tags), "scrolled": True}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "other", "display_name": "x"}}), path)
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "note books 노트"
    folder.mkdir()
    return folder


def test_a_failing_notebook_does_not_stop_the_others(folder, capsys):
    paths = [
        write_notebook(folder / "00_fails.ipynb", "x = 1", "print(undefined)", "x = 2"),
        write_notebook(folder / "01_dies.ipynb", "import os; os._exit(1)"),
        write_notebook(folder / "02_hangs.ipynb", "import time; time.sleep(60)"),
        write_notebook(folder / "03_works.ipynb", "block = b'x' * 200_000_000", "import time; time.sleep(0.5)"),
    ]
    before = [path.read_bytes() for path in paths]
    executed = folder / "executed"
    outcomes = run_notebooks.run_all(paths, executed, profile="quick", timeout=3)

    assert outcomes[0].error == "cell 2: NameError: name 'undefined' is not defined"
    assert outcomes[1].error.startswith("cell 1: the kernel died")
    assert outcomes[2].error == "cell 1: took longer than 3 s"
    assert outcomes[3].error == "" and outcomes[3].peak_mb > 200
    assert [path.read_bytes() for path in paths] == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["00_fails", "FAILED"],
        ["01_dies", "FAILED"],
        ["02_hangs", "FAILED"],
        ["03_works", "ok"],
    ]
    copy = nbformat.read(executed / "03_works.ipynb", as_version=4)
    assert [cell.execution_count for cell in copy.cells if cell.cell_type == "code"] == [1, 2]
    timings = json.loads((executed / "timings.json").read_text())
    assert list(timings) == [path.stem for path in paths]
    assert timings["03_works"]["ok"] and timings["03_works"]["profile"] == "quick"
    assert timings["03_works"]["peak_mb"] > 200 and timings["03_works"]["seconds"] > 0.5
    assert not timings["00_fails"]["ok"]


def test_stored_outputs_are_clean_and_do_not_change(folder):
    path = write_notebook(folder / "00_noisy.ipynb", NOISY, "41 + 1", tags=["nbval-ignore-output"])
    executed = folder / "executed"
    run_notebooks.run_all([path], executed, in_place=True)
    first = path.read_bytes()
    run_notebooks.run_all([path], executed, in_place=True)
    assert path.read_bytes() == first
    assert not (executed / path.name).exists()

    notebook = nbformat.reads(first.decode(), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.display_name == "Python 3"
    assert notebook.metadata.language_info == {"name": "python"}
    assert [cell.id for cell in notebook.cells] == ["title", "cell-0", "cell-1"]
    noisy, last = notebook.cells[1:]
    assert [output.text for output in noisy.outputs] == ["one\ntwo\n"]  # no warning, no bar
    assert last.metadata == {"tags": ["nbval-ignore-output"]}
    assert last.outputs[0].data["text/plain"] == "42"
    assert [noisy.execution_count, last.execution_count] == [1, 2]
    ruff = [sys.executable, "-m", "ruff", "format", "--isolated", "--check", str(path)]
    assert subprocess.run(ruff, capture_output=True).returncode == 0


def test_a_failing_notebook_is_not_stored(folder):
    path = write_notebook(folder / "00_fails.ipynb", "1 / 0")
    before = path.read_bytes()
    (outcome,) = run_notebooks.run_all([path], folder / "executed", in_place=True)
    assert "ZeroDivisionError" in outcome.error
    assert path.read_bytes() == before


def test_timings_of_other_notebooks_stay(folder):
    executed = folder / "executed"
    executed.mkdir()
    (executed / "timings.json").write_text('{"05_resnet50": {"seconds": 7}}')
    run_notebooks.run_all([write_notebook(folder / "00_a.ipynb", "1")], executed)
    timings = json.loads((executed / "timings.json").read_text())
    assert list(timings) == ["00_a", "05_resnet50"] and timings["05_resnet50"] == {"seconds": 7}


def test_cells_without_an_id_get_the_same_one_each_time(folder):
    path = folder / "old.ipynb"
    cell = {"cell_type": "markdown", "metadata": {}, "source": ["# a\n", "b"]}
    old = {"cells": [cell, cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    path.write_text(json.dumps(old))
    first, second = (run_notebooks.read_notebook(path) for _ in range(2))
    assert first == second and len({cell.id for cell in first.cells}) == 2
    assert first.cells[0].source == "# a\nb"


def test_finds_notebooks_by_number(folder):
    names = ["00_quickstart", "05_resnet50", "09_results"]
    for name in reversed(names):
        write_notebook(folder / f"{name}.ipynb", "1")

    def found(only=None):
        return [path.stem for path in run_notebooks.find_notebooks(folder, only)]

    assert found() == names
    assert found(["09", "05"]) == names[1:]
    with pytest.raises(CTError, match="no notebook '07'.*one of 00, 05, 09"):
        found(["07"])
    with pytest.raises(CTError, match="no notebooks in"):
        run_notebooks.find_notebooks(folder / "none")


def test_stored_outputs_do_not_depend_on_the_shell(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ, CT_DATA="mine", CT_PROFILE="full", MPLBACKEND="Agg"))
    run_notebooks.set_environment(in_place=True)
    assert os.environ["CT_PROFILE"] == "standard"
    assert "CT_DATA" not in os.environ and "MPLBACKEND" not in os.environ


def test_a_run_keeps_the_shell_choices(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ, CT_DATA="mine", CT_PROFILE="full"))
    run_notebooks.set_environment(in_place=False)
    assert (os.environ["CT_DATA"], os.environ["CT_PROFILE"]) == ("mine", "full")
    assert (os.environ["PYTHONHASHSEED"], os.environ["OMP_WAIT_POLICY"]) == ("0", "PASSIVE")


@pytest.fixture
def stub_main(folder, monkeypatch):
    """`main` on the notebooks of `folder`, without data set and results table."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(run_notebooks, "ROOT", folder)
    monkeypatch.setattr(run_notebooks, "FOLDER", folder)
    monkeypatch.setattr(run_notebooks, "EXECUTED", folder / "data" / "executed")
    monkeypatch.setattr(run_notebooks, "prepare_data", lambda: "quick")
    commands = []

    def run(command, cwd):
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run_notebooks.subprocess, "run", run)
    return commands


def test_main_reports_and_exits_with_1_on_failure(folder, stub_main, capsys):
    write_notebook(folder / "00_fails.ipynb", "raise ValueError('first line\\nlast line')")
    write_notebook(folder / "01_works.ipynb", "1")
    assert run_notebooks.main([]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 notebooks ok" in out
    assert "FAILED 00_fails.ipynb, cell 1: ValueError: first line" in out
    assert stub_main == [["-m", "ctutils", "results"]]
    assert run_notebooks.main(["--only", "01"]) == 0


def test_main_says_one_line_about_a_users_mistake(folder, stub_main, capsys):
    assert run_notebooks.main([]) == 1
    assert "Found no notebooks" in capsys.readouterr().err


def test_ctrl_c_stops_the_kernel_and_exits_with_130(folder, stub_main, capsys):
    write_notebook(folder / "00_long.ipynb", "import time; time.sleep(60)")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    threading.Timer(2, signal.raise_signal, [signal.SIGINT]).start()
    start = time.monotonic()
    try:
        assert run_notebooks.main([]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30
    assert "Stopped" in capsys.readouterr().err
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in alive if "ipykernel" in " ".join(child.cmdline())]


def test_records_are_copied_without_weights_and_sweeps_apart(tmp_path):
    names = ["05_resnet50", "10_augmentation/plain-s0", "mine", "10_augmentation/.plain-s1.tmp"]
    for name in names:
        for file in ("run.json", "history.csv", "predictions.csv", "head.safetensors"):
            path = tmp_path / "runs" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    run_notebooks.copy_records(tmp_path / "runs", tmp_path / "out")
    copied = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    files = ("history.csv", "predictions.csv", "run.json")
    assert [c for c in copied if "tmp" not in c] == [f"{name}/{file}" for name in names[:2] for file in files]
    assert not any("safetensors" in name or ".plain" in name for name in copied)
