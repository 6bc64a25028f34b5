"""Query by committee: several detectors of one round, each on its own part of the labels, and their disagreement."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import select

from worker.store import steps as step_rows

pytestmark = pytest.mark.slow


def test_members_train_on_parts_and_their_disagreement_ranks_the_pool(stage: Any) -> None:
    project = stage.connected(14, strategy="committee", committee_size=3, batch_size=5, labels_per_round=5)
    for task_id in stage.batch(project, 0):
        project.label(task_id)
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    with stage.services.store.read() as connection:
        query = select(step_rows.c.kind, step_rows.c.shard, step_rows.c.state).where(step_rows.c.round_id == row.id)
        found = sorted(map(tuple, connection.execute(query)))
    assert [one for one in found if one[0] == "member"] == [("member", 1, "done"), ("member", 2, "done")]
    report = json.loads(row.report)
    assert [one["images"] for one in report["members"]] == [4, 4]  # four fifths of 5
    digests = {row.weights_sha256, *(one["sha256"] for one in report["members"])}
    assert len(digests) == 3  # three detectors, not one three times
    scored = stage.scores_of(row)
    assert all(0.0 <= one.disagreement <= 1.0 for one in scored.values())
    manifest = json.loads(stage.services.artifacts.get(f"p{project.id}/r000001/manifest.json"))
    assert manifest["strategy"] == "committee"
    for one in manifest["tasks"]:
        assert one["uncertainty"] == pytest.approx(scored[one["task_id"]].disagreement)


def test_a_task_that_comes_late_is_put_to_the_vote_too(stage: Any) -> None:
    project = stage.connected(12, strategy="committee", committee_size=3, batch_size=4, labels_per_round=4)
    for task_id in stage.batch(project, 0):
        project.label(task_id)
    stage.work()
    (late,) = project.add_images([40])
    stage.reconcile()
    row = stage.scores_of(stage.round(project, 1))[late]
    assert row.disagreement is not None
    assert 0.5 <= row.published_score <= 1.0
    assert late in project.predictions()


def test_checkpoints_of_one_training_are_a_cheap_committee_and_say_so(stage: Any) -> None:
    settings = {"strategy": "committee", "committee_size": 3, "committee": "checkpoints", "epochs": 3}
    project = stage.connected(12, batch_size=4, labels_per_round=4, **settings)
    for task_id in stage.batch(project, 0):
        project.label(task_id)
    stage.work()
    row = stage.round(project, 1)
    assert row.state == "done", row.error
    members = json.loads(row.report)["members"]
    assert [(one["epoch"], one["correlated"]) for one in members] == [(1, True), (2, True)]
    assert len({row.weights_sha256, *(one["sha256"] for one in members)}) == 3
    with stage.services.store.read() as connection:
        kinds = set(connection.execute(select(step_rows.c.kind).where(step_rows.c.round_id == row.id)).scalars())
    assert "member" not in kinds
    assert all(one.disagreement is not None for one in stage.scores_of(row).values())
