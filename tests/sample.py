"""The sample project on the server under test: its commands, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.db import connection

from tests import services
from tests.server import Server

server_only = pytest.mark.skipif(services.vendor() == "sqlite", reason="SQLite has no server")

MANAGE = Path(__file__).resolve().parent.parent / "sample_project" / "manage.py"
# With several drivers installed, the one under test is had by hiding what Django prefers to it.
HIDDEN = {"psycopg2": ["psycopg"], "pymysql": ["MySQLdb"]}.get(services.driver(), [])

Process = subprocess.Popen[str]


class Project:
    """The sample project with an environment of its own, and with some packages hidden."""

    def __init__(self, folder: Path, hidden: Sequence[str] = (), **environment: str) -> None:
        lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in hidden)]
        (folder / "sitecustomize.py").write_text("\n".join(lines))
        self._environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
        self._environment.pop("DJANGO_SETTINGS_MODULE", None)

    def start(self, *arguments: str, **environment: str) -> Process:
        return subprocess.Popen(
            [sys.executable, str(MANAGE), *arguments],
            env={**self._environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def celery(self, *arguments: str, **environment: str) -> Iterator[Process]:
        """A Celery process that runs meanwhile, started as the README says."""
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "celery",
                f"--workdir={MANAGE.parent}",
                "-A",
                "sample",
                *arguments,
            ],
            env={**self._environment, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(self, *arguments: str, **environment: str) -> str:
        """Run a command to its end and return what it writes."""
        return finish(self.start(*arguments, **environment))[0]

    def call(self, code: str, **environment: str) -> Any:
        """Return the value that ``code`` gives to ``result``."""
        code = f"import json\nfrom shop.jobs import *\n{code}\nprint(json.dumps(result))"
        return json.loads(self.run("shell", "-v", "0", "-c", code, **environment))

    @contextmanager
    def running(self, *arguments: str, **environment: str) -> Iterator[Process]:
        """A command that runs meanwhile."""
        process = self.start(*arguments, **environment)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def finish(process: Process) -> tuple[str, str]:
    """Wait for a process to end well; return what it wrote."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    return output, errors


def end_sessions(process: Process, server: Server) -> None:
    """End the process's sessions at the server while it sleeps, however slow the server is."""
    process.send_signal(signal.SIGSTOP)
    assert server.count() == 1
    server.end_all()
    process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def database(
    django_db_setup: None, django_db_blocker: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The name of a new database on the server under test."""
    if connection.vendor == "sqlite":
        yield str(tmp_path_factory.mktemp("sample") / "sample.sqlite3")
        return
    name = f"{connection.settings_dict['NAME']}_sample"
    administrator = connection.copy()
    with django_db_blocker.unblock():
        Server(administrator).rows(f"CREATE DATABASE {name}")
    yield name
    with django_db_blocker.unblock():
        Server(administrator).rows(f"DROP DATABASE {name}")
    administrator.close()


def database_url(name: str) -> str:
    if connection.vendor == "sqlite":
        return f"sqlite:///{name}"
    at = connection.settings_dict
    account = f"{connection.vendor}://{quote(at['USER'])}:{quote(at['PASSWORD'])}"
    if at["HOST"].startswith("/"):  # of a socket
        return f"{account}@/{name}?host={at['HOST']}"
    return f"{account}@{at['HOST']}:{at['PORT']}/{name}"


@pytest.fixture(scope="module")
def migrated(database: str, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    project = Project(folder, hidden=HIDDEN, DATABASE_URL=database_url(database))
    project.run("migrate")
    return project


@contextmanager
def look_into(database: str) -> Iterator[Server]:
    wrapper = connection.copy()
    wrapper.settings_dict["NAME"] = database
    try:
        yield Server(wrapper)
    finally:
        wrapper.close()


@pytest.fixture
def server(database: str) -> Iterator[Server]:
    """The server's view of the project's database."""
    with look_into(database) as view:
        yield view


@pytest.fixture
def project(migrated: Project, server: Server) -> Project:
    """The project on the server under test, with no orders yet."""
    server.rows("DELETE FROM shop_shipment")
    server.rows("DELETE FROM shop_order")
    return migrated
