"""The README and docs/ are held to the code: tables, commands, make targets, links, every error, check and state."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

import strategies.errors
import worker.errors
from backend.cli import app
from scripts import readme_tables
from worker import doctor, doctor_project, image_sources
from worker.settings import ProjectSettings, Settings, variable_of
from worker.store import CLOSED_STATES, OPEN_STATES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
TROUBLE = TEXTS["docs/troubleshooting.md"]
LARGEST_PICTURE = 150_000  # bytes, of Label Studio's pages


def first_cells(text: str) -> list[str]:
    """What the rows of a page's tables begin with, where that is code."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def commands() -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", readme_tables.tables())
def test_tables_are_those_of_the_models(name: str) -> None:
    page = TEXTS["README.md" if name == "first" else "docs/settings.md"]
    block = f"<!-- table: {name} -->\n{readme_tables.tables()[name]}\n<!-- end -->"
    assert block in page, "run: scripts/py -m scripts.readme_tables --write"


def test_every_setting_is_in_one_table_of_the_page() -> None:
    named = [variable_of(name) for name in Settings.model_fields]
    tables = {name: table for name, table in readme_tables.tables().items() if name.startswith(("env", "project"))}
    assert sorted(first_cells("\n".join(tables.values()))) == sorted([*named, *ProjectSettings.model_fields])


def test_every_setting_has_a_description() -> None:
    for table in readme_tables.tables().values():
        assert "| None |" not in table


def test_the_readme_names_five_settings() -> None:
    assert len(first_cells(readme_tables.tables()["first"])) == 5


def test_every_variable_that_is_named_exists() -> None:
    known = {variable_of(name) for name in Settings.model_fields}
    known.add("HARDFIRST_CACHE")  # of scripts/setup.sh
    for name, text in TEXTS.items():
        assert set(re.findall(r"HARDFIRST_[A-Z_]+[A-Z]", text)) <= known, name


# --- commands --------------------------------------------------------------------------------------------------------


def test_every_command_appears() -> None:
    assert sorted(commands()) == sorted(set(re.findall(r"^\| `hardfirst (\w+)`", README, re.MULTILINE)))


@pytest.mark.parametrize("name", PAGES)
def test_every_command_that_is_named_exists(name: str) -> None:
    assert set(re.findall(r"`(?:scripts/)?hardfirst (\w+)", TEXTS[name])) <= set(commands())


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_that_is_named_exists(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", TEXTS[name], re.MULTILINE))
    assert {one or other for one, other in named} <= targets


@pytest.mark.parametrize("name", PAGES)
def test_every_script_that_is_named_exists(name: str) -> None:
    for module in re.findall(r"scripts/py -m ([\w.]+)", TEXTS[name]):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_the_first_screen_has_both_commands_and_a_picture() -> None:
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen
    assert "make test" in first_screen
    assert "](docs/admin.png)" in first_screen


# --- links and pictures ----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        linked = (PAGES[name].parent / place).resolve() if place else PAGES[name]
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README))
    assert linked == {name for name in PAGES if name.startswith("docs/")}


def test_pictures_of_label_studio_are_small_and_all_shown() -> None:
    pictures = sorted((ROOT / "docs" / "label-studio").iterdir())
    shown = re.findall(r"!\[[^\]]+\]\(label-studio/([\w.-]+)\)", TEXTS["docs/label-studio.md"])
    assert sorted(shown) == [picture.name for picture in pictures]
    for picture in pictures:
        assert picture.stat().st_size < LARGEST_PICTURE, picture.name
        with Image.open(picture) as opened:
            assert opened.width <= 1000, picture.name


def test_the_diagram_needs_nothing_but_itself() -> None:
    text = (ROOT / "docs" / "loop.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert set(re.findall(r"https?://[^\s\"')]+", text)) == {"http://www.w3.org/2000/svg"}  # the namespace


# --- troubleshooting -------------------------------------------------------------------------------------------------


def error_classes(module: ModuleType) -> Iterator[str]:
    for name, found in inspect.getmembers(module, inspect.isclass):
        if issubclass(found, Exception) and found.__module__ == module.__name__:
            yield name


@pytest.mark.parametrize("module", [worker.errors, strategies.errors, image_sources], ids=lambda one: one.__name__)
def test_every_error_has_a_row(module: ModuleType) -> None:
    assert set(error_classes(module)) - set(first_cells(TROUBLE)) == set()


def test_no_row_is_of_an_error_that_is_gone() -> None:
    known = {name for one in (worker.errors, strategies.errors, image_sources) for name in error_classes(one)}
    assert {cell for cell in first_cells(TROUBLE) if re.fullmatch(r"([A-Z][a-z]+){2,}", cell)} - known == set()


def test_every_check_of_the_doctor_has_a_row_in_its_order() -> None:
    nobody: Any = None  # to list the looks needs no connections; only to look does
    looks = [*doctor.deployment_looks(nobody, quick=True), *doctor_project.project_looks(nobody, 7, quick=True)]
    section = TROUBLE.partition("\n## The checks\n")[2].partition("\n## ")[0]
    assert first_cells(section) == [look.name for look in looks]


def test_every_state_of_a_round_has_a_row() -> None:
    section = TROUBLE.partition("\n## What the page says\n")[2].partition("\n## ")[0]
    assert first_cells(section) == [*OPEN_STATES, *CLOSED_STATES, "paused", "stopped"]


# --- the package -----------------------------------------------------------------------------------------------------


def test_the_packages_that_are_installed_are_those_in_the_clone() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    top = {"strategies", "worker", "backend", "demo"}
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for name in top for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) == found
