"""The `hardfirst` command."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from worker import queue
from worker.errors import HardfirstError, SettingsInvalid
from worker.settings import Settings, load_settings, unknown_variables

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
    from backend import doctor_command, supervisor

    settings = _settings(data_dir=data, host=host, port=port)
    if settings.redis_url:
        queue.connect(settings.redis_url)  # refuse what is no Redis URL before five children repeat it
    children, redis_url = supervisor.up_children(settings)

    def say_where() -> None:
        typer.echo(
            f"hardfirst answers at http://{settings.host}:{settings.port}  (Label Studio: {settings.label_studio_url})"
        )
        typer.echo(f"store {_without_password(settings.store_url)}, queue {_without_password(redis_url)}")
        if not settings.api_key:
            typer.echo(
                "No token: Label Studio: Account & Settings -> Personal Access Token; set LABEL_STUDIO_API_KEY in .env"
            )
        # beside the children: a Label Studio that is away takes seconds to be found so
        looking = threading.Thread(target=doctor_command.tell_first, args=(settings, _say), daemon=True)
        looking.start()

    asyncio.run(supervisor.run(children, secrets=supervisor.secrets_of(settings), on_ready=say_where))


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Put right what can be put right safely.")] = False,
    project: Annotated[
        list[int] | None, typer.Option(help="Label Studio's id of a project, repeatable. Default: all connected.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load torch: no device, weights and classes.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data: Annotated[Path | None, typer.Option(help="Data folder. Default: HARDFIRST_DATA_DIR.")] = None,
) -> None:
    """Check everything, in order, each failure with its fix. Exit code 1 when something failed."""
    from backend import doctor_command

    settings = _settings(data_dir=data)
    raise typer.Exit(doctor_command.run(settings, project or [], fix=fix, quick=quick, as_json=json_))


@app.command()
def report(
    project: Annotated[
        list[int] | None, typer.Option(help="Label Studio's id of a project, repeatable. Default: all connected.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder, or for one project a file that ends in .html. Default: this folder.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data folder. Default: HARDFIRST_DATA_DIR.")] = None,
) -> None:
    """Write each project's report, hardfirst-p<ID>.html, and its numbers (.json) from the store alone: no server."""
    from backend import report_command

    report_command.run(_settings(data_dir=data), project or [], out)


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


@app.command()
def web(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: HARDFIRST_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: HARDFIRST_PORT.")] = None,
) -> None:
    """Start the backend alone, for a deployment over several machines or containers. Needs REDIS_URL."""
    import uvicorn

    from backend.app import create_app

    settings = _for_many_hosts(_settings(host=host, port=port))
    # 3 s: a page's event stream never ends itself
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=3,
        log_level="warning",
    )


@app.command()
def simulate(
    data: Annotated[Path, typer.Option(help="data.yaml of a labelled YOLO dataset; its val becomes the holdout.")],
    out: Annotated[Path, typer.Option(help="Folder for results, and for what a later run can reuse.")],
    strategies: Annotated[
        str, typer.Option(help="Arms: hybrid, random@2 (another draw), hybrid:alpha=0.5,threshold=0.05 ...")
    ] = "random,random@2,hybrid_k_center",
    rounds: Annotated[int, typer.Option(min=1, help="Batches after the seed set.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="K: labels per round.")] = 200,
    seeds: Annotated[str, typer.Option(help="Repetitions, each with a seed set of its own for all arms.")] = "0",
    seed_size: Annotated[int, typer.Option(min=1, help="Images labelled before the first batch.")] = 200,
    seed_set: Annotated[str, typer.Option(help="How they are drawn: random or diverse.")] = "random",
    weights: Annotated[str | None, typer.Option(help="Base weights of all arms. Default: HARDFIRST_WEIGHTS.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs per training.")] = None,
    imgsz: Annotated[int | None, typer.Option(min=32, help="Longest side the detector sees, pixels.")] = None,
    train_batch: Annotated[int | None, typer.Option(min=1, help="Images in one training step.")] = None,
    nominal_batch: Annotated[int | None, typer.Option(min=1, help="Images per optimizer step.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value: a project setting for all arms.")] = None,
    rare: Annotated[str, typer.Option(help="Rare classes. Default: those in fewer than 6 % of the images.")] = "",
    seconds_per_image: Annotated[float, typer.Option(min=0, help="Annotator's seconds to open an image.")] = 8.0,
    seconds_per_box: Annotated[float, typer.Option(min=0, help="Annotator's seconds to draw a box.")] = 7.0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per core; 1 on a GPU.")] = None,
) -> None:
    """Replay rounds on a labelled dataset: strategies against random. Ctrl-C stops it; started again, it goes on."""
    from backend.simulation import simulate as run

    settings = _given(weights=weights, epochs=epochs, imgsz=imgsz, train_batch=train_batch, nominal_batch=nominal_batch)
    raise typer.Exit(
        run(
            data=data,
            strategies=strategies,
            rounds=rounds,
            batch_size=batch_size,
            seeds=seeds,
            out=out,
            seed_size=seed_size,
            seed_set=seed_set,
            jobs=jobs,
            rare=rare,
            seconds_per_image=seconds_per_image,
            seconds_per_box=seconds_per_box,
            assigned=set_ or [],
            **settings,
        )
    )


@app.command()
def score(
    images: Annotated[
        list[str],
        typer.Argument(
            help="A folder (with all in it), a glob, a text list of paths, or a URL such as s3://bucket/pool."
        ),
    ],
    weights: Annotated[
        list[Path] | None,
        typer.Option(help="Your current detector (.pt); 3 to 5 of them: a committee. Without: ranked by diversity."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, max=100_000, help="Images to choose.")] = 200,
    strategy: Annotated[
        str | None,
        typer.Option(help="How they are chosen, as hybrid:alpha=0.5. Default: hybrid_k_center; no weights: coverage."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="name=value, of the strategy (alpha=0.5) or of the reading (threshold=0.05, empty=certain)."),
    ] = None,
    labelled: Annotated[
        str | None, typer.Option(help="Images that have labels, as IMAGES: not chosen, and nothing like them.")
    ] = None,
    with_random: Annotated[
        bool, typer.Option("--with-random", help="Also write a list of K random images, disjoint: the comparison.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results; scores are kept there.")] = Path("hardfirst-score"),
    imgsz: Annotated[int, typer.Option(min=32, max=4096, help="Longest side the detector sees, pixels.")] = 640,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of every random choice.")] = 0,
    label_config: Annotated[
        Path | None,
        typer.Option(help="Your project's label config (XML), so that predictions fit it. Default: the model's names."),
    ] = None,
    image_url_prefix: Annotated[
        str | None,
        typer.Option(help="Label Studio opens an image at this address + its path below IMAGES (https://cdn/pool/)."),
    ] = None,
    local_files_root: Annotated[
        Path | None,
        typer.Option(
            help="Label Studio serves local files from this folder (its LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT; the "
            "project needs a local storage that covers them): images become /data/local-files/?d=... of it."
        ),
    ] = None,
) -> None:
    """Rank images by your current model: no Label Studio, no queue. Stopped, the same command goes on."""
    from backend import score_command
    from worker.offline import Request

    score_command.run(
        Request(
            sources=tuple(images),
            weights=tuple(weights or ()),
            k=k,
            strategy=strategy,
            options=tuple(option or ()),
            labelled=labelled,
            imgsz=imgsz,
            seed=seed,
            with_random=with_random,
            out=out,
            label_config=label_config,
            image_url_prefix=image_url_prefix,
            local_files_root=local_files_root,
        )
    )


@app.command()
def upload(
    images: Annotated[
        list[str],
        typer.Argument(
            help="A folder (with all in it), a glob, a text list of paths, or a URL such as s3://bucket/pool."
        ),
    ],
    project: Annotated[int | None, typer.Option(help="Label Studio's id of the project, as in its address.")] = None,
    new: Annotated[str | None, typer.Option(help="Title of a project to make; is it there, to go on in.")] = None,
    classes: Annotated[str, typer.Option(help="Labels of the new project: bolt,nut,washer.")] = "",
    label_config: Annotated[Path | None, typer.Option(help="Label config (XML) of the new project.")] = None,
    local_files_root: Annotated[
        Path | None,
        typer.Option(
            help="Label Studio serves local files from this folder (its LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT; the "
            "project needs a local storage that covers them): nothing is copied."
        ),
    ] = None,
    image_url_prefix: Annotated[
        str | None,
        typer.Option(help="Browsers open an image at this address + its path below IMAGES: nothing is copied."),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Upload what is named by URL, too. Default: s3:// stays, for a storage.")
    ] = False,
    near_duplicate_threshold: Annotated[
        float, typer.Option(min=0.5, max=1, help="Cosine above which two images are reported as alike.")
    ] = 0.99,
    out: Annotated[Path, typer.Option(help="Folder for the report; what was read is kept there.")] = Path(
        "hardfirst-upload"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")] = False,
) -> None:
    """Bring images into a Label Studio project, none twice. Stopped, the same command goes on."""
    from backend import upload_command
    from worker.upload import Request

    upload_command.run(
        Request(
            sources=tuple(images),
            project_id=project,
            new=new,
            classes=tuple(dict.fromkeys(name.strip() for name in classes.split(",") if name.strip())),
            label_config=label_config,
            local_files_root=local_files_root,
            image_url_prefix=image_url_prefix,
            copy=copy,
            near_duplicate_threshold=near_duplicate_threshold,
            out=out,
            dry_run=dry_run,
        )
    )


@app.command("worker")
def run_worker(
    queues: Annotated[list[str], typer.Argument(help=f"Queues to serve, in this order: {', '.join(queue.QUEUES)}.")],
) -> None:
    """Start one worker, for a deployment over several machines or containers. Needs REDIS_URL.

    `train` wants a process of its own, one per GPU; so does `predict`: an annotator must not wait behind a shard.
    """
    _for_many_hosts(_settings())
    if queue.TRAIN in queues and len(queues) > 1:
        raise SettingsInvalid("a worker of `train` serves nothing else: a training would block it. Start two workers")
    sys.exit(queue.main(["train" if queue.TRAIN in queues else "simple", ",".join(queues)]))


def _say(line: str) -> None:
    typer.echo(f"up       | {line}")


def _settings(**overrides: Any) -> Settings:
    """Of the environment and the command line; what looks like a setting and is none is told."""
    settings = load_settings(**_given(**overrides))
    for sentence in unknown_variables(os.environ):
        typer.echo(f"hardfirst: {sentence}", err=True)
    return settings


def _for_many_hosts(settings: Settings) -> Settings:
    if not settings.redis_url:
        raise SettingsInvalid("REDIS_URL is not set. On one machine, `hardfirst up` starts everything, Valkey too")
    queue.connect(settings.redis_url)  # refuses what is no Redis URL, in a sentence
    return settings


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def main() -> None:
    try:
        app(prog_name="hardfirst")  # not `python -m backend.cli`, which scripts/hardfirst runs
    except HardfirstError as error:
        typer.echo(f"hardfirst: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
