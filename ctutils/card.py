"""A model card: one page of Markdown that says what a run is, what it scored, and what that does not show."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ctutils import metrics, results
from ctutils.registry import BACKBONES
from ctutils.runs import Run


def model_card(run: Run, audit: Iterable[str] | None = None) -> str:
    """Describe a run in Markdown: data, split, score with interval, per class, calibration, limits.

    Args:
        run: the record; without a test split the validation figures are shown and called optimistic.
        audit: findings of `python -m ctutils check`, one sentence each.
    Returns:
        Markdown text that ends with a line break.
    """
    record, plan, data, weights = run.record, run.plan, run.record["data"], run.record["weights"]
    split = "test" if "test" in run.splits else "val"
    y_true, y_score, patients = run.y_true(split), run.y_score(split), run.patients(split)
    score, right = results.interval(run, split), metrics.accuracy(y_true, y_score.argmax(axis=1))
    trained, frozen = record["parameters"]["trained"], record["parameters"]["frozen"]
    note = f" {weights['note']}" if weights["note"] else ""
    sample = "slices drawn anew"
    if patients is not None:
        sample = f"{len(set(patients) - {''})} patients drawn anew, not their slices"
    lines = [
        f"# Model card: {run.name}",
        "",
        "**Not for clinical use.** Made in a course, for learning.",
        "",
        "## Model",
        f"- {BACKBONES[plan.backbone].title}, weights: {weights['kind']} ({weights['source']}).{note}",
        f"- Trained: {record['trained']} ({trained:,} parameters; {frozen:,} frozen), BatchNorm: {record['bn']}.",
        f"- {plan.optimizer}, learning rate {record['lr']:g}, epoch {record['best_epoch']} of {plan.epochs} chosen on"
        f" validation, seed {plan.seed}, {plan.size} pixels a side, profile {record['profile']}.",
        f"- Made {record['created']} on {record['device']} in {record['seconds']['total']:.0f} s,"
        f" commit {record['git_commit'] or 'unknown'}.",
        "",
        "## Data",
        f"- {data['name']} ({data['kind']}), fingerprint {data['fingerprint']}.",
    ]
    if window := data["window"]:
        greys = f"level {window['level']:g}, width {window['width']:g} {window['unit']}"
        lines.append(f"- Greys made from DICOM with the window {greys}.")
    if data["patients"]:
        lines.append(f"- {data['patients']} patients are known.")
    lines += [f"- {note[:1].upper()}{note[1:]}." for note in data.get("notes", [])]
    lines += _counts(data["counts"], run.classes)
    if data["test_from_val"]:
        lines += ["", "There was no test split: validation was cut in two, one half chose the epoch."]
    lines += [
        "",
        "## Score",
        f"- Macro F1 on {split}: **{score.value:.3f}** (95 % interval {score.low:.3f} to {score.high:.3f},"
        f" {len(y_true)} slices; {sample}).",
        f"- Accuracy: {right:.3f};"
        f" calling everything the largest class would give {np.bincount(y_true).max() / len(y_true):.3f}.",
    ]
    if split == "val":
        lines.append("- Optimistic: the same slices chose the epoch.")
    lines += ["", "## By class", *_class_table(metrics.per_class(y_true, y_score, run.classes))]
    lines += ["", "## Calibration", *_calibration(run, split)]
    lines += ["", "## Audit of the data"]
    lines += [f"- {line}" for line in audit or ("Not given. Run `python -m ctutils check` on the data set.",)]
    lines += ["", "## Limits", *(f"- {line}" for line in limits(run))]
    return "\n".join(lines) + "\n"


def limits(run: Run) -> list[str]:
    """Return what a run's score does not show, one sentence each."""
    lines = ["The interval covers the choice of slices or patients only: not another seed, scanner or hospital."]
    if run.patients("test" if "test" in run.splits else "val") is None:
        lines.append("Slices of one patient resemble each other; patients are unknown, so the score may be too high.")
    lines.append("A high score does not show that the finding was seen. Look at the audit and at notebook 14.")
    if run.record["data"]["kind"] == "synthetic":
        lines.append("The pictures are drawn by a program. The score says nothing about real CT.")
    if run.record["weights"]["kind"] == "random":
        lines.append("The backbone has random weights: this is not transfer learning.")
    return lines


def _counts(counts: dict, classes: Sequence[str]) -> list[str]:
    """Slices by split and class, as Markdown lines."""
    if not counts:
        return []
    rows = [[split, *(str(by_class.get(name, 0)) for name in classes)] for split, by_class in counts.items()]
    return ["", *results.markdown_table(["split", *classes], rows)]


def _class_table(table: pd.DataFrame) -> list[str]:
    rows = []
    for name, row in table.iterrows():
        values = [f"{row[column]:.3f}" for column in ("precision", "recall", "f1", "auc", "average_precision")]
        rows.append([str(name), f"{row['support']:.0f}", *values])
    head = ["class", "slices", "precision", "recall", "F1", "ROC AUC", "average precision"]
    return results.markdown_table(head, rows)


def _calibration(run: Run, split: str) -> list[str]:
    y_true, y_score = run.y_true(split), run.y_score(split)
    before = metrics.expected_calibration_error(y_true, y_score)
    lines = [f"- Expected calibration error on {split}: {before:.3f} (0 is perfect)."]
    if split == "test" and "val" in run.splits:
        temperature = metrics.fit_temperature(run.y_true("val"), np.log(run.y_score("val").clip(1e-12)))
        scaled = metrics.apply_temperature(np.log(y_score.clip(1e-12)), temperature)
        after = metrics.expected_calibration_error(y_true, scaled)
        lines.append(f"- With the temperature {temperature:.2f}, fitted on validation: {after:.3f}.")
    return lines
