"""What the page tells about measuring: how much the holdout can see, what labels cost, what each round returned.

Reads the store, nothing else. The verdict itself is made when rounds are measured (`worker.measuring`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, select

from strategies.verdict import (
    RARE_BOXES,
    ClassCurve,
    GainEstimate,
    More,
    expected_gain,
    in_words,
    more_holdout,
    plateau,
    power_sentence,
    smallest_visible_gain,
    still_rises,
)
from worker import rounds as rules
from worker.errors import SettingsInvalid
from worker.returns import (
    Source,
    annotator_time,
    cost_of,
    labels_of_next_round,
    worth_gain_of,
)
from worker.settings import HOLDOUT_LIMITS, HOLDOUT_SHARE, ProjectSettings
from worker.store import get_project, labelled_task_ids, loads, measured_rounds, task_annotations, tasks

PLATEAU_ROUNDS = 3


# --- what the holdout can see -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """The holdout: its size, its boxes per class, the smallest gain per round that it can tell from luck.

    `waiting` images are asked for and join with the next batch. `more` is worth asking for (0: nothing is).
    `from_`: the bootstrap of the newest round, or what a holdout of this size gives on average.
    """

    holdout: int
    labelled: int
    waiting: int
    boxes_per_class: dict[str, float]
    boxes_are: Literal["labelled", "expected", "unknown"]
    smallest_visible_gain: float | None
    more: int
    smallest_visible_gain_then: float | None
    from_: Literal["measured", "expected"]
    sentence: str


def power_of(connection: Connection, project_id: int) -> Power:
    """Known from the moment the holdout is drawn, before the first round.

    Raises: NotFound: the project is not connected.
    """
    project = get_project(connection, project_id)
    size, labelled = _holdout_size(connection, project_id)
    boxes, boxes_are = _holdout_boxes(connection, project_id, size, labelled)
    measured = _measured_gain(connection, project_id, size)
    gain = measured or expected_gain(size, list(boxes.values()))
    visible = smallest_visible_gain(gain)
    if size:
        worth = worth_gain_of(connection, project_id, _settings(project)).value
        enough = 2 * (size + project.more_holdout)  # more than `size` are never suggested
        room = max(rules.count_drawable(connection, project_id, up_to=enough) // 2 - project.more_holdout, 0)
        more = _at_most(room, more_holdout(gain, size, worth), gain, size)
    else:
        more = More(_another_holdout(connection, project), visible)
    return Power(
        holdout=size,
        labelled=labelled,
        waiting=int(project.more_holdout),
        boxes_per_class=boxes,
        boxes_are=boxes_are,
        smallest_visible_gain=visible if size else None,
        more=more.images,
        smallest_visible_gain_then=more.smallest_visible_gain if more.images and size else None,
        from_="measured" if measured else "expected",
        sentence=power_sentence(size, visible, more),
    )


def _another_holdout(connection: Connection, project: Row[Any]) -> int:
    """How many images a holdout would have now, for a project whose own is gone: its tasks were deleted, and others
    imported. 0 while it is still to be drawn, or asked for already, and where the settings want none."""
    if project.published_round_id is None or project.more_holdout:
        return 0
    settings = _settings(project)
    enough = max(math.ceil(HOLDOUT_LIMITS[1] / HOLDOUT_SHARE), 2 * (settings.holdout_size or 0))
    return settings.holdout_for(rules.count_drawable(connection, project.id, up_to=enough))


def _at_most(room: int, more: More, gain: GainEstimate, size: int) -> More:
    """No more images than the pool can spare."""
    return more if more.images <= room else More(room, smallest_visible_gain(gain, 1 + room / size))


def _holdout_size(connection: Connection, project_id: int) -> tuple[int, int]:
    """Live holdout tasks, and how many of them are labelled."""
    held = (tasks.c.project_id == project_id, tasks.c.holdout.is_(True), tasks.c.deleted.is_(False))
    query = select(func.count()).select_from(tasks).where(*held)
    size = int(connection.execute(query).scalar_one())
    labelled = query.where(tasks.c.task_id.in_(labelled_task_ids(project_id)))
    return size, int(connection.execute(labelled).scalar_one())


def _holdout_boxes(
    connection: Connection, project_id: int, size: int, labelled: int
) -> tuple[dict[str, float], Literal["labelled", "expected", "unknown"]]:
    """Label -> boxes in the holdout: counted when all of it is labelled, else scaled up from the labelled images."""
    if labelled and labelled >= 0.9 * size:
        counts, images = boxes_per_label(connection, project_id, holdout=True)
        return {name: float(count) for name, count in counts.items()}, "labelled" if counts else "unknown"
    # the random part says more than images that were chosen for being hard
    for holdout in (True, None):
        counts, images = boxes_per_label(connection, project_id, holdout=holdout)
        if images >= 10:
            return {name: round(count * size / images, 1) for name, count in counts.items()}, "expected"
    return {}, "unknown"


def boxes_per_label(
    connection: Connection, project_id: int, *, holdout: bool | None = None
) -> tuple[dict[str, int], int]:
    """Label -> boxes over labelled images, and how many images: of each the annotation updated last.

    Args: holdout: only its images, only the others, or (None) all.
    """
    query = (
        select(task_annotations.c.task_id, task_annotations.c.classes)
        .join(
            tasks,
            (tasks.c.project_id == task_annotations.c.project_id) & (tasks.c.task_id == task_annotations.c.task_id),
        )
        .where(
            task_annotations.c.project_id == project_id,
            task_annotations.c.cancelled.is_(False),
            task_annotations.c.classes.is_not(None),
            tasks.c.deleted.is_(False),
        )
        .order_by(task_annotations.c.updated_at, task_annotations.c.annotation_id)
    )
    if holdout is not None:
        query = query.where(tasks.c.holdout.is_(True) if holdout else tasks.c.holdout.is_not(True))
    newest = {row.task_id: row.classes for row in connection.execute(query)}
    counts: Counter[str] = Counter()
    for classes in newest.values():
        counts.update(loads(classes))
    return dict(sorted(counts.items())), len(newest)


def _measured_gain(connection: Connection, project_id: int, size: int) -> GainEstimate | None:
    """Of the newest verdict, when it judged a mean over two rounds on (nearly) all of today's holdout."""
    measured = measured_rounds(connection, project_id)
    numbers = loads(measured[-1].verdict).get("numbers") if measured else None
    if not numbers or numbers.get("rounds_used") != 2 or numbers.get("se") is None:
        return None
    if not size or abs(numbers["holdout_images"] - size) > 0.1 * size:
        return None  # it grew since, or was half labelled then
    se, training = float(numbers["se"]), math.sqrt(2) * float(numbers["training_sd"]) / 2
    return GainEstimate(float(numbers["mean_gain"]), se, 2, math.sqrt(max(se**2 - training**2, 0.0)), training)


# --- what labels cost, what rounds returned ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prices:
    """Time and money: minutes per image from Label Studio's lead time, the rest from the project's settings."""

    minutes_per_image: float | None
    timed_images: int
    hours: float
    cost_per_hour: float | None
    value_per_point: float | None
    worth_gain: float
    worth_gain_from: Source
    cost_so_far: float | None
    cost_of_next_round: float | None
    next_round_labels: int
    sentence: str


def prices_of(connection: Connection, project_id: int) -> Prices:
    """
    Raises: NotFound: the project is not connected.
    """
    settings = _settings(get_project(connection, project_id))
    time = annotator_time(connection, project_id)
    worth = worth_gain_of(connection, project_id, settings, time)
    labels = labels_of_next_round(connection, project_id, settings)
    cost = cost_of(labels, time.minutes_per_image, settings)
    return Prices(
        minutes_per_image=time.minutes_per_image,
        timed_images=time.images,
        hours=time.hours,
        cost_per_hour=settings.cost_per_hour,
        value_per_point=settings.value_per_point,
        worth_gain=worth.value,
        worth_gain_from=worth.source,
        cost_so_far=None if settings.cost_per_hour is None else time.hours * settings.cost_per_hour,
        cost_of_next_round=cost,
        next_round_labels=labels,
        sentence=_price_sentence(time.minutes_per_image, labels, cost, worth.value, worth.source),
    )


def _price_sentence(minutes: float | None, labels: int, cost: float | None, worth: float, source: Source) -> str:
    worth_words = {
        "default": "unless you set what it is worth",
        "settings": "as set",
        "prices": "by its cost and the value of a point",
    }[source]
    last = f"A round is worth it from {in_words(worth)} mAP50 on, {worth_words}."
    if minutes is None:
        return f"Nobody has labelled an image yet: what a label costs is not known. {last}"
    hours = labels * minutes / 60
    price = "" if cost is None else f", and cost {cost:,.0f}"
    return f"An image takes {minutes:.1f} minutes; the next {labels} take {hours:.1f} hours{price}. {last}"


@dataclass(frozen=True)
class Return:
    """What one measured round bought: its gain against the measured round before, and what its labels cost."""

    round_id: int
    number: int
    labels: int
    labels_added: int | None
    hours_added: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    per_100_labels: float | None
    per_hour: float | None
    cost: float | None
    value: float | None
    net: float | None


def returns_of(connection: Connection, project_id: int) -> list[Return]:
    """One per measured round, oldest first. The first has nothing to be compared with.

    Raises: NotFound: the project is not connected.
    """
    settings = _settings(get_project(connection, project_id))
    measured = measured_rounds(connection, project_id)
    return [_return(row, measured[place - 1] if place else None, settings) for place, row in enumerate(measured)]


def _return(row: Row[Any], earlier: Row[Any] | None, settings: ProjectSettings) -> Return:
    added = hours = gain = None
    if earlier is not None:
        added = int(row.labels or 0) - int(earlier.labels or 0)
        gain = float(row.map50) - float(earlier.map50)
        if row.minutes is not None and earlier.minutes is not None:
            hours = max(float(row.minutes) - float(earlier.minutes), 0.0) / 60
    interval = loads(row.verdict).get("interval") or {}
    cost = None if hours is None or settings.cost_per_hour is None else hours * settings.cost_per_hour
    value = None if gain is None or settings.value_per_point is None else 100 * gain * settings.value_per_point
    return Return(
        round_id=row.id,
        number=row.number,
        labels=int(row.labels or 0),
        labels_added=added,
        hours_added=hours,
        gain=gain,
        gain_low=interval.get("gain_low") if gain is not None else None,
        gain_high=interval.get("gain_high") if gain is not None else None,
        per_100_labels=None if gain is None or not added or added < 0 else gain / (added / 100),
        per_hour=None if gain is None or not hours else gain / hours,
        cost=cost,
        value=value,
        net=None if value is None or cost is None else value - cost,
    )


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassHistory:
    """AP50 of a class in each measured round (None: not in the holdout then), with flags and a sentence about it."""

    name: str
    ap50: list[float | None]
    boxes: int
    training_boxes: int | None
    flags: list[Literal["rare", "plateau", "rising"]]
    sentence: str


def class_histories(connection: Connection, project_id: int) -> list[ClassHistory]:
    """The classes of the newest measured round, by name.

    Raises: NotFound: the project is not connected.
    """
    worth = worth_gain_of(connection, project_id, _settings(get_project(connection, project_id))).value
    measured = measured_rounds(connection, project_id)
    if not measured:
        return []
    per_round = [loads(row.per_class) for row in measured]
    training = loads(measured[-1].report).get("boxes_per_class")
    return [_history(name, per_round, training, worth) for name in sorted(per_round[-1])]


def _history(
    name: str, per_round: Sequence[Mapping[str, Any]], training: Mapping[str, int] | None, worth: float
) -> ClassHistory:
    ap50 = [(found.get(name) or {}).get("ap50") for found in per_round]
    boxes = int(per_round[-1][name].get("boxes") or 0)
    curve = ClassCurve(name, ap50, boxes)
    flags: list[Literal["rare", "plateau", "rising"]] = ["rare"] if boxes < RARE_BOXES else []
    if still_rises(curve, worth):
        flags.append("rising")
    elif plateau(curve, worth, PLATEAU_ROUNDS):
        flags.append("plateau")
    told = None if training is None else int(training.get(name) or 0)
    return ClassHistory(name, ap50, boxes, told, flags, _class_sentence(curve, flags, worth))


def _has_fallen(ap50: Sequence[float | None], worth: float) -> bool:
    recent = [value for value in ap50[-(PLATEAU_ROUNDS + 1) :] if value is not None]
    return max(recent[1:]) <= recent[0] - worth


def _class_sentence(curve: ClassCurve, flags: Sequence[str], worth: float) -> str:
    told = []
    if "plateau" in flags:
        moved = "has been lower" if _has_fallen(curve.ap50, worth) else "has not moved"
        told.append(f"AP of {curve.name} {moved} for {PLATEAU_ROUNDS} rounds: collect more of it.")
    if "rising" in flags:
        told.append(f"AP of {curve.name} still rises.")
    if "rare" in flags:
        told.append(f"The holdout holds {curve.boxes} boxes of {curve.name}: its AP is mostly luck.")
    return " ".join(told)


def _settings(project: Row[Any]) -> ProjectSettings:
    """Defaults where the stored settings are of a version that knew others: the page must open all the same."""
    try:
        return rules.settings_of(project)
    except SettingsInvalid:
        return ProjectSettings()
