"""The only file that talks to Label Studio. Utility and rank become Label Studio's `score` here, and nowhere else.

The requests are plain JSON: the bulk import, the webhook and the tab are not typed in the SDK, and its client renews an
access token only after it has ended, by this machine's clock. What tokens are is worker.credentials' business.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from worker.credentials import Header, SetupToken, Token, refusal
from worker.errors import (
    CredentialsMissing,
    LabelStudioRefused,
    LabelStudioUnavailable,
    NotFound,
    PublishIncomplete,
)

log = logging.getLogger(__name__)

WEBHOOK_ACTIONS = (
    "ANNOTATION_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_CREATED",
    "ANNOTATIONS_DELETED",
    "TASKS_CREATED",
    "TASKS_DELETED",
)
SAMPLING = "Uncertainty sampling"
VIEW_TITLE = "hardfirst: next batch"
PENDING_VERSION = "hardfirst-pending"
PAGE = 1000
IMPORT_CHUNK = 10_000  # each import request recounts all its tasks: few and large
IMPORT_BYTES = 100_000_000  # Label Studio refuses bodies above 250 MB, and holds several copies of one in memory
SETUP_PATIENCE = 30.0  # Label Studio calls our /health and /setup, twice, before it answers
QUICK, SLOW = 10.0, 900.0  # seconds; Label Studio deletes and imports synchronously, minutes for a large pool


def published_score(rank: int | None, utility: float, batch_size: int) -> float:
    """Label Studio's score, served lowest first: a position, so that nothing overtakes the batch.

    Args:
        rank: position in the batch from 0, None outside of it.
        utility: 0..1, high = label sooner; orders what is not in the batch.
        batch_size: K, the tasks in the batch.

    Returns:
        rank / (2 K), below 0.5, for the batch; 0.5 + 0.5 (1 - utility) for every other task.
    """
    if rank is not None:
        return rank / (2 * max(batch_size, 1))
    return 0.5 + 0.5 * (1.0 - min(max(utility, 0.0), 1.0))


def model_version(round_number: int) -> str:
    """Zero-padded: the Data Manager's filter looks for substrings, so that no version may be part of another."""
    return f"al-{round_number:06d}"


def prediction(
    task_id: int,
    regions: str | None,
    score: float | None,
    version: str,
    holdout: bool,
    shows: Callable[[Mapping[str, Any]], bool] | None = None,
) -> dict[str, Any]:
    """One prediction as Label Studio's bulk import takes it.

    Args:
        shows: whether a region fits today's label config; for one that does not, the import drops the prediction.
    """
    result = [] if holdout or not regions else json.loads(regions)
    result = result if shows is None else [region for region in result if shows(region)]
    return {"task": task_id, "result": result, "score": 1.0 if score is None else score, "model_version": version}


def is_our_version(version: str) -> bool:
    return version == PENDING_VERSION or re.fullmatch(r"al-\d{6,}", version) is not None


class LabelStudio:
    """What a project needs from Label Studio's API.

    Every method raises CredentialsMissing without a token, LabelStudioUnavailable when Label Studio does not answer
    (connection, timeout, 5xx) and LabelStudioRefused when it answers 4xx, NotFound for 404.
    """

    def __init__(self, url: str, api_key: str, setup_token: SetupToken | None = None) -> None:
        """
        Args:
            api_key: a legacy token or a personal access token.
            setup_token: what Label Studio sent with /setup, for when there is no `api_key`.
        """
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._setup_token = setup_token
        self._offering = threading.Lock()
        self._header = Header(self.token, self._access_token)
        self._http = httpx.Client(base_url=self.url, timeout=httpx.Timeout(QUICK, connect=5.0))

    def close(self) -> None:
        self._http.close()

    def token(self) -> Token | None:
        """What is configured; else what Label Studio sent with /setup, if it works; None without either."""
        if self._api_key:
            return Token(self._api_key)
        return None if self._setup_token is None else self._setup_token.get()

    def setup_token_was_refused(self) -> bool:
        """Whether no token is configured, and the one that came with /setup did not work."""
        return self.token() is None and self._setup_token is not None and self._setup_token.was_refused()

    def auth_headers(self) -> dict[str, str]:
        """The Authorization header, of a token that is valid now."""
        return {"Authorization": self._header.get()}

    def offer_setup_token(self, value: str) -> None:
        """Try a token that came with /setup, once, where none is configured. Returns at once: Label Studio waits."""
        if self._api_key or self._setup_token is None or not self._setup_token.is_news(value):
            return
        if self._offering.acquire(blocking=False):  # Label Studio calls /setup twice
            threading.Thread(target=self._try_setup_token, args=(value,), daemon=True, name="setup-token").start()

    def _try_setup_token(self, value: str) -> None:
        assert self._setup_token is not None
        try:
            if self._setup_token.offer(value, self._accepts):
                log.info("the token that Label Studio sent with /setup works: it is kept")
        except (LabelStudioUnavailable, OSError) as error:
            log.warning("the token that came with /setup was not tried: %s", error)
        finally:
            self._offering.release()

    def _accepts(self, token: Token) -> bool:
        """Whether Label Studio takes this token, whatever is configured."""
        try:
            response = self._send(
                "GET", "/api/current-user/whoami", {"Authorization": Header(lambda: token, self._access_token).get()}
            )
        except CredentialsMissing:
            return False
        if response.status_code in (401, 403):
            return False
        _checked(response, "GET", "/api/current-user/whoami")
        return True

    def _access_token(self, token: Token) -> str:
        """A new access token for a personal one."""
        path = "/api/token/refresh/"
        response = self._send("POST", path, {}, json={"refresh": token.value})
        if response.status_code in (400, 401, 403):
            raise refusal(self.url, token, response.text)
        found = _checked(response, "POST", path)
        if not isinstance(found, dict) or not isinstance(found.get("access"), str):
            raise LabelStudioUnavailable(f"POST {path} gave no access token: is {self.url} Label Studio?")
        return str(found["access"])

    def _request(
        self,
        method: str,
        path: str,
        *,
        timeout: float = QUICK,
        extra_headers: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        response = self._answer(method, path, dict(extra_headers or {}), timeout, **kwargs)
        return _checked(response, method, path)

    def _answer(
        self, method: str, path: str, others: Mapping[str, str], timeout: float = QUICK, **kwargs: Any
    ) -> httpx.Response:
        """With the token; where Label Studio refuses an access token, once more with a new one."""
        header = self._header.get()
        response = self._send(method, path, {"Authorization": header, **others}, timeout, **kwargs)
        if response.status_code == 401:  # nothing was done: with a header made anew it may be
            again = self._header.get(refused=header)
            if again != header:
                response = self._send(method, path, {"Authorization": again, **others}, timeout, **kwargs)
        if response.status_code == 401 and (token := self.token()) is not None:
            raise refusal(self.url, token, response.text, was_renewed=header.startswith("Bearer "))
        return response

    def _send(
        self, method: str, path: str, headers: Mapping[str, str], timeout: float = QUICK, **kwargs: Any
    ) -> httpx.Response:
        try:
            return self._http.request(
                method, path, headers=dict(headers), timeout=httpx.Timeout(timeout, connect=5.0), **kwargs
            )
        except (httpx.LocalProtocolError, UnicodeEncodeError) as error:  # a token that no header can carry
            raise CredentialsMissing(
                "LABEL_STUDIO_API_KEY holds characters that no token has. Copy it again, and it alone"
            ) from error
        except httpx.HTTPError as error:
            raise LabelStudioUnavailable(
                f"Label Studio at {self.url} does not answer ({type(error).__name__}). Start it, or correct "
                "LABEL_STUDIO_URL; rounds wait until it is back."
            ) from error

    def server_version(self) -> str:
        """Which Label Studio answers, asked without a token; empty where it does not say."""
        try:
            response = self._http.get("/api/version/")
        except httpx.HTTPError as error:
            raise LabelStudioUnavailable(
                f"Label Studio at {self.url} does not answer: {str(error) or type(error).__name__}"
            ) from error
        if response.status_code == 404:
            raise LabelStudioUnavailable(f"what answers at {self.url} is not Label Studio (404 for /api/version/)")
        found = _checked(response, "GET", "/api/version/")
        return str(found.get("release") or "") if isinstance(found, dict) else ""

    def whoami(self) -> dict[str, Any]:
        """The token's user: id, email, active_organization and more."""
        return dict(self._request("GET", "/api/current-user/whoami") or {})

    def check_token(self) -> None:
        """Return if Label Studio answers and takes the token, whatever it says."""
        response = self._answer("GET", "/api/current-user/whoami", {})
        if response.status_code != 200:
            _checked(response, "GET", "/api/current-user/whoami")

    def project(self, project_id: int) -> dict[str, Any]:
        try:
            return dict(self._request("GET", f"/api/projects/{project_id}/"))
        except NotFound as gone:
            raise NotFound(f"Label Studio no longer has project {project_id}, or its token may not see it") from gone

    def publish_version(self, project_id: int, version: str) -> None:
        """Make `version` the one whose scores order the label stream and whose boxes are drawn."""
        body = {"model_version": version, "show_collab_predictions": True, "sampling": SAMPLING}
        self._request("PATCH", f"/api/projects/{project_id}/", json=body)

    def tasks(
        self, project_id: int, *, labelled_only: bool = False, include: str = "id,data"
    ) -> Iterator[list[dict[str, Any]]]:
        """Pages of tasks with the fields of `include`; with `labelled_only`, the annotated ones with all fields."""
        params: dict[str, Any] = {"project": project_id, "page_size": PAGE}
        if labelled_only:
            params |= {"fields": "all", "query": json.dumps({"filters": _HAS_ANNOTATIONS})}
        else:
            params["include"] = include
        page = 1
        while True:
            try:
                body = self._request("GET", "/api/tasks", params={**params, "page": page}, timeout=SLOW)
            except NotFound:  # the page after the last one, when the count is a multiple of the page size
                return
            found = body["tasks"] if isinstance(body, dict) else body
            if not found:
                return
            yield found
            if len(found) < PAGE:
                return
            page += 1

    def task(self, task_id: int) -> dict[str, Any]:
        """One task with all its predictions and annotations. Looking at it locks and assigns nothing."""
        return dict(self._request("GET", f"/api/tasks/{task_id}/"))

    def first_tasks(self, project_id: int, version: str, count: int) -> list[dict[str, Any]]:
        """Up to `count` unlabelled tasks of a version with their predictions, as the Data Manager orders them.

        It orders by a task's average over all its predictions. Looking at it locks and assigns nothing.
        """
        filters = {"conjunction": "and", "items": [_has_version(version), _IS_UNLABELLED]}
        query = json.dumps({"filters": filters, "ordering": ["tasks:predictions_score"]})
        params = {"project": project_id, "fields": "all", "page_size": count, "page": 1, "query": query}
        body = self._request("GET", "/api/tasks", params=params, timeout=SLOW)
        return list(body["tasks"] if isinstance(body, dict) else body)

    def export(self, project_id: int) -> list[dict[str, Any]]:
        """All annotated tasks as Label Studio's JSON export gives them, skips included."""
        params = {"exportType": "JSON", "download_all_tasks": "false"}
        return list(self._request("GET", f"/api/projects/{project_id}/export", params=params, timeout=SLOW))

    def projects_titled(self, title: str) -> list[dict[str, Any]]:
        """Projects with exactly this title: id, title, label_config and more."""
        body = self._request("GET", "/api/projects/", params={"title": title, "page_size": PAGE})
        found = body["results"] if isinstance(body, dict) else body
        return [dict(one) for one in found if one.get("title") == title]

    def create_project(self, title: str, label_config: str) -> int:
        body = {"title": title, "label_config": label_config}
        return int(self._request("POST", "/api/projects/", json=body, timeout=SLOW)["id"])

    def upload_files(self, project_id: int, files: Sequence[tuple[str, bytes]]) -> list[str]:
        """Put files on Label Studio without tasks; the address of each, in order. It reads the whole request at once.

        Args:
            files: name and content; at most 100, together below 250 MB.
        """
        path = f"/api/projects/{project_id}/import"
        # every file under a field of its own: of several under one, Label Studio keeps the last
        fields = {f"f{number}": one for number, one in enumerate(files)}
        answer = self._request("POST", path, params={"commit_to_project": "false"}, files=fields, timeout=SLOW)
        ids = [int(one) for one in answer["file_upload_ids"]]
        params = {"ids": json.dumps(ids)}
        known = self._request("GET", f"/api/projects/{project_id}/file-uploads", params=params, timeout=SLOW)
        address_of = {int(one["id"]): _upload_address(one) for one in known}
        return [address_of[one] for one in ids]

    def uploads(self, project_id: int) -> dict[str, int | None]:
        """Address -> bytes of every file that the token's user has uploaded, with or without a task."""
        params = {"all": "true"}
        found = self._request("GET", f"/api/projects/{project_id}/file-uploads", params=params, timeout=SLOW)
        return {_upload_address(one): one.get("size") for one in found}

    def import_tasks(self, project_id: int, new: Sequence[Mapping[str, Any]]) -> None:
        """Make tasks. Every request recounts the project's tasks: many at a time."""
        self._request("POST", f"/api/projects/{project_id}/import", json=list(new), timeout=SLOW)

    def storages(self, project_id: int, kind: str) -> list[dict[str, Any]]:
        """The project's source storages of a kind: localfiles, s3, gcs, azure."""
        return [dict(one) for one in self._request("GET", f"/api/storages/{kind}", params={"project": project_id})]

    def versions(self, project_id: int) -> dict[str, int]:
        """Predictions per model version."""
        found = self._request("GET", f"/api/projects/{project_id}/model-versions/")
        return {str(name): int(count) for name, count in dict(found).items()}

    def delete_version(self, project_id: int, version: str) -> None:
        """Synchronous in Label Studio: 2,000 predictions take 8 s."""
        path = f"/api/projects/{project_id}/model-versions/"
        self._request("DELETE", path, json={"model_version": version}, timeout=SLOW)

    def import_predictions(self, project_id: int, predictions: Iterable[Mapping[str, Any]]) -> None:
        """All predictions of a version, in as few requests as possible: task, result, score, model_version each.

        Raises:
            PublishIncomplete: Label Studio answered 201 and kept fewer than it was sent.
        """
        path, headers = f"/api/projects/{project_id}/import/predictions", {"Content-Type": "application/json"}
        for version, count, body in _import_bodies(predictions):
            answer = self._request("POST", path, content=body, extra_headers=headers, timeout=SLOW)
            created = answer.get("created") if isinstance(answer, dict) else None
            if created != count:
                raise PublishIncomplete(
                    f"Label Studio kept {created} of {count} predictions of {version}; "
                    "the version published before stays. Was the label config changed in this minute?"
                )

    def own_webhook(
        self, project_id: int, webhook_url: str, headers: Mapping[str, str], adopted: int | None = None
    ) -> int:
        """Give the webhook that Label Studio registered for us its header and its actions; its id.

        Creates one only where there is none (Label Studio then adds no second one: same URL).

        Args:
            adopted: id of the one that was ours before. When the backend has moved, Label Studio leaves it at the old
                address: it is brought to the new one, or deleted where another is there already.
        """
        kept = self.mend_webhook(project_id, webhook_url, headers, adopted)
        if kept is not None:
            return kept
        body = {**_webhook_body(webhook_url, headers), "project": project_id}
        return int(self._request("POST", "/api/webhooks/", json=body)["id"])

    def mend_webhook(
        self, project_id: int, webhook_url: str, headers: Mapping[str, str], adopted: int | None = None
    ) -> int | None:
        """As `own_webhook`, but where there is none, none is made, and None returned."""
        every = [dict(hook) for hook in self._request("GET", "/api/webhooks/", params={"project": project_id})]
        to_us = [hook for hook in every if _address(hook.get("url", "")) == _address(webhook_url)]
        left_behind = [hook for hook in every if hook["id"] == adopted and hook not in to_us]
        if not to_us and not left_behind:
            return None
        ours = (to_us or left_behind)[0]
        # one that reaches us keeps its spelling: Label Studio compares letter by letter before it adds another
        wanted = _webhook_body(ours["url"] if to_us else webhook_url, headers)
        if wanted != {name: ours.get(name) for name in wanted} | {"actions": sorted(ours.get("actions") or [])}:
            self._request("PATCH", f"/api/webhooks/{ours['id']}/", json=wanted)
        if to_us and left_behind:
            self.delete_webhook(int(left_behind[0]["id"]))
        return int(ours["id"])

    def find_webhook_by_id(self, project_id: int, webhook_id: int | None) -> dict[str, Any] | None:
        found = self._request("GET", "/api/webhooks/", params={"project": project_id})
        return next((dict(hook) for hook in found if hook["id"] == webhook_id), None)

    def find_webhook(self, project_id: int, webhook_url: str) -> dict[str, Any] | None:
        return next(iter(self.webhooks_to(project_id, webhook_url)), None)

    def webhooks_to(self, project_id: int, webhook_url: str) -> list[dict[str, Any]]:
        """The project's webhooks with this address, as Label Studio lists them. They hold headers: not for logs."""
        found = self._request("GET", "/api/webhooks/", params={"project": project_id})
        wanted = _address(webhook_url)
        return [dict(hook) for hook in found if _address(hook.get("url", "")) == wanted]

    def delete_webhook(self, webhook_id: int) -> None:
        self._request("DELETE", f"/api/webhooks/{webhook_id}/")

    def own_backend(self, project_id: int, backend_url: str) -> dict[str, Any]:
        """The project's entry for this backend, with its extra_params. Label Studio calls /health and /setup for it.

        Raises:
            NotFound: Label Studio has no entry with this backend's address.
        """
        found = self._request("GET", "/api/ml", params={"project": project_id}, timeout=SETUP_PATIENCE)
        ours = next((dict(one) for one in found if _address(one.get("url", "")) == _address(backend_url)), None)
        if ours is None:
            raise NotFound(
                f"Label Studio's project {project_id} has no model with the address {backend_url} any more. "
                "Connect it again: Settings -> Model -> Connect Model"
            )
        return ours

    def save_extra_params(
        self, backend: Mapping[str, Any], extra_params: Mapping[str, Any], user: str, password: str
    ) -> None:
        """Write a project's settings where its people see them. Label Studio asks our /setup about them first.

        Args:
            backend: what `own_backend` gave.
            user, password: our own basic authentication, empty without; Label Studio gives its copy to nobody.

        Raises:
            LabelStudioRefused: Label Studio, or our own /setup, does not take them.
        """
        body = {"url": backend["url"], "project": backend["project"], "extra_params": dict(extra_params)}
        if user:
            body |= {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}
        self._request("PATCH", f"/api/ml/{backend['id']}", json=body, timeout=SETUP_PATIENCE)

    def show_batch_tab(self, project_id: int, version: str, view_id: int | None) -> int:
        """The Data Manager's tab with the batch in its order; its id."""
        body = {"project": project_id, "data": _view(version)}
        if view_id is not None:
            try:
                self._request("PATCH", f"/api/dm/views/{view_id}/", json=body)
                return view_id
            except NotFound:
                pass  # somebody closed the tab: make it again
        return int(self._request("POST", "/api/dm/views/", json=body)["id"])


def _webhook_body(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    return {
        "url": url,
        "send_payload": True,
        "send_for_all_actions": False,
        "is_active": True,
        "actions": sorted(WEBHOOK_ACTIONS),
        "headers": dict(headers),
    }


def _import_bodies(predictions: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, int, bytes]]:
    """(version of the first, how many, JSON array) of requests that are large, and not too large."""
    parts: list[bytes] = []
    size, version = 0, ""
    for one in predictions:
        part = json.dumps(one).encode()
        if parts and (len(parts) == IMPORT_CHUNK or size + len(part) > IMPORT_BYTES):
            yield version, len(parts), b"[" + b",".join(parts) + b"]"
            parts, size = [], 0
        if not parts:
            version = str(one["model_version"])
        parts.append(part)
        size += len(part)
    if parts:
        yield version, len(parts), b"[" + b",".join(parts) + b"]"


_HAS_ANNOTATIONS = {
    "conjunction": "or",
    "items": [
        {"filter": f"filter:tasks:{column}", "operator": "greater", "type": "Number", "value": 0}
        for column in ("total_annotations", "cancelled_annotations")
    ],
}


_IS_UNLABELLED = {"filter": "filter:tasks:total_annotations", "operator": "equal", "type": "Number", "value": 0}


def _has_version(version: str) -> dict[str, Any]:
    return {
        "filter": "filter:tasks:predictions_model_versions",
        "operator": "contains",
        "type": "List",
        "value": [version],  # a plain string would match every task
    }


def _view(version: str) -> dict[str, Any]:
    return {
        "title": VIEW_TITLE,
        "type": "list",
        "target": "tasks",
        "ordering": ["tasks:predictions_score"],
        "filters": {
            "conjunction": "and",
            "items": [
                _has_version(version),
                {
                    "filter": "filter:tasks:predictions_score",
                    "operator": "less",
                    "type": "Number",
                    "value": 0.5,  # the batch lies below: see published_score
                },
                _IS_UNLABELLED,
            ],
        },
    }


def _address(url: str) -> tuple[str, int | None, str]:
    """Host, port and path: what makes two webhook URLs the same one."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        return ("", None, str(url))
    port = parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
    return (parsed.host.lower(), port, parsed.path.rstrip("/"))


def _upload_address(upload: Mapping[str, Any]) -> str:
    """The address that tasks name an uploaded file by."""
    return "/data/" + quote(str(upload["file"]).lstrip("/"))


def names_missing_task(error: LabelStudioRefused) -> bool:
    """Whether an import was refused because a task is no longer there."""
    return 'invalid \\"task\\" field' in str(error) or 'invalid "task" field' in str(error)


def _excerpt(text: str) -> str:
    """Both ends of a long answer: a refused prediction is quoted whole, and the reason comes last."""
    return text if len(text) <= 500 else f"{text[:150]} ... {text[-350:]}"


def _checked(response: httpx.Response, method: str, path: str) -> Any:
    where = f"{method} {path}"
    if response.status_code in (401, 403):  # the round waits: somebody will mend it, and nothing is wrong with the work
        raise CredentialsMissing(
            f"Label Studio answered {response.status_code} to {where}: the user of LABEL_STUDIO_API_KEY may not change "
            "this project. Add them to it, or take somebody else's token: Account & Settings -> Personal Access Token"
        )
    if response.status_code == 404:
        raise NotFound(f"Label Studio has no {path} (404)")
    if response.status_code >= 500 or response.status_code == 429:
        raise LabelStudioUnavailable(f"Label Studio answered {response.status_code} to {where}")
    if response.status_code >= 400:
        raise LabelStudioRefused(f"Label Studio answered {response.status_code} to {where}: {_excerpt(response.text)}")
    if response.status_code == 204 or not response.content:
        return None
    try:
        return response.json()
    except ValueError as error:
        raise LabelStudioUnavailable(
            f"{where} did not answer JSON: is LABEL_STUDIO_URL ({response.request.url.host}) Label Studio?"
        ) from error
