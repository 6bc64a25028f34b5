"""What `hardfirst score` leaves behind: a manifest, a table, a contact sheet, and tasks for Label Studio."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from strategies.uncertainty import MEASURES
from worker.artifacts import Artifacts
from worker.boxes import to_regions
from worker.contact_sheet import MAX_CARDS, Card, Picture, Sheet, render_sheet, thumbnail
from worker.errors import HardfirstError, ImageUnusable
from worker.image_sources import ImageReader, SourceImage, printable, reference_of, without_password
from worker.label_studio import published_score
from worker.looking import FETCHERS
from worker.offline import Ranking
from worker.reasons import reason

MANIFEST, TABLE, SHEET = "manifest.json", "scores.parquet", "contact_sheet.html"
TASKS, RANDOM_TASKS, CONFIG = "label_studio.json", "label_studio_random.json", "label_config.xml"
TOP, RANDOM = "top.txt", "random.txt"
PROBLEMS_NAMED = 1000  # in the manifest; the table has all

Boxes = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Chosen:
    """One image of the batch, or of the random list, with all there is to say of it."""

    rank: int  # from 1
    position: int
    image: SourceImage
    utility: float
    parts: dict[str, float]
    boxes: Boxes  # (n, 6) boxes_xyxy, confidence, class id
    reason: str
    alike: tuple[str, ...]


def write_results(ranking: Ranking, reader: ImageReader) -> list[Path]:
    """Write all files, each whole or not at all; what an earlier run left and this one does not have goes.

    Returns: the files, the most useful first.
    """
    chosen = chosen_images(ranking, ranking.top)
    at_random = chosen_images(ranking, ranking.at_random)
    files = {
        SHEET: contact_sheet(ranking, chosen, reader).encode(),
        TASKS: _as_json(label_studio_tasks(ranking, chosen)),
        MANIFEST: _as_json(manifest(ranking, chosen)),
        TABLE: table(ranking),
        TOP: _text_list(chosen),
    }
    if ranking.label_map.labels:  # else nothing is known that could be drawn
        files[CONFIG] = label_config(ranking).encode()
    if ranking.request.with_random:
        files |= {RANDOM: _text_list(at_random), RANDOM_TASKS: _as_json(label_studio_tasks(ranking, at_random))}
    out = ranking.request.out
    folder = Artifacts(str(out.resolve()), out / "cache")
    try:
        for name, content in files.items():
            folder.put(name, content)
            (out / name).chmod(0o644)  # results are for colleagues and web servers too
        for name in {RANDOM, RANDOM_TASKS, CONFIG} - files.keys():
            (out / name).unlink(missing_ok=True)  # random images of another ranking need not be disjoint from this one
    except OSError as error:
        raise HardfirstError(f"The results cannot be written to {out}: {error}") from error
    return [out / name for name in files]


def chosen_images(ranking: Ranking, positions: Sequence[int]) -> list[Chosen]:
    boxes = ranking.parts.boxes_of(ranking.table, positions)
    return [_chosen(ranking, rank, position, boxes[position]) for rank, position in enumerate(positions, 1)]


def _chosen(ranking: Ranking, rank: int, position: int, boxes: Boxes) -> Chosen:
    batch = ranking.batch
    parts = dict(batch.parts.get(position, {}))
    if not ranking.eyes.knows_classes:
        parts.pop("uncertainty", None)  # it was taken as equal for all
    labels = ranking.class_to_label
    named = [(labels[int(box[5])], float(box[4])) for box in boxes if int(box[5]) in labels]
    why = reason(
        batch.strategy,
        parts.get("uncertainty"),
        parts.get("diversity"),
        named,
        measure=str(ranking.request.options_in_force.get("measure", batch.strategy)),
        any_labelled=ranking.n_labelled > 0,
    )
    alike = tuple(printable(ranking.images[other].key) for other in batch.alike.get(position, []))
    return Chosen(rank, position, ranking.images[position], batch.utilities[position], parts, boxes, why, alike)


def manifest(ranking: Ranking, chosen: Sequence[Chosen]) -> dict[str, Any]:
    """The batch, ranked, with what each utility is made of; and what it was made from."""
    request, problems = ranking.request, ranking.pool_problems
    named = list(problems.items())[:PROBLEMS_NAMED]
    return {
        "format": 1,
        "images_from": [without_password(source) for source in request.sources],
        "strategy": request.settings.strategy,
        "options": request.options_in_force,
        "settings": request.settings.model_dump(include={"imgsz", "confidence", "seed", "near_duplicate_threshold"})
        | {name: value for name, value in request.settings.model_dump().items() if name.startswith("uncertainty_")},
        "weights": [
            {"path": printable(str(path)), "sha256": found}
            for path, found in zip(request.weights, ranking.eyes.sha256, strict=False)
        ],
        "classes": ranking.eyes.names,
        "counts": counts(ranking),
        "notes": ranking.notes,
        "problems": [{"image": printable(ranking.images[at].key), "problem": text} for at, text in named],
        "images": [_entry(ranking, one) for one in chosen],
    }


def counts(ranking: Ranking) -> dict[str, int]:
    return {
        "pool": ranking.n_pool,
        "ranked": int(ranking.table.usable[: ranking.n_pool].sum()),
        "unusable": len(ranking.pool_problems),
        "labelled": ranking.n_labelled,
        "chosen": len(ranking.top),
        "at_random": len(ranking.at_random),
    }


def _entry(ranking: Ranking, one: Chosen) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "image": printable(one.image.key),
        "path": printable(one.image.path),
        "utility": one.utility,
        "parts": one.parts,
        "measures": _measures(ranking, one.position),
        "boxes": len(one.boxes),
        "reason": one.reason,
        "look_alikes": list(one.alike),
    }


def _measures(ranking: Ranking, position: int) -> dict[str, float]:
    values = dict(zip(MEASURES, ranking.table.measures[position].tolist(), strict=True))
    values["disagreement"] = float(ranking.table.disagreement[position])
    return {name: value for name, value in values.items() if not np.isnan(value)}


def table(ranking: Ranking) -> bytes:
    """All images of the pool as Parquet, one row each, in the order of their names."""
    import polars  # slow to import, and needed once

    size, batch, scores = ranking.n_pool, ranking.batch, ranking.table
    ranks = {position: rank for rank, position in enumerate(ranking.top, 1)}
    drawn = set(ranking.at_random)
    known = ("uncertainty", "diversity") if ranking.eyes.knows_classes else ("diversity",)
    of_part = {
        name: [batch.parts.get(at, {}).get(name) if name in known else None for at in range(size)]
        for name in ("uncertainty", "diversity")
    }
    measures = {name: _nullable(scores.measures[:size, column]) for column, name in enumerate(MEASURES)}
    columns: dict[str, tuple[Any, Any]] = {
        "image": ([printable(image.key) for image in ranking.images[:size]], polars.String),
        "path": ([printable(image.path) for image in ranking.images[:size]], polars.String),
        "rank": ([ranks.get(at) for at in range(size)], polars.Int32),
        "at_random": ([at in drawn for at in range(size)], polars.Boolean),
        "utility": ([batch.utilities.get(at) for at in range(size)], polars.Float64),
        **{name: (values, polars.Float64) for name, values in of_part.items()},
        **{name: (values, polars.Float64) for name, values in measures.items()},
        "disagreement": (_nullable(scores.disagreement[:size]), polars.Float64),
        "boxes": ([int(n) if ok else None for n, ok in _counted(ranking)], polars.Int32),
        "problem": ([scores.problems.get(at) for at in range(size)], polars.String),
    }
    frame = polars.DataFrame({name: polars.Series(values, dtype=dtype) for name, (values, dtype) in columns.items()})
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _counted(ranking: Ranking) -> list[tuple[int, bool]]:
    size, knows = ranking.n_pool, ranking.eyes.knows_classes
    usable = ranking.table.usable[:size].tolist()
    return [(count, ok and knows) for count, ok in zip(ranking.table.n_boxes[:size].tolist(), usable, strict=True)]


def _nullable(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def label_studio_tasks(ranking: Ranking, chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    """Tasks with their predictions, as Label Studio imports them: by its score, lowest first, they are ranked."""
    return [_task(ranking, one, len(chosen)) for one in chosen]


def _task(ranking: Ranking, one: Chosen, count: int) -> dict[str, Any]:
    width, height = (int(side) for side in ranking.table.sizes[one.position])
    regions = []
    if len(one.boxes):
        regions = to_regions(
            *(ranking.label_map, one.boxes[:, :4], one.boxes[:, 4], one.boxes[:, 5].astype(np.int64)),
            ranking.class_to_label,
            width,
            height,
        )
    prediction = {
        "model_version": model_version(ranking),
        "score": published_score(one.rank - 1, one.utility, count),
        "result": regions,
    }
    return {
        "data": {ranking.label_map.image_key: reference_of(one.image, ranking.request)},
        "predictions": [prediction],
    }


def model_version(ranking: Ranking) -> str:
    seen_by = ranking.eyes.sha256[0][:12] if ranking.eyes.sha256 else "no-detector"
    return f"hardfirst-score-{seen_by}"


def label_config(ranking: Ranking) -> str:
    """The one that was named; else one that the predictions fit."""
    if ranking.request.label_config is not None:
        return ranking.request.label_config.read_text(encoding="utf-8")
    return config_of_labels(ranking.label_map.labels)


def config_of_labels(names: Sequence[str]) -> str:
    """A labelling interface for boxes with these labels: control `label`, image `image`, data key `image`."""
    labels = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in names)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true" zoomControl="true"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}\n  </RectangleLabels>\n</View>\n'
    )


def contact_sheet(ranking: Ranking, chosen: Sequence[Chosen], reader: ImageReader) -> str:
    shown = list(chosen)[:MAX_CARDS]

    def picture(one: Chosen) -> Picture | None:
        try:
            return thumbnail(reader.open(one.image))
        except ImageUnusable:
            return None  # it was there when it was scored; its card says so

    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="thumbnail") as pool:
        pictures = list(pool.map(picture, shown))
    cards = [_card(ranking, one, found) for one, found in zip(shown, pictures, strict=True)]
    return render_sheet(_sheet(ranking, cards))


def _card(ranking: Ranking, one: Chosen, picture: Picture | None) -> Card:
    return Card(
        rank=one.rank,
        name=printable(one.image.key),
        picture=picture,
        size=(int(ranking.table.sizes[one.position][0]), int(ranking.table.sizes[one.position][1])),
        utility=one.utility,
        parts=one.parts,
        boxes=one.boxes,
        reason=one.reason,
        alike=one.alike,
    )


def _sheet(ranking: Ranking, cards: Sequence[Card]) -> Sheet:
    settings, problems = ranking.request.settings, ranking.pool_problems
    options = ranking.request.options_in_force
    ranked = sorted(ranking.batch.utilities.values(), reverse=True)
    hashes = ranking.eyes.sha256
    named = zip(ranking.request.weights, hashes, strict=False)
    seen_by = [f"{path.name} ({sha256[:8]})" for path, sha256 in named] or ["no weights of your classes"]
    return Sheet(
        cards=cards,
        n_chosen=len(ranking.top),
        n_ranked=len(ranked),
        sources=", ".join(without_password(source) for source in ranking.request.sources),
        strategy=settings.strategy,
        options=options,
        weights=", ".join(printable(name) for name in seen_by),
        imgsz=settings.imgsz,
        labels=ranking.class_to_label,
        utilities=ranked,
        chosen_utilities=[ranking.batch.utilities[position] for position in ranking.top],
        notes=ranking.notes,
        problems=[(printable(ranking.images[at].key), text) for at, text in problems.items()],
    )


def _text_list(chosen: Sequence[Chosen]) -> bytes:
    """Paths, one a line, as trainers read them. A name with a line break in it cannot be in such a list."""
    paths = [os.fsencode(one.image.path) for one in chosen]
    return b"".join(path + b"\n" for path in paths if b"\n" not in path and b"\r" not in path)


def _as_json(value: object) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()
