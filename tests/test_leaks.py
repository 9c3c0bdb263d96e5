"""Who holds a connection for too long is put down, once and by name."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from django.core.signals import request_finished, request_started
from django.test import override_settings

from django_connguard import job, released
from tests.command import Run
from tests.server import eventually, query

Configure = Callable[..., None]
THRESHOLD = 0.2


@pytest.fixture
def reports(
    database: Configure, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[], list[str]]]:
    database(CONN_MAX_AGE=None)
    caplog.set_level(logging.WARNING, "django_connguard")
    with override_settings(CONNGUARD={"LEAK_THRESHOLD": THRESHOLD, "OPENER_STACKS": True}):
        # A database in memory that another test has opened stays open.
        yield lambda: [text for text in caplog.messages if "held connection 'default'" in text]


def test_a_job_that_holds_a_connection_too_long_is_logged_once_while_it_runs(
    reports: Callable[[], list[str]],
) -> None:
    @job(name="shop.slow")
    def slow() -> None:
        query()
        assert eventually(lambda: bool(reports()))
        time.sleep(3 * THRESHOLD)

    slow()
    [report] = reports()
    assert report.startswith("Job shop.slow has held connection 'default' for 0.")
    assert report.index("in slow") < report.index("in query")  # the opener's stack
    assert "site-packages/django/db" not in report


def test_a_connection_that_an_earlier_job_opened_counts_from_the_jobs_start(
    reports: Callable[[], list[str]],
) -> None:
    job(query)()
    time.sleep(2 * THRESHOLD)
    with job("quick"):
        query()
    assert not reports()
    with job("slow"):
        query()
        assert eventually(lambda: bool(reports()))
    [report] = reports()
    assert report.startswith("Job slow ")


def test_each_slow_job_is_logged(reports: Callable[[], list[str]]) -> None:
    for number in (1, 2):
        with job("slow"):
            query()
            assert eventually(lambda number=number: len(reports()) == number)


def test_quick_jobs_and_a_worker_between_them_are_not_logged(
    reports: Callable[[], list[str]],
) -> None:
    for _ in range(6):
        job(query)()
        time.sleep(THRESHOLD / 3)
    time.sleep(3 * THRESHOLD)
    assert not reports()


def test_a_job_that_has_released_its_connections_is_not_logged(
    reports: Callable[[], list[str]],
) -> None:
    with job("long"):
        query()
        with released():
            time.sleep(3 * THRESHOLD)
    assert not reports()


def test_a_thread_that_opened_a_connection_outside_of_any_job_is_logged_by_name(
    reports: Callable[[], list[str]],
) -> None:
    done = threading.Event()
    thread = threading.Thread(target=lambda: (query(), done.wait()), name="poller")
    thread.start()
    try:
        assert eventually(lambda: bool(reports()))
        time.sleep(3 * THRESHOLD)
    finally:
        done.set()
        thread.join()
    [report] = reports()
    assert report.startswith("Outside of any job, thread 'poller' has held connection 'default'")


def test_a_request_is_not_logged(reports: Callable[[], list[str]]) -> None:
    request_started.send(sender=None)
    query()
    time.sleep(3 * THRESHOLD)
    request_finished.send(sender=None)
    assert not reports()


def test_no_stack_is_kept_unless_asked_for(reports: Callable[[], list[str]]) -> None:
    with override_settings(CONNGUARD={"LEAK_THRESHOLD": THRESHOLD}), job("slow"):
        query()
        assert eventually(lambda: bool(reports()))
    [report] = reports()
    assert "\n" not in report


def test_a_forked_child_watches_for_itself(connstats: Run, database: Configure) -> None:
    result = connstats.script(
        "import logging, os, time; logging.basicConfig(format='%(process)d %(message)s')\n"
        "import django; django.setup()\n"
        "from django.db import connection\n"
        "from django_connguard import job\n"
        "job(connection.ensure_connection)()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    with job('in the child'):\n"
        "        connection.ensure_connection()\n"
        "        time.sleep(0.5)\n"
        "    os._exit(0)\n"
        "print(child); os.waitpid(child, 0)\n",
        connguard={"LEAK_THRESHOLD": 0.1},
        CONN_MAX_AGE=None,
    )
    lines = [line for line in result.stderr.splitlines() if "LEAK_THRESHOLD" in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{result.stdout.strip()} Job in the child has held")
