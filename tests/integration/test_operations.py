"""What an admin does, on the real Label Studio: settings, pause, retry, another batch, suspects, the dataset."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from worker import retraining
from worker.errors import TrainingFailed
from worker.label_studio import model_version

pytestmark = pytest.mark.slow  # trainings, on a real Label Studio


def admin_of(stage: Any, **fields: Any) -> httpx.Client:
    return httpx.Client(base_url=stage.backend_url, timeout=60, trust_env=False, **fields)


def label_batch(stage: Any, project: Any, number: int) -> None:
    """As annotators do, with boxes that are right; the trigger then opens a round."""
    for task_id in stage.batch(project, number):
        project.label(task_id)


def extra_params(project: Any) -> Any:
    found = project.api.get(f"/api/ml/{project.ml_id}").json()["extra_params"]
    return json.loads(found) if isinstance(found, str) else found


def test_settings_have_one_home_and_are_changed_from_both_sides(stage: Any) -> None:
    project = stage.connected(6)
    before = extra_params(project)
    with admin_of(stage) as admin:
        answer = admin.patch(f"/api/projects/{project.id}/settings", json={"values": {"batch_size": 3, "epochs": None}})
        assert answer.status_code == 200, answer.text
        wanted = {**before, "batch_size": 3}
        del wanted["epochs"]
        assert extra_params(project) == wanted
        assert json.loads(stage.row(project).extra_params) == wanted
        project.change_settings({**wanted, "batch_size": 5})
        answer = admin.get(f"/api/projects/{project.id}/settings").json()
    found = {one["name"]: one["value"] for group in answer["groups"] for one in group["settings"]}
    assert (found["batch_size"], found["epochs"]) == (5, 80)
    told = [one.detail for one in stage.events(project, "settings")]
    assert told[-2:] == [
        "batch_size: 4 -> 3; epochs: 1 -> default, by an admin at 127.0.0.1",
        "batch_size: 3 -> 5, by Label Studio",
    ]


def test_a_guarded_backend_stays_connected_when_its_settings_change(make_stage: Callable[..., Any]) -> None:
    stage = make_stage(user="ada", password="secret")
    project = stage.new_project(6)
    login = {"auth_method": "BASIC_AUTH", "basic_auth_user": "ada", "basic_auth_pass": "secret"}
    project.connect({"weights": "yolo11n.yaml"}, **login)
    with admin_of(stage, auth=("ada", "secret")) as admin:
        answer = admin.patch(f"/api/projects/{project.id}/settings", json={"values": {"batch_size": 3}})
        assert answer.status_code == 200, answer.text
    assert extra_params(project) == {"weights": "yolo11n.yaml", "batch_size": 3}
    remote = project.api.get(f"/api/ml/{project.ml_id}").json()
    assert (remote["readable_state"], remote["auth_method"]) == ("Connected", "BASIC_AUTH")
    assert [one.detail for one in stage.events(project, "settings")] == ["batch_size: default -> 3, by ada"]


@pytest.fixture
def trained(stage: Any) -> Any:
    """A project after round 1, and its stage."""
    project = stage.connected(14)
    label_batch(stage, project, 0)
    stage.work()
    assert stage.last_round(project).number == 1, stage.rounds(project)
    assert stage.last_round(project).state == "done", stage.rounds(project)
    return project


def test_another_batch_is_previewed_and_published_as_previewed(stage: Any, trained: Any) -> None:
    scored_before = stage.scores_of(stage.round(trained, 1))
    with admin_of(stage) as admin:
        body = {"strategy": "random", "strategy_options": {}, "batch_size": 3}
        asked = admin.post(f"/api/projects/{trained.id}/previews", json=body)
        assert asked.status_code == 202, asked.text
        stage.work()
        preview = admin.get(f"/api/projects/{trained.id}/previews/{asked.json()['id']}").json()
        assert (preview["state"], preview["picked"]) == ("ready", 3), preview
        published = admin.post(f"/api/projects/{trained.id}/previews/{preview['id']}/publish")
        assert published.status_code == 201, published.text
    stage.work()
    row = stage.last_round(trained)
    assert (row.number, row.kind, row.state, row.map50, row.error) == (2, "select", "done", None, None)
    assert stage.batch(trained, 2) == [one["task_id"] for one in preview["tasks"]]
    assert trained.remote()["model_version"] == model_version(2)
    served = {task_id: found[-1] for task_id, found in trained.predictions().items() if found}
    assert {one["model_version"] for one in served.values()} == {model_version(2)}
    for task_id, score in stage.scores_of(row).items():  # nothing was scored again
        assert (score.regions, score.least_confidence) == (
            scored_before[task_id].regions, scored_before[task_id].least_confidence,
        )  # fmt: skip
    assert json.loads(stage.row(trained).extra_params)["batch_size"] == 4, "the project's settings stay"
    for task_id in stage.batch(trained, 2):
        trained.label(task_id)
    stage.work()
    assert (stage.last_round(trained).number, stage.last_round(trained).kind) == (3, "train")


def test_a_paused_round_waits_between_its_steps_and_goes_on(stage: Any) -> None:
    project = stage.connected(10)
    label_batch(stage, project, 0)
    stage.work_until("score")
    with admin_of(stage) as admin:
        admin.post(f"/api/projects/{project.id}/pause", json={"paused": True})
        stage.work()
        status = admin.get(f"/api/projects/{project.id}/status").json()
        assert (status["now"]["kind"], stage.last_round(project).state) == ("paused", "scoring")
        admin.post(f"/api/projects/{project.id}/pause", json={"paused": False})
    stage.work()
    assert (stage.last_round(project).number, stage.last_round(project).state) == (1, "done")


def test_a_round_that_failed_is_finished_by_retry(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project = stage.connected(10)
    measure = retraining.measure

    def broken(*_args: Any) -> Any:
        raise TrainingFailed("the card <b>burnt</b> out")

    monkeypatch.setattr(retraining, "measure", broken)
    label_batch(stage, project, 0)
    stage.work()
    failed = stage.last_round(project)
    assert (failed.number, failed.state) == (1, "failed")
    monkeypatch.setattr(retraining, "measure", measure)
    with admin_of(stage) as admin:
        (step,) = admin.get(f"/api/projects/{project.id}/work").json()["failed_steps"]
        assert step["error"] == "the card <b>burnt</b> out"
        assert admin.post(f"/api/projects/{project.id}/rounds/retry").status_code == 200
    stage.work()
    row = stage.last_round(project)
    assert (row.id, row.state, row.error) == (failed.id, "done", None)


def test_suspects_and_the_dataset_of_a_real_project(stage: Any, trained: Any) -> None:
    with admin_of(stage) as admin:
        assert admin.get(f"/api/projects/{trained.id}/suspects").json()["state"] == "waiting"
        stage.work()
        found = admin.get(f"/api/projects/{trained.id}/suspects").json()
        assert (found["state"], found["images"]) == ("ready", stage.last_round(trained).labels + 2)
        answer = admin.get(f"/api/projects/{trained.id}/dataset.zip")
        with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
            assert packed.testzip() is None
            names = packed.namelist()
            held = stage.holdout(trained)
            assert {f"images/holdout/{one}.jpg" for one in held} <= set(names)
            boxes = sum(len(packed.read(name).splitlines()) for name in names if name.startswith("labels/train"))
        assert boxes == stage.last_round(trained).boxes
        weights = admin.get(f"/api/projects/{trained.id}/rounds/1/weights.pt")
        assert weights.headers["x-checksum-sha256"] == stage.last_round(trained).weights_sha256
