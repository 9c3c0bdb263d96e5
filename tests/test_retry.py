"""job(retry_stale=n) runs a job again whose first database operation met a dropped connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    connection,
    transaction,
)

import django_connguard as connguard
from tests import services
from tests.server import Server, query

Configure = Callable[..., None]
pytestmark = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")
LOST = (OperationalError, InterfaceError)


class Calls:
    """A job that loses its connection, at the server, at its first call or at all of them."""

    def __init__(self, server: Server, times: int = 1, first: Callable[[], Any] = query) -> None:
        self.number = 0
        self._server = server
        self._times = times
        self._first = first

    def __call__(self) -> int:
        self.number += 1
        if self.number <= self._times:
            # Between the boundary, which would have noticed, and the first operation.
            self._server.end_all()
        self._first()
        return query()


@pytest.fixture
def calls(server: Server, database: Configure) -> Callable[..., Calls]:
    database(CONN_MAX_AGE=None)
    query()
    return lambda *args, **kwargs: Calls(server, *args, **kwargs)


def test_the_job_is_run_once_again_on_a_fresh_connection(calls: Callable[..., Calls]) -> None:
    work = calls()
    assert connguard.job(retry_stale=1)(work)() == 1
    assert work.number == 2


def test_without_it_the_job_fails_so_that_the_test_above_can_fail(
    calls: Callable[..., Calls],
) -> None:
    work = calls()
    with pytest.raises(LOST):
        connguard.job(work)()
    assert work.number == 1


def run_counted(body: Callable[[], Any], *errors: type[Exception]) -> int:
    """Run ``body`` as a job that may run twice and fails all the same; return how often it ran."""
    number = 0

    @connguard.job(retry_stale=1)
    def work() -> None:
        nonlocal number
        number += 1
        body()

    with pytest.raises(errors):
        work()
    return number


def in_atomic() -> None:
    with transaction.atomic():
        query()


def test_the_first_operation_may_be_the_begin_of_a_transaction(
    calls: Callable[..., Calls],
) -> None:
    work = calls(first=in_atomic)
    assert connguard.job(retry_stale=1)(work)() == 1
    assert work.number == 2


def test_it_is_run_as_often_as_asked_for(calls: Callable[..., Calls]) -> None:
    work = calls(times=2)

    def lose() -> int:
        # After its start: otherwise the retry finds the fresh connection dropped, too.
        if work.number:
            connection.ensure_connection()
        return work()

    with pytest.raises(LOST):
        connguard.job(retry_stale=1)(lose)()
    assert work.number == 2
    work.number = 0
    query()
    assert connguard.job(retry_stale=2)(lose)() == 1
    assert work.number == 3


def test_a_job_that_has_already_used_the_database_is_not_run_again(
    calls: Callable[..., Calls], server: Server
) -> None:
    def body() -> None:
        query()
        server.end_all()
        query()

    assert run_counted(body, *LOST) == 1


def test_an_error_on_a_sound_connection_is_not_a_reason(calls: Callable[..., Calls]) -> None:
    def body() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT no_such_column FROM no_such_table")

    assert run_counted(body, DatabaseError) == 1


def test_a_refused_operation_in_atomic_is_not_a_reason(calls: Callable[..., Calls]) -> None:
    def body() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(
                "DO $$ BEGIN RAISE SQLSTATE '53400'; END $$"  # an OperationalError
                if connection.vendor == "postgresql"
                else "SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 1205"
            )

    assert run_counted(body, OperationalError) == 1


@pytest.mark.parametrize("error", [ValueError, IntegrityError, OperationalError])
def test_an_error_of_the_jobs_own_is_not_a_reason(
    calls: Callable[..., Calls], error: type[Exception]
) -> None:
    def body() -> None:
        raise error("on purpose")

    assert run_counted(body, error) == 1


@contextmanager
def a_request() -> Iterator[None]:
    from django.core.signals import request_finished, request_started

    request_started.send(sender=None)
    try:
        yield
    finally:
        request_finished.send(sender=None)


@pytest.mark.parametrize("around", [connguard.job, transaction.atomic, a_request])
def test_a_nested_job_is_not_run_again(calls: Callable[..., Calls], around: Any) -> None:
    work = calls()
    with pytest.raises(Exception), around():  # noqa: B017, PT011  (atomic has errors of its own)
        connguard.job(retry_stale=1)(work)()
    assert work.number == 1


def test_a_connect_that_fails_is_tried_again(database: Configure) -> None:
    database(HOST="127.0.0.1", PORT="1")
    assert run_counted(query, OperationalError) == 2


def test_setting_up_a_new_session_is_not_an_operation_of_the_job(
    calls: Callable[..., Calls], server: Server
) -> None:
    """MySQL's back end executes statements as it connects."""
    number = 0

    @connguard.job(retry_stale=1)
    def work() -> int:
        nonlocal number
        number += 1
        connection.close()
        connection.ensure_connection()
        if number == 1:
            server.end_all()
        return query()

    assert work() == 1
    assert number == 2


def test_a_coroutine_is_run_again(calls: Callable[..., Calls]) -> None:
    work = calls()

    def connect() -> None:
        connection.ensure_connection()  # that of the thread which runs it

    @connguard.job(retry_stale=1)
    async def awaited() -> int:
        await sync_to_async(connect)()
        result: int = await sync_to_async(work)()
        return result

    assert asyncio.run(awaited()) == 1
    assert work.number == 2


def test_each_run_is_a_unit_of_work_of_its_own(calls: Callable[..., Calls]) -> None:
    finished: list[BaseException | None] = []

    def note(exception: BaseException | None, **kwargs: Any) -> None:
        finished.append(exception)

    connguard.job_finished.connect(note)
    try:
        connguard.job(retry_stale=1)(calls())()
    finally:
        connguard.job_finished.disconnect(note)
    failed, succeeded = finished
    assert isinstance(failed, LOST)
    assert succeeded is None


def test_it_may_run_in_many_threads_at_once(calls: Callable[..., Calls]) -> None:
    work = connguard.job(retry_stale=1)(query)
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1] * 8


def test_overlapping_shared_jobs_keep_what_they_know_of_their_own(
    calls: Callable[..., Calls], server: Server
) -> None:
    runs = {"first": 0, "second": 0}

    @connguard.job(shared=True, retry_stale=1)
    async def work(name: str, go_on: asyncio.Event, done: asyncio.Event) -> None:
        runs[name] += 1
        await sync_to_async(query)()
        if name == "second":
            await go_on.wait()  # the first has ended, and taken off what it had put there
            await sync_to_async(server.end_all)()
            await sync_to_async(query)()
        done.set()

    async def main() -> None:
        events = asyncio.Event(), asyncio.Event()
        first = work("first", asyncio.Event(), events[0])
        second = work("second", *events)
        await asyncio.gather(first, second, return_exceptions=True)

    asyncio.run(main())
    assert runs == {"first": 1, "second": 1}


def test_nothing_but_its_own_is_left_or_taken_among_the_execute_wrappers(
    calls: Callable[..., Calls],
) -> None:
    def mine(execute: Any, *args: Any) -> Any:
        return execute(*args)

    connguard.job(retry_stale=1)(query)()
    before = list(connection.execute_wrappers)

    @connguard.job(retry_stale=1)
    def work() -> int:
        connection.execute_wrappers.append(mine)
        return query()

    for _ in range(2):
        assert work() == 1
    assert connection.execute_wrappers == [*before, mine, mine]
    del connection.execute_wrappers[-2:]


def test_generators_and_blocks_cannot_be_run_again() -> None:
    def generate() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="cannot run a generator again"):
        connguard.job(retry_stale=1)(generate)
    with pytest.raises(ValueError, match="retry_stale=-1: it must be 0 or more"):
        connguard.job(retry_stale=-1)
    with pytest.raises(TypeError, match="cannot run a block again"), connguard.job(retry_stale=1):
        pass
