"""Kafka consumers: each message, or each batch, is a unit of work.

For kafka-python, confluent-kafka and aiokafka; which one a consumer is of is found out. None of
them is imported here.
"""

from django_connguard.integrations.kafka.delivery import adeliver, deliver
from django_connguard.integrations.kafka.loops import (
    batches,
    guard_listener,
    handler,
    lag,
    messages,
)

__all__ = ["adeliver", "batches", "deliver", "guard_listener", "handler", "lag", "messages"]
