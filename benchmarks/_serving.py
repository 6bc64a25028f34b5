"""The backend as benchmarks meet it: under uvicorn, on a free port, over real HTTP; and what its process computes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from worker.processes import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
NOBODY = "http://127.0.0.1:9"  # for requests that need no Label Studio


@contextmanager
def backend(
    folder: Path, redis_url: str, label_studio_url: str = NOBODY, timeout: float = 30.0
) -> Iterator[tuple[httpx.Client, int]]:
    """A client of the backend over the store in `folder`, and the backend's process id.

    Raises:
        TimeoutError: it did not answer within 30 s.
    """
    port = 39_000 + os.getpid() % 10_000
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HARDFIRST_DATA_DIR": str(folder),
        "REDIS_URL": redis_url,
        "LABEL_STUDIO_URL": label_studio_url,
        "LABEL_STUDIO_API_KEY": "0" * 40,
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "backend.app:create_app_from_env", "--port", str(port)]
    parent = os.getpid()
    server = subprocess.Popen(
        [*command, "--log-level", "error"], env=environment, cwd=folder, preexec_fn=lambda: die_with_parent(9, parent)
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=timeout, trust_env=False) as client:
            _wait(client)
            yield client, server.pid
    finally:
        server.terminate()
        server.wait(15)


def _wait(client: httpx.Client) -> None:
    for _ in range(300):
        try:
            client.get("/health")
            return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise TimeoutError("the backend did not start within 30 s")


def processor_seconds(pid: int | None) -> float:
    """What a process has computed so far, user and system, as Linux counts it.

    Raises:
        OSError: no such process, or no /proc.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
