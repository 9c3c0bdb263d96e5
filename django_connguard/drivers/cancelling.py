"""Ending a query or a session at the server, in a bounded time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper


def end_session(
    wrapper: BaseDatabaseWrapper, session: int, port: int | None, timeout: float
) -> None:
    """End the session of a process that is gone; ``session`` and ``port`` are what its link had."""
    if wrapper.vendor == "postgresql":
        query = on_backend("pg_terminate_backend", session, port)
        bounded(lambda: elsewhere(wrapper, query, timeout), timeout)
    elif wrapper.vendor == "mysql":
        its = is_in_processlist(session, port)
        kill = f"KILL CONNECTION {session:d}"
        bounded(lambda: elsewhere(wrapper, kill, timeout, only_if=its), timeout)


def on_backend(function: str, session: int, port: int | None) -> str:
    """Return a query that calls a function of PostgreSQL on the backend of a session."""
    return (
        f"SELECT {function}(pid) FROM pg_stat_activity"  # noqa: S608  (numbers)
        f" WHERE pid = {session:d} AND client_port = {port or -1:d}"
    )


def is_in_processlist(session: int, port: int | None) -> str:
    """Return a query that finds something while MySQL lists the session."""
    found = f"SELECT 1 FROM information_schema.processlist WHERE id = {session:d}"  # noqa: S608
    return found if port is None else f"{found} AND host LIKE '%%:{port:d}'"


def bounded(call: Callable[[], Any], timeout: float) -> None:
    """Run a call that knows no time limit; raise what it raises, or TimeoutError."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="connguard-cancel", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {timeout:g} s")
    if raised:
        raise raised[0]


def elsewhere(
    wrapper: BaseDatabaseWrapper, sql: str, timeout: float, only_if: str | None = None
) -> None:
    """Run a statement on a connection of its own, if the query ``only_if`` finds something."""
    seconds = math.ceil(timeout)  # drivers take whole seconds
    other = wrapper.copy()
    options = {**other.settings_dict["OPTIONS"], "connect_timeout": seconds}
    options.pop("pool", None)
    if other.vendor == "mysql":
        options["read_timeout"] = seconds
    other.settings_dict["OPTIONS"] = options
    try:
        with other.cursor() as cursor:
            if only_if is not None:
                cursor.execute(only_if, ())
                if not cursor.fetchone():
                    return
            cursor.execute(sql)
    finally:
        other.close()
