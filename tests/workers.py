"""Real Celery workers (and beat) in processes of their own, on the test database."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from django.db import DatabaseError, connection

from tests import own_redis, services
from tests.command import ROOT
from tests.server import Server, eventually


def _redis() -> str:
    """Return the URL of the machine's Redis, or of an embedded one where there is none."""
    url = os.environ.get("CONNGUARD_TEST_REDIS", "redis://127.0.0.1:6379/0")
    if own_redis.answers(url) or services.required():
        return url
    try:
        process, own = own_redis.start()
    except services.ServiceMissing:
        return url  # need_server() says so
    atexit.register(process.kill)
    sys.stderr.write(f"tests: no Redis at {url}; running on an embedded one\n")
    return own


REDIS = _redis()
RABBITMQ = os.environ.get("CONNGUARD_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
TASKS = "tests.celery_project.tasks"


def need(*modules: str) -> None:
    """Skip, saying why, or fail where CI requires everything."""
    for module in modules:
        if find_spec(module) is None:
            _missing(f"{module} is not installed")


def need_server(url: str) -> None:
    """Skip or fail if no broker answers there."""
    from kombu import Connection

    try:
        with Connection(url, connect_timeout=2) as broker:
            broker.ensure_connection(max_retries=1, timeout=2)
    except Exception as error:
        _missing(f"no broker at {url} ({error})")


def _missing(what: str) -> None:
    (pytest.fail if services.required() else pytest.skip)(f"SKIPPED SERVICE: {what}")


class Project:
    """One Celery project: its settings, a queue of its own, and a client to send tasks."""

    def __init__(
        self,
        folder: Path,
        *,
        broker: str = REDIS,
        aliases: dict[str, dict[str, Any]] | None = None,
        connguard: dict[str, Any] | None = None,
        apps: Iterable[str] = (),
        env: dict[str, str] | None = None,
        **celery: Any,
    ) -> None:
        from celery import Celery

        self.prefix = f"connguard-{uuid.uuid4().hex[:12]}"
        self.journal = folder / f"{self.prefix}.journal"
        self._folder = folder
        self._broker = broker
        config = {
            "broker_url": broker,
            "result_backend": REDIS,
            "result_expires": 60,
            "task_default_queue": self.prefix,
            "worker_prefetch_multiplier": 1,
            "broker_connection_retry_on_startup": True,
            "worker_hijack_root_logger": False,
            "control_queue_expires": 10.0,
            **celery,
        }
        if broker.startswith("redis"):  # several runs share one server
            config["broker_transport_options"] = {"global_keyprefix": self.prefix}
        base = connection.settings_dict
        keys = ("ENGINE", "NAME", "HOST", "PORT", "USER", "PASSWORD")
        databases = {
            alias: {**{key: base[key] for key in keys}, **changes}
            for alias, changes in (aliases or {"default": {}}).items()
        }
        project = {
            "databases": databases,
            "apps": [*apps],
            "connguard": connguard or {},
            "celery": config,
        }
        self._env = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.celery_project.settings",
            "PYTHONPATH": str(ROOT),
            "CONNGUARD_CELERY_PROJECT": json.dumps(project),
            "CONNGUARD_JOURNAL": str(self.journal),
            **(env or {}),
        }
        self.client = Celery(self.prefix, set_as_current=False)
        self.client.conf.update({**config, "result_backend": REDIS})

    def send(self, task: str, *args: Any, **options: Any) -> Any:
        """Send a task by its short name; return the AsyncResult."""
        return self.client.send_task(f"{TASKS}.{task}", args, **options)

    def run(self, task: str, *args: Any, **options: Any) -> Any:
        """Send a task and wait for what it returns, or raises."""
        return self.send(task, *args, **options).get(timeout=20)

    def run_many(self, count: int, task: str, *args: Any) -> list[Any]:
        results = [self.send(task, *args) for _ in range(count)]
        return [result.get(timeout=20) for result in results]

    def ask(self, command: str) -> list[Any]:
        """Return what the workers answer to a remote control command."""
        answers = self.client.control.broadcast(command, reply=True, limit=1, timeout=5)
        return [value for answer in answers for value in answer.values()]

    def waiting(self) -> int:
        """Return how many tasks wait in the queue."""
        with self.client.connection_for_read() as broker:
            return int(broker.default_channel.queue_declare(self.prefix).message_count)

    def noted(self, key: str) -> list[Any]:
        """Return what the processes have noted in the journal under ``key``."""
        text = self.journal.read_text() if self.journal.exists() else ""
        lines = text.split("\n")[:-1]  # what follows the last end of a line is still being written
        return [line for line in map(json.loads, lines) if key in line]

    def jobs(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.noted("job") if line["job"] == name]

    def python(self, *arguments: str) -> None:
        """Run Python with the project's settings, to its end."""
        subprocess.run([sys.executable, *arguments], env=self._env, check=True, timeout=60)

    @contextmanager
    def process(self, *arguments: str) -> Iterator[Process]:
        """Run ``celery`` with these arguments until the block ends."""
        command = [sys.executable, "-m", "celery", "-A", "tests.celery_project.app", *arguments]
        process = Process(self, command, self._env, self._folder)
        try:
            yield process
        finally:
            process.stop()
            self.clean()

    @contextmanager
    def worker(self, *arguments: str) -> Iterator[Process]:
        """Run a worker that is ready."""
        arguments = ("worker", "--without-gossip", "--without-mingle", "-l", "info", *arguments)
        with self.process(*arguments, "-n", f"{self.prefix}@host") as process:
            assert eventually(lambda: bool(self.noted("ready")), 60), process.log()
            yield process

    def clean(self) -> None:
        """Remove what is this project's at the broker."""
        if self._broker.startswith("redis"):
            from redis import Redis

            with Redis.from_url(self._broker) as redis:
                for key in redis.scan_iter(f"{self.prefix}*"):
                    redis.delete(key)
        else:
            with self.client.connection_for_write() as broker, broker.channel() as channel:
                channel.queue_delete(self.prefix)
                channel.exchange_delete(self.prefix)
        self.client.close()


class Process:
    """A running ``celery`` process; its output goes to a file."""

    def __init__(self, project: Project, command: list[str], env: dict[str, str], folder: Path):
        self._log = folder / f"{project.prefix}-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
        self.pid = self._process.pid

    def log(self) -> str:
        return self._log.read_text()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self, seconds: float = 15) -> int:
        """Shut down warmly; return the exit status."""
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode


def end(server: Server, numbers: Iterable[int]) -> None:
    """Terminate these connections at the server, as its restart would."""
    for number in still_open(server, numbers):
        with suppress(DatabaseError):  # it has ended meanwhile
            server.end(number)
    assert eventually(lambda: not still_open(server, numbers))
    time.sleep(0.05)  # for the goodbye to arrive at the client


def still_open(server: Server, numbers: Iterable[int]) -> set[int]:
    """Return which of these connections the server still has."""
    return set(numbers) & set(server.sessions())
