"""What the doctor finds of a deployment and of a round: on a real store and a real Valkey.

What it finds in Label Studio is tested on the real one, in tests/integration.
"""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import select, text, update

from worker import crew, doctor, doctor_project, queue, rounds, steps
from worker.boxes import LabelMap
from worker.doctor import Check, Look, Status, deployment_looks, failed, ok, run, services_for
from worker.errors import Conflict, WeightsUnavailable
from worker.processes import running_valkey
from worker.services import Services
from worker.settings import ProjectSettings, Settings
from worker.store import Store, open_round_of, projects
from worker.store import rounds as round_rows
from worker.store import steps as step_rows

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="nut"/>'
    '<Label value="wire"/></RectangleLabels></View>'
)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Services]]:
    """Connections as the command makes them, with these settings changed; nothing answers unless it is named."""
    made: list[Services] = []

    def start(**changed: Any) -> Services:
        values = {"label_studio_url": f"http://127.0.0.1:{free_port()}", "data_dir": tmp_path / "data", **changed}
        made.append(services_for(Settings(_env_file=None, **values)))
        return made[-1]

    yield start
    for own in made:
        if "store" in vars(own):
            own.store.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def examined(own: Services, *, fix: bool = False, quick: bool = True) -> dict[str, Check]:
    return {check.name: check for check in run(deployment_looks(own, quick=quick), fix=fix)}


# --- running ----------------------------------------------------------------------------------------------------------


def test_what_needs_a_failed_check_is_skipped_and_so_is_what_needs_that() -> None:
    def never() -> Check:
        raise AssertionError("it was looked at")

    looks = [
        Look("a", lambda: failed("a", "broken", "mend it")),
        Look("b", never, needs=("a",)),
        Look("c", never, needs=("b",)),
        Look("d", lambda: ok("d", "fine"), needs=()),
    ]
    unusable: set[str] = set()
    found = list(run(looks, fix=False, unusable=unusable, project_id=7))
    assert [(one.name, str(one.status), one.sentence) for one in found] == [
        ("a", "failed", "broken"),
        ("b", "skipped", "not looked at: a comes first"),
        ("c", "skipped", "not looked at: b comes first"),
        ("d", "ok", "fine"),
    ]
    assert {one.project_id for one in found} == {7}
    assert unusable == {"a", "b", "c"}


def test_a_look_that_breaks_is_a_finding() -> None:
    def broken() -> Check:
        raise KeyError("no such thing\nand a second line")

    def refused() -> Check:
        raise Conflict("not now")

    found = list(run([Look("a", broken), Look("b", refused)], fix=True))
    assert [one.status for one in found] == [Status.FAILED] * 2
    assert found[0].sentence.startswith("the look itself broke: KeyError")
    assert "\n" not in found[0].sentence
    assert found[1].sentence == "not now"


def test_mending_happens_only_when_asked_for_and_is_looked_at_again() -> None:
    state = {"well": False, "mended": 0}

    def mend() -> None:
        state.update(well=True, mended=state["mended"] + 1)

    def look() -> Check:
        return ok("a", "well") if state["well"] else failed("a", "ill", "mend it", mend)

    (found,) = run([Look("a", look)], fix=False)
    assert (found.status, state["mended"]) == (Status.FAILED, 0)
    (found,) = run([Look("a", look)], fix=True)
    assert (found.status, found.mended, state["mended"]) == (Status.OK, True, 1)
    (found,) = run([Look("a", look)], fix=True)
    assert (found.status, found.mended, state["mended"]) == (Status.OK, False, 1)


@pytest.mark.parametrize("error", [Conflict("somebody else is at it"), OSError("disk full")])
def test_mending_that_fails_is_said(error: Exception) -> None:
    def mend() -> None:
        raise error

    (found,) = run([Look("a", lambda: failed("a", "ill", "mend it", mend))], fix=True)
    assert (found.status, found.mended, found.fix) == (Status.FAILED, False, "mend it")
    assert found.sentence.startswith("ill; mending it failed: ")
    assert str(error) in found.sentence


# --- Label Studio's address and token ---------------------------------------------------------------------------------


def test_nobody_at_the_address_of_label_studio(make: Callable[..., Services]) -> None:
    own = make(label_studio_api_key="secret-token")
    found = examined(own)
    assert found["Label Studio"].status is Status.FAILED
    assert f"Label Studio at {own.settings.label_studio_url} does not answer" in found["Label Studio"].sentence
    assert "LABEL_STUDIO_URL" in found["Label Studio"].fix
    assert found["token"].sentence == "not looked at: Label Studio comes first"
    assert "secret-token" not in repr(found)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """URL of a server that gives everybody this."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("status", "words"), [(404, "is not Label Studio"), (200, "did not answer JSON")])
def test_somebody_else_at_the_address_of_label_studio(make: Callable[..., Services], status: int, words: str) -> None:
    with answering(status, b"<html>welcome</html>") as url:
        found = doctor.look_at_label_studio(make(label_studio_url=url))
    assert found.status is Status.FAILED
    assert words in found.sentence


@pytest.mark.parametrize(
    ("version", "status"),
    [("1.23.2", Status.OK), ("1.23.9", Status.OK), ("1.24.0", Status.WARNING), ("1.22.0", Status.WARNING)],
)
def test_a_label_studio_of_another_version_is_named(
    make: Callable[..., Services], version: str, status: Status
) -> None:
    with answering(200, json.dumps({"release": version}).encode()) as url:
        found = doctor.look_at_label_studio(make(label_studio_url=url))
    assert found.status is status
    assert found.sentence.startswith(f"Label Studio {version} answers at {url}")
    assert ("this hardfirst was tried with 1.23.2" in found.sentence) is (status is Status.WARNING)


def test_the_version_that_was_tried_is_the_one_that_tests_start() -> None:
    lock = Path(__file__).resolve().parents[2] / "requirements-label-studio.lock"
    assert f"label-studio=={doctor.TRIED_WITH}" in lock.read_text().splitlines()


def test_no_token_says_where_to_get_one(make: Callable[..., Services]) -> None:
    found = doctor.look_at_token(make())
    assert (found.status, found.sentence) == (Status.FAILED, "LABEL_STUDIO_API_KEY is not set")
    assert "Access Token" in found.fix


def jwt(**claims: Any) -> str:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJh.{body}.c2ln"


def test_a_token_that_ends_soon_is_a_warning(make: Callable[..., Services], monkeypatch: pytest.MonkeyPatch) -> None:
    own = make(label_studio_api_key=jwt(exp=time.time() + 86_400 * 3 + 60))
    monkeypatch.setattr(own.label_studio, "whoami", lambda: {"email": "ann@example.com"})
    found = doctor.look_at_token(own)
    assert found.status is Status.WARNING
    assert found.sentence == "the personal access token of ann@example.com ends in 3 days"


def test_how_long_a_token_is_valid_is_told_unless_it_is_for_ever(
    make: Callable[..., Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, told in ((90, ", valid for 90 more days"), (73_000, "")):
        own = make(label_studio_api_key=jwt(exp=time.time() + 86_400 * days + 60))
        monkeypatch.setattr(own.label_studio, "whoami", lambda: {"email": "ann@example.com"})
        found = doctor.look_at_token(own)
        assert (found.status, found.sentence) == (Status.OK, f"personal access token of ann@example.com{told}")


# --- queue and workers ------------------------------------------------------------------------------------------------


def test_up_that_does_not_run_is_a_sentence(make: Callable[..., Services], tmp_path: Path) -> None:
    found = examined(make())
    assert found["queue"].sentence == f"`hardfirst up` is not running in {tmp_path / 'data'}: there is no Valkey"
    assert "hardfirst up" in found["queue"].fix
    assert {found[f"workers: {name}"].status for name in queue.QUEUES} == {Status.SKIPPED}
    assert not (tmp_path / "data").exists()  # looking makes nothing


def test_the_embedded_valkey_is_found_and_missed_when_it_was_killed(
    make: Callable[..., Services], tmp_path: Path
) -> None:
    with running_valkey(tmp_path / "data") as url:
        own = make()
        assert own.settings.redis_url == url
        assert examined(own)["queue"].status is Status.OK
    with socket.socket(socket.AF_UNIX) as left:  # as a kill leaves it: a socket that nobody serves
        left.bind(url.removeprefix("unix://"))
    own = make()
    assert own.settings.redis_url == url
    found = examined(own)["queue"]
    assert found.status is Status.FAILED
    assert "does not answer" in found.sentence
    assert "hardfirst up" in found.fix


def test_a_dead_redis_is_a_sentence_without_its_password(make: Callable[..., Services]) -> None:
    found = examined(make(redis_url=f"redis://:hush-hush@127.0.0.1:{free_port()}/0"))["queue"]
    assert found.status is Status.FAILED
    assert "does not answer" in found.sentence
    assert "REDIS_URL" in found.fix
    assert "hush-hush" not in repr(found)


def test_a_redis_that_throws_keys_away_is_a_warning(make: Callable[..., Services], tmp_path: Path) -> None:
    with running_valkey(tmp_path / "data") as url:
        with redis.Redis.from_url(url) as conn:
            conn.config_set("maxmemory-policy", "allkeys-lru")
        found = examined(make(redis_url=url))["queue"]
    assert found.status is Status.WARNING
    assert "allkeys-lru" in found.sentence
    assert "noeviction" in found.fix


def register(conn: redis.Redis, name: str, queues: str, seconds_ago: float) -> None:
    seen = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - seconds_ago))
    conn.sadd(crew.WORKERS_KEY, f"rq:worker:{name}")
    told = {"hostname": "press-3", "pid": "17", "queues": queues, "state": "idle", "last_heartbeat": seen}
    conn.hset(f"rq:worker:{name}", mapping=told)


def test_each_queue_needs_a_worker_that_lives(make: Callable[..., Services], redis_url: str) -> None:
    own = make(redis_url=redis_url)
    register(own.redis, "a", "control,score", 5)
    register(own.redis, "b", "predict", crew.LOST_AFTER + 30)
    queue.enqueue_unique(own.redis, queue.TRAIN, "worker.jobs.reconcile", (), "waits", timeout=60)
    found = examined(own)
    assert found["workers: control"].sentence == "1 alive on press-3, 0 jobs waiting"
    assert found["workers: score"].status is Status.OK
    assert found["workers: train"].sentence == "no worker takes `train` (1 job waiting)"
    assert found["workers: train"].fix.endswith("`hardfirst worker train`")
    assert found["workers: predict"].status is Status.FAILED
    assert "1 gave no sign of life for 120 s" in found["workers: predict"].sentence


# --- store ------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_is_made_by_fix_only(make: Callable[..., Services], store_url: str) -> None:
    file = Path(store_url.removeprefix("sqlite:///"))
    own = make(database_url=store_url)
    found = examined(own)["store"]
    assert (found.status, file.exists()) == (Status.FAILED, False)
    assert "there is no store" in found.sentence
    assert examined(own, fix=True)["store"].mended
    found = examined(own)["store"]
    assert (found.status, found.mended) == (Status.OK, False)
    assert "at the newest migration (0002" in found.sentence


def stamp(store: Store, revision: str) -> None:
    with store.write() as connection:
        connection.execute(text("update alembic_version set version_num = :to"), {"to": revision})


def test_an_old_store_is_migrated_and_a_newer_one_is_left_alone(make: Callable[..., Services], store_url: str) -> None:
    from alembic import command
    from alembic.config import Config

    own = make(database_url=store_url)
    config = Config()
    config.set_main_option("script_location", str(Path(doctor.store.__file__).parent / "migrations"))
    config.attributes["engine"] = own.store.engine
    command.upgrade(config, "0001")
    found = examined(own)["store"]
    assert found.status is Status.FAILED
    assert "at migration 0001; 0002" in found.sentence
    assert examined(own, fix=True)["store"].mended
    with own.store.read() as connection:
        assert connection.execute(select(projects.c.paused_at)).all() == []  # a column that 0001 has not
    stamp(own.store, "9999")
    found = examined(own, fix=True)["store"]
    assert (found.status, found.mended) == (Status.FAILED, False)
    assert "was written by a newer hardfirst (migration 9999" in found.sentence


def test_a_file_that_is_no_database_and_a_database_that_is_away(make: Callable[..., Services], tmp_path: Path) -> None:
    (tmp_path / "letter.db").write_text("Dear store, " * 100)
    found = examined(make(database_url=f"sqlite:///{tmp_path / 'letter.db'}"))["store"]
    assert found.status is Status.FAILED
    assert "file is not a database" in found.sentence
    away = f"postgresql+psycopg://ann:hush-hush@127.0.0.1:{free_port()}/hardfirst"
    found = examined(make(database_url=away))["store"]
    assert found.status is Status.FAILED
    assert "DATABASE_URL" in found.fix
    assert "hush-hush" not in repr(found)


# --- device and weights -----------------------------------------------------------------------------------------------


def test_quick_loads_no_torch_and_says_so(make: Callable[..., Services]) -> None:
    found = examined(make(), quick=True)
    assert (found["device"].status, found["weights"].status) == (Status.SKIPPED, Status.SKIPPED)
    assert "--quick" in found["device"].sentence


def test_the_device_torch_sees_and_one_it_does_not(make: Callable[..., Services]) -> None:
    assert doctor.look_at_device(make(device="cpu")).sentence.startswith("cpu (")
    found = doctor.look_at_device(make(device="cuda:99"))
    assert found.status is Status.FAILED
    assert "cuda:99" in found.sentence
    assert "HARDFIRST_DEVICE" in found.fix


def test_weights_that_are_named_must_be_there_and_be_weights(
    make: Callable[..., Services], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctor.look_at_weights(make(weights=str(tmp_path / "mine.pt")))
    assert found.status is Status.FAILED
    assert "there is no such file" in found.sentence
    (tmp_path / "mine.pt").write_text("no weights")
    found = doctor.look_at_weights(make(weights=str(tmp_path / "mine.pt")))
    assert found.status is Status.FAILED
    assert "not weights that ultralytics can load" in found.sentence
    found = doctor.look_at_weights(make(weights="yolo11n.yaml"))
    assert found.status is Status.WARNING
    assert "from scratch" in found.sentence


def test_a_name_that_is_no_weights_file_is_one_sentence(tmp_path: Path) -> None:
    from worker.detector import load_model

    (tmp_path / "README.md").write_text("no weights")
    with pytest.raises(WeightsUnavailable, match=r"README\.md is not weights that ultralytics can load") as refused:
        load_model(tmp_path / "README.md")
    assert "❌" not in str(refused.value)


@pytest.mark.parametrize("named", ["", "yolo11n.pt", "s3://models/mine.pt", "HERE"])
def test_the_first_look_at_weights_asks_for_the_file_alone(
    make: Callable[..., Services], tmp_path: Path, named: str
) -> None:
    (tmp_path / "mine.pt").write_text("no weights, and nobody reads it")
    assert doctor.look_for_weights(make(weights=named.replace("HERE", str(tmp_path / "mine.pt")))).status is Status.OK
    found = doctor.look_for_weights(make(weights=str(tmp_path / "yours.pt")))
    assert (found.status, found.fix) == (Status.FAILED, "Put the file there, or correct HARDFIRST_WEIGHTS")
    assert found.sentence == f"HARDFIRST_WEIGHTS is '{tmp_path / 'yours.pt'}': there is no such file here"


@pytest.mark.parametrize(
    ("allowed", "status", "words"),
    [(False, Status.WARNING, "YOLO_OFFLINE forbids"), (True, Status.WARNING, "cannot be downloaded")],
)
def test_default_weights_that_are_nowhere(
    make: Callable[..., Services],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: bool,
    status: Status,
    words: str,
) -> None:
    from worker import detector

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detector, "may_download", lambda: allowed)
    monkeypatch.setattr(detector, "ASSETS_URL", f"http://127.0.0.1:{free_port()}")
    found = doctor.look_at_weights(make())
    assert found.status is status
    assert words in found.sentence
    assert "training starts from scratch" in found.sentence
    assert not (tmp_path / "data").exists()


def write_weights(file: Path) -> Path:
    """A detector of nuts and wires that has learned nothing."""
    from worker.detector import load_ultralytics

    load_ultralytics()
    import torch
    from ultralytics.cfg import DEFAULT_CFG_DICT
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    model.names = {0: "nut", 1: "bolt"}
    model.args = DEFAULT_CFG_DICT
    torch.save({"model": model.half(), "train_args": DEFAULT_CFG_DICT, "epoch": -1}, file)
    return file


def test_weights_are_opened_and_the_published_detector_is_asked_for_its_classes(
    connected: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_weights(tmp_path / "yolo11n.pt")
    found = doctor.look_at_weights(connected)
    assert (found.status, found.sentence) == (Status.OK, "yolo11n.pt is a detector of 2 classes")

    digest = connected.artifacts.put("p7/r000000/weights.pt", file.read_bytes())
    with connected.store.write() as connection:
        values = {"state": "done", "number": 1, "weights": "p7/r000000/weights.pt", "weights_sha256": digest}
        (round_id,) = connection.execute(update(round_rows).values(**values).returning(round_rows.c.id)).scalars()
        connection.execute(update(projects).values(published_round_id=round_id, published_version="al-000001"))
    monkeypatch.setattr(connected.label_studio, "project", lambda project_id: {"label_config": CONFIG})
    found = doctor_project.look_at_labels(connected, 7, "labels", quick=False)
    assert found.status is Status.WARNING
    assert found.sentence.startswith("the model does not know 'wire'")
    assert "the detector was not asked" in doctor_project.look_at_labels(connected, 7, "labels", quick=True).sentence
    monkeypatch.setattr(connected.label_studio, "project", lambda project_id: {"label_config": "<View/>"})
    found = doctor_project.look_at_labels(connected, 7, "labels", quick=True)
    assert found.status is Status.FAILED
    assert "RectangleLabels" in found.sentence


# --- labels, order, rounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "is_trained", "status", "words"),
    [
        ({0: "nut", 1: "wire"}, True, Status.OK, "all 2 are classes of the model"),
        ({0: "NUT", 1: "bolt"}, True, Status.WARNING, "does not know 'wire'"),
        ({0: "person"}, True, Status.FAILED, "knows none of the labels ('nut', 'wire')"),
        ({0: "person"}, False, Status.OK, "no boxes yet for 'nut', 'wire'"),
    ],
)
def test_labels_that_the_model_knows(names: dict[int, str], is_trained: bool, status: Status, words: str) -> None:
    found = doctor_project._labels_known("labels", LabelMap.from_config(CONFIG), names, is_trained=is_trained)
    assert found.status is status
    assert words in found.sentence


def test_a_task_ranks_by_the_lowest_score_of_the_version() -> None:
    predictions = [
        {"model_version": "al-000001", "score": 0.4},
        {"model_version": "al-000001", "score": 0.2},
        {"model_version": "al-000000", "score": 0.1},
        {"model_version": "al-000001", "score": None},
    ]
    assert doctor_project._lowest({"predictions": predictions}, "al-000001") == 0.2
    assert doctor_project._lowest({"predictions": predictions[2:3]}, "al-000001") == 2.0
    assert doctor_project._lowest({}, "al-000001") == 2.0


@pytest.fixture
def connected(make: Callable[..., Services], redis_url: str, store_url: str) -> Services:
    """Project 7, just connected: round 0 is open and has its first step."""
    own = make(redis_url=redis_url, database_url=store_url)
    own.store.migrate()
    with own.store.write() as connection:
        rounds.connect_project(connection, 7, CONFIG, ProjectSettings(), "http://backend:9090")
    return own


def look_at_round(own: Services) -> Check:
    return doctor_project.look_at_round(own, 7, "round")


def set_steps(own: Services, **values: Any) -> None:
    with own.store.write() as connection:
        connection.execute(update(step_rows).values(**values))


def test_an_open_round_waits_for_a_worker_there_is(connected: Services) -> None:
    set_steps(connected, not_before=None)
    assert steps.send_waiting(connected.store, connected.redis) == 1
    found = look_at_round(connected)
    assert found.status is Status.FAILED
    assert found.sentence == "round 0 (attaching) waits for a worker of `control`: there is none"
    assert found.fix == "Start one: `hardfirst worker control`"
    register(connected.redis, "a", "control", 1)
    assert look_at_round(connected).sentence == "round 0 (attaching) waits for its turn on `control`, where 1 wait"


def test_a_round_whose_worker_died_is_stuck_and_sent_again(connected: Services) -> None:
    set_steps(connected, state="running", attempt=1, lease_until=time.time() + 20)
    assert look_at_round(connected).sentence == "round 0 (attaching) is in progress: attach"
    set_steps(connected, lease_until=time.time() - 1)
    found = look_at_round(connected)
    assert found.status is Status.FAILED
    assert found.sentence == "round 0 (attaching) is stuck at attach: its worker died"
    register(connected.redis, "a", "control", 1)
    (mended,) = run([Look("round", lambda: look_at_round(connected))], fix=True)
    assert (mended.status, mended.mended) == (Status.OK, True)
    with connected.store.read() as connection:
        (row,) = connection.execute(select(step_rows)).all()
    assert (row.state, row.attempt) == ("sent", 2)


def test_a_round_whose_job_redis_forgot_is_stuck(connected: Services) -> None:
    set_steps(connected, not_before=None)
    steps.send_waiting(connected.store, connected.redis)
    connected.redis.flushall()
    set_steps(connected, sent_at=time.time() - steps.SETTLE - 1)
    assert look_at_round(connected).sentence == "round 0 (attaching) is stuck at attach: its job was missing"


def test_a_step_that_nobody_sends(connected: Services) -> None:
    set_steps(connected, not_before=time.time() - doctor_project.OVERDUE - 5)
    with connected.store.write() as connection:
        connection.execute(update(round_rows).values(opened_at=time.time() - 600))
    found = look_at_round(connected)
    assert found.status is Status.FAILED
    assert "nobody sends attach to the workers" in found.sentence
    set_steps(connected, error="Label Studio does not answer")
    found = look_at_round(connected)
    assert (found.status, found.sentence) == (
        Status.WARNING,
        "round 0 (attaching) waits: Label Studio does not answer",
    )


def test_paused_failed_and_done_rounds(connected: Services) -> None:
    with connected.store.write() as connection:
        connection.execute(update(projects).values(paused_at=time.time()))
    assert "is paused" in look_at_round(connected).sentence
    with connected.store.write() as connection:
        connection.execute(update(projects).values(paused_at=None))
        row = open_round_of(connection, 7)
        assert row is not None
        rounds.close_round(connection, row.id, "failed", "out of memory")
    found = look_at_round(connected)
    assert (found.status, found.sentence) == (Status.FAILED, "round 0 failed: out of memory")
    with connected.store.write() as connection:
        connection.execute(update(round_rows).values(state="done", error=None))
        connection.execute(update(projects).values(problem="Label Studio answered 500"))
    found = look_at_round(connected)
    assert (found.status, found.sentence) == (Status.WARNING, "none is open, but: Label Studio answered 500")
    with connected.store.write() as connection:
        connection.execute(update(projects).values(problem=None))
    assert look_at_round(connected).sentence == "none is open; the last was round 0 (done)"


def test_a_project_that_was_never_connected_is_named(connected: Services) -> None:
    looks = doctor_project.project_looks(connected, 8, quick=True)
    found = {check.name: check for check in run(looks, fix=True, project_id=8)}
    assert found["project"].status is Status.FAILED
    assert "project 8 is not connected to this backend" in found["project"].sentence
    assert {found[name].status for name in ("webhook", "sampling", "order")} == {Status.SKIPPED}
    assert doctor_project.project_ids(connected) == [7]


# --- for the page: a worker says what it sees -------------------------------------------------------------------------


def test_a_worker_is_asked_for_what_needs_torch(
    make: Callable[..., Services], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make(redis_url=redis_url, device="cpu", weights="yolo11n.yaml")
    monkeypatch.setattr("worker.jobs.services", lambda: own)
    monkeypatch.setattr(doctor, "WORKER_PATIENCE", 120.0)  # torch may still have to be loaded, on a busy machine
    looks = {one.name: one for one in deployment_looks(own, quick=False, ask_worker=True)}
    found: dict[str, Check] = {}
    asking = threading.Thread(target=lambda: found.update({name: looks[name].look() for name in ("device", "weights")}))
    asking.start()
    while asking.is_alive():
        queue.make_worker("simple", ["control"], own.redis).work(burst=True, logging_level="CRITICAL")
        time.sleep(0.02)
    assert found["device"].sentence.startswith("cpu (")
    assert found["weights"].status is Status.WARNING
    assert "from scratch" in found["weights"].sentence


def test_a_worker_that_is_busy_is_not_waited_for(
    make: Callable[..., Services], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "WORKER_PATIENCE", 0.05)
    found = doctor.seen_by_worker(make(redis_url=redis_url), "device")
    assert (found.status, found.sentence) == (
        Status.SKIPPED,
        "not looked at: the worker of `control` is busy; look again later",
    )


def test_only_checks_are_made_for_the_page(make: Callable[..., Services]) -> None:
    assert doctor.examined_here(make(), ["os.system", "token"]) == []
