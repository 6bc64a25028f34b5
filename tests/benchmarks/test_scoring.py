"""benchmarks.scoring: what counts as the same detections."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scoring import differences

# x1, y1, x2, y2, confidence, class
ROWS = np.array([[10, 10, 50, 60, 0.9, 1], [12, 10, 50, 60, 0.6, 0], [100, 20, 130, 90, 0.25003, 1]])
PROBABILITIES = np.array([[0.1, 0.9, 0.0], [0.6, 0.1, 0.59995], [0.2, 0.25003, 0.1]])


def differs(expected: np.ndarray, found: np.ndarray = ROWS) -> bool:
    answer = differences(found, PROBABILITIES[: len(found)], expected)["differs"]
    assert isinstance(answer, bool)
    return answer


def moved(row: int, column: int, by: float) -> np.ndarray:
    rows = ROWS.copy()
    rows[row, column] += by
    return rows


def test_the_same_in_any_order_is_equal() -> None:
    found = differences(ROWS, PROBABILITIES, ROWS[::-1])
    assert found == {"detections": 3, "differs": False, "box": 0.0, "confidence": 0.0}


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(4))
def test_a_hundredth_of_a_pixel_is_a_difference(row: int, column: int) -> None:
    if row == 2:  # not at the threshold, where a detection may be missing
        rows, expected = ROWS.copy(), moved(row, column, 0.01)
        rows[2, 4] = expected[2, 4] = 0.3
        assert differs(expected, rows)
    else:
        assert differs(moved(row, column, 0.01))
    assert not differs(moved(row, column, 0.0009))


def test_a_confidence_is_compared() -> None:
    assert differs(moved(0, 4, 0.0002))
    assert not differs(moved(0, 4, 0.00009))
    found = differences(ROWS, PROBABILITIES, moved(0, 4, 0.00009))
    assert found["confidence"] == pytest.approx(0.00009)


def test_another_class_is_a_difference_unless_both_are_as_probable() -> None:
    assert differs(moved(0, 5, 1))
    assert differs(moved(1, 5, 1))
    assert not differs(moved(1, 5, 2))


def test_only_at_the_threshold_may_one_side_be_alone() -> None:
    assert not differs(ROWS[:2])
    assert not differs(ROWS, ROWS[:2])
    assert differs(ROWS[1:])
    assert differs(ROWS, ROWS[:1])
    assert differs(np.concatenate([ROWS, ROWS[:1]]))  # each of ours answers once


def test_nothing_equals_nothing_only() -> None:
    nothing = np.zeros((0, 6))
    assert not differs(nothing, nothing)
    assert differs(ROWS, nothing)
    assert differs(nothing, ROWS)
