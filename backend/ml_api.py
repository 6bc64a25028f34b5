"""What Label Studio calls: /health /setup /predict /webhook /versions. Parse, delegate, respond; no inference here.

Label Studio gives 1 s to /health, 3 s to /setup, 1 s to /webhook and 100 s to /predict, and retries none of them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
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
from worker import crew, queue, rounds, steps
from worker.boxes import LabelMap
from worker.errors import (
    BadRequest,
    Conflict,
    HardfirstError,
    LabelConfigUnsupported,
    QueueUnavailable,
    SettingsInvalid,
)
from worker.label_studio import PENDING_VERSION
from worker.scoring import enqueue_late, mark_sent, stored_predictions, unsent_of
from worker.services import Services
from worker.settings import parse_project_settings
from worker.store import get_project, record_event
from worker.store import rounds as round_rows

log = logging.getLogger(__name__)
router = APIRouter(tags=["Label Studio"])

PREDICT_SECONDS = 85.0  # of Label Studio's 100; the rest is for writing its own rows
MAX_URL = 400
WITHOUT_WORKER = 10.0  # seconds: one that ended is started again in less; Label Studio asks at every opening of a task
PREDICT_AT_ONCE = 32  # tasks per job: what is ready by then is answered, and an annotator waits for one job at most
# Handlers share a pool of threads: those that wait for predictions must leave some for /health and /webhook.
WAITING = threading.BoundedSemaphore(8)
NOT_READY: dict[str, Any] = {"result": [], "score": 1.0, "model_version": PENDING_VERSION}
Ask = Callable[[Services, int, Sequence[tuple[int, str]], float], list[dict[str, Any]]]
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
    return connect(body, str(request.base_url), own)


def connect(body: SetupRequest, base_url: str, own: Services) -> SetupResponse:
    """`setup`, whoever serves it. `base_url`: where Label Studio has reached us."""
    backend_url = own.settings.url or base_url.rstrip("/")
    if len(backend_url) > MAX_URL:
        raise BadRequest(f"the Host header has {len(backend_url)} characters; no address of ours has")
    try:
        settings = parse_project_settings(body.extra_params)
        LabelMap.from_config(body.label_config, settings.shapes)
    except (LabelConfigUnsupported, SettingsInvalid) as refused:
        log.warning("project %s was not connected: %s", body.project, refused)  # Label Studio shows only the 422
        with own.store.write() as connection:
            rounds.note_refusal(connection, body.project, backend_url, str(refused))
        raise
    with own.store.write() as connection:
        has_moved = rounds.has_moved(connection, body.project, backend_url)
        rounds.connect_project(connection, body.project, body.label_config, settings, backend_url)
        project = get_project(connection, body.project)
    if has_moved:
        _reconcile_soon(own)  # Label Studio leaves its webhook at the old address
    own.label_studio.offer_setup_token(str(body.access_token or ""))
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


@router.post("/predict", response_model=PredictResponse)
def predict(body: PredictRequest, own: Own) -> Response:
    """One entry per task: what is stored, else what a worker says in time, else none, which is made soon after."""
    answer = answer_predict(body, own, ask_worker)
    # written here: FastAPI would do it on the event loop, where 10,000 predictions keep /health waiting
    return Response(answer.model_dump_json(), media_type="application/json")


def answer_predict(body: PredictRequest, own: Services, ask: Ask) -> PredictResponse:
    """`predict`, whoever serves it. `ask`: see `ask_worker`."""
    began = time.monotonic()
    is_kept = body.params.context is None
    with own.store.read() as connection:
        project = get_project(connection, body.project)
        known = stored_predictions(connection, project, [task.id for task in body.tasks])
        unsent = unsent_of(connection, project, list(known)) if is_kept else []
    mark_sent(own, project.published_round_id, unsent)  # or they would be there twice
    spent = time.monotonic() - began
    deadline = began + max(PREDICT_SECONDS - 2 * spent, 0.0)  # 10,000 predictions take as long to write as to read
    missing = [task for task in body.tasks if task.id not in known]
    if missing and project.published_round_id is not None:
        known |= _live(own, project, missing, ask, deadline, is_kept=is_kept)
        if is_kept and any(task.id not in known for task in missing):
            _score_the_rest_soon(own, project.id)
    return PredictResponse(results=[_result(known.get(task.id), is_kept=is_kept) for task in body.tasks])


def _result(found: Mapping[str, Any] | None, *, is_kept: bool) -> Prediction | list[Prediction]:
    """Not ready: no prediction at all, so that Label Studio keeps none as if nothing had been found, and asks again.

    An interactive request is shown, not kept, and Label Studio's page reads an object.
    """
    if found is not None:
        return Prediction(**found)
    return [] if is_kept else Prediction(**NOT_READY)


def _score_the_rest_soon(own: Services, project_id: int) -> None:
    """What is left over is scored behind the annotators' own requests, and written to Label Studio."""
    try:
        enqueue_late(own.redis, project_id)
    except QueueUnavailable as error:
        log.warning("what was not predicted in time waits for the next minute: %s", error)


def _live(
    own: Services, project: Row[Any], missing: Sequence[TaskPayload], ask: Ask, deadline: float, *, is_kept: bool
) -> dict[int, dict[str, Any]]:
    """What can be predicted in time, by task id; {} when enough requests wait for predictions already.

    Args:
        deadline: of time.monotonic().
        is_kept: Label Studio keeps the answer as the task's prediction; not of interactive requests.
    """
    if not WAITING.acquire(blocking=False):
        return {}
    try:
        return _ask_in_chunks(own, project, missing, ask, deadline, is_kept)
    finally:
        WAITING.release()


def _ask_in_chunks(
    own: Services, project: Row[Any], missing: Sequence[TaskPayload], ask: Ask, deadline: float, is_kept: bool
) -> dict[int, dict[str, Any]]:
    key = rounds.label_map_of(project).image_key
    found: dict[int, dict[str, Any]] = {}
    for chunk in _chunks(list(missing), PREDICT_AT_ONCE):
        images = [(task.id, str(task.data.get(key) or "")) for task in chunk]
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            answers = ask(own, project.id, images, left)
        except (TimeoutError, HardfirstError) as error:
            log.warning("predictions of project %s come later: %s", project.id, error)
            break
        ready = {task_id: answer for (task_id, _), answer in zip(images, answers, strict=True)}
        found |= {task_id: {name: answer[name] for name in NOT_READY} for task_id, answer in ready.items()}
        if is_kept:
            mark_sent(own, project.published_round_id, list(ready))
    return found


def ask_worker(
    own: Services, project_id: int, images: Sequence[tuple[int, str]], seconds: float
) -> list[dict[str, Any]]:
    """Predictions for (task id, image reference) pairs, in their order, by a worker of the queue `predict`.

    Raises:
        TimeoutError: not within so many seconds, or within WITHOUT_WORKER when there seems to be no worker.
        HardfirstError: the job failed, or Redis does not answer.
    """
    patience = seconds if _has_predict_worker(own) else min(seconds, WITHOUT_WORKER)
    found: list[dict[str, Any]] = queue.call_predict(own.redis, [project_id, images], timeout=patience)
    return found


def _has_predict_worker(own: Services) -> bool:
    return any(
        queue.PREDICT in one.queues and one.seen_seconds is not None and one.seen_seconds < crew.LOST_AFTER
        for one in crew.workers(own.redis)
    )


def _chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
