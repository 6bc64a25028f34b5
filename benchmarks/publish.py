"""What publishing a round costs in the real Label Studio: in bulk, one by one, and the purge of the old version.

A round writes 10,000 predictions of 5 boxes through `worker.label_studio.LabelStudio`, the class the product uses,
while the version before it is served; that one goes afterwards, in a job of its own that nobody waits for. One by one
is a sample of 50 over POST /api/predictions/, on the same connection.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks._serving import processor_seconds
from demo.label_studio_server import LabelStudioServer
from demo.oracle import label_config
from worker.label_studio import LabelStudio, model_version, prediction, published_score

TASKS, QUICK_TASKS, BOXES = 10_000, 2_000, 5
ALONE, QUICK_ALONE = 50, 20
CLASSES = ["bolt", "nut"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.publish", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 predictions, a sample of 20")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    given = parser.parse_args(arguments)
    count, alone = (QUICK_TASKS, QUICK_ALONE) if given.quick else (TASKS, ALONE)
    with tempfile.TemporaryDirectory() as folder, LabelStudioServer(Path(folder)) as server:
        found = _measure(server, count, alone)
    print(f"{count:,} predictions of {BOXES} boxes in one version: {found['bulk_per_s']:,.0f} a second")
    print(f"the same per second of Label Studio's own processor time: {found['bulk_per_processor_s']:,.0f}")
    print(f"one by one, of {alone}: {found['one_by_one_per_s']:,.1f} a second")
    print(f"switch to the new version: {found['switch_s']:.2f} s")
    print(f"purge of the old version, {count:,} predictions, after the switch: {found['purge_s']:.1f} s")
    if given.json:
        print(json.dumps(found))


def _measure(server: LabelStudioServer, count: int, alone: int) -> dict[str, float]:
    label_studio = LabelStudio(server.url, server.token)
    headers = {"Authorization": f"Token {server.token}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=900, trust_env=False) as api:
        project_id, task_ids = _project(api, label_studio, count)
        old, new, one_by_one = model_version(1), [model_version(number) for number in (2, 3, 4)], model_version(5)
        _bulk(label_studio, project_id, task_ids, old)
        label_studio.publish_version(project_id, old)
        sample = list(_predictions(task_ids[:alone], one_by_one))
        alone_seconds = _seconds(lambda: _one_by_one(api, sample))
        label_studio.delete_version(project_id, one_by_one)
        before = processor_seconds(server.pid)
        bulk = [_seconds(partial(_bulk, label_studio, project_id, task_ids, version)) for version in new]
        its_own = processor_seconds(server.pid) - before
        switch_seconds = _seconds(lambda: label_studio.publish_version(project_id, new[-1]))
        purge_seconds = _seconds(lambda: label_studio.delete_version(project_id, old))
        left = label_studio.versions(project_id)
    label_studio.close()
    if left != dict.fromkeys(new, count):
        raise RuntimeError(f"Label Studio holds {left}, not {count} predictions of {new}: these figures mean nothing")
    return {
        "bulk_per_s": round(count / statistics.median(bulk), 1),
        "bulk_per_processor_s": round(len(new) * count / its_own, 1),
        "one_by_one_per_s": round(alone / alone_seconds, 1),
        "purge_s": round(purge_seconds, 2),
        "switch_s": round(switch_seconds, 2),
    }


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _bulk(label_studio: LabelStudio, project_id: int, task_ids: Sequence[int], version: str) -> None:
    label_studio.import_predictions(project_id, _predictions(task_ids, version))


def _project(api: httpx.Client, label_studio: LabelStudio, count: int) -> tuple[int, list[int]]:
    """A project with that many tasks, whose images nobody looks at; its id and theirs."""
    made = api.post("/api/projects/", json={"title": "publish", "label_config": label_config(CLASSES)})
    project_id = int(made.raise_for_status().json()["id"])
    for start in range(0, count, 1000):
        rows = [{"image": f"/data/upload/{project_id}/{number}.jpg"} for number in range(start, start + 1000)]
        api.post(f"/api/projects/{project_id}/import", json=rows).raise_for_status()
    task_ids = sorted(int(task["id"]) for page in label_studio.tasks(project_id) for task in page)
    if len(task_ids) != count:
        raise RuntimeError(f"Label Studio has {len(task_ids)} tasks, not the {count} it was sent")
    return project_id, task_ids


def _predictions(task_ids: Sequence[int], version: str) -> Any:
    """As `worker.publishing` makes them: from the regions in the store, one by one."""
    for rank, task_id in enumerate(task_ids):
        regions = json.dumps([_region(box, rank) for box in range(BOXES)])
        score = published_score(rank if rank < 200 else None, 1 - rank / len(task_ids), 200)
        yield prediction(task_id, regions, score, version, holdout=False)


def _region(box: int, rank: int) -> dict[str, Any]:
    place = {"x": 2 + 18 * box, "y": 5 + rank % 70, "width": 15, "height": 20, "rotation": 0}
    return {
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 640,
        "original_height": 480,
        "image_rotation": 0,
        "score": 0.5,
        "value": {**place, "rectanglelabels": [CLASSES[box % 2]]},
    }


def _one_by_one(api: httpx.Client, sample: Sequence[dict[str, Any]]) -> None:
    for one in sample:
        api.post("/api/predictions/", json=one).raise_for_status()


if __name__ == "__main__":
    main()
