"""The admin page, its JSON API and its files: reads the store and live progress; buttons change rows and enqueue.

The page answers whoever is away: Redis, Label Studio or its access token are sentences on it, not errors.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path as FilePath
from typing import Annotated, Any, TypeVar
from weakref import WeakKeyDictionary

import httpx
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from pydantic import BaseModel, ConfigDict, StrictBool
from redis import Redis
from sqlalchemy import select

from backend import batch_view, curve_view, doctor_view, operations_view, settings_view, suspects_view, views
from backend.ml_api import Own, send_waiting
from backend.payloads import MAX_ID
from backend.views import BatchView, ProjectCard, ProjectStatus, ProjectView, RoundView
from worker import crew, queue, rounds
from worker.artifacts import round_key, sha256
from worker.errors import (
    HardfirstError,
    ImageUnusable,
    NotFound,
    QueueUnavailable,
)
from worker.images import decode_image, to_rgb, upright
from worker.services import Services
from worker.store import get_project, get_round, open_round_of, steps, tasks
from worker.store import rounds as round_rows

T = TypeVar("T")

HERE = FilePath(__file__).parent
STATIC = {
    "admin.css": "text/css",
    "operations.css": "text/css",
    "curve.css": "text/css",
    "doctor.css": "text/css",
    "admin.js": "text/javascript",
    "operations.js": "text/javascript",
    "curve.js": "text/javascript",
    "doctor.js": "text/javascript",
    "favicon.svg": "image/svg+xml",
}
PLOTLY = "plotly.js"
YEAR = "public, max-age=31536000, immutable"  # the address holds the content's digest

THUMBNAIL_SIDE = 320  # pixels
THUMBNAIL_QUALITY = 80
THUMBNAIL_SECONDS = 20.0  # until the page gets a placeholder; Label Studio may take longer
THUMBNAILS_AT_ONCE = 4  # fetched and decoded: a large image takes hundreds of MB for a moment

QUEUE_AWAY_SECONDS = 5.0  # a poll must not wait for Redis each time
PACE_SECONDS = 4.0  # watched so long before its end is foretold
LOOK_SECONDS = 10.0  # between two looks at Redis and Label Studio
LOOK_PATIENCE = 0.5  # the first page waits so long for each first answer

# plotly.js writes style attributes, an empty <style> to which it adds rules by script, and one of its own (WebGL maps)
_STYLE_HASHES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
)
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
        f"style-src-elem 'self' {_STYLE_HASHES}; style-src-attr 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


class Problem(BaseModel):
    """What every error looks like."""

    error: str
    detail: str


class StopRequest(BaseModel):
    """`accepted`: no round opens by itself from now on. False: they do again."""

    model_config = ConfigDict(extra="forbid")

    accepted: StrictBool


class SelectionView(BaseModel):
    """How the current batch was chosen."""

    strategy: str
    options: dict[str, Any]
    notes: list[str]


class LiveStatus(ProjectStatus):
    """A project's status, and who is away."""

    away: list[str]


router = APIRouter(tags=["admin"])
ERRORS: dict[int | str, dict[str, Any]] = {404: {"model": Problem}, 422: {"model": Problem}}
ProjectId = Annotated[int, Path(ge=0, le=MAX_ID)]
Offset = Annotated[int, Query(ge=0, le=MAX_ID)]
Limit = Annotated[int, Query(ge=1, le=views.MAX_PAGE)]


# --- who else is there -----------------------------------------------------------------------------------------------


class Neighbours:
    """What the page knows of Redis and Label Studio without ever waiting long for them. One per application."""

    def __init__(self) -> None:
        self.fetching = ThreadPoolExecutor(THUMBNAILS_AT_ONCE, thread_name_prefix="thumbnail")
        self._seen: dict[int, tuple[object, float, int]] = {}  # by project: phase, when first seen, done then
        self._queue_away_until = 0.0
        self._queue_problem = ""
        self._looked_at = 0.0
        self._looks: list[threading.Thread] = []
        self._label_studio_problem = ""
        self._lock = threading.Lock()

    def progress(self, own: Services, project_id: int) -> dict[str, Any]:
        """Live progress; empty while Redis is away."""
        if time.monotonic() < self._queue_away_until:
            return {}
        try:
            found = queue.get_progress(own.redis, project_id)
        except QueueUnavailable as error:
            self._queue_is_away(error)
            return {}
        self._queue_problem = ""
        if found.get("phase") != "training":  # that one says itself how long it takes
            found["eta_seconds"], found["rate"] = self._pace(project_id, found)
        return found

    def ask_queue(self, own: Services, question: Callable[[Redis], T]) -> T | None:
        """What Redis answers; None while it is away."""
        if time.monotonic() < self._queue_away_until:
            return None
        try:
            return question(own.redis)
        except QueueUnavailable as error:
            self._queue_is_away(error)
            return None

    def _pace(self, project_id: int, progress: dict[str, Any]) -> tuple[float | None, float | None]:
        """Seconds left of a phase, and how many it does in one, from how fast it went since the page first saw it."""
        phase, done, total = (progress.get("round"), progress.get("phase")), progress.get("done"), progress.get("total")
        if not isinstance(done, int) or not isinstance(total, int):
            self._seen.pop(project_id, None)
            return None, None
        since, first = time.monotonic(), done
        if (seen := self._seen.get(project_id)) is not None and seen[0] == phase and seen[2] <= done:
            _, since, first = seen
        else:
            self._seen[project_id] = (phase, since, first)
        elapsed = time.monotonic() - since
        if done <= first or elapsed <= PACE_SECONDS:
            return None, None
        rate = (done - first) / elapsed
        return (total - done) / rate, rate

    def away(self, own: Services) -> list[str]:
        """Sentences about who is away, and what to do: as of the last look, LOOK_SECONDS ago at most."""
        with self._lock:
            first = not self._looked_at
            due = time.monotonic() - self._looked_at > LOOK_SECONDS
            if (first or due) and not any(thread.is_alive() for thread in self._looks):
                self._looked_at = time.monotonic()
                self._looks = [
                    threading.Thread(target=look, args=(own,), daemon=True)
                    for look in (self._look_at_label_studio, self._look_at_queue)
                ]
                for thread in self._looks:
                    thread.start()
        if first:
            for thread in self._looks:
                thread.join(LOOK_PATIENCE)
        return [problem for problem in (self._label_studio_problem, self._queue_problem) if problem]

    def _look_at_label_studio(self, own: Services) -> None:
        self._label_studio_problem = label_studio_problem(own)

    def _look_at_queue(self, own: Services) -> None:
        try:
            queue.ping(own.redis)
        except QueueUnavailable as error:
            self._queue_is_away(error)
        else:
            self._queue_problem = ""

    def _queue_is_away(self, error: QueueUnavailable) -> None:
        self._queue_problem = str(error)
        self._queue_away_until = time.monotonic() + QUEUE_AWAY_SECONDS


def label_studio_problem(own: Services) -> str:
    """Why Label Studio cannot be worked with, in words; empty when it can."""
    try:
        own.label_studio.check_token()
    except (HardfirstError, httpx.InvalidURL) as error:
        return str(error)
    return ""


_neighbours: WeakKeyDictionary[Services, Neighbours] = WeakKeyDictionary()
_neighbours_lock = threading.Lock()


def neighbours_of(own: Own) -> Neighbours:
    with _neighbours_lock:
        return _neighbours.setdefault(own, Neighbours())


Around = Annotated[Neighbours, Depends(neighbours_of)]


# --- the JSON API ----------------------------------------------------------------------------------------------------


@router.get("/api/projects")
def list_projects(own: Own, around: Around) -> list[ProjectCard]:
    """All connected projects."""
    with own.store.read() as connection:
        opened = views.open_project_ids(connection)
    progress = {project_id: around.progress(own, project_id) for project_id in opened}
    with own.store.read() as connection:
        return views.cards(connection, progress)


@router.get("/api/projects/{project_id}", responses=ERRORS)
def show_project(project_id: ProjectId, own: Own, around: Around) -> ProjectView:
    """State, learning curve, rounds and verdict of one project."""
    progress = around.progress(own, project_id)
    with own.store.read() as connection:
        return views.project_view(connection, project_id, progress, own.settings.label_studio_url)


@router.get("/api/projects/{project_id}/status", responses=ERRORS)
def show_status(project_id: ProjectId, own: Own, around: Around) -> LiveStatus:
    """What changes from second to second; asked for every two."""
    progress = around.progress(own, project_id)
    with own.store.read() as connection:
        status = views.status_of(connection, get_project(connection, project_id), progress)
    away = around.away(own)
    return LiveStatus(**dict(told_once(status, away)), away=away)


def told_once(status: ProjectStatus, away: list[str]) -> ProjectStatus:
    """Without the sentences that the page's first banners say: what a step waits for is said there already."""
    detail = status.now.detail
    for sentence in away:
        detail = detail.replace(f": {sentence}", ".")
    problem = None if status.problem in away else status.problem
    now = status.now.model_copy(update={"detail": detail})
    return status.model_copy(update={"now": now, "problem": problem})


@router.get("/api/projects/{project_id}/rounds", responses=ERRORS)
def list_rounds(project_id: ProjectId, own: Own) -> list[RoundView]:
    """All rounds of a project, newest first."""
    with own.store.read() as connection:
        return views.round_views(connection, project_id)


@router.get("/api/projects/{project_id}/batch", responses=ERRORS)
def show_batch(project_id: ProjectId, own: Own, offset: Offset = 0, limit: Limit = views.PAGE) -> BatchView:
    """The current batch in rank order."""
    with own.store.read() as connection:
        batch = views.batch_view(connection, project_id, own.settings.label_studio_url, offset, limit)
        return batch_view.explained(connection, own, project_id, batch)


@router.get("/api/projects/{project_id}/selection", responses=ERRORS)
def show_selection(project_id: ProjectId, own: Own) -> SelectionView:
    """How the current batch was chosen: strategy, options, and what there is to know about it."""
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        if project.published_round_id is None:
            raise NotFound(f"project {project_id} has no published batch yet")
        number = get_round(connection, project.published_round_id).number
    manifest = json.loads(own.artifacts.get(round_key(project_id, number, "manifest.json")))
    return SelectionView.model_validate({name: manifest[name] for name in SelectionView.model_fields})


@router.get("/api/projects/{project_id}/rounds/{number}/manifest.json", responses=ERRORS)
def download_manifest(project_id: ProjectId, number: Annotated[int, Path(ge=0, le=MAX_ID)], own: Own) -> Response:
    """The batch a round chose, with every task's rank, utility and its parts, as it was written."""
    with own.store.read() as connection:
        get_project(connection, project_id)
    content = own.artifacts.get(round_key(project_id, number, "manifest.json"))
    name = f"hardfirst-p{project_id}-r{number}.json"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return Response(content, media_type="application/json", headers=headers)


@router.post("/api/projects/{project_id}/rounds", status_code=201, responses={**ERRORS, 409: {"model": Problem}})
def start_round(project_id: ProjectId, own: Own) -> RoundView:
    """Open a round now, whatever the trigger says."""
    with own.store.write() as connection:
        rounds.open_round(connection, project_id, "an admin started it")
        opened = views.round_views(connection, project_id)[0]
    send_waiting(own)
    return opened


@router.post("/api/projects/{project_id}/rounds/cancel", responses={**ERRORS, 409: {"model": Problem}})
def cancel_round(project_id: ProjectId, own: Own) -> RoundView:
    """Cancel the open round. What was published before stays; a training that runs is ended."""
    with own.store.write() as connection:
        get_project(connection, project_id)
        running = open_round_of(connection, project_id)
        training = (
            select(steps.c.id, steps.c.attempt)
            .join(round_rows, round_rows.c.id == steps.c.round_id)
            .where(steps.c.round_id == (running.id if running else -1))
            .where(steps.c.kind == "train", steps.c.state.in_(("sent", "running")))
        )
        jobs = connection.execute(training).all()
        number = rounds.cancel_round(connection, project_id)
        cancelled = next(row for row in views.round_views(connection, project_id) if row.number == number)
    _stop_jobs(own, project_id, [(job.id, job.attempt) for job in jobs])
    return cancelled


def _stop_jobs(own: Services, project_id: int, jobs: list[tuple[int, int]]) -> None:
    """The store has fenced them off already; this only frees the worker sooner."""
    try:
        for step_id, attempt in jobs:
            queue.stop_step(own.redis, step_id, attempt)
        queue.clear_progress(own.redis, project_id)
    except QueueUnavailable:
        return  # the worker sees it at the next renewal of its lease


@router.post("/api/projects/{project_id}/stop", responses=ERRORS)
def accept_stop(project_id: ProjectId, body: StopRequest, own: Own, around: Around) -> LiveStatus:
    """Accept the stop, or withdraw that: labels that came meanwhile may then open a round at once."""
    with own.store.write() as connection:
        rounds.accept_stop(connection, project_id, body.accepted)
        rounds.open_round_if_triggered(connection, project_id)
    send_waiting(own)
    return show_status(project_id, own, around)


# --- thumbnails ------------------------------------------------------------------------------------------------------


@router.get(
    "/api/projects/{project_id}/tasks/{task_id}/thumbnail.jpg",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {}}, "description": "At most 320 pixels a side."},
        404: {"model": Problem},
        415: {"content": {"image/svg+xml": {}}, "description": "A placeholder: the image cannot be read."},
        503: {"content": {"image/svg+xml": {}}, "description": "A placeholder: the image is not to be had now."},
    },
)
async def show_thumbnail(
    project_id: ProjectId, task_id: Annotated[int, Path(ge=0, le=MAX_ID)], own: Own, around: Around
) -> Response:
    """A task's image, small. Fetched once, by few threads of its own: Label Studio's calls must never wait for it."""
    image = await run_in_threadpool(_image_of, own, project_id, task_id)
    cached = thumbnail_path(own, project_id, task_id, image)
    if not cached.is_file():
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(around.fetching, make_thumbnail, own, task_id, image, cached)
        try:
            await asyncio.wait_for(work, THUMBNAIL_SECONDS)
        except ImageUnusable:
            return _placeholder("cannot be read", 415)
        except (HardfirstError, TimeoutError):  # Label Studio is away, or refuses the token: the page says it
            return _placeholder("not available now", 503)
    content = await run_in_threadpool(cached.read_bytes)
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})


def _image_of(own: Services, project_id: int, task_id: int) -> str:
    """
    Raises:
        NotFound: the store knows no such task of that project: nothing else is ever fetched.
    """
    query = select(tasks.c.image).where(tasks.c.project_id == project_id, tasks.c.task_id == task_id)
    with own.store.read() as connection:
        found = connection.execute(query.where(tasks.c.deleted.is_(False))).scalar_one_or_none()
    if found is None:
        raise NotFound(f"project {project_id} has no task {task_id} here")
    return str(found)


def thumbnail_path(own: Services, project_id: int, task_id: int, image: str) -> FilePath:
    """Where the thumbnail is kept, about 15 kB each; the folder may be deleted at any time."""
    folder = own.settings.data_dir.resolve() / "cache" / "thumbs"
    return folder / f"{project_id}-{task_id}-{views.image_digest(image)}.jpg"


def make_thumbnail(own: Services, task_id: int, image: str, path: FilePath) -> None:
    content = thumbnail(own.images.fetch({"image": image}, "image", task_id), own.images.max_pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        part.write(content)
    os.replace(part.name, path)  # readers see all of it or none


def thumbnail(content: bytes, max_pixels: int) -> bytes:
    """An image file as a JPEG of at most 320 pixels a side, in the displayed frame, without metadata.

    Raises:
        ImageUnusable: not an image, damaged, or too large.
    """
    pixels = _drafted(content, max_pixels) or decode_image(content, max_pixels)
    pixels.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    pixels.save(small, "JPEG", quality=THUMBNAIL_QUALITY)
    return small.getvalue()


def _drafted(content: bytes, max_pixels: int) -> Image.Image | None:
    """A JPEG decoded at an eighth to a half of its size, which takes a tenth of the time. None: decode it in full."""
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
        if image.width * image.height > max_pixels:
            return None
        image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
        image.load()
    except (OSError, SyntaxError, ValueError, ImportError, Image.DecompressionBombError):
        return None  # the full decoder says what is wrong with it (ImportError: ultralytics patches Image.open)
    plain = to_rgb(upright(image)).copy()
    plain.info = {}
    return plain


def _placeholder(words: str, status: int) -> Response:
    """Browsers show the body of an <img> whatever its status is."""
    picture = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="320" height="240" viewBox="0 0 320 240">'
        '<rect width="320" height="240" fill="#8a94a6" fill-opacity=".18"/>'
        '<path d="M118 132l28-34 22 26 14-16 26 30z" fill="#8a94a6" fill-opacity=".55"/>'
        '<circle cx="190" cy="92" r="9" fill="#8a94a6" fill-opacity=".55"/>'
        '<text x="160" y="172" text-anchor="middle" font-family="sans-serif" font-size="15" fill="#8a94a6">'
        f"{words}</text></svg>"
    )
    headers = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Response(picture, status, headers, media_type="image/svg+xml")


# --- the page --------------------------------------------------------------------------------------------------------


@router.get("/", include_in_schema=False)
def overview_page(request: Request, own: Own, around: Around) -> HTMLResponse:
    found = list_projects(own, around)
    doctor = doctor_view.examiner_of(own).view(None)
    return render(request, own, "overview.html", cards=found, away=around.away(own), doctor=doctor, doctor_of=None)


@router.get("/projects/{project_id}", include_in_schema=False)
def project_page(
    request: Request, project_id: ProjectId, own: Own, around: Around, shown: Limit = views.PAGE
) -> HTMLResponse:
    try:
        project = show_project(project_id, own, around)
        batch = show_batch(project_id, own, 0, shown)
    except NotFound as error:
        return render(request, own, "missing.html", status=404, detail=str(error), away=around.away(own))
    with own.store.read() as connection:
        measuring = curve_view.measuring_view(connection, project_id)
        work = operations_view.work_view(connection, project_id, around.ask_queue(own, crew.crew))
        settings = settings_view.settings_view(connection, project_id)
    suspects = suspects_view.suspects_of(own, around.ask_queue, project_id)
    away = around.away(own)
    project = project.model_copy(update={"status": told_once(project.status, away)})
    return render(
        request, own, "project.html", project=project, batch=batch, measuring=measuring,
        page=views.PAGE, most=views.MAX_PAGE, work=work, settings=settings, suspects=suspects, away=away,
        doctor=doctor_view.examiner_of(own).view(project_id), doctor_of=project_id,
    )  # fmt: skip


def render(request: Request, own: Services, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A template as a page, or a part of one."""
    root = str(request.scope.get("root_path", "")).rstrip("/")
    html = _templates().get_template(template).render(
        root=root,
        backend_url=str(request.base_url).rstrip("/"),
        label_studio_url=own.settings.label_studio_url,
        guarded=bool(own.settings.user),
        asset=lambda name: f"{root}/static/{name}?v={_static(name)[1][:16]}",
        **values,
    )  # fmt: skip
    return HTMLResponse(html, status, PAGE_HEADERS)


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,  # titles, labels and file names are Label Studio's: hostile
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"duration": views.duration_words, "moment": moment_words}
    made.filters |= {"signed": signed_words, "number": number_words}
    made.filters["money"] = _money
    return made


def moment_words(at: float) -> str:
    """ISO 8601; the page's script turns it into the reader's own time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def signed_words(value: float, places: int = 3) -> str:
    text = f"{value:+.{places}f}"
    return text.replace("-", "−") if float(text) else f"±{0:.{places}f}"


def _money(value: float) -> str:
    """Whole amounts, but cents where there is nothing else; the currency is the settings' own business."""
    text = number_words(round(abs(value))) if abs(value) >= 1 else f"{abs(value):.2f}"
    return f"−{text}" if value < 0 and float(f"{value:.2f}") else text


def number_words(value: int) -> str:
    """80 000: a thin space, which no language reads as a decimal point."""
    return f"{value:,}".replace(",", "\u2009")


# --- its files -------------------------------------------------------------------------------------------------------


@router.get("/static/{name}", include_in_schema=False)
def static_file(name: str, request: Request) -> Response:
    """One of the page's own files. Nothing comes from another host."""
    if name not in STATIC and name != PLOTLY:
        raise NotFound(f"there is no file {name[:80]!r}")
    content, digest = _static(name)
    headers = {"ETag": f'"{digest}"', "Cache-Control": YEAR, "Vary": "Accept-Encoding"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    kind = STATIC.get(name, "text/javascript")
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(_packed(name), media_type=kind, headers={**headers, "Content-Encoding": "gzip"})
    return Response(content, media_type=kind, headers=headers)


@cache
def _static(name: str) -> tuple[bytes, str]:
    """Content and SHA-256."""
    if name == PLOTLY:
        from plotly.offline import get_plotlyjs  # here: /health must not wait for it

        content = str(get_plotlyjs()).encode()
    else:
        content = (HERE / "static" / name).read_bytes()
    return content, sha256(content)


@cache
def _packed(name: str) -> bytes:
    return gzip.compress(_static(name)[0], 6)
