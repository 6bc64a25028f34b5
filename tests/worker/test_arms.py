"""Arms as they are written on the command line."""

from __future__ import annotations

import pytest

from worker.arms import parse_arms, parse_assignments
from worker.errors import BadRequest, SettingsInvalid


def test_commas_separate_arms_and_their_options() -> None:
    arms = parse_arms("random, random@2,hybrid:alpha=0.5,empty=certain,threshold=.05,k_center")
    assert [arm.label for arm in arms[:2]] == ["random", "random@2"]
    assert [arm.label for arm in arms[2:]] == ["hybrid:alpha=0.5,empty=certain,threshold=.05", "k_center"]
    assert [arm.draw for arm in arms] == [1, 2, 1, 1]
    assert arms[2].options == {"alpha": 0.5}
    assert arms[2].overrides == {"uncertainty_empty": "certain", "uncertainty_threshold": 0.05}


def test_options_of_the_strategy_come_before_settings_of_the_project() -> None:
    (arm,) = parse_arms("hybrid:measure=entropy,suppress_duplicates=false,warm_start=true,near_duplicate_threshold=.97")
    settings = arm.settings({"batch_size": 7})
    assert settings.strategy_options == {"measure": "entropy", "suppress_duplicates": False}
    assert (settings.near_duplicate_threshold, settings.warm_start, settings.batch_size) == (0.97, True, 7)


def test_a_short_name_stands_for_the_setting_of_uncertainty() -> None:
    (arm,) = parse_arms("entropy:aggregate=top_n_mean,n=3,class_weights=true")
    settings = arm.settings({})
    assert (settings.uncertainty_aggregate, settings.uncertainty_n, settings.class_weights) == ("top_n_mean", 3, True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names none"),
        ("hybrd", "Did you mean 'hybrid'"),
        ("hybrid:alhpa=1", "nothing is called 'alhpa'. Did you mean 'alpha'"),
        ("k_center:treshold=0.1", "Did you mean 'threshold'"),
        ("random,random", "For another draw of its random numbers: random@2"),
        ("hybrid:batch_size=3", "batch_size is the same for all arms"),
        ("hybrid:alpha", "'alpha' is not name=value"),
        ("hybrid:alpha=", "'alpha=' is not name=value"),
        ("hybrid@x", "is no arm"),
    ],
)
def test_what_is_no_arm_is_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        parse_arms(text)


@pytest.mark.parametrize("text", ["hybrid:threshold=3", "hybrid:alpha=3", "hybrid:warm_start=maybe", "committee"])
def test_a_value_out_of_range_names_its_arm(text: str) -> None:
    (arm,) = parse_arms(text)
    with pytest.raises(SettingsInvalid, match=f"arm {text}: "):
        arm.settings({})


def test_settings_for_all_arms() -> None:
    assert parse_assignments(["freeze=10", "optimizer=AdamW"]) == {"freeze": 10, "optimizer": "AdamW"}
    with pytest.raises(BadRequest, match="Did you mean 'freeze'"):
        parse_assignments(["freze=10"])
