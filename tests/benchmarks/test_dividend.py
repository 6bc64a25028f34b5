"""The dividend's figures: by hand on a small result, and those in the texts are those of the kept results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dividend
from strategies import STRATEGIES
from worker.arms import parse_arms
from worker.errors import BadRequest
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
            "ap50": {"dent": rare[number], "bolt": 2 * height - rare[number]},
            "evaluation": f"{arm}-{seed}-{number}",
            "batch": {"rare_images": 2 * number, "near_duplicates": ["a"] * seed},
        }
        for number, height in enumerate(heights)
    ]
    return {"arm": arm, "seed": seed, "rounds": rounds}


@pytest.fixture
def results() -> dict[str, Any]:
    found: dict[str, Any] = {
        "arms": [
            {"label": name, "strategy": name, "draw": 1, "options": {}, "overrides": {}, "played": {"alpha": 1}}
            for name in ("random", "x")
        ],
        "data": {
            "classes": ["bolt", "dent"],
            "rare": ["dent"],
            "rounds": 2,
            "data": "/home/me/pool/data.yaml",
            "base_weights": "/home/me/w.pt",
            "seeds": [0, 1],
        },
        "settings": {name: {"epochs": 9, "weights": "/home/me/w.pt"} for name in ("random", "x")},
        "versions": {"torch": "1"},
        "command": "hardfirst simulate --data=/home/me/pool/data.yaml --out /home/me/out --seeds=0,1",
        "runs": [
            played("random", 0, [0.2, 0.4, 0.6], [0.0, 0.1, 0.2]),
            played("random", 1, [0.2, 0.4, 0.6], [0.0, 0.1, 0.2]),
            played("x", 0, [0.2, 0.6, 0.7], [0.0, 0.2, 0.3]),
            played("x", 1, [0.2, 0.6, 0.9], [0.0, 0.2, 0.5]),
        ],
    }
    found["comparison"] = compare(found, None)
    return found


def test_figures_by_hand(results: dict[str, Any]) -> None:
    base, row = dividend.figures(results)
    assert (base["arm"], base["area_gain"], base["share_to_final"]) == ("random", None, 1.0)
    assert row["labels"] == [50, 100, 150]
    assert row["map50"] == pytest.approx([0.2, 0.6, 0.8])
    # areas: random .4; x (.2 + .6) / 4 + (.6 + .7) / 4 = .525 and .575
    assert row["area_gain"] == pytest.approx(0.15)
    assert row["rare"]["difference"] == pytest.approx(0.1)  # .175 and .225 above .1
    assert row["common"]["difference"] == pytest.approx(0.2)  # twice .15, less .1
    assert row["area_low"] < 0.125 < 0.175 < row["area_high"]  # two seeds: t is 12.7
    assert row["share_to_final"] == pytest.approx(100 / 150)
    assert row["rare_ratio"] == pytest.approx(0.4 / 0.2)
    assert row["rare_images"] == 6  # 2 + 4 in each seed
    assert row["near_duplicates"] == 1  # none in seed 0, two in seed 1
    assert row["minutes"] == 12


def test_the_table_has_the_best_first(results: dict[str, Any]) -> None:
    lines = dividend.table(dividend.figures(results))
    assert lines[0].startswith("| arm | seeds | 100 | 150 |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert lines[2].startswith("| x | 2 | 60.0 | 80.0 | +15.0 (")
    assert lines[3].startswith("| random | 2 | 40.0 | 60.0 | – | – | – | 100% | 1.00 |")


def test_the_front_page_has_budgets_and_rare_classes(results: dict[str, Any]) -> None:
    lines = dividend.short_table(dividend.figures(results))
    assert lines[0] == "| strategy | 50 labels | 100 labels | 150 labels | rare classes, 150 |"
    assert lines[2:] == ["| `x` | 20.0 | 60.0 | 80.0 | 40.0 |", "| `random` | 20.0 | 40.0 | 60.0 | 20.0 |"]
    text = "<!-- table: first -->\nours\n<!-- end -->\n<!-- table: dividend -->\nold\n<!-- end -->"
    assert dividend.with_tables(text, {"dividend": ["new"]}) == text.replace("old", "new")


def test_every_strategy_is_played_by_a_command_that_can_be_given() -> None:
    for strategies, _ in dividend.STAGES.values():
        arms = parse_arms(strategies)
        assert arms[0].label == "random"
    every = {arm.strategy for arm in parse_arms(dividend.STAGES["strategies"][0])}
    assert every == set(STRATEGIES)
    assert ProjectSettings().strategy == dividend.DEFAULT in every


def test_what_is_kept_names_no_path_of_a_machine(results: dict[str, Any]) -> None:
    kept = dividend.without_paths(results)
    assert "/home/me" not in json.dumps(kept)
    assert kept["commands"] == ["hardfirst simulate --data=data.yaml --out out --seeds=0,1"]
    assert "comparison" not in kept


def test_runs_of_several_sessions_are_one_comparison(results: dict[str, Any]) -> None:
    first = dividend.without_paths(results)
    later = json.loads(json.dumps(first))
    later["data"] |= {"seeds": [2], "data": "elsewhere/data.yaml"}
    later["commands"] = ["hardfirst simulate --seeds=2"]
    later["runs"] = [played("x", 2, [0.2, 0.5, 0.6], [0, 0, 0]), played("random", 1, [0.2], [0.0])]
    both = dividend.merged(first, later)
    assert [(run["arm"], run["seed"], len(run["rounds"])) for run in both["runs"]] == [
        *(("random", 0, 3), ("random", 1, 3), ("x", 0, 3), ("x", 1, 3), ("x", 2, 3)),  # one cut short replaces nothing
    ]
    assert both["data"]["seeds"] == [0, 1, 2]
    assert both["commands"] == [*first["commands"], "hardfirst simulate --seeds=2"]
    shown = dividend.view(both, ["random", "x"], [0, 1])
    assert shown["comparison"]["areas"] == results["comparison"]["areas"]
    assert [arm["label"] for arm in dividend.view(both, ["random", "x"], [0, 1, 2])["arms"]] == ["x"]


def test_what_was_played_otherwise_is_not_mixed(results: dict[str, Any]) -> None:
    first = dividend.without_paths(results)
    other_settings = {**first, "settings": {**first["settings"], "x": {"epochs": 10}}}
    with pytest.raises(BadRequest, match="arm x was played with other settings before"):
        dividend.merged(first, other_settings)
    other_data = {**first, "data": {**first["data"], "rounds": 3, "base_weights": "v.pt"}}
    with pytest.raises(BadRequest, match="played with other base_weights, rounds"):
        dividend.merged(first, other_data)
    other_default = [first["arms"][0], {**first["arms"][1], "played": {"alpha": 0.25}}]
    with pytest.raises(BadRequest, match="arm x meant something else when it was played"):
        dividend.merged(first, {**first, "arms": other_default})
    with pytest.raises(BadRequest, match=r"what is kept was played with {'torch': '1'}"):
        dividend.merged(first, {**first, "versions": {"torch": "2"}})


def test_a_training_that_came_out_otherwise_is_of_another_machine(results: dict[str, Any]) -> None:
    first = dividend.without_paths(results)
    assert dividend.merged(first, first)["runs"] == first["runs"]
    elsewhere = json.loads(json.dumps(first))
    elsewhere["runs"] = [played("y", 0, [0.21, 0.4, 0.6], [0.0, 0.1, 0.2])]
    elsewhere["runs"][0]["rounds"][0]["evaluation"] = "random-0-0"  # round 0 is one for all arms of a seed
    with pytest.raises(BadRequest, match="on another machine"):
        dividend.merged(first, elsewhere)


def test_the_figures_in_the_text_are_those_of_the_results() -> None:
    text = (ROOT / "benchmarks" / "dividend" / "README.md").read_text(encoding="utf-8")
    assert list(dividend.kept())
    views = {f"{pool}/{stage}": results for pool, stage, results in dividend.views()}
    found = {name: dividend.figures(results) for name, results in views.items()}
    tables = dividend.all_tables(found)
    front = dividend.FRONT_PAGE.read_text(encoding="utf-8")
    short = {"dividend": dividend.short_table(found[dividend.FRONT])}
    assert dividend.with_tables(front, short) == front, "run: scripts/py -m benchmarks.dividend --write"
    assert "<!-- table: dividend -->" in front
    (winner,) = (row for row in found["factory/winner"] if row["arm"] == dividend.DEFAULT)
    gain, low, high = (f"{100 * winner[name]:.1f}" for name in ("area_gain", "area_low", "area_high"))
    rare, common = (f"{100 * winner[kind]['difference']:.1f}".replace("-0.0", "0.0") for kind in ("rare", "common"))
    told = " ".join(front.split())
    assert "mean of six paired seeds" in told
    assert winner["seeds"] == 6
    assert f"The default's curve lies {gain} points above random's (95 % interval: {low} to {high})" in told
    assert f"the rare classes gain {rare}, the others {common}." in told
    (classic,) = (row for row in found["factory/leaders"] if row["arm"] == "hybrid")
    assert f"lies {-100 * classic['area_gain']:.1f} points below random's on three seeds" in told
    (photographs,) = (row for row in found["foda/winner"] if row["arm"] == dividend.DEFAULT)
    gain, low, high = (f"{100 * photographs[name]:.1f}" for name in ("area_gain", "area_low", "area_high"))
    assert f"the default's curve lies {gain} points above random's ({low} to {high}): nothing is shown." in told
    words = " ".join(text.split())
    assert f"{gain} points ({low} to {high}), ahead up to 350 labels" in words
    (promised,) = (row for row in found["foda/leaders"] if row["arm"] == dividend.DEFAULT)
    assert f"had promised {100 * promised['area_gain']:.1f}: random" in words
    unlucky, others = (
        next(row["map50"][-1] for row in found[f"foda/{stage}"] if row["arm"] == "random")
        for stage in ("leaders", "winner")
    )
    assert f"({100 * unlucky:.1f} at 450 labels; {100 * others:.1f} on the six others)" in words
    (lucky,) = (row for row in found["foda/strategies"] if row["arm"] == "random@2")
    assert f"`random@2`, lies {100 * lucky['area_gain']:.1f} points above it" in words
    last = views["foda/winner"]["comparison"]["differences"][dividend.DEFAULT][-1]
    behind, below, above = (f"{100 * value:.1f}" for value in (-last["mean"], last["low"], last["high"]))
    assert f"{behind} behind at 450 ({below} to {above})" in words
    assert dividend.with_tables(text, tables) == text, "run: scripts/py -m benchmarks.dividend --write"
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) >= set(tables), "a table is nowhere in the text"


def test_rounds_of_a_diagnosis_stand_side_by_side() -> None:
    rounds = {
        "50": [{"arm": "x", "rare": 1}, {"arm": "y", "rare": 2}],
        "150": [{"arm": "x", "rare": 3}, {"arm": "y", "rare": 4}],
    }
    rows = dividend.side_by_side(rounds)
    assert rows == [{"arm": "x", "rare, 50": 1, "rare, 150": 3}, {"arm": "y", "rare, 50": 2, "rare, 150": 4}]
    assert dividend.markdown(rows)[0] == "| arm | rare, 50 | rare, 150 |"


def test_no_kept_result_names_a_path_of_a_machine() -> None:
    for pool, results in dividend.kept():
        told = {**results, "runs": []}  # their images are named from data.yaml
        assert '"/' not in json.dumps(told), f"{pool} names a path of a machine"
