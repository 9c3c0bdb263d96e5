"""Celery: what workers and beat do when servers restart, and processes come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import django
import pytest

from tests import services, workers
from tests.command import ROOT
from tests.own_server import own_server
from tests.server import Server, eventually, watch
from tests.workers import TASKS, Process, Project, end, still_open

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.one_driver,
    pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server"),
]

PERSISTENT: dict[str, dict[str, Any]] = {"default": {"CONN_MAX_AGE": None}}
POOLS = {
    "prefork": ("-P", "prefork", "-c", "2"),
    "threads": ("-P", "threads", "-c", "2"),
    "solo": ("-P", "solo"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workers.need("celery", "redis")
    workers.need_server(workers.REDIS)
    return tmp_path_factory.mktemp("celery")


@pytest.fixture(scope="module")
def server(django_db_setup: None, django_db_blocker: Any, folder: Path) -> Iterator[Server]:
    with django_db_blocker.unblock(), watch() as view:
        yield view


def start(stack: ExitStack, project: Project, *arguments: str) -> Process:
    """Start a worker, which may not be ready yet: several start at once."""
    arguments = ("worker", "--without-gossip", "--without-mingle", "-l", "info", *arguments)
    return stack.enter_context(project.process(*arguments, "-n", f"{project.prefix}@host"))


@pytest.mark.skipif(django.VERSION >= (6, 1), reason="django-celery-beat refuses Django 6.1")
def test_no_task_fails_when_the_server_restarts_and_beat_goes_on(folder: Path) -> None:
    workers.need("django_celery_beat")
    with own_server() as own, ExitStack() as stack:
        aliases = {"default": {**own.settings, "CONN_MAX_AGE": None}}
        beat = Project(
            folder,
            aliases=aliases,
            apps=["django_celery_beat"],
            beat_schedule={"often": {"task": f"{TASKS}.add", "schedule": 0.25, "args": [1]}},
            beat_scheduler="django_celery_beat.schedulers:DatabaseScheduler",
            beat_max_loop_interval=0.25,
        )
        projects = {pool: Project(folder, aliases=aliases) for pool in POOLS}
        processes = {name: start(stack, projects[name], *POOLS[name]) for name in POOLS}
        beat.python("-m", "django", "migrate", "-v", "0")
        processes["beat"] = stack.enter_context(beat.process("beat", "-l", "info", "--pidfile="))
        for name, project in projects.items():
            assert eventually(lambda: bool(project.noted("ready")), 20), processes[name].log()  # noqa: B023
        assert eventually(lambda: beat.waiting() > 0, 20), processes["beat"].log()
        for project in projects.values():
            assert len(set(project.run_many(6, "backend"))) <= 2
        own.stop()
        own.start()
        for project in projects.values():
            project.run_many(6, "backend")
        waiting = beat.waiting()
        assert eventually(lambda: beat.waiting() >= waiting + 2, 10), processes["beat"].log()
        for process in processes.values():  # all at once
            process.signal(signal.SIGTERM)


def test_children_that_autoscaling_ends_close_their_connections(
    server: Server, folder: Path
) -> None:
    project = Project(folder, aliases=PERSISTENT, env={"AUTOSCALE_KEEPALIVE": "1"})
    before = set(server.sessions())
    with project.worker("--autoscale", "3,1") as worker:
        results = [project.send("backend", "default", 0.4) for _ in range(9)]
        numbers = {result.get(timeout=20) for result in results}
        assert len(numbers) > 1, worker.log()
        assert eventually(lambda: len(still_open(server, numbers)) == 1, 10), worker.log()
        # One by one, or it would grow again.
        assert {project.run("backend"), project.run("backend")} == still_open(server, numbers)
        assert worker.stop() == 0
        assert eventually(lambda: not set(server.sessions()) - before)


@pytest.mark.parametrize("how", ["quit", "two interrupts"])
def test_a_cold_shutdown_leaves_nothing_at_the_server(
    how: str, server: Server, folder: Path
) -> None:
    project = Project(folder, aliases=PERSISTENT)
    temporary = folder / how.replace(" ", "-")
    temporary.mkdir()
    project._env["TMPDIR"] = str(temporary)
    before = set(server.sessions())
    with project.worker("-P", "prefork", "-c", "2") as worker:
        # Drivers in C don't let Python handle a signal before the query has ended.
        project.send("sleep", 30 if services.driver() in ("psycopg", "pymysql") else 2)
        assert eventually(lambda: server.running("sleep") == 1)
        if how == "quit":
            worker.signal(signal.SIGQUIT)
        else:
            worker.signal(signal.SIGINT)
            time.sleep(0.3)
            worker.signal(signal.SIGINT)
        worker._process.wait(15)
        assert eventually(lambda: server.running("sleep") == 0), worker.log()
        assert eventually(lambda: not set(server.sessions()) - before)
    assert not [*temporary.glob("connguard-*")]


def test_rabbitmq_brings_a_task_again_whose_process_was_killed(
    server: Server, folder: Path
) -> None:
    workers.need_server(workers.RABBITMQ)
    project = Project(folder, broker=workers.RABBITMQ, aliases=PERSISTENT)
    before = set(server.sessions())
    with project.worker("-P", "prefork", "-c", "2") as worker:
        numbers = project.run_many(20, "backend")
        assert len(set(numbers)) <= 2
        end(server, numbers)
        assert not set(project.run_many(20, "backend")) & set(numbers)
        assert project.run("die_at_first") in server.sessions(), worker.log()
        assert project.run("retried") == 1
        project.run_many(8, "backend")
        assert len(set(server.sessions()) - before) <= 3  # and the main process's
        assert worker.stop() == 0
        assert eventually(lambda: not set(server.sessions()) - before)


def test_no_query_of_a_killed_process_goes_on_though_it_has_had_other_connections(
    server: Server, folder: Path
) -> None:
    project = Project(folder, aliases=PERSISTENT)
    with project.worker("-P", "prefork", "-c", "1"):
        project.send("sleep_after_others", 20)
        assert eventually(lambda: server.running("sleep") == 1, 10)
        os.kill(project.noted("process")[0]["process"], signal.SIGKILL)
        assert eventually(lambda: server.running("sleep") == 0, 8)


def test_what_wraps_build_tracer_after_connguard_is_not_passed_by(folder: Path) -> None:
    # Sentry's does, in a receiver of celeryd_init.
    from celery.app import trace

    from django_connguard.integrations import celery as integration

    assert integration.install()
    guarded = trace.build_tracer
    try:
        trace.build_tracer = lambda *args, **options: "wrapped"
        from celery.worker.consumer import consumer

        assert consumer.build_tracer("name", None) == "wrapped"
    finally:
        trace.build_tracer = guarded
        integration.undo()


SWITCHES = """
from gevent import monkey; monkey.patch_all()
import gevent, socket
from django_connguard.drivers.link import poller
ran = []
gevent.spawn(ran.append, 1)
one, other = socket.socketpair()
poll = poller(one.fileno())
assert not poll(0)
other.send(b"x")
assert poll(0)
assert not ran
"""


def test_looking_at_a_connection_lets_no_other_greenlet_run() -> None:
    workers.need("gevent")
    subprocess.run([sys.executable, "-c", SWITCHES], check=True, cwd=ROOT, timeout=30)
