"""Curves as pictures of SVG: where points, intervals, ticks and the fit go, in pixels. The template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backend.admin import number_words
from backend.curve_view import CurveView

LEFT, RIGHT, TOP, BOTTOM = 52, 20, 14, 40  # margins
LARGE, SMALL = (760, 300), (440, 230)


@dataclass(frozen=True)
class Tick:
    at: float
    words: str


@dataclass(frozen=True)
class Point:
    """What is to be drawn: `y` 0..1 over `x` >= 0; `low` and `high` end its interval, where there is one."""

    x: float
    y: float
    low: float | None
    high: float | None
    words: str


@dataclass(frozen=True)
class Spot:
    """A point in pixels of the chart."""

    x: float
    y: float
    low: float | None
    high: float | None
    words: str


@dataclass(frozen=True)
class Chart:
    """A picture of `width` x `height`: spots and the line through them, fitted line, band; ticks of both axes."""

    spots: list[Spot]
    expected: Spot | None
    curve: str
    fit: str
    band: str
    knee: Tick | None
    across: list[Tick]
    up: list[Tick]
    width: int
    height: int
    left: int
    right: int
    floor: int
    top: int = TOP


@dataclass(frozen=True)
class Scale:
    """From values to pixels; both axes begin at 0 and end at a tick or a little beyond the last point."""

    width: int
    height: int
    x_ticks: list[float]
    y_ticks: list[float]
    most_x: float

    @classmethod
    def of(cls, points: Sequence[Point], size: tuple[int, int]) -> Scale:
        furthest = max(*(point.x for point in points), 1.0)
        highest = max(*(max(point.y, point.high or 0.0) for point in points), 0.1)
        x_ticks, y_ticks = nice_ticks(furthest), nice_ticks(min(highest, 1.0))
        return cls(*size, x_ticks, y_ticks, max(furthest * 1.04, x_ticks[-1]))

    def x(self, value: float) -> float:
        return round(LEFT + (self.width - LEFT - RIGHT) * value / self.most_x, 1)

    def y(self, value: float) -> float:
        share = min(max(value / self.y_ticks[-1], 0.0), 1.0)
        return round(self.height - BOTTOM - (self.height - TOP - BOTTOM) * share, 1)

    def spot(self, point: Point) -> Spot:
        low, high = point.low, point.high
        return Spot(
            self.x(point.x),
            self.y(point.y),
            None if low is None else self.y(low),
            None if high is None else self.y(high),
            point.words + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})"),
        )


def curve_chart(curve: CurveView) -> Chart | None:
    """mAP50 against labels, with the fit and what is expected of the next round. None: nothing was measured yet."""
    points = [
        Point(p.labels, p.map50, p.low, p.high, f"round {p.round_number}: {p.labels} labels, mAP50 {p.map50:.3f}")
        for p in curve.points
    ]
    if not points:
        return None
    next_ = curve.next
    words = f"expected of the next: {next_.labels} labels, mAP50 {next_.map50:.3f}" if next_ else ""
    expected = [Point(next_.labels, next_.map50, next_.low, next_.high, words)] if next_ else []
    scale = Scale.of(points + expected, LARGE)
    band = [(at, high) for at, _, high in curve.band] + [(at, low) for at, low, _ in reversed(curve.band)]
    return _chart(
        scale,
        points,
        expected=scale.spot(expected[0]) if expected else None,
        fit=_polyline(scale, curve.line),
        band=_polyline(scale, band),
        knee=Tick(scale.x(curve.knee), f"knee: {curve.knee} labels") if curve.knee is not None else None,
    )


def small_chart(points: Sequence[Point]) -> Chart | None:
    """Points and the line through them. None: there are none."""
    return _chart(Scale.of(points, SMALL), points) if points else None


def _chart(
    scale: Scale,
    points: Sequence[Point],
    expected: Spot | None = None,
    fit: str = "",
    band: str = "",
    knee: Tick | None = None,
) -> Chart:
    return Chart(
        spots=[scale.spot(point) for point in points],
        expected=expected,
        curve=_polyline(scale, [(point.x, point.y) for point in points]),
        fit=fit,
        band=band,
        knee=knee,
        across=[
            Tick(scale.x(tick), number_words(int(tick)) if tick >= 1000 else f"{tick:g}") for tick in scale.x_ticks
        ],
        up=[Tick(scale.y(tick), f"{tick:.2g}") for tick in scale.y_ticks],
        width=scale.width,
        height=scale.height,
        left=LEFT,
        right=scale.width - RIGHT,
        floor=scale.height - BOTTOM,
    )


def _polyline(scale: Scale, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{scale.x(x):g},{scale.y(y):g}" for x, y in points)


def nice_ticks(most: float) -> list[float]:
    """0 and three to seven round steps, the last at or above `most` (> 0)."""
    power = 10.0 ** (len(f"{most:.0f}") - 1) if most >= 1 else 0.1
    step = next(factor * power for factor in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if most / (factor * power) <= 6.5)
    count = int(most / step) + (1 if most / step > int(most / step) + 1e-9 else 0)
    return [round(step * index, 10) for index in range(max(count, 1) + 1)]
