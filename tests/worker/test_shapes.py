"""Shapes as boxes, by hand and by points along their outlines."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from worker.shapes import SHAPES, drawn_box, hull_of, label_drawn, value_of


def rectangle(x, y, width, height, rotation=0):
    return {"x": x, "y": y, "width": width, "height": height, "rotation": rotation}


def ellipse(x, y, radius_x, radius_y, rotation=0):
    return {"x": x, "y": y, "radiusX": radius_x, "radiusY": radius_y, "rotation": rotation}


def polygon(*points):
    return {"points": [list(point) for point in points]}


@pytest.mark.parametrize(
    ("shape", "value", "size", "sides"),
    [
        ("rectangle", rectangle(10, 20, 30, 40), None, (10, 20, 30, 40)),
        ("rectangle", rectangle(50, 40, -20, -10), None, (30, 30, 20, 10)),  # drawn towards the top left
        # 1000 x 500 pixels: 300 x 100 at (200, 100), turned by 90 degrees: x 100..200, y 100..400
        ("rectangle", rectangle(20, 20, 30, 20, 90), (1000, 500), (10, 20, 10, 60)),
        ("rectangle", rectangle(20, 20, 30, 20, 450), (1000, 500), (10, 20, 10, 60)),
        ("rectangle", rectangle(20, 20, 30, 20, 360), None, (20, 20, 30, 20)),
        ("polygon", polygon((10, 10), (50, 20), (30, 90)), None, (10, 10, 40, 80)),
        ("polygon", polygon((-5, 10), (50, 120), (30, 90)), None, (-5, 10, 55, 110)),  # clipped elsewhere
        ("ellipse", ellipse(50, 40, 10, 20), None, (40, 20, 20, 40)),
        ("ellipse", ellipse(50, 40, -10, 20), None, (40, 20, 20, 40)),
        # 200 x 100 pixels: radii 20 and 30 pixels; turned by 90 degrees they swap: 15 % and 20 %
        ("ellipse", ellipse(50, 50, 10, 30, 90), (200, 100), (35, 30, 30, 40)),
        # a circle in pixels stays what it is
        ("ellipse", ellipse(50, 50, 10, 20, 33), (200, 100), (40, 30, 20, 40)),
    ],
)
def test_hulls_by_hand(shape, value, size, sides):
    found, reason = hull_of(shape, value, size)
    np.testing.assert_allclose(found, sides, atol=1e-9)
    assert reason == ""


@pytest.mark.parametrize(
    ("shape", "value", "reason"),
    [
        ("rectangle", rectangle(10, 20, 30, 40, 5), "size of the image"),
        ("rectangle", rectangle(10, 20, 30, None), "not numbers"),
        ("rectangle", rectangle(10, 20, True, 40), "not numbers"),
        ("rectangle", rectangle(10, 20, 30, 40, "left"), "not numbers"),
        ("ellipse", ellipse(10, 20, math.nan, 40), "not numbers"),
        ("ellipse", rectangle(10, 20, 30, 40), "not numbers"),
        ("ellipse", ellipse(10, 20, 30, 40, 1), "size of the image"),
        ("polygon", {}, "3 to 10,000 points"),
        ("polygon", polygon((1, 1), (2, 2)), "3 to 10,000 points"),
        ("polygon", {"points": [[1, 1]] * 10_001}, "3 to 10,000 points"),
        ("polygon", {"points": "abcd"}, "3 to 10,000 points"),
        ("polygon", {"points": [[1, 1], [2, 2], [3]]}, "not numbers"),
        ("polygon", {"points": [[1, 1], [2, 2], 7]}, "not numbers"),
        ("polygon", {"points": [[1, 1], [2, 2], [3, "4"]]}, "not numbers"),
        ("polygon", {"points": [[1, 1], [2, 2], [3, 10**400]]}, "not numbers"),
    ],
)
def test_what_is_no_shape_says_why(shape, value, reason):
    found, why = hull_of(shape, value, None)
    assert found is None
    assert reason in why


percent = st.floats(0, 100, allow_nan=False)
length = st.floats(0.01, 100, allow_nan=False)
angle = st.floats(-720, 720, allow_nan=False)
pixels = st.integers(1, 5000)


def outline(shape, value, width, height):
    """(n, 2) points of the outline in percent, walked in pixels by the definition of the shape."""
    turn = math.radians(value["rotation"])
    steps = np.linspace(0, 2 * math.pi, 721)
    if shape == "ellipse":
        offsets = np.stack([value["radiusX"] * np.cos(steps), value["radiusY"] * np.sin(steps)], axis=1)
    else:
        corners = [(0, 0), (value["width"], 0), (value["width"], value["height"]), (0, value["height"])]
        offsets = np.array(corners, dtype=np.float64)
    offsets = offsets * (width / 100, height / 100)
    turned = np.stack(
        [
            offsets[:, 0] * math.cos(turn) - offsets[:, 1] * math.sin(turn),
            offsets[:, 0] * math.sin(turn) + offsets[:, 1] * math.cos(turn),
        ],
        axis=1,
    )
    return turned / (width / 100, height / 100) + (value["x"], value["y"])


@given(st.sampled_from(["rectangle", "ellipse"]), percent, percent, length, length, angle, pixels, pixels)
def test_the_hull_holds_the_turned_shape_and_touches_it_on_four_sides(shape, x, y, first, second, turn, width, height):
    value = (rectangle if shape == "rectangle" else ellipse)(x, y, first, second, turn)
    (left, top, across, down), _ = hull_of(shape, value, (width, height))
    points = outline(shape, value, width, height)
    scale = max(across, down, 1.0)
    slack = 1e-6 * scale
    assert points[:, 0].min() >= left - slack
    assert points[:, 1].min() >= top - slack
    assert points[:, 0].max() <= left + across + slack
    assert points[:, 1].max() <= top + down + slack
    near = (0.001 if shape == "ellipse" else 1e-6) * scale  # an ellipse is walked in half degrees
    assert points[:, 0].min() <= left + near
    assert points[:, 1].min() <= top + near
    assert points[:, 0].max() >= left + across - near
    assert points[:, 1].max() >= top + down - near


@given(st.lists(st.tuples(percent, percent), min_size=3, max_size=30))
def test_a_polygons_hull_is_that_of_its_points_in_any_order(points):
    found, _ = hull_of("polygon", polygon(*points), None)
    backwards, _ = hull_of("polygon", polygon(*reversed(points)), None)
    assert found == backwards
    xs, ys = zip(*points, strict=True)
    np.testing.assert_allclose(found, (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)))


@given(st.sampled_from(SHAPES), percent, percent, length, length)
def test_a_box_in_any_shape_is_the_same_box_again(shape, x, y, width, height):
    assume(x + width <= 100)
    assume(y + height <= 100)
    label, sides = drawn_box({"value": value_of(shape, (x, y, width, height), "nut")})
    assert label == "nut"
    np.testing.assert_allclose(sides, (x, y, width, height), atol=1e-9)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
keys = st.sampled_from(["x", "y", "width", "height", "radiusX", "radiusY", "rotation", "points"])


@given(st.sampled_from(SHAPES), st.dictionaries(keys, anything, max_size=8), st.none() | st.tuples(pixels, pixels))
def test_nothing_in_a_region_breaks_it(shape, value, size):
    found, reason = hull_of(shape, value, size)
    assert (found is None) == bool(reason)
    if found is not None:
        assert all(math.isfinite(side) for side in found)
        assert min(found[2:]) >= 0
    region = {"value": {**value, f"{shape}labels": ["a"]}}
    assert label_drawn(region) == "a"
    drawn_box(region)


def test_a_region_without_a_label_or_a_box_is_not_drawn():
    assert drawn_box({}) is None
    assert drawn_box({"value": []}) is None
    assert drawn_box({"value": rectangle(1, 2, 3, 4)}) is None
    assert drawn_box({"value": {"rectanglelabels": ["a"]}}) is None
    assert drawn_box({"value": {"brushlabels": ["a"], "rle": [1]}}) is None
    assert label_drawn({"value": {"brushlabels": ["a"]}}) is None
    assert label_drawn({"value": {"rectanglelabels": []}}) is None
