from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from worker.dataset import TaskTruth
from worker.downloads import DatasetParts, dataset_zip
from worker.errors import ImageUnusable, LabelStudioUnavailable

NAMES = ("bolt", "<img src=x onerror=alert(1)>\u202e")


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 30, 30)).save(content, "JPEG")
    return content.getvalue()


def truth(task_id: int, *class_ids: int) -> TaskTruth:
    boxes = np.tile([0.5, 0.5, 0.25, 0.5], (len(class_ids), 1)).reshape(-1, 4)
    return TaskTruth(task_id, boxes, np.array(class_ids, dtype=np.int64))


def parts(fetch: Any = lambda _: jpeg(), **changed: Any) -> DatasetParts:
    truths = [truth(1, 0, 1), truth(2), truth(3, 1)]
    values = {"folders": {1: "train", 2: "train", 3: "holdout"}, "left_out": {9: "a twin"}, **changed}
    return DatasetParts(names=NAMES, truths=truths, fetch=fetch, max_pixels=10_000, **values)


def unpacked(pieces: list[bytes]) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(b"".join(pieces)))


def test_the_zip_is_a_yolo_dataset() -> None:
    packed = unpacked(list(dataset_zip(parts())))
    assert packed.testzip() is None
    assert sorted(packed.namelist()) == [
        "data.yaml",
        "images/holdout/3.jpg",
        "images/train/1.jpg",
        "images/train/2.jpg",
        "labels/holdout/3.txt",
        "labels/train/1.txt",
        "labels/train/2.txt",
        "left_out.json",
    ]
    assert yaml.safe_load(packed.read("data.yaml")) == {
        "train": "images/train", "val": "images/holdout", "names": {0: NAMES[0], 1: NAMES[1]},
    }  # fmt: skip
    first = "0 0.50000000 0.50000000 0.25000000 0.50000000\n"
    assert packed.read("labels/train/1.txt").decode() == first + "1" + first[1:]
    assert packed.read("labels/train/2.txt") == b""
    assert packed.read("images/train/1.jpg") == jpeg()
    assert json.loads(packed.read("left_out.json")) == {"9": "a twin"}


def test_equal_datasets_are_equal_files() -> None:
    assert b"".join(dataset_zip(parts())) == b"".join(dataset_zip(parts()))


def test_an_image_that_cannot_be_used_is_left_out_with_its_reason() -> None:
    def fetch(task_id: int) -> bytes:
        if task_id == 1:
            raise ImageUnusable("404 for it")
        return b"no image" if task_id == 2 else jpeg()

    packed = unpacked(list(dataset_zip(parts(fetch))))
    told = json.loads(packed.read("left_out.json"))
    assert told["1"] == "404 for it"
    assert set(told) == {"1", "2", "9"}
    assert [name for name in packed.namelist() if name.startswith("images")] == ["images/holdout/3.jpg"]
    assert [name for name in packed.namelist() if name.startswith("labels")] == ["labels/holdout/3.txt"]


def test_somebody_away_leaves_no_zip_that_looks_whole() -> None:
    def fetch(task_id: int) -> bytes:
        if task_id == 2:
            raise LabelStudioUnavailable("Label Studio does not answer")
        return jpeg()

    pieces: list[bytes] = []
    with pytest.raises(LabelStudioUnavailable):
        pieces.extend(dataset_zip(parts(fetch)))
    with pytest.raises(zipfile.BadZipFile):
        unpacked(pieces)


def test_no_more_than_one_image_waits_at_a_time(tmp_path: Path) -> None:
    """Whatever the dataset's size: each piece holds one image and its labels."""
    size = len(jpeg())
    assert max(len(piece) for piece in dataset_zip(parts())) < 2 * size + 1000
