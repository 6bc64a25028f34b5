from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from demo import label_studio_server
from demo.label_studio_server import PYTHON_VARIABLE, LabelStudioServer, create_annotator, label_studio_python
from worker.errors import Conflict, HardfirstError, LabelStudioRefused, LabelStudioUnavailable

LABEL_CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="bolt"/></RectangleLabels></View>"""

FAKE_LABEL_STUDIO = """#!/usr/bin/env python3
import os, sys
if sys.argv[1] == "version":
    open(os.path.join(os.environ["LABEL_STUDIO_BASE_DATA_DIR"], "label_studio.sqlite3"), "w").close()
    open(os.path.join(os.environ["LABEL_STUDIO_BASE_DATA_DIR"], ".env"), "w").write("SECRET_KEY=of the template")
    sys.exit(0)
print("environment:", sorted(os.environ))
print("token:", os.environ["LABEL_STUDIO_USER_TOKEN"])
sys.exit(7)
"""


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation whose Label Studio migrates in no time and ends with code 7 when it is started."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "label-studio").write_text(FAKE_LABEL_STUDIO)
    (folder / "python").symlink_to(Path(sys.executable).resolve())
    monkeypatch.setenv("HARDFIRST_CACHE", str(tmp_path / "cache"))
    return folder / "python"


def test_without_an_installation_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr("demo.label_studio_server.SET_UP", tmp_path / "setup.sh")  # as in an installed package
    with pytest.raises(HardfirstError, match="`make demo` and `make test` make one"):
        label_studio_python()
    with pytest.raises(HardfirstError, match="there is no label-studio beside it"):
        LabelStudioServer(tmp_path / "data", python=str(tmp_path / "python")).start()


def test_a_clone_uses_the_environment_its_set_up_makes(
    tmp_path: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "setup.sh"
    script.write_text(f'#!/bin/sh\n[ "$1" = label-studio ] && echo {fake_python}\n')
    script.chmod(0o755)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr("demo.label_studio_server.SET_UP", script)
    assert label_studio_python() == fake_python
    script.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(HardfirstError, match="could not be made"):
        label_studio_python()


def test_a_port_in_use_is_refused(tmp_path: Path, fake_python: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"port {port} is taken"):
            LabelStudioServer(tmp_path / "data", port=port, python=str(fake_python)).start()


def test_one_that_ends_at_once_is_reported_without_its_token(
    tmp_path: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example")
    server = LabelStudioServer(tmp_path / "data", token="a-secret-token", python=str(fake_python))
    with pytest.raises(LabelStudioUnavailable, match="ended with code 7") as caught:
        server.start()
    assert "token: ***" in str(caught.value)
    assert "a-secret-token" not in str(caught.value) + repr(server)
    assert "DATABASE_URL" not in str(caught.value)
    assert "HTTP_PROXY" not in str(caught.value)
    assert server.pid is None


def test_every_copy_of_the_migrated_folder_has_a_secret_key_of_its_own(tmp_path: Path, fake_python: Path) -> None:
    label_studio_server.copy_migrated_folder(fake_python, tmp_path / "one")
    label_studio_server.copy_migrated_folder(fake_python, tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [".env", "label_studio.sqlite3"]
    one, two = ((tmp_path / name / ".env").read_text() for name in ("one", "two"))
    assert re.fullmatch(r"SECRET_KEY=[0-9a-f]{64}\n", one)  # with a dollar sign in front it would not be read back
    assert one != two
    assert len(list((tmp_path / "cache").glob("ls-data-????????????????"))) == 1
    assert not list((tmp_path / "cache").glob("*.unfinished"))


@pytest.mark.slow
def test_it_knows_the_admin_it_was_given(label_studio: LabelStudioServer) -> None:
    headers = {"Authorization": f"Token {label_studio.token}"}
    user = httpx.get(f"{label_studio.url}/api/current-user/whoami", headers=headers, timeout=60).json()
    assert user["email"] == label_studio.username
    assert httpx.get(f"{label_studio.url}/api/version", timeout=60).json()["release"] == "1.23.2"


@pytest.mark.slow
def test_an_annotator_can_ask_for_the_next_task(label_studio: LabelStudioServer) -> None:
    headers = {"Authorization": f"Token {label_studio.token}"}
    admin = httpx.Client(base_url=label_studio.url, headers=headers, timeout=60)
    token = create_annotator(label_studio.url, label_studio.token, "annotator@example.com", "annotator-pw")
    project = admin.post("/api/projects", json={"title": "annotators", "label_config": LABEL_CONFIG}).json()["id"]
    admin.post(f"/api/projects/{project}/import", json=[{"image": "http://example.com/1.png"}]).raise_for_status()
    as_annotator = {"Authorization": f"Token {token}"}
    task = httpx.get(f"{label_studio.url}/api/projects/{project}/next", headers=as_annotator, timeout=60)
    assert task.status_code == 200
    assert task.json()["data"] == {"image": "http://example.com/1.png"}
    with pytest.raises(LabelStudioRefused, match=r"annotator@example\.com: User with this email already exists"):
        create_annotator(label_studio.url, label_studio.token, "annotator@example.com", "annotator-pw")
    with pytest.raises(LabelStudioRefused, match="no invitation: Label Studio answered 401"):
        create_annotator(label_studio.url, "not-a-token", "another@example.com", "annotator-pw")


def migrations_of(server: LabelStudioServer) -> tuple[int, str]:
    """How many its database has seen, and when the last one was made."""
    with contextlib.closing(sqlite3.connect(server.data_dir / label_studio_server.DATABASE_NAME)) as connection:
        return tuple(connection.execute("select count(*), max(applied) from django_migrations").fetchone())


@pytest.mark.slow
def test_a_stopped_server_is_gone_and_starts_again_on_its_folder(tmp_path: Path) -> None:
    if not os.environ.get(PYTHON_VARIABLE):
        pytest.skip(f"{PYTHON_VARIABLE} is not set, so there is no Label Studio to test with; `make test` sets it")
    server = LabelStudioServer(tmp_path / "data", token="first-token")
    with server:
        own = psutil.Process(server.pid)
        group = [process.pid for process in (own, *own.children(recursive=True))]
        first_port = server.port
    assert server.pid is None
    assert not any(psutil.pid_exists(pid) for pid in group)
    migrations = migrations_of(server)
    assert migrations[0] > 0
    with server:
        assert server.port == first_port
    assert migrations_of(server) == migrations  # none was made again
    with pytest.raises(LabelStudioUnavailable, match="does not know the token"):
        LabelStudioServer(tmp_path / "data", token="second-token").start()
