"""The system checks of DATABASES: by settings alone, and against the server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import ERROR, WARNING, CheckMessage, Tags, run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections
from django.test import override_settings

from django_connguard.connstats.checks import check_servers
from django_connguard.connstats.probe import probe_for
from tests import services
from tests.command import Run
from tests.server import alias

ROOT = Path(__file__).resolve().parent.parent

server_only = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")
sqlite_only = pytest.mark.skipif(services.vendor() != "sqlite", reason="about SQLite alone")
postgresql_only = pytest.mark.skipif(
    services.vendor() != "postgresql", reason="about PostgreSQL alone"
)
pools_only = pytest.mark.skipif(not services.has_pools(), reason="no Django with pools, or no pool")

Configure = Callable[..., None]


def ours(messages: list[CheckMessage]) -> dict[str, CheckMessage]:
    """The messages of connguard by short id, each of which may come only once."""
    found = [
        (str(message.id).removeprefix("django_connguard."), message)
        for message in messages
        if str(message.id).startswith("django_connguard.")
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def static() -> dict[str, CheckMessage]:
    return ours(run_checks(tags=["connguard"]))


def asked(*aliases: str) -> dict[str, CheckMessage]:
    return ours(run_checks(tags=[Tags.database], databases=list(aliases or ["default"])))


@contextmanager
def configured(name: str, **changes: Any) -> Iterator[None]:
    """A second alias in DATABASES, the default one's settings with some changed.

    Django's test cases do not let it connect; tests.server.alias is for that.
    """
    connections.settings[name] = {**connection.settings_dict, **changes}
    try:
        yield
    finally:
        made = getattr(connections._connections, name, None)  # type: ignore[attr-defined]
        if made:
            made.close()
            del connections[name]
        del connections.settings[name]


# By settings alone


def test_the_settings_of_a_new_project_are_in_order(tmp_path: Path) -> None:
    # A real one: Django's template, connguard added as the README says.
    def run(*arguments: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "django", "startproject", "shop", ".")
    with (tmp_path / "shop" / "settings.py").open("a") as file:
        file.write("\nINSTALLED_APPS.append('django_connguard')\n")
    assert "no issues (0 silenced)" in run("manage.py", "check", "--database", "default")
    # It can fail, where nothing else about the project changes.
    with (tmp_path / "shop" / "settings.py").open("a") as file:
        file.write("\nCONNGUARD = {'PROCESSES': 8}\n")
    with pytest.raises(AssertionError, match="E003"):
        run("manage.py", "check")


@server_only
@pytest.mark.parametrize("age", [600, 0.5, None])
def test_persistent_connections_without_health_checks_are_told(
    database: Configure, age: float | None
) -> None:
    database(CONN_MAX_AGE=age)
    [(check, message)] = static().items()
    assert connection.connection is None
    assert (check, message.level) == ("W001", WARNING)
    assert f"'default' has CONN_MAX_AGE={age!r} without CONN_HEALTH_CHECKS" in message.msg
    assert "CONN_HEALTH_CHECKS=True" in str(message.hint)


@server_only
@pytest.mark.parametrize(
    "given",
    [
        {"CONN_MAX_AGE": 0},
        {"CONN_MAX_AGE": 600, "CONN_HEALTH_CHECKS": True},
        {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True},
        {"CONN_MAX_AGE": "600"},  # Django fails on it at the first connect; it must not fail here
    ],
)
def test_what_is_healthy_or_closed_at_once_is_in_order(
    database: Configure, given: dict[str, Any]
) -> None:
    database(**given)
    assert static() == {}


@server_only
def test_the_alias_that_is_wrong_is_the_one_that_is_named(database: Configure) -> None:
    with configured("reports", CONN_MAX_AGE=60):
        assert "alias 'reports'" in static()["W001"].msg


@server_only
def test_an_alias_whose_back_end_cannot_be_loaded_does_not_break_the_checks(
    database: Configure,
) -> None:
    database(CONN_MAX_AGE=600)
    with configured("broken", ENGINE="no.such.backend"):
        assert set(static()) == {"W001"}


@server_only
def test_a_check_is_silenced_by_its_id(database: Configure) -> None:
    database(CONN_MAX_AGE=600)
    assert not static()["W001"].is_silenced()
    with override_settings(SILENCED_SYSTEM_CHECKS=["django_connguard.W001"]):
        assert static()["W001"].is_silenced()


@server_only
def test_persistent_connections_under_asgi_are_told(database: Configure) -> None:
    database(CONN_MAX_AGE=600, CONN_HEALTH_CHECKS=True)
    with override_settings(ASGI_APPLICATION="shop.asgi.application"):
        [(check, message)] = static().items()
        assert (check, message.level) == ("W003", WARNING)
        assert "'default' has CONN_MAX_AGE=600, and ASGI_APPLICATION is set" in message.msg
        database(CONN_MAX_AGE=0)
        assert static() == {}


@sqlite_only
@pytest.mark.parametrize("name", [":memory:", "file:shared?mode=memory&cache=shared", "db.sqlite3"])
def test_sqlite_has_no_server_that_could_drop_or_refuse_a_connection(
    database: Configure, name: str
) -> None:
    with (
        configured("files", NAME=name, CONN_MAX_AGE=None),
        override_settings(
            ASGI_APPLICATION="shop.asgi.application",
            CONNGUARD={"PROCESSES": {"web": {"processes": 10_000}}},
        ),
    ):
        assert static() == {}
        assert asked("files") == {}


def test_an_alias_left_empty_is_in_order(database: Configure) -> None:
    # As Django's documentation on multiple databases has it for a default that nobody uses.
    processes = {"PROCESSES": {"web": {"processes": 10_000}}}
    with (
        configured("unused", ENGINE="django.db.backends.dummy"),
        override_settings(CONNGUARD=processes),
    ):
        assert static() == {}
        assert asked("unused") == {}


@pools_only
@pytest.mark.parametrize("age", [600, None])
def test_a_pool_with_conn_max_age_is_an_error_as_django_refuses_it(
    database: Configure, age: int | None
) -> None:
    both = {"CONN_MAX_AGE": age, "CONN_HEALTH_CHECKS": True, "OPTIONS": {"pool": True}}
    with configured("pooled", **both):
        [(check, message)] = static().items()
    assert (check, message.level) == ("E004", ERROR)
    assert f"'pooled' has OPTIONS['pool'] and CONN_MAX_AGE={age!r}" in message.msg
    with alias("refused", **both) as name, pytest.raises(ImproperlyConfigured):
        connections[name].ensure_connection()


@pools_only
@pytest.mark.parametrize("pool", [True, {"min_size": 1}, {"min_size": 1, "check": None}])
def test_a_pool_that_checks_nothing_is_told(database: Configure, pool: Any) -> None:
    with configured("pooled", OPTIONS={"pool": pool}):
        [(check, message)] = static().items()
        assert (check, message.level) == ("W002", WARNING)
        assert "'pooled' has OPTIONS['pool'] without CONN_HEALTH_CHECKS" in message.msg


@pools_only
@pytest.mark.parametrize(
    "given",
    [
        {"CONN_HEALTH_CHECKS": True, "OPTIONS": {"pool": True}},
        {"OPTIONS": {"pool": {"check": print}}},
        {"OPTIONS": {"pool": False}},
    ],
)
def test_a_pool_that_checks_and_no_pool_are_in_order(
    database: Configure, given: dict[str, Any]
) -> None:
    with configured("pooled", **given):
        assert static() == {}
        assert "pooled" not in connections["pooled"]._connection_pools  # type: ignore[attr-defined]


# Against the server


UNREACHABLE = {"HOST": "127.0.0.1", "PORT": "1", "PASSWORD": "s3cret", "CONN_MAX_AGE": 600}


def idle_after(seconds: int) -> dict[str, Any]:
    """OPTIONS by which the server ends a session that is idle for so long."""
    if services.vendor() == "postgresql":
        return {"options": f"-c idle_session_timeout={seconds}s"}
    return {"init_command": f"SET wait_timeout = {seconds}"}


@server_only
@pytest.mark.parametrize("age", [61, None])
def test_an_age_past_the_servers_idle_limit_is_told_with_both(
    database: Configure, age: int | None
) -> None:
    database(CONN_MAX_AGE=age, OPTIONS=idle_after(60))
    [(check, message)] = asked().items()
    assert (check, message.level) == ("W004", WARNING)
    assert f"'default' has CONN_MAX_AGE={age!r}" in message.msg
    setting = {"postgresql": "idle_session_timeout", "mysql": "wait_timeout"}[connection.vendor]
    assert f"idle for 60 s ({setting})" in message.msg
    assert "less than 60" in str(message.hint)


@server_only
@pytest.mark.parametrize(
    "given",
    [
        {"CONN_MAX_AGE": 60},
        {"CONN_MAX_AGE": 0},
        {"CONN_MAX_AGE": 600, "CONN_HEALTH_CHECKS": True},
    ],
)
def test_an_age_that_the_server_does_not_cut_short_or_that_is_checked_is_in_order(
    database: Configure, given: dict[str, Any]
) -> None:
    database(**given, OPTIONS=idle_after(60))
    assert asked() == {}


@postgresql_only
def test_a_server_without_an_idle_limit_leaves_any_age_in_order(database: Configure) -> None:
    database(CONN_MAX_AGE=None, OPTIONS=idle_after(0))
    assert asked() == {}


@postgresql_only
def test_a_limit_of_the_role_alone_counts(database: Configure) -> None:
    name = f"connguard_idle_{os.getpid()}"
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'pw'")
        cursor.execute(f"ALTER ROLE {name} SET idle_session_timeout = '1500ms'")
    try:
        with alias("plain", USER=name, PASSWORD="pw", CONN_MAX_AGE=600):
            assert "idle for 1.5 s (idle_session_timeout)" in asked("plain")["W004"].msg
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"DROP ROLE {name}")


@server_only
def test_the_server_is_asked_for_the_given_aliases_alone(database: Configure) -> None:
    database(CONN_MAX_AGE=600, OPTIONS=idle_after(60))
    with alias("down", **UNREACHABLE):
        assert set(asked("default")) == {"W004"}
        # Ours alone, since Django's own check of MySQL raises where there is no server.
        assert [message.id for message in check_servers(databases=["down"])] == [
            "django_connguard.E005"
        ]
        assert check_servers(databases=None) == []


def usable() -> int:
    with probe_for("default") as probe:
        count = probe.capacity().usable
    assert count is not None
    return count


@server_only
def test_more_threads_than_the_server_has_room_for_are_told_with_the_sum_by_role(
    database: Configure,
) -> None:
    room = usable()
    workers = {"web": {"processes": 2, "threads": 3}, "celery": {"processes": room - 5}}
    with override_settings(CONNGUARD={"PROCESSES": workers}):
        [(check, message)] = asked().items()
    assert (check, message.level) == ("W005", WARNING)
    assert f"{room + 1} connections (web 6, celery {room - 5}; " in message.msg
    with probe_for("default") as probe:
        capacity = probe.capacity()
    assert f"more than the {room} " in message.msg
    assert f"max_connections {capacity.maximum}, reserved {capacity.reserved})" in message.msg


@server_only
def test_as_many_threads_as_the_server_has_room_for_are_in_order(database: Configure) -> None:
    room = usable()
    workers = {"web": {"processes": 2, "threads": 3}, "celery": {"processes": room - 7}, "beat": {}}
    with override_settings(CONNGUARD={"PROCESSES": workers}):
        assert asked() == {}


@server_only
def test_aliases_on_one_server_are_summed_and_told_once(database: Configure) -> None:
    half = usable() // 2
    workers = {"CONNGUARD": {"PROCESSES": {"celery": {"threads": half + 1}}}}
    with override_settings(**workers):
        assert asked() == {}
        with configured("reports"):
            for aliases in (["default"], ["default", "reports"]):
                # Ours alone, since Django's own check of MySQL connects to each alias.
                message = ours(check_servers(databases=aliases))["W005"].msg
                assert f"{2 * (half + 1)} connections" in message
                assert "'default' + 'reports'" in message
        with configured("elsewhere", HOST="db.example.com"):
            assert asked("default") == {}


@pools_only
@pytest.mark.parametrize(("pool", "each"), [({"min_size": 1, "max_size": 3}, 3), (True, 4)])
def test_a_process_with_a_pool_opens_at_most_its_max_size(
    database: Configure, pool: Any, each: int
) -> None:
    database(OPTIONS={"pool": pool}, CONN_HEALTH_CHECKS=True)
    room = usable()
    for processes, told in ((room // each, False), (room // each + 1, True)):
        workers = {"web": {"processes": processes, "threads": 1000}}
        with override_settings(CONNGUARD={"PROCESSES": workers}):
            message = asked().get("W005")
        assert bool(message) == told
    assert message is not None
    assert f"web {(room // each + 1) * each};" in message.msg


@pytest.mark.parametrize(
    "value",
    [
        8,
        ["web"],
        {"web": 8},
        {"web": {"processes": 0}},
        {"web": {"threads": True}},
        {"web": {"processes": 1.5}},
        {"web": {"thread": 8}},
    ],
)
def test_malformed_processes_are_an_error_and_count_as_none(value: Any) -> None:
    with override_settings(CONNGUARD={"PROCESSES": value}):
        message = static()["E003"]
        assert asked() == {}
    assert "CONNGUARD['PROCESSES'] must be a dict of roles" in message.msg
    assert repr(value) in message.msg


@pytest.fixture
def check(database: Configure, tmp_path: Path) -> Run:
    """`manage.py check`, on the test database."""
    return Run(tmp_path, "check")


@server_only
def test_the_command_asks_the_server_for_the_alias_that_it_is_given(check: Run) -> None:
    done = check("--database", "default", CONN_MAX_AGE=600, OPTIONS=idle_after(60))
    assert done.returncode == 0
    assert "(django_connguard.W004)" in done.stderr
    assert "(django_connguard.W001)" in done.stderr
    done = check(CONN_MAX_AGE=600, OPTIONS=idle_after(60))
    assert "(django_connguard.W001)" in done.stderr
    assert "W004" not in done.stderr


@postgresql_only  # on MySQL a check of Django's own raises
def test_the_command_tells_an_unreachable_server_without_a_traceback(check: Run) -> None:
    done = check("--database", "default", **UNREACHABLE)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("(django_connguard.E005)") == 1
    assert "cannot reach alias 'default' at 127.0.0.1:1: " in done.stderr
    assert "HINT: Start the server" in done.stderr
    assert "s3cret" not in done.stderr


@server_only
def test_an_unreachable_server_is_one_error(database: Configure) -> None:
    processes = {"PROCESSES": {"web": {"processes": 4}}}
    with alias("down", **UNREACHABLE), override_settings(CONNGUARD=processes):
        [message] = check_servers(databases=["down"])
    assert (message.id, message.level) == ("django_connguard.E005", ERROR)
    assert "cannot reach alias 'down' at 127.0.0.1:1: " in message.msg


@server_only
def test_nothing_to_ask_needs_no_server(check: Run) -> None:
    if services.vendor() == "mysql":
        pytest.skip("a check of Django's own asks MySQL in any case")
    done = check("--database", "default", **{**UNREACHABLE, "CONN_MAX_AGE": 0})
    assert (done.returncode, done.stdout.strip()) == (
        0,
        "System check identified no issues (0 silenced).",
    )


def test_the_checks_need_no_rich(check: Run) -> None:
    code = "import sys, django; django.setup(); print('rich' in sys.modules)"
    assert check.script(code).stdout.strip() == "False"
