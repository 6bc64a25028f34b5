from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from scripts import copy_store
from worker import rounds
from worker.errors import Conflict, NotFound
from worker.settings import ProjectSettings
from worker.store import Store, events, metadata, scores
from worker.store import rounds as round_rows


@pytest.fixture
def filled(store_url: str) -> str:
    """A store with project 7: three tasks, one in the holdout, one annotation; round 0 with a score."""
    store = Store(store_url)
    store.migrate()
    with store.write() as connection:
        rounds.connect_project(connection, 7, "<View/>", ProjectSettings(batch_size=3), "http://localhost:9090")
        rounds.remember_tasks(connection, 7, {1: "/a.jpg", 2: "/b.jpg", 3: "/c.jpg"})
        rounds.declare_holdout(connection, 7, [2])
        annotation = {"id": 5, "task": 1, "updated_at": "2026-11-23", "result": [], "lead_time": 6.5}
        rounds.remember_annotations(connection, 7, [annotation])
        round_id = connection.execute(select(round_rows.c.id)).scalar_one()
        row = {"round_id": round_id, "task_id": 1, "shard": 0, "utility": 0.25, "published_score": 0.0, "rank": 0}
        connection.execute(insert(scores).values(**row))
    store.close()
    return store_url


def rows(url: str) -> dict[str, list[tuple[object, ...]]]:
    store = Store(url)
    with store.read() as connection:
        found = {
            table.name: [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in metadata.sorted_tables
        }
    store.close()
    return found


def test_every_row_of_every_table_arrives(filled: str, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path / 'other.db'}"
    copied = copy_store.copy(filled, target)
    assert copied == {"projects": 1, "tasks": 3, "annotations": 1, "rounds": 1, "steps": 1, "scores": 1, "events": 1}
    assert rows(target) == rows(filled)


def test_the_copy_goes_on_counting_where_the_original_was(filled: str, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path / 'other.db'}"
    copy_store.copy(filled, target)
    before = max(row[0] for row in rows(filled)["events"])
    store = Store(target)
    with store.write() as connection:
        event = {"project_id": 7, "at": 1.0, "kind": "test", "key": "k"}
        assert connection.execute(insert(events).values(**event).returning(events.c.id)).scalar_one() == before + 1
    store.close()


def test_a_store_that_has_projects_is_not_written_to(filled: str, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path / 'other.db'}"
    copy_store.copy(filled, target)
    with pytest.raises(Conflict, match=r"other\.db has 1 projects already"):
        copy_store.copy(filled, target)
    assert rows(target) == rows(filled)


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no store at .*missing\.db"):
        copy_store.copy(f"sqlite:///{tmp_path / 'missing.db'}", f"sqlite:///{tmp_path / 'other.db'}")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_copied_or_why_not(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["copy_store", filled, f"sqlite:///{tmp_path / 'other.db'}"])
    assert copy_store.main() == 0
    assert "1 projects, " in capsys.readouterr().out
    assert copy_store.main() == 1
    assert "nothing was copied" in capsys.readouterr().err
