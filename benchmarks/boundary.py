"""Cost of the boundary around a job that does nothing, with one open connection.

Beside it, in the same process and turn by turn: Django's pair of request signals,
``close_old_connections`` twice, and Celery's Django fixup (which closes the connection at its first
call, so that it finds nothing to close from then on; a job's reconnect is not in its figure).

    python -m benchmarks.boundary [--rounds 60] [--calls 1000]

CONNGUARD_TEST_DRIVER picks the driver (see tests/services.py). Needs celery.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import threading
from collections.abc import Callable
from time import perf_counter

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")

DEFAULT, LEAN = "connguard, default", "connguard, lean"
SIGNALS, CLOSE_TWICE = "request signals, sent", "close_old_connections twice"
FIXUP = "Celery's fixup"


def boundaries() -> dict[str, Callable[[], object]]:
    """Return one no-op job per kind of boundary."""
    from celery import Celery
    from celery.fixups.django import DjangoWorkerFixup
    from django.core.handlers import base  # noqa: F401  (connects reset_urlconf, as a server does)
    from django.core.signals import request_finished, request_started
    from django.db import close_old_connections

    from django_connguard import job

    def body() -> None:
        pass

    def signals() -> None:
        request_started.send(sender=body)
        body()
        request_finished.send(sender=body)

    def close_twice() -> None:
        close_old_connections()
        body()
        close_old_connections()

    app = Celery("benchmark")
    fixup, task = DjangoWorkerFixup(app), app.task(body)

    def celery() -> None:
        fixup.on_task_prerun(sender=task)
        body()
        fixup.on_task_postrun(sender=task)

    return {
        DEFAULT: job(name="no-op", signals=True)(body),
        SIGNALS: signals,
        LEAN: job(name="no-op", signals=False)(body),
        CLOSE_TWICE: close_twice,
        FIXUP: celery,
    }


def seconds(call: Callable[[], object], calls: int) -> float:
    """Return the mean time of one call, in a thread with a connection of its own."""
    from django.db import connection

    measured = []

    def measure() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        for _ in range(calls // 10):
            call()
        begin = perf_counter()
        for _ in range(calls):
            call()
        measured.append((perf_counter() - begin) / calls)
        connection.close()

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    return measured[0]


def main() -> None:
    """Print microseconds a job and the ratios that the project promises."""
    parser = argparse.ArgumentParser(description="Cost of a boundary, against its peers.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    django.setup()

    from django.db import connections

    jobs = boundaries()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.rounds):
        for name, call in jobs.items():
            times[name].append(seconds(call, options.calls))

    vendor = connections["default"].vendor
    print(f"Python {platform.python_version()}, Django {django.__version__}, {vendor}")
    for name, runs in times.items():
        print(f"{name:30} {statistics.median(runs) * 1e6:7.2f} µs a job")
    for ours, theirs in ((DEFAULT, SIGNALS), (LEAN, CLOSE_TWICE), (LEAN, FIXUP), (DEFAULT, FIXUP)):
        ratio = statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True))
        print(f"{ours} / {theirs}: {ratio:.2f}")


if __name__ == "__main__":
    main()
