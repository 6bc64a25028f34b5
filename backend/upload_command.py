"""What `hardfirst upload` shows in the terminal while it works, and says at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sized

import typer
from rich.console import Console

from backend.score_command import INTERRUPTED, PROBLEMS_SAID, in_words, progress_bar, stopped_politely
from worker.errors import BadRequest
from worker.image_sources import printable
from worker.services import Services
from worker.settings import load_settings
from worker.upload import NEAR, REPORT, Outcome, Plan, Request, problems_of, upload


def run(request: Request) -> None:
    """Read, compare, upload, say so. A request that cannot be right ends with code 2, Ctrl-C with 130."""
    console = Console(highlight=False, soft_wrap=True)
    settings = load_settings()
    try:
        with stopped_politely(), progress_bar() as bar:
            task = bar.add_task("starting", total=None, rate="")
            shown = [""]

            def progress(what: str, done: int, total: int) -> None:
                if what != shown[0]:  # its speed is not that of what was done before
                    bar.reset(task, description=what, total=total or None, rate="")
                    shown[0] = what
                speed = bar.tasks[0].speed
                bar.update(
                    task, completed=done, total=total or None, rate=f"{speed:.1f} images/s" if speed and total else ""
                )

            plan, outcome = upload(request, Services(settings, "worker"), progress)
    except BadRequest as error:
        typer.echo(f"hardfirst: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("Stopped. What was uploaded stays: the same command goes on from there.", err=True)
        sys.exit(INTERRUPTED)
    address = settings.url or f"http://localhost:{settings.port}"
    for line in summary(plan, outcome, settings.label_studio_url, address):
        console.print(line, markup=False)


def summary(plan: Plan, outcome: Outcome, label_studio_url: str, address: str) -> Iterator[str]:
    """How many, how long, what was left out and why, where the report is, what to do next."""
    request = plan.request
    if request.dry_run:
        where = f"project {outcome.project_id}" if outcome.project_id else f"a new project {request.new!r}"
        yield f"{len(plan.new):,} of {len(plan.images):,} images would become tasks of {where}. Nothing was changed."
    else:
        took = f" in {in_words(outcome.seconds)}" if outcome.made else ""
        yield f"{outcome.made:,} of {len(plan.images):,} images became tasks of project {outcome.project_id}{took}."
    if plan.there:
        yield f"{len(plan.there):,} {_are(plan.there)} in the project already."
    if plan.twice:
        yield f"{len(plan.twice):,} with the same content as another one {_were(plan.twice)} left out."
    if plan.near:
        count = sum(len(group) for group in plan.near)
        groups = f"{len(plan.near):,} group{'s' if len(plan.near) > 1 else ''}"
        alike = f"{count:,} look alike, in {groups} (none is left out for that)"
        yield f"{alike}: {request.out / NEAR}"
    yield from plan.notes
    yield from outcome.notes
    yield from _problems(problems_of(plan, outcome))
    yield f"Report: {request.out / REPORT}"
    if outcome.project_id is not None and not request.dry_run:
        yield (
            f"Next: {label_studio_url}/projects/{outcome.project_id}/settings/ml -> Connect Model, Backend URL "
            f"{address}; connected already, the next batch takes the new images in by itself."
        )


def _problems(problems: dict[str, str]) -> Iterator[str]:
    if not problems:
        return
    yield f"{len(problems):,} cannot be used and {_were(problems)} left out:"
    for name, text in list(problems.items())[:PROBLEMS_SAID]:
        yield f"  {name}: {printable(text)}"
    if len(problems) > PROBLEMS_SAID:
        yield f"  ... and {len(problems) - PROBLEMS_SAID:,} more, in the report"


def _are(some: Sized) -> str:
    return "is" if len(some) == 1 else "are"


def _were(some: Sized) -> str:
    return "was" if len(some) == 1 else "were"
