"""A plan file as jobs: `ctutils sweep PLAN.toml --on slurm|local`, through submitit (the extra `cluster`).

Jobs are the plan's runs, grouped by the cache that they share. Each one calls `run_sweep`, so that its records are
those of one machine. What was submitted stands beside the records in `.cluster/`, which jobs are alive Slurm itself
says: any process can look, also after the one that submitted them has died.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock

from ctutils.base import CTError, read_json, write_json
from ctutils.config import Settings, get_settings
from ctutils.runs import claim, load_run
from ctutils.sweep import Job, Sweep, _changes, _identity, pack_runs, read_sweep, run_sweep, sweep_status

POLL = {"slurm": 5.0, "local": 0.5}  # seconds
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
COLUMNS = ("run", "status", "node", "seconds", "val_f1", "job", "why")


@dataclasses.dataclass
class Group:
    """One job: runs that share a cache. It is pickled when it is submitted, so a plan that changes later is another.

    Attributes:
        sweep: the runs of this job; weights: which ones each run would take where it was submitted.
        stamp: of the submission.
        shared: name of what other jobs need, too: the features of the slices as they are, beside views; "" for none.
    """

    sweep: Sweep
    settings: Settings
    weights: dict[str, str]
    stamp: str
    minutes: int
    keep_weights: bool = False
    shared: str = ""

    def __call__(self) -> dict[str, str]:
        """Run what is not done yet; return the messages of what failed."""
        from ctutils.weights import which_weights

        self.start, self.before, self.too_short, failed = time.time(), self._so_far(), False, {}
        folder = self.sweep.folder(self.settings)
        for job in self.sweep.jobs:
            if (newest := _submitted_in(folder, job.name)) not in (self.stamp, None):
                print(f"{job.name}: left to the newer submission {newest}")
                continue
            plan, message = job.plan.resolved(self.settings), folder / f"{job.name}.failed.json"
            here, there = which_weights(plan.backbone, plan.weights), self.weights[job.name]
            if here != there:
                mend = "run ctutils weights --to FOLDER where all nodes can read it, and name it in CT_WEIGHTS"
                failed[job.name] = str(CTError(f"weights '{here}' on this node", f"'{there}'", mend))
            else:
                self._share(job)
                failed |= {} if self.too_short else self._run(job)
            if self.too_short:
                found = f"a time limit of {self.minutes} minutes in which no epoch was finished"
                failed[job.name] = str(CTError(found, "time for one epoch at least", "give more --minutes"))
            if job.name in failed:
                write_json(message, {"run": job.name, "error": failed[job.name]})
            if self.too_short:
                break
        return failed

    def _share(self, job: Job) -> None:
        """Make what several jobs need in the first of them, while the others wait; what is wrong the run says."""
        if not self.shared:
            return
        from ctutils.experiment import build, featurise, load

        plan = dataclasses.replace(job.plan, augment=(), views=0)
        with FileLock(self.sweep.folder(self.settings) / ".cluster" / f"{self.shared}.lock"), suppress(Exception):
            folder = load(plan, self.settings)
            featurise(plan, self.settings, folder, build(plan, self.settings, folder))
        self.shared = ""

    def _run(self, job: Job) -> dict[str, str]:
        """Run one job of the sweep, after another process that still holds its record: of a node given up, perhaps."""
        waits, out = False, self.sweep.folder(self.settings) / job.name
        while True:
            try:
                with claim(out):
                    pass
            except CTError:
                if not waits:
                    print(f"{job.name}: waiting for the process that holds it", flush=True)
                waits = True
                time.sleep(2)
                continue
            one = dataclasses.replace(self.sweep, jobs=(job,))
            failed = run_sweep(one, self.settings, keep_weights=self.keep_weights, say=print).failed
            if not any("held by another run" in text for text in failed.values()):
                return failed

    def _so_far(self) -> list:
        """Return what changes when an epoch or a run of this job is finished."""
        folder, found = self.sweep.folder(self.settings), []
        for job in self.sweep.jobs:
            for path in (*folder.glob(f".{job.name}.*.checkpoint.pt"), folder / job.name / "run.json"):
                with suppress(OSError):
                    found.append((path.name, path.stat().st_mtime_ns))
        return found

    def checkpoint(self):
        """Say to submitit, shortly before the time limit or on preemption, what goes on after a requeue: the same."""
        limit = time.time() - self.start > 60 * self.minutes - _signal(self.minutes) - 75  # Slurm may be a minute early
        self.too_short = limit and self._so_far() == self.before
        if self.too_short:
            return None
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def _signal(minutes: int) -> int:
    """Return how many seconds before its end a job is told of it."""
    return min(90, 15 * minutes)


def command(options) -> tuple[dict, str]:
    """Do what `ctutils sweep PLAN --on ...` or `--status` asks for; return it for a program and for people.

    Raises:
        CTError: as `submit`; options that do not go together.
    """
    import pandas as pd

    for found, mend in (
        (options.list and "--list", "--status, or leave out --on"),
        (options.index is not None and "--index", "leave it out: --on makes the jobs"),
        (options.detach and options.on != "slurm" and "--detach", "use --on slurm, or wait"),
        (min(options.minutes or 1, options.parallel or 1) < 1 and "--minutes or --parallel below 1", "give 1 or more"),
    ):
        if found:
            raise CTError(f"{found} with {'--on ' + options.on if options.on else '--status'}", "one of them", mend)
    settings = get_settings()
    if options.on != "local":  # the nodes' device counts, not this machine's
        gpus = os.environ.get("CT_DEVICE", "").startswith("cuda") if options.gpus is None else options.gpus
        settings = get_settings(device="cuda" if gpus else "cpu")
    sweep = read_sweep(options.plan, settings.profile)
    if options.on:
        given = {key: getattr(options, key) for key in ("partition", "minutes", "parallel") if getattr(options, key)}
        given |= {"detach": options.detach, "keep_weights": options.keep_weights}
        say = (lambda text: None) if options.json else print
        rows = submit(sweep, settings, options.on, say=say, **given)
    else:
        rows = states(sweep, settings)
    packed = str(pack_runs(sweep, settings, options.pack)) if options.pack else None
    failed = {row["run"]: row["why"] for row in rows if row["status"] in ("failed", "ended")}
    table = pd.DataFrame(rows)
    content = {"plan": sweep.name, "folder": str(sweep.folder(settings)), "failed": failed, "packed": packed}
    content["runs"] = json.loads(table.to_json(orient="records"))
    lines = [f"{sweep.title} ({settings})", table.drop(columns="why").round(3).to_string(index=False, na_rep="")]
    lines += [f"{name}: {why}" for name, why in failed.items()]
    lines += [f"records without weights in '{packed}'"] if packed else []
    return content, "\n".join([*lines, counts(rows)])


def submit(
    sweep: Sweep,
    settings: Settings,
    on: str,
    *,
    partition: str | None = None,
    minutes: int = 60,
    parallel: int | None = None,
    detach: bool = False,
    keep_weights: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Submit what is neither done nor in a living job, wait for all of it, and return the table of `states`.

    Args:
        on: `slurm`, one array of jobs; `local`, processes here.
        settings: a device of CUDA asks for a GPU for each job.
        partition: Slurm's; minutes: time limit of a job, which then goes on in the queue.
        parallel: jobs at a time (default: Slurm's own limit; local 1).
        detach: do not wait.
        keep_weights: as for `run_sweep`.
        say: where a line for each change goes.
    Raises:
        CTError: no submitit, no sbatch, or it refuses; runs that would have random weights on the nodes without being
            asked to; slices that cannot be read.
    """
    try:
        from submitit import AutoExecutor
    except ImportError as error:
        mend = "run pip install submitit"
        raise CTError("no package submitit", "the optional extra `cluster`", mend) from error
    if on == "slurm" and not (shutil.which("sbatch") and shutil.which("squeue")):
        raise CTError(
            "no sbatch on this machine", "the commands of Slurm", "call it on a login node, or use --on local"
        )
    room = sweep.folder(settings) / ".cluster"
    room.mkdir(parents=True, exist_ok=True)
    with FileLock(room / "lock"):  # a second submitter waits, and finds the jobs of the first
        alive, stamps = _alive(room)
        jobs, prints = _not_done(sweep, settings, alive, say)
        weights = _weights(jobs, settings, strict=on == "slurm")
        _make_stores(jobs, settings)
        groups = _groups(jobs, settings, weights)
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        executor = AutoExecutor(room / stamp, on, slurm_max_num_timeout=1000)
        executor.update_parameters(
            timeout_min=minutes,
            gpus_per_node=int(settings.device.startswith("cuda")),
            name=f"ct-{stamp}",
            slurm_signal_delay_s=_signal(minutes),
            slurm_additional_parameters={"requeue": True},  # when a node dies
            **({"slurm_partition": partition} if partition else {}),
            **({"slurm_array_parallelism": parallel} if parallel else {}),
        )
        about = {"on": on, "names": [[job.name for job in group] for group, _ in groups], "prints": prints}
        given = (settings, weights, stamp, minutes, keep_weights)
        one = [Group(dataclasses.replace(sweep, jobs=tuple(group)), *given, shared) for group, shared in groups]
        if groups:
            for path in room.glob("*.json"):  # of jobs that are gone
                if path.stem not in stamps:
                    path.unlink()
                    shutil.rmtree(room / path.stem, ignore_errors=True)
            for job in jobs:
                (room.parent / f"{job.name}.failed.json").unlink(missing_ok=True)
            write_json(room / f"{stamp}.json", about)  # before the jobs: they are found by its name
        if groups and on == "slurm":
            try:
                executor.submit_array(one)
            except Exception as error:  # of submitit and of sbatch: whatever it was, nothing is submitted
                (room / f"{stamp}.json").unlink()
                lines = [line for line in str(error).splitlines() if "error" in line] or [str(error)]
                mend = "correct --partition, --gpus or --minutes; sinfo lists the partitions"
                raise CTError(f"an answer of sbatch: {lines[0]}", "jobs in the queue", mend) from error
        say(f"{sweep.title}: {len(jobs)} runs in {len(groups)} jobs" + (f" ({stamp})" if groups else ""))
    if on == "local":
        return _run_here(sweep, settings, executor, one, parallel or 1, say)
    if detach:
        return states(sweep, settings)
    return watch(sweep, settings, say)


def watch(
    sweep: Sweep, settings: Settings, say: Callable[[str], None] = print, ask: Callable | None = None
) -> list[dict]:
    """Wait until no job of the sweep lives; return the table of `states`.

    Args:
        say: where a line for each change goes; a terminal has a table, too.
        ask: returns the jobs as `_queue` does (default: of Slurm).
    """
    before, nodes, ended, drawn, silent = {}, {}, 0, 0, False
    room, tty = sweep.folder(settings) / ".cluster", sys.stdout.isatty() and say is print
    try:
        while True:
            queue = (ask or _queue)(room)
            rows = states(sweep, settings, queue, "local" if ask else "slurm")
            if tty:
                sys.stdout.write(f"\033[{drawn}A\033[J" if drawn else "")
            first = not before
            for row in rows:
                row["node"] = nodes.setdefault(row["run"], row["node"]) if not row["node"] else row["node"]
                nodes[row["run"]] = row["node"]
                now = (row["status"], row["node"])
                if before.get(row["run"]) != now and not (first and row["status"] == "done"):
                    say(_line(row))
                before[row["run"]] = now
            if queue is None and not silent:
                say("The scheduler does not answer; waiting for it.")
            silent = queue is None
            ended = 0 if any(row["status"] in ("queued", "running", "unknown") for row in rows) else ended + 1
            if ended > 1 or (ended and not any(row["status"] == "ended" for row in rows)):  # a folder may be late
                return rows
            if tty:
                busy = [row for row in rows if row["status"] in ("running", "failed", "ended")][:20]
                text = "\n".join([counts(rows), *map(_line, busy)])
                print(text, flush=True)
                drawn = text.count("\n") + 1
            time.sleep(POLL["local" if ask else "slurm"])
    except KeyboardInterrupt:
        if not ask:
            say("The jobs go on. --status shows them, the same command waits for them, scancel ends them.")
        raise


def states(sweep: Sweep, settings: Settings, queue: dict | None = ..., on: str = "slurm") -> list[dict]:
    """Return a dict a run: `COLUMNS`. It makes nothing and needs no process that submitted anything.

    Status is done, failed, queued, running, ended (the job is gone and left neither record nor message), unknown (the
    scheduler does not answer), or what `sweep_status` says of a run that was never submitted.
    """
    folder = sweep.folder(settings)
    room, rows, at_work = folder / ".cluster", sweep_status(sweep, settings).to_dict("records"), set()
    queue = _queue(room) if queue is ... else queue
    submitted = {}  # run -> its newest job
    for stamp, about in reversed(_submissions(room)):
        if about["on"] == on:
            submitted |= {name: (stamp, i) for i, names in enumerate(about["names"]) for name in names}
    for row in rows:
        stamp, index = submitted.get(row["run"], ("", 0))
        state, node, seconds, number = (queue or {}).get((stamp, index), ("", "", math.nan, ""))
        row |= {"node": "", "seconds": math.nan, "job": number, "why": ""}
        if row["status"] == "done":
            row["seconds"] = load_run(folder / row["run"]).record["seconds"]["total"]
        elif row["status"] == "failed":
            row["why"] = read_json(folder / f"{row['run']}.failed.json").get("error", "")
        elif state and state not in OVER:
            row["status"] = "running" if state == "RUNNING" and (stamp, index) not in at_work else "queued"
            at_work.add((stamp, index))
            if row["status"] == "running":
                row |= {"node": node, "seconds": seconds}
        elif stamp:
            row["status"] = "unknown" if queue is None else "ended"
            row["why"] = "the scheduler does not answer" if queue is None else _why(room, stamp, index, state)
    return [{key: row[key] for key in COLUMNS} for row in rows]


def counts(rows: list[dict]) -> str:
    """Return how many runs there are of each status, in one line."""
    kinds = [row["status"].partition(":")[0] for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _line(row: dict) -> str:
    where = f" on {row['node']}" if row["status"] == "running" and row["node"] else ""
    took = f", {row['seconds']:.0f} s" if row["seconds"] == row["seconds"] else ""
    return f"{row['run']}: {row['status']}{where}{took}" + (f": {row['why']}" if row["why"] else "")


def _submissions(room: Path) -> list[tuple[str, dict]]:
    """Return (stamp, what was submitted), the newest first."""
    found = []
    for path in sorted(room.glob("*.json"), reverse=True):
        with suppress(CTError, KeyError):  # another process may just remove it
            found.append((path.stem, {key: read_json(path)[key] for key in ("on", "names", "prints")}))
    return found


def _submitted_in(folder: Path, run: str) -> str | None:
    """Return the newest submission that has a run."""
    return next((stamp for stamp, about in _submissions(folder / ".cluster") if run in about["prints"]), None)


def _queue(room: Path) -> dict[tuple[str, int], tuple[str, str, float, str]] | None:
    """Ask Slurm for the jobs of this folder: (stamp, place in the array) -> state, node, seconds, job.

    Jobs that ended minutes ago are among them. None when it does not answer.
    """
    names = ",".join(f"ct-{path.stem}" for path in room.glob("*.json"))
    if not names or not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", f"--name={names}", "--format=%F|%K|%j|%T|%N|%M"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    found = {}
    for line in done.stdout.split():
        job, index, name, state, node, elapsed = line.split("|")
        days, _, clock = elapsed.rpartition("-")
        seconds = 0.0
        for part in clock.split(":"):
            seconds = 60 * seconds + (int(part) if part.isdecimal() else math.nan)
        number = job if index == "N/A" else f"{job}_{index}"
        place = (name.removeprefix("ct-"), 0 if index == "N/A" else int(index))
        found[place] = (state, node, seconds + 86400 * int(days or 0), number)
    return found


def _alive(room: Path) -> tuple[dict[str, str], set[str]]:
    """Return the runs in living jobs, with the digest of what each is to be, and the submissions of these jobs."""
    queue, found, stamps = _queue(room), {}, set()
    if queue is None:
        raise CTError("a scheduler that does not answer", "Slurm's squeue", "wait, or ask whoever runs the cluster")
    for stamp, about in reversed(_submissions(room)):
        for index, names in enumerate(about["names"]):
            if queue.get((stamp, index), ("COMPLETED",))[0] not in OVER:
                found |= {name: about["prints"][name] for name in names}
                stamps.add(stamp)
    return found, stamps


def _why(room: Path, stamp: str, index: int, state: str) -> str:
    """Say why a job is gone that left neither record nor message: its log's last error, a full folder."""
    in_array = len(dict(_submissions(room))[stamp]["names"]) > 1
    logs = sorted((room / stamp).glob(f"*_{index}_0_log.err" if in_array else "*_0_log.err"))
    lines = logs[0].read_text("utf-8", "replace").splitlines() if logs else []
    lines = [line for line in lines if "error" in line.lower()] or ["no error in its log"]
    full = shutil.disk_usage(room).free < 20e6
    mend = "free some space" if full else "see the log"
    if state == "OUT_OF_MEMORY" or "kill" in lines[-1].lower():
        mend = "give it more memory if that was it (SBATCH_MEM_PER_NODE=16G)"
    found = f"a job that ended {f'({state.lower()}) ' if state else ''}without a record: {lines[-1].strip()}"
    found += ", and a full folder" if full else ""
    return str(CTError(found, "a record", f"{mend}, and give the same command again; its log: {room / stamp}"))


def _run_here(sweep: Sweep, settings: Settings, executor, groups: list[Group], parallel: int, say) -> list[dict]:
    """Run the jobs as processes here, some at a time; Ctrl-C ends them with this one."""
    stamp, begun = groups[0].stamp if groups else "", []

    def ask(room: Path) -> dict:
        busy = sum(not job.done() for job, _ in begun)
        for group in groups[len(begun) : len(begun) + parallel - busy]:
            begun.append((executor.submit(group), time.time()))
        found = {}
        for index in range(len(groups)):
            job, start = begun[index] if index < len(begun) else (None, 0.0)
            state = "PENDING" if job is None else "COMPLETED" if job.done() else "RUNNING"
            found[stamp, index] = (state, "here", time.time() - start, job.job_id if job else "")
        return found

    return watch(sweep, settings, say, ask)


def _not_done(sweep: Sweep, settings: Settings, alive: dict, say: Callable) -> tuple[list[Job], dict[str, str]]:
    """Return the jobs that are neither done nor in a living job that does the very same, and what each one is to be."""
    from ctutils.experiment import load

    loaded, jobs, prints, there = {}, [], {}, 0
    for job in sweep.jobs:
        data = (str(job.plan.data), str(job.plan.test_data), job.plan.imbalance)
        if data not in loaded:
            loaded[data] = load(job.plan, settings).fingerprint
        wanted = {**_identity(job.plan, settings), "slices": loaded[data]}
        changes = _changes(sweep.folder(settings) / job.name, wanted)[1]
        digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
        if changes and alive.get(job.name) == digest:
            there += 1
        elif changes:
            jobs.append(job)
            prints[job.name] = digest
            if job.name in alive:
                say(f"{job.name}: changed since it was submitted; it is made anew, whatever its older job does")
    if there:
        say(f"{there} runs are in jobs already: they are not submitted again")
    return jobs, prints


def _weights(jobs: list[Job], settings: Settings, strict: bool) -> dict[str, str]:
    """Fetch the weights of all jobs, and return which ones each will take; refuse random ones not asked for."""
    from ctutils.weights import find_weights, which_weights

    random, which, log = {}, {}, logging.getLogger("ctutils.weights")
    for job in jobs:
        plan = job.plan.resolved(settings)
        log.disabled = True  # said below, once
        try:
            kind = find_weights(plan.backbone, plan.weights)[1].kind
        finally:
            log.disabled = False
        which[job.name] = which_weights(plan.backbone, plan.weights)
        if strict and "random" in (kind, which[job.name]) and plan.weights != "random":
            random.setdefault(plan.backbone, []).append(job.name)
    if random:
        found = f"no weights of {', '.join(random)} here: {sum(map(len, random.values()))} runs would be random"
        mend = "fetch them with ctutils weights, or ask for random ones with --weights random"
        raise CTError(found, "weight files that the nodes can read", mend)
    return which


def _make_stores(jobs: list[Job], settings: Settings) -> None:
    """Decode the slices once, before the jobs that would all do it."""
    from ctutils.data import build_store
    from ctutils.experiment import load

    plans = [job.plan.resolved(settings) for job in jobs]
    stores = {(str(plan.data), str(plan.test_data), plan.imbalance, plan.size): plan for plan in plans}
    for plan in stores.values():
        build_store(load(plan, settings), plan.size, cache=settings.cache_dir)


def _groups(jobs: list[Job], settings: Settings, weights: dict[str, str]) -> list[tuple[list[Job], str]]:
    """Return the jobs by what they share: a cache of one data set, size, backbone, cut and views; else nothing.

    With each group goes the name of the pass that it has in common with others, which differ in their views only.
    """
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        plan = job.plan.resolved(settings)
        key = (str(plan.data), str(plan.test_data), plan.size, plan.backbone, plan.weights, plan.precision)
        key += (plan.unfreeze, plan.seed if weights[job.name] == "random" else None)
        groups.setdefault((key, plan.augment, plan.views) if plan.cached else (job.name,), []).append(job)
    bases = [key[0] for key in groups if len(key) > 1]
    names = {base: hashlib.sha256(repr(base).encode()).hexdigest()[:12] for base in bases if bases.count(base) > 1}
    return [(group, names.get(key[0], "")) for key, group in groups.items()]
