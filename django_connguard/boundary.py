"""The two ends of a unit of work: enter and exit, as request_started and request_finished are."""

from __future__ import annotations

import logging
from threading import get_ident
from time import monotonic
from types import TracebackType
from weakref import ref

from django.core.signals import request_finished, request_started

from django_connguard import connecting, hygiene  # noqa: F401  (connections must be watched)
from django_connguard.conf import conf
from django_connguard.interrupts import is_interrupt
from django_connguard.ownership import Owner, current
from django_connguard.request_signals import (
    close_caches,
    is_djangos_own,
    reset_queries_as_django,
    send,
)
from django_connguard.signals import job_finished, job_started

logger = logging.getLogger("django_connguard")


class Unit:
    """A unit of work: from enter to exit, the outermost of its thread owns the connections.

    ``name``: for logs and signals. ``signals``: True sends Django's request signals, False does
    what Django's three hygiene receivers do and no more (lean), None takes REQUEST_SIGNALS.
    ``nests``: False where outside code may begin an ``atomic`` block meanwhile, as a generator's
    consumer may. ``shared``: one of several jobs that run at once on one thread. ``queue_wait``:
    seconds that it waited in its queue, where a runner knows that.
    """

    __slots__ = (
        *("__weakref__", "_entry", "_owner"),
        *("closed", "name", "nests", "queue_wait", "shared", "signals", "started"),
    )

    def __init__(
        self, name: str, signals: bool | None = None, nests: bool = True, shared: bool = False
    ) -> None:
        self.name = name
        self.signals = signals
        self.nests = nests
        self.shared = shared
        self.queue_wait: float | None = None
        self.closed: hygiene.Closed = {}
        self._owner: Owner | None = None
        self.started: float | None = None  # as of time.monotonic(); None: nested in another

    def enter(self) -> None:
        """Begin; inside another unit, a live request or an ``atomic`` block, change nothing."""
        owner = current()
        units = owner.units
        outermost = not units or not owner.prune()
        if outermost and owner.in_request:
            return
        # Weak: a unit whose exit was cut off by an exception from a signal handler is gone when
        # its frame is, and does not make every later job of the thread a nested one.
        self._entry = ref(self)
        try:
            self._owner = owner
            units.append(self._entry)
            if owner.claimed:
                owner.wait_for_reaper()
            if outermost and not self._prepare(owner):
                self._leave(owner)
                return
            if self.shared and not outermost:
                for link in owner.held():
                    hygiene.close_if_stale(link, self.closed)
            if outermost or self.shared:
                self.started = monotonic()
                if job_started.receivers:
                    send(job_started, Unit, owner, self.closed, name=self.name)
        except Exception as error:
            if is_interrupt(error):  # the job's own time limit, say: it must not begin
                self._leave(owner)
                raise
            logger.exception("The boundary at the start of job %s failed.", self.name)
        except BaseException:
            self._leave(owner)
            raise

    def _prepare(self, owner: Owner) -> bool:
        """Make the connections fit for the job; return False if a transaction forbids it."""
        held = owner.held()
        for link in held:
            if link.wrapper.in_atomic_block:
                return False
        for link in held:
            hygiene.before_job(link, self.name, self.closed)
        # Where nobody else listens, what Django's receivers do is done without sending it.
        wanted = conf.REQUEST_SIGNALS if self.signals is None else self.signals
        if wanted and not is_djangos_own(request_started, Unit):
            send(request_started, Unit, owner, self.closed)
        else:
            reset_queries_as_django(owner)
            hygiene.close_old_connections(held, self.closed)
        return True

    def exit(self, exception: BaseException | None = None, ends_thread: bool = False) -> bool:
        """End; the last unit out does the hygiene, so overlapping jobs never lose a connection.

        ``exception``: what the job raised. ``ends_thread``: close what is open whatever its age.
        Returns whether no unit of work is left in the thread.
        """
        owner = self._owner
        if owner is None:
            return not current().units
        last = False
        try:
            # A generator collected by another thread ends there; then its owner's next unit of
            # work puts things right at its start.
            last = (len(owner.units) == 1 or owner.prune() == 1) and owner.thread == get_ident()
            if last:
                self._clean(owner, exception)
                if ends_thread:
                    hygiene.close_at_thread_end(owner, self.closed)
            if job_finished.receivers and self.started is not None:
                send(
                    job_finished,
                    Unit,
                    owner,
                    self.closed,
                    name=self.name,
                    duration=monotonic() - self.started,
                    exception=exception,
                    closed=self.closed,
                    queue_wait=self.queue_wait,
                )
                if last:
                    for link in owner.held():
                        hygiene.close_if_old(link, {})
        except Exception:
            logger.exception("The boundary at the end of job %s failed.", self.name)
        finally:
            if last:
                owner.in_request = False  # one that began within the job and was never finished
                owner.used_outside = False
            self._leave(owner)
        if last:
            owner.rest()
        return not owner.units

    __enter__ = enter

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Closing a generator before its end is not a failure of the job.
        self.exit(None if kind is GeneratorExit else exception)

    def _clean(self, owner: Owner, exception: BaseException | None) -> None:
        held = owner.held()
        if not self.nests:
            for link in held:
                if link.wrapper.in_atomic_block:
                    return  # the block is its consumer's, whose own boundary will come
        if len(held) < len(owner.links):
            for link in tuple(owner.links.values()):
                if link.wrapper.in_atomic_block and link.wrapper.connection is None:
                    hygiene.forget_block(link)
        now = monotonic()
        started = now if self.started is None else self.started
        for link in held:
            link.tally.count_unit(started, link.opened_at, now)
            link.opened_outside = False  # the jobs' from now on
            hygiene.after_job(link, self.name, exception is not None, self.closed)
        wanted = conf.REQUEST_SIGNALS if self.signals is None else self.signals
        if wanted and not is_djangos_own(request_finished, Unit):
            send(request_finished, Unit, owner, self.closed)
            for link in owner.held():
                hygiene.close_if_old(link, self.closed)
        else:
            hygiene.close_old_connections(held, self.closed)
            close_caches()

    def _leave(self, owner: Owner) -> None:
        self._owner = None
        units = owner.units
        if units and units[-1] is self._entry:
            units.pop()
        elif self._entry in units:
            units.remove(self._entry)
