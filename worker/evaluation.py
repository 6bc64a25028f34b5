"""The holdout measurement: detections against truth. Arrays alone: nothing here loads torch.

A round measures its detector once: `worker.detector.collect_detections` keeps the raw detections of every holdout
image. `evaluate` compares them with the truth of the moment, so that truth corrected later re-evaluates old rounds
without running a network. Matching and average precision are ultralytics 8.4.190's (`DetectionValidator`,
`ap_per_class`), to the last bit in all we tried.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # no stubs are published

from worker.errors import ArtifactDamaged

IOU_THRESHOLDS: NDArray[np.float32] = np.linspace(0.5, 0.95, 10, dtype=np.float32)
UNTAUGHT = 0.01  # mAP50 of a detector that has learned nothing yet
_RECALL_GRID = np.linspace(0, 1, 101)  # COCO's 101 points
_SAMPLES_AT_ONCE = 250  # of a bootstrap: bounds its memory

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class _Arrays:
    """Named arrays that travel as the bytes of an .npz file (never a pickle)."""

    def save(self) -> bytes:
        """The bytes of an .npz file; the same arrays give the same bytes."""
        buffer = io.BytesIO()
        columns: dict[str, Any] = {**self.arrays()}  # numpy types its keyword `allow_pickle`, not the arrays
        np.savez_compressed(buffer, **columns)
        return buffer.getvalue()

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # a mixin of dataclasses

    @classmethod
    def load(cls, content: bytes) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtifactDamaged: not an .npz file, or not with the arrays of this class.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                return cls(**{name: stored[name] for name in stored.files})
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactDamaged(f"Not the arrays of {cls.__name__}: {error}") from error


@dataclass(frozen=True, eq=False)
class Detections(_Arrays):
    """What a detector saw on n holdout images: m detections, from confidence .001 on, never pruned further.

    Boxes may reach beyond the image, as the network said: clipping would change the IoU that mAP is made of.
    Within an image they are ordered by falling confidence.
    """

    keys: Ints  # (n,) task ids, each once
    image_index: Ints  # (m,) row of `keys`, rising
    boxes_xyxy: Floats  # (m, 4) pixels in the displayed frame
    confidences: Floats  # (m,) 0..1
    class_ids: Ints  # (m,) classes of the model
    sizes: Ints  # (n, 2) width, height in pixels

    def __post_init__(self) -> None:
        _check_shapes(self.arrays(), n=("keys", "sizes"), m=("image_index", "boxes_xyxy", "confidences", "class_ids"))
        _check_boxes(self.keys, self.image_index, self.boxes_xyxy)
        if self.sizes.shape[1:] != (2,):
            raise ValueError(f"sizes must be (n, 2), not {self.sizes.shape}")
        if np.any(np.diff(self.image_index) < 0):
            raise ValueError("image_index must rise: detections are kept image by image")


@dataclass(frozen=True, eq=False)
class Truth(_Arrays):
    """What annotators drew on n holdout images: t boxes. An image without boxes is in `keys` all the same."""

    keys: Ints  # (n,) task ids, each once
    image_index: Ints  # (t,) row of `keys`
    boxes_xyxy: Floats  # (t, 4) pixels in the displayed frame
    class_ids: Ints  # (t,) classes of the model

    def __post_init__(self) -> None:
        _check_shapes(self.arrays(), n=("keys",), m=("image_index", "boxes_xyxy", "class_ids"))
        _check_boxes(self.keys, self.image_index, self.boxes_xyxy)


@dataclass(frozen=True, eq=False)
class EvaluationArrays(_Arrays):
    """What mAP is computed from, image by image: enough to bootstrap over images later.

    The names are those of ultralytics' `metrics.stats`; the image columns index `keys`.
    """

    keys: Ints  # (n,) task ids of the images that counted
    tp: NDArray[np.bool_]  # (m, 10) is the detection right, at each IoU threshold
    conf: Floats  # (m,)
    pred_cls: Ints  # (m,)
    pred_img: Ints  # (m,) row of `keys`
    target_cls: Ints  # (t,)
    target_img: Ints  # (t,) row of `keys`

    def __post_init__(self) -> None:
        _check_shapes(self.arrays(), n=("keys",), m=("tp", "conf", "pred_cls", "pred_img"))
        _check_shapes(self.arrays(), n=("keys",), m=("target_cls", "target_img"))
        if self.tp.shape[1:] != (len(IOU_THRESHOLDS),):
            raise ValueError(f"tp must be (m, {len(IOU_THRESHOLDS)}), not {self.tp.shape}")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """mAP on the holdout images that truth speaks of. The classes are those that truth contains."""

    map50: float | None  # 0..1; None when there is nothing to measure, and `reason` says why
    map50_95: float | None
    ap50: dict[int, float]  # class id -> AP at IoU .5
    ap50_95: dict[int, float]  # class id -> mean AP over the ten IoU thresholds
    n_images: int
    n_boxes: dict[int, int]  # class id -> boxes in truth
    arrays: EvaluationArrays
    reason: str = ""


def evaluate(detections: Detections, truth: Truth) -> Evaluation:
    """mAP50 and mAP50-95, and both per class, of `detections` against `truth`.

    Only images that both know count: an image whose truth is missing is no image without objects, and one that this
    detector never saw is no image where it found nothing. A box drawn twice to the pixel counts once, as in
    ultralytics. Equal to `model.val(rect=True, batch=1)` on the same images (ultralytics forms one shape per batch;
    with one image per batch a result never depends on its neighbours).
    """
    keys = np.intersect1d(detections.keys, truth.keys)
    arrays = _match_all(detections, truth, keys)
    classes, counts = np.unique(arrays.target_cls, return_counts=True)
    ap = average_precision(arrays, classes)
    n_boxes = {int(c): int(n) for c, n in zip(classes, counts, strict=True)}
    if not len(classes):
        reason = _nothing_to_measure(detections, truth, keys)
        return Evaluation(None, None, {}, {}, len(keys), n_boxes, arrays, reason)
    return Evaluation(
        map50=float(ap[:, 0].mean()),
        map50_95=float(ap.mean()),
        ap50={int(c): float(row[0]) for c, row in zip(classes, ap, strict=True)},
        ap50_95={int(c): float(row.mean()) for c, row in zip(classes, ap, strict=True)},
        n_images=len(keys),
        n_boxes=n_boxes,
        arrays=arrays,
    )


def average_precision(arrays: EvaluationArrays, classes: Ints) -> NDArray[np.float64]:
    """(len(classes), 10) average precision, 0..1, of each class at each IoU threshold.

    Precision envelope, 101-point interpolation and trapezoid rule of ultralytics' `compute_ap`. A class without
    detections has 0.
    """
    order = np.argsort(-arrays.conf, kind="stable")
    tp, pred_cls = arrays.tp[order], arrays.pred_cls[order]
    ap = np.zeros((len(classes), len(IOU_THRESHOLDS)))
    for row, class_id in enumerate(classes):
        right = tp[pred_cls == class_id].cumsum(0)
        n_truth = int((arrays.target_cls == class_id).sum())
        if not len(right) or not n_truth:
            continue
        precision = right / np.arange(1, len(right) + 1)[:, None]
        recall = right / (n_truth + 1e-16)
        for column in range(len(IOU_THRESHOLDS)):
            ap[row, column] = _area_under(recall[:, column], precision[:, column])
    return ap


def bootstrap_map50(rounds: Sequence[EvaluationArrays], n_samples: int = 1000, seed: int = 0) -> NDArray[np.float64]:
    """(n_samples, len(rounds)) mAP50 of every round on holdouts drawn anew from the same images, with replacement.

    Paired: a sample weighs the images alike for all rounds, so that the difference of two columns is the gain on that
    sample. (Efron & Tibshirani 1993.) A class that a sample happens to miss does not count in it, as in `evaluate`;
    a sample without any box is drawn again. An image drawn twice counts twice, as in a list that holds it twice.

    Args: rounds, evaluated on the same images with the same truth.
    Raises: ValueError for rounds of other images, or without any box in truth.
    """
    if not rounds:
        return np.zeros((n_samples, 0))
    first = rounds[0]
    if any(not np.array_equal(one.keys, first.keys) for one in rounds):
        raise ValueError("a paired bootstrap needs rounds that were evaluated on the same images")
    if not len(first.target_cls):
        raise ValueError("a bootstrap of mAP needs at least one box in truth")
    rng = np.random.default_rng(seed)
    prepared = [[_class_curve(one, int(class_id)) for class_id in np.unique(one.target_cls)] for one in rounds]
    chunks = []
    # many small products: threads that wait for each other cost four times what they save
    with threadpool_limits(1, user_api="blas"):
        for start in range(0, n_samples, _SAMPLES_AT_ONCE):
            weights = _image_weights(first, min(_SAMPLES_AT_ONCE, n_samples - start), rng)
            chunks.append(np.column_stack([_weighted_map50(curves, weights) for curves in prepared]))
    return np.concatenate(chunks)


@dataclass(frozen=True, eq=False)
class _ClassCurve:
    """One class' precision-recall curve at IoU .5, as far as weights of images can change it: t right detections."""

    right_images: Ints  # (t,) image of each right detection, by falling confidence
    wrong_before: NDArray[np.float64]  # (n, t) wrong detections of each image between this right one and the last
    truth_per_image: NDArray[np.float64]  # (n,)


def _class_curve(arrays: EvaluationArrays, class_id: int) -> _ClassCurve:
    order = np.argsort(-arrays.conf, kind="stable")
    order = order[arrays.pred_cls[order] == class_id]
    right, images = arrays.tp[order, 0], arrays.pred_img[order]
    n, t = len(arrays.keys), int(right.sum())
    segment = np.cumsum(right) - right  # how many right ones came before
    wrong = ~right & (segment < t)
    before = np.zeros((n, t))
    np.add.at(before, (images[wrong], segment[wrong]), 1.0)
    truth = np.bincount(arrays.target_img[arrays.target_cls == class_id], minlength=n).astype(np.float64)
    return _ClassCurve(images[right], before, truth)


def _image_weights(arrays: EvaluationArrays, n_samples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n_samples, n) how often each image was drawn; every sample has a box."""
    n = len(arrays.keys)
    has_box = np.bincount(arrays.target_img, minlength=n) > 0
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_samples).astype(np.float64)
    while len(empty := np.flatnonzero(weights @ has_box == 0)):
        weights[empty] = rng.multinomial(n, np.full(n, 1 / n), size=len(empty))
    return weights


def _weighted_map50(curves: Sequence[_ClassCurve], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_samples,) mean over the classes that a sample holds."""
    ap = np.column_stack([_weighted_ap(curve, weights) for curve in curves])
    held = np.column_stack([weights @ curve.truth_per_image > 0 for curve in curves])
    mean: NDArray[np.float64] = np.where(held, ap, 0).sum(1) / held.sum(1)
    return mean


def _weighted_ap(curve: _ClassCurve, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_samples,) `_area_under` of every sample.

    Between two right detections the envelope of precision is flat: it is the best precision from the next one on. So
    its height at each of the 101 recalls is that of the first right detection whose recall lies beyond.
    """
    samples, t = len(weights), len(curve.right_images)
    if not t:
        return np.zeros(samples)
    right = weights[:, curve.right_images].cumsum(1)
    found = (weights @ curve.wrong_before).cumsum(1) + right
    envelope = np.zeros((samples, t + 1))  # 0 beyond the last
    np.divide(right, found, out=envelope[:, :t], where=found > 0)
    envelope = np.flip(np.maximum.accumulate(np.flip(envelope, 1), axis=1), 1)
    passed = _passed(right, weights @ curve.truth_per_image)
    heights = np.take_along_axis(envelope, passed, axis=1)
    return np.asarray(np.trapezoid(heights, _RECALL_GRID, axis=1), dtype=np.float64)


def _passed(right: NDArray[np.float64], truth: NDArray[np.float64]) -> Ints:
    """(n_samples, 101) how many right detections have a recall at or below each of the 101.

    In whole numbers, sample by sample on a stretch of its own, so that no rounding moves a recall over a grid point.
    """
    reached = np.floor(_RECALL_GRID * truth[:, None] + 1e-6)
    reached -= reached / (truth[:, None] + 1e-16) > _RECALL_GRID
    stretch = (right[:, -1].max() + truth.max() + 2) * np.arange(len(right))[:, None]
    flat = np.searchsorted((right + stretch).ravel(), (reached + stretch).ravel(), side="right")
    return np.asarray(flat.reshape(len(right), -1) - right.shape[1] * np.arange(len(right))[:, None], dtype=np.int64)


def match(
    predicted_xyxy: NDArray[Any], predicted_classes: NDArray[Any], true_xyxy: NDArray[Any], true_classes: NDArray[Any]
) -> NDArray[np.bool_]:
    """(n predictions, 10) bool: is each prediction right, at IoU .5, .55 ... .95? Predictions by falling confidence.

    `DetectionValidator.match_predictions`: each prediction in turn takes the unclaimed true box of its class that it
    overlaps most, at each threshold by itself.
    """
    right = np.zeros((len(predicted_xyxy), len(IOU_THRESHOLDS)), dtype=np.bool_)
    if not len(predicted_xyxy) or not len(true_xyxy):
        return right
    iou = box_iou(true_xyxy, predicted_xyxy) * (true_classes[:, None] == predicted_classes[None, :])
    claimed = np.zeros((len(true_xyxy), len(IOU_THRESHOLDS)), dtype=np.bool_)
    columns = np.arange(len(IOU_THRESHOLDS))
    for position in np.flatnonzero((iou >= IOU_THRESHOLDS.min()).any(0)):
        available = np.where(claimed, np.float32(0), iou[:, position, None])
        best = available.argmax(0)
        right[position] = available[best, columns] >= IOU_THRESHOLDS
        claimed[best, columns] |= right[position]
    return right


def box_iou(boxes_a: NDArray[Any], boxes_b: NDArray[Any]) -> Floats:
    """(len(a), len(b)) intersection over union of xyxy boxes, in float32 as ultralytics computes it."""
    a, b = np.asarray(boxes_a, np.float32)[:, None, :], np.asarray(boxes_b, np.float32)[None, :, :]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    overlap = sides[..., 0] * sides[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    iou: Floats = overlap / (area_a + area_b - overlap + np.float32(1e-7))
    return iou


def _match_all(detections: Detections, truth: Truth, keys: Ints) -> EvaluationArrays:
    found_rows, true_rows = _row_of(detections.keys), _row_of(truth.keys)
    tp, conf, pred_cls, pred_img, target_cls, target_img = [], [], [], [], [], []
    for row, key in enumerate(keys.tolist()):
        found = detections.image_index == found_rows[key]
        true_xyxy, true_classes = _distinct(truth, true_rows[key])
        tp.append(match(detections.boxes_xyxy[found], detections.class_ids[found], true_xyxy, true_classes))
        conf.append(detections.confidences[found])
        pred_cls.append(detections.class_ids[found])
        pred_img.append(np.full(int(found.sum()), row))
        target_cls.append(true_classes)
        target_img.append(np.full(len(true_classes), row))
    return EvaluationArrays(
        keys=keys,
        tp=np.concatenate([np.zeros((0, len(IOU_THRESHOLDS)), np.bool_), *tp]),
        conf=np.concatenate([np.zeros(0, np.float32), *conf]),
        pred_cls=_joined(pred_cls),
        pred_img=_joined(pred_img),
        target_cls=_joined(target_cls),
        target_img=_joined(target_img),
    )


def _distinct(truth: Truth, row: int) -> tuple[Floats, Ints]:
    here = truth.image_index == row
    boxes, classes = truth.boxes_xyxy[here], truth.class_ids[here]
    _, first = np.unique(np.column_stack([classes, boxes]), axis=0, return_index=True)
    first.sort()
    return boxes[first], classes[first]


def _area_under(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    recalls = np.concatenate(([0.0], recall, [recall[-1], 1.0]))
    envelope = np.concatenate(([1.0], precision, [0.0, 0.0]))
    envelope = np.flip(np.maximum.accumulate(np.flip(envelope)))
    return float(np.trapezoid(np.interp(_RECALL_GRID, recalls, envelope), _RECALL_GRID))


def _nothing_to_measure(detections: Detections, truth: Truth, keys: Ints) -> str:
    if not len(truth.keys):
        return "No holdout image has been labelled yet."
    if not len(keys):
        return f"None of the {len(truth.keys)} labelled holdout images is among the {len(detections.keys)} measured."
    return f"The {len(keys)} labelled holdout images hold no boxes: mAP needs at least one."


def _row_of(keys: Ints) -> dict[int, int]:
    return {key: row for row, key in enumerate(keys.tolist())}


def _joined(parts: list[Any]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def _check_shapes(arrays: Mapping[str, NDArray[Any]], n: tuple[str, ...], m: tuple[str, ...]) -> None:
    for names in (n, m):
        lengths = {name: len(arrays[name]) for name in names}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays must have equal lengths, not {lengths}")


def _check_boxes(keys: Ints, image_index: Ints, boxes_xyxy: Floats) -> None:
    if len(np.unique(keys)) != len(keys):
        raise ValueError("keys must be distinct")
    if boxes_xyxy.shape[1:] != (4,):
        raise ValueError(f"boxes_xyxy must be (m, 4), not {boxes_xyxy.shape}")
    if not np.isfinite(boxes_xyxy).all():
        raise ValueError("boxes_xyxy must be finite")
    if len(image_index) and (image_index.min() < 0 or image_index.max() >= len(keys)):
        raise ValueError(f"image_index must lie in 0..{len(keys) - 1}")
