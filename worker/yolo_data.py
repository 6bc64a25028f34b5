"""A labelled YOLO dataset: what a data.yaml and the text files beside its images say."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """train = labelled, pool, val = holdout; without pool, nine tenths of train become the pool.

    Raises:
        BadRequest: not such a file; the sentence says what is missing.
    """
    content = _read_yaml(data_yaml)
    root = data_yaml.parent / str(content.get("path") or ".")
    names = _names(content.get("names"), data_yaml)
    train, pool, holdout = (_images(root, content.get(key), len(names)) for key in ("train", "pool", "val"))
    if not pool:
        kept = len(train) - round(POOL_SHARE * len(train))
        train, pool = train[:kept], train[kept:]
    if not pool:
        raise BadRequest(f"{data_yaml}: neither `pool` nor `train` names an image")
    return Dataset(names, tuple(train), tuple(pool), tuple(holdout))


def _read_yaml(data_yaml: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(data_yaml.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRequest(f"{data_yaml} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise BadRequest(f"{data_yaml} is not a data.yaml: it must map train, val and names")
    return content


def _names(value: object, data_yaml: Path) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{data_yaml}: `names` must list the classes")
    return tuple(str(name) for name in value)


def _images(root: Path, entry: object, n_classes: int) -> list[TrueImage]:
    """Images of a split: a folder, a text list (lines relative to it), or several of these."""
    if entry is None:
        return []
    if isinstance(entry, list):
        return [image for one in entry for image in _images(root, one, n_classes)]
    place = root / str(entry)
    if place.is_dir():
        paths = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    elif place.is_file():
        lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
        paths = [(place.parent / line).resolve() for line in lines if line]
    else:
        raise BadRequest(f"{place} is neither a folder of images nor a list of them")
    return [TrueImage(path, _boxes(label_path(path), n_classes)) for path in paths]


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
    try:
        lines = label.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{label} cannot be read: {error}") from error
    return tuple(_box(line, label, n_classes) for line in lines if line.strip())


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
