"""The whole loop on one machine: Label Studio, hardfirst, images, two scripted annotators, rounds.

It does what a user does, through the same doors: a project from label_config.xml, an import of images, POST /api/ml
with the backend's URL, and labels from the label stream.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from demo import factory
from demo.annotators import Annotator, label_in_turns
from demo.label_studio_server import LabelStudioServer, create_annotator
from demo.oracle import Dataset, TrueImage, everything_unlabelled, label_config, read_dataset, regions
from worker import queue
from worker.artifacts import Artifacts, round_key
from worker.errors import HardfirstError, TrainingFailed, Unavailable
from worker.label_studio import model_version
from worker.processes import die_with_parent
from worker.settings import Settings
from worker.store import OPEN_STATES, Store, get_project, latest_round, loads, measured_rounds

ROOT = Path(__file__).resolve().parent.parent
USERNAME, PASSWORD = "admin@hardfirst.demo", "hardfirst-demo"
UPLOAD_AT_ONCE = 50  # files in one request; Label Studio reads them all into memory
ROUND_MINUTES = 45.0
# Learns the factory floor from nothing in minutes: small steps, many of them, since there may be no pretrained weights.
GENERATED: dict[str, Any] = {
    "batch_size": 60,
    "holdout_size": 70,
    "imgsz": 160,
    "epochs": 15,
    "train_batch": 4,
    "nominal_batch": 4,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "weights": "yolov8n.yaml",
}
OWN_DATA: dict[str, Any] = {"batch_size": 100, "imgsz": 160, "epochs": 30}


@dataclass(frozen=True)
class Stage:
    """Where everything of a demo is."""

    folder: Path
    label_studio: LabelStudioServer
    backend_url: str
    settings: Settings
    redis_url: str
    console: Console

    @property
    def api(self) -> httpx.Client:
        headers = {"Authorization": f"Token {self.label_studio.token}"}
        return httpx.Client(base_url=self.label_studio.url, headers=headers, timeout=120, trust_env=False)


def run(
    *,
    stop_at_end: bool,
    data_yaml: Path | None,
    n_rounds: int,
    folder: Path | None,
    seed: int,
    port: int,
    images: int = 420,
    **extra_params: Any,
) -> int:
    """Exit code: 0 when every round closed and every batch was served in its order."""
    console = Console(stderr=stop_at_end, highlight=False)  # with --exit, standard output is the JSON line
    for stop in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(stop, _interrupt)
    try:
        return _run(stop_at_end, data_yaml, n_rounds, folder, seed, port, images, extra_params, console)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _run(
    stop_at_end: bool,
    data_yaml: Path | None,
    n_rounds: int,
    folder: Path | None,
    seed: int,
    port: int,
    images: int,
    extra_params: dict[str, Any],
    console: Console,
) -> int:
    began = time.monotonic()
    with ExitStack() as stack:
        root = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hardfirst-demo-")))
        root.mkdir(parents=True, exist_ok=True)
        console.print(f"[bold]hardfirst demo[/] in {root}")
        dataset = _dataset(root, data_yaml, images, seed, console)
        stage = stack.enter_context(_servers(root, port, console))
        outcome = {"rounds": [], "served_in_order": False, "error": ""}
        try:
            outcome = _loop(stage, dataset, n_rounds, {**_defaults(data_yaml), "seed": seed, **extra_params})
        except HardfirstError as error:
            outcome["error"] = str(error)
            console.print(f"[red]The loop did not close:[/] {error}")
        closed = len(outcome["rounds"]) == n_rounds and outcome["served_in_order"] and not outcome["error"]
        summary = {**outcome, "seconds": round(time.monotonic() - began, 1)}
        if not summary["error"]:
            del summary["error"]
        if stop_at_end:
            print(json.dumps(summary), flush=True)
        else:
            _say_where(stage, closed)
            _stay(console)
    return 0 if closed else 1


def _defaults(data_yaml: Path | None) -> dict[str, Any]:
    """Settings the backend is connected with. Own data starts from HARDFIRST_WEIGHTS or yolo11n.pt, if any."""
    if data_yaml is not None:
        return dict(OWN_DATA)
    without_weights = {name: value for name, value in GENERATED.items() if name != "weights"}
    return without_weights if os.environ.get("HARDFIRST_WEIGHTS") else dict(GENERATED)


def _dataset(root: Path, data_yaml: Path | None, n_images: int, seed: int, console: Console) -> Dataset:
    if data_yaml is not None:
        return read_dataset(data_yaml)
    with _bar(console, f"drawing {n_images} images of a factory floor", n_images) as advance:
        made = factory.write_dataset(root / "images", n_images, seed, progress=lambda done, _: advance(done))
    return everything_unlabelled(made)


@contextmanager
def _servers(root: Path, port: int, console: Console) -> Iterator[Stage]:
    token = secrets.token_hex(20)
    console.print("starting Label Studio (the first time, its migrations take about a minute) ...")
    with LabelStudioServer(root / "label-studio", USERNAME, PASSWORD, token) as label_studio:
        port = port or _free_port()
        settings = Settings(
            label_studio_url=label_studio.url,
            label_studio_api_key=token,  # type: ignore[arg-type]
            data_dir=root / "hardfirst",
            port=port,
            _env_file=None,  # type: ignore[call-arg]
        )
        console.print("starting hardfirst ...")
        with _up(root, settings, token):
            url = f"http://127.0.0.1:{port}"
            redis_url = os.environ.get("REDIS_URL") or f"unix://{settings.data_dir.resolve() / 'valkey.sock'}"
            yield Stage(root, label_studio, url, settings, redis_url, console)


@contextmanager
def _up(root: Path, settings: Settings, token: str) -> Iterator[None]:
    """`hardfirst up`, as a user starts it."""
    env = {
        **os.environ,
        "LABEL_STUDIO_URL": settings.label_studio_url,
        "LABEL_STUDIO_API_KEY": token,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    parent = os.getpid()
    log_path = root / "hardfirst.log"
    command = [
        sys.executable,
        "-m",
        "backend.cli",
        "up",
        "--data",
        str(settings.data_dir),
        "--port",
        str(settings.port),
    ]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the demo, which stops things in order
            preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent),
        )
    try:
        _wait_until(lambda: _answers(process, settings.port, log_path), 120, "hardfirst does not answer")
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(process: subprocess.Popen[bytes], port: int, log_path: Path) -> bool:
    if process.poll() is not None:
        raise Unavailable(f"hardfirst ended: {log_path.read_text(errors='replace')[-600:]}")
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=1, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _loop(stage: Stage, dataset: Dataset, n_rounds: int, extra_params: dict[str, Any]) -> dict[str, Any]:
    project_id, truth = _project(stage, dataset)
    store = Store(stage.settings.store_url)
    annotators = _annotators(stage)
    _connect(stage, project_id, extra_params)
    stage.console.print(f"project {project_id} is connected; {stage.label_studio.url}/projects/{project_id}/data")
    in_order = True
    records: list[dict[str, Any]] = []
    _await_batch(stage, store, project_id, 0)
    for number in range(1, n_rounds + 1):
        batch = _published_batch(stage, project_id, number - 1)
        if not _already_opened(store, project_id, number):
            with _bar(stage.console, f"two annotators label batch {number - 1}", len(batch)) as advance:
                served = label_in_turns(
                    annotators, project_id, len(batch), lambda task: regions(truth[task["id"]], dataset.names), advance
                )
            in_order = in_order and served == batch
            if served != batch:
                stage.console.print(f"[red]served {served[:10]} ..., but the batch is {batch[:10]} ...[/]")
        _await_batch(stage, store, project_id, number)
        records.append(_record(stage, store, project_id, number))
    return {"rounds": records, "served_in_order": in_order, "error": ""}


def _project(stage: Stage, dataset: Dataset) -> tuple[int, dict[int, TrueImage]]:
    """A project with the images uploaded, the labelled ones annotated; and which task shows which image."""
    own_config = ROOT / "label_config.xml"
    is_ours = dataset.names == factory.CLASSES and own_config.is_file()  # not in an installed package
    config = own_config.read_text(encoding="utf-8") if is_ours else label_config(dataset.names)
    with stage.api as api:
        created = _json(api.post("/api/projects/", json={"title": "hardfirst demo", "label_config": config}))
        project_id = int(created["id"])
        urls = _upload(stage, api, project_id, [image.path for image in dataset.images])
        tasks = [_task(image, url, dataset) for image, url in zip(dataset.images, urls, strict=True)]
        _json(api.post(f"/api/projects/{project_id}/import", json=tasks))
        by_url = dict(zip(urls, dataset.images, strict=True))
        truth: dict[int, TrueImage] = {}
        page = 1
        while len(truth) < len(tasks):
            params = {"project": project_id, "include": "id,data", "page_size": 1000, "page": page}
            found = _json(api.get("/api/tasks", params=params))["tasks"]
            truth |= {int(task["id"]): by_url[task["data"]["image"]] for task in found}
            page += 1
    return project_id, truth


def _task(image: TrueImage, url: str, dataset: Dataset) -> dict[str, Any]:
    data = {"image": url, **({"hardfirst": "holdout"} if image in dataset.holdout else {})}
    if image in dataset.pool:
        return {"data": data}
    return {"data": data, "annotations": [{"result": regions(image, dataset.names), "lead_time": 10.0}]}


def _upload(stage: Stage, api: httpx.Client, project_id: int, paths: Sequence[Path]) -> list[str]:
    """The address of each file on Label Studio, in the order of `paths`."""
    ids: list[int] = []
    with _bar(stage.console, f"uploading {len(paths)} images to Label Studio", len(paths)) as advance:
        for start in range(0, len(paths), UPLOAD_AT_ONCE):
            chunk = paths[start : start + UPLOAD_AT_ONCE]
            # every file under a field name of its own: of several under one, Label Studio keeps the last
            files = {f"f{index}": (path.name, path.read_bytes()) for index, path in enumerate(chunk)}
            answer = _json(
                api.post(f"/api/projects/{project_id}/import", params={"commit_to_project": "false"}, files=files)
            )
            ids += answer["file_upload_ids"]
            advance(len(ids))
    known = _json(api.get(f"/api/projects/{project_id}/file-uploads", params={"all": "true"}))
    place_of = {int(upload["id"]): str(upload["file"]).lstrip("/") for upload in known}
    return [f"/data/{place_of[upload_id]}" for upload_id in ids]


def _annotators(stage: Stage) -> list[Annotator]:
    base, admin_token = stage.label_studio.url, stage.label_studio.token
    second = create_annotator(base, admin_token, "annotator@hardfirst.demo", PASSWORD)
    return [Annotator("first", base, admin_token), Annotator("second", base, second)]


def _connect(stage: Stage, project_id: int, extra_params: dict[str, Any]) -> None:
    """As Settings -> Model -> Connect Model does."""
    body = {"url": stage.backend_url, "project": project_id, "title": "hardfirst", "extra_params": extra_params}
    with stage.api as api:
        _json(api.post("/api/ml", json=body))


def _published_batch(stage: Stage, project_id: int, number: int) -> list[int]:
    """Task ids in the published order, from the round's manifest."""
    artifacts = Artifacts(stage.settings.artifacts_root, stage.folder / "cache")
    manifest = json.loads(artifacts.get(round_key(project_id, number, "manifest.json")))
    return [int(task["task_id"]) for task in manifest["tasks"]]


def _already_opened(store: Store, project_id: int, number: int) -> bool:
    """With a project that brought labels, the first round opens by itself."""
    with store.read() as connection:
        row = latest_round(connection, project_id)
    return row is not None and row.number >= number


def _await_batch(stage: Stage, store: Store, project_id: int, number: int) -> None:
    """Until Label Studio serves round `number`'s batch; what happens meanwhile is shown."""
    deadline = time.monotonic() + 60 * ROUND_MINUTES
    redis = queue.connect(stage.redis_url)
    shown = Progress(TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn(), console=stage.console)
    with shown:
        bar = shown.add_task(f"round {number}", total=None)
        while True:
            with store.read() as connection:
                row = latest_round(connection, project_id)
                problem = get_project(connection, project_id).problem
            if row is not None and row.number >= number and row.state == "failed":
                raise TrainingFailed(f"round {row.number} failed: {row.error}")
            if row is not None and row.state not in OPEN_STATES and row.number >= number:
                break
            if row is not None and row.number > number:
                break
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"round {number} did not end in {ROUND_MINUTES:g} minutes: {problem or 'no reason known'}"
                )
            _show(shown, bar, number, queue.get_progress(redis, project_id))
            time.sleep(0.3)
    with stage.api as api:
        _wait_until(
            lambda: _json(api.get(f"/api/projects/{project_id}/"))["model_version"] >= model_version(number),
            60,
            f"Label Studio does not serve {model_version(number)}",
        )


def _show(shown: Progress, bar: Any, number: int, now: dict[str, Any]) -> None:
    phase = str(now.get("phase", "waiting"))
    done, total = now.get("done"), now.get("total")
    if phase == "training":
        done, total = now.get("epoch"), now.get("epochs")
    shown.update(bar, description=f"round {number}: {phase}", completed=done or 0, total=total)


def _record(stage: Stage, store: Store, project_id: int, number: int) -> dict[str, Any]:
    with store.read() as connection:
        found = [row for row in measured_rounds(connection, project_id) if row.number == number]
    if not found:
        raise TrainingFailed(f"round {number} was not measured; see {stage.backend_url}")
    row = found[0]
    verdict = loads(row.verdict).get("verdict")
    gain = "" if row.gain is None else f", gain {row.gain:+.3f}"
    labels = f"{row.labels} labels (holdout {row.holdout_labels})"
    stage.console.print(f"[bold]round {number}[/]: {labels}, mAP50 {row.map50:.3f}{gain}, {verdict}")
    return {
        "labels": row.labels,
        "map50": round(row.map50, 4),
        "gain": None if row.gain is None else round(row.gain, 4),
        "verdict": verdict,
    }


def _say_where(stage: Stage, closed: bool) -> None:
    stage.console.print(
        f"\n[bold]{'The loop is closed.' if closed else 'The loop did not close.'}[/] Have a look:\n"
        f"  hardfirst     {stage.backend_url}\n"
        f"  Label Studio  {stage.label_studio.url}   login {USERNAME}   password {PASSWORD}\n"
        f"  logs          {stage.folder}\n"
        "Ctrl-C stops everything."
    )


def _stay(console: Console) -> None:
    """Everything goes on until Ctrl-C: somebody wants to look."""
    try:
        while True:
            signal.pause()  # until Ctrl-C or SIGTERM, which both end in KeyboardInterrupt
    except KeyboardInterrupt:
        console.print("stopping ...")


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as shown:
        bar = shown.add_task(what, total=total)
        yield lambda done: shown.update(bar, completed=done)


def _json(answer: httpx.Response) -> Any:
    if answer.status_code >= 400:
        where = f"{answer.request.method} {answer.request.url.path}"
        raise Unavailable(f"Label Studio answered {answer.status_code} to {where}: {answer.text[:500]}")
    return answer.json()


def _wait_until(condition: Callable[[], bool], seconds: float, sentence: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable(f"{sentence} after {seconds:g} s")
        time.sleep(0.2)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
