"""What an admin does with a project. Label Studio is a stand-in here; tests/integration has the real one."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import insert, select, update

from backend import operations, suspects_view
from backend.app import create_app
from worker import queue
from worker.artifacts import Artifacts, round_key, sha256
from worker.preview import make_preview, preview_settings
from worker.services import Services
from worker.settings import ProjectSettings, Settings, parse_project_settings
from worker.store import Store, events, projects, rounds, scores, steps, task_annotations, tasks
from worker.suspects import find_suspects
from worker.uncertainty import reading

HOSTILE = """<img src=x onerror=alert(1)>'"\u202ebolt"""
CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
<Label value="bolt"/><Label value="&lt;img src=x onerror=alert(1)&gt;'&quot;\u202ebolt"/></RectangleLabels></View>"""
BACKEND = "http://backend:9090"
POSTS = [
    ("POST", "/api/projects/7/pause", {"paused": True}),
    ("POST", "/api/projects/7/rounds/retry", None),
    ("POST", "/api/projects/7/purges/retry", None),
    ("POST", "/api/jobs/preview-1/retry", None),
    ("PATCH", "/api/projects/7/settings", {"values": {"batch_size": 5}}),
    ("POST", "/api/projects/7/previews", {"strategy": "random"}),
    ("POST", "/api/projects/7/previews/0123456789abcdef/publish", None),
    ("POST", "/api/projects/7/suspects", None),
]


class StandIn(BaseHTTPRequestHandler):
    """Label Studio as far as these need it: images, the export, and the model's settings."""

    def do_GET(self) -> None:
        server: Any = self.server
        if self.path.startswith("/data/upload/"):
            picture = io.BytesIO()
            Image.new("RGB", (64, 48), (90, 120, 150)).save(picture, "JPEG")
            away = self.path in server.away
            self.answer(503 if away else 200, b"{}" if away else picture.getvalue())
        elif "/export" in self.path:
            self.answer(server.status, json.dumps(server.export).encode())
        elif self.path.startswith("/api/ml"):
            self.answer(server.status, json.dumps([{"id": 3, "url": BACKEND, "project": 7, **server.ml}]).encode())
        else:
            self.answer(server.status, b"{}")

    def do_PATCH(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.patched.append((self.path, body))
        self.answer(server.patch_status, b'{"non_field_errors": ["no such thing"]}')

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@pytest.fixture
def label_studio_stand_in() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.status = server.patch_status = 200
    server.export, server.ml, server.patched, server.away = [], {"extra_params": {"batch_size": 4}}, [], set()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(tmp_path: Path, label_studio_stand_in: Any, redis_url: str) -> Settings:
    return Settings(
        _env_file=None,
        label_studio_url=f"http://127.0.0.1:{label_studio_stand_in.server_port}",
        label_studio_api_key="0" * 40,
        redis_url=redis_url,
        data_dir=tmp_path / "data",
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    made = Store(settings.store_url)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def client(settings: Settings, store: Store) -> TestClient:
    return TestClient(create_app(settings))


@pytest.fixture
def artifacts(settings: Settings) -> Artifacts:
    return Artifacts(settings.artifacts_root, settings.data_dir / "cache")


@pytest.fixture
def project(store: Store, artifacts: Artifacts) -> int:
    """Project 7: tasks 1..20, 1..4 held out, 1..10 labelled; round 1 trained and published 11..14. That round's id."""
    with store.write() as connection:
        row = {"title": "Factory", "label_config": CONFIG, "extra_params": '{"batch_size": 4}', "connected_at": 1.0}
        connection.execute(insert(projects).values(id=7, backend_url=BACKEND, **row))
        images = [{"task_id": i, "image": f"/data/upload/7/{i}.jpg", "holdout": i < 5} for i in range(1, 21)]
        connection.execute(insert(tasks), [{"project_id": 7, "deleted": False, **one} for one in images])
        connection.execute(update(tasks).where(tasks.c.task_id <= 10).values(seen_round_id=1))
        labels = [{"annotation_id": i * 10, "task_id": i, "updated_at": "2026-01-01"} for i in range(1, 11)]
        connection.execute(insert(task_annotations), [{"project_id": 7, "cancelled": False, **one} for one in labels])
        first = {"project_id": 7, "number": 0, "state": "done", "opened_at": 1.0, "closed_at": 2.0}
        connection.execute(insert(rounds).values(**first))
        trained = {"weights": "p7/r000001/weights.pt", "weights_sha256": sha256(b"weights"), "settings": "{}"}
        report = json.dumps({"boxes_per_class": {"bolt": 90, HOSTILE: 10}})
        second = {**first, "number": 1, "map50": 0.5, "labels": 6, "report": report, **trained}
        round_id = int(connection.execute(insert(rounds).values(**second).returning(rounds.c.id)).scalar_one())
        connection.execute(insert(scores), [score(round_id, i) for i in range(1, 21)])
        connection.execute(update(projects).values(published_round_id=round_id, published_version="al-000001"))
    artifacts.put("p7/r000001/weights.pt", b"weights")
    embeddings = io.BytesIO()
    np.save(embeddings, np.eye(20, 32, dtype=np.float32))
    artifacts.put("p7/r000001/embeddings-00000.npy", embeddings.getvalue())
    shown = [{"rank": i - 11, "task_id": i, "utility": 0.9} for i in range(11, 15)]
    shown[0] |= {"alike": 2, "alike_task_ids": [19, 20]}
    manifest = {"strategy": "hybrid", "options": {}, "notes": [], "tasks": shown, "classes": {"bolt": 3, HOSTILE: 1}}
    artifacts.put("p7/r000001/manifest.json", json.dumps(manifest).encode())
    return round_id


def score(round_id: int, task_id: int) -> dict[str, Any]:
    """Task n is as uncertain as n/20; the hostile class is seen on all of them, top left."""
    value = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": [HOSTILE]}
    region = {"original_width": 64, "original_height": 48, "score": 0.9, "value": value}
    measures = dict.fromkeys(("least_confidence", "margin", "entropy"), task_id / 20)
    in_batch = 11 <= task_id <= 14
    return {
        "round_id": round_id,
        "task_id": task_id,
        "shard": 0,
        "row": task_id - 1,
        "rank": task_id - 11 if in_batch else None,
        "utility": 0.9,
        "uncertainty": 0.8,
        "diversity": 0.9,
        "regions": json.dumps([region]),
        **measures,
    }


def details(store: Store, kind: str) -> list[str]:
    with store.read() as connection:
        query = select(events.c.detail).where(events.c.project_id == 7, events.c.kind == kind).order_by(events.c.id)
        return list(connection.execute(query).scalars())


def worker_of(settings: Settings) -> Services:
    return Services(settings, "worker")


# --- guarded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body"), POSTS)
def test_what_changes_something_is_refused_to_other_sites(
    client: TestClient, project: int, method: str, path: str, body: Any
) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        answer = client.request(method, path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (400, "BadRequest")


@pytest.mark.parametrize(("method", "path", "body"), POSTS)
def test_what_changes_something_needs_the_password(
    settings: Settings, store: Store, project: int, method: str, path: str, body: Any
) -> None:
    guarded = settings.model_copy(update={"user": "ada", "password": type(settings.password)("secret")})
    answer = TestClient(create_app(guarded)).request(method, path, json=body)
    assert (answer.status_code, answer.json()["error"]) == (401, "NotAuthorised")
    assert details(store, "paused") == []


@pytest.mark.parametrize(
    "path",
    ["/work", "/settings", "/suspects", "/dataset.zip", "/rounds/1/weights.pt", "/batch", "/previews/0123456789abcdef"],
)
def test_reading_needs_it_too_and_an_unknown_project_is_not_found(
    settings: Settings, client: TestClient, project: int, path: str
) -> None:
    guarded = settings.model_copy(update={"user": "ada", "password": type(settings.password)("secret")})
    assert TestClient(create_app(guarded)).get(f"/api/projects/7{path}").status_code == 401
    assert client.get(f"/api/projects/8{path}").status_code == 404


# --- pause and retry -------------------------------------------------------------------------------------------------


def test_pausing_and_resuming_is_shown_and_remembered(client: TestClient, store: Store, project: int) -> None:
    paused = client.post("/api/projects/7/pause", json={"paused": True}).json()
    assert (paused["paused"], paused["can_start"], paused["now"]["kind"]) == (True, False, "paused")
    assert paused["now"]["words"] == "paused"
    assert client.post("/api/projects/7/rounds").status_code == 409
    resumed = client.post("/api/projects/7/pause", json={"paused": False}).json()
    assert (resumed["paused"], resumed["can_start"], resumed["now"]["kind"]) == (False, True, "idle")
    assert details(store, "paused") == ["by an admin at testclient"]
    assert client.post("/api/projects/7/pause", json={"paused": "yes"}).status_code == 422


def test_a_step_that_runs_in_the_pause_is_told_to_be_finished(client: TestClient, store: Store, project: int) -> None:
    with store.write() as connection:
        row = {"project_id": 7, "number": 2, "state": "training", "opened_at": 5.0}
        round_id = connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one()
        connection.execute(insert(steps).values(round_id=round_id, kind="train", state="running"))
    now = client.post("/api/projects/7/pause", json={"paused": True}).json()["now"]
    assert (now["kind"], now["detail"]) == ("working", "Paused: what runs now is finished, then nothing begins.")
    with store.write() as connection:
        connection.execute(update(steps).values(state="waiting"))
    now = client.get("/api/projects/7/status").json()["now"]
    assert (now["kind"], now["detail"]) == ("paused", "Round 2 goes on when an admin resumes it.")


def fail_round(store: Store) -> int:
    with store.write() as connection:
        row = {"project_id": 7, "number": 2, "state": "failed", "opened_at": 5.0, "closed_at": 6.0, "error": HOSTILE}
        round_id = int(connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one())
        step = {"round_id": round_id, "kind": "train", "state": "failed", "attempt": 3, "failures": 3, "error": HOSTILE}
        connection.execute(insert(steps).values(**step))
    return round_id


def test_a_failed_step_is_shown_with_its_error_and_tried_again(
    client: TestClient, store: Store, project: int, redis_url: str
) -> None:
    fail_round(store)
    work = client.get("/api/projects/7/work").json()
    (failed,) = work["failed_steps"]
    assert (failed["round_number"], failed["words"], failed["attempts"], failed["error"], failed["retry"]) == (
        2, "training", 3, HOSTILE, "round",
    )  # fmt: skip
    assert client.get("/api/projects/7/status").json()["can_retry"] is True
    page = client.get("/projects/7/work").text
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    again = client.post("/api/projects/7/rounds/retry")
    assert (again.status_code, again.json()["state"], again.json()["error"]) == (200, "training", None)
    with redis.Redis.from_url(redis_url) as connection:
        assert queue.queue_lengths(connection)["train"] == 1
    assert client.get("/api/projects/7/work").json()["failed_steps"] == []
    assert client.post("/api/projects/7/rounds/retry").status_code == 409


@pytest.mark.parametrize("job_id", ["..", "a b", "preview%0a", "step-1%00", "%D9%A3", "a:b", "x" * 300])
def test_a_job_that_cannot_be_one_is_refused(client: TestClient, project: int, job_id: str) -> None:
    answer = client.post(f"/api/jobs/{job_id}/retry")
    assert answer.status_code in (404, 405, 422), answer.text
    assert set(answer.json()) == {"error", "detail"}


def test_the_work_of_nobody_is_said(client: TestClient, project: int) -> None:
    work = client.get("/api/projects/7/work").json()
    assert work["problem"].startswith("No worker is known: start them with hardfirst up, or with hardfirst worker.")
    assert [(one["name"], one["waiting"], one["workers"]) for one in work["queues"]] == [
        ("train", 0, 0), ("score", 0, 0), ("predict", 0, 0), ("control", 0, 0),
    ]  # fmt: skip


def test_with_redis_away_the_rest_is_shown(settings: Settings, store: Store, project: int) -> None:
    away = TestClient(create_app(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})))
    fail_round(store)
    work = away.get("/api/projects/7/work").json()
    assert (work["known"], work["workers"], len(work["failed_steps"])) == (False, [], 1)
    assert away.get("/projects/7").status_code == 200
    assert away.post("/api/projects/7/previews", json={}).status_code == 503
    assert away.get("/api/projects/7/suspects").json()["detail"] == "A worker looks for them when Redis is back."


# --- downloads -------------------------------------------------------------------------------------------------------


def test_weights_are_checked_and_downloaded(client: TestClient, artifacts: Artifacts, project: int) -> None:
    answer = client.get("/api/projects/7/rounds/1/weights.pt")
    assert (answer.content, answer.headers["x-checksum-sha256"]) == (b"weights", sha256(b"weights"))
    assert answer.headers["content-disposition"] == 'attachment; filename="hardfirst-p7-r1.pt"'
    missing = client.get("/api/projects/7/rounds/0/weights.pt")
    assert (missing.status_code, missing.json()["detail"]) == (404, "round 0 of project 7 has no weights")
    assert client.get("/api/projects/7/rounds/99/weights.pt").status_code == 404


def exported(task_id: int, label: str = "bolt", **changed: Any) -> dict[str, Any]:
    value = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": [label]}
    region = {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}
    region |= {"original_width": 64, "original_height": 48}
    annotation = {"id": task_id * 10, "result": [region], "updated_at": "2026-01-01", "was_cancelled": False}
    image = {"image": f"/data/upload/7/{task_id}.jpg"}
    return {"id": task_id, "data": image, "annotations": [{**annotation, **changed}]}


def test_the_dataset_is_a_zip_with_images(
    client: TestClient, store: Store, project: int, label_studio_stand_in: Any
) -> None:
    label_studio_stand_in.export = [exported(1), exported(5), exported(6)]
    with store.write() as connection:
        connection.execute(update(tasks).where(tasks.c.task_id == 6).values(twin=True))
    answer = client.get("/api/projects/7/dataset.zip")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        names = packed.namelist()
        assert [name for name in names if name.startswith("images")] == ["images/holdout/1.jpg", "images/train/5.jpg"]
        assert packed.read("labels/train/5.txt").startswith(b"0 0.2000")
        assert json.loads(packed.read("left_out.json"))["6"].startswith("it looks like an image of the holdout")


def test_no_labels_or_label_studio_away_is_said_before_the_download_begins(
    client: TestClient, project: int, label_studio_stand_in: Any
) -> None:
    nothing = client.get("/api/projects/7/dataset.zip")
    assert (nothing.status_code, nothing.json()["error"]) == (409, "Conflict")
    assert nothing.json()["detail"] == "No task is labelled yet: there is no dataset to download."
    label_studio_stand_in.export = [exported(5), exported(6)]
    label_studio_stand_in.away.add("/data/upload/7/5.jpg")
    answer = client.get("/api/projects/7/dataset.zip")
    assert (answer.status_code, answer.json()["error"]) == (503, "LabelStudioUnavailable")
    label_studio_stand_in.status = 502
    assert client.get("/api/projects/7/dataset.zip").status_code == 503
    for _ in range(2):  # neither of them kept a place
        assert operations.PACKING.acquire(blocking=False)
    for _ in range(2):
        operations.PACKING.release()


def test_two_datasets_at_once_are_enough(client: TestClient, project: int) -> None:
    for _ in range(2):
        operations.PACKING.acquire()
    try:
        assert client.get("/api/projects/7/dataset.zip").status_code == 409
    finally:
        for _ in range(2):
            operations.PACKING.release()


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_written_to_label_studio_and_the_change_is_remembered(
    client: TestClient, store: Store, project: int, label_studio_stand_in: Any
) -> None:
    answer = client.patch("/api/projects/7/settings", json={"values": {"batch_size": 50, "epochs": 5}})
    assert answer.status_code == 200
    assert label_studio_stand_in.patched == [
        ("/api/ml/3", {"url": BACKEND, "project": 7, "extra_params": {"batch_size": 50, "epochs": 5}})
    ]
    found = {one["name"]: one for group in answer.json()["groups"] for one in group["settings"]}
    size = found["batch_size"]
    assert (size["value"], size["is_set"], size["default"], size["limits"]) == (50, True, 200, "1 to 100000")
    assert details(store, "settings") == ["batch_size: 4 -> 50; epochs: default -> 5, by an admin at testclient"]
    label_studio_stand_in.ml = {"extra_params": {"batch_size": 50, "epochs": 5}}
    client.patch("/api/projects/7/settings", json={"values": {"epochs": None}})
    assert label_studio_stand_in.patched[-1][1]["extra_params"] == {"batch_size": 50}


def test_a_guarded_backend_tells_label_studio_its_password(
    settings: Settings, store: Store, project: int, label_studio_stand_in: Any
) -> None:
    guarded = settings.model_copy(update={"user": "ada", "password": type(settings.password)("secret")})
    client = TestClient(create_app(guarded))
    client.patch("/api/projects/7/settings", json={"values": {"batch_size": 6}}, auth=("ada", "secret"))
    ((_, body),) = label_studio_stand_in.patched
    assert (body["auth_method"], body["basic_auth_user"], body["basic_auth_pass"]) == ("BASIC_AUTH", "ada", "secret")
    assert details(store, "settings") == ["batch_size: 4 -> 6, by ada"]


@pytest.mark.parametrize(
    ("values", "field", "sentence"),
    [
        ({"batch_size": -3}, "batch_size", "greater than or equal to 1"),
        ({"batch_size": "many"}, "batch_size", "valid integer"),
        ({"batchsize": 3}, "batchsize", "did you mean 'batch_size'?"),
        ({"strategy": "hybird"}, "strategy", "did you mean 'hybrid'?"),
        ({"strategy_options": {"alpha": 7}}, "strategy_options", "must be from 0 to 1"),
        ({"committee_size": 2}, "committee_size", "is no committee"),
        ({"strategy": "committee"}, "strategy", "needs committee_size"),
        ({"weights": "\ud800"}, "weights", "not Unicode"),
    ],
)
def test_what_is_wrong_is_said_at_its_field_and_nothing_is_changed(
    client: TestClient,
    store: Store,
    project: int,
    label_studio_stand_in: Any,
    values: dict[str, Any],
    field: str,
    sentence: str,
) -> None:
    body = json.dumps({"values": values}).encode()
    answer = client.patch("/api/projects/7/settings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert sentence in answer.json()["fields"][field]
    assert label_studio_stand_in.patched == []
    assert details(store, "settings") == []


def test_two_wrong_fields_are_both_marked(client: TestClient, project: int) -> None:
    values = {"batch_size": 0, "strategy_options": {"beta": 2}}
    answer = client.patch("/api/projects/7/settings", json={"values": values})
    assert set(answer.json()["fields"]) == {"batch_size", "strategy_options"}


@pytest.mark.parametrize(("attribute", "status"), [("status", 503), ("patch_status", 502), ("patch_status", 400)])
def test_label_studio_away_or_unwilling_changes_nothing_and_is_said(
    client: TestClient, store: Store, project: int, label_studio_stand_in: Any, attribute: str, status: int
) -> None:
    setattr(label_studio_stand_in, attribute, status)
    answer = client.patch("/api/projects/7/settings", json={"values": {"batch_size": 50}})
    assert answer.status_code == (409 if status == 400 else 503)
    assert "Label Studio" in answer.json()["detail"]
    if status == 400:
        assert "no such thing" in answer.json()["detail"]
    with store.read() as connection:
        assert json.loads(connection.execute(select(projects.c.extra_params)).scalar_one()) == {"batch_size": 4}
    assert "Traceback" not in answer.text


def test_a_backend_that_label_studio_no_longer_has_is_said(
    client: TestClient, project: int, label_studio_stand_in: Any
) -> None:
    label_studio_stand_in.ml = {"url": "http://elsewhere:1"}
    answer = client.patch("/api/projects/7/settings", json={"values": {"batch_size": 50}})
    assert answer.status_code == 404
    assert "Connect it again" in answer.json()["detail"]


def test_settings_of_another_version_are_a_sentence_and_the_form_is_there(
    client: TestClient, store: Store, project: int
) -> None:
    with store.write() as connection:
        connection.execute(update(projects).values(extra_params='{"batchsize": 4}'))
    found = client.get("/api/projects/7/settings").json()
    assert "unknown setting 'batchsize'" in found["problem"]
    assert client.get("/projects/7").status_code == 200


def test_settings_of_another_version_are_mended_by_removing_what_is_unknown(
    client: TestClient, store: Store, project: int, label_studio_stand_in: Any
) -> None:
    label_studio_stand_in.ml = {"extra_params": {"batchsize": 4, "seed": 3}}
    with store.write() as connection:
        connection.execute(update(projects).values(extra_params='{"batchsize": 4, "seed": 3}'))
    refused = client.patch("/api/projects/7/settings", json={"values": {"epochs": 5}})
    assert refused.status_code == 422
    assert list(refused.json()["fields"]) == ["batchsize"]
    answer = client.patch("/api/projects/7/settings", json={"values": {"batchsize": None, "epochs": 5}})
    assert answer.status_code == 200, answer.text
    assert answer.json()["problem"] == ""
    assert label_studio_stand_in.patched[0][1]["extra_params"] == {"seed": 3, "epochs": 5}


def test_of_two_changes_at_once_none_is_lost_silently(
    client: TestClient, project: int, label_studio_stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    write = operations._write_through

    def another_comes_in_between(*args: Any) -> None:
        if not answers:
            answers.append(client.patch("/api/projects/7/settings", json={"values": {"epochs": 5}}))
        write(*args)

    monkeypatch.setattr(operations, "_write_through", another_comes_in_between)
    assert client.patch("/api/projects/7/settings", json={"values": {"seed": 9}}).status_code == 200
    assert answers[0].status_code == 409
    assert "are being saved" in answers[0].json()["detail"]
    assert [body["extra_params"] for _, body in label_studio_stand_in.patched] == [{"batch_size": 4, "seed": 9}]
    assert client.patch("/api/projects/7/settings", json={"values": {"epochs": 5}}).status_code == 200


def test_strategies_are_described_to_admins_and_not_to_programmers(client: TestClient, project: int) -> None:
    found = client.get("/api/projects/7/settings").json()["strategies"]
    described = {one["name"]: one["description"] for one in found}
    assert described["random"] == "A random order: utility (N - rank) / N."
    assert described["margin"] == "The most uncertain by the gap between the two likeliest (Scheffer et al. 2001)."
    assert described["committee"] == (
        "As hybrid, with the committee's disagreement as the uncertainty (Seung et al. 1992)."
    )
    for words in described.values():
        assert words.endswith(".")
        assert not [word for word in ("late:", "rng", "`", ".py") if word in words]


def test_what_is_wrong_is_not_told_at_length(client: TestClient, project: int) -> None:
    for value in ({"strategy": "x" * 100_000}, {"strategy_options": {"alpha": ["x" * 100_000]}}):
        answer = client.patch("/api/projects/7/settings", json={"values": value})
        assert answer.status_code == 422
        (sentence,) = answer.json()["fields"].values()
        assert 10 < len(sentence) <= 400
        assert sentence.endswith("…")


# --- the batch -------------------------------------------------------------------------------------------------------


def test_the_batch_says_why_in_figures_and_in_words(client: TestClient, store: Store, project: int) -> None:
    with store.write() as connection:
        connection.execute(update(task_annotations).values(lead_time=30.0))
        row = {"project_id": 7, "annotation_id": 999, "task_id": 11, "cancelled": False, "lead_time": 60.0}
        connection.execute(insert(task_annotations).values(**row))
        unsure = json.dumps([{**json.loads(score(1, 11)["regions"])[0], "score": 0.25}])
        connection.execute(update(scores).where(scores.c.task_id == 11).values(regions=unsure))
    batch = client.get("/api/projects/7/batch").json()
    first, second = batch["tasks"][:2]
    assert (first["from_uncertainty"], first["from_diversity"]) == (pytest.approx(0.56), pytest.approx(0.27))
    assert first["reason"] == f"most uncertain box: {HOSTILE} .25 against background; unlike the images around it"
    assert (first["alike"], [one["task_id"] for one in first["alike_links"]]) == (2, [19, 20])
    assert (second["alike"], second["alike_links"]) == (0, [])
    assert [(one["name"], one["labelled"], one["predicted"], one["rare"]) for one in batch["balance"]] == [
        ("bolt", 90, 3, False), (HOSTILE, 10, 1, True),
    ]  # fmt: skip
    assert (batch["minutes"], batch["minutes_left"]) == (1.0, 3.0)
    page = client.get("/projects/7").text
    assert "<img src=x" not in page
    assert "stands for 2 look-alikes" in page


def test_a_batch_without_its_manifest_is_shown_without_reasons_of_its_own(
    client: TestClient, settings: Settings, project: int
) -> None:
    (Path(settings.artifacts_root) / "p7/r000001/manifest.json").unlink()
    batch = client.get("/api/projects/7/batch").json()
    assert (batch["total"], batch["balance"], batch["tasks"][0]["from_uncertainty"]) == (4, [], None)


# --- previews --------------------------------------------------------------------------------------------------------


def previewed(client: TestClient, settings: Settings, **body: Any) -> dict[str, Any]:
    """A preview, made as a worker makes it."""
    asked = client.post("/api/projects/7/previews", json=body)
    assert (asked.status_code, asked.json()["state"]) == (202, "waiting"), asked.text
    make_preview(worker_of(settings), 7, asked.json()["id"])
    found: dict[str, Any] = client.get(f"/api/projects/7/previews/{asked.json()['id']}").json()
    return found


def test_a_preview_chooses_under_other_settings_and_says_what_differs(
    client: TestClient, store: Store, settings: Settings, project: int
) -> None:
    found = previewed(client, settings, strategy="least_confidence", strategy_options={}, batch_size=3)
    assert (found["state"], found["total"], found["picked"], found["same"], found["compared"]) == ("ready", 3, 3, 0, 4)
    assert [one["task_id"] for one in found["tasks"]] == [20, 19, 18], "the most uncertain"
    assert found["new_task_ids"] == [20, 19, 18]
    assert found["classes"] == [{"name": HOSTILE, "now": 4, "previewed": 3, "rare": True}]
    assert found["settings"] == {
        "strategy": "least_confidence", "strategy_options": {}, "batch_size": 3, "class_weights": True,
        "uncertainty_threshold": 0.1, "uncertainty_empty": "calibrated", "uncertainty_aggregate": "open",
    }  # fmt: skip
    page = client.get(f"/projects/7/previews/{found['id']}").text
    assert "<img src=x" not in page
    assert "0 of 4 still unlabelled" in page
    with store.read() as connection:
        assert connection.execute(select(rounds.c.number).order_by(rounds.c.number)).scalars().all() == [0, 1]


def test_a_preview_of_another_strategy_reads_the_scores_that_there_are(store: Store, project: int) -> None:
    """hybrid reads uncertainty otherwise than the default: published so, every image would be scored anew."""
    with store.write() as connection:
        published = json.loads(connection.execute(select(rounds.c.settings)).scalars().all()[-1])
        found = preview_settings(connection, 7, {"strategy": "hybrid", "strategy_options": {}})
    scored_by = parse_project_settings(published)
    assert reading(parse_project_settings(found)) == reading(scored_by) != reading(ProjectSettings(strategy="hybrid"))


def test_a_preview_begins_with_the_projects_own_choice(client: TestClient, settings: Settings, project: int) -> None:
    found = previewed(client, settings)
    assert (found["strategy"], found["total"]) == ("hybrid_k_center", 4)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"strategy": "x"}, "strategy"),
        ({"strategy_options": {"a": 1}}, "strategy_options"),
    ],
)
def test_a_preview_of_settings_that_cannot_be_right_is_refused(
    client: TestClient, project: int, body: dict[str, Any], field: str
) -> None:
    answer = client.post("/api/projects/7/previews", json=body)
    assert answer.status_code == 422
    assert list(answer.json()["fields"]) == [field]
    assert client.post("/api/projects/7/previews", json={"epochs": 3}).status_code == 422


def test_a_preview_that_fails_says_why_and_cannot_be_published(
    client: TestClient, settings: Settings, project: int
) -> None:
    (Path(settings.artifacts_root) / "p7/r000001/embeddings-00000.npy").unlink()
    found = previewed(client, settings)
    assert found["state"] == "failed"
    assert "embeddings-00000.npy" in found["detail"]
    assert client.post(f"/api/projects/7/previews/{found['id']}/publish").status_code == 409


def test_before_the_first_training_there_is_nothing_to_preview(client: TestClient, store: Store, project: int) -> None:
    with store.write() as connection:
        first = select(rounds.c.id).where(rounds.c.number == 0).scalar_subquery()
        connection.execute(update(projects).values(published_round_id=first))
    answer = client.post("/api/projects/7/previews", json={})
    assert (answer.status_code, answer.json()["error"]) == (409, "Conflict")
    assert client.get("/api/projects/7/suspects").json()["state"] == "none"
    assert client.get("/projects/7").status_code == 200


def test_a_preview_is_published_by_a_round_that_only_selects(
    client: TestClient, store: Store, settings: Settings, project: int
) -> None:
    found = previewed(client, settings, strategy="least_confidence", strategy_options={}, batch_size=3)
    answer = client.post(f"/api/projects/7/previews/{found['id']}/publish")
    assert (answer.status_code, answer.json()["number"], answer.json()["kind"]) == (201, 2, "select")
    assert answer.json()["why"] == "a previewed batch (least_confidence) was published by an admin at testclient"
    with store.read() as connection:
        row = connection.execute(select(rounds).where(rounds.c.number == 2)).one()
        kinds = connection.execute(select(steps.c.kind).where(steps.c.round_id == row.id)).scalars().all()
    assert (json.loads(row.settings), kinds) == (found["settings"], ["select"])
    assert row.weights_sha256 == sha256(b"weights")
    assert client.post(f"/api/projects/7/previews/{found['id']}/publish").status_code == 409
    stages = client.get("/api/projects/7/status").json()["now"]["stages"]
    assert [one["name"] for one in stages] == ["Score", "Publish"]


def test_a_preview_of_another_batch_is_not_published(
    client: TestClient, store: Store, settings: Settings, project: int
) -> None:
    found = previewed(client, settings)
    with store.write() as connection:
        row = {"project_id": 7, "number": 2, "state": "done", "opened_at": 9.0, "closed_at": 9.5}
        newer = connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one()
        connection.execute(update(projects).values(published_round_id=newer))
    answer = client.post(f"/api/projects/7/previews/{found['id']}/publish")
    assert (answer.status_code, "another batch was published" in answer.json()["detail"]) == (409, True)


@pytest.mark.parametrize("preview_id", ["0123456789abcdef", "x", "0" * 400, "01234567/89abcdef"])
def test_an_unknown_preview_is_not_found(client: TestClient, project: int, preview_id: str) -> None:
    assert client.get(f"/api/projects/7/previews/{preview_id}").status_code in (404, 422)


# --- suspects --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory of suspects read before."""
    monkeypatch.setattr(suspects_view, "KEPT_SECONDS", 0.0)


@pytest.mark.usefixtures("_fresh")
def test_suspects_are_looked_for_once_and_shown(
    client: TestClient, store: Store, settings: Settings, project: int, label_studio_stand_in: Any, redis_url: str
) -> None:
    for _ in range(3):
        assert client.get("/api/projects/7/suspects").json()["state"] == "waiting"
    with redis.Redis.from_url(redis_url) as connection:
        assert queue.queue_lengths(connection)["control"] == 1
    label_studio_stand_in.export = [exported(1), exported(5, HOSTILE), exported(6)]
    find_suspects(worker_of(settings), 7, project)
    found = client.get("/api/projects/7/suspects").json()
    assert (found["state"], found["images"], found["counts"]) == ("ready", 3, {"missing": 0, "class": 2, "extra": 0})
    assert [(one["task_id"], one["kind"], one["holdout"]) for one in found["suspects"]] == [
        (1, "class", True), (6, "class", False),
    ]  # fmt: skip
    assert found["suspects"][0]["words"] == f"Other class? Labelled bolt, seen as {HOSTILE} .90."
    assert found["suspects"][0]["label_studio"].endswith("/projects/7/data?task=1")
    page = client.get("/projects/7").text
    assert "<img src=x" not in page
    assert "Other class? Labelled bolt" in page


@pytest.mark.usefixtures("_fresh")
def test_a_label_that_was_changed_since_is_accused_no_more(
    client: TestClient, store: Store, settings: Settings, project: int, label_studio_stand_in: Any
) -> None:
    label_studio_stand_in.export = [exported(5), exported(6), exported(7)]
    find_suspects(worker_of(settings), 7, project)
    with store.write() as connection:
        changed = update(task_annotations).where(task_annotations.c.task_id == 5)
        connection.execute(changed.values(updated_at="2026-02-02"))
        connection.execute(update(tasks).where(tasks.c.task_id == 7).values(deleted=True))
    found = client.get("/api/projects/7/suspects").json()
    assert ([one["task_id"] for one in found["suspects"]], found["fixed"]) == ([6], 2)


def test_looking_again_asks_a_worker(client: TestClient, project: int, redis_url: str) -> None:
    assert client.post("/api/projects/7/suspects").status_code == 202
    with redis.Redis.from_url(redis_url) as connection:
        assert queue.queue_lengths(connection)["control"] == 1


def test_suspects_that_cannot_be_read_are_looked_for_again(
    client: TestClient, artifacts: Artifacts, project: int
) -> None:
    artifacts.put(round_key(7, 1, "suspects.json"), b"{")
    assert client.get("/api/projects/7/suspects").json()["state"] == "waiting"


def test_all_of_it_is_in_the_api_description(client: TestClient) -> None:
    paths = client.get("/api/openapi.json").json()["paths"]
    for _, path, _ in POSTS:
        shape = path.replace("/7/", "/{project_id}/").replace("preview-1", "{job_id}")
        assert shape.replace("0123456789abcdef", "{preview_id}") in paths
