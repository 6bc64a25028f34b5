"""A labelled YOLO dataset: what a data.yaml and the text files beside its images say."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from worker.errors import BadRequest

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
POOL_SHARE = 0.9  # of train, where a dataset names no pool
MAX_COORDINATE = 1.01  # as the trainer: a little beyond the edge is rounding, more is a mistake

Box = tuple[int, float, float, float, float]


@dataclass(frozen=True)
class TrueImage:
    """One image and its boxes: (class id, x centre, y centre, width, height), 0..1."""

    path: Path
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Dataset:
    """labelled: annotated before the loop; pool: what annotators see; holdout: empty where the backend draws one."""

    names: tuple[str, ...]
    labelled: tuple[TrueImage, ...]
    pool: tuple[TrueImage, ...]
    holdout: tuple[TrueImage, ...]

    @property
    def images(self) -> tuple[TrueImage, ...]:
        return (*self.labelled, *self.pool, *self.holdout)


def read_dataset(data_yaml: Path) -> Dataset:
    """train = labelled, pool, val (or validation) = holdout; without pool, nine tenths of train become the pool.

    Raises:
        BadRequest: not such a file; the sentence says what is missing.
    """
    content = _read_yaml(data_yaml)
    if "kpt_shape" in content:  # an even number of key point values would pass for a polygon
        raise BadRequest(f"{data_yaml} is a dataset of key points (`kpt_shape`): a detector needs boxes or polygons")
    root = _root(content.get("path"), data_yaml)
    names = _names(content.get("names"), data_yaml)
    holdout_key = "validation" if "val" not in content else "val"
    train, pool, holdout = (_images(root, content.get(key), len(names)) for key in ("train", "pool", holdout_key))
    if not pool:
        kept = len(train) - round(POOL_SHARE * len(train))
        train, pool = train[:kept], train[kept:]
    if not pool:
        raise BadRequest(f"{data_yaml}: neither `pool` nor `train` names an image")
    return Dataset(names, tuple(train), tuple(pool), tuple(holdout))


def _read_yaml(data_yaml: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(_read_text(data_yaml))
    except yaml.YAMLError as error:
        raise BadRequest(f"{data_yaml} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise BadRequest(f"{data_yaml} is not a data.yaml: it must map train, val and names")
    return content


def _root(path: object, data_yaml: Path) -> Path:
    """The folder that splits are relative to: `path` beside the data.yaml, else, as for the trainer, where we are."""
    beside = data_yaml.parent / str(path or ".")
    here = Path(str(path or "."))
    return here if here.is_dir() and not beside.is_dir() else beside


def _names(value: object, data_yaml: Path) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = _by_class_id(value, data_yaml)
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{data_yaml}: `names` must list the classes")
    return tuple(str(name) for name in value)


def _by_class_id(names: Mapping[Any, Any], data_yaml: Path) -> list[Any]:
    """Keys may be texts ("10" comes after "9"); a gap would give every class behind it another one's name."""
    try:
        numbered = {int(key): name for key, name in names.items()}
    except (TypeError, ValueError):
        numbered = {}
    if sorted(numbered) != list(range(len(names))):
        told = ", ".join(map(str, list(names)[:12]))
        raise BadRequest(f"{data_yaml}: `names` must number its {len(names)} classes from 0 on, without a gap: {told}")
    return [numbered[class_id] for class_id in range(len(names))]


def _images(root: Path, entry: object, n_classes: int) -> list[TrueImage]:
    """Images of a split: a folder, a text list, or several of these."""
    if entry is None:
        return []
    if isinstance(entry, list):
        return [image for one in entry for image in _images(root, one, n_classes)]
    place = _place(root, str(entry))
    if place.is_dir():
        paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    elif place.is_file():
        folders = [folder.resolve() for folder in (place.parent, root, Path())]
        lines = (line.strip() for line in _read_text(place).splitlines())
        paths = [_listed(line, folders) for line in lines if line]
    else:
        raise BadRequest(f"{place} is neither a folder of images nor a list of them")
    return [TrueImage(path, _boxes(label_path(path), n_classes)) for path in paths]


def _place(root: Path, entry: str) -> Path:
    """A split. Exports of Roboflow write `../train/images` for what lies beside the data.yaml; the trainer knows."""
    place = root / entry
    if entry.startswith("../") and not place.exists():
        return root / entry.removeprefix("../")
    return place


def _listed(line: str, folders: Sequence[Path]) -> Path:
    """An image of a list: relative to the list's folder, else to the dataset's, else, as for the trainer, to ours.

    A link stays one: labels lie beside the name that the dataset gives an image, not beside the file it leads to.
    """
    places = [Path(os.path.normpath(folder / line)) for folder in folders]
    return next((place for place in places if place.exists()), places[0])


def _read_text(file: Path) -> str:
    """Without the mark that Windows puts at the beginning of a text."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} cannot be read: {error}") from error


def label_path(image: Path) -> Path:
    """.../images/a.jpg -> .../labels/a.txt, the last `images` in the path, as ultralytics does."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _boxes(label: Path, n_classes: int) -> tuple[Box, ...]:
    if not label.is_file():
        return ()
    return tuple(_box(line, label, n_classes) for line in _read_text(label).splitlines() if line.strip())


def _box(line: str, label: Path, n_classes: int) -> Box:
    """`class x y width height`, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon, of which the box around it counts."""
    try:
        first, *numbers = line.split()
        class_id, places = int(float(first)), [float(number) for number in numbers]
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"{label}: {line[:80]!r} is not `class x y width height`") from error
    if not 0 <= class_id < n_classes:
        raise BadRequest(f"{label}: class {class_id}, but there are {n_classes} names")
    if not all(math.isfinite(place) and 1 - MAX_COORDINATE <= place <= MAX_COORDINATE for place in places):
        raise BadRequest(f"{label}: {line[:80]!r} has a coordinate outside 0..1: are these pixels?")
    if len(places) >= 6 and len(places) % 2 == 0:
        xs, ys = places[::2], places[1::2]
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        return class_id, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    if len(places) != 4:
        raise BadRequest(f"{label}: {line[:80]!r} is not `class x y width height`")
    x, y, w, h = places
    return class_id, x, y, w, h
