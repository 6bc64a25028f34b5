from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.label_studio_server import LabelStudioServer
from worker import label_studio as module
from worker.errors import (
    CredentialsMissing,
    LabelStudioRefused,
    LabelStudioUnavailable,
    NotFound,
    PublishIncomplete,
    Unavailable,
)
from worker.label_studio import (
    LabelStudio,
    is_our_version,
    model_version,
    names_missing_task,
    prediction,
    published_score,
)

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)
HOOK = "http://127.0.0.1:9/webhook"
fractions = st.floats(0, 1)


# --- positions instead of utilities -----------------------------------------------------------------------------------


def test_the_batch_by_rank_then_the_rest_by_utility() -> None:
    assert [published_score(rank, 0.0, 4) for rank in range(4)] == [0.0, 0.125, 0.25, 0.375]
    assert [published_score(None, utility, 4) for utility in (1.0, 0.8, 0.0)] == pytest.approx([0.5, 0.6, 1.0])
    assert published_score(None, 7.0, 4) == 0.5
    assert published_score(None, -7.0, 4) == 1.0


@given(st.integers(1, 500), st.data())
def test_nothing_overtakes_the_batch_and_every_score_is_one_label_studio_takes(batch_size: int, data: Any) -> None:
    rank = data.draw(st.integers(0, batch_size - 1))
    low, high = sorted(data.draw(st.tuples(fractions, fractions)))
    inside = published_score(rank, data.draw(fractions), batch_size)
    assert 0 <= inside < 0.5 <= published_score(None, high, batch_size) <= published_score(None, low, batch_size) <= 1
    if rank:
        assert published_score(rank - 1, 0.0, batch_size) < inside


def test_no_version_is_part_of_another() -> None:
    versions = [model_version(number) for number in (0, 1, 10, 100, 12, 120)]
    assert versions[0] == "al-000000"
    assert not [(a, b) for a in versions for b in versions if a != b and a in b]


@pytest.mark.parametrize(
    ("version", "ours"),
    [
        ("al-000001", True),
        ("al-1234567", True),
        ("hardfirst-pending", True),
        ("al-1", False),
        ("al-000001-mine", False),
        ("yolo", False),
        ("", False),
    ],
)
def test_only_our_versions_are_ours_to_delete(version: str, ours: bool) -> None:
    assert is_our_version(version) is ours


def test_a_prediction_as_the_import_takes_it() -> None:
    regions = '[{"id": "r1"}]'
    assert prediction(5, regions, 0.25, "al-000001", False) == {
        "task": 5,
        "result": [{"id": "r1"}],
        "score": 0.25,
        "model_version": "al-000001",
    }
    assert prediction(5, regions, 0.25, "al-000001", True)["result"] == []  # the holdout is shown without boxes
    assert prediction(5, None, None, "al-000001", False) == {
        "task": 5,
        "result": [],
        "score": 1.0,  # never none: SQLite would sort it first
        "model_version": "al-000001",
    }


# --- what it answers, and what that means -----------------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """Starts a server that answers everything with this status and body; its URL."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = do_DELETE = answer

            def log_message(self, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "error", "sentence"),
    [
        (401, b"{}", CredentialsMissing, "does not accept LABEL_STUDIO_API_KEY: the legacy token"),
        (403, b"{}", CredentialsMissing, "may not change this project"),
        (404, b"{}", NotFound, "Label Studio no longer has project 7, or its token may not see it"),
        (400, b'{"detail": "no"}', LabelStudioRefused, "Label Studio answered 400 to GET"),
        (429, b"", LabelStudioUnavailable, "Label Studio answered 429"),
        (500, b"boom", LabelStudioUnavailable, "Label Studio answered 500"),
        (503, b"", LabelStudioUnavailable, "Label Studio answered 503"),
        (200, b"<html>login</html>", LabelStudioUnavailable, "did not answer JSON: is LABEL_STUDIO_URL"),
    ],
)
def test_each_answer_is_one_of_our_errors(
    answering: Callable[[int, bytes], str], status: int, body: bytes, error: type[Exception], sentence: str
) -> None:
    client = LabelStudio(answering(status, body), "a-legacy-token")
    with pytest.raises(error, match=sentence) as caught:
        client.project(7)
    assert "a-legacy-token" not in str(caught.value)


def test_what_is_not_there_is_named(answering: Callable[[int, bytes], str]) -> None:
    with pytest.raises(NotFound, match=r"Label Studio has no /api/tasks/7/ \(404\)"):
        LabelStudio(answering(404, b"{}"), "a-legacy-token").task(7)


def test_nobody_there_is_unavailable_and_no_token_too() -> None:
    with pytest.raises(LabelStudioUnavailable, match=r"Label Studio at http://127.0.0.1:9 does not answer"):
        LabelStudio("http://127.0.0.1:9/", "a-legacy-token").project(7)
    with pytest.raises(CredentialsMissing, match="set LABEL_STUDIO_API_KEY") as caught:
        LabelStudio("http://127.0.0.1:9", "").project(7)
    assert isinstance(caught.value, Unavailable)


def test_an_import_that_kept_fewer_is_incomplete(answering: Callable[[int, bytes], str]) -> None:
    client = LabelStudio(answering(201, b'{"created": 1}'), "a-legacy-token")
    two = [{"task": number, "model_version": "al-000001"} for number in (1, 2)]
    with pytest.raises(PublishIncomplete, match="kept 1 of 2 predictions of al-000001"):
        client.import_predictions(7, two)
    client.import_predictions(7, two[:1])
    client.import_predictions(7, [])


def test_requests_are_bounded_in_number_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    five = [{"task": number, "model_version": f"al-00000{number}"} for number in range(1, 6)]
    monkeypatch.setattr(module, "IMPORT_CHUNK", 3)
    found = list(module._import_bodies(five))
    assert [(version, count) for version, count, _ in found] == [("al-000001", 3), ("al-000004", 2)]
    assert [one for _, _, body in found for one in json.loads(body)] == five
    length = len(json.dumps(five[0]))
    monkeypatch.setattr(module, "IMPORT_BYTES", 2 * length)
    assert [count for _, count, _ in module._import_bodies(five)] == [2, 2, 1]
    monkeypatch.setattr(module, "IMPORT_BYTES", 1)  # one that is too large by itself: Label Studio says so
    assert [count for _, count, _ in module._import_bodies(five)] == [1] * 5
    assert list(module._import_bodies([])) == []


def test_a_refusal_for_a_task_that_is_gone_is_recognised() -> None:
    assert names_missing_task(LabelStudioRefused('... 400: {"detail": "invalid \\"task\\" field"}'))
    assert not names_missing_task(LabelStudioRefused("... 400: Validation error"))


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture
def client(label_studio: LabelStudioServer) -> Iterator[LabelStudio]:
    made = LabelStudio(label_studio.url, label_studio.token)
    yield made
    made.close()


@pytest.fixture
def raw(label_studio: LabelStudioServer) -> httpx.Client:
    headers = {"Authorization": f"Token {label_studio.token}"}
    return httpx.Client(base_url=label_studio.url, headers=headers, timeout=60, trust_env=False)


@pytest.fixture
def project(raw: httpx.Client) -> tuple[int, list[int]]:
    """A project with five tasks: its id and theirs."""
    project_id = int(raw.post("/api/projects/", json={"title": "client", "label_config": CONFIG}).json()["id"])
    raw.post(f"/api/projects/{project_id}/import", json=[{"image": f"http://a/{n}.jpg"} for n in range(5)])
    found = raw.get("/api/tasks", params={"project": project_id}).json()["tasks"]
    return project_id, sorted(int(task["id"]) for task in found)


def box(label: str) -> dict[str, Any]:
    value = {"x": 10.0, "y": 10.0, "width": 5.0, "height": 5.0, "rotation": 0, "rectanglelabels": [label]}
    return {"id": "r1", "type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}


def predictions(task_ids: list[int], version: str, label: str = "nut", n_boxes: int = 1) -> list[dict[str, Any]]:
    return [
        {"task": task_id, "result": [box(label)] * n_boxes, "score": rank / 10, "model_version": version}
        for rank, task_id in enumerate(task_ids)
    ]


@pytest.mark.slow
def test_a_version_is_imported_served_listed_and_deleted(
    client: LabelStudio, raw: httpx.Client, project: tuple[int, list[int]]
) -> None:
    project_id, task_ids = project
    order = task_ids[::-1]
    client.import_predictions(project_id, predictions(order, "al-000001"))
    assert client.versions(project_id) == {"al-000001": 5}
    client.publish_version(project_id, "al-000001")
    remote = client.project(project_id)
    assert (remote["model_version"], remote["sampling"]) == ("al-000001", "Uncertainty sampling")
    assert raw.get(f"/api/projects/{project_id}/next").json()["id"] == order[0]
    with pytest.raises(LabelStudioRefused, match="400"):
        client.publish_version(project_id, "al-000002")  # of which there is no prediction
    client.delete_version(project_id, "al-000001")
    assert client.versions(project_id) == {}


@pytest.mark.slow
def test_predictions_label_studio_drops_in_silence_are_counted(
    client: LabelStudio, project: tuple[int, list[int]]
) -> None:
    project_id, task_ids = project
    some = predictions(task_ids[:2], "al-000001") + predictions(task_ids[2:3], "al-000001", "unknown label")
    with pytest.raises((PublishIncomplete, LabelStudioRefused)):
        client.import_predictions(project_id, some)
    with pytest.raises(LabelStudioRefused) as caught:
        client.import_predictions(project_id, predictions([task_ids[0], 10**7], "al-000002", n_boxes=9))
    assert names_missing_task(caught.value)


@pytest.mark.slow
def test_tasks_come_in_pages_and_labelled_ones_with_their_annotations(
    client: LabelStudio, raw: httpx.Client, project: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id, task_ids = project
    raw.post(f"/api/tasks/{task_ids[1]}/annotations/", json={"result": [box("nut")]})
    raw.post(f"/api/tasks/{task_ids[3]}/annotations/", json={"result": [], "was_cancelled": True})
    for size in (2, 5, 1000):  # a last page that is short, none after a full one, one
        monkeypatch.setattr(module, "PAGE", size)
        pages = list(client.tasks(project_id))
        assert [len(page) for page in pages] == {2: [2, 2, 1], 5: [5], 1000: [5]}[size]
        found = {task["id"]: task["data"] for page in pages for task in page}
        assert sorted(found) == task_ids
        assert found[task_ids[0]] == {"image": "http://a/0.jpg"}
    labelled = [task for page in client.tasks(project_id, labelled_only=True) for task in page]
    assert {task["id"]: [one["was_cancelled"] for one in task["annotations"]] for task in labelled} == {
        task_ids[1]: [False],
        task_ids[3]: [True],
    }
    exported = {task["id"]: task for task in client.export(project_id)}
    assert exported[task_ids[1]]["annotations"][0]["result"][0]["value"]["rectanglelabels"] == ["nut"]


@pytest.mark.slow
def test_our_webhook_is_changed_and_others_are_left_alone(
    client: LabelStudio, raw: httpx.Client, project: tuple[int, list[int]]
) -> None:
    project_id, _ = project
    theirs = raw.post("/api/webhooks/", json={"project": project_id, "url": "http://127.0.0.1:9/other"}).json()["id"]
    assert client.find_webhook(project_id, HOOK) is None
    made = client.own_webhook(project_id, HOOK, {})
    assert client.own_webhook(project_id, HOOK + "/", {"Authorization": "Basic bDpz"}) == made
    hooks = {hook["id"]: hook for hook in raw.get("/api/webhooks/", params={"project": project_id}).json()}
    assert sorted(hooks) == sorted([theirs, made])
    assert hooks[made]["headers"] == {"Authorization": "Basic bDpz"}
    assert hooks[made]["url"] == HOOK
    assert "PROJECT_UPDATED" not in hooks[made]["actions"]
    assert hooks[theirs]["headers"] == {}


@pytest.mark.slow
def test_the_tab_is_kept_and_made_again_when_somebody_closed_it(
    client: LabelStudio, raw: httpx.Client, project: tuple[int, list[int]]
) -> None:
    project_id, task_ids = project
    order = [task_ids[2], task_ids[0], task_ids[1], task_ids[4], task_ids[3]]
    client.import_predictions(project_id, predictions(order, "al-000001"))
    client.publish_version(project_id, "al-000001")  # the Data Manager's score is that of the served version
    view_id = client.show_batch_tab(project_id, "al-000001", None)
    assert client.show_batch_tab(project_id, "al-000001", view_id) == view_id
    shown = raw.get("/api/tasks", params={"view": view_id, "project": project_id}).json()["tasks"]
    assert [task["id"] for task in shown] == order  # .0 .1 .2 .3 .4
    raw.delete(f"/api/dm/views/{view_id}/")
    again = client.show_batch_tab(project_id, "al-000002", view_id)
    assert again != view_id
    shown = raw.get("/api/tasks", params={"view": again, "project": project_id}).json()["tasks"]
    assert shown == []


@pytest.mark.slow
def test_a_personal_access_token_is_refreshed_into_one_that_works(
    label_studio: LabelStudioServer, raw: httpx.Client, project: tuple[int, list[int]]
) -> None:
    raw.post("/api/jwt/settings", json={"api_tokens_enabled": True, "legacy_api_tokens_enabled": True})
    made = raw.post("/api/token/", json={})
    assert made.status_code == 201, made.text
    personal = made.json()["token"]
    client = LabelStudio(label_studio.url, personal)
    kind, _, token = client.auth_headers()["Authorization"].partition(" ")
    assert kind == "Bearer"
    assert token != personal
    assert client.project(project[0])["title"] == "client"
    broken = LabelStudio(label_studio.url, personal[:-6] + "AAAAAA")
    with pytest.raises(CredentialsMissing, match="LABEL_STUDIO_API_KEY"):
        broken.project(project[0])


def test_scores_are_plain_numbers() -> None:
    for score in (published_score(0, math.nan, 1), published_score(None, 0.3, 1)):
        assert json.loads(json.dumps(score)) == score
