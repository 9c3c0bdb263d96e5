"""psycopg 3 and psycopg2."""

from __future__ import annotations

import sys
from functools import cache

from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.drivers.cancelling import bounded, elsewhere, on_backend
from django_connguard.drivers.link import BROKEN, BUSY, IDLE, IN_TRANSACTION, SocketLink

# libpq's PGTransactionStatusType: idle, active, in transaction, in error, unknown (broken).
_LIBPQ_STATES = (IDLE, BUSY, IN_TRANSACTION, IN_TRANSACTION, BROKEN)


@cache
def _has_cancel_safe() -> bool:
    try:
        from psycopg import capabilities
    except ImportError:  # psycopg 3.1
        return False
    return capabilities.has_cancel_safe()


class PsycopgLink(SocketLink):
    """psycopg 3."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        self._pgconn = self.connection.pgconn

    def state(self) -> int:
        state = _LIBPQ_STATES[self._pgconn.transaction_status]
        if not state and self.connection.autocommit != self.wrapper.autocommit:
            return IN_TRANSACTION  # set_autocommit() was interrupted
        return state

    def session(self) -> int | None:
        return int(self._pgconn.backend_pid)

    def cancel(self, timeout: float) -> None:
        if self.state() != BUSY:
            return
        if _has_cancel_safe():
            self.connection.cancel_safe(timeout=timeout)
        else:  # psycopg 3.1, or a libpq before 17: there cancel_safe() heeds no limit
            bounded(self.connection.cancel, timeout)


class Psycopg2Link(SocketLink):
    """psycopg2."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        self._session = int(self.connection.get_backend_pid())

    def state(self) -> int:
        connection = self.connection
        if connection.closed:
            return BROKEN
        state = _LIBPQ_STATES[connection.get_transaction_status()]
        if not state and connection.autocommit != self.wrapper.autocommit:
            return IN_TRANSACTION
        return state

    def session(self) -> int | None:
        return self._session

    def cancel(self, timeout: float) -> None:
        state = self.state()
        if state == BUSY:
            bounded(self.connection.cancel, timeout)
        elif state == BROKEN and sys.modules["psycopg2.extensions"].get_wait_callback():
            # Under gevent, say, psycopg2 drops a connection on which a query is interrupted.
            query = on_backend("pg_cancel_backend", self._session, self.port)
            bounded(lambda: elsewhere(self.wrapper, query, timeout), timeout)
