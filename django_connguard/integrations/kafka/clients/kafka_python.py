"""kafka-python 2 and 3."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from django_connguard.integrations.kafka.clients.base import Client, failure_logged
from django_connguard.integrations.kafka.places import Message, spans

logger = logging.getLogger("django_connguard")

RETRY = 0.5  # seconds


class KafkaPython(Client):
    """kafka-python 2 and 3."""

    commits_in_background = False  # but when it polls or is closed

    def commits_by_itself(self) -> str | None:
        return "enable_auto_commit" if self.consumer.config["enable_auto_commit"] else None

    def has_group(self) -> bool:
        return self.consumer.config["group_id"] is not None

    @contextmanager
    def waiting(self, timeout: float) -> Iterator[None]:
        # The consumer's own iterator, since with it each message is consumed for itself: a
        # commit() in a loop's body means the messages so far, not all that a poll has returned.
        config = self.consumer.config
        # Another loop over this consumer, not ended yet, has changed it.
        before = self.consumer.__dict__.setdefault(
            "_connguard_timeout_ms", config["consumer_timeout_ms"]
        )
        self.patience = before / 1000
        config["consumer_timeout_ms"] = min(before, timeout * 1000)
        try:
            yield
        finally:
            config["consumer_timeout_ms"] = before

    def one(self) -> Message | None:
        try:
            return next(self.consumer, None)
        except Exception as error:
            self._bear(error)
        return None

    def many(self, timeout: float, max_records: int) -> list[Message]:
        try:
            found = self.consumer.poll(timeout_ms=int(timeout * 1000), max_records=max_records)
        except Exception as error:
            self._bear(error)
            return []
        return [message for messages in found.values() for message in messages]

    def _bear(self, error: Exception) -> None:
        """Go on after what passes by itself, as 3.x raises when the broker restarts."""
        if not getattr(error, "retriable", False):
            raise error
        logger.warning("Kafka: %s", error)
        time.sleep(RETRY)

    def rewind(self, messages: Iterable[Message]) -> None:
        assigned = self.assigned()
        for (topic, partition), (first, last) in spans(messages).items():
            there = self.there(topic, partition)
            if there in assigned and self.consumer.position(there) > last:
                self.consumer.seek(there, first)

    def there(self, topic: str, partition: int) -> Any:
        from kafka import TopicPartition

        return TopicPartition(topic, partition)

    def commit(self, messages: Iterable[Message]) -> None:
        from kafka.structs import OffsetAndMetadata

        more = [-1] * (len(OffsetAndMetadata._fields) - 2)  # the leader's epoch, since 2.1
        offsets = {
            self.there(topic, partition): OffsetAndMetadata(last + 1, "", *more)
            for (topic, partition), (_, last) in spans(messages).items()
        }
        with failure_logged():
            self.consumer.commit(offsets)
