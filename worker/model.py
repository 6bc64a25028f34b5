"""HardfirstModel: the one prediction path, whoever serves it: scoring shards, live predictions, or the stock server.

Importing this loads torch (label_studio_ml does): only jobs import it, inside their functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from label_studio_ml.model import LabelStudioMLBase
from numpy.typing import NDArray
from sqlalchemy import Row

from strategies import late_utility
from strategies.diversity import near_duplicates_of_labelled
from strategies.late import DISAGREEMENT
from strategies.uncertainty import MEASURES
from worker.artifacts import round_key
from worker.boxes import LOWEST_THRESHOLD, LabelMap, to_regions
from worker.descriptor import DESCRIPTOR_NAME
from worker.detector import Detector, ImageScore, prepare_ultralytics
from worker.errors import BadRequest, ImageUnusable, LabelMismatch
from worker.label_studio import PENDING_VERSION, published_score
from worker.looking import AT_ONCE, FETCHERS, Look, Opened, look_at, opened_ahead
from worker.rounds import not_for_boxes, settings_of
from worker.scoring import holdout_embeddings, stored_predictions
from worker.services import Services, from_environment
from worker.settings import ProjectSettings
from worker.store import get_project, get_round, loads
from worker.uncertainty import measures_of, weights_of_classes


@dataclass(frozen=True)
class TaskScore:
    """What one forward pass says about one task. `problem`: why there is nothing."""

    task_id: int
    regions: list[dict[str, Any]] = field(default_factory=list)
    measures: Mapping[str, float] = field(default_factory=dict)
    embedding: NDArray[np.float32] | None = None
    problem: str | None = None
    disagreement: float | None = None  # of a committee


class Scorer:
    """One round's detector and what its boxes mean in one project; without weights, the descriptor."""

    def __init__(self, services: Services, project: Row[Any], round_row: Row[Any]) -> None:
        self.services = services
        self._project_id, self._round = int(project.id), round_row
        self.settings: ProjectSettings = settings_of(round_row)
        self.label_map = LabelMap.from_config(project.label_config, self.settings.shapes)
        self.detector = _load_detector(services, round_row.weights, round_row.weights_sha256)
        self.members = _load_members(services, round_row)
        self.embedder = round_row.weights_sha256 or DESCRIPTOR_NAME
        self.class_to_label = self._classes()

    @cached_property
    def holdout(self) -> NDArray[np.float32]:
        """(H, D): embeddings of the holdout, which does not change."""
        return holdout_embeddings(self.services, self._project_id, self._round)

    @cached_property
    def selection(self) -> tuple[dict[str, NDArray[Any]], Any]:
        """What the round's selection kept for tasks that come later."""
        return self.services.artifacts.get_arrays(selection_key(self._round))

    def _classes(self) -> dict[int, str]:
        if self.detector is None:
            return {}
        try:
            return self.label_map.classes_for(self.detector.names)
        except LabelMismatch:  # a pretrained detector of other things: good for embeddings, draws no boxes
            return {}

    def score(
        self, images: Sequence[tuple[int, str]], progress: Callable[[int], None] | None = None
    ) -> Iterator[TaskScore]:
        """Scores in the order of `images`, which are (task id, image reference) pairs.

        A broken image gives a TaskScore with its reason. Label Studio away: LabelStudioUnavailable, so that no image
        is taken for broken.
        """
        with ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") as pool:
            opened = opened_ahead(images, lambda image: self._open(*image), pool)
            looks = look_at(opened, self.detector, self.members, self.settings, self.confidence)
            for done, ((task_id, _), (look, disagreement)) in enumerate(zip(images, looks, strict=True), 1):
                yield self._task_score(task_id, look, disagreement)
                if progress is not None and (done % AT_ONCE == 0 or done == len(images)):
                    progress(done)

    def _open(self, task_id: int, reference: str) -> Opened:
        """The image, as the one detector will see it or as it is; or why there is none."""
        key = self.label_map.image_key
        try:
            image = self.services.images.open({key: reference}, key, task_id)
            if self.detector is None or self.members:  # each of a committee frames it for itself
                return image
            return self.detector.frame(image, self.settings.imgsz)
        except ImageUnusable as error:
            return error

    @property
    def confidence(self) -> float:
        """The lowest at which anything is drawn: a control's model_score_threshold wins over the setting."""
        return max(self.label_map.lowest_threshold(self.settings.confidence), LOWEST_THRESHOLD)

    @cached_property
    def _thresholds(self) -> dict[int, float]:
        """Class id of the detector -> confidence from which its label's boxes are drawn."""
        return {
            class_id: max(self.label_map.threshold_of(label, self.settings.confidence), LOWEST_THRESHOLD)
            for class_id, label in self.class_to_label.items()
        }

    def _task_score(self, task_id: int, look: Look, disagreement: float | None) -> TaskScore:
        if isinstance(look, ImageUnusable):
            return TaskScore(task_id, problem=str(look))
        if not isinstance(look, ImageScore):
            return TaskScore(task_id, measures=dict.fromkeys(MEASURES, 1.0), embedding=look)
        needed = [self._thresholds.get(int(class_id), 1.0) for class_id in look.class_ids]  # unknown: no region either
        drawn = look.confidences >= np.array(needed, dtype=np.float64)
        regions = to_regions(
            self.label_map,
            look.boxes_xyxy[drawn],
            look.confidences[drawn],
            look.class_ids[drawn],
            self.class_to_label,
            look.width,
            look.height,
        )
        measures = measures_of(look, self.settings, self.class_weights, self._chances_missed)
        return TaskScore(task_id, regions, measures, look.embedding, disagreement=disagreement)

    @cached_property
    def class_weights(self) -> NDArray[np.float64] | None:
        """By the labelled boxes that the round's detector was trained on."""
        if self.detector is None:
            return None
        labelled = loads(self._round.report).get("boxes_per_class", {})
        return weights_of_classes(self.settings, self.detector.names, labelled)

    @cached_property
    def _chances_missed(self) -> dict[str, float]:
        """As the round's detector was measured; empty: it never was."""
        return dict(loads(self._round.report).get("chances_missed") or {})


def _load_detector(services: Services, key: str | None, sha256: str | None) -> Detector | None:
    if key is None or sha256 is None:
        return None
    prepare_ultralytics(services.ultralytics_dir)
    return Detector.load(services.artifacts.local(key, sha256), services.settings.device, expected_sha256=sha256)


def _load_members(services: Services, round_row: Row[Any]) -> list[Detector]:
    """The other detectors of the round's committee.

    Raises:
        LabelMismatch: one was trained on other classes: its votes would be for something else.
    """
    recorded = loads(round_row.report).get("members", [])
    members = [_load_detector(services, one["weights"], one["sha256"]) for one in recorded]
    found = [member for member in members if member is not None]
    names = loads(round_row.report).get("names", {})
    wanted = {int(class_id): name for class_id, name in names.items()}
    for number, member in enumerate(found, start=1):
        if member.names != wanted:
            raise LabelMismatch(
                f"member {number} of the committee knows {list(member.names.values())}, not {list(wanted.values())}: "
                "labels were changed while the committee was trained. Start a round"
            )
    return found


class ScorerCache:
    """The scorers this process used last, so that the model stays loaded. Another label config makes another scorer."""

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._scorers: dict[tuple[Any, ...], Scorer] = {}

    def get(self, services: Services, project: Row[Any], round_row: Row[Any]) -> Scorer:
        key = (
            *(services.settings.store_url, project.id, round_row.id, round_row.opened_at),
            *(round_row.weights_sha256, project.label_config, round_row.settings),
        )
        with self._lock:
            scorer = self._scorers.pop(key, None) or Scorer(services, project, round_row)
            self._scorers[key] = scorer
            while len(self._scorers) > self._size:
                self._scorers.pop(next(iter(self._scorers)))
        return scorer


SCORERS = ScorerCache()


class HardfirstModel(LabelStudioMLBase):  # type: ignore[misc]  # label_studio_ml is untyped
    """The model behind every prediction. The stock label-studio-ml server can serve it too; training is the loop's.

    The project is taken from the tasks, as in label-studio-ml 1.0.9.
    """

    def __init__(
        self,
        label_config: str | None = None,
        train_output: Mapping[str, Any] | None = None,
        services: Services | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(label_config=label_config, train_output=train_output, **kwargs)
        self.services = services or from_environment("worker")

    def predict(self, tasks: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[dict[str, Any]]:
        """One prediction per task, of the version that is published: the stored one where there is one.

        Args:
            tasks: Label Studio's tasks: id, project, data.

        Returns:
            per task {"result": regions, "score": published_score, "model_version"}, with "problem" where there is one.

        Raises:
            BadRequest: tasks of several projects, or none named.
            NotFound: the project is not connected.
        """
        if not tasks:
            return []
        project_id = _project_of(tasks)
        with self.services.store.read() as connection:
            project = get_project(connection, project_id)
        return self.predict_and_score(project, tasks)[0]

    def predict_and_score(
        self, project: Row[Any], tasks: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[LateScore]]:
        """`predict`, and the scores of the tasks that had none stored."""
        if project.published_round_id is None:
            waiting = {"result": [], "score": 1.0, "model_version": PENDING_VERSION}
            return [{**waiting, "problem": "the first batch is not published yet"} for _ in tasks], []
        ids = [int(task["id"]) for task in tasks]
        with self.services.store.read() as connection:
            known = stored_predictions(connection, project, ids)
            round_row = get_round(connection, project.published_round_id)
            held = not_for_boxes(connection, project.id, ids)
        late = self._score(project, round_row, [task for task in tasks if int(task["id"]) not in known])
        answers = known | {one.score.task_id: _answer(one, project, held) for one in late}
        return [answers[task_id] for task_id in ids], late

    def _score(self, project: Row[Any], round_row: Row[Any], tasks: Sequence[Mapping[str, Any]]) -> list[LateScore]:
        if not tasks:
            return []
        scorer = SCORERS.get(self.services, project, round_row)
        key = scorer.label_map.image_key
        images = [(int(task["id"]), str((task.get("data") or {}).get(key) or "")) for task in tasks]
        found = list(scorer.score(images))
        utilities = late_utilities(scorer, found)
        twins = _twins(scorer, found)
        return [
            LateScore(score, 0.0 if twin else utility, twin)
            for score, utility, twin in zip(found, utilities, twins, strict=True)
        ]


@dataclass(frozen=True)
class LateScore:
    """A task scored after its round's selection."""

    score: TaskScore
    utility: float
    twin: bool  # of a holdout image


def _twins(scorer: Scorer, found: Sequence[TaskScore]) -> list[bool]:
    """Which of these look like an image of the holdout, and so must not be trained on."""
    usable = [score.embedding for score in found if score.embedding is not None]
    if not usable or not len(scorer.holdout):
        return [False for _ in found]
    threshold = scorer.settings.near_duplicate_threshold
    alike = iter(near_duplicates_of_labelled(np.stack(usable), scorer.holdout, threshold))
    return [score.embedding is not None and bool(next(alike)) for score in found]


def late_utilities(scorer: Scorer, scores: Sequence[TaskScore]) -> list[float]:
    """Utilities of tasks scored after the round's selection, on the scale that selection kept. No score: 0."""
    usable = [score for score in scores if score.embedding is not None]
    if not usable:
        return [0.0 for _ in scores]
    kept, note = scorer.selection
    late = {**note["late"], **kept}
    if not late:  # the pool was empty: there is nothing to compare with, and every new task is welcome
        return [0.0 if score.embedding is None else 1.0 for score in scores]
    uncertainty = {name: np.array([score.measures[name] for score in usable]) for name in MEASURES}
    if scorer.members:
        uncertainty[DISAGREEMENT] = np.array([score.disagreement or 0.0 for score in usable])
    embeddings = np.stack([score.embedding for score in usable if score.embedding is not None])
    values = late_utility(note["strategy"], late, uncertainty, embeddings, note["options"])
    found = {score.task_id: float(value) for score, value in zip(usable, values, strict=True)}
    return [found.get(score.task_id, 0.0) for score in scores]


def selection_key(round_row: Row[Any]) -> str:
    return round_key(round_row.project_id, round_row.number, "selection.npz")


def _answer(one: LateScore, project: Row[Any], held: set[int]) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "result": [] if one.score.task_id in held else one.score.regions,
        "score": published_score(None, one.utility, 1),
        "model_version": str(project.published_version),
    }
    return answer if one.score.problem is None else {**answer, "problem": one.score.problem}


def _project_of(tasks: Sequence[Mapping[str, Any]]) -> int:
    projects_named = {task.get("project") for task in tasks}
    if len(projects_named) != 1 or not isinstance(next(iter(projects_named)), int):
        raise BadRequest(f"the tasks name the projects {sorted(map(str, projects_named))}; exactly one is needed")
    return int(next(iter(projects_named)))  # type: ignore[arg-type]
