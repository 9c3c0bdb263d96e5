"""Stops a loop between two messages when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stopping(event: threading.Event | None) -> Iterator[threading.Event]:
    """Give the event that ends the loop; SIGTERM and SIGINT set it.

    The second of the same signal has its old effect. A signal for which the program has a handler
    of its own is left to that, as are all of them outside the main thread: there ``event`` is
    what the program itself sets.
    """
    event = event or threading.Event()
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = handler
                signal.signal(number, stop)
    try:
        yield event
    finally:
        for taken, handler in before.items():
            if signal.getsignal(taken) is stop:
                signal.signal(taken, handler)
