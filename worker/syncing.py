"""The store's copy of a project's tasks and annotations, brought to what Label Studio has."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from worker import rounds
from worker.boxes import LabelMap
from worker.errors import LabelConfigUnsupported
from worker.services import Services
from worker.store import (
    get_project,
    projects,
    record_event,
    task_annotations,
    tasks,
)

SPLIT_FIELD = "hardfirst"  # a task whose data says {"hardfirst": "holdout"} is in the holdout: bring your own


def sync_project(own: Services, project_id: int, *, everything: bool = False) -> None:
    """Bring the store's copy of tasks and annotations to what Label Studio has.

    Counters decide whether there is anything to do, unless `everything`: listing 80,000 tasks takes a minute.
    """
    remote = own.label_studio.project(project_id)
    with own.store.write() as connection:
        project = get_project(connection, project_id)
        label_config = _remember_config(connection, project, remote)
        stale = everything or _counters_differ(connection, project_id, remote)
    if stale:
        shapes = rounds.settings_of(project).shapes
        _sync_tasks(own, project_id, LabelMap.from_config(label_config, shapes).image_key)
        _sync_annotations(own, project_id)
        with own.store.write() as connection:
            here = update(projects).where(projects.c.id == project_id)
            connection.execute(here.values(reconciled_at=time.time()))


def sync_label_config(own: Services, project_id: int) -> None:
    """What may be labelled today: before boxes are read, or a label added a minute ago would not be known."""
    remote = own.label_studio.project(project_id)
    with own.store.write() as connection:
        _remember_config(connection, get_project(connection, project_id), remote)


def _remember_config(connection: Connection, project: Row[Any], remote: Mapping[str, Any]) -> str:
    label_config = str(remote.get("label_config") or project.label_config)
    values = {"title": str(remote.get("title") or "")[:200], "label_config": label_config}
    connection.execute(update(projects).where(projects.c.id == project.id).values(**values))
    if told := _label_changes(project, label_config):
        record_event(connection, project.id, "label config changed", detail=told)
    return label_config


def _label_changes(project: Row[Any], label_config: str) -> str:
    """Labels that came and went, in words; "" where none did, or where one of the configs is not for us."""
    if label_config == project.label_config:
        return ""
    shapes = rounds.settings_of(project).shapes
    try:
        before = LabelMap.from_config(project.label_config, shapes).labels
        after = LabelMap.from_config(label_config, shapes).labels
    except LabelConfigUnsupported:
        return ""
    came, went = [one for one in after if one not in before], [one for one in before if one not in after]
    told = [f"added: {', '.join(came)}"] if came else []
    told += [f"removed: {', '.join(went)}"] if went else []
    return "; ".join(told or ["in another order"] if before != after else told)[:500]


def _sync_tasks(own: Services, project_id: int, image_key: str) -> None:
    """Page by page: a transaction over 80,000 rows would keep webhooks waiting."""
    present: set[int] = set()
    declared: list[int] = []
    for page in own.label_studio.tasks(project_id):
        images = {int(task["id"]): str((task.get("data") or {}).get(image_key) or "") for task in page}
        declared += [int(task["id"]) for task in page if (task.get("data") or {}).get(SPLIT_FIELD) == "holdout"]
        present |= set(images)
        with own.store.write() as connection:
            rounds.remember_tasks(connection, project_id, images)
            _note_missing_images(connection, project_id, images, image_key)
    # Tasks deleted while the pages were read move the others: a page may have missed some that are there.
    is_whole = len(present) == int(own.label_studio.project(project_id).get("task_number") or 0)
    with own.store.write() as connection:
        rounds.declare_holdout(connection, project_id, declared)
        if is_whole:
            rounds.forget_missing_tasks(connection, project_id, present)


def _sync_annotations(own: Services, project_id: int) -> None:
    known = select(task_annotations.c.annotation_id).where(task_annotations.c.project_id == project_id)
    with own.store.read() as connection:
        before = set(connection.execute(known).scalars().all())  # what a webhook brings from now on is not missing
    kept: set[int] = set()
    for page in own.label_studio.tasks(project_id, labelled_only=True):
        found = [{**one, "task": task["id"]} for task in page for one in task.get("annotations") or []]
        kept |= {int(one["id"]) for one in found}
        with own.store.write() as connection:
            rounds.remember_annotations(connection, project_id, found)
    with own.store.write() as connection:
        rounds.forget_annotations(connection, project_id, before - kept)


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
