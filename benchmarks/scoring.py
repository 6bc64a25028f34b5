"""Scoring a pool of images on the CPU: the reference way against ours, with the same weights, images and threads.

The reference way, per 32 paths: `model.predict(conf=0.25)`; then a second pass, which opens each image again with
Pillow, resizes it to 224x224, runs `model.model.model[:10]` one image at a time and averages over height and width.
Ours is what a shard of a round runs: `worker.model.Scorer`, from the file's bytes to regions, measures and embedding.

The two take turns over parts of the pool, and so does the backend's forward pass alone, on frames that lie ready: what
it takes is the limit of what OpenVINO can give. Reported are medians over the parts. Compiling is not in them: before
the first turn each side has seen the whole pool, as a worker has after its first shard.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from demo.factory import render
from demo.oracle import label_config
from worker import detector as detector_module
from worker.detector import Detector, load_ultralytics, prepare_ultralytics
from worker.images import decode_image

CLASSES = 8
IMGSZ = 640
CONFIDENCE = 0.25  # from which detections are compared
UNIFORM = [(640, 480)]
MIXED = [  # (width, height): what cameras, phones and cropping tools make
    (640, 480),
    (480, 640),
    (1280, 720),
    (720, 1280),
    (1080, 720),
    (800, 800),
    (1200, 600),
    (1400, 500),
]
SEEN = 2  # anchors of each of the three levels that see something, per image
BOX_TOLERANCE, CONFIDENCE_TOLERANCE = 1e-3, 1e-4  # pixels of the image; 0..1

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Bench:
    weights: Path
    pools: dict[str, list[Path]]
    part: int  # images in one turn
    threads: int


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    if given.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        prepare_ultralytics(Path(folder) / "ultralytics")
        if given.only:
            _run_alone(given)
            return
        bench = _prepare(Path(folder), given)
        found = {name: _compare(bench, name) for name in bench.pools}
        memory = {} if given.quick else {side: _peak_memory(bench, side, given) for side in ("reference", "ours")}
    _print(found, memory)
    if given.json:
        print(json.dumps(_summary(found) | {"pools": found, "peak_mb": memory, "threads": bench.threads}))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scoring", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images at half the size, without memory: for CI")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--weights", type=Path, help="a .pt file (else yolo11n with random weights that see something)")
    parser.add_argument("--images", type=Path, help="a folder of images to cut the pools from (else generated ones)")
    parser.add_argument("--count", type=int, help="images in each pool (256)")
    parser.add_argument("--threads", type=int, help="of both sides' passes (ultralytics' choice: cores less one)")
    parser.add_argument("--one-core", action="store_true", help="everything on one core: no help from decoding threads")
    parser.add_argument("--only", choices=["reference", "ours"], help=argparse.SUPPRESS)  # measured in its own process
    return parser.parse_args(arguments)


def _prepare(folder: Path, given: argparse.Namespace) -> Bench:
    threads = _set_threads(given.threads)
    count = given.count or (32 if given.quick else 256)
    pools = {
        "mixed": _pool(folder / "mixed", MIXED, count, given),
        "uniform": _pool(folder / "uniform", UNIFORM, count, given),
    }
    weights = given.weights or _loud_weights(folder / "yolo11n-loud.pt", pools["uniform"][:32])
    return Bench(weights, pools, 32, threads)


def _set_threads(threads: int | None) -> int:
    """Threads of a pass, on both sides; ultralytics takes them from its constants whenever it selects a device."""
    load_ultralytics()
    from ultralytics import utils
    from ultralytics.utils import torch_utils

    if threads is not None:
        utils.NUM_THREADS = torch_utils.NUM_THREADS = threads
    return int(utils.NUM_THREADS)


def _pool(folder: Path, sizes: Sequence[tuple[int, int]], count: int, given: argparse.Namespace) -> list[Path]:
    """JPEG files of these sizes, in turn."""
    folder.mkdir()
    sources = sorted(path for path in given.images.iterdir() if path.is_file()) if given.images else []
    paths = []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        paths.append(folder / f"{number:04}.jpg")
        if sources:
            with Image.open(sources[number % len(sources)]) as image:
                picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        else:
            picture = render(1, number, (width, height))[0]
        picture.save(paths[-1], quality=90)
    return paths


def _loud_weights(file: Path, paths: Sequence[Path]) -> Path:
    """yolo11n of random weights, normalised on these images as by a training, so that its heads see some things."""
    import torch
    from ultralytics.cfg import DEFAULT_CFG_DICT
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolo11n.yaml", nc=CLASSES, verbose=False)
    model.names = {number: f"thing {number}" for number in range(CLASSES)}
    pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(pixels)
        for norm in norms:
            norm.momentum = 0.03
            norm.running_var += norm.running_mean**2  # a channel of large mean would amplify rounding errors
        logits = model.eval()(pixels)[1]["scores"]
        for layers in model.model[-1].cv2:
            layers[-1].weight.data *= 0.3
            layers[-1].bias.data = -0.6 * torch.arange(16.0).repeat(4)  # boxes of a few strides, as after a training
        levels = logits.split([pixels[0, 0].numel() // stride**2 for stride in (8, 16, 32)], 2)
        for layers, seen in zip(model.model[-1].cv3, levels, strict=True):
            strongest = seen.amax(1).flatten().sort(descending=True).values
            seen_well = strongest[SEEN * len(paths)]
            # at most .999998, for at 1.0 several classes would tie; and no more than a training would tell apart
            gain = min(14 / (strongest[0] - seen_well), 3 / seen.std())
            layers[-1].weight.data *= gain
            layers[-1].bias.data = (layers[-1].bias.data - seen_well) * gain - 1.1  # there the probability is .25
    model.args = DEFAULT_CFG_DICT
    torch.save({"model": model.half(), "train_args": DEFAULT_CFG_DICT, "epoch": -1}, file)
    return file


# --- the two sides --------------------------------------------------------------------------------------------------


class Reference:
    """The reference way, as it is written above."""

    def __init__(self, weights: Path) -> None:
        from ultralytics import YOLO

        self.model = YOLO(str(weights))
        self.speed: list[dict[str, float]] = []
        self.embedding_seconds = 0.0

    def __call__(self, paths: Sequence[Path]) -> None:
        for start in range(0, len(paths), 32):
            results = self.predict(paths[start : start + 32])
            self.speed += [result.speed for result in results]
        began = time.perf_counter()
        for path in paths:
            self.embed(path)
        self.embedding_seconds += time.perf_counter() - began

    def predict(self, paths: Sequence[Path]) -> list[Any]:
        named = [str(path) for path in paths]
        return cast(
            list[Any], self.model.predict(named, conf=CONFIDENCE, imgsz=IMGSZ, device="cpu", save=False, verbose=False)
        )

    def embed(self, path: Path) -> Any:
        import torch

        image = Image.open(path).convert("RGB").resize((224, 224))
        x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            for layer in self.model.model.model[:10]:
                x = layer(x)
        return x.mean((2, 3))


class Ours:
    """A round's scorer, whose Label Studio and artifacts are files."""

    def __init__(self, weights: Path) -> None:
        from worker.model import Scorer

        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        services = SimpleNamespace(
            ultralytics_dir=Path(os.environ["YOLO_CONFIG_DIR"]),
            settings=SimpleNamespace(device="cpu"),
            artifacts=SimpleNamespace(local=lambda key, sha256: weights),
            images=SimpleNamespace(open=lambda data, key, task_id: decode_image(Path(data[key]).read_bytes())),
        )
        names = Detector.load(weights, "cpu", backend="torch").names.values()
        project = SimpleNamespace(id=1, label_config=label_config(list(names)))
        settings = json.dumps({"imgsz": IMGSZ})
        round_row = SimpleNamespace(weights="weights.pt", weights_sha256=digest, settings=settings, report="{}")
        self.scorer = Scorer(cast(Any, services), cast(Any, project), cast(Any, round_row))
        assert self.scorer.detector is not None
        self.detector = self.scorer.detector

    def __call__(self, paths: Sequence[Path]) -> None:
        images = [(number, str(path)) for number, path in enumerate(paths)]
        problems = [score.problem for score in self.scorer.score(images) if score.problem]
        assert not problems, problems[0]

    def frames(self, paths: Sequence[Path]) -> list[Any]:
        pictures = [detector_module.displayed(decode_image(path.read_bytes())) for path in paths]
        frame = detector_module._frame_for_predict
        return [frame(picture, self.detector._round(IMGSZ), self.detector.stride) for picture in pictures]

    def forward(self, frames: Sequence[Any]) -> None:
        for frame in frames:
            self.detector._look(frame.pixels[None])


# --- what is measured -----------------------------------------------------------------------------------------------


def _compare(bench: Bench, name: str) -> dict[str, Any]:
    paths = bench.pools[name]
    parts = [paths[start : start + bench.part] for start in range(0, len(paths), bench.part)]
    reference, ours = Reference(bench.weights), Ours(bench.weights)
    began = time.perf_counter()
    ours(paths)
    first = time.perf_counter() - began
    reference(paths[: 2 * len(MIXED)])
    reference.speed, reference.embedding_seconds = [], 0.0
    frames = {id(part): ours.frames(part) for part in parts}
    sides: dict[str, Callable[[Sequence[Path]], None]] = {
        "reference": reference,
        "ours": ours,
        "limit": lambda part: ours.forward(frames[id(part)]),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn, part in enumerate(parts):
        order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for side in order:
            began = time.perf_counter()
            sides[side](part)
            seconds[side].append((time.perf_counter() - began) / len(part))
    apart = [_differences(reference, ours, path) for path in paths]
    return {
        "ratio": _median_ratio(seconds["reference"], seconds["ours"]),
        "limit_share": _median_ratio(seconds["limit"], seconds["ours"]),
        "images_per_second": {side: round(1 / statistics.median(values), 2) for side, values in seconds.items()},
        "first_pass_images_per_second": round(len(paths) / first, 2),
        "backend": ours.detector.backend,
        "detections": sum(found["detections"] for found in apart),
        "images_that_differ": sum(found["differs"] for found in apart),
        "largest_box_difference": max(found["box"] for found in apart),
        "largest_confidence_difference": max(found["confidence"] for found in apart),
        "stages_ms": {
            "reference": _reference_stages(reference, seconds["reference"]),
            "ours": _our_stages(ours, paths),
        },
    }


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def _reference_stages(reference: Reference, seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds an image, of the turns that were measured; `rest`: reading, making results."""
    speed, images = reference.speed, len(reference.speed)
    stages = {key: sum(one[key] for one in speed) / images for key in ("preprocess", "inference", "postprocess")}
    stages["second pass"] = 1000 * reference.embedding_seconds / images
    stages["rest"] = 1000 * statistics.mean(seconds) - sum(stages.values())
    return {key: round(value, 2) for key, value in stages.items()}


def _our_stages(ours: Ours, paths: Sequence[Path]) -> dict[str, float]:
    """Milliseconds an image, each stage alone. In a round all but `inference` run beside it."""
    scorer, detector = ours.scorer, ours.detector
    taken: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        taken[stage] = taken.get(stage, 0) + 1000 * (time.perf_counter() - began)
        return result

    chosen = paths[:64]
    size, stride = detector._round(IMGSZ), detector.stride
    for path in chosen:
        image = timed("decode", lambda path=path: decode_image(path.read_bytes()))
        framed = timed(
            "frame",
            lambda image=image: detector_module._frame_for_predict(detector_module.displayed(image), size, stride),
        )
        look = timed("inference", lambda framed=framed: detector._look(framed.pixels[None]))
        scores = timed(
            "boxes, NMS",
            lambda framed=framed, look=look: list(detector_module._image_scores([framed], look, 0.25, 0.05)),
        )
        timed("regions, measures", lambda scores=scores: [scorer._task_score(0, score, None) for score in scores])
    return {stage: round(value / len(chosen), 2) for stage, value in taken.items()}


def _differences(reference: Reference, ours: Ours, path: Path) -> dict[str, Any]:
    """Our detections of an image against `model.predict`'s of that image alone, which has the same frame."""
    boxes = reference.predict([path])[0].boxes.cpu().numpy()
    (score,) = ours.detector.score([decode_image(path.read_bytes())], IMGSZ)
    found = np.column_stack([score.boxes_xyxy, score.confidences, score.class_ids])[: score.drawn]
    expected = np.column_stack([boxes.xyxy, boxes.conf, boxes.cls])
    return differences(found, score.probabilities[: score.drawn], expected)


def differences(found: Rows, probabilities: Rows, expected: Rows, threshold: float = CONFIDENCE) -> dict[str, Any]:
    """Do these detections of one image equal those, as far as rounding allows?

    Each of ours answers for one of theirs: boxes within a thousandth of a pixel, confidences within a ten-thousandth,
    the same class. Two sums of 32 bits in another order round differently, so two things are no difference: a
    detection that only one side has, when its confidence is within the tolerance of the threshold; and another class
    of the same box, when we give both classes the same probability within the tolerance. A box that only one side
    keeps, for whatever other reason, is one.

    Args:
        found: (n, 6) x1, y1, x2, y2 in pixels, confidence, class; in any order.
        probabilities: (n, C) of the classes, for the same detections.
        expected: (m, 6) as `found`.
        threshold: the confidence from which detections were asked for.

    Returns:
        detections: m; differs; box, confidence: the largest differences between detections that answer each other.
    """
    off = np.abs(found[:, None, :5] - expected[None, :, :5])  # (n, m, 5)
    tied = np.abs(probabilities[:, expected[:, 5].astype(int)] - found[:, 4:5]) <= CONFIDENCE_TOLERANCE
    same = (off[..., :4].max(-1) <= BOX_TOLERANCE) & (off[..., 4] <= CONFIDENCE_TOLERANCE) & tied
    answers = maximum_bipartite_matching(csr_matrix(same), perm_type="column")  # (n,): one of theirs, or -1
    ours, theirs = np.flatnonzero(answers >= 0), answers[answers >= 0]
    alone = np.concatenate([np.delete(found, ours, 0)[:, 4], np.delete(expected, theirs, 0)[:, 4]])
    matched = off[ours, theirs]
    return {
        "detections": len(expected),
        "differs": bool((np.abs(alone - threshold) > CONFIDENCE_TOLERANCE).any()),
        "box": float(matched[:, :4].max(initial=0)),
        "confidence": float(matched[:, 4].max(initial=0)),
    }


def _peak_memory(bench: Bench, side: str, given: argparse.Namespace) -> float:
    """Megabytes, of a process that scores the mixed pool in this way."""
    folder = bench.pools["mixed"][0].parent
    command = [sys.executable, "-m", "benchmarks.scoring", "--only", side, "--weights", str(bench.weights)]
    command += ["--images", str(folder), "--threads", str(bench.threads)] + ["--one-core"] * given.one_core
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return float(done.stdout.split()[-1])


def _run_alone(given: argparse.Namespace) -> None:
    _set_threads(given.threads)
    paths = sorted(given.images.iterdir())
    (Reference if given.only == "reference" else Ours)(given.weights)(paths)
    print(_peak_megabytes())


def _peak_megabytes() -> float:
    """Not getrusage on Linux: a child's ru_maxrss begins at what its parent had."""
    with contextlib.suppress(FileNotFoundError):
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # bytes on macOS


# --- what is said ---------------------------------------------------------------------------------------------------


def _summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "f32_mixed": found["mixed"]["ratio"],
        "f32_uniform": found["uniform"]["ratio"],
        "limit_share": min(pool["limit_share"] for pool in found.values()),
        "equal": not any(pool["images_that_differ"] for pool in found.values()),
    }


def _print(found: dict[str, dict[str, Any]], memory: dict[str, float]) -> None:
    print(f"{'pool':10}{'reference':>11}{'ours':>8}{'limit':>8}   images/s{'ratio':>8}{'of limit':>10}{'differ':>8}")
    for name, pool in found.items():
        speed = pool["images_per_second"]
        print(
            f"{name:10}{speed['reference']:11.1f}{speed['ours']:8.1f}{speed['limit']:8.1f}{'':11}{pool['ratio']:8.2f}"
            f"{pool['limit_share']:10.2f}{pool['images_that_differ']:8}   of {pool['detections']} detections, by "
            f"{pool['largest_box_difference']:.1e} px, {pool['largest_confidence_difference']:.1e}"
        )
    for name, pool in found.items():
        for side, stages in pool["stages_ms"].items():
            print(f"{name}, {side}, ms an image: " + ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages.items()))
        print(f"{name}, first time (load, export, compile): {pool['first_pass_images_per_second']:.1f} images/s")
    for side, megabytes in memory.items():
        print(f"{side}: at most {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
