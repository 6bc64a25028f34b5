from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import InputInvalid
from strategies.stopping import knee, learning_curve_stats, predicted_gain_estimable, should_stop

LABELS = [500, 700, 900, 1100, 1300, 1500, 1700]
MAP50 = [0.41, 0.59, 0.69, 0.75, 0.79, 0.81, 0.815]


def test_the_example_worked_by_hand():
    stats = learning_curve_stats(MAP50, LABELS)
    assert list(stats) == [
        "gains_per_round",
        "roi_per_100_labels",
        "predicted_gain_next_round",
        "current_map50",
        "recommendation",
        "note",
    ]
    assert stats["gains_per_round"] == [0.18, 0.10, 0.06, 0.04, 0.02, 0.005]
    assert stats["roi_per_100_labels"] == [0.09, 0.05, 0.03, 0.02, 0.01, 0.0025]
    assert stats["predicted_gain_next_round"] == 0.0040
    assert stats["current_map50"] == 0.815
    assert stats["recommendation"] == "stop"
    assert "0.0040" in stats["note"]
    assert knee(LABELS, MAP50) == 900


@pytest.mark.parametrize("points", [0, 1, 2])
def test_short_histories_go_on(points):
    stats = learning_curve_stats(MAP50[:points], LABELS[:points])
    assert set(stats) == {"recommendation", "note"}
    assert stats["recommendation"] == "continue"
    assert str(3 - points) in stats["note"]


def test_two_gains_predict_the_last():
    stats = learning_curve_stats([0.3, 0.5, 0.56], [100, 200, 300])
    assert stats["predicted_gain_next_round"] == 0.06
    assert stats["recommendation"] == "continue"
    assert learning_curve_stats([0.3, 0.5, 0.503], [100, 200, 300])["recommendation"] == "stop"
    assert learning_curve_stats([0.3, 0.5, 0.45], [100, 200, 300])["predicted_gain_next_round"] == -0.05


def test_three_gains_follow_the_decay():
    # .16, .08, .04 halve: the next is .02
    stats = learning_curve_stats([0.1, 0.26, 0.34, 0.38], [100, 200, 300, 400])
    assert stats["predicted_gain_next_round"] == 0.02
    assert stats["recommendation"] == "continue"


def test_labels_that_add_nothing_have_no_roi():
    stats = learning_curve_stats([0.3, 0.5, 0.6, 0.65], [100, 200, 200, 400])
    assert stats["gains_per_round"] == [0.2, 0.1, 0.05]
    assert stats["roi_per_100_labels"] == [0.2, 0.025]


def test_growing_gains_stay_exact_but_are_not_estimable():
    stats = learning_curve_stats([0.5, 0.49, 0.51, 0.56], [100, 200, 300, 400])
    # ln of 1e-6, .02, .05 at 0, 1, 2: slope 5.4099, mean -6.9078, so exp(-6.9078 + 2 * 5.4099)
    assert stats["predicted_gain_next_round"] == pytest.approx(50.0, abs=0.5)
    assert not predicted_gain_estimable([-0.01, 0.02, 0.05])


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.18, 0.1, 0.06], True),
        ([0.05, 0.05, 0.05], True),
        ([0.02, 0.05], False),
        ([0.05, 0.02], True),
        ([0.1, 0.0, 0.01], False),
        ([0.1], False),
        ([], False),
    ],
)
def test_estimable(gains, expected):
    assert predicted_gain_estimable(gains) is expected


@pytest.mark.parametrize(
    ("history", "smallest", "expected"),
    [
        ([], 0.005, False),
        ([0.5], 0.005, False),
        ([0.5, 0.504], 0.005, True),
        ([0.5, 0.506], 0.005, False),
        ([0.81, 0.815], 0.005, False),  # exactly .005, whatever binary makes of it
        ([0.5, 0.505], 0.005, False),
        ([0.6, 0.5], 0.005, True),
        ([0.1, 0.5, 0.51], 0.02, True),
    ],
)
def test_should_stop(history, smallest, expected):
    assert should_stop(history, smallest) is expected


def test_should_stop_default():
    assert should_stop([0.5, 0.5049]) is True
    assert should_stop([0.5, 0.5051]) is False


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_asking_for_more_gain_never_turns_a_stop_into_going_on(history, one, other):
    low, high = sorted([one, other])
    assert should_stop(history, low) <= should_stop(history, high)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**5)), min_size=3, max_size=10))
def test_stats_are_finite_and_sized(points):
    history, counts = [list(column) for column in zip(*points, strict=True)]
    stats = learning_curve_stats(history, counts)
    assert len(stats["gains_per_round"]) == len(points) - 1
    assert len(stats["roi_per_100_labels"]) == sum(b > a for a, b in pairwise(counts))
    assert np.isfinite(stats["predicted_gain_next_round"])
    assert stats["recommendation"] in ("continue", "stop")


@pytest.mark.parametrize(
    ("labels", "map50"),
    [
        ([], []),
        ([100, 200], [0.1, 0.5]),
        ([100, 200, 300], [0.5, 0.5, 0.5]),
        ([100, 200, 300], [0.1, 0.2, 0.3]),  # a straight line has no knee
        ([100, 200, 300], [0.1, 0.15, 0.5]),  # nor has a curve below its chord
        ([100, 100, 100], [0.1, 0.2, 0.3]),
    ],
)
def test_no_knee(labels, map50):
    assert knee(labels, map50) is None


def test_knee_by_hand():
    assert knee([100, 200, 300, 400], [0.1, 0.4, 0.45, 0.5]) == 200
    assert knee([100, 200, 300, 400], [0.1, 0.5, 0.4, 0.3]) == 200  # falls after its peak


@pytest.mark.parametrize(
    ("history", "labels", "sentence"),
    [
        ([0.1, float("nan")], [1, 2], "NaN"),
        ([10.0, 20.0], [1, 2], "at most 1"),
        ([0.1, 0.2], [1], "has 1 values, but there are 2 rows"),
        ([0.1, 0.2], [1, -2], "at least 0"),
        ([[0.1], [0.2]], [1, 2], "1 dimension"),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_bad_histories_are_refused(history, labels, sentence, swap):
    with pytest.raises(InputInvalid, match=sentence):
        knee(labels, history) if swap else learning_curve_stats(history, labels)


def test_more_bad_histories():
    with pytest.raises(InputInvalid, match="NaN"):
        should_stop([0.1, float("nan")])
    with pytest.raises(InputInvalid, match="min_map_gain"):
        should_stop([0.1, 0.2], float("nan"))
    with pytest.raises(InputInvalid, match="NaN"):
        predicted_gain_estimable([float("nan"), 0.1])
    with pytest.raises(InputInvalid, match="must not fall"):
        knee([100, 300, 200], [0.1, 0.2, 0.3])
