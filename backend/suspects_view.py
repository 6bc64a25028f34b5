"""Suspect labels for the page: what the job found, without what was changed since; asks for the job where it is due."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from redis import Redis
from sqlalchemy import Connection, Row, select

from backend.views import Box, class_colours, image_digest, task_url
from worker import queue, rounds
from worker.errors import Conflict
from worker.services import Services
from worker.store import get_project, task_annotations, tasks
from worker.suspects import TIMEOUT, stored_suspects

SHOWN = 12
KEPT_SECONDS = 15.0  # read so long ago, it is read again
RETRY_SECONDS = 300  # a job that failed is asked for again
AGAIN_SECONDS = 10

Kind = Literal["missing", "class", "extra"]
_kept: dict[tuple[str, int], tuple[float, dict[str, Any] | None]] = {}
_kept_lock = threading.Lock()


class View(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class SuspectView(View):
    """A label that may be wrong, in words, with the box in question. `suspicion` 0..1."""

    task_id: int
    kind: Kind
    words: str
    suspicion: float
    holdout: bool
    box: Box
    image_width: int
    image_height: int
    thumbnail: str
    label_studio: str


class SuspectsView(View):
    """`state`: "none" before the first training, "waiting" while a worker looks. `fixed`: changed since it looked."""

    state: Literal["none", "waiting", "ready"]
    detail: str = ""
    made_at: float | None = None
    images: int = 0
    counts: dict[str, int] = {}
    fixed: int = 0
    suspects: list[SuspectView] = []


def suspects_of(
    own: Services, ask_queue: Callable[[Services, Callable[[Redis], bool]], bool | None], project_id: int
) -> SuspectsView:
    """What there is; where nothing is, a worker is asked to look, once. Waits for nobody.

    Raises:
        NotFound: the project is not connected.
    """
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        try:
            source = rounds.selectable_round(connection, project_id)
        except Conflict:
            return SuspectsView(state="none", detail="After the first training.")
    found = _recent(own, project_id, source)
    if found is None:
        asked = ask_queue(own, lambda conn: look_for_suspects(conn, project_id, source.id))
        away = asked is None
        words = "A worker looks for them when Redis is back." if away else "A worker compares labels and detections."
        return SuspectsView(state="waiting", detail=words)
    with own.store.read() as connection:
        return _view(connection, project, found, own.settings.label_studio_url)


def look_for_suspects(conn: Redis, project_id: int, round_id: int, again: bool = False) -> bool:
    """Ask a worker to look, unless it was asked already; `again`: even if it has looked.

    Raises:
        QueueUnavailable: Redis does not answer.
    """
    job_id = f"suspects-{project_id}-{round_id}" + (f"-{int(time.time() // AGAIN_SECONDS)}" if again else "")
    args = (project_id, round_id)
    return queue.enqueue_unique(
        conn, queue.CONTROL, "worker.jobs.suspects", args, job_id, timeout=TIMEOUT, ttl=RETRY_SECONDS
    )


def _recent(own: Services, project_id: int, source: Row[Any]) -> dict[str, Any] | None:
    key = (f"{own.settings.store_url} {source.opened_at}", int(source.id))
    with _kept_lock:
        at, found = _kept.get(key, (-KEPT_SECONDS, None))
    if found is None or time.monotonic() - at > KEPT_SECONDS:
        found = stored_suspects(own, project_id, source.number)
        with _kept_lock:
            _kept.clear() if len(_kept) > 50 else None
            _kept[key] = (time.monotonic(), found)
    return found


def _view(connection: Connection, project: Row[Any], found: Mapping[str, Any], url: str) -> SuspectsView:
    told = [one for one in found["suspects"] if isinstance(one, dict)]
    ids = sorted({int(one["task_id"]) for one in told})
    updated = _updated(connection, project.id, ids)
    images = _images(connection, project.id, ids)
    still = [one for one in told if one["task_id"] in images and _unchanged(one, updated)]
    colours = class_colours(project)
    return SuspectsView(
        state="ready",
        made_at=found["made_at"],
        images=found["images"],
        counts=found["counts"],
        fixed=len(told) - len(still),
        suspects=[_suspect(one, project.id, images[one["task_id"]], url, colours) for one in still],
    )


def _updated(connection: Connection, project_id: int, task_ids: Sequence[int]) -> dict[int, str]:
    """Annotation id -> when it was changed last, as far as the store knows."""
    columns = (task_annotations.c.annotation_id, task_annotations.c.updated_at)
    query = select(*columns).where(
        task_annotations.c.project_id == project_id,
        task_annotations.c.task_id.in_(task_ids),
        task_annotations.c.cancelled.is_(False),
    )
    return {int(row.annotation_id): str(row.updated_at) for row in connection.execute(query)}


def _images(connection: Connection, project_id: int, task_ids: Sequence[int]) -> dict[int, str]:
    query = select(tasks.c.task_id, tasks.c.image).where(
        tasks.c.project_id == project_id, tasks.c.task_id.in_(task_ids), tasks.c.deleted.is_(False)
    )
    return {int(row.task_id): str(row.image) for row in connection.execute(query)}


def _unchanged(one: Mapping[str, Any], updated: Mapping[int, str]) -> bool:
    """An annotation that is gone or newer than what was compared is not accused any more."""
    annotation_id = one.get("annotation_id")
    return annotation_id is None or updated.get(int(annotation_id), "gone") <= str(one.get("updated_at") or "~")


def _suspect(
    one: Mapping[str, Any], project_id: int, image: str, url: str, colours: Mapping[str, int]
) -> SuspectView:
    label = str(one["seen"] or one["labelled"])
    x, y, width, height = one["box_percent"]
    box = Box(label=label, x=x, y=y, width=width, height=height, score=None, colour=colours.get(label, 0))
    task_id = int(one["task_id"])
    return SuspectView(
        task_id=task_id,
        kind=one["kind"],
        words=words_of(one),
        suspicion=one["suspicion"],
        holdout=bool(one["holdout"]),
        box=box,
        image_width=one["width"] or 4,
        image_height=one["height"] or 3,
        thumbnail=f"/api/projects/{project_id}/tasks/{task_id}/thumbnail.jpg?v={image_digest(image)}",
        label_studio=task_url(url, project_id, task_id),
    )


def words_of(one: Mapping[str, Any]) -> str:
    """What is wrong with it, perhaps."""
    share = f"{one['suspicion']:.2f}".lstrip("0")
    if one["kind"] == "missing":
        return f"Missing box? {one['seen']} {share} is seen where no label is."
    if one["kind"] == "class":
        return f"Other class? Labelled {one['labelled']}, seen as {one['seen']} {share}."
    percent = round(100 * one["suspicion"])
    return f"Extra box? Nothing is seen at this {one['labelled']}, though {percent} % of them are found."
