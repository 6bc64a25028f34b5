"""Boxes, uncertainty and embeddings: of a round's shards, of live requests, of tasks that came late."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from worker import steps
from worker.boxes import LabelMap
from worker.label_studio import prediction
from worker.services import Services
from worker.store import (
    get_project,
    insert_or_ignore,
    labelled_task_ids,
    scores,
    tasks,
    write_rows,
)
from worker.work import MEASURES, Work

log = logging.getLogger(__name__)

LATE_AT_ONCE = 512
LATE_SHARD = -1


def plan_scoring(work: Work) -> range:
    """Rows of all live tasks, by shard: the pool for its utility, the labelled and the holdout for their embeddings.

    Returns the shards: steps to add in the transaction that ends the step before.
    """
    own = work.services
    with own.store.write() as connection:
        connection.execute(delete(scores).where(scores.c.round_id == work.round.id))
        query = select(tasks.c.task_id).where(
            tasks.c.project_id == work.project.id, ~tasks.c.deleted, tasks.c.image != ""
        )
        ids = connection.execute(query.order_by(tasks.c.task_id)).scalars().all()
    size = own.settings.shard_size
    rows = [
        {"round_id": work.round.id, "task_id": task_id, "shard": position // size}
        for position, task_id in enumerate(ids)
    ]
    write_rows(own.store, insert(scores), rows)
    return range(-(-len(rows) // size) or 1)


def score_one_shard(work: Work) -> None:
    from worker.model import SCORERS

    own, shard = work.services, work.lease.shard
    with own.store.read() as connection:
        images = _shard_images(connection, work, shard)
        total, before = _scored_so_far(connection, work)
    scorer = SCORERS.get(own, work.project, work.round)
    found = list(scorer.score(images, lambda done: work.progress("scoring", done=before + done, total=total)))
    usable = [score for score in found if score.embedding is not None]
    if usable:
        buffer = io.BytesIO()
        np.save(buffer, np.stack([score.embedding for score in usable if score.embedding is not None]))
        own.artifacts.put(work.key(f"embeddings-{shard:05d}.npy"), buffer.getvalue())
    row_of = {score.task_id: row for row, score in enumerate(usable)}

    def then(connection: Connection) -> None:
        steps.add(connection, work.round.id, "publish")

    with own.store.write() as connection:
        if found:
            connection.execute(
                update(scores).where(scores.c.round_id == work.round.id, scores.c.task_id == bindparam("of")),
                [{"of": score.task_id, **score_columns(score), "row": row_of.get(score.task_id)} for score in found],
            )
        note_problems(connection, work.project.id, {score.task_id: score.problem for score in found})
    steps.finish(work.lease, then)


def _shard_images(connection: Connection, work: Work, shard: int) -> list[tuple[int, str]]:
    query = (
        select(tasks.c.task_id, tasks.c.image)
        .join(scores, (scores.c.task_id == tasks.c.task_id) & (scores.c.round_id == work.round.id))
        .where(tasks.c.project_id == work.project.id, scores.c.shard == shard)
        .order_by(tasks.c.task_id)
    )
    return [(int(row.task_id), str(row.image)) for row in connection.execute(query)]


def _scored_so_far(connection: Connection, work: Work) -> tuple[int, int]:
    query = select(func.count()).select_from(scores).where(scores.c.round_id == work.round.id)
    done = query.where((scores.c.row.is_not(None)) | (scores.c.problem.is_not(None)))
    return int(connection.execute(query).scalar_one()), int(connection.execute(done).scalar_one())


def score_columns(score: Any) -> dict[str, Any]:
    """A TaskScore as columns of `scores`."""
    measures = {name: score.measures.get(name) for name in MEASURES}
    return {
        **measures,
        "regions": json.dumps(score.regions),
        "n_boxes": len(score.regions),
        "problem": score.problem,
    }


def note_problems(connection: Connection, project_id: int, problems: Mapping[int, str | None]) -> None:
    if problems:
        connection.execute(
            update(tasks).where(tasks.c.project_id == project_id, tasks.c.task_id == bindparam("of")),
            [{"of": task_id, "image_problem": problem} for task_id, problem in problems.items()],
        )


def score_alone(own: Services, project_id: int, images: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    from worker.model import HardfirstModel

    with own.store.read() as connection:
        project = get_project(connection, project_id)
    key = LabelMap.from_config(project.label_config).image_key
    model = HardfirstModel(project.label_config, services=own)
    answers = model.predict([{"id": task_id, "project": project_id, "data": {key: image}} for task_id, image in images])
    if project.published_round_id is not None:
        _keep_answers(own, project, [task_id for task_id, _ in images], answers)
    return answers


def _keep_answers(own: Services, project: Row[Any], task_ids: Sequence[int], answers: Sequence[dict[str, Any]]) -> None:
    rows = [
        {
            "round_id": project.published_round_id,
            "task_id": task_id,
            "shard": LATE_SHARD,
            **{name: answer.get("measures", {}).get(name) for name in MEASURES},
            "utility": answer.get("utility", 0.0),
            "published_score": answer["score"],
            "regions": json.dumps(answer["result"]),
            "n_boxes": len(answer["result"]),
            "problem": answer.get("problem"),
            "sent": False,
        }
        for task_id, answer in zip(task_ids, answers, strict=True)
        if answer["model_version"] == project.published_version
    ]
    with own.store.write() as connection:
        known = connection.execute(
            select(tasks.c.task_id).where(tasks.c.project_id == project.id, tasks.c.task_id.in_(task_ids))
        )
        ours = set(known.scalars().all())  # a task of somebody's invention leaves no trace
        insert_or_ignore(connection, scores, [row for row in rows if row["task_id"] in ours])
        note_problems(
            connection, project.id, {row["task_id"]: row["problem"] for row in rows if row["task_id"] in ours}
        )


def score_late(own: Services, project: Row[Any]) -> None:
    """Tasks imported after the round was planned: scored alone, slotted into the order that is served.

    Also sends what a live prediction scored too late for Label Studio to wait for.
    """
    with own.store.read() as connection:
        project = get_project(connection, project.id)
        scored = select(scores.c.task_id).where(scores.c.round_id == project.published_round_id)
        query = (
            select(tasks.c.task_id, tasks.c.image)
            .where(tasks.c.project_id == project.id, ~tasks.c.deleted, tasks.c.image != "")
            .where(tasks.c.task_id.not_in(scored), tasks.c.task_id.not_in(labelled_task_ids(project.id)))
            .limit(LATE_AT_ONCE)
        )
        late = [(int(row.task_id), str(row.image)) for row in connection.execute(query)]
    if late:
        score_alone(own, project.id, late)
    with own.store.read() as connection:
        query = (
            select(scores.c.task_id, scores.c.regions, scores.c.published_score, tasks.c.holdout)
            .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project.id))
            .where(scores.c.round_id == project.published_round_id, scores.c.shard == LATE_SHARD, ~scores.c.sent)
        )
        unsent = connection.execute(query).all()
    version = str(project.published_version)
    own.label_studio.import_predictions(
        project.id,
        [prediction(row.task_id, row.regions, row.published_score, version, bool(row.holdout)) for row in unsent],
    )
    if unsent:  # a version is served from its first prediction on: a round that emptied the pool had none
        own.label_studio.publish_version(project.id, version)
    mark_sent(own, project.published_round_id, [row.task_id for row in unsent])


def mark_sent(own: Services, round_id: int, task_ids: Sequence[int]) -> None:
    """Label Studio has these late predictions."""
    if not task_ids:
        return
    with own.store.write() as connection:
        these = (scores.c.round_id == round_id, scores.c.task_id.in_(task_ids))
        connection.execute(update(scores).where(*these).values(sent=True))
