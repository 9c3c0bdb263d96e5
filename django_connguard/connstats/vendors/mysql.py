"""MySQL's and MariaDB's own count of their sessions."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from django.db import DatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.connstats.probe import (
    ACTIVE,
    IDLE,
    IDLE_IN_TRANSACTION,
    Capacity,
    ServerConnection,
    ServerProbe,
)

TRANSACTIONS_KEPT = 0.15  # seconds


class MySQLProbe(ServerProbe):
    """MySQL's and MariaDB's own count, from the process list and status variables."""

    SESSIONS = """
        SELECT ID, USER, HOST, COMMAND, {time} FROM {table}
        WHERE DB = DATABASE() AND ID <> CONNECTION_ID() AND USER <> 'system user' ORDER BY ID
    """
    PROGRAMS = """
        SELECT PROCESSLIST_ID, ATTR_VALUE FROM performance_schema.{table}
        WHERE ATTR_NAME = 'program_name'
    """
    TRANSACTIONS = "SELECT trx_mysql_thread_id FROM information_schema.INNODB_TRX"
    # Access denied to a database, table, column or for want of a privilege; no such table (views
    # that only one of MySQL and MariaDB has).
    REFUSED = frozenset({1044, 1109, 1142, 1143, 1146, 1227})

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        self._transactions: set[int] = set()
        self._transactions_until = -math.inf

    def connections(self) -> list[ServerConnection]:
        programs = dict(self._programs())
        in_transaction = self._in_transaction()
        return [
            ServerConnection(
                id=number,
                application=programs.get(number) or "",
                user=user,
                client="local socket" if host == "localhost" else host,
                state=self._state(command, number in in_transaction),
                age=None,
                idle=max(float(seconds), 0.0) if command == "Sleep" else None,
            )
            for number, user, host, command, seconds in self._sessions()
        ]

    def _in_transaction(self) -> set[int]:
        # InnoDB refreshes this view only if nobody read it for 0.1 s: whoever asks faster reads
        # one old answer for ever (comment on CACHE_MIN_IDLE_TIME_NS in InnoDB's trx0i_s.cc).
        now = time.monotonic()
        if now >= self._transactions_until:
            self._transactions = {row[0] for row in self._query_if_allowed(self.TRANSACTIONS) or ()}
            self._transactions_until = now + TRANSACTIONS_KEPT
        return self._transactions

    @staticmethod
    def _state(command: str, in_transaction: bool) -> str:
        if command != "Sleep":
            return ACTIVE
        return IDLE_IN_TRANSACTION if in_transaction else IDLE

    def _sessions(self) -> list[tuple[Any, ...]]:
        view = "information_schema.PROCESSLIST"
        if self._wrapper.mysql_is_mariadb:
            return self._query(self.SESSIONS.format(table=view, time="TIME_MS / 1000"))
        # MySQL deprecates the old view, which stops the server for a moment; the new one is
        # missing before 8.0.22, and empty where the performance schema is off.
        new = self.SESSIONS.format(table="performance_schema.processlist", time="TIME")
        return self._query_if_allowed(new) or self._query(
            self.SESSIONS.format(table=view, time="TIME")
        )

    def _programs(self) -> list[tuple[Any, ...]]:
        # The second view, of the role's own account, needs no privilege.
        return (
            self._query_if_allowed(self.PROGRAMS.format(table="session_connect_attrs"))
            or self._query_if_allowed(self.PROGRAMS.format(table="session_account_connect_attrs"))
            or []
        )

    def _query_if_allowed(self, sql: str) -> list[tuple[Any, ...]] | None:
        with self._plainly("lost"):
            try:
                return self._fetch(sql)
            except DatabaseError as error:
                if error.args[:1] and error.args[0] in self.REFUSED:
                    return None
                raise

    def capacity(self) -> Capacity:
        [(maximum,)] = self._query("SELECT @@GLOBAL.max_connections")
        [(_, in_use)] = self._query("SHOW GLOBAL STATUS LIKE 'Threads_connected'")
        # The slot for an administrator is kept beyond max_connections, and ours is not counted.
        return Capacity(maximum, reserved=0, in_use=int(in_use) - 1)

    # Its session value: for an interactive client the server takes interactive_timeout instead
    # (MySQL's and MariaDB's manuals, server system variables).
    IDLE_LIMIT = "wait_timeout"

    def idle_limit(self) -> float | None:
        [(seconds,)] = self._query("SELECT @@SESSION.wait_timeout")
        return float(seconds)

    def end(self, sessions: Iterable[int]) -> None:
        for session in sessions:
            with self._plainly("cannot end sessions of"), self._wrapper.cursor() as cursor:
                cursor.execute(f"KILL CONNECTION {session:d}")

    def notes(self) -> list[str]:
        [(account, limit)] = self._query("SELECT CURRENT_USER(), @@SESSION.max_user_connections")
        notes = []
        if limit:
            notes.append(f"At most {limit} connections are allowed to {account}.")
        if self._query_if_allowed(self.TRANSACTIONS) is None:
            user, _, host = account.rpartition("@")
            notes.append(
                f"The account {account} lists only its own connections and cannot tell which of "
                f"them are idle in a transaction; to see all: "
                f"GRANT PROCESS ON *.* TO '{user}'@'{host}';"
            )
        return notes
