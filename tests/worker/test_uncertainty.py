"""How a project's settings read uncertainty; a strategy of the textbooks reads as the measures themselves do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from strategies.uncertainty import MEASURES, image_uncertainty
from worker.evaluation import EvaluationArrays
from worker.settings import ProjectSettings
from worker.uncertainty import (
    chances_missed,
    lowest_candidate,
    measures_of,
    reading,
    reading_of,
    said_in_full,
    weights_of_classes,
)


@dataclass
class Seen:
    probabilities: NDArray[np.float32]
    best_candidate: NDArray[np.float32]


def seen(*rows: tuple[float, float], best: tuple[float, float] = (0.01, 0.02)) -> Seen:
    return Seen(np.array(rows, np.float32).reshape(-1, 2), np.array(best, np.float32))


def read(look: Seen, **settings: Any) -> float:
    return measures_of(look, ProjectSettings(**{"strategy": "hybrid", **settings}))["least_confidence"]


@pytest.mark.parametrize("look", [seen((0.9, 0.1), (0.1, 0.3)), seen((0.1, 0.0)), seen()])
def test_a_strategy_of_the_textbooks_reads_as_the_measures_do(look: Seen) -> None:
    rows = look.probabilities if len(look.probabilities) else look.best_candidate[None, :]
    expected = {name: image_uncertainty(rows, name) for name in MEASURES}
    assert measures_of(look, ProjectSettings(strategy="hybrid")) == expected


def test_the_default_adds_up_what_boxes_from_a_tenth_on_leave_open() -> None:
    look = seen((0.75, 0.0), (0.0, 0.5), (0.125, 0.0), (0.0625, 0.0))
    assert read(look, strategy="hybrid_k_center") == pytest.approx(np.log(1 + 0.25 + 0.5 + 0.875) + 2 * 0.25)
    assert read(look, strategy="hybrid_k_center", uncertainty_aggregate="max") == pytest.approx(0.875)
    assert read(look, strategy="hybrid_k_center", uncertainty_threshold=0.25) == pytest.approx(np.log(1.75) + 0.5)
    faint = seen(best=(0.0625, 0.0))
    assert read(faint, strategy="hybrid_k_center") == pytest.approx(np.log(1.9375) + 2 * 0.9375)
    assert reading(ProjectSettings()) == reading(ProjectSettings(**said_in_full(ProjectSettings()), strategy="entropy"))


def test_weights_of_classes_can_be_refused_where_they_are_the_default() -> None:
    names, counts = {0: "nut", 1: "wire"}, {"nut": 90, "wire": 0}
    assert weights_of_classes(ProjectSettings(), names, counts) is not None
    assert weights_of_classes(ProjectSettings(class_weights=False), names, counts) is None


def test_a_lower_threshold_counts_weaker_boxes() -> None:
    look = seen((0.75, 0.0), (0.125, 0.0))
    assert read(look) == pytest.approx(0.25)
    assert read(look, uncertainty_threshold=0.05) == pytest.approx(0.875)


def test_an_image_without_boxes_is_what_the_policy_says() -> None:
    look = seen(best=(0.125, 0.0))
    assert read(look) == 1
    assert read(look, uncertainty_empty="certain") == 0
    assert read(look, uncertainty_empty="best_candidate") == pytest.approx(0.875)


def holdout(*images: tuple[list[float], int]) -> EvaluationArrays:
    """Of each image: the confidences of what is seen, and how many objects there are."""
    conf = [(one, row) for row, (seen_there, _) in enumerate(images) for one in seen_there]
    targets = [row for row, (_, objects) in enumerate(images) for _ in range(objects)]
    return EvaluationArrays(
        keys=np.arange(len(images)),
        tp=np.zeros((len(conf), 10), dtype=bool),
        conf=np.array([one for one, _ in conf], np.float64),
        pred_cls=np.zeros(len(conf), np.int64),
        pred_img=np.array([row for _, row in conf], np.int64),
        target_cls=np.zeros(len(targets), np.int64),
        target_img=np.array(targets, np.int64),
    )


def test_the_holdout_says_what_it_means_that_nothing_is_seen() -> None:
    # seen; nothing above .2, one object; nothing at all, two objects; nothing, and there is nothing
    images = holdout(([0.1, 0.9], 1), ([0.2], 1), ([], 2), ([0.01], 0))
    found = chances_missed(images, ProjectSettings(strategy="hybrid"))
    assert found["least_confidence"] == 0.625  # (2 + .5) / (3 + 1)
    assert found["entropy"] == 0.5  # from .05 on the second sees something: (1 + .5) / (2 + 1)
    low = ProjectSettings(strategy="hybrid", uncertainty_threshold=0.15)
    assert chances_missed(holdout(([0.1], 1), ([0.2], 0)), low)["least_confidence"] == 0.75
    assert chances_missed(holdout(), low) == {}


def test_an_image_without_boxes_is_as_uncertain_as_the_holdout_says() -> None:
    faint, chances = seen(best=(0.125, 0.0)), {"least_confidence": 0.25}
    calibrated = ProjectSettings(strategy="hybrid", uncertainty_empty="calibrated")
    assert measures_of(faint, calibrated, None, chances)["least_confidence"] == 0.25
    assert measures_of(faint, calibrated)["least_confidence"] == pytest.approx(0.875)  # nothing is known yet
    as_open = calibrated.model_copy(update={"uncertainty_aggregate": "open"})
    weights = np.array([3.0, 3.0])  # it is nobody's class
    assert measures_of(faint, as_open, weights, chances)["least_confidence"] == pytest.approx(0.25 * (np.log(2) + 2))
    assert measures_of(seen((0.75, 0.0)), calibrated, None, chances)["least_confidence"] == pytest.approx(0.25)


def test_boxes_become_one_number_as_the_aggregate_says() -> None:
    look = seen((0.5, 0.0), (0.75, 0.0), (0.0, 1.0))
    assert read(look, uncertainty_aggregate="min") == 0
    assert read(look, uncertainty_aggregate="mean") == pytest.approx(0.25)
    assert read(look, uncertainty_aggregate="sum") == pytest.approx(0.75)
    assert read(look, uncertainty_aggregate="top_n_mean", uncertainty_n=2) == pytest.approx(0.375)


def test_rare_classes_count_for_more_when_that_is_set() -> None:
    names, counts = {0: "nut", 1: "wire"}, {"nut": 90, "wire": 0}
    assert weights_of_classes(ProjectSettings(strategy="hybrid"), names, counts) is None
    weighing = ProjectSettings(strategy="hybrid", class_weights=True)
    weights = weights_of_classes(weighing, names, counts)
    assert weights is not None
    assert weights.tolist() == pytest.approx([np.sqrt(55 / 100), np.sqrt(55 / 10)])
    look = seen((0.5, 0.0), (0.0, 0.5))
    assert measures_of(look, weighing, weights)["least_confidence"] == pytest.approx(0.5 * np.sqrt(5.5))


def test_a_detector_of_other_classes_is_not_weighed() -> None:
    assert weights_of_classes(ProjectSettings(class_weights=True), {0: "person"}, {"nut": 3}) is None
    assert weights_of_classes(ProjectSettings(class_weights=True), {0: "nut"}, {}) is None


def test_the_detector_keeps_candidates_as_low_as_anybody_looks() -> None:
    assert lowest_candidate(ProjectSettings()) == 0.05
    assert lowest_candidate(ProjectSettings(uncertainty_threshold=0.5)) == 0.05
    assert lowest_candidate(ProjectSettings(uncertainty_threshold=0.01)) == 0.01


def test_only_what_changes_a_measure_changes_its_key() -> None:
    classic = reading_of(ProjectSettings(strategy="hybrid"), {"nut": 3})
    assert classic == reading_of(ProjectSettings(strategy="entropy", uncertainty_n=3, batch_size=7), {"nut": 9})
    for changed in (
        {"uncertainty_threshold": 0.1},
        {"uncertainty_empty": "certain"},
        {"uncertainty_aggregate": "mean"},
        {"class_weights": True},
        {"strategy": "hybrid_k_center"},
    ):
        assert reading_of(ProjectSettings(**{"strategy": "hybrid", **changed}), {"nut": 3}) != classic
    weighing = ProjectSettings(class_weights=True)
    assert reading_of(weighing, {"nut": 3}) != reading_of(weighing, {"nut": 9})
    assert reading_of(weighing, {"nut": 3}, "one") != reading_of(weighing, {"nut": 3}, "other")
    surer = ProjectSettings(uncertainty_empty="certain")
    assert reading_of(surer, {"nut": 3}, "one") == reading_of(surer, {"nut": 3}, "other")


def test_production_scores_tasks_by_the_same_reading() -> None:
    from types import SimpleNamespace

    from worker.boxes import LabelMap
    from worker.detector import ImageScore
    from worker.model import Scorer

    rows = np.array([[0.75, 0.0], [0.0, 0.125]], np.float32)
    look = ImageScore(
        boxes_xyxy=np.array([[0, 0, 10, 10], [10, 10, 20, 20]], np.float32), confidences=rows.max(1),
        class_ids=rows.argmax(1), probabilities=rows, best_candidate=rows[0], embedding=np.ones(2, np.float32),
        width=40, height=40, drawn=1,
    )  # fmt: skip
    scorer: Any = Scorer.__new__(Scorer)  # without a store and weights
    scorer.settings = ProjectSettings(uncertainty_threshold=0.1, class_weights=True, uncertainty_aggregate="sum")
    scorer.label_map = LabelMap.from_config(
        '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
        '<Label value="nut"/><Label value="wire"/></RectangleLabels></View>'
    )
    scorer.detector = SimpleNamespace(names={0: "nut", 1: "wire"})
    scorer.class_to_label = {0: "nut", 1: "wire"}
    scorer._round = SimpleNamespace(report='{"boxes_per_class": {"nut": 90, "wire": 0}}')
    found = scorer._task_score(1, look, None)
    assert len(found.regions) == 1  # boxes are drawn from .25 all the same
    expected = 0.25 * np.sqrt(55 / 100) + 0.875 * np.sqrt(55 / 10)
    assert found.measures["least_confidence"] == pytest.approx(expected)
    other: Any = Scorer.__new__(Scorer)
    vars(other).update({name: vars(scorer)[name] for name in ("label_map", "detector", "class_to_label")})
    other.settings = ProjectSettings(uncertainty_threshold=0.9, uncertainty_empty="calibrated", class_weights=False)
    other._round = SimpleNamespace(report='{"chances_missed": {"least_confidence": 0.5, "margin": 0, "entropy": 0}}')
    assert other._task_score(1, look, None).measures["least_confidence"] == pytest.approx(0.5 * (np.log(2) + 2))
