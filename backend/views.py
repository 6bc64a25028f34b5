"""Read models of the admin page: queries of the store, and what they mean in words. Nothing is written here.

Everything is counted in SQL; rows are read for what is shown (one page of the batch, the rounds, the latest events),
so that a project of 80,000 tasks costs what a small one does.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Row, func, select

from worker import rounds as rules
from worker.artifacts import sha256
from worker.errors import LabelConfigUnsupported, SettingsInvalid
from worker.evaluation import UNTAUGHT
from worker.reuse import scored_so_far
from worker.settings import ProjectSettings
from worker.shapes import drawn_box
from worker.store import (
    OPEN_STATES,
    events,
    get_project,
    get_round,
    labelled_task_ids,
    latest_round,
    loads,
    measured_rounds,
    projects,
    rounds,
    scores,
    steps,
    tasks,
)

PAGE = 60  # thumbnails shown at first, and added by "show more"
MAX_PAGE = 600
MAX_BOXES = 100  # drawn over one thumbnail
MAX_PROBLEMS = 20
MAX_EVENTS = 20
EVENTS_READ = 300  # a run of saved labels becomes one line
CLASS_COLOURS = 8
UNTAKEN_AFTER = 60.0  # seconds in the queue until the page wonders about workers
SPARK_WIDTH, SPARK_HEIGHT, SPARK_MARGIN = 120, 36, 4

Phase = Literal["waiting", "attaching", "preparing", "training", "evaluating", "scoring", "publishing"]
STAGES: Mapping[str, tuple[Phase, ...]] = {
    "Connect": ("waiting", "attaching"),
    "Train": ("waiting", "preparing", "training"),
    "Measure": ("evaluating",),
    "Score": ("scoring",),
    "Publish": ("publishing",),
}
PHASE_OF_STATE: Mapping[str, Phase] = {
    "waiting": "waiting",
    "attaching": "attaching",
    "training": "training",
    "scoring": "scoring",
    "publishing": "publishing",
}
PHASES_OF_STATE: Mapping[str, tuple[str, ...]] = {
    "attaching": ("attaching",),
    "training": ("preparing", "training", "evaluating"),
    "scoring": ("scoring",),
    "publishing": ("publishing",),
}
PHASE_WORDS: Mapping[Phase, str] = {
    "waiting": "waiting for a worker",
    "attaching": "reading the project",
    "preparing": "preparing images",
    "training": "training",
    "evaluating": "measuring on the holdout",
    "scoring": "scoring",
    "publishing": "publishing",
}
VERDICT_WORDS = {
    "continue": "Continue labelling",
    "stop": "Time to stop",
    "insufficient_evidence": "Not enough evidence",
}
EVENT_WORDS = {
    "ANNOTATION_CREATED": "label saved",
    "ANNOTATION_UPDATED": "label changed",
    "ANNOTATIONS_CREATED": "labels saved",
    "ANNOTATIONS_DELETED": "labels deleted",
    "TASKS_CREATED": "tasks imported",
    "TASKS_DELETED": "tasks deleted",
    "settings": "settings changed",
    "refused": "settings or label config refused",
    "more holdout": "more holdout images asked for",
    "holdout measured again": "all rounds measured again",
}


class View(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Stage(View):
    name: str
    state: Literal["done", "now", "to come"]


class Now(View):
    """What a project does at this moment. `fraction` of the phase, 0..1; None where it cannot be known."""

    kind: Literal["idle", "working", "failed", "stopped", "paused"]
    words: str
    detail: str = ""
    round_number: int | None = None
    phase: Phase | None = None
    fraction: float | None = None
    done: int | None = None
    total: int | None = None
    eta_seconds: float | None = None
    eta: str = ""
    rate: float | None = None  # images a second, while scoring
    losses: dict[str, float] = {}
    stages: list[Stage] = []


class Counts(View):
    """Live tasks of a project. `labels` and `pool` are without the holdout; `pool` without unreadable images."""

    tasks: int = 0
    labels: int = 0
    holdout: int = 0
    holdout_labels: int = 0
    pool: int = 0


class NextRound(View):
    """What opens the next round: `new` of `needed` labels. `sentence` says it, or why no round opens by itself."""

    new: int
    needed: int
    sentence: str


class Verdict(View):
    """Advice after a measured round."""

    verdict: str
    words: str
    reasons: list[str]
    note: str
    round_number: int


class ClassAp(View):
    """AP50 of one class on the holdout; `change` against the measured round before; `boxes` in the holdout."""

    name: str
    ap50: float | None
    change: float | None
    boxes: int


class CurvePoint(View):
    """One measured round on the learning curve."""

    round_number: int
    labels: int
    map50: float


class RoundView(View):
    """A row of the rounds table. `minutes`: annotators' time over all labels so far; `seconds`: its duration."""

    number: int
    kind: str
    state: str
    why: str
    opened_at: float
    closed_at: float | None
    seconds: float
    labels: int | None
    holdout_labels: int | None
    boxes: int | None
    minutes: float | None
    map50: float | None
    map50_95: float | None
    gain: float | None
    verdict: str
    verdict_words: str
    error: str | None
    model_version: str | None
    batch_size: int | None
    has_weights: bool


class Box(View):
    """boxes_percent of one region, with its label."""

    label: str
    x: float
    y: float
    width: float
    height: float
    score: float | None
    colour: int


class AlikeTask(View):
    task_id: int
    label_studio: str


class ClassBalance(View):
    """Boxes of one class: labelled in the last dataset, and predicted in the batch; shares 0..1 of all boxes."""

    name: str
    labelled: int
    predicted: int
    labelled_share: float
    predicted_share: float
    rare: bool


class BatchTask(View):
    """A task of the current batch. The holdout has no boxes and no utility: it was drawn at random.

    `from_uncertainty` and `from_diversity` are what the two parts add to the utility, where it is their sum; `alike` is
    the number of near-duplicates that it stands for.
    """

    task_id: int
    rank: int
    holdout: bool
    labelled: bool
    utility: float | None
    uncertainty: float | None
    diversity: float | None
    boxes: list[Box]
    n_boxes: int
    image_width: int | None
    image_height: int | None
    problem: str | None
    thumbnail: str
    label_studio: str
    from_uncertainty: float | None = None
    from_diversity: float | None = None
    reason: str = ""
    alike: int = 0
    alike_links: list[AlikeTask] = []


class BatchView(View):
    """Part of the current batch, in rank order."""

    round_number: int | None = None
    version: str | None = None
    total: int = 0
    labelled: int = 0
    offset: int = 0
    tasks: list[BatchTask] = []
    balance: list[ClassBalance] = []
    minutes: float | None = None
    minutes_left: float | None = None


class ImageProblem(View):
    task_id: int
    problem: str
    label_studio: str


class Happening(View):
    """An event, or a run of events of one kind."""

    at: float
    words: str
    detail: str
    times: int


class ProjectCard(View):
    """A project in the overview. `budget`: the labels of all rounds that open by themselves; None: not known."""

    id: int
    title: str
    now: Now
    counts: Counts
    budget: int | None
    map50: float | None
    verdict: Verdict | None
    problem: str | None
    spark: str
    spark_end: tuple[float, float] | None


class ProjectStatus(View):
    """What the page asks every two seconds. A new `stamp` means that more than this has changed."""

    now: Now
    counts: Counts
    next_round: NextRound | None
    problem: str | None
    notice: str | None
    can_start: bool
    can_cancel: bool
    can_retry: bool
    can_pause: bool
    can_preview: bool
    paused: bool
    stop_accepted: bool
    stamp: str


class ProjectView(View):
    """All that the project's page shows, apart from the batch."""

    id: int
    title: str
    label_studio: str
    version: str | None
    strategy: str
    status: ProjectStatus
    verdict: Verdict | None
    curve: list[CurvePoint]
    classes: list[ClassAp]
    classes_round: int | None
    map50: float | None
    gain: float | None
    minutes: float | None
    rounds: list[RoundView]
    notes: list[str]
    left_out: int
    problems: list[ImageProblem]
    n_problems: int
    happenings: list[Happening]


# --- a project now ---------------------------------------------------------------------------------------------------


def cards(connection: Connection, progress: Mapping[int, Mapping[str, Any]]) -> list[ProjectCard]:
    """All projects, by title."""
    rows = connection.execute(select(projects).order_by(func.lower(projects.c.title), projects.c.id)).all()
    return [_card(connection, row, progress.get(row.id, {})) for row in rows]


def open_project_ids(connection: Connection) -> list[int]:
    """Projects with an open round: those that may have live progress."""
    query = select(rounds.c.project_id).where(rounds.c.state.in_(OPEN_STATES))
    return [int(project_id) for project_id in connection.execute(query).scalars()]


def _card(connection: Connection, project: Row[Any], progress: Mapping[str, Any]) -> ProjectCard:
    status = status_of(connection, project, progress)
    measured = measured_rounds(connection, project.id)
    points = _curve(measured)
    spark = sparkline([(point.labels, point.map50) for point in points])
    return ProjectCard(
        id=project.id,
        title=title_of(project),
        now=status.now,
        counts=status.counts,
        budget=_budget(_settings(project)),
        map50=measured[-1].map50 if measured else None,
        verdict=_verdict(measured[-1]) if measured else None,
        problem=status.problem,
        spark=" ".join(f"{x:.1f},{y:.1f}" for x, y in spark),
        spark_end=spark[-1] if spark else None,
    )


def _budget(settings: ProjectSettings | None) -> int | None:
    """Labels, the holdout's not counted, when every round that opens by itself gets what it asks for."""
    return None if settings is None else settings.max_rounds * (settings.labels_per_round or settings.batch_size)


def title_of(project: Row[Any]) -> str:
    return str(project.title) or f"Project {project.id}"


def status_of(connection: Connection, project: Row[Any], progress: Mapping[str, Any]) -> ProjectStatus:
    """State in words, counts, and what the buttons may do."""
    last = latest_round(connection, project.id)
    counts = count_tasks(connection, project.id)
    is_open = last is not None and last.state in OPEN_STATES
    now = _working(connection, last, progress, counts) if last is not None and is_open else _resting(project, last)
    now = now if project.paused_at is None else _paused(connection, now, last)
    served = _published_round(connection, project)
    learned = served is not None and last is not None and served.number > 0
    stamp = [
        *((last.id, last.state, last.map50) if last is not None else ()),
        project.published_round_id,
        project.stop_accepted_at,
        project.paused_at,
        project.extra_params,
        project.more_holdout,
        project.remeasured_at,
        counts.labels,
        counts.holdout_labels,
        connection.execute(select(func.max(events.c.id)).where(events.c.project_id == project.id)).scalar_one(),
    ]
    return ProjectStatus(
        now=now,
        counts=counts,
        next_round=None if last is None or is_open else _next_round(connection, project, last),
        problem=project.problem if project.problem and project.problem not in now.detail else None,
        # the project's own tells how things are before the first training
        notice=_untaught(served) if served is not None and learned else project.notice,
        can_start=not is_open and project.paused_at is None,
        can_cancel=is_open,
        can_retry=project.paused_at is None and last is not None and last.state == "failed",
        can_preview=learned,
        can_pause=project.paused_at is None,
        paused=project.paused_at is not None,
        stop_accepted=project.stop_accepted_at is not None,
        stamp=sha256(json.dumps(stamp).encode())[:16],
    )


def _published_round(connection: Connection, project: Row[Any]) -> Row[Any] | None:
    columns = [rounds.c.number, rounds.c.map50, rounds.c.labels, rounds.c.settings]
    return connection.execute(select(*columns).where(rounds.c.id == project.published_round_id)).one_or_none()


def _untaught(served: Row[Any]) -> str | None:
    """A detector that finds nothing is mostly one that was trained too shortly, which nothing else on the page says."""
    if served.map50 is None or served.map50 >= UNTAUGHT:
        return None
    epochs = loads(served.settings).get("epochs", ProjectSettings.model_fields["epochs"].default)
    return (
        f"Round {served.number}'s detector finds next to nothing: mAP50 {served.map50:.3f}, from {served.labels} "
        f"images in {epochs} epochs. Train it longer: more epochs, nominal_batch equal to train_batch, a larger imgsz, "
        "or pretrained weights. Then start a round."
    )


def count_tasks(connection: Connection, project_id: int) -> Counts:
    """Asked every two seconds: from the small sets (holdout, labelled, unreadable, deleted), not from all tasks."""
    this = select(func.count()).select_from(tasks).where(tasks.c.project_id == project_id)
    live = this.where(tasks.c.deleted.is_(False))
    unreadable, held = tasks.c.image_problem.is_not(None), tasks.c.holdout.is_(True)
    labelled = labelled_task_ids(project_id).subquery()
    of_labelled = (
        select(
            func.count().filter(~held).label("labels"),
            func.count().filter(held).label("holdout_labels"),
            func.count().filter(~held, unreadable).label("unreadable"),
        )
        .select_from(labelled.join(tasks, labelled.c.task_id == tasks.c.task_id))
        .where(tasks.c.project_id == project_id, tasks.c.deleted.is_(False))
    )
    found = connection.execute(of_labelled).one()
    total = _count(connection, this) - _count(connection, this.where(tasks.c.deleted.is_(True)))
    holdout = _count(connection, live.where(held))
    unread = _count(connection, live.where(unreadable, ~held)) - found.unreadable
    return Counts(
        tasks=total,
        labels=found.labels,
        holdout=holdout,
        holdout_labels=found.holdout_labels,
        pool=total - holdout - found.labels - unread,
    )


def _count(connection: Connection, query: Any) -> int:
    return int(connection.execute(query).scalar_one())


def _working(connection: Connection, row: Row[Any], progress: Mapping[str, Any], counts: Counts) -> Now:
    """An open round. Live progress of another round, or of a state that is over, is not believed."""
    told = progress.get("phase") if progress.get("round") == row.number else None
    believed = told in PHASES_OF_STATE.get(row.state, ())
    phase: Phase = told if believed else PHASE_OF_STATE[row.state]  # type: ignore[assignment]  # told is in the table
    waiting, detail = _waiting(connection, row.id)
    done, total = _amount(connection, row, phase, progress if believed else {}, counts)
    eta = _number(progress.get("eta_seconds")) if believed else None
    rate = _number(progress.get("rate")) if believed and phase == "scoring" else None
    told_losses = progress.get("losses") if believed and phase == "training" else None
    losses = told_losses if isinstance(told_losses, dict) else {}
    amount = "" if done is None else f"{' epoch' * (phase == 'training')} {done}" + (f"/{total}" if total else "")
    amount += f", {rate_words(rate)}" if rate else ""
    return Now(
        kind="working",
        words=PHASE_WORDS["waiting"] if waiting and not believed else f"{PHASE_WORDS[phase]}{amount}",
        detail=detail or str(row.why),
        round_number=row.number,
        phase=phase,
        fraction=None if done is None or not total else min((done - (phase == "training")) / total, 1.0),
        done=done,
        total=total,
        eta_seconds=eta,
        eta=duration_words(eta) if eta else "",
        losses={str(name): value for name, raw in losses.items() if (value := _number(raw)) is not None},
        rate=rate,
        stages=_stages(row, phase),
    )


def _amount(
    connection: Connection, row: Row[Any], phase: Phase, progress: Mapping[str, Any], counts: Counts
) -> tuple[int | None, int | None]:
    """How much of the phase is done, of how much. For training: the epoch that runs, from 1."""
    done, total = _whole(progress.get("done")), _whole(progress.get("total"))
    if phase == "training":
        epochs, before = _whole(progress.get("epochs")), _whole(progress.get("epoch"))
        return (None, None) if not epochs else (min((before or 0) + 1, epochs), epochs)
    if phase == "evaluating":
        return (None if done is None else min(done, counts.holdout or done)), counts.holdout or None
    if phase == "scoring" and done is None:
        total, done = scored_so_far(connection, row.id)  # live progress is not to be had
        return done, total
    if phase in ("preparing", "scoring", "publishing") and done is not None and total:
        return min(done, total), total
    return None, None


def _waiting(connection: Connection, round_id: int) -> tuple[bool, str]:
    """Whether an open round has work that nobody does at this moment, and why not, where that is known."""
    query = select(steps.c.state, steps.c.sent_at, steps.c.error).where(
        steps.c.round_id == round_id, steps.c.state.in_(("waiting", "sent", "running"))
    )
    found = connection.execute(query.limit(500)).all()
    if not found or any(step.state == "running" for step in found):
        return False, ""
    for step in found:
        if step.state == "waiting" and step.error:
            return True, f"Tried again soon: {step.error}"
    oldest = min((step.sent_at or time.time() for step in found if step.state == "sent"), default=time.time())
    if time.time() - oldest < UNTAKEN_AFTER:
        return True, ""
    waited = duration_words(time.time() - oldest)
    return True, f"In the queue for {waited}, and no worker has taken it: is one running, or busy with another project?"


def _stages(row: Row[Any], phase: Phase) -> list[Stage]:
    names = ["Connect", "Score", "Publish"] if row.number == 0 else ["Train", "Measure", "Score", "Publish"]
    names = names if row.kind == "train" else names[-2:]
    here = next(position for position, name in enumerate(names) if phase in STAGES[name])
    state_at: dict[int, Literal["done", "now", "to come"]] = {-1: "done", 0: "now", 1: "to come"}
    return [Stage(name=name, state=state_at[(at > here) - (at < here)]) for at, name in enumerate(names)]


def _paused(connection: Connection, now: Now, last: Row[Any] | None) -> Now:
    """A paused project: what runs finishes its step, nothing else begins."""
    if now.kind == "failed":
        return now
    if now.kind != "working" or last is None:
        detail = "Nothing begins until an admin resumes it."
        return now.model_copy(update={"kind": "paused", "words": "paused", "detail": detail})
    running = select(func.count()).where(steps.c.round_id == last.id, steps.c.state == "running")
    if connection.execute(running).scalar_one():
        return now.model_copy(update={"detail": "Paused: what runs now is finished, then nothing begins."})
    detail = f"Round {last.number} goes on when an admin resumes it."
    waiting = {"kind": "paused", "words": "paused", "detail": detail, "eta": "", "eta_seconds": None}
    return now.model_copy(update=waiting)


def _resting(project: Row[Any], last: Row[Any] | None) -> Now:
    if last is None:
        return Now(kind="idle", words="connected", detail="The first batch has not been asked for yet.")
    if last.state == "failed":
        words = f"round {last.number} failed"
        return Now(kind="failed", words=words, detail=last.error or "", round_number=last.number)
    if project.stop_accepted_at is not None:
        return Now(kind="stopped", words="stopped", detail="The stop was accepted: no round opens by itself.")
    if last.state == "cancelled":
        return Now(kind="idle", words="idle", detail=f"Round {last.number} was cancelled.")
    return Now(kind="idle", words="idle", detail=f"Round {last.number} is published; labels open the next one.")


def _next_round(connection: Connection, project: Row[Any], last: Row[Any]) -> NextRound | None:
    """What `rounds.trigger` looks at, for people."""
    if last.number == 0 and last.state != "done":
        return None
    settings = _settings(project)
    if settings is None:
        return None
    new, needed = rules.towards_next(connection, project, last, settings)
    missing = max(needed - new, 0)
    if project.paused_at is not None:
        sentence = "No round opens by itself: the project is paused."
    elif project.stop_accepted_at is not None:
        sentence = "No round opens by itself: the stop was accepted."
    elif rules.rounds_done(connection, project.id) >= settings.max_rounds:
        sentence = f"No round opens by itself: max_rounds is {settings.max_rounds}. Start more by hand."
    elif missing:
        sentence = f"{missing} more {'label opens' if missing == 1 else 'labels open'} round {last.number + 1}."
    else:
        sentence = f"Round {last.number + 1} opens at the next label."
    return NextRound(new=new, needed=needed, sentence=sentence)


# --- what the rounds bought ------------------------------------------------------------------------------------------


def project_view(
    connection: Connection, project_id: int, progress: Mapping[str, Any], label_studio_url: str
) -> ProjectView:
    """
    Raises:
        NotFound: the project is not connected.
    """
    project = get_project(connection, project_id)
    measured = measured_rounds(connection, project_id)
    newest = measured[-1] if measured else None
    every = _rounds(connection, project_id)
    # without a labelled holdout nothing is measured, and what was left out is to be said all the same
    of_dataset = (row for row in every if row.labels is not None and row.kind == "train" and row.state != "failed")
    trained = next(of_dataset, None)
    report = loads(get_round(connection, trained.id).report) if trained is not None else {}
    table = [_round_view(row) for row in every]
    return ProjectView(
        id=project_id,
        title=title_of(project),
        label_studio=f"{label_studio_url}/projects/{project_id}/data",
        version=project.published_version,
        strategy=settings.strategy if (settings := _settings(project)) else "",
        status=status_of(connection, project, progress),
        verdict=_verdict(newest) if newest is not None else None,
        curve=_curve(measured),
        classes=_classes(measured),
        classes_round=newest.number if newest is not None else None,
        map50=newest.map50 if newest is not None else None,
        gain=newest.gain if newest is not None else None,
        minutes=newest.minutes if newest is not None else None,
        rounds=table,
        notes=[str(note) for note in report.get("notes", [])],
        left_out=len(report.get("left_out", {})),
        problems=_image_problems(connection, project_id, label_studio_url),
        n_problems=_count_image_problems(connection, project_id),
        happenings=_happenings(connection, project_id),
    )


def _settings(project: Row[Any]) -> ProjectSettings | None:
    """None: they were stored by a version that knew other settings. Saving them again in Label Studio says which."""
    try:
        return rules.settings_of(project)
    except SettingsInvalid:
        return None


def _rounds(connection: Connection, project_id: int) -> Sequence[Row[Any]]:
    """Newest first, without the reports: those name every image that was left out."""
    columns = [column for column in rounds.c if column.name not in ("report", "per_class", "settings")]
    query = select(*columns).where(rounds.c.project_id == project_id).order_by(rounds.c.number.desc())
    return connection.execute(query).all()


def round_views(connection: Connection, project_id: int) -> list[RoundView]:
    """All rounds of a project, newest first.

    Raises:
        NotFound: the project is not connected.
    """
    get_project(connection, project_id)
    return [_round_view(row) for row in _rounds(connection, project_id)]


def _round_view(row: Row[Any]) -> RoundView:
    verdict = str(loads(row.verdict).get("verdict", ""))
    return RoundView(
        **{
            name: getattr(row, name)
            for name in RoundView.model_fields
            if name not in ("verdict", "verdict_words", "seconds", "has_weights")
        },
        has_weights=row.weights is not None and row.number > 0,
        seconds=(row.closed_at or time.time()) - row.opened_at,
        verdict=verdict,
        verdict_words=VERDICT_WORDS.get(verdict, ""),
    )


def _verdict(row: Row[Any]) -> Verdict | None:
    told = loads(row.verdict)
    if not told.get("verdict"):
        return None
    return Verdict(
        verdict=str(told["verdict"]),
        words=VERDICT_WORDS.get(str(told["verdict"]), str(told["verdict"])),
        reasons=[str(reason) for reason in told.get("reasons", [])],
        note=str((told.get("stats") or {}).get("note", "")),
        round_number=row.number,
    )


def _curve(measured: Iterable[Row[Any]]) -> list[CurvePoint]:
    return [
        CurvePoint(round_number=row.number, labels=row.labels, map50=row.map50)
        for row in measured
        if row.labels is not None
    ]


def _classes(measured: Sequence[Row[Any]]) -> list[ClassAp]:
    """AP50 per class of the newest measured round, highest first; classes that could not be measured come last."""
    if not measured:
        return []
    now = loads(measured[-1].per_class)
    before = loads(measured[-2].per_class) if len(measured) > 1 else {}
    found = [_class_ap(str(name), value, before.get(name) or {}) for name, value in now.items()]
    return sorted(found, key=lambda one: (one.ap50 is None, -(one.ap50 or 0.0), one.name))


def _class_ap(name: str, value: Mapping[str, Any], before: Mapping[str, Any]) -> ClassAp:
    ap50, earlier = _number(value.get("ap50")), _number(before.get("ap50"))
    change = None if ap50 is None or earlier is None else round(ap50 - earlier, 6)
    return ClassAp(name=name, ap50=ap50, change=change, boxes=_whole(value.get("boxes")) or 0)


def sparkline(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(labels, mAP50) as (x, y) in a picture of SPARK_WIDTH x SPARK_HEIGHT; its floor is mAP50 0."""
    if not points:
        return []
    left, right = points[0][0], max(labels for labels, _ in points)
    top = max(max(map50 for _, map50 in points), 1e-9)
    across, down = SPARK_WIDTH - 2 * SPARK_MARGIN, SPARK_HEIGHT - 2 * SPARK_MARGIN
    return [
        (
            SPARK_MARGIN + across * ((labels - left) / (right - left) if right > left else 0.5),
            SPARK_MARGIN + down * (1 - map50 / top),
        )
        for labels, map50 in points
    ]


# --- the batch -------------------------------------------------------------------------------------------------------


def batch_view(
    connection: Connection, project_id: int, label_studio_url: str, offset: int = 0, limit: int = PAGE
) -> BatchView:
    """The current batch from rank `offset` on, at most `limit` of its tasks.

    Raises:
        NotFound: the project is not connected.
    """
    project = get_project(connection, project_id)
    if project.published_round_id is None:
        return BatchView()
    of_batch = (
        scores.join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project_id)),
        (scores.c.round_id == project.published_round_id, scores.c.rank.is_not(None), tasks.c.deleted.is_(False)),
    )
    is_labelled = tasks.c.task_id.in_(labelled_task_ids(project_id))
    total, labelled = connection.execute(
        select(func.count(), func.count().filter(is_labelled)).select_from(of_batch[0]).where(*of_batch[1])
    ).one()
    of_task = (tasks.c.image.label("reference"), tasks.c.holdout, tasks.c.image_problem)
    query = (
        select(scores, *of_task, is_labelled.label("labelled"))
        .select_from(of_batch[0])
        .where(*of_batch[1])
        .order_by(scores.c.rank)
        .offset(offset)
        .limit(limit)
    )
    colours = class_colours(project)
    return BatchView(
        round_number=connection.execute(
            select(rounds.c.number).where(rounds.c.id == project.published_round_id)
        ).scalar_one_or_none(),
        version=project.published_version,
        total=total,
        labelled=labelled,
        offset=offset,
        tasks=[_batch_task(row, project_id, label_studio_url, colours) for row in connection.execute(query)],
    )


def tasks_of_round(
    connection: Connection, project: Row[Any], round_id: int | None, task_ids: Sequence[int], label_studio_url: str
) -> list[BatchTask]:
    """These tasks as a round scored them, whether or not they are in its batch: then their rank is 0. At most 500."""
    is_labelled = tasks.c.task_id.in_(labelled_task_ids(project.id))
    of_task = (tasks.c.image.label("reference"), tasks.c.holdout, tasks.c.image_problem)
    query = (
        select(scores, *of_task, is_labelled.label("labelled"))
        .join(tasks, (tasks.c.task_id == scores.c.task_id) & (tasks.c.project_id == project.id))
        .where(scores.c.round_id == round_id, scores.c.task_id.in_(task_ids[:500]), tasks.c.deleted.is_(False))
    )
    colours = class_colours(project)
    return [_batch_task(row, project.id, label_studio_url, colours) for row in connection.execute(query)]


def class_colours(project: Row[Any]) -> dict[str, int]:
    """Label -> colour number: by its position in the label config, so that a class keeps its colour."""
    try:
        labels = rules.label_map_of(project).labels
    except (LabelConfigUnsupported, SettingsInvalid):
        return {}
    return {label: position % CLASS_COLOURS for position, label in enumerate(labels)}


def _batch_task(row: Row[Any], project_id: int, label_studio_url: str, colours: Mapping[str, int]) -> BatchTask:
    holdout = bool(row.holdout)
    regions = [] if holdout else _regions(row.regions)
    sizes = [(region.get("original_width"), region.get("original_height")) for region in regions]
    width, height = next(((w, h) for w, h in sizes if isinstance(w, int) and isinstance(h, int)), (None, None))
    boxes = [box for region in regions[:MAX_BOXES] if (box := _box(region, colours)) is not None]
    return BatchTask(
        task_id=row.task_id,
        rank=row.rank or 0,
        holdout=holdout,
        labelled=bool(row.labelled),
        utility=None if holdout else row.utility,
        uncertainty=None if holdout else row.uncertainty,
        diversity=None if holdout else row.diversity,
        boxes=boxes if width and height else [],
        n_boxes=len(regions),
        image_width=width,
        image_height=height,
        problem=row.image_problem or row.problem,
        thumbnail=f"/api/projects/{project_id}/tasks/{row.task_id}/thumbnail.jpg?v={image_digest(row.reference)}",
        label_studio=task_url(label_studio_url, project_id, row.task_id),
    )


def _regions(text: str | None) -> list[dict[str, Any]]:
    found = loads(text)
    return [region for region in found if isinstance(region, dict)] if isinstance(found, list) else []


def _box(region: Mapping[str, Any], colours: Mapping[str, int]) -> Box | None:
    drawn = drawn_box(region)
    if drawn is None:
        return None
    label, (x, y, width, height) = drawn
    sides = {"x": x, "y": y, "width": width, "height": height}
    return Box(label=label, score=_number(region.get("score")), colour=colours.get(label, 0), **sides)


def image_digest(image: str) -> str:
    """Names a version of a task's image: it changes when the task's data does."""
    return sha256(image.encode())[:16]


def task_url(label_studio_url: str, project_id: int, task_id: int) -> str:
    return f"{label_studio_url}/projects/{project_id}/data?task={task_id}"


# --- images and events -----------------------------------------------------------------------------------------------


def _unreadable(project_id: int) -> tuple[Any, ...]:
    return (tasks.c.project_id == project_id, tasks.c.deleted.is_(False), tasks.c.image_problem.is_not(None))


def _image_problems(connection: Connection, project_id: int, label_studio_url: str) -> list[ImageProblem]:
    query = select(tasks.c.task_id, tasks.c.image_problem).where(*_unreadable(project_id))
    return [
        ImageProblem(
            task_id=row.task_id,
            problem=row.image_problem,
            label_studio=task_url(label_studio_url, project_id, row.task_id),
        )
        for row in connection.execute(query.order_by(tasks.c.task_id).limit(MAX_PROBLEMS))
    ]


def _count_image_problems(connection: Connection, project_id: int) -> int:
    query = select(func.count()).select_from(tasks).where(*_unreadable(project_id))
    return int(connection.execute(query).scalar_one())


def _happenings(connection: Connection, project_id: int) -> list[Happening]:
    """Latest first; a run of one kind is one line."""
    query = (
        select(events.c.at, events.c.kind, events.c.detail)
        .where(events.c.project_id == project_id)
        .order_by(events.c.id.desc())
        .limit(EVENTS_READ)
    )
    found = []
    for (kind, detail), run in itertools.groupby(connection.execute(query), lambda row: (row.kind, row.detail)):
        together = list(run)
        words = EVENT_WORDS.get(kind, kind)
        found.append(Happening(at=together[0].at, words=words, detail=detail, times=len(together)))
    return found[:MAX_EVENTS]


# --- words and numbers -----------------------------------------------------------------------------------------------


def duration_words(seconds: float) -> str:
    """40 s, 5 min, 2 h 10 min, 3 d 4 h: as exact as a person needs it."""
    seconds = max(seconds, 0.0)
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def rate_words(per_second: float) -> str:
    """12 images/s, 0.4 images/s: as exact as a person needs it."""
    return f"{per_second:.0f} images/s" if per_second >= 10 else f"{per_second:.1f} images/s"


def _number(value: Any) -> float | None:
    """A finite number, or None: live progress is Redis', and Redis is the outside."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        return None
    return float(value)


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number < 0 else int(number)
