"""``connguard.stats()``: what this process has counted, for exporters and for the curious."""

from __future__ import annotations

from collections import Counter
from typing import TypedDict

from django.db import connections

from django_connguard.hygiene import OTHER, REASONS
from django_connguard.ownership import counted
from django_connguard.tally import Tally


class AliasStats(TypedDict):
    """The counters of one alias since the process began; ``open`` and ``busy`` are as of now."""

    units: int  # units of work that held a connection
    reused: int  # of those, with a connection that had been opened before
    opened: int  # connections; from a psycopg pool: taken out of it
    opened_outside: int  # of those, outside any unit of work and request
    connect_failures: int
    closed: dict[str, int]  # by reason; "other": not by connguard but by Django or user code
    open: int
    busy: int  # of those, in a unit of work or a request
    connect_seconds: float
    hold_seconds: float  # within units of work


def stats() -> dict[str, AliasStats]:
    """Return the counters of every alias, which count up from 0 in each process.

    Cheap to have: each thread counts for itself, without a lock, and this sums up.
    """
    owners, sums = counted()
    for alias in connections:
        sums.setdefault(alias, Tally())
    open_now: Counter[str] = Counter()
    busy_now: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()  # closed, and not counted yet for want of a successor
    for owner in owners:
        busy = bool(owner.units or owner.in_request)
        for alias, link in owner.links.copy().items():
            if link.wrapper.connection is not None:
                open_now[alias] += 1
                busy_now[alias] += busy
            elif not (link.closing or link.counted):
                elsewhere[alias] += 1
    return {
        alias: _read(tally, open_now[alias], busy_now[alias], elsewhere[alias])
        for alias, tally in sums.items()
    }


def _read(tally: Tally, open_now: int, busy_now: int, elsewhere: int) -> AliasStats:
    closed = dict.fromkeys(REASONS, 0) | tally.closed
    closed[OTHER] += elsewhere
    return {
        "units": tally.units,
        "reused": tally.reused,
        "opened": tally.opened,
        "opened_outside": tally.opened_outside,
        "connect_failures": tally.connect_failures,
        "closed": closed,
        "open": open_now,
        "busy": busy_now,
        "connect_seconds": tally.connect_seconds,
        "hold_seconds": tally.hold_seconds,
    }
