"""How long Label Studio waits for one live prediction, beside a bare `model.predict`, and while the machine is busy.

Every request asks for a task without a stored prediction, so it goes all the way: HTTP, the backend under uvicorn, the
queue in Valkey, the predict worker, the image over HTTP from where Label Studio would serve it, one forward pass, the
row in the store, and back. With `--size 10000` it is "Retrieve predictions" for so many tasks in one request instead, a
tenth of them not scored yet and then none of them: seconds until the answer (Label Studio gives 100), how many it
brings, what the backend's process computes for it, and what /health takes meanwhile. Nobody is there to score the rest.

Bare is `YOLO.predict` on the same image as a file, in this process, with the model warm, and takes turns with the
requests. Busy is a worker scoring a pool of another round, and `worker.training.train` at work in a process of its own.
The network is yolo11n for two classes with random weights: it draws no boxes, here or there.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from sqlalchemy import delete, insert, select, update

from benchmarks._serving import processor_seconds
from demo import factory
from demo.oracle import label_config
from worker import crew, queue, rounds, steps
from worker.artifacts import Artifacts, round_key
from worker.detector import prepare_ultralytics
from worker.processes import die_with_parent, running_valkey, stop_process
from worker.settings import ProjectSettings
from worker.store import Store, get_project, insert_or_ignore, projects, scores
from worker.store import rounds as round_rows
from worker.store import steps as step_rows

ROOT = Path(__file__).resolve().parent.parent
PROJECT, IMGSZ, SIZE = 1, 640, (640, 480)
CLASSES = ["bolt", "nut"]
FILES = 8  # different images; tasks show them in turn
POOL, SHARD = 6_000, 256  # tasks of the round that is scored: more than are scored while we measure
SPARE = 1_000  # tasks after them, for the requests
TRAINING_IMAGES = 60
PAUSE = 0.2  # seconds an annotator needs between two tasks, at the least


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.predict", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 turns on the idle machine and 8 on the busy one")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--size", type=int, help="tasks in one request, instead of one after the other")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # the process that trains
    given = parser.parse_args(arguments)
    if given.train is not None:
        _train(given.train)
        return
    if given.size is not None:
        _at_size(given.size, given.json)
        return
    idle_turns, busy_turns = (10, 8) if given.quick else (40, 40)
    with _stage() as stage:
        warm, bare = _in_turns(stage, idle_turns)
        with _busy(stage):
            busy = [_request(stage, pause=PAUSE) for _ in range(busy_turns)]
    found = {
        "warm_ratio": round(statistics.median(warm) / statistics.median(bare), 2),
        "warm_ms": _median(warm),
        "warm_p95_ms": _p95(warm),
        "bare_ms": _median(bare),
        "busy_ms": _median(busy),
        "busy_p95_ms": _p95(busy),
    }
    print(f"imgsz {IMGSZ}, an image of {SIZE[0]}x{SIZE[1]}; milliseconds, median and p95")
    print(f"bare model.predict        {found['bare_ms']:8.1f}")
    print(
        f"/predict, live            {found['warm_ms']:8.1f}{found['warm_p95_ms']:8.1f}   {found['warm_ratio']} x bare"
    )
    print(f"/predict, machine busy    {found['busy_ms']:8.1f}{found['busy_p95_ms']:8.1f}")
    if given.json:
        print(json.dumps(found))


def _at_size(size: int, as_json: bool) -> None:
    """One request for `size` tasks: all stored, nine tenths, and none of them."""
    found = {}
    with _stage(spare=size + 1) as stage:
        _warm_up(stage, POOL + size)
        print(f"{size:,} tasks in one request   seconds  computed  answered  MB answered  /health, slowest ms")
        with _watching_health(stage) as without:
            time.sleep(5)
        print(f"{'(no request)':27}{max(without):64.0f}")
        for name, share in (("all stored", 1.0), ("nine tenths", 0.9), ("none", 0.0)):
            stored = _store_predictions(stage, int(share * size), size)
            found[name] = row = _one_request(stage, size)
            if row["answered"] < stored:
                raise RuntimeError(f"{stored} predictions are stored, and {row['answered']} were answered")
            print(
                f"{name:27}{row['seconds']:10.1f}{row['computed']:10.1f}{row['answered']:10,}{row['answer_mb']:13.1f}"
                f"{row['health_ms']:21.0f}"
            )
    if as_json:
        print(json.dumps(found))


def _warm_up(stage: Stage, task_id: int) -> None:
    """Until the worker has its model, which takes minutes where others compute."""
    deadline = time.monotonic() + 600
    while not stage.client.post("/predict", json={"project": PROJECT, "tasks": [_task(task_id)]}).json()["results"][0]:
        if time.monotonic() > deadline:
            raise TimeoutError("no prediction within 600 s")


def _store_predictions(stage: Stage, count: int, size: int) -> int:
    """Predictions of five boxes each for the first `count` of the tasks that are asked for, and for no others."""
    box = {"x": 10.5, "y": 20.25, "width": 30.125, "height": 12.5, "rotation": 0, "rectanglelabels": ["bolt"]}
    region = {"id": "0123456789ab", "type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": box}
    region |= {"original_width": SIZE[0], "original_height": SIZE[1], "image_rotation": 0, "score": 0.87}
    row = {"shard": 0, "regions": json.dumps([region] * 5), "published_score": 0.5, "sent": True}
    with stage.store.write() as connection:
        published = connection.execute(select(projects.c.published_round_id)).scalar_one()
        connection.execute(delete(scores).where(scores.c.round_id == published))
        tasks = range(POOL, POOL + min(count, size))
        insert_or_ignore(connection, scores, [{**row, "round_id": published, "task_id": number} for number in tasks])
    return len(tasks)


def _one_request(stage: Stage, size: int) -> dict[str, float]:
    tasks = [_task(number) for number in range(POOL, POOL + size)]
    body = json.dumps({"project": f"{PROJECT}.1", "tasks": tasks, "label_config": label_config(CLASSES)}).encode()
    with _watching_health(stage) as slowest:
        began, computed = time.perf_counter(), processor_seconds(stage.web_pid)
        answer = stage.client.post("/predict", content=body, headers={"Content-Type": "application/json"})
        seconds = time.perf_counter() - began
        computed = processor_seconds(stage.web_pid) - computed
    results = answer.raise_for_status().json()["results"]
    if len(results) != size:
        raise RuntimeError(f"{len(results)} results for {size} tasks: Label Studio would drop them all")
    answered = [one for one in results if one]
    if any(one["model_version"] != "al-000000" for one in answered):
        raise RuntimeError("an answer is not of the published version")
    megabytes = {"sent_mb": len(body) / 1e6, "answer_mb": len(answer.content) / 1e6}
    times = {"seconds": round(seconds, 2), "computed": round(computed, 2), "health_ms": round(max(slowest), 1)}
    return {**times, "answered": len(answered), **megabytes}


@contextmanager
def _watching_health(stage: Stage) -> Iterator[list[float]]:
    """Milliseconds of /health, asked ten times a second: Label Studio gives it one second."""
    took: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not took or not stop.wait(0.1):  # once at least: what is stored is answered within a tenth of a second
            began = time.perf_counter()
            httpx.get(f"{stage.client.base_url}/health", timeout=30, trust_env=False).raise_for_status()
            took.append(1000 * (time.perf_counter() - began))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


@dataclass
class Stage:
    """The project, its servers, and the tasks nobody has asked for yet."""

    folder: Path
    environment: Mapping[str, str]
    store: Store
    weights: Path
    client: httpx.Client
    web_pid: int
    task_ids: Iterator[int]


@contextmanager
def _stage(spare: int = SPARE) -> Iterator[Stage]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare_ultralytics(folder / "ultralytics")
        images = _draw_images(folder / "images")
        image_url = stack.enter_context(_image_server(images))
        redis_url = stack.enter_context(running_valkey(folder / "valkey"))
        store = Store(f"sqlite:///{folder}/hardfirst.db")
        stack.callback(store.close)
        weights = _fill(folder, store, spare)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HARDFIRST_DATA_DIR": str(folder),
            "HARDFIRST_DEVICE": "cpu",
            "HARDFIRST_RECONCILE_SECONDS": "3600",
            "REDIS_URL": redis_url,
            "LABEL_STUDIO_URL": image_url,
            "LABEL_STUDIO_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        }
        port = _free_port()
        web = ["-m", "uvicorn", "--factory", "backend.app:create_app_from_env", "--port", str(port)]
        serving = stack.enter_context(_process(folder, environment, "web", [*web, "--log-level", "warning"]))
        stack.enter_context(_process(folder, environment, "predict", ["-m", "worker.queue", "simple", "predict"]))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False))
        _wait_for_backend(client)
        _wait_for_worker(redis_url)
        yield Stage(folder, environment, store, weights, client, serving.pid, iter(range(POOL, POOL + spare)))


def _draw_images(folder: Path) -> Path:
    folder.mkdir()
    for index in range(FILES):
        factory.render(5, index, SIZE)[0].save(folder / f"{index}.jpg", quality=90)
    return folder


@contextmanager
def _image_server(images: Path) -> Iterator[str]:
    """Stands in for Label Studio's /data/upload/1/<task>.jpg; everything else is 404."""
    contents = [path.read_bytes() for path in sorted(images.iterdir())]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.removeprefix(f"/data/upload/{PROJECT}/").removesuffix(".jpg")
            content = contents[int(name) % FILES] if name.isdigit() else b""
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Nothing: thousands of lines."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _fill(folder: Path, store: Store, spare: int) -> Path:
    """A connected project whose round 0 is published and whose round 1 is about to score; the weights of both."""
    store.migrate()
    weights = _random_weights(folder / "random.pt")
    artifacts = Artifacts(str(folder / "artifacts"), folder / "cache")
    key = round_key(PROJECT, 0, "weights.pt")
    trained = {"weights": key, "weights_sha256": artifacts.put(key, weights.read_bytes())}
    note = {
        "strategy": "hybrid",
        "options": {},
        "late": {"uncertainty_scale": 1.0, "distance_low": 0.0, "distance_high": 1.5},
    }
    centroids = np.random.default_rng(0).random((50, 256), dtype=np.float32)
    artifacts.put_arrays(round_key(PROJECT, 0, "selection.npz"), {"centroids": centroids}, note)
    settings = ProjectSettings(imgsz=IMGSZ)
    with store.write() as connection:
        rounds.connect_project(connection, PROJECT, label_config(CLASSES), settings, "http://127.0.0.1")
        images = {number: f"/data/upload/{PROJECT}/{number}.jpg" for number in range(POOL + spare)}
        rounds.remember_tasks(connection, PROJECT, images)
        done = {"state": "done", "batch_size": 200, "model_version": "al-000000", "closed_at": time.time()}
        connection.execute(update(round_rows).values(**done, **trained))
        connection.execute(step_rows.delete())  # nothing is left to do for round 0
        first = connection.execute(select(round_rows.c.id)).scalar_one()
        connection.execute(update(projects).values(published_version="al-000000", published_round_id=first))
    return weights


def _random_weights(path: Path) -> Path:
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    yolo = YOLO("yolo11n.yaml")
    yolo.model = DetectionModel("yolo11n.yaml", nc=len(CLASSES), verbose=False)
    yolo.model.names = dict(enumerate(CLASSES))
    yolo.save(str(path))
    return path


@contextmanager
def _process(
    folder: Path, environment: Mapping[str, str], name: str, arguments: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    parent = os.getpid()
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: die_with_parent(9, parent),
        )
    try:
        yield process
    finally:
        stop_process(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_backend(client: httpx.Client) -> None:
    for _ in range(600):
        try:
            client.get("/health").raise_for_status()
            return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise TimeoutError("the backend did not start within 60 s")


def _wait_for_worker(redis_url: str) -> None:
    redis = queue.connect(redis_url)
    try:
        for _ in range(1200):
            if crew.workers(redis):
                return
            time.sleep(0.1)
    finally:
        redis.close()
    raise TimeoutError("the predict worker did not start within 120 s")


def _in_turns(stage: Stage, turns: int) -> tuple[list[float], list[float]]:
    """Milliseconds of requests and of bare predictions of the same images, after three of each that nobody counts."""
    from ultralytics import YOLO

    yolo = YOLO(str(stage.weights))
    warm, bare = [], []
    for _ in range(turns + 3):
        task_id = next(stage.task_ids)
        warm.append(_request_for(stage, task_id))
        path = stage.folder / "images" / f"{task_id % FILES}.jpg"
        began = time.perf_counter()
        yolo.predict(str(path), imgsz=IMGSZ, conf=0.25, verbose=False)
        bare.append(1000 * (time.perf_counter() - began))
    return warm[3:], bare[3:]


def _request(stage: Stage, pause: float) -> float:
    time.sleep(pause)
    return _request_for(stage, next(stage.task_ids))


def _task(task_id: int) -> dict[str, Any]:
    return {"id": task_id, "project": PROJECT, "data": {"image": f"/data/upload/{PROJECT}/{task_id}.jpg"}}


def _request_for(stage: Stage, task_id: int) -> float:
    """Milliseconds until the answer; RuntimeError when it was not a live one."""
    body = {"project": f"{PROJECT}.1", "tasks": [_task(task_id)]}
    began = time.perf_counter()
    answer = stage.client.post("/predict", json=body)
    took = 1000 * (time.perf_counter() - began)
    (result,) = answer.raise_for_status().json()["results"]
    if not result or result["model_version"] != "al-000000" or not 0.5 <= result["score"] < 1:
        logs = "".join((stage.folder / f"{name}.log").read_text()[-800:] for name in ("web", "predict"))
        raise RuntimeError(f"task {task_id} was answered with {result}, not with a live prediction; {logs}")
    return took


@contextmanager
def _busy(stage: Stage) -> Iterator[None]:
    """A round being scored and a training, both at work when this yields, and still when it ends."""
    data = factory.write_dataset(stage.folder / "training", TRAINING_IMAGES, seed=5, size=SIZE)
    (data.parent / "train.txt").write_text("".join(f"./images/{path.name}\n" for path in _images_of(data.parent)))
    with ExitStack() as stack:
        training = ["-m", "benchmarks.predict", "--train", str(data)]
        process = stack.enter_context(_process(stage.folder, stage.environment, "train", training))
        _until(lambda: "epoch" in (stage.folder / "train.log").read_text(), 240, "the training begins", process)
        _open_scoring(stage)
        scorer = stack.enter_context(
            _process(stage.folder, stage.environment, "score", ["-m", "worker.queue", "simple", "control,score"])
        )
        _until(lambda: _scored(stage) > 0, 240, "the scoring begins", scorer)
        yield
        if process.poll() is not None or not 0 < _scored(stage) < POOL:
            raise RuntimeError("the training or the scoring ended before the measurement: these figures mean nothing")


def _images_of(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


def _until(condition: Any, seconds: float, what: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what} (exit code {process.poll()})")
        time.sleep(0.1)


def _open_scoring(stage: Stage) -> None:
    """Round 1 in the state in which its shards are scored, with the weights of round 0."""
    with stage.store.write() as connection:
        published = connection.execute(select(round_rows)).one()
        row = {
            "project_id": PROJECT,
            "number": 1,
            "state": "scoring",
            "opened_at": time.time(),
            "settings": get_project(connection, PROJECT).extra_params,
            "weights": published.weights,
            "weights_sha256": published.weights_sha256,
        }
        round_id = int(connection.execute(insert(round_rows).values(**row).returning(round_rows.c.id)).scalar_one())
        places = [{"round_id": round_id, "task_id": number, "shard": number // SHARD} for number in range(POOL)]
        insert_or_ignore(connection, scores, places)
        steps.add(connection, round_id, "score", range(-(-POOL // SHARD)))


def _scored(stage: Stage) -> int:
    """Images scored so far, as the project's page shows it: the store learns of them only shard by shard."""
    redis = queue.connect(stage.environment["REDIS_URL"])
    try:
        return int(queue.get_progress(redis, PROJECT).get("done") or 0)
    finally:
        redis.close()


def _train(data: Path) -> None:
    """As the training job does it, with the settings a project has by default."""
    from worker.training import TrainProgress, TrainRequest, train

    prepare_ultralytics(data.parent / "ultralytics")
    settings = ProjectSettings(imgsz=IMGSZ)
    request = TrainRequest(
        dataset_yaml=data,
        run_dir=data.parent / "run",
        weights="yolo11n.yaml",
        epochs=1000,
        imgsz=settings.imgsz,
        train_batch=settings.train_batch,
        device="cpu",
    )

    def tell(now: TrainProgress) -> None:
        if now.losses:
            print("epoch", now.epoch, now.losses, flush=True)

    train(request, tell)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 1)


def _p95(values: Sequence[float]) -> float:
    return round(statistics.quantiles(values, n=20, method="inclusive")[-1], 1)


if __name__ == "__main__":
    main()
