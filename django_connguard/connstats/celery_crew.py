"""A crew that is one real Celery worker, with the task's own broker and a queue of its own."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from types import TracebackType
from typing import Any

import django
from celery import Task, signals  # before Django starts, as Celery's command line does
from celery.exceptions import SecurityWarning
from celery.worker import state
from django.conf import settings
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.utils.module_loading import import_string

from django_connguard.connstats import worker
from django_connguard.connstats.crew import Crew, Run
from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.probe import Probe, first_line
from django_connguard.connstats.worker import Assignment, Parent
from django_connguard.drivers import link_to

PATIENCE = 30.0  # seconds without a task's end after which a worker is given up


def main(assignment: Assignment, pipe: Connection, telling: Lock) -> None:
    """Be a worker until the parent is gone; unguarded, it is left to Celery's own Django fixup."""
    worker.keep_quiet()
    warnings.simplefilter("ignore", SecurityWarning)  # root may experiment
    parent = Parent(pipe, telling)
    settings.CONNGUARD = {**getattr(settings, "CONNGUARD", {}), "CELERY": assignment.guarded}
    try:
        django.setup()
        connections[assignment.alias].settings_dict["CONN_MAX_AGE"] = assignment.max_age
        task = import_string(assignment.job)
        Reporter(assignment.alias, parent).connect()
        consumer = task.app.Worker(
            pool="prefork",
            concurrency=len(assignment.due),
            queues=[assignment.name],
            hostname=f"{assignment.name}@localhost",
            prefetch_multiplier=1,
            loglevel="ERROR",
            quiet=True,
            without_gossip=True,
            without_mingle=True,
        )
    except Exception as error:
        parent.tell(worker.FAILED, worker.one_line(error))
    else:
        threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
        consumer.start()


def _end_with_parent(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()
    state.should_stop = os.EX_OK  # as the remote control command "shutdown" does


class Reporter:
    """Tells the parent of what happens in the worker's processes."""

    def __init__(self, alias: str, parent: Parent) -> None:
        self._alias = alias
        self._parent = parent
        self._began = 0.0  # a prefork child runs one task at a time

    def connect(self) -> None:
        """Begin, and be kept alive by the signals."""
        signals.worker_ready.connect(self._on_ready, weak=False)
        signals.task_prerun.connect(self._on_task_begins, weak=False)
        signals.task_postrun.connect(self._on_task_ends, weak=False)
        connection_created.connect(self._on_connection_created, weak=False)

    def _on_ready(self, **kwargs: Any) -> None:
        self._parent.tell(worker.READY)

    def _on_task_begins(self, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def _on_task_ends(self, state: str, retval: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._began
        raised = worker.one_line(retval) if isinstance(retval, BaseException) else state
        self._parent.tell(worker.JOB, seconds, None if state == "SUCCESS" else raised)

    def _on_connection_created(self, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
        if connection is connections[self._alias]:
            self._parent.tell(worker.SESSION, link_to(connection).session())


class CeleryCrew(Crew):
    """Sends the tasks as they are due, and hears of each from the process that has run it."""

    target = staticmethod(main)

    @staticmethod
    def check(job: str) -> None:
        """Raise StatsError if ``job`` is no task that a worker could be sent."""
        task = import_string(job)
        if not isinstance(task, Task):
            raise StatsError(f"--pool celery runs tasks of Celery: {job!r} is none")
        if task.app.conf.task_always_eager:
            raise StatsError("task_always_eager is set: Celery would send no worker anything")
        try:
            with task.app.connection_for_write(connect_timeout=3) as broker:
                broker.ensure_connection(max_retries=1, timeout=3)
        except Exception as error:
            place = task.app.connection_for_write().as_uri()
            raise StatsError(f"no broker at {place}: {first_line(error)}") from error

    def __init__(self, assignments: Iterable[Assignment], probe: Probe, run: Run) -> None:
        [assignment] = assignments = list(assignments)
        super().__init__(assignments, probe, run)
        self._task = import_string(assignment.job)
        self._queue = assignment.name
        due = sorted(moment for share in assignment.due for moment in share)
        self._half = len(due) // 2 if assignment.pauses else 0
        # What is to be sent before the drop and after it; without a drop, all at once.
        self._parts = [due[: self._half], due[self._half :]] if assignment.pauses else [due]
        self._number = len(due)
        self._error: Exception | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        with suppress(Exception), self._task.app.connection_for_write() as broker:
            queue = self._task.app.amqp.queues[self._queue].bind(broker.default_channel)
            queue.declare()  # or kombu, which has not sent anything here, knows no binding
            queue.delete()
            queue.exchange.delete()

    def go_on(self) -> None:
        """Send the tasks up to the drop, or those after it."""
        tasks = self._parts.pop(0)
        threading.Thread(target=self._send, args=(tasks,), daemon=True).start()

    def _send(self, due: Sequence[float]) -> None:
        began = time.monotonic() - (due[0] if due else 0)
        try:
            for moment in due:
                time.sleep(max(0.0, began + moment - time.monotonic()))
                self._task.apply_async(queue=self._queue, ignore_result=True)
        except Exception as error:
            self._error = error

    def hear_first_half(self, progress: Callable[[], object]) -> None:
        """Listen until the tasks that were sent have ended."""
        self._hear_jobs(self._half, progress)

    def hear_the_rest(self, progress: Callable[[], object]) -> None:
        """Listen until all tasks have ended."""
        self._hear_jobs(self._number, progress)

    def _hear_jobs(self, number: int, progress: Callable[[], object]) -> None:
        heard, last = self.run.jobs, time.monotonic()

        def is_over() -> bool:
            nonlocal heard, last
            if self._error is not None:
                raise StatsError(f"a task could not be sent: {first_line(self._error)}")
            if heard != self.run.jobs:
                heard, last = self.run.jobs, time.monotonic()
            if time.monotonic() - last > PATIENCE:
                raise StatsError(f"no task has ended for {PATIENCE:g} s: is the worker at work?")
            return heard >= number

        self.listen(is_over, progress)
