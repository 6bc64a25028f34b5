"""What a simulation plays on: a labelled dataset as numbered images, and the oracle that knows their boxes.

val of the data.yaml is the holdout, which is never trained on; everything else it names is the pool.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.composition import alike_earlier
from worker.dataset import MIN_BOX, MIN_SIDE, TaskTruth
from worker.descriptor import describe
from worker.errors import BadRequest, ImageUnusable
from worker.images import decode_image
from worker.yolo_data import TrueImage, label_path, read_dataset

LOOK_ALIKE = 0.99  # cosine of descriptors above which the report calls two images near-duplicates

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Picture:
    """One usable image. `name` is its path from the data.yaml, `digest` of its bytes, `truth` the oracle's."""

    task_id: int
    name: str
    path: Path
    digest: str
    truth: TaskTruth

    @cached_property
    def fingerprint(self) -> str:
        """Of all that a training or a measurement sees of it: number, bytes, boxes."""
        boxes = [[int(c), *map(float, box)] for c, box in zip(self.truth.class_ids, self.truth.boxes_yolo, strict=True)]
        return hashlib.sha256(json.dumps([self.task_id, self.digest, boxes]).encode()).hexdigest()


@dataclass(frozen=True)
class World:
    """The images. descriptors: (len(pool), D) of length 1, in the pool's order, for counting look-alikes."""

    names: tuple[str, ...]
    pool: tuple[Picture, ...]  # by task id
    holdout: tuple[Picture, ...]  # by task id
    descriptors: NDArray[np.float32]
    notes: tuple[str, ...]
    holdout_alike: int  # pool images that look like one of the holdout

    @cached_property
    def by_id(self) -> dict[int, Picture]:
        return {picture.task_id: picture for picture in (*self.pool, *self.holdout)}

    @cached_property
    def pool_fingerprint(self) -> str:
        return _digest(f"{picture.task_id} {picture.digest}" for picture in self.pool)

    @cached_property
    def holdout_fingerprint(self) -> str:
        return _digest(picture.fingerprint for picture in self.holdout)

    @cached_property
    def images_per_class(self) -> dict[str, int]:
        """Class name -> images of pool and holdout that hold it."""
        found = np.zeros(len(self.names), dtype=np.int64)
        for picture in (*self.pool, *self.holdout):
            found[np.unique(picture.truth.class_ids)] += 1
        return {name: int(count) for name, count in zip(self.names, found, strict=True)}

    def alike(self, batch: Sequence[int], before: Iterable[int]) -> list[int]:
        """Those of a batch that look like an image labelled before, or earlier in the batch."""
        earlier = list(before)
        rows = [self._row_of[task_id] for task_id in (*earlier, *batch)]
        alike = alike_earlier(self.descriptors[rows], LOOK_ALIKE)[len(earlier) :]
        return [task_id for task_id, is_alike in zip(batch, alike, strict=True) if is_alike]

    @cached_property
    def _row_of(self) -> dict[int, int]:
        return {picture.task_id: row for row, picture in enumerate(self.pool)}


class Oracle:
    """Knows all boxes of the pool, and tells those it is asked for. `asked` is the order in which it was."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.asked: list[int] = []

    def label(self, task_ids: Sequence[int]) -> None:
        """Somebody labels these.

        Raises:
            ValueError: one of them is labelled already, or is not of the pool.
        """
        in_pool = {picture.task_id for picture in self._world.pool}
        for task_id in task_ids:
            if task_id in self.asked or task_id not in in_pool:
                raise ValueError(f"image {task_id} is labelled already, or not in the pool: a batch may not hold it")
            self.asked.append(int(task_id))

    @property
    def labelled(self) -> list[Picture]:
        """What may be trained on, by task id."""
        return [self._world.by_id[task_id] for task_id in sorted(self.asked)]


def read_world(data_yaml: Path, cache: Path, progress: Progress | None = None) -> World:
    """The dataset, every image of it looked at once; what was found is kept in `cache`.

    Numbers follow the names, so that the order in which a list names the images means nothing.

    Raises:
        BadRequest: no such dataset, an image both in val and outside of it, nothing in val.
    """
    dataset = read_dataset(data_yaml)
    root = data_yaml.resolve().parent
    pool = _by_name((*dataset.labelled, *dataset.pool), root)
    holdout = _by_name(dataset.holdout, root)
    if both := sorted(pool.keys() & holdout.keys()):
        raise BadRequest(f"{data_yaml}: {both[0]} is in val and outside of it. The holdout must never be trained on.")
    if not holdout:
        raise BadRequest(f"{data_yaml}: `val` names no image. It is the holdout, on which all arms are measured.")
    looks = _looks({**pool, **holdout}, cache, progress)
    numbers = {name: number for number, name in enumerate((*pool, *holdout), start=1)}
    broken = [name for name in numbers if looks[name].problem]
    in_holdout = {looks[name].digest for name in holdout}
    copies = [name for name in pool if name not in broken and looks[name].digest in in_holdout]
    kept_pool = [name for name in pool if name not in broken and name not in copies]
    kept_holdout = [name for name in holdout if name not in broken]
    if not kept_pool or not kept_holdout:
        why = looks[broken[0]].problem if broken else "all of the pool are copies of holdout images"
        raise BadRequest(f"{data_yaml}: no usable image is left: {why}")

    def pictures(names: Sequence[str], images: Mapping[str, TrueImage]) -> tuple[Picture, ...]:
        return tuple(
            Picture(numbers[name], name, images[name].path, looks[name].digest, _truth(numbers[name], images[name]))
            for name in names
        )

    _check_boxes(data_yaml, [holdout[name] for name in kept_holdout])
    notes = []
    if broken:
        notes.append(f"{len(broken)} images cannot be used: {broken[0]}: {looks[broken[0]].problem}")
    if copies:
        notes.append(f"{len(copies)} images are copies of holdout images and left out of the pool: {copies[0]}")
    descriptors = np.stack([looks[name].descriptor for name in kept_pool])
    against = np.stack([looks[name].descriptor for name in kept_holdout])
    return World(
        names=dataset.names,
        pool=pictures(kept_pool, pool),
        holdout=pictures(kept_holdout, holdout),
        descriptors=descriptors,
        notes=tuple(notes),
        holdout_alike=count_alike(descriptors, against),
    )


def _check_boxes(data_yaml: Path, holdout: Sequence[TrueImage]) -> None:
    """Before hours of training on what cannot be measured: most often the labels are not where they are looked for."""
    if not any(image.boxes for image in holdout):
        expected = label_path(holdout[0].path)
        raise BadRequest(
            f"{data_yaml}: no image of `val` has a box, so nothing can be measured. Labels of {holdout[0].path.name} "
            f"are looked for in {expected}, which {'has none' if expected.is_file() else 'is not there'}."
        )


def count_alike(rows: NDArray[np.float32], others: NDArray[np.float32]) -> int:
    """How many rows look like one of the others. Both of descriptors."""
    blocks = (rows[start : start + 1024] for start in range(0, len(rows), 1024))  # bounds the memory
    return sum(int((block @ others.T > LOOK_ALIKE).any(axis=1).sum()) for block in blocks)


def _by_name(images: Iterable[TrueImage], root: Path) -> dict[str, TrueImage]:
    named = {Path(os.path.relpath(os.path.abspath(image.path), root)).as_posix(): image for image in images}
    return dict(sorted(named.items()))


def _truth(task_id: int, image: TrueImage) -> TaskTruth:
    """Boxes clipped to the image; what has no area there is left out, as from Label Studio."""
    boxes = np.array([box[1:] for box in image.boxes], dtype=np.float64).reshape(-1, 4)
    low = np.clip(boxes[:, :2] - boxes[:, 2:] / 2, 0, 1)
    high = np.clip(boxes[:, :2] + boxes[:, 2:] / 2, 0, 1)
    inside = np.concatenate([(low + high) / 2, high - low], axis=1)
    has_area = (inside[:, 2:] >= MIN_BOX).all(axis=1)
    class_ids = np.array([box[0] for box in image.boxes], dtype=np.int64)
    return TaskTruth(task_id=task_id, boxes_yolo=inside[has_area], class_ids=class_ids[has_area])


@dataclass(frozen=True)
class _LookAt:
    digest: str
    problem: str
    descriptor: NDArray[np.float32]


def _looks(images: Mapping[str, TrueImage], cache: Path, progress: Progress | None) -> dict[str, _LookAt]:
    """Every image decoded once, or read back where no file has changed since."""
    stats = _digest(f"{name} {_stat(image.path)}" for name, image in images.items())
    file = cache / f"images-{stats[:20]}.npz"
    if not file.is_file():
        found = []
        for done, image in enumerate(images.values(), start=1):
            found.append(_look(image.path))
            if progress is not None:
                progress(done, len(images))
        _save_looks(file, found)
    with np.load(file, allow_pickle=False) as kept:
        rows = zip(images, kept["digests"], kept["problems"], kept["descriptors"], strict=True)
        return {name: _LookAt(str(digest), str(problem), row) for name, digest, problem, row in rows}


def _save_looks(file: Path, found: Sequence[_LookAt]) -> None:
    width = max(len(look.descriptor) for look in found)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}-{os.getpid()}.npz")
    columns: dict[str, Any] = {
        "digests": np.array([look.digest for look in found]),
        "problems": np.array([look.problem for look in found]),
        "descriptors": np.stack([np.resize(look.descriptor, width) if len(look.descriptor) else np.zeros(width)
                                 for look in found]).astype(np.float32),
    }  # fmt: skip
    np.savez(temporary, **columns)
    os.replace(temporary, file)


def _look(path: Path) -> _LookAt:
    none = np.zeros(0, np.float32)
    try:
        content = path.read_bytes()
        image = decode_image(content)
        if min(image.size) < MIN_SIDE:
            raise ImageUnusable(f"it has {image.width} x {image.height} pixels; the trainer takes none below 10.")
        descriptor = describe(image)
    except (ImageUnusable, OSError) as error:
        return _LookAt("", str(error), none)
    return _LookAt(hashlib.sha256(content).hexdigest(), "", descriptor)


def _stat(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise BadRequest(f"{path} is named by the dataset, but cannot be read: {error.strerror}") from error
    return f"{found.st_size} {found.st_mtime_ns}"


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
