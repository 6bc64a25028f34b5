"""Windows of trouble on a real Label Studio: each ends in a state that is defined, and that the page or doctor says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from demo.label_studio_server import LabelStudioServer
from worker import credentials, training
from worker.artifacts import round_key
from worker.doctor import Check, Look, Status, look_at_label_studio, run
from worker.doctor_project import look_at_webhook, project_looks
from worker.services import Services
from worker.settings import Settings
from worker.store import projects as project_rows

pytestmark = pytest.mark.slow
OLDER_PYTHON_VARIABLE = "HARDFIRST_OLDER_LABEL_STUDIO_PYTHON"
SMALL: dict[str, Any] = {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 2}


def config(*labels: str) -> str:
    """A label config; "new=old": label `new`, with `old` as its predicted_values."""
    pairs = [one.partition("=")[::2] for one in labels]
    tags = "".join(f'<Label value="{new}" predicted_values="{old}"/>' for new, old in pairs)
    head = '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    return f"{head}{tags}</RectangleLabels></View>"


def box(label: str, x: float = 20.0) -> dict[str, Any]:
    value = {"x": x, "y": 20, "width": 30, "height": 30, "rotation": 0, "rectanglelabels": [label]}
    size = {"original_width": 96, "original_height": 96, "image_rotation": 0}
    return {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value, **size}


def for_training(stage: Any, project: Any, number: int = 0) -> list[int]:
    holdout = stage.holdout(project)
    return [task_id for task_id in stage.batch(project, number) if task_id not in holdout]


def set_config(project: Any, label_config: str) -> httpx.Response:
    return project.api.patch(f"/api/projects/{project.id}/", json={"label_config": label_config})  # type: ignore[no-any-return]


def page(stage: Any, project: Any) -> str:
    return httpx.get(f"{stage.backend_url}/projects/{project.id}", timeout=60, trust_env=False).text


def notes_shown(stage: Any, project: Any) -> list[str]:
    path = f"{stage.backend_url}/api/projects/{project.id}"
    return list(httpx.get(path, timeout=60, trust_env=False).json()["notes"])


def status(stage: Any, project: Any) -> dict[str, Any]:
    path = f"{stage.backend_url}/api/projects/{project.id}/status"
    return dict(httpx.get(path, timeout=60, trust_env=False).json())


def examined(stage: Any, project: Any, *, fix: bool = False) -> dict[str, Check]:
    own = Services(stage.services.settings, "web")
    found = run(project_looks(own, project.id, quick=True), fix=fix, project_id=project.id)
    checks = {check.name: check for check in found}
    own.store.close()
    return checks


# --- the access token -------------------------------------------------------------------------------------------------


@pytest.fixture
def switch_tokens(stage: Any, label_studio: LabelStudioServer) -> Iterator[Callable[..., None]]:
    """Switches kinds of tokens on or off in the organisation, as its owner does on its page; on again afterwards."""
    browser = httpx.Client(base_url=label_studio.url, timeout=60, trust_env=False, follow_redirects=True)
    browser.get("/user/login/")
    form = {"email": label_studio.username, "password": label_studio.password}
    form |= {"csrfmiddlewaretoken": browser.cookies["csrftoken"]}
    browser.post("/user/login/", data=form, headers={"Referer": label_studio.url})

    def switch(**changed: bool) -> None:
        body = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": True, **changed}
        headers = {"X-CSRFToken": browser.cookies["csrftoken"], "Referer": label_studio.url}
        answer = browser.post("/api/jwt/settings", json=body, headers=headers)
        assert answer.is_success, answer.text

    switch()
    yield switch
    switch()
    browser.close()


@pytest.fixture
def personal(label_studio: LabelStudioServer, switch_tokens: Callable[..., None]) -> Iterator[Callable[[], str]]:
    """Makes the admin a new personal access token, in the place of the one before; the last is revoked afterwards."""
    api = httpx.Client(base_url=label_studio.url, headers={"Authorization": f"Token {label_studio.token}"}, timeout=60)

    def make() -> str:
        for old in api.get("/api/token/").json():
            api.post("/api/token/blacklist/", json={"refresh": old["token"]})
        made = api.post("/api/token/")
        assert made.status_code == 201, made.text
        return str(made.json()["token"])

    yield make
    switch_tokens()
    for old in api.get("/api/token/").json():
        api.post("/api/token/blacklist/", json={"refresh": old["token"]})
    api.close()


def revoke(label_studio: LabelStudioServer, token: str) -> None:
    headers = {"Authorization": f"Token {label_studio.token}"}
    body = {"refresh": token}
    answer = httpx.post(f"{label_studio.url}/api/token/blacklist/", json=body, headers=headers, timeout=60)
    assert answer.status_code == 204, answer.text


def test_a_whole_loop_with_a_personal_access_token_revoked_in_the_middle_and_replaced(
    make_stage: Callable[..., Any],
    serve: Callable[..., str],
    label_studio: LabelStudioServer,
    personal: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from worker.model import ScorerCache

    monkeypatch.setattr(credentials, "RENEW_AT", 0.0)  # every request renews: none may be served by the old one
    stage = make_stage(label_studio_api_key=(first := personal()))
    project = stage.connected(9, labels_per_round=3)
    for task_id in for_training(stage, project)[:3]:
        project.label(task_id)
    stage.work_until("score")
    revoke(label_studio, first)
    stage.work()
    assert stage.round(project, 1).state == "scoring"
    problem = stage.row(project).problem
    assert "does not accept LABEL_STUDIO_API_KEY: the personal access token was revoked. Take a new one" in problem
    shown = status(stage, project)
    assert shown["away"] == [problem]
    assert page(stage, project).count("the personal access token was revoked") == 1  # one clear sentence, once
    assert first not in page(stage, project)
    token = examined(stage, project)
    assert token["project"].status is Status.FAILED  # without the deployment's checks before it
    assert "was revoked" in token["project"].sentence
    settings = stage.services.settings
    again = Settings(_env_file=None, **{**settings.model_dump(), "label_studio_api_key": personal()})
    started = Services(again, "worker")  # hardfirst, started again: nothing of the old process is left
    monkeypatch.setattr("worker.jobs.services", lambda: started)
    monkeypatch.setattr("worker.model.SCORERS", ScorerCache())
    stage.make_due()
    stage.work()
    assert stage.round(project, 1).state == "done"
    assert stage.row(project).problem is None
    assert project.remote()["model_version"] == "al-000001"


def test_an_access_token_that_is_refused_is_renewed_once(stage: Any, personal: Callable[[], str]) -> None:
    settings = stage.services.settings
    client = Services(Settings(_env_file=None, **{**settings.model_dump(), "label_studio_api_key": personal()}), "web")
    api = client.label_studio
    good = api.auth_headers()
    api._header._made = "Bearer " + good["Authorization"].split()[1][:-6] + "AAAAAA"  # it ended, or the key was changed
    assert api.whoami()["email"] == "admin@example.com"
    assert api.auth_headers() != good
    assert api._header._made.startswith("Bearer ")


def test_legacy_tokens_switched_off_and_on_again(stage: Any, switch_tokens: Callable[..., None]) -> None:
    project = stage.connected(8, labels_per_round=2)
    chosen = for_training(stage, project)
    project.label(chosen[0])
    project.label(chosen[1])
    switch_tokens(legacy_api_tokens_enabled=False)
    stage.work()
    assert "it is a legacy token, and those are off there" in stage.row(project).problem
    assert stage.round(project, 1).state == "training"
    switch_tokens()
    stage.make_due()
    stage.work()
    assert stage.round(project, 1).state == "done"
    assert stage.row(project).problem is None


def test_a_token_refused_in_the_middle_of_scoring_is_the_same_sentence(
    stage: Any, switch_tokens: Callable[..., None]
) -> None:
    """Scoring asks Label Studio for images alone, which are refused in another way."""
    project = stage.connected(8, labels_per_round=2)
    chosen = for_training(stage, project)
    project.label(chosen[0])
    project.label(chosen[1])
    stage.work_until("score")
    switch_tokens(legacy_api_tokens_enabled=False)
    stage.work()
    assert "it is a legacy token, and those are off there" in stage.row(project).problem
    assert status(stage, project)["away"] == [stage.row(project).problem]
    assert {row.image_problem for row in stage.task_rows(project).values()} == {None}  # nobody's image is to blame
    switch_tokens()
    stage.make_due()
    stage.work()
    assert stage.round(project, 1).state == "done"


def test_personal_tokens_switched_off_are_named(
    stage: Any, personal: Callable[[], str], switch_tokens: Callable[..., None]
) -> None:
    values = {**stage.services.settings.model_dump(), "label_studio_api_key": personal()}
    api = Services(Settings(_env_file=None, **values), "web").label_studio
    assert api.whoami()["email"] == "admin@example.com"
    switch_tokens(api_tokens_enabled=False)
    with pytest.raises(credentials.CredentialsMissing, match="personal access tokens are off there"):
        api.whoami()


def test_without_a_token_the_one_of_setup_is_tried(make_stage: Callable[..., Any]) -> None:
    stage = make_stage(label_studio_api_key="")
    project = stage.new_project(8)
    project.connect(SMALL)
    stage.await_token()
    stage.work()
    assert stage.round(project, 0).state == "done"
    assert project.remote()["model_version"] == "al-000000"
    assert status(stage, project)["away"] == []
    assert stage.label_studio.token not in page(stage, project)
    kept = stage.services.settings.data_dir / "label-studio-token"
    assert kept.stat().st_mode & 0o077 == 0


def test_without_a_token_and_legacy_tokens_off_the_page_says_what_to_do(
    make_stage: Callable[..., Any], personal: Callable[[], str], switch_tokens: Callable[..., None]
) -> None:
    stage = make_stage(label_studio_api_key="")
    project = stage.new_project(8)
    given = personal()
    project.connect(SMALL, extra=None)
    stage.await_token()
    stage.services.label_studio._setup_token.file.unlink()  # as if nothing had been connected before it was off
    switch_tokens(legacy_api_tokens_enabled=False)
    stage.services.label_studio.offer_setup_token(stage.label_studio.token)
    wait_for(stage.services.label_studio.setup_token_was_refused)
    stage.work()
    assert "set LABEL_STUDIO_API_KEY" in stage.row(project).problem
    again = Settings(_env_file=None, **{**stage.services.settings.model_dump(), "label_studio_api_key": given})
    assert Services(again, "web").label_studio.whoami()["email"] == "admin@example.com"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- Label Studio itself ----------------------------------------------------------------------------------------------


def test_label_studio_is_restarted_in_the_middle_of_a_round(
    make_stage: Callable[..., Any], label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    with LabelStudioServer(tmp_path / "own-label-studio") as server:
        stage = make_stage(label_studio_url=server.url, label_studio_api_key=server.token)
        stage.label_studio = server
        project = stage.connected(9, labels_per_round=3)
        for task_id in for_training(stage, project)[:3]:
            project.label(task_id)
        stage.work_until("publish")
        port = server.port
        server.stop()
        stage.work()
        assert stage.round(project, 1).state == "publishing"
        assert f"Label Studio at {server.url} does not answer" in stage.row(project).problem
        shown = page(stage, project)
        assert shown.count(f"Label Studio at {server.url} does not answer") == 1
        server.port = port
        server.start()
        stage.make_due()
        stage.work()
        assert stage.round(project, 1).state == "done"
        assert stage.row(project).problem is None
        assert project.remote()["model_version"] == "al-000001"
        assert {name: check.sentence for name, check in examined(stage, project).items() if check.status != "ok"} == {}


@pytest.fixture
def older_python() -> str:
    """An interpreter with an older Label Studio: `pip install label-studio==1.22.0` in an environment of its own."""
    found = os.environ.get(OLDER_PYTHON_VARIABLE)
    if not found:
        pytest.skip(f"{OLDER_PYTHON_VARIABLE} is not set, so there is no older Label Studio to upgrade from")
    return found


def test_label_studio_is_upgraded_in_the_middle_of_a_round(
    make_stage: Callable[..., Any], label_studio: LabelStudioServer, tmp_path: Path, older_python: str
) -> None:
    with LabelStudioServer(tmp_path / "own-label-studio", python=older_python) as server:
        stage = make_stage(label_studio_url=server.url, label_studio_api_key=server.token)
        stage.label_studio = server
        assert look_at_label_studio(stage.services).status is Status.WARNING
        project = stage.connected(12, labels_per_round=3)
        for task_id in for_training(stage, project)[:3]:
            project.label(task_id)
        stage.work_until("publish")
        port, server.python = server.port, None
        server.stop()
        stage.work()
        assert stage.round(project, 1).state == "publishing"  # it waits
        server.port = port
        server.start()  # the new one, which migrates what the old one wrote
        assert look_at_label_studio(stage.services).status is Status.OK
        stage.make_due()
        stage.work()
        assert stage.round(project, 1).state == "done"
        assert {name: check.sentence for name, check in examined(stage, project).items() if check.status != "ok"} == {}
        for task_id in for_training(stage, project, 1)[:3]:
            project.label(task_id)
        stage.work()
        assert stage.round(project, 2).state == "done"
        assert project.remote()["model_version"] == "al-000002"


def test_a_copy_of_a_project_confuses_nobody_and_can_be_connected(stage: Any) -> None:
    """Label Studio Community has no Duplicate: people export, and import into a new project, predictions included."""
    project = stage.connected(8, labels_per_round=3)
    project.label(stage.batch(project, 0)[0])
    before = (stage.row(project), stage.rounds(project), stage.task_rows(project))
    exported = project.api.get(
        f"/api/projects/{project.id}/export", params={"exportType": "JSON", "download_all_tasks": "true"}
    ).json()
    copied = [
        {
            "data": one["data"],
            "annotations": [{"result": found["result"]} for found in one["annotations"]],
            "predictions": [{"result": [], "score": 0.0, "model_version": "al-000000"}],
        }
        for one in exported
    ]
    copy = stage.new_project()
    copy.import_tasks(copied)
    copy.label(copy.task_ids()[-1], [box("bolt")])
    stage.reconcile()
    assert (stage.row(project).published_version, stage.rounds(project)) == (before[0].published_version, before[1])
    assert stage.task_rows(project) == before[2]
    assert copy.webhooks() == []
    assert httpx.get(f"{stage.backend_url}/api/projects/{copy.id}", timeout=60, trust_env=False).status_code == 404

    copy.connect(SMALL)
    stage.work()
    assert stage.round(copy, 0).state == "done"
    theirs = copy.predictions()
    unlabelled = [task["id"] for task in copy.tasks() if not task["total_annotations"]]
    assert {len(theirs[task_id]) for task_id in unlabelled} == {1}  # what was imported as ours is replaced
    assert examined(stage, copy)["order"].status is Status.OK
    assert examined(stage, project)["order"].status is Status.OK


@pytest.mark.parametrize("way", ["edited", "connected again"])
def test_a_backend_at_a_new_address_has_one_webhook_again(
    stage: Any, serve: Callable[..., str], way: str
) -> None:
    project = stage.connected(8, labels_per_round=2)
    (old,) = project.webhooks()
    stage.backend_url = project.backend_url = new = serve(stage.services.settings)
    if way == "edited":  # Label Studio leaves its webhook at the old address
        project.change_settings({**SMALL, "labels_per_round": 2})
    else:  # it makes another, with all actions, and leaves the old one too
        assert project.api.delete(f"/api/ml/{project.ml_id}").status_code == 204
        project.connect({**SMALL, "labels_per_round": 2})
    found = examined(stage, project)["webhook"]
    assert found.status is Status.FAILED
    assert f"still goes to {old['url']}, where this backend was before" in found.sentence
    stage.work()  # /setup from the new address has asked for a comparison
    (hook,) = project.webhooks()
    assert hook["url"] == f"{new}/webhook"
    assert set(hook["actions"]) == set(old["actions"])
    assert examined(stage, project)["webhook"].status is Status.OK
    assert stage.row(project).webhook_id == hook["id"]
    assert [one.detail for one in stage.events(project, "settings") if "address" in one.detail]
    assert f"address: {old['url'].removesuffix('/webhook')} -&gt; {new}" in page(stage, project)
    for task_id in for_training(stage, project)[:2]:
        project.label(task_id)
    assert len(stage.events(project, "ANNOTATION_CREATED")) == 2
    assert [row.number for row in stage.rounds(project)] == [0, 1]


def test_doctor_brings_the_webhook_to_the_new_address(stage: Any) -> None:
    project = stage.connected(8)
    (old,) = project.webhooks()
    with stage.services.store.write() as connection:
        connection.execute(update(project_rows).values(backend_url="http://127.0.0.1:9/moved"))
    own = stage.services
    look = Look("webhook", lambda: look_at_webhook(own, project.id, "webhook"))  # alone: to be listed calls /setup
    (found,) = run([look], fix=False)
    assert "still goes to" in found.sentence
    (mended,) = run([look], fix=True)
    assert mended.mended
    (hook,) = project.webhooks()
    assert (hook["id"], hook["url"]) == (old["id"], "http://127.0.0.1:9/moved/webhook")


# --- labels that change -----------------------------------------------------------------------------------------------


def labelled_project(stage: Any, *labels: str, images: int = 12, **settings: Any) -> Any:
    """A project with these labels whose first batch is published, not labelled yet."""
    project = stage.new_project(images, config(*labels))
    project.connect({**SMALL, "labels_per_round": 4, **settings})
    stage.work()
    assert stage.round(project, 0).state == "done"
    return project


def round_of(stage: Any, project: Any, number: int, *labels: str) -> Any:
    """Labels of the batch: `labels` in turns; then the round they open is done."""
    for position, task_id in enumerate(stage.batch(project, number - 1)):
        project.label(task_id, [box(labels[position % len(labels)])])
    stage.work()
    row = stage.round(project, number)
    assert row.state == "done", row.error
    return row


@pytest.mark.parametrize(
    ("labels", "boxes", "told"),
    [
        (("screw=nut", "bolt"), {"screw": 2, "bolt": 2}, ""),
        (("screw", "bolt"), {"screw": 0, "bolt": 2}, "2 boxes on 2 images bear labels that the label config does not"),
    ],
    ids=["named", "unnamed"],
)
def test_a_label_that_is_used_is_renamed(stage: Any, labels: Any, boxes: dict[str, int], told: str) -> None:
    """Label Studio 1.23.2 lets it go, and keeps the old name in the annotations."""
    project = labelled_project(stage, "nut", "bolt", labels_per_round=100)
    for position, task_id in enumerate(for_training(stage, project)):
        project.label(task_id, [box(("nut", "bolt")[position % 2])])
    assert set_config(project, config(*labels)).is_success
    httpx.post(f"{stage.backend_url}/api/projects/{project.id}/rounds", timeout=60, trust_env=False)
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    report = eval_json(row.report)
    assert report["boxes_per_class"] == boxes
    assert report["background"] == 0  # what bears an unknown label is on the image all the same
    assert len(report["left_out"]) == (2 if told else 0)
    notes = " ".join(report["notes"])
    assert (told in notes) if told else ("label config" not in notes)
    if told:
        assert any("predicted_values" in note for note in notes_shown(stage, project)), notes_shown(stage, project)


def test_labels_added_removed_renamed_and_reordered_between_rounds(stage: Any) -> None:
    project = labelled_project(stage, "nut", "bolt", "wire", images=16, warm_start=True, confidence=0.001)
    first = round_of(stage, project, 1, "nut", "bolt")
    assert list(eval_json(first.per_class)) == ["nut", "bolt"]
    assert set_config(project, config("clip", "bolt", "nut")).is_success  # wire renamed to clip, and another order
    stage.reconcile()
    (told,) = stage.events(project, "label config changed")
    assert told.detail == "added: clip; removed: wire"
    assert "label config changed" in page(stage, project).lower()
    unknown = examined(stage, project)["labels"]
    assert (unknown.status, "'clip'" in unknown.sentence) == (Status.WARNING, True)
    second = round_of(stage, project, 2, "clip", "nut")
    report = eval_json(second.report)
    assert report["names"] == {"0": "clip", "1": "bolt", "2": "nut"}
    assert report["boxes_per_class"] == {"clip": 2, "bolt": 2, "nut": 4}  # the old boxes kept their labels
    assert "Started from round 1's weights." in report["notes"]
    for number in (1, 2):  # the curve per class: every round by today's labels
        assert set(eval_json(stage.round(project, number).per_class)) <= {"clip", "bolt", "nut"}
    shown = {region["value"]["rectanglelabels"][0] for found in project.predictions().values() for one in found
             for region in one["result"]}  # fmt: skip
    assert shown <= {"clip", "bolt", "nut"}
    assert examined(stage, project)["labels"].status is Status.OK
    httpx.get(f"{stage.backend_url}/projects/{project.id}", timeout=60, trust_env=False).raise_for_status()


def eval_json(text: str) -> dict[str, Any]:
    import json

    return dict(json.loads(text))


def test_a_label_that_goes_while_a_round_runs_is_not_drawn_and_the_round_ends(stage: Any) -> None:
    project = labelled_project(stage, "nut", "bolt", "wire", images=14, confidence=0.001)
    for position, task_id in enumerate(stage.batch(project, 0)):
        project.label(task_id, [box(("nut", "bolt")[position % 2])])
    stage.work_until("publish")
    regions = [row.regions for row in stage.scores_of(stage.round(project, 1)).values() if row.regions]
    assert any('"wire"' in one for one in regions)
    assert set_config(project, config("nut", "bolt")).is_success
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    unlabelled = [task["id"] for task in project.tasks() if not task["total_annotations"]]
    served = project.predictions()
    assert {len(served[task_id]) for task_id in unlabelled} == {1}
    shown = [region for task_id in unlabelled for region in served[task_id][0]["result"]]
    labels = [region["value"]["rectanglelabels"][0] for region in shown]
    assert labels
    assert "wire" not in labels


def test_a_label_that_went_is_in_no_answer_and_keeps_no_other_answer_away(stage: Any) -> None:
    """Predictions deleted in the Data Manager and retrieved again: one bad region, and Label Studio takes none."""
    project = labelled_project(stage, "nut", "bolt", "wire", images=14, confidence=0.001)
    round_of(stage, project, 1, "nut", "bolt", "wire")
    unlabelled = [task["id"] for task in project.tasks() if not task["total_annotations"]]
    assert "wire" in labels_shown(project, unlabelled)
    assert set_config(project, config("nut", "bolt")).is_success
    params = {"id": "delete_tasks_predictions", "project": project.id}
    everything = {"selectedItems": {"all": True, "excluded": []}}
    assert project.api.post("/api/dm/actions", params=params, json=everything).is_success
    assert labels_shown(project, unlabelled) == []
    project.retrieve(unlabelled)
    served = project.predictions()
    assert {len(served[task_id]) for task_id in unlabelled} == {1}
    shown = labels_shown(project, unlabelled)
    assert shown
    assert "wire" not in shown


def labels_shown(project: Any, task_ids: list[int]) -> list[str]:
    """Of every region that Label Studio would show on these tasks."""
    served = project.predictions()
    regions = [region for task_id in task_ids for one in served[task_id] for region in one["result"]]
    return [region["value"]["rectanglelabels"][0] for region in regions]


def test_a_label_added_a_moment_before_the_round_is_learned(stage: Any) -> None:
    """No comparison ran in between: the round asks for the label config itself."""
    project = labelled_project(stage, "nut", "bolt")
    assert set_config(project, config("nut", "bolt", "washer")).is_success
    row = round_of(stage, project, 1, "nut", "washer")
    assert eval_json(row.report)["boxes_per_class"]["washer"] == 2


def test_a_label_config_that_is_none_of_ours_any_more_fails_the_round_and_says_why(stage: Any) -> None:
    project = labelled_project(stage, "nut", "bolt")
    choices = '<Choices name="c" toName="image"><Choice value="a"/></Choices>'
    choices = f'<View><Image name="image" value="$image"/>{choices}</View>'
    assert set_config(project, choices).is_success
    httpx.post(f"{stage.backend_url}/api/projects/{project.id}/rounds", timeout=60, trust_env=False)
    stage.work()
    assert stage.last_round(project).state == "failed"
    assert "RectangleLabels" in stage.row(project).problem
    assert "RectangleLabels" in page(stage, project).replace("&lt;", "<")
    assert set_config(project, config("nut", "bolt")).is_success
    for task_id in for_training(stage, project):
        project.label(task_id, [box("nut")])
    stage.work()
    httpx.post(f"{stage.backend_url}/api/projects/{project.id}/rounds/retry", timeout=60, trust_env=False)
    stage.work()
    assert stage.last_round(project).state == "done"


# --- tasks that go ----------------------------------------------------------------------------------------------------


def test_tasks_deleted_while_they_are_scored(stage: Any) -> None:
    project = stage.connected(10, labels_per_round=3)
    for task_id in for_training(stage, project)[:3]:
        project.label(task_id)
    stage.work_until("score")
    doomed = [task_id for task_id in project.task_ids() if task_id not in stage.batch(project, 0)][:2]
    for task_id in doomed:
        assert project.api.delete(f"/api/tasks/{task_id}/").status_code == 204
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    assert not set(doomed) & set(stage.batch(project, 1))
    shown = httpx.get(f"{stage.backend_url}/api/projects/{project.id}", timeout=60, trust_env=False).json()
    assert shown["problems"] == []  # nobody is told of images that are gone


def test_the_holdout_shrinks_and_then_is_gone(stage: Any) -> None:
    project = stage.connected(12, labels_per_round=2, holdout_size=3)
    holdout = sorted(stage.holdout(project))
    for task_id in [*holdout, *for_training(stage, project)[:2]]:
        project.label(task_id)
    stage.work()
    assert stage.round(project, 1).holdout_labels == 3
    assert project.api.delete(f"/api/tasks/{holdout[0]}/").status_code == 204
    for task_id in for_training(stage, project)[2:4]:
        project.label(task_id)
    stage.work()
    first, second = stage.round(project, 1), stage.round(project, 2)
    assert second.state == "done"
    assert (first.holdout_labels, second.holdout_labels) == (2, 2)  # both on what is left: they can be compared
    for task_id in holdout[1:]:
        assert project.api.delete(f"/api/tasks/{task_id}/").status_code == 204
    for task_id in for_training(stage, project, 2)[:2]:
        project.label(task_id)
    stage.work()
    third = stage.round(project, 3)
    assert third.state == "done", third.error
    assert third.map50 is None
    assert eval_json(third.verdict)["verdict"] == "insufficient_evidence"
    assert stage.round(project, 2).map50 == second.map50  # what was measured stands
    assert "nothing can be measured. Ask for 1 image, drawn at random with the next batch." in page(stage, project)
    assert stage.services.artifacts.get(round_key(project.id, 3, "weights.pt"))


def test_everything_is_deleted_while_a_round_runs(stage: Any) -> None:
    # without a holdout: what was trained in two seconds may take any new image for a twin of one
    project = stage.connected(8, labels_per_round=2, holdout_size=0)
    for task_id in for_training(stage, project)[:2]:
        project.label(task_id)
    stage.work_until("publish")
    for task_id in project.task_ids():
        assert project.api.delete(f"/api/tasks/{task_id}/").status_code == 204
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row
    assert status(stage, project)["now"]["kind"] == "idle"
    assert examined(stage, project)["project"].sentence.endswith("has no tasks")
    new = project.add_images(range(20, 26))  # and people go on
    stage.reconcile()
    stage.work()
    assert {len(project.predictions()[task_id]) for task_id in new} == {1}
    assert project.remote()["model_version"] == "al-000001"
    for task_id in new[:2]:
        project.label(task_id)
    stage.work()
    assert stage.round(project, 2).state == "done", stage.round(project, 2).error
    assert set(stage.batch(project, 2)) == set(new[2:])


def test_labelled_tasks_are_deleted_while_the_detector_trains(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project = stage.connected(12, labels_per_round=3, holdout_size=3)
    holdout, chosen = sorted(stage.holdout(project)), for_training(stage, project)
    for task_id in [*holdout, *chosen[:3]]:
        project.label(task_id)
    real, doomed = training.train, [holdout[0], chosen[0], chosen[3]]

    def train_meanwhile(*args: Any, **kwargs: Any) -> Any:
        for task_id in doomed:
            assert project.api.delete(f"/api/tasks/{task_id}/").status_code == 204
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "train", train_meanwhile)
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    assert row.labels == 3  # what it was trained on, whatever happened since
    assert not set(doomed) & set(stage.batch(project, 1))
    assert {task_id for task_id, task in stage.task_rows(project).items() if task.deleted} == set(doomed)
    assert stage.annotation_count(project) == 4
    assert examined(stage, project)["order"].status is Status.OK
    assert httpx.get(f"{stage.backend_url}/projects/{project.id}", timeout=60, trust_env=False).status_code == 200
    stage.make_due()
    stage.reconcile()
    stage.work()
    assert stage.round(project, 1).holdout_labels == 2  # measured again on what is left


@pytest.mark.parametrize("step", ["train", "score", "publish"])
def test_the_project_is_deleted_while_a_round_runs(stage: Any, step: str) -> None:
    project, other = stage.connected(8, labels_per_round=2), stage.connected(8, labels_per_round=2)
    for task_id in for_training(stage, project)[:2]:
        project.label(task_id)
    stage.work_until(step)
    assert project.api.delete(f"/api/projects/{project.id}/").status_code == 204
    stage.work()
    assert stage.round(project, 1).state == "failed"
    said = f"Label Studio no longer has project {project.id}"
    assert said in stage.round(project, 1).error
    stage.reconcile()
    assert said in stage.row(project).problem
    assert said in page(stage, project)
    assert said in examined(stage, project)["project"].sentence
    for task_id in for_training(stage, other)[:2]:  # nobody else is kept from their work
        other.label(task_id)
    stage.work()
    assert stage.round(other, 1).state == "done"
