from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select, update

from worker import rounds
from worker.artifacts import round_key
from worker.errors import BadRequest, LabelStudioUnavailable, NotFound
from worker.services import Services
from worker.settings import ProjectSettings, Settings
from worker.store import get_project, projects
from worker.store import rounds as round_rows
from worker.work import MEASURES

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


RED, BLUE = picture((200, 10, 10)), picture((10, 10, 200))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Services]:
    """Project 7, connected; its round 0 has no detector, so that the descriptor looks at images."""
    values: dict[str, Any] = {"data_dir": tmp_path, "label_studio_url": "http://127.0.0.1:9", "device": "cpu"}
    values["label_studio_api_key"] = "a-legacy-token"
    made = Services(Settings(_env_file=None, **values), "worker")
    made.store.migrate()
    with made.store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), "http://backend:9090")
    yield made
    made.store.close()


def publish(own: Services, strategy: str = "least_confidence", late: dict[str, float] | None = None) -> None:
    with own.store.write() as connection:
        round_id = connection.execute(select(round_rows.c.id)).scalar_one()
        connection.execute(update(round_rows).values(state="done"))
        connection.execute(update(projects).values(published_version="al-000000", published_round_id=round_id))
    note = {"strategy": strategy, "options": {}, "late": late or {}, "notes": []}
    own.artifacts.put_arrays(round_key(7, 0, "selection.npz"), {}, note)


def task(task_id: int, image: str | None, project: Any = 7) -> dict[str, Any]:
    return {"id": task_id, "project": project, "data": {} if image is None else {"image": image}}


def test_before_anything_is_published_answers_are_pending(own: Services) -> None:
    from worker.model import HardfirstModel

    (answer,) = HardfirstModel(CONFIG, services=own).predict([task(1, RED)])
    assert answer == {
        "result": [],
        "score": 1.0,
        "model_version": "hardfirst-pending",
        "problem": "the first batch is not published yet",
    }


def test_each_task_gets_its_own_answer_and_a_broken_image_costs_only_itself(own: Services) -> None:
    from worker.model import HardfirstModel

    publish(own, late={"uncertainty_scale": 2.0})
    cut = RED[: len(RED) // 2 // 4 * 4 + 2]
    asked = [task(1, RED), task(2, None), task(3, cut), task(4, BLUE), task(5, "file:///etc/passwd")]
    answers = HardfirstModel(CONFIG, services=own).predict(asked)
    assert [answer["model_version"] for answer in answers] == ["al-000000"] * 5
    assert [answer["result"] for answer in answers] == [[]] * 5
    # without a detector every image is as uncertain as can be: 1 of a scale of 2
    assert [answer["score"] for answer in answers] == pytest.approx([0.75, 1.0, 1.0, 0.75, 1.0])
    with own.store.read() as connection:
        project = get_project(connection, 7)
    _, (late,) = HardfirstModel(CONFIG, services=own).predict_and_score(project, asked[:1])
    assert late.score.measures == dict.fromkeys(MEASURES, 1.0)
    assert (late.utility, late.twin) == (pytest.approx(0.5), False)
    problems = [answer.get("problem") for answer in answers]
    assert problems[0] is None
    assert problems[3] is None
    assert "image" in problems[1]
    assert problems[2]
    assert "is not an address that images are fetched from" in problems[4]


def test_label_studio_away_is_not_a_broken_image(own: Services) -> None:
    from worker.model import HardfirstModel

    publish(own, late={"uncertainty_scale": 1.0})
    with pytest.raises(LabelStudioUnavailable, match="does not answer"):
        HardfirstModel(CONFIG, services=own).predict([task(1, "/data/upload/7/a.jpg")])


def test_a_round_that_found_the_pool_empty_welcomes_every_new_image(own: Services) -> None:
    from worker.model import HardfirstModel

    publish(own, strategy="hybrid")
    answers = HardfirstModel(CONFIG, services=own).predict([task(1, RED), task(2, None)])
    scores = [answer["score"] for answer in answers]
    assert 0.5 <= scores[0] < scores[1] == 1.0


@pytest.mark.parametrize(
    "tasks", [[task(1, RED), task(2, RED, project=8)], [task(1, RED, project=None)], [task(1, RED, project="7")]]
)
def test_tasks_of_no_or_several_projects_are_refused(own: Services, tasks: list[dict[str, Any]]) -> None:
    from worker.model import HardfirstModel

    with pytest.raises(BadRequest, match="exactly one is needed"):
        HardfirstModel(CONFIG, services=own).predict(tasks)


def test_nothing_asked_and_nobody_connected(own: Services) -> None:
    from worker.model import HardfirstModel

    model = HardfirstModel(CONFIG, services=own)
    assert model.predict([]) == []
    with pytest.raises(NotFound, match="project 99 is not connected"):
        model.predict([task(1, RED, project=99)])


def test_scores_come_in_the_order_asked_with_embeddings_of_the_images(own: Services) -> None:
    from worker.model import SCORERS

    publish(own)
    with own.store.read() as connection:
        project = connection.execute(select(projects)).one()
        round_row = connection.execute(select(round_rows)).one()
    scorer = SCORERS.get(own, project, round_row)
    assert SCORERS.get(own, project, round_row) is scorer  # the model stays loaded
    done: list[int] = []
    images = [(number, RED if number % 2 else BLUE) for number in range(40, 0, -1)]
    images[20] = (20, "")
    found = list(scorer.score(images, done.append))
    assert [score.task_id for score in found] == list(range(40, 0, -1))
    assert done == [16, 32, 40]
    assert [score.problem is not None for score in found] == [number == 20 for number in range(40, 0, -1)]
    red, blue = found[1].embedding, found[0].embedding
    assert red is not None
    assert blue is not None
    assert np.array_equal(red, found[3].embedding)
    assert not np.array_equal(red, blue)


def test_each_control_draws_from_its_own_threshold_on(own: Services) -> None:
    from worker.detector import ImageScore
    from worker.model import Scorer

    config = (
        '<View><Image name="image" value="$image"/>'
        '<RectangleLabels name="sure" toName="image" model_score_threshold="0.8"><Label value="nut"/></RectangleLabels>'
        '<RectangleLabels name="any" toName="image" model_score_threshold="0"><Label value="bolt"/></RectangleLabels>'
        '<PolygonLabels name="outline" toName="image"><Label value="wire"/></PolygonLabels></View>'
    )
    publish(own)
    with own.store.write() as connection:
        connection.execute(update(projects).values(label_config=config))
        connection.execute(update(round_rows).values(settings='{"shapes": "hull", "confidence": 0.4}'))
        project = connection.execute(select(projects)).one()
        round_row = connection.execute(select(round_rows)).one()
    scorer = Scorer(own, project, round_row)
    assert scorer.confidence == 0.001  # of "any"; what lies below is noise
    names = {0: "nut", 1: "bolt", 2: "wire", 3: "cat"}
    scorer.class_to_label = scorer.label_map.classes_for(names)
    confidences = [0.9, 0.7, 0.5, 0.3, 0.95, 0.0005]
    class_ids = [0, 0, 2, 2, 3, 1]
    n = len(confidences)
    look = ImageScore(
        boxes_xyxy=np.tile(np.array([[10, 10, 30, 30]], np.float32), (n, 1)),
        confidences=np.array(confidences, np.float32),
        class_ids=np.array(class_ids),
        probabilities=np.full((n, 4), 0.5, np.float32),
        best_candidate=np.full(4, 0.5, np.float32),
        embedding=np.ones(2, np.float32),
        width=64,
        height=48,
        drawn=n,
    )
    drawn = scorer._task_score(1, look, None).regions
    assert [(one["from_name"], one["type"], round(one["score"], 3)) for one in drawn] == [
        ("sure", "rectanglelabels", 0.9),
        ("outline", "polygonlabels", 0.5),
    ]


@pytest.mark.slow
def test_the_stock_label_studio_ml_server_serves_the_same_model(
    own: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(own, late={"uncertainty_scale": 2.0})
    monkeypatch.setenv("HARDFIRST_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LABEL_STUDIO_ML_BACKEND_V2", "true")
    from label_studio_ml.api import init_app

    from worker.model import HardfirstModel

    (tmp_path / "models").mkdir()
    client = init_app(HardfirstModel, model_dir=str(tmp_path / "models")).test_client()
    assert client.get("/health").get_json()["status"] == "UP"
    setup = {"project": "7.1", "schema": CONFIG, "force_reload": True}
    assert client.post("/setup", json=setup).status_code == 200
    body = {"tasks": [task(1, RED), task(2, None)], "project": "7.1", "label_config": CONFIG}
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.get_data(as_text=True)
    results = json.loads(answer.get_data(as_text=True))["results"]
    assert [(found["score"], found["model_version"]) for found in results] == [
        (0.75, "al-000000"),
        (1.0, "al-000000"),
    ]
