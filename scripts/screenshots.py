"""Take the README's pictures: `make screenshots`, or `scripts/py -m scripts.screenshots [--out docs]`.

A backend over a generated project of 80,000 tasks and 12 rounds, two smaller ones beside it, and Debian's chromium (or
the one named by --chromium). The same seed and moment give the same pictures, but for the fonts of the machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from demo import history

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
NOW = 1_790_150_000.0  # a history ends then
LAPTOP, PHONE = 1280, 390
SETTLE_MS = 1500  # charts are drawn and thumbnails fetched after the page has loaded


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    parser.add_argument("--chromium", default="", help="default: the one on PATH")
    parser.add_argument("--tasks", type=int, default=80_000)
    given = parser.parse_args()
    chromium = which_chromium(given.chromium)
    if missing := what_is_missing(chromium):
        print(missing, file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hardfirst-screenshots-") as folder:
        _fill(Path(folder), given.tasks)
        with history.running(Path(folder)) as site, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            _take(browser, site.url, given.out)
            browser.close()
    return 0


def which_chromium(named: str) -> str:
    """The one named, else the one on PATH; "" where there is none."""
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), "")


def what_is_missing(chromium: str) -> str:
    """What to install before pictures can be taken, in a sentence; "" when all is there."""
    if not chromium or shutil.which(chromium) is None:
        return "screenshots need a chromium: apt-get install chromium, or name one with --chromium"
    if find_spec("playwright") is None:
        return "screenshots need playwright: install the dev extra (pip install -e .[dev])"
    return ""


def _fill(folder: Path, tasks: int) -> None:
    store, artifacts = history.open_folder(folder)
    history.fill(store, artifacts, project_id=1, tasks=tasks, earlier_scores=False, now=NOW)
    for number, (title, rounds, last) in enumerate(
        (("Night shift: gearboxes", 4, "scoring"), ("Incoming goods", 2, "failed")), start=2
    ):
        small = {"tasks": 3000, "rounds": rounds, "seed": number, "now": NOW, "title": title}
        history.fill(store, artifacts, project_id=number, last=last, **small)  # type: ignore[arg-type]
    store.close()


def _take(browser: Any, url: str, out: Path) -> None:
    """overview.png, admin.png and batch.png of a laptop, phone.png of a phone."""
    _picture(browser, f"{url}/", out / "overview.png", LAPTOP, 760)
    _picture(browser, f"{url}/projects/1", out / "admin.png", LAPTOP, 1416)
    _picture(browser, f"{url}/projects/1", out / "batch.png", LAPTOP, 1170, top="#batch")
    _picture(browser, f"{url}/projects/1", out / "phone.png", PHONE, 844 * 2)


def _picture(browser: Any, url: str, path: Path, width: int, height: int, top: str = "") -> None:
    """A window of the page; `top`: scrolled until that section is at its upper edge."""
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="light", locale="en-GB", timezone_id="UTC"
    )
    page.emulate_media(reduced_motion="reduce")
    page.goto(url)
    if top:
        page.locator(top).evaluate("one => one.closest('section').scrollIntoView()")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(SETTLE_MS)
    page.screenshot(path=str(path))
    print(path)
    page.close()


if __name__ == "__main__":
    sys.exit(main())
