"""A unit of work for async code, whose connections live in the thread that asgiref runs ORM in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import Any

from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async

from django_connguard.boundary import Unit

logger = logging.getLogger("django_connguard")


class Context(ThreadSensitiveContext):
    """A context whose thread ends when the last unit of work in it has ended."""

    has_ended = False  # its own unit has; what that one started may go on


class AsyncUnit:
    """A unit of work entered and left in asgiref's thread-sensitive thread.

    Isolated (the default): a thread-sensitive context of its own, as each request has under
    Django's ASGIHandler; the context's thread ends with the unit, and so do its connections.
    Shared: the thread that everyone shares; of the jobs that overlap there, the last one out does
    the hygiene. Inside another context, or under async_to_sync(), the unit uses the thread of
    those, and nests in what is going on there.
    """

    def __init__(
        self,
        name: str,
        signals: bool | None = None,
        shared: bool = False,
        nests: bool = True,
        kind: type[Unit] = Unit,
    ) -> None:
        self.unit = kind(name, signals, nests, shared)
        around = SyncToAsync.thread_sensitive_context.get(None)
        self._around = around if isinstance(around, Context) else None
        self._context = None if shared or around is not None else Context()
        self._active: AbstractContextManager[None] | None = None
        self._is_last = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make sync_to_async() use this unit's thread; entered anew at each step of a generator."""
        if self._context is None:
            yield
            return
        token = SyncToAsync.thread_sensitive_context.set(self._context)
        try:
            yield
        finally:
            # ValueError: ended by another task than began it, whose context is not ours to reset.
            with suppress(ValueError):
                SyncToAsync.thread_sensitive_context.reset(token)

    async def enter(self) -> None:
        """Begin."""
        with self.active():
            try:
                await _to_the_end(self.unit.enter)
            except asyncio.CancelledError as cancelled:
                await self.exit(cancelled)
                raise
            except Exception:
                logger.exception("The boundary at the start of job %s failed.", self.unit.name)

    async def exit(self, exception: BaseException | None = None) -> None:
        """End; ``exception`` is what the job raised."""
        if self._context is not None:
            self._context.has_ended = True
        context = self._context or self._around
        ends_thread = (
            context is not None
            and context.has_ended
            # asgiref keeps an executor for a context from its first use on.
            and context in SyncToAsync.context_to_thread_executor
        )
        with self.active():
            try:
                # Straight to our own thread: a cancelled sync_to_async() may leave behind, in this
                # context, the executor of an async_to_sync() that is over.
                executor = (
                    SyncToAsync.context_to_thread_executor.get(self._context)
                    if self._context is not None
                    else None
                )
                await _to_the_end(self._exit_unit, exception, ends_thread, executor=executor)
            except Exception:
                logger.exception("The boundary at the end of job %s failed.", self.unit.name)
            finally:
                if context is not None and ends_thread and self._is_last:
                    SyncToAsync.context_to_thread_executor.pop(context).shutdown(wait=False)

    def _exit_unit(self, exception: BaseException | None, ends_thread: bool) -> None:
        self._is_last = self.unit.exit(exception, ends_thread)

    async def __aenter__(self) -> AsyncUnit:
        await self.enter()
        self._active = self.active()
        self._active.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._active is not None:
            self._active.__exit__(None, None, None)
        await self.exit(None if kind is GeneratorExit else exception)


async def _to_the_end(function: Callable[..., Any], *args: Any, executor: Any = None) -> None:
    """Run a boundary in its thread; a cancellation meanwhile comes out when it has ended."""
    task = asyncio.ensure_future(
        sync_to_async(function, thread_sensitive=executor is None, executor=executor)(*args)
    )
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    try:
        if cancelled is not None:
            raise cancelled
        task.result()
    finally:
        del cancelled  # or this frame and the traceback would hold each other
