"""The queue: names, connections, enqueueing, and the workers' main loop. Never imports torch.

Redis holds only what can be rebuilt. Jobs carry ids as JSON, and a worker runs only the functions of JOB_FUNCTIONS:
whoever can write to Redis can start our jobs, not their code.

`python -m worker.queue train train` runs the forking worker, `python -m worker.queue simple control,score` one that
keeps the model loaded. Both read REDIS_URL.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, Literal, NoReturn

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry
from rq import Queue, SimpleWorker, Worker
from rq.command import send_stop_job_command
from rq.exceptions import DuplicateJobError, InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus
from rq.results import Result

from worker import errors
from worker.errors import HardfirstError, QueueUnavailable
from worker.processes import die_with_parent

log = logging.getLogger(__name__)

TRAIN, SCORE, PREDICT, CONTROL = "train", "score", "predict", "control"
QUEUES = (TRAIN, SCORE, PREDICT, CONTROL)

# Whole names, not a prefix: RQ walks attributes, so "worker.jobs.os.system" would be a function of worker.jobs.
JOB_FUNCTIONS = frozenset(
    f"worker.jobs.{name}"
    for name in (
        *("attach", "retrain", "train_member", "score_shard", "reselect", "publish", "purge"),  # steps of a round
        *("predict", "late", "reconcile", "preview", "suspects", "examine"),
    )
)

SERIALIZER = "json"
RESULT_TTL = 600
FAILURE_TTL = 86_400  # RQ keeps failed jobs for a year, and refuses their id as long
RECONCILE_TIMEOUT = 600  # seconds; the ttl of a periodic job bounds its waiting, not its running
PROGRESS_TTL = 300  # longer than any phase is silent; a dead round's bar must not stand for ever
# An idle worker looks after dead jobs once per dequeue, and a dequeue waits worker_ttl - 15: 30 s, not RQ's 405
WORKER_TTL = 45
MAINTENANCE_INTERVAL = 30
MONITORING_INTERVAL = 10  # seconds between a training's heartbeats
# shorter than the web connection's socket_timeout, which a longer blocking read would hit
BLOCKING_READ_MS = 2000
# a worker needs about 1 ms from popping a job to marking it started; in between it is in no list
POPPED_GRACE = 0.05
SUPERVISOR_PID = "HARDFIRST_SUPERVISOR_PID"


class JobState(StrEnum):
    """Where the job of a step is, as far as Redis knows."""

    MISSING = "missing"  # no trace: never enqueued, expired, or Redis came back empty
    QUEUED = "queued"
    LOST = "lost"  # popped by a worker that died before it started the job: no worker will find it
    STARTED = "started"
    FAILED = "failed"
    FINISHED = "finished"


class SafeJob(Job):
    """A job as a worker may run it: a function of JOB_FUNCTIONS, no callbacks, no webhooks.

    The hash in Redis is hostile: RQ imports any dotted name in it, as the function or as a callback, and posts to any
    URL in its webhooks.
    """

    @property
    def func(self) -> Any:
        if self.instance is not None or self.func_name not in JOB_FUNCTIONS:
            raise PermissionError(f"job {self.id}: function {self.func_name!r} is not one of ours; it was not run")
        return super().func

    success_callback = failure_callback = stopped_callback = property(lambda self: None)

    def send_webhooks(self, *args: Any, **kwargs: Any) -> None:
        """Send none."""


class TrainWorker(Worker):
    """Forks per job, so that a training is isolated and can be killed; its fork dies with it.

    RQ leaves the fork of a killed worker running, with the GPU: an orphan nobody knows of.
    """

    log_result_lifespan = False

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        die_with_parent(signal.SIGKILL, parent_pid=self.pid)
        super().main_work_horse(job, queue)


class LoadedWorker(SimpleWorker):
    """Runs jobs in its own process, so that the model stays loaded."""

    log_result_lifespan = False


def connect(url: str, role: Literal["web", "worker"] = "web") -> redis.Redis:
    """A connection pool; nothing is sent yet. "web" gives up after about 2 s, "worker" rides out minutes without Redis.

    A worker that gave up would end, and with it a training that needs no Redis at all.
    """
    if role == "web":
        retry, socket_timeout = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 6), 5
    else:
        retry, socket_timeout = Retry(ExponentialWithJitterBackoff(base=0.1, cap=5.0), 90), None
    try:
        return redis.Redis.from_url(
            url, retry=retry, socket_timeout=socket_timeout, socket_connect_timeout=5, health_check_interval=30
        )
    except ValueError as error:
        raise errors.SettingsInvalid(
            "REDIS_URL must start with redis://, rediss:// or unix://, as in redis://localhost:6379/0"
        ) from error


def queue(name: str, conn: redis.Redis) -> Queue:
    """The queue of that name, JSON only."""
    return Queue(name, connection=conn, serializer=SERIALIZER, job_class=SafeJob)


@contextlib.contextmanager
def redis_border() -> Iterator[None]:
    """What goes wrong with Redis in here is QueueUnavailable."""
    try:
        yield
    except redis.RedisError as error:
        raise QueueUnavailable(
            f"Redis (Valkey) does not answer: {str(error).rstrip('.')}. Nothing is lost; it goes on when Redis is back."
        ) from error


def ping(conn: redis.Redis) -> None:
    """Return if Redis answers.

    Raises:
        QueueUnavailable: it does not.
    """
    with redis_border():
        conn.ping()


def step_job_id(step_id: int, attempt: int) -> str:
    """A new id for every attempt: RQ refuses an id for as long as any trace of it exists."""
    return f"s{step_id}-a{attempt}"


def enqueue_step(conn: redis.Redis, step_id: int, attempt: int, queue_name: str, function: str, timeout: int) -> bool:
    """Enqueue `function(step_id, attempt)`. Call it after the commit that made the attempt.

    Args:
        timeout: seconds the job may run.

    Returns:
        Whether it was enqueued now; False where this attempt was enqueued before.

    Raises:
        QueueUnavailable: Redis does not answer; the sweeper will find the step.
    """
    return enqueue_unique(
        conn, queue_name, function, (step_id, attempt), step_job_id(step_id, attempt), timeout, ttl=None
    )


def enqueue_unique(
    conn: redis.Redis,
    queue_name: str,
    function: str,
    args: Sequence[Any],
    job_id: str,
    timeout: int,
    ttl: int | None = 120,
) -> bool:
    """Enqueue `function(*args)` unless a job of that id is known already.

    Args:
        function: full dotted name, one of JOB_FUNCTIONS.
        args: what JSON can carry: ids, numbers, text, lists, dicts.
        job_id: letters, digits, `_` and `-`.
        timeout: seconds the job may run.
        ttl: seconds after which it is forgotten, unrun, failed or done, and its id free again. None: it waits for ever,
            its result is kept 10 minutes and its failure a day.

    Returns:
        Whether it was enqueued now.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    _check_job(queue_name, function, args)
    try:
        with redis_border():
            queue(queue_name, conn).enqueue(
                function,
                args=tuple(args),
                job_id=job_id,
                unique=True,
                description=job_id,
                job_timeout=timeout,
                ttl=ttl,
                result_ttl=ttl or RESULT_TTL,
                failure_ttl=ttl or FAILURE_TTL,
            )
    except DuplicateJobError:
        return False
    return True


def call_predict(conn: redis.Redis, args: Sequence[Any], timeout: float, job_timeout: int = 120) -> Any:
    """Run `worker.jobs.predict(*args)` on a worker and return what it returns, as JSON carries it.

    Not ready in `timeout` seconds, the job still runs, and what it stores answers the next time.

    Args:
        args: what JSON can carry.
        timeout: seconds to wait for the answer.
        job_timeout: seconds the job may run; also how long it may wait in the queue before it is dropped.

    Raises:
        TimeoutError: no answer in time.
        HardfirstError: the job failed; of the class it raised, where that is one of ours.
        QueueUnavailable: Redis does not answer.
    """
    result = _call(conn, PREDICT, "worker.jobs.predict", args, timeout, job_timeout)
    if result is None:
        raise TimeoutError(f"no prediction within {timeout:g} s; it will be stored when it is ready")
    if result.type != Result.Type.SUCCESSFUL:
        _raise_as_in_job(result.exc_string or "")
    return result.return_value


def call_examine(conn: redis.Redis, args: Sequence[Any], timeout: float) -> Any:
    """Run `worker.jobs.examine(*args)` on a worker of `control` and return what it returns.

    Raises:
        TimeoutError: no answer in time: the worker is at something else. The job is dropped, if it has not begun.
        HardfirstError, QueueUnavailable: as `call_predict`.
    """
    result = _call(conn, CONTROL, "worker.jobs.examine", args, timeout, math.ceil(timeout))
    if result is None:
        raise TimeoutError(f"no worker answered within {timeout:g} s")
    if result.type != Result.Type.SUCCESSFUL:
        _raise_as_in_job(result.exc_string or "", "examination")
    return result.return_value


def _call(
    conn: redis.Redis, queue_name: str, function: str, args: Sequence[Any], timeout: float, job_timeout: int
) -> Result | None:
    _check_job(queue_name, function, args)
    deadline = time.monotonic() + timeout
    with redis_border():
        job = queue(queue_name, conn).enqueue(
            function,
            args=tuple(args),
            description=function.rpartition(".")[2],
            job_timeout=job_timeout,
            ttl=max(job_timeout, 1),
            result_ttl=60,
            failure_ttl=60,
        )
        return _await_result(job, deadline)


def _await_result(job: Job, deadline: float) -> Result | None:
    """Wait on the job's result stream: one blocking read, no polling."""
    key = Result.get_key(job.id)  # type: ignore[no-untyped-call]  # rq annotates only part of it
    while (left := deadline - time.monotonic()) > 0:
        block_ms = max(1, min(BLOCKING_READ_MS, int(left * 1000)))
        if job.connection.xread({key: "0-0"}, count=1, block=block_ms):
            return job.latest_result()
    return job.latest_result()


def _raise_as_in_job(traceback_text: str, what: str = "prediction") -> NoReturn:
    """Raise the error of the job's traceback: one of ours as itself, any other with its last line only."""
    if ours := re.findall(r"^worker\.errors\.(\w+)(?:: (.*))?$", traceback_text, re.MULTILINE):
        name, message = ours[-1]
        kind = getattr(errors, name, HardfirstError)
        if isinstance(kind, type) and issubclass(kind, HardfirstError):
            raise kind(message)
    lines = [line for line in traceback_text.splitlines() if line.strip()]
    raise HardfirstError(f"the {what} job failed: {lines[-1] if lines else 'it left no reason'}")


def _check_job(queue_name: str, function: str, args: Sequence[Any]) -> None:
    if queue_name not in QUEUES:
        raise ValueError(f"queue {queue_name!r} is not one of {', '.join(QUEUES)}")
    if function not in JOB_FUNCTIONS:
        raise ValueError(f"job function {function!r} is not in JOB_FUNCTIONS; no worker would run it")
    json.dumps(list(args))  # TypeError here, at the caller's line, rather than in Redis' client


def job_state(conn: redis.Redis, queue_name: str, step_id: int, attempt: int) -> JobState:
    """Where the job of this attempt is. For the sweeper: MISSING, LOST, FAILED and FINISHED need another attempt if the
    store says the step is still open.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    job_id = step_job_id(step_id, attempt)
    with redis_border():
        state = _look(conn, queue_name, job_id)
        if state is JobState.LOST:  # or a worker has popped it this moment
            time.sleep(POPPED_GRACE)
            state = _look(conn, queue_name, job_id)
    return state


def _look(conn: redis.Redis, queue_name: str, job_id: str) -> JobState:
    try:
        job = SafeJob.fetch(job_id, connection=conn, serializer=SERIALIZER)
    except NoSuchJobError:
        return JobState.MISSING
    status = job.get_status(refresh=False)
    if status == JobStatus.STARTED:
        return JobState.STARTED
    if status == JobStatus.FINISHED:
        return JobState.FINISHED
    if status in (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED):
        return JobState.FAILED
    in_list = queue(queue_name, conn).get_job_position(job_id) is not None
    return JobState.QUEUED if in_list else JobState.LOST


def running_seconds(conn: redis.Redis, step_id: int, attempt: int) -> float:
    """How long ago a worker started the job of this attempt; 0 where none did.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        try:
            job = SafeJob.fetch(step_job_id(step_id, attempt), connection=conn, serializer=SERIALIZER)
        except NoSuchJobError:
            return 0.0
    return time.time() - job.started_at.timestamp() if job.started_at else 0.0


def stop_step(conn: redis.Redis, step_id: int, attempt: int) -> bool:
    """Stop the job of this attempt: take it off the queue, or kill the fork that trains. Whether there was one.

    A worker that does not fork (score, predict, control) finishes its job: mark the step in the store first, so that
    its attempt is fenced off.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        try:
            job = SafeJob.fetch(step_job_id(step_id, attempt), connection=conn, serializer=SERIALIZER)
            if job.get_status(refresh=False) == JobStatus.STARTED:
                send_stop_job_command(conn, job.id, serializer=SERIALIZER)
            else:
                job.cancel()
        except (NoSuchJobError, InvalidJobOperation):
            return False
    return True


def queue_lengths(conn: redis.Redis) -> dict[str, int]:
    """Jobs waiting, by queue.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        return {name: queue(name, conn).count for name in QUEUES}


def progress_key(project_id: int) -> str:
    return f"hf:progress:{project_id}"


def set_progress(conn: redis.Redis, project_id: int, ttl: int = PROGRESS_TTL, **fields: Any) -> None:
    """Set fields of a project's live progress; the others stay. Forgotten after `ttl` seconds without a call.

    Raises:
        QueueUnavailable: Redis does not answer. Work that only reports should go on.
    """
    key = progress_key(project_id)
    with redis_border(), conn.pipeline() as pipeline:
        if fields:
            pipeline.hset(key, mapping={name: json.dumps(value) for name, value in fields.items()})
        pipeline.expire(key, ttl)
        pipeline.execute()


def get_progress(conn: redis.Redis, project_id: int) -> dict[str, Any]:
    """A project's live progress; empty when nothing runs.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        stored: Any = conn.hgetall(progress_key(project_id))
    return {name.decode(): json.loads(value) for name, value in stored.items()}


def clear_progress(conn: redis.Redis, project_id: int) -> None:
    """Forget a project's live progress.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        conn.delete(progress_key(project_id))


def enqueue_reconcile(conn: redis.Redis, period: int) -> bool:
    """Enqueue `worker.jobs.reconcile()` once per `period` seconds, however many processes call this and how often.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    period = max(1, period)
    job_id = f"reconcile-{period}-{int(time.time() // period)}"
    return enqueue_unique(conn, CONTROL, "worker.jobs.reconcile", (), job_id, timeout=RECONCILE_TIMEOUT, ttl=2 * period)


def start_ticker(conn: redis.Redis, stop: threading.Event, period: int) -> threading.Thread:
    """A thread that keeps `reconcile` coming until `stop` is set."""

    def tick() -> None:
        while True:
            try:
                enqueue_reconcile(conn, period)
            except QueueUnavailable as error:
                log.warning("reconcile waits: %s", error)
            if stop.wait(max(0.25, period / 4)):
                return

    thread = threading.Thread(target=tick, daemon=True, name="reconcile-ticker")
    thread.start()
    return thread


def make_worker(kind: str, queue_names: Sequence[str], conn: redis.Redis) -> Worker | SimpleWorker:
    """A worker over these queues, first one first. `kind`: "train" forks per job, "simple" does not.

    Raises:
        ValueError: an unknown kind or queue.
    """
    kinds: dict[str, type[Worker | SimpleWorker]] = {"train": TrainWorker, "simple": LoadedWorker}
    unknown = [name for name in queue_names if name not in QUEUES]
    if kind not in kinds or unknown or not queue_names:
        raise ValueError(
            f"usage: python -m worker.queue train|simple QUEUE[,QUEUE...], queues: {', '.join(QUEUES)}; "
            f"not {kind} {','.join(queue_names)}"
        )
    return kinds[kind](
        list(queue_names),  # names, not Queue objects: RQ would unpickle with those
        connection=conn,
        serializer=SERIALIZER,
        job_class=SafeJob,
        worker_ttl=WORKER_TTL,
        maintenance_interval=MAINTENANCE_INTERVAL,
        job_monitoring_interval=MONITORING_INTERVAL,
        log_job_description=False,  # a description may hold what the job's arguments hold
    )


def run_worker(
    kind: str,
    queue_names: Sequence[str],
    redis_url: str,
    *,
    reconcile_seconds: int | None = None,
    max_jobs: int | None = None,
) -> None:
    """Work until told to stop (TERM: after the running job; a second TERM, a second later: now).

    Args:
        reconcile_seconds: with it, and "control" among the queues, `reconcile` is enqueued that often.
    """
    worker = make_worker(kind, queue_names, connect(redis_url, "worker"))
    stop = threading.Event()
    # a fork would inherit the ticker's locks but not its thread: only where nothing forks
    if reconcile_seconds and CONTROL in queue_names and kind == "simple":
        start_ticker(connect(redis_url, "web"), stop, reconcile_seconds)
    try:
        worker.work(logging_level="WARNING", max_jobs=max_jobs, with_scheduler=False)
    finally:
        stop.set()


def main(argv: Sequence[str]) -> int:
    """Run a worker: `python -m worker.queue train|simple QUEUE[,QUEUE...]`."""
    from worker.settings import load_settings  # only here: settings know strategies, and those load scikit-learn

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("worker").setLevel(logging.INFO)  # ours; httpx would print every URL
    if supervisor_pid := os.environ.get(SUPERVISOR_PID):
        die_with_parent(signal.SIGKILL, int(supervisor_pid))
    if len(argv) != 2:
        print(f"usage: python -m worker.queue train|simple QUEUE[,QUEUE...], queues: {', '.join(QUEUES)}")
        return 2
    try:
        settings = load_settings()
        if not settings.redis_url:
            raise errors.SettingsInvalid("REDIS_URL is not set; `hardfirst up` starts a Valkey and its workers itself")
        run_worker(argv[0], argv[1].split(","), settings.redis_url, reconcile_seconds=settings.reconcile_seconds)
    except (HardfirstError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # as `worker.queue`, not as `__main__`: jobs that import worker.queue must meet the same module
    from worker.queue import main as imported_main

    sys.exit(imported_main(sys.argv[1:]))
