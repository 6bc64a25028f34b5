"""The main job, from the command line: a real Label Studio, a real Valkey, a real YOLO, scripted annotators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)  # two trainings and a Label Studio on a machine that may be busy
def test_the_demo_closes_the_loop(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "backend.cli", "demo", "--exit", "--folder", str(tmp_path)]
    command += ["--images", "120", "--batch-size", "24", "--epochs", "2", "--rounds", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=880)
    log = tmp_path / "hardfirst.log"
    assert ended.returncode == 0, ended.stderr + (log.read_text()[-3000:] if log.is_file() else "")
    outcome = json.loads(ended.stdout.splitlines()[-1])
    assert outcome["served_in_order"] is True
    assert [one["labels"] for one in outcome["rounds"]] == [24, 48]
    assert all(0 <= one["map50"] <= 1 for one in outcome["rounds"])
    first, second = outcome["rounds"]
    assert first["gain"] is None
    assert first["verdict"] == "insufficient_evidence"
    assert second["gain"] == pytest.approx(second["map50"] - first["map50"], abs=2e-4)
    assert second["verdict"] in ("insufficient_evidence", "continue")  # two rounds are too few to stop
    assert not _processes_of(tmp_path), "something was left running"


def _processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name this test's folder."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(folder) in line and "ps -eo" not in line]
