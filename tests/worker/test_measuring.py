from __future__ import annotations

import numpy as np
import pytest

from worker.dataset import TaskTruth
from worker.evaluation import Detections, evaluate
from worker.measuring import base_verdict, on_common_images, renamed, truth_for


def seen(keys: list[int], sizes: list[tuple[int, int]], *found: tuple[int, list[float], float, int]) -> Detections:
    """Detections as (row of keys, box, confidence, class id)."""
    return Detections(
        keys=np.array(keys, np.int64),
        image_index=np.array([row[0] for row in found], np.int64),
        boxes_xyxy=np.array([row[1] for row in found], np.float32).reshape(-1, 4),
        confidences=np.array([row[2] for row in found], np.float32),
        class_ids=np.array([row[3] for row in found], np.int64),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
    )


def truth(task_id: int, *boxes: tuple[list[float], int]) -> TaskTruth:
    return TaskTruth(
        task_id,
        np.array([box for box, _ in boxes], np.float64).reshape(-1, 4),
        np.array([class_id for _, class_id in boxes], np.int64),
    )


def test_truth_is_in_pixels_of_the_images_that_were_looked_at() -> None:
    detections = seen([5, 6, 7], [(200, 100), (50, 50), (10, 10)])
    found = truth_for(
        detections,
        [truth(6, ([0.5, 0.5, 1.0, 1.0], 2), ([0.25, 0.5, 0.5, 1.0], 0)), truth(99, ([0.5, 0.5, 1, 1], 1)), truth(5)],
    )
    assert found.keys.tolist() == [6, 5]  # nobody labelled 7 yet, nobody looked at 99
    assert found.image_index.tolist() == [0, 0]
    assert found.boxes_xyxy.tolist() == [[0, 0, 50, 50], [0, 0, 25, 50]]
    assert found.class_ids.tolist() == [2, 0]


def test_nothing_labelled_is_nothing_to_measure() -> None:
    found = truth_for(seen([5], [(10, 10)]), [])
    assert found.keys.shape == (0,)
    assert found.boxes_xyxy.shape == (0, 4)
    assert evaluate(seen([5], [(10, 10)]), found).map50 is None


def test_truth_and_detections_of_one_box_make_a_perfect_round() -> None:
    detections = seen([5], [(200, 100)], (0, [50, 25, 150, 75], 0.9, 1))
    measured = evaluate(detections, truth_for(detections, [truth(5, ([0.5, 0.5, 0.5, 0.5], 1))]))
    assert measured.map50 == pytest.approx(0.995)  # ultralytics' 101 points end before a recall of 1


def test_detections_of_an_older_model_speak_todays_label_config() -> None:
    detections = seen(
        [5, 6],
        [(10, 10), (10, 10)],
        (0, [0, 0, 1, 1], 0.9, 0),
        (0, [0, 0, 2, 2], 0.8, 1),
        (1, [0, 0, 3, 3], 0.7, 2),
    )
    found = renamed(detections, {0: "nut", 1: "bolt", 2: "wire"}, ["wire", "gear", "nut"])
    assert found.class_ids.tolist() == [2, 0]
    assert found.image_index.tolist() == [0, 1]
    assert found.confidences.tolist() == pytest.approx([0.9, 0.7])
    assert found.boxes_xyxy[:, 2].tolist() == [1, 3]
    assert found.keys.tolist() == [5, 6]
    none = renamed(detections, {0: "nut"}, ["gear"])
    assert none.class_ids.tolist() == []
    assert none.boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize(
    ("points", "verdict", "reason"),
    [
        ([], "insufficient_evidence", "nothing could be measured yet"),
        ([(60, 0.4)], "insufficient_evidence", "one measured round has no gain to compare"),
        ([(60, 0.4), (120, 0.405)], "continue", "the last round gained +0.005 mAP50; the base rule stops below 0.005"),
        ([(60, 0.4), (120, 0.404)], "stop", "the last round gained +0.004 mAP50; the base rule stops below 0.005"),
        ([(60, 0.4), (120, 0.6), (180, 0.5)], "stop", "the last round gained -0.100 mAP50"),
        ([(60, 0.4), (60, 0.6)], "continue", "the last round gained +0.200 mAP50"),
    ],
)
def test_the_base_rule(points: list[tuple[int, float]], verdict: str, reason: str) -> None:
    found = base_verdict(points, 0.005)
    assert found["verdict"] == verdict
    assert reason in found["reasons"][0]


def test_rounds_are_compared_on_images_that_all_of_them_saw() -> None:
    box, pixels = [0.5, 0.5, 0.5, 0.5], [50, 25, 150, 75]
    sizes = [(200, 100), (200, 100)]
    earlier = seen([5, 6], sizes, (0, pixels, 0.9, 0))  # found the easy one, missed the hard one
    later = seen([5], sizes[:1], (0, pixels, 0.9, 0))  # could not read the hard one
    truths = [truth(5, (box, 0)), truth(6, (box, 0))]
    alone = evaluate(earlier, truth_for(earlier, truths)).map50
    assert alone is not None
    assert alone < 0.6
    together = on_common_images({1: earlier, 2: later}, truths)
    assert together[1].map50 == together[2].map50 == pytest.approx(0.995)
    assert together[1].n_images == together[2].n_images == 1
    assert on_common_images({}, truths) == {}
