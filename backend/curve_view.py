"""Read models of the measuring half of the admin page: verdict, holdout, learning curve, returns, classes, money.

Everything was measured and stored by a round; here it is read, compared with the round before, and said in words.
What a store of an older version lacks (an interval, a fit) is left out, never made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, select

from backend.views import VERDICT_WORDS, View
from worker import verdict as measuring
from worker.artifacts import sha256
from worker.errors import NotFound
from worker.store import events, get_project, loads, record_event, rounds, task_annotations
from worker.verdict import ClassHistory, Power, Prices, Return

RARE_BOXES = 30  # holdout boxes under which a class's AP is mostly luck
KNEE_POINTS = 4  # of three points on a line one is a knee, too
TILE_WIDTH, TILE_HEIGHT, TILE_MARGIN = 120, 44, 4
ACKNOWLEDGED = "warning acknowledged"  # the kind of event
WORTH_FROM = {
    "default": "the default; settings worth_gain, or cost_per_hour with value_per_point, change it",
    "settings": "set in the project's settings",
    "prices": "from your prices: what an hour costs and what a point is worth",
}
Told = Mapping[str, Any]


class VerdictWarning(View):
    """Something an admin should know before accepting a stop: never a veto. `key` names the sentence."""

    key: str
    sentence: str
    acknowledged: bool


class BaseRule(View):
    """The simple rule, beside the verdict: the last gain against `min_map_gain`."""

    verdict: str
    words: str
    sentence: str
    predicted: str


class VerdictCard(View):
    """Advice after the newest measured round. Gains in mAP50, 0..1; `mean_gain` per round, with its interval."""

    verdict: str
    words: str
    headline: str
    reasons: list[str]
    round_number: int
    warnings: list[VerdictWarning]
    base: BaseRule | None
    worth_gain: float | None
    worth_gain_from: str
    mean_gain: float | None
    low: float | None
    high: float | None
    scale: list[float]
    level: float | None
    rounds_used: int | None
    more_holdout: str
    extrapolation: str


class HoldoutClass(View):
    name: str
    boxes: float
    is_rare: bool
    share: float


class HoldoutView(View):
    """The holdout, and what it can see. `more`: images worth asking for beside those that wait,
    0 when none would help."""

    size: int
    labelled: int
    waiting: int
    smallest_visible_gain: float | None
    more: int
    smallest_visible_gain_then: float | None
    sentence: str
    boxes_are: str
    classes: list[HoldoutClass]


class CurvePointView(View):
    """mAP50 of one measured round with its interval; None: it was not measured."""

    round_number: int
    labels: int
    map50: float
    low: float | None
    high: float | None


class NextPoint(View):
    """What the fit says of the next round."""

    labels: int
    map50: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float


class CurveView(View):
    """The learning curve. `line` of (labels, mAP50), `band` of (labels, low, high); `level` of all intervals, 0..1."""

    points: list[CurvePointView]
    level: float
    line: list[tuple[float, float]]
    band: list[tuple[float, float, float]]
    next: NextPoint | None
    knee: int | None
    fit_words: str
    agrees: bool | None


class ReturnView(View):
    """What one round bought against the measured round before; None: not to be had. Gains in mAP50, 0..1.

    `cost`, `value` and `net` in the money of the settings; `value` counts mAP points, hundredths.
    """

    round_number: int
    labels: int
    labels_added: int | None
    map50: float
    low: float | None
    high: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    per_100_labels: float | None
    hours: float | None
    per_hour: float | None
    cost: float | None
    value: float | None
    net: float | None


class MoneyView(View):
    """Annotators' time, and its price when one is set. `median_seconds` and the mean, `minutes_per_image`: of labelled
    images that Label Studio timed."""

    median_seconds: float | None
    minutes_per_image: float | None
    timed_images: int
    hours: float
    cost_per_hour: float | None
    value_per_point: float | None
    cost_so_far: float | None
    cost_of_next_round: float | None
    next_round_labels: int
    sentence: str


class ClassPoint(View):
    round_number: int
    ap50: float | None


class ClassTrend(View):
    """AP50 of one class over the measured rounds. `line` and `ends` draw it: one scale, 0 to 1, for all classes."""

    name: str
    ap50: float | None
    change: float | None
    boxes: int
    training_boxes: int | None
    flags: list[Literal["rare", "plateau", "rising"]]
    sentence: str
    points: list[ClassPoint]
    line: str
    ends: tuple[float, float] | None
    told: str


class MeasuringView(View):
    """All of it, as the page shows it."""

    verdict: VerdictCard | None
    holdout: HoldoutView
    curve: CurveView
    returns: list[ReturnView]
    money: MoneyView
    classes: list[ClassTrend]
    class_sentences: list[str]
    classes_round: int | None


def measuring_view(connection: Connection, project_id: int) -> MeasuringView:
    """
    Raises:
        NotFound: the project is not connected.
    """
    get_project(connection, project_id)
    rows = measured_rows(connection, project_id)
    found = returns_view(connection, project_id, rows)
    classes = class_trends(connection, project_id, [row.number for row in rows])
    return MeasuringView(
        verdict=verdict_card(connection, project_id, rows),
        holdout=holdout_now(connection, project_id),
        curve=curve_view(rows),
        returns=found,
        money=money_view(connection, project_id),
        classes=classes,
        class_sentences=[one.sentence for one in classes if "plateau" in one.flags and one.sentence],
        classes_round=rows[-1].number if rows else None,
    )


def measured_rows(connection: Connection, project_id: int) -> Sequence[Row[Any]]:
    """The points of the learning curve, oldest first, without the reports: those name every image left out."""
    columns = [rounds.c[name] for name in ("id", "number", "labels", "map50", "verdict")]
    measured = (rounds.c.project_id == project_id, rounds.c.map50.is_not(None), rounds.c.state != "failed")
    return connection.execute(select(*columns).where(*measured).order_by(rounds.c.number)).all()


# --- the verdict -----------------------------------------------------------------------------------------------------


def verdict_card(connection: Connection, project_id: int, rows: Sequence[Row[Any]]) -> VerdictCard | None:
    told: Told = loads(rows[-1].verdict) if rows else {}
    if not told.get("verdict"):
        return None
    name, numbers = str(told["verdict"]), told.get("numbers") or {}
    reasons = [str(reason) for reason in told.get("reasons") or []]
    known = _acknowledged(connection, project_id)
    low, high = _number(numbers.get("lower")), _number(numbers.get("upper"))
    mean, worth = _number(numbers.get("mean_gain")), _number(numbers.get("worth_gain"))
    return VerdictCard(
        verdict=name,
        words=VERDICT_WORDS.get(name, name),
        headline=reasons[0] if reasons else "",
        reasons=reasons[1:],
        round_number=rows[-1].number,
        warnings=[_warning(str(sentence), known) for sentence in told.get("warnings") or []],
        base=_base_rule(told),
        worth_gain=worth,
        worth_gain_from=WORTH_FROM.get(str(numbers.get("worth_gain_from")), ""),
        mean_gain=mean,
        low=low,
        high=high,
        scale=_gain_scale(mean, low, high, worth),
        level=_number(numbers.get("level")),
        rounds_used=numbers.get("rounds_used"),
        more_holdout="" if name == "insufficient_evidence" else _more_words(numbers),  # a reason says it then
        extrapolation=str((told.get("fit") or {}).get("sentence", "")),
    )


def _gain_scale(mean: float | None, low: float | None, high: float | None, worth: float | None) -> list[float]:
    """0, low, mean, high, worth_gain as positions 0..100 on one line; nothing unless all are known."""
    if mean is None or low is None or high is None or worth is None:
        return []
    least, most = min(low, 0.0), max(high, worth)
    least, most = least - 0.06 * (most - least), most + 0.06 * (most - least)
    return [100 * (value - least) / max(most - least, 1e-9) for value in (0.0, low, mean, high, worth)]


def _base_rule(told: Told) -> BaseRule | None:
    """Verdicts of older versions are the base rule's own, and have nothing beside them."""
    base: Told = told.get("base") or {}
    if not base.get("verdict"):
        return None
    name = str(base["verdict"])
    sentence = "; ".join(str(reason) for reason in base.get("reasons") or [])
    stats: Told = told.get("stats") or {}
    return BaseRule(
        verdict=name, words=VERDICT_WORDS.get(name, name), sentence=sentence, predicted=_predicted(told, stats)
    )


def _predicted(told: Told, stats: Told) -> str:
    gain = _number(stats.get("predicted_gain_next_round"))
    if gain is None:
        return ""
    if not told.get("next_gain_estimable"):
        return "Its next gain is not estimable: a gain was not positive, or the gains grow."
    return f"It predicts {gain:+.3f} for the next round.".replace("-", "−")


def _more_words(numbers: Told) -> str:
    more, then = numbers.get("more_holdout"), _number(numbers.get("smallest_visible_gain_then"))
    if not more or then is None:
        return ""
    return f"{more} more labelled holdout images would show gains from {then:.3f} on."


def _warning(sentence: str, known: frozenset[str]) -> VerdictWarning:
    key = warning_key(sentence)
    return VerdictWarning(key=key, sentence=sentence, acknowledged=key in known)


def warning_key(sentence: str) -> str:
    """Names a warning. One whose figures change is a new one."""
    return sha256(sentence.encode())[:16]


def _acknowledged(connection: Connection, project_id: int) -> frozenset[str]:
    query = select(events.c.key).where(events.c.project_id == project_id, events.c.kind == ACKNOWLEDGED)
    return frozenset(key.removeprefix("acknowledged-") for key in connection.execute(query).scalars())


def acknowledge(connection: Connection, project_id: int, key: str, who: str) -> None:
    """Remember that an admin has read a warning of the present verdict.

    Raises:
        NotFound: the project is not connected, or its verdict has no such warning.
    """
    get_project(connection, project_id)
    card = verdict_card(connection, project_id, measured_rows(connection, project_id))
    found = next((one for one in card.warnings if one.key == key), None) if card is not None else None
    if found is None:
        raise NotFound(f"the verdict on project {project_id} has no warning {key!r} now. Reload the page")
    record_event(connection, project_id, ACKNOWLEDGED, f"acknowledged-{key}", f"{found.sentence} ({who})")


# --- the holdout -----------------------------------------------------------------------------------------------------


def holdout_now(connection: Connection, project_id: int) -> HoldoutView:
    """
    Raises:
        NotFound: the project is not connected.
    """
    project = get_project(connection, project_id)
    found = holdout_view(measuring.power_of(connection, project_id))
    if found.size == 0 and project.published_round_id is None:
        return found.model_copy(update={"sentence": "The holdout is drawn with the first batch."})
    return found


def holdout_view(power: Power) -> HoldoutView:
    most = max(power.boxes_per_class.values(), default=0.0)
    return HoldoutView(
        size=power.holdout,
        labelled=power.labelled,
        waiting=power.waiting,
        smallest_visible_gain=power.smallest_visible_gain,
        more=max(power.more - power.waiting, 0),
        smallest_visible_gain_then=power.smallest_visible_gain_then,
        sentence=power.sentence,
        boxes_are=power.boxes_are,
        classes=[
            HoldoutClass(name=name, boxes=boxes, is_rare=boxes < RARE_BOXES, share=boxes / most if most else 0.0)
            for name, boxes in sorted(power.boxes_per_class.items(), key=lambda one: (one[1], one[0]))
        ],
    )


# --- the curve -------------------------------------------------------------------------------------------------------


def curve_view(rows: Sequence[Row[Any]]) -> CurveView:
    told: Told = loads(rows[-1].verdict) if rows else {}
    fit: Told = told.get("fit") or {}
    knee = told.get("knee")
    return CurveView(
        points=[_point(row) for row in rows if row.labels is not None],
        level=_number(_interval(rows[-1]).get("level")) or 0.9 if rows else 0.9,
        line=[(x, y) for x, y in fit.get("line") or []],
        band=[(x, low, high) for x, low, high in fit.get("band") or []],
        next=_next_point(fit),
        knee=knee if isinstance(knee, int) and len(rows) >= KNEE_POINTS else None,
        fit_words=_fit_words(fit),
        agrees=fit.get("agrees"),
    )


def _interval(row: Row[Any]) -> Told:
    found = loads(row.verdict).get("interval")
    return found if isinstance(found, dict) else {}


def _point(row: Row[Any]) -> CurvePointView:
    found = _interval(row)
    low, high = _number(found.get("low")), _number(found.get("high"))
    return CurvePointView(round_number=row.number, labels=row.labels, map50=row.map50, low=low, high=high)


def _next_point(fit: Told) -> NextPoint | None:
    names = {"labels": "next_labels", "map50": "next_map50", "low": "next_map50_low", "high": "next_map50_high"}
    names |= {name: f"next_{name}" for name in ("gain", "gain_low", "gain_high")}
    values = {name: fit.get(stored) for name, stored in names.items()}
    return None if any(value is None for value in values.values()) else NextPoint.model_validate(values)


def _fit_words(fit: Told) -> str:
    a, b, c = (_number(fit.get(name)) for name in "abc")
    if a is None or b is None or c is None:
        return ""
    return f"mAP50 = {a:.3f} − {b:.3g} · labels^−{c:.2f}"


# --- what the rounds bought ------------------------------------------------------------------------------------------


def returns_view(connection: Connection, project_id: int, rows: Sequence[Row[Any]]) -> list[ReturnView]:
    """Newest first, as the table of rounds has them."""
    row_of = {row.id: row for row in rows}
    found = measuring.returns_of(connection, project_id)
    return [_return(one, row_of[one.round_id]) for one in reversed(found) if one.round_id in row_of]


def _return(one: Return, row: Row[Any]) -> ReturnView:
    point = _interval(row)
    same = {name: getattr(one, name) for name in ReturnView.model_fields if hasattr(one, name)}
    return ReturnView(
        **same,
        round_number=row.number,
        map50=row.map50,
        low=_number(point.get("low")),
        high=_number(point.get("high")),
        hours=one.hours_added,
    )


def money_view(connection: Connection, project_id: int) -> MoneyView:
    found: Prices = measuring.prices_of(connection, project_id)
    same = {name: getattr(found, name) for name in MoneyView.model_fields if name != "median_seconds"}
    return MoneyView(**same, median_seconds=median_seconds(connection, project_id))


def median_seconds(connection: Connection, project_id: int) -> float | None:
    """Of the labelled images that Label Studio timed, all annotations of an image together. Counted in SQL."""
    timed = (
        select(func.sum(task_annotations.c.lead_time).label("seconds"))
        .where(task_annotations.c.project_id == project_id, task_annotations.c.cancelled.is_(False))
        .where(task_annotations.c.lead_time > 0)
        .group_by(task_annotations.c.task_id)
        .subquery()
    )
    images = int(connection.execute(select(func.count()).select_from(timed)).scalar_one())
    middle = select(timed.c.seconds).order_by(timed.c.seconds).offset(max(images - 1, 0) // 2).limit(2 - images % 2)
    found = connection.execute(middle).scalars().all() if images else []
    return sum(found) / len(found) if found else None


# --- classes ---------------------------------------------------------------------------------------------------------


def class_trends(connection: Connection, project_id: int, numbers: Sequence[int]) -> list[ClassTrend]:
    """What wants attention first, then by AP50, lowest first."""
    found = [_trend(one, numbers) for one in measuring.class_histories(connection, project_id)]
    return sorted(found, key=_attention)


def _attention(one: ClassTrend) -> tuple[bool, bool, float, str]:
    return "plateau" not in one.flags, "rare" not in one.flags, 2.0 if one.ap50 is None else one.ap50, one.name


def _trend(one: ClassHistory, numbers: Sequence[int]) -> ClassTrend:
    now, before = one.ap50[-1] if one.ap50 else None, one.ap50[-2] if len(one.ap50) > 1 else None
    spots = tile_line(one.ap50)
    known = [(number, ap50) for number, ap50 in zip(numbers, one.ap50, strict=True) if ap50 is not None]
    return ClassTrend(
        name=one.name,
        ap50=now,
        change=None if now is None or before is None else round(now - before, 6),
        boxes=one.boxes,
        training_boxes=one.training_boxes,
        flags=list(one.flags),
        sentence=one.sentence,
        points=[ClassPoint(round_number=number, ap50=ap50) for number, ap50 in zip(numbers, one.ap50, strict=True)],
        line=" ".join(f"{x:.1f},{y:.1f}" for x, y in spots),
        ends=spots[-1] if spots else None,
        told=", ".join(f"round {number}: {ap50:.2f}" for number, ap50 in known) or "not measured",
    )


def tile_line(history: Sequence[float | None]) -> list[tuple[float, float]]:
    """AP50 as points of a picture TILE_WIDTH x TILE_HEIGHT; all classes have one scale, 0 to 1, and one time axis."""
    across, down = TILE_WIDTH - 2 * TILE_MARGIN, TILE_HEIGHT - 2 * TILE_MARGIN
    steps = len(history) - 1
    return [
        (TILE_MARGIN + across * (at / steps if steps else 0.5), TILE_MARGIN + down * (1 - min(max(value, 0.0), 1.0)))
        for at, value in enumerate(history)
        if value is not None
    ]


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        return None
    return float(value)
