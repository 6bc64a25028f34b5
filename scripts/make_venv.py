"""Make the virtual environment of a lock file, once, outside the clone; print its interpreter's path.

Standard library only: this is what runs before anything is installed. One folder per content of the lock and version of
Python, so clones share it and a changed lock gets a fresh one. It counts only with the stamp that is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = {  # name on the command line: lock file, prefix of the folder, what to expect
    "ours": ("requirements.lock", "venv", "about 3 minutes and 7 GB with torch"),
    "label-studio": ("requirements-label-studio.lock", "ls-venv", "about 1 minute and 1 GB"),
}
STAMP = "hardfirst-complete"
LOG_TAIL_LINES = 25


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    if given := os.environ.get("HARDFIRST_CACHE"):
        return Path(given).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "hardfirst"


def environment_key(lock: bytes) -> str:
    """First 16 hex of SHA-256 over the lock and what decides which wheels fit it."""
    interpreter = f"{platform.python_version()} {sys.platform} {platform.machine()}"
    return hashlib.sha256(lock + interpreter.encode()).hexdigest()[:16]


def is_complete(venv: Path) -> bool:
    """Whether the install reached its end, and the interpreter it was made from is still there."""
    return (venv / STAMP).is_file() and os.access(venv / "bin" / "python", os.X_OK)


@contextlib.contextmanager
def held(path: Path, venv: Path) -> Iterator[int]:
    """Hold the lock file: two `make` at once must not install into one folder. Yields its descriptor."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another set-up of {venv}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def run_logged(argv: list[str], log_path: Path, lock_descriptor: int) -> None:
    """Run, output to the log; on failure print the log's end and exit.

    The child shares the lock: killed alone, this process leaves a pip that goes on writing.
    """
    with log_path.open("ab") as log:
        log.write(f"$ {' '.join(argv)}\n".encode())
        log.flush()
        code = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock_descriptor,)
        ).returncode
    if code != 0:
        say("\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]))
        say(f"Set-up failed (exit code {code}). The lines above end the log: {log_path}")
        if "ensurepip" in log_path.read_text(errors="replace"):
            say("This Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv")
        sys.exit(1)


def install(venv: Path, lock_path: Path, expectation: str, lock_descriptor: int) -> None:
    log_path = venv.with_name(f"{venv.name}.log")
    log_path.unlink(missing_ok=True)
    if venv.exists():
        say(f"{venv} was left half-made; starting again")
        shutil.rmtree(venv)
    n_packages = sum(1 for line in lock_path.read_text().splitlines() if "==" in line)
    say(f"installing {n_packages} packages into {venv}, {expectation}, log: {log_path}")
    began = time.monotonic()
    run_logged([sys.executable, "-m", "venv", str(venv)], log_path, lock_descriptor)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # --no-deps: the lock is the whole list, and says no to pins of 2020 that label-studio-ml would insist on
    run_logged([*pip, "install", "--no-deps", "-r", str(lock_path)], log_path, lock_descriptor)
    (venv / STAMP).write_text("installed to the end\n")
    say(f"installed in {time.monotonic() - began:.0f} s")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in ENVIRONMENTS:
        say(f"usage: scripts/setup.sh {'|'.join(ENVIRONMENTS)}")
        return 2
    lock_name, prefix, expectation = ENVIRONMENTS[sys.argv[1]]
    lock_path, cache = ROOT / lock_name, cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    venv = cache / f"{prefix}-{environment_key(lock_path.read_bytes())}"
    if not is_complete(venv):
        with held(cache / f"{venv.name}.lock", venv) as lock_descriptor:
            if not is_complete(venv):  # the one we waited for may have finished it
                install(venv, lock_path, expectation, lock_descriptor)
    print(venv / "bin" / "python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
