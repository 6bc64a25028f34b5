"""How fast the admin page answers at 80,000 tasks and 12 rounds: every view, every address of its JSON API.

Real uvicorn, real HTTP, SQLite, Valkey. Project 1 is at rest with 13 rounds of scores; project 2 is as large and half
through scoring one more. Beside each median stands the server's own computing time: on a machine that others use it
says what the clock cannot. Whatever GET the OpenAPI document names for a project is asked, apart from downloads.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import redis

from benchmarks._serving import backend, processor_seconds
from demo import history
from worker import queue
from worker.processes import running_valkey

TASKS, ROUNDS = 80_000, 12
REQUIRED_MS = 300.0
DOWNLOADS = re.compile(r"\.(zip|pt|jpg)$|/jobs/|/v1/")
ENDS = (".html",)  # a report draws its thumbnails: made on request, not part of the page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.page", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the requests")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(arguments)
    repeats = 8 if given.quick else 40
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hardfirst-page-")))
        redis_url = stack.enter_context(running_valkey(folder / "valkey"))
        label_studio_url = stack.enter_context(history.pictures())
        began = time.perf_counter()
        _fill(folder, given.tasks, given.rounds)
        print(f"two projects of {given.tasks:,} tasks and {given.rounds} rounds in {time.perf_counter() - began:.0f} s")
        with redis.Redis.from_url(redis_url) as connection:  # as the workers do
            half = {"phase": "scoring", "round": given.rounds + 1, "done": given.tasks // 2, "total": given.tasks}
            queue.set_progress(connection, 2, ttl=3600, **half)
        client, pid = stack.enter_context(backend(folder, redis_url, label_studio_url, timeout=60))
        found = _measure(client, pid, given.rounds, repeats)
    _print(found)
    slowest = max(found, key=lambda name: found[name]["median"])
    met = found[slowest]["median"] < REQUIRED_MS
    print(f"slowest median: {slowest}, {found[slowest]['median']:.0f} ms; required under {REQUIRED_MS:.0f}: {met}")
    if given.json:
        print(json.dumps({"milliseconds": found, "slowest": slowest, "met": met, "tasks": given.tasks}))


def _fill(folder: Path, tasks: int, rounds: int) -> None:
    store, artifacts = history.open_folder(folder)
    history.fill(store, artifacts, tasks=tasks, rounds=rounds, project_id=1)
    history.fill(store, artifacts, tasks=tasks, rounds=rounds, project_id=2, last="scoring", earlier_scores=False)
    store.close()


def _measure(client: httpx.Client, pid: int, rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    pages = ["/health", "/", "/api/projects", "/projects/1", "/projects/1?shown=200", "/projects/2"]
    pages += ["/api/projects/2/status", *_addresses(client, rounds)]
    return {path: _times(client, pid, path, repeats) for path in dict.fromkeys(pages)}


def _addresses(client: httpx.Client, rounds: int) -> list[str]:
    """Every GET of a project that the OpenAPI document names, for project 1 and its newest round."""
    found = []
    for path, methods in client.get("/api/openapi.json").json()["paths"].items():
        if "get" not in methods or "{project_id}" not in path or DOWNLOADS.search(path) or path.endswith(ENDS):
            continue
        filled = path.replace("{project_id}", "1").replace("{number}", str(rounds))
        if "{" not in filled:
            found.append(filled)
    return found


def _times(client: httpx.Client, pid: int, path: str, repeats: int) -> dict[str, float]:
    """Milliseconds, after two requests that nobody counts."""
    for _ in range(2):
        client.get(path).raise_for_status()
    measured, computed = [], _computed(pid)
    for _ in range(repeats):
        began = time.perf_counter()
        response = client.get(path)
        measured.append(1000 * (time.perf_counter() - began))
        response.raise_for_status()
    cpu = 1000 * (_computed(pid) - computed) / repeats
    p95 = statistics.quantiles(measured, n=20, method="inclusive")[-1]
    size = round(len(response.content) / 1e3)
    return {"median": round(statistics.median(measured), 1), "p95": round(p95, 1), "cpu": round(cpu, 1), "kB": size}


def _computed(pid: int) -> float:
    """Seconds a process has computed, user and system; 0 where /proc does not say."""
    try:
        return processor_seconds(pid)
    except OSError:
        return 0.0


def _print(found: dict[str, dict[str, float]]) -> None:
    print(f"{'milliseconds':52}{'median':>9}{'p95':>9}{'computed':>10}{'kB':>8}")
    for path, times in sorted(found.items(), key=lambda one: -one[1]["median"]):
        print(f"{path:52}{times['median']:9.1f}{times['p95']:9.1f}{times['cpu']:10.1f}{times['kB']:8.0f}")


if __name__ == "__main__":
    main()
