"""Two values in [0, 1] in one: as a weighted sum, or as a product of powers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

MIXES = ("sum", "product")


def mixed(first: Vector, second: Vector, alpha: float, beta: float, mix: str) -> Vector:
    """(N,), (N,) in [0, 1] -> alpha * first + beta * second, or first^alpha * second^beta (0^0 is 1).

    In a sum a high value makes up for a low one; in a product a 0 stays a 0. Nothing is checked here.
    """
    return combined(weighted(first, alpha, mix), weighted(second, beta, mix), mix)


def weighted(values: Vector, weight: float, mix: str) -> Vector:
    """What a value gives to the mix: (N,) times its weight, or to the power of it."""
    result: Vector = values**weight if mix == "product" else weight * values
    return result


def combined(first: Vector, second: Vector, mix: str) -> Vector:
    """Two weighted values in one: the inner step of greedy walks, whose first value never changes."""
    result: Vector = first * second if mix == "product" else first + second
    return result
