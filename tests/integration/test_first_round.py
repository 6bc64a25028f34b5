"""Round 0 as projects really come: weights that are not there, labels that are, a holdout of one's own, nothing yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 2}


def test_missing_weights_are_named_and_setting_others_starts_again(stage: Any) -> None:
    project = stage.new_project(6)
    project.connect({**SMALL, "weights": "nosuch.pt"})
    stage.work()
    failed = stage.round(project, 0)
    assert failed.state == "failed"
    assert "the project's setting `weights` is 'nosuch.pt': there is no such file on this worker" in failed.error
    assert stage.row(project).problem == failed.error
    assert project.remote()["model_version"] != "al-000000"
    project.change_settings(SMALL)
    assert stage.row(project).problem is None
    stage.work()
    (row,) = stage.rounds(project)
    assert (row.number, row.state) == (0, "done"), row.error
    assert project.remote()["model_version"] == "al-000000"


def test_looking_at_the_model_page_again_does_not_change_a_round_that_runs(stage: Any) -> None:
    project = stage.new_project(6)
    project.connect(SMALL)
    (before,) = stage.rounds(project)
    project.change_settings({**SMALL, "batch_size": 3})  # it has not begun
    stage.work_until("score")
    project.change_settings({**SMALL, "batch_size": 2})
    assert [row.id for row in stage.rounds(project)] == [before.id]
    stage.work()
    assert len(stage.batch(project, 0)) == 3 + 2  # the settings it began with
    assert '"batch_size":2' in stage.row(project).extra_params


def test_labels_that_are_there_already_give_a_holdout_and_start_training_at_once(stage: Any) -> None:
    project = stage.new_project(12)
    labelled = project.task_ids()[:8]
    for task_id in labelled:
        project.label(task_id)
    project.connect({**SMALL, "holdout_size": 3, "labels_per_round": 4})
    stage.work()
    first, second = stage.rounds(project)
    assert (first.state, second.state) == ("done", "done")
    holdout = stage.holdout(project)
    assert len(holdout) == 3
    assert holdout < set(labelled)
    assert second.why == "8 new labels (a round opens at 4)"
    assert (second.labels, second.holdout_labels) == (5, 3)
    assert 0.0 <= second.map50 <= 1.0
    assert stage.row(project).published_version == "al-000001"
    assert set(stage.batch(project, 1)) == set(project.task_ids()) - set(labelled)


def test_a_project_with_too_few_labels_waits_for_more(stage: Any) -> None:
    project = stage.new_project(8)
    project.label(project.task_ids()[0])
    project.connect({**SMALL, "labels_per_round": 3})
    stage.work()
    assert [(row.number, row.state) for row in stage.rounds(project)] == [(0, "done")]
    assert project.task_ids()[0] not in stage.batch(project, 0)


def test_a_holdout_the_project_brings_is_used(stage: Any) -> None:
    project = stage.new_project()
    contents = [project.uploaded(*_picture(index)) for index in range(8)]
    held = project.import_tasks([{"data": {"image": url, "hardfirst": "holdout"}} for url in contents[:3]])
    others = project.import_tasks([{"data": {"image": url}} for url in contents[3:]])
    project.connect({**SMALL, "holdout_size": 2, "labels_per_round": 2})
    stage.work()
    assert stage.holdout(project) == set(held)
    assert {stage.task_rows(project)[task_id].holdout for task_id in others} == {False}
    assert set(held) < set(stage.batch(project, 0))


def _picture(index: int) -> tuple[bytes, str]:
    import io

    from demo import factory

    buffer = io.BytesIO()
    factory.render(3, index, (96, 96))[0].save(buffer, "JPEG")
    return buffer.getvalue(), f"scene-{index:03d}.jpg"


def test_an_empty_project_waits_and_goes_on_after_the_import(stage: Any) -> None:
    project = stage.new_project()
    project.connect(SMALL)
    stage.work()
    assert stage.round(project, 0).state == "attaching"
    assert stage.row(project).problem == (
        "The project has no tasks yet. Import images; the first batch follows by itself."
    )
    project.add_images(range(6))
    stage.make_due()
    stage.work()
    assert stage.round(project, 0).state == "done"
    assert stage.row(project).problem is None
    assert len(stage.batch(project, 0)) == 6


def test_without_a_token_the_one_that_label_studio_sends_is_used(make_stage: Callable[..., Any]) -> None:
    stage = make_stage(label_studio_api_key="")
    project = stage.new_project(4)
    project.connect(SMALL)
    stage.await_token()
    stage.work()
    assert stage.round(project, 0).state == "done"
    assert stage.row(project).problem is None


def test_a_token_that_is_not_valid_is_named(make_stage: Callable[..., Any]) -> None:
    stage = make_stage(label_studio_api_key="0" * 40)
    project = stage.new_project(4)
    project.connect(SMALL)
    stage.work()
    assert stage.round(project, 0).state == "attaching"  # it goes on with a better one
    assert "does not accept LABEL_STUDIO_API_KEY" in stage.row(project).problem
