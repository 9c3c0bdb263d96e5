"""``@job`` and ``with job()``: a unit of work around a function or a block, sync or async."""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from functools import partial, wraps
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast, overload

from asgiref.sync import iscoroutinefunction

from django_connguard.async_unit import AsyncUnit
from django_connguard.boundary import Unit
from django_connguard.naming import dotted_name
from django_connguard.retry import coroutine_with_retries, function_with_retries

P = ParamSpec("P")
R = TypeVar("R")


class Job:
    """What ``job()`` returns: a decorator, a context manager and an async context manager.

    One object serves one ``with`` block at a time; a function it has decorated may run in any
    number of threads and tasks at once.
    """

    def __init__(
        self, name: str | None, signals: bool | None, shared: bool, retry_stale: int
    ) -> None:
        self._name = name
        self._signals = signals
        self._shared = shared
        self._retries = retry_stale
        self._unit: Unit | None = None
        self._async_unit: AsyncUnit | None = None

    def __call__(self, func: Callable[P, R]) -> Callable[P, R]:
        """Return ``func`` with each call of it a unit of work; raises TypeError for a class."""
        if isinstance(func, (staticmethod, classmethod)):
            return cast("Callable[P, R]", type(func)(self(func.__func__)))
        if inspect.isclass(func) or not callable(func):
            raise TypeError(f"job() decorates functions and methods, not {func!r}.")
        guard: Callable[..., Callable[..., Any]] = (
            _async_generator
            if inspect.isasyncgenfunction(func)
            else _coroutine
            if iscoroutinefunction(func)
            else _generator
            if inspect.isgeneratorfunction(func)
            else _function
        )
        name = self._name or dotted_name(func)
        if self._retries:
            if guard not in _WITH_RETRIES:
                raise TypeError(f"job(retry_stale=...) cannot run a generator again: {func!r}.")
            guard = partial(_WITH_RETRIES[guard], retries=self._retries)
        guarded = guard(func, name, self._signals, self._shared)
        guarded.is_connguard_job = True  # type: ignore[attr-defined]
        return cast("Callable[P, R]", guarded)

    def __enter__(self) -> None:
        self._must_be_free()
        unit = Unit(self._name or _place(sys._getframe(1)), self._signals)
        unit.enter()
        self._unit = unit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unit, self._unit = self._unit, None
        if unit is not None:
            unit.__exit__(kind, exception, traceback)

    def __aenter__(self) -> Coroutine[Any, Any, None]:
        self._must_be_free()
        name = self._name or _place(sys._getframe(1))
        self._async_unit = AsyncUnit(name, self._signals, self._shared)
        return self._enter_async(self._async_unit)

    async def _enter_async(self, unit: AsyncUnit) -> None:
        try:
            await unit.__aenter__()
        except BaseException:
            self._async_unit = None
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unit, self._async_unit = self._async_unit, None
        if unit is not None:
            await unit.__aexit__(kind, exception, traceback)

    def _must_be_free(self) -> None:
        if self._retries:
            raise TypeError("job(retry_stale=...) cannot run a block again: decorate a function.")
        if self._unit is not None or self._async_unit is not None:
            raise RuntimeError("This job is already entered; give each block a job() of its own.")


@overload
def job(func: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def job(
    name: str | None = None,
    /,
    *,
    signals: bool | None = None,
    shared: bool = False,
    retry_stale: int = 0,
) -> Job: ...
@overload
def job(
    *, name: str, signals: bool | None = None, shared: bool = False, retry_stale: int = 0
) -> Job: ...
def job(
    func_or_name: Any = None,
    /,
    *,
    name: str | None = None,
    signals: bool | None = None,
    shared: bool = False,
    retry_stale: int = 0,
) -> Any:
    """Give a function or a block the boundary that Django gives a request.

    Use it as ``@job``, ``@job(name=...)``, ``with job("name"):`` or ``async with job("name"):``, on
    functions, methods, coroutines, generators and async generators. A generator's unit of work
    ends when it is exhausted or closed. Inside another job, a live request or an ``atomic`` block
    it does nothing.

    ``name``: for logs, signals and reports; by default the function's dotted name, or the place
    of the ``with``. ``signals``: whether to send Django's ``request_started`` and
    ``request_finished``; None follows CONNGUARD["REQUEST_SIGNALS"]. ``shared`` (async only): use
    the thread, and so the connections, that concurrent jobs share, instead of a thread and
    connections of its own, as a request has under Django's ASGIHandler. ``retry_stale``: how many
    times a function or coroutine is run again, from its beginning, when its first database
    operation has failed because the connection was dropped or could not be opened; for jobs that
    may run twice.

    Raises TypeError for what cannot be decorated or run again, and ValueError for a negative
    ``retry_stale``. Its own errors are logged, never raised.
    """
    if retry_stale < 0:
        raise ValueError(f"job() takes retry_stale={retry_stale!r}: it must be 0 or more.")
    if func_or_name is None or isinstance(func_or_name, str):
        return Job(func_or_name or name, signals, shared, retry_stale)
    return Job(name, signals, shared, retry_stale)(func_or_name)


def undecorated(func: Callable[P, R]) -> Callable[P, R]:
    """Return what ``@job`` decorated, or ``func`` itself."""
    return func.__wrapped__ if getattr(func, "is_connguard_job", False) else func  # type: ignore[attr-defined]


def _place(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


def _function(
    func: Callable[..., Any], name: str, signals: bool | None, shared: bool
) -> Callable[..., Any]:
    @wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Unit(name, signals):
            return func(*args, **kwargs)

    return run


def _generator(
    func: Callable[..., Generator[Any, Any, Any]], name: str, signals: bool | None, shared: bool
) -> Callable[..., Any]:
    @wraps(func)
    def run(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with Unit(name, signals, nests=False):
            return (yield from func(*args, **kwargs))

    return run


def _coroutine(
    func: Callable[..., Coroutine[Any, Any, Any]], name: str, signals: bool | None, shared: bool
) -> Callable[..., Any]:
    @wraps(func)
    async def run(*args: Any, **kwargs: Any) -> Any:
        async with AsyncUnit(name, signals, shared):
            return await func(*args, **kwargs)

    return run


_WITH_RETRIES: dict[Any, Callable[..., Any]] = {
    _function: function_with_retries,
    _coroutine: coroutine_with_retries,
}


def _async_generator(
    func: Callable[..., AsyncGenerator[Any, Any]], name: str, signals: bool | None, shared: bool
) -> Callable[..., Any]:
    @wraps(func)
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        unit = AsyncUnit(name, signals, shared, nests=False)
        await unit.enter()
        failure: BaseException | None = None
        stream = func(*args, **kwargs)
        try:
            # What ``yield from`` does for a generator; there is no such thing for async ones.
            step = stream.asend(None)
            while True:
                with unit.active():
                    item = await step
                try:
                    sent = yield item
                except GeneratorExit:
                    return
                except BaseException as thrown:
                    step = stream.athrow(thrown)
                else:
                    step = stream.asend(sent)
        except StopAsyncIteration:
            return
        except BaseException as error:
            failure = error
            raise
        finally:
            try:
                with unit.active():
                    await stream.aclose()
            finally:
                await unit.exit(failure)
                failure = None  # or this frame and the traceback would hold each other

    return run
