"""Connecting the backend on a real Label Studio: what it finds afterwards, and what annotators are shown."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from demo.annotators import Annotator, label_in_turns

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 2}
WANTED_ACTIONS = {
    "ANNOTATION_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_CREATED",
    "ANNOTATIONS_DELETED",
    "TASKS_CREATED",
    "TASKS_DELETED",
}


def scores_by_task(project: Any, version: str) -> dict[int, list[float]]:
    return {
        task_id: [found["score"] for found in predictions if found["model_version"] == version]
        for task_id, predictions in project.predictions().items()
    }


def tab_order(project: Any, view_id: int) -> list[int]:
    found = project.api.get("/api/tasks", params={"view": view_id, "project": project.id, "page_size": 100}).json()
    return [int(task["id"]) for task in found["tasks"]]


def test_a_connected_project_is_set_up_and_its_first_batch_published(stage: Any) -> None:
    project = stage.connected(10)
    remote = project.remote()
    assert remote["sampling"] == "Uncertainty sampling"
    assert remote["model_version"] == "al-000000"
    assert remote["show_collab_predictions"] is True

    (hook,) = project.webhooks()
    assert hook["url"] == f"{stage.backend_url}/webhook"
    assert hook["headers"] == {}
    assert hook["is_active"] is True
    assert hook["send_payload"] is True
    assert hook["send_for_all_actions"] is False
    assert set(hook["actions"]) == WANTED_ACTIONS

    batch = stage.batch(project, 0)
    holdout = stage.holdout(project)
    assert len(batch) == 4 + 2
    assert len(holdout) == 2
    assert holdout < set(batch)
    published = scores_by_task(project, "al-000000")
    assert sorted(published) == project.task_ids()
    assert {len(found) for found in published.values()} == {1}
    assert [published[task_id] for task_id in batch] == [[rank / 12] for rank in range(6)]
    others = [score for task_id, (score,) in published.items() if task_id not in batch]
    assert min(others) >= 0.5
    assert max(others) <= 1.0

    view_id = stage.row(project).view_id
    assert tab_order(project, view_id) == batch
    assert stage.row(project).problem is None
    assert "scratch" in stage.row(project).notice
    assert [step.kind for step in stage.open_steps()] == []


def test_the_holdout_is_shown_without_boxes_once_the_model_draws_some(stage: Any) -> None:
    project = stage.connected(12, confidence=0.001, labels_per_round=4)
    holdout = stage.holdout(project)
    for task_id in [task_id for task_id in stage.batch(project, 0) if task_id not in holdout]:
        project.label(task_id)
    stage.work()
    assert stage.round(project, 1).state == "done", stage.round(project, 1).error
    shown = {
        task_id: [found for found in predictions if found["model_version"] == "al-000001"]
        for task_id, predictions in project.predictions().items()
    }
    assert {len(shown[task_id]) for task_id in holdout} == {1}
    assert {len(shown[task_id][0]["result"]) for task_id in holdout} == {0}
    pool = [task_id for task_id, found in shown.items() if found and task_id not in holdout]
    assert len(pool) == 12 - 2 - 4
    # it does draw: a threshold of 0.001 lets everything through
    assert sum(len(shown[task_id][0]["result"]) for task_id in pool) > 0
    assert {found["model_version"] for predictions in project.predictions().values() for found in predictions} == {
        "al-000001"
    }  # the version before was purged
    answer = httpx.post(
        f"{stage.backend_url}/predict",
        json={"tasks": [{"id": task_id} for task_id in sorted(holdout)], "project": f"{project.id}.1"},
        timeout=60,
        trust_env=False,
    ).json()
    assert [found["result"] for found in answer["results"]] == [[], []]
    assert {found["model_version"] for found in answer["results"]} == {"al-000001"}


def test_a_guarded_backend_is_connected_with_basic_auth_and_its_webhook_gets_the_header(
    make_stage: Callable[..., Any],
) -> None:
    stage = make_stage(user="label", password="studio")
    assert httpx.post(f"{stage.backend_url}/setup", json={}, timeout=60, trust_env=False).status_code == 401
    project = stage.new_project(6)
    project.connect(SMALL, auth_method="BASIC_AUTH", basic_auth_user="label", basic_auth_pass="studio")
    stage.work()
    assert stage.round(project, 0).state == "done"
    (hook,) = project.webhooks()
    assert hook["headers"] == {"Authorization": "Basic " + base64.b64encode(b"label:studio").decode()}
    assert set(hook["actions"]) == WANTED_ACTIONS
    project.label(stage.batch(project, 0)[0])
    assert len(stage.events(project, "ANNOTATION_CREATED")) == 1
    assert stage.annotation_count(project) == 1


def test_connecting_again_adds_no_second_webhook_and_no_second_round(stage: Any) -> None:
    project = stage.connected(6)
    first = [hook["id"] for hook in project.webhooks()]
    assert project.api.delete(f"/api/ml/{project.ml_id}").status_code == 204
    project.connect(SMALL)
    stage.work()
    assert [hook["id"] for hook in project.webhooks()] == first
    assert [row.number for row in stage.rounds(project)] == [0]


def test_two_annotators_in_turns_get_the_batch_in_its_order_and_no_task_twice(stage: Any, second_token: str) -> None:
    project = stage.connected(12, batch_size=6, holdout_size=3, labels_per_round=1000)
    batch = stage.batch(project, 0)
    annotators = [
        Annotator("first", stage.label_studio.url, stage.label_studio.token),
        Annotator("second", stage.label_studio.url, second_token),
    ]
    served = label_in_turns(annotators, project.id, len(batch), lambda task: _one_box(), lambda done: None)
    assert served == batch
    assert len(set(served)) == 9
    assert tab_order(project, stage.row(project).view_id) == []  # the tab shows what is left of the batch


def _one_box() -> Sequence[dict[str, Any]]:
    value = {"x": 10, "y": 10, "width": 30, "height": 30, "rotation": 0, "rectanglelabels": ["nut"]}
    return [{"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}]
