"""Select the next batch, write every prediction to Label Studio, switch to the new version, purge the old ones."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from sqlalchemy import Connection, bindparam, func, select, update

from worker import rounds, steps
from worker.errors import (
    HardfirstError,
    LabelStudioRefused,
    Unavailable,
)
from worker.label_studio import (
    is_our_version,
    model_version,
    names_missing_task,
    prediction,
    published_score,
)
from worker.selection import Batch, ScoredTasks, draw_holdout, first_batch, generator, next_batch
from worker.store import (
    get_project,
    labelled_task_ids,
    open_round_of,
    projects,
    scores,
    tasks,
    write_rows,
)
from worker.store import rounds as round_rows
from worker.syncing import sync_project
from worker.work import MEASURES, Work, clear_progress


def select_and_publish(work: Work) -> None:
    own = work.services
    work.progress("publishing")
    sync_project(own, work.project.id)
    batch = _select(work)
    _write_selection(work, batch)
    version = model_version(work.round.number)
    sent = _send_predictions(work, version, batch)
    work.lease.check()
    if sent:  # Label Studio refuses a version of which it has no prediction: nothing is left to label
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
    clear_progress(own, work.project.id)


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
        held = rounds.holdout_of(connection, work.project.id)
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
    undrawn = update(tasks).where(
        tasks.c.project_id == work.project.id, tasks.c.task_id == bindparam("of"), tasks.c.holdout.is_(None)
    )
    if chosen:  # the holdout in one transaction: killed after it, the next attempt draws no second one
        with work.services.store.write() as connection:
            connection.execute(undrawn.values(holdout=True), [{"of": task_id} for task_id in chosen])
    rest = [{"of": task_id} for task_id, value in new.items() if not value]
    write_rows(work.services.store, undrawn.values(holdout=False), rest)
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
    with own.store.read() as connection:
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
    this = (scores.c.round_id == work.round.id, scores.c.task_id == bindparam("of"))
    write_rows(own.store, update(scores).where(*this), values)
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


def _send_predictions(work: Work, version: str, batch: Batch) -> int:
    """Everything under the new version, while the old one is still served; whole, or not at all. How many there are.

    A killed attempt may have left some: they go first, or tasks would have two predictions of one version.
    """
    api = work.services.label_studio
    with work.services.store.read() as connection:
        wanted = _predictions_count(connection, work)
    if api.project(work.project.id).get("model_version") == version:
        return wanted  # an attempt that was killed after the switch: everything was written before it
    if api.versions(work.project.id).get(version):
        api.delete_version(work.project.id, version)
    try:
        api.import_predictions(work.project.id, _predictions(work, version, wanted))
    except LabelStudioRefused as refused:
        api.delete_version(work.project.id, version)
        if not names_missing_task(refused):
            raise
        sync_project(work.services, work.project.id, everything=True)
        raise Unavailable(
            "tasks were deleted in Label Studio while the batch was written; it is made anew"
        ) from refused
    except HardfirstError:
        if api.versions(work.project.id).get(version):
            api.delete_version(work.project.id, version)
        raise
    return wanted


def _unlabelled_scores(work: Work) -> Any:
    return (
        select(scores.c.task_id, scores.c.regions, scores.c.published_score, tasks.c.holdout)
        .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == work.project.id))
        .where(scores.c.round_id == work.round.id, ~tasks.c.deleted)
        .where(scores.c.task_id.not_in(labelled_task_ids(work.project.id)))
    )


def _predictions_count(connection: Connection, work: Work) -> int:
    return int(connection.execute(select(func.count()).select_from(_unlabelled_scores(work).subquery())).scalar_one())


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


def purge_versions(work: Work) -> None:
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
