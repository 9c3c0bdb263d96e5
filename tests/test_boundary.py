"""What the boundary promises, counted at the server."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import ref

import pytest
from django.core.signals import request_finished, request_started
from django.db import connection, connections, transaction
from django.test import override_settings

from django_connguard import job, job_finished, job_started
from tests import services
from tests.server import Server, alias, backend_id, eventually, query

Configure = Callable[..., None]
MODES = pytest.mark.parametrize("signals", [True, False], ids=["default", "lean"])
POSTGRESQL = services.vendor() == "postgresql"
SLEEP = "SELECT pg_sleep(3)" if POSTGRESQL else "SELECT SLEEP(3)"


class TimeLimit(Exception):
    """Raised from a signal handler, as Celery's soft time limit is."""


@contextmanager
def alarm(seconds: float, error: type[BaseException] = TimeLimit) -> Iterator[None]:
    def ring(*args: object) -> None:
        raise error

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def sleep_in_database() -> None:
    with connection.cursor() as cursor:
        cursor.execute(SLEEP)


@MODES
def test_fifty_jobs_at_age_0_leave_no_connection_open(server: Server, signals: bool) -> None:
    guarded = job(signals=signals)(query)
    for _ in range(50):
        assert guarded() == 1
    assert server.settles_at(0)


def test_the_bare_job_leaks_so_that_the_test_above_can_fail(server: Server) -> None:
    for _ in range(50):
        query()
    assert server.count() == 1


@MODES
@pytest.mark.parametrize("age", [60, None])
def test_a_young_connection_serves_every_job(
    database: Configure, opened: list[int], signals: bool, age: int | None
) -> None:
    database(CONN_MAX_AGE=age)
    guarded = job(signals=signals)(query)
    for _ in range(10):
        guarded()
    assert len(opened) == 1


@MODES
def test_a_connection_is_closed_at_the_first_boundary_past_its_age(
    database: Configure, opened: list[int], signals: bool
) -> None:
    database(CONN_MAX_AGE=0.5)
    guarded = job(signals=signals)(query)
    guarded()
    guarded()
    assert len(opened) == 1
    time.sleep(0.5)
    guarded()
    assert len(opened) == 2


@MODES
@pytest.mark.parametrize("health_checks", [False, True])
def test_no_job_gets_a_connection_that_the_server_has_closed(
    server: Server, database: Configure, signals: bool, health_checks: bool
) -> None:
    database(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=health_checks)
    guarded = job(signals=signals)(query)
    guarded()
    for _ in range(5):
        server.end_all()
        assert guarded() == 1


@MODES
def test_no_atomic_job_gets_a_connection_that_the_server_has_closed(
    server: Server, database: Configure, signals: bool
) -> None:
    database(CONN_MAX_AGE=None)
    guarded = job(signals=signals)(transaction.atomic(query))
    guarded()
    server.end_all()
    assert guarded() == 1


@pytest.mark.skipif(not POSTGRESQL, reason="only PostgreSQL sends notices unasked")
@MODES
def test_a_notice_from_the_server_does_not_cost_the_connection(
    server: Server, database: Configure, opened: list[int], signals: bool
) -> None:
    database(CONN_MAX_AGE=None)

    @job(signals=signals)
    def listen() -> None:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN here")

    listen()
    server.rows("NOTIFY here")
    time.sleep(0.05)
    job(signals=signals)(query)()
    assert len(opened) == 1


@MODES
@pytest.mark.parametrize(
    "sleep",
    # atomic() closes the connection by itself when the rollback fails.
    [sleep_in_database, transaction.atomic(sleep_in_database)],
    ids=["autocommit", "atomic"],
)
def test_an_interrupted_query_breaks_no_later_job_and_does_not_go_on_at_the_server(
    server: Server,
    database: Configure,
    opened: list[int],
    signals: bool,
    sleep: Callable[[], None],
) -> None:
    database(CONN_MAX_AGE=None)
    guarded_sleep, guarded = job(signals=signals)(sleep), job(signals=signals)(query)
    guarded()
    with alarm(0.2), pytest.raises(TimeLimit):
        guarded_sleep()
    assert eventually(lambda: server.running("sleep(3)") == 0, seconds=0.5)
    for _ in range(3):
        assert guarded() == 1
    assert len(opened) <= 2
    assert server.settles_at(1)


@pytest.mark.skipif(
    services.driver() not in ("psycopg", "pymysql"),
    reason="a driver in C sees the signal after its query",
)
def test_a_query_interrupted_goes_on_at_the_server_if_nothing_may_be_cancelled(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)
    with override_settings(CONNGUARD={"CANCEL_TIMEOUT": 0}), alarm(0.2), pytest.raises(TimeLimit):
        job(sleep_in_database)()
    assert server.running("sleep(3)") == 1
    server.end_all()


def test_an_interrupt_that_the_job_swallows_is_found_too(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    def swallow() -> str:
        try:
            with alarm(0.2):
                sleep_in_database()
        except TimeLimit:
            pass
        return "went on"

    assert swallow() == "went on"
    assert eventually(lambda: server.running("sleep(3)") == 0, seconds=0.5)
    for _ in range(3):
        assert job(query)() == 1


def leave_autocommit_off() -> None:
    connection.set_autocommit(False)
    query()


def leave_transaction() -> None:
    with connection.cursor() as cursor:
        cursor.execute("START TRANSACTION" if services.vendor() == "mysql" else "BEGIN")
        cursor.execute("SELECT 1")


def leave_atomic_block() -> None:
    transaction.atomic().__enter__()
    query()


@MODES
@pytest.mark.parametrize("leave", [leave_autocommit_off, leave_transaction, leave_atomic_block])
def test_a_transaction_left_open_is_rolled_back_closed_and_named(
    database: Configure,
    opened: list[int],
    caplog: pytest.LogCaptureFixture,
    signals: bool,
    leave: Callable[[], None],
) -> None:
    database(CONN_MAX_AGE=None)
    job(name="shop.leaver", signals=signals)(leave)()
    assert connection.connection is None
    assert "Job shop.leaver left" in caplog.text
    assert "'default'" in caplog.text
    job(signals=signals)(transaction.atomic(query))()
    assert len(opened) == 2


@pytest.mark.parametrize("leave", [leave_autocommit_off, leave_transaction, leave_atomic_block])
def test_a_job_that_leaves_a_transaction_leaves_no_session_idle_in_it(
    server: Server, database: Configure, leave: Callable[[], None]
) -> None:
    database(CONN_MAX_AGE=None)
    job(leave)()
    assert server.settles_at(0)
    job(query)()
    assert server.idle_in_transaction() == 0


def test_a_transaction_begun_and_ended_by_hand_costs_nothing(
    database: Configure, opened: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    def by_hand() -> None:
        with connection.cursor() as cursor:
            for word in ("BEGIN", "COMMIT", "BEGIN", "ROLLBACK"):
                cursor.execute(word)

    by_hand()
    by_hand()
    assert len(opened) == 1
    assert "left" not in caplog.text


@pytest.mark.skipif(services.vendor() != "mysql", reason="MySQL's drivers can stream a result")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyMySQL's own
def test_a_result_never_read_breaks_no_later_job(database: Configure) -> None:
    database(CONN_MAX_AGE=None)
    if services.driver() == "mysqlclient":
        from MySQLdb.cursors import SSCursor as Streaming
    else:
        from pymysql.cursors import SSCursor as Streaming
    kept: list[Any] = []

    @job
    def stream() -> None:
        connection.ensure_connection()
        cursor = connection.connection.cursor(Streaming)
        cursor.execute("SELECT seq FROM seq_1_to_100000")
        cursor.fetchone()
        kept.append(cursor)

    stream()
    kept.clear()
    for _ in range(3):
        assert job(query)() == 1


@MODES
def test_a_nested_job_keeps_the_outer_jobs_connection(database: Configure, signals: bool) -> None:
    inner = job(signals=signals)(query)

    @job(signals=signals)
    def outer() -> None:
        query()
        raw = connection.connection
        inner()
        assert connection.connection is raw

    outer()
    assert connection.connection is None


@MODES
@pytest.mark.django_db(transaction=True)
def test_a_job_inside_atomic_leaves_the_transaction_alone(
    database: Configure, signals: bool
) -> None:
    with transaction.atomic():
        query()
        raw = connection.connection
        job(signals=signals)(query)()
        with pytest.raises(ZeroDivisionError):
            job(signals=signals)(lambda: 1 / 0)()
        assert connection.connection is raw
        assert connection.in_atomic_block
        assert query() == 1


@pytest.mark.django_db
def test_a_job_in_a_test_case_leaves_the_tests_transaction_alone() -> None:
    raw = connection.connection
    assert job(query)() == 1
    assert connection.connection is raw
    assert connection.in_atomic_block


@MODES
def test_a_generator_job_that_ends_in_its_consumers_atomic_block_leaves_it_alone(
    database: Configure, signals: bool
) -> None:
    @job(signals=signals)
    def numbers() -> Iterator[int]:
        yield query()

    stream = numbers()
    assert next(stream) == 1
    with transaction.atomic():
        raw = connection.connection
        assert list(stream) == []
        assert connection.connection is raw
        assert query() == 1


def test_of_two_generator_jobs_that_overlap_the_last_one_out_closes(
    server: Server, database: Configure
) -> None:
    @job
    def numbers() -> Iterator[int]:
        yield backend_id()
        yield backend_id()

    first, second = numbers(), numbers()
    raw = next(first)
    assert next(second) == raw
    first.close()
    assert next(second) == raw
    second.close()
    assert server.settles_at(0)


def test_a_job_inside_a_live_request_leaves_the_connection_to_the_request(
    database: Configure,
) -> None:
    request_started.send(sender=object, environ={})
    try:
        query()
        raw = connection.connection
        job(query)()
        assert connection.connection is raw
    finally:
        request_finished.send(sender=object)
    assert connection.connection is None


@MODES
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_a_job_raises_comes_out(
    database: Configure, signals: bool, error: type[BaseException]
) -> None:
    raised = error("as it is")

    @job(signals=signals)
    def fail() -> None:
        query()
        raise raised

    with pytest.raises(error) as caught:
        fail()
    assert caught.value is raised
    assert connection.connection is None


@MODES
def test_a_failed_job_does_not_cost_a_good_connection(
    database: Configure, opened: list[int], signals: bool
) -> None:
    database(CONN_MAX_AGE=None)

    @job(signals=signals)
    def fail() -> None:
        query()
        raise ValueError("on purpose")

    for _ in range(3):
        with pytest.raises(ValueError, match="on purpose"):
            fail()
    assert len(opened) == 1


@MODES
def test_the_query_log_is_empty_at_each_jobs_start(database: Configure, signals: bool) -> None:
    lengths = []

    @job(signals=signals)
    def log() -> None:
        lengths.append(len(connection.queries_log))
        query()
        query()

    with override_settings(DEBUG=True):
        for _ in range(3):
            log()
    assert lengths == [0, 0, 0]


@MODES
def test_request_signals_are_sent_in_the_default_mode_only(
    database: Configure, signals: bool
) -> None:
    seen: list[Any] = []

    def note(signal: Any, sender: Any, **kwargs: Any) -> None:
        seen.append(signal)

    request_started.connect(note)
    request_finished.connect(note)
    try:
        job(signals=signals)(query)()
    finally:
        request_started.disconnect(note)
        request_finished.disconnect(note)
    assert seen == ([request_started, request_finished] if signals else [])


def test_a_receiver_that_raises_is_logged_once_by_name_and_never_reaches_the_job(
    database: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_receiver(**kwargs: Any) -> None:
        raise RuntimeError("from the receiver")

    request_started.connect(broken_receiver)
    job_finished.connect(broken_receiver)
    try:
        for _ in range(3):
            assert job(query)() == 1
    finally:
        request_started.disconnect(broken_receiver)
        job_finished.disconnect(broken_receiver)
    assert caplog.text.count("broken_receiver raised; it will not be logged again") == 1


class Listening:
    """A receiver that nothing can refer to weakly, or whose method is one."""

    __slots__ = ("heard",)

    def __init__(self, heard: list[str]) -> None:
        self.heard = heard

    def __call__(self, **kwargs: Any) -> None:
        self.heard.append("object")


class ListeningWeakly:
    def __init__(self, heard: list[str]) -> None:
        self.heard = heard

    def receive(self, **kwargs: Any) -> None:
        self.heard.append("method")


def test_receivers_that_come_and_go_between_jobs_are_heeded(database: Configure) -> None:
    heard: list[str] = []
    strong, weak = Listening(heard), ListeningWeakly(heard)
    work = job(lambda: None)
    work()
    request_started.connect(strong, weak=False)
    request_started.connect(weak.receive)
    try:
        work()
        assert heard == ["object", "method"]
        request_started.disconnect(strong)
        work()
        assert heard == ["object", "method", "method"]
        alive = ref(weak)
        del weak
        assert alive() is None
        work()
        assert heard == ["object", "method", "method"]
    finally:
        request_started.disconnect(strong)


def test_a_connection_that_a_late_receiver_opens_is_closed_too(
    server: Server, database: Configure
) -> None:
    def use_the_database(**kwargs: Any) -> None:
        query()

    request_finished.connect(use_the_database)
    job_finished.connect(use_the_database)
    try:
        job(query)()
    finally:
        request_finished.disconnect(use_the_database)
        job_finished.disconnect(use_the_database)
    assert server.settles_at(0)


@MODES
def test_job_signals_tell_name_duration_exception_and_what_was_closed(
    database: Configure, signals: bool
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    def started(**kwargs: Any) -> None:
        events.append(("started", kwargs))

    def finished(**kwargs: Any) -> None:
        events.append(("finished", kwargs))

    job_started.connect(started)
    job_finished.connect(finished)
    failure = ValueError("on purpose")

    @job(name="outer", signals=signals)
    def outer() -> None:
        job(query)()
        raise failure

    try:
        with pytest.raises(ValueError, match="on purpose"):
            outer()
    finally:
        job_started.disconnect(started)
        job_finished.disconnect(finished)
    assert [(kind, event["name"]) for kind, event in events] == [
        ("started", "outer"),
        ("finished", "outer"),
    ]
    end = events[1][1]
    assert end["exception"] is failure
    assert end["closed"] == {"age": 1}
    assert 0 <= end["duration"] < 60


@pytest.fixture
def closed() -> Iterator[list[dict[str, int]]]:
    """What each job that ends during the test closed, by reason."""
    seen: list[dict[str, int]] = []

    def note(closed: dict[str, int], **kwargs: Any) -> None:
        seen.append(closed)

    job_finished.connect(note)
    yield seen
    job_finished.disconnect(note)


@MODES
def test_what_is_closed_at_a_jobs_start_counts_as_closed_by_it(
    server: Server, database: Configure, closed: list[dict[str, int]], signals: bool
) -> None:
    database(CONN_MAX_AGE=0.5)
    guarded = job(signals=signals)(query)
    with override_settings(CONNGUARD={"CLOSE_IDLE": False}):
        guarded()
        server.end_all()
        guarded()
        time.sleep(0.5)
        guarded()
    assert closed == [{}, {"stale": 1}, {"age": 1}]


@pytest.mark.skipif(services.vendor() != "mysql", reason="PyMySQL reconnects by itself")
def test_a_replaced_connection_has_the_session_settings_of_django(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    def isolation() -> str:
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@tx_isolation")
            return str(cursor.fetchone()[0])

    assert isolation() == "READ-COMMITTED"
    server.end_all()
    assert isolation() == "READ-COMMITTED"


def test_a_connect_that_was_cut_off_reaches_no_later_job(
    database: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    database(CONN_MAX_AGE=None)
    wrapper = connections["default"]

    def interrupted() -> None:
        raise TimeLimit  # so that the session lacks Django's settings

    @job
    def swallow() -> None:
        with suppress(TimeLimit):
            connection.ensure_connection()

    with monkeypatch.context() as patch:
        patch.setattr(wrapper, "init_connection_state", interrupted)
        swallow()
    assert wrapper.connection is None
    assert job(transaction.atomic(query))() == 1


def test_a_transaction_that_was_cut_off_at_its_begin_takes_no_later_jobs_work(
    database: Configure, opened: list[int]
) -> None:
    database(CONN_MAX_AGE=None)
    wrapper = connections["default"]
    job(query)()

    def obey_and_interrupt(autocommit: bool) -> None:
        type(wrapper)._set_autocommit(wrapper, autocommit)
        raise TimeLimit

    @job
    def swallow() -> None:
        wrapper._set_autocommit = obey_and_interrupt
        with suppress(TimeLimit):
            wrapper.set_autocommit(False)
        del wrapper._set_autocommit

    swallow()
    assert wrapper.connection is None
    job(query)()
    assert len(opened) == 2


def test_a_begin_in_sql_that_was_cut_off_takes_no_later_jobs_work(database: Configure) -> None:
    database(CONN_MAX_AGE=None)

    def interrupt(execute: Any, *args: Any) -> None:
        execute(*args)
        raise TimeLimit

    @job
    def swallow() -> None:
        with suppress(TimeLimit), connection.execute_wrapper(interrupt):
            connection.cursor().execute("BEGIN")

    job(query)()
    swallow()
    assert connection.connection is None


def test_a_connection_closed_in_a_block_with_autocommit_off_does_not_bar_later_jobs(
    database: Configure,
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    def leave() -> None:
        connection.set_autocommit(False)
        with suppress(Exception), transaction.atomic():
            query()
            connection.close()

    leave()
    assert job(query)() == 1


@pytest.mark.skipif(services.driver() != "pymysql", reason="a driver in C is not cut off there")
@pytest.mark.parametrize(
    "function", ["_execute_command", "_read_query_result", "_read_rowdata_packet", "_read_packet"]
)
def test_no_job_gets_the_answer_to_anothers_interrupted_query(
    database: Configure, function: str
) -> None:
    """A signal may strike at any line of PyMySQL's."""
    database(CONN_MAX_AGE=None)

    def interrupt_at(line: int) -> Callable[..., Any]:
        seen = 0

        def local(frame: Any, event: str, arg: Any) -> Any:
            nonlocal seen
            seen += event == "line"
            if seen == line:
                sys.settrace(None)
                raise TimeLimit
            return local

        def trace(frame: Any, event: str, arg: Any) -> Any:
            return local if frame.f_code.co_name == function else None

        return trace

    @job
    def swallow(line: int) -> bool:
        with connection.cursor() as cursor:
            try:
                sys.settrace(interrupt_at(line))
                cursor.execute("SELECT 42 UNION SELECT 43")
            except TimeLimit:
                return True
            finally:
                sys.settrace(None)
        return False

    job(query)()
    line = 1
    while swallow(line):
        assert job(query)() == 1
        line += 1
    assert line > 3


def test_a_threads_first_connect_that_was_cut_off_reaches_no_later_job(
    database: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    database(CONN_MAX_AGE=None)
    autocommit = []

    def interrupted(self: Any, *args: Any) -> None:
        raise TimeLimit

    @job
    def swallow() -> None:
        with suppress(TimeLimit):
            connection.ensure_connection()

    def work() -> None:
        wrapper = connections["default"]
        with monkeypatch.context() as patch:
            patch.setattr(wrapper, "set_autocommit", interrupted)  # left off in mid-connect
            swallow()
        job(query)()
        autocommit.append(wrapper.autocommit)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert autocommit == [True]


@MODES
def test_a_time_limit_that_strikes_in_the_boundary_at_the_start_keeps_the_job_from_running(
    database: Configure, monkeypatch: pytest.MonkeyPatch, signals: bool
) -> None:
    database(CONN_MAX_AGE=None)
    query()
    ran = []

    def slow(self: Any) -> bool:
        time.sleep(5)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(type(connections["default"]), "is_usable", slow)
        connections["default"].errors_occurred = True
        with alarm(0.1), pytest.raises(TimeLimit):
            job(signals=signals)(lambda: ran.append(1))()
    assert not ran
    assert job(query)() == 1


def test_a_request_within_a_job_that_never_finishes_does_not_disarm_later_jobs(
    server: Server, database: Configure
) -> None:
    @job
    def render() -> None:
        request_started.send(sender=object, environ={})  # as of a stream that nobody reads

    render()
    job(query)()
    assert server.settles_at(0)


@pytest.mark.skipif(services.vendor() != "sqlite", reason="only SQLite has databases in memory")
def test_a_transaction_left_open_in_memory_is_rolled_back_though_nothing_is_closed(
    database: Configure, closed: list[dict[str, int]]
) -> None:
    with alias("memory", NAME=":memory:") as name:
        memory = connections[name]

        @job
        def leave() -> None:
            memory.cursor().execute("CREATE TABLE IF NOT EXISTS thing (x)")
            transaction.atomic(using=name).__enter__()
            memory.cursor().execute("INSERT INTO thing VALUES (1)")

        @job
        def things() -> int:
            with transaction.atomic(using=name), memory.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM thing")
                return int(cursor.fetchone()[0])

        for _ in range(2):
            leave()
            assert things() == 0
        assert memory.get_autocommit()
        assert closed == [{}] * 4


def test_a_job_cut_off_inside_the_boundary_does_not_make_the_next_a_nested_one(
    server: Server, database: Configure
) -> None:
    def interrupt(**kwargs: Any) -> None:
        raise KeyboardInterrupt

    request_started.connect(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            job(query)()
    finally:
        request_started.disconnect(interrupt)
    job(query)()
    assert server.settles_at(0)


def test_a_generator_collected_by_another_thread_leaves_this_threads_connection_alone(
    database: Configure, opened: list[int]
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    def numbers() -> Iterator[int]:
        yield query()

    stream = numbers()
    next(stream)
    raw = connection.connection
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    assert connection.connection is raw
    job(query)()
    assert len(opened) == 1


def test_each_thread_has_its_own_unit_of_work(server: Server, database: Configure) -> None:
    def work() -> None:
        for _ in range(10):
            job(query)()

    @job
    def outer() -> None:
        query()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.settles_at(1)  # the outer job's own

    outer()
    assert server.settles_at(0)


def test_errors_of_the_guard_itself_are_logged_and_never_raised(
    database: Configure, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    database(CONN_MAX_AGE=None)
    query()

    def broken(self: Any) -> None:
        raise RuntimeError("no probe")

    monkeypatch.setattr(type(connections["default"]), "is_usable", broken)

    @job
    def fail() -> None:
        raise ValueError("the job's own")

    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="the job's own"):
        fail()
    assert "no probe" in caplog.text
    assert connection.connection is None  # what cannot be examined is closed
    assert job(query)() == 1
