"""A utility for images that were scored after a selection, on the scale of that selection.

A task imported while a round is open must find its place in the order without selecting again. Rankings apply the
pool's own scale, centroids and range, clipped to [0, 1]. Greedy walks place it among the rows outside the batch, so in
[0, 0.5]: it was not weighed against the batch, so it queues behind it until the next round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.arrays import Floats, as_embeddings, as_vector
from strategies.diversity import KMeansScale, best_kernel, nearest_distances
from strategies.errors import InputInvalid
from strategies.hybrid import hybrid_utility
from strategies.options import check_name, validate_options
from strategies.uncertainty import scaled
from strategies.whitening import Whitening

Vector = NDArray[np.float64]

# Beside the measures in what late_utility is given: the committee's disagreement takes the place of an uncertainty.
DISAGREEMENT = "disagreement"
# Greedy walks: the batch lies above this utility, every other row at or below it.
REST = 0.5


class LateImages:
    """M images scored later, and what the selection left for them; every access is checked."""

    def __init__(self, late: Mapping[str, Any], uncertainty: Mapping[str, ArrayLike], embeddings: ArrayLike) -> None:
        self._late = late
        self._uncertainty = uncertainty
        self.embeddings: Floats = as_embeddings(embeddings).astype(np.float32, copy=False)
        if "whitening_matrix" in late and len(self.embeddings):
            self.embeddings = Whitening(late["whitening_mean"], late["whitening_matrix"]).apply(self.embeddings)

    def number(self, name: str) -> float:
        return float(as_vector([self._kept(name)], f"late[{name!r}]", 1)[0])

    def matrix(self, name: str) -> Floats:
        kept = self._kept(name)
        width = self.embeddings.shape[1] if len(self.embeddings) else None
        return as_embeddings(kept, f"late[{name!r}]", width)

    def uncertainty(self, measure: str) -> Vector:
        if measure not in self._uncertainty:
            raise InputInvalid(f"The late images have no uncertainty {measure!r}. Score them with that measure.")
        name = f"uncertainty[{measure!r}]"
        values = as_vector(self._uncertainty[measure], name, len(self.embeddings), low=0.0)
        return scaled(values, self.number("uncertainty_scale"))

    def disagreement(self) -> Vector:
        if DISAGREEMENT not in self._uncertainty:
            raise InputInvalid(
                f"The late images have no {DISAGREEMENT!r}: they were scored without the committee. Score them with "
                "all of its members, or select again with another strategy."
            )
        values = as_vector(self._uncertainty[DISAGREEMENT], DISAGREEMENT, len(self.embeddings), low=0.0)
        return scaled(values, self.number("uncertainty_scale"))

    def _kept(self, name: str) -> Any:
        if name not in self._late:
            raise InputInvalid(f"late has no {name!r}: it belongs to another strategy. Use that of the same selection.")
        return self._late[name]


def late_utility(
    name: str,
    late: Mapping[str, Any],
    uncertainty: Mapping[str, ArrayLike],
    embeddings: ArrayLike,
    options: Mapping[str, object] | None = None,
) -> Vector:
    """Utilities of M images scored after a selection.

    Args: name, options: of the strategy that made the selection; late: its Selection.late; uncertainty: measure ->
        (M,) >= 0 (only what the strategy uses is read), for "committee" it carries "disagreement" -> (M,) >= 0;
        embeddings (M, D), of the model the pool was embedded with.
    Returns: (M,) in [0, 1]; an image of the pool gets the utility it had there (in a greedy walk: if outside the
        batch); "random" gives each distinct embedding a number of its own, the same in every call.
    Raises: StrategyUnknown, OptionsInvalid, InputInvalid (NaN, wrong shapes, a missing measure or late value).
    """
    settings = validate_options(check_name(name), options)
    return np.clip(_LATE[name](LateImages(late, uncertainty, embeddings), settings), 0.0, 1.0)


def far_from(distances: Vector, high: float) -> Vector:
    """distances / high clipped to [0, 1]; infinite (nothing to be near to) is 1; without spread (high 0) zeros."""
    if high <= 0:
        return np.where(np.isinf(distances), 1.0, 0.0)
    return np.clip(distances / high, 0.0, 1.0)


def _random(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    # From the content of each row, not from a generator: images that arrive one by one must not all get the first draw.
    key = int(images.number("seed")).to_bytes(8, "big")
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in images.embeddings)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests], dtype=np.float64)


def _by_uncertainty(measure: str) -> Callable[[LateImages, Mapping[str, Any]], Vector]:
    return lambda images, settings: images.uncertainty(measure)


def _kmeans(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    scale = KMeansScale(images.matrix("centroids"), images.number("distance_low"), images.number("distance_high"))
    return scale.diversity(images.embeddings)


def _hybrid(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    uncertainty = images.uncertainty(settings["measure"])
    return hybrid_utility(uncertainty, _kmeans(images, settings), settings["alpha"], settings["beta"])


def _committee(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    return hybrid_utility(images.disagreement(), _kmeans(images, settings), settings["alpha"], settings["beta"])


def _hybrid_k_center(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    uncertainty = images.uncertainty(settings["measure"])
    return REST * hybrid_utility(uncertainty, _far(images), settings["alpha"], settings["beta"], settings["mix"])


def _k_center(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    return REST * _far(images)


def _far(images: LateImages) -> Vector:
    distances = nearest_distances(images.embeddings, images.matrix("anchors"))
    return far_from(distances, images.number("distance_high"))


def _coverage(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    result: Vector = REST * (1 - best_kernel(images.embeddings, images.matrix("anchors"), images.number("bandwidth")))
    return result


def _hybrid_coverage(images: LateImages, settings: Mapping[str, Any]) -> Vector:
    return images.uncertainty(settings["measure"]) * _coverage(images, settings)


_LATE: Mapping[str, Callable[[LateImages, Mapping[str, Any]], Vector]] = MappingProxyType(
    {
        "random": _random,
        "least_confidence": _by_uncertainty("least_confidence"),
        "margin": _by_uncertainty("margin"),
        "entropy": _by_uncertainty("entropy"),
        "kmeans": _kmeans,
        "k_center": _k_center,
        "coverage": _coverage,
        "hybrid": _hybrid,
        "hybrid_k_center": _hybrid_k_center,
        "hybrid_coverage": _hybrid_coverage,
        "committee": _committee,
    }
)
