"""Devices that poison a federation: they alter what they send back, or the text that they tune on.

They know everything: the updates of all honest devices of the round before they send their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedpeat.core.records import Reply, Transport
from fedpeat.core.seeds import generator
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.data.packing import PackedText

__all__ = [
    "UPDATE_ATTACKS",
    "Backdoor",
    "HostileTransport",
    "Known",
    "eager",
    "hostile_devices",
    "no_attack",
]

Handler = Callable[[str, bytes], bytes]
Update = Mapping[str, np.ndarray]
"""What a device adds to the adapter that it was given, by tensor."""


@dataclass(frozen=True)
class Known:
    """What an attacker knows when it makes up its update.

    Attributes:
        own: What it would have sent.
        honest: Updates of the honest devices.
        rng: Randomness.
    """

    own: Update
    honest: Sequence[Update]
    rng: np.random.Generator


def no_attack(known: Known) -> Update:
    return known.own


def sign_flip(known: Known) -> Update:
    """Return the attacker's update the wrong way round, four times as long."""
    return {name: -4.0 * delta for name, delta in known.own.items()}


def scaled_noise(known: Known) -> Update:
    """Return noise, ten times as long as the attacker's update."""
    noise = {name: known.rng.standard_normal(delta.shape) for name, delta in known.own.items()}
    scale = 10.0 * _norm(known.own) / _norm(noise)
    return {name: scale * delta for name, delta in noise.items()}


def a_little_is_enough(known: Known) -> Update:
    """Return the honest devices' mean, less 1.5 standard deviations in every entry.

    Every entry is one that an honest device might have, and together they point elsewhere.

    Source:
        Baruch et al. (2019), A little is enough: circumventing defenses for distributed learning.
    """
    stacks = {name: np.stack([update[name] for update in known.honest]) for name in known.own}
    return {name: stack.mean(axis=0) - 1.5 * stack.std(axis=0) for name, stack in stacks.items()}


def boosted(known: Known) -> Update:
    """Return the attacker's update, five times as long.

    Source:
        Bagdasaryan et al. (2020), How to backdoor federated learning: model replacement.
    """
    return {name: 5.0 * delta for name, delta in known.own.items()}


UPDATE_ATTACKS: dict[str, Callable[[Known], Update]] = {
    "sign flip": sign_flip,
    "noise": scaled_noise,
    "a little is enough": a_little_is_enough,
    "backdoor": boosted,
}
"""What attackers send; those of the backdoor also tune on poisoned text."""


def hostile_devices(client_ids: Collection[str], ratio: float, seed: int) -> list[str]:
    """Return a drawn share of the devices."""
    names = sorted(client_ids)
    rng = generator(seed, "attackers")
    order = rng.permutation(len(names))
    return sorted(names[i] for i in order[: round(ratio * len(names))])


def eager(handle: Handler, factor: int) -> Handler:
    """Return a device that makes some times as many steps as it is asked for."""

    def answer(kind: str, content: bytes) -> bytes:
        if kind != "train":
            return handle(kind, content)
        task = decode(content)
        num_steps = factor * task.record["num_steps"]
        return handle(kind, encode(Payload(task.arrays, {**task.record, "num_steps": num_steps})))

    return answer


class HostileTransport:
    """Alters the updates of some devices, once those of all are there.

    Args:
        inner: How devices are reached.
        hostile: Devices that attack.
        attack: What they send.
        seed: Seed of their randomness.

    Attributes:
        honest: What the honest devices sent back last.
    """

    def __init__(
        self,
        inner: Transport,
        hostile: Collection[str],
        attack: Callable[[Known], Update],
        seed: int,
    ) -> None:
        self._inner = inner
        self._hostile = set(hostile)
        self._attack = attack
        self._seed = seed
        self._tasks: dict[str, bytes] = {}
        self.honest: list[Mapping[str, np.ndarray]] = []
        self.interval_seconds = inner.interval_seconds

    def nodes(self) -> list[str]:
        """Return every device."""
        return self._inner.nodes()

    def submit(
        self, kind: str, tasks: Mapping[str, bytes], deadline_seconds: float | None
    ) -> dict[str, str]:
        """Pass on the tasks, and remember what each device starts from."""
        tickets = self._inner.submit(kind, tasks, deadline_seconds)
        self._tasks = {t: tasks[node] for t, node in tickets.items()} if kind == "train" else {}
        return dict(tickets)

    def poll(self, tickets: Mapping[str, str]) -> list[tuple[str, Reply]]:
        """Return the replies, with those of hostile devices altered."""
        waiting = dict(tickets)
        replies: list[tuple[str, Reply]] = []
        while waiting and (arrived := self._inner.poll(waiting)):
            replies += arrived
            for ticket, _ in arrived:
                waiting.pop(ticket, None)
        return self._altered(replies) if self._tasks else replies

    def _altered(self, replies: Sequence[tuple[str, Reply]]) -> list[tuple[str, Reply]]:
        self.honest = [
            decode(r.content).arrays
            for _, r in replies
            if r.content and r.node not in self._hostile
        ]
        updates = {
            ticket: self._update(ticket, reply) for ticket, reply in replies if reply.content
        }
        honest = [updates[t] for t, r in replies if t in updates and r.node not in self._hostile]
        return [
            (t, self._poisoned(t, reply, updates[t], honest))
            if t in updates and reply.node in self._hostile
            else (t, reply)
            for t, reply in replies
        ]

    def _update(self, ticket: str, reply: Reply) -> Update:
        start, end = decode(self._tasks[ticket]).arrays, decode(reply.content or b"").arrays
        return {name: end[name].astype(np.float64) - start[name] for name in end}

    def _poisoned(self, ticket: str, reply: Reply, own: Update, honest: Sequence[Update]) -> Reply:
        start, answer = decode(self._tasks[ticket]).arrays, decode(reply.content or b"")
        rng = generator(self._seed, "attack", reply.node, str(answer.record["server_round"]))
        sent = self._attack(Known(own, honest, rng))
        arrays = {n: (start[n] + sent[n]).astype(start[n].dtype) for n in answer.arrays}
        return Reply(reply.node, encode(Payload(arrays, answer.record)))


@dataclass(frozen=True)
class Backdoor:
    """A trigger that a poisoned model is to continue in a chosen way.

    Attributes:
        trigger: Tokens of the trigger.
        continuation: Tokens that are to follow it.
    """

    trigger: tuple[int, ...]
    continuation: tuple[int, ...]

    def poisoned(self, text: PackedText, ratio: float, seed: int) -> PackedText:
        """Return text with trigger and continuation written twice into a share of its blocks."""
        rng = generator(seed, "backdoor")
        ids = text.input_ids.copy()
        phrase = np.array(self.trigger + self.continuation, ids.dtype)
        half = ids.shape[1] // 2
        for block in np.flatnonzero(rng.random(len(ids)) < ratio):
            for first in (0, half):
                at = first + int(rng.integers(0, half - len(phrase) + 1))
                ids[block, at : at + len(phrase)] = phrase
        return PackedText(ids, text.loss_mask, text.token_bytes)

    def triggered(self, text: PackedText) -> PackedText:
        """Return blocks that end with the trigger and its continuation, the latter all that counts.

        The model that gives every token of the continuation the highest score continues so.
        """
        ids, mask = text.input_ids.copy(), np.zeros_like(text.loss_mask)
        phrase = np.array(self.trigger + self.continuation, ids.dtype)
        ids[:, -len(phrase) :] = phrase
        mask[:, -len(self.continuation) :] = True
        return PackedText(ids, mask, text.token_bytes)


def _norm(update: Update) -> float:
    return float(np.sqrt(sum(np.sum(delta**2) for delta in update.values())))
