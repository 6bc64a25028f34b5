from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import insert

from worker.store import Store, projects


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """With project 7 in it, and nothing else."""
    made = Store(store_url)
    made.migrate()
    with made.write() as connection:
        connection.execute(insert(projects).values(id=7, connected_at=0.0))
    yield made
    made.close()
