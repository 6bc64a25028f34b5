"""`hardfirst doctor`: checks in order, each failure with its fix in one sentence. This deployment here, projects in
worker.doctor_project.

A look changes nothing. Where mending is safe, a finding brings how: `run` does it when asked to, and looks again.
Nothing a check says holds a token or a password.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import httpx
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import make_url, text
from sqlalchemy.exc import SQLAlchemyError

from worker import crew, queue, store
from worker.credentials import TAKE_ONE, VARIABLE, kind_of, seconds_left
from worker.errors import CredentialsMissing, HardfirstError, QueueUnavailable, WeightsUnavailable
from worker.processes import embedded_valkey
from worker.services import Services
from worker.settings import Settings

EXPIRES_SOON = 14.0  # days
WORKER_PATIENCE = 25.0  # seconds for a worker to answer: loading torch takes it ten on a busy machine
FOR_EVER = 3650  # days: Label Studio's personal tokens last 200 years unless an administrator says otherwise
START_IT = "Start `hardfirst up`"
TRIED_WITH = "1.23.2"  # the Label Studio that the tests start, see requirements-label-studio.lock
CORRECT_WEIGHTS = "Put the file there, or correct HARDFIRST_WEIGHTS"


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """What one look found.

    Attributes:
        name: what was looked at.
        status: warning: it works, and somebody should know; skipped: it could not be looked at.
        sentence: what is so.
        fix: what to do, one sentence; empty where there is nothing to do.
        project_id: None: it is about the deployment.
        mended: it was wrong, and has just been put right.
        mend: puts it right, where that is safe; it is not run by looking.
    """

    name: str
    status: Status
    sentence: str
    fix: str = ""
    project_id: int | None = None
    mended: bool = False
    mend: Callable[[], object] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Look:
    """A check to be made. `needs`: names of those without which it would only repeat their failure."""

    name: str
    look: Callable[[], Check]
    needs: tuple[str, ...] = ()


def ok(name: str, sentence: str) -> Check:
    return Check(name, Status.OK, sentence)


def warning(name: str, sentence: str, fix: str = "", mend: Callable[[], object] | None = None) -> Check:
    return Check(name, Status.WARNING, sentence, fix, mend=mend)


def failed(name: str, sentence: str, fix: str, mend: Callable[[], object] | None = None) -> Check:
    return Check(name, Status.FAILED, sentence, fix, mend=mend)


def skipped(name: str, sentence: str) -> Check:
    return Check(name, Status.SKIPPED, sentence)


def run(
    looks: Sequence[Look], *, fix: bool, unusable: set[str] | None = None, project_id: int | None = None
) -> Iterator[Check]:
    """Look at one after the other.

    Args:
        fix: mend what can be mended safely, and look again.
        unusable: names of checks that failed before; those of these looks are added.
        project_id: whom they are about.
    """
    unusable = set() if unusable is None else unusable
    for one in looks:
        missing = [name for name in one.needs if name in unusable]
        if missing:
            check = skipped(one.name, f"not looked at: {missing[0]} comes first")
        else:
            check = _mended(one) if fix else _looked(one)
        if check.status in (Status.FAILED, Status.SKIPPED):
            unusable.add(one.name)
        yield replace(check, project_id=project_id)


def _looked(one: Look) -> Check:
    try:
        return one.look()
    except HardfirstError as error:
        return failed(one.name, str(error), "")
    except Exception as error:  # noqa: BLE001 - that a look breaks is a finding too, and the others are still due
        return failed(one.name, f"the look itself broke: {first_line(error)}", "Report it, with this line")


def _mended(one: Look) -> Check:
    found = _looked(one)
    if found.mend is None:
        return found
    try:
        found.mend()
    except HardfirstError as error:
        return replace(found, sentence=f"{found.sentence}; mending it failed: {error}")
    except Exception as error:  # noqa: BLE001 - as in `_looked`
        return replace(found, sentence=f"{found.sentence}; mending it failed: {first_line(error)}")
    again = _looked(one)
    return replace(again, mended=again.status is Status.OK)


def first_line(error: BaseException) -> str:
    """An exception of somebody else's in one line: a database's goes on with every parameter."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def services_for(settings: Settings) -> Services:
    """Connections for looking: where no REDIS_URL is set, to the Valkey of a `hardfirst up` on the same folder."""
    folder = settings.data_dir.expanduser().resolve()  # as `hardfirst up` reads it
    redis_url = settings.redis_url or embedded_valkey(folder) or ""
    known = settings.model_copy(update={"data_dir": folder, "redis_url": redis_url})
    return Services(known, "web")  # "web": gives up after seconds


def deployment_looks(own: Services, *, quick: bool, ask_worker: bool = False) -> list[Look]:
    """What all projects need, in order.

    Args:
        quick: torch is not loaded, which takes seconds.
        ask_worker: nor is it loaded here otherwise: a worker says what it sees.
    """
    looks = [
        Look("Label Studio", lambda: look_at_label_studio(own)),
        Look("token", lambda: look_at_token(own), needs=("Label Studio",)),
        Look("queue", lambda: look_at_queue(own)),
        Look("store", lambda: look_at_store(own)),
    ]
    for name in queue.QUEUES:
        looks.append(Look(f"workers: {name}", lambda name=name: look_at_workers(own, name), needs=("queue",)))  # type: ignore[misc]
    for name, look in NEED_TORCH.items():
        if quick:
            looks.append(Look(name, lambda name=name: skipped(name, "not looked at: --quick")))  # type: ignore[misc]
        elif ask_worker:
            needs = ("queue", f"workers: {queue.CONTROL}")
            looks.append(Look(name, lambda name=name: seen_by_worker(own, name), needs))  # type: ignore[misc]
        else:
            looks.append(Look(name, lambda look=look: look(own)))  # type: ignore[misc]
    return looks


def first_looks(own: Services) -> list[Look]:
    """What `hardfirst up` tells of as it starts: what somebody typed, and no round would go on without."""
    return [
        Look("Label Studio", lambda: look_at_label_studio(own)),
        Look("token", lambda: look_at_token(own), needs=("Label Studio",)),
        Look("weights", lambda: look_for_weights(own)),
    ]


def seen_by_worker(own: Services, name: str) -> Check:
    """A check of NEED_TORCH, made on the host of a worker."""
    try:
        (found,) = queue.call_examine(own.redis, [[name]], WORKER_PATIENCE)
    except TimeoutError:
        return skipped(name, f"not looked at: the worker of `{queue.CONTROL}` is busy; look again later")
    return Check(name, Status(found["status"]), str(found["sentence"]), str(found["fix"]))


def examined_here(own: Services, names: Sequence[str]) -> list[dict[str, str]]:
    """Checks of NEED_TORCH as JSON carries them."""
    looks = [Look(name, lambda name=name: NEED_TORCH[name](own)) for name in names if name in NEED_TORCH]  # type: ignore[misc]
    return [
        {"name": one.name, "status": str(one.status), "sentence": one.sentence, "fix": one.fix}
        for one in run(looks, fix=False)
    ]


# --- Label Studio and its token ---------------------------------------------------------------------------------------


def look_at_label_studio(own: Services) -> Check:
    name, url = "Label Studio", own.settings.label_studio_url
    try:
        version = own.label_studio.server_version()
    except HardfirstError as error:
        return failed(name, str(error), "Start Label Studio, or set LABEL_STUDIO_URL to where it answers")
    found = f"Label Studio{f' {version}' if version else ''} answers at {url}"
    if version and _series(version) != _series(TRIED_WITH):
        fix = "If the checks below find nothing else, go on; docs/upgrading.md says what a version may change"
        return warning(name, f"{found}; this hardfirst was tried with {TRIED_WITH}", fix)
    return ok(name, found)


def _series(version: str) -> str:
    """Major and minor: what a patch changes is no other Label Studio."""
    return ".".join(version.split(".")[:2])


def look_at_token(own: Services) -> Check:
    name, token = "token", own.label_studio.token()
    take = (
        "Take one in Account & Settings -> Personal Access Token, set LABEL_STUDIO_API_KEY in .env or the environment "
        "and start hardfirst again"
    )
    if token is None:
        refused = ", and Label Studio refused the token it sent itself: legacy tokens are off there, as a rule"
        also = refused if own.label_studio.setup_token_was_refused() else ""
        return failed(name, f"LABEL_STUDIO_API_KEY is not set{also}", take)
    try:
        user = own.label_studio.whoami()
    except CredentialsMissing as error:
        return failed(name, str(error).removesuffix(f". {TAKE_ONE}"), TAKE_ONE)
    kind = f"{kind_of(token.value)}{'' if token.name == VARIABLE else ', which came with /setup,'}"
    whose = str(user.get("email") or user.get("username") or f"user {user.get('id')}")
    left = seconds_left(token.value)
    days = None if left is None else left / 86_400
    if days is not None and days < EXPIRES_SOON:
        ends = f"the {kind} of {whose} ends in {max(days, 0):.0f} days"
        return warning(name, ends, f"Take a new one in time: {take}")
    until = "" if days is None or days > FOR_EVER else f", valid for {days:,.0f} more days"
    return ok(name, f"{kind} of {whose}{until}")


# --- queue and store --------------------------------------------------------------------------------------------------


def look_at_queue(own: Services) -> Check:
    name, url = "queue", own.settings.redis_url
    if not url:
        sentence = f"`hardfirst up` is not running in {own.settings.data_dir}: there is no Valkey"
        return failed(name, sentence, f"{START_IT}, or set REDIS_URL")
    embedded = url.startswith("unix:")
    try:
        queue.ping(own.redis)
        with queue.redis_border():
            memory = dict(own.redis.info("memory"))
    except QueueUnavailable as error:
        fix = f"{START_IT}, or see what it says about Valkey" if embedded else "Start it, or correct REDIS_URL"
        return failed(name, str(error), fix)
    where = without_password(url)
    policy = str(memory.get("maxmemory_policy") or "noeviction")
    if policy != "noeviction" and memory.get("maxmemory"):
        sentence = f"{where} throws keys away when its memory is full ({policy}): a queued job may vanish for a while"
        return warning(name, sentence, "Set its maxmemory-policy to noeviction")
    return ok(name, f"{where} answers")


def without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def look_at_store(own: Services) -> Check:
    name, url = "store", own.settings.store_url
    shown = make_url(url).render_as_string(hide_password=True)
    if _is_missing_file(url):
        make = lambda: own.store.migrate()  # noqa: E731 - `own.store` makes the folder: not before somebody asks for it
        return failed(name, f"there is no store at {shown} yet", f"{START_IT}, which makes it", make)
    try:
        here, newest = _revisions(own)
    except (SQLAlchemyError, OSError) as error:
        return failed(name, f"{shown} does not answer: {_cause(error)}", "Start the database, or correct DATABASE_URL")
    if here == newest:
        return ok(name, f"{shown} is at the newest migration ({newest})")
    if here and here not in _known_revisions():
        sentence = f"{shown} was written by a newer hardfirst (migration {here}; this one knows {newest})"
        return failed(name, sentence, "Install that hardfirst again: an older one must not write there")
    at = f"at migration {here}" if here else "without our tables"
    return failed(name, f"{shown} is {at}; {newest} is the newest", f"{START_IT}, which migrates", own.store.migrate)


def _is_missing_file(url: str) -> bool:
    """To connect to SQLite's file would make it."""
    path = make_url(url).database if url.startswith("sqlite") else None
    return path is not None and not Path(path).exists()


def _revisions(own: Services) -> tuple[str, str]:
    """Where the store is ("" where it has none of our tables), and where it should be."""
    with own.store.write() as connection:  # for writing: a file that can only be read is no store
        connection.execute(text("select 1"))
        here = MigrationContext.configure(connection).get_current_revision()
    return here or "", _scripts().get_current_head() or ""


def _scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(store.__file__).parent / "migrations"))
    return ScriptDirectory.from_config(config)


def _known_revisions() -> set[str]:
    return {script.revision for script in _scripts().walk_revisions()}


def _cause(error: BaseException) -> str:
    return first_line(getattr(error, "orig", None) or error)


# --- workers, device, weights -----------------------------------------------------------------------------------------


def look_at_workers(own: Services, queue_name: str) -> Check:
    name = f"workers: {queue_name}"
    takers = [one for one in crew.workers(own.redis) if queue_name in one.queues]
    alive = [one for one in takers if one.seen_seconds is not None and one.seen_seconds <= crew.LOST_AFTER]
    waiting = queue.queue_lengths(own.redis).get(queue_name, 0)
    jobs = f"{waiting} job{'' if waiting == 1 else 's'} waiting"
    if alive:
        hosts = ", ".join(sorted({one.host for one in alive})[:5])
        return ok(name, f"{len(alive)} alive on {hosts}, {jobs}")
    gone = f"; {len(takers)} gave no sign of life for {crew.LOST_AFTER:.0f} s" if takers else ""
    fix = f"{START_IT}, or one for this queue: `hardfirst worker {queue_name}`"
    return failed(name, f"no worker takes `{queue_name}` ({jobs}{gone})", fix)


def look_at_device(own: Services) -> Check:
    """What torch sees here. Workers on other machines see theirs."""
    from worker.detector import device_words, pick_device

    name = "device"
    try:
        device = pick_device(own.settings.device)
    except HardfirstError as error:
        return failed(name, str(error), "Correct HARDFIRST_DEVICE, or leave it empty")
    return ok(name, device_words(device))


def look_for_weights(own: Services) -> Check:
    """Whether the file that is named is there; not what is in it, so that torch is not loaded."""
    named = own.settings.weights.strip()
    file = Path(named).expanduser()
    if file.name != named and "://" not in named and not file.is_file():  # a bare name may be one to download
        return failed("weights", f"HARDFIRST_WEIGHTS is {named!r}: there is no such file here", CORRECT_WEIGHTS)
    return ok("weights", named)


def look_at_weights(own: Services) -> Check:
    """What a project's first round starts from, where the project names no weights of its own. Downloads nothing."""
    from worker.detector import DEFAULT_WEIGHTS, load_ultralytics

    load_ultralytics()  # its own settings in a temporary folder: there may be no data folder, and none is to be made
    named, cache = own.settings.weights.strip(), own.settings.data_dir / "cache"
    if named and named != DEFAULT_WEIGHTS:
        return _named_weights(named, cache)
    for file in (Path(DEFAULT_WEIGHTS), cache / DEFAULT_WEIGHTS):
        if file.is_file():
            return _readable_weights(file)
    return _downloadable()


def _named_weights(named: str, cache: Path) -> Check:
    from worker.detector import PUT_IT_THERE, is_published_name, resolve_weights

    name = "weights"
    file = Path(named).expanduser()
    if not file.is_file() and file.name == named and file.suffix == ".pt" and is_published_name(named):
        cached = cache / named
        return _readable_weights(cached) if cached.is_file() else _downloadable(named)
    try:
        found = resolve_weights("", named, cache)
    except WeightsUnavailable as error:
        return failed(name, str(error).removesuffix(f" {PUT_IT_THERE}"), CORRECT_WEIGHTS)
    return _readable_weights(Path(found.path)) if found.pretrained else warning(name, found.note)


def _readable_weights(file: Path) -> Check:
    from worker.detector import load_model

    name = "weights"
    try:
        names = load_model(file).names
    except WeightsUnavailable as error:
        return failed(name, str(error), "Replace the file by a YOLO detector's, or delete it")
    return ok(name, f"{file} is a detector of {len(names)} classes")


def _downloadable(file_name: str = "") -> Check:
    from worker.detector import ASSETS_URL, DEFAULT_WEIGHTS, may_download

    name, file_name = "weights", file_name or DEFAULT_WEIGHTS
    fix = f"Put {file_name} on the workers and name it, with its folder, in HARDFIRST_WEIGHTS"
    without = "training starts from scratch" if file_name == DEFAULT_WEIGHTS else "rounds fail"
    if not may_download():
        return warning(name, f"{file_name} is not here and YOLO_OFFLINE forbids to download it: {without}", fix)
    url = f"{ASSETS_URL}/{file_name}"
    try:
        httpx.head(url, follow_redirects=True, timeout=httpx.Timeout(10, connect=5)).raise_for_status()
    except httpx.HTTPError as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        return warning(name, f"{file_name} is not here and cannot be downloaded ({why}): {without}", fix)
    return ok(name, f"{file_name} is not here yet; the first round downloads it from {httpx.URL(url).host}")


NEED_TORCH: dict[str, Callable[[Services], Check]] = {
    "device": lambda own: look_at_device(own),
    "weights": lambda own: look_at_weights(own),
}
