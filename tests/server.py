"""The test database as its server sees it, through an administrator's own connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from tests import services


class Server:
    """Counts and ends sessions of the test database, its own and the test thread's excepted."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        self._wrapper = wrapper
        self._hidden: set[int] = set()

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        with self._wrapper.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall()) if cursor.description else []

    def sessions(self) -> dict[int, tuple[str, str]]:
        """Return what each session does: id to (state, query)."""
        if services.vendor() == "postgresql":
            found = self.rows(
                "SELECT pid, coalesce(state, ''), query FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
        else:
            # Not from information_schema: a thousand such queries a minute, some of them beside
            # sessions that end, have brought MariaDB 10.11 down (in free_tmp_table()).
            [(database, own)] = self.rows("SELECT DATABASE(), CONNECTION_ID()")
            listed = self.rows("SHOW FULL PROCESSLIST")
            found = [
                (number, command, info or "")
                for number, _, _, name, command, _, _, info, *_ in listed
                if name == database and number != own
            ]
        return {row[0]: (row[1], row[2]) for row in found if row[0] not in self._hidden}

    def hide_present(self) -> None:
        """Count only what is opened from now on."""
        self._hidden = set(self.sessions())

    def count(self) -> int:
        return len(self.sessions())

    def settles_at(self, expected: int) -> bool:
        """Return whether so many sessions are open; a server takes a moment to see one end."""
        return eventually(lambda: self.count() == expected)

    def idle_in_transaction(self) -> int:
        sessions = self.sessions()
        if services.vendor() == "postgresql":
            return sum(state.startswith("idle in transaction") for state, _ in sessions.values())
        rows = self.rows("SELECT trx_mysql_thread_id FROM information_schema.innodb_trx")
        in_transaction = {number for (number,) in rows}
        return sum(
            number in in_transaction and state == "Sleep" for number, (state, _) in sessions.items()
        )

    def running(self, text: str) -> int:
        """Return how many sessions run a query that contains ``text``."""
        return sum(
            text.lower() in query.lower() and state in ("active", "Query", "Execute")
            for state, query in self.sessions().values()
        )

    def end(self, session: int) -> None:
        """Terminate one session; raises DatabaseError on MySQL if it has ended meanwhile."""
        if services.vendor() == "postgresql":
            self.rows(f"SELECT pg_terminate_backend({session})")
        else:
            self.rows(f"KILL CONNECTION {session}")

    def end_all(self) -> None:
        """Terminate every session counted, and wait until the server has done so."""
        self.end_present()
        assert self.settles_at(0)

    def end_present(self) -> None:
        """Terminate every session counted; a pool may open others meanwhile."""
        present = set(self.sessions())
        for session in present:
            self.end(session)
        assert eventually(lambda: not present & set(self.sessions()))
        time.sleep(0.05)  # for the goodbye to arrive at the client


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Return whether the condition comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def watch() -> Iterator[Server]:
    """Give a view of the test database in which what is open now does not count."""
    wrapper = connection.copy()
    server = Server(wrapper)
    try:
        wrapper.inc_thread_sharing()  # async tests look from a thread of their own
        wrapper.ensure_connection()
        server.hide_present()
        yield server
    finally:
        wrapper.close()


@contextmanager
def alias(name: str, **changes: Any) -> Iterator[str]:
    """A second alias, the default one's settings with some changed."""
    # Not in connections.settings, of which Django's test cases allow only the declared aliases.
    kind = type(connections["default"])
    connections[name] = kind({**connection.settings_dict, **changes}, name)
    try:
        yield name
    finally:
        connections[name].close()
        del connections[name]


def backend_id(wrapper: BaseDatabaseWrapper | None = None) -> int:
    """Return the server's number of a connection (this thread's), and so open it if need be."""
    wrapper = wrapper or connections["default"]
    sql = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}
    with wrapper.cursor() as cursor:
        cursor.execute(sql[wrapper.vendor])
        return int(cursor.fetchone()[0])


def query() -> int:
    """Run the smallest query."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        one: int = cursor.fetchone()[0]
        return one
