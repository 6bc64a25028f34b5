"""The verdict: figures worked out by hand, and rules that hold for every curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import InputInvalid
from strategies.stopping import verdict
from strategies.verdict import (
    TRAINING_SD,
    ClassCurve,
    GainEstimate,
    More,
    class_warnings,
    expected_covariance,
    expected_gain,
    extrapolation,
    in_words,
    mean_gain,
    more_holdout,
    plateau,
    power_sentence,
    smallest_visible_gain,
    still_rises,
    training_noise,
)


def silent(n):
    """A holdout without noise."""
    return np.zeros((n, n))


def independent(n, sd):
    return np.eye(n) * sd**2


def test_mean_gain_by_hand():
    gain = mean_gain(np.array([0.4, 0.5, 0.6, 0.7]), independent(4, 0.02), training_sd=0.01)
    assert gain.mean == pytest.approx(0.1)  # (.7 - .5) / 2
    assert gain.rounds_used == 2
    assert gain.se == pytest.approx(math.sqrt(2 * 0.02**2 + 2 * 0.01**2) / 2)
    assert gain.upper - gain.mean == pytest.approx(1.6449 * gain.se)
    assert gain.mean - gain.lower == pytest.approx(1.6449 * gain.se)


def test_rounds_measured_on_the_same_images_are_compared_with_less_noise():
    alike = 0.02**2 * (0.25 * np.eye(3) + 0.75)
    gain = mean_gain(np.array([0.4, 0.5, 0.6]), alike, training_sd=0.0)
    assert gain.se == pytest.approx(0.02 * math.sqrt(2 * 0.25) / 2)


def test_two_points_have_one_gain():
    gain = mean_gain(np.array([0.4, 0.5]), independent(2, 0.03), training_sd=0.0)
    assert (gain.rounds_used, gain.mean) == (1, pytest.approx(0.1))
    assert gain.se == pytest.approx(0.03 * math.sqrt(2))


@pytest.mark.parametrize(
    ("map50", "sd", "expected"),
    [
        # without holdout noise SE = .0075 sqrt(2) / 2 = .0053: 90 % within .0087, seen from .0133 on
        ([0.5, 0.505, 0.51], 0.0, "stop"),  # .005 + .0087 < .02
        ([0.5, 0.515, 0.53], 0.0, "continue"),  # .015 + .0087 > .02, and .02 would be seen
        ([0.5, 0.54, 0.58], 0.0, "continue"),
        ([0.6, 0.55, 0.5], 0.0, "stop"),
        ([0.5, 0.5, 0.5], 0.02, "insufficient_evidence"),  # SE .0151: 0 + .025 > .02 and 2.5 SE = .038
        ([0.5, 0.46, 0.42], 0.02, "stop"),  # it falls by more than the noise
        ([0.5, 0.58, 0.66], 0.02, "continue"),  # whatever the noise, more than .02
        ([0.5, 0.53, 0.55], 0.02, "insufficient_evidence"),
        ([0.53, 0.5, 0.525], 0.0, "continue"),  # the mean says stop, the last round alone does not
        ([0.5, 0.51], 0.0, "insufficient_evidence"),  # one gain never stops
        ([0.5, 0.6], 0.0, "continue"),
        ([0.5], 0.0, "insufficient_evidence"),
        ([], 0.0, "insufficient_evidence"),
    ],
)
def test_verdicts_by_hand(map50, sd, expected):
    labels = [100 * (i + 1) for i in range(len(map50))]
    found = verdict(map50, labels, holdout_images=300, covariance=independent(len(map50), sd), worth_gain=0.02)
    assert found.verdict == expected
    assert found.reasons
    assert all(reason.endswith(".") for reason in found.reasons)


def test_the_reasons_name_the_figures():
    found = verdict([0.5, 0.505, 0.51], [100, 200, 300], holdout_images=300, covariance=silent(3))
    assert found.reasons == (
        "The last two rounds gained +.005 mAP50 a round; the truth lies between -.004 and +.014 nine times of ten.",
        "A round is worth its price from .02 on: that much is unlikely.",
    )
    assert (found.base_verdict, found.numbers["worth_gain"]) == ("continue", 0.02)
    assert "+0.005" in found.base_reason
    assert found.numbers["smallest_visible_gain"] == pytest.approx(2.5 * TRAINING_SD / math.sqrt(2))


def test_too_little_evidence_says_how_many_images_would_help():
    found = verdict([0.5, 0.5, 0.5], [1, 2, 3], holdout_images=60, covariance=independent(3, 0.03))
    assert found.verdict == "insufficient_evidence"
    # holdout part of the SE .0212, training part .0053: 2.5 SE = .055 now, .040 with twice the images
    assert found.reasons[-1] == (
        "With 60 holdout images gains under .05 a round cannot be told from luck; label 60 more to see .04."
    )
    assert found.numbers["more_holdout"] == 60
    assert found.numbers["smallest_visible_gain_then"] == pytest.approx(
        2.5 * math.hypot(0.03 / math.sqrt(2) / math.sqrt(2), TRAINING_SD / math.sqrt(2))
    )


def test_the_base_rule_stands_beside_it():
    found = verdict([0.5, 0.504, 0.508], [1, 2, 3], holdout_images=60, covariance=independent(3, 0.03))
    assert (found.verdict, found.base_verdict) == ("insufficient_evidence", "stop")


def test_more_images_until_worth_gain_is_seen_and_no_more():
    # .0064^2 = (.02 / 2.5)^2 - .0048^2: the holdout's part must fall from .008 to .0064, 1.5625 times the images
    gain = GainEstimate(0.0, math.hypot(0.008, 0.0048), 2, 0.008, 0.0048)
    more = more_holdout(gain, 100, 0.02)
    assert more.images == 60  # 56.25, in tens
    assert more.smallest_visible_gain == pytest.approx(2.5 * math.hypot(0.008 / math.sqrt(1.6), 0.0048))
    assert more.smallest_visible_gain <= 0.02
    assert more_holdout(gain, 100, 0.03).images == 0  # that is seen already


def test_a_holdout_cannot_help_against_the_trainings_noise():
    noisy_training = GainEstimate(0.0, 0.02, 2, 0.002, 0.0199)
    assert more_holdout(noisy_training, 100, 0.02).images == 0


@given(st.integers(1, 2000), st.floats(0, 0.1), st.floats(0, 0.05), st.floats(0.001, 0.2))
@settings(max_examples=100, deadline=None)
def test_never_more_than_twice_the_holdout_and_never_for_nothing(images, holdout_sd, training_sd, worth):
    gain = GainEstimate(0.0, math.hypot(holdout_sd, training_sd), 2, holdout_sd, training_sd)
    more = more_holdout(gain, images, worth)
    assert 0 <= more.images <= images
    assert more.smallest_visible_gain <= smallest_visible_gain(gain) + 1e-12
    if more.images:
        assert more.smallest_visible_gain <= max(0.9 * smallest_visible_gain(gain), worth) + 1e-12


def test_power_in_words():
    gain = expected_gain(60)
    sentence = power_sentence(60, smallest_visible_gain(gain), more_holdout(gain, 60))
    assert sentence == (
        "With 60 holdout images gains under .07 a round cannot be told from luck; label 60 more to see .05."
    )
    assert power_sentence(0, 0.0, more_holdout(gain, 0)) == "There is no holdout: nothing can be measured."
    assert smallest_visible_gain(expected_gain(240)) < smallest_visible_gain(gain) / 1.8


def test_figures_that_are_compared_have_equal_digits():
    assert "under .023 a round" in power_sentence(300, 0.0231, More(300, 0.0188))
    assert "label 300 more to see .019." in power_sentence(300, 0.0231, More(300, 0.0188))
    assert "under .06 a round" in power_sentence(60, 0.0601, More(60, 0.041))


def test_one_class_has_no_mean_that_could_hide_it():
    rising = ClassCurve("bolt", [0.3, 0.5, 0.7], 500)
    assert class_warnings([rising]) == ("AP still rises: bolt.",)
    other = ClassCurve("nut", [0.5, 0.5, 0.5], 500)
    assert class_warnings([rising, other]) == ("AP still rises: bolt. The mean over all classes hides it.",)


def test_words_for_shares():
    assert [in_words(value) for value in (0.06, 0.004, -0.02, 0.0, 0.123, 1.0, 0.0134, 0.01)] == [
        ".06",
        ".004",
        "-.02",
        "0",
        ".12",
        "1.00",
        ".013",
        ".01",
    ]


def test_expected_covariance_by_hand():
    # Var = .5 p(1-p) sum(1/boxes) / classes^2: .5 * .25 * (1/25 + 1/100) / 4
    found = expected_covariance([0.5, 0.5, 0.5, 0.5], 300, [25, 100])
    assert found[0, 0] == pytest.approx(0.5 * 0.25 * 0.05 / 4)
    assert found[0, 1] == pytest.approx(0.55 * found[0, 0])
    assert found[0, 2] == pytest.approx(0.55**2 * found[0, 0])
    assert found[0, 3] == pytest.approx(0.55**2 * found[0, 0])
    assert np.linalg.eigvalsh(found).min() > 0


def test_training_noise_is_the_default_until_trainings_are_repeated():
    assert training_noise([0.4, 0.5, 0.6], [100, 200, 300]) == pytest.approx(TRAINING_SD)
    # two trainings on 200 labels, .02 apart: squares 2 * .01^2 with 1 degree of freedom, beside four of the default
    by_hand = math.sqrt((4 * TRAINING_SD**2 + 0.0002) / 5)
    assert training_noise([0.4, 0.5, 0.52], [100, 200, 200]) == pytest.approx(by_hand)


def power_law(labels, a=0.8, b=5.0, c=0.5):
    return a - b * np.asarray(labels, float) ** -c


def test_a_power_law_is_found_again():
    labels = [200, 400, 600, 800, 1000, 1200]
    fit = extrapolation(power_law(labels), np.array(labels, float), independent(6, 0.001), training_sd=0.001)
    assert fit.next_labels == 1400
    assert fit.next_map50 == pytest.approx(power_law([1400])[0], abs=0.002)
    assert fit.next_gain == pytest.approx(power_law([1400])[0] - power_law([1200])[0], abs=0.002)
    assert fit.next_gain_low <= fit.next_gain <= fit.next_gain_high
    assert fit.next_map50_low <= fit.next_map50 <= fit.next_map50_high
    assert (fit.a, fit.c) == (pytest.approx(0.8, abs=0.05), pytest.approx(0.5, abs=0.1))
    assert fit.line[0][0] == 200
    assert fit.line[-1] == (1400, pytest.approx(fit.next_map50))
    assert all(low <= high for _, low, high in fit.band)


def test_a_flat_curve_is_extrapolated_flat_and_noise_widens_the_interval():
    labels = np.array([200.0, 400, 600, 800, 1000])
    quiet = extrapolation(np.full(5, 0.6), labels, silent(5), training_sd=0.002)
    loud = extrapolation(np.full(5, 0.6), labels, silent(5), training_sd=0.02)
    assert quiet.next_gain == pytest.approx(0.0, abs=1e-6)
    assert loud.next_gain_high > quiet.next_gain_high > 0


@pytest.mark.parametrize("labels", [[100, 200, 300, 400], [100, 200, 200, 300, 400], [0, 100, 200, 300, 400]])
def test_fewer_than_five_points_are_not_extrapolated(labels):
    assert extrapolation(np.full(len(labels), 0.5), np.array(labels, float), silent(len(labels))) is None


def test_a_disagreement_is_said():
    labels = [200 * i for i in range(1, 8)]
    rises = [0.2, 0.3, 0.4, 0.5, 0.6, 0.601, 0.602]  # stops all at once: the fit does not believe it
    found = verdict(rises, labels, holdout_images=1000, covariance=silent(7), worth_gain=0.015)
    assert found.verdict == "stop"
    assert found.agrees is False
    assert found.extrapolation_sentence.endswith("it disagrees, and would go on.")
    flat = verdict([0.3, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6], labels, holdout_images=1000, covariance=silent(7))
    assert (flat.verdict, flat.agrees) == ("stop", True)
    assert flat.extrapolation_sentence.endswith("it agrees.")


def test_warnings_name_rare_and_rising_classes():
    curves = [
        ClassCurve("bolt", [0.5, 0.5, 0.5], 200),
        ClassCurve("surface_pit", [0.1, 0.1, 0.1], 9),
        ClassCurve("wire", [0.3, 0.5, 0.7], 100),
    ]
    rare, rising = class_warnings(curves)
    assert rare.startswith("Fewer than 30 holdout boxes: surface_pit (9).")
    assert rising.startswith("AP still rises: wire.")
    assert class_warnings(curves[:1]) == ()


def test_a_rare_class_that_jumps_about_does_not_rise():
    # of 4 boxes, the SD of an AP at .5 is .5 sqrt(.5 / 4) = .18
    assert not still_rises(ClassCurve("pit", [0.4, 0.45, 0.5], 4))
    assert still_rises(ClassCurve("pit", [0.4, 0.5, 0.6], 400))
    assert not still_rises(ClassCurve("pit", [0.6, 0.5, 0.8], 400))
    assert not still_rises(ClassCurve("pit", [None, 0.5, 0.8], 400))


def test_a_plateau_is_three_rounds_without_a_gain_worth_having():
    assert plateau(ClassCurve("pit", [0.1, 0.4, 0.41, 0.4, 0.415], 50))
    assert not plateau(ClassCurve("pit", [0.4, 0.41, 0.4], 50))  # two rounds only
    assert not plateau(ClassCurve("pit", [0.4, 0.41, 0.43, 0.41], 50))
    assert not plateau(ClassCurve("pit", [None, 0.41, 0.4, 0.41], 50))


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=9),
    st.floats(0.0, 0.05),
    st.floats(0.005, 0.1),
    st.floats(0.0, 0.05),
)
@settings(max_examples=150, deadline=None)
def test_rules_that_hold_for_every_curve(map50, sd, worth, rise):
    labels = list(range(100, 100 * (len(map50) + 1), 100))

    def judged(curve, worth_gain):
        covariance = independent(len(curve), sd)
        given = {"holdout_images": 100, "covariance": covariance, "worth_gain": worth_gain, "extrapolate": False}
        return verdict(curve, labels, **given)

    found = judged(map50, worth)
    assert found.numbers["lower"] <= found.numbers["mean_gain"] <= found.numbers["upper"]
    if found.verdict == "stop":
        assert found.numbers["upper"] < worth
        assert judged(map50, worth + rise).verdict == "stop"  # dearer rounds do not revive it
    if found.verdict == "insufficient_evidence":
        assert found.numbers["smallest_visible_gain"] > worth
    assert judged(map50, worth) == found


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"map50": [0.1, float("nan"), 0.2]}, "NaN"),
        ({"map50": [0.1, 1.2, 0.2]}, "at most 1"),
        ({"labels": [1, 2]}, "has 2 values, but there are 3 rows"),
        ({"worth_gain": 0.0}, "worth_gain must be above 0"),
        ({"worth_gain": float("nan")}, "worth_gain"),
        ({"covariance": np.zeros((2, 2))}, r"covariance must be \(3, 3\)"),
        ({"covariance": np.full((3, 3), np.nan)}, "covariance holds NaN"),
    ],
)
def test_bad_input_is_refused(arguments, sentence):
    good = {"map50": [0.1, 0.2, 0.3], "labels": [1, 2, 3], "holdout_images": 60}
    with pytest.raises(InputInvalid, match=sentence):
        verdict(**{**good, **arguments})
