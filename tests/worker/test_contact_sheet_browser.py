"""The contact sheet in a real browser: whole pictures, whatever their shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from worker.contact_sheet import Card, Sheet, render_sheet, thumbnail

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
pytestmark = pytest.mark.slow  # seconds of waiting for a browser

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SHAPES = ((1920, 1080), (3000, 600), (640, 480), (300, 1200))


def sheet() -> Sheet:
    cards = [
        Card(
            rank=rank,
            name=f"{width}x{height}.jpg",
            picture=thumbnail(Image.new("RGB", (width, height))),
            size=(width, height),
            utility=1 / rank,
            parts={},
            boxes=np.array([[0, 0, width, height, 0.5, 0]], np.float32),
            reason="",
        )
        for rank, (width, height) in enumerate(SHAPES, 1)
    ]
    return Sheet(cards, 4, 4, "pool", "entropy", {}, "a.pt", 640, {0: "nut"}, [1.0], [1.0])


def test_wide_and_high_pictures_are_shown_whole_with_their_boxes(chromium: str, tmp_path: Path) -> None:
    (tmp_path / "sheet.html").write_text(render_sheet(sheet()))
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=120_000)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto((tmp_path / "sheet.html").as_uri())
        places = page.evaluate(
            "[...document.querySelectorAll('figure')].map(one => [one, one.querySelector('img'),"
            " one.querySelector('.box')].map(part => part.getBoundingClientRect().toJSON()))"
        )
        browser.close()
    for (width, height), (figure, image, box) in zip(SHAPES, places, strict=True):
        for part in (image, box):
            assert figure["left"] - 1 <= part["left"] <= part["right"] <= figure["right"] + 1
            assert figure["top"] - 1 <= part["top"] <= part["bottom"] <= figure["bottom"] + 1
        assert image["width"] / image["height"] == pytest.approx(width / height, rel=0.03)
