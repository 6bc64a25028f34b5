"""A project's report: one HTML file that needs nothing else, to keep and to send. No script, no request, no link to us.

It is what the page shows at one moment: verdict and reasons, learning curve, rounds and what they bought, classes, the
batch, settings. Charts are SVG, thumbnails are data: URIs, and its own content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from fastapi import APIRouter, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from backend import batch_view, curve_view, report_view, settings_view, views
from backend.admin import ERRORS, ProjectId, make_thumbnail, moment_words, number_words, signed_words, thumbnail_path
from backend.curve_view import CurveView
from backend.ml_api import Own
from backend.report_charts import Chart, Point, curve_chart, small_chart
from backend.report_view import Json
from backend.views import BatchTask
from worker.composition import RARE_SHARE
from worker.errors import HardfirstError
from worker.services import Services
from worker.store import tasks

THUMBNAILS = 24  # about 15 kB each
THUMBNAIL_SECONDS = 10.0  # for all that are not at hand
AT_ONCE = 4
DRAWING = threading.BoundedSemaphore(AT_ONCE)  # of all reports: a large image takes hundreds of MB for a moment
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

router = APIRouter(tags=["admin"])


@dataclass(frozen=True)
class Report:
    """The page, and its numbers in the shape of a simulation's `results.json`."""

    html: str
    results: Json


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
    """The report as HTML; see `make_report`."""
    return make_report(own, project_id, thumbnails).html


def make_report(own: Services, project_id: int, thumbnails: int = THUMBNAILS, fetch: bool = True) -> Report:
    """The report as HTML, and its numbers.

    Args:
        thumbnails: at most so many of the batch, in rank order; those that cannot be had in time are left out.
        fetch: images whose thumbnail is not kept from before are asked for.

    Raises:
        NotFound: the project is not connected.
    """
    url = own.settings.label_studio_url
    with own.store.read() as connection:
        project = views.project_view(connection, project_id, {}, url)
        measuring = curve_view.measuring_view(connection, project_id)
        settings = settings_view.settings_view(connection, project_id)
        live = report_view.live_view(connection, project_id)
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
    results = report_view.live_results(own, live)
    html = (
        _template()
        .get_template("report.html")
        .render(
            project=project,
            measuring=measuring,
            settings=settings,
            batch=batch,
            shown=shown,
            pictures=_pictures(own, project_id, shown, images, fetch),
            chart=curve_chart(measuring.curve),
            results=results,
            charts=small_charts(results, measuring.curve),
            rare_share=RARE_SHARE,
            made_at=results["made_at"],
            policy=POLICY,
        )
    )
    return Report(html, results)


def small_charts(results: Json, curve: CurveView) -> dict[str, Chart | None]:
    """mAP50 against `boxes` and annotators' `minutes`, and the `rare` classes' mean AP50 against labels."""
    rounds: Sequence[Json] = results["runs"][0]["rounds"]
    ends = {point.round_number: (point.low, point.high) for point in curve.points}
    found: dict[str, Chart | None] = {
        name: small_chart([_point(one, name, *ends.get(one["number"], (None, None))) for one in rounds if one[name]])
        for name in ("boxes", "minutes")
    }
    rare = [one for one in rounds if one["rare_ap50"] is not None]
    return found | {
        "rare": small_chart(
            [
                Point(one["labels"], one["rare_ap50"], None, None,
                      f"round {one['number']}: {one['labels']} labels, mean AP50 {one['rare_ap50']:.3f}")
                for one in rare
            ]
        )
    }  # fmt: skip


def _point(one: Json, name: str, low: float | None, high: float | None) -> Point:
    words = f"round {one['number']}: {one[name]:,.0f} {name}, mAP50 {one['map50']:.3f}"
    return Point(one[name], one["map50"], low, high, words)


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


def _pictures(
    own: Services, project_id: int, shown: Sequence[BatchTask], images: Mapping[int, str], fetch: bool
) -> dict[int, str]:
    """Task id -> data: URI. Those at hand, and those that come within the time; without Label Studio none comes."""
    deadline = time.monotonic() + THUMBNAIL_SECONDS
    jobs = {
        one.task_id: _in_background(partial(_thumbnail, own, project_id, one.task_id, images[one.task_id], deadline))
        for one in shown
        if one.task_id in images
        and (fetch or thumbnail_path(own, project_id, one.task_id, images[one.task_id]).is_file())
    }
    found: dict[int, str] = {}
    for task_id, job in jobs.items():
        try:
            content = job.result(max(deadline - time.monotonic(), 0.0))
        except (HardfirstError, OSError, TookTooLong):  # OSError: no room for it, or somebody emptied the cache
            continue  # the report has a box that says so
        found[task_id] = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    return found


def _in_background(work: Callable[[], bytes]) -> Future[bytes]:
    """In a thread that nobody waits for, not even the end of a command: an image may take longer than the report."""
    job: Future[bytes] = Future()

    def run() -> None:
        try:
            job.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            job.set_exception(error)

    threading.Thread(target=run, name="report", daemon=True).start()
    return job


def _thumbnail(own: Services, project_id: int, task_id: int, image: str, deadline: float) -> bytes:
    path = thumbnail_path(own, project_id, task_id, image)
    if not path.is_file():
        if not DRAWING.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            raise TookTooLong
        try:
            make_thumbnail(own, task_id, image, path)
        finally:
            DRAWING.release()
    return path.read_bytes()
