"""The sockets of this process and its children, from Linux's /proc (proc_pid_fd(5), proc_net(5)).

A connection opened past Django is told by them: its local port is what the server lists as the
client's. Where there is no /proc nothing is found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
ESTABLISHED = "01"

_SOCKET = re.compile(r"socket:\[(\d+)\]")


def held_by(pid: int) -> set[int]:
    """Return the inodes of the sockets that a process holds."""
    inodes = set()
    # OSError here and below: it has ended, or has closed the descriptor, while we look.
    with suppress(OSError):
        for entry in os.scandir(PROC / str(pid) / "fd"):
            with suppress(OSError):
                if found := _SOCKET.fullmatch(os.readlink(entry)):
                    inodes.add(int(found[1]))
    return inodes


def descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, and those that they have started."""
    found: set[int] = set()
    with suppress(OSError):
        for task in os.listdir(PROC / str(pid) / "task"):
            with suppress(OSError):
                text = (PROC / str(pid) / "task" / task / "children").read_text()
                for child in map(int, text.split()):
                    found |= {child} | descendants(child)
    return found


def local_ports(pid: int, inodes: Collection[int], remote_ports: Collection[int]) -> dict[int, int]:
    """Return, by inode, the local port of each socket that is connected to one of the ports."""
    ports = {}
    for family in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (PROC / str(pid) / "net" / family).read_text().splitlines()[1:]:
                _, local, remote, state, *_ = fields = line.split()
                if (
                    state == ESTABLISHED
                    and int(fields[9]) in inodes
                    and _port(remote) in remote_ports
                ):
                    ports[int(fields[9])] = _port(local)
    return ports


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)
