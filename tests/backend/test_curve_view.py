"""The measuring half of the admin page: from what rounds stored to what an admin reads, and its buttons."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert, select, update

from backend import curve_view
from backend.app import create_app
from worker.settings import Settings
from worker.store import Store, events, projects, rounds, task_annotations, tasks

CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
<Label value="bolt"/><Label value="pit"/></RectangleLabels></View>"""
HOSTILE = """</script><script>alert(1)</script>"'><img src=x onerror=alert(2)>"""
RARE = "Fewer than 30 holdout boxes: pit (12)."


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        label_studio_url="http://127.0.0.1:1", label_studio_api_key="0" * 40, redis_url="", data_dir=tmp_path / "data"
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    made = Store(settings.store_url)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def client(settings: Settings, store: Store) -> TestClient:
    return TestClient(create_app(settings))


def add_project(store: Store, holdout: int = 0, pool: int = 0, **values: Any) -> None:
    row = {"id": 7, "title": "Factory", "label_config": CONFIG, "extra_params": "{}", "connected_at": 1.0} | values
    kinds = [True] * holdout + [False] * pool
    with store.write() as connection:
        connection.execute(insert(projects).values(**row))
        for task_id, held in enumerate(kinds, 1):
            task = {"project_id": 7, "task_id": task_id, "image": f"/{task_id}.jpg", "holdout": held}
            connection.execute(insert(tasks).values(**task))


def annotate(store: Store, *seconds: float | None, first_task: int = 1, offset: int = 0, **values: Any) -> None:
    with store.write() as connection:
        for task_id, lead_time in enumerate(seconds, first_task):
            row = {"project_id": 7, "annotation_id": task_id + offset, "task_id": task_id}
            connection.execute(insert(task_annotations).values(**row, lead_time=lead_time, **values))


def measured(store: Store, number: int, labels: int, map50: float, verdict: Any = None, **values: Any) -> int:
    row = {"project_id": 7, "number": number, "state": "done", "opened_at": 1.0, "closed_at": 2.0, "labels": labels}
    row |= {"map50": map50, "verdict": json.dumps(verdict or {})} | values
    with store.write() as connection:
        return int(connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one())


def told(verdict: str = "stop", **values: Any) -> dict[str, Any]:
    """As worker.measuring writes it."""
    numbers = {"worth_gain": 0.02, "worth_gain_from": "prices", "mean_gain": 0.002, "rounds_used": 2, "se": 0.006}
    numbers |= {"lower": -0.008, "upper": 0.012, "level": 0.9, "smallest_visible_gain": 0.015, "holdout_images": 300}
    fit = {"a": 0.8, "b": 2.0, "c": 0.5, "next_labels": 400, "next_map50": 0.7, "next_map50_low": 0.66}
    fit |= {"next_map50_high": 0.74, "next_gain": 0.004, "next_gain_low": -0.001, "next_gain_high": 0.01}
    fit |= {"line": [[100, 0.6], [400, 0.7]], "band": [[100, 0.58, 0.62], [400, 0.66, 0.74]], "agrees": True}
    return {
        "verdict": verdict,
        "reasons": ["The last two rounds gained +.002.", "That is too little."],
        "warnings": [RARE],
        "base": {"verdict": "continue", "reasons": ["the last round gained +0.006"], "min_map_gain": 0.005},
        "stats": {"predicted_gain_next_round": 0.0031},
        "next_gain_estimable": True,
        "numbers": {**numbers, "more_holdout": 200, "smallest_visible_gain_then": 0.011},
        "fit": {**fit, "sentence": "It agrees."},
        "knee": 200,
        "interval": {"level": 0.9, "low": 0.6, "high": 0.7, "gain_low": -0.01, "gain_high": 0.02},
        **values,
    }


# --- nothing, or little ----------------------------------------------------------------------------------------------


def test_before_the_first_round_the_holdout_is_told(client: TestClient, store: Store) -> None:
    add_project(store, holdout=60, pool=400)
    found = client.get("/api/projects/7/measuring").json()
    assert (found["verdict"], found["classes"], found["returns"]) == (None, [], [])
    assert found["curve"]["points"] == []
    held = found["holdout"]
    assert (held["size"], held["labelled"], held["waiting"]) == (60, 0, 0)
    assert held["smallest_visible_gain"] > 0.02
    assert "60 holdout images" in held["sentence"]
    page = client.get("/projects/7").text
    assert "60 holdout images" in page
    assert "Nothing measured yet" in page
    assert f"Ask for {held['more']} more in the next batch" in page


def test_a_project_without_tasks_has_a_page(client: TestClient, store: Store) -> None:
    add_project(store)
    assert client.get("/projects/7").status_code == 200
    assert client.get("/api/projects/7/holdout").json()["size"] == 0


@pytest.mark.parametrize("advice", [{"verdict": "continue", "reasons": ["gained"], "stats": {}}, {}])
def test_a_store_of_an_older_version_is_read(client: TestClient, store: Store, advice: dict[str, Any]) -> None:
    add_project(store)
    measured(store, 1, 100, 0.5, {})
    measured(store, 2, 200, 0.6, advice, per_class='{"bolt": {"ap50": 0.5}}')
    found = client.get("/api/projects/7/measuring").json()
    assert [(one["labels"], one["map50"], one["low"]) for one in found["curve"]["points"]] == [
        (100, 0.5, None),
        (200, 0.6, None),
    ]
    assert (found["curve"]["next"], found["curve"]["knee"], found["curve"]["line"]) == (None, None, [])
    assert (found["verdict"] or {}).get("base") is None
    page = client.get("/projects/7")
    assert page.status_code == 200
    assert ("Continue labelling" in page.text) is bool(advice)


def test_a_project_that_is_not_connected(client: TestClient) -> None:
    for name in ("measuring", "verdict", "curve", "returns", "money", "classes", "holdout"):
        assert client.get(f"/api/projects/5/{name}").status_code == 404
    assert client.post("/api/projects/5/holdout", json={"images": 3}).status_code == 404
    assert client.post("/api/projects/5/warnings", json={"warning": "x"}).status_code == 404


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_the_verdict_in_words(client: TestClient, store: Store) -> None:
    add_project(store)
    measured(store, 1, 100, 0.6)
    measured(store, 2, 200, 0.65, told())
    card = client.get("/api/projects/7/verdict").json()
    assert (card["verdict"], card["words"], card["round_number"]) == ("stop", "Time to stop", 2)
    assert (card["headline"], card["reasons"]) == ("The last two rounds gained +.002.", ["That is too little."])
    assert card["base"]["words"] == "Continue labelling"
    assert card["base"]["sentence"] == "the last round gained +0.006"
    assert card["base"]["predicted"] == "It predicts +0.003 for the next round."
    assert card["worth_gain_from"].startswith("from your prices")
    assert card["more_holdout"] == "200 more labelled holdout images would show gains from 0.011 on."
    assert card["extrapolation"] == "It agrees."
    page = client.get("/projects/7").text
    for words in ("Accept the stop", RARE, "That is too little.", "It agrees.", "<b>0.020</b> mAP50 a round"):
        assert words in page


def test_a_next_gain_that_means_nothing_is_not_shown(client: TestClient, store: Store) -> None:
    add_project(store)
    measured(store, 1, 100, 0.6, told(next_gain_estimable=False, stats={"predicted_gain_next_round": 50.0}))
    base = client.get("/api/projects/7/verdict").json()["base"]
    assert base["predicted"].startswith("Its next gain is not estimable")
    assert "50.0" not in client.get("/projects/7").text


def test_the_gain_scale_is_in_order(client: TestClient, store: Store) -> None:
    add_project(store)
    measured(store, 1, 100, 0.6, told())
    zero, low, mean, high, worth = client.get("/api/projects/7/verdict").json()["scale"]
    assert 0 < low < zero < mean < high < worth < 100
    assert (mean - zero) / (worth - zero) == pytest.approx(0.1)  # .002 of .02
    nothing = told(numbers={"worth_gain": 0.02})
    with store.write() as connection:
        connection.execute(update(rounds).values(verdict=json.dumps(nothing)))
    assert client.get("/api/projects/7/verdict").json()["scale"] == []


def test_a_warning_is_acknowledged_once_and_vetoes_nothing(client: TestClient, store: Store) -> None:
    add_project(store)
    measured(store, 1, 100, 0.6, told())
    assert client.post("/api/projects/7/stop", json={"accepted": True}).status_code == 200
    (warning,) = client.get("/api/projects/7/verdict").json()["warnings"]
    assert warning == {"key": curve_view.warning_key(RARE), "sentence": RARE, "acknowledged": False}
    for _ in range(2):
        answer = client.post("/api/projects/7/warnings", json={"warning": warning["key"]})
        assert answer.json()["warnings"][0]["acknowledged"] is True
    with store.read() as connection:
        logged = connection.execute(select(events.c.detail).where(events.c.kind == "warning acknowledged")).scalars()
        assert [detail.split(" (an admin")[0] for detail in logged] == [RARE]
    assert f'data-warning="{warning["key"]}"' not in client.get("/projects/7").text


def test_a_warning_with_other_figures_is_a_new_one(client: TestClient, store: Store) -> None:
    add_project(store)
    measured(store, 1, 100, 0.6, told())
    client.post("/api/projects/7/warnings", json={"warning": curve_view.warning_key(RARE)})
    measured(store, 2, 200, 0.6, told(warnings=[RARE.replace("12", "13")]))
    assert client.get("/api/projects/7/verdict").json()["warnings"][0]["acknowledged"] is False
    gone = client.post("/api/projects/7/warnings", json={"warning": curve_view.warning_key(RARE)})
    assert gone.status_code == 404
    assert "has no warning" in gone.json()["detail"]


# --- the holdout -----------------------------------------------------------------------------------------------------


def test_before_the_first_batch_the_holdout_is_not_missed_yet(client: TestClient, store: Store) -> None:
    add_project(store)
    assert client.get("/api/projects/7/holdout").json()["sentence"] == "The holdout is drawn with the first batch."
    assert "nothing can be measured" not in client.get("/projects/7").text
    with store.write() as connection:
        row = {"project_id": 7, "number": 0, "state": "done", "opened_at": 1.0, "closed_at": 2.0}
        round_id = connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one()
        connection.execute(update(projects).values(published_round_id=round_id))
    assert "nothing can be measured" in client.get("/api/projects/7/holdout").json()["sentence"]


def test_more_holdout_is_asked_for_and_withdrawn(client: TestClient, store: Store) -> None:
    add_project(store, holdout=60, pool=400)
    before = client.get("/api/projects/7/status").json()["stamp"]
    worth_asking = client.get("/api/projects/7/holdout").json()["more"]
    assert worth_asking > 42
    assert client.post("/api/projects/7/holdout", json={"images": 40}).json()["waiting"] == 40
    assert client.post("/api/projects/7/holdout", json={"images": 2}).json()["waiting"] == 42
    assert client.get("/api/projects/7/status").json()["stamp"] != before  # or other readers would not see it
    page = client.get("/projects/7").text
    assert "42 more are asked for" in page
    assert client.get("/api/projects/7/holdout").json()["more"] == worth_asking - 42  # not for the same twice
    assert "more holdout images asked for" in page
    assert client.post("/api/projects/7/holdout", json={"images": 0}).json()["waiting"] == 0


@pytest.mark.parametrize(
    ("images", "status"), [(-1, 422), ("3", 422), (2.5, 422), (True, 422), (201, 400), (None, 422)]
)
def test_more_holdout_that_cannot_be_is_refused(client: TestClient, store: Store, images: Any, status: int) -> None:
    add_project(store, holdout=60, pool=400)
    answer = client.post("/api/projects/7/holdout", json={"images": images})
    assert answer.status_code == status
    assert client.get("/api/projects/7/holdout").json()["waiting"] == 0


def test_another_sites_page_cannot_press_the_buttons(client: TestClient, store: Store) -> None:
    add_project(store, holdout=60, pool=400)
    evil = {"origin": "https://evil.example"}
    assert client.post("/api/projects/7/holdout", json={"images": 3}, headers=evil).status_code == 400
    assert client.post("/api/projects/7/warnings", json={"warning": "x"}, headers=evil).status_code == 400


def test_holdout_boxes_rarest_first(client: TestClient, store: Store) -> None:
    add_project(store, holdout=10)
    annotate(store, *[5.0] * 10, classes='{"bolt": 6, "pit": 1}')
    held = client.get("/api/projects/7/holdout").json()
    assert held["boxes_are"] == "labelled"
    assert [(one["name"], one["boxes"], one["is_rare"]) for one in held["classes"]] == [
        ("pit", 10, True),
        ("bolt", 60, False),
    ]
    assert held["classes"][0]["share"] == pytest.approx(1 / 6)


# --- curve, returns, money -------------------------------------------------------------------------------------------


def test_the_curve_with_intervals_fit_and_next_round(client: TestClient, store: Store) -> None:
    add_project(store)
    for number, map50 in ((1, 0.5), (2, 0.6), (3, 0.65)):
        measured(store, number, 100 * number, map50, told())
    measured(store, 4, 400, 0.9, told(), state="failed")
    assert client.get("/api/projects/7/curve").json()["knee"] is None  # three points have none
    measured(store, 5, 400, 0.66, told())
    curve = client.get("/api/projects/7/curve").json()
    assert [(one["round_number"], one["map50"]) for one in curve["points"]] == [
        (1, 0.5), (2, 0.6), (3, 0.65), (5, 0.66),
    ]  # fmt: skip
    assert (curve["points"][0]["low"], curve["points"][0]["high"], curve["level"]) == (0.6, 0.7, 0.9)
    assert curve["next"] == {
        "labels": 400, "map50": 0.7, "low": 0.66, "high": 0.74, "gain": 0.004, "gain_low": -0.001, "gain_high": 0.01,
    }  # fmt: skip
    assert (curve["knee"], curve["line"][-1], curve["band"][0]) == (200, [400, 0.7], [100, 0.58, 0.62])
    assert curve["fit_words"] == "mAP50 = 0.800 − 2 · labels^−0.50"
    page = client.get("/projects/7").text
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1)) == {"curve": curve}


def test_what_each_round_bought(client: TestClient, store: Store) -> None:
    add_project(store, extra_params='{"cost_per_hour": 30, "value_per_point": 100}')
    measured(store, 1, 100, 0.5, told(), minutes=60.0)
    measured(store, 2, 300, 0.6, told(), minutes=180.0)
    measured(store, 3, 300, 0.59, told(), minutes=180.0)
    third, second, first = client.get("/api/projects/7/returns").json()
    assert second["gain"] == pytest.approx(0.1)
    assert second["per_100_labels"] == pytest.approx(0.05)  # 200 labels
    assert second["per_hour"] == pytest.approx(0.05)  # 120 minutes
    assert (second["cost"], second["hours"], second["labels_added"]) == (60, 2, 200)
    assert second["value"] == pytest.approx(1000)  # 10 points
    assert second["net"] == pytest.approx(940)
    assert (second["gain_low"], second["gain_high"]) == (-0.01, 0.02)
    assert [first[name] for name in ("gain", "labels_added", "per_hour", "cost")] == [None] * 4
    assert (third["per_100_labels"], third["per_hour"]) == (None, None)  # nothing was added
    page = client.get("/projects/7").text
    assert '<th scope="col" class="n">Net</th>' in page
    assert "940" in page


def test_without_prices_there_is_no_money(client: TestClient, store: Store) -> None:
    add_project(store)
    measured(store, 1, 100, 0.5, told(), minutes=60.0)
    measured(store, 2, 300, 0.6, told(), minutes=180.0)
    assert client.get("/api/projects/7/returns").json()[0]["cost"] is None
    page = client.get("/projects/7").text
    assert '<th scope="col" class="n">Cost</th>' not in page
    assert "when the settings name cost_per_hour" in page


@pytest.mark.parametrize(("seconds", "median"), [((), None), ((9.0,), 9.0), ((9.0, 1.0, 4.0), 4.0), ((1.0, 3.0), 2.0)])
def test_the_median_image(client: TestClient, store: Store, seconds: tuple[float, ...], median: float | None) -> None:
    add_project(store)
    annotate(store, *seconds)
    annotate(store, 500.0, first_task=50, cancelled=True)
    annotate(store, None, 0.0, first_task=60)
    assert client.get("/api/projects/7/money").json()["median_seconds"] == median


def test_an_image_that_two_people_labelled_counts_once(client: TestClient, store: Store) -> None:
    add_project(store)
    annotate(store, 10.0, 100.0, 100.0)
    annotate(store, 20.0, offset=10)
    assert client.get("/api/projects/7/money").json()["median_seconds"] == 100.0  # of 30, 100, 100


# --- classes ---------------------------------------------------------------------------------------------------------


def per_class(**ap50: float | None) -> str:
    return json.dumps({name: {"ap50": value, "boxes": 12 if name == "pit" else 90} for name, value in ap50.items()})


def test_classes_over_the_rounds(client: TestClient, store: Store) -> None:
    add_project(store)
    curves = {"bolt": (0.2, 0.5, 0.7, 0.9), "pit": (0.3, 0.3, 0.3, 0.3), "gear": (None, 0.1, 0.2, 0.1)}
    for at in range(4):
        found = per_class(**{name: values[at] for name, values in curves.items()})
        measured(store, at + 1, 100 * (at + 1), 0.5, told(), per_class=found)
    pit, gear, bolt = client.get("/api/projects/7/classes").json()
    assert (pit["name"], gear["name"], bolt["name"]) == ("pit", "gear", "bolt")  # flagged, then the lowest
    assert set(pit["flags"]) == {"plateau", "rare"}
    assert "AP of pit has not moved for 3 rounds: collect more of it." in pit["sentence"]
    assert (pit["change"], gear["change"]) == (0, -0.1)
    assert gear["points"][0] == {"round_number": 1, "ap50": None}
    assert gear["told"] == "round 2: 0.10, round 3: 0.20, round 4: 0.10"
    assert gear["line"].count(",") == 3
    page = client.get("/projects/7").text
    assert "AP of pit has not moved for 3 rounds: collect more of it." in page
    assert page.count('class="class-tile"') == 3


@pytest.mark.parametrize("count", [1, 80])
def test_one_class_and_eighty(client: TestClient, store: Store, count: int) -> None:
    add_project(store)
    names = [f"class_{at:02d}" for at in range(count)]
    for number in (1, 2):
        measured(store, number, 100 * number, 0.5, told(), per_class=per_class(**dict.fromkeys(names, 0.1 * number)))
    page = client.get("/projects/7").text
    assert page.count('class="class-tile"') == count
    assert ("The other 68 classes" in page) is (count == 80)


def test_tile_lines_have_one_scale() -> None:
    assert curve_view.tile_line([]) == []
    assert curve_view.tile_line([0.5]) == [(60.0, 22.0)]  # the middle
    assert curve_view.tile_line([0.0, None, 1.0]) == [(4.0, 40.0), (116.0, 4.0)]  # floor and top, the gap kept in time


# --- hostile names, and the API's description ------------------------------------------------------------------------


def test_hostile_names_stay_text(client: TestClient, store: Store) -> None:
    add_project(store, holdout=1)
    annotate(store, 3.0, classes=json.dumps({HOSTILE: 2}))
    fit = {**told()["fit"], "sentence": HOSTILE}
    advice = told(HOSTILE, reasons=[HOSTILE] * 2, warnings=[HOSTILE], fit=fit)
    advice["base"] = {"verdict": HOSTILE, "reasons": [HOSTILE]}
    for number in range(1, 6):
        found = json.dumps({HOSTILE: {"ap50": 0.3, "boxes": 2}})
        measured(store, number, 100 * number, 0.5, advice, per_class=found)
    for path in ("/", "/projects/7"):
        page = client.get(path).text
        assert "<script>alert" not in page
        assert "<img src=x" not in page
    assert page.count("&lt;img src=x") >= 7


def test_the_api_is_described_with_its_types(client: TestClient) -> None:
    described = client.get("/api/openapi.json").json()
    shapes = {"measuring": "MeasuringView", "curve": "CurveView", "money": "MoneyView", "holdout": "HoldoutView"}
    for path, name in shapes.items():
        answer = described["paths"][f"/api/projects/{{project_id}}/{path}"]["get"]["responses"]["200"]
        assert answer["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
    assert "post" in described["paths"]["/api/projects/{project_id}/warnings"]
