"""Settings: of the deployment (environment) and of one project (Label Studio's extra_params, JSON)."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticSerializationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from strategies import STRATEGIES, validate_options
from strategies.errors import StrategyError
from worker.errors import SettingsInvalid

HOLDOUT_SHARE = 0.20
HOLDOUT_LIMITS = (50, 300)
# Named as settings are, and none: the set-up scripts' two, and what our processes tell each other.
OTHER_VARIABLES = (
    *("HARDFIRST_CACHE", "HARDFIRST_LABEL_STUDIO_PYTHON"),
    *("HARDFIRST_SUPERVISOR_PID", "HARDFIRST_MAY_DOWNLOAD"),
)


class Settings(BaseSettings):
    """Settings of the deployment, read from the environment (and `.env` in the working directory)."""

    model_config = SettingsConfigDict(env_prefix="HARDFIRST_", env_file=".env", extra="ignore", populate_by_name=True)

    label_studio_url: str = Field(
        "http://localhost:8080", validation_alias="LABEL_STUDIO_URL", description="Where Label Studio answers."
    )
    label_studio_api_key: SecretStr = Field(
        SecretStr(""),
        validation_alias="LABEL_STUDIO_API_KEY",
        description="Access token of a Label Studio user who may change the projects (legacy or personal). Empty: the "
        "one Label Studio sends as it connects us is tried once.",
    )
    redis_url: str = Field(
        "", validation_alias="REDIS_URL", description="Redis or Valkey. Empty: `hardfirst up` starts an embedded one."
    )
    database_url: str = Field(
        "",
        validation_alias="DATABASE_URL",
        description="SQLAlchemy URL of the store (postgresql+psycopg://...). Empty: SQLite in the data folder.",
    )
    data_dir: Path = Field(Path("hardfirst-data"), description="Folder for the store, the queue's file and artifacts.")
    artifacts_url: str = Field("", description="fsspec URL for weights and embeddings. Empty: a folder in data_dir.")
    url: str = Field("", description="Where Label Studio reaches the backend. Empty: as its requests say.")
    host: str = Field("127.0.0.1", description="Address the backend listens on.")
    port: int = Field(9090, ge=0, le=65535, description="Port the backend listens on.")
    user: str = Field("", description="With HARDFIRST_PASSWORD: basic auth on everything but /health.")
    password: SecretStr = Field(SecretStr(""), description="See HARDFIRST_USER.")
    weights: str = Field("", description="Weights file to start from where a project names none.")
    device: str = Field("", description="cpu, cuda, cuda:1, mps. Empty: cuda when there is one, else cpu.")
    image_hosts: str = Field("", description="Comma-separated hosts, beside Label Studio's, that images may come from.")
    local_files_root: Path | None = Field(
        None,
        description="Label Studio's folder of local files, as mounted here: they are read straight from it. Whoever "
        "may make tasks can name any image in it.",
    )
    image_buckets: str = Field(
        "",
        description="Comma-separated buckets (`s3://pool`, `gs://pool/day`) that are read straight, with the "
        "credentials of this machine. Others are asked of Label Studio.",
    )
    image_max_mb: int = Field(64, ge=1, description="An image larger than this is refused.")
    image_max_megapixels: int = Field(200, ge=1, description="An image with more pixels than this is refused.")
    shard_size: int = Field(256, ge=1, description="Images scored by one job.")
    reconcile_seconds: int = Field(60, ge=1, description="How often Label Studio is asked for what webhooks missed.")

    @field_validator("label_studio_url", "url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value and re.match(r"https?://[^/]", value) is None:
            raise ValueError("an address begins with http:// or https://, such as http://localhost:8080")
        return value.rstrip("/")

    @field_validator("local_files_root", mode="before")
    @classmethod
    def _not_empty(cls, value: object) -> object:
        return value or None  # an empty variable, as docker-compose hands it on, is no folder

    @field_validator("image_buckets")
    @classmethod
    def _are_buckets(cls, value: str) -> str:
        for one in filter(None, (part.strip() for part in value.split(","))):
            if re.fullmatch(r"(s3|gs)://[\w.-]+(/[^?*#]*)?", one) is None:
                raise ValueError(f"{one!r} is no bucket: write s3://name or gs://name, with or without a folder")
        return value

    @model_validator(mode="after")
    def _both_or_none(self) -> Settings:
        if bool(self.user) != bool(self.password.get_secret_value()):
            raise ValueError("HARDFIRST_USER and HARDFIRST_PASSWORD belong together: set both or neither")
        return self

    @property
    def store_url(self) -> str:
        return self.database_url or f"sqlite:///{(self.data_dir / 'hardfirst.db').resolve()}"

    @property
    def artifacts_root(self) -> str:
        return self.artifacts_url or str((self.data_dir / "artifacts").resolve())

    @property
    def allowed_image_hosts(self) -> frozenset[str]:
        return frozenset(host.strip().lower() for host in self.image_hosts.split(",") if host.strip())

    @property
    def readable_buckets(self) -> frozenset[str]:
        return frozenset(one.strip() for one in self.image_buckets.split(",") if one.strip())

    @property
    def api_key(self) -> str:
        return self.label_studio_api_key.get_secret_value().strip()


class ProjectSettings(BaseModel):
    """Settings of one project: the JSON of the model's "Any extra params" box in Label Studio."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    strategy: str = Field("hybrid_k_center", description="How the next batch is chosen: a name from the registry.")
    strategy_options: dict[str, Any] = Field(default_factory=dict, description="Options of that strategy.")
    batch_size: int = Field(200, ge=1, le=100_000, description="K: tasks a round asks annotators to label.")
    labels_per_round: int | None = Field(
        None, ge=1, description="New training labels that open a round. Default: the size of the published batch."
    )
    max_rounds: int = Field(10, ge=1, le=1000, description="Rounds that open by themselves; an admin may start more.")
    min_map_gain: float = Field(0.005, ge=0, le=1, description="Base rule: a gain in mAP50 below this says stop.")
    worth_gain: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Gain in mAP50 that is worth the price of a round. Default: from `value_per_point` and "
        "`cost_per_hour`, else .02.",
    )
    cost_per_hour: float | None = Field(None, ge=0, le=1e9, description="What an annotator's hour costs, in money.")
    value_per_point: float | None = Field(
        None, gt=0, le=1e12, description="What one point of mAP50 (.01) is worth, in the same money."
    )
    holdout_size: int | None = Field(
        None, ge=0, description="Holdout tasks. Default: 20 % of the pool, 50 to 300, at most half of it."
    )
    weights: str = Field(
        "", description="Weights rounds start from: a .pt or .yaml. Default: HARDFIRST_WEIGHTS, else yolo11n.pt."
    )
    warm_start: bool = Field(False, description="Start each round from the last round's weights, not the base ones.")
    epochs: int = Field(80, ge=1, le=10_000, description="Epochs of one training.")
    imgsz: int = Field(640, ge=32, le=4096, multiple_of=32, description="Longest side the detector sees, pixels.")
    train_batch: int = Field(16, ge=1, le=1024, description="Images in one training step.")
    nominal_batch: int = Field(
        64, ge=1, le=1024, description="Images per optimizer step. With few labels, set it to `train_batch`."
    )
    optimizer: Literal["auto", "SGD", "Adam", "AdamW"] = Field("auto", description="Optimizer of the training.")
    lr0: float | None = Field(None, gt=0, le=1, description="First learning rate. Default: ultralytics' own choice.")
    mosaic: float = Field(1.0, ge=0, le=1, description="Share of training images that are mosaics.")
    mixup: float | None = Field(
        None, ge=0, le=1, description="Share of mixed-up images. Default: 0, .05 after round 2."
    )
    close_mosaic: int = Field(10, ge=0, description="Last epochs without mosaics.")
    freeze: int = Field(0, ge=0, le=100, description="First layers of the network that do not learn.")
    shapes: Literal["boxes_only", "hull"] = Field(
        "boxes_only",
        description="Which labelling tools count: rectangles only (a turned one by its upright hull), or with `hull` "
        "polygons and ellipses too, as the boxes around them.",
    )
    confidence: float = Field(0.25, gt=0, lt=1, description="Boxes are drawn from this confidence on.")
    committee_size: int = Field(
        0, ge=0, le=5, description="Detectors a round trains for strategy `committee`: 3 to 5. Each costs a training."
    )
    committee: Literal["subsets", "checkpoints"] = Field(
        "subsets",
        description="How members differ: trained on subsets of the labels, or cheap checkpoints of one training, whose "
        "votes are correlated.",
    )
    uncertainty_threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Boxes count for uncertainty from this confidence on. Default: .1 for `hybrid_k_center`; else .25 "
        "for the measure `least_confidence`, .05 for `margin` and `entropy`.",
    )
    uncertainty_empty: Literal["uncertain", "certain", "best_candidate", "calibrated"] | None = Field(
        None,
        description="What an image without such a box is; `calibrated`: as uncertain as it is likely, by the holdout, "
        "that something was missed (`best_candidate` while no holdout is measured). Default: `calibrated` for "
        "`hybrid_k_center`, `best_candidate` for `margin` and `entropy`, else `uncertain`.",
    )
    uncertainty_aggregate: Literal["max", "min", "mean", "top_n_mean", "sum", "open"] | None = Field(
        None,
        description="How the uncertainties of an image's boxes become one; `sum` favours crowded images, `open` is "
        "log(1 + sum) + 2 min. Default: `open` for `hybrid_k_center`, else `max`.",
    )
    uncertainty_n: int = Field(10, ge=1, le=300, description="Boxes that `top_n_mean` is the mean of.")
    class_weights: bool | None = Field(
        None,
        description="Boxes of classes with few labelled boxes count for more (by half to 3 times). Default: yes for "
        "`hybrid_k_center`, else no.",
    )
    near_duplicate_threshold: float = Field(
        0.99, gt=0, le=1, description="Cosine above which two images count as one when a batch is chosen."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of every random choice in this project.")

    @model_validator(mode="after")
    def _known_strategy(self) -> ProjectSettings:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r} is unknown{_nearest(self.strategy, list(STRATEGIES))}")
        if self.committee_size in (1, 2):
            raise ValueError(f"committee_size {self.committee_size} is no committee: 3 to 5, or 0 for none")
        if self.committee == "checkpoints" and self.epochs < self.committee_size:
            raise ValueError(f"{self.epochs} epochs have no {self.committee_size} checkpoints: raise epochs")
        if self.strategy == "committee" and not self.committee_size:
            raise ValueError("strategy 'committee' needs committee_size, 3 to 5: the detectors a round trains")
        try:
            validate_options(self.strategy, self.strategy_options)
        except StrategyError as error:
            raise ValueError(str(error)) from error
        return self

    def holdout_for(self, n_tasks: int) -> int:
        """How many of `n_tasks` become the holdout: at most half, so that something is left to train on."""
        low, high = HOLDOUT_LIMITS
        wanted = self.holdout_size
        if wanted is None:
            wanted = min(max(round(HOLDOUT_SHARE * n_tasks), low), high)
        return min(wanted, n_tasks // 2)

    def mixup_in(self, round_number: int) -> float:
        if self.mixup is not None:
            return self.mixup
        return 0.05 if round_number > 2 else 0.0


def parse_project_settings(extra_params: object) -> ProjectSettings:
    """Settings from what Label Studio sends as `extra_params`: None, a JSON object, or a string holding one.

    Raises:
        SettingsInvalid: not JSON, not an object, an unknown key (the nearest is named) or a value out of range.
    """
    values = _as_mapping(extra_params)
    known = list(ProjectSettings.model_fields)
    unknown = [key for key in values if key not in known]
    if unknown:
        raise SettingsInvalid(f"extra_params: unknown setting {unknown[0]!r}{_nearest(str(unknown[0]), known)}")
    try:
        settings = ProjectSettings.model_validate(dict(values))
        settings.model_dump_json()
    except ValidationError as error:
        raise SettingsInvalid("extra_params: " + "; ".join(_sentences(error))) from error
    except PydanticSerializationError as error:  # half of a surrogate pair: JSON may carry it, nothing can store it
        raise SettingsInvalid(f"extra_params hold a text that is not Unicode: {error}") from error
    return settings


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment.

    Raises:
        SettingsInvalid: one of the variables has a value that cannot be right.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsInvalid("; ".join(_sentences(error, variable_of))) from error


def variable_of(name: str) -> str:
    """The environment variable that gives a setting of the deployment."""
    if (info := Settings.model_fields.get(name)) is None:
        return name  # an alias, which is the variable's name already
    return str(info.validation_alias or f"{Settings.model_config.get('env_prefix', '')}{name}".upper())


def unknown_variables(environment: Mapping[str, str], env_file: Path = Path(".env")) -> list[str]:
    """A sentence for each variable, in the environment or the file, that is named as ours and gives no setting.

    To be told, not refused: Kubernetes, for one, puts variables there that are named after services.
    """
    prefix = str(Settings.model_config.get("env_prefix", ""))
    settings = {variable_of(name) for name in Settings.model_fields}
    names = {name.upper() for name in (*environment, *dotenv_values(env_file))}
    return [
        f"{name} is no setting and counts for nothing; {_meant(name, settings, prefix)}"
        for name in sorted(names - {*settings, *OTHER_VARIABLES})
        if name.startswith(prefix)
    ]


def _meant(name: str, known: set[str], prefix: str) -> str:
    """Compared without the prefix, which would make all of them alike."""
    stems = {one.removeprefix(prefix): one for one in sorted(known)}
    close = difflib.get_close_matches(name.removeprefix(prefix), stems, n=1)
    return f"did you mean {stems[close[0]]!r}?" if close else "see docs/settings.md"


def _as_mapping(extra_params: object) -> Mapping[Any, Any]:
    if extra_params in (None, ""):
        return {}
    if isinstance(extra_params, str):
        try:
            extra_params = json.loads(extra_params)
        except (ValueError, RecursionError) as error:
            raise SettingsInvalid(f"extra_params is not JSON: {error}") from error
    if extra_params is None:
        return {}
    if not isinstance(extra_params, Mapping):
        raise SettingsInvalid(f"extra_params must be a JSON object, not {type(extra_params).__name__}")
    return extra_params


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(sorted(known))}"


def _sentences(error: ValidationError, name_of: Callable[[str], str] = str) -> list[str]:
    lines = []
    for problem in error.errors():
        first, *rest = [str(part) for part in problem["loc"]] or [""]
        where = ".".join([name_of(first), *rest])
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (given: {_shown(problem.get('input'), problem['type'])})"
        lines.append(f"{where}: {message}{given}" if where else message)
    return lines


def _shown(given: object, kind: str) -> str:
    """A value as it was written: a number that came as a text looks like the number, and is refused all the same."""
    if isinstance(given, str):
        in_quotes = ", a text: write it without the quotes" if kind in ("int_type", "float_type", "bool_type") else ""
        return f"{given[:80]!r}{in_quotes}"
    return str(given)[:80]
