"""When labelling more stops paying: the base rule and the statistics of a learning curve.

The base rule is deliberately simple; it knows nothing of noise. The verdict that weighs noise is `strategies.verdict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.arrays import as_vector
from strategies.errors import InputInvalid
from strategies.verdict import Verdict, verdict

__all__ = ["Verdict", "knee", "learning_curve_stats", "predicted_gain_estimable", "should_stop", "verdict"]

Vector = NDArray[np.float64]

MIN_MAP_GAIN = 0.005

_SMALLEST_GAIN = 1e-6  # the logarithm of a gain needs a positive one
# .815 - .81 is .00499999999999989 in binary; gains are compared as the decimals they were.
_DECIMALS = 12


def should_stop(map_history: ArrayLike, min_map_gain: float = MIN_MAP_GAIN) -> bool:
    """Whether the last gain, mAP50_t - mAP50_(t-1), is below min_map_gain. A gain of exactly min_map_gain goes on.

    Args: map_history (R,) mAP50 of each round, in [0, 1], oldest first. Fewer than 2 points: False.
    Raises: InputInvalid for NaN, wrong shape, values outside [0, 1] or a min_map_gain that is not finite.
    """
    history = _history(map_history)
    smallest = float(as_vector([min_map_gain], "min_map_gain", 1)[0])
    return len(history) >= 2 and bool(round(history[-1] - history[-2], _DECIMALS) < smallest)


def learning_curve_stats(map_history: ArrayLike, labeled_counts: ArrayLike) -> dict[str, Any]:
    """What each round bought, and what the next is expected to buy.

    Args: map_history (R,) mAP50 in [0, 1] and labeled_counts (R,) labels >= 0, oldest first.
    Returns: gains_per_round (rounded to 4), roi_per_100_labels (gain per 100 labels added, rounded to 5; a round that
        added no labels has no entry), predicted_gain_next_round (4), current_map50 (4), recommendation ("continue" or
        "stop": the predicted gain is below 0.005), note. With fewer than 3 points only recommendation ("continue") and
        note. The prediction fits g(n) = g0 exp(-lambda n) by least squares on ln(max(gain, 1e-6)), n = 0, 1, 2..., and
        is read at n = number of gains; with 2 gains it is the last gain. See `predicted_gain_estimable` for when it
        means anything.
    Raises: InputInvalid for NaN, unequal lengths or values out of range.
    """
    history = _history(map_history)
    counts = as_vector(labeled_counts, "labeled_counts", len(history), low=0.0)
    if len(history) < 3:
        missing = 3 - len(history)
        return {
            "recommendation": "continue",
            "note": f"A learning curve needs at least 3 points: {missing} more round{'s' * (missing > 1)} to go.",
        }
    gains, added = np.diff(history), np.diff(counts)
    predicted = _predicted_gain(gains)
    stop = round(predicted, _DECIMALS) < MIN_MAP_GAIN
    return {
        "gains_per_round": [round(float(gain), 4) for gain in gains],
        "roi_per_100_labels": [
            round(float(gain / (labels / 100)), 5) for gain, labels in zip(gains, added, strict=True) if labels > 0
        ],
        "predicted_gain_next_round": round(predicted, 4),
        "current_map50": round(float(history[-1]), 4),
        "recommendation": "stop" if stop else "continue",
        "note": f"The next round is predicted to gain {predicted:.4f} mAP50, "
        f"{'less than' if stop else 'at least'} the {MIN_MAP_GAIN:g} that makes a round worth its labels.",
    }


def predicted_gain_estimable(gains: ArrayLike) -> bool:
    """Whether the decay fit of `learning_curve_stats` says anything: at least 2 gains, all positive, not growing.

    Gains of -.01, .02, .05 would predict +50 mAP: an exponential through growing gains runs away.

    Args: gains (G,), oldest first. Raises InputInvalid for NaN or a wrong shape.
    """
    values = as_vector(gains, "gains")
    if len(values) < 2 or values.min() <= 0:
        return False
    return bool(_decay(values)[0] <= 1e-9)  # equal gains fit a slope of rounding size


def knee(labels: ArrayLike, map50: ArrayLike) -> int | None:
    """The label count of the point farthest above the chord of the curve, both axes normalised; for display only.

    (Satopaa et al. 2011, "Kneedle".) The chord joins the first and the last point; the first wins a tie.

    Args: labels (R,) rising, map50 (R,) in [0, 1].
    Returns: a label count; None with fewer than 3 points, on a flat curve or when no point lies above the chord.
    Raises: InputInvalid for NaN, unequal lengths, values out of range or labels that fall.
    """
    curve = _history(map50)
    counts = as_vector(labels, "labels", len(curve), low=0.0)
    if any(later < earlier for earlier, later in pairwise(counts)):
        raise InputInvalid("labels must not fall from one round to the next. Give the points oldest first.")
    if len(curve) < 3 or counts[-1] == counts[0] or np.ptp(curve) == 0:
        return None
    across = (counts - counts[0]) / (counts[-1] - counts[0])
    up = (curve - curve[0]) / np.ptp(curve)
    above = np.round(up - across * up[-1], _DECIMALS)  # vertical; along the chord's normal the order is the same
    return int(counts[above.argmax()]) if above.max() > 0 else None


def _history(value: ArrayLike) -> Vector:
    return as_vector(value, "map50", None, 0.0, 1.0)


def _predicted_gain(gains: Vector) -> float:
    if len(gains) < 3:
        return float(gains[-1])
    slope, start = _decay(gains)
    return float(np.exp(start + slope * len(gains)))


def _decay(gains: Vector) -> Sequence[float]:
    """Slope (-lambda) and start (ln g0) of the line through ln(gain)."""
    slope, start = np.polyfit(np.arange(len(gains)), np.log(np.maximum(gains, _SMALLEST_GAIN)), 1)
    return float(slope), float(start)
