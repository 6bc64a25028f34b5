"""Two values in [0, 1] in one: as a weighted sum, or as a product of powers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

MIXES = ("sum", "product")


def mixed(first: Vector, second: Vector, alpha: float, beta: float, mix: str) -> Vector:
    """(N,), (N,) in [0, 1] -> alpha * first + beta * second, or first^alpha * second^beta (0^0 is 1).

    In a sum a high value makes up for a low one; in a product a 0 stays a 0. Nothing is checked here: it is the inner
    step of greedy walks.
    """
    result: Vector = first**alpha * second**beta if mix == "product" else alpha * first + beta * second
    return result
