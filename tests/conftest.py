"""Real servers for the tests, and an environment that no developer's settings leak into."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis
from hypothesis import settings

from demo.factory import render
from demo.label_studio_server import PYTHON_VARIABLE, LabelStudioServer
from worker.processes import running_valkey

KEPT_VARIABLES = (PYTHON_VARIABLE, "HARDFIRST_OLDER_LABEL_STUDIO_PYTHON", "HARDFIRST_CACHE")
SETTINGS_PREFIXES = ("HARDFIRST_", "LABEL_STUDIO_")
SETTINGS_NAMES = ("REDIS_URL", "DATABASE_URL")
AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


# No deadline: speed is not under test, and CI is busy. The same examples in each CI run: what fails there, fails again.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: ultralytics reads these once, on import."""
    folder = tempfile.mkdtemp(prefix="hardfirst-yolo-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update(
        YOLO_CONFIG_DIR=folder,
        YOLO_AUTOINSTALL="false",  # it would pip install into our environment
        YOLO_OFFLINE="true",
        ULTRALYTICS_SAFE_LOAD="1",  # weights are hostile: no pickled code
        YOLO_VERBOSE="false",
    )


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but those a test makes: neither from the shell nor from a .env in the working directory."""
    for name in list(os.environ):
        if name in SETTINGS_NAMES or (name.startswith(SETTINGS_PREFIXES) and name not in KEPT_VARIABLES):
            monkeypatch.delenv(name)
    if (module := sys.modules.get("worker.settings")) is not None:
        monkeypatch.setitem(module.Settings.model_config, "env_file", None)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Valkey on a unix socket, for the whole session. Tests take `redis_url`."""
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def redis_url(valkey: str) -> str:
    """URL of an empty Valkey."""
    with redis.Redis.from_url(valkey) as connection:
        connection.flushall()
    return valkey


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """A real Label Studio with one admin, for the whole session: .url, .token, .username, .password, .data_dir."""
    if not os.environ.get(PYTHON_VARIABLE):
        pytest.skip(f"{PYTHON_VARIABLE} is not set, so there is no Label Studio to test with; `make test` sets it")
    with LabelStudioServer(tmp_path_factory.mktemp("label-studio")) as server:
        yield server


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of moto's S3 server with the empty buckets `pool` and `private`, which s3fs and boto3 use by themselves."""
    moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed: the dev extra has it")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: the s3 extra has it")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("pool")
    filesystem.mkdir("private")
    yield f"http://{host}:{port}"
    s3fs.S3FileSystem.clear_instance_cache()
    httpx.post(f"http://{host}:{port}/moto-api/reset")  # its buckets are the process's, not the server's
    server.stop()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """SQLAlchemy URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium for browser tests."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on PATH for browser tests; on Debian: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def write_weights() -> Callable[[Path, int, tuple[str, ...]], Path]:
    """(file, seed, class names) -> that file, with a detector that finds boxes of every confidence in any image."""
    return _write_weights


def _write_weights(file: Path, seed: int, classes: tuple[str, ...]) -> Path:
    """A yolo11n of random weights whose layers all speak up, so that images differ; most of its confidences are low."""
    from worker.detector import load_ultralytics

    load_ultralytics()
    import numpy as np
    import torch
    from ultralytics.cfg import DEFAULT_CFG_DICT
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(seed)
    model = DetectionModel("yolo11n.yaml", nc=len(classes), verbose=False)
    model.names = dict(enumerate(classes))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    pictures = np.stack([np.asarray(render(9, index, (96, 96))[0]) for index in range(8)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        model.train()(pixels)
        for norm in norms:
            norm.momentum = 0.03
            norm.running_var += norm.running_mean**2  # a channel of large mean would amplify rounding errors
        head = model.eval().model[-1]
        logits = model(pixels)[1]["scores"]
        spread, centre = logits.std((0, 2)), logits.mean((0, 2))
        for branch in head.cv3:  # confidences from 0 to 1
            branch[-1].weight.mul_((1.5 / spread)[:, None, None, None])
            branch[-1].bias.sub_(centre).mul_(1.5 / spread).sub_(2.0)
        for branch in head.cv2:  # boxes of a few strides, or they would all cover the image
            branch[-1].weight.mul_(0.3)
            branch[-1].bias.copy_(-0.6 * torch.arange(16.0).repeat(4))
    model.args = DEFAULT_CFG_DICT
    torch.save({"model": model.half(), "train_args": DEFAULT_CFG_DICT, "epoch": -1}, file)
    return file
