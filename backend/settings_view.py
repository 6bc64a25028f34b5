"""A project's settings as a form: what can be set, what is set, what is wrong with a change, and who changed what."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from sqlalchemy import Connection, Row, select

from strategies import STRATEGIES, validate_options
from strategies.errors import StrategyError, StrategyUnknown
from strategies.options import OPTIONS, Option
from worker.errors import SettingsInvalid
from worker.settings import ProjectSettings, parse_project_settings
from worker.store import events, get_project

MAX_CHANGES = 12
MAX_SENTENCE = 400  # characters of what is wrong with a field; it may quote what was sent
GROUPS: Mapping[str, tuple[str, ...]] = {
    "The batch": (
        *("strategy", "strategy_options", "batch_size", "near_duplicate_threshold", "confidence", "class_weights"),
        *("uncertainty_threshold", "uncertainty_empty", "uncertainty_aggregate", "uncertainty_n"),
    ),
    "Rounds": ("labels_per_round", "max_rounds", "min_map_gain", "holdout_size", "seed"),
    "Training": (
        *("weights", "warm_start", "epochs", "imgsz", "train_batch", "nominal_batch", "optimizer", "lr0", "mosaic"),
        *("mixup", "close_mosaic", "freeze", "committee_size", "committee"),
    ),
}
OTHERS = "Verdict and costs"
ADVANCED = ("Training",)

Kind = Literal["whole", "number", "text", "switch", "choice", "options"]


class View(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class SettingView(View):
    """One setting. `value` is what counts now; `is_set`: the project says so, else it is the default; `optional`: it
    may be left to what the description says."""

    name: str
    kind: Kind
    description: str
    default: JsonValue
    value: JsonValue
    is_set: bool
    choices: list[str] = []
    limits: str = ""
    optional: bool = False


class SettingsGroup(View):
    title: str
    advanced: bool
    settings: list[SettingView]


class OptionView(View):
    """One option of a strategy."""

    name: str
    kind: Kind
    description: str
    default: JsonValue
    choices: list[str] = []
    limits: str = ""


class StrategyView(View):
    """A strategy and what can be set on it."""

    name: str
    description: str
    options: list[OptionView]


class Change(View):
    """Settings that were changed: when, and what from and to, by whom."""

    at: float
    detail: str


class SettingsView(View):
    """All settings of a project. `problem`: why what is stored cannot be used; then the defaults are shown."""

    groups: list[SettingsGroup]
    strategies: list[StrategyView]
    changes: list[Change]
    problem: str = ""


def settings_view(connection: Connection, project_id: int) -> SettingsView:
    """
    Raises:
        NotFound: the project is not connected.
    """
    project = get_project(connection, project_id)
    problem = ""
    try:
        now = parse_project_settings(project.extra_params)
    except SettingsInvalid as error:
        now, problem = ProjectSettings(), f"{error}. Until it is mended the defaults are shown, and no round opens."
    return SettingsView(
        groups=_groups(now), strategies=strategy_views(), changes=_changes(connection, project_id), problem=problem
    )


def _groups(now: ProjectSettings) -> list[SettingsGroup]:
    shapes = ProjectSettings.model_json_schema()["properties"]
    views = {name: _setting(name, shape, now) for name, shape in shapes.items()}
    placed = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, OTHERS: tuple(name for name in views if name not in placed)}
    order = ("The batch", "Rounds", OTHERS, "Training")
    return [
        SettingsGroup(title=title, advanced=title in ADVANCED, settings=found)
        for title in order
        if (found := [views[name] for name in groups[title] if name in views])
    ]


def _setting(name: str, shape: Mapping[str, Any], now: ProjectSettings) -> SettingView:
    kinds = [one for one in shape.get("anyOf", [shape]) if one.get("type") != "null"]
    inner = {**shape, **kinds[0]}
    choices = list(STRATEGIES) if name == "strategy" else [str(one) for one in inner.get("enum", [])]
    dumped = now.model_dump(mode="json")
    return SettingView(
        name=name,
        kind=_kind(inner, choices),
        description=str(shape.get("description", "")).replace("`", ""),
        default=ProjectSettings.model_fields[name].get_default(call_default_factory=True),
        value=dumped[name],
        is_set=name in now.model_fields_set,
        choices=choices,
        limits=_limits(inner),
        optional="anyOf" in shape,
    )


def _limits(shape: Mapping[str, Any]) -> str:
    """1 to 100, more than 0, at least 32 in steps of 32."""
    least, above = shape.get("minimum"), shape.get("exclusiveMinimum")
    most, below = shape.get("maximum"), shape.get("exclusiveMaximum")
    if least is not None and most is not None:
        words = [f"{_plain(least)} to {_plain(most)}"]
    else:
        told = (("at least", least), ("more than", above), ("at most", most), ("less than", below))
        words = [f"{name} {_plain(value)}" for name, value in told if value is not None]
    step = shape.get("multipleOf")
    return ", ".join(words) + ("" if step is None else f" in steps of {_plain(step)}")


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else f"{number:g}"


def _kind(shape: Mapping[str, Any], choices: list[str]) -> Kind:
    if choices:
        return "choice"
    kinds: dict[str, Kind] = {"integer": "whole", "number": "number", "boolean": "switch", "object": "options"}
    return kinds.get(str(shape.get("type")), "text")


def strategy_views() -> list[StrategyView]:
    """All strategies that a project may choose, with the options of each."""
    return [
        StrategyView(
            name=name,
            description=_first_sentence(function.__doc__ or ""),
            options=[_option(one) for one in OPTIONS[name]],
        )
        for name, function in STRATEGIES.items()
    ]


def _first_sentence(docstring: str) -> str:
    """What admins read of a strategy; what follows is for those who read its code."""
    line = re.sub(r"; see `[^`]*`", "", docstring.strip().partition("\n")[0])
    return re.split(r"(?<=\.)\s+(?=[A-Za-z])", line)[0].replace("`", "")


def _option(one: Option) -> OptionView:
    shape = {bool: "boolean", int: "integer", float: "number"}.get(type(one.default), "string")
    bounded = abs(one.low) != float("inf")
    return OptionView(
        name=one.name,
        kind=_kind({"type": shape}, list(one.choices)),
        description=one.meaning,
        default=one.default,
        choices=list(one.choices),
        limits=f"{_plain(one.low)} to {_plain(one.high)}" if bounded else "",
    )


def _changes(connection: Connection, project_id: int) -> list[Change]:
    query = select(events.c.at, events.c.detail).where(events.c.project_id == project_id, events.c.kind == "settings")
    rows = connection.execute(query.order_by(events.c.id.desc()).limit(MAX_CHANGES))
    return [Change(at=row.at, detail=row.detail) for row in rows]


# --- a change --------------------------------------------------------------------------------------------------------


def changed_settings(now: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """What a project says after a change; None puts a setting back to its default."""
    merged = {**now, **change}
    return {name: value for name, value in merged.items() if not (name in change and value is None)}


def field_problems(values: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with these settings, in a sentence for each field; empty: nothing is."""
    return {name: _short(sentence) for name, sentence in _problems(values, changed).items()}


def _short(sentence: str) -> str:
    return sentence if len(sentence) <= MAX_SENTENCE else sentence[: MAX_SENTENCE - 1] + "…"


def _problems(values: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, str]:
    unknown = [name for name in values if name not in ProjectSettings.model_fields]
    if unknown:
        return {name: _unknown(name) for name in unknown}
    try:
        ProjectSettings.model_validate(dict(values)).model_dump_json()
    except ValidationError as error:
        found: dict[str, str] = _option_problems(values)  # pydantic stops before it comes to these
        for problem in error.errors():
            message = str(problem["msg"]).removeprefix("Value error, ")
            field = str(problem["loc"][0]) if problem["loc"] else _meant(message, changed)
            found.setdefault(field, message)
        return found
    except ValueError:
        return dict.fromkeys(changed, "holds text that is not Unicode")
    return {}


def _option_problems(values: Mapping[str, Any]) -> dict[str, str]:
    options = values.get("strategy_options", {})
    try:
        validate_options(str(values.get("strategy", ProjectSettings().strategy)), options)
    except StrategyUnknown:
        return {}  # said at the strategy
    except StrategyError as error:
        return {"strategy_options": str(error)}
    return {}


def _unknown(name: str) -> str:
    try:
        parse_project_settings({name: None})
    except SettingsInvalid as error:
        return str(error).removeprefix("extra_params: ")
    raise AssertionError(f"{name} is known")


def _meant(message: str, changed: Mapping[str, Any]) -> str:
    """The field a sentence about several is shown at: one that was changed and is named, else one that is named."""
    named = [name for name in (*changed, *ProjectSettings.model_fields) if name in message and name != "strategy"]
    if message.startswith("strategy "):
        return "committee_size" if named[:1] == ["committee_size"] and "committee_size" in changed else "strategy"
    return named[0] if named else "strategy_options"


def stored_settings(project: Row[Any]) -> dict[str, Any]:
    """What the project says, as it was stored."""
    return as_values(project.extra_params)


def as_values(extra_params: object) -> dict[str, Any]:
    """extra_params as they came, a JSON object or a string holding one, by name and not validated; else nothing."""
    if isinstance(extra_params, str):
        try:
            extra_params = json.loads(extra_params)
        except (ValueError, RecursionError):
            return {}  # a change replaces what nobody can read
    return dict(extra_params) if isinstance(extra_params, dict) else {}


def said(settings: ProjectSettings) -> dict[str, Any]:
    """What a project says of its settings: without the defaults."""
    return settings.model_dump(mode="json", exclude_unset=True)
