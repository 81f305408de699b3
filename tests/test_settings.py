"""Settings: what the environment may say, and what a server refuses to start with, in one line that names the variable."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from app.errors import InvalidRequest
from app.settings import Settings

KUBERNETES = {
    "HONE_SERVICE_HOST": "10.96.0.7", "HONE_SERVICE_PORT": "8000", "HONE_SERVICE_PORT_HTTP": "8000", "HONE_PORT": "tcp://10.96.0.7:8000",
    "HONE_PORT_8000_TCP": "tcp://10.96.0.7:8000", "HONE_PORT_8000_TCP_PROTO": "tcp", "HONE_PORT_8000_TCP_PORT": "8000",
    "HONE_PORT_8000_TCP_ADDR": "10.96.0.7", "HONE_WORKER_PORT": "tcp://10.96.0.8:8001", "HONE_REDIS_SERVICE_HOST": "10.96.0.9",
}  # fmt: skip
"""What a container finds in its environment beside services called hone, hone-worker and hone-redis."""


def test_what_service_discovery_puts_into_the_environment_is_no_setting() -> None:
    assert Settings.from_env(KUBERNETES) == Settings.from_env({})
    assert Settings.from_env(KUBERNETES | {"HONE_HOST": "0.0.0.0"}, port=9000).port == 9000
    with pytest.raises(InvalidRequest, match="HONE_PRT is not a setting of Hone; did you mean HONE_PORT"):
        Settings.from_env({"HONE_PRT": "tcp://10.96.0.7:8000"})


def test_an_empty_variable_counts_as_not_given_and_blanks_around_a_value_are_none_of_it() -> None:
    assert Settings.from_env({"HONE_PORT": "", "HONE_STATE": " ", "HONE_ALLOW_UPLOADS": "", "HONE_METRICS": ""}) == Settings.from_env({})
    given = Settings.from_env({"HONE_ADMIN_TOKEN": "secret\n", "HONE_PORT": " 9000 ", "HONE_LOG_LEVEL": "INFO"})
    assert (given.admin_token, given.port, given.log_level) == ("secret", 9000, "info")


@pytest.mark.parametrize("name", [field.name for field in fields(Settings) if field.metadata["least"] is not None])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 10**30])
def test_a_number_that_makes_no_sense_is_refused_by_its_name(name: str, value: Any) -> None:
    most = next(field.metadata["most"] for field in fields(Settings) if field.name == name)
    if value == 10**30 and most is None:
        return
    with pytest.raises(InvalidRequest, match=rf"HONE_{name.upper()}=.*: must be "):
        Settings.from_env({}, **{name: value})


def test_every_number_of_the_settings_has_a_bound() -> None:
    bare = [field.name for field in fields(Settings) if isinstance(field.default, int | float) and field.metadata["least"] is None]
    assert bare == ["show_internals", "allow_uploads", "allow_file_parameters"]


@pytest.mark.parametrize("name", ["metrics", "job_device", "log_level"])
def test_a_word_is_one_of_those_that_are_known(name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"HONE_{name.upper()}='loud': must be .* or "):
        Settings.from_env({f"HONE_{name.upper()}": "loud"})


@pytest.mark.parametrize("token", ["pässword", "two words", "a\nb", "tab\there"])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InvalidRequest, match="HONE_VIEWER_TOKEN has characters") as refused:
        Settings.from_env({"HONE_VIEWER_TOKEN": token})
    assert token not in str(refused.value)


def test_two_roles_never_share_a_token() -> None:
    with pytest.raises(InvalidRequest, match="must differ"):
        Settings.from_env({"HONE_ADMIN_TOKEN": "same", "HONE_VIEWER_TOKEN": "same"})
