"""A preview that cannot be made says so. What is in one: tests/backend/test_operations.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis

from worker import preview
from worker.preview import find, keep, make_preview


def test_whatever_goes_wrong_the_page_does_not_wait_for_it(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> dict[str, Any]:
        raise MemoryError("80,000 embeddings")

    monkeypatch.setattr(preview, "preview", broken)
    with redis.Redis.from_url(redis_url) as connection:
        keep(connection, 7, "0123456789abcdef", {"state": "waiting", "settings": {"batch_size": 5}})
        own: Any = SimpleNamespace(redis=connection)
        with pytest.raises(MemoryError):
            make_preview(own, 7, "0123456789abcdef")
        found = find(connection, 7, "0123456789abcdef")
    assert found == {"state": "failed", "detail": "MemoryError: 80,000 embeddings", "settings": {"batch_size": 5}}
