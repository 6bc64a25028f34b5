from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts import label_studio_screenshots
from worker.settings import ProjectSettings, parse_project_settings


def test_without_a_chromium_it_says_what_to_install_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["label_studio_screenshots", "--out", str(tmp_path / "docs")])
    assert label_studio_screenshots.main() == 1
    assert "apt-get install chromium" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_what_is_typed_and_what_is_shown_are_settings_that_are_accepted() -> None:
    assert parse_project_settings(label_studio_screenshots.SHOWN_PARAMS) == ProjectSettings(batch_size=100, epochs=60)
    typed = parse_project_settings(label_studio_screenshots.PARAMS)
    assert (typed.batch_size, typed.holdout_size) == (24, 60)
    # labels that are there and not held out open the round whose boxes are pictured
    assert typed.batch_size <= label_studio_screenshots.IMAGES - label_studio_screenshots.UNLABELLED - 60


def test_a_picture_keeps_its_colours_in_a_palette(tmp_path: Path) -> None:
    drawn = Image.new("RGB", (8, 4), (255, 255, 255))
    drawn.paste((200, 30, 40), (0, 0, 4, 4))
    png = io.BytesIO()
    drawn.save(png, "PNG")
    label_studio_screenshots._save(png.getvalue(), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as opened:
        assert (opened.mode, opened.size) == ("P", (8, 4))
        kept = opened.convert("RGB")
        assert kept.getpixel((1, 1)) == (200, 30, 40)
        assert kept.getpixel((6, 1)) == (255, 255, 255)
