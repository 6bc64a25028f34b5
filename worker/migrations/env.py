"""How Alembic reaches the store: its own engine, batch mode on SQLite, foreign keys off while tables are rebuilt."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection, text

from worker.store import metadata

LOCK_KEY = 4_841_331  # any number, ours: one migration at a time on PostgreSQL


def _migrate(connection: Connection) -> None:
    is_sqlite = connection.dialect.name == "sqlite"
    handle: Any = connection.connection.driver_connection
    if is_sqlite:  # the pragma does nothing inside a transaction: use the raw handle, before BEGIN
        handle.execute("PRAGMA foreign_keys=OFF")
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,
        compare_type=True,
        transactional_ddl=True,  # SQLite's is, with the BEGIN of our engine; Alembic assumes the driver's habits
    )
    with context.begin_transaction():
        if not is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_KEY})"))
        context.run_migrations()
    if is_sqlite:
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        connection.rollback()
        handle.execute("PRAGMA foreign_keys=ON")
        if broken:
            raise RuntimeError(f"the migration broke foreign keys: {broken[:5]}")


with context.config.attributes["engine"].connect() as _connection:
    _migrate(_connection)
