"""The admin page in a real browser, over generated projects: 80,000 tasks and 12 rounds, and small ones in all states.

Every view is seen wide and narrow, walked through by keyboard, and given to axe-core; hostile names inject nothing.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import delete, insert, select, update

from backend import report
from demo import history
from worker import queue
from worker.store import Store, events, projects, rounds, tasks

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
expect = playwright_api.expect
expect.set_options(timeout=60_000)  # the machine may be busy, and a page asks every few seconds
pytestmark = pytest.mark.slow  # a minute of waiting for a browser

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
NOW = 1_790_000_000.0
BIG, HOSTILE, FAILED, SCORING, FRESH = 1, 2, 3, 4, 5
TITLES = {FAILED: "Failed", SCORING: "Scoring", FRESH: "Fresh"}
PWN = "<img src=x onerror=window.pwned=1>"
QUOTES = "\"'><script>window.pwned=2</script>"
BACKWARDS = "\u202ereversed\u202c {{7*7}}"
CLASSES = (PWN, QUOTES, BACKWARDS, "a" * 90, "&lt;b&gt;", "nut")
PAGES = ["/", *(f"/projects/{number}" for number in (BIG, HOSTILE, FAILED, SCORING, FRESH))]
WIDTHS = ((1280, 900), (390, 844))


@dataclass
class Site:
    url: str
    store: Store
    redis: redis.Redis
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, valkey: str) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    store, artifacts = history.open_folder(folder)
    hostile = {"title": PWN, "class_names": CLASSES, "file_names": (PWN, QUOTES, BACKWARDS)}
    history.fill(store, artifacts, project_id=BIG, earlier_scores=False)
    history.fill(store, artifacts, project_id=HOSTILE, tasks=600, rounds=3, **hostile)
    history.fill(store, artifacts, project_id=FAILED, title="Failed", tasks=240, rounds=2, last="failed")
    history.fill(store, artifacts, project_id=SCORING, title="Scoring", tasks=600, rounds=5, last="scoring")
    with store.write() as connection:
        row = {"id": FRESH, "title": "Fresh", "connected_at": NOW, "label_config": "", "extra_params": "{}"}
        connection.execute(insert(projects).values(**row))
        broken = update(tasks).where(tasks.c.project_id == HOSTILE, tasks.c.image_problem.is_not(None))
        connection.execute(broken.values(image_problem=f"cannot read {PWN}"))
        connection.execute(update(rounds).where(rounds.c.project_id == HOSTILE).values(why=QUOTES, error=PWN))
        event = {"project_id": HOSTILE, "at": NOW, "kind": PWN, "key": "hostile", "detail": QUOTES}
        connection.execute(insert(events).values(**event))
    with redis.Redis.from_url(valkey) as connection:
        connection.flushall()
        with history.running(folder, redis_url=valkey) as running:
            yield Site(running.url, store, connection)
    store.close()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=120_000)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    """What the browser complains about (the content policy, errors in scripts) fails the test."""
    site.complaints.clear()
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    opened.on("console", lambda said: site.complaints.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: site.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: dialog.accept())
    yield opened
    context.close()
    assert site.complaints == []


def open_page(page: Any, url: str) -> None:
    assert page.goto(url).ok
    page.wait_for_load_state("load")
    page.wait_for_timeout(300)  # charts are drawn after it


# --- every view, wide and narrow -------------------------------------------------------------------------------------

OPEN = "opened => document.querySelectorAll('main details').forEach((one) => { one.open = opened; })"
TOO_WIDE = """() => {
  const room = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= room) return [];
  return [...document.querySelectorAll('body *')].filter((one) => one.getBoundingClientRect().right > room + 1)
    .filter((one) => !one.parentElement.closest('.scroll, svg')).map((one) => one.outerHTML.slice(0, 200)).slice(0, 5)
    .concat([`the page is ${document.documentElement.scrollWidth} px wide`]);
}"""
OVERLAPS = """() => {
  const kinds = ['a', 'button', 'input', 'select', 'summary', 'section'].map((kind) => `main ${kind}`).join();
  const seen = [...document.querySelectorAll(kinds)]
    .filter((one) => one.checkVisibility({visibilityProperty: true}) && !one.closest('[hidden], .unseen'))
    .map((one) => [one, one.getBoundingClientRect()]).filter(([, box]) => box.width > 1 && box.height > 1);
  const found = [];
  seen.forEach(([one, a], index) => seen.slice(index + 1).forEach(([other, b]) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 2 && down > 2 && !one.contains(other) && !other.contains(one))
      found.push([one, other].map((e) => `${e.tagName}#${e.id} ${e.textContent.trim().slice(0, 30)}`).join(' | '));
  }));
  return found;
}"""


@pytest.mark.parametrize("path", PAGES)
def test_nothing_overlaps_and_the_page_scrolls_in_one_direction(page: Any, site: Site, path: str) -> None:
    open_page(page, site.url + path)
    for width, height in WIDTHS:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(300)
        for opened in (False, True):
            page.evaluate(OPEN, opened)
            assert settled(page, TOO_WIDE) == [], f"{width} px wide, details {'open' if opened else 'closed'}"
            assert settled(page, OVERLAPS) == [], f"{width} px wide, details {'open' if opened else 'closed'}"


def settled(page: Any, script: str) -> list[str]:
    """What it finds and goes on finding: a chart is drawn anew some time after the window's size has changed."""
    deadline = time.monotonic() + 20
    while (found := page.evaluate(script)) and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    return list(found)


def test_the_big_project_shows_what_was_generated(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{BIG}")
    assert page.locator("#rounds tbody tr").count() == 13
    assert page.locator(".task").count() == 60
    assert "62 of 200 labelled" in page.locator("#batch-sub").inner_text()
    counts = {name: page.locator(f"[data-count={name}]").first.inner_text() for name in ("labels", "holdout", "pool")}
    assert counts == {"labels": "2\u2009462", "holdout": "300", "pool": "77\u2009231"}
    page.locator(".task img").first.scroll_into_view_if_needed()
    expect(page.locator(".task img").first).to_have_js_property("naturalWidth", 320)


def test_a_failed_round_says_why(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{FAILED}")
    expect(page.locator("#now-words")).to_have_text("round 3 failed")
    expect(page.locator("#now-detail")).to_contain_text("Lower train_batch")
    expect(page.get_by_role("button", name="Retry the failed step").first).to_be_visible()


def test_a_fresh_project_has_no_empty_boxes(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{FRESH}")
    expect(page.locator("#now-words")).to_have_text("connected")
    for card in page.locator("main > section, main > div > section").all():
        if card.is_visible() and not card.locator("details:not([open])").count():
            assert len(card.inner_text().strip().splitlines()) > 1, card.inner_text()


def test_an_empty_chart_has_no_scale(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{FRESH}")
    expect(page.locator("#curve")).to_contain_text("No round has been measured yet")
    assert page.locator("#curve .xtick, #curve .ytick").count() == 0


def test_downloads_stand_side_by_side(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{BIG}")
    report_at, dataset_at = (page.locator(f"#rounds a[href$='{name}']").bounding_box() for name in ("html", "zip"))
    if page.viewport_size["width"] > 1000:
        assert report_at["y"] == dataset_at["y"]
        assert dataset_at["x"] - report_at["x"] - report_at["width"] < 60
    else:
        assert report_at["x"] == dataset_at["x"]


# --- live ------------------------------------------------------------------------------------------------------------


def test_a_round_of_the_big_project_is_followed_without_reloading(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{BIG}")
    page.evaluate("window.sameDocument = true")
    opened = {"project_id": BIG, "number": 13, "state": "training", "opened_at": time.time(), "why": "138 new labels"}
    with site.store.write() as connection:
        round_id = connection.execute(insert(rounds).values(**opened).returning(rounds.c.id)).scalar_one()
    losses = {"box": 0.93, "cls": 0.41}
    shown = {"round": 13, "epoch": 5, "epochs": 60, "losses": losses, "eta_seconds": 1200}
    queue.set_progress(site.redis, BIG, phase="training", **shown)
    expect(page.locator("#now-words")).to_have_text("training epoch 6/60")
    expect(page.locator("#now-eta")).to_have_text("about 20 min left")
    expect(page.locator("#now-losses")).to_contain_text("box 0.93")
    assert page.evaluate("document.getElementById('bar').value") == pytest.approx(5 / 60)
    set_state(site, round_id, state="scoring")
    queue.set_progress(site.redis, BIG, phase="scoring", round=13, done=20_000, total=80_000, epoch=None, losses=None)
    expect(page.locator("#now-words")).to_contain_text("scoring 20000/80000")
    expect(page.locator("#stages [aria-current=step]")).to_have_text("Score")
    done = {"state": "done", "closed_at": time.time(), "labels": 2600, "map50": 0.7654, "batch_size": 200}
    set_state(site, round_id, **done)
    queue.clear_progress(site.redis, BIG)
    expect(page.locator("#now-words")).to_have_text("idle")
    expect(page.locator("#tiles dd").first).to_contain_text("0.765")
    expect(page.locator("#rounds tbody tr").first).to_contain_text("2\u2009600")
    assert page.evaluate("window.sameDocument") is True
    with site.store.write() as connection:
        connection.execute(delete(rounds).where(rounds.c.id == round_id))


def set_state(site: Site, round_id: int, **values: Any) -> None:
    with site.store.write() as connection:
        connection.execute(update(rounds).where(rounds.c.id == round_id).values(**values))


def test_the_overview_follows_too(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/")
    card = page.locator(".project").filter(has_text="Scoring")
    expect(card).to_contain_text("scoring")
    queue.set_progress(site.redis, SCORING, phase="scoring", round=6, done=123, total=600)
    expect(card).to_contain_text("scoring 123/600")
    queue.clear_progress(site.redis, SCORING)


# --- by keyboard -----------------------------------------------------------------------------------------------------

REACHABLE = """() => [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex="0"]')]
  .filter((one) => one.checkVisibility({visibilityProperty: true}) && !one.disabled && one.tabIndex >= 0)
  .map((one, index) => { one.dataset.walk = index; return `${index} ${one.outerHTML.slice(0, 90)}`; })"""
FOCUSED = """() => { const one = document.activeElement, style = getComputedStyle(one);
  const ring = (style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0) || style.boxShadow !== 'none';
  return [one.dataset.walk ?? null, ring]; }"""


def walk(page: Any) -> tuple[list[int], list[int]]:
    """Numbers of the focusable elements in the order Tab reaches them, and of those whose focus cannot be seen."""
    order: list[int] = []
    unseen: list[int] = []
    for _ in range(900):
        page.keyboard.press("Tab")
        number, ring = page.evaluate(FOCUSED)
        if number is None or int(number) in order:
            break
        order.append(int(number))
        if not ring:
            unseen.append(int(number))
    return order, unseen


@pytest.mark.parametrize("number", [BIG, FAILED])
def test_tab_reaches_every_action_and_shows_where_it_is(page: Any, site: Site, number: int) -> None:
    # what the page asks for by itself would put other elements in the place of those we walk through
    page.route(re.compile("/(status|work|suspects)$"), lambda route: route.abort())
    open_page(page, f"{site.url}/projects/{number}")
    wanted = page.evaluate(REACHABLE)
    order, unseen = walk(page)
    assert [wanted[one] for one in range(len(wanted)) if one not in order] == []
    assert [wanted[one] for one in unseen] == []
    assert order == sorted(order), "Tab follows the order of the page"
    site.complaints[:] = [said for said in site.complaints if "ERR_FAILED" not in said]


def focus_by_tab(page: Any, selector: str) -> None:
    for _ in range(400):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"Tab never came to {selector}")


def test_space_starts_a_round_and_enter_cancels_it(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{BIG}")
    focus_by_tab(page, "[data-act=start]")
    page.keyboard.press("Space")
    expect(page.locator("#now-words")).to_have_text("waiting for a worker")
    page.locator("[data-act=cancel]").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#now-detail")).to_have_text("Round 13 was cancelled.")
    with site.store.write() as connection:
        connection.execute(delete(rounds).where(rounds.c.project_id == BIG, rounds.c.number == 13))


def test_enter_shows_more_and_opens_details(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{BIG}")
    page.locator("[data-act=more]").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".task")).to_have_count(120)
    details = page.locator("main details:not([open])").first
    details.locator("summary").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("main details[open]").first).to_be_visible()


# --- for everybody ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def axe() -> str:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed (dev extra)")
    return (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "scheme"), [*((path, "light") for path in PAGES), ("/", "dark"), (f"/projects/{FAILED}", "dark")]
)
def test_axe_finds_nothing_serious(browser: Any, site: Site, axe: str, path: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True, color_scheme=scheme)
    opened = context.new_page()
    open_page(opened, site.url + path)
    opened.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = true; })")
    opened.evaluate(axe)
    found = opened.evaluate("axe.run(document, {resultTypes: ['violations']}).then((result) => result.violations)")
    context.close()
    serious = [
        f"{one['id']}: {one['help']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:3]
    ]
    assert serious == []


# --- hostile names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", f"/projects/{HOSTILE}"])
def test_names_inject_nothing(page: Any, site: Site, path: str) -> None:
    open_page(page, site.url + path)
    page.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = true; })")
    page.wait_for_timeout(2500)  # one poll: what is fetched again is put in place by script
    for mark in page.locator("#curve .points path, .class-line, .boxes rect").all()[:6]:
        mark.hover(force=True)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x], main script:not([type='application/json'])").count() == 0
    assert page.locator("h1, h2").filter(has_text=PWN).count() == 1


def test_names_are_seen_as_they_are(page: Any, site: Site) -> None:
    open_page(page, f"{site.url}/projects/{HOSTILE}")
    drawn = set(page.locator(".boxes text").all_text_contents())
    assert drawn & {PWN, QUOTES}
    assert drawn <= set(CLASSES)
    assert f"cannot read {PWN}" in page.locator("#problems").inner_text()
    assert PWN in page.locator("#events").inner_text()


def test_the_report_needs_nothing_and_injects_nothing(
    page: Any, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "THUMBNAIL_SECONDS", 120.0)  # the machine may be busy
    page.set_default_timeout(120_000)  # which counts for the page alone, not for its `request`
    asked: list[str] = []
    for number, pictures in ((BIG, 24), (HOSTILE, 24), (FRESH, 0)):
        answer = page.request.get(f"{site.url}/api/projects/{number}/report.html", timeout=180_000)
        assert answer.ok
        saved = tmp_path / f"{number}.html"
        saved.write_bytes(answer.body())
        page.on("request", lambda request: asked.append(request.url))
        page.goto(saved.as_uri())
        assert page.locator(".picture img").count() == pictures
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("document.documentElement.scrollWidth") == 1280
        assert page.locator("h1").inner_text() == {BIG: history.TITLE, HOSTILE: PWN, FRESH: "Fresh"}[number]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


# --- nothing of the above changed the projects -----------------------------------------------------------------------


def test_the_json_says_what_the_page_says(page: Any, site: Site) -> None:
    body = json.loads(page.request.get(f"{site.url}/api/projects/{BIG}").text())
    with site.store.read() as connection:
        query = select(rounds.c.map50).where(rounds.c.project_id == BIG, rounds.c.map50.is_not(None))
        stored = connection.execute(query.order_by(rounds.c.number)).scalars().all()
    assert [point["map50"] for point in body["curve"]] == stored
    assert len(stored) == 12
