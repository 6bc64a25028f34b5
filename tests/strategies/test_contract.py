"""What every registered strategy promises. A new one is covered by being in STRATEGIES."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from strategies import STRATEGIES, InputInvalid, OptionsInvalid, Pool, PoolInvalid, Selection, late_utility

pytestmark = pytest.mark.parametrize("name", STRATEGIES)

MEASURE_NAMES = ("least_confidence", "margin", "entropy")
GREEDY = {"k_center", "coverage", "hybrid_k_center", "hybrid_coverage"}


def select(name, pool, batch_size=5, seed=0, **options) -> Selection:
    return STRATEGIES[name](pool, batch_size, np.random.default_rng(seed), options)


def assert_contract(name, pool, selection, batch_size):
    positions = selection.positions.tolist()
    assert len(positions) == min(batch_size, len(pool))
    assert len(set(positions)) == len(positions)
    assert all(0 <= position < len(pool) for position in positions)
    for values in (selection.utilities, *selection.parts.values()):
        assert values.shape == (len(pool),)
        assert np.isfinite(values).all()
        assert values.min(initial=0) >= 0
        assert values.max(initial=1) <= 1
    if name in GREEDY:
        picked, rest = selection.utilities[positions], np.delete(selection.utilities, positions)
        assert (np.diff(picked) < 0).all()
        assert rest.max(initial=0) < picked.min(initial=1)


@pytest.mark.parametrize("labelled", [0, 1, 6])
@pytest.mark.parametrize("batch_size", [1, 5, 30, 99])
def test_distinct_bounded_and_complete(name, batch_size, labelled, make_pool):
    pool = make_pool(30, labelled=labelled)
    assert_contract(name, pool, select(name, pool, batch_size), batch_size)


def test_same_rng_same_answer(name, make_pool):
    pool = make_pool(60)
    one, other = select(name, pool, 10, seed=3), select(name, pool, 10, seed=3)
    assert one.positions.tolist() == other.positions.tolist()
    assert one.utilities.tolist() == other.utilities.tolist()


def test_no_global_random_state(name, make_pool):
    np.random.seed(1)  # the very thing that must not matter
    before = np.random.get_state()[1].tolist()
    one = select(name, make_pool())
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert select(name, make_pool()).positions.tolist() == one.positions.tolist()


def test_the_pool_is_left_as_it_was(name, make_pool):
    pool, untouched = make_pool(), make_pool()
    select(name, pool)
    assert pool.embeddings.tolist() == untouched.embeddings.tolist()
    assert pool.labelled_embeddings.tolist() == untouched.labelled_embeddings.tolist()


def test_shuffled_rows_give_the_same_images(name):
    rng = np.random.default_rng(4)
    rows = {
        "keys": np.arange(40) * 3,
        "embeddings": rng.normal(size=(40, 4)),
        "duplicate_groups": rng.integers(0, 25, 40),
        "duplicates_of_labelled": rng.random(40) < 0.1,
        "disagreement": rng.random(40).round(1),
    }
    measures = {measure: rng.random(40).round(1) for measure in MEASURE_NAMES}  # rounded: ties
    chosen = []
    for order in (np.arange(40), rng.permutation(40), np.arange(40)[::-1]):
        shuffled = {column: values[order] for column, values in rows.items()}
        uncertainty = {measure: values[order] for measure, values in measures.items()}
        pool = Pool.build(uncertainty=uncertainty, labelled_embeddings=rows["embeddings"][:2] + 1, **shuffled)
        chosen.append(pool.keys[select(name, pool, 12).positions].tolist())
    assert chosen[0] == chosen[1] == chosen[2]


def test_an_empty_pool_gives_an_empty_selection(name):
    for embeddings, labelled in (([], None), (np.zeros((0, 4)), np.ones((2, 4)))):
        pool = Pool.build([], {measure: [] for measure in MEASURE_NAMES}, embeddings, labelled, disagreement=[])
        selection = select(name, pool)
        assert selection.positions.tolist() == []
        assert selection.utilities.tolist() == []


def test_exact_duplicates_and_all_equal_values(name):
    measures = {measure: np.full(8, 1.0) for measure in MEASURE_NAMES}
    pool = Pool.build(np.arange(8), measures, np.full((8, 3), 0.1), np.full((2, 3), 0.1), np.full(8, 1.0))
    assert_contract(name, pool, select(name, pool, 5), 5)
    assert_contract(name, pool, select(name, pool, 99), 99)


def test_all_certain_and_zero_embeddings(name):
    measures = {measure: np.zeros(4) for measure in MEASURE_NAMES}
    pool = Pool.build(np.arange(4), measures, np.zeros((4, 2)), disagreement=np.zeros(4))
    assert_contract(name, pool, select(name, pool, 3), 3)


def test_one_image(name, make_pool):
    assert select(name, make_pool(1, labelled=0)).positions.tolist() == [0]


def test_uncertainty_beyond_one_is_rescaled(name, make_pool):
    values = np.linspace(0, 12, 20)
    pool = make_pool(20, uncertainty=dict.fromkeys(MEASURE_NAMES, values), disagreement=values)
    assert_contract(name, pool, select(name, pool), 5)


@pytest.mark.parametrize("column", ["embeddings", "labelled_embeddings", "uncertainty", "disagreement"])
def test_nan_is_refused(name, column, make_pool):
    vector = [0.5, np.nan]
    bad = {"uncertainty": dict.fromkeys(MEASURE_NAMES, vector), "disagreement": vector}
    bad = bad.get(column, [vector] * 2)
    with pytest.raises(PoolInvalid, match="NaN"):
        select(name, make_pool(2, 2, **{column: bad}))


def test_bad_requests_are_refused(name, make_pool):
    pool = make_pool()
    with pytest.raises(InputInvalid, match="batch_size must be at least 1, got 0"):
        select(name, pool, 0)
    with pytest.raises(OptionsInvalid, match=r"has no option 'suppress_duplicate'.*'suppress_duplicates'"):
        select(name, pool, suppress_duplicate=True)
    with pytest.raises(InputInvalid, match="rng must be a numpy Generator"):
        STRATEGIES[name](pool, 3, 42, {})


def test_suppression_keeps_groups_and_labelled_out(name, make_pool):
    groups = np.arange(30) // 3  # ten bursts of three
    marked = groups == 4
    marked[1:] &= ~marked[:-1]  # only the first image of burst 4 was seen to be like a labelled one
    pool = make_pool(30, duplicate_groups=groups, duplicates_of_labelled=marked)
    chosen = groups[select(name, pool, 9, suppress_duplicates=True).positions]
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    more = select(name, pool, 14, suppress_duplicates=True)
    assert_contract(name, pool, more, 14)
    assert len(set(groups[more.positions[:9]].tolist())) == 9  # backfill comes last
    without = select(name, pool, 30, suppress_duplicates=False)
    ungrouped = select(name, make_pool(30), 30, suppress_duplicates=False)
    assert without.positions.tolist() == ungrouped.positions.tolist()


def test_late_images_on_the_scale_of_the_selection(name, make_pool):
    values = np.linspace(0.1, 3, 40)
    pool = make_pool(40, uncertainty=dict.fromkeys(MEASURE_NAMES, values), disagreement=values)
    scores = {**pool.uncertainty, "disagreement": pool.disagreement}
    selection = select(name, pool, 6)
    again = late_utility(name, selection.late, scores, pool.embeddings)
    assert again.shape == (40,)
    outside = np.delete(np.arange(40), selection.positions)
    if name == "random":
        assert len(set(again.tolist())) == 40
    else:
        rows = outside if name in GREEDY else np.arange(40)
        assert again[rows] == pytest.approx(selection.utilities[rows], abs=1e-5)
    one_by_one = [
        late_utility(name, selection.late, {m: v[[i]] for m, v in scores.items()}, pool.embeddings[[i]])[0]
        for i in range(5)
    ]
    assert one_by_one == pytest.approx(again[:5], abs=1e-6)


def test_late_images_stay_in_bounds(name, make_pool):
    selection = select(name, make_pool(20))
    far = {score: np.array([0.0, 50.0]) for score in (*MEASURE_NAMES, "disagreement")}
    values = late_utility(name, selection.late, far, np.array([[1e4] * 4, [0.0] * 4]))
    assert values.min() >= 0
    assert values.max() <= 1
    assert late_utility(name, selection.late, {score: [] for score in far}, []).tolist() == []
    empty = select(name, Pool.build([], {measure: [] for measure in MEASURE_NAMES}, [], disagreement=[]))
    assert np.isfinite(late_utility(name, empty.late, far, np.ones((2, 4)))).all()


@settings(max_examples=8, deadline=None)
@given(
    embeddings=hnp.arrays(np.float32, st.tuples(st.integers(1, 10), st.just(2)), elements=st.integers(-2, 2)),
    labelled=hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.just(2)), elements=st.integers(-2, 2)),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_pool(name, embeddings, labelled, batch_size, seed, data):
    size = len(embeddings)
    values = st.lists(st.floats(0, 5), min_size=size, max_size=size)
    pool = Pool.build(
        np.arange(size),
        {measure: data.draw(values) for measure in MEASURE_NAMES},
        embeddings,
        labelled,
        disagreement=data.draw(values),
        duplicate_groups=data.draw(hnp.arrays(np.int64, size, elements=st.integers(0, 4))),
        duplicates_of_labelled=data.draw(hnp.arrays(np.bool_, size)),
    )
    suppress = data.draw(st.booleans())
    assert_contract(name, pool, select(name, pool, batch_size, seed, suppress_duplicates=suppress), batch_size)
