"""manage.py run_jobs: a scheduled job, run by a loop as people write it."""

from __future__ import annotations

import itertools
import logging
import signal
import time
from contextlib import nullcontext
from types import FrameType
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

import django_connguard as connguard
from shop.jobs import order_and_ship

logger = logging.getLogger("shop")


class Command(BaseCommand):
    """Runs the job for ever, with and without the boundary that a request has."""

    help = "Orders and ships every few seconds. Without --guarded, connections stay open and break."

    stopped = False

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--every", type=float, default=5, metavar="SECONDS", help="pause between runs (5)"
        )
        parser.add_argument("--times", type=int, metavar="N", help="stop after so many runs")
        parser.add_argument(
            "--guarded", action="store_true", help="make each run a job of django_connguard"
        )

    def handle(self, *, every: float, times: int | None, guarded: bool, **options: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        for run in itertools.count(1) if times is None else range(1, times + 1):
            self.run(run, guarded)
            if run != times:
                self.pause(every)
            if self.stopped:
                logger.info("stopped")
                break

    def stop(self, number: int, frame: FrameType | None) -> None:
        """End the loop after the run at hand; a second signal ends the process at once."""
        # Raises nothing: with psycopg 3, an exception that strikes inside atomic() may be replaced
        # by an error of its rollback, and the loop would take that for a failed run and go on.
        self.stopped = True
        signal.signal(number, signal.SIG_DFL)

    def pause(self, seconds: float) -> None:
        """Sleep, in naps: a signal does not end a sleep."""
        end = time.monotonic() + seconds
        while not self.stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def run(self, number: int, guarded: bool) -> None:
        """Run the job once; as under any scheduler, its failure does not end the loop."""
        try:
            with connguard.job("shop.order_and_ship") if guarded else nullcontext():
                shipped = order_and_ship()
        except Exception as error:
            reason = " ".join(str(error).split())  # drivers' messages have several lines
            logger.error("run %d failed: %s: %s", number, type(error).__name__, reason)
        else:
            logger.info("run %d shipped %d", number, shipped)
