from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from worker.errors import SettingsInvalid
from worker.settings import (
    ProjectSettings,
    Settings,
    load_settings,
    parse_project_settings,
    unknown_variables,
    variable_of,
)


@pytest.mark.parametrize("nothing", [None, "", "{}", "null", {}])
def test_no_settings_are_the_defaults(nothing: object) -> None:
    settings = parse_project_settings(nothing)
    assert settings == ProjectSettings()
    assert settings.strategy == "hybrid_k_center"
    assert (settings.batch_size, settings.epochs, settings.imgsz) == (200, 80, 640)
    assert (settings.max_rounds, settings.min_map_gain, settings.confidence) == (10, 0.005, 0.25)
    assert settings.labels_per_round is None
    assert settings.holdout_size is None
    assert settings.seed == 0


def test_settings_come_as_an_object_or_as_text_that_holds_one() -> None:
    assert parse_project_settings('{"batch_size": 7}') == parse_project_settings({"batch_size": 7})
    assert parse_project_settings({"batch_size": 7}).batch_size == 7


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"bach_size": 3}, "unknown setting 'bach_size'; did you mean 'batch_size'?"),
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'?"),
        ({"zzz": 3}, "unknown setting 'zzz'; known are batch_size, class_weights, close_mosaic"),
        ({"strategy": "hybird"}, "strategy 'hybird' is unknown; did you mean 'hybrid'?"),
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1 (given: 0)"),
        ({"nonsense": 3}, "unknown setting 'nonsense'; known are batch_size"),
        ({"batch_size": "200"}, "valid integer (given: '200', a text: write it without the quotes)"),
        ({"batch_size": True}, "batch_size: Input should be a valid integer"),
        ({"batch_size": 10**400}, "batch_size: "),
        ({"imgsz": 100}, "imgsz: Input should be a multiple of 32"),
        ({"lr0": math.nan}, "lr0: "),
        ({"mosaic": math.inf}, "mosaic: "),
        ({"confidence": 1.0}, "confidence: Input should be less than 1"),
        ({"optimizer": "sgd"}, "optimizer: Input should be 'auto', 'SGD', 'Adam' or 'AdamW'"),
        ({"strategy_options": {"alpa": 1}}, "alpa"),
        ({"strategy_options": []}, "strategy_options: "),
        ([1], "extra_params must be a JSON object, not list"),
        ("[1]", "extra_params must be a JSON object, not list"),
        ("{", "extra_params is not JSON"),
        (5, "extra_params must be a JSON object, not int"),
        ('{"weights": ' + "[" * 100_000 + "]" * 100_000 + "}", "extra_params"),
    ],
)
def test_what_cannot_be_right_is_named(given: Any, sentence: str) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        parse_project_settings(given)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("n_tasks", "named", "expected"),
    [
        (0, None, 0),
        (1, None, 0),
        (20, None, 10),  # 50 would be more than half
        (100, None, 50),
        (250, None, 50),
        (1000, None, 200),
        (80_000, None, 300),
        (1000, 7, 7),
        (10, 7, 5),
        (1000, 0, 0),
    ],
)
def test_the_holdout_is_a_fifth_within_limits_and_at_most_half(n_tasks: int, named: int | None, expected: int) -> None:
    assert ProjectSettings(holdout_size=named).holdout_for(n_tasks) == expected


def test_mixup_begins_after_the_second_round_unless_it_is_set() -> None:
    assert [ProjectSettings().mixup_in(number) for number in (1, 2, 3)] == [0.0, 0.0, 0.05]
    assert [ProjectSettings(mixup=0.2).mixup_in(number) for number in (1, 3)] == [0.2, 0.2]
    assert ProjectSettings(mixup=0.0).mixup_in(3) == 0.0


def test_the_environment_gives_the_deployment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://label.example:8080/")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", " a-token\n")
    monkeypatch.setenv("HARDFIRST_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HARDFIRST_IMAGE_HOSTS", "cdn.example.com, Minio:9000,")
    settings = load_settings(port=1234)
    assert settings.label_studio_url == "http://label.example:8080"
    assert settings.api_key == "a-token"
    assert "a-token" not in repr(settings)
    assert settings.store_url == f"sqlite:///{tmp_path / 'hardfirst.db'}"
    assert settings.artifacts_root == str(tmp_path / "artifacts")
    assert settings.allowed_image_hosts == frozenset({"cdn.example.com", "minio:9000"})
    assert settings.port == 1234
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://elsewhere/db")
    monkeypatch.setenv("HARDFIRST_ARTIFACTS_URL", "s3://bucket/folder")
    assert load_settings().store_url == "postgresql+psycopg://elsewhere/db"
    assert load_settings().artifacts_root == "s3://bucket/folder"


@pytest.mark.parametrize("variable", ["HARDFIRST_USER", "HARDFIRST_PASSWORD"])
def test_a_user_without_a_password_guards_nothing_and_is_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "only-one")
    with pytest.raises(SettingsInvalid, match="HARDFIRST_USER and HARDFIRST_PASSWORD belong together") as caught:
        load_settings()
    assert "only-one" not in str(caught.value)


def test_a_variable_that_cannot_be_right_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDFIRST_PORT", "99999")
    with pytest.raises(SettingsInvalid, match=r"^HARDFIRST_PORT: Input should be less than or equal to 65535"):
        load_settings()
    with pytest.raises(SettingsInvalid, match=r"^HARDFIRST_PORT: .* less than or equal to 65535 .given: 70000."):
        load_settings(port=70_000)  # as the command line gives it


@pytest.mark.parametrize(
    ("variable", "address"),
    [("LABEL_STUDIO_URL", "localhost:8080"), ("HARDFIRST_URL", "backend.example"), ("LABEL_STUDIO_URL", "http://")],
)
def test_an_address_without_its_scheme_is_refused(variable: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, address)
    with pytest.raises(SettingsInvalid, match=f"^{variable}: an address begins with http://.*given: '{address}'"):
        load_settings()


def test_what_is_named_as_a_setting_and_is_none_is_told(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("HARDFIRST_WEIGTHS=best.pt\nLABEL_STUDIO_USERNAME=ann\nHARDFIRST_PORT=9091\n")
    environment = {"HARDFIRST_USR": "ann", "HARDFIRST_CACHE": "/cache", "HARDFIRST_ZZZ": "1", "PATH": "/bin"}
    assert unknown_variables(environment, env_file) == [
        "HARDFIRST_USR is no setting and counts for nothing; did you mean 'HARDFIRST_USER'?",
        "HARDFIRST_WEIGTHS is no setting and counts for nothing; did you mean 'HARDFIRST_WEIGHTS'?",
        "HARDFIRST_ZZZ is no setting and counts for nothing; see docs/settings.md",
    ]
    assert unknown_variables({variable_of(name): "" for name in Settings.model_fields}, tmp_path / "none") == []


def test_every_setting_says_what_it_is() -> None:
    for model in (Settings, ProjectSettings):
        assert [name for name, info in model.model_fields.items() if not info.description] == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"strategy": "committee"}, "needs committee_size, 3 to 5"),
        ({"committee_size": 2}, "committee_size 2 is no committee"),
        ({"committee_size": 6}, "less than or equal to 5"),
    ],
)
def test_a_committee_has_three_to_five_members(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsInvalid, match=sentence):
        parse_project_settings(values)
    assert parse_project_settings({"strategy": "committee", "committee_size": 3}).committee_size == 3
