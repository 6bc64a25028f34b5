"""The check-up in a real browser: by keyboard, wide and narrow, for axe-core; hostile words inject nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from backend import doctor_view
from backend.app import create_app
from worker import rounds
from worker.doctor import Check, Look, failed, ok, skipped, warning
from worker.settings import ProjectSettings, Settings
from worker.store import Store

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
pytestmark = pytest.mark.slow  # a browser takes its time
expect = playwright_api.expect
expect.set_options(timeout=60_000)  # the machine may be busy, and a page asks every few seconds

HOSTILE = """<img src=x onerror="window.hacked=1">'\u202e"""
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TOO_WIDE = "() => document.documentElement.scrollWidth - innerWidth"


class World:
    """One check of each state; the webhook is ill until it is put right, and one look waits until it may go."""

    def __init__(self) -> None:
        self.go, self.is_ill = threading.Event(), True

    def _waits(self) -> Check:
        assert self.go.wait(120)
        return warning("queue", f"rather slow {HOSTILE}", "Buy a faster one")

    def _webhook(self) -> Check:
        sentence = "our webhook goes to http://" + "a-long-name." * 12
        if not self.is_ill:
            return ok("webhook", "one")
        return failed("webhook", sentence, "Run `hardfirst doctor --fix`", self._mend)

    def _mend(self) -> None:
        self.is_ill = False

    def deployment(self, own: object, **kwargs: object) -> list[Look]:
        return [Look("store", lambda: ok("store", "is there")), Look("queue", self._waits)]

    def project(self, own: object, project_id: int, **kwargs: object) -> list[Look]:
        return [Look("webhook", self._webhook), Look("order", lambda: skipped("order", "not looked at: webhook"))]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(doctor_view, "deployment_looks", made.deployment)
    monkeypatch.setattr(doctor_view, "project_looks", made.project)
    return made


@pytest.fixture
def url(tmp_path: Path, redis_url: str, world: World) -> Iterator[str]:
    settings = Settings(_env_file=None, label_studio_url="http://127.0.0.1:1", redis_url=redis_url, data_dir=tmp_path)
    store = Store(settings.store_url)
    store.migrate()
    with store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), "http://backend:9090")
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    world.go.set()
    server.should_exit = True
    thread.join(10)
    store.close()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=120_000)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """What the browser complains about fails the test; refused requests are answers, and are shown."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    assert opened.evaluate("window.hacked") is None
    context.close()
    assert complaints == []


def press_check(page: Any) -> None:
    """By keyboard."""
    page.get_by_role("button", name="Check everything").focus()
    page.keyboard.press("Enter")


def test_a_project_is_checked_by_keyboard_and_a_thing_put_right(page: Any, url: str, world: World) -> None:
    page.goto(f"{url}/projects/7")
    press_check(page)
    expect(page.locator("#doctor-state")).to_have_text("Looking at: queue")
    expect(page.locator("#doctor-announce")).to_have_text("Checking")
    expect(page.locator(".checks li")).to_have_count(1)  # what is known is shown at once
    expect(page.get_by_role("button", name="Check everything")).to_be_disabled()
    world.go.set()
    expect(page.locator("#doctor")).to_have_attribute("data-state", "done")
    marks = [one.strip().split()[-1] for one in page.locator(".checks .mark").all_text_contents()]
    assert marks == ["OK", "Warning", "Failed", "at"]
    expect(page.locator("#doctor")).to_contain_text(f"rather slow {HOSTILE[:-1]}")
    expect(page.locator("#doctor-announce")).to_have_text("The check-up is over")
    expect(page.get_by_role("button", name="Check everything")).to_be_focused()

    page.get_by_role("button", name="Put right: webhook").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#doctor .chip")).to_have_text("put right")
    expect(page.locator("#doctor")).to_have_attribute("data-state", "done")
    expect(page.get_by_role("button", name="Put right: webhook")).to_have_count(0)
    assert not world.is_ill
    page.reload()
    expect(page.locator("#doctor .chip")).to_have_text("put right")  # the last one stays


def test_a_second_one_is_refused_with_a_sentence_beside_the_button(page: Any, url: str, world: World) -> None:
    page.goto(f"{url}/projects/7")
    press_check(page)
    expect(page.locator("#doctor-state")).to_have_text("Looking at: queue")
    page.goto(url)
    press_check(page)
    expect(page.locator("#doctor [data-said]")).to_contain_text("a check-up of project 7 is on its way")
    expect(page.get_by_role("button", name="Check everything")).to_be_enabled()
    world.go.set()
    page.goto(f"{url}/projects/7")  # one that runs is followed by whoever opens the page
    expect(page.locator("#doctor")).to_have_attribute("data-state", "done")
    page.goto(url)
    press_check(page)
    expect(page.locator("#doctor")).to_have_attribute("data-state", "done")
    expect(page.locator(".checks li")).to_have_count(2)


def test_an_answer_that_did_not_come_is_not_complained_of_when_the_next_one_comes(
    page: Any, url: str, world: World
) -> None:
    page.goto(f"{url}/projects/7")
    page.route("**/doctor?project=7", lambda route: route.abort())
    press_check(page)
    expect(page.locator("#doctor [data-said]")).to_contain_text("Failed to fetch")
    page.unroute("**/doctor?project=7")
    expect(page.locator("#doctor-state")).to_have_text("Looking at: queue")
    expect(page.locator("#doctor [data-said]")).to_be_empty()
    world.go.set()
    expect(page.locator("#doctor")).to_have_attribute("data-state", "done")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/projects/7"])
def test_axe_finds_nothing_serious_and_nothing_is_too_wide(
    browser: Any, url: str, world: World, path: str, scheme: str
) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed (dev extra)")
    axe = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    world.go.set()
    context = browser.new_context(viewport={"width": 390, "height": 844}, bypass_csp=True, color_scheme=scheme)
    page = context.new_page()
    page.goto(url + path)
    press_check(page)
    expect(page.locator("#doctor")).to_have_attribute("data-state", "done")
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((result) => result.violations)")
    assert page.evaluate(TOO_WIDE) <= 0
    context.close()
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [f"{one['id']}: {one['nodes'][0]['html'][:160]}" for one in serious] == []
