"""The strategies: a scored pool in, a selection out.

All share `(pool, batch_size, rng, options) -> Selection` and these promises (tests/strategies/test_contract.py):
min(batch_size, N) distinct positions in the order annotators should see them; utilities of all rows finite and in
[0, 1]; the same pool, rng state and options give the same answer; an empty pool gives an empty selection. Raises
OptionsInvalid, PoolInvalid when the pool lacks the measure or the committee's disagreement, InputInvalid for
batch_size < 1 or something that is no numpy Generator.

`suppress_duplicates` (off but for the hybrids and committee) skips rows whose near-duplicate is in the batch or
labelled, as far as the pool says: without duplicate_groups and duplicates_of_labelled there is nothing to skip.

Rankings (random, least_confidence, margin, entropy, kmeans, hybrid, committee) take the highest utilities; equal ones
in row order, that is by key. Greedy walks (k_center, coverage and their hybrids) choose each image in view of those
before it: the batch gets utilities falling from 1 to above 0.5, all other rows lie in [0, 0.5].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.arrays import Booleans, Integers, as_count
from strategies.diversity import (
    Mixture,
    best_kernel,
    fit_kmeans,
    unit_rows,
    walk_coverage,
    walk_k_center,
)
from strategies.errors import InputInvalid
from strategies.hybrid import hybrid_utility, select_batch
from strategies.late import REST, far_from
from strategies.options import validate_options
from strategies.pool import Pool, Selection
from strategies.uncertainty import scaled, uncertainty_scale
from strategies.whitening import fit_whitening

Vector = NDArray[np.float64]
Options = Mapping[str, object] | None
Late = dict[str, float | NDArray[Any]]


def random(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """A random order: utility (N - rank) / N. Depends on rng and the number of rows only, so on the sorted keys.

    late: "seed", from which an image scored later gets a number of its own.
    """
    settings = _settings("random", batch_size, rng, options)
    order = rng.permutation(len(pool))
    utilities = np.zeros(len(pool))
    utilities[order] = np.arange(len(pool), 0, -1) / max(len(pool), 1)
    late: Late = {"seed": float(rng.integers(2**32))}
    return Selection(_best(pool, utilities, batch_size, settings), utilities, {}, late)


def least_confidence(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """The most uncertain by 1 - max p (Lewis & Gale 1994). late: "uncertainty_scale"."""
    return _by_uncertainty("least_confidence", pool, batch_size, rng, options)


def margin(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """The most uncertain by the gap between the two likeliest (Scheffer et al. 2001). late: "uncertainty_scale"."""
    return _by_uncertainty("margin", pool, batch_size, rng, options)


def entropy(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """The most uncertain by entropy (Shannon 1948; Settles 2009). late: "uncertainty_scale"."""
    return _by_uncertainty("entropy", pool, batch_size, rng, options)


def kmeans(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """The farthest from their k-means centroid. late: "centroids", "distance_low", "distance_high".

    All distances equal (one image, exact duplicates): utilities 0, and row order decides.
    """
    settings = _settings("kmeans", batch_size, rng, options)
    fit = fit_kmeans(pool.embeddings, settings["n_clusters"])
    utilities = fit.diversity(pool.embeddings)
    late: Late = {"centroids": fit.centroids, "distance_low": fit.low, "distance_high": fit.high}
    positions = _best(pool, utilities, batch_size, settings)
    return Selection(positions, utilities, {"diversity": utilities}, late)


def hybrid(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """alpha * uncertainty + beta * k-means distance, near-duplicates left out: the rule of the textbooks.

    late: "uncertainty_scale", "centroids", "distance_low", "distance_high".
    """
    settings = _settings("hybrid", batch_size, rng, options)
    return _mixed(pool, batch_size, settings, pool.uncertainty_of(settings["measure"]))


def committee(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """As `hybrid`, with the committee's disagreement as the uncertainty (Seung et al. 1992; see `committee.py`).

    parts and late have the names they have in `hybrid`; `late_utility` needs the disagreement of the late images.
    PoolInvalid when the pool has no disagreement.
    """
    settings = _settings("committee", batch_size, rng, options)
    return _mixed(pool, batch_size, settings, pool.committee_disagreement())


def k_center(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """Greedy core-set (Sener & Savarese 2018): each image the farthest from all labelled and taken ones.

    Rows outside the batch: half their distance to the nearest labelled or taken image, over the distance at which the
    last image was taken. parts: "diversity", each row's distance to what was labelled or taken before it, over the
    largest finite one. late: "anchors" (labelled and taken embeddings), "distance_high".
    """
    settings = _settings("k_center", batch_size, rng, options)
    pool, whitening = _space(pool, settings)
    walk = walk_k_center(
        pool.embeddings, batch_size, pool.labelled_embeddings, *_duplicates(pool, settings["suppress_duplicates"])
    )
    rest = np.delete(walk.distances, walk.positions)
    finite = walk.pick_distances[np.isfinite(walk.pick_distances)]
    high = float(finite[-1]) if len(finite) else float(rest.max(initial=0.0))
    before = walk.distances.copy()
    before[walk.positions] = walk.pick_distances
    late: Late = {"anchors": _anchors(pool, walk.positions), "distance_high": high, **whitening}
    utilities = _walk_utilities(walk.positions, far_from(walk.distances, high))
    largest = float(before[np.isfinite(before)].max(initial=0.0))
    return Selection(walk.positions, utilities, {"diversity": far_from(before, largest)}, late)


def coverage(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """Greedy facility location, all images of equal weight (MaxHerding, ECCV 2024): the batch stands for the pool.

    Rows outside the batch: half of what of them is left uncovered. parts: "diversity", 1 - kernel to the nearest image
    labelled or taken before. late: "anchors" (labelled and taken embeddings), "bandwidth".
    """
    settings = _settings("coverage", batch_size, rng, options)
    return _covering(pool, batch_size, rng, settings, None)


def hybrid_k_center(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """uncertainty^alpha * (distance to the nearest labelled or taken image)^beta, no near-duplicates. The default.

    A core-set (Sener & Savarese 2018) weighed by uncertainty: the distance of `k_center`, over the largest there was at
    the start, in whitened embeddings; an image like one that is labelled or in the batch is worth less, by how much it
    is like it, however uncertain. mix "sum" weighs the two as `hybrid` does. Rows outside the batch: half of their
    value. parts and late as in `k_center`, and "uncertainty", "uncertainty_scale", and with whiten "whitening_mean" and
    "whitening_matrix".
    """
    settings = _settings("hybrid_k_center", batch_size, rng, options)
    pool, whitening = _space(pool, settings)
    weights = (settings["alpha"], settings["beta"], settings["mix"])
    uncertainty, scale = _uncertainty(pool, settings["measure"])
    duplicates = _duplicates(pool, settings["suppress_duplicates"])
    mixture = Mixture(uncertainty, *weights)
    walk = walk_k_center(pool.embeddings, batch_size, pool.labelled_embeddings, *duplicates, mixture)
    diversity = far_from(walk.distances, walk.high)
    rest = hybrid_utility(uncertainty, diversity, *weights)
    diversity[walk.positions] = far_from(walk.pick_distances, walk.high)
    late: Late = {
        "anchors": _anchors(pool, walk.positions),
        "distance_high": walk.high,
        "uncertainty_scale": scale,
        **whitening,
    }
    parts = {"uncertainty": uncertainty, "diversity": diversity}
    return Selection(walk.positions, _walk_utilities(walk.positions, rest), parts, late)


def hybrid_coverage(pool: Pool, batch_size: int, rng: np.random.Generator, options: Options = None) -> Selection:
    """Facility location weighted by uncertainty (UHerding, ICLR 2025), near-duplicates left out.

    As `coverage`, with each image's uncertainty as the weight of covering it; parts has "uncertainty" too, late also
    "uncertainty_scale". All uncertainties 0: equal weights.
    """
    settings = _settings("hybrid_coverage", batch_size, rng, options)
    return _covering(pool, batch_size, rng, settings, settings["measure"])


def _settings(name: str, batch_size: int, rng: np.random.Generator, options: Options) -> dict[str, Any]:
    if not isinstance(rng, np.random.Generator):
        raise InputInvalid(f"rng must be a numpy Generator, such as numpy.random.default_rng(42); got {rng!r}.")
    as_count(batch_size, "batch_size")
    return validate_options(name, options)


def _space(pool: Pool, settings: Mapping[str, Any]) -> tuple[Pool, Late]:
    """The pool with the embeddings in which distances are measured, and what late images need to get there.

    Learned from all images of the project, labelled ones too: a pool that shrinks must not change what is near.
    """
    if not settings["whiten"] or not len(pool):
        return pool, {}
    fit = fit_whitening(pool.embeddings, pool.labelled_embeddings)
    moved = replace(
        pool, embeddings=fit.apply(pool.embeddings), labelled_embeddings=fit.apply(pool.labelled_embeddings)
    )
    return moved, {"whitening_mean": fit.mean, "whitening_matrix": fit.matrix}


def _duplicates(pool: Pool, suppress: bool) -> tuple[Integers | None, Booleans | None]:
    return (pool.duplicate_groups, pool.duplicates_of_labelled) if suppress else (None, None)


def _best(pool: Pool, utilities: Vector, batch_size: int, settings: Mapping[str, Any]) -> Integers:
    groups, of_labelled = _duplicates(pool, settings["suppress_duplicates"])
    return select_batch(utilities, groups, batch_size, of_labelled)


def _mixed(pool: Pool, batch_size: int, settings: Mapping[str, Any], values: Vector) -> Selection:
    """alpha * values, brought to [0, 1], + beta * k-means distance."""
    scale = uncertainty_scale(values)
    uncertainty = scaled(values, scale)
    fit = fit_kmeans(pool.embeddings, settings["n_clusters"])
    diversity = fit.diversity(pool.embeddings)
    utilities = hybrid_utility(uncertainty, diversity, settings["alpha"], settings["beta"])
    late: Late = {
        "uncertainty_scale": scale,
        "centroids": fit.centroids,
        "distance_low": fit.low,
        "distance_high": fit.high,
    }
    parts = {"uncertainty": uncertainty, "diversity": diversity}
    return Selection(_best(pool, utilities, batch_size, settings), utilities, parts, late)


def _uncertainty(pool: Pool, measure: str) -> tuple[Vector, float]:
    values = pool.uncertainty_of(measure)
    scale = uncertainty_scale(values)
    return scaled(values, scale), scale


def _by_uncertainty(
    name: str, pool: Pool, batch_size: int, rng: np.random.Generator, options: Options
) -> Selection:
    settings = _settings(name, batch_size, rng, options)
    utilities, scale = _uncertainty(pool, name)
    positions = _best(pool, utilities, batch_size, settings)
    return Selection(positions, utilities, {"uncertainty": utilities}, {"uncertainty_scale": scale})


def _covering(
    pool: Pool, batch_size: int, rng: np.random.Generator, settings: Mapping[str, Any], measure: str | None
) -> Selection:
    pool, whitening = _space(pool, settings)
    uncertainty, scale = (None, 1.0) if measure is None else _uncertainty(pool, measure)
    walk = walk_coverage(
        pool.embeddings,
        batch_size,
        uncertainty,
        pool.labelled_embeddings,
        *_duplicates(pool, settings["suppress_duplicates"]),
        max_references=settings["max_references"],
        seed=int(rng.integers(2**32)),
    )
    anchors = _anchors(pool, walk.positions)
    late: Late = {"anchors": anchors, "bandwidth": walk.bandwidth, **whitening}
    left = 1 - best_kernel(pool.embeddings, anchors, walk.bandwidth)
    diversity = left.copy()
    diversity[walk.positions] = _left_before(pool, walk.positions, walk.bandwidth)
    parts = {"diversity": diversity}
    if uncertainty is not None:
        left = left * uncertainty
        parts["uncertainty"] = uncertainty
        late["uncertainty_scale"] = scale
    return Selection(walk.positions, _walk_utilities(walk.positions, left), parts, late)


def _left_before(pool: Pool, positions: Integers, bandwidth: float) -> Vector:
    """(K,) what of each taken image was uncovered when it was taken."""
    taken = pool.embeddings[positions]
    unit = unit_rows(taken)
    nearest = np.full(len(taken), np.inf)
    for turn in range(1, len(taken)):
        nearest[turn] = np.linalg.norm(unit[:turn] - unit[turn], axis=1).min()
    by_labelled = best_kernel(taken, pool.labelled_embeddings, bandwidth)
    result: Vector = 1 - np.maximum(by_labelled, np.exp(-((nearest / bandwidth) ** 2)))
    return result


def _anchors(pool: Pool, positions: Integers) -> NDArray[np.float32]:
    if not len(positions):
        return pool.labelled_embeddings  # an empty pool does not know its width
    return np.concatenate([pool.labelled_embeddings, pool.embeddings[positions]])


def _walk_utilities(positions: Integers, rest: Vector) -> Vector:
    """(N,) the batch from 1 down to above REST in the order taken, the others their value in [0, 1] times REST."""
    utilities = REST * np.clip(rest, 0.0, 1.0)
    utilities[positions] = 1 - (1 - REST) * np.arange(len(positions)) / max(len(positions), 1)
    return utilities
