"""What a label config that changed says on the page. The rest of it is tested on a real Label Studio (integration)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select

from worker import rounds, syncing
from worker.holdout import holdout_fingerprint
from worker.settings import ProjectSettings
from worker.store import Store, events, get_project

HEAD = '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'


def config(*labels: str) -> str:
    return HEAD + "".join(f'<Label value="{label}"/>' for label in labels) + "</RectangleLabels></View>"


class Own:
    """Services with a Label Studio whose project 7 has this label config."""

    def __init__(self, store: Store) -> None:
        self.store, self.label_studio, self.label_config = store, self, ""

    def project(self, project_id: int) -> dict[str, Any]:
        return {"title": "nuts", "label_config": self.label_config}


@pytest.fixture
def own(store_url: str) -> Iterator[Own]:
    store = Store(store_url)
    store.migrate()
    with store.write() as connection:
        rounds.connect_project(connection, 7, config("nut", "bolt"), ProjectSettings(), "http://backend:9090")
    yield Own(store)
    store.close()


def after(own: Any, label_config: str) -> tuple[str, list[str], str]:
    """The label config remembered, what was told about it, and what the holdout's measurement depends on."""
    own.label_config = label_config
    syncing.sync_label_config(own, 7)
    with own.store.read() as connection:
        told = connection.execute(select(events.c.detail).where(events.c.kind == "label config changed")).scalars()
        return get_project(connection, 7).label_config, list(told), holdout_fingerprint(connection, 7)


def test_labels_that_come_and_go_are_told_and_measured_again(own: Any) -> None:
    *same, first = after(own, config("nut", "bolt"))
    assert same == [config("nut", "bolt"), []]
    remembered, told, second = after(own, config("nut", "screw"))
    assert (remembered, told) == (config("nut", "screw"), ["added: screw; removed: bolt"])
    assert second != first
    _, told, third = after(own, config("screw", "nut"))
    assert told[-1] == "in another order"
    assert third not in (first, second)
    _, told, again = after(own, config("screw", "nut").replace("<View>", "<View style='margin: 0'>"))
    assert len(told) == 2  # nothing that concerns us
    assert again == third


def test_a_config_that_is_none_of_ours_and_an_answer_without_one_break_nothing(own: Any) -> None:
    choices = '<View><Image name="i" value="$i"/><Choices name="c" toName="i"><Choice value="a"/></Choices></View>'
    remembered, told, _ = after(own, choices)
    assert (remembered, told) == (choices, [])
    assert after(own, "")[0] == choices
