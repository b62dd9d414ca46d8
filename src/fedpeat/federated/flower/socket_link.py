"""One message to the worker of a device and its answer back, over a Unix socket.

A request is its kind and its content, an answer a flag (1 for a payload, 0 for the reason why there
is none) and content; each text or content comes after its length in 8 bytes, the high one first.
"""

from __future__ import annotations

import socket
from pathlib import Path

from fedpeat.core.errors import WireError

__all__ = ["SOCKET_KEY", "ask", "receive", "send"]

SOCKET_KEY = "fedpeat-socket"
"""Where the configuration of a SuperNode says which socket it is."""

_MAX_BYTES = 2**34
_CHUNK = 2**20


def ask(path: Path, kind: str, content: bytes) -> bytes:
    """Return what the worker answers.

    Raises:
        WireError: If it says why it cannot answer.
        OSError: If there is no worker, or it goes away.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        send(link, kind.encode())
        send(link, content)
        flag, answer = receive(link), receive(link)
    if flag != b"1":
        raise WireError(answer.decode(errors="replace"))
    return answer


def send(link: socket.socket, content: bytes) -> None:
    """Send one piece."""
    link.sendall(len(content).to_bytes(8, "big"))
    if content:  # else the other side may have answered and gone already
        link.sendall(content)


def receive(link: socket.socket) -> bytes:
    """Return one piece.

    Raises:
        ConnectionError: If the other side goes away in the middle, or says that it sends too much.
    """
    length = int.from_bytes(_exactly(link, 8), "big")
    if length > _MAX_BYTES:
        raise ConnectionError(f"a piece must have at most {_MAX_BYTES} bytes, got {length}")
    return _exactly(link, length)


def _exactly(link: socket.socket, length: int) -> bytes:
    content = bytearray(length)
    view = memoryview(content)
    filled = 0
    while filled < length:
        got = link.recv_into(view[filled : filled + _CHUNK])
        if got == 0:
            raise ConnectionError(f"the link ended after {filled} of {length} bytes")
        filled += got
    return bytes(content)
