from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select

from demo import history
from strategies.diversity import near_duplicate_groups
from worker.artifacts import Artifacts, round_key
from worker.evaluation import EvaluationArrays, average_precision
from worker.store import OPEN_STATES, Store, projects, rounds, scores, task_annotations, tasks

NOW = 1_790_000_000.0


def filled(folder: Path, **values: Any) -> tuple[Store, Artifacts]:
    store, artifacts = history.open_folder(folder)
    assert history.fill(store, artifacts, tasks=600, rounds=3, now=NOW, **values) == 1
    return store, artifacts


def rows(store: Store, table: Any) -> list[tuple[Any, ...]]:
    with store.read() as connection:
        return [tuple(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns))]


def test_the_rows_are_those_of_such_a_project(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    with store.read() as connection:
        count = {table.name: connection.scalar(select(func.count()).select_from(table)) for table in (tasks, scores)}
        held = connection.scalar(select(func.count()).where(tasks.c.holdout.is_(True)))
        batch = connection.scalar(
            select(func.count()).join(projects, projects.c.published_round_id == scores.c.round_id)
            .where(scores.c.rank.is_not(None))
        )  # fmt: skip
        labelled = connection.scalar(select(func.count(task_annotations.c.task_id.distinct())))
        numbers = connection.execute(select(rounds.c.number, rounds.c.labels, rounds.c.state)).all()
    assert count == {"tasks": 600, "scores": 4 * 600}
    assert (held, batch) == (120, 30)
    assert labelled == 120 + 3 * 30 + 9  # the holdout, three batches, and what was labelled of the last one
    assert [tuple(row) for row in numbers] == [(0, None, "done"), (1, 30, "done"), (2, 60, "done"), (3, 90, "done")]


def test_the_curve_is_what_its_artifacts_give(tmp_path: Path) -> None:
    store, artifacts = filled(tmp_path)
    with store.read() as connection:
        stored = connection.execute(select(rounds.c.number, rounds.c.map50).where(rounds.c.map50.is_not(None))).all()
    for number, map50 in stored:
        arrays = EvaluationArrays.load(artifacts.get(round_key(1, number, "evaluation.npz")))
        ap50 = average_precision(arrays, np.unique(arrays.target_cls))[:, 0]
        assert map50 == pytest.approx(ap50.mean())
    assert stored[0].map50 < stored[-1].map50


def test_the_same_seed_gives_the_same_project(tmp_path: Path) -> None:
    first, second, other = (filled(tmp_path / name, seed=seed)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for table in (projects, tasks, rounds, task_annotations, scores):
        assert rows(first, table) == rows(second, table)
    assert rows(first, scores) != rows(other, scores)


def test_groups_of_near_duplicates_are_groups_to_the_selection(tmp_path: Path) -> None:
    _, artifacts = filled(tmp_path)
    shard = np.load(tmp_path / "artifacts" / round_key(1, 3, "embeddings-00000.npy"))
    groups = near_duplicate_groups(shard, 0.99)
    manifest = json.loads(artifacts.get(round_key(1, 3, "manifest.json")))
    told = {one["task_id"]: one.get("alike", 0) for one in manifest["tasks"]}
    sizes = np.bincount(groups)
    assert 1 < sizes.max() <= 10
    assert set(told.values()) <= set(range(10))


@pytest.mark.parametrize("last", ["training", "scoring", "failed"])
def test_one_more_round(tmp_path: Path, last: str) -> None:
    store, _ = filled(tmp_path, last=last)
    with store.read() as connection:
        newest = connection.execute(select(rounds).order_by(rounds.c.number.desc())).first()
    assert newest is not None
    assert (newest.number, newest.state) == (4, last)
    assert (newest.error is None) == (newest.state in OPEN_STATES)


def test_too_few_tasks_are_refused(tmp_path: Path) -> None:
    store, artifacts = history.open_folder(tmp_path)
    with pytest.raises(ValueError, match="give at least 480"):
        history.fill(store, artifacts, tasks=100, rounds=12)
