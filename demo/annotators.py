"""People of the demo: they take what Label Studio's label stream serves and draw the true boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from worker.errors import LabelStudioRefused

SECONDS_PER_IMAGE, SECONDS_PER_BOX = 4.0, 2.5  # of the lead time they report; nobody waits for it


@dataclass
class Annotator:
    """One Label Studio user, by token."""

    name: str
    base_url: str
    token: str
    client: httpx.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Token {self.token}"}
        self.client = httpx.Client(base_url=self.base_url, headers=headers, timeout=60, trust_env=False)

    def next_task(self, project_id: int) -> dict[str, Any] | None:
        """What the label stream serves, and locks for this user; None when there is nothing left."""
        answer = self.client.get(f"/api/projects/{project_id}/next")
        if answer.status_code == 404:
            return None
        return dict(_ok(answer).json())

    def annotate(self, task_id: int, regions: Sequence[Mapping[str, Any]]) -> None:
        lead_time = SECONDS_PER_IMAGE + SECONDS_PER_BOX * len(regions)
        body = {"result": list(regions), "lead_time": lead_time}
        _ok(self.client.post(f"/api/tasks/{task_id}/annotations/", json=body))


def label_in_turns(
    annotators: Sequence[Annotator],
    project_id: int,
    n_labels: int,
    regions_of: Callable[[dict[str, Any]], Sequence[Mapping[str, Any]]],
    progress: Callable[[int], None],
) -> list[int]:
    """All take a task, then all submit theirs, until `n_labels` are made; the task ids in the order served."""
    served: list[int] = []
    while len(served) < n_labels:
        held = []
        for annotator in annotators[: n_labels - len(served)]:
            task = annotator.next_task(project_id)
            if task is None:
                break
            held.append((annotator, task))
        if not held:
            break
        for annotator, task in held:
            annotator.annotate(task["id"], regions_of(task))
            served.append(int(task["id"]))
        progress(len(served))
    return served


def _ok(answer: httpx.Response) -> httpx.Response:
    if answer.status_code >= 400:
        where = f"{answer.request.method} {answer.request.url.path}"
        raise LabelStudioRefused(f"Label Studio answered {answer.status_code} to {where}: {answer.text[:300]}")
    return answer
