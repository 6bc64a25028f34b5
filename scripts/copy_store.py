"""Copy hardfirst's store into another database: `scripts/py -m scripts.copy_store FROM TO`, both SQLAlchemy URLs.

From SQLite to PostgreSQL, or back. hardfirst must not run meanwhile. All of it, or nothing: the target must be empty.
docs/upgrading.md says what goes with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import Connection, func, make_url, select, text
from sqlalchemy.exc import SQLAlchemyError

from worker.errors import Conflict, HardfirstError, NotFound
from worker.store import Store, metadata

ROWS_AT_ONCE = 1000


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.copy_store", description=__doc__)
    parser.add_argument("source", metavar="FROM", help="such as sqlite:///hardfirst-data/hardfirst.db")
    parser.add_argument("target", metavar="TO", help="such as postgresql+psycopg://hardfirst:password@host/hardfirst")
    given = parser.parse_args()
    try:
        copied = copy(given.source, given.target)
    except (HardfirstError, SQLAlchemyError) as error:
        print(f"nothing was copied: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    print(", ".join(f"{count} {name}" for name, count in copied.items()))
    return 0


def copy(source_url: str, target_url: str) -> Mapping[str, int]:
    """Table -> rows copied. Both stores are brought to the newest migration first.

    Raises:
        NotFound: the source is a file that is not there.
        Conflict: the target has projects already.
    """
    _check_file(source_url)
    source, target = Store(source_url), Store(target_url)
    try:
        source.migrate()
        target.migrate()
        with source.read() as reading, target.write() as writing:
            _check_empty(writing, target_url)
            copied = {table.name: _copy_table(reading, writing, table.name) for table in metadata.sorted_tables}
            _go_on_counting(writing)
    finally:
        source.close()
        target.close()
    return copied


def _check_file(url: str) -> None:
    """To connect to SQLite's file would make it."""
    place = make_url(url).database if url.startswith("sqlite") else None
    if place is not None and not Path(place).is_file():
        raise NotFound(f"there is no store at {place}. From another folder, give its whole path: sqlite:////data/...")


def _check_empty(writing: Connection, url: str) -> None:
    count = writing.execute(select(func.count()).select_from(metadata.tables["projects"])).scalar_one()
    if count:
        shown = make_url(url).render_as_string(hide_password=True)
        raise Conflict(f"{shown} has {count} projects already. Give an empty database")


def _copy_table(reading: Connection, writing: Connection, name: str) -> int:
    table, count = metadata.tables[name], 0
    for some in reading.execute(select(table)).mappings().partitions(ROWS_AT_ONCE):
        writing.execute(table.insert(), [dict(row) for row in some])
        count += len(some)
    return count


def _go_on_counting(writing: Connection) -> None:
    """PostgreSQL's counters know nothing of ids that were given; SQLite's do."""
    if writing.dialect.name != "postgresql":
        return
    for table in metadata.sorted_tables:
        if "id" not in table.c or table.c.id.autoincrement is False:  # Label Studio's own ids
            continue
        counter = f"pg_get_serial_sequence('{table.name}', 'id')"
        newest = f"(select coalesce(max(id), 0) + 1 from {table.name})"
        writing.execute(text(f"select setval({counter}, {newest}, false)"))


if __name__ == "__main__":
    sys.exit(main())
