"""A run's network as one file that other programs run: grey slices of any size in, probabilities out."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ctutils.base import CTError, atomic_path
from ctutils.people.predict import temperature
from ctutils.registry import get_spec
from ctutils.runs import Run

TOLERANCE = 1e-4  # between the exported file and the network it came from
SHAPES = ((1, 512, 512), (2, 300, 417))  # slices that the file is checked with


class Exported(nn.Module):
    """The network of a run with its preprocessing: grey uint8 (B, 1, H, W) -> probabilities float32 (B, C).

    The resize is Pillow's bilinear one with antialias, as `pictures.resize` does it: whole numbers (in float64, which
    holds them exactly, so that other programs round alike), weights of `BITS` bits, rounded after each direction.
    Source: Pillow's Resample.c.
    """

    BITS = 22

    def __init__(self, model: nn.Module, size: int, mean, std):
        super().__init__()
        self.body, self.size = nn.Sequential(model.backbone, model.head), size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, slices: Tensor) -> Tensor:
        grey = slices.double()
        grey = torch.floor(grey @ self._weights(slices.shape[3]).T / 2**self.BITS + 0.5)  # along the rows first
        grey = torch.floor(self._weights(slices.shape[2]) @ grey / 2**self.BITS + 0.5)
        return torch.softmax(self.body((grey.float() / 255 - self.mean) / self.std), 1)

    def _weights(self, length: int) -> Tensor:
        """Return how much each of `length` pixels gives to each of `size`, (size, length); rows sum to 2**BITS."""
        scale = torch.ones(1, dtype=torch.float64) * length / self.size
        centre = (torch.arange(self.size, dtype=torch.float64) + 0.5) * scale
        far = (torch.arange(length, dtype=torch.float64)[None] + 0.5 - centre[:, None]).abs() / scale.clamp(min=1)
        weights = (1 - far).clamp(min=0)
        return torch.floor(weights / weights.sum(1, keepdim=True) * 2**self.BITS + 0.5)


def export_run(run: Run, out: str | Path, weights: str = "auto") -> dict:
    """Write a run's network as ONNX (`.onnx`) or as a `torch.export` program (`.pt2`), and check the written file.

    Args:
        run: a record with its weights.
        out: the file; its suffix says the format.
        weights: where the backbone's weights are, as for `build_model`.
    Returns:
        file, bytes, and difference: the largest between a probability of the file and of the network.
    Raises:
        CTError: another suffix; packages that are not installed; a file that gives other numbers.
    """
    from ctutils.backbones import restore_model

    out, spec = Path(out), get_spec(run.plan.backbone)
    if out.suffix not in (".onnx", ".pt2"):
        raise CTError(f"'{out.name}'", "a name that ends in .onnx or .pt2", "choose one of the two")
    if out.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            mend = "pip install 'chest-ct-course[export]', or export to .pt2, which needs nothing"
            raise CTError(f"no package {error.name}", "onnx, onnxscript and onnxruntime", mend) from error
    model = Exported(restore_model(run, weights), run.plan.size, spec.mean, spec.std).eval()
    auto = torch.export.Dim.AUTO
    example = torch.zeros(2, 1, 300, 417, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    about = {key: json.dumps(value, ensure_ascii=False) for key, value in describe(run).items()}
    with atomic_path(out) as temporary:
        if out.suffix == ".onnx":
            _write_onnx(program, temporary, about)
        else:
            torch.export.save(program, temporary, extra_files={"about.json": json.dumps(describe(run))})
        difference = _difference(model, temporary)
        if not difference <= TOLERANCE:
            found = f"probabilities that differ by {difference:.2g} from the network's"
            raise CTError(found, f"at most {TOLERANCE:g}", "use other versions of torch and onnxruntime")
    return {"file": str(out), "bytes": out.stat().st_size, "difference": difference}


def describe(run: Run) -> dict:
    """Return what stands in the file's metadata."""
    return {
        "classes": list(run.classes),
        "window": run.record["data"]["window"],
        "depth": run.record["data"].get("depth", ""),
        "input": "slices: grey uint8 (B, 1, H, W) of any size, HU mapped to 0-255 in the window",
        "output": "probabilities float32 (B, C), in the order of classes",
        "temperature": temperature(run),
        "backbone": run.plan.backbone,
        "run": run.name,
        "data": {key: run.record["data"][key] for key in ("name", "kind", "fingerprint")},
        "use": "Not for clinical use.",
    }


def _write_onnx(program, path: Path, about: dict[str, str]) -> None:
    import onnx

    names = {"input_names": ["slices"], "output_names": ["probabilities"]}
    written = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False, **names)
    proto = written.model_proto
    onnx.helper.set_model_props(proto, about)
    onnx.save(proto, path)


def _difference(model: Exported, path: Path) -> float:
    """Return how far a written file's probabilities are from the network's, on pictures of several shapes."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(slices: Tensor) -> np.ndarray:
            return session.run(None, {"slices": slices.numpy()})[0]
    else:
        module = torch.export.load(path).module()

        def run(slices: Tensor) -> np.ndarray:
            return module(slices).detach().numpy()

    generator, worst = torch.Generator().manual_seed(0), 0.0
    for count, height, width in SHAPES:
        coarse = torch.rand(count, 1, 12, 12, generator=generator)  # smooth, as slices are
        slices = nn.functional.interpolate(coarse, (height, width), mode="bicubic").mul(255).clamp(0, 255)
        slices = slices.to(torch.uint8)
        with torch.no_grad():
            worst = max(worst, float(np.abs(model(slices).numpy() - run(slices)).max()))
    return worst
