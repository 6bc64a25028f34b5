"""Everything this package refuses, as one tree.

StrategyError (a ValueError)
├── InputInvalid      an array or number given to a measure or a helper
├── PoolInvalid       rows that cannot make a Pool, or a Pool without what a strategy needs
├── OptionsInvalid    an option that is unknown, of the wrong type or out of range
├── SelectionInvalid  a strategy broke its promise (a bug in the strategy)
└── StrategyUnknown   a name that is not in the registry

The class docstring is the default message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StrategyError(ValueError):
    """The selection could not be made."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class InputInvalid(StrategyError):
    """An argument has the wrong shape, type or range."""


class PoolInvalid(StrategyError):
    """The pool has the wrong shape, type or range."""


class OptionsInvalid(StrategyError):
    """The options of the strategy are not valid."""


class SelectionInvalid(StrategyError):
    """The strategy returned positions or utilities that break its contract."""


class StrategyUnknown(StrategyError):
    """No strategy has this name."""


def nearest_name(name: object, allowed: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the closest allowed name, else ''."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
