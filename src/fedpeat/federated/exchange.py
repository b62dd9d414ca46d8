"""Send tasks over a transport, wait for their replies until the deadline, and count every byte."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fedpeat.core.errors import AggregationError, FedPEATError
from fedpeat.core.records import Reply, Transport

__all__ = ["Exchange", "Sent"]

_ROUNDING = 1e-9  # 0.55 of 20 is 11, not a little more


@dataclass(frozen=True)
class Sent:
    """What was sent to one node in a round, and what came back.

    ``bytes_emulator`` is the part of ``bytes_down`` that "hold" messages are.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    bytes_emulator: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(
            self.bytes_down + other.bytes_down,
            self.bytes_up + other.bytes_up,
            self.bytes_emulator + other.bytes_emulator,
        )


class Exchange:
    """The messages of one round.

    Args:
        transport: How nodes are reached.
        server_round: The round, for error messages.
        deadline_seconds: Time for the replies to each kind of task [s]; None for no limit.

    Attributes:
        traffic: Bytes to and from each node so far.
    """

    def __init__(
        self, transport: Transport, server_round: int, deadline_seconds: float | None
    ) -> None:
        self._transport = transport
        self._server_round = server_round
        self._deadline_seconds = deadline_seconds
        self.traffic: dict[str, Sent] = {}

    def nodes(self) -> list[str]:
        """Return who can be reached now.

        Raises:
            AggregationError: If the transport fails.
        """
        with self._transport_errors("asking for its nodes"):
            return self._transport.nodes()

    def collect(
        self,
        kind: str,
        tasks: Mapping[str, bytes],
        meanwhile: Callable[[], object] = lambda: None,
        quorum_ratio: float = 1.0,
    ) -> dict[str, Reply]:
        """Send tasks, do something else meanwhile, and return what came in time, by node.

        Args:
            kind: What is asked.
            tasks: Message for each node.
            meanwhile: Is called once all are sent.
            quorum_ratio: Share of the nodes whose payloads end the wait.

        Raises:
            AggregationError: If the transport fails.
        """
        start = time.monotonic()
        with self._transport_errors(f"sending {kind!r} tasks"):
            waiting = self._submit(kind, tasks)
        for node, content in tasks.items():
            num_bytes = len(content)
            self.count(node, Sent(num_bytes, bytes_emulator=num_bytes if kind == "hold" else 0))
        meanwhile()
        replies: dict[str, Reply] = {}
        quorum = math.ceil(quorum_ratio * len(tasks) - _ROUNDING)
        while waiting and sum(reply.content is not None for reply in replies.values()) < quorum:
            with self._transport_errors(f"waiting for {kind!r} replies"):
                arrived = self._transport.poll(waiting)
            for ticket, reply in arrived:
                if ticket in waiting:  # else nobody asked, or it was answered before
                    node = waiting.pop(ticket)
                    replies[node] = reply
                    self.count(node, Sent(bytes_up=len(reply.content or b"")))
            if self._is_over(start):
                break
            if not arrived:
                time.sleep(self._transport.interval_seconds)
        return replies

    def _submit(self, kind: str, tasks: Mapping[str, bytes]) -> dict[str, str]:
        return dict(self._transport.submit(kind, tasks, self._deadline_seconds)) if tasks else {}

    def _is_over(self, start: float) -> bool:
        limit = self._deadline_seconds
        return limit is not None and time.monotonic() - start > limit

    def count(self, node: str, sent: Sent) -> None:
        """Add bytes to those of a node."""
        self.traffic[node] = self.traffic.get(node, Sent()) + sent

    @contextmanager
    def _transport_errors(self, doing: str) -> Iterator[None]:
        """Name the round in whatever a transport raises; the run goes on from its checkpoint."""
        try:
            yield
        except FedPEATError:
            raise
        except Exception as error:
            raise AggregationError(
                f"round {self._server_round}: the transport failed while {doing}: "
                f"{type(error).__name__}: {error}"
            ) from error
