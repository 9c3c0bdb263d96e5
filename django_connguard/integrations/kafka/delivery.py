"""At-least-once delivery: waits out a database outage, and gives up on a poison message."""

from __future__ import annotations

import inspect
import logging
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event
from traceback import walk_tb
from typing import Any

from asgiref.sync import sync_to_async
from django.db import DEFAULT_DB_ALIAS, InterfaceError, OperationalError, connections
from django.db.utils import DatabaseErrorWrapper

from django_connguard import hygiene
from django_connguard.boundary import Unit
from django_connguard.integrations.kafka.clients import client_of
from django_connguard.integrations.kafka.clients.base import Client
from django_connguard.integrations.kafka.loops import check_number, handler, is_async
from django_connguard.integrations.kafka.places import Message, message_name, place
from django_connguard.integrations.kafka.stopping import stopping
from django_connguard.integrations.kafka.transactions import must_be_committed, refuse_transactions
from django_connguard.long_jobs import checkpoint
from django_connguard.ownership import current

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
    for async functions; ValueError if the consumer is closed, commits by itself or has no group;
    TransactionManagementError inside an ``atomic`` block. A ``handle`` that leaves a transaction
    open has failed.
    """
    client = client_of(consumer, "deliver", commits=True)
    if client.is_async or is_async(handle) or is_async(poison):
        raise TypeError("deliver() is for sync consumers and functions; use adeliver().")
    refuse_transactions("deliver")
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
                if inspect.isawaitable(result) or inspect.isgenerator(result):
                    raise TypeError(f"deliver() called what has only returned {result!r}.")
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
    if not (client.is_async and is_async(handle) and (poison is None or is_async(poison))):
        raise TypeError("adeliver() is for async consumers and functions; use deliver().")
    await sync_to_async(refuse_transactions)("adeliver")
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
        check_number(
            "deliver", tries=self.tries, max_records=self.max_records, timeout=self.timeout
        )
        if not (isinstance(self.backoff, (tuple, list)) and len(self.backoff) == 2):
            raise ValueError(f"deliver() takes backoff={self.backoff!r}: two numbers of seconds.")
        check_number("deliver", backoff=self.backoff[0])
        check_number("deliver", backoff=self.backoff[1])
        if self.backoff[0] > self.backoff[1]:
            raise ValueError(f"deliver() takes backoff={self.backoff!r}: the shorter wait first.")
        checked = _checked_async if self.client.is_async else _checked
        self.handle = handler(checked(self.handle))
        self.poison = self.poison and handler(self.poison)

    def run(self) -> Steps:
        client = self.client
        while not self._has_ended():
            batch = yield client.many, self.timeout, self.max_records
            if not batch:
                yield self._with_database(checkpoint)
                continue
            handled = 0
            error: Exception | None = None
            try:
                for message in batch:
                    if self._has_ended():
                        break
                    try:
                        yield self.handle, message
                    except Exception as failure:
                        error = failure
                        break
                    handled += 1
                if client.is_closed():
                    return  # by somebody else; what was not committed comes again
                if handled:
                    yield client.commit, batch[:handled]
                if handled < len(batch):
                    yield client.rewind, batch[handled:]
                if error is not None:
                    yield from self._failed(batch[handled], error)
            finally:
                del error  # or this frame and the traceback would hold each other

    def _has_ended(self) -> bool:
        return self.stop.is_set() or self.client.is_closed()

    def _failed(self, message: Message, error: Exception) -> Steps:
        # Inside another job the boundary has done nothing.
        yield self._with_database(checkpoint)
        if (yield from self._is_outage(message, error)):
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
        if self.poison is None:
            raise error
        logger.error(
            "Kafka: %s, offset %d, is given up after %d times: %r",
            *(message_name(message), offset, count, error),
        )
        try:
            yield self.poison, message, error
        except Exception as failure:
            if (yield from self._is_outage(message, failure)):
                return  # it fails once more, and is given up then
            raise
        del self.failures[topic, partition]
        yield self.client.commit, [message]
        yield self.client.seek, topic, partition, offset + 1

    def _is_outage(self, message: Message, error: Exception) -> Steps:
        """Return whether an error was the database's being out of reach, after it is back."""
        if not is_database_error(error) or (yield self._with_database(is_reachable, error)):
            return False
        logger.warning(
            "Kafka: %s waits for the database, which is out of reach: %s",
            *(message_name(message), error),
        )
        yield from self._wait_for_database(error)
        return True

    def _wait_for_database(self, error: Exception) -> Steps:
        attempt = 1
        while not self._has_ended():
            yield from self._wait(attempt)
            if (yield self._with_database(is_reachable, error)):
                logger.warning("Kafka: the database is back.")
                return
            attempt += 1

    def _wait(self, attempt: int) -> Steps:
        """Poll without fetching for a while, so that the consumer stays in its group."""
        shortest, longest = self.backoff
        seconds = min(longest, shortest * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1)  # noqa: S311
        end = time.monotonic() + seconds
        paused: set[Any] = set()
        while not self._has_ended() and (left := end - time.monotonic()) > 0:
            paused |= yield (self.client.pause,)
            come = yield self.client.many, min(left, self.timeout), 1
            if come:  # of a partition that was assigned meanwhile
                yield self.client.rewind, come
        if not self.client.is_closed():
            yield self.client.resume, paused

    def _with_database(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        return (sync_to_async(function) if self.client.is_async else function, *arguments)


def _checked(handle: Callable[[Message], Any]) -> Callable[[Message], Any]:
    def handle_and_check(message: Message) -> Any:
        result = handle(message)
        must_be_committed()
        return result

    return handle_and_check


def _checked_async(handle: Callable[[Message], Any]) -> Callable[[Message], Any]:
    async def handle_and_check(message: Message) -> Any:
        result = await handle(message)
        await sync_to_async(must_be_committed)()
        return result

    return handle_and_check


def is_database_error(error: BaseException) -> bool:
    """Return whether an error is, or was raised for, one that a lost connection brings about."""
    return any(isinstance(cause, (OperationalError, InterfaceError)) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised for, and what a group of them holds."""
    seen: set[int] = set()
    left = [error]
    while left:
        cause = left.pop()
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            left.extend(filter(None, (cause.__cause__, cause.__context__)))
            left.extend(getattr(cause, "exceptions", ()))


def _aliases(error: BaseException) -> set[str]:
    """Return the aliases whose connections an error has come from, in whatever thread."""
    return {
        frame.f_locals["self"].wrapper.alias
        for cause in _causes(error)
        for frame, _ in walk_tb(cause.__traceback__)
        if frame.f_code is DatabaseErrorWrapper.__exit__.__code__
    }


def is_reachable(error: BaseException) -> bool:
    """Return whether the databases that an error has come from can be reached."""
    with Unit("kafka: is the database reachable?"):
        for link in current().held():
            hygiene.close_if_unfit(link, {})  # which a unit inside another has not done
        return all(map(_answers, _aliases(error) or [DEFAULT_DB_ALIAS]))


def _answers(alias: str) -> bool:
    wrapper = connections[alias]
    try:
        wrapper.ensure_connection()
        return wrapper.is_usable()
    except (OperationalError, InterfaceError):
        return False
    except Exception:  # no outage: a test that may not use this alias, say
        return True
