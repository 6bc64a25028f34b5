"""The results of a simulation as files: results.json, PNGs, and one page that holds it all."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageDraw

from worker.boxes import yolo_to_xyxy
from worker.evaluation import UNTAUGHT
from worker.images import decode_image
from worker.simulate import Bench, Step, write_bytes, write_json
from worker.simulation_results import Json, collect, compare, rounds_of
from worker.simulation_world import Oracle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0b6fa4", "#d1495b", "#2e8b57", "#b8860b", "#7b4fa3", "#008b8b", "#c2571a", "#5f6b7a", "#a0307a", "#556b2f")
BASELINE = "#222222"
NOISE = ("#9aa0a6", "#c0a98f", "#8fa9c0")  # the baseline's other draws
DPI = 130
CONTACT_COLUMNS, CONTACT_IMAGES, CONTACT_SIDE = 8, 24, 150  # pixels
BOX_COLOURS = ("#ffd400", "#00e5ff", "#ff4d94", "#7cff4d", "#ff8a1f", "#b388ff", "#ffffff", "#4d7cff")


def write_results(bench: Bench, failures: Mapping[str, str]) -> None:
    """What is done by now, without comparisons."""
    write_json(bench.plan.out / "results.json", collect(bench, failures))


def write_report(bench: Bench, failures: Mapping[str, str]) -> Path:
    """results.json with comparisons, PNGs, and report.html, which needs no other file. Returns that."""
    out = bench.plan.out
    results = collect(bench, failures)
    results["comparison"] = compare(results, bench.arrays)
    write_json(out / "results.json", results)
    figures = draw(results)
    for old in (out / "rare.png", *out.glob("contact-*.png")):
        old.unlink(missing_ok=True)  # an earlier run may have had other arms, and rare classes
    for name, content in figures.items():
        write_bytes(out / f"{name}.png", content)
    sheets = contact_sheets(bench, results)
    for label, content in sheets.items():
        write_bytes(out / f"contact-{file_name(label)}.png", content)
    page = render(results, figures, sheets)
    write_bytes(out / "report.html", page.encode())
    return out / "report.html"


def file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.@=-]+", "_", label)[:80]


# --- the page -------------------------------------------------------------------------------------------------------


def render(results: Json, figures: Mapping[str, bytes], sheets: Mapping[str, bytes]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"row": lambda values: " · ".join(_mean_count(value) for value in values)}
    environment.filters |= {"signed": _signed, "points": _points, "count": _count, "duration": _duration}
    return environment.get_template("simulation.html").render(
        results=results,
        comparison=results["comparison"],
        headline=headline(results),
        figures={name: _data_url(content, "png") for name, content in figures.items()},
        sheets={label: _data_url(_as_jpeg(content), "jpeg") for label, content in sheets.items()},
        batches=batch_table(results),
        seconds=seconds_of(results),
        colours=colours(results),
    )


def headline(results: Json) -> list[str]:
    """What the numbers say, in sentences that promise no more than they do."""
    comparison, said = results["comparison"], []
    base = comparison["baseline"]
    areas = {label: found for label, found in comparison["areas"].items() if found["n"] and label != base}
    noise = {label: areas[label] for label in comparison["noise_arms"] if label in areas}
    real = {label: found for label, found in areas.items() if label not in noise}
    if not real:
        return ["There is no arm yet that can be compared."]
    if highest_map50(results) < UNTAUGHT:
        return [
            f"Nothing was learned: no arm came to an mAP50 of {UNTAUGHT}, so nothing can be compared. Give it more "
            "--epochs, a larger --imgsz or --seed-size, or better --weights."
        ]
    best = max(real, key=lambda label: real[label]["difference"])
    found, saved = real[best], comparison["labels_saved"][best]
    gain = round(found["difference"] * 100, 1)
    where = f"{abs(gain):.1f} points of mAP50 {'above' if gain > 0 else 'below'}" if gain else "level with"
    said.append(
        f"Over the whole curve {best}{', the best of ' + str(len(real)) + ' arms,' if len(real) > 1 else ''} lies "
        f"{where} {base}{_interval_words(found)}."
    )
    if saved["share_to_final"] is not None and gain > 0:
        said.append(
            f"It reaches {base}'s last mAP50 ({saved['final']:.3f}) with {saved['to_final']:.0f} labels, "
            f"{saved['share_to_final']:.0%} of what {base} had."
        )
    if noise:
        said.append(_noise_words(base, noise))
    else:
        said.append(f"How large noise is, is not known: add the arm {base}@2, another draw of {base}, to see it.")
    if len(real) > 1:
        said.append("The best of several was picked after seeing them all, which flatters it: prove it on other seeds.")
    return said


def highest_map50(results: Json) -> float:
    return max((one["map50"] for run in results["runs"] for one in run["rounds"]), default=0.0)


def _noise_words(base: str, noise: Mapping[str, Json]) -> str:
    """Of single seeds: the mean of A/A differences is 0 but for luck, however large each of them is."""
    each = [value for found in noise.values() for value in found["each"]]
    differs = f"Noise: another draw of {base} differs from it by {_largest(each) * 100:+.1f} points over the curve"
    if len(each) == 1:
        return f"{differs}. A difference of that size means nothing on one seed."
    spread = math.sqrt(float(np.mean(np.square(each)))) * 100
    return f"{differs} at most and by {spread:.1f} typically, on one seed: such a difference on one seed means nothing."


def _largest(values: Sequence[float]) -> float:
    return max(values, key=abs)


def _interval_words(found: Json) -> str:
    if found["low"] is None:
        return " (one seed: no interval; six or more are needed for a claim)"
    few = "" if found["n"] >= 6 else "; six seeds or more are needed for a claim"
    return f" (95 % interval {found['low'] * 100:+.1f} to {found['high'] * 100:+.1f}, {found['n']} seeds{few})"


def batch_table(results: Json) -> list[Json]:
    """Per arm: what its batches held, mean over seeds, round by round."""
    rows = []
    for arm in results["arms"]:
        seeds = list(rounds_of(results, arm["label"]).values())
        longest = max((len(rounds) for rounds in seeds), default=0)
        batches = [[rounds[n]["batch"] for rounds in seeds if len(rounds) > n] for n in range(1, longest)]
        row: Json = {"label": arm["label"]}
        row["tied"] = [_mean(b["tied"] for b in some) if some[0]["tied"] is not None else None for some in batches]
        for name in ("rare_images", "boxes", "empty_images"):
            row[name] = [_mean(batch[name] for batch in some) for some in batches]
        row["near_duplicates"] = [_mean(len(batch["near_duplicates"]) for batch in some) for some in batches]
        rows.append(row)
    return rows


def seconds_of(results: Json) -> list[Json]:
    """Per arm: seconds spent, all rounds and seeds. Round 0's count in each arm, though they were spent once."""
    rows = []
    for arm in results["arms"]:
        spent = [one["seconds"] for rounds in rounds_of(results, arm["label"]).values() for one in rounds]
        kinds = ("training", "measuring", "scoring", "choosing")
        rows.append({"label": arm["label"], **{kind: sum(one[kind] for one in spent) for kind in kinds}})
    return rows


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value * 100:+.1f}"


def _points(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.1f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _mean_count(value: float | None) -> str:
    """Of a few seeds: half an image a batch is not none."""
    return _count(value) if value is None or value >= 10 or value == round(value) else f"{value:.1f}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _as_jpeg(content: bytes) -> bytes:
    """A contact sheet is photographs: a tenth of the PNG's size in the page."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB").save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


# --- figures --------------------------------------------------------------------------------------------------------


def colours(results: Json) -> dict[str, str]:
    comparison = results["comparison"]
    fixed = {comparison["baseline"]: BASELINE}
    fixed |= {label: NOISE[place % len(NOISE)] for place, label in enumerate(comparison["noise_arms"])}
    others = [arm["label"] for arm in results["arms"] if arm["label"] not in fixed]
    return fixed | {label: PALETTE[place % len(PALETTE)] for place, label in enumerate(others)}


def draw(results: Json) -> dict[str, bytes]:
    """Name -> PNG: curves, differences, rare (if there are rare classes), batches."""
    found = {"curves": _draw_curves(results), "differences": _draw_differences(results)}
    if results["data"]["rare"]:
        found["rare"] = _draw_rare(results)
    found["batches"] = _draw_batches(results)
    return {name: _png(figure) for name, figure in found.items()}


def _figure(columns: int, width: float = 4.6, height: float = 3.9) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure  # not pyplot: that keeps figures, and looks for a screen

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, place + 1) for place in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e8eb", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _plain(text: str) -> str:
    """matplotlib takes what stands between two dollars for a formula."""
    return text.replace("$", r"\$")


def _from_zero(ax: Axes) -> None:
    """No interval below 0, and no axis of a thousandth where nothing was learned."""
    ax.set_ylim(0, max(ax.get_ylim()[1], 0.1))


def _legend_below(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)


def _draw_curves(results: Json) -> Figure:
    figure, axes = _figure(3)
    titles = {"labels": "labels", "boxes": "boxes drawn", "minutes": "estimated annotator minutes"}
    for ax, (x, title) in zip(axes, titles.items(), strict=True):
        for label, colour in colours(results).items():
            _line(ax, results["comparison"]["curves"][label][x], label, colour, results)
        ax.set_xlabel(title)
        ax.set_ylabel("mAP50 on the holdout")
        _from_zero(ax)
    figure.suptitle("Learning curves: mean over seeds, 95 % interval", fontsize=11)
    _legend_below(figure, axes[0])
    return figure


def _line(ax: Axes, points: Sequence[Json], label: str, colour: str, results: Json) -> None:
    if not points:
        return
    comparison = results["comparison"]
    is_base = label == comparison["baseline"] or label in comparison["noise_arms"]
    xs, means = [point["x"] for point in points], [point["mean"] for point in points]
    ax.plot(
        xs, means, color=colour, marker="o", markersize=4, linewidth=1.8, linestyle="--" if is_base else "-",
        label=_plain(label),
    )  # fmt: skip
    band = [point for point in points if point["low"] is not None]
    if band:
        low, high = ([point[edge] for point in band] for edge in ("low", "high"))
        ax.fill_between([point["x"] for point in band], low, high, color=colour, alpha=0.1, linewidth=0)


def _draw_differences(results: Json) -> Figure:
    """Paired differences: thick, the interval over seeds; thin, over the holdout's images."""
    comparison = results["comparison"]
    shown = {label: points for label, points in comparison["differences"].items() if points}
    figure, (ax,) = _figure(1, width=12)
    width = 0.75 / max(len(shown), 1)
    for place, (label, points) in enumerate(shown.items()):
        colour = colours(results)[label]
        xs = np.array([point["round"] for point in points]) + (place - (len(shown) - 1) / 2) * width
        means = np.array([point["mean"] for point in points]) * 100
        for edge, line in (("holdout_", 1.0), ("", 4.0)):
            _bars(ax, xs, points, edge, colour, line)
        marker = "D" if label in comparison["noise_arms"] else "o"
        ax.plot(xs, means, marker, color=colour, markersize=6, label=_plain(label))
    ax.axhline(0, color=BASELINE, linewidth=1.2, linestyle="--")
    bottom, top = ax.get_ylim()
    ax.set_ylim(min(bottom, -1.0), max(top, 1.0))  # a hundredth of a point must not fill the picture
    rounds = sorted({point["round"] for points in shown.values() for point in points})
    labels = {point["round"]: point["labels"] for points in shown.values() for point in points}
    ax.set_xticks(rounds, [f"{labels[number]} labels" for number in rounds])
    ax.set_ylabel(f"mAP50 above {comparison['baseline']}, points")
    ax.set_title("Paired differences. Thick: 95 % over seeds; thin: 95 % over the holdout's images", fontsize=11)
    _legend_below(figure, ax)
    return figure


def _bars(ax: Axes, xs: Any, points: Sequence[Json], edge: str, colour: str, line: float) -> None:
    for x, point in zip(xs, points, strict=True):
        if point[f"{edge}low"] is not None:
            ax.plot([x, x], [point[f"{edge}low"] * 100, point[f"{edge}high"] * 100], color=colour, linewidth=line,
                    alpha=0.55, solid_capstyle="butt")  # fmt: skip


def _draw_rare(results: Json) -> Figure:
    rare = results["data"]["rare"][:4]
    figure, axes = _figure(1 + (len(rare) if len(rare) > 1 else 0), width=4.2)
    for label, colour in colours(results).items():
        _line(axes[0], results["comparison"]["rare_curves"][label], label, colour, results)
        for ax, name in zip(axes[1:], rare, strict=False):
            _line(ax, _class_curve(results, label, name), label, colour, results)
    for ax, title in zip(axes, ["mean of the rare classes" if len(rare) > 1 else rare[0], *rare], strict=False):
        ax.set_title(_plain(title), fontsize=10)
        ax.set_xlabel("labels")
        ax.set_ylabel("AP50 on the holdout")
        _from_zero(ax)
    figure.suptitle("Rare classes", fontsize=11)
    _legend_below(figure, axes[0])
    return figure


def _class_curve(results: Json, arm: str, name: str) -> list[Json]:
    seeds = list(rounds_of(results, arm).values())
    points = []
    for number in range(max((len(rounds) for rounds in seeds), default=0)):
        here = [rounds[number] for rounds in seeds if len(rounds) > number and name in rounds[number]["ap50"]]
        if here:
            mean = _mean(one["ap50"][name] for one in here)
            points.append({"x": _mean(one["labels"] for one in here), "mean": mean, "low": None, "high": None})
    return points


def _draw_batches(results: Json) -> Figure:
    """What had been chosen by each round: rare images, boxes, near-duplicates."""
    shown = {"rare_images": "images with a rare class", "boxes": "boxes", "near_duplicates": "near-duplicates"}
    if not results["data"]["rare"]:
        del shown["rare_images"]
    figure, axes = _figure(len(shown))
    rows = {row["label"]: row for row in batch_table(results)}
    for label, colour in colours(results).items():
        for ax, name in zip(axes, shown, strict=True):
            values = np.cumsum([0.0, *rows[label][name]])
            style = "--" if label == results["comparison"]["baseline"] else "-"
            ax.plot(range(len(values)), values, style, color=colour, marker="o", markersize=4, label=_plain(label))
    for ax, title in zip(axes, shown.values(), strict=True):
        ax.set_xlabel("batch")
        ax.set_ylabel(f"{title}, so far")
        ax.set_xticks(range(results["data"]["rounds"] + 1))
    figure.suptitle("What the batches held, summed from the first on (mean over seeds)", fontsize=11)
    _legend_below(figure, axes[0])
    return figure


# --- contact sheets -------------------------------------------------------------------------------------------------


def contact_sheets(bench: Bench, results: Json) -> dict[str, bytes]:
    """Arm -> PNG of what it chose first, in its order, with the boxes that the oracle drew."""
    sheets = {}
    for arm in bench.plan.arms:
        record = bench.known(Step(arm.label, bench.plan.seeds[0], 0))
        if record is not None and record["next_batch"].get("task_ids"):
            sheets[arm.label] = _contact_sheet(bench, record["next_batch"]["task_ids"][:CONTACT_IMAGES])
    return sheets


def _contact_sheet(bench: Bench, task_ids: Sequence[int]) -> bytes:
    oracle, side, gap = Oracle(bench.world), CONTACT_SIDE, 4
    oracle.label(task_ids)
    rows = -(-len(task_ids) // CONTACT_COLUMNS)
    sheet = Image.new("RGB", (CONTACT_COLUMNS * (side + gap) + gap, rows * (side + gap) + gap), "white")
    for place, task_id in enumerate(task_ids):
        row, column = divmod(place, CONTACT_COLUMNS)
        sheet.paste(_thumbnail(bench, task_id, side), (gap + column * (side + gap), gap + row * (side + gap)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _thumbnail(bench: Bench, task_id: int, side: int) -> Image.Image:
    picture = bench.world.by_id[task_id]
    image = decode_image(picture.path.read_bytes())
    image.thumbnail((side, side))
    draw = ImageDraw.Draw(image)
    boxes = yolo_to_xyxy(picture.truth.boxes_yolo, image.width, image.height)
    for class_id, box in zip(picture.truth.class_ids.tolist(), boxes.tolist(), strict=True):
        draw.rectangle(box, outline=BOX_COLOURS[class_id % len(BOX_COLOURS)], width=2)
    tile = Image.new("RGB", (side, side), "#e6e8eb")
    tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return tile
