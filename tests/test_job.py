"""``job`` on everything that can be decorated, sync and async."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_started
from django.core.wsgi import get_wsgi_application
from django.db import connection, connections, transaction
from django.test import RequestFactory

from django_connguard import job, job_finished
from tests import urls
from tests.server import Server, backend_id, query

Configure = Callable[..., None]
aquery = sync_to_async(query)
abackend = sync_to_async(backend_id)


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Names of the jobs that end during the test."""
    seen: list[str] = []

    def note(name: str, **kwargs: Any) -> None:
        seen.append(name)

    job_finished.connect(note)
    yield seen
    job_finished.disconnect(note)


class Shop:
    @job
    def method(self, number: int) -> tuple[Shop, int]:
        """Docstring."""
        return self, number

    @job
    @classmethod
    def above_classmethod(cls) -> type:
        return cls

    @classmethod
    @job
    def below_classmethod(cls) -> type:
        return cls

    @job
    @staticmethod
    def static(number: int) -> int:
        return number


def test_methods_keep_their_binding_signature_and_docstring(database: Configure) -> None:
    shop = Shop()
    assert shop.method(3) == (shop, 3)
    assert Shop.above_classmethod() is Shop.below_classmethod() is Shop
    assert shop.static(4) == Shop.static(4) == 4
    assert Shop.method.__doc__ == "Docstring."
    assert list(inspect.signature(Shop.method).parameters) == ["self", "number"]


def test_decorated_functions_stay_what_they_are_to_inspect() -> None:
    async def coroutine() -> None: ...
    async def async_generator() -> AsyncIterator[int]:
        yield 1

    def generator() -> Iterator[int]:
        yield 1

    def function() -> None: ...

    assert inspect.iscoroutinefunction(job(coroutine))
    assert inspect.isasyncgenfunction(job(async_generator))
    assert inspect.isgeneratorfunction(job(generator))
    plain = job(function)
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    assert not any(kind(plain) for kind in kinds)
    assert plain.__wrapped__ is function  # type: ignore[attr-defined]


def test_a_jobs_name_is_the_functions_dotted_name_unless_given(
    database: Configure, names: list[str]
) -> None:
    job(query)()
    job(name="given")(query)()
    job("positional")(query)()
    job(functools.partial(query))()
    with job("block"):
        pass
    with job():
        pass
    assert names[:5] == ["tests.server.query", "given", "positional", "tests.server.query", "block"]
    assert names[5].startswith("tests.test_job:")


@pytest.mark.parametrize("wrong", [Shop, 3, object()])
def test_what_is_no_function_cannot_be_a_job(wrong: Any) -> None:
    with pytest.raises(TypeError, match="decorates functions and methods"):
        job(wrong)


def test_a_block_is_a_unit_of_work(server: Server, database: Configure) -> None:
    with job("block"):
        query()
        assert server.count() == 1
    assert server.settles_at(0)


def test_one_job_object_does_not_serve_two_blocks_at_once(database: Configure) -> None:
    block = job("block")
    with block, pytest.raises(RuntimeError, match="already entered"), block:
        pass
    with block:
        pass


def test_a_job_object_serves_again_after_an_interrupt_at_its_start(database: Configure) -> None:
    def interrupt(**kwargs: Any) -> None:
        raise KeyboardInterrupt

    block = job("block")
    request_started.connect(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), block:
            pass
    finally:
        request_started.disconnect(interrupt)
    with block:
        query()


def test_a_generators_unit_of_work_ends_when_it_is_exhausted(
    server: Server, database: Configure
) -> None:
    @job
    def numbers() -> Iterator[int]:
        yield backend_id()
        yield backend_id()

    stream = numbers()
    assert next(stream) == next(stream)
    assert server.count() == 1
    assert list(stream) == []
    assert server.settles_at(0)


def test_a_generators_unit_of_work_ends_when_it_is_closed(
    server: Server, database: Configure
) -> None:
    @job
    def numbers() -> Iterator[int]:
        while True:
            yield backend_id()

    for _ in numbers():
        break
    assert server.settles_at(0)


def test_a_generator_job_passes_on_what_is_sent_thrown_and_returned(database: Configure) -> None:
    @job
    def echo() -> Any:
        try:
            received = yield "ready"
            yield received
        except KeyError:
            yield "caught"
        return "returned"

    stream = echo()
    assert next(stream) == "ready"
    assert stream.send("hello") == "hello"
    assert stream.throw(KeyError()) == "caught"
    with pytest.raises(StopIteration) as stop:
        next(stream)
    assert stop.value.value == "returned"


def test_an_async_jobs_connection_is_closed_when_it_ends_whatever_its_age(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    async def work() -> int:
        assert await abackend() == await abackend()
        return await aquery()

    async def main() -> None:
        for _ in range(3):
            assert await work() == 1
        assert await sync_to_async(server.settles_at, thread_sensitive=False)(0)

    asyncio.run(main())


def test_concurrent_async_jobs_have_a_connection_each(server: Server, database: Configure) -> None:
    database(CONN_MAX_AGE=None)

    @job
    async def work(barrier: Barrier) -> int:
        backend = await abackend()
        await barrier.wait()
        assert await abackend() == backend
        return backend

    async def main() -> set[int]:
        barrier = Barrier(5)
        return set(await asyncio.gather(*(work(barrier) for _ in range(5))))

    assert len(asyncio.run(main())) == 5
    assert server.settles_at(0)


class Barrier:
    """asyncio.Barrier came with Python 3.11."""

    def __init__(self, parties: int) -> None:
        self._missing = parties
        self._all_here = asyncio.Event()

    async def wait(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._all_here.set()
        await self._all_here.wait()


def test_shared_async_jobs_share_a_connection_and_the_last_one_out_closes_it(
    server: Server, database: Configure, names: list[str]
) -> None:
    database(CONN_MAX_AGE=0)

    @job(name="shared", shared=True)
    async def work(barrier: Barrier, last: bool) -> int:
        backend = await abackend()
        await barrier.wait()
        if last:
            await asyncio.sleep(0.1)
            assert await abackend() == backend
        return backend

    async def main() -> set[int]:
        barrier = Barrier(5)
        return set(await asyncio.gather(*(work(barrier, number == 4) for number in range(5))))

    assert len(asyncio.run(main())) == 1
    assert server.settles_at(0)
    assert names == ["shared"] * 5


def test_shared_async_jobs_keep_a_young_connection_for_the_next(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)

    @job(shared=True)
    async def work() -> int:
        return await abackend()

    async def main() -> None:
        assert await work() == await work()
        await sync_to_async(connections.close_all)()

    asyncio.run(main())


def test_shared_async_jobs_that_overlap_for_ever_lose_a_dead_connection_all_the_same(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)

    @job(shared=True)
    async def work() -> int:
        return await aquery()

    @job(shared=True)
    async def overlap(end: asyncio.Event) -> None:
        await aquery()
        await end.wait()

    async def main() -> None:
        end = asyncio.Event()
        other = asyncio.ensure_future(overlap(end))
        assert await work() == 1
        await sync_to_async(server.end_all, thread_sensitive=False)()
        assert await work() == 1
        end.set()
        await other
        await sync_to_async(connections.close_all)()

    asyncio.run(main())


def test_an_async_job_that_outlives_the_job_that_started_it_leaves_no_connection(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    async def child(parent_is_gone: asyncio.Event) -> None:
        await aquery()
        await parent_is_gone.wait()
        await aquery()

    @job
    async def parent(parent_is_gone: asyncio.Event) -> asyncio.Task[None]:
        await aquery()
        task = asyncio.ensure_future(child(parent_is_gone))
        await asyncio.sleep(0.05)
        return task

    async def main() -> None:
        parent_is_gone = asyncio.Event()
        task = await parent(parent_is_gone)
        parent_is_gone.set()
        await task
        assert await sync_to_async(server.settles_at, thread_sensitive=False)(0)

    asyncio.run(main())


def test_an_async_block_is_a_unit_of_work(server: Server, database: Configure) -> None:
    async def main() -> None:
        async with job("block"):
            await aquery()
        assert await sync_to_async(server.settles_at, thread_sensitive=False)(0)

    asyncio.run(main())


def test_a_nested_async_job_keeps_the_outer_jobs_connection(
    server: Server, database: Configure, names: list[str]
) -> None:
    @job(name="inner")
    async def inner() -> int:
        return await abackend()

    @job(name="outer")
    async def outer() -> None:
        backend = await abackend()
        assert await inner() == backend
        assert await sync_to_async(job(backend_id))() == backend
        assert await abackend() == backend

    asyncio.run(outer())
    assert names == ["outer"]
    assert server.settles_at(0)


def test_an_async_job_under_async_to_sync_works_on_the_callers_connection(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)

    @job
    async def work() -> int:
        return await abackend()

    assert async_to_sync(work)() == backend_id()
    with transaction.atomic():
        assert async_to_sync(work)() == backend_id()
        assert connection.in_atomic_block


@pytest.mark.django_db
def test_an_async_job_in_a_test_case_sees_the_tests_transaction() -> None:
    @job
    async def in_atomic_block() -> bool:
        return await sync_to_async(lambda: connection.in_atomic_block)()

    assert async_to_sync(in_atomic_block)()
    assert connection.in_atomic_block


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_what_an_async_job_raises_comes_out(
    server: Server, database: Configure, error: type[BaseException]
) -> None:
    raised = error("as it is")

    @job
    async def fail() -> None:
        await aquery()
        raise raised

    async def main() -> None:
        with pytest.raises(error) as caught:
            await fail()
        assert caught.value is raised

    asyncio.run(main())
    assert server.settles_at(0)


def test_a_cancelled_async_job_leaves_no_connection_however_often_it_is_cancelled(
    server: Server, database: Configure
) -> None:
    database(CONN_MAX_AGE=None)
    started = threading.Event()

    def slow() -> None:
        query()
        started.set()
        threading.Event().wait(0.2)

    @job
    async def work() -> None:
        await sync_to_async(slow)()

    async def main() -> None:
        task = asyncio.ensure_future(work())
        await sync_to_async(started.wait, thread_sensitive=False)()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert server.settles_at(0)


def test_an_async_generators_unit_of_work_ends_with_it(server: Server, database: Configure) -> None:
    @job
    async def numbers() -> AsyncIterator[int]:
        yield await abackend()
        yield await abackend()

    async def main() -> None:
        backends = [backend async for backend in numbers()]
        assert backends[0] == backends[1]
        stream = numbers()
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        assert await sync_to_async(server.settles_at, thread_sensitive=False)(0)

    asyncio.run(main())


def test_an_async_generator_job_passes_on_what_is_sent_and_thrown(database: Configure) -> None:
    @job
    async def echo() -> Any:
        try:
            received = yield "ready"
            yield received
        except KeyError:
            yield "caught"

    async def main() -> None:
        stream = echo()
        assert await stream.asend(None) == "ready"
        assert await stream.asend("hello") == "hello"
        assert await stream.athrow(KeyError()) == "caught"
        with pytest.raises(StopAsyncIteration):
            await stream.asend(None)

    asyncio.run(main())


def test_an_async_generator_closed_by_another_task_ends_all_the_same(
    server: Server, database: Configure
) -> None:
    @job
    async def numbers() -> AsyncIterator[int]:
        while True:
            yield await abackend()

    async def main() -> None:
        stream = numbers()
        await asyncio.ensure_future(stream.__anext__())  # type: ignore[arg-type]
        await asyncio.ensure_future(stream.aclose())  # type: ignore[attr-defined]

    asyncio.run(main())
    assert server.settles_at(0)


def test_a_job_in_a_live_wsgi_request_leaves_the_requests_connection_alone(
    server: Server, database: Configure
) -> None:
    response = get_wsgi_application()(
        RequestFactory().get("/backends/").environ, lambda *args: lambda data: None
    )
    body = b"".join(response)
    response.close()  # type: ignore[attr-defined]
    before, inside, after = body.split()
    assert before == inside == after
    assert server.settles_at(0)


def test_a_job_in_a_live_asgi_request_leaves_the_requests_connection_alone(
    server: Server, database: Configure
) -> None:
    sent: list[dict[str, Any]] = []

    async def main() -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/async-backends/",
            "headers": [],
            "query_string": b"",
        }
        requests = [{"type": "http.request", "body": b""}]

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await ASGIHandler()(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(main())
    before, inside, after = b"".join(message.get("body", b"") for message in sent).split()
    assert before == inside == after
    assert server.settles_at(0)
    assert urls.urlpatterns
