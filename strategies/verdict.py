"""The verdict on a learning curve: continue, stop, or insufficient evidence, with noise weighed and reasons in words.

Two noises blur a gain. The holdout is a sample: the paired bootstrap over its images (`worker.evaluation`) gives the
covariance of the rounds' mAP50. And a training repeated with another seed ends elsewhere: `TRAINING_SD` per model.
Everything here is advice: nothing stops by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.arrays import as_vector
from strategies.errors import InputInvalid

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Advice = Literal["continue", "stop", "insufficient_evidence"]

WORTH_GAIN = 0.02
TRAINING_SD = 0.0075  # of mAP50: replays of one training differed by up to this much
LEVEL = 0.90  # of every interval: 5 % of the cases lie above it, 5 % below
VISIBLE = 2.5  # SEs of the smallest gain that one sees: one-sided 5 %, 80 % power (1.645 + .842)
RARE_BOXES = 30  # holdout boxes of a class under which its AP is mostly luck

_Z = 1.6449  # normal quantile of LEVEL
_ROUNDS_USED = 2
_PRIOR_TRAININGS = 4.0  # repeated trainings that TRAINING_SD counts for when some were seen
_NAMES_SHOWN = 8
_COARSE = 0.0195  # mAP from which two digits are enough
# What real detections gave (README of the benchmarks): the variance of an AP50 is .5 p(1-p)/boxes, and the rounds of
# one holdout correlate at .55 or more.
_SPREAD = 0.5
_CORRELATION = 0.55
_UNKNOWN_SD = 0.385  # of mAP50 times the root of the images, where boxes are not known: ten classes, a box an image


@dataclass(frozen=True)
class ClassCurve:
    """AP50 of one class in every round (None: not measured), and its boxes in the holdout now."""

    name: str
    ap50: Sequence[float | None]
    boxes: int


@dataclass(frozen=True)
class Extrapolation:
    """The curve mAP50 = a - b * labels^-c, and what it says of the next round. Intervals hold `LEVEL`."""

    a: float
    b: float
    c: float
    next_labels: int
    next_map50: float
    next_map50_low: float
    next_map50_high: float
    next_gain: float
    next_gain_low: float
    next_gain_high: float
    line: list[tuple[int, float]]
    band: list[tuple[int, float, float]]


@dataclass(frozen=True)
class Verdict:
    """Advice. `reasons` begin with the headline; `warnings` are to be acknowledged, and veto nothing."""

    verdict: Advice
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    base_verdict: Advice
    base_reason: str
    numbers: Mapping[str, float | int | None]
    extrapolation: Extrapolation | None = None
    agrees: bool = True
    extrapolation_sentence: str = ""


@dataclass(frozen=True)
class GainEstimate:
    """Mean gain per round over the last `rounds_used` rounds, its SE, and the two noises that SE is made of."""

    mean: float
    se: float
    rounds_used: int
    holdout_sd: float = field(repr=False)  # of the mean gain; falls with the root of the holdout
    training_sd: float = field(repr=False)  # of the mean gain; does not

    @property
    def lower(self) -> float:
        return self.mean - _Z * self.se

    @property
    def upper(self) -> float:
        return self.mean + _Z * self.se


@dataclass(frozen=True)
class More:
    """How many more holdout images would help, and the smallest gain seen then. 0: none would, or none are needed."""

    images: int
    smallest_visible_gain: float


def verdict(
    map50: ArrayLike,
    labels: ArrayLike,
    *,
    holdout_images: int,
    covariance: ArrayLike | None = None,
    worth_gain: float = WORTH_GAIN,
    training_sd: float = TRAINING_SD,
    min_map_gain: float = 0.005,
    classes: Sequence[ClassCurve] = (),
    extrapolate: bool = True,
) -> Verdict:
    """Whether another round is worth its price.

    With the mean gain over the last two rounds and SE^2 = paired bootstrap over holdout images + training noise^2:
    stop when the upper end of its 90 % interval is below `worth_gain`, and the last round gained less than that too;
    continue when the lower end is above it; insufficient evidence when 2.5 SE > `worth_gain` (a gain of that size could
    not be seen); else continue. Fewer than 3 rounds never stop.

    Args:
        map50: (R,) in [0, 1], oldest first, all measured on one holdout.
        labels: (R,) training labels of each round.
        holdout_images: labelled holdout images that mAP50 was measured on.
        covariance: (R, R) of mAP50 over holdouts drawn anew (`worker.evaluation.bootstrap_map50`). None: what a holdout
            of that size gives on average (`expected_covariance`).
        worth_gain: mAP50 per round that is worth the round's price, > 0.
        training_sd: of mAP50 over repeated trainings (`training_noise`).
        min_map_gain: of the base rule, which is always given beside the verdict.
        classes: for the warnings.
        extrapolate: fit the curve too (needs 5 rounds; some milliseconds).

    Raises: InputInvalid for NaN, unequal lengths or values out of range.
    """
    curve = as_vector(map50, "map50", None, 0.0, 1.0)
    counts = as_vector(labels, "labels", len(curve), low=0.0)
    worth = _positive(worth_gain, "worth_gain")
    noise = _covariance(covariance, curve, holdout_images)
    base, base_reason = _base_rule(curve, min_map_gain)
    warnings = class_warnings(classes, worth)
    if len(curve) < 2:
        told = "Nothing could be measured yet." if not len(curve) else "One measured round has no gain to compare."
        return Verdict("insufficient_evidence", (told,), warnings, base, base_reason, _numbers(worth, holdout_images))
    gain = mean_gain(curve, noise, training_sd)
    last = float(curve[-1] - curve[-2])
    advice = _judge(gain, last, worth)
    more = more_holdout(gain, holdout_images, worth)
    fit = extrapolation(curve, counts, noise, training_sd) if extrapolate else None
    agrees, sentence = _compared(advice, fit, worth)
    return Verdict(
        advice,
        _reasons(advice, gain, last, worth, holdout_images, more),
        warnings,
        base,
        base_reason,
        _numbers(worth, holdout_images, gain, more, training_sd),
        fit,
        agrees,
        sentence,
    )


def mean_gain(map50: Vector, covariance: Matrix, training_sd: float = TRAINING_SD) -> GainEstimate:
    """Mean gain per round over the last two rounds (one, when there are only two points), with its noise."""
    used = min(_ROUNDS_USED, len(map50) - 1)
    first, last = len(map50) - 1 - used, len(map50) - 1
    variance = covariance[first, first] + covariance[last, last] - 2 * covariance[first, last]
    holdout = math.sqrt(max(float(variance), 0.0)) / used
    training = math.sqrt(2) * training_sd / used
    return GainEstimate(
        float(map50[last] - map50[first]) / used, math.hypot(holdout, training), used, holdout, training
    )


def expected_covariance(map50: ArrayLike, holdout_images: int, boxes: Sequence[float] = ()) -> Matrix:
    """(R, R) covariance of mAP50 between rounds that a holdout has on average, where there is no bootstrap.

    Var = .5 p(1-p) mean(1/boxes) / classes, rounds correlated at .55: what the bootstrap of real detections gave.

    Args: map50 (R,); boxes: holdout boxes per class (or those expected); without them, ten classes and a box an image.
    """
    curve = as_vector(map50, "map50", None, 0.0, 1.0)
    known = [max(float(count), 1.0) for count in boxes]
    if known:
        sd = np.sqrt(_SPREAD * curve * (1 - curve) * sum(1 / count for count in known)) / len(known)
    else:
        sd = 2 * _UNKNOWN_SD * np.sqrt(curve * (1 - curve) / max(holdout_images, 1))
    apart = np.abs(np.subtract.outer(np.arange(len(curve)), np.arange(len(curve))))
    return np.asarray(np.outer(sd, sd) * _CORRELATION ** apart.clip(max=2), dtype=np.float64)


def training_noise(map50: ArrayLike, labels: ArrayLike) -> float:
    """SD of mAP50 between trainings on the same labels: `TRAINING_SD`, moved by rounds that repeated a training.

    Rounds with equal label counts, one after the other, are taken for repeated trainings; TRAINING_SD weighs as much
    as four of them.
    """
    curve = as_vector(map50, "map50", None, 0.0, 1.0)
    counts = as_vector(labels, "labels", len(curve), low=0.0)
    squares, freedom = 0.0, 0
    for count in np.unique(counts):
        repeated = curve[counts == count]
        squares += float(((repeated - repeated.mean()) ** 2).sum())
        freedom += len(repeated) - 1
    return math.sqrt((_PRIOR_TRAININGS * TRAINING_SD**2 + squares) / (_PRIOR_TRAININGS + freedom))


def smallest_visible_gain(gain: GainEstimate, factor: float = 1.0) -> float:
    """The gain per round that 2.5 SE are, with a holdout `factor` times as large."""
    return VISIBLE * math.hypot(gain.holdout_sd / math.sqrt(factor), gain.training_sd)


def expected_gain(holdout_images: int, boxes: Sequence[float] = (), training_sd: float = TRAINING_SD) -> GainEstimate:
    """How well mean gains will be known, before any round was measured: three rounds at mAP50 .5, the noisiest."""
    curve = np.full(3, 0.5)
    return mean_gain(curve, expected_covariance(curve, holdout_images, boxes), training_sd)


def more_holdout(gain: GainEstimate, holdout_images: int, worth_gain: float = WORTH_GAIN) -> More:
    """Holdout images to add so that `worth_gain` can be seen; at most as many as there are (twice the present).

    0 when it can be seen already, or when adding them would change what can be seen by less than a tenth.
    """
    now = smallest_visible_gain(gain)
    if now <= worth_gain or holdout_images < 1:
        return More(0, now)
    room = (worth_gain / VISIBLE) ** 2 - gain.training_sd**2  # what the holdout's variance may be
    factor = 2.0 if room <= 0 else min(gain.holdout_sd**2 / room, 2.0)
    images = min(math.ceil((factor - 1) * holdout_images / 10) * 10, holdout_images)
    then = smallest_visible_gain(gain, 1 + images / holdout_images)
    return More(images, then) if then <= 0.9 * now or then <= worth_gain else More(0, now)


def power_sentence(holdout_images: int, visible: float, more: More) -> str:
    """ "With 60 holdout images gains under .06 cannot be told from luck; label 60 more to see .04." """
    if holdout_images < 1:
        images = f"{more.images} image{'s' * (more.images != 1)}"
        ask = f" Ask for {images}, drawn at random with the next batch." if more.images else ""
        return f"There is no holdout: nothing can be measured.{ask}"
    images = f"{holdout_images} holdout image{'s' * (holdout_images != 1)}"
    then = more.smallest_visible_gain
    alike = more.images > 0 and (in_words(visible) == in_words(then) or then < _COARSE <= visible)
    now_words, then_words = (f"{one:.3f}".removeprefix("0") if alike else in_words(one) for one in (visible, then))
    told = f"With {images} gains under {now_words} a round cannot be told from luck"
    return f"{told}; label {more.images} more to see {then_words}." if more.images else f"{told}."


def extrapolation(
    map50: Vector, labels: Vector, covariance: Matrix, training_sd: float = TRAINING_SD, n_samples: int = 400
) -> Extrapolation | None:
    """mAP50 = a - b n^-c by weighted least squares (a <= 1, b >= 0), with a bootstrap over both noises.

    (Figueroa et al. 2012 fit learning curves so, weighted.) The next round is as large as the last ones were (median).
    None with fewer than 5 points of distinct label counts, all above 0.
    """
    if len(np.unique(labels)) < 5 or labels.min() <= 0:
        return None
    total = covariance + training_sd**2 * np.eye(len(map50))
    draws = np.random.default_rng(0).multivariate_normal(map50, total, size=n_samples, method="eigh")
    step = float(np.median(np.diff(np.sort(labels))[np.diff(np.sort(labels)) > 0]))
    there = np.linspace(labels.min(), labels[-1] + step, 40)
    at = np.concatenate([[labels[-1], labels[-1] + step], there])
    curves, (a, b, c) = _fit_curves(np.vstack([map50, draws]), labels, 1 / np.diag(total), at)
    gains = curves[:, 1] - curves[:, 0]
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    low, high = np.percentile(curves[1:], tails, axis=0)
    gain_low, gain_high = np.percentile(gains[1:], tails)
    points = [round(float(one)) for one in there]
    return Extrapolation(
        a,
        b,
        c,
        round(float(labels[-1] + step)),
        float(curves[0, 1]),
        float(low[1]),
        float(high[1]),
        float(gains[0]),
        float(min(gain_low, gains[0])),
        float(max(gain_high, gains[0])),
        [(n, float(y)) for n, y in zip(points, curves[0, 2:], strict=True)],
        [(n, float(down), float(up)) for n, down, up in zip(points, low[2:], high[2:], strict=True)],
    )


def _fit_curves(
    curves: Matrix, labels: Vector, weights: Vector, at: Vector
) -> tuple[Matrix, tuple[float, float, float]]:
    """Fits of the rows of `curves` (S, R), read at `at` (S, len(at)); a, b, c of the first. c is tried on a grid."""
    best = np.full(len(curves), np.inf)
    read = np.zeros((len(curves), len(at)))
    first = (0.0, 0.0, 0.0)
    scale = labels.max()
    for c in np.geomspace(0.05, 4.0, 40):
        x = (labels / scale) ** -c
        a, b = _line(curves, x, weights)
        error = ((curves - a[:, None] + b[:, None] * x) ** 2 * weights).sum(1)
        better = error < best
        best = np.where(better, error, best)
        read[better] = (a[:, None] - b[:, None] * (at / scale) ** -c)[better]
        if better[0]:
            first = (float(a[0]), float(b[0] * scale**c), float(c))
    return read, first


def _line(curves: Matrix, x: Vector, weights: Vector) -> tuple[Vector, Vector]:
    """a and b of curves = a - b x, weighted, with b >= 0 and a <= 1."""
    share = weights / weights.sum()
    mean_x, mean_y = float(share @ x), curves @ share
    spread = float(share @ (x - mean_x) ** 2)
    slope = np.maximum(-((curves - mean_y[:, None]) * (x - mean_x)) @ share / max(spread, 1e-12), 0.0)
    a = mean_y + slope * mean_x
    too_high = a > 1
    through_one = np.maximum(((1 - curves) * x) @ share / float(share @ x**2), 0.0)
    return np.where(too_high, 1.0, a), np.where(too_high, through_one, slope)


def class_warnings(classes: Sequence[ClassCurve], worth_gain: float = WORTH_GAIN) -> tuple[str, ...]:
    """What to know before a stop is accepted: rare classes, and classes that still get better."""
    found = []
    rare = [f"{one.name} ({one.boxes})" for one in classes if one.boxes < RARE_BOXES]
    if rare:
        found.append(
            f"Fewer than {RARE_BOXES} holdout boxes: {_listed(rare)}. AP of such a class is mostly luck: a stop says "
            "little about it."
        )
    rising = [one.name for one in classes if still_rises(one, worth_gain)]
    if rising:
        hidden = " The mean over all classes hides it." if len(classes) > 1 else ""
        found.append(f"AP still rises: {_listed(rising)}.{hidden}")
    return tuple(found)


def still_rises(one: ClassCurve, worth_gain: float = WORTH_GAIN) -> bool:
    """AP50 rose in each of the last two rounds, by `worth_gain` a round or more, and by more than its noise."""
    recent = [value for value in one.ap50[-3:] if value is not None]
    if len(recent) < 3 or not recent[0] < recent[1] < recent[2]:
        return False
    covariance = expected_covariance(recent, 1, [one.boxes])
    gain = mean_gain(np.array(recent), covariance)
    return gain.mean >= worth_gain and gain.lower > 0


def plateau(one: ClassCurve, worth_gain: float = WORTH_GAIN, rounds: int = 3) -> bool:
    """AP50 of the last `rounds` rounds stayed within `worth_gain` of where it was before them, or below."""
    recent = [value for value in one.ap50[-(rounds + 1) :] if value is not None]
    return len(recent) == rounds + 1 and max(recent[1:]) < recent[0] + worth_gain


def in_words(value: float) -> str:
    """A share of mAP as people write it: .06, .013, .004, -.02. Below .02 a hundredth is too coarse."""
    text = f"{abs(value):.2f}" if abs(value) >= _COARSE else _decimals(value)
    sign = "-" if value < 0 and float(text) else ""
    return sign + text.removeprefix("0") if float(text) else "0"


def _decimals(value: float) -> str:
    """Three digits: beside figures that it is compared with."""
    return f"{abs(value):.3f}".removesuffix("0")


def _signed(value: float) -> str:
    text = f"{abs(value):.3f}".removeprefix("0")
    return ("-" if value < 0 and float(text) else "+") + text


def _judge(gain: GainEstimate, last: float, worth: float) -> Advice:
    if gain.rounds_used >= _ROUNDS_USED and gain.upper < worth and last < worth:
        return "stop"
    if gain.lower > worth:
        return "continue"
    if gain.rounds_used < _ROUNDS_USED or smallest_visible_gain(gain) > worth:
        return "insufficient_evidence"
    return "continue"


def _reasons(advice: Advice, gain: GainEstimate, last: float, worth: float, images: int, more: More) -> tuple[str, ...]:
    over = "The last two rounds gained" if gain.rounds_used == 2 else "The last round gained"
    told = f"{over} {_signed(gain.mean)} mAP50{' a round' * (gain.rounds_used == 2)}"
    between = f"{told}; the truth lies between {_signed(gain.lower)} and {_signed(gain.upper)} nine times of ten."
    price = f"A round is worth its price from {_decimals(worth).removeprefix('0')} on"
    visible = power_sentence(images, smallest_visible_gain(gain), more)
    if advice == "stop":
        return between, f"{price}: that much is unlikely."
    if advice == "continue" and gain.lower > worth:
        return between, f"{price}: it gained more than that."
    if advice == "continue":
        return between, f"{price}: it may well gain that much, and a holdout of {images} images would show it."
    if gain.rounds_used < _ROUNDS_USED:
        return between, f"{price}: two rounds are too few to say. A third one is needed."
    if gain.upper < worth <= last:
        return between, f"{price}: the last round alone gained {_signed(last)}, the one before less.", visible
    return between, f"{price}: it may have gained that, or not.", visible


def _compared(advice: Advice, fit: Extrapolation | None, worth: float) -> tuple[bool, str]:
    if fit is None:
        return True, ""
    low, high = _signed(fit.next_gain_low), _signed(fit.next_gain_high)
    between = "" if low == high else f" ({low} to {high})"
    told = f"The fitted curve expects {_signed(fit.next_gain)} of the next round{between}"
    if advice == "stop" and fit.next_gain >= worth:
        return False, f"{told}: it disagrees, and would go on."
    if advice == "continue" and fit.next_gain_high < worth:
        return False, f"{told}: it disagrees, and would stop."
    if advice == "insufficient_evidence":
        leaning = "under" if fit.next_gain_high < worth else "over" if fit.next_gain_low > worth else "around"
        return True, f"{told}: {leaning} the {_decimals(worth).removeprefix('0')} that a round is worth."
    return True, f"{told}: it agrees."


def _base_rule(curve: Vector, min_map_gain: float) -> tuple[Advice, str]:
    from strategies.stopping import should_stop  # here: strategies.stopping re-exports this module

    if len(curve) < 2:
        return "insufficient_evidence", "The base rule compares two rounds."
    gain = float(curve[-1] - curve[-2])
    told = f"the last round gained {gain:+.3f} mAP50; the base rule stops below {min_map_gain:g}"
    return ("stop" if should_stop(curve, min_map_gain) else "continue"), told


def _numbers(
    worth: float,
    images: int,
    gain: GainEstimate | None = None,
    more: More | None = None,
    training_sd: float = TRAINING_SD,
) -> dict[str, float | int | None]:
    visible = None if gain is None else smallest_visible_gain(gain)
    helps = more is not None and more.images > 0
    return {
        "worth_gain": worth,
        "mean_gain": None if gain is None else gain.mean,
        "rounds_used": 0 if gain is None else gain.rounds_used,
        "se": None if gain is None else gain.se,
        "lower": None if gain is None else gain.lower,
        "upper": None if gain is None else gain.upper,
        "level": LEVEL,
        "smallest_visible_gain": visible,
        "holdout_images": images,
        "training_sd": training_sd,
        "more_holdout": more.images if more is not None and helps else None,
        "smallest_visible_gain_then": more.smallest_visible_gain if more is not None and helps else None,
    }


def _covariance(given: ArrayLike | None, curve: Vector, holdout_images: int) -> Matrix:
    if given is None:
        return expected_covariance(curve, holdout_images)
    matrix = np.asarray(given, dtype=np.float64)
    if matrix.shape != (len(curve), len(curve)):
        raise InputInvalid(f"covariance must be {(len(curve), len(curve))} for {len(curve)} rounds, not {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise InputInvalid("covariance holds NaN or infinity")
    return matrix


def _positive(value: float, name: str) -> float:
    found = float(as_vector([value], name, 1)[0])
    if found <= 0:
        raise InputInvalid(f"{name} must be above 0, not {value:g}")
    return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
