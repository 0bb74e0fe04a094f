"""How often does the 95 % interval hold the truth, and how often does the paired test cry wolf?

    python tests/bench/interval_coverage.py [--repetitions 1000] [--json FILE]

Slices get noisy class scores (Gaussian, some classes harder than others), so the true macro F1 is known from
400,000 further slices. Each repetition collects a new test set and asks `ctutils.metrics` for its interval;
and for the verdict on two models that are truly equal but differ slice by slice. Wanted: 93 to 97 % covered,
3 to 7 % false alarms. With fewer than about six slices on which two models disagree no test can reach 3 %.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ctutils.metrics import bootstrap_interval, macro_f1, paired_difference  # noqa: E402

SETS = {1000: (125, 125, 500, 125, 125), 200: (25, 25, 100, 25, 25)}  # the deck's validation set, and a fifth
EASE = np.array([0.9, 0.6, 1.2, 0.8, 1.0])  # the deck's Normal is the easiest


def draw_scores(y_true, strength, rng, shared=0.0, models=1):
    """Return (models, N, C) scores; `shared` of the noise is common to all models."""
    shape = (len(y_true), len(EASE))
    common = rng.standard_normal(shape)
    own = rng.standard_normal((models, *shape))
    scores = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
    scores[:, np.arange(len(y_true)), y_true] += strength * EASE[y_true]
    return scores


def true_macro_f1(strength, counts, rng, slices=400_000):
    """Return the macro F1 of endlessly many slices in the proportions of `counts`."""
    y_true = np.repeat(np.arange(len(counts)), np.array(counts) * slices // sum(counts))
    return macro_f1(y_true, draw_scores(y_true, strength, rng)[0].argmax(axis=1), len(counts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, rows = time.perf_counter(), []
    print(f"{'slices':>6} {'true F1':>8} {'covered %':>10} {'width':>7} {'below %':>8} {'above %':>8}", end="")
    print(f" {'false alarms %: 60 % shared noise':>34} {'independent':>12}")
    for size, counts in SETS.items():
        y_true = np.repeat(np.arange(len(counts)), counts)
        for strength in (1.5, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0):
            rng = np.random.default_rng([options.seed, size, int(10 * strength)])
            truth = true_macro_f1(strength, counts, rng)
            low, high, alarms = [], [], {0.6: 0, 0.0: 0}
            for repetition in range(options.repetitions):
                settings = {"n": options.draws, "seed": repetition}
                for shared in alarms:
                    a, b = draw_scores(y_true, strength, rng, shared, models=2)
                    verdict = paired_difference(y_true, a, b, **settings).verdict
                    alarms[shared] += verdict.endswith("is higher")
                interval = bootstrap_interval(y_true, a, **settings)
                low.append(interval.low)
                high.append(interval.high)
            low, high = np.array(low), np.array(high)
            row = {
                "slices": size,
                "true_macro_f1": truth,
                "covered": float(np.mean((low <= truth) & (truth <= high))),
                "width": float(np.mean(high - low)),
                "truth_below": float(np.mean(truth < low)),
                "truth_above": float(np.mean(truth > high)),
                "false_alarms_shared_60": alarms[0.6] / options.repetitions,
                "false_alarms_independent": alarms[0.0] / options.repetitions,
            }
            rows.append(row)
            print(
                f"{size:>6} {truth:>8.3f} {100 * row['covered']:>10.1f} {row['width']:>7.3f}"
                f" {100 * row['truth_below']:>8.1f} {100 * row['truth_above']:>8.1f}"
                f" {100 * row['false_alarms_shared_60']:>34.1f}"
                f" {100 * row['false_alarms_independent']:>12.1f}",
                flush=True,
            )
    report = {"repetitions": options.repetitions, "draws": options.draws, "seed": options.seed, "rows": rows}
    report["seconds"] = round(time.perf_counter() - started, 1)
    text = json.dumps(report)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
