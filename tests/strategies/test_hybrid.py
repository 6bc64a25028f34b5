from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import InputInvalid
from strategies.hybrid import hybrid_utility, select_batch


def walk_by_hand(utilities, groups, size, of_labelled):
    """The rule, word for word: walk down, skip what is taken, backfill with the best skipped."""
    taken_groups = {group for group, marked in zip(groups, of_labelled, strict=True) if marked}
    ranking = sorted(range(len(utilities)), key=lambda row: (-utilities[row], row))
    taken, skipped = [], []
    for row in ranking:
        (skipped if groups[row] in taken_groups else taken).append(row)
        taken_groups.add(groups[row])
    return (taken + skipped)[:size]


def test_hybrid_utility_by_hand():
    assert hybrid_utility([1.0, 0.5, 0.0], [0.0, 0.5, 1.0]) == pytest.approx([0.7, 0.5, 0.3])
    assert hybrid_utility([0.2], [1.0], alpha=0.5, beta=0.25) == pytest.approx([0.35])
    assert hybrid_utility([0.2], [0.6], alpha=1, beta=1) == pytest.approx([0.4])  # divided by 2
    assert hybrid_utility([], []).tolist() == []


def test_product_of_powers():
    assert hybrid_utility([0.25, 0.0, 1.0], [0.5, 1.0, 1.0], 0.5, 1, "product") == pytest.approx([0.25, 0, 1])
    assert hybrid_utility([0.0], [0.5], 0, 1, "product").tolist() == [0.5]  # weight 0: it does not matter
    with pytest.raises(InputInvalid, match=r"Unknown mix 'produkt'\. Did you mean 'product'"):
        hybrid_utility([0.0], [0.5], mix="produkt")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1), st.floats(0, 3), st.floats(0, 3))
def test_hybrid_utility_is_bounded_and_monotone(rows, alpha, beta):
    uncertainty, diversity = np.array(rows).T
    utility = hybrid_utility(uncertainty, diversity, alpha, beta)
    assert utility.min() >= 0
    assert utility.max() <= 1
    more = hybrid_utility(np.minimum(uncertainty + 0.1, 1), diversity, alpha, beta)
    assert (more >= utility - 1e-12).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0.5], [0.5, 0.5]), "diversity has 2 values"),
        (([float("nan")], [0.5]), "NaN"),
        (([1.5], [0.5]), "at most 1"),
        (([0.5], [-0.5]), "at least 0"),
        (([0.5], [0.5], -1), "finite and at least 0"),
        (([0.5], [0.5], 0.7, float("nan")), "finite and at least 0"),
    ],
)
def test_hybrid_utility_refuses(arguments, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        hybrid_utility(*arguments)


def test_select_batch_by_hand():
    utilities = [0.9, 0.8, 0.7, 0.6, 0.5]
    groups = [1, 1, 2, 2, 3]
    assert select_batch(utilities, None, 3).tolist() == [0, 1, 2]
    assert select_batch(utilities, groups, 3).tolist() == [0, 2, 4]
    assert select_batch(utilities, groups, 4).tolist() == [0, 2, 4, 1]  # ran dry: the best skipped
    assert select_batch(utilities, groups, 99).tolist() == [0, 2, 4, 1, 3]


def test_select_batch_counts_labelled_as_taken():
    utilities = [0.9, 0.8, 0.7, 0.6]
    marked = [True, False, False, False]
    assert select_batch(utilities, [1, 1, 2, 3], 2, marked).tolist() == [2, 3]  # the whole of group 1
    assert select_batch(utilities, [1, 1, 2, 3], 3, marked).tolist() == [2, 3, 0]
    assert select_batch(utilities, None, 2, marked).tolist() == [1, 2]  # without groups the row alone


def test_select_batch_breaks_ties_by_row():
    assert select_batch([0.5] * 6, None, 4).tolist() == [0, 1, 2, 3]
    assert select_batch([0.5] * 4, [3, 3, 1, 1], 3).tolist() == [0, 2, 1]
    assert select_batch([], None, 3).tolist() == []


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-1, 4), st.booleans()), max_size=15),
    st.integers(1, 20),
)
def test_select_batch_equals_the_rule(rows, size):
    utilities, groups, marked = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    expected = walk_by_hand(utilities, groups, size, marked)
    result = select_batch(utilities, np.array(groups, dtype=int), size, np.array(marked, dtype=bool))
    assert result.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([float("nan")], None, 1), "NaN"),
        (([0.5], None, 0), "batch_size must be at least 1"),
        (([0.5], [1, 2], 1), "duplicate_groups must be 1 whole numbers"),
        (([0.5], [1.5], 1), "duplicate_groups must be 1 whole numbers"),
        (([0.5], None, 1, [1]), "duplicates_of_labelled must be 1 booleans"),
    ],
)
def test_select_batch_refuses(arguments, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        select_batch(*arguments)
