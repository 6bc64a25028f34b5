from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from worker import pruning, rounds
from worker.artifacts import round_key
from worker.pruning import prune
from worker.services import Services
from worker.settings import ProjectSettings, Settings
from worker.store import projects, scores
from worker.store import rounds as round_rows

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)
KEPT_FILES = ("weights.pt", "detections.npz", "manifest.json")


@pytest.fixture
def own(store_url: str, tmp_path: Path) -> Iterator[Services]:
    """Project 7 with rounds 0..4, closed, of ten rows each, two of them in the batch; 4 is served."""
    values: dict[str, Any] = {"database_url": store_url, "data_dir": tmp_path, "redis_url": "redis://127.0.0.1:1/0"}
    made = Services(Settings(_env_file=None, **values), "worker")
    made.store.migrate()
    with made.store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), "http://backend:9090")
        first = connection.execute(select(round_rows.c.id)).scalar_one()
        connection.execute(update(round_rows).values(state="done"))
        later = [{"project_id": 7, "number": number, "state": "done", "opened_at": 1.0} for number in range(1, 5)]
        connection.execute(insert(round_rows), later)
        rows = [
            {"round_id": first + number, "task_id": task, "shard": 0, "rank": task if task < 2 else None}
            for number in range(5)
            for task in range(10)
        ]
        connection.execute(insert(scores), rows)
        connection.execute(update(projects).values(published_round_id=first + 4))
    for number in range(5):
        for name in (*KEPT_FILES, "embeddings-00000.npy", "embeddings-00001.npy"):
            made.artifacts.put(round_key(7, number, name), b"content")
    yield made
    made.store.close()


def rows_by_round(own: Services) -> dict[int, int]:
    with own.store.read() as connection:
        query = select(round_rows.c.number, func.count()).join(scores, scores.c.round_id == round_rows.c.id)
        return {row[0]: row[1] for row in connection.execute(query.group_by(round_rows.c.number))}


def embeddings(own: Services, number: int) -> list[bool]:
    return [own.artifacts.exists(round_key(7, number, f"embeddings-{shard:05d}.npy")) for shard in (0, 1)]


def test_old_rounds_keep_their_batch_and_what_measures_them(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "ROWS_AT_ONCE", 3)
    assert prune(own, 7) == 3 * 8
    assert rows_by_round(own) == {0: 2, 1: 2, 2: 2, 3: 10, 4: 10}
    assert [embeddings(own, number) for number in range(5)] == [[False] * 2] * 3 + [[True] * 2] * 2
    assert all(own.artifacts.exists(round_key(7, number, name)) for number in range(5) for name in KEPT_FILES)
    assert prune(own, 7) == 0  # again: nothing left to do


def test_a_round_that_runs_and_the_one_served_lose_nothing(own: Services) -> None:
    with own.store.write() as connection:
        connection.execute(update(round_rows).where(round_rows.c.number == 0).values(state="scoring"))
        second = select(round_rows.c.id).where(round_rows.c.number == 1)
        connection.execute(update(projects).values(published_round_id=connection.execute(second).scalar_one()))
    prune(own, 7)
    assert rows_by_round(own) == {0: 10, 1: 10, 2: 2, 3: 10, 4: 10}


def test_an_artifact_store_that_was_away_keeps_no_embeddings_for_ever(
    own: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(pattern: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(own.artifacts, "delete_like", away)
    with pytest.raises(OSError, match="no route"):
        prune(own, 7)
    monkeypatch.undo()
    prune(own, 7)
    assert [embeddings(own, number) for number in range(5)] == [[False] * 2] * 3 + [[True] * 2] * 2


def test_no_round_takes_scores_over_from_one_that_was_pruned(own: Services) -> None:
    with own.store.write() as connection:
        connection.execute(update(round_rows).values(scored_as="the same"))
    prune(own, 7)
    with own.store.read() as connection:
        known = connection.execute(select(round_rows.c.scored_as).order_by(round_rows.c.number)).scalars().all()
    assert known == [None, None, None, "the same", "the same"]


def test_before_anything_is_served_nothing_is_old(own: Services) -> None:
    with own.store.write() as connection:
        connection.execute(update(projects).values(published_round_id=None))
    assert prune(own, 7) == 0
