"""Things to move, one function each: it shows a picture at once, and the controls move a second one below it.

Where no kernel runs (a web page, a print, slides) the first picture is all there is, and it says the same.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix

from ctutils import plots
from ctutils.data import normalise
from ctutils.pictures import BadFile, resize
from ctutils.registry import get_spec

LATER = {"continuous_update": False}  # draw when the mouse lets go


def slice_browser(folder, size: int = 256) -> None:
    """Browse synthetic slices, scanned again in any window: class, number, level and width in HU."""
    from ctutils.phantom import make_slice

    def draw(name: str, number: int, level: int, width: int) -> Figure:
        picture, drawn = make_slice(folder.meta["seed"], "train", name, number, size=size, window=(level, width))
        title = f"{name}: level {level}, width {width} HU\nblack below {level - width // 2}, white above"
        plots.slice_grid([picture], [f"{title} {level + width // 2}"], [drawn.box], title="Window and level", side=4)
        return plt.gcf()

    controls = {
        "name": ipywidgets.Dropdown(options=folder.classes, value=folder.classes[-1], description="class"),
        "number": ipywidgets.IntSlider(0, 0, 99, description="slice", **LATER),
        "level": ipywidgets.IntSlider(-600, -1000, 400, 20, description="level, HU", **LATER),
        "width": ipywidgets.IntSlider(1500, 100, 3000, 50, description="width, HU", **LATER),
    }
    return _live(draw, controls, "A slice in the lung window, with a box around its finding, and its level and width.")


def batch_f1(y_true: np.ndarray, y_pred: np.ndarray, score: Callable, whole: float) -> None:
    """Move the batch size and the order of the slices, and see what the deck's batch F1 makes of the same answers.

    Args:
        y_true, y_pred: int (N,), class after class.
        score: what the deck reports of (y_true, y_pred, batch size).
        whole: the macro F1 over all slices at once.
    """
    order = np.random.default_rng(0).permutation(len(y_true))

    def draw(size: int, shuffled: bool) -> Figure:
        rows = order if shuffled else np.arange(len(y_true))
        values = [score(y_true[rows], y_pred[rows], size), whole]
        figure, ax = plt.subplots(figsize=(9, 2.4))
        names = [f"mean over batches of {size},\n{'shuffled' if shuffled else 'class after class'}", "all at once"]
        ax.bar_label(ax.barh(names, values, color=[plots.COLOURS[1], plots.COLOURS[0]]), fmt="%.3f", padding=4)
        ax.set(xlim=(0, 1), xlabel="macro F1", title="The same answers, scored in two ways")
        ax.invert_yaxis()
        return figure

    controls = {
        "size": ipywidgets.IntSlider(16, 1, len(y_true), description="batch size", **LATER),
        "shuffled": ipywidgets.Checkbox(False, description="shuffled"),
    }
    return _live(draw, controls, "Two bars: the mean of the batches' F1, and the macro F1 over all slices at once.")


def threshold(y_true: np.ndarray, y_score: np.ndarray, classes: Sequence[str], normal: str = "Normal") -> None:
    """Move the probability from which a slice is called sick, and see who is found and who is alarmed for nothing.

    Args:
        y_true, y_score: int (N,) and probabilities (N, C); sick is every class but `normal`.
    """
    healthy = list(classes).index(normal)
    sick, p = y_true != healthy, 1 - y_score[:, healthy]

    def draw(at: float) -> Figure:
        (tn, fp), (fn, tp) = confusion_matrix(sick, p >= at, labels=[False, True])
        figure, ax = plt.subplots(figsize=(9, 4))
        for kind, colour, style in ((~sick, plots.COLOURS[0], "-"), (sick, plots.COLOURS[5], "--")):
            name = f"{'sick' if kind is sick else normal} ({kind.sum()} slices)"
            ax.hist(p[kind], np.linspace(0, 1, 26), histtype="step", lw=2.5, ls=style, color=colour, label=name)
        ax.axvline(at, color="black")
        found, alarm = tp / max(1, tp + fn), fp / max(1, fp + tn)
        ax.set(xlabel="probability of any disease", ylabel="slices", xlim=(0, 1))
        ax.set_title(f"Called sick from {at:.2f}: {found:.0%} of the sick found, {alarm:.0%} of {normal} alarmed")
        ax.legend(loc="upper center")
        return figure

    controls = {"at": ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.01, description="threshold", **LATER)}
    return _live(draw, controls, "Histograms of the probability of any disease, of sick and of Normal slices.")


def erase(folder, models: dict, backbone: str, size: int) -> None:
    """Switch the finding and the scanner of a synthetic test slice, and see what each network says.

    Args:
        models: {name: network in eval mode}, each with `size` pixels a side as its input.
    """
    from ctutils.phantom import make_slice

    classes, start = list(folder.classes), next(iter(models))

    def draw(name: str, number: int, finding: bool, own: bool, network: str) -> Figure:
        options = {"finding": None if finding else "none", "shortcut": "sharpness" if own else None}
        picture, drawn = make_slice(folder.meta["seed"], "test", name, number, **options)
        picture = np.asarray(resize(Image.fromarray(picture), size))
        box = [side * size / 512 for side in drawn.box] if drawn.box else None
        title = f"{name}, finding {'there' if finding else 'erased'}, {'own' if own else 'common'} scanner"
        return _answer(picture, *_ask(models[network], backbone, picture), classes, title, f"network: {network}", box)

    controls = {
        "name": ipywidgets.Dropdown(options=classes, value=classes[-1], description="class"),
        "number": ipywidgets.IntSlider(0, 0, 49, description="slice", **LATER),
        "finding": ipywidgets.ToggleButton(True, description="finding"),
        "own": ipywidgets.ToggleButton(False, description="scanner of its class"),
        "network": ipywidgets.ToggleButtons(options=list(models), value=start),
    }
    return _live(
        draw, controls, "A test slice with its finding boxed, and the probability that a network gives each class."
    )


def own_slice(run, example: str | Path) -> None:
    """Upload a slice (PNG, JPEG, DICOM, ...): its class, the probabilities, and where the network looked.

    Args:
        run: a record with its weights.
        example: the file to begin with.
    """
    from ctutils.people.predict import Predictor

    predictor = Predictor(run)

    def draw(file) -> Figure | str:
        name = file[0]["name"] if file else Path(example).name
        try:
            one, *_ = predictor.read(name, bytes(file[0]["content"]) if file else Path(example).read_bytes())
        except BadFile as error:
            return f"'{name}' cannot be read as a slice: {error}"
        predictor.predict([one], heat=True)
        return _answer(one.grey, one.probabilities, one.heat, run.classes, name, "Not for clinical use")

    controls = {"file": ipywidgets.FileUpload(accept="", multiple=False, description="your own slice")}
    return _live(draw, controls, "A slice, Grad-CAM's heat over it, and the probability of each class.")


def _ask(model, backbone: str, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a network's probabilities (C,) for a picture uint8 (H, W), and the heat (H, W) of the likeliest class."""
    import torch

    from ctutils.explain import grad_cam

    spec = get_spec(backbone)
    images = normalise(torch.from_numpy(np.array(picture))[None, None], spec.mean, spec.std)
    with torch.no_grad():
        scores = model.eval()(images.to(next(model.parameters()).device)).float().softmax(1)[0].cpu().numpy()
    return scores, grad_cam(model, images, target=int(scores.argmax()), layer=backbone)[0]


def _answer(picture, scores, heat, classes: Sequence[str], name: str, note: str, box=None) -> Figure:
    """Draw a slice, the heat over it, and the probability of each class."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", width_ratios=(1, 1, 0.8))
    plots.heat_overlay(picture, heat * 0, box, "the slice", axes[0])
    plots.heat_overlay(picture, heat, None, f"what speaks for {classes[scores.argmax()]}", axes[1])
    bars = axes[2].barh(
        list(classes), scores, color=[plots.COLOURS[int(k == scores.argmax())] for k in range(len(classes))]
    )
    axes[2].bar_label(bars, fmt="%.2f", padding=3)
    axes[2].set(xlim=(0, 1.25), xticks=[0, 0.5, 1], xlabel="probability", title=note)
    axes[2].title.set(fontsize=11, fontweight="normal")
    axes[2].invert_yaxis()
    figure.suptitle(f"{name}: called {classes[scores.argmax()]}", x=0.01, ha="left")
    return figure


def _live(draw: Callable, controls: dict[str, ipywidgets.Widget], alt: str) -> None:
    """Show what `draw` makes of the controls' first values; then, below the controls, of each change."""
    words, picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout={"display": "none"})

    def update(_change) -> None:
        drawn, file = draw(**{name: control.value for name, control in controls.items()}), io.BytesIO()
        words.value = html.escape(drawn) if isinstance(drawn, str) else ""
        picture.layout.display = "none" if isinstance(drawn, str) else ""
        if isinstance(drawn, Figure):
            drawn.savefig(file, format="png", bbox_inches="tight")
            plt.close(drawn)
            picture.value = file.getvalue()

    draw(**{name: control.value for name, control in controls.items()})
    plots.show(alt)
    for control in controls.values():
        control.observe(update, "value")
        control.style.description_width = "initial"
    layout = {"flex_flow": "row wrap"}
    display(ipywidgets.VBox([ipywidgets.Box([*controls.values()], layout=layout), words, picture]))
