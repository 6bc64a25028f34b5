from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from sqlalchemy import insert, select, update

from worker import queue, steps
from worker.errors import JobFenced, QueueUnavailable
from worker.store import Store, projects, rounds, scores
from worker.store import steps as step_rows


@pytest.fixture
def conn(redis_url: str) -> Iterator[redis.Redis]:
    connection = queue.connect(redis_url)
    yield connection
    connection.close()


@pytest.fixture
def round_id(store: Store) -> int:
    with store.write() as connection:
        values = {"project_id": 7, "number": 1, "state": "waiting", "opened_at": 0.0}
        return int(connection.execute(insert(rounds).values(**values).returning(rounds.c.id)).scalar_one())


def add(store: Store, round_id: int, kind: str = "score", shards: Any = (0,), delay: float = 0) -> list[int]:
    with store.write() as connection:
        return steps.add(connection, round_id, kind, shards, delay)


def row_of(store: Store, step_id: int) -> Any:
    with store.read() as connection:
        return connection.execute(select(step_rows).where(step_rows.c.id == step_id)).one()


def set_row(store: Store, step_id: int, **values: Any) -> None:
    with store.write() as connection:
        connection.execute(update(step_rows).where(step_rows.c.id == step_id).values(**values))


def claimed(store: Store, conn: redis.Redis, step_id: int) -> steps.Lease:
    steps.send_waiting(store, conn)
    lease = steps.claim(store, step_id, row_of(store, step_id).attempt)
    assert lease is not None
    return lease


def nothing(connection: Any) -> None:
    return None


def test_adding_steps_says_what_the_round_does_now(store: Store, round_id: int) -> None:
    states = {"attach": "attaching", "train": "training", "score": "scoring", "publish": "publishing"}
    for kind, state in states.items():
        add(store, round_id, kind)
        with store.read() as connection:
            assert connection.execute(select(rounds.c.state)).scalar_one() == state
    add(store, round_id, "purge")
    with store.read() as connection:
        assert connection.execute(select(rounds.c.state)).scalar_one() == "publishing"  # a purge opens nothing


def test_what_is_due_is_sent_once_with_its_id_and_attempt(store: Store, conn: redis.Redis, round_id: int) -> None:
    due = add(store, round_id, "score", (0, 1))
    (later,) = add(store, round_id, "publish", delay=60)
    assert steps.send_waiting(store, conn) == 2
    assert steps.send_waiting(store, conn) == 0
    assert [(row_of(store, step_id).state, row_of(store, step_id).attempt) for step_id in due] == [("sent", 1)] * 2
    assert row_of(store, later).state == "waiting"
    assert queue.queue("score", conn).job_ids == [f"s{step_id}-a1" for step_id in due]
    assert queue.queue("control", conn).job_ids == []
    set_row(store, later, not_before=time.time() - 1)
    assert steps.send_waiting(store, conn) == 1
    assert queue.queue("control", conn).job_ids == [f"s{later}-a1"]


def test_without_redis_steps_stay_and_the_sweeper_sends_them(
    store: Store, conn: redis.Redis, round_id: int, tmp_path: Any
) -> None:
    (step_id,) = add(store, round_id)
    away = queue.connect(f"unix://{tmp_path}/nobody.sock")
    assert steps.send_waiting(store, away) == 0
    assert row_of(store, step_id).state == "sent"  # the row was written before the job; the job is not there
    set_row(store, step_id, sent_at=0.0)
    with pytest.raises(QueueUnavailable):
        steps.sweep(store, away)
    assert row_of(store, step_id).attempt == 1
    assert steps.sweep(store, conn) == [f"step {step_id} (score): its job was missing"]
    row = row_of(store, step_id)
    assert (row.state, row.attempt, row.failures) == ("sent", 2, 0)
    assert queue.queue("score", conn).job_ids == [f"s{step_id}-a2"]


def test_of_many_claims_one_wins(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    steps.send_waiting(store, conn)
    barrier, won = threading.Barrier(6), []

    def claim() -> None:
        barrier.wait()
        if steps.claim(store, step_id, 1) is not None:
            won.append(1)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]
    assert row_of(store, step_id).state == "running"


def test_a_stale_or_repeated_delivery_is_not_claimed(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    assert steps.claim(store, step_id, 0) is None  # not sent yet
    steps.send_waiting(store, conn)
    assert steps.claim(store, step_id, 2) is None
    assert steps.claim(store, step_id + 99, 1) is None
    lease = steps.claim(store, step_id, 1)
    assert lease is not None
    assert (lease.step_id, lease.round_id, lease.attempt, lease.kind, lease.shard) == (step_id, round_id, 1, "score", 0)
    assert steps.claim(store, step_id, 1) is None
    steps.finish(lease, nothing)
    assert steps.claim(store, step_id, 1) is None


def test_a_replaced_attempt_can_write_nothing(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    stale = claimed(store, conn, step_id)
    set_row(store, step_id, lease_until=time.time() - 1)
    assert steps.sweep(store, conn) == [f"step {step_id} (score): its worker died"]
    own = steps.claim(store, step_id, 2)
    assert own is not None
    written: list[int] = []
    with pytest.raises(JobFenced):
        steps.finish(stale, lambda connection: written.append(1))
    with pytest.raises(JobFenced):
        steps.fail(stale, "too late", retry=False)
    steps.put_back(stale, "too late", 0)
    assert not stale.renew()
    row = row_of(store, step_id)
    assert (row.state, row.attempt, row.error, row.failures, written) == ("running", 2, None, 1, [])
    steps.finish(own, lambda connection: written.append(2))
    assert written == [2]


def test_the_lease_is_renewed_and_a_cancelled_body_is_told(
    store: Store, conn: redis.Redis, round_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "RENEW_EVERY", 0.05)
    (step_id,) = add(store, round_id)
    lease = claimed(store, conn, step_id)
    first = row_of(store, step_id).lease_until
    with lease.kept():
        deadline = time.monotonic() + 10
        while row_of(store, step_id).lease_until == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert row_of(store, step_id).lease_until > first
        lease.check()
        with store.write() as connection:
            steps.drop_open(connection, round_id)
        assert lease.fenced.wait(10)
    with pytest.raises(JobFenced, match=f"step {step_id} .score., attempt 1: cancelled or replaced"):
        lease.check()


def test_a_cancelled_steps_worker_does_not_take_the_next_step_for_its_own(
    store: Store, conn: redis.Redis, round_id: int
) -> None:
    (cancelled,) = add(store, round_id, "train")
    stale = claimed(store, conn, cancelled)
    with store.write() as connection:
        steps.drop_open(connection, round_id)
    (following,) = add(store, round_id, "train")
    own = claimed(store, conn, following)
    assert not stale.renew()
    with pytest.raises(JobFenced):
        steps.finish(stale, nothing)
    steps.finish(own, nothing)
    assert row_of(store, following).state == "done"


def test_waiting_for_somebody_is_no_failure(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    set_row(store, step_id, failures=2)
    for attempt in range(1, 6):
        lease = claimed(store, conn, step_id)
        assert lease.attempt == attempt
        steps.put_back(lease, "Label Studio does not answer", 30)
        row = row_of(store, step_id)
        assert (row.state, row.failures, row.error) == ("waiting", 2, "Label Studio does not answer")
        assert row.not_before == pytest.approx(time.time() + 30, abs=5)
        assert steps.send_waiting(store, conn) == 0
        set_row(store, step_id, not_before=None)


def test_a_step_fails_for_good_the_third_time_or_at_once(store: Store, conn: redis.Redis, round_id: int) -> None:
    first, second = add(store, round_id, "score", (0, 1))
    for failures in (1, 2):
        assert steps.fail(claimed(store, conn, first), "a bug", retry=True) is False
        row = row_of(store, first)
        assert (row.state, row.failures, row.error) == ("waiting", failures, "a bug")
        assert row.not_before == pytest.approx(time.time() + 5 * failures, abs=3)
        set_row(store, first, not_before=None)
    assert steps.fail(claimed(store, conn, first), "a bug", retry=True) is True
    assert (row_of(store, first).state, row_of(store, first).failures) == ("failed", 3)
    lease = steps.claim(store, second, row_of(store, second).attempt)
    assert lease is not None
    assert steps.fail(lease, "nothing to learn from", retry=False) is True
    assert (row_of(store, second).state, row_of(store, second).error) == ("failed", "nothing to learn from")


def test_the_last_shard_and_no_other_begins_what_follows(store: Store, conn: redis.Redis, round_id: int) -> None:
    ids = add(store, round_id, "score", range(8))
    steps.send_waiting(store, conn)
    leases = [steps.claim(store, step_id, 1) for step_id in ids]
    barrier = threading.Barrier(len(ids))
    errors: list[BaseException] = []

    def end(lease: steps.Lease) -> None:
        try:
            barrier.wait()
            steps.finish(lease, lambda connection: steps.add(connection, round_id, "publish") and None)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=end, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with store.read() as connection:
        kinds = connection.execute(select(step_rows.c.kind, step_rows.c.state).order_by(step_rows.c.id)).all()
    assert [tuple(row) for row in kinds] == [("score", "done")] * 8 + [("publish", "waiting")]


def test_what_follows_is_part_of_the_end(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    lease = claimed(store, conn, step_id)
    with pytest.raises(ZeroDivisionError):
        steps.finish(lease, lambda connection: 1 / 0)  # type: ignore[arg-type,return-value]
    assert row_of(store, step_id).state == "running"  # neither half was written


def test_a_job_that_waits_or_runs_is_left_alone(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    steps.send_waiting(store, conn)
    set_row(store, step_id, sent_at=time.time() - 3600)
    assert steps.sweep(store, conn) == []  # queued, however long
    conn.flushall()
    set_row(store, step_id, sent_at=time.time())
    assert steps.sweep(store, conn) == []  # too fresh to judge
    set_row(store, step_id, sent_at=time.time() - steps.SETTLE - 1)
    assert steps.sweep(store, conn) == [f"step {step_id} (score): its job was missing"]
    assert steps.claim(store, step_id, 2) is not None
    assert steps.sweep(store, conn) == []  # its lease is not over


def test_of_several_sweepers_one_gives_it_back(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    steps.send_waiting(store, conn)
    conn.flushall()
    set_row(store, step_id, sent_at=0.0)
    done: list[str] = []
    barrier = threading.Barrier(4)

    def sweep() -> None:
        barrier.wait()
        done.extend(steps.sweep(store, conn))

    threads = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert row_of(store, step_id).attempt == 2
    assert queue.queue("score", conn).job_ids == [f"s{step_id}-a2"]


def test_a_step_that_kills_its_workers_fails_in_the_end(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    for death in range(1, steps.MAX_DEATHS + 1):
        claimed(store, conn, step_id)
        set_row(store, step_id, lease_until=time.time() - 1)
        steps.sweep(store, conn)
        assert row_of(store, step_id).failures == death
    row = row_of(store, step_id)
    assert (row.state, row.attempt) == ("failed", steps.MAX_DEATHS)
    assert "6 workers died at it: out of memory?" in row.error


def test_the_sender_sends_what_falls_due_and_ends_when_told(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id, delay=0.2)
    stop = threading.Event()
    thread = steps.start_sender(store, conn, stop, period=0.05)
    deadline = time.monotonic() + 10
    while row_of(store, step_id).state == "waiting" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert row_of(store, step_id).state == "sent"
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def set_paused(store: Store, at: float | None) -> None:
    with store.write() as connection:
        connection.execute(update(projects).values(paused_at=at))


def test_no_step_of_a_paused_project_is_sent(store: Store, conn: redis.Redis, round_id: int) -> None:
    (step_id,) = add(store, round_id)
    set_paused(store, 1.0)
    assert steps.send_waiting(store, conn) == 0
    assert row_of(store, step_id).state == "waiting"
    set_paused(store, None)
    assert steps.send_waiting(store, conn) == 1


def test_a_job_that_a_worker_takes_after_the_pause_does_nothing_and_is_sent_again_after_it(
    store: Store, conn: redis.Redis, round_id: int
) -> None:
    (step_id,) = add(store, round_id)
    steps.send_waiting(store, conn)
    set_paused(store, 1.0)
    assert steps.claim(store, step_id, 1) is None
    assert (row_of(store, step_id).state, row_of(store, step_id).failures) == ("waiting", 0)
    set_paused(store, None)
    assert steps.send_waiting(store, conn) == 1
    assert steps.claim(store, step_id, 1) is None, "the delivery of before"
    assert steps.claim(store, step_id, 2) is not None


def test_a_step_that_runs_is_finished_in_the_pause_and_the_next_one_waits(
    store: Store, conn: redis.Redis, round_id: int
) -> None:
    (step_id,) = add(store, round_id)
    lease = claimed(store, conn, step_id)
    set_paused(store, 1.0)
    lease.hold()
    steps.finish(lease, lambda connection: steps.add(connection, round_id, "publish") and None)
    assert row_of(store, step_id).state == "done"
    assert steps.send_waiting(store, conn) == 0
    assert row_of(store, step_id + 1).state == "waiting"


def test_the_shards_a_round_has_to_have(store: Store, round_id: int) -> None:
    with store.write() as connection:
        assert steps.expected_shards(connection, round_id, "score", 3) == {0}, "nothing was planned"
        rows = [{"round_id": round_id, "task_id": one, "shard": shard} for one, shard in enumerate((0, 0, 1, 4, -1))]
        connection.execute(insert(scores), rows)
        assert steps.expected_shards(connection, round_id, "score", 3) == {0, 1, 4}
        assert steps.expected_shards(connection, round_id, "member", 3) == {1, 2}
        assert steps.expected_shards(connection, round_id, "publish", 3) == {0}
