"""`hardfirst score`: rank images by a detector, with no Label Studio, no queue and no store.

The same pass, measures, strategies and choice as a round's, on files. What is scored is kept beside the results, so
that the same command goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from strategies.errors import StrategyError
from strategies.options import OPTIONS, check_name, validate_options
from strategies.uncertainty import MEASURES
from worker.arms import parse_arms
from worker.boxes import LOWEST_THRESHOLD, LabelMap
from worker.descriptor import DESCRIPTOR_NAME
from worker.errors import BadRequest, ImageUnusable, LabelConfigUnsupported, LabelMismatch
from worker.image_sources import ImageAway, ImageReader, SourceImage, check_references, find_images, printable
from worker.looking import FETCHERS, Look, Opened, look_at, opened_ahead
from worker.offline_scores import PART_IMAGES, ImageRow, PartStore, ScoreTable, folder_of_one, identity_of
from worker.selection import Batch, ScoredTasks, generator, next_batch
from worker.settings import ProjectSettings, Settings
from worker.uncertainty import measures_of, reading_of

if TYPE_CHECKING:
    from worker.detector import Detector

STATE = ".state"  # in the results' folder: scores of earlier runs, exported weights, ultralytics' settings
# project settings that have a meaning here, with uncertainty_*
READ_HERE = ("confidence", "near_duplicate_threshold", "shapes")
KEY_ROUND = 1  # of the random numbers

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What `hardfirst score` was asked for."""

    sources: tuple[str, ...]
    weights: tuple[Path, ...] = ()
    k: int = 200
    strategy: str | None = None
    options: tuple[str, ...] = ()  # name=value
    labelled: str | None = None
    imgsz: int = 640
    seed: int = 0
    with_random: bool = False
    out: Path = Path("hardfirst-score")
    label_config: Path | None = None
    image_url_prefix: str | None = None
    local_files_root: Path | None = None

    @cached_property
    def settings(self) -> ProjectSettings:
        """As of a project that asks for this.

        Raises:
            BadRequest: an unknown strategy, option or setting, or a value that cannot be.
        """
        given = self.strategy or _usual_strategy(len(self.weights))
        strategy, _, with_it = given.partition(":")  # hybrid:alpha=0.5, as an arm of a simulation
        _check_strategy(strategy, len(self.weights))
        written = ",".join(option.strip() for option in (with_it, *self.options) if option.strip())
        arm = parse_arms(f"{strategy}:{written}" if written else strategy)[0]
        for name in arm.overrides:
            if name not in READ_HERE and not name.startswith("uncertainty_"):
                raise BadRequest(f"--option {name} means nothing here: nothing is trained. Leave it out.")
        common = {"batch_size": self.k, "imgsz": self.imgsz, "seed": self.seed}
        if strategy == "committee":
            common["committee_size"] = len(self.weights)
        return arm.settings(common)

    @cached_property
    def options_in_force(self) -> dict[str, Any]:
        return validate_options(self.settings.strategy, self.settings.strategy_options)


def _usual_strategy(n_weights: int) -> str:
    """Diversity where nothing knows the classes; a project's default; what several detectors are for."""
    if n_weights > 1:
        return "committee"
    return str(ProjectSettings.model_fields["strategy"].default) if n_weights else "coverage"


@dataclass(frozen=True)
class Eyes:
    """What looks at the images. Without a detector the descriptor does. `knows_classes`: somebody named its weights."""

    detector: Detector | None
    members: tuple[Detector, ...] = ()
    sha256: tuple[str, ...] = ()
    knows_classes: bool = True
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> dict[int, str]:
        return {} if self.detector is None or not self.knows_classes else self.detector.names


@dataclass
class Ranking:
    """Everything the results are written from. Positions index `images`; the labelled come after the pool."""

    request: Request
    images: list[SourceImage]
    n_pool: int
    table: ScoreTable
    parts: PartStore
    eyes: Eyes
    label_map: LabelMap
    class_to_label: dict[int, str]
    batch: Batch
    at_random: list[int]
    notes: list[str] = field(default_factory=list)
    fresh: int = 0  # scored in this run
    seconds: float = 0.0  # of scoring, in this run

    @property
    def top(self) -> list[int]:
        return self.batch.task_ids

    @property
    def n_labelled(self) -> int:
        return len(self.images) - self.n_pool

    @property
    def per_second(self) -> float | None:
        return self.fresh / self.seconds if self.fresh and self.seconds > 0 else None

    @property
    def pool_problems(self) -> dict[int, str]:
        return {position: text for position, text in sorted(self.table.problems.items()) if position < self.n_pool}


def rank(request: Request, settings: Settings, progress: Progress | None = None) -> Ranking:
    """Score what is not scored yet, and rank all.

    Args:
        settings: of the deployment: device, limits of an image, HARDFIRST_WEIGHTS.
        progress: called with images done and wanted in this run.

    Raises:
        BadRequest: the request cannot be right, or there is no image to rank.
        WeightsUnavailable, LabelMismatch, LabelConfigUnsupported: as they say.
        Conflict: another process writes to the same folder.
    """
    project = request.settings  # refused before anything is read
    pool, labelled = _pool_and_labelled(request)
    check_references(request, pool)
    images = [*pool, *labelled]
    with folder_of_one(request.out / STATE, "score") as folder:
        eyes = open_eyes(request, settings, folder)
        label_map, class_to_label = _labels(request, eyes)
        confidence = max(label_map.lowest_threshold(project.confidence), LOWEST_THRESHOLD)
        parts = PartStore(folder, _depends_on(eyes, project, confidence))
        table = parts.load(images)
        pending = np.flatnonzero(~table.known).tolist()
        reader = ImageReader(settings.image_max_mb * 1_000_000, settings.image_max_megapixels * 1_000_000)
        started = time.monotonic()
        for done in _score(images, pending, eyes, project, confidence, reader, parts, table):
            if progress is not None:
                progress(done, len(pending))
        seconds = time.monotonic() - started
    batch = _choose(table, len(pool), images, eyes, project)
    at_random = _at_random(table, len(pool), batch, project) if request.with_random else []
    notes = [*eyes.notes, *batch.notes, *_notes(request, batch, at_random, table, len(pool))]
    return Ranking(
        *(request, images, len(pool), table, parts, eyes, label_map, class_to_label, batch, at_random, notes),
        fresh=len(pending),
        seconds=seconds,
    )


def _check_strategy(strategy: str, n_weights: int) -> None:
    try:
        check_name(strategy)
    except StrategyError as error:
        raise BadRequest(str(error)) from error
    if strategy == "committee" and not 3 <= n_weights <= 5:
        raise BadRequest(f"strategy 'committee' asks several detectors: name 3 to 5 --weights, not {n_weights}.")
    if strategy != "committee" and n_weights > 1:
        raise BadRequest(f"strategy {strategy!r} asks one detector, not {n_weights}. Or --strategy committee?")
    if not n_weights and strategy in MEASURES:
        raise BadRequest(
            f"strategy {strategy!r} ranks by uncertainty, of which nothing is known without --weights. Name weights "
            "that were trained on your classes, or use coverage, k_center or kmeans."
        )


def _pool_and_labelled(request: Request) -> tuple[list[SourceImage], list[SourceImage]]:
    found = find_images(request.sources)
    labelled = [] if request.labelled is None else find_images([request.labelled])
    labelled = [image for image in labelled if not image.missing]
    has_labels = {image.path for image in labelled}
    pool = [image for image in found if image.path not in has_labels]
    if not pool:
        raise BadRequest(f"All {len(found)} images are in --labelled {request.labelled}: nothing is left to rank.")
    return pool, labelled


def open_eyes(request: Request, settings: Settings, folder: Path) -> Eyes:
    """The detectors that were named; else the pretrained one, for embeddings; else the descriptor."""
    from worker.detector import Detector, prepare_ultralytics, resolve_weights, sha256_of

    prepare_ultralytics(folder / "ultralytics")
    if request.weights:
        detectors = [Detector.load(path, settings.device) for path in request.weights]
        hashes = tuple(sha256_of(path) for path in request.weights)
        _check_committee(request.weights, detectors, hashes)
        return Eyes(detectors[0], tuple(detectors[1:]), hashes)
    unknown = (
        "No --weights were named: which images a detector of your classes is unsure of cannot be known. The ranking is "
        "by diversity alone"
    )
    base = resolve_weights("", settings.weights, folder / "weights")
    if not base.pretrained:
        told = f"{unknown}, by layout, colour and edges: no pretrained detector is at hand."
        why = base.note.partition("Training starts")[0].strip()  # nothing is trained here
        return Eyes(None, knows_classes=False, notes=(f"{told} {why}".strip(),))
    detector = Detector.load(base.path, settings.device)
    told = f"{unknown}, as {Path(base.path).name} sees it."
    return Eyes(detector, sha256=(sha256_of(Path(base.path)),), knows_classes=False, notes=(told,))


def _check_committee(paths: Sequence[Path], detectors: Sequence[Detector], hashes: Sequence[str]) -> None:
    if len(set(hashes)) < len(hashes):
        raise BadRequest("Two of the --weights are the same network: a committee needs members that can disagree.")
    for path, member in zip(paths, detectors, strict=True):
        if member.names != detectors[0].names:
            raise LabelMismatch(
                f"{path} knows {list(member.names.values())}, {paths[0]} {list(detectors[0].names.values())}: the "
                "members of a committee must be trained on the same classes."
            )


def _labels(request: Request, eyes: Eyes) -> tuple[LabelMap, dict[int, str]]:
    """Of the label config that was named; else the model's own names, in a config with `label` and `image`."""
    if request.label_config is None:
        labels = tuple(dict.fromkeys(eyes.names.values()))
        return LabelMap("label", "image", "image", labels), dict(eyes.names)
    try:
        text = request.label_config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"--label-config {request.label_config} cannot be read: {error}") from error
    try:
        label_map = LabelMap.from_config(text, request.settings.shapes)
    except LabelConfigUnsupported as error:
        here = " Here that is --option shapes=hull." if "extra params" in str(error) else ""
        raise LabelConfigUnsupported(f"--label-config {request.label_config}: {error}{here}") from error
    return label_map, label_map.classes_for(eyes.names) if eyes.names else {}


def _depends_on(eyes: Eyes, project: ProjectSettings, confidence: float) -> object:
    """What a score depends on besides the image."""
    looks = list(eyes.sha256) or [DESCRIPTOR_NAME]
    return [looks, eyes.knows_classes, project.imgsz, confidence, reading_of(project, {})]


def _score(
    images: Sequence[SourceImage],
    pending: Sequence[int],
    eyes: Eyes,
    project: ProjectSettings,
    confidence: float,
    reader: ImageReader,
    parts: PartStore,
    table: ScoreTable,
) -> Iterator[int]:
    """Yields the number done after each image. Whatever ends it, what was scored is kept."""
    rows: list[tuple[int, ImageRow]] = []

    def open_one(position: int) -> Opened:
        try:
            return reader.open(images[position])
        except ImageUnusable as error:
            return error

    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="read") as pool:
        looks = look_at(opened_ahead(pending, open_one, pool), eyes.detector, eyes.members, project, confidence)
        try:
            for done, (position, seen) in enumerate(zip(pending, looks, strict=True), 1):
                rows.append((position, _row(identity_of(images[position]), *seen, eyes, project, confidence)))
                if len(rows) == PART_IMAGES:
                    parts.add(rows, table)
                    rows = []
                yield done
        finally:  # Ctrl-C too
            parts.add(rows, table)


def _row(
    identity: bytes,
    look: Look,
    disagreement: float | None,
    eyes: Eyes,
    project: ProjectSettings,
    confidence: float,
) -> ImageRow:
    if isinstance(look, ImageUnusable):
        return ImageRow(identity, problem=str(look), passing=isinstance(look, ImageAway))
    if isinstance(look, np.ndarray):
        return ImageRow(identity, embedding=look)
    if not eyes.knows_classes:
        return ImageRow(identity, embedding=look.embedding, size=(look.width, look.height))
    drawn = look.confidences >= confidence
    classes = look.class_ids[drawn, None].astype(np.float32)
    boxes = np.concatenate([look.boxes_xyxy[drawn], look.confidences[drawn, None], classes], axis=1)
    measures = measures_of(look, project)
    return ImageRow(
        identity,
        [measures[name] for name in MEASURES],
        disagreement,
        boxes.astype(np.float32),
        (look.width, look.height),
        look.embedding,
    )


def _choose(
    table: ScoreTable, n_pool: int, images: Sequence[SourceImage], eyes: Eyes, project: ProjectSettings
) -> Batch:
    in_pool = np.arange(len(images)) < n_pool
    pool = _scored(table, table.usable & in_pool, eyes)
    if not len(pool.task_ids):
        position, problem = next(iter(sorted(table.problems.items())))
        raise BadRequest(
            f"None of the {n_pool} images can be read. The first, {printable(images[position].key)}: {problem}"
        )
    labelled = _scored(table, table.usable & ~in_pool, eyes)
    return next_batch(pool, labelled, [], project, 0, KEY_ROUND)


def _scored(table: ScoreTable, chosen: NDArray[np.bool_], eyes: Eyes) -> ScoredTasks:
    """Images as the selection takes them. Where nothing is known of uncertainty it is 1 for all."""
    measures = table.measures[chosen] if eyes.knows_classes else np.ones((int(chosen.sum()), len(MEASURES)))
    disagreement = np.nan_to_num(table.disagreement[chosen]) if eyes.members else None
    uncertainty = {name: measures[:, column] for column, name in enumerate(MEASURES)}
    return ScoredTasks(np.flatnonzero(chosen), table.embeddings[chosen], uncertainty, disagreement)


def _at_random(table: ScoreTable, n_pool: int, batch: Batch, project: ProjectSettings) -> list[int]:
    rest = np.setdiff1d(np.flatnonzero(table.usable[:n_pool]), batch.task_ids)
    rng = generator(project, 0, KEY_ROUND, "random")
    return [int(one) for one in rng.choice(rest, size=min(project.batch_size, len(rest)), replace=False)]


def _notes(request: Request, batch: Batch, at_random: Sequence[int], table: ScoreTable, n_pool: int) -> Iterator[str]:
    usable = int(table.usable[:n_pool].sum())
    if len(batch.task_ids) < request.k:
        yield f"{request.k} images were asked for, and {usable} can be ranked: all of them are chosen."
    if request.with_random and not at_random:
        yield "No image is left for the random list: there is nothing to compare with. Lower --k."
    elif request.with_random and len(at_random) < request.k:
        yield f"Only {len(at_random)} images are left for the random list: the pool has {usable}."
    name = request.settings.strategy
    uses_uncertainty = name == "committee" or any(option.name == "measure" for option in OPTIONS[name])
    if not request.weights and uses_uncertainty:
        yield f"Strategy {name!r} mixes uncertainty in: without --weights it is taken as equal for all images."
