"""For jobs that run for hours: a boundary in their midst, and a rest for their connections."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any, Generic, TypeVar

from asgiref.sync import sync_to_async
from django.db.transaction import TransactionManagementError

from django_connguard import hygiene
from django_connguard.drivers.link import BUSY, IN_TRANSACTION, Link
from django_connguard.in_use import in_testcase, in_use
from django_connguard.ownership import current
from django_connguard.request_signals import reset_queries_as_django

T = TypeVar("T")


def checkpoint() -> None:
    """Do between two steps of a job what is done between two jobs, as far as it is safe.

    Connections that are broken, dropped by the server or past their ``CONN_MAX_AGE`` are closed,
    health checks are armed anew, and the query log is emptied. Left alone is a connection in an
    ``atomic`` block or another transaction, one that a queryset's ``iterator()`` is still reading,
    and one with a query under way, a COPY say. (Cursors of your own that hold their rows already
    are not noticed.) Works outside of jobs, too, as in a plain loop. Raises nothing of its own.
    """
    owner = current()
    for link in owner.held_for_good():
        hygiene.between_steps(link, {})
    reset_queries_as_django(owner)


async def acheckpoint() -> None:
    """Do a ``checkpoint()`` from async code."""
    await sync_to_async(checkpoint)()


class heartbeat(Generic[T]):
    """Yield the items of an iterable, with a ``checkpoint()`` now and then.

    ``for item in heartbeat(items, every=60):``, or ``async for`` where ``items`` allows it, as
    querysets do. ``every``: seconds that must have passed since the last checkpoint; 0 makes one
    after each item. Raises ValueError if it is negative.
    """

    def __init__(self, iterable: Iterable[T] | AsyncIterable[T], *, every: float) -> None:
        if every < 0:
            raise ValueError(f"heartbeat() takes every={every!r} seconds: it must be 0 or more.")
        self._iterable: Any = iterable
        self._every = every

    def __iter__(self) -> Iterator[T]:
        due = monotonic() + self._every
        for item in self._iterable:
            yield item
            if monotonic() >= due:
                checkpoint()
                due = monotonic() + self._every

    async def __aiter__(self) -> AsyncIterator[T]:
        due = monotonic() + self._every
        async for item in self._iterable:
            yield item
            if monotonic() >= due:
                await acheckpoint()
                due = monotonic() + self._every


class released:
    """Give the connections back during long work that needs no database.

    ``with released():`` or ``async with released():`` closes them, whatever their age; to a pool
    they are returned. Django opens new ones with the next query, which may well be inside the
    block.

    Raises TransactionManagementError, with nothing closed, inside ``atomic`` or another
    transaction, or while a queryset's ``iterator()`` or a query is read: that would be lost. (The
    block that Django's ``TestCase`` makes around a test does not count; there connections stay
    open.)
    """

    def __enter__(self) -> None:
        _release()

    def __exit__(self, *exc_info: object) -> None:
        pass

    async def __aenter__(self) -> None:
        await sync_to_async(_release)()

    async def __aexit__(self, *exc_info: object) -> None:
        pass


def _release() -> None:
    held = current().held_for_good()
    for link in held:
        _must_be_free(link)
    for link in held:
        if not link.wrapper.in_atomic_block:
            hygiene.close(link, hygiene.RELEASED, {})


def _must_be_free(link: Link) -> None:
    """Raise TransactionManagementError if closing the connection would lose anything."""
    wrapper = link.wrapper
    where = in_use(wrapper)
    if where is None:
        with suppress(Exception):  # of a connection that is broken nothing can be lost
            where = {IN_TRANSACTION: "a transaction", BUSY: "a query"}.get(link.state())
    if where is not None and not in_testcase(wrapper):
        raise TransactionManagementError(
            f"released() was called inside {where} on connection {wrapper.alias!r}, which closing "
            "the connection would cut off: call it before that begins or after it has ended."
        )
