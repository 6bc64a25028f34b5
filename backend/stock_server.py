"""The same model under label-studio-ml's own server: for who serves other models with it already.

    python -m backend.stock_server --port 9090             Flask's own server: to try it
    <any WSGI server> "backend.stock_server:create_app()"  one process: the model is loaded in it

Its routes answer from our store, as those of `hardfirst web` do: /health, /setup, /predict, /webhook, /versions. What
is not stored is predicted in this process (it loads torch) instead of by a worker; training, scoring and publishing
are still the workers' (`hardfirst worker`), and there is no admin page. label-studio-ml 1.0.9 would keep one global
model for all projects, answer /setup with "INITIAL" (so that Label Studio asked for each prediction again and again)
and train in a subprocess of its own: `Manager` takes the place of what does that. HARDFIRST_USER and
HARDFIRST_PASSWORD guard it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, ParamSpec, TypeVar

from flask import Flask, Response, request
from label_studio_ml import api
from label_studio_ml.exceptions import AnswerException
from label_studio_ml.model import LabelStudioMLManager, ModelWrapper
from pydantic import ValidationError

from backend import ml_api
from backend.payloads import PredictRequest, SetupRequest, WebhookRequest
from worker import queue, steps
from worker.errors import BadRequest, Conflict, HardfirstError, NotAuthorised, QueueUnavailable
from worker.model import HardfirstModel
from worker.rounds import served_version
from worker.scoring import score_alone
from worker.services import Services
from worker.store import get_project, open_round_of

Given = ParamSpec("Given")
Result = TypeVar("Result")


def _in_a_sentence(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Errors as label-studio-ml's server answers them, without the traceback that it adds."""

    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _answer(BadRequest(f"{where}: {first['msg']}")) from error
        except HardfirstError as error:
            raise _answer(error) from error

    return wrapped


def _answer(error: HardfirstError) -> AnswerException:
    return AnswerException(error.status, str(error), {"traceback": ""})


class Manager(LabelStudioMLManager):  # type: ignore[misc]  # label_studio_ml is untyped
    """What label-studio-ml's routes call, answered from our store."""

    own: ClassVar[Services]

    @classmethod
    @_in_a_sentence
    def fetch(cls, project: Any = None, label_config: Any = None, force_reload: bool = False, **kwargs: Any) -> Any:
        """/setup."""
        answer = ml_api.connect(SetupRequest.model_validate(request.get_json()), request.host_url, cls.own)
        return ModelWrapper(model=cls._model(label_config), model_version=answer.model_version)

    @classmethod
    @_in_a_sentence
    def predict(cls, tasks: Any, project: Any = None, label_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """/predict."""
        body = PredictRequest.model_validate(request.get_json())
        with cls.own.store.read() as connection:
            version = served_version(get_project(connection, body.project))
        answer = ml_api.answer_predict(body, cls.own, _ask_here)
        return answer.model_dump()["results"], ModelWrapper(model=cls._model(label_config), model_version=version)

    @classmethod
    @_in_a_sentence
    def webhook(cls, event: str, data: Mapping[str, Any]) -> dict[str, str]:
        """/webhook."""
        body = WebhookRequest.model_validate({"action": event, **data})
        return ml_api.webhook(body, cls.own).model_dump()

    @classmethod
    @_in_a_sentence
    def is_training(cls, project: Any) -> dict[str, bool]:
        """/is_training."""
        project_id = PredictRequest.model_validate({"tasks": [], "project": project}).project
        with cls.own.store.read() as connection:
            return {"is_training": open_round_of(connection, project_id) is not None}

    @classmethod
    @_in_a_sentence
    def train(cls, *args: Any, **kwargs: Any) -> None:
        """/train, which Label Studio has not called since 1.4.1.

        Raises:
            AnswerException: 409, always.
        """
        raise Conflict("rounds train by themselves, when enough is labelled. To begin one now: Start training")

    @classmethod
    def _get_models_from_workdir(cls, project: Any) -> Iterable[str]:
        """/versions."""
        return ml_api.versions(cls.own)["versions"]

    @classmethod
    def _model(cls, label_config: Any) -> HardfirstModel:
        return HardfirstModel(label_config, services=cls.own)


def _ask_here(
    own: Services, project_id: int, images: Sequence[tuple[int, str]], seconds: float
) -> list[dict[str, Any]]:
    """By the model in this process; one request at a time, as the network takes all cores.

    Raises:
        TimeoutError: others kept the model busy for so many seconds.
    """
    if not _one_at_a_time.acquire(timeout=seconds):
        raise TimeoutError(f"the model was busy with other requests for {seconds:.0f} s")
    try:
        return score_alone(own, project_id, images)
    finally:
        _one_at_a_time.release()


_one_at_a_time = threading.Lock()


def create_app(services: Services | None = None) -> Flask:
    """label-studio-ml's WSGI application over our store. Once per process: its application is a global.

    Raises:
        SettingsInvalid: a variable of the environment has a value that cannot be right.
    """
    from worker.services import from_environment

    os.environ.setdefault("LABEL_STUDIO_ML_BACKEND_V2", "true")
    Manager.own = services or from_environment("web")
    Manager.own.store.migrate()
    api._manager = Manager()
    app: Flask = api.init_app(HardfirstModel)
    app.register_error_handler(AnswerException, lambda error: error.answer)
    app.before_request(_check_credentials)
    _start_helpers(Manager.own)
    return app


def _start_helpers(own: Services) -> None:
    """As `hardfirst web` does: the clock of reconcile, and the sender of steps that wait for Redis."""
    stop = threading.Event()
    try:
        queue.start_ticker(own.redis, stop, own.settings.reconcile_seconds)
        steps.start_sender(own.store, own.redis, stop)
    except QueueUnavailable as error:
        ml_api.log.warning("%s", error)


def _check_credentials() -> Response | None:
    settings = Manager.own.settings
    if not settings.user or request.path in ("/health", "/"):
        return None
    given = request.authorization
    pair = f"{given.username}:{given.password}" if given is not None and given.type == "basic" else ""
    wanted = f"{settings.user}:{settings.password.get_secret_value()}"
    if secrets.compare_digest(pair.encode(), wanted.encode()):
        return None
    refused: Response = _answer(NotAuthorised()).answer
    refused.headers["WWW-Authenticate"] = 'Basic realm="hardfirst"'
    return refused


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="backend.stock_server", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9090)
    given = parser.parse_args(arguments)
    create_app().run(host=given.host, port=given.port, debug=False, threaded=True)


if __name__ == "__main__":
    main()
