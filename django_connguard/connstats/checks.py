"""System checks that ask a server, for the aliases of `manage.py check --database ALIAS`.

Django's migrate and test run them too. A server is asked only where there is something to ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Error, Tags, register
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.checks import has_pool, keeps_connections, with_a_server
from django_connguard.conf import conf
from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.live import pool_sizes
from django_connguard.connstats.probe import PROBES, Probe, probe_for, server_address


@register(Tags.database)
def check_servers(databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Report what does not fit the server (W004, W005), or that it cannot be asked (E005)."""
    found: list[CheckMessage] = []
    counted: set[tuple[Any, ...]] = set()
    for alias in databases or ():
        wrapper = connections[alias]
        place = _server(wrapper)
        asks_age = _relies_on_age(wrapper)
        asks_room = bool(conf.PROCESSES) and place not in counted
        counted.add(place)
        try:
            if (asks_age or asks_room) and wrapper.vendor in PROBES:
                with probe_for(alias) as probe:
                    found += past_idle_limit(wrapper, probe) if asks_age else ()
                    found += more_than_fit(wrapper, probe) if asks_room else ()
        except StatsError as error:
            found.append(
                Error(
                    f"The database server cannot be checked: {error}",
                    hint="Start the server, or correct the alias in DATABASES; or leave this "
                    "alias out of --database.",
                    id="django_connguard.E005",
                )
            )
    return found


def _relies_on_age(wrapper: BaseDatabaseWrapper) -> bool:
    # Health checks replace what the server has ended, whatever the age.
    checked = wrapper.settings_dict["CONN_HEALTH_CHECKS"]
    return keeps_connections(wrapper) and not checked and not has_pool(wrapper)


def past_idle_limit(wrapper: BaseDatabaseWrapper, probe: Probe) -> Iterator[CheckMessage]:
    """W004. Source: Django's documentation, "Databases": CONN_MAX_AGE wants to be the lower one."""
    age = wrapper.settings_dict["CONN_MAX_AGE"]
    limit = probe.idle_limit()
    if limit is None or (age is not None and age <= limit):
        return
    yield checks.Warning(
        f"Database alias {wrapper.alias!r} has CONN_MAX_AGE={age!r} without CONN_HEALTH_CHECKS, "
        f"but its server ends a session that is idle for {limit:g} s ({probe.IDLE_LIMIT}): the "
        "request that comes after such a pause fails. A connguard job gets a new connection.",
        hint=f"Set CONN_MAX_AGE to less than {limit:g}, or CONN_HEALTH_CHECKS=True.",
        id="django_connguard.W004",
    )


def more_than_fit(wrapper: BaseDatabaseWrapper, probe: Probe) -> Iterator[CheckMessage]:
    """W005. Every thread may hold one connection of each alias; a pool, its max_size a process."""
    capacity = probe.capacity()
    sharing = [other for other in with_a_server() if _server(other) == _server(wrapper)]
    by_role = {
        role: sum(_most(alias, **counts) for alias in sharing)
        for role, counts in conf.PROCESSES.items()
    }
    total = sum(by_role.values())
    if capacity.usable is None or total <= capacity.usable:
        return
    names = " + ".join(repr(alias.alias) for alias in sharing)
    roles = ", ".join(f"{role} {count}" for role, count in by_role.items())
    yield checks.Warning(
        f"The processes of CONNGUARD['PROCESSES'] may open {total} connections ({roles}; database "
        f"alias {names}), more than the {capacity.usable} that ordinary roles may open at "
        f"{server_address(wrapper)} (max_connections {capacity.maximum}, reserved "
        f"{capacity.reserved}).",
        hint="Run fewer processes or threads, pool connections (OPTIONS['pool'] with psycopg 3) "
        "or raise max_connections. Behind a pooler such as PgBouncer its own limits count: "
        "silence this check there.",
        id="django_connguard.W005",
    )


def _most(wrapper: BaseDatabaseWrapper, processes: int = 1, threads: int = 1) -> int:
    """Return how many connections of an alias so many processes may hold at most."""
    pool = pool_sizes(wrapper.settings_dict["OPTIONS"]["pool"]) if has_pool(wrapper) else None
    return processes * (pool["max_size"] if pool else threads)


def _server(wrapper: BaseDatabaseWrapper) -> tuple[Any, ...]:
    """Return what tells two aliases' servers apart, as far as settings do."""
    given = wrapper.settings_dict
    options = ("service", "host", "port", "unix_socket", "read_default_file")
    return (
        wrapper.vendor,
        *(given["HOST"], str(given["PORT"])),
        *(given["OPTIONS"].get(option) for option in options),
    )
