"""How fast the backend answers Label Studio, alone and while every core computes.

Label Studio gives /health 1 s, /setup 3 s and /webhook 1 s, and an annotator waits for each of them. Beside each median
stands that of /health on the idle machine: the price of one request through the same server that does nothing. The
project has 80,000 tasks, 8,000 of them labelled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks._serving import backend
from demo.oracle import label_config
from worker import rounds
from worker.processes import running_valkey
from worker.settings import ProjectSettings
from worker.store import Store, insert_or_ignore, projects, scores
from worker.store import rounds as round_rows

PROJECT, TASKS, LABELLED = 1, 80_000, 8_000
CONFIG = label_config(["bolt", "nut"])
BURN = "while True: sum(range(100000))"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.answers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    given = parser.parse_args(arguments)
    repeats = 20 if given.quick else 200
    with tempfile.TemporaryDirectory() as folder, running_valkey(Path(folder) / "valkey") as redis_url:
        _fill(Store(f"sqlite:///{folder}/hardfirst.db"))
        with backend(Path(folder), redis_url) as (client, _):
            idle = _measure(client, repeats)
            with _busy():
                busy = _measure(client, repeats)
    unit = idle["/health"]["median"]
    print(f"{'':24}{'idle':>28}{'every core busy':>30}")
    print(f"{'request':24}{'median':>10}{'p95':>9}{'ratio':>9}{'median':>12}{'p95':>9}{'ratio':>9}   milliseconds")
    for name in idle:
        cells = [f"{idle[name]['median']:10.1f}{idle[name]['p95']:9.1f}{idle[name]['median'] / unit:9.1f}"]
        cells += [f"{busy[name]['median']:12.1f}{busy[name]['p95']:9.1f}{busy[name]['median'] / unit:9.1f}"]
        print(f"{name:24}{''.join(cells)}")
    if given.json:
        print(json.dumps({"idle": idle, "busy": busy}))


def _fill(store: Store) -> None:
    store.migrate()
    with store.write() as connection:
        rounds.connect_project(connection, PROJECT, CONFIG, ProjectSettings(), "http://127.0.0.1")
        rounds.remember_tasks(connection, PROJECT, {number: f"/data/upload/1/{number}.jpg" for number in range(TASKS)})
        drawn = [{"id": number + 1, "task": number, "result": []} for number in range(TASKS - LABELLED, TASKS)]
        rounds.remember_annotations(connection, PROJECT, drawn)
        connection.execute(round_rows.update().values(state="done", batch_size=TASKS, model_version="al-000000"))
        connection.execute(projects.update().values(published_version="al-000000", published_round_id=1))
        region = {"type": "rectanglelabels", "value": {"x": 1, "y": 1, "width": 9, "height": 9}}
        row = {"round_id": 1, "shard": 0, "regions": json.dumps([region] * 5), "published_score": 0.5}
        insert_or_ignore(connection, scores, [{**row, "task_id": number} for number in range(TASKS)])
    store.close()


@contextmanager
def _busy() -> Iterator[None]:
    burners = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _measure(client: httpx.Client, repeats: int) -> dict[str, dict[str, float]]:
    return {name: _times(send, repeats) for name, send in _requests(client).items()}


def _requests(client: httpx.Client) -> dict[str, Callable[[int], httpx.Response]]:
    project = f"{PROJECT}.1"
    setup = {"project": project, "schema": CONFIG, "extra_params": None}

    def webhook(number: int) -> httpx.Response:
        stamp = f"{time.time_ns()}"
        annotation: dict[str, Any] = {"id": number + 1, "task": number, "result": [], "updated_at": stamp}
        body = {"action": "ANNOTATION_CREATED", "project": {"id": PROJECT}, "annotation": annotation}
        return client.post("/webhook", json=body)

    def predict(number: int, count: int) -> httpx.Response:
        chosen = [{"id": (number + step) % TASKS, "data": {}} for step in range(count)]
        return client.post("/predict", json={"project": project, "tasks": chosen})

    return {
        "/health": lambda _: client.get("/health"),
        "/setup": lambda _: client.post("/setup", json=setup),
        "/webhook": webhook,
        "/predict, 1 stored": lambda number: predict(number, 1),
        "/predict, 500 stored": lambda number: predict(number, 500),
    }


def _times(send: Callable[[int], httpx.Response], repeats: int) -> dict[str, float]:
    """Milliseconds, after three requests that nobody counts."""
    measured = []
    for number in range(-3, repeats):
        began = time.perf_counter()
        send(max(number, 0)).raise_for_status()
        if number >= 0:
            measured.append(1000 * (time.perf_counter() - began))
    return {"median": round(statistics.median(measured), 2), "p95": round(statistics.quantiles(measured, n=20)[-1], 2)}


if __name__ == "__main__":
    main()
