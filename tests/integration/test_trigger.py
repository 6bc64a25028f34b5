"""What opens a round, on a real Label Studio with its real webhooks: labels, once; and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def numbers(stage: Any, project: Any) -> list[int]:
    return [row.number for row in stage.rounds(project)]


def for_training(stage: Any, project: Any, number: int) -> list[int]:
    """The batch without its holdout tasks and without what is labelled."""
    labelled = {task["id"] for task in project.tasks() if task["total_annotations"]}
    holdout = stage.holdout(project)
    return [task_id for task_id in stage.batch(project, number) if task_id not in holdout | labelled]


def test_enough_labels_open_one_round_and_what_arrives_meanwhile_one_more(stage: Any) -> None:
    project = stage.connected(14, batch_size=6, labels_per_round=3)
    first = for_training(stage, project, 0)
    project.label(first[0])
    project.label(first[1])
    assert numbers(stage, project) == [0]
    project.label(first[2])
    assert numbers(stage, project) == [0, 1]
    assert stage.round(project, 1).why == "3 new labels (a round opens at 3)"
    assert [step.kind for step in stage.open_steps()] == ["train"]

    stage.work_until("score")
    assert stage.round(project, 1).labels == 3
    for task_id in first[3:6]:  # of the batch that is still served: the new one is not published yet
        project.label(task_id)
    assert numbers(stage, project) == [0, 1]
    assert stage.round(project, 1).state == "scoring"

    stage.work(only=["score", "control"])
    assert stage.round(project, 1).state == "done"
    assert numbers(stage, project) == [0, 1, 2]
    assert stage.round(project, 2).state == "training"
    assert [step.kind for step in stage.open_steps()] == ["train"]
    stage.work()
    assert [row.state for row in stage.rounds(project)] == ["done", "done", "done"]
    assert stage.round(project, 2).labels == 6
    assert project.remote()["model_version"] == "al-000002"
    assert not set(stage.batch(project, 2)) & set(first)  # nothing labelled is asked for again


def test_a_label_made_while_a_round_waits_for_its_turn_is_in_its_dataset_and_opens_no_other(stage: Any) -> None:
    project = stage.connected(10, batch_size=5, labels_per_round=2)
    first = for_training(stage, project, 0)
    for task_id in first[:4]:  # the first two open it; all four are there when it begins
        project.label(task_id)
    assert numbers(stage, project) == [0, 1]
    stage.work()
    assert stage.round(project, 1).labels == 4
    assert numbers(stage, project) == [0, 1]


def test_a_repeated_webhook_changes_nothing(stage: Any) -> None:
    project = stage.connected(8, labels_per_round=3)
    annotation_id = project.label(for_training(stage, project, 0)[0])
    sent = project.api.get(f"/api/annotations/{annotation_id}/").json()
    body = {"action": "ANNOTATION_CREATED", "annotation": sent, "project": {"id": project.id}}
    before = (stage.events(project), stage.annotation_count(project))
    for _ in range(3):
        assert stage.webhook(body).json() == {"status": "ok", "detail": "already known"}
    assert (stage.events(project), stage.annotation_count(project)) == before
    assert stage.annotation_count(project) == 1
    assert numbers(stage, project) == [0]


def test_a_skip_does_not_count_and_a_deleted_annotation_no_longer(stage: Any) -> None:
    project = stage.connected(10, batch_size=5, labels_per_round=2)
    first = for_training(stage, project, 0)
    project.label(first[0], [], was_cancelled=True)
    project.label(first[1], [], was_cancelled=True)
    assert stage.annotation_count(project) == 2
    assert numbers(stage, project) == [0]
    annotation_id = project.label(first[2])
    assert project.api.delete(f"/api/annotations/{annotation_id}/").status_code == 204
    assert stage.annotation_count(project) == 2
    project.label(first[3])
    assert numbers(stage, project) == [0]
    project.label(first[4])
    assert numbers(stage, project) == [0, 1]
    assert stage.round(project, 1).why == "2 new labels (a round opens at 2)"


def test_labels_of_the_holdout_open_no_round_after_the_first(stage: Any) -> None:
    project = stage.connected(10, holdout_size=3, labels_per_round=2)
    for task_id in for_training(stage, project, 0)[:2]:
        project.label(task_id)
    stage.work()
    assert numbers(stage, project) == [0, 1]
    for task_id in stage.holdout(project):
        project.label(task_id)
    assert stage.annotation_count(project) == 5
    assert numbers(stage, project) == [0, 1]


def test_start_training_opens_a_round_and_pressed_twice_no_other(stage: Any) -> None:
    project = stage.connected(8, labels_per_round=1000)
    project.label(for_training(stage, project, 0)[0])
    assert numbers(stage, project) == [0]
    for _ in range(2):
        assert project.api.post(f"/api/ml/{project.ml_id}/train", json={}).status_code == 200
    assert numbers(stage, project) == [0, 1]
    assert stage.round(project, 1).why == "Start training was pressed in Label Studio"
    answer = stage.webhook({"action": "START_TRAINING", "project": {"id": project.id}})
    assert answer.status_code == 200
    assert f"round 1 of project {project.id} is training" in answer.json()["detail"]
    stage.work()
    assert [row.state for row in stage.rounds(project)] == ["done", "done"]


def test_a_round_without_any_label_fails_in_words_and_the_batch_stays(stage: Any) -> None:
    project = stage.connected(6)
    assert project.api.post(f"/api/ml/{project.ml_id}/train", json={}).status_code == 200
    stage.work()
    assert stage.round(project, 1).state == "failed"
    assert stage.round(project, 1).error == "No task is labelled yet. Label some, then start a round."
    assert stage.row(project).problem == stage.round(project, 1).error
    assert project.remote()["model_version"] == "al-000000"
    assert numbers(stage, project) == [0, 1]


def test_an_empty_pool_ends_the_loop_without_an_error(stage: Any) -> None:
    """The last labels never reach labels_per_round: a round opens all the same, and there is nothing to publish."""
    project = stage.connected(6, labels_per_round=1000)
    for task_id in project.task_ids():
        project.label(task_id)
    assert numbers(stage, project) == [0, 1]
    assert stage.round(project, 1).why == "6 new labels, and the pool is empty"
    stage.work()
    assert stage.round(project, 1).state == "done", stage.round(project, 1).error
    assert stage.batch(project, 1) == []
    assert stage.round(project, 1).labels == 4
    assert stage.round(project, 1).holdout_labels == 2
    assert stage.round(project, 1).map50 is not None
    assert numbers(stage, project) == [0, 1]
    assert stage.row(project).problem is None
    manifest = json.loads(stage.services.artifacts.get(f"p{project.id}/r000001/manifest.json"))
    assert "the pool is empty" in manifest["notes"]
    (new,) = project.add_images([20])  # the pool has a task again: the loop goes on by itself
    stage.work()
    (found,) = project.predictions()[new]
    assert found["model_version"] == "al-000001"
    assert project.remote()["model_version"] == "al-000001"
