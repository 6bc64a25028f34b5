"""The holdout between rounds: more of it asked for, its labels corrected. The real Label Studio is in
tests/integration/test_holdout.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update

from strategies.uncertainty import MEASURES
from worker import holdout, rounds
from worker.artifacts import Artifacts, round_key
from worker.errors import BadRequest, NotFound
from worker.evaluation import Detections
from worker.holdout import (
    draw_more,
    grow_holdout,
    holdout_fingerprint,
    joined,
    remeasure_if_changed,
)
from worker.selection import ScoredTasks
from worker.settings import ProjectSettings
from worker.store import Store, events, get_project, projects, tasks
from worker.store import rounds as round_rows

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)
RNG = np.random.default_rng


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """Project 7: tasks 1..40; 1..4 are the holdout, 5..14 were trained on."""
    made = Store(store_url)
    made.migrate()
    with made.write() as connection:
        connection.execute(insert(projects).values(id=7, connected_at=0.0, label_config=CONFIG))
        rounds.remember_tasks(connection, 7, {number: f"{number}.jpg" for number in range(1, 41)})
        connection.execute(update(tasks).values(holdout=tasks.c.task_id <= 4))
        trained = (tasks.c.task_id > 4) & (tasks.c.task_id <= 14)
        connection.execute(update(tasks).where(trained).values(seen_round_id=1))
    yield made
    made.close()


def label(store: Store, *task_ids: int, updated_at: str = "2026-01-01", cancelled: bool = False) -> None:
    found = [
        {"id": 100 + task_id, "task": task_id, "updated_at": updated_at, "was_cancelled": cancelled}
        for task_id in task_ids
    ]
    with store.write() as connection:
        rounds.remember_annotations(connection, 7, found)


def ask(store: Store, n: Any, project_id: int = 7) -> int:
    with store.write() as connection:
        return rounds.ask_for_holdout(connection, project_id, n)


def held(store: Store) -> set[int]:
    with store.read() as connection:
        return {task_id for task_id, value in rounds.holdout_of(connection, 7).items() if value}


def kinds(store: Store) -> list[str]:
    with store.read() as connection:
        return list(connection.execute(select(events.c.kind).order_by(events.c.id)).scalars())


# --- asking -----------------------------------------------------------------------------------------------------------


def test_requests_add_up_and_can_be_withdrawn(store: Store) -> None:
    assert ask(store, 5) == 5
    assert ask(store, 3) == 8
    with store.write() as connection:
        assert get_project(connection, 7).more_holdout == 8
        assert rounds.withdraw_holdout(connection, 7) == 8
        assert rounds.withdraw_holdout(connection, 7) == 0
        assert get_project(connection, 7).more_holdout == 0
    assert kinds(store) == ["more holdout"] * 3


@pytest.mark.parametrize("n", [0, -1, 1.5, "5", None, True, 14, 10**12])
def test_what_cannot_be_asked_for(store: Store, n: Any) -> None:
    with pytest.raises(BadRequest):
        ask(store, n)
    with store.read() as connection:
        assert get_project(connection, 7).more_holdout == 0


def test_the_pool_keeps_half_of_itself(store: Store) -> None:
    # 4 are held, 10 were trained on; of the 26 left one is labelled, one skipped, one deleted, one unreadable
    label(store, 20)
    label(store, 21, cancelled=True)
    with store.write() as connection:
        rounds.mark_deleted(connection, 7, [22])
        connection.execute(update(tasks).where(tasks.c.task_id == 23).values(image_problem="gone"))
        assert rounds.count_drawable(connection, 7) == 22
    assert ask(store, 7) == 7
    with pytest.raises(BadRequest, match="5 more holdout images: the pool can spare 11, and 7 are asked for already"):
        ask(store, 5)
    assert ask(store, 4) == 11


def test_an_unknown_project_is_named(store: Store) -> None:
    with pytest.raises(NotFound, match="project 8"):
        ask(store, 1, 8)


# --- drawing ----------------------------------------------------------------------------------------------------------


def scored(embeddings: np.ndarray, first: int = 1) -> ScoredTasks:
    n = len(embeddings)
    measures = {name: np.full(n, 0.5) for name in MEASURES}
    return ScoredTasks(np.arange(first, first + n, dtype=np.int64), embeddings.astype(np.float32), measures)


def test_drawn_at_random_from_what_may_be_drawn() -> None:
    drawable = np.zeros(40, bool)
    drawable[20:] = True
    draws = [draw_more(scored(np.eye(40)), drawable, ~drawable, 6, 0.99, RNG(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0].task_ids != draws[2].task_ids
    assert len(draws[0].task_ids) == 6
    assert min(draws[0].task_ids) > 20
    assert (draws[0].twins, draws[0].notes) == ([], [])


def test_what_looks_like_an_image_trained_on_stays_out() -> None:
    pictures = np.repeat(np.eye(10), 2, axis=0)  # tasks 1 and 2 are one picture, 3 and 4 another
    trained = np.zeros(20, bool)
    trained[[0, 2]] = True
    found = draw_more(scored(pictures), ~trained, trained, 16, 0.99, RNG(0))
    assert (found.task_ids, found.notes, found.twins) == (list(range(5, 21)), [], [])
    found = draw_more(scored(pictures), ~trained, trained, 20, 0.99, RNG(0))  # nothing else is left
    assert found.task_ids == [2, 4, *range(5, 21)]
    assert found.notes == [
        "2 new holdout images look like images that are trained on",
        "20 more holdout images were asked for, and 18 could be drawn",
    ]


def test_a_network_that_finds_all_images_alike_does_not_keep_the_holdout_small() -> None:
    trained = np.zeros(20, bool)
    trained[:10] = True
    found = draw_more(scored(np.ones((20, 3))), ~trained, trained, 4, 0.99, RNG(0))
    assert len(found.task_ids) == 4
    assert min(found.task_ids) > 10
    assert found.twins == []  # or nothing would be left to label
    assert found.notes == ["4 new holdout images look like images that are trained on"]


def test_no_burst_is_split() -> None:
    pictures = np.repeat(np.eye(10), 3, axis=0)
    everything = np.ones(30, bool)
    found = draw_more(scored(pictures), everything, ~everything, 7, 0.99, RNG(3))
    assert len(found.task_ids) == 6
    scenes = [(task_id - 1) // 3 for task_id in found.task_ids]
    assert all(scenes.count(scene) == 3 for scene in scenes)
    assert found.twins == []


def test_a_burst_larger_than_what_is_wanted_is_left_whole() -> None:
    pictures = np.concatenate([np.repeat(np.eye(40)[:1], 8, axis=0), np.eye(40)[1:]])  # tasks 1 to 8 are one picture
    everything = np.ones(47, bool)
    for seed in range(10):
        found = draw_more(scored(pictures), everything, ~everything, 6, 0.99, RNG(seed))
        assert len(found.task_ids) == 6
        assert min(found.task_ids) > 8
        assert (found.twins, found.notes) == ([], [])


def test_a_chain_of_likeness_bars_what_it_leaves_behind() -> None:
    # each is like its neighbour (cosine .995), the ends are not like each other (cosine .98): groups need not be closed
    angles = np.array([0.0, 0.1, 0.2])
    pictures = np.column_stack([np.cos(angles), np.sin(angles)])
    everything = np.ones(3, bool)
    for seed in range(20):
        found = draw_more(scored(pictures), everything, ~everything, 3, 0.99, RNG(seed))
        assert found.task_ids == [1, 2, 3] or set(found.task_ids) | set(found.twins) >= {2}
        assert not set(found.task_ids) & set(found.twins)


@given(st.integers(0, 10**6), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_whatever_the_pictures(seed: int, wanted: int) -> None:
    rng = RNG(seed)
    n = int(rng.integers(1, 30))
    tasks_scored = scored(rng.normal(size=(n, 3)))
    drawable = rng.random(n) < 0.6
    trained = ~drawable & (rng.random(n) < 0.5)
    found = draw_more(tasks_scored, drawable, trained, wanted, 0.95, RNG(seed))
    may = set(tasks_scored.task_ids[drawable].tolist())
    assert len(found.task_ids) <= wanted
    assert set(found.task_ids) <= may
    assert set(found.twins) <= may - set(found.task_ids)


class FakeWork(SimpleNamespace):
    """A step's surroundings, as far as `grow_holdout` looks at them."""

    def __init__(self, store: Store) -> None:
        super().__init__(
            services=SimpleNamespace(store=store),
            project=SimpleNamespace(id=7),
            round=SimpleNamespace(number=2),
            settings=ProjectSettings(),
            lease=SimpleNamespace(hold=lambda: None),
        )


def grown(store: Store) -> tuple[dict[int, bool | None], list[str] | None]:
    with store.read() as connection:
        before = rounds.holdout_of(connection, 7)
        labelled = rounds.task_ids_of_annotations(connection, 7)
    tasks_scored = scored(np.eye(40))
    return grow_holdout(FakeWork(store), tasks_scored, np.isin(tasks_scored.task_ids, list(labelled)), before)  # type: ignore[arg-type]


def test_what_was_asked_for_joins_once(store: Store) -> None:
    label(store, 20, 21)
    ask(store, 6)
    now, notes = grown(store)
    new = held(store) - {1, 2, 3, 4}
    assert len(new) == 6
    assert new <= set(range(15, 41)) - {20, 21}
    assert {task_id for task_id, value in now.items() if value} == {1, 2, 3, 4} | new
    assert notes == []
    assert kinds(store) == ["more holdout", "holdout grew"]
    assert grown(store) == (now, None)  # the batch is made anew after a kill: nothing is drawn again
    assert held(store) == {1, 2, 3, 4} | new


def test_a_task_labelled_meanwhile_stays_outside(store: Store) -> None:
    with store.write() as connection:
        rounds.ask_for_holdout(connection, 7, 3)
        label_rows = [{"id": 116, "task": 16, "updated_at": "2026"}]
        rounds.remember_annotations(connection, 7, label_rows)
        rounds.remember_annotations(connection, 7, [{"id": 119, "task": 19, "updated_at": "2026"}])
        assert rounds.grow_holdout(connection, 7, [16, 17, 5], 3, twins=[18, 19, 6]) == [17]
    assert held(store) == {1, 2, 3, 4, 17}
    with store.read() as connection:  # 16 and 19 may look like 17; 5 and 6 were trained on before
        assert rounds.not_for_training(connection, 7) == {1, 2, 3, 4, 16, 17, 18, 19}


def test_what_is_withdrawn_while_it_is_drawn_does_not_join(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(store, 6)

    def draw_and_withdraw(*args: Any) -> Any:
        with store.write() as connection:
            rounds.withdraw_holdout(connection, 7)
        return draw_more(*args)

    monkeypatch.setattr(holdout, "draw_more", draw_and_withdraw)
    assert grown(store)[1] is None
    assert held(store) == {1, 2, 3, 4}


def test_what_is_asked_for_while_others_are_drawn_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(store, 6)

    def draw_and_ask(*args: Any) -> Any:
        ask(store, 2)
        return draw_more(*args)

    monkeypatch.setattr(holdout, "draw_more", draw_and_ask)
    grown(store)
    assert len(held(store)) == 4 + 6
    with store.read() as connection:
        assert get_project(connection, 7).more_holdout == 2


# --- measuring again --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_holdouts_annotations_and_of_what_judges(store: Store) -> None:
    def fingerprint() -> str:
        with store.read() as connection:
            return holdout_fingerprint(connection, 7)

    def set_to(text: str) -> None:
        with store.write() as connection:
            connection.execute(update(projects).values(extra_params=text))

    empty = fingerprint()
    label(store, 20)
    assert fingerprint() == empty  # not in the holdout
    label(store, 1)
    labelled = fingerprint()
    assert labelled != empty
    label(store, 1, updated_at="2026-01-02")
    corrected = fingerprint()
    assert corrected != labelled
    set_to('{"batch_size": 5}')
    assert fingerprint() == corrected
    set_to('{"worth_gain": 0.05}')
    assert fingerprint() != corrected


PIXELS = [50.0, 25.0, 150.0, 75.0]


def finds(*found: int, keys: tuple[int, ...] = (1, 2, 3, 4)) -> Detections:
    """A detector that found the box on these holdout tasks."""
    return Detections(
        keys=np.array(keys, np.int64),
        image_index=np.array([keys.index(task_id) for task_id in found], np.int64),
        boxes_xyxy=np.array([PIXELS] * len(found), np.float32).reshape(-1, 4),
        confidences=np.full(len(found), 0.9, np.float32),
        class_ids=np.zeros(len(found), np.int64),
        sizes=np.array([[200, 100]] * len(keys), np.int64),
    )


def exported(task_id: int, updated_at: str = "2026-01-01", boxes: int = 1) -> dict[str, Any]:
    value = {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["nut"]}
    region = {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}
    region |= {"original_width": 200, "original_height": 100, "image_rotation": 0}
    one = {"id": 100 + task_id, "updated_at": updated_at, "result": [region] * boxes}
    return {"id": task_id, "data": {"image": f"{task_id}.jpg"}, "annotations": [one]}


class FakeLabelStudio:
    """Answers one question. The real one is asked in tests/integration."""

    def __init__(self, *found: dict[str, Any]) -> None:
        self.found, self.asked = list(found), 0

    def export(self, project_id: int) -> list[dict[str, Any]]:
        self.asked += 1
        return self.found


@pytest.fixture
def own(store: Store, tmp_path: Any) -> Any:
    """Two measured rounds of project 7: the first found 1 and 2 of the holdout, the second 1, 2 and 3."""
    label(store, 1, 2, 3, 4)
    artifacts = Artifacts(str(tmp_path / "artifacts"), tmp_path / "cache")
    report = json.dumps({"names": {"0": "nut"}})
    with store.write() as connection:
        for number, seen in ((1, finds(1, 2)), (2, finds(1, 2, 3))):
            values = {"project_id": 7, "number": number, "state": "done", "opened_at": 0.0, "labels": 100 * number}
            connection.execute(insert(round_rows).values(id=number, map50=0.0, report=report, **values))
            artifacts.put(round_key(7, number, "detections.npz"), seen.save())
    label_studio = FakeLabelStudio(*(exported(task_id) for task_id in (1, 2, 3, 4)))
    return SimpleNamespace(store=store, artifacts=artifacts, label_studio=label_studio)


def figures(store: Store) -> list[tuple[float, int, float | None]]:
    with store.read() as connection:
        rows = connection.execute(select(round_rows).order_by(round_rows.c.number)).all()
    return [(row.map50, row.holdout_labels, row.gain) for row in rows]


def make_due(store: Store) -> None:
    with store.write() as connection:
        connection.execute(update(projects).values(remeasured_at=None))


def test_corrected_annotations_measure_every_round_again(own: Any, store: Store) -> None:
    assert remeasure_if_changed(own, 7) is True
    (first, _, _), (second, n, gain) = figures(store)
    assert (first, second) == pytest.approx((0.5, 0.75), abs=0.01)
    assert n == 4
    assert gain == pytest.approx(second - first)
    assert kinds(store) == ["holdout measured again"]
    make_due(store)
    assert remeasure_if_changed(own, 7) is False  # nothing changed
    own.label_studio.found[3] = exported(4, "2026-01-02", boxes=0)  # there is no box on the fourth after all
    label(store, 4, updated_at="2026-01-02")
    assert remeasure_if_changed(own, 7) is True
    (first, _, _), (second, _, gain) = figures(store)
    assert (first, second) == pytest.approx((2 / 3, 0.995), abs=0.01)
    with store.read() as connection:
        rows = connection.execute(select(round_rows.c.per_class, round_rows.c.verdict)).all()
    assert [json.loads(row.per_class)["nut"]["boxes"] for row in rows] == [3, 3]
    assert json.loads(rows[-1].verdict)["numbers"]["mean_gain"] == pytest.approx(gain, abs=1e-6)


def test_a_label_that_comes_during_the_export_is_measured_next_time(own: Any, store: Store) -> None:
    snapshot = own.label_studio.export

    def export(project_id: int) -> list[dict[str, Any]]:
        found = list(snapshot(project_id))
        label(store, 4, updated_at="2026-01-02")  # its webhook: the export does not have it
        return found

    own.label_studio.export = export
    assert remeasure_if_changed(own, 7) is True
    own.label_studio.export = snapshot
    own.label_studio.found[3] = exported(4, "2026-01-02", boxes=0)
    make_due(store)
    assert remeasure_if_changed(own, 7) is True
    assert [first for first, _, _ in figures(store)] == pytest.approx([2 / 3, 0.995], abs=0.01)


def test_not_more_often_than_every_five_minutes(own: Any, store: Store) -> None:
    assert remeasure_if_changed(own, 7) is True
    own.label_studio.found[3] = exported(4, "2026-01-02", boxes=0)
    label(store, 4, updated_at="2026-01-02")
    assert remeasure_if_changed(own, 7) is False
    assert own.label_studio.asked == 1
    make_due(store)
    assert remeasure_if_changed(own, 7) is True


def test_killed_in_the_middle_nothing_is_half_written(own: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    remeasure_if_changed(own, 7)
    before = figures(store)
    own.label_studio.found[3] = exported(4, "2026-01-02", boxes=0)
    make_due(store)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    label(store, 4, updated_at="2026-01-02")
    monkeypatch.setattr(holdout, "remember_measured", killed)  # after every figure was written, before the end
    with pytest.raises(KeyboardInterrupt):
        remeasure_if_changed(own, 7)
    assert figures(store) == before
    monkeypatch.undo()
    assert remeasure_if_changed(own, 7) is True
    assert figures(store) != before


def test_a_round_measured_meanwhile_is_not_overwritten(own: Any, store: Store) -> None:
    before = figures(store)

    def export(project_id: int) -> list[dict[str, Any]]:
        with store.write() as connection:
            values = {"project_id": 7, "number": 3, "state": "scoring", "opened_at": 0.0, "labels": 300, "map50": 0.9}
            connection.execute(insert(round_rows).values(id=3, **values))
        return list(own.label_studio.found)

    real, own.label_studio = own.label_studio, SimpleNamespace(export=export, found=own.label_studio.found)
    assert remeasure_if_changed(own, 7) is False
    assert figures(store)[:2] == before
    own.label_studio = real


def test_nothing_is_asked_of_label_studio_where_there_is_nothing_to_measure(own: Any, store: Store) -> None:
    with store.write() as connection:
        connection.execute(update(round_rows).values(map50=None))
    assert remeasure_if_changed(own, 7) is False
    with store.write() as connection:
        connection.execute(update(round_rows).values(map50=0.5))
        connection.execute(update(round_rows).where(round_rows.c.number == 2).values(state="training"))
    assert remeasure_if_changed(own, 7) is False  # a training measures at its end
    assert own.label_studio.asked == 0


def test_lost_detections_do_not_make_it_try_every_minute(own: Any, store: Store, tmp_path: Any) -> None:
    own.artifacts = Artifacts(str(tmp_path / "elsewhere"), tmp_path / "cache2")
    before = figures(store)
    assert remeasure_if_changed(own, 7) is True
    assert figures(store) == before
    make_due(store)
    assert remeasure_if_changed(own, 7) is False


def test_detections_of_later_holdout_images_join_the_earlier_ones() -> None:
    both = joined(finds(1, 3), finds(6, keys=(5, 6)))
    assert both.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert both.keys[both.image_index].tolist() == [1, 3, 6]
    assert both.sizes.shape == (6, 2)
