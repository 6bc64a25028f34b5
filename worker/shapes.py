"""Shapes that annotators draw, as upright boxes, and boxes as those shapes: pure, values in Label Studio's percent.

rectangle   x, y, width, height: top-left corner and size; rotation in degrees, clockwise around that corner
polygon     points: [[x, y], ...]
ellipse     x, y: its centre; radiusX, radiusY; rotation in degrees, clockwise around the centre

Angles are meant in pixels, so a turned shape needs the size of the image. A rectangle is a box in every project. What
stands for a polygon or an ellipse is the smallest upright box around it. Brushes and bitmasks (several blobs may be one
region), key points and vectors (no extent) have no box of plain meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Shape = Literal["rectangle", "polygon", "ellipse"]
Sides = tuple[float, float, float, float]

SHAPES: tuple[Shape, ...] = get_args(Shape)
# Results of these types are something drawn on an image; others (choices, text, relations) say something about one.
_DRAWN = ("rectangle", "polygon", "ellipse", "keypoint", "brush", "magicwand", "bitmask", "vector", "ocr")
DRAWN_TYPES = frozenset(name for drawn in _DRAWN for name in (drawn, f"{drawn}labels"))

NOT_NUMBERS = "coordinates that are not numbers"
NEEDS_SIZE = "rotated, and the size of the image is not given"
MAX_POINTS = 10_000  # of a polygon drawn by hand: hundreds
_FAR = 1e9  # percent; no image has a point there


def labels_key(shape: Shape) -> str:
    """`type` of a labelled region of this shape, and the key of its labels in `value`."""
    return f"{shape}labels"


def hull_of(shape: Shape, value: Mapping[str, Any], size: tuple[int, int] | None) -> tuple[Sides | None, str]:
    """The smallest upright box around a shape: (x, y, width, height) in percent, not clipped; or None, and why.

    Args:
        shape: what `value` is.
        value: of a region, as anybody may have written it.
        size: of the image, pixels; None: not known, which only turned shapes need.
    """
    if shape == "polygon":
        return _polygon_hull(value.get("points"))
    names = ("x", "y", "width", "height") if shape == "rectangle" else ("x", "y", "radiusX", "radiusY")
    numbers = [number for name in names if (number := number_or_none(value.get(name))) is not None]
    rotation = number_or_none(value.get("rotation") or 0)
    if rotation is None or len(numbers) != 4:
        return None, NOT_NUMBERS
    if rotation % 360 and size is None:
        return None, NEEDS_SIZE
    if shape == "rectangle" and not rotation % 360 and min(numbers[2:]) >= 0:
        x, y, across, down = numbers
        return (x, y, across, down), ""
    width, height = size or (100, 100)
    hull = _rectangle_hull if shape == "rectangle" else _ellipse_hull
    return hull(numbers, math.radians(rotation % 360), width / 100, height / 100), ""


def number_or_none(value: object) -> float | None:
    """A number, or None. Not booleans, NaN, or what no image has: integers too long for a float among them."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _FAR:
        return None
    return float(value)


def _polygon_hull(points: object) -> tuple[Sides | None, str]:
    if not isinstance(points, list) or not 3 <= len(points) <= MAX_POINTS:
        return None, "a polygon that is not 3 to 10,000 points"
    found = []
    for point in points:
        if not isinstance(point, list | tuple) or len(point) != 2:
            return None, NOT_NUMBERS
        x, y = (number_or_none(number) for number in point)
        if x is None or y is None:
            return None, NOT_NUMBERS
        found.append((x, y))
    return _around(np.array(found, dtype=np.float64)), ""


def _rectangle_hull(numbers: Sequence[float], angle: float, across: float, down: float) -> Sides:
    """`across`, `down`: pixels of one percent of the image's width and height."""
    x, y, width, height = (number * unit for number, unit in zip(numbers, (across, down) * 2, strict=True))
    cos, sin = math.cos(angle), math.sin(angle)
    # the corner stays; (width, 0), (width, height) and (0, height) turn around it, y pointing down
    offsets = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    turned = offsets @ np.array([(cos, sin), (-sin, cos)]) + (x, y)
    return _around(turned / (across, down))


def _ellipse_hull(numbers: Sequence[float], angle: float, across: float, down: float) -> Sides:
    x, y = numbers[:2]
    radius_x, radius_y = abs(numbers[2]) * across, abs(numbers[3]) * down
    half_width = math.hypot(radius_x * math.cos(angle), radius_y * math.sin(angle)) / across
    half_height = math.hypot(radius_x * math.sin(angle), radius_y * math.cos(angle)) / down
    return (x - half_width, y - half_height, 2 * half_width, 2 * half_height)


def _around(points: NDArray[np.float64]) -> Sides:
    left, top = (float(side) for side in points.min(axis=0))
    right, bottom = (float(side) for side in points.max(axis=0))
    return (left, top, right - left, bottom - top)


def value_of(shape: Shape, sides: Sides, label: str) -> dict[str, Any]:
    """A box as the `value` of a region of this shape that covers exactly it: a rectangle, its four corners, the ellipse
    inside it. `sides`: x, y, width, height in percent, inside the image."""
    x, y, width, height = sides
    labels = {labels_key(shape): [label]}
    if shape == "polygon":
        right, bottom = x + width, y + height
        return {"points": [[x, y], [right, y], [right, bottom], [x, bottom]], "closed": True, **labels}
    if shape == "ellipse":
        radii = {"radiusX": width / 2, "radiusY": height / 2}
        return {"x": x + width / 2, "y": y + height / 2, **radii, "rotation": 0, **labels}
    return {"x": x, "y": y, "width": width, "height": height, "rotation": 0, **labels}


def drawn_box(region: Mapping[str, Any]) -> tuple[str, Sides] | None:
    """Label and box of a region of ours, whatever its shape: (x, y, width, height) in percent; None: it has no box."""
    value = region.get("value")
    if not isinstance(value, Mapping):
        return None
    for shape in SHAPES:
        labels = value.get(labels_key(shape))
        if isinstance(labels, list) and labels:
            hull, _ = hull_of(shape, value, None)
            return None if hull is None else (str(labels[0]), hull)
    return None


def label_drawn(region: Mapping[str, Any]) -> str | None:
    """The first label of a rectangle, polygon or ellipse; None: the region is none of them, or has no label."""
    value = region.get("value")
    if not isinstance(value, Mapping):
        return None
    found = (value.get(labels_key(shape)) for shape in SHAPES)
    return next((str(labels[0]) for labels in found if isinstance(labels, list) and labels), None)
