from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import select, update

from worker import jobs, queue, rounds, steps
from worker.boxes import LabelMap
from worker.errors import DatasetUnusable, JobFenced, LabelConfigUnsupported, LabelStudioRefused, LabelStudioUnavailable
from worker.services import Services
from worker.settings import ProjectSettings, Settings
from worker.store import projects
from worker.store import rounds as round_rows
from worker.store import steps as step_rows
from worker.work import Work

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)


@pytest.fixture
def own(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """A worker's connections, with project 7 at round 0 and its first step due."""
    values: dict[str, Any] = {"redis_url": redis_url, "data_dir": tmp_path, "label_studio_url": "http://127.0.0.1:9"}
    made = Services(Settings(_env_file=None, **values), "worker")
    made.store.migrate()
    monkeypatch.setattr(jobs, "services", lambda: made)
    monkeypatch.setattr(rounds, "ATTACH_DELAY", 0.0)
    with made.store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(batch_size=4), "http://backend:9090")
    yield made
    made.store.close()


def run(own: Services) -> None:
    """What is due, once, by RQ's own worker."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    steps.send_waiting(own.store, own.redis)
    try:
        worker = queue.make_worker("simple", queue.QUEUES, own.redis)
        worker.work(burst=True, logging_level="CRITICAL", max_jobs=1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def the_step(own: Services) -> Any:
    with own.store.read() as connection:
        return connection.execute(select(step_rows).order_by(step_rows.c.id.desc())).first()


def the_round(own: Services) -> Any:
    with own.store.read() as connection:
        return connection.execute(select(round_rows)).one()


def problem(own: Services) -> str | None:
    with own.store.read() as connection:
        return connection.execute(select(projects.c.problem)).scalar_one()  # type: ignore[no-any-return]


def body(monkeypatch: pytest.MonkeyPatch, action: Callable[[Work], None]) -> None:
    monkeypatch.setattr(jobs, "attach_project", action)


def raising(error: Exception) -> Callable[[Work], None]:
    def act(work: Work) -> None:
        raise error

    return act


def test_the_body_gets_its_round_project_and_settings(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def act(work: Work) -> None:
        seen.append((work.project.id, work.round.number, work.settings.batch_size, work.label_map.labels))
        seen.append(work.key("a.npz"))
        work.progress("attaching", done=3)
        steps.finish(work.lease, lambda connection: None)

    body(monkeypatch, act)
    run(own)
    assert seen == [(7, 0, 4, ("nut",)), "p7/r000000/a.npz"]
    assert the_step(own).state == "done"
    shown = queue.get_progress(own.redis, 7)
    assert (shown["phase"], shown["round"], shown["done"]) == ("attaching", 0, 3)


def test_somebody_away_is_told_and_waited_for(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    body(monkeypatch, raising(LabelStudioUnavailable("Label Studio does not answer")))
    run(own)
    row = the_step(own)
    assert (row.state, row.attempt, row.failures, row.error) == ("waiting", 1, 0, "Label Studio does not answer")
    assert row.not_before is not None
    assert problem(own) == "Label Studio does not answer"
    assert the_round(own).state == "attaching"


@pytest.mark.parametrize("error", [DatasetUnusable("no box at all"), LabelStudioRefused("no box at all")])
def test_an_error_that_will_not_go_away_ends_the_round_with_its_sentence(
    own: Services, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    queue.set_progress(own.redis, 7, phase="attaching")
    body(monkeypatch, raising(error))
    run(own)
    assert (the_round(own).state, the_round(own).error) == ("failed", "no box at all")
    assert problem(own) == "no box at all"
    assert queue.get_progress(own.redis, 7) == {}
    assert the_step(own).state == "failed"


def test_a_bug_is_tried_three_times_and_then_named(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    body(monkeypatch, raising(ZeroDivisionError("division by zero\n[parameters: a secret]")))
    for attempt in (1, 2, 3):
        assert the_round(own).state == "attaching"
        with own.store.write() as connection:
            connection.execute(update(step_rows).values(not_before=None))
        run(own)
        assert the_step(own).attempt == attempt
    assert the_round(own).state == "failed"
    assert problem(own) == "ZeroDivisionError: division by zero"
    failed = queue.queue("control", own.redis).failed_job_registry.get_job_ids()
    assert len(failed) == 3  # RQ keeps each, with its traceback


def test_a_cancelled_body_stops_in_silence(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(work: Work) -> None:
        with own.store.write() as connection:
            rounds.cancel_round(connection, 7)
        assert work.lease.renew() is False
        work.lease.fenced.set()
        work.progress("attaching")
        pytest.fail("progress is where a cancelled step ends")

    body(monkeypatch, act)
    run(own)
    assert the_round(own).state == "cancelled"
    assert problem(own) is None
    assert the_step(own) is None
    assert queue.queue("control", own.redis).failed_job_registry.get_job_ids() == []


def test_an_error_of_a_replaced_attempt_fails_nothing(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(work: Work) -> None:
        with own.store.write() as connection:  # the sweeper gave it to another
            connection.execute(update(step_rows).values(attempt=2, state="running", lease_until=9e9))
        raise DatasetUnusable("of an attempt nobody waits for")

    body(monkeypatch, act)
    run(own)
    assert (the_step(own).state, the_step(own).attempt) == ("running", 2)
    assert the_round(own).state == "attaching"
    assert problem(own) is None


def test_a_job_delivered_again_does_nothing(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def act(work: Work) -> None:
        calls.append(work.lease.attempt)
        steps.finish(work.lease, lambda connection: None)

    body(monkeypatch, act)
    run(own)
    step = the_step(own)
    jobs.attach(step.id, 1)
    jobs.attach(step.id, 0)
    jobs.attach(12345, 1)
    assert calls == [1]


def test_without_redis_work_goes_on_and_only_the_bar_is_missing(
    own: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def act(work: Work) -> None:
        monkeypatch.setattr(own, "redis", queue.connect(f"unix://{tmp_path}/nobody.sock"))
        work.progress("attaching")
        steps.finish(work.lease, lambda connection: None)

    body(monkeypatch, act)
    steps.send_waiting(own.store, own.redis)
    jobs.attach(the_step(own).id, 1)
    assert the_step(own).state == "done"


def test_reconcile_closes_what_died_and_one_projects_trouble_is_its_own(
    own: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own.store.write() as connection:
        for project_id in (8, 9):
            rounds.connect_project(connection, project_id, CONFIG, ProjectSettings(), "http://backend:9090")
        connection.execute(update(round_rows).where(round_rows.c.project_id >= 8).values(state="done"))
        connection.execute(update(projects).where(projects.c.id >= 8).values(published_round_id=2))
        connection.execute(update(step_rows).where(step_rows.c.round_id > 1).values(state="done"))
        connection.execute(
            update(step_rows).where(step_rows.c.round_id == 1).values(state="failed", error="6 workers died at it")
        )
    synced: list[int] = []

    def sync(services: Services, project_id: int, **kwargs: Any) -> None:
        synced.append(project_id)
        if project_id == 8:
            raise ZeroDivisionError

    monkeypatch.setattr(jobs, "sync_project", sync)
    monkeypatch.setattr(jobs, "score_late", lambda *args: None)
    jobs.reconcile()
    assert synced == [8, 9]
    with own.store.read() as connection:
        states = dict(connection.execute(select(round_rows.c.project_id, round_rows.c.state)).all())
        problems = dict(connection.execute(select(projects.c.id, projects.c.problem)).all())
    assert states == {7: "failed", 8: "done", 9: "done"}
    assert problems[7] == "6 workers died at it"


def test_a_label_config_that_setup_refuses_is_told_until_it_is_mended(
    own: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sync_project", "remeasure_if_changed", "score_late", "heal"):
        monkeypatch.setattr(jobs, name, lambda *args, **kwargs: None)
    with pytest.raises(LabelConfigUnsupported) as refused:
        LabelMap.from_config("<View/>")
    with own.store.write() as connection:
        connection.execute(update(round_rows).values(state="done"))
        rounds.note_refusal(connection, 7, "http://backend:9090", str(refused.value))
        # Label Studio has it all the same: it asks /setup when somebody looks at the Model page
        connection.execute(update(projects).values(label_config="<View/>", published_round_id=1))
    jobs.reconcile()
    assert problem(own) == str(refused.value)
    with own.store.write() as connection:
        connection.execute(update(projects).values(label_config=CONFIG))
    jobs.reconcile()
    assert problem(own) is None


def test_every_step_kind_has_a_job_that_may_be_run() -> None:
    for kind in steps.KINDS.values():
        assert kind.function in queue.JOB_FUNCTIONS
        assert callable(getattr(jobs, kind.function.rpartition(".")[2]))
    assert {name.rpartition(".")[2] for name in queue.JOB_FUNCTIONS} >= {"predict", "reconcile"}


def test_jobs_carry_nothing_but_json(own: Services, redis_url: str) -> None:
    steps.send_waiting(own.store, own.redis)
    with redis.Redis.from_url(redis_url) as raw:
        (key,) = [key for key in raw.keys("rq:job:*") if raw.type(key) == b"hash"]
        data = raw.hget(key, "data")
    import zlib

    assert data is not None
    assert json.loads(zlib.decompress(data)) == ["worker.jobs.attach", None, [1, 1], {}]


def test_being_replaced_is_an_error_of_ours() -> None:
    with pytest.raises(JobFenced, match="cancelled or replaced"):
        raise JobFenced
