"""The worker process of an experiment: runs one job again and again, and tells its parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from typing import Any
from uuid import uuid4

import django
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.utils.module_loading import import_string

from django_connguard.connstats.probe import first_line
from django_connguard.drivers import link_to
from django_connguard.job import job, undecorated

# What a worker tells, as the first item of a tuple; SESSION and JOB carry more.
READY = "ready"
FAILED = "failed"  # why it cannot begin: str
SESSION = "session"  # the server's number of a connection that was opened: int
JOB = "job"  # latency in seconds: float, what the job raised: str or None
PAUSED = "paused"  # half of the jobs are done, and it waits to be told to go on
DONE = "done"  # it idles, as a worker does whose queue is empty, until it is told to stop


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one worker process does.

    ``due``: for each of its threads, when its jobs are due, in seconds from the start. ``name`` is
    no other's.
    """

    alias: str
    job: str
    max_age: float | None
    guarded: bool
    due: Sequence[Sequence[float]]
    pauses: bool
    name: str = field(default_factory=lambda: f"connguard-experiment-{uuid4().hex[:12]}")


def main(assignment: Assignment, pipe: Connection, telling: Lock) -> None:
    """Work through an assignment, in step with the parent at the pipe's other end."""
    keep_quiet()
    parent = Parent(pipe, telling)
    try:
        work = prepare(assignment)
    except Exception as error:
        parent.tell(FAILED, one_line(error))
    else:
        Crew(assignment, work, parent).run()


def keep_quiet() -> None:
    """Leave Ctrl-C to the parent, and keep what jobs print out of its report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr


def prepare(assignment: Assignment) -> Callable[[], Any]:
    """Set Django up under the assignment's CONN_MAX_AGE; return the job, guarded or not."""
    django.setup()
    # The wrappers of all threads share this dict. Asking for one imports the driver, now.
    connections[assignment.alias].settings_dict["CONN_MAX_AGE"] = assignment.max_age
    work: Callable[[], Any] = undecorated(import_string(assignment.job))
    if assignment.guarded:
        work = job(name=assignment.job)(work)
    return async_to_sync(work) if iscoroutinefunction(work) else work


class Parent:
    """The other end of the pipe; without it there is nothing to work for."""

    def __init__(self, pipe: Connection, telling: Lock) -> None:
        self._pipe = pipe
        self._telling = telling

    def tell(self, what: str, *more: object) -> None:
        """Send a message; any thread may, and any process that is forked."""
        try:
            with self._telling:
                self._pipe.send((what, *more))
        except OSError:
            os._exit(1)

    def wait(self) -> None:
        """Wait to be told to go on."""
        try:
            self._pipe.recv()
        except (EOFError, OSError):
            os._exit(1)


class Crew:
    """The threads of a worker process, of which the main thread is the first."""

    def __init__(self, assignment: Assignment, work: Callable[[], Any], parent: Parent) -> None:
        self._assignment = assignment
        self._work = work
        self._parent = parent
        self._in_step = threading.Barrier(len(assignment.due))

    def run(self) -> None:
        """Work until the parent says that it is over."""
        connection_created.connect(self._on_connection_created)
        self._parent.tell(READY)
        self._parent.wait()
        threads = [
            threading.Thread(target=self._work_off, args=(due,)) for due in self._assignment.due[1:]
        ]
        for thread in threads:
            thread.start()
        self._work_off(self._assignment.due[0])

    def _work_off(self, due: Sequence[float]) -> None:
        half = len(due) // 2 if self._assignment.pauses else None
        began = time.monotonic()
        for number, moment in enumerate(due):
            if number == half:
                paused = time.monotonic()
                self._rendezvous(PAUSED)
                began += time.monotonic() - paused
            time.sleep(max(0.0, began + moment - time.monotonic()))
            self._do_job()
        # The thread ends only when all is over, since its connection ends with it.
        self._rendezvous(DONE)

    def _do_job(self) -> None:
        start = time.perf_counter()
        raised = None
        try:
            self._work()
        except (Exception, SystemExit) as error:
            raised = one_line(error)
        self._parent.tell(JOB, time.perf_counter() - start, raised)

    def _rendezvous(self, what: str) -> None:
        """Wait for the other threads, and then together for the parent."""
        if self._in_step.wait() == 0:
            self._parent.tell(what)
            self._parent.wait()
        self._in_step.wait()

    def _on_connection_created(self, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
        if connection is connections[self._assignment.alias]:
            self._parent.tell(SESSION, link_to(connection).session())


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"
