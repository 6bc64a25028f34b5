"""What the next batch is: the holdout and a diverse seed first, then what the project's strategy picks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies import STRATEGIES
from strategies.diversity import near_duplicate_groups, near_duplicates_of_labelled
from strategies.pool import Pool, Selection
from worker.settings import ProjectSettings

Vector = NDArray[np.float64]
Matrix = NDArray[np.float32]
TaskIds = NDArray[np.int64]

FIRST_STRATEGY = "coverage"  # representative, where core-set would ask for the outliers first


@dataclass(frozen=True)
class ScoredTasks:
    """Scored images: task_ids (N,), embeddings (N, D), uncertainty per measure and a committee's disagreement (N,)."""

    task_ids: TaskIds
    embeddings: Matrix
    uncertainty: Mapping[str, Vector]
    disagreement: Vector | None = None

    def rows(self, chosen: NDArray[np.bool_]) -> ScoredTasks:
        measures = {name: values[chosen] for name, values in self.uncertainty.items()}
        disagreement = None if self.disagreement is None else self.disagreement[chosen]
        return ScoredTasks(self.task_ids[chosen], self.embeddings[chosen], measures, disagreement)


@dataclass(frozen=True)
class Batch:
    """The next batch: task ids in the order they are to be served, and the utility of every pool task.

    `late` with `late_arrays` gives a utility to tasks that are scored later; `notes` are sentences for the page;
    `alike` names the pool tasks that look like one of the batch and are not in it.
    """

    task_ids: list[int]
    utilities: dict[int, float]
    parts: dict[int, dict[str, float]]
    strategy: str
    options: dict[str, Any]
    late: dict[str, float] = field(default_factory=dict)
    late_arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    alike: dict[int, list[int]] = field(default_factory=dict)


def generator(settings: ProjectSettings, project_id: int, round_number: int, purpose: str) -> np.random.Generator:
    """The random numbers of one choice: the same whoever makes it, and however often."""
    return np.random.default_rng([settings.seed, project_id, round_number, *purpose.encode()])


def draw_holdout(
    tasks: ScoredTasks,
    labelled: NDArray[np.bool_],
    size: int,
    threshold: float,
    rng: np.random.Generator,
) -> tuple[set[int], list[str]]:
    """Task ids of the holdout: drawn at random by near-duplicate group, so that no burst is split.

    Labelled tasks come first, up to half of them; the rest is drawn from the others. A burst of more than `size` is
    left to training as a whole, unless most images are in such: the embedding then finds everything alike.

    Args:
        tasks: all tasks with an image.
        labelled: (N,) has an annotation already.
        size: holdout tasks wanted.
        threshold: cosine above which two images are near-duplicates.

    Returns:
        the ids (about `size`: a whole group is never split to hit it), and notes for the page.
    """
    if size <= 0 or not len(tasks.task_ids):
        return set(), []
    groups = near_duplicate_groups(tasks.embeddings, threshold)
    notes = []
    sizes = np.bincount(groups)
    largest = int(sizes.max())
    if 2 * int(sizes[sizes > size].sum()) > len(groups):
        groups = np.arange(len(groups))
        notes.append(
            f"{largest} images look alike to the embedding at hand, more than the holdout holds: "
            "it was drawn image by image, and bursts may be split"
        )
    members = _members(groups)
    order = rng.permutation(len(members))
    chosen: set[int] = set()
    wanted_labelled = min(size, int(labelled.sum()) // 2)
    taken = 0
    for index in order:  # groups with labels first
        count = int(labelled[members[index]].sum())
        if count and taken + count <= wanted_labelled and len(chosen) + len(members[index]) <= size:
            chosen.update(members[index].tolist())
            taken += count
    for index in order:
        group = members[index]
        if not labelled[group].any() and len(chosen) + len(group) <= size:
            chosen.update(group.tolist())
    return {int(tasks.task_ids[position]) for position in chosen}, notes


def _members(groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1])


def first_batch(
    pool: ScoredTasks,
    labelled: ScoredTasks,
    holdout_left: Sequence[int],
    settings: ProjectSettings,
    project_id: int,
    untrained: ScoredTasks | None = None,
) -> Batch:
    """Holdout and a diverse seed, interleaved. A project set to `random` gets a random seed: an honest comparison.

    Args: labelled, untrained: as of `next_batch`.
    """
    strategy = "random" if settings.strategy == "random" else FIRST_STRATEGY
    rng = generator(settings, project_id, 0, "seed")
    return _batch(pool, labelled, untrained, holdout_left, settings, strategy, {}, rng)


def next_batch(
    pool: ScoredTasks,
    labelled: ScoredTasks,
    holdout_left: Sequence[int],
    settings: ProjectSettings,
    project_id: int,
    round_number: int,
    untrained: ScoredTasks | None = None,
) -> Batch:
    """What the project's strategy picks, and what is left of the holdout, interleaved.

    Args:
        labelled: what is trained on: strategies measure how far an image is from these.
        untrained: the holdout, and what is labelled but never trained on. Their near-duplicates are left out as those
            of `labelled` are, but the detector learns nothing from them: what lies near them is still to be learned.
    """
    rng = generator(settings, project_id, round_number, "select")
    options = dict(settings.strategy_options)
    return _batch(pool, labelled, untrained, holdout_left, settings, settings.strategy, options, rng)


def _batch(
    pool: ScoredTasks,
    labelled: ScoredTasks,
    untrained: ScoredTasks | None,
    holdout_left: Sequence[int],
    settings: ProjectSettings,
    strategy: str,
    options: dict[str, Any],
    rng: np.random.Generator,
) -> Batch:
    if not len(pool.task_ids):
        return Batch(list(holdout_left), {}, {}, strategy, options, notes=["the pool is empty"])
    threshold = settings.near_duplicate_threshold
    asked = [one.embeddings for one in (labelled, untrained) if one is not None and len(one.task_ids)]
    built = Pool.build(
        keys=pool.task_ids,
        uncertainty=pool.uncertainty,
        embeddings=pool.embeddings,
        labelled_embeddings=labelled.embeddings if len(labelled.task_ids) else None,
        disagreement=pool.disagreement,
        duplicate_groups=near_duplicate_groups(pool.embeddings, threshold),
        duplicates_of_labelled=(
            near_duplicates_of_labelled(pool.embeddings, np.concatenate(asked), threshold) if asked else None
        ),
    )
    selection = STRATEGIES[strategy](built, settings.batch_size, rng, options)
    return _as_batch(built, selection, holdout_left, strategy, options)


def _as_batch(
    pool: Pool, selection: Selection, holdout_left: Sequence[int], strategy: str, options: dict[str, Any]
) -> Batch:
    keys = [int(key) for key in pool.keys]
    picked = [keys[position] for position in selection.positions]
    parts = {
        key: {name: float(values[row]) for name, values in selection.parts.items()} for row, key in enumerate(keys)
    }
    late = {name: float(value) for name, value in selection.late.items() if np.ndim(value) == 0}
    arrays = {name: np.asarray(value) for name, value in selection.late.items() if np.ndim(value) > 0}
    utilities = {key: float(value) for key, value in zip(keys, selection.utilities, strict=True)}
    order = interleave(picked, list(holdout_left))
    alike = look_alikes(pool, selection.positions)
    return Batch(order, utilities, parts, strategy, options, late, arrays, alike=alike)


def look_alikes(pool: Pool, positions: NDArray[np.int64]) -> dict[int, list[int]]:
    """Key of a chosen row -> keys of its near-duplicates that were not chosen. Of two alike the first has them."""
    groups = pool.duplicate_groups
    if groups is None or not len(positions):
        return {}
    sizes = np.bincount(groups)
    chosen = np.zeros(len(groups), dtype=bool)
    chosen[positions] = True
    found: dict[int, list[int]] = {}
    told: set[int] = set()
    for position in positions:
        group = int(groups[position])
        if sizes[group] > 1 and group not in told:
            told.add(group)
            others = np.flatnonzero((groups == group) & ~chosen)
            if len(others):
                found[int(pool.keys[position])] = [int(key) for key in pool.keys[others]]
    return found


def interleave(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Both sequences in their own order, spread evenly over the whole: a batch left half done has its share of each."""
    places = [((index + 0.5) / len(first), 0, value) for index, value in enumerate(first)]
    places += [((index + 0.5) / len(second), 1, value) for index, value in enumerate(second)]
    return [value for _, _, value in sorted(places)]
