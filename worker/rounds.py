"""Rules of the loop: what /setup and webhooks change, when a round opens, how it closes. No job runs here."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, bindparam, delete, exists, func, insert, select, update

from worker import steps
from worker.boxes import LabelMap
from worker.errors import BadRequest, Conflict
from worker.label_studio import PENDING_VERSION
from worker.settings import ProjectSettings, parse_project_settings
from worker.shapes import SHAPES, label_drawn, labels_key
from worker.store import (
    OPEN_STATES,
    count_new_labels,
    get_project,
    get_round,
    insert_or_ignore,
    labelled_task_ids,
    latest_round,
    open_round_of,
    projects,
    record_event,
    rounds,
    scores,
    task_annotations,
    tasks,
    upsert,
)
from worker.store import steps as step_rows

BOX_TYPES = frozenset(labels_key(shape) for shape in SHAPES)
ATTACH_DELAY = 2.0  # seconds: Label Studio registers its webhook to us after our answer to /setup


def connect_project(
    connection: Connection,
    project_id: int,
    label_config: str,
    settings: ProjectSettings,
    backend_url: str,
    who: str = "Label Studio",
) -> bool:
    """What /setup does: remember the project, and open round 0 when there is none. True: it was opened now.

    Label Studio calls /setup whenever somebody looks at its Model page: only what changed is written, and a round 0
    that failed is tried again only when something did.
    """
    values = {
        "label_config": label_config,
        "extra_params": settings.model_dump_json(exclude_unset=True),
        "backend_url": backend_url,
    }
    new = {"id": project_id, "title": "", "connected_at": time.time(), **values}
    if insert_or_ignore(connection, projects, [new]):
        record_event(connection, project_id, "connected", detail="Label Studio connected this backend")
    row = lock_project(connection, project_id)
    changed = any(getattr(row, name) != value for name, value in values.items())
    if changed:
        told = f"{_changes(row, values)}, by {_asker(row, settings) or who}"
        connection.execute(update(projects).where(projects.c.id == project_id).values(**values))
        record_event(connection, project_id, "settings", detail=told)
        # Label Studio calls with the old settings first, then with the new: a first round not yet begun takes these
        begins = select(step_rows.c.round_id).where(
            step_rows.c.kind == "attach", step_rows.c.state.in_(("waiting", "sent"))
        )
        first = update(rounds).where(rounds.c.project_id == project_id, rounds.c.id.in_(begins))
        connection.execute(first.values(settings=values["extra_params"]))
    last = latest_round(connection, project_id)
    if last is None or (changed and last.number == 0 and last.state == "failed"):
        return _open_first_round(connection, project_id)
    return False


def has_moved(connection: Connection, project_id: int, backend_url: str) -> bool:
    """Whether Label Studio called us by another address before."""
    known = connection.execute(select(projects.c.backend_url).where(projects.c.id == project_id)).scalar_one_or_none()
    return bool(known) and known != backend_url


def note_refusal(connection: Connection, project_id: int, backend_url: str, why: str) -> None:
    """A label config or settings that nothing can be done with were refused: the page says so until others are sent.

    A new project gets a row without a round, which the next /setup that is accepted opens.
    """
    new = {"id": project_id, "title": "", "connected_at": time.time(), "label_config": "", "backend_url": backend_url}
    insert_or_ignore(connection, projects, [{**new, "extra_params": "{}"}])
    why = why.encode("utf-8", "replace").decode()  # it may quote half of a surrogate pair
    if lock_project(connection, project_id).problem != why:
        connection.execute(update(projects).where(projects.c.id == project_id).values(problem=why))
        record_event(connection, project_id, "refused", detail=why)


def ask_settings(connection: Connection, project_id: int, settings: ProjectSettings | None, who: str = "") -> None:
    """The page gives Label Studio these settings now, which calls our /setup with them: so that the log says who.

    None: that is over.
    """
    asked = None if settings is None else json.dumps({"who": who, "settings": settings.model_dump(exclude_unset=True)})
    connection.execute(update(projects).where(projects.c.id == project_id).values(asked=asked))


def _asker(project: Row[Any], settings: ProjectSettings) -> str:
    asked = json.loads(project.asked or "{}")
    return str(asked["who"]) if asked.get("settings") == settings.model_dump(exclude_unset=True) else ""


def _changes(before: Row[Any], after: Mapping[str, str]) -> str:
    """What is different now, in words: for the log."""
    told = setting_changes(json.loads(before.extra_params or "{}"), json.loads(after["extra_params"]))
    told += ["the label config"] if before.label_config != after["label_config"] else []
    if before.backend_url != after["backend_url"]:
        told.append(f"this backend's address: {before.backend_url or 'none'} -> {after['backend_url']}")
    return "; ".join(told) or "as before, written differently"


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`batch_size: 200 -> 50`, one of each setting that changed. Not set: its default."""

    def told(values: Mapping[str, Any], name: str) -> str:
        return json.dumps(values[name], ensure_ascii=False)[:200] if name in values else "default"

    names = [name for name in ProjectSettings.model_fields if before.get(name) != after.get(name)]
    return [f"{name}: {told(before, name)} -> {told(after, name)}" for name in names]


def _open_first_round(connection: Connection, project_id: int) -> bool:
    """Round 0, in the place of one that failed or was cancelled. False: there is one that did neither."""
    last = latest_round(connection, project_id)
    if last is not None and not (last.number == 0 and last.state in ("failed", "cancelled")):
        return False
    if last is not None:
        connection.execute(delete(rounds).where(rounds.c.id == last.id))
    round_id = _insert_round(connection, project_id, 0, "the backend was connected")
    steps.add(connection, round_id, "attach", delay=ATTACH_DELAY)
    return True


def _insert_round(connection: Connection, project_id: int, number: int, why: str) -> int:
    project = get_project(connection, project_id)
    row = {
        "project_id": project_id,
        "number": number,
        "state": "waiting",
        "why": why,
        "opened_at": time.time(),
        "settings": project.extra_params,
    }
    connection.execute(update(projects).where(projects.c.id == project_id).values(problem=None))
    return int(connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one())


def served_version(project: Row[Any]) -> str:
    """The version that /setup and /predict name: what is published, or the one of answers that are not ready."""
    return str(project.published_version or PENDING_VERSION)


def open_round(connection: Connection, project_id: int, why: str) -> int:
    """Open the next round, whatever the trigger says; its id. Its dataset will hold what is labelled by then.

    Raises:
        NotFound: the project is not connected.
        Conflict: a round is open already, or the first batch is not published yet.
    """
    _check_free(connection, project_id)
    last = latest_round(connection, project_id)
    if last is None or (last.number == 0 and last.state != "done"):
        if _open_first_round(connection, project_id):
            opened = open_round_of(connection, project_id)
            assert opened is not None  # just inserted, in this transaction
            return int(opened.id)
        raise Conflict(f"project {project_id} has no published batch yet")
    round_id = _insert_round(connection, project_id, last.number + 1, why)
    mark_seen(connection, project_id, round_id)
    steps.add(connection, round_id, "train")
    record_event(connection, project_id, "round opened", key=f"round-{round_id}", detail=why)
    return round_id


def _check_free(connection: Connection, project_id: int) -> None:
    """
    Raises:
        NotFound: the project is not connected.
        Conflict: it is paused, or a round is open already.
    """
    if lock_project(connection, project_id).paused_at is not None:
        raise Conflict(f"project {project_id} is paused. Resume it first")
    running = open_round_of(connection, project_id)
    if running is not None:
        raise Conflict(f"round {running.number} of project {project_id} is {running.state}; wait for it, or cancel it")


def open_select_round(connection: Connection, project_id: int, settings: ProjectSettings, why: str) -> int:
    """Open a round that only selects and publishes, with `settings`, on the detector that is published; its id.

    It scores what that detector has not scored yet: nothing, as a rule.

    Raises:
        NotFound: the project is not connected.
        Conflict: a round is open already, the project is paused, or no detector was trained yet.
    """
    _check_free(connection, project_id)
    source, last = selectable_round(connection, project_id), latest_round(connection, project_id)
    assert last is not None  # there is a published one
    round_id = _insert_round(connection, project_id, last.number + 1, why)
    taken = {name: getattr(source, name) for name in ("weights", "weights_sha256", "embedder", "report")}
    values = {"kind": "select", "settings": settings.model_dump_json(exclude_unset=True), **taken}
    connection.execute(update(rounds).where(rounds.c.id == round_id).values(**values))
    steps.add(connection, round_id, "select")
    record_event(connection, project_id, "round opened", key=f"round-{round_id}", detail=why)
    return round_id


def selectable_round(connection: Connection, project_id: int) -> Row[Any]:
    """The published round, when a batch can be chosen from its scores under other settings.

    Raises:
        NotFound: the project is not connected.
        Conflict: nothing is published, or no round has trained a detector yet.
    """
    project = get_project(connection, project_id)
    if project.published_round_id is None:
        raise Conflict(f"project {project_id} has no published batch yet")
    source = get_round(connection, project.published_round_id)
    if source.number == 0:
        raise Conflict(
            "the first batch is the holdout and a diverse seed, whatever the strategy: no detector has been trained "
            "yet. Other settings can be tried after the first training"
        )
    return source


def pause(connection: Connection, project_id: int, paused: bool, who: str) -> None:
    """From now on no round opens by itself and no step is started; what runs finishes its step. Or it goes on."""
    before = lock_project(connection, project_id).paused_at is not None
    if before == paused:
        return
    at = time.time() if paused else None
    connection.execute(update(projects).where(projects.c.id == project_id).values(paused_at=at))
    record_event(connection, project_id, "paused" if paused else "resumed", detail=f"by {who}")


def retry_round(connection: Connection, project_id: int, who: str) -> int:
    """Re-open the latest round, which failed, at the step that failed; its number. What it had done stands.

    Raises:
        NotFound: the project is not connected.
        Conflict: a round is open, the project is paused, the latest round did not fail, or it has no failed step.
    """
    _check_free(connection, project_id)
    last = latest_round(connection, project_id)
    if last is None or last.state != "failed":
        raise Conflict(f"the latest round of project {project_id} did not fail: there is nothing to try again")
    failed = select(step_rows.c.kind).where(step_rows.c.round_id == last.id, step_rows.c.state == "failed")
    kind = connection.execute(failed.order_by(step_rows.c.id.desc()).limit(1)).scalar_one_or_none()
    if kind is None:
        raise Conflict(f"round {last.number} has no step that failed. Start a new round")
    again = update(rounds).where(rounds.c.id == last.id).values(error=None, closed_at=None)
    connection.execute(again)
    connection.execute(update(projects).where(projects.c.id == project_id).values(problem=None))
    members = settings_of(last).committee_size
    steps.reopen(connection, last.id, kind, steps.expected_shards(connection, last.id, kind, members))
    record_event(connection, project_id, "round tried again", detail=f"round {last.number}, from {kind} on, by {who}")
    return int(last.number)


def retry_purge(connection: Connection, project_id: int) -> int:
    """Old versions whose deletion failed are deleted again; how many rounds left some."""
    theirs = select(rounds.c.id).where(rounds.c.project_id == project_id)
    failed = select(step_rows.c.round_id).where(step_rows.c.kind == "purge", step_rows.c.state == "failed")
    found = connection.execute(failed.where(step_rows.c.round_id.in_(theirs))).scalars().all()
    for round_id in found:
        steps.reopen(connection, round_id, "purge", {0})
    return len(found)


def mark_seen(connection: Connection, project_id: int, round_id: int, task_ids: Sequence[int] | None = None) -> None:
    """Labels that belong to this round, so that they open no other one, even when it fails: those of `task_ids`, or
    all there are."""
    unseen = update(tasks).where(tasks.c.project_id == project_id, tasks.c.seen_round_id.is_(None))
    if task_ids is None:
        these = tasks.c.task_id.in_(labelled_task_ids(project_id))
        connection.execute(unseen.where(these).values(seen_round_id=round_id))
    elif task_ids:
        one = unseen.where(tasks.c.task_id == bindparam("of")).values(seen_round_id=round_id)
        connection.execute(one, [{"of": task_id} for task_id in task_ids])


def towards_next(
    connection: Connection, project: Row[Any], last: Row[Any], settings: ProjectSettings
) -> tuple[int, int]:
    """New labels there are, and that open the next round. Before the first training the holdout's count too."""
    new = count_new_labels(connection, project.id, holdout_too=last.number == 0)
    published = last if project.published_round_id is None else get_round(connection, project.published_round_id)
    return new, labels_needed(settings, published)


def labels_needed(settings: ProjectSettings, published: Row[Any]) -> int:
    """New labels that open the next round: as set, or as many as the published round's batch asked for."""
    return int(settings.labels_per_round or published.batch_size or settings.batch_size)


def lock_project(connection: Connection, project_id: int) -> Row[Any]:
    """The project's row, held until the transaction ends: of two that want to open a round, one sees the other's.

    (SQLite's writers are alone anyway.)
    """
    # NO KEY: whoever inserted an annotation holds the project's key, and two such would wait for each other for ever
    held = select(projects.c.id).where(projects.c.id == project_id).with_for_update(key_share=True)
    connection.execute(held)
    return get_project(connection, project_id)


def trigger(connection: Connection, project_id: int) -> str | None:
    """Why a round should open now, in words; None: it should not."""
    project = lock_project(connection, project_id)
    last = latest_round(connection, project_id)
    if last is None or last.state in OPEN_STATES or (last.number == 0 and last.state != "done"):
        return None
    settings = parse_project_settings(project.extra_params)
    if project.paused_at is not None or project.stop_accepted_at is not None:
        return None
    if rounds_done(connection, project_id) >= settings.max_rounds:
        return None
    new, needed = towards_next(connection, project, last, settings)
    if not new or not count_new_labels(connection, project_id, holdout_too=False):
        return None  # nothing to train on that was not trained on
    if new >= needed:
        return f"{new} new labels (a round opens at {needed})"
    if not has_unlabelled(connection, project_id):
        return f"{new} new labels, and the pool is empty"
    return None


def rounds_done(connection: Connection, project_id: int) -> int:
    """Rounds that trained and published: what max_rounds counts."""
    these = (rounds.c.project_id == project_id, rounds.c.number > 0, rounds.c.kind == "train", rounds.c.state == "done")
    return int(connection.execute(select(func.count()).select_from(rounds).where(*these)).scalar_one())


def has_unlabelled(connection: Connection, project_id: int) -> bool:
    """Whether there is a task that nobody has labelled or skipped."""
    labelled = exists().where(
        task_annotations.c.project_id == project_id, task_annotations.c.task_id == tasks.c.task_id
    )
    query = select(tasks.c.task_id).where(
        tasks.c.project_id == project_id, tasks.c.deleted.is_(False), tasks.c.image_problem.is_(None), ~labelled
    )
    return connection.execute(query.limit(1)).first() is not None


def open_round_if_triggered(connection: Connection, project_id: int) -> int | None:
    """In the transaction that changed what the trigger looks at."""
    why = trigger(connection, project_id)
    return None if why is None else open_round(connection, project_id, why)


def close_round(connection: Connection, round_id: int, state: str, error: str | None = None) -> None:
    """done, failed or cancelled. A failed round's sentence stands on the page until the next one opens."""
    closing = update(rounds).where(rounds.c.id == round_id, rounds.c.state.in_(OPEN_STATES))
    if not connection.execute(closing.values(state=state, error=error, closed_at=time.time())).rowcount:
        return  # somebody closed it before
    row = get_round(connection, round_id)
    if state != "done":
        steps.drop_open(connection, round_id)
    if state == "failed":
        connection.execute(update(projects).where(projects.c.id == row.project_id).values(problem=error))
    detail = f"round {row.number} {state}" + (f": {error}" if error else "")
    record_event(connection, row.project_id, f"round {state}", detail=detail)


def close_dead_rounds(connection: Connection) -> None:
    """An open round with a failed step is a failed round."""
    query = select(step_rows.c.round_id, step_rows.c.error).join(rounds, rounds.c.id == step_rows.c.round_id)
    for row in connection.execute(
        query.where(step_rows.c.state == "failed", step_rows.c.kind != "purge", rounds.c.state.in_(OPEN_STATES))
    ).all():
        close_round(connection, row.round_id, "failed", row.error)


def cancel_round(connection: Connection, project_id: int) -> int:
    """
    Raises:
        Conflict: no round is open.
    """
    row = open_round_of(connection, project_id)
    if row is None:
        raise Conflict(f"project {project_id} has no open round")
    close_round(connection, row.id, "cancelled", "an admin cancelled it")
    return int(row.number)


def accept_stop(connection: Connection, project_id: int, accepted: bool) -> None:
    """No round opens by itself from now on; or again, when `accepted` is False."""
    get_project(connection, project_id)
    at = time.time() if accepted else None
    connection.execute(update(projects).where(projects.c.id == project_id).values(stop_accepted_at=at))
    record_event(connection, project_id, "stop accepted" if accepted else "stop withdrawn")


def ask_for_holdout(connection: Connection, project_id: int, n: int) -> int:
    """`n` more holdout images, drawn from the pool with the next batch; how many are waited for now. Requests add up.

    Raises:
        NotFound: the project is not connected.
        BadRequest: not a whole number from 1 on, or more than half of the pool: something must be left to train on.
    """
    waiting = int(lock_project(connection, project_id).more_holdout)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise BadRequest(f"{n!r} more holdout images: give a whole number from 1 on")
    spare = count_drawable(connection, project_id) // 2
    if waiting + n > spare:
        told = f", and {waiting} are asked for already" if waiting else ""
        raise BadRequest(
            f"{n} more holdout images: the pool can spare {spare}{told}. Ask for fewer, or import more images first"
        )
    connection.execute(update(projects).where(projects.c.id == project_id).values(more_holdout=waiting + n))
    detail = f"{n} more holdout images asked for, {waiting + n} wait"
    record_event(connection, project_id, "more holdout", detail=detail)
    return waiting + n


def withdraw_holdout(connection: Connection, project_id: int) -> int:
    """Nobody asks for more holdout images any more; how many were waited for."""
    waiting = int(lock_project(connection, project_id).more_holdout)
    if waiting:
        connection.execute(update(projects).where(projects.c.id == project_id).values(more_holdout=0))
        detail = f"{waiting} more holdout images not wanted any more"
        record_event(connection, project_id, "more holdout", detail=detail)
    return waiting


def drawable(project_id: int) -> Any:
    """Query of task ids that may still join the holdout: with an image, never labelled, skipped or trained on."""
    annotated = select(task_annotations.c.task_id).where(task_annotations.c.project_id == project_id)
    return select(tasks.c.task_id).where(
        tasks.c.project_id == project_id,
        tasks.c.deleted.is_(False),
        tasks.c.image_problem.is_(None),
        tasks.c.holdout.is_not(True),
        tasks.c.twin.is_(False),
        tasks.c.seen_round_id.is_(None),
        tasks.c.task_id.not_in(annotated),  # one list of them, not a look for each of 80,000 tasks
    )


def count_drawable(connection: Connection, project_id: int, up_to: int | None = None) -> int:
    """How many there are. `up_to`: no more than that are counted, which a large project answers sooner."""
    some = drawable(project_id).limit(up_to).subquery()
    return int(connection.execute(select(func.count()).select_from(some)).scalar_one())


def trained_on(connection: Connection, project_id: int) -> set[int]:
    """Tasks that a round's dataset held, whether they are labelled today or not."""
    query = select(tasks.c.task_id).where(tasks.c.project_id == project_id, tasks.c.seen_round_id.is_not(None))
    return set(connection.execute(query.where(tasks.c.holdout.is_not(True))).scalars().all())


def grow_holdout(
    connection: Connection, project_id: int, task_ids: Sequence[int], wanted: int, twins: Sequence[int] = ()
) -> list[int] | None:
    """These join the holdout for the `wanted` that were asked for when they were drawn, and their twins are never
    trained on; those that really joined. None: so many are not asked for any more, and nothing was written.

    In one transaction: killed before it, the next attempt draws; killed after it, it finds nothing to draw. Somebody
    may have labelled one since it was chosen, with boxes of a model before him: that one stays outside. It may look
    like those that joined, so it is not trained on either.
    """
    waiting = int(lock_project(connection, project_id).more_holdout)
    if waiting < wanted:
        return None  # withdrawn while they were drawn, or another attempt has drawn
    still = set(connection.execute(drawable(project_id)).scalars().all())
    joined = [task_id for task_id in task_ids if task_id in still]
    one = update(tasks).where(tasks.c.project_id == project_id, tasks.c.task_id == bindparam("of"))
    if joined:
        connection.execute(one.values(holdout=True), [{"of": task_id} for task_id in joined])
        if barred := sorted({*task_ids, *twins} - set(joined)):
            untrained = one.where(tasks.c.seen_round_id.is_(None), tasks.c.holdout.is_not(True))
            connection.execute(untrained.values(twin=True), [{"of": task_id} for task_id in barred])
        detail = f"{len(joined)} images of the pool joined the holdout"
        record_event(connection, project_id, "holdout grew", detail=detail)
    connection.execute(update(projects).where(projects.c.id == project_id).values(more_holdout=waiting - wanted))
    return joined


def remember_annotations(connection: Connection, project_id: int, found: Iterable[Mapping[str, Any]]) -> None:
    """Annotations as webhooks and exports give them. An older copy never replaces a newer one."""
    rows = {}
    for item in found:
        row = _annotation_row(project_id, item)
        rows[row["annotation_id"]] = row
    ids = list(rows)
    known: dict[int, str] = {}
    for start in range(0, len(ids), 500):
        these = task_annotations.c.annotation_id.in_(ids[start : start + 500])
        query = select(task_annotations.c.annotation_id, task_annotations.c.updated_at)
        found_now = connection.execute(query.where(task_annotations.c.project_id == project_id, these))
        known |= {int(row.annotation_id): str(row.updated_at) for row in found_now}
    fresh = [row for key, row in rows.items() if row["updated_at"] >= known.get(key, "")]
    upsert(connection, task_annotations, fresh)


def _annotation_row(project_id: int, item: Mapping[str, Any]) -> dict[str, Any]:
    result = item.get("result")
    lead_time = item.get("lead_time")
    regions = result if isinstance(result, list) else []
    boxes = [one for one in regions if isinstance(one, dict) and str(one.get("type")).lower() in BOX_TYPES]
    return {
        "project_id": project_id,
        "annotation_id": int(item["id"]),
        "task_id": int(item["task"]),
        "updated_at": str(item.get("updated_at") or "")[:40],
        "cancelled": bool(item.get("was_cancelled")),
        "lead_time": float(lead_time) if isinstance(lead_time, int | float) else None,
        "n_boxes": len(boxes),
        "classes": json.dumps(Counter(label[:200] for region in boxes if (label := label_drawn(region)))),
    }


def forget_annotations(connection: Connection, project_id: int, annotation_ids: Iterable[int]) -> None:
    ids = list(annotation_ids)
    for start in range(0, len(ids), 500):
        chunk = task_annotations.c.annotation_id.in_(ids[start : start + 500])
        connection.execute(delete(task_annotations).where(task_annotations.c.project_id == project_id, chunk))


def remember_tasks(connection: Connection, project_id: int, images: Mapping[int, str]) -> None:
    """New tasks join the pool; known ones keep their split and get their image's present address.

    A number that was deleted and bears another image is a new task: Label Studio on SQLite numbers imported tasks on
    from the last one that is there.
    """
    known = _known_tasks(connection, project_id, list(images))
    new = [
        {"project_id": project_id, "task_id": task_id, "image": image, "deleted": False}
        for task_id, image in images.items()
        if task_id not in known
    ]
    insert_or_ignore(connection, tasks, new)
    changed = [task_id for task_id in known if known[task_id] != (images[task_id], False)]
    for task_id in changed:
        row = (tasks.c.project_id == project_id, tasks.c.task_id == task_id)
        connection.execute(update(tasks).where(*row).values(image=images[task_id], deleted=False, image_problem=None))
    reused = [task_id for task_id in changed if known[task_id].deleted and known[task_id].image != images[task_id]]
    _forget_former_tasks(connection, project_id, reused)


class _Known(NamedTuple):
    image: str
    deleted: bool


def _known_tasks(connection: Connection, project_id: int, task_ids: Sequence[int]) -> dict[int, _Known]:
    known: dict[int, _Known] = {}
    for start in range(0, len(task_ids), 500):
        these = (tasks.c.project_id == project_id, tasks.c.task_id.in_(task_ids[start : start + 500]))
        query = select(tasks.c.task_id, tasks.c.image, tasks.c.deleted).where(*these)
        known |= {int(row.task_id): _Known(str(row.image), bool(row.deleted)) for row in connection.execute(query)}
    return known


def _forget_former_tasks(connection: Connection, project_id: int, task_ids: Sequence[int]) -> None:
    """What was known of the tasks that had these numbers before: their split, and what detectors saw on them."""
    of_project = select(rounds.c.id).where(rounds.c.project_id == project_id)
    for start in range(0, len(task_ids), 500):
        chunk = task_ids[start : start + 500]
        these = (tasks.c.project_id == project_id, tasks.c.task_id.in_(chunk))
        connection.execute(update(tasks).where(*these).values(holdout=None, seen_round_id=None, twin=False))
        connection.execute(delete(scores).where(scores.c.round_id.in_(of_project), scores.c.task_id.in_(chunk)))


def declare_holdout(connection: Connection, project_id: int, task_ids: Sequence[int]) -> None:
    """Tasks that their project brought as its holdout. Only before splits are drawn: a holdout never changes sides."""
    if not task_ids:
        return
    known = select(func.count()).select_from(tasks).where(tasks.c.project_id == project_id)
    drawn = known.where(tasks.c.holdout.is_(False))
    if connection.execute(drawn).scalar_one():
        return
    one = update(tasks).where(tasks.c.project_id == project_id, tasks.c.task_id == bindparam("of"))
    connection.execute(one.values(holdout=True), [{"of": task_id} for task_id in task_ids])


def forget_missing_tasks(connection: Connection, project_id: int, present: set[int]) -> None:
    """Tasks that Label Studio no longer has are not asked for again; their history stays."""
    known = connection.execute(select(tasks.c.task_id).where(tasks.c.project_id == project_id)).scalars().all()
    mark_deleted(connection, project_id, [task_id for task_id in known if task_id not in present])


def mark_deleted(connection: Connection, project_id: int, task_ids: Iterable[int]) -> None:
    ids = list(task_ids)
    for start in range(0, len(ids), 500):
        chunk = ids[start : start + 500]
        rows = (tasks.c.project_id == project_id, tasks.c.task_id.in_(chunk))
        connection.execute(update(tasks).where(*rows).values(deleted=True))
        gone = (task_annotations.c.project_id == project_id, task_annotations.c.task_id.in_(chunk))
        connection.execute(delete(task_annotations).where(*gone))


def task_ids_of_annotations(connection: Connection, project_id: int) -> set[int]:
    return set(connection.execute(labelled_task_ids(project_id)).scalars().all())


def settings_of(row: Row[Any]) -> ProjectSettings:
    """The settings a project has now, or those a round began with."""
    text = row.extra_params if hasattr(row, "extra_params") else row.settings
    return parse_project_settings(json.loads(text or "{}"))


def label_map_of(project: Row[Any]) -> LabelMap:
    """What a project's label config says today, under its settings of today.

    Raises:
        LabelConfigUnsupported: nothing in it is a box to us.
    """
    return LabelMap.from_config(project.label_config, settings_of(project).shapes)


def holdout_of(connection: Connection, project_id: int) -> dict[int, bool | None]:
    """Live task ids -> in the holdout? None: the split is not drawn yet."""
    query = select(tasks.c.task_id, tasks.c.holdout).where(tasks.c.project_id == project_id, ~tasks.c.deleted)
    return {int(row.task_id): row.holdout for row in connection.execute(query)}


def not_for_training(connection: Connection, project_id: int) -> set[int]:
    """The holdout, and what looks like it: of all tasks, those too that are taken for deleted."""
    query = select(tasks.c.task_id).where(tasks.c.project_id == project_id, tasks.c.holdout.is_(True) | tasks.c.twin)
    return set(connection.execute(query).scalars().all())


def not_for_boxes(connection: Connection, project_id: int, task_ids: Sequence[int]) -> set[int]:
    """Which of these are in the holdout: its labels must not lean on the model they will measure."""
    found: set[int] = set()
    for start in range(0, len(task_ids), 500):
        these = (tasks.c.project_id == project_id, tasks.c.task_id.in_(task_ids[start : start + 500]))
        query = select(tasks.c.task_id).where(*these, tasks.c.holdout.is_(True))
        found |= set(connection.execute(query).scalars().all())
    return found
