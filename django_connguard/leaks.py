"""Puts down who holds a connection for too long: a job, or a thread that runs none.

Nothing is done at a boundary for it. One daemon thread a process looks at what is held, as late as
it can: whatever begins after a look is not due before LEAK_THRESHOLD seconds have passed.
"""

from __future__ import annotations

import logging
import os
import threading
from time import monotonic
from typing import Any

from django.db.backends.signals import connection_created

from django_connguard.conf import conf
from django_connguard.drivers.link import Link
from django_connguard.ownership import Owner, owners

logger = logging.getLogger("django_connguard")


class Watch:
    """The thread; started by the first connection that is opened while LEAK_THRESHOLD is set."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None and self._starting.acquire(blocking=False):
            try:
                self._thread = threading.Thread(
                    target=self._run, name="connguard-leaks", daemon=True
                )
                self._thread.start()
            except RuntimeError:  # the interpreter ends, and starts no thread any more
                self._thread = None
            finally:
                self._starting.release()

    def _run(self) -> None:
        pause = threading.Event()  # never set: time.sleep() may be somebody else's, in a test
        while threshold := conf.LEAK_THRESHOLD:
            due = monotonic() + threshold
            for owner in owners():
                try:
                    due = min(due, look(owner, threshold))
                except Exception:
                    logger.exception("Looking for leaks failed.")
                del owner  # or its thread's connections would wait for the next look
            pause.wait(max(due - monotonic(), 0.001))
        self._thread = None


def look(owner: Owner, threshold: float) -> float:
    """Put down what ``owner`` has held for ``threshold`` seconds; return when the next is due."""
    now = monotonic()
    next_due = now + threshold
    entry = next(iter(owner.units), None)
    unit = entry() if entry is not None else None
    if owner.in_request and unit is None:
        return next_due
    for link in owner.links.copy().values():
        if link.wrapper.connection is not link.connection:
            continue
        since = link.opened_at
        if unit is not None:
            since = max(since, unit.started or now)
        elif not link.opened_outside:
            continue  # it waits for the next job
        if since + threshold > now:
            next_due = min(next_due, since + threshold)
        elif link.reported is not (entry or owner):
            link.reported = entry or owner
            holder = f"Job {unit.name}" if unit else f"Outside of any job, {_thread(owner)}"
            _report(holder, link, now - since, threshold)
    return next_due


def _report(holder: str, link: Link, held: float, threshold: float) -> None:
    opener = "".join(link.opener.format()) if link.opener else ""
    logger.warning(
        "%s has held connection %r for %.1f s (LEAK_THRESHOLD is %g s).%s",
        *(holder, link.wrapper.alias, held, threshold),
        f" It was opened here:\n{opener}" if opener else "",
    )


def _thread(owner: Owner) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return f"thread {names.get(owner.thread, owner.thread)!r}"


watch = Watch()


def _on_connection_created(**kwargs: Any) -> None:
    if conf.LEAK_THRESHOLD:
        watch.start()


connection_created.connect(_on_connection_created, dispatch_uid="django_connguard.leaks")


def _begin_anew() -> None:
    """The thread did not come along into the child."""
    global watch  # noqa: PLW0603
    watch = Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
