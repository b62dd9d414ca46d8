"""The part of a round in which devices' updates are seen as one sum: from plan to what is averaged.

The sum enters as one participant would: the mean of the devices by examples, with all their
examples. So the server's share, its optimiser and whatever works on an average stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedpeat.adapter.lora import Part, State, part_of
from fedpeat.core.errors import AggregationError
from fedpeat.core.records import ClientPlan, ParticipantResult, Reply
from fedpeat.federated.admission import Outcome, answered, refused, with_traffic
from fedpeat.federated.exchange import Exchange, Sent
from fedpeat.federated.secagg.seam import SecureAggregator
from fedpeat.federated.secagg.terms import work_digest
from fedpeat.federated.secagg.vector import Sums
from fedpeat.tuning.local import LocalSettings

__all__ = ["JointRound", "Trained", "trained_apart"]

_TOGETHER = "devices together"


@dataclass(frozen=True)
class Trained:
    """What came of a round's training.

    Attributes:
        outcomes: What came of each participant.
        updates: What is averaged.
        warnings: What has to be said of it.
        num_hidden_tokens: Tokens of devices that are known as a sum alone.
    """

    outcomes: list[Outcome]
    updates: list[Outcome]
    warnings: tuple[str, ...] = ()
    num_hidden_tokens: int = 0


def trained_apart(devices: list[Outcome], server: list[Outcome]) -> Trained:
    """Return what came of participants whose updates came in clear."""
    outcomes = [*devices, *server]
    return Trained(outcomes, [outcome for outcome in outcomes if outcome.accepted])


class JointRound:
    """The devices of a round, as they share secrets, train, and are summed up.

    Args:
        secure: The server's side of secure aggregation.
        cohort: Devices of the plan.
        unequipped: Those of them that cannot be asked.
        server_round: The round.
        starts: Adapter that each starts from; it must be the same.
        tuned: Part of it that is tuned.
        emulators: Hashes of the emulators by the names of their rungs.
        settings: How all train.
        exchange: How they are reached.

    Raises:
        AggregationError: If devices have other tensors or steps than others, or the transport
            fails.
    """

    def __init__(
        self,
        secure: SecureAggregator,
        cohort: Sequence[ClientPlan],
        unequipped: Collection[str],
        *,
        server_round: int,
        starts: Mapping[str, State],
        tuned: Part,
        emulators: Mapping[str, str],
        settings: LocalSettings,
        exchange: Exchange,
    ) -> None:
        shapes = [_shapes(starts[client.client_id]) for client in cohort]
        if any(shape != shapes[0] for shape in shapes):
            raise AggregationError(
                f"round {server_round}: secure aggregation needs devices that tune the same "
                "tensors, got rungs with others"
            )
        steps = sorted({client.local_steps for client in cohort})
        if len(steps) > 1:
            raise AggregationError(
                f"round {server_round}: secure aggregation needs devices that make as many steps "
                f"as others, got {steps}"
            )
        self._cohort = list(cohort)
        self._exchange = exchange
        self._server_round = server_round
        self._emulators = emulators
        adapter = starts[cohort[0].client_id]
        self._start = part_of(adapter, tuned)
        work = {
            "settings": asdict(settings),
            "tuned": tuned,
            "num_steps": steps[0],
            "first_step": (server_round - 1) * steps[0],
            "rank": None,
        }
        self._round = secure.begin(
            [client.client_id for client in cohort if client.client_id not in unequipped],
            server_round=server_round,
            adapter=adapter,
            work=work_digest(work),
            emulators=[emulators[client.rung] for client in cohort],
            exchange=exchange,
        )
        self.parts: Mapping[str, Mapping[str, Any]] = self._round.parts
        """What the train message of each device says beside the task."""

    def finish(self, replies: Mapping[str, Reply | None], server: list[Outcome]) -> Trained:
        """Open the sum, and return what came of all.

        Without a sum nothing is averaged, not even the server's own update: the round fails.

        Args:
            replies: Of all devices of the plan; of those not asked, why.
            server: What came of the server's own part.
        """
        expected = {
            client.client_id: {
                "server_round": self._server_round,
                "emulator": self._emulators[client.rung],
            }
            for client in self._cohort
        }
        sums, found = self._round.finish(replies, self._start, expected)
        outcomes = [
            with_traffic(
                found[c.client_id] if c.client_id in found else _left_out(c.client_id, replies),
                self._exchange.traffic.get(c.client_id, Sent()),
                c.rung,
            )
            for c in self._cohort
        ]
        if sums is None:
            warning = f"secure aggregation: {self._round.shortage}"
            return Trained([*outcomes, *server], [], (warning,))
        together = self._together(sums, sum(outcome.accepted for outcome in outcomes))
        updates = [together, *(outcome for outcome in server if outcome.accepted)]
        return Trained([*outcomes, *server], updates, _clipping(sums), sums.num_tokens)

    def _together(self, sums: Sums, num_devices: int) -> Outcome:
        result = ParticipantResult(
            _TOGETHER,
            "device",
            "accepted",
            num_examples=sums.num_examples,
            num_tokens=sums.num_tokens,
            rung=self._cohort[0].rung,
        )
        return Outcome(result, sums.mean, sums.mean_loss, self._start, num_devices=num_devices)


def _left_out(name: str, replies: Mapping[str, Reply | None]) -> Outcome:
    """Return what comes of a device that never got so far as to share secrets."""
    if name in replies:
        content = answered(name, replies[name])
        if isinstance(content, Outcome):
            return content
    return refused(name, "dropped", "not asked to train: too few devices are left to hide it")


def _clipping(sums: Sums) -> tuple[str, ...]:
    if not sums.num_clipped:
        return ()
    return (
        f"{sums.num_clipped} values of the devices' changes were beyond "
        "federated.secure_clip_range and were clipped",
    )


def _shapes(adapter: State) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, str(array.dtype)) for name, array in adapter.items()}
