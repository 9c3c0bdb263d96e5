"""What a test has left behind: open connections, open transactions, sessions at the server.

This knows no test runner. A runner tells when a test starts, when its body begins and ends, and
when all has been torn down that is the test's own; what is left then is reported.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from traceback import StackSummary, format_list
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.transaction import Atomic

from django_connguard.conf import conf, forced
from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.probe import ServerConnection, probe_for
from django_connguard.drivers.link import IN_TRANSACTION, Link, SocketLink
from django_connguard.ownership import Owner, current, owners, stack
from django_connguard.pools import pools
from django_connguard.testing import sockets

# Seconds in which a thread that is about to end may do so, and the server see a goodbye.
SETTLES_WITHIN = 1.0

DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306}

# Frames that serve every test tell nothing of this one.
_RUNNERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("_pytest", "pluggy", "unittest"))

CLOSE = (
    "Close it where that work ends: make the work a job (connguard.job), call "
    "connections.close_all() in the thread, or wait for the thread's end."
)
LEAVE = "Leave it in every case: enter atomic() with `with` or as a decorator."
END = "Commit or roll back in every case (`finally`), or use transaction.atomic()."
SWITCH_BACK = "Switch it back in every case (`finally`), or use transaction.atomic()."
DISCONNECT = (
    "Close the driver's connection in every case (contextlib.closing), or end the process that "
    "holds it."
)


@dataclass(frozen=True, slots=True)
class Left:
    """One thing left behind."""

    what: str
    mend: str
    opener: StackSummary | None = None

    def __str__(self) -> str:
        text = f"{self.what}\n{self.mend}"
        frames = [frame for frame in self.opener or () if not _serves_tests(frame.filename)]
        return f"{text}\nIt was opened here:\n{''.join(format_list(frames))}" if frames else text


def report(left: list[Left]) -> str:
    """Return what a test's failure says."""
    return "\n\n".join(("This was left open:", *map(str, left)))


def _serves_tests(file: str) -> bool:
    return any(name in file for name in _RUNNERS)


class Finder:
    """Watches one test, in the thread that runs it."""

    def start(self) -> None:
        """Begin, before anything that belongs to the test alone is set up."""
        self._own = current()
        self._left: dict[str, Left] = {}
        self._in_body: dict[str, tuple[int, str | None]] = {}
        self._forced = dict(forced)
        forced["OPENER_STACKS"] = True
        conf.reload()
        self._forget_entries = _note_entries()
        self.excuse_present()

    def excuse_present(self) -> None:
        """Count what is open now as not the test's own."""
        self._present = WeakSet(link for owner in owners() for link in _open_links(owner))
        self._sockets = sockets.held_by(os.getpid())
        self._children = sockets.descendants(os.getpid())
        wrappers = [link.wrapper for link in self._present]
        wrappers += connections.all(initialized_only=True)  # a block may outlive its connection
        self._blocks = WeakKeyDictionary({each: len(each.atomic_blocks) for each in wrappers})

    def body_begins(self) -> None:
        """Note the transactions that fixtures have opened around the test's body."""
        self._in_body = {
            wrapper.alias: (len(wrapper.atomic_blocks), self._by_hand(wrapper))
            for wrapper in connections.all(initialized_only=True)
        }

    def body_ends(self) -> None:
        """Look for open transactions before their traces go, as fixtures close connections."""
        for wrapper in connections.all(initialized_only=True):
            blocks, by_hand = self._in_body.get(wrapper.alias, (0, None))
            # Those of Django's own test cases are left after the body.
            entered: list[Any] = wrapper.atomic_blocks[blocks:]
            new = [block for block in entered if not block._from_testcase]
            if new:
                self._leave(_atomic(wrapper, self._own, new))
            how = self._by_hand(wrapper)
            if how is not None and how != by_hand:
                self._leave(self._begun_by_hand(wrapper, how))

    def finish(self) -> list[Left]:
        """End, after all that belongs to the test alone was torn down; return what is left."""
        self._forget_entries()
        forced.clear()
        forced.update(self._forced)
        conf.reload()
        for wrapper in connections.all(initialized_only=True):
            if new := self._new_blocks(wrapper):
                self._leave(_atomic(wrapper, self._own, new))
        deadline = time.monotonic() + SETTLES_WITHIN
        while True:
            elsewhere = list(self._elsewhere())
            past_django = self._past_django()
            if not (elsewhere or past_django) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for left in (*elsewhere, *_sessions(past_django)):
            self._leave(left)
        return list(self._left.values())

    def _leave(self, left: Left) -> None:
        self._left.setdefault(left.what, left)

    def _new_blocks(self, wrapper: BaseDatabaseWrapper) -> list[Atomic]:
        return wrapper.atomic_blocks[self._blocks.get(wrapper, 0) :]

    def _by_hand(self, wrapper: BaseDatabaseWrapper) -> str | None:
        """Return what was done by hand to begin a transaction on a connection of this thread."""
        link = self._own.links.get(wrapper.alias)
        if link is None or link.connection is not wrapper.connection or wrapper.in_atomic_block:
            return None
        if wrapper.autocommit != wrapper.settings_dict["AUTOCOMMIT"]:
            return f"Autocommit switched {'on' if wrapper.autocommit else 'off'}"
        with suppress(Exception):  # a broken connection holds no transaction
            if wrapper.autocommit and link.state() == IN_TRANSACTION:
                return "A transaction begun by hand"
        return None

    def _begun_by_hand(self, wrapper: BaseDatabaseWrapper, how: str) -> Left:
        opener = self._own.links[wrapper.alias].opener
        mend = SWITCH_BACK if how.startswith("Autocommit") else END
        return Left(f"{how} on connection {wrapper.alias!r}, in {_place(self._own)}.", mend, opener)

    def _elsewhere(self) -> Iterator[Left]:
        """Find what other threads and async contexts hold."""
        for owner in owners():
            if owner is self._own:
                continue
            for link in _open_links(owner):
                wrapper: Any = link.wrapper
                if wrapper._thread_ident != owner.thread:
                    continue  # lent by another thread, as to Django's live server
                new = self._new_blocks(wrapper)
                if link in self._present or _stays_open(wrapper):
                    if new:
                        yield _atomic(wrapper, owner, new)
                elif not _serves_http(owner):
                    state = " inside an atomic block" if wrapper.in_atomic_block else ""
                    yield Left(
                        f"An open connection {wrapper.alias!r}{_number(link)}{state}, "
                        f"in {_place(owner)}.",
                        CLOSE,
                        link.opener,
                    )

    def _past_django(self) -> dict[int, tuple[int, int]]:
        """Return (process, local port) of new sockets to database servers, by inode."""
        me = os.getpid()
        servers = _server_ports()
        known: set[int] | None = None
        found: dict[int, tuple[int, int]] = {}
        for pid in (me, *(sockets.descendants(me) - self._children)):
            new = sockets.held_by(pid) - self._sockets
            if new and known is None:
                known = _known_sockets()
            if new := new - (known or set()):
                for inode, port in sockets.local_ports(pid, new, servers).items():
                    found.setdefault(inode, (pid, port))
        return found


def _note_entries() -> Callable[[], None]:
    """Note on each atomic block where it is entered; return how to end that."""
    enter = Atomic.__enter__

    @wraps(enter)
    def enter_noted(block: Any) -> None:
        block._connguard_entered = stack()
        enter(block)

    def forget() -> None:
        Atomic.__enter__ = enter  # type: ignore[method-assign]

    Atomic.__enter__ = enter_noted  # type: ignore[method-assign]
    return forget


def _atomic(wrapper: BaseDatabaseWrapper, owner: Owner, blocks: list[Atomic]) -> Left:
    what = f"An atomic block on connection {wrapper.alias!r}, in {_place(owner)}."
    return Left(what, LEAVE, getattr(blocks[0], "_connguard_entered", None))


def _open_links(owner: Owner) -> list[Link]:
    links = owner.links.copy().values()
    return [link for link in links if link.wrapper.connection is link.connection]


def _stays_open(wrapper: Any) -> bool:
    """Return whether closing it does nothing."""
    return wrapper.vendor == "sqlite" and bool(wrapper.is_in_memory_db())


def _thread(owner: Owner) -> threading.Thread | None:
    return next((t for t in threading.enumerate() if t.ident == owner.thread), None)


def _serves_http(owner: Owner) -> bool:
    """Return whether it is a thread of Django's live server, which its client keeps alive."""
    thread = _thread(owner)
    return thread is not None and "(process_request_thread)" in thread.name


def _place(owner: Owner) -> str:
    thread = _thread(owner)
    name = f"thread {thread.name!r}" if thread is not None else "a thread that has ended"
    if owner.thread == threading.get_ident() and owner is not current():
        return f"an async context of {name}"
    return name


def _number(link: Link) -> str:
    if link.wrapper.vendor == "sqlite":
        return ""
    with suppress(Exception):
        return f" (session {link.session()})"
    return ""


def _known_sockets() -> set[int]:
    """Return the inodes of the sockets that Django's connections and pools use."""
    numbers = [connection.fileno for pool in pools().values() for connection in tuple(pool._pool)]
    for owner in owners():
        links = _open_links(owner)
        numbers += [link.descriptor for link in links if isinstance(link, SocketLink)]
    inodes = set()
    for number in numbers:
        with suppress(Exception):  # closed while we look
            inodes.add(os.fstat(number()).st_ino)
    return inodes


def _server_ports() -> dict[int, list[str]]:
    """Return the aliases by the port of their server."""
    aliases: dict[int, list[str]] = {}
    for wrapper in connections.all(initialized_only=True):
        if default := DEFAULT_PORTS.get(wrapper.vendor):
            port = int(wrapper.settings_dict["PORT"] or default)
            aliases.setdefault(port, []).append(wrapper.alias)
    return aliases


def _sessions(past_django: dict[int, tuple[int, int]]) -> Iterator[Left]:
    """Ask the servers which of the sockets are sessions on the databases of this project."""
    processes = {port: pid for pid, port in past_django.values()}
    if not processes:
        return
    for aliases in _server_ports().values():
        for alias in aliases:
            for session in _listed(alias):
                port = session.client.rpartition(":")[2]
                pid = processes.pop(int(port), None) if port.isdigit() else None
                if pid is not None:
                    by = "this process" if pid == os.getpid() else f"its child process {pid}"
                    yield Left(
                        f"Session {session.id} at the server of {alias!r}, which {by} has opened "
                        "past Django's connections.",
                        DISCONNECT,
                    )


def _listed(alias: str) -> list[ServerConnection]:
    probe = probe_for(alias)
    wrapper = probe._wrapper

    # Where a test may not use the database, its runner has put something else here.
    def ensure_connection() -> None:
        if wrapper.connection is None:
            with wrapper.wrap_database_errors:
                wrapper.connect()

    wrapper.ensure_connection = ensure_connection
    with suppress(StatsError, Error), probe:
        return probe.connections()
    return []
