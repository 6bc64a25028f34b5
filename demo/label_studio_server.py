"""A real Label Studio, for the demo and the tests: started, waited for, stopped.

It lives in a virtual environment of its own (it needs older redis and rq than we do), whose interpreter
HARDFIRST_LABEL_STUDIO_PYTHON names. Its first start runs half a minute of migrations, so a migrated, empty data
folder is kept in the cache and every new one begins as a copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx

from worker.errors import Conflict, HardfirstError, LabelStudioRefused, LabelStudioUnavailable
from worker.processes import die_with_parent

PYTHON_VARIABLE = "HARDFIRST_LABEL_STUDIO_PYTHON"
DATABASE_NAME = "label_studio.sqlite3"
SET_UP = Path(__file__).resolve().parent.parent / "scripts" / "setup.sh"
START_TIMEOUT = 180.0  # migrations took 22 to 49 s on two cores; a loaded machine takes several times that
# Label Studio reads dozens of variables, some with common names (HOST, USERNAME, DATABASE_URL): it gets these alone.
# No proxy variables: it must reach the backend on this machine directly.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR")
# seconds for the answers of a backend on this machine, which trains meanwhile. Label Studio's own: 1, 1 and 3
PATIENCE = {"WEBHOOK_TIMEOUT": "30", "ML_TIMEOUT_HEALTH": "30", "ML_TIMEOUT_SETUP": "60"}


@dataclass
class LabelStudioServer:
    """One Label Studio on 127.0.0.1, as a context manager or by start() and stop().

    Its admin is made at the first start on a data folder; later starts on that folder need the same token.
    It dies with the thread that starts it: start it from one that lives as long.

    Args:
        data_dir: its database and uploads; made if missing.
        port: 0 picks a free one.
        token: the admin's legacy API token, 6 to 40 characters.
        python: interpreter that has Label Studio. Default: HARDFIRST_LABEL_STUDIO_PYTHON.
        local_files_root: folder that local storages may serve files from.
    """

    data_dir: Path
    username: str = "admin@example.com"
    password: str = field(default="hardfirst-admin", repr=False)
    token: str = field(default="hardfirst-admin-token", repr=False)
    port: int = 0
    python: str | None = None
    local_files_root: Path | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.data_dir / "label-studio.log"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, timeout: float = START_TIMEOUT) -> LabelStudioServer:
        """Start it and return once it knows the admin's token.

        Raises:
            HardfirstError: HARDFIRST_LABEL_STUDIO_PYTHON is not set, or names no Label Studio.
            Conflict: the port is taken.
            LabelStudioUnavailable: it ended, or did not answer in `timeout` seconds; the log's end is in the sentence.
        """
        if self._process is not None:
            raise Conflict(f"this Label Studio runs already, as process {self._process.pid}")
        python = label_studio_python(self.python)
        self.data_dir = self.data_dir.resolve()
        if not (self.data_dir / DATABASE_NAME).exists():
            copy_migrated_folder(python, self.data_dir)
        self.port = _claim_port(self.port)
        parent_pid = os.getpid()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(python),
                env=self._environment(),
                cwd=self.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent_pid),
            )
        try:
            self._wait(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, grace: float = 5.0) -> None:
        """End it and every process of its group; returns when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        for sig in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sig)  # the group's id: it was started as a session of its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        process.wait()

    def __enter__(self) -> LabelStudioServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self, python: Path) -> list[str]:
        return [
            *_label_studio(python),
            *("start", "--no-browser", "--port", str(self.port), "--internal-host", "127.0.0.1", "--host", self.url),
        ]

    def _environment(self) -> dict[str, str]:
        own = {
            "LABEL_STUDIO_USERNAME": self.username,
            "LABEL_STUDIO_PASSWORD": self.password,
            "LABEL_STUDIO_USER_TOKEN": self.token,
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",  # new organisations have legacy tokens off
            # it refuses to call a backend on a loopback or private address unless both say it may
            "SSRF_PROTECTION_ENABLED": "false",
            "ML_BLOCK_LOCAL_IP": "false",
            **PATIENCE,
        }
        if self.local_files_root is not None:
            own["LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED"] = "true"
            own["LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT"] = str(self.local_files_root.resolve())
        return _environment(self.data_dir) | own

    def _wait(self, timeout: float) -> None:
        assert self._process is not None
        deadline = time.monotonic() + timeout
        headers = {"Authorization": f"Token {self.token}"}
        # trust_env=False: a proxy from the environment is not the way to 127.0.0.1
        with httpx.Client(base_url=self.url, headers=headers, timeout=10, trust_env=False) as client:
            while True:
                if (code := self._process.poll()) is not None:
                    raise LabelStudioUnavailable(f"Label Studio ended with code {code}: {self._log_end()}")
                answer = None
                with contextlib.suppress(httpx.TransportError):
                    answer = client.get("/api/current-user/whoami")
                if answer is not None and answer.status_code == 200:
                    return
                if answer is not None and answer.status_code in (401, 403):
                    raise LabelStudioUnavailable(
                        f"Label Studio at {self.url} does not know the token: {self.data_dir} was made with another one"
                    )
                if time.monotonic() > deadline:
                    raise LabelStudioUnavailable(
                        f"Label Studio did not answer in {timeout:.0f} s at {self.url}: {self._log_end()}"
                    )
                time.sleep(0.1)

    def _log_end(self) -> str:
        return self.log_path.read_text(errors="replace")[-1500:].replace(self.token, "***")


def label_studio_python(given: str | None = None) -> Path:
    """The interpreter that has Label Studio: the one named, else the clone's own environment, made if need be.

    Raises:
        HardfirstError: none is named and this is no clone, or what is named has no Label Studio beside it.
    """
    named = given or os.environ.get(PYTHON_VARIABLE, "") or _made_by_set_up()
    if not named:
        raise HardfirstError(
            f"{PYTHON_VARIABLE} is not set: it names the interpreter of a virtual environment with Label Studio. "
            "`make demo` and `make test` make one and set it."
        )
    python = Path(named)
    if not (python.with_name("label-studio")).is_file():
        raise HardfirstError(f"{PYTHON_VARIABLE}={named}: there is no label-studio beside it. Run `make demo`.")
    return python


def _made_by_set_up() -> str:
    """What `make demo` would name; empty where there is no set-up script (an installed package)."""
    if not SET_UP.is_file():
        return ""
    found = subprocess.run([str(SET_UP), "label-studio"], stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode != 0:
        raise HardfirstError("Label Studio's environment could not be made; the lines above say why")
    return found.stdout.strip()


def copy_migrated_folder(python: Path, data_dir: Path) -> None:
    """Make `data_dir` a data folder with all migrations done and nobody in it: a copy of the one in the cache."""
    template = _migrated_folder(python)
    data_dir.mkdir(parents=True, exist_ok=True)
    shutil.copytree(template, data_dir, dirs_exist_ok=True)
    # One in fifty of the keys Label Studio draws begins with a dollar sign, and is not read back: after a restart it
    # signs with another one, and every token is refused.
    (data_dir / ".env").write_text(f"SECRET_KEY={secrets.token_hex(32)}\n")


def create_annotator(base_url: str, admin_token: str, email: str, password: str) -> str:
    """Sign up a second user through an invitation; returns the user's legacy API token.

    The way a person would: POST /api/users/ makes one who cannot log in.

    Raises:
        LabelStudioRefused: Label Studio did not accept it (an address in use, a password under 8 characters).
    """
    with httpx.Client(base_url=base_url, timeout=30, follow_redirects=True, trust_env=False) as client:
        invitation = client.get("/api/invite", headers={"Authorization": f"Token {admin_token}"})
        _expect_ok(invitation, "no invitation")
        signup_path = invitation.json()["invite_url"]
        sign_up(client, signup_path, email, password)
        answer = client.get("/api/current-user/token")
        _expect_ok(answer, "no token")
        return str(answer.json()["token"])


def sign_up(client: httpx.Client, signup_path: str, email: str, password: str) -> None:
    """Fill in the form as a person does; `client`, which must follow redirects, is logged in then, by its cookies.

    Raises:
        LabelStudioRefused: Label Studio did not accept it (an address in use, a password under 8 characters).
    """
    _expect_ok(client.get(signup_path), "no sign-up page")
    form = {"email": email, "password": password, "csrfmiddlewaretoken": client.cookies["csrftoken"]}
    signed_up = client.post(signup_path, data=form, headers={"Referer": str(client.base_url)})
    _expect_ok(signed_up, "sign-up failed")
    if client.get("/api/current-user/whoami").status_code != 200:  # the form came back, with what it did not like
        lists = re.findall(r'<ul class="field_errors">(.*?)</ul>', signed_up.text, re.DOTALL)
        reasons = re.findall(r"<li>\s*(.*?)\s*</li>", " ".join(lists), re.DOTALL)
        raise LabelStudioRefused(f"Label Studio did not sign up {email}: {'; '.join(reasons) or 'it gave no reason'}")


def _expect_ok(answer: httpx.Response, what: str) -> None:
    if answer.status_code >= 400:
        raise LabelStudioRefused(f"{what}: Label Studio answered {answer.status_code} to {answer.request.url.path}")


def _label_studio(python: Path) -> list[str]:
    return [str(python), str(python.with_name("label-studio"))]


def _environment(data_dir: Path) -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed_on | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data_dir),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "PYTHONUNBUFFERED": "1",
    }


def _migrated_folder(python: Path) -> Path:
    """The migrated, empty data folder for this Label Studio; made once, by whoever comes first."""
    cache = _cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    template = cache / f"ls-data-{_installation_key(python)}"
    with _exclusive(cache / f"{template.name}.lock"):
        if not template.exists():
            unfinished = cache / f"{template.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _migrate(python, unfinished)
            unfinished.rename(template)  # under its name only when it is whole
    return template


def _migrate(python: Path, data_dir: Path) -> None:
    """`label-studio version` migrates before it prints, and makes no user."""
    result = subprocess.run(
        [*_label_studio(python), "version"],
        env=_environment(data_dir),
        cwd=data_dir,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10 * START_TIMEOUT,
    )
    if result.returncode != 0 or not (data_dir / DATABASE_NAME).exists():
        raise HardfirstError(
            f"Label Studio could not make its database (code {result.returncode}): "
            f"{(result.stdout + result.stderr)[-1500:].decode(errors='replace')}"
        )
    (data_dir / ".env").unlink(missing_ok=True)  # its secret key: every copy makes its own


def _installation_key(python: Path) -> str:
    """First 16 hex of SHA-256 over what is installed, name and version."""
    names = sorted(folder.name for folder in python.parent.parent.glob("lib/python*/site-packages/*.dist-info"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    """As in scripts/make_venv.py, which can import nothing of ours."""
    if given := os.environ.get("HARDFIRST_CACHE"):
        return Path(given).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "hardfirst"


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _claim_port(port: int) -> int:
    """`port` if it is free, or a free one for 0.

    Label Studio moves on to the next port by itself when its own is taken; then nobody knows where it is.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # as the server does: the port of one that just ended is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Conflict(f"port {port} is taken ({error.strerror}); choose another for Label Studio") from error
        return int(probe.getsockname()[1])
