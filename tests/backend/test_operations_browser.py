"""The operating half of the page in a real browser: forms, previews, buttons; by keyboard, on a laptop and a phone."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import uvicorn
from PIL import Image
from sqlalchemy import insert, select, update

from backend import suspects_view
from backend.app import create_app
from worker.artifacts import Artifacts, round_key
from worker.preview import make_preview
from worker.services import Services
from worker.settings import Settings
from worker.store import Store, events, projects, record_event, rounds, scores, steps, task_annotations, tasks

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
playwright_api.expect.set_options(timeout=60_000)  # the machine may be busy, and a page asks every few seconds
pytestmark = pytest.mark.slow  # a browser takes its time

HOSTILE = """<img src=x onerror="window.hacked=1">'\u202enut"""
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="bolt"/>'
    '<Label value="&lt;img src=x onerror=&quot;window.hacked=1&quot;&gt;\'\u202enut"/></RectangleLabels></View>'
)
TOO_WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll("body *")]
  .filter((one) => one.getBoundingClientRect().right > innerWidth)
  .map((one) => one.outerHTML.slice(0, 90))"""
STAYS_MS = 4500  # two polls, and a refresh
LAPTOP = pytest.mark.parametrize("page", [1280], indirect=True)
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class StandIn(BaseHTTPRequestHandler):
    """Label Studio: one picture for every task, and it takes every setting."""

    def do_GET(self) -> None:
        body = json.dumps([{"id": 3, "url": "http://backend:9090", "project": 7, "extra_params": {}}]).encode()
        if self.path.startswith("/data/upload/"):
            picture = io.BytesIO()
            Image.new("RGB", (64, 48), (90, 120, 150)).save(picture, "JPEG")
            body = picture.getvalue()
        self.answer(body)

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"{}")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


def fill(store: Store, artifacts: Artifacts) -> None:
    """Project 7, after round 1: tasks 1..4 labelled, 5..8 in the batch, 9..20 in the pool; names are hostile."""
    value = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": [HOSTILE]}
    regions = json.dumps([{"original_width": 64, "original_height": 48, "score": 0.5, "value": value}])
    with store.write() as connection:
        project = {"title": HOSTILE, "label_config": CONFIG, "connected_at": 1.0, "backend_url": "http://backend:9090"}
        connection.execute(insert(projects).values(id=7, **project))
        every = {"project_id": 7, "deleted": False, "holdout": False, "seen_round_id": 1}
        images = [{**every, "task_id": i, "image": f"/data/upload/7/{i}.jpg"} for i in range(1, 21)]
        connection.execute(insert(tasks), images)
        labels = [{"project_id": 7, "annotation_id": i, "task_id": i, "cancelled": False} for i in range(1, 5)]
        connection.execute(insert(task_annotations), labels)
        row = {"project_id": 7, "number": 1, "state": "done", "opened_at": 1.0, "closed_at": 2.0, "weights": "w"}
        row |= {"weights_sha256": "0" * 64, "report": json.dumps({"boxes_per_class": {"bolt": 9, HOSTILE: 1}})}
        round_id = connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one()
        measures = {"utility": 0.9, "uncertainty": 0.8, "diversity": 0.9, "margin": 0.5, "entropy": 0.5}
        every = {"round_id": round_id, "shard": 0, "regions": regions, **measures}
        found = [
            {**every, "task_id": i, "row": i - 1, "least_confidence": i / 20, "rank": i - 5 if 5 <= i <= 8 else None}
            for i in range(1, 21)
        ]
        connection.execute(insert(scores), found)
        connection.execute(update(projects).values(published_round_id=round_id, published_version="al-000001"))
    embeddings = io.BytesIO()
    np.save(embeddings, np.eye(20, 32, dtype=np.float32))
    artifacts.put("p7/r000001/embeddings-00000.npy", embeddings.getvalue())
    shown = [{"rank": i - 5, "task_id": i, "utility": 0.9, "alike": 1, "alike_task_ids": [9]} for i in range(5, 9)]
    manifest = {"strategy": "hybrid", "options": {"measure": "entropy"}, "notes": [HOSTILE], "tasks": shown}
    manifest |= {"classes": {HOSTILE: 4}}
    artifacts.put("p7/r000001/manifest.json", json.dumps(manifest).encode())
    suspect = {"task_id": 1, "kind": "class", "labelled": "bolt", "seen": HOSTILE, "suspicion": 0.9}
    suspect |= {"box_percent": [10, 10, 20, 20], "annotation_id": 1, "width": 64, "height": 48, "holdout": False}
    counts = {"missing": 0, "class": 1, "extra": 0}
    content = {"made_at": 1.0, "images": 4, "counts": counts, "suspects": [{**suspect, "updated_at": ""}]}
    artifacts.put("p7/r000001/suspects.json", json.dumps(content).encode())


@pytest.fixture
def site(tmp_path: Path, redis_url: str) -> Iterator[tuple[str, Store]]:
    """A running backend, its store, and somebody who makes the previews that are asked for."""
    stand_in = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=stand_in.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{stand_in.server_port}"
    settings = Settings(
        _env_file=None, label_studio_url=url, label_studio_api_key="0" * 40, redis_url=redis_url, data_dir=tmp_path
    )
    store = Store(settings.store_url)
    store.migrate()
    fill(store, Artifacts(settings.artifacts_root, tmp_path / "cache"))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    over = threading.Event()
    maker = threading.Thread(target=make_previews, args=(settings, over), daemon=True)
    maker.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", store
    over.set()
    server.should_exit = True
    thread.join(10)
    maker.join(10)
    stand_in.shutdown()
    stand_in.server_close()
    store.close()


def make_previews(settings: Settings, over: threading.Event) -> None:
    own = Services(settings, "worker")
    with redis.Redis.from_url(settings.redis_url) as connection:
        while not over.wait(0.1):
            for key in connection.keys("hf:preview:7:*"):
                found = json.loads(connection.get(key) or b"{}")
                if found.get("state") == "waiting":
                    make_preview(own, 7, key.decode().rsplit(":", 1)[-1])
    own.store.close()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=120_000)
        yield started
        started.close()


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, browser: Any, site: tuple[str, Store]) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    opened.set_default_timeout(60_000)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda told: complaints.append(told.text) if "Content Security" in told.text else None)
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(f"{site[0]}/projects/7")
    yield opened
    assert opened.evaluate("window.hacked") is None
    assert opened.evaluate(TOO_WIDE) == [], "the page scrolls sideways"
    assert complaints == []
    opened.unroute_all(behavior="ignoreErrors")  # one may be in the middle of an answer
    opened.close()


def press_on(page: Any, selector: str, key: str = "Enter") -> None:
    """As somebody without a mouse: the element takes the focus, and the key."""
    page.locator(selector).first.focus()
    page.keyboard.press(key)


def test_pause_and_resume_by_keyboard(page: Any, site: tuple[str, Store]) -> None:
    press_on(page, "[data-act=pause]")
    page.wait_for_selector("[data-act=resume]:not([hidden])")
    assert page.locator("#now-words").inner_text().lower() == "paused"
    assert page.locator("[data-act=start]").is_hidden()
    playwright_api.expect(page.locator("[data-act=resume]")).to_be_focused()  # what was pressed is hidden
    press_on(page, "[data-act=resume]", "Space")
    page.wait_for_selector("[data-act=start]:not([hidden])")
    with site[1].read() as connection:
        kinds = connection.execute(select(events.c.kind).order_by(events.c.id)).scalars().all()
    assert list(kinds) == ["paused", "resumed"]


def test_a_failed_step_appears_and_is_tried_again(page: Any, site: tuple[str, Store]) -> None:
    with site[1].write() as connection:
        row = {"project_id": 7, "number": 2, "state": "failed", "opened_at": 5.0, "closed_at": 6.0, "error": HOSTILE}
        round_id = connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one()
        step = {"round_id": round_id, "kind": "train", "state": "failed", "attempt": 3, "error": HOSTILE}
        connection.execute(insert(steps).values(**step))
    page.wait_for_selector("#work .failures [data-act=retry-round]", timeout=60_000)
    assert HOSTILE in page.locator("#work .failures").inner_text()
    press_on(page, "#work .failures [data-act=retry-round]")
    page.wait_for_selector("[data-act=cancel]:not([hidden])")
    with site[1].read() as connection:
        assert connection.execute(select(rounds.c.state).where(rounds.c.id == round_id)).scalar_one() == "training"


def test_settings_say_what_is_wrong_and_are_saved(page: Any, site: tuple[str, Store]) -> None:
    press_on(page, "#settings summary")
    page.locator("#set-batch_size").fill("none")
    press_on(page, "#set-batch_size")
    page.wait_for_selector("#set-batch_size[aria-invalid]")
    assert "valid integer" in page.locator("#set-batch_size-wrong").inner_text()
    assert page.evaluate("document.activeElement.id") == "set-batch_size"
    page.locator("#set-batch_size").fill("3")
    page.locator("#set-strategy").select_option("k_center")
    assert page.locator("#settings [data-options-of=k_center]").is_visible()
    assert page.locator("#settings [data-options-of=hybrid]").is_hidden()
    press_on(page, "#settings-form [type=submit]")
    page.wait_for_selector("#settings-said:has-text('Saved')")
    page.wait_for_timeout(STAYS_MS)
    assert "Saved" in page.locator("#settings-said").inner_text()
    with site[1].read() as connection:
        stored = json.loads(connection.execute(select(projects.c.extra_params)).scalar_one())
    assert stored == {"batch_size": 3, "strategy": "k_center", "strategy_options": {}}
    assert 'strategy: default -> "k_center"' in page.locator("#settings").inner_text()


def test_a_form_that_is_being_filled_in_is_left_alone_by_the_refresh(page: Any, site: tuple[str, Store]) -> None:
    press_on(page, "#settings summary")
    page.locator("#set-epochs").evaluate("field => (field.closest('details').open = true)")
    page.locator("#set-epochs").fill("12")
    with site[1].write() as connection:
        connection.execute(update(projects).values(stop_accepted_at=1.0))
    page.wait_for_selector("#now-words:has-text('stopped')", timeout=60_000)
    page.wait_for_timeout(1000)
    assert page.locator("#set-epochs").input_value() == "12"


def test_a_batch_is_previewed_and_published(page: Any, site: tuple[str, Store]) -> None:
    press_on(page, "#preview summary")
    page.locator("#try-strategy").select_option("least_confidence")
    page.locator("#try-batch_size").fill("3")
    press_on(page, "#try-batch_size")
    page.wait_for_selector("#previewed h3", timeout=60_000)
    assert "3 tasks by least_confidence: 0 of 4 still unlabelled" in page.locator("#previewed h3").inner_text()
    shown = page.locator("#previewed .task").evaluate_all("found => found.map((one) => one.dataset.task)")
    assert shown == ["20", "19", "18"]
    assert HOSTILE in page.locator("#previewed").inner_text()
    press_on(page, "[data-act=publish-preview]")
    page.wait_for_selector("#preview-said:has-text('Round 2 publishes it.')")
    page.wait_for_timeout(STAYS_MS)
    assert page.locator("#preview-said").inner_text() == "Round 2 publishes it."
    with site[1].read() as connection:
        assert connection.execute(select(rounds.c.kind).where(rounds.c.number == 2)).scalar_one() == "select"


def test_the_batch_and_the_suspects_show_names_as_they_are(page: Any) -> None:
    assert page.locator("#batch .reason").first.inner_text().lower().startswith("most uncertain box: <img src=x")
    assert HOSTILE in page.locator("#balance").inner_text()
    assert f"seen as {HOSTILE} .90" in page.locator("#suspects").inner_text()
    press_on(page, "#batch .alike summary")
    assert page.locator("#batch .alike a").first.inner_text() == "9"


def test_looking_again_shows_what_was_found_where_the_keyboard_stays(
    page: Any, site: tuple[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects_view, "KEPT_SECONDS", 0.0)
    press_on(page, "[data-act=suspects]")
    page.wait_for_selector("#suspects-said:has-text('compared again')")
    page.wait_for_selector("[data-act=suspects]:not([disabled])")
    page.wait_for_timeout(2500)  # refreshes that bring nothing new leave it there
    assert "compared again" in page.locator("#suspects-said").inner_text()
    artifacts = Artifacts(Settings(_env_file=None, data_dir=tmp_path).artifacts_root, tmp_path / "cache")
    found = {"made_at": 2.0, "images": 4321, "counts": {"missing": 0, "class": 0, "extra": 0}, "suspects": []}
    artifacts.put(round_key(7, 1, "suspects.json"), json.dumps(found).encode())
    page.wait_for_selector("#suspects:has-text('4\u2009321 labelled images')", timeout=60_000)
    assert page.evaluate("document.activeElement.dataset.act") == "suspects"


def test_what_went_wrong_is_said_beside_the_button(page: Any, site: tuple[str, Store], redis_url: str) -> None:
    press_on(page, "#preview summary")
    press_on(page, "#try-batch_size")
    page.wait_for_selector("#previewed h3", timeout=60_000)
    with redis.Redis.from_url(redis_url) as connection:
        connection.delete(*connection.keys("hf:preview:7:*"))
    press_on(page, "[data-act=publish-preview]")
    page.wait_for_selector("#preview [data-said]:has-text('make it again')")


def test_a_setting_that_has_no_field_is_said_in_words(page: Any, site: tuple[str, Store]) -> None:
    with site[1].write() as connection:
        connection.execute(update(projects).values(extra_params='{"batchsize": 4}'))
    page.reload()
    press_on(page, "#settings summary")
    page.locator("#set-batch_size").fill("3")
    press_on(page, "#set-batch_size")
    page.wait_for_selector("#settings-said:has-text('batchsize: unknown setting')")


# --- the live refresh, and what somebody does meanwhile ---------------------------------------------------------------


def label(store: Store, task_id: int) -> None:
    """A label, as a webhook brings it: the page is fetched again."""
    with store.write() as connection:
        row = {"project_id": 7, "annotation_id": task_id, "task_id": task_id, "cancelled": False}
        connection.execute(insert(task_annotations).values(**row))


@LAPTOP
def test_what_is_opened_in_the_batch_stays_open_and_the_keyboard_in_it(page: Any, site: tuple[str, Store]) -> None:
    press_on(page, '#batch [data-task="6"] .alike summary')
    page.locator('#batch [data-task="6"] .alike a').focus()
    label(site[1], 6)
    page.wait_for_selector('#batch [data-task="6"].labelled')
    assert page.locator('#batch [data-task="6"] .alike').get_attribute("open") is not None
    assert page.evaluate("document.activeElement.textContent") == "9"
    label(site[1], 7)  # another task's change moves nobody either
    page.wait_for_selector('#batch [data-task="7"].labelled')
    assert page.evaluate("document.activeElement.closest('.task').dataset.task") == "6"


@LAPTOP
def test_a_batch_of_more_than_can_be_shown(page: Any, site: tuple[str, Store]) -> None:
    with site[1].write() as connection:
        ids = range(101, 101 + 650)
        every = {"project_id": 7, "deleted": False, "holdout": False}
        connection.execute(insert(tasks), [{**every, "task_id": i, "image": f"/data/upload/7/{i}.jpg"} for i in ids])
        round_id = connection.execute(select(rounds.c.id)).scalar_one()
        row = {"round_id": round_id, "shard": 0, "regions": "[]"}
        connection.execute(insert(scores), [{**row, "task_id": i, "rank": i} for i in ids])
    page.reload()
    page.evaluate("shown = 540")  # as if it had been pressed that often
    page.get_by_role("button", name="Show 60 more").click()
    playwright_api.expect(page.locator("#batch > li")).to_have_count(600)
    playwright_api.expect(page.locator("#batch-more")).to_have_text("600 of 654")
    assert page.locator("[data-act=more]").count() == 0
    label(site[1], 6)
    page.wait_for_selector('#batch [data-task="6"].labelled')


@LAPTOP
def test_a_refresh_that_fails_is_said_and_made_up_for(page: Any, site: tuple[str, Store]) -> None:
    page.route("**/projects/7?shown=*", lambda route: route.fulfill(status=502, body="<h1>a proxy's</h1>"))
    label(site[1], 6)
    page.wait_for_selector(".banner.bad:has-text('HTTP 502')")
    page.unroute("**/projects/7?shown=*")
    page.wait_for_selector('#batch [data-task="6"].labelled')
    playwright_api.expect(page.locator(".banner.bad:has-text('HTTP 502')")).to_have_count(0)


@LAPTOP
def test_the_overview_says_that_it_is_not_brought_up_to_date(page: Any, site: tuple[str, Store]) -> None:
    page.goto(site[0])
    page.route(f"{site[0]}/", lambda route: route.fulfill(status=503, json={"detail": "the store is away"}))
    page.wait_for_selector(".banner.bad:has-text('the store is away')")
    page.unroute(f"{site[0]}/")
    playwright_api.expect(page.locator(".banner.bad")).to_have_count(0)


@LAPTOP
def test_a_backend_that_hangs_is_said(page: Any, site: tuple[str, Store]) -> None:
    page.add_init_script("const after = AbortSignal.timeout; AbortSignal.timeout = () => after.call(AbortSignal, 500)")
    page.reload()
    page.route("**/status", lambda _route: None)
    page.wait_for_selector(".banner.bad:has-text('The backend does not answer')")


@LAPTOP
def test_a_password_in_the_address_does_not_stop_the_page(page: Any, site: tuple[str, Store]) -> None:
    page.goto(f"{site[0]}/projects/7".replace("//", "//ann:secret@"))
    label(site[1], 6)
    page.wait_for_selector('#batch [data-task="6"].labelled')


@LAPTOP
def test_a_section_that_is_exchanged_while_its_button_waits(
    page: Any, site: tuple[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects_view, "KEPT_SECONDS", 0.0)
    held: list[Any] = []
    page.route("**/api/projects/7/suspects", lambda route: held.append(route))
    press_on(page, "[data-act=suspects]")
    write_suspects(tmp_path, images=4321)
    label(site[1], 6)
    page.wait_for_selector("#suspects:has-text('4\u2009321 labelled images')")
    assert page.locator("[data-act=suspects]").is_disabled()
    held[0].fulfill(status=503, json={"detail": "Redis is away"})
    page.wait_for_selector("#suspects [data-said]:has-text('Redis is away')")
    assert page.locator("[data-act=suspects]").is_enabled()
    assert page.evaluate("document.activeElement.dataset.act") == "suspects"


def write_suspects(folder: Path, images: int) -> None:
    artifacts = Artifacts(Settings(_env_file=None, data_dir=folder).artifacts_root, folder / "cache")
    found = {"made_at": 2.0, "images": images, "counts": {"missing": 0, "class": 0, "extra": 0}, "suspects": []}
    artifacts.put(round_key(7, 1, "suspects.json"), json.dumps(found).encode())


@LAPTOP
def test_suspects_that_are_first_looked_for_while_the_page_is_open(
    page: Any, site: tuple[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects_view, "KEPT_SECONDS", 0.0)
    artifacts = Settings(_env_file=None, data_dir=tmp_path).artifacts_root
    Path(artifacts.removeprefix("file://"), round_key(7, 1, "suspects.json")).unlink()
    label(site[1], 6)
    page.wait_for_selector("#suspects [data-waiting]")
    write_suspects(tmp_path, images=77)
    page.wait_for_selector("#suspects:has-text('77 labelled images')", timeout=60_000)


@LAPTOP
def test_the_heading_and_the_log_are_live(page: Any, site: tuple[str, Store]) -> None:
    with site[1].write() as connection:
        connection.execute(update(projects).values(published_version="al-000077", title="Renamed"))
        record_event(connection, 7, "somebody", detail="did something")
    page.wait_for_selector("#events:has-text('did something')")
    assert "al-000077" in page.locator(".heading").inner_text()
    assert page.locator("h1").inner_text() == "Renamed"


@LAPTOP
def test_phases_are_announced_and_numbers_are_not(page: Any, site: tuple[str, Store]) -> None:
    def scoring(route: Any) -> None:
        status = route.fetch().json()
        status["now"]["words"] = "scoring 20000/80000, 1.5 images/s"
        route.fulfill(json=status)

    page.route("**/status", scoring)
    page.wait_for_selector("#now-words:has-text('20000')")
    assert page.locator("#announce").text_content() == "scoring"


@LAPTOP
def test_what_is_typed_while_settings_are_saved_stays(page: Any, site: tuple[str, Store]) -> None:
    held: list[Any] = []
    page.route("**/api/projects/7/settings", lambda route: held.append(route))
    press_on(page, "#settings summary")
    page.locator("#set-batch_size").fill("3")
    press_on(page, "#settings-form [type=submit]")
    page.locator("#set-max_rounds").fill("5")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    page.wait_for_selector("#settings-said:has-text('Saved')")
    page.wait_for_timeout(STAYS_MS)
    assert page.locator("#set-max_rounds").input_value() == "5"
    with site[1].read() as connection:
        assert connection.execute(select(projects.c.extra_params)).scalar_one() == '{"batch_size":3}'


@LAPTOP
def test_undo_shows_what_others_have_set_meanwhile(page: Any, site: tuple[str, Store]) -> None:
    press_on(page, "#settings summary")
    page.locator("#set-batch_size").fill("3")
    with site[1].write() as connection:
        connection.execute(update(projects).values(extra_params='{"batch_size": 9}'))
    label(site[1], 6)
    page.wait_for_selector('#batch [data-task="6"].labelled')
    assert page.locator("#set-batch_size").input_value() == "3"
    press_on(page, "#settings-form [type=reset]")
    playwright_api.expect(page.locator("#set-batch_size")).to_have_value("9")


@LAPTOP
def test_a_refusal_without_words_is_said_too(page: Any, site: tuple[str, Store]) -> None:
    page.route("**/api/projects/7/settings", lambda route: route.fulfill(status=504, body="<h1>a proxy's</h1>"))
    press_on(page, "#settings summary")
    page.locator("#set-batch_size").fill("3")
    press_on(page, "#settings-form [type=submit]")
    page.wait_for_selector("#settings-said:has-text('HTTP 504')")


def fail_round(store: Store) -> None:
    with store.write() as connection:
        row = {"project_id": 7, "number": 2, "state": "failed", "opened_at": 5.0, "closed_at": 6.0, "error": "too hot"}
        round_id = connection.execute(insert(rounds).values(**row).returning(rounds.c.id)).scalar_one()
        step = {"round_id": round_id, "kind": "train", "state": "failed", "attempt": 3, "error": "too hot"}
        connection.execute(insert(steps).values(**step))


@LAPTOP
def test_what_was_tried_again_is_not_offered_any_more(page: Any, site: tuple[str, Store]) -> None:
    page.route("**/projects/7/work", lambda route: route.abort())  # the page's own refresh has it, too
    fail_round(site[1])
    press_on(page, "#work [data-act=retry-round]")
    page.wait_for_selector("[data-act=cancel]:not([hidden])")
    playwright_api.expect(page.locator("#work [data-act=retry-round]")).to_have_count(0)


@LAPTOP
def test_a_text_that_is_marked_is_not_exchanged(page: Any, site: tuple[str, Store]) -> None:
    page.evaluate("getSelection().selectAllChildren(document.getElementById('work-title'))")
    page.route("**/status", lambda route: route.abort())  # only the part's own poll
    fail_round(site[1])
    page.wait_for_timeout(6500)
    assert page.evaluate("getSelection().toString()") == "Workers and queues"
    page.evaluate("getSelection().removeAllRanges()")
    page.wait_for_selector("#work .failures")


@pytest.mark.parametrize("page", [390], indirect=True)
def test_a_table_stays_scrolled(page: Any, site: tuple[str, Store]) -> None:
    page.evaluate("document.querySelector('#rounds .scroll').scrollLeft = 120")
    fail_round(site[1])
    page.wait_for_selector("#rounds:has-text('too hot')")
    assert page.evaluate("document.querySelector('#rounds .scroll').scrollLeft") == 120
