"""A stage for the loop: the real Label Studio, the real backend on a port, a real Valkey, SQLite, images drawn small.

The worker is RQ's own, in this process and in bursts: a test says when work is done, so that it can look in between.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import func, or_, select, update

from backend import admin
from backend.app import create_app
from demo import factory
from demo.label_studio_server import LabelStudioServer, create_annotator
from worker import attaching, queue, rounds, steps
from worker.artifacts import round_key
from worker.label_studio import LabelStudio
from worker.services import Services
from worker.settings import Settings
from worker.store import events as event_rows
from worker.store import latest_round, scores, task_annotations, tasks
from worker.store import projects as project_rows
from worker.store import rounds as round_rows
from worker.store import steps as step_rows

LABEL_CONFIG = (Path(__file__).resolve().parents[2] / "label_config.xml").read_text()
# trains from nothing in two seconds; what it learns is worth nothing, and no test here asks for more
SMALL: dict[str, Any] = {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 2}
WORLD = factory.Recipe(burst_share=0.0, empty_share=0.0)
SIZE = (96, 96)
ANNOTATOR_PASSWORD = "annotator-password"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def draw(index: int) -> tuple[bytes, factory.Scene]:
    """Image `index` of the tests' world as a JPEG, and what is on it."""
    image, scene = factory.render(3, index, SIZE, WORLD)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), scene


def regions_of(scene: factory.Scene, only: str | None = None) -> list[dict[str, Any]]:
    """The true boxes as an annotator draws them; with `only`, all under that label."""
    width, height = scene.size
    return [
        {
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "x": 100 * left / width,
                "y": 100 * top / height,
                "width": 100 * (right - left) / width,
                "height": 100 * (bottom - top) / height,
                "rotation": 0,
                "rectanglelabels": [only or factory.CLASSES[class_id]],
            },
        }
        for (left, top, right, bottom), class_id in zip(scene.boxes_xyxy, scene.class_ids, strict=True)
    ]


def ok(answer: httpx.Response) -> Any:
    assert answer.status_code < 400, f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
    return answer.json() if answer.content else None


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
    return found


@dataclass
class LabelProject:
    """One project on the real Label Studio, and what its people do there."""

    api: httpx.Client
    id: int
    backend_url: str
    ml_id: int = 0

    def add_images(self, indexes: Sequence[int]) -> list[int]:
        """Upload the drawn images; their task ids, in the order of `indexes`."""
        known = set(self.task_ids())
        # every file under a field of its own: of several under one, Label Studio keeps the last
        files = {f"f{index}": (f"scene-{index:03d}.jpg", draw(index)[0], "image/jpeg") for index in indexes}
        ok(self.api.post(f"/api/projects/{self.id}/import", files=files))
        by_index = {index: task_id for task_id, index in self.indexes().items() if task_id not in known}
        return [by_index[index] for index in indexes]

    def import_tasks(self, new: Sequence[dict[str, Any]]) -> list[int]:
        """Tasks as JSON; their ids, in order."""
        known = set(self.task_ids())
        ok(self.api.post(f"/api/projects/{self.id}/import", json=list(new)))
        return sorted(set(self.task_ids()) - known)

    def tasks(self) -> list[dict[str, Any]]:
        answer = self.api.get("/api/tasks", params={"project": self.id, "fields": "all", "page_size": 500})
        return list(ok(answer)["tasks"])

    def task_ids(self) -> list[int]:
        return sorted(int(task["id"]) for task in self.tasks())

    def indexes(self) -> dict[int, int]:
        """Task id -> index of the image drawn for it."""
        found = {}
        for task in self.tasks():
            name = str(task["data"].get("image", "")).rpartition("scene-")[2]
            if name[:3].isdigit():
                found[int(task["id"])] = int(name[:3])
        return found

    def uploaded(self, content: bytes, name: str) -> str:
        """The address of a file put on Label Studio without a task."""
        answer = self.api.post(
            f"/api/projects/{self.id}/import",
            params={"commit_to_project": "false"},
            files={"f": (name, content, "image/jpeg")},
        )
        file_id = ok(answer)["file_upload_ids"][0]
        return "/data/" + ok(self.api.get(f"/api/import/file-upload/{file_id}"))["file"].lstrip("/")

    def label(self, task_id: int, regions: Sequence[dict[str, Any]] | None = None, **fields: Any) -> int:
        """Annotate a task, with the true boxes unless told; the annotation's id."""
        if regions is None:
            regions = regions_of(draw(self.indexes()[task_id])[1])
        body = {"result": list(regions), "lead_time": 6.0, **fields}
        return int(ok(self.api.post(f"/api/tasks/{task_id}/annotations/", json=body))["id"])

    def predictions(self) -> dict[int, list[dict[str, Any]]]:
        return {int(task["id"]): list(task["predictions"]) for task in self.tasks()}

    def true_regions(self, task_id: int) -> list[dict[str, Any]]:
        """The true boxes of a drawn image, as rectangles."""
        return regions_of(draw(self.indexes()[task_id])[1])

    def retrieve(self, task_ids: Sequence[int]) -> None:
        """The Data Manager's "Retrieve predictions" for some tasks: one /predict."""
        params = {"id": "retrieve_tasks_predictions", "project": self.id}
        body = {"selectedItems": {"all": False, "included": list(task_ids)}, "ordering": []}
        ok(self.api.post("/api/dm/actions", params=params, json=body, timeout=110))

    def remote(self) -> dict[str, Any]:
        return dict(ok(self.api.get(f"/api/projects/{self.id}/")))

    def webhooks(self) -> list[dict[str, Any]]:
        return list(ok(self.api.get("/api/webhooks/", params={"project": self.id})))

    def connect(self, extra_params: dict[str, Any], **fields: Any) -> None:
        """As Settings -> Model -> Connect Model does."""
        body = {
            "url": self.backend_url,
            "project": self.id,
            "title": "hardfirst",
            "extra_params": extra_params,
            **fields,
        }
        self.ml_id = int(ok(self.api.post("/api/ml", json=body))["id"])

    def change_settings(self, extra_params: dict[str, Any]) -> None:
        """The dialogue behind Settings -> Model -> Edit, and somebody looking at the page afterwards."""
        body = {"url": self.backend_url, "project": self.id, "extra_params": extra_params}
        ok(self.api.patch(f"/api/ml/{self.ml_id}", json=body))
        ok(self.api.get("/api/ml", params={"project": self.id}))


@dataclass
class Stage:
    """hardfirst in one folder: its backend answers, its work is done when `work` is called."""

    label_studio: LabelStudioServer
    services: Services
    backend_url: str
    made: list[LabelProject] = field(default_factory=list)

    @property
    def api(self) -> httpx.Client:
        headers = {"Authorization": f"Token {self.label_studio.token}"}
        return httpx.Client(base_url=self.label_studio.url, headers=headers, timeout=60, trust_env=False)

    def new_project(self, n_images: int = 0, label_config: str = LABEL_CONFIG) -> LabelProject:
        api = self.api
        made = ok(api.post("/api/projects/", json={"title": "integration", "label_config": label_config}))
        project = LabelProject(api, int(made["id"]), self.backend_url)
        if n_images:
            project.add_images(range(n_images))
        self.made.append(project)
        return project

    def connected(self, n_images: int = 10, **settings: Any) -> LabelProject:
        """A project whose first batch is published."""
        project = self.new_project(n_images)
        project.connect({**SMALL, **settings})
        self.work()
        assert self.round(project, 0).state == "done", self.round(project, 0)
        return project

    def work(self, only: Sequence[str] = queue.QUEUES, jobs: int | None = None) -> None:
        """Do what is due, and what follows from it, until nothing is due; with `jobs`, that many jobs."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while True:
                steps.send_waiting(self.services.store, self.services.redis)
                lengths = queue.queue_lengths(self.services.redis)
                if not sum(lengths[name] for name in only):
                    return
                worker = queue.make_worker("simple", only, self.services.redis)
                worker.work(burst=True, logging_level="CRITICAL", max_jobs=jobs, with_scheduler=False)
                if jobs is not None:
                    return
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def work_until(self, kind: str) -> None:
        """Do what comes before the step of that kind; it is due next."""
        kinds = [row.kind for row in self.open_steps()]
        while kinds and kind not in kinds:
            self.work(jobs=1)
            kinds = [row.kind for row in self.open_steps()]
        assert kind in kinds, f"there is no {kind} to come, only {kinds}"

    def make_due(self) -> None:
        """What waits for its time need not wait any longer."""
        with self.services.store.write() as connection:
            connection.execute(update(step_rows).values(not_before=None))

    def reconcile(self) -> None:
        """The job of every minute, now; the work it finds is left to `work`."""
        name = f"reconcile-{time.monotonic_ns()}"
        queue.enqueue_unique(self.services.redis, queue.CONTROL, "worker.jobs.reconcile", (), name, timeout=60)
        self.work(only=[queue.CONTROL], jobs=1)

    def ask(self, *asked: tuple[LabelProject, Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        """What /predict answers for each project's tasks, asked at once, with a worker that takes the jobs."""
        answers: dict[int, httpx.Response] = {}

        def post(number: int, project: LabelProject, new: Sequence[dict[str, Any]]) -> None:
            body = {"tasks": list(new), "project": f"{project.id}.123"}
            answers[number] = httpx.post(f"{self.backend_url}/predict", json=body, timeout=60, trust_env=False)

        threads = [threading.Thread(target=post, args=(number, *one)) for number, one in enumerate(asked)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if queue.queue_lengths(self.services.redis)["predict"]:
                self.work(only=["predict"])
            time.sleep(0.05)
        assert [answers[number].status_code for number in range(len(asked))] == [200] * len(asked), answers
        return [list(answers[number].json()["results"]) for number in range(len(asked))]

    def open_steps(self) -> list[Any]:
        with self.services.store.read() as connection:
            query = select(step_rows).where(step_rows.c.state.in_(("waiting", "sent", "running")))
            return list(connection.execute(query.order_by(step_rows.c.id)).all())

    def rounds(self, project: LabelProject) -> list[Any]:
        with self.services.store.read() as connection:
            query = select(round_rows).where(round_rows.c.project_id == project.id).order_by(round_rows.c.number)
            return list(connection.execute(query).all())

    def round(self, project: LabelProject, number: int) -> Any:
        return next(row for row in self.rounds(project) if row.number == number)

    def last_round(self, project: LabelProject) -> Any:
        with self.services.store.read() as connection:
            return latest_round(connection, project.id)

    def row(self, project: LabelProject) -> Any:
        with self.services.store.read() as connection:
            return connection.execute(select(project_rows).where(project_rows.c.id == project.id)).one()

    def task_rows(self, project: LabelProject) -> dict[int, Any]:
        with self.services.store.read() as connection:
            found = connection.execute(select(tasks).where(tasks.c.project_id == project.id))
            return {int(row.task_id): row for row in found}

    def holdout(self, project: LabelProject) -> set[int]:
        return {task_id for task_id, row in self.task_rows(project).items() if row.holdout is True}

    def scores_of(self, round_row: Any) -> dict[int, Any]:
        with self.services.store.read() as connection:
            found = connection.execute(select(scores).where(scores.c.round_id == round_row.id))
            return {int(row.task_id): row for row in found}

    def events(self, project: LabelProject, kind: str | None = None) -> list[Any]:
        with self.services.store.read() as connection:
            query = select(event_rows).where(event_rows.c.project_id == project.id)
            query = query.where(or_(kind is None, event_rows.c.kind == kind))
            return list(connection.execute(query.order_by(event_rows.c.id)).all())

    def annotation_count(self, project: LabelProject) -> int:
        with self.services.store.read() as connection:
            query = select(func.count()).select_from(task_annotations)
            return int(connection.execute(query.where(task_annotations.c.project_id == project.id)).scalar_one())

    def batch(self, project: LabelProject, number: int) -> list[int]:
        """Task ids in the published order, as the round's manifest says."""
        manifest = json.loads(self.services.artifacts.get(round_key(project.id, number, "manifest.json")))
        return [int(task["task_id"]) for task in manifest["tasks"]]

    def await_token(self) -> None:
        """The backend tries the one that came with /setup after it has answered."""
        eventually(lambda: self.services.label_studio.token() is not None, 60, "a token is kept")

    def webhook(self, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
        return httpx.post(f"{self.backend_url}/webhook", json=body, timeout=60, trust_env=False, **kwargs)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serves the backend with these services' settings, on a free port or the one given; its URL. Stops them all."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(settings: Settings, port: int = 0) -> str:
        port = port or free_port()
        server = uvicorn.Server(
            uvicorn.Config(create_app(settings), "127.0.0.1", port, log_level="warning", lifespan="on")
        )
        thread = threading.Thread(target=server.run, daemon=True, name=f"backend-{port}")
        thread.start()
        running.append((server, thread))
        eventually(lambda: server.started, 60, "the backend starts")
        return f"http://127.0.0.1:{port}"

    start.stop = lambda: _stop_servers(running)  # type: ignore[attr-defined]
    yield start
    _stop_servers(running)


def _stop_servers(running: list[tuple[uvicorn.Server, threading.Thread]]) -> None:
    while running:
        server, thread = running.pop()
        server.should_exit = True
        thread.join(10)


def _patiently(send: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
    """LabelStudio._send with two minutes for every answer."""

    def patient(
        self: LabelStudio, method: str, path: str, headers: Any, timeout: float = 0.0, **kwargs: Any
    ) -> httpx.Response:
        return send(self, method, path, headers, max(timeout, 120.0), **kwargs)

    return patient


@pytest.fixture
def make_stage(
    label_studio: LabelStudioServer,
    redis_url: str,
    tmp_path: Path,
    serve: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Stage]]:
    """A stage with these settings changed; one in each test."""
    monkeypatch.setattr(rounds, "ATTACH_DELAY", 0.0)  # Label Studio has answered by the time `work` is called
    monkeypatch.setattr(attaching, "IMPORT_PAUSE", 0.1)  # no test's import is still running then
    # on a busy machine Label Studio is slow, and not away: a step would wait for it, and no test waits for the step
    monkeypatch.setattr(LabelStudio, "_send", _patiently(LabelStudio._send))
    monkeypatch.setattr(admin, "LOOK_PATIENCE", 60.0)
    made: list[Services] = []

    def make(**changed: Any) -> Stage:
        values = {
            "label_studio_url": label_studio.url,
            "label_studio_api_key": label_studio.token,
            "redis_url": redis_url,
            "data_dir": tmp_path / "hardfirst",
            "device": "cpu",
            "reconcile_seconds": 3600,  # a test that wants it says so
            **changed,
        }
        settings = Settings(_env_file=None, **values)
        # one worker's connections, in this process; jobs look them up through this door
        services = Services(settings, "worker")
        services.store.migrate()
        made.append(services)
        monkeypatch.setattr("worker.jobs.services", lambda: services)
        # the backend's own sender would send a step before the test has looked, its ticker a reconcile
        monkeypatch.setattr(steps, "start_sender", lambda *args, **kwargs: threading.Thread())
        monkeypatch.setattr(queue, "start_ticker", lambda *args, **kwargs: threading.Thread())
        url = serve(settings)
        return Stage(label_studio, services, url)

    yield make
    for services in made:
        services.close()


@pytest.fixture
def stage(make_stage: Callable[..., Stage]) -> Stage:
    return make_stage()


@pytest.fixture
def stage_on(label_studio: LabelStudioServer) -> Iterator[Callable[[Settings], Stage]]:
    """A look at a hardfirst that runs elsewhere with these settings."""
    made: list[Services] = []

    def make(settings: Settings) -> Stage:
        made.append(Services(settings, "worker"))
        return Stage(label_studio, made[-1], f"http://127.0.0.1:{settings.port}")

    yield make
    for services in made:
        services.close()


@pytest.fixture
def a_free_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def second_token(label_studio: LabelStudioServer) -> str:
    """A second annotator's token."""
    email = f"second-{os.getpid()}@example.com"
    return create_annotator(label_studio.url, label_studio.token, email, ANNOTATOR_PASSWORD)


class Line:
    """A TCP relay on loopback that can be cut and mended."""

    def __init__(self, upstream_port: int) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._upstream = ("127.0.0.1", upstream_port)
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        self.mend()

    def hold(self) -> None:
        """Connections are taken, and nothing comes through until `let_go`."""
        self._flows.clear()

    def let_go(self) -> None:
        self._flows.set()

    def mend(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in list(self._open):
            with contextlib.suppress(OSError):  # its other side was first
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it; close() would not

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return  # it was cut
            threading.Thread(target=self._relay, args=(near,), daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        # a selector, not select(): that takes no descriptor above 1023, and a long run of tests has them
        with near, socket.create_connection(self._upstream) as far, selectors.DefaultSelector() as selector:
            self._open |= {near, far}
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            try:
                while self._pass_on(selector.select()):
                    pass
            except OSError:
                return  # cut, or one side went away
            finally:
                self._open -= {near, far}

    def _pass_on(self, ready: list[tuple[selectors.SelectorKey, int]]) -> bool:
        """Bring what has come to the other side; whether both are still there."""
        self._flows.wait()
        for key, _ in ready:
            end: Any = key.fileobj
            content = end.recv(65536)
            if not content:
                return False
            key.data.sendall(content)
        return True


@pytest.fixture
def line(label_studio: LabelStudioServer) -> Iterator[Line]:
    made = Line(label_studio.port)
    yield made
    made.cut()
