"""What is counted, per owner and alias; an owner's own thread alone adds to its tallies."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, Protocol, TypeVar


class Tally:
    """Counts, and sums of seconds; counters.py tells users what they mean."""

    __slots__ = (
        *("closed", "connect_failures", "connect_seconds", "hold_seconds"),
        *("opened", "opened_outside", "reused", "units"),
    )

    def __init__(self) -> None:
        self.units = self.reused = 0
        self.opened = self.opened_outside = self.connect_failures = 0
        self.closed: dict[str, int] = {}  # by reason
        self.connect_seconds = self.hold_seconds = 0.0

    def count_unit(self, started: float, opened: float, ended: float) -> None:
        """Count a unit of work that held a connection; the times are of time.monotonic()."""
        self.units += 1
        if opened < started:
            self.reused += 1
            opened = started
        self.hold_seconds += ended - opened

    def add(self, other: Tally) -> None:
        """Add what another has counted."""
        self.units += other.units
        self.reused += other.reused
        self.opened += other.opened
        self.opened_outside += other.opened_outside
        self.connect_failures += other.connect_failures
        self.connect_seconds += other.connect_seconds
        self.hold_seconds += other.hold_seconds
        for reason, number in other.closed.copy().items():
            self.closed[reason] = self.closed.get(reason, 0) + number


Tallies = dict[str, Tally]  # by alias


def add(sums: Tallies, tallies: Tallies) -> None:
    """Add alias by alias."""
    for alias, tally in tallies.copy().items():
        sums.setdefault(alias, Tally()).add(tally)


class Counting(Protocol):
    """What stands for an owner, and outlives it."""

    tallies: Tallies


E = TypeVar("E", bound=Counting)


class Ended(Generic[E]):
    """The sums over owners that are gone, of whom there is no end."""

    def __init__(self, entries: set[E]) -> None:
        self._entries = entries  # of the living, and of those that are not summed up yet
        self._sums: Tallies = {}
        self._new: deque[E] = deque()
        self._lock = threading.RLock()

    def append(self, entry: E) -> None:
        """Take the entry of an owner that ends, maybe inside the garbage collector: no lock."""
        self._new.append(entry)

    def fold(self) -> None:
        """Sum up what is new, or leave it to whoever is about it already."""
        if self._lock.acquire(blocking=False):
            try:
                while self._new:
                    entry = self._new.popleft()
                    self._entries.discard(entry)
                    add(self._sums, entry.tallies)
            finally:
                self._lock.release()

    def sums_with_the_living(self) -> Tallies:
        """Return the sums over everybody: under the lock an entry is in one of both places."""
        sums: Tallies = {}
        with self._lock:
            self.fold()
            add(sums, self._sums)
            for entry in self._entries.copy():
                add(sums, entry.tallies)
        return sums
