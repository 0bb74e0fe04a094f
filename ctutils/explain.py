"""What a model looks at, and where it is most wrong: Grad-CAM, heat in a box, the worst slices."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, functional

from ctutils.base import CTError
from ctutils.registry import BACKBONES


def most_wrong(y_true: np.ndarray, y_score: np.ndarray, n: int = 10) -> np.ndarray:
    """Return the rows of the most confident errors, the worst first: int64 (M,), M <= n.

    Args: y_true int (N,) in [0, C), y_score float (N, C), one probability a class.
    """
    rows = np.flatnonzero(y_score.argmax(axis=1) != y_true)
    return rows[np.argsort(-y_score[rows].max(axis=1), kind="stable")][:n]


def grad_cam(model: Module, images: Tensor, target: int | Tensor | None = None, *, layer: str | Module) -> np.ndarray:
    """Return a heat map for each image: which places speak for the class `target`.

    The maps of a late layer, each weighted by the mean gradient of the class's logit, are added up; what
    speaks against the class is cut off at zero. Only what follows the layer is differentiated, so a wholly
    frozen network works too. Modes, `requires_grad` and hooks of the model are as before afterwards.

    Args:
        model: maps images to logits (B, C): a whole network, or its two parts named `backbone` and `head`.
        images: float32 (B, 3, H, W), normalised.
        target: a class, one class an image (B,), or None for the class that the model predicts.
        layer: a backbone's name (then its `cam_layer`), a dotted path, in either part too, or the layer itself.
    Returns:
        float32 (B, H, W) in [0, 1], the greatest value of each map 1; all zero where nothing speaks for it.
    Raises:
        CTError: no such layer, a layer without height and width, or one that the model does not pass through.
    Source: Selvaraju et al. 2017, Grad-CAM, https://arxiv.org/abs/1610.02391
    """
    layer = layer if isinstance(layer, Module) else _find_layer(model, layer)
    maps = []

    def start_here(_layer, _inputs, output):  # gradients from here on only, which needs no trainable parameter
        torch.set_grad_enabled(True)
        maps.append(output.detach().requires_grad_(True))
        return maps[-1].clone()  # an in-place ReLU that may follow must not overwrite what is kept

    modes = [(part, part.training) for part in model.modules()]
    try:
        with layer.register_forward_hook(start_here), torch.inference_mode(False), torch.no_grad():  # until the hook
            logits = model.eval()(images.clone().to(next(model.parameters()).device)).cpu()  # CPU: names a wrong class
            if not maps or maps[-1].ndim != 4:
                found = f"with output {tuple(maps[-1].shape)}" if maps else "that the model does not pass through"
                raise CTError(f"a {type(layer).__name__} {found}", "maps (B, K, h, w)", "take the last convolution")
            classes = logits.argmax(1) if target is None else torch.as_tensor(target).cpu().expand(len(logits))
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps[-1])  # images do not mix
    finally:
        for part, training in modes:
            part.training = training
    weights = gradient.float().mean(dim=(2, 3), keepdim=True)  # (B, K, 1, 1)
    heat = (weights * maps[-1].detach().float()).sum(dim=1, keepdim=True).relu()  # (B, 1, h, w)
    heat = functional.interpolate(heat, size=images.shape[-2:], mode="bilinear")[:, 0]
    return (heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)).cpu().numpy()  # an empty map stays empty


def _find_layer(model: Module, layer: str) -> Module:
    dotted = BACKBONES[layer].cam_layer if layer in BACKBONES else layer
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in (dotted, f"backbone.{dotted}", f"head.{dotted}"):
        if path in modules:
            return modules[path]
    raise CTError(f"no layer '{dotted}' in {type(model).__name__}", "a dotted path in it", "see print(model)")


def heat_in_box(heat: np.ndarray, box: tuple[float, float, float, float]) -> float:
    """Return the share of the heat, not negative (H, W), that lies in a box, in [0, 1]; 0 when there is no heat.

    Box: left, top, right, bottom in the map's pixels, the last two outside (scale it when the picture was resized).
    """
    left, top = (max(0, int(np.floor(value))) for value in box[:2])  # a pixel that is only touched counts
    right, bottom = (max(0, int(np.ceil(value))) for value in box[2:])
    total = heat.sum(dtype=np.float64)  # in float32, a box around everything could hold 1.0000001
    return min(1.0, float(heat[top:bottom, left:right].sum(dtype=np.float64) / total)) if total > 0 else 0.0


def pointing_hit(heat: np.ndarray, box: tuple[float, float, float, float]) -> bool:
    """Say whether the hottest place lies in the box of `heat_in_box` (the pointing game); never without heat.

    Source: Zhang et al. 2016, https://arxiv.org/abs/1608.00507 (without their margin of 15 pixels)
    """
    return bool(heat.max() > 0) and heat_in_box(heat == heat.max(), box) > 0
