"""Which sockets a process and its children listen on, from Linux's own tables."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

__all__ = ["family_of", "listening"]


def family_of(pid: int) -> set[int]:
    """Return a process and all its children, and theirs."""
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for parent in new for child in _children(parent)} - found
    return found


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Return the addresses and ports on which processes listen."""
    inodes = {inode for pid in pids for inode in _inodes(pid)}
    places = set()
    for name, size in (("tcp", 4), ("tcp6", 16)):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # it listens
                address, port = fields[1].split(":")
                places.add((_address(address, size), int(port, 16)))
    return places


def _children(pid: int) -> set[int]:
    children: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children |= {int(number) for number in path.read_text().split()}
        except OSError:  # it has just ended
            continue
    return children


def _inodes(pid: int) -> set[str]:
    found = set()
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(path)  # noqa: PTH115 - no path, but "socket:[12345]"
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass
    return found


def _address(text: str, size: int) -> str:
    words = bytes.fromhex(text)  # in the order of this machine, four bytes at a time
    raw = b"".join(
        struct.pack("!I", *struct.unpack("=I", words[i : i + 4])) for i in range(0, size, 4)
    )
    return socket.inet_ntop(socket.AF_INET if size == 4 else socket.AF_INET6, raw)
