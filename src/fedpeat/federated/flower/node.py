"""A SuperNode that is to be started again whenever it fails.

A SuperNode that is killed cannot say goodbye, and the SuperLink, which takes it for online for a
minute, lets no other in with its key meanwhile. Whoever starts it again knows better, and says so
first. And one whose connection is cut in a TLS handshake, or whose heartbeat fails, gives up, but
its process stays: this one ends.

    python -m fedpeat.federated.flower.node LOG SERVER CA KEY flower-supernode ...
"""

from __future__ import annotations

import os
import re
import ssl
import sys
import threading
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

__all__ = ["last_node_id", "run", "say_goodbye"]

_NODE_ID = re.compile(rb"SuperNode ID: (\d{1,20})\b")
_TAIL_BYTES = 2**20
_TIME_OUT_SECONDS = 5.0


def last_node_id(log: Path) -> int | None:
    """Return the number that the SuperLink last gave the SuperNode that wrote a log, if any."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            found = _NODE_ID.findall(file.read())
    except OSError:
        return None
    return int(found[-1]) if found else None


def say_goodbye(server: str, ca: Path, key: Path, node_id: int) -> str:
    """Tell the SuperLink that a SuperNode is gone.

    Args:
        server: Where the server is, "HOST:PORT".
        ca: Certificate of the authority.
        key: Private key of the device.
        node_id: Number of the SuperNode.

    Returns:
        Why that could not be told; empty if it was.
    """
    private = load_ssh_private_key(key.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        return f"a device's key must be on an elliptic curve, got {type(private).__name__}"
    client = FleetHttpClient(
        f"https://{server}",
        interceptors=[NodeAuthHttpInterceptor(private, private.public_key())],
        verify=ssl.create_default_context(cafile=ca),
        timeout=_TIME_OUT_SECONDS,
    )
    try:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except (httpx.HTTPError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        client.close()
    return ""


def run(supernode: Callable[[], object]) -> int:
    """Run a SuperNode; return how its process is to end, since it is not meant to."""
    try:
        supernode()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, the next one tries again
        traceback.print_exc()
    return 1


def _end_with_thread(failure: threading.ExceptHookArgs) -> None:
    """End the process if a thread of it fails: without a heartbeat it is not reached any more."""
    traceback.print_exception(failure.exc_value)
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    """Say goodbye for the SuperNode before, whatever comes of it, and be the next one."""
    log, server, ca, key, *sys.argv = sys.argv[1:]
    node_id = last_node_id(Path(log))
    if node_id is not None:
        say_goodbye(server, Path(ca), Path(key), node_id)
    (command,) = entry_points(group="console_scripts", name="flower-supernode")
    threading.excepthook = _end_with_thread
    code = run(command.load())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Flower's own server in a thread would keep the process


if __name__ == "__main__":
    main()
