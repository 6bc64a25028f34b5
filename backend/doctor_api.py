"""The check-up's addresses: start one, look at it, put one thing right."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field

from backend import admin
from backend.admin import ERRORS, Problem, ProjectId
from backend.doctor_view import DoctorView, examiner_of
from backend.ml_api import Own
from backend.payloads import MAX_ID
from worker.services import Services
from worker.store import get_project

router = APIRouter(tags=["doctor"])
CHANGING: dict[int | str, dict[str, Any]] = {**ERRORS, 409: {"model": Problem}}


class FixRequest(BaseModel):
    """Which check to put right: its name as the last check-up has it, and whether it is one of the project's."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=60)
    of_project: bool = False


@router.get("/api/doctor")
def show_deployment(own: Own) -> DoctorView:
    """The last check-up of the deployment: the checks of `hardfirst doctor`, in order."""
    return examiner_of(own).view(None)


@router.post("/api/doctor", status_code=202, responses={409: {"model": Problem}})
def check_deployment(own: Own) -> DoctorView:
    """Check the deployment. Answers at once; ask for it until its state is "done"."""
    examiner_of(own).start(own, None)
    return show_deployment(own)


@router.post("/api/doctor/fix", status_code=202, responses=CHANGING)
def fix_deployment(body: FixRequest, own: Own) -> DoctorView:
    """Put one check of the deployment right, as `hardfirst doctor --fix` does, and check everything again."""
    examiner_of(own).start(own, None, (body.name, None))
    return show_deployment(own)


@router.get("/api/projects/{project_id}/doctor", responses=ERRORS)
def show_project(project_id: ProjectId, own: Own) -> DoctorView:
    """The last check-up of a project, and of the deployment under it."""
    _check_known(own, project_id)
    return examiner_of(own).view(project_id)


@router.post("/api/projects/{project_id}/doctor", status_code=202, responses=CHANGING)
def check_project(project_id: ProjectId, own: Own) -> DoctorView:
    """Check a project. Answers at once; ask for it until its state is "done"."""
    _check_known(own, project_id)
    examiner_of(own).start(own, project_id)
    return examiner_of(own).view(project_id)


@router.post("/api/projects/{project_id}/doctor/fix", status_code=202, responses=CHANGING)
def fix_project(project_id: ProjectId, body: FixRequest, own: Own) -> DoctorView:
    """Put one check right, as `hardfirst doctor --fix` does, and check everything again."""
    _check_known(own, project_id)
    examiner_of(own).start(own, project_id, (body.name, project_id if body.of_project else None))
    return examiner_of(own).view(project_id)


@router.get("/doctor", include_in_schema=False)
def fragment(
    request: Request, own: Own, project: Annotated[int | None, Query(ge=0, le=MAX_ID)] = None
) -> HTMLResponse:
    """That section of the page alone: it is asked for every second while a check-up runs."""
    if project is not None:
        _check_known(own, project)
    return admin.render(request, own, "_doctor.html", doctor=examiner_of(own).view(project), doctor_of=project)


def _check_known(own: Services, project_id: int) -> None:
    """
    Raises:
        NotFound: the project is not connected.
    """
    with own.store.read() as connection:
        get_project(connection, project_id)
