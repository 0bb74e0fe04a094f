"""Many runs from one plan file: planned first, run in any order, compared with intervals at the end.

A plan is a TOML file: backbones x settings x seeds. `notebooks/plans/` holds the course's own.
"""

import dataclasses
import itertools
import json
import re
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ctutils.base import CTError, progress, write_json
from ctutils.config import Profile, Settings
from ctutils.plan import Plan
from ctutils.runs import RECORD_FILES, TENSOR_FILES, Run, load_run

PROFILE_KEYS = ("seeds", "backbones", "common", "settings")
PLAN_KEYS = ("title", *PROFILE_KEYS, "quick", "standard", "full")
FIELDS = tuple(field.name for field in dataclasses.fields(Plan) if field.name not in ("backbone", "seed"))


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # of the record's folder
    setting: str
    against: str | None  # the setting that this one is compared with
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A plan file, read for one profile."""

    name: str
    title: str
    jobs: tuple[Job, ...]

    def folder(self, settings: Settings) -> Path:
        """Return the folder of its records, `data/runs/<profile>/<plan>/`."""
        return settings.runs_dir / self.name

    def reference(self, settings: Settings) -> Path:
        """Return the folder of the records that come with the course: of its own slices, in profile standard."""
        return settings.runs_dir.parent.parent / "reference_runs" / settings.runs_dir.name / self.name

    def groups(self) -> dict[tuple[str, str], list[Job]]:
        """Return the jobs of each (setting, backbone), one a seed, in the plan's order."""
        groups: dict[tuple[str, str], list[Job]] = {}
        for job in self.jobs:
            groups.setdefault((job.setting, job.plan.backbone), []).append(job)
        return groups


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `run_sweep` did: names of runs, for each failed one its message, and what there is to say of a live one."""

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    seconds: float
    live: str = ""

    def __str__(self) -> str:
        here = len(self.done) + len(self.skipped)
        lines = [self.live] if self.live else [f"{here} of {here + len(self.failed)} runs are done"]
        return "\n".join(lines + [f"failed: {name}: {message}" for name, message in self.failed.items()])


def read_sweep(path: str | Path, profile: Profile | str) -> Sweep:
    """Read a plan file, and check every run of it.

        title = "what is asked"
        seeds = [0, 1, 2]
        backbones = ["efficientnet_lite0"]
        [common]                    # of every run: fields of `Plan`
        size = 128
        [settings.plain]
        [settings.flipped]
        augment = ["flip"]
        against = "plain"           # to be compared with
        backbones = ["alexnet"]     # instead of all
        seeds = [0]                 # instead of all
        [quick]                     # in profile quick (standard, full): what differs
        seeds = [0]
        common = { epochs = 1 }
        settings = ["plain"]        # these only

    Raises:
        CTError: no such file, no TOML, an unknown key or value, two runs of one name.
    """
    path, profile = Path(path), getattr(profile, "name", profile)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CTError(f"no plan '{path}'", "a TOML file", "see notebooks/plans for examples") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CTError(f"'{path.name}', which is not TOML ({error})", "a plan", "see notebooks/plans") from error
    changes, settings = _table(path, content, profile, PROFILE_KEYS), _table(path, content, "settings", None)
    _refuse_unknown(path, "", content, PLAN_KEYS)
    seeds, backbones = (_list(path, changes if key in changes else content, key) for key in ("seeds", "backbones"))
    common = _table(path, content, "common", FIELDS) | _table(path, changes, "common", FIELDS)
    kept = _list(path, changes, "settings") if "settings" in changes else list(settings)
    _refuse_unknown(path, "settings: ", kept, settings)
    jobs = []
    for setting in kept:
        own = _table(path, settings, setting, (*FIELDS, "against", "backbones", "seeds"))
        against = own.pop("against", None)
        _refuse_unknown(path, f"{setting}: against ", [against] * (against is not None), settings)
        given = {"backbones": backbones, "seeds": seeds}
        for key, of_all in given.items():
            given[key] = _list(path, own, key) if key in own else of_all
            own.pop(key, None)
            if key in changes:
                given[key] = [value for value in given[key] if value in of_all]
        for backbone, seed in itertools.product(*given.values()):
            name = "-".join(re.sub(r"\W+", "-", str(part)).strip("-") for part in (setting, backbone, f"s{seed}"))
            try:
                plan = Plan(**{**common, **own, "backbone": backbone, "seed": seed})
            except CTError as error:
                raise CTError(f"'{path.name}', {setting}: {error.found}", error.expected, error.mend) from error
            jobs.append(Job(name, setting, against if against in kept else None, plan))
    names = [job.name.casefold() for job in jobs]
    if not jobs or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CTError(
            f"two runs called {', '.join(twice)} in '{path.name}'" if twice else f"'{path.name}' without a run",
            "one or more runs, each with a name of its own",
            "see notebooks/plans for examples",
        )
    return Sweep(path.stem, str(content.get("title", path.stem)), tuple(jobs))


def _table(path: Path, content: dict, key: str, known: tuple | None) -> dict:
    """Return a copy of one table of the plan; its keys must be known, if `known` says which are."""
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise CTError(f"'{path.name}' with {key} = {value!r}", "a table", "see notebooks/plans for examples")
    _refuse_unknown(path, f"{key}: ", value if known is not None else (), known)
    return dict(value)


def _list(path: Path, content: dict, key: str) -> list:
    value = content.get(key)
    if not isinstance(value, list) or not value:
        raise CTError(f"'{path.name}' with {key} = {value!r}", f"{key} = [...]", "see notebooks/plans for examples")
    return value


def _refuse_unknown(path: Path, where: str, found, known) -> None:
    if unknown := [str(key) for key in found if not isinstance(key, str) or key not in known]:
        found = f"'{path.name}' with {where}{', '.join(unknown)}"
        raise CTError(found, f"of {', '.join(sorted(known))}", "correct the spelling")


def planned_table(sweep: Sweep) -> pd.DataFrame:
    """Return the plan as a table, one row a setting and backbone, with the values that differ between the rows."""
    groups = sweep.groups()
    every = {key: jobs[0].plan.to_json() for key, jobs in groups.items()}
    keys = [key for key in FIELDS if len({json.dumps(values[key]) for values in every.values()}) > 1]
    rows = []
    for (setting, backbone), jobs in groups.items():
        values = {key: every[setting, backbone][key] for key in keys}
        values = {k: ", ".join(v) if isinstance(v, list) else "" if v is None else v for k, v in values.items()}
        values |= {"seeds": ", ".join(str(job.plan.seed) for job in jobs), "against": jobs[0].against or ""}
        rows.append({"setting": setting, "backbone": backbone, **values})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- running


def run_sweep(
    sweep: Sweep,
    settings: Settings,
    *,
    index: int | None = None,
    live: str | None = None,
    keep_weights: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run what is not done yet.

    A record counts as done when it was made with the same plan, profile, weights and slices as asked for now. An
    interrupted run goes on from its last checkpoint. A run that fails leaves its message in `<run>.failed.json`,
    and the others go on.

    Args:
        index: only this job of `sweep.jobs`, from 0: for a job array.
        live: a setting; where the course brings records of this sweep, only the first run of this setting is made,
            and compared with its record there. `make sweeps` makes all.
        keep_weights: store the trained weights, too.
        say: where a line a run goes.
    Raises:
        CTError: an index that the plan does not have.
        KeyboardInterrupt: after Ctrl-C; the run in progress is saved and goes on next time.
    """
    from ctutils.experiment import load, run_plan

    if index is not None and not 0 <= index < len(sweep.jobs):
        raise CTError(f"index {index}", f"0 to {len(sweep.jobs) - 1}", "see --list")
    reference = live and sweep.reference(settings)
    if reference and reference.is_dir():
        index = next(index for index, job in enumerate(sweep.jobs) if job.setting == live)
    jobs = sweep.jobs if index is None else sweep.jobs[index : index + 1]
    start, folder = time.perf_counter(), sweep.folder(settings)
    done, skipped, failed, prints = [], [], {}, {}
    with progress(total=len(jobs), desc=sweep.name, unit="run") as bar:
        for job in jobs:
            out, message = folder / job.name, folder / f"{job.name}.failed.json"
            bar.set_postfix_str(job.name)
            try:
                data = (str(job.plan.data), str(job.plan.test_data), job.plan.imbalance)
                if data not in prints:
                    prints[data] = load(job.plan, settings).fingerprint
                wanted = {**_identity(job.plan, settings), "slices": prints[data]}
                old, changes = _changes(out, wanted)
                asked = job.plan.resolved(settings).weights
                if (
                    old
                    and asked == "auto"
                    and wanted["weights"] == "random"
                    and old.record["weights"]["kind"] != "random"
                ):
                    found = f"a record with {old.record['weights']['kind']} weights, which cannot be had now"
                    raise CTError(found, "the same weights", "connect to the network, or set CT_WEIGHTS=random")
                if not changes:
                    skipped.append(job.name)
                else:
                    note = {"sweep": {"plan": sweep.name, "setting": job.setting, "identity": wanted}}
                    options = {"resume": "if_same", "note": note, "keep_weights": keep_weights}
                    run = run_plan(job.plan, settings, out, say=lambda _: None, **options)
                    if run.record["interrupted"]:
                        raise KeyboardInterrupt
                    done.append(job.name)
                    f1, seconds = run.record["scores"]["val"]["macro_f1"], run.record["seconds"]["total"]
                    say(f"{job.name}: validation macro F1 {f1:.3f}, {seconds:.0f} s")
                message.unlink(missing_ok=True)
            except Exception as error:  # whatever it was, the other runs go on
                failed[job.name] = str(error) or type(error).__name__
                write_json(message, {"run": job.name, "error": failed[job.name], "type": type(error).__name__})
                say(f"{job.name} failed: {failed[job.name]}")
            bar.update()
    said = _compared(folder, reference, jobs[0], len(sweep.jobs)) if reference and len(jobs) == 1 and not failed else ""
    return Outcome(tuple(done), tuple(skipped), failed, time.perf_counter() - start, said)


def _compared(folder: Path, reference: Path, job: Job, count: int) -> str:
    """Say how a run made here agrees with the record of it that comes with the course."""
    text = f"1 of {count} runs was made here, the others are read from the course's records (make sweeps makes all)."
    try:
        pair = [load_run(place / job.name) for place in (folder, reference)]
    except CTError as error:
        return f"{text}\n{error}"
    scores = [run.record["scores"]["val"]["macro_f1"] for run in pair]
    here, there = (run.y_score("val").argmax(1) for run in pair)
    same = f"the same class for {(here == there).sum()} of {len(here)} slices" if len(here) == len(there) else "others"
    return f"{text}\n{job.name}: validation macro F1 {scores[0]:.3f} here, {scores[1]:.3f} in the records; {same}"


def sweep_status(sweep: Sweep, settings: Settings) -> pd.DataFrame:
    """Return one row a job: index, run, status (done, failed, begun, to do, or what changed) and val macro F1.

    It makes nothing; whether the slices are still the same is looked at when the sweep runs.
    """
    folder, rows = sweep.folder(settings), []
    for index, job in enumerate(sweep.jobs):
        out = folder / job.name
        run, changes = _changes(out, _identity(job.plan, settings))
        status = "done" if not changes else f"changed: {'; '.join(changes)}" if run else "to do"
        if changes and (folder / f"{job.name}.failed.json").exists():
            status = "failed"
        elif changes and list(folder.glob(f".{job.name}.{'?' * 8}.checkpoint.pt")):
            status = "begun"
        f1 = run.record["scores"]["val"]["macro_f1"] if run and not changes else float("nan")
        rows.append({"index": index, "run": job.name, "status": status, "val_f1": f1})
    return pd.DataFrame(rows)


def _identity(plan: Plan, settings: Settings) -> dict:
    """Return all that decides a run's numbers but the slices: the plan, the profile, and which weights there are."""
    from ctutils.weights import which_weights

    resolved = plan.resolved(settings)
    which = which_weights(resolved.backbone, resolved.weights)
    return {**resolved.to_json(), "profile": settings.profile.name, "weights": which}


def _changes(out: Path, wanted: dict) -> tuple[Run | None, list[str]]:
    """Return the record in `out`, if there is one, and in what it differs from what is wanted."""
    try:
        run = load_run(out)
    except CTError:
        return None, ["no record"]  # absent or damaged
    match run.record:
        case {"sweep": {"identity": dict(made)}}:
            pass
        case _:
            made = {}
    changes = [f"{key} {made.get(key)} -> {wanted[key]}" for key in wanted if made.get(key) != wanted[key]]
    return run, changes + (["interrupted"] if run.record["interrupted"] else [])


def load_sweep(sweep: Sweep, settings: Settings) -> dict[tuple[str, str], list[Run]]:
    """Return the records of each (setting, backbone), one per seed: made here, else those that come with the course.

    A group with a record that is missing, unfinished or of an older plan is left out.
    """
    found = {}
    for key, jobs in sweep.groups().items():
        for folder in (sweep.folder(settings), sweep.reference(settings)):
            states = [_changes(folder / job.name, _identity(job.plan, settings)) for job in jobs]
            if key not in found and not any(changes for _, changes in states):
                found[key] = [run for run, _ in states]
    return found


def pack_runs(sweep: Sweep, settings: Settings, out: str | Path) -> Path:
    """Copy the finished records without their weights into `out`; records there of the same names are replaced."""
    for runs in load_sweep(sweep, settings).values():
        for run in runs:
            target = Path(out) / run.name
            target.mkdir(parents=True, exist_ok=True)
            for name in set(RECORD_FILES) - set(TENSOR_FILES):
                shutil.copyfile(run.folder / name, target / name)
    return Path(out)
