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
