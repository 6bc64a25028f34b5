from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import delete, func, insert, inspect, select
from sqlalchemy.exc import IntegrityError

from worker.errors import NotFound
from worker.store import (
    OPEN_STATES,
    Store,
    count_new_labels,
    events,
    get_project,
    get_round,
    insert_or_ignore,
    latest_round,
    loads,
    measured_rounds,
    metadata,
    open_round_of,
    projects,
    record_event,
    rounds,
    scores,
    steps,
    task_annotations,
    tasks,
    upsert,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    made = Store(store_url)
    made.migrate()
    with made.write() as connection:
        connection.execute(insert(projects), [{"id": number, "connected_at": 0.0} for number in (7, 8)])
    yield made
    made.close()


def round_row(number: int, state: str = "done", project_id: int = 7, **values: Any) -> dict[str, Any]:
    return {"project_id": project_id, "number": number, "state": state, "opened_at": 0.0, **values}


def run_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()
    return out.decode()


# --- migrations -------------------------------------------------------------------------------------------------------


def test_a_fresh_database_is_what_the_tables_say(store_url: str) -> None:
    store = Store(store_url)
    store.migrate()
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    assert set(inspect(store.engine).get_table_names()) == {*metadata.tables, "alembic_version"}
    checks = {name: inspect(store.engine).get_check_constraints(name) for name in ("rounds", "steps")}
    assert {name: [check["name"] for check in found] for name, found in checks.items()} == {
        "rounds": ["ck_rounds_state"],
        "steps": ["ck_steps_state"],
    }
    store.close()


def test_migrating_again_changes_nothing_and_loses_nothing(store: Store) -> None:
    before = _schema(store)
    store.migrate()
    Store(store.url).migrate()
    assert _schema(store) == before
    with store.read() as connection:
        assert get_project(connection, 7).id == 7


def _schema(store: Store) -> list[Any]:
    with store.read() as connection:
        rows = connection.exec_driver_sql("select type, name, tbl_name, sql from sqlite_master order by 1, 2")
        return [tuple(row) for row in rows]


def test_several_processes_migrate_at_once(store_url: str) -> None:
    code = "import sys; from worker.store import Store; store = Store(sys.argv[1]); store.migrate(); store.migrate()"
    started = [run_python(code, store_url) for _ in range(3)]
    for process in started:
        finish(process)
    store = Store(store_url)
    with store.read() as connection:
        assert connection.exec_driver_sql("select count(*) from alembic_version").scalar_one() == 1
        assert connection.execute(select(func.count()).select_from(projects)).scalar_one() == 0
    store.close()


# --- writers ----------------------------------------------------------------------------------------------------------


def test_writers_of_several_processes_lose_nothing(store: Store) -> None:
    code = """
import sys
from worker.store import Store, record_event
store = Store(sys.argv[1])
for number in range(100):
    with store.write() as connection:
        assert record_event(connection, 7, "test", key=f"{sys.argv[2]}-{number}")
"""
    started = [run_python(code, store.url, name) for name in ("a", "b", "c")]
    for process in started:
        finish(process)
    with store.read() as connection:
        keys = connection.execute(select(events.c.key)).scalars().all()
    assert sorted(keys) == sorted(f"{name}-{number}" for name in ("a", "b", "c") for number in range(100))


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    def write_half() -> None:
        with store.write() as connection:
            record_event(connection, 7, "test", key="half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    with store.read() as connection:
        assert connection.execute(select(events.c.id)).all() == []


def test_a_reader_sees_one_moment_and_waits_for_no_writer(store: Store) -> None:
    writing, release = threading.Event(), threading.Event()

    def write() -> None:
        with store.write() as connection:
            record_event(connection, 7, "test", key="slow")
            writing.set()
            release.wait(10)

    thread = threading.Thread(target=write)
    thread.start()
    assert writing.wait(10)
    began = time.monotonic()
    with store.read() as connection:
        assert connection.execute(select(events.c.id)).all() == []
        release.set()
        thread.join(10)
        assert connection.execute(select(events.c.id)).all() == []  # still the moment it began
    assert time.monotonic() - began < 5
    with store.read() as connection:
        assert connection.execute(select(events.c.key)).scalars().all() == ["slow"]


# --- constraints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", OPEN_STATES)
def test_the_database_refuses_a_second_open_round(store: Store, state: str) -> None:
    with store.write() as connection:
        connection.execute(insert(rounds).values(**round_row(0, "done")))
        connection.execute(insert(rounds).values(**round_row(1, state)))
        connection.execute(insert(rounds).values(**round_row(0, state, project_id=8)))  # another project's
    with pytest.raises(IntegrityError, match="UNIQUE"), store.write() as connection:
        connection.execute(insert(rounds).values(**round_row(2, "training")))
    with store.write() as connection:
        connection.execute(insert(rounds).values(**round_row(2, "failed")))


def test_the_database_refuses_states_numbers_and_projects_that_cannot_be(store: Store) -> None:
    for wrong in (round_row(0, "sleeping"), round_row(0, "done", project_id=99)):
        with pytest.raises(IntegrityError), store.write() as connection:
            connection.execute(insert(rounds).values(**wrong))
    with store.write() as connection:
        connection.execute(insert(rounds).values(**round_row(0)))
    with pytest.raises(IntegrityError), store.write() as connection:
        connection.execute(insert(rounds).values(**round_row(0)))


def test_one_step_of_a_kind_and_shard_in_a_round(store: Store) -> None:
    with store.write() as connection:
        round_id = connection.execute(insert(rounds).values(**round_row(0)).returning(rounds.c.id)).scalar_one()
        connection.execute(insert(steps), [{"round_id": round_id, "kind": "score", "shard": n} for n in (0, 1)])
    with pytest.raises(IntegrityError), store.write() as connection:
        connection.execute(insert(steps).values(round_id=round_id, kind="score", shard=1))


def test_a_deleted_rounds_id_and_its_steps_ids_never_come_back(store: Store) -> None:
    """A worker that still runs a cancelled step would take the new one of that id for its own."""
    ids = []
    for _ in range(2):
        with store.write() as connection:
            round_id = connection.execute(insert(rounds).values(**round_row(0)).returning(rounds.c.id)).scalar_one()
            step = insert(steps).values(round_id=round_id, kind="attach").returning(steps.c.id)
            ids.append((round_id, connection.execute(step).scalar_one()))
            connection.execute(delete(rounds).where(rounds.c.id == round_id))
            assert connection.execute(select(steps.c.id)).all() == []  # they go with it
    assert ids[0][0] != ids[1][0]
    assert ids[0][1] != ids[1][1]


# --- helpers ----------------------------------------------------------------------------------------------------------


def test_insert_or_ignore_counts_what_was_new(store: Store) -> None:
    rows = [{"project_id": 7, "task_id": number, "image": "a"} for number in range(1200)]
    with store.write() as connection:
        assert insert_or_ignore(connection, tasks, rows[:3]) == 3
        assert insert_or_ignore(connection, tasks, [{**row, "image": "b"} for row in rows]) == 1197
        assert insert_or_ignore(connection, tasks, []) == 0
        images = dict(connection.execute(select(tasks.c.task_id, tasks.c.image)).all())
    assert [images[number] for number in (0, 2, 3, 1199)] == ["a", "a", "b", "b"]


def test_upsert_replaces_the_named_columns_only(store: Store) -> None:
    with store.write() as connection:
        connection.execute(insert(tasks).values(project_id=7, task_id=1, image="a", holdout=True))
        upsert(connection, tasks, [{"project_id": 7, "task_id": number, "image": "b"} for number in (1, 2)])
        query = select(tasks.c.task_id, tasks.c.image, tasks.c.holdout).order_by(tasks.c.task_id)
        rows = connection.execute(query).all()
    assert [tuple(row) for row in rows] == [(1, "b", True), (2, "b", None)]


def test_an_events_key_is_taken_once_per_project(store: Store) -> None:
    with store.write() as connection:
        assert record_event(connection, 7, "ANNOTATION_CREATED", key="k")
        assert not record_event(connection, 7, "ANNOTATION_CREATED", key="k")
        assert record_event(connection, 8, "ANNOTATION_CREATED", key="k")
        assert record_event(connection, 7, "note")
        assert record_event(connection, 7, "note")  # without a key each is its own
        assert record_event(connection, 7, "x", key="l" * 500, detail="d" * 5000)
        row = connection.execute(select(events).where(events.c.kind == "x")).one()
    assert (len(row.key), len(row.detail)) == (120, 2000)


def test_new_labels_are_labelled_tasks_no_round_has_seen(store: Store) -> None:
    made = {  # task id: (holdout, seen, deleted, annotations as cancelled?)
        1: (False, None, False, [False]),
        2: (None, None, False, [False, True, False]),  # counts once
        3: (False, None, False, [True]),  # skipped
        4: (False, None, False, []),
        5: (False, 1, False, [False]),
        6: (False, None, True, [False]),
        7: (True, None, False, [False]),
    }
    with store.write() as connection:
        for task_id, (holdout, seen, deleted, cancelled) in made.items():
            values = {"task_id": task_id, "image": "a", "holdout": holdout, "seen_round_id": seen, "deleted": deleted}
            connection.execute(insert(tasks).values(project_id=7, **values))
            for number, skip in enumerate(cancelled):
                row = {"annotation_id": 10 * task_id + number, "task_id": task_id, "cancelled": skip}
                connection.execute(insert(task_annotations).values(project_id=7, **row))
        # of a task nobody has heard of yet, and of another project's task 4
        connection.execute(insert(task_annotations).values(project_id=7, annotation_id=990, task_id=99))
        connection.execute(insert(task_annotations).values(project_id=8, annotation_id=991, task_id=4))
        assert count_new_labels(connection, 7, holdout_too=False) == 2
        assert count_new_labels(connection, 7, holdout_too=True) == 3
        assert count_new_labels(connection, 8, holdout_too=True) == 0


def test_rounds_are_found_by_what_they_are(store: Store) -> None:
    with store.read() as connection:
        assert latest_round(connection, 7) is None
        assert open_round_of(connection, 7) is None
        with pytest.raises(NotFound, match="round 4 is not in the store"):
            get_round(connection, 4)
        with pytest.raises(NotFound, match=r"project 99 is not connected to this backend\. Label Studio: project -> "):
            get_project(connection, 99)
    with store.write() as connection:
        connection.execute(insert(rounds).values(**round_row(0)))
        connection.execute(insert(rounds).values(**round_row(1, "done", map50=0.5)))
        connection.execute(insert(rounds).values(**round_row(2, "failed", map50=0.9)))
        connection.execute(insert(rounds).values(**round_row(3, "done", map50=0.0)))
        connection.execute(insert(rounds).values(**round_row(4, "scoring", map50=0.6)))
    with store.read() as connection:
        assert latest_round(connection, 7).number == 4
        assert open_round_of(connection, 7).number == 4
        assert [row.number for row in measured_rounds(connection, 7)] == [1, 3, 4]


def test_a_disconnected_projects_rows_go_with_it(store: Store) -> None:
    with store.write() as connection:
        round_id = connection.execute(insert(rounds).values(**round_row(0)).returning(rounds.c.id)).scalar_one()
        connection.execute(insert(tasks).values(project_id=7, task_id=1, image="a"))
        connection.execute(insert(scores).values(round_id=round_id, task_id=1, shard=0))
        connection.execute(delete(projects).where(projects.c.id == 7))
        for table in (rounds, tasks, scores):
            assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 0


def test_loads_reads_nothing_as_an_empty_object() -> None:
    assert loads(None) == {}
    assert loads("") == {}
    assert loads("[1]") == [1]
