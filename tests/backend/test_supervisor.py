from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis

from backend import supervisor
from backend.supervisor import VALKEY, WEB, WORKERS, Child, Supervisor, secrets_of, settings_environment, up_children
from worker.errors import Conflict, QueueUnavailable, SettingsInvalid
from worker.settings import Settings, load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
UNTIL_TERM = """
    import signal, sys, time
    def end(number, frame):
        print("stopped", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    print("started", flush=True)
    while True: time.sleep(0.05)
"""


def python_child(name: str, code: str, order: int = WORKERS, **more: object) -> Child:
    return Child(name, [sys.executable, "-c", textwrap.dedent(code)], order, **more)  # type: ignore[arg-type]


class Output:
    """What was printed, and what to do when a line appears."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)


def supervise(
    children: list[Child], until: Callable[[Output], bool], seconds: float = 60, secrets: tuple[str, ...] = ()
) -> Output:
    """Run the children until the output satisfies `until`, then stop them."""
    output = Output()

    async def main() -> None:
        kept = Supervisor(children, emit=output, secrets=secrets)
        running = asyncio.create_task(kept.run())
        deadline = time.monotonic() + seconds
        while not until(output) and not running.done():
            assert time.monotonic() < deadline, output.lines
            await asyncio.sleep(0.02)
        kept.stop()
        await running

    asyncio.run(main())
    return output


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually_true(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", port=free_port())


def test_workers_stop_before_web_and_valkey_last() -> None:
    children = [
        python_child("web", UNTIL_TERM, WEB),
        python_child("valkey", UNTIL_TERM, VALKEY),
        python_child("train", UNTIL_TERM, WORKERS),
    ]
    output = supervise(children, lambda seen: seen.count("started") == 3)
    stops = [line for line in output.lines if "stopped" in line]
    assert stops == ["train    | stopped", "web      | stopped", "valkey   | stopped"]
    assert [child.process.returncode for child in children if child.process] == [0, 0, 0]


def test_a_child_that_ends_is_reported_and_started_again() -> None:
    """Also with code 0: a worker that lost Redis ends so."""
    children = [python_child("score", "print('work'); raise SystemExit(0)"), python_child("web", UNTIL_TERM, WEB)]
    output = supervise(
        children, lambda seen: seen.count("score    | work") == 2 and seen.count("web      | started") > 0
    )
    assert re.fullmatch(
        r"up       \| score exited with code 0 after \d+\.\d s; starting it again in 1 s",
        next(line for line in output.lines if line.startswith("up ")),
    )
    assert output.count("web      | started") == 1


def test_a_repair_sees_the_output_of_the_last_run_only(tmp_path: Path) -> None:
    """Else the words about a file that was set aside would condemn its successor."""
    seen_by_repair: list[str] = []
    code = f"""
        from pathlib import Path
        runs = Path({str(tmp_path / "runs")!r})
        runs.write_text((runs.read_text() if runs.exists() else "") + "i")
        print("run", runs.read_text())
    """

    def repair(last_output: str) -> str:
        seen_by_repair.append(last_output)
        return "mended"

    output = supervise([python_child("valkey", code, repair=repair)], lambda seen: len(seen_by_repair) == 2)
    assert seen_by_repair == ["run i", "run ii"]
    assert output.lines[1] == "up       | valkey: mended"
    assert output.lines[2].endswith("starting it again in 0.5 s")


def test_a_program_that_is_not_there_is_reported() -> None:
    output = supervise([Child("web", ["/no/such/program"])], lambda seen: seen.count("could not be started") == 1)
    assert "No such file or directory" in output.lines[0]


def test_delays_double() -> None:
    output = supervise([python_child("web", "raise SystemExit(3)")], lambda seen: seen.count("code 3") == 2)
    assert [line.rpartition(" in ")[2] for line in output.lines] == ["1 s", "2 s"]


def test_lines_longer_than_the_stream_limit_are_printed_whole_in_pieces() -> None:
    code = "print('x' * 200_000); print('after', flush=True)" + "\nimport time; time.sleep(60)"
    output = supervise([python_child("train", code)], lambda seen: seen.count("after") == 1)
    printed = [line.removeprefix("train    | ") for line in output.lines if not line.startswith("up ")]
    assert printed[-1] == "after"
    assert "".join(printed[:-1]) == "x" * 200_000
    assert max(len(line) for line in printed) <= 2 * supervisor.LINE_LIMIT


def test_of_a_progress_bar_the_last_state_is_printed() -> None:
    code = "print('1/3\\r2/3\\r3/3', flush=True)\nimport time; time.sleep(60)"
    output = supervise([python_child("train", code)], lambda seen: bool(seen.lines))
    assert output.lines[0] == "train    | 3/3"


def test_secrets_are_not_printed() -> None:
    code = "print('token abc123 and abc', flush=True)\nimport time; time.sleep(60)"
    output = supervise([python_child("web", code)], lambda seen: bool(seen.lines), secrets=("abc123", ""))
    assert output.lines[0] == "web      | token *** and abc"


def test_a_quiet_line_is_not_printed_and_stays_among_the_last() -> None:
    child = python_child("valkey", "print('never mind: 3')\nprint('hello', flush=True)\nimport time; time.sleep(60)")
    child.quiet = ("never mind",)
    output = supervise([child], lambda seen: bool(seen.lines))
    assert output.lines[0] == "valkey   | hello"
    assert list(child.last_lines)[:2] == ["never mind: 3", "hello"]


def test_a_child_that_does_not_heed_term_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SECOND_TERM_GRACE", 1.5)  # time to answer each, on a busy machine too
    code = """
        import signal, time
        signal.signal(signal.SIGTERM, lambda number, frame: print("no", flush=True))
        print("up", flush=True)
        while True: time.sleep(0.05)
    """
    child = python_child("train", code, grace=1.5)
    output = supervise([child], lambda seen: seen.count("up") == 1)
    assert output.count("no") == 2  # two TERMs: RQ takes the second as "now"
    assert child.process is not None
    assert child.process.returncode == -signal.SIGKILL


def test_others_wait_for_the_one_to_be_ready(tmp_path: Path) -> None:
    flag = tmp_path / "ready"
    code = f"import time; time.sleep(0.4); print('ready', flush=True); open({str(flag)!r}, 'w').close(); time.sleep(60)"
    children = [
        python_child("web", "import time; print('serving', flush=True); time.sleep(60)", WEB),
        python_child("valkey", code, VALKEY, ready=flag.exists),
    ]
    output = supervise(children, lambda seen: seen.count("serving") == 1)
    assert output.lines[:2] == ["valkey   | ready", "web      | serving"]


def test_one_that_never_gets_ready_ends_it_all_with_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "READY_TIMEOUT", 0.5)
    code = "import time; print('cannot open my file', flush=True); time.sleep(60)"

    def asked() -> bool:
        """Not ready; and not asked again before it has said why, however slowly a busy machine starts it."""
        eventually_true(lambda: child.last_lines)
        return False

    child = python_child("valkey", code, VALKEY, ready=asked)
    with pytest.raises(QueueUnavailable, match="valkey was not ready in 0 s; its last line: cannot open my file"):
        supervise([child], lambda seen: False)
    assert child.process is not None
    assert child.process.returncode == -signal.SIGTERM


UP_ALONE = """
    import asyncio, sys
    from backend.supervisor import Child, run
    code = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
    child = Child("train", [sys.executable, "-c", code])
    asyncio.run(run([child], on_ready=lambda: print("all started", flush=True)))
    print("ended", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_nothing_stays_behind_whatever_ends_up(number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(UP_ALONE)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = [process.stdout.readline(), process.stdout.readline()]
    assert "all started\n" in seen
    child_pid = int(re.findall(r"train    \| pid (\d+)", "".join(seen))[0])
    assert is_running(child_pid)
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(20) == code
    assert rest == ("ended\n" if code == 0 else "")
    process.stdout.close()
    eventually_true(lambda: not is_running(child_pid), 20)


def test_up_has_valkey_web_and_three_workers(settings: Settings) -> None:
    children, redis_url = up_children(settings, "python3", env={"OMP_NUM_THREADS": "1"})
    assert [(child.name, child.order) for child in children] == [
        ("valkey", VALKEY),
        ("web", WEB),
        ("train", WORKERS),
        ("predict", WORKERS),
        ("control", WORKERS),
    ]
    assert redis_url == f"unix://{settings.data_dir.resolve() / 'valkey.sock'}"
    web, train, predict, control = children[1:]
    assert web.argv[:5] == ["python3", "-m", "uvicorn", "--factory", "backend.app:create_app_from_env"]
    assert web.argv[web.argv.index("--port") + 1] == str(settings.port)
    assert train.argv == ["python3", "-m", "worker.queue", "train", "train"]
    assert predict.argv == ["python3", "-m", "worker.queue", "simple", "predict"]
    assert control.argv == ["python3", "-m", "worker.queue", "simple", "control,score"]
    for child in children[1:]:
        assert child.env["REDIS_URL"] == redis_url
        assert child.env["HARDFIRST_DATA_DIR"] == str(settings.data_dir.resolve())
        assert child.env["OMP_NUM_THREADS"] == "1"
        assert child.env["PYTHONPATH"].split(os.pathsep)[0] == str(REPOSITORY)
    os.close(children[0].pass_fds[0])


def test_with_a_redis_of_its_own_there_is_no_valkey(settings: Settings) -> None:
    children, redis_url = up_children(settings.model_copy(update={"redis_url": "redis://queue.example:6379/3"}))
    assert [child.name for child in children] == ["web", "train", "predict", "control"]
    assert redis_url == "redis://queue.example:6379/3"
    assert children[1].env["REDIS_URL"] == redis_url


def test_a_second_up_on_the_folder_is_refused_naming_the_first(settings: Settings) -> None:
    children, _ = up_children(settings)
    with pytest.raises(Conflict, match=rf"data is in use by process {os.getpid()}\. Stop that one"):
        up_children(settings)
    os.close(children[0].pass_fds[0])


def test_a_port_in_use_is_said_at_once(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=rf"127\.0\.0\.1:{port} cannot be listened on .* set HARDFIRST_PORT"):
            up_children(settings.model_copy(update={"port": port}))
    with pytest.raises(SettingsInvalid, match=r"'no-such-host\.invalid' is not an address"):
        up_children(settings.model_copy(update={"host": "no-such-host.invalid"}))
    children, _ = up_children(settings)  # what was refused left the folder free
    os.close(children[0].pass_fds[0])


def test_a_killed_valkey_comes_back_with_what_it_had(settings: Settings) -> None:
    children, url = up_children(settings)
    connection = redis.Redis.from_url(url)
    killed: list[int] = []

    def until(seen: Output) -> bool:
        process = children[0].process
        if not killed and process and supervisor.answers(url):
            connection.rpush("jobs", "a", "b")
            assert connection.waitaof(1, 0, 30_000)[0] == 1  # it is on the disk
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
        back = killed and process and process.pid != killed[0] and supervisor.answers(url)
        return bool(back) and connection.lrange("jobs", 0, -1) == [b"a", b"b"]

    output = supervise(children[:1], until)
    assert output.count("valkey exited with code -9") == 1
    assert not supervisor.answers(url)


def test_a_damaged_queue_file_is_set_aside_and_said(settings: Settings) -> None:
    children, url = up_children(settings)
    broken = settings.data_dir / "appendonlydir"
    broken.mkdir()
    (broken / "appendonly.aof.manifest").write_text("nonsense\n")
    output = supervise(children[:1], lambda seen: supervisor.answers(url))
    said = next(line for line in output.lines if "damaged" in line)
    assert said.startswith("up       | valkey: the queue's file was damaged; it is now appendonlydir.damaged-")


def test_children_read_the_settings_their_parent_has(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"image_hosts": "a.example,b.example", "shard_size": 17, "label_studio_api_key": "t0ken"}
    given = Settings.model_validate({**settings.model_dump(), **more, "user": "u", "password": "p"})
    for name, value in settings_environment(given).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == given


def test_secrets_are_the_tokens_and_the_passwords_in_urls(settings: Settings) -> None:
    given = Settings.model_validate(
        {
            "label_studio_api_key": "t0ken",
            "user": "someone",
            "password": "passw0rd",
            "database_url": "postgresql+psycopg://hf:dbpass@db/hf",
            "redis_url": "redis://:redispass@queue:6379/0",
        }
    )
    assert sorted(secrets_of(given)) == ["dbpass", "passw0rd", "redispass", "t0ken"]
    assert secrets_of(settings) == []
