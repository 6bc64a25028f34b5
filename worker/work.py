"""What the body of a step has at hand."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row

from worker import queue, rounds, steps
from worker.artifacts import round_key
from worker.boxes import LabelMap
from worker.errors import (
    QueueUnavailable,
)
from worker.services import Services
from worker.settings import ProjectSettings
from worker.store import get_project

log = logging.getLogger(__name__)

MEASURES = ("least_confidence", "margin", "entropy")


# What a phase does not say must not be the last one's.
_NOTHING_SHOWN = dict.fromkeys(("done", "total", "epoch", "epochs", "losses", "eta_seconds"))


@dataclass(frozen=True)
class Work:
    """What the body of a step needs."""

    services: Services
    lease: steps.Lease
    project: Row[Any]
    round: Row[Any]

    @property
    def settings(self) -> ProjectSettings:
        return rounds.settings_of(self.round)

    @property
    def label_map(self) -> LabelMap:
        return LabelMap.from_config(self.project.label_config, self.settings.shapes)

    def refreshed(self) -> Work:
        """With the project's row as it is now: its label config may have changed since the step began."""
        with self.services.store.read() as connection:
            return replace(self, project=get_project(connection, self.project.id))

    def key(self, name: str) -> str:
        return round_key(self.project.id, self.round.number, name)

    def progress(self, phase: str, **fields: Any) -> None:
        """For the page. Also where a cancelled step ends."""
        self.lease.check()
        shown = {**_NOTHING_SHOWN, **fields, "phase": phase, "round": self.round.number}
        try:
            queue.set_progress(self.services.redis, self.project.id, **shown)
        except QueueUnavailable as error:
            log.warning("progress not shown: %s", error)


def clear_progress(own: Services, project_id: int) -> None:
    try:
        queue.clear_progress(own.redis, project_id)
    except QueueUnavailable as error:
        log.warning("progress not cleared: %s", error)
