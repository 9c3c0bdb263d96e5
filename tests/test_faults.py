"""What jobs see of servers that end sessions, stop, or refuse to take more."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from django.db import DatabaseError, InterfaceError, OperationalError, connection, connections

import django_connguard as connguard
from django_connguard.drivers.link import SocketLink, poller
from tests import services
from tests.own_server import own_server
from tests.server import Server, alias, eventually, query

Configure = Callable[..., None]
pytestmark = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")
LOST = (OperationalError, InterfaceError)
JOBS = int(os.environ.get("CONNGUARD_STRESS_JOBS", "2000"))
THREADS = 8
PAUSE = "SELECT pg_sleep(0.002)" if services.vendor() == "postgresql" else "SELECT SLEEP(0.002)"


@dataclass
class Ended:
    """Which sessions were ended."""

    gone: set[int] = field(default_factory=set)

    def at_random(self, server: Server, done: threading.Event) -> None:
        while not done.wait(random.uniform(0.02, 0.1)):
            session = random.choice([*server.sessions(), None])
            if session is None or session in self.gone:
                continue
            with suppress(DatabaseError):  # MySQL's, if it has ended meanwhile
                server.end(session)
            assert eventually(lambda session=session: session not in server.sessions())
            self.gone.add(session)


@pytest.mark.parametrize("health_checks", [False, True])
def test_sessions_ended_at_random_fail_no_job_but_those_they_interrupt(
    server: Server, database: Configure, health_checks: bool
) -> None:
    database(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=health_checks)
    failures: list[tuple[int | None, int | None]] = []
    done = threading.Event()
    ended = Ended()

    def work() -> None:
        def link() -> SocketLink | None:
            from django_connguard.ownership import current

            held = current().held()
            return held[0] if held else None

        @connguard.job
        def run() -> None:
            nonlocal held
            held = None
            with connection.cursor() as cursor:  # where health checks reconnect
                found = link()
                held = found and found.session()
                cursor.execute(PAUSE)

        held: int | None = None
        for _ in range(JOBS // THREADS):
            found = link()
            # The server takes a session off its list a moment before the client can know of it.
            lost = held if found and poller(found.descriptor())(0) else None
            try:
                run()
            except LOST:
                failures.append((held, lost))

    before = connguard.stats()["default"]
    killer = threading.Thread(target=ended.at_random, args=(server, done))
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    server._wrapper.inc_thread_sharing()
    for thread in [killer, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    killer.join()
    assert len(ended.gone) > 3
    # No session fails two jobs (None: one that was ended while it was being opened).
    assert all(
        number == 1 for held, number in Counter(held for held, _ in failures).items() if held
    )
    # A job before which the end of the thread's session had arrived has got another one.
    assert [held for held, lost in failures if held and held == lost] == []
    assert {held for held, _ in failures if held} <= ended.gone
    assert len(failures) <= len(ended.gone)
    after = connguard.stats()["default"]
    closed = {
        reason: number - before["closed"][reason] for reason, number in after["closed"].items()
    }
    opened = after["opened"] - before["opened"]
    assert opened == sum(closed.values()) - closed["fork"]
    assert closed["thread_end"] <= THREADS  # less those whose last job was interrupted
    # Django's own health check closes what it finds dead, and tells nobody.
    assert closed["other"] == 0 or health_checks
    assert server.settles_at(0)


def test_a_server_that_stops_and_starts_between_jobs_fails_none(database: Configure) -> None:
    with own_server() as own, alias("own", **own.settings, CONN_MAX_AGE=None) as name:

        @connguard.job
        def work() -> None:
            with connections[name].cursor() as cursor:
                cursor.execute("SELECT 1")

        for _ in range(2):
            work()
            work()
            own.stop()
            own.start()
        work()
        own.stop()
        with pytest.raises(OperationalError):
            work()
        own.start()
        work()
        counted = connguard.stats()[name]
        connections[name].close()
    assert counted["closed"]["stale"] == counted["connect_failures"] + 2 == 3
    assert counted["opened"] == 4


@pytest.fixture
def limited_role(database: Configure) -> Iterator[str]:
    """A role that may have two connections at once."""
    name = f"connguard_limited_{os.getpid()}"
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'pw' CONNECTION LIMIT 2")
        else:
            cursor.execute(
                f"CREATE USER '{name}'@'%' IDENTIFIED BY 'pw' WITH MAX_USER_CONNECTIONS 2"
            )
            schema = connection.settings_dict["NAME"]
            cursor.execute(f"GRANT SELECT ON `{schema}`.* TO '{name}'@'%'")
    yield name
    query()
    with connection.cursor() as cursor:
        kind = "ROLE" if connection.vendor == "postgresql" else "USER"
        cursor.execute(f"DROP {kind} {name}")


def test_a_connection_refused_at_the_maximum_fails_its_job_clearly_and_passes_by_itself(
    limited_role: str,
) -> None:
    with alias("limited", USER=limited_role, PASSWORD="pw", CONN_MAX_AGE=None) as name:
        settings_dict = connections[name].settings_dict

        @connguard.job
        def work() -> None:
            with connections[name].cursor() as cursor:
                cursor.execute("SELECT 1")

        def hold(ready: threading.Barrier, done: threading.Event) -> None:
            connections[name] = type(connections["default"])(settings_dict, name)
            work()
            ready.wait()
            done.wait()

        ready, done = threading.Barrier(3), threading.Event()
        threads = [threading.Thread(target=hold, args=(ready, done)) for _ in range(2)]
        for thread in threads:
            thread.start()
        ready.wait()
        for _ in range(2):
            with pytest.raises(
                OperationalError, match=r"too many connections|max_user_connections"
            ):
                work()
        done.set()
        for thread in threads:
            thread.join()
        assert eventually(lambda: succeeds(work))
        counted = connguard.stats()[name]
        assert counted["connect_failures"] >= 2
        assert counted["opened"] == 3
        assert counted["open"] == 1
        connections[name].close()


def succeeds(work: Callable[[], None]) -> bool:
    try:
        work()
    except OperationalError:
        return False
    return True
