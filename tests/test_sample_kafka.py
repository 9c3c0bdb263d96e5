"""The sample project's Kafka commands, as processes of their own, on a real broker."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import sample, workers
from tests.own_kafka import own_broker
from tests.sample import Process, Project, end_sessions, finish, server_only
from tests.server import Server, eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_server, server_only]

database, migrated = sample.database, sample.migrated
server, project = sample.server, sample.project

GUARDED = ("consume_orders", "--guarded")
UNGUARDED = ("consume_orders",)
# Connections that are kept for ever, or there would be none to lose between messages; without
# health checks, of which `check` warns.
KEPT = {"SAMPLE_CONN_MAX_AGE": "none"}
KEEPING = ("--skip-checks",)

Environment = dict[str, str]


@pytest.fixture
def kafka() -> Iterator[Environment]:
    """The environment in which the project finds a broker that has its topics, all empty."""
    workers.need("kafka")
    # With one partition, messages come in the order in which they were sent.
    with own_broker(partitions=1) as broker:
        broker.create_topic("shop.orders")
        broker.create_topic("shop.orders.dead")
        yield {"SAMPLE_KAFKA_SERVERS": broker.servers, "SAMPLE_KAFKA_API_VERSION": "0.9"}


def client(kind: str, kafka: Environment, *arguments: str, **options: Any) -> Any:
    """Return a client of kafka-python's for the test itself."""
    servers = kafka["SAMPLE_KAFKA_SERVERS"]
    made = getattr(pytest.importorskip("kafka"), kind)
    return made(*arguments, bootstrap_servers=servers, api_version=(0, 9), **options)


def orders(server: Server) -> int:
    """Return how many orders there are that came by Kafka."""
    [(count,)] = server.rows("SELECT count(event) FROM shop_order")
    return int(count)


def next_word(consumer: Process) -> str:
    """Return what the consumer says of its next message, which is all that it says."""
    assert consumer.stderr is not None
    line = consumer.stderr.readline()
    word = re.search(r" shop: .*(placed|was there already|failed: \w+)", line)
    assert word, line
    return word[1]


@pytest.mark.parametrize(("consume", "held"), [(UNGUARDED, 1), (GUARDED, 0)])
def test_between_messages_only_the_unguarded_consumer_holds_a_connection(
    project: Project, server: Server, kafka: Environment, consume: tuple[str, ...], held: int
) -> None:
    with project.running(*consume, **kafka) as consumer:
        project.run("produce_orders", "--count", "1", **kafka)
        assert next_word(consumer) == "placed"
        assert server.settles_at(held)


def test_once_its_session_is_ended_the_unguarded_consumer_loses_every_order(
    project: Project, server: Server, kafka: Environment
) -> None:
    with project.running(*UNGUARDED, *KEEPING, **kafka, **KEPT) as consumer:
        project.run("produce_orders", "--count", "1", **kafka)
        assert next_word(consumer) == "placed"
        end_sessions(consumer, server)
        project.run("produce_orders", "--count", "3", **kafka)
        for _ in range(3):
            assert next_word(consumer) in ("failed: OperationalError", "failed: InterfaceError")
        consumer.terminate()
        finish(consumer)
    # Their offsets were committed, so nobody will ever get these three.
    with project.running(*GUARDED, **kafka) as consumer:
        project.run("produce_orders", "--count", "1", **kafka)
        assert next_word(consumer) == "placed"
        assert orders(server) == 2


def test_the_guarded_consumer_loses_no_order_though_its_session_is_ended(
    project: Project, server: Server, kafka: Environment
) -> None:
    with project.running(*GUARDED, *KEEPING, **kafka, **KEPT) as consumer:
        project.run("produce_orders", "--count", "1", **kafka)
        assert next_word(consumer) == "placed"
        end_sessions(consumer, server)
        project.run("produce_orders", "--count", "3", **kafka)
        for _ in range(3):
            assert next_word(consumer) == "placed"
        assert orders(server) == 4


def test_sessions_that_are_ended_all_the_time_cost_the_guarded_consumer_no_order(
    project: Project, server: Server, kafka: Environment
) -> None:
    ended = set[int]()
    with (
        project.running(*GUARDED, *KEEPING, **kafka, **KEPT) as consumer,
        project.running("produce_orders", "--count", "300", "--rate", "100", **kafka) as producer,
    ):
        while producer.poll() is None:
            ended |= set(server.sessions())
            server.end_present()
        finish(producer)
        assert eventually(lambda: orders(server) == 300, 60)
        consumer.terminate()
        _, errors = consumer.communicate(timeout=60)
        assert consumer.returncode == 0, errors
    assert len(ended) > 3
    assert "given up" not in errors


def test_an_order_that_comes_again_is_placed_once(
    project: Project, server: Server, kafka: Environment
) -> None:
    project.run("produce_orders", "--count", "3", **kafka)
    for group, word in ("shop", "placed"), ("another", "was there already"):
        with project.running(*GUARDED, "--group", group, **kafka) as consumer:
            for _ in range(3):
                assert next_word(consumer) == word
    assert orders(server) == 3


def test_a_message_that_nobody_can_read_becomes_a_dead_letter_and_those_behind_it_are_handled(
    project: Project, server: Server, kafka: Environment
) -> None:
    project.run("produce_orders", "--count", "3", "--poison", **kafka)
    with project.running(*GUARDED, **kafka) as consumer:
        assert eventually(lambda: orders(server) == 3, 60)
        consumer.terminate()
        _, errors = consumer.communicate(timeout=60)
        assert consumer.returncode == 0, errors
    options = {"auto_offset_reset": "earliest", "consumer_timeout_ms": 1000}
    dead = client("KafkaConsumer", kafka, "shop.orders.dead", **options)
    [letter] = [json.loads(message.value) for message in dead]
    dead.close()
    assert letter == {
        "topic": "shop.orders",
        "partition": 0,
        "offset": 0,
        "error": "ValueError: This is no order: b'not an order'.",
        "value": "not an order",
    }
    # It does not come again.
    with project.running(*GUARDED, **kafka) as consumer:
        project.run("produce_orders", "--count", "1", **kafka)
        assert next_word(consumer) == "placed"


@pytest.mark.parametrize(
    ("consume", "number"), [(UNGUARDED, signal.SIGINT), (GUARDED, signal.SIGTERM)]
)
def test_a_consumer_ends_quietly_by_a_signal_and_leaves_its_group(
    project: Project, kafka: Environment, consume: tuple[str, ...], number: signal.Signals
) -> None:
    project.run("produce_orders", "--count", "1", **kafka)
    administrator = client("KafkaAdminClient", kafka)
    with project.running(*consume, **kafka) as consumer:
        assert next_word(consumer) == "placed"
        assert len(members(administrator)) == 1
        consumer.send_signal(number)
        _, errors = finish(consumer)
    assert errors.endswith("stopped\n")
    assert members(administrator) == []
    administrator.close()


def members(administrator: Any) -> list[Any]:
    """Return who is in the consumers' group."""
    return administrator.describe_groups(["shop"])["shop"]["members"]


def test_a_producer_that_is_stopped_has_sent_what_it_says(
    project: Project, server: Server, kafka: Environment
) -> None:
    with project.running(*GUARDED, **kafka):
        with project.running("produce_orders", "--rate", "1", **kafka) as producer:
            assert eventually(lambda: orders(server) > 0, 60)
            producer.terminate()
            _, errors = finish(producer)
        sent = re.search(r" shop: (\d+) messages sent\n$", errors)
        assert sent, errors
        assert eventually(lambda: orders(server) == int(sent[1]))


@pytest.mark.parametrize("command", [("produce_orders",), UNGUARDED, GUARDED])
@pytest.mark.parametrize(
    ("hidden", "line"),
    [
        ([], "CommandError: No Kafka broker at 127.0.0.1:1: start one, or set SAMPLE_KAFKA_"),
        (["kafka"], "CommandError: kafka-python is missing: run pip install 'django-connguard["),
    ],
)
def test_without_kafka_one_line_says_what_to_do(
    tmp_path: Path, command: tuple[str, ...], hidden: list[str], line: str
) -> None:
    environment = {"DATABASE_URL": "sqlite://", "SAMPLE_KAFKA_SERVERS": "127.0.0.1:1"}
    if not hidden:
        workers.need("kafka")
    process = Project(tmp_path, hidden, **environment).start(*command)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1
    assert errors.startswith(line)
