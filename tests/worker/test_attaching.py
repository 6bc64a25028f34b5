from __future__ import annotations

import pytest

from demo.oracle import label_config
from worker.attaching import _expect_known_labels
from worker.boxes import LabelMap
from worker.errors import LabelMismatch

BOLTS = LabelMap.from_config(label_config(("bolt", "nut")))


def test_weights_of_other_things_are_refused_with_the_way_to_start_from_them() -> None:
    with pytest.raises(LabelMismatch, match=r"unknown to the model.*leave `weights` empty.*in HARDFIRST_WEIGHTS\.$"):
        _expect_known_labels(BOLTS, {0: "person", 1: "bicycle"})


def test_weights_that_know_one_of_the_labels_are_taken() -> None:
    _expect_known_labels(BOLTS, {0: "person", 1: "Nut"})
