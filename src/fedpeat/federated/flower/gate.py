"""The only door of a server: TLS, the fleet's own calls, and the parts of emulators.

Whoever reaches a SuperLink's port can register keys and run code on it, so that it listens on the
loopback only. This process stands before it and passes on the calls of SuperNodes, which the
SuperLink authenticates, and nothing else. Parts of emulators are served from files, to those who
have a token for them; a token is handed out in an authenticated message.

A SuperNode that is told that there is no message for it looks again 3 s later. So the gate keeps
it waiting instead, and asks the SuperLink again when the server has sent messages, which it says by
touching a file, the bell.

    python -m fedpeat.federated.flower.gate SETTINGS.json
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import socket
import ssl
import sys
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

__all__ = ["PARTS_PATH", "GateSettings", "gate", "gate_server", "token_for"]

PARTS_PATH = "/v1/parts"
_PULL = "/v1/fleet/pull-messages"
_FLEET_CALL = re.compile(r"/v1/fleet/[a-z-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BODY_BYTES = 16 * 2**20  # SuperNodes send chunks of 5 MiB
_MAX_CONNECTIONS = 512
_HOLD_SECONDS = 10.0  # a SuperNode gives up an answer after 30 s
_LOOK_SECONDS = 0.05
_END_SECONDS = 2  # for connections to close; TLS waits 30 s for a goodbye of who is silent
_NOT_PASSED_ON = {"host", "connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass(frozen=True)
class GateSettings:
    """What a gate needs to know.

    Attributes:
        host: Address to listen on.
        port: Port to listen on.
        superlink: Address of the SuperLink, "127.0.0.1:PORT".
        ca: Certificate of the authority.
        certificate: Certificate of the server.
        key: Private key of the server.
        parts: Folder with parts of emulators, each called by its hash.
        secret: File with the secret that tokens are made with.
        bell: File that is touched whenever messages were sent.
    """

    host: str
    port: int
    superlink: str
    ca: str
    certificate: str
    key: str
    parts: str
    secret: str
    bell: str


class _Bell:
    """Wakes those who wait, whenever a file is touched."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.next = asyncio.Event()
        self.is_over = False

    async def watch(self) -> None:
        """Look at the file for ever."""
        last = self._moment()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if (moment := self._moment()) != last:
                last, rung, self.next = moment, self.next, asyncio.Event()
                rung.set()

    def end(self) -> None:
        """Wake all, for the last time."""
        self.is_over = True
        self.next.set()

    def _moment(self) -> int:
        with suppress(OSError):
            return self._path.stat().st_mtime_ns
        return 0


def token_for(secret: bytes, sha256: str, expiry: int) -> str:
    """Return the token with which a part can be fetched until ``expiry`` [s since 1970]."""
    text = f"{sha256}.{expiry}".encode()
    return f"{expiry}.{hmac.new(secret, text, hashlib.sha256).hexdigest()}"


def gate(settings: GateSettings) -> Starlette:
    """Return the application."""
    secret = Path(settings.secret).read_bytes()
    parts = Path(settings.parts)
    upstream = ssl.create_default_context(cafile=settings.ca)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        time_out = httpx.Timeout(60, connect=5)
        async with httpx.AsyncClient(
            base_url=f"https://{settings.superlink}", verify=upstream, timeout=time_out
        ) as client:
            app.state.client, app.state.bell = client, _Bell(Path(settings.bell))
            watching = asyncio.create_task(app.state.bell.watch())
            try:
                yield
            finally:
                watching.cancel()

    async def fleet(request: Request) -> Response:
        path = request.scope["raw_path"].decode("latin-1")
        if not _FLEET_CALL.fullmatch(path):
            return _refused(404)
        body = await _body(request)
        if body is None:
            return _refused(413)
        if path == _PULL:
            return await _held(request, body)
        return await _passed_on(request, path, body)

    async def health(request: Request) -> Response:
        return await _passed_on(request, "/health", b"")

    async def part(request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not _SHA256.fullmatch(sha256) or not _is_valid(given, secret, sha256):
            return _refused(401)
        if not (path := parts / sha256).is_file():
            return _refused(404)
        return FileResponse(path, media_type="application/octet-stream")

    app = Starlette(
        routes=[
            Route("/v1/fleet/{call}", fleet, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            Route(f"{PARTS_PATH}/{{sha256}}", part, methods=["GET"]),
        ],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _is_valid(token: str, secret: bytes, sha256: str) -> bool:
    expiry, _, _ = token.partition(".")
    if not (expiry.isascii() and expiry.isdigit() and len(expiry) <= 12):
        return False
    wanted = token_for(secret, sha256, int(expiry))
    return hmac.compare_digest(token.encode(), wanted.encode()) and time.time() < int(expiry)


async def _body(request: Request) -> bytes | None:
    """Return the body of a request; None if it is too long."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _MAX_BODY_BYTES:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


async def _held(request: Request, body: bytes) -> Response:
    """Return what the SuperLink answers to who asks for messages, in a while if there are none.

    The signature of the question stands for 5 minutes. Who has gone is not asked for again: a
    message is handed out once.
    """
    bell: _Bell = request.app.state.bell
    end = time.monotonic() + _HOLD_SECONDS
    gone = asyncio.ensure_future(request.receive())
    found: Response | None = None
    try:
        while True:
            ring = bell.next  # taken before the question, so that none in between is missed
            try:
                answer = await _asked(request, _PULL, body)
                async with aclosing(answer):
                    content = b"".join([chunk async for chunk in answer.aiter_raw()])
            except httpx.TransportError:
                return found or _refused(503)
            is_message = answer.status_code == httpx.codes.OK and content
            if found is None or is_message:
                found = Response(content, answer.status_code, _kept(answer))
            if is_message or answer.status_code != httpx.codes.OK:
                return found
            if not await _rings(ring, gone, end - time.monotonic()) or bell.is_over:
                return found
    finally:
        gone.cancel()


async def _rings(ring: asyncio.Event, gone: asyncio.Future[Any], seconds: float) -> bool:
    """Say whether the bell rings before so many seconds are over and before who waits has gone."""
    rung = asyncio.ensure_future(ring.wait())
    await asyncio.wait((rung, gone), timeout=max(0.0, seconds), return_when=FIRST_COMPLETED)
    rung.cancel()
    return seconds > 0 and ring.is_set() and not gone.done()


async def _asked(request: Request, path: str, body: bytes) -> httpx.Response:
    """Return the answer of the SuperLink, whose content is still to be read."""
    client: httpx.AsyncClient = request.app.state.client
    headers = [(k, v) for k, v in request.headers.items() if k not in _NOT_PASSED_ON]
    question = client.build_request(request.method, path, headers=headers, content=body)
    return await client.send(question, stream=True)


def _kept(answer: httpx.Response) -> dict[str, str]:
    """Return the headers of an answer that are passed on."""
    return {k: v for k, v in answer.headers.items() if k not in _NOT_PASSED_ON - {"content-length"}}


async def _passed_on(request: Request, path: str, body: bytes) -> Response:
    """Return what the SuperLink answers; 503 while it is away, so that nodes try again."""
    try:
        answer = await _asked(request, path, body)
    except httpx.TransportError:
        return _refused(503)

    async def content() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            await answer.aclose()

    return StreamingResponse(content(), answer.status_code, _kept(answer))


def _refused(status: int) -> Response:
    return PlainTextResponse("", status)


class _Server(uvicorn.Server):
    """A server that lets nobody wait once it is to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.bell.end()  # type: ignore[union-attr] # it is our own
        await super().shutdown(sockets)


def gate_server(settings: GateSettings) -> uvicorn.Server:
    """Return the server that lets in only TLS, and only so many at a time."""
    config = uvicorn.Config(
        gate(settings),
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
        http="h11",  # it bounds the length of a head, which others do not
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_END_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return _Server(config)


def main() -> None:
    """Serve until told to end."""
    gate_server(GateSettings(**json.loads(Path(sys.argv[1]).read_text()))).run()


if __name__ == "__main__":
    main()
