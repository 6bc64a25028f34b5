"""worker.openvino_backend, and how the detector uses it: exports kept, made again, refused; networks per frame."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worker import detector as detector_module
from worker import openvino_backend
from worker.detector import Detector, load_ultralytics, prepare_ultralytics, sha256_of
from worker.errors import SettingsInvalid
from worker.openvino_backend import OpenVinoForward, cached_graph

IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48 + 16 * (seed % 2), 64, 3), dtype=np.uint8))
    for seed in range(6)
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    prepare_ultralytics(folder / "config")
    load_ultralytics()
    import torch
    from ultralytics.cfg import DEFAULT_CFG_DICT
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolo26n.yaml", nc=2, verbose=False)
    model.names, model.args = {0: "nut", 1: "wire"}, DEFAULT_CFG_DICT
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 128, 128, 3))).permute(0, 3, 1, 2) / 255
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(pixels)  # as after a training every layer speaks up, or the network says the same everywhere
    for norm in norms:
        norm.running_var += norm.running_mean**2  # a channel of large mean would amplify rounding errors
    for layers in model.model[-1].cv3:
        layers[-1].weight.data *= 4
        layers[-1].bias.data[:] = -1.0  # above the threshold almost everywhere
    model.eval()
    torch.save({"model": model.half(), "train_args": DEFAULT_CFG_DICT, "epoch": -1}, folder / "yolo26n-new.pt")
    return folder / "yolo26n-new.pt"


@pytest.fixture(scope="module")
def exported(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an export of the weights writes."""
    cache = tmp_path_factory.mktemp("exports")
    load(weights, cache).score(IMAGES[:1], 64)
    (file,) = cache.iterdir()
    return file.read_bytes()


def load(weights: Path, cache: Path, backend: str = "auto") -> Detector:
    return Detector.load(weights, "cpu", threads=1, backend=backend, cache=cache)


def file_of(weights: Path, cache: Path) -> Path:
    return cache / f"{sha256_of(weights)}-{openvino_backend._versions()}.graph"


def assert_like_torch(weights: Path, detector: Detector) -> None:
    expected = Detector.load(weights, "cpu", threads=1, backend="torch").score(IMAGES, 64)
    for score, other in zip(detector.score(IMAGES, 64), expected, strict=True):
        assert len(score.confidences) == len(other.confidences) > 0
        assert np.allclose(np.sort(score.confidences), np.sort(other.confidences), atol=1e-4)
        assert np.allclose(np.sort(score.boxes_xyxy, 0), np.sort(other.boxes_xyxy, 0), atol=1e-3)
        assert np.allclose(score.best_candidate, other.best_candidate, atol=1e-4)
        assert np.allclose(score.embedding, other.embedding, atol=1e-5)


# --- exports --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_exported_once(
    weights: Path, exported: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of(weights, tmp_path).write_bytes(exported)
    monkeypatch.setattr(Detector, "_export", lambda self: pytest.fail("it was exported again"))
    detector = load(weights, tmp_path)
    assert_like_torch(weights, detector)
    assert detector.backend == "openvino"
    assert [file.name for file in tmp_path.iterdir()] == [file_of(weights, tmp_path).name]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_export_is_made_again(
    weights: Path, exported: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    middle = len(exported) // 2
    flipped = exported[:middle] + bytes([exported[middle] ^ 1]) + exported[middle + 1 :]
    file_of(weights, tmp_path).write_bytes({"cut": exported[:middle], "flipped": flipped, "empty": b""}[damage])
    made = []

    def export() -> Any:
        made.append(1)
        return openvino_backend._read(whole)

    whole = tmp_path / "whole"
    whole.write_bytes(exported)
    graph = cached_graph(tmp_path, sha256_of(weights), export)
    assert made == [1]
    assert "made again" in caplog.text
    assert graph.input(0).partial_shape[3] == 3
    assert len(openvino_backend._read(file_of(weights, tmp_path)).outputs) == len(graph.outputs)


def test_a_conversion_that_fails_leaves_it_to_torch(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("an operation nobody knows")

    monkeypatch.setattr(detector_module, "_traced", fail)
    detector = load(weights, tmp_path)
    assert_like_torch(weights, detector)
    assert detector.backend == "torch"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "an operation nobody knows" in record.getMessage()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("output", "what"), [(0, "embeddings"), (1, "probabilities"), (2, "boxes")])
def test_an_export_that_answers_otherwise_than_torch_is_refused(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    output: int,
    what: str,
) -> None:
    right = OpenVinoForward.__call__

    def wrong(self: OpenVinoForward, pixels: Any) -> Any:
        outputs = right(self, pixels)
        outputs[output] = outputs[output][..., ::-1].copy()
        return outputs

    monkeypatch.setattr(OpenVinoForward, "__call__", wrong)
    detector = load(weights, tmp_path)
    assert_like_torch(weights, detector)
    assert detector.backend == "torch"
    assert f"other {what} than torch" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_only_time(
    weights: Path, exported: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(exported)
    no_folder = tmp_path / "file"
    no_folder.write_bytes(b"")
    graph = cached_graph(no_folder, "0" * 64, lambda: openvino_backend._read(whole))
    assert graph.input(0).partial_shape[3] == 3
    assert "cannot be kept" in caplog.text


def test_the_exports_not_used_for_longest_are_removed(
    exported: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_backend, "EXPORTS_KEPT", 2)
    whole = tmp_path / "whole"
    whole.write_bytes(exported)
    cache = tmp_path / "cache"
    for age, name in ((30, "a"), (20, "b"), (10, "c")):
        if name == "c":
            cached_graph(cache, "a", lambda: pytest.fail("it is there"))  # used last
        cached_graph(cache, name, lambda: openvino_backend._read(whole))
        for file in cache.glob(f"{name}-*"):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert sorted(file.name[0] for file in cache.iterdir()) == ["a", "c"]


# --- networks -------------------------------------------------------------------------------------------------------


def test_a_frame_that_comes_often_gets_a_network_of_its_own(
    weights: Path, exported: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_backend, "WORTH_COMPILING", 3)
    monkeypatch.setattr(openvino_backend, "FRAMES_COMPILED", 1)
    file_of(weights, tmp_path).write_bytes(exported)
    detector = load(weights, tmp_path)
    flat, square = IMAGES[0], IMAGES[1]
    rare = detector.score([flat, square], 64)
    assert detector._openvino is not None
    compiled = detector._openvino._compiled
    assert list(compiled) == []
    often = detector.score([flat] * 3, 64)
    assert list(compiled) == [(1, 64, 64, 3)]
    for score in often:
        assert np.allclose(score.boxes_xyxy, rare[0].boxes_xyxy, atol=1e-4)
        assert np.allclose(score.probabilities, rare[0].probabilities, atol=1e-6)
    wide = IMAGES[0].resize((64, 24))
    detector.score([wide] * 3, 64)
    assert list(compiled) == [(1, 32, 64, 3)]  # the other one left


def test_a_pass_is_computed_in_32_bits_with_the_threads_torch_has(
    weights: Path, exported: bytes, tmp_path: Path
) -> None:
    file_of(weights, tmp_path).write_bytes(exported)
    detector = load(weights, tmp_path)
    detector.score(IMAGES[:1], 64)
    assert detector._openvino is not None
    network = detector._openvino._any_frame
    assert network.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert network.get_property("INFERENCE_NUM_THREADS") == 1
    assert network.get_property("NUM_STREAMS") == 1


# --- choosing -------------------------------------------------------------------------------------------------------


def test_openvino_is_for_the_cpu_in_32_bits(weights: Path, tmp_path: Path) -> None:
    assert load(weights, tmp_path).backend == "openvino"
    assert load(weights, tmp_path, "torch").backend == "torch"
    assert Detector.load(weights, "cpu", threads=1, half=True).backend == "torch"
    with pytest.raises(SettingsInvalid, match="32 bits"):
        Detector.load(weights, "cpu", threads=1, half=True, backend="openvino")
    with pytest.raises(SettingsInvalid, match="onnx"):
        load(weights, tmp_path, "onnx")
