from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert, select, update

from worker.dataset import TaskTruth
from worker.evaluation import Detections, evaluate
from worker.measuring import base_verdict, compare, on_common_images, renamed, truth_for, write_curve
from worker.settings import ProjectSettings
from worker.store import Store
from worker.store import rounds as round_rows


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


# --- the curve in the store -------------------------------------------------------------------------------------------

BOX, PIXELS = [0.5, 0.5, 0.5, 0.5], [50.0, 25.0, 150.0, 75.0]
N = 40
SIZES = [(200, 100)] * N


def finds(share: float) -> Detections:
    """A detector that finds the box of the first `share` of 40 images, and is never wrong."""
    return seen(list(range(N)), SIZES, *((row, PIXELS, 0.9, 0) for row in range(round(share * N))))


TRUTHS = [truth(task_id, (BOX, 0)) for task_id in range(N)]


@pytest.fixture
def store(store: Store) -> Store:
    """Project 7: rounds 1..4 of 100, 200 ... labels, not measured yet."""
    with store.write() as connection:
        for number in range(1, 5):
            values = {"project_id": 7, "number": number, "state": "done", "opened_at": 0.0, "labels": 100 * number}
            connection.execute(insert(round_rows).values(id=10 + number, map50=0.5, **values))
    return store


def curve_of(store: Store) -> list[Any]:
    with store.read() as connection:
        return list(connection.execute(select(round_rows).order_by(round_rows.c.number)).all())


def written(store: Store, detections: dict[int, Detections], truths: list[TaskTruth], **settings: Any) -> list[Any]:
    with store.write() as connection:
        write_curve(connection, 7, compare(detections, truths, ["nut"]), ProjectSettings(**settings))
    return curve_of(store)


ROUNDS = {11: finds(0.5), 12: finds(0.7), 13: finds(0.8), 14: finds(0.8)}


def test_all_rounds_are_written_and_the_newest_has_the_verdict(store: Store) -> None:
    first, second, third, last = written(store, ROUNDS, TRUTHS)
    # a detector that is never wrong and finds a share s has an AP of s (101 points: to a half step)
    assert [row.map50 for row in (first, second, third, last)] == pytest.approx([0.5, 0.7, 0.8, 0.8], abs=0.006)
    assert first.gain is None
    assert [row.gain for row in (second, third, last)] == pytest.approx([0.2, 0.1, 0.0], abs=0.011)
    assert {row.holdout_labels for row in (first, second, third, last)} == {N}
    told = json.loads(last.verdict)
    assert told["verdict"] == "insufficient_evidence"
    assert told["base"]["verdict"] == "stop"
    assert told["stats"]["current_map50"] == pytest.approx(last.map50, abs=1e-4)
    assert told["next_gain_estimable"] is False  # the last gain is 0
    assert told["numbers"]["holdout_images"] == N
    assert (told["numbers"]["worth_gain"], told["numbers"]["worth_gain_from"]) == (0.02, "default")
    assert told["fit"] is None  # four points
    assert told["knee"] == 200
    assert told["warnings"] == []
    assert set(json.loads(first.verdict)) == {"interval"}


def test_the_interval_is_that_of_a_share_of_forty(store: Store) -> None:
    first, second, *_ = written(store, ROUNDS, TRUTHS)
    interval = json.loads(first.verdict)["interval"]
    assert interval["se"] == pytest.approx((0.5 * 0.5 / N) ** 0.5, rel=0.12)
    assert interval["low"] == pytest.approx(first.map50 - 1.645 * interval["se"], abs=1e-4)
    assert (interval["gain_low"], interval["gain_se"]) == (None, None)
    gain = json.loads(second.verdict)["interval"]
    # the eight of forty images that only the second finds: SD of that share, and .0075 for each training
    by_hand = (0.2 * 0.8 / N + 2 * 0.0075**2) ** 0.5
    assert gain["gain_se"] == pytest.approx(by_hand, rel=0.12)
    assert gain["gain_low"] < second.gain < gain["gain_high"]


def test_what_was_told_then_stays_when_older_rounds_are_measured_again(store: Store) -> None:
    with store.write() as connection:
        told = {"verdict": "continue", "reasons": ["as it seemed then"], "interval": {"se": 9.0}}
        connection.execute(update(round_rows).where(round_rows.c.id == 11).values(verdict=json.dumps(told)))
    first, *_ = written(store, ROUNDS, TRUTHS)
    found = json.loads(first.verdict)
    assert (found["verdict"], found["reasons"]) == ("continue", ["as it seemed then"])
    assert found["interval"]["se"] < 1


def test_corrected_truth_moves_every_point(store: Store) -> None:
    before = [row.map50 for row in written(store, ROUNDS, TRUTHS)]
    # four boxes that only later rounds found were no boxes at all
    corrected = [truth(task_id, *(() if 20 <= task_id < 24 else ((BOX, 0),))) for task_id in range(N)]
    rows = written(store, ROUNDS, corrected)
    after = [row.map50 for row in rows]
    assert after[0] == pytest.approx(20 / 36, abs=0.01)
    assert after[0] > before[0]
    assert after[2] < before[2]
    assert rows[1].gain == pytest.approx(after[1] - after[0], abs=1e-6)
    assert {json.loads(row.per_class)["nut"]["boxes"] for row in rows} == {36}


def test_without_truth_the_earlier_figures_stay(store: Store) -> None:
    before = [(row.map50, row.gain, row.verdict) for row in written(store, ROUNDS, TRUTHS)]
    assert [(row.map50, row.gain, row.verdict) for row in written(store, ROUNDS, [])] == before


def test_a_round_just_trained_joins_the_curve_or_says_that_nothing_was_measured(store: Store) -> None:
    with store.write() as connection:
        values = {"project_id": 7, "number": 5, "state": "training", "opened_at": 0.0, "labels": 500}
        connection.execute(insert(round_rows).values(id=15, **values))
        write_curve(connection, 7, compare({15: finds(0.8)}, [], ["nut"]), ProjectSettings(), this=15)
    last = curve_of(store)[-1]
    assert (last.map50, last.holdout_labels) == (None, 0)
    assert json.loads(last.verdict)["verdict"] == "insufficient_evidence"
    with store.write() as connection:
        curve = compare({**ROUNDS, 15: finds(0.9)}, TRUTHS, ["nut"])
        write_curve(connection, 7, curve, ProjectSettings(), this=15)
    last = curve_of(store)[-1]
    assert last.map50 == pytest.approx(0.9, abs=0.006)
    assert last.gain == pytest.approx(0.1, abs=0.011)
    told = json.loads(last.verdict)
    assert told["fit"]["next_labels"] == 600
    assert told["fit"]["next_gain_low"] <= told["fit"]["next_gain"] <= told["fit"]["next_gain_high"]


def test_settings_judge(store: Store) -> None:
    told = json.loads(written(store, ROUNDS, TRUTHS, worth_gain=0.3, min_map_gain=0.0)[-1].verdict)
    assert told["verdict"] == "stop"
    assert told["base"] == {
        "verdict": "continue",
        "reasons": ["the last round gained +0.000 mAP50; the base rule stops below 0"],
        "min_map_gain": 0.0,
    }
    assert told["numbers"]["worth_gain_from"] == "settings"


def test_rounds_of_another_project_are_left_alone(store: Store) -> None:
    with store.write() as connection:
        write_curve(connection, 7, compare({**ROUNDS, 99: finds(0.1)}, TRUTHS, ["nut"]), ProjectSettings())
    assert curve_of(store)[-1].map50 == pytest.approx(0.8, abs=0.006)
