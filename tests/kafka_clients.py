"""What the tests ask of each client library: kafka-python, confluent-kafka and aiokafka."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections

from django_connguard.integrations.kafka import adeliver, batches, deliver, messages
from tests.own_kafka import Broker, MockCluster

PARTITIONS = 4


class KafkaPython:
    """kafka-python, on the real broker."""

    def __init__(self, broker: Broker) -> None:
        import kafka

        self.broker = broker
        # 3.x cannot find out the version of a broker that old.
        old = {} if kafka.__version__ < "3" else {"api_version": (0, 9)}
        self.options: dict[str, Any] = {"bootstrap_servers": broker.servers, **old}
        self.consumers: list[Any] = []

    def topic(self, values: Iterable[object] = ()) -> str:
        """Create a topic that holds these values, spread over its partitions."""
        name = f"t{uuid.uuid4().hex[:12]}"
        self.broker.create_topic(name)
        self.produce(name, values)
        return name

    def produce(self, topic: str, values: Iterable[object], partitions: int = PARTITIONS) -> None:
        from kafka import KafkaProducer

        producer = KafkaProducer(**self.options)
        for number, value in enumerate(values):
            producer.send(topic, str(value).encode(), partition=number % partitions)
        producer.close()

    def consumer(self, topic: str, group: str, auto_commit: bool = False, **options: Any) -> Any:
        """Return a consumer; a group's first starts with the oldest message."""
        from kafka import KafkaConsumer

        consumer = KafkaConsumer(
            topic,
            group_id=group,
            enable_auto_commit=auto_commit,
            auto_offset_reset="earliest",
            **{"session_timeout_ms": 3000, "heartbeat_interval_ms": 500, **self.options, **options},
        )
        self.consumers.append(consumer)
        return consumer

    def deliver(self, consumer: Any, handle: Callable[[Any], Any], **options: Any) -> None:
        deliver(consumer, handle, **options)

    def each(self, consumer: Any, body: Callable[[Any], Any], **options: Any) -> None:
        """Run a loop over messages(), until its body returns something true."""
        for message in messages(consumer, **options):
            if body(message):
                break

    def each_batch(self, consumer: Any, body: Callable[[Any], Any], **options: Any) -> None:
        for batch in batches(consumer, **options):
            if body(batch):
                break

    def value(self, message: Any) -> str:
        return str(message.value.decode())

    def is_closed(self, consumer: Any) -> bool:
        return bool(consumer._closed)

    def close(self, consumer: Any) -> None:
        consumer.close()

    def close_all(self) -> None:
        for consumer in self.consumers:
            if not self.is_closed(consumer):
                self.close(consumer)


class Confluent(KafkaPython):
    """confluent-kafka, on the mock cluster."""

    def __init__(self, cluster: MockCluster) -> None:
        self.cluster = cluster
        self.consumers = []

    def topic(self, values: Iterable[object] = ()) -> str:
        name = f"t{uuid.uuid4().hex[:12]}"
        self.produce(name, values)
        return name

    def produce(self, topic: str, values: Iterable[object], partitions: int = PARTITIONS) -> None:
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": self.cluster.servers})
        for number, value in enumerate(values):
            producer.produce(topic, str(value), partition=number % partitions)
        assert producer.flush(20) == 0

    def consumer(self, topic: str, group: str, auto_commit: bool = False, **options: Any) -> Any:
        from confluent_kafka import Consumer

        config = {
            "bootstrap.servers": self.cluster.servers,
            "group.id": group,
            "enable.auto.offset.store": auto_commit,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": 3000,
            "heartbeat.interval.ms": 500,
            "topic.metadata.refresh.interval.ms": 500,
        }
        consumer = Consumer({**config, **options})
        consumer.subscribe([topic])
        self.consumers.append(consumer)
        return consumer

    def value(self, message: Any) -> str:
        return str(message.value().decode())

    def is_closed(self, consumer: Any) -> bool:
        try:
            consumer.assignment()
        except RuntimeError:
            return True
        return False


class AioKafka(Confluent):
    """aiokafka, on the mock cluster; each loop is an event loop's whole life."""

    def consumer(self, topic: str, group: str, auto_commit: bool = False, **options: Any) -> Any:
        def make() -> Any:
            from aiokafka import AIOKafkaConsumer

            return AIOKafkaConsumer(
                topic,
                bootstrap_servers=self.cluster.servers,
                group_id=group,
                enable_auto_commit=auto_commit,
                auto_offset_reset="earliest",
                session_timeout_ms=3000,
                heartbeat_interval_ms=500,
                **options,
            )

        return Later(make)

    def deliver(self, consumer: Later, handle: Callable[[Any], Any], **options: Any) -> None:
        asyncio.run(self._deliver(consumer, handle, options))

    async def _deliver(self, consumer: Later, handle: Any, options: dict[str, Any]) -> None:
        poison = options.pop("poison", None)
        started = await consumer.start()
        try:
            await adeliver(
                started,
                sync_to_async(handle),
                poison=poison and sync_to_async(poison),
                **options,
            )
        finally:
            await started.stop()
            await sync_to_async(connections.close_all)()

    def each(self, consumer: Later, body: Callable[[Any], Any], **options: Any) -> None:
        asyncio.run(self._each(consumer, messages, body, options))

    def each_batch(self, consumer: Later, body: Callable[[Any], Any], **options: Any) -> None:
        asyncio.run(self._each(consumer, batches, body, options))

    async def _each(self, consumer: Later, loop: Any, body: Any, options: dict[str, Any]) -> None:
        started = await consumer.start()
        try:
            stream = loop(started, **options)
            try:
                async for item in stream:
                    if await sync_to_async(body)(item):
                        break
            finally:
                await stream.aclose()
        finally:
            await started.stop()
            await sync_to_async(connections.close_all)()

    def value(self, message: Any) -> str:
        return str(message.value.decode())

    def is_closed(self, consumer: Later) -> bool:
        return bool(consumer.made._closed)

    def close(self, consumer: Later) -> None:
        pass


class Later:
    """An aiokafka consumer, which wants to be made inside its event loop."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.made: Any = None

    async def start(self) -> Any:
        self.made = self._make()
        await self.made.start()
        return self.made
