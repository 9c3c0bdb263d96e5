"""No message is lost when databases, brokers and consumers come and go."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from django.db import DatabaseError, connections

from tests import kafka_consumer, services
from tests.command import Run
from tests.kafka_clients import AioKafka, KafkaPython
from tests.own_server import MariaDB, PostgreSQL, own_server
from tests.server import Server, alias, eventually, query
from tests.test_kafka import (  # noqa: F401  (fixtures)
    Configure,
    broker,
    client,
    cluster,
    group,
    kafka,
)

pytestmark = [
    pytest.mark.one_driver,
    pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server"),
]
MESSAGES = 10_000


class Database:
    """A server of the tests' own with the table that consumers fill."""

    def __init__(self, own: PostgreSQL | MariaDB, name: str) -> None:
        self._own = own
        self._name = name
        self.server = Server(connections[name])
        self.server.rows(kafka_consumer.TABLE)

    def applied(self) -> int:
        return int(self.server.rows("SELECT count(*) FROM applied")[0][0])

    def stop(self) -> None:
        connections[self._name].close()
        self._own.stop()

    def start(self) -> None:
        self._own.start()


@pytest.fixture
def own(database: Configure) -> Iterator[Database]:
    with own_server() as own, alias("own", **own.settings) as name:
        yield Database(own, name)


class Consumers:
    """Consumer processes of one group."""

    def __init__(self, run: Callable[..., subprocess.Popen[str]], log: Path) -> None:
        self._run = run
        self._log = log
        self.running: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        self.running.append(self._run())

    def kill_one(self) -> None:
        victim = self.running.pop(0)
        victim.kill()
        victim.communicate()

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def stop(self) -> list[tuple[int, str]]:
        """Stop them with SIGTERM; return each exit status and what it wrote to stderr."""
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        ended = [(process, process.communicate(timeout=30)[1]) for process in self.running]
        self.running.clear()
        return [(process.returncode, stderr) for process, stderr in ended]


@contextmanager
def consumers(
    kafka: KafkaPython,  # noqa: F811
    topic: str,
    folder: Path,
    database: dict[str, Any],
) -> Iterator[Consumers]:
    log = folder / "consumers.log"
    given = {
        "topic": topic,
        "group": topic,
        "log": str(log),
        "kafka": {
            **kafka.options,
            "session_timeout_ms": 1500,
            "reconnect_backoff_max_ms": 500,  # not 30 s, when the broker is back
        },
        "deliver": {"backoff": [0.05, 0.5], "tries": 5, "max_records": 50},
    }
    code = f"from tests.kafka_consumer import main; main({json.dumps(given)!r})"
    found = Consumers(lambda: Run(folder).start_script(code, **database), log)
    try:
        yield found
    finally:
        for process in found.running:
            process.kill()
            process.communicate()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("age", [None, 0])
def test_every_message_is_applied_whatever_ends_meanwhile(
    kafka: KafkaPython,  # noqa: F811
    own: Database,
    tmp_path: Path,
    age: int | None,
) -> None:
    """Sessions at random, a consumer (SIGKILL), and the database server in mid-run."""
    topic = kafka.topic(range(MESSAGES))
    settings = {**own._own.settings, "CONN_MAX_AGE": age}
    with consumers(kafka, topic, tmp_path, settings) as group:  # noqa: F811
        group.start()
        group.start()
        faults = [(0.2, "kill"), (0.5, "restart")]
        sessions_ended = 0
        deadline = time.monotonic() + 240
        while (applied := own.applied()) < MESSAGES:
            assert time.monotonic() < deadline, (applied, group.log())
            assert all(process.poll() is None for process in group.running), group.log()
            if faults and applied > faults[0][0] * MESSAGES:
                _, fault = faults.pop(0)
                if fault == "kill":
                    group.kill_one()
                    group.start()
                else:
                    own.stop()
                    time.sleep(1)
                    own.start()
            if sessions := [*own.server.sessions()]:
                with suppress(DatabaseError):  # MySQL's, if it has ended meanwhile
                    own.server.end(random.choice(sessions))
                    sessions_ended += 1
            time.sleep(0.2)
        assert not faults
        assert sessions_ended > 3
        assert [status for status, _ in group.stop()] == [0, 0], group.log()
    rows = own.server.rows("SELECT number FROM applied")
    assert sorted(number for (number,) in rows) == list(range(MESSAGES))


@pytest.mark.timeout(180)
def test_an_outage_of_the_database_costs_no_try_and_no_place_in_the_group(
    kafka: KafkaPython,  # noqa: F811
    own: Database,
    tmp_path: Path,
) -> None:
    topic = kafka.topic(range(100))
    settings = {**own._own.settings, "CONN_MAX_AGE": None}
    # With a broker that old, who does not poll for as long as a session (1.5 s) loses its place.
    with consumers(kafka, topic, tmp_path, settings) as group:  # noqa: F811
        group.start()
        assert eventually(lambda: own.applied() == 100, 30), group.log()
        own.stop()
        kafka.produce(topic, range(100, 200))
        time.sleep(7)
        assert group.running[0].poll() is None, group.log()
        own.start()
        assert eventually(lambda: own.applied() == 200, 30), group.log()
        assert "out of reach" in group.log()
        assert "the database is back" in group.log()
        assert "has failed" not in group.log()
        assert group.log().count("assigned") == 1, group.log()
        assert [status for status, _ in group.stop()] == [0]


@pytest.mark.timeout(180)
def test_a_broker_that_restarts_loses_no_message(
    kafka: KafkaPython,  # noqa: F811
    own: Database,
    tmp_path: Path,
) -> None:
    topic = kafka.topic(range(100))
    with consumers(kafka, topic, tmp_path, own._own.settings) as group:  # noqa: F811
        group.start()
        assert eventually(lambda: own.applied() == 100, 30), group.log()
        kafka.broker.stop()
        time.sleep(1)
        kafka.broker.start()
        kafka.produce(topic, range(100, 200))
        assert eventually(lambda: own.applied() == 200, 60), group.log()
        assert [status for status, _ in group.stop()] == [0], group.log()


@pytest.mark.one_server
@pytest.mark.timeout(180)
def test_two_consumers_of_a_group_share_the_partitions_and_lose_nothing(
    client: KafkaPython,  # noqa: F811
    group: str,  # noqa: F811
    server: Server,
    database: Configure,
) -> None:
    if isinstance(client, AioKafka):
        pytest.skip("the mock cluster refuses an aiokafka that joins another")
    database(CONN_MAX_AGE=None)
    topic = client.topic()
    seen: dict[str, list[int]] = {"first": [], "second": []}
    stops = {name: threading.Event() for name in seen}
    sent = 0

    def work(name: str) -> None:
        def handle(message: Any) -> None:
            query()
            seen[name].append(int(client.value(message)))

        client.deliver(client.consumer(topic, group), handle, timeout=0.2, stop=stops[name])

    def send_until(condition: Callable[[], bool]) -> None:
        nonlocal sent
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, seen
            client.produce(topic, range(sent, sent + 20))
            sent += 20
            time.sleep(0.3)

    threads = {name: threading.Thread(target=work, args=(name,)) for name in seen}
    with ExitStack() as stack:
        for name, stop in stops.items():
            stack.callback(threads[name].join, 30)
            stack.callback(stop.set)
        threads["first"].start()
        send_until(lambda: bool(seen["first"]))
        threads["second"].start()
        send_until(lambda: bool(seen["second"]))
        both = len(seen["first"])
        send_until(lambda: len(seen["first"]) > both)  # it has kept some
        stops["first"].set()
        threads["first"].join(30)
        assert not threads["first"].is_alive()
        send_until(lambda: {*seen["first"], *seen["second"]} == {*range(sent)})
    assert not threads["second"].is_alive()
    assert server.settles_at(0)
