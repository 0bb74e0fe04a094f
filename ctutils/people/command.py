"""What `ctutils predict` and `ctutils export` do and print."""

import argparse
import os

import pandas as pd

from ctutils.base import CTError, atomic_path
from ctutils.config import get_settings
from ctutils.data import SliceFolder
from ctutils.people import reference
from ctutils.people.predict import Predictor, find_files, find_run
from ctutils.runs import load_run


def load_predictor(options: argparse.Namespace, *, slices: bool) -> tuple[Predictor, SliceFolder | None, list[str]]:
    """Return the model of a run with what is known of its training slices, and these, if they are asked for."""
    settings = get_settings()
    run = load_run(find_run(options.run, settings))
    predictor = Predictor(run, options.weights)
    needed = slices or options.data or reference.load_reference(run) is None
    folder = reference.find_slices(run, settings, options.data) if needed else None
    predictor.reference, note = reference.get_reference(run, predictor.model, settings, folder)
    return predictor, folder, [note] * bool(note)


def predict(options: argparse.Namespace) -> tuple[dict, str, CTError | None]:
    """Run `ctutils predict`: return its JSON object, its text, and what was wrong with some of the files.

    Raises:
        CTError: no file can be read; no such run.
    """
    files = find_files(options.images)
    predictor, folder, notes = load_predictor(options, slices=bool(options.html))
    slices, failed = predictor.predict_files(files, heat=bool(options.html))
    error = None
    if failed:
        named = "; ".join(f"'{path}' ({why})" for path, why in failed.items())
        found, mend = f"{len(failed)} file(s) that cannot be read: {named}", "replace them or leave them out"
        error = CTError(found, "pictures or axial CT slices", mend, failed)
        if not slices:
            raise error
    classes = predictor.run.classes
    rows = [one.to_json(classes) for one in slices]
    if options.csv:
        flat = []
        for row in rows:
            each = {f"p_{name}": value for name, value in row["probabilities"].items()}
            window = "{:g} {:g}".format(*row["window"]) if row["window"] else ""
            flat.append({**{key: row[key] for key in row if key != "probabilities"}, "window": window, **each})
        with atomic_path(options.csv) as temporary:
            pd.DataFrame(flat).to_csv(temporary, index=False, encoding="utf-8-sig")  # Excel reads names rightly then
    if options.html:
        from ctutils.people.page import render

        with atomic_path(options.html) as temporary:
            text = render(predictor, slices, failed, folder=folder, warnings=notes)
            temporary.write_text(text, encoding="utf-8")
    content = {"predictions": rows, "failed": failed, "notes": notes}
    written = [f"Written: '{path}'" for path in (options.csv, options.html) if path]
    lines = [*_prediction_lines(rows), *notes, *written, "Not for clinical use."]
    content |= {"csv": str(options.csv or ""), "html": str(options.html or "")}
    return content, "\n".join(lines), error


def export(options: argparse.Namespace) -> tuple[dict, str]:
    """Run `ctutils export`: return its JSON object and its text."""
    from ctutils.people.export import export_run

    content = export_run(load_run(find_run(options.run, get_settings())), options.out, options.weights)
    text = "{file}: {bytes} bytes; its probabilities differ by {difference:.1g} at most. Not for clinical use."
    return content, text.format(**content)


def _prediction_lines(rows: list[dict]) -> list[str]:
    """Return predictions as a table of at most 80 columns, but for notes."""
    folders = {os.path.dirname(os.path.abspath(row["image"])) for row in rows}
    common = os.path.commonpath(folders) if len({os.path.splitdrive(one)[0] for one in folders}) == 1 else ""
    names = [os.path.relpath(row["image"], common) if common else row["image"] for row in rows]
    names = [name if len(name) <= 36 else "..." + name[-33:] for name in names]
    wide, wider = (max(map(len, column)) for column in ([*names, "slice"], [*(row["class"] for row in rows), "class"]))
    lines = [f"{'slice':<{wide}}  {'class':<{wider}}  confidence"]
    for name, row in zip(names, rows, strict=True):
        lines.append(f"{name:<{wide}}  {row['class']:<{wider}}  {row['confidence']:10.2f}")
        lines[-1] += "  UNLIKE TRAINING" if row["unlike"] else ""
        window = ["DICOM window {:g} {:g} HU".format(*row["window"])] if row["window"] else []
        if notes := [*window, *([row["note"]] if "note" in row else [])]:
            lines.append(f"  ({'; '.join(notes)})")
    if odd := sum(bool(row["unlike"]) for row in rows):
        lines.append(f"UNLIKE TRAINING ({odd}): not like any slice trained on; the class means nothing there.")
    return lines
