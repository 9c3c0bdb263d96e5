"""Boundaries in the midst of a long job, and connections given back meanwhile."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.contenttypes.models import ContentType
from django.db import InterfaceError, OperationalError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext

import django_connguard as connguard
from tests import services
from tests.server import Server, backend_id, query

Configure = Callable[..., None]
POSTGRESQL = services.vendor() == "postgresql"
server_only = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")


def test_a_checkpoint_closes_what_is_past_its_age(database: Configure, opened: list[int]) -> None:
    database(CONN_MAX_AGE=0.1)
    with connguard.job():
        query()
        connguard.checkpoint()
        assert connection.connection is not None
        time.sleep(0.1)
        connguard.checkpoint()
        assert connection.connection is None
        assert query() == 1
    assert len(opened) == 2


def test_a_checkpoint_replaces_what_the_server_has_closed(
    database: Configure, server: Server
) -> None:
    database(CONN_MAX_AGE=None)
    with connguard.job():
        query()
        server.end_all()
        connguard.checkpoint()
        assert query() == 1


@server_only
def test_without_a_checkpoint_the_job_fails_so_that_the_test_above_can_fail(
    database: Configure, server: Server
) -> None:
    database(CONN_MAX_AGE=None)

    @connguard.job
    def work() -> None:
        query()
        server.end_all()
        query()

    with pytest.raises((OperationalError, InterfaceError)):
        work()


def test_a_checkpoint_arms_the_health_check_anew(
    database: Configure,
) -> None:
    database(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True)
    with connguard.job():
        query()
        connguard.checkpoint()
        assert not connection.health_check_done
        query()
        assert connection.health_check_done


def test_a_checkpoint_empties_the_query_log(database: Configure) -> None:
    with override_settings(DEBUG=True), connguard.job():
        query()
        assert connection.queries
        connguard.checkpoint()
        assert not connection.queries


def test_a_checkpoint_leaves_a_transaction_alone(database: Configure) -> None:
    with connguard.job(), transaction.atomic():
        query()
        raw = connection.connection
        connguard.checkpoint()
        assert connection.connection is raw
        query()


def test_a_checkpoint_leaves_a_transaction_by_hand_alone(database: Configure) -> None:
    with connguard.job():
        connection.set_autocommit(False)
        query()
        raw = connection.connection
        connguard.checkpoint()
        assert connection.connection is raw
        connection.rollback()
        connection.set_autocommit(True)


def numbers(count: int) -> Iterator[Any]:
    """Rows that the server hands out in chunks."""
    for number in range(count):
        ContentType.objects.create(app_label="shop", model=f"model{number}")
    return ContentType.objects.filter(app_label="shop").iterator(chunk_size=2)


def test_a_checkpoint_does_not_cut_off_a_querysets_iterator(
    database: Configure, opened: list[int]
) -> None:
    rows = []
    with connguard.job():
        for row in connguard.heartbeat(numbers(20), every=0):
            rows.append(row)
        assert len(rows) == 20
        assert len(opened) == 1
        connguard.checkpoint()
        assert connection.connection is None  # CONN_MAX_AGE is 0


def test_a_heartbeat_over_a_queryset_itself(database: Configure) -> None:
    numbers(3)
    models = ContentType.objects.filter(app_label="shop")
    assert len(list(connguard.heartbeat(models, every=0))) == 3

    async def count() -> int:
        return len([model async for model in connguard.heartbeat(models.all(), every=0)])

    assert asyncio.run(count()) == 3


@pytest.mark.skipif(services.driver() != "psycopg", reason="COPY as psycopg 3 does it")
def test_a_checkpoint_does_not_cut_off_a_copy(database: Configure) -> None:
    with connguard.job(), connection.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE copied (number integer)")
        with cursor.copy("COPY copied FROM STDIN") as copy:
            for number in connguard.heartbeat(range(5), every=0):
                copy.write_row([number])
                with refused("a query"), connguard.released():
                    pass
        cursor.execute("SELECT count(*) FROM copied")
        assert cursor.fetchone() == (5,)


def test_a_connection_is_replaced_though_an_iterator_has_failed_on_it(
    database: Configure, server: Server
) -> None:
    database(CONN_MAX_AGE=None)
    with connguard.job():
        query()
        server.end_all()
        try:
            list(ContentType.objects.iterator())
        except (OperationalError, InterfaceError):
            connguard.checkpoint()
            assert query() == 1
        with connguard.released():
            pass


@pytest.mark.parametrize("step", [connguard.checkpoint, connguard.job(signals=False)(lambda: None)])
def test_queries_that_a_test_counts_are_not_forgotten(
    database: Configure, step: Callable[[], object]
) -> None:
    with CaptureQueriesContext(connection) as captured:
        query()
        step()
        query()
    assert len(captured) == 2 or services.vendor() == "mysql"  # whose back end queries, too


@server_only
def test_a_time_limit_that_strikes_while_connections_are_released_comes_out(
    database: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TimeLimit(Exception):
        pass

    def ring(*args: object) -> None:
        raise TimeLimit

    database(CONN_MAX_AGE=None)
    query()
    wrapper = connections["default"]
    close = wrapper._close

    def close_slowly() -> None:
        time.sleep(5)
        close()

    monkeypatch.setattr(wrapper, "_close", close_slowly)
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(TimeLimit), connguard.released():
            pass
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert query() == 1


def test_a_checkpoint_works_in_a_plain_loop(server: Server) -> None:
    for _ in range(3):
        query()
        connguard.checkpoint()
        assert server.settles_at(0)


def test_a_heartbeat_makes_checkpoints_so_many_seconds_apart(
    database: Configure, opened: list[int]
) -> None:
    with connguard.job():
        for _ in connguard.heartbeat(range(3), every=60):
            query()
        assert len(opened) == 1
        for _ in connguard.heartbeat(range(3), every=0.1):
            query()
            time.sleep(0.11)
    assert len(opened) == 3


def test_an_async_heartbeat_and_checkpoint(database: Configure, opened: list[int]) -> None:
    async def items() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    @connguard.job
    async def work() -> list[int]:
        found = []
        async for item in connguard.heartbeat(items(), every=0):
            await sync_to_async(query)()
            found.append(item)
        await sync_to_async(query)()
        await connguard.acheckpoint()
        await sync_to_async(query)()
        return found

    assert asyncio.run(work()) == [0, 1, 2]
    assert len(opened) == 5


def test_a_heartbeat_takes_no_negative_time() -> None:
    with pytest.raises(ValueError, match=r"every=-1 seconds: it must be 0 or more"):
        connguard.heartbeat([], every=-1)


def test_released_gives_the_connections_back_for_a_while(
    database: Configure, server: Server
) -> None:
    database(CONN_MAX_AGE=None)
    with connguard.job():
        query()
        with connguard.released():
            assert server.settles_at(0)
        assert query() == 1
        assert server.count() == 1


def test_released_in_async_code(database: Configure, server: Server) -> None:
    database(CONN_MAX_AGE=None)

    @connguard.job
    async def work() -> None:
        await sync_to_async(query)()
        async with connguard.released():
            assert await sync_to_async(server.settles_at)(0)
        assert await sync_to_async(query)() == 1

    asyncio.run(work())


@pytest.mark.skipif(not services.has_pools(), reason="no pools")
def test_released_gives_back_to_a_pool(database: Configure) -> None:
    from tests.server import alias

    options = {**connection.settings_dict["OPTIONS"], "pool": {"min_size": 1, "max_size": 1}}
    with alias("lent", OPTIONS=options) as name:
        try:
            first = backend_id(connections[name])
            with connguard.released():
                assert connections[name].pool.get_stats()["pool_available"] == 1
            assert backend_id(connections[name]) == first
        finally:
            connections[name].close()
            connections[name].close_pool()


def refused(where: str) -> Any:
    return pytest.raises(
        TransactionManagementError,
        match=rf"released\(\) was called inside {where} on connection 'default'",
    )


def test_released_refuses_inside_atomic(database: Configure) -> None:
    with transaction.atomic():
        query()
        with refused("an atomic block"), connguard.released():
            pass
        assert query() == 1


def test_released_refuses_inside_a_transaction_by_hand(database: Configure) -> None:
    connection.set_autocommit(False)
    query()
    with refused("a transaction"), connguard.released():
        pass
    connection.rollback()
    connection.set_autocommit(True)


def test_released_refuses_while_a_querysets_iterator_is_read(database: Configure) -> None:
    rows = numbers(5)
    next(rows)
    with refused(r"a queryset's iterator\(\)"), connguard.released():
        pass
    assert len(list(rows)) == 4


class TestsThatUseAtomic(TestCase):
    def test_released_and_checkpoint_change_nothing(self) -> None:
        query()
        raw = connection.connection
        with connguard.released():
            query()
        connguard.checkpoint()
        assert connection.connection is raw

    def test_released_refuses_inside_a_block_of_the_tests_own(self) -> None:
        with transaction.atomic(), refused("an atomic block"), connguard.released():
            pass
