"""A tiny simulation end to end, on generated images: what may be known when, and that stopping changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from demo.factory import write_dataset
from worker import simulate
from worker.arms import parse_arms
from worker.dataset import TaskTruth
from worker.detector import sha256_of
from worker.errors import BadRequest, Conflict
from worker.simulate import Bench, Oracle, Plan, Step
from worker.simulation_jobs import Schedule, run_plan
from worker.simulation_report import write_report
from worker.simulation_results import collect, rare_classes
from worker.simulation_world import Picture, World, read_world

ROOT = Path(__file__).resolve().parents[2]
ARMS = "random,hybrid:threshold=0.01,class_weights=true"
TINY = {"imgsz": 64, "epochs": 1, "weights": "yolo11n.yaml", "train_batch": 8}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images of 128 x 96: 7 in the holdout or so, the rest in the pool."""
    return write_dataset(tmp_path_factory.mktemp("factory"), 36, seed=5, size=(128, 96))


def plan_of(data: Path, out: Path, arms: str = ARMS, **given: Any) -> Plan:
    values = {"seeds": (0,), "rounds": 2, "batch_size": 4, "seed_size": 6, "common": TINY, "command": "simulate"}
    return Plan(data=data, out=out, arms=tuple(parse_arms(arms)), **{**values, **given})


class Silent:
    def begin(self, total: float, done: float, steps: int, steps_done: int) -> None:
        self.steps_done = steps_done

    def told(self, step: Step, what: str, share: float) -> None: ...

    def finished(self, step: Step, cost: float, seconds: float) -> None: ...

    def failed(self, step: Step, sentence: str) -> None:
        raise AssertionError(sentence)


@pytest.fixture(scope="session")
def played(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A simulation that nobody stopped."""
    plan = plan_of(dataset, tmp_path_factory.mktemp("played"))
    bench, failures = run_plan(plan, 1, Silent(), lambda bench: None)
    assert failures == {}
    return bench


def numbers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs without how long they took."""
    runs = json.loads(json.dumps(results["runs"]))
    for run in runs:
        for one in run["rounds"]:
            del one["seconds"]
    return list(runs)


@pytest.mark.slow
def test_the_run_is_whole_and_told(played: Bench) -> None:
    (played.plan.out / "contact-entropy.png").write_bytes(b"of an arm that an earlier run had")
    page = write_report(played, {})
    assert not (played.plan.out / "contact-entropy.png").exists()
    results = json.loads((played.plan.out / "results.json").read_text())
    assert results["complete"]
    assert [len(run["rounds"]) for run in results["runs"]] == [3, 3]
    assert [[one["labels"] for one in run["rounds"]] for run in results["runs"]] == [[6, 10, 14]] * 2
    assert results["runs"][0]["rounds"][1]["batch"]["tied"] is None  # random reads no uncertainty
    assert 1 <= results["runs"][1]["rounds"][1]["batch"]["tied"] <= len(played.world.pool) - 6
    assert results["settings"][ARMS.split(",", 1)[1]]["class_weights"] is True
    assert results["command"] == "simulate"
    assert "torch" in results["versions"]
    first = results["runs"][0]["rounds"][1]
    drawn = sum(len(picture.truth.class_ids) for picture in pictures_of(played, results["runs"][0], 2))
    assert first["boxes"] == drawn
    assert first["minutes"] == pytest.approx((10 * 8 + drawn * 7) / 60, abs=0.01)
    assert page.read_text().count("data:image/") == 4 + 2  # figures and contact sheets
    assert (played.plan.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def pictures_of(bench: Bench, run: dict[str, Any], rounds: int) -> list[Picture]:
    names = [name for one in run["rounds"][:rounds] for name in one["batch"]["images"]]
    return [picture for picture in bench.world.pool if picture.name in names]


@pytest.mark.slow
def test_arms_share_round_0_and_then_differ(played: Bench) -> None:
    runs = collect(played, {})["runs"]
    assert len({run["rounds"][0]["evaluation"] for run in runs}) == 1
    assert len({json.dumps(run["rounds"][0]["batch"]["images"]) for run in runs}) == 1
    assert len({json.dumps(run["rounds"][1]["batch"]["images"]) for run in runs}) == 2
    assert len(list((played.cache / "train").iterdir())) == 1 + 2 * 2


@pytest.mark.slow
def test_no_image_is_labelled_twice_and_the_holdout_never(played: Bench) -> None:
    holdout = {picture.name for picture in played.world.holdout}
    assert holdout
    for run in collect(played, {})["runs"]:
        labelled = [name for one in run["rounds"] for name in one["batch"]["images"]]
        assert len(labelled) == len(set(labelled)) == 14
        assert not holdout & set(labelled)
    in_holdout = {picture.task_id for picture in played.world.holdout}
    for file in (played.cache / "train").iterdir():
        assert not in_holdout & set(json.loads(file.read_text())["images"])


class Sealed:
    """A picture whose boxes nobody may read before they were asked for."""

    opened: set[int]

    def __init__(self, picture: Picture, opened: set[int]) -> None:
        self._picture, self.opened = picture, opened
        self.task_id, self.name, self.path, self.digest = picture.task_id, picture.name, picture.path, picture.digest

    @property
    def truth(self) -> TaskTruth:
        assert self.task_id in self.opened, f"the boxes of image {self.task_id} were read before it was queried"
        return self._picture.truth

    @property
    def fingerprint(self) -> str:
        assert self.task_id in self.opened
        return self._picture.fingerprint


@pytest.mark.slow
def test_no_label_is_read_before_it_was_queried(
    played: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[int] = set()
    label = Oracle.label

    def record(self: Oracle, task_ids: list[int]) -> None:
        label(self, task_ids)
        opened.update(task_ids)

    monkeypatch.setattr(Oracle, "label", record)
    sealed: Any = tuple(Sealed(picture, opened) for picture in played.world.pool)
    bench = Bench(dataclasses.replace(played.plan, out=tmp_path), dataclasses.replace(played.world, pool=sealed))
    arm = played.plan.arms[1].label
    for number in range(2):
        bench.run(Step(arm, 0, number))
        assert len(opened) == 6 + 4 * number
    record_of = {number: bench.known(Step(arm, 0, number)) for number in range(2)}
    assert numbers_of(record_of) == numbers_of({n: played.known(Step(arm, 0, n)) for n in range(2)})


def numbers_of(records: dict[int, Any]) -> list[Any]:
    """What a run in this process and one in a child must agree on."""
    return [(one["measured"]["map50"], one["next_batch"]["task_ids"], one["labelled"]) for one in records.values()]


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_numbers(played: Bench, dataset: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "backend.cli", "simulate", "--data", str(dataset), "--out", str(tmp_path)),
        *("--strategies", ARMS, "--rounds", "2", "--batch-size", "4", "--seed-size", "6", "--jobs", "1"),
        *("--imgsz", "64", "--epochs", "1", "--weights", "yolo11n.yaml", "--train-batch", "8"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/6]"):  # the third, a training, is about to begin
            break
    _wait_for((tmp_path / "work").iterdir)
    process.send_signal(signal.SIGKILL)
    process.wait()
    command += ["--jobs", "2"]  # how many processes there are means nothing either
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "6 rounds of arms and seeds, 2 of them done already." in finished.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert numbers(results) == numbers(collect(played, {}))
    assert not (tmp_path / "work").exists()


def _wait_for(listed: Any) -> None:
    """Until a training has made its folder."""
    for _ in range(600):
        try:
            if list(listed()):
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError("no training began")


@pytest.mark.slow
def test_another_arm_and_another_round_reuse_what_is_there(played: Bench, tmp_path: Path) -> None:
    shutil.copytree(played.plan.out / "cache", tmp_path / "cache")
    more = dataclasses.replace(played.plan, out=tmp_path, arms=(*played.plan.arms, *parse_arms("k_center")))
    schedule = Schedule(Bench(more))
    assert {chain: number for (chain, _), number in schedule.following.items()} == {
        **{arm.label: 3 for arm in played.plan.arms},
        "k_center": 0,
    }
    step = schedule.next_step()
    assert step == Step("k_center", 0, 0)
    before = set((tmp_path / "cache" / "train").iterdir())
    schedule.bench.run(step)  # its model is there: only the batch is new
    assert set((tmp_path / "cache" / "train").iterdir()) == before


@pytest.mark.slow
def test_the_order_of_the_lists_means_nothing(played: Bench, dataset: Path, tmp_path: Path) -> None:
    shuffled = _shuffled(dataset)
    shutil.copytree(played.plan.out / "cache", tmp_path / "cache")
    for made_anew in ("batch", "scores"):
        shutil.rmtree(tmp_path / "cache" / made_anew)
    bench = Bench(dataclasses.replace(played.plan, out=tmp_path, data=shuffled))
    assert [picture.name for picture in bench.world.pool] == [picture.name for picture in played.world.pool]
    for arm in played.plan.arms:
        again, first = bench.run(Step(arm.label, 0, 0)), played.known(Step(arm.label, 0, 0))
        assert first is not None
        assert again["next_batch"]["task_ids"] == first["next_batch"]["task_ids"]


def _shuffled(data_yaml: Path) -> Path:
    """The same dataset, its lists in another order."""
    content = yaml.safe_load(data_yaml.read_text())
    for split in ("train", "pool", "val"):
        lines = (data_yaml.parent / content[split]).read_text().splitlines()
        random.Random(3).shuffle(lines)
        content[split] = f"shuffled-{split}.txt"
        (data_yaml.parent / content[split]).write_text("\n".join(lines) + "\n")
    target = data_yaml.parent / "shuffled.yaml"
    target.write_text(yaml.safe_dump(content))
    return target


@pytest.mark.slow
def test_a_warm_start_and_a_diverse_seed_set(dataset: Path, tmp_path: Path) -> None:
    plan = plan_of(dataset, tmp_path, "random,random@2:warm_start=true", rounds=1, seed_set="diverse")
    bench = Bench(plan)
    for arm in plan.arms:
        for number in range(2):
            bench.run(Step(arm.label, 0, number))
    cold, warm = (bench.known(Step(arm.label, 0, 1)) for arm in plan.arms)
    assert cold is not None
    assert warm is not None
    assert cold["labelled"][:6] == warm["labelled"][:6]
    assert cold["evaluation"] != warm["evaluation"]
    again = Bench(dataclasses.replace(plan, out=tmp_path / "other"), bench.world)
    assert again._seed_set(0) == cold["labelled"][:6]


@pytest.mark.slow
def test_a_committee_is_trained_on_its_own_parts_of_the_labels(dataset: Path, tmp_path: Path) -> None:
    plan = plan_of(dataset, tmp_path, "committee:committee_size=3", rounds=1)
    bench = Bench(plan)
    record = bench.run(Step(plan.arms[0].label, 0, 0))
    trained = [json.loads(file.read_text())["images"] for file in (bench.cache / "train").iterdir()]
    assert sorted(len(images) for images in trained) == [5, 5, 6]  # four fifths of 6, rounded up
    assert all(set(images) <= set(record["labelled"]) for images in trained)
    assert len(record["next_batch"]["task_ids"]) == 4
    (scores,) = (bench.cache / "scores").iterdir()
    with np.load(scores) as kept:  # after one epoch none of them sees a box, and so they agree
        assert kept["disagreement"].tolist() == [0.0] * len(bench.world.pool)
    assert len({sha256_of(file) for file in (bench.cache / "weights").iterdir()}) == 3


# --- without a network ----------------------------------------------------------------------------------------------


def test_the_plan_is_refused_with_a_sentence(dataset: Path, tmp_path: Path) -> None:
    world = read_world(dataset, tmp_path)
    for arms, given, sentence in [
        ("random", {"batch_size": 500}, "too few for a seed set of 6 and a batch of 500"),
        ("random", {"rare": ("bolts",)}, "--rare names 'bolts'"),
        ("hybrid:alpha=7", {}, "alpha"),
        ("committee:committee_size=3,committee=checkpoints,epochs=9", {}, "committees of subsets only"),
    ]:
        plan = plan_of(dataset, tmp_path, arms, **given)
        with pytest.raises(BadRequest, match=sentence):  # noqa: PT012  either may refuse it, the first without images
            plan.check_arms()
            plan.check(world)


def test_a_folder_that_cannot_be_written_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadRequest, match=f"--out {out} cannot be written"):
            run_plan(plan_of(dataset, out), 1, Silent(), lambda bench: None)


def test_two_do_not_play_in_one_folder(dataset: Path, tmp_path: Path) -> None:
    from worker.simulation_jobs import _only_one

    with _only_one(tmp_path), pytest.raises(Conflict, match=f"process {os.getpid()} plays in"):
        run_plan(plan_of(dataset, tmp_path), 1, Silent(), lambda bench: None)


def pictures(folder: Path, splits: dict[str, list[str]], colours: dict[str, int]) -> Path:
    """Images 40 x 30 of noise, equal where their colour is; class 1 is drawn in those whose name has an x."""
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True)
    for stem, seed in colours.items():
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{stem}.png")
        (folder / "labels" / f"{stem}.txt").write_text("1 .5 .5 .2 .2\n" if "x" in stem else "0 .5 .5 1.01 1\n")
    content: dict[str, Any] = {"names": ["nut", "wire"]}
    for split, stems in splits.items():
        (folder / f"{split}.txt").write_text("".join(f"images/{stem}.png\n" for stem in stems))
        content[split] = f"{split}.txt"
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return folder / "data.yaml"


def world_of(folder: Path, pool: str, holdout: str, **same: str) -> World:
    """A world of one letter per image; `b="a"` makes b a copy of a."""
    colours = {stem: ord(same.get(stem, stem)) for stem in pool + holdout}
    return read_world(pictures(folder, {"train": list(pool), "val": list(holdout)}, colours), folder / "cache")


def test_images_are_numbered_by_name_and_boxes_clipped(tmp_path: Path) -> None:
    world = world_of(tmp_path, "cab", "xy")
    assert [(picture.task_id, picture.path.stem) for picture in world.pool] == [(1, "a"), (2, "b"), (3, "c")]
    assert [picture.task_id for picture in world.holdout] == [4, 5]
    assert world.pool[0].truth.boxes_yolo.tolist() == [[0.5, 0.5, 1.0, 1.0]]
    assert world.images_per_class == {"nut": 4, "wire": 1}


def test_a_class_in_few_images_is_rare_unless_others_are_named(tmp_path: Path) -> None:
    world = world_of(tmp_path, "abcdefghijklmnopqrs", "x")
    assert rare_classes(world, ()) == ["wire"]  # 1 of 20
    assert rare_classes(world, ("nut",)) == ["nut"]


def test_a_copy_of_a_holdout_image_is_no_part_of_the_pool(tmp_path: Path) -> None:
    world = world_of(tmp_path, "abc", "z", b="z")
    assert [picture.path.stem for picture in world.pool] == ["a", "c"]
    assert world.notes == ("1 images are copies of holdout images and left out of the pool: images/b.png",)


def test_an_image_in_val_and_in_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"images/b\.png is in val and outside of it"):
        world_of(tmp_path, "ab", "bc")


def test_a_dataset_without_val_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="`val` names no image"):
        world_of(tmp_path, "ab", "")


def test_a_holdout_without_a_box_is_refused_with_where_its_labels_are_looked_for(tmp_path: Path) -> None:
    data = pictures(tmp_path, {"train": ["a"], "val": ["b"]}, {"a": 1, "b": 2})
    (tmp_path / "labels" / "b.txt").unlink()
    with pytest.raises(BadRequest, match=r"no image of `val` has a box.*labels/b\.txt, which is not there"):
        read_world(data, tmp_path / "cache")


def test_a_broken_image_is_left_out_and_told(tmp_path: Path) -> None:
    data = pictures(tmp_path, {"train": ["a", "b"], "val": ["c"]}, {"a": 1, "b": 2, "c": 3})
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    world = read_world(data, tmp_path / "cache")
    assert [picture.path.stem for picture in world.pool] == ["a"]
    assert world.notes[0].startswith("1 images cannot be used: images/b.png: ")


def test_what_was_looked_at_once_is_read_back_until_a_file_changes(tmp_path: Path) -> None:
    looked: list[int] = []
    world_of(tmp_path, "ab", "c")
    world = read_world(tmp_path / "data.yaml", tmp_path / "cache", lambda done, total: looked.append(done))
    assert looked == []
    Image.new("RGB", (50, 50), "red").save(tmp_path / "images" / "a.png")
    changed = read_world(tmp_path / "data.yaml", tmp_path / "cache", lambda done, total: looked.append(done))
    assert looked == [1, 2, 3]
    assert world.pool[0].digest != changed.pool[0].digest
    assert world.pool_fingerprint != changed.pool_fingerprint


def test_near_duplicates_are_counted_against_what_came_before(tmp_path: Path) -> None:
    world = world_of(tmp_path, "abcde", "z", b="a", d="c")
    assert world.alike([1, 3, 4, 5], [2]) == [1, 4]  # a like b, which was labelled; d like c, earlier in the batch
    assert world.alike([1, 3, 5], []) == []


def test_the_oracle_remembers_the_order_and_answers_once(tmp_path: Path) -> None:
    oracle = Oracle(world_of(tmp_path, "abc", "z"))
    oracle.label([3, 1])
    assert oracle.asked == [3, 1]
    assert [picture.task_id for picture in oracle.labelled] == [1, 3]
    for wrong in (1, 4, 99):  # labelled already, of the holdout, of nobody
        with pytest.raises(ValueError, match="labelled already, or not in the pool"):
            oracle.label([wrong])


def test_seed_sets_differ_by_seed_and_not_by_arm(dataset: Path, tmp_path: Path) -> None:
    bench = Bench(plan_of(dataset, tmp_path, seeds=(0, 1)))
    first, other = bench._seed_set(0), bench._seed_set(1)
    assert len(set(first)) == len(set(other)) == 6
    assert set(first) != set(other)
    keys = {bench.round_0_key(arm.label, 0) for arm in bench.plan.arms}
    assert len(keys) == 1
    assert bench.round_0_key("random", 1) not in keys


@pytest.mark.parametrize(
    ("package", "is_trained_anew", "is_measured_anew"),
    [("torch", True, True), ("ultralytics", True, True), ("openvino", False, True), ("scikit-learn", False, False)],
)
def test_what_another_version_may_compute_otherwise_is_computed_anew(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, is_trained_anew: bool,
    is_measured_anew: bool,
) -> None:  # fmt: skip
    bench = Bench(plan_of(dataset, tmp_path, "k_center"))

    def names() -> tuple[str, str, Path]:
        found = bench.at(Step("k_center", 0, 0))
        assert found is not None
        training, choice, _ = found
        return training.key, training.evaluation_key, choice._file()

    before = names()
    assert names() == before
    installed = simulate.version
    monkeypatch.setattr(simulate, "version", lambda name: "99" if name == package else installed(name))
    trained, measured, chosen = names()
    assert (trained != before[0]) == is_trained_anew
    assert (measured != before[1]) == is_measured_anew
    assert chosen != before[2]


def test_arms_that_share_round_0_wait_for_one_of_them(dataset: Path, tmp_path: Path) -> None:
    schedule = Schedule(Bench(plan_of(dataset, tmp_path, "random,hybrid,k_center:epochs=2", seeds=(0, 1))))
    started: Iterator[Step] = iter(schedule.next_step, None)
    taken = []
    for step in started:
        schedule.start(step)
        taken.append(step)
    assert taken == [Step("random", 0, 0), Step("k_center:epochs=2", 0, 0), Step("random", 1, 0),
                     Step("k_center:epochs=2", 1, 0)]  # fmt: skip
    schedule.finish(taken[0])
    assert schedule.next_step() == Step("hybrid", 0, 0)
    assert schedule.cost(Step("random", 0, 1)) == pytest.approx((6 + 4) * 1 + 0.4 * len(schedule.bench.world.pool))
