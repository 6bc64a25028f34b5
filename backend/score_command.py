"""What `hardfirst score` shows in the terminal while it works, and says at its end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worker.errors import BadRequest
from worker.image_sources import ImageReader, printable
from worker.offline import Ranking, Request, rank
from worker.offline_results import write_results
from worker.settings import load_settings

INTERRUPTED = 130  # as shells have it
PROBLEMS_SAID = 5


def run(request: Request) -> None:
    """Score, rank, write, say so. A request that cannot be right ends with code 2, Ctrl-C with 130."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        settings = load_settings()
        with stopped_politely(), progress_bar() as bar:
            task = bar.add_task("reading", total=None, rate="")

            def progress(done: int, total: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, description="scoring", completed=done, total=total, rate=_rate(speed))

            ranking = rank(request, settings, progress)
            bar.update(task, description="writing", rate=_rate(ranking.per_second))
            reader = ImageReader(settings.image_max_mb * 1_000_000, settings.image_max_megapixels * 1_000_000)
            files = write_results(ranking, reader)
    except BadRequest as error:
        typer.echo(f"hardfirst: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("Stopped. What was scored is kept: the same command goes on from there.", err=True)
        sys.exit(INTERRUPTED)
    for line in summary(ranking, files):
        console.print(line, markup=False)


def progress_bar() -> Progress:
    """On stderr, and only where somebody looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


def _rate(per_second: float | None) -> str:
    return "" if per_second is None else f"{per_second:.1f} images/s"


@contextmanager
def stopped_politely() -> Iterator[None]:
    """A `kill` ends as Ctrl-C does: with what was scored kept."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(ranking: Ranking, files: list[Path]) -> Iterator[str]:
    """How many, how long, what cannot be known, where the files are, what to do next."""
    request = ranking.request
    usable = int(ranking.table.usable[: ranking.n_pool].sum())
    known = len(ranking.images) - ranking.fresh
    how = f"{ranking.fresh:,} scored in {in_words(ranking.seconds)}"
    how += f" ({_rate(ranking.per_second)})" if ranking.per_second else ""
    yield f"{usable:,} images ranked by {request.settings.strategy}: {how}" + (
        f", {known:,} known from before." if known else "."
    )
    yield from ranking.notes
    problems = ranking.pool_problems
    if problems:
        yield f"{len(problems):,} could not be used:"
        for position, text in list(problems.items())[:PROBLEMS_SAID]:
            yield f"  {printable(ranking.images[position].key)}: {text}"
        if len(problems) > PROBLEMS_SAID:
            yield f"  ... and {len(problems) - PROBLEMS_SAID:,} more, in scores.parquet"
    yield ""
    for path in files:
        yield f"  {path}  {_ABOUT[path.name]}"
    yield ""
    yield from _next(ranking)


_ABOUT = {
    "contact_sheet.html": "look at the first ones: open it in a browser",
    "label_studio.json": "tasks with predictions, for Label Studio's import",
    "label_config.xml": "the labelling interface those predictions fit",
    "manifest.json": "the ranking, with what each utility is made of",
    "scores.parquet": "every image",
    "top.txt": "the chosen images, one path a line",
    "random.txt": "as many at random, none of them among the chosen: the comparison",
    "label_studio_random.json": "the same as tasks",
}


def _next(ranking: Ranking) -> Iterator[str]:
    request, count = ranking.request, len(ranking.top)
    if ranking.at_random:
        yield (
            f"Next: label the {count} of top.txt and the {len(ranking.at_random)} of random.txt, train once with each "
            "added to what you have, and compare mAP on images that are in neither."
        )
    elif request.with_random:
        yield f"Next: label these {count}, retrain."
    else:
        yield f"Next: label these {count}, retrain, compare. --with-random adds as many random ones to compare with."
    is_local = any("://" not in image.path for image in ranking.images)
    if request.image_url_prefix is None and request.local_files_root is None and is_local:
        yield (
            "Before you import label_studio.json, say how Label Studio finds the images: run this again with "
            "--image-url-prefix or --local-files-root (nothing is scored twice)."
        )


def in_words(seconds: float) -> str:
    """A duration, for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
