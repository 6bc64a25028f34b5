"""Checks at the door: what comes in is a finite array of the shape we think it is, or a sentence says why not."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.errors import InputInvalid, StrategyError

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# Squares of larger values leave float32. Embeddings of a network lie near 1.
LARGEST_EMBEDDING = 1e9
# Probabilities computed in float32 or float16 may overshoot 1 by their rounding.
ROUNDING = 1e-3


def as_vector(
    value: ArrayLike,
    name: str,
    length: int | None = None,
    low: float | None = None,
    high: float | None = None,
    error: type[StrategyError] = InputInvalid,
) -> NDArray[np.float64]:
    """(N,) finite float64, within [low, high] when given; else `error`."""
    vector = np.asarray(_finite(value, name, 1, error), dtype=np.float64)
    if length is not None and len(vector) != length:
        raise error(f"{name} has {len(vector)} values, but there are {length} rows. Give one value per row.")
    if low is not None and vector.size and vector.min() < low:
        raise error(f"{name} must be at least {low:g}, but holds {vector.min():g} at position {vector.argmin()}.")
    if high is not None and vector.size and vector.max() > high:
        raise error(f"{name} must be at most {high:g}, but holds {vector.max():g} at position {vector.argmax()}.")
    return vector


def as_matrix(value: ArrayLike, name: str, error: type[StrategyError] = InputInvalid) -> Floats:
    """(N, D) finite floats (float32 stays float32); an empty list is (0, 0); else `error`."""
    matrix = _finite(value, name, 2, error)
    if len(matrix) and not matrix.shape[1]:
        raise error(f"{name} has {len(matrix)} rows without a single column.")
    return matrix


def as_embeddings(
    value: ArrayLike, name: str = "embeddings", width: int | None = None, error: type[StrategyError] = InputInvalid
) -> Floats:
    """(N, D) finite floats no larger than 1e9, D equal to `width` when given (an empty input takes that width)."""
    matrix = as_matrix(value, name, error)
    if width is not None and not len(matrix):
        return np.zeros((0, width), dtype=matrix.dtype)
    if width is not None and matrix.shape[1] != width:
        raise error(
            f"{name} has {matrix.shape[1]} columns, but {width} are expected. Compute both with the same model."
        )
    if matrix.size and max(matrix.max(), -matrix.min()) > LARGEST_EMBEDDING:
        raise error(f"{name} holds values beyond {LARGEST_EMBEDDING:g}. Embeddings lie near 1: check the model.")
    return matrix


def as_probabilities(value: ArrayLike, name: str = "probabilities") -> NDArray[np.float64]:
    """(N, C) in [0, 1]; rounding beyond the ends (up to 0.001) is clipped; an empty list means no boxes."""
    matrix = np.asarray(as_matrix(value, name), dtype=np.float64)
    if matrix.size and (matrix.min() < -ROUNDING or matrix.max() > 1 + ROUNDING):
        raise InputInvalid(
            f"{name} must lie in [0, 1], but reach from {matrix.min():g} to {matrix.max():g}. "
            "Pass sigmoid or softmax outputs, not logits."
        )
    return np.clip(matrix, 0.0, 1.0)


def as_count(value: object, name: str, error: type[StrategyError] = InputInvalid) -> int:
    """A whole number of at least 1 (True is not a number here); else `error`."""
    if isinstance(value, bool | np.bool_):
        raise error(f"{name} must be a whole number, got {value!r}.")
    try:
        count = operator.index(value)  # type: ignore[arg-type]  # that it may fail is the point
    except TypeError as problem:
        raise error(f"{name} must be a whole number, got {value!r}.") from problem
    if count < 1:
        raise error(f"{name} must be at least 1, got {count}.")
    return count


def as_groups(
    value: ArrayLike | None, length: int, name: str = "duplicate_groups", error: type[StrategyError] = InputInvalid
) -> Integers | None:
    """(N,) whole numbers, or None; else `error`."""
    if value is None:
        return None
    groups = np.asarray(value)
    if groups.shape != (length,) or (length and groups.dtype.kind not in "iu"):
        raise error(
            f"{name} must be {length} whole numbers, one per row; got {groups.dtype} of shape {groups.shape}."
        )
    return groups.astype(np.int64, copy=False)


def as_mask(
    value: ArrayLike | None,
    length: int,
    name: str = "duplicates_of_labelled",
    error: type[StrategyError] = InputInvalid,
) -> Booleans | None:
    """(N,) booleans, or None; else `error`."""
    if value is None:
        return None
    mask = np.asarray(value)
    if mask.shape != (length,) or (length and mask.dtype.kind != "b"):
        raise error(f"{name} must be {length} booleans, one per row; got {mask.dtype} of shape {mask.shape}.")
    return mask.astype(np.bool_, copy=False)


def _finite(value: ArrayLike, name: str, dimensions: int, error: type[StrategyError]) -> Floats:
    array = _floats(value, name, error)
    if array.shape == (0,):  # an empty list has lost its other dimension
        array = array.reshape((0,) * dimensions)
    if array.ndim != dimensions:
        raise error(f"{name} must have {dimensions} dimension(s), got an array of shape {array.shape}.")
    # the extremes tell (NaN is both), without a mask of a quarter of the embeddings' size
    if array.size and not (np.isfinite(array.max()) and np.isfinite(array.min())):
        row = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise error(f"{name} holds NaN or infinity, first in row {row}. Leave that image out or score it again.")
    return array


def _floats(value: ArrayLike, name: str, error: type[StrategyError]) -> Floats:
    try:
        array = np.asarray(value)
    except ValueError as problem:  # ragged lists
        raise error(f"{name} must be a rectangular array of numbers.") from problem
    if array.dtype.kind not in "fiu":
        raise error(f"{name} must be numbers, got {array.dtype}.")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
