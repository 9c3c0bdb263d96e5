"""Connections die with their thread, whether it ran jobs or not."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import connection, connections
from django.test import override_settings

from tests.server import Server, backend_id, query

Configure = Callable[..., None]


@pytest.fixture(autouse=True)
def no_garbage_collection(database: Configure) -> Iterator[None]:
    """What is closed here is not closed by the cyclic garbage collector."""
    database(CONN_MAX_AGE=None)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def run_in_threads(function: Callable[[], Any], number: int) -> None:
    threads = [threading.Thread(target=function) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_twenty_ended_threads_leave_no_connection(server: Server) -> None:
    run_in_threads(query, 20)
    assert server.settles_at(0)


def test_plain_django_leaves_them_all_so_that_the_test_above_can_fail(server: Server) -> None:
    with override_settings(CONNGUARD={"CLOSE_AT_THREAD_END": False}):
        run_in_threads(query, 20)
        assert server.count() == 20


def test_an_executor_that_is_shut_down_leaves_no_connection(server: Server) -> None:
    started = threading.Barrier(8)
    with ThreadPoolExecutor(8) as executor:
        for _ in range(8):
            executor.submit(lambda: (query(), started.wait()))
    assert server.settles_at(0)


def test_ended_thread_sensitive_contexts_leave_no_connection(server: Server) -> None:
    async def request() -> None:
        async with ThreadSensitiveContext():
            await sync_to_async(query)()

    async def main() -> None:
        for _ in range(10):
            await request()

    asyncio.run(main())
    assert server.settles_at(0)


def test_a_connection_lent_to_a_thread_survives_it(database: Configure) -> None:
    query()
    lent, raw = connections["default"], connection.connection
    lent.inc_thread_sharing()

    def borrow() -> None:
        connections["default"] = lent
        query()

    run_in_threads(borrow, 1)
    lent.dec_thread_sharing()
    assert connection.connection is raw
    assert query() == 1


def test_a_thread_that_fails_leaves_no_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def fail() -> None:
        backend_id()
        raise ValueError("on purpose")

    run_in_threads(fail, 3)
    assert server.settles_at(0)
