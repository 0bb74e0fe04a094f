"""Measure fastai and Lightning on the same work as bench.py's section a, against ours: `make bench-peers`.

    python tests/bench/peers.py [--only fastai lightning] [the options of bench.py]

Both libraries go into an environment of their own, data/bench/peers-venv, which borrows torch and everything
else from the one that runs this script, so that all sides compute with the same torch. The protocol is equal:
the same weights file, only the new head trained, BatchNorm in eval mode, Adam, batches of 32, StepLR, and 2
loader workers. Optional: without a package index it says so and stops. Prints a table and writes
data/bench/peers.json.
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


def frozen_network(job: dict):
    """Return the network with its weights, frozen but for a new 5-way head."""
    import torch
    from torch import nn

    torch.manual_seed(job["seed"])
    model = bench.bare_network(job["backbone"])
    model.load_state_dict(torch.load(Path(job["weights"]) / f"{job['backbone']}.pth"))
    model.requires_grad_(False)
    in_features = model.get_submodule(job["head"]).in_features
    model.set_submodule(job["head"], nn.Linear(in_features, job["classes"]))
    return model


def fastai_way(job: dict) -> dict:
    """A Learner over ImageDataLoaders, as fastai's own tutorial writes it; BnFreeze keeps BatchNorm in eval mode."""
    from fastai.callback.core import Callback
    from fastai.callback.training import BnFreeze
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import F1Score
    from fastai.optimizer import Adam
    from fastai.vision.augment import Resize, ResizeMethod
    from fastai.vision.data import ImageDataLoaders, Normalize

    class StepDown(Callback):
        """The deck's StepLR(step_size=7, gamma=0.1)."""

        def before_epoch(self):
            self.opt.set_hyper("lr", 0.001 * 0.1 ** (self.epoch // 7))

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
    learner = Learner(
        loaders,
        frozen_network(job),
        loss_func=CrossEntropyLossFlat(),
        opt_func=Adam,
        metrics=F1Score(average="macro"),
        cbs=[BnFreeze(), StepDown()],
        train_bn=False,
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(job["epochs"], lr=0.001)
    return {"macro_f1": max(float(row[2]) for row in learner.recorder.values), **work()}


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
            self.model, self.scores, self.seen = frozen_network(job), [], []

        def on_train_epoch_start(self):
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
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

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.model.get_submodule(job["head"]).parameters(), lr=0.001)
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
    return {"macro_f1": max(classifier.scores), **work()}


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


def main(arguments: list[str]) -> int:
    """Run the peers and ours in turns and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS), help="peers (default: both)")
    own, rest = parser.parse_known_args(arguments)
    options = bench.parse(rest)
    runner = bench.Bench(options)
    runner.folder.mkdir(parents=True, exist_ok=True)
    python = peers_python(options.folder, own.only)
    machine = bench.describe_machine()
    print(" | ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    classes = sum(path.is_dir() for path in (runner.standard_data() / "train").iterdir())
    found, rows = {"machine": machine}, []
    for name in options.backbones:
        sides: dict[str, list[dict]] = {side: [] for side in (*own.only, "ours, cold", "ours, warm")}
        for seed in range(options.repetitions):
            job = runner.job(name, seed=seed, classes=classes)
            for peer in own.only:
                sides[peer].append(bench.measure(peer, job, python=python, script=__file__))
            with tempfile.TemporaryDirectory(dir=runner.folder) as cache:
                for side in ("ours, cold", "ours, warm"):
                    sides[side].append(bench.measure("ours", {**job, "cache": cache}))
            print(f"  {name}, repetition {seed + 1} of {options.repetitions}", flush=True)
        ratios = {
            f"{peer} / {side}": bench.ratio([r["work_cpu"] for r in sides[peer]], [r["work_cpu"] for r in sides[side]])
            for peer in own.only
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
    (runner.folder / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nWrote {runner.folder / 'peers.json'}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        bench.run_job(sys.argv[2:], JOBS)
    else:
        sys.exit(main(sys.argv[1:]))
