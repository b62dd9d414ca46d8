"""The only door of a server: TLS, the fleet's own calls, and the parts of emulators.

Whoever reaches a SuperLink's port can register keys and run code on it, so that it listens on the
loopback only. This process stands before it and passes on the calls of SuperNodes, which the
SuperLink authenticates, and nothing else. Parts of emulators are served from files, to those who
have a token for them; a token is handed out in an authenticated message.

    python -m fedpeat.federated.flower.gate SETTINGS.json
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

__all__ = ["PARTS_PATH", "GateSettings", "gate", "gate_server", "token_for"]

PARTS_PATH = "/v1/parts"
_FLEET_CALL = re.compile(r"/v1/fleet/[a-z-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BODY_BYTES = 16 * 2**20  # SuperNodes send chunks of 5 MiB
_MAX_CONNECTIONS = 512
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
    """

    host: str
    port: int
    superlink: str
    ca: str
    certificate: str
    key: str
    parts: str
    secret: str


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
            app.state.client = client
            yield

    async def fleet(request: Request) -> Response:
        path = request.scope["raw_path"].decode("latin-1")
        if not _FLEET_CALL.fullmatch(path):
            return _refused(404)
        body = await _body(request)
        if body is None:
            return _refused(413)
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


async def _passed_on(request: Request, path: str, body: bytes) -> Response:
    """Return what the SuperLink answers; 503 while it is away, so that nodes try again."""
    client: httpx.AsyncClient = request.app.state.client
    headers = [(k, v) for k, v in request.headers.items() if k not in _NOT_PASSED_ON]
    try:
        answer = await client.send(
            client.build_request(request.method, path, headers=headers, content=body), stream=True
        )
    except httpx.TransportError:
        return _refused(503)

    async def content() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            await answer.aclose()

    kept = {k: v for k, v in answer.headers.items() if k not in _NOT_PASSED_ON - {"content-length"}}
    return StreamingResponse(content(), answer.status_code, kept)


def _refused(status: int) -> Response:
    return PlainTextResponse("", status)


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
        h11_max_incomplete_event_size=64 * 1024,
    )
    return uvicorn.Server(config)


def main() -> None:
    """Serve until told to end."""
    gate_server(GateSettings(**json.loads(Path(sys.argv[1]).read_text()))).run()


if __name__ == "__main__":
    main()
