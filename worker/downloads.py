"""What a project's people may take home: its labels and images as a YOLO dataset, in one zip that is written as it is
read.

    data.yaml          train: images/train, val: images/holdout, names
    images/train/      what the next round would train on
    images/holdout/    what rounds are measured on, and never trained on
    labels/...         the files of worker.dataset: "class x y width height", 0..1; an empty file is a background image
    left_out.json      task id -> why its image is not there
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from sqlalchemy import select

from worker import rounds
from worker.dataset import TaskTruth, truth_of, write_image, write_labels
from worker.errors import DatasetUnusable, ImageUnusable
from worker.retraining import Ahead
from worker.services import Services
from worker.store import get_project, tasks

PACKED = (1980, 1, 1, 0, 0, 0)  # equal datasets are equal files
TWIN = "it looks like an image of the holdout, so no round trains on it"


@dataclass(frozen=True)
class DatasetParts:
    """A labelled project, before its images are fetched.

    Attributes:
        names: class id -> label.
        truths: one of each labelled task, by task id.
        folders: task id -> "train" or "holdout".
        left_out: task id -> why it is in neither.
        fetch: task id -> image bytes. ImageUnusable leaves that one out.
    """

    names: tuple[str, ...]
    truths: Sequence[TaskTruth]
    folders: dict[int, str]
    left_out: dict[int, str]
    fetch: Callable[[int], bytes]
    max_pixels: int


def dataset_parts(own: Services, project_id: int) -> DatasetParts:
    """What Label Studio's export says now.

    Raises:
        NotFound: the project is not connected.
        DatasetUnusable: nobody has labelled a task of it yet.
        LabelStudioUnavailable, CredentialsMissing: Label Studio is away, or refuses the token.
    """
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        held = rounds.holdout_of(connection, project_id)
        barred = rounds.not_for_training(connection, project_id)
        query = select(tasks.c.task_id, tasks.c.image).where(tasks.c.project_id == project_id)
        image_of = {int(row.task_id): str(row.image) for row in connection.execute(query)}
    label_map = rounds.label_map_of(project)
    exported = own.label_studio.export(project_id)
    key = label_map.image_key
    image_of |= {int(task["id"]): str((task.get("data") or {}).get(key) or "") for task in exported}
    found = sorted(
        (truth for task in exported if (truth := truth_of(task, label_map)) is not None), key=lambda one: one.task_id
    )
    if not found:
        raise DatasetUnusable("No task is labelled yet: there is no dataset to download.")
    left_out = {one.task_id: TWIN for one in found if one.task_id in barred and not held.get(one.task_id)}
    left_out |= {one.task_id: one.unusable for one in found if one.unusable}
    truths = [one for one in found if one.task_id not in left_out]
    return DatasetParts(
        names=label_map.labels,
        truths=truths,
        folders={one.task_id: "holdout" if held.get(one.task_id) else "train" for one in truths},
        left_out=left_out,
        fetch=Ahead(
            lambda task_id: own.images.fetch({key: image_of[task_id]}, key, task_id), [one.task_id for one in truths]
        ),
        max_pixels=own.settings.image_max_megapixels * 1_000_000,
    )


def dataset_zip(parts: DatasetParts) -> Iterator[bytes]:
    """The zip, piece by piece: a few images are in memory at a time, whatever the dataset's size.

    Raises, after some pieces: whatever `fetch` raises but ImageUnusable. The zip then has no end, so that nobody takes
    half a dataset for a whole one.
    """
    left_out = dict(parts.left_out)
    stream = _Pieces()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as packed, tempfile.TemporaryDirectory() as scratch:
        _add(packed, "data.yaml", _data_yaml(parts).encode())
        yield stream.take()
        for truth in parts.truths:
            try:
                _add_image(packed, Path(scratch), parts, truth)
            except ImageUnusable as error:
                left_out[truth.task_id] = str(error)
            yield stream.take()
        told = {str(task_id): reason for task_id, reason in sorted(left_out.items())}
        _add(packed, "left_out.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
    yield stream.take()


def _add_image(packed: zipfile.ZipFile, scratch: Path, parts: DatasetParts, truth: TaskTruth) -> None:
    folder = parts.folders[truth.task_id]
    name = write_image(scratch, truth.task_id, parts.fetch(truth.task_id), parts.max_pixels)
    write_labels(scratch, truth, len(parts.names))
    for place, file in (("images", scratch / name), ("labels", scratch / f"{truth.task_id}.txt")):
        _add(packed, f"{place}/{folder}/{file.name}", file.read_bytes())
        file.unlink()


def _data_yaml(parts: DatasetParts) -> str:
    """Without `path`: the trainer then looks beside the file."""
    content = {"train": "images/train", "val": "images/holdout", "names": dict(enumerate(parts.names))}
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False)


def _add(packed: zipfile.ZipFile, name: str, content: bytes) -> None:
    packed.writestr(zipfile.ZipInfo(name, PACKED), content)


class _Pieces(io.RawIOBase):
    """A file that forgets what was taken from it. It cannot seek: ZipFile then writes sizes behind each file."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        piece = bytes(content)  # type: ignore[call-overload]  # anything with a buffer
        self._waiting.append(piece)
        return len(piece)

    def take(self) -> bytes:
        """What was written since the last call."""
        taken = b"".join(self._waiting)
        self._waiting.clear()
        return taken
