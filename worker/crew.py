"""Who works: workers, queues, and jobs that failed, as Redis tells it, which is read with caution.

A Redis that came back empty knows of no worker until each says so again: this is for people to look at, never a health
check.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from redis import Redis
from rq.exceptions import DeserializationError, InvalidJobOperation, NoSuchJobError
from rq.job import JobStatus
from rq.registry import FailedJobRegistry

from worker.errors import Conflict, NotFound
from worker.queue import JOB_FUNCTIONS, QUEUES, SERIALIZER, SafeJob, queue, queue_lengths, redis_border

MAX_WORKERS = 200
MAX_FAILED = 20  # of each queue
MAX_TEXT = 300
WORKERS_KEY = "rq:workers"
LOST_AFTER = 120.0  # seconds without a sign of life; an idle worker gives one every 30
_FIELDS = (
    "hostname",
    "pid",
    "queues",
    "state",
    "current_job",
    "last_heartbeat",
    "birth",
    "successful_job_count",
    "failed_job_count",
)

_UNREADABLE = (NoSuchJobError, DeserializationError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class WorkerSeen:
    """A worker as it last told of itself.

    Attributes:
        name: RQ's, unique.
        host: where it runs.
        pid: there.
        queues: first one first.
        state: idle, busy, suspended, or what else it says.
        seen_seconds: since its last sign of life; None when it gave none that can be read.
        done: jobs done.
        failed: jobs failed.
    """

    name: str
    host: str
    pid: int | None
    queues: tuple[str, ...]
    state: str
    seen_seconds: float | None
    done: int
    failed: int


@dataclass(frozen=True)
class FailedJob:
    """A job that failed and belongs to no step: those have their error in the store."""

    job_id: str
    queue: str
    function: str
    error: str
    ended_at: float | None


@dataclass(frozen=True)
class Crew:
    """Everything Redis knows about work."""

    workers: Sequence[WorkerSeen]
    queues: dict[str, int]
    failed: Sequence[FailedJob]


def crew(conn: Redis) -> Crew:
    """
    Raises:
        QueueUnavailable: Redis does not answer.
    """
    return Crew(workers(conn), queue_lengths(conn), failed_jobs(conn))


def workers(conn: Redis) -> list[WorkerSeen]:
    """By host and name. RQ's own objects are not made: they would import what the hash names.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        known: Any = conn.smembers(WORKERS_KEY)
        keys = sorted(known)[:MAX_WORKERS]
        pipeline = conn.pipeline(transaction=False)
        for key in keys:
            pipeline.hmget(key, _FIELDS)
        rows = pipeline.execute() if keys else []
    found = [
        _worker(_text(key).removeprefix("rq:worker:"), row) for key, row in zip(keys, rows, strict=True) if any(row)
    ]
    return sorted(found, key=lambda one: (one.host, one.name))


def _worker(name: str, row: Sequence[bytes | None]) -> WorkerSeen:
    told = {field: _text(value) for field, value in zip(_FIELDS, row, strict=True)}
    seen = _moment(told["last_heartbeat"])
    return WorkerSeen(
        name=name,
        host=told["hostname"],
        pid=_whole(told["pid"]),
        queues=tuple(told["queues"].split(",")) if told["queues"] else (),
        state=told["state"] or "?",
        seen_seconds=None if seen is None else max(time.time() - seen, 0.0),
        done=_whole(told["successful_job_count"]) or 0,
        failed=_whole(told["failed_job_count"]) or 0,
    )


def failed_jobs(conn: Redis) -> list[FailedJob]:
    """Latest first, without the jobs of steps.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    found = []
    with redis_border():
        for name in QUEUES:
            registry = FailedJobRegistry(queue=queue(name, conn), job_class=SafeJob, serializer=SERIALIZER)
            ids: Any = conn.zrevrange(registry.key, 0, 5 * MAX_FAILED)
            ours = [_text(job_id) for job_id in ids]
            for job_id in [one for one in ours if not is_step(one)][:MAX_FAILED]:
                row: Any = conn.hmget(f"rq:job:{job_id}", ("data", "ended_at"))
                if row[0] is not None:
                    found.append(_failed_job(conn, name, job_id, row[1]))
    return sorted(found, key=lambda one: -(one.ended_at or 0.0))


def is_step(job_id: str) -> bool:
    """Whether `queue.step_job_id` made it."""
    head, _, tail = job_id.partition("-a")
    return head[:1] == "s" and head[1:].isdigit() and tail.isdigit()


def _failed_job(conn: Redis, queue_name: str, job_id: str, ended_at: bytes | None) -> FailedJob:
    function, error = "?", "it left no reason"
    try:
        job = SafeJob.fetch(job_id, connection=conn, serializer=SERIALIZER)
        function = str(job.func_name).removeprefix("worker.jobs.")[:MAX_TEXT]
        latest = job.latest_result()
        lines = [line for line in str((latest and latest.exc_string) or "").splitlines() if line.strip()]
        error = lines[-1].strip().removeprefix("worker.errors.")[:MAX_TEXT] if lines else error
    except _UNREADABLE as broken:  # not written by us: said, not hidden
        error = f"its record cannot be read ({type(broken).__name__})"
    return FailedJob(job_id[:MAX_TEXT], queue_name, function, error, _moment(_text(ended_at)))


def retry_job(conn: Redis, job_id: str) -> None:
    """Put a failed job back on its queue.

    Raises:
        NotFound: there is no such job any more.
        Conflict: it belongs to a step, did not fail, or is none of ours.
        QueueUnavailable: Redis does not answer.
    """
    if is_step(job_id):
        raise Conflict(f"job {job_id[:80]} belongs to a round's step: retry the round")
    with redis_border():
        try:
            job = SafeJob.fetch(job_id, connection=conn, serializer=SERIALIZER)
            if job.func_name not in JOB_FUNCTIONS:
                raise Conflict(f"job {job_id[:80]} is none of hardfirst's")
            if job.get_status(refresh=False) != JobStatus.FAILED:
                raise Conflict(f"job {job_id[:80]} did not fail: it is {job.get_status(refresh=False)}")
            job.requeue()
        except DeserializationError as broken:
            raise Conflict(f"job {job_id[:80]} cannot be read: it is none of hardfirst's") from broken
        except (NoSuchJobError, InvalidJobOperation) as gone:
            raise NotFound(f"there is no failed job {job_id[:80]!r} any more") from gone


def _text(value: bytes | str | None) -> str:
    if value is None:
        return ""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text[:MAX_TEXT]


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
