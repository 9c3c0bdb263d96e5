"""Celery: each task is a unit of work, and so is what a worker or beat does besides its tasks.

Celery's own Django fixup (``celery.fixups.django``) closes every connection, and on prefork the
psycopg pool too, before and after each task. In a worker this module takes its place: it replaces
the functions that ``_replacements()`` names, and ``undo()`` puts them back. Other processes that
import Celery, a web server say, are left as they are.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from celery import current_task, signals
from celery.utils.time import maybe_iso8601
from django.db import connections

from django_connguard import hygiene, orphans
from django_connguard.boundary import Unit
from django_connguard.ownership import current
from django_connguard.pools import pools

SENT_AT = "connguard_sent_at"  # a task's header: seconds since the epoch

logger = logging.getLogger("django_connguard")

_replaced: list[tuple[Any, str, Any]] = []  # holder, name, what was there
_fixup_is_unknown = False
_tasks_end_threads = False  # greenlets: each task has one of its own, and connections with it


def connect() -> None:
    """Wait for this process to turn out to be a worker or beat.

    Called when Django starts. ``celeryd_init`` is a worker's first signal; a pool's child that was
    not forked from a worker but started anew (as on macOS) has this variable set, and gets none.
    """
    signals.before_task_publish.connect(_on_publish)
    signals.celeryd_init.connect(_on_worker_begins)
    signals.celeryd_after_setup.connect(_on_worker_is_set_up)
    signals.worker_process_init.connect(_on_child_begins)
    signals.worker_process_shutdown.connect(_on_child_ends)
    signals.worker_shutdown.connect(_on_worker_ends)
    signals.beat_init.connect(_on_beat_begins)
    if os.environ.get("FORKED_BY_MULTIPROCESSING"):
        _on_worker_begins()


def install() -> bool:
    """Take over from Celery's fixup, for the worker that starts next in this process.

    Returns False, and changes nothing, where Celery is not as this module knows it.
    """
    if not _replaced:
        try:
            replacements = [*_replacements()]
        except (AttributeError, ImportError):
            return False
        for holder, name, new in replacements:
            _replaced.append((holder, name, getattr(holder, name)))
            setattr(holder, name, new)
    return True


def undo() -> None:
    """Put back what ``install()`` replaced; a worker that runs already keeps what it has built."""
    while _replaced:
        holder, name, original = _replaced.pop()
        setattr(holder, name, original)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Yield what is replaced: holder, name, and what takes its place."""
    from celery.app import trace
    from celery.backends.base import Backend
    from celery.fixups.django import DjangoWorkerFixup
    from celery.utils.dispatch import Signal
    from celery.worker.consumer import consumer
    from celery.worker.pidbox import Pidbox
    from celery.worker.request import Request
    from celery.worker.worker import WorkController

    def build_late(*args: Any, **options: Any) -> Any:
        # What wraps the tracer after us, as Sentry does in celeryd_init, expects that the
        # consumer's module is imported later still.
        return trace.build_tracer(*args, **options)

    if set(DjangoWorkerFixup.install.__code__.co_names) != _FIXUP_INSTALL:
        raise AttributeError("DjangoWorkerFixup.install() does something new.")
    yield DjangoWorkerFixup, "install", _install_nothing
    yield trace, "build_tracer", _guard_tasks(trace.build_tracer)
    yield consumer, "build_tracer", build_late
    for name in ("started", "done", "failure", "retry", "revoked"):
        yield Backend, f"mark_as_{name}", _guard_result(getattr(Backend, f"mark_as_{name}"))
    for name in ("send", "send_robust"):
        yield Signal, name, _guard_signal(getattr(Signal, name))
    yield Pidbox, "on_message", _in_unit(Pidbox.on_message, "celery.control")
    yield WorkController, "terminate", _end_after(WorkController.terminate)
    for name in ("on_timeout", "on_failure"):  # these call the task's own handlers
        yield Request, name, _in_unit(getattr(Request, name), f"celery.{name}")


# What DjangoWorkerFixup.install() of Celery 5.3 to 5.7 names: the signals that it connects, and to
# what. One that names anything else does what nobody here has looked at.
_FIXUP_INSTALL = {
    *("signals", "connect", "beat_embedded_init", "close_database", "close_cache"),
    *("task_prerun", "on_task_prerun", "task_postrun", "on_task_postrun"),
    *("worker_process_init", "on_worker_process_init"),
}


def _install_nothing(fixup: Any) -> Any:
    """Stand in for DjangoWorkerFixup.install(): a worker starts, and forks, without connections."""
    _close_all()
    return fixup


def _guard_tasks(build_tracer: Callable[..., Any]) -> Callable[..., Any]:
    """Make a unit of work of the function that runs a task from its first signal to its last.

    It also stores the result and calls the task's handlers. ``build_tracer`` makes one for each
    task, with ``eager`` for one that runs in the middle of its caller, whose connections it uses.
    """

    @wraps(build_tracer)
    def build(name: str, *args: Any, eager: bool = False, **options: Any) -> Callable[..., Any]:
        trace = build_tracer(name, *args, eager=eager, **options)

        @wraps(trace)
        def trace_in_unit(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
            unit = Unit(name)
            unit.queue_wait = _queue_wait(request)
            unit.enter()
            error: BaseException | None = None
            try:
                outcome = trace(uuid, args, kwargs, request)
                if outcome.info is not None:  # failed, or to be retried, rejected or ignored
                    error = outcome.info.retval
                return outcome
            except BaseException as raised:
                error = raised
                raise
            finally:
                unit.exit(error, _tasks_end_threads)
                error = None  # or this frame and the traceback would hold each other

        return trace if eager else trace_in_unit

    return build


def _on_publish(headers: Any = None, **kwargs: Any) -> None:
    if isinstance(headers, dict):
        headers[SENT_AT] = time.time()


def _queue_wait(request: Any) -> float | None:
    """Return the seconds since a task was sent, or since its ETA; by the clocks of two hosts."""
    try:
        due = request.get(SENT_AT)
        if due is not None and request.get("eta"):
            due = max(due, maybe_iso8601(request["eta"]).timestamp())
        return None if due is None else max(time.time() - due, 0.0)
    except Exception as error:
        logger.info("It is not known how long a task has waited in its queue: %s", error)
        return None


def _guard_result(store: Callable[..., Any]) -> Callable[..., Any]:
    """Give a result a sound connection to be stored on, in django-celery-results say.

    In a task, its body may have lost the connection, or have been cut off in a query by a time
    limit. Outside, a worker's main process stores the results of tasks that were revoked, or lost
    with their process.
    """

    @wraps(store)
    def store_soundly(*args: Any, **kwargs: Any) -> Any:
        with Unit(f"celery.{store.__name__}"):
            if not (current_task and current_task.request.is_eager):
                for link in current().held():
                    hygiene.close_if_unfit(link, {})
            return store(*args, **kwargs)

    return store_soundly


def _guard_signal(send: Callable[..., Any]) -> Callable[..., Any]:
    """Make a unit of work of the receivers of a signal that is sent outside tasks."""

    @wraps(send)
    def send_in_unit(signal: Any, sender: Any, **named: Any) -> Any:
        if not signal.receivers:
            return send(signal, sender, **named)
        with Unit(f"celery.{signal.name}"):
            return send(signal, sender, **named)

    return send_in_unit


def _in_unit(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Unit(name):
            return function(*args, **kwargs)

    return run


def _end_after(terminate: Callable[..., Any]) -> Callable[..., Any]:
    """A cold shutdown sends no ``worker_shutdown``."""

    @wraps(terminate)
    def terminate_and_end(*args: Any, **kwargs: Any) -> Any:
        try:
            return terminate(*args, **kwargs)
        finally:
            _on_worker_ends()

    return terminate_and_end


def _on_worker_begins(**kwargs: Any) -> None:
    global _fixup_is_unknown  # noqa: PLW0603
    _fixup_is_unknown = not install()


def _on_worker_is_set_up(instance: Any, **kwargs: Any) -> None:
    """Say once, when logging is set up, what a user may not expect."""
    global _tasks_end_threads  # noqa: PLW0603
    if _fixup_is_unknown:
        logger.warning(
            "The Django fixup of this Celery is not known to connguard: it stays in charge, and"
            " closes connections before and after each task. Upgrade django-connguard, or set"
            " CONNGUARD['CELERY'] to False."
        )
        return
    if instance.app.conf.get("CELERY_DB_REUSE_MAX"):
        logger.warning("CELERY_DB_REUSE_MAX is superseded by CONN_MAX_AGE and has no effect.")
    if instance.pool_cls.uses_semaphore:  # only prefork's does
        orphans.begin_family()
    _tasks_end_threads = instance.pool_cls.is_green
    persistent = [
        alias for alias in connections if connections[alias].settings_dict["CONN_MAX_AGE"] != 0
    ]
    if _tasks_end_threads and persistent:
        logger.warning(
            "CONN_MAX_AGE of %s can't reuse connections here, where each task runs in a greenlet of"
            " its own; Django's psycopg pool (OPTIONS['pool'], CONN_MAX_AGE 0) can.",
            ", ".join(map(repr, persistent)),
        )


def _on_beat_begins(sender: Any, **kwargs: Any) -> None:
    """Make a unit of work of each look at the schedule, which may be in the database."""
    scheduler = sender.scheduler
    for name in ("tick", "sync"):
        setattr(scheduler, name, _in_unit(getattr(scheduler, name), f"celery.beat.{name}"))


def _on_child_begins(**kwargs: Any) -> None:
    orphans.join_family()


def _on_child_ends(**kwargs: Any) -> None:
    _close_all()
    orphans.leave_family()


def _on_worker_ends(**kwargs: Any) -> None:
    _close_all()
    orphans.end_family()


def _close_all() -> None:
    """Close this thread's connections, and the process's pools."""
    hygiene.close_at_thread_end(current(), {})
    open_pools = pools()
    while open_pools:
        open_pools.popitem()[1].close()
