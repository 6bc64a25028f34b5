"""How a project reads uncertainty from what the detector saw: its settings, applied. Pure; nothing here loads torch.

Boxes are drawn from one confidence on; uncertainty may look lower, weigh rare classes, and say what an image without
boxes is worth. Production scoring and `hardfirst simulate` both read here, so that what was simulated is what is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.uncertainty import MEASURES, class_weights, image_uncertainty
from worker.settings import ProjectSettings

if TYPE_CHECKING:
    from worker.evaluation import EvaluationArrays

LOWEST_CANDIDATE = 0.05  # the detector keeps candidates from here on, unless a project looks lower


@dataclass(frozen=True)
class Reading:
    """How uncertainty is read. threshold, empty None: as the measure's own rule says (`strategies.uncertainty`)."""

    threshold: float | None = None
    empty: str | None = None
    aggregate: str = "max"
    class_weights: bool = False


Value = TypeVar("Value")

# What a project's settings leave open. Of all others: the rules of the textbooks.
BY_STRATEGY: Mapping[str, Reading] = MappingProxyType(
    {"hybrid_k_center": Reading(0.1, "calibrated", "open", class_weights=True)}  # by benchmarks/dividend
)


class Look(Protocol):
    """What is read of a `worker.detector.ImageScore`."""

    @property
    def probabilities(self) -> NDArray[np.float32]: ...

    @property
    def best_candidate(self) -> NDArray[np.float32]: ...


def reading(settings: ProjectSettings) -> Reading:
    """What the settings say and, where they say nothing, what their strategy does."""
    usual = BY_STRATEGY.get(settings.strategy, Reading())
    return Reading(
        _or(settings.uncertainty_threshold, usual.threshold),
        _or(settings.uncertainty_empty, usual.empty),
        _or(settings.uncertainty_aggregate, usual.aggregate),
        _or(settings.class_weights, usual.class_weights),
    )


def _or(said: Value | None, usual: Value) -> Value:
    return usual if said is None else said


def said_in_full(settings: ProjectSettings) -> dict[str, Any]:
    """The settings that give this reading whatever the strategy. None: what every strategy leaves to the measure."""
    how = reading(settings)
    return {
        "uncertainty_threshold": how.threshold,
        "uncertainty_empty": how.empty,
        "uncertainty_aggregate": how.aggregate,
        "class_weights": how.class_weights,
    }


def lowest_candidate(settings: ProjectSettings) -> float:
    """The confidence from which the detector has to keep candidates for this project."""
    threshold = reading(settings).threshold
    return LOWEST_CANDIDATE if threshold is None else min(LOWEST_CANDIDATE, threshold)


def weights_of_classes(
    settings: ProjectSettings, names: Mapping[int, str], boxes_per_class: Mapping[str, int]
) -> NDArray[np.float64] | None:
    """(C,) weights by the detector's class ids, or None: not wanted, or nothing is known of these classes.

    Args: boxes_per_class: labelled boxes, by class name, that the detector was trained on.
    """
    if not reading(settings).class_weights or not any(name in boxes_per_class for name in names.values()):
        return None
    return class_weights([boxes_per_class.get(names[class_id], 0) for class_id in sorted(names)])


def chances_missed(arrays: EvaluationArrays, settings: ProjectSettings) -> dict[str, float]:
    """Measure -> how likely an image in which the detector sees nothing holds something, by the holdout; empty: there
    is none.

    (images with an object + 1/2) / (images + 1), of those of the holdout without a box from the threshold on: the
    holdout is a random sample of the pool, which batches that were chosen are not.
    """
    if not len(arrays.keys):
        return {}
    highest = np.zeros(len(arrays.keys))
    np.maximum.at(highest, arrays.pred_img, arrays.conf)
    has_object = np.isin(np.arange(len(arrays.keys)), arrays.target_img)
    found = {}
    for name, measure in MEASURES.items():
        sees_nothing = highest < _or(reading(settings).threshold, measure.threshold)
        found[name] = round(float((has_object[sees_nothing].sum() + 0.5) / (sees_nothing.sum() + 1)), 4)
    return found


def measures_of(
    look: Look,
    settings: ProjectSettings,
    weights: NDArray[np.float64] | None = None,
    chances: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Every measure of one image, as the project's settings read it. They may exceed 1: see `image_uncertainty`.

    Args: chances: of `chances_missed`; empty: nothing was measured yet.
    """
    rows = look.probabilities if len(look.probabilities) else look.best_candidate[None, :]
    how = reading(settings)
    return {
        name: image_uncertainty(
            rows,
            name,
            threshold=how.threshold,
            empty=how.empty,
            method=how.aggregate,
            n=settings.uncertainty_n,
            class_weights=weights,
            chance_missed=chances.get(name),
        )
        for name in MEASURES
    }


def reading_of(
    settings: ProjectSettings, boxes_per_class: Mapping[str, int], chances: object = None
) -> dict[str, Any]:
    """What the measures of an image depend on besides the detector, as JSON: for keys of stored scores.

    Args: chances: of `chances_missed`, or what they depend on.
    """
    chosen = said_in_full(settings)
    if chosen["uncertainty_aggregate"] == "top_n_mean":
        chosen["uncertainty_n"] = settings.uncertainty_n
    if chosen["class_weights"]:
        chosen["boxes_per_class"] = dict(sorted(boxes_per_class.items()))
    if chosen["uncertainty_empty"] == "calibrated":
        chosen["chances_missed"] = chances
    return chosen
