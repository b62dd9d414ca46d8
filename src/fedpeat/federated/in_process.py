"""The default transport: all devices in this process, one at a time, in their tasks' order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping

import numpy as np

from fedpeat.core.errors import WireError
from fedpeat.core.records import Reply, Transport
from fedpeat.core.seeds import generator
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated.secagg.terms import SECURE_KEY

__all__ = ["InProcessTransport", "UnreliableTransport"]

Handler = Callable[[str, bytes], bytes]


class InProcessTransport:
    """Runs a task when its reply is asked for, so that results never depend on threads.

    Args:
        handlers: What each node does with a message.
    """

    interval_seconds = 0.0

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)
        self._waiting: dict[str, tuple[str, str, bytes, float]] = {}
        self._num_tickets = 0

    def nodes(self) -> list[str]:
        """Return every device, in a fixed order."""
        return list(self._handlers)

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        """Queue one task for each node."""
        now = time.monotonic()
        expiry = now + deadline_seconds if deadline_seconds is not None else np.inf
        self._waiting = {t: task for t, task in self._waiting.items() if task[3] > now}
        tickets = {}
        for node, content in tasks.items():
            self._num_tickets += 1
            ticket = f"{self._num_tickets}"
            self._waiting[ticket] = (kind, node, content, expiry)
            tickets[ticket] = node
        return tickets

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        """Run the next queued task and return its reply; if it raises, a reply with the error."""
        for ticket in tickets:
            task = self._waiting.pop(ticket, None)
            if task is not None:
                return [(ticket, self._run(*task[:3]))]
        return []

    def _run(self, kind: str, node: str, content: bytes) -> Reply:
        try:
            return Reply(node, self._handlers[node](kind, content))
        except Exception as error:  # noqa: BLE001 - whatever goes wrong on a device must not end the federation
            return Reply(node, error=f"{type(error).__name__}: {error}")


class UnreliableTransport:
    """Loses some train tasks on the way, as devices that drop out of a round do.

    Which are lost follows from the seed and the task itself, so that a resumed run loses the same;
    what secure aggregation adds to a task is random, and left out of account.
    """

    def __init__(self, inner: Transport, dropout_ratio: float, seed: int) -> None:
        self._inner = inner
        self._dropout_ratio = dropout_ratio
        self._seed = seed
        self._lost: dict[str, str] = {}
        self.interval_seconds = inner.interval_seconds

    def nodes(self) -> list[str]:
        """Return every device."""
        return self._inner.nodes()

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        """Pass on the tasks that are not lost."""
        lost = [
            node
            for node, content in tasks.items()
            if kind == "train" and self._is_lost(node, content)
        ]
        kept = {node: content for node, content in tasks.items() if node not in lost}
        tickets = {f"lost-{len(self._lost) + i}": node for i, node in enumerate(lost)}
        self._lost |= tickets
        return {**self._inner.submit(kind, kept, deadline_seconds), **tickets}

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        """Return what the inner transport has, and a lost reply for each lost task."""
        lost = [
            (t, Reply(node, error="dropped out (simulated)", lost=True))
            for t, node in tickets.items()
            if t in self._lost
        ]
        inner = {t: node for t, node in tickets.items() if t not in self._lost}
        return lost + (self._inner.poll(inner) if inner else [])

    def _is_lost(self, node: str, content: bytes) -> bool:
        digest = hashlib.sha256(_without_secrets(content)).hexdigest()
        return bool(generator(self._seed, "dropout", node, digest).random() < self._dropout_ratio)


def _without_secrets(content: bytes) -> bytes:
    try:
        payload = decode(content)
    except WireError:
        return content
    if SECURE_KEY not in payload.record:
        return content
    record = {key: value for key, value in payload.record.items() if key != SECURE_KEY}
    return encode(Payload(payload.arrays, record))
