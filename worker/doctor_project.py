"""`hardfirst doctor`, per project: what Label Studio has of us, what annotators are shown, what a round needs.

Looking locks no task and assigns none: the label stream's own "next task" would do both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Row, func, select

from worker import queue, steps
from worker.attaching import basic_auth
from worker.boxes import LabelMap, Shapes
from worker.doctor import Check, Look, failed, ok, skipped, warning
from worker.errors import HardfirstError, ImageUnusable, LabelConfigUnsupported, NotFound
from worker.holdout import names_of
from worker.image_sources import printable
from worker.label_studio import SAMPLING, WEBHOOK_ACTIONS
from worker.rounds import has_unlabelled, settings_of
from worker.services import Services
from worker.store import (
    get_project,
    get_round,
    labelled_task_ids,
    latest_round,
    open_round_of,
    projects,
    scores,
    tasks,
)
from worker.store import steps as step_rows

LOOKED_AT = 10  # tasks of the batch whose order is compared
OVERDUE = 60.0  # seconds after which a step that may be sent should have been; the backend sends once a second
START_A_ROUND = "Start a round on the admin page"


def project_ids(own: Services) -> list[int]:
    """All projects that were connected to this backend."""
    with own.store.read() as connection:
        return [int(one) for one in connection.execute(select(projects.c.id).order_by(projects.c.id)).scalars()]


def project_looks(own: Services, project_id: int, *, quick: bool) -> list[Look]:
    """What is looked at of one project, in order. `quick`: its detector is not loaded."""

    def about(name: str, look: Callable[[Services, int, str], Check], *needs: str) -> Look:
        return Look(name, lambda: look(own, project_id, name), ("store", *needs))

    there = ("Label Studio", "token", "project")
    return [
        about("project", look_at_project, "Label Studio", "token"),
        about("backend entry", look_at_entry, *there),
        about("webhook", look_at_webhook, *there),
        about("sampling", look_at_sampling, *there),
        about("model version", look_at_version, *there),
        about("pre-annotations", look_at_pre_annotations, *there),
        about("images", look_at_images, *there),
        about("labels", lambda *args: look_at_labels(*args, quick=quick), *there),
        about("order", look_at_order, *there),
        about("round", look_at_round, "queue"),
    ]


def _row(own: Services, project_id: int) -> Row[Any]:
    with own.store.read() as connection:
        return get_project(connection, project_id)


def look_at_project(own: Services, project_id: int, name: str) -> Check:
    row = _row(own, project_id)
    try:
        remote = own.label_studio.project(project_id)
    except NotFound:
        sentence = f"Label Studio no longer has project {project_id} ({row.title!r}), or the token may not see it"
        return failed(name, sentence, "Use a token of somebody who sees it; if it was deleted, nothing is left to do")
    title, count = remote.get("title"), int(remote.get("task_number") or 0)
    if not count:
        return warning(name, f"{title!r} has no tasks", "Import images; the first batch follows by itself")
    return ok(name, f"{title!r}, {count:,} tasks")


def look_at_entry(own: Services, project_id: int, name: str) -> Check:
    """Label Studio's Connect Model entry of ours. To list it, Label Studio calls our /health and /setup."""
    url = _row(own, project_id).backend_url
    connect = f"Label Studio: project -> Settings -> Model -> Connect Model, with {url}"
    try:
        entry = own.label_studio.own_backend(project_id, url)
    except NotFound:
        return failed(name, f"Label Studio has no model with the address {url} in this project", connect)
    if entry.get("state") == "CO":
        return ok(name, f"Label Studio reaches us at {entry.get('url')}")
    said = str(entry.get("error_message") or entry.get("readable_state") or entry.get("state") or "").strip()
    last = said.splitlines()[-1].strip()[:300] if said else "no reason given"
    fix = "Start the backend (`hardfirst up`); if it moved, edit the model's address in Settings -> Model"
    return failed(name, f"Label Studio does not get an answer from {entry.get('url')}: {last}", fix)


def look_at_webhook(own: Services, project_id: int, name: str) -> Check:
    row = _row(own, project_id)
    url = f"{row.backend_url.rstrip('/')}/webhook"
    found = own.label_studio.webhooks_to(project_id, url)
    adopted = own.label_studio.find_webhook_by_id(project_id, row.webhook_id)
    behind = [] if adopted is None or adopted in found else [adopted]

    def put_right() -> None:
        kept = own.label_studio.own_webhook(project_id, url, basic_auth(own), row.webhook_id)
        for hook in found:
            if int(hook["id"]) != kept:
                own.label_studio.delete_webhook(int(hook["id"]))

    wrong = _wrong_with_webhook(found, basic_auth(own))
    if behind:
        wrong = f"our webhook still goes to {printable(str(behind[0].get('url')))[:200]}, where this backend was before"
    if not wrong:
        return ok(name, f"one to {url}, {'with our password' if basic_auth(own) else 'open, as the backend is'}")
    return failed(name, f"{wrong} ({url}): labels are only found by the regular comparison", _with_fix(), put_right)


def _with_fix() -> str:
    return "Run `hardfirst doctor --fix`"


def _wrong_with_webhook(found: Sequence[Mapping[str, Any]], headers: Mapping[str, str]) -> str:
    if len(found) != 1:
        return "there is no webhook to us" if not found else f"there are {len(found)} webhooks to us, not one"
    (hook,) = found
    if not hook.get("is_active"):
        return "the webhook to us is switched off"
    given = hook.get("headers") or {}
    if any(given.get(key) != value for key, value in headers.items()):
        return "the webhook to us lacks the password of HARDFIRST_USER and HARDFIRST_PASSWORD, so we refuse it"
    if not hook.get("send_payload"):
        return "the webhook to us sends no payload"
    missing = sorted(set(WEBHOOK_ACTIONS) - set(hook.get("actions") or ()))
    if missing and not hook.get("send_for_all_actions"):
        return f"the webhook to us does not send {', '.join(missing)}"
    return ""


# --- what annotators are shown ----------------------------------------------------------------------------------------


def _published(own: Services, project_id: int, name: str) -> tuple[str, Check | None]:
    """The version that should be served; and why it is too early, or too late, to look."""
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        busy = open_round_of(connection, project_id)
        is_left = has_unlabelled(connection, project_id)
    if project.published_version is None:
        return "", skipped(name, "nothing is published yet: the first round does it")
    if busy is not None and busy.state == "publishing":
        return "", skipped(name, f"round {busy.number} is publishing at this moment: look again afterwards")
    version = str(project.published_version)
    if not is_left and not own.label_studio.versions(project_id).get(version):
        return "", ok(name, "nothing is left to label, so nothing is served")
    return version, None


def _serve(own: Services, project_id: int, version: str) -> Callable[[], object] | None:
    """What publishing does; None where Label Studio has nothing of that version."""
    if not own.label_studio.versions(project_id).get(version):
        return None
    return lambda: own.label_studio.publish_version(project_id, version)


def look_at_sampling(own: Services, project_id: int, name: str) -> Check:
    version, early = _published(own, project_id, name)
    if early is not None:
        return early
    found = str(own.label_studio.project(project_id).get("sampling") or "")
    if found.lower() == SAMPLING.lower():
        return ok(name, f"{found}: lowest score first")
    fix = f"{_with_fix()}. Label Studio's own settings cannot: Community marks Uncertainty sampling as Enterprise's"
    return failed(
        name,
        f"the project serves its tasks by {found!r}: our order is not followed",
        fix,
        _serve(own, project_id, version),
    )


def look_at_version(own: Services, project_id: int, name: str) -> Check:
    version, early = _published(own, project_id, name)
    if early is not None:
        return early
    served = str(own.label_studio.project(project_id).get("model_version") or "")
    count = own.label_studio.versions(project_id).get(version, 0)
    if not count:
        return failed(name, f"Label Studio has no prediction of {version}, which is published", START_A_ROUND)
    if served != version:
        shown = repr(served) if served else "no version"
        sentence = f"Label Studio serves {shown}; {version} is published: tasks come in another order"
        fix = f"{_with_fix()}, or choose {version} in Settings -> Annotation -> Prelabeling"
        return failed(name, sentence, fix, _serve(own, project_id, version))
    return ok(name, f"{served}, {count:,} predictions")


def look_at_pre_annotations(own: Services, project_id: int, name: str) -> Check:
    version, early = _published(own, project_id, name)
    if early is not None:
        return early
    if own.label_studio.project(project_id).get("show_collab_predictions"):
        return ok(name, "shown to annotators")
    return failed(
        name,
        "Label Studio hides pre-annotations, and with them the order",
        f"{_with_fix()}, or switch on Settings -> Annotation -> Prelabeling -> Use predictions to prelabel tasks",
        _serve(own, project_id, version),
    )


def look_at_order(own: Services, project_id: int, name: str) -> Check:
    """Whether the unlabelled tasks with the lowest scores in Label Studio are the batch's, in its order.

    A batch that is nearly labelled is compared as far as it goes.
    """
    version, early = _published(own, project_id, name)
    if early is not None:
        return early
    if own.label_studio.project(project_id).get("model_version") != version:
        return skipped(name, "not looked at: model version comes first")
    wanted = _published_order(own, project_id)
    there = {int(task["id"]): task for task in own.label_studio.first_tasks(project_id, version, 2 * LOOKED_AT)}
    for task_id in wanted:
        if task_id not in there:
            with suppress(NotFound):  # deleted a moment ago: nobody is served it, and nothing is wrong
                there[task_id] = own.label_studio.task(task_id)
    free = {task_id: task for task_id, task in there.items() if not task.get("total_annotations")}
    served = sorted((lowest, task_id) for task_id, task in free.items() if (lowest := _lowest(task, version)) < 2)
    wanted = [task_id for task_id in wanted if task_id in free]
    first = [task_id for _, task_id in served[: len(wanted)]]
    if not wanted:
        return ok(name, "all of the batch is labelled")
    if first == wanted:
        return ok(name, f"the next {len(wanted)} tasks of Label Studio are the batch's, in its order")
    sentence = f"Label Studio would serve tasks {_listed(first)}; published are {_listed(wanted)}"
    fix = f"{START_A_ROUND}: it publishes anew; and let nobody else import predictions named {version}"
    return failed(name, sentence, fix)


def _published_order(own: Services, project_id: int) -> list[int]:
    """The first task ids of the published batch that nobody has labelled."""
    with own.store.read() as connection:
        round_id = get_project(connection, project_id).published_round_id
        query = (
            select(scores.c.task_id)
            .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project_id))
            .where(scores.c.round_id == round_id, scores.c.rank.is_not(None), ~tasks.c.deleted)
            .where(scores.c.task_id.not_in(labelled_task_ids(project_id)))
        )
        return [int(one) for one in connection.execute(query.order_by(scores.c.rank).limit(LOOKED_AT)).scalars()]


def _lowest(task: Mapping[str, Any], version: str) -> float:
    """The score Label Studio ranks a task by, 0..1: of several predictions of a version, the lowest; 2 without one."""
    found = [one.get("score") for one in task.get("predictions") or () if one.get("model_version") == version]
    return min((float(score) for score in found if score is not None), default=2.0)


def _listed(task_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, task_ids[:5]))
    return f"{shown} ..." if len(task_ids) > 5 else shown or "none"


# --- what a round needs -----------------------------------------------------------------------------------------------


def look_at_images(own: Services, project_id: int, name: str) -> Check:
    """The first, the middle and the last task's image: fetched and decoded as a round does it."""
    config = str(own.label_studio.project(project_id).get("label_config") or "")
    try:
        key = LabelMap.from_config(config, _shapes(own, project_id)).image_key
    except LabelConfigUnsupported as error:
        return skipped(name, f"not looked at: {error}")
    sizes, broken = [], []
    for row in _some_tasks(own, project_id):
        try:
            width, height = own.images.open({key: row.image}, key, int(row.task_id)).size
            sizes.append(f"{width} x {height}")
        except ImageUnusable as error:
            broken.append(f"task {row.task_id}: {error}")
    if broken:
        return failed(name, f"{len(broken)} of {len(broken) + len(sizes)} cannot be read; {broken[0]}", _image_fix())
    if not sizes:
        return skipped(name, "there are no tasks to look at")
    n_bad = _image_problems(own, project_id)
    if n_bad:
        return warning(name, f"{n_bad:,} tasks have images that could not be read", "The admin page names them")
    return ok(name, f"{len(sizes)} fetched and decoded ({', '.join(sizes)})")


def _shapes(own: Services, project_id: int) -> Shapes:
    return settings_of(_row(own, project_id)).shapes


def _image_fix() -> str:
    return "Do what the sentence says, then look again; tasks without a readable image are left out of rounds"


def _some_tasks(own: Services, project_id: int) -> Sequence[Row[Any]]:
    live = select(tasks.c.task_id, tasks.c.image).where(tasks.c.project_id == project_id, ~tasks.c.deleted)
    live = live.order_by(tasks.c.task_id)
    with own.store.read() as connection:
        count = int(connection.execute(select(func.count()).select_from(live.subquery())).scalar_one())
        found: list[Any] = []
        for position in sorted({0, count // 2, count - 1}) if count else ():
            found += connection.execute(live.offset(position).limit(1)).all()
        return found


def _image_problems(own: Services, project_id: int) -> int:
    query = select(func.count()).select_from(tasks).where(tasks.c.project_id == project_id, ~tasks.c.deleted)
    with own.store.read() as connection:
        return int(connection.execute(query.where(tasks.c.image_problem.is_not(None))).scalar_one())


def look_at_labels(own: Services, project_id: int, name: str, *, quick: bool) -> Check:
    """The label config, and which of its labels the published detector knows."""
    config = str(own.label_studio.project(project_id).get("label_config") or "")
    try:
        label_map = LabelMap.from_config(config, _shapes(own, project_id))
    except LabelConfigUnsupported as error:
        return failed(name, str(error), "Change it in Settings -> Labeling Interface")
    project = _row(own, project_id)
    if project.published_round_id is None:
        return ok(name, f"{len(label_map.labels)} in the label config; nothing is published yet")
    with own.store.read() as connection:
        published = get_round(connection, project.published_round_id)
    if published.weights is None:
        return ok(name, f"{len(label_map.labels)} in the label config; the model learns them after the first batch")
    told = names_of(published.report)  # as it was trained: no file need be opened
    if quick and not told:
        return ok(name, f"{len(label_map.labels)} in the label config; the detector was not asked")
    names = told if quick else _class_names(own, published)
    return _labels_known(name, label_map, names, is_trained=published.map50 is not None or published.number > 0)


def _class_names(own: Services, published: Row[Any]) -> dict[int, str]:
    from worker.detector import load_model, load_ultralytics

    load_ultralytics()
    file = own.artifacts.local(str(published.weights), str(published.weights_sha256))
    return {int(key): str(value) for key, value in load_model(file).names.items()}


def _labels_known(name: str, label_map: LabelMap, names: Mapping[int, str], *, is_trained: bool) -> Check:
    known = set(label_map.classes_for(names).values()) if label_map.maps_any(names) else set()
    unknown = [label for label in label_map.labels if label not in known]
    if not unknown:
        return ok(name, f"all {len(label_map.labels)} are classes of the model")
    shown = ", ".join(repr(label) for label in unknown[:5]) + (" ..." if len(unknown) > 5 else "")
    fix = f'Add predicted_values="{names.get(0, "...")}" to the <Label> that means it, or: start a round'
    if not known and is_trained:
        return failed(name, f"the model knows none of the labels ({shown}): it draws no boxes", fix)
    if not is_trained:
        return ok(name, f"no boxes yet for {shown}: the model learns them after the first batch")
    return warning(name, f"the model does not know {shown}: it draws none until a round has learned them", fix)


def look_at_round(own: Services, project_id: int, name: str) -> Check:
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        busy, last = open_round_of(connection, project_id), latest_round(connection, project_id)
        open_steps = [] if busy is None else _open_steps(connection, busy.id)
    if busy is not None:
        return _open_round(own, name, project, busy, open_steps)
    if last is None:
        return failed(name, "there is no round yet", "Label Studio: open Settings -> Model once; that opens the first")
    if last.state == "failed":
        sentence = f"round {last.number} failed: {last.error}"
        return failed(name, sentence, "Mend what it says, then Retry the failed step on the admin page")
    if project.problem:
        return warning(name, f"none is open, but: {project.problem}", "Do what it says; it goes on by itself")
    return ok(name, f"none is open; the last was round {last.number} ({last.state})")


def _open_steps(connection: Any, round_id: int) -> list[Row[Any]]:
    query = select(step_rows).where(step_rows.c.round_id == round_id)
    query = query.where(step_rows.c.state.in_(("waiting", "sent", "running")))
    return list(connection.execute(query.order_by(step_rows.c.id)).all())


def _open_round(own: Services, name: str, project: Row[Any], busy: Row[Any], open_steps: Sequence[Row[Any]]) -> Check:
    which = f"round {busy.number} ({busy.state})"
    if project.paused_at is not None:
        return warning(name, f"{which} is paused", "Resume it on the admin page")

    def send_again() -> None:
        steps.sweep(own.store, own.redis)

    for step in open_steps:
        reason = steps.lost(own.redis, step) if step.state in ("sent", "running") else None
        if reason:
            sentence = f"{which} is stuck at {step.kind}: {reason}"
            return failed(name, sentence, f"{_with_fix()}, or start workers: one of them sends it again", send_again)
    waiting = [step for step in open_steps if step.state == "waiting" and step.error]
    if waiting:
        return warning(name, f"{which} waits: {waiting[0].error}", "Do what it says; it goes on by itself")
    overdue = [step for step in open_steps if _is_overdue(step, busy)]
    if overdue:
        sentence = f"{which} is stuck: nobody sends {overdue[0].kind} to the workers"
        return failed(name, sentence, "Start the backend (`hardfirst up`): it sends", send_again)
    if not open_steps:
        sentence = f"{which} is stuck: it has no step left to do"
        return failed(name, sentence, "Cancel it on the admin page, then start another")
    return _in_progress(own, name, which, open_steps)


def _is_overdue(step: Row[Any], busy: Row[Any]) -> bool:
    since = max(float(step.not_before or 0), float(busy.opened_at))
    return bool(step.state == "waiting" and time.time() - since > OVERDUE)


def _in_progress(own: Services, name: str, which: str, open_steps: Sequence[Row[Any]]) -> Check:
    running = [step for step in open_steps if step.state == "running"]
    if running:
        return ok(name, f"{which} is in progress: {running[0].kind}")
    from worker.crew import workers

    wanted = steps.KINDS[open_steps[0].kind].queue
    try:
        takers = [one for one in workers(own.redis) if wanted in one.queues]
    except HardfirstError as error:
        return skipped(name, f"{which}: {error}")
    if not takers:
        return failed(
            name, f"{which} waits for a worker of `{wanted}`: there is none", f"Start one: `hardfirst worker {wanted}`"
        )
    return ok(name, f"{which} waits for its turn on `{wanted}`, where {queue.queue_lengths(own.redis)[wanted]} wait")
