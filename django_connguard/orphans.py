"""Ends what a killed process has left running at the server.

A server that runs a query does not notice that its client is dead. So the processes of a family, a
worker's children say, note their sessions in a folder, one file each; whoever joins the family
(the child that replaces a dead one) and who ends it looks for notes that the dead have left.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from django.db import connections
from django.db.backends.signals import connection_created

from django_connguard.conf import conf
from django_connguard.connecting import is_registered
from django_connguard.drivers import link_to
from django_connguard.drivers.cancelling import end_session

logger = logging.getLogger("django_connguard")

_folder: Path | None = None
_note = -1  # descriptor of this process's own file
_process = 0  # whose it is: what a task forks has the descriptor too
# By alias and thread: number and port.
_sessions: dict[tuple[str, int], tuple[int | None, int | None]] = {}


def begin_family() -> None:
    """Make a family of the processes that this one will fork; CANCEL_TIMEOUT 0 wants none."""
    global _folder  # noqa: PLW0603
    if conf.CANCEL_TIMEOUT:
        _folder = Path(tempfile.mkdtemp(prefix="connguard-"))


def join_family() -> None:
    """In a child: end what the dead have left running, and note its own sessions from now on."""
    global _note, _process  # noqa: PLW0603
    if _folder is not None and _folder.is_dir():  # whoever cleans /tmp may have removed it
        _process = os.getpid()
        _end_sessions_of_the_dead(_folder)
        _note = os.open(_folder / str(os.getpid()), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        connection_created.connect(_on_connection_created)


def leave_family() -> None:
    """In a child that has closed its connections."""
    if _folder is not None:
        (_folder / str(os.getpid())).unlink(missing_ok=True)


def end_family() -> None:
    """In the parent, when it has no child any more."""
    global _folder
    folder, _folder = _folder, None
    if folder is not None:
        _end_sessions_of_the_dead(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _on_connection_created(connection: Any, **kwargs: Any) -> None:
    if os.getpid() != _process or not is_registered(connection):
        return
    link = link_to(connection)
    session = link.session(), getattr(link, "port", None)
    _sessions[connection.alias, threading.get_ident()] = session
    text = json.dumps([(alias, *its) for (alias, _), its in _sessions.copy().items()]).encode()
    try:
        os.pwrite(_note, text, 0)
        os.ftruncate(_note, len(text))
    except OSError as error:  # a full disk must not cost a connection
        logger.info("Session not noted: %s", error)


def _end_sessions_of_the_dead(folder: Path) -> None:
    for file in folder.glob("*"):
        try:
            if _is_alive(int(file.name)):
                continue
            text = file.read_text()
            file.unlink()  # another child, that looks at the same time, gets an error
            for alias, session, port in json.loads(text or "[]"):
                if session is not None:
                    end_session(connections[alias], session, port, conf.CANCEL_TIMEOUT)
        except Exception as error:
            logger.info("No session ended for dead process %s: %s", file.name, error)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
