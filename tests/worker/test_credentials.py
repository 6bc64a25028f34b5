"""Tokens that say what they are, headers that are renewed in time, and the token that came with /setup."""

from __future__ import annotations

import base64
import json
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from worker import credentials
from worker.credentials import Header, Kind, SetupToken, Token, kind_of, lifetime, refusal, seconds_left
from worker.errors import CredentialsMissing, LabelStudioUnavailable


def jwt(*, signed: bool = True, **claims: Any) -> str:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJh.{body}" + (".c2ln" if signed else "")


PERSONAL = jwt(token_type="refresh", exp=time.time() + 1e9)


# --- what a token says of itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("0123456789abcdef", Kind.LEGACY),
        ("with.a-dot", Kind.LEGACY),
        (PERSONAL, Kind.PERSONAL),
        (jwt(token_type="refresh", signed=False), Kind.CUT),  # as Label Studio's list of tokens shows it
        (PERSONAL[:60], Kind.CUT),
        (PERSONAL.partition(".")[0], Kind.CUT),
        (jwt(token_type="access"), Kind.SHORT_LIVED),
        ("a.%%%.c", Kind.PERSONAL),
    ],
)
def test_a_token_is_of_a_kind(token: str, kind: Kind) -> None:
    assert kind_of(token) is kind


def test_a_personal_access_token_says_itself_when_it_ends() -> None:
    assert seconds_left(jwt(exp=time.time() + 864)) == pytest.approx(864, abs=60)
    assert seconds_left(jwt(exp=time.time() - 864)) == pytest.approx(-864, abs=60)
    for silent in (jwt(), jwt(exp=None), jwt(exp="soon"), "a.%%%.c", "a.b.c", "a.bnVsbA.c", "0123456789abcdef"):
        assert seconds_left(silent) is None


def test_a_life_is_told_by_the_token_alone_whatever_the_clock_here_says() -> None:
    assert lifetime(jwt(iat=1000, exp=1300)) == 300
    assert lifetime(jwt(iat=1300, exp=1000)) == 0
    assert lifetime(jwt(exp=1300)) == credentials.LIFETIME
    assert lifetime("no-jwt") == credentials.LIFETIME


@pytest.mark.parametrize(
    ("token", "detail", "why"),
    [
        ("0123", '{"detail":"Invalid token."}', "the legacy token was reset, or is not this server's"),
        ("0123", "legacy token authentication has been disabled for this organization", "and those are off there"),
        (PERSONAL, '{"detail":"Token is blacklisted"}', "the personal access token was revoked"),
        (PERSONAL, '{"detail":"Token is invalid or expired"}', "the personal access token is damaged"),
        (jwt(exp=1), "Token is invalid or expired", "the personal access token has expired"),
        (jwt(token_type="refresh", signed=False), "", "without its end"),
        (PERSONAL[:60], "", "without its end"),
        (jwt(token_type="access"), "", "an access token of a few minutes"),
    ],
)
def test_a_refusal_says_why_what_to_do_and_not_the_token(token: str, detail: str, why: str) -> None:
    told = str(refusal("http://ls:8080", Token(token), detail))
    assert told.startswith("Label Studio at http://ls:8080 does not accept LABEL_STUDIO_API_KEY: ")
    assert why in told
    assert told.endswith(credentials.TAKE_ONE)
    assert token not in told + repr(Token(token))
    off = str(refusal("http://ls:8080", Token(PERSONAL), "", was_renewed=True))
    assert "personal access tokens are off there" in off


# --- the header -------------------------------------------------------------------------------------------------------


class Renewals:
    """Counts access tokens, each valid for `seconds`."""

    def __init__(self, seconds: float = 300) -> None:
        self.count, self.seconds = 0, seconds

    def __call__(self, token: Token) -> str:
        self.count += 1
        time.sleep(0.02)  # others arrive meanwhile
        return jwt(iat=1000, exp=1000 + self.seconds, number=self.count)


def test_a_legacy_token_is_sent_as_it_is_and_none_is_an_error() -> None:
    renewals = Renewals()
    assert Header(lambda: Token("0123"), renewals).get() == "Token 0123"
    assert Header(lambda: Token("0123"), renewals).get(refused="Token 0123") == "Token 0123"
    assert renewals.count == 0
    with pytest.raises(CredentialsMissing, match="set LABEL_STUDIO_API_KEY"):
        Header(lambda: None, renewals).get()


def test_an_access_token_is_made_once_and_anew_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(credentials.time, "monotonic", lambda: clock[0])
    renewals = Renewals(seconds=300)
    header = Header(lambda: Token(PERSONAL), renewals)
    first = header.get()
    assert first.startswith("Bearer eyJh.")
    clock[0] += 239
    assert header.get() == first
    clock[0] += 1  # four fifths of its life
    second = header.get()
    assert second != first
    assert renewals.count == 2


def test_a_refused_access_token_is_renewed_once_by_however_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    renewals = Renewals()
    header = Header(lambda: Token(PERSONAL), renewals)
    first = header.get()
    barrier = threading.Barrier(8)

    def refused(_: int) -> str:
        barrier.wait()
        return header.get(refused=first)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(refused, range(8)))
    assert renewals.count == 2
    assert found == {header.get()} != {first}


def test_another_token_is_used_from_the_next_request_on() -> None:
    given = [PERSONAL]
    header = Header(lambda: Token(given[0]), lambda token: f"of-{token.value[-4:]}")
    assert header.get() == f"Bearer of-{PERSONAL[-4:]}"
    given[0] = jwt(token_type="refresh", exp=time.time() + 1e9, jti="another") + "XYZW"
    assert header.get() == "Bearer of-XYZW"
    given[0] = "0123"
    assert header.get() == "Token 0123"


# --- the token that came with /setup ----------------------------------------------------------------------------------


class Asked:
    """Accepts these tokens, and remembers which it was asked about."""

    def __init__(self, *good: str) -> None:
        self.good, self.tokens = set(good), list[str]()

    def __call__(self, token: Token) -> bool:
        self.tokens.append(token.value)
        return token.value in self.good


@pytest.fixture
def setup_token(tmp_path: Path) -> SetupToken:
    return SetupToken(tmp_path / "data" / "label-studio-token")


def test_a_token_that_works_is_kept_for_its_owner_alone(setup_token: SetupToken) -> None:
    ask = Asked("good")
    assert setup_token.get() is None
    assert setup_token.offer("good", ask)
    kept = setup_token.get()
    assert kept is not None
    assert (kept.value, kept.name) == ("good", credentials.SENT_WITH_SETUP)
    assert stat.S_IMODE(setup_token.file.stat().st_mode) == 0o600
    assert [one.name for one in setup_token.file.parent.iterdir()] == ["label-studio-token"]
    assert not setup_token.offer("good", ask)
    assert ask.tokens == ["good"]
    assert SetupToken(setup_token.file).get() == kept  # another process of this folder


def test_a_refused_token_is_tried_once(setup_token: SetupToken) -> None:
    ask = Asked()
    assert not setup_token.offer("off", ask)
    assert not setup_token.offer("off", ask)
    assert ask.tokens == ["off"]
    assert setup_token.get() is None
    assert setup_token.was_refused()
    assert "off" not in json.loads(setup_token.file.read_text())["refused"]


def test_another_users_token_replaces_one_that_no_longer_works_only(setup_token: SetupToken) -> None:
    ask = Asked("ann", "bob")
    setup_token.offer("ann", ask)
    assert not setup_token.offer("bob", ask)
    assert setup_token.get() == Token("ann", credentials.SENT_WITH_SETUP)
    ask.good = {"bob"}
    assert setup_token.offer("bob", ask)
    assert setup_token.get() == Token("bob", credentials.SENT_WITH_SETUP)
    assert not setup_token.was_refused()


def test_label_studio_away_decides_nothing(setup_token: SetupToken) -> None:
    def away(token: Token) -> bool:
        raise LabelStudioUnavailable

    with pytest.raises(LabelStudioUnavailable):
        setup_token.offer("good", away)
    assert setup_token.offer("good", Asked("good"))


@pytest.mark.parametrize("value", ["", "two words", "line\nbreak", "ключ", "x" * 8193])
def test_what_no_token_can_be_is_not_tried(setup_token: SetupToken, value: str) -> None:
    ask = Asked(value)
    assert not setup_token.offer(value, ask)
    assert ask.tokens == []


def test_a_file_that_somebody_spoiled_holds_no_token(setup_token: SetupToken) -> None:
    setup_token.file.parent.mkdir()
    for content in ("", "[]", "{", '{"token": 5, "refused": 7}'):
        setup_token.file.write_text(content)
        assert setup_token.get() is None
    assert setup_token.offer("good", Asked("good"))
