"""The check-up of the page: one at a time, never in anybody's way, ended in time; what the button may put right."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from backend import doctor_view
from backend.app import create_app
from worker import queue, rounds
from worker.doctor import Check, Look, failed, ok, warning
from worker.settings import ProjectSettings, Settings
from worker.store import Store

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)


class World:
    """Checks whose outcome a test decides."""

    def __init__(self) -> None:
        self.go, self.looked, self.mended, self.ill = threading.Event(), list[str](), list[str](), True
        self.go.set()

    def look(self, name: str) -> Check:
        self.looked.append(name)
        assert self.go.wait(60)
        if name == "store":
            return failed(name, "ill", "mend it", lambda: self._mend(name)) if self.ill else ok(name, "well")
        if name == "webhook":
            return failed(name, f"a title {HOSTILE}", "mend it", lambda: self._mend(name))
        return warning(name, "rather slow", "buy a faster one") if name == "queue" else ok(name, "fine")

    def _mend(self, name: str) -> None:
        self.mended.append(name)
        self.ill = False

    def looks(self, *names: str) -> list[Look]:
        return [Look(name, lambda name=name: self.look(name)) for name in names]  # type: ignore[misc]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(doctor_view, "deployment_looks", lambda own, **kw: made.looks("queue", "store"))
    monkeypatch.setattr(doctor_view, "project_looks", lambda own, project_id, **kw: made.looks("webhook", "round"))
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    nowhere = {"label_studio_url": "http://127.0.0.1:1", "redis_url": f"unix://{tmp_path / 'nobody.sock'}"}
    return Settings(_env_file=None, label_studio_api_key="0" * 40, data_dir=tmp_path / "data", **nowhere)  # type: ignore[arg-type]


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    store = Store(settings.store_url)
    store.migrate()
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), "http://backend:9090")
    yield TestClient(create_app(settings))
    store.close()


def over(client: TestClient, path: str) -> dict[str, Any]:
    """The check-up there, when it is over."""
    deadline = time.monotonic() + 60
    while (found := client.get(path).json())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return dict(found)


def statuses(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["name"], one["status"]) for one in found["checks"]]


def test_the_checks_are_shown_in_order_with_words_and_fixes(client: TestClient, world: World) -> None:
    assert client.get("/api/doctor").json()["state"] == "never"
    asked = client.post("/api/doctor")
    assert asked.status_code == 202
    found = over(client, "/api/doctor")
    assert statuses(found) == [("queue", "warning"), ("store", "failed")]
    assert found["summary"] == "1 warning, 1 failed"
    assert [(one["symbol"], one["words"], one["can_fix"]) for one in found["checks"]] == [
        ("!", "Warning", False),
        ("✗", "Failed", True),
    ]
    page = client.get("/").text
    assert "rather slow" in page
    assert "buy a faster one" in page
    assert 'data-name="store"' in page
    assert client.get("/api/projects/7/doctor").json()["state"] == "never"  # each page shows its own


def test_a_project_is_checked_with_what_is_under_it_and_hostile_words_are_shown_as_words(
    client: TestClient, world: World
) -> None:
    client.post("/api/projects/7/doctor")
    found = over(client, "/api/projects/7/doctor")
    names = [("queue", "warning"), ("store", "failed"), ("webhook", "failed"), ("round", "ok")]
    assert statuses(found) == names
    assert [one["project_id"] for one in found["checks"]] == [None, None, 7, 7]
    for page in (client.get("/projects/7").text, client.get("/doctor?project=7").text):
        assert "<img src=x" not in page
        assert "&lt;img src=x onerror=alert(1)&gt;\\x1b[31m" in page
    assert world.mended == []  # looking changes nothing


def test_one_at_a_time_and_nobody_waits_for_it(client: TestClient, world: World) -> None:
    world.go.clear()
    assert client.post("/api/projects/7/doctor").json()["state"] == "running"
    busy = client.post("/api/doctor")
    assert busy.status_code == 409
    assert "a check-up of project 7 is on its way" in busy.json()["detail"]
    assert client.get("/health").json()["status"] == "UP"
    assert "Looking at: " in client.get("/projects/7").text
    assert client.get("/api/doctor").json()["state"] == "never"
    world.go.set()
    assert len(over(client, "/api/projects/7/doctor")["checks"]) == 4
    assert client.post("/api/doctor").status_code == 202
    over(client, "/api/doctor")


def test_it_is_ended_in_time_and_says_what_it_did_not_look_at(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(doctor_view.time, "monotonic", lambda: clock[0])
    world.looks = lambda *names: [  # type: ignore[method-assign]
        Look(name, lambda name=name: clock.__setitem__(0, clock[0] + 100.0) or ok(name, "slow"))  # type: ignore[misc,func-returns-value]
        for name in names
    ]
    client.post("/api/projects/7/doctor")
    while client.get("/api/projects/7/doctor").json()["state"] == "running":
        threading.Event().wait(0.01)
    found = client.get("/api/projects/7/doctor").json()
    assert statuses(found) == [("queue", "ok"), ("store", "ok"), ("webhook", "skipped"), ("round", "skipped")]
    assert found["problem"] == "It was ended after 180 s: what is missing was not looked at."


def test_put_right_mends_that_one_and_checks_again(client: TestClient, world: World) -> None:
    nothing = client.post("/api/projects/7/doctor/fix", json={"name": "store"})
    assert nothing.status_code == 404  # nobody has looked yet
    client.post("/api/projects/7/doctor")
    over(client, "/api/projects/7/doctor")
    wrong = {"name": "webhook"}  # of the deployment, which has no such check
    assert client.post("/api/projects/7/doctor/fix", json=wrong).status_code == 404
    assert client.post("/api/projects/7/doctor/fix", json={"name": "queue"}).status_code == 404
    assert client.post("/api/projects/7/doctor/fix", json={"name": "x" * 61}).status_code == 422
    assert client.post("/api/projects/7/doctor/fix", json={"name": "store"}).status_code == 202
    found = over(client, "/api/projects/7/doctor")
    assert world.mended == ["store"]
    assert statuses(found)[1:3] == [("store", "ok"), ("webhook", "failed")]
    assert found["checks"][1]["mended"]
    assert "put right" in client.get("/projects/7").text
    client.post("/api/projects/7/doctor/fix", json={"name": "webhook", "of_project": True})
    over(client, "/api/projects/7/doctor")
    assert world.mended == ["store", "webhook"]


def test_a_check_up_that_breaks_says_so(client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> list[Look]:
        raise RuntimeError("no such table: projects\nand a parameter")

    monkeypatch.setattr(doctor_view, "project_looks", broken)
    client.post("/api/projects/7/doctor")
    found = over(client, "/api/projects/7/doctor")
    assert statuses(found) == [("queue", "warning"), ("store", "failed")]
    assert found["problem"].startswith("The check-up broke: RuntimeError: no such table: projects. ")


@pytest.mark.parametrize(
    "path", ["/api/doctor", "/api/doctor/fix", "/api/projects/7/doctor", "/api/projects/7/doctor/fix"]
)
def test_pages_of_other_sites_and_unknown_projects_start_nothing(client: TestClient, world: World, path: str) -> None:
    elsewhere = client.post(path, json={"name": "store"}, headers={"Origin": "http://evil.example"})
    assert elsewhere.status_code == 400
    assert client.post(path.replace("7", "8"), json={"name": "store"}).status_code in (202, 404)
    if "7" in path:
        assert client.post(path.replace("7", "8"), json={"name": "store"}).status_code == 404
        assert client.get("/doctor?project=8").status_code == 404


def test_with_everybody_away_it_is_the_commands_checks_in_its_order(client: TestClient) -> None:
    client.post("/api/projects/7/doctor")
    found = over(client, "/api/projects/7/doctor")
    by_name = {one["name"]: one for one in found["checks"]}
    deployment = ["Label Studio", "token", "queue", "store", *(f"workers: {name}" for name in queue.QUEUES)]
    of_project = ["project", "backend entry", "webhook", "sampling", "model version", "pre-annotations", "images"]
    assert list(by_name) == [*deployment, "device", "weights", *of_project, "labels", "order", "round"]
    assert by_name["Label Studio"]["status"] == "failed"
    assert "LABEL_STUDIO_URL" in by_name["Label Studio"]["fix"]
    assert by_name["store"]["status"] == "ok"
    assert by_name["device"]["sentence"] == "queue comes first"
    assert by_name["webhook"]["status"] == "skipped"
