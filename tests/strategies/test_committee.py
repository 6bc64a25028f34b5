from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.committee import image_disagreement, match_boxes, object_disagreements, vote_divergence
from strategies.errors import InputInvalid

BOX = [10.0, 10.0, 50.0, 50.0]
ELSEWHERE = [200.0, 200.0, 240.0, 240.0]
BOLT, NUT, WIRE = np.eye(3)
NOTHING = ([], [])

# Three votes, two alike: the mean is (2/3, 1/3), its entropy ln 3 - 2/3 ln 2, the votes themselves have none.
# (ln 3 - 2/3 ln 2) / ln 3 = 1 - 2/3 * 0.63093 = 0.57938
TWO_AGAINST_ONE = 1 - 2 / 3 * math.log(2) / math.log(3)

sides = st.integers(0, 6)
boxes_on_a_grid = st.tuples(sides, sides, sides, sides).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
chances = st.sampled_from([0.0, 0.04, 0.2, 0.25, 0.5, 0.9, 1.0])
rows_seen = st.lists(st.tuples(boxes_on_a_grid, st.tuples(chances, chances)), max_size=5)
committees = st.lists(rows_seen, min_size=2, max_size=5)
ways = st.fixed_dictionaries(
    {
        "votes": st.sampled_from(["soft", "hard"]),
        "threshold": st.sampled_from([None, 0.0, 0.25]),
        "iou_weight": st.sampled_from([0.0, 0.5, 3.0]),
        "method": st.sampled_from(["max", "min", "mean", "top_n_mean", "sum"]),
        "n": st.integers(1, 3),
    }
)


def seen(*rows):
    """What a member says: (box, probabilities) of each box it sees."""
    return [box for box, _ in rows], [chances for _, chances in rows]


def overlap(one, other):
    if tuple(one) == tuple(other):
        return 1.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared
    return shared / union if union else 0.0


def crowd(members, boxes, classes, seed=0):
    """Scattered objects of 20 to 120 pixels, seen by each member a few pixels off and with its own confidence."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1200, (boxes, 2))
    objects = np.concatenate([corners, corners + rng.uniform(20, 120, (boxes, 2))], axis=1)
    kinds = rng.integers(0, classes, boxes)
    result = []
    for _ in range(members):
        probabilities = rng.uniform(0, 0.02, (boxes, classes))
        probabilities[np.arange(boxes), kinds] = rng.uniform(0.1, 0.95, boxes)
        result.append((objects + rng.uniform(-3, 3, (boxes, 4)), probabilities))
    return result


# --- votes


def test_votes_by_hand():
    votes = [
        [BOLT, BOLT, BOLT],
        [BOLT, NUT, WIRE],
        [BOLT, BOLT, NUT],
        [[0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]],
    ]
    assert vote_divergence(votes) == pytest.approx([0, 1, TWO_AGAINST_ONE, 0], abs=1e-12)
    assert pytest.approx(0.57938, abs=1e-5) == TWO_AGAINST_ONE
    # two votes: the mean of (1/2, 1/2) and (1, 0) is (3/4, 1/4) with .56234 nats, the votes have .69315 and 0:
    # (.56234 - .34657) / .69315 = .31128
    assert vote_divergence([[[0.5, 0.5], [1.0, 0.0]]]) == pytest.approx([0.31128], abs=1e-5)
    assert vote_divergence(np.zeros((0, 3, 4))).tolist() == []


def test_equal_votes_are_exactly_zero():
    rows = np.random.default_rng(0).dirichlet(np.ones(7), 200)
    assert vote_divergence(np.repeat(rows[:, None], 3, axis=1)).tolist() == [0.0] * 200


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_votes_are_bounded_and_need_no_order(members, choices, seed):
    rng = np.random.default_rng(seed)
    votes = rng.dirichlet(np.full(choices, 0.3), (4, members))
    values = vote_divergence(votes)
    assert values.min() >= 0
    assert values.max() <= min(1, math.log(choices) / math.log(members) + 1e-9)
    assert vote_divergence(votes[:, rng.permutation(members)]) == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize(
    ("votes", "sentence"),
    [
        ([[BOLT]], "members at least 2"),
        ([BOLT, NUT], "members at least 2"),
        ([[BOLT, [0.5, 0.1, 0.1]]], "sum to 1"),
        ([[BOLT, [0.5, 0.5]]], "rectangular"),
        ([[BOLT, [float("nan"), 0, 1]]], "NaN"),
        ([[BOLT, [2, 0, -1]]], r"lie in \[0, 1\]"),
    ],
)
def test_bad_votes_are_refused(votes, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        vote_divergence(votes)


# --- images


@pytest.mark.parametrize("votes", ["soft", "hard"])
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((BOLT, BOLT, BOLT), 0.0),
        ((BOLT, NUT, WIRE), 1.0),
        ((BOLT, BOLT, NUT), TWO_AGAINST_ONE),
        ((BOLT, BOLT, None), TWO_AGAINST_ONE),  # None sees nothing, which is a vote for the background
        ((BOLT, None, None), TWO_AGAINST_ONE),
        ((BOLT, NUT, None), 1.0),
        ((None, None, None), 0.0),
        ((BOLT, None), 1.0),
        ((BOLT, BOLT), 0.0),
        # five votes, 3 : 2: (ln 5 - 3/5 ln 3 - 2/5 ln 2) / ln 5
        ((BOLT, BOLT, BOLT, NUT, NUT), 1 - (0.6 * math.log(3) + 0.4 * math.log(2)) / math.log(5)),
    ],
)
def test_sure_members_by_hand(kinds, expected, votes):
    members = [NOTHING if kind is None else seen((BOX, kind)) for kind in kinds]
    assert image_disagreement(members, votes) == pytest.approx(expected, abs=1e-5)


def test_soft_votes_by_hand_and_hard_ones():
    # with_background of .5 is (1/2, 1/2); the other sees nothing, (1, 0): .31128 as above
    members = [seen((BOX, [0.5])), NOTHING]
    assert image_disagreement(members) == pytest.approx(0.31128, abs=1e-5)
    assert image_disagreement(members, "hard") == pytest.approx(1.0)
    unsure = [seen((BOX, [0.6, 0.4])), seen((BOX, [0.9, 0.1]))]
    assert image_disagreement(unsure, "hard") == 0.0  # the same most likely class
    # odds 1, 3/2, 2/3 and 1, 9, 1/9: votes (6, 9, 4) / 19 and (9, 81, 1) / 91 with 1.04598 and 0.38201 nats,
    # their mean has 0.83103: (0.83103 - 0.71399) / .69315
    assert image_disagreement(unsure) == pytest.approx(0.16884, abs=1e-5)


def test_thresholds():
    faint = [seen((BOX, [0.2])), NOTHING, NOTHING]
    assert image_disagreement(faint) > 0  # soft votes count from .05
    assert image_disagreement(faint, "hard") == 0.0  # hard ones from .25
    assert image_disagreement(faint, "hard", threshold=0.2) == pytest.approx(TWO_AGAINST_ONE)
    assert image_disagreement(faint, threshold=0.21) == 0.0
    assert image_disagreement([seen((BOX, [0.04])), NOTHING]) == 0.0


def test_aggregates_over_objects():
    # one object all agree on, one seen by one of two: 0 and 1
    members = [seen((BOX, BOLT), (ELSEWHERE, NUT)), seen((BOX, BOLT))]
    expected = {"max": 1, "min": 0, "mean": 0.5, "sum": 1, "top_n_mean": 0.5}
    for method, value in expected.items():
        assert image_disagreement(members, "hard", method=method) == pytest.approx(value)
    assert image_disagreement(members, "hard", method="top_n_mean", n=1) == pytest.approx(1.0)
    apart = [seen((BOX, BOLT)), seen((ELSEWHERE, BOLT))]
    assert object_disagreements(apart, "hard").tolist() == pytest.approx([1, 1])
    assert image_disagreement(apart, "hard", method="sum") == 1.0  # clipped


def test_iou_weight_by_hand():
    # of height 10, 8 and 6: IoU .8, .6 and 6 / 8 = .75, so 1 - 2.15 / 3 = .28333 is the looseness
    members = [seen(([0, 0, 10, height], BOLT)) for height in (10, 8, 6)]
    assert image_disagreement(members) == 0.0
    assert image_disagreement(members, iou_weight=0.5) == pytest.approx(0.5 * (1 - 2.15 / 3))
    assert image_disagreement(members, iou_weight=100) == 1.0
    assert image_disagreement([members[0], members[0]], iou_weight=1) == 0.0
    # a box without a partner has no IoU to speak of
    alone = [seen((BOX, BOLT)), NOTHING, NOTHING]
    assert image_disagreement(alone, "hard", iou_weight=1) == pytest.approx(TWO_AGAINST_ONE)


def test_nobody_sees_anything():
    empties = [NOTHING, (np.zeros((0, 4)), np.zeros((0, 3))), ([], np.zeros((0, 3)))]
    assert image_disagreement(empties) == 0.0
    assert image_disagreement(empties, "hard", iou_weight=1, method="sum") == 0.0
    assert object_disagreements(empties).tolist() == []
    assert match_boxes(empties).shape == (0, 3)


# --- matching


def test_pairs_are_matched_from_one_half_on():
    base = seen(([0, 0, 10, 10], BOLT))
    assert match_boxes([base, seen(([0, 0, 10, 5], BOLT))]).tolist() == [[0, 0]]  # IoU .5
    assert sorted(match_boxes([base, seen(([0, 0, 10, 4.99], BOLT))]).tolist()) == [[-1, 0], [0, -1]]
    assert match_boxes([base, seen(([0, 0, 10, 4], BOLT))], 0.4).tolist() == [[0, 0]]
    assert match_boxes([base, seen(([0, 0, 10, 5], NUT))]).tolist() == [[0, 0]]  # whatever the class


def test_the_best_overlap_is_matched_first():
    members = [seen(([0, 0, 10, 10], BOLT)), seen(([0, 0, 10, 6], BOLT), ([0, 0, 10, 8], BOLT))]
    assert sorted(match_boxes(members).tolist()) == [[-1, 0], [0, 1]]


def test_a_wide_box_does_not_tie_two_neighbours():
    left, wide, right = [0, 0, 10, 10], [0, 0, 20, 10], [10, 0, 20, 10]  # IoU .5, .5 and 0
    members = [seen((left, BOLT)), seen((wide, BOLT)), seen((right, BOLT))]
    objects = match_boxes(members)
    assert sorted((row >= 0).sum() for row in objects) == [1, 2]
    assert image_disagreement(members, "hard") == pytest.approx(TWO_AGAINST_ONE)


def test_equal_overlaps_go_to_the_same_class():
    both = seen((BOX, [0.9, 0.0]), (BOX, [0.0, 0.6]))
    one = seen((BOX, [0.0, 0.7]))
    assert sorted(match_boxes([both, one]).tolist()) == [[0, -1], [1, 0]]


def test_boxes_without_area_match_their_equals():
    line, other = [5, 5, 5, 9], [5, 5, 5, 8]
    assert match_boxes([seen((line, BOLT)), seen((line, BOLT))]).tolist() == [[0, 0]]
    assert len(match_boxes([seen((line, BOLT)), seen((other, BOLT))])) == 2


def greedy_by_hand(members, iou_threshold):
    """The rule of match_boxes, for members whose overlaps are all different: sets of (member, row)."""
    boxes = {(m, r): box for m, (rows, _) in enumerate(members) for r, box in enumerate(rows)}
    ious = {frozenset(p): overlap(*map(boxes.get, p)) for p in combinations(boxes, 2) if p[0][0] != p[1][0]}
    group = {name: {name} for name in boxes}
    for one, other in sorted(map(tuple, ious), key=lambda p: -ious[frozenset(p)]):
        union = group[one] | group[other]
        if all(ious.get(frozenset(pair), 0) >= iou_threshold for pair in combinations(union, 2)):
            for name in union:
                group[name] = union
    return {frozenset(names) for names in group.values()}


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("iou_threshold", [0.2, 0.5, 0.8])
def test_matching_is_the_rule(seed, iou_threshold):
    rng = np.random.default_rng(seed)
    members = []
    for _ in range(4):
        corners = rng.uniform(0, 15, (12, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(15, 25, (12, 2))], axis=1)
        members.append((boxes, rng.random((12, 2))))
    objects = match_boxes(members, iou_threshold)
    found = {frozenset((m, r) for m, r in enumerate(row) if r >= 0) for row in objects.tolist()}
    assert found == greedy_by_hand(members, iou_threshold)
    assert max(map(len, found)) >= {0.2: 4, 0.5: 3, 0.8: 1}[iou_threshold]  # there is something to match


@given(committees)
def test_objects_hold_each_box_once_and_overlap(rows):
    members = [seen(*member) for member in rows]
    objects = match_boxes(members)
    for number, (boxes, _) in enumerate(members):
        assert sorted(objects[objects[:, number] >= 0, number].tolist()) == list(range(len(boxes)))
    for row in objects:
        assert (row >= 0).any()
        found = [members[m][0][r] for m, r in enumerate(row) if r >= 0]
        assert all(overlap(one, other) >= 0.5 for one, other in combinations(found, 2))


# --- properties


@given(committees, ways)
def test_disagreement_is_bounded(rows, way):
    members = [seen(*member) for member in rows]
    assert 0 <= image_disagreement(members, **way) <= 1
    values = object_disagreements(members, way["votes"], way["threshold"], iou_weight=way["iou_weight"])
    assert ((values >= 0) & (values <= 1)).all()


@given(committees, ways, st.randoms(use_true_random=False))
def test_order_of_members_and_of_boxes_does_not_matter(rows, way, random):
    shuffled = [random.sample(member, len(member)) for member in random.sample(rows, len(rows))]
    expected = image_disagreement([seen(*member) for member in rows], **way)
    assert image_disagreement([seen(*member) for member in shuffled], **way) == expected  # to the last bit


@given(rows_seen, st.integers(2, 5), ways, st.randoms(use_true_random=False))
def test_identical_members_agree(rows, count, way, random):
    members = [seen(*random.sample(rows, len(rows))) for _ in range(count)]
    assert image_disagreement(members, **way) == 0.0


@settings(max_examples=25)
@given(committees, st.floats(0.1, 10), st.integers(-1000, 1000))
def test_the_vote_of_an_image_does_not_depend_on_where_it_lies(rows, scale, shift):
    scale = 2.0 ** round(math.log2(scale))  # powers of two keep the overlaps as they are to the last bit
    moved = [[(tuple(scale * side + scale * shift for side in box), p) for box, p in member] for member in rows]
    here, there = ([seen(*member) for member in committee] for committee in (rows, moved))
    assert np.sort(object_disagreements(there)) == pytest.approx(np.sort(object_disagreements(here)), abs=1e-9)


def test_the_input_is_left_as_it_was():
    members = crowd(3, 20, 4)
    before = [(boxes.copy(), rows.copy()) for boxes, rows in members]
    image_disagreement(members, iou_weight=0.5)
    for (boxes, rows), (boxes_before, rows_before) in zip(members, before, strict=True):
        assert boxes.tolist() == boxes_before.tolist()
        assert rows.tolist() == rows_before.tolist()


def test_float32_and_lists_are_welcome():
    members = crowd(3, 20, 4)
    single = [(boxes.astype(np.float32), rows.astype(np.float32)) for boxes, rows in members]
    assert image_disagreement(single) == pytest.approx(image_disagreement(members), abs=1e-4)
    listed = [(boxes.tolist(), rows.tolist()) for boxes, rows in members]
    assert image_disagreement(listed) == image_disagreement(members)


# --- refusals

GOOD = seen((BOX, BOLT))


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([], "at least 2 members, got 0"),
        ([GOOD], "at least 2 members, got 1"),
        ([GOOD, BOX], r"members\[1\] must be a pair"),
        ([GOOD, None], r"members\[1\] must be a pair"),
        ([GOOD, seen((BOX, [0.5, 0.5]))], r"know \[2, 3\] classes"),
        ([GOOD, ([], np.zeros((0, 2)))], r"know \[2, 3\] classes"),
        ([GOOD, ([BOX, BOX], [BOLT])], r"members\[1\] has 2 boxes, but probabilities for 1"),
        ([GOOD, ([], [BOLT])], "has 0 boxes"),
        ([GOOD, ([BOX[:3]], [BOLT])], r"4 columns \(x1, y1, x2, y2\), got 3"),
        ([GOOD, (BOX, [BOLT])], r"members\[1\] boxes_xyxy must have 2 dimension"),
        ([GOOD, seen(([1, 2, float("nan"), 4], BOLT))], r"members\[1\] boxes_xyxy holds NaN"),
        ([GOOD, seen((BOX, [0.5, float("nan"), 0]))], r"members\[1\] probabilities holds NaN"),
        ([GOOD, seen((BOX, [5, 0, 0]))], r"members\[1\] probabilities must lie in \[0, 1\]"),
        ([GOOD, seen((BOX, BOLT), ([50, 50, 20, 60], BOLT))], r"boxes_xyxy\[1\] is .* x2 < x1"),
        ([GOOD, seen(([0, 0, 1e10, 1], BOLT))], "beyond 1e"),
    ],
)
def test_bad_members_are_refused(members, sentence):
    for function in (image_disagreement, object_disagreements, match_boxes):
        with pytest.raises(InputInvalid, match=sentence):
            function(members)


@pytest.mark.parametrize("members", [[GOOD, GOOD], [NOTHING, NOTHING]])
@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ({"votes": "sof"}, "Unknown votes 'sof'. Did you mean 'soft'"),
        ({"method": "median"}, "Unknown aggregate method"),
        ({"n": 0}, "n must be at least 1"),
        ({"threshold": 1.5}, "threshold must be at most 1"),
        ({"iou_threshold": 0.0}, "iou_threshold must be above 0"),
        ({"iou_threshold": float("nan")}, "iou_threshold holds NaN"),
        ({"iou_weight": -1.0}, "iou_weight must be at least 0"),
    ],
)
def test_bad_ways_are_refused(members, way, sentence):
    with pytest.raises(InputInvalid, match=sentence):
        image_disagreement(members, **way)
