import hashlib
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from worker.boxes import Control, LabelMap
from worker.dataset import TaskTruth, lost_labels, storable, truth_of, write_dataset
from worker.errors import DatasetUnusable, ImageUnusable, LabelStudioUnavailable

NAMES = ("nut", "bolt")
LABEL_MAP = LabelMap("label", "image", "image", NAMES)


def region(label="nut", x=10.0, y=20.0, width=30.0, height=40.0, rotation=0, **more):
    """A region as Label Studio 1.23.2 exports it."""
    return {
        "id": "r1",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 640,
        "original_height": 480,
        "image_rotation": 0,
        "value": {
            "x": x,
            "y": y,
            "width": width,
            "height": height,
            "rotation": rotation,
            "rectanglelabels": [label],
        },
        **more,
    }


def annotation(*regions, identity=1, updated="2026-11-23T08:32:26.105550Z", **more):
    return {
        "id": identity,
        "result": list(regions),
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2026-11-23T08:00:00.000000Z",
        "updated_at": updated,
        "lead_time": 3.1,
        "completed_by": 1,
        **more,
    }


def task_with(*annotations, identity=5):
    return {"id": identity, "data": {"image": "/data/upload/1/a.jpg"}, "annotations": list(annotations)}


# --- which annotation, which boxes


def test_a_task_by_hand():
    truth = truth_of(task_with(annotation(region(), region("bolt", 0, 0, 100, 50), identity=78)), LABEL_MAP)
    np.testing.assert_allclose(truth.boxes_yolo, [[0.25, 0.4, 0.3, 0.4], [0.5, 0.25, 1, 0.5]])
    assert truth.class_ids.tolist() == [0, 1]
    assert (truth.task_id, truth.annotation_id, truth.lead_time) == (5, 78, 3.1)
    assert (truth.width, truth.height, dict(truth.skipped)) == (640, 480, {})
    assert truth.updated_at == datetime(2026, 11, 23, 8, 32, 26, 105550, tzinfo=UTC)


@pytest.mark.parametrize(
    ("annotations", "chosen"),
    [
        ([annotation(identity=1, updated="2026-01-02T00:00:00Z"), annotation(identity=2)], 2),
        ([annotation(identity=2), annotation(identity=1)], 2),  # the same second: the higher id
        ([annotation(identity=1, updated="2026-12-01T00:00:00Z"), annotation(identity=2)], 1),
        ([annotation(identity=1, updated="2026-12-01T00:00:00Z"), annotation(identity=2, ground_truth=True)], 2),
        ([annotation(identity=1), annotation(identity=2, was_cancelled=True, ground_truth=True)], 1),
        ([annotation(identity=1), {"id": 2, "result": None}, "junk", None], 1),
        ([annotation(identity=1, updated="2026-11-23T10:00:00+09:00"), annotation(identity=2)], 2),  # 01:00 UTC
        ([annotation(identity=1, updated=None), annotation(identity=2, updated="not a date")], 2),
        ([annotation(identity=1, updated="2026-11-23T08:32:26"), annotation(identity=2, updated=None)], 1),
    ],
)
def test_one_annotation_is_chosen(annotations, chosen):
    assert truth_of(task_with(*annotations), LABEL_MAP).annotation_id == chosen


@pytest.mark.parametrize(
    "annotations",
    [[], None, "junk", {}, [annotation(region(), was_cancelled=True)], [{"id": 3}], [{"result": "junk"}], [None]],
)
def test_a_task_nobody_has_labelled_has_no_truth(annotations):
    assert truth_of({"id": 5, "annotations": annotations}, LABEL_MAP) is None
    assert truth_of({"id": 5}, LABEL_MAP) is None


def test_an_annotation_without_regions_is_background():
    truth = truth_of({"id": 5, "annotations": [{"result": []}]}, LABEL_MAP)
    assert truth.boxes_yolo.shape == (0, 4)
    assert (truth.annotation_id, truth.updated_at, truth.lead_time, truth.width) == (None, None, None, None)
    assert dict(truth.skipped) == {}


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (region("wire"), "label 'wire' is not in the config"),
        (region(from_name="other"), "another control"),
        (region(to_name="image2"), "another image"),
        (region(type="polygonlabels"), "not a rectangle"),
        (region(value=None), "not a rectangle"),
        (region(value={"rectanglelabels": ["nut"]}), "coordinates that are not numbers"),
        (region(x="10"), "coordinates that are not numbers"),
        (region(x=True), "coordinates that are not numbers"),
        (region(x=float("nan")), "coordinates that are not numbers"),
        (region(width=float("inf")), "coordinates that are not numbers"),
        (region(width=10**400), "coordinates that are not numbers"),
        (region(rotation="left"), "coordinates that are not numbers"),
        (region(width=0), "no area inside the image"),
        (region(x=100), "no area inside the image"),
        (region(x=-50), "no area inside the image"),
        (region(rotation=30, original_width=None), "rotated, and the size of the image is not given"),
        (region(value={"x": 1, "y": 1, "width": 1, "height": 1, "rectanglelabels": []}), "no label"),
        (region(value={"x": 1, "y": 1, "width": 1, "height": 1}), "no label"),
        (region(value={"x": 1, "y": 1, "width": 1, "height": 1, "rectanglelabels": [{}]}), "label '{}' is not in"),
        ({"type": "choices", "from_name": "quality", "value": {"choices": ["ok"]}}, "another control"),
        ("junk", "not a region"),
    ],
)
def test_regions_that_are_no_boxes_are_counted(odd, reason):
    truth = truth_of(task_with(annotation(odd, region("bolt"), odd)), LABEL_MAP)
    assert truth.class_ids.tolist() == [1]
    ((why, count),) = truth.skipped.items()
    assert why.startswith(reason)
    assert count == 2


def drawn(kind, from_name="other", to_name="image", labels=("outline",)):
    value = {"points": [[1, 1], [9, 1], [9, 9]], f"{kind}labels": list(labels)}
    return {"type": f"{kind}labels", "from_name": from_name, "to_name": to_name, "value": value}


@pytest.mark.parametrize(
    ("odd", "alone", "beside"),
    [
        (drawn("polygon"), True, False),  # of something else: the boxes beside it stand
        (drawn("polygon", labels=["nut"]), True, True),  # a nut that is no box: the image shows more than its boxes
        (drawn("brush", labels=["nut"]), True, True),
        (drawn("keypoint"), True, False),
        (drawn("polygon", to_name="image2", labels=["nut"]), False, False),  # on another image
        ({"type": "polygon", "from_name": "other", "to_name": "image", "value": {}}, True, False),
        (region("wire"), True, False),  # the label was renamed or taken away
        (region(from_name="renamed"), True, True),
        (region(x=100), True, False),  # nothing of it is visible
        (region(rotation=30, original_width=None), True, True),
        (region(x="10"), True, True),
        ({"type": "choices", "from_name": "quality", "to_name": "image", "value": {"choices": ["ok"]}}, False, False),
        ({"type": "textarea", "from_name": "note", "to_name": "image", "value": {"text": ["a"]}}, False, False),
        ({"type": "relation", "from_id": "a", "to_id": "b"}, False, False),
        ("junk", False, False),
    ],
)
def test_what_was_drawn_and_is_no_box_makes_no_background(odd, alone, beside):
    only = truth_of(task_with(annotation(odd)), LABEL_MAP)
    assert bool(only.unusable) == alone
    assert not len(only.class_ids)
    both = truth_of(task_with(annotation(region("bolt"), odd)), LABEL_MAP)
    assert bool(both.unusable) == beside
    assert both.class_ids.tolist() == [1]
    if alone:
        (reason,) = only.skipped
        assert only.unusable == (
            f"something is drawn on the image that is no box here: {reason} (1). It is not taken for background."
        )


def test_polygons_ellipses_and_several_controls_become_boxes():
    both = LabelMap(
        *("tool", "image", "image", ("nut", "bolt")),
        controls=(Control("tool", "polygon", ("nut",)), Control("round", "ellipse", ("bolt",))),
    )
    triangle = {"points": [[10, 10], [50, 20], [30, 90]], "polygonlabels": ["nut"]}
    round_one = {"x": 50, "y": 40, "radiusX": 10, "radiusY": 20, "rotation": 0, "ellipselabels": ["bolt"]}
    regions = [
        {**region(), "from_name": "tool", "type": "polygonlabels", "value": triangle},
        {**region(), "from_name": "round", "type": "ellipselabels", "value": round_one},
    ]
    truth = truth_of(task_with(annotation(*regions)), both)
    np.testing.assert_allclose(truth.boxes_yolo, [[0.3, 0.5, 0.4, 0.8], [0.5, 0.4, 0.2, 0.4]])
    assert truth.class_ids.tolist() == [0, 1]
    assert (dict(truth.skipped), truth.unusable) == ({}, "")
    swapped = [{**regions[0], "type": "ellipselabels"}, {**regions[1], "type": "polygonlabels"}]
    assert dict(truth_of(task_with(annotation(*swapped)), both).skipped) == {"not a polygon": 1, "not an ellipse": 1}


def test_an_unusable_truth_is_left_out_with_its_reason(tmp_path):
    good = truth_of(task_with(annotation(region("bolt"))), LABEL_MAP)
    bad = truth_of(task_with(annotation(drawn("polygon")), identity=6), LABEL_MAP)
    fetched = []

    def fetch(task_id):
        fetched.append(task_id)
        return JPEG

    report = write_dataset(tmp_path / "data", [bad, good], LABEL_MAP.labels, fetch)
    assert (report.n_images, report.n_background) == (1, 0)
    assert dict(report.left_out) == {6: bad.unusable}
    assert fetched == [5]


def test_boxes_are_clipped_and_rotations_become_hulls():
    truth = truth_of(
        task_with(
            annotation(
                region(x=90, y=-10, width=30, height=20),
                region(x=50, y=50, width=30, height=20, rotation=90, original_width=1000, original_height=500),
            )
        ),
        LABEL_MAP,
    )
    # second: corner (500, 250), 300 x 100 pixels; turned it covers x 400..500, y 250..500 (550 before clipping)
    np.testing.assert_allclose(truth.boxes_yolo, [[0.95, 0.05, 0.1, 0.1], [0.45, 0.75, 0.1, 0.5]], atol=1e-12)


def test_a_region_with_two_labels_is_two_boxes():
    both = region()
    both["value"]["rectanglelabels"] = ["bolt", "nut", "wire"]
    truth = truth_of(task_with(annotation(both)), LABEL_MAP)
    assert truth.class_ids.tolist() == [1, 0]
    assert dict(truth.skipped) == {"label 'wire' is not in the config": 1}


@pytest.mark.parametrize("identity", [None, "7", 1.5, True, float("nan")])
def test_a_task_without_an_id_is_no_export(identity):
    with pytest.raises(DatasetUnusable, match="JSON export"):
        truth_of({"id": identity, "annotations": []}, LABEL_MAP)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {
            "type": st.just("rectanglelabels"),
            "from_name": st.just("label"),
            "to_name": st.just("image"),
            "original_width": json_values,
            "original_height": json_values,
            "value": st.fixed_dictionaries(
                {"rectanglelabels": st.just(["nut"]) | json_values},
                optional=dict.fromkeys(("x", "y", "width", "height", "rotation"), json_values),
            ),
        }
    )
    | json_values,
    json_values,
    json_values,
)
def test_nothing_in_an_export_breaks_it(odd, when, lead_time):
    truth = truth_of(task_with(annotation(odd, updated=when, lead_time=lead_time)), LABEL_MAP)
    assert len(truth.boxes_yolo) == len(truth.class_ids)
    assert ((truth.boxes_yolo >= 0) & (truth.boxes_yolo <= 1)).all()


# --- on disk


def picture(width=64, height=48, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def stored(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


JPEG = stored(picture())


def truth(task_id, boxes=((0.5, 0.5, 0.2, 0.4),), class_ids=None):
    ids = [0] * len(boxes) if class_ids is None else class_ids
    return TaskTruth(task_id, np.array(boxes, dtype=float).reshape(-1, 4), np.array(ids, dtype=np.int64))


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_dataset_by_hand(tmp_path):
    images = {1: JPEG, 2: stored(picture(), "PNG"), 3: JPEG}
    seen = []
    report = write_dataset(
        tmp_path / "round 1" / "data",
        [truth(1, [(0.5, 0.5, 0.2, 0.4), (0.25, 0.125, 0.5, 0.25)], [1, 0]), truth(2, class_ids=[1]), truth(3, [])],
        NAMES,
        images.__getitem__,
        progress=lambda done, total: seen.append((done, total)),
    )
    folder = tmp_path / "round 1" / "data"
    assert files_below(folder) == [
        "data.yaml", "images/1.jpg", "images/2.png", "images/3.jpg", "labels/1.txt", "labels/2.txt", "labels/3.txt",
    ]  # fmt: skip
    assert (folder / "labels/1.txt").read_text() == (
        "1 0.50000000 0.50000000 0.20000000 0.40000000\n0 0.25000000 0.12500000 0.50000000 0.25000000\n"
    )
    assert (folder / "labels/3.txt").read_text() == ""
    assert (folder / "images/1.jpg").read_bytes() == JPEG
    assert yaml.safe_load((folder / "data.yaml").read_text()) == {
        "path": str(folder), "train": "images", "val": "images", "names": {0: "nut", 1: "bolt"},
    }  # fmt: skip
    assert report.yaml == folder / "data.yaml"
    assert (report.n_images, report.n_boxes, report.n_background) == (3, 3, 1)
    assert report.boxes_per_class == {"nut": 1, "bolt": 2}
    assert report.left_out == {}
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_names_of_any_kind_survive_the_yaml(tmp_path):
    names = ["yes", "1", "ä: ö", "# none", "a\nb"]
    report = write_dataset(tmp_path / "d", [truth(1, class_ids=[4])], names, lambda _: JPEG)
    assert yaml.safe_load(report.yaml.read_text(encoding="utf-8"))["names"] == dict(enumerate(names))


def test_the_folder_is_new_each_time(tmp_path):
    folder = tmp_path / "d"
    write_dataset(folder, [truth(1), truth(2)], NAMES, lambda _: JPEG)
    (folder / "labels.cache").write_text("stale")
    write_dataset(folder, [truth(3)], NAMES, lambda _: JPEG)
    assert files_below(folder) == ["data.yaml", "images/3.jpg", "labels/3.txt"]
    assert os.listdir(tmp_path) == ["d"]


def test_when_writing_fails_the_old_folder_stays(tmp_path):
    folder = tmp_path / "d"
    write_dataset(folder, [truth(1)], NAMES, lambda _: JPEG)

    def away(task_id):
        raise LabelStudioUnavailable

    with pytest.raises(LabelStudioUnavailable):
        write_dataset(folder, [truth(2)], NAMES, away)
    assert files_below(folder) == ["data.yaml", "images/1.jpg", "labels/1.txt"]
    assert os.listdir(tmp_path) == ["d"]


def test_a_broken_image_is_left_out_with_its_reason(tmp_path):
    def fetch(task_id):
        if task_id == 2:
            raise ImageUnusable("the file is gone")
        return {1: JPEG, 3: JPEG[:200], 4: b"", 5: b"hello", 6: stored(picture(9, 40), "PNG")}[task_id]

    report = write_dataset(tmp_path / "d", [truth(number) for number in range(1, 7)], NAMES, fetch)
    assert files_below(tmp_path / "d") == ["data.yaml", "images/1.jpg", "labels/1.txt"]
    assert report.left_out[2] == "the file is gone"
    assert "cut short" in report.left_out[3]
    assert "0 bytes" in report.left_out[4]
    assert "not an image" in report.left_out[5]
    assert "9 x 40" in report.left_out[6]
    assert (report.n_images, report.n_boxes) == (1, 1)


@pytest.mark.parametrize(
    ("truths", "image", "says"),
    [
        ([], JPEG, "No task is labelled"),
        ([truth(1), truth(2)], b"hello", "None of 2 labelled images can be used. Task 1: it is not an image"),
        ([truth(1, []), truth(2, [])], JPEG, "no box in 2 labelled images"),
    ],
)
def test_nothing_to_learn_from_says_so(tmp_path, truths, image, says):
    with pytest.raises(DatasetUnusable, match=says):
        write_dataset(tmp_path / "d", truths, NAMES, lambda _: image)
    assert os.listdir(tmp_path) == []


def test_a_class_id_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task 1 has class ids \[2\] of 2"):
        write_dataset(tmp_path / "d", [truth(1, class_ids=[2])], NAMES, lambda _: JPEG)


def test_too_many_pixels_leave_an_image_out(tmp_path):
    images = {1: JPEG, 2: stored(picture(640, 480))}
    report = write_dataset(tmp_path / "d", [truth(1), truth(2)], NAMES, images.__getitem__, max_pixels=64 * 48)
    assert list(report.left_out) == [2]


# --- images as the trainer will leave them alone


def turned(orientation, kind="JPEG", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(picture(), kind, exif=exif, **options)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (JPEG, ".jpg"),
        (turned(1), ".jpg"),
        (stored(picture().convert("L")), ".jpg"),
        (stored(picture(), progressive=True), ".jpg"),
        (stored(picture(), "PNG"), ".png"),
        (stored(picture().convert("L"), "PNG"), ".png"),
    ],
)
def test_good_bytes_are_kept_as_they_are(content, suffix):
    assert storable(content) == (content, suffix)


def flipped_checksum(png):
    """A PNG whose pixels have a wrong checksum: decodes, but does not verify."""
    at = png.index(b"IDAT")
    end = at + 4 + int.from_bytes(png[at - 4 : at], "big")
    return png[:end] + bytes([png[end] ^ 255]) + png[end + 1 :]


@pytest.mark.parametrize(
    ("content", "suffix", "size"),
    [
        (turned(3), ".jpg", (64, 48)),
        (turned(6), ".jpg", (48, 64)),
        (turned(6, "PNG"), ".png", (48, 64)),
        (turned(8, "WEBP", lossless=True), ".png", (64, 48)),  # not turned: Chromium does not either
        (JPEG + b"trailing", ".jpg", (64, 48)),
        (stored(picture().convert("CMYK")), ".jpg", (64, 48)),
        (stored(picture().convert("RGBA"), "PNG"), ".png", (64, 48)),
        (stored(picture().quantize(16), "PNG"), ".png", (64, 48)),
        (stored(picture().convert("1"), "PNG"), ".png", (64, 48)),
        (stored(Image.fromarray(np.full((48, 64), 0x8000, dtype=np.uint16)), "PNG"), ".png", (64, 48)),
        (stored(picture(), "GIF"), ".png", (64, 48)),
        (stored(picture(), "BMP"), ".png", (64, 48)),
        (stored(picture(), "TIFF"), ".png", (64, 48)),
        (stored(picture(), xmp=b'<x:xmpmeta tiff:Orientation="6"/>'), ".jpg", (64, 48)),
        (flipped_checksum(stored(picture(), "PNG")), ".png", (64, 48)),
    ],
)
def test_other_bytes_are_written_anew_without_orientation(content, suffix, size):
    written, actual_suffix = storable(content)
    assert actual_suffix == suffix
    image = Image.open(io.BytesIO(written))
    image.load()
    assert (image.size, image.mode) == (size, "RGB")
    assert image.format == {".jpg": "JPEG", ".png": "PNG"}[suffix]
    assert image.getexif().get(0x0112, 1) == 1
    assert storable(written) == (written, suffix)  # nothing left to change


def test_a_turned_photo_shows_the_same_pixels():
    content = turned(6, quality=95, subsampling=0)
    expected = picture().transpose(Image.Transpose.ROTATE_270)
    written, _ = storable(content)
    difference = np.abs(np.asarray(Image.open(io.BytesIO(written)), dtype=int) - np.asarray(expected, dtype=int))
    assert difference.mean() < 4  # two JPEG compressions


TRAINER_CHECK = """
import json, sys
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
data = check_det_dataset(sys.argv[1], autodownload=False)
dataset = YOLODataset(img_path=data["train"], data=data, task="detect", augment=False, imgsz=64, batch_size=4)
found = {}
for label in dataset.labels:
    name = label["im_file"].rsplit("/", 1)[1]
    found[name] = [list(label["shape"]), label["bboxes"].tolist(), label["cls"].ravel().tolist()]
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
def test_the_trainer_takes_every_image_and_changes_none(tmp_path):
    images = {
        1: JPEG, 2: turned(6), 3: JPEG + b"trailing", 4: stored(picture().convert("CMYK")), 5: stored(picture(), "GIF"),
        6: turned(8, "PNG"), 7: flipped_checksum(stored(picture(), "PNG")), 8: stored(picture(10, 10), "PNG"),
    }  # fmt: skip
    corner = [(0.05, 0.05, 0.1, 0.1), (0.999999, 0.5, 0.000002, 1.0)]
    truths = [truth(number, corner, [1, 0]) for number in range(1, 8)] + [truth(8, [])]
    report = write_dataset(tmp_path / "d", truths, NAMES, images.__getitem__)
    assert report.left_out == {}
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "d/images").iterdir()}
    environment = os.environ | {
        "YOLO_CONFIG_DIR": str(tmp_path / "config"), "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TRAINER_CHECK, str(report.yaml)],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    assert sorted(found) == [
        "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.png", "6.png", "7.png", "8.png",
    ]  # fmt: skip
    assert found["2.jpg"][0] == [64, 48]
    np.testing.assert_allclose(found["1.jpg"][1], corner, atol=1e-6)
    assert found["1.jpg"][2] == [1.0, 0.0]
    assert found["8.png"][2] == []
    after = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "d/images").iterdir()}
    assert after == before


# --- labels that are not in the config any more -----------------------------------------------------------------------


def test_a_renamed_label_keeps_its_boxes_when_the_new_one_names_the_old():
    renamed = LabelMap("label", "image", "image", ("screw", "bolt"), {"screw": ("nut", "n.u.t.")})
    truth = truth_of(task_with(annotation(region("nut"), region("Nut "), region("bolt"))), renamed)
    assert truth.class_ids.tolist() == [0, 0, 1]
    assert (truth.skipped, lost_labels([truth])) == ({}, "")


def test_boxes_without_a_label_in_the_config_are_told_by_name_and_number():
    today = LabelMap("label", "image", "image", ("bolt",))
    some = truth_of(task_with(annotation(region("nut"), region("nut"), region("bolt"))), today)
    none_left = truth_of(task_with(annotation(region("nut"), region("wire")), identity=6), today)
    assert (some.class_ids.tolist(), some.unusable) == ([0], "")
    assert none_left.unusable  # it is no background: something was drawn on it
    told = lost_labels([some, none_left, truth_of(task_with(annotation(region("bolt")), identity=7), today)])
    assert told.startswith("4 boxes on 2 images bear labels that the label config does not have ('nut', 'wire'): ")
    assert "predicted_values" in told
