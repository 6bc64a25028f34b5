"""The admin page in a real browser: it lives without reloading, works by keyboard, and hostile names do nothing."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
import uvicorn
from PIL import Image
from sqlalchemy import insert, update

from backend.app import create_app
from worker import queue
from worker.artifacts import Artifacts
from worker.settings import Settings
from worker.store import Store, projects, rounds, scores, task_annotations, tasks

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
playwright_api.expect.set_options(timeout=60_000)  # the machine may be busy, and a page asks every few seconds

HOSTILE = """<script>window.hacked=1</script><b>"it's"</b><img src=x onerror="window.hacked=2">"""
LABELS = ("bolt", "nut", "<b>gear</b>")
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="bolt"/><Label value="nut"/><Label value="&lt;b&gt;gear&lt;/b&gt;"/></RectangleLabels></View>'
)
pytestmark = pytest.mark.slow  # a minute of waiting for a browser
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class Uploads(BaseHTTPRequestHandler):
    """Stands in for Label Studio: the same picture for every task."""

    def do_GET(self) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (640, 480), (90, 120, 150)).save(picture, "JPEG")
        body = picture.getvalue() if self.path.startswith("/data/upload/") else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@dataclass
class Site:
    """A running backend with one project (7): two measured rounds and a published batch of 70."""

    url: str
    store: Store
    redis: redis.Redis
    server: uvicorn.Server
    round_id: int
    complaints: list[str] = field(default_factory=list)

    def set_open_round(self, number: int, state: str) -> int:
        row = {"project_id": 7, "number": number, "state": state, "opened_at": time.time()}
        with self.store.write() as connection:
            return int(connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one())


@pytest.fixture
def site(tmp_path: Path, redis_url: str) -> Iterator[Site]:
    images = ThreadingHTTPServer(("127.0.0.1", 0), Uploads)
    threading.Thread(target=images.serve_forever, args=(0.02,), daemon=True).start()
    settings = Settings(
        label_studio_url=f"http://127.0.0.1:{images.server_port}",
        label_studio_api_key="0" * 40,
        redis_url=redis_url,
        data_dir=tmp_path,
    )
    store = Store(settings.store_url)
    store.migrate()
    round_id = fill(store)
    manifest = {"strategy": "hybrid", "options": {"alpha": 0.7}, "notes": [HOSTILE]}
    artifacts = Artifacts(settings.artifacts_root, tmp_path / "cache")
    artifacts.put("p7/r000002/manifest.json", json.dumps(manifest).encode())
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    with redis.Redis.from_url(redis_url) as connection:
        yield Site(f"http://127.0.0.1:{port}", store, connection, server, round_id)
    server.should_exit = True
    thread.join(10)
    images.shutdown()
    images.server_close()
    store.close()


def fill(store: Store) -> int:
    sides = {"x": 10, "y": 20, "width": 30, "height": 40}
    regions = [
        {"original_width": 640, "original_height": 480, "score": 0.9, "value": {**sides, "rectanglelabels": [name]}}
        for name in LABELS
    ]
    per_class = {name: {"ap50": 0.5 + index / 10, "boxes": 4} for index, name in enumerate(LABELS)}
    advice = {"verdict": "stop", "reasons": [HOSTILE], "stats": {}}
    with store.write() as connection:
        row = {"id": 7, "title": HOSTILE, "label_config": CONFIG, "extra_params": "{}", "connected_at": 1.0}
        connection.execute(insert(projects).values(**row))
        for number, map50 in ((0, None), (1, 0.4), (2, 0.5)):
            values = {"number": number, "state": "done", "opened_at": 1.0, "closed_at": 61.0, "map50": map50}
            values |= {"labels": number * 50, "batch_size": 70, "verdict": json.dumps(advice) if map50 else "{}"}
            values |= {"per_class": json.dumps(per_class) if map50 else "{}"}
            made = insert(rounds).values(project_id=7, **values).returning(rounds.c.id)
            round_id = int(connection.execute(made).scalar_one())
        for task_id in range(1, 101):
            task = {"task_id": task_id, "image": f"/data/upload/7/{task_id}.jpg", "holdout": task_id == 2}
            connection.execute(insert(tasks).values(project_id=7, deleted=False, **task))
            score = {"task_id": task_id, "rank": task_id - 1 if task_id <= 70 else None, "regions": json.dumps(regions)}
            parts = {"utility": 0.9, "uncertainty": 0.8, "diversity": 0.7}
            connection.execute(insert(scores).values(round_id=round_id, shard=0, **score, **parts))
        connection.execute(update(projects).values(published_round_id=round_id, published_version="al-000002"))
    return round_id


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=120_000)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    """A laptop's window. What the browser complains about (the content policy, errors in scripts) fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    opened.on("console", lambda said: site.complaints.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: site.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: dialog.accept())
    yield opened
    context.close()
    assert site.complaints == []


def wait_for_text(page: Any, selector: str, text: str) -> None:
    playwright_api.expect(page.locator(selector)).to_have_text(text)


def test_it_follows_a_round_without_reloading(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    wait_for_text(page, "#now-words", "idle")
    page.evaluate("window.sameDocument = true")
    round_id = site.set_open_round(3, "training")
    queue.set_progress(site.redis, 7, phase="training", round=3, epoch=1, epochs=4, losses={}, eta_seconds=240)
    wait_for_text(page, "#now-words", "training epoch 2/4")
    assert page.evaluate("document.getElementById('bar').value") == 0.25
    wait_for_text(page, "#now-eta", "about 4 min left")
    assert page.locator("#stages [aria-current=step]").inner_text() == "Train"
    points = "#curve .scatterlayer .points path"
    assert page.locator(points).count() == 2
    with site.store.write() as connection:
        done = {"state": "done", "closed_at": time.time(), "labels": 150, "map50": 0.61, "batch_size": 9}
        connection.execute(update(rounds).where(rounds.c.id == round_id).values(**done))
    wait_for_text(page, "#now-words", "idle")
    playwright_api.expect(page.locator(points)).to_have_count(3)
    assert page.locator("#rounds tbody tr").first.inner_text().split()[:3] == ["3", "done", "150"]
    assert page.locator("#tiles dd").first.inner_text() == "0.610"
    assert page.evaluate("window.sameDocument") is True


def test_a_new_label_is_ticked(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    assert page.locator(".task.labelled").count() == 0
    with site.store.write() as connection:
        row = {"project_id": 7, "annotation_id": 1, "task_id": 3}
        connection.execute(insert(task_annotations).values(**row))
    playwright_api.expect(page.locator(".task.labelled")).to_have_attribute("data-task", "3")
    wait_for_text(page, "#batch-sub", "1 of 70 labelled")
    wait_for_text(page, "#next-sentence", "69 more labels open round 3.")


def test_start_and_cancel_by_keyboard(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.act") == "start":
            break
    page.keyboard.press("Enter")
    wait_for_text(page, "#now-words", "waiting for a worker")
    assert queue.queue_lengths(site.redis)["train"] == 1
    playwright_api.expect(page.locator("[data-act=start]")).to_be_hidden()
    page.locator("[data-act=cancel]").click()
    wait_for_text(page, "#now-detail", "Round 3 was cancelled.")
    assert queue.queue_lengths(site.redis)["train"] == 0


def test_a_refusal_is_told(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    site.set_open_round(3, "scoring")  # by somebody else, this moment
    page.evaluate("document.querySelector('[data-act=start]').click()")
    wait_for_text(page, "#said", "round 3 of project 7 is scoring; wait for it, or cancel it")
    site.complaints[:] = [said for said in site.complaints if "409" not in said]


def test_accept_the_stop_and_withdraw(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    page.get_by_role("button", name="Accept the stop").click()
    wait_for_text(page, "#now-words", "stopped")
    page.get_by_role("button", name="Withdraw the stop").click()
    wait_for_text(page, "#now-words", "idle")
    playwright_api.expect(page.get_by_role("button", name="Accept the stop")).to_be_visible()


def test_hostile_names_are_seen_as_they_are(page: Any, site: Site) -> None:
    for path in ("/", "/projects/7"):
        page.goto(f"{site.url}{path}")
        page.wait_for_timeout(2500)  # one poll: what is fetched again is put in place by script
        assert page.evaluate("window.hacked") is None
        assert page.locator("h1, h2").filter(has_text=HOSTILE).count() == 1
    assert page.locator("#classes .class-tile h3").all_text_contents() == ["bolt", "nut", "<b>gear</b>"]
    assert page.locator('[data-task="1"] .boxes text').all_text_contents() == list(LABELS)
    assert page.locator("#selection-notes li").all_text_contents() == ["Strategy: hybrid (alpha 0.7).", HOSTILE]


def test_boxes_lie_on_the_picture(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    page.wait_for_selector("#selection-notes li")  # it comes later, and moves what is below
    picture = page.locator('[data-task="1"] img')
    picture.scroll_into_view_if_needed()
    picture.evaluate("image => image.decode()")  # loaded only now, as it came into view
    assert picture.evaluate("image => image.naturalWidth") == 320
    frame = picture.bounding_box()
    box = page.locator('[data-task="1"] .boxes rect').first.bounding_box()
    assert box["x"] - frame["x"] == pytest.approx(0.1 * frame["width"], abs=2)
    assert box["y"] - frame["y"] == pytest.approx(0.2 * frame["height"], abs=2)
    assert box["width"] == pytest.approx(0.3 * frame["width"], abs=3)
    assert box["height"] == pytest.approx(0.4 * frame["height"], abs=3)
    assert page.locator('[data-task="2"] .boxes').count() == 0
    assert "holdout: no boxes drawn" in page.locator('[data-task="2"]').inner_text()


def test_show_more(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    assert page.locator(".task").count() == 60
    page.get_by_role("button", name="Show 10 more").click()
    playwright_api.expect(page.locator(".task")).to_have_count(70)
    playwright_api.expect(page.locator("#batch-more button")).to_have_count(0)


def test_a_slow_answer_does_not_take_back_what_a_later_one_showed(page: Any, site: Site) -> None:
    held: list[Any] = []
    page.route("**/projects/7?shown=60", lambda route: held.append(route))
    page.goto(f"{site.url}/projects/7")
    site.set_open_round(3, "scoring")  # the page is fetched again
    wait_for_text(page, "#now-words", "scoring 0")
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Show 10 more").click()
    playwright_api.expect(page.locator(".task")).to_have_count(70)
    assert len(held) == 1
    with page.expect_response("**/projects/7?shown=60"):
        held[0].continue_()
    page.wait_for_timeout(500)
    assert page.locator(".task").count() == 70


def test_nothing_is_loaded_from_elsewhere(page: Any, site: Site) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for path in ("/", "/projects/7"):
        page.goto(f"{site.url}{path}")
        page.wait_for_timeout(500)
    assert any("plotly.js" in url for url in asked)
    assert [url for url in asked if not url.startswith(site.url)] == []


@pytest.mark.parametrize("path", ["/", "/projects/7"])
def test_a_phone_scrolls_in_one_direction(page: Any, site: Site, path: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{site.url}{path}")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_it_says_that_the_backend_is_gone(page: Any, site: Site) -> None:
    page.goto(f"{site.url}/projects/7")
    announced = page.locator("#banners-announce")
    playwright_api.expect(announced).to_have_text("")
    site.server.should_exit = True
    playwright_api.expect(page.locator(".banner.bad")).to_contain_text("The backend does not answer")
    playwright_api.expect(announced).to_contain_text("The backend does not answer")  # a screen reader says it
    # refused, or reset: by a backend that ended between taking a connection and reading from it
    site.complaints[:] = [said for said in site.complaints if "net::ERR_" not in said]
