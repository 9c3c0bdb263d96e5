"""sqlite3."""

from __future__ import annotations

import os

from django_connguard.drivers.link import IDLE, IN_TRANSACTION, Link


class SQLiteLink(Link):
    """sqlite3: no server, but a transaction left open locks the database for everyone."""

    def state(self) -> int:
        connection = self.connection
        if connection.in_transaction or (
            self.wrapper.autocommit and connection.isolation_level is not None
        ):
            return IN_TRANSACTION
        return IDLE

    def session(self) -> int | None:
        return os.getpid()  # whose open handles the system lists
