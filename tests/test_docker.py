"""The container files, read; and the image's own steps, run without an engine: install, start its commands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml
from rq import Worker
from typer.testing import CliRunner

from backend.cli import app
from worker.queue import QUEUES, TRAIN
from worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = {name: one for name, one in COMPOSE["services"].items() if one.get("image") == "hardfirst"}
EXAMPLE = dict(
    line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if line and line[0] != "#"
)


def known_variables() -> set[str]:
    return {str(info.validation_alias or f"HARDFIRST_{name}".upper()) for name, info in Settings.model_fields.items()}


def test_every_variable_our_containers_get_is_a_setting() -> None:
    given = {name for one in OURS.values() for name in one["environment"]}
    of_buckets = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}  # read by s3fs itself
    assert given - of_buckets <= known_variables()
    assert {"REDIS_URL", "DATABASE_URL", "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"} <= given
    in_image = re.findall(r"\b(HARDFIRST_[A-Z_]+)=", (ROOT / "Dockerfile").read_text())
    assert in_image == ["HARDFIRST_DATA_DIR", "HARDFIRST_HOST"]
    assert set(in_image) <= known_variables()


def test_the_example_has_exactly_the_variables_that_compose_asks_for() -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    assert set(EXAMPLE) == asked


def test_every_queue_has_a_worker_and_training_one_of_its_own() -> None:
    served = [one["command"][2:] for one in OURS.values() if one["command"][:2] == ["hardfirst", "worker"]]
    assert {name for queues in served for name in queues} == set(QUEUES)
    assert [queues for queues in served if TRAIN in queues] == [[TRAIN], [TRAIN]]


@pytest.mark.parametrize("command", sorted({tuple(one["command"][1:2]) for one in OURS.values()}))
def test_every_command_is_one_of_ours(command: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0


def test_label_studio_may_call_a_private_address() -> None:
    environment = COMPOSE["services"]["label-studio"]["environment"]
    assert environment["SSRF_PROTECTION_ENABLED"] == environment["ML_BLOCK_LOCAL_IP"] == "false"


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    copied = [
        name
        for line in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for name in line.split()[:-1]
    ]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_database_script_is_sound() -> None:
    script = ROOT / "docker" / "databases.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", str(script)], check=True)
    mounted = "./docker/databases.sh:/docker-entrypoint-initdb.d/databases.sh:ro"
    assert mounted in COMPOSE["services"]["postgres"]["volumes"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as the image installs it, into a folder of its own."""
    folder = tmp_path_factory.mktemp("image")
    copied = folder / "context"
    copied.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "strategies", "worker", "backend", "demo"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copied)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, *install, str(copied)], check=True, capture_output=True, timeout=300)
    return folder / "site"


@pytest.fixture
def environment(installed: Path, tmp_path: Path, redis_url: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HARDFIRST_", "LABEL_STUDIO"))},
        "PYTHONPATH": str(installed),
        "REDIS_URL": redis_url,
        "HARDFIRST_DATA_DIR": str(tmp_path / "data"),
    }


@pytest.fixture
def started(environment: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        running.append(
            subprocess.Popen([sys.executable, "-m", "backend.cli", *command], env=environment, cwd=tmp_path)
        )
        return running[-1]

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it ended with {process.returncode}"
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing after {seconds} s")


def answer(url: str) -> httpx.Response | None:
    try:
        return httpx.get(url, timeout=30, trust_env=False)
    except httpx.TransportError:
        return None


@pytest.mark.slow
def test_the_installed_backend_answers(started: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = started("web", "--port", str(port))
    assert wait_for(lambda: answer(f"http://127.0.0.1:{port}/health"), process).json()["status"] == "UP"
    page = answer(f"http://127.0.0.1:{port}/")
    assert page is not None
    assert page.status_code == 200
    assert "hardfirst" in page.text  # its templates were installed too
    projects = answer(f"http://127.0.0.1:{port}/api/projects")
    assert projects is not None
    assert projects.json() == []  # and its migrations


@pytest.mark.slow
def test_an_installed_worker_serves_the_queues_it_was_given(started: Any, redis_url: str) -> None:
    process = started("worker", "control", "score")
    connection = redis.Redis.from_url(redis_url)
    found = wait_for(lambda: [worker.queue_names() for worker in Worker.all(connection=connection)], process)
    assert found == [["control", "score"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["web"], "REDIS_URL is not set"), (["worker", "score"], "REDIS_URL is not set")],
)
def test_without_a_queue_they_say_what_to_set(
    arguments: list[str], sentence: str, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "backend.cli", *arguments]
    ended = subprocess.run(command, env={**environment, "REDIS_URL": ""}, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert sentence in ended.stderr


def test_a_training_worker_serves_nothing_else(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "backend.cli", "worker", "train", "score"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "a worker of `train` serves nothing else" in ended.stderr
