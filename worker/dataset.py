"""Annotations -> a YOLO dataset on disk, in which nothing is lost in silence.

    <folder>/data.yaml            path, train: images, val: images, names (class id = position in the label config)
    <folder>/images/<task id>.jpg|png
    <folder>/labels/<task id>.txt  "class x y width height", 0..1; an empty file is a background image

The trainer drops an image for one bad coordinate, rewrites files it dislikes, and turns images by their EXIF: so labels
are clipped, images are stored in the displayed frame in a form it leaves alone, and what cannot be used is left out
here, with its reason.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import ExifTags, Image

from worker.boxes import Boxes, Control, LabelMap, percent_to_yolo
from worker.errors import DatasetUnusable, ImageUnusable
from worker.images import MAX_PIXELS, orientation_of, read_image, to_rgb, upright
from worker.shapes import DRAWN_TYPES, hull_of
from worker.shapes import number_or_none as _number

MIN_SIDE = 10  # pixels; the trainer drops smaller images with a line in its log
MIN_BOX = 1e-6  # of the image: what the label file's decimals can hold
NO_AREA = "no area inside the image"
_NOT_IN_CONFIG = " is not in the config"
_JPEG_END = b"\xff\xd9"  # a JPEG that does not end here is rewritten by the trainer
_OLDEST = datetime.min.replace(tzinfo=UTC)

T = TypeVar("T")
Fetch = Callable[[int], bytes]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskTruth:
    """What one task's chosen annotation says.

    Attributes:
        task_id: Label Studio's.
        boxes_yolo: (n, 4), 0..1, inside the image, none without area; n = 0 is a background image.
        class_ids: (n,), positions in `LabelMap.labels`.
        annotation_id: of the annotation chosen, or None when the export does not say.
        updated_at: of that annotation, aware, or None.
        lead_time: seconds the annotator spent, or None.
        width: of the image as Label Studio showed it, or None when no region says.
        height: as width.
        skipped: reason -> number of regions that became no box.
        unusable: why the boxes do not tell what is on the image (something was drawn that is no box), or "". Such an
            image is neither trained on nor measured, and above all it is no background.
    """

    task_id: int
    boxes_yolo: Boxes
    class_ids: NDArray[np.int64]
    annotation_id: int | None = None
    updated_at: datetime | None = None
    lead_time: float | None = None
    width: int | None = None
    height: int | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    unusable: str = ""


@dataclass(frozen=True)
class DatasetReport:
    """What `write_dataset` wrote.

    Attributes:
        yaml: the data.yaml for the trainer.
        n_images: written, background images included.
        n_boxes: written.
        boxes_per_class: class name -> boxes, every name present.
        n_background: images without a box.
        left_out: task id -> why its image is not there.
    """

    yaml: Path
    n_images: int
    n_boxes: int
    boxes_per_class: Mapping[str, int]
    n_background: int
    left_out: Mapping[int, str]


def truth_of(task: Mapping[str, Any], label_map: LabelMap) -> TaskTruth | None:
    """The truth of a task of Label Studio's JSON export, or None when nobody has labelled it.

    ONE annotation counts: a ground truth before others, then the one updated last, then the highest id. Skipped
    (cancelled) annotations never count. An annotation without regions says that the image is background.

    Regions that become no box are counted in `skipped`: another control or image, another shape, a label that is
    not in the config (any more), a rotation without the image's size, coordinates that are none, no area. The truth is
    `unusable` when something was drawn on the image and there is no box at all, or when what is missing bears one of
    our labels.

    Raises:
        DatasetUnusable: the task has no id: this is not Label Studio's JSON export.
    """
    task_id = _integer(task.get("id"))
    if task_id is None:
        raise DatasetUnusable(
            f"a task has no id (it has {sorted(map(str, task))[:12]}): this is not Label Studio's JSON export."
        )
    annotation = _chosen(task.get("annotations"))
    if annotation is None:
        return None
    boxes: list[Boxes] = []
    class_ids: list[int] = []
    skipped: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    size: tuple[int, int] | None = None
    for region in annotation["result"]:
        reason = _why_not(region, label_map)
        if reason is None:
            size = size or _size(region)
            found = _read_region(region, label_map, skipped, missing)
            boxes.extend(box for box, _ in found)
            class_ids.extend(class_id for _, class_id in found)
        else:
            skipped[reason] += 1
            missing.update([reason] if _shows_our_label(region, label_map) else [])
    drawn = any(_is_drawn(region, label_map) for region in annotation["result"])
    return TaskTruth(
        task_id=task_id,
        boxes_yolo=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        class_ids=np.array(class_ids, dtype=np.int64),
        annotation_id=_integer(annotation.get("id")),
        updated_at=_updated_at(annotation),
        lead_time=_seconds(annotation.get("lead_time")),
        width=size[0] if size else None,
        height=size[1] if size else None,
        skipped=dict(skipped),
        unusable=_why_unusable(missing or (skipped if drawn and not boxes else Counter())),
    )


def lost_labels(truths: Sequence[TaskTruth]) -> str:
    """What became of boxes whose label is not in the label config, in words; "" where there are none."""
    counts: Counter[str] = Counter()
    for truth in truths:
        counts.update({reason: count for reason, count in truth.skipped.items() if reason.endswith(_NOT_IN_CONFIG)})
    if not counts:
        return ""
    names = ", ".join(reason.removeprefix("label ").removesuffix(_NOT_IN_CONFIG) for reason in list(counts)[:5])
    n_tasks = sum(any(reason in counts for reason in truth.skipped) for truth in truths)
    return (
        f"{sum(counts.values())} boxes on {n_tasks} images bear labels that the label config does not have ({names}): "
        "they are left out, and images without any other box too. If a label was renamed, write the old name into the "
        'new <Label>: predicted_values="old name".'
    )


def write_dataset(
    folder: Path,
    truths: Sequence[TaskTruth],
    names: Sequence[str],
    fetch: Fetch,
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DatasetReport:
    """Writes a training dataset into `folder`, replacing what was there once it is complete.

    Args:
        folder: made if need be; its old content is gone afterwards.
        truths: one of each task.
        names: class id -> name: `LabelMap.labels`.
        fetch: task id -> image bytes. `ImageUnusable` leaves that one image out; other errors end the writing.
        progress: called with (images done, images in all).
        max_pixels: an image with more is left out.

    Raises:
        DatasetUnusable: no truth, no usable image, or not one box.
        ValueError: a class id that `names` does not have.
    """
    if not truths:
        raise DatasetUnusable("No task is labelled yet. Label some, then start a round.")
    left_out: dict[int, str] = {}
    written: list[TaskTruth] = []
    with _fresh(folder) as fresh:
        for truth in _with_progress(truths, progress):
            if truth.unusable:
                left_out[truth.task_id] = truth.unusable
                continue
            try:
                write_image(fresh / "images", truth.task_id, fetch(truth.task_id), max_pixels)
            except ImageUnusable as error:
                left_out[truth.task_id] = str(error)
                continue
            write_labels(fresh / "labels", truth, len(names))
            written.append(truth)
        _check_learnable(written, left_out)
        _write_yaml(fresh, folder, names)
    class_ids = np.concatenate([truth.class_ids for truth in written])
    counts = np.bincount(class_ids, minlength=len(names))
    return DatasetReport(
        yaml=folder.resolve() / "data.yaml",
        n_images=len(written),
        n_boxes=len(class_ids),
        boxes_per_class={name: int(count) for name, count in zip(names, counts, strict=True)},
        n_background=sum(len(truth.class_ids) == 0 for truth in written),
        left_out=left_out,
    )


def storable(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[bytes, str]:
    """An image as the trainer will leave it alone: bytes and suffix, in the displayed frame, without orientation.

    The bytes are the ones given unless something must change: an orientation, a mode other than RGB and L, bytes
    after a JPEG's end, a checksum that fails, or a format other than JPEG and PNG. JPEG stays JPEG (quality 95, full
    chroma); anything else becomes PNG, which loses nothing.

    Raises:
        ImageUnusable: cannot be decoded, or is smaller than 10 x 10 pixels.
    """
    image = read_image(content, max_pixels)
    if min(image.size) < MIN_SIDE:
        raise ImageUnusable(f"the image has {image.width} x {image.height} pixels; the trainer takes none below 10.")
    is_jpeg = image.format in ("JPEG", "MPO")
    suffix = ".jpg" if is_jpeg else ".png"
    if _can_stay(image, content):
        return content, suffix
    pixels = to_rgb(upright(image))
    pixels.info = {}  # Pillow would write some of it
    file = io.BytesIO()
    if is_jpeg:
        pixels.save(file, "JPEG", quality=95, subsampling=0)
    else:
        pixels.save(file, "PNG")
    return file.getvalue(), suffix


def _can_stay(image: Image.Image, content: bytes) -> bool:
    if image.mode not in ("RGB", "L") or image.format not in ("JPEG", "MPO", "PNG"):
        return False
    if orientation_of(image) != 1 or _may_turn_trainer(image):
        return False
    if image.format != "PNG":
        return content.endswith(_JPEG_END)
    return _passes_verify(content)


def _may_turn_trainer(image: Image.Image) -> bool:
    """Whether Pillow's getexif, which the trainer asks and which believes XMP too, says "turn" or cannot be read."""
    try:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return True


def _passes_verify(content: bytes) -> bool:
    """Whether Pillow's `verify`, stricter than decoding, passes: the trainer drops a PNG with one bad checksum."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except Exception:  # noqa: BLE001  the pixels are decoded already; whatever it minds, we write the file anew
        return False
    return True


def write_image(folder: Path, task_id: int, content: bytes, max_pixels: int) -> str:
    stored, suffix = storable(content, max_pixels)
    name = f"{task_id}{suffix}"
    (folder / name).write_bytes(stored)
    return name


def write_labels(folder: Path, truth: TaskTruth, n_classes: int) -> None:
    if len(truth.class_ids) and not 0 <= truth.class_ids.min() <= truth.class_ids.max() < n_classes:
        raise ValueError(f"task {truth.task_id} has class ids {sorted(set(truth.class_ids.tolist()))} of {n_classes}")
    lines = [
        f"{class_id} " + " ".join(f"{side:.8f}" for side in box)
        for class_id, box in zip(truth.class_ids, np.clip(truth.boxes_yolo, 0, 1), strict=True)
    ]
    (folder / f"{truth.task_id}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _write_yaml(fresh: Path, folder: Path, names: Sequence[str]) -> None:
    """`val` is `train`: the trainer wants one, and the holdout must never be it."""
    content = {"path": str(folder.resolve()), "train": "images", "val": "images", "names": dict(enumerate(names))}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    (fresh / "data.yaml").write_text(text, encoding="utf-8")


def _check_learnable(written: Sequence[TaskTruth], left_out: Mapping[int, str]) -> None:
    if not written:
        task_id, reason = next(iter(left_out.items()))
        raise DatasetUnusable(f"None of {len(left_out)} labelled images can be used. Task {task_id}: {reason}")
    if not any(len(truth.class_ids) for truth in written):
        raise DatasetUnusable(
            f"There is no box in {len(written)} labelled images, so there is nothing to detect yet. "
            "Label images that show something."
        )


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well, and is removed when not."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for place in ("images", "labels", "unlabelled"):
            (fresh / place).mkdir()
        yield fresh
        if not any((fresh / "unlabelled").iterdir()):
            (fresh / "unlabelled").rmdir()
        if folder.exists():
            shutil.rmtree(folder)
        fresh.chmod(0o755)  # mkdtemp's 700 would keep another user's trainer out
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _with_progress(items: Sequence[T], progress: Progress | None) -> Iterator[T]:
    for done, item in enumerate(items):
        yield item
        if progress is not None:
            progress(done + 1, len(items))


def _chosen(annotations: object) -> Mapping[str, Any] | None:
    if not isinstance(annotations, list):
        return None
    usable = [
        annotation
        for annotation in annotations
        if isinstance(annotation, dict)
        and isinstance(annotation.get("result"), list)
        and not annotation.get("was_cancelled")
    ]
    return max(usable, key=_rank, default=None)


def _rank(annotation: Mapping[str, Any]) -> tuple[bool, datetime, int]:
    return (
        bool(annotation.get("ground_truth")),
        _updated_at(annotation) or _OLDEST,
        _integer(annotation.get("id")) or 0,
    )


def _why_not(region: object, label_map: LabelMap) -> str | None:
    if not isinstance(region, dict):
        return "not a region"
    control = label_map.control(region.get("from_name"))
    if control is None:
        return "another control"
    if region.get("to_name") != label_map.to_name:
        return "another image"
    if region.get("type") != control.type or not isinstance(region.get("value"), dict):
        return f"not {'an' if control.shape == 'ellipse' else 'a'} {control.shape}"
    return None


def _is_drawn(region: object, label_map: LabelMap) -> bool:
    """Whether a result is something drawn on our image, whatever its shape and control."""
    return (
        isinstance(region, dict)
        and region.get("to_name") == label_map.to_name
        and str(region.get("type")).lower() in DRAWN_TYPES
    )


def _shows_our_label(region: object, label_map: LabelMap) -> bool:
    """Whether something that is drawn on our image bears a label of ours: an object to learn, and no box."""
    if not _is_drawn(region, label_map) or not isinstance(region, dict) or not isinstance(region.get("value"), dict):
        return False
    labels = region["value"].get(str(region.get("type")).lower())
    named = [label for label in labels if isinstance(label, str)] if isinstance(labels, list) else []
    return any(label_map.class_id_of(label) is not None for label in named)


def _why_unusable(reasons: Mapping[str, int]) -> str:
    if not reasons:
        return ""
    told = "; ".join(f"{reason} ({count})" for reason, count in list(reasons.items())[:3])
    return f"something is drawn on the image that is no box here: {told}. It is not taken for background."


def _read_region(
    region: Mapping[str, Any], label_map: LabelMap, skipped: Counter[str], missing: Counter[str]
) -> list[tuple[Boxes, int]]:
    """(box_yolo, class id) for each label of a region; usually one."""
    control = label_map.control(region.get("from_name"))
    assert control is not None  # or the region would have been skipped
    labels = region["value"].get(control.type)
    found = []
    for label in labels if isinstance(labels, list) and labels else [None]:
        class_id = label_map.class_id_of(label) if isinstance(label, str) else None
        if class_id is None:
            skipped["no label" if label is None else f"label {str(label)[:60]!r}{_NOT_IN_CONFIG}"] += 1
            continue
        box, reason = _box_of(region, control)
        if box is None:
            skipped[reason] += 1
            missing.update([reason] if reason != NO_AREA else [])  # there is an object, nobody knows where
            continue
        found.append((box, class_id))
    return found


def _box_of(region: Mapping[str, Any], control: Control) -> tuple[Boxes | None, str]:
    """The box (4,) of a region, or None and why."""
    sides, reason = hull_of(control.shape, region["value"], _size(region))
    if sides is None:
        return None, reason
    box = percent_to_yolo([sides])[0]
    return (box, "") if min(box[2], box[3]) >= MIN_BOX else (None, NO_AREA)


def _size(region: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = _integer(region.get("original_width")), _integer(region.get("original_height"))
    return (width, height) if width and height and width > 0 and height > 0 else None


def _updated_at(annotation: Mapping[str, Any]) -> datetime | None:
    for key in ("updated_at", "created_at"):
        value = annotation.get(key)
        if not isinstance(value, str):
            continue
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            continue
        return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    return None


def _seconds(value: object) -> float | None:
    seconds = _number(value)
    return seconds if seconds is not None and seconds >= 0 else None


def _integer(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        return None
    return int(value) if value == int(value) else None
