"""What a batch was made of: boxes, rare classes, images without any, look-alikes. One rule for replays and projects."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RARE_SHARE = 0.06  # of the images: a class in fewer is rare unless others are named
_BLOCK = 512  # rows compared at once: bounds the memory

Counts = Mapping[str, int]  # class name -> boxes of one image


def rare_names(images_per_class: Mapping[str, int], images: int) -> list[str]:
    """Classes in fewer than RARE_SHARE of so many images, and in one at least."""
    return [name for name, count in images_per_class.items() if 0 < count < RARE_SHARE * images]


def mean_ap50(ap50: Mapping[str, float | None], names: Collection[str]) -> float | None:
    """Over those of the classes that were measured; None: none was."""
    known = [value for name in names if (value := ap50.get(name)) is not None]
    return float(np.mean(known)) if known else None


def contents(images: Sequence[Counts], rare: Collection[str]) -> dict[str, Any]:
    """`boxes` in all, `empty_images` without a box, `rare_images` with a box of a rare class."""
    return {
        "boxes": int(sum(sum(counts.values()) for counts in images)),
        "empty_images": sum(not any(counts.values()) for counts in images),
        "rare_images": sum(any(counts.get(name, 0) for name in rare) for counts in images),
    }


def alike_earlier(rows: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """(N, D) unit vectors in the order of labelling -> (N,) whether a row's cosine with an earlier one exceeds it.

    A threshold of 1 or more finds nothing, as when a batch is chosen.
    """
    found = np.zeros(len(rows), dtype=np.bool_)
    if threshold >= 1:
        return found
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        alike = block @ rows[: start + len(block)].T > threshold
        found[start : start + len(block)] = np.tril(alike, k=start - 1).any(axis=1)  # k: not itself, nothing later
    return found
