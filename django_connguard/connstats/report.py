"""The live view and the experiment on paper: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from django_connguard.connstats.crew import Run
from django_connguard.connstats.errors import StatsError
from django_connguard.connstats.experiment import kind
from django_connguard.connstats.findings import age_setting, conclusions, findings, span
from django_connguard.connstats.live import View, oldest
from django_connguard.connstats.probe import ACTIVE, HIDDEN, IDLE, IDLE_IN_TRANSACTION, OPEN
from django_connguard.tagging import group_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMATS = ("table", "json")
STATES = (ACTIVE, IDLE, IDLE_IN_TRANSACTION, OPEN, HIDDEN)


def require_rich() -> None:
    """Raise StatsError where the tables cannot be drawn."""
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise StatsError(
            "connstats draws its tables with rich; install it: "
            'pip install "django-connguard[stats]"'
        ) from error


def live_json(views: Sequence[View]) -> str:
    """One JSON document; ages and idle times in seconds."""
    return json.dumps({"aliases": [_as_dict(view) for view in views]}, indent=2)


def experiment_json(runs: Sequence[Run]) -> str:
    """One JSON document; ages and latencies in seconds."""
    document = {
        "runs": [
            {
                "CONN_MAX_AGE": run.max_age,
                "guarded": run.guarded,
                "open": {
                    "peak": run.peak,
                    "mean": run.mean,
                    "before_drop": run.before_drop,
                    "final": run.final,
                },
                "connects": run.connects,
                "jobs": run.jobs,
                "seconds": run.seconds,
                "failed": run.failed,
                "failure": run.failure,
                "latency": {"median": run.median, "p95": run.p95},
            }
            for run in runs
        ],
        "conclusions": conclusions(runs),
    }
    return json.dumps(document, indent=2)


def _as_dict(view: View) -> dict[str, Any]:
    return {
        "alias": view.alias,
        "vendor": view.vendor,
        "server": view.server,
        "settings": {
            "CONN_MAX_AGE": view.max_age,
            "CONN_HEALTH_CHECKS": view.health_checks,
            "pool": view.pool,
        },
        "capacity": {
            **asdict(view.capacity),
            "usable": view.capacity.usable,
            "headroom": view.capacity.headroom,
        },
        "open": len(view.sessions),
        "by_application": view.by_application,
        "by_state": view.by_state,
        "oldest_idle": view.oldest_idle,
        "idle_in_transaction": {
            "count": len(view.in_transaction),
            "oldest": oldest(view.in_transaction),
        },
        "sessions": [asdict(session) for session in view.sessions],
        "findings": findings(view),
        "notes": list(view.notes),
    }


def console(file: TextIO, no_color: bool = False) -> Console:
    """A console that prints texts as they are; raises StatsError without rich."""
    require_rich()
    from rich.console import Console

    return Console(file=file, no_color=no_color, highlight=False, markup=False)


def write_experiment(runs: Sequence[Run], console: Console) -> None:
    """Write a row for each run, and the conclusions."""
    from rich import box
    from rich.table import Table

    # Narrow enough for a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("CONN_\nMAX_AGE", no_wrap=True)
    table.add_column("\njobs are", no_wrap=True)
    dropped = any(run.before_drop is not None for run in runs)
    for heading in (
        *("open:\npeak", "\nmean", *(["before\ndrop"] if dropped else []), "\nfinal"),
        *("con-\nnects", "failed\njobs", "latency\nmedian", "ms\n95%"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            *(age_setting(run.max_age), kind(run.guarded), str(run.peak), f"{run.mean:.1f}"),
            *([str(run.before_drop)] if dropped else []),
            *(str(run.final), str(run.connects), f"{run.failed}/{run.jobs}"),
            *(_milliseconds(run.median), _milliseconds(run.p95)),
            end_section=run.guarded,
        )
    console.print(table)
    for text in conclusions(runs):
        console.print(text, soft_wrap=True)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def write_view(view: View, console: Console) -> None:
    """Write what one alias holds, and what that means."""
    # soft_wrap: sentences stay whole where the output is a file or a pipe.
    console.print(f"{view.alias}: {view.vendor} at {view.server}", style="bold", soft_wrap=True)
    console.print(f"  {_settings(view)}", soft_wrap=True)
    console.print(_by_application_and_state(view) if view.sessions else "  no open connections")
    console.print(f"  {_capacity(view)}", soft_wrap=True)
    for text in findings(view):
        console.print(f"  ! {text}", style="yellow", soft_wrap=True)
    for text in view.notes:
        console.print(f"  note: {text}", style="dim", soft_wrap=True)
    console.print()


def _settings(view: View) -> str:
    pool = f"pool of {view.pool['min_size']} to {view.pool['max_size']}" if view.pool else "no pool"
    age = age_setting(view.max_age)
    return f"CONN_MAX_AGE={age}, CONN_HEALTH_CHECKS={view.health_checks}, {pool}"


def _capacity(view: View) -> str:
    capacity = view.capacity
    if capacity.maximum is None:
        return f"{len(view.sessions)} open; no maximum is known"
    reserved = f" less {capacity.reserved} reserved" if capacity.reserved else ""
    return (
        f"{len(view.sessions)} open here, {capacity.in_use} on the whole server; "
        f"headroom {capacity.headroom} of {capacity.usable} ({capacity.maximum}{reserved})"
    )


def _by_application_and_state(view: View) -> Table:
    from rich.table import Table

    states = [state for state in STATES if view.by_state[state]]
    states += sorted(view.by_state.keys() - set(STATES))
    table = Table("application", show_footer=True)
    table.columns[0].footer = "all"
    for state in states:
        table.add_column(state, justify="right", footer=str(view.by_state[state]))
    table.add_column("open", justify="right", footer=str(len(view.sessions)))
    table.add_column("oldest idle", justify="right", footer=_span_or_blank(view.oldest_idle))
    for application, count in view.by_application.most_common():
        own = [session for session in view.sessions if group_of(session.application) == application]
        seen = Counter(session.state for session in own)
        cells = [str(seen[state] or "") for state in states]
        table.add_row(_printable(application), *cells, str(count), _span_or_blank(oldest(own)))
    return table


def _span_or_blank(seconds: float | None) -> str:
    return "" if seconds is None else span(seconds)


def _printable(application: str) -> str:
    """A name that any client may have chosen, safe to send to a terminal."""
    return "".join(c if c.isprintable() else "?" for c in application) or "(no name)"
