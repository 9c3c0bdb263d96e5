"""What the probes say, against what real connections to a real server are doing."""

from __future__ import annotations

import gc
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.sqlite3.base import DatabaseWrapper as SQLiteWrapper

from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.probe import ServerConnection, probe_for
from tests import services
from tests.server import alias, backend_id

pytestmark = pytest.mark.django_db(transaction=True)

server_only = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")
sqlite_only = pytest.mark.skipif(services.vendor() != "sqlite", reason="about SQLite's files")
postgresql_only = pytest.mark.skipif(
    services.vendor() != "postgresql", reason="about PostgreSQL alone"
)


def listed(alias: str = "default") -> list[ServerConnection]:
    with probe_for(alias) as probe:
        return probe.connections()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a server has noticed what a client did; fail if it never does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, listed()
        # InnoDB lists its transactions anew only if nobody has asked for 0.1 s.
        time.sleep(0.15)


@pytest.fixture(autouse=True)
def quiet(transactional_db: None) -> None:
    """Start with this thread's connection alone: servers forget closed ones a little later.

    So they do with the probe that looks here, wherefore tests must wait as well.
    """
    gc.collect()  # closes what an earlier test has left in a cycle
    connection.ensure_connection()
    eventually(lambda: len(listed()) == 1)


@contextmanager
def opened(count: int) -> Iterator[list[BaseDatabaseWrapper]]:
    with ExitStack() as stack:
        copies = [connection.copy() for _ in range(count)]
        for copy in copies:
            copy.ensure_connection()
            stack.callback(copy.close)
        yield copies


@contextmanager
def table(name: str) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {name} (x integer)")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE {name}")


def session_of(wrapper: BaseDatabaseWrapper, alias: str = "default") -> ServerConnection:
    number = backend_id(wrapper)
    [found] = [session for session in listed(alias) if session.id == number]
    return found


def test_n_more_connections_are_n_more_sessions() -> None:
    with opened(5):
        eventually(lambda: len(listed()) == 6)
    eventually(lambda: len(listed()) == 1)


def test_connections_of_other_threads_are_counted() -> None:
    ready, done = threading.Barrier(4), threading.Event()

    def hold() -> None:
        connection.ensure_connection()
        ready.wait()
        done.wait()
        connection.close()

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        eventually(lambda: len(listed()) == 4)
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_the_probe_counts_neither_itself_nor_in_the_servers_total() -> None:
    connection.close()
    eventually(lambda: not listed())
    with probe_for("default") as probe:
        eventually(lambda: probe.connections() == [])
        before = probe.capacity().in_use
        assert before is not None
        with opened(2):
            eventually(lambda: len(probe.connections()) == 2)


def test_the_probe_uses_its_own_connection_inside_the_callers_transaction() -> None:
    with transaction.atomic():
        mine = connection.connection
        with probe_for("default") as probe:
            eventually(lambda: len(probe.connections()) == 1)
        assert connection.connection is mine
        assert connection.in_atomic_block


def test_a_probe_may_be_read_by_another_thread_than_the_one_that_made_it() -> None:
    counts: list[int] = []
    with probe_for("default") as probe:
        eventually(lambda: len(probe.connections()) == 1)  # the one before it is gone
        reader = threading.Thread(target=lambda: counts.append(len(probe.connections())))
        reader.start()
        reader.join()
    assert counts == [1]


@server_only
def test_sessions_tell_who_they_are_and_how_long_they_have_been_idle() -> None:
    session = session_of(connection)
    assert session.user == connection.settings_dict["USER"]
    assert session.state == "idle"
    assert session.client
    assert session.idle is not None
    if connection.vendor == "postgresql":
        assert session.age is not None
        assert session.age >= session.idle


@server_only
def test_an_open_transaction_without_a_query_is_idle_in_transaction() -> None:
    with table("probed"), opened(1) as [other]:
        other.set_autocommit(False)
        with other.cursor() as cursor:
            # A table must be touched: InnoDB begins its transaction no earlier.
            cursor.execute("SELECT count(*) FROM probed")
        number = _id_without_a_query(other)
        eventually(lambda: {s.id: s.state for s in listed()}.get(number) == "idle in transaction")
        other.rollback()
        eventually(lambda: {s.id: s.state for s in listed()}.get(number) == "idle")


def _id_without_a_query(wrapper: BaseDatabaseWrapper) -> int:
    driver: Any = wrapper.connection
    if wrapper.vendor == "mysql":
        return int(driver.thread_id())
    return int(driver.info.backend_pid)


@server_only
def test_a_session_that_runs_a_query_is_active() -> None:
    sleep = {"postgresql": "SELECT pg_sleep(30)", "mysql": "SELECT SLEEP(30)"}[connection.vendor]
    stop = {"postgresql": "SELECT pg_cancel_backend({})", "mysql": "KILL QUERY {}"}
    number: list[int] = []

    def work() -> None:
        number.append(backend_id())
        try:
            with connection.cursor() as cursor:
                cursor.execute(sleep)
        except Exception:
            pass  # it is cancelled below
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        eventually(lambda: any(s.state == "active" and s.id in number for s in listed()))
        [busy] = [s for s in listed() if s.id in number]
        assert busy.idle is None
    finally:
        with connection.cursor() as cursor:
            cursor.execute(stop[connection.vendor].format(number[0]))
        thread.join()


@server_only
def test_capacity_is_the_servers_maximum_less_what_it_reserves() -> None:
    with opened(3), probe_for("default") as probe:
        capacity = probe.capacity()
    assert capacity.maximum is not None
    assert capacity.in_use is not None
    assert capacity.in_use >= 4
    assert capacity.usable == capacity.maximum - capacity.reserved
    assert capacity.headroom == capacity.usable - capacity.in_use
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SHOW superuser_reserved_connections")
            assert capacity.reserved >= int(cursor.fetchone()[0])


@postgresql_only
def test_the_application_name_of_a_session_is_told() -> None:
    options = {**connection.settings_dict["OPTIONS"], "application_name": "billing [worker]"}
    with alias("billing", OPTIONS=options) as name:
        assert session_of(connections[name]).application == "billing [worker]"


@pytest.fixture
def plain_role() -> Iterator[str]:
    """A role that may connect and nothing else."""
    name, database = f"connguard_{os.getpid()}", connection.settings_dict["NAME"]
    create, drop = {
        "postgresql": ([f"CREATE ROLE {name} LOGIN PASSWORD 'pw' CONNECTION LIMIT 7"], "ROLE"),
        "mysql": (
            [
                f"CREATE USER '{name}'@'%' IDENTIFIED BY 'pw' WITH MAX_USER_CONNECTIONS 7",
                f"GRANT SELECT ON `{database}`.* TO '{name}'@'%'",
            ],
            "USER",
        ),
    }[connection.vendor]
    with connection.cursor() as cursor:
        for statement in create:
            cursor.execute(statement)
    try:
        yield name
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"DROP {drop} {name}")


@server_only
def test_a_role_without_privileges_counts_what_it_may_and_is_told_the_rest(
    plain_role: str,
) -> None:
    with alias("plain", USER=plain_role, PASSWORD="pw") as name, opened(2):
        mine = session_of(connections[name], name)
        assert (mine.user, mine.state) == (plain_role, "idle")
        with probe_for(name) as probe:
            # The server may still be about to end what an earlier test has closed.
            eventually(lambda: len(probe.connections()) <= 4)
            sessions, capacity, notes = probe.connections(), probe.capacity(), probe.notes()
        assert capacity.in_use is not None
        assert capacity.in_use >= 4
        assert any("At most 7 connections" in note for note in notes)
        if connection.vendor == "postgresql":
            assert len(sessions) == 4
            assert sum(session.state == "hidden" for session in sessions) == 3
            assert any(f"GRANT pg_monitor TO {plain_role};" in note for note in notes)
        else:
            assert [session.id for session in sessions] == [mine.id]
            assert any(f"GRANT PROCESS ON *.* TO '{plain_role}'@'%';" in note for note in notes)


@server_only
def test_the_privilege_that_the_note_names_is_enough(plain_role: str) -> None:
    grant = {
        "postgresql": f"GRANT pg_monitor TO {plain_role}",
        "mysql": f"GRANT PROCESS ON *.* TO '{plain_role}'@'%'",
    }[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(grant)
    with alias("plain", USER=plain_role, PASSWORD="pw") as name, opened(2):
        with probe_for(name) as probe:
            states = [session.state for session in probe.connections()]
            assert not any("GRANT" in note for note in probe.notes())
        assert states == ["idle"] * 3


@server_only
def test_a_probe_that_lost_its_connection_says_so_and_then_opens_another() -> None:
    kill = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}
    with probe_for("default") as probe:
        with probe_for("default") as witness:
            eventually(lambda: len(witness.connections()) == 2)
            [its] = [s for s in witness.connections() if s.id != backend_id()]
        with connection.cursor() as cursor:
            cursor.execute(kill[connection.vendor].format(its.id))
        eventually(lambda: len(listed()) == 1)
        with pytest.raises(StatsError, match="lost alias 'default' at"):
            probe.connections()
        eventually(lambda: len(probe.connections()) == 1)


@server_only
def test_an_unreachable_server_is_told_in_one_line_with_alias_and_address() -> None:
    with (
        alias("down", HOST="127.0.0.1", PORT="1", PASSWORD="s3cret") as name,
        pytest.raises(StatsError) as caught,
        probe_for(name),
    ):
        pass
    text = str(caught.value)
    assert text.startswith("cannot reach alias 'down' at 127.0.0.1:1: ")
    assert "\n" not in text
    assert "s3cret" not in text


def test_an_unknown_alias_is_told_with_the_known_ones() -> None:
    with pytest.raises(StatsError, match="unknown database alias 'nope'; known: default"):
        probe_for("nope")


def test_a_vendor_nobody_taught_us_gets_a_note_and_no_numbers() -> None:
    class Other(SQLiteWrapper):
        vendor = "oracle"

    connections["other"] = Other({**connection.settings_dict, "NAME": ":memory:"}, "other")
    try:
        with probe_for("other") as probe:
            assert probe.connections() == []
            assert probe.capacity().headroom is None
            assert "cannot ask oracle servers" in probe.notes()[0]
    finally:
        del connections["other"]


@pytest.mark.skipif(services.driver() != "psycopg", reason="Django pools psycopg 3 alone")
def test_the_probe_stays_out_of_djangos_pool() -> None:
    options = {**connection.settings_dict["OPTIONS"], "pool": {"min_size": 1, "max_size": 1}}
    with alias("pooled", OPTIONS=options) as name:
        assert len(listed(name)) == 1
        pools = getattr(connections[name], "_connection_pools", {})
        assert name not in pools


@sqlite_only
def test_handles_of_other_processes_are_counted_while_they_live(tmp_path: Path) -> None:
    hold = (
        "import sqlite3, sys; a, b = (sqlite3.connect(sys.argv[1]) for _ in 'ab');"
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(connection.settings_dict["NAME"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert sum(session.id == process.pid for session in listed()) == 2
        process.communicate()
    assert len(listed()) == 1


@sqlite_only
@pytest.mark.parametrize("form", ["{0}", "file:{0}?mode=rw"])
def test_only_the_file_itself_is_counted(tmp_path: Path, form: str) -> None:
    file = tmp_path / "a b.sqlite3"
    keeper = sqlite3.connect(file)
    keeper.execute("PRAGMA journal_mode=WAL")
    keeper.execute("CREATE TABLE t (x)")
    (tmp_path / "else").mkdir()
    namesake = sqlite3.connect(tmp_path / "else" / file.name)
    with alias("wal", NAME=form.format(file)) as name:
        assert len(listed(name)) == 1
    keeper.close()
    namesake.close()


@sqlite_only
def test_a_missing_file_is_noted_and_not_created(tmp_path: Path) -> None:
    file = tmp_path / "none.sqlite3"
    with alias("missing", NAME=file) as name, probe_for(name) as probe:
        assert probe.connections() == []
        assert "cannot be looked at: No such file" in probe.notes()[0]
    assert not file.exists()


@sqlite_only
def test_a_database_in_memory_is_noted() -> None:
    with alias("memory", NAME=":memory:") as name, probe_for(name) as probe:
        assert probe.connections() == []
        assert "in this process's memory" in probe.notes()[0]
