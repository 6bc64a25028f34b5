"""create_app: the composition root. Services, authentication, error mapping, and the two APIs."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from backend import admin, curve, doctor_api, metrics, ml_api, operations, report
from worker import queue, steps
from worker.boxes import LabelMap
from worker.errors import BadRequest, HardfirstError, NotAuthorised, QueueUnavailable
from worker.services import Services
from worker.settings import Settings, load_settings

log = logging.getLogger(__name__)

MAX_BODY = 64 * 1024 * 1024  # 10,000 tasks in one /predict are about 10 MB
NO_CDN: dict[str, Any] = {"docs_url": None, "redoc_url": None}  # these pages load their scripts from other hosts
OPEN_PATHS = frozenset({"/health"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})

Next = Callable[[Request], Awaitable[Response]]


def create_app(settings: Settings) -> FastAPI:
    """The backend: ASGI application for any server. Loads no torch, and starts without Redis or Label Studio."""
    services = Services(settings, "web")
    app = FastAPI(title="hardfirst", lifespan=_lifespan, openapi_url="/api/openapi.json", **NO_CDN)
    app.state.services = services
    app.include_router(ml_api.router)
    app.include_router(metrics.router)
    app.include_router(admin.router)
    app.include_router(curve.router)
    app.include_router(operations.router)
    app.include_router(doctor_api.router)
    app.include_router(report.router)
    app.middleware("http")(_guard)
    app.add_exception_handler(HardfirstError, _on_our_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_surprise)
    return app


def create_app_from_env() -> FastAPI:
    """For `uvicorn --factory backend.app:create_app_from_env`."""
    return create_app(load_settings())


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.store.migrate()
    stop = threading.Event()
    threading.Thread(target=_read_some_label_config, name="warm-up", daemon=True).start()
    try:
        queue.start_ticker(services.redis, stop, services.settings.reconcile_seconds)
        steps.start_sender(services.store, services.redis, stop)
    except QueueUnavailable as error:
        log.warning("%s", error)
    yield
    stop.set()
    services.close()


def _read_some_label_config() -> None:
    """The first parse imports half a second of modules; Label Studio gives /setup three, on a busy machine too."""
    LabelMap.from_config(
        '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="a"/>'
        "</RectangleLabels></View>"
    )


async def _guard(request: Request, call_next: Next) -> Response:
    """Before anything else: credentials, the page the request comes from, and the size of its body."""
    try:
        _check_credentials(request)
        _check_origin(request)
        _check_host(request)
        _check_size(request)
    except HardfirstError as error:
        return await _on_our_error(request, error)
    except ValueError as error:  # of urlsplit, over a Host or an Origin that is no address
        return await _on_our_error(request, BadRequest(f"the request's headers are not valid: {error}"))
    response = await call_next(request)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("X-Frame-Options", "SAMEORIGIN")
    return response


def _check_credentials(request: Request) -> None:
    settings: Settings = request.app.state.services.settings
    if not settings.user or request.url.path in OPEN_PATHS:
        return
    given = _basic_pair(request.headers.get("authorization", ""))
    wanted = f"{settings.user}:{settings.password.get_secret_value()}"
    if not secrets.compare_digest(given.encode(), wanted.encode()):
        raise NotAuthorised


def _basic_pair(header: str) -> str:
    kind, _, value = header.partition(" ")
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _check_host(request: Request) -> None:
    """A name that leads here only since its owner said so is refused to browsers (DNS rebinding), unless they log in.

    Addresses cannot be rebound, and Label Studio's server is no browser.
    """
    settings: Settings = request.app.state.services.settings
    is_browser = "origin" in request.headers or "mozilla" in request.headers.get("user-agent", "").lower()
    name = (urlsplit(f"//{request.headers.get('host', '')}").hostname or "").lower()
    ours = {"localhost", settings.host.lower(), (urlsplit(settings.url).hostname or "").lower()}
    if request.url.path in OPEN_PATHS or not is_browser or settings.user:
        return
    if name in ours or name.endswith(".localhost") or _is_address(name):
        return
    raise BadRequest(f"{name[:100]!r} is not known as this backend's name. Set HARDFIRST_URL to its address")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_origin(request: Request) -> None:
    """A page of another site may not make a visitor's browser change things. Label Studio's server sends no Origin."""
    if request.method in READING:
        return
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") or (
        origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    ):
        raise BadRequest(f"a page of {origin or 'another site'} may not send this; use hardfirst's own page")


def _check_size(request: Request) -> None:
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY:
        raise BadRequest(f"the body says it has {length[:20]} bytes; at most {MAX_BODY} are read")
    if request.method not in READING and "transfer-encoding" in request.headers:
        raise BadRequest("send a Content-Length: bodies of unknown size are not read")


async def _on_our_error(_request: Request, error: Exception) -> JSONResponse:
    status = error.status if isinstance(error, HardfirstError) else 500
    headers = {"WWW-Authenticate": 'Basic realm="hardfirst"'} if status == 401 else None
    return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status, headers)


async def _on_invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    sentences = [_sentence(problem) for problem in error.errors()[:5]]
    return JSONResponse({"error": "BadRequest", "detail": "; ".join(sentences)}, 422)


def _sentence(problem: dict[str, object]) -> str:
    where = ".".join(str(part) for part in problem.get("loc", ()) if part != "body")  # type: ignore[attr-defined]
    return f"{where or 'the body'}: {problem.get('msg')}"


async def _on_http_error(_request: Request, error: Exception) -> JSONResponse:
    """The framework's own: no such address, another method, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    name = "NotFound" if error.status_code == 404 else "BadRequest"
    return JSONResponse({"error": name, "detail": str(error.detail)}, error.status_code, error.headers)


async def _on_surprise(request: Request, error: Exception) -> JSONResponse:
    """Never a traceback to a client; it is in our log."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    detail = "an unexpected error; the backend's log has it"
    return JSONResponse({"error": "InternalError", "detail": detail}, 500)
