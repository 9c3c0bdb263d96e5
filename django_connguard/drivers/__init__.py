"""What a database driver knows of its own connection, read without a round trip to the server.

Django's rules see only errors that pass through its cursor wrappers (ticket 30646). A query that an
exception interrupts from outside, a result never read, a transaction begun by hand: the driver
knows of each, and a Link asks it.
"""

from __future__ import annotations

from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.drivers.link import Link
from django_connguard.drivers.mysql import MySQLdbLink, PyMySQLLink
from django_connguard.drivers.postgresql import Psycopg2Link, PsycopgLink
from django_connguard.drivers.sqlite import SQLiteLink
from django_connguard.interrupts import is_interrupt

_LINKS: dict[str, type[Link]] = {
    "psycopg": PsycopgLink,
    "psycopg2": Psycopg2Link,
    "MySQLdb": MySQLdbLink,
    "pymysql": PyMySQLLink,
    "sqlite3": SQLiteLink,
}


def link_to(wrapper: BaseDatabaseWrapper) -> Link:
    """Return the link for ``wrapper``'s open connection; a driver not known gets a plain Link."""
    for cls in type(wrapper.connection).__mro__:
        link = _LINKS.get(cls.__module__.partition(".")[0])
        if link is not None:
            try:
                return link(wrapper)
            except Exception as error:
                if is_interrupt(error):
                    raise
                break  # a connection unlike the driver's own; Django's rules still hold
    return Link(wrapper)
