"""Figures: arrays and tables in, matplotlib Axes out. Nothing is computed here that a table could hold.

Colours are Okabe and Ito's, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/); lines
differ in style as well. Figures are small (at most 9 inches at 80 dpi), so that a notebook stays below 1 MB.
"""

import warnings
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ctutils.base import CTError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
SPLIT_COLOURS = {"train": "#0072B2", "val": "#E69F00", "test": "#009E73"}
GREY = "#777777"


def use_style() -> None:
    """Set the look of all figures of a notebook; call it once, beside the imports."""
    sns.set_theme(style="ticks", palette=list(COLOURS), font_scale=0.9)
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # no Korean font: boxes, no noise
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "savefig.dpi": 80,
            "figure.figsize": (6, 3.6),
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            # Class names may be Korean: the first of these fonts that a machine has and that has the letter wins.
            "font.family": ["DejaVu Sans", *_korean_fonts()],
        }
    )


def slice_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    boxes: Sequence[tuple[float, float, float, float] | None] | None = None,
    columns: int = 5,
    title: str = "Slices",
    side: float = 1.5,
) -> np.ndarray:
    """Show slices side by side.

    Args:
        images: uint8 or float (H, W), or (H, W, 3); uint8 is shown from 0 to 255, so that grey levels compare.
        titles: one an image, printed above it.
        boxes: (left, top, right, bottom) in pixels, or None, one an image.
        columns: images a row.
        title: of the figure.
        side: of one slice, inches; 1.5 are 120 pixels, and ten such slices about 130 kB.
    Returns:
        The Axes, object (rows * columns,), unused ones switched off.
    Raises:
        CTError: no image, other numbers of titles or boxes, or an image of another shape.
    """
    images = [np.asarray(image) for image in images]
    if not images:
        raise CTError("no image", "one or more", "choose slices to show")
    for name, other in (("titles", titles), ("boxes", boxes)):
        if other is not None and len(other) != len(images):
            raise CTError(f"{len(other)} {name}", f"{len(images)}, one an image", "pass as many")
    for image in images:
        _check_image(image)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    side = min(side, 9 / columns)
    lines = max((text.count("\n") + 1 for text in titles), default=0) if titles else 0
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(side * columns, 3), (side + 0.17 * lines) * rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = axes.ravel()
    for ax in axes:
        ax.axis("off")
    for k, image in enumerate(images):
        _show(axes[k], image)
        if titles is not None:
            axes[k].set_title(titles[k], fontsize=8, fontweight="normal", loc="center")
        if boxes is not None and boxes[k] is not None:
            _draw_box(axes[k], boxes[k])
    return axes


def learning_curves(history: pd.DataFrame, title: str = "Learning curves") -> np.ndarray:
    """Draw loss and macro F1 by epoch, training and validation; the best epoch is marked.

    Args:
        history: one row an epoch: epoch, train_loss, val_loss, train_macro_f1, val_macro_f1.
        title: of the figure.
    Returns:
        Two Axes: loss, macro F1.
    Raises:
        CTError: a column is missing, or no row.
    """
    _need(history, ("epoch", "train_loss", "val_loss", "train_macro_f1", "val_macro_f1"), "the history")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    best = history.loc[history["val_macro_f1"].idxmax()]
    for ax, column, label in ((axes[0], "loss", "cross-entropy loss"), (axes[1], "macro_f1", "macro F1")):
        for split, style in (("train", "o-"), ("val", "s--")):
            ax.plot(
                history["epoch"],
                history[f"{split}_{column}"],
                style,
                color=SPLIT_COLOURS[split],
                markersize=4,
                label="training" if split == "train" else "validation",
            )
        ax.axvline(best["epoch"], color=GREY, linewidth=1, linestyle=":")
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title("Loss")
    axes[1].set_title(f"Macro F1: best epoch {best['epoch']:.0f}, {best['val_macro_f1']:.3f}")
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
        y_true: int (N,) in [0, C).
        y_pred: int (N,) in [0, C).
        classes: C names.
    Raises:
        CTError: empty, other lengths, or labels outside [0, C).
    """
    y_true, y_pred, size = np.asarray(y_true), np.asarray(y_pred), len(classes)
    if y_true.shape != y_pred.shape or y_true.ndim != 1 or not len(y_true):
        raise CTError(f"labels of shapes {y_true.shape} and {y_pred.shape}", "two of shape (N,)", "align the two")
    if min(y_true.min(), y_pred.min()) < 0 or max(y_true.max(), y_pred.max()) >= size:
        raise CTError("labels outside the classes", f"0 to {size - 1}", "pass all class names, in order")
    counts = np.zeros((size, size), int)
    np.add.at(counts, (y_true, y_pred), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if ax is None:
        side = min(9.0, 2.8 + 0.65 * size)
        _, ax = plt.subplots(figsize=(side, side * 0.85))
    sns.heatmap(
        shares,
        annot=counts,
        fmt="d",
        cmap="Blues",
        vmin=0,
        vmax=1,
        square=True,
        linewidths=0.5,
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"label": "share of the true class", "shrink": 0.8},
        ax=ax,
    )
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.set_title(f"{title} ({len(y_true)} slices)")
    ax.tick_params(axis="x", rotation=30, length=0)
    ax.tick_params(axis="y", rotation=0, length=0)
    return ax


def class_counts(slices: pd.DataFrame, title: str = "Slices by class and split", ax: Axes | None = None) -> Axes:
    """Draw the number of slices of each class in each split.

    Args:
        slices: one row a slice, with the columns split and class.
    Raises:
        CTError: a column is missing, or no row.
    """
    _need(slices, ("split", "class"), "the table of slices")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.4))
    splits = [split for split in SPLIT_COLOURS if split in set(slices["split"])]
    order = sorted(slices["class"].unique())
    sns.countplot(
        slices, x="class", hue="split", order=order, hue_order=splits, palette=SPLIT_COLOURS, saturation=1, ax=ax
    )
    for bars in ax.containers:
        ax.bar_label(bars, fontsize=8, padding=1)
    ax.set(xlabel="class", ylabel="slices")
    ax.set_title(title)
    ax.grid(axis="x", visible=False)
    ax.legend(title="split")
    return ax


def grey_histograms(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    title: str = "Grey levels by class",
    ax: Axes | None = None,
) -> Axes:
    """Draw how often each grey level occurs in the slices of each class.

    Args:
        images: uint8 (N, H, W), such as the decoded store; at most 200 slices a class are read, evenly spaced.
        labels: int (N,) in [0, C).
        classes: C names.
    Raises:
        CTError: other shapes or type, or no image.
    """
    labels = np.asarray(labels)
    if images.ndim != 3 or images.dtype != np.uint8 or len(images) != len(labels) or not len(labels):
        raise CTError(
            f"{images.dtype} images of shape {images.shape} and {len(labels)} labels",
            "uint8 (N, H, W) with one label each",
            "pass the store and its labels",
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.4))
    for k, name in enumerate(classes):
        rows = np.nonzero(labels == k)[0]
        if not len(rows):
            continue
        rows = rows[np.linspace(0, len(rows) - 1, min(200, len(rows))).astype(int)]
        counts = sum(np.bincount(images[row].ravel(), minlength=256) for row in rows)
        bins = counts.reshape(64, 4).sum(axis=1)  # 4 grey levels a bin, else the lines are too ragged to compare
        ax.plot(
            np.arange(64) * 4 + 1.5,
            np.where(bins > 0, 100 * bins / bins.sum(), np.nan),  # the log of 0 would be a line to the floor
            linestyle=("-", "--", "-.", ":")[k % 4],
            color=COLOURS[k % len(COLOURS)],
            label=name,
        )
    ax.set_yscale("log")
    ax.set_ylim(bottom=1e-3)
    ax.set(xlabel="grey level (0 to 255)", ylabel="pixels (%, log scale)")
    ax.set_title(title)
    ax.legend(ncols=2)
    return ax


def score_intervals(
    table: pd.DataFrame, deck: pd.DataFrame | None = None, title: str = "Macro F1 on test", ax: Axes | None = None
) -> Axes:
    """Draw each run's score with its 95 % interval; the deck's scores beside them, marked as the deck's.

    Several runs of one backbone (other seeds, weights or data) stand one below the other.

    Args:
        table: from `results.comparison_table`: backbone, test_f1, low, high, deck_f1, weights, data, profile.
        deck: from `results.deck_table`: backbone, deck_f1, low, high; without it only the deck's points are drawn.
    Raises:
        CTError: a column is missing, or no row.
    """
    _need(table, ("backbone", "test_f1", "low", "high", "deck_f1", "weights", "data", "profile"), "the table")
    order = list(dict.fromkeys([*(deck["backbone"] if deck is not None else []), *table["backbone"]]))
    if deck is None:
        deck = table.drop_duplicates("backbone")[["backbone", "deck_f1"]].dropna()
        deck = deck.assign(low=deck["deck_f1"], high=deck["deck_f1"])
    own_figure = ax is None
    if own_figure:
        _, ax = plt.subplots(figsize=(8, 1.8 + 0.45 * len(order)), layout="constrained")
    groups = table.apply(lambda row: f"{row['data']}, {row['weights']} weights, {row['profile']}", axis=1)
    colours = {group: COLOURS[k % len(COLOURS)] for k, group in enumerate(dict.fromkeys(groups))}

    shown = set()
    for place, backbone in enumerate(order):
        ours = table[table["backbone"] == backbone].dropna(subset=["test_f1"])
        shifts = np.linspace(-0.12, 0.36, len(ours) + 2)[1:-1]  # below the deck's, which is at -0.22
        for (index, row), shift in zip(ours.iterrows(), shifts, strict=True):
            group = groups[index]
            _point(ax, row["test_f1"], row["low"], row["high"], place + shift, colours[group], "o", group, shown)
        for _, row in deck[deck["backbone"] == backbone].iterrows():
            label = "2022 deck: other data, its own validation slices"
            _point(ax, row["deck_f1"], row["low"], row["high"], place - 0.22, GREY, "D", label, shown)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set(xlabel="macro F1 (0 to 1), lines: 95 % interval", ylabel="backbone")
    ax.set_title(title)
    ax.grid(axis="y", visible=False)
    if own_figure:
        ax.figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    else:
        ax.legend(fontsize=8)
    return ax


def difference_intervals(
    table: pd.DataFrame,
    title: str = "Difference of macro F1",
    xlabel: str = "difference of macro F1 (A minus B), lines: 95 % interval",
    ax: Axes | None = None,
) -> Axes:
    """Draw differences with their intervals; grey where the interval holds zero, so nothing can be said.

    Args:
        table: name, difference, low, high: one row a comparison, as from `metrics.paired_difference`.
    Raises:
        CTError: a column is missing, or no row.
    """
    _need(table, ("name", "difference", "low", "high"), "the table")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 1.3 + 0.4 * len(table)))
    for place, row in enumerate(table.itertuples()):
        unclear = row.low <= 0 <= row.high
        colour = GREY if unclear else COLOURS[2] if row.low > 0 else COLOURS[5]
        label = "not distinguishable" if unclear else "higher" if row.low > 0 else "lower"
        _point(ax, row.difference, row.low, row.high, place, colour, "D" if unclear else "o", label, set())
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(table)), table["name"])
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set(xlabel=xlabel, ylabel="comparison")
    ax.set_title(title)
    ax.grid(axis="y", visible=False)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(handles.values(), handles.keys(), fontsize=8, loc="best")
    return ax


def setting_differences(table: pd.DataFrame, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw `difference_intervals` of the rows of a sweep, with a dot for each seed's own difference.

    Args:
        table: from `sweep.compare_settings`; rows without a difference are left out.
        title: by default, how many of the rows are distinguishable from what they are compared with.
    Raises:
        CTError: a column is missing, or no row has a difference.
    """
    columns = ("setting", "backbone", "against", "difference", "low", "high", "seed_differences")
    _need(table, columns, "the table")
    table = table.dropna(subset=["difference"])
    _need(table, columns, "the comparison")
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 1.2 + 0.3 * len(table)), layout="constrained")
    several = table["backbone"].nunique() > 1
    names = [f"{row.setting}, {row.backbone}" if several else row.setting for row in table.itertuples()]
    against = table["against"].iloc[0] if table["against"].nunique() == 1 else "the setting it is compared with"
    if title is None:
        clear = int(((table["low"] > 0) | (table["high"] < 0)).sum())
        title = f"Difference in macro F1 on test: {clear or 'none'} of {len(table)} distinguishable"
    xlabel = f"macro F1 minus that of: {against} (line: 95 % interval, dots: seeds)"
    difference_intervals(table.assign(name=names), title, xlabel, ax)
    for place, row in enumerate(table.itertuples()):
        ax.plot(row.seed_differences, [place + 0.25] * len(row.seed_differences), ".", color=GREY, alpha=0.6)
    return ax


def reliability_diagram(
    table: pd.DataFrame, title: str = "Reliability: is it as sure as it is right?", ax: Axes | None = None
) -> Axes:
    """Draw accuracy against confidence; on the diagonal a model is right as often as it says.

    Args:
        table: from `metrics.reliability`: low, high, count, confidence, accuracy.
    Raises:
        CTError: a column is missing, or no slice.
    """
    _need(table, ("low", "high", "count", "confidence", "accuracy"), "the table")
    used = table[table["count"] > 0]
    if used.empty:
        raise CTError("a table without a slice", "one or more", "pass metrics.reliability of a split")
    if ax is None:
        _, ax = plt.subplots(figsize=(4.6, 4.2))
    error = (used["count"] * (used["confidence"] - used["accuracy"]).abs()).sum() / used["count"].sum()
    ax.bar(
        used["low"],
        used["count"] / used["count"].sum(),
        width=used["high"] - used["low"],
        align="edge",
        color="#dddddd",
        label="share of slices",
    )
    ax.plot([0, 1], [0, 1], ":", color=GREY, label="perfect")
    ax.plot(used["confidence"], used["accuracy"], "o-", color=COLOURS[0], markersize=5, label="model")
    ax.set(xlabel="confidence (probability of the predicted class)", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    ax.set_title(f"{title}\nexpected calibration error {error:.3f}")
    ax.legend(loc="upper left")
    return ax


def heat_overlay(
    image: np.ndarray,
    heat: np.ndarray,
    box: tuple[float, float, float, float] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Lay a heat map over a slice; the box is where the finding is.

    Args:
        image: uint8 or float (H, W).
        heat: float (h, w), 0 or more; stretched to the image.
        box: (left, top, right, bottom) in pixels of the image.
        title: above the picture.
    Raises:
        CTError: an image or a heat map of another shape, or NaN in the heat.
    """
    image, heat = np.asarray(image), np.asarray(heat, dtype=float)
    _check_image(image)
    if heat.ndim != 2 or not np.isfinite(heat).all():
        raise CTError(f"a heat map of shape {heat.shape} or with NaN", "finite numbers (h, w)", "pass one map")
    if ax is None:
        _, ax = plt.subplots(figsize=(3, 3.3))
    _show(ax, image)
    height, width = image.shape[:2]
    strength = heat.clip(0) / max(heat.max(), 1e-12)
    ax.imshow(
        strength,
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.65 * strength,  # cold places stay readable
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="bilinear",
    )
    if box is not None:
        _draw_box(ax, box)
    ax.axis("off")
    ax.set_title(title, fontsize=8, fontweight="normal", loc="center")
    return ax


def _check_image(image: np.ndarray) -> None:
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or not image.size:
        raise CTError(f"an image of shape {image.shape}", "(H, W) or (H, W, 3)", "pass one slice at a time")


def _show(ax: Axes, image: np.ndarray) -> None:
    limits = {"vmin": 0, "vmax": 255} if image.dtype == np.uint8 else {}
    ax.imshow(image, cmap="gray", interpolation="antialiased", **limits)


def _draw_box(ax: Axes, box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    # right and bottom are outside; pixel k reaches from k - 0.5 to k + 0.5
    patch = Rectangle(
        (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor="#56B4E9", linewidth=1.5
    )
    ax.add_patch(patch)


def _point(ax: Axes, value, low, high, place, colour, marker, label, shown: set[str]) -> None:
    ax.errorbar(
        value,
        place,
        xerr=[[value - low], [high - value]],
        fmt=marker,
        color=colour,
        markersize=5,
        capsize=3 if high > low else 0,
        label=None if label in shown else label,  # once in the legend
    )
    shown.add(label)


def _need(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing or table.empty:
        found = f"{what} without {', '.join(missing)}" if missing else f"{what} without a row"
        raise CTError(found, f"one row or more with {', '.join(columns)}", "pass the table as it was made")


def _korean_fonts() -> list[str]:
    """Return the fonts of this machine that have Korean letters, if it has any of the usual ones."""
    from matplotlib.font_manager import fontManager

    here = {font.name for font in fontManager.ttflist}
    usual = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")
    return [name for name in usual if name in here]
