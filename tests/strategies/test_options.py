from __future__ import annotations

import numpy as np
import pytest

from strategies import STRATEGIES, OptionsInvalid, StrategyUnknown, get_strategy, strategy_options, validate_options
from strategies.late import _LATE
from strategies.options import OPTIONS


def test_every_strategy_has_options_and_a_late_rule():
    assert list(STRATEGIES) == list(OPTIONS) == list(_LATE)
    assert set(STRATEGIES) == {
        "random",
        "least_confidence",
        "margin",
        "entropy",
        "kmeans",
        "k_center",
        "coverage",
        "hybrid",
        "hybrid_k_center",
        "hybrid_coverage",
        "committee",
    }


def test_hybrid_defaults():
    assert strategy_options("hybrid") == {
        "alpha": 0.7,
        "beta": 0.3,
        "measure": "least_confidence",
        "n_clusters": 50,
        "suppress_duplicates": True,
    }


def test_committee_defaults():
    assert strategy_options("committee") == {"alpha": 0.7, "beta": 0.3, "n_clusters": 50, "suppress_duplicates": True}


def test_only_the_hybrids_suppress_by_default():
    suppressing = {name for name in STRATEGIES if strategy_options(name)["suppress_duplicates"]}
    assert suppressing == {"hybrid", "hybrid_k_center", "hybrid_coverage", "committee"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_defaults_are_valid_and_complete(name):
    assert validate_options(name) == validate_options(name, {}) == strategy_options(name)
    assert validate_options(name, strategy_options(name)) == strategy_options(name)
    assert all(option.meaning for option in OPTIONS[name])


def test_values_become_plain_python():
    values = validate_options("hybrid", {"alpha": np.float32(1), "n_clusters": np.int64(7), "beta": 0})
    assert values["alpha"] == 1.0
    assert type(values["alpha"]) is float
    assert type(values["n_clusters"]) is int
    assert type(values["beta"]) is float


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("hybrid", {"alfa": 0.5}, r"'hybrid' has no option 'alfa'\. Did you mean 'alpha'\? Allowed: alpha, beta, "),
        ("random", {"zzz": 1}, r"has no option 'zzz'\. Allowed: suppress_duplicates"),
        ("hybrid", {"alpha": 1.5}, "'alpha' must be from 0 to 1, got 1.5"),
        ("hybrid", {"alpha": float("nan")}, "from 0 to 1"),
        ("hybrid", {"alpha": "0.5"}, "'alpha' must be a number, got '0.5'"),
        ("hybrid", {"alpha": True}, "'alpha' must be a number, got True"),
        ("hybrid", {"alpha": None}, "'alpha' must be a number"),
        ("hybrid", {"alpha": 0, "beta": 0.0}, "both 0"),
        ("committee", {"alpha": 0, "beta": 0.0}, "both 0"),
        ("committee", {"measure": "entropy"}, "'committee' has no option 'measure'"),
        ("kmeans", {"n_clusters": 0}, "from 1 to 10000"),
        ("kmeans", {"n_clusters": 5.0}, "whole number"),
        ("hybrid", {"measure": "entropi"}, "Did you mean 'entropy'"),
        ("hybrid", {"measure": ["entropy"]}, "must be one of"),
        ("hybrid", {"suppress_duplicates": 1}, "true or false, got 1"),
        ("hybrid", ["alpha"], "must be a mapping"),
    ],
)
def test_bad_options_are_refused(name, options, sentence):
    with pytest.raises(OptionsInvalid, match=sentence):
        validate_options(name, options)


@pytest.mark.parametrize("function", [validate_options, strategy_options, get_strategy])
def test_unknown_strategies_are_refused(function):
    with pytest.raises(StrategyUnknown, match=r"Unknown strategy 'hybrd'\. Did you mean 'hybrid'\?"):
        function("hybrd")


def test_get_strategy():
    assert get_strategy("k_center") is STRATEGIES["k_center"]
