"""A consumer in a process of its own, run by tests/test_kafka_faults.py: applies each message."""

from __future__ import annotations

import json
import logging
from typing import Any

TABLE = "CREATE TABLE applied (number INTEGER PRIMARY KEY)"


def main(arguments: str) -> None:
    """Deliver until SIGTERM; ``arguments``: JSON of topic, group, log, kafka and deliver."""
    import django

    django.setup()

    from kafka import ConsumerRebalanceListener, KafkaConsumer

    from django_connguard.integrations.kafka import deliver, guard_listener

    given = json.loads(arguments)
    logging.basicConfig(filename=given["log"], level=logging.WARNING)
    logger = logging.getLogger("listener")

    class Listener(ConsumerRebalanceListener):  # type: ignore[misc, unused-ignore]
        def on_partitions_revoked(self, revoked: Any) -> None:
            logger.warning("revoked %d", len(revoked))

        def on_partitions_assigned(self, assigned: Any) -> None:
            logger.warning("assigned %d", len(assigned))

    options = given["kafka"]
    if "api_version" in options:
        options["api_version"] = tuple(options["api_version"])
    consumer = KafkaConsumer(
        group_id=given["group"],
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        heartbeat_interval_ms=300,
        **options,
    )
    consumer.subscribe([given["topic"]], listener=guard_listener(Listener()))
    try:
        deliver(consumer, apply, **given["deliver"])
    except BaseException:
        logger.exception("deliver() has ended")
        raise


def apply(message: Any) -> None:
    """Insert the message's number; once, however often it comes."""
    from django.db import IntegrityError, connection, transaction

    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("INSERT INTO applied VALUES (%s)", [int(message.value)])
    except IntegrityError:
        pass  # applied when it came before
