"""What has been scored already, on disk and in arrays: so that a run that was stopped goes on where it was.

A part is a file with the scores of some images, written whole or not at all. Its folder is named after all that a
score depends on besides the image; in it, an image is known by its path, size and time of change (or etag).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.uncertainty import MEASURES
from worker.artifacts import Artifacts
from worker.errors import Conflict, SettingsInvalid
from worker.image_sources import SourceImage
from worker.processes import lock_folder

log = logging.getLogger(__name__)

PART_IMAGES = 128  # what a kill costs, at most
FORMAT = 1  # of the parts: a change makes earlier ones unknown

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ImageRow:
    """What one pass says of one image, reduced: the class probabilities are not kept."""

    identity: bytes
    measures: Sequence[float] = ()  # as MEASURES; empty: not known
    disagreement: float | None = None
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 6), np.float32))
    size: tuple[int, int] = (0, 0)  # width, height in pixels
    embedding: NDArray[np.float32] | None = None
    problem: str | None = None
    passing: bool = False  # the problem may be gone another time: not to be remembered
    digest: bytes = b""  # SHA-256 of the file; empty: not asked for


class ScoreTable:
    """The scores of N images, by position: measures (N, 3), disagreement (N,), sizes (N, 2) and embeddings (N, D).

    What is not known is NaN. `n_boxes` counts the boxes that are drawn; they stay on disk: see `PartStore.boxes_of`.
    """

    def __init__(self, size: int) -> None:
        self.measures = np.full((size, len(MEASURES)), np.nan)
        self.disagreement = np.full(size, np.nan)
        self.sizes = np.zeros((size, 2), np.int32)
        self.n_boxes = np.zeros(size, np.int32)
        self.known = np.zeros(size, np.bool_)  # scored, or found unusable
        self.usable = np.zeros(size, np.bool_)  # scored
        self.embeddings = np.zeros((size, 0), np.float32)
        self.digests = np.zeros((size, 32), np.uint8)  # SHA-256 of the files; 0: not asked for
        self.problems: dict[int, str] = {}
        self.part = np.full(size, -1, np.int32)  # where its boxes are: number of the part, row in it
        self.row = np.zeros(size, np.int32)

    def take(self, arrays: Arrays, problems: Mapping[int, str], positions: NDArray[np.int64], part: int) -> None:
        """The rows of a part, whose positions are `positions`; -1 for those that nobody asks for."""
        rows = np.flatnonzero(positions >= 0)
        at = positions[rows]
        for name in ("measures", "disagreement", "sizes", "n_boxes", "usable"):
            getattr(self, name)[at] = arrays[name][rows]
        if "digests" in arrays:  # parts of before have none
            self.digests[at] = arrays["digests"][rows]
        self.part[at], self.row[at] = part, rows
        if len(arrays["embeddings"]) and not self.embeddings.shape[1]:
            self.embeddings = np.zeros((len(self.known), arrays["embeddings"].shape[1]), np.float32)
        place = np.cumsum(arrays["usable"]) - 1  # row -> row of its embedding
        good = rows[arrays["usable"][rows]]
        self.embeddings[positions[good]] = arrays["embeddings"][place[good]] if len(good) else 0.0
        self.problems |= {int(positions[row]): text for row, text in problems.items() if positions[row] >= 0}
        self.known[at] = True  # last: what a damaged part broke off is scored again


class PartStore:
    """The parts of one detector and reading, in a folder."""

    def __init__(self, folder: Path, depends_on: object) -> None:
        self._key = hashlib.sha256(json.dumps([FORMAT, depends_on], sort_keys=True).encode()).hexdigest()[:16]
        self._artifacts = Artifacts(str(folder), folder / "cache")
        numbers = (path.stem.partition("-")[2] for path in (folder / self._key).glob("part-*.npz"))
        self._numbers = sorted(int(number) for number in numbers if number.isdecimal())

    def load(self, images: Sequence[SourceImage]) -> ScoreTable:
        """What is known of these images. A part that can not be read is scored again, after a warning."""
        table = ScoreTable(len(images))
        wanted = {identity_of(image): position for position, image in enumerate(images)}
        for number in self._numbers:
            try:
                arrays, note = self._artifacts.get_arrays(self._name(number))
                identities = [row.tobytes() for row in arrays["identity"]]
                positions = np.array([wanted.get(one, -1) for one in identities], np.int64)
                table.take(arrays, _problems(note), positions, number)
            except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
                log.warning("%s is damaged, its images are scored again: %s", self._name(number), error)
        return table

    def add(self, rows: Sequence[tuple[int, ImageRow]], table: ScoreTable) -> None:
        """Keep the rows of these positions: on disk, but for what may pass, and in the table."""
        lasting = [pair for pair in rows if not pair[1].passing]
        if lasting:
            number = self._numbers[-1] + 1 if self._numbers else 0
            arrays, problems = _as_arrays([row for _, row in lasting])
            self._artifacts.put_arrays(self._name(number), arrays, {"problems": problems})
            self._numbers.append(number)
            table.take(arrays, problems, np.array([position for position, _ in lasting], np.int64), number)
        for position, row in rows:
            if row.passing:
                table.known[position] = True
                table.problems[position] = str(row.problem)

    def boxes_of(self, table: ScoreTable, positions: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Position -> (n, 6) boxes_xyxy in pixels, confidence, class id, by falling confidence."""
        found = {position: np.zeros((0, 6), np.float32) for position in positions}
        with_boxes = [position for position in positions if table.n_boxes[position]]
        for number in sorted({int(table.part[position]) for position in with_boxes}):
            arrays, _ = self._artifacts.get_arrays(self._name(number))
            ends = np.cumsum(arrays["n_boxes"])
            for position in with_boxes:
                if table.part[position] == number:
                    end = int(ends[table.row[position]])
                    found[position] = arrays["boxes"][end - int(table.n_boxes[position]) : end]
        return found

    def _name(self, number: int) -> str:
        return f"{self._key}/part-{number:06d}.npz"


@contextlib.contextmanager
def folder_of_one(folder: Path, command: str) -> Iterator[Path]:
    """The folder, for this process alone: two would look at the same images twice.

    Raises:
        Conflict: another process has it.
        SettingsInvalid: it cannot be written.
    """
    try:
        lock = lock_folder(folder)
    except Conflict as error:
        told = f"Another `hardfirst {command}` writes to {folder.parent}: wait for it, or name another --out."
        raise Conflict(told) from error
    except OSError as error:
        raise SettingsInvalid(f"--out {folder.parent} cannot be written: {error}") from error
    try:
        yield folder.resolve()
    finally:
        os.close(lock)


def identity_of(image: SourceImage) -> bytes:
    """Changes when the image does."""
    text = f"{image.path}\0{image.stamp}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _as_arrays(rows: Sequence[ImageRow]) -> tuple[Arrays, dict[int, str]]:
    embeddings = [row.embedding for row in rows if row.embedding is not None]
    nothing = (np.nan,) * len(MEASURES)
    arrays: Arrays = {
        "identity": np.array([list(row.identity) for row in rows], np.uint8),
        "measures": np.array([tuple(row.measures) or nothing for row in rows], np.float64),
        "disagreement": np.array([np.nan if row.disagreement is None else row.disagreement for row in rows]),
        "sizes": np.array([row.size for row in rows], np.int32),
        "n_boxes": np.array([len(row.boxes) for row in rows], np.int32),
        "boxes": np.concatenate([row.boxes for row in rows]),
        "usable": np.array([row.embedding is not None for row in rows]),
        "digests": np.array([list(row.digest.rjust(32, b"\0")) for row in rows], np.uint8),
        "embeddings": np.stack(embeddings) if embeddings else np.zeros((0, 0), np.float32),
    }
    return arrays, {number: row.problem for number, row in enumerate(rows) if row.problem is not None}


def _problems(note: Any) -> dict[int, str]:
    return {int(row): str(text) for row, text in note["problems"].items()}
