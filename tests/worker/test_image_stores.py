"""Images from a mounted folder and from buckets: what lies inside is read, and nothing else ever."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from worker.errors import ImageUnusable, SettingsInvalid
from worker.image_stores import Buckets, LocalFiles
from worker.images import ImageFetcher
from worker.settings import load_settings

LABEL_STUDIO = "http://labels.example.com"


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


RED = png(200)


class Asked:
    """Answers for Label Studio, and remembers what it was asked."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.raw_path.decode())
        return httpx.Response(200, stream=httpx.ByteStream(b"from Label Studio"))


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "served"
    (made / "day").mkdir(parents=True)
    (made / "day" / "a b%ä.png").write_bytes(RED)
    (tmp_path / "secret.png").write_bytes(RED)
    return made


def fetch(asked: Asked, value: str, **options: Any) -> bytes:
    transport = httpx.MockTransport(asked)
    with ImageFetcher(LABEL_STUDIO, lambda: {"Authorization": "Token t"}, transport=transport, **options) as fetcher:
        return fetcher.fetch({"image": value}, "image", 7)


# --- a mounted folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "/data/local-files/?d=day/a%20b%25%C3%A4.png",
        "/data/local-files/?d=day/a+b%25%C3%A4.png",
        "/data/local-files?d=%2Fday%2Fa%20b%25%C3%A4.png",
        f"{LABEL_STUDIO}/data/local-files/?d=day/a%20b%25%C3%A4.png",
        "http://localhost:8080/data/local-files/?d=day/a%20b%25%C3%A4.png",
    ],
)
def test_a_file_of_a_mounted_root_is_read_straight(asked: Asked, root: Path, value: str) -> None:
    assert fetch(asked, value, local_files_root=root) == RED
    assert asked.paths == []


def test_a_host_that_is_not_label_studio_is_not_read_from_the_root(asked: Asked, root: Path) -> None:
    elsewhere = "https://cdn.example.com/data/local-files/?d=day/a%20b%25%C3%A4.png"
    with pytest.raises(ImageUnusable, match="HARDFIRST_IMAGE_HOSTS"):
        fetch(asked, elsewhere, local_files_root=root)


def test_what_is_not_mounted_is_asked_of_label_studio(asked: Asked, root: Path) -> None:
    assert fetch(asked, "/data/local-files/?d=night/1.png", local_files_root=root) == b"from Label Studio"
    assert fetch(asked, "/data/local-files/?d=day", local_files_root=root) == b"from Label Studio"
    assert fetch(asked, "/data/upload/3/1.png", local_files_root=root) == b"from Label Studio"
    assert asked.paths == ["/data/local-files/?d=night/1.png", "/data/local-files/?d=day", "/data/upload/3/1.png"]


@pytest.mark.parametrize("name", ["../secret.png", "day/../../secret.png", "day\\..\\..\\secret.png", "day/\0.png"])
def test_a_path_that_climbs_is_refused_and_nobody_is_asked(asked: Asked, root: Path, name: str) -> None:
    query = httpx.QueryParams({"d": name})
    with pytest.raises(ImageUnusable, match="leads out of the folder of local files"):
        fetch(asked, f"/data/local-files/?{query}", local_files_root=root)
    assert asked.paths == []


def test_an_absolute_path_is_one_below_the_root(asked: Asked, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    assert fetch(asked, f"/data/local-files/?d={secret}", local_files_root=root) == b"from Label Studio"
    assert asked.paths == [f"/data/local-files/?d={secret}"]


def test_a_link_that_leads_out_is_label_studios_to_judge(root: Path, tmp_path: Path) -> None:
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "day" / "a b%ä.png")
    (root / "folder").symlink_to(tmp_path)
    files = LocalFiles(root, 1000)
    assert files.read("out.png") is None
    assert files.read("folder/secret.png") is None
    assert files.read("in.png") == RED


def test_a_root_that_is_a_link_itself(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").symlink_to(root)
    assert LocalFiles(tmp_path / "mounted", 1000).read("day/a b%ä.png") == RED


def test_a_folder_that_begins_like_the_root_is_outside(root: Path, tmp_path: Path) -> None:
    (tmp_path / "served-too").mkdir()
    (tmp_path / "served-too" / "1.png").write_bytes(RED)
    (root / "twin").symlink_to(tmp_path / "served-too")
    assert LocalFiles(root, 1000).read("twin/1.png") is None


def test_a_pipe_does_not_hang(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    assert LocalFiles(root, 1000).read("pipe.png") is None


def test_limits_hold_for_mounted_files(root: Path) -> None:
    (root / "empty.png").touch()
    with pytest.raises(ImageUnusable, match=r"empty.png is empty \(0 bytes\)"):
        LocalFiles(root, 1000).read("empty.png")
    with pytest.raises(ImageUnusable, match="HARDFIRST_IMAGE_MAX_MB"):
        LocalFiles(root, len(RED) - 1).read("day/a b%ä.png")
    assert LocalFiles(root, len(RED)).read("day/a b%ä.png") == RED


# --- buckets: which of them -------------------------------------------------------------------------------------------


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """What fsspec gives for gs:// and s3://: here objects in memory."""
    filesystem = MemoryFileSystem()
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: filesystem)
    for name in ("pool/day/1.png", "pool/night/1.png", "pool-private/1.png", "pool/day/x..y/1.png"):
        filesystem.pipe_file(name, RED)
    yield filesystem
    filesystem.store.clear()


@pytest.mark.parametrize(
    ("listed", "value", "is_read"),
    [
        ("gs://pool", "gs://pool/day/1.png", True),
        ("gs://pool/", "GS://pool/night/1.png", True),
        ("gs://pool/day", "gs://pool/day/x..y/1.png", True),
        ("gs://pool/day", "gs://pool/night/1.png", False),
        ("gs://pool", "gs://pool-private/1.png", False),
        ("gs://pool/d", "gs://pool/day/1.png", False),
        ("s3://pool", "gs://pool/day/1.png", False),
        ("gs://pool", "pool/day/1.png", False),
        ("gs://pool", "memory://pool/day/1.png", False),
        ("gs://pool", "simplecache::gs://pool/day/1.png", False),
    ],
)
def test_only_listed_buckets_are_read(gcs: MemoryFileSystem, listed: str, value: str, is_read: bool) -> None:
    assert Buckets([listed], 1000).read(value) == (RED if is_read else None)


@pytest.mark.parametrize("value", ["gs://pool/day/../night/1.png", "gs://pool/day/./1.png", "gs://pool/day/\0.png"])
def test_keys_that_climb_are_refused(gcs: MemoryFileSystem, value: str) -> None:
    with pytest.raises(ImageUnusable, match="not the address of an object"):
        Buckets(["gs://pool/day"], 1000).read(value)


def test_a_chain_is_a_key_like_any_other(gcs: MemoryFileSystem, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(RED)
    with pytest.raises(ImageUnusable, match="is not there"):
        Buckets(["gs://pool"], 1000).read(f"gs://pool/a.zip::file://{tmp_path}/secret.png")


def test_buckets_that_are_not_listed_go_through_label_studio(gcs: MemoryFileSystem, asked: Asked) -> None:
    buckets = frozenset({"gs://pool/day"})
    assert fetch(asked, "gs://pool/day/1.png", buckets=buckets) == RED
    assert asked.paths == []
    assert fetch(asked, "gs://pool/night/1.png", buckets=buckets) == b"from Label Studio"
    assert [path.partition("?")[0] for path in asked.paths] == ["/tasks/7/presign/"]


def test_limits_hold_for_objects(gcs: MemoryFileSystem) -> None:
    gcs.pipe_file("pool/empty.png", b"")
    with pytest.raises(ImageUnusable, match="is empty"):
        Buckets(["gs://pool"], 1000).read("gs://pool/empty.png")
    with pytest.raises(ImageUnusable, match="larger than"):
        Buckets(["gs://pool"], len(RED) - 1).read("gs://pool/day/1.png")


def test_a_package_that_is_missing_is_a_setting_that_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(SettingsInvalid, match=r"pip install 'hardfirst\[s3\]'"):
        Buckets(["s3://pool"], 1000).read("s3://pool/1.png")


def test_the_settings_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (load_settings().local_files_root, load_settings().readable_buckets) == (None, frozenset())
    monkeypatch.setenv("HARDFIRST_LOCAL_FILES_ROOT", "")
    assert load_settings().local_files_root is None
    monkeypatch.setenv("HARDFIRST_LOCAL_FILES_ROOT", str(tmp_path))
    monkeypatch.setenv("HARDFIRST_IMAGE_BUCKETS", " s3://pool , gs://b.c/day ")
    assert load_settings().local_files_root == tmp_path
    assert load_settings().readable_buckets == {"s3://pool", "gs://b.c/day"}
    for wrong in ("pool", "s3://", "file:///etc", "s3://*", "http://pool", "s3://pool::file://x"):
        monkeypatch.setenv("HARDFIRST_IMAGE_BUCKETS", wrong)
        with pytest.raises(SettingsInvalid, match="is no bucket"):
            load_settings()


# --- a real S3 server -------------------------------------------------------------------------------------------------


@pytest.fixture
def s3(s3_server: str) -> Callable[[str, bytes], None]:
    """Puts an object into a bucket of a real server."""
    filesystem = fsspec.filesystem("s3")

    def put(path: str, content: bytes) -> None:
        filesystem.pipe_file(path, content)

    return put


def test_s3_objects_are_read_over_http(s3: Callable[[str, bytes], None], asked: Asked) -> None:
    s3("pool/day/a b+ä.png", RED)
    s3("private/1.png", RED)
    buckets = frozenset({"s3://pool"})
    assert fetch(asked, "s3://pool/day/a b+ä.png", buckets=buckets) == RED
    assert asked.paths == []
    assert fetch(asked, "s3://private/1.png", buckets=buckets) == b"from Label Studio"
    with pytest.raises(ImageUnusable, match=r"s3://pool/day/2.png is not there"):
        fetch(asked, "s3://pool/day/2.png", buckets=buckets)
    with pytest.raises(ImageUnusable, match=r"s3://nobody/1\.png"):
        fetch(asked, "s3://nobody/1.png", buckets=frozenset({"s3://nobody"}))


def test_of_a_large_s3_object_no_more_than_the_limit_is_read(s3: Callable[[str, bytes], None], asked: Asked) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
    s3("pool/large.png", noise)
    s3("pool/empty.png", b"")
    buckets = frozenset({"s3://pool"})
    assert fetch(asked, "s3://pool/large.png", buckets=buckets, max_bytes=300_000) == noise
    with pytest.raises(ImageUnusable, match="HARDFIRST_IMAGE_MAX_MB"):
        fetch(asked, "s3://pool/large.png", buckets=buckets, max_bytes=299_999)
    with pytest.raises(ImageUnusable, match=r"s3://pool/empty\.png"):
        fetch(asked, "s3://pool/empty.png", buckets=buckets)


def test_s3_from_many_threads(s3: Callable[[str, bytes], None], asked: Asked) -> None:
    for number in range(8):
        s3(f"pool/{number}.png", png(number))
    found: dict[int, bytes] = {}
    buckets = Buckets(["s3://pool"], 10_000)

    def read(number: int) -> None:
        found[number] = buckets.read(f"s3://pool/{number}.png") or b""

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: png(number) for number in range(8)}
