"""kill -9, of whom it may be and when: the round ends all the same, and nobody is served anything twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from worker import queue
from worker.processes import die_with_parent
from worker.settings import Settings

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
# the lease of 30 s is long for a test; one much shorter would end while a busy machine loads torch: no thread runs then
WORKER = """
import sys
from worker import steps
steps.LEASE, steps.RENEW_EVERY, steps.SETTLE = 10.0, 0.5, 1.0
from worker.queue import main
sys.exit(main(sys.argv[1:]))
"""


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return found


def environment(settings: Settings, folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "LABEL_STUDIO_URL": settings.label_studio_url,
        "LABEL_STUDIO_API_KEY": settings.api_key,
        "REDIS_URL": settings.redis_url,
        "HARDFIRST_DATA_DIR": str(settings.data_dir),
        "HARDFIRST_DEVICE": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(settings: Settings, kind: str, names: str) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        with (tmp_path / f"worker-{len(started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER, kind, names],
                env={**environment(settings, tmp_path), "HARDFIRST_RECONCILE_SECONDS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent),
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """As the out-of-memory killer does it: no goodbye. Its fork dies with it by itself."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def running(stage: Any, kind: str) -> Any:
    return next((step for step in stage.open_steps() if step.kind == kind and step.state == "running"), None)


def test_workers_killed_in_training_and_in_scoring(
    make_stage: Callable[..., Any], line: Any, start_worker: Callable[..., subprocess.Popen[bytes]]
) -> None:
    stage = make_stage(label_studio_url=line.url)
    settings = stage.services.settings
    project = stage.connected(8, labels_per_round=3, epochs=25)
    holdout = stage.holdout(project)
    for task_id in [task_id for task_id in stage.batch(project, 0) if task_id not in holdout][:3]:
        project.label(task_id)

    def epochs_done() -> int:
        return int(queue.get_progress(stage.services.redis, project.id).get("epoch") or 0)

    victim = start_worker(settings, "train", "train")
    until(lambda: epochs_done() >= 2, 180, "the training runs")
    kill_all(victim)
    (step,) = stage.open_steps()
    assert (step.kind, step.state, step.attempt) == ("train", "running", 1)
    assert project.remote()["model_version"] == "al-000000"

    start_worker(settings, "train", "train")
    sweeper = start_worker(settings, "simple", "control")
    until(lambda: any(step.kind == "score" for step in stage.open_steps()), 240, "the training ends")
    report = stage.round(project, 1)
    assert report.state == "scoring", report.error
    assert report.labels == 3

    line.hold()  # the images do not come: the shard is in the middle of it
    victim = start_worker(settings, "simple", "score")
    until(lambda: running(stage, "score"), 120, "the shard is claimed")
    time.sleep(0.5)
    kill_all(victim)
    line.let_go()
    start_worker(settings, "simple", "score")
    until(lambda: stage.round(project, 1).state not in ("scoring", "publishing"), 180, "the round ends")
    assert stage.round(project, 1).state == "done", stage.round(project, 1).error
    assert sweeper.poll() is None
    remote = until(lambda: (got := project.remote())["model_version"] == "al-000001" and got, 60, "it is served")
    assert remote["sampling"] == "Uncertainty sampling"
    unlabelled = [task for task in project.tasks() if not task["total_annotations"]]
    versions = [[found["model_version"] for found in task["predictions"]].count("al-000001") for task in unlabelled]
    assert versions == [1] * 5
    with stage.services.store.read() as connection:
        found = connection.exec_driver_sql(
            "select kind, state, attempt, failures from steps where round_id = (select max(id) from rounds) order by id"
        ).fetchall()
    by_kind = {row[0]: tuple(row[1:]) for row in found}
    assert by_kind["train"] == ("done", 2, 1)  # a death counts, in case the step is what kills
    assert by_kind["score"] == ("done", 2, 1)
    assert by_kind["publish"] == ("done", 1, 0)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[[Settings], subprocess.Popen[bytes]]]:
    """`hardfirst up`, ready."""
    started: list[subprocess.Popen[bytes]] = []

    def start(settings: Settings) -> subprocess.Popen[bytes]:
        env = {name: value for name, value in environment(settings, tmp_path).items() if name != "REDIS_URL"}
        env["HARDFIRST_RECONCILE_SECONDS"] = "1"
        parent = os.getpid()
        log_path = tmp_path / "up.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "backend.cli", "up", "--port", str(settings.port)],
                env=env,
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent),
            )
        started.append(process)
        until(lambda: _healthy(settings.port, process, log_path), 120, "hardfirst up answers")
        return process

    yield start
    for process in started:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


def _healthy(port: int, process: subprocess.Popen[bytes], log_path: Path) -> bool:
    assert process.poll() is None, log_path.read_text(errors="replace")[-2000:]
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    return False


def test_valkey_killed_in_the_middle_of_a_round_of_hardfirst_up(
    stage_on: Callable[[Settings], Any],
    label_studio: Any,
    up: Callable[[Settings], subprocess.Popen[bytes]],
    tmp_path: Path,
    a_free_port: int,
) -> None:
    values: dict[str, Any] = {
        "label_studio_url": label_studio.url,
        "label_studio_api_key": label_studio.token,
        "data_dir": tmp_path / "hardfirst",
        "port": a_free_port,
        "device": "cpu",
    }
    settings = Settings(_env_file=None, **values)
    process = up(settings)
    stage = stage_on(settings)
    project = stage.new_project(8)
    small = {"weights": "yolo11n.yaml", "epochs": 20, "imgsz": 64, "batch_size": 4, "holdout_size": 2}
    project.connect({**small, "labels_per_round": 3})
    until(lambda: stage.rounds(project) and stage.round(project, 0).state == "done", 240, "the first batch is there")
    holdout = stage.holdout(project)
    for task_id in [task_id for task_id in stage.batch(project, 0) if task_id not in holdout][:3]:
        project.label(task_id)
    until(lambda: running(stage, "train"), 120, "the training begins")
    children = {child.pid: child for child in psutil.Process(process.pid).children()}
    (valkey,) = [child for child in children.values() if "valkey" in child.name() or "redis" in child.name()]
    valkey.kill()
    until(lambda: stage.round(project, 1).state not in ("training", "scoring", "publishing"), 240, "the round ends")
    assert stage.round(project, 1).state == "done", stage.round(project, 1).error
    assert stage.round(project, 1).labels == 3
    until(lambda: project.remote()["model_version"] == "al-000001", 60, "it is served")

    def alive() -> set[int]:
        return {child.pid for child in psutil.Process(process.pid).children()}

    # it was started again, and nobody else is missing: who ended without it is there again by now
    until(lambda: len(alive()) == len(children), 60, "all are there")
    assert valkey.pid not in alive()
    assert httpx.get(f"http://127.0.0.1:{settings.port}/health", timeout=60, trust_env=False).status_code == 200
