"""System checks that read settings alone; those that ask a server are in connstats/checks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error, register
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.conf import mistakes


@register("connguard")
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Report unknown keys and wrong values in the CONNGUARD setting (E001 to E003)."""
    return [
        Error(problem, hint=hint, id=f"django_connguard.{check_id}")
        for check_id, problem, hint in mistakes()
    ]


@register("connguard")
def check_databases(**kwargs: Any) -> list[CheckMessage]:
    """Report settings in DATABASES that let connections go bad (E004, W001 to W003)."""
    return [
        message
        for wrapper in with_a_server()
        for check in DATABASE_CHECKS
        if (message := check(wrapper))
    ]


def with_a_server() -> Iterator[BaseDatabaseWrapper]:
    """Yield this thread's connections of all aliases but SQLite's, opened or not."""
    for alias in connections:
        try:
            wrapper = connections[alias]
        except (ImproperlyConfigured, ImportError):
            continue  # Django says what is wrong, to those who use the alias
        if wrapper.vendor != "sqlite":
            yield wrapper


def keeps_connections(wrapper: BaseDatabaseWrapper) -> bool:
    """Return whether CONN_MAX_AGE keeps an alias' connections after a request or a job."""
    age = wrapper.settings_dict["CONN_MAX_AGE"]
    return age is None or (isinstance(age, (int, float)) and age > 0)


def has_pool(wrapper: BaseDatabaseWrapper) -> bool:
    """Return whether OPTIONS["pool"] makes Django itself pool an alias' connections."""
    # Of the class: to ask the instance would make the pool.
    return hasattr(type(wrapper), "pool") and bool(wrapper.settings_dict["OPTIONS"].get("pool"))


def pool_and_max_age(wrapper: BaseDatabaseWrapper) -> CheckMessage | None:
    """E004. Source: Django's DatabaseWrapper.pool, which raises ImproperlyConfigured."""
    age = wrapper.settings_dict["CONN_MAX_AGE"]
    if not has_pool(wrapper) or age == 0:
        return None
    return Error(
        f"Database alias {wrapper.alias!r} has OPTIONS['pool'] and CONN_MAX_AGE={age!r}: Django "
        "refuses to connect with both.",
        hint="Set CONN_MAX_AGE=0; the pool keeps connections by itself.",
        id="django_connguard.E004",
    )


def no_health_checks(wrapper: BaseDatabaseWrapper) -> CheckMessage | None:
    """W001. Source: Django's documentation, "Databases", on persistent connections."""
    given = wrapper.settings_dict
    if has_pool(wrapper) or not keeps_connections(wrapper) or given["CONN_HEALTH_CHECKS"]:
        return None
    return checks.Warning(
        f"Database alias {wrapper.alias!r} has CONN_MAX_AGE={given['CONN_MAX_AGE']!r} without "
        "CONN_HEALTH_CHECKS: a connection that is lost between two requests fails the second. "
        "A connguard job replaces what its server has closed, but cannot tell what was lost "
        "without a word (a firewall, a host that went down).",
        hint="Set CONN_HEALTH_CHECKS=True, which costs a request or job that uses the database "
        "one round trip, or CONN_MAX_AGE=0.",
        id="django_connguard.W001",
    )


def unchecked_pool(wrapper: BaseDatabaseWrapper) -> CheckMessage | None:
    """W002. Source: Django's PostgreSQL DatabaseWrapper.pool, which passes "check" on."""
    if wrapper.vendor != "postgresql" or not has_pool(wrapper):
        return None
    given = wrapper.settings_dict
    pool = given["OPTIONS"]["pool"]
    own = pool if isinstance(pool, Mapping) else {}
    if own.get("check", given["CONN_HEALTH_CHECKS"]):
        return None
    return checks.Warning(
        f"Database alias {wrapper.alias!r} has OPTIONS['pool'] without CONN_HEALTH_CHECKS: the "
        "pool hands out connections that are dead. connguard replaces those that their server "
        "has closed, but cannot tell what was lost without a word (a firewall, a host that went "
        "down).",
        hint="Set CONN_HEALTH_CHECKS=True: the pool then checks what it hands out, which costs "
        "one round trip.",
        id="django_connguard.W002",
    )


def kept_under_asgi(wrapper: BaseDatabaseWrapper) -> CheckMessage | None:
    """W003. Source: Django's documentation, "Databases", on persistent connections under ASGI."""
    # The sign is the one that Daphne and Channels need; Django has no such setting by default.
    if (
        not getattr(settings, "ASGI_APPLICATION", None)
        or has_pool(wrapper)
        or not keeps_connections(wrapper)
    ):
        return None
    return checks.Warning(
        f"Database alias {wrapper.alias!r} has CONN_MAX_AGE="
        f"{wrapper.settings_dict['CONN_MAX_AGE']!r}, and ASGI_APPLICATION is set: under ASGI each "
        "request has a thread of its own, so the connection that it leaves open serves no other.",
        hint="Set CONN_MAX_AGE=0 for the processes that serve ASGI, and use a pool to save "
        "connects (OPTIONS['pool'] with psycopg 3, or PgBouncer).",
        id="django_connguard.W003",
    )


DATABASE_CHECKS: tuple[Callable[[BaseDatabaseWrapper], CheckMessage | None], ...] = (
    pool_and_max_age,
    no_health_checks,
    unchecked_pool,
    kept_under_asgi,
)
