"""`hardfirst upload` without a Label Studio: what is refused, what counts as the same image, what is sent together.

What it does to a real one: tests/integration/test_upload.py.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worker import upload as uploading
from worker.errors import BadRequest, ImageUnusable, LabelStudioRefused, LabelStudioUnavailable
from worker.image_sources import ImageReader
from worker.label_studio import LabelStudio
from worker.services import Services
from worker.settings import Settings
from worker.upload import Known, Request, address_key, upload

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    "</RectangleLabels></View>"
)


class Remembered(LabelStudio):
    """A Label Studio in memory: what is uploaded and imported, and what it refuses."""

    def __init__(self) -> None:
        super().__init__("http://label-studio", "token")
        self.titles: dict[str, str] = {}
        self.tasks_made: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self.refuses: set[bytes] = set()
        self.most = 100
        self.fails_always = False

    def projects_titled(self, title: str) -> list[dict[str, Any]]:
        return [{"id": 1, "label_config": self.titles[title]}] if title in self.titles else []

    def create_project(self, title: str, label_config: str) -> int:
        self.titles[title] = label_config
        return 1

    def project(self, project_id: int) -> dict[str, Any]:
        return {"id": project_id, "title": "parts", "label_config": CONFIG}

    def upload_files(self, project_id: int, files: Any) -> list[str]:
        if self.fails_always:
            raise LabelStudioUnavailable("it is away.")
        if len(files) > self.most or any(content in self.refuses for _, content in files):
            raise LabelStudioRefused("Label Studio answered 400")
        self.sizes.append(len(files))
        return [f"/data/upload/1/0123abcd-{name}" for name, _ in files]

    def import_tasks(self, project_id: int, new: Any) -> None:
        self.tasks_made += [{"id": len(self.tasks_made) + at, **one} for at, one in enumerate(new, 1)]

    def tasks(self, project_id: int, **kwargs: Any) -> Any:
        yield self.tasks_made

    def uploads(self, project_id: int) -> dict[str, int | None]:
        return {}

    def storages(self, project_id: int, kind: str) -> list[dict[str, Any]]:
        return []


@pytest.fixture
def label_studio() -> Remembered:
    return Remembered()


@pytest.fixture
def own(label_studio: Remembered, tmp_path: Path) -> Services:
    services = Services(Settings(_env_file=None, data_dir=tmp_path / "data"), "worker")  # type: ignore[call-arg]
    services.__dict__["label_studio"] = label_studio
    return services


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pool"
    made.mkdir()
    for number in range(7):
        blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST).save(made / f"{number}.png")
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "Say where to: --project ID"),
        ({"project_id": 1, "new": "parts"}, "Say where to"),
        ({"project_id": 1, "classes": ("nut",)}, "they go with --new"),
        ({"project_id": 1, "label_config": Path("x.xml")}, "they go with --new"),
        ({"new": "parts"}, "what is to be labelled"),
        ({"new": "parts", "classes": ("nut",), "label_config": Path("x.xml")}, "needs one of"),
        ({"new": "ab", "classes": ("nut",)}, "3 to 50 characters"),
        ({"project_id": 1, "copy": True, "image_url_prefix": "https://cdn/"}, "--copy uploads the images"),
        ({"project_id": 1, "local_files_root": Path("/x"), "image_url_prefix": "https://cdn/"}, "give one"),
        ({"project_id": 1, "local_files_root": Path("/x")}, "not below --local-files-root"),
        ({"new": "parts", "label_config": Path("/no/such.xml")}, "cannot be read"),
    ],
)
def test_requests_that_cannot_be_right(
    own: Services, folder: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadRequest, match=says):
        upload(Request((str(folder),), out=tmp_path / "out", **changes), own)
    assert not (tmp_path / "out").exists()


def test_addresses_that_label_studio_does_not_know(own: Services, tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://pool/1.png", "wb") as file:
        file.write(b"x")
    with pytest.raises(BadRequest, match="--copy uploads the images themselves"):
        upload(Request(("memory://pool",), project_id=1, out=tmp_path / "out"), own)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("/data/local-files/?d=a%20b.png", "http://localhost:8080/data/local-files/?d=a b.png", True),
        ("/data/local-files/?d=a.png", "/data/local-files?d=a.png", True),
        ("/data/local-files/?d=a.png", "/data/local-files/?d=b.png", False),
        ("/data/upload/1/x-r%C3%A4der.png", "https://labels.example.com/data/upload/1/x-räder.png", True),
        ("https://cdn/a.png", "https://other/a.png", False),
        ("https://cdn/a.png?v=1", "https://cdn/a.png?v=2", False),
        ("s3://pool/a.png", "s3://pool/a.png", True),
        ("s3://pool/a.png", "gs://pool/a.png", False),
    ],
)
def test_two_addresses_of_one_image(one: str, other: str, is_same: bool) -> None:
    assert (address_key(one) == address_key(other)) is is_same


@pytest.mark.parametrize(
    "meta",
    [
        *(None, [], "x", {"hardfirst": None}, {"hardfirst": {"sha256": 7}}, {"hardfirst": {"sha256": "A" * 64}}),
        {"hardfirst": {"sha256": "0" * 63}},
    ],
)
def test_a_record_that_is_none_is_not_believed(meta: Any) -> None:
    known = Known()
    known.add({"id": 5, "data": {"image": "/data/upload/1/x-a.png"}, "meta": meta}, "image")
    assert (known.digests, known.without_record) == ({}, {"/data/upload/1/x-a.png": 5})
    known.add({"id": 6, "data": None, "meta": {"hardfirst": {"sha256": "0" * 64}}}, "image")
    assert (known.tasks, known.digests) == (2, {"0" * 64: [6]})


def test_groups_are_small_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "BYTES_AT_ONCE", 10)
    grouped = uploading._grouped([4, 5, 2, 11, 3, 3, 3, 1], 3, lambda size: size)
    assert list(grouped) == [[4, 5], [2], [11], [3, 3, 3], [1]]
    assert list(uploading._grouped([], 3)) == []


def test_names_that_label_studio_can_store() -> None:
    reader, png, tiff = ImageReader(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (20, 20), (9, 8, 7)).save(png, "PNG")
    Image.new("RGB", (20, 20), (9, 8, 7)).save(tiff, "TIFF")
    assert uploading._as_shown("a b.PNG", png.getvalue(), reader) == ("a b.png", png.getvalue())
    assert uploading._as_shown("n" * 200 + ".png", png.getvalue(), reader)[0] == "n" * 60 + ".png"
    assert uploading._as_shown("a\n\udcff.png", png.getvalue(), reader)[0] == "a\\n\\xff.png"
    name, content = uploading._as_shown("scan.TIF", tiff.getvalue(), reader)
    assert name == "scan.png"
    assert Image.open(io.BytesIO(content)).getpixel((3, 3)) == (9, 8, 7)
    with pytest.raises(ImageUnusable):
        uploading._as_shown("scan.tif", b"II*\0 and no more", reader)


def test_what_is_too_much_at_once_is_sent_in_halves(
    own: Services, label_studio: Remembered, folder: Path, tmp_path: Path
) -> None:
    label_studio.most = 2
    _, outcome = upload(Request((str(folder),), project_id=1, out=tmp_path / "out"), own)
    assert (outcome.made, outcome.problems, outcome.notes) == (7, {}, [])
    assert max(label_studio.sizes) == 2
    assert len({task["meta"]["hardfirst"]["sha256"] for task in label_studio.tasks_made}) == 7


def test_one_image_that_is_refused_does_not_stop_the_others(
    own: Services, label_studio: Remembered, folder: Path, tmp_path: Path
) -> None:
    label_studio.refuses = {(folder / "4.png").read_bytes()}
    plan, outcome = upload(Request((str(folder),), project_id=1, out=tmp_path / "out"), own)
    assert outcome.made == 6
    assert uploading.problems_of(plan, outcome) == {"4.png": "Label Studio answered 400"}


def test_a_refusal_of_the_first_is_about_all(
    own: Services, label_studio: Remembered, folder: Path, tmp_path: Path
) -> None:
    label_studio.most = 0
    with pytest.raises(LabelStudioRefused):
        upload(Request((str(folder),), project_id=1, out=tmp_path / "out"), own)
    assert label_studio.tasks_made == []


def test_a_file_that_changes_meanwhile_is_left_out(
    own: Services, label_studio: Remembered, folder: Path, tmp_path: Path
) -> None:
    def changing(what: str, done: int, total: int) -> None:
        if what == "uploading" and done == 0:
            (folder / "2.png").write_bytes((folder / "3.png").read_bytes())
            (folder / "5.png").unlink()

    plan, outcome = upload(Request((str(folder),), project_id=1, out=tmp_path / "out"), own, changing)
    problems = uploading.problems_of(plan, outcome)
    assert set(problems) == {"2.png", "5.png"}
    assert "changed since it was read" in problems["2.png"]
    assert outcome.made == len(label_studio.tasks_made) == 5


def test_addresses_under_a_prefix_are_kept_and_doubts_said(
    own: Services, label_studio: Remembered, folder: Path, tmp_path: Path
) -> None:
    (folder / "0.png").rename(folder / "a b.png")
    request = Request(
        (str(folder),), project_id=1, image_url_prefix="https://cdn.example.com/pool", out=tmp_path / "out"
    )
    plan, outcome = upload(request, own)
    addresses = {task["data"]["image"] for task in label_studio.tasks_made}
    assert (outcome.made, "https://cdn.example.com/pool/a%20b.png" in addresses) == (7, True)
    assert any("HARDFIRST_IMAGE_HOSTS=cdn.example.com" in note for note in plan.notes)
    plan, outcome = upload(request, own)
    assert (len(plan.there), outcome.made) == (7, 0)


def test_two_at_once_with_one_report(own: Services, folder: Path, tmp_path: Path) -> None:
    from worker.offline_scores import folder_of_one

    with (
        folder_of_one(tmp_path / "out" / ".state", "upload"),
        pytest.raises(uploading.HardfirstError, match="Another `hardfirst upload`"),
    ):
        upload(Request((str(folder),), project_id=1, out=tmp_path / "out"), own)


def test_no_torch_is_loaded() -> None:
    import subprocess
    import sys

    program = "import sys, worker.upload, backend.upload_command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
