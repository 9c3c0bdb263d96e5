"""Django's psycopg pool: a boundary gives connections back to it and leaves it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from django.db import connection

from django_connguard import job
from tests import services
from tests.server import Server, backend_id, query

Configure = Callable[..., None]

pytestmark = pytest.mark.skipif(
    not services.has_pools(), reason="Django pools psycopg 3 alone, since 5.1"
)


@pytest.fixture
def pool(server: Server, database: Configure) -> Iterator[Server]:
    options = {**connection.settings_dict["OPTIONS"], "pool": {"min_size": 1, "max_size": 2}}
    database(OPTIONS=options)
    yield server
    connection.close()
    connection.close_pool()


def test_a_job_gives_its_connection_back_to_the_pool(pool: Server) -> None:
    backends = {job(backend_id)() for _ in range(10)}
    assert connection.connection is None
    assert len(backends) <= 2  # the pool's max_size
    assert 1 <= pool.count() <= 2


def test_a_pool_hands_no_dead_connection_to_a_job(pool: Server) -> None:
    for _ in range(5):
        job(query)()
        pool.end_present()
        assert job(query)() == 1


def test_a_connection_left_in_a_transaction_is_rolled_back_before_it_goes_back(
    pool: Server,
) -> None:
    @job
    def leave() -> None:
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT 1")

    leave()
    assert pool.idle_in_transaction() == 0
    assert job(query)() == 1
