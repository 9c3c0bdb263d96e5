"""``job(retry_stale=n)``: run a job again whose first database operation met a lost connection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, cast

from django.db import Error, InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.async_unit import AsyncUnit
from django_connguard.boundary import Unit
from django_connguard.drivers.link import BROKEN, IN_TRANSACTION
from django_connguard.interrupts import is_interrupt
from django_connguard.ownership import current

logger = logging.getLogger("django_connguard")


class Attempt(Unit):
    """A unit of work that knows whether any of its database operations has succeeded.

    Operations are those that go through ``execute()`` and ``executemany()`` of Django's cursors.
    """

    __slots__ = ("is_stale", "lost", "succeeded")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.succeeded = False
        self.lost = False  # a connection, by an operation that failed
        self.is_stale = False  # once it has ended: whether the job may run again

    def enter(self) -> None:
        """Begin, and see to it that what is executed on any alias is noted."""
        super().enter()
        if self.started is None:  # nested: the unit of work is not ours to run again
            return
        try:
            for wrapper in connections.all():
                if wrapper.connection is None:
                    wrapper.errors_occurred = False  # an earlier job's; connect() does so, too
                if _note not in wrapper.execute_wrappers:
                    # For good, since Django's execute_wrapper() takes its own off the end.
                    wrapper.execute_wrappers.insert(0, _note)
        except BaseException as error:
            self.succeeded = True
            if isinstance(error, Exception) and not is_interrupt(error):
                logger.exception("Job %s will not be run again.", self.name)
                return
            self.exit(error)  # nobody else would: the block is never entered
            raise

    __enter__ = enter

    def exit(self, exception: BaseException | None = None, ends_thread: bool = False) -> bool:
        """End; ``is_stale`` tells from now on whether the job may run again."""
        try:
            self.is_stale = (
                self.started is not None
                and not self.succeeded
                and isinstance(exception, (OperationalError, InterfaceError))
                and (self.lost or any(map(_is_lost, connections.all(initialized_only=True))))
            )
        finally:
            last = super().exit(exception, ends_thread)
        if self.is_stale:
            logger.info("The first database operation of job %s failed: %s", self.name, exception)
        return last


def _note(
    execute: Callable[..., Any], sql: str, params: Any, many: bool, context: dict[str, Any]
) -> Any:
    """Tell the attempts of this thread how an operation ended; of jobs that overlap, all."""
    wrapper = context["connection"]
    try:
        result = execute(sql, params, many, context)
    except Error:
        # Now: at the end of an atomic block Django opens a new connection in its place.
        if _attempts() and _is_lost(wrapper):
            for attempt in _attempts():
                attempt.lost = True
        raise
    link = current().links.get(wrapper.alias)
    # What Django executes to set a new session up comes before there is a link to it.
    if link is not None and link.connection is wrapper.connection:
        for attempt in _attempts():
            attempt.succeeded = True
    return result


def _attempts() -> list[Attempt]:
    # Not kept in the frames above: a traceback would keep those from ending that were cut off.
    return [unit for entry in current().units if isinstance(unit := entry(), Attempt)]


def _is_lost(wrapper: BaseDatabaseWrapper) -> bool:
    """Return whether an error was the end of the connection, or of an attempt to open it."""
    if not wrapper.errors_occurred:
        return False
    link = current().links.get(wrapper.alias)
    if wrapper.connection is None or link is None:
        return True
    try:
        state = link.state()
        # PostgreSQL refuses the probe in a transaction that has failed.
        return state == BROKEN or (state != IN_TRANSACTION and not link.is_usable())
    except Exception as error:
        if is_interrupt(error):
            raise
        return False  # the job's own error must come out


def function_with_retries(
    func: Callable[..., Any], name: str, signals: bool | None, shared: bool, retries: int
) -> Callable[..., Any]:
    """Return ``func`` with each call of it up to ``1 + retries`` units of work."""

    @wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        for left in range(retries, -1, -1):
            attempt = Attempt(name, signals)
            try:
                with attempt:
                    return func(*args, **kwargs)
            except Error:
                if not left or not attempt.is_stale:
                    raise
        return None  # never reached

    return run


def coroutine_with_retries(
    func: Callable[..., Coroutine[Any, Any, Any]],
    name: str,
    signals: bool | None,
    shared: bool,
    retries: int,
) -> Callable[..., Any]:
    """Return the coroutine function ``func`` likewise."""

    @wraps(func)
    async def run(*args: Any, **kwargs: Any) -> Any:
        for left in range(retries, -1, -1):
            attempt = AsyncUnit(name, signals, shared, kind=Attempt)
            try:
                async with attempt:
                    return await func(*args, **kwargs)
            except Error:
                if not left or not cast(Attempt, attempt.unit).is_stale:
                    raise
        return None  # never reached

    return run
