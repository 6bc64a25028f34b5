"""Label configs that are not one <RectangleLabels>, on the real Label Studio: learned from, or refused in words."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from label_studio_sdk.label_interface.interface import LabelInterface

from demo import factory
from worker.boxes import LabelMap
from worker.dataset import truth_of
from worker.shapes import drawn_box

pytestmark = pytest.mark.slow

IMAGE = '<Image name="image" value="$image"/>'
LABELS = "".join(f'<Label value="{name}"/>' for name in factory.CLASSES)
POLYGONS = f'<View>{IMAGE}<PolygonLabels name="outline" toName="image">{LABELS}</PolygonLabels></View>'
ELLIPSES = POLYGONS.replace("PolygonLabels", "EllipseLabels")
BRUSHES = POLYGONS.replace("PolygonLabels", "BrushLabels")
CHANGES = {"labels_per_round": 3, "confidence": 0.001}


def sides_of(region: dict[str, Any]) -> tuple[float, ...]:
    return tuple(region["value"][side] for side in ("x", "y", "width", "height"))


def as_yolo(x: float, y: float, width: float, height: float) -> list[float]:
    return [(x + width / 2) / 100, (y + height / 2) / 100, width / 100, height / 100]


def as_diamond(region: dict[str, Any]) -> dict[str, Any]:
    """A polygon that touches the four sides of the rectangle: its bounding box is the rectangle."""
    x, y, width, height = sides_of(region)
    points = [[x + width / 2, y], [x + width, y + height / 2], [x + width / 2, y + height], [x, y + height / 2]]
    value = {"points": points, "closed": True, "polygonlabels": region["value"]["rectanglelabels"]}
    return {**region, "from_name": "outline", "type": "polygonlabels", "value": value}


def as_ellipse(region: dict[str, Any]) -> dict[str, Any]:
    x, y, width, height = sides_of(region)
    value = {"x": x + width / 2, "y": y + height / 2, "radiusX": width / 2, "radiusY": height / 2, "rotation": 0}
    labels = {"ellipselabels": region["value"]["rectanglelabels"]}
    return {**region, "from_name": "outline", "type": "ellipselabels", "value": {**value, **labels}}


def connected(stage: Any, config: str, n_images: int = 8, **settings: Any) -> Any:
    return connect(stage, stage.new_project(n_images, config), **settings)


def connect(stage: Any, project: Any, **settings: Any) -> Any:
    small = {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 4, "holdout_size": 2}
    project.connect({**small, **settings})
    finish(stage, project, 0)
    return project


def finish(stage: Any, project: Any, number: int) -> None:
    """Until the round is done: on a busy machine Label Studio may be too slow to answer at once, and the step waits."""
    deadline = time.monotonic() + 240
    stage.work()
    while (state := stage.round(project, number).state) not in ("done", "failed") and time.monotonic() < deadline:
        stage.make_due()
        stage.work()
    assert state == "done", stage.round(project, number).error


def for_training(stage: Any, project: Any) -> list[int]:
    holdout = stage.holdout(project)
    return [task_id for task_id in stage.batch(project, 0) if task_id not in holdout]


def report_of(stage: Any, project: Any, number: int = 1) -> dict[str, Any]:
    return dict(json.loads(stage.round(project, number).report))


@pytest.mark.parametrize(
    ("config", "shaped", "kind"), [(POLYGONS, as_diamond, "polygon"), (ELLIPSES, as_ellipse, "ellipse")]
)
def test_a_project_of_another_shape_trains_on_hulls_and_gets_its_shape_back(
    stage: Any, config: str, shaped: Any, kind: str
) -> None:
    project = connected(stage, config, shapes="hull", **CHANGES)
    drawn = {task_id: project.true_regions(task_id) for task_id in for_training(stage, project)[:3]}
    for task_id, regions in drawn.items():
        project.label(task_id, [shaped(region) for region in regions])
    finish(stage, project, 1)
    report = report_of(stage, project)
    counts = dict.fromkeys(factory.CLASSES, 0)
    for region in [region for regions in drawn.values() for region in regions]:
        counts[region["value"]["rectanglelabels"][0]] += 1
    assert report["boxes_per_class"] == counts
    hull_map = LabelMap.from_config(config, "hull")
    for task in stage.services.label_studio.export(project.id):
        truth = truth_of(task, hull_map)
        wanted = [as_yolo(*sides_of(region)) for region in drawn[task["id"]]]
        assert truth.boxes_yolo.tolist() == [pytest.approx(box) for box in wanted]
    assert_predictions_fit(project, config, "outline", f"{kind}labels")


def assert_predictions_fit(project: Any, config: str, from_name: str, kind: str) -> None:
    """Label Studio kept a prediction of the second version for every unlabelled task, and its regions are `kind`."""
    assert project.remote()["model_version"] == "al-000001"
    interface = LabelInterface(config)
    seen = 0
    for task in project.tasks():
        if task["total_annotations"]:
            continue
        (prediction,) = task["predictions"]
        for region in prediction["result"]:
            assert (region["from_name"], region["type"]) == (from_name, kind)
            label, (x, y, width, height) = drawn_box(region)
            assert label in factory.CLASSES
            assert min(x, y, width, height) >= 0
            assert max(x + width, y + height) <= 100 + 1e-9
            seen += 1
        assert interface.validate_prediction({"result": prediction["result"]}, return_errors=True) == []
    assert seen  # at a confidence of .001 something is always seen


TWO = (
    f'<View><Image name="other" value="$other"/>{IMAGE}'
    '<RectangleLabels name="metal" toName="image"><Label value="{0}" alias="b0"/><Label value="{1}"/></RectangleLabels>'
    '<RectangleLabels name="rest" toName="image" model_score_threshold="0.9">{2}</RectangleLabels>'
    '<PolygonLabels name="zone" toName="image,other"><Label value="zone"/></PolygonLabels>'
    '<Choices name="quality" toName="image"><Choice value="good"/></Choices></View>'
)


def test_several_controls_an_alias_and_what_else_is_drawn(stage: Any) -> None:
    first, second, *others = factory.CLASSES
    config = TWO.format(first, second, "".join(f'<Label value="{name}"/>' for name in others))
    stored = {first: "b0"}
    # files cannot be uploaded into a project with two data keys: they are another's
    uploads = [task["data"]["image"] for task in stage.new_project(12).tasks()]
    project = stage.new_project(0, config)
    project.import_tasks([{"data": {"image": image, "other": uploads[0]}} for image in uploads])
    connect(stage, project, batch_size=6, labels_per_round=5, confidence=0.001)

    def as_stored(region: dict[str, Any]) -> dict[str, Any]:
        (name,) = region["value"]["rectanglelabels"]
        value = {**region["value"], "rectanglelabels": [stored.get(name, name)]}
        return {**region, "from_name": "rest" if name in others else "metal", "value": value}

    tasks = for_training(stage, project)[:5]
    points = {"points": [[1, 1], [9, 1], [9, 9]], "closed": True, "polygonlabels": ["zone"]}
    zone = {"type": "polygonlabels", "from_name": "zone", "to_name": "image", "value": points}
    elsewhere = {**zone, "to_name": "other"}
    choice = {"type": "choices", "from_name": "quality", "to_name": "image", "value": {"choices": ["good"]}}
    counts = dict.fromkeys(("b0", second, *others), 0)
    for task_id in tasks[:3]:
        regions = [as_stored(region) for region in project.true_regions(task_id)]
        for region in regions:
            counts[region["value"]["rectanglelabels"][0]] += 1
        project.label(task_id, [*regions, zone, choice])
    project.label(tasks[3], [zone])  # something is drawn and no box: nobody knows whether the image is empty
    project.label(tasks[4], [choice, elsewhere])  # nothing is drawn on our image: it is empty
    finish(stage, project, 1)
    report = report_of(stage, project)
    assert report["boxes_per_class"] == counts
    assert list(report["names"].values()) == ["b0", second, *others]
    assert report["left_out"] == {
        str(tasks[3]): "something is drawn on the image that is no box here: another control (1). "
        "It is not taken for background."
    }
    assert stage.round(project, 1).labels == 4
    interface = LabelInterface(config)
    found = [prediction for task in project.predictions().values() for prediction in task]
    assert {prediction["model_version"] for prediction in found} == {"al-000001"}
    regions = [region for prediction in found for region in prediction["result"]]
    assert {region["from_name"] for region in regions} <= {"metal"}  # the other control draws from .9 on
    assert {region["value"]["rectanglelabels"][0] for region in regions} <= {"b0", second}
    assert all(not interface.validate_prediction({"result": one["result"]}, return_errors=True) for one in found)


def connect_answer(stage: Any, config: str, **extra_params: Any) -> tuple[Any, httpx.Response]:
    project = stage.new_project(3, config)
    body = {"url": stage.backend_url, "project": project.id, "title": "hardfirst", "extra_params": extra_params}
    return project, project.api.post("/api/ml", json=body)


def page_of(stage: Any, project: Any) -> str:
    return httpx.get(f"{stage.backend_url}/projects/{project.id}", trust_env=False, timeout=60).text


@pytest.mark.parametrize(
    ("config", "says"),
    [(BRUSHES, "What is drawn with <BrushLabels> has no box"), (POLYGONS, '"shapes": "hull"')],
)
def test_a_config_without_boxes_is_refused_where_people_look(
    stage: Any, config: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    project, answer = connect_answer(stage, config)
    assert answer.status_code == 400
    assert "422 Client Error" in answer.text  # Label Studio quotes no more of our answer, and sends people to our log
    assert project.api.get("/api/ml", params={"project": project.id}).json() == []
    assert says in caplog.text
    assert says.replace('"', "&#34;").replace("<", "&lt;").replace(">", "&gt;") in page_of(stage, project)
    stage.work()
    assert stage.rounds(project) == []


def test_polygons_refused_at_first_are_learned_from_once_the_setting_is_there(stage: Any) -> None:
    project, refused = connect_answer(stage, POLYGONS)
    assert refused.status_code == 400
    connect(stage, project, batch_size=2, holdout_size=1, shapes="hull")
    assert stage.row(project).problem is None
    assert [event.kind for event in stage.events(project)][:1] == ["refused"]  # the log remembers


def test_two_projects_of_different_configs_are_asked_at_once(stage: Any) -> None:
    """Neither labels, nor names, nor versions of one are in the answers of the other."""
    rectangles = f'<View>{IMAGE}<RectangleLabels name="boxes" toName="image">{LABELS}</RectangleLabels></View>'
    projects = [connected(stage, POLYGONS, shapes="hull", **CHANGES), connected(stage, rectangles, **CHANGES)]
    stage.services.redis.flushall()
    for number, project in enumerate(projects):
        for task_id in for_training(stage, project)[:3]:
            value = {"points": [[10, 10], [60, 10], [60, 60]], "polygonlabels": [factory.CLASSES[0]]}
            polygon = {"from_name": "outline", "to_name": "image", "type": "polygonlabels", "value": value}
            box = {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": [factory.CLASSES[1]]}
            rectangle = {"from_name": "boxes", "to_name": "image", "type": "rectanglelabels", "value": box}
            project.label(task_id, [rectangle if number else polygon])
        finish(stage, project, 1)
    stage.webhook({"action": "START_TRAINING", "project": {"id": projects[1].id}})  # one is a version ahead
    finish(stage, projects[1], 2)
    assert [stage.row(project).published_version for project in projects] == ["al-000001", "al-000002"]
    asked = []
    for project in projects:
        new = project.add_images(range(20, 24))
        stage.services.redis.flushall()
        asked.append([task for task in project.tasks() if task["id"] in new])
    answers = stage.ask(*zip(projects, asked, strict=True))
    for found, version, kind, name in zip(
        answers, ("al-000001", "al-000002"), ("polygonlabels", "rectanglelabels"), ("outline", "boxes"), strict=True
    ):
        assert [one["model_version"] for one in found] == [version] * 4
        regions = [region for one in found for region in one["result"]]
        assert regions
        assert {(region["type"], region["from_name"]) for region in regions} == {(kind, name)}
