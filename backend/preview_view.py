"""A previewed batch for the page: the tasks it would ask for, and what is different from the batch that is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from backend.batch_view import class_balance, explain, measure_of, weights_of
from backend.views import BatchTask, tasks_of_round
from worker.store import get_project

SHOWN = 24


class View(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ClassChange(View):
    """Boxes predicted of one class: in the batch that is served and not labelled yet, and in the previewed one."""

    name: str
    now: int
    previewed: int
    rare: bool


class PreviewView(View):
    """A batch under other settings. Of the served batch, without its holdout and what is labelled, `compared` tasks are
    left: `same` of them are among the `picked` ones here too."""

    id: str
    state: Literal["waiting", "ready", "failed"]
    detail: str = ""
    settings: dict[str, Any] = {}
    round_number: int | None = None
    strategy: str = ""
    total: int = 0
    picked: int = 0
    compared: int = 0
    same: int = 0
    seconds: float = 0.0
    notes: list[str] = []
    classes: list[ClassChange] = []
    tasks: list[BatchTask] = []
    new_task_ids: list[int] = []


def preview_view(
    connection: Connection, project_id: int, preview_id: str, found: Mapping[str, Any], url: str
) -> PreviewView:
    """
    Args:
        found: what `worker.preview.find` gave.
    """
    if found["state"] != "ready":
        detail = str(found.get("detail") or "")
        return PreviewView(id=preview_id, state=found["state"], detail=detail, settings=found.get("settings") or {})
    shown = [one for one in found["tasks"] if isinstance(one, dict)][:SHOWN]
    return PreviewView(
        id=preview_id,
        state="ready",
        settings=found.get("settings") or {},
        round_number=found["round"],
        strategy=found["strategy"],
        total=found["total"],
        picked=found["picked"],
        compared=found["compared"],
        same=found["same"],
        seconds=found["seconds"],
        notes=found["notes"],
        classes=_classes(found),
        tasks=_tasks(connection, project_id, found, shown, url),
        new_task_ids=[one["task_id"] for one in shown if one.get("now") is None and one.get("utility") is not None],
    )


def _classes(found: Mapping[str, Any]) -> list[ClassChange]:
    rare = {one.name for one in class_balance(found["labelled_boxes"], found["classes"]) if one.rare}
    now, then = found["classes_now"], found["classes"]
    names = sorted({*now, *then}, key=lambda name: (name not in rare, -int(then.get(name) or 0), name))
    return [
        ClassChange(name=name, now=int(now.get(name) or 0), previewed=int(then.get(name) or 0), rare=name in rare)
        for name in names
    ]


def _tasks(
    connection: Connection, project_id: int, found: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], url: str
) -> list[BatchTask]:
    project = get_project(connection, project_id)
    ids = [int(one["task_id"]) for one in shown]
    views = {one.task_id: one for one in tasks_of_round(connection, project, project.published_round_id, ids, url)}
    strategy, options = found["strategy"], found["options"]
    weights, measure = weights_of(strategy, options), measure_of(strategy, options)
    made = []
    for rank, one in enumerate(shown):
        if (task := views.get(int(one["task_id"]))) is None:
            continue  # deleted in Label Studio meanwhile
        told = {name: None if task.holdout else one.get(name) for name in ("utility", "uncertainty", "diversity")}
        fresh = task.model_copy(update={"rank": rank, **told})
        made.append(explain(fresh, one, strategy, weights, measure, project_id, url))
    return made
