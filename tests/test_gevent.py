"""Under gevent's patched threads, a greenlet is a thread: all promises hold."""

from __future__ import annotations

import importlib.util

import pytest

from tests import services
from tests.command import Run

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server"),
    pytest.mark.skipif(not importlib.util.find_spec("gevent"), reason="gevent is not installed"),
]

SCRIPT = """
from gevent import monkey; monkey.patch_all()
import random, threading, time
import django; django.setup()
from django.db import connection, connections
from django_connguard import job, stats
from tests.server import eventually, query, watch

def run(function, number):
    threads = [threading.Thread(target=function) for _ in range(number)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

def work():
    for _ in range(60):
        job(query)()
        time.sleep(random.choice([0, 0.02, 0.04]))

def hold():
    job(query)()
    ready.wait()
    rested.wait()

with watch() as server:
{body}
print("done")
"""
# The promise: the CONN_MAX_AGE, and what shows that it is kept.
PROMISES: dict[str, tuple[float | None, str]] = {
    "no job sees a connection that the reaper closes": (
        0.03,
        """
    run(work, 8)
    assert stats()["default"]["closed"]["idle"] > 0
    assert server.settles_at(0)
""",
    ),
    "idle greenlets hold nothing past its age": (
        0.3,
        """
    ready, rested = threading.Barrier(9), threading.Event()
    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads: thread.start()
    ready.wait()
    assert server.settles_at(0)
    assert stats()["default"]["closed"]["idle"] == 8
    rested.set()
    for thread in threads: thread.join()
""",
    ),
    "greenlets that end leave nothing": (
        None,
        """
    run(query, 20)
    assert server.settles_at(0)
    assert stats()["default"]["closed"]["thread_end"] == 20
""",
    ),
    "a greenlet whose session was ended gets another": (
        None,
        """
    def lose():
        job(query)(); ready.wait(); go_on.wait(); job(query)()
    ready, go_on = threading.Barrier(5), threading.Event()
    threads = [threading.Thread(target=lose) for _ in range(4)]
    for thread in threads: thread.start()
    ready.wait()
    server.end_all()
    go_on.set()
    for thread in threads: thread.join()
    assert stats()["default"]["closed"]["stale"] == 4
""",
    ),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_the_promises_hold_under_gevent(connstats: Run, promise: str) -> None:
    age, body = PROMISES[promise]
    # PyMySQL reads the system's certificates at each connect, longer than the ages here.
    options = {"ssl_disabled": True} if services.driver() == "pymysql" else {}
    result = connstats.script(SCRIPT.format(body=body), CONN_MAX_AGE=age, OPTIONS=options)
    assert result.stdout == "done\n", result.stderr
    assert result.stderr == ""  # where threads tell of their exceptions
