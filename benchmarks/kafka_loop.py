"""A Kafka consumer's loop with connguard, and beside it the bare one, on the same broker and topic.

Messages a second, from the first message to the last, of ``for message in consumer``, of
``for message in messages(consumer)`` and of ``batches()`` (a unit of work per poll), turn by turn:
with a handler that does nothing while one connection is open, and with one that writes a row (one
autocommitted INSERT by the ORM).

    python -m benchmarks.kafka_loop [--messages 20000] [--writes 1000] [--rounds 15]

CONNGUARD_TEST_DRIVER picks the driver (see tests/services.py). Needs kafka-python, java and npm
(see tests/own_kafka.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import uuid
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import django

if TYPE_CHECKING:
    from tests.own_kafka import Broker

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")

BARE, GUARDED, BATCHES = "bare loop", "messages()", "batches()"


class Rows:
    """A table for the handler to write to, in the machine's database, for as long as it takes."""

    def __enter__(self) -> Callable[[Any], None]:
        from django.db import connection, models

        class Row(models.Model):
            value = models.CharField(max_length=200)

            class Meta:
                app_label = "benchmarks"
                db_table = f"connguard_benchmark_{os.getpid()}"

            def __str__(self) -> str:
                return self.value

        self._model = Row
        with connection.schema_editor() as editor:
            editor.create_model(Row)

        def write(message: Any) -> None:
            Row.objects.create(value=message.value.decode())

        return write

    def __exit__(self, *error: object) -> None:
        from django.db import connection

        with connection.schema_editor() as editor:
            editor.delete_model(self._model)


class Topic:
    """Messages on a broker of the benchmark's own."""

    def __init__(self, broker: Broker, count: int) -> None:
        from kafka import KafkaProducer

        from tests.kafka_clients import KafkaPython

        self._options = KafkaPython(broker).options
        self._name = f"benchmark-{uuid.uuid4().hex[:8]}"
        producer = KafkaProducer(**self._options)
        for number in range(count):
            producer.send(self._name, f"message {number:0100d}".encode(), partition=0)
        producer.close()

    def consumer(self) -> Any:
        from kafka import KafkaConsumer

        return KafkaConsumer(
            self._name,
            group_id=uuid.uuid4().hex,
            auto_offset_reset="earliest",
            **self._options,
        )


def rate(kind: str, topic: Topic, handle: Callable[[Any], None], count: int) -> float:
    """Return how many messages a second one loop over the topic handles."""
    from django.db import connection

    from django_connguard.integrations.kafka import batches, messages

    consumer = topic.consumer()
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    loop: Iterator[Any] = {
        BARE: lambda: consumer,
        GUARDED: lambda: messages(consumer),
        BATCHES: lambda: chain.from_iterable(batches(consumer)),
    }[kind]()
    handle(next(loop))  # by when it has joined its group
    begin = perf_counter()
    for message in islice(loop, count - 1):
        handle(message)
    seconds = perf_counter() - begin
    consumer.close()
    return (count - 1) / seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="A Kafka loop with connguard and without.")
    parser.add_argument("--messages", type=int, default=20_000, help="for the no-op handler")
    parser.add_argument("--writes", type=int, default=1_000, help="for the handler that writes")
    parser.add_argument("--rounds", type=int, default=15, help="the rate is their median")
    options = parser.parse_args()
    django.setup()

    import kafka

    from tests import services
    from tests.own_kafka import Broker

    print(
        f"Python {platform.python_version()}, Django {django.__version__},"
        f" kafka-python {kafka.__version__}, {services.driver()}"
    )
    with tempfile.TemporaryDirectory(prefix="connguard-") as folder, Rows() as write:
        broker = Broker(Path(folder), partitions=1)
        broker.start()
        try:
            topic = Topic(broker, options.messages)
            loads: list[tuple[str, Callable[[Any], None], int]] = [
                ("no-op", lambda message: None, options.messages),
                ("one write", write, min(options.writes, options.messages)),
            ]
            row = "{:10} {:12} {:>10} {:>6}".format
            print(row("handler", "loop", "messages/s", "ratio"))
            for name, handle, count in loads:
                rates: dict[str, list[float]] = {kind: [] for kind in (BARE, GUARDED, BATCHES)}
                for _ in range(options.rounds):
                    for kind, found in rates.items():
                        found.append(rate(kind, topic, handle, count))
                for kind, found in rates.items():
                    ratio = statistics.median(map(float.__truediv__, found, rates[BARE]))
                    print(row(name, kind, f"{statistics.median(found):.0f}", f"{ratio:.2f}"))
        finally:
            broker.stop()


if __name__ == "__main__":
    main()
