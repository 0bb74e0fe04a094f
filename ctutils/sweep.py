"""Many runs from one plan file: planned first, run in any order, compared with intervals at the end.

A plan is a TOML file: backbones x settings x seeds. `notebooks/plans/` holds the course's own.
"""

import dataclasses
import functools
import json
import re
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from ctutils.base import CTError, atomic_path, progress, write_json
from ctutils.config import Profile, Settings
from ctutils.metrics import seeds_difference
from ctutils.runs import Run, load_run

PLAN_KEYS = {"title", "seeds", "backbones", "common", "settings", "quick", "standard", "full"}
PROFILE_KEYS = {"seeds", "backbones", "common", "settings"}
SETTING_KEYS = {"against", "backbones"}  # beside the fields of pipeline.Plan
# The fields of pipeline.Plan that a plan may set; a test holds the two lists together.
FIELDS = {
    *("augment", "at_once", "balance", "batch_size", "bn", "data", "discriminative", "epochs", "imbalance", "lr"),
    *("optimizer", "patience", "precision", "scheduler", "size", "standardise", "test_data", "unfreeze", "views"),
    "weights",
}
DATA = ("default", "shortcut")  # names that `data` and `test_data` may have instead of a folder


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep: `values` are fields of `pipeline.Plan`, backbone and seed included."""

    name: str  # of the record's folder
    setting: str
    backbone: str
    seed: int
    against: str | None  # the setting that this one is compared with
    values: dict


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A plan file, read for one profile."""

    name: str
    title: str
    jobs: tuple[Job, ...]

    def folder(self, settings: Settings) -> Path:
        """Return the folder of its records, `data/runs/<profile>/<plan>/`."""
        return settings.runs_dir / self.name

    def groups(self) -> dict[tuple[str, str], list[Job]]:
        """Return the jobs of each (setting, backbone), one a seed, in the plan's order."""
        groups: dict[tuple[str, str], list[Job]] = {}
        for job in self.jobs:
            groups.setdefault((job.setting, job.backbone), []).append(job)
        return groups


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `run_sweep` did: names of runs, and for each failed one its message."""

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        here = len(self.done) + len(self.skipped)
        return f"{here} of {here + len(self.failed)} runs are done" + "".join(
            f"\nfailed: {name}: {message}" for name, message in self.failed.items()
        )


# ---------------------------------------------------------------- the plan


def read_sweep(path: str | Path, profile: Profile | str) -> Sweep:
    """Read a plan file.

        title = "what is asked"
        seeds = [0, 1, 2]
        backbones = ["efficientnet_lite0"]
        [common]                    # of every run: fields of `pipeline.Plan`
        size = 128
        [settings.plain]
        [settings.flipped]
        augment = ["flip"]
        against = "plain"           # to be compared with
        backbones = ["alexnet"]     # instead of all
        [quick]                     # in profile quick (standard, full): what differs
        seeds = [0]
        common = { epochs = 1 }
        settings = ["plain"]        # these only

    Raises:
        CTError: no such file, no TOML, an unknown key or value, two runs of one name.
    """
    path, profile = Path(path), getattr(profile, "name", profile)
    where = f"'{path.name}'"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CTError(f"no plan '{path}'", "a TOML file", "see notebooks/plans for examples") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise CTError(f"{where}, which is not TOML ({error})", "a plan", "see notebooks/plans for examples") from error
    _refuse_unknown(where, content, PLAN_KEYS)
    changes = content.get(profile, {})
    _need_type(where, profile, changes, dict)
    _refuse_unknown(f"{where}, [{profile}]", changes, PROFILE_KEYS)

    def look_up(key: str, kind: type):
        value = changes.get(key, content.get(key))
        if value is None or not value:
            raise CTError(f"{where} without {key}", f"{key} = [...]", "add them to the plan")
        _need_type(where, key, value, kind)
        return value

    seeds, backbones = look_up("seeds", list), _names(where, "backbones", look_up("backbones", list))
    for part in (content, changes):
        _need_type(where, "common", part.get("common", {}), dict)
    common = {**content.get("common", {}), **changes.get("common", {})}
    _refuse_unknown(f"{where}, [common]", common, FIELDS)
    settings = content.get("settings", {})
    _need_type(where, "settings", settings, dict)
    kept = _names(where, "settings", changes.get("settings", list(settings)))
    _refuse_unknown(f"{where}, [{profile}] settings", dict.fromkeys(kept), set(settings))
    jobs = []
    for setting in kept or look_up("settings", dict):
        own = settings[setting]
        _need_type(where, f"settings.{setting}", own, dict)
        _refuse_unknown(f"{where}, [settings.{setting}]", own, FIELDS | SETTING_KEYS)
        _names(where, f"settings.{setting}.backbones", own.get("backbones", []))
        against = own.get("against")
        if against is not None and against not in list(settings):
            _refuse_unknown(f"{where}, [settings.{setting}] against", {str(against): None}, set(settings))
        values = {**common, **{key: value for key, value in own.items() if key not in SETTING_KEYS}}
        for backbone in _backbones(own, backbones, "backbones" in changes):
            for seed in seeds:
                name = "-".join(re.sub(r"\W+", "-", part).strip("-") for part in (setting, backbone, f"s{seed}"))
                every = {**values, "backbone": backbone, "seed": seed}
                jobs.append(Job(name, setting, backbone, seed, against if against in kept else None, every))
    if not jobs:
        raise CTError(f"{where} without a run in profile {profile}", "one or more", "keep a backbone of its settings")
    names = [job.name.casefold() for job in jobs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise CTError(f"two runs called '{name}' in {where}", "one name a run", "rename a setting, or drop one of two")
    return Sweep(path.stem, str(content.get("title", path.stem)), tuple(jobs))


def _backbones(own: dict, backbones: list[str], narrowed: bool) -> list[str]:
    """Return a setting's backbones: its own, of which a profile that names backbones keeps those."""
    if "backbones" not in own:
        return backbones
    return [name for name in own["backbones"] if not narrowed or name in backbones]


def _names(where: str, key: str, value) -> list[str]:
    _need_type(where, key, value, list)
    for name in value:
        _need_type(where, key, name, str)
    return value


def _refuse_unknown(where: str, found: dict, known: set[str]) -> None:
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise CTError(f"{where} with {', '.join(unknown)}", f"of {', '.join(sorted(known))}", "correct the spelling")


def _need_type(where: str, key: str, value, kind: type) -> None:
    if not isinstance(value, kind):
        word = {dict: "a table", list: "a list", str: "a list of names"}[kind]
        raise CTError(f"{where} with {key} = {value!r}", f"{word}", "see notebooks/plans for examples")


def planned_table(sweep: Sweep) -> pd.DataFrame:
    """Return the plan as a table, one row a setting and backbone, with the values that differ between the rows."""
    groups = sweep.groups()
    every = [jobs[0].values for jobs in groups.values()]
    keys = dict.fromkeys(key for values in every for key in values if key not in ("backbone", "seed"))
    differs = [key for key in keys if len({json.dumps(values.get(key)) for values in every}) > 1]
    rows = []
    for (setting, backbone), jobs in groups.items():
        values = {key: jobs[0].values.get(key, "") for key in differs}
        values = {key: ", ".join(value) if isinstance(value, list) else value for key, value in values.items()}
        seeds = ", ".join(str(job.seed) for job in jobs)
        rows.append(
            {"setting": setting, "backbone": backbone, **values, "seeds": seeds, "against": jobs[0].against or ""}
        )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- running


def run_sweep(
    sweep: Sweep,
    settings: Settings,
    *,
    index: int | None = None,
    keep_weights: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run what is not done yet.

    A record counts as done when it was made with the same settings, profile, weights and slices as the plan asks
    for now. An interrupted run goes on from its last checkpoint. A run that fails leaves its message in
    `<run>.failed.json`, and the others go on.

    Args:
        index: only this job of `sweep.jobs`, from 0: for a job array.
        keep_weights: store the trained weights, too.
        say: where a line a run goes.
    Raises:
        CTError: an index that the plan does not have.
        KeyboardInterrupt: after Ctrl-C; the run in progress is saved and goes on next time.
    """
    from ctutils.pipeline import StoppedEarly, run_plan

    if index is not None and not 0 <= index < len(sweep.jobs):
        raise CTError(f"index {index}", f"0 to {len(sweep.jobs) - 1}", "see --list")
    jobs = sweep.jobs if index is None else sweep.jobs[index : index + 1]
    start, folder = time.perf_counter(), sweep.folder(settings)
    done, skipped, failed = [], [], {}
    data = _Data(settings)
    with progress(total=len(jobs), desc=sweep.name, unit="run") as bar:
        for job in jobs:
            out, message = folder / job.name, folder / f"{job.name}.failed.json"
            bar.set_postfix_str(job.name)
            try:
                wanted = _identity(job, settings, data)
                if _finished(out, wanted):
                    skipped.append(job.name)
                else:
                    plan, quiet = _plan(job, data), {"say": lambda _: None, "keep_weights": keep_weights}
                    note = {"sweep": {"plan": sweep.name, "setting": job.setting, "identity": wanted}}
                    run = run_plan(plan, settings, out, resume="if_same", note=note, **quiet)
                    if run.record["interrupted"]:
                        raise KeyboardInterrupt
                    done.append(job.name)
                    test = run.record["scores"]["test"]
                    say(f"{job.name}: test macro F1 {test['macro_f1']:.3f}, {run.record['seconds']['total']:.0f} s")
                message.unlink(missing_ok=True)
            except StoppedEarly as error:
                raise KeyboardInterrupt from error
            except Exception as error:  # whatever it was, the other runs go on
                failed[job.name] = str(error) or type(error).__name__
                write_json(message, {"run": job.name, "error": failed[job.name], "type": type(error).__name__})
                say(f"{job.name} failed: {failed[job.name]}")
            bar.update()
    return Outcome(tuple(done), tuple(skipped), failed, time.perf_counter() - start)


def sweep_status(sweep: Sweep, settings: Settings) -> pd.DataFrame:
    """Return one row a job: index, run, status (done, changed, failed, begun, to do), val and test macro F1.

    It makes nothing; whether the slices are still the same is looked at when the sweep runs.
    """
    folder, rows = sweep.folder(settings), []
    for index, job in enumerate(sweep.jobs):
        out, scores = folder / job.name, {}
        if run := _finished(out, _identity(job, settings)):
            status, scores = "done", run.record["scores"]
        elif (folder / f"{job.name}.failed.json").exists():
            status = "failed"
        elif (folder / f".{job.name}.checkpoint.pt").exists():
            status = "begun"
        else:
            status = "changed" if (out / "run.json").exists() else "to do"
        f1 = {split: scores.get(split, {}).get("macro_f1", np.nan) for split in ("val", "test")}
        rows.append({"index": index, "run": job.name, "status": status, **f1})
    return pd.DataFrame(rows)


class _Data:
    """The folders that a plan's names stand for, each looked at once."""

    def __init__(self, settings: Settings):
        self.settings, self.folders = settings, {}

    def load(self, name: str):
        from ctutils.data import default_folder, load_folder, shortcut_folder

        if name not in self.folders:
            make = {"default": default_folder, "shortcut": shortcut_folder}.get(name)
            self.folders[name] = make(self.settings) if make else load_folder(name, cache=self.settings.cache_dir)
        return self.folders[name]


def _plan(job: Job, data: _Data):
    """Return the job's `pipeline.Plan`; data sets that are made on first use are made here."""
    from ctutils.pipeline import Plan

    values = dict(job.values)
    for key in ("data", "test_data"):
        if values.get(key, "default" if key == "data" else None) is not None:
            values[key] = data.load(values.get(key, "default")).root
    return Plan(**values)


def _identity(job: Job, settings: Settings, data: _Data | None = None) -> dict:
    """Return all that decides a run's numbers; without `data` all but the slices."""
    profile = settings.profile
    open_ones = {"epochs": profile.epochs, "size": profile.image_size, "batch_size": profile.batch_size}
    identity = {"profile": profile.name, "weights": settings.weights, **open_ones, **job.values}
    for key in {"weights", "data", "test_data"} & set(identity):  # a record must not name one machine's folders
        identity[key] = Path(identity[key]).name
    if data is not None:
        names = [job.values.get("data", "default"), job.values.get("test_data")]
        identity["slices"] = [data.load(name).fingerprint for name in names if name is not None]
    return json.loads(json.dumps(identity))


def _finished(out: Path, wanted: dict) -> Run | None:
    """Return the finished record with these settings that stands in `out`, if there is one."""
    try:
        run = load_run(out)
    except CTError:
        return None  # absent or damaged
    made = run.record.get("sweep", {}).get("identity", {})
    made = made if "slices" in wanted else {key: value for key, value in made.items() if key != "slices"}
    return run if made == wanted and not run.record.get("interrupted") else None


# ---------------------------------------------------------------- comparing


def load_sweep(sweep: Sweep, settings: Settings) -> dict[tuple[str, str], list[Run]]:
    """Return the records of each (setting, backbone), one a seed.

    A group with a record that is missing, unfinished or of an older plan is left out.
    """
    folder, found = sweep.folder(settings), {}
    for key, jobs in sweep.groups().items():
        runs = [_finished(folder / job.name, _identity(job, settings)) for job in jobs]
        if all(runs):
            found[key] = runs
    return found


def compare_settings(sweep: Sweep, runs: dict[tuple[str, str], list[Run]], split: str = "test") -> pd.DataFrame:
    """Return one row a setting and backbone: its points over seeds, and its difference to the one it is against.

    Columns: setting, backbone, points (macro F1, one a seed), mean, against, difference (of the means over
    seeds), low, high (95 % interval of the difference over slices), seed_differences (one a seed), seeds_agree
    (seeds whose own difference has the same sign, e.g. "3 of 3"), verdict. From `difference` on they are empty
    where there is nothing to compare with.

    Args:
        runs: from `load_sweep`.
        split: whose predictions.
    Raises:
        CTError: records that do not belong together: other slices, or some with random weights and some without.
    """
    rows, groups = [], sweep.groups()
    for (setting, backbone), jobs in groups.items():
        if (setting, backbone) not in runs:
            continue
        ours, against = runs[setting, backbone], jobs[0].against
        points = [run.record["scores"][split]["macro_f1"] for run in ours]
        row = {"setting": setting, "backbone": backbone, "points": tuple(round(value, 4) for value in points)}
        row |= {"mean": float(np.mean(points)), "against": against or ""}
        theirs = runs.get((against, backbone))
        _need_same(f"'{setting}', {backbone}", "weights", [run.record["weights"]["kind"] for run in ours])
        if theirs:
            both, y_true = [*ours, *theirs], ours[0].y_true(split)
            asked = {some[0].values.get("weights") for some in (jobs, groups[against, backbone])}
            if len(asked) == 1:  # from scratch differs on purpose
                _need_same(f"'{setting}' and '{against}'", "weights", [run.record["weights"]["kind"] for run in both])
            if split == "test":
                tested = [run.record["sweep"]["identity"]["slices"][-1] for run in both]
                _need_same(f"'{setting}' and '{against}'", "test slices", tested)
            _need_same(f"'{setting}' and '{against}'", "labels", [run.y_true(split).tobytes() for run in both])
            scores = [[run.y_score(split) for run in some] for some in (ours, theirs)]
            found = seeds_difference(y_true, *scores, names=(setting, against))
            other = [run.record["scores"][split]["macro_f1"] for run in theirs]
            apart = [a - b for a, b in zip(points, other, strict=False)]
            same = sum(value * found.difference > 0 for value in apart)
            row |= {"difference": found.difference, "low": found.low, "high": found.high}
            row |= {"seed_differences": tuple(round(value, 4) for value in apart)}
            row |= {"seeds_agree": f"{same} of {len(apart)}", "verdict": found.verdict}
        rows.append(row)
    columns = [
        "setting",
        "backbone",
        "points",
        "mean",
        "against",
        "difference",
        "low",
        "high",
        "seed_differences",
        "seeds_agree",
        "verdict",
    ]
    return pd.DataFrame(rows, columns=columns)


def _need_same(who: str, what: str, found: list) -> None:
    if len(set(found)) > 1:
        raise CTError(
            f"{who}: records with different {what}", "the same", "delete these records and run the plan again"
        )


def say_differences(table: pd.DataFrame) -> list[str]:
    """Return a sentence for each row of `compare_settings` that has a difference; honest where it holds zero."""
    said = []
    for row in table.dropna(subset=["difference"]).itertuples():
        numbers = f"{row.difference:+.3f} macro F1 (95 % interval {row.low:+.3f} to {row.high:+.3f}, "
        numbers += f"same sign in {row.seeds_agree} seeds)"
        if row.low > 0 or row.high < 0:
            claim = f"{'higher' if row.low > 0 else 'lower'} than {row.against}: {numbers}"
        else:
            claim = f"not distinguishable from {row.against}: {numbers}"
        said.append(f"{row.backbone}, {row.setting}: {claim}")
    return said


# ---------------------------------------------------------------- packing


def pack_runs(sweep: Sweep, settings: Settings, out: str | Path) -> Path:
    """Copy the finished records without their weights into `out`, and write `sweep.json` with the speed measured.

    Args:
        out: folder; records there of the same names are replaced.
    Returns:
        the path of `sweep.json`: for each run seconds, slices a second of its epochs, its share of what the
        processor reaches in bfloat16 (a large matrix product; of runs on this kind of device only), and for each
        setting the sum of the seconds.
    """
    out = Path(out)
    rows, sums = [], {}
    ceiling = _bfloat16_ceiling(settings.device)
    for job in sweep.jobs:
        source = sweep.folder(settings) / job.name
        run = _finished(source, _identity(job, settings))
        if run is None:
            continue
        target = out / job.name
        target.mkdir(parents=True, exist_ok=True)
        for name in ("run.json", "history.csv", "predictions.csv"):
            with atomic_path(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
        here = run.record["device"] == settings.device  # the ceiling is that of this machine
        rows.append({"run": job.name, "setting": job.setting, **_speed(run, ceiling if here else None)})
        sums[job.setting] = sums.get(job.setting, 0) + run.record["seconds"]["total"]
    report = {"plan": sweep.name, "profile": settings.profile.name, "device": _device_name(settings.device)}
    report |= {"bfloat16_tflops": round(ceiling / 1e12, 2), "seconds": {k: round(v, 1) for k, v in sums.items()}}
    write_json(out / "sweep.json", {**report, "runs": rows})
    return out / "sweep.json"


def _speed(run: Run, ceiling: float | None) -> dict:
    record, seconds = run.record, run.record["seconds"]
    counts = {split: sum(classes.values()) for split, classes in record["data"]["counts"].items()}
    found = {"seconds": {key: round(value, 2) for key, value in seconds.items()}}
    if record["trained"] != "head":  # the whole network saw every slice; training costs three forward passes
        epoch = float(np.median(run.history["seconds"]))
        found["epoch_seconds"] = round(epoch, 3)
        found["slices_a_second"] = round((counts["train"] + counts["val"]) / epoch, 1)
        if record["trained"] == "all" and ceiling:
            work = (3 * counts["train"] + counts["val"]) * _forward_flops(record["backbone"], record["image_size"])
            found["share_of_bfloat16_ceiling"] = round(work / epoch / ceiling, 4)
    return found


@functools.cache
def _forward_flops(backbone: str, size: int) -> float:
    """Count the operations of one picture's forward pass, multiply and add counted apart."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ctutils.models import build_model

    model, _ = build_model(backbone, "random")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def _bfloat16_ceiling(device: str) -> float:
    """Return the operations a second of a large bfloat16 matrix product on the device, best of several."""
    import torch

    side = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = max(best, 4 * 2 * side**3 / (time.perf_counter() - start))
    return best


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
