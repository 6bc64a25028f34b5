"""What can be set on each strategy: one table, from which validation and documentation are made."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from strategies.errors import OptionsInvalid, StrategyUnknown, nearest_name
from strategies.mixing import MIXES
from strategies.uncertainty import MEASURES

Value = bool | int | float | str


@dataclass(frozen=True)
class Option:
    """One setting of a strategy. The type of the default is the type of the option; numbers lie in [low, high]."""

    name: str
    default: Value
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def check(self, value: object) -> Value:
        """The value as a plain Python value of the option's type, or OptionsInvalid."""
        if isinstance(self.default, bool):
            return self._boolean(value)
        if isinstance(self.default, str):
            return self._choice(value)
        return self._number(value)

    def _boolean(self, value: object) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise OptionsInvalid(f"Option {self.name!r} must be true or false, got {value!r}.")
        return bool(value)

    def _choice(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.choices:
            hint = nearest_name(value, self.choices)
            raise OptionsInvalid(
                f"Option {self.name!r} must be one of {', '.join(self.choices)}, got {value!r}.{hint}"
            )
        return value

    def _number(self, value: object) -> int | float:
        whole = isinstance(self.default, int)
        kind = "a whole number" if whole else "a number"
        numeric = isinstance(value, numbers.Integral if whole else numbers.Real)
        if not numeric or isinstance(value, bool | np.bool_):
            raise OptionsInvalid(f"Option {self.name!r} must be {kind}, got {value!r}.")
        number = int(value) if whole else float(value)  # type: ignore[call-overload,arg-type]  # a Real
        if not self.low <= number <= self.high:  # also refuses NaN
            raise OptionsInvalid(f"Option {self.name!r} must be from {self.low:g} to {self.high:g}, got {value!r}.")
        return number


_SUPPRESS_MEANING = "skip near-duplicates of what is already in the batch or labelled, until nothing else is left"
_KEEP_DUPLICATES = Option("suppress_duplicates", False, _SUPPRESS_MEANING)
_SUPPRESS_DUPLICATES = Option("suppress_duplicates", True, _SUPPRESS_MEANING)
_MEASURE = Option("measure", "least_confidence", "which uncertainty is used", choices=tuple(MEASURES))
_N_CLUSTERS = Option("n_clusters", 50, "k-means clusters, at most one per image", 1, 10_000)
_MAX_REFERENCES = Option("max_references", 20_000, "images that have to be covered, drawn if there are more", 1, 20_000)
_ALPHA = Option("alpha", 0.7, "weight of the uncertainty", 0.0, 1.0)
_ALPHA_OF_DISAGREEMENT = Option("alpha", 0.7, "weight of the committee's disagreement", 0.0, 1.0)
_BETA = Option("beta", 0.3, "weight of the diversity", 0.0, 1.0)
# By the comparison in benchmarks/dividend
_ALPHA_IN_PRODUCT = Option("alpha", 1.0, "weight of the uncertainty, or its exponent in a product", 0.0, 1.0)
_BETA_IN_PRODUCT = Option("beta", 1.0, "weight of the diversity, or its exponent in a product", 0.0, 1.0)
_MIX = Option(
    "mix",
    "product",
    "sum: alpha * uncertainty + beta * diversity; product: uncertainty^alpha * diversity^beta, where neither makes up "
    "for the lack of the other",
    choices=MIXES,
)
_WHITEN_MEANING = "measure distances in whitened embeddings, in which bursts stand out"
_WHITEN = Option("whiten", True, _WHITEN_MEANING)
_DO_NOT_WHITEN = Option("whiten", False, _WHITEN_MEANING)

OPTIONS: Mapping[str, tuple[Option, ...]] = MappingProxyType(
    {
        "random": (_KEEP_DUPLICATES,),
        "least_confidence": (_KEEP_DUPLICATES,),
        "margin": (_KEEP_DUPLICATES,),
        "entropy": (_KEEP_DUPLICATES,),
        "kmeans": (_N_CLUSTERS, _KEEP_DUPLICATES),
        "k_center": (_DO_NOT_WHITEN, _KEEP_DUPLICATES),
        "coverage": (_DO_NOT_WHITEN, _MAX_REFERENCES, _KEEP_DUPLICATES),
        "hybrid": (_ALPHA, _BETA, _MEASURE, _N_CLUSTERS, _SUPPRESS_DUPLICATES),
        "hybrid_k_center": (_ALPHA_IN_PRODUCT, _BETA_IN_PRODUCT, _MIX, _MEASURE, _WHITEN, _SUPPRESS_DUPLICATES),
        "hybrid_coverage": (_MEASURE, _DO_NOT_WHITEN, _MAX_REFERENCES, _SUPPRESS_DUPLICATES),
        "committee": (_ALPHA_OF_DISAGREEMENT, _BETA, _N_CLUSTERS, _SUPPRESS_DUPLICATES),
    }
)


def check_name(name: str) -> str:
    """The name of a strategy, or StrategyUnknown with the nearest one."""
    if name not in OPTIONS:
        hint = nearest_name(name, OPTIONS)
        raise StrategyUnknown(f"Unknown strategy {name!r}.{hint} Allowed: {', '.join(OPTIONS)}.")
    return name


def strategy_options(name: str) -> dict[str, Value]:
    """Option name -> default, for documentation and forms. Raises StrategyUnknown."""
    return {option.name: option.default for option in OPTIONS[check_name(name)]}


def weights_in_sum(name: str, options: Mapping[str, object] | None = None) -> tuple[float, float] | None:
    """Shares of uncertainty and diversity in the utility; None: it is no weighted sum of them.

    Raises: StrategyUnknown, OptionsInvalid.
    """
    complete = validate_options(name, options)
    if "alpha" not in complete or complete.get("mix") == "product":
        return None
    whole = max(1.0, complete["alpha"] + complete["beta"])
    return complete["alpha"] / whole, complete["beta"] / whole


def validate_options(name: str, options: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The options of a strategy, complete (defaults filled in) and of plain Python types; needs no pool.

    Raises: StrategyUnknown; OptionsInvalid for an unknown option, a wrong type or a value out of range.
    """
    known = {option.name: option for option in OPTIONS[check_name(name)]}
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise OptionsInvalid(f"The options of {name!r} must be a mapping of names to values, got {given!r}.")
    for unknown in (key for key in given if key not in known):
        hint = nearest_name(unknown, known)
        raise OptionsInvalid(f"Strategy {name!r} has no option {unknown!r}.{hint} Allowed: {', '.join(known)}.")
    values = strategy_options(name) | {key: known[key].check(value) for key, value in given.items()}
    if values.get("alpha") == 0 and values.get("beta") == 0:
        raise OptionsInvalid("Options 'alpha' and 'beta' are both 0, which ranks nothing. Raise one of them.")
    return values
