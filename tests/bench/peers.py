"""Measure fastai and Lightning on the same work as bench.py's sections a (here: d) and t: `make bench-peers`.

    python tests/bench/peers.py [--only fastai lightning] [--sections d t] [the options of bench.py]

Both libraries go into an environment of their own, data/bench/peers-venv, which borrows torch and everything
else from the one that runs this script, so that all sides compute with the same torch. The protocol is equal:
the same weights file, only the new head trained, BatchNorm in eval mode, Adam, batches of 32, StepLR, and 2
loader workers. In section t every layer learns until validation macro F1 is 0.80: fastai by its `fine_tune` with
its own rate, Lightning as the plain loop. Optional: without a package index it says so and stops. Prints tables and
writes data/bench/peers.json.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import bench

PEERS = {"fastai": "fastai>=2.8", "lightning": "lightning>=2.5"}


def new_network(job: dict):
    """Return the network with its weights and a new 5-way head, beside which what `learned` names learns."""
    import torch
    from torch import nn

    torch.manual_seed(job["seed"])
    model = bench.bare_network(job["backbone"])
    model.load_state_dict(torch.load(Path(job["weights"]) / f"{job['backbone']}.pth"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in job["learned"]
    in_features = model.get_submodule(job["head"]).in_features
    model.set_submodule(job["head"], nn.Linear(in_features, job["classes"]))
    return model


def fastai_way(job: dict) -> dict:
    """A Learner over ImageDataLoaders, as fastai's own tutorial writes it; BnFreeze keeps BatchNorm in eval mode."""
    from fastai.callback import schedule  # noqa: F401  (gives a Learner its fine_tune)
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.training import BnFreeze
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import F1Score
    from fastai.optimizer import Adam
    from fastai.torch_core import params
    from fastai.vision.augment import Resize, ResizeMethod
    from fastai.vision.data import ImageDataLoaders, Normalize

    class StepDown(Callback):
        """The deck's StepLR(step_size=7, gamma=0.1)."""

        def before_epoch(self):
            self.opt.set_hyper("lr", 0.001 * 0.1 ** (self.epoch // 7))

    class StopAt(Callback):
        """End when the score is reached; `fine_tune` fits twice, first the head."""

        order, scores = 100, []  # after the Recorder, which writes the score down

        def after_epoch(self):
            self.scores.append(float(self.recorder.values[-1][2]))
            if self.scores[-1] >= job["until"]:
                raise CancelFitException

    def groups(model):
        head = params(model.get_submodule(job["head"]))
        return [[p for p in params(model) if all(p is not q for q in head)], head]

    work = bench.work_clock()
    loaders = ImageDataLoaders.from_folder(
        Path(job["data"]),
        train="train",
        valid="val",
        item_tfms=Resize(job["size"], method=ResizeMethod.Squish),
        batch_tfms=Normalize.from_stats(job["mean"], job["std"], cuda=job["device"] != "cpu"),
        bs=job["batch_size"],
        num_workers=2,
        device=job["device"],
    )
    loaders.train.drop_last = False  # every slice in every epoch, as on the other sides
    given = {"loss_func": CrossEntropyLossFlat(), "opt_func": Adam, "metrics": F1Score(average="macro")}
    if job["learned"]:
        learner = Learner(loaders, new_network(job), splitter=groups, cbs=StopAt(), **given)
    else:
        learner = Learner(loaders, new_network(job), cbs=[BnFreeze(), StepDown(), StopAt()], train_bn=False, **given)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(job["epochs"]) if job["learned"] else learner.fit(job["epochs"], lr=0.001)
    return {"macro_f1": max(StopAt.scores), "epochs": len(StopAt.scores), **work()}


def lightning_way(job: dict) -> dict:
    """A LightningModule and a Trainer over the DataLoaders of the plain loop."""
    import lightning
    import torch
    from sklearn.metrics import f1_score
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.scores, self.seen = new_network(job), [], []

        def on_train_epoch_start(self):
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d) and not job["learned"]:
                    module.eval()

        def training_step(self, batch, _):
            images, labels = batch
            return nn.functional.cross_entropy(self.model(images), labels)

        def validation_step(self, batch, _):
            images, labels = batch
            self.seen.append((labels.cpu(), self.model(images).argmax(1).cpu()))

        def on_validation_epoch_end(self):
            y_true, y_pred = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
            self.scores.append(float(f1_score(y_true, y_pred, average="macro")))
            self.seen.clear()
            self.trainer.should_stop = self.scores[-1] >= job["until"]

        def configure_optimizers(self):
            learns = [p for p in self.model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(learns, lr=job["lr"])
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)]

    work = bench.work_clock()
    side = (job["size"], job["size"])
    transform = transforms.Compose(
        [transforms.Resize(side), transforms.ToTensor(), transforms.Normalize(job["mean"], job["std"])]
    )
    loaders = [
        DataLoader(
            datasets.ImageFolder(Path(job["data"]) / phase, transform),
            batch_size=job["batch_size"],
            shuffle=phase == "train",
            num_workers=2,
        )
        for phase in ("train", "val")
    ]
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=job["epochs"],
        accelerator="cpu" if job["device"] == "cpu" else "gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(classifier, *loaders)
    return {"macro_f1": max(classifier.scores), "epochs": len(classifier.scores), **work()}


JOBS = {"fastai": fastai_way, "lightning": lightning_way}


def peers_python(folder: Path, names: list[str]) -> str:
    """Return the Python of the peers' environment, made and filled on first use.

    Raises:
        SystemExit: the libraries cannot be installed.
    """
    home = folder / "peers-venv"
    python = home / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True, text=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        for name in names:
            if subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode:
                print(f"Installing {name} into {home}", flush=True)
                command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PEERS[name]]
                subprocess.run(command, check=True, capture_output=True, text=True)
                subprocess.run([python, "-c", f"import {name}"], check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        output = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise SystemExit(
            f"Found no way to install {', '.join(names)} ({output[-1] if output else error}).\n"
            "Expected a package index within reach of pip; the peers are optional, `make bench` needs none.\n"
            f'To mend: connect to the network and run this again, or remove "{home}" if it is half made.'
        ) from error
    return str(python)


def section_d(runner: bench.Bench, peers: list[str], python: str) -> dict:
    """Section a's work, in turns; returns {backbone: weights, runs, ratios}."""
    options, found, rows = runner.options, {}, []
    for name in options.backbones:
        sides: dict[str, list[dict]] = {side: [] for side in (*peers, "ours, cold", "ours, warm")}
        for seed in range(options.repetitions):
            job = runner.job(name, seed=seed, classes=5)
            for peer in peers:
                sides[peer].append(bench.measure(peer, job, python=python, script=__file__))
            with tempfile.TemporaryDirectory(dir=runner.folder) as cache:
                for side in ("ours, cold", "ours, warm"):
                    sides[side].append(bench.measure("ours", {**job, "cache": cache}))
            print(f"  {name}, repetition {seed + 1} of {options.repetitions}", flush=True)
        ratios = {
            f"{peer} / {side}": bench.ratio([r["work_cpu"] for r in sides[peer]], [r["work_cpu"] for r in sides[side]])
            for peer in peers
            for side in ("ours, cold", "ours, warm")
        }
        found[name] = {"weights": runner.kinds[name], "runs": sides, "ratios": ratios}
        for side, runs in sides.items():
            times = [bench.middle([run[clock] for run in runs]) for clock in bench.CLOCKS]
            over = [bench.show_ratio(ratios[f"{side} / {o}"]) if side in PEERS else "" for o in list(sides)[-2:]]
            score = f"{bench.middle([run['macro_f1'] for run in runs]):.3f}" if side in PEERS else ""
            rows.append([name, side, *times, *over, score])
    columns = ["backbone", "side", *bench.CLOCKS.values(), "x cold (CPU, work)", "x warm (CPU, work)", "macro F1"]
    title = f"d. {options.train} + {options.val} slices, {options.epochs} epochs, seconds and ratios (median)"
    bench.print_table(title, columns, rows)
    return found


def section_t(runner: bench.Bench, peers: list[str], python: str) -> dict:
    """Time to a validation macro F1, every layer learning, in turns with ours."""
    options, name, rows = runner.options, "efficientnet_lite0", []
    given, plain = runner.time_to_score()
    sides: dict[str, list[dict]] = {side: [] for side in (*peers, "ours")}
    for seed in range(options.repetitions):
        for peer in peers:
            epochs = {"epochs": options.epochs} if peer == "fastai" else {}
            job = runner.job(name, **{**given, **plain, **epochs}, seed=seed, classes=5)
            sides[peer].append(bench.measure(peer, job, python=python, script=__file__))
        sides["ours"].append(runner.cold(name, plan={"unfreeze": "all"}, **given, seed=seed))
    for side, runs in sides.items():
        rows.append([side, *(bench.middle([float(run[key]) for run in runs]) for key in bench.TO_SCORE)])
    bench.print_table(f"t. Time to {given['until']:.2f}, seconds of work", bench.TO_SCORE_COLUMNS, rows)
    ours = [run["work_cpu"] for run in sides["ours"]]
    ratios = {peer: bench.ratio([run["work_cpu"] for run in sides[peer]], ours) for peer in peers}
    return {"until": given["until"], "runs": sides, "ratios": ratios}


SECTIONS = {"d": section_d, "t": section_t}


def main(arguments: list[str]) -> int:
    """Run the peers and ours in turns and print a table per section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS), help="peers (default: both)")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: both")
    own, rest = parser.parse_known_args(arguments)
    options = bench.parse(rest)
    runner = bench.Bench(options)
    runner.folder.mkdir(parents=True, exist_ok=True)
    python = peers_python(options.folder, own.only)
    found = {"machine": bench.describe_machine()}
    print(" | ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None))
    for section in own.sections:
        found[section] = SECTIONS[section](runner, own.only, python)
        (runner.folder / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nWrote {runner.folder / 'peers.json'}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        bench.run_job(sys.argv[2:], JOBS)
    else:
        sys.exit(main(sys.argv[1:]))
