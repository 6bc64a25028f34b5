"""From annotations to points of the learning curve: truth beside detections, and what the verdict makes of it.

Every measurement measures all rounds: on the holdout as it is labelled now, so that the points stay comparable.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, update

from strategies.stopping import knee, learning_curve_stats, predicted_gain_estimable, should_stop, verdict
from strategies.verdict import LEVEL, ClassCurve, Verdict, training_noise
from worker.boxes import yolo_to_xyxy
from worker.dataset import TaskTruth
from worker.evaluation import Detections, Evaluation, Truth, bootstrap_map50, evaluate
from worker.returns import WorthGain, annotator_time, worth_gain_of
from worker.settings import ProjectSettings
from worker.store import loads, measured_rounds
from worker.store import rounds as round_rows

BOOTSTRAP_SAMPLES = 1000
_Z = 1.6449  # normal quantile of LEVEL

Covariance = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """The learning curve: every round that can be compared, on the holdout as it is now."""

    evaluations: dict[int, Evaluation]  # round id -> evaluation, oldest first
    covariance: Covariance  # (R, R) of mAP50 over holdouts drawn anew, in that order; (0, 0) where nothing is measured
    labels: tuple[str, ...]  # class id -> label
    note: str = ""

    @property
    def is_measured(self) -> bool:
        return bool(self.covariance.size)

    @property
    def map50(self) -> list[float]:
        """(R,) of the rounds, when they are measured."""
        return [found.map50 for found in self.evaluations.values() if found.map50 is not None]

    def among(self, round_ids: Collection[int]) -> Measured:
        """Without the other rounds."""
        kept = [place for place, round_id in enumerate(self.evaluations) if round_id in round_ids]
        evaluations = {key: found for key, found in self.evaluations.items() if key in round_ids}
        covariance = self.covariance[np.ix_(kept, kept)] if self.is_measured else self.covariance
        return dataclasses.replace(self, evaluations=evaluations, covariance=covariance)


def compare(
    detections: Mapping[int, Detections], truths: Sequence[TaskTruth], labels: Sequence[str], note: str = ""
) -> Measured:
    """All rounds on the same labelled images, with the noise of that choice of images (some tenths of a second)."""
    evaluations = on_common_images(detections, truths)
    covariance = np.zeros((0, 0))
    if evaluations and all(one.map50 is not None for one in evaluations.values()):  # all or none: of one truth
        samples = bootstrap_map50([one.arrays for one in evaluations.values()], BOOTSTRAP_SAMPLES)
        covariance = np.atleast_2d(np.cov(samples, rowvar=False))
    return Measured(evaluations, covariance, tuple(labels), note)


def write_curve(
    connection: Connection, project_id: int, measured: Measured, settings: ProjectSettings, this: int | None = None
) -> None:
    """Every compared round's mAP, gain, AP per class and interval; and the newest round's verdict.

    Args: this: the round that has just been measured, where the store does not know yet that it is.
    """
    known = {row.id: row for row in measured_rounds(connection, project_id)}
    if this is not None:
        known[this] = connection.execute(round_rows.select().where(round_rows.c.id == this)).one()
        minutes = 60 * annotator_time(connection, project_id).hours
        connection.execute(update(round_rows).where(round_rows.c.id == this).values(minutes=minutes))
    curve = measured.among(known)
    if not curve.is_measured:  # without a labelled holdout today, the earlier figures are the best there are
        if this is not None:
            _write_unmeasured(connection, known[this], measured)
        return
    labels = [int(known[round_id].labels or 0) for round_id in curve.evaluations]
    intervals = _intervals(curve, training_noise(curve.map50, labels))
    newest = list(curve.evaluations)[-1]
    gains = [None, *np.diff(curve.map50).round(6).tolist()]
    for (round_id, found), interval, gain in zip(curve.evaluations.items(), intervals, gains, strict=True):
        told = loads(known[round_id].verdict)  # what was told then stays; what was measured is brought up to date
        if round_id == newest:
            worth = worth_gain_of(connection, project_id, settings)
            told = verdict_json(labels, curve, worth, settings.min_map_gain)
        values = {"gain": gain, "verdict": json.dumps({**told, "interval": interval})}
        row = update(round_rows).where(round_rows.c.id == round_id)
        connection.execute(row.values(**values, **columns(found, measured.labels)))


def _write_unmeasured(connection: Connection, row: Row[Any], measured: Measured) -> None:
    values = {
        "gain": None,
        "verdict": json.dumps(base_verdict([], 0.0)),
        **columns(measured.evaluations[row.id], measured.labels),
    }
    connection.execute(update(round_rows).where(round_rows.c.id == row.id).values(**values))


def columns(found: Evaluation, labels: Sequence[str]) -> dict[str, Any]:
    """An evaluation as columns of `rounds`."""
    per_class = {
        labels[class_id]: {"ap50": ap50, "ap50_95": found.ap50_95[class_id], "boxes": found.n_boxes[class_id]}
        for class_id, ap50 in found.ap50.items()
    }
    return {
        "map50": found.map50,
        "map50_95": found.map50_95,
        "holdout_labels": found.n_images,
        "per_class": json.dumps(per_class),
    }


def _intervals(curve: Measured, training_sd: float) -> list[dict[str, float | None]]:
    """90 % interval of each round's mAP50 (the holdout's noise), and of its gain (that, and the training's)."""
    noise, intervals = curve.covariance, []
    for place, map50 in enumerate(curve.map50):
        sd = math.sqrt(noise[place, place])
        told: dict[str, float | None] = {"level": LEVEL, "se": sd}
        told |= {"low": max(map50 - _Z * sd, 0.0), "high": min(map50 + _Z * sd, 1.0)}
        told |= dict.fromkeys(("gain_se", "gain_low", "gain_high"))
        if place:
            gain = map50 - curve.map50[place - 1]
            held = noise[place, place] + noise[place - 1, place - 1] - 2 * noise[place, place - 1]
            gain_sd = math.sqrt(max(held, 0.0) + 2 * training_sd**2)
            told |= {"gain_se": gain_sd, "gain_low": gain - _Z * gain_sd, "gain_high": gain + _Z * gain_sd}
        intervals.append(told)
    return intervals


def verdict_json(labels: Sequence[int], curve: Measured, worth: WorthGain, min_map_gain: float) -> dict[str, Any]:
    """The newest round's verdict as `rounds.verdict` keeps it: with base rule, statistics, fit and knee."""
    evaluations = list(curve.evaluations.values())
    found = verdict(
        curve.map50,
        labels,
        holdout_images=evaluations[-1].n_images,
        covariance=curve.covariance,
        worth_gain=worth.value,
        training_sd=training_noise(curve.map50, labels),
        min_map_gain=min_map_gain,
        classes=class_curves(evaluations, curve.labels),
    )
    rising = all(earlier <= later for earlier, later in pairwise(labels))
    return {
        "verdict": found.verdict,
        "reasons": list(found.reasons),
        "warnings": list(found.warnings),
        "base": {"verdict": found.base_verdict, "reasons": [found.base_reason], "min_map_gain": min_map_gain},
        "stats": learning_curve_stats(curve.map50, labels),
        "next_gain_estimable": predicted_gain_estimable(np.diff(curve.map50)),
        "numbers": {**found.numbers, "worth_gain_from": worth.source},
        "fit": _fit_json(found),
        "knee": knee(labels, curve.map50) if rising else None,
    }


def class_curves(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[ClassCurve]:
    """AP50 over the rounds of every class that the holdout holds today."""
    newest = evaluations[-1]
    return [
        ClassCurve(names[class_id], [one.ap50.get(class_id) for one in evaluations], boxes)
        for class_id, boxes in newest.n_boxes.items()
    ]


def _fit_json(found: Verdict) -> dict[str, Any] | None:
    if found.extrapolation is None:
        return None
    told = {"agrees": found.agrees, "sentence": found.extrapolation_sentence}
    return {**dataclasses.asdict(found.extrapolation), **told}


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
    kept = [truth for truth in truths if truth.task_id in common and not truth.unusable]
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
