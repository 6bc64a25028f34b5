"""Why the tasks of a batch are in it: the parts of their utility, in figures and in words; look-alikes; classes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, Row, func, select

from backend.views import AlikeTask, BatchTask, BatchView, ClassBalance, task_url
from strategies.errors import StrategyError
from strategies.options import weights_in_sum
from worker.artifacts import round_key
from worker.errors import HardfirstError
from worker.reasons import reason
from worker.services import Services
from worker.store import get_project, loads, rounds, scores, task_annotations
from worker.work import MEASURES

RARE_SHARE = 0.5  # of the mean number of labelled boxes per class
MANIFESTS_KEPT = 16

_manifests: dict[tuple[str, int], Mapping[str, Any]] = {}
_manifests_lock = threading.Lock()


def manifest_of(own: Services, round_row: Row[Any]) -> Mapping[str, Any]:
    """What a published round wrote about its batch; it does not change any more. Empty: it is not to be had."""
    key = (f"{own.settings.store_url} {round_row.opened_at}", int(round_row.id))
    with _manifests_lock:
        if key in _manifests:
            return _manifests[key]
    try:
        content = own.artifacts.get(round_key(round_row.project_id, round_row.number, "manifest.json"))
        found = json.loads(content)
    except (HardfirstError, OSError, ValueError):
        return {}  # the page shows the batch without its reasons
    if not isinstance(found, dict):
        return {}
    tasks = {one["task_id"]: one for one in found.get("tasks", []) if isinstance(one, dict) and "task_id" in one}
    kept = {**found, "tasks": tasks}
    with _manifests_lock:
        _manifests[key] = kept
        while len(_manifests) > MANIFESTS_KEPT:
            _manifests.pop(next(iter(_manifests)))
    return kept


def explained(connection: Connection, own: Services, project_id: int, batch: BatchView) -> BatchView:
    """The batch with its reasons, its look-alikes, its class balance and its annotators' minutes.

    Raises:
        NotFound: the project is not connected.
    """
    project = get_project(connection, project_id)
    columns = [rounds.c[name] for name in ("id", "project_id", "number", "opened_at", "report")]
    published = connection.execute(select(*columns).where(rounds.c.id == project.published_round_id)).first()
    if published is None:
        return batch
    manifest = manifest_of(own, published)
    strategy = str(manifest.get("strategy", ""))
    options = manifest.get("options") or {}
    weights, measure = weights_of(strategy, options), measure_of(strategy, options)
    url = own.settings.label_studio_url
    told: Mapping[int, Any] = manifest.get("tasks", {})
    minutes, each = _minutes(connection, project_id, published.id)
    labelled = loads(published.report).get("boxes_per_class") or {}
    explained_one = partial(
        explain, strategy=strategy, weights=weights, measure=measure, project_id=project_id, url=url
    )
    return batch.model_copy(
        update={
            "tasks": [explained_one(one, told.get(one.task_id, {})) for one in batch.tasks],
            "balance": class_balance(labelled, manifest["classes"]) if "classes" in manifest else [],
            "minutes": minutes,
            "minutes_left": None if each is None else each * (batch.total - batch.labelled),
        }
    )


def weights_of(strategy: str, options: Mapping[str, Any]) -> tuple[float, float] | None:
    """Weights of uncertainty and diversity in the utility; None: it is no weighted sum."""
    try:
        return weights_in_sum(strategy, options)
    except StrategyError:
        return None


def explain(
    task: BatchTask,
    told: Mapping[str, Any],
    strategy: str,
    weights: tuple[float, float] | None,
    measure: str,
    project_id: int,
    url: str,
) -> BatchTask:
    """The task with its reasons. `told` is what the manifest says of it."""
    if task.holdout:
        return task
    alike = [one for one in told.get("alike_task_ids", []) if isinstance(one, int)]
    alpha, beta = weights or (0.0, 0.0)
    summed = weights is not None and task.uncertainty is not None and task.diversity is not None
    return task.model_copy(
        update={
            "from_uncertainty": alpha * (task.uncertainty or 0.0) if summed else None,
            "from_diversity": beta * (task.diversity or 0.0) if summed else None,
            "reason": words_for(task, strategy, measure),
            "alike": max(int(told.get("alike") or 0), len(alike)),
            "alike_links": [AlikeTask(task_id=one, label_studio=task_url(url, project_id, one)) for one in alike],
        }
    )


def words_for(task: BatchTask, strategy: str, measure: str) -> str:
    """Why this task, in words: what its utility is made of, and what was seen on it."""
    boxes = [(box.label, box.score) for box in task.boxes if box.score is not None]
    return reason(strategy, task.uncertainty, task.diversity, boxes, measure=measure)


def measure_of(strategy: str, options: Mapping[str, Any]) -> str:
    """Which uncertainty a strategy looks at."""
    return strategy if strategy in MEASURES else str(options.get("measure", MEASURES[0]))


def class_balance(labelled: Mapping[str, Any], predicted: Mapping[str, Any]) -> list[ClassBalance]:
    """Boxes per class, labelled and predicted in the batch, most labelled first. `rare`: below half of the mean."""
    names = sorted({*labelled, *predicted}, key=lambda name: (-int(labelled.get(name) or 0), str(name)))
    had, now = sum(map(int, labelled.values())), sum(map(int, predicted.values()))
    mean = had / len(names) if names else 0.0
    return [
        ClassBalance(
            name=str(name),
            labelled=int(labelled.get(name) or 0),
            predicted=int(predicted.get(name) or 0),
            labelled_share=int(labelled.get(name) or 0) / had if had else 0.0,
            predicted_share=int(predicted.get(name) or 0) / now if now else 0.0,
            rare=bool(had) and int(labelled.get(name) or 0) < RARE_SHARE * mean,
        )
        for name in names
    ]


def _minutes(connection: Connection, project_id: int, round_id: int) -> tuple[float | None, float | None]:
    """Annotators' minutes on the batch so far, and what one of its tasks took. None where nothing is known."""
    query = (
        select(func.sum(task_annotations.c.lead_time), func.count(task_annotations.c.task_id.distinct()))
        .join(scores, scores.c.task_id == task_annotations.c.task_id)
        .where(scores.c.round_id == round_id, scores.c.rank.is_not(None))
        .where(task_annotations.c.project_id == project_id, task_annotations.c.lead_time.is_not(None))
        .where(task_annotations.c.cancelled.is_(False))
    )
    seconds, count = connection.execute(query).one()
    return (None, None) if not count else (seconds / 60, seconds / 60 / count)
