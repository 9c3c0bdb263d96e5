"""The psycopg pools that Django keeps, one a process and alias (since Django 5.1)."""

from __future__ import annotations

import sys
from typing import Any


def pools() -> dict[str, Any]:
    """Return the pools by alias: Django's own dict, which forgets a pool that is taken out."""
    # Not imported where it is not in use: it raises without a driver.
    backend = sys.modules.get("django.db.backends.postgresql.base")
    # It may be half imported, in a child that was forked meanwhile.
    wrapper = getattr(backend, "DatabaseWrapper", None)
    found: dict[str, Any] = getattr(wrapper, "_connection_pools", {})
    return found
