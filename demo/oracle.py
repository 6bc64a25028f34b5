"""A labelled YOLO dataset as the truth that scripted annotators draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import yaml
from PIL import Image

from worker.errors import BadRequest

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
POOL_SHARE = 0.9  # of train, where a dataset names no pool


@dataclass(frozen=True)
class TrueImage:
    """One image and its boxes: (class id, x centre, y centre, width, height), 0..1."""

    path: Path
    boxes: tuple[tuple[int, float, float, float, float], ...]


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


def everything_unlabelled(data_yaml: Path) -> Dataset:
    """The whole dataset as the pool: the backend draws its own holdout, and somebody has to label that too."""
    found = read_dataset(data_yaml)
    images = sorted(found.images, key=lambda image: image.path.name)
    return Dataset(found.names, (), tuple(images), ())


def label_config(names: Sequence[str]) -> str:
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in names)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{labels}</RectangleLabels></View>'
    )


def regions(image: TrueImage, names: Sequence[str]) -> list[dict[str, Any]]:
    """The true boxes as an annotator's rectangles."""
    with Image.open(image.path) as opened:
        width, height = opened.size
    return [
        {
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "x": 100 * (x - w / 2),
                "y": 100 * (y - h / 2),
                "width": 100 * w,
                "height": 100 * h,
                "rotation": 0,
                "rectanglelabels": [names[class_id]],
            },
        }
        for class_id, x, y, w, h in image.boxes
    ]


def _read_yaml(data_yaml: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(data_yaml.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
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
    return [TrueImage(path, _boxes(_label_path(path), n_classes)) for path in paths]


def _label_path(image: Path) -> Path:
    """.../images/a.jpg -> .../labels/a.txt, the last `images` in the path, as ultralytics does."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _boxes(label: Path, n_classes: int) -> tuple[tuple[int, float, float, float, float], ...]:
    if not label.is_file():
        return ()
    boxes = []
    for line in label.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        class_id, x, y, w, h = line.split()[:5]
        if not 0 <= int(class_id) < n_classes:
            raise BadRequest(f"{label}: class {class_id}, but there are {n_classes} names")
        boxes.append((int(class_id), float(x), float(y), float(w), float(h)))
    return tuple(boxes)
