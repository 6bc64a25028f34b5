from __future__ import annotations

import math

import numpy as np
import pytest

from strategies import STRATEGIES, Pool, PoolInvalid, builtin, late_utility
from strategies.diversity import KMeansScale, coverage, k_center, kmeans_distance

SUM = {"mix": "sum", "alpha": 0.7, "beta": 0.3, "whiten": False}


def run_strategy(name, pool, batch_size, seed=0, **options):
    return STRATEGIES[name](pool, batch_size, np.random.default_rng(seed), options)


def test_random_depends_on_rng_and_sorted_keys_only(make_pool):
    one, other = make_pool(30, seed=1), make_pool(30, seed=2, labelled=0)
    first = run_strategy("random", one, 10)
    assert run_strategy("random", other, 10).positions.tolist() == first.positions.tolist()
    assert run_strategy("random", one, 10, seed=9).positions.tolist() != first.positions.tolist()
    assert sorted(first.utilities.tolist()) == pytest.approx([(rank + 1) / 30 for rank in range(30)])
    assert first.utilities[first.positions].tolist() == pytest.approx([(30 - rank) / 30 for rank in range(10)])


def test_random_is_uniform_enough(make_pool):
    pool = make_pool(10)
    firsts = [int(run_strategy("random", pool, 1, seed=seed).positions[0]) for seed in range(1000)]
    assert np.bincount(firsts, minlength=10).min() > 60  # 100 expected, 9.5 the deviation


@pytest.mark.parametrize("name", ["least_confidence", "margin", "entropy"])
def test_uncertainty_strategies_take_the_most_uncertain(name):
    pool = Pool.build([1, 2, 3, 4], {name: [0.2, 0.9, 0.9, 0.5]}, np.ones((4, 1)))
    selection = run_strategy(name, pool, 3)
    assert selection.positions.tolist() == [1, 2, 3]
    assert selection.utilities.tolist() == [0.2, 0.9, 0.9, 0.5]
    assert selection.parts["uncertainty"].tolist() == [0.2, 0.9, 0.9, 0.5]
    assert selection.late == {"uncertainty_scale": 1.0}


def test_a_sum_is_rescaled_over_the_pool():
    pool = Pool.build([1, 2], {"margin": [1.0, 4.0]}, np.ones((2, 1)))
    selection = run_strategy("margin", pool, 1)
    assert selection.utilities.tolist() == [0.25, 1.0]
    assert selection.late == {"uncertainty_scale": 4.0}


def test_a_strategy_asks_for_its_measure():
    pool = Pool.build([1], {"margin": [0.5]}, [[1.0]])
    for name in ("entropy", "hybrid", "hybrid_coverage"):
        with pytest.raises(PoolInvalid, match="it has: margin"):
            run_strategy(name, pool, 1)
    assert run_strategy("hybrid", pool, 1, measure="margin").parts["uncertainty"].tolist() == [0.5]


def test_kmeans_takes_the_farthest_from_their_centroid(make_pool):
    pool = make_pool(80)
    selection = run_strategy("kmeans", pool, 4, n_clusters=5)
    expected = kmeans_distance(pool.embeddings, 5)
    assert selection.utilities == pytest.approx(expected)
    assert selection.positions.tolist() == np.argsort(-expected, kind="stable")[:4].tolist()


def test_hybrid_by_hand(monkeypatch):
    # centroids at 0 and 10, range 0 to 4: distances 0, 1, 2, 4, 3, 0 -> diversity 0 .25 .5 1 .75 0
    scale = KMeansScale(np.array([[0.0], [10.0]]), 0.0, 4.0)
    monkeypatch.setattr(builtin, "fit_kmeans", lambda embeddings, n_clusters: scale)
    pool = Pool.build(
        range(6), {"least_confidence": [0.1, 0.9, 0.8, 0.3, 0.2, 0.5]}, [[0.0], [1], [2], [14], [13], [10]]
    )
    selection = run_strategy("hybrid", pool, 3)
    assert selection.parts["uncertainty"].tolist() == [0.1, 0.9, 0.8, 0.3, 0.2, 0.5]
    assert selection.parts["diversity"].tolist() == [0, 0.25, 0.5, 1, 0.75, 0]
    assert selection.utilities == pytest.approx([0.07, 0.705, 0.71, 0.51, 0.365, 0.35])
    assert selection.positions.tolist() == [2, 1, 3]
    assert set(selection.late) == {"uncertainty_scale", "centroids", "distance_low", "distance_high"}


def test_hybrid_leaves_near_duplicates_out_unless_told(make_pool):
    fields = {
        "uncertainty": {"least_confidence": [0.9, 0.8, 0.1]},
        "embeddings": [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
        "labelled_embeddings": [],
        "duplicate_groups": [0, 0, 1],
    }
    pool = make_pool(3, **fields)
    assert run_strategy("hybrid", pool, 2).positions.tolist() == [0, 2]
    assert run_strategy("hybrid", pool, 2, suppress_duplicates=False).positions.tolist() == [0, 1]
    assert run_strategy("hybrid", pool, 3).positions.tolist() == [0, 2, 1]


def test_committee_is_the_hybrid_of_disagreement(monkeypatch):
    # as test_hybrid_by_hand: diversity 0 .25 .5 1; disagreements up to 1.6 are divided by it: .25 1 .5 0
    scale = KMeansScale(np.array([[0.0], [10.0]]), 0.0, 4.0)
    monkeypatch.setattr(builtin, "fit_kmeans", lambda embeddings, n_clusters: scale)
    pool = Pool.build(range(4), {}, [[0.0], [1], [2], [14]], disagreement=[0.4, 1.6, 0.8, 0.0])
    selection = run_strategy("committee", pool, 2)
    assert selection.parts["uncertainty"].tolist() == [0.25, 1, 0.5, 0]
    assert selection.parts["diversity"].tolist() == [0, 0.25, 0.5, 1]
    assert selection.utilities == pytest.approx([0.175, 0.775, 0.5, 0.3])
    assert selection.positions.tolist() == [1, 2]
    assert selection.late["uncertainty_scale"] == 1.6
    alone = run_strategy("committee", pool, 4, alpha=1.0, beta=0.0)
    assert alone.utilities.tolist() == [0.25, 1, 0.5, 0]
    assert alone.positions.tolist() == [1, 2, 0, 3]


def test_committee_without_a_committee_is_refused(make_pool):
    with pytest.raises(PoolInvalid, match=r"Set committee_size \(at least 3\)"):
        run_strategy("committee", make_pool(disagreement=None), 3)
    assert len(run_strategy("hybrid", make_pool(disagreement=None), 3).positions) == 3  # nobody else needs one


def test_committee_leaves_near_duplicates_out(make_pool):
    pool = make_pool(3, 3, disagreement=[0.9, 0.8, 0.1], embeddings=np.eye(3), duplicate_groups=[0, 0, 1])
    assert run_strategy("committee", pool, 2).positions.tolist() == [0, 2]
    assert run_strategy("committee", pool, 2, suppress_duplicates=False).positions.tolist() == [0, 1]


def test_k_center_utilities_by_hand():
    pool = Pool.build(range(5), {}, [[0.0], [1], [2], [3], [10]], [[9.0]])
    selection = run_strategy("k_center", pool, 2)
    assert selection.positions.tolist() == [0, 3]  # at distances 9 and 3
    # outside: distances 1, 1, 1 of 3, halved
    assert selection.utilities == pytest.approx([1.0, 1 / 6, 1 / 6, 0.75, 1 / 6])
    assert selection.parts["diversity"] == pytest.approx([1.0, 1 / 9, 1 / 9, 3 / 9, 1 / 9])
    assert selection.late["distance_high"] == 3.0
    assert selection.late["anchors"].tolist() == [[9.0], [0.0], [3.0]]


def test_k_center_strategy_is_the_function(make_pool):
    pool = make_pool(200)
    expected = k_center(pool.embeddings, 20, pool.labelled_embeddings).tolist()
    assert run_strategy("k_center", pool, 20).positions.tolist() == expected


def test_coverage_is_unweighted_and_hybrid_coverage_weighted(make_pool):
    pool = make_pool(100)
    points, labelled, weights = pool.embeddings, pool.labelled_embeddings, pool.uncertainty_of("entropy")
    plain = run_strategy("coverage", pool, 10)
    weighted = run_strategy("hybrid_coverage", pool, 10, measure="entropy")
    assert plain.positions.tolist() == coverage(points, 10, None, labelled).tolist()
    assert weighted.positions.tolist() == coverage(points, 10, weights, labelled).tolist()
    assert plain.positions.tolist() != weighted.positions.tolist()
    assert set(plain.parts) == {"diversity"}
    assert set(weighted.parts) == {"uncertainty", "diversity"}


def test_coverage_utilities_by_hand():
    # three copies of one direction are covered first; of the others, at a right angle, 1 - e^-2 is left
    pool = Pool.build(range(4), {"least_confidence": [0.5, 1, 1, 1]}, [[0.0, 1], [1, 0], [1, 0], [1, 0]])
    left = 1 - math.exp(-2)
    plain = run_strategy("coverage", pool, 1)
    assert plain.positions.tolist() == [1]
    assert plain.utilities == pytest.approx([left / 2, 1, 0, 0])
    assert plain.parts["diversity"] == pytest.approx([left, 1, 0, 0])
    weighted = run_strategy("hybrid_coverage", pool, 2)
    assert weighted.positions.tolist() == [1, 0]
    assert weighted.utilities == pytest.approx([0.75, 1, 0, 0])
    assert weighted.parts["diversity"] == pytest.approx([left, 1, 0, 0])
    assert run_strategy("hybrid_coverage", pool, 1).utilities[0] == pytest.approx(0.5 * 0.5 * left)


def test_coverage_with_few_references_draws_them_from_rng(make_pool):
    pool = make_pool(100)
    picks = {tuple(run_strategy("coverage", pool, 5, seed=s, max_references=3).positions.tolist()) for s in range(4)}
    assert len(picks) > 1


def test_hybrid_k_center_by_hand():
    # labelled at 9; distances 9, 8, 7, 6, 1 of 9
    pool = Pool.build(range(5), {"least_confidence": [0.0, 0.9, 0.2, 0.9, 1.0]}, [[0.0], [1], [2], [3], [10]], [[9.0]])
    selection = run_strategy("hybrid_k_center", pool, 2, **SUM)
    # row 1 has .63 + .3 * 8/9 = .90 and is taken; then row 3 falls from .83 to .63 + .3 * 2/9 = .70, and row 4 has .73
    assert selection.positions.tolist() == [1, 4]
    rest = [0.3 / 9, 0.14 + 0.3 / 9, 0.63 + 0.3 * 2 / 9]
    assert selection.utilities == pytest.approx([rest[0] / 2, 1, rest[1] / 2, rest[2] / 2, 0.75])
    assert selection.parts["diversity"] == pytest.approx([1 / 9, 8 / 9, 1 / 9, 2 / 9, 1 / 9])
    assert selection.parts["uncertainty"] == pytest.approx([0, 0.9, 0.2, 0.9, 1.0])
    assert selection.late["distance_high"] == 9.0


def test_hybrid_k_center_as_a_product_by_hand():
    # labelled at 9; distances 9, 8, 7, 6, 1 of 9
    pool = Pool.build(range(5), {"least_confidence": [0.0, 0.9, 0.2, 0.9, 1.0]}, [[0.0], [1], [2], [3], [10]], [[9.0]])
    options = {"mix": "product", "alpha": 0.5, "beta": 1.0, "whiten": False}
    selection = run_strategy("hybrid_k_center", pool, 2, **options)
    # row 1 has .95 * 8/9 = .84; then row 3 falls from .63 to .95 * 2/9 = .21 and still is the best: row 4 has 1/9
    assert selection.positions.tolist() == [1, 3]
    left = [0.0, 1.0, 0.2**0.5 / 9, 0.75, 1 / 9]
    assert selection.utilities == pytest.approx([left[0], 1, left[2] / 2, 0.75, left[4] / 2])
    late = late_utility("hybrid_k_center", selection.late, pool.uncertainty, pool.embeddings, options)
    assert late[[0, 2, 4]] == pytest.approx(selection.utilities[[0, 2, 4]])


def test_hybrid_k_center_between_its_ends(make_pool):
    pool = make_pool(200)
    farthest = run_strategy("hybrid_k_center", pool, 20, **(SUM | {"alpha": 0.0, "beta": 1.0}))
    assert farthest.positions.tolist() == k_center(pool.embeddings, 20, pool.labelled_embeddings).tolist()
    surest_last = run_strategy("hybrid_k_center", pool, 20, **(SUM | {"alpha": 1.0, "beta": 0.0}))
    assert surest_last.positions.tolist() == run_strategy("least_confidence", pool, 20).positions.tolist()


def test_hybrid_k_center_with_nothing_labelled_measures_from_its_first_pick():
    pool = Pool.build(range(4), {"least_confidence": [0.5, 1.0, 1.0, 1.0]}, [[0.0], [1], [1], [5]])
    selection = run_strategy("hybrid_k_center", pool, 4, **SUM)
    assert selection.positions.tolist() == [1, 3, 2, 0]  # the copy of the first still comes before the surer one
    assert selection.late["distance_high"] == 4.0
    assert selection.parts["diversity"] == pytest.approx([0.25, 1, 0, 1])


def test_hybrid_k_center_spreads_where_hybrid_takes_one_burst():
    """Ten frames of one scene far from everything: uncertain all, and no near-duplicates to the threshold."""
    rng = np.random.default_rng(0)
    burst = np.array([10.0, 0.0]) + rng.normal(scale=0.3, size=(10, 2))
    others = rng.normal(scale=2.0, size=(40, 2))
    pool = Pool.build(range(50), {"least_confidence": np.ones(50)}, np.concatenate([burst, others]))
    for options in (SUM, {}):
        assert (run_strategy("hybrid_k_center", pool, 10, **options).positions < 10).sum() <= 2
