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
from sqlalchemy import Connection, Row, func, select, update

from worker import evaluation, rounds, steps
from worker.artifacts import round_key
from worker.dataset import TaskTruth, lost_labels, write_dataset
from worker.errors import (
    ImageUnusable,
    NotFound,
    SettingsInvalid,
)
from worker.holdout import (
    earlier_detections,
    holdout_fingerprint,
    joined,
    remember_measured,
    truths_of,
)
from worker.images import decode_image
from worker.measuring import Measured, compare, renamed, write_curve
from worker.scoring import plan_scoring
from worker.selection import generator
from worker.settings import ProjectSettings
from worker.store import (
    get_project,
    loads,
    measured_rounds,
    scores,
    tasks,
)
from worker.store import rounds as round_rows
from worker.syncing import sync_label_config
from worker.uncertainty import chances_missed
from worker.work import Work

if TYPE_CHECKING:
    from worker.detector import BaseWeights
    from worker.training import TrainProgress, TrainRequest


MEMBER_SHARE = 0.8  # of the dataset: members that saw the same images would agree on them


def train_and_measure(work: Work) -> None:
    from worker.detector import prepare_ultralytics
    from worker.training import train

    own = work.services
    prepare_ultralytics(own.ultralytics_dir)
    work.progress("preparing")
    _remove_other_folders(work)
    sync_label_config(own, work.project.id)
    work = work.refreshed()
    with own.store.read() as connection:
        fingerprint = holdout_fingerprint(connection, work.project.id)  # before: what comes meanwhile measures again
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
        "notes": [note for note in (base.note, trained.note, measured.note, lost_labels(truths)) if note],
        "seconds": round(trained.seconds, 1),
        "left_out": dataset.left_out,
        "boxes_per_class": dataset.boxes_per_class,
        "chances_missed": chances_missed(measured.evaluations[work.round.id].arrays, work.settings),
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
        rounds.lock_project(connection, work.project.id)  # as who measures again does, before it writes the same rows
        write_curve(connection, work.project.id, measured, _settings_now(connection, work), this=work.round.id)
        remember_measured(connection, work.project.id, fingerprint)
        members = range(1, work.settings.committee_size)
        if members and work.settings.committee == "subsets":
            steps.add(connection, work.round.id, "member", members)
        else:
            steps.add(connection, work.round.id, "score", shards)

    steps.finish(work.lease, then)
    shutil.rmtree(_folder(work), ignore_errors=True)


def _settings_now(connection: Connection, work: Work) -> ProjectSettings:
    """The project's of this moment: what a gain is worth may have been set since the round began."""
    try:
        return rounds.settings_of(get_project(connection, work.project.id))
    except SettingsInvalid:  # somebody else's trouble, which the page shows: no training is lost for it
        return work.settings


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
    return truths_of(work.services, work.project.id, work.label_map)


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
            _fetcher(work, [truth.task_id for truth in truths if not truth.unusable]),
            lambda done, total: work.progress("preparing", done=done, total=total),
            work.services.images.max_pixels,
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

    device = work.services.settings.device
    return TrainRequest.of_round(
        work.settings, work.round.number, dataset_yaml, _folder(work) / "run", weights, device
    )


def _show_training(work: Work, now: TrainProgress) -> None:
    work.progress("training", epoch=now.epoch, epochs=now.epochs, losses=now.losses, eta_seconds=now.eta_seconds)


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
    incomplete = _complete_earlier(work, raw.keys.tolist(), truths)
    earlier, lost = earlier_detections(work.services, work.project.id, labels, but=work.round.id)
    unread = f"{len(broken)} holdout images could not be read: {next(iter(broken.values()))}" if broken else ""
    measured = compare({**earlier, work.round.id: renamed(raw, detector.names, labels)}, truths, labels)
    this = measured.evaluations[work.round.id]
    own.artifacts.put(work.key("evaluation.npz"), this.arrays.save())
    return replace(measured, note=" ".join(filter(None, (this.reason, unread, lost, incomplete))))


def _complete_earlier(work: Work, readable: Sequence[int], truths: Sequence[TaskTruth]) -> str:
    """Earlier detectors look at holdout images that joined after their round: rounds are compared on what all saw.

    Returns: a sentence about rounds whose weights are lost; they keep the comparison to the images they saw.
    """
    with work.services.store.read() as connection:
        rows = [row for row in measured_rounds(connection, work.project.id) if row.id != work.round.id]
    labelled = {truth.task_id for truth in truths if not truth.unusable} & set(readable)
    lost = []
    for row in rows:
        key = round_key(row.project_id, row.number, "detections.npz")
        try:
            seen = evaluation.Detections.load(work.services.artifacts.get(key))
        except NotFound:
            continue  # `earlier_detections` says so
        missing = sorted(labelled - set(seen.keys.tolist()))
        if missing and not _look_again(work, row, key, seen, missing):
            lost.append(str(row.number))
    told = f"Weights of round {', '.join(lost)} are lost: later holdout images are left out of the comparison."
    return told if lost else ""


def _look_again(work: Work, row: Row[Any], key: str, seen: evaluation.Detections, missing: Sequence[int]) -> bool:
    from worker.detector import Detector, collect_detections

    own = work.services
    try:
        path = own.artifacts.local(row.weights, row.weights_sha256)
    except NotFound:
        return False
    detector = Detector.load(path, own.settings.device, expected_sha256=row.weights_sha256, half=False)
    found = collect_detections(
        detector,
        _holdout_images(work, missing, work.label_map.image_key, {}),
        rounds.settings_of(row).imgsz,
        progress=lambda done: work.progress("evaluating", done=done, total=len(missing)),
    )
    work.lease.check()
    own.artifacts.put(key, joined(seen, found).save())
    return True


def _holdout_images(work: Work, task_ids: Sequence[int], key: str, broken: dict[int, str]) -> Iterator[tuple[int, Any]]:
    fetch = _fetcher(work, task_ids)
    for task_id in task_ids:
        try:
            yield task_id, decode_image(fetch(task_id), work.services.images.max_pixels)
        except ImageUnusable as error:
            broken[task_id] = str(error)
