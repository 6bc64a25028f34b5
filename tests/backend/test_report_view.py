"""A project of twelve images, small enough to count by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, insert, update

from backend import report_view
from worker.artifacts import round_key
from worker.errors import NotFound
from worker.services import Services
from worker.settings import Settings
from worker.simulation_results import area, curve, labels_saved
from worker.store import projects, rounds, scores, task_annotations, tasks

BOLT, CRACK = {"bolt": 2}, {"bolt": 1, "crack": 1}
CONFIG = (
    '<View><Image name="i" value="$image"/><RectangleLabels name="l" toName="i">'
    '<Label value="bolt"/><Label value="crack"/></RectangleLabels></View>'
)
# Unit vectors: tasks 1 and 4 look alike, so do 6 and 7.
LOOKS = {1: 0, 2: 1, 3: 2, 4: 0, 5: 3, 6: 4, 7: 4, 8: 5}


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Services]:
    """Round 1 (id 11) learned tasks 1-3 of the batch of round 0 (id 10) and 8, which nobody asked for; round 3 learned
    4 and 5, the latter in round 2, which failed. 6 and 7 wait. 20-22 are the holdout, 30 is a twin of it."""
    services = Services(Settings(data_dir=tmp_path), "web")
    services.store.migrate()
    with services.store.write() as connection:
        row = {"id": 7, "connected_at": 0.0, "published_round_id": 13, "label_config": CONFIG}
        connection.execute(insert(projects).values(**row))
        connection.execute(insert(rounds), [_round(10, 0), _round(11, 1), _round(12, 2, "failed"), _round(13, 3)])
        _measured(connection, 11, labels=4, boxes=8, map50=0.2, crack=0.1)
        _measured(connection, 13, labels=6, boxes=10, map50=0.5, crack=0.3)
        seen = {1: 11, 2: 11, 3: 11, 8: 11, 4: 13, 5: 12, 6: None, 7: None, 9: None}
        connection.execute(insert(tasks), [_task(task_id, seen_round_id=at) for task_id, at in seen.items()])
        connection.execute(insert(tasks), [_task(task_id, holdout=True, seen_round_id=11) for task_id in (20, 21, 22)])
        connection.execute(insert(tasks), [_task(30, twin=True)])
        connection.execute(insert(task_annotations), _annotations())
        asked = {10: (2, 20, 1, 3), 11: (5, 4, 9), 13: (7, 6, 9)}
        for round_id, ranked in asked.items():
            connection.execute(insert(scores), [_score(round_id, one, rank) for rank, one in enumerate(ranked)])
        _embed(services, connection)
    yield services
    services.store.close()


def _round(round_id: int, number: int, state: str = "done") -> dict[str, Any]:
    return {"id": round_id, "project_id": 7, "number": number, "state": state, "opened_at": float(number)}


def _measured(connection: Any, round_id: int, labels: int, boxes: int, map50: float, crack: float) -> None:
    per_class = {"bolt": {"ap50": 0.9, "ap50_95": 0.5, "boxes": 3}, "crack": {"ap50": crack, "boxes": 1}}
    values = {"labels": labels, "boxes": boxes, "map50": map50, "map50_95": map50 / 2, "minutes": 30.0}
    this = update(rounds).where(rounds.c.id == round_id)
    connection.execute(this.values(**values, per_class=json.dumps(per_class), report='{"seconds": 60.0}'))


def _task(task_id: int, **values: Any) -> dict[str, Any]:
    return {
        "project_id": 7,
        "task_id": task_id,
        "image": f"/data/{task_id}.jpg",
        "holdout": False,
        "twin": False,
        "seen_round_id": None,
    } | values


def _annotations() -> list[dict[str, Any]]:
    held = {
        1: BOLT, 2: CRACK, 3: BOLT, 8: BOLT, 4: {}, 5: BOLT, 6: CRACK, 7: {}, 20: BOLT, 21: BOLT, 22: BOLT, 30: CRACK
    }  # fmt: skip
    found = [
        {
            "project_id": 7,
            "annotation_id": 100 + task_id,
            "task_id": task_id,
            "updated_at": "2026-01-01",
            "cancelled": False,
            "lead_time": 30.0,
            "n_boxes": sum(boxes.values()),
            "classes": json.dumps(boxes),
        }
        for task_id, boxes in held.items()
    ]
    older = {"annotation_id": 99, "task_id": 1, "updated_at": "2025-01-01", "n_boxes": 9, "classes": '{"crack": 9}'}
    skipped = {"annotation_id": 98, "task_id": 9, "cancelled": True, "n_boxes": 0, "classes": "{}"}
    unknown = {"n_boxes": 2, "classes": None}  # of task 5: written before classes were counted
    found = [one | unknown if one["task_id"] == 5 else one for one in found]
    return [*found, found[0] | older, found[0] | skipped]


def _score(round_id: int, task_id: int, rank: int | None) -> dict[str, Any]:
    return {"round_id": round_id, "task_id": task_id, "shard": 0, "rank": rank, "row": None}


def _embed(own: Services, connection: Any) -> None:
    """Of round 3, in two shards; task 3 has none, its image could not be read."""
    shards = {0: [1, 2, 4, 5], 1: [8, 6, 7]}
    for shard, task_ids in shards.items():
        content = io.BytesIO()
        np.save(content, np.eye(8, dtype=np.float32)[[LOOKS[task_id] for task_id in task_ids]])
        own.artifacts.put(round_key(7, 3, f"embeddings-{shard:05d}.npy"), content.getvalue())
        for row, task_id in enumerate(task_ids):
            here = (scores.c.round_id == 13, scores.c.task_id == task_id)
            connection.execute(delete(scores).where(*here))
            rank = {7: 0, 6: 1}.get(task_id)
            connection.execute(insert(scores), [_score(13, task_id, rank) | {"shard": shard, "row": row}])


def results(own: Services) -> dict[str, Any]:
    with own.store.read() as connection:
        live = report_view.live_view(connection, 7)
    return report_view.live_results(own, live)


def played(own: Services) -> list[dict[str, Any]]:
    rounds_: list[dict[str, Any]] = results(own)["runs"][0]["rounds"]
    return rounds_


def test_rounds_are_as_a_simulation_tells_them(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.composition.RARE_SHARE", 0.3)
    first, second = played(own)
    assert (first["round"], first["number"], second["round"], second["number"]) == (0, 1, 1, 3)
    assert (first["labels"], first["boxes"], first["map50"], first["map50_95"]) == (4, 8, 0.2, 0.1)
    assert (first["ap50"], first["rare_ap50"], second["rare_ap50"]) == ({"bolt": 0.9, "crack": 0.1}, 0.1, 0.3)
    assert (first["minutes"], second["minutes"]) == (2.5, 3.5)  # five annotations of 30 s, then two; no holdout
    assert first["minutes_with_holdout"] == 30.0
    assert first["seconds"] == {"training": 60.0}
    assert second["evaluation"] == "p7/r000003/evaluation.npz"


def test_what_each_batch_held(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.composition.RARE_SHARE", 0.3)
    first, second = (one["batch"] for one in played(own))
    assert first == {
        "images": ["2", "1", "3", "8"],  # in the order of the batch, then what nobody asked for
        "boxes": 8,
        "empty_images": 0,
        "rare_images": 1,  # task 1 had cracks in an older annotation
        "near_duplicates": [],
        "chosen_in": [0],
        "asked": 3,  # without the holdout
        "asked_labelled": 3,
    }
    assert (second["images"], second["chosen_in"], second["asked"]) == (["5", "4"], [1], 3)
    assert (second["boxes"], second["empty_images"], second["rare_images"]) == (2, 1, 0)
    assert second["near_duplicates"] == ["4"]  # like task 1, of the batch before
    assert results(own)["pending"] == {
        "images": ["7", "6"],
        "boxes": 2,
        "empty_images": 1,
        "rare_images": 1,
        "near_duplicates": ["6"],  # like task 7, before it in the batch
        "chosen_in": [3],
        "asked": 3,
        "asked_labelled": 2,
    }


def test_rarity_is_of_labelled_images_until_the_holdout_says_enough(
    own: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.composition.RARE_SHARE", 0.3)
    data = results(own)["data"]
    assert (data["images_counted"], data["rare_from"]) == (11, "labelled images")  # without the twin and the skip
    assert data["images_per_class"] == {"bolt": 8, "crack": 2}
    assert (data["classes"], data["rare"]) == (["bolt", "crack"], ["crack"])
    assert (data["pool_images"], data["holdout_images"]) == (10, 3)
    monkeypatch.setattr(report_view, "RANDOM_ENOUGH", 3)
    data = results(own)["data"]
    assert (data["images_counted"], data["images_per_class"], data["rare"]) == (3, {"bolt": 3}, [])


def test_near_duplicates_are_unknown_without_embeddings(own: Services) -> None:
    own.artifacts.delete_like(round_key(7, 3, "embeddings-00001.npy"))
    assert [one["batch"]["near_duplicates"] for one in played(own)] == [None, None]
    with own.store.write() as connection:
        connection.execute(update(scores).values(row=None))
    data = results(own)["data"]
    assert data["embeddings_of_round"] is None


@pytest.mark.parametrize(("name", "limit"), [("MOST_COMPARED", 5), ("EMBEDDING_SECONDS", -1.0)])
def test_near_duplicates_are_unknown_where_they_would_take_too_long(
    own: Services, monkeypatch: pytest.MonkeyPatch, name: str, limit: float
) -> None:
    monkeypatch.setattr(report_view, name, limit)
    assert [one["batch"]["near_duplicates"] for one in played(own)] == [None, None]


def test_the_projects_threshold_is_the_one_that_counts(own: Services) -> None:
    with own.store.write() as connection:
        connection.execute(update(projects).values(extra_params='{"near_duplicate_threshold": 1.0}'))
    assert [one["batch"]["near_duplicates"] for one in played(own)] == [[], []]


def test_what_reads_results_of_a_simulation_reads_a_live_project(own: Services) -> None:
    live = results(own)
    assert [point["mean"] for point in curve(live, "project 7", "labels")] == [0.2, 0.5]
    assert [point["x"] for point in curve(live, "project 7", "minutes")] == [2.5, 3.5]
    assert area(live["runs"][0]["rounds"]) == pytest.approx(0.35)
    random = [{"labels": 4, "map50": 0.2}, {"labels": 10, "map50": 0.5}]
    both = live | {"runs": [*live["runs"], {"arm": "random", "seed": 0, "rounds": random}]}
    saved = labels_saved(both, "project 7", "random")
    assert saved["budgets"] == [{"labels": 6.0, "map50": 0.5, "baseline_needs": 10.0, "saved": 4.0}]
    assert json.loads(json.dumps(live, allow_nan=False)) == live


def test_untimed_labels_have_no_minutes(own: Services) -> None:
    with own.store.write() as connection:
        connection.execute(update(task_annotations).values(lead_time=None))
    assert [one["minutes"] for one in played(own)] == [None, None]


def test_a_project_before_its_first_round(own: Services) -> None:
    with own.store.write() as connection:
        connection.execute(insert(projects).values(id=8, connected_at=1.0, extra_params='{"nonsense": 1}'))
        live = report_view.live_view(connection, 8)
    told = report_view.live_results(own, live)
    assert (told["runs"], told["data"]["rounds"]) == ([{"arm": "project 8", "seed": 0, "rounds": []}], 0)
    assert told["pending"]["images"] == []
    with own.store.read() as connection, pytest.raises(NotFound, match="project 9 is not connected"):
        report_view.live_view(connection, 9)
