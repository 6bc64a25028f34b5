"""Images that need not come through Label Studio: its local files where they are mounted, and buckets.

What a task names is anybody's: only what lies below the mounted folder, or in a bucket that the deployment lists, is
read. Everything else is left to Label Studio.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from worker.errors import ImageUnusable, SettingsInvalid

log = logging.getLogger(__name__)

EXTRAS = {"s3": "s3", "gs": "gcs"}  # scheme -> our optional dependency that reads it


class LocalFiles:
    """The folder that Label Studio serves as /data/local-files/?d=..., as this machine sees it.

    Args:
        root: Label Studio's LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT.
        max_bytes: more than this is not read.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = os.path.realpath(root)
        self._max_bytes = max_bytes

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None when it is for Label Studio to say: not here, or a link that leads out of the root.

        Args:
            name: the path below the root, as in `?d=`.

        Raises:
            ImageUnusable: the path climbs, or the file is too large or empty.
        """
        if ".." in name.split("/") or "\\" in name or "\0" in name:
            raise ImageUnusable(f"?d={name[:100]!r} leads out of the folder of local files. Name a file below it.")
        path = os.path.realpath(os.path.join(self._root, name.lstrip("/")))
        if os.path.commonpath([self._root, path]) != self._root:
            return None
        try:
            return self._content(path, name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            log.warning("%s cannot be read in HARDFIRST_LOCAL_FILES_ROOT, Label Studio is asked: %s", name[:160], error)
            return None

    def _content(self, path: str, name: str) -> bytes | None:
        # links were followed above; a pipe would hang, without O_NONBLOCK
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            return _checked(file.read(self._max_bytes + 1), f"?d={name[:160]}", self._max_bytes)


class Buckets:
    """Buckets that the deployment lists, read by fsspec with the credentials of this machine.

    Args:
        listed: "s3://pool", or with a folder "gs://pool/day"; nothing outside of these is read.
        max_bytes: more than this is not read.
    """

    def __init__(self, listed: Iterable[str], max_bytes: int) -> None:
        self._listed = tuple(one.rstrip("/") + "/" for one in listed)
        self._max_bytes = max_bytes

    def read(self, value: str) -> bytes | None:
        """An object's bytes; None when it is in no listed bucket.

        Args:
            value: s3://bucket/key or gs://bucket/key, as in a task.

        Raises:
            ImageUnusable: it is not there, may not be read, or is too large or empty.
            SettingsInvalid: the package that reads such buckets is not installed.
        """
        scheme, separator, path = value.partition("://")
        scheme = scheme.lower()
        if not separator or not f"{scheme}://{path}".startswith(self._listed):
            return None
        if {"..", "."} & set(path.split("/")) or "\0" in path:
            raise ImageUnusable(f"{value[:160]} is not the address of an object: it has '..' in it.")
        # never by the URL: fsspec would follow a chain in it (s3://pool/a.zip::file:///etc/passwd)
        filesystem = _filesystem(scheme)
        try:
            content = bytes(filesystem.cat_file(path, start=0, end=self._max_bytes + 1))
        except FileNotFoundError as error:
            raise ImageUnusable(f"{value[:160]} is not there.") from error
        except Exception as error:  # each of fsspec's backends has exceptions of its own
            told = f"{type(error).__name__} {str(error)[:200]}"
            raise ImageUnusable(f"{value[:160]} cannot be read with this machine's credentials: {told}") from error
        return _checked(content, value[:160], self._max_bytes)


def _filesystem(scheme: str) -> Any:
    """Asked for at each read: fsspec keeps it, and makes another after a fork."""
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise SettingsInvalid(
            f"HARDFIRST_IMAGE_BUCKETS has {scheme}://, and what reads it is not installed ({error}): "
            f"pip install 'hardfirst[{EXTRAS.get(scheme, scheme)}]'"
        ) from error


def _checked(content: bytes, what: str, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise ImageUnusable(
            f"{what} is larger than {max_bytes / 1e6:g} MB. Shrink it, or raise HARDFIRST_IMAGE_MAX_MB."
        )
    if not content:
        raise ImageUnusable(f"{what} is empty (0 bytes).")
    return content
