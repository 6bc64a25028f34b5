"""A contact sheet: one HTML file that needs nothing beside it, with a picture, boxes and reasons for each image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from numpy.typing import NDArray
from PIL import Image

from strategies.options import weights_in_sum
from worker.reasons import certainty

MAX_CARDS = 300  # about 6 MB: what a browser opens at once
LONG_SIDE = 420  # pixels of a thumbnail
MAX_BOXES = 100  # drawn on one thumbnail: more cannot be told apart
BINS = 40
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Picture:
    """A thumbnail: a data URI, and its size in pixels."""

    data_uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """One image. boxes: (n, 6) boxes_xyxy in pixels of `size` (width, height), confidence, class id."""

    rank: int
    name: str
    picture: Picture | None
    size: tuple[int, int]
    utility: float
    parts: Mapping[str, float]
    boxes: NDArray[np.float32]
    reason: str
    alike: Sequence[str] = ()


@dataclass(frozen=True)
class Sheet:
    """What is on the page. utilities: of all ranked images, falling."""

    cards: Sequence[Card]
    n_chosen: int
    n_ranked: int
    sources: str
    strategy: str
    options: Mapping[str, Any]
    weights: str
    imgsz: int
    labels: Mapping[int, str]
    utilities: Sequence[float]
    chosen_utilities: Sequence[float]
    notes: Sequence[str] = ()
    problems: Sequence[tuple[str, str]] = ()
    title: str = "What to label first"


@dataclass(frozen=True)
class DrawnBox:
    """Percent of the image, and how it is shown. `least`: the least sure of its image."""

    left: float
    top: float
    width: float
    height: float
    label: str
    confidence: float
    hue: float
    least: bool


@dataclass(frozen=True)
class ShownPart:
    """A part of the utility: its value, and its share of the utility where that is a weighted sum."""

    name: str
    value: float
    share: float | None


@dataclass(frozen=True)
class Legend:
    label: str
    hue: float
    boxes: int
    images: int


def thumbnail(image: Image.Image) -> Picture:
    """At most LONG_SIDE pixels a side; without the image's metadata (it may name places and people)."""
    small = image.convert("RGB")
    small.thumbnail((LONG_SIDE, LONG_SIDE))
    small.info = {}
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=78, optimize=True)
    content = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/jpeg;base64,{content}", small.width, small.height)


def render_sheet(sheet: Sheet) -> str:
    """The page, whole. Names, labels and sentences are escaped."""
    weights = _weights(sheet.strategy, sheet.options)
    measure = str(sheet.options.get("measure", sheet.strategy))
    cards = [(card, drawn_boxes(card, sheet.labels, measure), shown_parts(card, weights)) for card in sheet.cards]
    template = _environment().get_template("contact_sheet.html")
    return template.render(
        sheet=sheet,
        cards=cards,
        legend=legend_of(sheet),
        bars=bars_of(sheet),
        problems=list(sheet.problems)[:PROBLEMS_SHOWN],
    )


def drawn_boxes(card: Card, labels: Mapping[int, str], measure: str = "least_confidence") -> list[DrawnBox]:
    width, height = (max(side, 1) for side in card.size)
    rows = [row for row in card.boxes.tolist() if int(row[5]) in labels]
    rows = sorted(rows, key=lambda row: certainty(row[4], measure))[:MAX_BOXES]  # the doubtful are what it is about
    least = rows[0][4] if rows else 0.0
    return [
        DrawnBox(
            *(100 * left / width, 100 * top / height, 100 * (right - left) / width, 100 * (bottom - top) / height),
            label=labels[int(class_id)],
            confidence=confidence,
            hue=hue_of(int(class_id)),
            least=confidence == least,
        )
        for left, top, right, bottom, confidence, class_id in reversed(rows)
    ]


def hue_of(class_id: int) -> float:
    """Neighbouring ids far apart, by the golden angle."""
    return round((205 + class_id * 137.508) % 360, 1)


def shown_parts(card: Card, weights: Mapping[str, float]) -> list[ShownPart]:
    return [
        ShownPart(name, card.parts[name], weights[name] * card.parts[name] if name in weights else None)
        for name in ("uncertainty", "diversity")
        if name in card.parts
    ]


def _weights(strategy: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Of the parts in the utility; empty: it is no weighted sum."""
    weights = weights_in_sum(strategy, options)
    return {} if weights is None else dict(zip(("uncertainty", "diversity"), weights, strict=True))


def legend_of(sheet: Sheet) -> list[Legend]:
    """Classes with boxes in the cards, most boxes first."""
    boxes: dict[int, int] = {}
    images: dict[int, int] = {}
    for card in sheet.cards:
        classes = [int(class_id) for class_id in card.boxes[:, 5] if int(class_id) in sheet.labels]
        for class_id in classes:
            boxes[class_id] = boxes.get(class_id, 0) + 1
        for class_id in set(classes):
            images[class_id] = images.get(class_id, 0) + 1
    order = sorted(boxes, key=lambda class_id: (-boxes[class_id], class_id))
    return [Legend(sheet.labels[one], hue_of(one), boxes[one], images[one]) for one in order]


def bars_of(sheet: Sheet) -> list[tuple[float, float, float]]:
    """Left edge (0..1), height of all and of the chosen (0..1 of the highest, by square root) of each bar."""
    every, _ = np.histogram(sheet.utilities, BINS, (0, 1))
    chosen, _ = np.histogram(sheet.chosen_utilities, BINS, (0, 1))
    highest = max(int(every.max(initial=0)), 1)
    return [
        (at / BINS, float(np.sqrt(count / highest)), float(np.sqrt(some / highest)))
        for at, (count, some) in enumerate(zip(every, chosen, strict=True))
    ]


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("worker"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
