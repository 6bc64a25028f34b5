"""The store on PostgreSQL: the same rules, held by the same constraints. Skipped where PostgreSQL is not installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from demo.oracle import label_config
from worker import rounds, steps
from worker.settings import ProjectSettings
from worker.store import Store, metadata
from worker.store import rounds as round_rows
from worker.store import steps as step_rows

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = 1


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).parent if found else installed[-1].parent if installed else None


def _as_nobody(folder: Path) -> list[str]:
    """PostgreSQL refuses to run as root: run it as its own user then."""
    if os.getuid() != 0:
        return []
    try:
        owner = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user `postgres`")
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    return ["runuser", "-u", "postgres", "--"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a database on a PostgreSQL of our own."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="hf-pg-"))  # short, and readable for another user: it holds the socket
    prefix = _as_nobody(folder)
    subprocess.run(
        [*prefix, str(binaries / "initdb"), "-A", "trust", "-U", "hardfirst", "-D", str(folder / "data")],
        check=True,
        capture_output=True,
        cwd="/",
    )
    options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    process = subprocess.Popen(
        [*prefix, str(binaries / "postgres"), "-D", str(folder / "data"), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        yield f"postgresql+psycopg://hardfirst@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def store(server: str) -> Iterator[Store]:
    made = Store(server)
    _wait(made)
    with made.write() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    made.migrate()
    with made.write() as connection:
        rounds.connect_project(connection, PROJECT, label_config(["bolt"]), ProjectSettings(), "http://127.0.0.1")
    yield made
    made.close()


def _wait(made: Store) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with made.read() as connection:
                connection.execute(select(1))
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_the_migrations_make_the_tables_of_the_models(store: Store) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_two_processes_may_migrate_at_once(store: Store) -> None:
    with store.write() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    code = f"from worker.store import Store; Store({store.url!r}).migrate()"
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_database_refuses_a_second_open_round(store: Store) -> None:
    row = {"project_id": PROJECT, "state": "training", "opened_at": 1.0}
    with pytest.raises(IntegrityError, match="uq_one_open_round_per_project"), store.write() as connection:
        connection.execute(insert(round_rows).values(**row, number=7))


def test_of_many_that_want_to_open_a_round_one_does(store: Store) -> None:
    with store.write() as connection:
        connection.execute(round_rows.update().values(state="done", batch_size=2))
        connection.execute(text("UPDATE projects SET published_round_id = (SELECT id FROM rounds)"))
        rounds.remember_tasks(connection, PROJECT, {1: "/a.jpg", 2: "/b.jpg", 3: "/c.jpg"})
        rounds.remember_annotations(connection, PROJECT, [{"id": 1, "task": 1}, {"id": 2, "task": 2}])
    opened: list[int] = []

    def want() -> None:
        with store.write() as connection:
            found = rounds.open_round_if_triggered(connection, PROJECT)
        if found is not None:
            opened.append(found)

    assert _at_once(6, want) == []
    assert len(opened) == 1
    with store.read() as connection:
        assert [row.state for row in connection.execute(select(round_rows).order_by(round_rows.c.number))] == [
            "done",
            "training",
        ]


def test_webhooks_that_come_at_once_do_not_wait_for_each_other_for_ever(store: Store) -> None:
    with store.write() as connection:
        rounds.remember_tasks(connection, PROJECT, {1: "/a.jpg", 2: "/b.jpg"})
    numbers = iter((1, 2))
    both_wrote = threading.Barrier(2)

    def webhook() -> None:
        with store.write() as connection:
            number = next(numbers)
            rounds.remember_annotations(connection, PROJECT, [{"id": number, "task": number}])
            both_wrote.wait(30)
            rounds.open_round_if_triggered(connection, PROJECT)

    assert _at_once(2, webhook) == []
    with store.read() as connection:
        assert rounds.task_ids_of_annotations(connection, PROJECT) == {1, 2}


def test_the_last_of_many_shards_inserts_the_next_step_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.queue, "enqueue_step", lambda *_: True)  # Redis is not under test
    with store.write() as connection:
        round_id = connection.execute(select(round_rows.c.id)).scalar_one()
        connection.execute(step_rows.delete())
        ids = steps.add(connection, round_id, "score", shards=range(8))
    steps.send_waiting(store, None)  # type: ignore[arg-type]
    leases = [steps.claim(store, step_id, 1) for step_id in ids]
    assert None not in leases
    todo = [lease for lease in leases if lease is not None]

    def end() -> None:
        steps.finish(todo.pop(), lambda connection: steps.add(connection, round_id, "publish"))

    assert _at_once(8, end) == []
    with store.read() as connection:
        found = connection.execute(select(step_rows.c.kind, step_rows.c.state)).all()
    assert sorted(map(tuple, found)) == [("publish", "waiting"), *[("score", "done")] * 8]


def _at_once(count: int, act: object) -> list[Exception]:
    """Run it in so many threads at once; what they raised."""
    errors: list[Exception] = []
    gate = threading.Barrier(count)

    def run() -> None:
        gate.wait()
        try:
            act()  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - whatever a thread raises is the test's to judge
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors
