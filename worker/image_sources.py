"""Which images a command is about: folders, globs, text lists and fsspec URLs, as one list in a fixed order."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import fsspec
from PIL import Image

from worker.errors import BadRequest, ImageUnusable
from worker.images import MAX_PIXELS, decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif")
LIST_MAX_BYTES = 200_000_000  # a million paths; what is larger is no list
_LOCAL = {"file", "local"}
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


class ImageAway(ImageUnusable):
    """The image's bytes cannot be had, now: another time it may be there."""


@dataclass(frozen=True, order=True)
class SourceImage:
    """One image. Names that are not UTF-8 hold surrogates, as everywhere in Python: see `printable`."""

    key: str  # path relative to the folder all images share, "/" between folders
    path: str  # absolute path, or URL
    stamp: str = ""  # size and time of change, or etag: another one for another content
    size: int | None = None  # bytes
    missing: bool = False


def find_images(sources: Sequence[str]) -> list[SourceImage]:
    """All images the sources name, each once, ordered by key.

    Args:
        sources: folders (searched with all folders in them; hidden files and folders are left out), globs, images,
            text files with one path or URL a line (relative to the list's folder, else to the working directory), and
            the same as fsspec URLs.

    Raises:
        BadRequest: a source is not there, is none of these, or there is not one image.
    """
    found: dict[str, SourceImage] = {}
    for source in sources:
        for image in _of_source(source):
            found.setdefault(image.path, image)
    if not found or all(image.missing for image in found.values()):
        named = ", ".join(printable(source) for source in sources)
        why = f"none of the {len(found)} files named there exists" if found else f"looked for {', '.join(SUFFIXES)}"
        raise BadRequest(f"There are no images in {named} ({why}).")
    root = _root(sources, list(found))
    return sorted(_with_key(image, root) for image in found.values())


def printable(name: str) -> str:
    """A name as text that any file, page or terminal takes: bytes that are no UTF-8 and control characters escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    # also what would turn the reading direction of a page
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


class ImageReader:
    """Opens source images. Safe to share between threads."""

    def __init__(self, max_bytes: int = 64_000_000, max_pixels: int = MAX_PIXELS) -> None:
        self._max_bytes, self._max_pixels = max_bytes, max_pixels

    def open(self, image: SourceImage) -> Image.Image:
        """The pixels: RGB, in the displayed frame, fully decoded.

        Raises:
            ImageAway: its bytes cannot be had.
            ImageUnusable: too large, or no image.
        """
        return self.open_with_content(image)[0]

    def open_with_content(self, image: SourceImage) -> tuple[Image.Image, bytes]:
        """As `open`, and the file's bytes."""
        content = self.read(image)
        return self.decode(content), content

    def decode(self, content: bytes) -> Image.Image:
        """The pixels of a file: RGB, in the displayed frame.

        Raises:
            ImageUnusable: too large, or no image.
        """
        return decode_image(content, self._max_pixels)

    def read(self, image: SourceImage) -> bytes:
        """The file's bytes.

        Raises:
            ImageAway: they cannot be had.
            ImageUnusable: they are too many.
        """
        if image.missing:
            raise ImageAway("there is no such file")
        if (image.size or 0) > self._max_bytes:
            raise ImageUnusable(
                f"it has {image.size:,} bytes; at most {self._max_bytes:,} are read. Shrink it, or raise "
                "HARDFIRST_IMAGE_MAX_MB."
            )
        try:
            if "://" not in image.path:
                return Path(image.path).read_bytes()
            filesystem, path = fsspec.core.url_to_fs(image.path)
            return bytes(filesystem.cat_file(path))
        except Exception as error:  # each of fsspec's backends has exceptions of its own
            raise ImageAway(f"it cannot be read: {type(error).__name__} {error}") from error


class Naming(Protocol):
    """How Label Studio's tasks are to name images: at most one of the two."""

    @property
    def image_url_prefix(self) -> str | None: ...

    @property
    def local_files_root(self) -> Path | None: ...


def check_references(naming: Naming, images: Sequence[SourceImage]) -> None:
    """Refuse, before hours of work, what would end in references that cannot be made.

    Raises:
        BadRequest: both ways of naming images, or an image outside of the root.
    """
    if naming.image_url_prefix is not None and naming.local_files_root is not None:
        raise BadRequest("--image-url-prefix and --local-files-root are two ways to name images: give one.")
    for image in images:
        reference_of(image, naming)


def reference_of(image: SourceImage, naming: Naming) -> str:
    """How Label Studio's task names the image.

    Raises:
        BadRequest: it is not below --local-files-root.
    """
    if naming.image_url_prefix is not None:
        prefix = naming.image_url_prefix
        return f"{prefix}{'' if prefix.endswith(('/', '=', '?', '&')) else '/'}{_quoted(image.key)}"
    if naming.local_files_root is not None:
        root = os.path.abspath(naming.local_files_root.expanduser()).rstrip("/")
        if not image.path.startswith(f"{root}/"):
            raise BadRequest(
                f"{printable(image.path)} is not below --local-files-root {root}, from which Label Studio serves files."
            )
        return f"/data/local-files/?d={_quoted(image.path.removeprefix(f'{root}/'))}"
    return printable(image.path if "://" in image.path else image.key)


def _quoted(path: str) -> str:
    return quote(os.fsencode(path))


def _of_source(source: str) -> Iterator[SourceImage]:
    if "://" not in source:
        return _of_local(source)
    filesystem, path = _filesystem(source)
    if _is_local(filesystem):
        return _of_local(path)
    try:
        return iter(list(_of_remote(filesystem, path, source)))
    except BadRequest:
        raise
    except Exception as error:  # each of fsspec's backends has exceptions of its own
        raise BadRequest(f"{without_password(source)} cannot be listed: {type(error).__name__} {error}") from error


def _filesystem(url: str) -> tuple[Any, str]:
    if "::" in url:  # of what is inside, fsspec tells names that do not lead there again
        raise BadRequest(f"{without_password(url)} leads through an archive or cache: unpack it, and name the folder.")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the message names the package to install, or the protocols known
        raise BadRequest(f"{without_password(url)} cannot be opened: {error}") from error
    except Exception as error:  # some backends connect at once, and have exceptions of their own
        raise BadRequest(f"{without_password(url)} cannot be opened: {type(error).__name__} {error}") from error
    return filesystem, str(path)


def _is_local(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return bool(_LOCAL & ({protocol} if isinstance(protocol, str) else set(protocol)))


def _of_local(source: str) -> Iterator[SourceImage]:
    path = os.path.abspath(os.path.expanduser(source))
    if os.path.isdir(path):
        return (_local(one) for one in _walk(path, set()))
    if os.path.exists(path):
        return iter([_local(path)]) if _is_image(path) else _of_list(Path(path).read_bytes, os.path.getsize(path), path)
    if glob.has_magic(source):
        return (_local(one) for one in glob.iglob(path, recursive=True) if _is_image(one) and os.path.isfile(one))
    raise BadRequest(f"There is no {printable(source)}: name a folder, a glob, a text list of paths, or a URL.")


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Images below a folder. Links to folders are followed, each folder once: links may form a circle."""
    known = os.stat(folder)
    if (known.st_dev, known.st_ino) in seen:
        return
    seen.add((known.st_dev, known.st_ino))
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)  # which of two links to one folder counts
    for entry in ordered:
        if entry.name.startswith("."):  # thumbnails, and the shadow files of macOS
            continue
        if entry.is_dir():
            yield from _walk(entry.path, seen)
        elif _is_image(entry.name):
            yield entry.path


def _local(path: str) -> SourceImage:
    try:
        known = os.stat(path)
    except (OSError, ValueError):  # gone, a broken link, or a name that can not be one
        return SourceImage(path, path, missing=True)
    if not stat.S_ISREG(known.st_mode):  # to read a pipe would be to wait for ever
        return SourceImage(path, path, missing=True)
    return SourceImage(path, path, f"{known.st_size} {known.st_mtime_ns}", known.st_size)


def _of_list(read: Any, size: int, path: str) -> Iterator[SourceImage]:
    """One image a line."""
    content = b"" if size > LIST_MAX_BYTES else read()
    if size > LIST_MAX_BYTES or b"\0" in content:
        raise BadRequest(f"{printable(path)} is neither an image that is read ({', '.join(SUFFIXES)}) nor a text list.")
    lines = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff").split("\n")
    for line in filter(None, (line.strip() for line in lines)):
        yield _listed(line, path)


def _listed(line: str, list_path: str) -> SourceImage:
    if "://" in line:
        return _listed_url(line)
    folder, separator, _ = list_path.rpartition("/")
    if "://" in list_path and not line.startswith("/"):
        return _listed_url(f"{folder}/{line}")
    beside = os.path.abspath(os.path.join(folder + separator, os.path.expanduser(line)))
    return _local(os.path.abspath(line) if os.path.exists(line) and not os.path.exists(beside) else beside)


def _listed_url(url: str) -> SourceImage:
    filesystem, path = _filesystem(url)
    if _is_local(filesystem):
        return _local(path)
    try:
        return _remote(filesystem, path, filesystem.info(path))
    except FileNotFoundError:
        known_as = filesystem.unstrip_protocol(path)
        return SourceImage(known_as, known_as, missing=True)
    except Exception as error:  # each of fsspec's backends has exceptions of its own
        raise BadRequest(f"{without_password(url)} cannot be looked up: {type(error).__name__} {error}") from error


def _of_remote(filesystem: Any, path: str, source: str) -> Iterable[SourceImage]:
    if glob.has_magic(path):
        infos = filesystem.glob(path, detail=True)
    elif filesystem.isdir(path):
        infos = filesystem.find(path, detail=True)
    elif filesystem.exists(path):
        info = filesystem.info(path)
        if not _is_image(path):
            return _of_list(lambda: filesystem.cat_file(path), int(info.get("size") or 0), source)
        infos = {path: info}
    else:
        raise BadRequest(f"There is nothing at {without_password(source)}.")
    return [_remote(filesystem, name, info) for name, info in infos.items() if _wanted(name, path, info)]


def _wanted(name: str, path: str, info: Mapping[str, Any]) -> bool:
    below = name.removeprefix(path) if not glob.has_magic(path) else posixpath.basename(name)
    return info.get("type") != "directory" and _is_image(name) and "/." not in f"/{below}".replace("//", "/")


def _remote(filesystem: Any, path: str, info: Mapping[str, Any]) -> SourceImage:
    url = filesystem.unstrip_protocol(path)
    size = info.get("size")
    stamp = next((str(info[name]) for name in _STAMPS if info.get(name)), "")
    return SourceImage(url, url, f"{size} {stamp}", None if size is None else int(size))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _root(sources: Sequence[str], found: Iterable[str]) -> str:
    """The folder that keys are relative to: the one that was named, else what all paths have in common."""
    if len(sources) == 1:
        named = os.path.abspath(os.path.expanduser(sources[0]))
        if "://" in sources[0]:
            filesystem, path = _filesystem(sources[0])
            named = path if _is_local(filesystem) else filesystem.unstrip_protocol(path)
        named = named.rstrip("/")
        if all(path.startswith(f"{named}/") for path in found):
            return named
    folders = [path.split("/")[:-1] for path in found]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    return "/".join(names[0] for names in shared)


def _with_key(image: SourceImage, root: str) -> SourceImage:
    return replace(image, key=image.path.removeprefix(f"{root}/").lstrip("/"))


def without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", printable(url))
