"""What labels cost: lead times with lunch breaks in them, prices, and the gain that pays for a round."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, update

from worker import rounds
from worker.errors import NotFound, SettingsInvalid
from worker.returns import annotator_time, capped_seconds, cost_of, worth_gain_of
from worker.settings import ProjectSettings, parse_project_settings
from worker.store import Store, projects
from worker.store import rounds as round_rows


def annotate(store: Store, *rows: tuple[int, int, float | None], **fields: Any) -> None:
    """(annotation id, task id, lead time)."""
    found = [
        {"id": number, "task": task_id, "lead_time": seconds, "updated_at": "2026", **fields}
        for number, task_id, seconds in rows
    ]
    with store.write() as connection:
        rounds.remember_annotations(connection, 7, found)


def test_a_lunch_break_is_capped_at_ten_medians_and_at_an_hour() -> None:
    assert capped_seconds([20.0, 30.0, 40.0, 5000.0]) == [20.0, 30.0, 40.0, 350.0]  # ten times 35
    assert capped_seconds([1200.0, 1200.0, 9000.0]) == [1200.0, 1200.0, 3600.0]
    assert capped_seconds([0.0, 10.0, 500.0]) == [0.0, 10.0, 500.0]  # the median of 10 and 500 is 255
    assert capped_seconds([float("nan"), -5.0, 7.0, float("inf")]) == [7.0]
    assert capped_seconds([]) == []
    assert capped_seconds([0.0, 0.0]) == [0.0, 0.0]


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=30))
def test_capping_never_adds_time_and_one_outlier_cannot_run_away(seconds: list[float]) -> None:
    capped = capped_seconds(seconds)
    assert all(after <= before for after, before in zip(capped, seconds, strict=True))
    assert max(capped) <= 3600


def test_time_is_per_image_whoever_labelled_it(store: Store) -> None:
    annotate(store, (1, 11, 60.0), (2, 11, 30.0), (3, 12, 30.0), (4, 13, None))
    annotate(store, (5, 14, 100.0), was_cancelled=True)
    with store.read() as connection:
        found = annotator_time(connection, 7)
    assert (found.images, found.hours) == (2, pytest.approx(120 / 3600))
    assert found.minutes_per_image == pytest.approx(1.0)


def test_nobody_was_timed(store: Store) -> None:
    with store.read() as connection:
        found = annotator_time(connection, 7)
    assert (found.images, found.hours, found.minutes_per_image) == (0, 0.0, None)


def test_cost_by_hand() -> None:
    # 200 images of 1.5 minutes are 5 hours, at 40 each
    assert cost_of(200, 1.5, ProjectSettings(cost_per_hour=40.0)) == pytest.approx(200.0)
    assert cost_of(200, None, ProjectSettings(cost_per_hour=40.0)) is None
    assert cost_of(200, 1.5, ProjectSettings()) is None


def worth(store: Store, **settings: Any) -> tuple[float, str]:
    with store.read() as connection:
        found = worth_gain_of(connection, 7, ProjectSettings(**settings))
    return found.value, found.source


def test_the_gain_that_is_worth_a_round(store: Store) -> None:
    priced = {"cost_per_hour": 40.0, "value_per_point": 100.0}
    assert worth(store) == (0.02, "default")
    assert worth(store, **priced) == (0.02, "default")  # nobody has labelled: what an image takes is not known
    annotate(store, (1, 11, 90.0), (2, 12, 90.0))
    # 200 images of 1.5 minutes cost 200: 2 points of 100 each
    assert worth(store, **priced) == (pytest.approx(0.02), "prices")
    assert worth(store, **priced, labels_per_round=100) == (pytest.approx(0.01), "prices")
    assert worth(store, **priced, worth_gain=0.05) == (0.05, "settings")
    assert worth(store, cost_per_hour=40.0) == (0.02, "default")
    assert worth(store, cost_per_hour=1e9, value_per_point=1.0) == (0.5, "prices")  # no gain pays for that
    assert worth(store, cost_per_hour=0.0, value_per_point=1.0) == (0.02, "default")  # free labels settle nothing


def test_a_round_is_as_large_as_the_published_batch(store: Store) -> None:
    annotate(store, (1, 11, 90.0))
    with store.write() as connection:
        values = {"project_id": 7, "number": 1, "state": "done", "opened_at": 0.0, "batch_size": 100}
        made = connection.execute(insert(round_rows).values(**values).returning(round_rows.c.id)).scalar_one()
        connection.execute(update(projects).values(published_round_id=made))
    assert worth(store, cost_per_hour=40.0, value_per_point=100.0) == (pytest.approx(0.01), "prices")


def test_an_unknown_project_is_named(store: Store) -> None:
    with store.read() as connection, pytest.raises(NotFound, match="project 8"):
        worth_gain_of(connection, 8, ProjectSettings())


def test_boxes_per_label_are_kept_with_the_annotation(store: Store) -> None:
    def box(label: object) -> dict[str, Any]:
        return {"type": "rectanglelabels", "value": {"rectanglelabels": label}}

    hostile = [box(["nut"]), box(["nut"]), box(["bolt"]), box([]), box("x"), {"type": "choices"}, None, 7]
    annotate(store, (1, 11, 5.0), result=hostile)
    with store.read() as connection:
        row = connection.exec_driver_sql("select n_boxes, classes from annotations").one()
    assert row.n_boxes == 5
    assert json.loads(row.classes) == {"nut": 2, "bolt": 1}


@pytest.mark.parametrize(
    "values", [{"worth_gain": 0.0}, {"worth_gain": 1.5}, {"cost_per_hour": -1.0}, {"value_per_point": 0.0}]
)
def test_prices_that_cannot_be_right_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingsInvalid, match=next(iter(values))):
        parse_project_settings(values)
