"""The truth that scripted annotators draw: splits of a YOLO dataset, and boxes as Label Studio takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from demo.oracle import everything_unlabelled, label_config, read_dataset, regions
from worker.boxes import LabelMap
from worker.dataset import truth_of
from worker.errors import BadRequest


def _write(root: Path, stems: dict[str, list[str]], **entries: object) -> Path:
    """Images 100 x 50 with these label lines, and a data.yaml with these entries."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem, lines in stems.items():
        Image.new("RGB", (100, 50)).save(root / "images" / f"{stem}.jpg")
        (root / "labels" / f"{stem}.txt").write_text("\n".join(lines))
    content = {"names": {0: "nut", 1: "bolt <M8>"}, **entries}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root / "data.yaml"


def _list(root: Path, name: str, stems: list[str]) -> str:
    (root / name).write_text("".join(f"images/{stem}.jpg\n" for stem in stems))
    return name


def test_train_is_labelled_and_pool_and_val_are_themselves(tmp_path: Path) -> None:
    stems = {"a": ["0 .5 .5 .2 .4"], "b": [], "c": ["1 .25 .5 .5 1"]}
    splits = {key: _list(tmp_path, f"{key}.txt", [stem]) for key, stem in (("train", "a"), ("pool", "b"), ("val", "c"))}
    found = read_dataset(_write(tmp_path, stems, **splits))
    assert found.names == ("nut", "bolt <M8>")
    assert [[image.path.stem for image in part] for part in (found.labelled, found.pool, found.holdout)] == [
        ["a"],
        ["b"],
        ["c"],
    ]
    assert found.labelled[0].boxes == ((0, 0.5, 0.5, 0.2, 0.4),)
    assert found.pool[0].boxes == ()


def test_without_a_pool_nine_tenths_of_train_become_it(tmp_path: Path) -> None:
    found = read_dataset(_write(tmp_path, {f"{index:02}": [] for index in range(20)}, train="images"))
    assert (len(found.labelled), len(found.pool), len(found.holdout)) == (2, 18, 0)


def test_everything_can_be_unlabelled(tmp_path: Path) -> None:
    found = everything_unlabelled(_write(tmp_path, {"b": [], "a": [], "c": []}, train="images"))
    assert [image.path.stem for image in found.pool] == ["a", "b", "c"]
    assert found.labelled == found.holdout == ()


def test_what_annotators_draw_comes_back_as_the_same_boxes(tmp_path: Path) -> None:
    found = everything_unlabelled(_write(tmp_path, {"c": ["1 .25 .5 .5 1", "0 .9 .1 .1 .2"]}, train="images"))
    config = label_config(found.names)
    drawn = regions(found.pool[0], found.names)
    assert drawn[0]["value"]["x"] == 0
    assert drawn[0]["value"]["width"] == 50
    label_map = LabelMap.from_config(config)
    assert label_map.labels == found.names
    truth = truth_of({"id": 1, "annotations": [{"id": 2, "result": drawn}]}, label_map)
    assert truth is not None
    assert truth.class_ids.tolist() == [1, 0]
    assert truth.boxes_yolo.ravel().tolist() == pytest.approx([0.25, 0.5, 0.5, 1.0, 0.9, 0.1, 0.1, 0.2])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[1, 2]", "must map train, val and names"),
        ("{names: [a]}", "neither `pool` nor `train`"),
        ("{train: images}", "`names` must list the classes"),
        ("{names: [a], train: nowhere}", "neither a folder of images nor a list"),
        ("{a: [", "cannot be read"),
    ],
)
def test_a_bad_data_yaml_is_refused_with_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(BadRequest, match=sentence):
        read_dataset(tmp_path / "data.yaml")


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="class 7, but there are 2 names"):
        read_dataset(_write(tmp_path, {"a": ["7 .5 .5 .1 .1"]}, train="images"))
