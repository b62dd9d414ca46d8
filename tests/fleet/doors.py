"""A gate with a SuperLink behind it, both in threads of the test, over real TLS on the loopback."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from fedpeat.federated.flower.gate import GateSettings, gate_server
from fedpeat.federated.flower.keys import ServerKeys, make_keys, server_keys

__all__ = ["Door", "FakeSuperLink", "cutting_server", "keys_in", "open_gate", "served"]


def keys_in(folder: Path) -> ServerKeys:
    """Make the keys of a server and two devices; return the server's."""
    make_keys(folder, ["localhost", "127.0.0.1"], ["client-00", "client-01"])
    return server_keys(folder / "server")


@dataclass
class FakeSuperLink:
    """Answers every request, and remembers it; with a mailbox, as one in which all are known.

    Attributes:
        seen: Method, path, headers and body of each request.
        mailbox: What those who ask are given, one at a time; then nothing.
        before_answer: Is called before each answer, and may say with which status it is refused.
    """

    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    mailbox: list[bytes] | None = None
    before_answer: Callable[[], int | None] = lambda: None

    def forget(self) -> None:
        """Be as at the beginning."""
        self.seen.clear()
        self.mailbox, self.before_answer = None, lambda: None

    def app(self) -> Starlette:
        async def answer(request: Request) -> Response:
            body, path = await request.body(), request.scope["raw_path"].decode()
            self.seen.append((request.method, path, dict(request.headers), body))
            if refused := self.before_answer():
                return Response(b"refused", refused)
            if self.mailbox is not None:
                return Response(self.mailbox.pop(0) if self.mailbox else b"")
            return Response(b"answer to " + body, 418, {"x-flower": "yes"})

        app = Starlette()
        app.add_route("/{path:path}", answer, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
        return app


@contextmanager
def served(server: uvicorn.Server) -> Iterator[int]:
    """Serve from a thread; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10)


@dataclass(frozen=True)
class Door:
    """Where a gate is, and what is behind it."""

    port: int
    settings: GateSettings
    superlink: FakeSuperLink

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def parts(self) -> Path:
        return Path(self.settings.parts)

    @property
    def secret(self) -> Path:
        return Path(self.settings.secret)

    def client(self) -> httpx.Client:
        """Return a client that takes the server for the one it is."""
        context = ssl.create_default_context(cafile=self.settings.ca)
        return httpx.Client(base_url=self.url, verify=context)

    def send(self, content: bytes) -> bytes:
        """Send bytes over TLS as they are, and return all that comes back."""
        context = ssl.create_default_context(cafile=self.settings.ca)
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as link,
        ):
            link.sendall(content)
            return b"".join(iter(lambda: link.recv(65536), b""))


@contextmanager
def open_gate(folder: Path, keys: ServerKeys, superlink_keys: ServerKeys) -> Iterator[Door]:
    """Open a gate; its SuperLink may have other keys."""
    superlink = FakeSuperLink()
    behind = uvicorn.Config(
        superlink.app(),
        ws="none",
        log_level="critical",
        timeout_graceful_shutdown=1,  # TLS waits 30 s for a goodbye
        ssl_certfile=superlink_keys.certificate,
        ssl_keyfile=superlink_keys.key,
    )
    (folder / "parts").mkdir()
    (folder / "parts.secret").write_bytes(b"a secret of the server")
    with served(uvicorn.Server(behind)) as behind_port:
        settings = GateSettings(
            "127.0.0.1",
            0,
            f"127.0.0.1:{behind_port}",
            str(keys.ca),
            str(keys.certificate),
            str(keys.key),
            str(folder / "parts"),
            str(folder / "parts.secret"),
            str(folder / "bell"),
        )
        with served(gate_server(settings)) as port:
            yield Door(port, settings, superlink)


@contextmanager
def cutting_server(
    keys: ServerKeys, answer: Callable[[bytes], bytes]
) -> Iterator[tuple[str, list[bytes]]]:
    """Answer each request over TLS with bytes of one's own, and close; yield place and requests."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys.certificate, keys.key)
    requests: list[bytes] = []

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            with plain, context.wrap_socket(plain, server_side=True) as link:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += link.recv(65536)
                requests.append(head)
                link.sendall(answer(head))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield f"localhost:{listening.getsockname()[1]}", requests
        listening.shutdown(socket.SHUT_RDWR)
