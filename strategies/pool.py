"""What a strategy reads (Pool) and what it answers (Selection)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.arrays import Booleans, Integers, as_embeddings, as_groups, as_mask, as_vector
from strategies.errors import PoolInvalid, SelectionInvalid, nearest_name
from strategies.uncertainty import MEASURES

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pool:
    """The unlabelled images of a project after scoring: N rows, sorted by key, checked once.

    keys                   (N,) int64 or str, unique, ascending: what names an image outside (a task id)
    uncertainty            measure name -> (N,) >= 0; above 1 by "sum", "open" or class weights (strategies rescale)
    embeddings             (N, D) float32
    labelled_embeddings    (L, D) float32 of what is trained on, L may be 0
    disagreement           (N,) >= 0, or None without a committee
    duplicate_groups       (N,) whole numbers, equal for near-duplicates, or None when not computed
    duplicates_of_labelled (N,) booleans, True for a near-duplicate of a labelled or held out image, or None

    Make one with `Pool.build`, which sorts; the constructor refuses rows that are not sorted, because positions index
    these rows and not the caller's. Arrays are read-only. Raises PoolInvalid (a ValueError).
    """

    keys: NDArray[Any]
    uncertainty: Mapping[str, Vector]
    embeddings: NDArray[np.float32]
    labelled_embeddings: NDArray[np.float32]
    disagreement: Vector | None = None
    duplicate_groups: Integers | None = None
    duplicates_of_labelled: Booleans | None = None

    def __post_init__(self) -> None:
        keys = _as_keys(self.keys)
        if len(keys) > 1 and not (keys[:-1] < keys[1:]).all():
            raise PoolInvalid("The keys are not in ascending order. Use Pool.build, which sorts the rows.")
        size = len(keys)
        self._set("keys", keys)
        self._set("embeddings", _as_float32(self.embeddings, "embeddings", None))
        if len(self.embeddings) != size:
            raise PoolInvalid(f"embeddings has {len(self.embeddings)} rows, but there are {size} keys.")
        width = self.embeddings.shape[1] if size else None
        self._set("labelled_embeddings", _as_float32(self.labelled_embeddings, "labelled_embeddings", width))
        object.__setattr__(self, "uncertainty", _as_uncertainty(self.uncertainty, size))
        if self.disagreement is not None:
            self._set("disagreement", as_vector(self.disagreement, "disagreement", size, low=0.0, error=PoolInvalid))
        self._set("duplicate_groups", as_groups(self.duplicate_groups, size, error=PoolInvalid))
        self._set("duplicates_of_labelled", as_mask(self.duplicates_of_labelled, size, error=PoolInvalid))

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def build(
        cls,
        keys: ArrayLike,
        uncertainty: Mapping[str, ArrayLike],
        embeddings: ArrayLike,
        labelled_embeddings: ArrayLike | None = None,
        disagreement: ArrayLike | None = None,
        duplicate_groups: ArrayLike | None = None,
        duplicates_of_labelled: ArrayLike | None = None,
    ) -> Pool:
        """Sort the rows by key and check them: rows in any order give the same pool, and so the same images.

        Args: as the fields of Pool, in any row order; int keys of any width become int64.
        Raises: PoolInvalid, with the name of the argument, the value and what to do.
        """
        names = _as_keys(keys)
        order = np.argsort(names, kind="stable")
        if (names[order][:-1] == names[order][1:]).any():
            twice = names[order][:-1][names[order][:-1] == names[order][1:]][0]
            raise PoolInvalid(f"The key {twice!r} appears more than once. Give every image one row.")

        labelled: ArrayLike = [] if labelled_embeddings is None else labelled_embeddings
        in_order = bool((order[:-1] < order[1:]).all())

        def sort(value: Any, name: str) -> Any:
            rows = _rows(value, name)
            if len(rows) != len(order):
                raise PoolInvalid(f"{name} has {len(rows)} rows, but there are {len(order)} keys.")
            return rows if in_order else rows[order]  # a copy of the embeddings is what memory is spent on

        return cls(
            keys=names[order],
            uncertainty={name: sort(values, f"uncertainty[{name!r}]") for name, values in dict(uncertainty).items()},
            embeddings=sort(embeddings, "embeddings"),
            labelled_embeddings=_rows(labelled, "labelled_embeddings"),
            disagreement=None if disagreement is None else sort(disagreement, "disagreement"),
            duplicate_groups=None if duplicate_groups is None else sort(duplicate_groups, "duplicate_groups"),
            duplicates_of_labelled=None
            if duplicates_of_labelled is None
            else sort(duplicates_of_labelled, "duplicates_of_labelled"),
        )

    def uncertainty_of(self, measure: str) -> Vector:
        """(N,) values of one measure; PoolInvalid when the pool was scored without it."""
        if measure not in self.uncertainty:
            known = ", ".join(self.uncertainty) or "none"
            raise PoolInvalid(f"The pool has no uncertainty {measure!r} (it has: {known}). Score it with that measure.")
        return self.uncertainty[measure]

    def committee_disagreement(self) -> Vector:
        """(N,) disagreement of the committee; PoolInvalid when the pool was scored without one."""
        if self.disagreement is None:
            raise PoolInvalid(
                "The pool has no disagreement: it was scored without a committee. Set committee_size (at least 3) in "
                "the project's settings, or choose another strategy."
            )
        return self.disagreement

    def _set(self, name: str, value: NDArray[Any] | None) -> None:
        object.__setattr__(self, name, None if value is None else _read_only(value))


@dataclass(frozen=True, eq=False)
class Selection:
    """What a strategy answers.

    positions  (K,) int64, distinct rows of the pool, in the order annotators should see them
    utilities  (N,) in [0, 1] for every row, high = label sooner
    parts      name -> (N,) in [0, 1]: what the utility was made of, such as "uncertainty" and "diversity"
    late       name -> number or array: what `late_utility` needs for images scored after this selection

    Raises SelectionInvalid when a strategy breaks this contract.
    """

    positions: Integers
    utilities: Vector
    parts: Mapping[str, Vector] = field(default_factory=dict)
    late: Mapping[str, float | NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        utilities = as_vector(self.utilities, "utilities", None, 0.0, 1.0, SelectionInvalid)
        size = len(utilities)
        parts = {n: as_vector(v, f"parts[{n!r}]", size, 0.0, 1.0, SelectionInvalid) for n, v in self.parts.items()}
        positions = np.asarray(self.positions, dtype=np.int64)
        if positions.ndim != 1 or len(np.unique(positions)) != len(positions):
            raise SelectionInvalid("positions must be distinct: a strategy picked a row twice.")
        if len(positions) and not (positions.min() >= 0 and positions.max() < size):
            raise SelectionInvalid(f"positions must lie in 0..{size - 1}, the rows of the pool.")
        object.__setattr__(self, "positions", _read_only(positions))
        object.__setattr__(self, "utilities", _read_only(utilities))
        object.__setattr__(self, "parts", MappingProxyType({n: _read_only(v) for n, v in parts.items()}))
        object.__setattr__(self, "late", MappingProxyType(dict(self.late)))


def _as_keys(value: ArrayLike) -> NDArray[Any]:
    keys = _rows(value, "keys")
    if keys.dtype.kind == "U" and not all(isinstance(key, str) for key in np.asarray(value, dtype=object).flat):
        raise PoolInvalid("keys mix numbers and text. Use one of them for all images.")  # numpy turned 7 into "7"
    if not keys.size:
        return keys.reshape(-1).astype(keys.dtype if keys.dtype.kind == "U" else np.int64)
    if keys.dtype == object and all(isinstance(key, str) for key in keys.flat):
        keys = keys.astype(np.str_)
    if keys.ndim != 1 or keys.dtype.kind not in "iuU":
        raise PoolInvalid(f"keys must be (N,) whole numbers or text, got {keys.dtype} of shape {keys.shape}.")
    if keys.dtype.kind == "u" and keys.max() > np.iinfo(np.int64).max:
        raise PoolInvalid(f"The key {keys.max()} does not fit in 64 signed bits.")
    return keys if keys.dtype.kind == "U" else keys.astype(np.int64)


def _as_uncertainty(value: Mapping[str, ArrayLike], size: int) -> Mapping[str, Vector]:
    checked = {}
    for name, values in value.items():
        if name not in MEASURES:
            hint = nearest_name(name, MEASURES)
            raise PoolInvalid(f"Unknown measure {name!r}.{hint} Allowed: {', '.join(MEASURES)}.")
        vector = as_vector(values, f"uncertainty[{name!r}]", size, low=0.0, error=PoolInvalid)
        checked[name] = _read_only(vector)
    return MappingProxyType(checked)


def _as_float32(value: ArrayLike, name: str, width: int | None) -> NDArray[np.float32]:
    return as_embeddings(value, name, width, PoolInvalid).astype(np.float32, copy=False)


def _rows(value: ArrayLike, name: str) -> NDArray[Any]:
    try:
        rows = np.asarray(value)
    except ValueError as problem:  # ragged lists
        raise PoolInvalid(f"{name} must be a rectangular array.") from problem
    if not rows.ndim:
        raise PoolInvalid(f"{name} must be an array, got {value!r}.")
    return rows


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view
