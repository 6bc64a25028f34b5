"""A project's report: one HTML file that needs nothing else, to keep and to send. No script, no request, no link to us.

It is what the page shows at one moment: verdict and reasons, learning curve, rounds and what they bought, classes, the
batch, settings. Charts are SVG, thumbnails are data: URIs, and its own content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from backend import batch_view, curve_view, settings_view, views
from backend.admin import ERRORS, ProjectId, make_thumbnail, moment_words, number_words, signed_words, thumbnail_path
from backend.curve_view import CurveView
from backend.ml_api import Own
from backend.views import BatchTask
from worker.errors import HardfirstError
from worker.services import Services
from worker.store import tasks

THUMBNAILS = 24  # about 15 kB each
THUMBNAIL_SECONDS = 10.0  # for all that are not at hand
AT_ONCE = 4
DRAWING = threading.BoundedSemaphore(AT_ONCE)  # of all reports: a large image takes hundreds of MB for a moment
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 52, 20, 14, 40  # of the chart, and its margins
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

router = APIRouter(tags=["admin"])


@router.get(
    "/api/projects/{project_id}/report.html",
    response_class=Response,
    responses={**ERRORS, 200: {"content": {"text/html": {}}, "description": "One file, to keep and to send."}},
)
def download_report(project_id: ProjectId, own: Own) -> Response:
    """The project's report as one HTML file."""
    headers = {
        "Content-Disposition": f'attachment; filename="hardfirst-p{project_id}.html"',
        "Content-Security-Policy": POLICY,
        "Cache-Control": "no-store",
    }
    return Response(render_report(own, project_id), media_type="text/html", headers=headers)


def render_report(own: Services, project_id: int, thumbnails: int = THUMBNAILS) -> str:
    """The report as HTML.

    Args:
        thumbnails: at most so many of the batch, in rank order; those that cannot be had in time are left out.

    Raises:
        NotFound: the project is not connected.
    """
    url = own.settings.label_studio_url
    with own.store.read() as connection:
        project = views.project_view(connection, project_id, {}, url)
        measuring = curve_view.measuring_view(connection, project_id)
        settings = settings_view.settings_view(connection, project_id)
        batch = batch_view.explained(
            connection, own, project_id, views.batch_view(connection, project_id, url, 0, max(thumbnails, 1))
        )
        images = {
            int(row.task_id): str(row.image)
            for row in connection.execute(
                tasks.select().where(
                    tasks.c.project_id == project_id, tasks.c.task_id.in_([one.task_id for one in batch.tasks])
                )
            )
        }
    shown = batch.tasks[:thumbnails]
    return (
        _template()
        .get_template("report.html")
        .render(
            project=project,
            measuring=measuring,
            settings=settings,
            batch=batch,
            shown=shown,
            pictures=_pictures(own, project_id, shown, images),
            chart=curve_chart(measuring.curve),
            made_at=time.time(),
            policy=POLICY,
        )
    )


@cache
def _template() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # titles, labels and file names are Label Studio's: hostile
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "duration": views.duration_words,
        "moment": moment_words,
        "signed": signed_words,
        "number": number_words,
    }
    return made


# --- thumbnails ------------------------------------------------------------------------------------------------------


def _pictures(own: Services, project_id: int, shown: Sequence[BatchTask], images: Mapping[int, str]) -> dict[int, str]:
    """Task id -> data: URI. Those at hand, and those that come within the time; without Label Studio none comes."""
    found: dict[int, str] = {}
    with _hands() as pool:
        jobs = {
            one.task_id: pool.submit(_thumbnail, own, project_id, one.task_id, images[one.task_id])
            for one in shown
            if one.task_id in images
        }
        deadline = time.monotonic() + THUMBNAIL_SECONDS
        for task_id, job in jobs.items():
            try:
                content = job.result(max(deadline - time.monotonic(), 0.0))
            except (HardfirstError, OSError, TookTooLong):  # OSError: no room for it, or somebody emptied the cache
                continue  # the report has a box that says so
            found[task_id] = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    return found


@contextmanager
def _hands() -> Iterator[ThreadPoolExecutor]:
    """Threads that nobody waits for at the end: an image may take longer than the report does."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="report")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _thumbnail(own: Services, project_id: int, task_id: int, image: str) -> bytes:
    path = thumbnail_path(own, project_id, task_id, image)
    if not path.is_file():
        with DRAWING:
            make_thumbnail(own, task_id, image, path)
    return path.read_bytes()


# --- the learning curve ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    at: float
    words: str


@dataclass(frozen=True)
class Spot:
    """A measured round, or what is expected of the next: pixels of the chart; `low` and `high` end its interval."""

    x: float
    y: float
    low: float | None
    high: float | None
    words: str


@dataclass(frozen=True)
class Chart:
    """The learning curve in a picture of WIDTH x HEIGHT: points, fitted line, band; ticks of both axes."""

    spots: list[Spot]
    expected: Spot | None
    curve: str
    fit: str
    band: str
    knee: Tick | None
    across: list[Tick]
    up: list[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    floor: int = HEIGHT - BOTTOM
    top: int = TOP


def curve_chart(curve: CurveView) -> Chart | None:
    """None: nothing was measured yet."""
    if not curve.points:
        return None
    next_ = curve.next
    furthest = max([point.labels for point in curve.points] + [next_.labels if next_ else 1, 1])
    tops = [max(point.map50, point.high or 0.0) for point in curve.points] + [next_.high if next_ else 0.0, 0.1]
    x_ticks, y_ticks = nice_ticks(furthest), nice_ticks(min(max(tops), 1.0))
    most_x, most_y = max(furthest * 1.04, x_ticks[-1]), y_ticks[-1]

    def x(labels: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * labels / most_x, 1)

    def y(map50: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(map50 / most_y, 0.0), 1.0), 1)

    def spot(labels: int, map50: float, low: float | None, high: float | None, words: str) -> Spot:
        told = f"{words}: {labels} labels, mAP50 {map50:.3f}"
        told += "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
        return Spot(x(labels), y(map50), None if low is None else y(low), None if high is None else y(high), told)

    spots = [spot(p.labels, p.map50, p.low, p.high, f"round {p.round_number}") for p in curve.points]
    band = [(x(at), y(high)) for at, _, high in curve.band] + [(x(at), y(low)) for at, low, _ in reversed(curve.band)]
    return Chart(
        spots=spots,
        expected=spot(next_.labels, next_.map50, next_.low, next_.high, "expected of the next") if next_ else None,
        curve=_polyline([(one.x, one.y) for one in spots]),
        fit=_polyline([(x(at), y(map50)) for at, map50 in curve.line]),
        band=_polyline(band),
        knee=Tick(x(curve.knee), f"knee: {curve.knee} labels") if curve.knee is not None else None,
        across=[Tick(x(tick), f"{tick:g}") for tick in x_ticks],
        up=[Tick(y(tick), f"{tick:.2g}") for tick in y_ticks],
    )


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def nice_ticks(most: float) -> list[float]:
    """0 and three to seven round steps, the last at or above `most` (> 0)."""
    power = 10.0 ** (len(f"{most:.0f}") - 1) if most >= 1 else 0.1
    step = next(factor * power for factor in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if most / (factor * power) <= 6.5)
    count = int(most / step) + (1 if most / step > int(most / step) + 1e-9 else 0)
    return [round(step * index, 10) for index in range(max(count, 1) + 1)]
