from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from worker import rounds, steps
from worker.errors import Conflict, NotFound
from worker.settings import ProjectSettings
from worker.store import (
    Store,
    count_new_labels,
    events,
    get_project,
    latest_round,
    open_round_of,
    projects,
    scores,
    task_annotations,
    tasks,
)
from worker.store import rounds as round_rows
from worker.store import steps as step_rows

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "<View/>"
URL = "http://backend:9090"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    made = Store(store_url)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def published(store: Store) -> Store:
    """Project 7: tasks 1..10, 9 and 10 held out, round 0 published with a batch of 4."""
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=4), URL)
        rounds.remember_tasks(connection, 7, {number: f"{number}.jpg" for number in range(1, 11)})
        connection.execute(update(tasks).values(holdout=tasks.c.task_id >= 9))
        end_round(connection, "done", batch_size=4)
    return store


def end_round(connection: Any, state: str, error: str | None = None, **values: Any) -> None:
    """As the worker ends the open round; a done one is published."""
    row = open_round_of(connection, 7)
    assert row is not None
    connection.execute(update(step_rows).where(step_rows.c.round_id == row.id).values(state="done"))
    if values:
        connection.execute(update(round_rows).where(round_rows.c.id == row.id).values(**values))
    rounds.close_round(connection, row.id, state, error)
    if state == "done":
        connection.execute(update(projects).values(published_version=f"al-{row.number:06d}", published_round_id=row.id))


def label(connection: Any, *task_ids: int, cancelled: bool = False) -> None:
    rounds.remember_annotations(
        connection,
        7,
        [
            {"id": 100 + task_id, "task": task_id, "updated_at": "2026-01-01", "was_cancelled": cancelled}
            for task_id in task_ids
        ],
    )


def numbers(store: Store) -> list[tuple[int, str]]:
    with store.read() as connection:
        query = select(round_rows.c.number, round_rows.c.state).order_by(round_rows.c.number)
        return [tuple(row) for row in connection.execute(query)]  # type: ignore[misc]


def kinds(store: Store) -> list[str]:
    with store.read() as connection:
        return list(connection.execute(select(step_rows.c.kind).order_by(step_rows.c.id)).scalars())


# --- connecting -------------------------------------------------------------------------------------------------------


def test_connecting_opens_round_0_once(store: Store) -> None:
    with store.write() as connection:
        assert rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=4), URL) is True
        assert rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=4), URL) is False
        row = get_project(connection, 7)
    assert numbers(store) == [(0, "attaching")]
    assert kinds(store) == ["attach"]
    assert (row.extra_params, row.backend_url, row.label_config) == ('{"batch_size":4}', URL, CONFIG)
    assert rounds.served_version(row) == "hardfirst-pending"
    assert rounds.settings_of(row) == ProjectSettings(batch_size=4)


def test_new_settings_reach_a_first_round_that_has_not_begun_and_no_other(store: Store) -> None:
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=4), URL)
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=5), URL)
        assert rounds.settings_of(latest_round(connection, 7)).batch_size == 5
        connection.execute(update(step_rows).values(state="running"))
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=6), URL)
        assert rounds.settings_of(latest_round(connection, 7)).batch_size == 5
        assert rounds.settings_of(get_project(connection, 7)).batch_size == 6


def test_a_first_round_that_failed_begins_again_when_something_changed(store: Store) -> None:
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), URL)
        end_round(connection, "failed", "nosuch.pt is not there")
        first = latest_round(connection, 7)
        assert get_project(connection, 7).problem == "nosuch.pt is not there"
        assert rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), URL) is False  # somebody only looked
        assert rounds.connect_project(connection, 7, CONFIG, ProjectSettings(seed=1), URL) is True
        second = latest_round(connection, 7)
        assert get_project(connection, 7).problem is None
    assert first is not None
    assert second is not None
    assert (second.number, second.state) == (0, "attaching")
    assert second.id != first.id


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_an_admin_begins_a_first_round_again(store: Store, state: str) -> None:
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), URL)
        end_round(connection, state, "a reason")
        assert rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), URL) is False
        again = rounds.open_round(connection, 7, "an admin")
        latest = latest_round(connection, 7)
    assert latest is not None
    assert (latest.id, latest.number, latest.state) == (again, 0, "attaching")


def test_a_later_round_that_failed_is_not_begun_again_by_looking_at_the_page(published: Store) -> None:
    with published.write() as connection:
        rounds.open_round(connection, 7, "an admin")
        end_round(connection, "failed", "no box")
        assert rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), URL) is False
    assert numbers(published) == [(0, "done"), (1, "failed")]


# --- the trigger ------------------------------------------------------------------------------------------------------


def test_as_many_labels_as_the_batch_asked_for_open_a_round(published: Store) -> None:
    with published.write() as connection:
        label(connection, 1, 2, 9)  # the first batch has holdout tasks in it: they count
        assert rounds.trigger(connection, 7) is None
        assert rounds.open_round_if_triggered(connection, 7) is None
        label(connection, 3)
        assert rounds.trigger(connection, 7) == "4 new labels (a round opens at 4)"
        opened = rounds.open_round_if_triggered(connection, 7)
        assert opened is not None
        assert rounds.trigger(connection, 7) is None  # one is open
        seen = connection.execute(select(tasks.c.task_id).where(tasks.c.seen_round_id == opened)).scalars().all()
    assert sorted(seen) == [1, 2, 3, 9]
    assert numbers(published) == [(0, "done"), (1, "training")]
    assert kinds(published) == ["attach", "train"]


def test_after_the_first_round_the_holdout_does_not_count(published: Store) -> None:
    with published.write() as connection:
        rounds.open_round(connection, 7, "an admin")
        end_round(connection, "done", batch_size=2)
        label(connection, 9, 10, 1)
        assert rounds.trigger(connection, 7) is None
        label(connection, 2)
        assert rounds.trigger(connection, 7) == "2 new labels (a round opens at 2)"


def test_labels_per_round_wins_over_the_batch(published: Store) -> None:
    with published.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(labels_per_round=1), URL)
        label(connection, 1)
        assert rounds.trigger(connection, 7) == "1 new labels (a round opens at 1)"


def test_the_last_labels_of_a_pool_open_a_round_though_they_are_few(published: Store) -> None:
    with published.write() as connection:
        label(connection, 1, 2)
        rounds.mark_deleted(connection, 7, range(3, 11))
        assert rounds.trigger(connection, 7) == "2 new labels, and the pool is empty"
        label(connection, 1, 2, cancelled=True)
    with published.write() as connection:
        rounds.forget_annotations(connection, 7, [101, 102])
        assert rounds.trigger(connection, 7) is None


def test_labels_of_a_failed_round_open_no_other(published: Store) -> None:
    with published.write() as connection:
        label(connection, 1, 2, 3, 4)
        rounds.open_round_if_triggered(connection, 7)
        end_round(connection, "failed", "no box")
        assert rounds.trigger(connection, 7) is None
        label(connection, 5, 6, 7)
        assert rounds.trigger(connection, 7) is None
        label(connection, 8)
        assert rounds.trigger(connection, 7) == "4 new labels (a round opens at 4)"


def test_an_accepted_stop_and_the_last_round_end_what_opens_by_itself(published: Store) -> None:
    with published.write() as connection:
        label(connection, 1, 2, 3, 4)
        rounds.accept_stop(connection, 7, True)
        assert rounds.trigger(connection, 7) is None
        rounds.accept_stop(connection, 7, False)
        assert rounds.trigger(connection, 7) is not None
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(max_rounds=1, batch_size=4), URL)
        rounds.open_round_if_triggered(connection, 7)
        end_round(connection, "done", batch_size=1)
        label(connection, 5, 6)
        assert rounds.trigger(connection, 7) is None
        rounds.open_round(connection, 7, "an admin asked for it")  # people may start more
    assert numbers(published) == [(0, "done"), (1, "done"), (2, "training")]


def test_nothing_opens_before_the_first_batch(store: Store) -> None:
    with store.write() as connection:
        with pytest.raises(NotFound, match="project 7 is not connected"):
            rounds.open_round(connection, 7, "too early")
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(labels_per_round=1), URL)
        rounds.remember_tasks(connection, 7, {1: "1.jpg"})
        label(connection, 1)
        assert rounds.trigger(connection, 7) is None
        with pytest.raises(Conflict, match="round 0 of project 7 is attaching; wait for it, or cancel it"):
            rounds.open_round(connection, 7, "too early")


def test_processes_that_see_the_trigger_at_once_open_one_round(published: Store) -> None:
    with published.write() as connection:
        label(connection, 1, 2, 3, 4)
    code = """
import sys
from worker import rounds
from worker.errors import Conflict
from worker.store import Store
store = Store(sys.argv[1])
for _ in range(20):
    with store.write() as connection:
        rounds.open_round_if_triggered(connection, 7)
    try:
        with store.write() as connection:
            rounds.open_round(connection, 7, "pressed")
    except Conflict:
        pass
"""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = [subprocess.Popen([sys.executable, "-c", code, published.url], env=env) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert numbers(published) == [(0, "done"), (1, "training")]
    assert kinds(published) == ["attach", "train"]


# --- closing ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_round_leaves_no_step_and_can_be_followed(published: Store) -> None:
    with published.write() as connection:
        with pytest.raises(Conflict, match="project 7 has no open round"):
            rounds.cancel_round(connection, 7)
        rounds.open_round(connection, 7, "an admin")
        assert rounds.cancel_round(connection, 7) == 1
        rounds.open_round(connection, 7, "an admin")
        assert get_project(connection, 7).problem is None
    assert numbers(published) == [(0, "done"), (1, "cancelled"), (2, "training")]
    assert kinds(published) == ["attach", "train"]


def test_closing_twice_keeps_the_first_end(published: Store) -> None:
    with published.write() as connection:
        round_id = rounds.open_round(connection, 7, "an admin")
        rounds.close_round(connection, round_id, "failed", "first")
        rounds.close_round(connection, round_id, "done")
        row = latest_round(connection, 7)
        assert row is not None
        assert (row.state, row.error) == ("failed", "first")
        assert row.closed_at is not None
        told = connection.execute(select(events.c.detail).where(events.c.kind == "round failed")).scalars().all()
    assert told == ["round 1 failed: first"]


def test_an_open_round_with_a_failed_step_is_found_and_closed(published: Store) -> None:
    with published.write() as connection:
        rounds.open_round(connection, 7, "an admin")
        connection.execute(
            update(step_rows).where(step_rows.c.kind == "train").values(state="failed", error="6 workers died at it")
        )
        rounds.close_dead_rounds(connection)
        assert get_project(connection, 7).problem == "6 workers died at it"
    assert numbers(published) == [(0, "done"), (1, "failed")]


def test_a_failed_purge_fails_no_round(published: Store) -> None:
    with published.write() as connection:
        round_id = rounds.open_round(connection, 7, "an admin")
        steps.add(connection, round_id, "purge")
        connection.execute(update(step_rows).where(step_rows.c.kind == "purge").values(state="failed"))
        rounds.close_dead_rounds(connection)
    assert numbers(published) == [(0, "done"), (1, "training")]


# --- the store's copy of tasks and annotations ------------------------------------------------------------------------


def test_an_older_copy_of_an_annotation_never_replaces_a_newer_one(published: Store) -> None:
    def state(connection: Any) -> list[tuple[Any, ...]]:
        row = task_annotations.c
        return [tuple(found) for found in connection.execute(select(row.updated_at, row.cancelled, row.n_boxes))]

    boxes = [{"type": "rectanglelabels"}, {"type": "labels"}, {"type": "rectanglelabels"}]
    with published.write() as connection:
        for updated_at, cancelled, result in (
            ("2026-01-02T00:00:00Z", False, boxes),
            ("2026-01-01T00:00:00Z", True, []),
        ):
            one = {"id": 5, "task": 1, "updated_at": updated_at, "was_cancelled": cancelled, "result": result}
            rounds.remember_annotations(connection, 7, [one])
        assert state(connection) == [("2026-01-02T00:00:00Z", False, 2)]
        rounds.remember_annotations(connection, 7, [{**one, "updated_at": "2026-01-03T00:00:00Z"}])
        assert state(connection) == [("2026-01-03T00:00:00Z", True, 0)]
        rounds.remember_annotations(connection, 7, [])


def test_many_annotations_at_once_are_all_remembered(published: Store) -> None:
    found = [{"id": number, "task": number, "updated_at": "2026"} for number in range(1, 1501)]
    with published.write() as connection:
        rounds.remember_annotations(connection, 7, found)
        rounds.remember_annotations(connection, 7, found)
        assert rounds.task_ids_of_annotations(connection, 7) == set(range(1, 1501))
        rounds.forget_annotations(connection, 7, range(1, 1501))
        assert rounds.task_ids_of_annotations(connection, 7) == set()


def test_known_tasks_keep_their_split_and_get_their_new_address(published: Store) -> None:
    with published.write() as connection:
        connection.execute(update(tasks).where(tasks.c.task_id == 9).values(image_problem="HTTP 404"))
        rounds.remember_tasks(connection, 7, {9: "moved.jpg", 8: "8.jpg", 11: "new.jpg"})
        rows = {row.task_id: row for row in connection.execute(select(tasks))}
    assert (rows[9].image, rows[9].holdout, rows[9].image_problem) == ("moved.jpg", True, None)
    assert (rows[8].image, rows[8].holdout) == ("8.jpg", False)
    assert (rows[11].image, rows[11].holdout, rows[11].deleted) == ("new.jpg", None, False)


def test_tasks_that_are_gone_take_their_annotations_along(published: Store) -> None:
    with published.write() as connection:
        label(connection, 1, 2)
        rounds.forget_missing_tasks(connection, 7, set(range(2, 11)))
        assert rounds.task_ids_of_annotations(connection, 7) == {2}
        assert rounds.holdout_of(connection, 7) == {number: number >= 9 for number in range(2, 11)}


def test_a_holdout_is_declared_before_splits_are_drawn_and_never_after(store: Store) -> None:
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), URL)
        rounds.remember_tasks(connection, 7, dict.fromkeys(range(1, 5), "a"))
        rounds.declare_holdout(connection, 7, [])
        rounds.declare_holdout(connection, 7, [2, 3])
        assert rounds.holdout_of(connection, 7) == {1: None, 2: True, 3: True, 4: None}
        connection.execute(update(tasks).where(tasks.c.holdout.is_(None)).values(holdout=False))
        rounds.declare_holdout(connection, 7, [1, 4])
        assert rounds.holdout_of(connection, 7) == {1: False, 2: True, 3: True, 4: False}


def test_a_round_keeps_the_settings_it_began_with(published: Store) -> None:
    with published.write() as connection:
        rounds.open_round(connection, 7, "an admin")
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=9), URL)
        assert rounds.settings_of(latest_round(connection, 7)).batch_size == 4
        assert rounds.settings_of(get_project(connection, 7)).batch_size == 9
        connection.execute(insert(projects).values(id=8, connected_at=0.0))
        assert rounds.settings_of(get_project(connection, 8)) == ProjectSettings()


# --- what a review found ----------------------------------------------------------------------------------------------


def test_a_task_that_was_missed_by_a_listing_comes_back(published: Store) -> None:
    with published.write() as connection:
        rounds.mark_deleted(connection, 7, [9])
        assert 9 not in rounds.holdout_of(connection, 7)
        assert rounds.not_for_training(connection, 7) == {9, 10}  # taken for deleted, it is still no training image
        rounds.remember_tasks(connection, 7, {9: "9.jpg"})
        assert rounds.holdout_of(connection, 7)[9] is True


def test_a_number_that_is_used_again_is_a_new_task(published: Store) -> None:
    """Label Studio on SQLite gives the numbers of deleted tasks to the next import."""
    with published.write() as connection:
        label(connection, 1)
        round_id = rounds.open_round(connection, 7, "an admin")
        scored = [{"round_id": round_id, "task_id": number, "shard": 0, "regions": "[]"} for number in (1, 8, 9)]
        connection.execute(insert(scores), scored)
        rounds.mark_deleted(connection, 7, [1, 8, 9])
        rounds.remember_tasks(connection, 7, {1: "another.jpg", 8: "8.jpg", 9: "yet-another.jpg"})
        rows = {row.task_id: row for row in connection.execute(select(tasks))}
        assert [(rows[one].image, rows[one].holdout, rows[one].seen_round_id) for one in (1, 8, 9)] == [
            ("another.jpg", None, None),
            ("8.jpg", False, None),  # the same image: it was only missed
            ("yet-another.jpg", None, None),
        ]
        assert not any(rows[one].deleted for one in (1, 8, 9))
        assert connection.execute(select(scores.c.task_id)).scalars().all() == [8]
        label(connection, 1)
        counted = count_new_labels(connection, 7, holdout_too=False)
    assert counted == 1


def test_twins_of_the_holdout_are_not_for_training(published: Store) -> None:
    with published.write() as connection:
        connection.execute(update(tasks).where(tasks.c.task_id == 3).values(twin=True))
        assert rounds.not_for_training(connection, 7) == {3, 9, 10}


def test_labels_of_the_holdout_alone_open_no_round(published: Store) -> None:
    with published.write() as connection:
        connection.execute(update(round_rows).values(batch_size=2))
        label(connection, 9, 10)
        assert rounds.trigger(connection, 7) is None
        label(connection, 1)
        assert rounds.trigger(connection, 7) == "3 new labels (a round opens at 2)"


def test_a_last_batch_with_a_skip_closes(published: Store) -> None:
    with published.write() as connection:
        label(connection, 1, 2)
        label(connection, 3, 4, 5, 6, 7, 8, 9, 10, cancelled=True)
        connection.execute(update(round_rows).values(batch_size=6))
        assert rounds.trigger(connection, 7) == "2 new labels, and the pool is empty"


def test_max_rounds_counts_rounds_that_ended_well(published: Store) -> None:
    with published.write() as connection:
        settings = ProjectSettings(batch_size=4, max_rounds=1)
        rounds.connect_project(connection, 7, CONFIG, settings, URL)
        for _ in range(2):
            rounds.open_round(connection, 7, "an admin")
            rounds.cancel_round(connection, 7)
        label(connection, 1, 2, 3, 4)
        assert rounds.open_round_if_triggered(connection, 7) is not None
        end_round(connection, "done", batch_size=4)
        label(connection, 5, 6, 7, 8)
        assert rounds.trigger(connection, 7) is None


def test_a_round_that_somebody_closed_stays_as_it_was_closed(published: Store) -> None:
    with published.write() as connection:
        round_id = rounds.open_round(connection, 7, "an admin")
        rounds.close_round(connection, round_id, "done")
        rounds.close_round(connection, round_id, "cancelled", "too late")
    assert numbers(published) == [(0, "done"), (1, "done")]


# --- pausing, trying again, selecting again ---------------------------------------------------------------------------


def details(store: Store, kind: str) -> list[str]:
    with store.read() as connection:
        query = select(events.c.detail).where(events.c.kind == kind).order_by(events.c.id)
        return list(connection.execute(query).scalars())


def pause(store: Store, paused: bool) -> None:
    with store.write() as connection:
        rounds.pause(connection, 7, paused, "ada")


def test_while_paused_no_round_opens_and_afterwards_it_does(published: Store) -> None:
    pause(published, True)
    with published.write() as connection:
        label(connection, 1, 2, 3, 4)
        assert rounds.open_round_if_triggered(connection, 7) is None
        with pytest.raises(Conflict, match="project 7 is paused"):
            rounds.open_round(connection, 7, "by hand")
    pause(published, True)
    pause(published, False)
    with published.write() as connection:
        assert rounds.open_round_if_triggered(connection, 7) is not None
    assert (details(published, "paused"), details(published, "resumed")) == (["by ada"], ["by ada"])


def open_and_fail(store: Store, kind: str, done: tuple[str, ...] = ()) -> int:
    """A round whose step of `kind` failed for good, after steps of `done`."""
    with store.write() as connection:
        label(connection, 1, 2, 3, 4)
        round_id = rounds.open_round(connection, 7, "test")
        for earlier in done:
            connection.execute(update(step_rows).where(step_rows.c.kind == earlier).values(state="done"))
        if kind != "train":
            steps.add(connection, round_id, kind, range(3) if kind == "score" else (0,))
        this = update(step_rows).where(step_rows.c.round_id == round_id, step_rows.c.kind == kind)
        connection.execute(this.where(step_rows.c.shard == 0).values(state="done" if kind == "score" else "failed"))
        if kind == "score":  # 0 is done, 1 failed, 2 waits and is taken away
            connection.execute(this.where(step_rows.c.shard == 1).values(state="failed", failures=3, error="boom"))
            rows = [{"round_id": round_id, "task_id": one, "shard": one % 3} for one in range(1, 11)]
            connection.execute(insert(scores), rows)
        rounds.close_round(connection, round_id, "failed", "boom")
    return round_id


def states(store: Store, round_id: int) -> list[tuple[str, int, str, int]]:
    with store.read() as connection:
        columns = (step_rows.c.kind, step_rows.c.shard, step_rows.c.state, step_rows.c.failures)
        query = select(*columns).where(step_rows.c.round_id == round_id).order_by(step_rows.c.kind, step_rows.c.shard)
        return [tuple(row) for row in connection.execute(query)]  # type: ignore[misc]


def test_a_round_is_tried_again_from_the_step_that_failed(published: Store) -> None:
    round_id = open_and_fail(published, "train")
    with published.write() as connection:
        assert rounds.retry_round(connection, 7, "ada") == 1
        row = open_round_of(connection, 7)
        assert row is not None
        assert (row.id, row.state, row.error, row.closed_at) == (round_id, "training", None, None)
        assert get_project(connection, 7).problem is None
    assert states(published, round_id) == [("train", 0, "waiting", 0)]
    assert details(published, "round tried again") == ["round 1, from train on, by ada"]


def test_a_scoring_is_tried_again_with_the_shards_that_were_taken_away_and_without_those_that_are_done(
    published: Store,
) -> None:
    round_id = open_and_fail(published, "score", done=("train",))
    assert states(published, round_id) == [("score", 0, "done", 0), ("score", 1, "failed", 3), ("train", 0, "done", 0)]
    with published.write() as connection:
        rounds.retry_round(connection, 7, "ada")
    assert numbers(published) == [(0, "done"), (1, "scoring")]
    assert states(published, round_id) == [
        ("score", 0, "done", 0), ("score", 1, "waiting", 0), ("score", 2, "waiting", 0), ("train", 0, "done", 0),
    ]  # fmt: skip


def test_a_second_failure_is_in_the_log_like_the_first(published: Store) -> None:
    round_id = open_and_fail(published, "train")
    with published.write() as connection:
        rounds.retry_round(connection, 7, "ada")
        rounds.close_round(connection, round_id, "failed", "boom again")
    assert details(published, "round failed") == ["round 1 failed: boom", "round 1 failed: boom again"]


def test_only_the_latest_round_is_tried_again_and_only_when_it_failed(published: Store) -> None:
    with published.write() as connection, pytest.raises(Conflict, match="did not fail"):
        rounds.retry_round(connection, 7, "ada")
    open_and_fail(published, "train")
    pause(published, True)
    with published.write() as connection, pytest.raises(Conflict, match="is paused"):
        rounds.retry_round(connection, 7, "ada")
    pause(published, False)
    with published.write() as connection:
        rounds.open_round(connection, 7, "another")
        with pytest.raises(Conflict, match="round 2 of project 7 is training"):
            rounds.retry_round(connection, 7, "ada")


def test_a_deletion_of_old_versions_is_tried_again_without_its_round(published: Store) -> None:
    with published.write() as connection:
        row = latest_round(connection, 7)
        assert row is not None
        values = {"round_id": row.id, "kind": "purge", "state": "failed", "failures": 3, "error": "502"}
        connection.execute(insert(step_rows).values(**values))
        assert rounds.retry_purge(connection, 7) == 1
        assert rounds.retry_purge(connection, 7) == 0
    assert states(published, row.id) == [("attach", 0, "done", 0), ("purge", 0, "waiting", 0)]
    assert numbers(published) == [(0, "done")]


def test_a_round_that_only_selects_takes_the_published_detector(published: Store) -> None:
    with published.write() as connection:
        with pytest.raises(Conflict, match="no detector has been trained yet"):
            rounds.open_select_round(connection, 7, ProjectSettings(), "test")
        label(connection, 1, 2, 3, 4)
        rounds.open_round(connection, 7, "test")
        end_round(connection, "done", weights="w.pt", weights_sha256="ab", report='{"names": {}}', map50=0.5, labels=4)
        label(connection, 5)
        round_id = rounds.open_select_round(connection, 7, ProjectSettings(strategy="coverage", batch_size=3), "why")
        row = open_round_of(connection, 7)
        assert row is not None
        assert (row.id, row.number, row.kind, row.state, row.why) == (round_id, 2, "select", "scoring", "why")
        assert (row.weights, row.weights_sha256, row.report, row.map50) == ("w.pt", "ab", '{"names": {}}', None)
        assert rounds.settings_of(row) == ProjectSettings(strategy="coverage", batch_size=3)
        assert rounds.settings_of(get_project(connection, 7)) == ProjectSettings(batch_size=4), "the project's stay"
        with pytest.raises(Conflict, match="round 2 of project 7 is scoring"):
            rounds.open_select_round(connection, 7, ProjectSettings(), "test")
        end_round(connection, "done", batch_size=3)
        assert rounds.rounds_done(connection, 7) == 1, "max_rounds counts trainings"
        assert rounds.towards_next(connection, get_project(connection, 7), row, ProjectSettings()) == (1, 3)


def test_the_log_says_what_a_setting_was_and_is_and_who_changed_it(store: Store) -> None:
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=4, epochs=10), URL)
        changed = ProjectSettings(batch_size=50, strategy_options={"alpha": 0.5})
        rounds.connect_project(connection, 7, CONFIG, changed, URL, "ada")
        rounds.connect_project(connection, 7, "<View></View>", changed, "http://new:1")
    assert details(store, "settings") == [
        'strategy_options: default -> {"alpha": 0.5}; batch_size: 4 -> 50; epochs: 10 -> default, by ada',
        "the label config; this backend's address: http://backend:9090 -> http://new:1, by Label Studio",
    ]


def test_a_backend_has_moved_when_label_studio_calls_it_by_another_address(store: Store) -> None:
    with store.write() as connection:
        assert not rounds.has_moved(connection, 8, "http://new:9090")  # never seen before
        rounds.connect_project(connection, 8, CONFIG, ProjectSettings(), "http://old:9090")
        assert not rounds.has_moved(connection, 8, "http://old:9090")
        assert rounds.has_moved(connection, 8, "http://new:9090")
