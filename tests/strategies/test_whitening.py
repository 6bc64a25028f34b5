from __future__ import annotations

import numpy as np
import pytest

from strategies import STRATEGIES, InputInvalid, Pool, late_utility
from strategies.diversity import k_center
from strategies.whitening import RIDGE, fit_whitening

GREEDY = ("k_center", "coverage", "hybrid_k_center", "hybrid_coverage")


def test_every_way_to_differ_counts_alike():
    # variances 4 and 1, mean (10, 10); ridge .1 * 2.5
    corners = np.array([[12.0, 11], [12, 9], [8, 11], [8, 9]])
    found = fit_whitening(corners)
    assert found.mean.tolist() == [10.0, 10.0]
    assert found.matrix == pytest.approx(np.diag([1 / np.sqrt(4 + RIDGE * 2.5), 1 / np.sqrt(1 + RIDGE * 2.5)]))
    row = np.array([2 / np.sqrt(4.25), 1 / np.sqrt(1.25)])
    assert found.apply([[12.0, 11], [10, 10]]) == pytest.approx(np.array([row / np.linalg.norm(row), [0, 0]]))


def test_parts_together_are_the_whole():
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) + 5
    whole, parts = fit_whitening(rows), fit_whitening(rows[:20], [], rows[20:])
    assert parts.mean == pytest.approx(whole.mean)
    assert parts.matrix == pytest.approx(whole.matrix, rel=1e-4, abs=1e-5)


def test_more_rows_than_a_block_holds():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(5000, 256)).astype(np.float32) * np.linspace(0.1, 3, 256, dtype=np.float32)
    found = fit_whitening(rows)
    expected = np.cov(rows.T.astype(np.float64), bias=True)
    expected += RIDGE * np.trace(expected) / 256 * np.eye(256)
    assert found.matrix @ expected @ found.matrix == pytest.approx(np.eye(256), abs=1e-3)
    assert np.linalg.norm(found.apply(rows), axis=1) == pytest.approx(np.ones(5000), abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_without_spread_all_are_alike(value):
    rounding = np.random.default_rng(3).normal(scale=1e-7 * value, size=(7, 3))
    found = fit_whitening((np.full((7, 3), value) + rounding).astype(np.float32))
    assert not found.apply(np.full((2, 3), value) + rounding[:2]).any()


def test_no_rows_and_bad_rows():
    assert fit_whitening([], []).matrix.shape == (0, 0)
    with pytest.raises(InputInvalid, match="NaN"):
        fit_whitening([[np.nan, 1.0]])
    with pytest.raises(InputInvalid, match="3 columns, but 2 are expected"):
        fit_whitening([[0.0, 1], [1, 0]]).apply([[1.0, 2, 3]])


def bursts(n_bursts: int = 40, frames: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Frames of bursts as a network sees them: scenes differ by a little in many ways, all images by a lot in one."""
    rng = np.random.default_rng(2)
    scenes = rng.normal(scale=0.2, size=(n_bursts, 32)).repeat(frames, axis=0)
    rows = scenes + rng.normal(scale=0.03, size=scenes.shape)
    rows[:, 0] += rng.normal(scale=3.0, size=len(rows))  # brightness
    return rows + 4, np.arange(n_bursts).repeat(frames)


def test_bursts_stand_out():
    """The reason to whiten: brightness hides that frames show one scene, and k-center takes the scene again."""
    rows, burst = bursts()
    plain = len(set(burst[k_center(rows, 40)].tolist()))
    white = len(set(burst[k_center(fit_whitening(rows).apply(rows), 40)].tolist()))
    assert plain < 30
    assert white == 40


@pytest.mark.parametrize("name", GREEDY)
def test_an_image_scored_late_lands_where_it_would_have_been(name):
    rows, _ = bursts()
    uncertainty = {"least_confidence": np.linspace(0, 1, len(rows))}
    pool = Pool.build(np.arange(len(rows)), uncertainty, rows, rows[:3] + 0.01)
    selection = STRATEGIES[name](pool, 20, np.random.default_rng(0), {"whiten": True})
    outside = np.setdiff1d(np.arange(len(rows)), selection.positions)
    again = late_utility(name, selection.late, pool.uncertainty, pool.embeddings, {"whiten": True})
    assert again[outside] == pytest.approx(selection.utilities[outside], abs=1e-4)
    one = late_utility(name, selection.late, {"least_confidence": uncertainty["least_confidence"][[7]]}, rows[[7]])
    assert one == pytest.approx(again[[7]], abs=1e-4)
