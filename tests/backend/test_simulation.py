"""`hardfirst simulate` at a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from backend.simulation import Shown, simulate
from demo.factory import write_dataset
from worker.errors import BadRequest, SettingsInvalid
from worker.simulate import Step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("factory"), 24, seed=5, size=(128, 96))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"seeds": "0,a"}, BadRequest, "--seeds is '0,a'"),
        ({"seeds": "1,1"}, BadRequest, "each once"),
        ({"seed_set": "best"}, BadRequest, "random or diverse"),
        ({"strategies": "hybrd"}, BadRequest, "Did you mean 'hybrid'"),
        ({"strategies": "hybrid:thresold=0.1"}, BadRequest, "Did you mean 'threshold'"),
        ({"assigned": ["freze=3"]}, BadRequest, "Did you mean 'freeze'"),
        ({"rare": "gold"}, BadRequest, "--rare names 'gold'"),
        ({"batch_size": 900}, BadRequest, "Lower --seed-size or --batch-size"),
        ({"data": Path("nowhere.yaml")}, BadRequest, "nowhere.yaml cannot be read"),
        ({"imgsz": 33}, SettingsInvalid, "imgsz"),
    ],
)
def test_options_that_cannot_be_right_are_refused(
    dataset: Path, tmp_path: Path, options: dict[str, object], error: type[Exception], sentence: str
) -> None:
    given: dict[str, object] = {
        "data": dataset, "strategies": "random", "rounds": 1, "batch_size": 4, "seeds": "0", "out": tmp_path / "o",
        "seed_size": 4, "seed_set": "random", "jobs": 1, "rare": "", "seconds_per_image": 8, "seconds_per_box": 7,
        "assigned": [], "weights": "yolo11n.yaml", "imgsz": 64,
    }
    with pytest.raises(error, match=sentence):
        simulate(**{**given, **options})  # type: ignore[arg-type]  # that is what is tried


def test_the_time_left_is_estimated_from_what_was_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    shown = Shown(Console(file=told))
    clock = iter([100.0, 160.0, 160.0, 160.0])
    monkeypatch.setattr("backend.simulation.time.monotonic", lambda: next(clock))
    shown.begin(total=1000, done=400, steps=10, steps_done=4)
    shown.finished(Step("hybrid", 3, 2), cost=100, seconds=61)
    assert "10 rounds of arms and seeds, 4 of them done already." in told.getvalue()
    assert "[5/10] hybrid, seed 3, round 2: 61 s; 5 min left" in told.getvalue()  # 500 left at 100 a minute


@pytest.mark.slow
@pytest.mark.parametrize("is_loaded", [False, True], ids=["at once", "while its process is loaded"])
def test_interrupted_it_stops_at_once_and_says_how_to_go_on(dataset: Path, tmp_path: Path, is_loaded: bool) -> None:
    command = [
        *(sys.executable, "-m", "backend.cli", "simulate", "--data", str(dataset), "--out", str(tmp_path)),
        *("--strategies", "random", "--rounds", "1", "--batch-size", "4", "--seed-size", "6", "--jobs", "2"),
        *("--imgsz", "64", "--epochs", "500", "--weights", "yolo11n.yaml"),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("2 rounds of arms and seeds"):
        assert line, "it ended before it began"
    while is_loaded and not _children(process.pid):
        time.sleep(0.01)
    time.sleep(0.2 * is_loaded)  # an interpreter runs in it
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C at a terminal: the children get it too
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in " ".join(said.split())
    assert "Traceback" not in said
    assert _is_gone(process.pid), "a process was left running"
    assert not (tmp_path / "work").exists()


def _children(pid: int) -> list[str]:
    """Command lines of the processes that do the steps."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            found.append(" ".join(child.cmdline()))
    return [line for line in found if "spawn_main" in line]


def _is_gone(group: int, seconds: float = 20.0) -> bool:
    """Whether the last process of a group ends: multiprocessing's helpers do so a moment after the one they served."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
