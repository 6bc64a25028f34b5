"""Steps of a round, driven by the store: claim, renew, finish, put back, fail, sweep.

A step's row is written before its job is enqueued, and the job's first line is `claim`: a job that is delivered twice,
late, or never, changes nothing that the row does not allow. `sweep` finds rows whose job is gone and sends them again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis
from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update

from worker import queue
from worker.errors import JobFenced, QueueUnavailable
from worker.store import Store, projects, rounds, scores, steps

log = logging.getLogger(__name__)

LEASE = 30.0  # seconds a running step stays its worker's after the last sign of life
RENEW_EVERY = 5.0
SETTLE = 5.0  # a job just sent may not be visible in Redis yet
MAX_FAILURES = 3
MAX_DEATHS = 6  # more than anybody restarts a machine during one step


@dataclass(frozen=True)
class Kind:
    queue: str
    function: str
    timeout: int  # seconds; RQ kills the job then, the sweeper sends it again
    opens: str  # the round's state while it runs


KINDS = {
    "attach": Kind(queue.CONTROL, "worker.jobs.attach", 3600, "attaching"),
    "train": Kind(queue.TRAIN, "worker.jobs.retrain", 7 * 86_400, "training"),
    "member": Kind(queue.TRAIN, "worker.jobs.train_member", 7 * 86_400, "training"),
    "score": Kind(queue.SCORE, "worker.jobs.score_shard", 3600, "scoring"),
    "select": Kind(queue.CONTROL, "worker.jobs.reselect", 3600, "scoring"),
    "publish": Kind(queue.CONTROL, "worker.jobs.publish", 7200, "publishing"),
    "purge": Kind(queue.CONTROL, "worker.jobs.purge", 7200, ""),
}


def add(connection: Connection, round_id: int, kind: str, shards: Sequence[int] = (0,), delay: float = 0) -> list[int]:
    """Rows for new steps, in the transaction that decides them. Send them after it: `send_waiting`."""
    not_before = time.time() + delay if delay else None
    ids = [
        int(
            connection.execute(
                insert(steps)
                .values(round_id=round_id, kind=kind, shard=shard, state="waiting", attempt=0, failures=0)
                .values(not_before=not_before)
                .returning(steps.c.id)
            ).scalar_one()
        )
        for shard in shards
    ]
    if KINDS[kind].opens:
        connection.execute(update(rounds).where(rounds.c.id == round_id).values(state=KINDS[kind].opens))
    return ids


def _of_paused_projects() -> Any:
    """Subquery: ids of the rounds whose project is paused."""
    of_project = select(rounds.c.id).join(projects, projects.c.id == rounds.c.project_id)
    return of_project.where(projects.c.paused_at.is_not(None))


def send_waiting(store: Store, redis: Redis, round_id: int | None = None) -> int:
    """Enqueue every step that waits and is due; returns how many. Redis away: they stay, the sweeper sends them.

    Those of paused projects stay too.
    """
    query = select(steps.c.id).where(
        steps.c.state == "waiting",
        or_(steps.c.not_before.is_(None), steps.c.not_before <= time.time()),
        steps.c.round_id.not_in(_of_paused_projects()),
    )
    if round_id is not None:
        query = query.where(steps.c.round_id == round_id)
    with store.read() as connection:
        due = connection.execute(query.order_by(steps.c.id)).scalars().all()
    try:
        return sum(_send(store, redis, step_id) for step_id in due)
    except QueueUnavailable as error:
        log.warning("steps wait for the queue: %s", error)
        return 0


def _send(store: Store, redis: Redis, step_id: int) -> bool:
    with store.write() as connection:
        row = connection.execute(
            update(steps)
            .where(steps.c.id == step_id, steps.c.state == "waiting")
            .values(state="sent", attempt=steps.c.attempt + 1, sent_at=time.time())
            .returning(steps.c.attempt, steps.c.kind)
        ).first()
    if row is None:
        return False  # another process sent it
    kind = KINDS[row.kind]
    queue.enqueue_step(redis, step_id, row.attempt, kind.queue, kind.function, kind.timeout)
    return True


def start_sender(store: Store, redis: Redis, stop: threading.Event, period: float = 1.0) -> threading.Thread:
    """A thread that sends waiting steps as they fall due, until `stop` is set."""

    def send() -> None:
        while not stop.wait(period):
            try:
                send_waiting(store, redis)
            except Exception as error:  # noqa: BLE001 - the database may be away for seconds; the thread must live on
                log.warning("waiting steps not sent: %s", error)

    thread = threading.Thread(target=send, daemon=True, name="step-sender")
    thread.start()
    return thread


class Lease:
    """A claimed step. A thread renews it while the body runs; `check` raises when it was taken away."""

    def __init__(self, store: Store, row: Row[Any]) -> None:
        self.store, self.step_id, self.round_id = store, int(row.id), int(row.round_id)
        self.attempt, self.kind, self.shard = int(row.attempt), str(row.kind), int(row.shard)
        self.fenced = threading.Event()
        self._over = threading.Event()

    def check(self) -> None:
        """
        Raises:
            JobFenced: the round was cancelled, or this attempt was replaced.
        """
        if self.fenced.is_set():
            raise JobFenced(f"step {self.step_id} ({self.kind}), attempt {self.attempt}: cancelled or replaced")

    def hold(self) -> None:
        """`check`, by asking the database: before what cannot be taken back.

        Raises:
            JobFenced: as `check`.
        """
        if not self.renew():
            self.fenced.set()
        self.check()

    def mine(self) -> tuple[Any, ...]:
        """Conditions that hold only while this attempt owns the step: for every write the body makes."""
        return (steps.c.id == self.step_id, steps.c.attempt == self.attempt, steps.c.state == "running")

    def renew(self) -> bool:
        with self.store.write() as connection:
            query = update(steps).where(*self.mine()).values(lease_until=time.time() + LEASE)
            return connection.execute(query).rowcount == 1

    def _keep(self) -> None:
        while not self._over.wait(RENEW_EVERY):
            try:
                if not self.renew():
                    self.fenced.set()
                    return
            except Exception as error:  # noqa: BLE001 - a database away for seconds must not end the thread
                log.warning("lease of step %s not renewed: %s", self.step_id, error)

    @contextmanager
    def kept(self) -> Iterator[None]:
        thread = threading.Thread(target=self._keep, name=f"lease-{self.step_id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


def claim(store: Store, step_id: int, attempt: int) -> Lease | None:
    """First line of every job. None: a stale or repeated delivery, or the project is paused; return at once."""
    sent = (steps.c.id == step_id, steps.c.attempt == attempt, steps.c.state == "sent")
    with store.write() as connection:
        paused = update(steps).where(*sent, steps.c.round_id.in_(_of_paused_projects()))
        connection.execute(paused.values(state="waiting", sent_at=None))
        row = connection.execute(
            update(steps)
            .where(*sent)
            .values(state="running", lease_until=time.time() + LEASE, error=None)
            .returning(steps.c.id, steps.c.round_id, steps.c.attempt, steps.c.kind, steps.c.shard)
        ).first()
    return None if row is None else Lease(store, row)


def finish(lease: Lease, then: Callable[[Connection], None]) -> None:
    """Done. `then` runs in the same transaction when it was the last open step of its kind in the round.

    Raises:
        JobFenced: the step is no longer ours; nothing was written.
    """
    with lease.store.write() as connection:
        # PostgreSQL: serialise the siblings, else two last shards may each see the other one unfinished.
        connection.execute(select(rounds.c.id).where(rounds.c.id == lease.round_id).with_for_update())
        done = update(steps).where(*lease.mine()).values(state="done", lease_until=None)
        if connection.execute(done).rowcount != 1:
            raise JobFenced
        siblings = (
            select(func.count())
            .select_from(steps)
            .where(steps.c.round_id == lease.round_id, steps.c.kind == lease.kind, steps.c.state != "done")
        )
        if connection.execute(siblings).scalar_one() == 0:
            then(connection)


def put_back(lease: Lease, reason: str, delay: float) -> None:
    """Somebody we need is away: the step waits, and this attempt does not count as a failure."""
    values = {"state": "waiting", "not_before": time.time() + delay, "error": reason, "lease_until": None}
    with lease.store.write() as connection:
        connection.execute(update(steps).where(*lease.mine()).values(**values))


def fail(lease: Lease, reason: str, *, retry: bool) -> bool:
    """The attempt failed. True: that was the last one, the step has failed for good."""
    with lease.store.write() as connection:
        row = connection.execute(
            update(steps)
            .where(*lease.mine())
            .values(state="failed", failures=steps.c.failures + 1, error=reason, lease_until=None)
            .returning(steps.c.failures)
        ).first()
        if row is None:
            raise JobFenced
        if retry and row.failures < MAX_FAILURES:
            again = update(steps).where(steps.c.id == lease.step_id)
            connection.execute(again.values(state="waiting", not_before=time.time() + 5 * row.failures))
            return False
    return True


def expected_shards(connection: Connection, round_id: int, kind: str, members: int) -> set[int]:
    """The shards a round has of a kind of step: `members` besides the first of a committee, those that were planned of
    a scoring, else one."""
    if kind == "score":
        query = select(scores.c.shard).where(scores.c.round_id == round_id, scores.c.shard >= 0).distinct()
        return {int(shard) for shard in connection.execute(query).scalars()} or {0}
    return set(range(1, members)) if kind == "member" else {0}


def reopen(connection: Connection, round_id: int, kind: str, shards: set[int]) -> None:
    """What failed of a kind begins anew, what is done stays, what was taken away is there again."""
    here = (steps.c.round_id == round_id, steps.c.kind == kind)
    fresh = {"state": "waiting", "failures": 0, "not_before": None, "sent_at": None, "lease_until": None}
    connection.execute(update(steps).where(*here, steps.c.state == "failed").values(**fresh, error=None))
    there = set(connection.execute(select(steps.c.shard).where(*here)).scalars())
    add(connection, round_id, kind, sorted(shards - there))


def drop_open(connection: Connection, round_id: int) -> None:
    """Take the round's unfinished steps away: their workers see it at the next renewal."""
    connection.execute(
        delete(steps).where(steps.c.round_id == round_id, steps.c.state.in_(("waiting", "sent", "running")))
    )


def sweep(store: Store, redis: Redis) -> list[str]:
    """Send again what was lost; what it did, in words. Idempotent, and safe from several processes.

    Raises:
        QueueUnavailable: Redis does not answer; nothing was changed.
    """
    done: list[str] = []
    with store.read() as connection:
        query = select(steps).where(steps.c.state.in_(("sent", "running")))
        candidates = connection.execute(query).all()
    for row in candidates:
        reason = lost(redis, row)
        if reason and _give_back(store, row, reason):
            done.append(f"step {row.id} ({row.kind}): {reason}")
    send_waiting(store, redis)
    return done


def lost(redis: Redis, row: Row[Any]) -> str | None:
    """Why nobody will do a step that was sent or runs, as far as can be seen; None: somebody does it."""
    now = time.time()
    if row.state == "running":
        return "its worker died" if (row.lease_until or 0) < now else None
    if now - (row.sent_at or 0) < SETTLE:
        return None
    state = queue.job_state(redis, KINDS[row.kind].queue, row.id, row.attempt)
    if state == "started" and queue.running_seconds(redis, row.id, row.attempt) > LEASE:
        return "its worker died before it began"  # to claim the step is a job's first line
    return None if state in ("queued", "started") else f"its job was {state}"


def _give_back(store: Store, row: Row[Any], reason: str) -> bool:
    values: dict[str, Any] = {"state": "waiting", "error": reason, "lease_until": None, "not_before": None}
    if row.state == "running":  # a step that kills every worker (out of memory?) must end some time
        values["failures"] = row.failures + 1
        if row.failures + 1 >= MAX_DEATHS:
            values |= {"state": "failed", "error": f"{MAX_DEATHS} workers died at it: out of memory? See their logs"}
    still_so = (steps.c.id == row.id, steps.c.attempt == row.attempt, steps.c.state == row.state)
    with store.write() as connection:  # compare-and-set: of several sweepers one wins
        return connection.execute(update(steps).where(*still_so).values(**values)).rowcount == 1
