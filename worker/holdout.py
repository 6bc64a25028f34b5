"""The holdout between rounds: its labels corrected, more of it asked for.

Each round's raw detections on the holdout are kept. So when its annotations change, every round is measured again
without running a network, and the points of the learning curve stay comparable.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, select, update

from strategies.diversity import near_duplicates_of_labelled
from worker import rounds
from worker.artifacts import round_key
from worker.boxes import LabelMap
from worker.dataset import TaskTruth, truth_of
from worker.errors import LabelConfigUnsupported, NotFound
from worker.evaluation import Detections
from worker.measuring import compare, renamed, write_curve
from worker.selection import ScoredTasks, draw_holdout, generator
from worker.services import Services
from worker.store import (
    get_project,
    loads,
    measured_rounds,
    open_round_of,
    projects,
    record_event,
    task_annotations,
    tasks,
)
from worker.work import Work

log = logging.getLogger(__name__)

TASKS_AT_ONCE = 1000
REMEASURE_EVERY = 300.0  # seconds: while people label the holdout, each label changes it, and each look is an export
_SETTINGS_THAT_JUDGE = ("worth_gain", "cost_per_hour", "value_per_point", "min_map_gain")


def truths_of(own: Services, project_id: int, label_map: LabelMap) -> list[TaskTruth]:
    """What Label Studio's export says, and the store's copy of it brought up to date."""
    exported = own.label_studio.export(project_id)
    images = {int(task["id"]): str((task.get("data") or {}).get(label_map.image_key) or "") for task in exported}
    for start in range(0, len(exported), TASKS_AT_ONCE):  # a webhook waits for no more than these
        some = exported[start : start + TASKS_AT_ONCE]
        found = [{**one, "task": task["id"]} for task in some for one in task.get("annotations") or []]
        with own.store.write() as connection:
            rounds.remember_tasks(connection, project_id, {int(task["id"]): images[int(task["id"])] for task in some})
            rounds.remember_annotations(connection, project_id, found)
    return [truth for task in exported if (truth := truth_of(task, label_map)) is not None]


def holdout_fingerprint(connection: Connection, project_id: int) -> str:
    """What a measurement depends on beside the detections: the holdout's annotations, the labels there are, and the
    settings that judge."""
    columns = (task_annotations.c.annotation_id, task_annotations.c.updated_at, task_annotations.c.cancelled)
    query = (
        select(*columns)
        .join(
            tasks,
            (tasks.c.project_id == task_annotations.c.project_id) & (tasks.c.task_id == task_annotations.c.task_id),
        )
        .where(task_annotations.c.project_id == project_id, tasks.c.holdout.is_(True), tasks.c.deleted.is_(False))
        .order_by(task_annotations.c.annotation_id)
    )
    project = get_project(connection, project_id)
    settings = json.loads(project.extra_params or "{}")
    judged = [settings.get(name) for name in _SETTINGS_THAT_JUDGE]
    judged.append(_labels_of(project))
    annotations = [list(row) for row in connection.execute(query)]
    return hashlib.sha256(json.dumps([judged, annotations]).encode()).hexdigest()


def _labels_of(project: Row[Any]) -> list[str]:
    try:
        return list(rounds.label_map_of(project).labels)
    except LabelConfigUnsupported:
        return []  # whoever measures says what is wrong with it


def remember_measured(connection: Connection, project_id: int, fingerprint: str) -> None:
    """All rounds are measured on the holdout of this fingerprint."""
    here = update(projects).where(projects.c.id == project_id)
    connection.execute(here.values(holdout_measured=fingerprint))


def earlier_detections(
    own: Services, project_id: int, labels: Sequence[str], but: int | None = None
) -> tuple[dict[int, Detections], str]:
    """What measured rounds saw on the holdout, by round id, oldest first, with class ids of today's label config; and
    a sentence about those whose file is lost. `but`: a round to leave out."""
    with own.store.read() as connection:
        rows = [row for row in measured_rounds(connection, project_id) if row.id != but]
    found: dict[int, Detections] = {}
    lost = []
    for row in rows:
        try:
            content = own.artifacts.get(round_key(project_id, row.number, "detections.npz"))
        except NotFound:
            lost.append(str(row.number))
            continue
        found[row.id] = renamed(Detections.load(content), names_of(row.report), labels)
    return found, f"Detections of round {', '.join(lost)} are lost: it is not compared." if lost else ""


def names_of(report: str) -> dict[int, str]:
    """Class id -> name of a round's detector."""
    return {int(key): str(name) for key, name in loads(report).get("names", {}).items()}


def joined(first: Detections, second: Detections) -> Detections:
    """Detections of one detector on two lots of images that have none in common."""
    return Detections(
        keys=np.concatenate([first.keys, second.keys]),
        image_index=np.concatenate([first.image_index, second.image_index + len(first.keys)]),
        boxes_xyxy=np.concatenate([first.boxes_xyxy, second.boxes_xyxy]),
        confidences=np.concatenate([first.confidences, second.confidences]),
        class_ids=np.concatenate([first.class_ids, second.class_ids]),
        sizes=np.concatenate([first.sizes, second.sizes]),
    )


def remeasure_if_changed(own: Services, project_id: int) -> bool:
    """When the holdout's annotations (or what a gain is worth) changed since: every round measured again.

    All figures change in one transaction, or none. A round that was measured meanwhile is left to its own measurement.
    """
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        measured = {row.id for row in measured_rounds(connection, project_id)}
        fingerprint = holdout_fingerprint(connection, project_id)  # what comes during the export is measured next time
        is_same = fingerprint == project.holdout_measured
        busy = open_round_of(connection, project_id)
    soon = time.time() - (project.remeasured_at or 0.0) < REMEASURE_EVERY
    if is_same or soon or not measured or (busy is not None and busy.state == "training"):
        return False
    label_map = rounds.label_map_of(project)
    truths = truths_of(own, project_id, label_map)
    with own.store.read() as connection:
        held = {task_id for task_id, is_held in rounds.holdout_of(connection, project_id).items() if is_held}
    detections, note = earlier_detections(own, project_id, label_map.labels)
    if note:
        log.warning("project %s: %s", project_id, note)
    curve = compare(detections, [truth for truth in truths if truth.task_id in held], label_map.labels, note)
    with own.store.write() as connection:
        project = rounds.lock_project(connection, project_id)
        if {row.id for row in measured_rounds(connection, project_id)} != measured:
            return False
        write_curve(connection, project_id, curve, rounds.settings_of(project))
        remember_measured(connection, project_id, fingerprint)
        here = update(projects).where(projects.c.id == project_id)
        connection.execute(here.values(remeasured_at=time.time()))
        n_images = max((found.n_images for found in curve.evaluations.values()), default=0)
        detail = f"{len(curve.evaluations)} rounds, on {n_images} labelled holdout images"
        record_event(connection, project_id, "holdout measured again", detail=detail)
    return True


def grow_holdout(
    work: Work, scored: ScoredTasks, is_labelled: NDArray[np.bool_], held: Mapping[int, bool | None]
) -> tuple[dict[int, bool | None], list[str] | None]:
    """What an admin asked for joins the holdout, once: with this batch, unlabelled and without pre-annotations.

    Returns: task id -> in the holdout, as it is now; notes for the page, None when nothing was asked for.
    """
    store, project_id = work.services.store, work.project.id
    with store.read() as connection:
        wanted = int(get_project(connection, project_id).more_holdout)
        free = set(connection.execute(rounds.drawable(project_id)).scalars().all()) if wanted else set()
        seen = rounds.trained_on(connection, project_id) if wanted else set()
    if not wanted:
        return dict(held), None
    drawable = np.isin(scored.task_ids, sorted(free)) & ~is_labelled
    in_holdout = np.array([held.get(int(task_id)) is True for task_id in scored.task_ids], dtype=np.bool_)
    trained = (is_labelled & ~in_holdout) | np.isin(scored.task_ids, sorted(seen))
    rng = generator(work.settings, project_id, work.round.number, "more holdout")
    drawn = draw_more(scored, drawable, trained, wanted, work.settings.near_duplicate_threshold, rng)
    work.lease.hold()
    with store.write() as connection:
        grown = rounds.grow_holdout(connection, project_id, drawn.task_ids, wanted, drawn.twins)
    if grown is None:
        return dict(held), None
    return {**held, **dict.fromkeys(grown, True)}, drawn.notes


@dataclass(frozen=True)
class Drawn:
    """Task ids that join the holdout; those that look like them, never to be trained on; notes for the page."""

    task_ids: list[int]
    twins: list[int]
    notes: list[str]


def draw_more(
    scored: ScoredTasks,
    drawable: NDArray[np.bool_],
    trained: NDArray[np.bool_],
    wanted: int,
    threshold: float,
    rng: np.random.Generator,
) -> Drawn:
    """At random, by near-duplicate group, from what nobody labelled.

    A near-duplicate of an image that is trained on would flatter the detector: such are taken only when nothing else is
    left, and the page says so. (A network that has learned little finds all images alike.)

    Args: drawable, trained (N,) rows of `scored`; wanted: how many at most; threshold: cosine of near-duplicates.
    """
    free = drawable & ~trained
    like = np.zeros_like(free)
    if free.any() and trained.any():
        like[free] = near_duplicates_of_labelled(scored.embeddings[free], scored.embeddings[trained], threshold)
    apart = free & ~like
    chosen, notes = _draw(scored, apart, wanted, threshold, rng)
    is_plain = not notes  # else likeness says nothing here, and all of the rest would be twins
    if len(chosen) < wanted:
        others, _ = _draw(scored, like, wanted - len(chosen), threshold, rng)
        if others:
            is_plain = False
            notes = [*notes, f"{len(others)} new holdout images look like images that are trained on"]
        chosen |= others
    if len(chosen) < wanted:
        notes = [*notes, f"{wanted} more holdout images were asked for, and {len(chosen)} could be drawn"]
    twins = _alike(scored, drawable, chosen, threshold) if is_plain else []
    return Drawn(sorted(chosen), twins, notes)


def _draw(
    scored: ScoredTasks, free: NDArray[np.bool_], wanted: int, threshold: float, rng: np.random.Generator
) -> tuple[set[int], list[str]]:
    pool = scored.rows(free)
    return draw_holdout(pool, np.zeros(len(pool.task_ids), dtype=np.bool_), wanted, threshold, rng)


def _alike(scored: ScoredTasks, drawable: NDArray[np.bool_], chosen: set[int], threshold: float) -> list[int]:
    """Near-duplicates of the chosen among the others that may still be labelled."""
    is_chosen = np.isin(scored.task_ids, sorted(chosen))
    others = drawable & ~is_chosen
    if not is_chosen.any() or not others.any():
        return []
    alike = near_duplicates_of_labelled(scored.embeddings[others], scored.embeddings[is_chosen], threshold)
    return [int(task_id) for task_id in scored.task_ids[others][alike]]
