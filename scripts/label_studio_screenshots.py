"""Take the pictures of docs/label-studio.md: `make label-studio-screenshots`, or
`scripts/py -m scripts.label_studio_screenshots [--out docs/label-studio]`.

A real Label Studio and `hardfirst up`, generated images of which most are labelled, and Debian's chromium (or the one
named by --chromium), which clicks through as a person does. One round trains in between: some minutes without a GPU.
"""

from __future__ import annotations

import argparse
import io
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from demo import factory, loop
from demo.oracle import Dataset, everything_unlabelled
from scripts.screenshots import ARGUMENTS, what_is_missing, which_chromium
from worker.store import Store

WINDOW = {"width": 1000, "height": 700}
SETTLE_MS = 1500  # Label Studio's pages go on drawing after they have loaded
IMAGES, UNLABELLED, SEED = 360, 60, 7
SHOWN_PORT = 9090  # the one that the page tells people to type, where it is free
SHOWN_PARAMS = '{"batch_size": 100, "epochs": 60}'
# what is really typed then: a round that 300 small images get through in minutes
PARAMS = (
    '{"batch_size": 24, "holdout_size": 60, "imgsz": 160, "epochs": 15, "train_batch": 4, "nominal_batch": 4, '
    '"optimizer": "AdamW", "lr0": 0.002, "weights": "yolov8n.yaml"}'
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.label_studio_screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "label-studio")
    parser.add_argument("--chromium", default="", help="default: the one on PATH")
    given = parser.parse_args()
    chromium = which_chromium(given.chromium)
    if missing := what_is_missing(chromium):
        print(missing, file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="hardfirst-screenshots-") as folder:
        images = _images(Path(folder) / "images")
        with loop._servers(Path(folder), SHOWN_PORT if _is_free(SHOWN_PORT) else 0, console) as stage:
            project_id, _ = loop._project(stage, images)
            _take(stage, project_id, chromium, given.out)
    return 0


def _images(folder: Path) -> Dataset:
    """All labelled but for the pool: a project that brings labels trains at once."""
    made = everything_unlabelled(factory.write_dataset(folder, IMAGES, SEED, (640, 480)))
    return Dataset(made.names, made.pool[UNLABELLED:], made.pool[:UNLABELLED], ())


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _take(stage: loop.Stage, project_id: int, chromium: str, out: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport=WINDOW, color_scheme="light", locale="en-GB", timezone_id="UTC")
        site = stage.label_studio.url
        _log_in(page, site)
        _save(_token(page, site), out / "token.png")
        _save(_form(page, f"{site}/projects/{project_id}/settings/ml", stage.backend_url), out / "connect.png")
        _save(_card(page), out / "connected.png")
        store = Store(stage.settings.store_url)
        loop._await_batch(stage, store, project_id, 1)
        store.close()
        _save(_tab(page, f"{site}/projects/{project_id}/data"), out / "batch.png")
        _save(_labelling(page), out / "labelling.png")
        browser.close()


def _log_in(page: Any, site: str) -> None:
    page.goto(f"{site}/user/login")
    page.fill("input[name=email]", loop.USERNAME)
    page.fill("input[name=password]", loop.PASSWORD)
    page.click("button[type=submit]")
    page.wait_for_load_state("networkidle")


def _token(page: Any, site: str) -> bytes:
    _open(page, f"{site}/user/account")
    page.get_by_text("Personal Access Token", exact=True).first.click()
    page.get_by_text("Create New Token").click()
    page.get_by_text("New Auth Token").wait_for()
    page.wait_for_timeout(SETTLE_MS)
    return _shot(page, 540)


def _form(page: Any, address: str, backend_url: str) -> bytes:
    _open(page, address)
    page.get_by_label("Add machine learning model").click()
    page.fill("input[name=title]", "hardfirst")
    page.fill("input[name=url]", backend_url)
    page.fill("textarea[name=extra_params]", SHOWN_PARAMS)
    page.wait_for_timeout(SETTLE_MS)
    taken: bytes = page.locator(".lsf-modal-ls__content").screenshot()
    page.fill("textarea[name=extra_params]", PARAMS)
    return taken


def _card(page: Any) -> bytes:
    page.get_by_label("Save machine learning form").click()
    page.get_by_text("Connected", exact=True).wait_for()
    page.wait_for_timeout(SETTLE_MS)
    return _shot(page, 290)


def _tab(page: Any, address: str) -> bytes:
    _open(page, address)
    page.get_by_text("hardfirst: next batch").first.click()
    page.mouse.move(500, 690)  # or the tab shows its menu in place of its name
    page.wait_for_timeout(SETTLE_MS)
    return _shot(page, 400)


def _labelling(page: Any) -> bytes:
    page.get_by_text("Label All Tasks").first.click()
    page.get_by_text("Submit", exact=True).wait_for()
    page.wait_for_timeout(2 * SETTLE_MS)  # the image, then the boxes
    return _shot(page, 700)


def _open(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(SETTLE_MS)


def _shot(page: Any, height: int) -> bytes:
    """The upper part of the window."""
    taken: bytes = page.screenshot(clip={"x": 0, "y": 0, "width": WINDOW["width"], "height": height})
    return taken


def _save(png: bytes, path: Path) -> None:
    """In 256 colours a photograph is a third of the size. Pillow's default choice would lose the labels' colours."""
    with Image.open(io.BytesIO(png)) as opened:
        few = opened.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
        few.save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
