from __future__ import annotations

import numpy as np
import pytest

from strategies import Pool

MEASURE_NAMES = ("least_confidence", "margin", "entropy")


def _random_pool(size: int = 30, width: int = 4, labelled: int = 3, seed: int = 0, **fields: object) -> Pool:
    rng = np.random.default_rng(seed)
    values = {
        "keys": np.arange(size) * 7 + 100,
        "uncertainty": {name: rng.random(size) for name in MEASURE_NAMES},
        "embeddings": rng.normal(size=(size, width)),
        "labelled_embeddings": rng.normal(size=(labelled, width)),
        "disagreement": rng.random(size),
    }
    return Pool.build(**(values | fields))


@pytest.fixture
def make_pool():
    """make_pool(size, width, labelled, seed, **fields of Pool.build): a random pool with the given fields replaced."""
    return _random_pool
