"""Many rounds in which everything goes wrong at once: what counts is right, and it counts once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from fakes import FakeClock, FakeDevice, everyone, federation, server_adding, start, update_of
from fedpeat.core.records import Reply
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated import exchange
from fedpeat.federated.screening import Limits

DELTAS = {"a": 1.0, "b": 2.0, "c": -3.0, "d": 0.5}
EXAMPLES = {"a": 10, "b": 20, "c": 30, "d": 40}
DEADLINE_SECONDS = 5.0

STATUS = {
    "well": "accepted",
    "twice": "accepted",
    "slow": "accepted",
    "well, then gone": "accepted",
    "never": "late",
    "late": "late",
    "gone": "dropped",
    "failing": "failed",
    "NaN": "rejected",
    "cut": "rejected",
    "of the round before": "rejected",
    "for another emulator": "rejected",
    "of another shape": "rejected",
    "greedy": "rejected",
}
"""What becomes of a device whose reply fares so."""


def wrong_shape(update: Payload) -> Payload:
    return Payload({n: a[:1] for n, a in update.arrays.items()}, update.record)


WRONG: dict[str, Callable[[Payload], bytes]] = {
    "NaN": lambda task: encode(update_of(task, math.nan)),
    "cut": lambda task: encode(update_of(task, 1.0))[:-5],
    "of the round before": lambda task: encode(
        update_of(task, 1.0, server_round=task.record["server_round"] - 1)
    ),
    "for another emulator": lambda task: encode(update_of(task, 1.0, emulator="0" * 64)),
    "of another shape": lambda task: encode(wrong_shape(update_of(task, 1.0))),
    "greedy": lambda task: encode(update_of(task, 1.0, num_examples=10**6)),
}


class Storm:
    """A network of devices, to each of whose updates something drawn from a seed happens.

    Replies come in any order; late ones come in a later round, under the ticket of their own.
    """

    interval_seconds = 0.1

    def __init__(self, seed: int, clock: FakeClock) -> None:
        self.devices = {n: FakeDevice(DELTAS[n], EXAMPLES[n]) for n in DELTAS}
        self.fates: list[dict[str, str]] = []
        self._rng = np.random.default_rng(seed)
        self._clock = clock
        self._replies: list[tuple[float, str, Reply]] = []
        self._late: list[tuple[str, Reply]] = []
        self._num_tickets = 0

    def nodes(self) -> list[str]:
        """Return at least two devices, in any order."""
        names = list(self._rng.permutation(list(self.devices)))
        return [str(name) for name in names[: self._rng.integers(2, len(names) + 1)]]

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        late, self._late = self._late, []
        self._replies += [(0.0, ticket, reply) for ticket, reply in late]
        fates = {}
        tickets = {}
        for node, content in tasks.items():
            self._num_tickets += 1
            ticket = f"ticket-{self._num_tickets}"
            tickets[ticket] = node
            fate = str(self._rng.choice(list(STATUS))) if kind == "train" else "well"
            fates[node] = fate
            self._befall(fate, ticket, node, kind, content)
        if kind == "train":
            self.fates.append(fates)
        return tickets

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        now = self._clock.monotonic()
        due = [(t, reply) for at, t, reply in self._replies if at <= now]
        self._replies = [item for item in self._replies if item[0] > now]
        return [due[i] for i in self._rng.permutation(len(due))]

    def _befall(self, fate: str, ticket: str, node: str, kind: str, content: bytes) -> None:
        now = self._clock.monotonic()
        if fate == "never":
            return
        if fate == "gone":
            reply = Reply(node, error="SuperNode is unavailable", lost=True)
        elif fate == "failing":
            reply = Reply(node, error="OSError: no space left on device")
        elif fate in WRONG:
            reply = Reply(node, WRONG[fate](decode(content)))
        else:
            reply = Reply(node, self.devices[node].answer(kind, content))
        if fate == "well, then gone":  # it forgets all, and is asked anew
            self.devices[node] = FakeDevice(DELTAS[node], EXAMPLES[node])
        if fate == "late":
            self._late.append((ticket, reply))
            return
        at = now + (DEADLINE_SECONDS - 1 if fate == "slow" else 0)
        self._replies += [(at, ticket, reply)] * (2 if fate == "twice" else 1)


@pytest.mark.parametrize("seed", range(3))
def test_in_a_storm_only_right_updates_count_and_each_counts_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(exchange, "time", clock)
    storm = Storm(seed, clock)
    loop = federation(
        storm,
        controller=everyone(server_steps=1),
        limits=Limits(1000),
        server_training=server_adding(0.25, 50),
        deadline_seconds=DEADLINE_SECONDS,
        num_rounds=40,
    )
    state, value = start(), 0.0
    for server_round in range(1, 41):
        state, result = loop.run_round(state, None)
        fates = storm.fates[-1]
        got = {r.client_id: r.status for r in result.participants if r.role == "device"}
        assert got == {node: STATUS[fate] for node, fate in fates.items()}
        taken = [node for node, fate in fates.items() if STATUS[fate] == "accepted"]
        total = 50 + sum(EXAMPLES[node] for node in taken)
        value += (0.25 * 50 + sum(DELTAS[node] * EXAMPLES[node] for node in taken)) / total
        for array in state.adapter.values():
            np.testing.assert_allclose(array, value, rtol=1e-5, atol=1e-5)
        assert state.server_round == server_round
    happened = Counter(fate for fates in storm.fates for fate in fates.values())
    assert set(happened) == set(STATUS), "a storm in which something never happens tests too little"
