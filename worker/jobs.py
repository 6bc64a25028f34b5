"""RQ jobs: plain functions that take ids. What one does is fenced by its step (worker.steps); what it needs it makes.

Importing this loads no torch; the jobs that need it import `worker.model` or `worker.training` themselves.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import Connection, Row, bindparam, delete, func, select, update

from worker import evaluation, queue, rounds, steps
from worker.artifacts import round_key
from worker.boxes import LabelMap
from worker.dataset import TaskTruth, truth_of, write_dataset
from worker.errors import (
    HardfirstError,
    ImageUnusable,
    JobFenced,
    LabelStudioRefused,
    NotFound,
    NothingToLabel,
    QueueUnavailable,
    Unavailable,
)
from worker.images import decode_image
from worker.label_studio import (
    is_our_version,
    model_version,
    names_missing_task,
    published_score,
)
from worker.measuring import base_verdict, renamed, truth_for
from worker.selection import Batch, ScoredTasks, draw_holdout, first_batch, generator, next_batch
from worker.services import Services, from_environment
from worker.settings import ProjectSettings
from worker.store import (
    task_annotations,
    get_project,
    get_round,
    insert_or_ignore,
    labelled_task_ids,
    loads,
    measured_rounds,
    open_round_of,
    projects,
    record_event,
    scores,
    tasks,
)
from worker.store import rounds as round_rows

if TYPE_CHECKING:
    from worker.detector import BaseWeights
    from worker.training import TrainProgress, TrainRequest

log = logging.getLogger(__name__)

WAIT = 5.0  # seconds until a step that waits for somebody looks again
MEASURES = ("least_confidence", "margin", "entropy")
LATE_AT_ONCE = 512
SPLIT_FIELD = "hardfirst"  # a task whose data says {"hardfirst": "holdout"} is in the holdout: bring your own
LATE_SHARD = -1
FULL_SYNC_EVERY = 1800.0  # counters cannot show every change (an annotation deleted and another made)

_own: dict[int, Services] = {}


def services() -> Services:
    """This process' connections; a forked child makes its own."""
    if os.getpid() not in _own:
        _own.clear()
        made = from_environment("worker")
        made.store.migrate()  # a worker may be the first to start, or on another host
        _own[os.getpid()] = made
    return _own[os.getpid()]


@dataclass(frozen=True)
class Work:
    """What the body of a step needs."""

    services: Services
    lease: steps.Lease
    project: Row[Any]
    round: Row[Any]

    @property
    def settings(self) -> ProjectSettings:
        return rounds.settings_of(self.round)

    @property
    def label_map(self) -> LabelMap:
        return LabelMap.from_config(self.project.label_config)

    def key(self, name: str) -> str:
        return round_key(self.project.id, self.round.number, name)

    def progress(self, phase: str, **fields: Any) -> None:
        """For the page. Also where a cancelled step ends."""
        self.lease.check()
        try:
            queue.set_progress(self.services.redis, self.project.id, phase=phase, round=self.round.number, **fields)
        except QueueUnavailable as error:
            log.warning("progress not shown: %s", error)


def attach(step_id: int, attempt: int) -> None:
    """Round 0, first step: the webhook, the tasks, the annotations there are, the weights for embeddings."""
    _run(step_id, attempt, _attach)


def retrain(step_id: int, attempt: int) -> None:
    """Dataset, training, evaluation on the holdout."""
    _run(step_id, attempt, _retrain)


def score_shard(step_id: int, attempt: int) -> None:
    """Boxes, uncertainty and embedding of one shard's images."""
    _run(step_id, attempt, _score_shard)


def publish(step_id: int, attempt: int) -> None:
    """Select the next batch, write every prediction to Label Studio, switch to the new version."""
    _run(step_id, attempt, _publish)


def purge(step_id: int, attempt: int) -> None:
    """Delete the versions published before. Off the critical path: Label Studio takes minutes for a large pool."""
    _run(step_id, attempt, _purge)


def _run(step_id: int, attempt: int, body: Callable[[Work], None]) -> None:
    own = services()
    lease = steps.claim(own.store, step_id, attempt)
    if lease is None:
        return
    try:
        with own.store.read() as connection:
            round_row = get_round(connection, lease.round_id)
            project = get_project(connection, round_row.project_id)
        with lease.kept():
            body(Work(own, lease, project, round_row))
    except JobFenced as fenced:
        log.info("%s", fenced)
    except Unavailable as away:
        steps.put_back(lease, str(away), WAIT)
        _tell(own, lease.round_id, str(away))
    except HardfirstError as error:
        _failed(own, lease, str(error), retry=False)
    except Exception as error:
        _failed(own, lease, f"{type(error).__name__}: {error}", retry=True)
        raise  # RQ logs it, with the traceback, and keeps the job as failed
    finally:
        steps.send_waiting(own.store, own.redis)


def _tell(own: Services, round_id: int, problem: str) -> None:
    with own.store.write() as connection:
        row = get_round(connection, round_id)
        connection.execute(update(projects).where(projects.c.id == row.project_id).values(problem=problem))


def _failed(own: Services, lease: steps.Lease, reason: str, *, retry: bool) -> None:
    try:
        final = steps.fail(lease, reason, retry=retry)
    except JobFenced:
        return
    if final and lease.kind != "purge":
        with own.store.write() as connection:
            rounds.close_round(connection, lease.round_id, "failed", reason)
            row = get_round(connection, lease.round_id)
            rounds.open_round_if_triggered(connection, row.project_id)
        _clear_progress(own, row.project_id)


def _clear_progress(own: Services, project_id: int) -> None:
    try:
        queue.clear_progress(own.redis, project_id)
    except QueueUnavailable as error:
        log.warning("progress not cleared: %s", error)


# --- attach ----------------------------------------------------------------------------------------------------------


def _attach(work: Work) -> None:
    work.progress("attaching")
    label_map = work.label_map  # refuse before anything is changed in Label Studio
    _adopt_webhook(work)
    _wait_for_import(work)
    sync_project(work.services, work.project.id, everything=True)
    with work.services.store.read() as connection:
        live = select(func.count()).select_from(tasks).where(tasks.c.project_id == work.project.id, ~tasks.c.deleted)
        if not connection.execute(live).scalar_one():
            raise NothingToLabel
    weights = _embedding_weights(work, label_map)

    def then(connection: Connection) -> None:
        connection.execute(update(round_rows).where(round_rows.c.id == work.round.id).values(**weights.columns))
        here = update(projects).where(projects.c.id == work.project.id)
        connection.execute(here.values(problem=None, notice=weights.notice))
        plan_scoring(connection, work)

    steps.finish(work.lease, then)


def _adopt_webhook(work: Work) -> None:
    """Label Studio registers its webhook to us right after it connected us: change that one."""
    own, project = work.services, work.project
    url = f"{project.backend_url.rstrip('/')}/webhook"
    for _ in range(5):
        if own.label_studio.find_webhook(project.id, url) is not None:
            break
        time.sleep(0.5)  # there is none after that: somebody deleted it, or connected us by hand
    webhook_id = own.label_studio.own_webhook(project.id, url, basic_auth(own))
    with own.store.write() as connection:
        connection.execute(update(projects).where(projects.c.id == project.id).values(webhook_id=webhook_id))


def basic_auth(own: Services) -> dict[str, str]:
    """The header that lets Label Studio's webhooks in, when the backend is guarded."""
    if not own.settings.user:
        return {}
    import base64

    pair = f"{own.settings.user}:{own.settings.password.get_secret_value()}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _wait_for_import(work: Work) -> None:
    """The holdout is drawn once: not from the first hundred tasks of an import that is still running."""
    count = -1
    while (now := int(work.services.label_studio.project(work.project.id).get("task_number") or 0)) != count:
        count = now
        if not count:
            raise NothingToLabel
        time.sleep(2.0)
        work.lease.check()


@dataclass(frozen=True)
class _Weights:
    columns: Mapping[str, Any]
    notice: str | None


def _embedding_weights(work: Work, label_map: LabelMap) -> _Weights:
    """The pretrained detector, kept as an artifact so that all workers use the same; else the descriptor."""
    from worker.descriptor import DESCRIPTOR_NAME
    from worker.detector import Detector, prepare_ultralytics, resolve_weights
    from worker.model import is_published_name

    own, settings = work.services, work.settings
    prepare_ultralytics(own.ultralytics_dir)
    base = resolve_weights(settings.weights, own.settings.weights, own.settings.data_dir / "cache")
    notice: str | None
    if not base.pretrained:
        notice = (
            f"{base.note} No pretrained backbone at hand: a colour-and-texture descriptor chooses the first batch. "
            "Learns after the first batch."
        )
        return _Weights({"weights": None, "weights_sha256": None, "embedder": DESCRIPTOR_NAME}, notice.strip())
    key = work.key("weights.pt")
    digest = own.artifacts.put(key, Path(base.path).read_bytes())
    detector = Detector.load(own.artifacts.local(key, digest), own.settings.device, expected_sha256=digest)
    if settings.weights and not is_published_name(settings.weights):
        label_map.classes_for(detector.names)  # somebody's own detector that knows none of the labels is a mistake
    notice = None if label_map.maps_any(detector.names) else "Draws no boxes yet: it learns after the first batch."
    return _Weights({"weights": key, "weights_sha256": digest, "embedder": Path(base.path).name}, notice)


def sync_project(own: Services, project_id: int, *, everything: bool = False) -> None:
    """Bring the store's copy of tasks and annotations to what Label Studio has.

    Counters decide whether there is anything to do, unless `everything`: listing 80,000 tasks takes a minute.
    """
    remote = own.label_studio.project(project_id)
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        stale = everything or _counters_differ(connection, project_id, remote)
    label_config = str(remote.get("label_config") or project.label_config)
    if stale:
        key = LabelMap.from_config(label_config).image_key
        images: dict[int, str] = {}
        declared: list[int] = []
        for page in own.label_studio.tasks(project_id):
            images |= {int(task["id"]): str((task.get("data") or {}).get(key) or "") for task in page}
            declared += [int(task["id"]) for task in page if (task.get("data") or {}).get(SPLIT_FIELD) == "holdout"]
        found = [
            {**annotation, "task": task["id"]}
            for page in own.label_studio.tasks(project_id, labelled_only=True)
            for task in page
            for annotation in task.get("annotations") or []
        ]
    with own.store.write() as connection:
        values = {"title": str(remote.get("title") or "")[:200], "label_config": label_config}
        connection.execute(update(projects).where(projects.c.id == project_id).values(**values))
        if not stale:
            return
        rounds.remember_tasks(connection, project_id, images)
        rounds.declare_holdout(connection, project_id, declared)
        rounds.forget_missing_tasks(connection, project_id, set(images))
        _note_missing_images(connection, project_id, images, key)
        rounds.remember_annotations(connection, project_id, found)
        kept = {int(annotation["id"]) for annotation in found}
        known = connection.execute(
            select(task_annotations.c.annotation_id).where(task_annotations.c.project_id == project_id)
        ).scalars()
        rounds.forget_annotations(connection, project_id, [key for key in known.all() if key not in kept])
        connection.execute(update(projects).where(projects.c.id == project_id).values(reconciled_at=time.time()))


def _note_missing_images(connection: Connection, project_id: int, images: Mapping[int, str], key: str) -> None:
    missing = [task_id for task_id, image in images.items() if not image]
    for task_id in missing:
        row = (tasks.c.project_id == project_id, tasks.c.task_id == task_id)
        connection.execute(update(tasks).where(*row).values(image_problem=f"the task's data has no field {key!r}"))


def _counters_differ(connection: Connection, project_id: int, remote: Mapping[str, Any]) -> bool:
    n_tasks = connection.execute(
        select(func.count()).select_from(tasks).where(tasks.c.project_id == project_id, ~tasks.c.deleted)
    ).scalar_one()
    query = select(func.count()).select_from(task_annotations).where(task_annotations.c.project_id == project_id)
    real = connection.execute(query.where(~task_annotations.c.cancelled)).scalar_one()
    skipped = connection.execute(query.where(task_annotations.c.cancelled)).scalar_one()
    ours = (n_tasks, real, skipped)
    theirs = tuple(
        int(remote.get(name) or 0) for name in ("task_number", "total_annotations_number", "skipped_annotations_number")
    )
    return ours != theirs


# --- training --------------------------------------------------------------------------------------------------------


def _retrain(work: Work) -> None:
    from worker.detector import prepare_ultralytics
    from worker.training import train

    own = work.services
    prepare_ultralytics(own.ultralytics_dir)
    work.progress("preparing")
    truths = _truths(work)
    with own.store.read() as connection:
        held = _holdout_of(connection, work.project.id)
    dataset = _dataset(work, [truth for truth in truths if held.get(truth.task_id) is not True])
    base = _base_weights(work)
    trained = train(_train_request(work, dataset.yaml, base.path), lambda now: _show_training(work, now))
    content = trained.weights.read_bytes()
    weights = {"weights": work.key("weights.pt"), "weights_sha256": own.artifacts.put(work.key("weights.pt"), content)}
    measured = measure(work, trained.weights, [truth for truth in truths if held.get(truth.task_id) is True], held)
    report = {
        "names": trained.names,
        "notes": [note for note in (base.note, trained.note, measured.note) if note],
        "seconds": round(trained.seconds, 1),
        "left_out": dataset.left_out,
        "boxes_per_class": dataset.boxes_per_class,
        "background": dataset.n_background,
        "base_weights": Path(base.path).name,
    }
    values = {"labels": dataset.n_images, "boxes": dataset.n_boxes, "report": json.dumps(report), **measured.columns}

    def then(connection: Connection) -> None:
        this = update(round_rows).where(round_rows.c.id == work.round.id)
        connection.execute(this.values(**values, **weights, embedder="the round's detector"))
        _write_curve(connection, work, measured)
        plan_scoring(connection, work)

    steps.finish(work.lease, then)
    shutil.rmtree(own.round_dir(work.project.id, work.round.number), ignore_errors=True)


def _truths(work: Work) -> list[TaskTruth]:
    """What Label Studio's export says, and the store's copy of it brought up to date."""
    exported = work.services.label_studio.export(work.project.id)
    label_map = work.label_map
    images = {int(task["id"]): str((task.get("data") or {}).get(label_map.image_key) or "") for task in exported}
    found = [{**one, "task": task["id"]} for task in exported for one in task.get("annotations") or []]
    with work.services.store.write() as connection:
        rounds.remember_tasks(connection, work.project.id, images)
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
    folder = work.services.round_dir(work.project.id, work.round.number)
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
        run_dir=work.services.round_dir(work.project.id, work.round.number) / "run",
        weights=weights,
        epochs=settings.epochs,
        imgsz=settings.imgsz,
        train_batch=settings.train_batch,
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
    """A round's place on the learning curve. `history`: mAP50 of every measured round, on the holdout as it is now."""

    columns: dict[str, Any]
    history: dict[int, float]  # round id -> mAP50, this round last
    note: str


def measure(work: Work, weights: Path, truths: Sequence[TaskTruth], held: Mapping[int, bool | None]) -> Measured:
    """One evaluation on the holdout. Detections are kept for all its images, labelled or not, so that labels that
    come later, or are corrected, can measure every round again."""
    from worker.detector import Detector, collect_detections

    own, key = work.services, work.label_map.image_key
    work.progress("evaluating")
    detector = Detector.load(weights, own.settings.device)
    broken: dict[int, str] = {}
    detections = collect_detections(
        detector,
        _holdout_images(work, [task_id for task_id, value in held.items() if value is True], key, broken),
        work.settings.imgsz,
        progress=lambda done: work.progress("evaluating", done=done),
    )
    own.artifacts.put(work.key("detections.npz"), detections.save())
    now = evaluation.evaluate(detections, truth_for(detections, truths))
    own.artifacts.put(work.key("evaluation.npz"), now.arrays.save())
    labels = work.label_map.labels
    per_class = {
        labels[class_id]: {"ap50": ap50, "ap50_95": now.ap50_95[class_id], "boxes": now.n_boxes[class_id]}
        for class_id, ap50 in now.ap50.items()
    }
    columns = {
        "map50": now.map50,
        "map50_95": now.map50_95,
        "holdout_labels": now.n_images,
        "per_class": json.dumps(per_class),
    }
    history = _history(work, truths)
    if now.map50 is not None:
        history[work.round.id] = now.map50
    unread = f"{len(broken)} holdout images could not be read: {next(iter(broken.values()))}" if broken else ""
    return Measured(columns, history, " ".join(part for part in (now.reason, unread) if part))


def _holdout_images(work: Work, task_ids: Sequence[int], key: str, broken: dict[int, str]) -> Iterator[tuple[int, Any]]:
    fetch = _fetcher(work, task_ids)
    for task_id in task_ids:
        try:
            yield task_id, decode_image(fetch(task_id), work.services.images.max_pixels)
        except ImageUnusable as error:
            broken[task_id] = str(error)


def _history(work: Work, truths: Sequence[TaskTruth]) -> dict[int, float]:
    """Earlier rounds, measured again on the holdout as it is labelled today: points of one curve must be comparable."""
    own = work.services
    with own.store.read() as connection:
        earlier = measured_rounds(connection, work.project.id)
    history: dict[int, float] = {}
    for row in earlier:
        if row.id == work.round.id:
            continue
        content = own.artifacts.get(round_key(row.project_id, row.number, "detections.npz"))
        names = {int(key): name for key, name in loads(row.report).get("names", {}).items()}
        detections = renamed(evaluation.Detections.load(content), names, work.label_map.labels)
        again = evaluation.evaluate(detections, truth_for(detections, truths))
        if again.map50 is not None:
            history[row.id] = again.map50
    return history


def _write_curve(connection: Connection, work: Work, measured: Measured) -> None:
    """mAP50 and gain of every measured round, and this round's verdict."""
    before: float | None = None
    for round_id, map50 in measured.history.items():
        gain = None if before is None else round(map50 - before, 6)
        connection.execute(update(round_rows).where(round_rows.c.id == round_id).values(map50=map50, gain=gain))
        before = map50
    query = select(func.sum(task_annotations.c.lead_time)).where(task_annotations.c.project_id == work.project.id)
    seconds = connection.execute(query.where(~task_annotations.c.cancelled)).scalar_one()
    rows = {row.id: row for row in measured_rounds(connection, work.project.id)}
    points = [(rows[round_id].labels, map50) for round_id, map50 in measured.history.items() if round_id in rows]
    verdict = base_verdict(points, work.settings.min_map_gain)
    connection.execute(
        update(round_rows)
        .where(round_rows.c.id == work.round.id)
        .values(minutes=(seconds or 0.0) / 60, verdict=json.dumps(verdict))
    )


# --- scoring ---------------------------------------------------------------------------------------------------------


def plan_scoring(connection: Connection, work: Work) -> None:
    """Shards of all live tasks: the pool for its utility, the labelled and the holdout for their embeddings."""
    connection.execute(delete(scores).where(scores.c.round_id == work.round.id))
    ids = connection.execute(
        select(tasks.c.task_id)
        .where(tasks.c.project_id == work.project.id, ~tasks.c.deleted, tasks.c.image != "")
        .order_by(tasks.c.task_id)
    ).scalars()
    size = work.services.settings.shard_size
    rows = [
        {"round_id": work.round.id, "task_id": task_id, "shard": position // size}
        for position, task_id in enumerate(ids.all())
    ]
    insert_or_ignore(connection, scores, rows)
    steps.add(connection, work.round.id, "score", shards=range(rows[-1]["shard"] + 1 if rows else 1))


def _score_shard(work: Work) -> None:
    from worker.model import SCORERS

    own, shard = work.services, work.lease.shard
    with own.store.read() as connection:
        images = _shard_images(connection, work, shard)
        total, before = _scored_so_far(connection, work)
    scorer = SCORERS.get(own, work.project, work.round)
    found = list(scorer.score(images, lambda done: work.progress("scoring", done=before + done, total=total)))
    usable = [score for score in found if score.embedding is not None]
    if usable:
        buffer = io.BytesIO()
        np.save(buffer, np.stack([score.embedding for score in usable if score.embedding is not None]))
        own.artifacts.put(work.key(f"embeddings-{shard:05d}.npy"), buffer.getvalue())
    row_of = {score.task_id: row for row, score in enumerate(usable)}

    def then(connection: Connection) -> None:
        steps.add(connection, work.round.id, "publish")

    with own.store.write() as connection:
        if found:
            connection.execute(
                update(scores).where(scores.c.round_id == work.round.id, scores.c.task_id == bindparam("of")),
                [{"of": score.task_id, **score_columns(score), "row": row_of.get(score.task_id)} for score in found],
            )
        _note_problems(connection, work.project.id, {score.task_id: score.problem for score in found})
    steps.finish(work.lease, then)


def _shard_images(connection: Connection, work: Work, shard: int) -> list[tuple[int, str]]:
    query = (
        select(tasks.c.task_id, tasks.c.image)
        .join(scores, (scores.c.task_id == tasks.c.task_id) & (scores.c.round_id == work.round.id))
        .where(tasks.c.project_id == work.project.id, scores.c.shard == shard)
        .order_by(tasks.c.task_id)
    )
    return [(int(row.task_id), str(row.image)) for row in connection.execute(query)]


def _scored_so_far(connection: Connection, work: Work) -> tuple[int, int]:
    query = select(func.count()).select_from(scores).where(scores.c.round_id == work.round.id)
    done = query.where((scores.c.row.is_not(None)) | (scores.c.problem.is_not(None)))
    return int(connection.execute(query).scalar_one()), int(connection.execute(done).scalar_one())


def score_columns(score: Any) -> dict[str, Any]:
    """A TaskScore as columns of `scores`."""
    measures = {name: score.measures.get(name) for name in MEASURES}
    return {
        **measures,
        "regions": json.dumps(score.regions),
        "n_boxes": len(score.regions),
        "problem": score.problem,
    }


def _note_problems(connection: Connection, project_id: int, problems: Mapping[int, str | None]) -> None:
    if problems:
        connection.execute(
            update(tasks).where(tasks.c.project_id == project_id, tasks.c.task_id == bindparam("of")),
            [{"of": task_id, "image_problem": problem} for task_id, problem in problems.items()],
        )


# --- publishing ------------------------------------------------------------------------------------------------------


def _publish(work: Work) -> None:
    own = work.services
    work.progress("publishing")
    sync_project(own, work.project.id)
    batch = _select(work)
    _write_selection(work, batch)
    version = model_version(work.round.number)
    _send_predictions(work, version, batch)
    work.lease.check()
    own.label_studio.publish_version(work.project.id, version)
    view_id = own.label_studio.show_batch_tab(work.project.id, version, work.project.view_id)

    def then(connection: Connection) -> None:
        here = update(projects).where(projects.c.id == work.project.id)
        connection.execute(
            here.values(published_version=version, published_round_id=work.round.id, view_id=view_id, problem=None)
        )
        asked = _training_share(connection, work, batch)
        values = {"model_version": version, "batch_size": asked}
        connection.execute(update(round_rows).where(round_rows.c.id == work.round.id).values(**values))
        rounds.close_round(connection, work.round.id, "done")
        steps.add(connection, work.round.id, "purge")
        rounds.open_round_if_triggered(connection, work.project.id)

    steps.finish(work.lease, then)
    _clear_progress(own, work.project.id)


def _training_share(connection: Connection, work: Work, batch: Batch) -> int:
    """What opens the next round by default: all of the first batch, later the batch without its holdout tasks."""
    if work.round.number == 0:
        return len(batch.task_ids)
    holdout = select(tasks.c.task_id).where(tasks.c.project_id == work.project.id, tasks.c.holdout.is_(True))
    held = set(connection.execute(holdout).scalars().all())
    return sum(1 for task_id in batch.task_ids if task_id not in held) or len(batch.task_ids)


def _select(work: Work) -> Batch:
    own = work.services
    with own.store.read() as connection:
        scored = _scored_tasks(connection, work)
        labelled = rounds.task_ids_of_annotations(connection, work.project.id)
        held = _holdout_of(connection, work.project.id)
    is_labelled = np.isin(scored.task_ids, list(labelled))
    notes: list[str] = []
    if None in held.values():
        held, notes = _draw_splits(work, scored, is_labelled, held)
    in_holdout = np.array([held.get(int(task_id)) is True for task_id in scored.task_ids], dtype=bool)
    pool = scored.rows(~is_labelled & ~in_holdout)
    known = scored.rows(is_labelled | in_holdout)  # neither is asked for again, nor are their near-duplicates
    left = [int(task_id) for task_id in scored.task_ids[in_holdout & ~is_labelled]]
    generator(work.settings, work.project.id, 0, "holdout order").shuffle(left)
    if work.round.number == 0:
        batch = first_batch(pool, known, left, work.settings, work.project.id)
    else:
        batch = next_batch(pool, known, left, work.settings, work.project.id, work.round.number)
    batch.notes.extend(notes)
    return batch


def _holdout_of(connection: Connection, project_id: int) -> dict[int, bool | None]:
    query = select(tasks.c.task_id, tasks.c.holdout).where(tasks.c.project_id == project_id, ~tasks.c.deleted)
    return {int(row.task_id): row.holdout for row in connection.execute(query)}


def _draw_splits(
    work: Work, scored: ScoredTasks, is_labelled: Any, held: dict[int, bool | None]
) -> tuple[dict[int, bool | None], list[str]]:
    """Once per project. Tasks that come later are for training."""
    settings = work.settings
    chosen: set[int] = set()
    notes: list[str] = []
    if all(value is None for value in held.values()):
        size = settings.holdout_for(len(scored.task_ids))
        rng = generator(settings, work.project.id, 0, "holdout")
        chosen, notes = draw_holdout(scored, is_labelled, size, settings.near_duplicate_threshold, rng)
    new = {task_id: task_id in chosen for task_id, value in held.items() if value is None}
    with work.services.store.write() as connection:
        connection.execute(
            update(tasks).where(
                tasks.c.project_id == work.project.id, tasks.c.task_id == bindparam("of"), tasks.c.holdout.is_(None)
            ),
            [{"of": task_id, "holdout": value} for task_id, value in new.items()],
        )
    return {**held, **new}, notes


def _scored_tasks(connection: Connection, work: Work) -> ScoredTasks:
    query = (
        select(scores.c.task_id, scores.c.shard, scores.c.row, *(scores.c[name] for name in MEASURES))
        .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == work.project.id))
        .where(scores.c.round_id == work.round.id, scores.c.row.is_not(None), scores.c.shard >= 0, ~tasks.c.deleted)
        .order_by(scores.c.task_id)
    )
    rows = connection.execute(query).all()
    shards: dict[int, Any] = {}
    for shard in sorted({row.shard for row in rows}):
        content = work.services.artifacts.get(work.key(f"embeddings-{shard:05d}.npy"))
        shards[shard] = np.load(io.BytesIO(content), allow_pickle=False)
    size = next(iter(shards.values())).shape[1] if shards else 1
    embeddings = np.zeros((len(rows), size), dtype=np.float32)
    for position, row in enumerate(rows):
        embeddings[position] = shards[row.shard][row.row]
    measures = {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in MEASURES}
    return ScoredTasks(np.array([row.task_id for row in rows], dtype=np.int64), embeddings, measures)


def _write_selection(work: Work, batch: Batch) -> None:
    """Ranks, utilities and scores; the manifest; what late tasks are scored with."""
    own = work.services
    rank_of = {task_id: rank for rank, task_id in enumerate(batch.task_ids)}
    n = len(batch.task_ids)
    with own.store.write() as connection:
        ids = connection.execute(select(scores.c.task_id).where(scores.c.round_id == work.round.id)).scalars().all()
        values = []
        for task_id in ids:
            utility = batch.utilities.get(task_id, 0.0)
            part = batch.parts.get(task_id, {})
            values.append(
                {
                    "of": task_id,
                    "rank": rank_of.get(task_id),
                    "utility": utility,
                    "uncertainty": part.get("uncertainty"),
                    "diversity": part.get("diversity"),
                    "published_score": published_score(rank_of.get(task_id), utility, n),
                }
            )
        if values:
            this = (scores.c.round_id == work.round.id, scores.c.task_id == bindparam("of"))
            connection.execute(update(scores).where(*this), values)
    note = {"strategy": batch.strategy, "options": batch.options, "late": batch.late, "notes": batch.notes}
    own.artifacts.put_arrays(work.key("selection.npz"), batch.late_arrays, note)
    manifest = {
        "project": work.project.id,
        "round": work.round.number,
        "strategy": batch.strategy,
        "options": batch.options,
        "notes": batch.notes,
        "tasks": [
            {"rank": rank, "task_id": task_id, "utility": batch.utilities.get(task_id), **batch.parts.get(task_id, {})}
            for rank, task_id in enumerate(batch.task_ids)
        ],
    }
    own.artifacts.put(work.key("manifest.json"), json.dumps(manifest, indent=1).encode())


def _send_predictions(work: Work, version: str, batch: Batch) -> None:
    """Everything under the new version, while the old one is still served; whole, or not at all.

    A killed attempt may have left some: they go first, or tasks would have two predictions of one version.
    """
    api = work.services.label_studio
    with work.services.store.read() as connection:
        wanted = _predictions_count(connection, work)
    present = api.versions(work.project.id).get(version, 0)
    if present:
        api.delete_version(work.project.id, version)
    try:
        api.import_predictions(work.project.id, _predictions(work, version, wanted))
    except LabelStudioRefused as refused:
        api.delete_version(work.project.id, version)
        if not names_missing_task(refused):
            raise
        sync_project(work.services, work.project.id, everything=True)
        raise Unavailable("tasks were deleted in Label Studio while the batch was written; it is made anew") from refused
    except HardfirstError:
        if api.versions(work.project.id).get(version):
            api.delete_version(work.project.id, version)
        raise


def _unlabelled_scores(work: Work) -> Any:
    return (
        select(scores.c.task_id, scores.c.regions, scores.c.published_score, tasks.c.holdout)
        .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == work.project.id))
        .where(scores.c.round_id == work.round.id, ~tasks.c.deleted)
        .where(scores.c.task_id.not_in(labelled_task_ids(work.project.id)))
    )


def _predictions_count(connection: Connection, work: Work) -> int:
    return int(
        connection.execute(select(func.count()).select_from(_unlabelled_scores(work).subquery())).scalar_one()
    )


def _predictions(work: Work, version: str, total: int) -> Iterator[dict[str, Any]]:
    """Best first. The holdout gets no boxes: its labels must not lean on the model they will measure."""
    with work.services.store.read() as connection:
        rows = connection.execute(
            _unlabelled_scores(work).order_by(scores.c.published_score, scores.c.task_id)
        ).yield_per(1000)
        for done, row in enumerate(rows, start=1):
            if done % 1000 == 0:
                work.progress("publishing", done=done, total=total)
            yield prediction(row.task_id, row.regions, row.published_score, version, bool(row.holdout))


def prediction(task_id: int, regions: str | None, score: float | None, version: str, holdout: bool) -> dict[str, Any]:
    """One prediction as Label Studio's bulk import takes it."""
    result = [] if holdout or not regions else json.loads(regions)
    return {"task": task_id, "result": result, "score": 1.0 if score is None else score, "model_version": version}


def _purge(work: Work) -> None:
    """Versions of ours that are neither served nor about to be."""
    with work.services.store.read() as connection:
        project = get_project(connection, work.project.id)
        open_round = open_round_of(connection, work.project.id)
    coming = None if open_round is None else model_version(open_round.number)
    for version in work.services.label_studio.versions(work.project.id):
        if is_our_version(version) and version not in (project.published_version, coming):
            work.lease.check()
            work.services.label_studio.delete_version(work.project.id, version)
    steps.finish(work.lease, lambda connection: None)


# --- live and late ---------------------------------------------------------------------------------------------------


def predict(project_id: int, images: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Predictions for tasks that have none stored: [task id, image reference] each. Stores and returns them."""
    return _score_alone(services(), project_id, [(int(task_id), str(image)) for task_id, image in images])


def _score_alone(own: Services, project_id: int, images: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    from worker.model import HardfirstModel

    with own.store.read() as connection:
        project = get_project(connection, project_id)
    key = LabelMap.from_config(project.label_config).image_key
    model = HardfirstModel(project.label_config, services=own)
    answers = model.predict([{"id": task_id, "project": project_id, "data": {key: image}} for task_id, image in images])
    if project.published_round_id is not None:
        _keep_answers(own, project, [task_id for task_id, _ in images], answers)
    return answers


def _keep_answers(own: Services, project: Row[Any], task_ids: Sequence[int], answers: Sequence[dict[str, Any]]) -> None:
    rows = [
        {
            "round_id": project.published_round_id,
            "task_id": task_id,
            "shard": LATE_SHARD,
            **{name: answer.get("measures", {}).get(name) for name in MEASURES},
            "utility": answer.get("utility", 0.0),
            "published_score": answer["score"],
            "regions": json.dumps(answer["result"]),
            "n_boxes": len(answer["result"]),
            "problem": answer.get("problem"),
            "sent": False,
        }
        for task_id, answer in zip(task_ids, answers, strict=True)
        if answer["model_version"] == project.published_version
    ]
    with own.store.write() as connection:
        known = connection.execute(
            select(tasks.c.task_id).where(tasks.c.project_id == project.id, tasks.c.task_id.in_(task_ids))
        )
        ours = set(known.scalars().all())  # a task of somebody's invention leaves no trace
        insert_or_ignore(connection, scores, [row for row in rows if row["task_id"] in ours])
        _note_problems(connection, project.id, {row["task_id"]: row["problem"] for row in rows if row["task_id"] in ours})


def reconcile() -> None:
    """Every minute: send again what was lost, and find what webhooks missed."""
    own = services()
    for done in steps.sweep(own.store, own.redis):
        log.warning("%s; sent again", done)
    with own.store.write() as connection:
        rounds.close_dead_rounds(connection)
    with own.store.read() as connection:
        rows = connection.execute(select(projects)).all()
    for project in rows:
        try:
            _reconcile_project(own, project)
        except Unavailable as away:
            log.warning("project %s not reconciled: %s", project.id, away)
        except HardfirstError as error:
            log.warning("project %s not reconciled: %s", project.id, error)
            _set_problem(own, project.id, str(error))
    steps.send_waiting(own.store, own.redis)


def _set_problem(own: Services, project_id: int, problem: str) -> None:
    with own.store.write() as connection:
        connection.execute(update(projects).where(projects.c.id == project_id).values(problem=problem))


def _reconcile_project(own: Services, project: Row[Any]) -> None:
    if project.published_round_id is None:
        return  # round 0 looks for itself
    stale = time.time() - (project.reconciled_at or 0) > FULL_SYNC_EVERY
    try:
        sync_project(own, project.id, everything=stale)
    except NotFound:
        _set_problem(own, project.id, "Label Studio no longer has this project")
        return
    with own.store.write() as connection:
        opened = rounds.open_round_if_triggered(connection, project.id)
    if opened is not None:
        with own.store.write() as connection:
            record_event(connection, project.id, "reconciled", detail="a round was opened for labels no webhook brought")
    _score_late(own, project)


def _score_late(own: Services, project: Row[Any]) -> None:
    """Tasks imported after the round was planned: scored alone, slotted into the order that is served.

    Also sends what a live prediction scored too late for Label Studio to wait for.
    """
    with own.store.read() as connection:
        project = get_project(connection, project.id)
        scored = select(scores.c.task_id).where(scores.c.round_id == project.published_round_id)
        query = (
            select(tasks.c.task_id, tasks.c.image)
            .where(tasks.c.project_id == project.id, ~tasks.c.deleted, tasks.c.image != "")
            .where(tasks.c.task_id.not_in(scored), tasks.c.task_id.not_in(labelled_task_ids(project.id)))
            .limit(LATE_AT_ONCE)
        )
        late = [(int(row.task_id), str(row.image)) for row in connection.execute(query)]
    if late:
        _score_alone(own, project.id, late)
    with own.store.read() as connection:
        query = (
            select(scores.c.task_id, scores.c.regions, scores.c.published_score, tasks.c.holdout)
            .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project.id))
            .where(scores.c.round_id == project.published_round_id, scores.c.shard == LATE_SHARD, ~scores.c.sent)
        )
        unsent = connection.execute(query).all()
    version = str(project.published_version)
    own.label_studio.import_predictions(
        project.id,
        [prediction(row.task_id, row.regions, row.published_score, version, bool(row.holdout)) for row in unsent],
    )
    mark_sent(own, project.published_round_id, [row.task_id for row in unsent])


def mark_sent(own: Services, round_id: int, task_ids: Sequence[int]) -> None:
    """Label Studio has these late predictions."""
    if not task_ids:
        return
    with own.store.write() as connection:
        these = (scores.c.round_id == round_id, scores.c.task_id.in_(task_ids))
        connection.execute(update(scores).where(*these).values(sent=True))
