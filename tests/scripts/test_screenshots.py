from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import screenshots


def test_without_a_chromium_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["screenshots", "--out", str(tmp_path / "docs")])
    assert screenshots.main() == 1
    assert "apt-get install chromium" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
