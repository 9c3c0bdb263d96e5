"""manage.py produce_orders: orders come in, as messages in Kafka."""

from __future__ import annotations

import logging
import random
import uuid
from contextlib import closing
from typing import Any

from django.conf import settings
from django.core.management.base import CommandParser

from shop import events
from shop.jobs import CUSTOMERS
from shop.management.loop import LoopCommand

logger = logging.getLogger("shop")


class Command(LoopCommand):
    """Writes order events to their topic, and ends when the broker has them all."""

    help = "Writes orders to Kafka, for consume_orders to read."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--count", type=int, default=10, metavar="N", help="how many (10)")
        parser.add_argument("--rate", type=float, metavar="R", help="so many a second at most")
        parser.add_argument(
            "--poison", action="store_true", help="begin with a message that nobody can read"
        )

    def handle(self, *, count: int, rate: float | None, poison: bool, **options: Any) -> None:
        with events.kafka_at_hand(), closing(events.make_producer()) as producer:
            sent = []
            if poison:
                sent.append(producer.send(settings.ORDERS_TOPIC, b"not an order"))
            for number in range(count):
                if number and rate:
                    self.pause(1 / rate)
                if self.stopped.is_set():
                    break
                placed = events.OrderPlaced(uuid.uuid4(), random.choice(CUSTOMERS))
                # By customer, whose orders so stay in their sequence.
                key = placed.customer.encode()
                sent.append(producer.send(settings.ORDERS_TOPIC, key=key, value=placed.encode()))
            for future in sent:
                future.get(timeout=events.PATIENCE)
        logger.info("%d messages sent", len(sent))
