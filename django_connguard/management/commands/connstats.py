"""manage.py connstats: how many connections this system holds, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections

from django_connguard.connstats import experiment, live, report
from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.experiment import POOLS, Plan

EXPERIMENT_OPTIONS = ("workers", "jobs", "rate", "ages", "pool", "drop")


class Command(BaseCommand):
    """Parses and delegates; each mistake of the user is one line and exit status 2."""

    help = (
        "Shows the open connections of each database as its server counts them; "
        "with --experiment, runs a job under several CONN_MAX_AGE values and compares."
    )
    requires_system_checks = ()  # the command is for the days when a server is down

    def add_arguments(self, parser: CommandParser) -> None:
        # Values are checked in handle(): argparse would print its usage above the mistake, and
        # call_command() would bypass it.
        parser.add_argument(
            "--database",
            action="append",
            metavar="ALIAS",
            help="look at this alias only; may be repeated (default: all of DATABASES)",
        )
        parser.add_argument(
            "--format", default="table", metavar="FORMAT", help="table (the default) or json"
        )
        group = parser.add_argument_group("experiment")
        group.add_argument(
            "--experiment",
            nargs="?",
            const="",
            metavar="DOTTED.PATH",
            help="run this job, or the project's CONNGUARD['EXPERIMENT_JOB'], and compare",
        )
        group.add_argument("--workers", metavar="N", help="how many workers run jobs")
        group.add_argument("--jobs", metavar="N", help="how many jobs each worker runs")
        group.add_argument("--rate", metavar="R", help="jobs started per second, over all workers")
        group.add_argument(
            "--ages",
            metavar="AGES",
            help="values of CONN_MAX_AGE in seconds, separated by commas, as in 0,0.5,60,none",
        )
        group.add_argument(
            "--pool",
            metavar="KIND",
            help="workers are processes, threads, or celery (of a real worker)",
        )
        group.add_argument(
            "--drop",
            action="store_true",
            default=None,
            help="half-way through each run, end the workers' connections at the server",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            if options["format"] not in report.FORMATS:
                raise StatsError(
                    f"unknown format {options['format']!r}; known: {', '.join(report.FORMATS)}"
                )
            if options["format"] == "table":
                report.require_rich()
            if options["experiment"] is None:
                self._show_live(options)
            else:
                self._run_experiment(options)
        except StatsError as error:
            raise CommandError(str(error), returncode=2) from error
        except KeyboardInterrupt as error:
            raise CommandError("interrupted", returncode=130) from error

    def _show_live(self, options: dict[str, Any]) -> None:
        for name in EXPERIMENT_OPTIONS:
            if options[name] is not None:
                raise StatsError(f"--{name} needs --experiment")
        aliases = options["database"] or list(connections)
        views, failures = [], []
        for alias in aliases:
            try:
                views.append(live.look(alias))
            except StatsError as error:
                failures.append(str(error))
        # One server that is down must not hide the others.
        if options["format"] == "json":
            self.stdout.write(report.live_json(views))
        else:
            console = report.console(cast("TextIO", self.stdout), options["no_color"])
            for view in views:
                report.write_view(view, console)
        if failures:
            raise StatsError("\n".join(failures))

    def _run_experiment(self, options: dict[str, Any]) -> None:
        given = parse_experiment(options)
        aliases = options["database"] or [DEFAULT_DB_ALIAS]
        if len(aliases) > 1:
            raise StatsError("an experiment runs on one database: give --database once")
        plan = Plan(alias=aliases[0], job=options["experiment"] or None, **given)
        with self._progress(plan, options) as progress:
            runs = experiment.perform(plan, progress)
        if options["format"] == "json":
            self.stdout.write(report.experiment_json(runs))
        else:
            console = report.console(cast("TextIO", self.stdout), options["no_color"])
            report.write_experiment(runs, console)

    @contextmanager
    def _progress(self, plan: Plan, options: dict[str, Any]) -> Iterator[experiment.Progress]:
        """A bar on the terminal that stderr is, or nothing."""
        if not self.stderr.isatty() or options["format"] != "table":
            yield lambda what, jobs: None
            return
        from rich.progress import Progress

        console = report.console(cast("TextIO", self.stderr), options["no_color"])
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("starting", total=plan.total)
            yield lambda what, jobs: bar.update(task, description=what, completed=jobs)


def parse_experiment(options: dict[str, Any]) -> dict[str, Any]:
    """The experiment's options that were given; the others keep the Plan's own defaults."""
    given = {name: options[name] for name in EXPERIMENT_OPTIONS if options[name] is not None}
    for name in ("workers", "jobs"):
        if name in given:
            given[name] = parse_count(name, given[name])
    if "rate" in given:
        given["rate"] = parse_rate(given["rate"])
    if "ages" in given:
        given["ages"] = parse_ages(given["ages"])
    if given.get("pool", POOLS[0]) not in POOLS:
        raise StatsError(f"unknown --pool {given['pool']!r}; known: {', '.join(POOLS)}")
    return given


def parse_count(name: str, text: object) -> int:
    """A whole number from 1; raises StatsError."""
    try:
        number = int(str(text))
    except ValueError:
        number = 0
    if number < 1:
        raise StatsError(f"--{name} must be a whole number from 1, not {str(text)!r}")
    return number


def parse_rate(text: object) -> float:
    """Jobs per second, more than 0; raises StatsError."""
    try:
        rate = float(str(text))
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise StatsError(f"--rate must be jobs per second, more than 0, not {str(text)!r}")
    return rate


def parse_ages(text: object) -> tuple[float | None, ...]:
    """CONN_MAX_AGE values from text such as `0,0.5,60,none`; raises StatsError."""
    return tuple(parse_age(age) for age in str(text).split(","))


def parse_age(text: str) -> float | None:
    """One CONN_MAX_AGE: seconds from 0, fractions allowed, or none for ever; raises StatsError."""
    if text.strip().lower() == "none":
        return None
    try:
        age = float(text)
    except ValueError:
        age = math.nan
    if not 0 <= age < math.inf:
        raise StatsError(
            f"bad age {text.strip()!r} in --ages: give seconds, as 0 or 0.5 or 60, or none"
        )
    return age
