"""The README's tables of settings, from the models they describe: printed, or with --write put into README.md.

tests/test_docs.py holds the README to this.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from strategies import STRATEGIES, strategy_options
from worker.settings import ProjectSettings, Settings

README = Path(__file__).resolve().parent.parent / "README.md"


def environment_name(name: str, field: FieldInfo) -> str:
    return str(field.validation_alias or f"HARDFIRST_{name.upper()}")


def table(model: type[BaseModel]) -> str:
    rows = ["| setting | default | what it does |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        shown = environment_name(name, field) if model is Settings else name
        rows.append(f"| `{shown}` | {_default(field)} | {field.description} |")
    return "\n".join(rows)


def strategies_table() -> str:
    rows = ["| strategy | options and their defaults |", "| --- | --- |"]
    for name in STRATEGIES:
        options = ", ".join(f"`{option}={_shown(value)}`" for option, value in strategy_options(name).items())
        rows.append(f"| `{name}` | {options or 'none'} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return "" if value is None or value == "" else f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def tables() -> dict[str, str]:
    """Marker in the README -> the table that belongs there."""
    return {"environment": table(Settings), "project": table(ProjectSettings), "strategies": strategies_table()}


def filled(text: str) -> str:
    """The README with each table between its markers brought up to date."""
    for name, content in tables().items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))
