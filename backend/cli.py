"""The `hardfirst` command."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from worker import queue
from worker.errors import HardfirstError
from worker.settings import load_settings

app = typer.Typer(
    help="Label Studio ML backend that shows annotators the images worth labelling first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an error of ours is one sentence; any other is for the issue tracker, whole
)


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="Data folder. Default: HARDFIRST_DATA_DIR.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: HARDFIRST_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: HARDFIRST_PORT.")] = None,
) -> None:
    """Start Valkey, the backend and the workers, until Ctrl-C."""
    from backend import supervisor

    settings = load_settings(**_given(data_dir=data, host=host, port=port))
    if settings.redis_url:
        queue.connect(settings.redis_url)  # refuse what is no Redis URL before five children repeat it
    children, redis_url = supervisor.up_children(settings)

    def say_where() -> None:
        typer.echo(
            f"hardfirst answers at http://{settings.host}:{settings.port}  (Label Studio: {settings.label_studio_url})"
        )
        typer.echo(f"store {_without_password(settings.store_url)}, queue {_without_password(redis_url)}")
        if not settings.api_key:
            typer.echo("No token: Label Studio: Account & Settings -> Access Token; set LABEL_STUDIO_API_KEY")

    asyncio.run(supervisor.run(children, secrets=supervisor.secrets_of(settings), on_ready=say_where))


@app.command()
def demo(
    exit_: Annotated[bool, typer.Option("--exit", help="Stop everything at the end and print one JSON line.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="data.yaml of a labelled YOLO dataset (train, pool, val) to use instead.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to run.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Folder for everything. Default: a new temporary one.")] = None,
    images: Annotated[int | None, typer.Option(min=20, help="Images to generate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="K: labels per round.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs per training.")] = None,
    imgsz: Annotated[int | None, typer.Option(min=32, help="Longest side the detector sees, pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the images and of every choice.")] = 0,
    port: Annotated[int, typer.Option(help="Port of the backend; 0: any free one.")] = 0,
) -> None:
    """Run the whole loop: Label Studio, generated images, two scripted annotators, rounds."""
    from importlib import import_module

    run = import_module("demo.loop").run  # `backend` imports nothing of `demo`: this is the command's only door to it
    overrides = _given(images=images, batch_size=batch_size, epochs=epochs, imgsz=imgsz)
    raise typer.Exit(
        run(stop_at_end=exit_, data_yaml=data, n_rounds=rounds, folder=folder, seed=seed, port=port, **overrides)
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def main() -> None:
    try:
        app()
    except HardfirstError as error:
        typer.echo(f"hardfirst: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
