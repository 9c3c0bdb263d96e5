"""Celery: tasks in real workers have the connections that CONN_MAX_AGE promises."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest

from tests import services, workers
from tests.command import Run
from tests.server import Server, eventually, watch
from tests.workers import TASKS, Project, end, still_open

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server"),
]

AGES: dict[str, dict[str, Any]] = {
    "default": {"CONN_MAX_AGE": None},
    "brief": {"CONN_MAX_AGE": 0},
    "aged": {"CONN_MAX_AGE": 1},
}
if services.has_pools():
    AGES["pooled"] = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 2}}}
POOLS = {
    "prefork": ("-P", "prefork", "-c", "2"),
    "threads": ("-P", "threads", "-c", "2"),
    "solo": ("-P", "solo"),
    "gevent": ("-P", "gevent", "-c", "4"),
}
PERSISTENT = ["prefork", "threads", "solo"]  # in which a connection can outlive its task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workers.need("celery", "redis")
    workers.need_server(workers.REDIS)
    return tmp_path_factory.mktemp("celery")


@pytest.fixture(scope="module")
def server(django_db_setup: None, django_db_blocker: Any, folder: Path) -> Iterator[Server]:
    with django_db_blocker.unblock(), watch() as view:
        yield view


@pytest.fixture(scope="module", params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    if request.param == "gevent":
        workers.need("gevent")
    return str(request.param)


@pytest.fixture(scope="module")
def project(pool: str, server: Server, folder: Path) -> Iterator[Project]:
    """A project whose worker runs in ``pool``, and whose aliases differ in CONN_MAX_AGE."""
    project = Project(folder, aliases=AGES)
    with project.worker(*POOLS[pool]) as process:
        yield project
        if pool == "gevent":
            process.kill()  # its warm shutdown takes five seconds


WEB = """
import sys
import django
if {imported}:
    import celery.app.trace, celery.fixups.django, celery.utils.dispatch
    def functions():
        yield celery.app.trace.build_tracer
        yield celery.fixups.django.DjangoWorkerFixup.install
        yield celery.utils.dispatch.Signal.send
    before = [*functions()]
django.setup()
if {imported}:
    assert [*functions()] == before
    from django_connguard.integrations import celery as integration
    assert integration.install()
    assert not {{*functions()}} & {{*before}}
    integration.undo()
    assert [*functions()] == before
else:
    assert not [name for name in sys.modules if name.partition(".")[0] == "celery"]
    assert "django_connguard.integrations.celery" not in sys.modules
print("done")
"""


@pytest.mark.parametrize("imported", [True, False])
def test_celery_stays_as_it_is_in_a_process_that_is_no_worker(
    imported: bool, connstats: Run, folder: Path
) -> None:
    result = connstats.script(WEB.format(imported=imported))
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_tasks_reuse_connections_that_may_persist(
    pool: str, project: Project, server: Server
) -> None:
    numbers = project.run_many(12, "backend")
    if pool in PERSISTENT:
        assert len(set(numbers)) <= 2
        assert still_open(server, numbers) == set(numbers)
    else:
        # A greenlet for each task: its connections end with it.
        assert eventually(lambda: not still_open(server, numbers))


def test_age_zero_leaves_no_connection_open(project: Project, server: Server) -> None:
    numbers = project.run_many(6, "backend", "brief")
    assert len(set(numbers)) == 6
    assert eventually(lambda: not still_open(server, numbers))


def test_an_idle_worker_closes_connections_past_their_age(
    pool: str, project: Project, server: Server
) -> None:
    number = project.run("backend", "aged")
    if pool in PERSISTENT:
        assert still_open(server, [number])
    assert eventually(lambda: not still_open(server, [number]), 4)


def test_no_task_fails_when_the_server_drops_connections_between_tasks(
    project: Project, server: Server
) -> None:
    for alias in AGES:
        for _ in range(2):
            numbers = project.run_many(4, "backend", alias)
            end(server, numbers)
        assert not set(project.run_many(4, "backend", alias)) & set(numbers)


@pytest.mark.skipif("pooled" not in AGES, reason="Django pools psycopg 3 alone, since 5.1")
def test_a_psycopg_pool_serves_many_tasks(pool: str, project: Project) -> None:
    numbers = set(project.run_many(16, "backend", "pooled"))
    assert len(numbers) <= (4 if pool == "prefork" else 2)  # a pool in each of two children


def test_receivers_of_task_signals_run_within_the_unit_of_work(
    project: Project, server: Server
) -> None:
    number = project.run("observed")
    assert eventually(lambda: bool(project.noted("task_postrun")))
    assert [line["task_prerun"] for line in project.noted("task_prerun")] == [number]
    assert [line["task_postrun"] for line in project.noted("task_postrun")] == [number]
    assert eventually(lambda: not still_open(server, [number]))


def test_a_task_run_within_a_task_leaves_the_outer_connection_alone(
    project: Project, server: Server
) -> None:
    numbers = project.run("nested")
    assert len(set(numbers)) == 1
    assert eventually(lambda: not still_open(server, numbers))
    assert eventually(lambda: len(project.jobs(f"{TASKS}.nested")) == 1)


def test_each_way_to_end_a_task_ends_its_unit_of_work_under_the_tasks_name(
    project: Project,
) -> None:
    assert project.run("retried") == 1
    with pytest.raises(ValueError, match="as it should"):
        project.run("failing")
    project.send("ignored")
    project.send("rejected")
    outcomes = {
        "retried": [None, "Retry"],
        "failing": ["ValueError"],
        "ignored": ["Ignore"],
        "rejected": ["Reject"],
    }
    for task, expected in outcomes.items():
        assert eventually(lambda: len(project.jobs(f"{TASKS}.{task}")) == len(expected))  # noqa: B023
        seen = [line["exception"] for line in project.jobs(f"{TASKS}.{task}")]
        assert sorted(seen, key=str) == expected  # a retry may end before what it retries


def test_chains_and_chords_are_units_of_work_one_by_one(project: Project) -> None:
    from celery import chain, chord, group

    add = project.client.signature(f"{TASKS}.add")
    headers = [chain(add.clone([1, 1]), add.clone([2])), chain(add.clone([3, 3]), add.clone([4]))]
    assert chord(group(headers), add.clone())().get(timeout=20) == 14
    assert eventually(lambda: len(project.jobs(f"{TASKS}.add")) == 5)


def test_a_unit_of_work_knows_how_long_its_task_was_queued(pool: str, project: Project) -> None:
    def waits() -> list[float | None]:
        return [line["queue_wait"] for line in project.jobs(f"{TASKS}.idle")]

    project.run("idle")
    long_ago = {"connguard_sent_at": time.time() - 100}
    project.run("idle", headers=long_ago)
    project.run("idle", headers=long_ago, countdown=0.2)
    assert eventually(lambda: len(waits()) == 3)
    unknown, queued, due = waits()
    assert unknown is None  # its sender has not the app installed
    assert queued is not None
    assert due is not None
    assert 100 <= queued < 160
    assert 0 <= due < 60  # from its ETA on
    if pool == "prefork":
        project.python(
            "-c",
            "from tests.celery_project.app import app\n"
            "import django; django.setup()\n"
            "from tests.celery_project.tasks import idle\n"
            "idle.delay()",
        )
        assert eventually(lambda: len(waits()) == 4)
        sent = waits()[-1]
        assert sent is not None
        assert 0 <= sent < 60


def test_remote_control_and_signals_of_the_main_process_have_units_of_their_own(
    project: Project, server: Server
) -> None:
    for _ in range(2):
        [number] = project.ask("ask_database")
        assert eventually(lambda: not still_open(server, [number]))  # noqa: B023
    assert eventually(lambda: len(project.jobs("celery.control")) >= 2)
    assert len(project.jobs("celery.worker_ready")) == 1


@pytest.fixture(scope="module")
def results(server: Server, folder: Path) -> Iterator[Project]:
    """A worker that stores results in the database, on a connection that persists."""
    workers.need("django_celery_results")
    project = Project(
        folder,
        aliases={"default": {"CONN_MAX_AGE": None}, "brief": {}},
        apps=["django_celery_results"],
        result_backend="django-db",
        task_track_started=True,
    )
    project.python("-m", "django", "migrate", "-v", "0")
    with project.worker("-P", "prefork", "-c", "1"):
        yield project


def stored(server: Server, result: Any) -> tuple[str, str]:
    """Wait for the result in the database; return its state and value."""
    rows: list[Any] = []

    def is_there() -> bool:
        rows[:] = server.rows(
            "SELECT status, result FROM django_celery_results_taskresult"
            f" WHERE task_id = '{result.id}' AND status NOT IN ('PENDING', 'STARTED')"
        )
        return bool(rows)

    assert eventually(is_there, 10), "no result was stored"
    return rows[0]


def test_a_result_is_stored_though_the_task_has_lost_its_connection(
    results: Project, server: Server
) -> None:
    assert stored(server, results.send("lose_connection", 5)) == ("SUCCESS", "5")


def test_a_result_is_stored_though_a_time_limit_struck_in_a_query(
    results: Project, server: Server
) -> None:
    caught = results.send("survive", 2, soft_time_limit=0.5)
    assert stored(server, caught) == ("SUCCESS", '"struck"')
    assert server.running("sleep") == 0
    uncaught = results.send("sleep", 2, soft_time_limit=0.5)
    assert stored(server, uncaught)[0] == "FAILURE"
    assert server.running("sleep") == 0
    assert stored(server, results.send("backend"))[0] == "SUCCESS"


@pytest.mark.parametrize("kill", ["hard time limit", "revocation"])
def test_no_query_of_a_killed_task_goes_on_at_the_server(
    kill: str, results: Project, server: Server
) -> None:
    limit = 1.5 if kill == "hard time limit" else None
    task = results.send("sleep", 15, time_limit=limit)
    assert eventually(lambda: server.running("sleep") == 1)
    if kill == "revocation":
        results.client.control.revoke(task.id, terminate=True, signal="SIGKILL")
    assert stored(server, task)[0] in ("FAILURE", "REVOKED")
    assert eventually(lambda: server.running("sleep") == 0, 8)
    assert stored(server, results.send("backend"))[0] == "SUCCESS"


def test_the_main_process_stores_results_after_the_server_has_dropped_its_connection(
    results: Project, server: Server
) -> None:
    for _ in range(2):
        before = len(results.noted("revoked"))
        assert stored(server, results.send("add", 1, expires=-1))[0] == "REVOKED"
        # The receiver of task_revoked runs after that; what is ended in its midst it may lose.
        assert eventually(lambda: len(results.noted("revoked")) > before)  # noqa: B023
        end(server, server.sessions())


@pytest.mark.skipif(django.VERSION >= (6, 1), reason="django-celery-beat refuses Django 6.1")
def test_beat_goes_on_when_the_server_drops_the_connection_of_its_schedule(
    server: Server, folder: Path
) -> None:
    workers.need("django_celery_beat")
    entry = {"task": f"{TASKS}.add", "schedule": 0.25, "args": [1]}
    project = Project(
        folder,
        aliases={"default": {"CONN_MAX_AGE": None}},
        apps=["django_celery_beat"],
        beat_schedule={"often": entry},
        beat_scheduler="django_celery_beat.schedulers:DatabaseScheduler",
        beat_max_loop_interval=0.25,
    )
    project.python("-m", "django", "migrate", "-v", "0")
    before = set(server.sessions())
    with project.process("beat", "-l", "info", "--pidfile=") as beat:
        assert eventually(lambda: project.waiting() > 0, 20), beat.log()
        for _ in range(2):
            time.sleep(0.1)  # it has just sent one: by now it sleeps, and has no query under way
            end(server, set(server.sessions()) - before)
            waiting = project.waiting()
            assert eventually(lambda: project.waiting() >= waiting + 2), beat.log()  # noqa: B023
        assert "Error" not in beat.log()


@pytest.mark.parametrize("why", ["unknown", "switched off"])
def test_celerys_own_fixup_stays_where_it_is_unknown_or_connguard_switched_off(
    why: str, server: Server, folder: Path
) -> None:
    import celery

    project = Project(
        folder,
        aliases=AGES,
        connguard={"CELERY": why != "switched off"},
        env={"CONNGUARD_STRANGE_FIXUP": "1" if why == "unknown" else ""},
    )
    with project.worker("-P", "solo") as worker:
        numbers = project.run_many(4, "backend")
        if celery.VERSION >= (5, 6):  # which closes all connections, whatever their age
            assert len(set(numbers)) == 4
        project.run("backend", "brief")
    assert project.noted("job") == []
    assert worker.log().count("not known to connguard") == (why == "unknown")


def test_a_setting_of_celerys_fixup_is_reported_as_superseded(server: Server, folder: Path) -> None:
    project = Project(folder, aliases=AGES, env={"CONNGUARD_DB_REUSE_MAX": "3"})
    with project.worker("-P", "solo") as worker:
        assert len(set(project.run_many(8, "backend"))) == 1
    assert worker.log().count("CELERY_DB_REUSE_MAX is superseded") == 1


def test_a_childs_connections_and_pools_end_with_it(server: Server, folder: Path) -> None:
    workers.need_server(workers.RABBITMQ)
    project = Project(folder, broker=workers.RABBITMQ, aliases=AGES)
    alias = "pooled" if "pooled" in AGES else "default"
    before = set(server.sessions())
    with project.worker("-P", "prefork", "-c", "2", "--max-tasks-per-child", "2") as worker:
        numbers = project.run_many(6, "backend", alias)
        assert len(set(numbers)) > 2
        # Two in each of the two pools, and the main process has used one.
        assert eventually(lambda: len(set(server.sessions()) - before) <= 5)
        assert worker.stop() == 0
        assert eventually(lambda: not set(server.sessions()) - before)
