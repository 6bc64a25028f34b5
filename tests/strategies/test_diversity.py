from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import MiniBatchKMeans

from strategies import diversity
from strategies.diversity import (
    KMeansScale,
    best_kernel,
    coverage,
    coverage_bandwidth,
    fit_kmeans,
    k_center,
    kmeans_distance,
    near_duplicate_groups,
    near_duplicates_of_labelled,
    nearest_distances,
    unit_rows,
    walk_coverage,
    walk_k_center,
)
from strategies.errors import InputInvalid


def matrices(max_rows=12, min_rows=1):
    # few distinct values: ties and exact duplicates are the rule
    return hnp.arrays(np.float32, st.tuples(st.integers(min_rows, max_rows), st.just(3)), elements=st.integers(-3, 3))


def k_center_oracle(embeddings, k, labelled):
    points, taken = embeddings.astype(np.float64), []
    for _ in range(min(k, len(points))):
        anchors = [*labelled.astype(np.float64), *points[taken]]
        best, best_distance = -1, -1.0
        for row in range(len(points)):
            if row not in taken:
                distance = min((((points[row] - anchor) ** 2).sum() for anchor in anchors), default=math.inf)
                if distance > best_distance:
                    best, best_distance = row, distance
        taken.append(best)
    return taken


def kernel_matrix(one, other, bandwidth):
    one, other = unit_rows(one.astype(np.float64)), unit_rows(other.astype(np.float64))
    return np.exp(-(((one[:, None] - other[None]) ** 2).sum(axis=2)) / bandwidth**2)


def coverage_gains(embeddings, order, utilities, labelled):
    """What each row of the order adds, straight from the definition."""
    bandwidth = coverage_bandwidth(labelled)
    kernel = kernel_matrix(embeddings, embeddings, bandwidth)
    covered = kernel_matrix(labelled, embeddings, bandwidth).max(axis=0, initial=0.0)
    gains, best = [], []
    for turn, position in enumerate(order):
        gain_of = (np.maximum(kernel - covered, 0) * utilities).sum(axis=1)
        gains.append(gain_of[position])
        best.append(max(gain_of[row] for row in range(len(embeddings)) if row not in order[:turn]))
        covered = np.maximum(covered, kernel[position])
    return np.array(gains), np.array(best)


def large_pool(kind, size, seed):
    """(size, 40) float32, wider than the sketch."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(size, 40))
    pools = {
        "spread": spread,
        "clusters": rng.normal(size=(5, 40))[rng.integers(0, 5, size)] + 0.05 * spread + 1,
        "lines": spread[:, :1] * rng.normal(size=40),  # one direction; every row has its opposite or its like
        "equal": np.repeat(spread[:1], size, axis=0),
        "zeros": spread * (rng.random((size, 1)) < 0.5),
    }
    return pools[kind].astype(np.float32)


def with_large_path(run, **constants):
    """What `run` gives when pools of any size take the float32 path, in many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_SMALL": 0, "_BLOCK": 3000, **constants}.items():
            patch.setattr(diversity, name, value)
        return run()


# --- k-means


def test_kmeans_distance_is_the_documented_formula():
    points = np.random.default_rng(1).normal(size=(300, 5))
    model = MiniBatchKMeans(n_clusters=50, batch_size=512, n_init=3, random_state=42).fit(points)
    distances = np.linalg.norm(points - model.cluster_centers_[model.labels_], axis=1)
    expected = (distances - distances.min()) / (distances.max() - distances.min())
    assert kmeans_distance(points) == pytest.approx(expected, abs=1e-9)


def test_kmeans_of_a_large_pool_learns_from_a_draw_and_measures_all(monkeypatch):
    points = np.repeat([[0.0, 0.0], [10.0, 0.0]], 30, axis=0)  # any ten of both kinds know both centroids
    points[59] = [10.0, 4.0]
    monkeypatch.setattr(diversity, "_KMEANS_ROWS", 20)
    fit = fit_kmeans(points, 2)
    drawn = np.random.default_rng(42).choice(60, 20, replace=False)
    assert 59 not in drawn
    assert sorted(fit.centroids.tolist()) == [[0.0, 0.0], [10.0, 0.0]]
    assert fit.diversity(points).tolist() == [0.0] * 59 + [1.0]
    assert (fit.low, fit.high) == (0.0, 4.0)


def test_kmeans_scale_by_hand():
    # to the nearer of 0 and 10: distances 0, 3, 1, 5, 6 on the range 1 to 5
    scale = KMeansScale(np.array([[0.0], [10.0]]), 1.0, 5.0)
    assert scale.diversity([[0.0], [3.0], [11.0], [5.0], [16.0]]).tolist() == [0.0, 0.5, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "points", [np.ones((1, 3)), np.full((7, 3), 0.1), np.zeros((4, 2)), np.full((200, 8), 1e4 / 3)]
)
def test_kmeans_distance_of_equal_rows_is_zero(points):
    assert kmeans_distance(points).tolist() == [0.0] * len(points)


def test_kmeans_distance_of_an_empty_pool():
    assert kmeans_distance(np.zeros((0, 4))).tolist() == []
    assert fit_kmeans([]).diversity([[1.0, 2.0]]).tolist() == [0.0]


@settings(max_examples=10, deadline=None)
@given(matrices(), st.integers(1, 60))
def test_kmeans_distance_stays_in_bounds(points, clusters):
    values = kmeans_distance(points, clusters)
    assert values.shape == (len(points),)
    assert values.min() >= 0
    assert values.max() <= 1


# --- k-center


def test_k_center_by_hand():
    points = np.array([[0.0], [1], [2], [3], [10]])
    assert k_center(points, 3).tolist() == [0, 4, 3]
    assert k_center(points, 2, labelled=[[9.0]]).tolist() == [0, 3]  # 10 is near the labelled 9
    assert k_center(points, 5, labelled=[[9.0]]).tolist() == [0, 3, 1, 2, 4]


def test_k_center_never_returns_a_labelled_row_id():
    # the trap: with ids and positions mixed, position 0 (a copy of the labelled point) would be taken first
    labelled = np.array([[5.0, 5.0], [0.0, 0.0]])
    points = np.array([[5.0, 5.0], [0.0, 0.0], [9.0, 9.0]])
    assert k_center(points, 1, labelled).tolist() == [2]


def test_walk_k_center_tells_distances():
    walk = walk_k_center(np.array([[0.0], [1], [2], [3], [10]]), 2)
    assert walk.pick_distances.tolist() == [math.inf, 10.0]
    assert walk.distances.tolist() == [0, 1, 2, 3, 0]


@settings(max_examples=80, deadline=None)
@given(matrices(), st.integers(1, 15), matrices(4, min_rows=0))
def test_k_center_equals_brute_force(points, k, labelled):
    assert k_center(points, k, labelled).tolist() == k_center_oracle(points, k, labelled)


def test_k_center_on_a_large_float32_pool_equals_brute_force(monkeypatch):
    points = (np.random.default_rng(3).normal(size=(120, 16)) + 5).astype(np.float32)
    expected = k_center_oracle(points, 30, points[:3] + 1)
    monkeypatch.setattr(diversity, "_SMALL", 0)  # the float32 path
    monkeypatch.setattr(diversity, "_BLOCK", 64)  # many blocks
    assert k_center(points, 30, points[:3] + 1).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["spread", "clusters", "lines", "equal", "zeros"]),
    st.integers(1, 60),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_k_center_through_the_sketch_takes_a_farthest_row(kind, size, labelled, seed):
    points = large_pool(kind, size, seed)
    anchors = points[:labelled].astype(np.float64) + 0.5
    order = with_large_path(lambda: k_center(points, 20, anchors)).tolist()
    assert len(set(order)) == min(20, size)
    rows = points.astype(np.float64)
    scale = max(1.0, float((rows**2).sum(axis=1).max()))
    nearest = np.full(size, math.inf)
    for anchor in anchors:
        nearest = np.minimum(nearest, ((rows - anchor) ** 2).sum(axis=1))
    for turn, position in enumerate(order):
        left = [row for row in range(size) if row not in order[:turn]]
        if math.isfinite(nearest[position]):
            assert nearest[position] >= nearest[left].max() - 1e-5 * scale
        else:
            assert position == 0
        nearest = np.minimum(nearest, ((rows - rows[position]) ** 2).sum(axis=1))


def test_k_center_spreads_within_twice_the_best_radius():
    # Gonzalez 1985: greedy is a 2-approximation
    points = np.random.default_rng(5).normal(size=(9, 2))
    pairwise = np.linalg.norm(points[:, None] - points[None], axis=2)
    best = min(
        pairwise[[a, b, c]].min(axis=0).max() for a in range(9) for b in range(a + 1, 9) for c in range(b + 1, 9)
    )
    assert pairwise[k_center(points, 3)].min(axis=0).max() <= 2 * best


# --- coverage


def test_coverage_by_hand():
    # two directions, three copies of the first: covering it first is worth more
    points = np.array([[0.0, 1], [1, 0], [1, 0], [1, 0]])
    assert coverage(points, 2).tolist() == [1, 0]
    assert coverage(points, 2, utilities=[5, 1, 1, 1]).tolist() == [0, 1]
    # with the first direction labelled twice and one bandwidth of sqrt 2, the other remains
    assert coverage(points, 1, labelled=[[2.0, 0.0]]).tolist() == [0]


def test_coverage_gain_by_hand():
    walk = walk_coverage(np.array([[0.0, 1], [1, 0]]), 2)
    far = math.exp(-2)  # |x - y|^2 = 2, h = 1
    assert walk.bandwidth == 1.0
    assert walk.gains == pytest.approx([1 + far, 1 - far])


@settings(max_examples=80, deadline=None)
@given(
    matrices(),
    st.integers(1, 14),
    matrices(4, min_rows=0),
    st.lists(st.floats(0, 1).filter(lambda value: value == 0 or value > 1e-3), min_size=12, max_size=12),
)
def test_coverage_is_greedy_with_falling_gains_and_prefixes(points, k, labelled, utilities):
    weights = np.array(utilities)[: len(points)]
    walk = walk_coverage(points, k, weights, labelled)
    order = walk.positions.tolist()
    assert len(set(order)) == min(k, len(points))
    gains, best = coverage_gains(points, order, weights if weights.any() else np.ones(len(points)), labelled)
    assert walk.gains == pytest.approx(gains, abs=1e-6)
    assert gains == pytest.approx(best, abs=1e-6)  # nothing else would have added more
    assert (np.diff(walk.gains) <= 1e-9).all()
    for shorter in range(1, len(order)):
        assert coverage(points, shorter, weights, labelled).tolist() == order[:shorter]


def test_coverage_on_the_float32_path_equals_float64(monkeypatch):
    rng = np.random.default_rng(3)
    points, labelled, weights = rng.normal(size=(150, 16)) + 1, rng.normal(size=(20, 16)) + 1, rng.random(150)
    expected = walk_coverage(points, 40, weights, labelled)
    monkeypatch.setattr(diversity, "_SMALL", 0)
    monkeypatch.setattr(diversity, "_BLOCK", 64)
    result = walk_coverage(points.astype(np.float32), 40, weights, labelled)
    assert result.positions.tolist() == expected.positions.tolist()
    assert result.gains == pytest.approx(expected.gains, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["spread", "clusters", "lines", "equal", "zeros"]),
    st.integers(1, 60),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.02, 1.0]),  # all pairs, either, pairs through the sketch
    st.integers(0, 99),
)
def test_coverage_through_the_sketch_is_greedy(kind, size, labelled, few_pairs, seed):
    points, anchors = large_pool(kind, size, seed), large_pool(kind, 12, seed + 1)[:labelled]
    weights = np.random.default_rng(seed).random(size) + 0.1
    walk = with_large_path(lambda: walk_coverage(points, 15, weights, anchors), _FEW_PAIRS=few_pairs)
    order = walk.positions.tolist()
    assert len(set(order)) == min(15, size)
    # float32 moves a squared distance by 1e-6, and so a kernel of bandwidth h by 1e-6 / h^2
    rounding = size * (1e-4 + 2e-6 / walk.bandwidth**2)
    gains, best = coverage_gains(points, order, weights, anchors)
    assert walk.gains == pytest.approx(gains, abs=rounding)
    assert gains == pytest.approx(best, abs=rounding)
    assert (np.diff(walk.gains) <= 1e-9).all()
    shorter = with_large_path(lambda: coverage(points, 6, weights, anchors), _FEW_PAIRS=few_pairs)
    assert shorter.tolist() == order[:6]


@pytest.mark.parametrize("kept", [True, False])
def test_coverage_is_the_same_whether_pairs_are_kept(monkeypatch, kept):
    points, anchors = large_pool("clusters", 300, 4), large_pool("clusters", 40, 4)
    weights = np.random.default_rng(4).random(300)
    expected = walk_coverage(points, 50, weights, anchors)  # float64, all pairs
    monkeypatch.setattr(diversity._Pairs, "_SHARE", 0.01 if kept else 1e9)
    held, hold = [], diversity._Kernel.hold
    monkeypatch.setattr(diversity._Kernel, "hold", lambda kernel: held.append(hold(kernel)))
    result = with_large_path(lambda: walk_coverage(points, 50, weights, anchors), _FEW_PAIRS=1.0)
    assert bool(held) == (not kept)
    assert result.positions.tolist() == expected.positions.tolist()
    assert result.gains == pytest.approx(expected.gains, rel=1e-3, abs=1e-4)


def test_coverage_with_fewer_references_is_seeded():
    points = np.random.default_rng(2).normal(size=(60, 4))
    first, second = (coverage(points, 10, max_references=8, seed=seed).tolist() for seed in (1, 1))
    assert first == second
    assert len(set(first)) == 10
    assert any(coverage(points, 10, max_references=8, seed=seed).tolist() != first for seed in range(2, 6))


def test_coverage_without_any_weight_is_unweighted():
    points = np.random.default_rng(2).normal(size=(20, 4))
    assert coverage(points, 5, np.zeros(20)).tolist() == coverage(points, 5).tolist()


def test_bandwidth_by_hand():
    assert coverage_bandwidth(np.zeros((0, 3))) == 1.0
    assert coverage_bandwidth([[1.0, 0.0]]) == 1.0
    right_angle = math.sqrt(2)
    assert coverage_bandwidth([[3.0, 0.0], [0.0, 0.5]]) == pytest.approx(right_angle)
    # 0, 10 and 90 degrees: nearest at 10, 10, 80 degrees; a chord of angle a is 2 sin(a / 2)
    angles = np.radians([0, 10, 90])
    assert coverage_bandwidth(np.c_[np.cos(angles), np.sin(angles)]) == pytest.approx(2 * math.sin(math.radians(5)))
    assert coverage_bandwidth([[1.0, 0.0]] * 3) == 1.0  # duplicates only
    assert coverage_bandwidth([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) == pytest.approx(right_angle)
    assert coverage_bandwidth([[1.0, 0.0], [1.0, 0.001]]) == 0.01  # the floor


def test_best_kernel_by_hand():
    values = best_kernel([[2.0, 0], [0, 1]], [[1.0, 0]], 1.0)
    assert values == pytest.approx([1.0, math.exp(-2)])
    assert best_kernel([[2.0, 0]], np.zeros((0, 2)), 1.0).tolist() == [0.0]


# --- shared edges of the greedy walks


@pytest.mark.parametrize("function", [k_center, coverage])
def test_exact_duplicates_still_give_distinct_positions(function):
    points = np.full((6, 3), 0.3, dtype=np.float32)
    assert sorted(function(points, 4, labelled=points[:2]).tolist()) == [0, 1, 2, 3]
    assert sorted(function(points, 99).tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("function", [k_center, coverage])
def test_an_empty_pool_gives_nothing(function):
    assert function(np.zeros((0, 3)), 5).tolist() == []
    assert function([], 5).tolist() == []
    assert function([], 5, labelled=np.ones((2, 3))).tolist() == []


@pytest.mark.parametrize("function", [k_center, coverage, kmeans_distance])
@pytest.mark.parametrize(
    ("points", "k", "sentence"),
    [
        ([[1.0, float("nan")]], 1, "NaN or infinity"),
        ([[1.0, float("inf")]], 1, "NaN or infinity"),
        ([1.0, 2.0], 1, "2 dimension"),
        ([[1e30]], 1, "beyond 1e"),
        ([[1.0]], 0, "at least 1, got 0"),
        ([[1.0]], -3, "at least 1, got -3"),
        ([[1.0]], 2.0, "whole number"),
        ([[1.0]], True, "whole number"),
    ],
)
def test_bad_input_is_refused(function, points, k, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        function(points, k)


@pytest.mark.parametrize("function", [k_center, coverage])
def test_labelled_of_another_width_are_refused(function):
    with pytest.raises(InputInvalid, match="labelled has 3 columns, but 2 are expected"):
        function([[1.0, 2.0]], 1, labelled=[[1.0, 2.0, 3.0]])


def test_bad_utilities_are_refused():
    with pytest.raises(InputInvalid, match="utilities has 1 values, but there are 2 rows"):
        coverage([[1.0], [2.0]], 1, utilities=[1.0])
    with pytest.raises(InputInvalid, match="at least 0"):
        coverage([[1.0], [2.0]], 1, utilities=[1.0, -1.0])


@pytest.mark.parametrize("walk", [walk_k_center, walk_coverage])
def test_walks_leave_groups_that_are_taken_until_last(walk):
    points = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]])
    positions = walk(points, 4, duplicate_groups=[5, 5, 5, 7]).positions.tolist()
    assert 3 in positions[:2]  # one of group 5 and 3, in some order, then the rest
    assert sorted(positions) == [0, 1, 2, 3]
    labelled_first = walk(points, 4, duplicate_groups=[5, 5, 6, 7], duplicates_of_labelled=[True, False, False, False])
    assert sorted(labelled_first.positions.tolist()[:2]) == [2, 3]


# --- distances


@settings(max_examples=40, deadline=None)
@given(matrices(), matrices(5, min_rows=0))
def test_nearest_distances_equal_brute_force(points, anchors):
    expected = [min((float(np.linalg.norm(p - a)) for a in anchors), default=math.inf) for p in points]
    assert nearest_distances(points, anchors) == pytest.approx(expected)


def test_nearest_distances_of_a_copy_is_exactly_zero(monkeypatch):
    monkeypatch.setattr(diversity, "_SMALL", 0)
    points = (np.random.default_rng(0).normal(size=(50, 32)) + 100).astype(np.float32)
    assert nearest_distances(points, points[::-1]).tolist() == [0.0] * 50


def test_unit_rows_keep_zero_and_tiny_rows():
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30]], dtype=np.float32))
    assert rows == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0.6, 0.8]]))


# --- near-duplicates


def test_groups_are_connected_components_numbered_by_appearance():
    # 0, 20, 40 degrees chain at cos 20 = .94; 90 and 270 stand alone; 41 joins the chain
    angles = np.radians([90, 0, 40, 270, 20, 41])
    points = np.c_[np.cos(angles), np.sin(angles)] * np.array([[1], [2], [3], [4], [5], [6]])
    assert near_duplicate_groups(points, 0.93).tolist() == [0, 1, 1, 2, 1, 1]
    assert near_duplicate_groups(points, 0.95).tolist() == [0, 1, 2, 3, 4, 2]
    assert near_duplicate_groups(points, -1).tolist() == [0, 0, 0, 0, 0, 0]
    assert near_duplicate_groups(points, 1).tolist() == [0, 1, 2, 3, 4, 5]


def test_groups_across_blocks_equal_one_block(monkeypatch):
    rng = np.random.default_rng(7)
    points = rng.normal(size=(40, 6))[rng.integers(0, 40, 200)] + rng.normal(size=(200, 6)) * 0.02
    expected = near_duplicate_groups(points, 0.99)
    assert 1 < expected.max() + 1 < 60
    monkeypatch.setattr(diversity, "_BLOCK", 49)
    assert near_duplicate_groups(points, 0.99).tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from([0.5123, 0.9017, 0.9901]))  # never the exact cosine of two such rows
def test_groups_equal_a_flood_fill(points, threshold):
    cosines = unit_rows(points.astype(np.float64)) @ unit_rows(points.astype(np.float64)).T
    group = [-1] * len(points)
    for start in range(len(points)):
        if group[start] < 0:
            number, queue = max(group) + 1, [start]
            while queue:
                row = queue.pop()
                group[row] = number
                queue += [o for o in range(len(points)) if group[o] < 0 and cosines[row, o] > threshold]
    assert near_duplicate_groups(points, threshold).tolist() == group


@pytest.mark.parametrize("few_pairs", [0.0, 0.02, 1.0])  # whole blocks, either, pair by pair
@pytest.mark.parametrize("threshold", [-0.2, 0.5, 0.9, 0.99])
def test_groups_of_a_large_pool_equal_those_of_all_cosines(monkeypatch, few_pairs, threshold):
    rng = np.random.default_rng(11)
    points = rng.normal(size=(150, 40))[rng.integers(0, 150, 400)] + rng.normal(size=(400, 40)) * 0.15 + 0.5
    points[7] = 0
    points = points.astype(np.float32)
    expected = near_duplicate_groups(points, threshold)  # in float64
    monkeypatch.setattr(diversity, "_SMALL", 0)
    monkeypatch.setattr(diversity, "_BLOCK", 3000)
    monkeypatch.setattr(diversity, "_FEW_PAIRS", few_pairs)
    assert near_duplicate_groups(points, threshold).tolist() == expected.tolist()
    if threshold == 0.9:
        assert 100 < expected.max() + 1 < 300


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["spread", "clusters", "lines", "equal", "zeros"]),
    st.integers(1, 80),
    st.sampled_from([0.0, 0.02, 1.0]),
    st.integers(0, 99),
    st.data(),
)
def test_groups_through_the_sketch_equal_those_of_all_cosines(kind, size, few_pairs, seed, data):
    points = large_pool(kind, size, seed)
    unit = unit_rows(points.astype(np.float64))
    cosines = np.unique((unit @ unit.T).round(5))
    near = data.draw(st.sampled_from(cosines.tolist()))
    # just beside a cosine that occurs: above or below it, by what float32 can tell
    threshold = float(np.clip(near + data.draw(st.sampled_from([-2e-5, 2e-5])), -1, 1))
    if np.abs(unit @ unit.T - threshold).min() < 5e-6:
        return  # nobody promises the side of a tie
    expected = near_duplicate_groups(points.astype(np.float64), threshold)
    found = with_large_path(lambda: near_duplicate_groups(points, threshold), _FEW_PAIRS=few_pairs)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["spread", "clusters", "lines", "equal", "zeros"])
@pytest.mark.parametrize("size", [1, 300])
def test_the_sketch_never_rules_out_a_pair(kind, size):
    points = large_pool(kind, size, 12)
    sketch = with_large_path(lambda: diversity._Sketch(points, diversity._Arithmetic(points, centre=False)))
    assert sketch.rows.shape == (size, 32)
    exact = points.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    slack = sketch.rows @ sketch.rows.T - exact @ exact.T
    allowed = np.outer(lengths, lengths)
    assert (slack >= 0).all()  # not even rounding puts a product of short rows below that of the rows
    # |r||s| - r.s of what is left, at most twice |r||s|
    assert (slack <= 2 * np.outer(sketch.rows[:, -1], sketch.rows[:, -1]) + 1e-5 * allowed).all()
    squares = ((exact[:, None] - exact[None]) ** 2).sum(axis=2)
    everything = np.arange(size)
    for column in everything[:20]:
        reach = np.float32(np.median(squares[:, column]) * 0.7)
        ruled_out = ~sketch.within(everything, np.array([column]), np.array([reach]))[:, 0]
        assert (squares[ruled_out, column] >= reach).all()
        closer = sketch.closer(column, sketch.squares, np.full(size, reach, np.float32))
        assert isinstance(closer, slice) or (np.delete(squares[:, column], closer) >= reach).all()


def test_groups_of_duplicates_zeros_and_nothing():
    assert near_duplicate_groups([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0], [0.0, 0.0]], 0.99).tolist() == [0, 0, 1, 2]
    assert near_duplicate_groups(np.zeros((0, 3)), 0.99).tolist() == []


def test_duplicates_of_labelled_by_hand():
    points = [[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]
    assert near_duplicates_of_labelled(points, [[5.0, 0.0]], 0.99).tolist() == [True, True, False]
    assert near_duplicates_of_labelled(points, [], 0.99).tolist() == [False, False, False]
    assert near_duplicates_of_labelled(points, points, 1.0).tolist() == [False, False, False]


@pytest.mark.parametrize("threshold", [1.5, -2, float("nan")])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(InputInvalid, match="threshold"):
        near_duplicate_groups([[1.0]], threshold)
    with pytest.raises(InputInvalid, match="threshold"):
        near_duplicates_of_labelled([[1.0]], [[1.0]], threshold)
