"""A round's first step: dataset, training, and one evaluation on the holdout."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator
from sqlalchemy import Connection, func, select, update

from worker import evaluation, rounds, steps
from worker.artifacts import round_key
from worker.dataset import TaskTruth, truth_of, write_dataset
from worker.errors import (
    ImageUnusable,
    NotFound,
)
from worker.images import decode_image
from worker.measuring import base_verdict, on_common_images, renamed
from worker.scoring import plan_scoring
from worker.selection import generator
from worker.settings import ProjectSettings
from worker.store import (
    loads,
    measured_rounds,
    scores,
    task_annotations,
    tasks,
)
from worker.store import rounds as round_rows
from worker.work import Work

if TYPE_CHECKING:
    from worker.detector import BaseWeights
    from worker.training import TrainProgress, TrainRequest


TASKS_AT_ONCE = 1000
MEMBER_SHARE = 0.8  # of the dataset: members that saw the same images would agree on them


def train_and_measure(work: Work) -> None:
    from worker.detector import prepare_ultralytics
    from worker.training import train

    own = work.services
    prepare_ultralytics(own.ultralytics_dir)
    work.progress("preparing")
    _remove_other_folders(work)
    truths = _truths(work)
    with own.store.read() as connection:
        barred = rounds.not_for_training(connection, work.project.id)
        holdout = sorted(task_id for task_id, held in rounds.holdout_of(connection, work.project.id).items() if held)
    dataset = _dataset(work, [truth for truth in truths if truth.task_id not in barred])
    base = _base_weights(work)
    trained = train(_train_request(work, dataset.yaml, base.path), _watch(work))
    content = trained.weights.read_bytes()
    measured = measure(work, trained.weights, truths, holdout)
    work.lease.hold()
    weights = {"weights": work.key("weights.pt"), "weights_sha256": own.artifacts.put(work.key("weights.pt"), content)}
    report = {
        "names": trained.names,
        "notes": [note for note in (base.note, trained.note, measured.note) if note],
        "seconds": round(trained.seconds, 1),
        "left_out": dataset.left_out,
        "boxes_per_class": dataset.boxes_per_class,
        "background": dataset.n_background,
        "base_weights": Path(base.path).name,
        "members": _keep_checkpoints(work),
    }
    own.artifacts.put(work.key("dataset.json"), json.dumps({"task_ids": dataset.task_ids}).encode())
    values = {"labels": dataset.n_images, "boxes": dataset.n_boxes, "report": json.dumps(report)}
    shards = plan_scoring(work)

    def then(connection: Connection) -> None:
        this = update(round_rows).where(round_rows.c.id == work.round.id)
        connection.execute(this.values(**values, **weights, embedder="the round's detector"))
        _write_curve(connection, work, measured)
        members = range(1, work.settings.committee_size)
        if members and work.settings.committee == "subsets":
            steps.add(connection, work.round.id, "member", members)
        else:
            steps.add(connection, work.round.id, "score", shards)

    steps.finish(work.lease, then)
    shutil.rmtree(_folder(work), ignore_errors=True)


def _watch(work: Work) -> Callable[[TrainProgress], None]:
    """Progress for the page; for a committee of checkpoints, also what keeps them."""
    from worker.training import save_checkpoint

    wanted = checkpoint_epochs(work.settings)

    def see(now: TrainProgress) -> None:
        _show_training(work, now)
        if now.epoch in wanted and not _checkpoint(work, now.epoch).is_file():
            save_checkpoint(_folder(work) / "run", _checkpoint(work, now.epoch))

    return see


def checkpoint_epochs(settings: ProjectSettings) -> list[int]:
    """Epochs whose checkpoints join the last one in a committee: spread over the last third of the training."""
    others = settings.committee_size - 1
    if others < 1 or settings.committee != "checkpoints":
        return []
    apart = max(1, settings.epochs // (3 * others))
    return [settings.epochs - apart * number for number in range(others, 0, -1)]


def _checkpoint(work: Work, epoch: int) -> Path:
    return _folder(work) / f"epoch-{epoch}.pt"


def _keep_checkpoints(work: Work) -> list[dict[str, Any]]:
    """The committee's other members as the report names them. A resumed training may lack one: it saved it nowhere."""
    members = []
    for number, epoch in enumerate(checkpoint_epochs(work.settings), start=1):
        if _checkpoint(work, epoch).is_file():
            key = work.key(f"member-{number}.pt")
            digest = work.services.artifacts.put(key, _checkpoint(work, epoch).read_bytes())
            members.append({"weights": key, "sha256": digest, "epoch": epoch, "correlated": True})
    return members


def train_one_member(work: Work) -> None:
    """One more detector, on its own part of the round's dataset: the step's shard is its number."""
    from worker.detector import prepare_ultralytics
    from worker.training import train

    own, number = work.services, work.lease.shard
    prepare_ultralytics(own.ultralytics_dir)
    everything = json.loads(own.artifacts.get(work.key("dataset.json")))["task_ids"]
    part = member_part(everything, generator(work.settings, work.project.id, work.round.number, f"member {number}"))
    dataset = _dataset(work, [truth for truth in _truths(work) if truth.task_id in part])
    request = _train_request(work, dataset.yaml, _base_weights(work).path)
    trained = train(replace(request, seed=request.seed + number), lambda now: _show_training(work, now))
    work.lease.hold()
    weights = work.key(f"member-{number}.pt")
    record = {"weights": weights, "sha256": own.artifacts.put(weights, trained.weights.read_bytes())}
    own.artifacts.put(_member_key(work, number), json.dumps({**record, "images": dataset.n_images}).encode())
    report = loads(work.round.report)

    def then(connection: Connection) -> None:
        report["members"] = [
            json.loads(own.artifacts.get(_member_key(work, one))) for one in range(1, work.settings.committee_size)
        ]
        this = update(round_rows).where(round_rows.c.id == work.round.id)
        connection.execute(this.values(report=json.dumps(report)))
        last = select(func.max(scores.c.shard)).where(scores.c.round_id == work.round.id)
        steps.add(connection, work.round.id, "score", range((connection.execute(last).scalar_one() or 0) + 1))

    steps.finish(work.lease, then)
    shutil.rmtree(_folder(work), ignore_errors=True)


def member_part(task_ids: Sequence[int], rng: Generator) -> set[int]:
    """A member's training images: four fifths, drawn without replacement; all of very few."""
    size = max(math.ceil(MEMBER_SHARE * len(task_ids)), min(len(task_ids), 2))
    return {int(one) for one in rng.choice(np.array(sorted(task_ids), dtype=np.int64), size=size, replace=False)}


def _member_key(work: Work, number: int) -> str:
    return work.key(f"member-{number}.json")


def _folder(work: Work) -> Path:
    """Scratch of this training on this host, and of this opening of the round: a store begun anew finds no other's."""
    name = f"p{work.project.id}-r{work.round.number:06d}-{work.round.opened_at:.0f}-{work.lease.shard}"
    return work.services.settings.data_dir.resolve() / "work" / name


def _remove_other_folders(work: Work) -> None:
    """Of rounds that were cancelled or failed here: a project has one open round."""
    for folder in _folder(work).parent.glob(f"p{work.project.id}-r*"):
        if folder != _folder(work):
            shutil.rmtree(folder, ignore_errors=True)


def _truths(work: Work) -> list[TaskTruth]:
    """What Label Studio's export says, and the store's copy of it brought up to date."""
    exported = work.services.label_studio.export(work.project.id)
    label_map = work.label_map
    images = {int(task["id"]): str((task.get("data") or {}).get(label_map.image_key) or "") for task in exported}
    for start in range(0, len(exported), TASKS_AT_ONCE):  # a webhook waits for no more than these
        some = exported[start : start + TASKS_AT_ONCE]
        found = [{**one, "task": task["id"]} for task in some for one in task.get("annotations") or []]
        with work.services.store.write() as connection:
            rounds.remember_tasks(connection, work.project.id, {int(task["id"]): images[task["id"]] for task in some})
            rounds.remember_annotations(connection, work.project.id, found)
    return [truth for task in exported if (truth := truth_of(task, label_map)) is not None]


@dataclass(frozen=True)
class _Dataset:
    """What the round trains on, as its folder's report.json remembers it."""

    yaml: Path
    task_ids: list[int]
    n_images: int
    n_boxes: int
    n_background: int
    boxes_per_class: dict[str, int]
    left_out: dict[str, str]


def _dataset(work: Work, truths: Sequence[TaskTruth]) -> _Dataset:
    """Written once per round: an attempt that follows a killed one trains on the same images, and so can resume."""
    folder = _folder(work)
    frozen = folder / "report.json"
    if not frozen.is_file():
        report = write_dataset(
            folder / "dataset",
            truths,
            work.label_map.labels,
            _fetcher(work, [truth.task_id for truth in truths]),
            lambda done, total: work.progress("preparing", done=done, total=total),
        )
        task_ids = [truth.task_id for truth in truths if truth.task_id not in report.left_out]
        content = {
            "task_ids": task_ids,
            "n_images": report.n_images,
            "n_boxes": report.n_boxes,
            "n_background": report.n_background,
            "boxes_per_class": dict(report.boxes_per_class),
            "left_out": {str(task_id): reason for task_id, reason in report.left_out.items()},
        }
        part = frozen.with_suffix(".part")
        part.write_text(json.dumps(content))
        os.replace(part, frozen)
    found = _Dataset(yaml=folder / "dataset" / "data.yaml", **json.loads(frozen.read_text()))
    with work.services.store.write() as connection:
        rounds.mark_seen(connection, work.project.id, work.round.id, found.task_ids)
    return found


def _fetcher(work: Work, task_ids: Sequence[int]) -> Callable[[int], bytes]:
    """Image bytes by task id, a few fetched ahead: Label Studio answers slowly, but several at a time."""
    own, key = work.services, work.label_map.image_key
    with own.store.read() as connection:
        query = select(tasks.c.task_id, tasks.c.image).where(tasks.c.project_id == work.project.id)
        image_of = {int(row.task_id): str(row.image) for row in connection.execute(query)}
    return Ahead(lambda task_id: own.images.fetch({key: image_of[task_id]}, key, task_id), task_ids)


class Ahead:
    """`fetch(task_id)`, with the next few of `task_ids` on their way while the caller works on this one."""

    def __init__(self, fetch: Callable[[int], bytes], task_ids: Sequence[int], width: int = 4) -> None:
        self._fetch = fetch
        self._order = list(task_ids)
        self._pool = ThreadPoolExecutor(width, thread_name_prefix="fetch")
        self._waiting: dict[int, Future[bytes]] = {}
        self._width = width
        self._next = 0

    def __call__(self, task_id: int) -> bytes:
        while self._next < len(self._order) and len(self._waiting) < 2 * self._width:
            ahead = self._order[self._next]
            self._waiting[ahead] = self._pool.submit(self._fetch, ahead)
            self._next += 1
        future = self._waiting.pop(task_id, None)
        if self._next >= len(self._order) and not self._waiting:
            self._pool.shutdown(wait=False)
        return self._fetch(task_id) if future is None else future.result()


def _base_weights(work: Work) -> BaseWeights:
    from worker.detector import BaseWeights, resolve_weights

    own, settings = work.services, work.settings
    if settings.warm_start:
        with own.store.read() as connection:
            earlier = measured_rounds(connection, work.project.id)
        if earlier:
            path = own.artifacts.local(earlier[-1].weights, earlier[-1].weights_sha256)
            return BaseWeights(str(path), True, f"Started from round {earlier[-1].number}'s weights.")
    return resolve_weights(settings.weights, own.settings.weights, own.settings.data_dir / "cache")


def _train_request(work: Work, dataset_yaml: Path, weights: str) -> TrainRequest:
    from worker.training import TrainRequest

    settings = work.settings
    return TrainRequest(
        dataset_yaml=dataset_yaml,
        run_dir=_folder(work) / "run",
        weights=weights,
        epochs=settings.epochs,
        imgsz=settings.imgsz,
        train_batch=settings.train_batch,
        nominal_batch=settings.nominal_batch,
        optimizer=settings.optimizer,
        lr0=settings.lr0,
        mosaic=settings.mosaic,
        mixup=settings.mixup_in(work.round.number),
        close_mosaic=settings.close_mosaic,
        freeze=settings.freeze,
        seed=settings.seed,
        device=work.services.settings.device,
    )


def _show_training(work: Work, now: TrainProgress) -> None:
    work.progress("training", epoch=now.epoch, epochs=now.epochs, losses=now.losses, eta_seconds=now.eta_seconds)


@dataclass(frozen=True)
class Measured:
    """A round's place on the learning curve: every round that can be compared with it, on the holdout as it is now."""

    evaluations: dict[int, evaluation.Evaluation]  # round id -> evaluation, oldest first, this round last
    labels: tuple[str, ...]  # class id -> label
    note: str


def measure(work: Work, weights: Path, truths: Sequence[TaskTruth], holdout: Sequence[int]) -> Measured:
    """One evaluation on the holdout. Detections are kept for all its images, labelled or not, so that labels that
    come later, or are corrected, can measure every round again."""
    from worker.detector import Detector, collect_detections

    own, key = work.services, work.label_map.image_key
    work.progress("evaluating")
    detector = Detector.load(weights, own.settings.device, half=False)  # in full precision, whatever the device
    broken: dict[int, str] = {}
    raw = collect_detections(
        detector,
        _holdout_images(work, holdout, key, broken),
        work.settings.imgsz,
        progress=lambda done: work.progress("evaluating", done=done, total=len(holdout)),
    )
    own.artifacts.put(work.key("detections.npz"), raw.save())
    labels = work.label_map.labels
    earlier, missing = _earlier_detections(work)
    detections = {**earlier, work.round.id: renamed(raw, detector.names, labels)}
    evaluations = on_common_images(detections, truths)
    own.artifacts.put(work.key("evaluation.npz"), evaluations[work.round.id].arrays.save())
    unread = f"{len(broken)} holdout images could not be read: {next(iter(broken.values()))}" if broken else ""
    return Measured(evaluations, labels, " ".join(filter(None, (evaluations[work.round.id].reason, unread, missing))))


def _holdout_images(work: Work, task_ids: Sequence[int], key: str, broken: dict[int, str]) -> Iterator[tuple[int, Any]]:
    fetch = _fetcher(work, task_ids)
    for task_id in task_ids:
        try:
            yield task_id, decode_image(fetch(task_id), work.services.images.max_pixels)
        except ImageUnusable as error:
            broken[task_id] = str(error)


def _earlier_detections(work: Work) -> tuple[dict[int, evaluation.Detections], str]:
    """What earlier rounds saw on the holdout, with class ids of today's label config; and which are lost."""
    with work.services.store.read() as connection:
        rows = [row for row in measured_rounds(connection, work.project.id) if row.id != work.round.id]
    found: dict[int, evaluation.Detections] = {}
    lost = []
    for row in rows:
        try:
            content = work.services.artifacts.get(round_key(row.project_id, row.number, "detections.npz"))
        except NotFound:
            lost.append(str(row.number))
            continue
        names = {int(key): name for key, name in loads(row.report).get("names", {}).items()}
        found[row.id] = renamed(evaluation.Detections.load(content), names, work.label_map.labels)
    return found, f"Detections of round {', '.join(lost)} are lost: it is not compared." if lost else ""


def _columns(found: evaluation.Evaluation, labels: Sequence[str]) -> dict[str, Any]:
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


def _write_curve(connection: Connection, work: Work, measured: Measured) -> None:
    """Every compared round's mAP, gain and AP per class, on one holdout; and this round's verdict."""
    labels_of = {row.id: row.labels for row in measured_rounds(connection, work.project.id)}
    this = connection.execute(select(round_rows.c.labels).where(round_rows.c.id == work.round.id)).scalar_one()
    points: list[tuple[int, float]] = []
    is_measured = measured.evaluations[work.round.id].map50 is not None
    for round_id, found in measured.evaluations.items():
        if not is_measured and round_id != work.round.id:
            continue  # without a labelled holdout today, the earlier figures are the best there are
        gain = None
        if found.map50 is not None:
            gain = round(found.map50 - points[-1][1], 6) if points else None
            points.append((this if round_id == work.round.id else labels_of[round_id], found.map50))
        row = update(round_rows).where(round_rows.c.id == round_id)
        connection.execute(row.values(gain=gain, **_columns(found, measured.labels)))
    query = select(func.sum(task_annotations.c.lead_time)).where(task_annotations.c.project_id == work.project.id)
    seconds = connection.execute(query.where(~task_annotations.c.cancelled)).scalar_one()
    verdict = base_verdict(points, work.settings.min_map_gain)
    values = {"minutes": (seconds or 0.0) / 60, "verdict": json.dumps(verdict)}
    connection.execute(update(round_rows).where(round_rows.c.id == work.round.id).values(**values))
