"""One tree of errors. Each says what happened, with which value, and what to do next.

HardfirstError
├── BadRequest            a body, a parameter or a setting that cannot be right        -> HTTP 400
│   ├── SettingsInvalid   a setting, from the environment or from extra_params         -> HTTP 422
│   └── NotAuthorised     HARDFIRST_USER and HARDFIRST_PASSWORD are set and not given  -> HTTP 401
├── NotFound              a project, a task, a round or an artifact that is not here   -> HTTP 404
├── Conflict              it cannot be done now (a round is open already)              -> HTTP 409
├── LabelMismatch         the label config and the model have no class in common
├── LabelConfigUnsupported  no rectangle labels over an image in the label config  -> HTTP 422
├── ImageUnusable         an image that cannot be fetched or decoded: one task, never a batch
├── DatasetUnusable       annotations from which nothing can be learned
├── TrainingFailed        the trainer gave up; the old version stays published
├── WeightsUnavailable    a weights file that is not there and cannot be downloaded
├── ArtifactDamaged       an artifact whose SHA-256 is not the recorded one
├── JobFenced             this attempt was cancelled or replaced: stop, write nothing
├── LabelStudioRefused    Label Studio answered 4xx: asking again will not help
├── PublishIncomplete     Label Studio kept fewer predictions than it was sent
└── Unavailable           somebody we need is away; the round waits and resumes        -> HTTP 503
    ├── LabelStudioUnavailable
    ├── CredentialsMissing
    ├── NothingToLabel        the project has no tasks yet
    └── QueueUnavailable

A job that meets `Unavailable` is put back and tried again; any other error ends its round, its sentence on the page.
"""

from __future__ import annotations


class HardfirstError(Exception):
    """hardfirst could not do this."""

    status = 500

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class BadRequest(HardfirstError):
    """The request cannot be right. Nothing was changed."""

    status = 400


class SettingsInvalid(BadRequest):
    """A setting is not valid."""

    status = 422


class NotAuthorised(BadRequest):
    """This needs the user name and password set in HARDFIRST_USER and HARDFIRST_PASSWORD."""

    status = 401


class NotFound(HardfirstError):
    """Nothing of that name is here."""

    status = 404


class Conflict(HardfirstError):
    """That cannot be done now."""

    status = 409


class LabelMismatch(HardfirstError):
    """The label config and the model have no class in common. Rename a <Label>, or add predicted_values to it."""


class LabelConfigUnsupported(HardfirstError):
    """The label config has no <RectangleLabels> over an <Image>. Add one in the project's Labeling Interface."""

    status = 422  # it came with the request


class ImageUnusable(HardfirstError):
    """The image cannot be fetched or decoded."""


class DatasetUnusable(HardfirstError):
    """Nothing can be learned from these annotations. Label some more, then start a round."""


class TrainingFailed(HardfirstError):
    """Training failed; the version published before stays."""


class WeightsUnavailable(HardfirstError):
    """The weights file is not here and could not be downloaded. Put it on disk and name it in HARDFIRST_WEIGHTS."""


class ArtifactDamaged(HardfirstError):
    """An artifact is not what was written. Start a round to make a new one."""


class JobFenced(HardfirstError):
    """This attempt was cancelled or replaced by another."""


class LabelStudioRefused(HardfirstError):
    """Label Studio refused the request."""


class PublishIncomplete(HardfirstError):
    """Label Studio kept fewer predictions than it was sent; the version published before stays."""


class Unavailable(HardfirstError):
    """A service that is needed is away for the moment."""

    status = 503


class LabelStudioUnavailable(Unavailable):
    """Label Studio does not answer."""


class CredentialsMissing(Unavailable):
    """No token for Label Studio: take one in Account & Settings -> Personal Access Token, set LABEL_STUDIO_API_KEY."""


class NothingToLabel(Unavailable):
    """The project has no tasks yet. Import images; the first batch follows by itself."""


class QueueUnavailable(Unavailable):
    """Redis (Valkey) does not answer."""
