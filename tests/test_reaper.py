"""Idle workers hold no connection past its age, and no job ever loses one to the reaper."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable

import pytest
from django.db import connection, connections, transaction
from django.test import override_settings

from django_connguard import job
from tests.command import Run
from tests.server import Server, eventually, query

Configure = Callable[..., None]


def test_a_thread_between_jobs_holds_no_connection_past_its_age(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=0.3)
    job(query)()
    assert server.count() == 1
    assert server.settles_at(0)
    assert job(query)() == 1


def test_an_idle_worker_keeps_a_connection_that_may_live_for_ever(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)
    job(query)()
    time.sleep(0.3)
    assert server.count() == 1


def test_without_the_reaper_it_stays_open_so_that_the_test_above_can_fail(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=0.1)
    with override_settings(CONNGUARD={"CLOSE_IDLE": False}):
        job(query)()
        time.sleep(0.5)
        assert server.count() == 1


def test_a_connection_is_not_taken_from_a_job_that_outlives_its_age(
    database: Configure, opened: list[int]
) -> None:
    database(CONN_MAX_AGE=0.2)
    job(query)()

    @job
    def long() -> None:
        for _ in range(5):
            query()
            time.sleep(0.1)

    long()
    assert len(opened) == 1


def test_a_connection_is_not_taken_from_code_outside_jobs_that_uses_it(
    database: Configure, opened: list[int]
) -> None:
    database(CONN_MAX_AGE=0.2)
    job(query)()
    with connection.cursor() as cursor:
        for _ in range(5):
            cursor.execute("SELECT 1")
            time.sleep(0.1)
    with transaction.atomic():
        query()
    assert len(opened) == 1


def test_what_outside_code_has_used_is_closed_by_age_again_after_the_next_job(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=0.3)
    job(query)()
    query()
    job(query)()
    assert server.settles_at(0)


def test_each_connection_is_closed_when_its_own_time_has_come(
    server: Server, database: Configure
) -> None:
    def work(age: float, done: threading.Event) -> None:
        connection.settings_dict = {**connection.settings_dict, "CONN_MAX_AGE": age}
        job(query)()
        done.wait()

    done = threading.Event()
    threads = [threading.Thread(target=work, args=(age, done)) for age in (60, 0.3, 0.1, None, 0.2)]
    for thread in threads:
        thread.start()
    try:
        assert server.settles_at(2)
        time.sleep(0.3)
        assert server.count() == 2
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert server.settles_at(0)


STRESS_JOBS = int(os.environ.get("CONNGUARD_STRESS_JOBS", "1000"))


def test_no_job_ever_sees_a_connection_that_the_reaper_closed(database: Configure) -> None:
    """Many threads, each of whose jobs starts just when its connection comes to its age."""
    failures: list[str] = []
    ends = {"by the reaper": 0, "by a job's start": 0}

    def work(number: int) -> None:
        chance = random.Random(number)
        wrapper = connections["default"]
        wrapper.settings_dict = {**wrapper.settings_dict, "CONN_MAX_AGE": 0.015}
        for _ in range(STRESS_JOBS // 4):
            age, started = wrapper.settings_dict["CONN_MAX_AGE"], time.monotonic()
            try:
                assert guarded() == 1
            except Exception as error:
                failures.append(repr(error))
            if wrapper.connection is None:
                if wrapper.close_at - age > started:  # the job opened it, and was too slow
                    wrapper.settings_dict["CONN_MAX_AGE"] = age * 1.1
                continue
            time.sleep(max(wrapper.close_at - time.monotonic() + chance.gauss(0, 0.001), 0))
            ends["by a job's start" if wrapper.connection else "by the reaper"] += 1

    guarded = job(signals=False)(query)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(ends.values()) > STRESS_JOBS / 20, ends  # or there was no race


@pytest.mark.skipif(not hasattr(os, "fork"), reason="about forks")
def test_a_forked_child_has_a_reaper_of_its_own(server: Server, database: Configure) -> None:
    database(CONN_MAX_AGE=0.2)
    job(query)()
    assert server.settles_at(0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            job(query)()
            gone = eventually(lambda: connection.connection is None)
            os.write(writing, b"gone" if gone else b"kept")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"gone"
    os.waitpid(child, 0)


SCRIPT = """
import django; django.setup()
from django.db import connection
from django_connguard import job
job(connection.ensure_connection)()
"""


LATE = """
import atexit
import django; django.setup()
from django.db import connection
from django_connguard import job
atexit.register(job(connection.ensure_connection))
"""


def test_a_job_may_run_when_no_thread_can_be_started_any_more(
    transactional_db: None, connstats: Run
) -> None:
    result = connstats.script(LATE, CONN_MAX_AGE=3600)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("age", [0.01, 3600])
def test_a_process_with_a_reaper_ends_at_once_and_in_silence(
    transactional_db: None, connstats: Run, age: float
) -> None:
    result = connstats.script(SCRIPT, CONN_MAX_AGE=age)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
