"""The benchmarks run, small, and end with the figures that CI reads. How good the figures are is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def figures(name: str, *arguments: str) -> dict[str, Any]:
    """The last line of `python -m benchmarks NAME --quick --json`."""
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def test_selection_picks_what_the_peers_pick() -> None:
    found = figures("selection")
    assert found["same_picks"] is True
    assert found["k_center_vs_peer"] > 0
    assert found["k_center_vs_pairwise"] > 0
    assert found["kmeans_growth"] > 0
    assert found["peak_memory"] >= 1
    ran = {(case["name"], case["size"]) for case in found["cases"]}
    names = ("kmeans", "k_center", "coverage", "near_duplicate_groups")
    assert ran == {(name, size) for name in names for size in (4_000, 16_000)}
    assert all(case["seconds"] > 0 for case in found["cases"])


@pytest.mark.usefixtures("label_studio")  # for its sentence where there is none; the benchmark starts its own
def test_publish_measures_bulk_and_one_by_one() -> None:
    found = figures("publish")
    assert min(found["bulk_per_s"], found["one_by_one_per_s"]) > 0
    assert found["bulk_per_processor_s"] > 0
    assert found["purge_s"] > 0


def test_predict_answers_live() -> None:
    found = figures("predict")
    assert found["bare_ms"] > 0
    assert found["warm_ratio"] == pytest.approx(found["warm_ms"] / found["bare_ms"], abs=0.01)
    assert found["busy_p95_ms"] > 0


def test_predict_answers_many_tasks_in_one_request() -> None:
    found = figures("predict", "--size=40")
    assert [row["answered"] for row in found.values()] == [40, 40, 40]  # so few are made in time
    assert all(0 < row["seconds"] < 100 and row["answer_mb"] > 0 and row["health_ms"] > 0 for row in found.values())


def test_verdict_replays_curves_of_known_truth() -> None:
    found = figures("verdict")
    assert set(found) == {"false_stops", "flat_stopped", "insufficient", "base_false_stops"}
    assert all(0 < share < 1 for share in found.values())
    assert found["false_stops"] < found["base_false_stops"]


def test_page_asks_every_view() -> None:
    found = figures("page", "--tasks=1200", "--rounds=3")
    assert {"/", "/projects/1", "/projects/2", "/api/projects/1/status", "/api/projects/1/batch"} <= set(
        found["milliseconds"]
    )
    assert all(times["median"] > 0 and times["p95"] >= times["median"] for times in found["milliseconds"].values())
    assert found["met"] is (found["milliseconds"][found["slowest"]]["median"] < 300)
