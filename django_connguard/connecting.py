"""Watches every connection from its opening, by whatever code in whatever thread.

Django announces those that are opened, by connection_created, but not a connect that is cut off,
for instance by a time limit, and leaves a connection that is half set up.
"""

from __future__ import annotations

from functools import wraps
from time import monotonic
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist

from django_connguard import hygiene
from django_connguard.ownership import current
from django_connguard.tagging import tag


def is_registered(wrapper: BaseDatabaseWrapper) -> bool:
    """Return whether it is the thread's own; a private copy of a wrapper is its maker's affair."""
    try:
        return connections[wrapper.alias] is wrapper
    except ConnectionDoesNotExist:  # Django's own connection without a database
        return False


def _watch_connects() -> None:
    connect = BaseDatabaseWrapper.connect
    init = BaseDatabaseWrapper.__init__

    @wraps(init)
    def init_tagged(self: BaseDatabaseWrapper, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        tag(self)  # not as late as connect(): Django makes a pool before that

    @wraps(connect)
    def connect_watched(self: BaseDatabaseWrapper) -> None:
        tag(self)  # made before this module was imported
        owner = current() if is_registered(self) else None
        # A psycopg pool without health checks hands out what its server has closed meanwhile.
        pool = getattr(self, "pool", None)
        for more in range(getattr(pool, "max_size", 0), -1, -1):
            link = None
            connected = False
            started = monotonic()
            try:
                connect(self)
                connected = True
            finally:
                if owner is not None and self.connection is not None:
                    try:
                        link = owner.adopt(self)
                        link.cut_off = not connected
                        link.tally.connect_seconds += monotonic() - started
                    except BaseException:  # a time limit: nobody would ever examine it
                        self.close()
                        raise
                if owner is not None and not connected:
                    owner.tally(self.alias).connect_failures += 1
            if more and link is not None:
                hygiene.close_if_stale(link, {})
            if self.connection is not None:
                return

    BaseDatabaseWrapper.__init__ = init_tagged  # type: ignore[method-assign]
    BaseDatabaseWrapper.connect = connect_watched  # type: ignore[method-assign]


# At import, as django.db connects its own receivers.
_watch_connects()
