"""The transport to a fleet: messages over Flower's grid, in a loop of our own."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import DEFAULT_TTL, Message
from flwr.serverapp import Grid

from fedpeat.core.errors import WireError
from fedpeat.core.records import Reply
from fedpeat.federated.flower.messages import from_records, to_records

__all__ = ["FlowerTransport"]

_TRAIN, _QUERY = "train", "query"


class FlowerTransport:
    """Reaches the devices whose keys are registered and that are online, by their names.

    Args:
        grid: Flower's way to SuperNodes.
    """

    interval_seconds = 0.5

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._refused: dict[str, str] = {}

    def nodes(self) -> list[str]:
        """Return the names of the devices that are online."""
        return list(self._node_ids())

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        """Push a message to each node; it expires with the deadline."""
        ids = self._node_ids()
        ttl = DEFAULT_TTL if deadline_seconds is None else deadline_seconds
        message_type = _TRAIN if kind == "train" else _QUERY
        messages = {
            node: Message(
                to_records(kind, content), dst_node_id=ids[node], message_type=message_type, ttl=ttl
            )
            for node, content in tasks.items()
            if node in ids
        }
        pushed = dict(zip(messages, self._grid.push_messages(messages.values()), strict=True))
        tickets = {}
        self._refused = {}
        for number, node in enumerate(tasks):
            if pushed.get(node):
                tickets[str(pushed[node])] = node
            else:
                tickets[f"refused-{number}"] = node
                self._refused[f"refused-{number}"] = node
        return tickets

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        """Return the replies that have come."""
        found = [
            (ticket, Reply(node, error="went away before it was asked", lost=True))
            for ticket, node in self._refused.items()
            if ticket in tickets
        ]
        asked = [ticket for ticket in tickets if ticket not in self._refused]
        for message in self._grid.pull_messages(asked) if asked else ():
            ticket = message.metadata.reply_to_message_id  # an error may come from the SuperLink
            found.append((ticket, _reply(tickets[ticket], message)))
        return found

    def _node_ids(self) -> dict[str, int]:
        return {str(node.name): node.node_id for node in self._grid.get_nodes() if node.name}


def _reply(node: str, message: Message) -> Reply:
    if message.has_error():
        return Reply(node, error=message.error.reason or "no reason given", lost=True)
    try:
        return Reply(node, from_records(message.content)[1])
    except WireError as error:
        return Reply(node, error=str(error))
