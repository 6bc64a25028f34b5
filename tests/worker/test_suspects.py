from __future__ import annotations

import numpy as np
import pytest

from worker.dataset import TaskTruth
from worker.suspects import Seen, compare, suspects_of

LABELS = ("bolt", "nut")
# percent: left, top, right, bottom
HERE, NEAR, THERE = (10.0, 10.0, 30.0, 30.0), (11.0, 10.0, 31.0, 30.0), (60.0, 60.0, 80.0, 90.0)


def seen(*found: tuple[tuple[float, float, float, float], int, float]) -> Seen:
    boxes = np.array([box for box, _, _ in found], dtype=np.float64).reshape(-1, 4)
    ids = np.array([class_id for _, class_id, _ in found], dtype=np.int64)
    return Seen(boxes, ids, np.array([confidence for _, _, confidence in found], dtype=np.float64))


def truth(task_id: int, *labels: tuple[tuple[float, float, float, float], int]) -> TaskTruth:
    boxes = [
        ((left + right) / 200, (top + bottom) / 200, (right - left) / 100, (bottom - top) / 100)
        for (left, top, right, bottom), _ in labels
    ]
    ids = np.array([class_id for _, class_id in labels], dtype=np.int64)
    return TaskTruth(task_id, np.array(boxes).reshape(-1, 4), ids, annotation_id=task_id * 10, width=640, height=480)


def boxes_of(*boxes: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def test_a_label_and_a_detection_that_agree_are_no_suspects() -> None:
    result = compare(boxes_of(HERE), np.array([0]), seen((NEAR, 0, 0.9)))
    assert (result.matched.tolist(), result.missing, result.other) == ([0], [], [])


def test_a_confident_detection_without_a_label_is_a_missing_box_and_a_doubtful_one_is_not() -> None:
    result = compare(boxes_of(HERE), np.array([0]), seen((NEAR, 0, 0.9), (THERE, 1, 0.7)))
    assert (result.missing, result.other) == ([1], [])
    assert compare(boxes_of(HERE), np.array([0]), seen((NEAR, 0, 0.9), (THERE, 1, 0.59))).missing == []
    assert compare(boxes_of(), np.array([], np.int64), seen((HERE, 0, 0.8), (THERE, 0, 0.3))).missing == [0]


def test_a_confident_detection_of_another_class_in_a_labels_place() -> None:
    result = compare(boxes_of(HERE), np.array([0]), seen((NEAR, 1, 0.8)))
    assert (result.matched.tolist(), result.missing, result.other) == ([-1], [], [(0, 0)])
    assert result.covered.tolist() == [True], "it is not an extra box as well"


def test_a_second_opinion_on_a_label_that_is_right_accuses_nobody() -> None:
    result = compare(boxes_of(HERE), np.array([0]), seen((HERE, 0, 0.7), (NEAR, 1, 0.9)))
    assert (result.matched.tolist(), result.missing, result.other) == ([0], [], [])


def test_one_detection_speaks_for_one_label() -> None:
    result = compare(boxes_of(HERE, NEAR), np.array([0, 0]), seen((HERE, 0, 0.9)))
    assert result.matched.tolist() == [0, -1]


def test_suspects_are_ranked_and_put_in_words_by_class() -> None:
    truths = [truth(1, (HERE, 0)), truth(2, (HERE, 0)), truth(3)]
    seen_on = {1: seen((HERE, 1, 0.7)), 2: seen((HERE, 0, 0.5), (THERE, 1, 0.9)), 3: seen()}
    found, images = suspects_of(truths, seen_on, LABELS)
    assert images == 3
    assert [(one.task_id, one.kind, one.labelled, one.seen, one.suspicion) for one in found] == [
        (2, "missing", None, "nut", 0.9),
        (1, "class", "bolt", "nut", 0.7),
    ]
    assert found[0].box_percent == pytest.approx((60, 60, 20, 30))
    assert (found[0].annotation_id, found[0].width, found[0].height) == (20, 640, 480)


def test_a_label_that_nothing_is_seen_at_is_extra_only_where_its_class_is_found_as_a_rule() -> None:
    known = [truth(number, (HERE, 0)) for number in range(1, 10)]
    seen_on = {number: seen((NEAR, 0, 0.9)) for number in range(1, 10)} | {50: seen()}
    few, _ = suspects_of([*known[:8], truth(50, (THERE, 0))], seen_on, LABELS)
    assert few == [], "9 labels are too few to know"
    found, _ = suspects_of([*known, truth(50, (THERE, 0))], seen_on, LABELS)
    assert [(one.task_id, one.kind, one.labelled, one.suspicion) for one in found] == [(50, "extra", "bolt", 0.9)]
    assert found[0].box_percent == pytest.approx((60, 60, 20, 30))
    weak = {number: seen() for number in range(1, 4)}
    assert suspects_of([*known, truth(50, (THERE, 0))], seen_on | weak, LABELS)[0] == [], "6 of 10: it misses many"


def test_images_that_were_not_scored_are_left_out() -> None:
    assert suspects_of([truth(1, (HERE, 0))], {}, LABELS) == ([], 0)
