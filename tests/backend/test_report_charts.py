from __future__ import annotations

import pytest

from backend import report_charts
from backend.curve_view import CurvePointView, CurveView
from backend.report_charts import Point


def test_the_chart_has_the_points_where_the_axes_say() -> None:
    points = [
        CurvePointView(round_number=1, labels=0, map50=0.0, low=None, high=None),
        CurvePointView(round_number=2, labels=100, map50=0.5, low=0.4, high=0.6),
    ]
    curve = CurveView(points=points, level=0.9, line=[], band=[], next=None, knee=None, fit_words="", agrees=None)
    chart = report_charts.curve_chart(curve)
    assert chart is not None
    assert [tick.words for tick in chart.up] == ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6"]
    assert (chart.spots[0].x, chart.spots[0].y) == (chart.left, chart.floor)
    at = {tick.words: tick.at for tick in chart.up}
    assert (chart.spots[1].y, chart.spots[1].low, chart.spots[1].high) == (at["0.5"], at["0.4"], at["0.6"])
    assert chart.spots[1].words == "round 2: 100 labels, mAP50 0.500 (0.400 to 0.600)"
    assert report_charts.curve_chart(curve.model_copy(update={"points": []})) is None


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.1, [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
        (2600, [0, 500, 1000, 1500, 2000, 2500, 3000]),
        (7, [0, 2, 4, 6, 8]),
    ],
)
def test_ticks_are_round_and_reach_the_end(most: float, ticks: list[float]) -> None:
    assert report_charts.nice_ticks(most) == pytest.approx(ticks)


def test_a_small_chart_counts_hundreds_of_boxes() -> None:
    chart = report_charts.small_chart([Point(0, 0.25, None, None, "first"), Point(1500, 1.0, None, None, "last")])
    assert chart is not None
    assert [tick.words for tick in chart.across] == ["0", "500", "1\u2009000", "1\u2009500"]
    assert chart.spots[1].y == chart.top
    assert chart.spots[0].y == pytest.approx(chart.floor - (chart.floor - chart.top) / 4, abs=0.06)
    assert chart.curve == f"{chart.left},{chart.spots[0].y:g} {chart.spots[1].x:g},{chart.top}"
    assert report_charts.small_chart([]) is None
