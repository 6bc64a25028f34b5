from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import insert

from backend import cli, report, report_command
from backend.report import Report
from demo import history
from worker.errors import BadRequest, Conflict, HardfirstError, NotFound
from worker.settings import Settings
from worker.store import projects

AWAY = "http://127.0.0.1:9"  # nothing answers there


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a folder with projects 1 and 2; the working directory is another."""
    folder, here = tmp_path / "data", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    store, artifacts = history.open_folder(folder)
    history.fill(store, artifacts, tasks=400, rounds=3, now=1_790_000_000.0)
    with store.write() as connection:
        connection.execute(insert(projects).values(id=2, title="New", connected_at=1.0))
    store.close()
    return Settings(data_dir=folder, label_studio_url=AWAY)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_project_here(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    report_command.run(settings, [], None)
    assert capsys.readouterr().out.splitlines() == ["hardfirst-p1.html", "hardfirst-p2.html"]
    assert names(Path()) == ["hardfirst-p1.html", "hardfirst-p1.json", "hardfirst-p2.html", "hardfirst-p2.json"]
    told = json.loads(Path("hardfirst-p1.json").read_text())
    assert [one["number"] for one in told["runs"][0]["rounds"]] == [1, 2, 3]
    page = Path("hardfirst-p1.html").read_text()
    assert page.count("no picture") == 20  # Label Studio is away
    assert page.count('class="spot"') == 12


def test_pictures_that_are_kept_need_no_label_studio(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "THUMBNAIL_SECONDS", 120.0)  # the machine may be busy
    with history.pictures() as url:
        report_command.run(
            settings.model_copy(update={"label_studio_url": url, "label_studio_api_key": SecretStr("0" * 40)}),
            [1],
            None,
        )
    assert Path("hardfirst-p1.html").read_text().count("data:image/jpeg") == 20
    report_command.run(settings, [1], None)
    assert Path("hardfirst-p1.html").read_text().count("data:image/jpeg") == 20


def test_where_to(settings: Settings) -> None:
    report_command.run(settings, [1, 1], Path("new/folder"))
    assert names(Path("new/folder")) == ["hardfirst-p1.html", "hardfirst-p1.json"]
    report_command.run(settings, [2], Path("new/mine.html"))
    assert names(Path("new")) == ["folder", "mine.html", "mine.json"]
    with pytest.raises(BadRequest, match=r"--out is one file, all.html, for projects 1, 2"):
        report_command.run(settings, [], Path("all.html"))


def test_nothing_is_written_where_one_project_is_unknown(settings: Settings) -> None:
    with pytest.raises(NotFound, match="project 9 is not connected"):
        report_command.run(settings, [1, 9], None)
    assert names(Path()) == []


def test_where_nothing_can_be_written(settings: Settings) -> None:
    Path("file").touch()
    with pytest.raises(BadRequest, match=r"cannot be written: .* Name another place with --out"):
        report_command.run(settings, [1], Path("file"))
    Path("out/hardfirst-p1.json").mkdir(parents=True)
    with pytest.raises(BadRequest, match=r"hardfirst-p1.json cannot be written: a folder of that name is in the way"):
        report_command.run(settings, [1], Path("out"))
    assert names(Path("out")) == ["hardfirst-p1.json"]  # no page without its numbers


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "p.html"
    files = report_command._files(page, Report("<p>", {"runs": []}))
    report_command.write_all(files)
    assert (page.read_text(), (tmp_path / "p.json").read_text()) == ("<p>", '{\n "runs": []\n}')
    assert page.stat().st_mode & 0o777 == 0o644

    def no_room(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(BadRequest, match="No space left on device"):
        report_command.write_all({page: b"new", tmp_path / "q.html": b"new"})
    assert names(tmp_path) == ["p.html", "p.json"]
    assert page.read_text() == "<p>"


def test_stores_that_are_none(settings: Settings, tmp_path: Path) -> None:
    empty = Settings(data_dir=tmp_path / "nowhere", label_studio_url=AWAY)
    with pytest.raises(Conflict, match=r"there is no store at .*nowhere.*Start `hardfirst up`"):
        report_command.run(empty, [], None)
    assert not (tmp_path / "nowhere").exists()
    with sqlite3.connect(tmp_path / "data" / "hardfirst.db") as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    with pytest.raises(Conflict, match=r"written by a newer hardfirst .migration 9999"):
        report_command.run(settings, [], None)
    with sqlite3.connect(tmp_path / "data" / "hardfirst.db") as connection:
        connection.execute("update alembic_version set version_num = '0001'")
    with pytest.raises(Conflict, match=r"at migration 0001; .* is the newest. Start `hardfirst up`, which migrates"):
        report_command.run(settings, [], None)


def test_a_store_without_projects(tmp_path: Path) -> None:
    store, _ = history.open_folder(tmp_path)
    store.close()
    with pytest.raises(HardfirstError, match=r"no project is connected in sqlite.*--data"):
        report_command.run(Settings(data_dir=tmp_path, label_studio_url=AWAY), [], None)


def test_the_command(settings: Settings, tmp_path: Path) -> None:
    """As a process: it ends by itself, and loads no torch."""
    code = (
        "import sys; from backend import cli\n"
        f"sys.argv = ['hardfirst', 'report', '--project', '1', '--out', 'r.html', '--data', '{settings.data_dir}']\n"
        "try: cli.main()\nfinally: print('torch' in sys.modules)"
    )
    environment = {**os.environ, "LABEL_STUDIO_URL": AWAY, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.stdout.splitlines(), done.returncode) == (["r.html", "False"], 0), done.stderr
    assert names(Path()) == ["r.html", "r.json"]
