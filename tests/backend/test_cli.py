"""The command line: what is started, and what is said when it cannot be."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from demo.factory import render

ROOT = Path(__file__).resolve().parent.parent.parent


def _hardfirst(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "backend.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(url: str, process: subprocess.Popen[str], seconds: float = 60) -> httpx.Response:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        try:
            return httpx.get(url, timeout=5, trust_env=False)
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(url)


def _page(port: int) -> str:
    return httpx.get(f"http://127.0.0.1:{port}/", timeout=60, trust_env=False).text


def test_up_starts_without_a_token_says_what_to_do_and_leaves_nothing_behind(tmp_path: Path) -> None:
    port = _free_port()
    process = _hardfirst(
        "up", "--data", str(tmp_path / "data"), "--port", str(port), LABEL_STUDIO_API_KEY="", HARDFIRST_WEIGTHS="x.pt"
    )
    try:
        assert _await(f"http://127.0.0.1:{port}/health", process).json()["status"] == "UP"
        config = (ROOT / "label_config.xml").read_text()
        body = {"project": "5.1", "schema": config, "extra_params": None}
        answer = httpx.post(f"http://127.0.0.1:{port}/setup", json=body, timeout=60, trust_env=False)
        assert (answer.status_code, answer.json()) == (200, {"model_version": "hardfirst-pending"})
        deadline = time.monotonic() + 60
        while "LABEL_STUDIO_API_KEY" not in (page := _page(port)) and time.monotonic() < deadline:
            time.sleep(0.5)  # a page waits half a second for who is away, which may be too little while all start
        assert "LABEL_STUDIO_API_KEY" in page
        assert "Access Token" in page
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "set LABEL_STUDIO_API_KEY" in output
    assert "HARDFIRST_WEIGTHS is no setting and counts for nothing; did you mean 'HARDFIRST_WEIGHTS'?" in output
    assert "overcommit" not in output  # Valkey's, of the machine: nothing a newcomer could do about
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["up"], {"HARDFIRST_PORT": "http"}, "HARDFIRST_PORT: Input should be a valid integer"),
        (["up"], {"LABEL_STUDIO_URL": "localhost:8080"}, "LABEL_STUDIO_URL: an address begins with http://"),
        (["up"], {"HARDFIRST_USER": "ann"}, "belong together"),
        (["up"], {"REDIS_URL": "localhost"}, "REDIS_URL must start with"),
        (["demo", "--exit", "--data", "nowhere.yaml"], {}, "nowhere.yaml cannot be read"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_code_1(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    process = _hardfirst(*arguments, HARDFIRST_DATA_DIR=str(tmp_path), **environment)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert sentence in output
    assert "Traceback" not in output


def test_it_calls_itself_by_the_name_people_type() -> None:
    output, _ = _hardfirst("upload").communicate(timeout=120)
    assert output.startswith("Usage: hardfirst upload [OPTIONS]")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["EMPTY"], "There are no images in"),
        (["nowhere"], "There is no nowhere: name a folder"),
        (["EMPTY", "--k", "0"], "Invalid value for '--k'"),
        (["EMPTY", "--strategy", "hybird"], "Did you mean 'hybrid'"),
        (["EMPTY", "--strategy", "coverage", "--option", "alpha=1"], "nothing is called 'alpha'"),
    ],
)
def test_score_refuses_in_a_sentence_with_code_2(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / "empty") if one == "EMPTY" else one for one in arguments]
    output, code = _score(tmp_path, *given)
    assert code == 2, output
    assert sentence in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_score_without_weights_says_what_it_did_and_what_to_do_next(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    for index in range(6):
        render(1, index, (96, 96))[0].save(tmp_path / "pool" / f"{index}.jpg")
    (tmp_path / "pool" / "broken.jpg").write_bytes(b"no image")
    output, code = _score(tmp_path, str(tmp_path / "pool"), "--k", "2", "--with-random")
    assert code == 0, output
    assert "6 images ranked by coverage: 7 scored in" in output
    assert "cannot be known" in output
    assert "broken.jpg: it is not an image" in output
    assert "Next: label the 2 of top.txt and the 2 of random.txt" in output
    for line in output.splitlines():
        if line.startswith("  /"):
            assert Path(line.split()[0]).is_file()
    again, _ = _score(tmp_path, str(tmp_path / "pool"), "--k", "3")
    assert re.search(r"\b0 scored in \d\.\d s, 7 known from before", again), again


def test_score_stopped_by_a_signal_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    first = tmp_path / "pool" / "0000.jpg"
    render(1, 0, (96, 96))[0].save(first)
    for index in range(1, 3000):
        (tmp_path / "pool" / f"{index:04d}.jpg").symlink_to(first)
    process = _hardfirst("score", str(tmp_path / "pool"), "--out", str(tmp_path / "out"), YOLO_OFFLINE="true")
    try:
        while not list((tmp_path / "out").glob(".state/*/part-*.npz")):
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "the same command goes on from there" in output
    assert not (tmp_path / "out" / "manifest.json").exists()


def _score(folder: Path, *arguments: str) -> tuple[str, int]:
    process = _hardfirst("score", *arguments, "--out", str(folder / "out"), YOLO_OFFLINE="true", COLUMNS="200")
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    return output, process.returncode
