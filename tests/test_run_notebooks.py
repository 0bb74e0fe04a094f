"""The executor behind `make run` and `make notebooks`, on small notebooks."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ctutils.base import CTError

ROOT = Path(__file__).resolve().parent.parent

sys.path.append(str(ROOT / "notebooks"))
run_notebooks = importlib.import_module("run_notebooks")

NOISY = """\
import os, warnings

from tqdm.auto import tqdm

print("one")
warnings.warn(f"from process {os.getpid()}")
print("two", len(list(tqdm(range(3)))))"""


def write_notebook(path, *sources, tags=()):
    cells = [new_markdown_cell("# title", id="title")]
    cells += [new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(sources)]
    cells[-1].metadata = {"tags": list(tags), "scrolled": True}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "other", "display_name": "x"}}), path)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "note books 노트").mkdir()
    return tmp_path / "note books 노트"


def test_a_failing_notebook_does_not_stop_the_others(folder, capsys):
    paths = [
        write_notebook(folder / "00_fails.ipynb", "x = 1", "print(undefined)", "x = 2"),
        write_notebook(folder / "01_dies.ipynb", "import os; os._exit(1)"),
        write_notebook(folder / "02_hangs.ipynb", "import time; time.sleep(60)"),
        write_notebook(folder / "03_works.ipynb", "block = b'x' * 200_000_000", "import time; time.sleep(0.5)"),
    ]
    before = [path.read_bytes() for path in paths]
    executed = folder / "executed"
    executed.mkdir()
    (executed / "timings.json").write_text('{"05_resnet50": {"seconds": 7}}')
    outcomes = run_notebooks.run_all(paths, executed, profile="quick", timeout=3)

    assert outcomes[0].error == "cell 2: NameError: name 'undefined' is not defined"
    assert outcomes[1].error.startswith("cell 1: the kernel died")
    assert outcomes[2].error == "cell 1: took longer than 3 s"
    assert outcomes[3].error == "" and outcomes[3].peak_mb > 200
    assert [path.read_bytes() for path in paths] == before
    lines = [" ".join(line.split()[:2]) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["00_fails FAILED", "01_dies FAILED", "02_hangs FAILED", "03_works ok"]
    copy = nbformat.read(executed / "03_works.ipynb", as_version=4)
    assert [cell.execution_count for cell in copy.cells[1:]] == [1, 2]
    timings = json.loads((executed / "timings.json").read_text())
    assert timings.pop("05_resnet50") == {"seconds": 7} and list(timings) == [path.stem for path in paths]
    assert timings["03_works"].items() >= {"ok": True, "profile": "quick"}.items() and not timings["00_fails"]["ok"]
    assert timings["03_works"]["peak_mb"] > 200 and timings["03_works"]["seconds"] > 0.5


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
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    assert notebook.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert [cell.id for cell in notebook.cells] == ["title", "cell-0", "cell-1"]
    noisy, last = notebook.cells[1:]
    assert [output.text for output in noisy.outputs] == ["one\ntwo 3\n"]  # no warning, no bar
    assert last.metadata == {"tags": ["nbval-ignore-output"]} and last.outputs[0].data["text/plain"] == "42"
    ruff = [sys.executable, "-m", "ruff", "format", "--isolated", "--check", str(path)]
    assert subprocess.run(ruff, capture_output=True).returncode == 0

    path = write_notebook(folder / "01_fails.ipynb", "1 / 0")
    (outcome,) = run_notebooks.run_all([path], executed, in_place=True)
    assert "ZeroDivisionError" in outcome.error and b"ZeroDivisionError" not in path.read_bytes()


def test_finds_notebooks_by_number(folder):
    paths = [write_notebook(folder / f"{name}.ipynb", "1") for name in ("00_a", "05_b", "09_c")]
    assert run_notebooks.find_notebooks(folder) == paths
    assert run_notebooks.find_notebooks(folder, ["09", "05"]) == paths[1:]
    with pytest.raises(CTError, match="no notebook '07'.*one of 00, 05, 09"):
        run_notebooks.find_notebooks(folder, ["07"])
    with pytest.raises(CTError, match="no notebooks in"):
        run_notebooks.find_notebooks(folder / "none")


@pytest.mark.parametrize("in_place, data, profile", [(True, None, "standard"), (False, "mine", "full")])
def test_stored_outputs_do_not_depend_on_the_shell_and_a_run_keeps_its_choices(monkeypatch, in_place, data, profile):
    shell = dict(os.environ, CT_DATA="mine", CT_PROFILE="full", MPLBACKEND="Agg")
    monkeypatch.setattr(os, "environ", shell)
    run_notebooks.set_environment(in_place)
    assert (shell.get("CT_DATA"), shell["CT_PROFILE"]) == (data, profile)
    assert "MPLBACKEND" not in shell and (shell["PYTHONHASHSEED"], shell["OMP_WAIT_POLICY"]) == ("0", "PASSIVE")


@pytest.fixture
def stub_main(folder, monkeypatch):
    """`main` on the notebooks of `folder`, without data set and results table."""
    run = mock.Mock(return_value=subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    places = {"ROOT": folder, "FOLDER": folder, "EXECUTED": folder / "data" / "executed"}
    for name, value in {**places, "prepare_data": lambda: "quick"}.items():
        monkeypatch.setattr(run_notebooks, name, value)
    monkeypatch.setattr(run_notebooks.subprocess, "run", run)
    return run


def test_main_reports_and_exits_with_1_on_failure(folder, stub_main, capsys):
    write_notebook(folder / "00_fails.ipynb", "raise ValueError('first line\\nlast line')")
    write_notebook(folder / "01_works.ipynb", "1")
    assert run_notebooks.main([]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 notebooks ok" in out and "FAILED 00_fails.ipynb, cell 1: ValueError: first line" in out
    assert stub_main.call_args.args[0][1:] == ["-m", "ctutils", "results"]
    assert run_notebooks.main(["--only", "01"]) == 0
    (folder / "solutions").mkdir()
    write_notebook(folder / "solutions" / "01_solutions.ipynb", "1")
    stub_main.reset_mock()
    assert run_notebooks.main(["--solutions"]) == 0 and not stub_main.called
    executed = folder / "data" / "executed"
    assert (executed / "solutions" / "01_solutions.ipynb").exists() and not (executed / "01_solutions.ipynb").exists()
    assert run_notebooks.main(["--only", "07"]) == 1
    assert "Found no notebook '07'" in capsys.readouterr().err


def test_ctrl_c_stops_the_kernel_and_exits_with_130(folder, stub_main, capsys):
    write_notebook(folder / "00_long.ipynb", "import time; time.sleep(60)")
    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    threading.Timer(2, signal.raise_signal, [signal.SIGINT]).start()
    try:
        assert run_notebooks.main([]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30 and "Stopped" in capsys.readouterr().err
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not any("ipykernel" in " ".join(child.cmdline()) for child in alive)


def test_records_are_copied_without_weights_and_without_sweeps(tmp_path):
    names = ["05_resnet50", "10_augmentation/plain-s0", "mine", "10_augmentation/.plain-s1.tmp"]
    for name in names:
        for file in ("run.json", "history.csv", "predictions.csv", "head.safetensors"):
            path = tmp_path / "runs" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    run_notebooks.copy_records(tmp_path / "runs", tmp_path / "out")
    copied = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {"history.csv", "predictions.csv", "run.json"}
    assert copied == {tmp_path / "out" / name / file for name in names[:1] for file in expected}


def test_text_between_two_marks_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("한글\n<a>\nold\n</a>\nrest\n", encoding="utf-8")
    for marks in (("<a>", "</a>"), ("<a>", "</a>"), ("<b>", "</a>"), ("<a>", "</b>")):
        with pytest.raises(CTError, match="no '</?b>'") if "b" in str(marks) else contextlib.nullcontext():
            run_notebooks.replace_between(path, *marks, "new" if "b" not in str(marks) else "lost")
        assert path.read_text(encoding="utf-8") == "한글\n<a>\nnew\n</a>\nrest\n"
