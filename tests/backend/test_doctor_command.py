from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from backend import cli, doctor_command
from worker.doctor import Check, Status
from worker.settings import Settings

CHECKS = [
    Check("store", Status.OK, "at the newest migration", mended=True),
    Check("queue", Status.FAILED, "does not \x1b[31manswer [red]at all[/red]", "Start it"),
    Check("webhook", Status.SKIPPED, "not looked at: project comes first", project_id=7),
    Check("labels", Status.WARNING, "the model does not know 'wire'", "Start a round", project_id=7),
]


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    doctor_command._print(iter(CHECKS))
    return capsys.readouterr().out


def test_each_check_is_a_line_that_needs_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys).splitlines() == [
        "✓ ok       store            mended: at the newest migration",
        "✗ failed   queue            does not \\x1b[31manswer [red]at all[/red]",
        "             -> Start it",
        "",
        "project 7",
        "– skipped  webhook          not looked at: project comes first",
        "! warning  labels           the model does not know 'wire'",
        "             -> Start a round",
        "",
        "1 ok, 1 warning, 1 failed, 1 skipped; 1 mended",
    ]


def test_colours_where_somebody_looks_and_none_where_they_are_unwanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[31m✗ failed" in printed(capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in printed(capsys)


def test_json_is_one_object_and_a_failure_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://127.0.0.1:9")
    answer = CliRunner().invoke(cli.app, ["doctor", "--json", "--quick"])
    told = json.loads(answer.stdout)
    assert (answer.exit_code, told["ok"]) == (1, False)
    assert [check["name"] for check in told["checks"]][:4] == ["Label Studio", "token", "queue", "store"]
    assert set(told["checks"][0]) == {"name", "status", "sentence", "fix", "project_id", "mended"}
    assert list(tmp_path.iterdir()) == []  # looking makes nothing


def test_without_a_failure_the_code_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [check for check in CHECKS if check.status is not Status.FAILED]
    monkeypatch.setattr(doctor_command, "examine", lambda *args, **kwargs: iter(fine))
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0


def test_what_is_wrong_at_the_start_is_told_a_line_each(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{probe.getsockname()[1]}"
    values = {"label_studio_url": away, "data_dir": tmp_path, "weights": "/nowhere/mine.pt"}
    told: list[str] = []
    doctor_command.tell_first(Settings(_env_file=None, **values), told.append)
    assert told[0].startswith(f"Label Studio at {away} does not answer: ")
    assert told[0].endswith(". -> Start Label Studio, or set LABEL_STUDIO_URL to where it answers")
    assert told[1:] == [
        "HARDFIRST_WEIGHTS is '/nowhere/mine.pt': there is no such file here. "
        "-> Put the file there, or correct HARDFIRST_WEIGHTS"
    ]
