"""Boxes, uncertainty and embeddings: of a round's shards, of live requests, of tasks that came late."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from redis import Redis
from redis.exceptions import LockError
from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from worker import queue, steps
from worker.errors import LabelConfigUnsupported, LabelStudioRefused, PublishIncomplete
from worker.label_studio import prediction, published_score
from worker.reuse import image_digest, known_scores, remember_key, scored_so_far, shard_embeddings, shard_is_scored
from worker.rounds import label_map_of
from worker.services import Services
from worker.store import (
    get_project,
    insert_or_ignore,
    labelled_task_ids,
    open_round_of,
    scores,
    tasks,
    write_rows,
)
from worker.work import MEASURES, Work

if TYPE_CHECKING:
    from worker.model import LateScore, TaskScore

log = logging.getLogger(__name__)

LATE_AT_ONCE = 256  # Label Studio checks 500 at a time, so that a refusal means that none was taken
LATE_CHUNK = 32
LATE_SECONDS = 60.0  # of one job of late tasks; what is left follows in another, behind the shards that wait
LATE_TIMEOUT = 600
LATE_PAUSE = 5.0  # requests within these seconds ask for one job
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


def plan_selection(work: Work) -> None:
    """A round on the published detector: its shards take over what that one has scored."""
    shards = plan_scoring(work)
    steps.finish(work.lease, lambda connection: _add_shards(connection, work, shards))


def _add_shards(connection: Connection, work: Work, shards: range) -> None:
    steps.add(connection, work.round.id, "score", shards)


def score_one_shard(work: Work) -> None:
    """Rows and embeddings of one shard, each image scored once: what an earlier attempt, or an earlier round with the
    same detector, found is taken over."""
    own, shard = work.services, work.lease.shard
    with own.store.read() as connection:
        scored = shard_is_scored(connection, work.round.id, shard)
    if not scored:
        _score_shard_images(work)

    def then(connection: Connection) -> None:
        steps.add(connection, work.round.id, "publish")

    steps.finish(work.lease, then)


def _score_shard_images(work: Work) -> None:
    own, shard = work.services, work.lease.shard
    with own.store.read() as connection:
        images = _shard_images(connection, work, shard)
        total, before = scored_so_far(connection, work.round.id)
    known = {one.task_id: one for one in known_scores(work, remember_key(work), images)}
    fresh = [(task_id, reference) for task_id, reference in images if task_id not in known]
    found = list(_scores_of(work, fresh, lambda done: work.progress("scoring", done=before + done, total=total)))
    embeddings = {task_id: one.embedding for task_id, one in known.items()}
    embeddings |= {score.task_id: score.embedding for score in found if score.embedding is not None}
    columns = {task_id: {**one.columns, "problem": None} for task_id, one in known.items()}
    columns |= {score.task_id: score_columns(score) for score in found}
    digests = {task_id: image_digest(reference) for task_id, reference in images}
    row_of = {task_id: row for row, task_id in enumerate(embeddings)}
    rows = [{"of": of, **values, "row": row_of.get(of), "image": digests[of]} for of, values in columns.items()]
    work.lease.hold()  # a worker that slept through its lease must not write over its successor
    if embeddings:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(list(embeddings.values())))
        own.artifacts.put(work.key(f"embeddings-{shard:05d}.npy"), buffer.getvalue())
    with own.store.write() as connection:  # before the rows: once they are there, nobody looks again
        note_problems(connection, work.project.id, {score.task_id: score.problem for score in found})
    these = (scores.c.round_id == work.round.id, scores.c.task_id == bindparam("of"))
    write_rows(own.store, update(scores).where(*these), rows)


def _scores_of(work: Work, images: Sequence[tuple[int, str]], progress: Callable[[int], None]) -> Iterator[TaskScore]:
    """No detector is loaded for nothing."""
    from worker.model import SCORERS

    if images:
        yield from SCORERS.get(work.services, work.project, work.round).score(images, progress)


def _shard_images(connection: Connection, work: Work, shard: int) -> list[tuple[int, str]]:
    query = (
        select(tasks.c.task_id, tasks.c.image)
        .join(scores, (scores.c.task_id == tasks.c.task_id) & (scores.c.round_id == work.round.id))
        .where(tasks.c.project_id == work.project.id, scores.c.shard == shard)
        .order_by(tasks.c.task_id)
    )
    return [(int(row.task_id), str(row.image)) for row in connection.execute(query)]


def score_columns(score: Any) -> dict[str, Any]:
    """A TaskScore as columns of `scores`."""
    measures = {name: score.measures.get(name) for name in MEASURES}
    return {
        **measures,
        "disagreement": score.disagreement,
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


def stored_predictions(
    connection: Connection, project: Row[Any], task_ids: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """What is published for these tasks, by task id: result, score, model_version. The holdout gets no boxes.

    Nor is there a box of a label that went since: Label Studio may take no prediction of a request with one in it.
    """
    shows = _shown_today(project)
    found: dict[int, dict[str, Any]] = {}
    for start in range(0, len(task_ids), 500):
        query = (
            select(scores.c.task_id, scores.c.regions, scores.c.published_score, tasks.c.holdout)
            .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project.id))
            .where(scores.c.round_id == project.published_round_id)
            .where(scores.c.task_id.in_(task_ids[start : start + 500]), scores.c.published_score.is_not(None))
        )
        for row in connection.execute(query):
            version, held = str(project.published_version), bool(row.holdout)
            one = prediction(row.task_id, row.regions, row.published_score, version, held, shows)
            found[row.task_id] = {name: one[name] for name in ("result", "score", "model_version")}
    return found


def _shown_today(project: Row[Any]) -> Callable[[Mapping[str, Any]], bool]:
    try:
        return label_map_of(project).shows
    except LabelConfigUnsupported:  # no box fits it any more; the order still holds
        return lambda region: False


def holdout_embeddings(own: Services, project_id: int, round_row: Row[Any]) -> NDArray[np.float32]:
    """(H, D): of the holdout images a round scored."""
    query = (
        select(scores.c.shard, scores.c.row)
        .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project_id))
        .where(scores.c.round_id == round_row.id, scores.c.row.is_not(None), tasks.c.holdout.is_(True))
        .where(scores.c.shard >= 0)
        .order_by(scores.c.shard, scores.c.row)
    )
    with own.store.read() as connection:
        places = [(int(row.shard), int(row.row)) for row in connection.execute(query)]
    found = []
    for shard in sorted({shard for shard, _ in places}):
        embeddings = shard_embeddings(own, project_id, round_row.number, shard)
        found.append(embeddings[[row for other, row in places if other == shard]])
    return np.concatenate(found) if found else np.zeros((0, 1), np.float32)


def score_alone(own: Services, project_id: int, images: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Predictions of the published version for tasks outside its shards: made, remembered, and returned."""
    from worker.model import HardfirstModel

    with own.store.read() as connection:
        project = get_project(connection, project_id)
    key = label_map_of(project).image_key
    model = HardfirstModel(project.label_config, services=own)
    tasks_given = [{"id": task_id, "project": project_id, "data": {key: image}} for task_id, image in images]
    answers, late = model.predict_and_score(project, tasks_given)
    if project.published_round_id is not None:
        _keep(own, project, late)
    return answers


def _keep(own: Services, project: Row[Any], late: Sequence[LateScore]) -> None:
    """Rows of tasks scored alone. A task of somebody's invention leaves no trace."""
    rows = [
        {
            "round_id": project.published_round_id,
            "task_id": one.score.task_id,
            "shard": LATE_SHARD,
            **score_columns(one.score),
            "utility": one.utility,
            "published_score": published_score(None, one.utility, 1),
            "sent": False,
        }
        for one in late
    ]
    problems = {one.score.task_id: one.score.problem for one in late}
    with own.store.write() as connection:
        query = select(tasks.c.task_id).where(tasks.c.project_id == project.id, tasks.c.task_id.in_(list(problems)))
        ours = set(connection.execute(query).scalars().all())
        insert_or_ignore(connection, scores, [row for row in rows if row["task_id"] in ours])
        note_problems(connection, project.id, {key: problem for key, problem in problems.items() if key in ours})
        twins = [{"of": one.score.task_id} for one in late if one.twin and one.score.task_id in ours]
        if twins:
            row = (tasks.c.project_id == project.id, tasks.c.task_id == bindparam("of"), tasks.c.holdout.is_not(True))
            connection.execute(update(tasks).where(*row).values(twin=True), twins)


def score_late(own: Services, project_id: int) -> bool:
    """Tasks imported after the round was planned: scored alone, slotted into the order that is served.

    Also sends what a live prediction scored too late for Label Studio to wait for.

    Returns: whether there may be more; False too when another worker is at it.
    """
    with _alone(own, project_id) as is_alone:
        if not is_alone:
            return False
        late = _late_tasks(own, project_id)
        for start in range(0, len(late), LATE_CHUNK):  # what is done is kept, should the job's time run out
            score_alone(own, project_id, late[start : start + LATE_CHUNK])
        sent = _send_late(own, project_id)
    return LATE_AT_ONCE in (len(late), sent)


@contextmanager
def _alone(own: Services, project_id: int) -> Iterator[bool]:
    """Whether no other worker scores this project's late tasks: two would give a task the same prediction twice."""
    lock = own.redis.lock(f"hardfirst:late:{project_id}", timeout=LATE_TIMEOUT)
    with queue.redis_border():
        taken = lock.acquire(blocking=False)
    try:
        yield taken
    finally:
        if taken:
            with suppress(LockError), queue.redis_border():  # it may have expired, and be another's by now
                lock.release()


def score_all_late(own: Services, project_id: int) -> None:
    """`score_late` until nothing is left, or for some minutes; then another job goes on, behind whoever waits."""
    until = time.monotonic() + LATE_SECONDS
    while score_late(own, project_id):
        if time.monotonic() > until:
            enqueue_late(own.redis, project_id)
            return


def enqueue_late(redis: Redis, project_id: int) -> bool:
    """Have late tasks scored soon, by a worker that annotators do not wait for; False: that is under way.

    Raises:
        QueueUnavailable: Redis does not answer; reconcile does it every minute, some at a time.
    """
    job_id = f"late-{project_id}-{int(time.time() // LATE_PAUSE)}"
    return queue.enqueue_unique(redis, queue.SCORE, "worker.jobs.late", (project_id,), job_id, LATE_TIMEOUT, ttl=600)


def _late_tasks(own: Services, project_id: int) -> list[tuple[int, str]]:
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        if project.published_round_id is None:
            return []  # the first round will score them
        scored = select(scores.c.task_id).where(scores.c.round_id == project.published_round_id)
        query = (
            select(tasks.c.task_id, tasks.c.image)
            .where(tasks.c.project_id == project_id, ~tasks.c.deleted, tasks.c.image != "")
            .where(tasks.c.task_id.not_in(scored), tasks.c.task_id.not_in(labelled_task_ids(project_id)))
            .limit(LATE_AT_ONCE)
        )
        return [(int(row.task_id), str(row.image)) for row in connection.execute(query)]


def _send_late(own: Services, project_id: int) -> int:
    """To Label Studio what it does not have yet, under the version that is served now; how many that were."""
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        query = (
            select(scores.c.task_id, scores.c.regions, scores.c.published_score, tasks.c.holdout)
            .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project_id))
            .where(scores.c.round_id == project.published_round_id, scores.c.shard == LATE_SHARD, ~scores.c.sent)
            .where(~tasks.c.deleted, tasks.c.task_id.not_in(labelled_task_ids(project_id)))
            .limit(LATE_AT_ONCE)
        )
        rows = connection.execute(query).all()
        busy = open_round_of(connection, project_id)
    if not rows or (busy is not None and busy.state == "publishing"):
        return 0  # a new version is on its way: these wait for it
    version = str(project.published_version)
    shows = label_map_of(project).shows
    unsent = [
        prediction(row.task_id, row.regions, row.published_score, version, bool(row.holdout), shows) for row in rows
    ]
    _import_late(own, project, unsent)
    return len(unsent)


def _import_late(own: Services, project: Row[Any], unsent: Sequence[Mapping[str, Any]]) -> None:
    """In one request; when it is refused, in halves, so that one bad row keeps no other from its place."""
    task_ids = [int(one["task"]) for one in unsent]
    try:
        own.label_studio.import_predictions(project.id, unsent)
    except PublishIncomplete as incomplete:  # the rest is there: sent again, it would be there twice
        log.warning("project %s: %s", project.id, incomplete)
    except LabelStudioRefused as refused:
        if len(unsent) > 1:
            half = len(unsent) // 2
            _import_late(own, project, unsent[:half])
            _import_late(own, project, unsent[half:])
            return
        log.warning("project %s: task %s cannot be given a score: %s", project.id, task_ids[0], refused)
    mark_sent(own, project.published_round_id, task_ids)


def unsent_of(connection: Connection, project: Row[Any], task_ids: Sequence[int]) -> list[int]:
    """Of these tasks, those that were scored alone and that Label Studio does not have yet."""
    waiting = select(scores.c.task_id).where(
        scores.c.round_id == project.published_round_id, scores.c.shard == LATE_SHARD, ~scores.c.sent
    )
    found: list[int] = []
    for start in range(0, len(task_ids), 500):
        these = scores.c.task_id.in_(task_ids[start : start + 500])
        found += connection.execute(waiting.where(these)).scalars().all()
    return found


def mark_sent(own: Services, round_id: int, task_ids: Sequence[int]) -> None:
    """Label Studio has these late predictions, or will never take them."""
    for start in range(0, len(task_ids), 500):
        with own.store.write() as connection:
            these = (scores.c.round_id == round_id, scores.c.task_id.in_(task_ids[start : start + 500]))
            connection.execute(update(scores).where(*these).values(sent=True))
