"""Test environment of the notebooks, and cures for faults of nbval 0.11."""

import collections
import functools
import os
import queue
import tempfile
import time
from unittest import mock

import pytest
import zmq
from nbval import plugin as nbval
from nbval.kernel import RunningKernel

SKIPPED = pytest.skip.Exception

# Nothing of the user's shell may change a result; kernels and subprocesses inherit what stands here.
for _name in [name for name in os.environ if name.startswith("CT_")]:
    del os.environ[_name]
_ipython_dir = tempfile.TemporaryDirectory(prefix="ct-ipython-")  # no start-up files, no history of the user's
os.environ.update(
    CT_PROFILE="quick",
    CT_WEIGHTS="random",  # no test downloads anything
    PYTHONHASHSEED="0",
    OMP_WAIT_POLICY="PASSIVE",  # spinning OpenMP threads cost 2.5 times under load
    IPYTHONDIR=_ipython_dir.name,
)


class PatientKernel(RunningKernel):
    """nbval's kernel, which here reads output while a cell runs and notices when the kernel dies."""

    def __init__(self, *args, **kwargs):
        self._outputs = collections.deque()  # iopub messages read ahead of nbval
        with mock.patch.dict(os.environ):
            os.environ.pop("MPLBACKEND", None)  # set for the unit tests; the kernel chooses its inline pictures
            super().__init__(*args, **kwargs)

    def execute_cell_input(self, cell_input, allow_stdin=None):
        # nbval runs cells without history, and IPython then prints what a trailing ";" should hide.
        return self.kc.execute(cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)

    def get_message(self, stream, timeout=None):
        if stream == "iopub" and self._outputs:
            return self._outputs.popleft()
        return super().get_message(stream, timeout)

    def await_reply(self, msg_id, timeout=None):
        # nbval waits on the reply alone: outputs beyond the socket's buffer are lost (from about 1000
        # messages), and a dead kernel is noticed only at the cell's timeout.
        end = time.monotonic() + (timeout or float("inf"))
        poller = zmq.Poller()
        for channel in (self.kc.shell_channel, self.kc.iopub_channel):
            poller.register(channel.socket, zmq.POLLIN)
        while time.monotonic() < end:
            poller.poll(500)
            quiet = True
            while self.kc.iopub_channel.msg_ready() and time.monotonic() < end:
                self._outputs.append(self.kc.iopub_channel.get_msg())
                quiet = False
            while self.kc.shell_channel.msg_ready():
                message = self.kc.shell_channel.get_msg()
                if message["parent_header"].get("msg_id") == msg_id:
                    return
                quiet = False
            if quiet and not self.is_alive():
                raise RuntimeError("The kernel died while this cell was running (out of memory?).")
        raise queue.Empty


def pytest_configure(config):
    nbval.RunningKernel = PatientKernel
    if config.option.nbval_sanitize_with:
        # nbval takes the path relative to the current folder; the one in pyproject.toml is relative to it.
        config.option.nbval_sanitize_with = str(config.rootpath / config.option.nbval_sanitize_with)


def pytest_collectstart(collector):
    if isinstance(collector, nbval.IPyNbFile):
        collector.skip_compare += ("stderr",)  # warnings hold paths and process ids
        collector.broken_by = None


def pytest_itemcollected(item):
    if isinstance(item, nbval.IPyNbCell):
        item.output_timeout = 60  # seconds; nbval's 5 are too few for a busy machine
        item.compare_outputs = functools.partial(_compare_without_widgets, item.compare_outputs)


def _compare_without_widgets(compare, test, reference):
    # Stored notebooks keep no widgets, as their models are gone; a progress bar is one.
    widget = "application/vnd.jupyter.widget-view+json"
    test, reference = ([o for o in outputs if widget not in o.get("data", {})] for outputs in (test, reference))
    return compare(test, reference)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if isinstance(item, nbval.IPyNbCell) and item.parent.broken_by:
        pytest.skip(f"{item.parent.broken_by} of this notebook failed")


def pytest_runtest_makereport(item, call):
    # After an error the cells that follow would fail for no reason of their own. Other outputs break nothing.
    if isinstance(item, nbval.IPyNbCell) and call.excinfo and not call.excinfo.errisinstance(SKIPPED):
        if str(call.excinfo.value) not in ("Cell outputs differ", "Unrun reference cell has outputs"):
            item.parent.broken_by = item.name
