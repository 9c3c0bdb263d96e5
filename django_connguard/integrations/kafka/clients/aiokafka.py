"""aiokafka."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django_connguard.integrations.kafka.clients.base import Client, failure_logged
from django_connguard.integrations.kafka.places import Message, spans


class AioKafka(Client):
    """aiokafka."""

    is_async = True

    def is_closed(self) -> bool:
        return self.consumer._closed or self.consumer._fetcher is None  # not started

    def commits_by_itself(self) -> str | None:
        return "enable_auto_commit" if self.consumer._enable_auto_commit else None

    def has_group(self) -> bool:
        return self.consumer._group_id is not None

    async def one(self) -> Message | None:
        found = await self.many(self._timeout, 1)
        return found[0] if found else None

    async def many(self, timeout: float, max_records: int) -> list[Message]:
        from aiokafka.errors import ConsumerStoppedError

        try:
            found = await self.consumer.getmany(
                timeout_ms=int(timeout * 1000), max_records=max_records
            )
        except ConsumerStoppedError:
            return []
        return [message for messages in found.values() for message in messages]

    async def rewind(self, messages: Iterable[Message]) -> None:
        assigned = self.assigned()
        for (topic, partition), (first, last) in spans(messages).items():
            there = self.there(topic, partition)
            if there in assigned and await self.consumer.position(there) > last:
                self.consumer.seek(there, first)

    def there(self, topic: str, partition: int) -> Any:
        from aiokafka import TopicPartition

        return TopicPartition(topic, partition)

    async def commit(self, messages: Iterable[Message]) -> None:
        assigned = self.assigned()
        offsets = {
            there: last + 1
            for (topic, partition), (_, last) in spans(messages).items()
            if (there := self.there(topic, partition)) in assigned  # or it refuses them all
        }
        with failure_logged():
            await self.consumer.commit(offsets)

    async def close(self) -> None:
        await self.consumer.stop()
