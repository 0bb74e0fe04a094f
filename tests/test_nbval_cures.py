"""Each cure in notebooks/conftest.py against the fault that it cures: small notebooks, run by a pytest of their own."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent

# Cells that neither break nor slow a notebook share one kernel.
PLAIN = {
    "semicolon": ("42;", None),
    "stderr": ("import os, sys\nprint('warning of', os.getpid(), file=sys.stderr)", None),
    "widget": ("from ctutils.base import progress\nfor _ in progress(range(3)):\n    pass\nprint('done')", "done\n"),
    "pictures": ("import matplotlib\nprint('inline' in matplotlib.get_backend())", "True\n"),
    "environment": (
        "import os\nprint(sorted(name for name in os.environ if name.startswith('CT_')))\n"
        "print(os.environ['CT_PROFILE'], os.environ['PYTHONHASHSEED'], os.environ['OMP_WAIT_POLICY'])",
        "['CT_PROFILE', 'CT_WEIGHTS']\nquick 0 PASSIVE\n",
    ),
    "sanitized": (
        "import datetime\nprint(object(), datetime.datetime.now())\nprint(f'{12.34:9.1f} s')\n"
        "print(' 10%|#   | 1/10 [00:00<00:01]')",
        "<object object at 0x7f0000000000> 2020-01-01 00:00:00.123\n  1.0 s\n 20%|##  | 2/10 [00:00<00:02]\n",
    ),
    "differs": ("print('new')", "old\n"),
    "counts_differ": ("print('12 slices')", "11 slices\n"),
    "after_other_outputs": ("print('same')", "same\n"),  # they do not stop a notebook
    "expected_error": ("1 / 0", None, "raises-exception", "nbval-ignore-output"),
    "after_expected_error": ("print(1)", "1\n"),
}

# Notebook -> cells (source, stored stdout, tags).
CELLS = {
    "plain": list(PLAIN.values()),
    "error": [("1 / 0", None), ("print('runs after an error')", "runs after an error\n")],
    "dead": [("import os; os._exit(1)", None), ("print(1)", "1\n")],
    "flood": [
        # Flushed prints are one message each; 8000 still fit into the buffers of a quick machine.
        ("for i in range(12000):\n    print(i, flush=True)", "".join(f"{i}\n" for i in range(12000)))
    ],
    "slow_output": [
        (
            "import sys, time\n"
            "sys.stdout.flush_timeout = sys.stderr.flush_timeout = 0.1  # so that the reply does not wait\n"
            "get_ipython().kernel.iopub_thread.schedule(lambda: time.sleep(6.5))",
            None,
        )
    ],
}


def write_notebook(path, cells):
    notebook = new_notebook()
    for number, (source, stdout, *tags) in enumerate(cells, start=1):
        outputs = [] if stdout is None else [new_output("stream", name="stdout", text=stdout)]
        cell = new_code_cell(source, id=f"cell-{number}", execution_count=number, outputs=outputs)
        cell.metadata.tags = tags
        notebook.cells.append(cell)
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """All notebooks above, run once: {"name::Cell 0": ("passed" | "failed" | "skipped", message)}."""
    folder = tmp_path_factory.mktemp("note books")  # not the project's: the sanitize file must be found all the same
    for name, cells in CELLS.items():
        write_notebook(folder / f"{name}.ipynb", cells)
    report = folder / "report.xml"
    shell = {"PYTHONPATH": str(ROOT / "notebooks"), "MPLBACKEND": "Agg"}
    shell |= {"CT_DATA": "leaks", "CT_PROGRESS": "0", "CT_PROFILE": "full"}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(ROOT / "pyproject.toml")]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", "--nbval-cell-timeout=60", "."]
    options = {"capture_output": True, "text": True, "timeout": 180}
    run = subprocess.run(command, cwd=folder, env=os.environ | shell, **options)
    assert report.exists(), run.stdout + run.stderr
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        fault = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        state = "passed" if fault is None else "skipped" if fault.tag == "skipped" else "failed"
        message = "" if fault is None else f"{fault.get('message')} {fault.text}"
        outcomes[f"{case.get('classname').split('.')[-2]}::{case.get('name')}"] = (state, message)
    assert len(outcomes) == sum(map(len, CELLS.values())), run.stdout
    return outcomes


def at(name):
    return f"plain::Cell {list(PLAIN).index(name)}"


@pytest.mark.parametrize(
    "cell",
    [
        *(at(name) for name in sorted(PLAIN.keys() - {"differs", "counts_differ"})),
        "flood::Cell 0",  # outputs are read while a cell runs
        "slow_output::Cell 0",  # outputs may come more than 5 s after the reply
    ],
)
def test_passes(outcome, cell):
    assert outcome[cell] == ("passed", "")


@pytest.mark.parametrize(
    "cell, state, message",
    [
        (at("differs"), "failed", "Cell outputs differ"),
        (at("counts_differ"), "failed", "Cell outputs differ"),  # the sanitize patterns leave counts alone
        ("error::Cell 0", "failed", "ZeroDivisionError"),
        ("error::Cell 1", "skipped", "Cell 0 of this notebook failed"),
        ("dead::Cell 0", "failed", "The kernel died"),  # at once, not at the cell timeout
        ("dead::Cell 1", "skipped", "Cell 0 of this notebook failed"),
    ],
)
def test_fails_and_the_rest_is_skipped(outcome, cell, state, message):
    assert outcome[cell][0] == state and message in outcome[cell][1], outcome[cell]
