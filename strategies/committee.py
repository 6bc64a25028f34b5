"""How much the members of a committee disagree about an image: query by committee (Seung et al. 1992).

Each member is one detector's boxes and class probabilities. Boxes of different members that show the same object are
matched, every member votes on every object (a member without a box there votes background), and the disagreement is
the Jensen-Shannon divergence of the votes (Lin 1991). The class names are the caller's business: column c means the
same class in every member.

Every result depends on what the members say, not on their order nor on the order of their boxes: both are sorted by
content before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from strategies.arrays import Integers, as_matrix, as_probabilities, as_vector
from strategies.errors import InputInvalid
from strategies.uncertainty import AGGREGATES, aggregate, check_choice, with_background

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

# What a member says, as image_disagreement takes it: boxes_xyxy (n, 4), probabilities (n, C).
Member = tuple[ArrayLike, ArrayLike]

# Votes -> the confidence (max_c p_c) from which boxes count unless told otherwise. A soft vote for a faint box is
# nearly background, so low thresholds do no harm; a hard vote is a whole vote, so only boxes that are drawn have one.
VOTES = MappingProxyType({"soft": 0.05, "hard": 0.25})

_ALMOST_EQUAL = float(np.nextafter(1.0, 0.0))  # so that no neighbour ties with an exact copy
_LARGEST_COORDINATE = 1e9  # pixels; areas stay far from where float64 overflows
_ROUNDING = 1e-12  # divergences below this are the rounding of equal votes, which must not rank images
_SUM_ROUNDING = 1e-3  # how far from 1 a row of votes may sum: float16 and float32 probabilities


@dataclass(frozen=True)
class _Boxes:
    """The boxes of all members in one list of N rows, in an order that depends on their content only.

    boxes_xyxy (N, 4); probabilities (N, C); members (N,) 0..count-1, ascending, in the order of content; sources (N, 2)
    the member and the row each came from.
    """

    boxes_xyxy: Matrix
    probabilities: Matrix
    members: Integers
    sources: Integers
    count: int


def image_disagreement(
    members: Sequence[Member],
    votes: str = "soft",
    threshold: float | None = None,
    iou_threshold: float = 0.5,
    iou_weight: float = 0.0,
    method: str = "max",
    n: int = 10,
) -> float:
    """Disagreement of a committee about one image.

    Args: members: (boxes_xyxy (n, 4), probabilities (n, C)) of each of M >= 2 detectors, the same C for all; no boxes
        may be an empty list; votes, iou_threshold, iou_weight: see `object_disagreements`; threshold: boxes count when
        max_c p_c >= threshold, None: 0.05 for soft votes, 0.25 for hard ones; method, n: see `aggregate`, over the
        objects.
    Returns: a float in [0, 1], high = more disagreement ("sum" is clipped); 0 when no member sees anything.
    Raises: InputInvalid for NaN, fewer than 2 members, another number of classes, boxes with x2 < x1 or y2 < y1,
        unknown names or values out of range.
    """
    check_choice(method, AGGREGATES, "aggregate method")
    values = object_disagreements(members, votes, threshold, iou_threshold, iou_weight)
    if not len(values):
        aggregate([0.0], method, n)  # an n of 0 is wrong for an empty image too
        return 0.0
    return min(aggregate(values, method, n), 1.0)


def object_disagreements(
    members: Sequence[Member],
    votes: str = "soft",
    threshold: float | None = None,
    iou_threshold: float = 0.5,
    iou_weight: float = 0.0,
) -> Vector:
    """Disagreement of a committee about each of K objects, as `match_boxes` finds them.

    The Jensen-Shannon divergence of the M votes / ln M, + iou_weight * (1 - mean IoU over all pairs of matched boxes),
    clipped. A box seen by one member alone has no pair, so its second part is 0.

    Args: votes: "soft", a box votes its `with_background` row, or "hard", it votes for its most likely class alone;
        iou_weight: the lambda of the second part, >= 0; the others: see `image_disagreement`.
    Returns: (K,) in [0, 1]; no boxes: (0,). With M members the vote part reaches 1 only if all M are sure of different
        things (background is one of them): with fewer classes than M - 1 it stays below.
    Raises: InputInvalid, see `image_disagreement`.
    """
    check_choice(votes, VOTES, "votes")
    weight = float(as_vector([iou_weight], "iou_weight", 1, low=0.0)[0])
    lowest = float(as_vector([VOTES[votes] if threshold is None else threshold], "threshold", 1, 0.0, 1.0)[0])
    boxes = _gathered(members, lowest)
    objects = _matched(boxes, iou_threshold)
    if not len(objects):
        return np.zeros(0)
    rows = with_background(boxes.probabilities) if votes == "soft" else _hard_votes(boxes.probabilities)
    background = np.eye(1, rows.shape[1])
    voted = np.concatenate([rows, background])[objects]  # no box is position -1: the last row
    return np.clip(_divergence(voted) + weight * _looseness(boxes.boxes_xyxy, objects), 0.0, 1.0)


def match_boxes(members: Sequence[Member], iou_threshold: float = 0.5) -> Integers:
    """Which boxes of the members show the same object.

    Greedy: pairs of boxes of different members by falling IoU (equal ones: those with the same most likely class
    first, then the more confident) are joined, with all they were joined to before, if **every** two boxes of the
    result overlap at iou_threshold or more. So an object has at most one box of each member, any two members are
    matched one to one, and a wide box can not tie two neighbours together. Classes do not matter beyond ties: that two
    members give one object different names is what is to be found.

    Args: members: see `image_disagreement`, all boxes count; iou_threshold in (0, 1].
    Returns: (K, M) int64, for each object the row of its box in each member, -1 where the member has none; each box
        appears once. Boxes without area overlap with their exact equals only.
    Raises: InputInvalid, see `image_disagreement`.
    """
    boxes = _gathered(members, 0.0)
    objects = _matched(boxes, iou_threshold)
    result = np.full(objects.shape, -1, dtype=np.int64)
    found, _ = np.nonzero(objects >= 0)
    member, row = boxes.sources[objects[objects >= 0]].T
    result[found, member] = row
    return result


def vote_divergence(votes: ArrayLike) -> Vector:
    """Jensen-Shannon divergence of M distributions / ln M: (H(mean of the votes) - mean of their H) / ln M.

    Args: votes (K, M, D): K objects, M >= 2 members, rows of D that sum to 1.
    Returns: (K,) in [0, 1]: 0 when all vote the same, 1 when no two votes have anything in common.
    Raises: InputInvalid for NaN, another shape, values outside [0, 1] or rows that do not sum to 1.
    """
    try:
        array = np.asarray(votes)
    except ValueError as problem:  # ragged lists
        raise InputInvalid("votes must be a rectangular array of numbers.") from problem
    if array.ndim != 3 or array.shape[1] < 2:
        raise InputInvalid(f"votes must be (objects, members, choices), members at least 2; got {array.shape}.")
    rows = as_probabilities(array.reshape(-1, array.shape[2]), "votes")
    if len(rows) and abs(rows.sum(axis=1) - 1).max() > _SUM_ROUNDING:
        raise InputInvalid("Each row of votes must sum to 1. Pass with_background rows, not raw sigmoids.")
    return _divergence(rows.reshape(array.shape))


def _divergence(votes: NDArray[np.float64]) -> Vector:
    members = votes.shape[1]
    nats = entr(votes.mean(axis=1)).sum(axis=1) - entr(votes).sum(axis=2).mean(axis=1)
    nats[nats < _ROUNDING] = 0.0
    result: Vector = np.minimum(nats / np.log(members), 1.0)
    return result


def _hard_votes(probabilities: Matrix) -> Matrix:
    """(N, C) -> (N, C + 1) one-hot, column 0 the background, which no box votes for; ties: the first class."""
    rows = np.zeros((len(probabilities), probabilities.shape[1] + 1))
    rows[np.arange(len(rows)), 1 + probabilities.argmax(axis=1)] = 1.0
    return rows


def _looseness(boxes_xyxy: Matrix, objects: Integers) -> Vector:
    """(K,) 1 - mean IoU over all pairs of boxes of an object; 0 for a single box."""
    total, pairs = np.zeros(len(objects)), np.zeros(len(objects))
    for first, second in combinations(objects.T, 2):
        both = (first >= 0) & (second >= 0)
        total[both] += 1 - _ious(boxes_xyxy[first[both]], boxes_xyxy[second[both]])
        pairs += both
    return total / np.maximum(pairs, 1)


def _matched(boxes: _Boxes, iou_threshold: float) -> Integers:
    """(K, M) positions in `boxes`, -1 where a member has no box; see `match_boxes`."""
    lowest = float(as_vector([iou_threshold], "iou_threshold", 1, 0.0, 1.0)[0])
    if not lowest:
        raise InputInvalid("iou_threshold must be above 0, else boxes that do not touch are matched.")
    names = _joined(len(boxes.members), *_overlapping(boxes, lowest))
    numbers = np.unique(names, return_inverse=True)[1]
    objects = np.full((int(numbers.max(initial=-1)) + 1, boxes.count), -1, dtype=np.int64)
    objects[numbers, boxes.members] = np.arange(len(numbers))
    return objects


def _overlapping(boxes: _Boxes, lowest: float) -> tuple[Integers, Integers]:
    """Positions of all pairs of boxes of different members with IoU >= lowest, in the order they are to be joined."""
    first, second = _beside_one_another(boxes, lowest)
    ious = _ious(boxes.boxes_xyxy[first], boxes.boxes_xyxy[second])
    kept = ious >= lowest
    first, second, ious = first[kept], second[kept], ious[kept]
    likely = boxes.probabilities.argmax(axis=1) if len(boxes.members) else boxes.members
    order = np.lexsort((second, first, likely[first] != likely[second], -ious))
    return first[order], second[order]


def _beside_one_another(boxes: _Boxes, lowest: float) -> tuple[Integers, Integers]:
    """Positions (the lower one first) of all pairs of boxes of different members that may have IoU >= lowest.

    Such boxes share at least `lowest` of the width and of the height of either, so the right one starts before
    1 - lowest of the left one. Measuring every box against every other takes three times as long.
    """
    lowest -= 1e-6  # rounding must not lose a pair, and its IoU is looked at anyway
    left_edges, tops, right_edges, bottoms = np.ascontiguousarray(boxes.boxes_xyxy.T)
    order = np.argsort(left_edges, kind="stable")
    starts, ends = left_edges[order], right_edges[order]
    limits = np.maximum(starts, ends - lowest * (ends - starts))
    turns = np.arange(len(order))
    counts = np.searchsorted(starts, limits, side="right") - turns - 1
    left = np.repeat(turns, counts)
    right = order[left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)]
    left = order[left]
    heights = bottoms - tops
    shared = np.minimum(bottoms[left], bottoms[right]) - np.maximum(tops[left], tops[right])
    kept = shared >= lowest * np.maximum(heights[left], heights[right])
    kept &= boxes.members[left] != boxes.members[right]
    left, right = left[kept], right[kept]
    return np.minimum(left, right), np.maximum(left, right)


def _joined(size: int, first: Integers, second: Integers) -> Integers:
    """(N,) the lowest position of the group each box ends in. A group is a set of boxes that all overlap.

    Sets are bits of Python integers: `groups` holds a group's boxes, `common` the boxes that overlap with all of them.
    Boxes of one member never count as overlapping, so a group has one of each at most.
    """
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    groups = [1 << position for position in range(size)]
    common = list(groups)
    for one, other in pairs:
        common[one] |= groups[other]
        common[other] |= groups[one]
    names = list(range(size))
    positions = [[position] for position in range(size)]
    for one, other in pairs:
        low, high = names[one], names[other]
        if low == high or groups[high] & ~common[low]:
            continue
        low, high = min(low, high), max(low, high)
        groups[low] |= groups[high]
        common[low] &= common[high]
        positions[low] += positions[high]
        for position in positions[high]:
            names[position] = low
    return np.array(names, dtype=np.int64)


def _ious(boxes_xyxy: Matrix, others_xyxy: Matrix) -> Vector:
    """(N, 4) and (N, 4) -> (N,) intersection over union: 1 for equal boxes alone, with or without area."""
    shared = _shared_area(boxes_xyxy, others_xyxy)
    union = _area(boxes_xyxy) + _area(others_xyxy) - shared
    ious = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    equal = (boxes_xyxy == others_xyxy).all(axis=1)
    return np.where(equal, 1.0, np.minimum(ious, _ALMOST_EQUAL))


def _area(boxes_xyxy: Matrix) -> Vector:
    result: Vector = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    return result


def _shared_area(boxes_xyxy: Matrix, others_xyxy: Matrix) -> Vector:
    ends = np.minimum(boxes_xyxy[:, 2:], others_xyxy[:, 2:])
    sides = np.maximum(ends - np.maximum(boxes_xyxy[:, :2], others_xyxy[:, :2]), 0.0)
    result: Vector = sides[:, 0] * sides[:, 1]
    return result


def _gathered(members: Sequence[Member], lowest: float) -> _Boxes:
    """All boxes with a confidence of at least `lowest`, checked and sorted by content."""
    checked = [_checked(member, f"members[{number}]") for number, member in enumerate(members)]
    if len(checked) < 2:
        raise InputInvalid(f"A committee has at least 2 members, got {len(checked)}. Pass what each of them sees.")
    widths = sorted({probabilities.shape[1] for _, probabilities in checked} - {0})
    if len(widths) > 1:
        raise InputInvalid(f"The members know {widths} classes. A committee needs the same classes in every member.")
    width = widths[0] if widths else 0
    rows = [np.concatenate([p.reshape(len(b), width), b], axis=1) for b, p in checked]
    orders = [_by_content(member, width, lowest) for member in rows]
    seats = sorted(range(len(rows)), key=lambda number: rows[number][orders[number]].tobytes())
    lengths = [len(orders[seat]) for seat in seats]
    stacked = np.concatenate([rows[seat][orders[seat]] for seat in seats])
    return _Boxes(
        boxes_xyxy=stacked[:, width:],
        probabilities=stacked[:, :width],
        members=np.repeat(np.arange(len(seats)), lengths),
        sources=np.stack([np.repeat(seats, lengths), np.concatenate([orders[seat] for seat in seats])], axis=1),
        count=len(seats),
    )


def _by_content(rows: Matrix, width: int, lowest: float) -> Integers:
    """Positions of the rows with a confidence of at least `lowest`: the surest first, equals by their bytes."""
    confidence = rows[:, :width].max(axis=1, initial=0.0)
    kept = np.flatnonzero(confidence >= lowest).tolist()
    kept.sort(key=lambda position: (-confidence[position], rows[position].tobytes()))
    return np.array(kept, dtype=np.int64)


def _checked(member: Member, name: str) -> tuple[Matrix, Matrix]:
    try:
        boxes_xyxy, probabilities = member
    except (TypeError, ValueError) as problem:
        raise InputInvalid(f"{name} must be a pair of boxes_xyxy (n, 4) and probabilities (n, C).") from problem
    boxes = np.asarray(as_matrix(boxes_xyxy, f"{name} boxes_xyxy"), dtype=np.float64)
    rows = as_probabilities(probabilities, f"{name} probabilities")
    if len(boxes) != len(rows):
        raise InputInvalid(f"{name} has {len(boxes)} boxes, but probabilities for {len(rows)}. Give one row per box.")
    if not len(boxes):
        return np.zeros((0, 4)), rows
    if boxes.shape[1] != 4:
        raise InputInvalid(f"{name} boxes_xyxy must have 4 columns (x1, y1, x2, y2), got {boxes.shape[1]}.")
    if abs(boxes).max() > _LARGEST_COORDINATE:
        raise InputInvalid(f"{name} boxes_xyxy hold coordinates beyond {_LARGEST_COORDINATE:g}. Pass pixels.")
    inverted = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))
    if len(inverted):
        raise InputInvalid(
            f"{name} boxes_xyxy[{inverted[0]}] is {boxes[inverted[0]].tolist()}: x2 < x1 or y2 < y1. "
            "Pass corners, not centre and size."
        )
    return boxes, rows
