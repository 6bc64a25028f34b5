"""`hardfirst doctor` on a real Label Studio: one thing broken at a time, seen, and mended where that is safe."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from backend import cli
from worker.doctor import Check, Status, deployment_looks, run
from worker.doctor_project import project_looks
from worker.label_studio import LabelStudio
from worker.services import Services
from worker.store import tasks

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 2}
OUR_HEADER = {"Authorization": "Basic " + base64.b64encode(b"label:studio").decode()}


def examined(stage: Any, project: Any, *, fix: bool = False) -> dict[str, Check]:
    """What is found of the project, by name."""
    own = Services(stage.services.settings, "web")
    found = run(project_looks(own, project.id, quick=False), fix=fix, project_id=project.id)
    checks = {check.name: check for check in found}
    own.store.close()
    return checks


def bad(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.sentence for name, check in checks.items() if check.status is not Status.OK}


def token_check(stage: Any, token: str) -> Check:
    settings = stage.services.settings.model_copy(update={"label_studio_api_key": _Secret(token)})
    looks = deployment_looks(Services(settings, "web"), quick=True)
    return {check.name: check for check in run(looks[:2], fix=False)}["token"]


class _Secret(str):
    def get_secret_value(self) -> str:
        return str(self)


def patch(project: Any, path: str, body: dict[str, Any]) -> None:
    answer = project.api.patch(path, json=body)
    assert answer.is_success, answer.text


@pytest.fixture
def guarded(make_stage: Callable[..., Any]) -> tuple[Any, Any]:
    """A backend with a password, and a project whose first batch is published."""
    stage = make_stage(user="label", password="studio")
    project = stage.new_project(10)
    project.connect(SMALL, auth_method="BASIC_AUTH", basic_auth_user="label", basic_auth_pass="studio")
    stage.work()
    assert stage.round(project, 0).state == "done", stage.round(project, 0).error
    return stage, project


def test_each_thing_broken_is_seen_and_mended(guarded: tuple[Any, Any]) -> None:
    stage, project = guarded
    sound = examined(stage, project)
    assert bad(sound) == {}
    assert sound["project"].sentence == "'integration', 10 tasks"
    assert sound["images"].sentence == "3 fetched and decoded (96 x 96, 96 x 96, 96 x 96)"
    assert sound["model version"].sentence == "al-000000, 10 predictions"
    assert sound["order"].sentence == "the next 6 tasks of Label Studio are the batch's, in its order"
    assert sound["round"].sentence == "none is open; the last was round 0 (done)"

    (hook,) = project.webhooks()
    hook_path, project_path = f"/api/webhooks/{hook['id']}/", f"/api/projects/{project.id}/"
    patch(project, hook_path, {"headers": {}})
    _seen_and_mended(stage, project, "webhook", "lacks the password")
    patch(project, hook_path, {"is_active": False})
    _seen_and_mended(stage, project, "webhook", "switched off")
    patch(project, hook_path, {"actions": ["TASKS_CREATED"]})
    _seen_and_mended(stage, project, "webhook", "does not send ANNOTATIONS_CREATED")
    twin = {"project": project.id, "url": hook["url"], "actions": ["TASKS_CREATED"], "send_for_all_actions": False}
    assert project.api.post("/api/webhooks/", json=twin).status_code == 201
    _seen_and_mended(stage, project, "webhook", "there are 2 webhooks to us, not one")
    assert project.api.delete(f"/api/webhooks/{project.webhooks()[0]['id']}/").status_code == 204
    _seen_and_mended(stage, project, "webhook", "there is no webhook to us")
    (mended,) = project.webhooks()
    assert (mended["headers"], mended["is_active"], mended["url"]) == (OUR_HEADER, True, hook["url"])

    patch(project, project_path, {"sampling": "Sequential sampling"})
    _seen_and_mended(stage, project, "sampling", "'Sequential sampling'")
    other = {"task": project.task_ids()[0], "result": [], "score": 0.9, "model_version": "mine"}
    assert project.api.post(f"{project_path}import/predictions", json=[other]).status_code == 201
    patch(project, project_path, {"model_version": "mine"})
    _seen_and_mended(stage, project, "model version", "serves 'mine'; al-000000 is published", also={"order"})
    patch(project, project_path, {"show_collab_predictions": False})
    assert "hides pre-annotations" in bad(examined(stage, project))["pre-annotations"]
    assert bad(examined(stage, project, fix=True)) == {}
    assert bad(examined(stage, project)) == {}
    remote = project.remote()
    assert (remote["sampling"], remote["model_version"]) == ("Uncertainty sampling", "al-000000")
    assert remote["show_collab_predictions"] is True


def _seen_and_mended(stage: Any, project: Any, name: str, words: str, also: Set[str] = frozenset()) -> None:
    """Looked at it is named, it alone, and stays; with fix it is mended, and nothing else was wrong."""
    found = bad(examined(stage, project))
    assert words in found[name]
    assert set(found) == {name, *also}
    mended = examined(stage, project, fix=True)
    assert mended[name].mended, mended[name]
    assert bad(mended) == {}


def test_what_only_people_can_mend_is_named(
    guarded: tuple[Any, Any], serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage, project = guarded
    batch = stage.batch(project, 0)
    outside = next(task_id for task_id in project.task_ids() if task_id not in batch)
    foreign = {"task": outside, "result": [], "score": 0.01, "model_version": "al-000000"}
    assert project.api.post(f"/api/projects/{project.id}/import/predictions", json=[foreign]).status_code == 201
    order = examined(stage, project, fix=True)["order"]
    assert order.status is Status.FAILED
    assert f"would serve tasks {batch[0]}, {outside}, {batch[1]}" in order.sentence
    project.label(batch[0])  # what is labelled is served no more
    assert f"would serve tasks {outside}, {batch[1]}" in examined(stage, project)["order"].sentence
    (served,) = [one["id"] for one in project.predictions()[outside] if one["score"] == 0.01]
    assert project.api.delete(f"/api/predictions/{served}/").status_code == 204
    assert examined(stage, project)["order"].status is Status.OK

    last = max(project.task_ids())
    with stage.services.store.write() as connection:
        gone = update(tasks).where(tasks.c.project_id == project.id, tasks.c.task_id == last)
        connection.execute(gone.values(image="/data/upload/1/gone.jpg"))
    images = examined(stage, project)["images"]
    assert images.status is Status.FAILED
    assert f"1 of 3 cannot be read; task {last}: Label Studio" in images.sentence

    runner = CliRunner()
    monkeypatch.chdir(tmp_path)
    for name, value in _environment(stage).items():
        monkeypatch.setenv(name, value)
    answer = runner.invoke(cli.app, ["doctor", "--quick", "--json", "--project", str(project.id)])
    told = json.loads(answer.stdout)
    assert (answer.exit_code, told["ok"]) == (1, False)
    by_name = {check["name"]: check for check in told["checks"]}
    assert by_name["images"]["project_id"] == project.id
    assert by_name["token"]["sentence"].startswith("legacy token of admin@example.com")
    assert by_name["workers: train"]["status"] == "failed"
    assert OUR_HEADER["Authorization"].split()[1] not in answer.output
    assert stage.label_studio.token not in answer.output

    serve.stop()
    entry = examined(stage, project)["backend entry"]
    assert entry.status is Status.FAILED
    assert "does not get an answer" in entry.sentence
    assert project.api.delete(f"/api/ml/{project.ml_id}").status_code == 204
    assert "no model with the address" in examined(stage, project)["backend entry"].sentence
    assert project.api.delete(f"/api/projects/{project.id}/").status_code == 204
    after = examined(stage, project)
    assert after["project"].status is Status.FAILED
    assert {after[name].status for name in ("webhook", "sampling", "order", "images")} == {Status.SKIPPED}


def _environment(stage: Any) -> dict[str, str]:
    settings = stage.services.settings
    return {
        "LABEL_STUDIO_URL": settings.label_studio_url,
        "LABEL_STUDIO_API_KEY": settings.api_key,
        "REDIS_URL": settings.redis_url,
        "HARDFIRST_DATA_DIR": str(settings.data_dir),
        "HARDFIRST_USER": "label",
        "HARDFIRST_PASSWORD": "studio",
    }


def test_whose_token_it_is_of_which_kind_and_that_it_is_wrong(stage: Any, second_token: str) -> None:
    assert token_check(stage, stage.label_studio.token).sentence == "legacy token of admin@example.com"
    assert token_check(stage, second_token).sentence.startswith("legacy token of second-")
    wrong = token_check(stage, "not-the-token-at-all")
    assert wrong.status is Status.FAILED
    assert "does not accept LABEL_STUDIO_API_KEY: the legacy token was reset" in wrong.sentence


def test_personal_access_tokens_and_legacy_ones_that_are_off(stage: Any, second_token: str) -> None:
    on = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": True}
    assert stage.api.post("/api/jwt/settings", json=on).is_success
    # a user has one such token, and the admin's is another test's
    as_second = {"Authorization": f"Token {second_token}"}
    post = partial(httpx.post, timeout=60, trust_env=False)
    personal = post(f"{stage.label_studio.url}/api/token/", headers=as_second).json()["token"]
    found = token_check(stage, personal)
    assert found.status is Status.OK
    assert re.fullmatch(r"personal access token of second-\S+", found.sentence)  # 200 years: no end is told
    broken = token_check(stage, personal[:-6] + "AAAAAA")
    assert broken.status is Status.FAILED
    assert "the personal access token is damaged" in broken.sentence

    bearer = LabelStudio(stage.label_studio.url, personal).auth_headers()
    switch = partial(post, f"{stage.label_studio.url}/api/jwt/settings", headers=bearer)
    assert switch(json=on | {"legacy_api_tokens_enabled": False}).is_success
    try:
        off = token_check(stage, stage.label_studio.token)
        assert off.status is Status.FAILED
        assert "it is a legacy token, and those are off there" in off.sentence
        assert token_check(stage, personal).status is Status.OK
    finally:
        assert switch(json=on).is_success
