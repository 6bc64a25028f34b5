"""label-studio-ml's own server, started for real, beside ours on one store: the same answers, and the same effects."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from sqlalchemy import delete, select, update

from worker import queue, rounds, steps
from worker.artifacts import round_key
from worker.scoring import LATE_SHARD
from worker.services import Services
from worker.settings import Settings
from worker.store import events, projects, scores, task_annotations
from worker.store import rounds as round_rows
from worker.store import steps as step_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)
BRUSHES = CONFIG.replace("RectangleLabels", "BrushLabels")


def picture(colour: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


PICTURES = {1: picture((200, 10, 10)), 2: picture((10, 10, 200)), 3: picture((10, 200, 10)), 4: "/etc/passwd"}


class Stock:
    """label-studio-ml's server as a process."""

    def __init__(self, settings: Settings, port: int, **more: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HARDFIRST_")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "HARDFIRST_DATA_DIR": str(settings.data_dir),
            "HARDFIRST_DEVICE": "cpu",
            "REDIS_URL": settings.redis_url,
            "LABEL_STUDIO_URL": settings.label_studio_url,
            "LABEL_STUDIO_API_KEY": settings.api_key,
            "HARDFIRST_RECONCILE_SECONDS": "3600",
            **more,
        }
        self.url = f"http://127.0.0.1:{port}"
        self.log = settings.data_dir / "stock.log"
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "backend.stock_server", "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=settings.data_dir, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health", trust_env=False).raise_for_status()
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"label-studio-ml's server did not start: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def start_stock(a_free_port: int) -> Iterator[Callable[..., Stock]]:
    started: list[Stock] = []

    def start(settings: Settings, **more: str) -> Stock:
        started.append(Stock(settings, a_free_port, **more))
        started[-1].wait()
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def own(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    values: dict[str, Any] = {
        "redis_url": redis_url,
        "data_dir": tmp_path / "hardfirst",
        "label_studio_url": "http://127.0.0.1:9",
        "label_studio_api_key": "a-legacy-token",
        "reconcile_seconds": 3600,
        "device": "cpu",
    }
    made = Services(Settings(_env_file=None, **values), "worker")
    made.store.migrate()
    monkeypatch.setattr("worker.jobs.services", lambda: made)
    monkeypatch.setattr(steps, "start_sender", lambda *args, **kwargs: threading.Thread())
    yield made
    made.store.close()


class Pair:
    """Our server and label-studio-ml's, asked the same."""

    def __init__(self, ours: str, stock: str) -> None:
        self.ours, self.stock = (httpx.Client(base_url=url, timeout=120, trust_env=False) for url in (ours, stock))

    def post(self, path: str, body: Any) -> tuple[httpx.Response, httpx.Response]:
        return self.ours.post(path, json=body), self.stock.post(path, json=body)


@pytest.fixture
def pair(own: Services, serve: Callable[..., str], start_stock: Callable[..., Stock]) -> Pair:
    return Pair(serve(own.settings), start_stock(own.settings).url)


def publish(own: Services) -> int:
    """Round 0 of project 7 as its workers would have left it: three tasks, a descriptor, no prediction made yet."""
    with own.store.write() as connection:
        rounds.remember_tasks(connection, 7, PICTURES)
        round_id = int(connection.execute(select(round_rows.c.id)).scalar_one())
        connection.execute(update(round_rows).values(state="done", batch_size=3, model_version="al-000000"))
        connection.execute(update(step_rows).values(state="done"))
        connection.execute(update(projects).values(published_version="al-000000", published_round_id=round_id))
    note = {"strategy": "least_confidence", "options": {}, "late": {"uncertainty_scale": 2.0}, "notes": []}
    own.artifacts.put_arrays(round_key(7, 0, "selection.npz"), {}, note)
    return round_id


def setup_body(config: str = CONFIG, **extra_params: Any) -> dict[str, Any]:
    """As Label Studio 1.23.2 sends it."""
    return {
        "project": "7.1795422524",
        "schema": config,
        "hostname": "http://127.0.0.1:9",
        "access_token": "",
        "extra_params": extra_params,
    }


def predict_body(*task_ids: int, **params: Any) -> dict[str, Any]:
    tasks = [{"id": number, "project": 7, "data": {"image": PICTURES[number]}} for number in task_ids]
    return {"tasks": tasks, "project": "7.1795422524", "label_config": CONFIG, "params": params}


def ask_ours(pair: Pair, own: Services, body: Any) -> Any:
    """Our server's answer, with a worker that takes its job."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(pair.ours.post("/predict", json=body)))
    thread.start()
    while thread.is_alive():
        if queue.queue_lengths(own.redis)["predict"]:
            queue.make_worker("simple", ["predict"], own.redis).work(burst=True, logging_level="CRITICAL")
        thread.join(0.05)
    return answers[0].json()["results"]


def test_both_servers_give_the_same_answers(own: Services, pair: Pair) -> None:
    health = [client.get("/health").json()["status"] for client in (pair.ours, pair.stock)]
    assert health == ["UP", "UP"]
    ours, stock = pair.post("/setup", setup_body(batch_size=3))
    assert (ours.status_code, stock.status_code) == (200, 200)
    assert ours.json() == stock.json() == {"model_version": "hardfirst-pending"}
    with own.store.read() as connection:  # one project, one first round, whoever was asked
        assert len(connection.execute(select(round_rows)).all()) == 1
        assert connection.execute(select(projects.c.extra_params)).scalar_one() == '{"batch_size":3}'
    ours, stock = pair.post("/predict", predict_body(1, 2))
    assert ours.json()["results"] == stock.json()["results"] == [[], []]  # nothing is published: nothing to keep

    round_id = publish(own)
    ours, stock = pair.post("/setup", setup_body(batch_size=3))
    assert ours.json() == stock.json() == {"model_version": "al-000000"}
    live = pair.stock.post("/predict", json=predict_body(1, 2, 4)).json()["results"]  # by the model in its process
    assert [one["model_version"] for one in live] == ["al-000000"] * 3
    assert [one["score"] for one in live] == pytest.approx([0.75, 0.75, 1.0])
    assert pair.ours.post("/predict", json=predict_body(1, 2, 4)).json()["results"] == live  # it was kept
    with own.store.write() as connection:
        rows = connection.execute(select(scores.c.task_id, scores.c.shard, scores.c.sent)).all()
        assert sorted(tuple(row) for row in rows) == [(number, LATE_SHARD, True) for number in (1, 2, 4)]
        connection.execute(delete(scores).where(scores.c.round_id == round_id))
    assert ask_ours(pair, own, predict_body(1, 2, 4)) == live  # by our worker: the same model
    versions = pair.ours.get("/versions").json()["versions"]
    assert pair.stock.post("/versions", json={"project": "7.1"}).json()["versions"] == versions == ["al-000000"]


def test_both_servers_do_the_same_with_a_webhook(own: Services, pair: Pair) -> None:
    pair.ours.post("/setup", json=setup_body(labels_per_round=2))
    publish(own)
    one = {"id": 11, "task": 1, "result": [], "updated_at": "2026-11-23T08:00:11Z"}
    body = {"action": "ANNOTATION_CREATED", "annotation": one, "project": {"id": 7, "token": "secret"}}
    ours, stock = pair.post("/webhook", body)
    assert (ours.status_code, stock.status_code) == (200, 201)  # label-studio-ml's own
    assert ours.json() == {"status": "ok", "detail": "noted"}
    assert stock.json() == {"status": "ok", "detail": "already known"}  # the same event, in the same log
    again = {**body, "annotation": {**one, "id": 12, "task": 2}}
    assert pair.stock.post("/webhook", json=again).json()["detail"] == "noted; a round was opened"
    assert pair.ours.post("/webhook", json=again).json()["detail"] == "already known"
    with own.store.read() as connection:
        labelled = connection.execute(select(task_annotations.c.task_id)).scalars().all()
        assert sorted(labelled) == [1, 2]
        assert connection.execute(select(round_rows.c.number)).scalars().all() == [0, 1]
        assert "round opened" in connection.execute(select(events.c.kind)).scalars().all()
    assert pair.stock.get("/is_training", params={"project": "7.1"}).json() == {"is_training": True}


def test_both_servers_refuse_the_same_with_the_same_sentence(own: Services, pair: Pair) -> None:
    for path, body, status, says in (
        ("/setup", setup_body(BRUSHES), 422, "<BrushLabels> has no box"),
        ("/setup", setup_body(bach_size=3), 422, "did you mean 'batch_size'?"),
        ("/predict", {"tasks": [], "project": 999}, 404, "project 999 is not connected"),
        ("/webhook", {"action": "START_TRAINING", "project": {"id": 999}}, 404, "project 999 is not connected"),
    ):
        ours, stock = pair.post(path, body)
        assert (ours.status_code, stock.status_code) == (status, status), (path, ours.text, stock.text)
        assert says in ours.json()["detail"]
        assert stock.json()["detail"] == ours.json()["detail"]
        assert "Traceback" not in stock.text
    bad = pair.stock.post("/predict", json={"tasks": [{"id": "1"}], "project": 7})
    assert (bad.status_code, bad.json()["detail"]) == (400, "tasks.0.id: Input should be a valid integer")
    assert pair.stock.post("/train", json={"annotations": [1], "project": "7.1"}).status_code == 409


def test_the_stock_server_is_guarded_like_ours(own: Services, start_stock: Callable[..., Stock]) -> None:
    stock = start_stock(own.settings, HARDFIRST_USER="ls", HARDFIRST_PASSWORD="let-me-in")
    with httpx.Client(base_url=stock.url, timeout=60, trust_env=False) as client:
        assert client.get("/health").status_code == 200
        refused = client.post("/setup", json=setup_body())
        assert refused.status_code == 401
        assert "HARDFIRST_USER" in refused.json()["detail"]
        assert client.post("/setup", json=setup_body(), auth=("ls", "wrong")).status_code == 401
        assert client.post("/setup", json=setup_body(), auth=("ls", "let-me-in")).status_code == 200


def test_a_model_that_is_busy_is_waited_for_no_longer_than_there_is_time(own: Services) -> None:
    from backend import stock_server  # it loads torch: not when tests are collected

    with stock_server._one_at_a_time, pytest.raises(TimeoutError, match="busy with other requests"):
        stock_server._ask_here(own, 1, [(1, "/data/upload/1.jpg")], 0.01)


def test_a_real_label_studio_works_with_the_stock_server(stage: Any, start_stock: Callable[..., Stock]) -> None:
    stock = start_stock(stage.services.settings)
    project = stage.new_project(6)
    project.backend_url = stock.url
    project.connect({"weights": "yolo11n.yaml", "imgsz": 64, "batch_size": 3, "holdout_size": 2, "labels_per_round": 2})
    deadline = time.monotonic() + 120
    while stage.round(project, 0).state not in ("done", "failed") and time.monotonic() < deadline:
        stage.work()  # the first step is due two seconds after /setup
        time.sleep(0.1)
    assert stage.round(project, 0).state == "done", stage.round(project, 0).error
    (backend,) = project.api.get("/api/ml", params={"project": project.id}).json()
    assert backend["state"] == "CO"  # connected
    assert backend["model_version"] == "al-000000"
    stage.services.redis.flushall()
    (new,) = project.add_images([20])
    with stage.services.store.write() as connection:
        rounds.remember_tasks(connection, project.id, {new: project.tasks()[-1]["data"]["image"]})
    project.retrieve([new])
    (prediction,) = project.predictions()[new]
    assert prediction["model_version"] == "al-000000"
    for task_id in stage.batch(project, 0)[:2]:
        project.label(task_id)
    assert stage.annotation_count(project) == 2  # told by webhooks
