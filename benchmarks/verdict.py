"""The verdict against the base rule, on synthetic learning curves whose truth is known.

Each curve is measured round after round with training noise and with the noise of a holdout of 60, 100, 300 and 1000
images; both rules read the same measurements, and a replay ends when its rule says stop. The holdout's noise is that of
real detections: `--calibrate FOLDER` prints what the paired bootstrap gives for the rounds of an artifacts folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.stopping import should_stop, verdict
from strategies.verdict import TRAINING_SD, WORTH_GAIN
from worker.evaluation import EvaluationArrays, average_precision, bootstrap_map50

Vector = NDArray[np.float64]

ROUNDS, LABELS_PER_ROUND = 12, 200
HOLDOUTS = (60, 100, 300, 1000)
REQUIRED_AT = 300
CURVES, QUICK_CURVES = 5000, 500
FLAT_WITHIN = 3
# Of 297 holdout images with 297 boxes of ten classes, three rounds: sd = .72 to .77 sqrt(p(1-p)/images), correlation of
# rounds one apart .58 (.12 with a first round of mAP50 .08), two apart .28; of 70 images with 343 boxes of eight
# classes: .30 to .52, .43 to .54 and .36. The worse of the two is used. See README.md, section "verdict".
SPREAD, CORRELATION = 0.77, 0.58
BOOTSTRAP_ERROR = 0.15  # of the SE that a verdict is given, relative: a bootstrap of one holdout is an estimate, too
SHAPES = {"power law": 0.2, "exponential": 0.2, "flat": 0.25, "steps": 0.15, "rising late": 0.1, "steady": 0.1}


@dataclass(frozen=True)
class Curve:
    """True mAP50 after each round. `flat_from`: the round from which on nothing is gained at all."""

    shape: str
    map50: Vector
    flat_from: int | None = None

    @property
    def gains(self) -> Vector:
        return np.diff(self.map50)

    @property
    def best_stop(self) -> int:
        """The last round that was worth its price."""
        worth = np.flatnonzero(self.gains >= WORTH_GAIN)
        return int(worth[-1]) + 1 if len(worth) else 0


@dataclass(frozen=True)
class Replay:
    """One curve under one rule: the round it stopped after (None: never), and the verdicts until then."""

    curve: Curve
    stopped: int | None
    verdicts: int
    insufficient: int

    @property
    def end(self) -> int:
        return ROUNDS - 1 if self.stopped is None else self.stopped

    @property
    def is_false(self) -> bool:
        """Stopped although the next round would have gained what a round is worth."""
        return self.end < ROUNDS - 1 and bool(self.curve.gains[self.end] >= WORTH_GAIN)


Rule = Callable[[Vector, Vector, int], str]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.verdict", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CURVES} curves, not {CURVES}")
    parser.add_argument("--json", action="store_true", help="end with one JSON line: the figures at holdout 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="the noise of real rounds, and nothing else")
    given = parser.parse_args(arguments)
    if given.calibrate is not None:
        calibrate(given.calibrate)
        return
    curves = draw_curves(QUICK_CURVES if given.quick else CURVES, np.random.default_rng(given.seed))
    print(f"{len(curves):,} curves of {ROUNDS} rounds; a round is worth its price from {WORTH_GAIN:g} mAP50 on")
    _print_head()
    at_required: dict[str, list[Replay]] = {}
    for holdout in HOLDOUTS:
        measured = [measure(curve, holdout, np.random.default_rng([given.seed, i])) for i, curve in enumerate(curves)]
        for name, rule in (("base rule", _base), ("verdict", _verdict)):
            replays = [replay(curve, *seen, holdout, rule) for curve, seen in zip(curves, measured, strict=True)]
            _print_row(holdout, name, figures(replays))
            if holdout == REQUIRED_AT:
                at_required[name] = replays
    for name, replays in at_required.items():
        _print_shapes(name, replays)
    if given.json:
        ours, base = figures(at_required["verdict"]), figures(at_required["base rule"])
        shown = {name: ours[name] for name in ("false_stops", "flat_stopped", "insufficient")}
        print(json.dumps({**shown, "base_false_stops": base["false_stops"]}))


# --- truth ------------------------------------------------------------------------------------------------------------


def draw_curves(count: int, rng: np.random.Generator) -> list[Curve]:
    """Curves of every shape, in the shares of `SHAPES`."""
    shapes = rng.choice(list(SHAPES), size=count, p=list(SHAPES.values()))
    return [_DRAW[str(shape)](rng) for shape in shapes]


def _ends(rng: np.random.Generator) -> tuple[float, float]:
    """mAP50 of the first round, and what the curve tends to."""
    start = rng.uniform(0.1, 0.5)
    return float(start), float(rng.uniform(start + 0.1, 0.9))


def _power_law(rng: np.random.Generator) -> Curve:
    start, top = _ends(rng)
    time = 1 + np.arange(ROUNDS) * rng.choice([0.5, 1.0, 2.0])
    return Curve("power law", top - (top - start) * time ** -rng.uniform(0.3, 1.5))


def _exponential(rng: np.random.Generator) -> Curve:
    start, top = _ends(rng)
    return Curve("exponential", top - (top - start) * np.exp(-np.arange(ROUNDS) / rng.uniform(0.7, 4)))


def _flat(rng: np.random.Generator) -> Curve:
    """Rises for 0 to 5 rounds, then gains nothing at all."""
    start, top = _ends(rng)
    rise, pace = int(rng.integers(0, 6)), rng.uniform(0.7, 3)
    if not rise:
        return Curve("flat", np.full(ROUNDS, top), 0)
    done = (1 - np.exp(-np.minimum(np.arange(ROUNDS), rise) / pace)) / (1 - math.exp(-rise / pace))
    return Curve("flat", start + (top - start) * done, rise)


def _steps(rng: np.random.Generator) -> Curve:
    """Saturates, and then jumps by .03 to .10 once or twice: a class is understood at last."""
    curve = _exponential(rng).map50
    for _ in range(int(rng.integers(1, 3))):
        curve = curve + (np.arange(ROUNDS) >= rng.integers(2, ROUNDS)) * rng.uniform(0.03, 0.1)
    return Curve("steps", np.minimum(curve, 0.97))


def _rising_late(rng: np.random.Generator) -> Curve:
    start, top = _ends(rng)
    middle, pace = rng.uniform(3, 8), rng.uniform(0.6, 1.5)
    return Curve("rising late", start + (top - start) / (1 + np.exp(-(np.arange(ROUNDS) - middle) / pace)))


def _steady(rng: np.random.Generator) -> Curve:
    """Each round gains the same, one to two times what it is worth: the hardest to tell from the end."""
    gain = rng.uniform(1, 2) * WORTH_GAIN
    return Curve("steady", np.minimum(rng.uniform(0.1, 0.5) + gain * np.arange(ROUNDS), 0.97))


_DRAW = {
    "power law": _power_law,
    "exponential": _exponential,
    "flat": _flat,
    "steps": _steps,
    "rising late": _rising_late,
    "steady": _steady,
}


# --- measurement ------------------------------------------------------------------------------------------------------


def measure(curve: Curve, holdout: int, rng: np.random.Generator) -> tuple[Vector, Vector]:
    """mAP50 as measured in each round, (R,), and the covariance that a bootstrap would tell, (R, R)."""
    trained = curve.map50 + rng.normal(scale=TRAINING_SD, size=ROUNDS)
    sample = rng.multivariate_normal(np.zeros(ROUNDS), _covariance(curve.map50, holdout))
    seen = np.clip(trained + sample, 0, 1)
    told = _covariance(seen, holdout) * math.exp(2 * rng.normal(scale=BOOTSTRAP_ERROR))
    return seen, told


def _covariance(map50: Vector, holdout: int) -> Vector:
    sd = SPREAD * np.sqrt(np.clip(map50 * (1 - map50), 1e-6, None) / holdout)
    apart = np.abs(np.subtract.outer(np.arange(len(map50)), np.arange(len(map50))))
    return np.asarray(np.outer(sd, sd) * CORRELATION**apart, dtype=np.float64)


def replay(curve: Curve, seen: Vector, covariance: Vector, holdout: int, rule: Rule) -> Replay:
    """Round after round, until the rule says stop."""
    insufficient = 0
    for rounds in range(2, ROUNDS + 1):
        advice = rule(seen[:rounds], covariance[:rounds, :rounds], holdout)
        if advice == "stop":
            return Replay(curve, rounds - 1, rounds - 1, insufficient)
        insufficient += advice == "insufficient_evidence"
    return Replay(curve, None, ROUNDS - 1, insufficient)


def _base(seen: Vector, covariance: Vector, holdout: int) -> str:
    return "stop" if should_stop(seen) else "continue"


def _verdict(seen: Vector, covariance: Vector, holdout: int) -> str:
    labels = LABELS_PER_ROUND * np.arange(1, len(seen) + 1)
    return verdict(seen, labels, holdout_images=holdout, covariance=covariance, extrapolate=False).verdict


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(replays: Sequence[Replay]) -> dict[str, float]:
    """Shares, and means over all replays. flat_stopped: of the flat curves, stopped within 3 rounds of flatness."""
    stops = [one for one in replays if one.stopped is not None]
    flat = [one for one in replays if one.curve.flat_from is not None]
    in_time = [one for one in flat if _in_time(one)]
    wasted = [max(0, one.end - one.curve.best_stop) * LABELS_PER_ROUND for one in replays]
    forgone = [max(0.0, float(one.curve.map50[one.curve.best_stop] - one.curve.map50[one.end])) for one in replays]
    false = sum(one.is_false for one in replays)
    return {
        "false_stops": round(false / len(replays), 4),
        "false_of_stops": round(false / max(len(stops), 1), 4),
        "flat_stopped": round(len(in_time) / max(len(flat), 1), 4),
        "insufficient": round(sum(one.insufficient for one in replays) / sum(one.verdicts for one in replays), 4),
        "labels_wasted": round(float(np.mean(wasted)), 1),
        "map_forgone": round(float(np.mean(forgone)), 4),
    }


def _in_time(one: Replay) -> bool:
    """Stopped in the first three rounds that gained nothing, not before them."""
    first = one.curve.flat_from
    return first is not None and one.stopped is not None and first <= one.stopped <= first + FLAT_WITHIN


_COLUMNS = ("false_stops", "false_of_stops", "flat_stopped", "insufficient", "labels_wasted", "map_forgone")


def _print_head() -> None:
    print(f"{'holdout':>7}  {'rule':<9}  " + "  ".join(f"{name:>14}" for name in _COLUMNS))


def _print_row(holdout: int, name: str, found: dict[str, float]) -> None:
    print(f"{holdout:>7}  {name:<9}  " + "  ".join(f"{_shown(column, found[column]):>14}" for column in _COLUMNS))


def _shown(column: str, value: float) -> str:
    form = {"labels_wasted": ".0f", "map_forgone": ".3f"}.get(column, ".1%")
    return format(value, form)


def _print_shapes(name: str, replays: Sequence[Replay]) -> None:
    def share(shape: str) -> str:
        these = [one for one in replays if one.curve.shape == shape]
        return f"{shape} {sum(one.is_false for one in these) / max(len(these), 1):.1%}"

    print(f"false stops by shape at holdout {REQUIRED_AT}, {name}: " + ", ".join(share(shape) for shape in SHAPES))


def calibrate(folder: Path) -> None:
    """The holdout's noise in the rounds of one project, by the paired bootstrap: `evaluation.npz` of each."""
    files = sorted(folder.rglob("evaluation.npz"))
    rounds = [EvaluationArrays.load(file.read_bytes()) for file in files]
    if not rounds:
        raise SystemExit(f"{folder} holds no evaluation.npz: give the folder of a project's rounds")
    measured = np.array([average_precision(one, np.unique(one.target_cls))[:, 0].mean() for one in rounds])
    samples = bootstrap_map50(rounds, 2000)
    n, sd = len(rounds[0].keys), samples.std(0)
    found: dict[str, Any] = {
        "holdout": n,
        "boxes": len(rounds[0].target_cls),
        "map50": measured.round(3).tolist(),
        "sd": sd.round(4).tolist(),
        "spread": (sd * math.sqrt(n) / np.sqrt(measured * (1 - measured))).round(2).tolist(),
        "correlation": np.corrcoef(samples.T).round(2).tolist(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
