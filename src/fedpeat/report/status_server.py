"""A small web server that shows where a run stands; it reads, and can be told nothing.

It is built on the standard library's, held to less than that can do: GET and HEAD, three fixed
paths, one request per connection, a head of bounded size that must arrive in bounded time, and a
bounded number of connections.
"""

from __future__ import annotations

import errno
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from fedpeat.core.errors import ConfigError
from fedpeat.report import prometheus
from fedpeat.report.access import Access, is_loopback, make_access
from fedpeat.report.live_page import live_page, policy
from fedpeat.report.standing import Standing
from fedpeat.report.watching import RunWatcher

__all__ = ["DEFAULT_PORT", "StatusServer"]

DEFAULT_PORT: Final = 8321
_MOST_HEAD_BYTES: Final = 16_384
_MOST_CONNECTIONS: Final = 32
_TIMEOUT_SECONDS: Final = 5.0
"""For a request to arrive, and again for the answer to be taken."""
_DRAIN_SECONDS: Final = 0.5

PAGES: dict[str, tuple[str, Callable[[Standing], str]]] = {
    "/": ("text/html; charset=utf-8", live_page),
    "/status.json": (
        "application/json",
        lambda standing: json.dumps(standing.record(), allow_nan=False) + "\n",
    ),
    "/metrics": (prometheus.CONTENT_TYPE, prometheus.exposition),
}
"""What there is to ask for; nothing else is, and no path is one of a file."""

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": policy(),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 2\r\n"
    b"Connection: close\r\n\r\n"
)


class StatusServer:
    """Shows a run folder as a live page, as JSON and to Prometheus, from a thread of its own.

    Args:
        folder: The run folder, ``runs/NAME``.
        host: Where to listen: loopback, unless told otherwise.
        port: Where to listen; 0 for any free port.
        token: What clients must bring, as ``Authorization: Bearer``, as ``?token=`` or in the
            cookie that the latter sets. Where it is None, one is made up unless the server listens
            on loopback, where anybody on this machine may look.
        allowed_hosts: More names that clients may ask for, such as that of a proxy in front.
        max_connections: Clients that are answered at a time; further ones are told to come again.
        must_be_run: Whether the folder has to be that of a run already; where the run begins only
            later, the page says so until then.

    Raises:
        DataError: If the folder is no run folder, but must be one.
        ConfigError: If the token is no safe one, or there is no listening at that place.

    Example:
        with StatusServer(Path("runs/demo")) as server:
            print(server.url)
    """

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        token: str | None = None,
        *,
        allowed_hosts: Sequence[str] = (),
        max_connections: int = _MOST_CONNECTIONS,
        must_be_run: bool = True,
    ) -> None:
        self._watcher = RunWatcher(folder, must_be_run=must_be_run)
        if not 0 <= port <= 65535:
            raise ConfigError(f"the port must be in [0, 65535], got {port}")
        family, address = _resolved(host, port)
        self.is_open = not is_loopback(address[0])
        """Whether others than this machine can reach it."""
        names = (host, *allowed_hosts)
        access = make_access(names, token, needs_token=self.is_open)
        self._is_made_up = token is None and self.is_open
        self._server = _listen(family, address, max_connections)
        self.port: int = self._server.server_address[1]
        """Where it listens."""
        # cookies of several servers on one host differ by the port
        self._access = replace(access, cookie_name=f"fedpeat_{self.port}")
        self._host = host
        self._server.answer = self._answer
        self._made: dict[str, tuple[Standing, str]] = {}
        self._thread: threading.Thread | None = None

    @property
    def token(self) -> str | None:
        """What clients must bring; None if nothing."""
        return self._access.token

    @property
    def url(self) -> str:
        """The address of the page, with the token where it was made up."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        if self._host in {"0.0.0.0", "::", ""}:  # noqa: S104 - only told apart
            host = socket.gethostname()
        query = f"?token={self.token}" if self._is_made_up else ""
        return f"http://{host}:{self.port}/{query}"

    def start(self) -> StatusServer:
        """Begin to answer, in a thread that ends with the process."""
        assert self._thread is None, "started once"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="fedpeat-status", daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop answering and give the port back; again is no error."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def __enter__(self) -> StatusServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _answer(self, method: str, target: str, headers: Message) -> _Answer:
        return respond(self._content, self._access, method, target, headers)

    def _content(self, path: str) -> str:
        """Return one of PAGES, made anew only when something has changed, however many look."""
        standing = self._watcher.standing()
        made_for, content = self._made.get(path, (None, ""))
        if made_for is not standing:
            content = PAGES[path][1](standing)
            self._made[path] = (standing, content)
        return content


class _Answer:
    """Status, headers and content of what is sent back."""

    def __init__(
        self,
        status: HTTPStatus,
        content: str = "",
        content_type: str = "text/plain; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.content = content.encode("utf-8", "replace")
        self.headers = {
            **_HEADERS,
            "Content-Type": content_type,
            **(headers or {}),
        }


def respond(
    content_of: Callable[[str], str], access: Access, method: str, target: str, headers: Message
) -> _Answer:
    """Return the answer to a request: a refusal, or one of PAGES."""
    try:
        parts = urlsplit(target)
        offered = parse_qs(parts.query, max_num_fields=8).get("token", [""])[0]
    except ValueError:
        return _Answer(HTTPStatus.BAD_REQUEST, "the address cannot be read\n")
    refused = _refused(access, method, headers, offered)
    if refused is not None:
        return refused
    if parts.path not in PAGES or parts.scheme or parts.netloc:
        return _Answer(HTTPStatus.NOT_FOUND, f"there are {', '.join(PAGES)}\n")
    content = content_of(parts.path)
    more = {"ETag": f'"{hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()[:32]}"'}
    if offered and access.token:
        more["Set-Cookie"] = access.cookie()
    if headers.get("If-None-Match") == more["ETag"]:
        return _Answer(HTTPStatus.NOT_MODIFIED, headers=more)
    return _Answer(HTTPStatus.OK, content, PAGES[parts.path][0], more)


def _refused(access: Access, method: str, headers: Message, offered: str) -> _Answer | None:
    """Return why a request is not answered, None if it is; the checks in their order."""
    hosts = headers.get_all("Host") or []
    if len(hosts) != 1:
        return _Answer(HTTPStatus.BAD_REQUEST, "one header Host is needed\n")
    if not access.allows_host(hosts[0]):
        return _Answer(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name\n")
    if method not in {"GET", "HEAD"}:
        allow = {"Allow": "GET, HEAD"}
        return _Answer(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n", headers=allow)
    if not access.allows(headers.get("Authorization", ""), headers.get("Cookie", ""), offered):
        ask = {"WWW-Authenticate": 'Bearer realm="fedpeat"'}
        text = "the token is missing or wrong: open the address that the server printed\n"
        return _Answer(HTTPStatus.UNAUTHORIZED, text, headers=ask)
    return None


class _Server(ThreadingMixIn, TCPServer):
    """Takes connections, each in a thread, no more than so many at a time."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    answer: Callable[[str, str, Message], _Answer]

    def __init__(self, family: int, place: Any, max_connections: int) -> None:
        self.address_family = family
        self._free = threading.BoundedSemaphore(max_connections)
        super().__init__(place, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, if one is free."""
        if not self._free.acquire(blocking=False):
            request.settimeout(0)  # the answer fits into the socket's buffer
            try:
                request.sendall(_BUSY)
            except OSError:
                pass
            finally:
                self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that goes away; anything else is a fault of this server."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads one request, whole and in time, and answers it."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def handle(self) -> None:
        """Answer one request, and close."""
        head = _head(self.connection)
        if head is None:
            self._send(_Answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too long\n"))
        elif head:
            self.rfile = BytesIO(head)
            self.raw_requestline = self.rfile.readline()
            if self.parse_request():
                self._send(self.server.answer(self.command, self.path, self.headers))
        _drain(self.connection)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what cannot be parsed; the text does not repeat what was sent."""
        self.request_version = "HTTP/1.1"
        self.command = "GET"
        self._send(_Answer(HTTPStatus(code), "this is no request of HTTP/1.1\n"))

    def _send(self, answer: _Answer) -> None:
        self.connection.settimeout(_TIMEOUT_SECONDS)
        self.requestline = getattr(self, "requestline", "")
        self.request_version = "HTTP/1.1"
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(answer.content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if getattr(self, "command", "GET") != "HEAD" and answer.content:
            self.wfile.write(answer.content)

    def version_string(self) -> str:
        """Return the header ``Server``, without versions."""
        return "fedpeat"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        """Write no log: an address may hold the token."""


def _head(connection: socket.socket) -> bytes | None:
    """Return a request up to its empty line; empty if it does not come in time, None if too long.

    The time is that of the whole, so that no client holds a place by a byte now and then.
    """
    deadline, head = time.monotonic() + _TIMEOUT_SECONDS, b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return b""
        if len(head) > _MOST_HEAD_BYTES:
            return None
        connection.settimeout(remaining)
        try:
            piece = connection.recv(4096)
        except OSError:
            return b""
        if not piece:
            return b""
        head += piece
    return head


def _drain(connection: socket.socket) -> None:
    """Take a little of what is still coming, as closing at once would take the answer back."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    try:
        connection.shutdown(socket.SHUT_WR)
        while (remaining := deadline - time.monotonic()) > 0:
            connection.settimeout(remaining)
            if not connection.recv(65536):
                return
    except OSError:
        return


def _resolved(host: str, port: int) -> tuple[int, Any]:
    """Return the family and the address of a place to listen on."""
    try:
        kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=kind, flags=flags)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}: no such host ({_why(error)})") from error
    return family, address


def _listen(family: int, address: Any, max_connections: int) -> _Server:
    """Return a server that listens, or raise one line that says why it cannot."""
    try:
        return _Server(family, address, max_connections)
    except OSError as error:
        is_used = error.errno == errno.EADDRINUSE
        why = "the port is in use; choose another" if is_used else _why(error)
        place = f"{address[0]}, port {address[1]}"
        raise ConfigError(f"cannot listen on {place}: {why}") from error


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
