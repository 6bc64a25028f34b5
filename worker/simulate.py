"""Replays active learning on a labelled dataset, its labels as the oracle: which strategy would have paid?

    round 0   a seed set, the same for all arms, is labelled; one model is trained on it
    round t   the arm's strategy chooses a batch by the model of round t - 1; the oracle labels it; a new model is
              trained on all labels so far, from the same base weights, and measured on the holdout

Choosing, reading uncertainty, writing datasets, training and measuring are production's own functions. What is
simulated is Label Studio, the queue and the annotators.

Every finished step is a file under OUT/cache, named by what its result depends on and written whole or not at all: a
killed run continues, another arm or seed reuses what is there, and a training that was interrupted starts anew, so that
a run that was killed gives the same numbers as one that was not. One torch thread each: more would change the numbers.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # no stubs are published

from strategies import validate_options
from strategies.committee import image_disagreement
from worker.arms import Arm
from worker.dataset import write_dataset
from worker.descriptor import describe
from worker.detector import (
    BaseWeights,
    Detector,
    ImageScore,
    collect_detections,
    prepare_ultralytics,
    resolve_weights,
    sha256_of,
)
from worker.errors import BadRequest, ImageUnusable
from worker.evaluation import EvaluationArrays, evaluate
from worker.images import decode_image
from worker.measuring import truth_for
from worker.retraining import member_part
from worker.selection import ScoredTasks, first_batch, generator, next_batch
from worker.settings import ProjectSettings
from worker.simulation_world import Oracle, Picture, World, read_world
from worker.training import TrainProgress, TrainRequest, train
from worker.uncertainty import chances_missed, lowest_candidate, measures_of, reading_of, weights_of_classes
from worker.work import MEASURES

FORMAT = 2  # of the files in the cache: raise it when a step means something else
# Kind of file in the cache -> packages, beside those of the files it is made of, another version of which may make it
# otherwise: it is made anew then, so that no curve is of two versions.
MADE_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "seed": ("ultralytics", "torch", "numpy", "scikit-learn"),
        "train": ("ultralytics", "torch"),
        "evaluation": ("openvino",),
        "scores": ("openvino",),
        "batch": ("numpy", "scikit-learn"),
    }
)
SEED_SETS = ("random", "diverse")
SEED_PROJECT = 0  # in place of a project's id in the random numbers of the seed set; arms have their `draw`

Told = Callable[[str, float], None]  # (what is being done, how far: 0..1)


@dataclass(frozen=True)
class Plan:
    """A simulation: everything its numbers depend on, and where they go."""

    data: Path
    out: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    rounds: int  # batches, after the seed set
    batch_size: int
    seed_size: int
    seed_set: str = "random"
    common: Mapping[str, Any] = field(default_factory=dict)  # project settings of all arms
    configured_weights: str = ""  # HARDFIRST_WEIGHTS
    device: str = ""
    rare: tuple[str, ...] = ()  # classes named by hand
    seconds_per_image: float = 8.0
    seconds_per_box: float = 7.0
    command: str = ""

    def settings(self, arm: Arm, seed: int) -> ProjectSettings:
        return arm.settings({**self.common, "batch_size": self.batch_size, "seed": seed})

    def check_arms(self) -> None:
        """
        Raises:
            BadRequest: an arm cannot be played by this command.
            SettingsInvalid: a setting of an arm is out of range.
        """
        for arm in self.arms:
            found = self.settings(arm, self.seeds[0])
            if found.committee_size and found.committee != "subsets":
                raise BadRequest(f"arm {arm.label}: a simulation knows committees of subsets only: leave committee out")

    def check(self, world: World) -> None:
        """
        Raises:
            BadRequest: it cannot be played on this dataset.
        """
        if self.seed_size + self.batch_size > len(world.pool):
            raise BadRequest(
                f"the pool has {len(world.pool)} images, too few for a seed set of {self.seed_size} and a batch of "
                f"{self.batch_size}. Lower --seed-size or --batch-size"
            )
        if unknown := [name for name in self.rare if name not in world.names]:
            raise BadRequest(f"--rare names {unknown[0]!r}; the classes are {', '.join(world.names)}")


@dataclass(frozen=True)
class Step:
    """One turn of one arm: the unit that is done, told and waited for."""

    arm: str
    seed: int
    number: int  # of the round; 0 is the seed set


class Bench:
    """Does steps and keeps their results. One in each process."""

    def __init__(self, plan: Plan, world: World | None = None, told: Told | None = None) -> None:
        self.plan = plan
        self.cache = plan.out / "cache"
        self.work = plan.out / "work"
        prepare_ultralytics(self.cache / "ultralytics")
        self.world = world or read_world(plan.data, self.cache)
        self.told: Told = told or (lambda what, share: None)
        self.arms = {arm.label: arm for arm in plan.arms}
        self._base_weights: dict[str, tuple[BaseWeights, str]] = {}
        self._known: dict[Step, dict[str, Any]] = {}

    # --- a step ---------------------------------------------------------------------------------------------------

    def run(self, step: Step) -> dict[str, Any]:
        """One round of one arm: its record, done now or read back. Earlier rounds of it must be done.

        Raises:
            HardfirstError: it cannot be trained, or a file cannot be read.
        """
        found = self._round(step, may_work=True)
        if found is None:
            raise ValueError(f"{step}: the rounds before it are not done")
        return found

    def known(self, step: Step) -> dict[str, Any] | None:
        """The record of a round that is done, else None. Nothing is computed but what names its files."""
        found = self._known.get(step) or self._round(step, may_work=False)
        if found is not None:
            self._known[step] = found  # it will not change; results are collected after every step
        return found

    def round_0_key(self, arm: str, seed: int) -> str:
        """Arms with the same one share the model of round 0. (Of warm starts too: round 0 has no model before it.)"""
        settings = self.plan.settings(self.arms[arm], seed)
        oracle = Oracle(self.world)
        oracle.label(self._seed_set(seed))
        return Training(self, oracle.labelled, settings, 0, None).key

    def at(self, step: Step) -> tuple[Training, Choice, Oracle] | None:
        """The training of a round, what its arm chooses after it, and what is labelled by then; None: the rounds before
        are not done. Nothing is computed but what names their files."""
        found = self._at(step)
        return None if found is None else found[:3]

    def _at(self, step: Step) -> tuple[Training, Choice, Oracle, Training | None] | None:
        """As `at`, and the training before it."""
        arm, oracle = self.arms[step.arm], Oracle(self.world)
        settings = self.plan.settings(arm, step.seed)
        oracle.label(self._seed_set(step.seed))
        before: Training | None = None
        for number in range(step.number + 1):
            training = Training(self, oracle.labelled, settings, number, before if settings.warm_start else None)
            choice = Choice(training, arm)
            if number == step.number:
                break
            chosen = choice.known()
            if chosen is None:
                return None
            oracle.label(chosen["task_ids"])
            before = training
        return training, choice, oracle, before

    def _round(self, step: Step, may_work: bool) -> dict[str, Any] | None:
        found = self._at(step)
        if found is None:
            return None
        training, choice, oracle, before = found
        if not may_work:
            return self._record(step, training, choice, oracle)
        with _locked(self.cache / "locks" / training.key):
            training.record()
            training.evaluation()
            if step.number < self.plan.rounds:
                choice.make()
        self._forget(training, before, choice)
        return self._record(step, training, choice, oracle)

    def _record(self, step: Step, training: Training, choice: Choice, oracle: Oracle) -> dict[str, Any] | None:
        trained, measured = training.known("train"), training.known("evaluation")
        chosen = choice.known() if step.number < self.plan.rounds else {}
        if trained is None or measured is None or chosen is None:
            return None
        return {
            "round": step.number,
            "evaluation": training.evaluation_key,
            "trained": trained,
            "measured": measured,
            "next_batch": chosen,
            "labelled": list(oracle.asked),
        }

    def _forget(self, training: Training, before: Training | None, choice: Choice) -> None:
        """Weights that nobody will ask for. Round 0's are every arm's; others the next round's, if it starts there."""
        if before is not None and before.number:
            before.weights_file.unlink(missing_ok=True)
        if training.number and not (training.settings.warm_start and training.number < self.plan.rounds):
            training.weights_file.unlink(missing_ok=True)
        if training.number:
            for member in choice.members:
                member.weights_file.unlink(missing_ok=True)

    def arrays(self, evaluation_key: str) -> EvaluationArrays:
        """What a measurement kept of each holdout image, for a bootstrap."""
        return EvaluationArrays.load((self.cache / "evaluation" / f"{evaluation_key}.npz").read_bytes())

    # --- the seed set ---------------------------------------------------------------------------------------------

    def _seed_set(self, seed: int) -> list[int]:
        """Task ids of what is labelled first: the same for all arms."""
        if self.plan.seed_set == "diverse":
            return list(self._diverse_seed_set(seed)["task_ids"])
        rng = generator(self._seed_settings(seed), SEED_PROJECT, 0, "seed set")
        ids = [picture.task_id for picture in self.world.pool]
        return [int(task_id) for task_id in rng.choice(np.array(ids), self.plan.seed_size, replace=False)]

    def _seed_settings(self, seed: int) -> ProjectSettings:
        given = {**self.plan.common, "batch_size": self.plan.seed_size, "seed": seed}
        return Arm("seed set", "coverage").settings(given)

    def _diverse_seed_set(self, seed: int) -> dict[str, Any]:
        settings = self._seed_settings(seed)
        base, fingerprint = self.base_weights(settings)
        chosen = (self.world.pool_fingerprint, settings.imgsz, self.plan.seed_size, seed)
        key = _key("seed", fingerprint, *chosen, self.plan.device)
        file = self.cache / "seed" / f"{key}.json"
        if (found := read_json(file)) is None:
            embeddings = self._base_embeddings(base, settings)
            ids = np.array([picture.task_id for picture in self.world.pool], dtype=np.int64)
            pool = ScoredTasks(ids, embeddings, {name: np.ones(len(ids)) for name in MEASURES})
            batch = first_batch(pool, pool.rows(np.zeros(len(ids), bool)), [], settings, SEED_PROJECT)
            found = {"task_ids": batch.task_ids}
            write_json(file, found)
        return found

    def _base_embeddings(self, base: BaseWeights, settings: ProjectSettings) -> NDArray[np.float32]:
        """Of the pretrained backbone; from scratch there is none, and the descriptor stands in, as in production."""
        if not base.pretrained:
            return np.stack([describe(decode_image(picture.path.read_bytes())) for picture in self.world.pool])
        detector = Detector.load(base.path, self.plan.device, threads=1, backend="torch")
        looks = detector.score_each(_opened(self.world.pool), settings.imgsz)
        return np.stack([look.embedding for look in looks if isinstance(look, ImageScore)])

    def base_weights(self, settings: ProjectSettings) -> tuple[BaseWeights, str]:
        """What trainings start from, and what tells it from other weights."""
        named = settings.weights
        if named not in self._base_weights:
            base = resolve_weights(named, self.plan.configured_weights, self.cache / "base")
            is_file = base.path.endswith(".pt")
            self._base_weights[named] = (base, sha256_of(Path(base.path)) if is_file else base.path)
        return self._base_weights[named]


class Training:
    """The training on a set of labels, and the measurement of what came of it. Named by `key`; done when asked for."""

    def __init__(
        self, bench: Bench, labelled: Sequence[Picture], settings: ProjectSettings, number: int, before: Training | None
    ) -> None:
        self.bench, self.labelled, self.settings, self.number, self.before = bench, labelled, settings, number, before

    @cached_property
    def key(self) -> str:
        start = f"after {self.before.key}" if self.before else self.bench.base_weights(self.settings)[1]
        names = ("epochs", "imgsz", "train_batch", "nominal_batch", "optimizer", "lr0", "mosaic", "close_mosaic")
        chosen = {name: getattr(self.settings, name) for name in (*names, "freeze", "seed")}
        chosen["mixup"] = self.settings.mixup_in(self.number)
        images = [picture.fingerprint for picture in self.labelled]
        return _key("train", start, chosen, self.bench.world.names, images, self.bench.plan.device)

    @property
    def weights_file(self) -> Path:
        return self.bench.cache / "weights" / f"{self.key}.pt"

    def known(self, kind: str) -> dict[str, Any] | None:
        return read_json(self.file(kind))

    def file(self, kind: str) -> Path:
        key = self.key if kind == "train" else self.evaluation_key
        return self.bench.cache / kind / f"{key}.json"

    def record(self) -> dict[str, Any]:
        found = self.known("train")
        return found if found is not None else self._train()

    def weights(self) -> Path:
        if not self.weights_file.is_file():
            self._train()
        return self.weights_file

    def _start(self) -> str:
        return self.bench.base_weights(self.settings)[0].path if self.before is None else str(self.before.weights())

    def _train(self) -> dict[str, Any]:
        """In a folder of its own with its own copies: two trainings beside each other would race on label caches."""
        start, began = self._start(), time.monotonic()
        folder = self.bench.work / f"{self.key}-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed: it is not gone on with, but done again
        try:
            of_id = {picture.task_id: picture for picture in self.labelled}
            report = write_dataset(
                folder / "dataset",
                [picture.truth for picture in self.labelled],
                self.bench.world.names,
                lambda task_id: of_id[task_id].path.read_bytes(),
            )
            request = self._request(report.yaml, folder / "run", start)
            trained = train(request, self._tell)
            record = {
                "images": sorted(set(of_id) - set(report.left_out)),
                "n_boxes": report.n_boxes,
                "boxes_per_class": dict(report.boxes_per_class),
                "left_out": {str(task_id): why for task_id, why in report.left_out.items()},
                "note": trained.note,
                "seconds": round(time.monotonic() - began, 2),
            }
            self.weights_file.parent.mkdir(parents=True, exist_ok=True)
            os.replace(trained.weights, self.weights_file)
            write_json(self.file("train"), record)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return record

    def _request(self, yaml: Path, run_dir: Path, start: str) -> TrainRequest:
        request = TrainRequest.of_round(self.settings, self.number, yaml, run_dir, start, self.bench.plan.device)
        return TrainRequest(**{**vars(request), "threads": 1})

    def _tell(self, now: TrainProgress) -> None:
        self.bench.told("training", 0.9 * now.epoch / now.epochs)

    @property
    def evaluation_key(self) -> str:
        return _key("evaluation", self.key, self.bench.world.holdout_fingerprint, self.settings.imgsz)

    @property
    def arrays_file(self) -> Path:
        return self.file("evaluation").with_suffix(".npz")

    def evaluation(self) -> dict[str, Any]:
        """mAP on the holdout, as a round measures it. The arrays beside it are for a bootstrap over its images."""
        if (found := self.known("evaluation")) is not None:
            return found
        began, world = time.monotonic(), self.bench.world
        detector = Detector.load(self.weights(), self.bench.plan.device, half=False, threads=1)
        images = ((picture.task_id, decode_image(picture.path.read_bytes())) for picture in world.holdout)
        total = len(world.holdout)
        seen = collect_detections(
            detector, images, self.settings.imgsz, progress=lambda done: self.bench.told("measuring", done / total)
        )
        measured = evaluate(seen, truth_for(seen, [picture.truth for picture in world.holdout]))
        if measured.map50 is None:
            raise BadRequest(f"the holdout cannot measure anything: {measured.reason}")
        record = {
            "map50": measured.map50,
            "map50_95": measured.map50_95,
            "ap50": {world.names[class_id]: value for class_id, value in measured.ap50.items()},
            "ap50_95": {world.names[class_id]: value for class_id, value in measured.ap50_95.items()},
            "boxes": {world.names[class_id]: count for class_id, count in measured.n_boxes.items()},
            "seconds": round(time.monotonic() - began, 2),
        }
        write_bytes(self.arrays_file, measured.arrays.save())
        write_json(self.file("evaluation"), record)
        return record


class Choice:
    """The batch that an arm asks for after a training."""

    def __init__(self, training: Training, arm: Arm) -> None:
        self.training, self.arm, self.bench = training, arm, training.bench
        self.settings = training.settings

    @cached_property
    def members(self) -> list[Training]:
        """The committee's other detectors, each trained on its own part of the labels, as in a round."""
        if self.arm.strategy != "committee":
            return []
        ids = [picture.task_id for picture in self.training.labelled]
        found = []
        for number in range(1, self.settings.committee_size):
            rng = generator(self.settings, self.arm.draw, self.training.number, f"member {number}")
            part = member_part(ids, rng)
            images = [picture for picture in self.training.labelled if picture.task_id in part]
            settings = self.settings.model_copy(update={"seed": self.settings.seed + number})
            found.append(Training(self.bench, images, settings, self.training.number, self.training.before))
        return found

    @property
    def _needs_scores(self) -> bool:
        """A random order depends on the number of images alone: nothing of them has to be looked at."""
        options = validate_options(self.arm.strategy, self.arm.options)
        return self.arm.strategy != "random" or bool(options["suppress_duplicates"])

    def _scores_key(self, boxes_per_class: Mapping[str, int]) -> str:
        settings = self.settings
        reading = reading_of(settings, boxes_per_class, self.training.evaluation_key)
        members = [member.key for member in self.members]
        seen = (settings.imgsz, settings.confidence, self.bench.world.pool_fingerprint)
        return _key("scores", self.training.key, members, reading, *seen)

    def _file(self) -> Path:
        """Where the batch is kept; the name needs the training to be done only where class weights are used."""
        options = validate_options(self.arm.strategy, self.arm.options)
        settings = self.settings
        scores = self._scores_key(self._boxes_per_class()) if self._needs_scores else self.training.key
        chosen = (settings.batch_size, settings.seed, settings.near_duplicate_threshold)
        place = (self.arm.draw, self.training.number, self.bench.world.pool_fingerprint)
        return self.bench.cache / "batch" / f"{_key('batch', scores, self.arm.strategy, options, chosen, place)}.json"

    def _boxes_per_class(self) -> Mapping[str, int]:
        """Labelled boxes that the model was trained on."""
        names, counts = self.bench.world.names, np.zeros(len(self.bench.world.names), dtype=np.int64)
        for picture in self.training.labelled:
            counts += np.bincount(picture.truth.class_ids, minlength=len(names))
        return {name: int(count) for name, count in zip(names, counts, strict=True)}

    def known(self) -> dict[str, Any] | None:
        return read_json(self._file())

    def make(self) -> dict[str, Any]:
        if (found := self.known()) is not None:
            return found
        began = time.monotonic()
        scored = self._scored()
        scored_at = time.monotonic()
        self.bench.told("choosing", 0.99)
        labelled = np.isin(scored.task_ids, [picture.task_id for picture in self.training.labelled])
        with threadpool_limits(limits=1):
            batch = next_batch(
                scored.rows(~labelled), scored.rows(labelled), [], self.settings, self.arm.draw, self.training.number
            )
        record = {
            "task_ids": batch.task_ids,
            "utilities": [round(batch.utilities.get(task_id, 0.0), 6) for task_id in batch.task_ids],
            "tied": _tied(batch.parts),
            "notes": batch.notes,
            "seconds_scoring": round(scored_at - began, 2),
            "seconds_choosing": round(time.monotonic() - scored_at, 2),
        }
        write_json(self._file(), record)
        return record

    def _scored(self) -> ScoredTasks:
        """All images of the pool, labelled ones too: strategies ask how far an image is from those."""
        ids = np.array([picture.task_id for picture in self.bench.world.pool], dtype=np.int64)
        if not self._needs_scores:
            nothing = {name: np.zeros(len(ids)) for name in MEASURES}
            return ScoredTasks(ids, np.zeros((len(ids), 1), np.float32), nothing)
        file = self.bench.cache / "scores" / f"{self._scores_key(self._boxes_per_class())}.npz"
        if not file.is_file():
            columns = self._score(ids)
            if self.training.number:  # every arm reads round 0's, nobody these again: the batch is kept
                return _scored_tasks(columns)
            buffer = io.BytesIO()
            np.savez(buffer, **columns)
            write_bytes(file, buffer.getvalue())
        with np.load(file, allow_pickle=False) as kept:
            return _scored_tasks(kept)

    def _score(self, ids: NDArray[np.int64]) -> dict[str, Any]:
        """Measures, embeddings and, with a committee, its disagreement, by the detector in one pass each."""
        for member in self.members:
            member.record()
        world, settings = self.bench.world, self.settings
        with tempfile.TemporaryDirectory(prefix="hardfirst-openvino-") as cache:
            detectors = [
                Detector.load(one.weights(), self.bench.plan.device, threads=1, cache=Path(cache))
                for one in (self.training, *self.members)
            ]
            weights = weights_of_classes(settings, detectors[0].names, self._boxes_per_class())
            chances = chances_missed(self.bench.arrays(self.training.evaluation_key), settings)
            streams = [
                detector.score_each(
                    _opened(world.pool), settings.imgsz, settings.confidence, lowest_candidate(settings)
                )
                for detector in detectors
            ]
            measures, embeddings, votes = [], [], []
            for done, looks in enumerate(zip(*streams, strict=True), start=1):
                seen = [usable(look) for look in looks]
                measures.append(measures_of(seen[0], settings, weights, chances))
                embeddings.append(seen[0].embedding)
                if len(seen) > 1:
                    votes.append(image_disagreement([(one.boxes_xyxy, one.probabilities) for one in seen]))
                if done % 64 == 0:
                    self.bench.told("scoring", done / len(ids))
        columns: dict[str, Any] = {name: np.array([row[name] for row in measures]) for name in MEASURES}
        columns |= {"task_ids": ids, "embeddings": np.stack(embeddings)}
        return columns | ({"disagreement": np.array(votes)} if votes else {})


def _scored_tasks(columns: Mapping[str, NDArray[Any]]) -> ScoredTasks:
    measures = {name: columns[name] for name in MEASURES}
    return ScoredTasks(columns["task_ids"], columns["embeddings"], measures, columns.get("disagreement"))


def _tied(parts: Mapping[int, Mapping[str, float]]) -> int | None:
    """How many images of the pool share the highest uncertainty; None where a strategy reads none.

    More than a batch: not uncertainty has chosen, but what breaks its ties.
    """
    values = np.array([part["uncertainty"] for part in parts.values() if "uncertainty" in part])
    return int((values >= values.max() - 1e-9).sum()) if len(values) else None


def usable(look: ImageScore | ImageUnusable) -> ImageScore:
    """The score; every image of a world was looked at when it was read, so one that cannot be scored is raised."""
    if isinstance(look, ImageUnusable):
        raise look
    return look


def _opened(pictures: Sequence[Picture]) -> Iterator[Any]:
    return (decode_image(picture.path.read_bytes()) for picture in pictures)


# --- files ----------------------------------------------------------------------------------------------------------


def _key(kind: str, *parts: Any) -> str:
    """Name of what depends on these."""
    versions = [version(name) for name in MADE_BY[kind]]
    text = json.dumps([FORMAT, kind, versions, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(found, dict):
        raise BadRequest(f"{file} is not what a simulation wrote. Remove it")
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_bytes(file, json.dumps(content, indent=1).encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Arms that come to the same labels share the training: the second waits for the first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
