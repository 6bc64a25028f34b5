"""The store: projects, tasks, annotations, rounds, steps, scores, events. SQLite (WAL) by default, PostgreSQL by URL.

It is the truth about rounds, scores and splits; Label Studio is the truth about annotations, of which `annotations` is
a copy that webhooks keep fresh and `reconcile` corrects. Its rules are constraints: one open round per project, one
step of a kind and shard per round, one score per round and task, one event per key.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Executable,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite

from worker.errors import NotFound

NAMING = {  # batch mode on SQLite can only drop constraints that have names
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=NAMING)

OPEN_STATES = ("waiting", "attaching", "training", "scoring", "publishing")
CLOSED_STATES = ("done", "failed", "cancelled")
STEP_STATES = ("waiting", "sent", "running", "done", "failed")

projects = Table(
    "projects",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # Label Studio's own id
    Column("title", String(200), nullable=False, default=""),
    Column("label_config", Text, nullable=False, default=""),
    Column("extra_params", Text, nullable=False, default="{}"),
    Column("connected_at", Float, nullable=False),
    Column("backend_url", String(500), nullable=False, default=""),  # as Label Studio calls us
    Column("published_version", String(64)),
    Column("published_round_id", Integer),
    Column("webhook_id", Integer),
    Column("view_id", Integer),
    Column("notice", Text),  # what the page tells about this project, in words
    Column("problem", Text),  # why nothing happens, and what to do
    Column("stop_accepted_at", Float),
    Column("asked", Text),  # JSON: settings the page is just giving to Label Studio, by whom; it calls us about them
    Column("paused_at", Float),  # no step of it is started, and no round opens by itself
    Column("reconciled_at", Float),
    Column("more_holdout", Integer, nullable=False, default=0, server_default="0"),  # asked for, not drawn yet
    Column("holdout_measured", String(64)),  # fingerprint of the holdout's annotations when rounds were last measured
    Column("remeasured_at", Float),
)

tasks = Table(
    "tasks",
    metadata,
    Column("project_id", ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True),
    Column("task_id", Integer, primary_key=True, autoincrement=False),
    Column("image", Text, nullable=False),  # the value of the label config's image field
    Column("holdout", Boolean),  # NULL: splits were not drawn yet
    Column("seen_round_id", Integer),  # the first round whose dataset had it
    Column("image_problem", Text),
    Column("deleted", Boolean, nullable=False, default=False),
    # A near-duplicate of a holdout image that came after the splits were drawn: never trained on.
    Column("twin", Boolean, nullable=False, default=False),
)

# What the page counts every two seconds: some hundred rows of 80,000.
_has_problem = tasks.c.image_problem.is_not(None)
Index(
    "ix_tasks_deleted",
    tasks.c.project_id,
    tasks.c.task_id,
    sqlite_where=text("deleted IS 1"),
    postgresql_where=text("deleted IS true"),
)
Index(
    "ix_tasks_holdout",
    tasks.c.project_id,
    tasks.c.task_id,
    sqlite_where=text("holdout IS 1"),  # as text: a migration made on SQLite has to suit PostgreSQL
    postgresql_where=text("holdout IS true"),
)
Index("ix_tasks_problem", tasks.c.project_id, tasks.c.task_id, sqlite_where=_has_problem, postgresql_where=_has_problem)

task_annotations = Table(
    "annotations",
    metadata,
    Column("project_id", ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True),
    Column("annotation_id", Integer, primary_key=True, autoincrement=False),
    Column("task_id", Integer, nullable=False),
    Column("updated_at", String(40), nullable=False, default=""),
    Column("cancelled", Boolean, nullable=False, default=False),
    Column("lead_time", Float),
    Column("n_boxes", Integer, nullable=False, default=0),
    Column("classes", Text),  # JSON: label -> boxes; NULL: written before this was counted
    Index(None, "project_id", "task_id"),
)

rounds = Table(
    "rounds",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("project_id", ForeignKey("projects.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    # "select": a new batch from the scores of an earlier round's detector, without a training
    Column("kind", String(8), nullable=False, default="train", server_default="train"),
    Column("state", String(16), nullable=False),
    Column("why", Text, nullable=False, default=""),
    Column("opened_at", Float, nullable=False),
    Column("closed_at", Float),
    Column("settings", Text, nullable=False, default="{}"),
    Column("error", Text),
    Column("labels", Integer),  # training images
    Column("holdout_labels", Integer),
    Column("boxes", Integer),
    Column("minutes", Float),  # annotators' lead time over all labels so far
    Column("map50", Float),
    Column("map50_95", Float),
    Column("gain", Float),
    Column("per_class", Text, nullable=False, default="{}"),
    Column("verdict", Text, nullable=False, default="{}"),
    Column("report", Text, nullable=False, default="{}"),  # what was left out of the dataset, notes, seconds
    Column("model_version", String(64)),
    Column("weights", String(500)),  # artifact key
    Column("weights_sha256", String(64)),
    Column("embedder", String(100)),
    Column("scored_as", String(64)),  # what its scores depend on: a round with the same may take them over
    Column("batch_size", Integer),  # tasks really asked for
    UniqueConstraint("project_id", "number"),
    CheckConstraint(
        "state in ('waiting','attaching','training','scoring','publishing','done','failed','cancelled')", name="state"
    ),
    sqlite_autoincrement=True,  # or the id of a deleted round comes back, and the keys of its events with it
)
_is_open = rounds.c.state.in_(OPEN_STATES)
Index(
    "uq_one_open_round_per_project",
    rounds.c.project_id,
    unique=True,
    sqlite_where=_is_open,
    postgresql_where=_is_open,
)

steps = Table(
    "steps",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("round_id", ForeignKey("rounds.id", ondelete="CASCADE"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("shard", Integer, nullable=False, default=0),
    Column("state", String(10), nullable=False, default="waiting"),
    Column("attempt", Integer, nullable=False, default=0),
    Column("failures", Integer, nullable=False, default=0),  # attempts that count; waiting for Label Studio does not
    Column("not_before", Float),
    Column("sent_at", Float),
    Column("lease_until", Float),
    Column("error", Text),
    UniqueConstraint("round_id", "kind", "shard"),
    CheckConstraint("state in ('waiting','sent','running','done','failed')", name="state"),
    Index(None, "state"),
    sqlite_autoincrement=True,  # or a cancelled step's id comes back, and its worker, still running, takes it for its
)

scores = Table(
    "scores",
    metadata,
    Column("round_id", ForeignKey("rounds.id", ondelete="CASCADE"), primary_key=True),
    Column("task_id", Integer, primary_key=True, autoincrement=False),
    Column("shard", Integer, nullable=False),  # -1: scored alone, after the round
    Column("row", Integer),  # position in the shard's embeddings
    Column("image", String(16)),  # digest of the reference that was scored
    Column("least_confidence", Float),
    Column("margin", Float),
    Column("entropy", Float),
    Column("disagreement", Float),  # of a committee
    Column("utility", Float),
    Column("uncertainty", Float),
    Column("diversity", Float),
    Column("rank", Integer),  # position in the published order of the batch; NULL: not in the batch
    Column("published_score", Float),
    Column("regions", Text),  # JSON: Label Studio's result
    Column("n_boxes", Integer),
    Column("problem", Text),
    Column("sent", Boolean, nullable=False, default=False),  # of a row scored alone: Label Studio has it
    Index(None, "round_id", "shard"),
    Index(None, "round_id", "rank"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("project_id", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("key", String(120), nullable=False),
    Column("detail", Text, nullable=False, default=""),
    UniqueConstraint("project_id", "key"),
)


_MIGRATING = threading.Lock()  # Alembic's context is one per process


class Store:
    """A database with our tables. Readers never wait; writers wait for one another, never fail for it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _make_engine(url)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one moment and changes nothing."""
        with self.engine.connect() as connection:
            connection = connection.execution_options(readonly=True)
            with connection.begin():
                yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: all of it, or nothing."""
        with self.engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the tables to today's shape. Safe to call from several processes, one after the other."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["engine"] = self.engine
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with _MIGRATING:
            command.upgrade(config, "head")

    def close(self) -> None:
        self.engine.dispose()


def _make_engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, pool_size=5)
    path = url.removeprefix("sqlite:///")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 30}, pool_size=5, max_overflow=20)

    @event.listens_for(engine, "connect")
    def _on_connect(handle: Any, _record: object) -> None:
        handle.isolation_level = None  # or the sqlite3 module begins transactions of its own, deferred ones
        for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            handle.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # A deferred transaction that turns into a writer fails at once when another one writes: ask for the lock first.
        readonly = connection.get_execution_options().get("readonly")
        connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")

    # A forked work-horse must not use its parent's handles.
    os.register_at_fork(after_in_child=lambda: engine.dispose(close=False))
    return engine


def insert_or_ignore(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the rows that break no constraint; returns how many that were."""
    if not rows:
        return 0
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    inserted = 0
    for chunk in _chunks(rows, 500):
        statement = dialect.insert(table).values(list(chunk)).on_conflict_do_nothing()
        inserted += max(connection.execute(statement).rowcount, 0)
    return inserted


def upsert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows, or replace the named columns where the primary key exists. All rows name the same columns."""
    if not rows:
        return
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    keys = [column.name for column in table.primary_key.columns]
    changed = [name for name in rows[0] if name not in keys]
    for chunk in _chunks(rows, 500):
        statement = dialect.insert(table).values(list(chunk))
        new = {name: statement.excluded[name] for name in changed}
        connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=new))


def write_rows(store: Store, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
    """One statement over many rows, in transactions so short that a webhook between two of them is not kept waiting.

    Only for what may be done twice: killed half-way, the caller begins again.
    """
    for chunk in _chunks(rows, 2000):
        with store.write() as connection:
            connection.execute(statement, list(chunk))


def _chunks(rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[Sequence[Mapping[str, Any]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def get_project(connection: Connection, project_id: int) -> Row[Any]:
    """The project's row.

    Raises:
        NotFound: this backend was never connected to that project.
    """
    row = connection.execute(select(projects).where(projects.c.id == project_id)).first()
    if row is None:
        raise NotFound(
            f"project {project_id} is not connected to this backend. "
            "Label Studio: project -> Settings -> Model -> Connect Model, with this backend's URL"
        )
    return row


def get_round(connection: Connection, round_id: int) -> Row[Any]:
    row = connection.execute(select(rounds).where(rounds.c.id == round_id)).first()
    if row is None:
        raise NotFound(f"round {round_id} is not in the store")
    return row


def latest_round(connection: Connection, project_id: int) -> Row[Any] | None:
    query = select(rounds).where(rounds.c.project_id == project_id).order_by(rounds.c.number.desc()).limit(1)
    return connection.execute(query).first()


def open_round_of(connection: Connection, project_id: int) -> Row[Any] | None:
    return connection.execute(select(rounds).where(rounds.c.project_id == project_id, _is_open)).first()


def measured_rounds(connection: Connection, project_id: int) -> Sequence[Row[Any]]:
    """Rounds that trained and were measured, oldest first: the points of the learning curve."""
    query = select(rounds).where(
        rounds.c.project_id == project_id, rounds.c.map50.is_not(None), rounds.c.state != "failed"
    )
    return connection.execute(query.order_by(rounds.c.number)).all()


def labelled_task_ids(project_id: int) -> Any:
    """Subquery: ids of tasks with an annotation that is not a skip."""
    return (
        select(task_annotations.c.task_id)
        .where(task_annotations.c.project_id == project_id, task_annotations.c.cancelled.is_(False))
        .distinct()
    )


def count_new_labels(connection: Connection, project_id: int, *, holdout_too: bool) -> int:
    """Labelled tasks that no round's dataset has seen; the holdout's count only when `holdout_too`."""
    seen_by_none = (tasks.c.deleted.is_(False), tasks.c.seen_round_id.is_(None))
    query = (  # from the annotations, a tenth of the tasks: a webhook is answered after this
        select(func.count(task_annotations.c.task_id.distinct()))
        .select_from(task_annotations)
        .join(
            tasks,
            (tasks.c.project_id == task_annotations.c.project_id) & (tasks.c.task_id == task_annotations.c.task_id),
        )
        .where(task_annotations.c.project_id == project_id, task_annotations.c.cancelled.is_(False), *seen_by_none)
    )
    if not holdout_too:
        query = query.where(tasks.c.holdout.is_not(True))
    return int(connection.execute(query).scalar_one())


def record_event(connection: Connection, project_id: int, kind: str, key: str = "", detail: str = "") -> bool:
    """Append to the project's log. False: an event of this key is there already (a repeated webhook)."""
    now = time.time()
    row = {"project_id": project_id, "at": now, "kind": kind, "key": (key or f"{kind}-{now:.6f}")[:120]}
    return insert_or_ignore(connection, events, [{**row, "detail": detail[:2000]}]) == 1


def loads(text: str | None) -> Any:
    return json.loads(text) if text else {}
