"""What a process is connected to, and that it lets go of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.services import Services
from worker.settings import Settings


def test_closing_ends_what_was_made_and_makes_nothing(tmp_path: Path, redis_url: str) -> None:
    own = Services(Settings(_env_file=None, data_dir=tmp_path, redis_url=redis_url), "worker")  # type: ignore[call-arg]
    own.close()
    assert not {"images", "label_studio", "redis", "store"} & set(vars(own))
    assert own.redis.ping()
    label_studio = own.label_studio
    own.close()
    assert own.redis.connection_pool._in_use_connections == set()
    with pytest.raises(RuntimeError, match="client has been closed"):
        label_studio.server_version()
