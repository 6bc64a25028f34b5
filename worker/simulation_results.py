"""What a simulation found, as numbers: every round of every arm and seed, and arms compared with random.

Intervals are of 95 %, and of two kinds for two sources of noise: over seeds (Student's t of paired differences: seed
sets, draws and trainings vary, the holdout is the same), and over the holdout (a paired bootstrap of its images: the
models are the same).
"""

from __future__ import annotations

import math
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from strategies.options import validate_options
from worker.arms import Arm
from worker.composition import contents, mean_ap50, rare_names
from worker.evaluation import EvaluationArrays, bootstrap_map50
from worker.simulate import MADE_BY, Bench, Plan, Step
from worker.simulation_world import World
from worker.uncertainty import said_in_full

LEVEL = 0.95
SAMPLES = 500  # of the holdout's images
PACKAGES = sorted({name for names in MADE_BY.values() for name in names})

Json = dict[str, Any]
Vector = NDArray[np.float64]


# --- what was played ------------------------------------------------------------------------------------------------


def collect(bench: Bench, failures: Mapping[str, str]) -> Json:
    """Everything that is done by now, as `results.json` holds it, without comparisons."""
    plan, world = bench.plan, bench.world
    rare = rare_classes(world, plan.rare)
    runs = [_run(bench, arm, seed, rare) for arm in plan.arms for seed in plan.seeds]
    return {
        "command": plan.command,
        "complete": all(len(run["rounds"]) == plan.rounds + 1 for run in runs),
        "failures": dict(failures),
        "versions": {
            **{name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": sys.platform,
        },
        "data": _data(bench, rare),
        "settings": {arm.label: _settings(plan, arm) for arm in plan.arms},
        "arms": [_arm(plan, arm) for arm in plan.arms],
        "runs": runs,
    }


def rare_classes(world: World, named: Sequence[str]) -> list[str]:
    if named:
        return list(named)
    images = len(world.pool) + len(world.holdout)
    return rare_names(world.images_per_class, images)


def _data(bench: Bench, rare: Sequence[str]) -> Json:
    world, plan = bench.world, bench.plan
    return {
        "data": str(plan.data),
        "classes": list(world.names),
        "rare": list(rare),
        "pool_images": len(world.pool),
        "holdout_images": len(world.holdout),
        "images_per_class": world.images_per_class,
        "pool_like_holdout": world.holdout_alike,
        "notes": [*world.notes, *_notes_on_pool(plan, len(world.pool))],
        "seed_set": plan.seed_set,
        "seed_size": plan.seed_size,
        "batch_size": plan.batch_size,
        "rounds": plan.rounds,
        "seeds": list(plan.seeds),
        "seconds_per_image": plan.seconds_per_image,
        "seconds_per_box": plan.seconds_per_box,
        "base_weights": bench.base_weights(plan.settings(plan.arms[0], plan.seeds[0]))[0].path,
    }


def _notes_on_pool(plan: Plan, pool: int) -> list[str]:
    """Whether there is anything left to choose from in each round."""
    batches = math.ceil((pool - plan.seed_size) / plan.batch_size)
    if batches > plan.rounds:
        return []
    return [f"Batch {batches} takes the rest of the pool of {pool}: from then on all arms have the same labels."]


def _settings(plan: Plan, arm: Arm) -> Json:
    found = plan.settings(arm, plan.seeds[0]).model_dump(mode="json")
    return {name: value for name, value in found.items() if name != "seed"}


def _arm(plan: Plan, arm: Arm) -> Json:
    """`options` and `overrides` as they were given, `played` with what they leave to defaults, which may change."""
    return {
        "label": arm.label,
        "strategy": arm.strategy,
        "draw": arm.draw,
        "options": dict(arm.options),
        "overrides": dict(arm.overrides),
        "played": {
            "options": validate_options(arm.strategy, arm.options),
            "reading": said_in_full(plan.settings(arm, plan.seeds[0])),
        },
    }


def _run(bench: Bench, arm: Arm, seed: int, rare: Sequence[str]) -> Json:
    rounds: list[Json] = []
    before: Json | None = None
    for number in range(bench.plan.rounds + 1):
        record = bench.known(Step(arm.label, seed, number))
        if record is None:
            break
        rounds.append(_round(bench, record, before, rare))
        before = record
    return {"arm": arm.label, "seed": seed, "rounds": rounds}


def _round(bench: Bench, record: Json, before: Json | None, rare: Sequence[str]) -> Json:
    plan, trained, measured = bench.plan, record["trained"], record["measured"]
    labels, boxes = len(trained["images"]), trained["n_boxes"]
    chosen = record["next_batch"]
    return {
        "round": record["round"],
        "labels": labels,
        "boxes": boxes,
        "minutes": round((labels * plan.seconds_per_image + boxes * plan.seconds_per_box) / 60, 2),
        "map50": measured["map50"],
        "map50_95": measured["map50_95"],
        "rare_ap50": mean_ap50(measured["ap50"], rare),
        "ap50": measured["ap50"],
        "ap50_95": measured["ap50_95"],
        "batch": _batch(bench.world, record["labelled"], before, rare),
        "seconds": {
            "training": trained["seconds"],
            "measuring": measured["seconds"],
            "scoring": chosen.get("seconds_scoring", 0.0),
            "choosing": chosen.get("seconds_choosing", 0.0),
        },
        "note": trained["note"],
        "evaluation": record["evaluation"],
    }


def _batch(world: World, labelled: Sequence[int], before: Json | None, rare: Sequence[str]) -> Json:
    """What was labelled last: the seed set in round 0, else what the arm chose after the round before."""
    earlier = before["labelled"] if before else []
    chosen = before["next_batch"] if before else {}
    pictures = [world.by_id[task_id] for task_id in labelled[len(earlier) :]]
    counts = [Counter(world.names[class_id] for class_id in picture.truth.class_ids) for picture in pictures]
    alike = world.alike([picture.task_id for picture in pictures], earlier)
    return {
        "images": [picture.name for picture in pictures],
        **contents(counts, rare),
        "near_duplicates": [world.by_id[task_id].name for task_id in alike],
        "tied": chosen.get("tied"),
        "utilities": chosen.get("utilities", []),
        "notes": chosen.get("notes", []),
    }


# --- comparisons ----------------------------------------------------------------------------------------------------


def compare(results: Json, arrays: Callable[[str], EvaluationArrays] | None) -> Json:
    """Curves, areas, paired differences and labels saved.

    Args: arrays: evaluation key -> what it kept of each image; None: it is gone, and no interval over the holdout's
        images can be given.
    """
    labels = [arm["label"] for arm in results["arms"]]
    baseline = "random" if "random" in labels else labels[0]
    samples = {} if arrays is None else _samples(results, arrays)
    return {
        "baseline": baseline,
        "noise_arms": other_draws(results["arms"], baseline),
        "curves": {label: {x: curve(results, label, x) for x in ("labels", "boxes", "minutes")} for label in labels},
        "rare_curves": {label: curve(results, label, "labels", "rare_ap50") for label in labels},
        "areas": {label: area_gain(results, label, baseline) for label in labels},
        "differences": {
            label: differences(results, label, baseline, samples) for label in labels if label != baseline
        },
        "rare_differences": {
            label: differences(results, label, baseline, {}, "rare_ap50") for label in labels if label != baseline
        },
        "labels_saved": {label: labels_saved(results, label, baseline) for label in labels if label != baseline},
    }


def other_draws(arms: Sequence[Json], baseline: str) -> list[str]:
    """Labels of the baseline's other draws: what differs between it and them is noise."""
    first = next(arm for arm in arms if arm["label"] == baseline)
    same = ("strategy", "options", "overrides")
    twins = (arm for arm in arms if arm["draw"] != first["draw"] and all(arm[key] == first[key] for key in same))
    return [arm["label"] for arm in twins]


def rounds_of(results: Json, arm: str) -> dict[int, list[Json]]:
    """Seed -> the rounds of an arm."""
    return {run["seed"]: run["rounds"] for run in results["runs"] if run["arm"] == arm and run["rounds"]}


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and its interval by Student's t; of a single value there is none."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def curve(results: Json, arm: str, x: str, y: str = "map50") -> list[Json]:
    """A point per round that at least one seed has reached: means over those, and the interval of y."""
    points = []
    seeds = rounds_of(results, arm)
    for number in range(max((len(rounds) for rounds in seeds.values()), default=0)):
        here = [rounds[number] for rounds in seeds.values() if len(rounds) > number]
        values = [one[y] for one in here if one[y] is not None]
        if values:
            mean, low, high = mean_interval(values)
            across = float(np.mean([one[x] for one in here]))
            points.append({"round": number, "x": across, "mean": mean, "low": low, "high": high, "n": len(values)})
    return points


def area(rounds: Sequence[Json], x: str = "labels", y: str = "map50") -> float | None:
    """Mean height of a learning curve between its first and last point; None for a single one, or one with a gap."""
    xs, ys = [one[x] for one in rounds], [one[y] for one in rounds]
    if len(xs) < 2 or xs[-1] <= xs[0] or None in ys:
        return None
    return float(np.trapezoid(ys, xs) / (xs[-1] - xs[0]))


def area_gain(results: Json, arm: str, baseline: str, y: str = "map50") -> Json:
    """Area under an arm's curve of y against labels, and what it is above the baseline's, paired by seed.

    Over the rounds that an arm's seed and the baseline's both have, so that a run under way compares alike.
    """
    own, base = rounds_of(results, arm), rounds_of(results, baseline)
    means, gains = [], []
    for seed in sorted(own.keys() & base.keys()):
        common = min(len(own[seed]), len(base[seed]))
        mine, other = area(own[seed][:common], y=y), area(base[seed][:common], y=y)
        if mine is not None and other is not None:
            means.append(mine)
            gains.append(mine - other)
    if not means:
        return {"n": 0}
    mean, low, high = mean_interval(gains)
    found = {"n": len(means), "mean": float(np.mean(means)), "difference": mean, "low": low, "high": high}
    return {**found, "each": gains}


def _samples(results: Json, arrays: Callable[[str], EvaluationArrays]) -> dict[str, Vector]:
    """Evaluation key -> (SAMPLES,) mAP50 on holdouts drawn anew, the same ones for all: same images, same seed.

    One by one, as hundreds of them at once would need gigabytes.
    """
    keys = sorted({one["evaluation"] for run in results["runs"] for one in run["rounds"]})
    return {key: bootstrap_map50([arrays(key)], SAMPLES)[:, 0] for key in keys}


def differences(
    results: Json, arm: str, baseline: str, samples: Mapping[str, Vector], y: str = "map50"
) -> list[Json]:
    """Arm minus baseline in each round, seed by seed."""
    own, base = rounds_of(results, arm), rounds_of(results, baseline)
    points = []
    for number in range(1, results["data"]["rounds"] + 1):
        pairs = [
            (own[seed][number], base[seed][number])
            for seed in sorted(own.keys() & base.keys())
            if min(len(own[seed]), len(base[seed])) > number
        ]
        values = [mine[y] - other[y] for mine, other in pairs if mine[y] is not None and other[y] is not None]
        if not values:
            continue
        mean, low, high = mean_interval(values)
        point = {"round": number, "labels": pairs[0][0]["labels"], "mean": mean, "low": low, "high": high}
        point |= {"n": len(values), "each": values, "holdout_low": None, "holdout_high": None}
        if samples:
            drawn = [samples[mine["evaluation"]] - samples[other["evaluation"]] for mine, other in pairs]
            edges = np.quantile(np.mean(drawn, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            point |= {"holdout_low": float(edges[0]), "holdout_high": float(edges[1])}
        points.append(point)
    return points


def labels_needed(labels: Sequence[float], heights: Sequence[float], target: float) -> float | None:
    """Labels at which a learning curve, straight between its points, first reaches a height; None: it does not."""
    for place, height in enumerate(heights):
        if height >= target:
            if not place:
                return float(labels[0])
            share = (target - heights[place - 1]) / (height - heights[place - 1])
            return float(labels[place - 1] + share * (labels[place] - labels[place - 1]))
    return None


def labels_saved(results: Json, arm: str, baseline: str) -> Json:
    """On the mean curves: what the baseline needs for the arm's mAP50 at each budget, and the arm for its last one.

    Over the seeds on which both have come farthest, so that all points of both are means over the same seeds.
    """
    both = _paired(results, arm, baseline)
    own, base = curve(both, arm, "labels"), curve(both, baseline, "labels")
    common = min(len(own), len(base))
    if common < 2:
        return {"budgets": [], "to_final": None, "share_to_final": None}
    labels, heights = [point["x"] for point in base], [point["mean"] for point in base]
    budgets = []
    for point in own[1:common]:
        needed = labels_needed(labels, heights, point["mean"])
        saved = None if needed is None else needed - point["x"]
        budgets.append({"labels": point["x"], "map50": point["mean"], "baseline_needs": needed, "saved": saved})
    last = base[common - 1]
    reached = labels_needed([p["x"] for p in own], [p["mean"] for p in own], last["mean"])
    share = None if reached is None else reached / last["x"]
    return {"budgets": budgets, "final": last["mean"], "to_final": reached, "share_to_final": share}


def _paired(results: Json, arm: str, baseline: str) -> Json:
    """The runs of the two on the seeds on which both have come farthest, as far as both have."""
    own, base = rounds_of(results, arm), rounds_of(results, baseline)
    common = {seed: min(len(own[seed]), len(base[seed])) for seed in sorted(own.keys() & base.keys())}
    farthest = max(common.values(), default=0)
    runs = [
        {"arm": label, "seed": seed, "rounds": rounds[seed][:farthest]}
        for label, rounds in ((arm, own), (baseline, base))
        for seed, length in common.items()
        if length == farthest
    ]
    return {**results, "runs": runs}
