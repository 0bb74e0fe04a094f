"""What the commands print for people: 80 columns, doubts after training, commands that can be typed."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctutils import screen
from ctutils.results import comparison_table
from ctutils.runs import list_runs

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference_runs" / "standard"


@pytest.mark.parametrize("plan", ["", "12_epochs_and_unfreezing"])
def test_results_fit_80_columns_and_tell_runs_apart(plan):
    runs, _ = list_runs(REFERENCE / plan)
    lines = screen.results_table(comparison_table(runs), width=80).splitlines()
    assert max(map(len, lines)) == 80 and len(lines) >= len(runs) + 3
    assert len({line.split("  ")[0] + line[-30:] for line in lines}) > len(runs), "two runs look the same"
    assert "not above chance" in lines[-1] + lines[-2]


def test_a_table_counts_hangul_as_two_places_and_cuts_names_in_their_middle():
    names = ["폐렴" * 20 + "하나", "폐렴" * 20 + "둘", "short"]
    lines = screen.table(["name", "n"], [[name, 7] for name in names], numbers=1, width=40).splitlines()
    assert [screen._places(line) for line in lines] == [40] * 4 and all(line.endswith(" 7") for line in lines[1:])
    assert lines[1].rstrip(" 7").endswith("하나") and lines[2].rstrip(" 7").endswith("둘") and ".." in lines[1]


def run(**counts: int) -> SimpleNamespace:
    scores = {"val": {"macro_f1": 0.6}, "test": {"macro_f1": 0.5, "low": 0.31, "high": 0.72}}
    record = {"data": {"counts": {"test": counts}, "test_from_val": True}, "scores": scores, "best_epoch": 2}
    record |= {"weights": {"kind": "imagenet"}, "seconds": {"total": 3}}
    table = {"path": [f"test/ILD/slice {k}.png" for k in range(3)]}
    plan, folder = SimpleNamespace(epochs=10), Path.cwd() / "runs" / "one run"
    return SimpleNamespace(record=record, plan=plan, of_split=lambda split: table, folder=folder)


def test_doubts_are_said_and_only_these():
    assert screen.doubts(run(ILD=20, Normal=400), None) == screen.doubts(run(ILD=20), ["info: x: y"]) == []
    found = screen.doubts(run(ILD=19, Normal=400), ["error: near twins: 3 of 9", "warning: a: b", "error: c: d"])
    assert "2 error(s)" in found[0] and "near twins: 3 of 9" in found[0]
    assert "ILD 19:" in found[1] and "0.41 wide" in found[1] and "Normal" not in found[1]


def test_what_to_type_next_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(screen.os, "name", "posix")
    for verdicts, first in ((None, "check"), (["error: a: b"], "check"), (["info: a: b"], "predict")):
        lines = screen.train_text(run(ILD=30), tmp_path, verdicts).splitlines()
        steps = [shlex.split(line) for line in lines if line[:2] == "  "]
        assert [words[3] for words in steps][:1] == [first] and all(words[1:3] == ["-m", "ctutils"] for words in steps)
    assert steps[0][4:6] == ["runs/one run", "slice.png"], "no such slice: a name to replace"
    (tmp_path / "test" / "ILD").mkdir(parents=True)
    (tmp_path / "test" / "ILD" / "slice 0.png").touch()
    line = screen.train_text(run(ILD=30), tmp_path, []).splitlines()[-2]
    assert shlex.split(line)[-3] == str(tmp_path / "test/ILD/slice 0.png")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ctutils"])
    assert screen.command("check", "a b") == "ctutils check 'a b'"
