"""Label Studio's JSON as pydantic models: what 1.23.2 sends, and nothing we do not use.

Unknown fields are ignored (every body carries the whole project, with its token); types are checked.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_ID = 2**31 - 1  # Label Studio's ids are 32 bit
MAX_TASKS = 100_000


class Payload(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)


def _project_id(value: object) -> object:
    """Label Studio names a project "7.1795422524": its id, and when it was made."""
    if isinstance(value, str):
        head = value.partition(".")[0]
        if not head.isascii() or not head.isdigit():
            raise ValueError('must be Label Studio\'s project, such as "7.1795422524"')
        return int(head)
    return value


Id = Annotated[int, Field(ge=0, le=MAX_ID, strict=True)]
ProjectId = Annotated[Id, BeforeValidator(_project_id)]


class SetupRequest(Payload):
    """POST /setup."""

    project: ProjectId
    label_config: str = Field("", alias="schema", max_length=1_000_000)
    extra_params: Any = None
    access_token: Any = Field(None, repr=False)  # of who connected us: worker.credentials.SetupToken


class SetupResponse(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_version: str


class TaskPayload(Payload):
    id: Id
    data: dict[str, Any] = Field(default_factory=dict)


class PredictParams(Payload):
    """`context`: what an annotator drew, when the request is interactive."""

    context: Any = None


class PredictRequest(Payload):
    """POST /predict: pre-annotation of one task, of a selection, or interactive."""

    tasks: list[TaskPayload] = Field(max_length=MAX_TASKS)
    project: ProjectId
    params: PredictParams = Field(default_factory=lambda: PredictParams())

    @field_validator("params", mode="before")
    @classmethod
    def _none_is_none(cls, value: object) -> object:
        return {} if value is None else value


class Prediction(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    result: list[dict[str, Any]]
    score: float
    model_version: str


class PredictResponse(BaseModel):
    """One entry per task. An empty list where there is no prediction yet: Label Studio then stores none."""

    results: list[Prediction | list[Prediction]]


class AnnotationPayload(Payload):
    id: Id
    task: Id | None = None
    result: list[Any] | None = None
    was_cancelled: bool = False
    updated_at: str | None = Field(None, max_length=64)
    lead_time: float | None = Field(None, ge=0, allow_inf_nan=False)


class ProjectPayload(Payload):
    id: Id


class TaskIdPayload(Payload):
    id: Id


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value


class WebhookRequest(Payload):
    """POST /webhook. ANNOTATIONS_CREATED holds lists under the keys of ANNOTATION_CREATED; deletions hold ids only."""

    action: str = Field(max_length=40)
    project: ProjectPayload
    annotation: Annotated[list[AnnotationPayload], BeforeValidator(_as_list)] = Field(default_factory=list)
    annotations: list[AnnotationPayload] = Field(default_factory=list)
    tasks: list[TaskIdPayload] = Field(default_factory=list)


class WebhookResponse(BaseModel):
    status: str
    detail: str
