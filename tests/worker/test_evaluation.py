"""worker.evaluation: numbers that can be checked by hand, and against ultralytics' own functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import ArtifactDamaged
from worker.evaluation import (
    IOU_THRESHOLDS,
    Detections,
    EvaluationArrays,
    Truth,
    average_precision,
    bootstrap_map50,
    box_iou,
    evaluate,
    match,
)


def detections_of(*images: list[tuple[list[float], float, int]], keys: list[int] | None = None) -> Detections:
    rows = [(index, *found) for index, image in enumerate(images) for found in image]
    return Detections(
        keys=np.array(keys or range(1, len(images) + 1), np.int64),
        image_index=np.array([row[0] for row in rows], np.int64),
        boxes_xyxy=np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
        confidences=np.array([row[2] for row in rows], np.float32),
        class_ids=np.array([row[3] for row in rows], np.int64),
        sizes=np.full((len(images), 2), 100, np.int64),
    )


def truth_of_images(*images: list[tuple[list[float], int]], keys: list[int] | None = None) -> Truth:
    rows = [(index, *drawn) for index, image in enumerate(images) for drawn in image]
    return Truth(
        keys=np.array(keys or range(1, len(images) + 1), np.int64),
        image_index=np.array([row[0] for row in rows], np.int64),
        boxes_xyxy=np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
        class_ids=np.array([row[2] for row in rows], np.int64),
    )


BOX = [10.0, 10.0, 20.0, 20.0]
FAR = [50.0, 50.0, 60.0, 60.0]


def test_iou_by_hand() -> None:
    iou = box_iou(np.array([BOX]), np.array([BOX, [15, 10, 25, 20], FAR]))
    assert iou[0] == pytest.approx([1.0, 50 / 150, 0.0], abs=1e-6)


def test_thresholds_are_those_of_coco() -> None:
    assert pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]) == IOU_THRESHOLDS.tolist()


def test_a_perfect_detection_gives_one() -> None:
    result = evaluate(detections_of([(BOX, 0.9, 0)]), truth_of_images([(BOX, 0)]))
    # 101-point interpolation ends at recall 1, where ultralytics' sentinel is 0: the last half step of .01 is lost
    assert result.map50 == pytest.approx(0.995)
    assert result.map50_95 == pytest.approx(0.995)
    assert result.arrays.tp.all()
    assert (result.n_images, result.n_boxes) == (1, {0: 1})


def test_a_detection_of_another_class_is_wrong() -> None:
    result = evaluate(detections_of([(BOX, 0.9, 1)]), truth_of_images([(BOX, 0)]))
    assert result.ap50 == {0: 0.0}
    assert not result.arrays.tp.any()


def test_iou_decides_up_to_which_threshold() -> None:
    shifted = [10.0, 10.0, 20.0, 17.0]  # IoU .7 with BOX
    result = evaluate(detections_of([(shifted, 0.9, 0)]), truth_of_images([(BOX, 0)]))
    assert result.arrays.tp[0].tolist() == [True] * 4 + [result.arrays.tp[0][4].item()] + [False] * 5
    assert result.map50 == pytest.approx(0.995)
    assert result.map50_95 == pytest.approx(0.0995 * result.arrays.tp[0].sum())


def test_a_second_detection_of_one_box_is_wrong() -> None:
    result = evaluate(detections_of([(BOX, 0.9, 0), (BOX, 0.8, 0)]), truth_of_images([(BOX, 0)]))
    assert result.arrays.tp[:, 0].tolist() == [True, False]


def test_the_best_unclaimed_box_is_taken() -> None:
    near = [10.0, 10.0, 20.0, 21.0]
    right = match(
        np.array([BOX, BOX], np.float32), np.array([0, 0]), np.array([near, BOX], np.float32), np.array([0, 0])
    )
    assert right[0].all()  # takes BOX, IoU 1
    assert right[1].tolist() == [True] * 9 + [False]  # takes what is left, IoU 10/11 = .909


def test_average_precision_by_hand() -> None:
    # right, wrong, right of 2: recall .5, .5, 1; envelope of precision 1 below recall .5, then 2/3, 0 at 1
    result = evaluate(
        detections_of([(BOX, 0.9, 0), ([70.0, 70.0, 80.0, 80.0], 0.8, 0), (FAR, 0.7, 0)]),
        truth_of_images([(BOX, 0), (FAR, 0)]),
    )
    by_hand = 0.49 * 1 + 0.01 * (1 + 2 / 3) / 2 + 0.49 * 2 / 3 + 0.01 * (2 / 3 + 0) / 2
    assert result.map50 == pytest.approx(by_hand, abs=1e-9)


def test_classes_without_truth_do_not_count() -> None:
    result = evaluate(detections_of([(BOX, 0.9, 0), (FAR, 0.9, 7)]), truth_of_images([(BOX, 0)]))
    assert result.ap50.keys() == {0}
    assert result.map50 == pytest.approx(0.995)


def test_a_class_never_detected_counts_as_zero() -> None:
    result = evaluate(detections_of([(BOX, 0.9, 0)]), truth_of_images([(BOX, 0), (FAR, 5)]))
    assert result.ap50 == pytest.approx({0: 0.995, 5: 0.0})
    assert result.map50 == pytest.approx(0.4975)
    assert result.n_boxes == {0: 1, 5: 1}


def test_only_images_in_truth_count() -> None:
    detections = detections_of([(BOX, 0.9, 0)], [(FAR, 0.95, 0)], keys=[11, 12])
    result = evaluate(detections, truth_of_images([(BOX, 0)], keys=[11]))
    assert result.map50 == pytest.approx(0.995)  # the wrong one on image 12 is not held against it
    assert result.n_images == 1
    assert result.arrays.keys.tolist() == [11]


def test_an_image_labelled_empty_counts() -> None:
    detections = detections_of([(BOX, 0.5, 0)], [(FAR, 0.95, 0)], keys=[11, 12])
    result = evaluate(detections, truth_of_images([(BOX, 0)], [], keys=[11, 12]))
    assert result.n_images == 2
    assert result.map50 == pytest.approx(0.5, abs=0.01)  # now the wrong one comes first: precision 1/2 throughout


def test_truth_of_images_never_measured_does_not_count() -> None:
    result = evaluate(detections_of([(BOX, 0.9, 0)], keys=[11]), truth_of_images([(BOX, 0)], [(BOX, 0)], keys=[11, 99]))
    assert result.map50 == pytest.approx(0.995)
    assert result.n_boxes == {0: 1}


def test_order_of_keys_does_not_matter() -> None:
    detections = detections_of([(BOX, 0.9, 0)], [(FAR, 0.8, 0)], keys=[30, 20])
    result = evaluate(detections, truth_of_images([(FAR, 0)], [(BOX, 0)], keys=[20, 30]))
    assert result.map50 == pytest.approx(0.995)
    assert result.arrays.keys.tolist() == [20, 30]


def test_a_box_drawn_twice_counts_once() -> None:
    result = evaluate(detections_of([(BOX, 0.9, 0)]), truth_of_images([(BOX, 0), (BOX, 0)]))
    assert result.n_boxes == {0: 1}
    assert result.map50 == pytest.approx(0.995)


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        (truth_of_images(), "No holdout image has been labelled yet"),
        (truth_of_images([]), "1 labelled holdout images hold no boxes"),
        (truth_of_images([(BOX, 0)], keys=[77]), "None of the 1 labelled holdout images is among the 1 measured"),
    ],
)
def test_nothing_to_measure_has_a_reason(truth: Truth, reason: str) -> None:
    result = evaluate(detections_of([(BOX, 0.9, 0)]), truth)
    assert (result.map50, result.map50_95, result.ap50) == (None, None, {})
    assert reason in result.reason


def test_corrected_truth_evaluates_the_same_detections_anew() -> None:
    detections = detections_of([(BOX, 0.9, 0)])
    before = evaluate(detections, truth_of_images([(FAR, 0)]))
    after = evaluate(Detections.load(detections.save()), truth_of_images([(BOX, 0)]))
    assert (before.map50, after.map50) == (0.0, pytest.approx(0.995))


def test_arrays_survive_the_file() -> None:
    detections = detections_of([(BOX, 0.9, 0)], [(FAR, 0.8, 2)])
    loaded = Detections.load(detections.save())
    for name, column in detections.arrays().items():
        assert np.array_equal(getattr(loaded, name), column), name
        assert getattr(loaded, name).dtype == column.dtype, name
    arrays = evaluate(detections, truth_of_images([(BOX, 0)], [])).arrays
    again = EvaluationArrays.load(arrays.save())
    assert again.tp.dtype == np.bool_
    assert np.array_equal(again.pred_img, [0, 1])
    assert arrays.save() == again.save()


@pytest.mark.parametrize("content", [b"", b"nonsense", truth_of_images([(BOX, 0)]).save()])
def test_a_damaged_file_is_named_so(content: bytes) -> None:
    with pytest.raises(ArtifactDamaged, match="Detections"):
        Detections.load(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.array([1, 1])}, "distinct"),
        ({"image_index": np.array([5])}, "0..1"),
        ({"image_index": np.array([0, 1])}, "equal lengths"),
        ({"boxes_xyxy": np.array([[0, 0, np.nan, 1]], np.float32)}, "finite"),
        ({"boxes_xyxy": np.zeros((1, 3), np.float32)}, r"\(m, 4\)"),
    ],
)
def test_impossible_truth_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    whole = {
        "keys": np.array([1, 2]),
        "image_index": np.array([0]),
        "boxes_xyxy": np.array([BOX], np.float32),
        "class_ids": np.array([0]),
    }
    with pytest.raises(ValueError, match=message):
        Truth(**whole | change)


def random_scene(seed: int) -> tuple[Detections, Truth]:
    rng = np.random.default_rng(seed)
    found, drawn = [], []
    for _ in range(int(rng.integers(1, 6))):
        boxes = rng.uniform(0, 80, (int(rng.integers(0, 7)), 2))
        boxes = np.hstack([boxes, boxes + rng.uniform(5, 20, boxes.shape)])
        drawn.append([(box.tolist(), int(rng.integers(0, 3))) for box in boxes])
        near = [box + rng.normal(0, 1.5, 4) for box in boxes for _ in range(int(rng.integers(0, 3)))]
        near = [box for box in near if box[2] > box[0] and box[3] > box[1]]
        conf = np.sort(rng.uniform(0, 1, len(near)))[::-1]
        classes = rng.integers(0, 4, len(near))
        found.append([(box.tolist(), float(c), int(k)) for box, c, k in zip(near, conf, classes, strict=True)])
    return detections_of(*found), truth_of_images(*drawn)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_map_is_a_share_and_falls_with_the_threshold(seed: int) -> None:
    detections, truth = random_scene(seed)
    result = evaluate(detections, truth)
    if result.map50 is None:
        assert len(truth.class_ids) == 0
        return
    assert 0 <= result.map50_95 <= result.map50 + 1e-12  # a mean of ten equal numbers may round above them
    assert result.map50 <= 1
    ap = average_precision(result.arrays, np.unique(truth.class_ids))
    assert (np.diff(ap, axis=1) <= 1e-12).all()


def test_equal_to_ultralytics_functions() -> None:
    """Its match_predictions and ap_per_class on 40 random scenes, to the last bit."""
    import torch

    from worker.detector import load_ultralytics

    load_ultralytics()
    from ultralytics.engine.validator import BaseValidator
    from ultralytics.utils.metrics import ap_per_class
    from ultralytics.utils.metrics import box_iou as theirs_iou

    class Matcher:
        iouv = torch.linspace(0.5, 0.95, 10)

    seen = 0
    for seed in range(40):
        detections, truth = random_scene(seed)
        result = evaluate(detections, truth)
        arrays = result.arrays
        tps = []
        for row in range(len(detections.keys)):
            here, there = detections.image_index == row, truth.image_index == row
            if not there.any() or not here.any():
                tps.append(np.zeros((int(here.sum()), 10), bool))
                continue
            iou = theirs_iou(torch.from_numpy(truth.boxes_xyxy[there]), torch.from_numpy(detections.boxes_xyxy[here]))
            pred, true = torch.from_numpy(detections.class_ids[here]), torch.from_numpy(truth.class_ids[there])
            tps.append(BaseValidator.match_predictions(Matcher(), pred, true, iou).numpy())
        assert np.array_equal(np.concatenate(tps), arrays.tp)
        if result.map50 is None:
            continue
        ap, classes = ap_per_class(arrays.tp, arrays.conf, arrays.pred_cls, arrays.target_cls)[5:7]
        assert list(result.ap50) == classes.tolist()
        assert list(result.ap50.values()) == ap[:, 0].tolist()
        assert result.map50_95 == pytest.approx(ap.mean(), abs=1e-12)
        seen += 1
    assert seen > 30


def drawn_again(arrays: EvaluationArrays, counts: np.ndarray) -> EvaluationArrays:
    """The evaluation of a list that holds image i `counts[i]` times."""
    found = np.repeat(np.arange(len(arrays.conf)), counts[arrays.pred_img])
    true = np.repeat(np.arange(len(arrays.target_cls)), counts[arrays.target_img])
    return EvaluationArrays(
        arrays.keys,
        arrays.tp[found],
        arrays.conf[found],
        arrays.pred_cls[found],
        arrays.pred_img[found],
        arrays.target_cls[true],
        arrays.target_img[true],
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_every_bootstrap_sample_is_the_map_of_the_images_it_drew(seed: int) -> None:
    arrays = evaluate(*random_scene(seed)).arrays
    if not len(arrays.target_cls):
        with pytest.raises(ValueError, match="at least one box"):
            bootstrap_map50([arrays], 4)
        return
    samples = bootstrap_map50([arrays], 8, seed=seed)
    n = len(arrays.keys)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=8)
    has_box = np.bincount(arrays.target_img, minlength=n) > 0
    for sample, drawn in zip(samples[:, 0], counts, strict=True):
        if not drawn @ has_box:
            continue  # such a sample is drawn again
        anew = drawn_again(arrays, drawn)
        assert sample == pytest.approx(average_precision(anew, np.unique(anew.target_cls))[:, 0].mean(), abs=1e-9)


def test_a_bootstrap_of_one_image_is_its_map() -> None:
    found = evaluate(detections_of([(BOX, 0.9, 0)]), truth_of_images([(BOX, 0), (FAR, 0)]))
    assert bootstrap_map50([found.arrays], 5)[:, 0].tolist() == pytest.approx([found.map50] * 5)


def test_the_spread_of_a_bootstrap_by_hand() -> None:
    # of 100 images with a box each, the detector finds every other one and is never wrong: mAP is the share found
    images = [[(BOX, 0.9, 0)] if index % 2 else [] for index in range(100)]
    arrays = evaluate(detections_of(*images), truth_of_images(*([(BOX, 0)] for _ in range(100)))).arrays
    samples = bootstrap_map50([arrays], 2000, seed=1)[:, 0]
    assert samples.std() == pytest.approx(np.sqrt(0.25 / 100), rel=0.1)  # a binomial share
    assert samples.mean() == pytest.approx(0.5, abs=0.01)


def test_the_bootstrap_is_paired() -> None:
    worse = [[(BOX, 0.9, 0)] if index % 2 else [] for index in range(60)]
    better = [[(BOX, 0.9, 0)] if index % 2 or index % 4 == 0 else [] for index in range(60)]
    truth = truth_of_images(*([(BOX, 0)] for _ in range(60)))
    rounds = [evaluate(detections_of(*images), truth).arrays for images in (worse, better, worse)]
    samples = bootstrap_map50(rounds, 600)
    assert samples.shape == (600, 3)
    assert (samples[:, 0] == samples[:, 2]).all()
    assert (samples[:, 1] >= samples[:, 0] - 1e-12).all()  # it finds all that the other finds, and more
    assert (bootstrap_map50(rounds, 600) == samples).all()


def test_a_bootstrap_needs_the_same_images() -> None:
    one = evaluate(detections_of([(BOX, 0.9, 0)], keys=[1]), truth_of_images([(BOX, 0)], keys=[1])).arrays
    other = evaluate(detections_of([(BOX, 0.9, 0)], keys=[2]), truth_of_images([(BOX, 0)], keys=[2])).arrays
    with pytest.raises(ValueError, match="the same images"):
        bootstrap_map50([one, other], 10)
    assert bootstrap_map50([], 10).shape == (10, 0)


def test_importing_and_running_it_loads_no_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "from worker.evaluation import Detections, Truth, evaluate\n"
        "import worker.descriptor, worker.detector, worker.training\n"
        "d = Detections(np.array([1]), np.array([0]), np.ones((1, 4), np.float32), np.ones(1, np.float32),"
        " np.array([0]), np.ones((1, 2), np.int64))\n"
        "evaluate(d, Truth(np.array([1]), np.array([0]), np.ones((1, 4), np.float32), np.array([0])))\n"
        "assert 'torch' not in sys.modules and 'ultralytics' not in sys.modules"
    )
    project = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=project
    )
    assert done.returncode == 0, done.stderr
