"""Embeddings in which every way to differ counts alike.

The channels of a network's embedding are far from independent: a few directions (how bright, how textured) hold most
of its variance, and all images share a large mean. Distances there mostly say how far out an image lies along those
few; the frames of a burst are not much nearer to each other than to strangers. Whitening (Kessy et al. 2018) centres
the embeddings, rotates them to their principal axes and divides each axis by its standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from strategies.arrays import Floats, as_embeddings
from strategies.diversity import blocks, unit_rows

# Of the mean variance of an axis, added to each: axes that hold nothing but rounding must not be blown up.
RIDGE = 0.1
# Variance below this share of the embeddings' own squares is float32's rounding, not spread.
_NO_SPREAD = 1e-13


@dataclass(frozen=True, eq=False)
class Whitening:
    """mean (D,) and matrix (D, D), float32: what turns embeddings of one model into whitened ones."""

    mean: Floats
    matrix: Floats

    def apply(self, embeddings: ArrayLike) -> Floats:
        """(M, D) -> (M, D) float32 rows of length 1 (a row equal to the mean stays zero).

        Raises: InputInvalid for NaN, a wrong shape or width.
        """
        points = as_embeddings(embeddings, width=len(self.mean))
        result: Floats = np.empty(points.shape, np.float32)
        for rows in blocks(len(points), points.shape[1]):  # a second copy of a large pool is memory enough
            result[rows] = unit_rows((points[rows].astype(np.float32) - self.mean) @ self.matrix)
        return result


def fit_whitening(*embeddings: ArrayLike) -> Whitening:
    """Learned from the rows of all (N, D): the inverse root of the covariance, with a ridge of RIDGE on its diagonal.

    Symmetric (ZCA), so that it does not depend on the signs and order of the axes. No spread, or no rows: zeros, and so
    all images are alike.
    Raises: InputInvalid for NaN or wrong shapes.
    """
    parts = [part for part in (as_embeddings(one) for one in embeddings) if len(part)]
    if not parts:
        return Whitening(np.zeros(0, np.float32), np.zeros((0, 0), np.float32))
    count = sum(len(part) for part in parts)
    mean = sum((part.sum(axis=0, dtype=np.float64) for part in parts), np.zeros(parts[0].shape[1])) / count
    covariance = sum((_scatter(part, mean) for part in parts), np.zeros((len(mean), len(mean)))) / count
    variances, axes = np.linalg.eigh(covariance)
    variances = variances.clip(0)
    ridge = RIDGE * float(variances.mean())
    if ridge <= _NO_SPREAD * max(1.0, float(np.square(mean).mean())):
        return Whitening(mean.astype(np.float32), np.zeros((len(mean), len(mean)), np.float32))
    matrix = (axes / np.sqrt(variances + ridge)) @ axes.T
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))


def _scatter(points: Floats, mean: Floats) -> Floats:
    """(D, D) sum over rows of (x - mean)(x - mean)^T."""
    total = np.zeros((len(mean), len(mean)))
    for rows in blocks(len(points), points.shape[1]):
        centred = (points[rows] - mean).astype(np.float32)
        total += centred.T @ centred
    return total
