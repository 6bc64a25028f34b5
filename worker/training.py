"""Training: ultralytics' trainer, made cancellable, resumable, silent on the network and blind to the holdout.

torch and ultralytics are imported inside functions: `worker.detector.prepare_ultralytics` must come first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from worker.detector import first_line, load_model, load_ultralytics, pick_device, set_threads, sha256_of
from worker.errors import DatasetUnusable, HardfirstError, TrainingFailed, WeightsUnavailable
from worker.settings import ProjectSettings

if TYPE_CHECKING:
    _FilePath = Path
else:
    _FilePath = type(Path())

CHECKPOINT = "trained.pt"  # the result, in the run folder
REPORT_SECONDS = 2.0  # at most this often within an epoch: a report may renew a lease, which costs a query

# what ultralytics raises when something is wrong with what it was given; anything else is not ours to explain
_TRAINER_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, SyntaxError,
                   TypeError, ValueError)  # fmt: skip

_NOT_A_NUMBER = "The loss is not a number any more. Lower lr0, and name an optimizer: SGD or AdamW."


@dataclass(frozen=True)
class TrainRequest:
    """One training. Equal requests (whatever the folder, device and threads) give interchangeable results."""

    dataset_yaml: Path  # its `train` and `names` are used, and nothing else of it: never its `val`
    run_dir: Path  # one folder per training; everything is written here
    weights: str  # a .pt file, or an architecture ('yolo11n.yaml')
    epochs: int
    imgsz: int  # pixels, longest side
    train_batch: int
    nominal_batch: int = 64  # images per optimizer step: smaller batches are accumulated up to it (ultralytics' nbs)
    optimizer: str = "auto"
    lr0: float | None = None  # None: ultralytics' own choice
    mosaic: float = 1.0
    mixup: float = 0.0
    close_mosaic: int = 10
    freeze: int = 0
    seed: int = 0
    device: str = ""
    threads: int | None = None  # torch's, on CPU. None: ultralytics' choice

    @classmethod
    def of_round(
        cls, settings: ProjectSettings, round_number: int, dataset_yaml: Path, run_dir: Path, weights: str, device: str
    ) -> TrainRequest:
        """The training of one round as a project's settings want it, from these base weights."""
        return cls(
            dataset_yaml=dataset_yaml,
            run_dir=run_dir,
            weights=weights,
            epochs=settings.epochs,
            imgsz=settings.imgsz,
            train_batch=settings.train_batch,
            nominal_batch=settings.nominal_batch,
            optimizer=settings.optimizer,
            lr0=settings.lr0,
            mosaic=settings.mosaic,
            mixup=settings.mixup_in(round_number),
            close_mosaic=settings.close_mosaic,
            freeze=settings.freeze,
            seed=settings.seed,
            device=device,
        )


@dataclass(frozen=True)
class TrainProgress:
    """How far a training is."""

    epoch: int  # epochs done
    epochs: int
    losses: dict[str, float]  # running means of the current epoch, by ultralytics' names; empty before the first batch
    eta_seconds: float | None  # None until something can be said


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    weights: Path  # the last checkpoint, never the best: the holdout picks none
    sha256: str
    seconds: float  # spent training, over all attempts
    epochs_run: int
    names: dict[int, str]
    note: str  # what a person should know; empty when all was as asked


def train(request: TrainRequest, progress: Callable[[TrainProgress], None]) -> Trained:
    """Train, or go on with the training that `run_dir` holds, or return what it has finished.

    A run folder is gone on with only if it holds the same request over the same images and labels.

    Args:
        request: what to train.
        progress: called when training starts, after each epoch (its checkpoint is on disk by then), and every few
            seconds in between. What it raises (JobFenced) ends the training at once and reaches the caller as it is;
            calling `train` again goes on after the last finished epoch.

    Raises:
        DatasetUnusable: nothing can be learned from the data, or images of it would be dropped.
        WeightsUnavailable: `weights` cannot be loaded.
        TrainingFailed: the trainer gave up.
        SettingsInvalid: no such device.
    """
    load_ultralytics()
    names, images = _read_dataset(request.dataset_yaml)
    pick_device(request.device)  # refuse an unknown one before anything is thrown away
    run = _Run(request, names, images)
    if (finished := run.finished()) is not None:
        return finished
    start = run.start()
    clock = _Clock(request.epochs, run.seconds(), progress, run)
    if start.epochs_done < request.epochs:
        _fit(run, start, clock)
    return run.finish(clock.total_seconds())


def save_checkpoint(run_dir: Path, target: Path) -> None:
    """The training's latest checkpoint as weights of their own. Call it from the progress callback, after an epoch.

    Raises:
        WeightsUnavailable: there is no checkpoint yet.
    """
    from ultralytics.utils.torch_utils import strip_optimizer

    last = run_dir / "weights" / "last.pt"
    if not last.is_file():
        raise WeightsUnavailable(f"{run_dir} has no checkpoint yet: a training writes one at the end of each epoch.")
    part = target.with_suffix(".part.pt")
    strip_optimizer(str(last), s=str(part))
    os.replace(part, target)


def check_dataset_size(
    expected: Sequence[Path], found: Iterable[Path], why: Callable[[Path], str] = lambda _: ""
) -> None:
    """Refuse a dataset that lost images: ultralytics drops what it cannot use with no more than a log line.

    Args:
        expected: the images that were asked for.
        found: the images that the trainer holds.
        why: the reason one of them is missing, for the message.

    Raises:
        DatasetUnusable: some are missing; names how many, and the first five.
    """
    kept = {os.path.abspath(file) for file in found}
    lost = [file for file in expected if os.path.abspath(file) not in kept]
    if not lost:
        return
    shown = "; ".join(f"{file.name} ({reason})" if (reason := why(file)) else file.name for file in lost[:5])
    more = f"; and {len(lost) - 5} more" if len(lost) > 5 else ""
    raise DatasetUnusable(
        f"{len(lost)} of {len(expected)} training images cannot be used: {shown}{more}. Correct or remove them."
    )


# --- the run folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    checkpoint: Path | None  # resume from here; None: start from the request's weights
    epochs_done: int


class _Run:
    """A run folder: request.json, elapsed.json and weights/last.pt while it runs; then trained.pt and result.json."""

    def __init__(self, request: TrainRequest, names: dict[int, str], images: list[Path]) -> None:
        self.request = request
        self.names = names
        self.images = images
        self.folder = request.run_dir.resolve()
        self.last = _AtomicFile(self.folder / "weights" / "last.pt")
        self.notes: list[str] = []
        if request.lr0 is not None and request.optimizer == "auto":
            self.notes.append(f"lr0={request.lr0} had no effect: with optimizer 'auto' ultralytics chooses it.")

    def finished(self) -> Trained | None:
        """The result that is here already, if it is whole and of this request."""
        result = _read_json(self.folder / "result.json")
        weights = self.folder / CHECKPOINT
        if result is None or _read_json(self.folder / "request.json") != self.identity or not weights.is_file():
            return None
        if sha256_of(weights) != result["sha256"]:
            return None
        names = {int(key): str(name) for key, name in result["names"].items()}
        return Trained(weights, result["sha256"], result["seconds"], result["epochs_run"], names, result["note"])

    def start(self) -> _Start:
        """Where to begin; the folder is ready for it."""
        earlier = _read_json(self.folder / "request.json")
        if earlier == self.identity and self.last.is_file():
            done = self._epochs_in_checkpoint()
            if done:
                return _Start(self.last, done)
            self.notes.append("The checkpoint of the interrupted training could not be read: training started anew.")
        elif earlier is not None and earlier != self.identity:
            self.notes.append("The run folder held a training of other data or settings: training started anew.")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("request.json", "result.json", "elapsed.json", "results.csv", CHECKPOINT):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "weights", ignore_errors=True)
        _write_json(self.folder / "request.json", self.identity)
        return _Start(None, 0)

    def seconds(self) -> float:
        """Spent by earlier attempts."""
        elapsed = _read_json(self.folder / "elapsed.json")
        return float(elapsed["seconds"]) if elapsed else 0.0

    def save_seconds(self, seconds: float) -> None:
        _write_json(self.folder / "elapsed.json", {"seconds": seconds})

    def finish(self, seconds: float) -> Trained:
        """Strip the last checkpoint into the result. Killed in here, the next call does it again."""
        from ultralytics.utils.torch_utils import strip_optimizer

        weights = self.folder / CHECKPOINT
        temporary = weights.with_suffix(".tmp.pt")
        if not strip_optimizer(str(self.last), s=str(temporary)):
            raise TrainingFailed(f"The last checkpoint, {self.last}, cannot be read. Start the round again.")
        _sync(temporary)
        os.replace(temporary, weights)
        trained = Trained(
            weights, sha256_of(weights), round(seconds, 3), self.request.epochs, self.names, " ".join(self.notes)
        )
        kept = {key: value for key, value in dataclasses.asdict(trained).items() if key != "weights"}
        _write_json(self.folder / "result.json", kept)
        self.last.unlink(missing_ok=True)  # five times the size of the result, and nothing to resume any more
        return trained

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be gone on with: the settings, the weights, the images and labels."""
        settings = dataclasses.asdict(self.request)
        for elsewhere in ("dataset_yaml", "run_dir", "device", "threads"):
            del settings[elsewhere]
        return settings | {
            "names": {str(key): name for key, name in self.names.items()},
            "weights": _fingerprint_of_weights(self.request.weights),
            "dataset": _fingerprint_of_images(self.images),
        }

    def _epochs_in_checkpoint(self) -> int:
        """Epochs that last.pt has seen; 0: unreadable."""
        from ultralytics.nn.tasks import torch_safe_load

        load: Any = torch_safe_load  # untyped
        try:
            checkpoint, _ = load(str(self.last))
            epoch = int(checkpoint["epoch"])
        except _TRAINER_ERRORS:
            return 0
        return self.request.epochs if epoch == -1 else epoch + 1  # -1: stripped, so it was finished


class _AtomicFile(_FilePath):
    """A path whose `write_bytes` replaces the file whole or not at all: the trainer may be killed while it saves."""

    def write_bytes(self, data: Any) -> int:
        temporary = Path(f"{self}.tmp")
        with temporary.open("wb") as file:
            written = file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self)
        return written


class _Clock:
    """Measures a training and reports it, rarely enough."""

    def __init__(self, epochs: int, earlier: float, progress: Callable[[TrainProgress], None], run: _Run) -> None:
        self.epochs = epochs
        self.raised: BaseException | None = None
        self._earlier = earlier
        self._progress = progress
        self._run = run
        self._began = self._reported = time.monotonic()
        self._first_epoch = 0
        self._batches = 0  # of the current epoch

    def total_seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def on_train_start(self, trainer: Any) -> None:
        self._began = time.monotonic()
        self._first_epoch = trainer.start_epoch
        self._report(trainer, trainer.start_epoch)

    def on_train_epoch_start(self, _trainer: Any) -> None:
        self._batches = 0

    def on_train_batch_end(self, trainer: Any) -> None:
        self._batches += 1
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._report(trainer, trainer.epoch, self._batches / len(trainer.train_loader))

    def on_fit_epoch_end(self, trainer: Any) -> None:
        self._run.save_seconds(self.total_seconds())
        self._report(trainer, trainer.epoch + 1)

    def _report(self, trainer: Any, done: int, share: float = 0.0) -> None:
        losses = {name: float(value) for name, value in (trainer.tloss or {}).items()}
        try:
            self._progress(TrainProgress(min(done, self.epochs), self.epochs, losses, self._eta(done + share)))
        except BaseException as error:
            self.raised = error
            raise
        finally:
            self._reported = time.monotonic()

    def _eta(self, done: float) -> float | None:
        ran = done - self._first_epoch
        if ran <= 0:
            return None
        return (time.monotonic() - self._began) / ran * max(self.epochs - done, 0)


# --- the trainer ----------------------------------------------------------------------------------------------------


def _fit(run: _Run, start: _Start, clock: _Clock) -> None:
    try:
        trainer = _build_trainer(run, start)
        for event in ("on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_fit_epoch_end"):
            trainer.add_callback(event, getattr(clock, event))
        trainer.add_callback("on_pretrain_routine_end", lambda ready: _check_loaded(ready, run.images))
        trainer.train()
    except HardfirstError:
        raise
    except _TRAINER_ERRORS as error:
        if error is clock.raised:
            raise
        raise _explained(error, run.request) from error
    if trainer.batch_size != run.request.train_batch:
        run.notes.append(
            f"Memory was short: trained {trainer.batch_size} images at a time, not {run.request.train_batch}."
        )
    if trainer.loss is not None and not bool(trainer.loss.detach().isfinite().all()):
        raise TrainingFailed(_NOT_A_NUMBER)


def _build_trainer(run: _Run, start: _Start) -> Any:
    request = run.request
    device = pick_device(request.device)
    if request.weights.endswith(".pt") and start.checkpoint is None:
        load_model(Path(request.weights))  # says what is wrong with them; the trainer would only fail
    overrides: dict[str, Any] = {
        "task": "detect",
        "mode": "train",
        "model": request.weights,
        "data": str(request.dataset_yaml.resolve()),
        "save_dir": str(run.folder),
        "epochs": request.epochs,
        "imgsz": request.imgsz,
        "batch": request.train_batch,
        "nbs": request.nominal_batch,
        "optimizer": request.optimizer,
        # ultralytics warms biases up from .1, which is for SGD: its own 'auto' sets 0 with AdamW
        **({"warmup_bias_lr": 0.0} if request.optimizer in ("Adam", "AdamW") else {}),
        "mosaic": request.mosaic,
        "mixup": request.mixup,
        "close_mosaic": request.close_mosaic,
        "freeze": request.freeze,
        "seed": request.seed,
        "device": "cpu" if device.type == "cpu" else "mps" if device.type == "mps" else str(device.index or 0),
        "workers": _workers(),
        "amp": device.type == "cuda",
        "deterministic": True,
        "patience": 0,  # never stop early: the length is the admin's choice, and every round's alike
        "val": False,
        "plots": False,
        "exist_ok": True,
        "verbose": False,
    }
    if request.lr0 is not None:
        overrides["lr0"] = request.lr0
    if start.checkpoint is not None:
        overrides |= {"resume": str(start.checkpoint), "model": str(start.checkpoint)}
    trainer = _trainer_class()(run.names, run.images, overrides)
    trainer.last = run.last
    if device.type == "cpu":
        set_threads(request.threads)
    return trainer


def _trainer_class() -> type[Any]:
    """ultralytics' DetectionTrainer without what a round must not have. A function: the base is imported late."""
    from ultralytics.data.utils import img2label_paths
    from ultralytics.models.yolo.detect import DetectionTrainer

    base: Any = DetectionTrainer  # its annotations are half there, and wrong for what it leaves None

    class RoundTrainer(base):  # type: ignore[misc]
        def __init__(self, names: dict[int, str], images: list[Path], overrides: dict[str, Any]) -> None:
            self.round_names, self.round_images = names, images
            super().__init__(overrides=overrides)

        def get_dataset(self) -> dict[str, Any]:
            """Ours instead of theirs, which runs a `download:` of the yaml and fetches a font; val is never used."""
            files: list[str | Path] = [str(file) for file in self.round_images]
            listing = Path(self.save_dir) / "train.txt"
            listing.write_text("\n".join(map(str, files)) + "\n", encoding="utf-8")
            for folder in {Path(label).parent for label in img2label_paths(files)}:
                folder.with_suffix(".cache").unlink(missing_ok=True)  # a pickle, and stale if a label kept its size
            names = dict(self.round_names)
            return {
                "path": listing.parent,
                "train": str(listing),
                "val": str(listing),
                "names": names,
                "nc": len(names),
                "channels": 3,
            }

        def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
            workers = self.args.workers
            self.args.workers = workers if mode == "train" else 0  # val's would start, and never work
            try:
                return super().get_dataloader(dataset_path, batch_size, rank, mode)
            finally:
                self.args.workers = workers

        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            model = super().get_model(cfg, weights, verbose)
            if weights is not None and _copied_by_position(weights.names, self.round_names):
                _reset_classifier(model)
            return model

        def save_model(self) -> bool:
            self.best_fitness = -1.0  # without val every fitness is None, and every epoch would be saved as best too
            return bool(super().save_model())

        def validate(self) -> tuple[dict[str, float], float]:
            """Nothing: the holdout measures, once, afterwards; val=False alone still validates in the last epoch."""
            return self.metrics, 0.0

        def final_eval(self) -> None:
            """Nothing: neither a second validation, nor stripping last.pt in place (see `_Run.finish`)."""

    return RoundTrainer


def _copied_by_position(old: dict[int, str], new: dict[int, str]) -> bool:
    """Would ultralytics copy classifier rows by position? It does for as many classes with no common name."""
    known = {str(name).strip().lower() for name in old.values()}
    return len(old) == len(new) and not any(name.strip().lower() in known for name in new.values())


def _reset_classifier(model: Any) -> None:
    head = model.model[-1]
    for branch in (getattr(head, attribute, None) for attribute in ("cv3", "one2one_cv3")):
        for stride, layers in zip(head.stride.tolist(), branch or [], strict=False):
            layers[-1].reset_parameters()
            layers[-1].bias.data[:] = math.log(5 / head.nc / (640 / stride) ** 2)  # ultralytics' own bias_init


def _check_loaded(trainer: Any, images: list[Path]) -> None:
    from ultralytics.data.utils import img2label_paths, verify_image_label

    verify: Any = verify_image_label  # untyped

    def why(file: Path) -> str:
        label = img2label_paths([str(file)])[0]
        message = str(verify((str(file), label, "", False, trainer.data["nc"], 0, 0, False))[-1])
        return message.rsplit("corrupt image/label: ", 1)[-1].strip()

    dataset = trainer.train_loader.dataset
    check_dataset_size(images, (Path(file) for file in dataset.im_files), why)
    if not any(len(label["cls"]) for label in dataset.labels):
        raise DatasetUnusable(f"The {len(images)} training images hold no boxes. Label some, then start a round.")


def _explained(error: BaseException, request: TrainRequest) -> HardfirstError:
    text = str(error)
    lowered = text.lower()
    if "out of memory" in lowered or "can't allocate memory" in lowered:
        return TrainingFailed(
            f"Memory ran out at train_batch={request.train_batch}, imgsz={request.imgsz}. Lower one of them."
        )
    if "no valid images" in lowered or "no labels found" in lowered or "no images found" in lowered:
        return DatasetUnusable(f"Nothing can be learned from these annotations: {first_line(error)}")
    if "single value per channel" in lowered or "more than 1 value per channel" in lowered:
        return TrainingFailed(
            f"The last step of an epoch would hold a single image, too little at imgsz={request.imgsz}. "
            "Change train_batch by one, or raise imgsz to 64 or more."
        )
    if "froze the entire model" in lowered:
        return TrainingFailed(f"freeze={request.freeze} leaves no layer that learns. Lower it.")
    if "nan persisted" in lowered or "nan/inf" in lowered:
        return TrainingFailed(_NOT_A_NUMBER)
    if "no space left" in lowered:
        return TrainingFailed(f"The disk is full: {first_line(error)}. Free some, then start the round again.")
    return TrainingFailed(f"Training failed ({type(error).__name__}): {first_line(error)}")


def _workers() -> int:
    """Processes that read images: none where there are few cores, or where a daemon may have no children."""
    cores = os.cpu_count() or 1
    if cores <= 2 or multiprocessing.current_process().daemon:
        return 0
    return min(8, cores - 1)


# --- reading --------------------------------------------------------------------------------------------------------


def _read_dataset(dataset_yaml: Path) -> tuple[dict[int, str], list[Path]]:
    """Class names and training images of a dataset yaml."""
    try:
        content = yaml.safe_load(dataset_yaml.read_text(encoding="utf-8"))
        listed = content["names"]
        names = dict(listed) if isinstance(listed, dict) else dict(enumerate(listed))
        names = {int(key): str(name) for key, name in names.items()}
        root = Path(os.path.abspath(dataset_yaml.parent / content.get("path", "")))
        source = root / content["train"]
        images = _training_images(source)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise DatasetUnusable(f"The dataset {dataset_yaml} cannot be read: {first_line(error)}") from error
    if sorted(names) != list(range(len(names))) or not names:
        raise DatasetUnusable(f"The dataset {dataset_yaml} must number its classes 0, 1, 2...: it has {names}.")
    if not images:
        raise DatasetUnusable(f"The dataset {dataset_yaml} has no training images in {source}. Label some first.")
    return names, images


def _training_images(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(file for file in source.rglob("*") if file.is_file() and file.suffix not in (".npy", ".cache"))
    lines = source.read_text(encoding="utf-8").splitlines()
    # not resolve(): labels are found beside a link, not beside what it points to
    return [Path(os.path.abspath(source.parent / line.strip())) for line in lines if line.strip()]


def _fingerprint_of_images(images: list[Path]) -> str:
    """Of the images' names and the labels' text, wherever the dataset lies.

    Not of the images' bytes: ultralytics re-encodes a JPEG that has bytes after its end.
    """
    from ultralytics.data.utils import img2label_paths

    digest = hashlib.sha256()
    for image, label in zip(images, img2label_paths([str(file) for file in images]), strict=True):
        text = Path(label).read_bytes() if Path(label).is_file() else b"-"
        digest.update(f"{image.name}\0{hashlib.sha256(text).hexdigest()}\n".encode())
    return digest.hexdigest()


def _fingerprint_of_weights(weights: str) -> str:
    file = Path(weights)
    if file.suffix != ".pt":
        return weights
    if not file.is_file():
        raise WeightsUnavailable(f"There are no weights at {file}.")
    return sha256_of(file)


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
    os.replace(temporary, file)


def _sync(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())
