from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from strategies import Pool, PoolInvalid, Selection, SelectionInvalid, StrategyError

ROWS = {
    "keys": [30, 10, 20],
    "uncertainty": {"margin": [0.3, 0.1, 0.2]},
    "embeddings": [[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]],
    "labelled_embeddings": [[9.0, 9.0]],
    "disagreement": [3.0, 1.0, 2.0],
    "duplicate_groups": [3, 1, 2],
    "duplicates_of_labelled": [True, False, False],
}


def test_build_sorts_every_column_by_key():
    pool = Pool.build(**ROWS)
    assert len(pool) == 3
    assert pool.keys.tolist() == [10, 20, 30]
    assert pool.keys.dtype == np.int64
    assert pool.uncertainty_of("margin").tolist() == [0.1, 0.2, 0.3]
    assert pool.embeddings[:, 0].tolist() == [1, 2, 3]
    assert pool.embeddings.dtype == np.float32
    assert pool.labelled_embeddings.tolist() == [[9, 9]]
    assert pool.disagreement.tolist() == [1, 2, 3]
    assert pool.duplicate_groups.tolist() == [1, 2, 3]
    assert pool.duplicates_of_labelled.tolist() == [False, False, True]


def test_text_keys_sort_as_text():
    pool = Pool.build(**ROWS | {"keys": ["b.jpg", "a.jpg", "B.jpg"]})
    assert pool.keys.tolist() == ["B.jpg", "a.jpg", "b.jpg"]
    assert pool.uncertainty_of("margin").tolist() == [0.2, 0.1, 0.3]


def test_a_pool_can_not_be_changed():
    pool = Pool.build(**ROWS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pool.keys = np.array([1])
    with pytest.raises(ValueError, match="read-only"):
        pool.embeddings[0, 0] = 5
    with pytest.raises(ValueError, match="read-only"):
        pool.uncertainty["margin"][0] = 5
    with pytest.raises(TypeError):
        pool.uncertainty["entropy"] = np.zeros(3)


def test_the_callers_arrays_stay_writable():
    embeddings = np.zeros((2, 2), dtype=np.float32)
    Pool.build([1, 2], {}, embeddings)
    embeddings[0, 0] = 1.0
    assert embeddings[0, 0] == 1.0


def test_empty_pool():
    pool = Pool.build([], {"margin": []}, [])
    assert len(pool) == 0
    assert pool.keys.dtype == np.int64
    assert Pool.build([], {}, np.zeros((0, 8)), np.ones((3, 8))).labelled_embeddings.shape == (3, 8)


def test_no_labelled_takes_the_width_of_the_pool():
    assert Pool.build([1], {}, [[1.0, 2.0]]).labelled_embeddings.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"keys": [10, 10, 20]}, "key .*10.* appears more than once"),
        ({"keys": [1.0, 2.0, 3.0]}, "whole numbers or text"),
        ({"keys": [True, False, True]}, "whole numbers or text"),
        ({"keys": [1, "2", 3]}, "mix numbers and text"),
        ({"keys": [[1], [2], [3]]}, "whole numbers or text"),
        ({"keys": np.array([1, 2, 2**63], dtype=np.uint64)}, "64 signed bits"),
        ({"keys": 5}, "must be an array"),
        ({"keys": [1, 2]}, "has 3 rows, but there are 2 keys"),
        ({"uncertainty": {"margin": [0.1, 0.2]}}, r"uncertainty\['margin'\] has 2 rows, but there are 3 keys"),
        ({"uncertainty": {"margin": [0.1, float("nan"), 0.2]}}, "NaN or infinity"),
        ({"uncertainty": {"margin": [0.1, -0.1, 0.2]}}, "at least 0"),
        ({"uncertainty": {"margn": [0.1, 0.1, 0.2]}}, "Did you mean 'margin'"),
        ({"embeddings": [[1.0], [2.0], [float("inf")]]}, "embeddings holds NaN or infinity"),
        ({"embeddings": [1.0, 2.0, 3.0]}, "2 dimension"),
        ({"embeddings": [[1.0], [2.0], [3.0, 4.0]]}, "rectangular"),
        ({"embeddings": [[1.0], [2.0]]}, "embeddings has 2 rows, but there are 3 keys"),
        ({"embeddings": [[1.0], [2.0], [1e20]]}, "beyond"),
        ({"labelled_embeddings": [[1.0, 2.0, 3.0]]}, "labelled_embeddings has 3 columns, but 2 are expected"),
        ({"labelled_embeddings": [[1.0, float("nan")]]}, "labelled_embeddings holds NaN"),
        ({"disagreement": [1.0, -1.0, 0.0]}, "disagreement must be at least 0"),
        ({"duplicate_groups": [0.5, 1.0, 2.0]}, "duplicate_groups must be 3 whole numbers"),
        ({"duplicates_of_labelled": [0, 1, 0]}, "duplicates_of_labelled must be 3 booleans"),
    ],
)
def test_bad_rows_are_refused(change, sentence):
    with pytest.raises(PoolInvalid, match=sentence) as caught:
        Pool.build(**ROWS | change)
    assert isinstance(caught.value, StrategyError | ValueError)


def test_the_constructor_refuses_unsorted_rows():
    with pytest.raises(PoolInvalid, match=r"Use Pool\.build"):
        Pool(np.array([2, 1]), {}, np.ones((2, 1), np.float32), np.ones((0, 1), np.float32))
    with pytest.raises(PoolInvalid, match="2 keys"):
        Pool(np.array([1, 2]), {}, np.ones((3, 1), np.float32), np.ones((0, 1), np.float32))


def test_a_missing_measure_is_named():
    with pytest.raises(PoolInvalid, match=r"no uncertainty 'entropy' \(it has: margin\)"):
        Pool.build(**ROWS).uncertainty_of("entropy")


def test_a_missing_disagreement_says_what_to_set():
    assert Pool.build(**ROWS).committee_disagreement().tolist() == [1, 2, 3]
    with pytest.raises(PoolInvalid, match=r"no disagreement.*Set committee_size \(at least 3\) in the project"):
        Pool.build(**ROWS | {"disagreement": None}).committee_disagreement()


@pytest.mark.parametrize(
    ("positions", "utilities", "parts", "sentence"),
    [
        ([0, 0], [0.5, 0.5], {}, "picked a row twice"),
        ([2], [0.5, 0.5], {}, r"lie in 0\.\.1"),
        ([-1], [0.5, 0.5], {}, r"lie in 0\.\.1"),
        ([0], [0.5, 1.5], {}, "at most 1"),
        ([0], [0.5, float("nan")], {}, "NaN"),
        ([0], [0.5, 0.5], {"diversity": [0.5]}, r"parts\['diversity'\] has 1 values"),
    ],
)
def test_a_selection_holds_its_contract(positions, utilities, parts, sentence):
    with pytest.raises(SelectionInvalid, match=sentence):
        Selection(np.array(positions), np.array(utilities), parts)


def test_errors_have_their_docstring_as_default():
    assert str(PoolInvalid()) == "The pool has the wrong shape, type or range."
