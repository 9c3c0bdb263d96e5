"""The workers of one run of an experiment, and the count of their connections at the server."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Lock
from types import TracebackType
from typing import Any

from django_connguard.connstats import worker
from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.probe import Probe
from django_connguard.connstats.worker import Assignment

SAMPLING = 0.05  # seconds from one count at the server to the next
SETTLING = 0.5  # seconds that servers and clients have to close what is to be closed
DROPPING = 10.0  # seconds within which a server must have dropped a connection


@dataclass(slots=True)
class Run:
    """What one run showed; counts are the server's, of the workers' connections alone."""

    max_age: float | None
    guarded: bool
    samples: list[int] = field(default_factory=list)  # open connections while jobs ran
    seconds: float = 0.0  # from the first job's start to the last one's end
    before_drop: int | None = None  # open while every worker waited for the drop, if there was one
    final: int = 0  # open when every worker had been out of jobs for SETTLING seconds
    connects: int = 0
    jobs: int = 0
    failed: int = 0
    failure: str | None = None  # what the first failed job raised
    latencies: list[float] = field(default_factory=list)  # seconds, of the jobs that succeeded

    @property
    def peak(self) -> int:
        return max(self.samples, default=0)

    @property
    def idle(self) -> int:
        """How many were open while no job ran."""
        return self.final if self.before_drop is None else self.before_drop

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples) if self.samples else 0.0

    @property
    def median(self) -> float | None:
        """The median latency in seconds."""
        return statistics.median(self.latencies) if self.latencies else None

    @property
    def p95(self) -> float | None:
        """The latency in seconds that 95 of 100 jobs kept below."""
        if len(self.latencies) < 2:
            return self.median
        return statistics.quantiles(self.latencies, n=20, method="inclusive")[-1]


class Crew:
    """The worker processes of one run."""

    target = staticmethod(worker.main)  # what each of them runs

    def __init__(self, assignments: Iterable[Assignment], probe: Probe, run: Run) -> None:
        self._assignments = assignments
        self._probe = probe
        self.run = run
        self._workers: dict[Connection, SpawnProcess] = {}
        self._sessions: set[int] = set()  # that the workers told of
        self._locks: list[Lock] = []  # a spawned process finds one only while we have it

    def __enter__(self) -> Crew:
        # Spawned, not forked: a worker must inherit neither connections nor threads.
        context = get_context("spawn")
        for assignment in self._assignments:
            ours, theirs = context.Pipe()
            self._locks.append(context.Lock())
            process = context.Process(
                target=self.target, args=(assignment, theirs, self._locks[-1]), daemon=True
            )
            process.start()
            theirs.close()  # so that ours ends with the worker
            self._workers[ours] = process
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pipe, process in self._workers.items():
            pipe.close()  # a worker without a parent ends
            if error is not None:
                process.terminate()
        for process in self._workers.values():
            process.join(timeout=5)
            if process.is_alive():
                process.kill()

    def perform(self, drop: bool, progress: Callable[[], object]) -> None:
        """Let the workers do their jobs; ``progress`` is called as they do."""
        self._hear_until(worker.READY)
        self.go_on()
        began = time.monotonic()
        if drop:
            self.hear_first_half(progress)
            self.run.before_drop = self._settled()
            self._drop()
            self.go_on()
        self.hear_the_rest(progress)
        self.run.seconds = time.monotonic() - began
        self.run.final = self._settled()

    def go_on(self) -> None:
        """Let the jobs begin, or those after the drop."""
        for pipe in self._workers:
            pipe.send(None)

    def hear_first_half(self, progress: Callable[[], object]) -> None:
        """Listen until each worker waits for the drop."""
        self._hear_until(worker.PAUSED, progress)

    def hear_the_rest(self, progress: Callable[[], object]) -> None:
        """Listen until each worker is out of jobs."""
        self._hear_until(worker.DONE, progress)

    def _hear_until(self, what: str, progress: Callable[[], object] | None = None) -> None:
        missing = set(self._workers)
        self.listen(
            lambda: not missing,
            progress,
            lambda pipe, told: missing.discard(pipe) if told == what else None,
        )

    def listen(
        self,
        is_over: Callable[[], bool],
        progress: Callable[[], object] | None,
        heard: Callable[[Connection, str], object] = lambda pipe, told: None,
    ) -> None:
        """Take in what the workers tell until it is over; with progress, count as well."""
        next_sample = time.monotonic()
        while not is_over():
            pause = max(next_sample - time.monotonic(), 0) if progress else None
            readable: Sequence[Any] = wait(list(self._workers), pause)
            for pipe in readable:
                heard(pipe, self._hear(pipe))
            if progress and time.monotonic() >= next_sample:
                self.run.samples.append(len(self._open()))
                progress()
                next_sample = max(next_sample + SAMPLING, time.monotonic())

    def _hear(self, pipe: Connection) -> str:
        try:
            what, *more = pipe.recv()
        except (EOFError, OSError) as error:
            process = self._workers[pipe]
            process.join(timeout=5)
            raise StatsError(
                f"a worker ended in mid-run, with exit status {process.exitcode}"
            ) from error
        run = self.run
        if what == worker.FAILED:
            raise StatsError(f"a worker could not begin: {more[0]}")
        if what == worker.SESSION:
            run.connects += 1
            self._sessions.add(more[0])
        elif what == worker.JOB:
            seconds, raised = more
            run.jobs += 1
            if raised is None:
                run.latencies.append(seconds)
            else:
                run.failed += 1
                run.failure = run.failure or raised
        return str(what)

    def _settled(self) -> int:
        time.sleep(SETTLING)
        return len(self._open())

    def _open(self) -> list[int]:
        return [found.id for found in self._probe.connections() if found.id in self._sessions]

    def _drop(self) -> None:
        """End the workers' connections, as a server's restart does, while none is in a job."""
        self._probe.end(self._open())
        deadline = time.monotonic() + DROPPING
        while self._open():
            if time.monotonic() > deadline:
                raise StatsError("the server did not drop the workers' connections")
            time.sleep(SAMPLING)
