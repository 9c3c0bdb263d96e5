"""`connstats --experiment`: real workers on a real server, which is asked what they hold."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import pytest

from django_connguard.connstats.crew import Run as Result
from django_connguard.connstats.findings import conclusions
from tests import services
from tests.command import Run, refused
from tests.server import Server, eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.one_driver]

server_only = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")
SMALL = ("--workers", "2", "--jobs", "4", "--rate", "20", "--format", "json")


def runs(connstats: Run, job: str, *arguments: str, **settings: Any) -> list[dict[str, Any]]:
    result = connstats("--experiment", f"tests.jobs.{job}", *SMALL, *arguments, **settings)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["runs"]
    return found


@server_only
def test_unguarded_workers_leak_and_fail_after_a_drop_and_guarded_ones_do_neither(
    connstats: Run, server: Server
) -> None:
    found = runs(connstats, "select", "--ages", "0,none", "--drop")
    assert [(run["CONN_MAX_AGE"], run["guarded"]) for run in found] == [
        (0, False),
        (0, True),
        (None, False),
        (None, True),
    ]
    for run in found:
        assert run["jobs"] == 8
        assert run["failed"] == (0 if run["guarded"] else 4)
    leaking, cured, _, keeping = found
    assert leaking["connects"] == leaking["open"]["before_drop"] == leaking["open"]["peak"] == 2
    assert (cured["connects"], cured["open"]["before_drop"], cured["open"]["final"]) == (8, 0, 0)
    # Two before the drop and two after it.
    assert (keeping["connects"], keeping["open"]["final"]) == (4, 2)
    assert 0 < leaking["latency"]["median"] <= leaking["latency"]["p95"]
    assert leaking["open"]["mean"] <= 2
    assert server.settles_at(0)


@pytest.mark.parametrize("pool", ["processes", "threads"])
def test_workers_are_processes_or_threads_and_a_decorated_job_runs_bare_when_unguarded(
    connstats: Run, pool: str
) -> None:
    unguarded, guarded = runs(connstats, "decorated", "--ages", "0", "--pool", pool)
    assert unguarded["open"]["final"] == unguarded["connects"] == 2
    assert (guarded["open"]["final"], guarded["connects"]) == (0, 8)


def test_async_jobs_are_run_too(connstats: Run) -> None:
    unguarded, guarded = runs(connstats, "async_select", "--ages", "0", "--workers", "1")
    assert (unguarded["connects"], guarded["connects"]) == (1, 4)
    assert guarded["open"]["final"] == 0


def test_failing_jobs_are_counted_and_the_first_failure_is_told(connstats: Run) -> None:
    for run in runs(connstats, "fail_and_print", "--ages", "0", "--workers", "1", "--jobs", "2"):
        assert (run["jobs"], run["failed"]) == (2, 2)
        assert run["failure"] == "ValueError: on purpose"
        assert run["latency"] == {"median": None, "p95": None}


def test_the_projects_own_job_is_the_default_and_people_get_a_table(connstats: Run) -> None:
    result = connstats(
        *("--experiment", "--workers", "1", "--jobs", "2", "--rate", "9", "--ages", "0"),
        connguard={"EXPERIMENT_JOB": "tests.jobs.select"},
    )
    assert result.returncode == 0, result.stderr
    assert "guarded" in result.stdout
    assert "0/2" in result.stdout
    assert "Open at the server while every worker waited" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:5])) <= 80


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("", "no job to run: give --experiment a dotted path, or set CONNGUARD['EXPERIMENT_JOB']"),
        ("absent.job", "cannot import the job 'absent.job': ModuleNotFoundError: No module named"),
        ("tests.jobs.absent", "cannot import the job 'tests.jobs.absent': ImportError: "),
        (
            "tests.jobs.needs_arguments",
            "the job 'tests.jobs.needs_arguments' cannot be called without arguments: ",
        ),
        ("tests.jobs.end_the_process", "a worker ended in mid-run, with exit status 3"),
    ],
)
def test_a_job_that_cannot_be_run_is_one_line_and_status_2(
    connstats: Run, job: str, line: str
) -> None:
    arguments = ["--experiment", job] if job else ["--experiment"]
    assert refused(connstats(*arguments, "--workers", "1")).startswith(line)


@server_only
def test_more_workers_than_the_server_has_room_for_are_refused(connstats: Run) -> None:
    line = refused(connstats("--experiment", "tests.jobs.select", "--workers", "100000"))
    assert line.startswith("--workers 100000 may need more connections than are free")


@pytest.mark.skipif(services.vendor() != "sqlite", reason="about SQLite")
def test_sqlite_has_no_connections_to_drop(connstats: Run) -> None:
    line = refused(connstats("--experiment", "tests.jobs.select", "--drop"))
    assert line == "--drop needs a server that can drop connections: SQLite has none"


@pytest.mark.skipif(services.vendor() != "sqlite", reason="about SQLite")
def test_a_database_in_memory_cannot_be_shared_with_workers(connstats: Run) -> None:
    line = refused(connstats("--experiment", "tests.jobs.select", NAME=":memory:"))
    assert line == "alias 'default' is in this process's memory: workers cannot share it"


@server_only
def test_an_unreachable_server_is_one_line(connstats: Run) -> None:
    line = refused(connstats("--experiment", "tests.jobs.select", "--database", "down", down=True))
    assert line.startswith("cannot reach alias 'down' at 127.0.0.1:1: ")


@pytest.mark.skipif(services.driver() != "psycopg", reason="Django pools psycopg 3 alone")
def test_a_pool_is_compared_at_age_0_alone(connstats: Run) -> None:
    line = refused(connstats("--experiment", "tests.jobs.select", OPTIONS={"pool": True}))
    assert line.endswith("with which Django allows CONN_MAX_AGE=0 alone: give --ages 0")


@server_only
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_the_workers_and_shows_no_traceback(connstats: Run, server: Server) -> None:
    # A shell that runs the tests in the background has them ignore it.
    prelude = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = connstats.start("--experiment", "tests.jobs.select", "--ages", "0", prelude=prelude)
    try:
        assert eventually(lambda: server.count() >= 2, seconds=20)  # the probe and a worker
    finally:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "CommandError: interrupted\n")
    assert server.settles_at(0)


def a_run(max_age: float | None, guarded: bool, **changes: Any) -> Result:
    values: dict[str, Any] = {"samples": [4, 4], "connects": 4, "jobs": 10, "seconds": 4.0}
    return Result(max_age, guarded, **{**values, **changes})


def test_an_experiment_without_connections_concludes_nothing() -> None:
    nothing = {"samples": [0], "connects": 0}
    [text] = conclusions([a_run(0, False, **nothing), a_run(0, True, **nothing)])
    assert text.startswith("No job opened a connection")


def test_connections_that_the_server_does_not_list_are_a_conclusion() -> None:
    texts = conclusions([a_run(0, False, samples=[0]), a_run(0, True, samples=[0])])
    assert "a pooler such as PgBouncer" in texts[0]


def test_an_age_that_no_connection_reached_proves_nothing() -> None:
    texts = conclusions([a_run(60, False, final=4), a_run(60, True, final=4)])
    assert not any("CONN_MAX_AGE does nothing" in text for text in texts)
    assert any("no connection reached the age of 60" in text for text in texts)


def test_what_reconnecting_costs_is_told_from_the_guarded_runs() -> None:
    texts = conclusions(
        [
            a_run(0, True, connects=40, latencies=[0.004] * 10),
            a_run(None, True, connects=4, latencies=[0.001] * 10),
        ]
    )
    assert texts[-1] == (
        "Guarded, CONN_MAX_AGE=0 made 40 connects and a median job took 4.0 ms; "
        "CONN_MAX_AGE=None made 4, and it took 1.0 ms."
    )
