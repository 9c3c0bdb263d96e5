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


def client_of(
    consumer: Any, function: str, *, consumes: bool = True, commits: bool = False
) -> Client:
    """Return what speaks to ``consumer`` for ``function()``, which consumes, or commits as well.

    Raises TypeError for what is no consumer of a library known here, and ValueError for one that
    is closed, or that would commit what has not been handled.
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
    setting = client.commits_by_itself()
    if setting is not None and (commits or (consumes and client.commits_in_background)):
        raise ValueError(
            f"{function}() was given a consumer that commits by itself, and so loses messages that "
            f"have not been handled: create it with {setting}=False."
        )
    return client
