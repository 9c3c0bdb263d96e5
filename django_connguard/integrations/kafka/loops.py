"""Loops over a consumer in which each message, or each poll's batch, is a unit of work."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from functools import wraps
from threading import Event
from typing import Any, ParamSpec, TypeVar, overload

from asgiref.sync import iscoroutinefunction, sync_to_async

from django_connguard.async_unit import AsyncUnit
from django_connguard.boundary import Unit
from django_connguard.integrations.kafka.clients import client_of
from django_connguard.integrations.kafka.clients.base import Client
from django_connguard.integrations.kafka.places import (
    Message,
    batch_name,
    message_name,
    wait_of,
)
from django_connguard.integrations.kafka.stopping import stopping
from django_connguard.integrations.kafka.transactions import must_be_committed, refuse_transactions
from django_connguard.job import job
from django_connguard.long_jobs import acheckpoint, checkpoint
from django_connguard.signals import job_finished

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("django_connguard")


def messages(consumer: Any, *, timeout: float = 1.0, stop: Event | None = None) -> Any:
    """Iterate over a consumer's messages; each is a unit of work until the next is asked for.

    ``for message in messages(consumer):``, with aiokafka ``async for``. The unit is named
    ``topic[partition]``. Offsets are committed as the consumer is configured to, or as the loop's
    body does; a message counts as consumed when the next one is asked for, so that the one whose
    handling ended the loop (by an error, or by ``break``) comes again.

    ``timeout``: seconds to wait for a message before the connections of this thread are looked
    after (those past their ``CONN_MAX_AGE`` are closed) and the wait goes on. ``stop``: ends the
    loop between two messages when it is set. In the main thread SIGTERM and SIGINT do so, unless
    the program handles them itself. When stopped, the consumer is closed and leaves its group.

    Inside another job, the unit of work is that job's, and a ``checkpoint()`` follows each message.

    Raises TypeError for a consumer of an unknown library, ValueError for one that is closed, or
    that commits in the background what is still being handled, as aiokafka and confluent-kafka do
    unless told otherwise.
    """
    client = client_of(consumer, "messages")
    check_number("messages", timeout=timeout)
    return (_messages_async if client.is_async else _messages)(client, timeout, stop)


def batches(
    consumer: Any,
    *,
    timeout: float = 1.0,
    max_records: int = 500,
    commit: bool = False,
    stop: Event | None = None,
) -> Any:
    """Iterate over what each poll of a consumer returns, a list; each is a unit of work.

    ``timeout``: seconds that a poll waits. ``max_records``: how many messages it returns at most.
    ``commit``: commit the offsets when the body has handled the batch without an error, and so has
    committed its work to the database; a body that leaves a transaction open gets a
    TransactionManagementError, since its work would be lost. After ``break`` nothing is committed.
    The unit is named ``topic[partition]``, or ``topic[*]`` if there are several partitions. For
    the rest, see ``messages()``.

    Raises TypeError and ValueError as that does, ValueError if ``commit`` meets a consumer that
    commits by itself or has no group, and TransactionManagementError if it is called inside an
    ``atomic`` block.
    """
    client = client_of(consumer, "batches", commits=commit)
    check_number("batches", timeout=timeout, max_records=max_records)
    if commit:
        refuse_transactions("batches")
    loop = _batches_async if client.is_async else _batches
    return loop(client, timeout, max_records, commit, stop)


@overload
def handler(func: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def handler(*, retry_stale: int = 0) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def handler(func: Any = None, /, *, retry_stale: int = 0) -> Any:
    """Make each call of a function, which takes a message, a unit of work named after that.

    For a loop of your own: ``@handler``, on functions, methods and coroutines. The message is the
    first argument that is one. ``retry_stale``: see ``job()``. Raises TypeError for anything else,
    and when it is called without a message.
    """
    if retry_stale < 0:
        raise ValueError(f"handler() takes retry_stale={retry_stale!r}: it must be 0 or more.")
    if func is None:
        return lambda func: _handler(func, retry_stale)
    return _handler(func, retry_stale)


def is_async(func: Any) -> bool:
    """Return whether calling ``func`` makes a coroutine."""
    return iscoroutinefunction(func) or iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def _handler(func: Callable[..., Any], retry_stale: int) -> Callable[..., Any]:
    if not callable(func) or inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        raise TypeError(f"handler() decorates functions, methods and coroutines, not {func!r}.")
    if is_async(func):

        @wraps(func)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            message = _message_in(*args, *kwargs.values())
            if retry_stale:
                again = job(name=message_name(message), shared=True, retry_stale=retry_stale)
                return await again(func)(*args, **kwargs)
            async with _async_unit(message_name(message), message):
                return await func(*args, **kwargs)

        return run_async

    @wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        message = _message_in(*args, *kwargs.values())
        if retry_stale:
            again = job(name=message_name(message), retry_stale=retry_stale)
            return again(func)(*args, **kwargs)
        with _unit(message_name(message), message):
            return func(*args, **kwargs)

    return run


def _message_in(*arguments: Any) -> Message:
    for argument in arguments:
        if all(hasattr(argument, name) for name in ("topic", "partition", "offset")):
            return argument
    raise TypeError(f"No Kafka message among the arguments {arguments!r}.")


def guard_listener(listener: R) -> R:
    """Make each call of a rebalance listener's methods a unit of work; return the listener.

    ``consumer.subscribe(topics, listener=guard_listener(MyListener()))``, for kafka-python and
    aiokafka. The callbacks that confluent-kafka takes are functions: decorate them with ``@job``.
    Raises TypeError for kafka-python's AsyncConsumerRebalanceListener.
    """
    unfit = getattr(sys.modules.get("kafka"), "AsyncConsumerRebalanceListener", None)
    if unfit is not None and isinstance(listener, unfit):
        raise TypeError(
            "guard_listener() takes no AsyncConsumerRebalanceListener: kafka-python runs it in a "
            "loop of its own, without asyncio; make it a ConsumerRebalanceListener."
        )
    for name in ("on_partitions_revoked", "on_partitions_assigned", "on_partitions_lost"):
        method = getattr(listener, name, None)
        if method is not None:
            setattr(
                listener, name, job(name=name, shared=inspect.iscoroutinefunction(method))(method)
            )
    return listener


def lag(consumer: Any) -> dict[tuple[str, int], int]:
    """Return how many messages each assigned partition has in store, by topic and partition.

    As the consumer knows it from its last fetch, without a question to the broker; a partition of
    which nothing was fetched yet is left out. For kafka-python and confluent-kafka. Raises
    TypeError and ValueError as ``messages()`` does.
    """
    client = client_of(consumer, "lag", consumes=False)
    if client.is_async:
        raise TypeError("lag() is for sync consumers; ask an aiokafka one for its highwater().")
    found = {}
    for partition in client.assigned():
        end = client.highwater(partition)
        position = client.position(partition)
        if end is not None and position is not None and position >= 0:
            found[partition.topic, partition.partition] = max(0, end - position)
    return found


def _messages(client: Client, timeout: float, stop: Event | None) -> Generator[Message, None, None]:
    with stopping(stop) as event, client.waiting(timeout):
        waited = 0.0
        while not event.is_set():
            message = client.one()
            if message is None:
                waited += timeout
                if client.is_closed() or waited >= client.patience:
                    return
                checkpoint()
                continue
            waited = 0.0
            unit = _unit(message_name(message), message)
            try:
                with unit:
                    yield message
            except BaseException:
                _come_again(client, [message])
                raise
            client.handled([message])
            if unit.started is None:  # another job's: this much can be done in its midst
                checkpoint()
    client.close()


def _unit(name: str, first: Message) -> Unit:
    unit = Unit(name, nests=False)
    if job_finished.receivers:
        unit.queue_wait = wait_of(first)
    return unit


async def _messages_async(
    client: Client, timeout: float, stop: Event | None
) -> AsyncGenerator[Message, None]:
    with stopping(stop) as event, client.waiting(timeout):
        while not event.is_set():
            message = await client.one()
            if message is None:
                if client.is_closed():
                    return
                await acheckpoint()
                continue
            try:
                async with _async_unit(message_name(message), message):
                    yield message
            except BaseException:
                await _come_again_async(client, [message])
                raise
    await client.close()


def _batches(
    client: Client, timeout: float, max_records: int, commit: bool, stop: Event | None
) -> Generator[list[Message], None, None]:
    with stopping(stop) as event:
        while not event.is_set() and not client.is_closed():
            batch = client.many(timeout, max_records)
            if not batch:
                checkpoint()
                continue
            unit = _unit(batch_name(batch), batch[0])
            try:
                with unit:
                    yield batch
                    if commit:
                        must_be_committed()
                        client.commit(batch)
            except BaseException:
                _come_again(client, batch)
                raise
            client.handled(batch)
            if unit.started is None:
                checkpoint()
    if not client.is_closed():
        client.close()


async def _batches_async(
    client: Client, timeout: float, max_records: int, commit: bool, stop: Event | None
) -> AsyncGenerator[list[Message], None]:
    with stopping(stop) as event:
        while not event.is_set() and not client.is_closed():
            batch = await client.many(timeout, max_records)
            if not batch:
                await acheckpoint()
                continue
            unit = _async_unit(batch_name(batch), batch[0])
            try:
                async with unit:
                    yield batch
                    if commit:
                        await sync_to_async(must_be_committed)()
                        await client.commit(batch)
            except BaseException:
                await _come_again_async(client, batch)
                raise
    if not client.is_closed():
        await client.close()


def _async_unit(name: str, first: Message) -> AsyncUnit:
    # Shared: on a thread of its own each unit of work would open a connection of its own.
    unit = AsyncUnit(name, shared=True, nests=False)
    unit.unit.queue_wait = wait_of(first)
    return unit


def _come_again(client: Client, messages: list[Message]) -> None:
    # As the loop ends, by an error of its body perhaps, which must come out.
    try:
        client.rewind(messages)
    except Exception:
        logger.exception("Kafka: could not go back to the messages in hand.")


async def _come_again_async(client: Client, messages: list[Message]) -> None:
    try:
        await client.rewind(messages)
    except Exception:
        logger.exception("Kafka: could not go back to the messages in hand.")


def check_number(function: str, **settings: object) -> None:
    """Raise ValueError for a setting that is no number above 0."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{function}() takes {name}={value!r}: it must be a number above 0.")
