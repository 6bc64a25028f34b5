from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from backend.app import create_app
from worker import rounds, steps
from worker.settings import ProjectSettings, Settings
from worker.store import rounds as round_rows

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def client(store_url: str, redis_url: str, tmp_path: Path) -> Iterator[TestClient]:
    """Project 7 with three tasks, two of them labelled, one of these in the holdout, at its round 0."""
    values: dict[str, Any] = {"redis_url": redis_url, "database_url": store_url, "data_dir": tmp_path}
    app = create_app(Settings(_env_file=None, **values, label_studio_url="http://127.0.0.1:9"))
    app.state.services.store.migrate()
    with app.state.services.store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), "http://backend:9090")
        rounds.remember_tasks(connection, 7, {number: f"{number}.jpg" for number in (1, 2, 3)})
        rounds.declare_holdout(connection, 7, [2])
        rounds.remember_annotations(connection, 7, [{"id": 1, "task": 1}, {"id": 2, "task": 2}])
    return TestClient(app)


def scraped(client: TestClient) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def of_project(found: Samples, name: str) -> float | None:
    return found.get((name, (("project", "7"),)))


def test_tasks_labels_rounds_and_steps_are_counted(client: TestClient) -> None:
    found = scraped(client)
    assert [of_project(found, f"hardfirst_{name}") for name in ("tasks", "labels", "holdout", "holdout_labels")] == [
        3,
        1,
        1,
        1,
    ]
    assert of_project(found, "hardfirst_pool") == 1
    assert found[("hardfirst_rounds", (("project", "7"), ("state", "attaching")))] == 1
    assert found[("hardfirst_rounds", (("project", "7"), ("state", "failed")))] == 0
    assert found[("hardfirst_steps_open", (("kind", "attach"), ("state", "waiting")))] == 1
    assert of_project(found, "hardfirst_map50") is None  # nothing was measured: no point, not 0
    assert found[("hardfirst_queue_up", ())] == 1


def test_the_last_measured_round_gives_the_map(client: TestClient) -> None:
    store = client.app.state.services.store  # type: ignore[attr-defined]
    with store.write() as connection:
        connection.execute(update(round_rows).values(state="done", map50=0.41, labels=9))
    assert of_project(scraped(client), "hardfirst_map50") == 0.41


def test_jobs_in_the_queue_are_counted(client: TestClient) -> None:
    own = client.app.state.services  # type: ignore[attr-defined]
    with own.store.write() as connection:
        steps.add(connection, 1, "train")
    steps.send_waiting(own.store, own.redis)
    assert scraped(client)[("hardfirst_queue_jobs", (("queue", "train"),))] == 1


def test_without_redis_the_rest_is_there(tmp_path: Path) -> None:
    values: dict[str, Any] = {"redis_url": "redis://127.0.0.1:1/0", "data_dir": tmp_path}
    app = create_app(Settings(_env_file=None, **values))
    app.state.services.store.migrate()
    found = scraped(TestClient(app))
    assert found == {("hardfirst_queue_up", ()): 0}


def test_it_needs_the_credentials_like_every_other_page(tmp_path: Path) -> None:
    values: dict[str, Any] = {"redis_url": "redis://127.0.0.1:1/0", "data_dir": tmp_path, "user": "a", "password": "b"}
    client = TestClient(create_app(Settings(_env_file=None, **values)))
    assert client.get("/metrics").status_code == 401
