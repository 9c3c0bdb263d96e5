"""Real Celery workers with connguard, and beside them with Celery's own Django fixup.

For each pool and each CONN_MAX_AGE, one-query tasks on real Redis and PostgreSQL, in turn with both
guards: connections that the server has accepted, those open after the run and after idle seconds,
failed tasks, and tasks a second (between the first task's end and the last one's; all wait in the
queue before the worker starts). A psycopg pool (min_size 1, max_size 2) counts as an age.

    python -m benchmarks.celery_worker [--pools prefork,threads,solo,gevent] [--ages 0,2,none,pool]
        [--tasks 500] [--idle 6] [--rounds 1]

CONNGUARD_TEST_DRIVER picks the driver (see tests/services.py). Needs celery, redis, and gevent.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")

WORKERS = 4  # processes, threads or greenlets
POOLS = {
    "prefork": ("-P", "prefork", "-c", str(WORKERS)),
    "threads": ("-P", "threads", "-c", str(WORKERS)),
    "solo": ("-P", "solo"),
    "gevent": ("-P", "gevent", "-c", str(WORKERS)),
}
AGES: dict[str, dict[str, Any]] = {
    "0": {"CONN_MAX_AGE": 0},
    "2": {"CONN_MAX_AGE": 2},
    "none": {"CONN_MAX_AGE": None},
    "pool": {"OPTIONS": {"pool": {"min_size": 1, "max_size": 2}}},
}


@dataclass(frozen=True)
class Outcome:
    """What one worker did."""

    connects: int
    open_after: int
    open_idle: int
    failed: int
    rate: float  # tasks a second


class Database:
    """A database of its own, so that the server's counters are this benchmark's."""

    def __init__(self) -> None:
        from django.db import connection

        self._connection = connection
        self.name = f"connguard_benchmark_{os.getpid()}"

    def __enter__(self) -> Database:
        self._rows(f"CREATE DATABASE {self.name}")
        return self

    def __exit__(self, *error: object) -> None:
        self._rows(f"DROP DATABASE {self.name} WITH (FORCE)")

    def connects(self) -> int:
        """Return how many sessions it has had."""
        return int(
            self._rows(f"SELECT sessions FROM pg_stat_database WHERE datname = '{self.name}'")[0][0]
        )

    def open(self) -> int:
        return int(
            self._rows(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{self.name}'")[0][0]
        )

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall()) if cursor.description else []


def measure(
    database: Database, options: argparse.Namespace, pool: str, age: str, guarded: bool
) -> Outcome:
    """Let one worker run the tasks."""
    from tests.workers import Project

    project = Project(
        options.folder,
        aliases={"default": {**AGES[age], "NAME": database.name}},
        connguard={"CELERY": guarded},
        env={"CONNGUARD_BENCHMARK": "1"},
        worker_prefetch_multiplier=4,
    )
    results = [project.send("backend") for _ in range(options.tasks)]
    with project.worker(*POOLS[pool], "-l", "warning") as worker:
        failed = 0
        for result in results:
            result.get(timeout=120, propagate=False)
            failed += not result.successful()
        ends = sorted(result.date_done for result in results)
        time.sleep(0.5)  # the server takes a moment to see a session's end
        open_after = database.open()
        time.sleep(options.idle)
        open_idle = database.open()
        if pool == "gevent":
            worker.kill()  # its warm shutdown takes five seconds
    time.sleep(0.5)
    seconds = (ends[-1] - ends[0]).total_seconds()
    return Outcome(database.connects(), open_after, open_idle, failed, len(ends) / seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Celery workers with connguard and without.")
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--ages", default=",".join(AGES))
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--idle", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=1, help="the rate is their median")
    options = parser.parse_args()
    options.folder = Path(tempfile.mkdtemp(prefix="connguard-benchmark-"))
    django.setup()

    import celery

    from tests import services

    print(
        f"Python {platform.python_version()}, Django {django.__version__},"
        f" Celery {celery.__version__}, {services.driver()}; {options.tasks} tasks"
    )
    heading = ("pool", "age", "guard", "connects", "open", f"after {options.idle:g} s idle")
    row = "{:8} {:5} {:10} {:>8} {:>5} {:>16} {:>7} {:>8} {:>6}".format
    print(row(*heading, "failed", "tasks/s", "ratio"))
    for pool in options.pools.split(","):
        for age in options.ages.split(","):
            if age == "pool" and not (services.has_pools() and pool in ("prefork", "gevent")):
                continue
            rates: dict[bool, float] = {}
            for guarded in (False, True):
                outcomes = []
                for _ in range(options.rounds):
                    with Database() as database:
                        outcomes.append(measure(database, options, pool, age, guarded))
                last = outcomes[-1]
                rates[guarded] = statistics.median(outcome.rate for outcome in outcomes)
                print(
                    row(
                        *(pool, age, "connguard" if guarded else "Celery's"),
                        *(last.connects, last.open_after, last.open_idle),
                        *(sum(outcome.failed for outcome in outcomes), f"{rates[guarded]:.0f}"),
                        f"{rates[True] / rates[False]:.2f}" if guarded else "",
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
