from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from strategies import STRATEGIES
from strategies.uncertainty import MEASURES
from worker.publishing import choose
from worker.selection import ScoredTasks, draw_holdout, first_batch, generator, interleave, next_batch
from worker.settings import ProjectSettings


def scored(task_ids: list[int], embeddings: NDArray[np.float32], uncertainty: list[float] | None = None) -> ScoredTasks:
    values = np.array(uncertainty or [0.5] * len(task_ids), np.float64)
    return ScoredTasks(np.array(task_ids, np.int64), embeddings, dict.fromkeys(MEASURES, values))


def apart(n: int, size: int = 64) -> NDArray[np.float32]:
    """Rows at right angles: nothing is like anything else."""
    return np.eye(n, size, dtype=np.float32)


def nobody(n: int) -> NDArray[np.bool_]:
    return np.zeros(n, bool)


RNG = 7


def test_the_holdout_has_the_size_asked_for_and_is_the_same_for_everybody() -> None:
    tasks = scored(list(range(100, 140)), apart(40))
    draws = [draw_holdout(tasks, nobody(40), 8, 0.99, np.random.default_rng(RNG)) for _ in range(2)]
    chosen, notes = draws[0]
    assert draws[0] == draws[1]
    assert notes == []
    assert len(chosen) == 8
    assert chosen <= set(range(100, 140))
    assert chosen != draw_holdout(tasks, nobody(40), 8, 0.99, np.random.default_rng(RNG + 1))[0]


def test_no_burst_is_split() -> None:
    bursts = np.repeat(apart(10), 3, axis=0)  # ten scenes, three frames each
    for seed in range(20):
        chosen, notes = draw_holdout(scored(list(range(30)), bursts), nobody(30), 8, 0.99, np.random.default_rng(seed))
        assert {task_id // 3 for task_id in chosen} == {scene for scene in range(10) if {3 * scene} <= chosen}
        assert len(chosen) == 6  # a third whole scene would be nine
        assert notes == []


def test_a_burst_larger_than_the_holdout_is_said_and_split() -> None:
    embeddings = np.repeat(apart(1), 30, axis=0)
    chosen, (note,) = draw_holdout(scored(list(range(30)), embeddings), nobody(30), 5, 0.99, np.random.default_rng(RNG))
    assert len(chosen) == 5
    assert note.startswith("30 images look alike")


def test_one_burst_larger_than_the_holdout_splits_no_other() -> None:
    pictures = np.concatenate([np.repeat(apart(31)[:1], 20, axis=0), np.repeat(apart(31)[1:], 2, axis=0)])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        chosen, notes = draw_holdout(scored(list(range(80)), pictures), nobody(80), 8, 0.99, rng)
        assert len(chosen) == 8
        assert min(chosen) >= 20  # the burst of twenty is for training
        assert {task_id ^ 1 for task_id in chosen} == chosen  # the other frame of each scene is there too
        assert notes == []


def test_labelled_tasks_come_first_up_to_half_of_them() -> None:
    labelled = nobody(40)
    labelled[:6] = True
    chosen, _ = draw_holdout(scored(list(range(40)), apart(40)), labelled, 10, 0.99, np.random.default_rng(RNG))
    assert len(chosen & set(range(6))) == 3
    assert len(chosen) == 10
    everyone = np.ones(40, bool)
    chosen, _ = draw_holdout(scored(list(range(40)), apart(40)), everyone, 10, 0.99, np.random.default_rng(RNG))
    assert len(chosen) == 10


@pytest.mark.parametrize("size", [0, -1])
def test_no_holdout_was_asked_for(size: int) -> None:
    assert draw_holdout(scored([1, 2], apart(2)), nobody(2), size, 0.99, np.random.default_rng(RNG)) == (set(), [])


def test_nothing_to_draw_from() -> None:
    assert draw_holdout(scored([], apart(0)), nobody(0), 5, 0.99, np.random.default_rng(RNG)) == (set(), [])


def test_interleaving_by_hand() -> None:
    assert interleave([1, 2, 3, 4], [10, 20]) == [1, 10, 2, 3, 20, 4]
    assert interleave([1], [10, 20, 30]) == [10, 1, 20, 30]
    assert interleave([], [10, 20]) == [10, 20]
    assert interleave([1, 2], []) == [1, 2]
    assert interleave([], []) == []


@given(st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_interleaving_keeps_both_orders_and_spreads_them(n_first: int, n_second: int) -> None:
    first, second = list(range(n_first)), list(range(100, 100 + n_second))
    both = interleave(first, second)
    assert [value for value in both if value < 100] == first
    assert [value for value in both if value >= 100] == second
    for done, value in itertools.product(range(len(both) + 1), [n_second]):
        share = sum(1 for found in both[:done] if found >= 100)
        assert abs(share - done * value / max(len(both), 1)) <= 1


def test_the_first_batch_is_a_seed_and_the_whole_holdout() -> None:
    pool = scored(list(range(20)), apart(20))
    batch = first_batch(pool, scored([], apart(0)), [90, 91, 92], ProjectSettings(batch_size=6), 7)
    assert len(batch.task_ids) == 9
    assert [task_id for task_id in batch.task_ids if task_id >= 90] == [90, 91, 92]
    assert len(set(batch.task_ids)) == 9
    assert batch.strategy == "coverage"
    assert sorted(batch.utilities) == list(range(20))
    again = first_batch(pool, scored([], apart(0)), [90, 91, 92], ProjectSettings(batch_size=6), 7)
    assert (again.task_ids, again.utilities, again.parts) == (batch.task_ids, batch.utilities, batch.parts)


def test_a_project_that_compares_with_random_gets_a_random_seed_too() -> None:
    pool = scored(list(range(20)), apart(20))
    batch = first_batch(pool, scored([], apart(0)), [], ProjectSettings(strategy="random", batch_size=6), 7)
    assert batch.strategy == "random"
    assert len(batch.task_ids) == 6


def test_the_most_uncertain_come_first() -> None:
    uncertainty = [0.1, 0.9, 0.3, 0.7, 0.5]
    pool = scored([11, 12, 13, 14, 15], apart(5), uncertainty)
    chosen = ProjectSettings(strategy="least_confidence", batch_size=3)
    batch = next_batch(pool, scored([], apart(0)), [], chosen, 7, 1)
    assert batch.task_ids == [12, 14, 15]
    assert sorted(batch.utilities, key=lambda task_id: -batch.utilities[task_id]) == [12, 14, 15, 13, 11]


def test_near_duplicates_of_one_another_and_of_labelled_images_are_left_out() -> None:
    embeddings = apart(4)[[0, 0, 1, 2]]  # 11 and 12 are the same image; 13 is one that is labelled already
    pool = scored([11, 12, 13, 14], embeddings, [0.9, 0.8, 0.7, 0.1])
    known = scored([50], apart(4)[[1]])
    chosen = ProjectSettings(
        strategy="least_confidence", strategy_options={"suppress_duplicates": True}, batch_size=2
    )
    assert next_batch(pool, known, [], chosen, 7, 1).task_ids == [11, 14]
    loose = chosen.model_copy(update={"near_duplicate_threshold": 1.0})  # then nothing counts as a duplicate
    assert next_batch(pool, known, [], loose, 7, 1).task_ids == [11, 12]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_gives_a_batch_and_survives_a_small_or_empty_pool(strategy: str) -> None:
    chosen = ProjectSettings(strategy=strategy, batch_size=4, committee_size=3)
    rng = np.random.default_rng(RNG)
    pool = scored(list(range(10)), rng.normal(size=(10, 8)).astype(np.float32), rng.uniform(size=10).tolist())
    pool = replace(pool, disagreement=rng.uniform(size=10))
    known = scored([50, 51], rng.normal(size=(2, 8)).astype(np.float32))
    batch = next_batch(pool, known, [60], chosen, 7, 2)
    assert len(batch.task_ids) == 5
    assert batch.task_ids.count(60) == 1
    assert set(batch.utilities) == set(range(10))
    assert all(0.0 <= value <= 1.0 for value in batch.utilities.values())
    assert len(next_batch(pool.rows(np.arange(10) < 2), known, [], chosen, 7, 2).task_ids) == 2
    empty = next_batch(pool.rows(nobody(10)), known, [60], chosen, 7, 2)
    assert (empty.task_ids, empty.utilities, empty.notes) == ([60], {}, ["the pool is empty"])


def test_random_choices_differ_by_project_round_purpose_and_seed_and_by_nothing_else() -> None:
    def draw(seed: int, project: int, number: int, purpose: str) -> float:
        return float(generator(ProjectSettings(seed=seed), project, number, purpose).random())

    assert draw(0, 7, 1, "select") == draw(0, 7, 1, "select")
    others = [draw(1, 7, 1, "select"), draw(0, 8, 1, "select"), draw(0, 7, 2, "select"), draw(0, 7, 1, "seed")]
    assert len({draw(0, 7, 1, "select"), *others}) == 5


def test_a_batch_names_the_look_alikes_it_stands_for() -> None:
    bursts = np.repeat(apart(4), [3, 1, 2, 1], axis=0)  # tasks 0 1 2 are alike, 3 alone, 4 5 alike, 6 alone
    uncertainty = [0.5, 0.9, 0.4, 0.3, 0.6, 0.7, 0.1]
    settings = ProjectSettings(batch_size=2, strategy_options={"alpha": 1.0, "beta": 0.0})
    batch = next_batch(scored(list(range(7)), bursts, uncertainty), scored([], apart(0)), [], settings, 7, 1)
    assert batch.task_ids == [1, 5]
    assert batch.alike == {1: [0, 2], 5: [4]}


def test_of_two_look_alikes_in_a_batch_the_first_stands_for_the_others() -> None:
    bursts = np.repeat(apart(2), [3, 1], axis=0)
    settings = ProjectSettings(batch_size=2, strategy="least_confidence")
    batch = next_batch(scored([10, 11, 12, 13], bursts, [0.5, 0.9, 0.8, 0.1]), scored([], apart(0)), [], settings, 7, 1)
    assert batch.task_ids == [11, 12]
    assert batch.alike == {11: [10]}


@pytest.mark.parametrize("labelled", [[2], [1, 2], [2, 3]])
def test_distances_are_measured_to_what_is_trained_on_alone(labelled: list[int]) -> None:
    """1 is of the holdout, 3 looks like it and is barred; 2 is trained on. 11 lies near 1 and 3, 12 near 2."""
    places = [[1, 0, 0], [0, 1, 0], [1, 0, 0.01], [0.9, 0, 0.44], [0, 0.9, 0.44], [1, 0, 0]]
    tasks = scored([1, 2, 3, 11, 12, 13], np.array(places, np.float32))
    settings = ProjectSettings(strategy="k_center", batch_size=1, strategy_options={"suppress_duplicates": True})
    batch = choose(tasks, np.isin(tasks.task_ids, labelled), {1: True}, {1, 3}, settings, 7, 1)
    assert [task_id for task_id in batch.task_ids if task_id != 1] == [11]  # not 13: a copy of the holdout's image
    assert batch.late_arrays["anchors"].tolist() == tasks.embeddings[[1, 3]].tolist()  # 2, and what was chosen


def test_the_first_seed_is_as_diverse_as_if_there_were_no_holdout() -> None:
    tasks = scored(list(range(60)), np.random.default_rng(RNG).normal(size=(60, 4)).astype(np.float32))
    held = {task_id: task_id < 30 for task_id in range(60)}
    settings = ProjectSettings(batch_size=8, near_duplicate_threshold=1.0)
    batch = choose(tasks, nobody(60), held, set(range(30)), settings, 7, 0)
    alone = first_batch(tasks.rows(tasks.task_ids >= 30), tasks.rows(nobody(60)), [], settings, 7)
    assert [task_id for task_id in batch.task_ids if task_id >= 30] == alone.task_ids
    assert sorted(batch.task_ids)[:30] == list(range(30))
