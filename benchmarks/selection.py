"""What selecting a batch costs: seconds, peak memory and growth of every strategy, and k_center beside two peers.

Each case runs in a fresh process with one thread. Seconds are those of its processor, which other work on the machine
disturbs least, from arrays to the batch; memory is the highest resident size above that of the process before it read
the embeddings, over their size: 1.0 is the embeddings and nothing else. The peers are scikit-activeml's CoreSet and the
greedy loop of Sener & Savarese 2018 as it is commonly written, with scikit-learn's `pairwise_distances` in every step;
ours and theirs take turns. Every process reads the strategies afresh, so a change of them during the run ends it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.processes import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LABELLED, SEED = 256, 1000, 7
GROUPS = "near_duplicate_groups"
PEERS = ("peer_scikit_activeml", "peer_pairwise_distances")
# The work of these grows with the square of the pool (coverage: with pool x 20,000 references).
NOT_LINEAR = ("coverage", "hybrid_coverage", GROUPS)
FULL_SIZES, LARGE_SIZES, PEER_SIZE = (20_000, 80_000), (320_000, 1_000_000), 80_000
QUICK_SIZES, QUICK_PEER_SIZE = (4_000, 16_000), 16_000
QUICK_STRATEGIES = ("kmeans", "k_center", "coverage", GROUPS)
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
Floats = NDArray[np.float32]
Picks = NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.selection", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="pools of 4,000 and 16,000, four of them")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # the fresh process of one case
    given = parser.parse_args(arguments)
    if given.case:
        print(json.dumps(measure(**json.loads(given.case))))
        return
    source = _source()
    with tempfile.TemporaryDirectory() as folder:
        cases = _cases(Path(folder), given.quick)
        versus = _versus_peers(Path(folder), *((QUICK_PEER_SIZE, 2) if given.quick else (PEER_SIZE, 5)))
    if _source() != source:
        raise SystemExit("strategies/ changed during the run: these figures are of two versions. Run it again.")
    summary = {**versus, **_summary(cases), "cases": cases}
    for name in ("k_center_seconds", "k_center_vs_peer", "k_center_vs_pairwise", "same_picks"):
        print(f"{name}: {summary[name]}")
    if given.json:
        print(json.dumps(summary))


def _source() -> str:
    """What the fresh processes import, in short."""
    files = sorted((ROOT / "strategies").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _cases(folder: Path, quick: bool) -> list[dict[str, Any]]:
    from strategies import STRATEGIES

    names = QUICK_STRATEGIES if quick else (*STRATEGIES, GROUPS)
    sizes = QUICK_SIZES if quick else FULL_SIZES
    plan = [(name, size, 200) for size in sizes for name in names]
    if not quick:
        plan += [(name, FULL_SIZES[-1], 2000) for name in names if name != GROUPS]
        plan += [(name, size, 200) for size in LARGE_SIZES for name in names if name not in NOT_LINEAR]
    print(
        f"{'strategy':24}{'images':>10}{'K':>6}{'seconds':>10}{'memory':>9}{'growth':>9}   memory: times the embeddings"
    )
    done: list[dict[str, Any]] = []
    for name, size, k in plan:
        case = {"name": name, "size": size, "k": k, **_fresh(folder, name, size, k)}
        case["growth"] = _growth(done, case)
        done.append({key: value for key, value in case.items() if key != "picks"})
        growth = "" if case["growth"] is None else f"{case['growth']:.2f}"
        print(f"{name:24}{size:10,}{k:6}{case['seconds']:10.2f}{case['memory']:9.2f}{growth:>9}", flush=True)
    return done


def _growth(before: Sequence[Mapping[str, Any]], case: Mapping[str, Any]) -> float | None:
    """The exponent e of seconds ~ images^e since the next smaller pool; 1 is linear."""
    same = [other for other in before if (other["name"], other["k"]) == (case["name"], case["k"])]
    if not same:
        return None
    times = case["seconds"] / max(same[-1]["seconds"], 1e-4)
    return round(math.log(max(times, 1e-4)) / math.log(case["size"] / same[-1]["size"]), 2)


def _summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The most memory of any strategy, whatever K, at 80,000 images and more (--quick: its larger pool, where fixed
    costs weigh more); k-means' growth from its smallest to its largest pool."""
    large = min(FULL_SIZES[-1], max(case["size"] for case in cases))
    kmeans = sorted((case for case in cases if case["name"] == "kmeans" and case["k"] == 200), key=lambda c: c["size"])
    worst = max((case for case in cases if case["size"] >= large), key=lambda case: case["memory"])
    times = kmeans[-1]["seconds"] / kmeans[0]["seconds"]
    return {
        "peak_memory": worst["memory"],
        "peak_memory_of": f"{worst['name']}, {worst['size']:,} images",
        "kmeans_growth": round(math.log(times) / math.log(kmeans[-1]["size"] / kmeans[0]["size"]), 2),
    }


def _versus_peers(folder: Path, size: int, turns: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("k_center", *PEERS)}
    for _ in range(turns):
        for name, found in runs.items():
            found.append(_fresh(folder, name, size, 200))
    seconds = {name: statistics.median(one["seconds"] for one in found) for name, found in runs.items()}
    picks = {tuple(one["picks"]) for found in runs.values() for one in found}
    for name, found in runs.items():
        print(f"{name:24}{size:10,}{200:6}{seconds[name]:10.2f}{found[0]['memory']:9.2f}   median of {turns}")
    return {
        "k_center_seconds": seconds["k_center"],
        "k_center_vs_peer": round(seconds[PEERS[0]] / seconds["k_center"], 1),
        "k_center_vs_pairwise": round(seconds[PEERS[1]] / seconds["k_center"], 1),
        "same_picks": len(picks) == 1,
    }


def _fresh(folder: Path, name: str, size: int, k: int) -> dict[str, Any]:
    path = folder / f"{size}.npy"
    if not path.exists():
        for other in folder.glob("*.npy"):
            other.unlink()  # a million images are a gigabyte
        write_embeddings(path, size)
    case = json.dumps({"path": str(path), "name": name, "k": k})
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.selection", "--case", case]
    parent = os.getpid()
    finished = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: die_with_parent(9, parent),
    )
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def write_embeddings(path: Path, size: int) -> None:
    """(size, 256) float32 rows of unit length: 60 kinds of images with 24 ways to differ, every tenth in a burst."""
    rng = np.random.default_rng(SEED)
    mix = rng.standard_normal((24, WIDTH), dtype=np.float32) / 5
    bias = rng.standard_normal(WIDTH, dtype=np.float32)
    kinds = rng.standard_normal((60, 24), dtype=np.float32) * np.float32(1.5)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size, WIDTH))
    for start in range(0, size, 8192):
        count = min(8192, size - start)
        scenes = kinds[rng.integers(60, size=count)] + rng.standard_normal((count, 24), dtype=np.float32)
        copied = rng.integers(count, size=count // 10)
        moved = np.float32(0.02) * rng.standard_normal((len(copied), 24), dtype=np.float32)
        scenes[: len(copied)] = scenes[copied] + moved
        noise = np.float32(0.02) * rng.standard_normal((count, WIDTH), dtype=np.float32)
        seen = np.maximum(scenes @ mix + bias, 0) + noise
        rows[start : start + count] = seen / np.linalg.norm(seen, axis=1, keepdims=True)


def measure(path: str, name: str, k: int) -> dict[str, Any]:
    """One case, in this process: seconds, memory as a multiple of the embeddings, and the picks."""
    run = _prepared(name, k)
    before = _resident("VmRSS")
    embeddings: Floats = np.load(path)
    began = time.process_time()
    picks = run(embeddings)
    seconds = time.process_time() - began
    memory = (_resident("VmHWM") - before) / embeddings.nbytes
    chosen = picks.tolist() if len(picks) == k else []  # groups are none
    return {"seconds": round(seconds, 4), "memory": round(memory, 2), "picks": chosen}


def _resident(field: str) -> int:
    """Bytes; VmHWM is the highest so far. Not getrusage: its peak includes that of the process that started this."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: this benchmark measures memory as Linux tells it")


def _prepared(name: str, k: int) -> Callable[[Floats], Picks]:
    """What the case runs, imported and warmed up on a small pool."""
    makers: dict[str, Callable[[], Callable[[Floats, int], Picks]]] = {
        PEERS[0]: _scikit_activeml,
        PEERS[1]: _pairwise_distances,
        GROUPS: _groups,
    }
    run = makers[name]() if name in makers else _strategy(name)
    small = np.random.default_rng(SEED).standard_normal((LABELLED + 100, WIDTH), dtype=np.float32)
    small[-1] = small[-2]  # near-duplicates: what joins them is imported too
    run(small, 10)
    return lambda embeddings: run(embeddings, k)


def _strategy(name: str) -> Callable[[Floats, int], Picks]:
    from strategies import STRATEGIES, Pool
    from strategies.uncertainty import MEASURES

    def run(embeddings: Floats, k: int) -> Picks:
        labelled, rows = embeddings[:LABELLED], embeddings[LABELLED:]
        rng = np.random.default_rng(SEED)
        pool = Pool.build(
            keys=np.arange(len(rows)),
            uncertainty={measure: rng.random(len(rows)) for measure in MEASURES},
            embeddings=rows,
            labelled_embeddings=labelled,
            disagreement=rng.random(len(rows)),
            duplicate_groups=np.arange(len(rows)),
            duplicates_of_labelled=np.zeros(len(rows), dtype=np.bool_),
        )
        return STRATEGIES[name](pool, k, rng).positions

    return run


def _groups() -> Callable[[Floats, int], Picks]:
    from strategies.diversity import near_duplicate_groups

    return lambda embeddings, k: near_duplicate_groups(embeddings[LABELLED:])


def _scikit_activeml() -> Callable[[Floats, int], Picks]:
    from skactiveml.pool import CoreSet

    def run(embeddings: Floats, k: int) -> Picks:
        labels = np.where(np.arange(len(embeddings)) < LABELLED, 0.0, np.nan)
        picks: Picks = CoreSet(random_state=SEED).query(embeddings, labels, batch_size=k)
        return picks - LABELLED

    return run


def _pairwise_distances() -> Callable[[Floats, int], Picks]:
    from sklearn.metrics import pairwise_distances, pairwise_distances_argmin_min

    def run(embeddings: Floats, k: int) -> Picks:
        labelled, rows = embeddings[:LABELLED], embeddings[LABELLED:]
        nearest = pairwise_distances_argmin_min(rows, labelled)[1]
        picks = np.zeros(k, dtype=np.int64)
        for turn in range(k):
            picks[turn] = nearest.argmax()
            nearest = np.minimum(nearest, pairwise_distances(rows, rows[picks[turn]][None])[:, 0])
        return picks

    return run


if __name__ == "__main__":
    main()
