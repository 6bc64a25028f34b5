"""Tasks that come after their round: what is sent to Label Studio, when, and how often."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from demo.oracle import label_config
from worker import queue, rounds, scoring
from worker.errors import LabelStudioRefused, PublishIncomplete
from worker.services import Services
from worker.settings import ProjectSettings, Settings
from worker.store import get_project, projects, scores, tasks
from worker.store import rounds as round_rows


class Recorder:
    """Stands in for Label Studio's import, whose answers are under test elsewhere: keeps what it is sent."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.refused: set[int] = set()
        self.dropped = 0

    def import_predictions(self, project_id: int, predictions: Iterable[Mapping[str, Any]]) -> None:
        sent = [int(one["task"]) for one in predictions]
        if self.refused & set(sent):
            raise LabelStudioRefused('contains invalid "task" field')
        self.kept += sent
        if self.dropped:
            raise PublishIncomplete(f"kept {len(sent) - self.dropped} of {len(sent)}")


@pytest.fixture
def own(store_url: str, tmp_path: Path) -> Iterator[Services]:
    """Project 7 with round 0 published, and tasks 1..4 scored alone after it."""
    made = Services(Settings(_env_file=None, database_url=store_url, data_dir=tmp_path), "worker")  # type: ignore[call-arg]
    made.store.migrate()
    with made.store.write() as connection:
        rounds.connect_project(connection, 7, label_config(["nut"]), ProjectSettings(), "http://backend:9090")
        rounds.remember_tasks(connection, 7, {number: f"{number}.jpg" for number in range(1, 5)})
        round_id = connection.execute(select(round_rows.c.id)).scalar_one()
        connection.execute(update(round_rows).values(state="done"))
        connection.execute(update(projects).values(published_version="al-000000", published_round_id=round_id))
        late = {"round_id": round_id, "shard": scoring.LATE_SHARD, "published_score": 0.7, "regions": "[]"}
        connection.execute(insert(scores), [{**late, "task_id": number} for number in range(1, 5)])
    made.__dict__["label_studio"] = Recorder()
    yield made
    made.store.close()


def unsent(own: Services) -> list[int]:
    with own.store.read() as connection:
        query = select(scores.c.task_id).where(~scores.c.sent).order_by(scores.c.task_id)
        return list(connection.execute(query).scalars())


def kept(own: Services) -> list[int]:
    return own.label_studio.kept  # type: ignore[attr-defined, no-any-return]


def test_late_scores_are_sent_once(own: Services) -> None:
    scoring._send_late(own, 7)
    scoring._send_late(own, 7)
    assert kept(own) == [1, 2, 3, 4]
    assert unsent(own) == []


def test_one_that_is_refused_keeps_no_other_from_its_place(own: Services) -> None:
    own.label_studio.refused = {3}  # type: ignore[attr-defined]
    scoring._send_late(own, 7)
    assert sorted(kept(own)) == [1, 2, 4]
    assert unsent(own) == []


def test_what_was_taken_in_part_is_not_sent_again(own: Services) -> None:
    own.label_studio.dropped = 1  # type: ignore[attr-defined]
    scoring._send_late(own, 7)
    scoring._send_late(own, 7)
    assert kept(own) == [1, 2, 3, 4]


def test_deleted_and_labelled_tasks_are_not_sent(own: Services) -> None:
    with own.store.write() as connection:
        rounds.mark_deleted(connection, 7, [1])
        rounds.remember_annotations(connection, 7, [{"id": 1, "task": 2}])
    scoring._send_late(own, 7)
    assert kept(own) == [3, 4]


def test_nothing_is_sent_while_a_new_version_is_written(own: Services) -> None:
    with own.store.write() as connection:
        round_id = rounds.open_round(connection, 7, "an admin")
        connection.execute(update(round_rows).where(round_rows.c.id == round_id).values(state="publishing"))
    scoring._send_late(own, 7)
    assert kept(own) == []
    assert unsent(own) == [1, 2, 3, 4]


def test_stored_predictions_of_the_holdout_have_no_boxes(own: Services) -> None:
    kind = {"type": "rectanglelabels", "from_name": "label", "to_name": "image"}
    region = {"id": "a", **kind, "value": {"rectanglelabels": ["nut"]}}
    with own.store.write() as connection:
        connection.execute(update(scores).values(regions=json.dumps([region])))
        connection.execute(update(tasks).where(tasks.c.task_id == 2).values(holdout=True))
        found = scoring.stored_predictions(connection, get_project(connection, 7), [1, 2, 99])
    assert found == {
        1: {"result": [region], "score": 0.7, "model_version": "al-000000"},
        2: {"result": [], "score": 0.7, "model_version": "al-000000"},
    }


# --- until nothing is left --------------------------------------------------------------------------------------------


@pytest.fixture
def many(own: Services, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Services:
    """Project 7 with ten more tasks that nobody has scored; whoever is asked scores them at once. Four at a time."""
    own.settings.redis_url = redis_url
    with own.store.write() as connection:
        rounds.remember_tasks(connection, 7, {number: f"{number}.jpg" for number in range(11, 21)})

    def score_alone(own: Services, project_id: int, images: Iterable[tuple[int, str]]) -> None:
        with own.store.write() as connection:
            round_id = get_project(connection, project_id).published_round_id
            late = {"round_id": round_id, "shard": scoring.LATE_SHARD, "published_score": 0.7, "regions": "[]"}
            connection.execute(insert(scores), [{**late, "task_id": task_id} for task_id, _ in images])

    monkeypatch.setattr(scoring, "score_alone", score_alone)
    monkeypatch.setattr(scoring, "LATE_AT_ONCE", 4)
    return own


def test_all_late_tasks_are_scored_and_sent_once(many: Services) -> None:
    scoring.score_all_late(many, 7)
    assert sorted(kept(many)) == [1, 2, 3, 4, *range(11, 21)]
    assert unsent(many) == []
    assert queue.queue_lengths(many.redis)["score"] == 0


def test_when_its_time_is_over_another_job_goes_on(many: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LATE_SECONDS", -1.0)
    scoring.score_all_late(many, 7)
    assert len(kept(many)) == 4
    (job_id,) = queue.queue("score", many.redis).job_ids
    job = queue.queue("score", many.redis).fetch_job(job_id)
    assert job is not None
    assert (job.func_name, job.args) == ("worker.jobs.late", [7])


def test_two_workers_do_not_give_a_task_its_prediction_twice(many: Services) -> None:
    with scoring._alone(many, 7) as is_alone:
        assert is_alone
        assert scoring.score_late(many, 7) is False
        with scoring._alone(many, 8) as of_another_project:
            assert of_another_project
    assert kept(many) == []
    assert scoring.score_late(many, 7) is True
    assert len(kept(many)) == 4


def test_before_the_first_batch_nothing_is_late(many: Services) -> None:
    with many.store.write() as connection:
        connection.execute(update(projects).values(published_version=None, published_round_id=None))
    scoring.score_all_late(many, 7)
    assert kept(many) == []
