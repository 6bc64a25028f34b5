"""Scores that are there already: of a shard that runs again, of an earlier round with the same detector.

Scoring is the dearest part of a round on a large pool. A round whose detector, settings and labels are those of an
earlier one (it was cancelled, it failed while publishing, only the selection was changed) takes over what was found.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, func, or_, select, update

from strategies.late import DISAGREEMENT
from worker.artifacts import round_key
from worker.descriptor import DESCRIPTOR_NAME
from worker.errors import NotFound
from worker.services import Services
from worker.store import loads, scores
from worker.store import rounds as round_rows
from worker.uncertainty import reading_of
from worker.work import MEASURES, Work

log = logging.getLogger(__name__)

COPIED = (*MEASURES, DISAGREEMENT, "regions", "n_boxes")
AT_ONCE = 500  # task ids in one query


@dataclass(frozen=True)
class KnownScore:
    """What is known of one image: columns of `scores`, and its embedding (D,)."""

    task_id: int
    columns: dict[str, Any]
    embedding: NDArray[np.float32]


def image_digest(reference: str) -> str:
    """Tells that a task shows another image than the one that was scored."""
    return hashlib.sha256(reference.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def scoring_key(work: Work) -> str:
    """What a score depends on besides the image: detector, committee, image size, confidence, what labels mean,
    and how uncertainty is read."""
    report = loads(work.round.report)
    members = [one.get("sha256") for one in report.get("members", [])]
    settings = work.settings
    parts = (
        work.round.weights_sha256 or DESCRIPTOR_NAME,
        members,
        settings.imgsz,
        settings.confidence,
        work.project.label_config,
        settings.shapes,
        reading_of(settings, report.get("boxes_per_class", {}), report.get("chances_missed")),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def remember_key(work: Work) -> str:
    """The round's scoring key, written where later rounds look for it."""
    key = scoring_key(work)
    if work.round.scored_as != key:
        with work.services.store.write() as connection:
            this = round_rows.c.id == work.round.id
            connection.execute(update(round_rows).where(this).values(scored_as=key))
    return key


def scored_so_far(connection: Connection, round_id: int, shard: int | None = None) -> tuple[int, int]:
    """How many rows a round (or one shard of it) has, and how many of them are scored: a broken image counts too."""
    has_score = or_(scores.c.row.is_not(None), scores.c.problem.is_not(None))
    query = select(func.count(), func.count().filter(has_score)).where(scores.c.round_id == round_id)
    total, scored = connection.execute(query if shard is None else query.where(scores.c.shard == shard)).one()
    return int(total), int(scored)


def shard_is_scored(connection: Connection, round_id: int, shard: int) -> bool:
    """Whether an attempt before this one has written all of a shard's rows; its embeddings were written before them."""
    total, scored = scored_so_far(connection, round_id, shard)
    return bool(total) and total == scored


def known_scores(work: Work, key: str, images: Sequence[tuple[int, str]]) -> list[KnownScore]:
    """Of these (task id, image reference) pairs, those that an earlier round scored under the same key.

    Broken images are not among them: they may have been mended.
    """
    with work.services.store.read() as connection:
        earlier = _rounds_scored_as(connection, work, key)
    found: dict[int, KnownScore] = {}
    for round_row in earlier:  # the newest may have been cancelled before it had them all
        left = {task_id: reference for task_id, reference in images if task_id not in found}
        found |= {one.task_id: one for one in _known_of(work, round_row, left)}
    return list(found.values())


def _rounds_scored_as(connection: Connection, work: Work, key: str) -> Sequence[Row[Any]]:
    query = select(round_rows).where(
        round_rows.c.project_id == work.project.id,
        round_rows.c.scored_as == key,
        round_rows.c.id != work.round.id,
    )
    return connection.execute(query.order_by(round_rows.c.number.desc())).all()


def _known_of(work: Work, earlier: Row[Any], images: Mapping[int, str]) -> list[KnownScore]:
    with work.services.store.read() as connection:
        rows = _rows(connection, earlier.id, images)
    try:
        return _with_embeddings(work.services, work.project.id, earlier.number, rows)
    except NotFound as gone:
        log.warning("round %s takes nothing over from round %s: %s", work.round.number, earlier.number, gone)
        return []


def _rows(connection: Connection, round_id: int, reference_of: Mapping[int, str]) -> list[Row[Any]]:
    columns = (scores.c[name] for name in ("task_id", "shard", "row", "image", *COPIED))
    query = select(*columns).where(scores.c.round_id == round_id, scores.c.shard >= 0, scores.c.row.is_not(None))
    ids = list(reference_of)
    found: list[Row[Any]] = []
    for start in range(0, len(ids), AT_ONCE):
        found += connection.execute(query.where(scores.c.task_id.in_(ids[start : start + AT_ONCE]))).all()
    return [row for row in found if row.image == image_digest(reference_of[row.task_id])]


def _with_embeddings(own: Services, project_id: int, number: int, rows: Sequence[Row[Any]]) -> list[KnownScore]:
    """One shard's embeddings in memory at a time."""
    found = []
    for shard in sorted({row.shard for row in rows}):
        embeddings = shard_embeddings(own, project_id, number, shard)
        for row in (one for one in rows if one.shard == shard):
            columns = {name: getattr(row, name) for name in COPIED}
            found.append(KnownScore(int(row.task_id), columns, embeddings[row.row].copy()))
    return found


def shard_embeddings(own: Services, project_id: int, number: int, shard: int) -> NDArray[np.float32]:
    """(n, D): of the images of one shard that could be read, in the order of `scores.row`."""
    content = own.artifacts.get(round_key(project_id, number, f"embeddings-{shard:05d}.npy"))
    found: NDArray[np.float32] = np.load(io.BytesIO(content), allow_pickle=False)
    return found
