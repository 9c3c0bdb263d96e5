from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.db import connection

from tests import services
from tests.command import Run
from tests.server import Server, watch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "one_driver: slow, and the same with either driver of a server: run with one only",
    )
    config.addinivalue_line(
        "markers", "one_server: slow, and the same on any database server: run with psycopg only"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without its server nothing here can mean anything: skip all, or fail where CI requires it."""
    driver = services.driver()
    for item in items:
        if driver in ("psycopg2", "pymysql") and item.get_closest_marker("one_driver"):
            item.add_marker(pytest.mark.skip(reason="run with psycopg and mysqlclient"))
        if driver != "psycopg" and item.get_closest_marker("one_server"):
            item.add_marker(pytest.mark.skip(reason="run with psycopg"))
    if settings.SERVICE_MISSING is None:
        return
    if services.required():
        raise pytest.UsageError(f"a required service is missing: {settings.SERVICE_MISSING}")
    for item in items:
        item.add_marker(pytest.mark.skip(reason=f"SKIPPED BACK END: {settings.SERVICE_MISSING}"))


@pytest.fixture
def database(transactional_db: None) -> Iterator[Callable[..., None]]:
    """A closed connection of this thread, and a function that sets its CONN_MAX_AGE and so on."""
    before = dict(connection.settings_dict)
    connection.close()

    def configure(**options: Any) -> None:
        connection.close()
        connection.settings_dict.update(options)

    configure(CONN_MAX_AGE=0, CONN_HEALTH_CHECKS=False)
    yield configure
    connection.in_atomic_block = False
    connection.closed_in_transaction = False
    connection.close()
    connection.settings_dict.clear()
    connection.settings_dict.update(before)


@pytest.fixture
def server(database: Callable[..., None]) -> Iterator[Server]:
    """The server's view of the test database; this thread's connection is closed and counts."""
    if services.vendor() == "sqlite":
        pytest.skip("SQLite has no server to count at")
    with watch() as view:
        yield view


@pytest.fixture
def opened(database: Callable[..., None]) -> Iterator[list[int]]:
    """One entry for each connection that Django opens during the test, private copies excepted."""
    from django.db import connections
    from django.db.backends.signals import connection_created

    ids: list[int] = []

    def note(connection: Any, **kwargs: Any) -> None:
        if connections[connection.alias] is connection:
            ids.append(id(connection.connection))

    connection_created.connect(note)
    yield ids
    connection_created.disconnect(note)


@pytest.fixture
def connstats(tmp_path: Path) -> Run:
    """The command, on the test database."""
    return Run(tmp_path)
