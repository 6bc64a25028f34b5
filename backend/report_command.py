"""`hardfirst report`: each project's report as a file, and its numbers beside it. Needs the store, and nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import httpx
import typer
from sqlalchemy import make_url

from backend.report import Report, make_report
from worker.doctor import Status, look_at_store, services_for
from worker.doctor_project import project_ids
from worker.errors import BadRequest, Conflict
from worker.services import Services
from worker.settings import Settings

PAGE, NUMBERS = ".html", ".json"
PATIENCE = 2.0  # seconds, for a sign of Label Studio: thumbnails alone come from there


def run(settings: Settings, only: Sequence[int], out: Path | None) -> list[Path]:
    """Write the reports of all these projects, or nothing at all; prints and returns where the pages are.

    Args:
        only: ids of projects; empty: all that are connected.
        out: a folder (made where there is none), or of a single project a file that ends in .html; None: here.

    Raises:
        BadRequest: `out` cannot be written, or is one file for several projects.
        Conflict: there is no store, or it is of another version, or no project is connected.
        NotFound: a project is not connected.
    """
    own = services_for(settings)
    _check_store(own)
    with closing(own.store):
        chosen = list(dict.fromkeys(only)) or _connected(own)
        paths = _paths(chosen, out)
        fetch = _answers(own)
        files: dict[Path, bytes] = {}
        for project_id, path in paths.items():
            files |= _files(path, make_report(own, project_id, fetch=fetch))
    write_all(files)
    for path in paths.values():
        typer.echo(str(path))
    return list(paths.values())


def _check_store(own: Services) -> None:
    """As the doctor looks at it, which makes nothing."""
    found = look_at_store(own)
    if found.status is Status.FAILED:
        raise Conflict(f"{found.sentence}. {found.fix}")


def _connected(own: Services) -> list[int]:
    if found := project_ids(own):
        return found
    store = make_url(own.settings.store_url).render_as_string(hide_password=True)
    raise Conflict(
        f"no project is connected in {store}. Label Studio: project -> Settings -> Model -> Connect Model. "
        "If it is another store, name its folder with --data, or set DATABASE_URL"
    )


def _paths(project_ids: Sequence[int], out: Path | None) -> dict[int, Path]:
    """Project id -> its page."""
    folder = (out or Path()).expanduser()
    if folder.suffix.lower() != PAGE or folder.is_dir():
        return {one: folder / f"hardfirst-p{one}{PAGE}" for one in project_ids}
    if len(project_ids) > 1:
        told = ", ".join(map(str, project_ids))
        raise BadRequest(f"--out is one file, {folder}, for projects {told}. Name a folder, or one --project")
    return {project_ids[0]: folder}


def _answers(own: Services) -> bool:
    """Whether it is worth asking for images. Only a sign of life: what it says does not matter."""
    try:
        httpx.get(own.settings.label_studio_url, timeout=PATIENCE)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def _files(page: Path, report: Report) -> dict[Path, bytes]:
    numbers = json.dumps(report.results, indent=1, allow_nan=False)
    return {page: report.html.encode(), page.with_suffix(NUMBERS): numbers.encode()}


def write_all(files: Mapping[Path, bytes]) -> None:
    """Every file whole, or none: all are written beside their places before the first one takes its.

    Raises:
        BadRequest: a folder or a file cannot be written.
    """
    parts: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            if path.is_dir():
                raise IsADirectoryError(0, "a folder of that name is in the way", str(path))
            parts[path] = _part(path, content)
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise BadRequest(
            f"{error.filename or path} cannot be written: {error.strerror or error}. Name another place with --out"
        ) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _part(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as part:
        try:
            part.write(content)
            part.flush()
            os.fsync(part.fileno())
            os.chmod(part.name, 0o644)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
    return Path(part.name)
