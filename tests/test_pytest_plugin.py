"""The pytest plugin and the unittest mixin, on projects of their own in runs of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import pytest
from django.conf import settings
from django.db import connection

from tests import services
from tests.command import ROOT

pytest_plugins = ["pytester"]

pytestmark = pytest.mark.one_driver
OPTION = "--connguard-no-leaks"

SETTINGS = """
from tests import services
services.use_driver({driver!r})
SECRET_KEY = "tests"
INSTALLED_APPS = ["django_connguard"]
DATABASES = {databases!r}
ROOT_URLCONF = "inner"
STATIC_URL = MEDIA_URL = "/files/"
USE_TZ = True
CONNGUARD = {{"REQUEST_SIGNALS": True}}
"""

INNER = '''
"""What the tests of the inner projects have in common."""
import asyncio, multiprocessing, subprocess, sys, threading, time, unittest, urllib.request
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection, connections, transaction
from django.http import HttpResponse
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings
from django.urls import path

the_end = threading.Event()  # of the session

def query():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone()[0]

def worker(name):
    """Start a thread that goes on with its connection until the end of the session."""
    ready = threading.Event()
    def run():
        query()
        ready.set()
        the_end.wait(60)
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    assert ready.wait(10)
    return thread

def raw():
    """Open a connection past Django."""
    wrapper = connection.copy()
    return wrapper.get_new_connection(wrapper.get_connection_params())

def view(request):
    # With its length the server keeps the socket, and so the thread, for the next request.
    return HttpResponse(str(query()), headers={"Content-Length": "1"})

urlpatterns = [path("", view)]
'''

CONFTEST = """
import pytest
from django.db import connections
from django_connguard.testing import finder

finder.SETTLES_WITHIN = 0.3  # each leak on purpose waits so long

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:  # what is left open here on purpose must not trouble the next test
        for connection in connections.all(initialized_only=True):
            connection.in_atomic_block = connection.closed_in_transaction = False
            connection.needs_rollback = False
            connection.atomic_blocks.clear()
            connection.savepoint_ids.clear()
            connection.close()

@pytest.fixture(scope="session", autouse=True)
def _end(django_db_setup):
    yield
    import inner
    inner.the_end.set()
"""


CHILD = """
import django, sys, time
from django.conf import settings
database = settings.DATABASES["default"]
database["NAME"] = database["TEST"].get("NAME", "test_" + database["NAME"])
django.setup()
from inner import query
if sys.argv[1:]:
    sys.stdin.readline()
print(query(), flush=True)
time.sleep(60)
"""


class Project:
    """A project in a folder of its own, on a test database of its own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        base = {**settings.DATABASES["default"]}
        name = f"connguard_inner_{os.getpid()}"
        if services.vendor() == "sqlite":
            # A name for the test database, lest it be in memory.
            test = {"NAME": str(pytester.path / "test.sqlite3")}
            base = {"ENGINE": base["ENGINE"], "NAME": str(pytester.path / "db"), "TEST": test}
        else:
            keys = ("ENGINE", "HOST", "PORT", "USER", "PASSWORD")
            base = {**{key: base[key] for key in keys}, "NAME": name, "TEST": {}}
            if services.vendor() == "mysql":
                base["TEST"]["CHARSET"] = "utf8mb4"
        base["CONN_MAX_AGE"] = None
        text = SETTINGS.format(driver=services.driver(), databases={"default": base})
        pytester.makepyfile(inner_settings=text, inner=INNER, child=CHILD)
        pytester.makeconftest(CONFTEST)
        self.environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "inner_settings",
            "PYTHONPATH": os.pathsep.join([str(pytester.path), str(ROOT)]),
        }

    def run(self, tests: str, *options: str) -> Outcome:
        self.pytester.makepyfile(test_inner=f"from inner import *\n{dedent(tests)}")
        return self.python("-m", "pytest", "-ra", "-p", "no:cacheprovider", *options)

    def pooled(self) -> None:
        """Let Django pool the connections."""
        with self.pytester.path.joinpath("inner_settings.py").open("a") as file:
            file.write("\npool = {'min_size': 1, 'max_size': 4}\n")
            file.write("DATABASES['default'].update(CONN_MAX_AGE=0, OPTIONS={'pool': pool})\n")

    def without_django(self, tests: str) -> None:
        """Be no Django project at all."""
        self.pytester.path.joinpath("conftest.py").unlink()
        self.pytester.makepyfile(test_alone=tests)
        del self.environment["DJANGO_SETTINGS_MODULE"]

    def python(self, *arguments: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.pytester.path,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return Outcome(done.stdout + done.stderr, done.returncode)


class Outcome:
    """What a run has printed, and how it has ended."""

    def __init__(self, text: str, status: int) -> None:
        self.text, self.status = text, status

    def told(self, kind: str) -> set[str]:
        """Return the names of the tests of a kind (ERROR, FAILED) in the summary."""
        return set(re.findall(rf"^{kind} test_inner\.py::([\w:]+)", self.text, re.M))

    def counts(self) -> dict[str, int]:
        last = self.text.strip().splitlines()[-1]
        found = re.findall(r"(\d+) (passed|failed|error)", last)
        return {kind: int(number) for number, kind in found}

    def about(self, test: str) -> str:
        """Return what is printed of a test's error at teardown."""
        found = re.search(
            rf"_ ERROR at teardown of {test} _.*?(?=\n_{{3}}|\n={{3}})", self.text, re.S
        )
        assert found, self.text
        return found[0]


@pytest.fixture
def project(pytester: pytest.Pytester, django_db_blocker: Any) -> Iterator[Project]:
    yield Project(pytester)
    if services.vendor() != "sqlite":
        # The threads that a run leaves forgetful may keep it from dropping its database.
        name = f"test_connguard_inner_{os.getpid()}"
        with django_db_blocker.unblock(), connection.copy()._nodb_cursor() as cursor:
            for suffix in ("", "_1", "_2"):
                cursor.execute(f"DROP DATABASE IF EXISTS {name}{suffix}")


LEAKY = """
def leave_open():
    return worker("forgetful")

@pytest.mark.django_db(transaction=True)
def test_thread():
    leave_open()

@pytest.fixture
def helper(transactional_db):
    worker("helper")

def test_fixture_with_a_thread(helper):
    pass

def test_async_context(transactional_db):
    asyncio.run(sync_to_async(query)())

def enter_and_forget():
    block = transaction.atomic()
    block.__enter__()

def test_atomic_block(db):
    enter_and_forget()

def test_atomic_block_without_a_test_case_around(transactional_db):
    enter_and_forget()

def begin():
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT 1")

def test_by_hand(transactional_db):
    begin()

def test_autocommit(transactional_db):
    transaction.set_autocommit(False)

def test_that_fails_and_leaks(transactional_db):
    leave_open()
    assert "its own" == "failure"

@pytest.fixture
def ends_badly():
    yield
    raise ValueError("its own trouble")

def test_whose_teardown_fails_and_leaks(transactional_db, ends_badly):
    leave_open()

class TestOfDjango(TestCase):
    def test_block(self):
        enter_and_forget()

class TestTransactionsOfDjango(TransactionTestCase):
    def test_hand(self):
        begin()

@pytest.mark.connguard_no_leaks(False)
def test_exempt(transactional_db):
    leave_open()

def test_clean_after_all_these(transactional_db):
    query()
"""


def test_a_leak_is_an_error_at_teardown_that_tells_what_was_left_and_where_it_was_opened(
    project: Project,
) -> None:
    outcome = project.run(LEAKY, OPTION)
    session = "" if services.vendor() == "sqlite" else r" \(session \d+\)"
    held = rf"An open connection 'default'{session}, in thread"
    told = outcome.about("test_thread")
    assert re.search(rf"{held} 'forgetful'\.\nClose it", told)
    assert "in run\n" in told.partition("It was opened here:")[2]
    assert "@pytest.mark.connguard_no_leaks(False)" in told
    assert re.search(f"{held} 'helper'", outcome.about("test_fixture_with_a_thread"))
    assert re.search(held, outcome.about("test_async_context"))
    for name in (
        "test_atomic_block",
        "test_atomic_block_without_a_test_case_around",
        "TestOfDjango.test_block",
    ):
        told = outcome.about(name)
        assert told.count("An atomic block on connection 'default', in thread 'MainThread'.") == 1
        opener = told.partition("It was opened here:")[2]
        assert "in enter_and_forget\n" in opener
        assert "_pytest" not in opener
    for name in ("test_by_hand", "TestTransactionsOfDjango.test_hand"):
        told = outcome.about(name)
        assert "A transaction begun by hand on connection 'default', in thread" in told
    assert "Autocommit switched off on connection 'default'" in outcome.about("test_autocommit")


def test_a_leak_puts_no_other_failure_out_of_sight(project: Project) -> None:
    outcome = project.run(LEAKY, OPTION, "-k", "fails_and_leaks or exempt or clean")
    assert "assert 'its own' == 'failure'" in outcome.text
    assert outcome.told("FAILED") == {"test_that_fails_and_leaks"}
    assert "forgetful" in outcome.about("test_that_fails_and_leaks")
    told = outcome.about("test_whose_teardown_fails_and_leaks")
    assert "ValueError: its own trouble" in told
    assert "forgetful" in told
    assert outcome.counts() == {"failed": 1, "passed": 3, "error": 2}


CLEAN = """
import http.client
from django.conf import settings as django_settings

@pytest.fixture(scope="session")
def session_worker(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock():
        yield worker("session")

@pytest.fixture(scope="module")
def module_raw(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock():
        connection_ = raw()
    yield
    connection_.close()

@pytest.fixture(scope="module")
def late_worker(django_db_blocker):
    yield worker("module")

@pytest.fixture(scope="module")
def late_child():
    command = [sys.executable, "child.py", "late"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield child
    child.kill()
    child.wait()

def test_process_that_was_there_before(transactional_db, late_child):
    late_child.stdin.write(b"go on\\n")
    late_child.stdin.flush()
    assert late_child.stdout.readline() == b"1\\n"

def test_database(db):
    query()
    with transaction.atomic(), transaction.atomic():
        query()

def test_transactional_database(transactional_db):
    query()
    with transaction.atomic():
        query()

def test_without_any_database():
    pass

@pytest.fixture
def transaction_around(transactional_db):
    with transaction.atomic():
        yield

def test_in_a_fixtures_transaction(transaction_around):
    query()

@pytest.fixture
def transaction_by_hand_around(transactional_db):
    transaction.set_autocommit(False)
    yield
    transaction.rollback()
    transaction.set_autocommit(True)

def test_in_a_fixtures_transaction_by_hand(transaction_by_hand_around):
    query()

@pytest.fixture
def own_worker(transactional_db):
    stop = threading.Event()
    thread = threading.Thread(target=lambda: (query(), stop.wait(20), time.sleep(0.2)))
    thread.start()
    yield
    stop.set()

def test_with_a_thread_that_its_fixture_ends(own_worker):
    time.sleep(0.1)

def test_ended_thread(transactional_db):
    thread = threading.Thread(target=query)
    thread.start()
    thread.join()

def test_wider_fixtures(transactional_db, session_worker, module_raw):
    query()

def test_wider_fixture_asked_for_late(transactional_db, request):
    request.getfixturevalue("late_worker")

def test_raw_connection_that_is_closed(transactional_db):
    raw().close()

def test_async_contexts(transactional_db):
    async def main():
        await sync_to_async(query)()
        await sync_to_async(connections.close_all)()
    asyncio.run(main())

def test_settings(transactional_db, settings):
    settings.CONNGUARD = {"CLOSE_IDLE": False}
    query()

def test_live_server(live_server):
    for _ in range(3):
        assert urllib.request.urlopen(live_server.url + "/").read() == b"1"

def test_live_server_whose_client_keeps_its_socket(live_server):
    client = http.client.HTTPConnection(live_server.thread.host, live_server.thread.port)
    client.request("GET", "/")
    assert client.getresponse().read() == b"1"
    live_server.kept = client

@override_settings(CONNGUARD={"CLOSE_IDLE": False}, USE_TZ=False)
class TestOfDjango(TestCase):
    @classmethod
    def setUpTestData(cls):
        query()

    def test_query(self):
        query()

    def test_settings_of_the_class_still_hold(self):
        assert not django_settings.USE_TZ
        with transaction.atomic():
            query()

    async def test_async(self):
        assert await sync_to_async(query)() == 1

class TestWithAWorkerOfTheClass(TransactionTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.worker = worker("class")

    def test_query(self):
        query()

    def test_autocommit_that_is_put_back(self):
        self.addCleanup(transaction.set_autocommit, True)
        transaction.set_autocommit(False)

class TestWithoutDatabase(SimpleTestCase):
    def test_nothing(self):
        pass
"""


def test_nothing_that_is_put_away_or_belongs_to_wider_fixtures_is_a_leak(project: Project) -> None:
    project.pytester.path.joinpath("conftest.py").unlink()
    outcome = project.run(CLEAN, OPTION)
    assert outcome.counts() == {"passed": 21}, outcome.text


PAST_DJANGO = """
kept = []

def test_raw_connection(transactional_db):
    kept.append(raw())

def test_private_copy(transactional_db):
    kept.append(connection.copy())
    kept[-1].ensure_connection()

def test_child_process(transactional_db):
    child = subprocess.Popen([sys.executable, "child.py"], stdout=subprocess.PIPE)
    kept.append(child)
    assert child.stdout.readline()

def test_clean(transactional_db):
    query()

class TestWithoutDatabase(SimpleTestCase):
    def test_raw(self):
        kept.append(raw())

def test_that_puts_all_away():
    kept.pop(2).kill()
    while kept:
        kept.pop().close()
"""


def test_a_session_opened_past_django_is_told_by_its_number_at_the_server(
    project: Project,
) -> None:
    if services.vendor() == "sqlite":
        pytest.skip("SQLite has no server")
    if str(settings.DATABASES["default"]["HOST"]).startswith("/"):
        pytest.skip("on a local socket the server does not tell whose a session is")
    outcome = project.run(PAST_DJANGO, OPTION)
    session = r"Session \d+ at the server of 'default', which {} has opened past Django"
    for name in ("test_raw_connection", "test_private_copy", "TestWithoutDatabase.test_raw"):
        assert re.search(session.format("this process"), outcome.about(name)), outcome.text
    told = outcome.about("test_child_process")
    assert re.search(session.format(r"its child process \d+"), told)
    assert outcome.counts() == {"passed": 6, "error": 4}, outcome.text


@pytest.mark.skipif(not services.has_pools(), reason="Django pools psycopg 3 from 5.1 on")
def test_what_a_pool_holds_is_no_leak_but_what_a_thread_has_taken_out_of_it_is(
    project: Project,
) -> None:
    project.pooled()
    outcome = project.run(
        """
        def test_thread(transactional_db):
            worker("forgetful")

        def test_pool(transactional_db):
            together = threading.Barrier(3)  # so that the pool must grow
            threads = [
                threading.Thread(target=lambda: (query(), together.wait())) for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def test_not_the_last_since_the_pool_is_closed_after_that():
            pass
        """,
        OPTION,
    )
    assert "in thread 'forgetful'" in outcome.about("test_thread")
    assert outcome.counts() == {"passed": 3, "error": 1}, outcome.text


# Not last: the end of the session ends the forgetful threads.
ASKED = (
    """
@pytest.mark.connguard_no_leaks
def test_by_marker(transactional_db):
    worker("forgetful")

def test_by_fixture(transactional_db, connguard_no_leaks):
    worker("forgetful")
"""
    + LEAKY
)


def test_nothing_is_looked_for_unless_asked_by_fixture_marker_or_ini_file(
    project: Project,
) -> None:
    chosen = ("--strict-markers", "-k", "test_thread or by_fixture or by_marker or exempt")
    assert project.run(ASKED, *chosen).told("ERROR") == {"test_by_fixture", "test_by_marker"}
    project.pytester.makeini("[pytest]\nconnguard_no_leaks = true")
    asked = {"test_thread", "test_by_fixture", "test_by_marker"}
    assert project.run(ASKED, *chosen).told("ERROR") == asked


ALONE = ("-m", "pytest", "-p", "no:django", "-p", "no:cacheprovider", "test_alone.py")


def test_the_plugin_loads_nothing_of_django_nor_of_connguard_until_it_is_asked(
    project: Project,
) -> None:
    project.without_django(
        """
        import sys
        def test_modules(request):
            assert "pytest_connguard" in sys.modules
            loaded = {name.partition(".")[0] for name in sys.modules}
            assert not loaded & {"django", "asgiref", "django_connguard"}
        """
    )
    assert project.python(*ALONE).counts() == {"passed": 1}


def test_to_ask_in_a_project_without_the_app_says_what_is_missing(project: Project) -> None:
    project.without_django("def test_it(): pass")
    outcome = project.python(*ALONE, OPTION)
    assert outcome.counts() == {"error": 1}
    assert "'django_connguard' in INSTALLED_APPS" in outcome.text


MIXED = """
from inner import *
from django_connguard.testing import NoLeaksMixin

class Clean(NoLeaksMixin, TestCase):
    @classmethod
    def setUpTestData(cls):
        query()

    def test_query(self):
        query()

    async def test_async(self):
        assert await sync_to_async(query)() == 1

class CleanTransactions(NoLeaksMixin, TransactionTestCase):
    def test_query(self):
        thread = threading.Thread(target=query)
        thread.start()
        thread.join()

    @unittest.skip("never runs")
    def test_skipped(self):
        worker("skipped")

class CleanWithoutDatabase(NoLeaksMixin, SimpleTestCase):
    def test_nothing(self):
        pass

class Leaky(NoLeaksMixin, TransactionTestCase):
    def test_thread(self):
        worker("forgetful")

    def test_own_failure(self):
        worker("forgetful")
        self.fail("its own failure")

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        the_end.set()

class LeakyByHand(NoLeaksMixin, TransactionTestCase):
    def test_by_hand(self):
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT 1")

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        forget_blocks()

class LeakyBlock(NoLeaksMixin, TestCase):
    def test_block(self):
        transaction.atomic().__enter__()

    @classmethod
    def tearDownClass(cls):
        forget_blocks()

def forget_blocks():
    connection.atomic_blocks.clear()
    connection.savepoint_ids.clear()
    connection.in_atomic_block = connection.needs_rollback = False
    connection.close()
"""


@pytest.mark.parametrize("options", [(), ("--parallel", "2")], ids=["serial", "parallel"])
def test_the_mixin_fails_leaky_tests_of_djangos_own_runner(
    project: Project, options: tuple[str, ...]
) -> None:
    if options:
        pytest.importorskip("tblib", reason="the parallel runner needs it to show a failure")
    project.pytester.makepyfile(test_mixed=MIXED)
    outcome = project.python("-m", "django", "test", "--noinput", *options)
    failed = re.findall(r"^FAIL: (\w+)", outcome.text, re.M)
    assert set(failed) == {"test_thread", "test_by_hand", "test_own_failure", "test_block"}
    assert failed.count("test_own_failure") == 2
    assert "AssertionError: its own failure" in outcome.text
    assert "in thread 'forgetful'" in outcome.text
    assert "An atomic block on connection 'default'" in outcome.text
    assert "A transaction begun by hand" in outcome.text
    assert outcome.status == 1
