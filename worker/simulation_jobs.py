"""Who does the steps of a simulation: processes of one thread each, and the order in which they get them.

Always in child processes, one or many: the numbers must not depend on how many there are. They are daemons, so that
none starts processes of its own, and they end with their parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from worker.errors import BadRequest, Conflict, HardfirstError, TrainingFailed
from worker.processes import die_with_parent
from worker.simulate import Bench, Plan, Step

STOPPING = (signal.SIGINT, signal.SIGTERM)
CHOOSING_COST = 0.4  # of a pool image scored, against a labelled image trained on for one epoch


class Watcher(Protocol):
    """What is told of a run."""

    def begin(self, total: float, done: float, steps: int, steps_done: int) -> None: ...

    def told(self, step: Step, what: str, share: float) -> None: ...

    def finished(self, step: Step, cost: float, seconds: float) -> None: ...

    def failed(self, step: Step, sentence: str) -> None: ...


@dataclass
class Schedule:
    """Which step comes next. An arm's rounds follow each other; arms with the same round 0 wait for one of them."""

    bench: Bench
    following: dict[tuple[str, int], int] = field(default_factory=dict)  # (arm, seed) -> number of the next round
    running: dict[tuple[str, int], Step] = field(default_factory=dict)
    failures: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.bench.plan
        for arm in plan.arms:
            for seed in plan.seeds:
                numbers = range(plan.rounds + 1)
                known = (number for number in numbers if self.bench.known(Step(arm.label, seed, number)) is None)
                self.following[arm.label, seed] = next(known, plan.rounds + 1)

    def next_step(self) -> Step | None:
        """The first that can be done now: all arms reach a round before one goes on, seed by seed."""
        return min(self._ready(), key=self._place, default=None)

    def _ready(self) -> Iterator[Step]:
        first = {self.bench.round_0_key(*chain) for chain, step in self.running.items() if not step.number}
        for chain, number in self.following.items():
            if chain in self.running or chain in self.failures or number > self.bench.plan.rounds:
                continue
            if number or self.bench.round_0_key(*chain) not in first:
                yield Step(*chain, number)

    def _place(self, step: Step) -> tuple[int, int, int]:
        plan = self.bench.plan
        arms = [arm.label for arm in plan.arms]
        return plan.seeds.index(step.seed), step.number, arms.index(step.arm)

    def start(self, step: Step) -> None:
        self.running[step.arm, step.seed] = step

    def finish(self, step: Step) -> None:
        del self.running[step.arm, step.seed]
        self.following[step.arm, step.seed] = step.number + 1

    def fail(self, step: Step, sentence: str) -> None:
        del self.running[step.arm, step.seed]
        self.failures[step.arm, step.seed] = sentence

    def cost(self, step: Step) -> float:
        """How long it takes, in images trained on: what the time that is left is estimated from."""
        plan = self.bench.plan
        epochs = plan.settings(self.bench.arms[step.arm], step.seed).epochs
        scored = len(self.bench.world.pool) if step.number < plan.rounds else 0
        return (plan.seed_size + step.number * plan.batch_size) * epochs + CHOOSING_COST * scored

    def steps(self) -> list[Step]:
        plan = self.bench.plan
        return [Step(*chain, number) for chain in self.following for number in range(plan.rounds + 1)]

    def is_done(self, step: Step) -> bool:
        return step.number < self.following[step.arm, step.seed]


def run_plan(plan: Plan, jobs: int, watcher: Watcher, on_step: Callable[[Bench], None]) -> tuple[Bench, dict[str, str]]:
    """Do all steps that are not done yet.

    Args: on_step: called after each finished step, to write what is known by then.
    Returns: the bench with all results, and "arm, seed" -> why that arm could not go on.
    Raises: Conflict: another process plays in the same folder. KeyboardInterrupt: stopped; nothing finished is lost.
    """
    plan.check_arms()
    with _only_one(plan.out):
        shutil.rmtree(plan.out / "work", ignore_errors=True)  # of a run that was killed
        bench = Bench(plan)
        plan.check(bench.world)
        schedule = Schedule(bench)
        steps = schedule.steps()
        done = [step for step in steps if schedule.is_done(step)]
        watcher.begin(sum(map(schedule.cost, steps)), sum(map(schedule.cost, done)), len(steps), len(done))
        if len(done) < len(steps):
            _run(schedule, min(jobs, len(schedule.following)), watcher, on_step)
        return bench, {f"{arm}, seed {seed}": why for (arm, seed), why in schedule.failures.items()}


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "simulate.lock").open("a+")
    except OSError as error:
        raise BadRequest(f"--out {folder} cannot be written: {error.strerror}") from error
    with lock as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise Conflict(
                f"process {handle.read(20) or 'unknown'} plays in {folder}. Wait for it, or choose another --out"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        try:
            yield
        finally:
            shutil.rmtree(folder / "work", ignore_errors=True)


@dataclass
class _Hand:
    """A process that does steps."""

    process: Any
    connection: Connection
    step: Step | None = None
    began: float = 0.0


def _run(schedule: Schedule, jobs: int, watcher: Watcher, on_step: Callable[[Bench], None]) -> None:
    hands: list[_Hand] = []
    try:
        for _ in range(jobs):
            with _uninterrupted():
                hands.append(_start(schedule.bench.plan))
        while True:
            for hand in hands:
                if hand.step is None and (step := schedule.next_step()) is not None:
                    schedule.start(step)
                    hand.step, hand.began = step, time.monotonic()
                    hand.connection.send(step)
            busy = [hand for hand in hands if hand.step is not None]
            if not busy:
                return
            for ready in wait([hand.connection for hand in busy]):
                hand = next(hand for hand in busy if hand.connection is ready)
                _hear(hand, schedule, watcher, on_step)
    finally:
        _stop(hands)


def _hear(hand: _Hand, schedule: Schedule, watcher: Watcher, on_step: Callable[[Bench], None]) -> None:
    step = hand.step
    assert step is not None  # only busy ones are listened to
    try:
        kind, *rest = hand.connection.recv()
    except EOFError:
        hand.process.join()
        code = hand.process.exitcode
        raise TrainingFailed(
            f"the process at {step.arm}, seed {step.seed}, round {step.number} ended with code {code}: out of memory? "
            "Start the same command again, with fewer --jobs"
        ) from None
    if kind == "told":
        watcher.told(step, *rest)
    elif kind == "done":
        hand.step = None
        schedule.finish(step)
        watcher.finished(step, schedule.cost(step), time.monotonic() - hand.began)
        on_step(schedule.bench)
    elif kind == "failed":
        hand.step = None
        schedule.fail(step, rest[0])
        watcher.failed(step, rest[0])
    else:
        raise RuntimeError(f"{step.arm}, seed {step.seed}, round {step.number}:\n{rest[0]}")


def _start(plan: Plan) -> _Hand:
    context = multiprocessing.get_context("spawn")  # a fork of a process that ran torch may never wake
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, plan, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Hand(process, ours)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Starts a child whole: what would stop us in the middle of it stops us afterwards.

    The child inherits that Ctrl-C, which reaches the whole group, is nothing to it: its parent stops it.
    """
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda told, _: came.append(told)) for number in STOPPING}
    resource_tracker.ensure_running()  # started later, it would let the signal in again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _stop(hands: Sequence[_Hand]) -> None:
    for hand in hands:
        with contextlib.suppress(OSError):  # gone already
            hand.connection.send(None)
        if hand.step is not None:
            hand.process.kill()  # what it has finished is whole on disk, what it has not is done again
    for hand in hands:
        hand.process.join()
        hand.connection.close()


def _work(connection: Connection, plan: Plan, parent: int) -> None:
    die_with_parent(signal.SIGKILL, parent)
    try:
        bench = Bench(plan)
        while (step := connection.recv()) is not None:
            bench.told = lambda what, share: connection.send(("told", what, share))
            try:
                bench.run(step)
            except HardfirstError as error:
                connection.send(("failed", str(error)))
            else:
                connection.send(("done",))
    except (EOFError, BrokenPipeError):
        return
    except Exception:  # noqa: BLE001 - a mistake of ours: told whole, by the process that has a terminal
        connection.send(("broken", traceback.format_exc()))


