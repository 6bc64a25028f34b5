"""Labels that may be wrong: where confident detections of the published round disagree with them.

The detections are those of the round's scoring, which sees labelled images too. A detector that was trained on a wrong
label tends to repeat it, so what is found here is a part of what is wrong, seldom the whole.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, select

from worker import rounds
from worker.artifacts import round_key
from worker.boxes import yolo_to_percent
from worker.dataset import TaskTruth, truth_of
from worker.errors import HardfirstError, NotFound
from worker.evaluation import box_iou
from worker.services import Services
from worker.shapes import drawn_box
from worker.store import get_project, get_round, loads, scores

log = logging.getLogger(__name__)

NAME = "suspects.json"  # artifact of the round
SAME_PLACE = 0.5  # IoU
CONFIDENT = 0.6  # a detection that may say that a label is wrong
FINDS = 0.8  # share of a class's labels that the detector finds: from here on one it does not find is suspect
ENOUGH = 10  # labelled boxes of a class, for that share to mean something
KEPT = 200
TIMEOUT = 1800  # seconds the job may run
AT_ONCE = 500

Boxes = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Suspect:
    """One disagreement.

    Attributes:
        task_id: Label Studio's.
        kind: "missing" (seen, not labelled), "class" (labelled as another class) or "extra" (labelled, not seen).
        labelled: the label, or None for "missing".
        seen: the class that was detected, or None for "extra".
        suspicion: 0..1: the detection's confidence; for "extra" the share of that class's labels that are found.
        box_percent: x, y, width, height: of the detection, or for "extra" of the label.
        annotation_id: of the annotation, or None when the export does not say.
        width, height: of the image as Label Studio showed it, or None.
    """

    task_id: int
    kind: str
    labelled: str | None
    seen: str | None
    suspicion: float
    box_percent: tuple[float, float, float, float]
    annotation_id: int | None
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Seen:
    """Detections on one image: boxes_xyxy (m, 4) in percent, class_ids (m,) of the label map, confidences (m,)."""

    boxes_xyxy: Boxes
    class_ids: Ids
    confidences: Boxes


@dataclass(frozen=True)
class Compared:
    """One image: for each label the detection of its class in its place (-1: none), and what is there instead."""

    matched: Ids  # (t,) detection of the same class, or -1
    covered: NDArray[np.bool_]  # (t,) a detection of any class is in its place
    missing: list[int]  # confident detections in whose place there is no label
    other: list[tuple[int, int]]  # (label, confident detection of another class in its place)


def compare(labelled_xyxy: Boxes, labelled_ids: Ids, seen: Seen) -> Compared:
    """Labels against detections, the most confident first; one detection speaks for one label.

    Args:
        labelled_xyxy: (t, 4), in the unit of `seen`.
        labelled_ids: (t,)
    """
    overlaps = box_iou(labelled_xyxy, seen.boxes_xyxy) if len(labelled_ids) and len(seen.class_ids) else None
    matched = np.full(len(labelled_ids), -1, dtype=np.int64)
    if overlaps is None:
        confident = np.flatnonzero(seen.confidences >= CONFIDENT).tolist() if not len(labelled_ids) else []
        return Compared(matched, np.zeros(len(labelled_ids), dtype=bool), confident, [])
    order = np.argsort(-seen.confidences, kind="stable")
    there = overlaps >= SAME_PLACE
    used: set[int] = set()
    for detection in order:
        free = there[:, detection] & (labelled_ids == seen.class_ids[detection]) & (matched < 0)
        if free.any():
            matched[int(np.argmax(np.where(free, overlaps[:, detection], -1)))] = detection
            used.add(int(detection))
    missing: list[int] = []
    other: list[tuple[int, int]] = []
    spoken = matched >= 0
    for detection in (int(one) for one in order if int(one) not in used and seen.confidences[one] >= CONFIDENT):
        if not there[:, detection].any():
            missing.append(detection)
            continue
        free = there[:, detection] & ~spoken
        if free.any():
            label = int(np.argmax(np.where(free, overlaps[:, detection], -1)))
            spoken[label] = True
            other.append((label, detection))
    return Compared(matched, np.asarray(there.any(axis=1)), missing, other)


def suspects_of(
    truths: Iterable[TaskTruth], seen_on: Mapping[int, Seen], labels: Sequence[str]
) -> tuple[list[Suspect], int]:
    """All suspects, the most suspicious first, and the number of images that were compared.

    Args:
        truths: one of each labelled task.
        seen_on: task id -> what was detected; tasks without are left out.
        labels: class id -> label.
    """
    found: list[Suspect] = []
    unseen: list[tuple[TaskTruth, int]] = []
    hits, totals = np.zeros(len(labels), dtype=np.int64), np.zeros(len(labels), dtype=np.int64)
    images = 0
    for truth in truths:
        if truth.unusable or (seen := seen_on.get(truth.task_id)) is None:
            continue
        images += 1
        result = compare(_percent_xyxy(truth), truth.class_ids, seen)
        np.add.at(totals, truth.class_ids, 1)
        np.add.at(hits, truth.class_ids[result.matched >= 0], 1)
        found += [_seen_suspect(truth, None, seen, detection, labels) for detection in result.missing]
        found += [_seen_suspect(truth, label, seen, detection, labels) for label, detection in result.other]
        unseen += [(truth, int(label)) for label in np.flatnonzero(~result.covered)]
    shares = hits / np.maximum(totals, 1)
    for truth, label in unseen:
        class_id = int(truth.class_ids[label])
        if totals[class_id] >= ENOUGH and shares[class_id] >= FINDS:
            found.append(_unseen_suspect(truth, label, float(shares[class_id]), labels))
    return sorted(found, key=lambda one: (-one.suspicion, one.task_id)), images


def _percent_xyxy(truth: TaskTruth) -> Boxes:
    sides = yolo_to_percent(truth.boxes_yolo).reshape(-1, 4)
    return np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], axis=1)


def _seen_suspect(truth: TaskTruth, label: int | None, seen: Seen, detection: int, labels: Sequence[str]) -> Suspect:
    left, top, right, bottom = (float(side) for side in seen.boxes_xyxy[detection])
    return Suspect(
        task_id=truth.task_id,
        kind="missing" if label is None else "class",
        labelled=None if label is None else labels[int(truth.class_ids[label])],
        seen=labels[int(seen.class_ids[detection])],
        suspicion=round(float(seen.confidences[detection]), 4),
        box_percent=(left, top, right - left, bottom - top),
        annotation_id=truth.annotation_id,
        width=truth.width,
        height=truth.height,
    )


def _unseen_suspect(truth: TaskTruth, label: int, share: float, labels: Sequence[str]) -> Suspect:
    left, top, right, bottom = (float(side) for side in _percent_xyxy(truth)[label])
    return Suspect(
        task_id=truth.task_id,
        kind="extra",
        labelled=labels[int(truth.class_ids[label])],
        seen=None,
        suspicion=round(share, 4),
        box_percent=(left, top, right - left, bottom - top),
        annotation_id=truth.annotation_id,
        width=truth.width,
        height=truth.height,
    )


# --- the job ---------------------------------------------------------------------------------------------------------


def find_suspects(own: Services, project_id: int, round_id: int) -> None:
    """Compare all labels with what a round saw, and keep the result beside the round.

    Raises:
        NotFound: the project or the round is gone.
        LabelStudioUnavailable, CredentialsMissing: Label Studio is away.
    """
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        round_row = get_round(connection, round_id)
    label_map = rounds.label_map_of(project)
    exported = own.label_studio.export(project_id)
    truths = [truth for task in exported if (truth := truth_of(task, label_map)) is not None]
    with own.store.read() as connection:
        seen_on = _seen_on(connection, round_id, [one.task_id for one in truths], label_map.labels)
        held = {one for one, is_held in rounds.holdout_of(connection, project_id).items() if is_held}
    found, images = suspects_of(truths, seen_on, label_map.labels)
    updated = {
        int(one["id"]): str(one.get("updated_at") or "")[:40]
        for task in exported
        for one in task.get("annotations") or []
        if isinstance(one.get("id"), int)
    }
    content = {
        "made_at": time.time(),
        "images": images,
        "counts": {kind: sum(one.kind == kind for one in found) for kind in ("missing", "class", "extra")},
        "suspects": [
            {**asdict(one), "holdout": one.task_id in held, "updated_at": updated.get(one.annotation_id or -1, "")}
            for one in found[:KEPT]
        ],
    }
    own.artifacts.put(round_key(project_id, round_row.number, NAME), json.dumps(content).encode())


def stored_suspects(own: Services, project_id: int, number: int) -> dict[str, Any] | None:
    """What the job kept; None: it has not run for that round, or its artifacts cannot be read now."""
    try:
        found = json.loads(own.artifacts.get(round_key(project_id, number, NAME)))
    except NotFound:
        return None
    except (HardfirstError, OSError, ValueError) as error:
        log.warning("suspect labels of project %s, round %s cannot be read: %s", project_id, number, error)
        return None
    return found if isinstance(found, dict) else None


def _seen_on(
    connection: Connection, round_id: int, task_ids: Sequence[int], labels: Sequence[str]
) -> dict[int, Seen]:
    """What the round saw on these tasks; those whose image could not be read are not there."""
    class_of = {label: class_id for class_id, label in enumerate(labels)}
    found: dict[int, Seen] = {}
    for start in range(0, len(task_ids), AT_ONCE):
        these = scores.c.task_id.in_(task_ids[start : start + AT_ONCE])
        query = select(scores.c.task_id, scores.c.regions).where(
            scores.c.round_id == round_id, these, scores.c.regions.is_not(None), scores.c.problem.is_(None)
        )
        for row in connection.execute(query):
            found[int(row.task_id)] = _as_seen(loads(row.regions), class_of)
    return found


def _as_seen(regions: Sequence[Mapping[str, Any]], class_of: Mapping[str, int]) -> Seen:
    """Regions of ours: rotation 0, one label each."""
    boxes, ids, confidences = [], [], []
    for region in regions:
        drawn = drawn_box(region)
        if drawn is not None and drawn[0] in class_of:  # not one that the label config has lost since
            x, y, across, down = drawn[1]
            boxes.append((x, y, x + across, y + down))
            ids.append(class_of[drawn[0]])
            confidences.append(float(region.get("score") or 0.0))
    return Seen(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(ids, dtype=np.int64),
        np.array(confidences, dtype=np.float64),
    )
