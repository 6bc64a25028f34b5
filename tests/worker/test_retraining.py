"""What of a round's training is a rule rather than a training: who sees which images."""

from __future__ import annotations

import numpy as np

from worker.retraining import Ahead, checkpoint_epochs, member_part
from worker.settings import ProjectSettings


def test_members_see_four_fifths_and_not_the_same() -> None:
    ids = list(range(100, 150))
    parts = [member_part(ids, np.random.default_rng(seed)) for seed in (1, 2)]
    assert [len(part) for part in parts] == [40, 40]
    assert parts[0] <= set(ids)
    assert parts[0] != parts[1]
    assert member_part(list(reversed(ids)), np.random.default_rng(1)) == parts[0]


def test_of_very_few_a_member_sees_all() -> None:
    assert member_part([7], np.random.default_rng(0)) == {7}
    assert member_part([7, 9], np.random.default_rng(0)) == {7, 9}
    assert len(member_part([7, 9, 11], np.random.default_rng(0))) == 3


def test_images_are_fetched_ahead_once_each_and_in_any_order() -> None:
    asked: list[int] = []

    def fetch(task_id: int) -> bytes:
        asked.append(task_id)
        return str(task_id).encode()

    ahead = Ahead(fetch, list(range(20)))
    assert [ahead(task_id) for task_id in range(20)] == [str(task_id).encode() for task_id in range(20)]
    assert sorted(asked) == list(range(20))
    assert Ahead(fetch, [1, 2])(99) == b"99"


def test_checkpoints_are_spread_over_the_last_third() -> None:
    cheap = {"strategy": "committee", "committee": "checkpoints"}
    assert checkpoint_epochs(ProjectSettings(committee_size=3, epochs=60, **cheap)) == [40, 50]
    assert checkpoint_epochs(ProjectSettings(committee_size=5, epochs=5, **cheap)) == [1, 2, 3, 4]
    assert checkpoint_epochs(ProjectSettings(committee_size=3, epochs=60, strategy="committee")) == []
    assert checkpoint_epochs(ProjectSettings()) == []
