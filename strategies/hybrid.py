"""Uncertainty and diversity in one utility, and the walk that keeps near-duplicates out of a batch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.arrays import Booleans, Integers, as_count, as_groups, as_mask, as_vector
from strategies.diversity import closed_rows
from strategies.errors import InputInvalid
from strategies.mixing import MIXES, mixed
from strategies.uncertainty import check_choice

Vector = NDArray[np.float64]


def hybrid_utility(
    uncertainty: ArrayLike, diversity: ArrayLike, alpha: float = 0.7, beta: float = 0.3, mix: str = "sum"
) -> Vector:
    """alpha * uncertainty + beta * diversity, divided by alpha + beta where that exceeds 1; or their product of powers.

    The division keeps the result in [0, 1] and the ranking as it was; up to 1 the sum is returned as it is.

    Args: uncertainty, diversity (N,) in [0, 1]; alpha, beta finite and >= 0; mix: a name in MIXES.
    Returns: (N,) in [0, 1], high = label sooner.
    Raises: InputInvalid for NaN, unequal lengths, values out of range or an unknown mix.
    """
    check_choice(mix, MIXES, "mix")
    if not (math.isfinite(alpha) and math.isfinite(beta) and min(alpha, beta) >= 0):
        raise InputInvalid(f"alpha and beta must be finite and at least 0, got {alpha!r} and {beta!r}.")
    first = as_vector(uncertainty, "uncertainty", None, 0.0, 1.0)
    second = as_vector(diversity, "diversity", len(first), 0.0, 1.0)
    most = max(1.0, alpha + beta) if mix == "sum" else 1.0
    return np.minimum(mixed(first, second, alpha, beta, mix) / most, 1.0)


def select_batch(
    utilities: ArrayLike,
    duplicate_groups: ArrayLike | None,
    batch_size: int,
    duplicates_of_labelled: ArrayLike | None = None,
) -> Integers:
    """Walk down the ranking and skip near-duplicates of what is taken; backfill if the pool runs dry.

    Args: utilities (N,) finite, ties go to the lower position; duplicate_groups (N,) whole numbers or None (every row
        is its own group); batch_size >= 1; duplicates_of_labelled (N,) booleans or None: those rows and all of their
        groups count as taken from the start.
    Returns: (min(batch_size, N),) distinct positions: the best of each free group by falling utility, then, if there
        are too few groups, the best of the skipped rows by falling utility.
    Raises: InputInvalid for NaN, wrong shapes or batch_size < 1.
    """
    ranking = as_vector(utilities, "utilities")
    size = as_count(batch_size, "batch_size")
    groups = as_groups(duplicate_groups, len(ranking))
    closed = closed_rows(len(ranking), groups, as_mask(duplicates_of_labelled, len(ranking)))
    order = np.argsort(-ranking, kind="stable")
    taken = ~closed[order] & _first_of_group(order, groups)
    return np.concatenate([order[taken], order[~taken]])[:size]


def _first_of_group(order: Integers, groups: Integers | None) -> Booleans:
    if groups is None:
        return np.ones(len(order), dtype=np.bool_)
    first = np.zeros(len(order), dtype=np.bool_)
    first[np.unique(groups[order], return_index=True)[1]] = True
    return first
