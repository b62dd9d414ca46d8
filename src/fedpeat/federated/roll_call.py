"""Who is there, and what they have: the question that begins a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpeat.adapter.lora import State
from fedpeat.core.errors import WireError
from fedpeat.core.records import ClientState, Reply
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated.admission import SERVER_ID
from fedpeat.federated.exchange import Exchange
from fedpeat.federated.reception import Reception
from fedpeat.federated.robust import Defence
from fedpeat.federated.screening import (
    MAX_ANSWER_BYTES,
    check_held,
    check_num_examples,
    one_line,
    shown,
)
from fedpeat.federated.shelf import Rung
from fedpeat.federated.state import FederationState

__all__ = ["RollCall"]


class RollCall:
    """Asks every node what it has.

    Args:
        max_examples: Most examples that a device may claim.
        defence: Knows who is set aside, and is not asked.
        reception: How devices on other machines are received; None if all are in this process.
        is_secure: Whether updates are aggregated securely, and examples nobody's business.
        tells_losses: Whether last losses may be told to who chooses devices.
    """

    def __init__(
        self,
        *,
        max_examples: int,
        defence: Defence,
        reception: Reception | None,
        is_secure: bool,
        tells_losses: bool,
    ) -> None:
        self._max_examples = max_examples
        self._defence = defence
        self._reception = reception
        self._is_secure = is_secure
        self._tells_losses = tells_losses

    def ask(
        self,
        state: FederationState,
        rungs: Mapping[str, Rung],
        lasting: Mapping[str, Mapping[str, State]],
        exchange: Exchange,
    ) -> tuple[dict[str, ClientState], list[str]]:
        """Ask every node; one that does not answer properly sits out, with a warning.

        Clients come in the order of their names, so that no draw depends on who answered first.

        Args:
            state: Where the run stands.
            rungs: Emulators by name.
            lasting: Parts of the adapter by hash that devices of each rung may have kept.
            exchange: How nodes are asked.
        """
        set_aside = self._defence.set_aside(state.num_rejections)
        nodes = sorted(set(exchange.nodes()).difference(set_aside))
        parts = list(dict.fromkeys(sha256 for own in lasting.values() for sha256 in own))
        question = {"parts": parts} if parts else {}
        if self._reception is None:
            hello = encode(Payload(record=question))
            replies = exchange.collect("hello", dict.fromkeys(nodes, hello))
        else:
            replies = self._reception.receive(nodes, question, exchange)
        clients, warnings = {}, []
        for node in nodes:
            last_loss = state.last_losses.get(node) if self._tells_losses else None
            try:
                clients[node] = self._client(node, replies.get(node), rungs, parts, last_loss)
            except WireError as error:
                warnings.append(f"{shown(node)} sits out: {one_line(str(error))}")
        return clients, warnings

    def _client(
        self,
        node: str,
        reply: Reply | None,
        rungs: Mapping[str, Rung],
        parts: Sequence[str],
        last_loss: float | None,
    ) -> ClientState:
        if node == SERVER_ID:
            raise WireError(f"no device may be called {SERVER_ID!r}")
        if reply is None or reply.content is None:
            raise WireError(reply.error if reply is not None else "no answer before the deadline")
        record = decode(reply.content, MAX_ANSWER_BYTES).record
        if (record.get("secure") is True) != self._is_secure:
            own, others = ("true", "false") if self._is_secure else ("false", "true")
            raise WireError(
                f"federated.secure_aggregation must be as here, {own}, on the device, got {others}"
            )
        if not self._is_secure:
            check_num_examples(record.get("num_examples"), self._max_examples)
        held = check_held("held", record.get("held"))
        held_rungs = tuple(name for name, rung in rungs.items() if rung.sha256 in held)
        held_parts = check_held("emulator_parts", record.get("emulator_parts"))
        kept = next((sha256 for sha256 in parts if sha256 == record.get("kept")), "")
        return ClientState(
            node, record.get("num_examples", 0), held_rungs, frozenset(held_parts), last_loss, kept
        )
