"""The detector: where its weights come from, and one forward pass that gives boxes, class probabilities, embedding.

torch and ultralytics are imported inside functions: `prepare_ultralytics` must set its environment first.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.errors import ArtifactDamaged, ImageUnusable, SettingsInvalid, WeightsUnavailable
from worker.evaluation import Detections
from worker.images import to_rgb, upright
from worker.openvino_backend import OpenVinoForward, cached_graph

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_WEIGHTS = "yolo11n.pt"
PUT_IT_THERE = "Put it there, or correct the path."
ASSETS_URL = "https://github.com/ultralytics/assets/releases/download/v8.4.0"  # the release ultralytics 8.4 itself uses
NMS_IOU = 0.7  # ultralytics' own, in predict and in val
MAX_DETECTIONS = 300  # likewise
EVALUATION_CONFIDENCE = 0.001  # likewise: pruning any higher before mAP lowers it

_MAY_DOWNLOAD = "HARDFIRST_MAY_DOWNLOAD"  # what the admin said by YOLO_OFFLINE, before we set that ourselves
_DOWNLOAD_SECONDS = 120
_DOWNLOAD_MAX_BYTES = 1 << 30
_TRUE = {"1", "true", "yes", "on", "y", "t"}

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]


# --- ultralytics, tamed ---------------------------------------------------------------------------------------------


def prepare_ultralytics(config_dir: Path) -> None:
    """Set the environment ultralytics reads when it is imported. Call it first in every process that will use it.

    Its settings live in `config_dir`, it installs nothing, unpickles only known classes, and stays off the network
    (the one download we want, `resolve_weights`, is ours). YOLO_OFFLINE, when the admin has set it, forbids that too.

    Raises:
        RuntimeError: ultralytics was imported already, with another environment.
    """
    os.environ.setdefault(_MAY_DOWNLOAD, str(os.environ.get("YOLO_OFFLINE", "").strip().lower() not in _TRUE))
    loaded = sys.modules.get("ultralytics.utils")
    if loaded is not None:
        if not loaded.SAFE_LOAD or loaded.AUTOINSTALL:
            raise RuntimeError("ultralytics was imported before prepare_ultralytics. Call prepare_ultralytics first.")
        return
    config_dir.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        YOLO_CONFIG_DIR=str(config_dir),
        YOLO_AUTOINSTALL="false",
        YOLO_OFFLINE="true",
        YOLO_VERBOSE="false",
        ULTRALYTICS_SAFE_LOAD="1",
    )


def load_ultralytics() -> None:
    """Import ultralytics, prepared, with its telemetry and integrations off. Slow the first time, then free."""
    if "ultralytics" not in sys.modules:
        prepare_ultralytics(Path(os.environ.get("YOLO_CONFIG_DIR") or _fallback_config_dir()))
    import torchvision  # noqa: F401  # ultralytics' NMS takes another code path when this is not loaded
    from ultralytics.utils import SETTINGS

    off = {key: False for key, value in SETTINGS.items() if isinstance(value, bool)}
    dict.update(SETTINGS, off)  # its own update() rewrites the file on disk, and processes race on it


def _fallback_config_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"hardfirst-ultralytics-{os.getuid()}"


def pick_device(device: str = "") -> torch.device:
    """The torch device that `device` names: cpu, cuda, cuda:1, 1 (short for cuda:1), mps. Empty: cuda if any, else cpu.

    Raises:
        SettingsInvalid: no such device, or not on this machine.
    """
    import torch

    name = device.strip().lower()
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(f"cuda:{name}" if name.isdigit() else name)
    except RuntimeError as error:
        raise SettingsInvalid(f"device {device!r} is unknown. Use cpu, cuda, cuda:1 or mps, or nothing.") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise SettingsInvalid(f"device {device!r} is not supported. Use cpu, cuda, cuda:1 or mps, or nothing.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SettingsInvalid(f"device is {device!r}, but torch sees {count} CUDA devices. Leave it empty, or set cpu.")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsInvalid(f"device is {device!r}, but this machine has no Apple GPU. Leave it empty, or set cpu.")
    return chosen


def device_words(device: torch.device) -> str:
    """For people: the device's name and memory, or how many threads a CPU has and whether torch sees a GPU."""
    import torch

    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        return f"{device} ({known.name}, {known.total_memory / 1e9:.0f} GB)"
    if device.type == "mps":
        return "mps (this machine's Apple GPU)"
    n_gpus = torch.cuda.device_count()
    seen = "torch sees no GPU" if not n_gpus else f"torch sees {n_gpus} GPU{'s' if n_gpus > 1 else ''} besides"
    return f"cpu ({torch.get_num_threads()} threads; {seen})"


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseWeights:
    """What a training starts from."""

    path: str  # a .pt file, or the name of an architecture ('yolo11n.yaml')
    pretrained: bool  # False: from scratch
    note: str  # for people; empty when there is nothing to say


def resolve_weights(named: str, configured: str, cache: Path) -> BaseWeights:
    """The weights to start from: the project's setting, else HARDFIRST_WEIGHTS, else yolo11n.pt.

    A .pt that is no file here but a name ultralytics publishes is downloaded into `cache`: tried once, unless the
    admin set YOLO_OFFLINE. When only the default cannot be had, training starts from its architecture, from scratch,
    and `note` says so.

    Raises:
        WeightsUnavailable: weights that somebody named are not here and cannot be downloaded.
    """
    wanted = named.strip() or configured.strip()
    if not wanted:
        return _default_weights(cache)
    source = "the project's setting `weights`" if named.strip() else "HARDFIRST_WEIGHTS"
    suffix = Path(wanted).suffix.lower()
    if "://" in wanted or suffix not in (".pt", ".yaml", ".yml"):
        raise WeightsUnavailable(f"{source} is {wanted!r}: it must be a .pt file, or the .yaml of an architecture.")
    if Path(wanted).stem.lower().startswith(("rtdetr", "sam", "yolo_nas")):
        raise WeightsUnavailable(f"{source} is {wanted!r}: only YOLO detectors are supported, such as yolo11n.pt.")
    if suffix != ".pt":
        return _architecture(wanted, source)
    file = Path(wanted).expanduser()
    if file.is_file():
        return BaseWeights(str(_readable(file).resolve()), True, "")
    if file.name != wanted:
        raise WeightsUnavailable(f"{source} is {wanted!r}: there is no such file on this worker. {PUT_IT_THERE}")
    try:
        return BaseWeights(str(_published(wanted, cache)), True, "")
    except _NotDownloaded as error:
        raise WeightsUnavailable(
            f"{source} is {wanted!r}: there is no such file on this worker, and {error}. "
            "Put the file there, and name it with its folder."
        ) from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def may_download() -> bool:
    """False: the admin has set YOLO_OFFLINE. To be asked after `prepare_ultralytics`."""
    return os.environ.get(_MAY_DOWNLOAD) != "False"


def is_published_name(weights: str) -> bool:
    """Is it, by its file name, one of the detectors that ultralytics publishes (and so not somebody's own)?"""
    load_ultralytics()
    from ultralytics.utils.checks import check_yolov5u_filename
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    return check_yolov5u_filename(Path(weights).name, verbose=False) in GITHUB_ASSETS_NAMES


class _NotDownloaded(Exception):
    """Why a published file could not be had, as the second half of a sentence."""


def _default_weights(cache: Path) -> BaseWeights:
    local = Path(DEFAULT_WEIGHTS)
    if local.is_file():
        return BaseWeights(str(local.resolve()), True, "")
    try:
        return BaseWeights(str(_published(DEFAULT_WEIGHTS, cache)), True, "")
    except _NotDownloaded as error:
        architecture = Path(DEFAULT_WEIGHTS).with_suffix(".yaml").name
        note = (
            f"{DEFAULT_WEIGHTS} is not on this worker, and {error}. Training starts from scratch ({architecture}): it "
            "needs more labels and epochs to get as far. Put the file on the worker and name it in HARDFIRST_WEIGHTS."
        )
        return BaseWeights(architecture, False, note)


def _architecture(wanted: str, source: str) -> BaseWeights:
    load_ultralytics()
    from ultralytics.utils.checks import check_yaml

    unscaled = re.sub(r"(\d+)([nslmx])(.+)?$", r"\1\3", wanted)  # yolo11n.yaml is yolo11.yaml at scale n
    find: Any = check_yaml  # untyped
    if not (find(wanted, hard=False) or find(unscaled, hard=False)):
        raise WeightsUnavailable(f"{source} is {wanted!r}: neither a file here nor an architecture ultralytics knows.")
    return BaseWeights(wanted, False, f"Training starts from scratch ({wanted}), as {source} says.")


def _published(name: str, cache: Path) -> Path:
    if not is_published_name(name):
        raise _NotDownloaded("ultralytics publishes none of that name")
    from ultralytics.utils.checks import check_yolov5u_filename

    name = check_yolov5u_filename(name, verbose=False)  # yolov5n.pt means yolov5nu.pt
    file = cache / name
    if file.is_file():
        return file.resolve()
    if not may_download():
        raise _NotDownloaded("YOLO_OFFLINE forbids to download it")
    try:
        _download(f"{ASSETS_URL}/{name}", file)
    except (httpx.HTTPError, OSError) as error:
        raise _NotDownloaded(f"the download failed ({str(error) or type(error).__name__})") from error
    return file.resolve()


def _download(url: str, file: Path) -> None:
    """Fetch `url` into `file`, which appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + _DOWNLOAD_SECONDS
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            timeout = httpx.Timeout(15, connect=5)  # short: a round waits for this
            with httpx.stream("GET", url, follow_redirects=True, timeout=timeout) as answer:
                answer.raise_for_status()
                for block in answer.iter_bytes(1 << 20):
                    out.write(block)
                    if time.monotonic() > until:
                        raise TimeoutError(f"not there after {_DOWNLOAD_SECONDS} s")
                    if out.tell() > _DOWNLOAD_MAX_BYTES:
                        raise OSError(f"larger than {_DOWNLOAD_MAX_BYTES} bytes")
            out.flush()
            os.fsync(out.fileno())
        with open(temporary, "rb") as written:
            if written.read(4) != b"PK\x03\x04":  # what torch.save writes is a zip; a login page is not
                raise OSError("what came is not a weights file")
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _readable(file: Path) -> Path:
    """Refuse a name that ultralytics would silently read as another's (yolov5n.pt is rewritten to yolov5nu.pt)."""
    if re.search(r"(yolov5[nsmlx]6?|yolov3(-tiny|-spp)?)\.pt$", file.name):
        raise WeightsUnavailable(
            f"ultralytics reads the name {file.name} as its newer namesake with a u. Rename the file and name it anew."
        )
    return file


# --- scoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageScore:
    """What one forward pass says of one image: n candidates after NMS, by falling confidence."""

    boxes_xyxy: Floats  # (n, 4) pixels in the displayed frame (EXIF applied), inside the image
    confidences: Floats  # (n,) 0..1
    class_ids: Ints  # (n,)
    probabilities: Floats  # (n, C) 0..1, sigmoids: rows need not sum to 1
    best_candidate: Floats  # (C,) of the most confident candidate, however weak: there always is one
    embedding: Floats  # (D,) length 1
    width: int
    height: int
    drawn: int  # the first `drawn` candidates have at least the confidence that boxes are drawn from


@dataclass(frozen=True)
class Framed:
    """An image as the network sees it, and the way back: x = (x_framed - left) / gain_x."""

    pixels: Pixels  # (h, w, 3)
    width: int
    height: int
    left: float
    top: float
    gain_x: float
    gain_y: float

    def to_image(self, boxes_xyxy: Floats) -> Floats:
        shift = np.array([self.left, self.top] * 2, np.float32)
        gain = np.array([self.gain_x, self.gain_y] * 2, np.float32)
        return (boxes_xyxy - shift) / gain


@dataclass(frozen=True)
class _Look:
    """What a pass says of B images."""

    probabilities: torch.Tensor  # (B, C, anchors)
    embeddings: Floats  # (B, D)
    boxes: Callable[[int, torch.Tensor], torch.Tensor]  # row, (n,) anchors -> (4, n) xywh in the frame


_Pass: TypeAlias = "tuple[list[int], Future[_Look]]"  # positions, what is seen there


class Detector:
    """A loaded YOLO detector. One forward pass per image; safe to share between threads (they take turns)."""

    def __init__(self, model: Any, device: torch.device, half: bool) -> None:
        """Use `Detector.load`."""
        self.device = device
        self.half = half
        self.names: dict[int, str] = {int(key): str(value) for key, value in model.names.items()}
        self.stride = max(int(model.stride.max()), 32)
        self._network = _with_features(model)
        self._turns = ThreadPoolExecutor(1, thread_name_prefix="forward")  # one pass at a time, whoever asks
        self._start_openvino: Callable[[], OpenVinoForward] | None = None
        self._openvino: OpenVinoForward | None = None
        self.embedding_size = int(self._forward(np.zeros((1, self.stride, self.stride, 3), np.uint8))[1].shape[1])

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "",
        expected_sha256: str | None = None,
        *,
        half: bool | None = None,
        threads: int | None = None,
        backend: str = "auto",
        cache: Path | None = None,
    ) -> Detector:
        """Load the weights at `path`.

        Args:
            path: a .pt file. Loading is limited to known classes, but load only what we wrote or an admin configured.
            device: see `pick_device`.
            expected_sha256: what the file must hash to.
            half: 16-bit arithmetic. Default: on CUDA only. Give False for `collect_detections`, as `model.val` does.
            threads: of a pass on CPU; torch's, of the whole process. Default: ultralytics' choice, one less than cores.
            backend: what `score` computes with. "openvino" (CPU only, 32 bits; where it cannot run these weights torch
                does, after a warning), "torch", or "auto": openvino on CPU, torch elsewhere.
            cache: folder of the weights exported to OpenVINO. Default: in ultralytics' configuration folder.

        Raises:
            WeightsUnavailable: no such file, or not the weights of a YOLO detector.
            ArtifactDamaged: the file is not the recorded one.
            SettingsInvalid: no such device or backend.
        """
        file = _readable(Path(path))
        if not file.is_file():
            raise WeightsUnavailable(f"There are no weights at {file}.")
        found = sha256_of(file)
        if expected_sha256 is not None and found != expected_sha256:
            raise ArtifactDamaged(
                f"The weights at {file} have SHA-256 {found[:12]}..., recorded was {expected_sha256[:12]}.... "
                "Start a round to make new ones."
            )
        load_ultralytics()
        chosen = pick_device(device)
        use_openvino = _use_openvino(backend, chosen, half)
        if chosen.type == "cpu":
            set_threads(threads)
        model = _one_to_many(load_model(file))
        use_half = chosen.type == "cuda" if half is None else half
        model = model.fuse(verbose=False).to(chosen).eval().requires_grad_(False)
        detector = cls(model.half() if use_half else model.float(), chosen, use_half)
        if use_openvino:  # when it is first needed: an evaluation never does
            detector._start_openvino = partial(detector._load_openvino, found, cache or _default_cache())
        return detector

    @property
    def backend(self) -> str:
        """What `score` computes with: openvino or torch."""
        return "torch" if self._start_openvino is None else "openvino"

    def score(
        self,
        images: Sequence[Image.Image],
        imgsz: int,
        confidence: float = 0.25,
        low: float = 0.05,
        batch: int = 8,
    ) -> list[ImageScore]:
        """`score_each`, all at once.

        Raises:
            ImageUnusable: an image cannot be decoded.
        """
        scores: list[ImageScore] = []
        for score in self.score_each(images, imgsz, confidence, low, batch):
            if isinstance(score, ImageUnusable):
                raise score
            scores.append(score)
        return scores

    def frame(self, image: Image.Image, imgsz: int) -> Framed:
        """The image as the network will see it, for `score_each`; from any thread. It needs a tenth of the memory.

        Args:
            image, imgsz: as in `score_each`.

        Raises:
            ImageUnusable: the image cannot be decoded.
        """
        return _frame_for_predict(displayed(image), self._round(imgsz), self.stride)

    def score_each(
        self,
        images: Iterable[Image.Image | Framed | ImageUnusable],
        imgsz: int,
        confidence: float = 0.25,
        low: float = 0.05,
        batch: int = 8,
    ) -> Iterator[ImageScore | ImageUnusable]:
        """Score images, in their order: boxes, class probabilities and embedding of one forward pass each.

        An image's frame is fixed by its own size (longest side to `imgsz`, padded to the stride, as `model.predict`
        frames a single image), and only images of one frame share a pass: a result never depends on its neighbours.
        While a pass is computed the next images are taken and framed, and the caller has the scores before it.

        Args:
            images: any mode and size; an EXIF rotation is applied. Taken a few ahead of the scores. What is framed
                already is taken as it is; what is unusable already is handed on in its place.
            imgsz: longest side, pixels; rounded up to the model's stride.
            confidence: boxes are drawn from here on (`ImageScore.drawn`).
            low: candidates are kept from here on.
            batch: images in one pass of torch; OpenVINO gains nothing by more than one.

        Yields:
            a score for each image, or why it has none.
        """
        before: list[Framed | ImageUnusable] = []
        passes: list[_Pass] = []
        framed = (self._framed_or_reason(image, imgsz) for image in images)
        while window := list(islice(framed, 2 * batch if self._start_openvino is None else 1)):
            following = self._submit(window, batch)
            yield from _in_order(before, passes, confidence, low)
            before, passes = window, following
        yield from _in_order(before, passes, confidence, low)

    def _framed_or_reason(self, image: Image.Image | Framed | ImageUnusable, imgsz: int) -> Framed | ImageUnusable:
        if isinstance(image, (Framed, ImageUnusable)):
            return image
        try:
            return self.frame(image, imgsz)
        except ImageUnusable as error:
            return error

    def _submit(self, window: Sequence[Framed | ImageUnusable], batch: int) -> list[_Pass]:
        good = {position: frame for position, frame in enumerate(window) if isinstance(frame, Framed)}
        passes = []
        for positions in _same_frames({position: frame.pixels.shape for position, frame in good.items()}, batch):
            pixels = np.stack([good[position].pixels for position in positions])
            passes.append((positions, self._turns.submit(self._look, pixels)))
        return passes

    def _forward(self, pixels: Pixels) -> tuple[torch.Tensor, Floats]:
        """(B, h, w, 3) pixels -> (B, 4 + C, anchors) float32 boxes xywh and probabilities, and (B, D) embeddings.

        Always by torch, so that what is measured never depends on the backend.
        """
        return self._turns.submit(self._forward_torch, pixels).result()

    def _forward_torch(self, pixels: Pixels) -> tuple[torch.Tensor, Floats]:
        import torch

        with torch.inference_mode():
            tensor = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).contiguous()
            prediction, features = self._network((tensor.half() if self.half else tensor.float()).div_(255))
            prediction = prediction.float()
            if self.device.type == "mps":
                prediction = prediction.cpu()  # NMS is not dependable there
            return _finite(prediction), _unit_length(features.float().cpu().numpy())

    def _look(self, pixels: Pixels) -> _Look:
        """By OpenVINO where that is chosen and can, else by torch."""
        import torch

        if self._start_openvino is not None and len(pixels) == 1:
            try:
                self._openvino = self._openvino or self._start_openvino()
                features, probabilities, *levels = map(torch.from_numpy, self._openvino(pixels))
            except Exception as error:  # noqa: BLE001  # whatever a conversion raises: torch needs none
                log.warning("OpenVINO cannot run this detector, torch does, slower: %s", first_line(error))
                self._start_openvino = self._openvino = None
            else:
                boxes = partial(_boxes_of, self._network.model.model[-1], levels)
                return _Look(_finite(probabilities), _unit_length(features.numpy()), boxes)
        prediction, embeddings = self._forward_torch(pixels)
        return _Look(prediction[:, 4:], embeddings, lambda row, anchors: prediction[row][:4, anchors])

    def _load_openvino(self, sha256: str, cache: Path) -> OpenVinoForward:
        import torch

        return OpenVinoForward(cached_graph(cache, sha256, self._export), torch.get_num_threads())

    def _export(self) -> Any:
        """The network but for its boxes as an openvino.Model of (1, h, w, 3) uint8; checked, boxes too, against torch.

        Raises:
            ArtifactDamaged: it answers otherwise.
        """
        import openvino
        import torch

        model = self._network.model
        _expect_plain_box_head(model.model[-1])
        example = torch.from_numpy(_noise(self.stride, self.stride))
        graph = openvino.convert_model(
            _traced(model, example), example_input=example, input=[openvino.PartialShape([1, -1, -1, 3])]
        )
        pixels = _noise(5 * self.stride, 7 * self.stride)
        prediction, embeddings = self._forward_torch(pixels)
        features, probabilities, *levels = map(
            torch.from_numpy, OpenVinoForward(graph, torch.get_num_threads())(pixels)
        )
        everywhere = torch.arange(prediction.shape[2])
        for anchors in (everywhere, everywhere[::11]):  # whole levels, and neighbourhoods, corners among them
            boxes = _boxes_of(model.model[-1], levels, 0, anchors)
            if not np.allclose(boxes, prediction[0][:4, anchors], rtol=1e-4, atol=0.05):
                raise ArtifactDamaged("the exported network finds other boxes than torch")
        # noise is the hardest image: on others they differ by a hundredth of this
        if not np.allclose(probabilities, prediction[:, 4:], atol=1e-3):
            raise ArtifactDamaged("the exported network gives other probabilities than torch")
        if not np.allclose(_unit_length(features.numpy()), embeddings, atol=1e-3):
            raise ArtifactDamaged("the exported network gives other embeddings than torch")
        return graph

    def _round(self, imgsz: int) -> int:
        return math.ceil(imgsz / self.stride) * self.stride


def collect_detections(
    detector: Detector,
    images: Iterable[tuple[int, Image.Image | Path]],
    imgsz: int,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Detections:
    """Run the detector over the holdout and keep everything it sees, for `worker.evaluation.evaluate`.

    What `DetectionValidator` does with rect=True and batch=1: frame, confidence .001, several classes per box.

    Args:
        images: (task id, image or file) of every holdout task, labelled or not; read one by one.
        imgsz: the size the detector was trained at.
        progress: called with the number of images done; may raise to cancel.

    Raises:
        ImageUnusable: an image cannot be decoded. Nothing is dropped in silence: leave it out and call again.
    """
    keys: list[int] = []
    found: list[Floats] = []
    sizes: list[tuple[int, int]] = []
    frames = (
        (key, _frame_for_holdout(_opened(key, source), detector._round(imgsz), detector.stride))
        for key, source in images
    )
    while chunk := list(islice(frames, 4 * batch)):
        framed = [frame for _, frame in chunk]
        results: dict[int, Floats] = {}
        for positions in _same_frames({at: frame.pixels.shape for at, frame in enumerate(framed)}, batch):
            prediction, _ = detector._forward(np.stack([framed[position].pixels for position in positions]))
            kept, _ = _suppress(prediction, EVALUATION_CONFIDENCE, multi_label=True)
            for position, rows in zip(positions, kept, strict=True):
                rows_image = rows.cpu().numpy().astype(np.float32)
                rows_image[:, :4] = framed[position].to_image(rows_image[:, :4])
                results[position] = rows_image
        keys += [key for key, _ in chunk]
        sizes += [(frame.width, frame.height) for frame in framed]
        found += [results[position] for position in range(len(framed))]
        if progress is not None:
            progress(len(keys))
    rows = np.concatenate([np.zeros((0, 6), np.float32), *found])
    return Detections(
        keys=np.array(keys, np.int64),
        image_index=np.repeat(np.arange(len(found)), [len(part) for part in found]).astype(np.int64),
        boxes_xyxy=rows[:, :4],
        confidences=rows[:, 4],
        class_ids=rows[:, 5].astype(np.int64),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
    )


def displayed(image: Image.Image) -> Pixels:
    """(h, w, 3) RGB as a browser displays the image: EXIF rotation applied, alpha dropped, 16 bits cut to 8.

    Raises:
        ImageUnusable: the image cannot be decoded.
    """
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageUnusable(f"the image cannot be decoded: {error}") from error
    return np.asarray(to_rgb(upright(image)))


def set_threads(threads: int | None = None) -> None:
    """Set torch's threads, of the whole process. Default: as ultralytics does, one less than cores, at most eight."""
    import torch
    from ultralytics.utils import NUM_THREADS

    torch.set_num_threads(threads or NUM_THREADS)


def load_model(file: Path) -> Any:
    """The network in a .pt file.

    Raises:
        WeightsUnavailable: not the weights of a YOLO detector for colour images.
    """
    from ultralytics.nn.modules.head import Detect
    from ultralytics.nn.tasks import load_checkpoint

    load: Any = load_checkpoint  # untyped
    try:
        model, _ = load(str(file))
    except (
        *(AssertionError, AttributeError, EOFError, ImportError, LookupError),  # the first: a name that is no .pt
        *(OSError, RuntimeError, TypeError, ValueError),
    ) as error:
        why = first_line(error).removeprefix("ERROR ").lstrip("❌️ ")
        raise WeightsUnavailable(f"{file} is not weights that ultralytics can load: {why}") from error
    if model.task != "detect" or not isinstance(model.model[-1], Detect):
        raise WeightsUnavailable(f"{file} holds a {model.task} network. A YOLO detector is needed, such as yolo11n.pt.")
    if (channels := model.yaml.get("channels", 3)) != 3:
        raise WeightsUnavailable(f"{file} is a detector for images of {channels} channels. One for colour is needed.")
    return model


def _one_to_many(model: Any) -> Any:
    """Choose the head that keeps class probabilities of every anchor (yolo10, yolo26), before fusing removes it."""
    model.end2end = False
    if model.end2end:
        raise WeightsUnavailable("These weights were fused for end-to-end inference. Use the checkpoint before fusing.")
    return model


def _with_features(model: Any) -> Any:
    """The network as a module of (B, 3, h, w) -> raw output (B, 4 + C, anchors), features (B, D).

    The features are the means of the last backbone layer.
    """
    import torch

    class WithFeatures(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.features: torch.Tensor | None = None
            model.model[len(model.yaml["backbone"]) - 1].register_forward_hook(self.keep_features)

        def keep_features(self, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
            self.features = output

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            prediction = self.model(images)
            assert self.features is not None  # the hook ran
            features, self.features = self.features, None
            return prediction[0] if isinstance(prediction, tuple) else prediction, features.mean((2, 3))

    return WithFeatures().eval()


def _traced(model: Any, example: torch.Tensor) -> Any:
    """TorchScript of (1, h, w, 3) uint8, any h and w -> features, probabilities, and what the box head looks at.

    Boxes are wanted of the few anchors that see something, and the layers for them are a sixth of the work: they stay
    outside, see `_boxes_of`. The levels are (1, h, w, channels), which is how OpenVINO has them.
    """
    import torch

    class WithoutBoxes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            *layers, head = self.model.model
            kept: list[Any] = []
            features, at = None, pixels.permute(0, 3, 1, 2).float() / 255
            for number, layer in enumerate(layers):  # as the model's own _predict_once
                at = layer(_inputs(layer, at, kept))
                kept.append(at if layer.i in self.model.save else None)
                if number == len(self.model.yaml["backbone"]) - 1:
                    features = at.mean((2, 3))
            levels = _inputs(head, at, kept)
            logits = [branch(level).flatten(2) for branch, level in zip(head.cv3, levels, strict=True)]
            return features, torch.cat(logits, 2).sigmoid(), *(level.permute(0, 2, 3, 1) for level in levels)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, of ultralytics' Python branches; the result is checked
        trace: Any = torch.jit.trace  # untyped
        return trace(WithoutBoxes().eval(), example, strict=False, check_trace=False)


def _inputs(layer: Any, last: Any, kept: Sequence[Any]) -> Any:
    if isinstance(layer.f, int):
        return last if layer.f == -1 else kept[layer.f]
    return [last if source == -1 else kept[source] for source in layer.f]


def _expect_plain_box_head(head: Any) -> None:
    for first, second, last in head.cv2:
        for conv in (first.conv, second.conv):
            form = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
            if form != ((3, 3), (1, 1), (1, 1), (1, 1)) or conv.padding_mode != "zeros":
                raise NotImplementedError(f"its box head has a layer {conv}")
        if last.kernel_size != (1, 1):
            raise NotImplementedError(f"its box head has a layer {last}")


def _boxes_of(head: Any, levels: Sequence[torch.Tensor], row: int, anchors: torch.Tensor) -> torch.Tensor:
    """The boxes of some anchors: (4, n) xywh in the frame.

    Args:
        head: ultralytics' Detect.
        levels: (1, h, w, channels) each, what it looks at.
        row: 0.
        anchors: (n,) rising, as the head counts them.
    """
    import torch

    parts, centres, strides, start = [], [], [], 0
    with torch.inference_mode():
        for branch, level, stride in zip(head.cv2, levels, head.stride, strict=True):
            height, width = level.shape[1:3]
            at = anchors[(anchors >= start) & (anchors < start + height * width)] - start
            start += height * width
            if len(at):
                near = len(at) * 14 < height * width  # else the whole level is cheaper
                parts.append(_branch_at(branch, level, at) if near else _branch(branch, level)[:, at])
                centres.append(torch.stack([at % width, at // width]) + 0.5)
                strides.append(stride.expand(len(at)))
        if not parts:
            return torch.zeros((4, 0))
        distances = head.dfl(torch.cat(parts, 1)[None])
        return _finite((head.decode_bboxes(distances, torch.cat(centres, 1)[None]) * torch.cat(strides))[0])


def _branch(branch: Any, level: torch.Tensor) -> torch.Tensor:
    """(1, h, w, channels) -> (4 * reg_max, h * w)"""
    result: torch.Tensor = branch(level.permute(0, 3, 1, 2))[0].flatten(1)
    return result


def _branch_at(branch: Any, level: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """As `_branch` at (n,) places: from their 5x5 neighbourhoods, through two layers of 3x3 and one of 1x1."""
    import torch
    from torch.nn.functional import conv2d

    first, second, last = branch
    height, width, channels = level.shape[1:]
    near = torch.arange(-2, 3)
    rows = (at // width)[:, None, None] + near[:, None]  # (n, 5, 1)
    columns = (at % width)[:, None, None] + near  # (n, 1, 5)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # around it the layers see zeros
    places = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    patches = level.reshape(-1, channels)[places] * inside[..., None]
    x = first.act(conv2d(patches.permute(0, 3, 1, 2), first.conv.weight, first.conv.bias, groups=first.conv.groups))
    x = second.act(
        conv2d(x * inside[:, None, 1:4, 1:4], second.conv.weight, second.conv.bias, groups=second.conv.groups)
    )
    result: torch.Tensor = last(x)[:, :, 0, 0].T
    return result


def _noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def _finite(prediction: torch.Tensor) -> torch.Tensor:
    if not math.isfinite(float(prediction.sum())):  # many times cheaper than to look at each value
        raise ArtifactDamaged("The detector answers with values that are not numbers. Start a round for a new one.")
    return prediction


def _in_order(
    framed: Sequence[Framed | ImageUnusable], passes: Iterable[_Pass], confidence: float, low: float
) -> Iterator[ImageScore | ImageUnusable]:
    scores: dict[int, ImageScore] = {}
    for positions, future in passes:
        group = [frame for position in positions if isinstance(frame := framed[position], Framed)]
        scores.update(zip(positions, _image_scores(group, future.result(), confidence, low), strict=True))
    for position, frame in enumerate(framed):
        yield frame if isinstance(frame, ImageUnusable) else scores[position]


def _image_scores(group: Sequence[Framed], look: _Look, confidence: float, low: float) -> Iterator[ImageScore]:
    import torch

    least = min(low, confidence)
    most = look.probabilities.amax(1)  # (B, anchors)
    best = most.argmax(1)
    for row, frame in enumerate(group):
        anchors = (most[row] > least).nonzero()[:, 0]
        probabilities = look.probabilities[row][:, anchors]
        kept, indices = _suppress(torch.cat([look.boxes(row, anchors), probabilities])[None], least, multi_label=False)
        rows = kept[0].cpu().numpy().astype(np.float32)
        at = indices[0].long().view(-1)  # an empty one is float
        inside = np.array([frame.width, frame.height] * 2, np.float32)
        yield ImageScore(
            boxes_xyxy=np.clip(frame.to_image(rows[:, :4]), 0, inside),
            confidences=rows[:, 4],
            class_ids=rows[:, 5].astype(np.int64),
            probabilities=probabilities[:, at].T.cpu().numpy(),
            best_candidate=look.probabilities[row][:, best[row]].cpu().numpy(),
            embedding=look.embeddings[row],
            width=frame.width,
            height=frame.height,
            drawn=int((rows[:, 4] >= confidence).sum()),
        )


def _use_openvino(backend: str, device: torch.device, half: bool | None) -> bool:
    if backend not in ("auto", "torch", "openvino"):
        raise SettingsInvalid(f"backend {backend!r} is unknown. Use auto, torch or openvino.")
    possible = device.type == "cpu" and not half
    if backend == "openvino" and not possible:
        raise SettingsInvalid(f"backend openvino computes on the CPU in 32 bits, not on {device.type}, half={half}.")
    return possible and backend != "torch"


def _default_cache() -> Path:
    return Path(os.environ.get("YOLO_CONFIG_DIR") or _fallback_config_dir()) / "openvino"


def _suppress(prediction: torch.Tensor, confidence: float, multi_label: bool) -> tuple[Any, Any]:
    """Per image (n, 6) xyxy, confidence, class by falling confidence, and the anchors they come from."""
    from torch.nn.functional import pad
    from ultralytics.utils.nms import non_max_suppression

    if prediction.shape[-1] == 6:  # it would be taken for the answer of an end-to-end network: one more, of nothing
        prediction = pad(prediction, (0, 1))
    return non_max_suppression(  # type: ignore[no-any-return]
        prediction,
        confidence,
        NMS_IOU,
        multi_label=multi_label,
        max_det=MAX_DETECTIONS,
        max_time_img=3600,  # its default gives up on a busy machine, and leaves the rest of the batch empty
        return_idxs=True,
    )


def _frame_for_predict(rgb: Pixels, imgsz: int, stride: int) -> Framed:
    """As `model.predict` frames one image: longest side to imgsz, padded on both sides to a multiple of the stride."""
    height, width = rgb.shape[:2]
    gain = min(imgsz / height, imgsz / width)
    new_width, new_height = max(round(width * gain), 1), max(round(height * gain), 1)
    frame = ((imgsz - new_height) % stride + new_height, (imgsz - new_width) % stride + new_width)
    return _framed(rgb, (new_height, new_width), frame)


def _frame_for_holdout(rgb: Pixels, imgsz: int, stride: int) -> Framed:
    """As `DetectionValidator` frames one image with rect=True: half a stride more room, sizes rounded up."""
    height, width = rgb.shape[:2]
    ratio = imgsz / max(height, width)
    new = (min(math.ceil(height * ratio), imgsz), min(math.ceil(width * ratio), imgsz))
    aspect = height / width
    shape = np.array([aspect, 1] if aspect < 1 else [1, 1 / aspect])
    frame = np.ceil(shape * imgsz / stride + 0.5).astype(int) * stride
    return _framed(rgb, new, (int(frame[0]), int(frame[1])))


def _framed(rgb: Pixels, new: tuple[int, int], frame: tuple[int, int]) -> Framed:
    """Resize to `new` and centre in `frame`, both (height, width); ultralytics' rounding, its grey."""
    import cv2

    height, width = rgb.shape[:2]
    resized = rgb if (height, width) == new else cv2.resize(rgb, new[::-1], interpolation=cv2.INTER_LINEAR)
    top, left = (round((whole - part) / 2 - 0.1) for whole, part in zip(frame, new, strict=True))
    pixels = np.full((*frame, 3), 114, np.uint8)
    pixels[top : top + new[0], left : left + new[1]] = resized
    return Framed(pixels, width, height, left, top, gain_x=new[1] / width, gain_y=new[0] / height)


def _same_frames(shapes: Mapping[int, tuple[int, ...]], batch: int) -> Iterator[list[int]]:
    """Position -> shape, as lists of at most `batch` positions of one shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, shape in shapes.items():
        groups.setdefault(shape, []).append(position)
    for positions in groups.values():
        yield from (positions[start : start + batch] for start in range(0, len(positions), batch))


def _opened(key: int, source: Image.Image | Path) -> Pixels:
    try:
        if isinstance(source, Image.Image):
            return displayed(source)
        with Image.open(source) as image:
            return displayed(image)
    except (ImageUnusable, OSError, ImportError) as error:  # unreadable is an ImportError once ultralytics patched PIL
        raise ImageUnusable(f"Task {key}: {error}") from error


def _unit_length(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Floats = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return result


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
