from __future__ import annotations

import base64
import gzip
import io
import json
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from fastapi.testclient import TestClient
from markupsafe import escape
from PIL import Image
from sqlalchemy import insert, select, update

from backend import admin, views
from backend.app import create_app
from worker import queue
from worker.artifacts import Artifacts
from worker.errors import ImageUnusable
from worker.settings import Settings
from worker.store import Store, projects, record_event, rounds, scores, steps, task_annotations, tasks

TOKEN = "0123456789abcdef" * 2 + "01234567"
CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
<Label value="bolt"/><Label value="nut"/></RectangleLabels></View>"""
NOWHERE = "redis://127.0.0.1:1/0"


class StandIn(BaseHTTPRequestHandler):
    """Label Studio's uploads: `server.images` by name; `server.asked` remembers who asked for what."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers.get("Authorization")))
        name = self.path.rsplit("/", 1)[-1]
        status, body = (200, server.images[name]) if name in server.images else (server.status, b"{}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@pytest.fixture
def uploads() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.images, server.asked, server.status = {}, [], 200
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(tmp_path: Path, uploads: Any) -> Settings:
    return Settings(
        label_studio_url=uploads.url, label_studio_api_key=TOKEN, redis_url="", data_dir=tmp_path / "data"
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    made = Store(settings.store_url)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def client(settings: Settings, store: Store) -> TestClient:
    return TestClient(create_app(settings))  # without its lifespan: no ticker


@pytest.fixture
def live(settings: Settings, store: Store, redis_url: str) -> Iterator[tuple[TestClient, redis.Redis]]:
    """The app with a real, empty Valkey, and a connection to look into it."""
    with redis.Redis.from_url(redis_url) as connection:
        yield TestClient(create_app(settings.model_copy(update={"redis_url": redis_url}))), connection


def add_project(store: Store, project_id: int = 7, **values: Any) -> None:
    row = {"id": project_id, "title": "Factory", "label_config": CONFIG, "extra_params": "{}", "connected_at": 1.0}
    with store.write() as connection:
        connection.execute(insert(projects).values(**row | values))


def add_round(store: Store, number: int, state: str = "done", project_id: int = 7, **values: Any) -> int:
    closed = None if state in ("waiting", "attaching", "training", "scoring", "publishing") else 1000.0 + 90
    row = {"project_id": project_id, "number": number, "state": state, "opened_at": 1000.0, "closed_at": closed}
    with store.write() as connection:
        return int(connection.execute(insert(rounds).values(**row | values).returning(rounds.c.id)).scalar_one())


def add_tasks(store: Store, ids: range, project_id: int = 7, **values: Any) -> None:
    rows = [
        {"project_id": project_id, "task_id": i, "image": f"/data/upload/{project_id}/{i}.jpg", "deleted": False}
        | values
        for i in ids
    ]
    with store.write() as connection:
        for start in range(0, len(rows), 1000):
            connection.execute(insert(tasks), rows[start : start + 1000])


def label(store: Store, *task_ids: int, project_id: int = 7, cancelled: bool = False) -> None:
    with store.write() as connection:
        for task_id in task_ids:
            row = {"project_id": project_id, "annotation_id": task_id, "task_id": task_id, "cancelled": cancelled}
            connection.execute(insert(task_annotations).values(**row))


def publish_batch(store: Store, round_id: int, task_ids: list[int], regions: Mapping[int, Any] | None = None) -> None:
    with store.write() as connection:
        for rank, task_id in enumerate(task_ids):
            row = {"round_id": round_id, "task_id": task_id, "shard": 0, "row": rank, "rank": rank, "utility": 0.9}
            parts = {"uncertainty": 0.8, "diversity": 0.7, "regions": json.dumps((regions or {}).get(task_id, []))}
            connection.execute(insert(scores).values(**row, **parts))
        connection.execute(update(projects).values(published_round_id=round_id, published_version="al-000001"))


def region(name: str, **sides: float) -> dict[str, Any]:
    value = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": [name]} | sides
    return {"original_width": 640, "original_height": 480, "score": 0.75, "value": value}


def jpeg(width: int, height: int, exif: Image.Exif | None = None) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(content, "JPEG", exif=exif or Image.Exif())
    return content.getvalue()


def measured(store: Store, number: int, labels: int, map50: float, **values: Any) -> int:
    return add_round(store, number, labels=labels, map50=map50, **values)


# --- nobody connected, somebody away ---------------------------------------------------------------------------------


def test_without_a_project_the_page_says_how_to_connect_one(client: TestClient) -> None:
    page = client.get("/", headers={"host": "backend.example:9090"})
    assert page.status_code == 200
    assert '<code id="backend-url">http://backend.example:9090</code>' in page.text
    assert "Settings → Model → Connect Model" in page.text
    assert "SSRF_PROTECTION_ENABLED=false" in page.text
    assert "ML_BLOCK_LOCAL_IP=false" in page.text


def test_without_a_key_the_page_says_where_to_get_one(settings: Settings, store: Store) -> None:
    keyless = TestClient(create_app(settings.model_copy(update={"label_studio_api_key": type(settings.password)("")})))
    page = keyless.get("/")
    assert page.status_code == 200
    told = "take one in Account &amp; Settings -&gt; Personal Access Token, set LABEL_STUDIO_API_KEY."
    assert told in page.text
    assert keyless.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("status", "said"), [(401, "does not accept LABEL_STUDIO_API_KEY"), (503, "Label Studio answered 503"), (200, "")]
)
def test_label_studio_that_refuses_or_is_unwell_is_a_sentence(
    settings: Settings, uploads: Any, status: int, said: str
) -> None:
    uploads.status = status
    found = admin.label_studio_problem(create_app(settings).state.services)
    assert (said in found) if said else found == ""
    assert uploads.asked == [("/api/current-user/whoami", f"Token {TOKEN}")]


def test_label_studio_away_is_a_sentence(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"label_studio_url": "http://127.0.0.1:1"})
    found = admin.label_studio_problem(create_app(nowhere).state.services)
    assert found == (
        "Label Studio at http://127.0.0.1:1 does not answer (ConnectError). Start it, or correct LABEL_STUDIO_URL; "
        "rounds wait until it is back."
    )


def test_with_redis_away_the_page_answers_and_says_so(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "QUEUE_AWAY_SECONDS", 600.0)  # however long a page takes on a busy machine
    client = TestClient(create_app(settings.model_copy(update={"redis_url": NOWHERE})))
    add_project(store)
    add_round(store, 1, "training")
    page = client.get("/projects/7")
    assert page.status_code == 200
    assert "Redis (Valkey) does not answer" in page.text
    asked: list[int] = []
    monkeypatch.setattr(queue, "get_progress", lambda conn, project_id: asked.append(project_id) or {})
    status = client.get("/api/projects/7/status").json()
    assert asked == [], "a poll must not wait for Redis again"
    assert status["now"]["words"] == "training"
    assert any("Redis (Valkey) does not answer" in sentence for sentence in status["away"])


def test_a_project_that_is_not_connected(client: TestClient) -> None:
    page = client.get("/projects/5")
    assert page.status_code == 404
    assert "project 5 is not connected to this backend" in page.text
    assert page.headers["content-type"].startswith("text/html")
    for path in ("", "/status", "/rounds", "/batch", "/selection"):
        assert client.get(f"/api/projects/5{path}").status_code == 404
    assert client.get(f"/api/projects/{2**31}/status").status_code == 422


# --- state in words --------------------------------------------------------------------------------------------------


def now_of(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/api/projects/7/status").json()["now"]
    return found


def test_training_tells_the_epoch_that_runs(live: tuple[TestClient, redis.Redis], store: Store) -> None:
    client, connection = live
    add_project(store)
    add_round(store, 3, "training", why="60 new labels")
    progress = {"epoch": 3, "epochs": 80, "losses": {"box": 1.5, "bad": "x"}, "eta_seconds": 412.0}
    queue.set_progress(connection, 7, phase="training", round=3, **progress)
    now = now_of(client)
    assert (now["kind"], now["words"], now["round_number"]) == ("working", "training epoch 4/80", 3)
    assert now["fraction"] == pytest.approx(3 / 80)
    assert (now["eta"], now["losses"], now["detail"]) == ("7 min", {"box": 1.5}, "60 new labels")
    assert [(one["name"], one["state"]) for one in now["stages"]] == [
        ("Train", "now"), ("Measure", "to come"), ("Score", "to come"), ("Publish", "to come"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "progress", "words", "fraction"),
    [
        ("training", {"phase": "preparing", "done": 30, "total": 120}, "preparing images 30/120", 0.25),
        ("training", {"phase": "evaluating", "done": 1, "total": 120}, "measuring on the holdout 1/2", 0.5),
        ("scoring", {"phase": "scoring", "done": 512, "total": 2048}, "scoring 512/2048", 0.25),
        ("publishing", {"phase": "publishing", "done": 1000, "total": 4000}, "publishing 1000/4000", 0.25),
        ("publishing", {"phase": "publishing", "done": None, "total": None}, "publishing", None),
        ("publishing", {"phase": "scoring", "done": 9, "total": 9}, "publishing", None),
        ("attaching", {"phase": "attaching"}, "reading the project", None),
        ("waiting", {}, "waiting for a worker", None),
        ("training", {"phase": "training", "epoch": "x", "epochs": None}, "training", None),
    ],
)
def test_state_in_words(
    live: tuple[TestClient, redis.Redis],
    store: Store,
    state: str,
    progress: dict[str, Any],
    words: str,
    fraction: float | None,
) -> None:
    client, connection = live
    add_project(store)
    add_tasks(store, range(1, 3), holdout=True)
    add_round(store, 0 if state == "attaching" else 1, state)
    queue.set_progress(connection, 7, round=0 if state == "attaching" else 1, **progress)
    now = now_of(client)
    assert (now["words"], now["fraction"]) == (words, fraction)


def test_progress_of_another_round_is_not_believed(live: tuple[TestClient, redis.Redis], store: Store) -> None:
    client, connection = live
    add_project(store)
    add_round(store, 4, "training")
    queue.set_progress(connection, 7, phase="training", round=3, epoch=70, epochs=80)
    assert now_of(client)["words"] == "training"


def test_scoring_without_live_progress_is_counted_in_the_store(client: TestClient, store: Store) -> None:
    add_project(store)
    round_id = add_round(store, 1, "scoring")
    with store.write() as connection:
        for task_id, columns in enumerate([{"row": 0}, {"problem": "gone"}, {}, {}]):
            connection.execute(insert(scores).values(round_id=round_id, task_id=task_id, shard=0, **columns))
    now = now_of(client)
    assert (now["words"], now["fraction"]) == ("scoring 2/4", 0.5)


def test_the_end_of_a_phase_is_foretold_from_its_pace(
    live: tuple[TestClient, redis.Redis], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, connection = live
    clock = [1000.0]
    monkeypatch.setattr(admin.time, "monotonic", lambda: clock[0])
    own = client.app.state.services  # type: ignore[attr-defined]
    around = admin.neighbours_of(own)
    queue.set_progress(connection, 7, phase="scoring", round=1, done=100, total=500)
    assert around.progress(own, 7)["eta_seconds"] is None
    clock[0] += 10
    queue.set_progress(connection, 7, phase="scoring", round=1, done=200, total=500)
    found = around.progress(own, 7)
    assert found["eta_seconds"] == pytest.approx(30)  # 100 in 10 s, 300 to go
    assert found["rate"] == pytest.approx(10)
    add_project(store)
    add_round(store, 1, "scoring")
    assert now_of(client)["words"] == "scoring 200/500, 10 images/s"


def test_a_round_that_failed_says_why(client: TestClient, store: Store) -> None:
    add_project(store, problem="Nothing can be learned.")
    add_round(store, 2, "failed", error="Nothing can be learned.")
    status = client.get("/api/projects/7/status").json()
    assert (status["now"]["kind"], status["now"]["words"]) == ("failed", "round 2 failed")
    assert status["now"]["detail"] == "Nothing can be learned."
    assert status["problem"] is None, "the same sentence twice"
    assert (status["can_start"], status["can_cancel"]) == (True, False)


def test_a_step_that_waits_says_for_whom(client: TestClient, store: Store) -> None:
    add_project(store)
    round_id = add_round(store, 1, "publishing")
    with store.write() as connection:
        row = {"round_id": round_id, "kind": "publish", "state": "waiting", "error": "Label Studio answered 502"}
        connection.execute(insert(steps).values(**row))
        connection.execute(update(projects).values(problem="Label Studio answered 502"))
    status = client.get("/api/projects/7/status").json()
    assert status["now"]["words"] == "waiting for a worker"
    assert status["now"]["detail"] == "Tried again soon: Label Studio answered 502"
    assert status["problem"] is None, "the same sentence twice"


def test_a_step_that_no_worker_takes_is_noticed(client: TestClient, store: Store) -> None:
    add_project(store)
    round_id = add_round(store, 1, "training")
    with store.write() as connection:
        row = {"round_id": round_id, "kind": "train", "state": "sent", "sent_at": time.time() - 300}
        connection.execute(insert(steps).values(**row))
    assert now_of(client)["detail"].startswith("In the queue for 5 min, and no worker has taken it")


# --- counts and the next round ---------------------------------------------------------------------------------------


def test_counts_leave_out_skips_deleted_and_unreadable(client: TestClient, store: Store) -> None:
    add_project(store)
    add_tasks(store, range(1, 11), holdout=False)  # 1, 2 labelled, 3 skipped
    add_tasks(store, range(11, 15), holdout=True)  # 11 labelled
    add_tasks(store, range(15, 17), holdout=None)
    add_tasks(store, range(17, 18), deleted=True)
    add_tasks(store, range(18, 19), image_problem="gone")
    label(store, 1, 2, 11)
    label(store, 3, cancelled=True)
    counts = client.get("/api/projects/7/status").json()["counts"]
    assert counts == {"tasks": 17, "labels": 2, "holdout": 4, "holdout_labels": 1, "pool": 10}


@pytest.mark.parametrize(
    ("extra", "values", "sentence"),
    [
        ({}, {}, "3 more labels open round 2."),
        ({"labels_per_round": 3}, {}, "1 more label opens round 2."),
        ({"labels_per_round": 2}, {}, "Round 2 opens at the next label."),
        ({"max_rounds": 1}, {}, "No round opens by itself: max_rounds is 1. Start more by hand."),
        ({}, {"stop_accepted_at": 5.0}, "No round opens by itself: the stop was accepted."),
    ],
)
def test_what_opens_the_next_round(
    client: TestClient, store: Store, extra: dict[str, Any], values: dict[str, Any], sentence: str
) -> None:
    add_project(store, extra_params=json.dumps(extra), **values)
    round_id = add_round(store, 1, batch_size=5)
    add_tasks(store, range(1, 11), holdout=False)
    add_tasks(store, range(11, 12), holdout=True)
    with store.write() as connection:
        connection.execute(update(tasks).where(tasks.c.task_id == 3).values(seen_round_id=round_id))
    label(store, 1, 2, 3, 11)  # 3 was in a dataset already, 11 is the holdout's
    following = client.get("/api/projects/7/status").json()["next_round"]
    assert (following["new"], following["sentence"]) == (2, sentence)


def test_settings_of_another_version_do_not_break_the_page(client: TestClient, store: Store) -> None:
    add_project(store, extra_params='{"unheard_of": 1}')
    add_round(store, 1)
    assert client.get("/projects/7").status_code == 200
    assert client.get("/api/projects/7/status").json()["next_round"] is None


# --- what the rounds bought ------------------------------------------------------------------------------------------


def test_verdict_curve_classes_and_rounds(client: TestClient, store: Store) -> None:
    add_project(store)
    add_round(store, 0, batch_size=9)
    first = {"bolt": {"ap50": 0.5, "boxes": 4}, "nut": {"ap50": 0.4, "boxes": 3}}
    second = {"bolt": {"ap50": 0.25, "boxes": 4}, "nut": {"ap50": 0.75, "boxes": 3}, "new": {"ap50": None, "boxes": 0}}
    advice = {"verdict": "stop", "reasons": ["gained +0.003"], "stats": {"note": "predicted"}, "later": 1}
    measured(store, 1, 60, 0.45, per_class=json.dumps(first))
    values = {"minutes": 2.0, "gain": 0.05, "verdict": json.dumps(advice)}
    measured(store, 2, 120, 0.5, per_class=json.dumps(second), **values)
    add_round(store, 3, "failed", error="out of memory", map50=0.9, labels=180)
    project = client.get("/api/projects/7").json()
    assert project["curve"] == [
        {"round_number": 1, "labels": 60, "map50": 0.45},
        {"round_number": 2, "labels": 120, "map50": 0.5},
    ]
    assert [(one["name"], one["ap50"], one["change"]) for one in project["classes"]] == [
        ("nut", 0.75, 0.35), ("bolt", 0.25, -0.25), ("new", None, None),
    ]  # fmt: skip
    assert (project["verdict"]["words"], project["verdict"]["reasons"]) == ("Time to stop", ["gained +0.003"])
    assert (project["verdict"]["note"], project["verdict"]["round_number"]) == ("predicted", 2)
    table = client.get("/api/projects/7/rounds").json()
    assert [row["number"] for row in table] == [3, 2, 1, 0]
    assert (table[0]["error"], table[1]["seconds"], table[1]["minutes"]) == ("out of memory", 90.0, 2.0)
    page = client.get("/projects/7").text
    assert "out of memory" in page
    assert "Accept the stop" in page
    assert "2 min" in page


def test_the_overview_has_a_card_per_project(client: TestClient, store: Store) -> None:
    add_project(store, 7, title="b")
    add_project(store, 8, title="")
    add_project(store, 9, title="A")
    measured(store, 1, 10, 0.25)
    measured(store, 2, 30, 0.5, verdict='{"verdict": "continue", "reasons": []}')
    found = client.get("/api/projects").json()
    assert [card["title"] for card in found] == ["Project 8", "A", "b"]
    assert found[2]["map50"] == 0.5
    assert found[2]["spark"] == "4.0,18.0 116.0,4.0"  # half as high, then the top
    assert found[1]["spark_end"] is None
    page = client.get("/").text
    assert page.count('class="card project"') == 3
    assert "Continue labelling" in page
    assert "0.500" in page


def test_sparkline_stands_on_zero_and_survives_few_points() -> None:
    assert views.sparkline([]) == []
    assert views.sparkline([(10, 0.0)]) == [(60.0, 32.0)]
    assert views.sparkline([(0, 1.0), (50, 0.5), (100, 0.0)]) == [(4.0, 4.0), (60.0, 18.0), (116.0, 32.0)]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (7200, "2 h"),
        (273600, "3 d 4 h"),
    ],
)
def test_duration_words(seconds: float, words: str) -> None:
    assert views.duration_words(seconds) == words


def test_the_stamp_changes_with_what_the_page_shows(client: TestClient, store: Store) -> None:
    add_project(store)
    round_id = add_round(store, 1, "scoring")
    add_tasks(store, range(1, 3), holdout=False)

    def stamp() -> str:
        return str(client.get("/api/projects/7/status").json()["stamp"])

    stamps = [stamp(), stamp()]
    label(store, 1)
    stamps.append(stamp())
    with store.write() as connection:
        connection.execute(update(rounds).where(rounds.c.id == round_id).values(state="publishing"))
    stamps.append(stamp())
    assert stamps[0] == stamps[1]
    assert len(set(stamps)) == 3


def test_the_notice_goes_when_a_trained_round_is_published(client: TestClient, store: Store) -> None:
    add_project(store, notice="Draws no boxes yet.")
    first = add_round(store, 0)
    with store.write() as connection:
        connection.execute(update(projects).values(published_round_id=first))
    assert client.get("/api/projects/7/status").json()["notice"] == "Draws no boxes yet."
    second = add_round(store, 1)
    with store.write() as connection:
        connection.execute(update(projects).values(published_round_id=second))
    assert client.get("/api/projects/7/status").json()["notice"] is None


@pytest.mark.parametrize(("map50", "is_told"), [(0.004, True), (0.01, False), (None, False)])
def test_a_detector_that_finds_nothing_is_told_with_what_to_do(
    client: TestClient, store: Store, map50: float | None, is_told: bool
) -> None:
    add_project(store, notice="Draws no boxes yet.")
    trained = add_round(store, 1, map50=map50, labels=20, settings='{"epochs": 5}')
    with store.write() as connection:
        connection.execute(update(projects).values(published_round_id=trained))
    notice = client.get("/api/projects/7/status").json()["notice"]
    if not is_told:
        assert notice is None
    else:
        assert notice.startswith("Round 1's detector finds next to nothing: mAP50 0.004, from 20 images in 5 epochs.")
        assert notice.endswith("Then start a round.")


def test_a_run_of_events_is_one_line(client: TestClient, store: Store) -> None:
    add_project(store)
    with store.write() as connection:
        record_event(connection, 7, "connected", detail="hello")
        for index in range(3):
            record_event(connection, 7, "ANNOTATION_CREATED", key=f"a{index}")
        record_event(connection, 8, "connected", key="other")
    found = client.get("/api/projects/7").json()["happenings"]
    told = [(one["words"], one["detail"], one["times"]) for one in found]
    assert told == [("label saved", "", 3), ("connected", "hello", 1)]


def test_unreadable_images_are_listed_with_the_reason(client: TestClient, store: Store) -> None:
    add_project(store)
    add_tasks(store, range(1, 31), image_problem="it is <b>gone</b>")
    project = client.get("/api/projects/7").json()
    assert (len(project["problems"]), project["n_problems"]) == (20, 30)
    page = client.get("/projects/7").text
    assert "it is &lt;b&gt;gone&lt;/b&gt;" in page
    assert "and 10 more" in page


# --- the batch -------------------------------------------------------------------------------------------------------


def test_the_batch_in_rank_order(client: TestClient, store: Store, uploads: Any) -> None:
    add_project(store)
    add_tasks(store, range(1, 6), holdout=False)
    add_tasks(store, range(6, 7), holdout=True)
    add_tasks(store, range(7, 8), deleted=True)
    round_id = add_round(store, 1)
    boxes = {5: [region("nut"), region("strange"), {"value": {"x": "?"}}], 6: [region("bolt")]}
    publish_batch(store, round_id, [5, 6, 7, 1, 2], boxes)
    label(store, 1, 6)
    batch = client.get("/api/projects/7/batch").json()
    assert (batch["total"], batch["labelled"], batch["round_number"]) == (4, 2, 1)
    assert [(one["task_id"], one["rank"], one["labelled"]) for one in batch["tasks"]] == [
        (5, 0, False), (6, 1, True), (1, 3, True), (2, 4, False),
    ]  # fmt: skip
    first, held = batch["tasks"][:2]
    assert [(box["label"], box["colour"], box["x"], box["height"]) for box in first["boxes"]] == [
        ("nut", 1, 10, 40), ("strange", 0, 10, 40),
    ]  # fmt: skip
    assert (first["utility"], first["uncertainty"], first["diversity"]) == (0.9, 0.8, 0.7)
    assert (first["image_width"], first["image_height"]) == (640, 480)
    assert first["label_studio"] == f"{uploads.url}/projects/7/data?task=5"
    assert (held["holdout"], held["boxes"], held["utility"]) == (True, [], None)
    part = client.get("/api/projects/7/batch?offset=1&limit=2").json()
    assert [one["task_id"] for one in part["tasks"]] == [6, 1]
    assert client.get("/api/projects/7/batch?limit=0").status_code == 422
    page = client.get("/projects/7").text
    assert page.count("holdout: no boxes drawn") == 1
    assert '<rect x="10.0%" y="20.0%" width="30.0%" height="40.0%"/>' in page
    assert page.index('data-task="5"') < page.index('data-task="6"') < page.index('data-task="1"')


def test_only_the_first_tasks_of_a_large_batch_are_on_the_page(client: TestClient, store: Store) -> None:
    add_project(store)
    add_tasks(store, range(1, 101), holdout=False)
    publish_batch(store, add_round(store, 1), list(range(1, 101)))
    page = client.get("/projects/7").text
    assert page.count('class="task"') == 60
    assert "Show 40 more" in page
    assert client.get("/projects/7?shown=120").text.count('class="task"') == 100


def test_how_the_batch_was_chosen(client: TestClient, store: Store, settings: Settings) -> None:
    add_project(store)
    assert client.get("/api/projects/7/selection").status_code == 404
    publish_batch(store, add_round(store, 1, batch_size=1), [])
    assert client.get("/api/projects/7/selection").status_code == 404  # its manifest is gone
    manifest = {"strategy": "hybrid", "options": {"alpha": 0.5}, "notes": ["a burst was split"], "tasks": [{"rank": 0}]}
    artifacts = Artifacts(settings.artifacts_root, settings.data_dir / "cache")
    artifacts.put("p7/r000001/manifest.json", json.dumps(manifest).encode())
    found = client.get("/api/projects/7/selection").json()
    assert found == {"strategy": "hybrid", "options": {"alpha": 0.5}, "notes": ["a burst was split"]}
    download = client.get("/api/projects/7/rounds/1/manifest.json")
    assert download.json() == manifest
    assert download.headers["content-disposition"] == 'attachment; filename="hardfirst-p7-r1.json"'
    assert "/api/projects/7/rounds/1/manifest.json" in client.get("/projects/7").text


# --- buttons ---------------------------------------------------------------------------------------------------------


def with_published_batch(store: Store) -> None:
    add_project(store)
    add_tasks(store, range(1, 6), holdout=False)
    publish_batch(store, add_round(store, 0, batch_size=3), [1, 2, 3])


def test_start_a_round_now(live: tuple[TestClient, redis.Redis], store: Store) -> None:
    client, connection = live
    with_published_batch(store)
    answer = client.post("/api/projects/7/rounds")
    assert answer.status_code == 201
    assert (answer.json()["number"], answer.json()["why"]) == (1, "an admin started it")
    assert queue.queue_lengths(connection)["train"] == 1
    status = client.get("/api/projects/7/status").json()
    assert (status["can_start"], status["can_cancel"]) == (False, True)
    again = client.post("/api/projects/7/rounds")
    assert again.status_code == 409
    assert again.json()["detail"] == "round 1 of project 7 is training; wait for it, or cancel it"


def test_with_redis_away_a_round_opens_and_waits(client: TestClient, store: Store) -> None:
    with_published_batch(store)
    assert client.post("/api/projects/7/rounds").status_code == 201
    with store.read() as connection:
        kinds = connection.execute(select(steps.c.kind)).scalars().all()
    assert kinds == ["train"]  # the sweeper sends it when Redis is back
    assert client.post("/api/projects/7/rounds/cancel").json()["state"] == "cancelled"


def test_cancel_takes_the_job_away(live: tuple[TestClient, redis.Redis], store: Store) -> None:
    client, connection = live
    with_published_batch(store)
    client.post("/api/projects/7/rounds")
    queue.set_progress(connection, 7, phase="training", round=1, epoch=1, epochs=3)
    with store.read() as reading:
        step = reading.execute(select(steps.c.id, steps.c.attempt)).one()
    answer = client.post("/api/projects/7/rounds/cancel")
    assert answer.status_code == 200
    assert (answer.json()["number"], answer.json()["state"]) == (1, "cancelled")
    assert queue.job_state(connection, queue.TRAIN, step.id, step.attempt) in ("missing", "failed")
    assert queue.queue_lengths(connection)["train"] == 0
    assert queue.get_progress(connection, 7) == {}
    assert now_of(client)["detail"] == "Round 1 was cancelled."
    assert client.post("/api/projects/7/rounds/cancel").status_code == 409


def test_accept_the_stop_and_withdraw_it(live: tuple[TestClient, redis.Redis], store: Store) -> None:
    client, connection = live
    with_published_batch(store)
    accepted = client.post("/api/projects/7/stop", json={"accepted": True})
    assert (accepted.status_code, accepted.json()["now"]["kind"]) == (200, "stopped")
    assert "Withdraw the stop" in client.get("/projects/7").text
    label(store, 1, 2, 3)  # as many as the batch asked for: they would open a round
    assert client.get("/api/projects/7/status").json()["can_start"] is True
    withdrawn = client.post("/api/projects/7/stop", json={"accepted": False}).json()
    assert (withdrawn["stop_accepted"], withdrawn["now"]["round_number"]) == (False, 1)
    assert queue.queue_lengths(connection)["train"] == 1


@pytest.mark.parametrize("body", [{}, {"accepted": "yes"}, {"accepted": True, "more": 1}, []])
def test_a_stop_that_says_nothing_clear_is_refused(client: TestClient, store: Store, body: Any) -> None:
    with_published_batch(store)
    assert client.post("/api/projects/7/stop", json=body).status_code == 422


def test_another_sites_page_cannot_press_the_buttons(client: TestClient, store: Store) -> None:
    with_published_batch(store)
    for path in ("/rounds", "/rounds/cancel", "/stop"):
        answer = client.post(f"/api/projects/7{path}", headers={"origin": "https://evil.example"})
        assert answer.status_code == 400


def test_user_and_password_guard_all_of_it(settings: Settings, store: Store) -> None:
    add_project(store)
    add_tasks(store, range(1, 2))
    secret = settings.model_copy(update={"user": "ann", "password": type(settings.password)("s3cret")})
    client = TestClient(create_app(secret))
    paths = ("/", "/projects/7", "/api/projects", "/api/projects/7/tasks/1/thumbnail.jpg", "/static/admin.js")
    assert [client.get(path).status_code for path in paths] == [401] * 5
    header = {"Authorization": "Basic " + base64.b64encode(b"ann:s3cret").decode()}
    page = client.get("/", headers=header)
    assert page.status_code == 200
    assert "Basic Authentication" in page.text
    assert "s3cret" not in page.text


# --- thumbnails ------------------------------------------------------------------------------------------------------


def test_a_thumbnail_is_small_and_fetched_once(client: TestClient, store: Store, uploads: Any) -> None:
    add_project(store)
    add_tasks(store, range(1, 2))
    uploads.images["1.jpg"] = jpeg(2000, 1000)
    answers = [client.get("/api/projects/7/tasks/1/thumbnail.jpg") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    with Image.open(io.BytesIO(answers[0].content)) as small:
        assert (small.format, small.size) == ("JPEG", (320, 160))
        assert np.allclose(np.asarray(small)[80, 160], (200, 30, 30), atol=6)
    assert answers[0].headers["cache-control"] == "private, max-age=86400"
    assert uploads.asked == [("/data/upload/7/1.jpg", f"Token {TOKEN}")]


def test_a_changed_image_gets_a_new_thumbnail(client: TestClient, store: Store, uploads: Any) -> None:
    add_project(store)
    add_tasks(store, range(1, 2))
    publish_batch(store, add_round(store, 1), [1])
    uploads.images |= {"1.jpg": jpeg(40, 40), "other.jpg": jpeg(40, 20)}
    before = client.get("/api/projects/7/batch").json()["tasks"][0]["thumbnail"]
    client.get(before)
    with store.write() as connection:
        connection.execute(update(tasks).values(image="/data/upload/7/other.jpg"))
    after = client.get("/api/projects/7/batch").json()["tasks"][0]["thumbnail"]
    assert before != after
    with Image.open(io.BytesIO(client.get(after).content)) as small:
        assert small.size == (40, 20)


def test_a_thumbnail_is_in_the_displayed_frame() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned right by a quarter
    small = Image.open(io.BytesIO(admin.thumbnail(jpeg(1600, 800, exif=turned), 10**7)))
    assert small.size == (160, 320)
    assert dict(small.getexif()) == {}
    png = io.BytesIO()
    Image.new("RGBA", (10, 30), (0, 0, 255, 255)).save(png, "PNG")
    assert Image.open(io.BytesIO(admin.thumbnail(png.getvalue(), 1000))).size == (10, 30)


def test_an_image_that_cannot_be_read_is_a_placeholder(client: TestClient, store: Store, uploads: Any) -> None:
    add_project(store)
    add_tasks(store, range(1, 4))
    uploads.images |= {"1.jpg": b"<html>log in</html>", "2.jpg": jpeg(100, 100)[:300]}
    uploads.status = 404
    for task_id in (1, 2, 3):
        answer = client.get(f"/api/projects/7/tasks/{task_id}/thumbnail.jpg")
        assert (answer.status_code, answer.headers["content-type"]) == (415, "image/svg+xml")
        assert "cannot be read" in answer.text
        assert answer.headers["cache-control"] == "no-store"


def test_with_label_studio_away_a_thumbnail_is_a_placeholder(settings: Settings, store: Store) -> None:
    add_project(store)
    add_tasks(store, range(1, 2))
    client = TestClient(create_app(settings.model_copy(update={"label_studio_url": "http://127.0.0.1:1"})))
    answer = client.get("/api/projects/7/tasks/1/thumbnail.jpg")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "image/svg+xml")


def test_only_tasks_of_the_project_are_fetched(client: TestClient, store: Store, uploads: Any) -> None:
    add_project(store, 7)
    add_project(store, 8)
    add_tasks(store, range(1, 2), project_id=8)
    add_tasks(store, range(2, 3), deleted=True)
    for task_id in (1, 2, 99):
        assert client.get(f"/api/projects/7/tasks/{task_id}/thumbnail.jpg").status_code == 404
    assert uploads.asked == []


def test_slow_images_do_not_hold_up_label_studios_calls(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_project(store)
    add_tasks(store, range(1, 61))
    release = threading.Event()

    def slow(*_args: object) -> None:
        release.wait(20)
        raise ImageUnusable

    monkeypatch.setattr(admin, "make_thumbnail", slow)
    with TestClient(create_app(settings)) as client:
        asking = [
            threading.Thread(target=client.get, args=(f"/api/projects/7/tasks/{i}/thumbnail.jpg",), daemon=True)
            for i in range(1, 61)
        ]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        assert client.get("/health").status_code == 200  # 60 are more than the threads all other calls share
        release.set()
        for thread in asking:
            thread.join(15)


# --- hostile names, and what the browser is told ---------------------------------------------------------------------

HOSTILE = """</script><script>alert(1)</script>"'><img src=x onerror=alert(2)>"""


def test_hostile_names_stay_text(client: TestClient, store: Store) -> None:
    add_project(store, title=HOSTILE[:200], problem=HOSTILE, notice=HOSTILE, label_config="<broken")
    add_tasks(store, range(1, 3), image=HOSTILE, image_problem=HOSTILE)
    advice = {"verdict": HOSTILE, "reasons": [HOSTILE], "stats": {"note": HOSTILE}}
    text = {"verdict": json.dumps(advice), "report": json.dumps({"notes": [HOSTILE], "left_out": {"1": HOSTILE}})}
    round_id = measured(store, 0, 5, 0.5, per_class=json.dumps({HOSTILE: {"ap50": 0.5, "boxes": 1}}), **text)
    publish_batch(store, round_id, [1], {1: [region(HOSTILE, x=1.5)]})
    add_round(store, 2, "failed", error=HOSTILE)
    with store.write() as connection:
        record_event(connection, 7, HOSTILE[:40], detail=HOSTILE)
    for path in ("/", "/projects/7"):
        page = client.get(path).text
        assert "<script>alert" not in page
        assert "<img src=x" not in page
    assert f"<h3 title=\"{escape(HOSTILE)}\">{escape(HOSTILE)}</h3>" in page  # the class
    scripts = re.findall(r"<script\b([^>]*)>", page)
    assert scripts
    assert all(one.startswith((' src="/static/', ' type="application/json"')) for one in scripts)


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_script(
    client: TestClient, store: Store, uploads: Any
) -> None:
    with_published_batch(store)
    page = client.get("/projects/7")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert page.headers["cache-control"] == "no-store"
    loaded = re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', page.text)
    assert loaded
    assert all(address.startswith(("/static/", "/api/")) for address in loaded)
    assert not re.search(r"\son\w+=|javascript:|style=", page.text)
    links = re.findall(r'href="(https?:[^"]*)"', page.text)
    assert links
    assert all(address.startswith(uploads.url) for address in links)


def test_behind_a_prefix_all_addresses_have_it(settings: Settings, store: Store) -> None:
    with_published_batch(store)
    page = TestClient(create_app(settings), root_path="/hf").get("/projects/7").text
    own = re.findall(r'(?:src|href)="(/[^"]*)"', page)
    assert own
    assert all(address.startswith("/hf/") for address in own)
    assert 'data-root="/hf"' in page


def test_static_files_are_ours_kept_and_packed(client: TestClient) -> None:
    page = client.get("/").text
    address = re.search(r'src="(/static/admin\.js\?v=[0-9a-f]{16})"', page)
    assert address is not None
    plain = client.get(address.group(1), headers={"accept-encoding": "identity"})
    assert plain.text == (Path(admin.__file__).parent / "static" / "admin.js").read_text()
    assert "immutable" in plain.headers["cache-control"]
    again = client.get(address.group(1), headers={"if-none-match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for name in ("nothing.js", "..%2Fadmin.py", "admin.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_plotly_comes_from_the_installed_package(client: TestClient) -> None:
    from plotly.offline import get_plotlyjs

    with client.stream("GET", "/static/plotly.js", headers={"accept-encoding": "gzip"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert len(raw) < 2_000_000
    assert gzip.decompress(raw).decode() == get_plotlyjs()


def test_the_api_is_described_with_its_types(client: TestClient) -> None:
    described = client.get("/api/openapi.json").json()["paths"]
    shapes = {
        ("/api/projects", "get", "200"): None,
        ("/api/projects/{project_id}", "get", "200"): "ProjectView",
        ("/api/projects/{project_id}/status", "get", "200"): "LiveStatus",
        ("/api/projects/{project_id}/batch", "get", "200"): "BatchView",
        ("/api/projects/{project_id}/rounds", "post", "201"): "RoundView",
        ("/api/projects/{project_id}/rounds", "post", "409"): "Problem",
        ("/api/projects/{project_id}/rounds/cancel", "post", "200"): "RoundView",
        ("/api/projects/{project_id}/stop", "post", "200"): "LiveStatus",
    }
    for (path, method, status), name in shapes.items():
        schema = described[path][method]["responses"][status]["content"]["application/json"]["schema"]
        assert schema.get("$ref", "").rsplit("/", 1)[-1] == (name or "")
    assert "/" not in described


# --- size ------------------------------------------------------------------------------------------------------------


def test_a_project_of_80000_tasks_is_counted_not_loaded(client: TestClient, store: Store) -> None:
    add_project(store)
    add_tasks(store, range(1, 80_001), holdout=False)
    round_id = add_round(store, 1, batch_size=200)
    chance = random.Random(1)
    with store.write() as connection:
        rows = [{"project_id": 7, "annotation_id": i, "task_id": i} for i in range(1, 20_001)]
        connection.execute(insert(task_annotations), rows)
        found = [
            {"round_id": round_id, "task_id": i, "shard": 0, "utility": chance.random(), "rank": i if i < 200 else None}
            for i in range(80_000)
        ]
        connection.execute(insert(scores), found)
        connection.execute(update(projects).values(published_round_id=round_id))
    client.get("/projects/7")  # compiles the templates
    page = client.get("/projects/7")
    status = client.get("/api/projects/7/status").json()
    assert status["counts"] == {"tasks": 80_000, "labels": 20_000, "holdout": 0, "holdout_labels": 0, "pool": 60_000}
    assert page.text.count('class="task labelled"') == 60
