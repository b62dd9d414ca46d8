"""What participants and the round loop see of secure aggregation: nothing of its cryptography.

So a run without it needs no library for it; who asks for it imports ``device`` and ``round``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedpeat.core.records import Reply
from fedpeat.core.wire import Payload
from fedpeat.federated.admission import Outcome
from fedpeat.federated.exchange import Exchange
from fedpeat.federated.secagg.vector import Sums

__all__ = ["SecureAggregator", "SecureRound", "SecureSide"]


@runtime_checkable
class SecureRound(Protocol):
    """A round whose devices have shared their secrets.

    Attributes:
        shortage: Why there will be no sum; empty as long as there may be one.
        refused: What came of devices that are out of the round.
    """

    shortage: str
    refused: dict[str, Outcome]

    @property
    def parts(self) -> Mapping[str, Mapping[str, Any]]:
        """What the train message of each device still in the round says beside the task."""

    def finish(
        self,
        answers: Mapping[str, Reply | None],
        start: Mapping[str, np.ndarray],
        expected: Mapping[str, Mapping[str, Any]],
    ) -> tuple[Sums | None, dict[str, Outcome]]:
        """Open the sum of the vectors that came; None if there is a shortage."""


@runtime_checkable
class SecureAggregator(Protocol):
    """The server's side."""

    def begin(
        self,
        names: Sequence[str],
        *,
        server_round: int,
        adapter: Mapping[str, np.ndarray],
        work: str,
        emulators: Iterable[str],
        exchange: Exchange,
    ) -> SecureRound:
        """Have devices agree on terms, exchange keys and share secrets."""


@runtime_checkable
class SecureSide(Protocol):
    """A device's side of secure aggregation, as a participant sees it."""

    @property
    def kinds(self) -> Mapping[str, Callable[[Payload], Payload]]:
        """Who answers each of its kinds of messages."""

    def begin(
        self,
        part: object,
        adapter: Mapping[str, np.ndarray],
        server_round: int,
        emulator: str,
        work: str,
    ) -> None:
        """Check a train task against the terms, before anything is trained.

        Args:
            part: What the message says for secure aggregation.
            adapter: The whole adapter to start from.
            server_round: The round that the task names.
            emulator: Hash of the emulator that it names.
            work: ``work_digest`` of the task.

        Raises:
            WireError: If something does not fit.
        """

    def masked(
        self,
        start: Mapping[str, np.ndarray],
        update: Mapping[str, np.ndarray],
        num_examples: int,
        num_tokens: int,
        mean_loss: float,
    ) -> Payload:
        """Return what was tuned as a masked vector."""
