"""Figures: arrays and tables in, matplotlib Axes out. Nothing is computed here that a table could hold.

Colours are Okabe and Ito's, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/); lines
differ in style as well. Figures are at most 9 inches wide, 110 pixels to the inch; the environment variable
CT_FIGURE_SCALE makes all of them larger or smaller, letters included.
"""

import base64
import html
import io
import os
import warnings
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn import metrics

from ctutils.base import CTError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
SPLIT_COLOURS = {"train": "#0072B2", "val": "#E69F00", "test": "#009E73"}
GREY = "#777777"
KOREAN = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom are outside


def use_style() -> None:
    """Set the look of all figures of a notebook; call it once, beside the imports.

    Letters have 11 points or more, so that the last row of a classroom can read them.

    Raises:
        CTError: CT_FIGURE_SCALE is no number from 0.5 to 3.
    """
    text = os.environ.get("CT_FIGURE_SCALE") or "1"
    if not (text.replace(".", "", 1).isdecimal() and 0.5 <= float(text) <= 3):
        raise CTError(f"CT_FIGURE_SCALE '{text}'", "a number from 0.5 to 3, such as 1.5", "unset it: 1 is usual")
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # no Korean font: boxes, no noise
    look = {
        "figure.dpi": 110 * float(text),
        "figure.figsize": (8, 4),
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        **{f"{part}size": 11 for part in ("font.", "axes.label", "xtick.label", "ytick.label", "legend.font")},
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "figure.titlesize": 12,
        "figure.titleweight": "bold",
        "legend.frameon": False,
        # Class names may be Korean: the first of these fonts that a machine has and that has the letter wins.
        "font.family": ["DejaVu Sans", *(name for name in KOREAN if name in fontManager.get_font_names())],
    }
    sns.set_theme(style="ticks", palette=list(COLOURS), rc=look)


def show(alt: str) -> None:
    """Show the current figure in the notebook, with a sentence for readers who cannot see it; then close it.

    nbval compares the sentence, so it holds no number that depends on the profile. Exported pages and slides have it
    as the picture's `alt`; JupyterLab gives pictures none, so there it stands beside, hidden but read aloud.
    """
    from IPython.display import display

    figure, drawn, file = plt.gcf(), io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    plt.close(figure)
    image = Image.open(drawn).convert("RGB")
    if (np.ptp(image, axis=2) < 9).mean() > 0.95:  # 256 colours hold nearly grey ones, in half of the bytes
        image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(file, "png", optimize=True)
    display({"text/html": f'<span class="sr-only">{html.escape(alt)}</span>'}, raw=True)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)


def slice_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    boxes: Sequence[Box | None] | None = None,
    columns: int = 4,
    title: str = "Slices",
    side: float = 2.0,
) -> np.ndarray:
    """Show slices side by side; return the Axes, object (rows * columns,), unused ones switched off.

    Args:
        images: uint8 or float (H, W), or (H, W, 3); uint8 is shown from 0 to 255, so that grey levels compare.
        titles, boxes: one an image, the title printed above it; a box may be None.
        columns: images per row, at most 4: more would be too small to see.
        side: of one slice, inches; 2 are 220 pixels, about 30 kB.
    """
    titles = [""] * len(images) if titles is None else titles
    boxes = [None] * len(images) if boxes is None else boxes
    columns = max(1, min(columns, len(images), 4))
    rows = -(-len(images) // columns)
    side = min(side, 9 / columns)
    lines = max(text.count("\n") + 1 for text in titles) if any(titles) else 0
    size = max(side * columns, 3), (side + 0.22 * lines) * rows + 0.4
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, text, box in zip(axes.flat[: len(images)], images, titles, boxes, strict=True):
        _show(ax, np.asarray(image), box, text)
    return axes.ravel()


def learning_curves(
    history: pd.DataFrame | dict[str, pd.DataFrame],
    title: str = "Learning curves",
    chance: tuple[float, float] | None = None,
) -> np.ndarray:
    """Draw loss and macro F1 by epoch, training and validation, in two Axes; best epochs are marked.

    Args:
        history: one row per epoch: epoch, train_loss, val_loss, train_macro_f1, val_macro_f1; of several runs
            {name: history}, each in a colour of its own.
        chance: what guessing scores on validation, from the lowest to the highest: a grey band.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8 + 0.5 * isinstance(history, dict)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    runs = history if isinstance(history, dict) else {"": history}
    for k, (name, rows) in enumerate(runs.items()):
        best = rows.loc[rows["val_macro_f1"].idxmax()]
        for split, word, style in (("train", "training", "o-"), ("val", "validation", "s--")):
            colour, label = (COLOURS[k], f"{name}, {word}") if name else (SPLIT_COLOURS[split], word)
            for ax, column in zip(axes, ("loss", "macro_f1"), strict=True):
                ax.plot(rows["epoch"], rows[f"{split}_{column}"], style, color=colour, markersize=4, label=label)
        for ax in axes:
            ax.axvline(best["epoch"], color=COLOURS[k] if name else GREY, linewidth=1, linestyle=":")
    for ax, label in zip(axes, ("cross-entropy loss", "macro F1"), strict=True):
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    if chance is not None:
        axes[1].axhspan(*chance, color=GREY, alpha=0.2, linewidth=0, label="guessing, validation")
    axes[0].set_title("Loss")
    one = f": best epoch {best['epoch']:.0f}, {best['val_macro_f1']:.3f}"
    axes[1].set_title("Macro F1" + (one if len(runs) == 1 else "; dotted: best epoch"))
    if isinstance(history, dict):
        columns = len(runs) + (chance is not None)
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    else:
        axes[0].legend()
    return axes


def confusion_matrix(
    y_true: np.ndarray,
    y_pred: np.ndarray,
    classes: Sequence[str],
    title: str = "Confusion matrix",
    ax: Axes | None = None,
) -> Axes:
    """Show how many slices of each true class were called what; colour is the share of the true class.

    Args:
        y_true, y_pred: int (N,) in [0, C), C being the number of classes.
    Raises:
        CTError: labels outside [0, C).
    """
    size = len(classes)
    counts = metrics.confusion_matrix(y_true, y_pred, labels=range(size))
    if counts.sum() != len(y_true):
        raise CTError("labels outside the classes", f"0 to {size - 1}", "pass all class names, in order")
    alone = ax is None
    ax = ax or plt.subplots(figsize=np.minimum(9, (3.4 + 0.8 * size, 2.6 + 0.6 * size)))[1]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = metrics.ConfusionMatrixDisplay(shares, display_labels=classes)
    shown.plot(ax=ax, cmap="Blues", xticks_rotation=40, im_kw={"vmin": 0, "vmax": 1}, colorbar=alone)
    plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    for text, count, share in zip(shown.text_.flat, counts.flat, shares.flat, strict=True):
        text.set(text=count, color="white" if share > 0.5 else "black")
    if alone:
        shown.im_.colorbar.set_label("share of the true class")
    ax.set(xlabel="predicted class", ylabel="true class", title=f"{title} ({len(y_true)} slices)")
    ax.grid(False)
    return ax


def score_intervals(table: pd.DataFrame, title: str = "Macro F1 on test", ax: Axes | None = None) -> Axes:
    """Draw each row's score with its 95 % interval, and the range of guessing as a band; hollow: not above chance.

    The table is that of `results.comparison_table`: name, test_f1, low, high, permuted_low, permuted_high,
    above_chance, weights.
    """
    table = table.dropna(subset=["test_f1"]).reset_index(drop=True)
    ax = ax or plt.subplots(figsize=(9, 2 + 0.36 * len(table)), layout="constrained")[1]
    width = table["permuted_high"] - table["permuted_low"]
    guessing = {"height": 0.7, "color": "#dddddd", "label": "labels shuffled, 95 %"}
    ax.barh(table.index, width, left=table["permuted_low"], **guessing)
    for k, (weights, rows) in enumerate(table.groupby("weights", sort=False)):
        for above, some in rows.groupby("above_chance"):
            label = f"{weights} weights" + ("" if above else ", not above chance")
            _points(ax, some["test_f1"], some, some.index, COLOURS[k], "o", label, None if above else "white")
    _name_rows(ax, table["name"], "network", "macro F1 (0 to 1), lines: 95 % interval", title)
    ax.set_xlim(left=0)
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return ax


def difference_intervals(
    table: pd.DataFrame,
    title: str = "Difference of macro F1",
    xlabel: str = "difference of macro F1 (A minus B), lines: 95 % interval",
    ax: Axes | None = None,
) -> Axes:
    """Draw differences with their intervals; grey where the interval holds zero, so nothing can be said.

    The table has one row a comparison, as from `metrics.paired_difference`: name, difference, low, high.
    """
    ax = ax or plt.subplots(figsize=(9, 1.6 + 0.45 * len(table)))[1]
    styles = {"higher": (COLOURS[2], "o"), "lower": (COLOURS[5], "o"), "not distinguishable": (GREY, "D")}
    said = np.select([table["low"] > 0, table["high"] < 0], ["higher", "lower"], "not distinguishable")
    for label, rows in table.assign(place=range(len(table))).groupby(said):
        _points(ax, rows["difference"], rows, rows["place"], *styles[label], label)
    ax.axvline(0, color="black", linewidth=1)
    _name_rows(ax, table["name"], "comparison", xlabel, title)
    ax.legend(loc="best")
    return ax


def setting_differences(table: pd.DataFrame, title: str, ax: Axes | None = None) -> Axes:
    """Draw `difference_intervals` of the rows of a sweep, with a dot for each seed's own difference.

    Args:
        table: from `results.compare_settings`; rows without a difference are left out.
    Raises:
        CTError: no row has a difference.
    """
    table = table.dropna(subset=["difference"])
    if table.empty:
        raise CTError("no row with a difference", "a setting and what it is compared with", "run the sweep first")
    ax = ax or plt.subplots(figsize=(9, 1.5 + 0.36 * len(table)))[1]
    names = table["setting"] + (", " + table["backbone"] if table["backbone"].nunique() > 1 else "")
    against = table["against"].iloc[0] if table["against"].nunique() == 1 else "the setting it is compared with"
    xlabel = f"macro F1 minus that of: {against} (line: {100 * table['level'].iloc[0]:.3g} % interval, dots: seeds)"
    difference_intervals(table.assign(name=names), title, xlabel, ax)
    for place, values in enumerate(table["seed_differences"]):
        ax.plot(values, [place + 0.25] * len(values), ".", color=GREY, alpha=0.6)
    return ax


def heat_overlay(
    image: np.ndarray, heat: np.ndarray, box: Box | None = None, title: str = "", ax: Axes | None = None
) -> Axes:
    """Lay a heat map (h, w), not negative, over a slice (H, W), stretched to it; the box is where the finding is."""
    image, heat = np.asarray(image), np.asarray(heat, dtype=float)
    ax = ax or plt.subplots(figsize=(4, 4.3))[1]
    _show(ax, image, box, title)
    strength = heat.clip(0) / max(heat.max(), 1e-12)  # shown so much that cold places stay readable
    place = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    ax.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=0.65 * strength, extent=place, interpolation="bilinear")
    ax.axis("off")
    return ax


def _show(ax: Axes, image: np.ndarray, box: Box | None, title: str) -> None:
    limits = {"vmin": 0, "vmax": 255} if image.dtype == np.uint8 else {}
    ax.imshow(image, cmap="gray", interpolation="antialiased", **limits)
    ax.set_title(title, fontsize=11, fontweight="normal", loc="center")
    if box is not None:
        left, top, right, bottom = box  # pixel k reaches from k - 0.5 to k + 0.5
        corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#56B4E9", linewidth=1.5))


def _points(ax: Axes, values, table: pd.DataFrame, places, colour: str, marker: str, label: str, fill=None) -> None:
    """Draw values with the intervals low to high of their table, one below the other."""
    around = [values - table["low"], table["high"] - values]
    capsize = 3 if (table["high"] > table["low"]).any() else 0
    style = {"color": colour, "markersize": 5, "capsize": capsize, "label": label, "mfc": fill or colour}
    ax.errorbar(values, places, xerr=around, fmt=marker, **style)


def _name_rows(ax: Axes, names: Sequence[str], ylabel: str, xlabel: str, title: str) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), ylabel=ylabel, xlabel=xlabel, title=title)
    ax.grid(axis="y", visible=False)
