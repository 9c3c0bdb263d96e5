"""What the shop's commands have in common: they run until they are told to stop."""

from __future__ import annotations

import signal
import time
from threading import Event
from types import FrameType
from typing import Any

from django.core.management.base import BaseCommand


class LoopCommand(BaseCommand):
    """A command that SIGINT and SIGTERM end after the work at hand."""

    def execute(self, *args: Any, **options: Any) -> str | None:
        # For is_set() alone: wait() holds a lock for a moment, and stop() may come right then.
        self.stopped = Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        return super().execute(*args, **options)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """End the loop after the work at hand; a second signal ends the process at once."""
        # Raises nothing: with psycopg 3, an exception that strikes inside atomic() may be replaced
        # by an error of its rollback, and the loop would take that for a failed run and go on.
        self.stopped.set()
        signal.signal(number, signal.SIG_DFL)

    def pause(self, seconds: float) -> None:
        """Sleep, in naps: a signal does not end a sleep."""
        end = time.monotonic() + seconds
        while not self.stopped.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def one_line(error: Exception) -> str:
    """Return what an error says; drivers' messages have several lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
