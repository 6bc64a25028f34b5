"""Access tokens of Label Studio: what kind one is, what it says of itself, the header made of it, where it is kept.

A legacy token is sent as it is. A personal access token is a refresh token (a JWT that lives for years): it is changed
into an access token of minutes, which is renewed before it ends. Label Studio keeps no count of access tokens, so each
process makes its own; between the threads of one, a lock lets one renew while the others wait for it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from worker.errors import CredentialsMissing

VARIABLE = "LABEL_STUDIO_API_KEY"
SENT_WITH_SETUP = "the token that Label Studio sent with /setup"
TAKE_ONE = (
    "Take a new one (Label Studio: Account & Settings -> Personal Access Token; revoke the old one first), set "
    "LABEL_STUDIO_API_KEY to it, in .env or the environment, and start hardfirst again: rounds go on where "
    "they wait"
)
LIFETIME = 60.0  # seconds an access token is used that does not say how long it is valid
RENEW_AT = 0.8  # of its life: a request under way must not outlive it
MAX_TOKEN = 8192  # characters; a personal access token has some 250
_JWT_BEGINS = "eyJ"  # {" in base64, as every JWT begins
_REMEMBERED = 20  # refused tokens: every user who connects a project sends their own


class Kind(StrEnum):
    LEGACY = "legacy token"
    PERSONAL = "personal access token"
    SHORT_LIVED = "access token of a few minutes"
    CUT = "personal access token without its last part"


@dataclass(frozen=True)
class Token:
    """A configured token. `name`: where it comes from, in words."""

    value: str
    name: str = VARIABLE

    def __repr__(self) -> str:  # a token is for no log
        return f"Token(name={self.name!r})"


def claims_of(token: str) -> dict[str, Any]:
    """What a JWT says of itself, unverified; {} of anything else."""
    parts = token.split(".")
    if len(parts) not in (2, 3):
        return {}
    try:
        found = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def kind_of(token: str) -> Kind:
    claims = claims_of(token)
    if token.count(".") < 2 and (token.startswith(_JWT_BEGINS) or "token_type" in claims):
        return Kind.CUT
    if token.count(".") != 2:
        return Kind.LEGACY  # hexadecimal
    return Kind.SHORT_LIVED if claims.get("token_type") == "access" else Kind.PERSONAL


def seconds_left(token: str) -> float | None:
    """Until a token ends, as it says itself; None where it does not."""
    try:
        return float(claims_of(token)["exp"]) - time.time()
    except (KeyError, TypeError, ValueError):
        return None


def refusal(url: str, token: Token, detail: str = "", *, was_renewed: bool = False) -> CredentialsMissing:
    """Why Label Studio does not take a token, and what to do, in words that are the same for every request.

    Args:
        detail: what Label Studio said; only known words of it are believed.
        was_renewed: it gave an access token for the personal one, and then refused that.
    """
    kind = kind_of(token.value)
    if kind is Kind.PERSONAL and was_renewed:
        why = "personal access tokens are off there, or its user is gone"
    elif kind is Kind.PERSONAL:
        why = _of_personal(detail, seconds_left(token.value))
    elif kind is Kind.CUT:
        why = "it is a personal access token without its end: Label Studio's list of tokens shows them cut off"
    elif kind is Kind.SHORT_LIVED:
        why = "it is an access token of a few minutes, not a personal access token"
    elif "legacy token authentication has been disabled" in detail:
        why = "it is a legacy token, and those are off there"
    else:
        why = "the legacy token was reset, or is not this server's"
    return CredentialsMissing(f"Label Studio at {url} does not accept {token.name}: {why}. {TAKE_ONE}")


def _of_personal(detail: str, left: float | None) -> str:
    if left is not None and left <= 0:
        return "the personal access token has expired"
    if "blacklisted" in detail:
        return "the personal access token was revoked"
    return "the personal access token is damaged, or not this server's, or Label Studio has another SECRET_KEY since"


class Header:
    """The Authorization header of whatever token is configured; safe between threads."""

    def __init__(self, find: Callable[[], Token | None], renew: Callable[[Token], str]) -> None:
        """
        Args:
            find: the token to use now.
            renew: a personal access token -> an access token; may raise.
        """
        self._find, self._renew = find, renew
        self._lock = threading.Lock()
        self._made_of = self._made = ""
        self._renew_at = 0.0

    def get(self, refused: str = "") -> str:
        """The header to send; of a personal access token, one that is valid for a while yet.

        Args:
            refused: a header that Label Studio has just refused: the same one is not made of the same access token.

        Raises:
            CredentialsMissing: no token is configured.
        """
        token = self._find()
        if token is None:
            raise CredentialsMissing
        if kind_of(token.value) in (Kind.LEGACY, Kind.CUT):
            return f"Token {token.value}"
        with self._lock:  # of many threads that find it stale, the first renews it
            stale = self._made_of != token.value or time.monotonic() >= self._renew_at
            if stale or self._made == refused:
                asked_at = time.monotonic()
                access = self._renew(token)
                self._made_of, self._made = token.value, f"Bearer {access}"
                self._renew_at = asked_at + RENEW_AT * lifetime(access)
            return self._made


def lifetime(access: str) -> float:
    """Seconds an access token is valid, by its own claims alone: clocks of two machines may differ by minutes."""
    claims = claims_of(access)
    try:
        return max(float(claims["exp"]) - float(claims["iat"]), 0.0)
    except (KeyError, TypeError, ValueError):
        return LIFETIME


class SetupToken:
    """The token that Label Studio sends with /setup, for a deployment that names none.

    It is tried once. Accepted, it is kept in a file that the owner of the data folder alone may read; refused (Label
    Studio sends legacy tokens even where they are off), a digest of it is kept, so that nobody tries it again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()

    def get(self) -> Token | None:
        value = self._read().get("token")
        return Token(value, SENT_WITH_SETUP) if isinstance(value, str) and value else None

    def was_refused(self) -> bool:
        """Whether all there is to say is that Label Studio refused what it had sent."""
        return self.get() is None and bool(self._refused())

    def offer(self, value: str, is_accepted: Callable[[Token], bool]) -> bool:
        """Try a token that came with /setup, unless one is kept that works, or it was tried before.

        Args:
            is_accepted: asks Label Studio; raises where it does not answer, and then the next /setup tries again.

        Returns:
            Whether it was kept now.
        """
        with self._lock:
            kept, refused = self.get(), self._refused()
            if not self.is_news(value) or (kept is not None and is_accepted(kept)):
                return False
            if is_accepted(Token(value, SENT_WITH_SETUP)):
                self._write({"token": value, "refused": refused})
                return True
            self._write({"token": kept.value if kept else "", "refused": [*refused, _digest(value)][-_REMEMBERED:]})
            return False

    def is_news(self, value: str) -> bool:
        """Whether it is a token that was not tried yet."""
        kept = self.get()
        is_sane = 0 < len(value) <= MAX_TOKEN and value.isascii() and value.isprintable() and " " not in value
        return is_sane and (kept is None or kept.value != value) and _digest(value) not in self._refused()

    def _refused(self) -> list[str]:
        found = self._read().get("refused")
        return [str(one) for one in found] if isinstance(found, list) else []

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text())
        except (OSError, ValueError):  # nobody has sent one yet, or somebody wrote into the file
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, content: dict[str, Any]) -> None:
        """mkstemp's file is its owner's alone, and is there as a whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=self.file.parent, prefix=f".{self.file.name}-")
        with os.fdopen(handle, "w") as written:
            json.dump(content, written)
        os.replace(part, self.file)


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]
