"""Webhooks are hints: what they do not bring, reconcile finds. Tasks that come and go during a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from worker.store import projects as project_rows

pytestmark = pytest.mark.slow


def numbers(stage: Any, project: Any) -> list[int]:
    return [row.number for row in stage.rounds(project)]


def for_training(stage: Any, project: Any) -> list[int]:
    holdout = stage.holdout(project)
    return [task_id for task_id in stage.batch(project, 0) if task_id not in holdout]


def without_webhook(project: Any) -> None:
    (hook,) = project.webhooks()
    assert project.api.delete(f"/api/webhooks/{hook['id']}/").status_code == 204


@pytest.mark.parametrize("lost", ["webhook deleted", "webhook disabled", "backend down"])
def test_labels_no_webhook_brought_are_found(lost: str, stage: Any, serve: Callable[..., str]) -> None:
    project = stage.connected(8, labels_per_round=3)
    if lost == "backend down":
        serve.stop()  # type: ignore[attr-defined]
    elif lost == "webhook disabled":
        (hook,) = project.webhooks()
        off = {"url": hook["url"], "is_active": False}
        assert project.api.patch(f"/api/webhooks/{hook['id']}/", json=off).is_success
    else:
        without_webhook(project)
    chosen = for_training(stage, project)
    for task_id in chosen[:3]:
        project.label(task_id)
    project.label(chosen[3], [], was_cancelled=True)
    assert numbers(stage, project) == [0]
    assert stage.annotation_count(project) == 0
    stage.reconcile()
    assert stage.annotation_count(project) == 4
    assert numbers(stage, project) == [0, 1]
    assert stage.round(project, 1).why == "3 new labels (a round opens at 3)"
    assert len(stage.events(project, "reconciled")) == 1
    stage.reconcile()
    assert numbers(stage, project) == [0, 1]


def test_an_annotation_replaced_by_another_is_found_though_the_counters_agree(stage: Any) -> None:
    project = stage.connected(8, labels_per_round=3)
    chosen = for_training(stage, project)
    gone = project.label(chosen[0])
    without_webhook(project)
    assert project.api.delete(f"/api/annotations/{gone}/").status_code == 204
    made = project.label(chosen[1])
    stage.reconcile()
    with stage.services.store.write() as connection:  # half an hour later
        connection.execute(update(project_rows).values(reconciled_at=0.0))
    stage.reconcile()
    with stage.services.store.read() as connection:
        found = connection.exec_driver_sql("select annotation_id, task_id from annotations").fetchall()
    assert [tuple(row) for row in found] == [(made, chosen[1])]


def test_tasks_imported_later_are_scored_alone_and_slotted_in_behind_the_batch(stage: Any) -> None:
    project = stage.connected(8)
    batch = stage.batch(project, 0)
    new = project.add_images([20, 21])  # Label Studio's TASKS_CREATED asks for a reconcile
    stage.work()
    assert numbers(stage, project) == [0]
    rows = stage.task_rows(project)
    assert {rows[task_id].deleted for task_id in new} == {False}
    assert not stage.holdout(project) & set(new)
    predictions = project.predictions()
    for task_id in new:
        (found,) = predictions[task_id]
        assert found["model_version"] == "al-000000"
        assert 0.5 <= found["score"] <= 1.0
    order = sorted(predictions, key=lambda task_id: predictions[task_id][0]["score"])
    assert order[: len(batch)] == batch
    late = {task_id: row for task_id, row in stage.scores_of(stage.round(project, 0)).items() if row.shard == -1}
    assert sorted(late) == new
    assert {row.sent for row in late.values()} == {True}
    for task_id, row in late.items():
        assert predictions[task_id][0]["score"] == pytest.approx(0.5 + 0.5 * (1 - row.utility))
    stage.reconcile()
    assert {len(found) for found in project.predictions().values()} == {1}  # no second one the next minute


def test_a_task_imported_later_joins_the_pool_of_the_next_round(stage: Any) -> None:
    project = stage.connected(8, labels_per_round=3)
    (new,) = project.add_images([20])
    stage.work()
    for task_id in for_training(stage, project)[:3]:
        project.label(task_id)
    stage.work()
    assert stage.round(project, 1).state == "done"
    row = stage.scores_of(stage.round(project, 1))[new]
    assert row.shard == 0
    assert stage.task_rows(project)[new].holdout is False
    (found,) = project.predictions()[new]
    assert found["model_version"] == "al-000001"


def test_tasks_deleted_before_the_batch_is_chosen_are_not_in_it(stage: Any) -> None:
    project = stage.connected(10, labels_per_round=3)
    for task_id in for_training(stage, project)[:3]:
        project.label(task_id)
    stage.work_until("publish")
    pool = [task_id for task_id in project.task_ids() if task_id not in stage.batch(project, 0)]
    assert project.api.delete(f"/api/tasks/{pool[0]}/").status_code == 204
    stage.work()
    assert stage.round(project, 1).state == "done"
    assert stage.task_rows(project)[pool[0]].deleted is True
    assert pool[0] not in stage.batch(project, 1)


def test_tasks_deleted_while_the_batch_is_written_do_not_lose_it(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # with boxes: Label Studio quotes the whole prediction before it says what is wrong with it
    project = stage.connected(10, labels_per_round=3, confidence=0.001)
    for task_id in for_training(stage, project)[:3]:
        project.label(task_id)
    stage.work_until("publish")
    without_webhook(project)
    doomed = next(task_id for task_id in project.task_ids() if task_id not in stage.batch(project, 0))
    client = stage.services.label_studio
    really = client.import_predictions

    def deleted_meanwhile(project_id: int, predictions: Any) -> None:
        monkeypatch.setattr(client, "import_predictions", really)
        assert project.api.delete(f"/api/tasks/{doomed}/").status_code == 204
        really(project_id, predictions)

    monkeypatch.setattr(client, "import_predictions", deleted_meanwhile)
    stage.work()
    assert stage.round(project, 1).state == "publishing"
    assert "tasks were deleted in Label Studio" in stage.row(project).problem
    assert project.remote()["model_version"] == "al-000000"
    stage.make_due()
    stage.work()
    assert stage.round(project, 1).state == "done"
    assert stage.row(project).problem is None
    assert project.remote()["model_version"] == "al-000001"
    assert doomed not in stage.batch(project, 1)
    left = project.predictions()
    unlabelled = [task["id"] for task in project.tasks() if not task["total_annotations"]]
    assert {len(left[task_id]) for task_id in unlabelled} == {1}


def test_a_deleted_project_is_named_and_does_not_stop_the_others(stage: Any) -> None:
    gone, kept = stage.connected(6), stage.connected(6, labels_per_round=2)
    without_webhook(kept)
    for task_id in for_training(stage, kept)[:2]:
        kept.label(task_id)
    assert gone.api.delete(f"/api/projects/{gone.id}/").status_code == 204
    stage.reconcile()
    assert "Label Studio no longer has" in stage.row(gone).problem
    assert numbers(stage, kept) == [0, 1]
