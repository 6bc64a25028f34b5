"""A live project's rounds as `results.json` of a simulation holds them, so that the two can be compared.

One arm, one seed; its rounds are the measured ones. Labels, boxes and minutes are those of training images: the
holdout's cost every arm of a simulation the same and are not counted there either. What is only known of a replay
(the truth about images nobody labelled, seconds of each step) is not in it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, func, select

from backend.views import title_of
from worker import rounds as rules
from worker.artifacts import round_key
from worker.boxes import LabelMap
from worker.composition import alike_earlier, contents, mean_ap50, rare_names
from worker.errors import HardfirstError, LabelConfigUnsupported, SettingsInvalid
from worker.returns import capped_seconds
from worker.reuse import shard_embeddings
from worker.services import Services
from worker.settings import ProjectSettings
from worker.store import get_project, labelled_task_ids, loads, measured_rounds, rounds, scores, task_annotations, tasks

RANDOM_ENOUGH = 50  # labelled holdout images, drawn at random: what is rare among them is rare
MOST_COMPARED = 20_000  # labelled images, each with each: some seconds
EMBEDDING_SECONDS = 10.0  # for all files: a bucket may be slow

Json = dict[str, Any]


@dataclass(frozen=True)
class Label:
    """A labelled image: boxes per class, annotators' seconds (None: not timed), the round that first trained on it."""

    task_id: int
    counts: Mapping[str, int]
    seconds: float | None
    holdout: bool
    seen_round_id: int | None


@dataclass(frozen=True)
class Asked:
    """What the batches between two measured rounds asked for: rounds that chose, training images, rank of each."""

    numbers: list[int]
    ranks: dict[int, int]


@dataclass(frozen=True)
class Live:
    """What the store knows of a project's rounds. `windows`: training labels by the measured round that first had
    them, in the order of the batch; the last are those that none had yet."""

    project: Row[Any]
    settings: ProjectSettings
    measured: Sequence[Row[Any]]
    labels: list[Label]
    windows: list[list[Label]]
    asked: list[Asked]
    pool_images: int
    holdout_images: int
    places: dict[int, tuple[int, int]]  # task id -> shard and row of the embeddings of `embedded`
    embedded: int | None  # number of the round


def live_results(own: Services, live: Live) -> Json:
    """The project as one run of one arm, in the shape of `results.json`. `pending`: labels no round has learned from.

    In a batch, images go by their task ids; `near_duplicates` is None where no embedding is left.
    """
    label, rare = f"project {live.project.id}", _rare(live)
    alike = look_alikes(own, live)
    batches = [
        _batch(window, asked, found, rare) for window, asked, found in zip(live.windows, live.asked, alike, strict=True)
    ]
    seed = live.settings.seed
    return {
        "project": {"id": live.project.id, "title": title_of(live.project)},
        "made_at": time.time(),
        "data": _data(live, rare),
        "settings": {label: live.settings.model_dump(mode="json", exclude={"seed"})},
        "arms": [_arm(label, live.settings)],
        "runs": [{"arm": label, "seed": seed, "rounds": _rounds(live, batches, rare)}],
        "pending": batches[-1],
    }


def _arm(label: str, settings: ProjectSettings) -> Json:
    options = dict(settings.strategy_options)
    return {"label": label, "strategy": settings.strategy, "draw": 1, "options": options, "overrides": {}}


def _data(live: Live, rare: Sequence[str]) -> Json:
    counted, of = _counted(live)
    return {
        "classes": _classes(live.project),
        "rare": list(rare),
        "rare_from": of,
        "images_counted": len(counted),
        "images_per_class": images_per_class(counted),
        "pool_images": live.pool_images,
        "holdout_images": live.holdout_images,
        "seed_size": live.measured[0].labels if live.measured else None,
        "batch_size": live.settings.batch_size,
        "rounds": max(len(live.measured) - 1, 0),
        "seeds": [live.settings.seed],
        "embeddings_of_round": live.embedded,
        "near_duplicate_threshold": live.settings.near_duplicate_threshold,
    }


def _classes(project: Row[Any]) -> list[str]:
    try:
        return list(LabelMap.from_config(project.label_config).labels)
    except LabelConfigUnsupported:
        return []


def images_per_class(labels: Sequence[Label]) -> dict[str, int]:
    found = Counter(name for label in labels for name, count in label.counts.items() if count and name)
    return dict(sorted(found.items()))


def _counted(live: Live) -> tuple[list[Label], str]:
    """Where rarity is counted: batches are chosen, and hold more of what is rare the better they are chosen."""
    held = [label for label in live.labels if label.holdout]
    return (held, "labelled holdout images") if len(held) >= RANDOM_ENOUGH else (live.labels, "labelled images")


def _rare(live: Live) -> list[str]:
    counted, _ = _counted(live)
    return rare_names(images_per_class(counted), len(counted))


def _rounds(live: Live, batches: Sequence[Json], rare: Sequence[str]) -> list[Json]:
    told, spent = [], 0.0
    for place, (row, window, batch) in enumerate(zip(live.measured, live.windows, batches, strict=False)):
        spent += sum(label.seconds or 0.0 for label in window)
        told.append(_round(row, place, spent, batch, rare))
    return told


def _round(row: Row[Any], place: int, spent: float, batch: Json, rare: Sequence[str]) -> Json:
    """`round` counts from 0, as a simulation's; `number` is the page's. `evaluation` is an artifact's key."""
    classes: Mapping[str, Any] = loads(row.per_class)
    ap50 = {name: one.get("ap50") for name, one in classes.items()}
    report = loads(row.report)
    return {
        "round": place,
        "number": row.number,
        "labels": row.labels,
        "boxes": row.boxes,
        "minutes": round(spent / 60, 2) if spent else None,
        "minutes_with_holdout": None if row.minutes is None else round(row.minutes, 2),
        "map50": row.map50,
        "map50_95": row.map50_95,
        "rare_ap50": mean_ap50(ap50, rare),
        "ap50": ap50,
        "ap50_95": {name: one.get("ap50_95") for name, one in classes.items()},
        "batch": batch,
        "seconds": {"training": report.get("seconds")},
        "note": " ".join(str(note) for note in report.get("notes") or []),
        "evaluation": round_key(row.project_id, row.number, "evaluation.npz"),
    }


def _batch(window: Sequence[Label], asked: Asked, alike: Sequence[int] | None, rare: Sequence[str]) -> Json:
    return {
        "images": [str(label.task_id) for label in window],
        **contents([label.counts for label in window], rare),
        "near_duplicates": None if alike is None else [str(task_id) for task_id in alike],
        "chosen_in": asked.numbers,
        "asked": len(asked.ranks),
        "asked_labelled": sum(label.task_id in asked.ranks for label in window),
    }


# --- from the store --------------------------------------------------------------------------------------------------


def live_view(connection: Connection, project_id: int) -> Live:
    """
    Raises:
        NotFound: the project is not connected.
    """
    project = get_project(connection, project_id)
    measured = [row for row in measured_rounds(connection, project_id) if row.labels is not None]
    ids = [int(row.id) for row in measured]
    labels = labels_of(connection, project_id)
    asked = _asked(connection, project_id, ids)
    places, embedded = _places(connection, project)
    pool, holdout = _sizes(connection, project_id)
    return Live(
        project=project,
        settings=_settings(project),
        measured=measured,
        labels=labels,
        windows=_windows(labels, ids, asked),
        asked=asked,
        pool_images=pool,
        holdout_images=holdout,
        places=places,
        embedded=embedded,
    )


def _settings(project: Row[Any]) -> ProjectSettings:
    """The page says what is wrong with settings that cannot be read, and shows the defaults."""
    try:
        return rules.settings_of(project)
    except SettingsInvalid:
        return ProjectSettings()


def _sizes(connection: Connection, project_id: int) -> tuple[int, int]:
    """Live tasks for training, labelled or not, and of the holdout."""
    held = tasks.c.holdout.is_(True)
    query = select(func.count().filter(held), func.count()).select_from(tasks)
    here = (tasks.c.project_id == project_id, tasks.c.deleted.is_(False))
    holdout, everything = connection.execute(query.where(*here)).one()
    return int(everything) - int(holdout), int(holdout)


def labels_of(connection: Connection, project_id: int) -> list[Label]:
    """Labelled images by task id: boxes of the annotation updated last, seconds of all. Without those that look like
    the holdout, which no round trains on."""
    annotated = task_annotations.join(
        tasks, (tasks.c.project_id == task_annotations.c.project_id) & (tasks.c.task_id == task_annotations.c.task_id)
    )
    columns = [task_annotations.c[name] for name in ("task_id", "lead_time", "n_boxes", "classes")]
    query = (
        select(*columns, tasks.c.holdout, tasks.c.seen_round_id)
        .select_from(annotated)
        .where(task_annotations.c.project_id == project_id, task_annotations.c.cancelled.is_(False))
        .where(tasks.c.deleted.is_(False), tasks.c.twin.is_(False))
        .order_by(task_annotations.c.updated_at, task_annotations.c.annotation_id)
    )
    rows = connection.execute(query).all()
    newest = {int(row.task_id): row for row in rows}
    seconds = _seconds(rows)
    return [
        Label(task_id, _counts(row), seconds.get(task_id), bool(row.holdout), row.seen_round_id)
        for task_id, row in sorted(newest.items())
    ]


def _counts(row: Any) -> dict[str, int]:
    """Boxes per class; of an annotation whose classes were never counted, boxes of no class."""
    found = loads(row.classes) if row.classes is not None else {"": row.n_boxes}
    return {str(name): int(count) for name, count in found.items()}


def _seconds(rows: Sequence[Any]) -> dict[int, float]:
    timed = [row for row in rows if row.lead_time is not None and 0 <= row.lead_time < 1e12]
    found: defaultdict[int, float] = defaultdict(float)
    for row, seconds in zip(timed, capped_seconds([row.lead_time for row in timed]), strict=True):
        found[row.task_id] += seconds
    return found


def _asked(connection: Connection, project_id: int, measured: Sequence[int]) -> list[Asked]:
    """By window: what rounds from the measured one before it on asked for. Later rounds have the last word on ranks."""
    query = (
        select(scores.c.round_id, rounds.c.number, scores.c.task_id, scores.c.rank)
        .select_from(scores.join(rounds, rounds.c.id == scores.c.round_id).join(
            tasks, (tasks.c.project_id == rounds.c.project_id) & (tasks.c.task_id == scores.c.task_id)
        ))
        .where(rounds.c.project_id == project_id, scores.c.rank.is_not(None))
        .where(tasks.c.holdout.is_not(True), tasks.c.deleted.is_(False))
        .order_by(scores.c.round_id, scores.c.rank)
    )  # fmt: skip
    found = [Asked([], {}) for _ in range(len(measured) + 1)]
    for round_id, number, task_id, rank in connection.execute(query):
        here = found[bisect_left(measured, round_id + 1)]  # a measured round's own batch is learned from in the next
        if number not in here.numbers:
            here.numbers.append(number)
        here.ranks[task_id] = rank
    return found


def _windows(labels: Sequence[Label], measured: Sequence[int], asked: Sequence[Asked]) -> list[list[Label]]:
    """A failed round's labels are the next one's."""
    found: list[list[Label]] = [[] for _ in asked]
    for label in labels:
        if not label.holdout:
            seen = label.seen_round_id
            found[len(measured) if seen is None else bisect_left(measured, seen)].append(label)
    for window, batch in zip(found, asked, strict=True):
        window.sort(key=lambda label, ranks=batch.ranks: (ranks.get(label.task_id, len(ranks)), label.task_id))  # type: ignore[misc]
    return found


# --- look-alikes -----------------------------------------------------------------------------------------------------


def _places(connection: Connection, project: Row[Any]) -> tuple[dict[int, tuple[int, int]], int | None]:
    """Of labelled tasks, in the embeddings of the published round: the newest, so one measure for all batches."""
    number = connection.execute(
        select(rounds.c.number).where(rounds.c.id == project.published_round_id)
    ).scalar_one_or_none()
    query = select(scores.c.task_id, scores.c.shard, scores.c.row).where(
        scores.c.round_id == project.published_round_id,
        scores.c.row.is_not(None),
        scores.c.shard >= 0,
        scores.c.task_id.in_(labelled_task_ids(project.id)),
    )
    found = {int(row.task_id): (int(row.shard), int(row.row)) for row in connection.execute(query)}
    return found, number if found else None


def look_alikes(own: Services, live: Live) -> list[list[int] | None]:
    """By window: task ids that look like a training image labelled before, or earlier in the batch.

    None: no image of it has an embedding, or the files are gone, or did not come in time, or are too many to compare.
    """
    nothing: list[list[int] | None] = [None for _ in live.windows]
    known = [[one.task_id for one in window if one.task_id in live.places] for window in live.windows]
    order = [task_id for window in known for task_id in window]
    if live.embedded is None or not 0 < len(order) <= MOST_COMPARED:
        return nothing
    rows = _embeddings(own, live, order)
    if rows is None:
        return nothing
    alike = set(np.array(order)[alike_earlier(rows, live.settings.near_duplicate_threshold)].tolist())
    return [
        [task_id for task_id in here if task_id in alike] if here or not window else None
        for here, window in zip(known, live.windows, strict=True)
    ]


def _embeddings(own: Services, live: Live, task_ids: Sequence[int]) -> NDArray[np.float32] | None:
    """(N, D) unit vectors of these; one shard at a time in memory."""
    wanted: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for position, task_id in enumerate(task_ids):
        shard, row = live.places[task_id]
        wanted[shard].append((position, row))
    deadline = time.monotonic() + EMBEDDING_SECONDS
    found: dict[int, NDArray[np.float32]] = {}
    try:
        for shard, places in sorted(wanted.items()):
            if time.monotonic() > deadline:
                return None
            here = shard_embeddings(own, live.project.id, int(live.embedded or 0), shard)
            found |= {position: here[row].copy() for position, row in places}  # a view would keep the whole shard
        rows = np.stack([found[position] for position in range(len(task_ids))]).astype(np.float32)
    except (HardfirstError, OSError, ValueError, IndexError):
        return None  # pruned meanwhile, or another round's: the report says that nothing is known
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
