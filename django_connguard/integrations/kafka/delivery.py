"""At-least-once delivery: waits out a database outage, and gives up on a poison message."""

from __future__ import annotations

import inspect
import logging
import random
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.db import InterfaceError, OperationalError, connections

from django_connguard.boundary import Unit
from django_connguard.integrations.kafka.clients import client_of
from django_connguard.integrations.kafka.clients.base import Client
from django_connguard.integrations.kafka.loops import handler
from django_connguard.integrations.kafka.places import Message, message_name, place
from django_connguard.integrations.kafka.stopping import stopping
from django_connguard.long_jobs import checkpoint

logger = logging.getLogger("django_connguard")

# What is to be called next, with its arguments; what it returns or raises comes back.
Steps = Generator[tuple[Any, ...], Any, Any]


def deliver(
    consumer: Any,
    handle: Callable[[Message], Any],
    *,
    tries: int = 5,
    poison: Callable[[Message, Exception], Any] | None = None,
    backoff: tuple[float, float] = (0.1, 30.0),
    timeout: float = 1.0,
    max_records: int = 500,
    stop: Event | None = None,
) -> None:
    """Hand each message to ``handle(message)``, at least once, until stopped.

    Each call is a unit of work, named ``topic[partition]``. Offsets are committed after each
    poll's batch, for what was handled. A message that fails comes again, with those behind it;
    meanwhile the partitions are paused and polling goes on, so that the group keeps this consumer.

    ``tries``: how many times a message may fail. A failure does not count while the database
    cannot be reached (an OperationalError or InterfaceError, and a new connection or query fails as
    well): then all wait until it can. ``poison(message, error)``: called, as a unit of work, for
    a message that has used up its tries, which is then taken as handled; to write it to a
    dead-letter topic, say. Without it, and when it raises, the error ends ``deliver()``.
    ``backoff``: the shortest and the longest wait in seconds before another try; each is twice the
    one before, less a random part. ``timeout``, ``stop``: see ``messages()``; a program that
    handles SIGTERM itself sets ``stop`` in its handler. ``max_records``: how many messages a poll
    returns at most. However it ends, the consumer is closed and leaves its group.

    Raises TypeError for a consumer of an unknown library or for asyncio (see ``adeliver()``), and
    for an async ``handle``; ValueError if the consumer is closed, commits by itself or has no
    group.
    """
    client = client_of(consumer, "deliver", commits=True)
    if client.is_async or iscoroutinefunction(handle):
        raise TypeError("deliver() is for sync consumers and functions; use adeliver().")
    with stopping(stop) as event, closing(client):
        delivery = _Delivery(client, handle, tries, poison, backoff, timeout, max_records, event)
        steps = delivery.run()
        step = next(steps, None)
        while step is not None:
            function, *arguments = step
            try:
                result = function(*arguments)
            except Exception as error:
                step = _after(steps.throw, error)
            else:
                step = _after(steps.send, result)


async def adeliver(
    consumer: Any,
    handle: Callable[[Message], Any],
    *,
    tries: int = 5,
    poison: Callable[[Message, Exception], Any] | None = None,
    backoff: tuple[float, float] = (0.1, 30.0),
    timeout: float = 1.0,
    max_records: int = 500,
    stop: Event | None = None,
) -> None:
    """Do what ``deliver()`` does, for aiokafka; ``handle`` and ``poison`` are coroutine functions.

    Units of work use the thread that ``sync_to_async()`` shares. Raises as ``deliver()`` does.
    """
    client = client_of(consumer, "adeliver", commits=True)
    if not client.is_async or not iscoroutinefunction(handle):
        raise TypeError("adeliver() is for async consumers and functions; use deliver().")
    with stopping(stop) as event:
        try:
            delivery = _Delivery(
                client, handle, tries, poison, backoff, timeout, max_records, event
            )
            steps = delivery.run()
            step = next(steps, None)
            while step is not None:
                function, *arguments = step
                try:
                    result = function(*arguments)
                    if inspect.isawaitable(result):
                        result = await result
                except Exception as error:
                    step = _after(steps.throw, error)
                else:
                    step = _after(steps.send, result)
        finally:
            await client.close()


def _after(resume: Callable[[Any], Any], value: Any) -> Any:
    try:
        return resume(value)
    except StopIteration:
        return None


@dataclass
class _Delivery:
    """What is done in which order; sync and async callers differ in how they do it."""

    client: Client
    handle: Callable[[Message], Any]
    tries: int
    poison: Callable[[Message, Exception], Any] | None
    backoff: tuple[float, float]
    timeout: float
    max_records: int
    stop: Event
    # By topic and partition, the offset that failed last and how often.
    failures: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tries < 1 or self.max_records < 1:
            raise ValueError("deliver() takes tries and max_records of 1 or more.")
        if not 0 < self.backoff[0] <= self.backoff[1]:
            raise ValueError(
                f"deliver() takes backoff={self.backoff!r}: two ascending numbers over 0."
            )
        self.handle = handler(self.handle)
        self.poison = self.poison and handler(self.poison)

    def run(self) -> Steps:
        client = self.client
        while not self.stop.is_set():
            batch = yield client.many, self.timeout, self.max_records
            if not batch:
                yield self._with_database(checkpoint)
                continue
            handled = 0
            error: Exception | None = None
            for message in batch:
                if self.stop.is_set():
                    break
                try:
                    yield self.handle, message
                except Exception as failure:
                    error = failure
                    break
                handled += 1
            if handled:
                yield client.commit, batch[:handled]
            if handled < len(batch):
                yield client.rewind, batch[handled:]
            if error is not None:
                yield from self._failed(batch[handled], error)
                error = None  # or this frame and the traceback would hold each other

    def _failed(self, message: Message, error: Exception) -> Steps:
        if is_database_error(error) and not (yield self._with_database(is_reachable)):
            logger.warning(
                "Kafka: %s waits for the database, which is out of reach: %s",
                *(message_name(message), error),
            )
            yield from self._wait_for_database()
            return
        topic, partition, offset = place(message)
        before, count = self.failures.get((topic, partition), (offset, 0))
        count = count + 1 if before == offset else 1
        self.failures[topic, partition] = offset, count
        if count < self.tries:
            logger.warning(
                "Kafka: %s, offset %d, has failed %d of %d times: %r",
                *(message_name(message), offset, count, self.tries, error),
            )
            yield from self._wait(count)
            return
        del self.failures[topic, partition]
        if self.poison is None:
            raise error
        logger.error(
            "Kafka: %s, offset %d, is given up after %d times: %r",
            *(message_name(message), offset, count, error),
        )
        yield self.poison, message, error
        yield self.client.commit, [message]
        yield self.client.seek, topic, partition, offset + 1

    def _wait_for_database(self) -> Steps:
        attempt = 1
        while not self.stop.is_set():
            yield from self._wait(attempt)
            if (yield self._with_database(is_reachable)):
                logger.warning("Kafka: the database is back.")
                return
            attempt += 1

    def _wait(self, attempt: int) -> Steps:
        """Poll without fetching for a while, so that the consumer stays in its group."""
        shortest, longest = self.backoff
        seconds = min(longest, shortest * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1)  # noqa: S311
        end = time.monotonic() + seconds
        paused: set[Any] = set()
        while not self.stop.is_set() and (left := end - time.monotonic()) > 0:
            paused |= yield (self.client.pause,)
            come = yield self.client.many, min(left, self.timeout), 1
            if come:  # of a partition that was assigned meanwhile
                yield self.client.rewind, come
        yield self.client.resume, paused

    def _with_database(self, function: Callable[[], Any]) -> tuple[Callable[[], Any]]:
        return (sync_to_async(function) if self.client.is_async else function,)


def is_database_error(error: BaseException) -> bool:
    """Return whether an error is, or was raised for, one that a lost connection brings about."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, (OperationalError, InterfaceError)):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def is_reachable() -> bool:
    """Return whether every database that this thread has used can be reached."""
    with Unit("kafka: is the database reachable?"):
        for wrapper in connections.all(initialized_only=True):
            try:
                wrapper.ensure_connection()
                if not wrapper.is_usable():
                    return False
            except (OperationalError, InterfaceError):
                return False
    return True
