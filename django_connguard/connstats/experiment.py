"""What a CONN_MAX_AGE costs, from real workers: runs a job under each and counts at the server."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.module_loading import import_string

from django_connguard.conf import conf
from django_connguard.connstats import worker
from django_connguard.connstats.crew import Crew, Run
from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.findings import age_setting
from django_connguard.connstats.probe import Probe, probe_for
from django_connguard.connstats.vendors.sqlite import SQLiteProbe
from django_connguard.connstats.worker import Assignment

POOLS = ("processes", "threads", "celery")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: ``workers`` times ``jobs`` calls of ``job``, under each of ``ages``, twice.

    ``job``: dotted path of a callable without arguments; None takes CONNGUARD["EXPERIMENT_JOB"].
    ``ages``: values of CONN_MAX_AGE in seconds, None for ever. ``rate``: jobs started per second,
    over all workers. ``pool``: workers are "processes", "threads" of one process, or "celery", the
    processes of one Celery worker, whose task the job is then. ``drop``: half-way through each run,
    end the workers' connections at the server.
    """

    alias: str = DEFAULT_DB_ALIAS
    job: str | None = None
    ages: tuple[float | None, ...] = (0, 0.5, None)
    workers: int = 4
    jobs: int = 20
    rate: float = 20.0
    pool: str = "processes"
    drop: bool = False

    @property
    def total(self) -> int:
        """How many jobs will run, in all runs together."""
        return 2 * len(self.ages) * self.workers * self.jobs

    def assignments(self, job: str, max_age: float | None, guarded: bool) -> list[Assignment]:
        """One per worker process; jobs start in turn, at even intervals."""
        due = [
            [(number * self.workers + first) / self.rate for number in range(self.jobs)]
            for first in range(self.workers)
        ]
        shares = [[share] for share in due] if self.pool == "processes" else [due]
        return [Assignment(self.alias, job, max_age, guarded, share, self.drop) for share in shares]


Progress = Callable[[str, int], object]


def perform(plan: Plan, progress: Progress) -> list[Run]:
    """Run the whole plan; ``progress`` is told what is being done, and how many jobs have ended.

    Raises StatsError for whatever the user can mend.
    """
    job = resolve(plan.job)
    _check_alias(plan)
    crew_of = _celery_crew(job) if plan.pool == "celery" else Crew
    runs: list[Run] = []
    with probe_for(plan.alias) as probe:
        _check_server(plan, probe)
        for max_age in plan.ages:
            for guarded in (False, True):
                what = f"CONN_MAX_AGE={age_setting(max_age)}, {kind(guarded)}"
                before = sum(run.jobs for run in runs)
                run = Run(max_age, guarded)
                with crew_of(plan.assignments(job, max_age, guarded), probe, run) as crew:
                    crew.perform(plan.drop, lambda: progress(what, before + run.jobs))  # noqa: B023
                runs.append(run)
    return runs


def _celery_crew(job: str) -> type[Crew]:
    try:
        from django_connguard.connstats.celery_crew import CeleryCrew
    except ImportError as error:
        raise StatsError(f"--pool celery needs Celery: {error}") from error
    CeleryCrew.check(job)
    return CeleryCrew


def kind(guarded: bool) -> str:
    return "guarded" if guarded else "unguarded"


def resolve(job: str | None) -> str:
    """Return the dotted path of the job to run; raises StatsError if no such job can be called."""
    path = job or conf.EXPERIMENT_JOB
    if path is None:
        raise StatsError(
            "no job to run: give --experiment a dotted path, or set CONNGUARD['EXPERIMENT_JOB']"
        )
    try:
        function = import_string(path)
    except Exception as error:  # a module may raise anything
        raise StatsError(f"cannot import the job {path!r}: {worker.one_line(error)}") from error
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise StatsError(f"the job {path!r} cannot be called without arguments: {error}") from error
    return path


def _check_alias(plan: Plan) -> None:
    if not os.environ.get("DJANGO_SETTINGS_MODULE"):
        raise StatsError("workers load the settings anew: set DJANGO_SETTINGS_MODULE")
    if plan.alias not in connections:
        return  # the probe tells
    settings = connections[plan.alias].settings_dict
    if settings["OPTIONS"].get("pool") and any(age != 0 for age in plan.ages):
        raise StatsError(
            f"alias {plan.alias!r} has OPTIONS['pool'], with which Django allows CONN_MAX_AGE=0 "
            "alone: give --ages 0"
        )


def _check_server(plan: Plan, probe: Probe) -> None:
    if type(probe) is Probe:
        raise StatsError(f"connstats cannot count connections on {probe.vendor} servers")
    if isinstance(probe, SQLiteProbe) and probe.in_memory:
        raise StatsError(
            f"alias {plan.alias!r} is in this process's memory: workers cannot share it"
        )
    if plan.drop and probe.vendor == "sqlite":
        raise StatsError("--drop needs a server that can drop connections: SQLite has none")
    headroom = probe.capacity().headroom
    if headroom is not None and plan.workers > headroom:
        raise StatsError(
            f"--workers {plan.workers} may need more connections than are free at the server: "
            f"{headroom}"
        )
