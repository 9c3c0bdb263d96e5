"""`manage.py connstats` as its users run it: a process of its own, on a real server."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections

from django_connguard.connstats.findings import findings
from django_connguard.connstats.live import View, look
from django_connguard.connstats.probe import Capacity, ServerConnection
from django_connguard.management.commands.connstats import parse_ages
from tests import services
from tests.command import Run, refused
from tests.test_probe import eventually, table

pytestmark = pytest.mark.django_db(transaction=True)

server_only = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")


@pytest.fixture
def three_open() -> Any:
    """Three connections of this process; whatever earlier tests closed is gone from the server."""
    connection.close()
    with ExitStack() as stack:
        for _ in range(3):
            copy = connection.copy()
            copy.ensure_connection()
            stack.callback(copy.close)
        yield


def test_json_tells_settings_sessions_and_headroom(connstats: Run, three_open: None) -> None:
    result = connstats("--format", "json", CONN_MAX_AGE=60, CONN_HEALTH_CHECKS=True)
    assert result.returncode == 0, result.stderr
    [view] = json.loads(result.stdout)["aliases"]
    assert view["alias"] == "default"
    assert view["vendor"] == connection.vendor
    assert view["settings"] == {"CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True, "pool": None}
    assert view["open"] == sum(view["by_state"].values()) == len(view["sessions"])
    assert view["open"] == sum(view["by_application"].values())
    assert view["open"] >= 3
    if connection.vendor != "sqlite":
        assert view["by_state"]["idle"] >= 3
        assert view["oldest_idle"] >= 0
        assert view["capacity"]["headroom"] > 0


def test_the_table_tells_the_same_to_people(connstats: Run, three_open: None) -> None:
    result = connstats(CONN_MAX_AGE=None)
    assert result.returncode == 0, result.stderr
    assert "CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=False, no pool" in result.stdout
    assert "application" in result.stdout
    if connection.vendor == "sqlite":
        assert "no maximum is known" in result.stdout
    else:
        assert "headroom" in result.stdout
        assert "! CONN_MAX_AGE=None and CONN_HEALTH_CHECKS=False" in result.stdout


@server_only
def test_sessions_idle_in_transaction_are_a_finding() -> None:
    other = connection.copy()
    with table("probed"):
        other.set_autocommit(False)
        try:
            with other.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM probed")
            text = "1 session is idle in transaction, the oldest for"
            eventually(lambda: any(text in found for found in findings(look("default"))))
        finally:
            other.rollback()
            other.close()


@server_only
def test_an_unreachable_server_is_one_line_and_status_2(connstats: Run) -> None:
    result = connstats("--database", "down", down=True)
    assert refused(result).startswith("cannot reach alias 'down' at 127.0.0.1:1: ")
    assert "s3cret" not in result.stdout + result.stderr


@server_only
def test_an_unreachable_server_does_not_hide_the_others(connstats: Run) -> None:
    result = connstats(down=True)
    assert "alias 'down'" in refused(result)
    assert "default: " in result.stdout


@server_only
def test_a_refused_login_is_one_line_without_the_password(connstats: Run) -> None:
    result = connstats(USER="connguard_nobody", PASSWORD="s3cret")
    assert "connguard_nobody" in refused(result)
    assert "s3cret" not in result.stdout + result.stderr


@server_only
def test_a_missing_database_is_one_line_and_status_2(connstats: Run) -> None:
    assert "connguard_absent" in refused(connstats(NAME="connguard_absent"))


@server_only
def test_an_option_that_the_driver_does_not_know_is_one_line(connstats: Run) -> None:
    assert "bogus" in refused(connstats(OPTIONS={"bogus": 1}))


def test_a_back_end_that_cannot_be_loaded_is_one_line(connstats: Run) -> None:
    assert "alias 'default'" in refused(connstats(ENGINE="connguard.absent"))


def test_an_unknown_alias_is_one_line_naming_the_known_ones(connstats: Run) -> None:
    line = refused(connstats("--database", "nope"))
    assert line == "unknown database alias 'nope'; known: default"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--drop"], "--drop needs --experiment"),
        (["--format", "xml"], "unknown format 'xml'; known: table, json"),
        (["--workers", "3"], "--workers needs --experiment"),
        (
            ["--experiment", "--ages", "0,soon"],
            "bad age 'soon' in --ages: give seconds, as 0 or 0.5 or 60, or none",
        ),
        (
            ["--experiment", "--ages=-1"],
            "bad age '-1' in --ages: give seconds, as 0 or 0.5 or 60, or none",
        ),
        (
            ["--experiment", "--workers", "0"],
            "--workers must be a whole number from 1, not '0'",
        ),
        (["--experiment", "--rate", "x"], "--rate must be jobs per second, more than 0, not 'x'"),
        (
            ["--experiment", "--pool", "greenlets"],
            "unknown --pool 'greenlets'; known: processes, threads, celery",
        ),
        (
            ["--experiment", "--database", "a", "--database", "b"],
            "an experiment runs on one database: give --database once",
        ),
    ],
)
def test_a_mistaken_option_is_one_line_and_status_2(
    connstats: Run, arguments: list[str], line: str
) -> None:
    assert refused(connstats(*arguments)) == line


def test_ages_may_be_fractions_and_none() -> None:
    assert parse_ages("0, 0.5,60,None") == (0, 0.5, 60, None)


def test_call_command_raises_with_the_exit_status() -> None:
    with pytest.raises(CommandError, match="unknown database alias") as caught:
        call_command("connstats", database=["nope"])
    assert caught.value.returncode == 2


def test_tables_without_rich_name_what_to_install(connstats: Run) -> None:
    result = connstats(prelude="import sys; sys.modules['rich'] = None")
    assert refused(result) == (
        'connstats draws its tables with rich; install it: pip install "django-connguard[stats]"'
    )


def test_json_needs_no_rich(connstats: Run) -> None:
    result = connstats("--format", "json", prelude="import sys; sys.modules['rich'] = None")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["aliases"]


@pytest.mark.skipif(services.driver() != "psycopg", reason="Django pools psycopg 3 alone")
@pytest.mark.skipif(not hasattr(connections["default"], "pool"), reason="Django pools from 5.1 on")
def test_a_pools_sizes_are_told_and_its_secrets_are_not(connstats: Run) -> None:
    pool = {"min_size": 2, "max_size": 5, "kwargs": {"password": "s3cret"}}
    result = connstats("--format", "json", OPTIONS={"pool": pool})
    [view] = json.loads(result.stdout)["aliases"]
    assert view["settings"]["pool"] == {"min_size": 2, "max_size": 5}
    assert "s3cret" not in result.stdout


def a_view(**changes: Any) -> View:
    values: dict[str, Any] = {
        "alias": "default",
        "vendor": "postgresql",
        "server": "db:5432",
        "max_age": 0,
        "health_checks": True,
        "pool": None,
        "sessions": (),
        "capacity": Capacity(maximum=100, reserved=3, in_use=5),
        "notes": (),
    }
    return View(**{**values, **changes})


def idle_for(seconds: float) -> ServerConnection:
    return ServerConnection(1, "worker", "app", "h:1", "idle", age=seconds, idle=seconds)


def test_a_healthy_view_has_no_findings() -> None:
    assert findings(a_view(sessions=(idle_for(2),))) == []


def test_a_nearly_full_server_is_a_finding_over_what_ordinary_roles_may_open() -> None:
    [text] = findings(a_view(capacity=Capacity(maximum=100, reserved=3, in_use=80)))
    assert text.startswith("82% of the connections that ordinary roles may open are in use (80 of")


def test_sessions_idle_past_conn_max_age_are_a_finding() -> None:
    view = a_view(max_age=60, sessions=(idle_for(30), idle_for(90), idle_for(7200)))
    [text] = findings(view)
    assert text.startswith("2 sessions are idle for longer than CONN_MAX_AGE=60 allows")
    assert "the oldest for 2 h" in text


def test_sessions_that_a_pool_keeps_idle_are_no_finding() -> None:
    pool = {"min_size": 4, "max_size": 4}
    assert findings(a_view(pool=pool, sessions=(idle_for(7200),))) == []


def test_a_pool_with_conn_max_age_is_a_finding() -> None:
    [text] = findings(a_view(pool={"min_size": 4, "max_size": 4}, max_age=None))
    assert "Django refuses to connect with both" in text
