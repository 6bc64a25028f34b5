"""Coordinate spaces and the label map: pure functions, and the one home of every conversion between boxes.

boxes_xyxy      (n, 4) left, top, right, bottom in pixels of the displayed image (EXIF orientation applied)
boxes_percent   (n, 4) x, y, width, height: top-left corner and size, 0..100 of the image (Label Studio's), each with
                a rotation in degrees, clockwise around that corner, in pixel space
boxes_yolo      (n, 4) centre x, centre y, width, height, 0..1 of the image

A region's `image_rotation` is only how an annotator turned the view: its coordinates stay those of the unturned image.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worker.errors import LabelConfigUnsupported, LabelMismatch
from worker.shapes import SHAPES, Shape, label_drawn, labels_key, value_of

Boxes = NDArray[np.float64]
Shapes = Literal["boxes_only", "hull"]
T = TypeVar("T")

MAX_CONFIG_CHARACTERS = 1_000_000  # the largest real config seen (a 1,000-class one) is 60 kB
LOWEST_THRESHOLD = 0.001  # a model_score_threshold of 0 means all there is; below this there is noise only
_DECIMALS = 6  # of a percent: 0.0001 px on an image 10,000 px wide
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")  # lxml refuses one in a str
_DOCTYPE = re.compile(r"<!(DOCTYPE|ENTITY)", re.IGNORECASE)
_SHOWN_NAMES = 12  # a COCO model has 80 names: an error that lists them all is not read


def clip_xyxy(boxes_xyxy: ArrayLike, width: float, height: float) -> Boxes:
    """`boxes_xyxy` (n, 4) cut to the image: x in 0..width, y in 0..height. A box outside gets no area."""
    boxes = _as_boxes(boxes_xyxy)
    _check_size(width, height)
    return np.clip(boxes, 0.0, np.array([width, height, width, height], dtype=np.float64))


def xyxy_to_percent(boxes_xyxy: ArrayLike, width: float, height: float) -> Boxes:
    """boxes_xyxy (n, 4) -> boxes_percent (n, 4), rotation 0, clipped to the image.

    Raises:
        ValueError: not (n, 4), not finite, or a size that is not positive.
    """
    left, top, right, bottom = clip_xyxy(boxes_xyxy, width, height).T
    return np.stack(
        [left / width * 100, top / height * 100, (right - left) / width * 100, (bottom - top) / height * 100], axis=1
    )


def percent_to_xyxy(boxes_percent: ArrayLike, width: float, height: float, rotations: ArrayLike | None = None) -> Boxes:
    """boxes_percent (n, 4), rotations (n,) in degrees -> boxes_xyxy (n, 4): the upright hull, clipped to the image.

    Negative widths and heights (a rectangle drawn towards the top left) are turned round.

    Raises:
        ValueError: not (n, 4), not finite, or a size that is not positive.
    """
    boxes = _as_boxes(boxes_percent)
    _check_size(width, height)
    x, y, across, down = (boxes * np.array([width, height, width, height], dtype=np.float64) / 100).T
    angle = np.radians(_as_rotations(rotations, len(boxes)))
    cos, sin = np.cos(angle), np.sin(angle)
    # the corner stays; (across, 0), (across, down) and (0, down) turn around it, y pointing down
    corners_x = np.stack([x, x + across * cos, x + across * cos - down * sin, x - down * sin])
    corners_y = np.stack([y, y + across * sin, y + across * sin + down * cos, y + down * cos])
    hull = np.stack([corners_x.min(0), corners_y.min(0), corners_x.max(0), corners_y.max(0)], axis=1)
    return clip_xyxy(hull, width, height)


def xyxy_to_yolo(boxes_xyxy: ArrayLike, width: float, height: float) -> Boxes:
    """boxes_xyxy (n, 4) -> boxes_yolo (n, 4), clipped to the image.

    Raises:
        ValueError: not (n, 4), not finite, or a size that is not positive.
    """
    left, top, right, bottom = clip_xyxy(boxes_xyxy, width, height).T
    return np.stack(
        [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height],
        axis=1,
    )


def yolo_to_xyxy(boxes_yolo: ArrayLike, width: float, height: float) -> Boxes:
    """boxes_yolo (n, 4) -> boxes_xyxy (n, 4), clipped to the image.

    Raises:
        ValueError: not (n, 4), not finite, or a size that is not positive.
    """
    centre_x, centre_y, across, down = _as_boxes(boxes_yolo).T
    corners = np.stack(
        [
            (centre_x - across / 2) * width,
            (centre_y - down / 2) * height,
            (centre_x + across / 2) * width,
            (centre_y + down / 2) * height,
        ],
        axis=1,
    )
    return clip_xyxy(corners, width, height)


def percent_to_yolo(
    boxes_percent: ArrayLike, width: float = 100, height: float = 100, rotations: ArrayLike | None = None
) -> Boxes:
    """boxes_percent (n, 4) -> boxes_yolo (n, 4). The size of the image only matters to rotated boxes."""
    return xyxy_to_yolo(percent_to_xyxy(boxes_percent, width, height, rotations), width, height)


def yolo_to_percent(boxes_yolo: ArrayLike) -> Boxes:
    """boxes_yolo (n, 4) -> boxes_percent (n, 4), rotation 0."""
    return xyxy_to_percent(yolo_to_xyxy(boxes_yolo, 100, 100), 100, 100)


@dataclass(frozen=True)
class Control:
    """One labelling tool over the image whose regions are boxes to us.

    Attributes:
        name: `from_name` of its regions.
        shape: what is drawn with it.
        labels: that it offers, as regions hold them.
        score_threshold: its model_score_threshold, 0..1, or None.
    """

    name: str
    shape: Shape
    labels: tuple[str, ...]
    score_threshold: float | None = None

    @property
    def type(self) -> str:
        """`type` of its regions."""
        return labels_key(self.shape)


@dataclass(frozen=True)
class LabelMap:
    """What a label config says about boxes: the <RectangleLabels> over one <Image>, with shapes="hull" also the
    <PolygonLabels> and <EllipseLabels>. The image is the one that the first of them is about.

    Attributes:
        from_name: name of the first control.
        to_name: name of the <Image>; `to_name` of all regions.
        image_key: the key of a task's data that holds the image, from value="$image".
        labels: of all controls, in the order of the config; one that two controls offer is one class, drawn by the
            first. A label's position is its class id in our datasets.
        aliases: label -> lower-cased names it also goes by (predicted_values, and the value behind an alias).
        score_threshold: model_score_threshold of the first control, 0..1, or None.
        controls: all of them; not given: one, of rectangles.
        displayed: value of a <Label> that has an alias -> the alias, which Label Studio stores.
    """

    from_name: str
    to_name: str
    image_key: str
    labels: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    score_threshold: float | None = None
    controls: tuple[Control, ...] = ()
    displayed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.controls:
            only = Control(self.from_name, "rectangle", self.labels, self.score_threshold)
            object.__setattr__(self, "controls", (only,))

    @classmethod
    def from_config(cls, label_config: str, shapes: Shapes = "boxes_only") -> LabelMap:
        """The label map of a label config (XML).

        Args:
            shapes: "hull": polygons and ellipses are taken for the boxes around them.

        Raises:
            LabelConfigUnsupported: not XML, too large, with a DOCTYPE, or without anything over an image that is a
                box; the message says what was found and what to add.
        """
        interface = _parse(label_config)
        tags, image = _controls_over_image(interface, shapes)
        controls = tuple(_control(tag) for tag in tags if tag.labels)
        if not controls:
            raise LabelConfigUnsupported(
                f'<{tags[0].tag} name="{tags[0].name}"> has no <Label> of its own. Add <Label value="..."/> to it '
                "(labels that come with each task cannot be learned)."
            )
        attributes = _first_wins((label, tag.labels_attrs[label].attr) for tag in tags for label in tag.labels or ())
        values = ((attr.get("value", ""), label) for label, attr in attributes.items())
        return cls(
            from_name=controls[0].name,
            to_name=image.name,
            image_key=_image_key(image),
            labels=tuple(attributes),
            aliases={label: _aliases(label, attr) for label, attr in attributes.items()},
            score_threshold=controls[0].score_threshold,
            controls=controls,
            displayed=_first_wins((value, label) for value, label in values if value and value not in attributes),
        )

    def control(self, from_name: object) -> Control | None:
        """The control of that name, when its regions are boxes to us."""
        return next((control for control in self.controls if control.name == from_name), None)

    def class_id_of(self, label: str) -> int | None:
        """Of a region's label; a label drawn before it got its alias counts as well, and one that was renamed, where
        the new <Label> names the old one in its predicted_values. None: not in the config."""
        class_ids = self.class_ids
        if (class_id := class_ids.get(self.displayed.get(label, label))) is not None:
            return class_id
        lowered = label.strip().lower()
        return next((class_ids[new] for new in self.labels if lowered in self.aliases.get(new, ())), None)

    def shows(self, region: Mapping[str, Any]) -> bool:
        """Whether Label Studio takes a region that we made, maybe under an earlier label config, under this one."""
        control = self.control(region.get("from_name"))
        is_ours = control is not None and region.get("type") == control.type and region.get("to_name") == self.to_name
        return is_ours and control is not None and label_drawn(region) in control.labels

    def control_for(self, label: str) -> Control:
        """The control that draws a label: the first that offers it."""
        return next((control for control in self.controls if label in control.labels), self.controls[0])

    def threshold_of(self, label: str, default: float) -> float:
        """Confidence from which boxes of a label are drawn: its control's model_score_threshold, else `default`."""
        threshold = self.control_for(label).score_threshold
        return default if threshold is None else threshold

    def lowest_threshold(self, default: float) -> float:
        """The least of `threshold_of` over all labels: no box below it is drawn. Without labels, `default`."""
        return min((self.threshold_of(label, default) for label in self.labels), default=default)

    @property
    def class_ids(self) -> dict[str, int]:
        """label -> its class id in our datasets and in the models trained on them."""
        return {label: class_id for class_id, label in enumerate(self.labels)}

    def classes_for(self, model_names: Mapping[int, str]) -> dict[int, str]:
        """Class id of a model -> label: by exact name, else by lower-cased name, else by predicted_values.

        Several classes may become one label. Classes that no label asks for are left out.

        Raises:
            LabelMismatch: no class becomes a label; the message names both sides and how to fix it.
        """
        by_exact = {label: label for label in self.labels}
        by_lower = _first_wins((label.strip().lower(), label) for label in self.labels)
        by_alias = _first_wins((alias, label) for label in self.labels for alias in self.aliases.get(label, ()))
        classes: dict[int, str] = {}
        for class_id, name in model_names.items():
            lowered = name.strip().lower()
            label = by_exact.get(name) or by_lower.get(lowered) or by_alias.get(lowered)
            if label is not None:
                classes[int(class_id)] = label
        if not classes:
            raise LabelMismatch(self._mismatch(list(model_names.values())))
        return classes

    def maps_any(self, model_names: Mapping[int, str]) -> bool:
        """Whether `classes_for` would find at least one class."""
        try:
            self.classes_for(model_names)
        except LabelMismatch:
            return False
        return True

    def _mismatch(self, names: Sequence[str]) -> str:
        if not names:
            return f"label_config uses {_shown(self.labels)}, but the model has no classes at all. Name other weights."
        return (
            f"label_config uses {_shown(self.labels)}, unknown to the model ({_shown(names)}). "
            f'Rename the <Label>, or add predicted_values="{names[0]}" to it.'
        )


def to_regions(
    label_map: LabelMap,
    boxes_xyxy: ArrayLike,
    confidences: ArrayLike,
    class_ids: ArrayLike,
    class_to_label: Mapping[int, str],
    width: int,
    height: int,
) -> list[dict[str, Any]]:
    """Detections of one image as Label Studio regions that its validator keeps.

    Args:
        label_map: of the project.
        boxes_xyxy: (n, 4), pixels.
        confidences: (n,), 0..1: each region's `score`.
        class_ids: (n,), the model's.
        class_to_label: from `LabelMap.classes_for`.
        width: of the displayed image, pixels.
        height: of the displayed image, pixels.

    Returns:
        At most n regions in the order given, each of its label's control, in that control's shape; their boxes have
        0 <= x, 0 <= y, 0 < width, 0 < height, x + width <= 100, y + height <= 100. Left out: classes no label asks for,
        and boxes with no area inside the image.
        Ids are unique among them and the same for the same boxes, so that a page loaded twice shows one prediction.

    Raises:
        ValueError: lengths that differ, or a box or a confidence that is not finite.
    """
    boxes = clip_xyxy(boxes_xyxy, width, height)
    scores = np.asarray(confidences, dtype=np.float64).reshape(-1)
    classes = np.asarray(class_ids).reshape(-1)
    if not len(boxes) == len(scores) == len(classes):
        raise ValueError(f"{len(boxes)} boxes, {len(scores)} confidences and {len(classes)} class ids: not one image's")
    if not np.isfinite(scores).all():
        raise ValueError("a confidence is not finite: the weights may be damaged")
    seen: Counter[str] = Counter()
    regions = []
    for box, score, class_id in zip(boxes, scores, classes, strict=True):
        label = class_to_label.get(int(class_id))
        sides = _sides(box, width, height)
        if label is None or sides is None:
            continue
        regions.append(_region(label_map, label, sides, float(score), width, height, seen))
    return regions


def _region(
    label_map: LabelMap,
    label: str,
    sides: dict[str, float],
    score: float,
    width: int,
    height: int,
    seen: Counter[str],
) -> dict[str, Any]:
    control = label_map.control_for(label)
    what = f"{control.name}|{label}|{sorted(sides.items())}"
    seen[what] += 1  # two equal boxes still need two ids
    return {
        "id": hashlib.sha256(f"{what}|{seen[what]}".encode()).hexdigest()[:12],
        "type": control.type,
        "from_name": control.name,
        "to_name": label_map.to_name,
        "original_width": int(width),
        "original_height": int(height),
        "image_rotation": 0,
        "score": min(max(score, 0.0), 1.0),
        "value": value_of(control.shape, (sides["x"], sides["y"], sides["width"], sides["height"]), label),
    }


def _sides(box_xyxy: Boxes, width: int, height: int) -> dict[str, float] | None:
    """x, y, width, height in percent of a clipped box, or None when nothing is left of it after rounding."""
    left, top, right, bottom = (float(side) for side in box_xyxy)
    x, across = _span(left / width, right / width)
    y, down = _span(top / height, bottom / height)
    if across <= 0 or down <= 0:
        return None
    return {"x": x, "y": y, "width": across, "height": down}


def _span(low: float, high: float) -> tuple[float, float]:
    """Start and length in percent. `start + length` is never above 100: 100 - start, rounded, adds up to 100 again."""
    start = round(min(max(low, 0.0), 1.0) * 100, _DECIMALS)
    end = round(min(max(high, 0.0), 1.0) * 100, _DECIMALS)
    return start, min(round(end - start, _DECIMALS), 100 - start)


def _parse(label_config: object) -> Any:
    if not isinstance(label_config, str) or not label_config.strip():
        raise LabelConfigUnsupported("The label config is empty. Set one in the project's Labeling Interface.")
    if len(label_config) > MAX_CONFIG_CHARACTERS:
        raise LabelConfigUnsupported(
            f"The label config has {len(label_config):,} characters; at most {MAX_CONFIG_CHARACTERS:,} are read."
        )
    if _DOCTYPE.search(label_config):
        # entities can blow up a short text, and no label config needs one
        raise LabelConfigUnsupported("The label config has a DOCTYPE or an ENTITY, which is not read. Remove it.")
    from label_studio_sdk.label_interface.interface import LabelInterface  # brings pandas: not while a process starts

    try:
        return LabelInterface(_XML_DECLARATION.sub("", label_config, count=1))
    except Exception as error:  # the SDK raises bare Exception, KeyError, ValueError and lxml's own
        raise LabelConfigUnsupported(f"The label config cannot be read: {str(error)[:200]}") from error


def _control(tag: Any) -> Control:
    shape = _shape_of(tag)
    assert shape is not None  # that is how it was chosen
    return Control(str(tag.name), shape, tuple(tag.labels), _threshold(tag.get_attr("model_score_threshold")))


def _shape_of(tag: Any) -> Shape | None:
    return next((shape for shape in SHAPES if tag.tag.lower() == labels_key(shape)), None)


def _controls_over_image(interface: Any, shapes: Shapes) -> tuple[list[Any], Any]:
    """The controls that draw boxes over one image, in the order of the config, and that image."""
    over = [(tag, image) for tag in interface.controls or () for image in _images_of(tag)]
    usable = [(tag, image) for tag, image in over if _shape_of(tag) in _USABLE[shapes]]
    if usable:
        first = usable[0][1]
        return [tag for tag, image in usable if image.name == first.name], first
    raise LabelConfigUnsupported(_why_unusable(interface, [tag for tag, _ in over]))


_USABLE: dict[Shapes, tuple[Shape, ...]] = {"boxes_only": ("rectangle",), "hull": SHAPES}


def _images_of(tag: Any) -> list[Any]:
    return [one for one in tag.objects or () if one.tag.lower() == "image"]


_ADD = (
    'Add <RectangleLabels name="label" toName="image"><Label value="..."/></RectangleLabels> '
    "in the project's Labeling Interface."
)


def _why_unusable(interface: Any, over_image: Sequence[Any]) -> str:
    """What was found instead of rectangles over an image, and what is needed."""
    controls = list(interface.controls or ())
    hulls = sorted({tag.tag for tag in over_image if _shape_of(tag) in _USABLE["hull"]})
    if hulls:
        return (
            f"The label config has {' and '.join(f'<{tag}>' for tag in hulls)} over the image, and no "
            '<RectangleLabels>. Write "shapes": "hull" into the model\'s extra params to train on the boxes around '
            f"them and to get boxes in their shape. Or: {_ADD}"
        )
    videos = sorted({one.tag for tag in controls for one in tag.objects or () if one.tag.lower() == "video"})
    if videos:
        return (
            "The label config shows a <Video>, which is not supported: a task must be one image. Extract frames, "
            'import them as tasks and show them with <Image name="image" value="$image"/>. Then: ' + _ADD
        )
    rectangles = [tag for tag in controls if _shape_of(tag) == "rectangle"]
    if rectangles:
        return (
            f'<RectangleLabels name="{rectangles[0].name}" toName="{",".join(rectangles[0].to_name)}"> points at no '
            '<Image>. Add <Image name="image" value="$image"/> and set toName="image".'
        )
    found = sorted({tag.tag for tag in controls})
    boxless = [tag for tag in found if tag.lower() in _BOXLESS]
    return (
        f"The label config has no <RectangleLabels> over an <Image>{f' (it has {_shown(found)})' if found else ''}. "
        + (f"What is drawn with <{boxless[0]}> has no box of plain meaning. " if boxless else "")
        + _ADD
    )


_BOXLESS = {f"{name}{ending}" for name in ("brush", "keypoint", "bitmask", "vector") for ending in ("", "labels")}


def _image_key(image: Any) -> str:
    if getattr(image, "is_image_list", False):
        raise LabelConfigUnsupported(
            f'<Image name="{image.name}" valueList="{image.value}"> shows several images in one task. '
            'Use value="$image", one image in each task.'
        )
    if not image.value_is_variable:
        raise LabelConfigUnsupported(
            f'<Image name="{image.name}" value="{str(image.value)[:80]}"> is not a key of the task. '
            'Write value="$image", where "image" is the key.'
        )
    return str(image.value_name)


def _aliases(label: str, attributes: Mapping[str, str]) -> tuple[str, ...]:
    """Lower-cased predicted_values; with alias="..." Label Studio stores the alias, so the value is a name as well."""
    names = [*attributes.get("predicted_values", "").split(","), attributes.get("value", "")]
    cleaned = (name.strip().lower() for name in names)
    return tuple(dict.fromkeys(name for name in cleaned if name and name != label.strip().lower()))


def _threshold(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise LabelConfigUnsupported(f'model_score_threshold="{str(value)[:40]}" is not a number from 0 to 1.')
    return threshold


def _first_wins(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for key, value in pairs:
        found.setdefault(key, value)
    return found


def _shown(names: Sequence[str]) -> str:
    shown = str([str(name)[:60] for name in names[:_SHOWN_NAMES]])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown[:-1]}, ... {len(names) - _SHOWN_NAMES} more]"


def _as_boxes(boxes: ArrayLike) -> Boxes:
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, 4), dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes have shape {array.shape}, not (n, 4)")
    if not np.isfinite(array).all():
        raise ValueError("a box has a coordinate that is not finite")
    return array


def _as_rotations(rotations: ArrayLike | None, n: int) -> Boxes:
    if rotations is None:
        return np.zeros(n, dtype=np.float64)
    array = np.asarray(rotations, dtype=np.float64).reshape(-1)
    if len(array) != n or not np.isfinite(array).all():
        raise ValueError(f"{n} boxes need {n} finite rotations, not {len(array)}")
    return array


def _check_size(width: float, height: float) -> None:
    if not (width > 0 and height > 0 and math.isfinite(width) and math.isfinite(height)):
        raise ValueError(f"an image of {width} x {height} pixels has no coordinates")
