"""`hardfirst score`: a real detector of random weights on generated images, from files to the results."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars
import pytest
from PIL import Image

from backend.score_command import summary
from demo.factory import render
from strategies import STRATEGIES
from worker import offline
from worker.detector import Detector, sha256_of
from worker.errors import BadRequest, Conflict, LabelConfigUnsupported, LabelMismatch, WeightsUnavailable
from worker.image_sources import ImageReader, check_references, find_images, printable, reference_of
from worker.offline import Request, rank
from worker.offline_results import write_results
from worker.offline_scores import folder_of_one
from worker.settings import ProjectSettings, Settings
from worker.uncertainty import measures_of

SIZE = (128, 96)
N_IMAGES = 12
IMGSZ = 64
CLASSES = ("bolt", "nut", '<script>alert("1")</script>')

Run = Callable[..., offline.Ranking]
WriteWeights = Callable[[Path, int, tuple[str, ...]], Path]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, write_weights: WriteWeights) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "current.pt", 1, CLASSES)


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    return [render(3, index, SIZE)[0] for index in range(N_IMAGES)]


@pytest.fixture
def folder(tmp_path: Path, drawn: list[Image.Image]) -> Path:
    """Twelve images in two folders, and what is no image of the pool."""
    root = tmp_path / "pool"
    for index, image in enumerate(drawn):
        file = root / ("night" if index % 2 else "day") / f"{index:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=90)
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    drawn[0].save(root / ".hidden" / "thumb.jpg")
    return root


@pytest.fixture
def run(weights: Path, folder: Path, tmp_path: Path) -> Run:
    """Rank `folder` by `weights`, but for what is said otherwise."""

    def run(**changes: Any) -> offline.Ranking:
        given = {"sources": (str(folder),), "weights": (weights,), "k": 4, "imgsz": IMGSZ, "out": tmp_path / "out"}
        if "strategy" not in changes and len(changes.get("weights", (weights,))) == 1:
            # to a random network all images look alike
            changes["options"] = ("near_duplicate_threshold=0.999999", *changes.get("options", ()))
        return rank(Request(**{**given, **changes}), Settings(device="cpu"))

    return run


def names(ranking: offline.Ranking, positions: list[int] | None = None) -> list[str]:
    return [ranking.images[position].key for position in (ranking.top if positions is None else positions)]


def results(ranking: offline.Ranking) -> tuple[dict[str, Any], Path]:
    write_results(ranking, ImageReader())
    out = ranking.request.out
    return json.loads((out / "manifest.json").read_text()), out


# --- the ranking ----------------------------------------------------------------------------------------------------


def test_the_batch_is_k_distinct_images_by_falling_utility_and_its_parts_add_up(run: Run) -> None:
    options = ("n_clusters=4", "near_duplicate_threshold=0.999999")  # 50 clusters would be one for each image
    told, _ = results(run(strategy="hybrid", options=options))
    entries = told["images"]
    assert [one["rank"] for one in entries] == [1, 2, 3, 4]
    assert len({one["image"] for one in entries}) == 4
    utilities = [one["utility"] for one in entries]
    assert utilities == sorted(utilities, reverse=True)
    for one in entries:
        parts = one["parts"]
        assert one["utility"] == pytest.approx(0.7 * parts["uncertainty"] + 0.3 * parts["diversity"])
        assert one["reason"]
    assert told["counts"] == {"pool": 12, "ranked": 12, "unusable": 0, "labelled": 0, "chosen": 4, "at_random": 0}
    assert told["options"]["alpha"] == 0.7


def test_scores_are_those_of_the_detector_and_the_measures_of_production(run: Run, weights: Path, folder: Path) -> None:
    ranking = run()
    detector = Detector.load(weights, "cpu")
    settings = ProjectSettings(imgsz=IMGSZ)
    with Image.open(folder / "day" / "00.jpg") as image:
        (score,) = detector.score([image], imgsz=IMGSZ)
    assert ranking.images[0].key == "day/00.jpg"
    expected = measures_of(score, settings)
    assert dict(zip(expected, ranking.table.measures[0].tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)
    assert ranking.table.embeddings[0] == pytest.approx(score.embedding, abs=1e-5)
    assert ranking.table.n_boxes[0] == score.drawn > 0
    boxes = ranking.parts.boxes_of(ranking.table, [0])[0]
    assert boxes[:, :4] == pytest.approx(score.boxes_xyxy[: score.drawn], abs=0.01)
    assert boxes[:, 5].tolist() == score.class_ids[: score.drawn].tolist()


def test_the_same_images_named_in_another_way_give_the_same_answer(run: Run, folder: Path, tmp_path: Path) -> None:
    files = sorted(str(file) for file in folder.glob("*/*.jpg") if file.parent.name != ".hidden")
    shuffled = [files[index] for index in np.random.default_rng(0).permutation(len(files))]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(shuffled) + "\n\n")
    whole = run(with_random=True)
    for sources in ((str(listed),), (str(folder / "*" / "*.jpg"),), tuple(shuffled), (folder.as_uri(),)):
        other = run(sources=sources, with_random=True)
        assert [image.key for image in other.images] == [image.key for image in whole.images]
        assert names(other) == names(whole)
        assert names(other, other.at_random) == names(whole, whole.at_random)
        assert other.batch.utilities == whole.batch.utilities
        assert other.fresh == 0  # an image is known by its path, whoever names it


def test_a_strategy_may_be_written_as_an_arm_of_a_simulation(folder: Path) -> None:
    asked = Request((str(folder),), (Path("a.pt"),), strategy="hybrid:alpha=0.5,threshold=0.1", options=("beta=0.25",))
    assert asked.settings.strategy == "hybrid"
    assert asked.settings.strategy_options == {"alpha": 0.5, "beta": 0.25}
    assert asked.settings.uncertainty_threshold == 0.1


def test_options_reach_the_strategy_and_the_reading(run: Run) -> None:
    by_doubt = run(strategy="hybrid", options=("alpha=1", "beta=0", "near_duplicate_threshold=0.999999"))
    for position, utility in by_doubt.batch.utilities.items():
        assert utility == pytest.approx(by_doubt.table.measures[position, 0])
    everything = run(options=("confidence=.99", "threshold=.99", "empty=certain"))
    assert everything.table.n_boxes.tolist() == [0] * 12
    assert everything.table.measures[:, 0].tolist() == [0.0] * 12
    assert everything.fresh == 12  # another reading is another score


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"committee"}))
def test_every_strategy_ranks(run: Run, strategy: str) -> None:
    ranking = run(strategy=strategy)
    told, _ = results(ranking)
    assert len(set(ranking.top)) == 4
    assert told["strategy"] == strategy
    assert all(one["reason"] for one in told["images"])


def test_the_random_list_is_disjoint_and_goes_when_it_is_not_asked_for(run: Run) -> None:
    ranking = run(with_random=True)
    _, out = results(ranking)
    top, at_random = ((out / name).read_text().splitlines() for name in ("top.txt", "random.txt"))
    assert top == [ranking.images[position].path for position in ranking.top]
    assert len(set(top)) == len(set(at_random)) == 4
    assert not set(top) & set(at_random)
    assert all(Path(path).is_file() for path in top + at_random)
    assert len(json.loads((out / "label_studio_random.json").read_text())) == 4
    results(run(k=6))
    assert not (out / "random.txt").exists()  # it could name images of the new batch
    assert not (out / "label_studio_random.json").exists()


def test_more_than_there_is(run: Run) -> None:
    ranking = run(k=20, with_random=True)
    assert len(ranking.top) == 12
    assert ranking.at_random == []
    assert ranking.notes == [
        "20 images were asked for, and 12 can be ranked: all of them are chosen.",
        "No image is left for the random list: there is nothing to compare with. Lower --k.",
    ]
    assert "Next: label these 12, retrain." in list(summary(ranking, []))
    assert run(k=8, with_random=True).notes == ["Only 4 images are left for the random list: the pool has 12."]


def test_labelled_images_are_not_chosen_nor_what_looks_like_them(run: Run, folder: Path, tmp_path: Path) -> None:
    first = folder / names(run(k=1))[0]
    twin = folder / "night" / "twin.jpg"
    twin.write_bytes(first.read_bytes())
    listed = tmp_path / "labelled.txt"
    listed.write_text(f"{first}\n")
    ranking = run(k=11, labelled=str(listed))
    assert ranking.n_pool == 12
    assert ranking.n_labelled == 1
    assert f"{first.parent.name}/{first.name}" not in names(ranking)
    assert "night/twin.jpg" not in names(ranking)
    with pytest.raises(BadRequest, match="All 13 images are in --labelled"):
        run(labelled=str(folder))


@pytest.mark.slow  # three networks, each exported
def test_a_committee_needs_members_that_can_disagree(
    run: Run, weights: Path, tmp_path: Path, write_weights: WriteWeights
) -> None:
    others = [write_weights(tmp_path / f"{seed}.pt", seed, CLASSES) for seed in (2, 3)]
    ranking = run(weights=(weights, *others))
    assert ranking.batch.strategy == "committee"
    assert np.isfinite(ranking.table.disagreement).all()
    assert ranking.table.disagreement.max() > 0
    with pytest.raises(BadRequest, match="3 to 5 --weights, not 2"):
        run(weights=(weights, others[0]), strategy="committee")
    with pytest.raises(BadRequest, match="the same network"):
        run(weights=(weights, others[0], weights))
    with pytest.raises(BadRequest, match="asks one detector, not 3"):
        run(weights=(weights, *others), strategy="hybrid")
    with pytest.raises(LabelMismatch, match="trained on the same classes"):
        run(weights=(weights, others[0], write_weights(tmp_path / "cat.pt", 4, ("cat",))))


# --- no weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDFIRST_MAY_DOWNLOAD", "False")


@pytest.mark.usefixtures("no_download")
def test_without_weights_diversity_alone_and_it_says_so(run: Run) -> None:
    ranking = run(weights=())
    told, out = results(ranking)
    assert told["strategy"] == "coverage"
    assert "No --weights were named" in told["notes"][0]
    assert "no pretrained detector is at hand" in told["notes"][0]
    assert ranking.table.embeddings.shape == (12, 246)  # the descriptor's
    assert [one["measures"] for one in told["images"]] == [{}] * 4
    assert "uncertainty" not in told["images"][0]["parts"]
    tasks = json.loads((out / "label_studio.json").read_text())
    assert [task["predictions"][0]["result"] for task in tasks] == [[]] * 4
    assert not (out / "label_config.xml").exists()  # there is no label that it could name
    assert polars.read_parquet(out / "scores.parquet")["least_confidence"].null_count() == 12
    with pytest.raises(BadRequest, match="nothing is known without --weights"):
        run(weights=(), strategy="entropy")
    assert "taken as equal" in run(weights=(), strategy="hybrid").notes[1]


@pytest.mark.usefixtures("no_download")
def test_the_deployments_weights_stand_in_for_the_pretrained_ones(folder: Path, weights: Path, tmp_path: Path) -> None:
    request = Request(sources=(str(folder),), k=4, imgsz=IMGSZ, out=tmp_path / "out")
    ranking = rank(request, Settings(device="cpu", weights=str(weights)))
    assert ranking.table.embeddings.shape == (12, 256)
    assert "as current.pt sees it" in ranking.notes[0]
    assert ranking.table.n_boxes.sum() == 0  # its classes are not the user's


# --- stopped, and again ---------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the detector was given, one entry a run."""
    counts: list[int] = []
    score_each = Detector.score_each

    def counting(self: Detector, images: Iterator[Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        counts.append(0)

        def counted() -> Iterator[Any]:
            for image in images:
                counts[-1] += 1
                yield image

        return score_each(self, counted(), *args, **kwargs)

    monkeypatch.setattr(Detector, "score_each", counting)
    return counts


def test_stopped_in_the_middle_the_same_command_scores_only_the_rest(
    run: Run, weights: Path, folder: Path, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "PART_IMAGES", 3)

    def stop_after_five(done: int, total: int) -> None:
        assert total == 12
        if done == 5:
            raise KeyboardInterrupt

    request = Request(sources=(str(folder),), weights=(weights,), k=4, imgsz=IMGSZ, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        rank(request, Settings(device="cpu"), stop_after_five)
    whole = run()
    assert whole.fresh == seen[-1] == 7
    again = run()
    assert again.fresh == 0
    assert again.batch.utilities == whole.batch.utilities
    never_stopped = run(out=tmp_path / "other")
    assert never_stopped.fresh == 12
    assert never_stopped.batch.utilities == pytest.approx(whole.batch.utilities)
    assert never_stopped.top == whole.top


KILLED = """
import os, sys
from pathlib import Path
from worker import offline
from worker.settings import Settings
offline.PART_IMAGES = 3
def kill(done, total):
    if done == 8:
        os.kill(os.getpid(), 9)
sources, weights, out = sys.argv[1:]
offline.rank(offline.Request((sources,), (Path(weights),), k=4, imgsz=64, out=Path(out)), Settings(device="cpu"), kill)
"""


@pytest.mark.slow  # a process of its own loads and exports the network
def test_killed_it_loses_less_than_a_part(run: Run, weights: Path, folder: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(folder), str(weights), str(tmp_path / "out")]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    ranking = run()  # and its lock is gone
    assert ranking.fresh == 6  # of eight, two parts of three were kept
    assert ranking.table.known.all()


def test_a_changed_image_a_new_one_and_a_damaged_part_are_scored_again(
    run: Run, folder: Path, tmp_path: Path, drawn: list[Image.Image], seen: list[int]
) -> None:
    run()
    drawn[5].save(folder / "day" / "00.jpg", quality=50)
    drawn[3].save(folder / "day" / "extra.jpg")
    (folder / "night" / "01.jpg").unlink()
    assert run().fresh == seen[-1] == 2
    (part,) = (tmp_path / "out" / ".state").glob("*/part-000000.npz")
    part.write_bytes(part.read_bytes()[:1000])
    ranking = run()
    assert ranking.fresh == 10
    assert ranking.table.usable.all()
    assert run().fresh == 0


def test_two_at_once_in_one_folder(run: Run, tmp_path: Path) -> None:
    run()
    with (
        folder_of_one(tmp_path / "out" / ".state", "score"),
        pytest.raises(Conflict, match="name another --out"),
    ):
        run()


# --- images that are not as they should be --------------------------------------------------------------------------


def test_an_image_that_cannot_be_used_costs_one_row_with_its_reason(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "day" / "broken.jpg").write_bytes((folder / "day" / "00.jpg").read_bytes()[:900])
    (folder / "day" / "empty.png").write_bytes(b"")
    (folder / "day" / "link.jpg").symlink_to("nowhere.jpg")
    told, out = results(run())
    problems = {one["image"]: one["problem"] for one in told["problems"]}
    assert list(problems) == ["day/broken.jpg", "day/empty.png", "day/link.jpg"]
    assert "damaged or cut short" in problems["day/broken.jpg"]
    assert "0 bytes" in problems["day/empty.png"]
    assert problems["day/link.jpg"] == "there is no such file"
    assert told["counts"] == {"pool": 15, "ranked": 12, "unusable": 3, "labelled": 0, "chosen": 4, "at_random": 0}
    rows = {row["image"]: row for row in polars.read_parquet(out / "scores.parquet").to_dicts()}
    assert len(rows) == 15
    assert rows["day/broken.jpg"]["utility"] is None
    assert rows["day/broken.jpg"]["problem"] == problems["day/broken.jpg"]
    assert "3 images could not be used" in (out / "contact_sheet.html").read_text()


def test_what_could_not_be_read_is_tried_again_and_what_is_no_image_is_not(run: Run, folder: Path) -> None:
    (folder / "day" / "broken.jpg").write_bytes(b"GIF89a")
    (folder / "day" / "link.jpg").symlink_to("late.dat")
    assert sorted(run().pool_problems) == [6, 7]
    (folder / "day" / "late.dat").write_bytes((folder / "day" / "02.jpg").read_bytes())
    ranking = run()
    assert ranking.fresh == 1
    assert list(ranking.pool_problems) == [6]


HOSTILE = [
    b"\"quoted' & <b>.jpg",
    b"<script>alert(1)</script>.jpg".replace(b"/", b"\xe2\x88\x95"),
    b"two\nlines.jpg",
    b"not-utf8-\xff\xfe.jpg",
    b"\xe2\x80\xaegpj.exe.jpg",
    b"--help %s {{ 7 * 7 }}.jpg",
]


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_names_break_neither_page_nor_json_nor_table(
    run: Run, tmp_path: Path, drawn: list[Image.Image]
) -> None:
    root = os.fsencode(tmp_path / "hostile")
    os.mkdir(root)
    for name, image in zip(HOSTILE, drawn, strict=False):
        with open(os.path.join(root, name), "wb") as file:
            image.save(file, "JPEG")
    ranking = run(sources=(os.fsdecode(root),), k=6, with_random=True, image_url_prefix="https://cdn.example.com/a b")
    told, out = results(ranking)
    assert len(told["images"]) == 6
    page = Reader()
    html = (out / "contact_sheet.html").read_text(encoding="utf-8")
    page.feed(html)
    assert "script" not in page.tags
    assert "b" in page.tags  # the page's own; the name's is text:
    assert "\"quoted' & <b>.jpg" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "two\\nlines.jpg" in page.text
    assert "not-utf8-\\xff\\xfe.jpg" in page.text
    assert "\u202e" not in html
    shown = {one["image"] for one in told["images"]}
    assert shown == {printable(os.fsdecode(name)) for name in HOSTILE}
    assert set(polars.read_parquet(out / "scores.parquet")["image"]) == shown
    text = (out / "label_studio.json").read_text(encoding="utf-8")
    references = {task["data"]["image"] for task in json.loads(text)}
    assert "https://cdn.example.com/a b/not-utf8-%FF%FE.jpg" in references
    assert "https://cdn.example.com/a b/two%0Alines.jpg" in references
    assert "\\ud" not in text  # half a surrogate pair, which PostgreSQL refuses
    listed = (out / "top.txt").read_bytes().splitlines()
    assert sorted(listed) == sorted(os.path.join(root, name) for name in HOSTILE if b"\n" not in name)


# --- sources --------------------------------------------------------------------------------------------------------


def test_an_fsspec_url_is_read_like_a_folder(run: Run, folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in folder.glob("[dn]*/*.jpg"):
        memory.pipe_file(f"/bucket/pool/{file.parent.name}/{file.name}", file.read_bytes())
    memory.pipe_file("/bucket/pool/day/broken.jpg", b"no image")
    memory.pipe_file("/bucket/list.txt", b"pool/day/00.jpg\nmemory://bucket/pool/night/01.jpg\npool/day/gone.jpg\n")
    try:
        remote = run(sources=("memory://bucket/pool",))
        local = run()
        assert names(remote) == names(local)
        assert len(remote.pool_problems) == 1
        _, out = results(remote)
        tasks = json.loads((out / "label_studio.json").read_text())
        assert tasks[0]["data"]["image"] == f"memory://bucket/pool/{names(remote)[0]}".replace("://", ":///", 1) or (
            tasks[0]["data"]["image"] == f"memory://bucket/pool/{names(remote)[0]}"
        )
        assert run(sources=("memory://bucket/pool",)).fresh == 0
        assert len(run(sources=("memory://bucket/pool/*/*0*.jpg",)).images) == 11
        listed = run(sources=("memory://bucket/list.txt",))
        assert names(listed, [0, 1, 2]) == ["day/00.jpg", "day/gone.jpg", "night/01.jpg"]
        assert listed.pool_problems == {1: "there is no such file"}
    finally:
        memory.rm("/bucket", recursive=True)


def test_sources_that_name_no_image(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRequest, match=r"There are no images in .*empty"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(BadRequest, match=r"There is no .*nowhere"):
        find_images([str(tmp_path / "nowhere")])
    with pytest.raises(BadRequest, match="none of the 1 files named there exists"):
        find_images([str(folder / "notes.txt")])
    (tmp_path / "binary.dat").write_bytes(b"\0\1")
    with pytest.raises(BadRequest, match="nor a text list"):
        find_images([str(tmp_path / "binary.dat")])
    with pytest.raises(BadRequest, match="nothing at memory://nowhere"):
        find_images(["memory://nowhere"])
    with pytest.raises(BadRequest, match="cannot be opened"):
        find_images(["gopher://host/pool"])


def test_what_cannot_be_looked_up_is_refused_with_its_address(tmp_path: Path) -> None:
    for url in ("ftp://127.0.0.1:1/pool", "ftp://127.0.0.1:1/pool/a.jpg"):
        (tmp_path / "list.txt").write_text(f"{url}\n")
        for source in (url, str(tmp_path / "list.txt")):
            with pytest.raises(BadRequest, match=f"{url} cannot be opened: ConnectionRefusedError"):
                find_images([source])
    with pytest.raises(BadRequest, match="leads through an archive or cache"):
        find_images(["zip://pool::/data/pool.zip"])


def test_a_listed_url_that_is_refused_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text("memory://pool/a.jpg\n")

    def refuse(*_: object) -> None:
        raise PermissionError("no credentials")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", refuse)
    with pytest.raises(BadRequest, match=r"memory://pool/a\.jpg cannot be looked up: PermissionError no credentials"):
        find_images([str(tmp_path / "list.txt")])


def test_a_pipe_is_not_waited_for(run: Run, folder: Path) -> None:
    os.mkfifo(folder / "day" / "camera.jpg")
    ranking = run(k=2)
    assert [names(ranking, [at]) for at in ranking.pool_problems] == [["day/camera.jpg"]]


def test_links_that_form_a_circle_end(folder: Path) -> None:
    (folder / "day" / "up").symlink_to(folder)
    assert len(find_images([str(folder)])) == 12


def test_lists_are_relative_to_their_own_folder(folder: Path) -> None:
    (folder / "some.txt").write_text("\ufeffday/00.jpg\r\n./night/01.jpg\r\nday/gone.jpg\n")
    found = find_images([str(folder / "some.txt")])
    assert [(image.key, image.missing) for image in found] == [
        *[("day/00.jpg", False), ("day/gone.jpg", True), ("night/01.jpg", False)]
    ]


# --- for Label Studio -----------------------------------------------------------------------------------------------


def test_tasks_carry_predictions_that_its_score_order_ranks(run: Run, weights: Path) -> None:
    ranking = run()
    _, out = results(ranking)
    tasks = json.loads((out / "label_studio.json").read_text())
    assert [task["data"]["image"] for task in tasks] == names(ranking)
    predictions = [task["predictions"][0] for task in tasks]
    assert [one["score"] for one in predictions] == [0.0, 0.125, 0.25, 0.375]
    assert {one["model_version"] for one in predictions} == {f"hardfirst-score-{sha256_of(weights)[:12]}"}
    config = ET.parse(out / "label_config.xml")
    labels = {label.get("value") for label in config.iter("Label")}
    assert labels == set(CLASSES)
    regions = [region for one in predictions for region in one["result"]]
    assert len(regions) == sum(ranking.table.n_boxes[position] for position in ranking.top) > 0
    for region in regions:
        value = region["value"]
        assert region["type"] == "rectanglelabels"
        assert (region["from_name"], region["to_name"]) == ("label", "image")
        assert set(value["rectanglelabels"]) <= labels
        assert 0 <= value["x"] <= value["x"] + value["width"] <= 100
        assert (region["original_width"], region["original_height"]) == SIZE


def test_a_projects_own_label_config_names_labels_and_key(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.xml"
    config.write_text(
        '<View><Image name="photo" value="$picture"/><RectangleLabels name="part" toName="photo">'
        '<Label value="Screw" predicted_values="bolt"/></RectangleLabels></View>'
    )
    _, out = results(run(label_config=config, k=12))
    tasks = json.loads((out / "label_studio.json").read_text())
    regions = [region for task in tasks for region in task["predictions"][0]["result"]]
    assert {tuple(region["value"]["rectanglelabels"]) for region in regions} == {("Screw",)}
    assert {(region["from_name"], region["to_name"]) for region in regions} == {("part", "photo")}
    assert set(tasks[0]["data"]) == {"picture"}
    assert (out / "label_config.xml").read_text() == config.read_text()
    with pytest.raises(BadRequest, match="cannot be read"):
        run(label_config=tmp_path / "no.xml")


def test_a_project_of_polygons_gets_polygons_where_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.xml"
    config.write_text(
        '<View><Image name="image" value="$image"/><PolygonLabels name="part" toName="image">'
        '<Label value="bolt"/></PolygonLabels></View>'
    )
    with pytest.raises(LabelConfigUnsupported, match="--option shapes=hull"):
        run(label_config=config)
    _, out = results(run(label_config=config, k=12, options=("shapes=hull",)))
    tasks = json.loads((out / "label_studio.json").read_text())
    regions = [region for task in tasks for region in task["predictions"][0]["result"]]
    assert {region["type"] for region in regions} == {"polygonlabels"}


def test_references_that_label_studio_can_open(folder: Path, tmp_path: Path) -> None:
    spaced = folder / "day" / "a b%.jpg"
    spaced.write_bytes(b"x")
    images = {image.key: image for image in find_images([str(folder)])}
    image = images["day/a b%.jpg"]
    asked = Request(sources=(str(folder),))
    assert reference_of(image, asked) == "day/a b%.jpg"
    served = Request(sources=(str(folder),), local_files_root=tmp_path)
    assert reference_of(image, served) == "/data/local-files/?d=pool/day/a%20b%25.jpg"
    for prefix in ("https://cdn/x", "https://cdn/x/"):
        assert reference_of(image, Request(sources=(), image_url_prefix=prefix)) == "https://cdn/x/day/a%20b%25.jpg"
    with pytest.raises(BadRequest, match="is not below --local-files-root"):
        check_references(Request(sources=(), local_files_root=tmp_path / "elsewhere"), list(images.values()))
    with pytest.raises(BadRequest, match="give one"):
        check_references(Request(sources=(), local_files_root=tmp_path, image_url_prefix="x"), [])


# --- what is refused, and the page ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strategy": "hybird"}, "Did you mean 'hybrid'"),
        ({"options": ("alpha=2",)}, "'alpha' must be from 0 to 1, got 2"),
        ({"options": ("alhpa=.5",)}, "nothing is called 'alhpa'"),
        ({"options": ("alpha",)}, "is not name=value"),
        ({"options": ("epochs=3",)}, "means nothing here"),
        ({"k": 0}, "batch_size"),
        ({"imgsz": 100}, "multiple of 32"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_is_read(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        rank(Request(**{"sources": ("nowhere",), "weights": (Path("no.pt"),), **changes}), Settings(device="cpu"))


def test_weights_that_are_not_there(run: Run, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"There are no weights at .*no\.pt"):
        run(weights=(tmp_path / "no.pt",))


def test_the_contact_sheet_is_one_file_with_a_picture_and_boxes_for_each(run: Run) -> None:
    ranking = run()
    _, out = results(ranking)
    html = (out / "contact_sheet.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 4
    assert html.count('<div class="box') == sum(ranking.table.n_boxes[position] for position in ranking.top)
    page = Reader()
    page.feed(html)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "default-src 'none'" in html
    assert '<script>alert("1")</script>' in page.text  # a class of that name, as text
    assert "4 of 12 images" in page.text


def test_the_table_has_every_image_and_the_rank_of_the_chosen(run: Run) -> None:
    ranking = run(with_random=True)
    _, out = results(ranking)
    table = polars.read_parquet(io.BytesIO((out / "scores.parquet").read_bytes()))
    assert table["image"].to_list() == [image.key for image in ranking.images]
    ranked = table.filter(polars.col("rank").is_not_null()).sort("rank")
    assert ranked["image"].to_list() == names(ranking)
    assert table["at_random"].sum() == 4
    assert table["utility"].to_list() == [ranking.batch.utilities[position] for position in range(12)]
    assert table["boxes"].to_list() == ranking.table.n_boxes.tolist()
    assert table["entropy"].to_list() == ranking.table.measures[:, 2].tolist()
