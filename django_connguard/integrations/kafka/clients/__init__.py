"""What differs between the client libraries; each has a module."""

from __future__ import annotations

import sys
from typing import Any

from django_connguard.integrations.kafka.clients.aiokafka import AioKafka
from django_connguard.integrations.kafka.clients.base import Client
from django_connguard.integrations.kafka.clients.confluent import Confluent
from django_connguard.integrations.kafka.clients.kafka_python import KafkaPython

_KINDS = (
    ("kafka", "KafkaConsumer", KafkaPython),
    ("confluent_kafka", "Consumer", Confluent),
    ("aiokafka", "AIOKafkaConsumer", AioKafka),
)


def client_of(consumer: Any, function: str, *, commits: bool = False) -> Client:
    """Return what speaks to ``consumer`` for ``function()``; ``commits``: that commits offsets.

    Raises TypeError for what is no consumer of a library known here, and ValueError for one that
    is closed, or that cannot leave the commits to ``function()``.
    """
    for module, name, kind in _KINDS:
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and isinstance(consumer, known):
            client = kind(consumer)
            break
    else:
        raise TypeError(
            f"{function}() takes a consumer of kafka-python, confluent-kafka or aiokafka, "
            f"not {consumer!r}."
        )
    if client.is_closed():
        state = "closed, or was never started" if client.is_async else "closed"
        raise ValueError(f"{function}() was given a consumer that is {state}: {consumer!r}.")
    if commits and not client.has_group():
        raise ValueError(f"{function}() commits offsets, for which the consumer needs a group_id.")
    setting = client.commits_by_itself() if commits else None
    if setting is not None:
        raise ValueError(
            f"{function}() commits offsets when their messages have been handled; the consumer "
            f"would commit them sooner by itself: create it with {setting}=False."
        )
    return client
