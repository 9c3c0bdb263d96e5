"""What the loops ask of a consumer, whatever library it is of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from django_connguard.integrations.kafka.places import Message

logger = logging.getLogger("django_connguard")


class Client:
    """A consumer of a library that blocks; of one for asyncio, some methods are coroutines.

    ``one()`` and ``many()`` give what they fetch as consumed; ``rewind()`` takes that back.
    """

    is_async = False
    commits_in_background = True  # if it commits by itself: while a message is being handled
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
        """Make the first of these the next of its partition, if that is further on now."""
        raise NotImplementedError

    def handled(self, messages: Iterable[Message]) -> None:
        """Take note that these may be committed by whoever commits."""

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Make this offset the next of a partition, if that is still assigned."""
        there = self.there(topic, partition)
        if there in self.assigned():
            self.consumer.seek(there, offset)

    def there(self, topic: str, partition: int) -> Any:
        """Return the library's own name of a partition."""
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


@contextmanager
def failure_logged() -> Iterator[None]:
    """Let a commit fail, as it does when partitions have moved: at least once is kept."""
    try:
        yield
    except Exception as error:
        logger.warning(
            "Kafka: offsets were not committed; unless a later commit covers them, their messages "
            "come again: %s",
            error,
        )
