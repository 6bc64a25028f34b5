"""Read models of the operating half of the page: who works, what failed, what can be tried again."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Row, select

from worker.crew import LOST_AFTER, Crew, FailedJob, WorkerSeen
from worker.store import get_project, latest_round, rounds, steps

MAX_FAILED_STEPS = 20

STEP_WORDS = {
    "attach": "connecting",
    "train": "training",
    "member": "training a committee member",
    "score": "scoring",
    "select": "preparing a selection",
    "publish": "publishing",
    "purge": "deleting old versions",
}
QUEUE_WORDS = {
    "train": "trainings",
    "score": "scoring",
    "predict": "live predictions",
    "control": "publishing and upkeep",
}
JOB_WORDS = {
    "predict": "a live prediction",
    "reconcile": "the regular comparison with Label Studio",
    "preview": "a preview",
    "suspects": "the search for suspect labels",
}


class View(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class WorkerView(View):
    """A worker process. `seen_seconds` ago it gave a sign of life; `lost`: too long ago."""

    name: str
    host: str
    pid: int | None
    queues: list[str]
    state: str
    seen_seconds: float | None
    done: int
    failed: int
    lost: bool


class QueueView(View):
    """A queue: jobs that wait in it, and workers that take them."""

    name: str
    words: str
    waiting: int
    workers: int


class FailedJobView(View):
    """A job that failed and is no step of a round; of any project."""

    job_id: str
    queue: str
    words: str
    error: str
    ended_at: float | None


class FailedStep(View):
    """A step of this project that failed for good. `retry`: what the button does, empty where there is none."""

    step_id: int
    round_number: int
    kind: str
    words: str
    shard: int
    attempts: int
    error: str
    retry: str


class WorkView(View):
    """Workers, queues and failures. `known`: Redis answers; without it there are only the steps."""

    known: bool
    workers: list[WorkerView]
    queues: list[QueueView]
    failed_jobs: list[FailedJobView]
    failed_steps: list[FailedStep]
    problem: str


def work_view(connection: Connection, project_id: int, crew: Crew | None) -> WorkView:
    """
    Args:
        crew: what Redis knows; None: it is away.

    Raises:
        NotFound: the project is not connected.
    """
    get_project(connection, project_id)
    workers = [] if crew is None else [_worker(one) for one in crew.workers]
    queues = [] if crew is None else [_queue(name, waiting, workers) for name, waiting in crew.queues.items()]
    return WorkView(
        known=crew is not None,
        workers=workers,
        queues=queues,
        failed_jobs=[] if crew is None else [_failed_job(one) for one in crew.failed],
        failed_steps=_failed_steps(connection, project_id),
        problem=_problem(queues),
    )


def _worker(one: WorkerSeen) -> WorkerView:
    lost = one.seen_seconds is None or one.seen_seconds > LOST_AFTER
    return WorkerView(
        name=one.name,
        host=one.host,
        pid=one.pid,
        queues=list(one.queues),
        state=one.state,
        seen_seconds=one.seen_seconds,
        done=one.done,
        failed=one.failed,
        lost=lost,
    )


def _queue(name: str, waiting: int, workers: list[WorkerView]) -> QueueView:
    takers = sum(name in one.queues and not one.lost for one in workers)
    return QueueView(name=name, words=QUEUE_WORDS.get(name, name), waiting=waiting, workers=takers)


def _problem(queues: list[QueueView]) -> str:
    """What nobody does, in words."""
    idle = [one.words for one in queues if not one.workers]
    if not idle:
        return ""
    if len(idle) == len(queues):
        return "No worker is known: start them with hardfirst up, or with hardfirst worker. Rounds wait for them."
    return f"No worker takes {' and '.join(idle)}: start one for it, or work of that kind waits."


def _failed_job(one: FailedJob) -> FailedJobView:
    words = JOB_WORDS.get(one.function, one.function)
    return FailedJobView(job_id=one.job_id, queue=one.queue, words=words, error=one.error, ended_at=one.ended_at)


def _failed_steps(connection: Connection, project_id: int) -> list[FailedStep]:
    """Of the latest round, and deletions of old versions that failed: what can still be mended. Latest first."""
    last = latest_round(connection, project_id)
    if last is None:
        return []
    mendable = (steps.c.round_id == last.id) | (steps.c.kind == "purge")
    query = (
        select(steps, rounds.c.number, rounds.c.state.label("round_state"))
        .join(rounds, rounds.c.id == steps.c.round_id)
        .where(rounds.c.project_id == project_id, steps.c.state == "failed", mendable)
        .order_by(steps.c.id.desc())
        .limit(MAX_FAILED_STEPS)
    )
    return [_failed_step(row) for row in connection.execute(query)]


def _failed_step(row: Row[Any]) -> FailedStep:
    retry = "purge" if row.kind == "purge" else "round" if row.round_state == "failed" else ""
    return FailedStep(
        step_id=row.id,
        round_number=row.number,
        kind=row.kind,
        words=STEP_WORDS.get(row.kind, row.kind),
        shard=row.shard,
        attempts=row.attempt,
        error=row.error or "it left no reason",
        retry=retry,
    )
