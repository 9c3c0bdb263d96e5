"""The live view of one alias: what Django was told, what the server counts, what that means."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from django.db import connections

from django_connguard.connstats.probe import (
    IDLE_IN_TRANSACTION,
    Capacity,
    ServerConnection,
    probe_for,
    server_address,
)
from django_connguard.tagging import group_of


@dataclass(frozen=True, slots=True)
class View:
    """One alias at one moment; max_age in seconds, None for ever, as CONN_MAX_AGE has it."""

    alias: str
    vendor: str
    server: str
    max_age: float | None
    health_checks: bool
    pool: dict[str, Any] | None
    sessions: tuple[ServerConnection, ...]
    capacity: Capacity
    notes: tuple[str, ...]

    @property
    def by_application(self) -> Counter[str]:
        """Sessions by the name they gave themselves, or the role that connguard's tag names."""
        return Counter(group_of(session.application) for session in self.sessions)

    @property
    def by_state(self) -> Counter[str]:
        return Counter(session.state for session in self.sessions)

    @property
    def oldest_idle(self) -> float | None:
        """Seconds, over every session that waits for its client, in a transaction or not."""
        return oldest(self.sessions)

    @property
    def in_transaction(self) -> list[ServerConnection]:
        return [session for session in self.sessions if session.state == IDLE_IN_TRANSACTION]


def oldest(sessions: tuple[ServerConnection, ...] | list[ServerConnection]) -> float | None:
    """The longest idle time among sessions, in seconds."""
    return max((session.idle for session in sessions if session.idle is not None), default=None)


def look(alias: str) -> View:
    """Look at an alias; raises StatsError if it is unknown or its server cannot be asked."""
    with probe_for(alias) as probe:
        wrapper = connections[alias]
        settings = wrapper.settings_dict
        return View(
            alias=alias,
            vendor=probe.vendor,
            server=server_address(wrapper),
            max_age=settings["CONN_MAX_AGE"],
            health_checks=settings["CONN_HEALTH_CHECKS"],
            pool=pool_sizes(settings["OPTIONS"].get("pool")),
            sessions=tuple(probe.connections()),
            capacity=probe.capacity(),
            notes=tuple(probe.notes()),
        )


def pool_sizes(option: Any) -> dict[str, Any] | None:
    """Only the sizes of OPTIONS["pool"]: its other keys may hold callables and passwords."""
    if not option:
        return None
    given = option if isinstance(option, dict) else {}
    # psycopg_pool's defaults: min_size 4, and max_size equal to it.
    smallest = given.get("min_size", 4)
    return {"min_size": smallest, "max_size": given.get("max_size") or smallest}
