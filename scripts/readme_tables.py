"""The tables of settings in docs/settings.md and README.md, from the models they describe: printed, or with --write
put between their markers.

tests/test_docs.py holds both files to this.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from strategies import STRATEGIES, strategy_options
from worker.settings import ProjectSettings, Settings, variable_of

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", ROOT / "docs" / "settings.md")

FIRST = ("batch_size", "epochs", "weights", "worth_gain", "holdout_size")  # what people change first: the README's

# Group -> settings. The last group of each model takes those that no group names, so that a new setting is never lost.
ENVIRONMENT = {
    "environment-label-studio": ("label_studio_url", "label_studio_api_key", "url"),
    "environment-listening": ("host", "port", "user", "password"),
    "environment-data": ("data_dir", "redis_url", "database_url", "artifacts_url"),
    "environment-images": ("image_hosts", "local_files_root", "image_buckets", "image_max_mb", "image_max_megapixels"),
    "environment-work": ("weights", "device", "shard_size", "reconcile_seconds"),
}
PROJECT = {
    "project-loop": ("batch_size", "labels_per_round", "max_rounds", "holdout_size"),
    "project-verdict": ("worth_gain", "cost_per_hour", "value_per_point", "min_map_gain"),
    "project-training": (
        *("weights", "warm_start", "epochs", "imgsz", "train_batch", "nominal_batch", "optimizer", "lr0"),
        *("mosaic", "mixup", "close_mosaic", "freeze"),
    ),
    "project-selection": (
        *("strategy", "strategy_options", "near_duplicate_threshold", "uncertainty_threshold", "uncertainty_empty"),
        *("uncertainty_aggregate", "uncertainty_n", "class_weights", "committee_size", "committee"),
    ),
    "project-labels": ("shapes", "confidence", "seed"),
}


def grouped(model: type[BaseModel], groups: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Group -> its table."""
    named = {name for names in groups.values() for name in names}
    rest = [name for name in model.model_fields if name not in named]
    last = list(groups)[-1]
    wanted = {group: [*names, *(rest if group == last else ())] for group, names in groups.items()}
    return {group: table(model, [one for one in names if one in model.model_fields]) for group, names in wanted.items()}


def table(model: type[BaseModel], names: Sequence[str]) -> str:
    rows = ["| setting | default | what it does |", "| --- | --- | --- |"]
    for name in names:
        field = model.model_fields[name]
        shown = variable_of(name) if model is Settings else name
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
    """Marker -> the table that belongs between it and the next `<!-- end -->`, in whichever file has the marker."""
    return {
        "first": table(ProjectSettings, FIRST),
        **grouped(Settings, ENVIRONMENT),
        **grouped(ProjectSettings, PROJECT),
        "strategies": strategies_table(),
    }


def filled(text: str) -> str:
    """A file's text with each table between its markers brought up to date."""
    for name, content in tables().items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        for file in FILES:
            file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))
