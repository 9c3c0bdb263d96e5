"""What a boundary does to connections; the only module that closes them.

Rules taken from Django are Django's own code, called (``close_if_unusable_or_obsolete``); what is
added is said beside it. A connection that cannot be examined is closed: no job may get it.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from django_connguard.conf import conf
from django_connguard.drivers.link import BROKEN, BUSY, IN_TRANSACTION, Link
from django_connguard.in_use import in_use
from django_connguard.interrupts import is_interrupt
from django_connguard.signals import connection_closed

if TYPE_CHECKING:
    from django_connguard.ownership import Owner

logger = logging.getLogger("django_connguard")

# Why a connection was closed, as told by job_finished, connection_closed and stats().
AGE = "age"  # past CONN_MAX_AGE
POOL_RETURN = "pool_return"  # the same with a psycopg pool: given back to it
UNUSABLE = "unusable"  # broken, or left with a query still running
IDLE = "idle"  # past CONN_MAX_AGE, by the reaper while its owner waited for work
STALE = "stale"  # the server had closed it before the job began
OPEN_TRANSACTION = "open_transaction"  # left in a transaction, or with autocommit changed
THREAD_END = "thread_end"  # the thread that held it ended
RELEASED = "released"  # by connguard.released()
FORK = "fork"  # the parent's, let go of by a forked child
OTHER = "other"  # not by connguard, but by Django or user code
REASONS = (
    *(AGE, POOL_RETURN, UNUSABLE, IDLE, STALE),
    *(OPEN_TRANSACTION, THREAD_END, RELEASED, FORK, OTHER),
)

Closed = dict[str, int]


def before_job(link: Link, name: str, closed: Closed) -> None:
    """Close what would fail the job: a connection that is broken, or that its server closed."""
    try:
        state = BROKEN if link.cut_off else link.state()
        if state:
            _close_in_state(link, state, closed, "Before job %s, other code", name)
        # Where Django's own health check is on, it comes with the first query. What the server
        # has said unasked may also be a mere notice.
        elif not link.wrapper.health_check_enabled and _is_stale(link):  # type: ignore[attr-defined]
            close(link, STALE, closed)
    except Exception as error:
        _give_up(link, error, closed)


def close_if_stale(link: Link, closed: Closed) -> None:
    """Close what its server has closed, though a job may be under way: it has lost it already."""
    try:
        if not link.wrapper.in_atomic_block and not link.state() and _is_stale(link):
            close(link, STALE, closed)
    except Exception as error:
        _give_up(link, error, closed)


def close_if_unfit(link: Link, closed: Closed) -> None:
    """Close what can serve no further query, in the middle of a job that is about to run one."""
    try:
        if not link.wrapper.in_atomic_block and (link.cut_off or link.state() in (BUSY, BROKEN)):
            close(link, UNUSABLE, closed)
    except Exception as error:
        _give_up(link, error, closed)
    close_if_stale(link, closed)


def _is_stale(link: Link) -> bool:
    return bool(link.poll(0)) and not link.is_usable()


def after_job(link: Link, name: str, failed: bool, closed: Closed) -> None:
    """Close what no other job may get: a connection left broken, busy or in a transaction."""
    try:
        wrapper = link.wrapper
        state = BROKEN if link.cut_off else link.state()
        if wrapper.in_atomic_block or wrapper.autocommit != wrapper.settings_dict["AUTOCOMMIT"]:
            state = state or IN_TRANSACTION
        if state:
            _close_in_state(link, state, closed, "Job %s", name)
        elif failed:
            wrapper.errors_occurred = True  # so that Django probes it before its next use
    except Exception as error:
        _give_up(link, error, closed)


def close_old_connections(held: list[Link], closed: Closed) -> None:
    """Do what django.db.close_old_connections() does, to what was held a moment ago."""
    for link in held:
        wrapper = link.wrapper
        if wrapper.connection is None:
            continue
        in_order = wrapper.autocommit == wrapper.settings_dict["AUTOCOMMIT"]
        if (
            in_order
            and link.keeps_djangos_rules
            and not wrapper.errors_occurred
            and (wrapper.close_at is None or monotonic() < wrapper.close_at)
        ):
            wrapper.health_check_done = False  # type: ignore[attr-defined]  # all there is to do
            continue
        _close_by_djangos_rules(link, closed)


def _close_by_djangos_rules(link: Link, closed: Closed) -> None:
    wrapper = link.wrapper
    in_order = wrapper.autocommit == wrapper.settings_dict["AUTOCOMMIT"]
    link.closing = True
    try:
        wrapper.close_if_unusable_or_obsolete()
    except Exception as error:
        _give_up(link, error, closed)
        return
    link.closing = wrapper.connection is None
    if link.closing:
        # Django forgets errors once a probe has shown the connection to be usable.
        reason = AGE if in_order else OPEN_TRANSACTION
        count(link, UNUSABLE if wrapper.errors_occurred else reason, closed)


def between_steps(link: Link, closed: Closed) -> None:
    """Do in the midst of a job what may be done between two, if the job would not notice."""
    wrapper = link.wrapper
    if wrapper.in_atomic_block or wrapper.autocommit != wrapper.settings_dict["AUTOCOMMIT"]:
        return
    try:
        state = BROKEN if link.cut_off else link.state()
        if state in (BUSY, IN_TRANSACTION) or (state != BROKEN and in_use(wrapper)):
            return
        if state:
            close(link, UNUSABLE, closed)
        elif _is_stale(link):
            close(link, STALE, closed)
        else:
            _close_by_djangos_rules(link, closed)
    except Exception as error:
        _give_up(link, error, closed)


def close_if_old(link: Link, closed: Closed) -> None:
    """Close by age alone: what was opened after Django's own receiver had run."""
    close_at = link.wrapper.close_at
    if close_at is not None and monotonic() >= close_at:
        close(link, AGE, closed)


def close_idle(owner: Owner) -> None:
    """Close what is past its age while its thread is idle, which the caller ensures."""
    for link in owner.held():
        close_at = link.wrapper.close_at
        if (
            close_at is not None
            and monotonic() >= close_at
            and not link.wrapper.in_atomic_block
            and not link.state()
        ):
            close(link, IDLE, {})


def close_at_thread_end(owner: Owner, closed: Closed) -> None:
    """Close what a thread holds that ends, whatever its age."""
    for link in owner.held():
        # A connection lent by another thread, as Django's live server tests do, is that thread's.
        if link.wrapper._thread_ident == owner.thread:  # type: ignore[attr-defined]
            close(link, THREAD_END, closed)


_let_go: list[Any] = []  # kept for ever: what their finalizers would say is not ours to say


def let_go(owner: Owner) -> None:
    """In a forked child: forget the parent's connections, without a word to the server."""
    for link in owner.held():
        _let_go.append(link.connection)
        link.let_go()
        link.wrapper.connection = None
        link.tally = owner.tally(link.wrapper.alias)  # the child's own
        count(link, FORK, {})


def close(link: Link, reason: str, closed: Closed) -> None:
    """Close whatever state the connection is in, and count it; raises an interrupt only."""
    wrapper = link.wrapper
    if wrapper.connection is None:
        return
    wrapper.inc_thread_sharing()  # an ended thread may be cleaned up after by another
    link.closing = True
    interrupt: Exception | None = None
    try:
        wrapper.close()
    except Exception as error:
        if is_interrupt(error):
            interrupt = error
        # Expected of a broken connection: there is nobody to say goodbye to.
        logger.info("Closing connection %r (%s): %s", wrapper.alias, reason, error)
    finally:
        wrapper.dec_thread_sharing()
    link.closing = wrapper.connection is None  # SQLite in memory stays open
    if link.closing:
        count(link, reason, closed)
    if interrupt is not None:
        raise interrupt


def cancel_before_close(link: Link) -> None:
    """Leave no query running at the server, whoever closes the connection.

    Django itself does where a rollback fails, as it does when a time limit has struck in mid-query
    inside an ``atomic`` block.
    """
    wrapper = link.wrapper
    close_connection = type(wrapper)._close  # type: ignore[attr-defined]

    def _close() -> Any:
        try:
            if wrapper.connection is link.connection and conf.CANCEL_TIMEOUT:
                link.cancel(conf.CANCEL_TIMEOUT)
        except Exception as error:
            if is_interrupt(error):
                close_connection(wrapper)
                raise
            logger.info("No query cancelled on connection %r: %s", wrapper.alias, error)
        return close_connection(wrapper)

    wrapper._close = _close  # type: ignore[attr-defined]


def count(link: Link, reason: str, closed: Closed) -> None:
    """Count a connection that was closed, for its unit of work and for its alias; and tell."""
    wrapper = link.wrapper
    if link.counted:
        return
    link.counted = True
    if reason == AGE and wrapper.settings_dict["OPTIONS"].get("pool"):
        reason = POOL_RETURN
    closed[reason] = closed.get(reason, 0) + 1
    link.tally.closed[reason] = link.tally.closed.get(reason, 0) + 1
    # Not in a forked child, where a receiver's locks may be held for ever.
    if connection_closed.receivers and reason != FORK:
        connection_closed.send_robust(
            type(wrapper), alias=wrapper.alias, reason=reason, age=monotonic() - link.opened_at
        )


def count_closed_elsewhere(link: Link) -> None:
    """Count a connection that another has replaced, so that somebody must have closed it."""
    link.counted = True
    link.tally.closed[OTHER] = link.tally.closed.get(OTHER, 0) + 1


def forget_block(link: Link) -> None:
    """Forget an atomic block whose frames are gone.

    connect() would do so, but SQLite in memory is never closed and so never connected again; and
    Django never connects again where the connection was closed in a block with autocommit off.
    """
    wrapper = link.wrapper
    wrapper.in_atomic_block = wrapper.closed_in_transaction = wrapper.needs_rollback = False
    wrapper.savepoint_ids.clear()
    wrapper.atomic_blocks.clear()
    wrapper.run_on_commit.clear()


def _give_up(link: Link, error: Exception, closed: Closed) -> None:
    if link.wrapper.connection is None:  # the error came of its closing
        count(link, UNUSABLE, closed)
    close(link, UNUSABLE, closed)
    if is_interrupt(error):
        raise error
    logger.error("Connection %r cannot be examined: closed.", link.wrapper.alias, exc_info=error)


def _close_in_state(link: Link, state: int, closed: Closed, who: str, name: str) -> None:
    """Close a connection that no job may get, and say who left a transaction open on it."""
    wrapper = link.wrapper
    left = ""
    if wrapper.in_atomic_block:
        left = "an atomic block"
    elif wrapper.autocommit != wrapper.settings_dict["AUTOCOMMIT"]:
        left = "autocommit changed"
    elif state == IN_TRANSACTION:
        left = "a transaction"
    if left:
        logger.warning(
            f"{who} left {left} open on connection %r: rolled back and closed.",
            *(name, wrapper.alias),
        )
    if state == IN_TRANSACTION:
        with suppress(Exception):  # closing ends the transaction too
            link.connection.cursor().execute("ROLLBACK")
    forget_block(link)
    close(link, OPEN_TRANSACTION if left else UNUSABLE, closed)
    if wrapper.connection is not None:
        wrapper.set_autocommit(wrapper.settings_dict["AUTOCOMMIT"])
