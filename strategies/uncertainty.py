"""How unsure the detector is: per box from class probabilities, then per image.

High means more uncertain. YOLO heads are sigmoids, so their C outputs do not sum to 1, and entropy or margin over
them raw means little: `with_background` conditions on "at most one class is there" first. `image_uncertainty` does
that for margin and entropy; the measures themselves compute on the rows they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.arrays import as_count, as_probabilities, as_vector
from strategies.errors import InputInvalid, nearest_name

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

AGGREGATES = ("max", "min", "mean", "top_n_mean", "sum", "open")
EMPTY_POLICIES = ("uncertain", "certain", "best_candidate", "calibrated")

_SMALLEST_PROBABILITY = 1e-7  # keeps the odds p / (1 - p) finite at both ends


def with_background(probabilities: ArrayLike) -> Matrix:
    """Turn independent sigmoids into one distribution over background and classes.

    o_c = p_c / (1 - p_c); pi_0 = 1 / (1 + sum o); pi_c = o_c / (1 + sum o), which is softmax([0, logits]).

    Args: probabilities (N, C) in [0, 1], clipped to [1e-7, 1 - 1e-7].
    Returns: (N, C + 1), rows sum to 1, **column 0 is the background**. No boxes: (0, C + 1).
    Raises: InputInvalid for NaN, wrong shape or values outside [0, 1].
    """
    clipped = np.clip(as_probabilities(probabilities), _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    odds = np.concatenate([np.ones((len(clipped), 1)), clipped / (1 - clipped)], axis=1)
    rows: Matrix = odds / odds.sum(axis=1, keepdims=True)
    return rows


def least_confidence(probabilities: ArrayLike) -> Vector:
    """1 - max_c p_c per row (Lewis & Gale 1994).

    Args: probabilities (N, C) in [0, 1]; rows need not sum to 1.
    Returns: (N,) in [0, 1], high = more uncertain; no rows: (0,).
    Raises: InputInvalid for NaN, wrong shape or values outside [0, 1].
    """
    rows = as_probabilities(probabilities)
    return 1 - rows.max(axis=1) if len(rows) else np.zeros(0)


def margin(probabilities: ArrayLike) -> Vector:
    """1 - (largest - second largest) per row (Scheffer et al. 2001). With C = 1 the second largest is 0.

    Args: probabilities (N, C) in [0, 1]. Rows that do not sum to 1 are computed as they are: two sigmoids at 0.01
        look maximally unsure. Pass `with_background` rows for a detector.
    Returns: (N,) in [0, 1], high = more uncertain; no rows: (0,).
    Raises: InputInvalid for NaN, wrong shape or values outside [0, 1].
    """
    rows = as_probabilities(probabilities)
    if not len(rows):
        return np.zeros(0)
    ordered = np.sort(rows, axis=1)
    second = ordered[:, -2] if rows.shape[1] > 1 else np.zeros(len(rows))
    result: Vector = 1 - (ordered[:, -1] - second)
    return result


def entropy(probabilities: ArrayLike) -> Vector:
    """-sum_c p_c ln p_c / ln C per row (Shannon 1948); C = 1 gives 0.

    Args: probabilities (N, C) in [0, 1]. Rows that do not sum to 1 are computed as they are and clipped to [0, 1];
        pass `with_background` rows for a detector.
    Returns: (N,) in [0, 1], high = more uncertain; no rows: (0,).
    Raises: InputInvalid for NaN, wrong shape or values outside [0, 1].
    """
    rows = as_probabilities(probabilities)
    if not len(rows) or rows.shape[1] == 1:
        return np.zeros(len(rows))
    logarithms = np.log(rows, out=np.zeros_like(rows), where=rows > 0)  # 0 ln 0 = 0
    nats = -(rows * logarithms).sum(axis=1)
    result: Vector = np.clip(nats / np.log(rows.shape[1]), 0.0, 1.0)
    return result


@dataclass(frozen=True)
class Measure:
    """A per-box measure and how an image is read with it unless told otherwise.

    `threshold` is the confidence (max_c p_c) from which boxes count, inclusive; `empty` names what an image without
    such a box is; `background` says whether the measure sees `with_background` rows.
    """

    function: Callable[[ArrayLike], Vector]
    threshold: float
    empty: str
    background: bool


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "least_confidence": Measure(least_confidence, 0.25, "uncertain", background=False),
        "margin": Measure(margin, 0.05, "best_candidate", background=True),
        "entropy": Measure(entropy, 0.05, "best_candidate", background=True),
    }
)


def aggregate(values: ArrayLike, method: str = "max", n: int = 10) -> float:
    """Bring the uncertainties of the boxes of one image to one number.

    Args: values (N,), N >= 1, finite; method: "max" (the weakest link), "min" (even the best detection is weak),
        "mean", "top_n_mean" (mean of the n largest, of all when there are fewer), "sum" (favours crowded images,
        leaves [0, 1]), "open" (log(1 + sum) + 2 min, leaves [0, 1]: how many boxes are unsure, by order of magnitude,
        and whether anything is sure at all; see benchmarks/dividend).
    Raises: InputInvalid for no values (what an empty image is worth is a policy: see `image_uncertainty`), NaN, an
        unknown method or n < 1.
    """
    boxes = as_vector(values, "values")
    check_choice(method, AGGREGATES, "aggregate method")
    largest = as_count(n, "n")
    if not len(boxes):
        raise InputInvalid("There are no values to aggregate. Decide what an image without boxes is worth.")
    if method == "top_n_mean":
        return float(np.sort(boxes)[-largest:].mean())
    if method == "open":
        return float(np.log1p(boxes.sum()) + 2 * boxes.min())
    reduced: dict[str, float] = {"max": boxes.max(), "min": boxes.min(), "mean": boxes.mean(), "sum": boxes.sum()}
    return float(reduced[method])


def image_uncertainty(
    probabilities: ArrayLike,
    measure: str = "least_confidence",
    threshold: float | None = None,
    empty: str | None = None,
    method: str = "max",
    n: int = 10,
    class_weights: ArrayLike | None = None,
    chance_missed: float | None = None,
) -> float:
    """Uncertainty of one image from the class probabilities of its boxes.

    Args: probabilities (N, C) sigmoid outputs of the kept candidates, down to a low threshold; measure: a name in
        MEASURES; threshold: boxes count when max_c p_c >= threshold; empty: worth of an image without such a box,
        "uncertain" (1), "certain" (0), "best_candidate" (the measure of the most confident box below the
        threshold; with no candidate at all, of a row of zeros: 1 for least_confidence, 0, certainly background, for
        margin and entropy) or "calibrated" (chance_missed times what "uncertain" is worth; while that chance is not
        known, "best_candidate"); method, n: see `aggregate`; class_weights: (C,) factors >= 0 on each box by its most
        likely class (see `class_weights`); policies other than "best_candidate" have no weight; chance_missed:
        in [0, 1], how likely an image without such a box holds something all the same, or None: not known.
        threshold and empty left None: 0.25 and "uncertain" for least_confidence (on the raw sigmoids), 0.05 and
        "best_candidate" for margin and entropy (on `with_background` rows).
    Returns: a float in [0, 1], high = more uncertain; with "sum", "open" or class weights it may exceed 1: Pool takes
        such values and the strategies rescale them over the pool.
    Raises: InputInvalid for NaN, wrong shapes, unknown names or a threshold outside [0, 1].
    """
    check_choice(measure, MEASURES, "measure")
    chosen = MEASURES[measure]
    rows = as_probabilities(probabilities)
    lowest = float(as_vector([chosen.threshold if threshold is None else threshold], "threshold", 1, 0.0, 1.0)[0])
    policy = chosen.empty if empty is None else empty
    check_choice(policy, EMPTY_POLICIES, "empty policy")
    weights = None if class_weights is None else _weights_for(class_weights, rows)
    confidence = rows.max(axis=1) if len(rows) else np.zeros(0)
    if (confidence >= lowest).any():
        return aggregate(_box_values(rows[confidence >= lowest], chosen, weights), method, n)
    chance = {"uncertain": 1.0, "certain": 0.0, "calibrated": chance_missed}.get(policy)
    if chance is None:
        return aggregate(_best_candidate(rows, confidence, chosen, weights), method, n)
    return float(as_vector([chance], "chance_missed", 1, 0.0, 1.0)[0]) * aggregate([1.0], method, n)


def _best_candidate(rows: Matrix, confidence: Vector, measure: Measure, weights: Vector | None) -> Vector:
    """(1,) of the most confident of an image's candidates."""
    if not len(rows):
        return np.array([0.0 if measure.background else 1.0])
    return _box_values(rows[[int(confidence.argmax())]], measure, weights)


def image_uncertainties(
    images: Sequence[ArrayLike],
    measure: str = "least_confidence",
    threshold: float | None = None,
    empty: str | None = None,
    method: str = "max",
    n: int = 10,
    class_weights: ArrayLike | None = None,
) -> Vector:
    """`image_uncertainty` of each of M images, each (N_i, C); returns (M,)."""
    return np.array(
        [image_uncertainty(image, measure, threshold, empty, method, n, class_weights) for image in images],
        dtype=np.float64,
    )


def class_weights(box_counts: ArrayLike) -> Vector:
    """w_c = clip(sqrt((median n + 10) / (n_c + 10)), 0.5, 3): rare classes count for more.

    Args: box_counts (C,) labelled boxes per class, >= 0, C >= 1.
    Returns: (C,) in [0.5, 3]; all counts equal (one class, or no labels yet): ones.
    Raises: InputInvalid for NaN, negative counts, wrong shape or no class.
    """
    counts = as_vector(box_counts, "box_counts", low=0.0)
    if not len(counts):
        raise InputInvalid("box_counts is empty: there is no class to weigh.")
    # + 10: a class seen twice is not yet known to be rarer than one seen four times
    weights: Vector = np.clip(np.sqrt((np.median(counts) + 10) / (counts + 10)), 0.5, 3.0)
    return weights


def uncertainty_scale(values: ArrayLike) -> float:
    """max(1, largest value): what divides uncertainties that left [0, 1] ("sum", "open", class weights) back into it.

    Values already in [0, 1] keep their meaning: the scale is 1, as it is for no values.
    """
    vector = as_vector(values, "uncertainty", low=0.0)
    return float(max(1.0, vector.max(initial=0.0)))


def scaled(values: ArrayLike, scale: float) -> Vector:
    """values / scale, clipped to [0, 1]: (N,) -> (N,)."""
    return np.clip(as_vector(values, "uncertainty", low=0.0) / scale, 0.0, 1.0)


def check_choice(value: str, allowed: Sequence[str] | Mapping[str, object], name: str) -> None:
    """InputInvalid, with the nearest allowed one, unless `value` is in `allowed`; `name` says what it is."""
    if value not in tuple(allowed):
        raise InputInvalid(f"Unknown {name} {value!r}.{nearest_name(value, allowed)} Allowed: {', '.join(allowed)}.")


def _box_values(rows: Matrix, measure: Measure, weights: Vector | None) -> Vector:
    values = measure.function(with_background(rows) if measure.background else rows)
    return values if weights is None else values * weights[rows.argmax(axis=1)]


def _weights_for(class_weights: ArrayLike, rows: Matrix) -> Vector:
    return as_vector(class_weights, "class_weights", rows.shape[1] if len(rows) else None, low=0.0)
