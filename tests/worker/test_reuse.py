"""What is scored already is not scored again: by an attempt before, or in an earlier round with the same detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, update

from worker import model, rounds, scoring, steps
from worker.model import TaskScore
from worker.reuse import known_scores, remember_key, scoring_key, shard_embeddings
from worker.scoring import plan_scoring, score_one_shard
from worker.services import Services
from worker.settings import ProjectSettings, Settings
from worker.store import get_project, get_round, scores, tasks, write_rows
from worker.store import rounds as round_rows
from worker.store import steps as step_rows
from worker.uncertainty import said_in_full
from worker.work import Work

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)


class CountingScorer:
    """Stands in for the detector, which is slow: task n gets the measures n/10 and the embedding (n, round)."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.broken: set[int] = set()
        self.round = 0

    def get(self, services: Services, project: Any, round_row: Any) -> CountingScorer:
        self.round = int(round_row.number)
        return self

    def score(self, images: Sequence[tuple[int, str]], progress: Callable[[int], None]) -> Iterator[TaskScore]:
        for done, (task_id, _) in enumerate(images, start=1):
            self.seen.append(task_id)
            progress(done)
            if task_id in self.broken:
                yield TaskScore(task_id, problem="no image")
            else:
                measures = dict.fromkeys(("least_confidence", "margin", "entropy"), task_id / 10)
                embedding = np.array([task_id, self.round], dtype=np.float32)
                yield TaskScore(task_id, [{"id": f"b{task_id}"}], measures, embedding)


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> CountingScorer:
    made = CountingScorer()
    monkeypatch.setattr(model, "SCORERS", made)
    return made


@pytest.fixture
def own(store_url: str, redis_url: str, tmp_path: Path) -> Iterator[Services]:
    """Project 7 with tasks 1..5 in shards of three, at its round 0."""
    values: dict[str, Any] = {"redis_url": redis_url, "database_url": store_url, "data_dir": tmp_path, "shard_size": 3}
    made = Services(Settings(_env_file=None, **values), "worker")
    made.store.migrate()
    with made.store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), "http://backend:9090")
        rounds.remember_tasks(connection, 7, {number: f"{number}.jpg" for number in range(1, 6)})
    yield made
    made.store.close()


def open_another(own: Services, **settings: Any) -> None:
    """The round is closed, and a new one is opened."""
    with own.store.write() as connection:
        connection.execute(update(round_rows).values(state="done"))
        opened = rounds.open_round(connection, 7, "an admin")
        if settings:
            changed = ProjectSettings(**settings).model_dump_json()
            connection.execute(update(round_rows).where(round_rows.c.id == opened).values(settings=changed))


def claimed(own: Services, shard: int) -> Work:
    """The open round's step for a shard, as the worker gets it. The sending is not under test."""
    with own.store.write() as connection:
        number = connection.execute(select(round_rows.c.id).order_by(round_rows.c.id.desc())).scalars().first()
        assert number is not None
        connection.execute(step_rows.delete().where(step_rows.c.round_id == number, step_rows.c.shard == shard))
        (step_id,) = steps.add(connection, number, "score", [shard])
        connection.execute(update(step_rows).where(step_rows.c.id == step_id).values(state="sent", attempt=1))
    lease = steps.claim(own.store, step_id, 1)
    assert lease is not None
    with own.store.read() as connection:
        return Work(own, lease, get_project(connection, 7), get_round(connection, number))


def score_everything(own: Services) -> None:
    shards = plan_scoring(claimed(own, 99))
    for shard in shards:
        score_one_shard(claimed(own, shard))


def rows_of(own: Services, number: int) -> dict[int, Any]:
    with own.store.read() as connection:
        query = select(scores).join(round_rows, round_rows.c.id == scores.c.round_id)
        found = connection.execute(query.where(round_rows.c.number == number).order_by(scores.c.task_id)).all()
    return {row.task_id: row for row in found}


def test_a_shard_that_runs_twice_is_scored_once(own: Services, scorer: CountingScorer) -> None:
    score_everything(own)
    before = rows_of(own, 0)
    score_one_shard(claimed(own, 0))
    assert scorer.seen == [1, 2, 3, 4, 5]
    assert rows_of(own, 0) == before


def test_a_shard_of_which_half_was_written_is_scored_whole(own: Services, scorer: CountingScorer) -> None:
    score_everything(own)
    with own.store.write() as connection:
        connection.execute(update(scores).where(scores.c.task_id == 2).values(row=None))
    score_one_shard(claimed(own, 0))
    assert scorer.seen == [1, 2, 3, 4, 5, 1, 2, 3]


def test_a_round_with_the_same_detector_takes_the_scores_over(own: Services, scorer: CountingScorer) -> None:
    score_everything(own)
    open_another(own)
    score_everything(own)
    assert scorer.seen == [1, 2, 3, 4, 5]
    later = rows_of(own, 1)
    assert {task_id: (row.entropy, row.regions, row.n_boxes) for task_id, row in later.items()} == {
        number: (number / 10, f'[{{"id": "b{number}"}}]', 1) for number in range(1, 6)
    }
    second = shard_embeddings(own, 7, 1, 1)
    assert second[[later[4].row, later[5].row]].tolist() == [[4, 0], [5, 0]]  # round 0's own


def test_a_round_that_was_cancelled_early_hides_no_scores(own: Services, scorer: CountingScorer) -> None:
    score_everything(own)
    open_another(own)
    plan_scoring(claimed(own, 99))
    score_one_shard(claimed(own, 1))  # and then it is cancelled
    open_another(own)
    score_everything(own)
    assert scorer.seen == [1, 2, 3, 4, 5]
    assert [row.entropy for row in rows_of(own, 2).values()] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert shard_embeddings(own, 7, 2, 0)[:, 0].tolist() == [1, 2, 3]


def test_killed_while_it_writes_its_rows_a_shard_has_told_of_broken_images(
    own: Services, scorer: CountingScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer.broken = {2}
    plan_scoring(claimed(own, 99))

    def killed(*args: Any) -> None:
        write_rows(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        score_one_shard(claimed(own, 0))
    monkeypatch.undo()
    score_one_shard(claimed(own, 0))
    with own.store.read() as connection:
        told = connection.execute(select(tasks.c.image_problem).where(tasks.c.task_id == 2)).scalar_one()
    assert told == "no image"


def test_only_what_is_new_changed_or_was_broken_is_looked_at(own: Services, scorer: CountingScorer) -> None:
    scorer.broken = {2}
    score_everything(own)
    scorer.broken, scorer.seen = set(), []
    with own.store.write() as connection:
        rounds.remember_tasks(connection, 7, {3: "another.jpg", 6: "6.jpg"})
    open_another(own)
    score_everything(own)
    assert scorer.seen == [2, 3, 6]
    later = rows_of(own, 1)
    first = shard_embeddings(own, 7, 1, 0)
    assert first[[later[number].row for number in (1, 2, 3)]].tolist() == [[1, 0], [2, 1], [3, 1]]
    with own.store.read() as connection:
        told = connection.execute(select(tasks.c.image_problem).where(tasks.c.task_id == 2)).scalar_one()
    assert told is None


@pytest.mark.parametrize("settings", [{"imgsz": 320}, {"confidence": 0.4}])
def test_scores_under_other_settings_are_not_taken_over(
    own: Services, scorer: CountingScorer, settings: dict[str, Any]
) -> None:
    score_everything(own)
    open_another(own, **settings)
    score_everything(own)
    assert scorer.seen == [1, 2, 3, 4, 5] * 2


def test_a_strategy_that_reads_uncertainty_alike_changes_no_score(own: Services, scorer: CountingScorer) -> None:
    score_everything(own)
    read_alike = said_in_full(ProjectSettings())
    open_another(own, strategy="entropy", **read_alike)
    score_everything(own)
    assert scorer.seen == [1, 2, 3, 4, 5]
    open_another(own, strategy="entropy")  # by its own rule
    score_everything(own)
    assert scorer.seen == [1, 2, 3, 4, 5] * 2


@pytest.mark.parametrize(
    "changed", [{"weights_sha256": "a" * 64}, {"report": '{"members": [{"weights": "m.pt", "sha256": "b"}]}'}]
)
def test_another_detector_or_committee_has_another_key(own: Services, changed: dict[str, str]) -> None:
    work = claimed(own, 0)
    with own.store.write() as connection:
        connection.execute(update(round_rows).values(**changed))
        other = get_round(connection, work.round.id)
    assert scoring_key(Work(own, work.lease, work.project, other)) != scoring_key(work)


def test_embeddings_that_are_gone_are_made_anew(own: Services, scorer: CountingScorer) -> None:
    score_everything(own)
    open_another(own)
    work = claimed(own, 0)
    key = remember_key(work)
    images = [(1, "1.jpg"), (4, "4.jpg")]
    assert [one.task_id for one in known_scores(work, key, images)] == [1, 4]
    (Path(own.artifacts.root.removeprefix("file://")) / "p7/r000000/embeddings-00001.npy").unlink()
    assert known_scores(work, key, images) == []
