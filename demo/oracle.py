"""A labelled YOLO dataset as the truth that scripted annotators draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import Image

from worker.yolo_data import Dataset, TrueImage, read_dataset

__all__ = ["Dataset", "TrueImage", "everything_unlabelled", "label_config", "read_dataset", "regions"]


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
