from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from worker.artifacts import Artifacts, round_key, sha256
from worker.errors import ArtifactDamaged, NotFound


@pytest.fixture(params=["folder", "object store"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "folder":
        return Artifacts(str(tmp_path / "artifacts"), tmp_path / "cache")
    fsspec.filesystem("memory").store.clear()
    return Artifacts("memory://bucket/folder", tmp_path / "cache")


def test_a_key_says_project_and_round() -> None:
    assert round_key(7, 12, "weights.pt") == "p7/r000012/weights.pt"


def test_what_is_put_is_got(artifacts: Artifacts) -> None:
    digest = artifacts.put("p7/r000001/a.bin", b"content")
    assert digest == hashlib.sha256(b"content").hexdigest() == sha256(b"content")
    assert artifacts.get("p7/r000001/a.bin") == b"content"
    assert artifacts.get("p7/r000001/a.bin", digest) == b"content"
    assert artifacts.exists("p7/r000001/a.bin")
    assert not artifacts.exists("p7/r000001/b.bin")
    artifacts.put("p7/r000001/a.bin", b"again")
    assert artifacts.get("p7/r000001/a.bin") == b"again"


def test_what_is_not_there_or_not_what_was_written_is_named(artifacts: Artifacts) -> None:
    with pytest.raises(NotFound, match=r"artifact p7/nosuch is not in "):
        artifacts.get("p7/nosuch")
    artifacts.put("p7/a", b"content")
    with pytest.raises(ArtifactDamaged, match=r"artifact p7/a is not what was written: its SHA-256 should be 00ff"):
        artifacts.get("p7/a", "00ff")


@pytest.mark.parametrize("key", ["../a", "p7/../../a", "/etc/passwd", "p7/.."])
def test_a_key_does_not_leave_its_root(artifacts: Artifacts, key: str) -> None:
    for use in (artifacts.get, artifacts.exists, lambda found: artifacts.put(found, b"")):
        with pytest.raises(NotFound, match="is no artifact key"):
            use(key)


def test_a_local_copy_is_checked_and_made_again_when_damaged(artifacts: Artifacts, tmp_path: Path) -> None:
    digest = artifacts.put("p7/r000001/weights.pt", b"weights")
    path = artifacts.local("p7/r000001/weights.pt", digest)
    assert path == tmp_path / "cache" / f"{digest}.pt"
    assert path.read_bytes() == b"weights"
    path.write_bytes(b"half")
    assert artifacts.local("p7/r000001/weights.pt", digest).read_bytes() == b"weights"
    artifacts.put("p7/r000001/weights.pt", b"others")
    assert artifacts.local("p7/r000001/weights.pt", digest).read_bytes() == b"weights"  # by its SHA-256: still right
    path.unlink()
    with pytest.raises(ArtifactDamaged):
        artifacts.local("p7/r000001/weights.pt", digest)
    assert not path.exists()


def test_arrays_and_a_note_travel_together(artifacts: Artifacts) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4))}
    artifacts.put_arrays("p7/x.npz", arrays, {"scale": 0.5, "name": "größe"})
    found, note = artifacts.get_arrays("p7/x.npz")
    assert note == {"scale": 0.5, "name": "größe"}
    assert sorted(found) == ["a", "b"]
    assert np.array_equal(found["a"], arrays["a"])
    assert found["b"].shape == (0, 4)
    artifacts.put_arrays("p7/y.npz", {})
    assert artifacts.get_arrays("p7/y.npz") == ({}, None)


def test_an_array_file_runs_no_code(artifacts: Artifacts) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        artifacts.put_arrays("p7/x.npz", {"a": np.array([object()])}) and artifacts.get_arrays("p7/x.npz")


def test_a_write_that_fails_leaves_the_old_content_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(str(tmp_path / "artifacts"), tmp_path / "cache")
    artifacts.put("p7/a", b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        artifacts.put("p7/a", b"new")
    assert artifacts.get("p7/a") == b"old"
    assert [path.name for path in (tmp_path / "artifacts" / "p7").iterdir()] == ["a"]
