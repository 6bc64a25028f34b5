"""The README is held to the code: its tables, its commands, its make targets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from backend.cli import app
from scripts import readme_tables

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["environment", "project", "strategies"])
def test_tables_are_those_of_the_models(name: str) -> None:
    assert readme_tables.tables()[name] in README, "run: scripts/py -m scripts.readme_tables --write"


def test_every_setting_has_a_description() -> None:
    for line in (*readme_tables.tables()["environment"].splitlines(), *readme_tables.tables()["project"].splitlines()):
        assert "| None |" not in line


def test_every_command_appears() -> None:
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert sorted(commands) == sorted(set(re.findall(r"^\| `hardfirst (\w+)`", README, re.MULTILINE)))


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make (\w+)`?", README))
    assert {"demo", "test"} <= named <= targets


def test_the_first_screen_has_both_commands_and_a_picture_that_is_there() -> None:
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen
    assert "make test" in first_screen
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_packages_that_are_installed_are_those_in_the_clone() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    top = {"strategies", "worker", "backend", "demo"}
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for name in top for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) == found
