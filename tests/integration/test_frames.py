"""Odd images labelled on a real Label Studio: the box that training reads is the pixels that the annotator meant."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from PIL import ExifTags, Image

from worker import training
from worker.services import Services
from worker.upload import Request, upload

pytestmark = pytest.mark.slow
WIDTH, HEIGHT = 96, 64
BOXES = {"turned.jpg": (52, 8, 84, 32), "mirrored.jpg": (4, 30, 40, 60), "cmyk.jpg": (60, 30, 90, 60)}
BOXES |= {"deep.png": (10, 4, 30, 50), "scan.tiff": (40, 20, 80, 44)}


def scene(name: str) -> Image.Image:
    """As everybody is to see it: white in the box, black around."""
    image = Image.new("L", (WIDTH, HEIGHT), 0)
    image.paste(255, BOXES[name])
    return image


def write_all(folder: Path) -> None:
    folder.mkdir()
    for name, orientation, undo in (
        ("turned.jpg", 6, Image.Transpose.ROTATE_90),
        ("mirrored.jpg", 7, Image.Transpose.TRANSVERSE),
    ):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        stored = scene(name).convert("RGB").transpose(undo)
        assert stored.size == (HEIGHT, WIDTH)
        stored.save(folder / name, exif=exif, quality=95)
    scene("cmyk.jpg").convert("RGB").convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    for name in ("deep.png", "scan.tiff"):
        Image.fromarray(np.asarray(scene(name)).astype(np.uint16) * 257).save(folder / name)


def drawn(name: str) -> dict[str, Any]:
    """What the label editor sends: percents of the image as the browser shows it, and its size there."""
    left, top, right, bottom = BOXES[name]
    return {
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {
            "x": 100 * left / WIDTH,
            "y": 100 * top / HEIGHT,
            "width": 100 * (right - left) / WIDTH,
            "height": 100 * (bottom - top) / HEIGHT,
            "rotation": 0,
            "rectanglelabels": ["nut"],
        },
    }


def assert_is_white(pixels: Any, box_xyxy: Any, what: str) -> None:
    """White within the box and black outside, but for two pixels at the rim, where JPEG blurs."""
    light = np.asarray(pixels)[..., :3].astype(int)
    left, top, right, bottom = (round(float(side)) for side in box_xyxy)
    assert light.shape == (HEIGHT, WIDTH, 3), what
    assert light[top + 2 : bottom - 2, left + 2 : right - 2].min() > 200, what
    around = np.ones((HEIGHT, WIDTH), np.bool_)
    around[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
    assert light[around].max() < 55, what


def test_the_box_in_training_is_the_pixels_meant(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path / "odd")
    project = stage.new_project()
    own = Services(stage.services.settings, "worker")
    _, outcome = upload(Request((str(tmp_path / "odd"),), project_id=project.id, out=tmp_path / "out"), own)
    assert outcome.made == len(BOXES)
    names = {task["id"]: task["meta"]["hardfirst"]["name"] for task in project.tasks()}
    project.connect(
        {"weights": "yolo11n.yaml", "epochs": 1, "imgsz": 64, "batch_size": 5, "holdout_size": 0, "labels_per_round": 5}
    )
    stage.work()
    for task_id, name in names.items():
        project.label(task_id, [drawn(name)])
    kept, real = tmp_path / "dataset", training.train

    def keeping(request: training.TrainRequest, *args: Any, **kwargs: Any) -> Any:
        shutil.copytree(request.dataset_yaml.parent, kept)
        return real(request, *args, **kwargs)

    monkeypatch.setattr(training, "train", keeping)
    stage.work()
    assert stage.round(project, 1).state == "done", stage.round(project, 1).error
    written = {int(path.stem): path for path in kept.rglob("*") if path.suffix in (".jpg", ".png")}
    assert set(written) == set(names)
    for task in project.tasks():
        name, path = names[task["id"]], written[task["id"]]
        (label,) = kept.rglob(f"{task['id']}.txt")
        _, x, y, w, h = (float(one) for one in label.read_text().split())
        box = ((x - w / 2) * WIDTH, (y - h / 2) * HEIGHT, (x + w / 2) * WIDTH, (y + h / 2) * HEIGHT)
        assert box == pytest.approx(BOXES[name], abs=0.01), name
        assert_is_white(cv2.imread(str(path), cv2.IMREAD_COLOR), box, f"{name}: what the trainer reads")
        seen = stage.services.images.open(task["data"], "image", task["id"])
        assert_is_white(seen, box, f"{name}: what is scored and predicted on")
        small = Image.open(io.BytesIO(thumbnail_of(stage, task["id"])))
        assert small.size == (WIDTH, HEIGHT)
        assert_is_white(small, box, f"{name}: the page's thumbnail")


def thumbnail_of(stage: Any, task_id: int) -> bytes:
    path = f"/api/projects/{stage.made[-1].id}/tasks/{task_id}/thumbnail.jpg"
    answer = httpx.get(f"{stage.backend_url}{path}", trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.content
