"""From annotations to points of the learning curve: truth beside detections, and what the base rule makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from strategies.stopping import learning_curve_stats, should_stop
from worker.boxes import yolo_to_xyxy
from worker.dataset import TaskTruth
from worker.evaluation import Detections, Evaluation, Truth, evaluate


def truth_for(detections: Detections, truths: Sequence[TaskTruth]) -> Truth:
    """The labelled ones of the images that were looked at, their boxes in pixels of those images."""
    size_of = {
        int(key): (int(width), int(height))
        for key, (width, height) in zip(detections.keys, detections.sizes, strict=True)
    }
    seen = [truth for truth in truths if truth.task_id in size_of]
    boxes = [yolo_to_xyxy(truth.boxes_yolo, *size_of[truth.task_id]) for truth in seen]
    return Truth(
        keys=np.array([truth.task_id for truth in seen], dtype=np.int64),
        image_index=np.repeat(np.arange(len(seen)), [len(found) for found in boxes]).astype(np.int64),
        boxes_xyxy=np.concatenate([np.zeros((0, 4)), *boxes]).astype(np.float32),
        class_ids=np.concatenate([np.zeros(0, np.int64), *(truth.class_ids for truth in seen)]).astype(np.int64),
    )


def renamed(detections: Detections, names: Mapping[int, str], labels: Sequence[str]) -> Detections:
    """Detections of an older model with class ids of today's label config; classes that are gone are left out."""
    position = {label: class_id for class_id, label in enumerate(labels)}
    today = {class_id: position[name] for class_id, name in names.items() if name in position}
    kept = np.isin(detections.class_ids, list(today))
    class_ids = np.array([today[int(class_id)] for class_id in detections.class_ids[kept]], dtype=np.int64)
    return dataclasses.replace(
        detections,
        image_index=detections.image_index[kept],
        boxes_xyxy=detections.boxes_xyxy[kept],
        confidences=detections.confidences[kept],
        class_ids=class_ids,
    )


def on_common_images(detections: Mapping[int, Detections], truths: Sequence[TaskTruth]) -> dict[int, Evaluation]:
    """Every round's evaluation on the same labelled holdout images: those that all of them looked at.

    An image that one round could not read would make its mAP one of other images, and the gain one of luck.
    """
    common = set.intersection(*(set(found.keys.tolist()) for found in detections.values())) if detections else set()
    kept = [truth for truth in truths if truth.task_id in common]
    return {key: evaluate(found, truth_for(found, kept)) for key, found in detections.items()}


def base_verdict(points: Sequence[tuple[int, float]], min_map_gain: float) -> dict[str, Any]:
    """Advice by the base rule, from (labels, mAP50) of every measured round: the last gain against `min_map_gain`."""
    labels, history = [count for count, _ in points], [map50 for _, map50 in points]
    stats = learning_curve_stats(history, labels)
    if len(history) < 2:
        told = "nothing could be measured yet" if not history else "one measured round has no gain to compare"
        return {"verdict": "insufficient_evidence", "reasons": [told], "stats": stats}
    gain = history[-1] - history[-2]
    verdict = "stop" if should_stop(history, min_map_gain) else "continue"
    compared = f"the last round gained {gain:+.3f} mAP50; the base rule stops below {min_map_gain:g}"
    return {"verdict": verdict, "reasons": [compared], "stats": stats}
