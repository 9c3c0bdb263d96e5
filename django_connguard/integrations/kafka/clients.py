"""What differs between the client libraries: kafka-python, confluent-kafka and aiokafka."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

Message = Any  # a library's own: ConsumerRecord, or confluent_kafka.Message

logger = logging.getLogger("django_connguard")


class Client:
    """A consumer of a library that blocks; of one for asyncio, some methods are coroutines.

    ``one()`` and ``many()`` give what they fetch as consumed; ``rewind()`` takes that back.
    """

    is_async = False
    patience = float("inf")  # seconds without a message after which the consumer's loop ends

    def __init__(self, consumer: Any) -> None:
        self.consumer = consumer

    def is_closed(self) -> bool:
        return bool(self.consumer._closed)

    def commits_by_itself(self) -> str | None:
        """Return the setting to change if it commits offsets unasked, or may do so."""
        raise NotImplementedError

    def has_group(self) -> bool:
        """Return whether there is a group for which to commit offsets."""
        raise NotImplementedError

    @contextmanager
    def waiting(self, timeout: float) -> Iterator[None]:
        """Make ``one()`` return None after so many seconds without a message."""
        self._timeout = timeout
        yield

    def one(self) -> Any:
        """Return the next message, or None."""
        raise NotImplementedError

    def many(self, timeout: float, max_records: int) -> Any:
        """Return the messages there are, or that come within ``timeout`` seconds, as a list."""
        raise NotImplementedError

    def rewind(self, messages: Iterable[Message]) -> Any:
        """Make the first of these the next of its partition, unless seek() was used meanwhile."""
        raise NotImplementedError

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Make this offset the next of a partition, if that is still assigned."""
        raise NotImplementedError

    def commit(self, messages: Iterable[Message]) -> Any:
        """Commit the offsets that follow these messages; a failure is logged."""
        raise NotImplementedError

    def pause(self) -> set[Any]:
        """Pause what is assigned and not paused; return what that is."""
        paused = self.assigned() - self._paused()
        self.consumer.pause(*paused)
        return paused

    def resume(self, partitions: set[Any]) -> None:
        """Fetch from these again, as far as they are still assigned."""
        self.consumer.resume(*partitions & self.assigned())

    def highwater(self, partition: Any) -> int | None:
        """Return the offset that the next message to be written will have, if it is known."""
        found: int | None = self.consumer.highwater(partition)
        return found

    def position(self, partition: Any) -> Any:
        """Return the offset of the next message."""
        return self.consumer.position(partition)

    def close(self) -> Any:
        """Close the consumer, which leaves its group."""
        self.consumer.close()

    def assigned(self) -> set[Any]:
        """Return the library's own names of the partitions assigned."""
        return set() if self.is_closed() else set(self.consumer.assignment())

    def _paused(self) -> set[Any]:
        return set(self.consumer.paused())


class KafkaPython(Client):
    """kafka-python 2 and 3."""

    def commits_by_itself(self) -> str | None:
        return "enable_auto_commit" if self.consumer.config["enable_auto_commit"] else None

    def has_group(self) -> bool:
        return self.consumer.config["group_id"] is not None

    @contextmanager
    def waiting(self, timeout: float) -> Iterator[None]:
        # The consumer's own iterator, since with it each message is consumed for itself: a
        # commit() in a loop's body means the messages so far, not all that a poll has returned.
        config = self.consumer.config
        before = config["consumer_timeout_ms"]
        self.patience = before / 1000
        config["consumer_timeout_ms"] = min(before, timeout * 1000)
        try:
            yield
        finally:
            config["consumer_timeout_ms"] = before

    def one(self) -> Message | None:
        return next(self.consumer, None)

    def many(self, timeout: float, max_records: int) -> list[Message]:
        found = self.consumer.poll(timeout_ms=int(timeout * 1000), max_records=max_records)
        return [message for messages in found.values() for message in messages]

    def rewind(self, messages: Iterable[Message]) -> None:
        from kafka import TopicPartition

        assigned = self.assigned()
        for (topic, partition), (first, last) in spans(messages).items():
            there = TopicPartition(topic, partition)
            if there in assigned and self.consumer.position(there) > last:
                self.consumer.seek(there, first)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        from kafka import TopicPartition

        there = TopicPartition(topic, partition)
        if there in self.assigned():
            self.consumer.seek(there, offset)

    def commit(self, messages: Iterable[Message]) -> None:
        from kafka import TopicPartition
        from kafka.structs import OffsetAndMetadata

        more = [-1] * (len(OffsetAndMetadata._fields) - 2)  # the leader's epoch, since 2.1
        offsets = {
            TopicPartition(topic, partition): OffsetAndMetadata(last + 1, "", *more)
            for (topic, partition), (_, last) in spans(messages).items()
        }
        with _failure_logged():
            self.consumer.commit(offsets)


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
        while len(messages) < max_records and (message := self.one()) is not None:
            messages.append(message)
            self._timeout = 0
        return messages

    def rewind(self, messages: Iterable[Message]) -> None:
        for (topic, partition), (first, _) in spans(messages).items():
            self.seek(topic, partition, first)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        from confluent_kafka import TopicPartition

        there = TopicPartition(topic, partition, offset)
        if there in self.assigned():
            self.consumer.seek(there)

    def commit(self, messages: Iterable[Message]) -> None:
        from confluent_kafka import TopicPartition

        offsets = [
            TopicPartition(topic, partition, last + 1)
            for (topic, partition), (_, last) in spans(messages).items()
        ]
        with _failure_logged():
            self.consumer.commit(offsets=offsets, asynchronous=False)

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
        from aiokafka import TopicPartition

        assigned = self.assigned()
        for (topic, partition), (first, last) in spans(messages).items():
            there = TopicPartition(topic, partition)
            if there in assigned and await self.consumer.position(there) > last:
                self.consumer.seek(there, first)

    def seek(self, topic: str, partition: int, offset: int) -> None:
        from aiokafka import TopicPartition

        there = TopicPartition(topic, partition)
        if there in self.assigned():
            self.consumer.seek(there, offset)

    async def commit(self, messages: Iterable[Message]) -> None:
        from aiokafka import TopicPartition

        offsets = {
            TopicPartition(topic, partition): last + 1
            for (topic, partition), (_, last) in spans(messages).items()
        }
        with _failure_logged():
            await self.consumer.commit(offsets)

    async def close(self) -> None:
        await self.consumer.stop()


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


@contextmanager
def _failure_logged() -> Iterator[None]:
    """Let a commit fail, as it does when partitions have moved: at least once is kept."""
    try:
        yield
    except Exception as error:
        logger.warning(
            "Kafka: offsets were not committed; unless a later commit covers them, their messages "
            "come again: %s",
            error,
        )
