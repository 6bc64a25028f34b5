"""The factory floor: exact boxes, the promised shares, the same pixels everywhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from demo import factory
from demo.factory import CLASSES, CONDITIONS, DRAWERS, RARE, RARE_IDS, Recipe, Scene, render, write_dataset

SIZE = (192, 144)  # small, so that this file stays quick
PLAIN = Recipe(burst_share=0.0, empty_share=0.0, condition_weights=(1, 0, 0, 0, 0), hard_link=None)


def factory_digest(index: int) -> str:
    image, scene = render(7, index, SIZE)
    return hashlib.sha256(image.tobytes() + repr(scene).encode()).hexdigest()


def test_classes_rare_and_drawers_agree() -> None:
    assert len(CLASSES) == 8
    assert set(RARE) == {"micro_crack", "surface_pit"}
    assert set(DRAWERS) == set(CLASSES)
    assert set(factory.RADIUS_SHARE) == set(CLASSES)


def test_same_seed_and_index_give_the_same_image_in_another_process() -> None:
    code = (
        "import hashlib; from demo.factory import render; image, scene = render(7, 11, (192, 144));"
        "print(hashlib.sha256(image.tobytes() + repr(scene).encode()).hexdigest())"
    )
    root = Path(factory.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == factory_digest(11)


def test_an_image_does_not_depend_on_those_rendered_before_it() -> None:
    forward = {index: factory_digest(index) for index in range(8)}
    factory._picture.cache_clear()
    factory._block.cache_clear()
    assert {index: factory_digest(index) for index in reversed(range(8))} == forward


def test_seeds_and_indexes_give_different_images() -> None:
    digests = {render(seed, index, SIZE)[0].tobytes() for seed in range(3) for index in range(10)}
    assert len(digests) == 30


@pytest.mark.parametrize("size", [(192, 144), (144, 192), (384, 288)])
def test_boxes_lie_inside_the_image_and_are_large_enough(size: tuple[int, int]) -> None:
    seen = 0
    for index in range(30):
        image, scene = render(3, index, size)
        assert image.size == size == scene.size
        assert image.mode == "RGB"
        assert len(scene.boxes_xyxy) == len(scene.class_ids)
        for x1, y1, x2, y2 in scene.boxes_xyxy:
            assert 0 <= x1 < x2 <= size[0]
            assert 0 <= y1 < y2 <= size[1]
            assert min(x2 - x1, y2 - y1) >= factory.MIN_SIDE
            seen += 1
    assert seen > 60


def test_boxes_touch_the_drawn_pixels_on_all_four_sides() -> None:
    """The owner map is the truth about pixels: every row and column at a box's border holds one of the object."""
    checked = 0
    for number in range(25):
        slot = factory._slot(5, number, PLAIN)
        picture = factory._picture(5, slot, SIZE, PLAIN)
        boxes = factory._boxes(picture.owner, len(picture.class_ids))
        for owner, box in enumerate(boxes, start=1):
            if box is None:
                continue
            x1, y1, x2, y2 = box
            mine = picture.owner == owner
            assert mine.sum() == mine[y1:y2, x1:x2].sum() > 0
            assert mine[y1].any()
            assert mine[y2 - 1].any()
            assert mine[:, x1].any()
            assert mine[:, x2 - 1].any()
            checked += 1
    assert checked > 40


def test_no_visible_object_is_left_without_a_box() -> None:
    """An unlabelled sliver of a bolt would teach a detector that bolts are floor."""
    painted = 0
    for index in range(150):
        slot = factory._slot(8, index, Recipe())
        picture = factory._picture(8, factory._Slot(slot.burst, 0, slot.rare_ids), SIZE, Recipe())
        _, scene = render(8, index, SIZE)
        assert len(scene.boxes_xyxy) == len(picture.class_ids)
        painted += len(picture.class_ids)
    assert painted > 450


def test_a_box_is_where_the_image_differs_from_the_empty_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paint a scene with and without its objects: flat defects cast no shadow, so the difference is the object."""
    flat = Recipe(rare_share=1.0, burst_share=0.0, objects=(1, 1), condition_weights=(1, 0, 0, 0, 0), hard_link=None)
    slot = factory._slot(2, 0, flat)
    full = factory._picture(2, slot, SIZE, flat)
    monkeypatch.setattr(factory, "_paint_things", lambda *args: ())
    factory._picture.cache_clear()
    empty = factory._picture(2, slot, SIZE, flat)
    factory._picture.cache_clear()
    differs = np.abs(full.canvas - empty.canvas).max(axis=2) > 0
    inside = np.zeros_like(differs)
    boxes = [box for box in factory._boxes(full.owner, len(full.class_ids)) if box is not None]
    assert boxes
    for x1, y1, x2, y2 in boxes:
        assert differs[y1:y2, x1:x2].any()
        inside[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = True  # one pixel of soft edge
    assert not (differs & ~inside).any()


def test_yolo_lines_by_hand() -> None:
    scene = Scene(0, 0, (200, 100), ((20, 10, 60, 30), (0, 0, 200, 100)), (3, 6), "day", 0)
    assert scene.yolo_lines() == ["3 0.200000 0.200000 0.200000 0.200000", "6 0.500000 0.500000 1.000000 1.000000"]
    assert scene.class_names == ("gear", "micro_crack")
    assert scene.stem == "factory_0_000000"


def test_each_rare_class_is_planned_in_exactly_one_of_25_images() -> None:
    slots = [factory._slot(9, index, Recipe()) for index in range(1000)]
    counts = Counter(class_id for slot in slots for class_id in slot.rare_ids)
    assert counts == dict.fromkeys(RARE_IDS, 40)


def test_rare_classes_really_show_in_about_four_percent() -> None:
    scenes = [render(4, index, SIZE)[1] for index in range(300)]
    for name in RARE:
        shown = sum(name in scene.class_names for scene in scenes)
        assert 9 <= shown <= 12  # 12 planned; a plank may hide one
    common = set(CLASSES) - set(RARE)
    for name in common:
        assert sum(name in scene.class_names for scene in scenes) > 75


def test_hard_link_ties_rare_classes_to_hard_conditions() -> None:
    rng = np.random.default_rng(0)
    linked = Counter(factory._choose_condition(rng, True, Recipe(hard_link=1.0)) for _ in range(400))
    assert linked["day"] == 0
    assert all(linked[name] > 60 for name in CONDITIONS[1:])
    free = Counter(factory._choose_condition(rng, True, Recipe(hard_link=None)) for _ in range(1000))
    assert 500 < free["day"] < 620  # weight .56


def test_conditions_follow_their_weights() -> None:
    only_night = Recipe(condition_weights=(0, 1, 0, 0, 0), hard_link=None)
    night = [render(1, index, SIZE, only_night) for index in range(12)]
    day = [render(1, index, SIZE, PLAIN) for index in range(12)]
    assert {scene.condition for _, scene in night} == {"night"}
    assert {scene.condition for _, scene in day} == {"day"}
    assert np.mean([np.asarray(image).mean() for image, _ in night]) < 90
    assert np.mean([np.asarray(image).mean() for image, _ in day]) > 110


def test_bursts_are_runs_of_three_to_six_frames_of_one_scene() -> None:
    slots = [factory._slot(6, index, Recipe()) for index in range(2000)]
    frames = Counter(slot.burst for slot in slots)
    assert set(frames.values()) == {1, 3, 4, 5, 6}
    in_bursts = sum(count for count in frames.values() if count > 1)
    assert in_bursts / 2000 == pytest.approx(0.35, abs=0.07)
    for index, slot in enumerate(slots):
        assert slot.burst + slot.frame == index
        assert not slot.rare_ids or frames[slot.burst] == 1


def test_frames_of_a_burst_are_near_duplicates_and_not_equal() -> None:
    first = next(i for i in range(200) if factory._slot(0, i + 1, Recipe()).frame == 1)
    (one, scene_one), (two, scene_two) = render(0, first), render(0, first + 1)
    (other, _), _ = render(0, first - 1), None
    assert scene_one.burst == scene_two.burst == first
    assert scene_one.condition == scene_two.condition
    assert one.tobytes() != two.tobytes()
    thumbnails = [np.asarray(image.resize((12, 9)), float) for image in (one, two, other)]
    assert np.abs(thumbnails[0] - thumbnails[1]).mean() < 0.5 * np.abs(thumbnails[0] - thumbnails[2]).mean()


def test_split_bursts_keeps_bursts_whole() -> None:
    bursts = [0, 0, 0, 3, 4, 5, 5, 5, 5, 9]
    parts = factory.split_bursts(bursts, seed=1)
    assert sorted(parts["train"] + parts["pool"] + parts["val"]) == list(range(10))
    owners = {name: {bursts[i] for i in positions} for name, positions in parts.items()}
    assert not owners["train"] & owners["val"]
    assert not owners["pool"] & owners["val"]
    assert not owners["train"] & owners["pool"]
    assert parts == factory.split_bursts(bursts, seed=1)
    for few in ([0, 0, 0], [0, 0, 2]):
        with pytest.raises(ValueError, match="ask for more images"):
            factory.split_bursts(few, seed=1)
    assert all(len(positions) == 1 for positions in factory.split_bursts([0, 1, 2], seed=3).values())


def test_write_dataset_writes_what_render_says(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = write_dataset(tmp_path / "floor", 40, 12, SIZE, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 40) for done in range(1, 41)]
    folder = path.parent
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["names"] == dict(enumerate(CLASSES))
    lists = {name: (folder / content[name]).read_text(encoding="utf-8").split() for name in ("train", "pool", "val")}
    listed = [line for lines in lists.values() for line in lines]
    assert len(listed) == len(set(listed)) == 40
    assert all((folder / line).is_file() for line in listed)
    assert len(list((folder / "images").iterdir())) == len(list((folder / "labels").iterdir())) == 40
    header, *rows = (folder / "scenes.tsv").read_text(encoding="utf-8").splitlines()
    assert header == "stem\tburst\tcondition\tclasses"
    burst_of = {row.split("\t")[0]: row.split("\t")[1] for row in rows}
    bursts = {name: {burst_of[Path(line).stem] for line in lines} for name, lines in lists.items()}
    assert not bursts["val"] & (bursts["pool"] | bursts["train"])
    image, scene = render(12, 23, SIZE)
    assert (folder / "labels" / f"{scene.stem}.txt").read_text(encoding="utf-8").splitlines() == scene.yolo_lines()
    assert rows[23].split("\t") == [scene.stem, str(scene.burst), scene.condition, ",".join(scene.class_names)]
    with Image.open(folder / "images" / f"{scene.stem}.jpg") as saved:
        difference = np.abs(np.asarray(saved, float) - np.asarray(image, float))
    assert difference.mean() < 5  # JPEG, not another picture


def test_bad_arguments_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed -1"):
        render(-1, 0)
    with pytest.raises(ValueError, match="96 pixels"):
        render(0, 0, (95, 200))
    with pytest.raises(ValueError, match=r"rare_share is 1\.5"):
        Recipe(rare_share=1.5)
    with pytest.raises(ValueError, match="objects is"):
        Recipe(objects=(4, 2))
    with pytest.raises(ValueError, match="condition_weights"):
        Recipe(condition_weights=(1.0,))
    with pytest.raises(ValueError, match="ask for more images"):
        write_dataset(tmp_path / "none", 1)
    assert not (tmp_path / "none").exists()
