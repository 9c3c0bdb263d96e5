"""manage.py run_jobs: a scheduled job, run by a loop as people write it."""

from __future__ import annotations

import itertools
import logging
from contextlib import nullcontext
from typing import Any

from django.core.management.base import CommandParser

import django_connguard as connguard
from shop.jobs import order_and_ship
from shop.management.loop import LoopCommand, one_line

logger = logging.getLogger("shop")


class Command(LoopCommand):
    """Runs the job for ever, with and without the boundary that a request has."""

    help = "Orders and ships every few seconds. Without --guarded, connections stay open and break."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--every", type=float, default=5, metavar="SECONDS", help="pause between runs (5)"
        )
        parser.add_argument("--times", type=int, metavar="N", help="stop after so many runs")
        parser.add_argument(
            "--guarded", action="store_true", help="make each run a job of django_connguard"
        )

    def handle(self, *, every: float, times: int | None, guarded: bool, **options: Any) -> None:
        for run in itertools.count(1) if times is None else range(1, times + 1):
            self.run(run, guarded)
            if run != times:
                self.pause(every)
            if self.stopped.is_set():
                logger.info("stopped")
                break

    def run(self, number: int, guarded: bool) -> None:
        """Run the job once; as under any scheduler, its failure does not end the loop."""
        try:
            with connguard.job("shop.order_and_ship") if guarded else nullcontext():
                shipped = order_and_ship()
        except Exception as error:
            logger.error("run %d failed: %s", number, one_line(error))
        else:
            logger.info("run %d shipped %d", number, shipped)
