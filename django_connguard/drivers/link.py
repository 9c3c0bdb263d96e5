"""What can be asked of a connection of any driver, and what those with a socket have in common."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from traceback import StackSummary
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.tally import Tally

# States of a link; false means that all is well.
IDLE = 0
BUSY = 1  # a query still runs at the server, or its result was never read
IN_TRANSACTION = 2
BROKEN = 3

_HUNG_UP = getattr(select, "POLLRDHUP", 0)  # Linux only


def poller(descriptor: int) -> Callable[[int], Any]:
    """Return a function that is true when the server has sent something or hung up."""
    new: Any = getattr(select, "poll", None)
    monkey = sys.modules.get("gevent.monkey")
    if new is not None and monkey is not None:
        # gevent's goes round its hub though it is not to wait, which takes 0.1 ms, and in which
        # other greenlets run while this one holds, say, a pool's connection.
        new = monkey.get_original("select", "poll")
    if new is None:  # Windows
        return lambda timeout: select.select([descriptor], [], [], timeout)[0]
    poll = new()
    poll.register(descriptor, select.POLLIN | _HUNG_UP)
    ask: Callable[[int], Any] = poll.poll
    return ask


def _never(timeout: int) -> bool:
    return False


class Link:
    """One open driver connection of a Django connection; this class knows nothing of the driver."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        self.wrapper = wrapper
        self.connection = wrapper.connection
        self.keeps_djangos_rules = (
            type(wrapper).close_if_unusable_or_obsolete
            is BaseDatabaseWrapper.close_if_unusable_or_obsolete
        )
        self.cut_off = False  # its connect was: Django has not set the session up
        self.opened_at = monotonic()
        self.opened_outside = False  # of any unit of work and request
        self.opener: StackSummary | None = None  # the code that opened it, if asked for
        self.tally: Tally = Tally()  # where what becomes of it is counted
        self.closing = False  # connguard is about it, or has done it
        self.counted = False  # its closing was
        self.reported: object = None  # to whom its being held too long was last put down
        # True if an idle connection has something to read, as one has that its server closed.
        self.poll: Callable[[int], Any] = _never

    def state(self) -> int:
        """Return IDLE, BUSY, IN_TRANSACTION or BROKEN."""
        return IDLE

    def is_usable(self) -> bool:
        """Ask the server, which costs a round trip."""
        return self.wrapper.is_usable()

    def cancel(self, timeout: float) -> None:
        """End what still runs at the server, in at most ``timeout`` seconds; may raise anything."""

    cancels = False  # whether cancel() can do anything

    def let_go(self) -> None:
        """In a forked child: cut the way to the server, without a word to it."""

    def session(self) -> int | None:
        """Return the number under which the server lists this connection."""
        return None


class SocketLink(Link):
    """A link with a socket to watch."""

    cancels = True

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        descriptor = self.descriptor()
        self.poll = poller(descriptor)
        # A session's number alone does not tell whose it is: after a restart of the server, or
        # on another one behind the same proxy, it is a stranger's.
        blocks = os.get_blocking(descriptor)
        with socket.socket(fileno=os.dup(descriptor)) as end:
            name = end.getsockname()
        os.set_blocking(descriptor, blocks)  # a default timeout, as Celery's beat has, changed it
        self.port: int | None = name[1] if isinstance(name, tuple) else None

    def descriptor(self) -> int:
        fileno: int = self.connection.fileno()
        return fileno

    def let_go(self) -> None:
        with suppress(Exception):  # it is closed already
            let_go(self.descriptor())


def let_go(descriptor: int) -> None:
    """Put nothing in a socket's place; to close it would leave its number to the next one."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
