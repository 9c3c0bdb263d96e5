"""Tasks, and receivers of signals, that use the database."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from celery import Task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.worker.control import inspect_command
from django.db import connection, connections, transaction

from django_connguard.signals import job_finished
from tests.celery_project.app import app
from tests.server import backend_id, query

SLEEP = {"postgresql": "SELECT pg_sleep(%s)", "mysql": "SELECT SLEEP(%s)"}
JOURNAL = os.environ["CONNGUARD_JOURNAL"]


def note(**line: Any) -> None:
    """Append to the journal that the test reads."""
    with open(JOURNAL, "a") as journal:
        journal.write(json.dumps(line) + "\n")


@app.task
def backend(alias: str = "default", wait: float = 0) -> int:
    """Return the number of the connection at the server."""
    number = backend_id(connections[alias])
    time.sleep(wait)
    return number


@app.task
def sleep(seconds: float) -> None:
    """Run a query that takes so many seconds."""
    with connection.cursor() as cursor:
        cursor.execute(SLEEP[connection.vendor], [seconds])


@app.task
def survive(seconds: float) -> str:
    """Outlive a time limit that strikes in a query, and return a result all the same."""
    try:
        sleep(seconds)
    except SoftTimeLimitExceeded:
        return "struck"
    return "slept"


@app.task
def nested() -> list[int]:
    """Return what connection eager tasks, and this one around them, have."""
    own = connections["brief"]

    def eager() -> int:
        return int(backend.apply(["brief"]).get(disable_sync_subtasks=False))

    numbers = [backend_id(own), eager(), backend("brief"), backend_id(own)]
    with transaction.atomic("brief"):
        numbers += [eager(), backend_id(own)]
    return numbers


@app.task(bind=True, max_retries=2, default_retry_delay=0)
def retried(self: Task) -> int:
    query()
    if self.request.retries < 1:
        raise self.retry()
    return int(self.request.retries)


@app.task
def ignored() -> None:
    query()
    raise Ignore


@app.task(acks_late=True)
def rejected() -> None:
    query()
    raise Reject("no", requeue=False)


@app.task
def failing() -> None:
    query()
    raise ValueError("as it should")


@app.task
def add(x: int | list[int], y: int = 0) -> int:
    query()
    return sum(x) if isinstance(x, list) else x + y


@app.task
def lose_connection(result: Any = None) -> Any:
    """End with a connection that the server has closed, as one has after long work elsewhere."""
    number = backend_id()
    other = connection.copy()
    kill = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL CONNECTION %s"}
    with other.cursor() as cursor:
        cursor.execute(kill[connection.vendor], [number])
    other.close()
    time.sleep(0.1)
    return result


@inspect_command()
def ask_database(state: Any) -> int:
    """Use the ORM in the worker's remote control."""
    return backend_id(connections["brief"])


@app.task
def idle() -> None:
    """Do nothing."""


def on_job_finished(
    name: str, closed: dict[str, int], exception: Any, queue_wait: float | None, **kwargs: Any
) -> None:
    raised = type(exception).__name__ if exception else None
    note(job=name, closed=closed, exception=raised, queue_wait=queue_wait)


if not os.environ.get("CONNGUARD_BENCHMARK"):
    job_finished.connect(on_job_finished)


@signals.task_prerun.connect
@signals.task_postrun.connect
def on_task(signal: Any, sender: Any, **kwargs: Any) -> None:
    if sender.name == observed.name:
        note(**{signal.name: backend_id(connections["brief"])})


@app.task
def observed() -> int:
    """Have receivers, before and after, that use the ORM."""
    return backend_id(connections["brief"])


@signals.worker_ready.connect
def on_worker_ready(**kwargs: Any) -> None:
    note(ready=query())


@signals.task_revoked.connect
def on_task_revoked(**kwargs: Any) -> None:
    note(revoked=query())


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def die_at_first(self: Task) -> int:
    """Kill the process the first time; return the number of the connection the second."""
    number = backend_id()
    if not self.request.delivery_info["redelivered"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@app.task
def sleep_after_others(seconds: float) -> None:
    """Run a query when others, gone by then, have had connections too."""
    backend_id()
    copy = connection.copy()
    backend_id(copy)
    copy.close()
    child = os.fork()
    if child == 0:
        try:
            backend_id()
            connection.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    note(process=os.getpid())
    sleep(seconds)
