"""Weights, embeddings, manifests: a folder by default, any fsspec URL (s3://...) for many hosts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from worker.errors import ArtifactDamaged, NotFound


class Artifacts:
    """Files by key (`p7/r000002/weights.pt`). A key is written once; reading checks the SHA-256 where it is known."""

    def __init__(self, root: str, cache: Path) -> None:
        self.root = root.rstrip("/")
        self._cache = cache
        self._fs, self._base = fsspec.core.url_to_fs(self.root)

    def _path(self, key: str) -> str:
        if ".." in Path(key).parts or key.startswith("/"):
            raise NotFound(f"{key!r} is no artifact key")
        return f"{self._base}/{key}"

    def put(self, key: str, content: bytes) -> str:
        """Write whole or not at all; the SHA-256."""
        path = self._path(key)
        if "file" in _protocols(self._fs):
            _write_atomically(Path(path), content)
        else:  # object stores show an object only when its upload is complete
            self._fs.pipe_file(path, content)
        return sha256(content)

    def get(self, key: str, expected_sha256: str | None = None) -> bytes:
        """
        Raises:
            NotFound: no such artifact.
            ArtifactDamaged: its SHA-256 is not the expected one.
        """
        try:
            content = bytes(self._fs.cat_file(self._path(key)))
        except FileNotFoundError as error:
            raise NotFound(f"artifact {key} is not in {self.root}") from error
        if expected_sha256 is not None and sha256(content) != expected_sha256:
            raise ArtifactDamaged(f"artifact {key} is not what was written: its SHA-256 should be {expected_sha256}")
        return content

    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(self._path(key)))

    def delete_like(self, pattern: str) -> None:
        """Delete what matches a key with wildcards (`p7/r000002/embeddings-*.npy`); nothing that matches is fine."""
        for path in self._fs.glob(self._path(pattern)):
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                continue  # another worker was faster

    def local(self, key: str, expected_sha256: str) -> Path:
        """A checked local copy, kept by its SHA-256: for readers that need a file."""
        path = self._cache / f"{expected_sha256}{Path(key).suffix}"
        if not path.is_file() or sha256(path.read_bytes()) != expected_sha256:
            _write_atomically(path, self.get(key, expected_sha256))
        return path

    def put_arrays(self, key: str, arrays: Mapping[str, np.ndarray[Any, Any]], note: Any = None) -> str:
        """Arrays, and a JSON note, as one .npz."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, **{_NOTE: np.frombuffer(json.dumps(note).encode(), dtype=np.uint8)})  # type: ignore[arg-type]
        return self.put(key, buffer.getvalue())

    def get_arrays(self, key: str) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        with np.load(io.BytesIO(self.get(key)), allow_pickle=False) as stored:  # a pickle could run code
            arrays = {name: stored[name] for name in stored.files if name != _NOTE}
            note = json.loads(stored[_NOTE].tobytes()) if _NOTE in stored.files else None
        return arrays, note


_NOTE = "__note__"


def round_key(project_id: int, number: int, name: str) -> str:
    return f"p{project_id}/r{number:06d}/{name}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
