"""The dividend's figures: by hand on a small result, and those in the texts are those of the kept results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import dividend
from strategies import STRATEGIES
from worker.arms import parse_arms
from worker.settings import ProjectSettings
from worker.simulation_results import compare

ROOT = Path(__file__).resolve().parents[2]


def played(arm: str, seed: int, heights: list[float], rare: list[float]) -> dict[str, Any]:
    rounds = [
        {
            "round": number,
            "labels": 50 + 50 * number,
            "boxes": 100 + 100 * number,
            "minutes": 10.0 + number,
            "map50": height,
            "rare_ap50": rare[number],
            "evaluation": f"{arm}-{seed}-{number}",
            "batch": {"rare_images": 2 * number, "near_duplicates": ["a"] * seed},
        }
        for number, height in enumerate(heights)
    ]
    return {"arm": arm, "seed": seed, "rounds": rounds}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("worker.simulation_results._samples", lambda results, arrays: {})
    found: dict[str, Any] = {
        "arms": [
            {"label": name, "strategy": name, "draw": 1, "options": {}, "overrides": {}} for name in ("random", "x")
        ],
        "data": {"rounds": 2},
        "runs": [
            played("random", 0, [0.2, 0.4, 0.6], [0.0, 0.1, 0.2]),
            played("random", 1, [0.2, 0.4, 0.6], [0.0, 0.1, 0.2]),
            played("x", 0, [0.2, 0.6, 0.7], [0.0, 0.2, 0.3]),
            played("x", 1, [0.2, 0.6, 0.9], [0.0, 0.2, 0.5]),
        ],
    }
    found["comparison"] = compare(found, lambda key: pytest.fail(key))
    return found


def test_figures_by_hand(results: dict[str, Any]) -> None:
    base, row = dividend.figures(results)
    assert (base["arm"], base["area_gain"], base["share_to_final"]) == ("random", None, 1.0)
    assert row["labels"] == [50, 100, 150]
    assert row["map50"] == pytest.approx([0.2, 0.6, 0.8])
    # areas: random .4; x (.2 + .6) / 4 + (.6 + .7) / 4 = .525 and .575
    assert row["area_gain"] == pytest.approx(0.15)
    assert row["area_low"] < 0.125 < 0.175 < row["area_high"]  # two seeds: t is 12.7
    assert row["share_to_final"] == pytest.approx(100 / 150)
    assert row["rare_ratio"] == pytest.approx(0.4 / 0.2)
    assert row["rare_images"] == 6  # 2 + 4 in each seed
    assert row["near_duplicates"] == 1  # none in seed 0, two in seed 1


def test_the_table_has_the_best_first(results: dict[str, Any]) -> None:
    lines = dividend.table(dividend.figures(results))
    assert lines[0].startswith("| arm | seeds | 100 | 150 |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert lines[2].startswith("| x | 2 | 60.0 | 80.0 | +15.0 (")
    assert lines[3].startswith("| random | 2 | 40.0 | 60.0 | – | 100% | 1.00 |")


def test_every_strategy_is_played_by_a_command_that_can_be_given() -> None:
    for strategies, _ in dividend.STAGES.values():
        arms = parse_arms(strategies)
        assert arms[0].label == "random"
    every = {arm.strategy for arm in parse_arms(dividend.STAGES["strategies"][0])}
    assert every == set(STRATEGIES)
    assert ProjectSettings().strategy == dividend.DEFAULT in every


def test_the_figures_in_the_text_are_those_of_the_results() -> None:
    text = (ROOT / "benchmarks" / "dividend" / "README.md").read_text(encoding="utf-8")
    kept = list(dividend.kept())
    assert kept
    for pool, stage, results in kept:
        for line in dividend.table(dividend.figures(results)):
            assert line in text, f"{pool}/{stage}: run scripts/py -m benchmarks.dividend and copy its tables"
        for path in (results["data"]["data"], results["data"]["base_weights"]):
            assert not Path(path).is_absolute(), f"{pool}/{stage} names a path of a machine: {path}"
