"""Task data -> image bytes -> pixels: what may be fetched, from where, how much of it, and in which frame.

Where the value under the image key may point, and who is asked:

    /data/upload/..., /data/local-files/?d=...     Label Studio, with the access token (so are its other data paths)
    http(s)://<Label Studio>/data/...              the same, also under a loopback name or a name it is known by
    ... /data/local-files/?d=...                   first HARDFIRST_LOCAL_FILES_ROOT, where that folder is mounted
    s3://, gs:// in HARDFIRST_IMAGE_BUCKETS        the bucket, with the credentials of this machine
    s3://, gs://, azure-blob://                    Label Studio's presign address of the task, then where it redirects
    http(s)://<host in HARDFIRST_IMAGE_HOSTS>/...  that host, without credentials
    data:image/...;base64,...                      nobody
    anything else                                  refused: ImageUnusable says what to do

Redirects are followed by hand, at most three, each hop under the same rules. The token goes to Label Studio's own
address only, and no more after another host has answered. The displayed frame (EXIF orientation applied, as browsers
do) is the frame of every box.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

import httpx
import numpy as np
from PIL import ExifTags, Image

from worker.errors import CredentialsMissing, ImageUnusable, LabelStudioUnavailable
from worker.image_stores import Buckets, LocalFiles

MAX_REDIRECTS = 3  # presign -> bucket -> region is two
TIMEOUT_SECONDS = 60.0  # for one image: Label Studio proxies 64 MB from cloud storage at a few MB/s
MAX_PIXELS = 200_000_000  # the default of HARDFIRST_IMAGE_MAX_MEGAPIXELS
UNDEFINED_KEY = "$undefined$"  # Label Studio's key for imports made before there was a label config

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")  # no EPS, PDF, PSD: they run or wrap programs
_CLOUD_SCHEMES = ("s3", "gs", "azure-blob")
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
_DATA_PATHS = re.compile(
    r"^/(data/upload/|data/local-files/?$|storage-data/uploaded/?$|(tasks|projects)/\d+/(presign|resolve)/?$"
    r"|api/projects/\d+/file-proxy/?$)"
)
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_TRANSPOSES = {  # EXIF orientation -> how to get the displayed frame
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFetcher:
    """Fetches the images of tasks. Safe to share between threads; close it, or use it in a `with`.

    Args:
        label_studio_url: where Label Studio answers.
        auth_headers: gives the headers for Label Studio, fresh at each call (access tokens last minutes).
        allowed_hosts: other hosts that may be asked: "cdn.example.com" (ports 80 and 443), "minio:9000",
            "*.example.com".
        max_bytes: more than this is not read.
        max_pixels: more than this is not decoded.
        timeout: seconds for one image, redirects included.
        label_studio_names: further addresses under which tasks may name Label Studio, e.g. the `hostname` of
            /setup ("https://labels.example.com"). They are never contacted: such URLs are fetched from
            `label_studio_url`.
        local_files_root: the folder Label Studio serves local files from, where it is mounted here.
        buckets: s3:// and gs:// buckets (or folders in them) that are read straight.
        check_token: asked when Label Studio refuses an image: raises CredentialsMissing where it refuses all else too.
        transport: for tests; its responses must be streams.
    """

    def __init__(
        self,
        label_studio_url: str,
        auth_headers: Callable[[], dict[str, str]],
        allowed_hosts: frozenset[str] = frozenset(),
        max_bytes: int = 64_000_000,
        max_pixels: int = MAX_PIXELS,
        timeout: float = TIMEOUT_SECONDS,
        label_studio_names: frozenset[str] = frozenset(),
        local_files_root: Path | None = None,
        buckets: frozenset[str] = frozenset(),
        check_token: Callable[[], None] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base = httpx.URL(label_studio_url.rstrip("/"))
        self._names = {_origin(_parse_url(name)) for name in label_studio_names if name}
        self._auth_headers = auth_headers
        self._check_token = check_token
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._timeout = timeout
        self._local_files = None if local_files_root is None else LocalFiles(local_files_root, max_bytes)
        self._buckets = Buckets(buckets, max_bytes)
        self._client = httpx.Client(timeout=timeout, follow_redirects=False, transport=transport)

    @property
    def max_pixels(self) -> int:
        return self._max_pixels

    def fetch(self, task_data: Mapping[str, object], image_key: str, task_id: int | None = None) -> bytes:
        """The bytes of a task's image as they are served, at least one and at most `max_bytes`.

        Args:
            task_data: the task's `data`.
            image_key: `LabelMap.image_key`.
            task_id: needed for s3:// and the like, which Label Studio resolves per task.

        Raises:
            ImageUnusable: it may not or cannot be fetched; the message says which and what to do.
            LabelStudioUnavailable: Label Studio does not answer.
            CredentialsMissing: Label Studio does not accept the access token.
            SettingsInvalid: what reads a listed bucket is not installed.
        """
        value = _value_of(task_data, image_key)
        if value.startswith("data:"):
            return self._inline(value)
        if (content := self._buckets.read(value)) is not None:
            return content
        try:
            return self._follow(value, self._first_url(value, task_id))
        except ImageUnusable as error:
            if _is_in_cloud(value):  # the presign address alone says nothing
                raise ImageUnusable(f"{_shown(value)}: {error}") from error
            raise

    def _follow(self, value: str, first: httpx.URL) -> bytes:
        url, is_label_studio = self._route(first)
        if is_label_studio and (content := self._mounted(url)) is not None:
            return content
        may_authenticate = True
        deadline = time.monotonic() + self._timeout
        for _ in range(MAX_REDIRECTS + 1):
            may_authenticate = may_authenticate and is_label_studio
            answer = self._get(url, is_label_studio, may_authenticate, deadline)
            if isinstance(answer, bytes):
                return answer
            url, is_label_studio = self._route(answer)
        raise ImageUnusable(
            f"{_shown(value)} redirects more than {MAX_REDIRECTS} times. If Label Studio sends http to https, set "
            "LABEL_STUDIO_URL to the https address."
        )

    def _mounted(self, url: httpx.URL) -> bytes | None:
        """The file of a /data/local-files/?d=... address, where its folder is mounted here."""
        if self._local_files is None or self._path(url).rstrip("/") != "/data/local-files":
            return None
        return self._local_files.read(url.params.get("d", ""))

    def open(self, task_data: Mapping[str, object], image_key: str, task_id: int | None = None) -> Image.Image:
        """The pixels of a task's image: RGB, in the displayed frame, fully decoded.

        Raises:
            ImageUnusable, LabelStudioUnavailable, CredentialsMissing: as `fetch`, and when it cannot be decoded.
        """
        return decode_image(self.fetch(task_data, image_key, task_id), self._max_pixels)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> ImageFetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _inline(self, value: str) -> bytes:
        head, comma, body = value.partition(",")
        if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
            raise ImageUnusable(f"{_shown(head)} is not an image in base64 (data:image/png;base64,...).")
        if len(body) * 3 // 4 > self._max_bytes + 2:
            raise ImageUnusable(self._too_large("the data: URI"))
        try:
            content = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageUnusable(f"the data: URI is not base64: {error}") from error
        if not content:
            raise ImageUnusable("the data: URI is empty.")
        return content

    def _first_url(self, value: str, task_id: int | None) -> httpx.URL:
        if _is_in_cloud(value):
            if task_id is None:
                raise ImageUnusable("only Label Studio can resolve it, and needs the task's id.")
            encoded = base64.urlsafe_b64encode(value.encode()).decode()
            return self._on_label_studio(httpx.URL(f"/tasks/{task_id}/presign/?fileuri={encoded}"))
        if value.startswith("/") and not value.startswith("//"):
            return self._on_label_studio(_parse_url(value))
        return _parse_url(value)

    def _route(self, url: httpx.URL) -> tuple[httpx.URL, bool]:
        """The address to ask for `url`, and whether it is Label Studio's. Every hop passes here.

        Raises:
            ImageUnusable: nobody may be asked.
        """
        if url.scheme not in _DEFAULT_PORTS or not url.host or not 0 < (url.port or 80) < 65536:
            raise ImageUnusable(
                f"{_shown(url)} is not an address that images are fetched from. Use an upload, a storage of "
                "Label Studio, or http(s)."
            )
        if url.userinfo:
            raise ImageUnusable(f"{_shown(url)} has a password in it. Use a presigned URL or a storage instead.")
        if self._names_label_studio(url):
            self._check_path(url)
            return self._on_label_studio(url), True
        if not self._is_allowed(url):
            raise ImageUnusable(
                f"{_shown(url)} is on a host that images may not come from. If you trust it, add it: "
                f"HARDFIRST_IMAGE_HOSTS={_host_and_port(url)}"
            )
        return url, False

    def _names_label_studio(self, url: httpx.URL) -> bool:
        """Whether `url` means our Label Studio: its own address, or a data path under one of its other names.

        Storage sync writes Label Studio's idea of its own address (often http://localhost:8080), which need not be
        how we reach it. Such a URL is rewritten and never contacted, so a wrong guess costs a 404, not a secret.
        """
        if _origin(url) == _origin(self._base):
            return True
        known = _origin(url) in self._names or url.host == self._base.host or url.host in _LOOPBACK
        return known and bool(_DATA_PATHS.match(self._path(url))) and not self._is_allowed(url)

    def _check_path(self, url: httpx.URL) -> None:
        path = self._path(url)
        if path.startswith("/user/login"):
            raise CredentialsMissing(
                "Label Studio asked to log in instead of giving an image: LABEL_STUDIO_API_KEY is missing or not valid."
            )
        if not _DATA_PATHS.match(path) or ".." in path.split("/") or "\\" in path:
            raise ImageUnusable(f"{_shown(url)} is not a path where Label Studio keeps images (/data/upload/...).")

    def _path(self, url: httpx.URL) -> str:
        """The path within Label Studio, decoded: its address may have a path of its own (https://host/label-studio)."""
        return unquote(url.path).removeprefix(self._base.path.rstrip("/"))

    def _on_label_studio(self, url: httpx.URL) -> httpx.URL:
        prefix = self._base.raw_path.decode().rstrip("/")
        raw = url.raw_path.decode()
        path = raw if prefix and raw.startswith(prefix + "/") else prefix + raw
        return self._base.copy_with(raw_path=path.encode())

    def _is_allowed(self, url: httpx.URL) -> bool:
        port = url.port or _DEFAULT_PORTS[url.scheme]
        host = url.raw_host.decode().lower()  # as DNS has it: "xn--..." for a name that is not ASCII
        names = {url.host, host, *("*." + parent for parent in _parents(host))}
        if port in _DEFAULT_PORTS.values() and names & self._allowed_hosts:
            return True
        return bool({f"{name}:{port}" for name in names} & self._allowed_hosts)

    def _get(self, url: httpx.URL, is_label_studio: bool, authenticate: bool, deadline: float) -> bytes | httpx.URL:
        """The body at `url`, or the URL it redirects to."""
        headers = {"Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
        if authenticate:
            headers |= self._auth_headers()
        left = max(deadline - time.monotonic(), 0.01)
        try:
            with self._client.stream("GET", url, headers=headers, timeout=left) as response:
                if response.status_code in _REDIRECTS:
                    return _redirect_of(response)
                self._check_status(response, is_label_studio)
                return self._read(response, deadline)
        except httpx.InvalidURL as error:  # httpx reads Location even when told not to follow
            raise ImageUnusable(f"{_shown(url)} redirects to an address that is not valid: {error}") from error
        except httpx.HTTPError as error:
            if is_label_studio:
                raise LabelStudioUnavailable(
                    f"Label Studio does not answer at {_host_and_port(url)}: {type(error).__name__} {error}"
                ) from error
            raise ImageUnusable(f"{_shown(url)} cannot be fetched: {type(error).__name__} {error}") from error

    def _check_status(self, response: httpx.Response, is_label_studio: bool) -> None:
        status, url = response.status_code, response.url
        if status == 200:
            return
        if is_label_studio:
            self._check_label_studio(status, url)
        if status in (401, 403):
            raise ImageUnusable(
                f"{_shown(url)} needs credentials (HTTP {status}), and hardfirst sends none there. Use a presigned "
                "URL, add the bucket to Label Studio as a storage, or name it in HARDFIRST_IMAGE_BUCKETS."
            )
        raise ImageUnusable(f"{_shown(url)} is answered with HTTP {status}, not with an image.")

    def _check_label_studio(self, status: int, url: httpx.URL) -> None:
        if status == 401:
            if self._check_token is not None:
                self._check_token()  # says what is wrong with it; or renews it, for the next attempt
            raise CredentialsMissing(
                "Label Studio refused the access token (HTTP 401) for an image. Make one in Account & Settings -> "
                "Personal Access Token and set LABEL_STUDIO_API_KEY."
            )
        if status == 403:
            raise ImageUnusable(
                f"Label Studio refused {_shown(url)} (HTTP 403). The user of LABEL_STUDIO_API_KEY may not see it, or "
                "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED is off."
            )
        if status == 404:
            raise ImageUnusable(
                f"Label Studio has no {_shown(url)} (HTTP 404): the file is gone, or no storage of the project covers "
                "its path."
            )
        if status == 429 or status > 500 or (status == 500 and not self._label_studio_is_up()):
            raise LabelStudioUnavailable(f"Label Studio answered HTTP {status} for {_shown(url)}.")
        if status == 500:
            raise ImageUnusable(
                f"Label Studio is up but fails on {_shown(url)} (HTTP 500): the upload may be gone from its disk."
            )

    def _label_studio_is_up(self) -> bool:
        """Tells a server in trouble from one file it cannot serve: an upload gone from its disk is a 500 as well."""
        try:
            return self._client.get(self._on_label_studio(httpx.URL("/health"))).status_code == 200
        except httpx.HTTPError:
            return False

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        """The body, raw: nothing is unpacked, since we ask for nothing packed and a bomb would be."""
        body = bytearray()
        try:
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > self._max_bytes:
                    raise ImageUnusable(self._too_large(_shown(response.url)))
                if time.monotonic() > deadline:
                    raise ImageUnusable(
                        f"{_shown(response.url)} took more than {self._timeout:g} s ({len(body):,} bytes came)."
                    )
        except httpx.RemoteProtocolError as error:
            raise ImageUnusable(f"{_shown(response.url)} was cut short after {len(body):,} bytes: {error}") from error
        if not body:
            raise ImageUnusable(f"{_shown(response.url)} is empty (0 bytes).")
        return bytes(body)

    def _too_large(self, what: str) -> str:
        return f"{what} is larger than {self._max_bytes / 1e6:g} MB. Shrink it, or raise HARDFIRST_IMAGE_MAX_MB."


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Pixels of an image file: RGB, displayed frame, first frame of an animation, fully decoded.

    Transparency is dropped, not blended (as the trainer does); 16-bit grey is scaled to 8 bits.

    Raises:
        ImageUnusable: not an image, damaged, cut short, or with more than `max_pixels` pixels.
    """
    pixels = to_rgb(upright(read_image(content, max_pixels)))
    # a plain image without metadata: whoever turns it by its EXIF again must find none, not even TIFF's tags
    plain = pixels if type(pixels) is Image.Image else pixels.copy()
    plain.info = {}
    return plain


def read_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file decoded as it is: its own mode and frame. `.format` says what it was.

    Raises:
        ImageUnusable: not an image, damaged, cut short, or with more than `max_pixels` pixels.
    """
    if not content:
        raise ImageUnusable("the image is empty (0 bytes).")
    # Pillow's own limit is one for the process; above twice that it refuses what the deployment allows
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageUnusable(_too_many_pixels("more", max_pixels)) from error
    except Exception as error:  # ModuleNotFoundError too: ultralytics patches Image.open and looks for pi_heif
        raise ImageUnusable(_not_an_image(content)) from error
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ImageUnusable(_too_many_pixels(f"{width} x {height}", max_pixels))
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on hostile files
        raise ImageUnusable(f"the {image.format} file is damaged or cut short: {error}") from error
    return image


@cache
def _formats() -> tuple[str, ...]:
    """The formats of ours that this Pillow has (AVIF came with 11.3): naming one it has not is a KeyError."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of a loaded image; 1 when it says none, or nothing that can be read (as browsers do).

    Only EXIF counts: Pillow's `getexif` would also believe XMP, which browsers do not. TIFF is turned by `load`. WebP
    is never turned: Chromium shows it as it is stored (tests/worker/test_frames.py asks it), and boxes are drawn on
    what is shown. Safari is said to turn it.
    """
    if image.format == "WEBP":
        return 1
    raw = image.info.get("exif")
    if not isinstance(raw, bytes):
        return 1
    exif = Image.Exif()
    try:
        exif.load(raw)
        value = exif.get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return 1
    return value if value in _TRANSPOSES else 1


def upright(image: Image.Image) -> Image.Image:
    """The image in the displayed frame: EXIF orientation applied once."""
    transpose = _TRANSPOSES.get(orientation_of(image))
    if transpose is None:
        return image
    turned = image.transpose(transpose)
    turned.info.pop("exif", None)  # Pillow hands it on, and it would be applied again
    turned.info.pop("xmp", None)
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB; the same object when it is already.

    Raises:
        ImageUnusable: pixels that have no range to scale from (32-bit integers above 65535, floats).
    """
    image = _scaled(image) if image.mode[0] in "IF" else image
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ImageUnusable(f"the image's pixels (mode {image.mode}) cannot be made RGB: {error}") from error


def as_png(image: Image.Image) -> bytes:
    """The file of an image, with nothing lost."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by its high byte, as OpenCV does. Pillow's own conversion would clip at 255."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ImageUnusable(f"the image's pixels (mode {image.mode}) have no range to show. Save it as PNG or JPEG.")
    return Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8))


def _too_many_pixels(found: str, max_pixels: int) -> str:
    return (
        f"the image has {found} pixels; at least 1 and at most {max_pixels:,} are decoded. Shrink it, or raise "
        "HARDFIRST_IMAGE_MAX_MEGAPIXELS."
    )


def _not_an_image(content: bytes) -> str:
    for name in _formats():
        accept = Image.OPEN[name][1]
        if accept is not None and accept(content[:16]) is True:
            return f"the {name} file is damaged or cut short: its header cannot be read."
    start = content[:200].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not an image: the address may ask to log in."
    return f"it is not an image in a format that is read ({', '.join(_FORMATS)}); it begins with {content[:12]!r}."


def _value_of(task_data: Mapping[str, object], image_key: str) -> str:
    value = task_data.get(image_key, task_data.get(UNDEFINED_KEY))
    if value is None:
        raise ImageUnusable(
            f"the task has no {image_key!r} in its data (it has {sorted(map(str, task_data))[:12]}). "
            f'Import tasks with that key, or change value="${image_key}" in the label config.'
        )
    if not isinstance(value, str) or not value.strip():
        raise ImageUnusable(f"the task's {image_key!r} is {str(value)[:80]!r}, not the address of an image.")
    return value.strip()


def _is_in_cloud(value: str) -> bool:
    scheme, separator, _ = value.partition("://")
    return bool(separator) and scheme.lower() in _CLOUD_SCHEMES


def _parse_url(value: str) -> httpx.URL:
    try:
        return httpx.URL(value)
    except (httpx.InvalidURL, ValueError) as error:  # UnicodeError, of hosts that are no names, is a ValueError
        raise ImageUnusable(f"{_shown(value)} is not a valid address: {error}") from error


def _redirect_of(response: httpx.Response) -> httpx.URL:
    location = response.headers.get("location", "")
    if not location:
        raise ImageUnusable(f"{_shown(response.url)} redirects to nowhere (HTTP {response.status_code}).")
    try:
        return response.url.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise ImageUnusable(f"{_shown(response.url)} redirects to an address that is not valid: {error}") from error


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or _DEFAULT_PORTS.get(url.scheme)


def _host_and_port(url: httpx.URL) -> str:
    return url.host if url.port is None else f"{url.host}:{url.port}"


def _parents(host: str) -> list[str]:
    parts = host.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _shown(value: object) -> str:
    """An address for a message: without query (signatures and tokens live there) and user, at most 160 characters."""
    text = str(value).split("#")[0]
    query = text.partition("?")[2]
    local = re.search(r"(?:^|&)d=([^&]*)", query)  # the path of a local file is the one query worth reading
    text = re.sub(r"//[^/@]*@", "//", text.partition("?")[0])
    return f"{text}?d={local.group(1)}"[:160] if local and "/local-files" in text else text[:160]
