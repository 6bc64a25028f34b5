"""What a simulation found, by numbers that can be checked by hand, and the page that tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies.options import strategy_options
from worker.arms import parse_arms
from worker.evaluation import EvaluationArrays
from worker.simulate import Plan
from worker.simulation_report import batch_table, draw, headline, render
from worker.simulation_results import (
    _arm,
    _notes_on_pool,
    _samples,
    area,
    compare,
    curve,
    differences,
    labels_needed,
    labels_saved,
    mean_interval,
    other_draws,
)
from worker.uncertainty import BY_STRATEGY


def arm(label: str, draw: int = 1, **options: Any) -> dict[str, Any]:
    strategy = label.partition("@")[0].partition(":")[0]
    return {"label": label, "strategy": strategy, "draw": draw, "options": options, "overrides": {}}


def one_round(number: int, map50: float, arm_label: str = "") -> dict[str, Any]:
    batch = {
        "images": ["a.jpg"], "boxes": 10 * number, "empty_images": 0, "rare_images": number, "utilities": [],
        "near_duplicates": ["b.jpg"] if number == 2 else [], "tied": 7, "notes": [],
    }
    seconds = {"training": 60.0, "measuring": 1.0, "scoring": 2.0, "choosing": 3.0}
    return {
        "round": number, "labels": 50 + 100 * number, "boxes": 200 * (number + 1), "minutes": 10.0 * (number + 1),
        "map50": map50, "map50_95": map50 / 2, "rare_ap50": map50 / 4, "ap50": {"nut": map50}, "ap50_95": {},
        "batch": batch, "seconds": seconds, "note": "", "evaluation": f"{arm_label}-{number}",
    }


def results(curves: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Arm -> per seed, mAP50 of each round."""
    rounds = max(len(heights) for seeds in curves.values() for heights in seeds) - 1
    runs = [
        {"arm": label, "seed": seed, "rounds": [one_round(n, height, label) for n, height in enumerate(heights)]}
        for label, seeds in curves.items()
        for seed, heights in enumerate(seeds)
    ]
    data = {
        "data": "data.yaml", "classes": ["nut", "<b>bolt</b>"], "rare": ["nut"], "pool_images": 900,
        "holdout_images": 100, "images_per_class": {"nut": 40, "<b>bolt</b>": 900}, "pool_like_holdout": 0,
        "notes": [], "seed_set": "random", "seed_size": 50, "batch_size": 100, "rounds": rounds, "seeds": [0, 1],
        "seconds_per_image": 8.0, "seconds_per_box": 7.0, "base_weights": "yolo11n.yaml",
    }
    settings = {"epochs": 30, "imgsz": 160, "train_batch": 16, "nominal_batch": 64}
    arms = [arm(label, draw=int(label.partition("@")[2] or 1)) for label in curves]
    return {
        "command": "hardfirst simulate <script>", "complete": True, "failures": {}, "versions": {"numpy": "2"},
        "data": data, "settings": dict.fromkeys(curves, settings), "arms": arms, "runs": runs,
    }


RANDOM = [[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]]
HYBRID = [[0.1, 0.3, 0.36], [0.2, 0.5, 0.46]]


def test_the_interval_of_two_values_is_students() -> None:
    mean, low, high = mean_interval([0.1, 0.3])
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 12.7062 * 0.1, 0.2 + 12.7062 * 0.1), rel=1e-5)
    assert mean_interval([0.4]) == (0.4, None, None)


def test_an_area_is_the_mean_height_of_the_curve() -> None:
    rounds = [one_round(0, 0.0), one_round(1, 0.4), one_round(2, 0.6)]
    assert area(rounds) == pytest.approx((0.2 + 0.5) / 2)
    assert area(rounds[:1]) is None


def test_labels_needed_are_read_off_between_the_points() -> None:
    labels, heights = [100.0, 200.0, 300.0], [0.2, 0.4, 0.3]
    assert labels_needed(labels, heights, 0.3) == pytest.approx(150)
    assert labels_needed(labels, heights, 0.1) == 100
    assert labels_needed(labels, heights, 0.41) is None


def test_a_curve_is_the_mean_over_the_seeds_that_got_there() -> None:
    found = results({"random": [[0.1, 0.2, 0.3], [0.3, 0.4]]})
    points = curve(found, "random", "labels")
    assert [(point["x"], point["n"]) for point in points] == [(50, 2), (150, 2), (250, 1)]
    assert [point["mean"] for point in points] == pytest.approx([0.2, 0.3, 0.3])
    assert points[2]["low"] is None


def test_differences_are_paired_by_seed() -> None:
    found = differences(results({"random": RANDOM, "hybrid": HYBRID}), "hybrid", "random", {})
    assert [point["each"] for point in found] == [pytest.approx([0.1, 0.2]), pytest.approx([0.06, 0.06])]
    assert found[0]["mean"] == pytest.approx(0.15)
    assert found[0]["labels"] == 150
    assert (found[1]["low"], found[1]["high"]) == pytest.approx((0.06, 0.06))


def test_a_seed_that_only_one_side_has_does_not_count() -> None:
    found = differences(results({"random": RANDOM[:1], "hybrid": HYBRID}), "hybrid", "random", {})
    assert [point["each"] for point in found] == [pytest.approx([0.1]), pytest.approx([0.06])]


def test_the_holdouts_interval_is_of_the_mean_over_seeds() -> None:
    played = results({"random": [[0.1, 0.2]], "hybrid": [[0.1, 0.3]]})
    samples = {"hybrid-1": np.linspace(0.2, 0.4, 101), "random-1": np.full(101, 0.2)}
    (point,) = differences(played, "hybrid", "random", samples)
    assert (point["holdout_low"], point["holdout_high"]) == pytest.approx((0.005, 0.195))


def test_labels_saved_on_the_mean_curves() -> None:
    played = results({"random": [[0.1, 0.2, 0.3, 0.4]], "hybrid": [[0.1, 0.3, 0.5, 0.6]]})
    found = labels_saved(played, "hybrid", "random")
    assert [budget["baseline_needs"] for budget in found["budgets"]] == [pytest.approx(250), None, None]
    assert found["budgets"][0]["saved"] == pytest.approx(100)
    assert found["to_final"] == pytest.approx(200)  # halfway from 150 (.3) to 250 (.5)
    assert found["share_to_final"] == pytest.approx(200 / 350)


def test_labels_saved_are_of_the_seeds_that_both_have() -> None:
    lucky = [0.8, 0.8, 0.8, 0.9]  # a seed that hybrid has not played, or not to the end
    played = results({"random": [[0.1, 0.2, 0.3, 0.4], lucky], "hybrid": [[0.1, 0.3, 0.5, 0.6]]})
    assert labels_saved(played, "hybrid", "random")["to_final"] == pytest.approx(200)
    played = results({"random": [[0.1, 0.2, 0.3, 0.4], lucky], "hybrid": [[0.1, 0.3, 0.5, 0.6], lucky[:1]]})
    assert labels_saved(played, "hybrid", "random")["to_final"] == pytest.approx(200)


def test_what_an_arm_leaves_to_defaults_is_written_down() -> None:
    arms = tuple(parse_arms("hybrid_k_center:alpha=1,threshold=0.2"))
    plan = Plan(Path("data.yaml"), Path("out"), arms, (0,), rounds=1, batch_size=5, seed_size=5)
    played = _arm(plan, arms[0])["played"]
    assert played["options"] == {**strategy_options("hybrid_k_center"), "alpha": 1.0}
    assert played["reading"]["uncertainty_threshold"] == 0.2
    assert played["reading"]["uncertainty_aggregate"] == BY_STRATEGY["hybrid_k_center"].aggregate


def test_another_draw_of_random_is_the_noise() -> None:
    arms = [arm("random"), arm("hybrid", 2), arm("random@2", 2), arm("random@3", 3, suppress_duplicates=True)]
    assert other_draws(arms, "random") == ["random@2"]
    assert other_draws(arms[:2], "random") == []


def nothing_seen(_key: str) -> EvaluationArrays:
    """Two holdout images with a box each; nothing was found."""
    none, two = np.zeros(0, np.int64), np.array([0, 1])
    return EvaluationArrays(
        keys=two, tp=np.zeros((0, 10), bool), conf=np.zeros(0, np.float32), pred_cls=none, pred_img=none,
        target_cls=np.zeros(2, np.int64), target_img=two,
    )  # fmt: skip


def played() -> dict[str, Any]:
    found = results({"random": RANDOM, "random@2": [[0.1, 0.21, 0.3], [0.2, 0.31, 0.4]], "hybrid": HYBRID})
    found["comparison"] = compare(found, nothing_seen)
    return found


def test_the_comparison_finds_its_baseline_and_its_noise() -> None:
    comparison = played()["comparison"]
    assert (comparison["baseline"], comparison["noise_arms"]) == ("random", ["random@2"])
    assert comparison["areas"]["hybrid"]["difference"] == pytest.approx((0.065 + 0.115) / 2)
    assert comparison["areas"]["random@2"]["difference"] == pytest.approx(0.005)


def test_samples_of_the_holdout_are_paired_over_all_rounds() -> None:
    def seen(key: str) -> EvaluationArrays:
        """Four images with a box each; the first are found: one of them by random, three by hybrid."""
        found = 1 if key.startswith("random") else 3
        return EvaluationArrays(
            keys=np.arange(4), tp=np.ones((found, 10), bool), conf=np.full(found, 0.9, np.float32),
            pred_cls=np.zeros(found, np.int64), pred_img=np.arange(found), target_cls=np.zeros(4, np.int64),
            target_img=np.arange(4),
        )  # fmt: skip

    samples = _samples(results({"random": [[0.2, 0.3]], "hybrid": [[0.2, 0.6]]}), seen)
    assert set(samples) == {"random-0", "random-1", "hybrid-0", "hybrid-1"}
    assert samples["random-0"].tolist() == samples["random-1"].tolist()
    assert (samples["hybrid-1"] >= samples["random-1"] - 1e-12).all()  # on other holdouts they could cross


def test_the_headline_claims_no_more_than_two_seeds_allow() -> None:
    said = " ".join(headline(played()))
    assert "hybrid lies 9.0 points of mAP50 above random" in said
    assert "six seeds or more are needed for a claim" in said
    assert "another draw of random differs from it by +0.5 points" in said


def test_draws_that_differ_in_both_directions_are_not_called_quiet() -> None:
    draws = {"random@2": [[0.1, 0.3, 0.4], [0.2, 0.2, 0.3]], "random@3": [[0.1, 0.4, 0.5], [0.2, 0.3, 0.4]]}
    found = results({"random": RANDOM, **draws, "hybrid": [[0.1, 0.2, 0.3], [0.2, 0.31, 0.4]]})
    found["comparison"] = compare(found, None)
    assert found["comparison"]["areas"]["random@2"]["difference"] == pytest.approx(0)
    said = " ".join(headline(found))
    # on single seeds +7.5 and -7.5, +15 and 0 points
    assert "differs from it by +15.0 points over the curve at most and by 9.2 typically, on one seed" in said
    assert "Over the whole curve hybrid lies" in said  # no draw of random is the best of two arms
    assert render(found, draw(found), {}).count("(A/A: this is noise)") == len(draws)


def test_batches_are_told_one_by_one() -> None:
    rows = {row["label"]: row for row in batch_table(played())}
    assert rows["hybrid"]["rare_images"] == [1, 2]
    assert rows["hybrid"]["near_duplicates"] == [0, 1]
    assert rows["hybrid"]["tied"] == [7, 7]


def test_half_an_image_a_batch_is_not_told_as_none() -> None:
    found = results({"random": RANDOM, "hybrid": HYBRID})
    found["runs"][-1]["rounds"][2]["batch"]["near_duplicates"] = []  # of one of two seeds
    found["comparison"] = compare(found, None)
    assert "<td>0 · 0.5</td>" in render(found, draw(found), {})


def test_where_nothing_was_learned_no_arm_is_called_the_best() -> None:
    found = results({"random": [[0.0, 0.001]], "random@2": [[0.0, 0.002]], "hybrid": [[0.0, 0.009]]})
    found["comparison"] = compare(found, None)
    (said,) = headline(found)
    assert said.startswith("Nothing was learned: no arm came to an mAP50 of 0.01")


def test_the_page_says_from_where_on_all_arms_have_the_same_labels(tmp_path: Path) -> None:
    plan = Plan(tmp_path, tmp_path, (), (0,), rounds=3, batch_size=10, seed_size=10)
    assert _notes_on_pool(plan, 41) == []  # one is left
    assert _notes_on_pool(plan, 40)[0].startswith("Batch 3 takes the rest of the pool of 40")
    assert _notes_on_pool(plan, 25)[0].startswith("Batch 2 takes")


def test_the_page_holds_everything_and_trusts_nothing() -> None:
    found = played()
    page = render(found, draw(found), {"hybrid": _pixel()})
    assert page.count("data:image/png;base64,") == 4  # curves, differences, rare, batches
    assert page.count("data:image/jpeg;base64,") == 1
    assert "<script" not in page
    assert "hardfirst simulate &lt;script&gt;" in page
    assert "http:" not in page
    assert "https:" not in page


def _pixel() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()
