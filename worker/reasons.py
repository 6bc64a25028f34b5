"""Why an image is in a batch, in words."""

from __future__ import annotations

from collections.abc import Sequence

HIGH, LOW = 0.7, 0.3  # of a part of the utility
CLEARLY = 0.1  # more uncertain than the drawn boxes explain: it comes from one below the confidence they are drawn from
# their uncertainty is what all boxes of an image leave open, over the most there is in the pool: it tells of no one box
_ADDED_UP = ("hybrid_k_center",)
# their diversity is measured against what was labelled or taken before
_BY_LABELLED = ("k_center", "coverage", "hybrid_k_center", "hybrid_coverage")


def reason(
    strategy: str,
    uncertainty: float | None,
    diversity: float | None,
    boxes: Sequence[tuple[str, float]],
    *,
    measure: str = "least_confidence",
    any_labelled: bool = True,
) -> str:
    """What the utility is made of, and what was seen.

    Args:
        uncertainty: the part of the utility, 0..1; None: the strategy does not look at it, or it is not known.
        diversity: likewise.
        boxes: label and confidence of the boxes that are drawn.
        measure: which uncertainty the strategy looks at.
        any_labelled: whether there is a labelled image to be unlike.
    """
    if strategy == "random":
        return "drawn at random"
    told = [
        _uncertainty_words(strategy, uncertainty, boxes, measure),
        _diversity_words(strategy, diversity, any_labelled),
    ]
    return "; ".join(filter(None, told)) or "the next by rank"


def certainty(confidence: float, measure: str) -> float:
    """Orders boxes, the least sure first: by least_confidence the faintest, else the one nearest to a half."""
    return abs(confidence - 0.5) if measure in ("margin", "entropy") else confidence


def _uncertainty_words(
    strategy: str, uncertainty: float | None, boxes: Sequence[tuple[str, float]], measure: str
) -> str:
    if uncertainty is None:
        return ""
    if strategy in _ADDED_UP:
        return _words_of_all(uncertainty, boxes, measure)
    if strategy == "committee" and uncertainty >= HIGH:
        return "the committee's members disagree"
    if boxes and uncertainty > LOW:
        label, confidence = min(boxes, key=lambda box: certainty(box[1], measure))
        if measure == "least_confidence" and uncertainty > 1 - confidence + CLEARLY:
            return "something fainter than the boxes that are drawn may be there"
        return f"most uncertain box: {label} {confidence:.2f}".replace(" 0.", " .") + " against background"
    if uncertainty > LOW:
        return "no box is sure enough to be drawn, but something may be there"
    return "the detector is rather sure of it"


def _words_of_all(uncertainty: float, boxes: Sequence[tuple[str, float]], measure: str) -> str:
    if not boxes:
        return "no box is sure enough to be drawn"
    label, confidence = min(boxes, key=lambda box: certainty(box[1], measure))
    least = f"{label} {confidence:.2f}".replace(" 0.", " .")
    if uncertainty >= HIGH:
        return f"few images leave as much open; least sure box: {least}"
    if confidence >= HIGH:
        return "the detector is rather sure of what is drawn"
    return f"most uncertain box: {least} against background" if len(boxes) == 1 else f"least sure box: {least}"


def _diversity_words(strategy: str, diversity: float | None, any_labelled: bool) -> str:
    if diversity is None:
        return ""
    if diversity >= HIGH:
        if strategy not in _BY_LABELLED:
            return "unlike the images around it"
        return "unlike anything labelled or chosen before" if any_labelled else "unlike anything chosen before"
    if diversity >= LOW:
        return ""
    if strategy in _BY_LABELLED:
        return "much like one that is labelled or was chosen before" if any_labelled else "much like one chosen before"
    return "a typical image"
