"""Where a message stands, and what the unit of work is named that handles it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import Any

Message = Any  # a library's own: ConsumerRecord, or confluent_kafka.Message


def place(message: Message) -> tuple[str, int, int]:
    """Return a message's topic, partition and offset; raises TypeError for what is none."""
    try:
        topic = message.topic
        if callable(topic):  # confluent-kafka's
            return topic(), message.partition(), message.offset()
        return topic, message.partition, message.offset
    except AttributeError as error:
        raise TypeError(f"This is no Kafka message: {message!r}.") from error


def wait_of(message: Message) -> float | None:
    """Return for how many seconds a message has waited, by its own timestamp if it has one."""
    timestamp = message.timestamp
    if callable(timestamp):
        kind, timestamp = timestamp()
        timestamp = timestamp if kind else None
    if timestamp is None or timestamp < 0:  # from a broker before 0.10
        return None
    return max(0.0, time.time() - float(timestamp) / 1000)


def message_name(message: Message) -> str:
    """Return the name of the unit of work that handles a message; TypeError if it is none."""
    topic, partition, _ = place(message)
    return _name(topic, partition)


def batch_name(messages: Iterable[Message]) -> str:
    """Return the same for a batch: ``topic[*]`` for several partitions, ``a+b[*]`` for topics."""
    found = spans(messages)
    if len(found) == 1:
        return _name(*next(iter(found)))
    return "+".join(sorted({topic for topic, _ in found})) + "[*]"


@cache
def _name(topic: str, partition: int) -> str:
    return f"{topic}[{partition}]"


def spans(messages: Iterable[Message]) -> dict[tuple[str, int], tuple[int, int]]:
    """Return the first and the last offset of each partition."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for message in messages:
        topic, partition, offset = place(message)
        first, last = found.get((topic, partition), (offset, offset))
        found[topic, partition] = min(first, offset), max(last, offset)
    return found
