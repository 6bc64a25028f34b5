"""Take a picture of a page: `scripts/py scripts/screenshot.py http://127.0.0.1:9090/projects/1 docs/admin.png`.

With Debian's chromium (or the one named by --chromium). The README's picture is of a project after `make demo`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("output", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    given = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": given.width, "height": given.height})
        page.goto(given.url)
        page.wait_for_timeout(4000)  # charts are drawn and thumbnails fetched after the page has loaded
        given.output.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(given.output))
        browser.close()


if __name__ == "__main__":
    main()
