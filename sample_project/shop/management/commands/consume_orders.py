"""manage.py consume_orders: a Kafka consumer, as people write it and as a guarded one."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

from django.core.management.base import CommandParser

from django_connguard.integrations import kafka
from shop import events
from shop.management.loop import LoopCommand, one_line

logger = logging.getLogger("shop")


class Command(LoopCommand):
    """Places the orders that come by Kafka, with and without units of work."""

    help = "Places the orders that produce_orders writes. Without --guarded, some may be lost."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--group", default="shop", metavar="NAME", help="the consumer's group (shop)"
        )
        parser.add_argument(
            "--guarded", action="store_true", help="have django_connguard deliver the messages"
        )

    def handle(self, *, group: str, guarded: bool, **options: Any) -> None:
        with events.kafka_at_hand():
            if guarded:
                self.deliver(group)
            else:
                self.loop(group)
        logger.info("stopped")

    def deliver(self, group: str) -> None:
        """Commit what has been handled, and what has gone to the dead letters."""
        with (
            closing(events.make_producer()) as producer,
            closing(events.make_consumer(group, enable_auto_commit=False)) as consumer,
        ):
            poison = events.to_dead_letters(producer)
            kafka.deliver(consumer, events.handle, poison=poison, stop=self.stopped)

    def loop(self, group: str) -> None:
        """Commit what has been read, as kafka-python does by default, whether it failed or not."""
        # The pauses are for self.stopped to be seen: without, the inner loop would never end.
        with closing(events.make_consumer(group, consumer_timeout_ms=500)) as consumer:
            while not self.stopped.is_set():
                for message in consumer:
                    self.handle_message(message)
                    if self.stopped.is_set():
                        break

    def handle_message(self, message: Any) -> None:
        """Handle a message; its failure does not end the loop."""
        try:
            events.handle(message)
        except Exception as error:
            at = f"{message.topic}[{message.partition}], offset {message.offset}"
            logger.error("%s failed: %s", at, one_line(error))
