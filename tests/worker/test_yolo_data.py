"""Label files as people and tools write them; splits are in tests/demo/test_oracle.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.errors import BadRequest
from worker.yolo_data import label_path, read_dataset


def dataset(folder: Path, line: str) -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    (folder / "images" / "a.jpg").write_bytes(b"")
    (folder / "labels" / "a.txt").write_text(line)
    (folder / "pool.txt").write_text("images/a.jpg\n")
    (folder / "data.yaml").write_text("{names: [nut, bolt], pool: pool.txt}")
    return folder / "data.yaml"


def test_of_a_polygon_the_box_around_it_counts(tmp_path: Path) -> None:
    found = read_dataset(dataset(tmp_path, "1 0.25 0.5 0.75 0.25 0.5 1\n"))
    assert found.pool[0].boxes == ((1, 0.5, 0.625, 0.5, 0.75),)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0 .5 .5 .5", "is not `class x y width height`"),
        ("nut .5 .5 .5 .5", "is not `class x y width height`"),
        ("0 100 50 20 20", "outside 0..1: are these pixels"),
        ("0 nan .5 .5 .5", "outside 0..1"),
        ("-1 .5 .5 .5 .5", "class -1, but there are 2 names"),
    ],
)
def test_a_line_that_is_no_box_is_refused_with_its_file(tmp_path: Path, line: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=f"labels/a.txt: .*{sentence}"):
        read_dataset(dataset(tmp_path, line))


def test_labels_lie_beside_the_last_images_folder() -> None:
    assert label_path(Path("/images/x/images/y/a.b.png")) == Path("/images/x/labels/y/a.b.txt")


def split_dataset(folder: Path, content: str, split: str = "images/{}") -> Path:
    """One image with a box of class 1 in each split, `split` its folder, and this data.yaml."""
    for name in ("train", "valid"):
        image = folder / split.format(name) / f"{name}.jpg"
        for file in (image, label_path(image)):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("1 .5 .5 .5 .5")
    (folder / "data.yaml").write_text(content)
    return folder / "data.yaml"


def stems_and_classes(data_yaml: Path) -> list[tuple[str, list[int]]]:
    return [(image.path.stem, [box[0] for box in image.boxes]) for image in read_dataset(data_yaml).images]


BOTH = [("train", [1]), ("valid", [1])]
NAMES = "names: [nut, bolt]\n"


def test_an_export_of_roboflow_names_folders_beside_it_as_if_they_were_above(tmp_path: Path) -> None:
    content = f"train: ../train/images\nval: ../valid/images\n{NAMES}"
    assert stems_and_classes(split_dataset(tmp_path / "export", content, "{}/images")) == BOTH


def test_the_key_may_be_validation_and_path_relative_to_where_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_dataset(tmp_path / "here" / "parts", "")
    (tmp_path / "data.yaml").write_text(f"path: parts\ntrain: images/train\nvalidation: images/valid\n{NAMES}")
    monkeypatch.chdir(tmp_path / "here")
    assert stems_and_classes(tmp_path / "data.yaml") == BOTH


def test_a_list_may_be_written_on_windows_and_be_relative_to_the_dataset(tmp_path: Path) -> None:
    data = split_dataset(tmp_path, f"train: lists/train.txt\nval: lists/valid.txt\n{NAMES}")
    (tmp_path / "lists").mkdir()
    for name in ("train", "valid"):
        text = f"\ufeffimages/{name}/{name}.jpg\r\n\r\n"
        (tmp_path / "lists" / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "labels/train/train.txt").write_text("\ufeff1 .5 .5 .5 .5", encoding="utf-8")
    assert stems_and_classes(data) == BOTH


def test_a_list_that_is_no_utf8_is_refused_with_its_name(tmp_path: Path) -> None:
    data = split_dataset(tmp_path, f"train: train.txt\nval: images/valid\n{NAMES}")
    (tmp_path / "train.txt").write_bytes("images/é.jpg".encode("latin-1"))
    with pytest.raises(BadRequest, match=r"train\.txt cannot be read"):
        read_dataset(data)


def test_labels_lie_beside_the_name_of_a_link_not_beside_its_file(tmp_path: Path) -> None:
    data = split_dataset(tmp_path, f"train: train.txt\nval: images/valid\n{NAMES}")
    (tmp_path / "train.txt").write_text("images/train/train.jpg")
    image = tmp_path / "images" / "train" / "train.jpg"
    image.symlink_to(image.rename(tmp_path / "5d41402a.jpg"))
    assert stems_and_classes(data) == BOTH


def test_names_may_have_numbers_written_as_texts(tmp_path: Path) -> None:
    numbered = ", ".join(f"'{number}': c{number}" for number in range(11))
    data = split_dataset(tmp_path, f"train: images/train\nval: images/valid\nnames: {{{numbered}}}")
    assert read_dataset(data).names == tuple(f"c{number}" for number in range(11))


@pytest.mark.parametrize(
    "names", ["{1: nut, 2: bolt}", "{0: nut, 2: bolt}", "{nut: 0, bolt: 1}", "{0: nut, '0': bolt}"]
)
def test_names_that_would_give_classes_each_others_names_are_refused(tmp_path: Path, names: str) -> None:
    with pytest.raises(BadRequest, match="must number its 2 classes from 0 on"):
        read_dataset(split_dataset(tmp_path, f"train: images/train\nval: images/valid\nnames: {names}"))


def test_key_points_do_not_pass_for_polygons(tmp_path: Path) -> None:
    content = f"train: images/train\nval: images/valid\nkpt_shape: [2, 3]\n{NAMES}"
    with pytest.raises(BadRequest, match="key points"):
        read_dataset(split_dataset(tmp_path, content))
