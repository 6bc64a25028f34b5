"""`hardfirst score` writes what a real Label Studio imports, opens and serves in the order of the ranking."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from demo.factory import CLASSES, render
from demo.label_studio_server import LabelStudioServer
from worker import offline
from worker.image_sources import ImageReader
from worker.offline_results import write_results
from worker.settings import Settings

K = 4


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "served" / "pool"
    folder.mkdir(parents=True)
    for index in range(8):
        render(3, index, (128, 96))[0].save(folder / f"a b {index}.jpg", quality=90)
    return folder


@pytest.fixture
def api(tmp_path: Path, label_studio: LabelStudioServer) -> Iterator[httpx.Client]:
    """A Label Studio that may serve files of the folder above the images."""
    assert label_studio  # skips where there is none
    with (
        LabelStudioServer(tmp_path / "label-studio", local_files_root=tmp_path / "served") as server,
        httpx.Client(
            base_url=server.url, headers={"Authorization": f"Token {server.token}"}, timeout=60, trust_env=False
        ) as client,
    ):
        yield client


def ok(answer: httpx.Response) -> httpx.Response:
    assert answer.status_code < 400, f"{answer.request.url}: {answer.status_code} {answer.text}"
    return answer


def test_the_import_is_served_with_its_boxes_in_the_order_of_the_ranking(
    api: httpx.Client, images: Path, tmp_path: Path, write_weights: Callable[[Path, int, tuple[str, ...]], Path]
) -> None:
    request = offline.Request(
        sources=(str(images),),
        weights=(write_weights(tmp_path / "current.pt", 1, CLASSES),),
        k=K,
        imgsz=96,
        out=tmp_path / "ranked",
        local_files_root=tmp_path / "served",
    )
    ranking = offline.rank(request, Settings(_env_file=None))  # type: ignore[call-arg]
    write_results(ranking, ImageReader())
    tasks = json.loads((request.out / "label_studio.json").read_text())
    assert len(tasks) == K
    assert sum(len(task["predictions"][0]["result"]) for task in tasks) > 0

    config = (request.out / "label_config.xml").read_text()
    made = ok(api.post("/api/projects", json={"title": "ranked", "label_config": config})).json()["id"]
    path = str(images.resolve())
    storage = {"project": made, "path": path, "use_blob_urls": True, "regex_filter": ".*jpg", "title": "pool"}
    ok(api.post("/api/storages/localfiles", json=storage))
    ok(api.post(f"/api/projects/{made}/import", json=tasks[::-1]))  # the order in the file is not what counts
    version = tasks[0]["predictions"][0]["model_version"]
    sampling = {"sampling": "Uncertainty sampling", "model_version": version, "show_collab_predictions": True}
    ok(api.patch(f"/api/projects/{made}", json=sampling))

    for expected in tasks:
        task = ok(api.get(f"/api/projects/{made}/next")).json()
        assert task["data"] == expected["data"]
        result = [one["value"] for one in task["predictions"][0]["result"]]
        assert result == [one["value"] for one in expected["predictions"][0]["result"]]
        assert ok(api.get(task["data"]["image"])).content == (images / Path(_name(task)).name).read_bytes()
        ok(api.post(f"/api/tasks/{task['id']}/annotations", json={"result": []}))


def _name(task: dict[str, dict[str, str]]) -> str:
    return str(httpx.URL(task["data"]["image"]).params["d"])
