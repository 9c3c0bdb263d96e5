"""Exceptions that a signal handler raises, as Celery's soft time limit does: nobody's error."""

from __future__ import annotations

import signal
from traceback import walk_tb
from typing import Any


def is_interrupt(error: BaseException) -> bool:
    """Return whether a signal handler raised ``error``, and not the code that it struck in."""
    handlers: list[Any] = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(handler, "__code__", None) for handler in handlers}
    return any(frame.f_code in codes for frame, _ in walk_tb(error.__traceback__))
