from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert, update

from backend import report
from backend.app import create_app
from demo import history
from worker.errors import NotFound
from worker.services import Services
from worker.settings import Settings
from worker.store import projects, rounds

HOSTILE = "<script>window.pwned=1</script>\"'&"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Services]:
    with history.pictures() as url:
        services = Services(Settings(label_studio_url=url, label_studio_api_key="0" * 40, data_dir=tmp_path), "web")
        services.store.migrate()
        yield services
        services.store.close()


def fill(own: Services, **values: object) -> None:
    history.fill(own.store, own.artifacts, tasks=400, rounds=3, now=1_790_000_000.0, **values)  # type: ignore[arg-type]


def test_everything_is_in_one_file(own: Services) -> None:
    fill(own)
    html = report.render_report(own, 1, thumbnails=5)
    assert html.count('src="data:image/jpeg;base64,') == 5
    assert html.count('class="spot"') == 3 * 4  # against labels, boxes and minutes, and the rare class
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"|url\(|@import|<script', html) == []
    for heading in (
        "Verdict",
        "Learning curve",
        "Rounds",
        "AP50 by class",
        "Rare classes: micro_crack<",
        "What each batch held",
        "Current batch",
        "Settings",
    ):
        assert f"<h2>{heading}" in html
    assert '<th>batch_size</th><td class="value">20</td><td class="muted">the project</td>' in html


def test_names_are_escaped(own: Services) -> None:
    fill(own, title=HOSTILE, class_names=(HOSTILE, "nut"))
    with own.store.write() as connection:
        connection.execute(update(rounds).values(error=HOSTILE))
    html = report.render_report(own, 1, thumbnails=1)
    assert "<script" not in html
    assert html.count("&lt;script&gt;window.pwned=1&lt;/script&gt;&#34;&#39;&amp;") >= 4


def test_a_project_without_rounds(own: Services) -> None:
    with own.store.write() as connection:
        connection.execute(insert(projects).values(id=3, title="New", connected_at=1.0))
    html = report.render_report(own, 3)
    assert "nothing measured yet" in html
    assert 'What each batch held</h2>\n<p class="muted">None is labelled yet.' in html
    assert "No batch is published yet." in html
    with pytest.raises(NotFound, match="project 4 is not connected"):
        report.render_report(own, 4)


def test_without_label_studio_there_are_no_pictures_but_a_report(own: Services, tmp_path: Path) -> None:
    fill(own)
    alone = Services(own.settings.model_copy(update={"label_studio_url": "http://127.0.0.1:9"}), "web")
    html = report.render_report(alone, 1, thumbnails=2)
    assert html.count("no picture") == 2
    assert "data:image" not in html


def test_it_is_downloaded_under_its_own_policy(own: Services) -> None:
    fill(own)
    client = TestClient(create_app(own.settings))
    answer = client.get("/api/projects/1/report.html")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="hardfirst-p1.html"'
    assert answer.headers["content-security-policy"] == report.POLICY
    assert client.get("/api/projects/9/report.html").status_code == 404


def test_a_full_disk_costs_the_pictures_and_not_the_report(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    fill(own)
    monkeypatch.setattr(report, "make_thumbnail", no_room)
    html = report.render_report(own, 1, thumbnails=2)
    assert html.count('<span class="muted">no picture</span>') == 2


def test_reports_at_once_draw_no_more_pictures_than_one(own: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def slow(*_args: object) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        raise OSError("no picture")

    fill(own)
    monkeypatch.setattr(report, "make_thumbnail", slow)
    readers = [threading.Thread(target=report.render_report, args=(own, 1, 8)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert 1 < most[0] <= report.AT_ONCE
