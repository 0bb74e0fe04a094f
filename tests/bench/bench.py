"""Measure the course's way against the deck's plain loop, on synthetic slices: `make bench`.

    python tests/bench/bench.py [--only a six b] [--quick] [--backbones resnet50 ...] [--repetitions 5]
    python tests/bench/bench.py --publish    # what was measured last, as the README's record and table

Sections:
    a    the deck's loop against ours, end to end, caches cold and warm; macro F1 of both over head seeds
    six  all six deck backbones over one decoded store, and the same extrapolated to the deck's 9001 slices
    b    forward images/s against plain float32, and the share of a large matrix product
    last the last block learns: on cached activations, through the whole network, and the plain loop
    start  whole processes: `ctutils train` on cached features of 1000 slices, the plain loop, and torch alone
    t    time to a validation macro F1 of 0.80, every layer learning, EfficientNet-Lite0 with its real weights
(d, fastai and Lightning, is peers.py.) Every repetition is a process of its own and the sides take turns, so
that a ratio compares neighbours in time. CPU seconds include all children. Prints tables and writes
data/bench/bench.json. Windows counts no CPU seconds of children: compare wall seconds there.
"""

import argparse
import copy
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIX = ("vgg16", "alexnet", "resnet50", "resnet152", "densenet161", "mobilenet_v3_large")
SECTIONS = ("a", "six", "b", "last", "t", "start")
DECK_SLICES = 9001
CLOCKS = {"work_cpu": "CPU, work", "work_wall": "wall, work", "cpu": "CPU, process", "wall": "wall, process"}


# ---------------------------------------------------------------- the deck's loop, as a student writes it


def plain_loop(job: dict) -> dict:
    """PIL, torchvision transforms, a DataLoader with 2 workers, the whole network in every epoch.

    What `learned` names learns, beside the new head. Unless that is every layer BatchNorm stays in eval mode, which the
    deck forgot, so that both sides learn from the same features. It ends at the validation score `until`.
    """
    import torch
    from sklearn.metrics import f1_score
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    work = work_clock()
    torch.manual_seed(job["seed"])
    device = torch.device(job["device"])
    transform = transforms.Compose(
        [
            transforms.Resize((job["size"], job["size"])),
            transforms.ToTensor(),
            transforms.Normalize(job["mean"], job["std"]),
        ]
    )
    sets = {phase: datasets.ImageFolder(Path(job["data"]) / phase, transform) for phase in ("train", "val")}
    loaders = {
        phase: DataLoader(sets[phase], batch_size=job["batch_size"], shuffle=phase == "train", num_workers=2)
        for phase in sets
    }
    model = bare_network(job["backbone"])
    model.load_state_dict(torch.load(Path(job["weights"]) / f"{job['backbone']}.pth"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in job["learned"]
    whole = all(parameter.requires_grad for parameter in model.parameters())
    in_features = model.get_submodule(job["head"]).in_features
    model.set_submodule(job["head"], nn.Linear(in_features, len(sets["train"].classes)))
    model = model.to(device)

    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=job["lr"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    scores, best_state = [], None
    before = work()
    while len(scores) < job["epochs"] and max(scores, default=0) < job["until"]:
        for phase in ("train", "val"):
            model.train(phase == "train")
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d) and not whole:
                    module.eval()
            running_loss, y_true, y_pred = 0.0, [], []
            for images, labels in loaders[phase]:
                images, labels = images.to(device), labels.to(device)
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    logits = model(images)
                    loss = criterion(logits, labels)
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                running_loss += loss.item() * len(labels)
                y_true += labels.tolist()
                y_pred += logits.argmax(1).tolist()
            if phase == "val":
                score = f1_score(y_true, y_pred, average="macro")
                if not scores or score > max(scores):
                    best_state = copy.deepcopy(model.state_dict())
                scores.append(score)
        scheduler.step()
    model.load_state_dict(best_state)
    done = work()
    growing = {"growing": done["work_wall"] - before["work_wall"], "growing_cpu": done["work_cpu"] - before["work_cpu"]}
    return {"macro_f1": max(scores), "epochs": len(scores), **growing, **done}


class Reached(Exception):
    """The validation score that a job waits for."""


def work_clock() -> Callable[[], dict[str, float]]:
    """Return a function that says what was spent since now: work_cpu (with children) and work_wall, in seconds.

    Both sides start it after their imports, which cost the same whatever is done and hide a short run; so does the
    garbage that they leave.
    """
    gc.collect()
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    return lambda: {"work_cpu": sum(os.times()[:4]) - cpu, "work_wall": time.perf_counter() - wall}


def bare_network(name: str):
    """Return a network as its library makes it."""
    if "lite" in name:
        import timm

        return timm.create_model(f"tf_{name}")
    from torchvision import models

    return models.get_model(name)


# ---------------------------------------------------------------- ours, and the smaller jobs


def our_way(job: dict) -> dict:
    """`run_plan`, one backbone after another over one store, as `python -m ctutils train` calls it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is there
    import dataclasses

    import torchvision  # noqa: F401

    from ctutils import data, experiment, training
    from ctutils.config import PROFILES, Settings

    growing, build_store = 0.0, data.build_store  # the wall seconds of what grows with the slices
    found, scores, real, fit = {"growing_cpu": 0.0}, [], training.epoch_scores, experiment.fit

    def watched(phase, *args, **kwargs):
        row = real(phase, *args, **kwargs)
        if phase == "val" and len(scores) < job["epochs"]:
            scores.append(row["val_macro_f1"])
            if scores[-1] >= job["until"]:
                raise Reached
        return row

    def timed_fit(*args, **kwargs):
        start = work()["work_cpu"]
        result = fit(*args, **kwargs)
        found["growing_cpu"] += work()["work_cpu"] - start
        return result

    def timed_store(*args, **kwargs):
        nonlocal growing
        start = time.perf_counter()
        store = build_store(*args, **kwargs)
        growing += time.perf_counter() - start
        return store

    data.build_store, training.epoch_scores, experiment.fit = timed_store, watched, timed_fit
    if job["whole"]:  # as if there were no cut
        experiment.Plan.cached = property(lambda plan: False)
    work = work_clock()
    cache = Path(job["cache"])
    profile = dataclasses.replace(PROFILES["standard"], image_size=job["size"], batch_size=job["batch_size"])
    settings = Settings(profile, job["device"], job["weights"], Path(job["data"]), cache, cache / "runs")
    for name in job["backbones"]:
        choices = {"epochs": job["epochs"], "precision": job["precision"], "seed": job["seed"], **job["plan"]}
        plan = experiment.Plan(name, Path(job["data"]), **choices)
        try:
            run = experiment.run_plan(plan, settings, cache / "runs" / name, say=lambda line: None)
            growing += run.record["seconds"]["features"] + run.record["seconds"]["train"]
        except Reached:
            pass
    return {"macro_f1": max(scores), "epochs": len(scores), "growing": growing, **found, **work()}


def make_weights(job: dict) -> dict:
    """Write one weights file that both sides load: ImageNet's where it can be had, else random ones.

    Random networks get BatchNorm statistics of 32 slices, since without them their features hardly vary.
    """
    import torch

    from ctutils import backbones
    from ctutils.data import build_store, load_folder, make_loaders

    spec = backbones.get_spec(job["backbone"])
    model, info = backbones.build_model(spec.name, job["choice"])
    if info.kind == "random":
        torch.manual_seed(0)  # decides which slices
        folder = load_folder(job["data"], cache=Path(job["cache"]))
        store = build_store(folder, job["size"], cache=Path(job["cache"]))
        loader = make_loaders(folder, store, mean=spec.mean, std=spec.std, batch_size=32)["train"]
        backbones.adapt_batchnorm(model, [next(iter(loader))])
    path = Path(job["weights"]) / f"{spec.name}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return {"kind": info.kind}


def head_scores(job: dict) -> dict:
    """Best validation macro F1 of several head seeds, on the plain loop's features and on ours.

    The plain loop's features are the same in every epoch, so one plain pass (PIL, float32) stands for all.
    """
    import torch
    from PIL import Image
    from torch import nn
    from torchvision import transforms

    from ctutils import backbones
    from ctutils.data import build_store, feature_loaders, load_folder
    from ctutils.features import choose_precision, extract_features
    from ctutils.training import train_model

    spec, cache = backbones.get_spec(job["backbone"]), Path(job["cache"])
    folder = load_folder(job["data"], cache=cache)
    model, _ = backbones.build_model(spec.name, job["weights"])
    new = backbones.replace_head(model, spec.name, len(folder.classes))
    backbones.freeze(model, train=new)
    backbone, head = backbones.split_model(model.eval(), spec.name)
    precision = choose_precision(job["precision"], job["device"])
    store = build_store(folder, job["size"], cache=cache)
    ours = extract_features(backbone, store, spec, device=job["device"], precision=precision)
    transform = transforms.Compose(
        [
            transforms.Resize((job["size"], job["size"])),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    batches = []
    with torch.no_grad():
        for start in range(0, len(folder.slices), 16):
            paths = folder.slices["path"][start : start + 16]
            images = torch.stack([transform(Image.open(folder.root / path).convert("RGB")) for path in paths])
            batches.append(backbone.to(job["device"])(images.to(job["device"])).cpu())
    scores: dict[str, list[float]] = {"plain": [], "ours": []}
    for side, features in (("plain", torch.cat(batches)), ("ours", ours)):
        for seed in range(job["seeds"]):
            trained = copy.deepcopy(head)
            torch.manual_seed(seed)
            last = [layer for layer in trained.modules() if isinstance(layer, nn.Linear)][-1]
            last.reset_parameters()
            optimizer = torch.optim.Adam(last.parameters(), lr=0.001)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
            loaders = feature_loaders(folder, features, batch_size=job["batch_size"])
            result = train_model(
                trained, nn.CrossEntropyLoss(), optimizer, scheduler, loaders, job["epochs"], seed=seed
            )
            scores[side].append(result.best_score)
    plain = torch.cat(batches)
    return {**scores, "precision": precision, "feature_difference": float((ours - plain).norm() / plain.norm())}


def _resident_mb() -> float:
    """Return the most memory that this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before this program began
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / (1 << 10)
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset / (1 << 20)
    import resource  # of macOS: in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def forward_pass(job: dict) -> dict:
    """Images/s of one backbone: plain float32 first (the allocator untouched), then ours; and large GEMMs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ctutils import backbones, fast, features

    spec, device = backbones.get_spec(job["backbone"]), torch.device(job["device"])
    torch.manual_seed(0)
    backbone = backbones.split_model(bare_network(spec.name), spec.name)[0].eval().to(device)

    def rate(call: Callable, count: int) -> float:
        """Return `count` per second, the median over calls that fill the time given."""
        times: list[float] = []
        call()
        while sum(times) < job["seconds"] or len(times) < 3:
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return count / statistics.median(times)

    with torch.no_grad():
        images = torch.randn(job["images"], 3, job["size"], job["size"], device=device)
        with FlopCounterMode(display=False) as counter:
            backbone(images[:1])
        found = {"gflop": counter.get_total_flops() / 1e9, "threads": torch.get_num_threads()}
        found["plain_float32"] = rate(lambda: backbone(images), len(images))
        fast.reuse_large_blocks()
        images = images.contiguous(memory_format=torch.channels_last)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            ours, cast = fast.inference_copy(backbone, name, device=job["device"]), images.to(dtype)
            found[name] = rate(lambda ours=ours, cast=cast: ours(cast), len(images))
            a, b = (torch.randn(job["matrix"], job["matrix"], device=device).to(dtype) for _ in "ab")
            found[f"gemm_{name}"] = rate(lambda a=a, b=b: a @ b, 2 * job["matrix"] ** 3) / 1e9
    found["native_bfloat16"] = features.choose_precision("auto", job["device"]) == "bfloat16"
    return found


JOBS = {
    "plain": plain_loop,
    "ours": our_way,
    "forward": forward_pass,
}


# ---------------------------------------------------------------- running jobs


def measure(name: str, job: dict, *, python: str = sys.executable, script: str = __file__) -> dict:
    """Run a job in a process of its own.

    Returns:
        cpu and wall seconds (children included), peak_mb of the process, and
        what the job returned.
    Raises:
        SystemExit: the job failed; its last lines of output are shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log.txt")
        command = [python, str(script), "--job", name, json.dumps(job), str(answer)]
        environment = {**os.environ, "CT_PROGRESS": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("w") as out:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"The job {name} failed:\n" + "\n".join(log.read_text().splitlines()[-15:]))
        found = json.loads(answer.read_text())
    found |= {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall}
    return found


def run_job(arguments: list[str], jobs: dict[str, Callable]) -> None:
    """The other end of `measure`."""
    name, job, answer = arguments
    found = jobs[name](json.loads(job))
    Path(answer).write_text(json.dumps({**found, "peak_mb": _resident_mb()}))
    sys.stdout.flush()
    os._exit(0)  # Python's good-bye to torch takes more than a second, on every side alike


def middle(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Return the median and range of the ratios of neighbours."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": middle(ratios), "low": min(ratios), "high": max(ratios)}


def show_ratio(value: dict[str, float]) -> str:
    """Return e.g. `x38.2 (35.0-41.1)`."""
    span = f" ({value['low']:.1f}-{value['high']:.1f})" if value["low"] < value["high"] else ""  # one run has none
    return f"x{value['median']:.1f}{span}"


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print rows under their columns; numbers get three digits."""
    cells = [
        [f"{cell:.3g}" if isinstance(cell, float) and cell < 100 else _plain(cell) for cell in row] for row in rows
    ]
    widths = [max(len(row[k]) for row in [columns, *cells]) for k in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *cells]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()


def _plain(cell) -> str:
    return f"{cell:.0f}" if isinstance(cell, float) else str(cell)


class Bench:
    """The settings of a run and its folders; `job` makes the arguments of a job."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = options.folder / "quick" if options.quick else options.folder
        self.kinds: dict[str, str] = {}

    def data(self, train: int, val: int) -> Path:
        """Return a synthetic data set of this size, made on first use."""
        from ctutils.phantom import write_dataset

        pixels = self.options.pixels
        return write_dataset(self.folder / f"slices-{train}-{val}-{pixels}", train=train, val=val, size=pixels)

    def standard_data(self) -> Path:
        """Return the data set of all sections."""
        return self.data(self.options.train, self.options.val)

    def weights(self, name: str) -> str:
        """Return the folder with the weights file that both sides load, made on first use."""
        folder = self.folder / "weights"
        note = folder / f"{name}.json"
        if not note.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as cache:
                job = {"backbone": name, "choice": self.options.weights, "data": str(self.standard_data())}
                found = make_weights({**job, "weights": str(folder), "cache": cache, "size": self.options.size})
            note.write_text(json.dumps(found["kind"]))
        self.kinds[name] = json.loads(note.read_text())
        return str(folder)

    def job(self, name: str, **changes) -> dict:
        """Return the arguments of a job on one backbone."""
        from ctutils.registry import get_spec

        spec, options = get_spec(name), self.options
        return {
            "backbone": name,
            "backbones": [name],
            "head": spec.head,
            "mean": spec.mean,
            "std": spec.std,
            "data": str(self.standard_data()),
            "weights": self.weights(name),
            "size": options.size,
            "batch_size": options.batch_size,
            "epochs": options.epochs,
            "device": options.device,
            "precision": options.precision,
            "seed": 0,
            **{"learned": [], "lr": 0.001, "until": 2.0, "whole": False, "plan": {}},
            **changes,
        }

    def cold(self, name: str, **changes) -> dict:
        """Measure ours with empty caches."""
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            return measure("ours", self.job(name, cache=cache, **changes))

    def time_to_score(self) -> tuple[dict, dict]:
        """Return what all sides of section t are given, and what the plain ones are given beside it."""
        options = self.options
        data, until = (self.standard_data(), 0.05) if options.quick else (self.data(1000, 250), 0.80)
        plain = {"learned": learned_names("efficientnet_lite0", "all"), "lr": 0.0001, "epochs": 3 * options.epochs}
        return {"data": str(data), "until": until, "batch_size": 16}, plain


# ---------------------------------------------------------------- the sections


def section_a(bench: Bench) -> dict:
    """The deck's loop against ours, cold and warm, interleaved; then macro F1 over head seeds."""
    options, found = bench.options, {}
    real = [] if options.quick or options.chosen else ["efficientnet_lite0"]  # weights from a package, never random
    for name in dict.fromkeys([*options.backbones, *real]):
        sides: dict[str, list[dict]] = {"plain": [], "cold": [], "warm": []}
        with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
            for seed in range(options.repetitions):
                cache = str(Path(scratch, str(seed)))
                sides["plain"].append(measure("plain", bench.job(name, seed=seed)))
                for side in ("cold", "warm"):  # warm: a second run over the caches that the first one left
                    sides[side].append(measure("ours", bench.job(name, seed=seed, cache=cache)))
                print(f"  {name}, repetition {seed + 1} of {options.repetitions}", flush=True)
            scores = head_scores(bench.job(name, cache=cache, seeds=options.seeds))
        found[name] = {
            "weights": bench.kinds[name],
            "runs": sides,
            "scores": {key: scores[key] for key in ("plain", "ours", "precision", "feature_difference")},
            "ratios": {
                f"{side}_{clock}": ratio([r[clock] for r in sides["plain"]], [r[clock] for r in sides[side]])
                for side in ("cold", "warm")
                for clock in CLOCKS
            },
        }
    rows = []
    for name, result in found.items():
        for side in ("plain", "cold", "warm"):
            runs, ratios = result["runs"][side], result["ratios"]
            rows.append(
                [name, side]
                + [middle([run[clock] for run in runs]) for clock in CLOCKS]
                + [show_ratio(ratios[f"{side}_{clock}"]) if side != "plain" else "" for clock in CLOCKS]
            )
    title = (
        f"a. End to end, {options.train} + {options.val} slices, {options.epochs} epochs, seconds and ratios (median)"
    )
    print_table(title, ["backbone", "side", *CLOCKS.values(), *(f"x {text}" for text in CLOCKS.values())], rows)
    print("  work: without the start of Python and the imports, the same for both; process: with them")
    rows = []
    for name, result in found.items():
        plain, ours = result["scores"]["plain"], result["scores"]["ours"]
        loop = [run["macro_f1"] for run in result["runs"]["plain"]]
        deviation = statistics.stdev(plain) if len(plain) > 1 else float("nan")
        means = [statistics.mean(values) for values in (loop, plain, ours)]
        rows.append([name, result["weights"], result["scores"]["precision"], *means, deviation])
    columns = ["backbone", "weights", "ours in", "the loop itself", "plain features", "ours", "seed sd (plain)"]
    print_table(f"a. Best validation macro F1, mean over {options.seeds} head seeds", columns, rows)
    return found


def section_six(bench: Bench) -> dict:
    """All backbones over one store; the plain loops are those of section a where it ran, else two epochs of them.

    Every epoch of the plain loop does the same work, so two epochs stand for ten: their seconds are multiplied.
    """
    options = bench.options
    names = options.backbones if options.quick else list(SIX)
    slices = options.train + options.val
    plain = {}
    for name in names:
        known = bench.results.get("a", {}).get(name)
        if known:
            plain[name] = known["runs"]["plain"]
        else:
            few = min(2, options.epochs)
            run = measure("plain", bench.job(name, epochs=few))
            for clock in CLOCKS:
                run[clock] += run["growing_cpu" if "cpu" in clock else "growing"] * (options.epochs / few - 1)
            run["growing"] *= options.epochs / few
            plain[name] = [run]
        print(f"  plain loop of {name}: {middle([run['wall'] for run in plain[name]]):.0f} s", flush=True)
    ours = bench.cold(names[0], backbones=[name for name in names if bench.weights(name)])
    total = {clock: sum(middle([run[clock] for run in runs]) for runs in plain.values()) for clock in CLOCKS}
    more = DECK_SLICES / slices - 1  # the store, the passes and the heads grow with the slices; the rest does not
    deck = {
        "plain": sum(middle([run["wall"] + run["growing"] * more for run in runs]) for runs in plain.values()),
        "ours": ours["wall"] + ours["growing"] * more,
    }
    found = {"backbones": names, "plain": plain, "ours": ours, "extrapolated_seconds": deck}
    found["ratios"] = {clock: total[clock] / ours[clock] for clock in CLOCKS}
    rows = [
        ["plain loops", *total.values(), deck["plain"] / 60],
        ["ours, cold", *(ours[clock] for clock in CLOCKS), deck["ours"] / 60],
        ["ratio", *(f"x{value:.1f}" for value in found["ratios"].values()), f"x{deck['plain'] / deck['ours']:.1f}"],
    ]
    title = f"six. {len(names)} backbone(s) over one store, {slices} slices, {options.epochs} epochs, seconds"
    print_table(title, ["", *CLOCKS.values(), f"minutes at {DECK_SLICES} slices (extrapolated)"], rows)
    return found


def section_b(bench: Bench) -> dict:
    """Forward images/s, and the share of what a large matrix product reaches at the same moment."""
    options, found, rows = bench.options, {}, []
    for name in options.backbones if options.quick or options.chosen else [*SIX, "efficientnet_lite0"]:
        job = {"backbone": name, "device": options.device, "size": options.size, "images": 16}
        job |= {"seconds": 0.2 if options.quick else 3.0, "matrix": 512 if options.quick else 3072}
        runs = [measure("forward", job) for _ in range(options.repetitions)]
        values = {key: middle([run[key] for run in runs]) for key in runs[0] if isinstance(runs[0][key], float)}
        row, found[name] = [name, values["gflop"], values["plain_float32"]], {"runs": runs, "median": values}
        for precision in ("float32", "bfloat16"):
            share = values[precision] * values["gflop"] / values[f"gemm_{precision}"]
            against = ratio([run[precision] for run in runs], [run["plain_float32"] for run in runs])
            found[name][precision] = {"share": share, "against_plain": against}
            row += [values[precision], show_ratio(against), f"{share:.0%}"]
        rows.append(row)
    columns = ["backbone", "GFLOP/image", "plain float32"]
    columns += ["ours float32", "against plain", "of matmul", "ours bfloat16", "against plain", "of matmul"]
    print_table("b. Forward, images/s, batch 16", columns, rows)
    return found


def extended(run: dict, epochs: int) -> dict:
    """Return a run of few epochs as if it had made more: each does the same work."""
    return run | {"work_cpu": run["work_cpu"] + run["growing_cpu"] * (epochs / run["epochs"] - 1), "epochs": epochs}


def learned_names(name: str, part: str) -> list[str]:
    """Return the parameters that learn when the last block, or all layers, do."""
    import torch

    from ctutils import backbones

    with torch.device("meta"):
        model = bare_network(name)
    last = backbones.split_model(model, name, backbones.get_spec(name).last_block)[1]
    norms = {id(p) for m in model.modules() if isinstance(m, backbones.BatchNorm) for p in m.parameters()}
    block = {id(p) for p in last.parameters()} - norms  # BatchNorm frozen, on all sides
    return [key for key, p in model.named_parameters() if part == "all" or id(p) in block]


def section_last(bench: Bench) -> dict:
    """The last block learns, BatchNorm frozen; loops through the whole network are measured over two epochs."""
    options, found, rows = bench.options, {}, []
    data = str(bench.standard_data() if options.quick else bench.data(1000, 250))
    plan = {"unfreeze": "last", "bn": "frozen", "lr": 0.0001, "scheduler": "step"}
    for name in options.backbones if options.quick or options.chosen else ["resnet50", "efficientnet_lite0"]:
        few, sides = min(2, options.epochs), {"plain loop": [], "whole network": [], "cached": []}
        given = {"data": data, "lr": 0.0001, "learned": learned_names(name, "last")}
        for seed in range(options.repetitions):
            short = {**given, "seed": seed, "epochs": few}
            sides["plain loop"].append(extended(measure("plain", bench.job(name, **short)), options.epochs))
            sides["whole network"].append(extended(bench.cold(name, whole=True, plan=plan, **short), options.epochs))
            sides["cached"].append(bench.cold(name, plan=plan, **{**given, "seed": seed}))
        cpu = {side: [run["work_cpu"] for run in runs] for side, runs in sides.items()}
        ratios = {side: ratio(cpu[side], cpu["cached"]) for side in ("plain loop", "whole network")}
        found[name] = {"runs": sides, "ratios": ratios}
        rows.append([name, *(middle(values) for values in cpu.values()), *map(show_ratio, ratios.values())])
    columns = ["backbone", "plain loop", "whole network", "cached", "plain / cached", "whole / cached"]
    print_table(f"last. The last block, {options.epochs} epochs, CPU seconds of work", columns, rows)
    return found


TO_SCORE = ("work_cpu", "work_wall", "epochs", "macro_f1")
TO_SCORE_COLUMNS = ["side", "CPU", "wall", "epochs", "macro F1"]


def section_t(bench: Bench) -> dict:
    """CPU and wall seconds until validation macro F1 is 0.80; the plain loop trains all layers with Adam 1e-4."""
    options, name, rows = bench.options, "efficientnet_lite0", []
    (given, plain), sides = bench.time_to_score(), {"plain loop": [], "ours": []}
    for seed in range(options.repetitions):
        sides["plain loop"].append(measure("plain", bench.job(name, **given, **plain, seed=seed)))
        sides["ours"].append(bench.cold(name, plan={"unfreeze": "all"}, **given, seed=seed))
    for side, runs in sides.items():
        rows.append([side, *(middle([float(run[key]) for run in runs]) for key in TO_SCORE)])
    print_table(f"t. Time to {given['until']:.2f}, seconds of work", TO_SCORE_COLUMNS, rows)
    ratios = {key: ratio(*([run[key] for run in runs] for runs in sides.values())) for key in ("work_cpu", "work_wall")}
    return {"until": given["until"], "runs": sides, "ratios": ratios}


def section_start(bench: Bench) -> dict:
    """Whole processes, start and end included: a head on cached features, the plain loop, and torch's share of it."""
    options, name = bench.options, bench.options.backbones[0]
    train, val = (options.train, options.val) if options.quick else (800, 200)
    data = bench.data(train, val)
    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        train_it = ["-m", "ctutils", "train", str(data), "--backbone", name, "--weights", bench.weights(name)]
        train_it += ["--batch-size", str(options.batch_size), "--size", str(options.size), "--out", f"{out}/run"]
        step = "import torch; torch.optim.Adam(torch.nn.Linear(1, 1).parameters()).step()"
        commands = {"ours": train_it, "torch": ["-c", f"{step}; import os; os._exit(0)"]}
        process(train_it)  # leaves the caches
        found = {side: [process(some) for _ in range(options.repetitions)] for side, some in commands.items()}
    few = min(1, options.epochs)
    run = measure("plain", bench.job(name, data=str(data), epochs=few))
    found["plain"] = [{"cpu": run["cpu"] + run["growing_cpu"] * (options.epochs / few - 1)}]
    rows = [[side, middle([run["cpu"] for run in runs])] for side, runs in found.items()]
    print_table(f"start. Whole processes, {name}, {train + val} slices, 10 epochs", ["process", "CPU s"], rows)
    return found | {"slices": train + val, "backbone": name}


def process(arguments: list[str]) -> dict:
    """Run Python as a shell does, and return its CPU seconds."""
    running = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return {"cpu": usage.ru_utime + usage.ru_stime}


# ---------------------------------------------------------------- the machine


def describe_machine() -> dict:
    """Return what a reader needs to judge the figures."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


SPEED_BEGIN = "<!-- speed: written by `python tests/bench/bench.py --publish` from data/reference_runs/bench.json -->"
SPEED_END = "<!-- /speed -->"


def speed_markdown(found: dict) -> str:
    """Return the README's table of a bench's results, with `peers` in them where those were measured."""
    machine, settings, six = found["machine"], found["settings"], found["six"]

    def seconds(runs: list[dict]) -> float:
        return middle([run["work_cpu"] for run in runs])

    rows = [
        (
            f"{settings['train']} + {settings['val']} slices, {settings['epochs']} epochs, CPU seconds",
            "the deck's way",
            "ours, nothing cached",
            "ours, all cached",
        ),
        ("---",) * 4,
    ]
    for name, result in found["a"].items():
        ours = [
            f"{seconds(result['runs'][side]):.1f}, {show_ratio(result['ratios'][f'{side}_work_cpu'])}"
            for side in ("cold", "warm")
        ]
        rows.append((name, f"{seconds(result['runs']['plain']):.0f}", *ours))
        whole = {side: middle([run["cpu"] for run in runs]) for side, runs in result["runs"].items()}
        ours = [f"{whole[side]:.1f}, {show_ratio(result['ratios'][f'{side}_cpu'])}" for side in ("cold", "warm")]
        rows.append((f"{name}, with imports", f"{whole['plain']:.0f}", *ours))
    peers = found.get("peers", {})
    for name, result in peers.get("d", {}).items():
        for peer in ("fastai", "lightning"):
            ratios = [show_ratio(result["ratios"][f"{peer} / ours, {side}"]) for side in ("cold", "warm")]
            rows.append((f"{name}, written in {peer}", f"{seconds(result['runs'][peer]):.0f}", *ratios))
    for name, result in found.get("last", {}).items():
        plain, ours = (seconds(result["runs"][side]) for side in ("plain loop", "cached"))
        over = show_ratio(result["ratios"]["plain loop"])
        rows.append((f"{name}, the last block learns, 1000 + 250 slices", f"{plain:.0f}", f"{ours:.0f}, {over}", ""))
    if "t" in found:
        goal = (
            f"efficientnet_lite0, all layers, until validation macro F1 is {found['t']['until']:.2f}, 1000 + 250 slices"
        )
        plain, ours = (seconds(found["t"]["runs"][side]) for side in ("plain loop", "ours"))
        rows.append((goal, f"{plain:.0f}", f"{ours:.0f}, {show_ratio(found['t']['ratios']['work_cpu'])}", ""))
    for peer, over in peers.get("t", {}).get("ratios", {}).items():
        spent = f"{seconds(peers['t']['runs'][peer]):.0f}"
        rows.append((f"the same, written in {peer}", spent, show_ratio(over), ""))
    plain, ours = sum(seconds(runs) for runs in six["plain"].values()), six["ours"]["work_cpu"]
    rows.append(
        (
            "the deck's six, once; the other plain loops from 2 epochs",
            f"{plain:.0f}",
            f"{ours:.1f}, x{plain / ours:.1f}",
            "",
        )
    )
    deck = six["extrapolated_seconds"]
    what = f"the deck's six, {DECK_SLICES} slices, wall time, extrapolated"
    rows.append((what, f"{deck['plain'] / 3600:.1f} h", f"{deck['ours'] / 60:.0f} min", ""))
    where = machine["gpu"] or f"{machine['cores']} cores of a shared {machine['cpu']}"
    others = {len(runs) for result in peers.get("d", {}).values() for runs in result["runs"].values()}
    counts = " or ".join(map(str, sorted(others)))
    times = f"{settings['repetitions']} repetitions" + (f" (other libraries: {counts})" if others else "")
    every = [run for result in found["a"].values() for runs in result["runs"].values() for run in runs]
    imports = [run["cpu"] - run["work_cpu"] for run in every]
    text = (
        f"Synthetic slices of {settings['pixels']} pixels; median (range) of {times} on {where}, torch "
        f"{machine['torch']}. Imports, {min(imports):.0f} to {max(imports):.0f} s on either side, are left out but for "
        f"the rows that say so.{start_markdown(found.get('start'))}"
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", text])


def start_markdown(found: dict | None) -> str:
    """Return the sentence on start-up, where it was measured."""
    if not found:
        return ""
    ours, plain, alone = (middle([run["cpu"] for run in found[side]]) for side in ("ours", "plain", "torch"))
    return (
        f" `ctutils train` on cached features of {found['slices']} slices of {found['backbone']}, the whole process: "
        f"{ours:.1f} s CPU, of which torch takes for one optimizer step {alone:.1f}; the plain loop: {plain:.0f}."
    )


def publish(folder: Path) -> None:
    """Copy what was measured last, without this machine's folders, to data/reference_runs and into the README."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    from run_notebooks import replace_between

    found = json.loads((folder / "bench.json").read_text())
    del found["settings"]["folder"]
    if (folder / "peers.json").exists():
        found["peers"] = json.loads((folder / "peers.json").read_text())
        del found["peers"]["machine"]
    (ROOT / "data" / "reference_runs" / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    replace_between(ROOT / "README.md", SPEED_BEGIN, SPEED_END, speed_markdown(found))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options; `--quick` makes everything tiny unless said otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it works")
    parser.add_argument("--publish", action="store_true", help="measure nothing; renew the README from bench.json")
    parser.add_argument(
        "--backbones", nargs="+", help="default: mobilenet_v3_large resnet50 (a: a third; b: all seven)"
    )
    parser.add_argument("--repetitions", type=int, help="default 5")
    parser.add_argument("--seeds", type=int, help="head seeds of the macro F1 comparison (default 8)")
    parser.add_argument("--train", type=int, help="training slices (default 200)")
    parser.add_argument("--val", type=int, help="validation slices (default 50)")
    parser.add_argument("--pixels", type=int, help="side of a slice (default 512)")
    parser.add_argument("--size", type=int, help="side at the network's input (default 224)")
    parser.add_argument("--epochs", type=int, help="default 10")
    parser.add_argument("--batch-size", type=int, default=32, help="of training (default 32)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", default="auto", help="auto (default), float32 or bfloat16")
    parser.add_argument("--weights", default="auto", help="auto (ImageNet if it can be had) or random")
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "bench", help="where everything is kept")
    options = parser.parse_args(arguments)
    options.chosen = bool(options.backbones)
    quick = {"repetitions": 1, "seeds": 2, "train": 16, "val": 48, "pixels": 128, "size": 64, "epochs": 2}
    usual = {"repetitions": 5, "seeds": 8, "train": 200, "val": 50, "pixels": 512, "size": 224, "epochs": 10}
    for name, value in (quick if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.backbones = options.backbones or ["mobilenet_v3_large", "resnet50"][: 1 if options.quick else 2]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the sections and write bench.json after each of them."""
    options = parse(arguments)
    if options.publish:
        publish(options.folder)
        return 0
    bench = Bench(options)
    bench.folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    print(" | ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    if machine["load_average"] > 0.5:
        print("Other work shares this machine: trust CPU ratios more than wall ratios, and neither to the last digit.")
    os.environ["CT_PROGRESS"] = "0"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    bench.results = {"machine": machine, "settings": settings}
    start = time.perf_counter()
    for section in SECTIONS:
        if section in options.only:
            bench.results[section] = globals()[f"section_{section}"](bench)
            (bench.folder / "bench.json").write_text(json.dumps(bench.results, indent=1) + "\n")
    print(f"\nWrote {bench.folder / 'bench.json'} after {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        run_job(sys.argv[2:], JOBS)
    else:
        sys.exit(main())
