"""`python -m ctutils`, or `ctutils`: the notebooks' steps without a notebook."""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
from pathlib import Path

from ctutils.base import CTError
from ctutils.plan import Plan

# Each command imports what it needs, so that --help answers at once.

OF_FEATURES = ("backbone", "data", "weights", "size", "bn", "precision", "seed", "unfreeze")  # what a cache depends on


def console() -> None:
    """What a shell runs: `main`, and the end of the process."""
    gc.set_threshold(50_000, 20, 20)  # imports make many objects and no garbage: looking for it takes half a second
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # Python's good-bye to torch, object by object, takes another


def main(argv: list[str] | None = None) -> int:
    """Run one command; return 0 on success, 1 when a check failed, 2 on a user's error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # names may hold what a terminal's encoding cannot show
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace", encoding="utf-8" if "--json" in argv else None)
    if argv == ["--version"]:
        from ctutils.screen import versions

        print(versions())
        return 0
    options = _parser().parse_args(argv or ["--help"])
    # Before torch is loaded: waiting threads that spin cost several times the work when a core is busy elsewhere.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.json:
        os.environ.setdefault("CT_PROGRESS", "0")
    for name in ("profile", "device"):
        if value := getattr(options, name, None):
            os.environ[f"CT_{name.upper()}"] = value  # worker processes read it, too
    try:
        code = options.command(options)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is still heard
        return code
    except KeyboardInterrupt:
        print("Stopped. The same command goes on where it can.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # What the system refuses (long names, NUL, links in a circle, huge files) is a user's error, too.
        refused = isinstance(error, (CTError, OSError, RecursionError, MemoryError, UnicodeError))
        signs = ("null byte", "null character", "symlink loop", "can't allocate memory")
        refused = refused or any(sign in str(error).lower() for sign in signs)
        refused = refused or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
        if os.environ.get("CT_DEBUG") == "1" or not refused:
            raise
        text = str(error)
        if not isinstance(error, CTError):
            why = f"{type(error).__name__}: {text or 'no details'}"
            mend = "check paths and files; CT_DEBUG=1 shows where it happened"
            text = str(CTError(why, "input that the system accepts", mend))
        if options.json:
            files = {"files": error.files} if getattr(error, "files", None) else {}
            print(json.dumps({"error": text, **files}, ensure_ascii=False))
        print(f"Error: {text}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from ctutils.screen import IMPORT_HELP, SWEEP_HELP, backbones_help

    about = "Transfer learning on chest CT slices. Not for clinical use."
    parser = argparse.ArgumentParser(prog="ctutils", description=about)
    parser.add_argument("--version", action="store_true", help="print versions, and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function, text: str, machine: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if machine:
            command.add_argument("--profile", help="quick, standard or full, instead of CT_PROFILE")
            command.add_argument("--device", help="cpu, cuda or mps, instead of CT_DEVICE")
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
    imp.description = IMPORT_HELP
    imp.add_argument("src", type=Path)
    imp.add_argument("out", type=Path)
    imp.add_argument("--format", choices=("aihub", "dicom", "folder"), help="default: found by looking")
    window = {"type": float, "nargs": 2, "default": (-600, 1500), "metavar": ("LEVEL", "WIDTH")}
    imp.add_argument("--window", **window, help="DICOM window in HU (default: lung, -600 1500)")

    train = add("train", _train, "train a backbone's new head (or all of it) and write a run record", machine=True)
    train.epilog, train.formatter_class = backbones_help(), argparse.RawDescriptionHelpFormatter
    for field in dataclasses.fields(Plan):
        _add_option(train, field)
    train.add_argument(
        "--out", type=Path, help="run record to write (default: data/runs/<profile>[-<data>]/<backbone>)"
    )
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same name")

    features = add("features", _features, "run a frozen backbone over all slices, for heads to come", machine=True)
    for field in dataclasses.fields(Plan):
        if field.name in OF_FEATURES:
            _add_option(features, field)
    text = "only the parts i, i + n, ... of 10,000 slices each; i from 0 (for a job array); train joins them"
    features.add_argument("--shard", metavar="I/N", help=text)

    sweep = add("sweep", _sweep, "run a plan of many runs; skips what is done", machine=True)
    sweep.description, sweep.formatter_class = SWEEP_HELP, argparse.RawDescriptionHelpFormatter
    sweep.add_argument("plan", type=Path, help="TOML file")
    sweep.add_argument("--list", action="store_true", help="show the runs and what is done, run nothing")
    sweep.add_argument("--index", type=int, metavar="I", help="only run I of the list, from 0 (for a job array)")
    sweep.add_argument("--keep-weights", action="store_true", help="store the trained weights in the records")
    sweep.add_argument("--pack", type=Path, metavar="OUT", help="then copy the records, without weights, to OUT")

    sweep.add_argument("--weights", help="where weights are, or random, as for train (default: CT_WEIGHTS)")
    sweep.add_argument("--on", choices=("slurm", "local"), help="as jobs, one for what shares a cache, and wait")
    sweep.add_argument("--partition", help="of Slurm")
    sweep.add_argument("--gpus", type=int, choices=(0, 1), help="of a job on Slurm (default 0): device and profile")
    sweep.add_argument("--minutes", type=int, help="time limit of a job, which then goes on later (default 60)")
    sweep.add_argument("--parallel", type=int, help="jobs at a time (default: Slurm's limit; local 1)")
    sweep.add_argument("--detach", action="store_true", help="do not wait for the jobs")
    sweep.add_argument("--status", action="store_true", help="show the jobs and their runs, whoever submitted them")

    predict = add("predict", _predict, "class, confidence and warnings for pictures or DICOM files; a page with --html")
    serve = add("serve", _serve, "the page of predict --html with an upload box, in a browser; needs the extra demo")
    text = "a run's network as one ONNX (.onnx) or torch.export (.pt2) file, preprocessing in it"
    export = add("export", _export, text)
    for command in (predict, serve, export):
        command.add_argument("run", type=Path, help="run record, or its name")
        command.add_argument("--weights", default="auto", help="where the backbone's weights are, as for train")
    for command in (predict, serve):
        command.add_argument("--data", type=Path, metavar="FOLDER", help="the training slices, if they are not found")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files, folders or patterns")
    predict.add_argument("--csv", type=Path, metavar="FILE", help="write a row a slice")
    predict.add_argument("--html", type=Path, metavar="FILE", help="write one page: slices, Grad-CAM, similar slices")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="default 8000; 0: any free one")
    serve.add_argument("--limit-mb", type=int, default=100, metavar="MB", help="largest upload (default 100)")
    text = "its suffix says the format; .onnx needs the extra export"
    export.add_argument("out", type=Path, metavar="FILE", help=text)

    weights = add("weights", _weights, "fetch and verify all weight files once, for a classroom or a cluster")
    weights.add_argument("backbones", nargs="*", metavar="BACKBONE", help="which (default: all)")
    place = "folder to fill and then to name in CT_WEIGHTS (default: CT_WEIGHTS if it is one, else torch's cache)"
    weights.add_argument("--to", type=Path, metavar="FOLDER", help=place)
    text = "show where each file is, its size and hash, and fetch nothing; exit 1 if one is missing or wrong"
    weights.add_argument("--list", action="store_true", help=text)

    results = add("results", _results, "the table of all run records", machine=True)
    results.add_argument(
        "runs", type=Path, nargs="?", help="folder of records (default: data/runs/<profile>[-<CT_DATA>])"
    )
    results.add_argument("--markdown", action="store_true", help="print the README's table")
    results.add_argument("--card", type=Path, metavar="RUN", help="print a record's model card (Markdown)")
    return parser


def _add_option(command: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """Make a command-line option from a field of `Plan`."""
    about, flag = field.metadata, "--" + field.name.replace("_", "-")
    text, kind = about["help"], about["kind"]
    if field.name == "data":
        command.add_argument("data", type=Path, nargs="?", help=text)
    elif "flags" in about:
        command.set_defaults(**{field.name: field.default})
        for name, (value, explained) in about["flags"].items():
            command.add_argument(name, dest=field.name, action="store_const", const=value, help=explained)
    elif kind is bool:
        command.add_argument(f"--no-{field.name}", dest=field.name, action="store_false", help=text)
    elif kind is tuple:
        text += f": of {', '.join(about['of'])}"
        command.add_argument(flag, nargs="+", default=[], metavar="NAME", help=text)
    else:
        if "choices" in about:
            text += f": {', '.join(about['choices'])}"

        def convert(value: str):
            return value if value in about.get("words", ()) else kind(value)

        convert.__name__ = kind.__name__  # for argparse's message
        command.add_argument(flag, type=convert, default=field.default, metavar=field.name.upper(), help=text)


def _print(options: argparse.Namespace, content: dict, text: str) -> None:
    print(json.dumps(content, ensure_ascii=False) if options.json else text)


def _synth(options: argparse.Namespace) -> int:
    from ctutils.phantom import write_dataset

    start = time.perf_counter()
    keys = ("train", "val", "test", "seed", "workers", "shortcut")
    out = write_dataset(options.out, **{key: getattr(options, key) for key in keys})
    counts = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["counts"]
    total, seconds = sum(sum(classes.values()) for classes in counts.values()), time.perf_counter() - start
    content = {"out": str(out), "counts": counts, "seconds": round(seconds, 1)}
    _print(options, content, f"{total} synthetic slices in '{out}' ({seconds:.0f} s)")
    return 0


def _check(options: argparse.Namespace) -> int:
    from ctutils.audit import audit, clean_copy

    report = audit(options.data)
    content, text = report.to_json(), report.to_text()
    if options.fix:
        out = clean_copy(options.data, options.fix, report)
        content["fixed"] = str(out)
        text += f"\nA cleaned copy is in '{out}'; the source is as it was."
    _print(options, content, text)
    return 0 if report.ok else 1


def _import(options: argparse.Namespace) -> int:
    from ctutils.importers import import_dataset
    from ctutils.screen import import_text

    given = {"format": options.format, "window": tuple(options.window), "progress": not options.json}
    summary = import_dataset(options.src, options.out, **given)
    _print(options, summary, import_text(summary))
    return 0


def _train(options: argparse.Namespace) -> int:
    from ctutils.audit import stored_verdicts
    from ctutils.config import get_settings
    from ctutils.screen import doubts, train_text

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun
        from ctutils.distributed import run_together as run_plan
    else:
        from ctutils.experiment import run_plan

    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Plan)}
    plan, settings = Plan(**fields), get_settings(options.data)
    out = options.out or settings.runs_dir / plan.backbone
    say = (lambda text: None) if options.json else print
    run = run_plan(plan, settings, out, resume=options.resume, replace=False, say=say)
    if run is None:  # the first process says it
        return 0
    with contextlib.suppress(ImportError, CTError, OSError):  # a training that is done does not fail for it
        from ctutils.people.reference import remember_training

        remember_training(run, plan, settings)
    record = run.record
    val, test = record["scores"]["val"], record["scores"]["test"]
    content = {"run": str(out), "backbone": run.plan.backbone, "weights": record["weights"]["kind"]}
    content |= {"epochs": run.plan.epochs, "best_epoch": record["best_epoch"], "val_macro_f1": val["macro_f1"]}
    content |= {"test_macro_f1": test["macro_f1"], "test_interval_95": [test["low"], test["high"]]}
    content |= {"test_per_class_f1": test["per_class"], "test_from_val": record["data"]["test_from_val"]}
    content |= {"seconds": record["seconds"], "interrupted": record["interrupted"]}
    verdicts = stored_verdicts(record["data"]["fingerprint"], settings.cache_dir)
    content |= {"warnings": [*record["data"]["notes"], *doubts(run, verdicts)]}
    _print(options, content, train_text(run, settings.data_dir, verdicts))
    return 130 if record["interrupted"] else 0


def _features(options: argparse.Namespace) -> int:
    from ctutils.config import get_settings
    from ctutils.shards import make_features

    try:
        number, shards = map(int, (options.shard or "0/1").split("/"))
    except ValueError as error:
        raise CTError(f"the shard '{options.shard}'", "I/N, such as 0/8", "give two whole numbers") from error
    fields = {key: getattr(options, key) for key in OF_FEATURES}
    content = make_features(Plan(**fields), get_settings(options.data), (number, shards))
    _print(options, content, "{done} of {parts} part(s) of {slices} slices are there".format(**content))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from ctutils.config import get_settings
    from ctutils.sweep import pack_runs, read_sweep, run_sweep, sweep_status

    if options.weights:
        os.environ["CT_WEIGHTS"] = options.weights
    if options.on or options.status:
        from ctutils.cluster import command

        content, text = command(options)
        _print(options, content, text)
        return 1 if content["failed"] else 0
    if idle := [key for key in ("partition", "gpus", "minutes", "parallel", "detach") if getattr(options, key)]:
        raise CTError(f"--{' --'.join(idle)} without --on", "--on slurm or --on local", "say where to run")
    settings = get_settings()
    sweep = read_sweep(options.plan, settings.profile)
    failed, seconds, packed = {}, 0.0, None
    if not options.list:
        say = (lambda text: None) if options.json else tqdm.write  # above the bar
        outcome = run_sweep(sweep, settings, index=options.index, keep_weights=options.keep_weights, say=say)
        failed, seconds = outcome.failed, outcome.seconds
        packed = str(pack_runs(sweep, settings, options.pack)) if options.pack else None
    table = sweep_status(sweep, settings)
    rows = json.loads(table.to_json(orient="records"))
    content = {"plan": sweep.name, "folder": str(sweep.folder(settings)), "runs": rows}
    content |= {"failed": failed, "seconds": round(seconds, 1), "packed": packed}
    lines = [f"{sweep.title} ({settings})", table.round(3).to_string(index=False, na_rep="")]
    lines += [f"failed: {name}: {message}" for name, message in failed.items()]
    lines += [f"records without weights in '{packed}'"] if packed else []
    _print(options, content, "\n".join(lines))
    return 1 if failed else 0


def _predict(options: argparse.Namespace) -> int:
    from ctutils.people.command import predict

    content, text, error = predict(options)
    _print(options, content, text)
    if error:
        print(f"Error: {error}", file=sys.stderr)
    return 2 if error else 0


def _export(options: argparse.Namespace) -> int:
    from ctutils.people.command import export

    _print(options, *export(options))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from ctutils.people.serve import serve

    serve(options)
    return 0


def _weights(options: argparse.Namespace) -> int:
    from ctutils import weights
    from ctutils.config import get_settings
    from ctutils.screen import weights_line

    named = get_settings().weights
    folder = options.to or (None if named in weights.WORDS else Path(named))
    rows = weights.weights_table(options.backbones, folder)
    say = (lambda text: None) if options.json else print
    if not options.list and (ready := weights.to_fetch(rows, folder)):
        size = sum(row["bytes"] or 0 for row in ready) / 1e6
        say("\n".join([f"To fetch: {size:.0f} MB", *map(weights_line, ready)]))
        weights.fetch_weights(rows, folder, say)
        rows = weights.weights_table(options.backbones, folder)
    bad = [row["file"] for row in rows if row["where"] == "missing" or row["hash"] == "wrong"]
    end = f"missing or wrong: {', '.join(bad)}" if bad else f"all whole{f'; CT_WEIGHTS={folder}' if options.to else ''}"
    content = {"folder": str(folder) if folder else None, "weights": rows}
    _print(options, content, "\n".join([*map(weights_line, rows), f"{len(rows)} files, {end}"]))
    return 1 if bad else 0


def _audit_verdicts(run) -> list[str] | None:
    """Return what the audit said about a run's slices: as `check` left it, or anew where the slices are at hand."""
    from ctutils.audit import audit, stored_verdicts
    from ctutils.config import get_settings
    from ctutils.data import load_folder, shortcut_root

    settings, fingerprint = get_settings(), run.record["data"]["fingerprint"]
    verdicts = stored_verdicts(fingerprint, settings.cache_dir)
    for root in (settings.data_dir, shortcut_root(settings)) if verdicts is None else ():
        with contextlib.suppress(CTError, OSError):
            if load_folder(root, cache=settings.cache_dir).fingerprint == fingerprint:
                return audit(root, cache=settings.cache_dir).verdicts()
    return verdicts


def _results(options: argparse.Namespace) -> int:
    from ctutils.config import get_settings
    from ctutils.results import comparison_table, results_markdown
    from ctutils.runs import list_runs, load_run
    from ctutils.screen import results_table

    if options.card:
        from ctutils.card import model_card

        run = load_run(options.card)
        text = model_card(run, _audit_verdicts(run))
        _print(options, {"card": text}, text)
        return 0
    folder = options.runs or get_settings().runs_dir
    if options.runs and not folder.is_dir():
        raise CTError(f"no folder '{folder}'", "a folder of run records", "train first, or check the path")
    runs, problems = list_runs(folder)
    if not runs and not problems:
        there = sorted({path.parent.parent.name for path in folder.parent.glob("*/*/run.json")})
        mend = f"name a folder of {folder.parent}: {', '.join(there)}" if there else "train, or run a notebook (03-08)"
        raise CTError(f"no run record in '{folder}'", "one or more", mend)
    if options.markdown:
        text = results_markdown(folder)
        _print(options, {"markdown": text, "problems": problems}, text)
        print("".join(f"Left out: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 1 if problems and not runs else 0
    table = comparison_table(runs)
    content = {"runs": json.loads(table.to_json(orient="records")), "problems": problems}
    lines = [results_table(table)] * bool(runs) + [f"Left out: {problem}" for problem in problems]
    _print(options, content, "\n".join(lines))
    return 1 if problems and not runs else 0
