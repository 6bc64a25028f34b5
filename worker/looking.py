"""From images to what is seen in them, as one stream: for shards, live predictions and `hardfirst score` alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from strategies.committee import image_disagreement
from worker.descriptor import describe
from worker.detector import Detector, Framed, ImageScore
from worker.errors import ImageUnusable
from worker.settings import ProjectSettings
from worker.uncertainty import lowest_candidate

AT_ONCE = 16  # images fetched and decoded ahead of the network
FETCHERS = 4

Opened: TypeAlias = "Image.Image | Framed | ImageUnusable"  # framed: the pixels are let go of
Look: TypeAlias = "ImageScore | NDArray[np.float32] | ImageUnusable"  # by the detector, by the descriptor, or why not
Reference = TypeVar("Reference")
Result = TypeVar("Result")


def opened_ahead(
    references: Iterable[Reference], open_one: Callable[[Reference], Result], pool: ThreadPoolExecutor
) -> Iterator[Result]:
    """The images in their order, a few fetched and decoded ahead."""
    waiting = iter(references)
    ahead: deque[Future[Result]] = deque()
    while True:
        for reference in islice(waiting, AT_ONCE - len(ahead)):
            ahead.append(pool.submit(open_one, reference))
        if not ahead:
            return
        yield ahead.popleft().result()


def look_at(
    opened: Iterator[Opened],
    detector: Detector | None,
    members: Sequence[Detector],
    settings: ProjectSettings,
    confidence: float,
) -> Iterator[tuple[Look, float | None]]:
    """What is seen in each image, in their order, and what the committee makes of it; None without one.

    Args: detector: None for the descriptor; members: the committee's others; confidence: boxes are drawn from here on.
    """
    if detector is None:
        yield from ((_described(one), None) for one in opened)
    elif not members:  # in one stream, so that the network never waits
        yield from ((look, None) for look in _look_by(detector, opened, settings, confidence))
    else:
        while some := list(islice(opened, AT_ONCE)):
            looks = [list(_look_by(one, some, settings, confidence)) for one in (detector, *members)]
            yield from ((of_image[0], _vote(of_image)) for of_image in zip(*looks, strict=True))


def _described(one: Opened) -> Look:
    if isinstance(one, ImageUnusable):
        return one
    try:
        return describe(cast(Image.Image, one))  # nothing is framed where there is no detector
    except ImageUnusable as error:
        return error


def _look_by(
    detector: Detector, opened: Iterable[Opened], settings: ProjectSettings, confidence: float
) -> Iterator[ImageScore | ImageUnusable]:
    low = min(lowest_candidate(settings), confidence)  # what is drawn is a candidate
    return detector.score_each(opened, imgsz=settings.imgsz, confidence=confidence, low=low)


def _vote(of_image: Sequence[ImageScore | ImageUnusable]) -> float | None:
    seen = [(one.boxes_xyxy, one.probabilities) for one in of_image if isinstance(one, ImageScore)]
    return image_disagreement(seen) if seen else None
