from __future__ import annotations

import math

import numpy as np
import pytest

from strategies import InputInvalid, OptionsInvalid, StrategyUnknown, late_utility


def test_uncertainty_on_the_old_scale():
    late = {"uncertainty_scale": 4.0}
    assert late_utility("margin", late, {"margin": [1.0, 4.0, 9.0]}, np.ones((3, 2))).tolist() == [0.25, 1.0, 1.0]


def test_kmeans_on_the_old_centroids_and_range():
    late = {"centroids": np.array([[0.0], [10.0]]), "distance_low": 1.0, "distance_high": 3.0}
    points = [[0.5], [2.0], [7.5], [100.0]]  # .5, 2, 2.5 and 90 from the nearest
    assert late_utility("kmeans", late, {}, points).tolist() == pytest.approx([0, 0.5, 0.75, 1])
    flat = late | {"distance_high": 1.0}
    assert late_utility("kmeans", flat, {}, points).tolist() == [0, 0, 0, 0]


def test_hybrid_mixes_with_the_options_of_its_selection():
    late = {"centroids": [[0.0]], "distance_low": 0.0, "distance_high": 4.0, "uncertainty_scale": 2.0}
    arguments = (late, {"least_confidence": [1.0], "entropy": [2.0]}, [[1.0]])
    assert late_utility("hybrid", *arguments) == pytest.approx([0.7 * 0.5 + 0.3 * 0.25])
    assert late_utility("hybrid", *arguments, {"alpha": 0, "beta": 1}) == pytest.approx([0.25])
    assert late_utility("hybrid", *arguments, {"measure": "entropy"}) == pytest.approx([0.7 + 0.3 * 0.25])


def test_committee_mixes_the_disagreement_of_late_images():
    late = {"centroids": [[0.0]], "distance_low": 0.0, "distance_high": 4.0, "uncertainty_scale": 2.0}
    scores = {"least_confidence": [0.9, 0.9], "disagreement": [1.0, 9.0]}
    assert late_utility("committee", late, scores, [[1.0], [4.0]]) == pytest.approx([0.7 * 0.5 + 0.3 * 0.25, 1.0])
    assert late_utility("committee", late, scores, [[1.0], [4.0]], {"alpha": 1, "beta": 0}).tolist() == [0.5, 1.0]
    with pytest.raises(InputInvalid, match="no 'disagreement': they were scored without the committee"):
        late_utility("committee", late, {"least_confidence": [0.9]}, [[1.0]])
    with pytest.raises(InputInvalid, match="disagreement has 1 values, but there are 2 rows"):
        late_utility("committee", late, {"disagreement": [0.9]}, [[1.0], [2.0]])


def test_greedy_walks_put_late_images_behind_the_batch():
    late = {"anchors": [[0.0], [10.0]], "distance_high": 4.0}
    assert late_utility("k_center", late, {}, [[0.0], [2.0], [100.0]]) == pytest.approx([0, 0.25, 0.5])
    assert late_utility("k_center", late | {"anchors": []}, {}, [[3.0]]).tolist() == [0.5]
    late = {"anchors": [[1.0, 0.0]], "bandwidth": 1.0, "uncertainty_scale": 1.0}
    left = 1 - math.exp(-2)
    points = [[3.0, 0.0], [0.0, 3.0]]
    assert late_utility("coverage", late, {}, points) == pytest.approx([0, left / 2])
    values = late_utility("hybrid_coverage", late, {"least_confidence": [1.0, 0.5]}, points)
    assert values == pytest.approx([0, left / 4])


def test_random_is_spread_and_depends_on_the_seed():
    points = np.random.default_rng(0).normal(size=(2000, 3))
    values = late_utility("random", {"seed": 7.0}, {}, points)
    assert np.histogram(values, bins=10, range=(0, 1))[0].min() > 150  # 200 expected, 13 the deviation
    assert late_utility("random", {"seed": 7.0}, {}, points).tolist() == values.tolist()
    assert late_utility("random", {"seed": 8.0}, {}, points).tolist() != values.tolist()


@pytest.mark.parametrize(
    ("late", "uncertainty", "embeddings", "sentence"),
    [
        ({}, {"margin": [0.5]}, [[1.0]], "late has no 'uncertainty_scale'"),
        ({"uncertainty_scale": 1.0}, {}, [[1.0]], "no uncertainty 'margin'"),
        ({"uncertainty_scale": 1.0}, {"margin": [float("nan")]}, [[1.0]], "NaN"),
        ({"uncertainty_scale": 1.0}, {"margin": [0.5, 0.5]}, [[1.0]], "2 values, but there are 1 rows"),
        ({"uncertainty_scale": 1.0}, {"margin": [0.5]}, [[float("nan")]], "embeddings holds NaN"),
        ({"uncertainty_scale": float("nan")}, {"margin": [0.5]}, [[1.0]], "uncertainty_scale.*NaN"),
    ],
)
def test_bad_late_input_is_refused(late, uncertainty, embeddings, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        late_utility("margin", late, uncertainty, embeddings)


def test_embeddings_of_another_model_are_refused():
    late = {"centroids": np.ones((2, 3)), "distance_low": 0.0, "distance_high": 1.0}
    with pytest.raises(InputInvalid, match="3 columns, but 2 are expected"):
        late_utility("kmeans", late, {}, [[1.0, 2.0]])


def test_names_and_options_are_checked():
    with pytest.raises(StrategyUnknown):
        late_utility("best", {}, {}, [])
    with pytest.raises(OptionsInvalid):
        late_utility("kmeans", {}, {}, [], {"clusters": 3})
