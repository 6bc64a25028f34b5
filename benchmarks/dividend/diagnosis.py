"""Why a strategy wins or loses: what its uncertainty and its distances really say, on a simulation that was played.

    scripts/py -m benchmarks.dividend.diagnosis --pool foda --data foda/data.yaml --weights W --out /tmp/foda

Not while that simulation is played: both use its work folder.

For the detectors of `random`'s first rounds: how each reading of uncertainty ranks the images that it gets wrong, in
which embedding look-alikes are near, and what each strategy would choose next. The labels of the pool are used for
these tables only; no strategy sees them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.dividend import POOLS, keep_tables, markdown
from strategies.diversity import unit_rows
from strategies.whitening import fit_whitening
from worker.arms import parse_arms
from worker.boxes import yolo_to_xyxy
from worker.detector import Detector, ImageScore
from worker.evaluation import EvaluationArrays, box_iou
from worker.images import decode_image
from worker.selection import ScoredTasks, next_batch
from worker.settings import ProjectSettings, parse_project_settings
from worker.simulate import Bench, Plan, Step, Training, usable
from worker.simulation_results import rare_classes
from worker.simulation_world import LOOK_ALIKE, Picture, World
from worker.uncertainty import chances_missed, measures_of, weights_of_classes
from worker.work import MEASURES

Vector = NDArray[np.float64]
Row = dict[str, Any]

CLASSIC = {
    "uncertainty_threshold": 0.25,
    "uncertainty_empty": "uncertain",
    "uncertainty_aggregate": "max",
    "class_weights": False,
}
# What is compared, by the project settings that give it. The first is the rule of the textbooks.
READINGS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("least_confidence", CLASSIC),
    ("least_confidence", {**CLASSIC, "uncertainty_empty": "best_candidate"}),
    ("least_confidence", {**CLASSIC, "uncertainty_threshold": 0.05, "uncertainty_empty": "best_candidate"}),
    *(
        (
            measure,
            {
                "uncertainty_threshold": threshold,
                "uncertainty_empty": empty,
                "uncertainty_aggregate": aggregate,
                "class_weights": weights,
            },
        )
        for measure, threshold, empty, aggregate, weights in (
            ("least_confidence", 0.05, "best_candidate", "mean", False),
            ("least_confidence", 0.05, "best_candidate", "mean", True),
            ("least_confidence", 0.05, "best_candidate", "sum", True),
            ("least_confidence", 0.1, "best_candidate", "open", True),
            ("least_confidence", 0.1, "calibrated", "open", True),
            ("margin", 0.05, "best_candidate", "max", False),
            ("entropy", 0.05, "best_candidate", "max", False),
            ("entropy", 0.05, "best_candidate", "sum", True),
        )
    ),
)
ARMS = "random,least_confidence,entropy,hybrid,k_center,hybrid_k_center,hybrid_coverage"
TOP = 100  # images at the top of a reading that are looked at


@dataclass(frozen=True)
class Seen:
    """What the detector of a round says of the pool, and the truth about it. All (N,), in the pool's order."""

    looks: list[ImageScore]
    labelled: NDArray[np.bool_]
    missed: Vector  # share of an image's objects without a box; of an image without objects: whether it has a box
    rare: NDArray[np.bool_]
    boxes_per_class: Mapping[str, int]
    names: Mapping[int, str]
    holdout: EvaluationArrays

    @property
    def embeddings(self) -> NDArray[np.float32]:
        return np.stack([look.embedding for look in self.looks])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("diagnosis", __doc__)
    parser.add_argument("--rounds", default="0,1", help="whose detectors (%(default)s); trained again where forgotten")
    parser.add_argument("--arms", default=ARMS, help="whose choice is shown (%(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line: what the tables are made of")
    given = parser.parse_args(arguments)
    bench = Bench(plan_of(given))
    found = {}
    for number in map(int, given.rounds.split(",")):
        seen = look_at(bench, number)
        tables = {
            "readings": readings(seen, bench.plan.common),
            "embeddings": embeddings(seen, bench.world),
            "batches": batches(bench, seen, number),
        }
        for name, rows in tables.items():
            print(f"\n{given.pool}, {int(seen.labelled.sum())} labelled: {name}", *markdown(rows), sep="\n", flush=True)
        found[str(int(seen.labelled.sum()))] = tables
    if given.keep:
        keep_tables("diagnosis", given.pool, found)
    if given.json:
        print(json.dumps(found))
    return 0


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """What a module that reads a played simulation is told; `plan_of` needs `arms`, too."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.dividend.{module}", description=(doc or "").splitlines()[0])
    parser.add_argument("--pool", choices=tuple(POOLS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="data.yaml of the pool")
    parser.add_argument("--weights", required=True, help="base weights, as they were played")
    parser.add_argument("--out", type=Path, required=True, help="folder of the simulation; `random` is played by then")
    parser.add_argument("--keep", action="store_true", help="put what the tables are made of beside this file")
    return parser


def plan_of(given: argparse.Namespace) -> Plan:
    """The simulation as `benchmarks.dividend` plays it."""
    options = dict(word.removeprefix("--").split("=", 1) for word in POOLS[given.pool] if not word.startswith("--set="))
    common = dict(word.removeprefix("--set=").split("=", 1) for word in POOLS[given.pool] if word.startswith("--set="))
    sizes = {name.replace("-", "_"): int(options.pop(name)) for name in ("seed-size", "batch-size", "rounds")}
    common |= {name.replace("-", "_"): value for name, value in options.items()}
    typed = {name: json.loads(value) if value[0].isdigit() else value for name, value in common.items()}
    arms = tuple(parse_arms(given.arms))
    typed["weights"] = given.weights
    return Plan(given.data, given.out.resolve(), arms, (0,), common=typed, **sizes)


def look_at(bench: Bench, number: int) -> Seen:
    """The pool, as the detector of `random` after this round sees it."""
    at = bench.at(Step("random", 0, number))
    if at is None:
        raise SystemExit(f"round {number} of random is not played in {bench.plan.out}: run benchmarks.dividend --play")
    training, _, oracle = at
    training.evaluation()
    detector = Detector.load(training.weights(), threads=1, backend="torch")
    pool = bench.world.pool
    images = (decode_image(picture.path.read_bytes()) for picture in pool)
    settings = training.settings
    looks = [usable(look) for look in detector.score_each(images, settings.imgsz, settings.confidence, 0.05)]
    rare = {bench.world.names.index(name) for name in rare_classes(bench.world, ())}
    return Seen(
        looks=looks,
        labelled=np.isin([picture.task_id for picture in pool], oracle.asked),
        missed=np.array([missed(picture, look) for picture, look in zip(pool, looks, strict=True)]),
        rare=np.array([bool(rare & set(picture.truth.class_ids.tolist())) for picture in pool]),
        boxes_per_class=_boxes_per_class(training),
        names=detector.names,
        holdout=bench.arrays(training.evaluation_key),
    )


def missed(picture: Picture, look: ImageScore) -> float:
    """Share of the objects that no drawn box of their class covers to a half; without objects: whether one is drawn."""
    truth = picture.truth
    if not len(truth.class_ids):
        return float(look.drawn > 0)
    boxes = yolo_to_xyxy(truth.boxes_yolo, look.width, look.height)
    same = look.class_ids[: look.drawn, None] == truth.class_ids[None, :]
    hit = (box_iou(look.boxes_xyxy[: look.drawn], boxes) >= 0.5) & same
    return float(1 - hit.any(axis=0).mean()) if look.drawn else 1.0


def _boxes_per_class(training: Training) -> Mapping[str, int]:
    names = training.bench.world.names
    class_ids = np.concatenate([picture.truth.class_ids for picture in training.labelled])
    return dict(zip(names, np.bincount(class_ids, minlength=len(names)).tolist(), strict=True))


# --- tables ---------------------------------------------------------------------------------------------------------


def readings(seen: Seen, common: Mapping[str, Any]) -> list[Row]:
    """How each reading of uncertainty ranks the unlabelled images.

    Spearman's correlation with the share of objects missed; how many share the highest value; what is missed of the
    TOP images, and how many of those hold a rare class.
    """
    rows = []
    pool = ~seen.labelled
    for measure, chosen in READINGS:
        settings = parse_project_settings({**common, **chosen})
        values = uncertainty(seen, settings)[measure][pool]
        top = np.argsort(-values, kind="stable")[:TOP]
        rows.append(
            {
                "reading": " ".join([measure, *(_word(value) for value in chosen.values())]),
                "rank correlation": _rank_correlation(values, seen.missed[pool]),
                "ties": int((values >= values.max() - 1e-9).sum()),
                "missed": round(float(seen.missed[pool][top].mean()), 2),
                "rare": int(seen.rare[pool][top].sum()),
            }
        )
    return rows


def _rank_correlation(values: Vector, others: Vector) -> float | None:
    """Spearman's; None where one of them is constant, as before anything was learned."""
    if not np.ptp(values) or not np.ptp(others):
        return None
    return round(float(spearmanr(values, others)[0]), 2)


def uncertainty(seen: Seen, settings: ProjectSettings) -> dict[str, Vector]:
    """Measure -> (N,), as production reads them."""
    weights = weights_of_classes(settings, seen.names, seen.boxes_per_class)
    chances = chances_missed(seen.holdout, settings)
    found = [measures_of(look, settings, weights, chances) for look in seen.looks]
    return {name: np.array([one[name] for one in found]) for name in MEASURES}


def _word(value: object) -> str:
    return {True: "weighted", False: "unweighted"}[value] if isinstance(value, bool) else str(value)


def embeddings(seen: Seen, world: World) -> list[Row]:
    """In which space look-alikes (by the descriptor, which no strategy sees) are near, and others are not.

    Share of images with a look-alike whose nearest image is one; the cosine that nine of ten pairs of look-alikes
    exceed; the cosine that one of a hundred other pairs exceeds.
    """
    alike = world.descriptors @ world.descriptors.T > LOOK_ALIKE
    np.fill_diagonal(alike, False)
    rows = []
    for name, vectors in _spaces(seen.embeddings):
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -2)
        have = alike.any(axis=1)
        nearest = alike[np.arange(len(alike)), cosines.argmax(axis=1)]
        pairs, others = cosines[alike], cosines[~alike & ~np.eye(len(alike), dtype=bool)]
        rows.append(
            {
                "embedding": name,
                "nearest": round(float(nearest[have].mean()), 3),
                "look-alikes": round(float(np.quantile(pairs, 0.1)), 2),
                "others": round(float(np.quantile(others, 0.99)), 2),
            }
        )
    return rows


def _spaces(vectors: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield "as it is", unit_rows(vectors)
    yield "centred", unit_rows(vectors - vectors.mean(axis=0))
    yield "whitened", fit_whitening(vectors).apply(vectors)


def batches(bench: Bench, seen: Seen, number: int) -> list[Row]:
    """What each arm would choose after this round of `random`.

    Look-alikes of what is labelled or earlier in the batch; share of objects missed; images with a rare class; classes
    in an image, on the mean.
    """
    rows = []
    world, ids = bench.world, np.array([picture.task_id for picture in bench.world.pool])
    labelled = ids[seen.labelled].tolist()
    for arm in bench.plan.arms:
        settings = bench.plan.settings(arm, 0)
        if settings.committee_size:
            continue  # its other detectors were never trained on these labels
        scored = ScoredTasks(ids, seen.embeddings, uncertainty(seen, settings))
        batch = next_batch(scored.rows(~seen.labelled), scored.rows(seen.labelled), [], settings, arm.draw, number)
        chosen = np.isin(ids, batch.task_ids)
        counts = np.array([len(np.unique(world.by_id[task_id].truth.class_ids)) for task_id in batch.task_ids])
        rows.append(
            {
                "arm": arm.label,
                "look-alikes": len(world.alike(batch.task_ids, labelled)),
                "missed": round(float(seen.missed[chosen].mean()), 2),
                "rare": int(seen.rare[chosen].sum()),
                "classes": round(float(counts.mean()), 2),
            }
        )
    return rows


if __name__ == "__main__":
    main()
