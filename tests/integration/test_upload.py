"""`hardfirst upload` into a real Label Studio: whatever stops it, every image becomes one task."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from backend import cli
from demo.label_studio_server import LabelStudioServer
from worker import upload as uploading
from worker.errors import LabelStudioUnavailable
from worker.label_studio import LabelStudio
from worker.services import Services
from worker.settings import Settings
from worker.upload import Outcome, Plan, Request, upload

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
Uploads = Callable[..., tuple[Plan, Outcome]]


def picture(number: int, size: int = 64) -> Image.Image:
    """Noise in blocks: no two numbers look alike."""
    blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST)


def save(path: Path, number: int, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        save(tmp_path / "pool" / f"day {number % 2}" / f"{number:02d}.png", number)
    return tmp_path / "pool"


@pytest.fixture
def settings(label_studio: LabelStudioServer, tmp_path: Path) -> Settings:
    values: dict[str, Any] = {
        "label_studio_url": label_studio.url,
        "label_studio_api_key": label_studio.token,
        "data_dir": tmp_path / "data",
    }
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> Uploads:
    def upload_with(*sources: Path | str, **changes: Any) -> tuple[Plan, Outcome]:
        own = Services(changes.pop("settings", settings), "worker")
        options = {"new": None if "project_id" in changes else f"u {tmp_path.name}"[:50], "out": tmp_path / "out"}
        if options["new"] and "label_config" not in changes:
            options["classes"] = ("bolt", "nut")
        return upload(Request(tuple(map(str, sources)), **{**options, **changes}), own)

    return upload_with


@pytest.fixture
def api(label_studio: LabelStudioServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Token {label_studio.token}"}
    with httpx.Client(base_url=label_studio.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


def tasks_of(api: httpx.Client, project_id: int | None) -> list[dict[str, Any]]:
    params = {"project": project_id, "include": "id,data,meta", "page_size": 500}
    return list(api.get("/api/tasks", params=params).raise_for_status().json()["tasks"])


def served(api: httpx.Client, task: dict[str, Any]) -> bytes:
    return api.get(task["data"]["image"], follow_redirects=True).raise_for_status().content


def contents(folder: Path) -> list[str]:
    return sorted(sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png"))


def assert_once_each(api: httpx.Client, project_id: int | None, folder: Path) -> None:
    """Every file of the folder is what one task shows, byte by byte, and says so."""
    found = tasks_of(api, project_id)
    assert sorted(task["meta"]["hardfirst"]["sha256"] for task in found) == contents(folder)
    for task in found:
        assert sha256(served(api, task)).hexdigest() == task["meta"]["hardfirst"]["sha256"]


# --- what becomes a task ----------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_project_and_again_nothing(run: Uploads, folder: Path, api: httpx.Client) -> None:
    rehearsal, nothing = run(folder, dry_run=True)
    assert (len(rehearsal.new), nothing.made, nothing.project_id) == (10, 0, None)
    plan, outcome = run(folder)
    assert (plan.fresh, len(plan.new), outcome.made, outcome.problems) == (0, 10, 10, {})  # read in the rehearsal
    assert_once_each(api, outcome.project_id, folder)
    names = [task["meta"]["hardfirst"]["name"] for task in tasks_of(api, outcome.project_id)]
    assert sorted(names) == sorted(f"day {number % 2}/{number:02d}.png" for number in range(10))
    config = api.get(f"/api/projects/{outcome.project_id}/").json()["label_config"]
    assert re.findall(r'Label value="(\w+)"', config) == ["bolt", "nut"]
    plan, again = run(folder)
    assert (len(plan.there), plan.new, again.project_id, again.made) == (10, [], outcome.project_id, 0)
    assert any("is there already: going on in it" in note for note in plan.notes)
    assert len(tasks_of(api, outcome.project_id)) == 10


def test_no_image_twice_across_folders_names_and_people(
    run: Uploads, folder: Path, api: httpx.Client, tmp_path: Path
) -> None:
    _, outcome = run(folder)
    project_id = outcome.project_id
    by_hand = save(tmp_path / "browser" / "räder (1).png", 50)
    files = {"f": (by_hand.name, by_hand.read_bytes(), "image/png")}
    assert api.post(f"/api/projects/{project_id}/import", files=files).status_code == 201
    other = tmp_path / "other"
    save(other / "new.png", 60)
    (other / "copy.png").write_bytes((folder / "day 1" / "03.png").read_bytes())
    (other / "renamed.png").write_bytes(by_hand.read_bytes())
    (other / "twin a.png").write_bytes((other / "new.png").read_bytes())
    plan, outcome = run(other, project_id=project_id, out=tmp_path / "out2")
    assert {plan.name(at) for at in plan.there} == {"copy.png", "renamed.png"}
    assert {plan.name(at): plan.name(first) for at, first in plan.twice.items()} == {"twin a.png": "new.png"}
    assert (outcome.made, len(tasks_of(api, project_id))) == (1, 12)
    report = json.loads((tmp_path / "out2" / "upload.json").read_text())
    assert report["counts"]["there_already"] == 2
    assert report["twice"] == [{"image": "twin a.png", "same_as": "new.png"}]


def test_what_cannot_be_used_is_left_out_with_its_reason(run: Uploads, folder: Path, api: httpx.Client) -> None:
    (folder / "cut.png").write_bytes((folder / "day 0" / "00.png").read_bytes()[:100])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_bytes(b"<!doctype html><title>log in</title>")
    (folder / "gone.png").symlink_to("nowhere.png")
    Image.new("RGB", (9, 40)).save(folder / "narrow.png")
    plan, outcome = run(folder)
    problems = uploading.problems_of(plan, outcome)
    assert set(problems) == {"cut.png", "empty.jpg", "page.jpg", "gone.png", "narrow.png"}
    assert "damaged or cut short" in problems["cut.png"]
    assert "web page" in problems["page.jpg"]
    assert problems["gone.png"] == "there is no such file"
    assert "9 x 40 pixels" in problems["narrow.png"]
    assert outcome.made == len(tasks_of(api, outcome.project_id)) == 10
    (folder / "gone.png").unlink()
    save(folder / "gone.png", 77)
    plan, outcome = run(folder)  # what was away is looked for again, what is no image is not
    assert (outcome.made, plan.fresh, len(uploading.problems_of(plan, outcome))) == (1, 1, 4)


def test_near_duplicates_are_reported_and_uploaded(run: Uploads, folder: Path, tmp_path: Path) -> None:
    brighter = Image.fromarray(np.clip(np.asarray(picture(4), np.int16) + 3, 0, 255).astype(np.uint8))
    brighter.save(folder / "04 again.png")
    plan, outcome = run(folder)
    assert outcome.made == 11
    assert [[plan.name(at) for at in group] for group in plan.near] == [["04 again.png", "day 0/04.png"]]
    listed = (tmp_path / "out" / "near_duplicates.txt").read_text().splitlines()
    assert listed == [str(folder / "04 again.png"), str(folder / "day 0" / "04.png")]


def test_files_that_browsers_do_not_show_become_png(run: Uploads, api: httpx.Client, tmp_path: Path) -> None:
    deep = (np.arange(40 * 30) * 50).astype(np.uint16).reshape(30, 40)
    (tmp_path / "pool").mkdir()
    Image.fromarray(deep).save(tmp_path / "pool" / "scan.tiff")
    picture(1).save(tmp_path / "pool" / "named.jpg", "TIFF")
    _, outcome = run(tmp_path / "pool")
    assert outcome.made == 2
    by_name = {task["meta"]["hardfirst"]["name"]: served(api, task) for task in tasks_of(api, outcome.project_id)}
    scan = Image.open(io.BytesIO(by_name["scan.tiff"]))
    assert (scan.format, scan.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(scan)[..., 0], deep >> 8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(by_name["named.jpg"]))), np.asarray(picture(1)))
    assert run(tmp_path / "pool")[1].made == 0


# --- whatever stops it ------------------------------------------------------------------------------------------------


def start(folder: Path, out: Path, title: str, label_studio: LabelStudioServer) -> subprocess.Popen[str]:
    """The command as a user starts it, in small groups so that there is something to interrupt."""
    program = (
        "import sys; from backend import cli; from worker import upload; upload.FILES_AT_ONCE = 3; "
        "sys.argv = ['hardfirst', *sys.argv[1:]]; cli.main()"
    )
    arguments = ["upload", str(folder), "--new", title, "--classes", "bolt", "--out", str(out)]
    environment = {
        **os.environ,
        "LABEL_STUDIO_URL": label_studio.url,
        "LABEL_STUDIO_API_KEY": label_studio.token,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_at_any_moment_and_run_again(label_studio: LabelStudioServer, api: httpx.Client, tmp_path: Path) -> None:
    folder, title = tmp_path / "pool", f"k {tmp_path.name}"[:50]
    for number in range(60):
        save(folder / f"{number:02d}.png", number)

    def found() -> list[dict[str, Any]]:
        projects = api.get("/api/projects/", params={"title": title}).json()["results"]
        return tasks_of(api, projects[0]["id"]) if projects else []

    for more, number in ((1, signal.SIGKILL), (7, signal.SIGKILL), (7, signal.SIGTERM), (7, signal.SIGKILL)):
        wanted = len(found()) + more  # of this run: one that has made none does not heed a signal yet
        process = start(folder, tmp_path / "out", title, label_studio)
        deadline = time.monotonic() + 120
        while len(found()) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        told, _ = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert (process.returncode, "the same command goes on from there" in told) == (130, True), told
    last = start(folder, tmp_path / "out", title, label_studio)
    told, _ = last.communicate(timeout=180)
    assert last.returncode == 0, told
    projects = api.get("/api/projects/", params={"title": title}).json()["results"]
    assert len(projects) == 1
    assert len(found()) == 60
    assert_once_each(api, projects[0]["id"], folder)


def test_files_without_tasks_of_a_killed_run_are_taken(
    run: Uploads, folder: Path, api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "FILES_AT_ONCE", 4)
    real, calls = LabelStudio.import_tasks, Counter[str]()

    def killed_in_between(self: LabelStudio, project_id: int, new: Any) -> None:
        calls["imports"] += 1
        if calls["imports"] == 2:
            raise KeyboardInterrupt
        real(self, project_id, new)

    monkeypatch.setattr(LabelStudio, "import_tasks", killed_in_between)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    plan, outcome = run(folder)
    assert (len(plan.there), len(plan.found), outcome.made) == (4, 4, 6)
    assert_once_each(api, outcome.project_id, folder)
    uploads = api.get(f"/api/projects/{outcome.project_id}/file-uploads", params={"all": "true"}).json()
    assert len(uploads) == 10  # nothing was sent twice


def test_an_answer_that_is_lost_makes_no_image_twice(
    run: Uploads, folder: Path, api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "FILES_AT_ONCE", 4)
    monkeypatch.setattr(uploading, "FIRST_WAIT", 0.01)
    real, lost = LabelStudio.import_tasks, [True, True]

    def answer_lost(self: LabelStudio, project_id: int, new: Any) -> None:
        real(self, project_id, new)
        if lost and lost.pop():
            raise LabelStudioUnavailable("the line was cut")

    monkeypatch.setattr(LabelStudio, "import_tasks", answer_lost)
    _, outcome = run(folder)
    assert (outcome.made, outcome.notes) == (10, [])
    assert_once_each(api, outcome.project_id, folder)


def test_a_label_studio_that_is_away_is_waited_for(
    run: Uploads, folder: Path, api: httpx.Client, settings: Settings, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "FILES_AT_ONCE", 2)
    monkeypatch.setattr(uploading, "FIRST_WAIT", 0.05)
    real, calls = LabelStudio.upload_files, Counter[str]()

    def cut_the_line(self: LabelStudio, project_id: int, files: Any) -> list[str]:
        calls["uploads"] += 1
        if calls["uploads"] == 3:
            line.cut()
        if calls["uploads"] == 4:
            pytest.fail("it was mended before this")
        return real(self, project_id, files)

    real_wait = uploading._Patience.wait

    def mended_meanwhile(self: Any, error: LabelStudioUnavailable) -> None:
        calls["waits"] += 1
        if calls["waits"] == 3:
            line.mend()
            monkeypatch.setattr(LabelStudio, "upload_files", real)
        real_wait(self, error)

    monkeypatch.setattr(LabelStudio, "upload_files", cut_the_line)
    monkeypatch.setattr(uploading._Patience, "wait", mended_meanwhile)
    _, outcome = run(folder, settings=settings.model_copy(update={"label_studio_url": line.url}))
    assert (outcome.made, calls["waits"] >= 3) == (10, True)
    assert_once_each(api, outcome.project_id, folder)


def test_patience_ends_with_what_to_do(
    run: Uploads, folder: Path, settings: Settings, line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "PATIENCE", 0.2)
    monkeypatch.setattr(uploading, "FIRST_WAIT", 0.05)
    real = LabelStudio.upload_files

    def cut_the_line(self: LabelStudio, project_id: int, files: Any) -> list[str]:
        line.cut()
        return real(self, project_id, files)

    monkeypatch.setattr(LabelStudio, "upload_files", cut_the_line)
    with pytest.raises(LabelStudioUnavailable, match="the same command goes on from there"):
        run(folder, settings=settings.model_copy(update={"label_studio_url": line.url}))


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(
    label_studio: LabelStudioServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", label_studio.token)
    (folder / "empty.jpg").touch()
    title = f"c {tmp_path.name}"[:50]
    arguments = ["upload", str(folder), "--new", title, "--classes", "bolt, nut"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "10 of 11 images became tasks of project" in done.output
    assert "1 cannot be used and was left out:\n  empty.jpg: the image is empty (0 bytes)." in done.output
    assert "/settings/ml -> Connect Model" in done.output
    again = CliRunner().invoke(cli.app, arguments)
    assert "0 of 11 images became tasks" in again.output
    assert "10 are in the project already." in again.output
    other = CliRunner().invoke(cli.app, ["upload", str(folder), "--new", title, "--classes", "bolt,washer"])
    assert other.exit_code == 2
    assert "with other labels" in other.output
    nowhere = CliRunner().invoke(cli.app, ["upload", str(folder), "--project", "999999"])
    assert nowhere.exit_code == 2
    assert "Label Studio has no project 999999" in nowhere.output


# --- images that stay where they are ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, label_studio: LabelStudioServer) -> Iterator[LabelStudioServer]:
    """A second Label Studio, which serves files of a folder."""
    root = tmp_path_factory.mktemp("served")
    with LabelStudioServer(tmp_path_factory.mktemp("label-studio-local"), local_files_root=root) as server:
        yield server


def test_local_files_are_named_and_not_copied(
    serving: LabelStudioServer, settings: Settings, run: Uploads, tmp_path: Path
) -> None:
    root = serving.local_files_root
    assert root is not None
    for number in range(4):
        save(root / "pool" / f"a b%{number}ä.png", number)
    here = settings.model_copy(update={"label_studio_url": serving.url})
    headers = {"Authorization": f"Token {serving.token}"}
    with httpx.Client(base_url=serving.url, headers=headers, timeout=60, trust_env=False) as api:
        with pytest.raises(uploading.BadRequest, match="Add Source Storage -> Local files"):
            run(root / "pool", settings=here, local_files_root=root)
        (project,) = api.get("/api/projects/").json()["results"]
        assert tasks_of(api, project["id"]) == []
        body = {"project": project["id"], "title": "pool", "path": str(root / "pool"), "use_blob_urls": True}
        storage = api.post("/api/storages/localfiles", json=body).raise_for_status().json()
        _, outcome = run(root / "pool", settings=here, local_files_root=root)
        assert (outcome.project_id, outcome.made) == (project["id"], 4)
        assert_once_each(api, project["id"], root / "pool")
        assert api.get(f"/api/projects/{project['id']}/file-uploads", params={"all": "true"}).json() == []
        # read straight where the folder is mounted: Label Studio is not there at all
        away = here.model_copy(update={"label_studio_url": "http://127.0.0.1:1", "local_files_root": root})
        images = Services(away, "worker").images
        found = [images.fetch(task["data"], "image", task["id"]) for task in tasks_of(api, project["id"])]
        assert sorted(sha256(one).hexdigest() for one in found) == contents(root / "pool")
        # what Label Studio's own sync made is known by its address
        fresh = api.post("/api/projects/", json={"title": "synced", "label_config": project["label_config"]}).json()
        storage = api.post("/api/storages/localfiles", json={**body, "project": fresh["id"]}).raise_for_status().json()
        api.post(f"/api/storages/localfiles/{storage['id']}/sync").raise_for_status()
        assert len(tasks_of(api, fresh["id"])) == 4
        plan, outcome = run(root / "pool", settings=here, local_files_root=root, project_id=fresh["id"])
        assert (len(plan.there), outcome.made, len(tasks_of(api, fresh["id"]))) == (4, 0, 4)


def test_s3_stays_in_its_bucket(
    s3_server: str, run: Uploads, api: httpx.Client, settings: Settings, tmp_path: Path
) -> None:
    filesystem = fsspec.filesystem("s3")
    for number in range(3):
        content = save(tmp_path / "local" / f"{number}.png", number).read_bytes()
        filesystem.pipe_file(f"pool/day 1/{number}+ä.png", content)
    plan, outcome = run("s3://pool/day 1")
    project_id = outcome.project_id
    assert outcome.made == 3
    assert any("no storage for s3://pool" in note for note in plan.notes)
    found = tasks_of(api, project_id)
    assert sorted(task["data"]["image"] for task in found) == [f"s3://pool/day 1/{number}+ä.png" for number in range(3)]
    body = {
        "project": project_id,
        "title": "pool",
        "bucket": "pool",
        "s3_endpoint": s3_server,
        "region_name": "us-east-1",
        "aws_access_key_id": "testing",
        "aws_secret_access_key": "testing",
        "presign": True,
        "use_blob_urls": True,
    }
    api.post("/api/storages/s3", json=body).raise_for_status()
    # through Label Studio's presign, on to the bucket's host; and straight, with our own credentials
    through = settings.model_copy(update={"image_hosts": s3_server.removeprefix("http://")})
    straight = settings.model_copy(
        update={"label_studio_url": "http://127.0.0.1:1", "image_buckets": "s3://pool/day 1"}
    )
    for own in (Services(through, "worker"), Services(straight, "worker")):
        fetched = [own.images.fetch(task["data"], "image", task["id"]) for task in found]
        assert sorted(sha256(one).hexdigest() for one in fetched) == contents(tmp_path / "local")
    plan, outcome = run("s3://pool/day 1")
    assert (len(plan.there), outcome.made) == (3, 0)
    plan, outcome = run(tmp_path / "local", "s3://pool/day 1", new="copied " + tmp_path.name, copy=True)
    assert (outcome.made, len(plan.twice)) == (3, 3)
    assert_once_each(api, outcome.project_id, tmp_path / "local")
