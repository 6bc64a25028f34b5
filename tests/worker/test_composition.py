from __future__ import annotations

import numpy as np
import pytest

from worker.composition import alike_earlier, contents, mean_ap50, rare_names


def test_rare_is_below_six_percent_and_above_none() -> None:
    assert rare_names({"bolt": 90, "crack": 5, "pit": 6, "ghost": 0}, 100) == ["crack"]


def test_the_mean_is_over_classes_that_were_measured() -> None:
    assert mean_ap50({"crack": 0.2, "pit": 0.4, "bolt": 0.9}, ["crack", "pit"]) == pytest.approx(0.3)
    assert mean_ap50({"crack": 0.2, "pit": None}, ["crack", "pit", "ghost"]) == 0.2
    assert mean_ap50({"bolt": 0.9}, ["crack"]) is None


def test_what_images_hold() -> None:
    images = [{"bolt": 2, "crack": 1}, {}, {"bolt": 3}, {"crack": 0}]
    assert contents(images, ["crack"]) == {"boxes": 6, "empty_images": 2, "rare_images": 1}
    assert contents([], ["crack"]) == {"boxes": 0, "empty_images": 0, "rare_images": 0}


def test_look_alikes_are_of_earlier_rows_only() -> None:
    rows = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8], [0, 1]], np.float32)
    assert alike_earlier(rows, 0.99).tolist() == [False, False, True, False, True]
    assert alike_earlier(rows, 0.7).tolist() == [False, False, True, True, True]  # .8 with the second row
    assert not alike_earlier(rows, 1.0).any()


def test_look_alikes_over_more_rows_than_are_compared_at_once() -> None:
    rows = np.eye(1100, dtype=np.float32)
    rows[1050] = rows[3]
    rows[5] = rows[1099]
    assert np.flatnonzero(alike_earlier(rows, 0.99)).tolist() == [1050, 1099]
