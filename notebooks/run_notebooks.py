"""Run the notebooks in order: `make run` (copies in data/executed) and `make notebooks` (outputs in place).

python notebooks/run_notebooks.py                 all notebooks
python notebooks/run_notebooks.py --only 05 09    some
python notebooks/run_notebooks.py --in-place      store the outputs, profile standard
python notebooks/run_notebooks.py --solutions     those of the exercises, in notebooks/solutions
"""

import argparse
import base64
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from ctutils.base import CTError, atomic_path, read_json, write_json
from ctutils.config import get_settings
from ctutils.data import default_folder
from ctutils.results import YARDSTICKS, results_markdown

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
EXECUTED = ROOT / "data" / "executed"
RESULTS_BEGIN = "<!-- results: written by `make notebooks` from data/reference_runs -->"
RESULTS_END = "<!-- /results -->"
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclasses.dataclass
class Outcome:
    """How one notebook's run went; `error` is empty when it went well, `peak_mb` is of its kernel."""

    name: str
    seconds: float
    peak_mb: float
    error: str = ""


def find_notebooks(folder: Path, only: list[str] | None = None) -> list[Path]:
    """Return the notebooks of a folder in order, or those whose names start with one of `only`.

    Raises:
        CTError: there is none, or none that starts so.
    """
    found = sorted(folder.glob("*.ipynb"))
    if not found:
        raise CTError(f"no notebooks in '{folder}'", "files like 00_quickstart.ipynb", "take a fresh clone")
    if not only:
        return found
    for start in only:
        if not any(path.name.startswith(start) for path in found):
            numbers = ", ".join(path.stem.split("_")[0] for path in found)
            raise CTError(f"no notebook '{start}'", f"one of {numbers}", "name notebooks by their numbers")
    return [path for path in found if path.name.startswith(tuple(only))]


def clean(notebook: nbformat.NotebookNode) -> None:
    """Keep only what is the same in every run, in place: no stderr, no widgets, no versions, no timings."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "slideshow", "jupyter") if key in cell.metadata}
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]


def children_memory() -> int:
    """Return the memory of all child processes together, the kernel and its workers, in bytes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            # The proportional share (Linux) counts what workers share with the kernel only once.
            total += process.memory_full_info().pss if psutil.LINUX else process.memory_info().rss
    return total


def run_notebook(path: Path, timeout: int | None = None) -> tuple[nbformat.NotebookNode, Outcome]:
    """Run one notebook in its folder, with a kernel of its own.

    Args:
        path: the notebook; it is not written to.
        timeout: seconds a cell may take; None is no limit.
    Returns:
        the notebook with its outputs, up to the cell that failed if one did; and how it went.
    """
    notebook, errors, started, start = nbformat.read(path, as_version=4), [], [0], time.perf_counter()
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        startup_timeout=120,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # no warning about an unencrypted local port
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=lambda cell, cell_index: started.__setitem__(0, started[0] + 1),  # code cells
    )

    def execute() -> None:
        try:
            client.execute()
        except CellExecutionError as caught:
            errors.append(f"{caught.ename}: {caught.evalue}".strip())
        except CellTimeoutError:
            errors.append(f"took longer than {timeout} s")
        except DeadKernelError:
            errors.append("the kernel died (out of memory?)")
        except Exception as caught:  # a thread would lose it
            errors.append(f"{type(caught).__name__}: {caught}")

    # In a thread, where nbclient sets no signal handlers; its own leave Ctrl-C with a long traceback.
    thread, peak = threading.Thread(target=execute), 0
    thread.start()
    try:
        while thread.is_alive():  # on Windows a wait without an end does not hear Ctrl-C
            thread.join(timeout=0.5)
            peak = max(peak, children_memory())
    except KeyboardInterrupt:
        for child in psutil.Process().children(recursive=True):
            child.kill()  # the thread ends with its kernel
        raise
    error = f"cell {started[0]}: {errors[0]}" if errors else ""
    return notebook, Outcome(path.stem, time.perf_counter() - start, peak / 1e6, error)


def run_all(
    paths: list[Path],
    executed: Path,
    *,
    in_place: bool = False,
    profile: str = "",
    timeout: int | None = None,
) -> list[Outcome]:
    """Run notebooks one after the other, a line each; a failing one does not stop those after it.

    Writes `executed`/<name>.ipynb, or with `in_place` the notebook itself where it ran to its end, and
    `executed`/timings.json: {name: {seconds, peak_mb, profile, ok}}, notebooks not run now keep theirs.
    """
    timings_file = executed / "timings.json"
    timings = read_json(timings_file) if timings_file.exists() else {}
    outcomes = []
    for path in paths:
        print(f"{path.stem:<28}", end=" ", flush=True)
        notebook, outcome = run_notebook(path, timeout)
        outcomes.append(outcome)
        state = "FAILED" if outcome.error else "ok"
        print(f"{state:<6} {outcome.seconds:7.1f} s {outcome.peak_mb / 1000:6.2f} GB", flush=True)
        if in_place:
            clean(notebook)
        if not (in_place and outcome.error):
            target = path if in_place else executed / path.name
            with atomic_path(target) as temporary:
                temporary.write_bytes((nbformat.writes(notebook) + "\n").encode())
        timings[outcome.name] = {
            "seconds": round(outcome.seconds, 1),
            "peak_mb": round(outcome.peak_mb),
            "profile": profile,
            "ok": not outcome.error,
        }
        write_json(timings_file, dict(sorted(timings.items())))
    return outcomes


def set_environment(in_place: bool) -> None:
    """Set what the kernels inherit. Stored outputs are those of the defaults, whatever the shell says."""
    if in_place:
        for name in [name for name in os.environ if name.startswith("CT_")]:
            del os.environ[name]
        os.environ["CT_PROFILE"] = "standard"
    os.environ.pop("MPLBACKEND", None)  # the kernel chooses its inline pictures
    os.environ.update(PYTHONHASHSEED="0", OMP_WAIT_POLICY="PASSIVE")
    if not sys.stderr.isatty():
        os.environ["CT_PROGRESS"] = "0"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks in order.")
    parser.add_argument("--only", nargs="+", metavar="NN", help="numbers of the notebooks to run, e.g. 05 09")
    parser.add_argument("--in-place", action="store_true", help="store the outputs (profile standard)")
    parser.add_argument("--solutions", action="store_true", help="run notebooks/solutions instead")
    parser.add_argument("--timeout", type=int, help="seconds a cell may take (default: no limit)")
    options = parser.parse_args(arguments)
    set_environment(options.in_place)
    below = "solutions" if options.solutions else "."
    executed = EXECUTED / below
    try:
        paths = find_notebooks(FOLDER / below, options.only)
        profile = prepare_data()
        os.environ["CT_PROGRESS"] = "0"  # from here on a line a notebook is the progress
        with tempfile.TemporaryDirectory(prefix="ct-ipython-") as ipython_dir:
            os.environ["IPYTHONDIR"] = ipython_dir  # no start-up files, no history of the user's
            outcomes = run_all(paths, executed, in_place=options.in_place, profile=profile, timeout=options.timeout)
    except CTError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The notebooks before this one are done.", file=sys.stderr)
        return 130

    total = sum(outcome.seconds for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.error]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} notebooks ok in {total / 60:.1f} min", end=", ")
    print(f"at most {max(outcome.peak_mb for outcome in outcomes) / 1000:.2f} GB")
    for outcome in failed:
        print(f"FAILED {outcome.name}.ipynb, {outcome.error}")
    if not options.in_place:
        print(f"Executed copies: {executed.relative_to(ROOT)}\n", flush=True)
        if options.solutions:
            return 1 if failed else 0
        results = subprocess.run([sys.executable, "-m", "ctutils", "results"], cwd=ROOT)
        if results.returncode and not options.only:  # with --only there may be no record yet
            return 1
    elif not (failed or options.only or options.solutions):
        publish()
    return 1 if failed else 0


def publish() -> None:
    """After a whole run in place: renew what the repository shows of it.

    Copies the run records without their weights to data/reference_runs, writes their table into the README, and
    takes the README's picture from notebook 01 (the cell tagged `readme-picture`).
    """
    source = get_settings().runs_dir
    target = ROOT / "data" / "reference_runs" / source.name
    for record in target.glob("*/run.json"):  # those of sweeps stand a folder deeper: `make sweeps` renews them
        shutil.rmtree(record.parent)
    copy_records(source, target)
    shutil.copyfile(EXECUTED / "timings.json", target / "timings.json")
    shutil.copyfile(source / YARDSTICKS, target / YARDSTICKS)
    replace_between(ROOT / "README.md", RESULTS_BEGIN, RESULTS_END, results_markdown(target))
    for cell in nbformat.read(FOLDER / "01_data_exploration.ipynb", as_version=4).cells:
        if "readme-picture" in cell.metadata.get("tags", []):
            png = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
            with atomic_path(ROOT / "data" / "readme.png") as temporary:
                temporary.write_bytes(base64.b64decode(png))
    print("Renewed: README.md, data/readme.png, data/reference_runs")


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace, in a UTF-8 file, what stands between two lines that mark it.

    Raises:
        CTError: one of the marks is missing.
    """
    before, first, rest = path.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise CTError(f"no '{end if first else begin}' in '{path.name}'", "both marks", "put them back")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def copy_records(source: Path, target: Path) -> None:
    """Copy the records that the notebooks made, without their weights."""
    for record in sorted(source.glob("[0-9][0-9]_*/run.json")):
        copy = target / record.parent.name
        copy.mkdir(parents=True)
        for name in ("run.json", "history.csv", "predictions.csv"):
            shutil.copyfile(record.with_name(name), copy / name)


def prepare_data() -> str:
    """Make the default data set if none is there, print a line about it, return the profile's name."""
    settings = get_settings()
    print(settings, flush=True)
    folder = default_folder(settings)
    print(f"data: {folder.name}, {len(folder.slices)} slices, {len(folder.classes)} classes\n", flush=True)
    return settings.profile.name


if __name__ == "__main__":
    sys.exit(main())
