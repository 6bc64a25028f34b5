"""The check-up behind the page's button: `hardfirst doctor`'s checks, made by a thread of their own, one run at a time.

The web process loads no torch: a worker says what it sees of devices and weights. Nobody waits for a run; who asks is
told how far it is. A run that takes too long is ended at its next check, and what was not looked at is said.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict

from backend.doctor_command import SYMBOLS, summary
from worker.doctor import Check, Look, Status, deployment_looks, first_line, run, skipped
from worker.doctor_project import project_looks
from worker.errors import Conflict, NotFound
from worker.image_sources import printable
from worker.services import Services

log = logging.getLogger(__name__)

RUN_SECONDS = 180.0  # of checks each of which has a limit of its own
WORDS = {Status.OK: "OK", Status.WARNING: "Warning", Status.FAILED: "Failed", Status.SKIPPED: "Not looked at"}

State = Literal["never", "running", "done"]


class View(BaseModel):
    model_config = ConfigDict(frozen=True)


class CheckView(View):
    """One check. `status`: ok, warning, failed or skipped; `can_fix`: a button may put it right, safely."""

    name: str
    status: Status
    symbol: str
    words: str
    sentence: str
    fix: str
    project_id: int | None
    mended: bool
    can_fix: bool


class DoctorView(View):
    """The last check-up, as far as it is. `looking_at`: what it is at; `problem`: why it was not finished."""

    state: State
    looking_at: str = ""
    ended_at: float | None = None
    summary: str = ""
    problem: str = ""
    checks: list[CheckView] = []


@dataclass
class _Found:
    """What the last run of a scope found, or finds."""

    checks: list[Check] = field(default_factory=list)
    ended_at: float | None = None
    problem: str = ""


class Examiner:
    """Runs check-ups for one application. Scopes: None, the deployment; a project's id, the deployment and it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[int | None, _Found] = {}
        self._thread: threading.Thread | None = None
        self._scope: int | None = None
        self._at = ""
        self._until = 0.0

    def view(self, scope: int | None) -> DoctorView:
        with self._lock:
            busy = self._is_busy() and self._scope == scope
            found = self._found.get(scope, _Found())
            checks = list(found.checks)  # the thread adds to them
        state: State = "running" if busy else "never" if found.ended_at is None else "done"
        return DoctorView(
            state=state,
            looking_at=self._at if busy else "",
            ended_at=found.ended_at,
            summary=summary(checks),
            problem=found.problem,
            checks=[_view(check) for check in checks],
        )

    def start(self, own: Services, scope: int | None, mend: tuple[str, int | None] | None = None) -> None:
        """Check everything of a scope; with `mend`, also put that one check right (name, project id).

        Raises:
            Conflict: a run is on its way.
            NotFound: `mend` names a check that nothing can put right now.
        """
        with self._lock:
            if self._is_busy():
                where = "the deployment" if self._scope is None else f"project {self._scope}"
                raise Conflict(f"a check-up of {where} is on its way ({self._at}). Wait until it is over")
            if mend is not None and not self._can_mend(scope, mend):
                raise NotFound(f"there is nothing to put right about {mend[0][:60]!r}: check everything first")
            self._scope, self._at, self._until = scope, "beginning", time.monotonic() + RUN_SECONDS
            self._found[scope] = found = _Found()
            arguments = (own, scope, mend, found)
            self._thread = threading.Thread(target=self._examine, args=arguments, daemon=True, name="check-up")
            self._thread.start()

    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _can_mend(self, scope: int | None, mend: tuple[str, int | None]) -> bool:
        found = self._found.get(scope)
        checks = [] if found is None else found.checks
        return any((one.name, one.project_id) == mend and one.mend is not None for one in checks)

    def _examine(
        self, own: Services, scope: int | None, mend: tuple[str, int | None] | None, found: _Found
    ) -> None:
        try:
            for check in self._checks(own, scope, mend):
                found.checks.append(check)
        except Exception as error:  # the thread's end would be seen by nobody
            log.exception("the check-up broke")
            found.problem = f"The check-up broke: {first_line(error)}. The backend's log has it."
        if time.monotonic() >= self._until:
            found.problem = f"It was ended after {RUN_SECONDS:.0f} s: what is missing was not looked at."
        found.ended_at = time.time()

    def _checks(self, own: Services, scope: int | None, mend: tuple[str, int | None] | None) -> Iterator[Check]:
        unusable: set[str] = set()
        yield from self._run(deployment_looks(own, quick=False, ask_worker=True), None, mend, unusable)
        if scope is not None:
            yield from self._run(project_looks(own, scope, quick=True), scope, mend, unusable)

    def _run(
        self, looks: Sequence[Look], project_id: int | None, mend: tuple[str, int | None] | None, unusable: set[str]
    ) -> Iterator[Check]:
        """One look at a time, so that who asks is told which, and that it ends in time."""
        for look in looks:
            if time.monotonic() >= self._until:
                yield replace(skipped(look.name, "not looked at: the time was up"), project_id=project_id)
                continue
            self._at = look.name
            fix = mend == (look.name, project_id)
            yield from run([look], fix=fix, unusable=unusable, project_id=project_id)


def _view(check: Check) -> CheckView:
    """What others wrote may hold control characters: they are shown escaped."""
    can_fix = check.mend is not None
    fix = check.fix.replace("Run `hardfirst doctor --fix`", "Press Put right") if can_fix else check.fix
    return CheckView(
        name=check.name,
        status=check.status,
        symbol=SYMBOLS[check.status],
        words=WORDS[check.status],
        sentence=printable(check.sentence.removeprefix("not looked at: ")),
        fix=printable(fix) if check.status in (Status.FAILED, Status.WARNING) else "",
        project_id=check.project_id,
        mended=check.mended,
        can_fix=can_fix,
    )


_examiners: WeakKeyDictionary[Services, Examiner] = WeakKeyDictionary()
_examiners_lock = threading.Lock()


def examiner_of(own: Services) -> Examiner:
    """One per application."""
    with _examiners_lock:
        return _examiners.setdefault(own, Examiner())
