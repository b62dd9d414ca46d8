"""One message to the worker of a device and its answer back, over a Unix socket.

A request is its kind and its content, an answer a flag (1 for a payload, 0 for the reason why there
is none) and content; each text or content comes after its length in 8 bytes, the high one first.
"""

from __future__ import annotations

import socket
from pathlib import Path

from fedpeat.core.errors import WireError

__all__ = ["SOCKET_KEY", "ask", "receive", "receive_kind", "send"]

SOCKET_KEY = "fedpeat-socket"
"""Where the configuration of a SuperNode says which socket it is."""

_MAX_BYTES = 2**34
_MAX_KIND_BYTES = 64
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


def receive_kind(link: socket.socket) -> str:
    """Return the kind of a message.

    Raises:
        ConnectionError: As ``receive``.
        UnicodeDecodeError: If it is no text.
    """
    return receive(link, _MAX_KIND_BYTES).decode()


def receive(link: socket.socket, max_bytes: int = _MAX_BYTES) -> bytes:
    """Return one piece; its memory is taken as it comes, not as its length is claimed.

    Raises:
        ConnectionError: If the other side goes away in the middle, or says that it sends too much.
    """
    length = int.from_bytes(_exactly(link, 8), "big")
    if length > max_bytes:
        raise ConnectionError(f"a piece must have at most {max_bytes} bytes, got {length}")
    return _exactly(link, length)


def _exactly(link: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        got = link.recv(min(_CHUNK, length - len(content)))
        if not got:
            raise ConnectionError(f"the link ended after {len(content)} of {length} bytes")
        content += got
    return bytes(content)
