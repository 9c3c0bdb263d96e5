"""connguard.stats() counts what happens to connections, whatever thread it happens in."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.signals import request_finished, request_started
from django.db import OperationalError, connection, connections

import django_connguard as connguard
from django_connguard import hygiene
from django_connguard.ownership import current
from tests import services
from tests.command import Run
from tests.server import Server, alias, eventually, query

Configure = Callable[..., None]


class Change:
    """What has been counted on the default alias since this was made."""

    def __init__(self) -> None:
        self._before = self._flat()

    @staticmethod
    def _flat() -> dict[str, Any]:
        counted: dict[str, Any] = dict(connguard.stats()["default"])
        closed = counted.pop("closed")
        return counted | {f"closed {reason}": number for reason, number in closed.items()}

    def __getitem__(self, name: str) -> Any:
        now = self._flat()
        return now[name] if name in ("open", "busy") else now[name] - self._before[name]

    def nonzero(self) -> dict[str, int]:
        names = [name for name in self._flat() if not name.endswith("_seconds")]
        return {name: self[name] for name in names if self[name]}


@pytest.fixture
def change(database: Configure) -> Change:
    return Change()


def drop() -> None:
    """Make the driver's connection unusable, as a lost network does."""
    connection.connection.close()


def test_jobs_that_reuse_a_connection(database: Configure, change: Change) -> None:
    database(CONN_MAX_AGE=None)
    for _ in range(5):
        connguard.job(query)()
    assert change.nonzero() == {"units": 5, "reused": 4, "opened": 1, "open": 1}


@pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite keeps no such connection")
def test_jobs_at_age_0_close_by_age(change: Change) -> None:
    for _ in range(5):
        connguard.job(query)()
    assert change.nonzero() == {"units": 5, "opened": 5, "closed age": 5}


def test_a_job_without_a_connection_is_not_counted(change: Change) -> None:
    connguard.job(lambda: None)()
    assert change.nonzero() == {}


def test_what_other_code_opens_and_closes_is_counted_as_such(change: Change) -> None:
    query()
    assert change.nonzero() == {"opened": 1, "opened_outside": 1, "open": 1}
    connection.close()
    assert change.nonzero() == {"opened": 1, "opened_outside": 1, "closed other": 1}


def test_a_job_or_a_request_makes_a_connection_busy(database: Configure, change: Change) -> None:
    database(CONN_MAX_AGE=None)
    with connguard.job():
        query()
        assert change["busy"] == change["open"] == 1
    assert (change["busy"], change["open"]) == (0, 1)
    request_started.send(sender=None)
    query()
    assert change["busy"] == 1
    request_finished.send(sender=None)
    assert change["busy"] == 0
    assert change["opened_outside"] == 0


def test_seconds_are_summed(database: Configure, change: Change) -> None:
    database(CONN_MAX_AGE=None)
    for _ in range(2):
        with connguard.job():
            query()
            time.sleep(0.05)
    assert 0.1 <= change["hold_seconds"] < 5
    assert 0 < change["connect_seconds"] < 5


def leave_in_transaction() -> None:
    connection.set_autocommit(False)
    query()


def break_it() -> None:
    query()
    drop()


@pytest.mark.parametrize(
    ("body", "reason"),
    [(leave_in_transaction, hygiene.OPEN_TRANSACTION), (break_it, hygiene.UNUSABLE)],
)
def test_closed_for_what_a_job_did(
    database: Configure, change: Change, body: Callable[[], None], reason: str
) -> None:
    if body is break_it and services.driver() == "sqlite":
        pytest.skip("sqlite3 does not tell that it is closed")
    database(CONN_MAX_AGE=None)
    connguard.job(body)()
    assert change.nonzero() == {"units": 1, "opened": 1, f"closed {reason}": 1}


def test_closed_because_the_server_had(database: Configure, server: Server, change: Change) -> None:
    database(CONN_MAX_AGE=None)
    connguard.job(query)()
    server.end_all()
    connguard.job(query)()
    assert change["closed stale"] == 1
    assert change["opened"] == 2


def test_closed_while_idle(server: Server, database: Configure, change: Change) -> None:
    database(CONN_MAX_AGE=0.2)
    connguard.job(query)()
    assert server.settles_at(0)
    assert change.nonzero() == {"units": 1, "opened": 1, "closed idle": 1}


def test_released(change: Change) -> None:
    query()
    with connguard.released():
        pass
    assert change["closed released"] == 1


def test_threads_that_have_ended_stay_counted(change: Change) -> None:
    for _ in range(50):
        thread = threading.Thread(target=connguard.job(query))
        thread.start()
        thread.join()
    assert change["units"] == change["opened"] == 50
    assert change["open"] == 0


def test_closed_at_a_threads_end(database: Configure, change: Change) -> None:
    database(CONN_MAX_AGE=None)
    thread = threading.Thread(target=query)
    thread.start()
    thread.join()
    assert change.nonzero() == {"opened": 1, "opened_outside": 1, "closed thread_end": 1}


def test_async_jobs_are_counted(database: Configure, change: Change) -> None:
    @connguard.job
    async def work() -> None:
        await sync_to_async(query)()

    async def main() -> None:
        await asyncio.gather(*(work() for _ in range(10)))

    asyncio.run(main())
    assert change["units"] == change["opened"] == 10
    assert eventually(lambda: change["open"] == 0)


def test_no_count_goes_back_as_threads_end_and_connections_are_closed(
    database: Configure, change: Change
) -> None:
    def names() -> dict[str, float]:
        counted = change._flat()
        return {name: counted[name] for name in counted if name not in ("open", "busy")}

    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            thread = threading.Thread(target=lambda: (connguard.job(query)(), cycle()))
            thread.start()
            thread.join()

    def cycle() -> None:
        """Be collected with the thread's owner in a cycle, all weak references at once."""
        loop: list[Any] = [current()]
        loop.append(loop)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        before = names()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            now = names()
            assert {name: now[name] for name in now if now[name] < before[name]} == {}
            before = now
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_every_reason_and_every_alias_is_told_from_the_start(database: Configure) -> None:
    with alias("other"):
        assert set(connguard.stats()) >= {"default"}
        connections["other"].ensure_connection()
        assert connguard.stats()["other"]["opened"] == 1
    for counted in connguard.stats().values():
        assert set(counted["closed"]) == set(hygiene.REASONS)


@pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")
def test_a_refused_connect_is_counted(database: Configure) -> None:
    with alias("down", HOST="127.0.0.1", PORT="1") as name:
        with pytest.raises(OperationalError):
            connections[name].ensure_connection()
        assert connguard.stats()[name]["connect_failures"] == 1
        assert connguard.stats()[name]["opened"] == 0


@pytest.mark.skipif(not services.has_pools(), reason="no pools")
def test_a_connection_goes_back_to_its_pool(database: Configure) -> None:
    options = {**connection.settings_dict["OPTIONS"], "pool": {"min_size": 1, "max_size": 1}}
    with alias("counted_pool", OPTIONS=options) as name:

        @connguard.job
        def work() -> None:
            with connections[name].cursor() as cursor:
                cursor.execute("SELECT 1")

        work()
        work()
        counted = connguard.stats()[name]
        connections[name].close_pool()
    assert counted["closed"]["pool_return"] == counted["opened"] == counted["units"] == 2
    assert counted["open"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
def test_a_forked_child_counts_from_0(connstats: Run, database: Configure) -> None:
    result = connstats.script(
        "import os, django; django.setup()\n"
        "from django.db import connection\n"
        "import django_connguard as connguard\n"
        "connguard.job(connection.ensure_connection)()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    counted = connguard.stats()['default']\n"
        "    assert counted['closed'].pop('fork') == 1\n"
        "    assert not any(counted.pop('closed').values()), counted\n"
        "    assert not any(counted.values()), counted\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert connguard.stats()['default']['opened'] == 1\n",
        CONN_MAX_AGE=None,
    )
    assert result.returncode == 0, result.stderr


def test_exporters_are_told_of_each_closing(database: Configure) -> None:
    told: list[tuple[str, str, float]] = []

    def note(alias: str, reason: str, age: float, **kwargs: Any) -> None:
        told.append((alias, reason, age))
        raise ValueError("on purpose: it must not reach the job")

    database(CONN_MAX_AGE=None)
    connguard.connection_closed.connect(note)
    try:
        connguard.job(leave_in_transaction)()
    finally:
        connguard.connection_closed.disconnect(note)
    [(name, reason, age)] = told
    assert (name, reason) == ("default", "open_transaction")
    assert 0 < age < 5


def test_counts_add_up_while_many_threads_count(database: Configure, change: Change) -> None:
    """No count is lost, and none goes back, though somebody reads all the time."""
    database(CONN_MAX_AGE=None)
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not done.is_set():
            seen.append(connguard.stats()["default"]["units"])

    def work() -> None:
        for _ in range(200):
            connguard.job(query)()

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    done.set()
    reader.join()
    assert seen == sorted(seen)
    assert change["units"] == 2400
    assert change["opened"] == change["closed thread_end"] == 12
