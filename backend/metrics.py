"""/metrics: what an engineer's Prometheus watches. Counted anew at each scrape, from the store and the queue."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy import Connection, func, select

from backend.ml_api import Own
from backend.views import count_tasks
from worker import queue
from worker.errors import QueueUnavailable
from worker.services import Services
from worker.store import CLOSED_STATES, OPEN_STATES, measured_rounds, projects, rounds, steps

router = APIRouter(tags=["operations"])
COUNTS = {
    "tasks": "Live tasks.",
    "labels": "Labelled tasks outside of the holdout.",
    "holdout": "Tasks of the holdout.",
    "holdout_labels": "Labelled tasks of the holdout.",
    "pool": "Unlabelled tasks outside of the holdout whose image can be read.",
}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(own: Own) -> Response:
    """In Prometheus' text format. Redis away: hardfirst_queue_up is 0, the rest is there."""
    registry = CollectorRegistry()
    registry.register(_Scrape(own))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Scrape:
    def __init__(self, own: Services) -> None:
        self._own = own

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._own.store.read() as connection:
            yield from _projects(connection)
            yield _rounds(connection)
            yield _steps(connection)
        yield from _queues(self._own)


def _projects(connection: Connection) -> Iterator[GaugeMetricFamily]:
    counts = {name: _gauge(f"hardfirst_{name}", text, "project") for name, text in COUNTS.items()}
    map50 = _gauge("hardfirst_map50", "mAP50 of the last measured round.", "project")
    for project_id in connection.execute(select(projects.c.id).order_by(projects.c.id)).scalars().all():
        found = count_tasks(connection, project_id)
        for name, gauge in counts.items():
            gauge.add_metric([str(project_id)], getattr(found, name))
        measured = measured_rounds(connection, project_id)
        if measured:
            map50.add_metric([str(project_id)], measured[-1].map50)
    yield from (*counts.values(), map50)


def _rounds(connection: Connection) -> GaugeMetricFamily:
    gauge = _gauge("hardfirst_rounds", "Rounds, by project and state.", "project", "state")
    query = select(rounds.c.project_id, rounds.c.state, func.count()).group_by(rounds.c.project_id, rounds.c.state)
    found: dict[tuple[int, str], int] = {(row[0], row[1]): row[2] for row in connection.execute(query)}
    for project_id in sorted({project_id for project_id, _ in found}):
        for state in (*OPEN_STATES, *CLOSED_STATES):  # a series that comes and goes cannot be alerted on
            gauge.add_metric([str(project_id), state], found.get((project_id, state), 0))
    return gauge


def _steps(connection: Connection) -> GaugeMetricFamily:
    gauge = _gauge("hardfirst_steps_open", "Steps that wait, are sent or run, by kind.", "kind", "state")
    query = (
        select(steps.c.kind, steps.c.state, func.count())
        .where(steps.c.state.in_(("waiting", "sent", "running")))
        .group_by(steps.c.kind, steps.c.state)
    )
    for kind, state, count in connection.execute(query.order_by(steps.c.kind, steps.c.state)):
        gauge.add_metric([kind, state], count)
    return gauge


def _queues(own: Services) -> Iterator[GaugeMetricFamily]:
    up = GaugeMetricFamily("hardfirst_queue_up", "1 when Redis answers.")
    lengths: dict[str, int] = {}
    try:
        lengths = queue.queue_lengths(own.redis)
    except QueueUnavailable:
        up.add_metric([], 0)
    else:
        up.add_metric([], 1)
    waiting = _gauge("hardfirst_queue_jobs", "Jobs that wait, by queue.", "queue")
    for name, length in lengths.items():
        waiting.add_metric([name], length)
    yield from (up, waiting)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)
