"""A batch as it would be under other settings, from the scores there are. Redis keeps it for a while, the store never.

What a preview shows is what a round opened with its settings publishes, as long as no label comes in between.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from redis import Redis
from sqlalchemy import Connection, Row, select

from worker import rounds
from worker.errors import HardfirstError, NotFound
from worker.publishing import MAX_ALIKE, choose, class_counts, scored_tasks
from worker.queue import redis_border
from worker.selection import Batch
from worker.services import Services
from worker.settings import ProjectSettings, parse_project_settings
from worker.store import get_project, latest_round, loads, scores
from worker.uncertainty import said_in_full

KEPT_SECONDS = 3600
SHOWN = 600  # tasks of the batch that the preview names
TIMEOUT = 900  # seconds the job may run
SELECTION_FIELDS = ("strategy", "strategy_options", "batch_size", "near_duplicate_threshold")


def preview_settings(connection: Connection, project_id: int, change: Mapping[str, Any]) -> dict[str, Any]:
    """What a round that only selects would be opened with: the published round's settings, the project's own for
    choosing a batch, and `change` of these. Not validated.

    Raises:
        NotFound, Conflict: as `rounds.selectable_round`.
    """
    source = rounds.selectable_round(connection, project_id)
    project = get_project(connection, project_id)
    scored = loads(source.settings)
    base = {name: value for name, value in scored.items() if name not in SELECTION_FIELDS}
    own = {name: value for name, value in loads(project.extra_params).items() if name in SELECTION_FIELDS}
    merged = {**base, **own, **change}
    if merged.get("strategy") != scored.get("strategy"):  # it is to read the scores that there are
        merged |= said_in_full(parse_project_settings(scored))
    return {name: value for name, value in merged.items() if value is not None}


def preview_key(project_id: int, preview_id: str) -> str:
    return f"hf:preview:{project_id}:{preview_id}"


def new_preview_id(settings: ProjectSettings) -> str:
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()
    return f"{digest[:12]}{time.time_ns() // 1_000_000:x}"


def keep(conn: Redis, project_id: int, preview_id: str, content: Mapping[str, Any]) -> None:
    """
    Raises:
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        conn.set(preview_key(project_id, preview_id), json.dumps(content), ex=KEPT_SECONDS)


def find(conn: Redis, project_id: int, preview_id: str) -> dict[str, Any]:
    """What is known of a preview: `state` is waiting, ready or failed.

    Raises:
        NotFound: it was made too long ago, or never.
        QueueUnavailable: Redis does not answer.
    """
    with redis_border():
        found: Any = conn.get(preview_key(project_id, preview_id))
    content = json.loads(found) if found else None
    if not isinstance(content, dict) or content.get("state") not in ("waiting", "ready", "failed"):
        raise NotFound("this preview is not kept any more: make it again")
    return content


def make_preview(own: Services, project_id: int, preview_id: str) -> None:
    """The job: choose the batch, compare it with the one that is published, keep both for the page."""
    asked = find(own.redis, project_id, preview_id)
    try:
        settings = parse_project_settings(asked.get("settings"))
        result = {"state": "ready", **preview(own, project_id, settings)}
    except HardfirstError as error:
        result = {"state": "failed", "detail": str(error)}
    except ValueError as error:  # a strategy that cannot work with these scores says what it lacks
        result = {"state": "failed", "detail": str(error)}
    except Exception as error:  # the page must not wait for it; RQ logs it
        failed = {"state": "failed", "detail": f"{type(error).__name__}: {str(error)[:300]}"}
        keep(own.redis, project_id, preview_id, {"settings": asked.get("settings"), **failed})
        raise
    keep(own.redis, project_id, preview_id, {"settings": asked.get("settings"), **result})


def preview(own: Services, project_id: int, settings: ProjectSettings) -> dict[str, Any]:
    """The batch under `settings`, and how it differs from the published one.

    Raises:
        NotFound, Conflict: as `rounds.selectable_round`.
    """
    began = time.monotonic()
    with own.store.read() as connection:
        source = rounds.selectable_round(connection, project_id)
        batch = _chosen(connection, own, project_id, source, settings)
        current = _published(connection, source.id)
        held = {one for one, is_held in rounds.holdout_of(connection, project_id).items() if is_held}
        labelled = rounds.task_ids_of_annotations(connection, project_id)
    picked = [one for one in batch.task_ids if one not in held]
    left = [one for one in current if one not in held and one not in labelled]
    return {
        "round": source.number,
        "strategy": batch.strategy,
        "options": batch.options,
        "notes": batch.notes,
        "total": len(batch.task_ids),
        "picked": len(picked),
        "compared": len(left),
        "same": len(set(picked) & set(left)),
        "tasks": [_shown(batch, task_id, current) for task_id in batch.task_ids[:SHOWN]],
        "classes": class_counts(own, source.id, picked),
        "classes_now": class_counts(own, source.id, left),
        "labelled_boxes": loads(source.report).get("boxes_per_class") or {},
        "seconds": round(time.monotonic() - began, 1),
    }


def _chosen(
    connection: Connection, own: Services, project_id: int, source: Row[Any], settings: ProjectSettings
) -> Batch:
    """As the next round would: with the random numbers of its number."""
    last = latest_round(connection, project_id)
    assert last is not None  # there is a published one
    scored = scored_tasks(connection, own, source)
    is_labelled = np.isin(scored.task_ids, list(rounds.task_ids_of_annotations(connection, project_id)))
    held = rounds.holdout_of(connection, project_id)
    barred = rounds.not_for_training(connection, project_id)
    return choose(scored, is_labelled, held, barred, settings, project_id, last.number + 1)


def _published(connection: Connection, round_id: int) -> dict[int, int]:
    """Task id -> rank, of the batch that is served now."""
    query = select(scores.c.task_id, scores.c.rank).where(scores.c.round_id == round_id, scores.c.rank.is_not(None))
    return {int(row.task_id): int(row.rank) for row in connection.execute(query)}


def _shown(batch: Batch, task_id: int, current: Mapping[int, int]) -> dict[str, Any]:
    alike = batch.alike.get(task_id, [])
    return {
        "task_id": task_id,
        "utility": batch.utilities.get(task_id),
        **batch.parts.get(task_id, {}),
        "alike": len(alike),
        "alike_task_ids": alike[:MAX_ALIKE],
        "now": current.get(task_id),
    }
