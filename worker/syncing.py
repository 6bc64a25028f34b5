"""The store's copy of a project's tasks and annotations, brought to what Label Studio has."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, select, update

from worker import rounds
from worker.boxes import LabelMap
from worker.services import Services
from worker.store import (
    get_project,
    projects,
    task_annotations,
    tasks,
)

SPLIT_FIELD = "hardfirst"  # a task whose data says {"hardfirst": "holdout"} is in the holdout: bring your own


def sync_project(own: Services, project_id: int, *, everything: bool = False) -> None:
    """Bring the store's copy of tasks and annotations to what Label Studio has.

    Counters decide whether there is anything to do, unless `everything`: listing 80,000 tasks takes a minute.
    """
    remote = own.label_studio.project(project_id)
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        stale = everything or _counters_differ(connection, project_id, remote)
    label_config = str(remote.get("label_config") or project.label_config)
    if stale:
        key = LabelMap.from_config(label_config).image_key
        images: dict[int, str] = {}
        declared: list[int] = []
        for page in own.label_studio.tasks(project_id):
            images |= {int(task["id"]): str((task.get("data") or {}).get(key) or "") for task in page}
            declared += [int(task["id"]) for task in page if (task.get("data") or {}).get(SPLIT_FIELD) == "holdout"]
        found = [
            {**annotation, "task": task["id"]}
            for page in own.label_studio.tasks(project_id, labelled_only=True)
            for task in page
            for annotation in task.get("annotations") or []
        ]
    with own.store.write() as connection:
        values = {"title": str(remote.get("title") or "")[:200], "label_config": label_config}
        connection.execute(update(projects).where(projects.c.id == project_id).values(**values))
        if not stale:
            return
        rounds.remember_tasks(connection, project_id, images)
        rounds.declare_holdout(connection, project_id, declared)
        rounds.forget_missing_tasks(connection, project_id, set(images))
        _note_missing_images(connection, project_id, images, key)
        rounds.remember_annotations(connection, project_id, found)
        kept = {int(annotation["id"]) for annotation in found}
        known = connection.execute(
            select(task_annotations.c.annotation_id).where(task_annotations.c.project_id == project_id)
        ).scalars()
        rounds.forget_annotations(connection, project_id, [key for key in known.all() if key not in kept])
        connection.execute(update(projects).where(projects.c.id == project_id).values(reconciled_at=time.time()))


def _note_missing_images(connection: Connection, project_id: int, images: Mapping[int, str], key: str) -> None:
    missing = [task_id for task_id, image in images.items() if not image]
    for task_id in missing:
        row = (tasks.c.project_id == project_id, tasks.c.task_id == task_id)
        connection.execute(update(tasks).where(*row).values(image_problem=f"the task's data has no field {key!r}"))


def _counters_differ(connection: Connection, project_id: int, remote: Mapping[str, Any]) -> bool:
    n_tasks = connection.execute(
        select(func.count()).select_from(tasks).where(tasks.c.project_id == project_id, ~tasks.c.deleted)
    ).scalar_one()
    query = select(func.count()).select_from(task_annotations).where(task_annotations.c.project_id == project_id)
    real = connection.execute(query.where(~task_annotations.c.cancelled)).scalar_one()
    skipped = connection.execute(query.where(task_annotations.c.cancelled)).scalar_one()
    ours = (n_tasks, real, skipped)
    theirs = tuple(
        int(remote.get(name) or 0) for name in ("task_number", "total_annotations_number", "skipped_annotations_number")
    )
    return ours != theirs
