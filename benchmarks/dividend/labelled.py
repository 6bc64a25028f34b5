"""What the strategies had labelled, and what that taught: of the arms and seeds of a table that were played to the end.

    scripts/py -m benchmarks.dividend.labelled --pool foda --data foda/data.yaml --weights W --out /tmp/foda

Reads results.json beside this file, the images, and what the simulation in --out kept of each measurement. The labels
of the pool are used for these tables only; no strategy sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.dividend import PICTURED, STAGES, keep_tables, markdown, side_by_side, views
from benchmarks.dividend.diagnosis import parser_of, plan_of
from worker.evaluation import EvaluationArrays
from worker.simulate import Bench
from worker.simulation_results import rounds_of
from worker.simulation_world import Picture, World, count_alike

SIZES = ("small", "medium", "large")
SURE = 0.1  # confidence from which on a box counts as found: where the default's uncertainty begins

Row = dict[str, Any]
Arrays = Callable[[str], EvaluationArrays]  # by the key of a measurement


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("labelled", __doc__)
    parser.set_defaults(arms="random")  # of the plan: the images are the same for all
    parser.add_argument("--stage", choices=tuple(STAGES), default=PICTURED, help="whose arms and seeds (%(default)s)")
    given = parser.parse_args(arguments)
    found = [results for pool, stage, results in views() if (pool, stage) == (given.pool, given.stage)]
    if not found:
        raise SystemExit(f"nothing of {given.pool}/{given.stage} is played to the end: benchmarks.dividend --play")
    bench = Bench(plan_of(given))
    rounds = tables_of(found[0], bench.world, bench.arrays)
    print(*markdown(side_by_side(rounds)), sep="\n")
    if given.keep:
        keep_tables("labelled", given.pool, {labels: {"labelled": rows} for labels, rows in rounds.items()})
    return 0


def tables_of(results: Row, world: World, arrays: Arrays) -> dict[str, list[Row]]:
    """Number of labels -> a row per arm, after the first batch and after the last."""
    first, last = 1, results["data"]["rounds"]
    budgets = {number: results["runs"][0]["rounds"][number]["labels"] for number in (first, last)}
    return {str(labels): labelled(results, number, world, arrays) for number, labels in budgets.items()}


def labelled(results: Row, number: int, world: World, arrays: Arrays) -> list[Row]:
    """A row per arm, means over its seeds, in percent.

    Of the pool: what is labelled or looks like an image that is. Of an image: the median size of the labelled objects.
    Of the objects in the third of the holdout's images whose objects are smallest, and so on: what is found at IoU .5.
    """
    by_name = {picture.name: row for row, picture in enumerate(world.pool)}
    thirds = thirds_by_size(world.holdout)
    rows = []
    for arm in results["arms"]:
        seeds = list(rounds_of(results, arm["label"]).values())
        sets = [[by_name[name] for one in rounds[: number + 1] for name in one["batch"]["images"]] for rounds in seeds]
        found = [found_by_third(arrays(rounds[number]["evaluation"]), thirds) for rounds in seeds]
        by_size = zip(SIZES, zip(*found, strict=True), strict=True)
        rows.append(
            {
                "arm": arm["label"],
                "pool covered": _percent([covered(world.descriptors, rows_of) for rows_of in sets], 0),
                "object": _percent([_median_size([world.pool[row] for row in rows_of]) for rows_of in sets], 1),
                **{f"{size} found": _percent(shares, 0) for size, shares in by_size},
            }
        )
    return rows


def covered(descriptors: NDArray[np.float32], rows: Sequence[int]) -> float:
    """Share of all that one of these rows is, or looks like."""
    return count_alike(descriptors, descriptors[list(rows)]) / len(descriptors)


def thirds_by_size(holdout: Sequence[Picture]) -> Mapping[int, int]:
    """Task id -> 0, 1, 2: small, medium, large, by the median size of its objects. Images without any are left out."""
    sizes = {picture.task_id: _median_size([picture]) for picture in holdout if len(picture.truth.class_ids)}
    edges = np.quantile(list(sizes.values()), (1 / 3, 2 / 3))
    return {task_id: int(np.searchsorted(edges, size)) for task_id, size in sizes.items()}


def found_by_third(arrays: EvaluationArrays, thirds: Mapping[int, int]) -> tuple[float, ...]:
    """Share of the objects that are found, of each third of the images."""
    third = np.array([thirds.get(int(key), -1) for key in arrays.keys])
    right = arrays.tp[:, 0] & (arrays.conf >= SURE)
    hits = np.bincount(third[arrays.pred_img[right]] + 1, minlength=len(SIZES) + 1)
    objects = np.bincount(third[arrays.target_img] + 1, minlength=len(SIZES) + 1)
    return tuple(float(share) for share in hits[1:] / np.maximum(objects[1:], 1))


def _median_size(pictures: Sequence[Picture]) -> float:
    """Of all their objects: share of the image's area."""
    return float(np.median(np.concatenate([picture.truth.boxes_yolo[:, 2:].prod(axis=1) for picture in pictures])))


def _percent(shares: Sequence[float], digits: int) -> str:
    return f"{100 * float(np.mean(shares)):.{digits}f}"


if __name__ == "__main__":
    main()
