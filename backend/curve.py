"""The measuring half of the JSON API: verdict, holdout, learning curve, returns, classes. Parse, delegate, respond."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from backend import curve_view
from backend.admin import ERRORS, ProjectId
from backend.curve_view import ClassTrend, CurveView, HoldoutView, MeasuringView, MoneyView, ReturnView, VerdictCard
from backend.ml_api import Own
from worker import rounds
from worker.services import Services
from worker.store import get_project

router = APIRouter(tags=["measuring"])


class MoreHoldout(BaseModel):
    """`images` more holdout images in the next batch, on top of those that wait; 0 withdraws all that wait."""

    model_config = ConfigDict(extra="forbid")

    images: Annotated[StrictInt, Field(ge=0, le=1_000_000)]


class Acknowledgement(BaseModel):
    """`warning`: the key of a warning of the present verdict."""

    model_config = ConfigDict(extra="forbid")

    warning: Annotated[str, Field(max_length=64)]


@router.get("/api/projects/{project_id}/measuring", responses=ERRORS)
def show_measuring(project_id: ProjectId, own: Own) -> MeasuringView:
    """All that was measured, as the page shows it."""
    with own.store.read() as connection:
        return curve_view.measuring_view(connection, project_id)


@router.get("/api/projects/{project_id}/verdict", responses=ERRORS)
def show_verdict(project_id: ProjectId, own: Own) -> VerdictCard | None:
    """Advice after the newest measured round, with its reasons; null before there is one."""
    with own.store.read() as connection:
        get_project(connection, project_id)
        return curve_view.verdict_card(connection, project_id, curve_view.measured_rows(connection, project_id))


@router.get("/api/projects/{project_id}/curve", responses=ERRORS)
def show_curve(project_id: ProjectId, own: Own) -> CurveView:
    """The learning curve: points with intervals, fit, prediction of the next round, knee."""
    with own.store.read() as connection:
        get_project(connection, project_id)
        return curve_view.curve_view(curve_view.measured_rows(connection, project_id))


@router.get("/api/projects/{project_id}/returns", responses=ERRORS)
def list_returns(project_id: ProjectId, own: Own) -> list[ReturnView]:
    """What each measured round bought: per 100 labels, per hour, in money. Newest first."""
    with own.store.read() as connection:
        get_project(connection, project_id)
        rows = curve_view.measured_rows(connection, project_id)
        return curve_view.returns_view(connection, project_id, rows)


@router.get("/api/projects/{project_id}/money", responses=ERRORS)
def show_money(project_id: ProjectId, own: Own) -> MoneyView:
    """Annotators' time so far, and its price when one is set."""
    with own.store.read() as connection:
        get_project(connection, project_id)
        return curve_view.money_view(connection, project_id)


@router.get("/api/projects/{project_id}/classes", responses=ERRORS)
def list_classes(project_id: ProjectId, own: Own) -> list[ClassTrend]:
    """AP50 of every class over the measured rounds, what wants attention first."""
    with own.store.read() as connection:
        get_project(connection, project_id)
        rows = curve_view.measured_rows(connection, project_id)
        return curve_view.class_trends(connection, project_id, [row.number for row in rows])


@router.get("/api/projects/{project_id}/holdout", responses=ERRORS)
def show_holdout(project_id: ProjectId, own: Own) -> HoldoutView:
    """The holdout and the smallest gain it can see, also before the first round."""
    with own.store.read() as connection:
        get_project(connection, project_id)
        return curve_view.holdout_now(connection, project_id)


@router.post("/api/projects/{project_id}/holdout", responses=ERRORS)
def ask_for_holdout(project_id: ProjectId, body: MoreHoldout, own: Own) -> HoldoutView:
    """Ask annotators for more holdout images in the next batch, or withdraw that."""
    with own.store.write() as connection:
        get_project(connection, project_id)
        if body.images:
            rounds.ask_for_holdout(connection, project_id, body.images)
        else:
            rounds.withdraw_holdout(connection, project_id)
        return curve_view.holdout_now(connection, project_id)


@router.post("/api/projects/{project_id}/warnings", responses=ERRORS)
def acknowledge_warning(project_id: ProjectId, body: Acknowledgement, request: Request, own: Own) -> VerdictCard | None:
    """Say that a warning of the present verdict was read. It vetoes nothing either way."""
    with own.store.write() as connection:
        curve_view.acknowledge(connection, project_id, body.warning, _who(request, own))
    return show_verdict(project_id, own)


def _who(request: Request, own: Services) -> str:
    return own.settings.user or f"an admin at {request.client.host if request.client else 'an unknown address'}"
