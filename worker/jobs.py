"""RQ jobs: plain functions that take ids. What one does is fenced by its step (worker.steps); what it needs it makes.

Importing this loads no torch; the jobs that need it import `worker.model` or `worker.training` themselves.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from rq.timeouts import JobTimeoutException
from sqlalchemy import Row, select, update

from worker import rounds, steps
from worker.attaching import attach_project, heal
from worker.errors import (
    HardfirstError,
    JobFenced,
    Unavailable,
)
from worker.holdout import remeasure_if_changed
from worker.preview import make_preview
from worker.publishing import purge_versions, select_and_publish
from worker.retraining import train_and_measure, train_one_member
from worker.scoring import enqueue_late, plan_selection, score_all_late, score_alone, score_late, score_one_shard
from worker.services import Services, from_environment
from worker.store import (
    OPEN_STATES,
    get_project,
    get_round,
    latest_round,
    projects,
    record_event,
)
from worker.suspects import find_suspects
from worker.syncing import sync_project
from worker.work import Work, clear_progress

log = logging.getLogger(__name__)

WAIT = 5.0  # seconds until a step that waits for somebody looks again
FULL_SYNC_EVERY = 1800.0  # counters cannot show every change (an annotation deleted and another made)

_own: dict[int, Services] = {}


def services() -> Services:
    """This process' connections; a forked child makes its own."""
    if os.getpid() not in _own:
        _own.clear()
        made = from_environment("worker")
        made.store.migrate()  # a worker may be the first to start, or on another host
        _own[os.getpid()] = made
    return _own[os.getpid()]


def attach(step_id: int, attempt: int) -> None:
    """Round 0, first step: the webhook, the tasks, the annotations there are, the weights for embeddings."""
    _run(step_id, attempt, attach_project)


def retrain(step_id: int, attempt: int) -> None:
    """Dataset, training, evaluation on the holdout."""
    _run(step_id, attempt, train_and_measure)


def train_member(step_id: int, attempt: int) -> None:
    """One more detector of a committee."""
    _run(step_id, attempt, train_one_member)


def score_shard(step_id: int, attempt: int) -> None:
    """Boxes, uncertainty and embedding of one shard's images."""
    _run(step_id, attempt, score_one_shard)


def reselect(step_id: int, attempt: int) -> None:
    """First step of a round that trains nothing: what there is to select from."""
    _run(step_id, attempt, plan_selection)


def publish(step_id: int, attempt: int) -> None:
    """Select the next batch, write every prediction to Label Studio, switch to the new version."""
    _run(step_id, attempt, select_and_publish)


def purge(step_id: int, attempt: int) -> None:
    """Delete the versions published before. Off the critical path: Label Studio takes minutes for a large pool."""
    _run(step_id, attempt, purge_versions)


def _run(step_id: int, attempt: int, body: Callable[[Work], None]) -> None:
    own = services()
    lease = steps.claim(own.store, step_id, attempt)
    if lease is None:
        return
    try:
        with own.store.read() as connection:
            round_row = get_round(connection, lease.round_id)
            project = get_project(connection, round_row.project_id)
        with lease.kept():
            body(Work(own, lease, project, round_row))
        if project.problem is not None:
            _tell(own, lease.round_id, None)
    except JobFenced as fenced:
        log.info("%s", fenced)
    except Unavailable as away:
        steps.put_back(lease, str(away), WAIT)
        _tell(own, lease.round_id, str(away))
    except HardfirstError as error:
        _failed(own, lease, str(error), retry=False)
    except Exception as error:
        first_line = str(error).partition("\n")[0][:300]  # a database's error goes on with every parameter
        _failed(own, lease, f"{type(error).__name__}: {first_line}", retry=True)
        raise  # RQ logs it, with the traceback, and keeps the job as failed
    finally:
        steps.send_waiting(own.store, own.redis)


def _tell(own: Services, round_id: int, problem: str | None) -> None:
    with own.store.write() as connection:
        row = get_round(connection, round_id)
        if problem is None or row.state in OPEN_STATES:
            connection.execute(update(projects).where(projects.c.id == row.project_id).values(problem=problem))


def _failed(own: Services, lease: steps.Lease, reason: str, *, retry: bool) -> None:
    try:
        final = steps.fail(lease, reason, retry=retry)
    except JobFenced:
        return
    if final and lease.kind != "purge":
        with own.store.write() as connection:
            rounds.close_round(connection, lease.round_id, "failed", reason)
            row = get_round(connection, lease.round_id)
            rounds.open_round_if_triggered(connection, row.project_id)
        clear_progress(own, row.project_id)


def predict(project_id: int, images: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Predictions for tasks that have none stored: [task id, image reference] each. Stores and returns them."""
    return score_alone(services(), project_id, [(int(task_id), str(image)) for task_id, image in images])


def late(project_id: int) -> None:
    """Tasks without a score of the published version: scored and written to Label Studio."""
    score_all_late(services(), project_id)


def preview(project_id: int, preview_id: str) -> None:
    """A batch under other settings, for the page."""
    make_preview(services(), project_id, preview_id)


def examine(names: Sequence[str]) -> list[dict[str, Any]]:
    """What the page's check-up asks a worker: the checks of the deployment that need torch, as this host sees them."""
    from worker.doctor import examined_here

    return examined_here(services(), names)


def suspects(project_id: int, round_id: int) -> None:
    """Labels that confident detections disagree with, for the page."""
    find_suspects(services(), project_id, round_id)


def reconcile() -> None:
    """Every minute: send again what was lost, and find what webhooks missed."""
    own = services()
    for done in steps.sweep(own.store, own.redis):
        log.warning("%s; sent again", done)
    with own.store.write() as connection:
        rounds.close_dead_rounds(connection)
    with own.store.read() as connection:
        rows = connection.execute(select(projects)).all()
    for project in rows:
        try:
            _reconcile_project(own, project)
        except Unavailable as away:
            log.warning("project %s not reconciled: %s", project.id, away)
        except HardfirstError as error:
            log.warning("project %s not reconciled: %s", project.id, error)
            _set_problem(own, project.id, str(error))
        except JobTimeoutException:
            raise  # the job's time is up, not this project's
        except Exception:  # one project's trouble must not keep the others from theirs
            log.exception("project %s not reconciled", project.id)
        else:
            _forget_problem(own, project.id)
    steps.send_waiting(own.store, own.redis)


def _set_problem(own: Services, project_id: int, problem: str) -> None:
    with own.store.write() as connection:
        connection.execute(update(projects).where(projects.c.id == project_id).values(problem=problem))


def _forget_problem(own: Services, project_id: int) -> None:
    """What reconcile complained of is mended; what a round complains of stands until the next one."""
    with own.store.write() as connection:
        last = latest_round(connection, project_id)
        if last is not None and last.state in ("done", "cancelled"):
            connection.execute(update(projects).where(projects.c.id == project_id).values(problem=None))


def _reconcile_project(own: Services, project: Row[Any]) -> None:
    if project.published_round_id is None:
        return  # round 0 looks for itself
    stale = time.time() - (project.reconciled_at or 0) > FULL_SYNC_EVERY
    sync_project(own, project.id, everything=stale)
    with own.store.write() as connection:
        opened = rounds.open_round_if_triggered(connection, project.id)
    if opened is not None:
        with own.store.write() as connection:
            record_event(connection, project.id, "reconciled", detail="a round was opened that no webhook had opened")
    remeasure_if_changed(own, project.id)
    if score_late(own, project.id):  # the others of this minute's projects wait for it
        enqueue_late(own.redis, project.id)
    heal(own, project.id)  # after it: a version can be served from its first prediction on
    with own.store.read() as connection:
        rounds.label_map_of(get_project(connection, project.id))  # what /setup refuses is said as long as it is so
