"""`hardfirst up`: Valkey, the web process and three workers as children of one process.

A child that ends is reported and started again; stopping ends workers, then web, then Valkey; nothing stays behind,
whoever is killed. Two on one data folder are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr

from worker.errors import Conflict, HardfirstError, QueueUnavailable, SettingsInvalid
from worker.processes import answers, die_with_parent, lock_folder, set_aside_damaged_aof, valkey_command
from worker.queue import CONTROL, PREDICT, SCORE, SUPERVISOR_PID, TRAIN
from worker.settings import Settings, variable_of

NAME_WIDTH = 9
LINE_LIMIT = 65_536  # a longer line is printed in pieces
LAST_LINES = 20
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
STEADY_SECONDS = 30.0  # a child that ran this long starts again at once
READY_TIMEOUT = 60.0  # Valkey answers in 0.1 s, later with a long file to load
SECOND_TERM_GRACE = 3.0  # a second TERM is RQ's "now"; it heeds one only a second after the first
WORKERS, WEB, VALKEY = 1, 2, 9  # stopped in this order, started in the reverse

Emit = Callable[[str], None]


@dataclass
class Child:
    """One process to keep running.

    Args:
        order: lower ones are stopped first; started last.
        grace: seconds between the first TERM and the second.
        die_signal: what it gets when this process is killed.
        env: added to the supervisor's own environment.
        ready: polled after the start; children of lower order wait until it is true.
        quiet: a line that has one of these is not printed.
        repair: called with its last output when it has ended; a sentence about what it mended, or None.
    """

    name: str
    argv: Sequence[str]
    order: int = WORKERS
    grace: float = 8.0
    die_signal: int = signal.SIGKILL
    pass_fds: tuple[int, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # tokens are in there
    ready: Callable[[], bool] | None = None
    quiet: tuple[str, ...] = ()
    repair: Callable[[str], str | None] | None = None
    process: asyncio.subprocess.Process | None = field(default=None, init=False, repr=False)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES), init=False, repr=False)


class Supervisor:
    """Keeps children running until a signal or stop().

    Args:
        emit: gets every line, of the children and of its own.
        secrets: texts that are printed as `***` should a child print them.
    """

    def __init__(self, children: Iterable[Child], *, emit: Emit | None = None, secrets: Iterable[str] = ()) -> None:
        self.children = list(children)
        self._emit = emit or _print
        self._secrets = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    def stop(self) -> None:
        """Ask it to end; a second call does not wait for what is running."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Start all, keep all running, end all.

        Raises:
            QueueUnavailable: a child that others wait for was not ready in a minute.
        """
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        keepers: list[asyncio.Task[None]] = []
        try:
            for child in sorted(self.children, key=lambda child: -child.order):
                if self._stopping.is_set():
                    break
                keepers.append(self._keeper(child))
                await self._until_ready(child)
            if on_ready and not self._stopping.is_set():
                on_ready()
            await self._stopping.wait()
        finally:
            self._stopping.set()
            await self._stop_all()
            await asyncio.gather(*keepers)
            for number in signals:
                loop.remove_signal_handler(number)

    def _keeper(self, child: Child) -> asyncio.Task[None]:
        task = asyncio.create_task(self._keep(child), name=f"keep {child.name}")
        # a bug in keeping one must end all, not leave that one silently down
        task.add_done_callback(lambda done: self._stopping.set())
        return task

    async def _keep(self, child: Child) -> None:
        delay = FIRST_DELAY
        while not self._stopping.is_set():
            began = time.monotonic()
            outcome = await self._run_once(child)
            if self._stopping.is_set():
                return
            mended = child.repair("\n".join(child.last_lines)) if child.repair else None
            if mended:
                self._say(f"{child.name}: {mended}")
            lasted = time.monotonic() - began
            delay = FIRST_DELAY if lasted > STEADY_SECONDS or mended else min(delay * 2, LONGEST_DELAY)
            self._say(f"{child.name} {outcome} after {lasted:.1f} s; starting it again in {delay:g} s")
            await _set_within(self._stopping, delay)

    async def _run_once(self, child: Child) -> str:
        """Start it and wait for its end; how it ended."""
        child.last_lines.clear()
        try:
            process = await self._spawn(child)
        except OSError as error:
            return f"could not be started ({error})"
        child.process = process
        assert process.stdout is not None
        pump = asyncio.create_task(self._pump(child, process.stdout))
        if self._stopping.is_set():  # it came up while the others were being stopped
            await self._stop(child)
        code = await process.wait()
        with contextlib.suppress(asyncio.TimeoutError):  # a grandchild may hold the pipe open
            await asyncio.wait_for(pump, 1)
        return f"exited with code {code}"

    async def _spawn(self, child: Child) -> asyncio.subprocess.Process:
        own_pid = os.getpid()
        return await asyncio.create_subprocess_exec(
            *child.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", SUPERVISOR_PID: str(own_pid), **child.env},
            pass_fds=child.pass_fds,
            start_new_session=True,  # Ctrl-C in the terminal reaches only us, and we stop them in order
            preexec_fn=lambda: die_with_parent(child.die_signal, own_pid),
        )

    async def _pump(self, child: Child, stream: asyncio.StreamReader) -> None:
        """Print its output line by line. Not readline(): that raises on a line above the stream's limit."""
        pending = b""
        while chunk := await stream.read(LINE_LIMIT):
            *lines, pending = (pending + chunk).split(b"\n")
            if len(pending) > LINE_LIMIT:
                lines.append(pending)
                pending = b""
            for line in lines:
                self._print_line(child, line)
        if pending:
            self._print_line(child, pending)

    def _print_line(self, child: Child, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        text = text.rsplit("\r", 1)[-1]  # of a progress bar its last state
        for secret in self._secrets:
            text = text.replace(secret, "***")
        child.last_lines.append(text)
        if any(words in text for words in child.quiet):
            return
        self._emit(f"{child.name:<{NAME_WIDTH}}| {text}")

    def _say(self, text: str) -> None:
        self._emit(f"{'up':<{NAME_WIDTH}}| {text}")

    async def _until_ready(self, child: Child) -> None:
        if child.ready is None:
            return
        deadline = time.monotonic() + READY_TIMEOUT
        while not self._stopping.is_set() and not await asyncio.to_thread(child.ready):
            if time.monotonic() > deadline:
                last = child.last_lines[-1] if child.last_lines else "it printed nothing"
                raise QueueUnavailable(f"{child.name} was not ready in {READY_TIMEOUT:.0f} s; its last line: {last}")
            await asyncio.sleep(0.03)

    async def _stop_all(self) -> None:
        for order in sorted({child.order for child in self.children}):
            await asyncio.gather(*(self._stop(child) for child in self.children if child.order == order))

    async def _stop(self, child: Child) -> None:
        process = child.process
        if process is None:
            return
        for seconds in (child.grace, SECOND_TERM_GRACE):
            if process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            if await self._ends_within(process, seconds):
                return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: its helpers go with it
        await process.wait()

    async def _ends_within(self, process: asyncio.subprocess.Process, seconds: float) -> bool:
        ended, hurry = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({ended, hurry}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, hurry):
            task.cancel()
        return process.returncode is not None


def up_children(
    settings: Settings, python: str = sys.executable, *, env: Mapping[str, str] | None = None
) -> tuple[list[Child], str]:
    """The children of `hardfirst up`, and the URL of their Redis. Takes the data folder for this process.

    With settings.redis_url there is no Valkey among them. Every child gets the settings as environment variables, so
    that what the command line changed holds for all.

    Args:
        env: more environment variables for all of them.

    Raises:
        Conflict: the data folder or the port is in use.
        HardfirstError: no Valkey on this machine, and no REDIS_URL.
    """
    folder = settings.data_dir.expanduser().resolve()
    descriptor = lock_folder(folder)  # open until this process ends, also where no Valkey inherits it
    try:
        _require_free_port(settings.host, settings.port)
    except HardfirstError:
        os.close(descriptor)
        raise
    children, redis_url = [], settings.redis_url
    if not redis_url:
        command = valkey_command(folder)
        redis_url = command.url
        children.append(
            Child(
                "valkey",
                command.argv,
                VALKEY,
                die_signal=signal.SIGTERM,  # so that it writes its file to the end
                pass_fds=(descriptor,),
                ready=lambda: answers(redis_url),
                # of a setting of the machine, for servers of many gigabytes: ours keeps kilobytes, made again when lost
                quiet=("Memory overcommit must be enabled",),
                repair=lambda last_output: set_aside_damaged_aof(folder, last_output),
            )
        )
    shared = {
        **settings_environment(settings),
        "REDIS_URL": redis_url,
        "HARDFIRST_DATA_DIR": str(folder),
        "PYTHONPATH": _python_path(env or os.environ),
        **{name: value for name, value in (env or {}).items() if name != "PYTHONPATH"},
    }
    web = [
        *(python, "-m", "uvicorn", "--factory", "backend.app:create_app_from_env"),
        *("--host", settings.host, "--port", str(settings.port)),
        *("--timeout-graceful-shutdown", "3", "--log-level", "warning"),  # 3 s: a page's event stream never ends itself
    ]
    children.append(Child("web", web, WEB, env=shared))
    for name, kind, queues in (
        ("train", "train", TRAIN),
        ("predict", "simple", PREDICT),  # alone: an annotator must not wait behind a shard
        ("control", "simple", f"{CONTROL},{SCORE}"),
    ):
        children.append(Child(name, [python, "-m", "worker.queue", kind, queues], WORKERS, env=shared))
    return children, redis_url


async def run(
    children: Iterable[Child],
    *,
    secrets: Iterable[str] = (),
    emit: Emit | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Run the children until SIGINT, SIGTERM or SIGHUP; on the main thread, whose death they do not survive.

    Args:
        secrets: texts never to print, see `secrets_of`.
        on_ready: called once, when all are started.
    """
    await Supervisor(children, emit=emit, secrets=secrets).run(on_ready)


def settings_environment(settings: Settings) -> dict[str, str]:
    """The settings as the environment variables that give them. Holds secrets."""
    variables = {}
    for name in Settings.model_fields:
        variables[variable_of(name)] = _as_text(getattr(settings, name))
    return variables


def _as_text(value: object) -> str:
    if value is None:  # as an unset variable reads: 'None' would be a folder of that name
        return ""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def secrets_of(settings: Settings) -> list[str]:
    """Every text in the settings that must not be printed: secrets, and the passwords inside URLs."""
    values = [getattr(settings, name) for name in Settings.model_fields]
    secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
    urls = (settings.redis_url, settings.database_url, settings.artifacts_url, settings.label_studio_url)
    return [secret for secret in (*secrets, *(urlsplit(url).password or "" for url in urls)) if secret]


def _require_free_port(host: str, port: int) -> None:
    """Say at once what uvicorn would say again and again, restarting."""
    if port == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise SettingsInvalid(f"HARDFIRST_HOST: {host!r} is not an address of this machine ({error})") from error
    except OSError as error:
        raise Conflict(
            f"{host}:{port} cannot be listened on ({error.strerror}). Stop what uses it, or set HARDFIRST_PORT."
        ) from error


def _python_path(env: Mapping[str, str]) -> str:
    """Ours first: from a clone, children find the packages whatever folder they start in."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(part for part in (root, env.get("PYTHONPATH", "")) if part)


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _print(line: str) -> None:
    print(line, flush=True)
