"""A seeded factory floor: images with exactly known boxes, so that the whole loop can run with no download.

Six everyday parts and two rare defects lie on concrete, epoxy or steel: in daylight, at night, in glare, blurred or
partly hidden. Some images are frames of one burst: the same scene under small camera movements. An image depends on
(seed, index, size, recipe) alone, so every process draws the same one.

How an image comes about: a plan (which class, where, how large, under which condition) is drawn per burst; objects are
painted on supersampled patches with a height map that gives them their bevel; each pixel remembers the object on top
of it, and the boxes are read from there. A frame is a window into that scene, so its boxes are exact too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress as RichProgress

CLASSES: tuple[str, ...] = ("bolt", "nut", "washer", "gear", "wire", "label_tag", "micro_crack", "surface_pit")
RARE: tuple[str, ...] = ("micro_crack", "surface_pit")
CONDITIONS: tuple[str, ...] = ("day", "night", "glare", "blur", "occlusion")
DEFAULT_SIZE = (384, 288)

COMMON_IDS = tuple(i for i, name in enumerate(CLASSES) if name not in RARE)
RARE_IDS = tuple(i for i, name in enumerate(CLASSES) if name in RARE)

BLOCK = 25  # images planned together, so that a share of 4 % is exactly one image in each block
BURST_FRAMES = (3, 6)
JITTER_SHARE = 0.02  # camera movement inside a burst, of the shorter side
SUPERSAMPLE = 3
MIN_SIDE = 6  # pixels: a box with a shorter side is not drawn at all
MIN_VISIBLE = 0.4  # of an object's own pixels: less, and the object is left out of the scene
JPEG_QUALITY = 90

# Half of an object's longer side, as a share of the image's shorter side.
RADIUS_SHARE: dict[str, tuple[float, float]] = {
    "bolt": (0.13, 0.20),
    "nut": (0.08, 0.125),
    "washer": (0.08, 0.125),
    "gear": (0.11, 0.18),
    "wire": (0.15, 0.23),
    "label_tag": (0.12, 0.18),
    "micro_crack": (0.13, 0.22),
    "surface_pit": (0.08, 0.13),
}

Array = NDArray[Any]  # float32 throughout: float64 would halve the speed
Bytes = NDArray[np.uint8]
Points = NDArray[np.float64]
PointsLike = Points | Sequence[tuple[float, float]]
Colour = tuple[float, float, float]  # red, green, blue
Rng = np.random.Generator


@dataclass(frozen=True)
class Recipe:
    """What the generated world is like. All shares are 0..1.

    rare_share: of images that show each of RARE; they are never part of a burst, so no more than 1 - burst_share can.
    burst_share: about this share of images belongs to bursts.
    hard_link: how often a scene with a rare class is in a hard condition (None: as often as any other scene).
    objects: fewest and most objects in a scene. empty_share: of scenes with no object at all.
    condition_weights: one weight per entry of CONDITIONS.
    """

    rare_share: float = 0.04
    burst_share: float = 0.35
    hard_link: float | None = 0.7
    objects: tuple[int, int] = (3, 7)
    empty_share: float = 0.02
    condition_weights: tuple[float, ...] = (0.56, 0.14, 0.1, 0.1, 0.1)

    def __post_init__(self) -> None:
        """Refuse shares outside 0..1, an empty object range and weights that do not match CONDITIONS."""
        shares = {"rare_share": self.rare_share, "burst_share": self.burst_share, "empty_share": self.empty_share}
        if self.hard_link is not None:
            shares["hard_link"] = self.hard_link
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: give a share between 0 and 1.")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects is {self.objects}: give (fewest, most) with 1 <= fewest <= most.")
        weights = self.condition_weights
        if len(weights) != len(CONDITIONS) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"condition_weights is {weights}: give {len(CONDITIONS)} weights >= 0, for {CONDITIONS}.")


DEFAULT_RECIPE = Recipe()
_SHARE_OF_RARE = "of images that show each of the two rare classes (%(default)s)"


@dataclass(frozen=True)
class Scene:
    """The truth about one image.

    boxes_xyxy: (x1, y1, x2, y2) in pixels, tight around the visible pixels; x2 and y2 are one past the last one, so
    0 <= x1 < x2 <= width. class_ids: positions in CLASSES, one per box. burst: index of the burst's first frame; an
    image on its own has its own index.
    """

    seed: int
    index: int
    size: tuple[int, int]
    boxes_xyxy: tuple[tuple[int, int, int, int], ...]
    class_ids: tuple[int, ...]
    condition: str
    burst: int

    @property
    def stem(self) -> str:
        """The image's file name without its extension: unique for (seed, index)."""
        return f"factory_{self.seed}_{self.index:06d}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in the image, each once, in the order of CLASSES."""
        return tuple(CLASSES[i] for i in sorted(set(self.class_ids)))

    def yolo_lines(self) -> list[str]:
        """One line per box: class, then boxes_yolo (centre x, centre y, width, height, each 0..1)."""
        width, height = self.size
        lines = []
        for class_id, (x1, y1, x2, y2) in zip(self.class_ids, self.boxes_xyxy, strict=True):
            values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{class_id} " + " ".join(f"{value:.6f}" for value in values))
        return lines


# ---------------------------------------------------------------------------------------------------------------
# The plan: which images are bursts, what lies where. Cheap, and complete before anything is painted.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """One image's place in its block."""

    burst: int
    frame: int
    rare_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Thing:
    """An object before it is painted: centre and radius in scene pixels, angle in radians."""

    class_id: int
    x: float
    y: float
    radius: float
    angle: float
    seed: int


def _rng(*key: int) -> Rng:
    return np.random.default_rng(list(key))


def _burst_sizes(rng: Rng, burst_share: float) -> list[int]:
    """Cut a block into runs: 1 for an image on its own, else a burst of 3 to 6 frames."""
    low, high = BURST_FRAMES
    mean_frames = (low + high) / 2
    # A run is a burst with probability q; its share of images is q m / (q m + 1 - q). Solved for q:
    burst_odds = burst_share / (mean_frames - burst_share * (mean_frames - 1))
    sizes: list[int] = []
    while (left := BLOCK - sum(sizes)) > 0:
        wants_burst = rng.random() < burst_odds
        sizes.append(int(rng.integers(low, min(high, left) + 1)) if wants_burst and left >= low else 1)
    order = rng.permutation(len(sizes))  # else bursts would avoid the block's end
    return [sizes[i] for i in order]


@lru_cache(maxsize=64)
def _block(seed: int, number: int, recipe: Recipe) -> tuple[_Slot, ...]:
    """The slots of block `number`. Rare classes fall on images outside bursts, an exact number per block."""
    rng = _rng(seed, 1, number)
    sizes = _burst_sizes(rng, recipe.burst_share)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    singles = [int(start) for start, frames in zip(starts, sizes, strict=True) if frames == 1]
    rare_at: dict[int, list[int]] = {}
    for class_id in RARE_IDS:
        wanted = recipe.rare_share * BLOCK
        count = min(int(wanted + rng.random()), len(singles))
        for position in rng.choice(singles, size=count, replace=False) if count else ():
            rare_at.setdefault(int(position), []).append(class_id)
    return tuple(
        _Slot(burst=number * BLOCK + int(start), frame=frame, rare_ids=tuple(rare_at.get(int(start), ())))
        for start, frames in zip(starts, sizes, strict=True)
        for frame in range(frames)
    )


def _slot(seed: int, index: int, recipe: Recipe) -> _Slot:
    return _block(seed, index // BLOCK, recipe)[index % BLOCK]


def _choose_condition(rng: Rng, rare: bool, recipe: Recipe) -> str:
    """A condition by weight; scenes with a rare class are hard with probability hard_link."""
    weights = np.array(recipe.condition_weights, float)
    if rare and recipe.hard_link is not None:
        weights[1:] = recipe.hard_link / (len(CONDITIONS) - 1)
        weights[0] = 1 - recipe.hard_link
    return str(rng.choice(CONDITIONS, p=weights / weights.sum()))


def _choose_classes(rng: Rng, slot: _Slot, recipe: Recipe) -> list[int]:
    """Rare classes first, so that they find room."""
    chosen = [class_id for class_id in slot.rare_ids for _ in range(int(rng.integers(1, 3)))]
    if not slot.rare_ids and rng.random() < recipe.empty_share:
        return []
    count = int(rng.integers(recipe.objects[0], recipe.objects[1] + 1))
    return chosen + [int(i) for i in rng.choice(COMMON_IDS, size=max(0, count - len(chosen)))]


def _place(rng: Rng, class_ids: Sequence[int], size: tuple[int, int], margin: int) -> list[_Thing]:
    """Put objects where they hardly touch: circles may overlap by a fifth; what finds no room is left out."""
    width, height = size
    unit = min(size)
    things: list[_Thing] = []
    for class_id in class_ids:
        low, high = RADIUS_SHARE[CLASSES[class_id]]
        radius = unit * float(rng.uniform(low, high))
        angle, seed = float(rng.uniform(0, 2 * np.pi)), int(rng.integers(2**31))
        inset = margin + 0.6 * radius  # an object may leave the frame, but never by half
        for _ in range(25):
            x, y = (
                float(rng.uniform(inset, width + margin * 2 - inset)),
                float(rng.uniform(inset, height + margin * 2 - inset)),
            )
            if all(np.hypot(x - t.x, y - t.y) > 0.8 * (radius + t.radius) for t in things):
                things.append(_Thing(class_id, x, y, radius, angle, seed))
                break
    return things


# ---------------------------------------------------------------------------------------------------------------
# The brush
# ---------------------------------------------------------------------------------------------------------------


class _Brush:
    """Paints one object in unit coordinates (its longer side spans -1..1, turned by its angle).

    Three layers grow together, supersampled: colour, mask (what is object) and height (what catches light).
    """

    def __init__(self, thing: _Thing) -> None:
        self.left = int(np.floor(thing.x - thing.radius)) - 3
        self.top = int(np.floor(thing.y - thing.radius)) - 3
        side = int(np.ceil(2 * thing.radius)) + 7
        self.scale = thing.radius * SUPERSAMPLE
        self.origin = np.array([thing.x - self.left, thing.y - self.top]) * SUPERSAMPLE
        cos, sin = np.cos(thing.angle), np.sin(thing.angle)
        self.turn = np.array([[cos, sin], [-sin, cos]])
        shape = (side * SUPERSAMPLE, side * SUPERSAMPLE)
        self.colour: Bytes = np.zeros((*shape, 3), np.uint8)
        self.mask: Bytes = np.zeros(shape, np.uint8)
        self.height: Bytes = np.full(shape, 100, np.uint8)

    def _pixels(self, points: PointsLike) -> NDArray[np.int32]:
        return np.rint(np.asarray(points, float) @ self.turn * self.scale + self.origin).astype(np.int32)

    def _paint(self, draw: Callable[[Bytes, Colour], object], colour: Colour, height: int | None) -> None:
        draw(self.colour, colour)
        draw(self.mask, (255, 255, 255))
        if height is not None:
            draw(self.height, (height, height, height))

    def polygon(self, points: PointsLike, colour: Colour, height: int | None = None) -> None:
        pixels = [self._pixels(points)]
        self._paint(lambda layer, value: cv2.fillPoly(layer, pixels, value), colour, height)

    def disc(self, centre: tuple[float, float], radius: float, colour: Colour, height: int | None = None) -> None:
        x, y = self._pixels([centre])[0]
        size = max(1, round(radius * self.scale))
        self._paint(lambda layer, value: cv2.circle(layer, (int(x), int(y)), size, value, -1), colour, height)

    def line(
        self,
        points: PointsLike,
        width: float,
        colour: Colour,
        height: int | None = None,
    ) -> None:
        pixels = [self._pixels(points)]
        thick = max(1, round(width * self.scale))
        self._paint(lambda layer, value: cv2.polylines(layer, pixels, False, value, thick), colour, height)

    def cut(self, centre: tuple[float, float], radius: float) -> None:
        """A hole: the floor shows through."""
        x, y = self._pixels([centre])[0]
        size = max(1, round(radius * self.scale))
        cv2.circle(self.mask, (int(x), int(y)), size, (0,), -1)
        cv2.circle(self.height, (int(x), int(y)), size, (100,), -1)

    def finish(self, light: tuple[float, float], gloss: float) -> tuple[Array, Array]:
        """(colour, alpha) at image resolution, lit from `light`: colour (h, w, 3) 0..255, alpha (h, w) 0..1."""
        side = self.mask.shape[0] // SUPERSAMPLE
        blurred = cv2.blur(self.height, (2 * SUPERSAMPLE - 1, 2 * SUPERSAMPLE - 1))
        slope_x = cv2.Sobel(blurred, cv2.CV_32F, 1, 0, ksize=3)
        slope_y = cv2.Sobel(blurred, cv2.CV_32F, 0, 1, ksize=3)
        shade = np.clip((slope_x * light[0] + slope_y * light[1]) * (gloss / 255), -0.55, 0.8)
        small = cv2.resize(self.colour, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
        coverage = cv2.resize(self.mask, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        relief = cv2.resize(shade, (side, side), interpolation=cv2.INTER_AREA)
        # The patch is black outside the mask: divide by coverage, else every edge would be darkened twice.
        solid = small / np.maximum(coverage, 0.05)[..., None]
        return np.clip(solid * (1 + relief[..., None]), 0, 255), coverage


# ---------------------------------------------------------------------------------------------------------------
# The eight classes. Each takes a brush and draws itself in -1..1.
# ---------------------------------------------------------------------------------------------------------------

ZINC: Colour = (188, 194, 202)
BRASS: Colour = (214, 170, 72)
COPPER: Colour = (196, 116, 72)
BLACK_OXIDE: Colour = (62, 66, 76)
DARK_STEEL: Colour = (98, 106, 118)
BRONZE: Colour = (150, 108, 62)


def _tint(rng: Rng, colour: Colour, spread: float = 10) -> Colour:
    r, g, b = np.clip(np.array(colour) + rng.normal(0, spread / 2) + rng.normal(0, spread / 3, 3), 0, 255)
    return float(r), float(g), float(b)


def _times(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255.0, c * factor) for c in colour)
    return r, g, b


def _ring(count: int, radius: float, phase: float = 0.0) -> Points:
    angles = phase + np.arange(count) * 2 * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


def _draw_bolt(brush: _Brush, rng: Rng) -> None:
    metal = _tint(rng, (ZINC, BLACK_OXIDE, ZINC)[int(rng.integers(3))])
    neck, shaft = float(rng.uniform(-0.6, -0.5)), float(rng.uniform(0.15, 0.19))
    thread = float(rng.uniform(-0.35, 0.0))
    brush.polygon([(neck, -shaft), (0.93, -shaft), (1, -shaft * 0.6), (1, shaft * 0.6), (0.93, shaft), (neck, shaft)],
                  _times(metal, 0.92), 150)  # fmt: skip
    for x in np.arange(thread, 0.93, 0.105):
        brush.line([(x, -shaft), (x + 0.045, shaft)], 0.035, _times(metal, 0.55), 105)
    head = float(rng.uniform(0.38, 0.44))
    brush.polygon([(-1, -head * 0.8), (-0.94, -head), (neck, -head), (neck, head), (-0.94, head), (-1, head * 0.8)],
                  metal, 205)  # fmt: skip
    for y in (-head * 0.45, head * 0.45):
        brush.line([(-0.98, y), (neck, y)], 0.03, _times(metal, 0.72), 180)
    brush.line([(neck, -head), (neck, head)], 0.05, _times(metal, 0.7), 190)


def _draw_nut(brush: _Brush, rng: Rng) -> None:
    metal = _tint(rng, (BRASS, BRASS, ZINC)[int(rng.integers(3))])
    hole = float(rng.uniform(0.42, 0.5))
    brush.polygon(_ring(6, 1.0), metal, 170)
    brush.disc((0, 0), 0.8, _times(metal, 1.1), 215)
    brush.disc((0, 0), hole + 0.12, _times(metal, 0.55), 140)
    brush.disc((0, 0), hole + 0.05, _times(metal, 0.75), 120)
    brush.cut((0, 0), hole)


def _draw_washer(brush: _Brush, rng: Rng) -> None:
    metal = _tint(rng, (ZINC, ZINC, COPPER)[int(rng.integers(3))])
    hole = float(rng.uniform(0.45, 0.58))
    brush.disc((0, 0), 1.0, _times(metal, 0.8), 140)
    brush.disc((0, 0), 0.93, _times(metal, 1.08), 170)
    brush.disc((0, 0), hole + 0.07, _times(metal, 0.8), 150)
    brush.cut((0, 0), hole)


def _draw_gear(brush: _Brush, rng: Rng) -> None:
    metal = _tint(rng, (DARK_STEEL, BRONZE, DARK_STEEL)[int(rng.integers(3))])
    teeth = int(rng.integers(10, 16))
    step = 2 * np.pi / teeth
    radii = (0.8, 1.0, 1.0, 0.8)
    offsets = (-0.33, -0.17, 0.17, 0.33)
    outline = [
        (radius * np.cos((tooth + offset) * step), radius * np.sin((tooth + offset) * step))
        for tooth in range(teeth)
        for radius, offset in zip(radii, offsets, strict=True)
    ]
    brush.polygon(outline, metal, 180)
    brush.disc((0, 0), 0.66, _times(metal, 0.82), 145)
    brush.disc((0, 0), 0.36, _times(metal, 1.2), 215)
    for x, y in _ring(int(rng.integers(4, 7)), 0.51, float(rng.uniform(0, 1))):
        brush.disc((x, y), 0.1, _times(metal, 0.35), 105)
    brush.cut((0, 0), 0.17)


def _draw_wire(brush: _Brush, rng: Rng) -> None:
    colours: tuple[Colour, ...] = ((206, 44, 40), (36, 92, 200), (28, 150, 82), (232, 190, 30))
    colour = _tint(rng, colours[int(rng.integers(len(colours)))])
    x = np.linspace(-0.9, 0.9, 64)
    waves, bend = float(rng.uniform(2.2, 5.0)), float(rng.uniform(0.22, 0.38))
    y = bend * np.sin(x * waves + rng.uniform(0, 6.3)) + 0.08 * np.sin(x * 1.7 * waves + rng.uniform(0, 6.3))
    path = np.stack([x * float(rng.uniform(0.8, 1.0)), y], axis=1)
    width = float(rng.uniform(0.075, 0.1))
    brush.line(path, width * 0.55, COPPER, 160)
    brush.line(path[4:-4], width, _times(colour, 0.7), 150)
    brush.line(path[4:-4], width * 0.8, colour, 190)
    brush.line(path[4:-4] - np.array([0, width * 0.12]), width * 0.25, _times(colour, 1.35), 200)


def _draw_label_tag(brush: _Brush, rng: Rng) -> None:
    papers: tuple[Colour, ...] = ((240, 236, 222), (246, 206, 70), (240, 140, 60))
    paper = _tint(rng, papers[int(rng.integers(len(papers)))], 6)
    half, ink = float(rng.uniform(0.5, 0.6)), (40.0, 40.0, 48.0)
    brush.polygon(
        [(-1, -half * 0.5), (-0.78, -half), (1, -half), (1, half), (-0.78, half), (-1, half * 0.5)], paper, 125
    )
    x = -0.42
    while x < 0.86:  # the barcode
        bar = float(rng.uniform(0.02, 0.075))
        brush.polygon([(x, -half * 0.62), (x + bar, -half * 0.62), (x + bar, half * 0.2), (x, half * 0.2)], ink)
        x += bar + float(rng.uniform(0.04, 0.085))
    for row, end in ((0.45, 0.8), (0.68, 0.3)):
        brush.line([(-0.42, half * row), (end, half * row)], 0.05, (110, 108, 112))
    brush.disc((-0.74, 0), 0.14, _times(paper, 0.72), 110)
    brush.cut((-0.74, 0), 0.085)


def _jagged(rng: Rng, start: Points, end: Points, steps: int, rough: float) -> Points:
    path = start + np.linspace(0, 1, steps)[:, None] * (end - start)
    across = np.array([-(end - start)[1], (end - start)[0]])
    path[1:-1] += rng.normal(0, rough, steps - 2)[:, None] * across
    return path


def _draw_micro_crack(brush: _Brush, rng: Rng) -> None:
    dark: Colour = (26, 22, 22)
    trunk = _jagged(rng, np.array([-1.0, rng.uniform(-0.2, 0.2)]), np.array([1.0, rng.uniform(-0.2, 0.2)]), 11, 0.055)
    for i in range(len(trunk) - 1):  # thick in the middle, thin at the tips
        brush.line(trunk[i : i + 2], 0.035 + 0.055 * np.sin(np.pi * (i + 0.5) / (len(trunk) - 1)), dark, 40)
    for root in rng.choice(np.arange(2, 9), size=int(rng.integers(2, 5)), replace=False):
        side = 1 if rng.random() < 0.5 else -1
        tip = trunk[root] + np.array([rng.uniform(-0.3, 0.3), side * rng.uniform(0.25, 0.45)])
        brush.line(_jagged(rng, trunk[root], tip, 5, 0.12), 0.04, dark, 55)


def _draw_surface_pit(brush: _Brush, rng: Rng) -> None:
    rust, deep = _tint(rng, (122, 70, 42), 16), (34.0, 24.0, 22.0)
    wobble = 1 + rng.uniform(-0.16, 0.0, 14)
    outline = _ring(14, 1.0) * wobble[:, None]
    brush.polygon(outline * 0.86, rust, 90)
    brush.polygon(outline * 0.68, _times(rust, 0.62), 55)
    brush.polygon(outline * 0.46 + 0.04, deep, 20)
    for x, y in _ring(int(rng.integers(2, 5)), 0.82, float(rng.uniform(0, 6))):
        brush.disc((x, y), float(rng.uniform(0.08, 0.17)), deep, 50)


Drawer = Callable[[_Brush, Rng], None]
DRAWERS: dict[str, Drawer] = {
    "bolt": _draw_bolt,
    "nut": _draw_nut,
    "washer": _draw_washer,
    "gear": _draw_gear,
    "wire": _draw_wire,
    "label_tag": _draw_label_tag,
    "micro_crack": _draw_micro_crack,
    "surface_pit": _draw_surface_pit,
}
GLOSS = {"label_tag": 0.5, "wire": 0.9, "micro_crack": 0.5, "surface_pit": 0.7}  # bare metal: 1.2
FLAT = ("micro_crack", "surface_pit")  # part of the floor: they cast no shadow


# ---------------------------------------------------------------------------------------------------------------
# The floor
# ---------------------------------------------------------------------------------------------------------------


def _clouds(rng: Rng, shape: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Smooth noise around 0, about -1..1, with `cells` (down, across) features."""
    coarse = rng.uniform(-1, 1, (max(2, cells[0]), max(2, cells[1]))).astype(np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


@lru_cache(maxsize=4)
def _grain(shape: tuple[int, int]) -> Array:
    """A sheet of unit noise twice as large as wanted: a window into it costs nothing beside drawing new normals."""
    return np.random.default_rng(20).standard_normal((shape[0] * 2, shape[1] * 2, 3), dtype=np.float32)


def _grain_window(rng: Rng, shape: tuple[int, int]) -> Array:
    """A (h, w, 3) window into the grain at a random place."""
    y, x = int(rng.integers(shape[0])), int(rng.integers(shape[1]))
    return _grain(shape)[y : y + shape[0], x : x + shape[1]]


def _blend(canvas: Array, colour: Colour, alpha: Array) -> None:
    """Lay a colour over the canvas, in place; alpha (h, w) 0..1."""
    canvas *= (1 - alpha)[..., None]
    canvas += alpha[..., None] * np.array(colour, np.float32)


def _concrete(rng: Rng, shape: tuple[int, int]) -> Array:
    greys: tuple[Colour, ...] = ((150, 148, 143), (126, 128, 130), (166, 160, 150))
    base = np.array(_tint(rng, greys[int(rng.integers(3))], 8), np.float32)
    tone = _clouds(rng, shape, (4, 5)) * 9 + _clouds(rng, shape, (18, 24)) * 6 + _clouds(rng, shape, (80, 110)) * 4
    return base + tone[..., None] + _grain_window(rng, shape)[..., :1] * 3.5


def _epoxy(rng: Rng, shape: tuple[int, int]) -> Array:
    paints: tuple[Colour, ...] = ((104, 132, 122), (112, 128, 144))
    base = np.array(_tint(rng, paints[int(rng.integers(2))], 8), np.float32)
    tone = _clouds(rng, shape, (3, 4)) * 7 + _clouds(rng, shape, (40, 50)) * 2
    return base + tone[..., None] + _grain_window(rng, shape)[..., :1] * 1.5


def _steel_plate(rng: Rng, shape: tuple[int, int]) -> Array:
    base = np.array(_tint(rng, (142, 150, 158), 8), np.float32)
    brushed = _clouds(rng, shape, (shape[0] // 2, 6)) * 7 + _clouds(rng, shape, (3, 3)) * 9
    floor = base + brushed[..., None] + _grain_window(rng, shape)[..., :1] * 2
    seam = int(rng.uniform(0.15, 0.85) * shape[1])
    floor[:, seam : seam + 2] *= 0.55
    floor[:, seam + 2 : seam + 3] *= 1.15
    for y in range(int(rng.integers(10, 40)), shape[0], 48):
        for x in (seam - 12, seam + 14):
            cv2.circle(floor, (x, y), 4, (112, 118, 126), -1, cv2.LINE_AA)
            cv2.circle(floor, (x - 1, y - 1), 2, (190, 196, 204), -1, cv2.LINE_AA)
    return floor


def _band(rng: Rng, shape: tuple[int, int], width: float) -> tuple[Array, Points]:
    """A straight band across the floor: its mask 0..1 and its direction."""
    height, across = shape
    centre = np.array([rng.uniform(0.1, 0.9) * across, rng.uniform(0.1, 0.9) * height])
    angle = float(rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.12))
    along = np.array([np.cos(angle), np.sin(angle)])
    reach = along * (height + across)
    mask = np.zeros(shape, np.uint8)
    ends = [tuple(int(v) for v in np.rint(centre + sign * reach)) for sign in (-1, 1)]
    cv2.line(mask, ends[0], ends[1], (255,), max(1, round(width)), cv2.LINE_AA)
    return mask.astype(np.float32) / 255, along


def _stripes(shape: tuple[int, int], along: Points, period: float) -> Array:
    """Diagonal stripes relative to a band's direction, 0 or 1, with soft edges."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    diagonal = x * float(along[0] + along[1]) + y * float(along[1] - along[0])
    return np.clip(np.sin(diagonal * (2 * np.pi / period)) * 4 + 0.5, 0, 1).astype(np.float32)


def _paint_lane(rng: Rng, floor: Array) -> None:
    """A worn painted line: yellow, white, or black and yellow hazard stripes."""
    shape = floor.shape[:2]
    mask, along = _band(rng, shape, min(shape) * rng.uniform(0.06, 0.1))
    worn = np.clip(0.85 + _clouds(rng, shape, (30, 40)) * 0.45, 0.25, 0.92)
    kind = int(rng.integers(3))
    _blend(floor, (206, 204, 198) if kind == 0 else (204, 168, 52), mask * worn)
    if kind == 2:
        _blend(floor, (52, 52, 54), mask * worn * _stripes(shape, along, min(shape) * 0.12))


def _paint_joint(rng: Rng, floor: Array) -> None:
    mask, _ = _band(rng, floor.shape[:2], 2)
    floor *= 1 - 0.4 * mask[..., None]
    floor[1:] += 10 * mask[:-1, :, None]


def _paint_oil(rng: Rng, floor: Array) -> None:
    """A dark, soft-edged puddle."""
    shape = floor.shape[:2]
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    radius = min(shape) * rng.uniform(0.12, 0.3)
    distance = np.hypot(x - rng.uniform(0, shape[1]), (y - rng.uniform(0, shape[0])) * 1.3) / radius
    puddle = np.clip((1 + _clouds(rng, shape, (9, 12)) * 0.35 - distance) * 4, 0, 1)
    _blend(floor, (58, 52, 46), puddle * float(rng.uniform(0.25, 0.5)))


def _paint_scratches(rng: Rng, floor: Array) -> None:
    marks = np.full(floor.shape[:2], 128, np.uint8)
    for _ in range(int(rng.integers(2, 6))):
        x, y = rng.uniform(0, floor.shape[1]), rng.uniform(0, floor.shape[0])
        dx, dy = rng.normal(0, 45, 2)
        cv2.line(marks, (int(x), int(y)), (int(x + dx), int(y + dy)), (int(rng.choice([112, 142])),), 1, cv2.LINE_AA)
    floor *= (marks.astype(np.float32) / 128)[..., None]


def _paint_floor(rng: Rng, shape: tuple[int, int]) -> Array:
    """The empty floor, (h, w, 3) around 0..255."""
    kinds: tuple[Callable[[Rng, tuple[int, int]], Array], ...] = (_concrete, _epoxy, _steel_plate)
    kind = kinds[int(rng.choice(3, p=[0.5, 0.25, 0.25]))]
    floor = kind(rng, shape)
    if kind is not _steel_plate and rng.random() < 0.5:
        _paint_joint(rng, floor)
    if rng.random() < 0.45:
        _paint_lane(rng, floor)
    if rng.random() < 0.4:
        _paint_oil(rng, floor)
    _paint_scratches(rng, floor)
    return floor


# ---------------------------------------------------------------------------------------------------------------
# What hides objects
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cover:
    """Something in front: colour (h, w, 3), mask (h, w) 0..1."""

    colour: Array
    mask: Array


def _barrier(offset: Array, length: Array, width: float) -> Array:
    """A round beam in hazard stripes."""
    stripes = np.clip(np.sin((length + offset * width / 2) * np.float32(4 / width)) * 4 + 0.5, 0, 1)[..., None]
    colour = np.array([238, 190, 40], np.float32) * (1 - stripes) + np.array([40, 40, 42], np.float32) * stripes
    return colour * (1.08 - 0.4 * offset[..., None] ** 2)


def _plank(offset: Array, length: Array, width: float) -> Array:
    """Wood, its grain running along."""
    grain = np.sin(offset * 9 + np.sin(length * np.float32(1.3 / width)) * 1.4) * 9 + np.sin(offset * 31) * 4
    wood = np.array([172, 130, 84], np.float32) + grain[..., None]
    return wood * np.where(np.abs(offset) > 0.93, np.float32(0.75), np.float32(1))[..., None]


def _cover_over(rng: Rng, shape: tuple[int, int], target: _Thing) -> _Cover:
    """A barrier or a plank that reaches right across the picture and over one side of the target."""
    angle = float(rng.uniform(0, 2 * np.pi))
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    width = min(shape) * float(rng.uniform(0.1, 0.17))
    side = 1 if rng.random() < 0.5 else -1
    centre = np.array([target.x, target.y]) + across * side * (width / 2 + target.radius * rng.uniform(-0.15, 0.35))
    ends = (centre - along * sum(shape), centre + along * sum(shape))
    corners = [ends[0] - across * width / 2, ends[1] - across * width / 2]
    corners += [ends[1] + across * width / 2, ends[0] + across * width / 2]
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.rint(corners).astype(np.int32)], (255,), cv2.LINE_AA)
    y, x = np.arange(shape[0])[:, None] - centre[1], np.arange(shape[1])[None, :] - centre[0]
    offset = ((x * across[0] + y * across[1]) * (2 / width)).astype(np.float32)  # -1..1 over the width
    length = (x * along[0] + y * along[1]).astype(np.float32)
    kind = _barrier if rng.random() < 0.5 else _plank
    return _Cover(kind(offset, length, width), mask.astype(np.float32) / 255)


def _covers(rng: Rng, shape: tuple[int, int], things: Sequence[_Thing], condition: str) -> list[_Cover]:
    if condition != "occlusion" or not things:
        return []
    count = min(len(things), int(rng.integers(1, 3)))
    return [_cover_over(rng, shape, things[int(i)]) for i in rng.choice(len(things), size=count, replace=False)]


# ---------------------------------------------------------------------------------------------------------------
# The scene: everything in one picture a little larger than a frame
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """A painted scene. owner (h, w): 0 for the floor, k + 1 where the k-th of class_ids is on top."""

    canvas: Array
    owner: NDArray[np.uint8]
    class_ids: tuple[int, ...]
    condition: str
    margin: int


def _clip_patch(left: int, top: int, side: int, shape: tuple[int, int]) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of the canvas under a patch, and of the patch over the canvas."""
    x1, y1, x2, y2 = max(0, left), max(0, top), min(shape[1], left + side), min(shape[0], top + side)
    return slice(y1, y2), slice(x1, x2), slice(y1 - top, y2 - top), slice(x1 - left, x2 - left)


def _cast_shadow(canvas: Array, alpha: Array, left: int, top: int, light: tuple[float, float], reach: float) -> None:
    """Darken the floor beside an object, away from the light."""
    pad = int(np.ceil(reach)) + 3
    soft = cv2.blur(cv2.copyMakeBorder(alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0), (6, 6))
    left, top = left - pad + round(light[0] * reach), top - pad + round(light[1] * reach)
    rows, columns, patch_rows, patch_columns = _clip_patch(left, top, soft.shape[0], canvas.shape[:2])
    canvas[rows, columns] *= 1 - 0.5 * soft[patch_rows, patch_columns, None]


def _visible_share(alpha: Array, hidden: Array, window: tuple[slice, slice, slice, slice]) -> float:
    """How much of an object's own pixels lies in the canvas and behind no cover."""
    rows, columns, patch_rows, patch_columns = window
    solid = alpha > 0.5
    shown = solid[patch_rows, patch_columns] & (hidden[rows, columns] < 0.5)
    return float(shown.sum() / max(1, solid.sum()))


def _paint_things(
    canvas: Array, owner: NDArray[np.uint8], things: Sequence[_Thing], hidden: Array, light: tuple[float, float]
) -> tuple[int, ...]:
    """Paint what would be visible enough; returns the class_ids painted, in the order of their owner numbers."""
    painted: list[int] = []
    for thing in things:
        name = CLASSES[thing.class_id]
        brush = _Brush(thing)
        DRAWERS[name](brush, _rng(thing.seed))
        colour, alpha = brush.finish(light, GLOSS.get(name, 1.2))
        window = _clip_patch(brush.left, brush.top, alpha.shape[0], canvas.shape[:2])
        if _visible_share(alpha, hidden, window) < MIN_VISIBLE:
            continue
        if name not in FLAT:
            _cast_shadow(canvas, alpha, brush.left, brush.top, light, 2 + thing.radius * 0.06)
        rows, columns, patch_rows, patch_columns = window
        over = alpha[patch_rows, patch_columns]
        canvas[rows, columns] += (colour[patch_rows, patch_columns] - canvas[rows, columns]) * over[..., None]
        painted.append(thing.class_id)
        owner[rows, columns][over > 0.5] = len(painted)
    return tuple(painted)


def _lay_covers(canvas: Array, owner: NDArray[np.uint8], covers: Sequence[_Cover]) -> None:
    for cover in covers:
        shadow = cv2.GaussianBlur(cover.mask, (0, 0), 4)
        canvas *= 1 - 0.35 * shadow[..., None]
        canvas += (cover.colour - canvas) * cover.mask[..., None]
        owner[cover.mask > 0.5] = 0


def _falloff(shape: tuple[int, int], x: float, y: float, radius: float) -> Array:
    """A soft spot of light, 1 at its centre."""
    rows = np.exp(-(((np.arange(shape[0]) - y) / radius) ** 2)).astype(np.float32)
    columns = np.exp(-(((np.arange(shape[1]) - x) / radius) ** 2)).astype(np.float32)
    return np.outer(rows, columns)


def _apply_condition(rng: Rng, canvas: Array, condition: str) -> Array:
    """Light and lens: what the condition does to the finished scene."""
    shape = canvas.shape[:2]
    lamp = _falloff(shape, rng.uniform(0, shape[1]), rng.uniform(0, shape[0]), max(shape) * rng.uniform(0.7, 1.1))
    if condition == "night":
        x, y = rng.uniform(0.25, 0.75, 2) * shape[::-1]
        lamp = _falloff(shape, x, y, max(shape) * rng.uniform(0.35, 0.5))
        warm, cool = np.array([0.62, 0.52, 0.36], np.float32), np.array([0.2, 0.24, 0.34], np.float32)
        return canvas * (cool + warm * lamp[..., None])
    canvas = canvas * (0.86 + 0.2 * lamp[..., None])
    if condition == "glare":
        for _ in range(int(rng.integers(1, 3))):
            x, y = rng.uniform(0.1, 0.9, 2) * shape[::-1]
            spot = _falloff(shape, x, y, min(shape) * rng.uniform(0.3, 0.45))
            canvas += (258 - canvas) * (0.84 * spot)[..., None]
        canvas = canvas * 0.9 + 22
    return _smear(rng, canvas) if condition == "blur" else canvas


def _smear(rng: Rng, canvas: Array) -> Array:
    """Motion blur along a random direction, on top of a little defocus."""
    length, angle = int(rng.integers(5, 9)), rng.uniform(0, np.pi)
    kernel = np.zeros((length, length), np.float32)
    middle, half = (length - 1) / 2, np.array([np.cos(angle), np.sin(angle)]) * length
    ends = [tuple(int(v) for v in np.rint(middle + sign * half)) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], (1.0,), 1)
    return cv2.GaussianBlur(cv2.filter2D(canvas, -1, kernel / kernel.sum()), (0, 0), 1.0)


@lru_cache(maxsize=2)  # the frames of a burst come one after the other
def _picture(seed: int, slot: _Slot, size: tuple[int, int], recipe: Recipe) -> _Picture:
    rng = _rng(seed, 2, slot.burst)
    margin = max(1, round(JITTER_SHARE * min(size)))
    shape = (size[1] + 2 * margin, size[0] + 2 * margin)
    condition = _choose_condition(rng, bool(slot.rare_ids), recipe)
    things = _place(rng, _choose_classes(rng, slot, recipe), size, margin)
    canvas = _paint_floor(rng, shape)
    covers = _covers(rng, shape, things, condition)
    hidden = np.max([cover.mask for cover in covers], axis=0) if covers else np.zeros(shape, np.float32)
    angle = float(rng.uniform(0.4, 1.2))  # light from the upper left, as eyes expect it
    owner = np.zeros(shape, np.uint8)
    flat_first = sorted(things, key=lambda thing: CLASSES[thing.class_id] not in FLAT)
    class_ids = _paint_things(canvas, owner, flat_first, hidden, (float(np.cos(angle)), float(np.sin(angle))))
    _lay_covers(canvas, owner, covers)
    return _Picture(_apply_condition(rng, canvas, condition), owner, class_ids, condition, margin)


def _boxes(owner: NDArray[np.uint8], count: int) -> list[tuple[int, int, int, int] | None]:
    """The tight box of each owner number 1..count; None where too little of it is left."""
    boxes: list[tuple[int, int, int, int] | None] = []
    for number in range(1, count + 1):
        x, y, width, height = cv2.boundingRect((owner == number).view(np.uint8))
        boxes.append((x, y, x + width, y + height) if min(width, height) >= MIN_SIDE else None)
    return boxes


def _expose(rng: Rng, window: Array, condition: str) -> Bytes:
    """One frame's own gain and sensor noise."""
    noise = _grain_window(rng, window.shape[:2]) * (5.0 if condition == "night" else 2.2)
    return np.clip(window * float(rng.uniform(0.96, 1.04)) + noise, 0, 255).astype(np.uint8)


def render(
    seed: int, index: int, size: tuple[int, int] = DEFAULT_SIZE, recipe: Recipe = DEFAULT_RECIPE
) -> tuple[Image.Image, Scene]:
    """Draw image `index` of the world `seed`.

    size is (width, height) in pixels. The same arguments give the same pixels and boxes in any process. Raises
    ValueError for a negative seed or index, and for a size below 96 pixels.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed}, index {index}: give numbers >= 0.")
    if min(size) < 96:
        raise ValueError(f"size is {size}: objects are recognisable from 96 pixels on the shorter side.")
    slot = _slot(seed, index, recipe)
    picture = _picture(seed, slot if slot.frame == 0 else _Slot(slot.burst, 0, slot.rare_ids), size, recipe)
    rng = _rng(seed, 3, index)
    dx, dy = (int(v) for v in rng.integers(0, 2 * picture.margin + 1, 2))
    window = np.s_[dy : dy + size[1], dx : dx + size[0]]
    boxes = _boxes(picture.owner[window], len(picture.class_ids))
    kept = [(box, class_id) for box, class_id in zip(boxes, picture.class_ids, strict=True) if box is not None]
    scene = Scene(
        seed=seed,
        index=index,
        size=size,
        boxes_xyxy=tuple(box for box, _ in kept),
        class_ids=tuple(class_id for _, class_id in kept),
        condition=picture.condition,
        burst=slot.burst,
    )
    return Image.fromarray(_expose(rng, picture.canvas[window], picture.condition)), scene


# ---------------------------------------------------------------------------------------------------------------
# A dataset on disk
# ---------------------------------------------------------------------------------------------------------------

Progress = Callable[[int, int], None]


def split_bursts(
    bursts: Sequence[int], seed: int, val_share: float = 0.2, train_share: float = 0.1
) -> dict[str, list[int]]:
    """Positions of `train`, `pool` and `val`: whole bursts, drawn at random until each share is reached.

    bursts: one burst number per image. Every list is ascending and none is empty: ValueError when there are fewer than
    three bursts.
    """
    unique = list(dict.fromkeys(bursts))
    if len(unique) < 3:
        raise ValueError(
            f"{len(bursts)} images hold {len(unique)} scenes; train, pool and val need one each: ask for more images."
        )
    members: dict[int, list[int]] = {burst: [] for burst in unique}
    for position, burst in enumerate(bursts):
        members[burst].append(position)
    order = [unique[int(i)] for i in _rng(seed, 4).permutation(len(unique))]
    parts: dict[str, list[int]] = {"val": [], "train": [], "pool": []}
    wanted = {"val": max(1, round(val_share * len(bursts))), "train": max(1, round(train_share * len(bursts)))}
    for taken, burst in enumerate(order):
        open_parts = [name for name, count in wanted.items() if len(parts[name]) < count]
        last = taken == len(order) - 1  # the pool is never left empty
        parts["pool" if last or not open_parts else open_parts[0]].extend(members[burst])
    return {name: sorted(positions) for name, positions in parts.items()}


def _write_lists(folder: Path, scenes: Sequence[Scene], seed: int) -> Path:
    parts = split_bursts([scene.burst for scene in scenes], seed)
    for name, positions in parts.items():
        lines = [f"./images/{scenes[i].stem}.jpg" for i in positions]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = ["stem\tburst\tcondition\tclasses"]
    rows += [f"{s.stem}\t{s.burst}\t{s.condition}\t{','.join(s.class_names)}" for s in scenes]
    (folder / "scenes.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data_yaml = folder / "data.yaml"
    content = {"train": "train.txt", "pool": "pool.txt", "val": "val.txt", "names": dict(enumerate(CLASSES))}
    data_yaml.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return data_yaml


def write_dataset(
    folder: str | Path,
    n_images: int,
    seed: int = 0,
    size: tuple[int, int] = DEFAULT_SIZE,
    recipe: Recipe = DEFAULT_RECIPE,
    progress: Progress | None = None,
) -> Path:
    """Write images 0..n_images - 1 of the world `seed` and return the path of data.yaml.

    images/<stem>.jpg, labels/<stem>.txt (YOLO; empty for a scene without objects), scenes.tsv (stem, burst, condition,
    classes separated by commas), data.yaml with names and the text lists train (10 %), pool and val (20 %); no burst is
    in two of them. progress(done, total) is called after each image. Raises ValueError when n_images holds fewer than
    three scenes.
    """
    folder = Path(folder)
    split_bursts([_slot(seed, index, recipe).burst for index in range(n_images)], seed)  # refuse before writing
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    scenes = []
    for index in range(n_images):
        image, scene = render(seed, index, size, recipe)
        image.save(folder / "images" / f"{scene.stem}.jpg", quality=JPEG_QUALITY)
        lines = "".join(line + "\n" for line in scene.yolo_lines())
        (folder / "labels" / f"{scene.stem}.txt").write_text(lines, encoding="utf-8")
        scenes.append(scene)
        if progress is not None:
            progress(index + 1, n_images)
    return _write_lists(folder, scenes, seed)


def main() -> None:
    """`python -m demo.factory FOLDER --images 4000`: a labelled dataset for `hardfirst simulate`."""
    parser = argparse.ArgumentParser(prog="demo.factory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where data.yaml, images and labels go; must be new or empty")
    parser.add_argument("--images", type=int, default=4000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the world: another seed, other images (%(default)s)")
    parser.add_argument("--rare-share", type=float, default=DEFAULT_RECIPE.rare_share, help=_SHARE_OF_RARE)
    parser.add_argument("--burst-share", type=float, default=DEFAULT_RECIPE.burst_share, help="in bursts (%(default)s)")
    given = parser.parse_args()
    if given.folder.exists() and (not given.folder.is_dir() or any(given.folder.iterdir())):
        parser.error(f"{given.folder} is not an empty folder: name a new one")
    try:
        recipe = Recipe(rare_share=given.rare_share, burst_share=given.burst_share)
        with RichProgress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as shown:
            bar = shown.add_task("drawing", total=given.images)
            made = write_dataset(
                given.folder,
                given.images,
                given.seed,
                recipe=recipe,
                progress=lambda done, _: shown.update(bar, completed=done),
            )
    except ValueError as error:
        parser.error(str(error))
    print(made)


if __name__ == "__main__":
    main()
