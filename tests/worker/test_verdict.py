"""What the page tells about measuring, from a store filled by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from strategies.verdict import expected_gain, smallest_visible_gain
from worker import rounds
from worker.errors import NotFound
from worker.store import Store, projects, tasks
from worker.store import rounds as round_rows
from worker.verdict import boxes_per_label, class_histories, power_of, prices_of, returns_of


@pytest.fixture
def store(store: Store) -> Store:
    """Project 7: tasks 1..200, of which 1..20 are the holdout."""
    with store.write() as connection:
        rounds.remember_tasks(connection, 7, {number: f"{number}.jpg" for number in range(1, 201)})
        connection.execute(update(tasks).values(holdout=tasks.c.task_id <= 20))
    return store


def regions(**counts: int) -> list[dict[str, Any]]:
    one = [{"type": "rectanglelabels", "value": {"rectanglelabels": [name]}} for name in counts]
    return [region for region, count in zip(one, counts.values(), strict=True) for _ in range(count)]


def label(store: Store, *task_ids: int, lead_time: float = 30.0, **counts: int) -> None:
    common = {"updated_at": "2026", "lead_time": lead_time, "result": regions(**counts)}
    with store.write() as connection:
        found = [{"id": 1000 + task_id, "task": task_id, **common} for task_id in task_ids]
        rounds.remember_annotations(connection, 7, found)


def set_to(store: Store, **values: Any) -> None:
    with store.write() as connection:
        connection.execute(update(projects).values(extra_params=json.dumps(values)))


def add_round(store: Store, number: int, map50: float, **values: Any) -> None:
    row = {"project_id": 7, "number": number, "state": "done", "opened_at": 0.0, "labels": 100 * number}
    with store.write() as connection:
        connection.execute(insert(round_rows).values(**{**row, "map50": map50, **values}))


def power(store: Store) -> Any:
    with store.read() as connection:
        return power_of(connection, 7)


# --- power ------------------------------------------------------------------------------------------------------------


def test_power_is_known_before_anything_is_labelled(store: Store) -> None:
    found = power(store)
    assert (found.holdout, found.labelled, found.waiting) == (20, 0, 0)
    assert (found.boxes_per_class, found.boxes_are, found.from_) == ({}, "unknown", "expected")
    assert found.smallest_visible_gain == pytest.approx(smallest_visible_gain(expected_gain(20)))
    assert found.more == 20
    assert found.smallest_visible_gain_then == pytest.approx(smallest_visible_gain(expected_gain(40)), rel=0.01)
    assert found.sentence == (
        "With 20 holdout images gains under .13 a round cannot be told from luck; label 20 more to see .09."
    )


def test_a_holdout_that_is_gone_can_be_asked_for_anew(store: Store) -> None:
    """Its tasks were deleted, and others imported."""
    with store.write() as connection:
        rounds.mark_deleted(connection, 7, range(1, 21))
    assert (power(store).holdout, power(store).more) == (0, 0)  # nothing is published: the first batch draws one
    add_round(store, 0, 0.0)
    with store.write() as connection:
        connection.execute(update(projects).values(published_round_id=select(round_rows.c.id).scalar_subquery()))
    found = power(store)
    assert (found.more, found.smallest_visible_gain, found.smallest_visible_gain_then) == (50, None, None)
    assert found.sentence == (
        "There is no holdout: nothing can be measured. Ask for 50 images, drawn at random with the next batch."
    )
    with store.write() as connection:
        assert rounds.ask_for_holdout(connection, 7, found.more) == 50
    assert (power(store).more, power(store).waiting) == (0, 50)
    with store.write() as connection:
        rounds.withdraw_holdout(connection, 7)
    set_to(store, holdout_size=0)
    assert power(store).sentence == "There is no holdout: nothing can be measured."  # as its settings want it


def test_boxes_are_expected_from_what_is_labelled_and_counted_at_last(store: Store) -> None:
    label(store, *range(101, 111), nut=3)
    found = power(store)
    assert (found.boxes_per_class, found.boxes_are) == ({"nut": 60.0}, "expected")  # 3 an image, 20 images
    label(store, *range(1, 11), nut=2, bolt=1)
    found = power(store)
    assert (found.boxes_per_class, found.boxes_are) == ({"nut": 40.0, "bolt": 20.0}, "expected")  # the random part
    label(store, *range(11, 21), nut=1)
    found = power(store)
    assert (found.boxes_per_class, found.boxes_are) == ({"nut": 30.0, "bolt": 10.0}, "labelled")
    assert found.labelled == 20
    assert found.smallest_visible_gain == pytest.approx(smallest_visible_gain(expected_gain(20, [30, 10])))


def numbers(images: int, **changed: Any) -> str:
    """SE .02, of which the training's part is .0075 / sqrt(2) = .0053 and the holdout's .0193."""
    found = {"rounds_used": 2, "se": 0.02, "mean_gain": 0.01, "training_sd": 0.0075, "holdout_images": images}
    return json.dumps({"numbers": {**found, **changed}})


def test_the_bootstrap_of_the_newest_round_knows_better(store: Store) -> None:
    add_round(store, 1, 0.5)
    add_round(store, 2, 0.6, verdict=numbers(20))
    found = power(store)
    assert (found.from_, found.smallest_visible_gain, found.more) == ("measured", pytest.approx(0.05), 20)
    # twice the images: sqrt(.0193^2 / 2 + .0053^2) = .0146
    assert found.smallest_visible_gain_then == pytest.approx(2.5 * 0.0146, abs=2e-4)
    assert found.sentence == (
        "With 20 holdout images gains under .05 a round cannot be told from luck; label 20 more to see .04."
    )


@pytest.mark.parametrize("told", [numbers(9), numbers(20, rounds_used=1), "{}", '{"verdict": "stop"}'])
def test_a_bootstrap_of_another_holdout_does_not(store: Store, told: str) -> None:
    add_round(store, 1, 0.6, verdict=told)
    assert power(store).from_ == "expected"


def test_no_more_than_the_pool_can_spare(store: Store) -> None:
    with store.write() as connection:
        connection.execute(update(tasks).where(tasks.c.task_id > 30).values(deleted=True))
        assert rounds.ask_for_holdout(connection, 7, 3) == 3
    found = power(store)
    assert (found.waiting, found.more) == (3, 2)  # ten are left, of which five may go
    assert "label 2 more to see .12" in found.sentence


def test_no_holdout(store: Store) -> None:
    with store.write() as connection:
        connection.execute(update(tasks).values(holdout=False))
    found = power(store)
    assert (found.holdout, found.smallest_visible_gain, found.more) == (0, None, 0)
    assert found.sentence == "There is no holdout: nothing can be measured."


def test_of_two_annotations_the_newest_counts(store: Store) -> None:
    label(store, 50, nut=3)
    with store.write() as connection:
        newer = {"id": 9, "task": 50, "updated_at": "2027", "result": regions(bolt=1)}
        skipped = {"id": 10, "task": 51, "updated_at": "2027", "result": regions(bolt=7), "was_cancelled": True}
        rounds.remember_annotations(connection, 7, [newer, skipped])
        assert boxes_per_label(connection, 7) == ({"bolt": 1}, 1)
        assert boxes_per_label(connection, 7, holdout=True) == ({}, 0)


# --- money ------------------------------------------------------------------------------------------------------------


def test_prices_by_hand(store: Store) -> None:
    label(store, *range(50, 60), lead_time=90.0)  # 1.5 minutes each: a quarter of an hour
    set_to(store, batch_size=200, cost_per_hour=40.0, value_per_point=50.0)
    with store.read() as connection:
        found = prices_of(connection, 7)
    assert (found.minutes_per_image, found.timed_images, found.hours) == (pytest.approx(1.5), 10, pytest.approx(0.25))
    assert found.cost_so_far == pytest.approx(10.0)
    assert (found.next_round_labels, found.cost_of_next_round) == (200, pytest.approx(200.0))  # five hours
    assert (found.worth_gain, found.worth_gain_from) == (pytest.approx(0.04), "prices")  # four points of 50 pay it
    assert found.sentence == (
        "An image takes 1.5 minutes; the next 200 take 5.0 hours, and cost 200. "
        "A round is worth it from .04 mAP50 on, by its cost and the value of a point."
    )


def test_prices_nobody_knows(store: Store) -> None:
    with store.read() as connection:
        found = prices_of(connection, 7)
        with pytest.raises(NotFound, match="project 8"):
            prices_of(connection, 8)
    assert (found.minutes_per_image, found.cost_so_far, found.cost_of_next_round) == (None, None, None)
    assert (found.worth_gain, found.worth_gain_from) == (0.02, "default")
    assert found.sentence.startswith("Nobody has labelled an image yet")


def test_settings_of_another_version_do_not_close_the_page(store: Store) -> None:
    set_to(store, no_such_setting=1)
    with store.read() as connection:
        assert prices_of(connection, 7).worth_gain == 0.02


def test_what_rounds_returned_by_hand(store: Store) -> None:
    set_to(store, cost_per_hour=30.0, value_per_point=100.0)
    add_round(store, 1, 0.4, minutes=120.0)
    interval = {"interval": {"gain_low": 0.02, "gain_high": 0.1}}
    add_round(store, 2, 0.46, minutes=240.0, labels=300, verdict=json.dumps(interval))
    add_round(store, 3, 0.45, minutes=240.0, labels=300)
    with store.read() as connection:
        first, second, third = returns_of(connection, 7)
    assert (first.gain, first.labels_added, first.cost, first.net) == (None, None, None, None)
    assert second.labels_added == 200
    assert second.hours_added == pytest.approx(2.0)
    assert (second.gain, second.gain_low, second.gain_high) == (pytest.approx(0.06), 0.02, 0.1)
    assert second.per_100_labels == pytest.approx(0.03)
    assert second.per_hour == pytest.approx(0.03)
    assert (second.cost, second.value, second.net) == pytest.approx((60.0, 600.0, 540.0))
    assert (third.per_100_labels, third.per_hour) == (None, None)  # nobody labelled anything
    assert (third.cost, third.value) == (0.0, pytest.approx(-100.0))


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_over_rounds_with_flags_and_words(store: Store) -> None:
    rows = [(0.4, 0.3, None), (0.41, 0.4, 0.2), (0.405, 0.5, 0.3), (0.41, 0.6, 0.2)]
    for number, (pit, wire, rare) in enumerate(rows, start=1):
        found = {"surface_pit": {"ap50": pit, "boxes": 60}, "wire": {"ap50": wire, "boxes": 500}}
        if rare is not None:
            found["<b>rare</b>"] = {"ap50": rare, "boxes": 4}
        report = json.dumps({"boxes_per_class": {"wire": 90, "surface_pit": 7}})
        add_round(store, number, 0.5, per_class=json.dumps(found), report=report)
    with store.read() as connection:
        rare, pit, wire = class_histories(connection, 7)
    assert (pit.name, pit.ap50, pit.boxes, pit.training_boxes) == ("surface_pit", [0.4, 0.41, 0.405, 0.41], 60, 7)
    assert (pit.flags, pit.sentence) == (
        ["plateau"],
        "AP of surface_pit has not moved for 3 rounds: collect more of it.",
    )
    assert (wire.flags, wire.sentence) == (["rising"], "AP of wire still rises.")
    assert (rare.ap50, rare.flags, rare.training_boxes) == ([None, 0.2, 0.3, 0.2], ["rare"], 0)
    assert rare.sentence.startswith("The holdout holds 4 boxes of <b>rare</b>")


def test_a_class_that_fell_is_not_said_to_stand_still(store: Store) -> None:
    for number, value in enumerate((0.5, 0.4, 0.35, 0.4), start=1):
        add_round(store, number, 0.5, per_class=json.dumps({"pit": {"ap50": value, "boxes": 60}}))
    with store.read() as connection:
        (pit,) = class_histories(connection, 7)
    assert (pit.flags, pit.sentence) == (["plateau"], "AP of pit has been lower for 3 rounds: collect more of it.")


def test_no_rounds_no_classes(store: Store) -> None:
    with store.read() as connection:
        assert class_histories(connection, 7) == []
        assert returns_of(connection, 7) == []
