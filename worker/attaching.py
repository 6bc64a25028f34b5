"""Round 0, first step: the webhook, the tasks, the annotations there are, the weights for embeddings."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from worker import steps
from worker.boxes import LabelMap
from worker.errors import LabelMismatch, NothingToLabel
from worker.label_studio import is_our_version
from worker.scoring import plan_scoring
from worker.services import Services
from worker.store import get_project, open_round_of, projects, tasks
from worker.store import rounds as round_rows
from worker.syncing import sync_project
from worker.work import Work

log = logging.getLogger(__name__)

IMPORT_PAUSE = 2.0  # seconds in which a running import adds tasks



def attach_project(work: Work) -> None:
    work.progress("attaching")
    label_map = work.label_map  # refuse before anything is changed in Label Studio
    _adopt_webhook(work)
    _wait_for_import(work)
    sync_project(work.services, work.project.id, everything=True)
    with work.services.store.read() as connection:
        live = select(func.count()).select_from(tasks).where(tasks.c.project_id == work.project.id, ~tasks.c.deleted)
        if not connection.execute(live).scalar_one():
            raise NothingToLabel
    weights = _embedding_weights(work, label_map)
    shards = plan_scoring(work)

    def then(connection: Connection) -> None:
        connection.execute(update(round_rows).where(round_rows.c.id == work.round.id).values(**weights.columns))
        here = update(projects).where(projects.c.id == work.project.id)
        connection.execute(here.values(problem=None, notice=weights.notice))
        steps.add(connection, work.round.id, "score", shards)

    steps.finish(work.lease, then)


def _adopt_webhook(work: Work) -> None:
    """Label Studio registers its webhook to us right after it connected us: change that one."""
    own, project = work.services, work.project
    url = f"{project.backend_url.rstrip('/')}/webhook"
    for _ in range(5):
        if own.label_studio.find_webhook(project.id, url) is not None:
            break
        time.sleep(0.5)  # there is none after that: somebody deleted it, or connected us by hand
    webhook_id = own.label_studio.own_webhook(project.id, url, basic_auth(own), project.webhook_id)
    with own.store.write() as connection:
        connection.execute(update(projects).where(projects.c.id == project.id).values(webhook_id=webhook_id))


def basic_auth(own: Services) -> dict[str, str]:
    """The header that lets Label Studio's webhooks in, when the backend is guarded."""
    if not own.settings.user:
        return {}
    import base64

    pair = f"{own.settings.user}:{own.settings.password.get_secret_value()}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _wait_for_import(work: Work) -> None:
    """The holdout is drawn once: not from the first hundred tasks of an import that is still running."""
    count = -1
    while (now := int(work.services.label_studio.project(work.project.id).get("task_number") or 0)) != count:
        count = now
        if not count:
            raise NothingToLabel
        time.sleep(IMPORT_PAUSE)
        work.lease.check()


def heal(own: Services, project_id: int) -> None:
    """Label Studio serves none of our versions, or an old one; our webhook lacks the password set since, or goes to the
    address this backend had before: put right.

    What a person chose instead (another version, another sampling, no webhook) stays as it is.
    """
    with own.store.read() as connection:
        project = get_project(connection, project_id)
        busy = open_round_of(connection, project_id)
    _mend_webhook(own, project)
    if project.published_version is None or (busy is not None and busy.state == "publishing"):
        return
    api = own.label_studio
    version, served = str(project.published_version), str(api.project(project_id).get("model_version") or "")
    astray = served != version and (not served or is_our_version(served))
    if astray and api.versions(project_id).get(version):
        api.publish_version(project_id, version)
        log.warning("project %s served %r; it serves %s again", project_id, served, version)


def _mend_webhook(own: Services, project: Row[Any]) -> None:
    """Exactly one to us, at the address Label Studio calls us by. One that somebody deleted stays deleted."""
    url = f"{project.backend_url.rstrip('/')}/webhook"
    kept = own.label_studio.mend_webhook(project.id, url, basic_auth(own), project.webhook_id)
    if kept is not None and kept != project.webhook_id:
        with own.store.write() as connection:
            connection.execute(update(projects).where(projects.c.id == project.id).values(webhook_id=kept))


@dataclass(frozen=True)
class _Weights:
    columns: Mapping[str, Any]
    notice: str | None


def _expect_known_labels(label_map: LabelMap, names: Mapping[int, str]) -> None:
    """Somebody's own detector that knows none of the labels is a mistake, unless it is only something to start from."""
    try:
        label_map.classes_for(names)
    except LabelMismatch as error:
        raise LabelMismatch(
            f"{error} If it is only to be trained on from, not to draw boxes yet: leave `weights` empty, and name the "
            "file in HARDFIRST_WEIGHTS."
        ) from error


def _embedding_weights(work: Work, label_map: LabelMap) -> _Weights:
    """The pretrained detector, kept as an artifact so that all workers use the same; else the descriptor."""
    from worker.descriptor import DESCRIPTOR_NAME
    from worker.detector import Detector, is_published_name, prepare_ultralytics, resolve_weights

    own, settings = work.services, work.settings
    prepare_ultralytics(own.ultralytics_dir)
    base = resolve_weights(settings.weights, own.settings.weights, own.settings.data_dir / "cache")
    notice: str | None
    if not base.pretrained:
        notice = (
            f"{base.note} No pretrained backbone at hand: a colour-and-texture descriptor chooses the first batch. "
            "Learns after the first batch."
        )
        return _Weights({"weights": None, "weights_sha256": None, "embedder": DESCRIPTOR_NAME}, notice.strip())
    key = work.key("weights.pt")
    digest = own.artifacts.put(key, Path(base.path).read_bytes())
    detector = Detector.load(own.artifacts.local(key, digest), own.settings.device, expected_sha256=digest)
    if settings.weights and not is_published_name(settings.weights):
        _expect_known_labels(label_map, detector.names)
    notice = None if label_map.maps_any(detector.names) else "Draws no boxes yet: it learns after the first batch."
    return _Weights({"weights": key, "weights_sha256": digest, "embedder": Path(base.path).name}, notice)
