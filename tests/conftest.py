"""Real servers for the tests, and an environment that no developer's settings leak into."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import settings

from demo.label_studio_server import PYTHON_VARIABLE, LabelStudioServer
from worker.processes import running_valkey

KEPT_VARIABLES = (PYTHON_VARIABLE, "HARDFIRST_CACHE")
SETTINGS_PREFIXES = ("HARDFIRST_", "LABEL_STUDIO_")
SETTINGS_NAMES = ("REDIS_URL", "DATABASE_URL")


# No deadline: speed is not under test, and CI is busy. The same examples in each CI run: what fails there, fails again.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: ultralytics reads these once, on import."""
    folder = tempfile.mkdtemp(prefix="hardfirst-yolo-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update(
        YOLO_CONFIG_DIR=folder,
        YOLO_AUTOINSTALL="false",  # it would pip install into our environment
        YOLO_OFFLINE="true",
        ULTRALYTICS_SAFE_LOAD="1",  # weights are hostile: no pickled code
        YOLO_VERBOSE="false",
    )


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but those a test makes: neither from the shell nor from a .env in the working directory."""
    for name in list(os.environ):
        if name in SETTINGS_NAMES or (name.startswith(SETTINGS_PREFIXES) and name not in KEPT_VARIABLES):
            monkeypatch.delenv(name)
    if (module := sys.modules.get("worker.settings")) is not None:
        monkeypatch.setitem(module.Settings.model_config, "env_file", None)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Valkey on a unix socket, for the whole session. Tests take `redis_url`."""
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def redis_url(valkey: str) -> str:
    """URL of an empty Valkey."""
    with redis.Redis.from_url(valkey) as connection:
        connection.flushall()
    return valkey


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """A real Label Studio with one admin, for the whole session: .url, .token, .username, .password, .data_dir."""
    if not os.environ.get(PYTHON_VARIABLE):
        pytest.skip(f"{PYTHON_VARIABLE} is not set, so there is no Label Studio to test with; `make test` sets it")
    with LabelStudioServer(tmp_path_factory.mktemp("label-studio")) as server:
        yield server


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """SQLAlchemy URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium for browser tests."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on PATH for browser tests; on Debian: apt-get install chromium")
    return found
