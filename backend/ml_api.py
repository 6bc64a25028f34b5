"""What Label Studio calls: /health /setup /predict /webhook /versions. Parse, delegate, respond; no inference here.

Label Studio gives 1 s to /health, 3 s to /setup, 1 s to /webhook and 100 s to /predict, and retries none of them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from sqlalchemy import Row, select

from backend.payloads import (
    AnnotationPayload,
    Prediction,
    PredictRequest,
    PredictResponse,
    SetupRequest,
    SetupResponse,
    TaskPayload,
    WebhookRequest,
    WebhookResponse,
)
from worker import queue, rounds, steps
from worker.boxes import LabelMap
from worker.errors import BadRequest, Conflict, HardfirstError, QueueUnavailable
from worker.label_studio import PENDING_VERSION
from worker.scoring import mark_sent, stored_predictions
from worker.services import Services
from worker.settings import parse_project_settings
from worker.store import get_project, record_event
from worker.store import rounds as round_rows

log = logging.getLogger(__name__)
router = APIRouter(tags=["Label Studio"])

PREDICT_SECONDS = 85.0  # of Label Studio's 100; the rest is for writing its own rows
MAX_URL = 400
PREDICT_AT_ONCE = 64  # tasks per job, so that what is ready by then is answered
# Handlers share a pool of threads: those that wait for predictions must leave some for /health and /webhook.
WAITING = threading.BoundedSemaphore(8)
NOT_READY: dict[str, Any] = {"result": [], "score": 1.0, "model_version": PENDING_VERSION}
RECONCILE_SOON = "worker.jobs.reconcile"


def services_of(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


Own = Annotated[Services, Depends(services_of)]


@router.get("/health")
def health() -> dict[str, str]:
    return {"status": "UP", "model_class": "HardfirstModel"}


@router.post("/setup")
def setup(body: SetupRequest, request: Request, own: Own) -> SetupResponse:
    """Connect: settings and label config are checked and remembered; everything slow is a job."""
    LabelMap.from_config(body.label_config)  # refuse now, while somebody reads Label Studio's answer
    settings = parse_project_settings(body.extra_params)
    backend_url = own.settings.url or str(request.base_url).rstrip("/")
    if len(backend_url) > MAX_URL:
        raise BadRequest(f"the Host header has {len(backend_url)} characters; no address of ours has")
    with own.store.write() as connection:
        rounds.connect_project(connection, body.project, body.label_config, settings, backend_url)
        project = get_project(connection, body.project)
    send_waiting(own)
    return SetupResponse(model_version=rounds.served_version(project))


@router.get("/versions")
def versions(own: Own) -> dict[str, list[str]]:
    """Label Studio names no project here: all versions of all projects."""
    with own.store.read() as connection:
        found = connection.execute(select(round_rows.c.model_version).distinct()).scalars().all()
    return {"versions": sorted(version for version in found if version)}


@router.post("/webhook")
def webhook(body: WebhookRequest, own: Own) -> WebhookResponse:
    """A hint that something changed: remembered, and a round opened when the trigger is met."""
    with own.store.write() as connection:
        get_project(connection, body.project.id)
        detail = _handle(connection, body)
    if body.action in ("TASKS_CREATED", "TASKS_DELETED"):
        _reconcile_soon(own)
    send_waiting(own)
    return WebhookResponse(status="ok", detail=detail)


def _handle(connection: Any, body: WebhookRequest) -> str:
    project_id = body.project.id
    if body.action == "START_TRAINING":
        return _start_training(connection, project_id)
    if not record_event(connection, project_id, body.action, key=_event_key(body)):
        return "already known"
    if body.action == "ANNOTATIONS_DELETED":
        rounds.forget_annotations(connection, project_id, [one.id for one in body.annotations])
    elif body.action == "TASKS_DELETED":
        rounds.mark_deleted(connection, project_id, [task.id for task in body.tasks])
    elif body.annotation:
        named = [one.model_dump() for one in body.annotation if one.task is not None]
        rounds.remember_annotations(connection, project_id, named)
    opened = rounds.open_round_if_triggered(connection, project_id)
    return "noted" if opened is None else "noted; a round was opened"


def _event_key(body: WebhookRequest) -> str:
    """Label Studio gives events no id: which annotations, and their state."""
    state = [_annotation_key(one) for one in (*body.annotation, *body.annotations)] + [task.id for task in body.tasks]
    if body.action in ("TASKS_CREATED", "TASKS_DELETED") or not state:
        state = [time.time_ns()]
    return f"{body.action}:{json.dumps(state)}" if len(state) == 1 else f"{body.action}:{len(state)}:{hash_of(state)}"


def _annotation_key(one: AnnotationPayload) -> str:
    return f"{one.id}@{one.updated_at or ''}"


def hash_of(values: Sequence[Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _start_training(connection: Any, project_id: int) -> str:
    try:
        rounds.open_round(connection, project_id, "Start training was pressed in Label Studio")
    except Conflict as conflict:
        return str(conflict)
    return "a round was opened"


def send_waiting(own: Services) -> None:
    """The rows are written; when the queue is away, the sweeper sends them later."""
    try:
        steps.send_waiting(own.store, own.redis)
    except QueueUnavailable as error:
        log.warning("steps wait for the queue: %s", error)


def _reconcile_soon(own: Services) -> None:
    job_id = f"reconcile-soon-{int(time.time() // 5)}"
    try:
        queue.enqueue_unique(own.redis, queue.CONTROL, RECONCILE_SOON, (), job_id, timeout=600, ttl=60)
    except QueueUnavailable as error:
        log.warning("reconcile waits for its minute: %s", error)


@router.post("/predict")
def predict(body: PredictRequest, own: Own) -> PredictResponse:
    """One result per task: what is stored, else what a worker says in time, else empty under a version of its own."""
    with own.store.read() as connection:
        project = get_project(connection, body.project)
        stored = stored_predictions(connection, project, [task.id for task in body.tasks])
    missing = [task for task in body.tasks if task.id not in stored]
    if missing and project.published_round_id is not None:
        stored |= _live(own, project, missing, is_kept=body.params.context is None)
    return PredictResponse(results=[Prediction(**stored.get(task.id, NOT_READY)) for task in body.tasks])


def _live(
    own: Services, project: Row[Any], missing: Sequence[TaskPayload], *, is_kept: bool
) -> dict[int, dict[str, Any]]:
    """What the predict worker says in time, by task id; {} when enough requests wait for it already.

    Args:
        is_kept: Label Studio keeps the answer as the task's prediction; not of interactive requests.
    """
    if not WAITING.acquire(blocking=False):
        return {}
    try:
        return _ask_worker(own, project, missing, is_kept)
    finally:
        WAITING.release()


def _ask_worker(
    own: Services, project: Row[Any], missing: Sequence[TaskPayload], is_kept: bool
) -> dict[int, dict[str, Any]]:
    deadline = time.monotonic() + PREDICT_SECONDS
    key = LabelMap.from_config(project.label_config).image_key
    found: dict[int, dict[str, Any]] = {}
    for chunk in _chunks(list(missing), PREDICT_AT_ONCE):
        images = [[task.id, str(task.data.get(key) or "")] for task in chunk]
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            answers = queue.call_predict(own.redis, [project.id, images], timeout=left)
        except (TimeoutError, HardfirstError) as error:
            log.warning("predictions of project %s come later: %s", project.id, error)
            break
        ready = {task_id: answer for (task_id, _), answer in zip(images, answers, strict=True)}
        found |= {task_id: {name: answer[name] for name in NOT_READY} for task_id, answer in ready.items()}
        if is_kept:
            mark_sent(own, project.published_round_id, list(ready))
    return found


def _chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
