"""How often does the 95 % interval hold the truth, and how often does the paired test cry wolf?

    python tests/bench/interval_coverage.py [--generator gaussian|hard|logit] [--sets deck-1000 ...]
        [--repetitions 1000] [--seed 0] [--json FILE]

Three makers of test sets with a known truth (the macro F1 of 400,000 further slices):
    gaussian  a slice's class scores are noise plus a lead for its class, some classes easier than others
    hard      every slice has a chance of its own to be called wrong (most none, some a high one), and every
              class is mistaken for its neighbours only
    logit     heavy-tailed scores (Student's t, 3 degrees), each class drawn toward the largest one
Each repetition collects a new test set, asks `ctutils.metrics` for the interval of a model's macro F1, and for
the verdict on two models that are truly equal but differ slice by slice: with noise of which 60 % is common to
both (`shared`), and with independent noise. Wanted: 93 to 97 % covered, 3 to 7 % false alarms. `split` is the
number of slices that only one of the two gets right: with fewer than about eight no test can keep to 5 %, as
heads or tails cannot tell so little apart, and a verdict must then be rarer.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ctutils.metrics import bootstrap_interval, macro_f1, paired_difference  # noqa: E402

SETS = {  # slices a class
    "deck-1000": (125, 125, 500, 125, 125),  # the deck's validation set
    "deck-400": (50, 50, 200, 50, 50),  # the course's synthetic test set
    "deck-200": (25, 25, 100, 25, 25),
    "balanced-300": (60, 60, 60, 60, 60),
    "binary-250": (200, 50),
    "rare-1000": (500, 300, 120, 60, 20),
    "ten-500": (50,) * 10,
}
TARGETS = (0.6, 0.75, 0.9, 0.95, 0.98, 0.99)  # macro F1
EASE = (0.9, 0.6, 1.2, 0.8, 1.0)  # the deck's Normal is the easiest


def gaussian(y_true, classes, strength, rng, shared, models):
    """Return labels (models, N) called by the highest of noisy scores."""
    return _from_noise(rng.standard_normal, y_true, classes, strength, rng, shared, models)


def logit(y_true, classes, strength, rng, shared, models):
    """As `gaussian`, with outliers and a pull toward class 0."""
    pull = np.zeros(classes)
    pull[0] = 0.4
    return _from_noise(lambda size: rng.standard_t(3, size), y_true, classes, strength, rng, shared, models, pull)


def _from_noise(noise, y_true, classes, strength, rng, shared, models, pull=0.0):
    shape = (len(y_true), classes)
    scores = np.sqrt(shared) * noise(shape) + np.sqrt(1 - shared) * noise((models, *shape)) + pull
    ease = np.resize(EASE, classes)
    scores[:, np.arange(len(y_true)), y_true] += strength * ease[y_true]
    return scores.argmax(axis=2)


def hard(y_true, classes, strength, rng, shared, models):
    """Return labels (models, N): a slice is wrong with its own probability, which two models may share."""
    rate = 1 / (1 + np.exp(strength - 2 + np.resize(EASE, classes)[y_true]))  # mean chance of an error
    own, common = rng.random((models, len(y_true))), rng.random(len(y_true))
    # Beta(0.3 r, 0.3 (1 - r)): nearly always 0 or 1 for one slice, so that both models stumble over the same.
    chance = rng.beta(0.3 * rate, 0.3 * (1 - rate)) if shared else rate
    wrong = np.where(rng.random(len(y_true)) < shared / 2, common < chance, own < chance)
    step = np.where(rng.random((models, len(y_true))) < 0.7, 1, classes - 1)  # the next class, or the one before
    return np.where(wrong, (y_true + step) % classes, y_true)


GENERATORS = {"gaussian": gaussian, "hard": hard, "logit": logit}


def true_macro_f1(generator, strength, counts, seed, slices=400_000):
    """Return the macro F1 of endlessly many slices in the proportions of `counts`."""
    rng = np.random.default_rng([seed, 1])
    y_true = np.repeat(np.arange(len(counts)), np.array(counts) * slices // sum(counts))
    return macro_f1(y_true, generator(y_true, len(counts), strength, rng, 0.0, 1)[0], len(counts))


def strength_for(generator, target, counts, seed):
    """Return the strength at which the generator's macro F1 is near `target`, and the macro F1 there."""
    low, high = -2.0, 40.0
    for _ in range(12):
        middle = (low + high) / 2
        below = true_macro_f1(generator, middle, counts, seed, 40_000) < target
        low, high = (middle, high) if below else (low, middle)
    return middle, true_macro_f1(generator, middle, counts, seed)


def measure(name, target, counts, options):
    """Return one row of the table: a set of a size and difficulty, made again and again."""
    generator, classes = GENERATORS[name], len(counts)
    strength, truth = strength_for(generator, target, counts, options.seed)
    y_true = np.repeat(np.arange(classes), counts)
    rng = np.random.default_rng([options.seed, len(y_true), int(1000 * target), list(GENERATORS).index(name)])
    low, high, split, alarms = [], [], [], {0.6: 0, 0.0: 0}
    for repetition in range(options.repetitions):
        settings = {"n": options.draws, "seed": repetition, "num_classes": classes}
        for shared in alarms:
            a, b = generator(y_true, classes, strength, rng, shared, 2)
            verdict = paired_difference(y_true, a, b, **settings).verdict
            alarms[shared] += verdict.endswith("is higher")
            if shared:
                split.append(np.sum((a == y_true) != (b == y_true)))
        interval = bootstrap_interval(y_true, a, **settings)
        low.append(interval.low)
        high.append(interval.high)
    low, high = np.array(low), np.array(high)
    return {
        "generator": name,
        "true_macro_f1": truth,
        "covered": float(np.mean((low <= truth) & (truth <= high))),
        "width": float(np.mean(high - low)),
        "truth_below": float(np.mean(truth < low)),
        "truth_above": float(np.mean(truth > high)),
        "split": float(np.mean(split)),
        "false_alarms_shared_60": alarms[0.6] / options.repetitions,
        "false_alarms_independent": alarms[0.0] / options.repetitions,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", choices=GENERATORS, nargs="+", default=list(GENERATORS))
    parser.add_argument("--sets", choices=SETS, nargs="+", default=list(SETS))
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="macro F1")
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, rows = time.perf_counter(), []
    print("                                                          truth, %    split   false alarms, %")
    print("generator set          true F1  covered %  width  below  above  shared  shared  independent")
    for name in options.generator:
        for set_name in options.sets:
            for target in options.targets:
                row = {"set": set_name, **measure(name, target, SETS[set_name], options)}
                rows.append(row)
                print(
                    f"{name:<9} {set_name:<12} {row['true_macro_f1']:>7.3f} {100 * row['covered']:>10.1f}"
                    f" {row['width']:>6.3f} {100 * row['truth_below']:>6.1f} {100 * row['truth_above']:>6.1f}"
                    f" {row['split']:>7.1f} {100 * row['false_alarms_shared_60']:>7.1f}"
                    f" {100 * row['false_alarms_independent']:>12.1f}",
                    flush=True,
                )
    report = {"repetitions": options.repetitions, "draws": options.draws, "seed": options.seed, "rows": rows}
    report["seconds"] = round(time.perf_counter() - started, 1)
    if options.json:
        options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}))


if __name__ == "__main__":
    main()
