"""How often does the 95 % interval hold the truth, and how often does the paired test cry wolf?

    python tests/bench/interval_coverage.py [--repetitions 1000] [--draws 1000] [--seed 0] [--only slices|patients]

Test sets are collected again and again from a known truth. A slice is wrong with a chance of its own patient's:
beta distributed around 1 - accuracy, so that `icc` is the correlation of two slices of one patient. Of the wrong
ones 70 % go to the next class, 30 % to the one before. `alarms` counts verdicts on two models that are equally good
and err alike on 60 % of the slices; wanted are 93 to 97 % covered and 3 to 7 % alarms, fewer where `split`, the slices
that only one of the two gets right, is below eight.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ctutils.metrics import paired_difference, score_interval  # noqa: E402

DECK, RARE = (50, 50, 200, 50, 50), (200, 100, 60, 10, 5)
SLICES = (  # slices a class, accuracy
    *[((125, 125, 500, 125, 125), accuracy) for accuracy in (0.93, 0.99)],
    *[(DECK, accuracy) for accuracy in (0.8, 0.93, 0.98, 0.995)],
    *[((25, 25, 100, 25, 25), accuracy) for accuracy in (0.5, 0.8, 0.95)],
    *[(RARE, accuracy) for accuracy in (0.85, 0.97)],
    *[((500, 300, 120, 60, 20), accuracy) for accuracy in (0.9, 0.97)],
    *[(counts, 0.9) for counts in ((60, 60), (200, 50), (40, 40, 40))],
    *[((10,) * 10, 0.7), ((30,) * 10, 0.75), ((50,) * 10, 0.95)],
)
PATIENTS = tuple((DECK, accuracy, icc, per) for per in (4, 10) for icc in (0.0, 0.2, 0.5) for accuracy in (0.8, 0.95))


def collect(y_true, patient, accuracy, icc, rng):
    """Return what two equally good models call the slices: int (2, N)."""
    chance = np.full(len(y_true), 1 - accuracy)
    if icc:
        a, b = (share * (1 - icc) / icc for share in (1 - accuracy, accuracy))
        chance = rng.beta(a, b, patient.max() + 1)[patient]
    classes, shape = y_true.max() + 1, (2, len(y_true))
    step = np.where(rng.random(shape) < chance, np.where(rng.random(shape) < 0.7, 1, classes - 1), 0)
    step[1] = np.where(rng.random(len(y_true)) < 0.6, step[0], step[1])
    return (y_true + step) % classes


def truth(counts, accuracy):
    """Return the macro F1 of endlessly many slices in the proportions of `counts`."""
    to = np.diag(np.multiply(counts, accuracy))
    for k, count in enumerate(counts):
        to[k, (k + 1) % len(counts)] += 0.7 * (1 - accuracy) * count
        to[k, k - 1] += 0.3 * (1 - accuracy) * count
    return np.mean(2 * np.diag(to) / (to.sum(axis=0) + to.sum(axis=1)))


def measure(counts, accuracy, icc, per, repetitions, draws, seed):
    """Print a row of the table; with `per` slices a patient also what comes out when patients are drawn."""
    rng, y_true, true = np.random.default_rng(seed), np.repeat(np.arange(len(counts)), counts), truth(counts, accuracy)
    first = np.repeat(np.cumsum([0, *counts[:-1]]), counts)  # uneven patients of one class each, numbered by row
    patient = first + rng.integers(0, np.repeat(np.maximum(np.array(counts) // per, 2), counts))
    row = f"{','.join(map(str, counts))[:19]:<20}{accuracy:<7}{icc:<5}{per:<4}{(1 - accuracy) * len(y_true):<6.0f}"
    for way in (None, patient.astype(str)) if per > 1 else (None,):
        held, width, alarms, split = [], [], [], []
        for repetition in range(repetitions):
            a, b = collect(y_true, patient, accuracy, icc, rng)
            options = {"n": draws, "seed": repetition, "num_classes": len(counts), "patients": way}
            _, low, high = score_interval(y_true, a, **options)
            held.append(low <= true <= high)
            width.append(high - low)
            alarms.append(paired_difference(y_true, a, b, **options).verdict.endswith("is higher"))
            split.append(np.sum((a == y_true) != (b == y_true)))
        row += (
            f"{100 * np.mean(held):>8.1f} ({np.mean(width):.3f}) {100 * np.mean(alarms):>5.1f} {np.mean(split):>5.1f}"
        )
    print(row, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("repetitions", 1000), ("draws", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("slices", "patients"))
    options = parser.parse_args()
    designs = [(*design, 0.0, 1) for design in SLICES] if options.only != "patients" else []
    print("slices a class      acc.   icc  per wrong  covered (width) alarms split, then the same with patients drawn")
    for design in designs + (list(PATIENTS) if options.only != "slices" else []):
        measure(*design, options.repetitions, options.draws, options.seed)


if __name__ == "__main__":
    main()
