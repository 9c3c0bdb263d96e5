"""What the database server itself counts: its sessions, its limits, and what it will not tell.

Every query is one cheap read that an unprivileged role may make; what the role may not see is
said in the probe's notes, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist
from django.utils.module_loading import import_string

from django_connguard.connstats.errors import StatsError

ACTIVE = "active"
IDLE = "idle"
IDLE_IN_TRANSACTION = "idle in transaction"
HIDDEN = "hidden"  # the session is there, but this role may not see what it does
OPEN = "open"  # SQLite: a handle has no state that others can see

CONNECT_TIMEOUT = 10  # seconds; a server that drops packets must not hang the view for minutes


@dataclass(frozen=True, slots=True)
class ServerConnection:
    """One session as the server lists it; age and idle in seconds, None where it does not tell."""

    id: int  # PostgreSQL's backend pid, MySQL's connection id, SQLite's process holding the file
    application: str
    user: str
    client: str  # host:port or "local socket"
    state: str
    age: float | None  # since it was opened
    idle: float | None  # since its last activity, if it is idle


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many sessions a server allows and has, over all of its databases and users."""

    maximum: int | None
    reserved: int  # out of maximum, for superusers and roles with a privilege
    in_use: int | None

    @property
    def usable(self) -> int | None:
        """What ordinary roles may open."""
        return None if self.maximum is None else self.maximum - self.reserved

    @property
    def headroom(self) -> int | None:
        """How many more sessions ordinary roles may open now."""
        if self.usable is None or self.in_use is None:
            return None
        return max(self.usable - self.in_use, 0)


class Probe:
    """A look at one alias' server; this class serves the vendors that nobody taught us to ask.

    A context manager. Its own connection is opened on entry, closed on exit, and never part of
    what it reports. Any thread may use it, one at a time. Everything raises StatsError where the
    server cannot be asked.
    """

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        self.alias = wrapper.alias
        self.vendor = wrapper.vendor
        # A copy, because the caller's thread may be inside a transaction; Any, because each
        # vendor's class has attributes of its own.
        self._wrapper: Any = wrapper.copy()
        self._wrapper.inc_thread_sharing()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._wrapper.close()

    def connections(self) -> list[ServerConnection]:
        """List the sessions on this alias' database."""
        return []

    def capacity(self) -> Capacity:
        """Count the server's sessions against its limits."""
        return Capacity(maximum=None, reserved=0, in_use=None)

    # The setting of the server that idle_limit() reads.
    IDLE_LIMIT = ""

    def idle_limit(self) -> float | None:
        """Return after how many idle seconds the server ends this alias' sessions; None: never."""
        return None

    def end(self, sessions: Iterable[int]) -> None:
        """Make the server drop these sessions, as it does when it restarts."""
        raise StatsError(f"connstats cannot end sessions on {self.vendor} servers")

    def notes(self) -> list[str]:
        """Say in plain sentences what could not be seen, and what would make it visible."""
        return [f"connstats cannot ask {self.vendor} servers: only Django's settings are shown."]


class ServerProbe(Probe):
    """What the probes that send SQL have in common."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        settings = self._wrapper.settings_dict
        settings["AUTOCOMMIT"] = True
        # Django shares a pool between all wrappers of an alias: stay out of it.
        settings["OPTIONS"].pop("pool", None)
        settings["OPTIONS"].setdefault("connect_timeout", CONNECT_TIMEOUT)

    def __enter__(self) -> Probe:
        # A wrong key or value in OPTIONS reaches the driver as an argument.
        with self._plainly("cannot reach", ImproperlyConfigured, TypeError, ValueError):
            self._wrapper.ensure_connection()
        return self

    @contextmanager
    def _plainly(self, what: str, *more: type[Exception]) -> Iterator[None]:
        kinds: tuple[type[Exception], ...] = (Error, *more)
        try:
            yield
        except kinds as error:
            self._wrapper.close()  # so that the next query starts on a new connection
            place = f"alias {self.alias!r} at {server_address(self._wrapper)}"
            raise StatsError(f"{what} {place}: {first_line(error)}") from error

    def _query(self, sql: str) -> list[tuple[Any, ...]]:
        with self._plainly("lost"):
            return self._fetch(sql)

    def _fetch(self, sql: str) -> list[tuple[Any, ...]]:
        with self._wrapper.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())


PROBES = {
    "postgresql": "django_connguard.connstats.vendors.postgresql.PostgreSQLProbe",
    "mysql": "django_connguard.connstats.vendors.mysql.MySQLProbe",
    "sqlite": "django_connguard.connstats.vendors.sqlite.SQLiteProbe",
}


def probe_for(alias: str) -> Probe:
    """Make the probe of a database alias; raises StatsError where there is no such alias."""
    try:
        wrapper = connections[alias]
    except ConnectionDoesNotExist as error:
        known = ", ".join(connections)
        raise StatsError(f"unknown database alias {alias!r}; known: {known}") from error
    except (ImproperlyConfigured, ImportError) as error:
        raise StatsError(f"alias {alias!r}: {first_line(error)}") from error
    if wrapper.settings_dict["ENGINE"] == "django.db.backends.dummy":
        raise StatsError(f"alias {alias!r} has no ENGINE in settings.DATABASES")
    path = PROBES.get(wrapper.vendor)
    kind: type[Probe] = import_string(path) if path else Probe
    return kind(wrapper)


def server_address(wrapper: BaseDatabaseWrapper) -> str:
    """Where an alias' database is, without any secret: host:port, socket, service or file."""
    settings = wrapper.settings_dict
    if wrapper.vendor == "sqlite":
        return str(settings["NAME"])
    if service := settings["OPTIONS"].get("service"):
        return f"service {service}"
    host, port = settings["HOST"], settings["PORT"]
    if not host or host.startswith("/"):
        return f"local socket {host}".rstrip()
    return f"{host}:{port}" if port else str(host)


def first_line(error: BaseException) -> str:
    """The first line of a driver's message, without the number that MySQL's put before it."""
    text = error.args[1] if len(error.args) > 1 and isinstance(error.args[1], str) else str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)
