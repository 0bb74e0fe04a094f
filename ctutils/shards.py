"""A million slices: the decoded store and the features in parts, by as many processes as there are."""

import numpy as np

from ctutils.base import CTError
from ctutils.config import Settings
from ctutils.data import Rows, build_store, parts_of
from ctutils.experiment import build, featurise, load
from ctutils.features import adapt_cached, cached_features
from ctutils.pictures import resize
from ctutils.plan import Plan


def make_features(plan: Plan, settings: Settings, shard: tuple[int, int] = (0, 1)) -> dict:
    """Run the frozen part over a data set, and leave what it gives in the cache, where `train` finds it.

    The slices are taken in parts (`parts_of`). A part is whole or not there, so that the same command goes on where
    it was stopped; what another process makes is left to it. Parts are joined by whoever finds all of them.

    Args:
        plan: of a head that is trained on features.
        shard: (i, n): only the parts i, i + n, i + 2n, ...
    Returns:
        slices: of the data set; parts: of it; done: parts that are there.
    Raises:
        CTError: as `featurise`; a shard that is not one of 0 to n - 1; a plan without cached features.
    """
    number, shards = shard
    if not 0 <= number < shards:
        raise CTError(f"shard {number}/{shards}", "0/n to (n-1)/n", "count from 0")
    if not plan.cached:
        raise CTError("a plan whose whole network sees images", "one with features to cache", "leave the option out")
    folder = load(plan, settings)
    network, plan, count = build(plan, settings, folder), plan.resolved(settings), len(folder.slices)
    shape = (count, plan.size, plan.size)
    backbone, about = network.whole.backbone, (network.spec, folder, settings)

    def decode(rows: np.ndarray) -> np.ndarray:
        return np.stack([resize(folder.read_grey(row), plan.size) for row in rows])

    if network.bn == "adapt":
        store, options = Rows(shape, decode), {"precision": plan.precision, "seed": plan.seed}
        adapt_cached(network.whole, network.weights.sha256, store, *about, **options)
    parts = [part or range(count) for part in parts_of(count)]

    def part_features(part: range, make: bool):
        def read(rows: np.ndarray) -> np.ndarray:
            known = part if len(parts) > 1 else None
            return build_store(folder, plan.size, cache=settings.cache_dir, part=known)[rows - part.start]

        options = {"rows": np.arange(part.start, part.stop), "precision": plan.precision, "make": make}
        return cached_features(backbone, Rows(shape, read), *about, **options)

    whole = range(count)
    if part_features(whole, make=False) is None:
        for part in parts[number::shards]:
            part_features(part, make=True)
        done = sum(part_features(part, make=False) is not None for part in parts)
        if done < len(parts):
            return {"slices": count, "parts": len(parts), "done": done}
    if shards == 1:
        featurise(plan, settings, folder, network)
    return {"slices": count, "parts": len(parts), "done": len(parts)}
