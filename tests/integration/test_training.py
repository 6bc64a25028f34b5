"""Annotations from which little or nothing can be learned: the round runs, or says why not, and the batch stays."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def for_training(stage: Any, project: Any, number: int = 0) -> list[int]:
    holdout = stage.holdout(project)
    return [task_id for task_id in stage.batch(project, number) if task_id not in holdout]


def box(label: str) -> dict[str, Any]:
    value = {"x": 20, "y": 20, "width": 30, "height": 30, "rotation": 0, "rectanglelabels": [label]}
    return {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}


def test_one_image_of_one_class_trains(stage: Any) -> None:
    project = stage.connected(6, labels_per_round=1)
    project.label(for_training(stage, project)[0], [box("nut")])
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    assert (row.labels, row.boxes, row.map50, row.holdout_labels) == (1, 1, None, 0)
    report = json.loads(row.report)
    assert report["boxes_per_class"]["nut"] == 1
    assert sum(report["boxes_per_class"].values()) == 1
    assert report["chances_missed"] == {}  # nothing of the holdout is labelled
    assert json.loads(row.verdict)["verdict"] == "insufficient_evidence"
    assert project.remote()["model_version"] == "al-000001"


def test_background_alone_fails_in_words_and_a_box_mends_it(stage: Any) -> None:
    project = stage.connected(8, batch_size=5, labels_per_round=3)
    chosen = for_training(stage, project)
    for task_id in chosen[:3]:
        project.label(task_id, [])
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "failed"
    assert row.error == (
        "There is no box in 3 labelled images, so there is nothing to detect yet. Label images that show something."
    )
    assert stage.row(project).problem == row.error
    assert stage.row(project).published_version == "al-000000"
    assert project.remote()["model_version"] == "al-000000"
    project.label(chosen[3], [box("nut")])
    assert project.api.post(f"/api/ml/{project.ml_id}/train", json={}).status_code == 200
    stage.work()
    row = stage.round(project, 2)
    assert row.state == "done", row.error
    assert (row.labels, row.boxes, json.loads(row.report)["background"]) == (4, 1, 3)
    assert stage.row(project).problem is None


def test_a_class_nobody_drew_is_trained_around_and_the_holdout_measured(stage: Any) -> None:
    project = stage.connected(10, labels_per_round=4)
    for task_id in stage.batch(project, 0):
        project.label(task_id, [box("nut")])
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    assert (row.labels, row.holdout_labels) == (4, 2)
    assert row.map50 == pytest.approx(0.0, abs=1e-3)  # one epoch from nothing
    assert set(json.loads(row.per_class)) == {"nut"}
    report = json.loads(row.report)
    assert report["boxes_per_class"]["surface_pit"] == 0
    assert set(report["chances_missed"]) == {"least_confidence", "margin", "entropy"}
    assert set(report["chances_missed"].values()) <= {0.5, 0.75, 0.8333}  # of 0, 1 or 2 images, both with a nut
    assert row.minutes == pytest.approx(6 * 6.0 / 60)


def test_images_that_cannot_be_read_are_left_out_with_their_reason(stage: Any) -> None:
    project = stage.new_project(6)
    whole = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(whole, "JPEG")
    cut = project.uploaded(whole.getvalue()[: len(whole.getvalue()) // 2], "cut.jpg")
    images = (cut, f"/data/upload/{project.id}/nosuch.jpg", "")
    broken = project.import_tasks([{"data": {"image": image}} for image in images])
    project.connect(
        {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 0, "labels_per_round": 4}
    )
    stage.work()
    assert stage.round(project, 0).state == "done", stage.round(project, 0).error
    rows = stage.task_rows(project)
    problems = [rows[task_id].image_problem for task_id in broken]
    assert "truncated" in problems[0] or "cut short" in problems[0], problems[0]
    assert "nosuch.jpg (HTTP" in problems[1]  # Label Studio answers 500 for an upload that is gone
    assert problems[2] == "the task's data has no field 'image'"
    good = [task_id for task_id in project.task_ids() if task_id not in broken]
    assert [rows[task_id].image_problem for task_id in good] == [None] * 6
    assert set(stage.batch(project, 0)) <= set(good)
    assert len(stage.batch(project, 0)) == 4
    predictions = project.predictions()
    assert {task_id: len(predictions[task_id]) for task_id in good} == dict.fromkeys(good, 1)
    for task_id in (*good[:4], broken[0]):
        project.label(task_id, [box("nut")])
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    assert row.labels == 4
    assert list(json.loads(row.report)["left_out"]) == [str(broken[0])]
