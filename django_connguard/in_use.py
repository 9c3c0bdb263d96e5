"""Knows what goes on on a connection that closing it would cut off."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet, ref

from django.db.backends.base.base import BaseDatabaseWrapper


def watch_streams(wrapper: BaseDatabaseWrapper) -> None:
    """Note from now on the cursors that a queryset's iterator() reads in chunks."""
    chunked_cursor = wrapper.chunked_cursor
    # ``wrapped``: what Django's test cases put there for a while.
    if hasattr(wrapper, "_connguard_streams") or hasattr(chunked_cursor, "wrapped"):
        return
    cursors: WeakSet[Any] = WeakSet()

    def chunked_cursor_noted() -> Any:
        cursor: Any = chunked_cursor()
        cursors.add(cursor)
        # An exception's traceback may hold it for long after it was closed.
        close, reference = cursor.close, ref(cursor)

        def close_noted() -> Any:
            cursors.discard(reference())
            return close()

        cursor.close = close_noted
        return cursor

    wrapper.chunked_cursor = chunked_cursor_noted  # type: ignore[method-assign]
    wrapper._connguard_streams = cursors  # type: ignore[attr-defined]


def in_testcase(wrapper: BaseDatabaseWrapper) -> bool:
    """Return whether the only blocks open are those that Django's TestCase makes around a test.

    Django itself looks through them for durable blocks.
    """
    blocks: Any = wrapper.atomic_blocks
    return wrapper.in_atomic_block and all(block._from_testcase for block in blocks)


def in_use(wrapper: BaseDatabaseWrapper) -> str | None:
    """Return what is going on that needs the connection as it is."""
    if wrapper.in_atomic_block:
        return "an atomic block"
    if wrapper.autocommit != wrapper.settings_dict["AUTOCOMMIT"]:
        return "a transaction"
    if getattr(wrapper, "_connguard_streams", ()):
        return "a queryset's iterator()"
    return None
