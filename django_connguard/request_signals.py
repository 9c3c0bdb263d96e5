"""Django's request signals: sent for a job, done without sending (lean), and noticed.

For a job each receiver is called just as ``send_robust()`` does, but for the three in which Django
keeps connections healthy: what those do is done here, on the connections of its thread,
while Django's look up every alias in an asgiref Local several times. That makes the boundary
cheaper than a request's. A receiver that was disconnected is not done here either.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import cache
from operator import is_
from typing import Any
from weakref import WeakMethod, ref

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.cache import BaseCache
from django.core.cache import close_caches as django_close_caches
from django.core.signals import request_finished, request_started, setting_changed
from django.db import close_old_connections as django_close_old_connections
from django.db import reset_queries as django_reset_queries
from django.dispatch import Signal
from django.utils.module_loading import import_string

from django_connguard.hygiene import Closed, close_old_connections
from django_connguard.interrupts import is_interrupt
from django_connguard.naming import dotted_name
from django_connguard.ownership import Owner, current

logger = logging.getLogger("django_connguard")


Step = Callable[[Signal, type, Owner, Closed, dict[str, Any]], None]


class _Plan:
    """What is to be done when a signal is sent, as long as its receivers stay what they are.

    Django looks them up anew, under a lock, each time.
    """

    __slots__ = ("_receivers", "_signal", "is_djangos_own", "steps")

    def __init__(self, signal: Signal, sender: type) -> None:
        self._signal = signal
        live: Any = None
        while live is None or not self.holds():  # another thread may connect one meanwhile
            self._receivers = signal.receivers.copy()
            live = signal._live_receivers(sender)
        receivers, asyncs = (live, []) if isinstance(live, list) else live  # 4.2: a list
        self.steps = [*_steps(receivers, asyncs)]
        djangos = _DJANGOS.get(signal, ())
        # All that Django connects itself, and nothing but that.
        self.is_djangos_own = (
            len(self.steps)
            == len(djangos)
            == sum(any(receiver is own for own in djangos) for receiver in receivers)
        )

    def holds(self) -> bool:
        signal: Any = self._signal
        before, now = self._receivers, signal.receivers
        # By identity: receivers may be equal, as methods of equal objects are.
        return len(before) == len(now) and all(map(is_, before, now)) and not signal._dead_receivers


_DJANGOS = {
    request_started: (django_reset_queries, django_close_old_connections),
    request_finished: (django_close_caches, django_close_old_connections),
}
_plans: dict[Signal, _Plan] = {}


def _plan(signal: Signal, sender: type) -> _Plan:
    plan = _plans.get(signal)
    if plan is None or not plan.holds():
        plan = _plans[signal] = _Plan(signal, sender)
    return plan


def is_djangos_own(signal: Signal, sender: type) -> bool:
    """Return whether only Django's own hygiene, and all of it, listens to a request signal."""
    return _plan(signal, sender).is_djangos_own


def send(signal: Signal, sender: type, owner: Owner, counted: Closed, **named: Any) -> None:
    """Call every receiver of ``signal``; one that raises is logged once, by its name."""
    for step in _plan(signal, sender).steps:
        step(signal, sender, owner, counted, named)


def _steps(receivers: list[Any], async_receivers: list[Any]) -> Iterator[Step]:
    for receiver in receivers:
        if receiver is django_close_old_connections:
            yield lambda _, __, owner, counted, ___: close_old_connections(owner.held(), counted)
        elif receiver is django_reset_queries:
            yield lambda _, __, owner, *___: reset_queries(owner)
        elif receiver is django_close_caches:
            yield lambda *_: close_caches()
        elif receiver is not _on_request_started and receiver is not _on_request_finished:
            yield _call(receiver)
    for receiver in async_receivers:
        yield _call(receiver, async_to_sync)


def _call(receiver: Callable[..., Any], adapt: Callable[[Any], Any] | None = None) -> Step:
    # Weak, as most signals' references are: that one is known here must not keep it alive.
    reference: Callable[[], Any]
    try:
        reference = WeakMethod(receiver) if inspect.ismethod(receiver) else ref(receiver)
    except TypeError:  # it cannot be referred to weakly, so that the signal does not either
        reference = lambda: receiver  # noqa: E731

    def step(
        signal: Signal, sender: type, owner: Owner, counted: Closed, named: dict[str, Any]
    ) -> None:
        alive = reference()
        if alive is not None:
            try:
                call = alive if adapt is None else adapt(alive)
                call(signal=signal, sender=sender, **named)
            except Exception as error:
                _log_once(alive, error)

    return step


def reset_queries(owner: Owner) -> None:
    """Do what django.db.reset_queries() does."""
    for link in tuple(owner.links.values()):
        queries = link.wrapper.queries_log
        if queries:
            queries.clear()


def reset_queries_as_django(owner: Owner) -> None:
    """Do it where Django would: not while its tests count queries, or who disconnected that."""
    for link in owner.links.values():
        if link.wrapper.queries_log:
            live: Any = request_started._live_receivers(Unsent)
            if django_reset_queries in (live if isinstance(live, list) else live[0]):
                reset_queries(owner)
            return


class Unsent:
    """The sender of a signal that is not sent."""


def close_caches() -> None:
    """Do what django.core.cache.close_caches() does."""
    try:
        if _caches_have_connections():
            django_close_caches()
    except Exception as error:
        _log_once(django_close_caches, error)


@cache
def _caches_have_connections() -> bool:
    """Return whether closing the caches does anything: most back ends have nothing to close."""
    backends = (import_string(cache["BACKEND"]) for cache in settings.CACHES.values())
    return any(backend.close is not BaseCache.close for backend in backends)


def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting == "CACHES":
        _caches_have_connections.cache_clear()


setting_changed.connect(_on_setting_changed, dispatch_uid="django_connguard.request_signals")

_logged: set[str] = set()


def _log_once(receiver: Callable[..., Any], error: Exception) -> None:
    """Log an error: around every job, one line each time would be a flood."""
    if is_interrupt(error):
        raise error
    name = dotted_name(receiver)
    if name not in _logged:
        _logged.add(name)
        logger.error(
            "The signal receiver %s raised; it will not be logged again.", name, exc_info=error
        )


def _on_request_started(**kwargs: Any) -> None:
    owner = current()
    owner.in_request = True
    owner.wait_for_reaper()


def _on_request_finished(**kwargs: Any) -> None:
    current().in_request = False


request_started.connect(_on_request_started, dispatch_uid="django_connguard.request_signals")
request_finished.connect(_on_request_finished, dispatch_uid="django_connguard.request_signals")
