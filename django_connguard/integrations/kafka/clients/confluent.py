"""confluent-kafka."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from django_connguard.integrations.kafka.clients.base import Client, failure_logged
from django_connguard.integrations.kafka.places import Message, spans

logger = logging.getLogger("django_connguard")


class Confluent(Client):
    """confluent-kafka."""

    def is_closed(self) -> bool:
        try:
            self.consumer.assignment()
        except RuntimeError:
            return True
        return False

    def commits_by_itself(self) -> str | None:
        from confluent_kafka import KafkaError, KafkaException, TopicPartition

        # It does not tell whether enable.auto.commit is on, but without its storing of offsets
        # it has nothing to commit. Then it takes offsets, if not those of a strange partition.
        try:
            self.consumer.store_offsets(offsets=[TopicPartition("connguard", 0, 0)])
        except KafkaException as error:
            if error.args[0].code() == KafkaError._INVALID_ARG:
                return "enable.auto.offset.store"
        return None

    def has_group(self) -> bool:
        return True  # it cannot be made without one

    def one(self) -> Message | None:
        from confluent_kafka import KafkaError, KafkaException

        try:
            message = self.consumer.poll(self._timeout)
        except RuntimeError:
            if self.is_closed():
                return None
            raise
        error = message and message.error()
        if not error:
            return message
        if error.fatal():
            raise KafkaException(error)
        if error.code() != KafkaError._PARTITION_EOF:
            logger.warning("Kafka: %s", error.str())  # it goes on trying by itself
        return None

    def many(self, timeout: float, max_records: int) -> list[Message]:
        # Not consume(), which consumers with deserializers do not have.
        messages: list[Message] = []
        self._timeout = timeout
        try:
            while len(messages) < max_records and (message := self.one()) is not None:
                messages.append(message)
                self._timeout = 0
        except BaseException:  # of a deserializer, say
            self.rewind(messages)
            raise
        return messages

    def handled(self, messages: Iterable[Message]) -> None:
        from confluent_kafka import KafkaException

        # For its own commits in the background, if those are on.
        with suppress(KafkaException, RuntimeError):  # no longer assigned, or closed
            self.consumer.store_offsets(offsets=self._after(messages))

    def rewind(self, messages: Iterable[Message]) -> None:
        for (topic, partition), (first, _) in spans(messages).items():
            self.seek(topic, partition, first)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        there = self.there(topic, partition)
        if there in self.assigned():
            there.offset = offset
            self.consumer.seek(there)

    def there(self, topic: str, partition: int) -> Any:
        from confluent_kafka import TopicPartition

        return TopicPartition(topic, partition)

    def commit(self, messages: Iterable[Message]) -> None:
        from confluent_kafka import KafkaException

        with failure_logged():
            for partition in self.consumer.commit(
                offsets=self._after(messages), asynchronous=False
            ):
                if partition.error:
                    raise KafkaException(partition.error)

    def _after(self, messages: Iterable[Message]) -> list[Any]:
        from confluent_kafka import TopicPartition

        return [
            TopicPartition(topic, partition, last + 1)
            for (topic, partition), (_, last) in spans(messages).items()
        ]

    def pause(self) -> set[Any]:
        paused = self.assigned()
        self.consumer.pause(list(paused))
        return paused

    def resume(self, partitions: set[Any]) -> None:
        self.consumer.resume(list(partitions & self.assigned()))

    def highwater(self, partition: Any) -> int | None:
        found = self.consumer.get_watermark_offsets(partition, cached=True)
        return found[1] if found and found[1] >= 0 else None

    def position(self, partition: Any) -> int:
        offset: int = self.consumer.position([partition])[0].offset
        return offset
