import base64
import io
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from PIL import Image, ImageOps

from worker.errors import CredentialsMissing, ImageUnusable, LabelStudioUnavailable
from worker.images import ImageFetcher, decode_image, orientation_of, read_image

TOKEN = {"Authorization": "Token secret"}


class StubServer(ThreadingHTTPServer):
    """Answers from `routes`: path -> (status, headers, body) or a function of the handler. Remembers requests."""

    daemon_threads = True
    request_queue_size = 50

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _StubHandler)
        self.routes = {}
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, path, body=b"", status=200, **headers):
        self.routes[path] = (status, headers, body)

    def redirect(self, path, location, status=302):
        self.add(path, status=status, Location=location)


class _StubHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        route = self.server.routes.get(self.path, (404, {}, b"no"))
        if callable(route):
            route(self)
            return
        status, headers, body = route
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def label_studio():
    with running(StubServer()) as server:
        yield server


@pytest.fixture
def elsewhere():
    with running(StubServer()) as server:
        yield server


def fetcher_for(label_studio, *allowed, **options):
    return ImageFetcher(label_studio.url, lambda: dict(TOKEN), frozenset(allowed), **{"timeout": 5, **options})


def host_of(server):
    return server.url.removeprefix("http://")


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def red_left_image(width=40, height=20):
    """The left half is red, the right half blue."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    return image


RED_LEFT = encoded(red_left_image())


# --- where images may come from


def test_an_upload_comes_from_label_studio_with_the_token(label_studio):
    label_studio.add("/data/upload/1/a.png", RED_LEFT)
    with fetcher_for(label_studio) as fetcher:
        assert fetcher.fetch({"image": "/data/upload/1/a.png"}, "image") == RED_LEFT
    assert label_studio.requests == [("/data/upload/1/a.png", "Token secret")]


def test_the_token_is_asked_for_at_each_fetch(label_studio):
    label_studio.add("/data/upload/1/a.png", RED_LEFT)
    tokens = iter(["one", "two"])
    with ImageFetcher(label_studio.url, lambda: {"Authorization": next(tokens)}) as fetcher:
        for _ in range(2):
            fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    assert [token for _, token in label_studio.requests] == ["one", "two"]


def test_tasks_imported_before_there_was_a_label_config_work(label_studio):
    label_studio.add("/data/upload/1/a.png", RED_LEFT)
    with fetcher_for(label_studio) as fetcher:
        assert fetcher.fetch({"$undefined$": "/data/upload/1/a.png"}, "photo") == RED_LEFT


def test_local_files_keep_their_query(label_studio):
    label_studio.add("/data/local-files/?d=line%203/a%20b.png", RED_LEFT)
    with fetcher_for(label_studio) as fetcher:
        assert fetcher.fetch({"image": "/data/local-files/?d=line%203/a%20b.png"}, "image") == RED_LEFT


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0.0.0.0"])
@pytest.mark.parametrize("port", [8080, 1])
def test_label_studio_under_a_loopback_name_is_rewritten(label_studio, host, port):
    label_studio.add("/data/local-files/?d=a.png", RED_LEFT)
    with fetcher_for(label_studio) as fetcher:
        url = f"http://{host}:{port}/data/local-files/?d=a.png"
        assert fetcher.fetch({"image": url}, "image") == RED_LEFT
    assert label_studio.requests == [("/data/local-files/?d=a.png", "Token secret")]


def test_label_studio_under_its_public_name_is_rewritten(label_studio):
    label_studio.add("/data/upload/1/a.png", RED_LEFT)
    task = {"image": "https://labels.example.com/data/upload/1/a.png"}
    with fetcher_for(label_studio, label_studio_names=frozenset({"https://labels.example.com", ""})) as fetcher:
        assert fetcher.fetch(task, "image") == RED_LEFT
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable, match=r"=labels\.example\.com"):
        fetcher.fetch(task, "image")


def test_label_studio_below_a_path_of_its_host(label_studio):
    label_studio.add("/studio/data/upload/1/a.png", RED_LEFT)
    with ImageFetcher(label_studio.url + "/studio/", lambda: TOKEN) as fetcher:
        for value in ("/data/upload/1/a.png", "/studio/data/upload/1/a.png", f"{label_studio.url}/data/upload/1/a.png"):
            assert fetcher.fetch({"image": value}, "image") == RED_LEFT
        with pytest.raises(ImageUnusable, match="not a path"):
            fetcher.fetch({"image": "/studio-api/data/upload/1/a.png"}, "image")


def test_an_allowed_host_gets_no_token(label_studio, elsewhere):
    elsewhere.add("/a.png", RED_LEFT)
    with fetcher_for(label_studio, host_of(elsewhere)) as fetcher:
        assert fetcher.fetch({"image": f"{elsewhere.url}/a.png"}, "image") == RED_LEFT
    assert elsewhere.requests == [("/a.png", None)]


@pytest.mark.parametrize(
    ("allowed", "url", "is_allowed"),
    [
        ("cdn.example.com", "https://cdn.example.com/a.png", True),
        ("cdn.example.com", "https://CDN.example.com:443/a.png", True),
        ("cdn.example.com", "http://cdn.example.com:9000/a.png", False),
        ("cdn.example.com:9000", "http://cdn.example.com:9000/a.png", True),
        ("*.example.com", "https://eu.cdn.example.com/a.png", True),
        ("*.example.com", "https://example.com/a.png", False),
        ("*.example.com", "https://evilexample.com/a.png", False),
        ("example.com", "https://example.com.evil.net/a.png", False),
        ("example.com", "https://example.com@evil.net/a.png", False),
        ("example.com", "https://evil.net/?https://example.com/a.png", False),
    ],
)
def test_the_allow_list_means_whole_hosts(allowed, url, is_allowed):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=httpx.ByteStream(RED_LEFT)))
    with ImageFetcher("http://ls:8080", lambda: TOKEN, frozenset({allowed}), transport=transport) as fetcher:
        if is_allowed:
            assert fetcher.fetch({"image": url}, "image") == RED_LEFT
        else:
            with pytest.raises(ImageUnusable):
                fetcher.fetch({"image": url}, "image")


def test_cloud_uris_go_through_label_studio_and_on_to_an_allowed_bucket(label_studio, elsewhere):
    uri = "s3://bucket/line 3/ä.png"
    path = f"/tasks/17/presign/?fileuri={base64.urlsafe_b64encode(uri.encode()).decode()}"
    label_studio.redirect(path, f"{elsewhere.url}/bucket/a.png?X-Amz-Signature=abc", 303)
    elsewhere.add("/bucket/a.png?X-Amz-Signature=abc", RED_LEFT)
    with fetcher_for(label_studio, host_of(elsewhere)) as fetcher:
        assert fetcher.fetch({"image": uri}, "image", task_id=17) == RED_LEFT
        with pytest.raises(ImageUnusable, match="task's id"):
            fetcher.fetch({"image": uri}, "image")
        with pytest.raises(ImageUnusable, match=r"^gs://b/x\.png: .* no storage of the project covers"):
            fetcher.fetch({"image": "gs://b/x.png"}, "image", task_id=17)
    assert label_studio.requests[0] == (path, "Token secret")
    assert elsewhere.requests == [("/bucket/a.png?X-Amz-Signature=abc", None)]
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable) as caught:
        fetcher.fetch({"image": uri}, "image", task_id=17)
    assert f"HARDFIRST_IMAGE_HOSTS={host_of(elsewhere)}" in str(caught.value)
    assert "Signature" not in str(caught.value)


def test_data_uris_are_bounded(label_studio):
    with fetcher_for(label_studio, max_bytes=500) as fetcher:
        small = "data:image/png;base64," + base64.b64encode(RED_LEFT).decode()
        assert fetcher.open({"image": small}, "image").size == (40, 20)
        with pytest.raises(ImageUnusable, match="larger than"):
            fetcher.fetch({"image": "data:image/png;base64," + "A" * 700}, "image")
        for broken in ("data:image/png;base64,***", "data:text/html,<b>", "data:image/png;base64,", "data:"):
            with pytest.raises(ImageUnusable):
                fetcher.fetch({"image": broken}, "image")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, r"no 'image' in its data \(it has \[\]\)"),
        ({"photo": "/data/upload/a.png"}, r"it has \['photo'\]"),
        ({"image": None}, "no 'image'"),
        ({"image": ["/data/upload/a.png"]}, "not the address"),
        ({"image": {"url": "x"}}, "not the address"),
        ({"image": 7}, "not the address"),
        ({"image": "  "}, "not the address"),
        ({"image": "file:///etc/passwd"}, "not an address"),
        ({"image": "ftp://host/a.png"}, "not an address"),
        ({"image": "a.png"}, "not an address"),
        ({"image": "//evil.net/data/upload/a.png"}, "not an address"),
        ({"image": "http:///data/upload/a.png"}, "not an address"),
        ({"image": "http://169.254.169.254/latest/meta-data"}, "HARDFIRST_IMAGE_HOSTS=169.254.169.254"),
        ({"image": "http://localhost:6379/"}, "HARDFIRST_IMAGE_HOSTS=localhost:6379"),
        ({"image": "http://user:pw@localhost/data/upload/a.png"}, "password"),
        ({"image": "http://h\x00st/"}, "not a valid address"),
        ({"image": "http://[::1/"}, "not a valid address"),
        ({"image": "http://h:99999999/"}, "not an address"),
        ({"image": "http://" + "a" * 70000}, "not a valid address"),
        ({"image": "/api/current-user/token"}, "not a path"),
        ({"image": "/data/upload/../../api/current-user/token"}, "not a path|not an address"),
        ({"image": "/data/upload/%2e%2e/%2e%2e/api/token"}, "not a path"),
        ({"image": "/data/upload/..%5c..%5capi"}, "not a path"),
        ({"image": "/logout"}, "not a path"),
    ],
)
def test_what_is_refused_is_never_asked(label_studio, data, says):
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable, match=says):
        fetcher.fetch(data, "image")
    assert label_studio.requests == []


# --- redirects


def test_a_redirect_to_a_forbidden_host_is_not_followed(label_studio, elsewhere):
    label_studio.redirect("/data/upload/1/a.png", f"{elsewhere.url}/a.png")
    elsewhere.add("/a.png", RED_LEFT)
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable, match="HARDFIRST_IMAGE_HOSTS"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    assert elsewhere.requests == []


@pytest.mark.parametrize("location", ["file:///etc/passwd", "/api/current-user/token", "http://[", "", "data:,x", "x"])
def test_redirects_obey_the_rules_of_first_addresses(label_studio, location):
    label_studio.redirect("/data/upload/1/a.png", location)
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    assert len(label_studio.requests) <= 2


def test_another_host_cannot_spend_the_token_by_redirecting_back(label_studio, elsewhere):
    elsewhere.redirect("/a.png", f"{label_studio.url}/data/upload/1/a.png")
    label_studio.add("/data/upload/1/a.png", RED_LEFT)
    with fetcher_for(label_studio, host_of(elsewhere)) as fetcher:
        fetcher.fetch({"image": f"{elsewhere.url}/a.png"}, "image")
    assert label_studio.requests == [("/data/upload/1/a.png", None)]


def test_three_redirects_and_no_more(label_studio):
    for hop in range(5):
        label_studio.redirect(f"/data/upload/{hop}", f"/data/upload/{hop + 1}")
    label_studio.add("/data/upload/5", RED_LEFT)
    with fetcher_for(label_studio) as fetcher:
        assert fetcher.fetch({"image": "/data/upload/2"}, "image") == RED_LEFT
        with pytest.raises(ImageUnusable, match="more than 3 times"):
            fetcher.fetch({"image": "/data/upload/1"}, "image")


def test_a_redirect_to_the_log_in_page_means_the_token(label_studio):
    label_studio.redirect("/data/upload/1/a.png", "/user/login/?next=/data/upload/1/a.png")
    with fetcher_for(label_studio) as fetcher, pytest.raises(CredentialsMissing, match="LABEL_STUDIO_API_KEY"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")


# --- answers that are no image


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (404, ImageUnusable, "has no .*a.png"),
        (403, ImageUnusable, "LABEL_STUDIO_API_KEY"),
        (401, CredentialsMissing, "LABEL_STUDIO_API_KEY"),
        (424, ImageUnusable, "HTTP 424"),
        (204, ImageUnusable, "HTTP 204"),
        (429, LabelStudioUnavailable, "HTTP 429"),
        (502, LabelStudioUnavailable, "HTTP 502"),
        (503, LabelStudioUnavailable, "HTTP 503"),
    ],
)
def test_what_label_studio_may_answer(label_studio, status, error, says):
    label_studio.add("/data/upload/1/a.png", status=status)
    with fetcher_for(label_studio) as fetcher, pytest.raises(error, match=says):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")


def test_one_file_label_studio_fails_on_is_not_label_studio_being_away(label_studio):
    label_studio.add("/data/upload/1/a.png", status=500)
    label_studio.add("/health", b'{"status": "UP"}')
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable, match="gone from its disk"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    label_studio.add("/health", status=500)
    with fetcher_for(label_studio) as fetcher, pytest.raises(LabelStudioUnavailable, match="HTTP 500"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_what_another_host_may_answer_is_one_image_lost(label_studio, elsewhere, status):
    elsewhere.add("/a.png", status=status)
    with fetcher_for(label_studio, host_of(elsewhere)) as fetcher, pytest.raises(ImageUnusable, match=str(status)):
        fetcher.fetch({"image": f"{elsewhere.url}/a.png"}, "image")


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nobody_listening(label_studio):
    port = unused_port()
    with (
        ImageFetcher(f"http://127.0.0.1:{port}", lambda: TOKEN) as fetcher,
        pytest.raises(LabelStudioUnavailable, match=str(port)),
    ):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    with fetcher_for(label_studio, f"127.0.0.1:{port}") as fetcher, pytest.raises(ImageUnusable, match="ConnectError"):
        fetcher.fetch({"image": f"http://127.0.0.1:{port}/a.png"}, "image")


def test_a_label_studio_that_does_not_answer_in_time(label_studio):
    label_studio.routes["/data/upload/1/a.png"] = lambda handler: time.sleep(10)
    started = time.monotonic()
    with fetcher_for(label_studio, timeout=0.2) as fetcher, pytest.raises(LabelStudioUnavailable, match="ReadTimeout"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    assert time.monotonic() - started < 9  # it did not wait for the answer


def test_a_trickle_ends_at_the_deadline(label_studio):
    def trickle(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            try:
                handler.wfile.write(b"x")
                handler.wfile.flush()
            except OSError:  # the client has left, as it should
                return
            time.sleep(0.05)

    label_studio.routes["/data/upload/1/a.png"] = trickle
    started = time.monotonic()
    with fetcher_for(label_studio, timeout=1.5) as fetcher, pytest.raises(ImageUnusable, match=r"more than 1.5 s"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    assert time.monotonic() - started < 4  # the trickle lasts 5 s


def test_a_body_cut_short(label_studio):
    def cut(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x" * 10)

    label_studio.routes["/data/upload/1/a.png"] = cut
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable, match="cut short after 10 bytes"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")


def test_a_server_that_hangs_up_before_answering_is_away(label_studio):
    label_studio.routes["/data/upload/1/a.png"] = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    with fetcher_for(label_studio) as fetcher, pytest.raises(LabelStudioUnavailable, match="RemoteProtocolError"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")


def test_an_oversize_body_is_not_read_to_its_end(label_studio):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(10_000):
                handler.wfile.write(b"x" * 100_000)
                sent.append(100_000)
        except OSError:  # the client has left, as it should
            return

    label_studio.routes["/data/upload/1/a.png"] = endless
    with fetcher_for(label_studio, max_bytes=1_000_000) as fetcher, pytest.raises(ImageUnusable, match="1 MB"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")
    assert sum(sent) < 50_000_000


def test_a_body_of_exactly_the_limit_passes(label_studio):
    label_studio.add("/data/upload/1/a.png", b"x" * 1000)
    with fetcher_for(label_studio, max_bytes=1000) as fetcher:
        assert len(fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")) == 1000


def test_an_empty_body(label_studio):
    label_studio.add("/data/upload/1/a.png", b"")
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable, match="0 bytes"):
        fetcher.fetch({"image": "/data/upload/1/a.png"}, "image")


def test_packed_bodies_are_not_unpacked(label_studio):
    bomb = zlib.compress(b"\0" * 50_000_000)
    label_studio.add("/data/upload/1/a.png", bomb, **{"Content-Encoding": "deflate"})
    with fetcher_for(label_studio) as fetcher:
        assert fetcher.fetch({"image": "/data/upload/1/a.png"}, "image") == bomb


def test_errors_show_no_secrets(label_studio):
    label_studio.add("/data/upload/1/a.png?token=abc", status=404)
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable) as caught:
        fetcher.fetch({"image": f"{label_studio.url}/data/upload/1/a.png?token=abc"}, "image")
    assert "abc" not in str(caught.value)
    with fetcher_for(label_studio) as fetcher, pytest.raises(ImageUnusable) as caught:
        fetcher.fetch({"image": "https://me:pw@host/a.png?sig=abc"}, "image")
    assert "pw" not in str(caught.value).replace("password", "")
    assert "abc" not in str(caught.value)


# --- decoding


def pixel(image, x, y):
    return image.getpixel((x, y))


def test_open_gives_rgb_in_the_displayed_frame(label_studio):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, the top of the file is on the right
    label_studio.add("/data/upload/1/a.jpg", encoded(red_left_image(), "JPEG", exif=exif, quality=95, subsampling=0))
    with fetcher_for(label_studio) as fetcher:
        image = fetcher.open({"image": "/data/upload/1/a.jpg"}, "image")
    assert image.mode == "RGB"
    assert image.size == (20, 40)
    assert pixel(image, 10, 5)[0] > 200  # left became top
    assert pixel(image, 10, 35)[2] > 200


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_orientation_is_applied_once(orientation, kind):
    rng = np.random.default_rng(orientation)
    original = Image.fromarray(rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)).resize((50, 30), Image.Resampling.BOX)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(original, kind, exif=exif)
    decoded = decode_image(content)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(decoded)), np.asarray(decoded))


def test_orientation_in_a_webp_is_ignored_as_chromium_does():
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encoded(red_left_image(), "WEBP", exif=exif, lossless=True))
    assert decoded.size == (40, 20)
    assert pixel(decoded, 5, 10) == (255, 0, 0)


def test_orientation_in_a_tiff_is_applied_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encoded(red_left_image(), "TIFF", exif=exif))
    assert decoded.size == (20, 40)
    assert pixel(decoded, 10, 5) == (255, 0, 0)
    assert ImageOps.exif_transpose(decoded).size == (20, 40)


def test_orientation_that_only_xmp_tells_is_ignored_as_browsers_do():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    content = encoded(red_left_image(), "JPEG", xmp=xmp)
    assert Image.open(io.BytesIO(content)).getexif().get(0x0112) == 6
    assert decode_image(content).size == (40, 20)


@pytest.mark.parametrize("exif", [b"", b"II*\x00\xff\xff\xff\xff", b"MM\x00*\x00\x00\x00\x08\x00\x01", b"nonsense"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_read_turns_nothing(exif):
    image = read_image(encoded(red_left_image(), "JPEG", exif=b"Exif\x00\x00" + exif))
    assert orientation_of(image) == 1
    assert decode_image(encoded(red_left_image(), "JPEG", exif=b"Exif\x00\x00" + exif)).size == (40, 20)


def png_16_bit(values):
    """A grey 16-bit PNG, one row."""
    return encoded(Image.fromarray(np.array([values], dtype=np.uint16)))


def test_16_bit_grey_is_scaled_not_clipped():
    decoded = decode_image(png_16_bit([0, 256, 0x8000, 0xFFFF]))
    assert [pixel(decoded, x, 0) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (8, 8), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (Image.new("LA", (8, 8), (77, 9)), "PNG", (77, 77, 77)),
        (Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4), "PNG", (10, 20, 30)),
        (Image.new("RGB", (8, 8), (10, 20, 30)), "BMP", (10, 20, 30)),
        (Image.new("RGB", (8, 8), (10, 20, 30)), "TIFF", (10, 20, 30)),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", (255, 255, 255)),
        (Image.new("CMYK", (8, 8), (255, 255, 255, 255)), "JPEG", (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(image, kind, expected):
    decoded = decode_image(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert pixel(decoded, 4, 4) == expected


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert pixel(decode_image(content), 8, 8) == (255, 0, 0)


def png_header(width, height):
    """A PNG that claims a size and has next to nothing in it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (b"hello", "begins with b'hello'"),
        (b"<!DOCTYPE html><html>", "log in"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (encoded(NOISE)[:4000], "PNG file is damaged or cut short"),
        (encoded(NOISE, "JPEG")[:1500], "JPEG file is damaged or cut short"),
        (encoded(NOISE, "BMP")[:5000], "BMP file is damaged or cut short"),
        (encoded(NOISE, "WEBP")[:800], "damaged|not an image"),
        (encoded(NOISE, "GIF")[:1500], "GIF file is damaged or cut short"),
        (png_header(100, 100), "PNG file is damaged or cut short"),
        (png_header(100_000, 100_000), "pixels"),
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "no range"),
        (encoded(Image.new("I", (8, 8), 1_000_000), "TIFF"), "no range"),
    ],
)
def test_what_cannot_be_decoded_says_why(content, says):
    with pytest.raises(ImageUnusable, match=says):
        decode_image(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_pixel_limit_is_the_deployments(label_studio):
    content = encoded(Image.new("L", (100, 50)))
    assert decode_image(content, max_pixels=5000).size == (100, 50)
    with pytest.raises(ImageUnusable, match="HARDFIRST_IMAGE_MAX_MEGAPIXELS"):
        decode_image(content, max_pixels=4999)
    with pytest.raises(ImageUnusable, match="15000 x 14000 pixels"):
        decode_image(png_header(15_000, 14_000), max_pixels=200_000_000)
    with pytest.raises(ImageUnusable, match="damaged"):  # beyond Pillow's own limit, and within ours
        decode_image(png_header(15_000, 14_000), max_pixels=210_000_000)
    label_studio.add("/data/upload/1/a.png", content)
    with fetcher_for(label_studio, max_pixels=4999) as fetcher, pytest.raises(ImageUnusable, match="100 x 50"):
        fetcher.open({"image": "/data/upload/1/a.png"}, "image")


def test_an_opener_that_misses_a_module_is_an_unusable_image(monkeypatch):
    def patched_open(*args, **kwargs):  # what ultralytics makes of Image.open for files it cannot identify
        raise ModuleNotFoundError("No module named 'pi_heif'")

    monkeypatch.setattr(Image, "open", patched_open)
    with pytest.raises(ImageUnusable, match="not an image"):
        decode_image(b"\0\0\0\x18ftypheic")


def test_no_torch_is_loaded():
    code = (
        "import sys, worker.images, worker.boxes, worker.dataset;"
        "print([m for m in ('torch', 'ultralytics', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
