from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from strategies.errors import InputInvalid
from strategies.uncertainty import (
    MEASURES,
    aggregate,
    class_weights,
    entropy,
    image_uncertainties,
    image_uncertainty,
    least_confidence,
    margin,
    scaled,
    uncertainty_scale,
    with_background,
)

MEASURE_FUNCTIONS = [least_confidence, margin, entropy]
probability_rows = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.floats(0, 1),
)


def test_with_background_by_hand():
    # odds of .5 are 1, of .8 are 4: 1 / (1 + 1 + 4) for the background
    assert with_background([[0.5, 0.8]]) == pytest.approx(np.array([[1 / 6, 1 / 6, 4 / 6]]))
    assert with_background([[0.5]]) == pytest.approx(np.array([[0.5, 0.5]]))


def test_with_background_is_softmax_of_zero_and_logits():
    logits = np.array([[-2.0, 0.3, 1.7]])
    expected = np.exp([0.0, *logits[0]]) / np.exp([0.0, *logits[0]]).sum()
    assert with_background(1 / (1 + np.exp(-logits)))[0] == pytest.approx(expected)


def test_with_background_of_nothing_is_background():
    assert with_background([[0.0, 0.0]])[0, 0] == pytest.approx(1, abs=1e-6)
    assert with_background([[1.0, 0.0]])[0, 1] == pytest.approx(1, abs=1e-6)
    assert with_background([[1.0, 1.0]])[0] == pytest.approx([0, 0.5, 0.5], abs=1e-6)


@given(probability_rows)
def test_with_background_rows_are_distributions(rows):
    result = with_background(rows)
    assert result.shape == (rows.shape[0], rows.shape[1] + 1)
    assert result.sum(axis=1) == pytest.approx(np.ones(len(rows)))
    assert result.min() >= 0


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (least_confidence, [0.4, 0.5]),
        (margin, [0.7, 1.0]),
        (entropy, [-(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1)) / math.log(3), math.log(2, 3)]),
    ],
)
def test_measures_by_hand(function, expected):
    assert function([[0.6, 0.3, 0.1], [0.5, 0.5, 0.0]]) == pytest.approx(expected)


@pytest.mark.parametrize(("function", "expected"), [(least_confidence, 0.3), (margin, 0.3), (entropy, 0.0)])
def test_measures_of_one_class(function, expected):
    assert function([[0.7]]) == pytest.approx([expected])


@pytest.mark.parametrize("function", MEASURE_FUNCTIONS)
def test_measures_at_the_extremes(function):
    assert function([[1.0, 0.0]]) == pytest.approx([0.0])
    highest = {least_confidence: 0.5, margin: 1.0, entropy: 1.0}[function]
    assert function([[0.5, 0.5]]) == pytest.approx([highest])


def test_raw_rows_are_computed_as_they_are():
    assert entropy([[0.1, 0.0]]) == pytest.approx([-0.1 * math.log(0.1) / math.log(2)])
    assert margin([[0.01, 0.01]]) == pytest.approx([1.0])
    # two sigmoids at 1/e sum to .74 and have more "entropy" than ln 2
    assert entropy([[1 / math.e, 1 / math.e]])[0] == 1.0


@given(probability_rows, st.sampled_from(MEASURE_FUNCTIONS), st.booleans())
def test_measures_stay_in_bounds_and_ignore_class_order(rows, function, background):
    rows = with_background(rows) if background else rows
    values = function(rows)
    assert values.shape == (len(rows),)
    assert values.min() >= 0
    assert values.max() <= 1
    assert function(rows[:, ::-1]) == pytest.approx(values)


@given(st.floats(0, 1), st.floats(0, 1))
def test_least_confidence_falls_with_confidence(one, other):
    low, high = sorted([one, other])
    assert least_confidence([[low]]) >= least_confidence([[high]])


@pytest.mark.parametrize("function", [*MEASURE_FUNCTIONS, with_background])
@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([[0.5, float("nan")]], "NaN or infinity, first in row 0"),
        ([[0.5, 1.5]], r"must lie in \[0, 1\]"),
        ([[0.5, -0.5]], r"must lie in \[0, 1\]"),
        ([0.5, 0.5], "2 dimension"),
        ([[0.5], [0.5, 0.5]], "rectangular"),
        ([["a"]], "must be numbers"),
        (np.zeros((2, 0)), "without a single column"),
    ],
)
def test_bad_probabilities_are_refused(function, rows, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        function(rows)


@pytest.mark.parametrize("function", MEASURE_FUNCTIONS)
@pytest.mark.parametrize("rows", [[], np.zeros((0, 3)), np.zeros((0, 0))])
def test_no_boxes_give_no_values(function, rows):
    assert function(rows).tolist() == []


@pytest.mark.parametrize(
    ("method", "n", "expected"),
    [
        ("max", 10, 0.9),
        ("min", 10, 0.1),
        ("mean", 10, 0.4),
        ("sum", 10, 1.6),
        ("open", 10, math.log(2.6) + 0.2),
        ("top_n_mean", 1, 0.9),
        ("top_n_mean", 2, 0.65),
        ("top_n_mean", 10, 0.4),
    ],
)
def test_aggregate_by_hand(method, n, expected):
    assert aggregate([0.2, 0.9, 0.1, 0.4], method, n) == pytest.approx(expected)


def test_what_stands_for_no_boxes_is_aggregated_as_a_box_is():
    faint = [[0.04, 0.02]]
    for policy, value in (("uncertain", 1.0), ("certain", 0.0), ("best_candidate", 0.96)):
        found = image_uncertainty(faint, threshold=0.1, empty=policy, method="open")
        assert found == pytest.approx(math.log1p(value) + 2 * value)
        assert image_uncertainty(faint, threshold=0.1, empty=policy, method="sum") == pytest.approx(value)


@given(hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(0, 1)), st.integers(1, 25))
def test_aggregates_are_ordered(values, n):
    low, mean, top, high = (aggregate(values, method, n) for method in ("min", "mean", "top_n_mean", "max"))
    slack = 1e-12
    assert low <= mean + slack
    assert mean <= top + slack
    assert top <= high + slack


@pytest.mark.parametrize(
    ("values", "method", "n", "sentence"),
    [
        ([], "max", 10, "no values to aggregate"),
        ([0.5], "maks", 10, "Did you mean 'max'"),
        ([0.5], "top_n_mean", 0, "at least 1, got 0"),
        ([0.5], "top_n_mean", 1.5, "whole number, got 1.5"),
        ([float("inf")], "max", 10, "NaN or infinity"),
    ],
)
def test_aggregate_refuses(values, method, n, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        aggregate(values, method, n)


def test_image_defaults_for_least_confidence():
    assert image_uncertainty([[0.9, 0.1], [0.3, 0.2], [0.1, 0.05]]) == pytest.approx(0.7)  # .1 is below .25
    assert image_uncertainty([[0.25]]) == pytest.approx(0.75)  # the threshold counts
    assert image_uncertainty([[0.2, 0.1]]) == 1.0  # nothing to be sure of


@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_image_defaults_see_the_background(measure):
    # .5 against the background: as unsure as can be; one class only, so C = 1 works
    assert image_uncertainty([[0.5]], measure) == pytest.approx(1.0)
    assert image_uncertainty([[0.06], [0.999]], measure) == pytest.approx(
        float(MEASURES[measure].function([[0.94, 0.06]])[0])
    )
    # below .05 the best candidate speaks: nearly certain background
    assert image_uncertainty([[0.01], [0.02]], measure) == pytest.approx(
        float(MEASURES[measure].function([[0.98, 0.02]])[0])
    )


@pytest.mark.parametrize(
    ("measure", "empty", "expected"),
    [
        ("least_confidence", "uncertain", 1.0),
        ("least_confidence", "certain", 0.0),
        ("least_confidence", "best_candidate", 0.8),
        ("margin", "uncertain", 1.0),
        ("entropy", "certain", 0.0),
        ("margin", "best_candidate", 1 - (0.8 - 0.2)),
    ],
)
def test_empty_policies(measure, empty, expected):
    assert image_uncertainty([[0.1], [0.2]], measure, threshold=0.25, empty=empty) == pytest.approx(expected)


@pytest.mark.parametrize(("measure", "expected"), [("least_confidence", 1.0), ("margin", 0.0), ("entropy", 0.0)])
def test_best_candidate_without_any_candidate(measure, expected):
    assert image_uncertainty([], measure, empty="best_candidate") == expected


def test_a_calibrated_empty_image_is_worth_the_chance_that_something_was_missed():
    assert image_uncertainty([[0.1], [0.2]], empty="calibrated", chance_missed=0.3) == 0.3
    assert image_uncertainty([[0.1], [0.2]], empty="calibrated") == pytest.approx(0.8)  # as the best candidate
    assert image_uncertainty([[0.1]], empty="calibrated", method="open", chance_missed=0.5) == pytest.approx(
        (math.log(2) + 2) / 2
    )
    with pytest.raises(InputInvalid, match="chance_missed"):
        image_uncertainty([[0.1]], empty="calibrated", chance_missed=1.5)


def test_class_weights_count_by_likeliest_class():
    boxes = [[0.8, 0.1], [0.1, 0.6]]
    assert image_uncertainty(boxes, class_weights=[1, 2]) == pytest.approx(0.8)
    assert image_uncertainty(boxes, class_weights=[3, 1]) == pytest.approx(0.6)
    assert image_uncertainty(boxes, method="sum", class_weights=[1, 3]) == pytest.approx(0.2 + 1.2)
    assert image_uncertainty([[0.1, 0.2]], empty="best_candidate", class_weights=[1, 0.5]) == pytest.approx(0.4)
    assert image_uncertainty([], class_weights=[1, 3]) == 1.0  # no class, no weight


def test_images_in_order():
    values = image_uncertainties([[[0.9]], [], [[0.4]]])
    assert values.tolist() == pytest.approx([0.1, 1.0, 0.6])
    assert image_uncertainties([]).tolist() == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"measure": "entropie"}, "Did you mean 'entropy'"),
        ({"empty": "unsure"}, "Unknown empty policy 'unsure'"),
        ({"method": "median"}, "Unknown aggregate method"),
        ({"threshold": 1.5}, "threshold must be at most 1"),
        ({"threshold": float("nan")}, "threshold holds NaN"),
        ({"class_weights": [1.0]}, "class_weights has 1 values, but there are 2"),
        ({"class_weights": [1.0, -1.0]}, "at least 0"),
    ],
)
@pytest.mark.parametrize("boxes", [[[0.9, 0.1]], [[0.1, 0.1]]])
def test_image_uncertainty_refuses(options, sentence, boxes):
    with pytest.raises(InputInvalid, match=sentence):
        image_uncertainty(boxes, **options)


def test_class_weights_by_hand():
    # median 90: sqrt(100 / 20), sqrt(100 / 100), sqrt(100 / 400)
    assert class_weights([10, 90, 390]) == pytest.approx([math.sqrt(5), 1.0, 0.5])
    assert class_weights([0, 1000, 1000])[0] == 3.0  # clipped
    assert class_weights([1, 1, 4000])[2] == 0.5
    assert class_weights([0, 0]).tolist() == [1.0, 1.0]
    assert class_weights([7]).tolist() == [1.0]


@given(hnp.arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 10**6)))
def test_rarer_classes_never_weigh_less(counts):
    weights = class_weights(counts)
    assert weights.min() >= 0.5
    assert weights.max() <= 3
    assert (np.diff(weights[np.argsort(counts)]) <= 0).all()


@pytest.mark.parametrize("counts", [[], [-1, 3], [float("nan")], [[1, 2]]])
def test_class_weights_refuse(counts):
    with pytest.raises(InputInvalid):
        class_weights(counts)


def test_scale_only_touches_what_left_the_unit_interval():
    assert uncertainty_scale([0.2, 0.8]) == 1.0
    assert uncertainty_scale([]) == 1.0
    assert uncertainty_scale([0.5, 4.0]) == 4.0
    assert scaled([0.5, 4.0, 8.0], 4.0).tolist() == [0.125, 1.0, 1.0]
