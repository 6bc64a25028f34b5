from __future__ import annotations

import ast
import json
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import redis
import rq
from rq.job import Job
from rq.webhook import Webhook

from worker import queue as hf_queue
from worker.errors import HardfirstError, LabelMismatch, QueueUnavailable, SettingsInvalid
from worker.processes import stop_process
from worker.queue import (
    CONTROL,
    JOB_FUNCTIONS,
    PREDICT,
    SCORE,
    TRAIN,
    JobState,
    call_predict,
    clear_progress,
    connect,
    enqueue_reconcile,
    enqueue_step,
    enqueue_unique,
    get_progress,
    job_state,
    main,
    make_worker,
    queue,
    queue_lengths,
    set_progress,
    stop_step,
)

RETRAIN = "worker.jobs.retrain"
SCORE_SHARD = "worker.jobs.score_shard"
REPOSITORY = Path(__file__).resolve().parents[2]

STAND_IN_JOBS = """
    import os, time
    from pathlib import Path
    from worker.errors import LabelMismatch

    HERE = Path(__file__).parent
    (HERE / "imported-by").write_text(str(os.getpid()))

    def predict(what, value=None):
        if what == "echo":
            return {"value": value, "pid": os.getpid()}
        if what == "mismatch":
            raise LabelMismatch("label_config uses ['bolt'], unknown to the model (['nut'])")
        if what == "bug":
            return 1 / 0
        time.sleep(value)
        return "late"

    def retrain(step_id, attempt):
        (HERE / "horse-pid").write_text(str(os.getpid()))
        time.sleep(60)

    def score_shard(step_id, attempt):
        if step_id == 13:
            raise ValueError("an unlucky shard")
        return step_id
"""

RUN_WORKER = """
    import importlib.util, os, sys
    class StandIn:  # worker.jobs is the file beside this one
        def find_spec(self, name, path=None, target=None):
            if name == "worker.jobs":
                return importlib.util.spec_from_file_location(name, os.path.join(os.path.dirname(__file__), "jobs.py"))
    sys.meta_path.insert(0, StandIn())
    from worker.queue import run_worker
    run_worker(sys.argv[1], sys.argv[2].split(","), os.environ["REDIS_URL"], max_jobs=int(sys.argv[3]) or None)
"""

StartWorker = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def conn(redis_url: str) -> Iterator[redis.Redis]:
    connection = connect(redis_url)
    yield connection
    connection.close()


@pytest.fixture
def start_worker(redis_url: str, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts a worker process whose `worker.jobs` is STAND_IN_JOBS."""
    (tmp_path / "jobs.py").write_text(textwrap.dedent(STAND_IN_JOBS))
    (tmp_path / "run_worker.py").write_text(textwrap.dedent(RUN_WORKER))
    started: list[subprocess.Popen[bytes]] = []

    def start(kind: str, queue_names: str, max_jobs: int = 0) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "run_worker.py"), kind, queue_names, str(max_jobs)],
            env={**os.environ, "REDIS_URL": redis_url, "PYTHONPATH": str(REPOSITORY)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        stop_process(process, grace=1.5)


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def test_importing_the_queue_loads_no_torch() -> None:
    code = "import sys, worker.queue; print([m for m in ('torch', 'ultralytics', 'sklearn') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_redis_that_is_away_is_unavailable_within_seconds(tmp_path: Path) -> None:
    away = connect(f"unix://{tmp_path / 'nobody.sock'}")
    began = time.monotonic()
    with pytest.raises(QueueUnavailable, match=r"Redis .* does not answer"):
        enqueue_unique(away, CONTROL, "worker.jobs.attach", (1,), "attach-1", timeout=10)
    assert time.monotonic() - began < 5
    for call in (
        lambda: job_state(away, TRAIN, 1, 1),
        lambda: call_predict(away, ["echo"], timeout=1),
        lambda: get_progress(away, 1),
    ):
        with pytest.raises(QueueUnavailable):
            call()


def test_a_url_of_another_kind_is_refused_without_showing_it() -> None:
    with pytest.raises(SettingsInvalid, match="redis://") as caught:
        connect("http://:secret@localhost")
    assert "secret" not in str(caught.value)


def test_step_jobs_carry_ids_as_json(conn: redis.Redis) -> None:
    assert enqueue_step(conn, 7, 2, SCORE, SCORE_SHARD, timeout=120)
    stored = conn.hgetall("rq:job:s7-a2")
    assert json.loads(zlib.decompress(stored[b"data"])) == [SCORE_SHARD, None, [7, 2], {}]
    assert stored[b"timeout"] == b"120"
    assert stored[b"result_ttl"] == b"600"
    assert stored[b"failure_ttl"] == b"86400"
    assert b"ttl" not in stored
    assert queue_lengths(conn) == {TRAIN: 0, SCORE: 1, PREDICT: 0, CONTROL: 0}


def test_an_attempt_is_enqueued_once_and_the_next_attempt_anew(conn: redis.Redis) -> None:
    assert enqueue_step(conn, 7, 1, SCORE, SCORE_SHARD, timeout=120)
    assert not enqueue_step(conn, 7, 1, SCORE, SCORE_SHARD, timeout=120)
    assert enqueue_step(conn, 7, 2, SCORE, SCORE_SHARD, timeout=120)
    assert queue(SCORE, conn).job_ids == ["s7-a1", "s7-a2"]


@pytest.mark.parametrize(
    ("queue_name", "function", "args", "error"),
    [
        (SCORE, "os.system", ("true",), ValueError),
        (SCORE, "worker.jobs.os.system", ("true",), ValueError),
        ("elsewhere", SCORE_SHARD, (1, 1), ValueError),
        (SCORE, SCORE_SHARD, (Path("x"), 1), TypeError),
    ],
)
def test_what_no_worker_could_run_is_not_enqueued(
    conn: redis.Redis, queue_name: str, function: str, args: tuple[object, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        enqueue_unique(conn, queue_name, function, args, "some-job", timeout=10)
    assert conn.keys("*") == []


def test_job_states_from_missing_to_finished(conn: redis.Redis, start_worker: StartWorker) -> None:
    assert job_state(conn, SCORE, 1, 1) is JobState.MISSING
    enqueue_step(conn, 1, 1, SCORE, SCORE_SHARD, timeout=60)
    enqueue_step(conn, 13, 1, SCORE, SCORE_SHARD, timeout=60)
    enqueue_step(conn, 2, 1, TRAIN, RETRAIN, timeout=60)
    assert job_state(conn, SCORE, 1, 1) is JobState.QUEUED
    assert start_worker("simple", f"{CONTROL},{SCORE}", max_jobs=2).wait(120) == 0
    assert job_state(conn, SCORE, 1, 1) is JobState.FINISHED
    assert job_state(conn, SCORE, 13, 1) is JobState.FAILED
    start_worker("train", TRAIN)
    eventually(lambda: job_state(conn, TRAIN, 2, 1) is JobState.STARTED)


def test_a_job_popped_by_a_worker_that_died_is_lost(conn: redis.Redis) -> None:
    enqueue_step(conn, 1, 1, SCORE, SCORE_SHARD, timeout=60)
    conn.lpop("rq:queue:score")
    assert job_state(conn, SCORE, 1, 1) is JobState.LOST


def test_a_job_popped_this_moment_is_not_lost(conn: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue_step(conn, 1, 1, SCORE, SCORE_SHARD, timeout=60)
    conn.lpop("rq:queue:score")
    # the worker marks it started while the sweeper waits
    monkeypatch.setattr(hf_queue.time, "sleep", lambda seconds: conn.hset("rq:job:s1-a1", "status", "started"))
    assert job_state(conn, SCORE, 1, 1) is JobState.STARTED


def test_a_worker_runs_no_function_but_ours(conn: redis.Redis, start_worker: StartWorker, tmp_path: Path) -> None:
    hostile = rq.Queue(SCORE, connection=conn, serializer="json")
    touched = tmp_path / "touched"
    jobs = [hostile.enqueue(name, f"touch {touched}") for name in ("os.system", "worker.jobs.os.system")]
    assert start_worker("simple", SCORE, max_jobs=2).wait(120) == 0
    assert not touched.exists()
    for job in jobs:
        assert "is not one of ours; it was not run" in job.latest_result().exc_string


class TouchOnUnpickle:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_worker_unpickles_nothing(conn: redis.Redis, start_worker: StartWorker, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    assert enqueue_step(conn, 1, 1, SCORE, SCORE_SHARD, timeout=60)
    conn.hset("rq:job:s1-a1", "data", zlib.compress(pickle.dumps(TouchOnUnpickle(str(touched)))))
    assert start_worker("simple", SCORE, max_jobs=1).wait(120) == 0
    assert not touched.exists()
    assert job_state(conn, SCORE, 1, 1) is JobState.FAILED


def test_callbacks_and_webhooks_in_the_job_hash_are_ignored(conn: redis.Redis, start_worker: StartWorker) -> None:
    enqueue_step(conn, 1, 1, SCORE, SCORE_SHARD, timeout=60)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        hooks = json.dumps([Webhook(url, "finished", timeout=1).to_dict()])
        conn.hset("rq:job:s1-a1", mapping={"success_callback_name": "os.abort", "webhooks": hooks})
        assert start_worker("simple", SCORE, max_jobs=1).wait(120) == 0
        with pytest.raises(BlockingIOError):  # nobody called
            listener.accept()
    assert job_state(conn, SCORE, 1, 1) is JobState.FINISHED  # os.abort would have ended the worker


def test_a_bound_method_in_the_job_hash_is_refused(conn: redis.Redis) -> None:
    enqueue_step(conn, 1, 1, SCORE, SCORE_SHARD, timeout=60)
    conn.hset("rq:job:s1-a1", "data", zlib.compress(json.dumps([SCORE_SHARD, "an instance", [1, 1], {}]).encode()))
    job = queue(SCORE, conn).fetch_job("s1-a1")
    with pytest.raises(PermissionError, match="not one of ours"):
        _ = job.func


def test_predict_answers_what_the_job_returns(conn: redis.Redis, start_worker: StartWorker) -> None:
    worker = start_worker("simple", PREDICT)
    answer = call_predict(conn, ["echo", {"task_ids": [1, 2]}], timeout=30)
    assert answer == {"value": {"task_ids": [1, 2]}, "pid": worker.pid}  # in the worker itself: the model stays loaded
    assert call_predict(conn, ["echo"], timeout=30)["pid"] == worker.pid


def test_predict_waits_longer_than_one_blocking_read(conn: redis.Redis, start_worker: StartWorker) -> None:
    # one read must end before the socket gives up on it
    assert conn.connection_pool.connection_kwargs["socket_timeout"] * 1000 > hf_queue.BLOCKING_READ_MS
    start_worker("simple", PREDICT)
    assert call_predict(conn, ["sleep", 2.5], timeout=30) == "late"


def test_predict_does_not_wait_longer_than_asked(conn: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_queue, "BLOCKING_READ_MS", 4500)  # as long as the connection allows
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        call_predict(conn, ["echo"], timeout=0.3)
    assert 0.25 < time.monotonic() - began < 4
    assert queue_lengths(conn)[PREDICT] == 1  # it will run, and what it stores answers the next time


def test_predict_raises_what_the_job_raised(conn: redis.Redis, start_worker: StartWorker) -> None:
    start_worker("simple", PREDICT)
    with pytest.raises(LabelMismatch, match=r"^label_config uses \['bolt'\], unknown to the model \(\['nut'\]\)$"):
        call_predict(conn, ["mismatch"], timeout=30)
    with pytest.raises(HardfirstError, match=r"^the prediction job failed: ZeroDivisionError: division by zero$"):
        call_predict(conn, ["bug"], timeout=30)


def test_jobs_are_imported_in_the_fork_only(conn: redis.Redis, start_worker: StartWorker, tmp_path: Path) -> None:
    """worker.jobs leads to torch: the forking worker itself must stay free of it, and of the GPU."""
    worker = start_worker("train", TRAIN)
    enqueue_step(conn, 3, 1, TRAIN, RETRAIN, timeout=60)
    eventually((tmp_path / "horse-pid").exists)
    assert int((tmp_path / "imported-by").read_text()) != worker.pid


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pid(path: Path) -> int:
    eventually(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def test_stopping_a_step_ends_its_fork_and_not_its_worker(
    conn: redis.Redis, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker("train", TRAIN)
    enqueue_step(conn, 3, 1, TRAIN, RETRAIN, timeout=60)
    horse_pid = read_pid(tmp_path / "horse-pid")
    assert stop_step(conn, 3, 1)
    eventually(lambda: not running(horse_pid), 20)
    eventually(lambda: job_state(conn, TRAIN, 3, 1) is JobState.FAILED, 20)
    assert worker.poll() is None


def test_stopping_a_queued_step_takes_it_off_the_queue(conn: redis.Redis) -> None:
    enqueue_step(conn, 3, 1, SCORE, SCORE_SHARD, timeout=60)
    assert stop_step(conn, 3, 1)
    assert queue_lengths(conn)[SCORE] == 0
    assert job_state(conn, SCORE, 3, 1) is JobState.FAILED
    assert not stop_step(conn, 99, 1)


def test_a_killed_training_worker_leaves_no_fork(conn: redis.Redis, start_worker: StartWorker, tmp_path: Path) -> None:
    worker = start_worker("train", TRAIN)
    enqueue_step(conn, 3, 1, TRAIN, RETRAIN, timeout=60)
    horse_pid = read_pid(tmp_path / "horse-pid")
    worker.kill()
    worker.wait()
    eventually(lambda: not running(horse_pid), 20)


def test_progress_is_kept_by_field_and_forgotten(conn: redis.Redis) -> None:
    assert get_progress(conn, 5) == {}
    set_progress(conn, 5, phase="training", epoch=1, epochs=80)
    set_progress(conn, 5, epoch=2, losses=[0.5, 0.25])
    assert get_progress(conn, 5) == {"phase": "training", "epoch": 2, "epochs": 80, "losses": [0.5, 0.25]}
    assert get_progress(conn, 6) == {}
    assert 295 <= conn.ttl("hf:progress:5") <= 300
    clear_progress(conn, 5)
    assert get_progress(conn, 5) == {}


def test_reconcile_is_enqueued_once_a_period(conn: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 6000.0
    monkeypatch.setattr(hf_queue.time, "time", lambda: now)
    assert enqueue_reconcile(conn, 60)
    now = 6059.9
    assert not enqueue_reconcile(conn, 60)
    now = 6060.0
    assert enqueue_reconcile(conn, 60)
    assert queue(CONTROL, conn).job_ids == ["reconcile-60-100", "reconcile-60-101"]
    job = Job.fetch("reconcile-60-100", connection=conn, serializer="json")
    assert (job.ttl, job.result_ttl, job.failure_ttl) == (120, 120, 120)  # nothing of it stays longer than two periods


def test_the_ticker_enqueues_reconcile_and_stops(conn: redis.Redis, redis_url: str) -> None:
    stop = threading.Event()
    thread = hf_queue.start_ticker(connect(redis_url), stop, period=60)
    eventually(lambda: queue_lengths(conn)[CONTROL] >= 1)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def test_workers_look_after_dead_jobs_every_half_minute(conn: redis.Redis) -> None:
    worker = make_worker("simple", [CONTROL, SCORE], conn)
    assert worker.dequeue_timeout == 30  # RQ's own choice is 405
    assert worker.job_class is hf_queue.SafeJob
    assert [q.name for q in worker.queues] == [CONTROL, SCORE]


@pytest.mark.parametrize(("kind", "names"), [("fast", [TRAIN]), ("train", ["elsewhere"]), ("train", [])])
def test_unknown_workers_are_refused(conn: redis.Redis, kind: str, names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"usage: python -m worker\.queue train"):
        make_worker(kind, names, conn)


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: python -m worker.queue" in capsys.readouterr().out
    assert main(["train", TRAIN]) == 2
    assert "REDIS_URL is not set" in capsys.readouterr().err


def test_every_job_function_is_one_of_worker_jobs() -> None:
    tree = ast.parse((REPOSITORY / "worker" / "jobs.py").read_text())
    defined = {f"worker.jobs.{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert defined >= JOB_FUNCTIONS
    assert {"worker.jobs.predict", "worker.jobs.reconcile"} <= JOB_FUNCTIONS


def test_how_long_a_job_runs_is_told_from_its_start(redis_url: str) -> None:
    connection = hf_queue.connect(redis_url)
    hf_queue.enqueue_step(connection, 1, 1, hf_queue.SCORE, "worker.jobs.score_shard", timeout=60)
    assert hf_queue.running_seconds(connection, 1, 1) == 0.0
    assert hf_queue.running_seconds(connection, 2, 1) == 0.0
    job = hf_queue.SafeJob.fetch("s1-a1", connection=connection, serializer=hf_queue.SERIALIZER)
    job.started_at = datetime.now(UTC) - timedelta(seconds=90)
    job.save()
    assert hf_queue.running_seconds(connection, 1, 1) == pytest.approx(90, abs=5)
