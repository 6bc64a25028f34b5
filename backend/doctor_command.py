"""What `hardfirst doctor` shows: a line for each check, with its fix below; or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.text import Text

from worker.doctor import Check, Status, deployment_looks, first_looks, services_for
from worker.doctor import run as look_at
from worker.doctor_project import project_ids, project_looks
from worker.image_sources import printable
from worker.settings import Settings

STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "red", Status.SKIPPED: "dim"}
SYMBOLS = {Status.OK: "✓", Status.WARNING: "!", Status.FAILED: "✗", Status.SKIPPED: "–"}
PLAIN_SYMBOLS = {Status.OK: "+", Status.WARNING: "!", Status.FAILED: "x", Status.SKIPPED: "-"}
NAME_WIDTH = 16


def run(settings: Settings, only: Sequence[int], *, fix: bool, quick: bool, as_json: bool) -> int:
    """Look at everything and print it as it comes; the exit code: 1 when a check failed.

    Args:
        only: ids of the projects to look at; empty: all that are connected.
        fix: put right what can be put right safely.
        quick: torch is not loaded.
    """
    found = examine(settings, only, fix=fix, quick=quick)
    checks = list(found) if as_json else _print(found)
    good = not any(check.status is Status.FAILED for check in checks)
    if as_json:
        print(json.dumps({"ok": good, "checks": [as_dict(check) for check in checks]}, indent=2))
    return 0 if good else 1


def examine(settings: Settings, only: Sequence[int], *, fix: bool, quick: bool) -> Iterator[Check]:
    """Every check, in order, made when it is asked for."""
    own = services_for(settings)
    unusable: set[str] = set()
    yield from look_at(deployment_looks(own, quick=quick), fix=fix, unusable=unusable)
    if "store" in unusable:
        return
    with closing(own.store):
        for project_id in only or project_ids(own):
            here = set(unusable)  # what fails of one project says nothing of the next
            looks = project_looks(own, project_id, quick=quick)
            yield from look_at(looks, fix=fix, unusable=here, project_id=project_id)


def tell_first(settings: Settings, emit: Callable[[str], None]) -> None:
    """What is wrong as `hardfirst up` starts, each in a line; nothing where nothing is."""
    for check in look_at(first_looks(services_for(settings)), fix=False):
        if check.status in (Status.FAILED, Status.WARNING):
            emit(f"{printable(check.sentence).rstrip('.')}. -> {printable(check.fix)}")


def as_dict(check: Check) -> dict[str, Any]:
    return {one.name: getattr(check, one.name) for one in fields(check) if one.name != "mend"}


def _print(found: Iterator[Check]) -> list[Check]:
    console = Console(highlight=False, soft_wrap=True)
    symbols = SYMBOLS if "utf" in console.encoding.lower() else PLAIN_SYMBOLS
    checks: list[Check] = []
    for check in found:
        if check.project_id is not None and (not checks or checks[-1].project_id != check.project_id):
            console.print(f"\nproject {check.project_id}", style="bold")
        console.print(_line(check, symbols[check.status]))
        checks.append(check)
    console.print(f"\n{summary(checks)}")
    return checks


def _line(check: Check, symbol: str) -> Text:
    """In words too, for who sees no colour. What others wrote may hold control characters: they are shown escaped."""
    style = STYLES[check.status]
    line = Text(f"{symbol} {check.status:<7}  ", style=style)
    line.append(f"{check.name:<{NAME_WIDTH}} ", style="default" if check.status is not Status.SKIPPED else style)
    line.append(("mended: " if check.mended else "") + printable(check.sentence), style="default")
    if check.fix and check.status in (Status.FAILED, Status.WARNING):
        line.append(f"\n             -> {printable(check.fix)}", style="default")
    return line


def summary(checks: Sequence[Check]) -> str:
    counts = {status: sum(check.status is status for check in checks) for status in Status}
    parts = [f"{count} {status}" for status, count in counts.items() if count]
    mended = sum(check.mended for check in checks)
    return ", ".join(parts) + (f"; {mended} mended" if mended else "")
