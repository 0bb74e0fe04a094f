"""The course's drawings, by code: `drawings.batchnorm()` draws on a figure of its own; then `plots.show("its text")`.

One style for all: blue and hatched is frozen, orange learns, grey is data, red goes wrong, green is the course's own.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from ctutils.registry import BACKBONES

# Fill and hatch; Okabe and Ito's colours, which colour-blind readers can tell apart, lightened under black text.
KINDS = {"frozen": ("#bfe1f6", "//"), "learns": ("#f6d48a", ""), "data": ("#eeeeee", ""), "wrong": ("#f3c1a3", "")}
EDGES = {"frozen": "#0072B2", "learns": "#B87A00", "data": "#555555", "wrong": "#D55E00"}


def frozen_and_head(name: str = "efficientnet_lite0", classes: int = 5) -> Figure:
    """Draw transfer learning: a frozen backbone that gives features, and a new head that learns."""
    total, features = _size(name)["parameters"], BACKBONES[name].in_features
    with_head = features * classes + classes
    figure, ax = _canvas("Transfer learning: the backbone is kept, a new last layer learns", 4.1)
    _box(ax, 0, 1.5, 1.1, 1.1, "slice\n3 x H x W", "data")
    for k, text in enumerate(("edges", "textures", "shapes", "parts\nof things")):
        _box(ax, 1.5 + 1.05 * k, 1.2 + 0.12 * k, 0.95, 1.7 - 0.24 * k, text, "frozen")
    _box(ax, 6.0, 1.5, 1.1, 1.1, f"{features:,}\nfeatures", "data")
    _box(ax, 7.5, 1.6, 1.3, 0.9, "new head\n(Linear)", "learns")
    for start, end in ((1.1, 1.5), (5.6, 6.0), (7.1, 7.5)):
        _arrow(ax, (start, 2.05), (end, 2.05))
    ax.text(3.6, 3.1, f"frozen: {total - features * 1000 - 1000:,} numbers, from photographs", ha="center")
    ax.text(8.95, 3.1, f"learns: {with_head:,} numbers", ha="right")
    _arrow(ax, (8.15, 0.75), (8.15, 1.55), EDGES["learns"])
    ax.text(8.15, 0.45, "the gradient changes\nthis layer, no other", ha="center", va="center", color=EDGES["learns"])
    ax.text(3.6, 0.6, "A slice gives the same features in every epoch.", ha="center", color=EDGES["frozen"])
    return figure


def batchnorm(batches: int = 60) -> Figure:
    """Draw a BatchNorm layer's running mean over batches of slices: in eval mode it stays, in train mode it drifts."""
    import torch

    rng, layer = torch.Generator().manual_seed(0), torch.nn.BatchNorm1d(1)
    means = {"eval": [], "train": []}, {"eval": [], "train": []}  # the batches', the layer's
    for mode in ("eval", "train"):
        layer.running_mean.zero_()
        layer.train(mode == "train")
        for _ in range(batches):
            batch = 1.5 + torch.randn(16, 1, generator=rng)  # slices are no photographs: another mean
            layer(batch)
            means[0][mode].append(batch.mean().item())
            means[1][mode].append(layer.running_mean.item())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True, layout="constrained")
    texts = ("Frozen: eval mode", "Drifting: train mode, the deck's way")
    for ax, mode, text, kind in zip(axes, means[0], texts, ("frozen", "wrong"), strict=True):
        ax.plot(means[0][mode], ".", color="#999999", label="mean of a batch of slices")
        ax.plot(means[1][mode], color=EDGES[kind], linewidth=3, label="the layer's running mean")
        ax.axhline(0, color="black", linestyle="--", linewidth=1, label="as photographs left it")
        ax.set(xlabel="batch", title=text)
    axes[0].set_ylabel("one feature")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("No parameter learns, and yet the layer changes", x=0.01, ha="left", fontweight="bold")
    return figure


def splits() -> Figure:
    """Draw train, validation and test, and who may look at which, when."""
    figure, ax = _canvas("Who may look at which slices, and when", 4.4)
    places = {"train": (2.6, 2.6), "val": (5.4, 1.5), "test": (7.1, 1.8)}
    for (split, (x, width)), kind in zip(places.items(), ("learns", "data", "data"), strict=True):
        _box(ax, x, 3.0, width, 0.65, split, kind)
    rows = {
        "the optimizer,\nin every step": ("yes", "", ""),
        "you and the best epoch,\nas often as you like": ("yes", "yes", ""),
        "the report,\nonce, at the end": ("", "", "yes"),
        "the deck": ("yes", "chose and\nreported", "had none"),
    }
    for k, (who, may) in enumerate(rows.items()):
        y = 2.45 - 0.72 * k
        ax.text(0, y, who, va="center", fontweight="bold" if k == 3 else None)
        for (x, width), text in zip(places.values(), may, strict=True):
            wrong = k == 3 and text != "yes"
            said = "\u2713" if text == "yes" else text or "\u2013"
            ax.text(x + width / 2, y, said, ha="center", va="center", color=EDGES["wrong"] if wrong else "black",
                    fontsize=18 if text == "yes" else None)  # fmt: skip
        ax.axhline(y - 0.36, color="#cccccc", linewidth=1)
    return figure


def six_to_scale(names: tuple[str, ...] = (*list(BACKBONES)[:6], "efficientnet_lite0"), pixels: int = 224) -> Figure:
    """Draw networks to scale: a rectangle's area is the parameters, its height the layers, a circle's area the work.

    All is counted, in networks without weights: the work is multiply-adds for one slice of `pixels` a side, the
    layers are convolutions and linear layers (those on a ResNet's shortcuts left out).
    """
    sizes = {name: _size(name, pixels) for name in names}
    shape = {"figsize": (9, 6), "height_ratios": (4, 1), "sharex": True, "layout": "constrained"}
    figure, (above, below) = plt.subplots(2, 1, **shape)
    for place, (name, size) in enumerate(sizes.items()):
        millions, height, billions = size["parameters"] / 1e6, size["layers"], size["operations"] / 1e9
        width = millions / height / 9
        fill, edge = ("#e3e3e3", "#555555") if BACKBONES[name].deck_f1 else ("#b3e2d1", "#009E73")
        above.add_patch(Rectangle((place - width / 2, 0), width, height, facecolor=fill, edgecolor=edge))
        above.text(place, height + 3, f"{millions:.1f} million\n{height} layers", ha="center", va="bottom")
        below.scatter(place, 0.8, s=110 * billions, color=fill, edgecolor=edge)
        below.text(place, 0, f"{billions:.1f}", ha="center", va="center")
    titles = [BACKBONES[name].title.replace("Net", "Net\n", 1) for name in names]
    below.set(xticks=range(len(names)), xticklabels=titles, yticks=[], ylim=(-0.4, 1.5), ylabel="work")
    below.set_xlabel(f"work: billion multiply-adds for a slice of {pixels} pixels (area of the circle)")
    above.set(ylabel="layers", ylim=(0, 35 + max(size["layers"] for size in sizes.values())))
    above.set_title("To scale: many parameters, many layers and much work are three things")
    above.tick_params(bottom=False)
    for ax in (above, below):
        ax.grid(False)
    return figure


def cut_and_cache(epochs: int = 10) -> Figure:
    """Draw what the cut saves: the frozen part runs once, and only what learns runs in every epoch."""
    figure, ax = _canvas("The cut: what never changes runs once", 4.8)
    for y, text, kind in ((2.7, "Without a cache", "wrong"), (0.45, "With one", "learns")):
        ax.text(0, y + 1.35, text, fontweight="bold")
        _box(ax, 0, y, 1.2, 0.9, "slices", "data")
        _box(ax, 1.8, y, 2.5, 0.9, "frozen part", "frozen")
        _box(ax, 7.5, y, 1.1, 0.9, "head", "learns")
        _arrow(ax, (1.2, y + 0.45), (1.8, y + 0.45))
        loop = (1.6, 7.2) if kind == "wrong" else (7.3, 1.5)
        ax.add_patch(Rectangle((loop[0], y - 0.2), loop[1], 1.3, fill=False, linestyle="--", edgecolor=EDGES[kind]))
        _box_label(ax, loop[0] + loop[1], y + 1.18, f"{epochs} times", EDGES[kind])
    _arrow(ax, (4.3, 3.15), (7.5, 3.15))
    _arrow(ax, (4.3, 0.9), (5.3, 0.9))
    _box(ax, 5.3, 0.45, 1.4, 0.9, "features,\nkept", "data")
    _arrow(ax, (6.7, 0.9), (7.5, 0.9))
    _box_label(ax, 4.3, 1.63, "once", EDGES["frozen"])
    ax.plot([4.8, 4.8], [0.15, 3.9], color="black", linestyle=":")
    ax.text(4.8, 4.0, "the cut", ha="center")
    return figure


def grad_cam() -> Figure:
    """Draw Grad-CAM on three small maps: each is weighted by its mean gradient, added up, and cut off at zero."""
    y, x = np.mgrid[:7, :7]
    places, weights = ((2, 4), (4, 1), (5, 5)), (0.8, 0.5, -0.6)
    maps = [np.exp(-((y - a) ** 2 + (x - b) ** 2) / 3) for a, b in places]
    heat = np.maximum(sum(w * m for w, m in zip(weights, maps, strict=True)), 0)
    figure, ax = _canvas("Grad-CAM: which places speak for a class?", 4.6)
    _box(ax, 0, 1.4, 1.0, 1.2, "slice", "data")
    _box(ax, 1.3, 1.2, 1.5, 1.6, "network,\nup to its\nlast maps", "frozen")
    _arrow(ax, (1.0, 2.0), (1.3, 2.0))
    for k, (one, weight) in enumerate(zip(maps, weights, strict=True)):
        bottom = 2.75 - 1.3 * k
        _picture(ax, one, 3.3, bottom, 1.1)
        ax.text(4.5, bottom + 0.55, f"x {weight:+.1f}", va="center", color=EDGES["wrong"] if weight < 0 else "black")
        _arrow(ax, (2.8, 2.0), (3.3, bottom + 0.55))
        _arrow(ax, (5.25, bottom + 0.55), (5.8, 2.0))
    _picture(ax, heat, 5.9, 1.35, 1.3)
    _picture(ax, heat, 7.6, 1.35, 1.3, smooth=True)
    _arrow(ax, (7.2, 2.0), (7.6, 2.0))
    for where, text in (
        (3.85, "maps"),
        (6.55, "added up,\nonly what is\nabove 0"),
        (8.25, "enlarged,\nlaid over\nthe slice"),
    ):
        ax.text(where, 0.05 if text == "maps" else 0.35, text, ha="center", va="top" if text == "maps" else "bottom")
    ax.text(5.0, 3.95, "weight: how much the class's score rises with the map (mean gradient)", ha="center")
    return figure


def _canvas(title: str, height: float) -> tuple[Figure, Axes]:
    """Return a figure of 9 inches and Axes over it whose unit is an inch."""
    figure, ax = plt.subplots(figsize=(9, height), layout="constrained")
    ax.set(xlim=(-0.05, 9.05), ylim=(-0.1, height - 0.4))
    ax.axis("off")
    ax.set_title(title)
    return figure, ax


def _box(ax: Axes, x: float, y: float, width: float, height: float, text: str, kind: str) -> None:
    fill, hatch = KINDS[kind]
    shape = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, shape, facecolor=fill, edgecolor=EDGES[kind], linewidth=1.5))
    if hatch:  # pale, so that the text stays readable
        lines = {"facecolor": "none", "edgecolor": "white", "hatch": hatch, "linewidth": 0}
        ax.add_patch(FancyBboxPatch((x, y), width, height, shape, **lines))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def _box_label(ax: Axes, x: float, y: float, text: str, colour: str) -> None:
    ax.text(x, y, text, ha="right", va="bottom", color=colour, fontweight="bold")


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "black") -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.5, "shrinkA": 0})


def _picture(ax: Axes, values: np.ndarray, x: float, y: float, side: float, smooth: bool = False) -> None:
    how = "bilinear" if smooth else "nearest"
    ax.imshow(values, cmap="inferno", extent=(x, x + side, y, y + side), interpolation=how, aspect="auto", vmin=0)


def _size(name: str, pixels: int = 224) -> dict[str, int]:
    """Count a network's parameters, layers and multiply-adds; it gets no weights, so this takes no memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ctutils.backbones import _make

    with torch.device("meta"):
        model = _make(BACKBONES[name])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, pixels, pixels))
    chain = [
        module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and "downsample" not in path
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "layers": len(chain), "operations": counter.get_total_flops() // 2}
