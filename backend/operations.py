"""What an admin does with a project: pause and resume, try again, settings, downloads. Parse, delegate, respond."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool
from sqlalchemy import select

from backend import admin, settings_view, views
from backend.admin import ERRORS, Around, LiveStatus, Problem, ProjectId
from backend.ml_api import Own, send_waiting
from backend.operations_view import WorkView, work_view
from backend.payloads import MAX_ID
from backend.preview_view import PreviewView, preview_view
from backend.settings_view import SettingsView
from backend.suspects_view import SuspectsView, look_for_suspects, suspects_of
from backend.views import RoundView
from worker import crew, preview, queue, rounds
from worker.downloads import dataset_parts, dataset_zip
from worker.errors import Conflict, DatasetUnusable, HardfirstError, LabelStudioRefused, NotFound, SettingsInvalid
from worker.services import Services
from worker.settings import ProjectSettings, parse_project_settings
from worker.store import get_project, open_round_of
from worker.store import rounds as round_rows

PACKING = threading.BoundedSemaphore(2)  # datasets at once: each keeps a thread and Label Studio busy
_saving: set[int] = set()  # projects whose settings Label Studio is being told
_saving_lock = threading.Lock()
RoundNumber = Annotated[int, Path(ge=0, le=MAX_ID)]
JobId = Annotated[str, Path(max_length=200, pattern="^[A-Za-z0-9_-]+$")]  # all that RQ takes for one
CHANGING: dict[int | str, dict[str, Any]] = {**ERRORS, 409: {"model": Problem}}


class PauseRequest(BaseModel):
    """`paused`: no round opens by itself and no step is started from now on. False: it goes on."""

    model_config = ConfigDict(extra="forbid")

    paused: StrictBool


class SettingsChange(BaseModel):
    """Settings to change, by name; null puts one back to its default. The others stay."""

    model_config = ConfigDict(extra="forbid")

    values: dict[Annotated[str, Field(max_length=60)], JsonValue] = Field(max_length=100)


class FieldProblems(Problem):
    """Why settings were not changed: a sentence for each field."""

    fields: dict[str, str]


class Said(BaseModel):
    """What was done, in words."""

    detail: str


router = APIRouter(tags=["operations"])


def who(request: Request, own: Services) -> str:
    """Who asks, for the log: the user that logged in, else where the request came from."""
    return own.settings.user or f"an admin at {request.client.host if request.client else 'an unknown address'}"


# --- pause, resume, try again ----------------------------------------------------------------------------------------


@router.post("/api/projects/{project_id}/pause", responses=ERRORS)
def pause_project(
    project_id: ProjectId, body: PauseRequest, request: Request, own: Own, around: Around
) -> LiveStatus:
    """Pause or resume. What runs finishes its step; labels that came meanwhile may open a round on resuming."""
    with own.store.write() as connection:
        rounds.pause(connection, project_id, body.paused, who(request, own))
        if not body.paused and open_round_of(connection, project_id) is None:
            rounds.open_round_if_triggered(connection, project_id)
    send_waiting(own)
    return admin.show_status(project_id, own, around)


@router.post("/api/projects/{project_id}/rounds/retry", responses=CHANGING)
def retry_round(project_id: ProjectId, request: Request, own: Own) -> RoundView:
    """Re-open the round that failed last at the step that failed. What it had done before stands."""
    with own.store.write() as connection:
        number = rounds.retry_round(connection, project_id, who(request, own))
        found = next(row for row in views.round_views(connection, project_id) if row.number == number)
    send_waiting(own)
    return found


@router.post("/api/projects/{project_id}/purges/retry", responses=CHANGING)
def retry_purges(project_id: ProjectId, own: Own) -> Said:
    """Try again to delete old versions in Label Studio."""
    with own.store.write() as connection:
        get_project(connection, project_id)
        found = rounds.retry_purge(connection, project_id)
    if not found:
        raise Conflict(f"no deletion of old versions of project {project_id} has failed")
    send_waiting(own)
    return Said(detail="Old versions are deleted again.")


@router.post("/api/jobs/{job_id}/retry", responses=CHANGING)
def retry_job(job_id: JobId, own: Own) -> Said:
    """Put a failed job that is no step of a round back on its queue."""
    crew.retry_job(own.redis, job_id)
    return Said(detail="It is on its queue again.")


# --- who works -------------------------------------------------------------------------------------------------------


@router.get("/api/projects/{project_id}/work", responses=ERRORS)
def show_work(project_id: ProjectId, own: Own, around: Around) -> WorkView:
    """Workers, queues, and what failed."""
    found = around.ask_queue(own, crew.crew)
    with own.store.read() as connection:
        return work_view(connection, project_id, found)


@router.get("/projects/{project_id}/work", include_in_schema=False)
def work_fragment(request: Request, project_id: ProjectId, own: Own, around: Around) -> HTMLResponse:
    """That section of the page alone: it is asked for every few seconds."""
    work = show_work(project_id, own, around)
    return admin.render(request, own, "_workers.html", work=work)


# --- settings --------------------------------------------------------------------------------------------------------


@router.get("/api/projects/{project_id}/settings", responses=ERRORS)
def show_settings(project_id: ProjectId, own: Own) -> SettingsView:
    """Every setting with its default, its effective value and its limits; strategies with their options; changes."""
    with own.store.read() as connection:
        return settings_view.settings_view(connection, project_id)


@router.patch(
    "/api/projects/{project_id}/settings",
    response_model=SettingsView,
    responses={
        **ERRORS,
        409: {"model": Problem, "description": "Label Studio refused them. Nothing was changed."},
        422: {"model": FieldProblems, "description": "Nothing was changed."},
        503: {"model": Problem, "description": "Label Studio is away, and it keeps the settings. Nothing was changed."},
    },
)
def change_settings(
    project_id: ProjectId, body: SettingsChange, request: Request, own: Own
) -> SettingsView | JSONResponse:
    """Change settings here and in Label Studio, which keeps them: the model's "Any extra params"."""
    with own.store.read() as connection:
        project = get_project(connection, project_id)
    wrong = settings_view.field_problems(
        settings_view.changed_settings(settings_view.stored_settings(project), body.values), body.values
    )
    if wrong:
        return _invalid(wrong)
    with _saving_alone(project_id):
        _write_through(own, project_id, project.backend_url, body.values, who(request, own))
    return show_settings(project_id, own)


def _invalid(wrong: dict[str, str]) -> JSONResponse:
    detail = "; ".join(f"{name}: {sentence}" for name, sentence in wrong.items())
    return JSONResponse({"error": "SettingsInvalid", "detail": detail, "fields": wrong}, 422)


@contextmanager
def _saving_alone(project_id: int) -> Iterator[None]:
    """Label Studio takes all settings at once: of two changes at the same time the later would undo the other. Nobody
    waits here, since Label Studio's call to our /setup needs a thread, too.

    Raises:
        Conflict: settings of this project are being saved.
    """
    with _saving_lock:
        if project_id in _saving:
            raise Conflict(f"other settings of project {project_id} are being saved; look at them and try again")
        _saving.add(project_id)
    try:
        yield
    finally:
        with _saving_lock:
            _saving.discard(project_id)


def _write_through(own: Services, project_id: int, backend_url: str, change: dict[str, Any], by: str) -> None:
    """Label Studio calls our /setup, with the settings it had and with the new ones, before it takes them.

    Raises:
        LabelStudioUnavailable, CredentialsMissing: nothing was changed.
        NotFound: the backend was disconnected in Label Studio.
        Conflict: Label Studio refused. Ours are as they were.
    """
    backend = own.label_studio.own_backend(project_id, backend_url)
    stored = backend.get("extra_params")
    after = parse_project_settings(settings_view.changed_settings(settings_view.as_values(stored), change))
    with own.store.write() as connection:
        rounds.ask_settings(connection, project_id, after, by)
    login = (own.settings.user, own.settings.password.get_secret_value())
    try:
        own.label_studio.save_extra_params(backend, settings_view.said(after), *login)
    except HardfirstError as error:
        _take_back(own, project_id, stored)
        if isinstance(error, LabelStudioRefused):
            raise Conflict(f"Label Studio did not take the settings, so nothing was changed. {error}") from error
        raise
    _keep(own, project_id, after, by)


def _take_back(own: Services, project_id: int, stored: object) -> None:
    """Our /setup may have taken what Label Studio then refused: ours are again as Label Studio has them."""
    try:
        _keep(own, project_id, parse_project_settings(stored), "hardfirst, as Label Studio did not take them")
    except SettingsInvalid:  # of another version: they were never ours
        with own.store.write() as connection:
            rounds.ask_settings(connection, project_id, None)


def _keep(own: Services, project_id: int, settings: ProjectSettings, by: str) -> None:
    """What Label Studio has now is ours too, should its call not have come through."""
    with own.store.write() as connection:
        project = get_project(connection, project_id)
        rounds.connect_project(connection, project_id, project.label_config, settings, project.backend_url, by)
        rounds.ask_settings(connection, project_id, None)


# --- a batch under other settings ------------------------------------------------------------------------------------


class PreviewRequest(BaseModel):
    """How the batch would be chosen. What is not given is as the project has it."""

    model_config = ConfigDict(extra="forbid")

    strategy: str | None = Field(None, max_length=60)
    strategy_options: dict[Annotated[str, Field(max_length=60)], JsonValue] | None = Field(None, max_length=50)
    batch_size: JsonValue = None
    near_duplicate_threshold: JsonValue = None


PreviewId = Annotated[str, Path(pattern="^[0-9a-f]{16,40}$")]


@router.post(
    "/api/projects/{project_id}/previews",
    status_code=202,
    response_model=PreviewView,
    responses={**CHANGING, 422: {"model": FieldProblems}, 503: {"model": Problem}},
)
def make_preview(project_id: ProjectId, body: PreviewRequest, own: Own) -> PreviewView | JSONResponse:
    """Choose a batch under other settings from the scores there are. A worker does it; ask for it until it is ready."""
    change = body.model_dump(exclude_none=True)
    with own.store.read() as connection:
        values = preview.preview_settings(connection, project_id, change)
    if wrong := settings_view.field_problems(values, change):
        return _invalid(wrong)
    settings = parse_project_settings(values)
    preview_id = preview.new_preview_id(settings)
    preview.keep(own.redis, project_id, preview_id, {"state": "waiting", "settings": settings_view.said(settings)})
    job = ("worker.jobs.preview", (project_id, preview_id), f"preview-{preview_id}")
    # the control worker may be at another project's publishing for minutes: the job waits as long as the page does
    queue.enqueue_unique(own.redis, queue.CONTROL, *job, timeout=preview.TIMEOUT, ttl=preview.KEPT_SECONDS)
    return show_preview(project_id, preview_id, own)


@router.get("/api/projects/{project_id}/previews/{preview_id}", responses={**ERRORS, 503: {"model": Problem}})
def show_preview(project_id: ProjectId, preview_id: PreviewId, own: Own) -> PreviewView:
    """A preview: kept for an hour."""
    found = preview.find(own.redis, project_id, preview_id)
    with own.store.read() as connection:
        return preview_view(connection, project_id, preview_id, found, own.settings.label_studio_url)


@router.get("/projects/{project_id}/previews/{preview_id}", include_in_schema=False)
def preview_fragment(request: Request, project_id: ProjectId, preview_id: PreviewId, own: Own) -> HTMLResponse:
    """The preview as a part of the page."""
    found = show_preview(project_id, preview_id, own)
    return admin.render(request, own, "_previewed.html", preview=found)


@router.post(
    "/api/projects/{project_id}/previews/{preview_id}/publish",
    status_code=201,
    responses={**CHANGING, 503: {"model": Problem}},
)
def publish_preview(project_id: ProjectId, preview_id: PreviewId, request: Request, own: Own) -> RoundView:
    """Open a round that only selects, with the preview's settings, and publishes: no training, nothing scored twice.

    It is the previewed batch, but for labels and tasks that came since.
    """
    found = preview.find(own.redis, project_id, preview_id)
    if found["state"] != "ready":
        raise Conflict("this preview is not ready: look at it before it is published")
    settings = parse_project_settings(found.get("settings"))
    with own.store.write() as connection:
        if rounds.selectable_round(connection, project_id).number != found["round"]:
            raise Conflict("another batch was published since this preview was made: make it again")
        why = f"a previewed batch ({settings.strategy}) was published by {who(request, own)}"
        rounds.open_select_round(connection, project_id, settings, why)
        opened = views.round_views(connection, project_id)[0]
    send_waiting(own)
    return opened


# --- suspect labels --------------------------------------------------------------------------------------------------


@router.get("/api/projects/{project_id}/suspects", responses=ERRORS)
def show_suspects(project_id: ProjectId, own: Own, around: Around) -> SuspectsView:
    """Labels that confident detections of the published round disagree with, the most suspicious first."""
    return suspects_of(own, around.ask_queue, project_id)


@router.get("/projects/{project_id}/suspects", include_in_schema=False)
def suspects_fragment(request: Request, project_id: ProjectId, own: Own, around: Around) -> HTMLResponse:
    """That section of the page alone."""
    return admin.render(request, own, "_suspects.html", suspects=show_suspects(project_id, own, around))


@router.post("/api/projects/{project_id}/suspects", status_code=202, responses={**CHANGING, 503: {"model": Problem}})
def look_again(project_id: ProjectId, own: Own) -> Said:
    """Compare all labels with the detections again: labels may have changed since."""
    with own.store.read() as connection:
        source = rounds.selectable_round(connection, project_id)
    look_for_suspects(own.redis, project_id, source.id, again=True)
    return Said(detail="Labels and detections are compared again; that takes a moment.")


# --- downloads -------------------------------------------------------------------------------------------------------


@router.get(
    "/api/projects/{project_id}/rounds/{number}/weights.pt",
    response_class=FileResponse,
    responses={**ERRORS, 200: {"content": {"application/octet-stream": {}}, "description": "Weights of ultralytics."}},
)
def download_weights(project_id: ProjectId, number: RoundNumber, own: Own) -> FileResponse:
    """The detector a round trained; its SHA-256 is checked first."""
    query = select(round_rows.c.weights, round_rows.c.weights_sha256).where(
        round_rows.c.project_id == project_id, round_rows.c.number == number
    )
    with own.store.read() as connection:
        get_project(connection, project_id)
        row = connection.execute(query).first()
    if row is None or row.weights is None or row.weights_sha256 is None:
        raise NotFound(f"round {number} of project {project_id} has no weights")
    path = own.artifacts.local(row.weights, row.weights_sha256)
    name = f"hardfirst-p{project_id}-r{number}.pt"
    headers = {"Cache-Control": "no-store", "X-Checksum-SHA256": row.weights_sha256}
    return FileResponse(path, media_type="application/octet-stream", filename=name, headers=headers)


@router.get(
    "/api/projects/{project_id}/dataset.zip",
    response_class=StreamingResponse,
    responses={
        **CHANGING,
        200: {"content": {"application/zip": {}}, "description": "A YOLO dataset: images, labels, data.yaml."},
        503: {"model": Problem, "description": "Label Studio is away."},
    },
)
def download_dataset(project_id: ProjectId, own: Own) -> Response:
    """All labelled images and their boxes as a YOLO dataset. Label Studio away on the way: the download breaks off."""
    if not PACKING.acquire(blocking=False):
        raise Conflict("two datasets are being packed already; try again when they are done")
    try:
        pieces = dataset_zip(dataset_parts(own, project_id))
        head = next(pieces) + next(pieces)  # the first image is fetched before the answer says that all is well
    except DatasetUnusable as error:
        PACKING.release()
        raise Conflict(str(error)) from error
    except BaseException:
        PACKING.release()
        raise
    name = f"hardfirst-p{project_id}.zip"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return StreamingResponse(_Packed(head, pieces), media_type="application/zip", headers=headers)


class _Packed:
    """The zip's pieces. Its place among PACKING is free when nobody reads it any more, however that came."""

    def __init__(self, head: bytes, rest: Iterator[bytes]) -> None:
        self._pieces = chain([head], rest)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def __del__(self) -> None:
        PACKING.release()
