import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_studio_sdk.label_interface.interface import LabelInterface

from worker.boxes import (
    Control,
    LabelMap,
    clip_xyxy,
    percent_to_xyxy,
    percent_to_yolo,
    to_regions,
    xyxy_to_percent,
    xyxy_to_yolo,
    yolo_to_percent,
    yolo_to_xyxy,
)
from worker.errors import LabelConfigUnsupported, LabelMismatch
from worker.shapes import SHAPES, drawn_box

CONFIG = (
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="label" toName="image" model_score_threshold="0.25">'
    '<Label value="cat" predicted_values="cat, Kitten"/><Label value="dog"/></RectangleLabels></View>'
)


def config_with(controls: str, image: str = '<Image name="image" value="$image"/>') -> str:
    return f"<View>{image}{controls}</View>"


def test_xyxy_to_percent_and_back_by_hand():
    # on 200 x 100: left 20 = 10 %, top 10 = 10 %, 100 wide = 50 %, 25 high = 25 %
    np.testing.assert_allclose(xyxy_to_percent([[20, 10, 120, 35]], 200, 100), [[10, 10, 50, 25]])
    np.testing.assert_allclose(percent_to_xyxy([[10, 10, 50, 25]], 200, 100), [[20, 10, 120, 35]])


def test_xyxy_to_yolo_and_back_by_hand():
    np.testing.assert_allclose(xyxy_to_yolo([[20, 10, 120, 35]], 200, 100), [[0.35, 0.225, 0.5, 0.25]])
    np.testing.assert_allclose(yolo_to_xyxy([[0.35, 0.225, 0.5, 0.25]], 200, 100), [[20, 10, 120, 35]])
    np.testing.assert_allclose(yolo_to_percent([[0.35, 0.225, 0.5, 0.25]]), [[10, 10, 50, 25]])


def test_no_boxes_stay_none_in_every_space():
    for converted in (xyxy_to_percent([], 10, 10), percent_to_xyxy([], 10, 10), xyxy_to_yolo([], 10, 10)):
        assert converted.shape == (0, 4)
    assert percent_to_yolo(np.zeros((0, 4))).tolist() == []


def test_rotation_turns_clockwise_around_the_top_left_corner():
    # the example of HumanSignal/label-studio#2293: 1000 x 500 pixels, x=200 y=100 w=300 h=100, turned by 90 degrees,
    # covers the upright box x=100..200, y=100..400
    box = percent_to_xyxy([[20, 20, 30, 20]], 1000, 500, [90])
    np.testing.assert_allclose(box, [[100, 100, 200, 400]], atol=1e-9)
    np.testing.assert_allclose(percent_to_yolo([[20, 20, 30, 20]], 1000, 500, [90]), [[0.15, 0.5, 0.1, 0.6]])


def test_a_square_turned_by_45_degrees_gets_its_hull():
    # side 10 at (50, 50): the diagonal is 14.142; left and right corners half of it away, the lowest a whole one
    half = 10 * math.sqrt(0.5)
    box = percent_to_xyxy([[50, 50, 10, 10]], 100, 100, [45])
    np.testing.assert_allclose(box, [[50 - half, 50, 50 + half, 50 + 2 * half]])


def test_the_hull_is_clipped_to_the_image():
    np.testing.assert_allclose(percent_to_xyxy([[5, 5, 20, 20]], 100, 100, [90]), [[0, 5, 5, 25]], atol=1e-9)
    np.testing.assert_allclose(percent_to_xyxy([[-10, 90, 30, 30]], 100, 100), [[0, 90, 20, 100]])


def test_a_rectangle_drawn_towards_the_top_left_is_turned_round():
    np.testing.assert_allclose(percent_to_xyxy([[50, 40, -20, -10]], 100, 100), [[30, 30, 50, 40]])


@pytest.mark.parametrize(
    ("boxes", "width", "height", "problem"),
    [
        ([[0, 0, math.nan, 1]], 10, 10, "not finite"),
        ([[0, 0, 1]], 10, 10, r"not \(n, 4\)"),
        ([[0, 0, 1, 1]], 0, 10, "0 x 10"),
        ([[0, 0, 1, 1]], 10, math.nan, "nan"),
    ],
)
def test_what_is_no_box_is_refused(boxes, width, height, problem):
    with pytest.raises(ValueError, match=problem):
        clip_xyxy(boxes, width, height)


side = st.floats(-50, 150, allow_nan=False)


@given(st.lists(st.tuples(side, side, side, side), max_size=5), st.integers(1, 5000), st.integers(1, 5000))
def test_spaces_agree_on_every_box(corners, width, height):
    boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]
    clipped = clip_xyxy(boxes, width, height)
    there = percent_to_xyxy(xyxy_to_percent(boxes, width, height), width, height)
    np.testing.assert_allclose(there, clipped, atol=1e-6)
    np.testing.assert_allclose(yolo_to_xyxy(xyxy_to_yolo(boxes, width, height), width, height), clipped, atol=1e-6)


def test_label_map_reads_a_config():
    label_map = LabelMap.from_config(CONFIG)
    assert label_map == LabelMap(
        from_name="label",
        to_name="image",
        image_key="image",
        labels=("cat", "dog"),
        aliases={"cat": ("kitten",), "dog": ()},
        score_threshold=0.25,
    )
    assert label_map.class_ids == {"cat": 0, "dog": 1}


def test_all_rectangles_over_the_first_image_count_and_no_others():
    config = config_with(
        '<Text name="text" value="$text"/><RectangleLabels name="wrong" toName="text"><Label value="w"/>'
        '</RectangleLabels><RectangleLabels name="first" toName="text,photo"><Label value="b"/><Label value="a"/>'
        '</RectangleLabels><RectangleLabels name="second" toName="photo" model_score_threshold="0.7">'
        '<Label value="z"/><Label value="a"/></RectangleLabels>'
        '<RectangleLabels name="back" toName="rear"><Label value="r"/></RectangleLabels>'
        '<PolygonLabels name="outline" toName="photo"><Label value="p"/></PolygonLabels>',
        image='<Image name="photo" value="$url"/><Image name="rear" value="$rear"/>',
    )
    label_map = LabelMap.from_config(config)
    assert (label_map.from_name, label_map.to_name, label_map.image_key) == ("first", "photo", "url")
    assert label_map.labels == ("b", "a", "z")  # the order of the config, not of the alphabet
    assert label_map.controls == (
        Control("first", "rectangle", ("b", "a")),
        Control("second", "rectangle", ("z", "a"), 0.7),
    )
    assert [label_map.control_for(label).name for label in ("a", "z")] == ["first", "second"]
    assert label_map.control("outline") is None
    assert (label_map.threshold_of("a", 0.25), label_map.threshold_of("z", 0.25)) == (0.25, 0.7)
    assert label_map.lowest_threshold(0.25) == 0.25
    assert label_map.lowest_threshold(0.9) == 0.7
    regions = to_regions(label_map, [[1, 1, 5, 5], [2, 2, 6, 6]], [0.9, 0.8], [0, 1], {0: "a", 1: "z"}, 10, 10)
    assert [(region["from_name"], region["to_name"]) for region in regions] == [("first", "photo"), ("second", "photo")]
    hulls = LabelMap.from_config(config, "hull")
    assert hulls.labels == ("b", "a", "z", "p")
    assert hulls.control("outline") == Control("outline", "polygon", ("p",))


def test_an_xml_declaration_and_the_alias_of_a_label_are_understood():
    config = '<?xml version="1.0" encoding="utf-8"?>' + config_with(
        '<RectangleLabels name="label" toName="image"><Label value="Steel nut" alias="n1"/></RectangleLabels>'
    )
    label_map = LabelMap.from_config(config)
    assert label_map.labels == ("n1",)  # what Label Studio stores in regions
    assert label_map.classes_for({4: "steel nut"}) == {4: "n1"}
    assert label_map.class_id_of("n1") == 0
    assert label_map.class_id_of("Steel nut") == 0  # drawn before there was an alias
    assert label_map.class_id_of("nut") is None


def test_a_threshold_of_nought_is_a_threshold():
    label_map = LabelMap.from_config(CONFIG.replace("0.25", "0"))
    assert label_map.threshold_of("cat", 0.25) == 0.0
    assert label_map.lowest_threshold(0.25) == 0.0


LABELS = '<Labels name="l" toName="{}"><Label value="x"/></Labels>'
POLYGONS = '<PolygonLabels name="label" toName="image"><Label value="cat"/><Label value="dog"/></PolygonLabels>'


def test_polygons_and_ellipses_count_when_hulls_are_asked_for():
    ellipses = POLYGONS.replace("PolygonLabels", "EllipseLabels")
    for drawn, shape in ((POLYGONS, "polygon"), (ellipses, "ellipse")):
        label_map = LabelMap.from_config(config_with(drawn), "hull")
        assert label_map.labels == ("cat", "dog")
        assert [(control.shape, control.type) for control in label_map.controls] == [(shape, f"{shape}labels")]
        says = f"<{shape.title()}Labels> over the image.*\"shapes\": \"hull\""
        with pytest.raises(LabelConfigUnsupported, match=says):
            LabelMap.from_config(config_with(drawn))


@pytest.mark.parametrize("shapes", ["boxes_only", "hull"])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            config_with('<BrushLabels name="b" toName="image"><Label value="x"/></BrushLabels>'),
            "<BrushLabels> has no box",
        ),
        (
            config_with('<KeyPointLabels name="k" toName="image"><Label value="x"/></KeyPointLabels>'),
            "<KeyPointLabels> has no box",
        ),
        (
            config_with(f'{LABELS.format("image")}<Rectangle name="r" toName="image"/>'),
            r"it has \['Labels', 'Rectangle'\]\)\. Add <RectangleLabels",
        ),
        (
            config_with(
                f'<VideoRectangle name="box" toName="video"/>{LABELS.format("video")}',
                '<Video name="video" value="$video"/>',
            ),
            "<Video>, which is not supported: a task must be one image",
        ),
    ],
)
def test_what_has_no_box_is_refused_and_says_what_is_needed(config, says, shapes):
    with pytest.raises(LabelConfigUnsupported, match=says):
        LabelMap.from_config(config, shapes)


BOMB = (
    '<!DOCTYPE v [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    '<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'
)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("", "empty"),
        (None, "empty"),
        (3, "empty"),
        ("   ", "empty"),
        ("not xml", "cannot be read"),
        ("<View>", "cannot be read"),
        ("<View>\x00</View>", "cannot be read"),
        ("<View>\ud800</View>", "cannot be read"),
        ("<View>" * 5000 + "</View>" * 5000, "cannot be read"),
        ("<View>" + "x" * 1_000_001 + "</View>", "characters"),
        (BOMB + CONFIG, "DOCTYPE"),
        ('<!doctype v [<!entity a SYSTEM "file:///etc/passwd">]>' + CONFIG, "DOCTYPE"),
        ("<View/>", "Add <RectangleLabels"),
        (config_with('<Choices name="c" toName="image"><Choice value="x"/></Choices>'), r"\['Choices'\]"),
        (config_with('<RectangleLabels name="r" toName="image"/>'), "no <Label>"),
        (config_with('<RectangleLabels name="r" toName="image" value="$labels"/>'), "no <Label>"),
        (config_with('<RectangleLabels name="r" toName="other"><Label value="x"/></RectangleLabels>'), "no <Image>"),
        (
            config_with(
                '<RectangleLabels name="r" toName="image"><Label value="x"/></RectangleLabels>',
                '<Image name="image" valueList="$images"/>',
            ),
            "several images",
        ),
        (
            config_with(
                '<RectangleLabels name="r" toName="image"><Label value="x"/></RectangleLabels>',
                '<Image name="image" value="http://host/$image"/>',
            ),
            "not a key",
        ),
        (CONFIG.replace("0.25", "often"), "0 to 1"),
        (CONFIG.replace("0.25", "nan"), "0 to 1"),
    ],
)
def test_configs_that_cannot_be_used_say_why(config, says):
    with pytest.raises(LabelConfigUnsupported, match=says):
        LabelMap.from_config(config)


def test_classes_map_by_exact_then_lower_case_then_predicted_values():
    label_map = LabelMap.from_config(
        config_with(
            '<RectangleLabels name="label" toName="image"><Label value="Dog"/><Label value="dog"/>'
            '<Label value="animal" predicted_values="cat,DOG, horse"/></RectangleLabels>'
        )
    )
    names = {0: "dog", 1: "Dog", 2: "DOG", 3: " Horse ", 4: "cat", 5: "car"}
    # 2: lower-cased, "Dog" comes first; predicted_values come last; nobody asks for a car
    assert label_map.classes_for(names) == {0: "dog", 1: "Dog", 2: "Dog", 3: "animal", 4: "animal"}


def test_a_mismatch_names_both_sides_and_the_way_out():
    label_map = LabelMap("label", "image", "image", ("bolt",))
    with pytest.raises(LabelMismatch) as caught:
        label_map.classes_for({0: "nut", 1: "wire"})
    assert str(caught.value) == (
        "label_config uses ['bolt'], unknown to the model (['nut', 'wire']). "
        'Rename the <Label>, or add predicted_values="nut" to it.'
    )
    assert not label_map.maps_any({0: "nut"})
    assert label_map.maps_any({0: "BOLT"})


def test_a_mismatch_with_eighty_classes_stays_readable():
    label_map = LabelMap("label", "image", "image", ("bolt",))
    with pytest.raises(LabelMismatch, match=r"'c11', \.\.\. 68 more\]"):
        label_map.classes_for({number: f"c{number}" for number in range(80)})
    with pytest.raises(LabelMismatch, match="no classes at all"):
        label_map.classes_for({})


LABEL_MAP = LabelMap("label", "image", "image", ("cat", "dog"))


def test_a_region_by_hand():
    (region,) = to_regions(LABEL_MAP, [[64, 48, 192, 240]], [0.875], [7], {7: "dog"}, 640, 480)
    identity = region.pop("id")
    assert region == {
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 640,
        "original_height": 480,
        "image_rotation": 0,
        "score": 0.875,
        "value": {"x": 10.0, "y": 10.0, "width": 20.0, "height": 40.0, "rotation": 0, "rectanglelabels": ["dog"]},
    }
    (again,) = to_regions(LABEL_MAP, [[64, 48, 192, 240]], [0.1], [7], {7: "dog"}, 640, 480)
    assert again["id"] == identity


def test_equal_boxes_get_different_ids_and_the_same_ones_next_time():
    def ids():
        regions = to_regions(LABEL_MAP, [[1, 1, 5, 5]] * 3, [0.9, 0.8, 0.7], [0, 0, 1], {0: "cat", 1: "dog"}, 10, 10)
        return [region["id"] for region in regions]

    assert len(set(ids())) == 3
    assert ids() == ids()


def test_classes_nobody_asked_for_and_boxes_outside_make_no_region():
    boxes = [[1, 1, 5, 5], [2, 2, 3, 3], [20, 20, 30, 30], [4, 4, 4, 9]]
    regions = to_regions(LABEL_MAP, boxes, [0.9, 0.8, 0.7, 0.6], [0, 3, 0, 0], {0: "cat"}, 10, 10)
    assert [region["score"] for region in regions] == [0.9]
    assert to_regions(LABEL_MAP, [], [], [], {0: "cat"}, 10, 10) == []


def test_a_region_takes_the_shape_of_its_control():
    for shape, value in (
        ("polygon", {"points": [[10.0, 10.0], [30.0, 10.0], [30.0, 50.0], [10.0, 50.0]], "closed": True}),
        ("ellipse", {"x": 20.0, "y": 30.0, "radiusX": 10.0, "radiusY": 20.0, "rotation": 0}),
    ):
        tool = Control("tool", shape, ("cat", "dog"))
        label_map = LabelMap("tool", "image", "image", ("cat", "dog"), controls=(tool,))
        (region,) = to_regions(label_map, [[64, 48, 192, 240]], [0.875], [7], {7: "dog"}, 640, 480)
        assert (region["from_name"], region["type"]) == ("tool", f"{shape}labels")
        assert region["value"] == {**value, f"{shape}labels": ["dog"]}


def test_broken_detections_are_refused():
    with pytest.raises(ValueError, match="2 confidences"):
        to_regions(LABEL_MAP, [[1, 1, 5, 5]], [0.5, 0.5], [0], {0: "cat"}, 10, 10)
    with pytest.raises(ValueError, match="not finite"):
        to_regions(LABEL_MAP, [[1, 1, 5, 5]], [math.nan], [0], {0: "cat"}, 10, 10)
    with pytest.raises(ValueError, match="not finite"):
        to_regions(LABEL_MAP, [[1, 1, math.inf, 5]], [0.5], [0], {0: "cat"}, 10, 10)


coordinate = st.floats(-1e4, 1e4, allow_nan=False)


@given(
    st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate, st.floats(-0.1, 1.1)), max_size=8),
    st.integers(1, 9999),
    st.integers(1, 9999),
    st.sampled_from(SHAPES),
)
def test_label_studio_keeps_every_region(rows, width, height, shape):
    boxes = [row[:4] for row in rows]
    config = CONFIG.replace("RectangleLabels", f"{shape.title()}Labels")
    label_map = LabelMap.from_config(config, "hull")
    regions = to_regions(label_map, boxes, [row[4] for row in rows], [0] * len(rows), {0: "cat"}, width, height)
    expected = to_regions(LABEL_MAP, boxes, [row[4] for row in rows], [0] * len(rows), {0: "cat"}, width, height)
    for region, rectangle in zip(regions, expected, strict=True):  # whatever its shape, the box is the rectangle's
        label, sides = drawn_box(region)
        assert label == "cat"
        wanted = [rectangle["value"][side] for side in ("x", "y", "width", "height")]
        np.testing.assert_allclose(sides, wanted, atol=1e-9)
    for region in expected:
        value = region["value"]
        assert value["x"] >= 0
        assert value["y"] >= 0
        assert value["width"] > 0
        assert value["height"] > 0
        assert value["x"] + value["width"] <= 100
        assert value["y"] + value["height"] <= 100
        assert 0 <= region["score"] <= 1
    prediction = {"model_version": "al-000001", "score": 0.5, "result": json.loads(json.dumps(regions))}
    assert LabelInterface(config).validate_prediction(prediction, return_errors=True) == []
    assert len({region["id"] for region in regions}) == len(regions)


def test_a_region_that_was_made_under_another_config_is_shown_only_where_it_fits():
    under = LabelMap.from_config(CONFIG)
    name, label = under.controls[0].name, under.controls[0].labels[0]
    value = {"x": 1, "y": 1, "width": 9, "height": 9, "rotation": 0, "rectanglelabels": [label]}
    region = {"from_name": name, "to_name": under.to_name, "type": "rectanglelabels", "value": value}
    assert under.shows(region)
    assert not under.shows({**region, "value": {**value, "rectanglelabels": ["gone"]}})
    assert not under.shows({**region, "from_name": "renamed"})
    assert not under.shows({**region, "to_name": "renamed"})
    assert not under.shows({**region, "type": "polygonlabels"})
