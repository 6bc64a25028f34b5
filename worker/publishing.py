"""Select the next batch, write every prediction to Label Studio, switch to the new version, purge the old ones."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, bindparam, func, select, update

from strategies.diversity import near_duplicates_of_labelled
from strategies.late import DISAGREEMENT
from worker import rounds, steps
from worker.errors import (
    HardfirstError,
    JobFenced,
    LabelStudioRefused,
    Unavailable,
)
from worker.holdout import grow_holdout
from worker.label_studio import (
    is_our_version,
    model_version,
    names_missing_task,
    prediction,
    published_score,
)
from worker.pruning import prune
from worker.reuse import shard_embeddings
from worker.selection import Batch, ScoredTasks, draw_holdout, first_batch, generator, next_batch
from worker.services import Services
from worker.settings import ProjectSettings
from worker.shapes import label_drawn
from worker.store import (
    get_project,
    labelled_task_ids,
    loads,
    open_round_of,
    projects,
    scores,
    tasks,
    write_rows,
)
from worker.store import rounds as round_rows
from worker.syncing import sync_project
from worker.work import MEASURES, Work, clear_progress

log = logging.getLogger(__name__)

MAX_ALIKE = 24  # task ids in the manifest; their number is exact


def select_and_publish(work: Work) -> None:
    own = work.services
    work.progress("publishing")
    version = model_version(work.round.number)
    if not _switched_before(work, version):
        sync_project(own, work.project.id)
        work = work.refreshed()
        batch = _select(work)
        work.lease.hold()
        _write_selection(work, batch)
        sent = _send_predictions(work, version)
        work.lease.hold()  # from here on there is no way back: a cancelled round must not be served
        if sent:  # Label Studio refuses a version of which it has no prediction: nothing is left to label
            own.label_studio.publish_version(work.project.id, version)
    view_id = _show_tab(work, version)

    def then(connection: Connection) -> None:
        here = update(projects).where(projects.c.id == work.project.id)
        connection.execute(
            here.values(published_version=version, published_round_id=work.round.id, view_id=view_id, problem=None)
        )
        values = {"model_version": version, "batch_size": _training_share(connection, work)}
        connection.execute(update(round_rows).where(round_rows.c.id == work.round.id).values(**values))
        rounds.close_round(connection, work.round.id, "done")
        steps.add(connection, work.round.id, "purge")
        rounds.open_round_if_triggered(connection, work.project.id)

    steps.finish(work.lease, then)
    clear_progress(own, work.project.id)


def _switched_before(work: Work, version: str) -> bool:
    """An attempt was killed after the switch: what it selected stands; selecting again could differ from it.

    A version of this name that another store published is none of ours.
    """
    selected = select(scores.c.task_id).where(
        scores.c.round_id == work.round.id, scores.c.published_score.is_not(None)
    )
    with work.services.store.read() as connection:
        if connection.execute(selected.limit(1)).first() is None:
            return False
    return bool(work.services.label_studio.project(work.project.id).get("model_version") == version)


def _show_tab(work: Work, version: str) -> int | None:
    """The Data Manager's tab: a convenience, for which no round fails."""
    known: int | None = work.project.view_id
    try:
        return work.services.label_studio.show_batch_tab(work.project.id, version, known)
    except HardfirstError as error:
        log.warning("project %s: the tab with the batch was not made: %s", work.project.id, error)
        return known


def _training_share(connection: Connection, work: Work) -> int:
    """What opens the next round by default: all of the first batch, later the batch without its holdout tasks."""
    batch = (
        select(func.count())
        .select_from(scores)
        .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == work.project.id))
        .where(scores.c.round_id == work.round.id, scores.c.rank.is_not(None))
    )
    everything = int(connection.execute(batch).scalar_one())
    if work.round.number == 0:
        return everything
    return int(connection.execute(batch.where(tasks.c.holdout.is_not(True))).scalar_one()) or everything


def _select(work: Work) -> Batch:
    own = work.services
    with own.store.read() as connection:
        scored = scored_tasks(connection, own, work.round)
        labelled = rounds.task_ids_of_annotations(connection, work.project.id)
        held = rounds.holdout_of(connection, work.project.id)
        barred = rounds.not_for_training(connection, work.project.id)
    is_labelled = np.isin(scored.task_ids, list(labelled))
    notes: list[str] = []
    if None in held.values():
        held, notes = _draw_splits(work, scored, is_labelled, held)
        with own.store.read() as connection:
            barred = rounds.not_for_training(connection, work.project.id)
    held, grown = grow_holdout(work, scored, is_labelled, held)
    if grown is not None:
        notes += grown
        with own.store.read() as connection:
            barred = rounds.not_for_training(connection, work.project.id)
    batch = choose(scored, is_labelled, held, barred, work.settings, work.project.id, work.round.number)
    batch.notes.extend(notes)
    return batch


def choose(
    scored: ScoredTasks,
    is_labelled: NDArray[np.bool_],
    held: Mapping[int, bool | None],
    barred: set[int],
    settings: ProjectSettings,
    project_id: int,
    number: int,
) -> Batch:
    """The batch of round `number`: what is left of the holdout, and what the strategy picks. Writes nothing.

    Args:
        scored: all scored tasks.
        is_labelled: (N,) has an annotation.
        held: task id -> in the holdout?
        barred: task ids that are never trained on.
    """
    in_holdout = np.array([held.get(int(task_id)) is True for task_id in scored.task_ids], dtype=bool)
    is_barred = np.isin(scored.task_ids, list(barred))
    pool = scored.rows(~is_labelled & ~is_barred)
    is_trained = is_labelled & ~in_holdout & ~is_barred
    known = scored.rows(is_trained)
    untrained = scored.rows((is_labelled | in_holdout) & ~is_trained)
    left = [int(task_id) for task_id in scored.task_ids[in_holdout & ~is_labelled]]
    generator(settings, project_id, 0, "holdout order").shuffle(left)
    if number == 0:
        return first_batch(pool, known, left, settings, project_id, untrained)
    return next_batch(pool, known, left, settings, project_id, number, untrained)


def _draw_splits(
    work: Work, scored: ScoredTasks, is_labelled: Any, held: dict[int, bool | None]
) -> tuple[dict[int, bool | None], list[str]]:
    """The holdout, once per project, in round 0. Tasks that come later are for training, but for the holdout's twins.

    A holdout drawn later would hold images that were trained on.
    """
    settings = work.settings
    chosen: set[int] = set()
    notes: list[str] = []
    if work.round.number == 0 and all(value is None for value in held.values()):
        size = settings.holdout_for(len(scored.task_ids))
        rng = generator(settings, work.project.id, 0, "holdout")
        chosen, notes = draw_holdout(scored, is_labelled, size, settings.near_duplicate_threshold, rng)
    undrawn = update(tasks).where(
        tasks.c.project_id == work.project.id, tasks.c.task_id == bindparam("of"), tasks.c.holdout.is_(None)
    )
    if chosen:  # the holdout in one transaction: killed after it, the next attempt draws no second one
        with work.services.store.write() as connection:
            connection.execute(undrawn.values(holdout=True), [{"of": task_id} for task_id in chosen])
    new = {task_id: task_id in chosen for task_id, value in held.items() if value is None}
    rest = [task_id for task_id, value in new.items() if not value]
    if work.round.number > 0:
        notes = notes + _mark_twins(work, scored, rest, held)
    write_rows(work.services.store, undrawn.values(holdout=False), [{"of": task_id} for task_id in rest])
    return {**held, **new}, notes


def _mark_twins(
    work: Work, scored: ScoredTasks, came_later: list[int], held: dict[int, bool | None]
) -> list[str]:
    """Near-duplicates of holdout images among tasks that came after the draw: never trained on."""
    late = np.isin(scored.task_ids, came_later)
    holdout = np.array([held.get(int(task_id)) is True for task_id in scored.task_ids], dtype=bool)
    if not late.any() or not holdout.any():
        return []
    threshold = work.settings.near_duplicate_threshold
    alike = near_duplicates_of_labelled(scored.embeddings[late], scored.embeddings[holdout], threshold)
    twins = [int(task_id) for task_id in scored.task_ids[late][alike]]
    row = (tasks.c.project_id == work.project.id, tasks.c.task_id == bindparam("of"))
    write_rows(work.services.store, update(tasks).where(*row).values(twin=True), [{"of": one} for one in twins])
    return [f"{len(twins)} new images look like images of the holdout: they are not trained on"] if twins else []


def scored_tasks(connection: Connection, own: Services, round_row: Row[Any]) -> ScoredTasks:
    """What a round scored, by task id, with its embeddings. Not what was scored alone after it."""
    query = (
        select(scores.c.task_id, scores.c.shard, scores.c.row, *(scores.c[name] for name in (*MEASURES, DISAGREEMENT)))
        .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == round_row.project_id))
        .where(scores.c.round_id == round_row.id, scores.c.row.is_not(None), scores.c.shard >= 0, ~tasks.c.deleted)
        .order_by(scores.c.task_id)
    )
    rows = connection.execute(query).all()
    shards = {
        shard: shard_embeddings(own, round_row.project_id, round_row.number, shard)
        for shard in sorted({row.shard for row in rows})
    }
    size = next(iter(shards.values())).shape[1] if shards else 1
    embeddings = np.zeros((len(rows), size), dtype=np.float32)
    for position, row in enumerate(rows):
        embeddings[position] = shards[row.shard][row.row]
    measures = {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in MEASURES}
    votes = [row.disagreement for row in rows]
    disagreement = None if None in votes or not votes else np.array(votes, dtype=np.float64)
    return ScoredTasks(np.array([row.task_id for row in rows], dtype=np.int64), embeddings, measures, disagreement)


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
            {
                "rank": rank,
                "task_id": task_id,
                "utility": batch.utilities.get(task_id),
                **batch.parts.get(task_id, {}),
                **_alike(batch.alike.get(task_id, [])),
            }
            for rank, task_id in enumerate(batch.task_ids)
        ],
        "classes": class_counts(own, work.round.id, [one for one in batch.task_ids if one in batch.utilities]),
    }
    own.artifacts.put(work.key("manifest.json"), json.dumps(manifest, indent=1).encode())


def _alike(task_ids: list[int]) -> dict[str, Any]:
    return {"alike": len(task_ids), "alike_task_ids": task_ids[:MAX_ALIKE]} if task_ids else {}


def class_counts(own: Services, round_id: int, task_ids: Sequence[int]) -> dict[str, int]:
    """Label -> boxes that a round predicted on these tasks."""
    found: Counter[str] = Counter()
    with own.store.read() as connection:
        for start in range(0, len(task_ids), 500):
            query = select(scores.c.regions).where(
                scores.c.round_id == round_id, scores.c.task_id.in_(task_ids[start : start + 500])
            )
            for regions in connection.execute(query).scalars():
                found.update(label for region in loads(regions) if (label := label_drawn(region)) is not None)
    return dict(found)


def _send_predictions(work: Work, version: str) -> int:
    """Everything under the new version, while the old one is still served; whole, or not at all. How many there are.

    A killed attempt may have left some: they go first, or tasks would have two predictions of one version.
    """
    api = work.services.label_studio
    with work.services.store.read() as connection:
        wanted = _predictions_count(connection, work)
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
    except JobFenced:
        raise  # another attempt is at it: what is there may be its own
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
    """Best first. The holdout gets no boxes: its labels must not lean on the model they will measure. Nor is there a
    box of a label that went while the round ran."""
    shows = work.label_map.shows
    with work.services.store.read() as connection:
        rows = connection.execute(
            _unlabelled_scores(work).order_by(scores.c.published_score, scores.c.task_id)
        ).yield_per(1000)
        for done, row in enumerate(rows, start=1):
            if done % 1000 == 0:
                work.progress("publishing", done=done, total=total)
            yield prediction(row.task_id, row.regions, row.published_score, version, bool(row.holdout), shows)


def purge_versions(work: Work) -> None:
    """Versions of ours that are neither served nor about to be; and what nobody needs of old rounds."""
    with work.services.store.read() as connection:
        project = get_project(connection, work.project.id)
        open_round = open_round_of(connection, work.project.id)
    coming = None if open_round is None else model_version(open_round.number)
    for version in work.services.label_studio.versions(work.project.id):
        if is_our_version(version) and version not in (project.published_version, coming):
            work.lease.check()
            work.services.label_studio.delete_version(work.project.id, version)
    prune(work.services, work.project.id)
    steps.finish(work.lease, lambda connection: None)
