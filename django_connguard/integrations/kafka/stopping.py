"""Stops loops between two messages when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_running: list[threading.Event] = []  # of the main thread's loops
_before: dict[int, Any] = {}  # the handlers that _stop() has replaced


@contextmanager
def stopping(event: threading.Event | None) -> Iterator[threading.Event]:
    """Give the event that ends the loop; SIGTERM and SIGINT set it.

    The second of the same signal has its old effect. A signal for which the program has a handler
    of its own is left to that, as are all of them outside the main thread: there ``event`` is
    what the program itself sets.
    """
    event = event or threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            _before[number] = handler
            signal.signal(number, _stop)
    _running.append(event)
    try:
        yield event
    finally:
        _running.remove(event)
        # A generator may be collected in another thread, where signals cannot be set.
        if not _running and threading.current_thread() is threading.main_thread():
            for taken in tuple(_before):
                _restore(taken)


def _stop(number: int, frame: FrameType | None) -> None:
    running = _running.copy()
    _restore(number)
    if not running:
        signal.raise_signal(number)
    for event in running:
        event.set()


def _restore(number: int) -> None:
    if number in _before and signal.getsignal(number) is _stop:
        signal.signal(number, _before.pop(number))
