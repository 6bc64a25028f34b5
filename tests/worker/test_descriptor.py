"""worker.descriptor: near-duplicates close, everything else apart, on scenes drawn here."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from worker.descriptor import DESCRIPTOR_NAME, describe


def draw_scene(seed: int, floor: tuple[int, int, int] | None = None) -> Image.Image:
    """A noisy, unevenly lit floor with a few coloured objects."""
    rng = np.random.default_rng(seed)
    width, height = 320, 240
    base = np.array(floor or rng.integers(60, 180, 3))
    rows, columns = np.mgrid[:height, :width]
    light = rows / height * rng.uniform(-40, 40) + columns / width * rng.uniform(-40, 40)
    pixels = base + (light + rng.normal(0, 6, light.shape))[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 9))):
        x, y, side = rng.integers(0, 280), rng.integers(0, 200), rng.integers(15, 60)
        shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
        shape([x, y, x + side, y + side * rng.uniform(0.5, 1.5)], fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return image


def jpeg(image: Image.Image) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


def noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(float) + np.random.default_rng(9).normal(0, 8, (image.height, image.width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


NEAR_DUPLICATES = {
    "cropped by a percent": lambda image: image.crop((3, 2, 317, 238)),
    "shifted": lambda image: image.crop((3, 0, 320, 240)),
    "noisy": noisy,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.08),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.92),
    "compressed": jpeg,
    "half the size": lambda image: image.resize((160, 120)),
}


@pytest.mark.parametrize("change", NEAR_DUPLICATES)
def test_near_duplicates_are_above_the_default_threshold(change: str) -> None:
    for seed in range(12):
        image = draw_scene(seed)
        assert float(describe(image) @ describe(NEAR_DUPLICATES[change](image))) > 0.99, seed


@pytest.mark.parametrize("floor", [None, (110, 112, 105)])
def test_other_scenes_are_well_below(floor: tuple[int, int, int] | None) -> None:
    vectors = np.stack([describe(draw_scene(seed, floor)) for seed in range(40)])
    likeness = (vectors @ vectors.T)[np.triu_indices(40, 1)]
    assert likeness.max() < 0.9
    assert np.median(likeness) < 0.5


def test_one_object_more_is_another_image() -> None:
    image = draw_scene(3)
    changed = image.copy()
    ImageDraw.Draw(changed).rectangle([120, 80, 200, 160], fill=(250, 40, 40))
    assert float(describe(image) @ describe(changed)) < 0.97


def test_every_image_gives_a_unit_vector_of_one_size() -> None:
    sizes = {
        describe(image).shape
        for image in (
            Image.new("RGB", (1, 1)),
            Image.new("L", (5, 3000), 200),
            Image.new("RGBA", (40, 30), (1, 2, 3, 4)),
            Image.new("P", (20, 20)),
            draw_scene(0),
        )
    }
    assert sizes == {(246,)}
    for image in (Image.new("RGB", (9, 9), "white"), draw_scene(1)):
        vector = describe(image)
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_blank_images_are_alike_and_unlike_scenes() -> None:
    white, grey = describe(Image.new("RGB", (64, 48), "white")), describe(Image.new("RGB", (640, 480), (90, 90, 90)))
    assert float(white @ grey) > 0.99
    assert float(white @ describe(draw_scene(2))) < 0.9


def test_faint_noise_does_not_make_blank_images_differ() -> None:
    rng = np.random.default_rng(1)
    first, second = (Image.fromarray(rng.integers(118, 124, (200, 300, 3), dtype=np.uint8)) for _ in range(2))
    assert float(describe(first) @ describe(second)) > 0.99


def test_described_as_displayed() -> None:
    image = draw_scene(4)
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to display
    image.save(file, "PNG", exif=exif)
    turned = Image.open(file)
    turned.load()
    assert np.allclose(describe(turned), describe(ImageOps.exif_transpose(turned)), atol=1e-6)
    assert float(describe(turned) @ describe(image)) < 0.9


def test_sixteen_bits_are_not_clipped() -> None:
    grey = np.asarray(draw_scene(5).convert("L"))
    deep = Image.fromarray((grey.astype(np.uint16) << 8) + 7)
    assert float(describe(deep) @ describe(Image.fromarray(grey))) == pytest.approx(1, abs=1e-6)


def test_the_same_image_gives_the_same_vector() -> None:
    assert np.array_equal(describe(draw_scene(6)), describe(draw_scene(6)))
    assert DESCRIPTOR_NAME == "layout-colour-edges-1"
