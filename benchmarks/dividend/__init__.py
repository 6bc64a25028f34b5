"""Does it pay? Strategies against random sampling on two labelled pools, by `hardfirst simulate` itself.

Without `--play` the tables of the results that are kept here, next to this file; with it, arms are played (hours;
stopped, the same command goes on) and added to what is kept: other arms and seeds may be played later, or on another
machine. README.md has the figures and what they mean.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from worker.arms import parse_arms
from worker.composition import mean_ap50
from worker.errors import BadRequest
from worker.simulation_report import draw
from worker.simulation_results import area_gain, compare

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
FRONT_PAGE = HERE.parent.parent / "README.md"
FRONT = "factory/winner"  # what is told on it
PICTURES = ("curves", "rare")
DIAGNOSES = ("diagnosis", "labelled")  # modules that say why
KINDS = ("common", "rare")  # classes
DEFAULT = "hybrid_k_center"  # what a project gets that sets nothing
LEADERS = f"random,random@2,{DEFAULT},hybrid,k_center,hybrid_coverage"
EVERY = f"{LEADERS},least_confidence,margin,entropy,kmeans,coverage,committee:committee_size=3"
BEFORE = f"{DEFAULT}:alpha=0.25,empty=best_candidate"  # the default as it was before "calibrated"
# The default, what it might have been, and what it is made of.
SETTINGS = (
    f"random,{DEFAULT},{DEFAULT}:empty=best_candidate,{BEFORE},{BEFORE},aggregate=sum,"
    f"{DEFAULT}:mix=sum,alpha=0.7,beta=0.3,hybrid:threshold=0.1,empty=calibrated,aggregate=open,class_weights=true,"
    "hybrid,k_center"
)
# Stage -> its arms and seeds. A table each. The default was chosen by looking at the seeds of the first three: what is
# claimed of it is of the six after them.
STAGES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "strategies": (EVERY, "0"),
        "settings": (SETTINGS, "0"),
        "leaders": (f"{LEADERS},{BEFORE}", "0,1,2"),
        "winner": (f"random,random@2,{DEFAULT},hybrid", "3,4,5,6,7,8"),
    }
)

Json = dict[str, Any]
# Pool -> what all of its simulations have in common.
POOLS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "foda": ("--imgsz=160", "--epochs=30", "--seed-size=50", "--batch-size=100", "--rounds=4"),
        "factory": (
            *("--imgsz=160", "--epochs=15", "--train-batch=4", "--nominal-batch=4"),
            *("--set=optimizer=AdamW", "--set=lr0=0.002", "--seed-size=30", "--batch-size=30", "--rounds=4"),
        ),
    }
)
PICTURED = "winner"
FACTORY_IMAGES = 4000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.dividend", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--play", choices=tuple(POOLS), help="play this pool's simulations instead of showing tables")
    parser.add_argument("--stage", choices=tuple(STAGES), help="of the pool; default: all, one after the other")
    parser.add_argument("--arms", help="play these instead of a stage's, as `simulate --strategies` takes them")
    parser.add_argument("--seeds", help="play these instead of a stage's: 0,1,2")
    parser.add_argument("--data", type=Path, help="data.yaml of the pool; factory: generated below --out")
    parser.add_argument("--weights", type=Path, help="base weights: a detector with a pretrained backbone")
    parser.add_argument("--out", type=Path, help="folder of the simulation and its cache")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each (%(default)s)")
    parser.add_argument("--write", action="store_true", help="tables and pictures into this folder, of what is kept")
    parser.add_argument("--quick", action="store_true", help="nothing: as the other benchmarks")
    parser.add_argument("--json", action="store_true", help="end with one JSON line: what the tables are made of")
    given = parser.parse_args(arguments)
    if given.play:
        if not given.weights or not given.out or (given.play != "factory" and not given.data):
            parser.error("--play needs --weights and --out, and --data unless the pool is generated")
        return play(given)
    found = {f"{pool}/{stage}": figures(results) for pool, stage, results in views()}
    tables = all_tables(found)
    for name, lines in tables.items():
        print(f"\n{name}", *lines, sep="\n")
    if given.write:
        tables["dividend"] = short_table(found[FRONT])
        for file in (README, FRONT_PAGE):
            file.write_text(with_tables(file.read_text(encoding="utf-8"), tables), encoding="utf-8")
        for pool, stage, results in views():
            if stage == PICTURED:
                _write_pictures(HERE / pool, results)
    if given.json:
        print(json.dumps(found))
    return 0


# --- playing --------------------------------------------------------------------------------------------------------


def play(given: argparse.Namespace) -> int:
    """Each stage by the command that a user would give; what it found is added to what is kept beside this file."""
    data_yaml = given.data or _generated(given.out / "data")
    for stage in [given.stage] if given.stage or given.arms or given.seeds else list(STAGES):
        strategies, seeds = STAGES[stage or "strategies"]
        command = [
            *(sys.executable, "-m", "backend.cli", "simulate", f"--data={data_yaml}", f"--weights={given.weights}"),
            *(f"--out={given.out}", f"--strategies={given.arms or strategies}", f"--seeds={given.seeds or seeds}"),
            *(f"--jobs={given.jobs}", *POOLS[given.play]),
        ]
        if code := subprocess.run(command, check=False).returncode:
            return code
        keep(given.out / "results.json", given.play)
    return 0


def keep(file: Path, pool: str) -> None:
    """Add what a simulation found to what is kept of its pool, without the paths of the machine it was played on."""
    target = HERE / pool / "results.json"
    found = without_paths(json.loads(file.read_text(encoding="utf-8")))
    if target.exists():
        found = merged(json.loads(target.read_text(encoding="utf-8")), found)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, separators=(",", ":")).replace('{"arm":', '\n{"arm":') + "\n", encoding="utf-8")


def without_paths(results: Json) -> Json:
    """What is kept of a results.json: all but the comparison, which is made anew from the runs that a table shows."""
    kept = {name: results[name] for name in ("versions", "data", "settings", "arms", "runs")}
    kept["data"] = {
        **results["data"],
        "data": "/".join(Path(results["data"]["data"]).parts[-2:]),
        "base_weights": Path(results["data"]["base_weights"]).name,
    }
    kept["settings"] = {
        label: {**one, "weights": Path(one.get("weights") or "").name} for label, one in results["settings"].items()
    }
    kept["commands"] = [shlex.join(map(_without_folder, shlex.split(results["command"])))]
    return kept


def _without_folder(word: str) -> str:
    """`/home/me/x` and `--data=/home/me/x` -> `x`, `--data=x`."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if value.startswith("/") else word


def merged(old: Json, new: Json) -> Json:
    """Runs of both; of an arm and seed that both have, the one with more rounds, and of equal ones the new one.

    Raises: BadRequest: they were not played on the same data, by the same versions, on the same machine, or an arm not
        with the same settings.
    """
    # where the files lay says nothing of what they are
    ours, theirs = ({**results["data"], "seeds": None, "data": None} for results in (old, new))
    if ours != theirs:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise BadRequest(f"what is kept was played with other {', '.join(differing)}: move it away, or play as it was")
    if old["versions"] != new["versions"]:
        raise BadRequest(f"what is kept was played with {old['versions']}, this with {new['versions']}")
    for label in old["settings"].keys() & new["settings"].keys():
        if old["settings"][label] != new["settings"][label]:
            raise BadRequest(f"arm {label} was played with other settings before: name what differs in the new arm")
    runs = {(run["arm"], run["seed"]): run for run in old["runs"]}
    for run in new["runs"]:
        place = run["arm"], run["seed"]
        if place not in runs or len(run["rounds"]) >= len(runs[place]["rounds"]):
            runs[place] = run
    measured: dict[str, float] = {}
    for run in runs.values():
        for one in run["rounds"]:
            if measured.setdefault(one["evaluation"], one["map50"]) != one["map50"]:
                raise BadRequest(
                    "the same training was measured otherwise before: on another machine? Pair arms on one"
                )
    arms = {arm["label"]: arm for arm in old["arms"]}
    for arm in new["arms"]:
        # what an arm does not say is a default, which may have changed since
        if arms.setdefault(arm["label"], arm)["played"] != arm["played"]:
            raise BadRequest(f"arm {arm['label']} meant something else when it was played: name what differs")
    return {
        "versions": new["versions"],
        "data": {**new["data"], "seeds": sorted({seed for _, seed in runs})},
        "settings": old["settings"] | new["settings"],
        "arms": list(arms.values()),
        "commands": [*old["commands"], *(one for one in new["commands"] if one not in old["commands"])],
        "runs": [runs[place] for place in sorted(runs)],
    }


def _generated(folder: Path) -> Path:
    if not (folder / "data.yaml").exists():
        from demo.factory import write_dataset

        write_dataset(folder, FACTORY_IMAGES)
    return folder / "data.yaml"


def _write_pictures(folder: Path, results: Json) -> None:
    drawn = draw(results)
    for name in PICTURES:
        (folder / f"{name}.png").write_bytes(drawn[name])


# --- figures --------------------------------------------------------------------------------------------------------


def kept() -> Iterator[tuple[str, Json]]:
    """(pool, what is kept of it)."""
    for pool in POOLS:
        file = HERE / pool / "results.json"
        if file.exists():
            yield pool, json.loads(file.read_text(encoding="utf-8"))


def views() -> Iterator[tuple[str, str, Json]]:
    """(pool, stage, its part of what is kept, compared), of stages that have anything to compare."""
    for pool, results in kept():
        for stage, (strategies, seeds) in STAGES.items():
            found = view(results, split_arms(strategies), [int(seed) for seed in seeds.split(",")])
            if len(found["arms"]) > 1:
                yield pool, stage, found


def view(results: Json, labels: Sequence[str], seeds: Sequence[int]) -> Json:
    """The whole runs of these arms on these seeds; arms that lack one of the seeds are left out, so that all means
    are over the same."""
    rounds = results["data"]["rounds"] + 1
    whole = {(run["arm"], run["seed"]): run for run in results["runs"] if len(run["rounds"]) == rounds}
    shown = [label for label in labels if all((label, seed) in whole for seed in seeds)]
    arms = {arm["label"]: arm for arm in results["arms"]}
    found = {
        **results,
        "data": {**results["data"], "seeds": list(seeds)},
        "arms": [arms[label] for label in shown],
        "runs": [whole[label, seed] for label in shown for seed in seeds],
    }
    return {**found, "comparison": compare(found, None)} if shown else found


def split_arms(strategies: str) -> list[str]:
    return [arm.label for arm in parse_arms(strategies)]


def figures(results: Json) -> list[Json]:
    """One row per arm, means over its seeds: mAP50 at each budget, the area above random with its interval, also of the
    rare classes and the others alone, labels to random's last mAP50 as a share of random's, rare AP50 over random's at
    the last budget, what the batches held, and an annotator's minutes for all labels."""
    comparison = results["comparison"]
    parted = _with_common_classes(results)
    base = comparison["baseline"]
    rare_base = _heights(comparison["rare_curves"][base])
    rows = []
    for label, curves in comparison["curves"].items():
        batches = [
            one["batch"] for run in results["runs"] if run["arm"] == label for one in run["rounds"] if one["round"]
        ]
        n_seeds = sum(run["arm"] == label for run in results["runs"])
        rare = _heights(comparison["rare_curves"][label])
        area, saved = comparison["areas"][label], comparison["labels_saved"].get(label, {})
        is_base = label == base
        rows.append(
            {
                "arm": label,
                "seeds": n_seeds,
                "labels": [round(point["x"]) for point in curves["labels"]],
                "map50": _heights(curves["labels"]),
                "area_gain": None if is_base else area["difference"],
                "area_low": None if is_base else area["low"],
                "area_high": None if is_base else area["high"],
                **{kind: None if is_base else area_gain(parted, label, base, f"{kind}_ap50") for kind in KINDS},
                "share_to_final": 1.0 if is_base else saved["share_to_final"],
                "rare_ap50": rare,
                "rare_ratio": rare[-1] / rare_base[-1] if rare and rare_base and rare_base[-1] else None,
                "rare_images": sum(batch["rare_images"] for batch in batches) / n_seeds,
                "near_duplicates": sum(len(batch["near_duplicates"]) for batch in batches) / n_seeds,
                "minutes": curves["minutes"][-1]["x"],
            }
        )
    return rows


def _with_common_classes(results: Json) -> Json:
    """The results with AP50 of the classes that are not rare in each round, beside that of the rare ones."""
    common = [name for name in results["data"]["classes"] if name not in results["data"]["rare"]]
    runs = [
        {**run, "rounds": [{**one, "common_ap50": mean_ap50(one["ap50"], common)} for one in run["rounds"]]}
        for run in results["runs"]
    ]
    return {**results, "runs": runs}


def all_tables(found: Mapping[str, Sequence[Json]]) -> dict[str, list[str]]:
    """Name -> lines of each table: pool/stage of the comparisons, pool/diagnosis/part of the diagnoses."""
    tables = {name: table(rows) for name, rows in found.items()}
    for pool in POOLS:
        for part, rounds in _diagnoses(HERE / pool):
            tables[f"{pool}/diagnosis/{part}"] = markdown(side_by_side(rounds))
    return tables


def _diagnoses(folder: Path) -> Iterator[tuple[str, dict[str, list[Json]]]]:
    """(part, number of labels -> its rows), of what was kept there."""
    for file in (folder / f"{module}.json" for module in DIAGNOSES):
        if file.exists():
            rounds = json.loads(file.read_text(encoding="utf-8"))
            for part in next(iter(rounds.values())):
                yield part, {labels: parts[part] for labels, parts in rounds.items()}


def keep_tables(module: str, pool: str, rounds: Mapping[str, Mapping[str, Sequence[Json]]]) -> None:
    """Number of labels -> part -> rows, beside the pool's results."""
    (HERE / pool).mkdir(exist_ok=True)
    (HERE / pool / f"{module}.json").write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")


def side_by_side(rounds: Mapping[str, Sequence[Json]]) -> list[Json]:
    """Rows that begin alike, of several rounds, as one: each figure once per round, after its number of labels."""
    together = []
    for rows in zip(*rounds.values(), strict=True):
        key = next(iter(rows[0]))
        row = {key: rows[0][key]}
        for name in rows[0]:
            if name != key:
                row |= {f"{name}, {labels}": one[name] for labels, one in zip(rounds, rows, strict=True)}
        together.append(row)
    return together


def markdown(rows: Sequence[Json]) -> list[str]:
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([str(row[name]) for name in header] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def with_tables(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The text with each table between `<!-- table: its name -->` and `<!-- end -->`; others' tables stay."""

    def filled(match: re.Match[str]) -> str:
        if match[1] not in tables and "/" not in match[1]:
            return match[0]
        body = "\n".join(tables.get(match[1], ["Not played yet."]))
        return f"<!-- table: {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


def _heights(points: Sequence[Json]) -> list[float]:
    return [point["mean"] for point in points]


def table(rows: Sequence[Json]) -> list[str]:
    """The rows as a Markdown table, the best area first; mAP50 and differences in points."""
    lines = []
    for row in sorted(rows, key=lambda row: -(row["area_gain"] or 0.0)):
        points = zip(row["labels"][1:], row["map50"][1:], strict=True)
        lines.append(
            {
                "arm": row["arm"],
                "seeds": row["seeds"],
                **{str(labels): f"{100 * height:.1f}" for labels, height in points},
                "area - random": _gain(
                    {"difference": row["area_gain"], "low": row["area_low"], "high": row["area_high"]}
                ),
                "common classes": _gain(row["common"]),
                "rare classes": _gain(row["rare"]),
                "labels to random's last": _share(row["share_to_final"]),
                "rare AP50 / random's": _ratio(row["rare_ratio"]),
                "rare chosen": f"{row['rare_images']:.0f}",
                "look-alikes": f"{row['near_duplicates']:.0f}",
                "minutes": f"{row['minutes']:.0f}",
            }
        )
    return markdown(lines)


def short_table(rows: Sequence[Json]) -> list[str]:
    """mAP50 at each budget, and of the rare classes at the last: for the front page."""
    lines = []
    for row in sorted(rows, key=lambda row: -(row["area_gain"] or 0.0)):
        points = zip(row["labels"], row["map50"], strict=True)
        budgets = {f"{labels} labels": f"{100 * height:.1f}" for labels, height in points}
        rare = {f"rare classes, {row['labels'][-1]}": f"{100 * row['rare_ap50'][-1]:.1f}"}
        lines.append({"strategy": f"`{row['arm']}`", **budgets, **rare})
    return markdown(lines)


def _gain(gain: Json | None) -> str:
    if gain is None or gain.get("difference") is None:
        return "–"
    interval = "" if gain["low"] is None else f" ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
    return f"{100 * gain['difference']:+.1f}{interval}"


def _share(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
