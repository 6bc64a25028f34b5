"""Follow the README's "first ten minutes" to the letter, as somebody new: `make newcomer`, or
`scripts/py -m scripts.newcomer [--data data.yaml] [--here] [--fresh]`.

A clean clone, a clean home, the README's own shell blocks and values; what a person does in the browser is done through
Label Studio's API, logged in as that person. When something does not go as the README says, the line that says it is
named, and the exit code is 1. It ends after one round; what it started is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import typer

from backend.cli import app
from demo import factory
from demo.annotators import Annotator, label_in_turns
from demo.label_studio_server import DATABASE_NAME, PYTHON_VARIABLE, _cache_folder, copy_migrated_folder, sign_up
from demo.loop import _json, _wait_until
from demo.oracle import Dataset, TrueImage, everything_unlabelled, regions
from worker.errors import HardfirstError, TrainingFailed, Unavailable
from worker.label_studio import model_version
from worker.processes import die_with_parent
from worker.settings import Settings, parse_project_settings, variable_of

ROOT = Path(__file__).resolve().parent.parent
SECTION = "The first ten minutes with your own Label Studio"
SCORE_SECTION = "Before you connect anything"
LABEL_STUDIO_URL, BACKEND_URL = "http://localhost:8080", "http://localhost:9090"
EMAIL, PASSWORD = "newcomer@example.com", "newcomer-password"
IMAGES, SEED = 60, 11  # of the generated ones
SCORED = 15  # of them, and as many at random
# What the README's JSON is replaced by: 30 labels, and a round that takes a CPU a minute.
SMALL = {"batch_size": 18, "holdout_size": 12, "epochs": 2, "imgsz": 96, "train_batch": 4}
MINUTES, FRESH_MINUTES = 15.0, 60.0
ITALICS = r"(?<![*\w])\*([^*`]+)\*(?!\*)"
SCREEN_PAGES = ("label-studio", "settings", "upgrading")  # of docs/, where italics are what stands on a screen
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
CARD_STATES = {"CO": "Connected", "ER": "Error", "DI": "Disconnected"}
# Nothing is sent to Label Studio's makers from here, and no browser of this machine is opened.
QUIET = {
    "BROWSER": "true",
    "COLLECT_ANALYTICS": "false",
    "LATEST_VERSION_CHECK": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
}
# Beside a home of its own, what a shell needs to install packages. Of hardfirst's settings only the weights, which some
# machines cannot download; none of Label Studio's.
PASSED_ON = (
    "HARDFIRST_WEIGHTS",
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PYTHON",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
)
UsageError: Any = typer.BadParameter.__base__  # of the click that typer brings
PASSED_ON_TOO = re.compile(r"(?i)^(pip_\w+|\w+_proxy)$")


@dataclass(frozen=True)
class Said:
    """A passage of the README or of another page, and the line it begins on."""

    text: str
    line: int
    page: str = "README.md"

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: “{textwrap.shorten(self.text, 110, placeholder=' ...')}”"


class TextWrong(Exception):
    """Something is not as the README says."""

    def __init__(self, said: Said, why: object) -> None:
        super().__init__(f"{said}\n  {why}")
        self.said = said


# --- reading the README ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """What a newcomer is told to run and to type, in the order of the README."""

    label_studio: Said
    start_label_studio: Said
    sign_up_at: Said
    start_hardfirst: Said
    backend: Said
    workers: Said
    data_folder: Said
    upload: Said
    model_name: Said
    model_url: Said
    extra_params: Said
    card: Said
    tab: Said
    button: Said
    doctor: Said
    round: Said
    page: Said
    report: Said
    report_file: Said
    prefix: Said
    score: Said
    score_files: tuple[Said, ...]
    screens: tuple[Said, ...]


@dataclass(frozen=True)
class Passage:
    """Part of the README, from offset `start` to `end`. A blank in a pattern stands for any white space."""

    readme: str
    start: int
    end: int
    page: str = "README.md"

    def find(self, pattern: str, what: str) -> Said:
        """The first group of the pattern, its white space folded."""
        found = re.compile(pattern.replace(" ", r"\s+")).search(self.readme, self.start, self.end)
        if found is None:
            raise TextWrong(self.head(), f"nothing here names {what}")
        return self.said(found, 1)

    def every(self, pattern: str) -> Iterator[Said]:
        for found in re.finditer(pattern, self.readme[: self.end]):
            if found.start() >= self.start:
                yield self.said(found, 1)

    def said(self, found: re.Match[str], group: int) -> Said:
        return Said(" ".join(found.group(group).split()), self.line_at(found.start(group)), self.page)

    def blocks(self) -> Iterator[Said]:
        """The shell blocks, as a reader copies them."""
        fences = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
        for found in fences.finditer(self.readme, self.start, self.end):
            yield Said(textwrap.dedent(found.group(1)).strip(), self.line_at(found.start(1)), self.page)

    def block(self, command: str) -> Said:
        """The shell block that has this command."""
        for said in self.blocks():
            if command in said.text:
                return said
        raise TextWrong(self.head(), f"no shell block here has `{command}`")

    def line_at(self, offset: int) -> int:
        return self.readme.count("\n", 0, offset) + 1

    def head(self) -> Said:
        return Said(self.readme[self.start : self.end].strip().partition("\n")[0], self.line_at(self.start), self.page)


def read_guide(readme: str) -> Guide:
    """
    Raises:
        TextWrong: something is not there; it names the passage that should have it.
    """
    all_of_it = Passage(readme, 0, len(readme))
    section, scoring = _section(all_of_it, SECTION), _section(all_of_it, SCORE_SECTION)
    return Guide(
        label_studio=section.find(r"pip install label-studio==([\d.]+)", "Label Studio's version"),
        start_label_studio=section.block("label-studio start"),
        sign_up_at=section.find(r"sign up at <([^>]+)>", "where to sign up"),
        start_hardfirst=section.block("make up"),
        backend=section.find(r"the backend on <([^>]+)>", "the backend's address"),
        workers=section.find(r"the backend on <[^>]+> and (\w+) workers", "how many workers start"),
        data_folder=section.find(r"Its data is in `([^`]+)`", "where its data is"),
        upload=section.block("hardfirst upload"),
        model_name=section.find(r"Name: `([^`]+)`", "the model's name"),
        model_url=section.find(r"Backend URL: `([^`]+)`", "the Backend URL"),
        extra_params=section.find(r"as JSON, such as `([^`]+)`", "settings as JSON"),
        card=section.find(r"The card then says \*\*(\w+)\*\*", "what the model's card says"),
        tab=section.find(r"Data Manager tab \*([^*]+)\*", "the Data Manager's tab"),
        button=section.find(r"press \*\*([^*]+)\*\*", "the button to press"),
        doctor=section.find(r"`([\w/]*hardfirst doctor)`", "the doctor"),
        round=section.find(r"(When as many images are labelled as the batch had, a round runs)", "when a round runs"),
        page=all_of_it.find(r"The page at <([^>]+)> shows", "the page"),
        report=all_of_it.find(r"\| `(hardfirst report)` \|", "the report's command"),
        report_file=all_of_it.find(r"project's report \(`([^`]+)`", "the report's file"),
        prefix=all_of_it.find(r"In a clone, `([^`]+)` is that command", "the command's place in a clone"),
        score=scoring.block("hardfirst score"),
        score_files=tuple(scoring.every(r"`(\w+/[\w.]+\.\w+)`")),
        screens=tuple(section.every(ITALICS)),
    )


def _section(whole: Passage, title: str) -> Passage:
    heading = re.search(rf"^## {title}$", whole.readme, re.MULTILINE)
    if heading is None:
        raise TextWrong(whole.head(), f"there is no section “{title}”")
    following = re.search(r"^## ", whole.readme[heading.end() :], re.MULTILINE)
    end = heading.end() + following.start() if following else len(whole.readme)
    return Passage(whole.readme, heading.start(), end, whole.page)


def checked(readme: str, root: Path) -> Guide:
    """The guide of this README, after all that can be checked without following it.

    Raises:
        TextWrong: with the line.
    """
    guide = read_guide(readme)
    whole = Passage(readme, 0, len(readme))
    for said in whole.blocks():
        _check_block(said, root)
    _check_spans(whole)
    for place in sorted((root / "docs").glob("*.md")):
        page = place.read_text(encoding="utf-8")
        for said in Passage(page, 0, len(page), f"docs/{place.name}").blocks():
            _check_block(said, root)
        _check_spans(Passage(page, 0, len(page), f"docs/{place.name}"))
    check_guide(guide, root)
    locked = (root / "requirements-label-studio.lock").read_text(encoding="utf-8")
    if f"label-studio=={guide.label_studio.text}\n" not in locked:  # what people install is what is tested
        raise TextWrong(guide.label_studio, "requirements-label-studio.lock has another version")
    return guide


def check_guide(guide: Guide, root: Path) -> None:
    """What can be wrong with its passages before anything runs: commands, settings, placeholders, addresses.

    Raises:
        TextWrong: with the line.
    """
    for said in (guide.doctor, guide.report):
        _check_command(said, said.text)
    try:
        parse_project_settings(guide.extra_params.text)
    except HardfirstError as error:
        raise TextWrong(guide.extra_params, error) from error
    if not (root / guide.prefix.text).is_file():
        raise TextWrong(guide.prefix, "the clone has no such file")
    fill_in(guide.start_hardfirst, {"LABEL_STUDIO_API_KEY=...": ""})
    fill_in(guide.upload, {"images/": "", "--classes bolt,nut": ""})
    fill_in(guide.score, {"images/": "", "yours.pt": "", "--k 200": ""})
    variables = {variable_of(name) for name in Settings.model_fields}
    for name in re.findall(r"^echo (\w+)=", guide.start_hardfirst.text, re.MULTILINE):
        if name not in variables:
            raise TextWrong(guide.start_hardfirst, f"no setting has the name {name}")
    for said in (guide.sign_up_at, guide.backend, guide.model_url, guide.page):
        if urlsplit(said.text).scheme != "http":
            raise TextWrong(said, "this is no address")


def _check_block(said: Said, root: Path) -> None:
    parsed = subprocess.run(["bash", "-n", "-c", said.text], capture_output=True, text=True)
    if parsed.returncode != 0:
        raise TextWrong(said, parsed.stderr.strip())
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for number, line in enumerate(said.text.splitlines()):
        here = Said(line, said.line + number, said.page)
        for target in re.findall(r"\bmake ([\w-]+)", line):
            if target not in targets:
                raise TextWrong(here, f"the Makefile has no target `{target}`")
        for command in re.findall(r"[\w/]*hardfirst [^&;|#]+", line):
            _check_command(here, command)


def _check_spans(readme: Passage) -> None:
    """hardfirst's commands with arguments, where they are named in the text."""
    for found in re.finditer(r"`((?:scripts/)?hardfirst \w+\s[^`]+)`", readme.readme):
        said = readme.said(found, 1)
        _check_command(said, said.text)


def _check_command(said: Said, command: str) -> None:
    """Whether hardfirst has such a command with such options."""
    _, name, *arguments = shlex.split(command)
    known: Any = typer.main.get_command(app)
    if name not in known.commands:
        raise TextWrong(said, f"hardfirst has no command `{name}`")
    try:
        known.commands[name].make_context(name, arguments)
    except UsageError as error:
        raise TextWrong(said, error.format_message()) from error


def fill_in(said: Said, values: Mapping[str, str]) -> str:
    """The passage with the reader's own values in the place of its examples."""
    text = said.text
    for example, value in values.items():
        if example not in text:
            raise TextWrong(said, f"`{example}`, which a reader replaces, is not in it")
        text = text.replace(example, value)
    return text


def check_screens(screens: Sequence[Said], pages: str) -> int:
    """Whether what the README names in italics, as a way through a screen, is written on one.

    Args:
        pages: all that Label Studio's pages and ours may show, as source.

    Returns:
        How many names were found.

    Raises:
        TextWrong: the first that is on none.
    """
    names = [(said, name.strip()) for said in screens for name in said.text.split("→")]
    for said, name in names:
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", pages) is None:
            raise TextWrong(said, f"neither Label Studio's pages nor hardfirst's have the words “{name}”")
    return len(names)


def screens_of_docs(root: Path) -> list[Said]:
    found: list[Said] = []
    for name in SCREEN_PAGES:
        text = (root / "docs" / f"{name}.md").read_text(encoding="utf-8")
        found += Passage(text, 0, len(text), f"docs/{name}.md").every(ITALICS)
    return found


def source_of_pages(label_studio_python: Path, root: Path) -> str:
    """What is written on Label Studio's pages and on ours: their scripts, templates and code."""
    (theirs,) = label_studio_python.parent.parent.glob("lib/python*/site-packages/web/dist/apps/labelstudio")
    ours = [*(root / "backend").rglob("*.html"), *(root / "backend").rglob("*.js"), root / "worker" / "label_studio.py"]
    return "\n".join(one.read_text(encoding="utf-8") for one in (*sorted(theirs.glob("*.js")), *ours))


# --- following it ----------------------------------------------------------------------------------------------------


class Newcomer:
    """Somebody who stands in the clone, with the README open. The methods are its steps."""

    def __init__(
        self, guide: Guide, folder: Path, dataset: Dataset, params: Mapping[str, Any], fresh: bool, stack: ExitStack
    ) -> None:
        self.guide, self.folder, self.dataset = guide, folder, dataset
        self.params, self.fresh, self.stack = dict(params), fresh, stack
        self.clone, self.home = folder / "hardfirst", folder / "home"
        self.home.mkdir()
        self.env = self._clean_environment()
        self.began = time.monotonic()
        self.at = {url: _free_address(url) for url in (LABEL_STUDIO_URL, BACKEND_URL)}
        self.browser = httpx.Client(base_url=self.at[LABEL_STUDIO_URL], timeout=60, follow_redirects=True)
        self.browser.event_hooks["request"].append(self._with_csrf_token)
        self.api_key = ""
        self.project_id = 0
        self.truth = {hashlib.sha256(one.path.read_bytes()).digest(): one for one in dataset.images}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def follow(self) -> None:
        """Every step, in the README's order."""
        guide = self.guide
        steps: list[tuple[Said, Callable[[], str]]] = [
            (guide.start_label_studio, self.start_label_studio),
            (guide.start_hardfirst, self.start_hardfirst),
            (guide.upload, self.upload),
            (guide.model_name, self.connect),
            (guide.tab, self.wait_for_first_batch),
            (guide.button, self.label),
        ]
        steps.sort(key=lambda step: step[0].line)
        steps += [
            (guide.round, self.wait_for_round),
            (guide.doctor, self.ask_doctor),
            (guide.page, self.look_at_page),
            (guide.report, self.write_report),
            (guide.score, self.score_a_folder),
        ]
        for said, step in steps:
            self.say(f"{step.__name__.replace('_', ' ')} (README.md:{said.line})")
            try:
                self.say(f"  {step()}")
            except (HardfirstError, httpx.HTTPError, subprocess.SubprocessError, OSError, LookupError) as error:
                raise TextWrong(said, f"{type(error).__name__}: {error}") from error

    # the steps, each returns what it saw

    def start_label_studio(self) -> str:
        """In its own environment, as the README's lock has it; with nobody in it: the newcomer signs up."""
        python = self._label_studio_python()
        pages = source_of_pages(python, self.clone)
        guide = self.guide
        screens = [*guide.screens, guide.card, guide.button, guide.tab, *screens_of_docs(self.clone)]
        n_names = check_screens(screens, pages)
        if not self.fresh:  # its migrations take a minute; a migrated, empty folder is kept in the cache
            copy_migrated_folder(python, self.home / ".local" / "share" / "label-studio")
        url = self._address(guide.sign_up_at)
        text = guide.start_label_studio.text
        if url != LABEL_STUDIO_URL:
            text += f" --port {urlsplit(url).port}"
        path = f"{python.parent}{os.pathsep}{self.env['PATH']}"
        self._start("label-studio", text, {"PATH": path, **QUIET}, f"{url}/health")
        sign_up(self.browser, "/user/signup/", EMAIL, PASSWORD)
        self.api_key = str(_json(self.browser.post("/api/token/"))["token"])
        here = "" if self.fresh else f", on a copy of a migrated {DATABASE_NAME}"
        found = f"its pages and ours have the {n_names} names of the README and docs/"
        return f"Label Studio answers at {url}{here}; signed up, and took a personal access token; {found}"

    def start_hardfirst(self) -> str:
        text = fill_in(self.guide.start_hardfirst, {"=...": f"={self.api_key}"})
        text = text.replace(LABEL_STUDIO_URL, self.at[LABEL_STUDIO_URL])
        url = self._address(self.guide.backend)
        port = {} if url == self.guide.backend.text else {"HARDFIRST_PORT": str(urlsplit(url).port)}
        process = self._start("hardfirst", text, port, f"{url}/health")
        if not (self.clone / self.guide.data_folder.text).is_dir():
            raise TextWrong(self.guide.data_folder, f"there is no {self.guide.data_folder.text} then")
        n_workers = lambda: sum("worker.queue" in one.cmdline() for one in process.children(recursive=True))  # noqa: E731
        _wait_until(lambda: n_workers() > 0, 30, "no worker was started")
        if NUMBERS[n_workers()] != self.guide.workers.text:
            raise TextWrong(self.guide.workers, f"{n_workers()} workers were started")
        return f"hardfirst answers at {url}, with {n_workers()} workers"

    def upload(self) -> str:
        """The images lie in images/, as in the README; what is told about the classes is one's own."""
        images = self.clone / "images"
        images.mkdir()
        for number, one in enumerate(self.dataset.images):
            shutil.copy(one.path, images / f"{number:05d}_{one.path.name}")
        is_ours = self.dataset.names == factory.CLASSES
        own = "--label-config label_config.xml" if is_ours else f"--classes {','.join(self.dataset.names)}"
        printed = self._run(self.guide.upload, fill_in(self.guide.upload, {"--classes bolt,nut": own}))
        projects = _json(self.browser.get("/api/projects/"))["results"]
        if len(projects) != 1:
            raise Unavailable(f"there are {len(projects)} projects afterwards, not 1")
        self.project_id = int(projects[0]["id"])
        n_tasks = int(projects[0]["task_number"])
        if n_tasks != len(self.truth):
            raise Unavailable(f"{len(self.truth)} different images, but {n_tasks} tasks:\n{printed}")
        return printed.strip().replace("\n", "\n         ")

    def connect(self) -> str:
        """As the form does. The README's example of settings is replaced by small ones."""
        guide = self.guide
        body = {
            "title": guide.model_name.text,
            "url": self._address(guide.model_url),
            "project": self.project_id,
            "extra_params": self.params,
        }
        answer = self.browser.post("/api/ml", json=body)
        if answer.status_code == 403:  # the two variables are there to prevent this
            raise TextWrong(guide.start_label_studio, f"Connect Model is refused: {answer.text[:400]}")
        if answer.status_code >= 400:
            raise TextWrong(guide.model_url, f"Label Studio answered {answer.status_code}: {answer.text[:400]}")
        (card,) = _json(self.browser.get("/api/ml", params={"project": self.project_id}))
        if CARD_STATES.get(card["state"]) != guide.card.text:
            raise TextWrong(guide.card, f"it says {card['state']}: {card.get('error_message')}")
        return f"the card {card['title']!r} says {guide.card.text}"

    def wait_for_first_batch(self) -> str:
        took = self._await_round(0)
        n_tasks = len(self._tab_task_ids())
        return f"{self.guide.tab.text!r} has {n_tasks} tasks after {took:.0f} s"

    def label(self) -> str:
        """All of the batch, one after the other, as the button serves them, with the true boxes."""
        batch = self._tab_task_ids()
        person = Annotator("newcomer", str(self.browser.base_url), "")
        person.client = self.browser
        shown = {"boxes": 0}

        def true_regions(task: dict[str, Any]) -> Sequence[Mapping[str, Any]]:
            shown["boxes"] += sum(len(one["result"]) for one in task.get("predictions", []))
            return regions(self._true_image(task), self.dataset.names)

        served = label_in_turns([person], self.project_id, len(batch), true_regions, lambda _: None)
        if served != batch:
            raise TextWrong(self.guide.button, f"the tab's order is {batch[:8]} ..., served were {served[:8]} ...")
        return f"labelled {len(served)} images in the batch's order; {shown['boxes']} boxes were drawn already"

    def wait_for_round(self) -> str:
        took = self._await_round(1)
        project = _json(self.browser.get(f"/api/projects/{self.project_id}/"))
        task = _json(self.browser.get(f"/api/projects/{self.project_id}/next"))
        versions = {one["model_version"] for one in task["predictions"]}
        if project["model_version"] != model_version(1) or versions != {model_version(1)}:
            raise Unavailable(f"{project['model_version']} is served, the next task has {versions or 'no prediction'}")
        if task["id"] not in self._tab_task_ids():
            raise Unavailable(f"task {task['id']} is served, which is not in {self.guide.tab.text!r}")
        (point, *_) = [one for one in self._backend("/rounds") if one["number"] == 1]
        boxes = sum(len(one["result"]) for one in task["predictions"])
        served = f"{model_version(1)} is served, its first task with {boxes} boxes"
        return f"round 1 in {took:.0f} s, mAP50 {point['map50']:.3f}; {served}"

    def ask_doctor(self) -> str:
        printed = self._run(self.guide.doctor)
        worth_a_look = [line for line in printed.splitlines() if re.match(r"[!✗x–-] ", line)]
        return "\n         ".join([printed.strip().splitlines()[-1], *worth_a_look])

    def look_at_page(self) -> str:
        url = self._address(self.guide.page)
        for path in ("/", f"/projects/{self.project_id}"):
            page = httpx.get(f"{url}{path}", trust_env=False, follow_redirects=True, timeout=30)
            page.raise_for_status()
            if "Parts" not in page.text:
                raise Unavailable(f"{url}{path} does not name the project")
        return f"{url}/projects/{self.project_id} has {len(page.text):,} characters"

    def write_report(self) -> str:
        self._run(self.guide.report, self.guide.report.text.replace("hardfirst", self.guide.prefix.text, 1))
        name = self.guide.report_file.text.replace("p7", f"p{self.project_id}")
        written = self.clone / name
        if not written.is_file():
            raise TextWrong(self.guide.report_file, f"there is no {name}")
        numbers = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
        return f"{name}: {written.stat().st_size:,} bytes; its numbers have {', '.join(list(numbers)[:6])}"

    def score_a_folder(self) -> str:
        """With the weights the round made, from the page."""
        weights = f"{self._address(self.guide.backend)}/api/projects/{self.project_id}/rounds/1/weights.pt"
        yours = self.clone / "yours.pt"
        yours.write_bytes(httpx.get(weights, trust_env=False, timeout=60).raise_for_status().content)
        said = self.guide.score
        printed = self._run(said, fill_in(said, {"--k 200": f"--k {SCORED}"}))
        for file in self.guide.score_files:
            if not (self.clone / file.text).is_file():
                raise TextWrong(file, f"there is no {file.text} then")
        return printed.strip().splitlines()[0]

    # what the steps need

    def _clean_environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name in PASSED_ON or PASSED_ON_TOO.match(name)}
        env |= {"HOME": str(self.home), "TERM": "dumb", "COLUMNS": "160"}
        return env if self.fresh else env | {"HARDFIRST_CACHE": str(_cache_folder())}

    def _label_studio_python(self) -> Path:
        if (named := os.environ.get(PYTHON_VARIABLE)) and not self.fresh:
            return Path(named)
        command = [str(self.clone / "scripts" / "setup.sh"), "label-studio"]
        return Path(subprocess.run(command, env=self.env, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())

    def _address(self, said: Said) -> str:
        """What is typed: the README's address, on another port where that one was taken here."""
        for url, real in self.at.items():
            if said.text.startswith(url):
                return said.text.replace(url, real)
        raise TextWrong(said, f"neither Label Studio ({LABEL_STUDIO_URL}) nor hardfirst ({BACKEND_URL}) is there")

    def _with_csrf_token(self, request: httpx.Request) -> None:
        """As Label Studio's pages do for who is logged in by cookies."""
        if request.method not in ("GET", "HEAD") and (token := self.browser.cookies.get("csrftoken")):
            request.headers["X-CSRFToken"] = token

    def _start(self, name: str, text: str, extra: Mapping[str, str], health: str) -> psutil.Process:
        """A block that goes on running, in a terminal of its own; back when `health` answers."""
        log_path = self.folder / f"{name}.log"
        parent = os.getpid()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-e", "-c", text],
                cwd=self.clone,
                env={**self.env, **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent),
            )
        self.stack.callback(self._stop, process, name)

        def answers() -> bool:
            if process.poll() is not None:
                raise Unavailable(f"it ended with code {process.returncode}: {log_path.read_text()[-1200:]}")
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(health, timeout=2, trust_env=False).status_code == 200
            return False

        _wait_until(answers, 60 * (FRESH_MINUTES if self.fresh else 5), f"{health} does not answer")
        return psutil.Process(process.pid)

    def _stop(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Ctrl-C in its terminal; what does not heed it is killed."""
        for sig, grace in ((signal.SIGINT, 30.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
                self.say(f"stopped {name} by {sig.name}")
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what its shell left behind

    def _run(self, said: Said, text: str | None = None) -> str:
        command = ["bash", "-e", "-c", text or said.text]
        done = subprocess.run(
            command, cwd=self.clone, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise TextWrong(said, f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-1500:]}")
        return done.stdout

    def _backend(self, path: str) -> Any:
        url = f"{self._address(self.guide.backend)}/api/projects/{self.project_id}{path}"
        return httpx.get(url, trust_env=False, timeout=30).raise_for_status().json()

    def _await_round(self, number: int) -> float:
        """Until its batch is published, and the tab shows it; the seconds that took."""
        began, shown = time.monotonic(), ""
        while self._backend("/batch")["round_number"] != number:
            status = self._backend("/status")
            now = status["now"]
            if now["kind"] == "failed":
                raise TrainingFailed(f"round {number}: {now['words']}: {now['detail']}")
            if now["words"] != shown:
                shown = now["words"]
                self.say(f"  the page says: {shown}")
            if number and now["kind"] == "idle" and time.monotonic() - began > 90:
                raise Unavailable(f"no round began in 90 s; the page says: {now['words']} {now['detail']}")
            time.sleep(0.5)
        wanted = model_version(number)
        served = lambda: _json(self.browser.get(f"/api/projects/{self.project_id}/"))["model_version"]  # noqa: E731
        _wait_until(lambda: served() == wanted, 60, f"Label Studio does not serve {wanted}")
        return time.monotonic() - began

    def _tab_task_ids(self) -> list[int]:
        views = _json(self.browser.get("/api/dm/views/", params={"project": self.project_id}))
        titles = {one["data"].get("title"): one["id"] for one in views}
        if self.guide.tab.text not in titles:
            raise TextWrong(self.guide.tab, f"the Data Manager's tabs are {list(titles)}")
        params = {"project": self.project_id, "view": titles[self.guide.tab.text], "page_size": 1000}
        found = [int(task["id"]) for task in _json(self.browser.get("/api/tasks", params=params))["tasks"]]
        if not found:
            raise TextWrong(self.guide.tab, "the tab is there, but empty")
        return found

    def _true_image(self, task: Mapping[str, Any]) -> TrueImage:
        image = self.browser.get(task["data"]["image"]).raise_for_status().content
        return self.truth[hashlib.sha256(image).digest()]


def _free_address(url: str) -> str:
    """The README's address, or the same on a free port where somebody has that one."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", urlsplit(url).port or 80)) != 0:
            return url
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    print(f"{url} is taken on this machine: with port {port} in its place", flush=True)
    return url.replace(str(urlsplit(url).port), str(port))


# --- the scene -------------------------------------------------------------------------------------------------------


def clone(place: Path, here: bool) -> None:
    """HEAD of this clone; with `here`, the working tree, uncommitted and untracked files included."""
    if not here:
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(place)], check=True)
        return
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (source := ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place / name)


@contextlib.contextmanager
def at_most(minutes: float) -> Iterator[None]:
    def too_long(_signal: int, _frame: object) -> None:
        raise Unavailable(f"it took longer than {minutes:g} minutes")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def run(
    here: bool, fresh: bool, data_yaml: Path | None, minutes: float, keep: Path | None, params: Mapping[str, Any]
) -> None:
    """
    Raises:
        TextWrong: the README says otherwise than it is.
    """
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hardfirst-newcomer-")))
        folder.mkdir(parents=True, exist_ok=True)
        print(f"a clone of {'the working tree' if here else 'HEAD'} in {folder}/hardfirst", flush=True)
        clone(folder / "hardfirst", here)
        readme = (folder / "hardfirst" / "README.md").read_text(encoding="utf-8")
        guide = checked(readme, folder / "hardfirst")
        print(f"README.md: {len(fields(guide))} passages to follow", flush=True)
        dataset = everything_unlabelled(data_yaml or factory.write_dataset(folder / "factory", IMAGES, SEED))
        newcomer = Newcomer(guide, folder, dataset, params, fresh, stack)
        with at_most(minutes):
            newcomer.follow()
        newcomer.say(
            f"in the home folder there is now: {', '.join(sorted(one.name for one in newcomer.home.iterdir()))}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.newcomer", description=__doc__)
    parser.add_argument("--here", action="store_true", help="the working tree as it is, not HEAD")
    parser.add_argument("--fresh", action="store_true", help="install everything anew: an empty cache, an hour at most")
    parser.add_argument("--data", type=Path, help="data.yaml of a labelled YOLO dataset; default: generated images")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON: more or other extra params than the small")
    parser.add_argument("--keep", type=Path, help="a new folder for clone, home and logs, which stays")
    parser.add_argument("--minutes", type=float, help=f"at most; default {MINUTES:g}, with --fresh {FRESH_MINUTES:g}")
    given = parser.parse_args()
    if given.keep and given.keep.exists():
        parser.error(f"{given.keep} is there already: name a new folder")
    minutes = given.minutes or (FRESH_MINUTES if given.fresh else MINUTES)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, _interrupt)
    try:
        run(given.here, given.fresh, given.data, minutes, given.keep, {**SMALL, **given.params})
    except TextWrong as wrong:
        print(f"\nThe README is wrong, or hardfirst is:\n{wrong}", file=sys.stderr)
        return 1
    except HardfirstError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print("\nEverything went as the README says.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
