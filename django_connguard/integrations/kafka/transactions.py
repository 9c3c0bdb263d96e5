"""Keeps offsets from going ahead of the database's transactions."""

from __future__ import annotations

from django.db.transaction import TransactionManagementError

from django_connguard.drivers.link import IN_TRANSACTION
from django_connguard.in_use import in_testcase
from django_connguard.ownership import current


def refuse_transactions(function: str) -> None:
    """Raise TransactionManagementError inside a transaction: offsets must not go ahead of it."""
    if (alias := _in_transaction()) is not None:
        raise TransactionManagementError(
            f"{function}() was called inside a transaction on connection {alias!r}; were that "
            "rolled back, the messages whose offsets it commits would be lost. Call it outside."
        )


def must_be_committed() -> None:
    """Raise TransactionManagementError if work may still be rolled back."""
    if (alias := _in_transaction()) is not None:
        raise TransactionManagementError(
            f"A message's or batch's handling has left a transaction open on connection {alias!r}: "
            "its offsets are not committed. End it before the next is asked for."
        )


def _in_transaction() -> str | None:
    """Return an alias that is in a transaction, but for the one around a test of Django's."""
    for link in current().links.values():
        wrapper = link.wrapper
        if wrapper.in_atomic_block:
            found = not in_testcase(wrapper)
        else:
            found = wrapper.connection is not None and (
                wrapper.autocommit != wrapper.settings_dict["AUTOCOMMIT"]
                or link.state() == IN_TRANSACTION
            )
        if found:
            return wrapper.alias
    return None
