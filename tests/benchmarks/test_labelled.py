"""What the strategies had labelled: what is counted, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.dividend import labelled
from worker.dataset import TaskTruth
from worker.evaluation import EvaluationArrays
from worker.simulation_world import Picture, World


def picture(task_id: int, *sides: float) -> Picture:
    """One square object of each of these sides."""
    boxes = np.array([(0.5, 0.5, side, side) for side in sides], np.float64).reshape(-1, 4)
    truth = TaskTruth(task_id=task_id, boxes_yolo=boxes, class_ids=np.zeros(len(sides), np.int64))
    return Picture(task_id, f"{task_id}.jpg", Path(f"{task_id}.jpg"), "", truth)


def world() -> World:
    """Five images in the pool, the first two alike; three in the holdout with objects, one without."""
    directions = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 3]]
    pool = tuple(picture(task_id, side) for task_id, side in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), start=1))
    holdout = (picture(11, 0.1, 0.1), picture(12, 0.3), picture(13, 0.9), picture(14))
    return World(("a",), pool, holdout, directions, (), 0)


def measured(*right: tuple[int, bool, float]) -> EvaluationArrays:
    """Detections as (row of the holdout, right, confidence)."""
    return EvaluationArrays(
        keys=np.array([11, 12, 13, 14]),
        tp=np.array([[is_right] * 10 for _, is_right, _ in right], np.bool_).reshape(-1, 10),
        conf=np.array([confidence for *_, confidence in right], np.float32),
        pred_cls=np.zeros(len(right), np.int64),
        pred_img=np.array([row for row, *_ in right], np.int64),
        target_cls=np.zeros(4, np.int64),
        target_img=np.array([0, 0, 1, 2]),
    )


def test_what_looks_like_a_labelled_image_is_covered() -> None:
    descriptors = world().descriptors
    assert labelled.covered(descriptors, [0]) == pytest.approx(2 / 5)
    assert labelled.covered(descriptors, [0, 1]) == pytest.approx(2 / 5)
    assert labelled.covered(descriptors, [0, 3]) == pytest.approx(3 / 5)


def test_the_holdout_is_cut_into_thirds_by_the_size_of_its_objects() -> None:
    assert labelled.thirds_by_size(world().holdout) == {11: 0, 12: 1, 13: 2}


def test_what_is_found_counts_when_it_is_right_and_sure() -> None:
    thirds = labelled.thirds_by_size(world().holdout)
    seen = measured((0, True, 0.9), (0, True, 0.05), (1, False, 0.9), (2, True, 0.9), (3, False, 0.9))
    assert labelled.found_by_third(seen, thirds) == (0.5, 0.0, 1.0)
    assert labelled.found_by_third(measured(), thirds) == (0.0, 0.0, 0.0)


def test_a_row_is_the_mean_over_seeds_of_all_that_was_labelled_by_then() -> None:
    def rounds(seed: int, *batches: list[str]) -> dict[str, Any]:
        played = [
            {"round": number, "labels": 1 + number, "evaluation": f"{seed}-{number}", "batch": {"images": images}}
            for number, images in enumerate(batches)
        ]
        return {"arm": "random", "seed": seed, "rounds": played}

    results = {
        "data": {"rounds": 2},
        "arms": [{"label": "random"}],
        "runs": [rounds(0, ["1.jpg"], ["2.jpg"], ["3.jpg"]), rounds(1, ["3.jpg"], ["4.jpg"], ["5.jpg"])],
    }
    found = {"0-1": measured((0, True, 0.9)), "1-1": measured((0, True, 0.9), (0, True, 0.8))}
    rounds_seen = labelled.tables_of(results, world(), lambda key: found.get(key, measured()))
    assert list(rounds_seen) == ["2", "3"]
    assert rounds_seen["2"] == [
        {
            "arm": "random",
            "pool covered": "40",  # two of five on both seeds
            "object": "7.5",  # medians of 1 and 4 %, and of 9 and 16 %
            "small found": "75",  # one and two of two
            "medium found": "0",
            "large found": "0",
        }
    ]
    assert (rounds_seen["3"][0]["pool covered"], rounds_seen["3"][0]["small found"]) == ("60", "0")
