"""The CONNGUARD setting and its system checks."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings

from django_connguard.conf import KEYS, conf


def problems(value: Any) -> list[tuple[str, str, str]]:
    with override_settings(CONNGUARD=value):
        return [
            (str(check.id).removeprefix("django_connguard."), check.msg, str(check.hint))
            for check in run_checks(tags=["connguard"])
        ]


def test_no_setting_and_an_empty_one_are_in_order() -> None:
    assert problems({}) == []
    assert run_checks(tags=["connguard"]) == []


def test_an_unknown_key_is_an_error_that_names_the_nearest_one() -> None:
    ((check, message, hint),) = problems({"CANCEL_TIMOUT": 2})
    assert check == "E002"
    assert "'CANCEL_TIMOUT'" in message
    assert "'CANCEL_TIMEOUT'" in hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CANCEL_TIMEOUT", "1"),
        ("CANCEL_TIMEOUT", -1),
        ("CANCEL_TIMEOUT", True),
        ("REQUEST_SIGNALS", 1),
        ("EXPERIMENT_JOB", "undotted"),
        ("EXPERIMENT_JOB", 3),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_key_and_counts_as_the_default(
    key: str, value: Any
) -> None:
    ((check, message, hint),) = problems({key: value})
    assert check == "E003"
    assert f"CONNGUARD[{key!r}]" in message
    assert repr(value) in message
    assert repr(KEYS[key].default) in hint
    with override_settings(CONNGUARD={key: value}):
        assert getattr(conf, key) == KEYS[key].default


def test_a_setting_that_is_no_dict_is_an_error() -> None:
    ((check, message, _),) = problems(["REQUEST_SIGNALS"])
    assert check == "E001"
    assert "list" in message


def test_override_settings_takes_effect_and_ends() -> None:
    assert conf.CANCEL_TIMEOUT == 1.0
    with override_settings(CONNGUARD={"CANCEL_TIMEOUT": 3}):
        assert conf.CANCEL_TIMEOUT == 3
    assert conf.CANCEL_TIMEOUT == 1.0


def test_a_misspelt_key_in_code_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NO_SUCH_KEY"):
        _ = conf.NO_SUCH_KEY
