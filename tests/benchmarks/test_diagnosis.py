"""The diagnosis: what it counts, by hand; and all of it on a tiny simulation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.dividend import diagnosis
from demo.factory import write_dataset
from strategies import STRATEGIES
from worker.dataset import TaskTruth
from worker.detector import ImageScore
from worker.simulate import Bench, Step
from worker.simulation_world import Picture

TINY = (
    *("--imgsz=64", "--epochs=1", "--train-batch=8", "--set=lr0=0.01"),
    *("--seed-size=6", "--batch-size=4", "--rounds=1"),
)


def look(boxes: list[list[float]], class_ids: list[int], drawn: int) -> ImageScore:
    probabilities = np.full((len(boxes), 2), 0.5, np.float32)
    return ImageScore(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        confidences=probabilities.max(axis=1),
        class_ids=np.array(class_ids, np.int64),
        probabilities=probabilities,
        best_candidate=np.array([0.1, 0.1], np.float32),
        embedding=np.array([1.0, 0.0], np.float32),
        width=100,
        height=100,
        drawn=drawn,
    )


def picture(*objects: tuple[int, float, float, float, float]) -> Picture:
    boxes = np.array([one[1:] for one in objects], np.float64).reshape(-1, 4)
    class_ids = np.array([one[0] for one in objects], np.int64)
    return Picture(1, "a.jpg", Path("a.jpg"), "", TaskTruth(task_id=1, boxes_yolo=boxes, class_ids=class_ids))


def test_missed_is_the_share_of_objects_without_a_drawn_box() -> None:
    two = picture((0, 0.2, 0.2, 0.2, 0.2), (1, 0.7, 0.7, 0.2, 0.2))  # 10..30 and 60..80
    first, second = [10.0, 10, 30, 30], [60.0, 60, 80, 80]
    assert diagnosis.missed(two, look([first, second], [0, 1], 2)) == 0
    assert diagnosis.missed(two, look([first, second], [0, 0], 2)) == 0.5  # of another class
    assert diagnosis.missed(two, look([first, second], [0, 1], 1)) == 0.5  # too faint to be drawn
    assert diagnosis.missed(two, look([[0, 0, 14, 14]], [0], 1)) == 1.0  # elsewhere
    assert diagnosis.missed(two, look([], [], 0)) == 1.0
    assert diagnosis.missed(picture(), look([], [], 0)) == 0
    assert diagnosis.missed(picture(), look([first], [0], 1)) == 1.0


@pytest.mark.slow
def test_all_of_it_on_a_tiny_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diagnosis, "POOLS", {**diagnosis.POOLS, "factory": TINY})
    data = write_dataset(tmp_path / "data", 36, seed=5, size=(128, 96))
    arms = ",".join(name for name in STRATEGIES if name != "committee")
    out, weights = tmp_path / "out", "yolo11n.yaml"
    given = ["--pool=factory", f"--data={data}", f"--weights={weights}", f"--out={out}", f"--arms={arms}"]
    plan = diagnosis.plan_of(argparse.Namespace(pool="factory", data=data, weights=weights, out=out, arms=arms))
    assert (plan.seed_size, plan.batch_size, plan.rounds) == (6, 4, 1)
    assert plan.common == {"imgsz": 64, "epochs": 1, "train_batch": 8, "lr0": 0.01, "weights": weights}
    bench = Bench(plan)
    with pytest.raises(SystemExit, match="round 1 of random is not played"):
        diagnosis.look_at(bench, 1)
    bench.run(Step("random", 0, 0))

    assert diagnosis.main([*given, "--rounds=0", "--json"]) == 0
    printed = capsys.readouterr().out
    tables: dict[str, Any] = json.loads(printed.splitlines()[-1])["6"]
    pool = len(bench.world.pool)
    assert len(tables["readings"]) == len(diagnosis.READINGS)
    assert all(1 <= row["ties"] <= pool - 6 for row in tables["readings"])
    assert [row["embedding"] for row in tables["embeddings"]] == ["as it is", "centred", "whitened"]
    assert all(0 <= row["nearest"] <= 1 for row in tables["embeddings"])
    assert [row["arm"] for row in tables["batches"]] == arms.split(",")
    assert all(0 <= row["look-alikes"] <= 4 and 0 <= row["missed"] <= 1 for row in tables["batches"])
    assert "factory, 6 labelled: batches\n| arm | look-alikes |" in printed

