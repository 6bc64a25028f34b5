from __future__ import annotations

from typing import Any

import pytest

from backend.batch_view import class_balance, measure_of, weights_of, words_for
from backend.views import BatchTask, Box

DOUBT = "most uncertain box: wire"


def task(*scores: float, label: str = "wire", **values: Any) -> BatchTask:
    boxes = [Box(label=label, x=1, y=1, width=5, height=5, score=score, colour=0) for score in scores]
    told = {"uncertainty": 0.5, "diversity": 0.5, **values}
    return BatchTask(
        task_id=1, rank=0, holdout=False, labelled=False, utility=0.5, boxes=boxes, n_boxes=len(boxes), image_width=64,
        image_height=48, problem=None, thumbnail="", label_studio="", **told,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "found", "words"),
    [
        ("hybrid", task(0.9, 0.41, uncertainty=0.59), f"{DOUBT} .41 against background"),
        ("entropy", task(0.9, diversity=0.8), f"{DOUBT} .90 against background; unlike the images around it"),
        ("coverage", task(uncertainty=None, diversity=0.8), "unlike anything labelled or chosen before"),
        ("hybrid", task(), "no box is sure enough to be drawn, but something may be there"),
        ("hybrid", task(0.9, uncertainty=0.1, diversity=0.1), "the detector is rather sure of it; a typical image"),
        ("k_center", task(uncertainty=None, diversity=0.1), "much like one that is labelled or was chosen before"),
        ("committee", task(0.6, uncertainty=0.9), "the committee's members disagree"),
        ("random", task(0.6), "drawn at random"),
        ("hybrid_k_center", task(0.9, 0.41), "least sure box: wire .41"),
        ("hybrid_k_center", task(0.41, uncertainty=0.1), f"{DOUBT} .41 against background"),
        ("hybrid_k_center", task(0.9, 0.4, uncertainty=0.8), "few images leave as much open; least sure box: wire .40"),
        ("hybrid_k_center", task(0.9, 0.8), "the detector is rather sure of what is drawn"),
        ("hybrid_k_center", task(uncertainty=0.1), "no box is sure enough to be drawn"),
        ("hybrid_k_center", task(uncertainty=None, diversity=0.9), "unlike anything labelled or chosen before"),
    ],
)
def test_why_a_task_is_in_the_batch(strategy: str, found: BatchTask, words: str) -> None:
    assert words_for(found, strategy, measure_of(strategy, {})) == words


def test_the_measure_says_which_box_is_the_most_uncertain() -> None:
    """Least confidence: the faintest; margin and entropy: the one nearest to a half."""
    assert words_for(task(0.9, 0.3, 0.52, uncertainty=0.7), "hybrid", "least_confidence").startswith(f"{DOUBT} .30")
    assert words_for(task(0.9, 0.3, 0.52), "hybrid", measure_of("hybrid", {"measure": "entropy"})).startswith(
        f"{DOUBT} .52"
    )
    assert words_for(task(0.9, 0.3, 0.52), "margin", measure_of("margin", {})).startswith(f"{DOUBT} .52")


@pytest.mark.parametrize(
    ("strategy", "options", "weights"),
    [
        ("hybrid", {}, (0.7, 0.3)),
        ("hybrid", {"alpha": 1.0, "beta": 1.0}, (0.5, 0.5)),  # as hybrid_utility divides them
        ("hybrid", {"alpha": 0.2, "beta": 0.3}, (0.2, 0.3)),
        ("coverage", {}, None),
        ("hybrid_k_center", {"mix": "sum", "alpha": 0.5, "beta": 0.5}, (0.5, 0.5)),
        ("hybrid_k_center", {}, None),  # a product
        ("hybrid", {"alpha": 9}, None),
        ("gone", {}, None),
    ],
)
def test_weights_of_the_parts(strategy: str, options: dict[str, Any], weights: tuple[float, float] | None) -> None:
    assert weights_of(strategy, options) == weights


def test_balance_of_classes() -> None:
    found = class_balance({"bolt": 60, "nut": 30, "wire": 6}, {"wire": 3, "gear": 1})
    assert [(one.name, one.labelled, one.predicted, one.rare) for one in found] == [
        ("bolt", 60, 0, False), ("nut", 30, 0, False), ("wire", 6, 3, True), ("gear", 0, 1, True),
    ]  # fmt: skip  # the mean is 24, half of it 12
    assert [(one.labelled_share, one.predicted_share) for one in found[2:]] == [(0.0625, 0.75), (0.0, 0.25)]
    assert class_balance({}, {}) == []
