"""`hardfirst upload`: images as tasks of a Label Studio project, each once.

What a project has, the project is asked: every task made here carries the SHA-256 of its image in its `meta`, and names
the image by an address. So nothing has to be remembered between runs; what was read is kept beside the report only so
that it need not be read again. A kill between the upload of files and the import of their tasks leaves files without
a task: the next run finds them by their size and content, and makes the tasks.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import numpy as np
from PIL import Image

from strategies.diversity import near_duplicate_groups
from worker.artifacts import Artifacts
from worker.boxes import LabelMap
from worker.dataset import MIN_SIDE
from worker.descriptor import DESCRIPTOR_NAME, describe
from worker.errors import (
    BadRequest,
    HardfirstError,
    ImageUnusable,
    LabelStudioRefused,
    LabelStudioUnavailable,
    NotFound,
)
from worker.image_sources import (
    ImageAway,
    ImageReader,
    SourceImage,
    check_references,
    find_images,
    printable,
    reference_of,
    without_password,
)
from worker.images import as_png
from worker.label_studio import LabelStudio
from worker.looking import FETCHERS, opened_ahead
from worker.offline_results import config_of_labels
from worker.offline_scores import PART_IMAGES, ImageRow, PartStore, ScoreTable, folder_of_one, identity_of
from worker.services import Services

log = logging.getLogger(__name__)

STATE = ".state"  # in the report's folder: what was read in earlier runs
REPORT, NEAR = "upload.json", "near_duplicates.txt"
META = "hardfirst"  # the key of our record in a task's meta
FILES_AT_ONCE = 50  # Label Studio takes 100 in a request, and holds them all in memory
BYTES_AT_ONCE = 32_000_000
TASKS_AT_ONCE = 1000  # by reference: 0.3 s in Label Studio
PATIENCE = 300.0  # seconds that a Label Studio which is away is waited for
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
NAME_CHARACTERS = 60  # of a file's name; Label Studio's column takes 100 with folder and prefix
NOT_SHOWN = (".tif", ".tiff", ".avif")  # browsers show no TIFF, and Label Studio takes no upload with these names
_TIFF = (b"II*\0", b"MM\0*")

Progress = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What `hardfirst upload` was asked for."""

    sources: tuple[str, ...]
    project_id: int | None = None
    new: str | None = None  # title of a project to make
    classes: tuple[str, ...] = ()
    label_config: Path | None = None
    local_files_root: Path | None = None
    image_url_prefix: str | None = None
    copy: bool = False
    near_duplicate_threshold: float = 0.99
    out: Path = Path("hardfirst-upload")
    dry_run: bool = False

    def check(self) -> None:
        """
        Raises:
            BadRequest: the options contradict each other.
        """
        if (self.project_id is None) == (self.new is None):
            raise BadRequest('Say where to: --project ID, or --new "Title" --classes bolt,nut.')
        if self.new is None and (self.classes or self.label_config is not None):
            raise BadRequest("--classes and --label-config are for a project that is made: they go with --new.")
        if self.new is not None and bool(self.classes) == (self.label_config is not None):
            raise BadRequest("--new needs one of --classes bolt,nut and --label-config FILE: what is to be labelled?")
        if self.new is not None and not 3 <= len(self.new) <= 50:
            raise BadRequest(f"--new {self.new!r}: Label Studio takes titles of 3 to 50 characters.")
        if self.copy and (self.local_files_root is not None or self.image_url_prefix is not None):
            raise BadRequest("--copy uploads the images; --local-files-root and --image-url-prefix leave them there.")

    def config(self) -> str:
        """The label config of the project that is to be made."""
        if self.label_config is None:
            return config_of_labels(self.classes)
        try:
            return self.label_config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"--label-config {self.label_config} cannot be read: {error}") from error

    def by_reference(self, image: SourceImage) -> bool:
        """Whether its task names the image where it is; else its bytes are uploaded."""
        named = self.local_files_root is not None or self.image_url_prefix is not None
        return named or ("://" in image.path and not self.copy)


@dataclass(frozen=True)
class Target:
    """The project. `project_id` None: it would be made, were this no rehearsal."""

    project_id: int | None
    title: str
    image_key: str
    notes: tuple[str, ...] = ()


@dataclass
class Known:
    """What a project's tasks say of their images."""

    tasks: int = 0
    digests: dict[str, list[int]] = field(default_factory=dict)  # SHA-256 -> task ids
    addresses: dict[str, int] = field(default_factory=dict)  # as `address_key` -> task id
    without_record: dict[str, int] = field(default_factory=dict)  # address of an upload of others -> task id

    def add(self, task: Mapping[str, Any], image_key: str) -> None:
        self.tasks += 1
        task_id, data = int(task["id"]), task.get("data") or {}
        address = data.get(image_key, data.get("$undefined$"))
        digest = _recorded(task.get("meta"))
        if digest:
            self.digests.setdefault(digest, []).append(task_id)
        if isinstance(address, str):
            self.addresses.setdefault(address_key(address), task_id)
            if not digest and urlsplit(address).path.startswith("/data/upload/"):
                self.without_record.setdefault(address, task_id)


@dataclass
class Plan:
    """What is to be done. Positions index `images`."""

    request: Request
    target: Target
    images: list[SourceImage]
    table: ScoreTable
    fresh: int = 0  # read in this run
    there: dict[int, int] = field(default_factory=dict)  # position -> the task that shows it already
    twice: dict[int, int] = field(default_factory=dict)  # position -> position of the same content that counts
    new: list[int] = field(default_factory=list)
    found: dict[int, str] = field(default_factory=dict)  # of the new: address of an uploaded file that has no task
    near: list[list[int]] = field(default_factory=list)  # groups of distinct images that look alike
    notes: list[str] = field(default_factory=list)

    def digest(self, position: int) -> str:
        return str(self.table.digests[position].tobytes().hex())

    def name(self, position: int) -> str:
        return printable(self.images[position].key)


@dataclass
class Outcome:
    """What was done."""

    project_id: int | None
    made: int = 0
    problems: dict[int, str] = field(default_factory=dict)  # position -> why it was left out while uploading
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def upload(
    request: Request, own: Services, progress: Progress = lambda what, done, total: None
) -> tuple[Plan, Outcome]:
    """Make a task of every image that the project does not have yet, and write the report.

    Args:
        progress: called with what is going on, how many are done and how many there are.

    Raises:
        BadRequest: the request cannot be right; there is no such project; Label Studio cannot serve the files that
            tasks would name.
        LabelConfigUnsupported: nothing can be drawn over an image in it.
        Conflict: another process uploads with the same --out.
        LabelStudioUnavailable, CredentialsMissing: Label Studio is away for minutes, or refuses the token.
    """
    request.check()
    progress("looking for images", 0, 0)
    images = find_images(request.sources)
    notes = _check_named(request, images)
    target = open_target(request, own.label_studio)
    with folder_of_one(request.out / STATE, "upload") as folder:
        plan = Plan(request, target, images, ScoreTable(len(images)), notes=[*target.notes, *notes])
        reader = ImageReader(own.settings.image_max_mb * 1_000_000, own.settings.image_max_megapixels * 1_000_000)
        _read_all(plan, reader, folder, own, progress)
        _compare(plan, own, progress)
        plan.near = _near_duplicates(plan)
        outcome = Outcome(target.project_id)
        if plan.new and not request.dry_run:
            _check_served(plan, own)
            outcome = Delivery(plan, own.label_studio, reader, progress).run()
        _write_report(plan, outcome)
    return plan, outcome


def _check_named(request: Request, images: Sequence[SourceImage]) -> list[str]:
    """Refuse, before anything is read, references that Label Studio or browsers cannot follow; say of the doubtful.

    Raises:
        BadRequest: an address of a kind that Label Studio does not know, or none can be made.
    """
    named = [image for image in images if request.by_reference(image)]
    check_references(request, named)
    for image in named:
        scheme = urlsplit(reference_of(image, request)).scheme
        if scheme not in ("", "s3", "gs", "http", "https"):
            raise BadRequest(
                f"Label Studio cannot open {scheme}:// addresses, as of {without_password(image.path)}: --copy uploads "
                "the images themselves."
            )
    tiffs = sum(image.path.lower().endswith((".tif", ".tiff")) for image in named)
    return [f"{tiffs:,} are TIFF, which browsers do not show. Uploaded, they become PNG."] if tiffs else []


def open_target(request: Request, label_studio: LabelStudio) -> Target:
    """The project that was named; else one of that title, made if there is none. A second run goes on in it."""
    if request.project_id is not None:
        found = _project(request.project_id, label_studio)
        title = str(found.get("title") or "")
        return Target(request.project_id, title, _label_map(str(found.get("label_config") or "")).image_key)
    title, config = str(request.new), request.config()
    wanted = _label_map(config)
    same = label_studio.projects_titled(title)
    if not same:
        made = None if request.dry_run else label_studio.create_project(title, config)
        return Target(made, title, wanted.image_key)
    ids = [int(one["id"]) for one in same]
    if len(same) > 1 or not _is_same(wanted, str(same[0].get("label_config") or "")):
        raise BadRequest(
            f"Label Studio has a project {title!r} already ({', '.join(map(str, ids))}), with other labels or more "
            f"than once. Go on in it with --project {ids[0]}, or choose another title."
        )
    note = f"Project {ids[0]} {printable(title)!r} is there already: going on in it."
    return Target(ids[0], title, wanted.image_key, (note,))


def _project(project_id: int, label_studio: LabelStudio) -> dict[str, Any]:
    try:
        return label_studio.project(project_id)
    except NotFound as error:
        raise BadRequest(
            f"Label Studio has no project {project_id} that this token's user may see. Its id is in the address of its "
            "pages: /projects/ID/data"
        ) from error


def _label_map(config: str) -> LabelMap:
    return LabelMap.from_config(config, "hull")


def _is_same(wanted: LabelMap, config: str) -> bool:
    try:
        found = _label_map(config)
    except HardfirstError:
        return False
    return (found.labels, found.image_key) == (wanted.labels, wanted.image_key)


# --- what the images are ----------------------------------------------------------------------------------------------


def _read_all(plan: Plan, reader: ImageReader, folder: Path, own: Services, progress: Progress) -> None:
    """Digest and descriptor of every image, or why it has none. Whatever ends it, what was read is kept."""
    limits = [own.settings.image_max_mb, own.settings.image_max_megapixels]
    parts = PartStore(folder, ["upload", DESCRIPTOR_NAME, *limits])
    plan.table = parts.load(plan.images)
    pending = np.flatnonzero(~plan.table.known).tolist()
    rows: list[tuple[int, ImageRow]] = []
    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="read") as pool:
        found = opened_ahead(pending, lambda position: _looked_at(plan.images[position], reader), pool)
        try:
            for position, row in zip(pending, found, strict=True):
                rows.append((position, row))
                if len(rows) == PART_IMAGES:
                    parts.add(rows, plan.table)
                    rows = []
                plan.fresh += 1
                progress("reading", plan.fresh, len(pending))
        finally:  # Ctrl-C too
            parts.add(rows, plan.table)


def _looked_at(image: SourceImage, reader: ImageReader) -> ImageRow:
    identity = identity_of(image)
    try:
        pixels, content = reader.open_with_content(image)
        _check_side(pixels)
        embedding = describe(pixels)
    except ImageUnusable as error:
        return ImageRow(identity, problem=str(error), passing=isinstance(error, ImageAway))
    return ImageRow(identity, size=pixels.size, embedding=embedding, digest=sha256(content).digest())


def _check_side(pixels: Image.Image) -> None:
    if min(pixels.size) < MIN_SIDE:
        raise ImageUnusable(
            f"the image has {pixels.width} x {pixels.height} pixels; the trainer takes none below {MIN_SIDE}."
        )


def _near_duplicates(plan: Plan) -> list[list[int]]:
    """Groups of two and more distinct images that look alike, largest first."""
    distinct = [at for at in np.flatnonzero(plan.table.usable).tolist() if at not in plan.twice]
    if not distinct:
        return []
    found = near_duplicate_groups(plan.table.embeddings[distinct], plan.request.near_duplicate_threshold)
    groups: dict[int, list[int]] = {}
    for position, group in zip(distinct, found.tolist(), strict=True):
        groups.setdefault(group, []).append(position)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


# --- what the project has ---------------------------------------------------------------------------------------------


def read_known(label_studio: LabelStudio, target: Target, tell: Callable[[int], None] = lambda done: None) -> Known:
    """Of every task of the project. `tell` is called with how many there are so far."""
    known = Known()
    tell(0)
    if target.project_id is not None:
        for page in label_studio.tasks(target.project_id, include="id,data,meta"):
            for task in page:
                known.add(task, target.image_key)
            tell(known.tasks)
    return known


def address_key(address: str) -> str:
    """The same for two addresses of one image: Label Studio names itself in those it makes, and quotes differ."""
    parts = urlsplit(address) if "://" in address or address.startswith("/") else None
    if parts is not None and parts.path.startswith(("/data/upload/", "/data/local-files")):
        address = f"{parts.path.rstrip('/')}?{parts.query}" if parts.query else parts.path
    return unquote(address)


def _recorded(meta: object) -> str:
    """The SHA-256 in a task's meta, which anybody may have written; empty without."""
    record = meta.get(META) if isinstance(meta, Mapping) else None
    digest = record.get("sha256") if isinstance(record, Mapping) else None
    return digest if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) else ""


def _compare(plan: Plan, own: Services, progress: Progress) -> None:
    """Sort the images into those the project has, those that come twice, and the new ones."""
    known = read_known(own.label_studio, plan.target, lambda done: progress("asking Label Studio what it has", done, 0))
    first: dict[str, int] = {}
    for position in np.flatnonzero(plan.table.usable).tolist():
        digest = plan.digest(position)
        task_id = _task_with(plan, position, known)
        if task_id is not None:
            plan.there[position] = task_id
        elif digest in first:
            plan.twice[position] = first[digest]
        else:
            plan.new.append(position)
        first.setdefault(digest, position)
    if plan.new and plan.target.project_id is not None:
        _find_uploads(plan, known, own, progress)


def _task_with(plan: Plan, position: int, known: Known) -> int | None:
    image = plan.images[position]
    with_digest = known.digests.get(plan.digest(position))
    if with_digest:
        return with_digest[0]
    if plan.request.by_reference(image):
        return known.addresses.get(address_key(reference_of(image, plan.request)))
    return None


def _find_uploads(plan: Plan, known: Known, own: Services, progress: Progress) -> None:
    """Uploaded files that no run of ours has a record of: of other people's tasks, and of a run that was killed."""
    wanted = {plan.images[position].size for position in plan.new}
    names = {_clean(PurePosixPath(plan.images[position].path).name) for position in plan.new}
    candidates = [
        one
        for one in _uploads_without_record(plan.target, known, own.label_studio)
        if (one.size in wanted if one.size is not None else one.name in names)
    ]
    by_digest = {plan.digest(position): position for position in plan.new}
    for done, one in enumerate(candidates):
        progress("comparing with what was uploaded before", done, len(candidates))
        position = by_digest.get(_digest_of_upload(one.address, own))
        if position is not None and one.task_id is not None:
            plan.there[position] = one.task_id
        elif position is not None and not plan.request.by_reference(plan.images[position]):
            plan.found[position] = one.address
    plan.new = [position for position in plan.new if position not in plan.there]
    plan.found = {position: address for position, address in plan.found.items() if position not in plan.there}


@dataclass(frozen=True)
class _Upload:
    """A file on Label Studio of which no task says what its content is."""

    address: str
    size: int | None  # bytes; None where somebody else uploaded it
    task_id: int | None

    @property
    def name(self) -> str:
        """As it was when it was uploaded, cleaned: Label Studio puts eight characters and a dash before it."""
        return unquote(self.address).rpartition("/")[2].partition("-")[2]


def _uploads_without_record(target: Target, known: Known, label_studio: LabelStudio) -> list[_Upload]:
    assert target.project_id is not None
    sizes = {address_key(address): size for address, size in label_studio.uploads(target.project_id).items()}
    of_tasks = {
        address_key(one): _Upload(one, sizes.get(address_key(one)), at) for one, at in known.without_record.items()
    }
    without_task = {key: _Upload(quote(key), size, None) for key, size in sizes.items() if key not in known.addresses}
    return [one for _, one in sorted({**without_task, **of_tasks}.items())]


def _digest_of_upload(address: str, own: Services) -> str:
    try:
        return sha256(own.images.fetch({"image": address}, "image")).hexdigest()
    except ImageUnusable as error:  # it cannot be the same as an image that can be read
        log.info("%s was not compared: %s", address, error)
        return ""


def _clean(name: str) -> str:
    """As Label Studio (Django) cleans the name of an uploaded file."""
    return re.sub(r"[^-\w.]", "", name.strip().replace(" ", "_"))


def _check_served(plan: Plan, own: Services) -> None:
    """Ask for the first image that stays where it is, before thousands of tasks name what nobody can open."""
    request = plan.request
    position = next((at for at in plan.new if request.by_reference(plan.images[at])), None)
    if position is None:
        return
    reference = reference_of(plan.images[position], request)
    if reference.startswith(("s3://", "gs://")):
        plan.notes += _without_storage(reference, plan.target, own.label_studio)
        return
    try:
        own.images.open({"image": reference}, "image")
    except ImageUnusable as error:
        if request.local_files_root is None:
            plan.notes.append(f"hardfirst itself cannot open {printable(reference)}: {error}")
            return
        raise BadRequest(
            f"Label Studio does not serve {printable(reference)}: {error} Start it with "
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT set to that "
            "root, and add the folder to the project: Settings -> Cloud Storage -> Add Source Storage -> Local files "
            "(no sync needed)."
        ) from error


def _without_storage(reference: str, target: Target, label_studio: LabelStudio) -> Iterator[str]:
    scheme, bucket = urlsplit(reference).scheme, urlsplit(reference).netloc
    if target.project_id is None:
        return
    storages = label_studio.storages(target.project_id, {"s3": "s3", "gs": "gcs"}[scheme])
    if not any(one.get("bucket") == bucket for one in storages):
        yield (
            f"The project has no storage for {scheme}://{bucket}: until it has one, annotators see no image. Settings "
            "-> Cloud Storage -> Add Source Storage (no sync needed)."
        )


# --- to Label Studio --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One task to be made."""

    position: int
    address: str = ""  # of what needs no upload
    name: str = ""
    content: bytes = b""


class Delivery:
    """Brings the new images of a plan to Label Studio, in groups, and waits where it is away."""

    def __init__(self, plan: Plan, label_studio: LabelStudio, reader: ImageReader, progress: Progress) -> None:
        assert plan.target.project_id is not None
        self._plan, self._label_studio, self._reader, self._progress = plan, label_studio, reader, progress
        self._project_id = plan.target.project_id
        self._outcome = Outcome(plan.target.project_id)

    def run(self) -> Outcome:
        started = time.monotonic()
        self._tell()
        for group in self._groups():
            self._deliver(group)
            self._tell()
        self._outcome.seconds = time.monotonic() - started
        self._outcome.notes += self._look_again()
        return self._outcome

    def _tell(self) -> None:
        done = self._outcome.made + len(self._outcome.problems)
        self._progress("uploading", done, len(self._plan.new))

    def _groups(self) -> Iterator[list[Item]]:
        """First what needs no upload, then files: read as they are needed, a few in memory."""
        plan = self._plan
        named = {
            at: plan.found.get(at) or reference_of(plan.images[at], plan.request)
            for at in plan.new
            if at in plan.found or plan.request.by_reference(plan.images[at])
        }
        yield from _grouped((Item(at, address) for at, address in named.items()), TASKS_AT_ONCE)
        files = (self._file(at) for at in plan.new if at not in named)
        yield from _grouped((one for one in files if one is not None), FILES_AT_ONCE, lambda one: len(one.content))

    def _file(self, position: int) -> Item | None:
        image = self._plan.images[position]
        try:
            content = self._reader.read(image)
            if sha256(content).hexdigest() != self._plan.digest(position):
                raise ImageUnusable("it has changed since it was read. Start the command again.")
            name, content = _as_shown(PurePosixPath(image.path).name, content, self._reader)
        except ImageUnusable as error:
            self._outcome.problems[position] = str(error)
            return None
        return Item(position, name=name, content=content)

    def _deliver(self, items: list[Item]) -> None:
        """Until it is there: what of it arrived before Label Studio went away is not sent again."""
        patience = _Patience()
        while items:
            try:
                self._import(items)
                return
            except LabelStudioUnavailable as error:
                items = self._left(items, error, patience)
            except LabelStudioRefused as error:
                if len(items) == 1:
                    self._leave_out(items[0], error)
                    return
                self._deliver(items[: len(items) // 2])  # too large together, or one of them is bad
                items = items[len(items) // 2 :]

    def _import(self, items: Sequence[Item]) -> None:
        files = [(one.name, one.content) for one in items if not one.address]
        uploaded = iter(self._label_studio.upload_files(self._project_id, files) if files else [])
        tasks = [self._task(one.position, one.address or next(uploaded)) for one in items]
        self._label_studio.import_tasks(self._project_id, tasks)
        self._outcome.made += len(items)

    def _task(self, position: int, address: str) -> dict[str, Any]:
        plan = self._plan
        record = {"sha256": plan.digest(position), "name": plan.name(position)}
        return {"data": {plan.target.image_key: address}, "meta": {META: record}}

    def _left(self, items: list[Item], error: LabelStudioUnavailable, patience: _Patience) -> list[Item]:
        """What the project still lacks, once Label Studio answers again. A lost answer may mean done, or not."""
        while True:
            patience.wait(error)
            try:
                known = read_known(self._label_studio, self._plan.target)
            except LabelStudioUnavailable as again:
                error = again
                continue
            left = [one for one in items if self._plan.digest(one.position) not in known.digests]
            self._outcome.made += len(items) - len(left)
            return left

    def _leave_out(self, item: Item, error: LabelStudioRefused) -> None:
        if not self._outcome.made:
            raise error  # the first one already: it is not about this image
        self._outcome.problems[item.position] = str(error)

    def _look_again(self) -> Iterator[str]:
        """Whether all of it is in the project, and once."""
        known = read_known(self._label_studio, self._plan.target)
        made = {self._plan.digest(at) for at in self._plan.new if at not in self._outcome.problems}
        missing = made - known.digests.keys()
        if missing:
            yield f"{len(missing):,} are not among the project's tasks yet. Start the command again in a minute."
        doubles = {digest: ids for digest, ids in known.digests.items() if len(ids) > 1}
        if doubles:
            ids = ", ".join(str(one[-1]) for one in list(doubles.values())[:10])
            yield f"{len(doubles):,} images have two tasks (two uploads at once?): of the first, delete tasks {ids}."


class _Patience:
    """Waits longer each time, and gives up after PATIENCE seconds."""

    def __init__(self) -> None:
        self._ends, self._next = time.monotonic() + PATIENCE, FIRST_WAIT

    def wait(self, error: LabelStudioUnavailable) -> None:
        if time.monotonic() + self._next > self._ends:
            raise LabelStudioUnavailable(f"{error} What is uploaded stays: the same command goes on from there.")
        time.sleep(self._next)
        self._next = min(2 * self._next, LONGEST_WAIT)


def _grouped(items: Iterable[T], count: int, size_of: Callable[[T], int] = lambda item: 0) -> Iterator[list[T]]:
    group: list[T] = []
    size = 0
    for item in items:
        if group and (len(group) == count or size + size_of(item) > BYTES_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group


def _as_shown(name: str, content: bytes, reader: ImageReader) -> tuple[str, bytes]:
    """Name and bytes of what is uploaded: a file that browsers or Label Studio do not take becomes a PNG."""
    path = PurePosixPath(printable(name))
    suffix = path.suffix.lower()
    if suffix in NOT_SHOWN or content[:4] in _TIFF:
        content, suffix = as_png(reader.decode(content)), ".png"
    return f"{path.stem[:NAME_CHARACTERS]}{suffix}", content


# --- the report -------------------------------------------------------------------------------------------------------


def problems_of(plan: Plan, outcome: Outcome) -> dict[str, str]:
    """Name -> why it was left out."""
    return {plan.name(at): text for at, text in sorted({**plan.table.problems, **outcome.problems}.items())}


def report(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    request = plan.request
    return {
        "format": 1,
        "images_from": [without_password(source) for source in request.sources],
        "project": outcome.project_id,
        "dry_run": request.dry_run,
        "counts": {
            "images": len(plan.images),
            "new": len(plan.new),
            "made": outcome.made,
            "there_already": len(plan.there),
            "twice": len(plan.twice),
            "unusable": len(problems_of(plan, outcome)),
            "near_duplicates": sum(len(group) for group in plan.near),
            "near_duplicate_groups": len(plan.near),
        },
        "notes": [*plan.notes, *outcome.notes],
        "unusable": [{"image": name, "problem": text} for name, text in problems_of(plan, outcome).items()],
        "twice": [{"image": plan.name(at), "same_as": plan.name(first)} for at, first in sorted(plan.twice.items())],
        "near_duplicates": [[plan.name(at) for at in group] for group in plan.near],
    }


def _write_report(plan: Plan, outcome: Outcome) -> None:
    """The report, and the look-alikes as a list of paths, an empty line between groups."""
    out = plan.request.out
    folder = Artifacts(str(out.resolve()), out / "cache")
    groups = ["".join(f"{printable(plan.images[at].path)}\n" for at in group) for group in plan.near]
    files = {
        REPORT: json.dumps(report(plan, outcome), indent=1, allow_nan=False).encode(),
        NEAR: "\n".join(groups).encode(),
    }
    try:
        for name, content in files.items():
            folder.put(name, content)
            (out / name).chmod(0o644)
    except OSError as error:
        raise HardfirstError(f"The report cannot be written to {out}: {error}") from error
