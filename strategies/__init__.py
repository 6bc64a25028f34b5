"""Which images to label first: arrays in, arrays out.

No I/O, no torch, no clock, no global random state. A strategy is a function `(pool, batch_size, rng, options) ->
Selection`; STRATEGIES is the one list of them. To add one: a function, a line here, its options in `options.py`, its
late rule in `late.py` and a test; the contract suite finds it by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from strategies import builtin
from strategies.errors import (
    InputInvalid,
    OptionsInvalid,
    PoolInvalid,
    SelectionInvalid,
    StrategyError,
    StrategyUnknown,
)
from strategies.late import late_utility
from strategies.options import check_name, strategy_options, validate_options
from strategies.pool import Pool, Selection


class Strategy(Protocol):
    """Turns a scored pool into a selection; the promises are in `builtin`."""

    def __call__(
        self, pool: Pool, batch_size: int, rng: np.random.Generator, options: Mapping[str, object] | None = None
    ) -> Selection: ...


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "random": builtin.random,
        "least_confidence": builtin.least_confidence,
        "margin": builtin.margin,
        "entropy": builtin.entropy,
        "kmeans": builtin.kmeans,
        "k_center": builtin.k_center,
        "coverage": builtin.coverage,
        "hybrid": builtin.hybrid,
        "hybrid_k_center": builtin.hybrid_k_center,
        "hybrid_coverage": builtin.hybrid_coverage,
        "committee": builtin.committee,
    }
)


def get_strategy(name: str) -> Strategy:
    """The strategy of that name; StrategyUnknown names the nearest one."""
    return STRATEGIES[check_name(name)]


__all__ = [
    "STRATEGIES",
    "InputInvalid",
    "OptionsInvalid",
    "Pool",
    "PoolInvalid",
    "Selection",
    "SelectionInvalid",
    "Strategy",
    "StrategyError",
    "StrategyUnknown",
    "get_strategy",
    "late_utility",
    "strategy_options",
    "validate_options",
]
