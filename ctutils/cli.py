"""`python -m ctutils`: the notebooks' steps without a notebook."""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from ctutils.base import CTError

# Each command imports what it needs, so that --help answers at once.


def main(argv: list[str] | None = None) -> int:
    """Run one command; return 0 on success, 1 when a check failed, 2 on a user's error, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    # Before torch is loaded: waiting threads that spin cost several times the work when a core is busy elsewhere.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.json:
        os.environ.setdefault("CT_PROGRESS", "0")
    try:
        return options.command(options)
    except CTError as error:
        if options.json:
            print(json.dumps({"error": str(error)}, ensure_ascii=False))
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on where it can.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ctutils",
        description="Transfer learning on chest CT slices. Not for clinical use.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(command=function)
        return command

    synth = add("synth", _synth, "make a synthetic data set")
    synth.add_argument("out", type=Path, help="folder to make")
    synth.add_argument("--train", type=int, default=800, help="training slices (deck: 8001)")
    synth.add_argument("--val", type=int, default=200, help="validation slices (deck: 1000)")
    synth.add_argument("--test", type=int, default=0, help="test slices (default: no test split)")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    synth.add_argument("--shortcut", choices=("sharpness",), help="plant a shortcut, for the audit lesson")

    check = add("check", _check, "look for unreadable files, duplicates, leaks and shortcuts; exit 1 on errors")
    check.add_argument("data", type=Path, help="data set folder")
    check.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned copy to OUT")

    imp = add("import", _import, "bring AI Hub's delivery, DICOM or another folder layout into the course's layout")
    imp.add_argument("src", type=Path)
    imp.add_argument("out", type=Path)
    imp.add_argument("--format", choices=("aihub", "dicom", "folder"), help="default: found by looking")
    imp.add_argument(
        "--window",
        type=float,
        nargs=2,
        default=(-600, 1500),
        metavar=("LEVEL", "WIDTH"),
        help="DICOM window in HU (default: lung, -600 1500)",
    )

    train = add("train", _train, "train a backbone's new head (or all of it) and write a run record")
    train.add_argument("data", type=Path, nargs="?", help="data set folder (default: CT_DATA, else synthetic)")
    train.add_argument("--backbone", default="efficientnet_lite0")
    train.add_argument("--epochs", type=int, help="default: the profile's, 10")
    train.add_argument("--weights", help="auto, imagenet, random or a folder of weight files (default: CT_WEIGHTS)")
    train.add_argument("--out", type=Path, help="run record to write (default: data/runs/<profile>/<backbone>)")
    train.add_argument("--optimizer", default="adam", help="adam, adamw, sgd or rmsprop")
    train.add_argument("--lr", type=_rate, default=1e-3, help="learning rate, or range: by an LR range test")
    train.add_argument("--scheduler", default="step", help="step (the deck's), cosine, onecycle or none")
    train.add_argument("--patience", type=int, help="stop after so many epochs without a better validation score")
    train.add_argument("--batch-size", type=int)
    train.add_argument("--at-once", type=int, help="slices in memory at a time; the batch size stays the same")
    train.add_argument("--size", type=int, help="pixels a side at the network's input (default 224)")
    train.add_argument("--bn", choices=("auto", "frozen", "adapt", "drift", "train"), default="auto", help=BN_HELP)
    train.add_argument(
        "--no-standardise",
        dest="standardise",
        action="store_false",
        help="leave the frozen features as they are (the deck's way) instead of scaling them to mean 0, sd 1",
    )
    train.add_argument(
        "--unfreeze", dest="unfreeze", action="store_const", const="all", default="none", help="train every layer"
    )
    train.add_argument(
        "--unfreeze-last", dest="unfreeze", action="store_const", const="last", help="train the last block and the head"
    )
    train.add_argument(
        "--discriminative",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="rate of the last block as a share of the head's; earlier layers get its square",
    )
    train.add_argument(
        "--augment",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of rotate, zoom, shift, flip, blur, noise, jitter, randaugment; each picture anew",
    )
    train.add_argument("--views", type=int, default=0, help="cache the features of so many changed copies instead")
    train.add_argument("--balance", default="none", help="rare classes: none, loss (weights) or sampler")
    train.add_argument("--precision", default="auto", help="of the frozen pass: auto, float32 or bfloat16")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same name")

    sweep = add("sweep", _sweep, "run a plan of many runs; skips what is done")
    sweep.description, sweep.formatter_class = SWEEP_HELP, argparse.RawDescriptionHelpFormatter
    sweep.add_argument("plan", type=Path, help="TOML file")
    sweep.add_argument("--list", action="store_true", help="show the runs and what is done, run nothing")
    sweep.add_argument("--index", type=int, metavar="I", help="only run I of the list, from 0 (for a job array)")
    sweep.add_argument("--keep-weights", action="store_true", help="store the trained weights in the records")
    sweep.add_argument("--pack", type=Path, metavar="OUT", help="then copy the records, without weights, to OUT")

    predict = add("predict", _predict, "class and probabilities of pictures or DICOM files")
    predict.add_argument("run", type=Path, help="run record")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    predict.add_argument("--weights", default="auto", help="where the backbone's weights are, as for train")

    results = add("results", _results, "the table of all run records")
    results.add_argument("runs", type=Path, nargs="?", help="folder of records (default: data/runs/<profile>)")
    results.add_argument("--markdown", action="store_true", help="print the README's table")
    results.add_argument("--card", type=Path, metavar="RUN", help="print a record's model card (Markdown)")
    return parser


BN_HELP = (
    "BatchNorm: frozen; adapt (statistics estimated anew on the training slices, then frozen); drift (the deck's "
    "model.train() with a frozen backbone); train (learns with --unfreeze); auto: train with --unfreeze, else "
    "adapt for random weights and frozen for real ones"
)
SWEEP_HELP = """\
Run a plan of many runs: backbones x settings x seeds, from a TOML file (examples: notebooks/plans/).

What is done is skipped, an interrupted run goes on, a failed one does not stop the rest (exit code 1 at the
end). The records stand in data/runs/<profile>/<plan>/. Not for clinical use.

As a job array, one run a task (Slurm; --list shows the indices; make the data set first):

  python -m ctutils synth data/synthetic_full --train 8001 --val 1000 --test 1000
  sbatch --array=0-11 --gres=gpu:1 --wrap 'python -m ctutils sweep PLAN.toml --index $SLURM_ARRAY_TASK_ID'
"""


def _rate(text: str) -> float | str:
    return text if text == "range" else float(text)


def _print(options: argparse.Namespace, content: dict, text: str) -> None:
    print(json.dumps(content, ensure_ascii=False) if options.json else text)


def _synth(options: argparse.Namespace) -> int:
    from ctutils.phantom import write_dataset

    start = time.perf_counter()
    out = write_dataset(
        options.out,
        train=options.train,
        val=options.val,
        test=options.test,
        seed=options.seed,
        workers=options.workers,
        shortcut=options.shortcut,
    )
    meta = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    seconds = time.perf_counter() - start
    content = {"out": str(out), "counts": meta["counts"], "seconds": round(seconds, 1)}
    total = sum(sum(classes.values()) for classes in meta["counts"].values())
    _print(options, content, f"{total} synthetic slices in '{out}' ({seconds:.0f} s)")
    return 0


def _check(options: argparse.Namespace) -> int:
    from ctutils.audit import audit, clean_copy

    report = audit(options.data)
    content = report.to_json()
    text = report.to_text()
    if options.fix:
        out = clean_copy(options.data, options.fix, report)
        content["fixed"] = str(out)
        text += f"\nA cleaned copy is in '{out}'; the source is as it was."
    _print(options, content, text)
    return 0 if report.ok else 1


def _import(options: argparse.Namespace) -> int:
    from ctutils.importers import import_dataset

    summary = import_dataset(
        options.src,
        options.out,
        format=options.format,
        window=tuple(options.window),
        progress=not options.json,
    )
    lines = [f"{key}: {value}" for key, value in summary.items()]
    _print(options, summary, "\n".join(lines))
    return 0


def _train(options: argparse.Namespace) -> int:
    from ctutils.config import get_settings
    from ctutils.pipeline import Plan, run_plan

    settings = get_settings()
    plan = Plan(
        backbone=options.backbone,
        data=options.data,
        epochs=options.epochs,
        weights=options.weights,
        optimizer=options.optimizer,
        lr=options.lr,
        scheduler=options.scheduler,
        patience=options.patience,
        batch_size=options.batch_size,
        at_once=options.at_once,
        size=options.size,
        bn=options.bn,
        standardise=options.standardise,
        unfreeze=options.unfreeze,
        discriminative=options.discriminative,
        augment=tuple(options.augment),
        views=options.views,
        balance=options.balance,
        precision=options.precision,
        seed=options.seed,
    )
    out = options.out or settings.runs_dir / options.backbone
    say = (lambda text: None) if options.json else print
    run = run_plan(plan, settings, out, resume=options.resume, say=say)
    record = run.record
    val, test = record["scores"]["val"], record["scores"]["test"]
    content = {
        "run": str(out),
        "backbone": record["backbone"],
        "weights": record["weights"]["kind"],
        "epochs": record["epochs"],
        "best_epoch": record["best_epoch"],
        "val_macro_f1": val["macro_f1"],
        "test_macro_f1": test["macro_f1"],
        "test_interval_95": [test["low"], test["high"]],
        "test_per_class_f1": test["per_class"],
        "test_from_val": record["data"]["test_from_val"],
        "seconds": record["seconds"],
        "interrupted": record.get("interrupted", False),
    }
    half = " (half of the validation slices)" if record["data"]["test_from_val"] else ""
    _print(
        options,
        content,
        f"macro F1: validation {val['macro_f1']:.3f} (best epoch {record['best_epoch']} of {record['epochs']}), "
        f"test{half} {test['macro_f1']:.3f}, 95 % interval {test['low']:.3f} to {test['high']:.3f}\n"
        f"weights: {record['weights']['kind']}; {record['seconds']['total']:.0f} s; record in '{out}'",
    )
    return 130 if content["interrupted"] else 0


def _sweep(options: argparse.Namespace) -> int:
    from ctutils.config import get_settings
    from ctutils.sweep import pack_runs, read_sweep, run_sweep, sweep_status

    settings = get_settings()
    sweep = read_sweep(options.plan, settings.profile)
    failed, seconds, packed = {}, 0.0, None
    if not options.list:
        say = (lambda text: None) if options.json else _say_above_bar
        outcome = run_sweep(sweep, settings, index=options.index, keep_weights=options.keep_weights, say=say)
        failed, seconds = outcome.failed, outcome.seconds
        if options.pack:
            packed = pack_runs(sweep, settings, options.pack)
    table = sweep_status(sweep, settings)
    content = {
        "plan": sweep.name,
        "folder": str(sweep.folder(settings)),
        "runs": json.loads(table.to_json(orient="records")),
        "failed": failed,
        "seconds": round(seconds, 1),
        "packed": str(packed.parent) if packed else None,
    }
    lines = [f"{sweep.title} ({settings})", table.round(3).to_string(index=False, na_rep="")]
    lines += [f"failed: {name}: {message}" for name, message in failed.items()]
    lines += [f"records without weights, and sweep.json, in '{packed.parent}'"] if packed else []
    _print(options, content, "\n".join(lines))
    return 1 if failed else 0


def _say_above_bar(text: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(text)


def _predict(options: argparse.Namespace) -> int:
    from ctutils.pipeline import predict_files
    from ctutils.runs import load_run

    run = load_run(options.run)
    rows = predict_files(run, options.images, weights=options.weights)
    lines = [
        f"{row['image']}: {row['class']}  "
        + "  ".join(f"{name} {value:.3f}" for name, value in row["probabilities"].items())
        for row in rows
    ]
    _print(options, {"predictions": rows}, "\n".join([*lines, "Not for clinical use."]))
    return 0


def _audit_verdicts(run) -> list[str] | None:
    """Return what the audit said about a run's slices: as `check` left it, or anew where the slices are at hand."""
    from ctutils.audit import audit, stored_verdicts
    from ctutils.config import get_settings
    from ctutils.data import load_folder, shortcut_root

    settings, fingerprint = get_settings(), run.record["data"]["fingerprint"]
    verdicts = stored_verdicts(fingerprint, settings.cache_dir)
    for root in (settings.data_dir, shortcut_root(settings)) if verdicts is None else ():
        with contextlib.suppress(CTError):
            if load_folder(root, cache=settings.cache_dir).fingerprint == fingerprint:
                return audit(root, cache=settings.cache_dir).verdicts()
    return verdicts


def _results(options: argparse.Namespace) -> int:
    import pandas as pd

    from ctutils.config import get_settings
    from ctutils.results import comparison_table, model_card, results_markdown
    from ctutils.runs import list_runs, load_run

    if options.card:
        run = load_run(options.card)
        text = model_card(run, _audit_verdicts(run))
        _print(options, {"card": text}, text)
        return 0
    folder = options.runs or get_settings().runs_dir
    if options.runs and not folder.is_dir():
        raise CTError(f"no folder '{folder}'", "a folder of run records", "train first, or check the path")
    runs, problems = list_runs(folder)
    if not runs and not problems:
        raise CTError(
            f"no run record in '{folder}'",
            "one or more",
            "run a notebook (03-08), or `python -m ctutils train`",
        )
    if options.markdown:
        _print(options, {"markdown": results_markdown(runs)}, results_markdown(runs))
        return 0
    table = comparison_table(runs) if runs else pd.DataFrame()
    content = {"runs": json.loads(table.to_json(orient="records")), "problems": problems}
    with pd.option_context("display.width", 200, "display.max_columns", 30, "display.precision", 3):
        text = "\n".join([table.to_string(index=False), *(f"Left out: {problem}" for problem in problems)])
    _print(options, content, text)
    return 1 if problems and not runs else 0
