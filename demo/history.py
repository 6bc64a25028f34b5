"""A generated project with a history: 80,000 tasks and 12 measured rounds in seconds, to look at and to test with.

Nothing is trained. Each round's detections on the holdout are drawn around the true boxes of generated pictures,
better from round to round; mAP and AP per class are what `worker.evaluation` makes of them, and the artifacts are kept,
so that intervals and re-evaluation read what they would read after real rounds. Two classes are rare and one stops
improving. The same seed and `now` give the same project.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
import uvicorn
from numpy.typing import NDArray
from sqlalchemy import Connection, case, func, insert, literal, select, update

from backend.app import create_app
from demo.factory import CLASSES, RARE, Scene, render
from demo.oracle import label_config
from worker.artifacts import Artifacts, round_key
from worker.boxes import LabelMap, to_regions, xyxy_to_yolo
from worker.dataset import TaskTruth
from worker.evaluation import Detections, Truth
from worker.label_studio import model_version, published_score
from worker.measuring import compare, write_curve
from worker.processes import running_valkey
from worker.reuse import image_digest
from worker.settings import ProjectSettings, Settings, parse_project_settings
from worker.store import Store, events, projects, scores, steps, task_annotations
from worker.store import rounds as round_rows
from worker.store import tasks as task_rows

TITLE = "Line 3: fasteners and surface defects"
SIZE = (320, 240)  # of a picture, pixels
PICTURES = 64  # shared by all tasks; a near-duplicate group shows one of them
VARIANTS = 6  # predictions drawn for each picture
DIMENSIONS = 64  # of an embedding
SHARD = 256
DAY = 86_400.0
ALPHA = 0.7  # strategy `hybrid`
PLATEAU = "wire"
PLATEAU_FROM = 7  # round

Last = Literal["done", "training", "scoring", "failed"]
Rng = np.random.Generator


@dataclass(frozen=True)
class Plan:
    """What is generated. `batches[r]`: task ids that round r asked for, in rank order; the last one is published."""

    project_id: int
    names: tuple[str, ...]
    images: list[str]  # by task id - first_task
    first_task: int
    groups: NDArray[np.int64]  # near-duplicate group of each position
    holdout: list[int]
    batches: list[list[int]]
    seed: int
    now: float
    utility: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def task_ids(self) -> NDArray[np.int64]:
        return np.arange(len(self.images), dtype=np.int64) + self.first_task

    @property
    def rounds(self) -> int:
        """Measured rounds; round 0 connects."""
        return len(self.batches) - 1

    def picture_of(self, task_id: int) -> int:
        return int(self.groups[task_id - self.first_task]) % PICTURES

    def opened_at(self, number: int) -> float:
        return self.now - (self.rounds - number + 1) * 1.25 * DAY

    def seconds(self, number: int) -> float:
        """How long a round took: longer, the more it trains on."""
        return 340.0 if number == 0 else 900.0 + 95.0 * number

    def rng(self, *purpose: int) -> Rng:
        return np.random.default_rng([self.seed, *purpose])


def fill(
    store: Store,
    artifacts: Artifacts,
    *,
    tasks: int = 80_000,
    rounds: int = 12,
    classes: int = 8,
    seed: int = 0,
    project_id: int = 1,
    title: str = TITLE,
    class_names: Sequence[str] = (),
    file_names: Sequence[str] = (),
    last: Last = "done",
    earlier_scores: bool = True,
    now: float | None = None,
) -> int:
    """Write one generated project into a migrated store.

    Args:
        tasks: at least 40 per round; every class of `demo.factory` has to be in the holdout to be measured.
        rounds: measured ones; round 0 published the first batch.
        classes: the first so many of `demo.factory.CLASSES`, at most 8; ignored when `class_names` are given.
        class_names: names of the classes instead of the factory's (at most 8), hostile ones too.
        file_names: prefixes of the images' file names, used in turn, hostile ones too.
        last: "done", or what became of one more round: it trains, it scores, or it failed.
        earlier_scores: also the rows of `scores` of all earlier rounds (without their regions), as a real store has.
        now: the moment the history leads up to, seconds since 1970.

    Returns:
        project_id.

    Raises:
        ValueError: too few tasks for so many rounds, or too many classes.
    """
    names = tuple(class_names) or CLASSES[:classes]
    if not 1 <= len(names) <= len(CLASSES):
        raise ValueError(f"{len(names)} classes: the pictures show {len(CLASSES)}")
    if tasks < 40 * max(rounds, 1):
        raise ValueError(f"{tasks} tasks are too few for {rounds} rounds: give at least {40 * max(rounds, 1)}")
    plan = _plan(project_id, names, tasks, rounds, seed, tuple(file_names), time.time() if now is None else now)
    detections = _detect(plan, artifacts)
    with store.write() as connection:
        _write_project(connection, plan, title)
        round_ids = _write_rounds(connection, plan, artifacts)
        _write_tasks(connection, plan, round_ids)
        _write_annotations(connection, plan, round_ids)
        _measure(connection, plan, artifacts, dict(zip(round_ids[1:], detections, strict=True)))
        _write_scores(connection, plan, round_ids, earlier_scores)
        published = {"published_round_id": round_ids[-1], "published_version": model_version(rounds)}
        here = update(projects).where(projects.c.id == project_id)
        connection.execute(here.values(**published, reconciled_at=plan.now - 40))
        _write_events(connection, plan, round_ids)
        _write_last(connection, plan, last)
    _write_artifacts(plan, artifacts)
    return project_id


# --- what there is ---------------------------------------------------------------------------------------------------


def _plan(
    project_id: int, names: tuple[str, ...], n: int, rounds: int, seed: int, prefixes: tuple[str, ...], now: float
) -> Plan:
    rng = np.random.default_rng([seed, 1])
    groups = np.repeat(np.arange(n), rng.choice([1, 1, 1, 1, 1, 1, 2, 3, 4, 5], n))[:n].astype(np.int64)
    order = rng.permutation(n)
    holdout_size = ProjectSettings().holdout_for(n)
    size = max(min(200, n // (5 * (rounds + 1))), 1)
    taken = _one_per_group(order, groups, holdout_size + size * rounds)
    first_task = project_id * 100_000 + 1
    holdout = [int(position) + first_task for position in taken[:holdout_size]]
    chosen = [int(position) + first_task for position in taken[holdout_size:]]
    batches = [chosen[number * size : (number + 1) * size] for number in range(rounds)]
    batches[0] = _spread(batches[0], holdout)
    drawn = 1 - ProjectSettings().confidence  # of what is drawn, nothing is more uncertain
    uncertainty, diversity = drawn * rng.beta(1.6, 3.2, n), rng.beta(2.2, 2.6, n)
    utility = {
        "uncertainty": uncertainty,
        "diversity": diversity,
        "utility": ALPHA * uncertainty + (1 - ALPHA) * diversity,
    }
    gone = np.isin(groups, groups[taken])
    best = [int(at) for at in np.argsort(-utility["utility"]) if not gone[at]]
    batches.append([at + first_task for at in _one_picture_at_a_time(np.array(best), groups, size)])
    images = [_image(project_id, prefixes, at, int(groups[at]) % PICTURES) for at in range(n)]
    return Plan(project_id, names, images, first_task, groups, holdout, batches, seed, now, utility)


def _one_per_group(order: NDArray[np.int64], groups: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The first `count` positions of `order` that are of different near-duplicate groups."""
    _, first = np.unique(groups[order], return_index=True)
    chosen: NDArray[np.int64] = order[np.sort(first)][:count]
    return chosen


def _one_picture_at_a_time(order: NDArray[np.int64], groups: NDArray[np.int64], count: int) -> list[int]:
    """As above; and where there are enough, a picture is not shown again within half of PICTURES."""
    candidates = [int(at) for at in _one_per_group(order, groups, len(order))]
    chosen: list[int] = []
    for at in candidates:
        recent = {int(groups[other]) % PICTURES for other in chosen[-PICTURES // 2 :]}
        if len(chosen) < count and int(groups[at]) % PICTURES not in recent:
            chosen.append(at)
    return (chosen + [at for at in candidates if at not in set(chosen)])[:count]


def _spread(first: list[int], second: list[int]) -> list[int]:
    places = [((index + 0.5) / len(first), 0, one) for index, one in enumerate(first)]
    places += [((index + 0.5) / len(second), 1, one) for index, one in enumerate(second)]
    return [one for _, _, one in sorted(places)]


def _image(project_id: int, prefixes: tuple[str, ...], position: int, picture: int) -> str:
    prefix = prefixes[position % len(prefixes)] if prefixes else f"line3_{position // 2000:02d}"
    return f"/data/upload/{project_id}/{prefix}-{position:06d}-p{picture:02d}.jpg"


@functools.cache
def picture(number: int) -> tuple[bytes, Scene]:
    """Picture `number` of PICTURES as a JPEG, and the truth about it."""
    pixels, scene = render(11, number * 7, SIZE)
    content = io.BytesIO()
    pixels.save(content, "JPEG", quality=82)
    return content.getvalue(), scene


def _truth_of(number: int, n_classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes (n, 4) in pixels and class ids (n,) of a picture."""
    _, scene = picture(number)
    boxes = np.array(scene.boxes_xyxy, np.float32).reshape(-1, 4)
    ids = np.array(scene.class_ids, np.int64).reshape(-1)
    return boxes[ids < n_classes], ids[ids < n_classes]


# --- measuring -------------------------------------------------------------------------------------------------------


def quality(class_id: int, number: int) -> float:
    """Share of a class' objects that round `number` finds, 0..1: rising, ever slower; one class stops at a plateau."""
    name = CLASSES[class_id]
    if name in RARE:
        return 0.50 - 0.44 * float(np.exp(-number / 4.0)) - 0.04 * RARE.index(name)
    reached = min(number, PLATEAU_FROM) if name == PLATEAU else number
    return 0.90 - 0.03 * class_id - 0.62 * float(np.exp(-(reached + 0.4) / 3.2)) - (0.14 if name == PLATEAU else 0.0)


def _detect(plan: Plan, artifacts: Artifacts) -> list[Detections]:
    """What every measured round saw on the whole holdout; kept as an artifact."""
    truth = _holdout_truth(plan)
    difficulty = plan.rng(2).random(len(truth.class_ids))
    found = [_detections(plan, truth, difficulty, number) for number in range(1, plan.rounds + 1)]
    for number, seen in enumerate(found, start=1):
        artifacts.put(round_key(plan.project_id, number, "detections.npz"), seen.save())
    return found


def _measure(connection: Connection, plan: Plan, artifacts: Artifacts, detections: Mapping[int, Detections]) -> None:
    """The learning curve as rounds write it, one after the other: each verdict is what was told then."""
    truths = [_task_truth(plan, task_id) for task_id in sorted(plan.holdout)]
    everything = compare(detections, truths, plan.names)
    settings = parse_project_settings(json.dumps(_settings(plan)))
    known: list[int] = []
    for number, (round_id, found) in enumerate(everything.evaluations.items(), start=1):
        known.append(round_id)
        artifacts.put(round_key(plan.project_id, number, "evaluation.npz"), found.arrays.save())
        this = update(round_rows).where(round_rows.c.id == round_id)
        connection.execute(this.values(map50=found.map50))
        write_curve(connection, plan.project_id, everything.among(known), settings)


def _task_truth(plan: Plan, task_id: int) -> TaskTruth:
    boxes_xyxy, class_ids = _truth_of(plan.picture_of(task_id), len(plan.names))
    return TaskTruth(task_id, xyxy_to_yolo(boxes_xyxy, *SIZE), class_ids)


def _holdout_truth(plan: Plan) -> Truth:
    keys = np.array(sorted(plan.holdout), np.int64)
    parts = [_truth_of(plan.picture_of(int(key)), len(plan.names)) for key in keys]
    return Truth(
        keys=keys,
        image_index=np.repeat(np.arange(len(keys)), [len(ids) for _, ids in parts]).astype(np.int64),
        boxes_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *(boxes for boxes, _ in parts)]),
        class_ids=np.concatenate([np.zeros(0, np.int64), *(ids for _, ids in parts)]),
    )


def _detections(plan: Plan, truth: Truth, difficulty: NDArray[np.float64], number: int) -> Detections:
    """What round `number` saw: boxes near the true ones of objects that are easy enough, and false ones."""
    rng = plan.rng(3, number)
    skill = np.array([quality(class_id, number) for class_id in range(len(plan.names))])
    lead = skill[truth.class_ids] - difficulty + rng.normal(0, 0.05, len(difficulty))
    seen = lead > 0
    boxes = _jittered(rng, truth.boxes_xyxy[seen], 0.075 - 0.03 * skill[truth.class_ids[seen]])
    confidences = np.clip(0.30 + 0.75 * lead[seen] + rng.normal(0, 0.12, int(seen.sum())), 0.02, 0.98)
    n_false = rng.poisson(1.1 - 0.08 * number / 1.2, len(truth.keys)).clip(0, 4)
    false_index = np.repeat(np.arange(len(truth.keys)), n_false)
    false_boxes, false_confidences = _false_boxes(rng, len(false_index)), rng.beta(1.4, 4.0, len(false_index))
    index = np.concatenate([truth.image_index[seen], false_index]).astype(np.int64)
    ids = np.concatenate([truth.class_ids[seen], rng.integers(0, len(plan.names), len(false_index))])
    confidence = np.concatenate([confidences, false_confidences]).astype(np.float32)
    order = np.lexsort((-confidence, index))
    return Detections(
        keys=truth.keys,
        image_index=index[order],
        boxes_xyxy=np.concatenate([boxes, false_boxes]).astype(np.float32)[order],
        confidences=confidence[order],
        class_ids=ids.astype(np.int64)[order],
        sizes=np.tile(np.array(SIZE, np.int64), (len(truth.keys), 1)),
    )


def _jittered(rng: Rng, boxes_xyxy: NDArray[np.float32], share: NDArray[np.float64]) -> NDArray[np.float64]:
    sides = np.tile(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 2)
    moved: NDArray[np.float64] = boxes_xyxy + sides * rng.normal(0, 1, boxes_xyxy.shape) * share[:, None]
    return moved


def _false_boxes(rng: Rng, count: int) -> NDArray[np.float64]:
    corner, side = rng.uniform(0, 0.75, (count, 2)), rng.uniform(0.08, 0.25, (count, 2))
    boxes: NDArray[np.float64] = np.hstack([corner, corner + side]) * np.array(SIZE * 2)
    return boxes


# --- rows ------------------------------------------------------------------------------------------------------------


def _settings(plan: Plan) -> dict[str, Any]:
    size = len(plan.batches[-1])
    return {
        "strategy": "hybrid",
        "batch_size": size,
        "labels_per_round": size,
        "max_rounds": 30,
        "epochs": 60,
        "cost_per_hour": 32.0,
        "value_per_point": 30.0,
    }


def _write_project(connection: Connection, plan: Plan, title: str) -> None:
    row = {
        "id": plan.project_id,
        "title": title,
        "label_config": label_config(plan.names),
        "extra_params": json.dumps(_settings(plan)),
        "connected_at": plan.opened_at(0),
        "backend_url": "http://127.0.0.1:9090",
    }
    connection.execute(insert(projects).values(**row))


def _write_rounds(connection: Connection, plan: Plan, artifacts: Artifacts) -> list[int]:
    """Round ids by number."""
    ids = []
    for number, batch in enumerate(plan.batches):
        opened = plan.opened_at(number)
        row: dict[str, Any] = {
            "project_id": plan.project_id,
            "number": number,
            "state": "done",
            "why": "Label Studio connected this backend" if not number else _why(plan, number),
            "opened_at": opened,
            "closed_at": opened + plan.seconds(number),
            "settings": json.dumps(_settings(plan)),
            "model_version": model_version(number),
            "batch_size": len(batch),
            "embedder": "the round's detector" if number else "a descriptor of the image",
        }
        if number:
            row |= _trained(plan, number) | _weights(plan, number, artifacts)
        ids.append(int(connection.execute(insert(round_rows).values(**row).returning(round_rows.c.id)).scalar_one()))
    return ids


def _why(plan: Plan, number: int) -> str:
    count = len(plan.batches[number - 1])
    return f"{count} new labels (a round opens at {count})"


def _trained(plan: Plan, number: int) -> dict[str, Any]:
    """What round `number` trained on, as columns of `rounds`."""
    images = [_truth_of(plan.picture_of(task_id), len(plan.names))[1] for task_id in _trained_on(plan, number)]
    counts = np.bincount(np.concatenate(images), minlength=len(plan.names))
    report = {
        "names": dict(enumerate(plan.names)),
        "notes": [],
        "seconds": round(0.8 * plan.seconds(number), 1),
        "left_out": {},
        "boxes_per_class": {name: int(count) for name, count in zip(plan.names, counts, strict=True)},
        "background": sum(not len(ids) for ids in images),
        "base_weights": "yolo11n.pt",
        "members": [],
    }
    return {"labels": len(images), "boxes": int(counts.sum()), "report": json.dumps(report)}


def _weights(plan: Plan, number: int, artifacts: Artifacts) -> dict[str, str]:
    """A file to download. It says that nothing was trained."""
    key = round_key(plan.project_id, number, "weights.pt")
    content = f"generated by demo.history: round {number} of project {plan.project_id} trained nothing\n".encode()
    return {"weights": key, "weights_sha256": artifacts.put(key, content)}


def _trained_on(plan: Plan, number: int) -> list[int]:
    held = set(plan.holdout)
    return sorted(task_id for batch in plan.batches[:number] for task_id in batch if task_id not in held)


def _write_tasks(connection: Connection, plan: Plan, round_ids: Sequence[int]) -> None:
    held = set(plan.holdout)
    seen = {one: round_ids[number + 1] for number, batch in enumerate(plan.batches[:-1]) for one in batch}
    broken = _broken(plan)
    rows = [
        {
            "project_id": plan.project_id,
            "task_id": task_id,
            "image": image,
            "holdout": task_id in held,
            "seen_round_id": None if task_id in held else seen.get(task_id),
            "image_problem": broken.get(task_id),
        }
        for task_id, image in zip(plan.task_ids.tolist(), plan.images, strict=True)
    ]
    connection.execute(insert(task_rows), rows)


def _broken(plan: Plan) -> dict[int, str]:
    """A few images of the pool that could not be read."""
    asked = {task_id for batch in plan.batches for task_id in batch} | set(plan.holdout)
    free = [task_id for task_id in plan.task_ids[: len(plan.images) // 2].tolist() if task_id not in asked]
    problems = ("it is empty (0 bytes).", "Label Studio has no such file (HTTP 404): the file is gone.")
    return {task_id: problems[at % 2] for at, task_id in enumerate(free[:: max(len(free) // 7, 1)][:7])}


def _labelled_now(plan: Plan) -> int:
    """Tasks of the published batch that have a label: not yet as many as open the next round."""
    return round(0.31 * len(plan.batches[-1]))


def _write_annotations(connection: Connection, plan: Plan, round_ids: Sequence[int]) -> None:
    """One per labelled task, in the order of the batches; and each round's sum of annotators' minutes."""
    rng = plan.rng(4)
    rows: list[dict[str, Any]] = []
    minutes = 0.0
    for number, batch in enumerate(plan.batches):
        started = number < plan.rounds
        labelled = batch if started else batch[: _labelled_now(plan)]
        usual = 52.0 * max(0.62, 1 - 0.05 * number)  # boxes already drawn make it quicker
        for at, task_id in enumerate(labelled):
            seconds = float(usual * rng.lognormal(0, 0.45))
            minutes += seconds / 60
            boxes = _counts(plan, task_id)
            moment = plan.opened_at(number) + plan.seconds(number) + 240 * (at + 1)
            rows.append(
                {
                    "project_id": plan.project_id,
                    "annotation_id": plan.project_id * 100_000 + len(rows) + 1,
                    "task_id": task_id,
                    "updated_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(moment, plan.now))),
                    "cancelled": False,
                    "lead_time": round(seconds, 1),
                    "n_boxes": sum(boxes.values()),
                    "classes": json.dumps(boxes),
                }
            )
        if started:
            this = update(round_rows).where(round_rows.c.id == round_ids[number + 1])
            connection.execute(this.values(minutes=minutes))
    connection.execute(insert(task_annotations), rows)


def _counts(plan: Plan, task_id: int) -> dict[str, int]:
    """Label -> boxes of a task's annotation."""
    _, ids = _truth_of(plan.picture_of(task_id), len(plan.names))
    found, counts = np.unique(ids, return_counts=True)
    return {plan.names[class_id]: int(count) for class_id, count in zip(found, counts, strict=True)}


def _write_scores(connection: Connection, plan: Plan, round_ids: Sequence[int], earlier: bool) -> None:
    broken, predictions = _broken(plan), _predictions(plan)
    rank = {task_id: at for at, task_id in enumerate(plan.batches[-1])}
    rng = plan.rng(5)
    variants = rng.integers(0, VARIANTS, len(plan.images)).tolist()
    noise = rng.normal(0, 0.05, (3, len(plan.images)))
    parts = {name: values.tolist() for name, values in plan.utility.items()}
    measures = np.clip(plan.utility["uncertainty"] + noise, 0, 1).tolist()
    rows, row_of_shard = [], 0
    for at, task_id in enumerate(plan.task_ids.tolist()):
        row_of_shard = 0 if at % SHARD == 0 else row_of_shard
        regions, n_boxes = predictions[plan.picture_of(task_id)][variants[at]]
        is_broken = task_id in broken
        if task_id in rank:
            regions = _with_faintest(regions, 1 - parts["uncertainty"][at])
        rows.append(
            {
                "round_id": round_ids[-1],
                "task_id": task_id,
                "shard": at // SHARD,
                "image": image_digest(plan.images[at]),
                "row": None if is_broken else row_of_shard,
                "least_confidence": measures[0][at],
                "margin": measures[1][at],
                "entropy": measures[2][at],
                "utility": parts["utility"][at],
                "uncertainty": parts["uncertainty"][at],
                "diversity": parts["diversity"][at],
                "rank": rank.get(task_id),
                "published_score": published_score(rank.get(task_id), parts["utility"][at], len(rank)),
                "regions": "[]" if is_broken else regions,
                "n_boxes": 0 if is_broken else n_boxes,
                "problem": broken.get(task_id),
            }
        )
        row_of_shard += not is_broken
    connection.execute(insert(scores), rows)
    for number in range(len(round_ids) - 1 if earlier else 0):
        _copy_scores(connection, round_ids[-1], round_ids[number], plan.batches[number])


def _with_faintest(regions: str, confidence: float) -> str:
    """The least sure box is as sure as the task's uncertainty says."""
    found = json.loads(regions)
    if found:
        faintest = min(found, key=lambda region: region["score"])
        others = [max(region["score"], confidence) for region in found]
        for region, score in zip(found, others, strict=True):
            region["score"] = round(score, 4)
        faintest["score"] = round(confidence, 4)
    return json.dumps(found)


def _copy_scores(connection: Connection, source: int, target: int, batch: Sequence[int]) -> None:
    """An earlier round's scores: the last one's, without regions, with that round's batch."""
    changed = ("round_id", "rank", "regions")
    columns = [column for column in scores.c if column.name not in changed]
    found = select(literal(target), *columns).where(scores.c.round_id == source)
    connection.execute(insert(scores).from_select(["round_id", *(column.name for column in columns)], found))
    order = case({task_id: at for at, task_id in enumerate(batch)}, value=scores.c.task_id)
    these = (scores.c.round_id == target, scores.c.task_id.in_(batch))
    connection.execute(update(scores).where(*these).values(rank=order))


def _predictions(plan: Plan) -> list[list[tuple[str, int]]]:
    """Regions, as JSON, and how many: by picture and variant."""
    label_map = LabelMap.from_config(label_config(plan.names))
    labels = dict(enumerate(plan.names))
    rng = plan.rng(6)
    made = []
    for number in range(PICTURES):
        boxes, ids = _truth_of(number, len(plan.names))
        variants = []
        for _ in range(VARIANTS):
            kept = rng.random(len(ids)) < 0.85
            drawn = _jittered(rng, boxes[kept], np.full(int(kept.sum()), 0.05))
            confidences = rng.uniform(0.28, 0.95, int(kept.sum()))
            regions = to_regions(label_map, drawn, confidences, ids[kept], labels, *SIZE)
            variants.append((json.dumps(regions), len(regions)))
        made.append(variants)
    return made


def _write_events(connection: Connection, plan: Plan, round_ids: Sequence[int]) -> None:
    rows = [(plan.opened_at(0), "connected", "connected", "Label Studio connected this backend")]
    label = 0
    for number, round_id in enumerate(round_ids):
        opened, ended = plan.opened_at(number), plan.opened_at(number) + plan.seconds(number)
        rows.append((opened, "round opened", f"round-{round_id}", "a batch was labelled" if number else "connected"))
        rows.append((ended, "round done", f"round-{round_id}-done", f"round {number} done"))
        for at in range(len(plan.batches[number]) if number < plan.rounds else _labelled_now(plan)):
            label += 1
            rows.append((min(ended + 240 * (at + 1), plan.now), "ANNOTATION_CREATED", f"annotation-{label}", ""))
    found = [
        {"project_id": plan.project_id, "at": at, "kind": kind, "key": key, "detail": detail}
        for at, kind, key, detail in sorted(rows, key=lambda row: row[0])
    ]
    connection.execute(insert(events), found)


def _write_last(connection: Connection, plan: Plan, last: Last) -> None:
    """One more round that trains, scores, or failed."""
    if last == "done":
        return
    number, opened = plan.rounds + 1, plan.now - 600
    row = {"project_id": plan.project_id, "number": number, "state": last, "opened_at": opened, "settings": "{}"}
    row |= {"why": "an admin started it", "closed_at": plan.now - 60 if last == "failed" else None}
    error = "The training ran out of memory (CUDA out of memory). Lower train_batch or imgsz." * (last == "failed")
    made = insert(round_rows).values(**row, error=error or None).returning(round_rows.c.id)
    round_id = int(connection.execute(made).scalar_one())
    step = {"round_id": round_id, "kind": "score" if last == "scoring" else "train", "attempt": 1, "sent_at": opened}
    state = {"state": "failed" if last == "failed" else "running", "error": error or None}
    connection.execute(insert(steps).values(**step, **state, lease_until=plan.now + DAY, failures=3 * bool(error)))
    detail = f"round {number} failed: {error}" if error else "an admin started it"
    event = {"project_id": plan.project_id, "at": opened, "kind": f"round {'failed' if error else 'opened'}"}
    connection.execute(insert(events).values(**event, key=f"round-{round_id}", detail=detail))
    if last == "scoring":
        _half_scored(connection, plan, round_id)


def _half_scored(connection: Connection, plan: Plan, round_id: int) -> None:
    """Rows of all tasks; of the first half of the shards with measures."""
    source = select(func.max(scores.c.round_id)).join(round_rows, round_rows.c.id == scores.c.round_id)
    source = source.where(round_rows.c.project_id == plan.project_id, scores.c.round_id != round_id)
    half = len(plan.images) // SHARD // 2
    columns = [scores.c[name] for name in ("task_id", "shard", "sent")]
    row = case((scores.c.shard < half, scores.c.row), else_=None)
    found = select(literal(round_id), row, *columns).where(scores.c.round_id == source.scalar_subquery())
    connection.execute(insert(scores).from_select(["round_id", "row", *(one.name for one in columns)], found))


# --- artifacts -------------------------------------------------------------------------------------------------------


def _write_artifacts(plan: Plan, artifacts: Artifacts) -> None:
    """Manifests and datasets of all rounds; embeddings of the published one."""
    for number in range(len(plan.batches)):
        content = json.dumps(_manifest(plan, number), indent=1).encode()
        artifacts.put(round_key(plan.project_id, number, "manifest.json"), content)
        if number:
            dataset = json.dumps({"task_ids": _trained_on(plan, number)}).encode()
            artifacts.put(round_key(plan.project_id, number, "dataset.json"), dataset)
    last = plan.rounds
    note = {"strategy": "hybrid", "options": {"alpha": ALPHA, "beta": 1 - ALPHA}, "late": {}, "notes": []}
    artifacts.put_arrays(round_key(plan.project_id, last, "selection.npz"), {}, note)
    broken = np.isin(plan.task_ids, list(_broken(plan)))
    embeddings = _embeddings(plan)
    for shard, start in enumerate(range(0, len(plan.images), SHARD)):
        here = slice(start, start + SHARD)
        content_of = io.BytesIO()
        np.save(content_of, embeddings[here][~broken[here]])
        artifacts.put(round_key(plan.project_id, last, f"embeddings-{shard:05d}.npy"), content_of.getvalue())


def _manifest(plan: Plan, number: int) -> dict[str, Any]:
    held = set(plan.holdout)
    tasks, classes = [], Counter[str]()
    for rank, task_id in enumerate(plan.batches[number]):
        at = task_id - plan.first_task
        values = {} if task_id in held else {name: float(values[at]) for name, values in plan.utility.items()}
        classes.update({} if task_id in held else _counts(plan, task_id))
        tasks.append({"rank": rank, "task_id": task_id, "utility": None, **values, **_alike(plan, task_id)})
    return {
        "project": plan.project_id,
        "round": number,
        "strategy": "hybrid" if number else "coverage",
        "options": {"alpha": ALPHA, "beta": round(1 - ALPHA, 2)} if number else {},
        "notes": [],
        "classes": dict(classes),
        "tasks": tasks,
    }


def _alike(plan: Plan, task_id: int) -> dict[str, Any]:
    """The other tasks of a near-duplicate group: they are next to each other."""
    at = task_id - plan.first_task
    near = range(max(at - 5, 0), min(at + 6, len(plan.groups)))
    others = [other + plan.first_task for other in near if plan.groups[other] == plan.groups[at] and other != at]
    return {"alike": len(others), "alike_task_ids": others} if others else {}


def _embeddings(plan: Plan) -> NDArray[np.float32]:
    """(n, DIMENSIONS) unit vectors: those of one near-duplicate group have a cosine above .99, others far less."""
    rng = plan.rng(7)
    centres = rng.normal(0, 1, (int(plan.groups.max()) + 1, DIMENSIONS)).astype(np.float32)
    found = centres[plan.groups] + rng.normal(0, 0.03, (len(plan.groups), DIMENSIONS)).astype(np.float32)
    unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


# --- a site to look at -----------------------------------------------------------------------------------------------


class _Pictures(BaseHTTPRequestHandler):
    """Stands in for Label Studio: the generated pictures, and a user who may do everything."""

    def do_GET(self) -> None:
        named = re.search(r"-p(\d\d)\.jpg", unquote(self.path))
        body = picture(int(named[1]) % PICTURES)[0] if named else b"{}"
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg" if named else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def pictures() -> Iterator[str]:
    """A server in this process that gives the generated projects their images; yields LABEL_STUDIO_URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Site:
    """A running backend: its address, its settings, and the server to stop."""

    url: str
    settings: Settings
    server: uvicorn.Server


@contextlib.contextmanager
def running(folder: Path, redis_url: str = "", port: int = 0) -> Iterator[Site]:
    """A backend over `folder` in a thread, with pictures, and with a Valkey of its own where `redis_url` is empty."""
    with contextlib.ExitStack() as stack:
        settings = Settings(
            label_studio_url=stack.enter_context(pictures()),
            label_studio_api_key="0" * 40,  # type: ignore[arg-type]  # pydantic makes it secret
            redis_url=redis_url or stack.enter_context(running_valkey(folder / "valkey")),
            data_dir=folder,
        )
        server = uvicorn.Server(uvicorn.Config(create_app(settings), port=port, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        if not server.started:
            raise RuntimeError(f"the backend did not start on port {port}: is it taken?")
        try:
            yield Site(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", settings, server)
        finally:
            server.should_exit = True
            thread.join(10)


def open_folder(folder: Path) -> tuple[Store, Artifacts]:
    """The migrated store and the artifacts of a data folder, as a backend with HARDFIRST_DATA_DIR=folder reads them."""
    settings = Settings(data_dir=folder)
    store = Store(settings.store_url)
    store.migrate()
    return store, Artifacts(settings.artifacts_root, folder / "cache")


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.history", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="data folder; filled when it has no store yet")
    parser.add_argument("--tasks", type=int, default=80_000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", choices=("done", "training", "scoring", "failed"), default="done")
    parser.add_argument("--serve", action="store_true", help="show it, until Ctrl+C")
    parser.add_argument("--port", type=int, default=0, help="with --serve; default: a free one")
    given = parser.parse_args()
    began, is_new = time.monotonic(), not (given.out / "hardfirst.db").exists()
    store, artifacts = open_folder(given.out)
    if is_new:
        fill(store, artifacts, tasks=given.tasks, rounds=given.rounds, seed=given.seed, last=given.last)
        print(f"{given.tasks} tasks and {given.rounds} rounds in {time.monotonic() - began:.1f} s: {given.out}")
    store.close()
    if not given.serve:
        print(f"look at it: python -m demo.history --out {given.out} --serve")
        return
    with running(given.out, port=given.port) as site:
        print(f"{site.url}/projects/1   (Ctrl+C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
