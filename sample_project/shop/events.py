"""Orders as messages in Kafka: how they are written, read, placed, and given up."""

from __future__ import annotations

import json
import logging
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.management.base import CommandError

from shop.models import Order

logger = logging.getLogger("shop")

PATIENCE = 30  # seconds that the broker may take to say that it has a message


@dataclass(frozen=True)
class OrderPlaced:
    """What happened: a customer has placed an order, and paid for it."""

    event: uuid.UUID
    customer: str

    def encode(self) -> bytes:
        """Return the value of the message."""
        return json.dumps({"event": str(self.event), "customer": self.customer}).encode()

    @classmethod
    def decode(cls, value: bytes | None) -> OrderPlaced:
        """Return what a message's value says; raises ValueError if that is no order."""
        try:
            fields = json.loads(value or b"")
            return cls(uuid.UUID(fields["event"]), fields["customer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is no order: {value!r}.") from error


def handle(message: Any) -> None:
    """Place the order that a message tells of, once, however often the message comes."""
    placed = OrderPlaced.decode(message.value)
    order, is_new = Order.objects.get_or_create(
        event=placed.event, defaults={"customer": placed.customer, "state": Order.State.PAID}
    )
    logger.info("%s %s", order, "placed" if is_new else "was there already")


def to_dead_letters(producer: Any) -> Callable[[Any, Exception], None]:
    """Return what writes a message that cannot be handled, and why, to the dead-letter topic."""

    def write(message: Any, error: Exception) -> None:
        # In the value, since brokers before 0.11 know no headers. Bytes that are no UTF-8 become
        # lone surrogates, which encode(errors="surrogateescape") turns back.
        value = message.value and message.value.decode(errors="surrogateescape")
        letter = {
            "topic": message.topic,
            "partition": message.partition,
            "offset": message.offset,
            "error": f"{type(error).__name__}: {error}",
            "value": value,
        }
        sent = producer.send(
            settings.DEAD_LETTERS_TOPIC, key=message.key, value=json.dumps(letter).encode()
        )
        # Without the broker's word that it is there, the message must not be taken as handled.
        sent.get(timeout=PATIENCE)

    return write


def make_producer() -> Any:
    """Return a producer of kafka-python."""
    from kafka import KafkaProducer

    return KafkaProducer(acks="all", **settings.KAFKA)


def make_consumer(group: str, **options: Any) -> Any:
    """Return a consumer of kafka-python that reads the orders, from the first on."""
    from kafka import KafkaConsumer

    return KafkaConsumer(
        settings.ORDERS_TOPIC,
        group_id=group,
        auto_offset_reset="earliest",
        **settings.KAFKA,
        **options,
    )


@contextmanager
def kafka_at_hand() -> Iterator[None]:
    """Make a CommandError, which is one line, of all that is wrong with Kafka."""
    try:
        from kafka.errors import KafkaError
    except ImportError as error:
        raise CommandError(
            "kafka-python is missing: run pip install 'django-connguard[sample]'."
        ) from error
    servers = settings.KAFKA["bootstrap_servers"]
    # kafka-python would try for long, or for ever if it was told the version, with a line for each.
    if not any(map(listens, servers)):
        raise CommandError(
            f"No Kafka broker at {','.join(servers)}: start one, or set SAMPLE_KAFKA_SERVERS."
        )
    try:
        yield
    except KafkaError as error:
        hint = "" if settings.KAFKA["api_version"] else " (before 0.10? SAMPLE_KAFKA_API_VERSION)"
        raise CommandError(f"Kafka at {','.join(servers)}: {error}{hint}") from error


def listens(server: str) -> bool:
    """Return whether somebody is there."""
    try:
        there = urlsplit(f"//{server}")
        socket.create_connection((there.hostname, there.port or 9092), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True
