"""`hardfirst simulate` at a terminal: its options made a plan, its progress shown, its results written."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from worker.arms import parse_arms, parse_assignments
from worker.detector import pick_device
from worker.errors import BadRequest
from worker.settings import load_settings
from worker.simulate import SEED_SETS, Plan, Step
from worker.simulation_jobs import run_plan
from worker.simulation_report import write_report, write_results


def simulate(
    data: Path,
    strategies: str,
    rounds: int,
    batch_size: int,
    seeds: str,
    out: Path,
    seed_size: int,
    seed_set: str,
    jobs: int | None,
    rare: str,
    seconds_per_image: float,
    seconds_per_box: float,
    assigned: Sequence[str],
    **settings: Any,
) -> int:
    """Play, write `results.json` and the report. Returns the exit code: 1 when an arm could not go on, 130 if stopped.

    Raises:
        BadRequest: the options cannot be right.
    """
    if seed_set not in SEED_SETS:
        raise BadRequest(f"--seed-set is {seed_set!r}. Use {' or '.join(SEED_SETS)}")
    deployment = load_settings()
    plan = Plan(
        data=data,
        out=out.resolve(),
        arms=tuple(parse_arms(strategies)),
        seeds=tuple(_seeds(seeds)),
        rounds=rounds,
        batch_size=batch_size,
        seed_size=seed_size,
        seed_set=seed_set,
        common={**parse_assignments(assigned), **settings},
        configured_weights=deployment.weights,
        device=deployment.device,
        rare=tuple(name.strip() for name in rare.split(",") if name.strip()),
        seconds_per_image=seconds_per_image,
        seconds_per_box=seconds_per_box,
        command=shlex.join(["hardfirst", *sys.argv[1:]]),
    )
    return _play(plan, jobs or _default_jobs(plan.device))


def _play(plan: Plan, jobs: int) -> int:
    console = Console(stderr=False)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Shown(console) as shown:
            bench, failures = run_plan(plan, jobs, shown, lambda bench: write_results(bench, {}))
    except KeyboardInterrupt:
        console.print(
            f"Stopped. What is finished is kept in {plan.out}: the same command goes on from there.", soft_wrap=True
        )
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    write_results(bench, failures)
    console.print("Drawing the report ...")
    console.print(f"Report: {write_report(bench, failures)}", soft_wrap=True)
    for where, why in failures.items():
        console.print(f"Failed: {where}: {why}", soft_wrap=True, markup=False)
    return 1 if failures else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadRequest(f"--seeds is {text!r}: whole numbers with commas between them, such as 0,1,2") from None
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise BadRequest(f"--seeds is {text!r}: at least one number from 0 on, each once")
    return seeds


def _default_jobs(device: str) -> int:
    """One for each core; on a GPU one, as all would share it."""
    return (os.cpu_count() or 1) if pick_device(device).type == "cpu" else 1


class Shown:
    """The progress: a bar with the time that is left, and a line for each finished round (in a log, lines alone)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = self._done = self._fresh = 0.0
        self._steps = self._finished = 0
        self._doing: dict[Step, str] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, total: float, done: float, steps: int, steps_done: int) -> None:
        self._total, self._done, self._steps, self._finished = total, done, steps, steps_done
        self._began = time.monotonic()
        self._task = self._bar.add_task("starting", total=total, completed=int(done), left="")
        self.console.print(f"{steps} rounds of arms and seeds, {steps_done} of them done already.")

    def told(self, step: Step, what: str, share: float) -> None:
        self._doing[step] = f"{step.arm} seed {step.seed} round {step.number}: {what} {share:.0%}"
        self._show()

    def finished(self, step: Step, cost: float, seconds: float) -> None:
        self._doing.pop(step, None)
        self._done += cost
        self._fresh += cost
        self._finished += 1
        self.console.print(
            f"[{self._finished}/{self._steps}] {step.arm}, seed {step.seed}, round {step.number}: {seconds:.0f} s; "
            f"{self._left()} left",
            markup=False,
            soft_wrap=True,
        )
        self._show()

    def failed(self, step: Step, sentence: str) -> None:
        self._doing.pop(step, None)
        self.console.print(
            f"{step.arm}, seed {step.seed}, round {step.number} failed: {sentence}", markup=False, soft_wrap=True
        )

    def _left(self) -> str:
        if not self._fresh:
            return "time unknown"
        seconds = (self._total - self._done) * (time.monotonic() - self._began) / self._fresh
        if seconds < 120:
            return f"{seconds:.0f} s"
        return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"

    def _show(self) -> None:
        if self._task is not None:
            doing = "; ".join(self._doing.values()) or "waiting"
            self._bar.update(self._task, completed=self._done, description=doing, left=f"{self._left()} left")


