"""The holdout between rounds, on the real Label Studio: more of it asked for, its annotations corrected."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import update

from worker import rounds
from worker.artifacts import round_key
from worker.evaluation import Detections
from worker.store import projects as project_rows

pytestmark = pytest.mark.slow


def ask(stage: Any, project: Any, n: int) -> None:
    with stage.services.store.write() as connection:
        rounds.ask_for_holdout(connection, project.id, n)


def label_batch(stage: Any, project: Any, number: int) -> None:
    """The holdout first: the last of the others opens the next round."""
    holdout = stage.holdout(project)
    known = {task["id"] for task in project.tasks() if task["total_annotations"]}
    batch = [task_id for task_id in stage.batch(project, number) if task_id not in known]
    for task_id in sorted(batch, key=lambda one: one not in holdout):
        project.label(task_id)


def seen_by(stage: Any, project: Any, number: int) -> list[int]:
    content = stage.services.artifacts.get(round_key(project.id, number, "detections.npz"))
    return sorted(Detections.load(content).keys.tolist())


def test_more_holdout_comes_with_the_next_batch_and_earlier_rounds_look_at_it(stage: Any) -> None:
    project = stage.connected(24, batch_size=4, confidence=0.001)
    first = stage.holdout(project)
    label_batch(stage, project, 0)
    ask(stage, project, 3)
    stage.work()
    assert stage.round(project, 1).state == "done", stage.round(project, 1).error
    more = stage.holdout(project) - first
    assert len(more) == 3
    assert stage.row(project).more_holdout == 0
    batch = stage.batch(project, 1)
    assert more < set(batch)
    assert [task_id in more for task_id in batch] != sorted(task_id in more for task_id in batch)  # interleaved
    assert stage.round(project, 1).batch_size == len(batch) - 3
    predictions = project.predictions()
    assert {len(predictions[task_id][0]["result"]) for task_id in more} == {0}  # without pre-annotations
    assert any(predictions[task_id][0]["result"] for task_id in batch if task_id not in more)
    assert seen_by(stage, project, 1) == sorted(first)
    label_batch(stage, project, 1)
    stage.work()
    second = stage.round(project, 2)
    assert second.state == "done", second.error
    dataset = json.loads(stage.services.artifacts.get(round_key(project.id, 2, "dataset.json")))["task_ids"]
    assert not set(dataset) & (first | more)
    assert seen_by(stage, project, 1) == seen_by(stage, project, 2) == sorted(first | more)
    assert stage.round(project, 1).holdout_labels == second.holdout_labels == 5
    assert stage.holdout(project) == first | more  # asked for once, drawn once
    assert json.loads(second.verdict)["interval"]["gain_se"] > 0


def test_a_corrected_holdout_annotation_measures_every_round_again(stage: Any) -> None:
    project = stage.connected(16, batch_size=4)
    label_batch(stage, project, 0)
    stage.work()
    label_batch(stage, project, 1)
    stage.work()
    before = [json.loads(row.per_class) for row in stage.rounds(project)[1:]]
    stage.reconcile()
    assert len(stage.events(project, "holdout measured again")) == 0  # nothing has changed since the round
    corrected = min(stage.holdout(project))
    (annotation,) = next(task for task in project.tasks() if task["id"] == corrected)["annotations"]
    value = {"x": 1, "y": 1, "width": 5, "height": 5, "rotation": 0, "rectanglelabels": ["nut"]}
    region = {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}
    regions = [{**region, "original_width": 96, "original_height": 96, "image_rotation": 0}]
    answer = project.api.patch(f"/api/annotations/{annotation['id']}/", json={"result": annotation["result"] + regions})
    assert answer.status_code == 200
    stage.work()
    stage.reconcile()
    assert len(stage.events(project, "holdout measured again")) == 1
    after = [json.loads(row.per_class) for row in stage.rounds(project)[1:]]
    for then, now in zip(before, after, strict=True):
        assert now["nut"]["boxes"] == then.get("nut", {"boxes": 0})["boxes"] + 1
        assert {name: found["boxes"] for name, found in now.items() if name != "nut"} == {
            name: found["boxes"] for name, found in then.items() if name != "nut"
        }
    with stage.services.store.write() as connection:
        connection.execute(update(project_rows).values(remeasured_at=None))
    stage.reconcile()
    assert len(stage.events(project, "holdout measured again")) == 1
