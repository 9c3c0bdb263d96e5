"""mysqlclient and PyMySQL."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.drivers.cancelling import bounded, elsewhere, is_in_processlist
from django_connguard.drivers.link import BROKEN, BUSY, IDLE, IN_TRANSACTION, SocketLink, poller


class MySQLLink(SocketLink):
    """What MySQL's drivers have in common."""

    def session(self) -> int | None:
        return int(self.connection.thread_id())

    def cancel(self, timeout: float) -> None:
        # Also for a broken link: the query that was being read goes on at the server.
        number = self.session() if self.state() in (BUSY, BROKEN) else None
        if number is not None:
            mine = is_in_processlist(number, self.port)
            kill = f"KILL QUERY {number:d}"
            bounded(lambda: elsewhere(self.wrapper, kill, timeout, only_if=mine), timeout)


class MySQLdbLink(MySQLLink):
    """mysqlclient, which does not tell whether a transaction is open: statements are watched."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        wrapper._connguard_begun = False  # type: ignore[attr-defined]
        if _watch_transactions not in wrapper.execute_wrappers:
            # In front, since Django's execute_wrapper() takes its own off the end.
            wrapper.execute_wrappers.insert(0, _watch_transactions)

    def state(self) -> int:
        connection = self.connection
        if not connection.open:
            return BROKEN
        try:
            # The client library answers by itself unless a result is unread or more are to come.
            if connection.next_result() != -1:
                return BUSY
        except Exception:
            return BUSY
        if self.wrapper._connguard_begun or (  # type: ignore[attr-defined]
            self.wrapper.autocommit != connection.get_autocommit()
        ):
            return IN_TRANSACTION
        return IDLE

    def session(self) -> int | None:
        return super().session() if self.connection.open else None


_TRANSACTION_WORD = re.compile(
    r"\s*(?:(?P<begin>BEGIN|START\s+TRANSACTION)|COMMIT|ROLLBACK(?!\s+(?:WORK\s+)?TO))\b", re.I
)


def _watch_transactions(
    execute: Callable[..., Any], sql: str, params: Any, many: bool, context: dict[str, Any]
) -> Any:
    """Note transactions that are begun and ended in SQL (Django's own go past the cursor)."""
    word = _TRANSACTION_WORD.match(sql) if isinstance(sql, str) else None
    begins = word is not None and word["begin"] is not None
    if begins:  # before it is sent: an interrupt may come when the server has obeyed already
        context["connection"]._connguard_begun = True
    result = execute(sql, params, many, context)
    if word and not begins:
        context["connection"]._connguard_begun = False
    return result


_SERVER_STATUS_IN_TRANSACTION = 1  # MySQL's SERVER_STATUS_IN_TRANS


@cache
def _watched(kind: Any) -> Any:
    """Return ``kind``, a class of PyMySQL connections, with a note of an unanswered command."""

    class Watched(kind):  # type: ignore[misc]
        connguard_pending = False

        def _execute_command(self, command: Any, sql: Any) -> None:
            self.connguard_pending = True
            super()._execute_command(command, sql)

        def _read_ok_packet(self) -> Any:
            return self._answered(super()._read_ok_packet)

        def _read_query_result(self, unbuffered: bool = False) -> Any:
            return self._answered(super()._read_query_result, unbuffered)

        def _answered(self, read: Callable[..., Any], *args: Any) -> Any:
            try:
                answer = read(*args)
            except self.Error:  # the server's own answer, or the socket is closed
                self.connguard_pending = False
                raise
            self.connguard_pending = False
            return answer

    return Watched


class PyMySQLLink(MySQLLink):
    """PyMySQL, which drops its own socket when an exception interrupts it in mid-read."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        # The connection itself does not tell: it may be interrupted between any two reads.
        if not hasattr(self.connection, "connguard_pending"):
            kind: Any = type(self.connection)
            self.connection.__class__ = _watched(kind)
        self._socket, self._poll_socket = self.connection._sock, self.poll
        self.poll = self._poll_current
        self._gone = False

    def descriptor(self) -> int:
        fileno: int = self.connection._sock.fileno()
        return fileno

    def _poll_current(self, timeout: int) -> Any:
        if self.connection._sock is not self._socket:  # it reconnected by itself
            self._socket, self._poll_socket = self.connection._sock, poller(self.descriptor())
        return self._poll_socket(timeout)

    def is_usable(self) -> bool:
        # Django's is_usable() lets PyMySQL reconnect, to a session without Django's settings.
        try:
            self.connection.ping(reconnect=False)
        except Exception:
            self._gone = True
            return False
        return True

    def session(self) -> int | None:
        return None if self._gone else super().session()

    def state(self) -> int:
        connection = self.connection
        if connection._sock is None:
            return BROKEN
        result = connection._result
        if connection.connguard_pending or (result is not None and result.unbuffered_active):
            return BUSY
        if (
            connection.server_status & _SERVER_STATUS_IN_TRANSACTION
            or connection.get_autocommit() != self.wrapper.autocommit
        ):
            return IN_TRANSACTION
        return IDLE
