"""Who on this host holds a SQLite file open, read from /proc (proc_pid_fd(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from django_connguard.connstats.probe import OPEN, Capacity, Probe, ServerConnection

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Handle:
    """One open file descriptor."""

    pid: int
    program: str
    owner: str


@dataclass(slots=True)
class Scan:
    """What was found, and what may have been missed."""

    found: list[Handle] = field(default_factory=list)
    closed_to_us: int = 0  # processes whose descriptors we may not list
    impossible: str = ""

    def notes(self) -> list[str]:
        if self.impossible:
            return [self.impossible]
        if self.closed_to_us:
            count = self.closed_to_us
            what = "1 process" if count == 1 else f"{count} processes"
            text = f"{what} of other users may not be looked into, and may hold the file open too."
            return [text]
        return []


def database_file(name: str | os.PathLike[str]) -> Path:
    """The file of a SQLite NAME, which may be a URI (sqlite.org/uri.html)."""
    text = os.fspath(name)
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    return Path(text)


def scan(file: Path) -> Scan:
    """Find the open handles on a file; one row per handle, so a process may appear twice."""
    result = Scan()
    if not (PROC / "self" / "fd").is_dir():
        result.impossible = "Open handles cannot be counted: this system has no /proc."
        return result
    try:
        wanted = file.stat()
    except OSError as error:
        result.impossible = f"The database file {file} cannot be looked at: {error.strerror}."
        return result
    # Names first: a stat of every descriptor would touch every mounted file system.
    name = file.resolve().name
    for process in PROC.iterdir():
        if not process.name.isdigit():
            continue
        try:
            count = _handles(process / "fd", name, wanted)
            if count:
                result.found += [_describe(process)] * count
        except PermissionError:
            result.closed_to_us += 1
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended while we looked
    return result


def _handles(folder: Path, name: str, wanted: os.stat_result) -> int:
    count = 0
    for descriptor in os.listdir(folder):
        link = folder / descriptor
        try:
            same = os.path.basename(os.readlink(link)) == name
            count += same and os.path.samestat(link.stat(), wanted)
        except FileNotFoundError:
            pass  # closed while we looked
    return count


def _describe(process: Path) -> Handle:
    try:
        owner = process.owner()
    except KeyError:  # a user id that this host has no name for, as in containers
        owner = str(process.stat().st_uid)
    return Handle(int(process.name), (process / "comm").read_text().strip(), owner)


class SQLiteProbe(Probe):
    """The open handles on a database file, held by this host's processes."""

    @property
    def in_memory(self) -> bool:
        return bool(self._wrapper.is_in_memory_db())

    def connections(self) -> list[ServerConnection]:
        return [
            ServerConnection(
                id=handle.pid,
                application=handle.program,
                user=handle.owner,
                client="local file",
                state=OPEN,
                age=None,
                idle=None,
            )
            for handle in self._scan().found
        ]

    def capacity(self) -> Capacity:
        return Capacity(maximum=None, reserved=0, in_use=len(self._scan().found))

    def notes(self) -> list[str]:
        if self.in_memory:
            return ["The database is in this process's memory: nobody else can open it."]
        return self._scan().notes()

    def _scan(self) -> Scan:
        # No connection: opening one would create the file.
        if self.in_memory:
            return Scan()
        return scan(database_file(self._wrapper.settings_dict["NAME"]))
