"""A forked child lets go of its parent's connections: it neither speaks on them nor says goodbye.

Both would be heard by the server as the parent's words.
"""

from __future__ import annotations

import os
from typing import Any

from django_connguard import ownership
from django_connguard.drivers.link import let_go
from django_connguard.pools import pools

_pools: list[Any] = []  # kept for ever: their worker threads did not come along, nor can be ended


def _after_in_child() -> None:
    ownership.begin_anew()
    inherited = pools()
    for pool in inherited.values():
        _pools.append(pool)
        for connection in pool._pool:
            let_go(connection.fileno())
    inherited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
