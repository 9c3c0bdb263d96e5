"""Closes connections past their age whose owner waits for work, so that no boundary comes.

One daemon thread a process, asleep until the next connection is due. That it never takes a
connection from under anybody rests on a handshake in two steps that the interpreter lock orders:
whoever is about to use an owner's connections first says so (a unit of work is entered, a request
begins, ``ensure_connection()`` is called outside of both) and then looks whether the owner is
claimed, and waits if it is; the reaper first claims the owner and then looks whether anybody has
said so, and keeps off if so. One of the two always sees the other.
"""

from __future__ import annotations

import atexit
import heapq
import logging
import math
import os
import threading
from collections import deque
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

from django_connguard import hygiene

if TYPE_CHECKING:
    from django_connguard.ownership import Owner

logger = logging.getLogger("django_connguard")

Appointment = tuple[float, int, "ReferenceType[Owner]"]


class Reaper:
    """Keeps appointments with owners: looks at each when its first connection is past its age."""

    def __init__(self) -> None:
        self._new: deque[Appointment] = deque()  # appended to by any thread, without a lock
        self._numbers = count()  # orders appointments at the same moment
        self._wake = threading.Event()
        self._sleeps_until = 0.0
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopped = False

    def watch(self, owner: Owner, due: float) -> None:
        """Look at an idle owner when ``due`` (as of time.monotonic()) has come."""
        owner.due = due
        self._new.append((due, next(self._numbers), ref(owner)))
        if self._thread is None:
            self._start()
        elif due < self._sleeps_until:
            self._wake.set()

    def stop(self) -> None:
        """End the thread, and wait until it has ended."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._stopped:
                thread = threading.Thread(target=self._run, name="connguard-reaper", daemon=True)
                thread.start()  # or it raises, as the interpreter ends
                self._thread = thread

    def _run(self) -> None:
        appointments: list[Appointment] = []
        while not self._stopped:
            self._wake.clear()
            self._sleeps_until = math.inf  # until it is known better, each new one wakes us
            while self._new:
                heapq.heappush(appointments, self._new.popleft())
            while appointments and appointments[0][0] <= monotonic():
                due, _, reference = heapq.heappop(appointments)
                owner = reference()
                if owner is not None and owner.due == due:  # or it has made another one since
                    self._reap(owner)
                del owner
            if appointments:
                self._sleeps_until = appointments[0][0]
                self._wake.wait(max(self._sleeps_until - monotonic(), 0))
            else:
                self._wake.wait()

    def _reap(self, owner: Owner) -> None:
        # First: an owner that is busy now makes another appointment when it is idle again, and
        # looks for this None after it has ceased to be busy.
        owner.due = None
        with owner.claim:
            owner.claimed = True
            try:
                if owner.is_idle():
                    hygiene.close_idle(owner)
                    owner.rest()  # for the connections that are younger
            except Exception:
                logger.exception("The reaper failed.")
            finally:
                owner.claimed = False


reaper = Reaper()


@atexit.register
def _stop() -> None:
    reaper.stop()


def _start_anew() -> None:
    """The thread did not come along into the child, and its locks may be held for ever."""
    global reaper  # noqa: PLW0603
    reaper = Reaper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
