"""Arms of a simulation: `hybrid:alpha=0.5,empty=certain`, `random@2`, `entropy:warm_start=true`.

An arm is a strategy, perhaps with options of it or settings of the project, perhaps with another draw of its random
numbers (`@2`): two draws of `random` are the A/A comparison whose difference is noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from strategies.errors import StrategyError, nearest_name
from strategies.options import check_name, strategy_options
from worker.errors import BadRequest, SettingsInvalid
from worker.settings import ProjectSettings, parse_project_settings

READING = "uncertainty_"  # `threshold` is short for `uncertainty_threshold`, and so on
# set by the command for all arms, or without a meaning where nobody is asked and nothing is paid
NOT_OF_AN_ARM = frozenset(
    {
        *("strategy", "strategy_options", "batch_size", "seed", "labels_per_round", "max_rounds", "holdout_size"),
        *("min_map_gain", "worth_gain", "cost_per_hour", "value_per_point"),
    }
)
_ARM = re.compile(r"(?P<name>[A-Za-z_]\w*)(?:@(?P<draw>\d+))?(?::(?P<options>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Arm:
    """One line of the comparison. `draw` changes the random numbers of its choices, not its seed set or training."""

    label: str  # as it was written, without spaces
    strategy: str
    draw: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)  # of the strategy
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the project's settings

    def settings(self, common: Mapping[str, Any]) -> ProjectSettings:
        """The project settings of this arm: what is common to all, and its own.

        Raises:
            SettingsInvalid: a value is out of range, or they do not fit each other.
        """
        given = {**common, **self.overrides, "strategy": self.strategy, "strategy_options": dict(self.options)}
        try:
            return parse_project_settings(given)
        except SettingsInvalid as error:
            raise SettingsInvalid(f"arm {self.label}: {str(error).removeprefix('extra_params: ')}") from error


def parse_arms(text: str) -> list[Arm]:
    """The arms of `--strategies`: separated by commas, as the options of one are.

    Raises:
        BadRequest: an unknown strategy, option or setting (the nearest is named), or an arm given twice.
    """
    arms = [_parse_arm(one) for one in _split(text)]
    if not arms:
        raise BadRequest("--strategies names none. Try: random,hybrid")
    labels = [arm.label for arm in arms]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise BadRequest(f"arm {twice[0]!r} is given twice. For another draw of its random numbers: {twice[0]}@2")
    return arms


def parse_assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` settings for all arms.

    Raises:
        BadRequest: no such setting (the nearest is named), or one that an option of the command sets.
    """
    values = {}
    for pair in pairs:
        name, value = _assignment(pair.strip(), f"setting {pair!r}")
        values[_setting(name, f"setting {pair!r}", ())] = value
    return values


def _split(text: str) -> list[str]:
    """At commas, but `alpha=.5` without a colon before its = goes on with the options of the arm before it."""
    parts: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        is_option = "=" in piece and ":" not in piece.partition("=")[0]
        if is_option and parts:
            parts[-1] += ("," if ":" in parts[-1] else ":") + piece
        elif piece:
            parts.append(piece)
    return parts


def _parse_arm(text: str) -> Arm:
    found = _ARM.fullmatch(text)
    if found is None:
        raise BadRequest(f"{text!r} is no arm. Write a strategy, with options: hybrid:alpha=0.5,threshold=0.05")
    name, draw = found["name"], int(found["draw"] or 1)
    try:
        check_name(name)
    except StrategyError as error:
        raise BadRequest(str(error)) from error
    options: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in (found["options"] or "").split(","))):
        option, value = _assignment(pair, f"arm {text!r}")
        if option in strategy_options(name):
            options[option] = value
        else:
            overrides[_setting(option, f"arm {text!r}", strategy_options(name))] = value
    label = re.sub(r"\s", "", text)
    return Arm(label, name, draw, options, overrides)


def _assignment(pair: str, where: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise BadRequest(f"{where}: {pair!r} is not name=value")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    try:
        return json.loads(re.sub(r"^(-?)\.(?=\d)", r"\g<1>0.", text))  # .5 is a number to people, if not to JSON
    except ValueError:
        return text


def _setting(name: str, where: str, options: Sequence[str] | Mapping[str, Any]) -> str:
    """The project setting of that name, or the one it is short for."""
    allowed = [one for one in ProjectSettings.model_fields if one not in NOT_OF_AN_ARM]
    for candidate in (name, READING + name):
        if candidate in allowed:
            return candidate
    if name in NOT_OF_AN_ARM:
        raise BadRequest(f"{where}: {name} is the same for all arms, and an option of the command if it matters here")
    short = [one.removeprefix(READING) for one in allowed if one.startswith(READING)]
    known = sorted({*options, *allowed, *short})
    raise BadRequest(f"{where}: nothing is called {name!r}.{nearest_name(name, known)} Known are {', '.join(known)}.")
