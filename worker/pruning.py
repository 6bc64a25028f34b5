"""What a project no longer needs of its old rounds: a row and an embedding per image and round add up.

Kept of every round: its row, weights, the holdout's detections, manifest, and the rows of its batch. Of the round that
is served, and the one before it (for a batch chosen anew): everything.
"""

from __future__ import annotations

from sqlalchemy import delete, select, update

from worker.artifacts import round_key
from worker.services import Services
from worker.store import CLOSED_STATES, get_project, scores
from worker.store import rounds as round_rows

KEPT_ROUNDS = 2  # of those that scored the pool
ROWS_AT_ONCE = 5000  # a webhook waits for no more than these


def prune(own: Services, project_id: int) -> int:
    """Take the rest away; how many rows of scores went. May be killed anywhere and run again."""
    gone = 0
    for round_id, number in _old_rounds(own, project_id):
        with own.store.write() as connection:  # no later round looks here for scores
            connection.execute(update(round_rows).where(round_rows.c.id == round_id).values(scored_as=None))
        own.artifacts.delete_like(round_key(project_id, number, "embeddings-*.npy"))
        gone += _delete_scores(own, round_id)  # last: by its rows a round is known as one to take from
    return gone


def _old_rounds(own: Services, project_id: int) -> list[tuple[int, int]]:
    """(id, number) of closed rounds that are older than the one served and the one before it."""
    with own.store.read() as connection:
        served = get_project(connection, project_id).published_round_id
        scored = select(round_rows.c.id, round_rows.c.number).where(
            round_rows.c.project_id == project_id,
            round_rows.c.state.in_(CLOSED_STATES),
            select(scores.c.task_id).where(scores.c.round_id == round_rows.c.id, scores.c.rank.is_(None)).exists(),
        )
        rows = connection.execute(scored.order_by(round_rows.c.number.desc())).all()
    if served not in [row.id for row in rows]:
        return []  # nothing is served yet, or it has no rows to compare with: nothing is old
    return [(row.id, row.number) for row in rows[KEPT_ROUNDS:] if row.id != served]


def _delete_scores(own: Services, round_id: int) -> int:
    these = (scores.c.round_id == round_id, scores.c.rank.is_(None))
    some = select(scores.c.task_id).where(*these).limit(ROWS_AT_ONCE)
    gone = 0
    while True:
        with own.store.write() as connection:
            found = connection.execute(
                delete(scores).where(*these, scores.c.task_id.in_(some.scalar_subquery()))
            ).rowcount
        gone += found
        if found < ROWS_AT_ONCE:
            return gone
