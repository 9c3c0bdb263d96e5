"""What a live view or an experiment means, in plain sentences; each is one small function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from django_connguard.connstats.live import View, oldest
from django_connguard.connstats.probe import IDLE

if TYPE_CHECKING:
    from django_connguard.connstats.crew import Run

NEARLY_FULL = 0.8  # of what ordinary roles may open
GRACE = 10.0  # seconds past CONN_MAX_AGE that a connection may well spend inside a request


def findings(view: View) -> list[str]:
    """List what deserves attention, the most urgent first."""
    return [text for check in CHECKS if (text := check(view))]


def nearly_full(view: View) -> str | None:
    usable, in_use = view.capacity.usable, view.capacity.in_use
    if not usable or in_use is None or in_use < NEARLY_FULL * usable:
        return None
    return (
        f"{in_use / usable:.0%} of the connections that ordinary roles may open are in use "
        f"({in_use} of {usable}): new ones will soon be refused."
    )


def idle_in_transaction(view: View) -> str | None:
    sessions = view.in_transaction
    if not sessions:
        return None
    age = oldest(sessions)
    since = "" if age is None else f", the oldest for {span(age)}"
    return (
        f"{counted(len(sessions), 'session')} idle in transaction{since}: they keep their locks "
        "and old row versions until they end; look for a job that left a transaction open."
    )


def idle_past_max_age(view: View) -> str | None:
    # Age counts from the opening, so whatever has been idle longer than CONN_MAX_AGE is too old.
    if view.max_age is None or view.pool:
        return None
    late = [
        session
        for session in view.sessions
        if session.state == IDLE and (session.idle or 0) > view.max_age + GRACE
    ]
    age = oldest(late)
    if age is None:
        return None
    return (
        f"{counted(len(late), 'session')} idle for longer than CONN_MAX_AGE={view.max_age:g} "
        f"allows, the oldest for {span(age)}: their owner comes to no boundary that closes them, "
        "as code outside requests does unless it is a connguard job."
    )


def no_health_checks(view: View) -> str | None:
    if view.max_age == 0 or view.health_checks or view.vendor == "sqlite" or view.pool:
        return None
    return (
        f"CONN_MAX_AGE={age_setting(view.max_age)} and CONN_HEALTH_CHECKS=False: a connection "
        "that the server drops (restart, failover, idle timeout) is handed to the next request "
        "all the same, and fails it; set CONN_HEALTH_CHECKS=True."
    )


def pool_and_max_age(view: View) -> str | None:
    if not view.pool or view.max_age == 0:
        return None
    return (
        f"OPTIONS['pool'] and CONN_MAX_AGE={age_setting(view.max_age)}: Django refuses to connect "
        "with both; set CONN_MAX_AGE=0, since the pool keeps connections by itself."
    )


CHECKS: tuple[Callable[[View], str | None], ...] = (
    nearly_full,
    pool_and_max_age,
    idle_in_transaction,
    idle_past_max_age,
    no_health_checks,
)


def conclusions(runs: Sequence[Run]) -> list[str]:
    """Say what an experiment has shown."""
    if not any(run.connects for run in runs):
        return ["No job opened a connection to this database: there is nothing to compare."]
    return [text for check in CONCLUSIONS if (text := check(runs))]


def nothing_listed(runs: Sequence[Run]) -> str | None:
    if any(run.peak or run.final for run in runs):
        return None
    return (
        "The server lists none of the connections that the workers opened: a pooler such as "
        "PgBouncer stands between, or this role may not see them."
    )


def left_open(runs: Sequence[Run]) -> str | None:
    unguarded, guarded = _split(runs)
    if not any(run.idle for run in runs):
        return None
    return (
        f"Open at the server while every worker waited for work, under CONN_MAX_AGE="
        f"{', '.join(age_setting(run.max_age) for run in unguarded)}: unguarded "
        f"{', '.join(str(run.idle) for run in unguarded)}; guarded "
        f"{', '.join(str(run.idle) for run in guarded)}."
    )


def ignored(runs: Sequence[Run]) -> str | None:
    unguarded = [run for run in _split(runs)[0] if _could_age(run)]
    if not unguarded or any(run.idle < run.peak for run in unguarded):
        return None
    return "Unguarded, CONN_MAX_AGE does nothing: a connection once opened stays open."


def never_reached(runs: Sequence[Run]) -> str | None:
    late = [run for run in runs if run.guarded and run.max_age is not None and not _could_age(run)]
    if not late:
        return None
    return (
        f"A run took about {span(max(run.seconds for run in late))}: no connection reached the "
        f"age of {', '.join(age_setting(run.max_age) for run in late)}. Give shorter ages, which "
        "may be fractions of a second, or more jobs."
    )


def _could_age(run: Run) -> bool:
    return run.max_age is not None and run.max_age < run.seconds


def failed(runs: Sequence[Run]) -> str | None:
    parts = []
    for name, some in zip(("unguarded", "guarded"), _split(runs), strict=True):
        total, failures = sum(run.jobs for run in some), sum(run.failed for run in some)
        why = next((run.failure for run in some if run.failure), None)
        parts.append(f"{failures} of {total} {name} jobs" + (f" ({why})" if why else ""))
    return f"Failed: {'; '.join(parts)}." if any(run.failed for run in runs) else None


def price_of_reconnecting(runs: Sequence[Run]) -> str | None:
    guarded = [run for run in _split(runs)[1] if run.median is not None and not run.failed]
    if not guarded:
        return None
    most, least = (best(guarded, key=lambda run: run.connects) for best in (max, min))
    if most.connects == least.connects or most.median is None or least.median is None:
        return None
    return (
        f"Guarded, CONN_MAX_AGE={age_setting(most.max_age)} made {most.connects} connects and "
        f"a median job took {most.median * 1e3:.1f} ms; CONN_MAX_AGE={age_setting(least.max_age)} "
        f"made {least.connects}, and it took {least.median * 1e3:.1f} ms."
    )


CONCLUSIONS: tuple[Callable[[Sequence[Run]], str | None], ...] = (
    nothing_listed,
    left_open,
    ignored,
    never_reached,
    failed,
    price_of_reconnecting,
)


def _split(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The unguarded runs and the guarded ones."""
    return [run for run in runs if not run.guarded], [run for run in runs if run.guarded]


def counted(number: int, noun: str) -> str:
    """`1 session is`, `3 sessions are`."""
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"


def age_setting(seconds: float | None) -> str:
    """A CONN_MAX_AGE as it is written in settings."""
    return "None" if seconds is None else f"{seconds:g}"


def span(seconds: float) -> str:
    """A duration for people, in its largest fitting unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.1f}".removesuffix(".0") + " s"
