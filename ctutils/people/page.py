"""One self-contained page of predictions: no script, nothing fetched, pictures inside the file."""

import base64
import collections
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ctutils import metrics
from ctutils.card import limits
from ctutils.data import SliceFolder
from ctutils.people.predict import Prediction, Predictor
from ctutils.pictures import BadFile, resize
from ctutils.registry import BACKBONES

MOST = 200  # slices on one page: about 60 kB each
THUMB = 104  # pixels of a training slice


def render(
    predictor: Predictor,
    slices: Sequence[Prediction],
    failed: dict[str, str],
    *,
    folder: SliceFolder | None = None,
    warnings: Sequence[str] = (),
    limit_mb: int | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        predictor: the model, with what is known of its training slices.
        slices: predictions with Grad-CAM; of more than `MOST` the flagged and then the least sure ones are shown.
        failed: {name: why} of the files that were not read.
        folder: the training slices, for pictures of the similar ones; without it they are only named.
        warnings: sentences for the top of the page.
        limit_mb: show an upload box, and this limit.
    """
    import jinja2

    run, warnings = predictor.run, list(warnings)
    flagged, counts = sum(bool(one.unlike) for one in slices), collections.Counter(one.label for one in slices)
    summary = f"{len(slices)} slices: {', '.join(f'{n} {run.classes[k]}' for k, n in counts.most_common())}."
    summary = summary.replace("1 slices", "1 slice") if len(slices) == 1 else summary
    if predictor.reference is not None:
        summary += f" {flagged} flagged: unlike anything trained on."
    if len(slices) > MOST:
        order = sorted(slices, key=lambda one: (not one.unlike, one.calibrated.max()))
        shown = set(map(id, order[:MOST]))
        slices = [one for one in slices if id(one) in shown]
        rest = "Send fewer at a time." if limit_mb else "--csv has all."
        warnings.append(f"{MOST} of {len(order)} slices are shown: the flagged, then the least sure. {rest}")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=f"What the run '{run.name}' says",
        model=_about(run),
        limit_mb=limit_mb,
        warnings=warnings,
        summary=summary if slices else "",
        slices=[_slice(one, predictor, folder) for one in slices],
        failed=failed,
        temperature=f"{predictor.temperature:.2f}",
        val=len(run.y_true("val")),
        limits=limits(run),
    )


def _about(run) -> str:
    """Say in a line what the model is and what it scored."""
    data, split = run.record["data"], "test" if "test" in run.splits else "val"
    train = sum(data["counts"].get("train", {}).values())
    score = run.record["scores"][split]
    interval = f" (95 % interval {score['low']:.3f} to {score['high']:.3f})" if "low" in score else ""
    accuracy = metrics.accuracy(run.y_true(split), run.y_score(split).argmax(1))
    return (
        f"{BACKBONES[run.plan.backbone].title}, trained: {run.record['trained']}, on {train} slices of "
        f"'{data['name']}' ({data['kind']}), {run.plan.size} pixels. Macro F1 on {split} "
        f"{score['macro_f1']:.3f}{interval}, accuracy {accuracy:.3f}."
    )


def _slice(one: Prediction, predictor: Predictor, folder: SliceFolder | None) -> dict:
    classes, reference = predictor.run.classes, predictor.reference
    order = np.argsort(-one.calibrated, kind="stable")
    return {
        **{"image": one.image, "class": classes[one.label], "note": one.note, "unlike": one.unlike},
        "confidence": f"{one.calibrated[one.label]:.2f}",
        "distance": "" if one.distance is None else f"{one.distance:.2f}",
        "picture": _inline(Image.fromarray(one.grey)),
        "heat": _inline(overlay(one.grey, one.heat)),
        "classes": [
            (classes[k], f"{one.calibrated[k]:.3f}", f"{one.probabilities[k]:.3f}", f"{100 * one.calibrated[k]:.1f}")
            for k in order
        ],
        "similar": [
            {
                "class": classes[reference.labels[row]],
                "name": reference.paths[row].rsplit("/", 1)[-1],
                "picture": _training_slice(folder, reference.paths[row]),
            }
            for row in one.similar
        ],
    }


def overlay(grey: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Lay heat in [0, 1] (S, S) over a slice uint8 (S, S): the hotter, the more of the colour is seen."""
    from matplotlib import colormaps

    colour = colormaps["inferno"](heat)[..., :3] * 255
    share = 0.6 * heat[..., None]
    return Image.fromarray((grey[..., None] * (1 - share) + colour * share).astype(np.uint8))


def _training_slice(folder: SliceFolder | None, path: str) -> str:
    """Return a training slice as a small inline picture, or "" where it is not at hand."""
    if folder is None:
        return ""
    try:
        row = folder.slices.index[folder.slices["path"] == path][0]
        return _inline(Image.fromarray(resize(folder.read_grey(row), THUMB)))
    except (BadFile, IndexError):
        return ""


def _inline(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
