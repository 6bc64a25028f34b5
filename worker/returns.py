"""What labels cost and a gain is worth: minutes from Label Studio's lead time, money from settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from sqlalchemy import Connection, select

from strategies.verdict import WORTH_GAIN
from worker.settings import ProjectSettings
from worker.store import get_project, projects, rounds, task_annotations

LONGEST = 3600.0  # seconds: an annotation that took longer was left open
LONGEST_MEDIANS = 10.0
WORTH_LIMITS = (0.001, 0.5)  # of a derived worth_gain: prices may be typed wrong

Source = Literal["default", "settings", "prices"]


@dataclass(frozen=True)
class AnnotatorTime:
    """Labelled images that Label Studio timed, and the annotators' hours over all of them (outliers capped)."""

    images: int
    hours: float

    @property
    def minutes_per_image(self) -> float | None:
        return 60 * self.hours / self.images if self.images else None


@dataclass(frozen=True)
class WorthGain:
    """The mAP50 gain that is worth the price of a round, and where the number is from."""

    value: float
    source: Source


def capped_seconds(seconds: Sequence[float]) -> list[float]:
    """Lead times with nobody at lunch in them: each at most ten times the median, and an hour.

    Values that cannot be a time (negative, NaN) are left out. The median is of those above 0.
    """
    known = [value for value in seconds if 0 <= value < float("inf")]
    positive = [value for value in known if value > 0]
    if not positive:
        return known
    longest = min(LONGEST_MEDIANS * median(positive), LONGEST)
    return [min(value, longest) for value in known]


def annotator_time(connection: Connection, project_id: int) -> AnnotatorTime:
    """Over the annotations that are no skips. An image that several people labelled cost the time of all of them."""
    query = select(task_annotations.c.task_id, task_annotations.c.lead_time).where(
        task_annotations.c.project_id == project_id,
        task_annotations.c.cancelled.is_(False),
        task_annotations.c.lead_time >= 0,
        task_annotations.c.lead_time < 1e12,
    )
    of_task: defaultdict[int, float] = defaultdict(float)
    rows = connection.execute(query).all()
    for row, seconds in zip(rows, capped_seconds([row.lead_time for row in rows]), strict=True):
        of_task[row.task_id] += seconds
    return AnnotatorTime(len(of_task), sum(of_task.values()) / 3600)


def labels_of_next_round(connection: Connection, project_id: int, settings: ProjectSettings) -> int:
    """What a round asks annotators for: as set, or as many as the last published batch."""
    published = select(projects.c.published_round_id).where(projects.c.id == project_id).scalar_subquery()
    asked = connection.execute(select(rounds.c.batch_size).where(rounds.c.id == published)).scalar_one_or_none()
    return int(settings.labels_per_round or asked or settings.batch_size)


def cost_of(labels: float, minutes_per_image: float | None, settings: ProjectSettings) -> float | None:
    """Money that many labels cost; None while nobody knows the time or the hour's price."""
    if minutes_per_image is None or settings.cost_per_hour is None:
        return None
    return labels * minutes_per_image / 60 * settings.cost_per_hour


def worth_gain_of(
    connection: Connection, project_id: int, settings: ProjectSettings, time: AnnotatorTime | None = None
) -> WorthGain:
    """As set; else the gain whose value is the next round's cost; else .02. `time`: where the caller has it already.

    Raises: NotFound: the project is not connected.
    """
    get_project(connection, project_id)
    if settings.worth_gain is not None:
        return WorthGain(settings.worth_gain, "settings")
    if settings.cost_per_hour is None or settings.value_per_point is None:
        return WorthGain(WORTH_GAIN, "default")
    minutes = (time or annotator_time(connection, project_id)).minutes_per_image
    cost = cost_of(labels_of_next_round(connection, project_id, settings), minutes, settings)
    if not cost:
        return WorthGain(WORTH_GAIN, "default")
    low, high = WORTH_LIMITS
    return WorthGain(min(max(cost / settings.value_per_point / 100, low), high), "prices")
