"""Label Studio goes away in the middle of a round: the round waits, says for whom, and ends when it is back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def stage(make_stage: Callable[..., Any], line: Any) -> Any:
    """hardfirst reaches Label Studio over a line that can be cut; people, and Label Studio itself, do not need it."""
    return make_stage(label_studio_url=line.url)


def test_a_round_waits_for_label_studio_and_the_old_batch_stays(stage: Any, line: Any) -> None:
    project = stage.connected(9, labels_per_round=3)
    holdout = stage.holdout(project)
    for task_id in [task_id for task_id in stage.batch(project, 0) if task_id not in holdout][:3]:
        project.label(task_id)

    stage.work_until("score")
    line.cut()
    stage.work()
    assert stage.round(project, 1).state == "scoring"
    assert "Label Studio does not answer" in stage.row(project).problem
    assert {row.image_problem for row in stage.task_rows(project).values()} == {None}  # nobody's image is to blame
    line.mend()
    stage.make_due()
    stage.work_until("publish")

    line.cut()
    for _ in range(4):  # more often than a failure would be forgiven
        stage.make_due()
        stage.work()
    assert stage.round(project, 1).state == "publishing"
    assert f"Label Studio at {line.url} does not answer" in stage.row(project).problem
    assert project.remote()["model_version"] == "al-000000"
    assert stage.row(project).published_version == "al-000000"
    (step,) = stage.open_steps()
    assert (step.kind, step.failures) == ("publish", 0)

    line.mend()
    stage.make_due()
    stage.work()
    assert stage.round(project, 1).state == "done"
    assert stage.row(project).problem is None
    assert project.remote()["model_version"] == "al-000001"


def test_a_publication_cut_off_halfway_is_made_anew_with_one_prediction_per_task(
    stage: Any, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = stage.new_project(7)
    project.connect({"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 2})
    stage.work_until("publish")
    client = stage.services.label_studio
    really = client.import_predictions

    def cut_after(project_id: int, predictions: Any) -> None:
        monkeypatch.setattr(client, "import_predictions", really)
        really(project_id, predictions)
        line.cut()

    monkeypatch.setattr(client, "import_predictions", cut_after)
    stage.work()
    assert stage.round(project, 0).state == "publishing"
    assert {len(found) for found in project.predictions().values()} == {1}  # written, but not switched to
    assert project.remote()["model_version"] != "al-000000"
    line.mend()
    stage.make_due()
    stage.work()
    assert stage.round(project, 0).state == "done"
    assert {len(found) for found in project.predictions().values()} == {1}
    assert project.remote()["model_version"] == "al-000000"
