"""The transport to a fleet: messages over Flower's grid, in a loop of our own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import DEFAULT_TTL, Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedpeat.core.errors import WireError
from fedpeat.core.records import Reply
from fedpeat.federated.flower.messages import from_records, to_records
from fedpeat.federated.flower.puller import Puller

__all__ = ["FlowerTransport"]

_TRAIN, _QUERY = "train", "query"
_LOOK_SECONDS = 2.0
_RETURN_SECONDS = 20.0  # a SuperNode that ended is back in less, if it comes back
_MOST_STUCK = 3
_MOST_CRASHES = 2


@dataclass
class _Errand:
    """A task, and the messages that were sent for it.

    Attributes:
        node: Whose it is.
        kind: What is asked.
        content: Its payload.
        ends_at: When no reply is wanted any more [s].
        activated: When the SuperNode that it was sent to came.
        message_id: The message that it was last sent with; empty if it was not taken.
        earlier: Those before, to which a reply may come still.
        gone_since: Since when the node, or its process for this task, has not been there [s]; None
            if it is.
        num_crashes: How often that process has ended.
        reason: Why it is lost.
    """

    node: str
    kind: str
    content: bytes
    ends_at: float
    activated: str = ""
    message_id: str = ""
    earlier: list[str] = field(default_factory=list)
    gone_since: float | None = None
    num_crashes: int = 0
    reason: str = "went away before it was asked"

    @property
    def message_ids(self) -> list[str]:
        return [*self.earlier, self.message_id] if self.message_id else self.earlier

    @property
    def can_return(self) -> bool:
        return bool(self.message_id) or self.gone_since is not None

    @property
    def is_lost(self) -> bool:
        if self.gone_since is None:
            return not self.message_id
        return time.monotonic() - self.gone_since > _RETURN_SECONDS

    def has_come_anew(self, info: NodeInfo | None) -> bool:
        """Say whether the node is there, and has not been all the time since it was sent this."""
        if info is None:
            return False
        return self.gone_since is not None or info.last_activated_at != self.activated

    def note(self, message_id: str, error: Error) -> None:
        """Note that no reply will come to one of the messages."""
        if message_id != self.message_id:
            self.earlier = [earlier for earlier in self.earlier if earlier != message_id]
            return
        self.message_id, self.reason = "", error.reason or "no reason given"
        crashed = error.code == ErrorCode.CLIENT_APP_CRASHED and self.num_crashes < _MOST_CRASHES
        self.num_crashes += crashed
        if crashed or error.code == ErrorCode.NODE_UNAVAILABLE:
            self.gone_since = time.monotonic()


class FlowerTransport:
    """Reaches the devices whose keys are registered and that are online, by their names.

    What was handed to a SuperNode that ended is lost. So a task is sent again to one that has been
    started again, and one that is not there is waited for a little.

    Args:
        grid: Flower's way to SuperNodes.
        ring: Is called when messages were sent, so that devices look for them.
    """

    interval_seconds = 0.5

    def __init__(self, grid: Grid, ring: Callable[[], object] = lambda: None) -> None:
        self._grid = grid
        self._ring = ring
        self._puller = Puller(grid.pull_messages)
        self._errands: dict[str, _Errand] = {}
        self._num_errands = 0
        self._sent_to: dict[str, str] = {}
        self._looked_at = 0.0

    def nodes(self) -> list[str]:
        """Return the names of the devices that are online."""
        return list(self._infos())

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        """Push a message to each node; it expires with the deadline."""
        ttl = DEFAULT_TTL if deadline_seconds is None else deadline_seconds
        now = time.monotonic()
        self._forget(now)
        sent = {}
        for node, content in tasks.items():
            self._num_errands += 1
            sent[f"{kind}-{self._num_errands}"] = _Errand(node, kind, content, now + ttl)
        self._push(list(sent.values()), self._infos())
        self._errands |= sent
        return {ticket: errand.node for ticket, errand in sent.items()}

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        """Return the replies that have come."""
        open_ = {t: self._errands[t] for t in tickets if t in self._errands}
        self._send_again(list(open_.values()))
        ticket_of = {m: ticket for ticket, errand in open_.items() for m in errand.message_ids}
        found = []
        for message_id, message in self._puller.pulled(ticket_of) if ticket_of else ():
            ticket = ticket_of[message_id]
            if ticket not in self._errands:
                continue  # two messages of one task were answered
            if message.has_error():
                open_[ticket].note(message_id, message.error)
            else:
                del self._errands[ticket]
                found.append((ticket, _reply(open_[ticket].node, message)))
        for ticket, errand in open_.items():
            if ticket in self._errands and errand.is_lost:
                del self._errands[ticket]
                found.append((ticket, Reply(errand.node, error=errand.reason, lost=True)))
        return found

    def _forget(self, now: float) -> None:
        """Forget the tasks whose time is over, and whose replies are none of our business."""
        self._errands = {t: errand for t, errand in self._errands.items() if errand.ends_at > now}
        wanted = {m for errand in self._errands.values() for m in errand.message_ids}
        wanted.update(self._puller.stuck())
        self._sent_to = {m: node for m, node in self._sent_to.items() if m in wanted}

    def _send_again(self, errands: list[_Errand]) -> None:
        """Send tasks again to nodes that have come since, as they look now and then."""
        now = time.monotonic()
        sent = [errand for errand in errands if errand.can_return and errand.ends_at - now > 1]
        if not sent or now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at, infos = now, self._infos()
        back = [errand for errand in sent if errand.has_come_anew(infos.get(errand.node))]
        for errand in back:
            errand.earlier = errand.message_ids
        self._push(back, infos)

    def _infos(self) -> dict[str, NodeInfo]:
        return {str(node.name): node for node in self._grid.get_nodes() if node.name}

    def _push(self, errands: list[_Errand], infos: Mapping[str, NodeInfo]) -> None:
        """Send tasks to nodes that are there and take them; the others are lost."""
        num_stuck = Counter(self._sent_to.get(m, "") for m in self._puller.stuck())
        messages = []
        for errand in errands:
            errand.message_id, errand.gone_since = "", None
            if num_stuck[errand.node] >= _MOST_STUCK:
                errand.reason = f"has begun {num_stuck[errand.node]} replies and ended none"
            elif errand.node in infos:
                messages.append((errand, self._message(errand, infos[errand.node])))
        if not messages:
            return
        pushed = self._grid.push_messages([message for _, message in messages])
        for (errand, _), message_id in zip(messages, pushed, strict=True):
            if message_id:
                errand.message_id = str(message_id)
                errand.activated = infos[errand.node].last_activated_at
                self._sent_to[errand.message_id] = errand.node
        self._ring()

    def _message(self, errand: _Errand, info: NodeInfo) -> Message:
        message_type = _TRAIN if errand.kind == "train" else _QUERY
        return Message(
            to_records(errand.kind, errand.content),
            dst_node_id=info.node_id,
            message_type=message_type,
            ttl=errand.ends_at - time.monotonic(),
        )


def _reply(node: str, message: Message) -> Reply:
    try:
        return Reply(node, from_records(message.content)[1])
    except WireError as error:
        return Reply(node, error=str(error))
