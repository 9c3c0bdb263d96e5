"""Which unit of work, and which open connections, belong to the code that is running.

Django keeps its connections in an asgiref ``Local(thread_critical=True)``: per thread, and inside
an event loop per call stack. Owners are kept in the same way, so that both always agree.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from asyncio import _get_running_loop
from traceback import StackSummary, walk_stack
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

from asgiref.local import Local
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard import hygiene
from django_connguard import reaper as reaping
from django_connguard.conf import conf
from django_connguard.drivers import link_to
from django_connguard.drivers.link import Link
from django_connguard.in_use import watch_streams
from django_connguard.tally import Ended, Tallies, Tally

if TYPE_CHECKING:
    from django_connguard.boundary import Unit

logger = logging.getLogger("django_connguard")


class Owner:
    """A thread (or an async call stack) and what it holds."""

    __slots__ = (
        *("__weakref__", "in_request", "links", "tallies", "thread", "units"),
        *("claim", "claimed", "due", "process", "used_outside"),
    )

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.links: dict[str, Link] = {}  # by alias; may hold links that were closed since
        self.tallies: Tallies = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Be idle; in a forked child, what the parent was about is none of its business."""
        self.process = os.getpid()
        self.units: list[ReferenceType[Unit]] = []  # in progress, the first to enter first
        self.in_request = False  # between request_started and request_finished of a server
        # The handshake with the reaper (see there).
        self.used_outside = False  # by code outside units and requests, since the last unit
        self.claim = threading.Lock()
        self.claimed = False
        self.due: float | None = None  # when the reaper will look at it, as it was told last

    def prune(self) -> int:
        """Forget the units that were never left though their code is gone; return how many stay."""
        self.units[:] = [entry for entry in self.units if entry() is not None]
        return len(self.units)

    def is_idle(self) -> bool:
        """Return whether nobody uses the connections, nor has a right to find them as they are."""
        return not (self.units or self.in_request or self.used_outside)

    def wait_for_reaper(self) -> None:
        """Wait until the reaper is done; to be called when the owner has ceased to be idle."""
        if self.claimed:
            with self.claim:
                pass

    def rest(self) -> None:
        """Let the reaper close by age; to be called when idle again. Never raises."""
        try:
            due = None
            for link in tuple(self.links.values()):
                wrapper = link.wrapper
                if (
                    wrapper.connection is not None
                    and wrapper.close_at is not None
                    and wrapper._thread_ident == self.thread  # type: ignore[attr-defined]  # not lent
                ):
                    _announce_use_outside(wrapper, self)
                    due = wrapper.close_at if due is None else min(due, wrapper.close_at)
            if due is not None and due != self.due and conf.CLOSE_IDLE:
                reaping.reaper.watch(self, due)
        except Exception as error:
            # No thread can be started as the interpreter ends, say.
            logger.info("Idle connections will not be closed by age: %s", error)

    def held(self) -> list[Link]:
        """Return a link to every open connection."""
        held = []
        for link in self.links.values():
            connection = link.wrapper.connection
            if connection is not None:
                # Another one if somebody has put it there behind Django's back.
                held.append(link if connection is link.connection else self.adopt(link.wrapper))
        return held

    def held_for_good(self) -> list[Link]:
        """Return the same, less what other threads have lent, as to Django's live server."""
        held = self.held()
        return [link for link in held if link.wrapper._thread_ident == self.thread]  # type: ignore[attr-defined]

    def adopt(self, wrapper: BaseDatabaseWrapper) -> Link:
        """Watch the open connection of ``wrapper`` from now on."""
        before = self.links.get(wrapper.alias)
        if before is not None and not before.counted:
            hygiene.count_closed_elsewhere(before)
        link = self.links[wrapper.alias] = link_to(wrapper)
        link.tally = self.tally(wrapper.alias)
        link.tally.opened += 1
        if not (self.units or self.in_request):
            link.opened_outside = True
            link.tally.opened_outside += 1
        if conf.OPENER_STACKS:
            link.opener = stack()
        watch_streams(wrapper)
        if link.cancels:
            hygiene.cancel_before_close(link)
        return link

    def tally(self, alias: str) -> Tally:
        """Return where to count what concerns an alias."""
        return self.tallies.setdefault(alias, Tally())

    def adopt_all(self) -> None:
        """Watch whatever is open and was not yet watched."""
        for wrapper in connections.all(initialized_only=True):
            link = self.links.get(wrapper.alias)
            if wrapper.connection is not None and (
                link is None or link.connection is not wrapper.connection
            ):
                self.adopt(wrapper)


class Sentinel:
    """Ends with its thread, in that thread, and takes the owner's connections along.

    They would stay open until the cyclic garbage collector comes, since Django's wrappers form
    reference cycles, as do exceptions with the frames that the owner has passed through. To the
    sentinel nothing refers but the thread's own storage.
    """

    __slots__ = ("_owner",)

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def __del__(self) -> None:
        # Not as the interpreter ends, when modules may be gone already and the operating system
        # closes everything.
        owner = self._owner
        if not owner.links or sys.is_finalizing():
            return
        if owner.process != os.getpid():  # forked: the parent's other threads end here at once
            hygiene.let_go(owner)
        elif conf.CLOSE_AT_THREAD_END:
            hygiene.close_at_thread_end(owner, {})


_in_thread = threading.local()
_in_event_loop = Local(thread_critical=True)


class _Entry(ReferenceType[Owner]):
    """A weak reference that keeps what its owner has counted."""

    __slots__ = ("tallies",)
    tallies: Tallies


_owners: set[_Entry] = set()
_ended = Ended(_owners)


def _forget(entry: _Entry) -> None:
    _ended.append(entry)


def current() -> Owner:
    """Return the owner for the running code."""
    # A thread without an event loop is what Local sees as a plain threading.local; going there
    # directly costs a tenth, and the boundary comes here twice for every job.
    storage: Any = _in_thread if _get_running_loop() is None else _in_event_loop
    try:
        owner: Owner = storage.owner
    except AttributeError:
        owner = storage.owner = Owner()
        entry = _Entry(owner, _forget)
        entry.tallies = owner.tallies
        _owners.add(entry)
        _ended.fold()
        storage.sentinel = Sentinel(owner)
        owner.adopt_all()
    return owner


def owners() -> list[Owner]:
    """Return every owner in the process."""
    # A copy is made in one go; making a tuple may set off the garbage collector half way.
    return [owner for reference in _owners.copy() if (owner := reference())]


def counted() -> tuple[list[Owner], Tallies]:
    """Return every owner, and the sums of what each has counted, those included that are gone."""
    return owners(), _ended.sums_with_the_living()


def begin_anew() -> None:
    """In a forked child: let go of the parent's connections, and count from 0."""
    global _ended  # noqa: PLW0603
    _ended = Ended(_owners)
    for owner in owners():
        owner.tallies.clear()
        hygiene.let_go(owner)
        owner.begin_anew()


def _announce_use_outside(wrapper: BaseDatabaseWrapper, owner: Owner) -> None:
    """Tell the reaper of code that uses the connection outside units of work and requests.

    Django calls ensure_connection() before any use of one.
    """
    if "ensure_connection" in wrapper.__dict__:
        return

    def ensure_connection() -> None:
        if owner.is_idle():
            owner.used_outside = True
            owner.wait_for_reaper()
        # Looked up each time: test runners put something else into the class for a while.
        type(wrapper).ensure_connection(wrapper)

    wrapper.ensure_connection = ensure_connection  # type: ignore[method-assign]


def stack() -> StackSummary:
    """Return the stack of the code that opens something, without the frames that serve it."""
    frames = (
        (frame, line)
        for frame, line in walk_stack(sys._getframe(1))
        if not frame.f_globals.get("__name__", "").startswith(("django_connguard.", "django."))
    )
    summary = StackSummary.extract(frames, limit=30, lookup_lines=False)
    summary.reverse()
    return summary
