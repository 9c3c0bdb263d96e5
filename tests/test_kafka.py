"""Units of work in loops over Kafka consumers, with each client library on a broker for it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import override_settings

import django_connguard as connguard
from django_connguard.integrations.kafka import (
    adeliver,
    batches,
    deliver,
    guard_listener,
    handler,
    lag,
    messages,
)
from tests.command import Run
from tests.kafka_clients import AioKafka, Confluent, KafkaPython
from tests.own_kafka import Broker, MockCluster, own_broker, own_mock_cluster
from tests.server import Server, alias, backend_id, query

Configure = Callable[..., None]
pytestmark = pytest.mark.one_server


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with own_broker() as broker:
        yield broker


@pytest.fixture(scope="module")
def cluster() -> Iterator[MockCluster]:
    with own_mock_cluster() as cluster:
        yield cluster


@pytest.fixture
def kafka(broker: Broker) -> Iterator[KafkaPython]:
    """kafka-python with a real broker."""
    client = KafkaPython(broker)
    yield client
    client.close_all()


@pytest.fixture(params=["kafka-python", "confluent-kafka", "aiokafka"])
def client(request: pytest.FixtureRequest) -> Iterator[KafkaPython]:
    """Each library in turn."""
    if request.param == "kafka-python":
        client = KafkaPython(request.getfixturevalue("broker"))
    else:
        kind = {"confluent-kafka": Confluent, "aiokafka": AioKafka}[request.param]
        client = kind(request.getfixturevalue("cluster"))
    yield client
    client.close_all()


@pytest.fixture
def group() -> str:
    return f"g{uuid.uuid4().hex[:12]}"


@pytest.fixture
def jobs() -> Iterator[list[dict[str, Any]]]:
    """What job_finished tells of each unit of work."""
    found: list[dict[str, Any]] = []

    def note(signal: object, sender: object, **told: Any) -> None:
        found.append(told)

    connguard.job_finished.connect(note)
    yield found
    connguard.job_finished.disconnect(note)


def test_each_message_is_a_unit_of_work_named_after_its_partition(
    client: KafkaPython, group: str, server: Server, database: Configure, jobs: list[dict[str, Any]]
) -> None:
    database(CONN_MAX_AGE=None)
    topic = client.topic(range(8))
    values, backends = [], set()

    def body(message: Any) -> bool:
        backends.add(backend_id())
        assert len(jobs) == len(values)  # the unit of work is open
        values.append(int(client.value(message)))
        return len(values) == 8

    client.each(client.consumer(topic, group), body)
    assert sorted(values) == list(range(8))
    assert len(backends) == 1
    assert {job["name"] for job in jobs} == {f"{topic}[{number}]" for number in range(4)}
    assert len(jobs) == 8
    assert all(job["exception"] is None for job in jobs)


def test_age_0_closes_after_each_message(
    client: KafkaPython, group: str, database: Configure, jobs: list[dict[str, Any]]
) -> None:
    database(CONN_MAX_AGE=0)
    seen: list[object] = []

    def body(message: Any) -> bool:
        seen.append(query())
        return len(seen) == 4

    client.each(client.consumer(client.topic(range(4)), group), body)
    assert [job["closed"] for job in jobs] == [{"age": 1}] * 4


def test_a_session_that_ends_between_messages_fails_none(
    client: KafkaPython, group: str, server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)
    backends = []

    def body(message: Any) -> bool:
        backends.append(backend_id())
        server.end_all()
        return len(backends) == 4

    server._wrapper.inc_thread_sharing()
    client.each(client.consumer(client.topic(range(4)), group), body)
    assert len(set(backends)) == 4


@pytest.mark.parametrize("poll", [0.5, 6.0])
def test_an_idle_consumer_holds_no_connection_past_its_age(
    client: KafkaPython, group: str, server: Server, database: Configure, poll: float
) -> None:
    """Waiting for 6 s: in its own thread at each poll's return, or by the reaper in a long one."""
    if poll > 1 and type(client) is not KafkaPython:
        pytest.skip("the reaper knows no Kafka")
    database(CONN_MAX_AGE=2)
    stop = threading.Event()
    held: list[int] = []

    def look() -> None:
        time.sleep(1)
        held.append(server.count())
        time.sleep(4)
        held.append(server.count())
        time.sleep(1)
        stop.set()

    looking = threading.Thread(target=look)

    def body(message: Any) -> None:
        query()
        looking.start()

    server._wrapper.inc_thread_sharing()
    consumer = client.consumer(client.topic([1]), group)
    with override_settings(CONNGUARD={"CLOSE_IDLE": poll > 1}):
        client.each(consumer, body, stop=stop, timeout=poll)
    assert held == [1, 0]
    assert client.is_closed(consumer)


def test_the_message_that_ended_the_loop_comes_again_and_those_before_it_do_not(
    kafka: KafkaPython, group: str, database: Configure
) -> None:
    """With the auto-commit that bare loops lose messages by, at close()."""
    topic = kafka.topic()
    kafka.produce(topic, range(5), partitions=1)
    handled = []

    def body(message: Any) -> None:
        if kafka.value(message) == "3":
            raise ValueError("the handler fails")
        handled.append(kafka.value(message))

    consumer = kafka.consumer(topic, group, auto_commit=True)
    with pytest.raises(ValueError, match="the handler fails"):
        kafka.each(consumer, body)
    consumer.close()
    assert handled == ["0", "1", "2"]
    again: list[str] = []

    def note(message: Any) -> bool:
        again.append(kafka.value(message))
        return len(again) == 2

    kafka.each(kafka.consumer(topic, group), note)
    assert again == ["3", "4"]


def test_a_commit_in_the_body_means_the_messages_so_far(
    kafka: KafkaPython, group: str, database: Configure
) -> None:
    from kafka import TopicPartition

    topic = kafka.topic()
    kafka.produce(topic, range(5), partitions=1)
    consumer = kafka.consumer(topic, group)
    committed = []

    def body(message: Any) -> bool:
        consumer.commit()
        committed.append(consumer.committed(TopicPartition(topic, 0)))
        return len(committed) == 3

    kafka.each(consumer, body)
    consumer.close()
    assert committed == [1, 2, 3]


def test_the_consumers_own_timeout_ends_the_loop(
    kafka: KafkaPython, group: str, database: Configure
) -> None:
    consumer = kafka.consumer(kafka.topic([1, 2]), group, consumer_timeout_ms=4000)
    found = [kafka.value(message) for message in messages(consumer)]
    assert sorted(found) == ["1", "2"]
    assert consumer.config["consumer_timeout_ms"] == 4000
    consumer.close()


def test_offsets_are_committed_after_the_batch_and_its_work(
    client: KafkaPython, group: str, server: Server, database: Configure, jobs: list[dict[str, Any]]
) -> None:
    topic = client.topic(range(20))
    stop = threading.Event()
    found: list[str] = []

    def body(batch: list[Any]) -> None:
        query()
        found.extend(map(client.value, batch))
        if len(found) == 20:
            stop.set()

    client.each_batch(client.consumer(topic, group), body, commit=True, stop=stop, max_records=8)
    assert len(found) == len(set(found)) == 20
    assert all(job["name"].startswith(topic) for job in jobs)
    assert 3 <= len(jobs) <= 20
    # The next consumer of the group gets what is new only.
    client.produce(topic, ["new"])
    client.each_batch(client.consumer(topic, group), lambda batch: found.extend(batch) or True)
    assert [client.value(message) for message in found[20:]] == ["new"]


def test_nothing_is_committed_when_the_body_fails(
    client: KafkaPython, group: str, database: Configure
) -> None:
    topic = client.topic(range(4))

    def fail(batch: list[Any]) -> None:
        raise ValueError("the body fails")

    first = client.consumer(topic, group)
    with pytest.raises(ValueError, match="the body fails"):
        client.each_batch(first, fail, commit=True)
    client.close(first)
    stop = threading.Event()
    found: list[str] = []

    def body(batch: list[Any]) -> None:
        found.extend(map(client.value, batch))
        if len(found) == 4:
            stop.set()

    client.each_batch(client.consumer(topic, group), body, commit=True, stop=stop)
    assert sorted(found) == list("0123")


def test_offsets_of_work_that_would_be_rolled_back_are_not_committed(
    client: KafkaPython, group: str, database: Configure
) -> None:
    topic = client.topic(range(4))

    def body(batch: list[Any]) -> None:
        transaction.set_autocommit(False)
        query()

    consumer = client.consumer(topic, group)
    with pytest.raises(TransactionManagementError, match="left a transaction open"):
        client.each_batch(consumer, body, commit=True)
    client.close(consumer)
    assert connection.connection is None or connection.get_autocommit()
    found: list[Any] = []
    client.each_batch(client.consumer(topic, group), lambda batch: found.extend(batch) or True)
    assert found


def test_a_failing_message_is_given_up_after_its_tries_and_none_is_lost(
    client: KafkaPython, group: str, database: Configure, jobs: list[dict[str, Any]]
) -> None:
    topic = client.topic(range(20))
    stop = threading.Event()
    seen: list[str] = []
    poisoned: list[tuple[str, str]] = []

    def handle(message: Any) -> None:
        value = client.value(message)
        seen.append(value)
        if value == "13":
            raise ValueError("poison")
        if len(set(seen)) == 20 and poisoned:
            stop.set()

    def poison(message: Any, error: Exception) -> None:
        poisoned.append((client.value(message), repr(error)))
        if len(set(seen)) == 20:
            stop.set()

    client.deliver(
        client.consumer(topic, group),
        handle,
        poison=poison,
        tries=3,
        backoff=(0.01, 0.02),
        stop=stop,
    )
    assert poisoned == [("13", "ValueError('poison')")]
    assert seen.count("13") == 3
    assert set(seen) == {str(number) for number in range(20)}
    failed = [job["name"] for job in jobs if job["exception"]]
    assert failed == [f"{topic}[1]"] * 3


def test_without_a_callback_a_failing_message_ends_the_delivery_and_stays(
    client: KafkaPython, group: str, database: Configure
) -> None:
    topic = client.topic()
    client.produce(topic, ["fine", "bad", "behind"], partitions=1)
    handled: list[str] = []

    def handle(message: Any) -> None:
        if client.value(message) == "bad":
            raise ValueError("it fails")
        handled.append(client.value(message))

    consumer = client.consumer(topic, group)
    with pytest.raises(ValueError, match="it fails"):
        client.deliver(consumer, handle, tries=2, backoff=(0.01, 0.02))
    client.close(consumer)
    assert handled == ["fine"]
    again: list[str] = []

    def note(message: Any) -> bool:
        again.append(client.value(message))
        return len(again) == 2

    client.each(client.consumer(topic, group), note)
    assert again == ["bad", "behind"]


def test_a_session_that_ends_inside_an_outer_job_is_replaced_for_the_next_try(
    kafka: KafkaPython, group: str, server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)
    topic, stop = kafka.topic(range(6)), threading.Event()
    handled: list[str] = []
    failed = 0

    def handle(message: Any) -> None:
        nonlocal failed
        if len(handled) == 3 and not failed:
            failed += 1
            server.end_all()
        query()
        handled.append(kafka.value(message))
        if len(handled) == 6:
            stop.set()

    with connguard.job("a command"):
        query()
        kafka.deliver(kafka.consumer(topic, group), handle, backoff=(0.01, 0.02), stop=stop)
    assert sorted(handled) == list("012345")

    def body(message: Any) -> bool:
        query()
        server.end_all()
        handled.append(kafka.value(message))
        return len(handled) == 9

    kafka.produce(topic, "678")
    with connguard.job("a command"):
        kafka.each(kafka.consumer(topic, group), body)
    assert sorted(handled) == list("012345678")


def test_offsets_do_not_go_ahead_of_an_outer_transaction(
    kafka: KafkaPython, group: str, database: Configure
) -> None:
    consumer = kafka.consumer(kafka.topic([1]), group)
    with transaction.atomic():
        with pytest.raises(TransactionManagementError, match=r"deliver\(\) was called inside"):
            deliver(consumer, print)
        with pytest.raises(TransactionManagementError, match=r"batches\(\) was called inside"):
            batches(consumer, commit=True)


def test_a_handler_that_leaves_a_transaction_open_has_failed(
    client: KafkaPython, group: str, database: Configure
) -> None:
    topic, stop = client.topic(["an order"]), threading.Event()
    poisoned: list[Exception] = []

    def handle(message: Any) -> None:
        transaction.set_autocommit(False)
        query()

    def poison(message: Any, error: Exception) -> None:
        poisoned.append(error)
        stop.set()

    options = {"tries": 2, "backoff": (0.01, 0.02), "poison": poison, "stop": stop}
    client.deliver(client.consumer(topic, group), handle, **options)
    assert [type(error) for error in poisoned] == [TransactionManagementError]


def test_a_consumer_that_a_handler_closes_ends_the_delivery(
    client: KafkaPython, group: str, database: Configure
) -> None:
    consumer = client.consumer(client.topic(range(8)), group)
    handled = []

    def handle(message: Any) -> None:
        handled.append(client.value(message))
        if isinstance(client, AioKafka):
            async_to_sync(consumer.made.stop)()
        else:
            consumer.close()

    client.deliver(consumer, handle)
    assert len(handled) == 1


def test_a_message_that_cannot_be_read_takes_none_along(
    cluster: MockCluster, group: str, database: Configure
) -> None:
    from confluent_kafka import DeserializingConsumer

    def whole(value: bytes, context: object) -> bytes:
        if value == b"three":
            raise ValueError("it is no number")
        return value

    client = Confluent(cluster)
    topic = client.topic()
    client.produce(topic, [0, 1, 2, "three", 4], partitions=1)
    consumer = DeserializingConsumer(
        {
            "bootstrap.servers": cluster.servers,
            "group.id": group,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "value.deserializer": whole,
        }
    )
    consumer.subscribe([topic])
    seen: list[str] = []

    def read() -> None:
        for batch in batches(consumer, commit=True, max_records=2):
            seen.extend(map(client.value, batch))

    for _ in range(2):
        with pytest.raises(Exception, match="it is no number"):
            read()
    consumer.close()
    assert seen[:2] == ["0", "1"]
    assert seen.count("2") == 0  # it comes again, with the one behind it


class Handler:
    async def __call__(self, message: Any) -> None: ...


async def give_up(message: Any, error: Exception) -> None: ...


def test_what_is_async_is_told_apart(kafka: KafkaPython, group: str, database: Configure) -> None:
    topic = kafka.topic([1])
    wrong: list[tuple[Any, Any]] = [(Handler(), None), (Handler().__call__, None), (print, give_up)]
    for handle, poison in wrong:
        consumer = kafka.consumer(topic, group)
        with pytest.raises(TypeError, match=r"use adeliver\(\)"):
            deliver(consumer, handle, poison=poison)
        with pytest.raises(TypeError, match=r"use deliver\(\)"):
            asyncio.run(adeliver(consumer, handle, poison=poison))
        consumer.close()
    with pytest.raises(TypeError, match="has only returned <coroutine"):
        deliver(kafka.consumer(topic, group), partial(_call, Handler()))
    with pytest.raises(TypeError, match="has only returned <generator"):
        deliver(kafka.consumer(topic, group), lambda message: (yield message))


def _call(function: Callable[[Any], Any], message: Any) -> Any:
    return function(message)


def test_an_error_counts_though_another_database_is_out_of_reach(
    kafka: KafkaPython, group: str, database: Configure
) -> None:
    stop = threading.Event()
    poisoned: list[Exception] = []

    def handle(message: Any) -> None:
        with suppress(OperationalError):
            connections["down"].ensure_connection()
        with connection.cursor() as cursor:
            cursor.execute("SET statement_timeout = 50")
            cursor.execute("SELECT pg_sleep(5)")

    def poison(message: Any, error: Exception) -> None:
        poisoned.append(error)
        stop.set()

    options = {"tries": 2, "backoff": (0.01, 0.02), "poison": poison, "stop": stop}
    with alias("down", HOST="127.0.0.1", PORT="1"):
        kafka.deliver(kafka.consumer(kafka.topic([1]), group), handle, **options)
    assert [type(error) for error in poisoned] == [OperationalError]


def test_a_signal_ends_every_loop_of_the_main_thread(
    kafka: KafkaPython, group: str, database: Configure
) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    topic = kafka.topic(range(8))
    outer = messages(kafka.consumer(topic, group))
    next(outer)
    handled: list[str] = []

    def handle(message: Any) -> None:
        handled.append(kafka.value(message))
        os.kill(os.getpid(), signal.SIGTERM)

    kafka.deliver(kafka.consumer(topic, f"{group}-2"), handle)
    assert len(handled) == 1
    assert [*outer] == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_a_handler_in_anyones_loop_is_a_unit_of_work(
    kafka: KafkaPython, group: str, database: Configure, jobs: list[dict[str, Any]]
) -> None:
    class Shop:
        @handler
        def on_order(self, message: Any) -> str:
            query()
            return kafka.value(message)

        @handler(retry_stale=1)
        def on_order_again(self, *, message: Any) -> str:
            query()
            return kafka.value(message)

    @handler
    async def on_order(message: Any) -> str:
        return kafka.value(message)

    topic = kafka.topic(["an order"])
    consumer = kafka.consumer(topic, group)
    message = next(consumer)
    assert Shop().on_order(message) == "an order"
    assert Shop().on_order_again(message=message) == "an order"
    assert asyncio.run(on_order(message)) == "an order"
    assert [job["name"] for job in jobs] == [f"{topic}[0]"] * 3
    with pytest.raises(TypeError, match="No Kafka message among the arguments"):
        Shop().on_order(3)
    consumer.close()


def test_a_message_tells_how_long_it_has_waited(
    cluster: MockCluster, group: str, database: Configure, jobs: list[dict[str, Any]]
) -> None:
    client = Confluent(cluster)
    topic = client.topic(["an order"])
    time.sleep(0.5)
    consumer = client.consumer(topic, group)
    client.each(consumer, lambda message: True)
    assert 0.5 <= jobs[0]["queue_wait"] < 60
    client.close(consumer)


def test_a_rebalance_listeners_methods_are_units_of_work(
    kafka: KafkaPython, group: str, database: Configure, jobs: list[dict[str, Any]]
) -> None:
    from kafka import ConsumerRebalanceListener

    class Listener(ConsumerRebalanceListener):
        def on_partitions_assigned(self, assigned: Any) -> None:
            query()

        def on_partitions_revoked(self, revoked: Any) -> None:
            query()

    topic = kafka.topic([1])
    consumer = kafka.consumer(topic, group)
    consumer.subscribe([topic], listener=guard_listener(Listener()))
    kafka.each(consumer, lambda message: True)
    consumer.close()
    names = [job["name"] for job in jobs]
    assert "on_partitions_assigned" in names
    assert names.index("on_partitions_assigned") < names.index(f"{topic}[0]")
    assert all(job["closed"] == {"age": 1} for job in jobs if job["name"].startswith("on_"))


def test_a_listener_that_kafka_python_runs_without_asyncio_is_refused() -> None:
    kafka = pytest.importorskip("kafka")
    if not hasattr(kafka, "AsyncConsumerRebalanceListener"):
        pytest.skip("kafka-python 3 has it")

    class Listener(kafka.AsyncConsumerRebalanceListener):  # type: ignore[misc, name-defined]
        async def on_partitions_assigned(self, assigned: Any) -> None: ...
        async def on_partitions_revoked(self, revoked: Any) -> None: ...

    with pytest.raises(TypeError, match="make it a ConsumerRebalanceListener"):
        guard_listener(Listener())


def test_lag_is_what_is_in_store(client: KafkaPython, group: str, database: Configure) -> None:
    topic = client.topic()
    client.produce(topic, range(5), partitions=1)
    found = []
    if isinstance(client, AioKafka):
        pytest.skip("its position() is a coroutine")
    consumer = client.consumer(topic, group)

    def body(message: Any) -> bool:
        found.append(lag(consumer)[topic, 0])
        return len(found) == 5

    client.each(consumer, body)
    client.close(consumer)
    assert found == [4, 3, 2, 1, 0]


CONSUMER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
import django; django.setup()
import sys
from tests.server import query
from tests.kafka_clients import KafkaPython
from tests.own_kafka import Broker
from django_connguard.integrations.kafka import messages
from kafka import KafkaConsumer

options = {options!r}
consumer = KafkaConsumer({topic!r}, group_id={group!r}, auto_offset_reset="earliest", **options)
for message in messages(consumer):
    query()
    print(message.value.decode(), flush=True)
print("closed" if consumer._closed else "open")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_consumer_between_messages_and_it_leaves_its_group(
    kafka: KafkaPython,
    group: str,
    server: Server,
    number: signal.Signals,
    tmp_path: Path,
) -> None:
    topic = kafka.topic(["first"])
    # Were it not to leave, its partitions would stay its own for that long.
    options = {**kafka.options, "session_timeout_ms": 60_000, "request_timeout_ms": 70_000}
    process = Run(tmp_path).start_script(
        CONSUMER.format(options=options, topic=topic, group=group), CONN_MAX_AGE=None
    )
    assert process.stdout
    assert process.stdout.readline() == "first\n"
    process.send_signal(number)
    try:
        stdout, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (0, "closed\n"), stderr
    assert server.settles_at(0)
    kafka.produce(topic, ["second"])
    found: list[str] = []

    def body(message: Any) -> bool:
        found.append(kafka.value(message))
        return True

    started = time.monotonic()
    consumer = kafka.consumer(topic, group)
    kafka.each(consumer, body)
    consumer.close()
    assert found == ["second"]  # "first" was committed as it closed
    assert time.monotonic() - started < 30


def test_signals_that_the_program_handles_itself_are_left_to_it(
    kafka: KafkaPython, group: str, database: Configure
) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        consumer = kafka.consumer(kafka.topic([1, 2, 3]), group)
        seen: list[str] = []

        def body(message: Any) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(kafka.value(message))
            return len(seen) == 3

        kafka.each(consumer, body)
        assert caught == [signal.SIGTERM] * 3
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is interrupt
    consumer.close()


@pytest.mark.parametrize("function", [messages, batches, deliver, lag, adeliver])
def test_what_is_no_consumer_is_refused(function: Any) -> None:
    arguments = [print] if function in (deliver, adeliver) else []
    with pytest.raises(TypeError, match=r"takes a consumer of kafka-python, .* not 'orders'"):
        _begin(function("orders", *arguments))


def test_a_closed_consumer_is_refused(client: KafkaPython, group: str) -> None:
    consumer = client.consumer(client.topic(), group)
    client.close(consumer)
    if isinstance(client, AioKafka):

        async def make() -> None:
            made = consumer._make()
            with pytest.raises(ValueError, match="closed, or was never started"):
                messages(made)

        asyncio.run(make())
        return
    for function in (messages, batches):
        with pytest.raises(ValueError, match=r"was given a consumer that is closed: <"):
            function(consumer)


def test_a_consumer_that_commits_by_itself_is_refused_where_connguard_commits(
    client: KafkaPython, group: str
) -> None:
    consumer = client.consumer(client.topic(), group, auto_commit=True)
    setting = "enable.auto.offset.store" if type(client) is Confluent else "enable_auto_commit"
    with pytest.raises(ValueError, match=rf"create it with {setting}=False"):
        client.each_batch(consumer, bool, commit=True)
    with pytest.raises(ValueError, match=rf"create it with {setting}=False"):
        client.deliver(consumer, bool)
    if type(client) is not KafkaPython:  # which commits when it polls, not in the background
        with pytest.raises(ValueError, match=rf"create it with {setting}=False"):
            client.each(consumer, bool)
    client.close(consumer)


def test_a_consumer_without_a_group_has_no_offsets_to_commit(kafka: KafkaPython) -> None:
    from kafka import KafkaConsumer

    consumer = KafkaConsumer(kafka.topic(), group_id=None, **kafka.options)
    with pytest.raises(ValueError, match=r"enable_auto_commit=False|needs a group_id"):
        batches(consumer, commit=True)
    consumer.close()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"tries": 0}, "tries"),
        ({"max_records": 0}, "max_records"),
        ({"backoff": (2, 1)}, "backoff"),
        ({"backoff": (0, 1)}, "backoff"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    kafka: KafkaPython, group: str, options: dict[str, Any], wrong: str
) -> None:
    consumer = kafka.consumer(kafka.topic(), group)
    with pytest.raises(ValueError, match=wrong):
        deliver(consumer, print, **options)
    consumer.close()


def test_sync_and_async_are_told_apart(kafka: KafkaPython, group: str) -> None:
    async def handle(message: Any) -> None: ...

    consumer = kafka.consumer(kafka.topic(), group)
    with pytest.raises(TypeError, match=r"use adeliver\(\)"):
        deliver(consumer, handle)
    with pytest.raises(TypeError, match=r"use deliver\(\)"):
        asyncio.run(adeliver(consumer, handle))
    consumer.close()


def _begin(loop: Any) -> None:
    if asyncio.iscoroutine(loop):
        asyncio.run(loop)
