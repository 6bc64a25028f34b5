"""One rule for odd images: a box means the same pixels in the browser, in training, in scoring and in thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from backend.admin import thumbnail
from worker.dataset import storable
from worker.detector import displayed
from worker.images import decode_image

WIDTH, HEIGHT = 96, 64
BOX = (52, 8, 84, 32)  # left, top, right, bottom on the displayed image: white, all else black
UNDO = {  # EXIF orientation -> how the displayed frame is turned into the stored one
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def scene(mode: str = "RGB") -> Image.Image:
    image = Image.new("L", (WIDTH, HEIGHT), 0)
    image.paste(255, BOX)
    return image.convert(mode)


def as_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, kind: str) -> bytes:
    """The scene, stored turned, with the EXIF orientation that turns it back."""
    undo = UNDO[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = scene() if undo is None else scene().transpose(undo)
    return as_file(stored, kind, exif=exif.tobytes(), **({} if kind == "PNG" else {"quality": 95}))


def deep() -> bytes:
    """16-bit grey, whose high byte is the scene."""
    return as_file(Image.fromarray(np.asarray(scene()).astype(np.uint16)[..., 0] * 257), "PNG")


def see_through() -> bytes:
    image = scene("RGBA")
    image.putalpha(255)
    return as_file(image, "PNG")


def animated() -> bytes:
    """The scene, then its negative."""
    negative = Image.eval(scene("L"), lambda value: 255 - value)
    return as_file(scene("L"), "GIF", save_all=True, append_images=[negative], duration=60_000, loop=1)


FILES: dict[str, Callable[[], bytes]] = {
    **{f"jpeg turned {number}": lambda number=number: turned(number, "JPEG") for number in UNDO},  # type: ignore[misc]
    **{f"png turned {number}": lambda number=number: turned(number, "PNG") for number in (3, 6)},  # type: ignore[misc]
    **{f"avif turned {number}": lambda number=number: turned(number, "AVIF") for number in (3, 6)},  # type: ignore[misc]
    "webp whose orientation no Chromium heeds": lambda: as_file(
        scene(), "WEBP", quality=95, exif=b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    ),
    "jpeg cmyk": lambda: as_file(scene("CMYK"), "JPEG", quality=95),
    "jpeg grey": lambda: as_file(scene("L"), "JPEG", quality=95),
    "png 16 bits": deep,
    "png grey with alpha": lambda: as_file(scene("LA"), "PNG"),
    "png alpha": see_through,
    "png palette": lambda: as_file(scene("P"), "PNG"),
    "png two colours": lambda: as_file(scene("1"), "PNG"),
    "gif animated": animated,
    "bmp": lambda: as_file(scene(), "BMP"),
}


def assert_box(pixels: Any, what: str) -> None:
    """White in the box and black around it, but for two pixels at the rim, where JPEG blurs."""
    light = np.asarray(pixels)[..., :3].astype(int)
    assert light.shape == (HEIGHT, WIDTH, 3), what
    left, top, right, bottom = BOX
    assert light[top + 2 : bottom - 2, left + 2 : right - 2].min() > 200, what
    around = np.ones((HEIGHT, WIDTH), np.bool_)
    around[top - 2 : bottom + 2, left - 2 : right + 2] = False
    assert light[around].max() < 55, what


@pytest.mark.parametrize("name", FILES)
def test_training_scoring_and_the_page_see_the_displayed_frame(name: str, tmp_path: Path) -> None:
    content = FILES[name]()
    assert_box(decode_image(content), "decoded, for scoring and live predictions")
    assert_box(displayed(Image.open(io.BytesIO(content))), "the detector's own door")
    stored, suffix = storable(content)
    path = tmp_path / f"1{suffix}"
    path.write_bytes(stored)
    assert_box(cv2.imread(str(path), cv2.IMREAD_COLOR), "as the trainer reads it")
    assert_box(cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION), "as the trainer reads it")
    assert_box(Image.open(io.BytesIO(thumbnail(content, 10**6))), "the page's thumbnail")


@pytest.fixture(scope="module")
def page(chromium: str) -> Iterator[Any]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


DRAWN = """async url => {
  const image = new Image(); image.src = url; await image.decode();
  const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
  return [canvas.width, canvas.height, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
}"""


@pytest.mark.parametrize("name", FILES)
def test_a_browser_shows_the_same_frame(name: str, page: Any) -> None:
    """Label Studio divides by naturalWidth and naturalHeight, so what Chromium says is what annotators draw on."""
    url = f"data:image/{name.split()[0]};base64,{base64.b64encode(FILES[name]()).decode()}"
    width, height, data = page.evaluate(DRAWN, url)
    assert_box(np.array(data).reshape(height, width, 4), "in Chromium")
