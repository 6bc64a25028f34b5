from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Iterator

import pytest
import redis

from worker import crew, queue
from worker.errors import Conflict, NotFound, QueueUnavailable


@pytest.fixture
def conn(redis_url: str) -> Iterator[redis.Redis]:
    connection = queue.connect(redis_url)
    yield connection
    connection.close()


def register(conn: redis.Redis, name: str, **fields: str) -> None:
    """A worker as RQ writes it."""
    told = {"hostname": "press-3", "pid": "17", "queues": "control,score", "state": "idle", **fields}
    conn.sadd(crew.WORKERS_KEY, f"rq:worker:{name}")
    conn.hset(f"rq:worker:{name}", mapping=told)


def fail_job(conn: redis.Redis, job_id: str, function: str = "worker.jobs.preview") -> None:
    """A job that a worker ran and that failed: of a project that no store knows."""
    queue.enqueue_unique(conn, queue.CONTROL, function, (7, "nothing"), job_id, timeout=60)
    queue.make_worker("simple", [queue.CONTROL], conn).work(burst=True, logging_level="CRITICAL")


def test_nobody_works_in_an_empty_redis(conn: redis.Redis) -> None:
    found = crew.crew(conn)
    assert (list(found.workers), list(found.failed)) == ([], [])
    assert found.queues == {"train": 0, "score": 0, "predict": 0, "control": 0}


def test_workers_as_they_told_of_themselves(conn: redis.Redis) -> None:
    seen = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - 90))
    register(conn, "a", last_heartbeat=seen, successful_job_count="12", failed_job_count="1")
    (one,) = crew.workers(conn)
    assert (one.name, one.host, one.pid, one.queues, one.state) == ("a", "press-3", 17, ("control", "score"), "idle")
    assert (one.done, one.failed) == (12, 1)
    assert one.seen_seconds == pytest.approx(90, abs=5)


def test_what_redis_says_is_not_believed_to_be_well_formed(conn: redis.Redis) -> None:
    register(conn, "b", pid="x" * 400, last_heartbeat="yesterday", queues="", state="", successful_job_count="-3")
    conn.sadd(crew.WORKERS_KEY, "rq:worker:gone")  # registered, its hash expired: no worker
    (one,) = crew.workers(conn)
    assert (one.pid, one.seen_seconds, one.queues, one.state, one.done) == (None, None, (), "?", 0)


def test_a_real_worker_is_seen(conn: redis.Redis) -> None:
    worker = queue.make_worker("simple", [queue.CONTROL, queue.SCORE], conn)
    worker.register_birth()
    (one,) = crew.workers(conn)
    assert one.queues == ("control", "score")
    assert one.seen_seconds is not None
    assert one.seen_seconds < 5
    worker.register_death()
    assert crew.workers(conn) == []


def test_a_failed_job_is_named_with_its_error_and_tried_again(
    conn: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.jobs.services", lambda: (_ for _ in ()).throw(ValueError("no <b>store</b>")))
    fail_job(conn, "preview-1")
    (one,) = crew.failed_jobs(conn)
    assert (one.job_id, one.queue, one.function) == ("preview-1", "control", "preview")
    assert one.error == "ValueError: no <b>store</b>"
    assert one.ended_at == pytest.approx(time.time(), abs=30)
    crew.retry_job(conn, "preview-1")
    assert crew.failed_jobs(conn) == []
    assert queue.queue_lengths(conn)["control"] == 1
    with pytest.raises(Conflict, match="did not fail"):
        crew.retry_job(conn, "preview-1")


def test_jobs_of_steps_are_the_stores_business(conn: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.services", lambda: (_ for _ in ()).throw(ValueError("no store")))
    fail_job(conn, queue.step_job_id(12, 1))
    assert crew.failed_jobs(conn) == []
    with pytest.raises(Conflict, match="retry the round"):
        crew.retry_job(conn, queue.step_job_id(12, 1))


@pytest.mark.parametrize("data", [b"garbage", zlib.compress(pickle.dumps(("os.system", None, ("true",), {})))])
def test_a_failed_job_that_cannot_be_read_hides_no_other(
    conn: redis.Redis, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr("worker.jobs.services", lambda: (_ for _ in ()).throw(ValueError("no store")))
    fail_job(conn, "preview-1")
    fail_job(conn, "preview-2")
    conn.hset("rq:job:preview-2", "data", data)
    found = {one.job_id: (one.function, one.error) for one in crew.failed_jobs(conn)}
    assert found == {
        "preview-1": ("preview", "ValueError: no store"),
        "preview-2": ("?", "its record cannot be read (DeserializationError)"),
    }
    with pytest.raises(Conflict, match="preview-2 cannot be read"):
        crew.retry_job(conn, "preview-2")


def test_a_job_that_is_gone_or_not_ours_is_not_run(conn: redis.Redis) -> None:
    with pytest.raises(NotFound, match="no failed job 'never'"):
        crew.retry_job(conn, "never")
    foreign = queue.queue(queue.CONTROL, conn).enqueue("os.system", args=("true",), job_id="foreign")
    assert foreign is not None
    with pytest.raises(Conflict, match="none of hardfirst's"):
        crew.retry_job(conn, "foreign")


@pytest.mark.parametrize(
    ("job_id", "is_step"), [("s1-a1", True), ("s12-a30", True), ("suspects-7-1", False), ("s-a", False), ("", False)]
)
def test_ids_of_steps(job_id: str, is_step: bool) -> None:
    assert crew.is_step(job_id) is is_step


def test_redis_away_is_said() -> None:
    nowhere = queue.connect("redis://127.0.0.1:1/0")
    with pytest.raises(QueueUnavailable, match="does not answer"):
        crew.crew(nowhere)
