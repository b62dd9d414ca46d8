"""A network that can be cut: passes on bytes between devices and the server, until told not to."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

__all__ = ["Network"]

_CHUNK = 2**16


class Network:
    """Listens on a port of the loopback and passes everything on to another.

    Args:
        target: Port of the server.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._is_cut = False
        self._links: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def port(self) -> int:
        """Where devices find the server."""
        return int(self._listening.getsockname()[1])

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        with self._lock:
            self._is_cut = True
            links, self._links = self._links, set()
        for link in links:
            _close(link)

    def mend(self) -> None:
        """Let connections through again."""
        with self._lock:
            self._is_cut = False

    def close(self) -> None:
        """End."""
        self.cut()
        _close(self._listening)

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            _close(near)
            return
        far.settimeout(None)
        with self._lock:
            if not self._is_cut:
                self._links |= {near, far}
        if near not in self._links:
            _close(near)
            _close(far)
            return
        threading.Thread(target=_pump, args=(near, far), daemon=True).start()
        _pump(far, near)
        with self._lock:
            self._links -= {near, far}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK):
            sink.sendall(chunk)
    _close(source)
    _close(sink)


def _close(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()
