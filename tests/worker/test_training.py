"""worker.training: real, tiny trainings of yolov8n on drawn images."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from worker import training
from worker.detector import Detector, load_ultralytics, prepare_ultralytics, sha256_of
from worker.errors import DatasetUnusable, JobFenced, SettingsInvalid, TrainingFailed, WeightsUnavailable
from worker.training import Trained, TrainProgress, TrainRequest, check_dataset_size, train

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def tamed(tmp_path_factory: pytest.TempPathFactory) -> None:
    prepare_ultralytics(tmp_path_factory.mktemp("config"))


def write_squares(folder: Path, n_images: int = 8, names: tuple[str, ...] = ("nut", "bolt")) -> Path:
    """A dataset as worker.dataset writes it: one square of each class per image."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number in range(n_images):
        image = Image.fromarray(rng.integers(90, 120, (64, 96, 3), dtype=np.uint8))
        lines = []
        for class_id in range(len(names)):
            x, y = (int(value) for value in rng.integers(2, 40, 2))
            ImageDraw.Draw(image).rectangle([x, y, x + 20, y + 20], fill=("red", "blue", "lime")[class_id % 3])
            lines.append(f"{class_id} {(x + 10) / 96} {(y + 10) / 64} {20 / 96} {20 / 64}")
        image.save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text("\n".join(lines))
    content: dict[str, Any] = {"path": str(folder), "train": "images", "val": "images", "names": dict(enumerate(names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return folder / "data.yaml"


def request_for(dataset_yaml: Path, run_dir: Path, **changes: Any) -> TrainRequest:
    tiny = TrainRequest(
        dataset_yaml, run_dir, "yolov8n.yaml", epochs=2, imgsz=64, train_batch=4, device="cpu", threads=1
    )
    return dataclasses.replace(tiny, **changes)


class Reports(list[TrainProgress]):
    """Collects progress; raises `error` at the end of epoch `stop_at`."""

    def __init__(self, stop_at: int | None = None, error: BaseException | None = None) -> None:
        super().__init__()
        self.stop_at, self.error = stop_at, error or JobFenced()

    def __call__(self, now: TrainProgress) -> None:
        self.append(now)
        if now.epoch == self.stop_at:
            raise self.error

    @property
    def epochs(self) -> list[int]:
        return sorted({now.epoch for now in self})


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares") / "dataset")


@pytest.fixture(scope="module")
def done(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRequest, Trained, Reports]:
    """One finished training that several tests look at."""
    request = request_for(squares, tmp_path_factory.mktemp("done") / "run")
    reports = Reports()
    return request, train(request, reports), reports


def weights_of(file: Path) -> dict[str, Any]:
    load_ultralytics()
    import torch

    return dict(torch.load(file, weights_only=False)["model"].state_dict())


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_gives_a_detector(done: tuple[TrainRequest, Trained, Reports]) -> None:
    request, trained, _ = done
    assert trained.epochs_run == 2
    assert trained.names == {0: "nut", 1: "bolt"}
    assert trained.note == ""
    assert trained.seconds > 0
    assert trained.sha256 == sha256_of(trained.weights)
    detector = Detector.load(trained.weights, "cpu", trained.sha256, threads=1)
    assert detector.names == trained.names
    assert len(detector.score([Image.new("RGB", (96, 64))], 64)) == 1
    assert trained.weights.parent == request.run_dir.resolve()
    assert trained.weights.stat().st_size < 8e6  # stripped of the optimizer


@pytest.mark.slow
def test_progress_is_told_from_start_to_end(done: tuple[TrainRequest, Trained, Reports]) -> None:
    _, _, reports = done
    assert reports[0] == TrainProgress(0, 2, {}, None)
    assert reports.epochs == [0, 1, 2]
    assert reports[-1].eta_seconds == 0
    last = next(now for now in reports if now.epoch == 1 and now.losses)
    assert last.losses.keys() == {"box_loss", "cls_loss", "dfl_loss"}
    assert all(value > 0 for value in last.losses.values())
    assert last.eta_seconds is not None
    assert last.eta_seconds > 0


@pytest.mark.slow
def test_a_finished_training_is_not_repeated(done: tuple[TrainRequest, Trained, Reports]) -> None:
    request, trained, _ = done
    reports = Reports()
    assert train(request, reports) == trained
    assert reports == []


@pytest.mark.slow
def test_it_keeps_no_best_no_plots_and_no_second_copy(done: tuple[TrainRequest, Trained, Reports]) -> None:
    request, _, _ = done
    assert [file.name for file in request.run_dir.rglob("*") if file.suffix in (".pt", ".jpg", ".png", ".tmp")] == [
        training.CHECKPOINT
    ]


@pytest.mark.slow
def test_validation_never_runs_and_the_yamls_val_is_never_read(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.models.yolo.detect import DetectionValidator

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("validation ran")

    monkeypatch.setattr(DetectionValidator, "__call__", forbidden)
    content = yaml.safe_load(squares.read_text()) | {"val": "/nowhere/holdout", "download": "raise SystemExit"}
    (squares.parent / "odd.yaml").write_text(yaml.safe_dump(content))
    trained = train(request_for(squares.parent / "odd.yaml", tmp_path / "run", epochs=1), Reports())
    assert trained.epochs_run == 1


@pytest.mark.slow
def test_it_stays_off_the_network(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    train(request_for(squares, tmp_path / "run", epochs=1), Reports())
    assert tried == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(done: tuple[TrainRequest, Trained, Reports], tmp_path: Path) -> None:
    import torch

    request, trained, _ = done
    again = train(dataclasses.replace(request, run_dir=tmp_path / "again"), Reports())
    other = train(dataclasses.replace(request, run_dir=tmp_path / "other", seed=5), Reports())
    first, second, third = (weights_of(one.weights) for one in (trained, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.slow
def test_frozen_layers_do_not_learn(done: tuple[TrainRequest, Trained, Reports], tmp_path: Path) -> None:
    import torch

    request, trained, _ = done
    frozen = dataclasses.replace(request, run_dir=tmp_path / "run", weights=str(trained.weights), freeze=10)
    before, after = weights_of(trained.weights), weights_of(train(frozen, Reports()).weights)
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(int(layer) >= 10 for layer in changed)


# --- cancel and resume ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cancelled_training_goes_on_where_it_was(squares: Path, tmp_path: Path) -> None:
    request = request_for(squares, tmp_path / "run", epochs=4)
    stopped = Reports(stop_at=2)
    with pytest.raises(JobFenced):
        train(request, stopped)
    assert stopped.epochs == [0, 1, 2]
    assert not (tmp_path / "run" / training.CHECKPOINT).exists()
    resumed = Reports()
    trained = train(request, resumed)
    assert resumed[0].epoch == 2
    assert resumed.epochs == [2, 3, 4]
    assert trained.epochs_run == 4
    assert trained.note == ""
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_cancelled_after_the_last_epoch_only_the_end_is_left(squares: Path, tmp_path: Path) -> None:
    request = request_for(squares, tmp_path / "run")
    with pytest.raises(JobFenced):
        train(request, Reports(stop_at=2))
    reports = Reports()
    assert train(request, reports).epochs_run == 2
    assert reports == []


@pytest.mark.slow
def test_a_run_that_moved_with_its_dataset_goes_on(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "here" / "dataset")
    with pytest.raises(JobFenced):
        train(request_for(dataset, tmp_path / "here" / "run"), Reports(stop_at=1))
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = tmp_path / "there" / "dataset" / "data.yaml"
    moved.write_text(moved.read_text().replace("/here/", "/there/"))
    reports = Reports()
    trained = train(request_for(moved, tmp_path / "there" / "run"), reports)
    assert reports.epochs == [1, 2]
    assert trained.note == ""
    assert trained.weights.parent == tmp_path / "there" / "run"
    assert not (tmp_path / "here").exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"])
def test_a_broken_checkpoint_starts_anew_and_says_so(squares: Path, tmp_path: Path, content: bytes) -> None:
    request = request_for(squares, tmp_path / "run", epochs=2)
    with pytest.raises(JobFenced):
        train(request, Reports(stop_at=1))
    (tmp_path / "run" / "weights" / "last.pt").write_bytes(content)
    reports = Reports()
    trained = train(request, reports)
    assert reports.epochs == [0, 1, 2]
    assert "could not be read: training started anew" in trained.note


@pytest.mark.slow
def test_other_settings_or_data_start_anew_and_say_so(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "dataset")
    request = request_for(dataset, tmp_path / "run", epochs=2)
    with pytest.raises(JobFenced):
        train(request, Reports(stop_at=1))
    (tmp_path / "dataset" / "labels" / "0.txt").write_text("1 0.5 0.5 0.2 0.2")  # a corrected label
    reports = Reports()
    assert "other data or settings" in train(request, reports).note
    assert reports.epochs == [0, 1, 2]
    reports = Reports()
    assert "other data or settings" in train(dataclasses.replace(request, epochs=1), reports).note
    assert reports.epochs == [0, 1]


@pytest.mark.slow
def test_a_damaged_result_is_made_again(
    done: tuple[TrainRequest, Trained, Reports], tmp_path: Path
) -> None:
    request, _, _ = done
    shutil.copytree(request.run_dir, tmp_path / "run")
    (tmp_path / "run" / training.CHECKPOINT).write_bytes(b"damaged")
    reports = Reports()
    again = train(dataclasses.replace(request, run_dir=tmp_path / "run"), reports)
    assert reports.epochs == [0, 1, 2]
    assert sha256_of(again.weights) == again.sha256


@pytest.mark.slow
def test_killed_at_any_time_it_can_go_on(squares: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints, then the same call again in a new process."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from worker.training import TrainRequest, train\n"
        "data, run = map(Path, sys.argv[1:])\n"
        "tell = lambda now: print(now.epoch, flush=True)\n"
        "train(TrainRequest(data, run, 'yolov8n.yaml', epochs=12, imgsz=64, train_batch=4, device='cpu', threads=1),"
        " tell)\n"
    )
    command = [sys.executable, "-c", program, str(squares), str(tmp_path / "run")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert first.stdout is not None
    for line in first.stdout:
        if int(line) >= 2:
            break
    time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=PROJECT)
    epochs = [int(line) for line in second.stdout.split()]
    assert epochs[0] >= 2
    assert epochs[-1] == 12
    assert json.loads((tmp_path / "run" / "result.json").read_text())["note"] == ""


@pytest.mark.slow
def test_within_an_epoch_it_reports_too_and_can_be_stopped(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    reports = Reports()

    def stop_in_the_second_batch(now: TrainProgress) -> None:
        reports.append(now)
        if len(reports) == 3:  # start, first batch, second batch
            raise JobFenced

    with pytest.raises(JobFenced):
        train(request_for(squares, tmp_path / "run"), stop_in_the_second_batch)
    assert [now.epoch for now in reports] == [0, 0, 0]
    assert reports[0].losses == {}
    assert reports[1].losses.keys() == {"box_loss", "cls_loss", "dfl_loss"}
    first, second = reports[1].eta_seconds, reports[2].eta_seconds
    assert first is not None
    assert second is not None
    assert not (tmp_path / "run" / "weights" / "last.pt").exists()  # nothing to go on from before the first epoch ended


@pytest.mark.slow
def test_what_the_callback_raises_arrives_as_it_is(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^the lease's own trouble$"):
        train(request_for(squares, tmp_path / "run"), Reports(0, RuntimeError("the lease's own trouble")))


# --- what cannot be learned from ------------------------------------------------------------------------------------


def test_images_that_would_be_lost_are_named(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "dataset")
    (tmp_path / "dataset" / "labels" / "3.txt").write_text("7 0.5 0.5 0.1 0.1")
    (tmp_path / "dataset" / "images" / "5.png").write_bytes(b"not an image")
    with pytest.raises(DatasetUnusable, match=r"^2 of 8 training images cannot be used: 3\.png \(.*class 7.*; 5\.png"):
        train(request_for(dataset, tmp_path / "run"), Reports())


def test_a_listing_with_a_missing_image_names_it(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "dataset")
    listing = "".join(f"./images/{number}.png\n" for number in [0, 1, 2, 99])
    (tmp_path / "dataset" / "train.txt").write_text(listing)
    dataset.write_text(dataset.read_text().replace("train: images", "train: train.txt"))
    with pytest.raises(DatasetUnusable, match=r"1 of 4 training images cannot be used: 99\.png"):
        train(request_for(dataset, tmp_path / "run"), Reports())


def test_images_without_any_box_are_refused(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "dataset")
    for file in (tmp_path / "dataset" / "labels").iterdir():
        file.write_text("")
    with pytest.raises(DatasetUnusable, match="8 training images hold no boxes"):
        train(request_for(dataset, tmp_path / "run"), Reports())
    shutil.rmtree(tmp_path / "dataset" / "labels")
    with pytest.raises(DatasetUnusable, match="Nothing can be learned"):
        train(request_for(dataset, tmp_path / "run"), Reports())


def test_a_dataset_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "data.yaml"
    for content, message in [
        ("{not: yaml: at all", "cannot be read"),
        ("[1, 2]", "cannot be read"),
        ("train: images\nnames: {0: nut, 2: bolt}", r"must number its classes"),
        ("train: images\nnames: [nut]", "no training images"),
        ("train: elsewhere.txt\nnames: [nut]", "cannot be read"),
    ]:
        file.write_text(content)
        with pytest.raises(DatasetUnusable, match=message):
            train(request_for(file, tmp_path / "run"), Reports())
    with pytest.raises(DatasetUnusable, match="cannot be read"):
        train(request_for(tmp_path / "missing.yaml", tmp_path / "run"), Reports())
    assert not (tmp_path / "run").exists()


def test_weights_and_device_are_checked_before_anything_is_thrown_away(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"nowhere\.pt"):
        train(request_for(squares, tmp_path / "run", weights=str(tmp_path / "nowhere.pt")), Reports())
    with pytest.raises(SettingsInvalid, match="quantum"):
        train(request_for(squares, tmp_path / "run", device="quantum"), Reports())
    assert not (tmp_path / "run").exists()
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    with pytest.raises(WeightsUnavailable, match=r"bad\.pt"):
        train(request_for(squares, tmp_path / "run", weights=str(tmp_path / "bad.pt")), Reports())


def test_settings_that_leave_nothing_to_learn_are_explained(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="freeze=100 leaves no layer that learns"):
        train(request_for(squares, tmp_path / "run", freeze=100), Reports())


def test_a_last_step_of_one_image_is_explained(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "dataset", 5)
    with pytest.raises(TrainingFailed, match="Change train_batch by one"):
        train(request_for(dataset, tmp_path / "run", imgsz=32), Reports())


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), TrainingFailed, "train_batch=4, imgsz=64. Lower one"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), TrainingFailed, "Memory ran out"),
        (RuntimeError("Training failed: NaN persisted for 4 epochs"), TrainingFailed, "Lower lr0"),
        (OSError(28, "No space left on device"), TrainingFailed, "disk is full"),
        (RuntimeError("No valid images found in x"), DatasetUnusable, "No valid images"),
        (KeyError("odd"), TrainingFailed, r"Training failed \(KeyError\): 'odd'"),
    ],
)
def test_errors_become_sentences(error: Exception, kind: type[Exception], message: str, tmp_path: Path) -> None:
    explained = training._explained(error, request_for(tmp_path, tmp_path))
    assert type(explained) is kind
    with pytest.raises(kind, match=message):
        raise explained


def test_check_dataset_size() -> None:
    files = [Path(f"/d/images/{number}.png") for number in range(8)]
    check_dataset_size(files, reversed(files))
    with pytest.raises(DatasetUnusable, match=r"^1 of 8 training images cannot be used: 7\.png\. Correct"):
        check_dataset_size(files, files[:7])
    with pytest.raises(DatasetUnusable, match=r"7 of 8 .*: 1\.png \(blurred\); .*5\.png \(blurred\); and 2 more"):
        check_dataset_size(files, files[:1], lambda _: "blurred")


def test_without_any_effect_lr0_is_said_to_have_none(squares: Path, tmp_path: Path) -> None:
    run = training._Run(request_for(squares, tmp_path / "run", lr0=0.1), {0: "nut"}, [])
    assert run.notes == ["lr0=0.1 had no effect: with optimizer 'auto' ultralytics chooses it."]
    assert training._Run(request_for(squares, tmp_path / "run", lr0=0.1, optimizer="SGD"), {0: "nut"}, []).notes == []


# --- details --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = training._AtomicFile(tmp_path / "last.pt")
    file.write_bytes(b"first")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            file.write_bytes(b"second")
    assert file.read_bytes() == b"first"
    assert file.write_bytes(b"third") == 5
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".pt"] == ["last.pt"]
    assert file.read_bytes() == b"third"


def test_a_classifier_of_other_classes_is_not_copied_by_position() -> None:
    copied = training._copied_by_position
    assert copied({0: "cat", 1: "dog"}, {0: "nut", 1: "bolt"})
    assert not copied({0: "cat", 1: "Bolt "}, {0: "nut", 1: "bolt"})  # ultralytics goes by name then
    assert not copied({0: "cat", 1: "dog", 2: "cow"}, {0: "nut", 1: "bolt"})  # shapes differ: nothing is copied


@pytest.mark.slow
def test_a_classifier_of_other_classes_starts_afresh(
    done: tuple[TrainRequest, Trained, Reports], tmp_path: Path
) -> None:
    import torch

    _, trained, _ = done
    model = torch.load(trained.weights, weights_only=False)["model"].float()
    head = model.model[-1]
    box, old = head.cv2[0][-1].weight.clone(), head.cv3[0][-1].weight.clone()
    training._reset_classifier(model)
    assert torch.equal(head.cv2[0][-1].weight, box)
    assert not torch.equal(head.cv3[0][-1].weight, old)
    # ultralytics' prior: 5 objects per 640 x 640 image, over 2 classes, on a grid of stride 8
    assert head.cv3[0][-1].bias.tolist() == pytest.approx([np.log(5 / 2 / 80**2)] * 2, abs=1e-4)


def test_few_cores_and_daemons_read_images_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert training._workers() == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert training._workers() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert training._workers() == 8
    monkeypatch.setattr(training.multiprocessing, "current_process", lambda: type("P", (), {"daemon": True}))
    assert training._workers() == 0
