"""Does it pay? Strategies against random sampling on two labelled pools, by `hardfirst simulate` itself.

Without `--play` the tables of the results that are kept here, next to this file; with it, an experiment is played
(hours; stopped, the same command goes on) and its results are kept. README.md has the figures and what they mean.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
PICTURES = ("curves.png", "rare.png")
DEFAULT = "hybrid"  # what a project gets that sets nothing
LEADERS = "random,random@2,hybrid,hybrid_k_center,k_center,hybrid_coverage"
EVERY = f"{LEADERS},least_confidence,margin,entropy,kmeans,coverage,committee:committee_size=3"
ONE, THREE, SIX = "0", "0,1,2", "0,1,2,3,4,5"

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
# Stage -> arms and seeds. The winner of the first two is proven on seeds that had no part in picking it.
STAGES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "strategies": (EVERY, ONE),
        "leaders": (LEADERS, THREE),
        "winner": (f"random,random@2,{DEFAULT}", SIX),
    }
)
FACTORY_IMAGES = 4000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.dividend", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--play", choices=tuple(POOLS), help="play this pool's simulations instead of showing tables")
    parser.add_argument("--stage", choices=tuple(STAGES), help="of the pool; default: all, one after the other")
    parser.add_argument("--data", type=Path, help="data.yaml of the pool; factory: generated below --out")
    parser.add_argument("--weights", type=Path, help="base weights: a detector with a pretrained backbone")
    parser.add_argument("--out", type=Path, help="folder of the simulation and its cache")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md beside this file")
    parser.add_argument("--quick", action="store_true", help="nothing: as the other benchmarks")
    parser.add_argument("--json", action="store_true", help="end with one JSON line: what the tables are made of")
    given = parser.parse_args(arguments)
    if given.play:
        if not given.weights or not given.out or (given.play != "factory" and not given.data):
            parser.error("--play needs --weights and --out, and --data unless the pool is generated")
        return play(given.play, given.stage, given.data, given.weights, given.out, given.jobs)
    found = {f"{pool}/{stage}": figures(results) for pool, stage, results in kept()}
    for name, rows in found.items():
        print(f"\n{name}\n" + "\n".join(table(rows)))
    if given.write:
        text = README.read_text(encoding="utf-8")
        README.write_text(with_tables(text, found), encoding="utf-8")
    if given.json:
        print(json.dumps(found))
    return 0


# --- playing --------------------------------------------------------------------------------------------------------


def play(pool: str, only: str | None, data: Path | None, weights: Path, out: Path, jobs: int) -> int:
    """Each stage by the command that a user would give; what is kept of it goes beside this file."""
    data_yaml = data or _generated(out / "data")
    for stage in [only] if only else list(STAGES):
        strategies, seeds = STAGES[stage]
        command = [
            *(sys.executable, "-m", "backend.cli", "simulate", f"--data={data_yaml}", f"--weights={weights}"),
            *(f"--out={out}", f"--strategies={strategies}", f"--seeds={seeds}", f"--jobs={jobs}", *POOLS[pool]),
        ]
        if code := subprocess.run(command, check=False).returncode:
            return code
        keep(out, HERE / pool / stage)
    return 0


def keep(out: Path, target: Path) -> None:
    """What a simulation found, without the paths of the machine it was played on."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    results["data"]["data"] = "/".join(Path(results["data"]["data"]).parts[-2:])
    results["data"]["base_weights"] = Path(results["data"]["base_weights"]).name
    words = [Path(word).name if word.startswith("/") else word for word in shlex.split(results["command"])]
    results["command"] = shlex.join(
        f"{word.split('=')[0]}={Path(word.split('=', 1)[1]).name}" if "=/" in word else word for word in words
    )
    target.mkdir(parents=True, exist_ok=True)
    (target / "results.json").write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")
    for name in PICTURES:
        if (out / name).exists():
            shutil.copyfile(out / name, target / name)


def _generated(folder: Path) -> Path:
    if not (folder / "data.yaml").exists():
        from demo.factory import write_dataset

        write_dataset(folder, FACTORY_IMAGES)
    return folder / "data.yaml"


# --- figures --------------------------------------------------------------------------------------------------------


def kept() -> Iterator[tuple[str, str, Json]]:
    """(pool, stage, results.json) of what was played and kept."""
    for pool in POOLS:
        for stage in STAGES:
            file = HERE / pool / stage / "results.json"
            if file.exists():
                yield pool, stage, json.loads(file.read_text(encoding="utf-8"))


def figures(results: Json) -> list[Json]:
    """One row per arm, means over its seeds: mAP50 at each budget, the area above random with its interval, labels to
    random's last mAP50 as a share of random's, rare AP50 over random's at the last budget, what the batches held."""
    comparison = results["comparison"]
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
                "share_to_final": 1.0 if is_base else saved["share_to_final"],
                "rare_ap50": rare,
                "rare_ratio": rare[-1] / rare_base[-1] if rare and rare_base and rare_base[-1] else None,
                "rare_images": sum(batch["rare_images"] for batch in batches) / n_seeds,
                "near_duplicates": sum(len(batch["near_duplicates"]) for batch in batches) / n_seeds,
            }
        )
    return rows


def with_tables(text: str, found: Mapping[str, Sequence[Json]]) -> str:
    """The text with the table of each pool and stage between `<!-- table: pool/stage -->` and `<!-- end -->`."""

    def filled(match: re.Match[str]) -> str:
        rows = found.get(match[1])
        body = "\n".join(table(rows)) if rows else "Not played yet."
        return f"<!-- table: {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


def _heights(points: Sequence[Json]) -> list[float]:
    return [point["mean"] for point in points]


def table(rows: Sequence[Json]) -> list[str]:
    """The rows as a Markdown table, the best area first; mAP50 and differences in points."""
    budgets = " | ".join(str(labels) for labels in rows[0]["labels"][1:])
    ruler = "| --- " * (6 + len(rows[0]["labels"]))
    lines = [f"| arm | seeds | {budgets} | area - random | labels to random's last | rare AP50 / random's | rare chosen | duplicates |", ruler[:-1] + "|"]  # fmt: skip  # noqa: E501
    for row in sorted(rows, key=lambda row: -(row["area_gain"] or 0.0)):
        heights = " | ".join(f"{100 * height:.1f}" for height in row["map50"][1:])
        lines.append(
            f"| {row['arm']} | {row['seeds']} | {heights} | {_gain(row)} | {_share(row['share_to_final'])} | "
            f"{_ratio(row['rare_ratio'])} | {row['rare_images']:.0f} | {row['near_duplicates']:.0f} |"
        )
    return lines


def _gain(row: Json) -> str:
    if row["area_gain"] is None:
        return "–"
    interval = "" if row["area_low"] is None else f" ({100 * row['area_low']:+.1f} to {100 * row['area_high']:+.1f})"
    return f"{100 * row['area_gain']:+.1f}{interval}"


def _share(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
