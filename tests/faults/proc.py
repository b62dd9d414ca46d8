"""What the kernel says of processes: who started whom, and what they are."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "descendants", "is_same", "kill", "listening_ports", "role_of"]

ROLES = {  # a part of a command line, the most telling first
    "flwr-serverapp": "serverapp",
    "flwr-clientapp": "clientapp",
    "flower-superlink": "superlink",
    "flower-supernode": "supernode",
    "flower-superexec": "superexec",
    "fedpeat.federated.flower.gate": "gate",
}


@dataclass(frozen=True)
class Process:
    """A process; its number may be used again, its number and start together are not."""

    pid: int
    started: str
    role: str


def descendants(pid: int) -> list[Process]:
    """Return a process and all that it started, directly or not, and that still run."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        if process := _process(one):
            found.append(process)
        waiting += children.get(one, [])
    return found


def is_same(process: Process) -> bool:
    """Say whether a process still runs."""
    now = _process(process.pid)
    return now is not None and now.started == process.started


def role_of(command: str) -> str:
    """Return what a command line is in a fleet; empty for none of its programs."""
    return next((role for part, role in ROLES.items() if part in command), "")


def kill(process: Process, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, unless it has ended."""
    if is_same(process):
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def listening_ports() -> set[int]:
    """Return the TCP ports that somebody listens on."""
    lines = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        if Path(table).exists()
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A"}


def _process(pid: int) -> Process | None:
    fields = _stat(pid)
    if not fields or fields[0] == "Z":
        return None
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None
    return Process(pid, fields[19], role_of(command))


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
