"""/predict through the backend, the queue and a worker: live answers for tasks nobody has scored yet."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from backend import ml_api
from worker import queue, rounds

pytestmark = pytest.mark.slow


@pytest.fixture
def image_host() -> Iterator[str]:
    """host:port of a server with /good.jpg, /cut.jpg and /empty.jpg; everything else is 404."""
    whole = io.BytesIO()
    Image.effect_noise((120, 90), 60).convert("RGB").save(whole, "JPEG")
    found = {"/good.jpg": whole.getvalue(), "/cut.jpg": whole.getvalue()[:900], "/empty.jpg": b""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = found.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_unknown_tasks_are_scored_live_and_broken_images_cost_only_themselves(
    make_stage: Callable[..., Any], image_host: str
) -> None:
    stage = make_stage(image_hosts=image_host)
    project = stage.connected(6)
    (hook,) = project.webhooks()
    project.api.delete(f"/api/webhooks/{hook['id']}/")  # nobody tells us of the new tasks
    urls = [f"http://{image_host}/{name}.jpg" for name in ("good", "cut", "empty", "nosuch")]
    urls.append("http://169.254.1.1/secret.jpg")
    new = project.import_tasks([{"data": {"image": url}} for url in urls])
    sent = [{"id": task_id, "data": {"image": url}} for task_id, url in zip(new, urls, strict=True)]
    unknown = [{"id": 999_999, "data": {}}, {"id": project.task_ids()[0], "data": {}}]
    (results,) = stage.ask((project, [*unknown, *sent]))
    assert len(results) == 7
    assert [found["result"] for found in results] == [[]] * 7  # the descriptor draws none
    assert {found["model_version"] for found in results} == {"al-000000"}
    assert 0.5 <= results[2]["score"] < 1.0
    assert [found["score"] for found in results[3:]] == [1.0] * 4  # last in the order
    assert stage.task_rows(project).keys().isdisjoint({999_999, *new})  # only a sync makes tasks

    stage.reconcile()
    rows = stage.task_rows(project)
    assert rows[new[0]].image_problem is None
    problems = [rows[task_id].image_problem for task_id in new[1:]]
    assert "truncated" in problems[0], problems
    assert problems[1] == f"http://{image_host}/empty.jpg is empty (0 bytes)."
    assert "HTTP 404" in problems[2]
    assert "HARDFIRST_IMAGE_HOSTS=169.254.1.1" in problems[3]
    predictions = project.predictions()
    assert {len(predictions[task_id]) for task_id in new} == {1}
    known = project.task_ids()[:6]
    assert {rows[task_id].image_problem for task_id in known} == {None}


def test_a_trained_model_draws_live_and_what_it_drew_is_stored(stage: Any) -> None:
    project = stage.connected(8, labels_per_round=3, confidence=0.001)
    holdout = stage.holdout(project)
    for task_id in [task_id for task_id in stage.batch(project, 0) if task_id not in holdout][:3]:
        project.label(task_id)
    stage.work()
    assert stage.round(project, 1).state == "done", stage.round(project, 1).error
    (new,) = project.add_images([20])
    stage.services.redis.flushall()  # the reconcile that Label Studio's webhook asked for
    assert new not in stage.task_rows(project)
    with stage.services.store.write() as connection:
        rounds.remember_tasks(connection, project.id, {new: project.tasks()[-1]["data"]["image"]})
    task = next(task for task in project.tasks() if task["id"] == new)
    ((drawn,),) = stage.ask((project, [task]))
    assert drawn["model_version"] == "al-000001"
    assert drawn["result"]
    first = drawn["result"][0]
    assert (first["type"], first["from_name"], first["to_name"]) == ("rectanglelabels", "label", "image")
    assert (first["original_width"], first["original_height"]) == (96, 96)
    ((again,),) = stage.ask((project, [task]))
    assert again == drawn
    assert queue.queue("predict", stage.services.redis).count == 0
    row = stage.scores_of(stage.round(project, 1))[new]
    assert (row.shard, row.n_boxes, row.sent) == (-1, len(drawn["result"]), True)
    with httpx.Client(timeout=60, trust_env=False) as client:  # the same answer, without any worker
        body = {"tasks": [task], "project": project.id}
        assert client.post(f"{stage.backend_url}/predict", json=body).json()["results"] == [drawn]


def test_what_is_not_ready_in_time_is_no_prediction_and_follows_soon(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """"Retrieve predictions" for many tasks: what is there is stored, of the rest nothing, until it is scored."""
    project = stage.connected(6)
    new = project.add_images(range(20, 26))
    stage.services.redis.flushall()  # the reconcile that Label Studio's webhook asked for
    images = {task["id"]: task["data"]["image"] for task in project.tasks() if task["id"] in new}
    with stage.services.store.write() as connection:
        rounds.remember_tasks(connection, project.id, images)
    monkeypatch.setattr(ml_api, "WITHOUT_WORKER", 0.2)
    project.retrieve(project.task_ids())
    found = project.predictions()
    assert [len(found[task_id]) for task_id in new] == [0] * 6  # not: six images in which nothing was found
    assert queue.queue_lengths(stage.services.redis)["score"] == 1
    stage.services.redis.delete("rq:queue:predict")  # nor does the worker that was waited for come back
    stage.work()
    found = project.predictions()
    assert [[one["model_version"] for one in found[task_id]] for task_id in new] == [["al-000000"]] * 6
    assert all(0.5 <= found[task_id][0]["score"] < 1 for task_id in new)
    project.retrieve(project.task_ids())  # what is there is not asked for again
    assert project.predictions() == found


def test_what_a_worker_made_too_late_is_given_once(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job that was not waited for stores its predictions; the next request brings them, no import repeats them."""
    project = stage.connected(6)
    new = project.add_images(range(20, 22))
    stage.services.redis.flushall()
    images = {task["id"]: task["data"]["image"] for task in project.tasks() if task["id"] in new}
    with stage.services.store.write() as connection:
        rounds.remember_tasks(connection, project.id, images)
    monkeypatch.setattr(ml_api, "WITHOUT_WORKER", 0.2)
    project.retrieve(new)
    stage.work(only=["predict"])
    made = stage.scores_of(stage.round(project, 0))
    assert [made[task_id].sent for task_id in new] == [False] * 2
    project.retrieve(new)
    stage.work()
    stage.reconcile()
    found = project.predictions()
    assert [len(found[task_id]) for task_id in new] == [1, 1]
