"""How a server receives devices on other machines: who is new is told how the run reads data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpeat.core.errors import WireError
from fedpeat.core.records import Reply
from fedpeat.core.version import VERSION
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated.exchange import Exchange, Sent
from fedpeat.federated.screening import MAX_ANSWER_BYTES
from fedpeat.federated.shelf import Offer

__all__ = ["Reception", "welcome_message"]

_MOST_FETCHES = 8  # a part that comes damaged is fetched again


def welcome_message(record: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return the hash and the bytes of what a new device is told.

    Args:
        record: How the run reads data.
        files: Files of the tokenizer or image processor, by name.
    """
    arrays = {name: np.frombuffer(content, np.uint8) for name, content in files.items()}
    sha256 = hashlib.sha256(encode(Payload(arrays, record))).hexdigest()
    return sha256, encode(Payload(arrays, {**record, "welcome": sha256}))


@dataclass(frozen=True)
class Reception:
    """What devices on other machines need besides a round's messages.

    Attributes:
        welcome_sha256: Hash of the welcome.
        welcome: The message of the kind "welcome".
        offer: Puts the parts of an emulator where devices can fetch them.

    A device says with its update what it would answer to "hello" in the next round, so that it need
    not be asked; who sent no update is asked again.
    """

    welcome_sha256: str
    welcome: bytes
    offer: Offer
    _known: dict[str, Reply] = field(default_factory=dict)

    def receive(
        self, nodes: Sequence[str], question: Mapping[str, Any], exchange: Exchange
    ) -> dict[str, Reply]:
        """Say hello to every node, welcome those that are new, and return all answers."""
        record = {**question, "version": VERSION, "welcome": self.welcome_sha256}
        hello = encode(Payload(record=record))
        known = {node: self._known[node] for node in nodes if node in self._known}
        self._known.clear()
        asked = [node for node in nodes if node not in known]
        replies = {**known, **exchange.collect("hello", dict.fromkeys(asked, hello))}
        new = [node for node, reply in replies.items() if self._is_new(reply)]
        welcomed = exchange.collect("welcome", dict.fromkeys(new, self.welcome))
        replies |= {node: reply for node, reply in welcomed.items() if reply.content is None}
        ready = [node for node, reply in welcomed.items() if reply.content is not None]
        return {**replies, **exchange.collect("hello", dict.fromkeys(ready, hello))}

    def remember(self, replies: Mapping[str, Reply], longest: Mapping[str, int]) -> None:
        """Keep what devices said of themselves with their updates.

        Args:
            replies: Their replies.
            longest: Up to which length each is read [B].
        """
        for node, reply in replies.items():
            try:
                inventory = decode(reply.content or b"", longest[node]).record.get("inventory")
                if isinstance(inventory, dict):
                    self._known[node] = Reply(node, encode(Payload(record=inventory)))
            except WireError:
                continue

    def _is_new(self, reply: Reply) -> bool:
        """Say whether a node answers, but has not been told what it must know."""
        if reply.content is None:
            return False
        try:
            told = decode(reply.content, MAX_ANSWER_BYTES).record.get("welcome")
        except WireError:
            return False
        return bool(told != self.welcome_sha256)

    def count_fetched(
        self, replies: Mapping[str, Reply], exchange: Exchange, offered: Mapping[str, int]
    ) -> None:
        """Count the bytes of the parts that devices fetched, as they say.

        Args:
            replies: Their replies.
            exchange: Where they are counted.
            offered: Bytes of the parts that each could fetch.
        """
        for node, reply in replies.items():
            try:
                record = decode(reply.content or b"", MAX_ANSWER_BYTES).record
            except WireError:
                continue
            fetched = record.get("fetched_bytes")
            if type(fetched) is int and 0 <= fetched <= _MOST_FETCHES * offered[node]:
                exchange.count(node, Sent(bytes_down=fetched, bytes_emulator=fetched))
