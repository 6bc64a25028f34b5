"""What Label Studio sends, as it really sent it, and what nobody should send."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import insert, select, update

from backend import ml_api
from backend.app import MAX_BODY, create_app
from worker import crew, queue
from worker.services import Services
from worker.settings import Settings
from worker.store import events, metadata, projects, rounds, scores, steps, task_annotations, tasks

REPOSITORY = Path(__file__).resolve().parents[2]
CAPTURES = REPOSITORY / "tests" / "fixtures" / "captures"
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="cat"/><Label value="dog"/></RectangleLabels></View>'
)
SETUP = {"project": "1.1795422524", "schema": CONFIG, "extra_params": {"batch_size": 3}}


def capture(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CAPTURES / f"{name}.json").read_text())
    return found


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    values: dict[str, Any] = {
        "redis_url": redis_url,
        "data_dir": tmp_path,
        "label_studio_url": "http://127.0.0.1:9",  # nobody answers there: nothing here may need it
        "reconcile_seconds": 3600,
    }
    return Settings(_env_file=None, **values)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as made:
        queue.connect(settings.redis_url).flushall()  # the ticker's first reconcile
        yield made


def services(client: TestClient) -> Services:
    app = client.app
    assert isinstance(app, FastAPI)
    found: Services = app.state.services
    return found


def content(client: TestClient) -> dict[str, list[Any]]:
    """Everything in the store, and the queue but for what a clock puts there."""
    own = services(client)
    with own.store.read() as connection:
        rows = {
            table.name: [tuple(row) for row in connection.execute(select(table)).all()]
            for table in metadata.sorted_tables
        }
    waiting = [
        [job_id for job_id in queue.queue(name, own.redis).job_ids if not job_id.startswith("reconcile-3600-")]
        for name in queue.QUEUES
    ]
    return {**rows, "queue": waiting}


def publish(client: TestClient, n_tasks: int = 3) -> None:
    """Project 1 with tasks 1..n and round 0 published, as if the worker had been here. Task 1 is of the holdout."""
    assert client.post("/setup", json=SETUP).status_code == 200
    own = services(client)
    with own.store.write() as connection:
        round_id = connection.execute(select(rounds.c.id)).scalar_one()
        connection.execute(update(rounds).values(state="done", model_version="al-000000", batch_size=n_tasks))
        connection.execute(update(steps).values(state="done"))
        connection.execute(update(projects).values(published_version="al-000000", published_round_id=round_id))
        for task_id in range(1, n_tasks + 1):
            values = {"task_id": task_id, "image": f"/data/upload/{task_id}.jpg", "holdout": task_id == 1}
            connection.execute(insert(tasks).values(project_id=1, **values))
            stored = {"task_id": task_id, "shard": 0, "published_score": task_id / 10, "rank": task_id - 1}
            regions = json.dumps([stored_region(task_id)])
            connection.execute(insert(scores).values(round_id=round_id, regions=regions, **stored))
    queue.connect(own.settings.redis_url).flushall()


def stored_region(task_id: int, label: str = "cat") -> dict[str, Any]:
    value = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": [label]}
    kind = {"type": "rectanglelabels", "from_name": "label", "to_name": "image"}
    return {"id": f"r{task_id}", **kind, "value": value}


def annotation(number: int, task_id: int, **fields: Any) -> dict[str, Any]:
    one = {"id": number, "task": task_id, "result": [], "updated_at": f"2026-11-23T08:00:{number:02d}Z", **fields}
    return {"action": "ANNOTATION_CREATED", "annotation": one, "project": {"id": 1}}


# --- what Label Studio sent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CAPTURES.glob("*.json")), ids=lambda path: path.stem)
def test_every_captured_request_is_accepted(path: Path, client: TestClient) -> None:
    publish(client, n_tasks=20)  # the captured /predict asks for tasks 1..20
    sent = json.loads(path.read_text())
    if sent["path"] == "/webhook":  # some were sent for another project
        assert client.post("/setup", json={**SETUP, "project": sent["body"]["project"]["id"]}).status_code == 200
    if path.stem == "setup_basic_auth":
        assert sent["body"].pop("extra_params") == {"a": 1}  # of whoever recorded it; no setting of ours
    headers = {name: value for name, value in sent["headers"].items() if name != "Content-Length"}
    answer = client.request(sent["method"], sent["path"], headers=headers, json=sent["body"])
    assert answer.status_code == 200, answer.text
    assert "0" * 40 not in answer.text  # no token comes back


def test_no_token_is_in_the_copies() -> None:
    kept = [path.read_text() for path in CAPTURES.glob("*.json")]
    assert len(kept) == 19
    for text in kept:
        for line in text.splitlines():
            if "token" in line or "Authorization" in line:
                assert set(line.rpartition(": ")[2].strip(' ",').removeprefix("Basic ")) == {"0"}, line


def test_setup_remembers_the_project_and_opens_its_first_round_once(client: TestClient) -> None:
    for _ in range(3):
        answer = client.post("/setup", json=SETUP, headers={"host": "hardfirst.example:9090"})
        assert answer.json() == {"model_version": "hardfirst-pending"}
    found = content(client)
    (project,) = found["projects"]
    assert project[0] == 1
    assert CONFIG in project
    assert "http://hardfirst.example:9090" in project
    assert '{"batch_size":3}' in project
    assert len(found["rounds"]) == 1
    assert len(found["steps"]) == 1
    with services(client).store.write() as connection:
        connection.execute(update(projects).values(published_version="al-000004"))
    assert client.post("/setup", json=SETUP).json() == {"model_version": "al-000004"}


def test_versions_are_those_of_all_rounds(client: TestClient) -> None:
    assert client.get("/versions").json() == {"versions": []}
    publish(client)
    assert client.get("/versions").json() == {"versions": ["al-000000"]}


def test_labels_open_one_round_however_often_they_are_told(client: TestClient) -> None:
    publish(client, n_tasks=4)  # K is 3: extra_params; the published batch asked for 4
    details = [client.post("/webhook", json=annotation(number, number)).json()["detail"] for number in (1, 2, 3, 3, 4)]
    assert details == ["noted", "noted", "noted", "already known", "noted; a round was opened"]
    assert [row[2] for row in content(client)["rounds"]] == [0, 1]
    assert content(client)["queue"] == [[f"s{content(client)['steps'][-1][0]}-a1"], [], [], []]


def test_bulk_annotations_from_predictions_are_noted_one_by_one(client: TestClient) -> None:
    publish(client, n_tasks=4)
    several = [annotation(number, number)["annotation"] for number in (1, 2, 3)]
    body = {"action": "ANNOTATIONS_CREATED", "annotation": several, "project": {"id": 1}}
    assert client.post("/webhook", json=body).json()["detail"] == "noted"
    assert client.post("/webhook", json=body).json()["detail"] == "already known"
    with services(client).store.read() as connection:
        ids = connection.execute(select(task_annotations.c.annotation_id)).scalars().all()
    assert sorted(ids) == [1, 2, 3]
    body = {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 1}, {"id": 3}, {"id": 77}], "project": {"id": 1}}
    assert client.post("/webhook", json=body).json()["detail"] == "noted"
    with services(client).store.read() as connection:
        assert connection.execute(select(task_annotations.c.annotation_id)).scalars().all() == [2]


def test_a_newer_state_is_not_overwritten_by_an_older_one_that_comes_late(client: TestClient) -> None:
    publish(client)
    skipped = annotation(1, 2, was_cancelled=True, updated_at="2026-11-23T09:00:00Z")
    client.post("/webhook", json={**skipped, "action": "ANNOTATION_UPDATED"})
    client.post("/webhook", json=annotation(1, 2, updated_at="2026-11-23T08:00:00Z"))
    with services(client).store.read() as connection:
        assert connection.execute(select(task_annotations.c.cancelled)).scalars().all() == [True]


def test_new_tasks_ask_for_a_reconcile_and_deleted_ones_are_not_served(client: TestClient) -> None:
    publish(client)
    body = {"action": "TASKS_CREATED", "tasks": [{"id": 9}], "project": {"id": 1}}
    assert client.post("/webhook", json=body).status_code == 200
    (waiting,) = content(client)["queue"][3]
    assert waiting.startswith("reconcile-soon-")
    client.post("/webhook", json={"action": "TASKS_DELETED", "tasks": [{"id": 2}, {"id": 88}], "project": {"id": 1}})
    with services(client).store.read() as connection:
        assert dict(connection.execute(select(tasks.c.task_id, tasks.c.deleted)).all()) == {1: False, 2: True, 3: False}


# --- /predict ---------------------------------------------------------------------------------------------------------


def ask(client: TestClient, *task_ids: int) -> Any:
    asked = [{"id": task_id, "data": {"image": "/data/upload/x.jpg"}} for task_id in task_ids]
    answer = client.post("/predict", json={"tasks": asked, "project": "1.5"})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_stored_predictions_are_answered_in_the_order_asked(client: TestClient) -> None:
    publish(client)
    assert ask(client, 3, 1, 2, 3) == [
        {"result": [stored_region(3)], "score": 0.3, "model_version": "al-000000"},
        {"result": [], "score": 0.1, "model_version": "al-000000"},  # the holdout is shown without boxes
        {"result": [stored_region(2)], "score": 0.2, "model_version": "al-000000"},
        {"result": [stored_region(3)], "score": 0.3, "model_version": "al-000000"},
    ]
    assert ask(client) == []
    assert content(client)["queue"] == [[], [], [], []]


@pytest.mark.parametrize(
    ("config", "kept"),
    [(CONFIG.replace('<Label value="dog"/>', ""), ["r2"]), ('<View><Image name="image" value="$image"/></View>', [])],
    ids=["another label went", "no boxes any more"],
)
def test_what_is_stored_is_answered_without_the_boxes_of_labels_that_went(
    client: TestClient, config: str, kept: list[str]
) -> None:
    publish(client)
    with services(client).store.write() as connection:
        dog = json.dumps([stored_region(3, "dog")])
        connection.execute(update(scores).where(scores.c.task_id == 3).values(regions=dog))
        connection.execute(update(projects).values(label_config=config))
    second, third = ask(client, 2, 3)
    assert [region["id"] for region in second["result"]] == kept
    assert third == {"result": [], "score": 0.3, "model_version": "al-000000"}


def test_without_a_worker_unknown_tasks_are_answered_in_time_as_pending(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(client)
    monkeypatch.setattr(ml_api, "PREDICT_SECONDS", 0.3)
    began = time.monotonic()
    first, unknown = ask(client, 2, 50)
    assert time.monotonic() - began < 20  # of the 85 s that Label Studio would give
    assert first["model_version"] == "al-000000"
    assert unknown == []  # an entry without a prediction: Label Studio stores none, and asks again


def test_an_interactive_request_is_answered_with_an_object(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(client)
    monkeypatch.setattr(ml_api, "PREDICT_SECONDS", 0.1)
    body = {"project": "1.1", "tasks": [{"id": 50, "data": {}}], "params": {"context": {"result": []}}}
    (unknown,) = client.post("/predict", json=body).json()["results"]
    assert unknown == {"result": [], "score": 1.0, "model_version": "hardfirst-pending"}
    assert queue.queue_lengths(services(client).redis)["score"] == 0  # nobody keeps it, so nothing is missing


def test_what_is_left_over_is_asked_for_once_and_behind_the_annotators(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(client)
    monkeypatch.setattr(ml_api, "PREDICT_SECONDS", 4.0)  # some are left after reading, on a busy machine too
    monkeypatch.setattr("worker.scoring.LATE_PAUSE", 1e9)
    assert ask(client, 2, *range(50, 90))[1:] == [[]] * 40
    assert ask(client, 2, 50)[1:] == [[]]
    own = services(client)
    (job_id,) = queue.queue("score", own.redis).job_ids
    job = queue.queue("score", own.redis).fetch_job(job_id)
    assert job is not None
    assert (job.func_name, job.args) == ("worker.jobs.late", [1])
    asked = [queue.queue("predict", own.redis).fetch_job(one) for one in queue.queue("predict", own.redis).job_ids]
    assert [len(one.args[1]) for one in asked if one is not None] == [32, 1]  # in chunks; the first was not answered


def test_slow_reading_leaves_time_for_writing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(client)
    waited = []

    def slow(*args: Any) -> dict[int, Any]:
        time.sleep(0.5)
        return {}

    monkeypatch.setattr(ml_api, "stored_predictions", slow)
    monkeypatch.setattr(ml_api, "PREDICT_SECONDS", 5.0)
    monkeypatch.setattr(ml_api, "_ask_in_chunks", lambda *args: waited.append(args[4] - time.monotonic()) or {})
    ask(client, 50)
    assert waited[0] <= 5.0 - 3 * 0.5  # read once, and twice that is kept for writing the answer


def test_ten_thousand_tasks_in_one_request_are_answered_in_time_with_what_is_ready(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only the worker moves: a second for each chunk of 32."""
    publish(client, n_tasks=5_000)
    clock = {"now": 1_000.0}
    monkeypatch.setattr(ml_api, "time", SimpleNamespace(monotonic=lambda: clock["now"], time=time.time))

    def worker(own: Services, project_id: int, images: Any, seconds: float) -> list[dict[str, Any]]:
        clock["now"] += 1.0
        return [{"result": [], "score": 0.75, "model_version": "al-000000"} for _ in images]

    monkeypatch.setattr(ml_api, "ask_worker", worker)
    results = ask(client, *range(1, 10_001))
    assert clock["now"] - 1_000.0 <= 90
    assert len(results) == 10_000  # any other number, and Label Studio drops them all
    made = int(ml_api.PREDICT_SECONDS) * ml_api.PREDICT_AT_ONCE
    assert [one["score"] for one in results[:5_000]] == [number / 10 for number in range(1, 5_001)]
    assert [one["score"] for one in results[5_000 : 5_000 + made]] == [0.75] * made
    assert results[5_000 + made :] == [[]] * (5_000 - made)  # no prediction: not one in which nothing was found
    (job_id,) = queue.queue("score", services(client).redis).job_ids
    assert job_id.startswith("late-1-")


def test_without_a_worker_nobody_waits_for_the_whole_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(client)
    waited = []

    def refuse(conn: Any, args: Any, timeout: float) -> Any:
        waited.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(queue, "call_predict", refuse)
    ask(client, 50)
    alive = crew.WorkerSeen("w", "host", 1, ("predict",), "idle", 3.0, 0, 0)
    for seen in (alive, replace(alive, seen_seconds=500.0), replace(alive, queues=("control", "score"))):
        monkeypatch.setattr(crew, "workers", lambda conn, seen=seen: [seen])
        ask(client, 50)
    assert waited[0] == waited[2] == waited[3] == ml_api.WITHOUT_WORKER
    assert ml_api.PREDICT_SECONDS - 5 < waited[1] <= ml_api.PREDICT_SECONDS


def test_what_was_made_too_late_and_is_asked_for_again_is_not_sent_twice(client: TestClient) -> None:
    publish(client)
    own = services(client)
    with own.store.write() as connection:
        round_id = connection.execute(select(rounds.c.id)).scalar_one()
        late = {"round_id": round_id, "shard": -1, "published_score": 0.7, "regions": "[]"}
        connection.execute(insert(tasks), [{"project_id": 1, "task_id": number, "image": "a"} for number in (8, 9)])
        connection.execute(insert(scores), [{**late, "task_id": number} for number in (8, 9)])
    body = {"project": "1.1", "tasks": [{"id": 9, "data": {}}], "params": {"context": {}}}
    client.post("/predict", json=body)  # interactive: shown, not kept
    ask(client, 8)
    with own.store.read() as connection:
        sent = connection.execute(select(scores.c.task_id).where(scores.c.sent)).scalars().all()
    assert sent == [8]


def test_without_redis_stored_answers_are_given_all_the_same(settings: Settings, tmp_path: Path) -> None:
    away = settings.model_copy(update={"redis_url": f"unix://{tmp_path}/nobody.sock"})
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        client.post("/setup", json=SETUP)
        own = services(client)
        with own.store.write() as connection:
            round_id = connection.execute(select(rounds.c.id)).scalar_one()
            connection.execute(update(projects).values(published_version="al-000000", published_round_id=round_id))
            connection.execute(insert(tasks).values(project_id=1, task_id=1, image="a"))
            connection.execute(insert(scores).values(round_id=round_id, task_id=1, shard=0, published_score=0.5))
        known, unknown = ask(client, 1, 2)
    assert known["model_version"] == "al-000000"
    assert unknown == []


def test_before_the_first_batch_there_are_no_predictions(client: TestClient) -> None:
    client.post("/setup", json=SETUP)
    assert ask(client, 1, 2) == [[], []]
    assert content(client)["queue"][2] == []


# --- what nobody should send ------------------------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
BAD_BODIES: list[tuple[str, Any, str]] = [  # path, body (bytes: as it is), what the sentence names
    ("/setup", b"{", ""),
    ("/setup", b"", ""),
    ("/setup", b"\xff\xfe\x00", ""),
    ("/setup", b"[]", ""),
    ("/setup", b"null", ""),
    ("/setup", b'{"project": 1, "schema": ' + b"9" * 5000 + b"}", ""),
    ("/setup", DEEP.encode(), ""),
    ("/setup", {}, "project"),
    ("/setup", {**SETUP, "project": None}, "project"),
    ("/setup", {**SETUP, "project": -1}, "project"),
    ("/setup", {**SETUP, "project": 10**30}, "project"),
    ("/setup", {**SETUP, "project": 2**31}, "project"),
    ("/setup", {**SETUP, "project": "7e3.1"}, "project"),
    ("/setup", {**SETUP, "project": "9" * 5000}, "project"),
    ("/setup", {**SETUP, "project": True}, "project"),
    ("/setup", {**SETUP, "project": [1]}, "project"),
    ("/setup", b'{"project": NaN}', "project"),
    ("/setup", {**SETUP, "schema": None}, "schema"),
    ("/setup", {**SETUP, "schema": 7}, "schema"),
    ("/setup", {**SETUP, "schema": "x" * 1_000_001}, "schema"),
    ("/webhook", {}, "action"),
    ("/webhook", {"action": None, "project": {"id": 1}}, "action"),
    ("/webhook", {"action": "x" * 65, "project": {"id": 1}}, "action"),
    ("/webhook", {"action": "\ud800", "project": {"id": 1}}, ""),
    ("/webhook", {"action": "ANNOTATION_CREATED"}, "project"),
    ("/webhook", {"action": "ANNOTATION_CREATED", "project": 1}, "project"),
    ("/webhook", {"action": "ANNOTATION_CREATED", "project": {"id": "1"}}, "project.id"),
    ("/webhook", {"action": "ANNOTATION_CREATED", "project": {"id": 999}}, "project 999 is not connected"),
    ("/webhook", {"action": "START_TRAINING", "project": {"id": 999}}, "project 999 is not connected"),
    ("/webhook", annotation(10**12, 1), "annotation"),
    ("/webhook", annotation(1, -1), "annotation"),
    ("/webhook", annotation(1, 1, was_cancelled="perhaps"), "was_cancelled"),
    ("/webhook", annotation(1, 1, was_cancelled=None), "was_cancelled"),
    ("/webhook", annotation(1, 1, result="[]"), "result"),
    ("/webhook", annotation(1, 1, updated_at="2" * 65), "updated_at"),
    ("/webhook", annotation(1, 1, updated_at="\ud800"), ""),
    ("/webhook", annotation(1, 1, lead_time=-1), "lead_time"),
    ("/webhook", b'{"action":"A","project":{"id":1},"annotation":{"id":1,"task":1,"lead_time":NaN}}', "lead_time"),
    ("/webhook", b'{"action":"A","project":{"id":1},"annotation":{"id":1,"task":1,"lead_time":1e999}}', "lead_time"),
    ("/webhook", {"action": "ANNOTATIONS_DELETED", "annotations": [{}], "project": {"id": 1}}, "annotations"),
    ("/webhook", {"action": "ANNOTATIONS_DELETED", "annotations": None, "project": {"id": 1}}, "annotations"),
    ("/webhook", {"action": "TASKS_DELETED", "tasks": [{"id": 1.5}], "project": {"id": 1}}, "tasks"),
    ("/predict", {}, "tasks"),
    ("/predict", {"tasks": [], "project": None}, "project"),
    ("/predict", {"tasks": [], "project": 999}, "project 999 is not connected"),
    ("/predict", {"tasks": None, "project": 1}, "tasks"),
    ("/predict", {"tasks": [None], "project": 1}, "tasks"),
    ("/predict", {"tasks": [{"id": "1"}], "project": 1}, "tasks"),
    ("/predict", {"tasks": [{"id": 1, "data": []}], "project": 1}, "tasks"),
    ("/predict", {"tasks": [{"id": 1}] * 100_001, "project": 1}, "tasks"),
    ("/predict", DEEP.encode(), ""),
]


REFUSED_CONFIGS = [
    ("", "The label config is empty"),
    ("<View", "The label config cannot be read"),
    ("\ud800", ""),
    (CONFIG.replace("cat", "c\ud800"), ""),
    (CONFIG.replace("cat", "c\x00"), ""),
    ('<View><Text name="t" value="$t"/></View>', "RectangleLabels"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>' + CONFIG, "DOCTYPE"),
    (CONFIG.replace("RectangleLabels", "BrushLabels"), "What is drawn with <BrushLabels> has no box"),
    (CONFIG.replace("RectangleLabels", "PolygonLabels"), '"shapes": "hull"'),
]
REFUSED_SETTINGS: list[tuple[dict[str, Any], str]] = [  # what /setup has instead, what the sentence names
    ({"extra_params": {"bach_size": 3}}, "did you mean 'batch_size'?"),
    ({"extra_params": {"batch_size": 0}}, "batch_size"),
    ({"extra_params": [1]}, "extra_params must be a JSON object"),
    ({"extra_params": "{"}, "extra_params is not JSON"),
    ({"extra_params": '{"a":' + DEEP + "}"}, "extra_params"),
    ({"extra_params": {"lr0": math.nan}}, ""),
    ({"extra_params": {"weights": "\ud800"}}, "not Unicode"),
    ({"extra_params": {"weights": json.loads("[" * 900 + "]" * 900)}}, "weights"),
    ({"extra_params": {"strategy_options": {"\ud800": 1}}}, ""),
    ({"extra_params": {"\ud800": 1}}, ""),
]
REFUSED = [({"schema": config}, named) for config, named in REFUSED_CONFIGS] + REFUSED_SETTINGS


@pytest.mark.parametrize(("sent", "named"), REFUSED)
@pytest.mark.parametrize("is_known", [True, False])
def test_what_setup_refuses_is_noted_and_changes_nothing_else(
    sent: dict[str, Any], named: str, is_known: bool, client: TestClient
) -> None:
    if is_known:
        publish(client)
    before = content(client)
    body = json.dumps({**SETUP, **sent}).encode()
    answer = client.post("/setup", content=body, headers={"Content-Type": "application/json"})
    after = content(client)
    assert 400 <= answer.status_code < 500, answer.text[:500]
    detail = answer.json()["detail"]
    assert named in detail
    if answer.status_code == 422 and "schema" not in detail:  # it was text, and no label config of ours
        own = services(client)
        with own.store.read() as connection:
            row = connection.execute(select(projects)).one()
            told = connection.execute(select(events.c.detail).where(events.c.kind == "refused")).scalars().all()
        assert row.problem == told[0] == detail.encode("utf-8", "replace").decode()
        assert row.label_config == (CONFIG if is_known else "")
        client.post("/setup", content=body, headers={"Content-Type": "application/json"})
        assert content(client) == after  # told once
    for name in set(before) - {"projects", "events"}:
        assert after[name] == before[name], name
    assert client.post("/setup", json=SETUP).status_code == 200
    with services(client).store.read() as connection:
        assert connection.execute(select(rounds.c.number)).scalars().all() == [0]  # the first round follows


@pytest.mark.parametrize(("path", "body", "named"), BAD_BODIES)
def test_bad_input_gets_a_sentence_and_changes_nothing(path: str, body: Any, named: str, client: TestClient) -> None:
    publish(client)
    before = content(client)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=sent, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text[:500]
    told = answer.json()
    assert set(told) == {"error", "detail"}
    assert named in told["detail"]
    assert 5 < len(told["detail"]) < 1500
    assert "Traceback" not in told["detail"]
    assert content(client) == before


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/setup", 405), ("POST", "/health", 405), ("GET", "/nosuch", 404)]
)
def test_a_wrong_address_or_method_is_json_too(method: str, path: str, status: int, client: TestClient) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "detail"}


def test_nulls_where_label_studio_may_send_them_are_nothing(client: TestClient) -> None:
    publish(client)
    body = annotation(1, 2, result=None, updated_at=None, lead_time=None)
    assert client.post("/webhook", json=body).json()["detail"] == "noted"
    assert client.post("/setup", json={**SETUP, "extra_params": None}).status_code == 200
    assert content(client)["projects"][0][3] == "{}"


def test_results_of_any_shape_are_counted_not_trusted(client: TestClient) -> None:
    publish(client)
    result = [None, 7, "x", [], {"type": None}, {"type": "rectanglelabels"}, {"type": "brushlabels"}]
    assert client.post("/webhook", json=annotation(1, 2, result=result)).json()["detail"] == "noted"
    with services(client).store.read() as connection:
        assert connection.execute(select(task_annotations.c.n_boxes)).scalar_one() == 1


def test_a_page_of_another_site_may_change_nothing(client: TestClient) -> None:
    publish(client)
    before = content(client)
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://testserver:81"},
    ):
        answer = client.post("/webhook", json=annotation(1, 1), headers=headers)
        assert answer.status_code == 400, headers
        assert answer.json()["error"] == "BadRequest"
        assert "may not send this" in answer.json()["detail"]
    assert content(client) == before
    same = {"origin": "http://localhost:9090", "host": "localhost:9090"}
    assert client.post("/webhook", json=annotation(1, 1), headers=same).status_code == 200
    assert client.get("/health", headers={"origin": "http://evil.example"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example:9090", 400), ("[", 400), ("localhost:9090", 200), ("127.0.0.1:9090", 200), ("[::1]:9090", 200)],
)
def test_a_name_that_was_rebound_to_us_shows_a_browser_nothing(client: TestClient, host: str, status: int) -> None:
    browser = {"host": host, "user-agent": "Mozilla/5.0"}
    assert client.get("/api/projects", headers=browser).status_code == status
    server = {"host": "backend:9090", "user-agent": "heartex/1.23.2"}
    assert client.get("/health", headers=server).status_code == 200



def test_a_guarded_backend_lets_in_who_knows_the_password(settings: Settings) -> None:
    guarded = Settings(_env_file=None, **{**settings.model_dump(), "user": "label", "password": "studio"})
    with TestClient(create_app(guarded), raise_server_exceptions=False) as client:
        for auth in (None, ("label", "wrong"), ("", ""), ("other", "studio")):
            answer = client.post("/setup", json=SETUP, auth=auth)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == 'Basic realm="hardfirst"'
            assert set(answer.json()) == {"error", "detail"}
        for header in ("Basic", "Basic !!!", "Basic /w==", "Bearer bGFiZWw6c3R1ZGlv", "Basic bGFiZWw"):
            assert client.post("/setup", json=SETUP, headers={"authorization": header}).status_code == 401
        assert client.get("/health").status_code == 200
        for path in ("/", "/versions", "/api/projects", "/api/openapi.json", "/api/docs"):
            assert client.get(path).status_code == 401, path
        assert content(client)["projects"] == []
        assert client.post("/setup", json=SETUP, auth=("label", "studio")).status_code == 200


def raw_request(port: int, head: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
    """Over a socket: clients would correct what is sent here."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    top, _, told = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(told)


@pytest.fixture
def port(settings: Settings) -> Iterator[int]:
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(create_app(settings), "127.0.0.1", number, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    yield number
    server.should_exit = True
    thread.join(10)


def test_bodies_of_unknown_or_enormous_size_are_not_read(port: int) -> None:
    head = "POST /setup HTTP/1.1\nHost: a\nConnection: close\nContent-Type: application/json\n"
    status, told = raw_request(port, head + f"Content-Length: {MAX_BODY + 1}")
    assert (status, told["error"]) == (400, "BadRequest")
    assert f"at most {MAX_BODY} are read" in told["detail"]
    status, told = raw_request(port, head + "Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n")
    assert (status, told["error"]) == (400, "BadRequest")
    assert "send a Content-Length" in told["detail"]
    status, told = raw_request(port, head.rstrip("\n"))
    assert status in (400, 422)
    assert set(told) == {"error", "detail"}


# --- the front door itself --------------------------------------------------------------------------------------------


def test_health_needs_nobody(tmp_path: Path) -> None:
    alone = Settings(_env_file=None, data_dir=tmp_path, label_studio_url="http://127.0.0.1:9")
    with TestClient(create_app(alone)) as client:
        assert client.get("/health").json() == {"status": "UP", "model_class": "HardfirstModel"}
        assert client.post("/setup", json=SETUP).status_code == 200  # the sweeper will send it
        assert content_of_steps(client) == ["waiting"]


def content_of_steps(client: TestClient) -> list[str]:
    with services(client).store.read() as connection:
        return list(connection.execute(select(steps.c.state)).scalars().all())


@pytest.mark.parametrize("module", ["backend.app", "worker.queue", "worker.jobs", "backend.cli"])
def test_importing_loads_no_torch(module: str) -> None:
    heavy = {"torch", "ultralytics", "label_studio_ml", "cv2"}
    code = f"import sys, {module}; print(sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]", done.stderr[-500:]


def test_no_request_makes_a_server_error(settings: Settings) -> None:
    """Schemathesis makes requests from the OpenAPI document, right ones and wrong ones."""
    app = create_app(settings)
    with TestClient(app):
        schema = schemathesis.openapi.from_asgi("/api/openapi.json", app)
        ours = ("/setup", "/webhook", "/predict", "/versions", "/health")
        operations = [found.ok() for found in schema.get_all_operations()]
        chosen = [operation for operation in operations if operation.path in ours]
        assert sorted(operation.path for operation in chosen) == sorted(ours)
        for operation in chosen:
            _fuzz(operation)


def _fuzz(operation: Any) -> None:
    statuses: set[int] = set()

    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def run(case: Any) -> None:
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code < 500, f"{operation.method} {operation.path}: {case.body!r}"
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error", "detail"}

    call: Callable[[], None] = run
    call()
    assert statuses
