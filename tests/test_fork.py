"""A forked child has connections of its own, and its parent's go on working."""

from __future__ import annotations

import os

import pytest

from tests import services
from tests.command import Run

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks"),
    pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server"),
]

# A process that forks while two of its threads hold a connection. How the child ends, and what its
# garbage collector does, must not be heard by the server as the parent's goodbye.
SCRIPT = """
import gc, os, sys, threading, warnings
import django; django.setup()
from django.db import connection, transaction
from django_connguard import job
from tests.server import backend_id
warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads

def hold():
    backends.append(backend_id()); ready.set(); forked.wait(); backends.append(backend_id())

backends, ready, forked = [], threading.Event(), threading.Event()
thread = threading.Thread(target=hold, daemon=True); thread.start(); ready.wait()

def fork():
    mine = backend_id()
    child = os.fork()
    if child == 0:
        assert connection.connection is None
        own = backend_id()
        assert own not in (mine, *backends), "the child speaks on its parent's connection"
        job(backend_id)()
        assert connection.connection is None, "the child's job is nested in one of its parent"
        gc.collect()
        {end}
    assert os.waitpid(child, 0)[1] == 0
    assert backend_id() == mine, "the parent has lost its connection"

{fork}
forked.set(); thread.join()
assert backends[0] == backends[1], "a thread of the parent has lost its connection"
print("done")
"""
FORKS = {
    "plain": "fork()",
    "in a job": "job(fork)()",
    "in atomic": "transaction.atomic(fork)()",
}


@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)"])
@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS)
def test_a_child_opens_its_own_connections_and_its_parents_go_on_working(
    connstats: Run, fork: str, end: str
) -> None:
    result = connstats.script(SCRIPT.format(fork=fork, end=end))
    assert (result.stdout, result.stderr) == ("done\n", "")


POOL = """
import os, warnings
import django; django.setup()
from django.db import connection
from django_connguard import job
from tests.server import backend_id

warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
pooled = {job(backend_id)() for _ in range(4)}
child = os.fork()
if child == 0:
    assert job(backend_id)() not in pooled
    connection.close_pool()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert {job(backend_id)() for _ in range(4)} <= pooled
print("done")
connection.close_pool()
"""


@pytest.mark.skipif(not services.has_pools(), reason="Django pools psycopg 3 alone, since 5.1")
def test_a_child_has_a_pool_of_its_own(connstats: Run) -> None:
    pool = {"min_size": 1, "max_size": 1}
    result = connstats.script(POOL, OPTIONS={"pool": pool})
    assert (result.stdout, result.stderr) == ("done\n", "")
