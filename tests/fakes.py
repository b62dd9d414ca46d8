"""A federation without networks: devices that add a number, and a transport that obeys.

They speak the real wire format, so that the round loop under test is the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedpeat.adapter.lora import Part, part_of
from fedpeat.control.fixed import FixedController
from fedpeat.core.records import Reply, RoundObservation, RoundPlan, Transport
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.emulator.parts import short
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.rounds import Federation, FederationState, ServerTraining
from fedpeat.federated.screening import Limits
from fedpeat.federated.shelf import Rung
from fedpeat.tuning.local import LocalSettings

RUNG = Rung("e" * 64, {"f" * 64: b"the emulator's bytes" * 50}, {"emulator": "e" * 64})
Script = Callable[[bytes], Reply | None]


def adapter(value: float = 0.0) -> dict[str, np.ndarray]:
    """Return an adapter of two tensors that hold one value."""
    return {"lora_A": np.full((2, 3), value, np.float32), "lora_B": np.full(4, value, np.float32)}


@dataclass
class FakeDevice:
    """Adds ``delta`` to what it gets."""

    delta: float = 1.0
    num_examples: int = 10
    held: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)

    def answer(self, kind: str, content: bytes) -> bytes:
        if kind == "hello":
            held = {"held": sorted(self.held), "emulator_parts": sorted(self.parts)}
            return encode(Payload(record={"num_examples": self.num_examples, **held}))
        message = decode(content)
        if kind == "hold":
            self.held.add(message.record["emulator"])
            self.parts |= {short(sha256) for sha256 in message.arrays}
            return encode(Payload(record={"held": message.record["emulator"]}))
        assert message.record["emulator"] in self.held, "asked to train without an emulator"
        return encode(update_of(message, self.delta, self.num_examples))


def update_of(task: Payload, delta: float, num_examples: int = 10, **changes: Any) -> Payload:
    """Return a proper reply to a train task, some record entries changed."""
    record = {
        "server_round": task.record.get("server_round"),
        "emulator": task.record.get("emulator"),
        "num_examples": num_examples,
        "first_loss": 3.0,
        "last_loss": 2.0,
        "mean_loss": 2.5,
        "num_tokens": 100,
        "seconds": "00000.100000",
        **changes,
    }
    return Payload({n: a + np.float32(delta) for n, a in task.arrays.items()}, record)


class FakeTransport:
    """Brings replies in any order; scripts say what some of them are instead.

    Args:
        devices: Who can be reached.
        scripts: What a device answers to a kind of message; None is no answer at all.
        order: Seed of the order of replies; None for the order of the tasks.
    """

    interval_seconds = 0.001

    def __init__(
        self,
        devices: Mapping[str, FakeDevice],
        scripts: Mapping[tuple[str, str], Script] | None = None,
        *,
        order: int | None = None,
    ) -> None:
        self.devices = dict(devices)
        self.scripts = dict(scripts or {})
        self.sent: list[tuple[str, str, bytes]] = []
        self.received: list[tuple[str, str, bytes]] = []
        self.strays: list[tuple[str, Reply]] = []
        self._order = order
        self._queue: list[tuple[str, Reply]] = []

    def nodes(self) -> list[str]:
        names = list(self.devices)
        return names if self._order is None else self._shuffled(names)

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        tickets, queue = {}, []
        for node, content in tasks.items():
            ticket = f"ticket-{len(self.sent)}"
            tickets[ticket] = node
            self.sent.append((kind, node, content))
            reply = self._reply(kind, node, content)
            if reply is not None:
                self.received.append((kind, node, reply.content or b""))
                queue.append((ticket, reply))
        self._queue += queue if self._order is None else self._shuffled(queue)
        return tickets

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        strays, self.strays = self.strays, []
        return strays + ([self._queue.pop(0)] if self._queue else [])

    def _reply(self, kind: str, node: str, content: bytes) -> Reply | None:
        if (kind, node) in self.scripts:
            return self.scripts[kind, node](content)
        return Reply(node, self.devices[node].answer(kind, content))

    def _shuffled(self, items: list[Any]) -> list[Any]:
        rng = np.random.default_rng(self._order)
        return [items[i] for i in rng.permutation(len(items))]


def saying(payload: Payload | bytes) -> Script:
    """Return a script that answers the same whatever was asked."""
    content = payload if isinstance(payload, bytes) else encode(payload)
    return lambda _: Reply("somebody", content)


def failing(reason: str, *, lost: bool = False) -> Script:
    """Return a script of a device that fails, or goes away."""
    return lambda _: Reply("somebody", error=reason, lost=lost)


def updating(delta: float = 1.0, num_examples: int = 10, **changes: Any) -> Script:
    """Return a script that answers a train task with some record entries changed."""
    return lambda content: Reply(
        "somebody", encode(update_of(decode(content), delta, num_examples, **changes))
    )


class FakeClock:
    """Time that passes only while somebody sleeps; no deadline depends on a busy machine."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def silent(_: bytes) -> None:
    """Never answer."""


class PlanOf:
    """A controller that follows a function."""

    def __init__(self, plan: Callable[[RoundObservation], RoundPlan]) -> None:
        self.seen: list[RoundObservation] = []
        self._plan = plan

    def plan(self, observation: RoundObservation) -> RoundPlan:
        self.seen.append(observation)
        return self._plan(observation)

    def state(self) -> Mapping[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        assert not state


def everyone(*, server_steps: int = 0, fraction_train: float = 1.0) -> FixedController:
    """Return a controller that gives all devices two steps."""
    return FixedController(
        rung="emulator",
        fraction_train=fraction_train,
        local_steps=2,
        server_steps=server_steps,
        seed=0,
    )


def server_adding(delta: float, num_examples: int = 10) -> ServerTraining:
    """Return the training of a server that adds ``delta`` to what is tuned."""

    def training(
        current: Mapping[str, np.ndarray], tuned: Part, num_steps: int, first_step: int, seed: int
    ) -> Payload:
        return update_of(Payload(part_of(current, tuned)), delta, num_examples, seconds=0.1)

    return training


def federation(transport: Transport, **changes: Any) -> Federation:
    """Return a federation over a transport: plain FedAvg of all devices unless changed."""
    settings: dict[str, Any] = {
        "controller": everyone(),
        "rungs": {"emulator": RUNG},
        "lora": LoraAggregation(),
        "optimizer": ServerOptimizer(),
        "limits": Limits(max_examples=1000),
        "settings": LocalSettings(batch_size=2, learning_rate=0.1),
        "server_training": None,
        "server_weight_ratio": None,
        "min_clients": 1,
        "deadline_seconds": None,
        "num_rounds": 10,
        "seed": 0,
    }
    return Federation(transport=transport, **{**settings, **changes})


def start(value: float = 0.0) -> FederationState:
    """Return the state before the first round."""
    return FederationState(0, adapter(value))


def at_round(state: FederationState, server_round: int) -> FederationState:
    """Return the same state some rounds on."""
    return replace(state, server_round=server_round)
