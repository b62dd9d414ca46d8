"""A cohort that aggregates securely over a transport that loses, records and changes messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fedpeat.core.records import Reply
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated.admission import Outcome
from fedpeat.federated.exchange import Exchange
from fedpeat.federated.in_process import InProcessTransport
from fedpeat.federated.secagg import crypto
from fedpeat.federated.secagg.device import SecureDevice
from fedpeat.federated.secagg.identity import Authority, Identity, simulated
from fedpeat.federated.secagg.round import SecureAggregation, SecureRound
from fedpeat.federated.secagg.terms import SECURE_KEY
from fedpeat.federated.secagg.vector import Sums

STEPS = ("secagg_keys", "secagg_shares", "train", "secagg_survivors", "secagg_unmask")
EMULATOR, WORK = "e" * 64, "w" * 64

Change = Callable[[Payload], Payload | None]
"""What becomes of a message on its way; None if it is lost."""


@cache
def identities(count: int) -> tuple[dict[str, Identity], bytes]:
    """Return devices d00, d01, ... and the certificate of their authority, made once."""
    return simulated([f"d{i:02}" for i in range(count)])


def start(size: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "lora_A": rng.normal(size=(size // 4, 3)).astype(np.float32),
        "lora_B": rng.normal(size=size - size // 4 * 3).astype(np.float32),
    }


@dataclass
class Member:
    """A device with an update of its own."""

    secure: SecureDevice
    update: dict[str, np.ndarray]
    num_examples: int = 10
    num_tokens: int = 100
    mean_loss: float = 2.5
    begun: dict[str, np.ndarray] = field(default_factory=start)

    def answer(self, kind: str, content: bytes) -> bytes:
        payload = decode(content)
        if kind != "train":
            return encode(self.secure.kinds[kind](payload))
        record = payload.record
        self.secure.begin(
            record[SECURE_KEY],
            payload.arrays,
            record["server_round"],
            record["emulator"],
            record["work"],
        )
        masked = self.secure.masked(
            payload.arrays, self.update, self.num_examples, self.num_tokens, self.mean_loss
        )
        told = {k: record[k] for k in ("server_round", "emulator")}
        return encode(Payload(masked.arrays, {**masked.record, **told, "seconds": "00000.100000"}))


@dataclass
class Wire(InProcessTransport):
    """Keeps what passes; what is asked and what is answered may be changed, or lost."""

    members: Mapping[str, Member]
    asked: dict[tuple[str, str], Change] = field(default_factory=dict)
    answered: dict[tuple[str, str], Change] = field(default_factory=dict)
    seen: list[tuple[str, str, Payload]] = field(default_factory=list)
    errors: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        InProcessTransport.__init__(self, {name: self._handler(name) for name in self.members})

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        replies = super().poll(tickets)
        return [
            (
                ticket,
                Reply(r.node, error=r.error, lost="lost on the way" in r.error) if r.error else r,
            )
            for ticket, r in replies
        ]

    def _handler(self, name: str) -> Callable[[str, bytes], bytes]:
        def handle(kind: str, content: bytes) -> bytes:
            question = self._changed(self.asked, kind, name, content)
            try:
                answer = self.members[name].answer(kind, question)
            except Exception as error:
                self.errors[kind, name] = str(error)
                raise
            answer = self._changed(self.answered, kind, name, answer)
            self.seen.append((kind, name, decode(answer)))
            return answer

        return handle

    def _changed(
        self, changes: Mapping[tuple[str, str], Change], kind: str, name: str, content: bytes
    ) -> bytes:
        if (kind, name) not in changes:
            return content
        changed = changes[kind, name](decode(content))
        if changed is None:
            raise ConnectionError("lost on the way")
        return encode(changed)


@dataclass
class Cohort:
    """Devices with random updates, and a server that sums them up."""

    wire: Wire
    server: SecureAggregation
    begun: dict[str, np.ndarray]
    last: SecureRound | None = None

    def aggregate(self, *, server_round: int = 1) -> tuple[Sums | None, dict[str, Outcome], str]:
        """Return the sum, what came of each device, and why there is no sum."""
        exchange = Exchange(self.wire, server_round, None)
        names = list(self.wire.members)
        secure = self.server.begin(
            names,
            server_round=server_round,
            adapter=self.begun,
            work=WORK,
            emulators=[EMULATOR],
            exchange=exchange,
        )
        self.last = secure
        told = {"server_round": server_round, "emulator": EMULATOR}
        tasks = {
            name: encode(Payload(self.begun, {**told, "work": WORK, SECURE_KEY: part}))
            for name, part in secure.parts.items()
        }
        answers = exchange.collect("train", tasks)
        sums, outcomes = secure.finish(answers, self.begun, dict.fromkeys(names, told))
        return sums, outcomes, secure.shortage

    def plain_mean(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Return the mean by examples, in float64, nothing rounded."""
        members = [self.wire.members[name] for name in names]
        examples = sum(m.num_examples for m in members)
        return {
            name: np.sum(
                [m.num_examples * m.update[name].astype(np.float64) for m in members], axis=0
            )
            / examples
            for name in self.begun
        }


def cohort(count: int, *, seed: int = 0, size: int = 20, **changes: Any) -> Cohort:
    """Return a cohort of devices that each changed the adapter by up to 0.5 a value."""
    rng = np.random.default_rng(seed)
    begun = start(size)
    own, authority = identities(count)
    settings: dict[str, Any] = {
        "threshold_ratio": 0.6,
        "num_neighbours": None,
        "min_devices": 3,
        "clip_range": 1.0,
        "num_bits": 24,
        "max_examples": 1000,
    }
    members = {
        name: Member(
            SecureDevice(identity, 3),
            {n: (a + rng.uniform(-0.5, 0.5, a.shape)).astype(a.dtype) for n, a in begun.items()},
            num_examples=int(rng.integers(1, 1000)),
            num_tokens=int(rng.integers(1, 10**6)),
            mean_loss=float(rng.uniform(0, 5)),
        )
        for name, identity in own.items()
    }
    server = SecureAggregation(Authority(authority), **{**settings, **changes})
    return Cohort(Wire(members), server, begun)


def lost(_: Payload) -> None:
    """Lose a message."""


def counted_seeds(seed: int) -> Callable[[], bytes]:
    """Return secrets that a test can have again, in place of the system's."""
    count = 0

    def new_seed() -> bytes:
        nonlocal count
        count += 1
        return hashlib.sha256(f"{seed} {count}".encode()).digest()[: crypto.SEED_BYTES]

    return new_seed
