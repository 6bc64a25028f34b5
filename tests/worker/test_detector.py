"""worker.detector: against ultralytics' own predict and val, with small networks of random weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw, ImageOps

from worker import detector as detector_module
from worker.detector import (
    Detector,
    ImageScore,
    collect_detections,
    displayed,
    is_published_name,
    load_ultralytics,
    pick_device,
    prepare_ultralytics,
    resolve_weights,
    sha256_of,
)
from worker.errors import ArtifactDamaged, ImageUnusable, SettingsInvalid, WeightsUnavailable
from worker.evaluation import Truth, evaluate

Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def make_weights(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Write a checkpoint of random weights whose classifier is loud: confidences spread from 0 to 1."""
    folder = tmp_path_factory.mktemp("weights")
    prepare_ultralytics(folder / "config")
    made: dict[tuple[str, int], Path] = {}

    def make(architecture: str = "yolov8n", classes: int = 3) -> Path:
        key = (architecture, classes)
        if key not in made:
            made[key] = _write_loud(folder / f"{architecture}-{classes}.pt", architecture, classes)
        return made[key]

    return make


def _write_loud(file: Path, architecture: str, classes: int) -> Path:
    load_ultralytics()
    import torch
    from ultralytics.cfg import DEFAULT_CFG_DICT
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(classes)
    model = DetectionModel(f"{architecture}.yaml", nc=classes, verbose=False)
    model.names = {index: f"class {index}" for index in range(classes)}
    pictures = np.stack([np.asarray(speckled(128, 128, seed)) for seed in range(8)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(pixels)  # as after a training every layer speaks up, or the network says the same everywhere
    for norm in norms:
        norm.momentum = 0.03
        norm.running_var += norm.running_mean**2  # a channel of large mean would amplify rounding errors
    model.eval()
    head = model.model[-1]
    with torch.no_grad():
        raw = model(pixels)[1]
        scores = raw.get("one2many", raw)["scores"]
        spread, centre = scores.std((0, 2)), scores.mean((0, 2))
        for branch in filter(None, (head.cv3, getattr(head, "one2one_cv3", None))):
            for layers in branch:
                last = layers[-1]
                last.weight.data *= (2.5 / spread)[:, None, None, None]
                last.bias.data = (last.bias.data - centre) * 2.5 / spread - 2.0
        near = -0.6 * torch.arange(16.0).repeat(4) if head.reg_max == 16 else torch.full((4,), 1.5)
        for branch in filter(None, (head.cv2, getattr(head, "one2one_cv2", None))):
            for layers in branch:  # boxes of a few strides, or they would all cover the image
                layers[-1].weight.data *= 0.3
                layers[-1].bias.data = near.clone()
    model.args = DEFAULT_CFG_DICT
    torch.save({"model": model.half(), "train_args": DEFAULT_CFG_DICT, "epoch": -1}, file)
    return file


def speckled(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


SIZES = [(97, 61), (64, 200), (300, 300), (128, 96), (640, 30), (96, 128)]


def loaded(file: Path, backend: str = "auto") -> Detector:
    return Detector.load(file, "cpu", threads=1, backend=backend)


@pytest.fixture(scope="module", params=["torch", "openvino"])
def loud(make_weights: Maker, request: pytest.FixtureRequest) -> Detector:
    return loaded(make_weights(), request.param)


# --- scoring --------------------------------------------------------------------------------------------------------


def both_backends(*architectures: str) -> list[Any]:
    """The slow ones export anew, in some seconds."""
    fast = [pytest.param(architecture, "torch") for architecture in architectures]
    exported = [(architecture, "openvino") for architecture in architectures]
    return fast + [pytest.param(*one, marks=[] if one[0] == "yolo26n" else [pytest.mark.slow]) for one in exported]


def assert_same_detections(score: ImageScore, n: int, expected: Any) -> None:
    """The first n are ultralytics' boxes."""
    assert_same_rows(
        np.column_stack([score.boxes_xyxy, score.confidences, score.class_ids])[:n],
        np.column_stack([expected.xyxy.numpy(), expected.conf.numpy(), expected.cls.numpy()]),
    )


def assert_same_rows(found: np.ndarray, expected: np.ndarray) -> None:
    """Rows of box, confidence, class, or of box and probabilities; equally confident ones may come in any order."""
    assert found.shape == expected.shape
    left = list(range(len(found)))
    for row in expected:
        nearest = min(left, key=lambda position: np.abs(found[position] - row).max())
        left.remove(nearest)
        assert found[nearest, :4] == pytest.approx(row[:4], abs=1e-3)
        assert found[nearest, 4:] == pytest.approx(row[4:], abs=1e-4)


def assert_same_scores(score: ImageScore | ImageUnusable, expected: ImageScore) -> None:
    assert isinstance(score, ImageScore)
    assert (score.width, score.height, score.drawn) == (expected.width, expected.height, expected.drawn)
    rows = [np.hstack([one.boxes_xyxy, one.probabilities]) for one in (score, expected)]
    assert_same_rows(*rows)
    assert np.allclose(score.embedding, expected.embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "backend"), both_backends("yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo26n")
)
def test_scores_are_those_of_predict(make_weights: Maker, architecture: str, backend: str) -> None:
    from ultralytics import YOLO

    file = make_weights(architecture)
    images = [speckled(*size, seed) for seed, size in enumerate(SIZES)]
    detector = loaded(file, backend)
    scores = detector.score(images, imgsz=96, confidence=0.25, low=0.05)
    assert detector.backend == backend  # it did not fall back
    reference = YOLO(str(file))
    boxes = 0
    for image, score in zip(images, scores, strict=True):
        for confidence, n in ((0.25, score.drawn), (0.05, len(score.confidences))):
            expected = reference.predict(image, imgsz=96, conf=confidence, device="cpu", verbose=False)[0].boxes
            assert_same_detections(score, n, expected)
        boxes += score.drawn
    assert boxes > 20  # or this test compares nothing


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("classes", [1, 3])
def test_probabilities_belong_to_the_boxes(make_weights: Maker, classes: int, backend: str) -> None:
    for score in loaded(make_weights("yolov8n", classes), backend).score(
        [speckled(128, 96, 1), speckled(60, 99, 2)], 96
    ):
        assert len(score.confidences) > 3
        assert score.probabilities.shape == (len(score.confidences), classes)
        assert score.probabilities.dtype == np.float32
        assert np.allclose(score.probabilities.max(1), score.confidences, atol=1e-6)
        assert np.array_equal(score.probabilities.argmax(1), score.class_ids)
        assert np.array_equal(score.best_candidate, score.probabilities[0])  # rows are ordered
        assert (np.diff(score.confidences) <= 0).all()
        assert score.drawn == int((score.confidences >= 0.25).sum())


def test_nothing_above_low_still_has_a_best_candidate(loud: Detector) -> None:
    image = speckled(128, 96, 3)
    everything = loud.score([image], 96, low=0.01)[0]
    nothing = loud.score([image], 96, confidence=0.99999, low=0.99999)[0]
    assert len(nothing.confidences) == 0
    assert nothing.boxes_xyxy.shape == (0, 4)
    assert nothing.probabilities.shape == (0, 3)
    assert nothing.drawn == 0
    assert np.allclose(nothing.best_candidate, everything.best_candidate)
    assert nothing.best_candidate.max() == pytest.approx(everything.confidences[0])


@pytest.mark.parametrize("count", range(9))
def test_any_number_of_candidates_is_suppressed(count: int) -> None:
    load_ultralytics()
    import torch

    probabilities = torch.zeros((1, 2, 10))  # of ten anchors
    probabilities[0, 1, :count] = torch.linspace(0.9, 0.6, 9)[:count]
    boxes = torch.zeros((4, 10))
    boxes[0] = 20.0 * torch.arange(10) + 10  # side by side
    boxes[1:] = torch.tensor([10.0, 8.0, 8.0])[:, None]
    boxes[:, 1] = boxes[:, 0]  # but the second is where the first is
    look = detector_module._Look(probabilities, np.ones((1, 3), np.float32), lambda row, anchors: boxes[:, anchors])
    frame = detector_module.Framed(np.zeros((32, 256, 3), np.uint8), 256, 32, 0, 0, 1, 1)
    (score,) = detector_module._image_scores([frame], look, 0.7, 0.05)
    left = [position for position in range(count) if position != 1]
    assert score.boxes_xyxy[:, 0].tolist() == [20.0 * position + 6 for position in left]
    assert score.probabilities.tolist() == probabilities[0].T[left].tolist()
    assert score.class_ids.tolist() == [1] * len(left)
    assert score.drawn == sum(probabilities[0, 1, left] >= 0.7)


def test_a_confidence_below_low_keeps_what_is_drawn(loud: Detector) -> None:
    image = speckled(128, 96, 3)
    assert loud.score([image], 96, confidence=0.02, low=0.3)[0].drawn > loud.score([image], 96, low=0.3)[0].drawn


def test_a_result_does_not_depend_on_its_neighbours(loud: Detector) -> None:
    images = [speckled(*size, seed) for seed, size in enumerate([*SIZES, (128, 96), (128, 96), (128, 96)])]
    together = loud.score(images, 96, batch=3)
    for image, one in zip(images, together, strict=True):
        alone = loud.score([image], 96)[0]
        assert_same_scores(one, alone)


def test_boxes_are_pixels_of_the_image(loud: Detector) -> None:
    for (width, height), score in zip(SIZES, loud.score([speckled(*s, 5) for s in SIZES], 96), strict=True):
        assert (score.width, score.height) == (width, height)
        assert (score.boxes_xyxy >= 0).all()
        assert (score.boxes_xyxy <= [width, height, width, height]).all()


@pytest.mark.parametrize(("architecture", "backend"), both_backends("yolo11n", "yolo26n"))
def test_the_embedding_is_the_mean_of_the_last_backbone_layer(
    make_weights: Maker, architecture: str, backend: str
) -> None:
    import torch
    from ultralytics.nn.tasks import load_checkpoint

    file = make_weights(architecture)
    detector = loaded(file, backend)
    image = speckled(96, 64, 2)  # longest side 96: the frame is the image itself
    score = detector.score([image], 96)[0]
    model = load_checkpoint(str(file))[0]
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        for layer in model.model[: len(model.yaml["backbone"])]:
            x = layer(x)
    expected = x.mean((2, 3))[0].numpy()
    assert detector.embedding_size == len(expected) == 256
    assert np.allclose(score.embedding, expected / np.linalg.norm(expected), atol=1e-4)
    assert np.linalg.norm(score.embedding) == pytest.approx(1, abs=1e-6)
    assert score.embedding.dtype == np.float32


def test_imgsz_is_rounded_up_to_the_stride(loud: Detector) -> None:
    image = speckled(128, 96, 4)
    assert np.array_equal(loud.score([image], 90)[0].boxes_xyxy, loud.score([image], 96)[0].boxes_xyxy)


def test_no_images_give_no_scores(loud: Detector) -> None:
    assert loud.score([], 96) == []


def test_exif_is_applied_once(loud: Detector) -> None:
    image = speckled(128, 64, 6)
    exif = Image.Exif()
    exif[0x0112] = 8
    file = BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = Image.open(file)
    score, expected = loud.score([turned, ImageOps.exif_transpose(Image.open(file))], 96)
    assert (score.width, score.height) == (64, 128)
    assert np.allclose(score.boxes_xyxy, expected.boxes_xyxy)
    assert len(score.boxes_xyxy) > 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_any_mode_is_read_as_predict_reads_it(make_weights: Maker, loud: Detector, mode: str) -> None:
    from ultralytics import YOLO

    image = speckled(128, 96, 8)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    else:
        image = image.convert(mode)
    score = loud.score([image], 96)[0]
    expected = YOLO(str(make_weights())).predict(image, imgsz=96, conf=0.25, device="cpu", verbose=False)[0].boxes
    assert np.allclose(score.boxes_xyxy[: score.drawn], expected.xyxy.numpy(), atol=1e-2)
    assert score.drawn == len(expected) > 0


def test_a_broken_image_is_named_unusable() -> None:
    file = BytesIO()
    speckled(200, 200, 1).save(file, "JPEG")
    cut = Image.open(BytesIO(file.getvalue()[:900]))
    with pytest.raises(ImageUnusable, match="cannot be decoded"):
        displayed(cut)


def test_a_broken_image_costs_only_itself(loud: Detector) -> None:
    file = BytesIO()
    speckled(200, 200, 1).save(file, "JPEG")
    images = [
        speckled(128, 96, 1),
        Image.open(BytesIO(file.getvalue()[:900])),
        speckled(60, 99, 2),
        speckled(128, 96, 3),
    ]
    gone = ImageUnusable("the image is gone")
    first, broken, second, handed_on, third = loud.score_each([*images[:3], gone, images[3]], 96, batch=2)
    assert isinstance(broken, ImageUnusable)
    assert "cannot be decoded" in str(broken)
    assert handed_on is gone
    alone = loud.score([images[0], images[2], images[3]], 96)
    for score, expected in zip((first, second, third), alone, strict=True):
        assert_same_scores(score, expected)
    with pytest.raises(ImageUnusable, match="cannot be decoded"):
        loud.score(images, 96)


def test_an_image_framed_before_is_scored_as_the_image(loud: Detector) -> None:
    images = [speckled(*size, seed) for seed, size in enumerate(SIZES)]
    framed = [loud.frame(image, 90) for image in images]
    for found, expected in zip(loud.score_each(framed, 90, batch=3), loud.score(images, 90), strict=True):
        assert_same_scores(found, expected)


def test_images_are_taken_a_few_at_a_time(loud: Detector) -> None:
    taken: list[int] = []

    def images() -> Iterator[Image.Image]:
        for seed in range(40):
            taken.append(seed)
            yield speckled(64, 64, seed)

    scores = loud.score_each(images(), 64, batch=2)
    next(scores)
    assert len(taken) <= 8
    assert len(list(scores)) == 39


def test_threads_share_a_detector(loud: Detector) -> None:
    images = [speckled(128, 96, seed) for seed in range(4)]
    expected = loud.score(images, 96)
    results: dict[int, Any] = {}

    def work(position: int) -> None:
        results[position] = loud.score([images[position]], 96)[0]

    workers = [threading.Thread(target=work, args=(position,)) for position in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for position, score in enumerate(expected):
        assert_same_scores(results[position], score)


def test_weights_that_are_not_numbers_are_refused(make_weights: Maker, tmp_path: Path) -> None:
    import torch

    content = torch.load(make_weights(), weights_only=False)
    content["model"].model[0].conv.weight.data[:] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(ArtifactDamaged, match="not numbers"):
        Detector.load(tmp_path / "nan.pt", "cpu")


# --- the holdout ----------------------------------------------------------------------------------------------------


Drawn = tuple[Image.Image, np.ndarray, np.ndarray]


def drawn(width: int, height: int, seed: int) -> Drawn:
    """A grey image with squares of two colours: the image, their boxes_yolo (n, 4), their classes (n,)."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
    boxes, classes = [], []
    for _ in range(int(rng.integers(1, 4))):
        side = int(rng.integers(min(width, height) // 5, min(width, height) // 2))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        class_id = int(rng.integers(0, 2))
        ImageDraw.Draw(image).rectangle([x, y, x + side - 1, y + side - 1], fill=("red", "blue")[class_id])
        boxes.append([(x + side / 2) / width, (y + side / 2) / height, side / width, side / height])
        classes.append(class_id)
    return image, np.array(boxes), np.array(classes)


@pytest.fixture(scope="module")
def trained_weights(make_weights: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that learned to find the squares a little, in some seconds: a plain loop, for the loss only."""
    load_ultralytics()
    import torch
    from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    model.names, model.args = {0: "red", 1: "blue"}, get_cfg()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # ultralytics' .03 is for longer trainings
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=100)
    for step in range(100):
        scenes = [drawn(96, 96, 1000 * step + position) for position in range(4)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _, _ in scenes])).permute(0, 3, 1, 2) / 255
        batch = {
            "img": pixels,
            "bboxes": torch.from_numpy(np.concatenate([boxes for _, boxes, _ in scenes])).float(),
            "cls": torch.from_numpy(np.concatenate([classes for _, _, classes in scenes])).float()[:, None],
            "batch_idx": torch.from_numpy(np.repeat(np.arange(4), [len(boxes) for _, boxes, _ in scenes])).float(),
        }
        optimizer.zero_grad()
        model.train()(batch)[0].sum().backward()
        optimizer.step()
        schedule.step()
    file = tmp_path_factory.mktemp("trained") / "trained.pt"
    model.criterion, model.args = None, DEFAULT_CFG_DICT
    torch.save({"model": model.eval().half(), "train_args": DEFAULT_CFG_DICT, "epoch": -1}, file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_evaluation_is_that_of_val(trained_weights: Path, tmp_path: Path, suffix: str) -> None:
    from ultralytics import YOLO

    folder = tmp_path / "holdout"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    items, index, boxes, classes = [], [], [], []
    sizes = [(97, 61), (64, 200), (300, 300), (128, 96), (96, 128), (96, 96), (31, 33), (200, 64)] * 4
    for row, (width, height) in enumerate(sizes):
        image, boxes_yolo, class_ids = drawn(width, height, row)
        items.append((1000 + row, folder / "images" / f"{row:03}.{suffix}"))
        image.save(items[-1][1])
        lines = [f"{c} " + " ".join(f"{v:.9f}" for v in box) for c, box in zip(class_ids, boxes_yolo, strict=True)]
        (folder / "labels" / f"{row:03}.txt").write_text("\n".join(lines))
        index += [row] * len(class_ids)
        boxes.append(np.hstack([boxes_yolo[:, :2] - boxes_yolo[:, 2:] / 2, boxes_yolo[:, :2] + boxes_yolo[:, 2:] / 2]))
        boxes[-1] *= [width, height] * 2
        classes += class_ids.tolist()
    names = {0: "red", 1: "blue"}
    yaml_text = yaml.safe_dump({"path": str(folder), "train": "images", "val": "images", "names": names})
    (folder / "data.yaml").write_text(yaml_text)
    keys = np.array([key for key, _ in items])
    truth = Truth(keys, np.array(index), np.concatenate(boxes).astype(np.float32), np.array(classes))

    result = evaluate(collect_detections(loaded(trained_weights), items, 96, batch=3), truth)

    options = {"imgsz": 96, "batch": 1, "rect": True, "plots": False, "verbose": False, "device": "cpu"}
    model = YOLO(str(trained_weights))
    expected = model.val(data=str(folder / "data.yaml"), project=str(tmp_path), **options).box
    assert 0.1 < expected.map50 < 0.95
    assert result.map50 == pytest.approx(expected.map50, abs=1e-4)
    assert result.map50_95 == pytest.approx(expected.map, abs=1e-4)
    assert list(result.ap50) == expected.ap_class_index.tolist()
    assert list(result.ap50.values()) == pytest.approx(expected.ap50.tolist(), abs=1e-4)


def test_detections_cover_all_holdout_images_in_order(loud: Detector) -> None:
    images = [(7, speckled(128, 96, 1)), (3, speckled(64, 200, 2)), (5, speckled(128, 96, 3))]
    done: list[int] = []
    found = collect_detections(loud, iter(images), 96, batch=1, progress=done.append)
    assert found.keys.tolist() == [7, 3, 5]
    assert found.sizes.tolist() == [[128, 96], [64, 200], [128, 96]]
    assert done == [3]
    assert set(found.image_index.tolist()) == {0, 1, 2}
    assert found.confidences.min() < 0.05  # mAP needs the weak ones
    alone = collect_detections(loud, [images[1]], 96)
    assert np.allclose(found.boxes_xyxy[found.image_index == 1], alone.boxes_xyxy, atol=1e-3)


def test_an_empty_holdout_has_no_detections(loud: Detector) -> None:
    found = collect_detections(loud, [], 96)
    assert (len(found.keys), len(found.confidences), found.sizes.shape) == (0, 0, (0, 2))


def test_an_unreadable_holdout_image_names_its_task(loud: Detector, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ImageUnusable, match="Task 12"):
        collect_detections(loud, [(12, tmp_path / "a.jpg")], 96)


def test_the_holdout_is_always_measured_by_torch(make_weights: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = loaded(make_weights(), "openvino")
    asked: list[Any] = []
    monkeypatch.setattr(detector, "_start_openvino", lambda: asked.append(1))
    found = collect_detections(detector, [(7, speckled(128, 96, 1))], 96)
    expected = collect_detections(loaded(make_weights(), "torch"), [(7, speckled(128, 96, 1))], 96)
    assert not asked
    assert np.array_equal(found.confidences, expected.confidences)
    assert np.array_equal(found.boxes_xyxy, expected.boxes_xyxy)
    assert len(found.confidences) > 0


# --- loading --------------------------------------------------------------------------------------------------------


def test_loading_checks_the_hash(make_weights: Maker) -> None:
    file = make_weights()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert Detector.load(file, "cpu", digest, threads=1).names == {0: "class 0", 1: "class 1", 2: "class 2"}
    with pytest.raises(ArtifactDamaged, match="Start a round"):
        Detector.load(file, "cpu", "0" * 64)


def test_threads_can_be_set(make_weights: Maker) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        Detector.load(make_weights(), "cpu", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(WeightsUnavailable, match=r"x\.pt"):
        Detector.load(tmp_path / "x.pt", "cpu")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"nowhere\.pt"):
        Detector.load(tmp_path / "nowhere.pt", "cpu")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"model": Hostile(), "train_args": {}}, tmp_path / "evil.pt")
    with pytest.raises(WeightsUnavailable):
        Detector.load(tmp_path / "evil.pt", "cpu")
    assert not (tmp_path / "hacked").exists()


def test_a_network_that_is_no_detector_is_refused(tmp_path: Path) -> None:
    load_ultralytics()
    import torch
    from ultralytics.nn.tasks import SegmentationModel

    model = SegmentationModel("yolov8n-seg.yaml", nc=2, verbose=False)
    torch.save({"model": model.half(), "train_args": {"task": "segment"}}, tmp_path / "seg.pt")
    with pytest.raises(WeightsUnavailable, match="segment network"):
        Detector.load(tmp_path / "seg.pt", "cpu")


def test_devices() -> None:
    import torch

    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("").type == ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    with pytest.raises(SettingsInvalid, match=f"torch sees {count} CUDA"):
        pick_device(f"cuda:{count}")
    with pytest.raises(SettingsInvalid, match=f"torch sees {count} CUDA"):
        pick_device(str(count))
    for unknown in ("gpu", "meta", "cuda:x"):
        with pytest.raises(SettingsInvalid, match=unknown):
            pick_device(unknown)


def test_ultralytics_is_tamed(make_weights: Maker) -> None:
    make_weights()
    from ultralytics import utils

    assert utils.SETTINGS["sync"] is False
    assert utils.SAFE_LOAD
    assert not utils.AUTOINSTALL
    assert not utils.ONLINE


# --- resolving weights ----------------------------------------------------------------------------------------------


class _Server:
    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                status, body = outer.answers.get(self.path, (404, b""))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    """Stands in for the release ultralytics publishes its weights in; downloads are allowed."""
    server = _Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(detector_module, "ASSETS_URL", server.url)
    monkeypatch.setenv("HARDFIRST_MAY_DOWNLOAD", "True")
    with contextlib.closing(server.http.socket):
        yield server
        server.http.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without weights in it."""
    monkeypatch.chdir(tmp_path)


def test_a_file_named_by_the_project_wins(make_weights: Maker, tmp_path: Path) -> None:
    base = resolve_weights(str(make_weights()), "/elsewhere/other.pt", tmp_path / "cache")
    assert (base.path, base.pretrained, base.note) == (str(make_weights()), True, "")
    base = resolve_weights("", str(make_weights()), tmp_path / "cache")
    assert base.path == str(make_weights())


def test_an_architecture_starts_from_scratch(tmp_path: Path) -> None:
    base = resolve_weights("yolo11n.yaml", "", tmp_path / "cache")
    assert (base.path, base.pretrained) == ("yolo11n.yaml", False)
    assert "from scratch" in base.note


def test_the_default_without_network_starts_from_scratch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARDFIRST_MAY_DOWNLOAD", "False")
    base = resolve_weights("", "", tmp_path / "cache")
    assert (base.path, base.pretrained) == ("yolo11n.yaml", False)
    assert "yolo11n.pt" in base.note
    assert "YOLO_OFFLINE" in base.note
    assert "HARDFIRST_WEIGHTS" in base.note


def test_a_published_name_is_downloaded_once(assets: _Server, tmp_path: Path) -> None:
    assets.answers["/yolo11n.pt"] = (200, b"PK\x03\x04 weights")
    for _ in range(2):
        base = resolve_weights("", "", tmp_path / "cache")
        assert (base.path, base.pretrained) == (str(tmp_path / "cache" / "yolo11n.pt"), True)
    assert assets.asked == ["/yolo11n.pt"]
    assert (tmp_path / "cache" / "yolo11n.pt").read_bytes() == b"PK\x03\x04 weights"


def test_yolov5n_means_its_newer_namesake(assets: _Server, tmp_path: Path) -> None:
    assets.answers["/yolov5nu.pt"] = (200, b"PK\x03\x04")
    assert resolve_weights("yolov5n.pt", "", tmp_path / "cache").path.endswith("yolov5nu.pt")


@pytest.mark.parametrize(("status", "body"), [(404, b""), (500, b"PK\x03\x04"), (200, b"<html>please log in</html>")])
def test_a_failed_download_leaves_nothing(assets: _Server, tmp_path: Path, status: int, body: bytes) -> None:
    assets.answers["/yolo11n.pt"] = (status, body)
    base = resolve_weights("", "", tmp_path / "cache")
    assert (base.path, base.pretrained) == ("yolo11n.yaml", False)
    assert "download failed" in base.note
    assert len(assets.asked) == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_named_file_that_cannot_be_had_is_an_error(assets: _Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"`weights` is 'yolo11s\.pt'.*download failed.*404"):
        resolve_weights("yolo11s.pt", "", tmp_path / "cache")
    with pytest.raises(WeightsUnavailable, match=r"HARDFIRST_WEIGHTS is 'yolo11s\.pt'"):
        resolve_weights("", "yolo11s.pt", tmp_path / "cache")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("mine.pt", "publishes none of that name"),
        ("/nowhere/yolo11n.pt", "no such file"),
        ("https://example.org/yolo11n.pt", r"must be a \.pt file"),
        ("model.onnx", r"must be a \.pt file"),
        ("nosuch.yaml", "neither a file here nor an architecture"),
        ("rtdetr-l.pt", "only YOLO detectors"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(assets: _Server, tmp_path: Path, named: str, message: str) -> None:
    with pytest.raises(WeightsUnavailable, match=message):
        resolve_weights(named, "", tmp_path / "cache")
    assert assets.asked == []


def test_a_file_ultralytics_would_read_as_another_is_refused(make_weights: Maker, tmp_path: Path) -> None:
    misnamed = tmp_path / "yolov5n.pt"
    misnamed.write_bytes(make_weights().read_bytes())
    with pytest.raises(WeightsUnavailable, match="Rename the file"):
        resolve_weights("yolov5n.pt", "", tmp_path / "cache")
    with pytest.raises(WeightsUnavailable, match="Rename the file"):
        Detector.load(misnamed, "cpu")


def test_published_names() -> None:
    assert is_published_name("yolo11n.pt")
    assert is_published_name("/models/yolov8s.pt")
    assert is_published_name("yolov5n.pt")
    assert not is_published_name("factory.pt")


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
